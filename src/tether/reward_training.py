"""Preferences → reward model: Bradley–Terry regression on pairs.

    L(φ) = −E[log σ(r_φ(x, y_chosen) − r_φ(x, y_rejected))]          mean over pairs, nats

With `top_layers=k` the body's lower layers are a frozen trunk, whose states are computed once for all that reads them:
the top k layers, the final norm and the head train, and the result is an ordinary classifier all the same. `train_two`
trains the hold-out model on the other half of the comparisons, on the same states. Stiennon et al. 2020, §3.4. Knows no
sampler and no gold scorer. Read next: `reward_fit.py`, the steps; `reward_report.py`, what a model is worth on pairs
that it has not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from tether.batch import Prompt
from tether.classifiers import new_classifier
from tether.compared import Compared, compare
from tether.loading import Precision, Source, load_tokenizer
from tether.preferences import Pairs, halves
from tether.reward_fit import Progress, RewardTraining, fit
from tether.reward_model import Encoded, RewardManifest, RewardModel
from tether.reward_report import RewardReport, measure


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
    validation: float = 0.0,
    dtype: Precision = "auto",
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> RewardModel:
    """A reward model that starts from the causal LM `base` and learns these pairs; not yet normalised.

    The knobs are those of `RewardTraining`. Raises InputError where there is no pair or a text is too long, ModelError
    where `base` does not fit, NonFiniteError where a gradient is not finite.
    """
    knobs = RewardTraining(top_layers, epochs, learning_rate, batch_pairs, seed, validation)
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
    validation: float = 0.0,
    dtype: Precision = "auto",
    device: str | torch.device | None = None,
    progress: Callable[[str, int, int, float], None] | None = None,
    finished: Callable[[RewardModel, RewardReport], None] | None = None,
) -> TwoRewardModels:
    """Two reward models on halves without a comparison in common, normalised on the same reference samples.

    `reference`: prompts and responses of the reference policy; by default all responses of the pairs, of which each
    model has been trained on one half. `progress`: as for one model, with "reward" or "holdout" before the numbers.
    `finished` is called with each model as soon as it is measured and normalised.
    Raises what `split_halves`, `train_reward_model` and `RewardModel.normalised_on` raise.
    """
    parts, seeds = halves(pairs, seed), (seed, seed + 1)
    models = [untrained(base, tokenizer, top_layers=top_layers, seed=own, dtype=dtype, device=device) for own in seeds]
    # One trunk under both: what the first computes serves the second.
    every = compare(models[0], pairs)
    samples = models[0].prepare(*reference) if reference else None
    made = []
    for number, role in enumerate(("reward", "holdout")):
        knobs = RewardTraining(top_layers, epochs, learning_rate, batch_pairs, seeds[number], validation)
        learned, unseen = every.take(parts[number]), every.take(parts[1 - number])
        model = _fitted(models[number], learned, base, knobs, progress and partial(progress, role))
        made.append(_measured(model, role, every, learned, unseen, samples))
        if finished is not None:
            finished(*made[-1])
    (reward, report), (holdout, other_report) = made
    return TwoRewardModels(reward, holdout, report, other_report)


def _measured(
    model: RewardModel, role: str, every: Compared, learned: Compared, unseen: Compared, samples: Encoded | None
) -> tuple[RewardModel, RewardReport]:
    """What it is worth on the comparisons it has not seen, and itself normalised on the samples or on all responses."""
    raw = model.score_encoded(every.every)
    report = measure(
        raw[list(unseen.chosen)], raw[list(unseen.rejected)], heldout=unseen.pairs, trained_on=learned.pairs
    )
    model = model.normalised_on(raw if samples is None else model.score_encoded(samples))
    source = "the responses of all pairs" if samples is None else "given"
    return model.described(reference_source=source, role=role, report=report.as_dict()), report


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
    chosen = fit(reward, compared, knobs, progress)
    pairs = compared.pairs
    training: dict[str, object] = {
        "base": str(base) if isinstance(base, str | Path) else type(base).__name__,
        "pairs": len(pairs), "pairs_digest": pairs.digest, "epochs": knobs.epochs,
        "learning_rate": knobs.learning_rate, "batch_pairs": knobs.batch_pairs, "seed": knobs.seed,
        "dtype": str(reward.model.dtype).removeprefix("torch."),
    }  # fmt: skip
    if chosen is not None:
        training |= {"validation": knobs.validation, **asdict(chosen)}
    return reward.described(labels=dict(pairs.origin), training=training)
