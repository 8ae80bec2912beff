"""What the reference's own samples say of the frontier: how much score each nat could buy, without training.

    samples of the first evaluation ──reweighted by e^{r/β}──▶ (E[r], K) of the optimum at β, and how far to trust it

π* = π_ref·e^{r/β}/Z, so w ∝ e^{r/β} on samples of the reference makes samples of the optimum. The prompts are taken
together, as if each had the same spread of scores. `chord_bounds`: how far the optima of two strings may be apart.
Knows numpy alone. Read next: `verdict.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from tether.store import RunStore

TRUSTED = 20.0
"""Effective samples below which a ghost says nothing."""


def chord_bounds(
    low: float, high: float, nats: float, kl_error: float = 0.0, gain_error: float = 0.0
) -> tuple[float, float]:
    """Least and most gain between the optima of two strings β = `low` < `high` that lie `nats` of K apart.

    β_low·ΔK ≤ Δr ≤ β_high·ΔK, each side widened by the errors of ΔK and Δr.
    """
    least, most = (beta * nats for beta in (low, high))
    return least - math.hypot(gain_error, low * kl_error), most + math.hypot(gain_error, high * kl_error)


@dataclass(frozen=True)
class Ghost:
    """The optimum at one β, as far as the samples reach."""

    beta: float
    score: float
    """E[r] of the optimum."""
    kl: float
    """K of the optimum, nats per response."""
    effective: float
    """Effective sample size (Σw)²/Σw²."""


def ghost(scores: ArrayLike, beta: float) -> Ghost:
    """Reweight samples of the reference by e^{r/β}. E*[r] = Σ w r, K* = Σ w log(n·w), ESS = 1/Σ w², Σ w = 1.

    >>> far = ghost([0.0, 1.0], beta=1e9)
    >>> round(far.score, 6), round(far.kl, 6), round(far.effective, 6)
    (0.5, 0.0, 2.0)
    """
    r = np.asarray(scores, dtype=np.float64)
    weights = np.exp((r - r.max()) / beta)
    weights /= weights.sum()
    kl = float(np.sum(weights * np.log(np.maximum(len(r) * weights, 1e-300))))
    return Ghost(beta, float(weights @ r), kl, float(1.0 / np.sum(weights**2)))


def softest(scores: ArrayLike, beta: float, trusted: float = TRUSTED) -> Ghost:
    """The ghost at β, or at the least larger β whose effective sample size is `trusted`."""
    r = np.asarray(scores, dtype=np.float64)
    made = ghost(r, beta)
    while made.effective < min(trusted, 0.9 * len(r)):
        beta *= 1.1
        made = ghost(r, beta)
    return made


def frontier_of(store: RunStore) -> dict[str, float]:
    """`ghost/*` of a run: the optimum at its β if the samples carry it, else at the least β that they do carry.

    Empty where there was no evaluation before the first update, or too few samples.
    """
    scores = [sample.score for sample in store.samples(step=0, split="probe")]
    beta = store.curve("beta").values
    if len(scores) < TRUSTED or not len(beta) or not beta[-1] > 0 or not all(map(math.isfinite, scores)):
        return {}
    made = softest(scores, float(beta[-1]))
    return {
        "ghost/beta": made.beta, "ghost/gain": made.score - float(np.mean(scores)), "ghost/kl": made.kl,
        "ghost/effective": made.effective,
    }  # fmt: skip
