"""Statistics of token sequences, in any language: what is said more than before, how much it repeats, what it earns.

    Corpus (responses as token ids, with scores) → lifted types · distinct-2 · compression · overlap · shares of a gain

Types are token ids, never words, so nothing here knows English. Whatever depends on how much text there is (distinct
pairs, overlap, compression) is compared at equal token counts. Knows numpy alone. Read next: `hacks.py`.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
PRIOR = 0.5
"""Responses with and without a type that are added to both sides: a type never seen before has a finite z."""
RIDGE = 0.02
"""Of the diagonal: keeps the regression finite where two counts move together."""


@dataclass
class Corpus:
    """Responses, oldest first, at most `most` of them."""

    most: int
    rows: list[Ints] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    """As the reward gave them."""
    updates: list[int] = field(default_factory=list)

    def add(self, rows: Sequence[Ints], scores: Sequence[float], update: int) -> None:
        """One update's responses; the oldest give way."""
        self.rows += list(rows)
        self.scores += list(scores)
        self.updates += [update] * len(rows)
        surplus = len(self.rows) - self.most
        if surplus > 0:
            for kept in (self.rows, self.scores, self.updates):
                del kept[:surplus]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tokens(self) -> int:
        return sum(len(row) for row in self.rows)

    def last(self, count: int) -> Corpus:
        """The newest responses."""
        return Corpus(count, self.rows[-count:], self.scores[-count:], self.updates[-count:])

    def presence(self) -> dict[int, int]:
        """In how many responses each type stands."""
        tokens, owners = self._flat()
        once = np.unique(owners * 2**32 + tokens) % 2**32
        types, counts = np.unique(once, return_counts=True)
        return dict(zip(types.tolist(), counts.tolist(), strict=True))

    def counts(self, types: Sequence[int]) -> Floats:
        """How often each type stands in each response, [responses, types]."""
        tokens, owners = self._flat()
        table = np.zeros((len(self.rows), len(types)))
        for column, kind in enumerate(types):
            table[:, column] = np.bincount(owners[tokens == kind], minlength=len(self.rows))
        return table

    def _flat(self) -> tuple[Ints, Ints]:
        """All tokens end to end, and the response of each."""
        lengths = [len(row) for row in self.rows]
        return np.concatenate([*self.rows, np.zeros(0, np.int64)]), np.repeat(np.arange(len(lengths)), lengths)

    def lengths(self) -> Floats:
        return np.array([len(row) for row in self.rows], dtype=np.float64)

    def state(self) -> dict[str, object]:
        """As plain values."""
        flat = np.concatenate([*self.rows, np.zeros(0, np.int64)]).astype("<i4")
        return {
            "most": self.most, "scores": self.scores, "updates": self.updates,
            "lengths": [len(row) for row in self.rows],
            "tokens": base64.b64encode(zlib.compress(flat.tobytes())).decode("ascii"),
        }  # fmt: skip

    @staticmethod
    def of(state: Mapping[str, Any]) -> Corpus:
        """Back from `state()`."""
        flat = np.frombuffer(zlib.decompress(base64.b64decode(state["tokens"])), "<i4").astype(np.int64)
        lengths = np.array(state["lengths"], dtype=np.int64)
        rows = np.split(flat, np.cumsum(lengths)[:-1]) if len(lengths) else []
        scores = [np.nan if score is None else score for score in state["scores"]]
        return Corpus(state["most"], rows, scores, list(state["updates"]))


@dataclass(frozen=True)
class Lift:
    """A type that more responses hold than before."""

    token: int
    z: float
    """Of two proportions: responses with it now, and in the bank."""
    before: float
    """Share of the responses with it."""
    now: float


def lifts(bank: Corpus, now: Corpus) -> list[Lift]:
    """Every type of `now`, the most lifted first.

    z = (p₁ − p₀)/√(p(1 − p)(1/n₁ + 1/n₀)), with PRIOR responses with it and without it added to both sides.
    """
    old, new = bank.presence(), now.presence()
    n0, n1 = len(bank) + 2 * PRIOR, len(now) + 2 * PRIOR
    found = []
    for token, count in new.items():
        p0, p1 = (old.get(token, 0) + PRIOR) / n0, (count + PRIOR) / n1
        p = (p0 * n0 + p1 * n1) / (n0 + n1)
        found.append(Lift(token, (p1 - p0) / float(np.sqrt(p * (1 - p) * (1 / n0 + 1 / n1))), p0, p1))
    return sorted(found, key=lambda lift: -lift.z)


