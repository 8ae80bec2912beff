"""Is the climb honest? What the text shows, what other judges say and what the string says, held against each other.

    signs (`hacks.py`) + metrics of each update ──▶ Climb.check ──▶ alarms

Three families are independent of each other: **judges** that are not climbed (hold-out reward model, gold), the
**text** (diversity, length, which tokens earn the score) and the **string** (score beyond the ceiling σ√(2K), nats that
buy nothing). Two of them make a hack, one alone is suspect and no more than a warning; but a test that already holds a
control (a token whose count carries the gain, paired opinions) stands alone, unless the hold-out judge gained as well.
Knows no tensor, so that it can be asked of a run that is over. Read next: `failures.toml`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, pstdev
from typing import Any, Literal, get_args

from tether.alarms import Alarm

START, RECENT = 5, 10
"""Updates whose means are compared."""
EARLIEST = 15
"""Updates before which a climb is not judged."""
SURE = 4.0
"""Standard errors of a difference of two means."""
JUDGES = ("score/holdout", "score/gold")
TRACKED = ("score/mean", "score/std", "kl/mean", "beta", *JUDGES)
SHARED = 0.4
"""Part of the gain that a hold-out judge must see for a text's sign to be no more than suspect."""
REMEMBER = 20
"""Updates for which a sign stands after it was seen last: as often is the rarest look."""
AGAIN = 15
"""Updates within which a sign must be seen twice."""


GENERAL = (("hedging", "exploit_token", "length", "sycophancy", "echo", "opening"), ("buzzwords",), ("one_answer",))
"""Names of the text's signs, the particular first: a more general one is not told while one before it stands. What is
weak of the last speaks for over-optimisation beside a judge, and is no name of its own: replies grow alike in any hack.
"""

Weight = Literal["weak", "plain", "decisive"]
WEIGHTS: tuple[Weight, ...] = get_args(Weight)


@dataclass(frozen=True)
class Sign:
    """One thing that speaks for a hack."""

    name: str
    """The failure that it would be, of `FAILURES`."""
    family: str
    """`judges`, `text` or `string`."""
    seen: str
    evidence: Mapping[str, object] = field(default_factory=dict)
    weight: Weight = "plain"
    """`decisive`: it holds its own control and needs no second family. `weak`: it speaks beside another one alone."""


