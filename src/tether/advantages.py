"""Room 5: rewards and values → advantages and returns.

The surprise of each token: how much better things went than the value head had expected. Returns are taken before
whitening, advantages are whitened once over the batch's real tokens. It knows nothing of scores, KL or β.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tether.batch import Experience, Rewards, Rollout
from tether.config import AdvantageSettings
from tether.numerics import explained_variance, gae, masked_mean, masked_whiten


def estimate(rewards: Rewards, rollout: Rollout, settings: AdvantageSettings) -> Experience:
    """GAE over the response's real tokens: A_t = δ_t + γλA_{t+1}, δ_t = R_t + γV_{t+1} − V_t, G_t = A_t + V_t.

    With two critics V = V_r − β·V_KL. GAE is linear in rewards and values, so A = A_r − β·A_KL whatever β was when the
    critics learned: a β that moves leaves no stale baseline. Each critic has returns of its own.

    Shapes [batch, response], unit of the score. Raises what `numerics.gae` and `numerics.masked_whiten` raise.
    """
    mask, beta, values = rollout.response_mask, rewards.beta, rollout.values_at(rewards.beta)
    advantages, returns = gae(rewards.rewards, values, mask, settings.gamma, settings.lam)
    kl_returns = _kl_returns(rollout, settings)
    metrics = {
        "advantage/mean": float(masked_mean(advantages, mask)),
        "advantage/std": _spread(advantages, rollout),
        "returns/mean": float(masked_mean(returns, mask)),
        "returns/std": _spread(returns, rollout),
        "value/mean": float(masked_mean(values, mask)),
        "value/explained_variance": float(explained_variance(values, returns, mask)),
    }
    if kl_returns is not None and rollout.kl_values is not None and bool(rollout.kl.any()):  # before any KL: 0/0
        metrics["value/kl_explained_variance"] = float(explained_variance(rollout.kl_values, kl_returns, mask))
    return Experience(
        sequences=rollout.sequences,
        old_logprobs=rollout.logprobs,
        old_values=rollout.values,
        advantages=masked_whiten(advantages, mask) if settings.whiten else advantages,
        returns=returns if kl_returns is None else returns + beta * kl_returns,
        metrics=metrics,
        old_kl_values=rollout.kl_values,
        kl_returns=kl_returns,
        weights=rollout.weights,
    )


def _kl_returns(rollout: Rollout, settings: AdvantageSettings) -> Float[Tensor, "batch response"] | None:
    """G_KL,t: what V_KL should have been, nats; None with one critic."""
    if rollout.kl_values is None:
        return None
    mask = rollout.response_mask
    spent = torch.where(mask, rollout.logprobs - rollout.ref_logprobs, 0.0)
    return gae(spent, rollout.kl_values, mask, settings.gamma, settings.lam)[1]


def _spread(x: Float[Tensor, "batch response"], rollout: Rollout) -> float:
    """Biased standard deviation over the real tokens."""
    mask = rollout.response_mask
    return float(masked_mean((x - masked_mean(x, mask)) ** 2, mask).sqrt())
