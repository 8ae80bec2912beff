"""Rung 1: PPO's clip in isolation, on a two-action bandit. One logit, one advantage, one ratio, one clip.

    π(action 0) = σ(logit),  logit = 0 when the data was collected, so π_old = 0.5
    ratio       = π / π_old
    clipped     = clip(ratio, 1 − ε, 1 + ε)
    loss        = −min(ratio·A, clipped·A)
    gradient    = d loss / d logit = −A·π(1 − π)/π_old, and exactly 0 once the ratio has left the clip
                  on the side that the advantage pulls to

The update is the lesson's toy rule, logit ← logit + learning_rate·A: it takes the direction from the advantage and
ignores the slope. It moves for as long as the gradient is not zero. Two things follow that the rule does not hide:

- The clip forbids the next push, it does not undo the last one. With the lesson's settings one step goes from ratio 1
  to σ(0.5)/0.5 = 1.245. There it stays: `clipped` and the loss are pinned at 1 + ε = 1.2, the gradient is 0.
  The lesson shows 1.000, 1.082, 1.170, 1.200 in its place, which its own code does not print (it prints two lines and
  leaves the loop); this trace is computed, and goes on to show that nothing moves any more.
- The lesson's code stops on `ratio >= 1 + ε` alone, so with a negative advantage it would run on below 1 − ε. Here the
  zero gradient is what stops the update, whichever side it is on: with A = −1 the loss is pinned at 1 − ε.

`tether ladder bandit` prints the trace; `--advantage -1` pins it at 1 − ε, `--no-clip` lets the ratio run to 1/π_old.
Only the standard library is used. Read next: `plain.py`, the same clip on every token of a small language model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from json import dumps

OLD_LOGIT = 0.0  # of the policy that collected the data: two actions, 50/50


@dataclass(frozen=True)
class Step:
    """One look at the policy before it is updated: what was measured, and what would move it."""

    step: int  # 0 = the policy that collected the data
    advantage: float  # A, in the reward's unit
    ratio: float  # π/π_old of the action taken
    clipped: float  # clip(ratio, 1 − ε, 1 + ε); the ratio itself where there is no clip
    loss: float  # −min(ratio·A, clipped·A)
    gradient: float  # d loss / d logit; 0 where the clip holds
    logit: float  # log-odds of the action taken, nats

    @property
    def is_pinned(self) -> bool:
        """Whether the ratio has left the clip, so that neither loss nor logit changes any more."""
        return self.clipped != self.ratio


def trace(
    advantage: float = 1.0,
    learning_rate: float = 0.5,
    clip_range: float = 0.2,
    steps: int = 5,
    clip: bool = True,
) -> list[Step]:
    """The first `steps` steps of the bandit on one batch of data; the defaults are the lesson's.

    Raises ValueError where a number is not finite, learning_rate or clip_range is not above 0, or steps is below 1.

    >>> [round(step.ratio, 3) for step in trace()], [step.loss for step in trace()]
    ([1.0, 1.245, 1.245, 1.245, 1.245], [-1.0, -1.2, -1.2, -1.2, -1.2])
    """
    _check(advantage, learning_rate, clip_range, steps)
    seen = []
    logit = OLD_LOGIT
    for number in range(steps):
        seen.append(_look(number, logit, advantage, clip_range if clip else math.inf))
        if seen[-1].gradient != 0.0:
            logit += learning_rate * advantage
    return seen


def render(steps: Sequence[Step]) -> str:
    """The lesson's lines, one a step, with the gradient beside the loss.

    >>> print(render(trace(steps=2)))
    step 00 advantage=+1.00 ratio=1.000 clipped=1.000 loss=-1.0000 gradient=-0.5000
    step 01 advantage=+1.00 ratio=1.245 clipped=1.200 loss=-1.2000 gradient=+0.0000  # pinned at 1+ε: gradient is zero
    """
    return "\n".join(_line(step) for step in steps)


def main(
    advantage: float = 1.0,
    learning_rate: float = 0.5,
    clip_range: float = 0.2,
    steps: int = 5,
    clip: bool = True,
    json: bool = False,
) -> None:
    """Rung 1: the clip alone. One step of the loop a line; with the defaults, the lesson's settings.

    Args:
        advantage: A of the action taken; +1 pushes it up and is pinned at 1+ε, −1 pushes it down and is pinned at 1−ε.
        learning_rate: size of one push on the logit.
        clip_range: ε of the clip.
        steps: how many lines.
        clip: off, nothing stops the ratio.
        json: print one JSON object with the key `steps`.
    """
    seen = trace(advantage, learning_rate, clip_range, steps, clip)
    print(dumps({"steps": [asdict(step) for step in seen]}) if json else render(seen))


def _look(number: int, logit: float, advantage: float, clip_range: float) -> Step:
    probability, old_probability = _sigmoid(logit), _sigmoid(OLD_LOGIT)
    ratio = probability / old_probability
    clipped = max(1 - clip_range, min(ratio, 1 + clip_range))
    loss = 0.0 - min(ratio * advantage, clipped * advantage)
    # min() takes the constant branch exactly where going on would be paid for; on the other side the ratio's own
    # branch is the smaller one, and the policy is still pulled back. The edge itself counts as outside, as in the
    # lesson's code.
    beyond = ratio >= 1 + clip_range if advantage > 0 else ratio <= 1 - clip_range
    slope = probability * (1 - probability) / old_probability
    gradient = 0.0 if beyond or advantage == 0 else -advantage * slope
    return Step(number, advantage, ratio, clipped, loss, gradient, logit)


def _line(step: Step) -> str:
    edge = "1+ε" if step.advantage > 0 else "1−ε"
    note = f"  # pinned at {edge}: gradient is zero" if step.is_pinned else ""
    return (
        f"step {step.step:02d} advantage={step.advantage:+.2f} ratio={step.ratio:.3f} clipped={step.clipped:.3f} "
        f"loss={step.loss:.4f} gradient={step.gradient:+.4f}{note}"
    )


def _sigmoid(z: float) -> float:
    # Two forms of one function, so that exp() never overflows.
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


def _check(advantage: float, learning_rate: float, clip_range: float, steps: int) -> None:
    if not math.isfinite(advantage):
        raise ValueError(f"advantage is {advantage}; wanted a finite number: +1 pushes the action up, −1 down")
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise ValueError(f"learning_rate is {learning_rate}; wanted a finite number above 0, like the lesson's 0.5")
    if not (math.isfinite(clip_range) and clip_range > 0):
        raise ValueError(f"clip_range is {clip_range}; wanted a finite number above 0, like 0.2, or no clip at all")
    if steps < 1:
        raise ValueError(f"steps is {steps}; wanted at least 1")
