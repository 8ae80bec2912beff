"""What the page is told of a run, as plain values: the list's line, the whole, the ledger, the verdict.

Each function reads through a `Reader`, in the run's own thread. Every shape stands in docs/page-api.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median

from tether.alarms import FAILURES
from tether.control import Command
from tether.errors import RunError
from tether.metrics import CATALOGUE
from tether.page.reading import UPDATE, Outcome, Reader
from tether.records import Event, Heartbeat
from tether.runs import crew_of, knob
from tether.steering import is_gone
from tether.store import RunStore
from tether.verdict import Verdict, judge
from tether.wishes import STEERABLE, knob_facts, short_name, value_of, with_values

STALE_SECONDS = 12.0
"""A run that trains gives a sign of life more often than this, or than three of its updates take."""
SLOW_PHASES = ("evaluating", "saving")
SLOW_FACTOR = 10.0
"""How much longer than an update these may take."""

Facts = dict[str, object]


# ── standing ────────────────────────────────────────────────────────────────────────────────────────────────────────
def standing(beat: Heartbeat | None, update_seconds: float | None, now: float) -> str:
    """`running`, `paused`, `stale`, `finished`, `stopped`, `failed` or `not started`."""
    if beat is None:
        return "not started"
    if beat.status != "running":
        return beat.status
    if is_gone(beat) or now - beat.wall > patience(beat, update_seconds):
        return "stale"
    return "paused" if beat.phase == "paused" else "running"


def patience(beat: Heartbeat, update_seconds: float | None) -> float:
    """Seconds of silence that are usual in this phase."""
    usual = 3.0 * (update_seconds or 0.0)
    return max(STALE_SECONDS, usual) * (SLOW_FACTOR if beat.phase in SLOW_PHASES else 1.0)


def update_seconds(reader: Reader) -> float | None:
    """The median time of the last updates."""
    recent = reader.recent("seconds/total")
    return median(recent) if recent else None


def heartbeat_facts(beat: Heartbeat | None, state: str, now: float) -> Facts | None:
    """The last sign of life."""
    if beat is None:
        return None
    return {
        "wall": beat.wall, "step": beat.step, "phase": beat.phase, "status": beat.status,
        "silent_seconds": max(0.0, now - beat.wall), "stale": state == "stale", "paused": state == "paused",
    }  # fmt: skip


def require_alive(reader: Reader, now: float) -> None:
    """Raise RunError unless somebody trains the run."""
    beat = reader.heartbeat()
    state = standing(beat, update_seconds(reader), now)
    if state in ("running", "paused"):
        return
    if beat is not None and state == "stale" and not is_gone(beat):
        return  # it may be in a long evaluation; the wish waits for it
    raise RunError(
        f"the run is {'dead: its process is gone' if state == 'stale' else state}; nothing can be asked of it"
    )


# ── one run ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def summary(reader: Reader, id: str, name: str, now: float) -> Facts:
    """The run in a line."""
    meta, beat = reader.meta(), reader.heartbeat()
    config, seconds = meta.get("config"), update_seconds(reader)
    beta = reader.recent("beta", 1)
    score, kl = reader.recent("score/mean"), reader.recent("kl/mean")
    return {
        "id": id, "name": name, "state": standing(beat, seconds, now), "phase": beat.phase if beat else "",
        "silent_seconds": max(0.0, now - beat.wall) if beat else None, "model": _model(config, meta),
        "beta": beta[0] if beta else knob(config, "beta"), "updates": reader.count(UPDATE),
        "steps": knob(config, "steps"), "score": _mean(score), "kl": _mean(kl), "created": meta.get("created"),
        "steered": steered_times(reader.outcomes()), "fault": "", "lineage": _lineage(meta), "verdict": None,
    }  # fmt: skip


def unreadable(id: str, name: str, state: str, fault: str, known: Mapping[str, object]) -> Facts:
    """The line of a run that cannot be read, or not just now."""
    empty: Facts = {
        "id": id, "name": name, "state": state, "phase": "", "silent_seconds": None, "model": "", "beta": None,
        "updates": 0, "steps": None, "score": None, "kl": None, "created": None, "steered": 0, "fault": fault,
        "lineage": None, "verdict": None,
    }  # fmt: skip
    return empty | dict(known) | {"state": state, "fault": fault}


def seconds_of(value: object) -> float:
    """A moment that a run tells; 0 where it tells none."""
    return float(value) if isinstance(value, int | float) else 0.0


def whole(reader: Reader, line: Facts, now: float) -> Facts:
    """Everything of a run that is small."""
    cursor = reader.cursor()
    meta, beat = reader.meta(), reader.heartbeat()
    source = meta.get("source")
    return {
        "run": line, "cursor": f"{line['id']}@{cursor}", "config": meta.get("config"),
        "knobs": knobs_now(reader, meta), "names": CATALOGUE.in_order(reader.names()), "latest": reader.latest(),
        "heartbeat": heartbeat_facts(beat, str(line["state"]), now), "update_seconds": update_seconds(reader),
        "sigma": meta.get("sigma"), "created": meta.get("created"), "version": meta.get("version"),
        "source": source.rpartition("/")[2] if isinstance(source, str) else None,
        "planted_fault": meta.get("planted"), "crew": crew_of(meta, reader.latest()),
    }  # fmt: skip


def knobs_now(reader: Reader, meta: Mapping[str, object]) -> list[Facts]:
    """Those that can be steered, where they stand and where they go; none where the settings are not known."""
    settings = _settings(meta)
    if settings is None:
        return []
    moved = knob_moves(reader.events())
    facts: list[Facts] = []
    for path in STEERABLE:
        start = value_of(settings, path)
        value, target = moved.get(path, (start, start))
        facts.append(knob_facts(path) | {"value": value, "target": target, "start": start})
    beta = reader.recent("beta", 1)
    controlled = next((fact["value"] for fact in facts if fact["name"] == "controller"), "fixed") != "fixed"
    if controlled and beta:  # a controller moves β by itself
        facts[0] |= {"value": beta[0], "target": beta[0]}
    return facts


def settings_now(reader: Reader):  # type: ignore[no-untyped-def]  # RunSettings, which is imported when it is needed
    """The settings in force. Raises RunError where this version does not know them."""
    settings = _settings(reader.meta())
    if settings is None:
        raise RunError("the run has settings of another version of tether; it can be read and not steered")
    moved = knob_moves(reader.events())
    return with_values(settings, {path: value for path, (value, _) in moved.items() if path in STEERABLE})


def _settings(meta: Mapping[str, object]):  # type: ignore[no-untyped-def]
    from tether.config import RunSettings

    try:
        return RunSettings.model_validate(meta.get("config"))
    except ValueError:
        return None


def knob_moves(events: Sequence[Event]) -> dict[str, tuple[object, object]]:
    """The knobs that were steered: value now, and target."""
    moved: dict[str, tuple[object, object]] = {}
    for event in events:
        changes = event.payload.get("changes") if event.kind == "steered" else None
        if isinstance(changes, Mapping):
            moved |= {path: (change[1], change[2]) for path, change in changes.items()}
    return moved


# ── the ledger ──────────────────────────────────────────────────────────────────────────────────────────────────────
def ledger(reader: Reader) -> Facts:
    """What was asked of the run, what became of it, and what the knobs really were."""
    outcomes = reader.outcomes()
    ruled = {one.command: one for one in outcomes}
    schedule = [
        {"step": event.step, "knob": path, "value": change[1]}
        for event in reader.events()
        if event.kind == "steered"
        for path, change in _changes(event.payload).items()
    ]
    commands = [command_facts(command, ruled.get(command.id)) for command in reader.commands()]
    return {"commands": commands, "schedule": schedule, "steered": steered_times(outcomes)}


def command_facts(command: Command, outcome: Outcome | None) -> Facts:
    """A wish and what became of it."""
    payload = {} if outcome is None else outcome.payload
    return {
        "id": command.id, "actor": command.actor, "kind": command.kind, "payload": command.payload,
        "created": command.created, "expires": command.expires,
        "state": "pending" if outcome is None else outcome.outcome, "step": None if outcome is None else outcome.step,
        "why": str(payload.get("why", "")), "changes": _changes(payload),
    }  # fmt: skip


def steered_times(outcomes: Sequence[Outcome]) -> int:
    """How many wishes turned a knob."""
    return sum(one.outcome == "applied" and bool(_changes(one.payload)) for one in outcomes)


def schedule_yaml(name: str, schedule: Sequence[Mapping[str, object]]) -> str:
    """The steered knobs as a file."""
    import yaml

    head = f"# What was steered in the run {name}: before update `step`, `knob` became `value`.\n"
    return head + yaml.safe_dump({"schedule": [dict(one) for one in schedule]}, sort_keys=False, allow_unicode=True)


# ── the verdict ─────────────────────────────────────────────────────────────────────────────────────────────────────
def verdict(reader: Reader) -> Facts:
    """Is the string attached? With every alarm, and every check whether it alarmed or not."""
    try:
        with RunStore.open(reader.path) as store:
            found = judge(store)
    except RunError as error:
        return {"verdict": None, "reason": str(error), "quiet": True, "updates": 0, "numbers": {}, "alarms": [],
                "checks": _checks(None)}  # fmt: skip
    return {
        "verdict": found.word, "reason": found.reason, "quiet": found.is_quiet, "updates": found.updates,
        "numbers": dict(found.numbers), "alarms": [_explained(asdict(alarm)) for alarm in found.alarms],
        "checks": _checks(found),
    }  # fmt: skip


def _explained(alarm: Facts) -> Facts:
    failure = FAILURES[str(alarm["reason"])]
    return {"title": failure.title, "kind": failure.kind, "why": failure.why, "alike": failure.alike} | alarm


def _checks(found: Verdict | None) -> list[Facts]:
    seen = {alarm.reason: alarm for alarm in (found.alarms if found else ())}
    checks: list[Facts] = []
    for failure in FAILURES.values():
        alarm = seen.get(failure.name)
        state = "ok" if alarm is None else alarm.severity if alarm.lasts else "over"
        checks.append({
            "name": failure.name, "title": failure.title, "kind": failure.kind, "verdict": failure.verdict,
            "state": state, "why": failure.why, "last": alarm and {"step": alarm.step, "seen": alarm.seen},
        })  # fmt: skip
    return checks


def named(path: str) -> str:
    """A knob's short name."""
    return short_name(path)


def _changes(payload: Mapping[str, object]) -> Mapping[str, Sequence[object]]:
    changes = payload.get("changes")
    return changes if isinstance(changes, Mapping) else {}


def _model(config: object, meta: Mapping[str, object]) -> str:
    named = knob(config, "world")
    if named is None:
        model = knob(config, "model", "policy")
        named = (model.get("source") if isinstance(model, Mapping) else model) or meta.get("source") or ""
    return str(named).rstrip("/").rpartition("/")[2]


def _lineage(meta: Mapping[str, object]) -> Facts | None:
    lineage = meta.get("lineage")
    if not isinstance(lineage, Mapping):
        return None
    return {"run": str(lineage.get("run", "")).rpartition("/")[2], "step": lineage.get("step")}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