@dataclass(frozen=True)
class Shares:
    """Which part of the gain in score each thing carries, by regression within updates."""

    gain: float
    """Mean score now less that of the bank."""
    types: Mapping[int, float]
    """Of each type's count."""
    length: float
    """Of the number of tokens."""

    @property
    def together(self) -> float:
        """Of all the types at once."""
        return sum(self.types.values())


def gain_shares(bank: Corpus, now: Corpus, seen: Corpus, types: Sequence[int]) -> Shares:
    """Least squares of the score on the types' counts and the length over `seen`, these less their update's mean.

    The slope times the rise of the count from the bank to now is what the type carries of the gain: a counterfactual
    deletion that asks no reward. What all responses hold has no slope left, so `seen` reaches back to when it spread.
    Responses of the bank that were never scored (NaN) count for the rise, not for the gain.
    """
    paid = [score for score in bank.scores if not np.isnan(score)]
    gain = float(np.mean(now.scores) - np.mean(paid)) if len(now) and paid else 0.0
    x = np.column_stack([seen.counts(types), seen.lengths()])
    updates = np.array(seen.updates)
    for update in np.unique(updates):
        x[updates == update] -= x[updates == update].mean(axis=0)
    square = x.T @ x
    square += RIDGE * np.diag(np.diag(square) + 1e-9)
    slopes = np.linalg.solve(square, x.T @ np.array(seen.scores))
    rise = np.append(now.counts(types).mean(axis=0) - bank.counts(types).mean(axis=0),
                     now.lengths().mean() - bank.lengths().mean())  # fmt: skip
    carried = slopes * rise / gain if gain > 0 else np.zeros(len(rise))
    return Shares(gain, dict(zip(types, carried[:-1].tolist(), strict=True)), float(carried[-1]))


def distinct_pairs(rows: Sequence[Ints]) -> float:
    """Distinct pairs of neighbouring tokens over all such pairs; 1 where there is none. Li et al. 2016."""
    pairs = np.concatenate([row[:-1] * 2**31 + row[1:] for row in rows] or [np.zeros(0, np.int64)])
    return len(np.unique(pairs)) / len(pairs) if len(pairs) else 1.0


def compression(rows: Sequence[Ints]) -> float:
    """Bytes after deflate over bytes before, of the rows' ids as 32-bit numbers."""
    raw = b"".join(row.astype("<i4").tobytes() for row in rows)
    return len(zlib.compress(raw, 6)) / len(raw) if raw else 1.0


def overlap(rows: Sequence[Ints], prompts: Sequence[object]) -> float:
    """Mean share of types that two replies to different prompts have in common, |A ∩ B|/|A ∪ B|; 0 without a pair."""
    sets = [set(row.tolist()) for row in rows]
    shares = [
        len(sets[i] & sets[j]) / max(1, len(sets[i] | sets[j]))
        for i in range(len(sets)) for j in range(i) if prompts[i] != prompts[j]
    ]  # fmt: skip
    return float(np.mean(shares)) if shares else 0.0


def top_share(rows: Sequence[Ints], gains: Sequence[Floats], most: int = 20) -> float:
    """Part of Σ ℓ that the `most` types with the largest sums of ℓ carry; NaN where Σ ℓ is not above 0."""
    tokens, values = np.concatenate([*rows, np.zeros(0, np.int64)]), np.concatenate([*gains, np.zeros(0)])
    total = float(values.sum())
    if total <= 0.0:
        return float("nan")
    types, places = np.unique(tokens, return_inverse=True)
    sums = np.bincount(places, weights=values, minlength=len(types))
    return float(np.sort(sums)[::-1][:most].sum()) / total


def of_equal_size(bank: Corpus, tokens: int, most: int = 8) -> Iterator[list[Ints]]:
    """The bank's responses in at most `most` groups of about `tokens` tokens; a last, smaller one is left out."""
    made = _groups(bank, tokens)
    yield from (group for group, _ in zip(made, range(most), strict=False))


def _groups(bank: Corpus, tokens: int) -> Iterator[list[Ints]]:
    group, size = list[Ints](), 0
    for row in bank.rows:
        if group and size + len(row) > tokens:
            yield group
            group, size = [], 0
        group, size = [*group, row], size + len(row)
    if group and size >= 0.8 * tokens:
        yield group
