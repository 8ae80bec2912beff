"""Runs found and described: what is below a folder, and what one run's folder says, as data.

Reads run folders only, and changes nothing in them. Prints nothing, knows no torch. Read next: `runs_command.py`, the
same in a terminal; `plots.py`, as pictures.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tether.errors import RunError
from tether.metrics import CATALOGUE, did_you_mean
from tether.records import Curve, Heartbeat
from tether.store import RUN_FILE, RunStore
from tether.terminal import short_time

ROOT = Path("runs")
SILENT_SECONDS = 60.0
"""A running run without a sign of life for longer is said to be silent."""
LAST = 10
"""Updates in the mean at the end of a run."""
SHOWN = 8
"""Names of other runs in an error."""


@dataclass(frozen=True)
class RunSummary:
    """One run in a line."""

    name: str
    """Its path below the root."""
    path: str
    status: str
    model: str
    """The world or model that was trained."""
    beta: float | None
    """β in the last update."""
    updates: int
    """Updates done."""
    steps: int | None
    """Updates planned."""
    score: float | None
    """Mean over the last updates, in the score's unit."""
    kl: float | None
    """Likewise, nats per response."""
    created: float | None
    """Seconds since 1970."""
    fault: str = ""
    """Why it cannot be read."""


@dataclass(frozen=True)
class MetricSummary:
    """One metric through a run. None where it was not finite."""

    unit: str
    first: float | None
    last: float | None
    min: float | None
    max: float | None
    mean_of_last: float | None
    """Over the last 10 updates in which it was finite."""
    count: int


# ── finding ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def run_folders(root: Path) -> list[Path]:
    """Run folders directly below `root`, and one level further down (the runs of a sweep)."""
    return sorted(file.parent for pattern in ("*", "*/*") for file in root.glob(f"{pattern}/{RUN_FILE}"))


def list_runs(root: Path | str = ROOT) -> list[RunSummary]:
    """A summary of every run below `root`, the newest first; one that cannot be read says why in its status."""
    root = Path(root)
    summaries = [_summarise_folder(path, root) for path in run_folders(root)]
    return sorted(summaries, key=lambda summary: (-(summary.created or 0.0), summary.name))


def _summarise_folder(path: Path, root: Path) -> RunSummary:
    name = str(path.relative_to(root))
    try:
        with RunStore.open(path) as store:
            return summarise_run(store, name)
    except RunError as error:
        return RunSummary(name, str(path), "unreadable", "", None, 0, None, None, None, None, fault=str(error))


def find_run(name: str | Path, root: Path | str = ROOT) -> Path:
    """The run folder of a name below `root`, or of a path. Raises RunError with the nearest name there is."""
    for candidate in (Path(root) / name, Path(name)):
        if (candidate / RUN_FILE).is_file():
            return candidate
    known = [str(path.relative_to(root)) for path in run_folders(Path(root))]
    shown = ", ".join(known[:SHOWN]) + (", …" if len(known) > SHOWN else "")
    there = f"the runs there are {shown}" if known else "it holds no run"
    raise RunError(f"there is no run {str(name)!r} in {root}; {there}{did_you_mean(str(name), known)}")


# ── describing ──────────────────────────────────────────────────────────────────────────────────────────────────────
def summarise_run(store: RunStore, name: str) -> RunSummary:
    """The run in a line."""
    meta = store.meta()
    config, created = meta.get("config"), meta.get("created")
    beta = store.latest().get("beta")
    return RunSummary(
        name=name,
        path=str(store.path),
        status=status(store.last_heartbeat(), time.time()),
        model=_model_of(config),
        beta=_number(knob(config, "beta")) if beta is None else beta,
        updates=len(store.curve("score/mean").steps),
        steps=_whole(knob(config, "steps")),
        score=_mean_of_last(store.curve("score/mean").values),
        kl=_mean_of_last(store.curve("kl/mean").values),
        created=_number(created),
    )


