"""Comparisons as a reward model reads them: every response once, however often it is compared.

    Pairs (prompt, chosen, rejected) ─ compare ─▶ Compared: distinct responses, and where each pair's two sides stand

K responses to a prompt make K(K − 1)/2 pairs, and are read K times, not K(K − 1). Knows no loss. Read next:
`reward_training.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float
from torch import Tensor

from tether.batch import Prompt
from tether.preferences import Pairs
from tether.reward_model import Encoded, RewardModel


@dataclass(frozen=True)
class Compared:
    """Pairs, and the responses in them."""

    pairs: Pairs
    every: Encoded
    """Responses that are compared here or, after `take`, elsewhere."""
    chosen: tuple[int, ...]
    """For each pair, where in `every` its better side stands."""
    rejected: tuple[int, ...]

    @cached_property
    def rows(self) -> list[int]:
        """The responses of these pairs, each once."""
        return sorted({*self.chosen, *self.rejected})

    @property
    def responses(self) -> Encoded:
        """The same, encoded: what a pass reads."""
        return self.every.take(self.rows)

    @property
    def longest(self) -> int:
        """Tokens of the longest response with its prompt."""
        return max(len(self.every.rows[row]) for row in self.rows)

    def take(self, places: Sequence[int]) -> Compared:
        """The pairs at these places."""
        chosen, rejected = (tuple(side[place] for place in places) for side in (self.chosen, self.rejected))
        return Compared(self.pairs.take(places), self.every, chosen, rejected)

    def sides(self, scores: Float[Tensor, "rows"]) -> tuple[Float[Tensor, "pairs"], Float[Tensor, "pairs"]]:
        """Scores of the chosen and of the rejected side of each pair, from those of `responses`."""
        place = {row: index for index, row in enumerate(self.rows)}
        chosen, rejected = ([place[row] for row in side] for side in (self.chosen, self.rejected))
        return scores[chosen], scores[rejected]


def compare(reward: RewardModel, pairs: Pairs) -> Compared:
    """The pairs, encoded by this reward model; the states of its frozen trunk are computed here, once."""
    place: dict[tuple[str, str], int] = {}
    texts: list[tuple[Prompt, str]] = []
    sides: list[tuple[int, ...]] = []
    for side in (pairs.chosen, pairs.rejected):
        found = []
        for prompt, response in zip(pairs.prompts, side, strict=True):
            key = (json.dumps(prompt, default=list), response)
            if key not in place:
                place[key] = len(texts)
                texts.append((prompt, response))
            found.append(place[key])
        sides.append(tuple(found))
    return Compared(pairs, reward.prepare([prompt for prompt, _ in texts], [text for _, text in texts]), *sides)
