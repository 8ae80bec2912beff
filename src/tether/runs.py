"""Runs in the terminal: `tether runs` lists them, `tether show RUN` tells one run's numbers.

Reads run folders only, and changes nothing in them. Every number's unit, range and remedy come from the catalogue.
Knows no torch. Read next: `plots.py` (the same runs as pictures).
"""

from __future__ import annotations

import json as jsonlib
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tether.database import to_json
from tether.errors import RunError
from tether.metrics import CATALOGUE, Metric, did_you_mean
from tether.records import Curve, Event, Heartbeat
from tether.store import RUN_FILE, RunStore
from tether.terminal import console_for_output, short, short_time, sparkline, table_of_columns

ROOT = Path("runs")
SILENT_SECONDS = 60.0
"""A running run without a sign of life for longer is said to be silent."""
LAST = 10
"""Updates in the mean at the end of a run."""
NOTED = 5
"""Warnings shown."""
SHOWN = 8
"""Names of other runs in an error."""
UNITS = {"nats/response": "nats", "nats/token": "nats/tok", "tokens/s": "tok/s", "score/nat": "per nat", "1": ""}
"""Short forms for narrow terminals; a bare `nats` is per response, as everywhere."""
MAIN = (
    "score/mean", "score/std", "score/holdout", "score/gold", "objective/tethered", "reward/mean", "reward/non_score",
    "kl/mean", "kl/se", "kl/full", "beta",
    "entropy/per_token", "length/mean", "finished/share", "distinct_2",
    "loss/policy", "loss/value", "ppo/approx_kl", "ppo/clip_fraction", "ppo/ratio_first", "grad/norm", "learning_rate",
    "value/explained_variance",
    "eval/score", "eval/holdout", "eval/gold", "eval/kl", "eval/distinct_2", "eval/length", "eval/win_rate",
    "seconds/total", "tokens/per_second",
)  # fmt: skip
"""What `show` tells in the terminal; `--json` tells all."""


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


# ── the commands ────────────────────────────────────────────────────────────────────────────────────────────────────
def main_runs(root: Path = ROOT, json: bool = False) -> None:
    """List the runs below a folder, the newest first.

    Args:
        root: The folder that holds the run folders.
        json: Print one JSON object instead of a table.
    """
    summaries = list_runs(root)
    if json:
        _print_json({"root": str(root), "runs": [asdict(summary) for summary in summaries]})
    else:
        print_runs(summaries, root)


def main_show(run: str, /, root: Path = ROOT, json: bool = False) -> None:
    """Show one run: its main metrics with a sparkline each, what is out of range, and its latest warnings.

    Args:
        run: The run's name below `root`, or the path of its folder.
        root: The folder that holds the run folders.
        json: Print one JSON object with every metric and event instead of a table.
    """
    path = find_run(run, root)
    with RunStore.open(path) as store:
        if json:
            _print_json(describe_run(store))
        else:
            print_run(store)


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


# ── finding ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def run_folders(root: Path) -> list[Path]:
    """Run folders directly below `root`, and one level further down (the runs of a sweep)."""
    return sorted(file.parent for pattern in ("*", "*/*") for file in root.glob(f"{pattern}/{RUN_FILE}"))


def list_runs(root: Path | str = ROOT) -> list[RunSummary]:
    """A summary of every run below `root`, the newest first; one that cannot be read says why in its status."""
    root = Path(root)
    summaries = [_summarise_folder(path, root) for path in run_folders(root)]
    return sorted(summaries, key=lambda summary: (-(summary.created or 0.0), summary.name))


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


# ── printing ────────────────────────────────────────────────────────────────────────────────────────────────────────
def print_runs(summaries: Sequence[RunSummary], root: Path) -> None:
    """A table, one run a line."""
    console = console_for_output()
    if not summaries:
        console.print(f"no runs in {root}; start one: tether train --world nano --steps 20 --name first", markup=False)
        return
    table = table_of_columns()
    for heading in ("run", "model"):
        table.add_column(heading, overflow="fold")
    for heading in ("β", "updates", "score", "KL"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("status", "started"):
        table.add_column(heading, no_wrap=True)
    for summary in summaries:
        numbers = [short(summary.beta), _progress(summary), short(summary.score), short(summary.kl)]
        cells = [summary.name, summary.model, *numbers, summary.status, _date(summary.created)]
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)
    for summary in summaries:
        if summary.fault:
            console.print(f"! {summary.fault}", style="yellow", markup=False)


def print_run(store: RunStore) -> None:
    """Header, main metrics with a sparkline each, what is out of range, and the latest warnings."""
    console = console_for_output()
    _print_header(console, summarise_run(store, store.name))
    latest = store.latest()
    if names := [name for name in MAIN if name in latest]:
        console.print(_metric_table(store.curves(names)))
    for name, last in latest.items():
        if name in CATALOGUE and CATALOGUE[name].is_outside(last):
            _print_outside(console, CATALOGUE[name], last)
    for event in [event for event in store.events() if event.severity != "info"][-NOTED:]:
        console.print(_event_line(event), style="yellow", markup=False)


def _print_header(console: Console, summary: RunSummary) -> None:
    parts = [summary.model, f"β {short(summary.beta)}", f"{_progress(summary)} updates", summary.status]
    started = f"started {_date(summary.created)} in {summary.path}"
    console.print(Text(summary.name, style="bold") + Text(" · " + " · ".join(part for part in parts if part)))
    console.print(Text(started, style="dim"))
    console.print()


def _metric_table(curves: Mapping[str, Curve]) -> Table:
    table = table_of_columns()
    table.add_column("metric", no_wrap=True)
    table.add_column("unit", no_wrap=True, style="dim")
    for heading in ("first", "last", "min", "max", f"last {LAST}"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name, curve in curves.items():
        told = summarise_metric(name, curve)
        numbers = (told.first, told.last, told.min, told.max, told.mean_of_last)
        unit = UNITS.get(told.unit, told.unit)
        table.add_row(Text(name), unit, *(short(number) for number in numbers), sparkline(curve.values))
    return table


def _print_outside(console: Console, metric: Metric, last: float) -> None:
    line = f"! {metric.name} is {short(last)}; healthy: {metric.healthy}. {metric.remedy}"
    console.print(line, style="yellow", markup=False)


def _event_line(event: Event) -> str:
    told = ", ".join(f"{key} {value}" for key, value in event.payload.items())
    where = "" if event.step is None else f"update {event.step} "
    return f"{where}{event.severity} {event.kind}" + (f": {told}" if told else "")


def _print_json(value: Mapping[str, object]) -> None:
    """One JSON object; numbers that are not finite are null."""
    print(jsonlib.dumps(jsonlib.loads(to_json(value)), indent=2))


def _summarise_folder(path: Path, root: Path) -> RunSummary:
    name = str(path.relative_to(root))
    try:
        with RunStore.open(path) as store:
            return summarise_run(store, name)
    except RunError as error:
        return RunSummary(name, str(path), "unreadable", "", None, 0, None, None, None, None, fault=str(error))


def _progress(summary: RunSummary) -> str:
    return f"{summary.updates}/{summary.steps}" if summary.steps else str(summary.updates)


def _date(seconds: float | None) -> str:
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _finite(number: float) -> float | None:
    return float(number) if np.isfinite(number) else None


def _mean_of_last(values: NDArray[np.float64]) -> float | None:
    finite = values[np.isfinite(values)][-LAST:]
    return float(finite.mean()) if len(finite) else None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) else None
