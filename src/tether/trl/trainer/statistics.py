"""The numbers of one call of `step`, by TRL's names and definitions.

    objective/*   the string, over the batch: KL in nats per response, summed over its tokens
    ppo/*         means over the minibatches of all epochs, but the arrays `advantages` and `ratio`
    tokens/*      lengths

Knows no trainer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tether.trl.core import WANDB_PADDING, stack_dicts


@dataclass(frozen=True)
class Seen:
    """What the statistics of a batch are made of; per-token tensors are [batch, T − 1]."""

    scores: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    non_score_reward: Tensor
    train_stats: Mapping[str, Tensor]
    masks: Tensor
    queries: Sequence[Tensor]
    responses: Sequence[Tensor]
    kls: Tensor


def joined(all_stats: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The minibatches' numbers, one row each; advantages and ratios as one long row."""
    stacked = stack_dicts(all_stats)
    for name in ("policy/advantages", "policy/ratio"):
        stacked[name] = stacked[name].flatten().unsqueeze(0)
    stacked["policy/advantages"] = torch.nan_to_num(stacked["policy/advantages"], float(WANDB_PADDING))
    return stacked


def record(seen: Seen, kl_coef: float) -> dict[str, Any]:
    """All numbers of the batch but learning rate and times."""
    stats = _objective(seen, kl_coef) | _lengths("queries", seen.queries) | _lengths("responses", seen.responses)
    stats |= {f"ppo/{name}": rows.mean(dim=0) for name, rows in seen.train_stats.items()}
    stats["ppo/val/var_explained"] = 1 - stats["ppo/val/error"] / stats["ppo/returns/var"]
    return stats


def _objective(seen: Seen, kl_coef: float) -> dict[str, Any]:
    kl = (seen.kls * seen.masks).sum(dim=-1)
    scores = seen.scores
    return {
        "objective/kl": kl.mean(),
        "objective/kl_dist": kl,
        "objective/logprobs": seen.logprobs,
        "objective/ref_logprobs": seen.ref_logprobs,
        "objective/kl_coef": kl_coef,
        "objective/entropy": (-seen.logprobs * seen.masks).sum(dim=-1).mean(),
        "ppo/mean_non_score_reward": (seen.non_score_reward * seen.masks).sum() / seen.masks.sum().clamp(min=1),
        "ppo/mean_scores": scores.mean(),
        "ppo/std_scores": scores.std() if scores.numel() > 1 else torch.full_like(scores.mean(), float("nan")),
    }


def _lengths(name: str, rows: Sequence[Tensor]) -> dict[str, Any]:
    lengths = torch.tensor([float(len(row)) for row in rows])
    return {
        f"tokens/{name}_len_mean": float(lengths.mean()),
        f"tokens/{name}_len_std": float(lengths.std()) if len(rows) > 1 else float("nan"),
        f"tokens/{name}_dist": lengths.numpy(),
    }
