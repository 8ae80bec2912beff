"""Runs that differ in β alone, as one sweep: where each came to rest."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev

from tether.page.reading import Reader
from tether.runs import knob

AT_REST = 20
"""Updates at the end whose mean is a run's place."""
LEAST = 2
"""Strings that make a sweep."""

Facts = dict[str, object]


def place(reader: Reader, id: str) -> Facts | None:
    """A finished run as a point, with what its settings are but for β; None for one that is not over or was steered."""
    meta, beat = reader.meta(), reader.heartbeat()
    config = meta.get("config")
    if beat is None or beat.status != "finished" or not isinstance(config, Mapping) or reader.outcomes():
        return None
    beta = knob(config, "beta")
    if not isinstance(beta, int | float) or meta.get("planted") is not None or knob(config, "controller") != "fixed":
        return None
    means = {name: _at_rest(reader, name) for name in ("score/mean", "kl/mean", "score/gold", "distinct_2")}
    steps = reader.sample_steps("probe")
    probes = reader.samples("probe", steps[-1], 0) if steps else []
    point = {
        "run": id, "beta": float(beta), "start": _start(reader),
        "score": means["score/mean"][0], "score_se": means["score/mean"][1],
        "kl": means["kl/mean"][0], "kl_se": means["kl/mean"][1], "gold": means["score/gold"][0],
        "distinct_2": means["distinct_2"][0], "text": probes[0].response if probes else "",
    }  # fmt: skip
    title = (
        f"{knob(config, 'world') or 'a run of your own'}, {knob(config, 'steps')} updates, seed {knob(config, 'seed')}"
    )
    return {"key": _key(config), "model": knob(config, "world") or "", "title": title, "point": point}


def _key(config: Mapping[str, object]) -> str:
    """A digest of all settings but β."""
    plain = json.loads(json.dumps(config))
    plain.get("ppo", {}).get("reward", {}).pop("beta", None)
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:8]


def _at_rest(reader: Reader, name: str) -> tuple[float | None, float | None]:
    values = reader.recent(name, AT_REST)
    return (fmean(values), pstdev(values) / math.sqrt(len(values))) if values else (None, None)


def _start(reader: Reader) -> float | None:
    """The score before the policy moved: of the evaluation before update 0, else of that update's own replies."""
    names = ("eval/score", "score/mean")
    _, curves = reader.curves(names, 0, 0)
    return next((float(curves[name].values[0]) for name in names if name in curves and len(curves[name].values)), None)


def gather(places: Sequence[Facts | None]) -> list[Facts]:
    """The sweeps among them, each by rising β."""
    groups: dict[object, list[Facts]] = {}
    for one in places:
        if one is not None:
            groups.setdefault(one["key"], []).append(one)
    found: list[Facts] = []
    for key, group in groups.items():
        by_beta = {point["beta"]: point for one in group if isinstance(point := one["point"], dict)}
        if len(by_beta) >= LEAST:
            points = [by_beta[beta] for beta in sorted(by_beta)]
            found.append({"id": key, "model": group[0]["model"], "title": group[0]["title"], "points": points})
    return found