@dataclass
class Climb:
    """The numbers of a run so far, and the signs that stand."""

    history: dict[str, list[float]] = field(default_factory=dict)
    _shown: dict[str, list[int]] = field(default_factory=dict)
    _standing: dict[str, tuple[Sign, int]] = field(default_factory=dict)

    def check(self, metrics: Mapping[str, float], signs: Iterable[Sign] = ()) -> Iterator[Alarm]:
        """Take in one update, and say what its climb looks like."""
        for name in TRACKED:
            self.history.setdefault(name, []).append(metrics.get(name, math.nan))
        step = len(self.history["kl/mean"]) - 1
        self._take_up(signs, step)
        judges, string = list(self._judges()), list(self._string())
        text = [sign for sign, last in self._standing.values() if step - last <= REMEMBER]
        others = [other.seen for other in (*judges, *string)]
        told = [
            self._weigh(sign, others)
            for sign in text
            if sign.weight != "weak" or (others and sign.name not in GENERAL[-1])
        ]
        yield from (alarm for alarm in told if not _is_explained(alarm, told))
        if judges:
            others = [sign.seen for sign in (*text, *string)]
            yield _alarm(judges[0], "; ".join(sign.seen for sign in judges), others, grave=bool(others))

    def numbers(self) -> dict[str, float]:
        """`string/efficiency` and `string/slope` of the run as it stands; nothing in its first updates."""
        if len(self.history["kl/mean"]) < EARLIEST:
            return {}
        gain, kl = self._gain("score/mean"), self._recent("kl/mean")
        nats, bought = self._moved("kl/mean"), self._moved("score/mean")
        told = (
            {"string/efficiency": gain / (self._sigma() * math.sqrt(2.0 * kl))} if kl > 0 and self._sigma() > 0 else {}
        )
        return told | ({"string/slope": bought / nats} if abs(nats) > 0.1 else {})

    def state(self) -> dict[str, object]:
        """All that is remembered, as plain values."""
        standing = {name: [vars(sign) | {"evidence": dict(sign.evidence)}, last]
                    for name, (sign, last) in self._standing.items()}  # fmt: skip
        return {"history": self.history, "shown": self._shown, "standing": standing}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`."""
        kept = state["history"].items()
        self.history = {name: [math.nan if value is None else value for value in values] for name, values in kept}
        self._shown = {name: list(steps) for name, steps in state["shown"].items()}
        self._standing = {name: (Sign(**sign), last) for name, (sign, last) in state["standing"].items()}

    # ── the families ────────────────────────────────────────────────────────────────────────────────────────────────
    def _take_up(self, signs: Iterable[Sign], step: int) -> None:
        """A sign stands once it was seen in two updates within AGAIN; one with a control of its own at once."""
        gravest = {sign.name: sign for sign in sorted(signs, key=lambda sign: WEIGHTS.index(sign.weight))}
        for sign in gravest.values():
            shown = [last for last in self._shown.get(sign.name, []) if step - last <= AGAIN]
            self._shown[sign.name] = [*shown, step]
            if shown or sign.name == "sycophancy":
                self._standing[sign.name] = (sign, step)

    def _judges(self) -> Iterator[Sign]:
        """Another judge that falls, or that sees little of the gain, while the score has risen."""
        if len(self.history["score/mean"]) < EARLIEST or not self._has_risen():
            return
        gain = self._gain("score/mean")
        for name in JUDGES:
            values = self.history[name]
            if not math.isfinite(fmean(values)):
                continue
            # A string that reels the policy in takes score and judge back together: that is no climb.
            own, fallen = self._gain(name), self._fall(name) - self._fall("score/mean")
            told, error = {"score": gain, name: own, "fall": fallen}, SURE * self._error(name)
            most = own + self._fall(name)  # what it had gained at its peak
            if -own > max(0.2 * gain, error) or fallen > max(min(0.4 * gain, 0.5 * most), error):
                seen = f"the score gained {gain:.2f}, and {_JUDGE[name]} {own:+.2f}, {fallen:.2f} below its peak"
                yield Sign("over_optimised", "judges", seen, told)
            elif name == "score/holdout" and gain - own > max(0.75 * gain, error):
                yield Sign("over_optimised", "judges", f"of a gain of {gain:.2f} {_JUDGE[name]} sees {own:+.2f}", told)

    def _string(self) -> Iterator[Sign]:
        """More score than samples of the reference could give at this K, or nats that buy nothing."""
        if len(self.history["score/mean"]) < 2 * RECENT or not self._has_risen():
            return
        efficiency = self.numbers().get("string/efficiency", 0.0)
        if efficiency > 1.3:
            seen = f"the gain is {efficiency:.2f} × the ceiling σ√(2K): a tail that the reference's samples do not show"
            yield Sign("over_optimised", "string", seen, {"efficiency": efficiency})
        nats, bought, beta = self._moved("kl/mean"), self._moved("score/mean"), self.history["beta"][-1]
        dear = bought + SURE * self._error("score/mean") < 0.5 * beta * (nats - SURE * self._error("kl/mean"))
        if nats > max(1.0, 0.1 * self._recent("kl/mean")) and dear:
            seen = f"the last {nats:.3g} nats bought {bought:+.2f}, at a price of {beta:g} each"
            yield Sign("over_optimised", "string", seen, {"nats": nats, "bought": bought})

    def _weigh(self, sign: Sign, others: Sequence[str]) -> Alarm:
        """One sign of the text beside the other families, and beside a hold-out judge that saw the gain too."""
        gain, holdout = self._gain("score/mean"), self._gain("score/holdout")
        contradicted = sign.name != "sycophancy" and gain > 0.0 and holdout > SHARED * gain
        return _alarm(sign, sign.seen, others, grave=bool(others) or (sign.weight == "decisive" and not contradicted))

    # ── the run so far ──────────────────────────────────────────────────────────────────────────────────────────────
    def _has_risen(self) -> bool:
        gain = self._gain("score/mean")
        return gain > max(0.5 * self._sigma(), SURE * self._error("score/mean"))

    def _sigma(self) -> float:
        """Spread of the scores at the start."""
        return fmean(self.history["score/std"][:START])

    def _gain(self, name: str) -> float:
        """Mean of the last updates less that of the first."""
        values = self.history[name]
        return fmean(values[-RECENT:]) - fmean(values[:START])

    def _recent(self, name: str) -> float:
        return fmean(self.history[name][-RECENT:])

    def _moved(self, name: str) -> float:
        """Mean of the last updates less that of as many before."""
        values = self.history[name]
        before = values[-2 * RECENT : -RECENT]
        return fmean(values[-RECENT:]) - fmean(before) if before else 0.0

    def _fall(self, name: str) -> float:
        """How far the mean of the last updates is below its peak."""
        values = self.history[name]
        means = [fmean(values[end - RECENT : end]) for end in range(RECENT, len(values) + 1)]
        return max(means) - means[-1] if means else 0.0

    def _error(self, name: str) -> float:
        """Standard error of a gain, from how the updates' means scatter about each other."""
        values = self.history[name][-2 * RECENT :]
        steps = [b - a for a, b in pairwise(values)]
        scatter = math.sqrt(fmean(step**2 for step in steps) / 2.0) if steps else pstdev(values)
        return scatter * math.sqrt(1.0 / START + 1.0 / RECENT)


_JUDGE = {"score/holdout": "the hold-out judge", "score/gold": "gold"}


def weight_of(plain: bool, decisive: bool = False) -> Weight:
    """The weight of a sign that passed these bounds beside its lowest.

    >>> weight_of(False), weight_of(True), weight_of(True, True)
    ('weak', 'plain', 'decisive')
    """
    return "decisive" if decisive else "plain" if plain else "weak"


def _is_explained(alarm: Alarm, told: Sequence[Alarm]) -> bool:
    """Whether a more particular failure of the same severity or worse is told."""
    rank = {name: place for place, names in enumerate(GENERAL) for name in names}
    return any(
        rank.get(other.reason, 0) < rank.get(alarm.reason, 0) and other.severity in (alarm.severity, "alarm")
        for other in told
    )


def _alarm(sign: Sign, seen: str, others: Sequence[str], grave: bool) -> Alarm:
    told = seen + ("; besides, " + "; ".join(others) if others else "; nothing else speaks for it" if not grave else "")
    return Alarm(sign.name, told, {**sign.evidence, "families": 1 + bool(others)}, "alarm" if grave else "warning")
