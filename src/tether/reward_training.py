"""Preferences → reward model: Bradley–Terry regression on pairs, one epoch, learning rate → 0.

    L(φ) = −E[log σ(r_φ(x, y_chosen) − r_φ(x, y_rejected))]          mean over pairs, nats

With `top_layers=k` the body's lower layers are a frozen trunk, run without gradients; the top k layers, the final norm
and the head train. The result is an ordinary classifier all the same. Stiennon et al. 2020, §3.4. Knows no sampler and
no gold scorer. Read next: `reward_report.py`, what the model is worth on
pairs that it has not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tether.classifiers import new_classifier
from tether.config import UpdateSettings
from tether.errors import InputError, NonFiniteError
from tether.loading import Precision, Source, load_tokenizer
from tether.numerics import bradley_terry_loss
from tether.optimiser import Optimiser
from tether.preferences import Pairs, split_halves
from tether.reward_model import Prompt, RewardManifest, RewardModel, length_groups, pad_right
from tether.reward_report import RewardReport, report_on
from tether.streams import permutation

TOKENS_PER_PASS = 4096  # padded positions of one forward and backward pass
ADAM_EPSILON = 1e-5
MAX_GRAD_NORM = 1.0

Progress = Callable[[int, int, float], None]
"""Called after each step with steps done, steps in all, and the step's loss in nats per pair."""


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

    `top_layers`: how many layers train above the frozen trunk; None trains all weights.
    `seed`: of the head and of the pairs' order.

    Raises InputError where there is no pair or a text is too long, ModelError where `base` does not fit,
    NonFiniteError where the loss is not finite.
    """
    if not len(pairs):
        raise InputError("got no preference pair; wanted at least one, and hundreds to learn from")
    if epochs < 1 or batch_pairs < 1:
        raise InputError(f"got epochs={epochs} and batch_pairs={batch_pairs}; wanted at least 1 of each")
    reward = untrained(base, tokenizer, top_layers=top_layers, seed=seed, dtype=dtype, device=device)
    chosen, rejected = (reward.encode(pairs.prompts, side) for side in (pairs.chosen, pairs.rejected))
    optimiser = Optimiser(
        {"reward": _unfrozen(reward)},
        UpdateSettings(learning_rate=learning_rate, adam_epsilon=ADAM_EPSILON, max_grad_norm=MAX_GRAD_NORM),
    )
    batches = list(_batches(len(pairs), epochs, batch_pairs, seed))
    for step, batch in enumerate(batches):
        optimiser.set_progress(step / len(batches))
        loss = _accumulate(reward, [chosen[row] for row in batch], [rejected[row] for row in batch], optimiser)
        norm = optimiser.gradient_norm()
        if not bool(torch.isfinite(norm)):
            raise NonFiniteError(f"the gradient of step {step} is {float(norm)}; lower the learning rate")
        optimiser.step(norm)
        if progress is not None:
            progress(step + 1, len(batches), loss)
    reward.model.requires_grad_(False)
    training = {
        "pairs": len(pairs), "digest": pairs.digest, "epochs": epochs, "learning_rate": learning_rate,
        "batch_pairs": batch_pairs, "seed": seed, "dtype": str(reward.model.dtype).removeprefix("torch."),
    }  # fmt: skip
    return reward.described(
        base=str(base) if isinstance(base, str) else None, labels=dict(pairs.origin), training=training
    )


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
    halves = split_halves(pairs, seed)
    source = "given" if reference else "the responses of all pairs"
    prompts, responses = reference or ([*pairs.prompts, *pairs.prompts], [*pairs.chosen, *pairs.rejected])
    models, reports = [], []
    for number, role in enumerate(("reward", "holdout")):
        model = train_reward_model(
            halves[number], base, tokenizer=tokenizer, top_layers=top_layers, epochs=epochs,
            learning_rate=learning_rate, batch_pairs=batch_pairs, seed=seed + number, dtype=dtype, device=device,
            progress=progress and partial(progress, role),
        )  # fmt: skip
        reports.append(report_on(model, heldout=halves[1 - number], trained_on=halves[number]))
        model = model.normalised_on(model.raw_scores(prompts, responses))
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
    return RewardModel(model, words, RewardManifest(top_layers=top_layers, closed=False))


def _unfrozen(reward: RewardModel) -> list[torch.nn.Parameter]:
    parameters = reward.trainable()
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters


def _batches(pairs: int, epochs: int, size: int, seed: int) -> Iterator[list[int]]:
    for epoch in range(epochs):
        order = permutation(seed, "pairs", pairs, epoch)
        yield from (order[start : start + size].tolist() for start in range(0, pairs, size))


def _accumulate(
    reward: RewardModel, chosen: Sequence[list[int]], rejected: Sequence[list[int]], optimiser: Optimiser
) -> float:
    """Gradients of one batch, split so that the two sides of a pair stay together. Returns its loss."""
    loss = 0.0
    longest = [max(len(good), len(bad)) for good, bad in zip(chosen, rejected, strict=True)]
    for group in length_groups(longest, TOKENS_PER_PASS // 2):
        margin_of = _sides(reward, [chosen[row] for row in group], [rejected[row] for row in group])
        part = bradley_terry_loss(*margin_of) * (len(group) / len(chosen))
        part.backward()  # type: ignore[no-untyped-call]
        optimiser.collect()
        loss += part.item()
    return loss


def _sides(
    reward: RewardModel, chosen: Sequence[list[int]], rejected: Sequence[list[int]]
) -> tuple[Float[Tensor, "pairs"], Float[Tensor, "pairs"]]:
    """Raw scores of both sides, in one pass."""
    raw = reward.forward(*pad_right([*chosen, *rejected], reward.device))
    return raw[: len(chosen)], raw[len(chosen) :]
