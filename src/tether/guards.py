"""Guards over the run's own numbers: relations that healthy runs keep, and trends that mean trouble.

    metrics of each update ──▶ Trends.check ──▶ alarms

A guard alarms when its relation fails in 3 of 5 updates, for what is measured on one batch is noisy. What moves by
design (K, score, length) is never alarmed for moving. Knows no tensor, so that it can be asked of a run that is over.
Read next: `failures.toml`, where each is explained.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from tether.alarms import Alarm
from tether.config import PPOSettings
from tether.records import Severity

OF, NEEDED = 5, 3
"""A guard trips when NEEDED of the last OF updates fail."""
START = 5
"""Updates whose mean is the run's start."""
SETTLED = 50
"""Updates after which a string may be called slack or taut."""
WINDOW = 20
MOVED = 4.0
"""A controller has had its time once it could have moved β so many times. After it could have doubled it, a clean
adaptive run (target 4, horizon of 25 batches) stood at 1.56 × its target."""
MOST_DRIFT, MOST_CLIPPED = 0.3, 0.35
"""Approx-KL, nats a token, and share of clipped tokens of an update. Sixteen responses give 0.05 to 0.2 and 0.1 to 0.25
where all is well, for approx-KL has a long tail; ten times the learning rate gives 1.5 and 0.5."""
LEAST_EXPLAINED = -4.0
"""Of the returns' variance: values that spread twice as far. Clean runs of 16 responses reach −1.8; a head that starts
with weights far too large begins at −70."""
SPIKE_KNOWN, SPIKED = 20, 3
"""Updates after which the first five are judged, and how many of them must stand out: approx-KL has a long tail, and
one of five was 8 times the later median in a clean run; the third largest was 0.9 times."""
ENTROPY_LOW, ENTROPY_HIGH = (0.35, 0.25), (1.5, 2.0)
"""Shares of the entropy's start that warn and alarm. Clean nano runs of 200 updates: 0.52 to 1.13, at temperature 0.7
down to 0.42; hacks on a weak string 0.3 to 1.9, as their text changes."""
MOST_ERROR = {"adaptive": 0.2, "budget": 1.0}
"""Relative error of K that a controller answers to at most: in n updates it moves log β by n·error·batch/horizon."""
TURNS_IN, SWING, MOST_TURNS = 80, 0.3, 3
"""Updates, the relative swing of a turn, and turns among them from which a controller hunts. With a horizon of 25
batches β turns once or not at all; of 2 batches, four times, by factors of 3 to 10."""
HASTE_IN, MOST_HASTE = 10, 2.0
"""Updates, and the factor that β may move by in them: K answers over some ten updates. A horizon of 20 batches, the
shortest that is advised, gives 1.1 (`adaptive`) and 1.65 (`budget`)."""
CENTRED, CENTRED_IN = 1e-5, 10
"""|mean| of a batch's scores over their deviation, and updates running in which it stays below: an even number of wins
and losses has mean 0 now and then."""
BETA_STOP = 10.0
"""Where the `budget` controller's β is held (`rewards.py:BUDGET_BOUNDS`)."""
TRACKED = (
    "score/mean", "kl/mean", "beta", "entropy/per_token", "ppo/approx_kl", "learning_rate",
)  # fmt: skip


class _Known(dict[str, float]):
    """Numbers by name; one that was not logged is NaN, which no guard trips on."""

    def __missing__(self, name: str) -> float:
        return math.nan


