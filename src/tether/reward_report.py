"""What a reward model is worth on comparisons that it has not seen, and what a bag of words is worth on the same.

    accuracy      share of pairs whose chosen response scores higher; a tie counts half
    calibration   is σ(raw margin) the share of pairs that it says?
    gold          does the score follow the truth that labelled the pairs?
    length        does it pay for length?
    floor         logistic regression on differences of word counts, trained on the same pairs

Within-pair correlations are Σ Δa·Δb / √(ΣΔa²·ΣΔb²) over differences between the two responses of a pair, so what
the prompt adds to every score drops out. Knows no training of reward models.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from tether.errors import InputError
from tether.preferences import Pairs, preference
from tether.reward_model import RewardModel

Numbers = NDArray[np.float64]

BINS = 5
"""Of the confidence σ(|margin|), from ½ to 1."""
LENGTH_ALARM = 0.3
"""Within-pair correlation of score and length from which a reader is warned, when gold explains less."""
STANDARD_ERRORS = 2.0
"""Of the gap to the floor, from which chance does not explain it."""
COMMONEST_WORDS = 4096
"""Vocabulary of the floor."""
PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0)
"""λ of the floor's ½λ|w|², of which a fifth of the training pairs chooses one."""

UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
"""Scripts whose words no space parts (Thai, Lao, Burmese, Khmer, kana, Chinese): there a sign counts as a word."""
_SIGNS = "".join(chr(code) for code in range(0x300, 0x3000) if unicodedata.category(chr(code)).startswith("M"))
"""Accents and vowel signs that stand on a letter: Devanagari has them in nearly every word."""
_WORD = re.compile(rf"{UNSPACED.pattern}|(?:(?!{UNSPACED.pattern})[\w{_SIGNS}])+|[^\w\s]")


@dataclass(frozen=True)
class CalibrationBin:
    """Pairs of which the model is about equally sure."""

    pairs: int
    confidence: float
    """Mean σ(|margin|)."""
    accuracy: float
    """Share of them in which it is right."""


