"""Statistics of token sequences, in any language: what is said more than before, how much it repeats, what it earns.

    Corpus (responses as token ids, with scores) → lifted types · distinct-2 · compression · overlap · shares of a gain

Types are token ids, never words, so nothing here knows English. Whatever depends on how much text there is (distinct
pairs, overlap, compression) is compared at equal token counts. Knows numpy alone. Read next: `hacks.py`.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
PRIOR = 0.5
"""Responses with and without a type that are added to both sides: a type never seen before has a finite z."""
USUAL = 0.5
"""Share of the bank's responses from which a type is told by how often it stands in one, not by whether it does."""
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
    features: dict[str, list[float]] = field(default_factory=dict)
    """What the tokens alone do not tell, counted in each response, by name."""

    def add(
        self, rows: Sequence[Ints], scores: Sequence[float], update: int, features: Mapping[str, Sequence[float]]
    ) -> None:
        """One update's responses, with the same features each time; the oldest give way."""
        self.rows += list(rows)
        self.scores += list(scores)
        self.updates += [update] * len(rows)
        for name, counts in features.items():
            self.features.setdefault(name, []).extend(counts)
        surplus = len(self.rows) - self.most
        if surplus > 0:
            del self.rows[:surplus], self.updates[:surplus]
            for numbers in (self.scores, *self.features.values()):
                del numbers[:surplus]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tokens(self) -> int:
        return sum(len(row) for row in self.rows)

    def last(self, count: int) -> Corpus:
        """The newest responses."""
        features = {name: counts[-count:] for name, counts in self.features.items()}
        return Corpus(count, self.rows[-count:], self.scores[-count:], self.updates[-count:], features)

    def presence(self) -> dict[int, Presence]:
        """Of each type, how many responses hold it and how often."""
        tokens, owners = self._flat()
        once, often = np.unique(owners * 2**32 + tokens, return_counts=True)
        types, place, held = np.unique(once % 2**32, return_inverse=True, return_counts=True)
        sums, squares = (np.bincount(place, weights=often.astype(float) ** power) for power in (1, 2))
        found = zip(held.tolist(), sums.tolist(), squares.tolist(), strict=True)
        return {token: Presence(*counts) for token, counts in zip(types.tolist(), found, strict=True)}

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
            "lengths": [len(row) for row in self.rows], "features": self.features,
            "tokens": base64.b64encode(zlib.compress(flat.tobytes())).decode("ascii"),
        }  # fmt: skip

    @staticmethod
    def of(state: Mapping[str, Any]) -> Corpus:
        """Back from `state()`."""
        flat = np.frombuffer(zlib.decompress(base64.b64decode(state["tokens"])), "<i4").astype(np.int64)
        lengths = np.array(state["lengths"], dtype=np.int64)
        rows = np.split(flat, np.cumsum(lengths)[:-1]) if len(lengths) else []
        scores = [np.nan if score is None else score for score in state["scores"]]
        features = {name: list(counts) for name, counts in state["features"].items()}
        return Corpus(state["most"], rows, scores, list(state["updates"]), features)


class Presence(NamedTuple):
    """Of one type in a corpus."""

    held: float
    """Responses that hold it."""
    total: float
    """Σ over responses of how often it stands there."""
    square: float
    """Σ of the squares of that."""


@dataclass(frozen=True)
class Lift:
    """A type that more responses hold than before, or that they hold more often."""

    token: int
    z: float
    """Of two proportions: responses with it now, and in the bank; or, of a usual type, of its mean count."""
    before: float
    """Share of the responses with it."""
    now: float


NOWHERE = Presence(0.0, 0.0, 0.0)


def lifts(bank: Corpus, now: Corpus) -> list[Lift]:
    """Every type of `now`, the most lifted first.

    z = (p₁ − p₀)/√(p(1 − p)(1/n₁ + 1/n₀)), with PRIOR responses with it and without it added to both sides; or, of a
    type that a share USUAL of the bank holds, and whose presence says no more, z = (m₁ − m₀)/√(v₁/n₁ + v₀/n₀) of its
    mean count.
    """
    old, new = bank.presence(), now.presence()
    n0, n1 = len(bank) + 2 * PRIOR, len(now) + 2 * PRIOR
    found = []
    for token, here in new.items():
        before = old.get(token, NOWHERE)
        p0, p1 = (before.held + PRIOR) / n0, (here.held + PRIOR) / n1
        p = (p0 * n0 + p1 * n1) / (n0 + n1)
        z = (p1 - p0) / math.sqrt(p * (1 - p) * (1 / n0 + 1 / n1))
        found.append(Lift(token, z if p0 < USUAL else _rise(before, n0, here, n1), p0, p1))
    return sorted(found, key=lambda lift: -lift.z)


