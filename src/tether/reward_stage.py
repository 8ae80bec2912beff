"""Preferences of one's own → a reward model with its scale and its report, and its hold-out twin where one is wanted.

    pairs ─ fit_pairs: the rule for long ones ─▶ learn_preferences ─▶ LearnedReward
    the SFT checkpoint ─ own_replies ─▶ the samples on which the score has mean 0 and standard deviation 1

Without the twin, a share of the pairs is held out and measured; with it, each model learns one half and is measured on
the other's. Knows no file and no terminal. Read next: `reward_training.py`, `reward_report.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count

import torch
from transformers import PreTrainedTokenizerBase

from tether.batch import Prompt
from tether.errors import InputError
from tether.loading import Precision, Source, layer_count
from tether.models import LanguagePolicy, load_policy
from tether.preferences import Pairs
from tether.prompts import PromptSet, PromptSource, TooLong, fit, shorten
from tether.reward_fit import RewardTraining
from tether.reward_model import RewardModel
from tether.reward_report import UNSPACED, RewardReport, report_on
from tether.reward_training import train_reward_model, train_two, untrained
from tether.streams import permutation, uniforms

REPLIES_AT_ONCE = 32
LONGER_WINS = 0.6
"""Share of pairs whose longer answer is chosen, from which a reader is warned where chance does not explain it."""
STANDARD_ERRORS = 3.0

Progress = Callable[[str, int, int, float], None]
"""Called after each step with "reward" or "holdout", steps done, steps in all, and the loss in nats per pair."""
Replies = tuple[Sequence[Prompt], Sequence[str]]
"""Prompts, and the reference's reply to each."""


@dataclass(frozen=True)
class PairsReport:
    """What the comparisons themselves are like."""

    pairs: int
    identical: int
    """Rows whose two sides were the same, left out."""
    duplicates: int
    """Rows that stood in the data before; the same comparison may be learned and measured."""
    dropped: int
    shortened: int
    """Pairs that were too long: left out, and with the end of the prompt alone."""
    chosen_words: float
    rejected_words: float
    """Mean length of the two sides."""
    longer_wins: float | None
    """Share of the pairs of unequal length whose longer side is chosen; None where there is none."""
    unequal: int
    """Pairs of unequal length."""
    unread: str | None = None
    """A column that looks like the prompt, where what both sides begin with was taken for it."""

    @property
    def warnings(self) -> tuple[str, ...]:
        found = []
        chance = STANDARD_ERRORS * (0.25 / max(self.unequal, 1)) ** 0.5
        if self.longer_wins is not None and self.longer_wins > max(LONGER_WINS, 0.5 + chance):
            found.append(
                f"longer answers win in these comparisons: the longer side is chosen in {self.longer_wins:.0%} of them "
                f"({self.chosen_words:.0f} words against {self.rejected_words:.0f}), and a model that pays for length "
                "alone would be as right. Balance the lengths, and watch length/mean."
            )
        if self.unread:
            found.append(
                f"what chosen and rejected begin with was taken for the prompt, and {self.unread} was not read; if "
                f"that is the prompt, say prompt_column={self.unread!r} (--prompt-column {self.unread})"
            )
        if self.duplicates:
            found.append(
                f"{self.duplicates} comparisons stand in the data more than once: what is measured may have been "
                "learned, and the held-out accuracy is too high"
            )
        return tuple(found)

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "warnings": list(self.warnings)}


@dataclass(frozen=True)
class LearnedReward:
    """A reward model, what it is worth, and its twin."""

    reward: RewardModel
    report: RewardReport
    data: PairsReport
    holdout: RewardModel | None = None
    holdout_report: RewardReport | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        return (*self.data.warnings, *self.report.warnings)

    def as_dict(self) -> dict[str, object]:
        twin = None if self.holdout_report is None else self.holdout_report.as_dict()
        return {"reward": self.report.as_dict(), "holdout": twin, "data": self.data.as_dict()}