@dataclass(frozen=True)
class RewardReport:
    """A reward model measured on held-out comparisons."""

    pairs: int
    accuracy: float
    accuracy_se: float
    """√(p(1 − p)/pairs); where pairs share responses, √(Σ_group (Σ_pair right − p)²)/pairs."""
    floor_accuracy: float
    """The bag of words', on the same pairs."""
    floor_gap_se: float
    """Standard error of accuracy − floor_accuracy, pair by pair; counted as in `accuracy_se`."""
    ceiling_accuracy: float | None
    """What the gold scorer itself reaches, whose labels are noisy; None where gold or noise is not known."""
    log_loss: float
    """−mean log σ(margin), nats; log 2 = 0.693 for a coin."""
    brier: float
    """mean (1 − σ(margin))²; ¼ for a coin."""
    calibration_error: float
    """Σ_bin share·|accuracy − confidence|."""
    calibration: tuple[CalibrationBin, ...]
    length_correlation: float
    """Within pairs, score with length in words."""
    gold_length_correlation: float | None
    gold_correlation: float | None
    """Within pairs, score with gold."""
    gold_pearson: float | None
    """Over all responses, score with gold."""
    gold_spearman: float | None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader should know before optimising against this model, in words."""
        found = []
        if self.accuracy - 2 * self.accuracy_se <= 0.5:
            found.append(
                f"held-out accuracy {self.accuracy:.2f} ± {self.accuracy_se:.2f} is no better than a coin within two "
                "standard errors: PPO against it is noise. Give it more pairs, or less noise in the labels."
            )
        if self.floor_accuracy > self.accuracy:
            found.append(self._below_the_floor())
        if self.length_correlation > max(LENGTH_ALARM, (self.gold_length_correlation or 0.0) + LENGTH_ALARM):
            gold = self.gold_length_correlation
            truth = "" if gold is None else f" (gold: {gold:+.2f})"
            found.append(
                f"longer answers win: score and length correlate {self.length_correlation:+.2f} within pairs{truth}: "
                "PPO will write longer. Balance the lengths of chosen and rejected, and watch length/mean."
            )
        return tuple(found)

    def _below_the_floor(self) -> str:
        """What it means that the bag of words is ahead, whether or not by chance."""
        gap = self.floor_accuracy - self.accuracy
        compared = (
            f"a bag of words reaches {self.floor_accuracy:.3f} where the model reaches {self.accuracy:.3f} on the same "
            f"held-out pairs ({gap:.3f} ± {self.floor_gap_se:.3f} less)"
        )
        if gap <= STANDARD_ERRORS * self.floor_gap_se:
            return (
                f"{compared}, which may be chance: it has learned no more than which words are liked, and PPO will "
                "find those words. More pairs, or a larger body, would show what else there is to learn."
            )
        return (
            f"below the floor: {compared}. Do not train against this model. Give it more pairs, a body that was "
            "trained on such text, another --learning-rate, or passes that pairs set aside choose (--validation 0.2); "
            "where words are all that counts, a Python function that counts them is the better reward."
        )

    def line(self, role: str) -> str:
        """What the model of this role is worth, in a line."""
        known = [("best possible", self.ceiling_accuracy), ("correlation with gold", self.gold_pearson)]
        notes = "".join(f", {name} {number:.2f}" for name, number in known if number is not None)
        return (
            f"{role} model: accuracy {self.accuracy:.3f} ± {self.accuracy_se:.3f} on {self.pairs} held-out "
            f"comparisons (bag of words {self.floor_accuracy:.3f}{notes}), calibration error "
            f"{self.calibration_error:.3f}, correlation with length {self.length_correlation:+.2f}"
        )

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "warnings": list(self.warnings)}


def report_on(reward: RewardModel, heldout: Pairs, trained_on: Pairs) -> RewardReport:
    """Measure the model on pairs it has not seen; the floor is trained on those that it has.

    Raises InputError where there is no held-out pair.
    """
    good, bad = (reward.raw_scores(heldout.prompts, side) for side in (heldout.chosen, heldout.rejected))
    return measure(good, bad, heldout, trained_on)


def measure(
    chosen: Float[Tensor, "pairs"], rejected: Float[Tensor, "pairs"], heldout: Pairs, trained_on: Pairs
) -> RewardReport:
    """The same from the raw scores of the held-out pairs' two sides."""
    if not len(heldout):
        raise InputError("got no held-out pair; wanted at least one: split the comparisons")
    good, bad = chosen.double().numpy(), rejected.double().numpy()
    margins, bins = good - bad, calibrate(good - bad)
    longer = _lengths(heldout.chosen) - _lengths(heldout.rejected)
    gold = None if heldout.margins is None else np.array(heldout.margins)
    every_gold = np.array([*(heldout.chosen_gold or ()), *(heldout.rejected_gold or ())])
    every_score = np.concatenate([good, bad])
    accuracy, floor = accuracy_of(margins), word_margins(trained_on, heldout)
    right, floor_right = _right(margins), _right(floor)
    return RewardReport(
        pairs=len(heldout),
        accuracy=accuracy,
        accuracy_se=_standard_error(right, heldout.units),
        floor_accuracy=accuracy_of(floor),
        floor_gap_se=_standard_error(right - floor_right, heldout.units),
        ceiling_accuracy=_ceiling(gold, heldout.origin.get("noise")),
        log_loss=float(np.logaddexp(0.0, -margins).mean()),
        brier=float(((1.0 - preference(margins, 1.0)) ** 2).mean()),
        calibration_error=calibration_error(bins),
        calibration=bins,
        length_correlation=_aligned(margins, longer),
        gold_length_correlation=None if gold is None else _aligned(gold, longer),
        gold_correlation=None if gold is None else _aligned(margins, gold),
        gold_pearson=None if gold is None else pearson(every_score, every_gold),
        gold_spearman=None if gold is None else pearson(ranks(every_score), ranks(every_gold)),
    )


def accuracy_of(margins: Numbers) -> float:
    """Share of margins above 0; 0 counts half."""
    return float(_right(margins).mean())


def _right(margins: Numbers) -> Numbers:
    """1 where the margin is above 0, ½ at 0."""
    return (np.sign(margins) + 1.0) / 2.0


def _standard_error(values: Numbers, units: Sequence[Sequence[int]]) -> float:
    """Of the mean of one value a pair: groups are independent, pairs within one are not. Liang & Zeger 1986."""
    excess = values - values.mean()
    return float(np.sqrt(sum(excess[list(unit)].sum() ** 2 for unit in units)) / len(values))


def calibrate(margins: Numbers) -> tuple[CalibrationBin, ...]:
    """Pairs by how sure the model is, σ(|margin|) in five equal bins from ½ to 1; empty bins are left out."""
    confidence = preference(np.abs(margins), 1.0)
    place = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    chosen = [place == number for number in range(BINS)]
    return tuple(
        CalibrationBin(int(here.sum()), float(confidence[here].mean()), accuracy_of(margins[here]))
        for here in chosen
        if here.any()
    )


def calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """Σ_bin share·|accuracy − confidence|, in [0, ½]."""
    total = sum(entry.pairs for entry in bins)
    return sum(entry.pairs / total * abs(entry.accuracy - entry.confidence) for entry in bins)


def word_margins(train: Pairs, heldout: Pairs) -> Numbers:
    """Margins that a linear bag of words gives to held-out pairs: w·(counts of chosen − counts of rejected).

    w minimises Σ softplus(−w·x) + ½λ|w|² on the training pairs. Words are lower-cased, marks count as words.
    """
    vocabulary = _vocabulary(train)
    parts: tuple[list[int], list[int]] = ([], [])
    for number, unit in enumerate(train.units):
        parts[number % 5 == 0].extend(unit)
    learned, aside = (_differences(train.take(part), vocabulary) for part in parts)
    losses = [_softplus(-aside @ _fit(learned, penalty)) for penalty in PENALTIES]
    best = PENALTIES[int(np.argmin(losses))]
    margins: Numbers = (_differences(heldout, vocabulary) @ _fit(_differences(train, vocabulary), best)).numpy()
    return margins


def _fit(features: Tensor, penalty: float) -> Tensor:
    """Weights of the logistic regression without intercept, by L-BFGS in float64."""
    weights = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = torch.nn.functional.softplus(-features @ weights).sum() + 0.5 * penalty * weights.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    solver.step(loss)  # type: ignore[no-untyped-call]
    return weights.detach()


def _softplus(x: Tensor) -> float:
    return float(torch.nn.functional.softplus(x).mean())


def _vocabulary(pairs: Pairs) -> dict[str, int]:
    seen = Counter(word for text in (*pairs.chosen, *pairs.rejected) for word in set(words_of(text)))
    return {word: place for place, (word, _) in enumerate(seen.most_common(COMMONEST_WORDS))}


def _differences(pairs: Pairs, vocabulary: dict[str, int]) -> Tensor:
    """Word counts of chosen less rejected, [pairs, vocabulary], sparse."""
    entries = [
        (row, vocabulary[word], sign)
        for row, sides in enumerate(zip(pairs.chosen, pairs.rejected, strict=True))
        for text, sign in zip(sides, (1.0, -1.0), strict=True)
        for word in words_of(text)
        if word in vocabulary
    ]
    rows, words, signs = zip(*entries, strict=True) if entries else ((), (), ())
    places = torch.tensor([rows, words], dtype=torch.long)
    size = (len(pairs), max(len(vocabulary), 1))
    return torch.sparse_coo_tensor(
        places, torch.tensor(signs, dtype=torch.float64), size, check_invariants=True
    ).coalesce()


def words_of(text: str) -> list[str]:
    """Its words in lower case, its marks, and its signs where words are not parted.

    >>> words_of("Yes, I do 好的")
    ['yes', ',', 'i', 'do', '好', '的']
    >>> words_of("नमस्ते दुनिया")
    ['नमस्ते', 'दुनिया']
    """
    return _WORD.findall(text.lower())


def _lengths(texts: Sequence[str]) -> Numbers:
    return np.array([len(words_of(text)) for text in texts], dtype=np.float64)


def _ceiling(gold_margins: Numbers | None, noise: object) -> float | None:
    """Mean probability that a label agrees with the gold order."""
    if gold_margins is None or not isinstance(noise, int | float):
        return None
    return float(preference(np.abs(gold_margins), float(noise)).mean())


def _aligned(left: Numbers, right: Numbers) -> float:
    """Σab / √(Σa²·Σb²): the correlation of two differences, which have no mean to take off. 0 where one is 0."""
    scale = float(np.sqrt((left**2).sum() * (right**2).sum()))
    return float((left * right).sum()) / scale if scale else 0.0


def pearson(left: Numbers, right: Numbers) -> float:
    """Correlation of two columns; 0 where one is constant."""
    return _aligned(left - left.mean(), right - right.mean())


def ranks(values: Numbers) -> Numbers:
    """Ranks from 1; ties share the mean of theirs.

    >>> ranks(np.array([0.5, 0.1, 0.5])).tolist()
    [2.5, 1.0, 2.5]
    """
    _, place, sizes = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(sizes)
    mean_rank: Numbers = last - (sizes - 1) / 2.0
    return mean_rank[place]
