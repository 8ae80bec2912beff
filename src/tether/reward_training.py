"""Preferences → reward model: Bradley–Terry regression on pairs, one epoch, learning rate → 0.

    L(φ) = −E[log σ(r_φ(x, y_chosen) − r_φ(x, y_rejected))]          mean over pairs, nats

With `top_layers=k` the body's lower layers are a frozen trunk, whose states are computed once for all that reads them:
the top k layers, the final norm and the head train, and the result is an ordinary classifier all the same. `train_two`
trains the hold-out model on the other half of the comparisons, on the same states. Stiennon et al. 2020, §3.4. Knows no
sampler and no gold scorer. Read next: `reward_report.py`, what a model is worth on pairs that it has not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from tether.batch import Prompt
from tether.classifiers import new_classifier
from tether.compared import Compared, compare
from tether.config import UpdateSettings
from tether.errors import InputError, NonFiniteError
from tether.loading import Precision, Source, load_tokenizer
from tether.numerics import bradley_terry_loss
from tether.optimiser import Optimiser
from tether.preferences import Pairs, halves
from tether.reward_model import RewardManifest, RewardModel, length_groups
from tether.reward_report import RewardReport, measure
from tether.streams import permutation

TOKENS_PER_PASS = 4096  # padded positions of one forward and backward pass
ADAM_EPSILON = 1e-5
MAX_GRAD_NORM = 1.0

Progress = Callable[[int, int, float], None]
"""Called after each step with steps done, steps in all, and the step's loss in nats per pair."""


@dataclass(frozen=True)
class RewardTraining:
    """How a reward model is fitted."""

    top_layers: int | None = 6
    """Layers trained above a frozen trunk; None trains all weights."""
    epochs: int = 1
    learning_rate: float = 1e-4
    """Adam's at the start; it falls linearly to 0."""
    batch_pairs: int = 8
    """Pairs in one step, at least: comparisons of the same responses go together."""
    seed: int = 0
    """Of the head and of the pairs' order."""

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_pairs < 1:
            raise InputError(f"got epochs={self.epochs} and batch_pairs={self.batch_pairs}; wanted at least 1 of each")


