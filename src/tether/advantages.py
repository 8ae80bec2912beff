"""Room 5: rewards and values → advantages and returns.

The surprise of each token: how much better things went than the value head had expected. Returns are taken before
whitening, advantages are whitened once over the batch's real tokens. It knows nothing of scores, KL or β.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from tether.batch import Experience, Rewards, Rollout
from tether.config import AdvantageSettings
from tether.numerics import explained_variance, gae, masked_mean, masked_whiten


def estimate(rewards: Rewards, rollout: Rollout, settings: AdvantageSettings) -> Experience:
    """GAE over the response's real tokens: A_t = δ_t + γλA_{t+1}, δ_t = R_t + γV_{t+1} − V_t, G_t = A_t + V_t.

    Shapes [batch, response], unit of the score. Raises what `numerics.gae` and `numerics.masked_whiten` raise.
    """
    mask = rollout.response_mask
    advantages, returns = gae(rewards.rewards, rollout.values, mask, settings.gamma, settings.lam)
    metrics = {
        "advantage/mean": float(masked_mean(advantages, mask)),
        "advantage/std": _spread(advantages, rollout),
        "returns/mean": float(masked_mean(returns, mask)),
        "returns/std": _spread(returns, rollout),
        "value/mean": float(masked_mean(rollout.values, mask)),
        "value/explained_variance": float(explained_variance(rollout.values, returns, mask)),
    }
    return Experience(
        sequences=rollout.sequences,
        old_logprobs=rollout.logprobs,
        old_values=rollout.values,
        advantages=masked_whiten(advantages, mask) if settings.whiten else advantages,
        returns=returns,
        metrics=metrics,
    )


def _spread(x: Float[Tensor, "batch response"], rollout: Rollout) -> float:
    """Biased standard deviation over the real tokens."""
    mask = rollout.response_mask
    return float(masked_mean((x - masked_mean(x, mask)) ** 2, mask).sqrt())