def _rise(before: Presence, n0: float, here: Presence, n1: float) -> float:
    """z of the rise of a mean count; a response that holds the type once is added to both sides."""
    means = [(side.total + 2 * PRIOR) / n for side, n in ((before, n0), (here, n1))]
    spreads = [
        max((side.square + 2 * PRIOR) / n - mean**2, 0.0) / n
        for side, n, mean in ((before, n0, means[0]), (here, n1, means[1]))
    ]
    return (means[1] - means[0]) / math.sqrt(sum(spreads) + 1e-12)


@dataclass(frozen=True)
class Shares:
    """Which part of the gain in score each thing carries, by regression within updates."""

    gain: float
    """Mean score now less that of the bank."""
    types: Mapping[int, float]
    """Of each type's count."""
    feature: float
    """Of the feature that was asked for; 0 where none was."""
    length: float
    """Of the number of tokens."""

    @property
    def together(self) -> float:
        """Of all the types at once."""
        return sum(self.types.values())


def gain_shares(
    bank: Corpus, now: Corpus, seen: Corpus, types: Sequence[int] = (), feature: str | None = None
) -> Shares:
    """Least squares of the score on the types' counts, a feature and the length over `seen`, less their update's mean.

    The slope times the rise of the count from the bank to now is what the type carries of the gain: a counterfactual
    deletion that asks no reward. What all responses hold has no slope left, so `seen` reaches back to when it spread.
    Responses of the bank that were never scored (NaN) count for the rise, not for the gain.
    """
    paid = [score for score in bank.scores if not np.isnan(score)]
    gain = float(np.mean(now.scores) - np.mean(paid)) if len(now) and paid else 0.0
    x = _columns(seen, types, feature)
    updates = np.array(seen.updates)
    for update in np.unique(updates):
        x[updates == update] -= x[updates == update].mean(axis=0)
    square = x.T @ x
    square += RIDGE * np.diag(np.diag(square) + 1e-9)
    slopes = np.linalg.solve(square, x.T @ np.array(seen.scores))
    rise = _columns(now, types, feature).mean(axis=0) - _columns(bank, types, feature).mean(axis=0)
    carried = (slopes * rise / gain if gain > 0 else np.zeros(len(rise))).tolist()
    return Shares(gain, dict(zip(types, carried[:-2], strict=True)), carried[-2], carried[-1])


def _columns(corpus: Corpus, types: Sequence[int], feature: str | None) -> Floats:
    """[responses, types + 2]: counts of the types, the feature (0 where none is asked for), the length."""
    counts = np.zeros(len(corpus)) if feature is None else np.array(corpus.features[feature])
    return np.column_stack([corpus.counts(types), counts, corpus.lengths()])


def mean_rise(before: Sequence[float], now: Sequence[float]) -> float:
    """z of the difference of two means; a count of 1 is added to both sides, so that it is finite."""
    sides = [np.append(np.asarray(side, dtype=np.float64), 1.0) for side in (before, now)]
    error = math.sqrt(sum(float(side.var()) / len(side) for side in sides))
    return float(sides[1].mean() - sides[0].mean()) / (error + 1e-9)


def copied_pairs(row: Ints, prompt: Ints) -> int:
    """How many pairs of neighbouring tokens of a response stand in its prompt, side by side, too."""
    here, there = (ids[:-1] * 2**31 + ids[1:] for ids in (row, prompt))
    return int(np.isin(here, there).sum())


def commonest_opening(rows: Sequence[Ints], size: int) -> tuple[int, ...]:
    """The first `size` tokens that most responses begin with; () where all are shorter."""
    openings = Counter(tuple(row[:size].tolist()) for row in rows if len(row) >= size)
    return openings.most_common(1)[0][0] if openings else ()


def begin_with(rows: Sequence[Ints], opening: tuple[int, ...]) -> list[float]:
    """1 for each response that begins with these tokens, else 0."""
    return [float(tuple(row[: len(opening)].tolist()) == opening) for row in rows]


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
