"""The ghost: the best that this reward model could give at each β, computed from cached samples of the reference.

    π*(y|x) = π_ref(y|x)·e^{r/β}/Z(x)      weights w_i ∝ e^{r_i/β} over the samples of a prompt
    score = Σ w r      KL(π*‖π_ref) = Σ w·log(n·w)      ESS = 1/Σ w²       each averaged over prompts

Self-normalised importance sampling: good while many samples bear weight (ESS ≥ 20), a guess beyond. With few samples
to a prompt their deviations from its mean are pooled over prompts (`pooled`): never solid. A run that kept no bank
still has one reply to each fixed prompt from before its first update: these are reweighted as if of one prompt, so that
choosing among prompts counts as well, which no policy can; never solid. Without any sample a normal distribution of
scores stands in: Δr = σ²/β, K = σ²/(2β²), on the ceiling Δr = σ·√(2K). It is a bound on what PPO can reach against this
reward, not a promise about what it means. Knows no run. Read next: `facts.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

BANK_FILE = "bank.json"
BETAS = tuple(float(beta) for beta in np.geomspace(0.01, 10.0, 121))
SOLID = 20.0
"""Effective samples from which on the ghost is drawn solid."""
CEILING_KL = tuple(float(kl) for kl in np.linspace(0.0, 50.0, 101))
FEWEST = 16
"""Replies from before the first update, or of one prompt, below which they tell nothing of the scores' distribution."""
LARGEST_FILE = 16 * 2**20  # bytes; a bank of 2,000 prompts has a tenth of it
CAPTIONS = {
    "bank": "the best this reward model could give, not a promise",
    "pooled": "the best this reward model could give, about: from a few replies to each of some prompts, pooled",
    "start": "from one reply to each fixed prompt before the first update: too high, often several times, for no "
    "policy can choose its prompts",
    "gaussian": "no reply of the reference is kept in this run: a normal law of the scores stands in",
}
"""Where the ghost comes from, as the page tells it."""
ROUGH = ("pooled", "start")
"""Sources that stand for replies to one prompt without being such: never solid, and without best-of-n."""
BEST_OF = (2, 4, 16, 64)

Facts = dict[str, object]


@dataclass(frozen=True)
class Bank:
    """Scores of samples of the reference, [prompts, samples]."""

    scores: NDArray[np.float64]
    gold: NDArray[np.float64] | None
    source: str

    @staticmethod
    def read(path: Path, source: str) -> Bank | None:
        """The bank in a file; None where there is none or it is none."""
        try:
            if not path.is_file() or path.stat().st_size > LARGEST_FILE:
                return None
            return Bank.of(json.loads(path.read_text("utf-8")), source)
        except (OSError, ValueError, TypeError, RecursionError):
            return None

    @staticmethod
    def of(told: object, source: str) -> Bank | None:
        """The bank of plain values."""
        if not isinstance(told, Mapping) or "scores" not in told:
            return None
        scores = np.asarray(told["scores"], np.float64)
        gold = np.asarray(told["gold"], np.float64) if told.get("gold") is not None else None
        usable = scores.ndim == 2 and scores.size > 0 and bool(np.isfinite(scores).all())
        usable = usable and (gold is None or gold.shape == scores.shape)
        return Bank(scores, gold, source) if usable else None

    def pooled(self) -> Bank:
        """With fewer than 16 replies to a prompt, all of them as if to one: the mean over all, plus each one's
        deviation from its prompt's mean, times √(n/(n − 1)), by which n replies fall short of the spread of many.
        """
        replies = self.scores.shape[1]
        if replies == 1:
            return Bank.of_start(self.scores[:, 0].tolist()) or self
        if replies >= FEWEST or self.scores.size < FEWEST:
            return self

        def one(rows: NDArray[np.float64]) -> NDArray[np.float64]:
            apart = (rows - rows.mean(axis=1, keepdims=True)) * math.sqrt(replies / (replies - 1))
            return np.asarray(rows.mean() + apart, np.float64).reshape(1, -1)

        return Bank(one(self.scores), None if self.gold is None else one(self.gold), "pooled")

    @staticmethod
    def of_start(scores: Sequence[float]) -> Bank | None:
        """Replies to as many prompts, one each, as if they were all of one; None where there are too few."""
        known = np.asarray([score for score in scores if math.isfinite(score)], np.float64)
        return Bank(known[None, :], None, "start") if len(known) >= FEWEST else None