def learn_preferences(
    pairs: Pairs,
    base: Source,
    settings: RewardTraining,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    heldout: float = 0.2,
    holdout: bool = False,
    reference: Replies | None = None,
    dtype: Precision = "auto",
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    finished: Callable[[LearnedReward], None] | None = None,
) -> LearnedReward:
    """A reward model on the body of `base` that learns these pairs.

    `heldout`: share of the pairs that is measured and not learned. `holdout`: train the twin on one half of the pairs
    instead. `reference`: prompts and replies on which the score gets mean 0 and standard deviation 1; by default all
    responses of the pairs. `finished` is called with the reward model while its twin is not yet learned.

    Raises InputError where there are too few pairs or reference samples, a text is too long, or a share is out of
    bounds, ModelError where `base` does not fit, NonFiniteError where a gradient is not finite.
    """
    if reference is not None:
        _require_several(reference)
    data = report_on_pairs(pairs)
    options = asdict(settings) | {"tokenizer": tokenizer, "dtype": dtype, "device": device}
    if not holdout:
        learned, measured = split_off(pairs, heldout, settings.seed)
        told = progress and partial(progress, "reward")
        model = train_reward_model(learned, base, progress=told, **options)
        worth = report_on(model, measured, trained_on=learned)
        return LearnedReward(_normalised(model, worth, pairs, reference), worth, data)

    def one_done(model: RewardModel, worth: RewardReport) -> None:
        if finished is not None:
            finished(LearnedReward(model, worth, data))

    two = train_two(pairs, base, reference=reference, progress=progress, finished=one_done, **options)
    return LearnedReward(two.reward, two.reward_report, data, two.holdout, two.holdout_report)


def _normalised(model: RewardModel, worth: RewardReport, pairs: Pairs, reference: Replies | None) -> RewardModel:
    """The model on the scale of the reference's replies, else of all responses of the pairs, with its report."""
    prompts, replies = reference or ((*pairs.prompts, *pairs.prompts), (*pairs.chosen, *pairs.rejected))
    model = model.normalised_on(model.raw_scores(prompts, replies))
    source = "given" if reference else "the responses of all pairs"
    return model.described(role="reward", reference_source=source, report=worth.as_dict())


def _require_several(reference: Replies) -> None:
    """Raise InputError where the replies have no standard deviation that a score could be divided by."""
    if len(set(zip(map(repr, reference[0]), reference[1], strict=True))) < 2:
        raise InputError(
            f"got {len(reference[1])} reference samples, none different from the others; wanted several, on which the "
            "score gets mean 0 and standard deviation 1: more samples, or none for the responses of the pairs"
        )


def split_off(pairs: Pairs, share: float, seed: int) -> tuple[Pairs, Pairs]:
    """The pairs that are learned and those that are measured, at least one of each; a group is never torn.

    Raises InputError where there are fewer than two pairs, or one group, or the share is not between 0 and 1.
    """
    if len(pairs.units) < 2 or not 0.0 < share < 1.0:
        raise InputError(
            f"got {len(pairs)} pairs in {len(pairs.units)} groups and heldout={share}; wanted at least 2 groups and "
            "0 < heldout < 1"
        )
    units = pairs.units
    order: list[int] = permutation(seed, "pairs held out", len(units)).tolist()
    aside = min(max(round(share * len(units)), 1), len(units) - 1)
    parts = (order[aside:], order[:aside])
    learned, measured = (sorted(place for unit in part for place in units[unit]) for part in parts)
    return pairs.take(learned), pairs.take(measured)


def report_on_pairs(pairs: Pairs) -> PairsReport:
    """Lengths of the two sides in words, and what was counted when the pairs were read."""
    chosen, rejected = ([_length(text) for text in side] for side in (pairs.chosen, pairs.rejected))
    unequal = [good > bad for good, bad in zip(chosen, rejected, strict=True) if good != bad]
    counted = {name: pairs.origin.get(name, 0) for name in ("identical", "duplicates", "dropped", "shortened")}
    return PairsReport(
        pairs=len(pairs),
        chosen_words=sum(chosen) / max(len(pairs), 1),
        rejected_words=sum(rejected) / max(len(pairs), 1),
        longer_wins=sum(unequal) / len(unequal) if unequal else None,
        unequal=len(unequal),
        unread=str(pairs.origin["unread"]) if "unread" in pairs.origin else None,
        **{name: number if isinstance(number, int) else 0 for name, number in counted.items()},
    )