@dataclass
class Trends:
    """The numbers of a run so far, and how often each guard failed of late."""

    settings: PPOSettings
    history: dict[str, list[float]] = field(default_factory=dict)
    _failed: dict[str, deque[bool]] = field(default_factory=dict)

    def check(self, metrics: Mapping[str, float], distinct: int = 2) -> Iterator[Alarm]:
        """Take in one update's metrics, and say what does not hold. `distinct`: how many different texts it had."""
        now = _Known(metrics)
        for name in TRACKED:
            self.history.setdefault(name, []).append(now[name])
        yield from self._scores(now, distinct)
        for guard in (self._update, self._entropy, self._values, self._string, self._controller):
            yield from guard(now)

    def state(self) -> dict[str, object]:
        """All that is remembered, as plain values."""
        return {"history": self.history, "failed": {name: list(recent) for name, recent in self._failed.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`."""
        kept = state["history"].items()
        self.history = {name: [math.nan if value is None else value for value in values] for name, values in kept}
        self._failed = {name: deque(recent) for name, recent in state["failed"].items()}

    def _scores(self, now: Mapping[str, float], distinct: int) -> Iterator[Alarm]:
        flat = now["score/std"] <= 1e-6 * (1.0 + abs(now["score/mean"])) and distinct > 1
        if self._trips("zero_variance_scores", flat, needed=2, of=2):
            seen = f"{distinct} different responses all score {now['score/mean']:.4g}, two updates running"
            yield Alarm("zero_variance_scores", seen, {"score": now["score/mean"], "texts": distinct})
        centred = not flat and distinct > 4 and abs(now["score/mean"]) <= CENTRED * now["score/std"]
        if self._trips("score_normalised", centred, needed=CENTRED_IN, of=CENTRED_IN):
            seen = f"the scores of each of {CENTRED_IN} updates have mean 0 and deviation {now['score/std']:.3g}"
            yield Alarm("score_normalised", seen, {"mean": now["score/mean"], "std": now["score/std"]}, "warning")

    def _update(self, now: Mapping[str, float]) -> Iterator[Alarm]:
        drift, clipped = now["ppo/approx_kl"], now["ppo/clip_fraction"]
        if self._trips("too_many_epochs", drift > MOST_DRIFT or clipped > MOST_CLIPPED):
            seen = f"an update ends {drift:.3g} nats a token from where it began, with {clipped:.0%} of tokens clipped"
            yield Alarm("too_many_epochs", seen, {"approx_kl": drift, "clip_fraction": clipped})
        if self._updates() == SPIKE_KNOWN:
            yield from self._spike()

    def _spike(self) -> Iterator[Alarm]:
        """Approx-KL goes with the square of the learning rate, so it is compared at one rate."""
        rates, drifts = self.history["learning_rate"], self.history["ppo/approx_kl"]
        scaled = [drift * (rates[0] / rate) ** 2 for drift, rate in zip(drifts, rates, strict=True) if rate > 0]
        first, later = sorted(scaled[:5])[-SPIKED], median(scaled[10:] or scaled)
        if first > 5.0 * later and first > 0.05:
            seen = f"approx-KL was {first:.3g} in the first five updates and {later:.3g} later, at one learning rate"
            yield Alarm("adam_spike", seen, {"first": first, "later": later})

    def _entropy(self, now: Mapping[str, float]) -> Iterator[Alarm]:
        start = self._start("entropy/per_token")
        if start is None or start <= 0.0:
            return
        share = now["entropy/per_token"] / start
        evidence = {"start": start, "now": now["entropy/per_token"]}
        (lowish, low), (highish, high) = ENTROPY_LOW, ENTROPY_HIGH
        low, high = self._trips("entropy low", share < low), self._trips("entropy high", share > high)
        lowish, highish = self._trips("entropy lowish", share < lowish), self._trips("entropy highish", share > highish)
        seen = f"entropy is {share:.2f} of its start"
        if low or lowish:
            yield Alarm("entropy_collapse", seen, evidence, _grave(low))
        if high or highish:
            yield Alarm("entropy_explosion", seen, evidence, _grave(high))

    def _values(self, now: Mapping[str, float]) -> Iterator[Alarm]:
        explained = now["value/explained_variance"]
        if self._trips("value_too_big", explained < LEAST_EXPLAINED):
            yield Alarm("value_too_big", f"the value head explains {explained:.2f} of the returns' variance",
                        {"explained_variance": explained})  # fmt: skip
        idle = now["value/mean"] == 0.0 and self._updates() > 1 and self.settings.update.value_coef > 0
        if self._trips("value_dead", idle and now["loss/value"] > 0.0, needed=3, of=3):
            yield Alarm("value_dead", "the value head still says 0 everywhere", {"loss": now["loss/value"]})

    def _string(self, now: Mapping[str, float]) -> Iterator[Alarm]:
        kl, beta, knobs = now["kl/mean"], now["beta"], self.settings.reward
        if beta < 0.0:
            yield Alarm("kl_sign", f"β is {beta:g}: drifting from the reference is paid", {"beta": beta})
        if self._trips("no_string", beta == 0.0):
            yield Alarm("no_string", "a nat of K costs nothing", {"kl": kl})
        if knobs.controller != "fixed":
            yield from self._budget(kl)
        start, price = self._start("score/mean"), beta * kl
        if start is None or self._updates() < SETTLED:
            return
        gain = self._recent("score/mean") - start
        if self._trips("string_taut", beta > 0 and gain < 0.1 and self._recent("kl/mean") < 0.5 and self._moves()):
            yield Alarm("string_taut", f"in {self._updates()} updates the score gained {gain:.2f} at K = {kl:.2f} nats",
                        {"gain": gain, "kl": kl}, "warning")  # fmt: skip
        if self._trips("string_slack", 0.0 < price < 0.1 * gain and self._drifts_for_nothing(beta)):
            yield Alarm("string_slack", f"the string costs {price:.3g} of a gain of {gain:.3g}, and K still rises",
                        {"gain": gain, "price": price, "kl": kl}, "warning")  # fmt: skip

    def _budget(self, kl: float) -> Iterator[Alarm]:
        """K is a mean over few responses, and a controller needs its time: told of a mean that does not come down."""
        knobs, stretched = self.settings.reward, self._recent("kl/mean")
        authority = MOST_ERROR[knobs.controller] * self.settings.batch_size / knobs.horizon
        had_time = self._updates() * authority > math.log(MOVED) or stretched > 3.0 * knobs.target_kl
        history = self.history["kl/mean"]
        falls = fmean(history[-WINDOW // 2 :]) < 0.95 * fmean(history[-WINDOW : -WINDOW // 2] or history)
        beyond = kl > 1.5 * knobs.target_kl and stretched > 1.5 * knobs.target_kl
        if self._trips("budget_exceeded", beyond and had_time and not falls and self._updates() > SETTLED):
            yield Alarm("budget_exceeded", f"K is {stretched:.3g} nats over {WINDOW} updates and the target "
                        f"{knobs.target_kl:g}", {"kl": stretched, "target": knobs.target_kl})  # fmt: skip

    def _controller(self, now: Mapping[str, float]) -> Iterator[Alarm]:
        if self.settings.reward.controller == "fixed":
            return
        betas = self.history["beta"]
        turns, recent = _turns(betas[-TURNS_IN:], SWING), betas[-HASTE_IN:]
        haste = max(recent) / min(recent) if min(recent) > 0 else 1.0
        stopped = self.settings.reward.controller == "budget" and now["beta"] >= BETA_STOP
        if self._trips("controller_hunts", turns >= MOST_TURNS or haste > MOST_HASTE or stopped):
            seen = (f"in {len(betas[-TURNS_IN:])} updates β turned {turns} times by over {SWING:.0%}, and in the last "
                    f"{len(recent)} it moved {haste:.1f}-fold; it is {now['beta']:.3g}")  # fmt: skip
            yield Alarm("controller_hunts", seen, {"turns": turns, "haste": haste, "beta": now["beta"]})

    # ── the run so far ──────────────────────────────────────────────────────────────────────────────────────────────
    def _trips(self, guard: str, fails: bool, needed: int = NEEDED, of: int = OF) -> bool:
        """Whether the guard failed in `needed` of the last `of` updates, this one among them."""
        recent = self._failed.setdefault(guard, deque())
        recent.append(bool(fails))
        while len(recent) > of:
            recent.popleft()
        return bool(fails) and sum(recent) >= needed

    def _updates(self) -> int:
        return len(self.history["kl/mean"])

    def _start(self, name: str) -> float | None:
        values = self.history[name]
        return fmean(values[:START]) if len(values) > START else None

    def _recent(self, name: str) -> float:
        return fmean(self.history[name][-WINDOW:])

    def _moves(self) -> bool:
        """Whether the learning rate still lets anything happen."""
        rates = self.history["learning_rate"]
        return not rates[-1] <= 0.05 * max(rates)

    def _drifts_for_nothing(self, beta: float) -> bool:
        """Whether K rises over the last updates by more than its noise, and each nat bought less than β."""
        kl, score = self.history["kl/mean"], self.history["score/mean"]
        nats = fmean(kl[-WINDOW // 2 :]) - fmean(kl[-WINDOW : -WINDOW // 2])
        bought = fmean(score[-WINDOW // 2 :]) - fmean(score[-WINDOW : -WINDOW // 2])
        return nats > 0.05 * abs(kl[-1]) and bought < beta * nats


def _turns(values: list[float], swing: float) -> int:
    """How often the curve turned round after moving by more than `swing`, relative."""
    turns, extreme, direction = 0, values[0], 0
    for value in values:
        if (direction >= 0 and value > extreme) or (direction < 0 and value < extreme):
            extreme = value
        if extreme > 0 and abs(value / extreme - 1.0) > swing:
            new = 1 if value > extreme else -1
            turns += direction != 0 and new != direction
            direction, extreme = new, value
    return turns


def _grave(grave: bool) -> Severity:
    return "alarm" if grave else "warning"
