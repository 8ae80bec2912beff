"""Scores and passes → rewards → advantages → the two losses, in TRL's layout and conventions, on `tether.numerics`.

Everything is [batch, T − 1] over query and response, with a 0/1 mask. TRL's conventions, where they are not ours:
variances have Bessel's correction; GAE runs over the padded length, with rewards and values 0 outside the mask; rewards
that are whitened are not 0 outside it. Knows no trainer, model or optimiser. Read next: `statistics.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tether import numerics
from tether.trl.core import clip_by_value, entropy_from_logits, flatten_dict, masked_whiten
from tether.trl.trainer.ppo_config import PPOConfig


def kl_penalty(kind: str, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The penalty per token: k1, |k1|, ½·k1², or with "full" KL(π‖ρ) of whole distributions [..., vocab].

    Raises NotImplementedError for any other kind.
    """
    if kind == "full":
        return numerics.full_kl(logprobs, ref_logprobs)
    forms = {"kl": numerics.kl_k1, "abs": lambda p, q: numerics.kl_k1(p, q).abs(), "mse": numerics.kl_k2}
    if kind not in forms:
        raise NotImplementedError(f"kl_penalty is {kind!r}; wanted kl, abs, mse or full")
    return forms[kind](logprobs, ref_logprobs)


def last_token_scores(scores: Tensor, mask: Tensor) -> Tensor:
    """Each score on the last true position of its row, 0 elsewhere; a row without one carries none."""
    mask = mask.bool()
    placed = torch.zeros(mask.shape, dtype=scores.dtype, device=mask.device)
    rows = mask.any(dim=1)
    if bool(rows.any()):
        nothing = placed[rows]
        placed[rows] = numerics.tethered_rewards(scores[rows], nothing, nothing, mask[rows], beta=0.0)
    return placed


def advantages_of(values: Tensor, rewards: Tensor, mask: Tensor, settings: PPOConfig) -> tuple[Tensor, Tensor, Tensor]:
    """(values, advantages, returns): values cleared outside the mask, advantages whitened, returns not."""
    values, rewards = values * mask, rewards * mask
    if settings.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    everywhere = torch.ones_like(mask, dtype=torch.bool)
    advantages, returns = numerics.gae(rewards, values, everywhere, settings.gamma, settings.lam)
    whitened = masked_whiten(advantages, mask) if mask.sum() > 1 else advantages
    return values, whitened.detach(), returns


@dataclass(frozen=True)
class Minibatch:
    """What the losses of a minibatch are made of, all [rows, T − 1] but `logits`."""

    old_logprobs: Tensor
    old_values: Tensor
    logits: Tensor
    values: Tensor
    logprobs: Tensor
    mask: Tensor
    advantages: Tensor
    returns: Tensor

    @property
    def real(self) -> Tensor:
        return self.mask.bool()

    def mean(self, x: Tensor) -> Tensor:
        """Over the mask's tokens; 0 where there is none."""
        return numerics.masked_mean(x, self.real, denominator=self.mask.sum().clamp(min=1))

    def variance(self, x: Tensor) -> Tensor:
        """With Bessel's correction: of one token alone it is NaN, of none 0."""
        count = self.mask.sum()
        spread = self.mean((x - self.mean(x)) ** 2)
        return spread * (count / (count - 1)) if count > 0 else spread

    @property
    def ratio(self) -> Tensor:
        return torch.exp(self.logprobs - self.old_logprobs)


def losses(batch: Minibatch, settings: PPOConfig) -> tuple[Tensor, Tensor]:
    """L^CLIP and the clipped value loss without its coefficient: means over the minibatch's tokens."""
    count, real = batch.mask.sum().clamp(min=1), batch.real
    policy = numerics.clipped_policy_loss(
        batch.logprobs, batch.old_logprobs, batch.advantages, real, settings.cliprange, denominator=count
    )
    value = numerics.clipped_value_loss(
        batch.values, batch.old_values, batch.returns, real, settings.cliprange_value, denominator=count
    )
    return policy, value


@torch.no_grad()
def is_out_of_range(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, threshold: float) -> bool:
    """Whether the mean ratio exceeds the threshold, or is no number: the minibatch would wreck the policy."""
    ratio = numerics.masked_mean(torch.exp(logprobs - old_logprobs), mask.bool(), denominator=mask.sum().clamp(min=1))
    return not bool(ratio <= threshold)


@torch.no_grad()
def measure(batch: Minibatch, policy: Tensor, value: Tensor, settings: PPOConfig) -> dict[str, Tensor]:
    """TRL's numbers of one minibatch, by TRL's names without the leading `ppo/`."""
    gap = batch.logprobs - batch.old_logprobs
    entropy = entropy_from_logits(batch.logits).expand_as(batch.mask)
    mean: Any = batch.mean
    nested = {
        "loss": {"policy": policy, "value": value, "total": policy + settings.vf_coef * value},
        "policy": {
            "entropy": mean(entropy),
            "approxkl": 0.5 * mean(gap**2),
            "policykl": mean(-gap),
            "clipfrac": mean(_policy_clipped(batch, settings.cliprange)),
            "advantages": batch.advantages,
            "advantages_mean": mean(batch.advantages),
            "ratio": batch.ratio,
        },
        "returns": {"mean": mean(batch.returns), "var": batch.variance(batch.returns)},
        "val": {
            "vpred": mean(batch.values),
            "error": mean((batch.values - batch.returns) ** 2),
            "clipfrac": mean(_value_clipped(batch, settings.cliprange_value)),
            "mean": mean(batch.old_values),
            "var": batch.variance(batch.old_values),
        },
    }
    return {name: number.detach() for name, number in flatten_dict(nested).items()}


def _policy_clipped(batch: Minibatch, clip_range: float) -> Tensor:
    """1 where the clip bites: the clipped objective is the worse one."""
    clipped = batch.ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    return torch.gt(-batch.advantages * clipped, -batch.advantages * batch.ratio).float()


def _value_clipped(batch: Minibatch, clip_range: float) -> Tensor:
    """1 where the clipped value is the worse one."""
    clipped = clip_by_value(batch.values, batch.old_values - clip_range, batch.old_values + clip_range)
    return torch.gt((clipped - batch.returns) ** 2, (batch.values - batch.returns) ** 2).float()
