"""The steps that fit a reward model to comparisons: as many as are said, or as many as pairs set aside call for.

    said      `epochs` passes, the learning rate falling to 0
    chosen    the rate stays, and the model is the running mean of the weights. A share of the pairs is set aside; its
              log-loss says after how many steps the mean was best, and so many are made again, on all pairs. Another
              rate is tried where a bag of words does better; where all pairs leave a model that tells those set
              aside less well apart than before, the one before is kept

How many passes a body needs depends on its size, on what it knows and on the pairs: sixty pairs that differ by one word
want thirty passes, two thousand noisy ones less than one. What is set aside here is part of what is learned; the pairs
that a report measures are others. Knows no head and no report. Read next: `reward_training.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tether.compared import Compared
from tether.config import UpdateSettings
from tether.errors import InputError, NonFiniteError
from tether.numerics import bradley_terry_loss
from tether.optimiser import Optimiser
from tether.reward_model import RewardModel, length_groups
from tether.reward_report import word_margins
from tether.streams import permutation

TOKENS_PER_PASS = 4096  # padded positions of one forward and backward pass
ADAM_EPSILON = 1e-5
MAX_GRAD_NORM = 1.0
GAIN = 1e-3
"""Nats per pair by which a look must be better to count: what is told apart already is not trained for ever."""
RATES = (1.0, 3.0, 1.0 / 3.0)
"""Multiples of the learning rate: the next is tried where those before leave the model worse than a bag of words."""
FEWEST_GROUPS = 20
"""Groups of comparisons from which some are set aside; of fewer, those would tell nothing."""
LOOKS_A_PASS, STEPS_BETWEEN_LOOKS = 2, 5
"""How often the pairs set aside are asked, and the fewest steps between."""
PATIENT_STEPS, FURTHER = 400, 1.5
"""A model that was best after n steps is given up after 1.5 n, but not before so many: whether a question was answered
is seen all at once, after some two hundred steps in which the log-loss of pairs set aside is above a coin's."""

Progress = Callable[[int, int, float], None]
"""Called after each step with steps done, steps in all, and the step's loss in nats per pair."""


@dataclass(frozen=True)
class RewardTraining:
    """How a reward model is fitted."""

    top_layers: int | None = 6
    """Layers trained above a frozen trunk; None trains all weights."""
    epochs: int = 1
    """Passes over the pairs; at most, where their number is chosen."""
    learning_rate: float = 1e-4
    """Adam's at the start; it falls linearly to 0, or stays, and others are tried, where the passes are chosen."""
    batch_pairs: int = 8
    """Pairs in one step, at least: comparisons of the same responses go together."""
    seed: int = 0
    """Of the head, of the pairs' order and of those set aside."""
    validation: float = 0.0
    """Share of the pairs that chooses the number of steps, before all are learned; 0 makes the passes as said."""

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_pairs < 1:
            raise InputError(f"got epochs={self.epochs} and batch_pairs={self.batch_pairs}; wanted at least 1 of each")
        if not 0.0 < self.learning_rate < math.inf:
            raise InputError(f"got learning_rate={self.learning_rate}; wanted a finite number above 0, such as 1e-4")
        if not 0.0 <= self.validation <= 0.5:
            raise InputError(f"got validation={self.validation}; wanted a share from 0 to 0.5, such as 0.2")


@dataclass(frozen=True)
class Chosen:
    """How long a model was trained, and why."""

    validation_pairs: int
    """Set aside to choose the number of steps, then learned with the others."""
    validation_loss: float
    """Lowest −mean log σ(margin) on them, nats per pair."""
    validation_floor: float
    """The same of a bag of words that has learned the others."""
    chosen_rate: float
    """The learning rate that was best, of those that were tried."""
    passes: float
    """Passes that were best."""
    learned_all: bool
    """Whether the model has learned those set aside too; not where that made it worse on them."""