def describe_run(store: RunStore) -> dict[str, object]:
    """Everything that `show` tells, and more, as one JSON object: summary, configuration, all metrics, events."""
    metrics = {name: asdict(summarise_metric(name, curve)) for name, curve in store.curves(store.names()).items()}
    return {
        **asdict(summarise_run(store, store.name)),
        "config": store.meta().get("config"),
        "metrics": metrics,
        "events": [asdict(event) for event in store.events()],
    }


def summarise_metric(name: str, curve: Curve) -> MetricSummary:
    """First, last, extremes and the mean of the last updates; the latter two leave out what was not finite."""
    values = curve.values
    finite = values[np.isfinite(values)]
    return MetricSummary(
        unit=CATALOGUE[name].unit if name in CATALOGUE else "",
        first=_finite(values[0]) if len(values) else None,
        last=_finite(values[-1]) if len(values) else None,
        min=float(finite.min()) if len(finite) else None,
        max=float(finite.max()) if len(finite) else None,
        mean_of_last=_mean_of_last(values),
        count=len(values),
    )


def status(beat: Heartbeat | None, now: float) -> str:
    """How the run stands: its own word, and for how long a running one has been silent."""
    if beat is None:
        return "not started"
    silent = now - beat.wall
    if beat.status == "running" and silent > SILENT_SECONDS:
        return f"silent for {short_time(silent)}"
    return beat.status


def knob(config: object, *names: str) -> object:
    """The first setting of these names, wherever it stands in a nested configuration; None where there is none.

    >>> knob({"ppo": {"reward": {"beta": 0.05}}, "world": None}, "world", "beta")
    0.05
    """
    for name in names:
        queue = deque([config])
        while queue:
            level = queue.popleft()
            if isinstance(level, Mapping):
                if level.get(name) is not None:
                    return level[name]
                queue.extend(level.values())
    return None


def _model_of(config: object) -> str:
    """What the run is about in a word: its world, or the checkpoint that it starts from."""
    named = knob(config, "world", "policy", "model")
    return str((named.get("source") or "") if isinstance(named, Mapping) else named or "")


def crew_of(meta: Mapping[str, object], latest: Mapping[str, float | None]) -> list[str]:
    """Who shares the work of a run, a line each; nothing where one process does all of it.

    >>> crew_of({"processes": {"count": 2, "sharding": "fsdp", "hosts": ["a", "b"]}}, {})
    ['2 processes, weights in shares, on a, b']
    """
    lines: list[str] = []
    processes, workers = meta.get("processes"), meta.get("workers")
    if isinstance(processes, Mapping) and int(str(processes.get("count", 1))) > 1:
        how = "weights in shares" if processes.get("sharding") == "fsdp" else "each with the whole model"
        lines.append(f"{processes['count']} processes, {how}, on {_distinct(processes.get('hosts'))}")
    for role in ("rollout", "scoring"):
        crew = workers.get(role) if isinstance(workers, Mapping) else None
        if isinstance(crew, Mapping) and isinstance(places := crew.get("workers"), list):
            hosts = _distinct([place.get("host") for place in places if isinstance(place, Mapping)])
            again = f", started anew {crew['restarts']} times" if crew.get("restarts") else ""
            lines.append(f"{len(places)} {role} workers of Ray{_version_of(workers)} on {hosts}{again}")
    if isinstance(workers, Mapping) and "writer" in workers:
        lines.append(f"responses by {workers['writer']}")
    version = latest.get("rollout/version")
    if version is not None:
        age = latest.get("rollout/staleness") or 0.0
        lines.append(f"responses by weights of version {version:.0f}, {age:.0f} updates old")
    return lines


def _version_of(workers: object) -> str:
    version = workers.get("version") if isinstance(workers, Mapping) else None
    return "" if version is None else f" {version}"


def _distinct(hosts: object) -> str:
    return ", ".join(dict.fromkeys(map(str, hosts))) if isinstance(hosts, list) else "unknown hosts"


def _finite(number: float) -> float | None:
    return float(number) if np.isfinite(number) else None


def _mean_of_last(values: NDArray[np.float64]) -> float | None:
    finite = values[np.isfinite(values)][-LAST:]
    return float(finite.mean()) if len(finite) else None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) else None
