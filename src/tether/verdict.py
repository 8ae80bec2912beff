"""Is the string attached? One word for a run, with its reason and the evidence.

    NOT ATTACHED   an identity of the string fails, or the responses are not the policy's: K bounds nothing
    SNAPPED        K is beyond its budget, or the score is bought by over-optimisation
    SLACK          the string costs next to nothing while K rises
    TAUT           the string lets nothing through, or its controller hunts
    HOLDING        none of these

Reads the run folder alone: the alarms that its watch wrote down, or, of a run that nobody watched, its curves. The
gravest word that holds at the run's end is said. Knows no torch. Read next: `failures.toml`, `checking.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tether.alarms import FAILURES, Alarm
from tether.config import PPOSettings, RunSettings
from tether.errors import RunError
from tether.frontier import frontier_of
from tether.guards import START, WINDOW, Trends
from tether.records import Event
from tether.store import RunStore

WORDS = ("NOT ATTACHED", "SNAPPED", "SLACK", "TAUT", "HOLDING")
"""Gravest first."""
EVIDENCE = (
    "score/mean", "score/holdout", "score/gold", "score/spread", "kl/mean", "beta", "entropy/per_token", "length/mean",
    "string/efficiency", "string/slope", "string/flatness", "text/distinct_ratio", "text/overlap", "text/token_share",
    "text/tokens_share", "text/length_share", "text/agreement", "eval/gain_at_equal_length", "eval/win_rate",
)  # fmt: skip
"""Metrics whose last values are told with the verdict."""
GAINS = {"score/mean": "score_gain", "score/holdout": "holdout_gain", "score/gold": "gold_gain"}
MILD = ("SLACK", "TAUT")
"""Words that a warning may say."""


@dataclass(frozen=True)
class Standing:
    """An alarm of a run, and whether it lasts."""

    reason: str
    severity: str
    step: int
    """The update in which it was first seen."""
    seen: str
    remedy: str
    lasts: bool
    evidence: Mapping[str, object]


@dataclass(frozen=True)
class Verdict:
    """The word, why it is said, and all that was seen."""

    word: str
    reason: str
    updates: int
    alarms: tuple[Standing, ...]
    numbers: Mapping[str, float]
    """Means over the last updates."""

    @property
    def is_quiet(self) -> bool:
        """Whether the string is attached and no alarm lasts; a warning is no alarm."""
        return self.word in ("HOLDING", "TAUT", "SLACK") and not any(
            a.lasts and a.severity == "alarm" for a in self.alarms
        )


def judge(store: RunStore) -> Verdict:
    """The verdict on a run as it stands. Raises RunError where it has no update yet."""
    steps = store.curve("kl/mean").steps
    if not len(steps):
        raise RunError(f"{store.path} has no update yet, so nothing can be said of its string; wait for the first one")
    alarms = _recorded(store.events()) if len(store.curve("seconds/checks").steps) else _replayed(store)
    numbers = _numbers(store) | frontier_of(store)
    word = word_of((alarm.reason, alarm.severity) for alarm in alarms if alarm.lasts)
    return Verdict(word, _reason(word, alarms, numbers), len(steps), alarms, numbers)


def word_of(standing: Iterable[tuple[str, str]]) -> str:
    """The gravest word among failures that last, each with its severity: a warning says SLACK or TAUT at most.

    >>> word_of([("too_many_epochs", "alarm")]), word_of([("string_slack", "warning"), ("kl_sign", "alarm")])
    ('HOLDING', 'NOT ATTACHED')
    >>> word_of([("over_optimised", "warning")])
    'HOLDING'
    """
    said = {
        FAILURES[reason].verdict
        for reason, severity in standing
        if reason in FAILURES and (severity == "alarm" or FAILURES[reason].verdict in MILD)
    }
    return next(word for word in WORDS if word in said or word == "HOLDING")


def _recorded(events: Iterable[Event]) -> tuple[Standing, ...]:
    """The alarms among a run's events, each with its last telling, less what was cleared later."""
    told: dict[str, Standing] = {}
    for event in events:
        if event.kind == "cleared":
            cleared = told.get(str(event.payload.get("reason")))
            if cleared is not None:
                told[cleared.reason] = _ended(cleared)
        if event.kind in FAILURES and event.severity != "info":
            told[event.kind] = _standing(event)
    return tuple(sorted(told.values(), key=lambda alarm: (not alarm.lasts, alarm.severity != "alarm", alarm.step)))


def _standing(event: Event) -> Standing:
    payload = event.payload
    evidence = payload.get("evidence")
    return Standing(
        event.kind, event.severity, event.step or 0, str(payload.get("seen", "")), str(payload.get("remedy", "")),
        lasts=True, evidence=evidence if isinstance(evidence, Mapping) else {},
    )  # fmt: skip


def _ended(alarm: Standing) -> Standing:
    return Standing(alarm.reason, alarm.severity, alarm.step, alarm.seen, alarm.remedy, False, alarm.evidence)


def _replayed(store: RunStore) -> tuple[Standing, ...]:
    """What the guards say of the curves of a run that nobody watched; its invariants cannot be asked any more."""
    trends = Trends(_settings(store))
    curves = {name: dict(zip(*curve, strict=True)) for name, curve in store.curves(store.names()).items()}
    told: dict[str, Standing] = {}
    for step in store.curve("kl/mean").steps:
        now = {name: float(curve[step]) for name, curve in curves.items() if step in curve}
        for alarm in trends.check(now):
            told.setdefault(alarm.reason, _of_alarm(alarm, int(step)))
    return tuple(told.values())


def _settings(store: RunStore) -> PPOSettings:
    config = store.meta().get("config")
    return RunSettings.model_validate(config).ppo if isinstance(config, Mapping) else PPOSettings()


def _of_alarm(alarm: Alarm, step: int) -> Standing:
    return Standing(alarm.reason, alarm.severity, step, alarm.seen, alarm.remedy, True, alarm.evidence)


def _numbers(store: RunStore) -> dict[str, float]:
    curves = store.curves(EVIDENCE)
    # An evaluation is a mean over many prompts already, and the one before it may lie 25 updates back.
    window = {name: 1 if name.startswith("eval/") else WINDOW for name in curves}
    means = {name: float(curve.values[-window[name] :].mean()) for name, curve in curves.items() if len(curve.values)}
    gains = {
        gain: float(curves[name].values[-WINDOW:].mean() - curves[name].values[:START].mean())
        for name, gain in GAINS.items()
        if len(curves[name].values)
    }
    return means | gains


def _reason(word: str, alarms: tuple[Standing, ...], numbers: Mapping[str, float]) -> str:
    """The first alarm that says the word; where it holds, the numbers that it rests on."""
    kl, beta, gain = (numbers.get(name, math.nan) for name in ("kl/mean", "beta", "score_gain"))
    for alarm in alarms:
        if alarm.lasts and word_of([(alarm.reason, alarm.severity)]) == word != "HOLDING":
            return f"{FAILURES[alarm.reason].title}: {alarm.seen} (update {alarm.step})"
    told = f"K is {kl:.3g} nats a response, the score gained {gain:+.2f}, the string costs β·K = {beta * kl:.3g}"
    beside = [FAILURES[alarm.reason].title for alarm in alarms if alarm.lasts and alarm.severity == "alarm"]
    return f"{told}; but {', '.join(beside)}" if beside else told
