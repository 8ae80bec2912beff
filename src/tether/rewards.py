"""Room 4: scores and KL → tethered per-token rewards; and the three hands that can hold the string.

`tether` puts −β·(log π_θold − log π_ref) on every token and the score on the last one, and a reward's own token rewards
where it gives any. KL enters here and nowhere else.
`FixedBeta`, `AdaptiveBeta` and `BudgetBeta` say what β is in the next update, given the KL of this one.

It does not know where scores come from (room 3) or what becomes of the rewards (room 5).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tether.batch import Rewards, Rollout, Scores
from tether.config import RewardSettings
from tether.errors import NonFiniteError, ShapeError
from tether.numerics import masked_whiten, tethered_rewards

ADAPTIVE_ERROR_CLIP = 0.2
"""Bound on the relative error that the adaptive controller answers to; Ziegler et al. 2019, §2.2."""
BUDGET_BOUNDS = (1e-4, 10.0)
"""Range that the budget controller keeps β in, so that it cannot wind up out of reach."""


def tether(scores: Scores, rollout: Rollout, beta: float, settings: RewardSettings) -> Rewards:
    """Per-token rewards of a rollout: R_t = −β·d_t + score·1[t = T], d_t = log π_θold − log π_ref.

    `scores` [batch] in the score's unit; β in units of the score per nat. The rule for responses that did not end by
    EOS changes the score first, so Σ_t R_t = score − β·Σ_t d_t holds for the scores that `Rewards` carries. Token
    rewards g_t, where there are any, are added as they are: Σ_t R_t = Σ_t g_t + score − β·Σ_t d_t.

    Raises what `numerics.tethered_rewards` raises: shapes, non-finite scores, a negative β.
    """
    mask = rollout.response_mask
    adjusted = _score_unfinished(scores.scores, rollout, beta, settings)
    tokens = _token_rewards(scores, mask)
    rewards = tokens + tethered_rewards(
        adjusted, rollout.logprobs, rollout.ref_logprobs, mask, beta, allow_negative_beta=settings.allow_negative_beta
    )
    per_response, on_tokens = rewards.sum(dim=1), tokens.sum(dim=1)
    metrics = {
        "beta": beta,
        "reward/mean": float(per_response.mean()),
        "reward/non_score": float((per_response - on_tokens - adjusted).mean()),
        "objective/tethered": float((scores.scores + on_tokens - beta * rollout.kl).mean()),
    }
    if settings.whiten:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    given = None if scores.token_rewards is None else tokens
    return Rewards(rewards=rewards, scores=adjusted, beta=beta, metrics=metrics, token_rewards=given)


def _token_rewards(scores: Scores, mask: Bool[Tensor, "batch response"]) -> Float[Tensor, "batch response"]:
    """The reward's own token rewards, 0 where masked or where it gives none."""
    given = scores.token_rewards
    if given is None:
        return torch.zeros(mask.shape, dtype=scores.scores.dtype, device=mask.device)
    if given.shape != mask.shape:
        raise ShapeError(f"token rewards are {list(given.shape)} and the responses {list(mask.shape)}; wanted the same")
    tokens = torch.where(mask, given, 0.0)
    if not bool(torch.isfinite(tokens).all()):
        raise NonFiniteError("a token reward is NaN or infinite; wanted a finite number on every token")
    return tokens


def _score_unfinished(
    scores: Float[Tensor, "batch"], rollout: Rollout, beta: float, settings: RewardSettings
) -> Float[Tensor, "batch"]:
    """The scores after the rule for responses cut before EOS.

    DEPARTS from a true bootstrap: a response that was cut has no V after its last token, so `bootstrap` takes the
    value before that token, the nearest that was computed.
    """
    rules = {
        "replace": lambda: torch.full_like(scores, settings.missing_eos_score),
        "subtract": lambda: scores - abs(settings.missing_eos_score),
        "zero": lambda: torch.zeros_like(scores),
        "bootstrap": lambda: _last_value(rollout, beta).to(scores),
        "keep": lambda: scores,
    }
    return torch.where(rollout.finished, scores, rules[settings.missing_eos]())


def _last_value(rollout: Rollout, beta: float) -> Float[Tensor, "batch"]:
    last = rollout.sequences.response_lengths - 1
    return rollout.values_at(beta).gather(1, last[:, None]).squeeze(1)


@runtime_checkable
class Beta(Protocol):
    """The string's length in the hands of a controller; frozen: `after` yields the next one."""

    @property
    def value(self) -> float: ...

    def after(self, kl: float, episodes: int) -> Beta:
        """The controller after an update whose rollout of `episodes` responses had a mean KL of `kl` nats."""


@dataclass(frozen=True)
class FixedBeta:
    """β stays where it was put."""

    value: float

    def after(self, kl: float, episodes: int) -> FixedBeta:  # noqa: ARG002 (a fixed string answers to nothing)
        return self


@dataclass(frozen=True)
class AdaptiveBeta:
    """β ← β·(1 + e·n/horizon), e = clip(K/target − 1, ±0.2): the string tightens while K is above its target.

    K and target in nats per response, n responses an update. Doubling β takes at least horizon·ln 2/(0.2·n) updates,
    so scale the horizon with the batch. Ziegler et al. 2019, §2.2.
    """

    value: float
    target: float
    horizon: float

    def after(self, kl: float, episodes: int) -> AdaptiveBeta:
        error = min(max(kl / self.target - 1.0, -ADAPTIVE_ERROR_CLIP), ADAPTIVE_ERROR_CLIP)
        return replace(self, value=self.value * (1.0 + error * episodes / self.horizon))


@dataclass(frozen=True)
class BudgetBeta:
    """Maximise the score subject to K ≤ budget: dual ascent on log β, log β ← log β + (K/budget − 1)·n/horizon.

    The relative error is clipped to ±1. K and budget in nats per response. At rest either K = budget, or the budget
    does not bind and β falls to its lower bound.
    """

    value: float
    budget: float
    horizon: int

    def after(self, kl: float, episodes: int) -> BudgetBeta:
        error = min(max(kl / self.budget - 1.0, -1.0), 1.0)
        low, high = BUDGET_BOUNDS
        moved = math.exp(math.log(max(self.value, low)) + error * episodes / self.horizon)
        return replace(self, value=min(max(moved, low), high))


def controller(settings: RewardSettings) -> Beta:
    """The controller that the settings ask for, at their β."""
    if settings.controller == "adaptive":
        return AdaptiveBeta(settings.beta, settings.target_kl, settings.horizon)
    if settings.controller == "budget":
        return BudgetBeta(settings.beta, settings.target_kl, settings.horizon)
    return FixedBeta(settings.beta)