def train_reward_model(
    pairs: Pairs,
    base: Source,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    top_layers: int | None = 6,
    epochs: int = 1,
    learning_rate: float = 1e-4,
    batch_pairs: int = 8,
    seed: int = 0,
    dtype: Precision = "auto",
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> RewardModel:
    """A reward model that starts from the causal LM `base` and learns these pairs; not yet normalised.

    The knobs are those of `RewardTraining`. Raises InputError where there is no pair or a text is too long, ModelError
    where `base` does not fit, NonFiniteError where a gradient is not finite.
    """
    knobs = RewardTraining(top_layers, epochs, learning_rate, batch_pairs, seed)
    reward = untrained(base, tokenizer, top_layers=top_layers, seed=seed, dtype=dtype, device=device)
    return _fitted(reward, compare(reward, pairs), base, knobs, progress)


@dataclass(frozen=True)
class TwoRewardModels:
    """The reward model, and the hold-out one that is never optimised; each measured on the other's comparisons."""

    reward: RewardModel
    holdout: RewardModel
    reward_report: RewardReport
    holdout_report: RewardReport


def train_two(
    pairs: Pairs,
    base: Source,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    reference: tuple[Sequence[Prompt], Sequence[str]] | None = None,
    top_layers: int | None = 6,
    epochs: int = 1,
    learning_rate: float = 1e-4,
    batch_pairs: int = 8,
    seed: int = 0,
    dtype: Precision = "auto",
    device: str | torch.device | None = None,
    progress: Callable[[str, int, int, float], None] | None = None,
) -> TwoRewardModels:
    """Two reward models on halves without a comparison in common, normalised on the same reference samples.

    `reference`: prompts and responses of the reference policy; by default all responses of the pairs, of which each
    model has been trained on one half. `progress`: as for one model, with "reward" or "holdout" before the numbers.
    Raises what `split_halves`, `train_reward_model` and `RewardModel.normalised_on` raise.
    """
    places = halves(pairs, seed)
    seeds = (seed, seed + 1)
    first, second = (
        untrained(base, tokenizer, top_layers=top_layers, seed=own, dtype=dtype, device=device) for own in seeds
    )
    # One trunk under both: what the first computes serves the second.
    every = compare(first, pairs)
    samples = first.prepare(*reference) if reference else None
    models, reports = [], []
    for number, (role, reward) in enumerate((("reward", first), ("holdout", second))):
        own, other = places[number], places[1 - number]
        knobs = RewardTraining(top_layers, epochs, learning_rate, batch_pairs, seeds[number])
        model = _fitted(reward, every.take(own), base, knobs, progress and partial(progress, role))
        raw, unseen = model.score_encoded(every.every), every.take(other)
        good, bad = raw[list(unseen.chosen)], raw[list(unseen.rejected)]
        reports.append(measure(good, bad, heldout=unseen.pairs, trained_on=pairs.take(own)))
        model = model.normalised_on(raw if samples is None else model.score_encoded(samples))
        source = "given" if reference else "the responses of all pairs"
        models.append(model.described(role=role, reference_source=source, report=reports[-1].as_dict()))
    return TwoRewardModels(models[0], models[1], reports[0], reports[1])


def untrained(
    base: Source,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    top_layers: int | None,
    seed: int,
    dtype: Precision = "auto",
    device: str | torch.device | None = None,
) -> RewardModel:
    """A reward model on the body of `base` with a random head."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = new_classifier(base, dtype, place, seed)
    words = load_tokenizer(base, tokenizer, model)
    # The library's own classifiers refuse a batch without a pad token; which one makes no difference here.
    model.config.pad_token_id = words.eos_token_id if words.pad_token_id is None else words.pad_token_id
    return RewardModel(
        model, words, RewardManifest(top_layers=top_layers, closed=False, eos=words.eos_token_id is not None)
    )


def _fitted(
    reward: RewardModel, compared: Compared, base: Source, knobs: RewardTraining, progress: Progress | None
) -> RewardModel:
    """The model after its epochs, frozen again, with its training in the manifest."""
    _fit(reward, compared, knobs, progress)
    pairs = compared.pairs
    training = {
        "base": str(base) if isinstance(base, str | Path) else type(base).__name__,
        "pairs": len(pairs), "pairs_digest": pairs.digest, "epochs": knobs.epochs,
        "learning_rate": knobs.learning_rate, "batch_pairs": knobs.batch_pairs, "seed": knobs.seed,
        "dtype": str(reward.model.dtype).removeprefix("torch."),
    }  # fmt: skip
    return reward.described(labels=dict(pairs.origin), training=training)


def _fit(reward: RewardModel, compared: Compared, knobs: RewardTraining, progress: Progress | None) -> None:
    if not len(compared.pairs):
        raise InputError("got no preference pair; wanted at least one, and hundreds to learn from")
    parameters = reward.trainable()
    for parameter in parameters:
        parameter.requires_grad_(True)
    settings = UpdateSettings(learning_rate=knobs.learning_rate, adam_epsilon=ADAM_EPSILON, max_grad_norm=MAX_GRAD_NORM)
    optimiser = Optimiser({"reward": parameters}, settings)
    batches = list(_batches(compared.pairs.units, knobs))
    for step, batch in enumerate(batches):
        optimiser.set_progress(step / len(batches))
        loss = _accumulate(reward, compared, batch, optimiser)
        norm = optimiser.gradient_norm()
        if not bool(torch.isfinite(norm)):
            raise NonFiniteError(f"the gradient of step {step} is {float(norm)}; lower the learning rate")
        optimiser.step(norm)
        if progress is not None:
            progress(step + 1, len(batches), loss)
    reward.model.requires_grad_(False)


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