def _length(text: str) -> int:
    """Words between spaces; of a script that has none, its signs."""
    return sum(max(1, len(UNSPACED.findall(word))) for word in text.split())


def fit_pairs(
    pairs: Pairs, base: Source, too_long: TooLong = "error", *, tokenizer: PreTrainedTokenizerBase | None = None
) -> Pairs:
    """The pairs whose two sides the reward model can read; how many were left out or cut stands in `origin`.

    `too_long`: "error" leaves them as they are, and training names the first; "drop" leaves them out; "truncate_left"
    keeps the end of the prompt, as `prompts.shorten` does. Raises InputError where nothing would be left.
    """
    if too_long == "error":
        return pairs
    reader = untrained(base, tokenizer, top_layers=None, seed=0, device="cpu")
    if reader.tokenizer.chat_template is None:
        talk = next((row for row, prompt in enumerate(pairs.prompts) if not isinstance(prompt, str)), 0)
        reader.encode([pairs.prompts[talk]], ["x"])  # raises, and says why, where a conversation cannot be written
    prompts = [_readable(reader, pairs, row, too_long) for row in range(len(pairs))]
    kept = [row for row, prompt in enumerate(prompts) if prompt is not None]
    if not kept:
        raise InputError(f"all {len(pairs)} pairs are too long for the reward model; nothing would be left")
    cut = sum(prompts[row] != pairs.prompts[row] for row in kept)
    fitted = replace(pairs.take(kept), prompts=tuple(prompt for prompt in prompts if prompt is not None))
    return replace(fitted, origin={**pairs.origin, "dropped": len(pairs) - len(kept), "shortened": cut})


def _readable(reader: RewardModel, pairs: Pairs, row: int, too_long: TooLong) -> Prompt | None:
    """The row's prompt as far as both sides can be read with it; None where they cannot."""
    sides = [pairs.chosen[row], pairs.rejected[row]]

    def fits(prompt: Prompt) -> bool:
        try:
            return len(reader.encode([prompt, prompt], sides)) == 2
        except InputError:
            return False

    prompt = pairs.prompts[row]
    return prompt if fits(prompt) else shorten(prompt, fits) if too_long == "truncate_left" else None


def own_replies(
    base: Source,
    prompts: Sequence[Prompt],
    replies: int,
    *,
    max_new_tokens: int = 64,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: Precision = "auto",
    device: str | torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Prompt], list[str]]:
    """So many prompts in a seeded order, and what the checkpoint replies to them at temperature 1.

    A reply has at most `max_new_tokens`, and half of the checkpoint's context; prompts that leave no room for that are
    passed over. Raises InputError where none is left, and where no reply or no token is asked for.
    """
    if replies < 1 or max_new_tokens < 1:
        raise InputError(f"got replies={replies} and max_new_tokens={max_new_tokens}; wanted at least 1 of each")
    policy = load_policy(base, tokenizer, mode="top", top_layers=min(1, layer_count(base)), dtype=dtype, device=device)
    distinct = PromptSet(tuple({repr(prompt): prompt for prompt in prompts}.values()))
    length = min(max_new_tokens, policy.context // 2)
    fitted = fit(distinct, policy.tokenizer, max_tokens=policy.context - length, too_long="drop")
    per_batch = min(REPLIES_AT_ONCE, replies)
    source = PromptSource(fitted.prompts.prompts, fitted.ids, per_batch, seed=seed, pad=policy.pad)
    asked: list[Prompt] = []
    said: list[str] = []
    for number in count():
        batch_prompts, batch_replies = _reply(policy, source, number, seed, length)
        asked, said = [*asked, *batch_prompts], [*said, *batch_replies]
        if progress is not None:
            progress(min(len(said), replies), replies)
        if len(said) >= replies:
            break
    return asked[:replies], said[:replies]


@torch.no_grad()
def _reply(
    policy: LanguagePolicy, source: PromptSource, number: int, seed: int, max_new_tokens: int
) -> tuple[tuple[Prompt, ...], list[str]]:
    batch = source.batch(number)
    draws = uniforms(seed, "own replies", number, batch.keys, max_new_tokens)
    generation = policy.generate(batch, draws, temperature=1.0)
    return batch.texts, policy.decode(generation.responses, generation.response_mask)