def fit(reward: RewardModel, compared: Compared, knobs: RewardTraining, progress: Progress | None) -> Chosen | None:
    """Train the model's weights in place; returns what was chosen, None where the passes were made as said.

    Raises InputError where there is no pair, NonFiniteError where a gradient is not finite.
    """
    if not len(compared.pairs):
        raise InputError("got no preference pair; wanted at least one, and hundreds to learn from")
    parameters = reward.trainable()
    for parameter in parameters:
        parameter.requires_grad_(True)
    batches, chosen = list(_batches(compared.pairs.units, knobs)), None
    if knobs.validation and len(compared.pairs.units) >= FEWEST_GROUPS:
        chosen = _fit_chosen(reward, compared, knobs, batches, progress)
    else:
        run = _Run(reward, compared, knobs, _after(0, len(batches), progress), falls_over=len(batches))
        for batch in batches:
            run.step(batch)
    reward.model.requires_grad_(False)
    return chosen


def _fit_chosen(
    reward: RewardModel,
    compared: Compared,
    knobs: RewardTraining,
    batches: Sequence[list[list[int]]],
    progress: Progress | None,
) -> Chosen:
    """As many steps on all pairs as did best on those set aside when the others were learned."""
    start = _copy(reward.trainable())
    learned, aside = _set_aside(compared, knobs)
    trial = list(_batches(learned.pairs.units, knobs))
    best, floor = _Best(0, float("inf"), [], 0, knobs.learning_rate), _floor(learned, aside)
    for factor in RATES:
        _put(reward.trainable(), start)
        tried = replace(knobs, learning_rate=factor * knobs.learning_rate)
        best = _best_steps(reward, learned, aside, tried, trial, best, progress)
        if best.loss <= floor:
            break
    _put(reward.trainable(), start)
    steps = max(1, round(best.steps * len(batches) / len(trial)))
    tell = _after(best.tried, best.tried + steps, progress)
    run = _Run(reward, compared, replace(knobs, learning_rate=best.rate), tell)
    for batch in batches[:steps]:
        run.step(batch)
    _put(reward.trainable(), run.mean)
    kept = _log_loss(reward, aside) > best.loss
    if kept:
        _put(reward.trainable(), best.weights)
    passes = best.steps / len(trial) * knobs.epochs
    return Chosen(len(aside.pairs), best.loss, floor, best.rate, passes, learned_all=not kept)


@dataclass(frozen=True)
class _Best:
    """The running mean that told the pairs set aside apart best."""

    steps: int
    loss: float
    weights: list[Tensor]
    tried: int
    """Steps that were made to find it."""
    rate: float


