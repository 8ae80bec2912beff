"""Does the policy follow its advantages? The responses of an update said again after it, and the reward's own honesty.

    rollout, experience ──update──▶ policy as it stands ──▶ Σ A·(log π − log π_old) > 0, or an alarm

A policy-gradient step makes the tokens of a batch likelier that went better than expected. A turned sign, advantages of
other rows, an optimiser that holds copies: none shows in the losses that the update reports of itself, all show here.
Read next: `watch.py`, which says when each is asked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tether.alarms import Alarm
from tether.batch import Experience, Outcome, Policy, Rollout
from tether.checks import Tolerance
from tether.config import PPOSettings

ROWS = 8
"""Responses that are said again, at most."""
FIRST, EVERY = 3, 16
"""Updates at the start that are looked at, and how often later."""
AGAINST, OF = 3, 4
"""Looks, of so many, in which a policy must go against its advantages: clean nano runs never did."""
LEAST_STEPS = 4
"""Optimiser steps in an update from which its move is its own: fewer are mostly Adam's memory of the updates before."""
ROUND_OFF = 0.5
"""Of the tolerance of two passes: a smaller move, root mean square, is lost in the precision of the weights."""
STILL = 2
"""Updates running in which no log-probability changed at all."""
SAME_REPLIES = 12
"""Pairs of different replies to one prompt with one score, from which a reward is said to read the prompt alone."""
SPREAD = 8
"""Different scores that such a reward must have given: one of few values may well repeat itself."""
REMEMBERED = 4096
"""Prompts whose first reply and score are kept; data without end would fill the memory."""


@dataclass
class Following:
    """What became of the updates looked at so far."""

    settings: PPOSettings
    tolerance: Tolerance
    _still: int = 0
    _against: deque[bool] = field(default_factory=lambda: deque(maxlen=OF))
    _moves: int = 0

    def is_due(self) -> bool:
        """At the start, every EVERY updates, and while something is odd."""
        return self._moves < FIRST or self._moves % EVERY == 0 or self._still > 0 or any(self._against)

    @torch.no_grad()
    def check(
        self, policy: Policy, rollout: Rollout, experience: Experience, outcome: Outcome, rate: float
    ) -> tuple[dict[str, float], list[Alarm]]:
        """Look at one update that is over, in which the policy was to move at a learning rate of `rate`."""
        due, self._moves = self.is_due(), self._moves + 1
        if not due or rate <= 0.0 or outcome.skipped_steps:
            return {}, []
        index = torch.arange(min(ROWS, len(rollout)))
        sequences = experience.sequences.rows(index)  # as wide as the longest of them
        mask = sequences.response_mask
        old, given = (x[index, : mask.shape[1]] for x in (rollout.logprobs, experience.advantages))
        advantages = torch.where(mask, given, 0.0).double()
        if not bool(advantages.any()):
            return {}, []
        said = policy.evaluate(sequences, self.settings.sampling.temperature).logprobs
        moved = torch.where(mask, said - old, 0.0).double()
        size = float(moved.norm() * advantages.norm())
        self._still = self._still + 1 if size == 0.0 else 0
        if size == 0.0:
            return {}, list(self._stands(rate))
        follows, steps = float((moved * advantages).sum()) / size, self._steps(outcome)
        if steps >= LEAST_STEPS and float(moved[mask].square().mean().sqrt()) > ROUND_OFF * self.tolerance.logprob:
            self._against.append(follows < 0.0)
        return {"ppo/follows": follows}, [*self._goes(follows), *self._unclipped(outcome, moved)]

    def state(self) -> dict[str, object]:
        """All that is remembered, as plain values."""
        return {"still": self._still, "against": list(self._against), "moves": self._moves}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`."""
        self._still, self._moves = int(state["still"]), int(state["moves"])
        self._against.extend(map(bool, state["against"]))

    def _steps(self, outcome: Outcome) -> int:
        return int(outcome.metrics.get("ppo/epochs_used", 1.0)) * self.settings.update.minibatches

    def _stands(self, rate: float) -> Iterator[Alarm]:
        if self._still >= STILL:
            seen = f"in {self._still} updates at a learning rate of {rate:.2g} no log-probability has changed"
            yield Alarm("policy_still", seen, {"updates": self._still, "learning_rate": rate})

    def _goes(self, follows: float) -> Iterator[Alarm]:
        if follows < 0.0 and sum(self._against) >= AGAINST:
            seen = (
                f"in {sum(self._against)} of the last {len(self._against)} updates looked at, tokens that went better "
                f"than expected became less likely: the cosine of advantage and move is {follows:+.2f}"
            )
            yield Alarm("wrong_update", seen, {"follows": follows})

    def _unclipped(self, outcome: Outcome, moved: torch.Tensor) -> Iterator[Alarm]:
        """Of several steps, all but the first have a ratio that is not 1."""
        steps, most = self._steps(outcome), float(moved.abs().max())
        if steps > 1 and outcome.metrics.get("ppo/ratio_max") == 0.0 and most > self.tolerance.ratio:
            seen = (
                f"π/π_old was 1 in all {steps} minibatches of an update that moved log π by up to {most:.2g}: π_old is "
                "taken anew at each step, and nothing is clipped"
            )
            yield Alarm("wrong_update", seen, {"ratio_max": 0.0})


@dataclass
class PromptScores:
    """Whether a reward of whatever kind tells two replies to one prompt apart; asks it nothing."""

    _told: dict[str, tuple[str, float]] = field(default_factory=dict)
    _values: set[float] = field(default_factory=set)
    _same: int = 0
    _over: bool = False
    """Whether two replies to one prompt had different scores, which settles it."""

    def check(self, prompts: Sequence[object], texts: Sequence[str], scores: Sequence[float]) -> Iterator[Alarm]:
        """Take in one update's scores, as the reward gave them."""
        for prompt, text, score in zip(map(str, prompts), texts, scores, strict=True):
            if self._over:
                return
            self._values.add(score)
            if prompt not in self._told and len(self._told) >= REMEMBERED:
                continue
            before, known = self._told.setdefault(prompt, (text, score))
            if before != text:
                self._same += 1
                self._over = known != score
                if self._over:
                    self._told, self._values = {}, set()
        if not self._over and self._same >= SAME_REPLIES and len(self._values) >= SPREAD:
            yield Alarm(
                "reward_reads_prompt_only",
                f"{self._same} times another reply to the same prompt got the same score, and never a different one; "
                f"over prompts there are {len(self._values)} different scores",
                {"pairs": self._same, "scores": len(self._values)},
            )

    def state(self) -> dict[str, object]:
        """All that is remembered, as plain values."""
        told = [[prompt, *known] for prompt, known in self._told.items()]
        return {"told": told, "values": sorted(self._values), "same": self._same, "over": self._over}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`."""
        self._told = {str(prompt): (str(text), float(score)) for prompt, text, score in state["told"]}
        self._values, self._same, self._over = set(map(float, state["values"])), int(state["same"]), bool(state["over"])