def ghost(bank: Bank | None, sigma: float = 1.0, betas: Sequence[float] = BETAS) -> Facts:
    """The ghost as the page is told."""
    if bank is None:
        return _gaussian(sigma, betas)
    drawn, bank = bank.scores.shape, bank.pooled()
    scores, kl, ess = reweight(bank.scores, betas)
    start = float(bank.scores.mean())
    spread = float(np.sqrt(bank.scores.var(axis=1).mean()))
    solid = (ess >= SOLID) & (bank.source not in ROUGH)
    return {
        "source": bank.source, "prompts": drawn[0], "samples": drawn[1], "unit": "score",
        "betas": list(betas), "score": scores.tolist(), "gain": (scores - start).tolist(), "kl": kl.tolist(),
        "ess": ess.tolist(), "solid": solid.tolist(), "start": start,
        "best_of": [] if bank.source in ROUGH else best_of(bank, start), "ceiling": _ceiling(spread),
        "caption": CAPTIONS.get(bank.source, CAPTIONS["bank"]),
    }  # fmt: skip


def reweight(
    scores: NDArray[np.float64], betas: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Score, KL in nats and effective samples of π* at each β, averaged over prompts.

    >>> score, kl, ess = reweight(np.array([[0.0, 1.0]]), [1e9])
    >>> round(float(score[0]), 6), round(float(kl[0]), 6), round(float(ess[0]), 6)
    (0.5, 0.0, 2.0)
    """
    found = [_at(scores, beta) for beta in betas]
    return tuple(np.array(column) for column in zip(*found, strict=True))  # type: ignore[return-value]


def _at(scores: NDArray[np.float64], beta: float) -> tuple[float, float, float]:
    tilt = scores / beta
    weights = np.exp(tilt - tilt.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    logs = np.log(np.maximum(weights, 1e-300) * scores.shape[1])
    kl = (weights * logs).sum(axis=1)
    return float((weights * scores).sum(axis=1).mean()), float(kl.mean()), float((1 / (weights**2).sum(axis=1)).mean())


def best_of(bank: Bank, start: float) -> list[Facts]:
    """The expected best of n, over all subsets of n of a prompt's samples; K = log n − (n − 1)/n."""
    samples = bank.scores.shape[1]
    order = bank.scores.argsort(axis=1)
    found: list[Facts] = []
    for n in (n for n in BEST_OF if n <= samples):
        chances = np.array([math.comb(i, n - 1) / math.comb(samples, n) for i in range(samples)])
        gain = float((np.take_along_axis(bank.scores, order, 1) * chances).sum(1).mean()) - start
        gold = None if bank.gold is None else float((np.take_along_axis(bank.gold, order, 1) * chances).sum(1).mean())
        found.append({"n": n, "gain": gain, "kl": math.log(n) - (n - 1) / n, "gold": gold})
    return found


def _gaussian(sigma: float, betas: Sequence[float]) -> Facts:
    gain = [sigma**2 / beta for beta in betas]
    return {
        "source": "gaussian", "prompts": 0, "samples": 0, "unit": "score", "betas": list(betas), "score": gain,
        "gain": gain, "kl": [sigma**2 / (2 * beta**2) for beta in betas], "ess": [0.0] * len(betas),
        "solid": [False] * len(betas), "start": 0.0, "best_of": [], "ceiling": _ceiling(sigma),
        "caption": CAPTIONS["gaussian"],
    }  # fmt: skip


def _ceiling(sigma: float) -> Facts:
    """Δr ≤ σ·√(2K) for scores with normal tails, σ within prompts."""
    return {"sigma": sigma, "kl": list(CEILING_KL), "gain": [sigma * math.sqrt(2 * kl) for kl in CEILING_KL]}