def _best_steps(
    reward: RewardModel,
    learned: Compared,
    aside: Compared,
    knobs: RewardTraining,
    batches: Sequence[list[list[int]]],
    before: _Best,
    progress: Progress | None,
) -> _Best:
    """The best of this training and of those before."""
    run = _Run(reward, learned, knobs, _after(before.tried, before.tried + 2 * len(batches), progress))
    every = max(STEPS_BETWEEN_LOOKS, len(batches) // (knobs.epochs * LOOKS_A_PASS))
    best, lowest, own = before, float("inf"), 0
    for batch in batches:
        run.step(batch)
        if run.steps % every and run.steps < len(batches):
            continue
        now = run.look(aside)
        if now < lowest - GAIN:
            lowest, own = now, run.steps
            if now < best.loss or not best.steps:
                best = _Best(run.steps, now, _copy(run.mean), 0, knobs.learning_rate)
        elif run.steps >= max(PATIENT_STEPS, FURTHER * own):
            break
    return replace(best, tried=before.tried + run.steps)


def _floor(learned: Compared, aside: Compared) -> float:
    """The log-loss, on the pairs set aside, of a bag of words that has learned the others; nats per pair."""
    return float(np.logaddexp(0.0, -word_margins(learned.pairs, aside.pairs)).mean())


def _after(before: int, total: int, progress: Progress | None) -> Callable[[int, float], None]:
    """Who hears of a training's steps and losses, where so many steps were made before it, of so many in all."""

    def tell(step: int, loss: float) -> None:
        if progress is not None:
            progress(before + step, total, loss)

    return tell


class _Run:
    """Adam's steps on one model, at a rate that falls to 0 over so many, or stays; then with a running mean of the
    weights.
    """

    def __init__(
        self,
        reward: RewardModel,
        compared: Compared,
        knobs: RewardTraining,
        tell: Callable[[int, float], None],
        *,
        falls_over: int | None = None,
    ) -> None:
        settings = UpdateSettings(
            learning_rate=knobs.learning_rate, schedule="linear" if falls_over else "constant",
            adam_epsilon=ADAM_EPSILON, max_grad_norm=MAX_GRAD_NORM,
        )  # fmt: skip
        self._reward, self._compared, self._tell, self._falls_over = reward, compared, tell, falls_over
        self._weights = reward.trainable()
        self._optimiser = Optimiser({"reward": self._weights}, settings)
        self._horizon = max(STEPS_BETWEEN_LOOKS, len(compared.pairs) / knobs.batch_pairs / LOOKS_A_PASS)
        self.mean: list[Tensor] = []
        self.steps = 0

    def step(self, batch: list[list[int]]) -> None:
        """One step on these groups of pairs."""
        if self._falls_over is not None:
            self._optimiser.set_progress(self.steps / self._falls_over)
        loss = _accumulate(self._reward, self._compared, batch, self._optimiser)
        norm = self._optimiser.gradient_norm()
        if not bool(torch.isfinite(norm)):
            raise NonFiniteError(f"the gradient of step {self.steps} is {float(norm)}; lower the learning rate")
        self._optimiser.step(norm)
        self.steps += 1
        if self._falls_over is None:
            self._average()
        self._tell(self.steps, loss)

    @torch.no_grad()
    def _average(self) -> None:
        """m ← m + (w − m)·max(2/(n + 1), 1/h): early steps weigh in proportion to their number, later ones 1/h."""
        masters = self._optimiser.masters["reward"]
        if not self.mean:
            self.mean = _copy(masters)
        share = max(2.0 / (self.steps + 1), 1.0 / self._horizon)
        for mean, master in zip(self.mean, masters, strict=True):
            mean.lerp_(master, share)

    def look(self, aside: Compared) -> float:
        """The log-loss of the running mean on these pairs; the weights stay as they are."""
        own = _copy(self._weights)
        _put(self._weights, self.mean)
        loss = _log_loss(self._reward, aside)
        _put(self._weights, own)
        return loss


@torch.no_grad()
def _copy(weights: Sequence[Tensor]) -> list[Tensor]:
    return [weight.detach().clone() for weight in weights]


@torch.no_grad()
def _put(weights: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)


def _set_aside(compared: Compared, knobs: RewardTraining) -> tuple[Compared, Compared]:
    """The pairs to learn and those to ask; a group is never torn."""
    units = compared.pairs.units
    order: list[int] = permutation(knobs.seed, "validation", len(units)).tolist()
    count = max(1, round(knobs.validation * len(units)))
    parts = (order[count:], order[:count])
    learned, aside = (sorted(place for unit in part for place in units[unit]) for part in parts)
    return compared.take(learned), compared.take(aside)


@torch.no_grad()
def _log_loss(reward: RewardModel, compared: Compared) -> float:
    """−mean log σ(margin), nats per pair."""
    return float(bradley_terry_loss(*compared.sides(reward.score_encoded(compared.responses))))


def _batches(units: Sequence[list[int]], knobs: RewardTraining) -> Iterator[list[list[int]]]:
    """Whole groups of comparisons, as many as make up a batch; each epoch in an order of its own."""
    for epoch in range(knobs.epochs):
        batch: list[list[int]] = []
        for place in permutation(knobs.seed, "pairs", len(units), epoch).tolist():
            batch.append(units[place])
            if sum(map(len, batch)) >= knobs.batch_pairs:
                yield batch
                batch = []
        if batch:
            yield batch


def _accumulate(reward: RewardModel, compared: Compared, batch: list[list[int]], optimiser: Optimiser) -> float:
    """Gradients of one batch, split so that a group stays together. Returns its loss, the mean over its pairs."""
    loss, pairs = 0.0, sum(map(len, batch))
    parts = [compared.take(unit) for unit in batch]
    most = max(len(part.rows) for part in parts)
    for group in length_groups([part.longest for part in parts], TOKENS_PER_PASS // most):
        places = [place for index in group for place in batch[index]]
        part = compared.take(places)
        good, bad = part.sides(reward.forward(part.responses))
        mean = bradley_terry_loss(good, bad) * (len(places) / pairs)
        mean.backward()  # type: ignore[no-untyped-call]
        optimiser.collect()
        loss += mean.item()
    return loss
