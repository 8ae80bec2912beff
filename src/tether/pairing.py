"""Do the scores belong to the rows that they stand beside? Asked of the scores themselves, never of the reward.

    prompts, replies, scores of each update ──▶ are replies that are alike paid alike, as they stand or a shift away?

A reward that reads the reply pays replies alike that share their tokens, and so for the prompt. Where that holds of the
scores of rows k places on, and not of the rows' own, somebody has mixed the rows up. Scores that have nothing to do
with any row's tokens, by noise or by meaning, say nothing, and an order without a shift is not found. Knows no model.
Read next: `following.py`, whose neighbour in `watch.py` it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tether.alarms import Alarm
from tether.streams import stream
from tether.text_stats import Floats, Ints

LEAST_ROWS = 8
PERMUTATIONS = 128
"""Orders by chance that a shift is held against."""
SHIFTED, OWN = 8.0, 3.0
"""z of a shift from which rows are said to be mixed up, and of the rows' own order up to which they may be. A sum of
60 updates of chance reaches a z of 4 in one of 32 shifts."""
LOOKS = 60
"""Updates that are looked at; one that proves the rows' own order is the last."""


@dataclass
class Pairing:
    """Sums of z over the updates of a run: [prompt | reply, shift]."""

    seed: int
    _sums: Floats = field(default_factory=lambda: np.zeros((2, 0)))
    _looks: int = 0

    @property
    def is_over(self) -> bool:
        """Whether the rows' own order is proven, or as many updates were looked at as are to be."""
        return self._looks >= LOOKS

    def check(
        self, prompts: Sequence[Ints], replies: Sequence[Ints], scores: Sequence[float], step: int
    ) -> Iterator[Alarm]:
        """Take in one update's rows and scores, until the rows' own order is proven or the looks are over."""
        rows = len(scores)
        if rows < LEAST_ROWS or self.is_over:
            return
        if self._sums.shape[1] != rows:
            self._sums, self._looks = np.zeros((2, rows)), 0
        draw = stream(self.seed, "pairing", step)
        orders = np.stack([draw.permutation(rows) for _ in range(PERMUTATIONS)])
        paid = _ranks(scores)
        if not paid.any():
            return
        self._sums = self._sums + np.stack([_shifts(_alike(texts), paid, orders) for texts in (prompts, replies)])
        self._looks += 1
        every = self._sums / math.sqrt(self._looks)
        if every[:, 0].max() > SHIFTED:
            self._looks = LOOKS
            return
        for what, z in zip(("prompt", "reply"), every, strict=True):
            shift = int(z.argmax())
            if shift and z[shift] > SHIFTED and z[0] < OWN:
                on = shift if shift <= rows // 2 else shift - rows
                yield Alarm(
                    "reward_shifted",
                    f"over {self._looks} updates a row's score goes with the {what} {abs(on)} rows "
                    f"{'on' if on > 0 else 'before'} (z = {z[shift]:.1f}), and not with its own (z = {z[0]:+.1f})",
                    {"shift": on, "z": float(z[shift]), "own": float(z[0]), "of": what},
                )

    def state(self) -> dict[str, object]:
        """All that is remembered, as plain values."""
        return {"sums": self._sums.tolist(), "looks": self._looks}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`."""
        self._sums, self._looks = np.array(state["sums"], dtype=np.float64).reshape(2, -1), int(state["looks"])


def _ranks(scores: Sequence[float]) -> Floats:
    """Mean ranks of the scores, with mean 0 and deviation 1; zeros where all are equal."""
    values, place, count = np.unique(np.asarray(scores), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count - 1) / 2.0)[place]
    spread = float(ranks.std())
    return (ranks - ranks.mean()) / spread if len(values) > 1 and spread > 0 else np.zeros(len(ranks))


def _alike(texts: Sequence[Ints]) -> Floats:
    """Cosine of which types two texts hold, less what all texts hold; 0 of a text with itself. [rows, rows]"""
    types = np.unique(np.concatenate([*texts, np.zeros(0, np.int64)]))
    held = np.stack([np.isin(types, text) for text in texts]).astype(np.float64)
    held -= held.mean(axis=0)
    held /= np.linalg.norm(held, axis=1, keepdims=True) + 1e-9
    alike = held @ held.T
    np.fill_diagonal(alike, 0.0)
    return alike


def _shifts(alike: Floats, paid: Floats, orders: Ints) -> Floats:
    """z of Σ_{i≠j} alike_ij · paid_{i−k} · paid_{j−k} against orders by chance, for each shift k of the scores."""
    rows = len(paid)
    rolled = np.stack([np.roll(paid, shift) for shift in range(rows)])
    found, chance = (((scores @ alike) * scores).sum(axis=1) for scores in (rolled, paid[orders]))
    spread = float(chance.std())
    return (found - chance.mean()) / spread if spread > 1e-9 else np.zeros(rows)
