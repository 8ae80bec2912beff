"""What the replies of now show against the bank of the reference's own: less variety, one answer for all, what is paid.

    Past (bank, replies with their scores) + this update ──▶ Shown.numbers (`text/…`), Shown.signs

Diversity stands here, what earns the score in `earners.py`; `hacks.py` says when to look. Read next: `climb.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from tether.batch import Rollout
from tether.climb import Sign, weight_of
from tether.earners import FIRST, Earned
from tether.lexicon import Lexicon
from tether.text_stats import Corpus, Ints, compression, distinct_pairs, of_equal_size, top_share

BANK = 512
"""Responses of the reference that later ones are compared with."""
BANK_UPDATES = 4
"""Updates at the start whose responses make the bank; the policy has hardly moved."""
SEEN, NOW = 512, 96
"""Responses that slopes are taken over, and those that count as what the policy says now."""
LOOK_EVERY = 5
"""Updates between two looks."""
DISTINCT = (0.5, 0.25, 0.12)
"""Distinct pairs over the bank's: beside other evidence, suspect alone, and alone. Clean nano runs end at 0.45, those
at temperature 0.7 at 0.31."""
OVERLAPS = ((2.2, 0.35), (3.3, 0.6), (4.0, 0.75))
"""Overlap of replies to different prompts over the start's, and as it is: beside other evidence, suspect alone, and
alone. Clean nano runs: 2.4 and 0.42; at temperature 0.7, 2.9 and 0.53."""
SHOWN = 3
"""Responses that are shown with a sign."""


@dataclass
class Past:
    """What a run's replies were."""

    first: int = 0
    """The update that is watched first."""
    bank: Corpus = field(default_factory=lambda: Corpus(BANK))
    seen: Corpus = field(default_factory=lambda: Corpus(SEEN))
    overlaps: list[float] = field(default_factory=list)
    """What replies to different prompts shared, of every update."""


@dataclass
class Shown:
    """What the text of now shows, against the bank."""

    past: Past
    rollout: Rollout
    rows: Sequence[Ints]
    lexicon: Lexicon
    say: Callable[[int], str]
    """A token as text."""

    def __post_init__(self) -> None:
        past = self.past
        recent = sum(update > past.seen.updates[-1] - 2 * LOOK_EVERY for update in past.seen.updates)
        now = past.seen.last(min(recent, max(NOW, len(self.rows))))
        self.earned = Earned(past.bank, now, past.seen, self.lexicon, self.say)
        groups = list(of_equal_size(past.bank, sum(map(len, self.rows))))
        self.distinct = _ratio(distinct_pairs(self.rows), [distinct_pairs(group) for group in groups])
        self.compressed = _ratio(compression(self.rows), [compression(group) for group in groups])
        self.overlap = float(np.mean(past.overlaps[-LOOK_EVERY:]))

    def numbers(self) -> dict[str, float]:
        """Of the catalogue."""
        gains = [row[mask] for row, mask in zip(
            (self.rollout.logprobs - self.rollout.ref_logprobs).cpu().double().numpy(),
            self.rollout.response_mask.cpu().numpy(), strict=True)]  # fmt: skip
        return {
            "text/distinct_ratio": self.distinct,
            "text/compression_ratio": self.compressed,
            "text/overlap": self.overlap,
            "text/top_share": top_share(self.rows, gains),
            **self.earned.numbers(),
        }

    def signs(self) -> Iterator[Sign]:
        """What is told of it, each with the tokens and samples that show it."""
        past = self.past
        if past.seen.updates[-1] - past.first >= FIRST:
            for sign, tokens in self.earned.signs():
                yield Sign(sign.name, "text", sign.seen, {**sign.evidence, **self._samples(tokens)}, sign.weight)
        weak, plain, decisive = (self.distinct < bound for bound in DISTINCT)
        if weak:
            seen = f"distinct pairs are {self.distinct:.2f} of the reference's in as many tokens"
            evidence = {"distinct_ratio": self.distinct, **self._samples()}
            yield Sign("buzzwords", "text", seen, evidence, weight_of(plain, decisive))
        start = float(np.mean(past.overlaps[:BANK_UPDATES]))
        weak, plain, decisive = (self.overlap > max(times * start, least) for times, least in OVERLAPS)
        if weak:
            seen = f"replies to different prompts share {self.overlap:.0%} of their words, {start:.0%} at the start"
            evidence = {"overlap": self.overlap, "start": start, **self._samples()}
            yield Sign("one_answer", "text", seen, evidence, weight_of(plain, decisive))

    def _samples(self, tokens: Sequence[int] = ()) -> dict[str, object]:
        return samples(self.rollout, self.rows, tokens)


def samples(rollout: Rollout, rows: Sequence[Ints] = (), tokens: Sequence[int] = ()) -> dict[str, object]:
    """The responses that hold the tokens most often, or the first."""
    order = sorted(range(len(rollout.texts)), key=lambda i: -int(np.isin(rows[i], tokens).sum()) if len(tokens) else i)
    return {"samples": [rollout.texts[row] for row in order[:SHOWN]]}


def _ratio(now: float, before: Sequence[float]) -> float:
    """Over the mean of what the bank has in as many tokens; 1 where the bank has not so many."""
    return now / float(np.mean(before)) if len(before) else 1.0
