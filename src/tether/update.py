"""Room 6: PPO epochs over one rollout: the two losses, the optimiser, and when to stop.

Each epoch passes over the rollout in minibatches, each minibatch is one optimiser step. A minibatch is split into
micro-batches of similar length; both losses are divided by the minibatch's token count, so that the split changes
nothing but memory. It knows nothing of scores, KL to the reference or β: they are in the advantages.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tether.batch import KL_UNIT, Evaluation, Experience, Outcome, Policy
from tether.config import UpdateSettings
from tether.errors import NonFiniteError
from tether.numerics import clipped_policy_loss, clipped_value_loss, kl_k3
from tether.optimiser import Optimiser
from tether.runtime.ranks import ALONE, Ranks

EARLY_STOP_FACTOR = 1.5
"""The update ends when the epoch's mean k3(π_old, π) exceeds this × the target; Spinning Up's rule."""
SKIPS_BEFORE_STOP = 8
"""Non-finite optimiser steps in one update before the run is stopped."""


_SUMS = (
    "approx_kl", "clip_fraction", "value_clip_fraction", "total_tokens", "policy_loss", "value_loss", "loss",
)  # fmt: skip


@dataclass
class _Tally:
    """Sums over the tokens seen; divided by `tokens` they are means per token."""

    sums: dict[str, float] = field(default_factory=dict)
    tokens: float = 0.0
    ratio_max: float = 0.0
    ratio_first: float | None = None
    """Largest |ratio − 1| of the first minibatch."""
    positions: float = 0.0

    def add(self, sums: dict[str, float], tokens: float) -> None:
        self.tokens += tokens
        for name, amount in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + amount

    def include(self, other: _Tally) -> None:
        """Add what was seen of another minibatch."""
        self.add(other.sums, other.tokens)
        self.positions += other.positions
        self.ratio_max = max(self.ratio_max, other.ratio_max)

    def over(self, ranks: Ranks) -> _Tally:
        """The same of all ranks together."""
        if ranks.count == 1:
            return self
        numbers = [self.sums.get(name, 0.0) for name in _SUMS]
        found = ranks.sum(torch.tensor([*numbers, self.tokens, self.positions], dtype=torch.float64)).tolist()
        sums = dict(zip(_SUMS, found, strict=False))
        return _Tally(sums, found[-2], ranks.largest(self.ratio_max), self.ratio_first, found[-1])

    def mean(self, name: str) -> float:
        return self.sums.get(name, 0.0) / self.tokens if self.tokens else float("nan")


def update(
    policy: Policy,
    experience: Experience,
    optimiser: Optimiser,
    orders: Int[Tensor, "epochs batch"],
    settings: UpdateSettings,
    *,
    temperature: float = 1.0,
    policy_frozen: bool = False,
    ranks: Ranks = ALONE,
) -> Outcome:
    """Optimise policy and value head on one rollout; row e of `orders` is the order of responses in epoch e.

    Loss of a minibatch: L^CLIP + c_v·L^V, both means over its real tokens. An epoch that finds π further than 1.5 ×
    `early_stop_kl` (k3 per token) from π_old ends the update before its next step. A step whose loss or gradient is
    not finite is skipped and counted. `policy_frozen` fits the value head alone. Of several `ranks`, which all hold the
    whole rollout, each passes over its share of every minibatch; gradients and measurements are summed, so that all
    take the same step.

    Raises NonFiniteError after 8 skipped steps, naming the first tensor that was not finite.
    """
    started = time.perf_counter()
    epochs: list[_Tally] = []
    skipped: list[str] = []
    norms: list[float] = []
    for epoch, index in minibatches(orders, settings.minibatches):
        if epoch == len(epochs):
            epochs.append(_Tally())
        minibatch = experience.rows(index)
        seen, bad = _accumulate(policy, minibatch, optimiser, settings, temperature, policy_frozen, ranks)
        epochs[-1].include(seen)
        if epochs[-1].ratio_first is None:
            epochs[-1].ratio_first = epochs[-1].ratio_max
        if _drifted(epochs[-1], settings):
            optimiser.clear()
            break
        norms.append(_step(optimiser, bad, skipped, policy_frozen, ranks))
    metrics = _summarise(epochs, norms, len(skipped)) | {"seconds/update": time.perf_counter() - started}
    return Outcome(epochs_used=len(epochs), skipped_steps=len(skipped), metrics=metrics)


def minibatches(orders: Int[Tensor, "epochs batch"], parts: int) -> Iterator[tuple[int, Int[Tensor, "minibatch"]]]:
    """Each epoch's number with the responses of each of its minibatches, in turn."""
    for epoch, order in enumerate(orders):
        for index in order.chunk(parts):
            yield epoch, index


def _accumulate(
    policy: Policy,
    minibatch: Experience,
    optimiser: Optimiser,
    settings: UpdateSettings,
    temperature: float,
    policy_frozen: bool,
    ranks: Ranks,
) -> tuple[_Tally, str | None]:
    """Gradients of one minibatch, micro-batch by micro-batch, each rank those of its share.

    Returns what was measured over all ranks, and the name of what was not finite, or None.
    """
    tally, bad = _Tally(), None
    denominator = float(minibatch.sequences.response_mask.sum())
    for rows, counts in passes(minibatch.sequences.lengths, settings, ranks):
        piece = minibatch.rows(rows)
        evaluation = policy.evaluate(piece.sequences, temperature)
        mask, clip, value_clip = piece.sequences.response_mask, settings.clip_range, settings.value_clip_range
        policy_loss = clipped_policy_loss(
            evaluation.logprobs, piece.old_logprobs, piece.advantages, mask, clip, denominator=denominator,
            weights=piece.weights,
        )  # fmt: skip
        value_loss = _value_loss(evaluation, piece, value_clip, denominator)
        bad = bad or _not_finite(policy_loss, value_loss)
        value_part = settings.value_coef * value_loss
        loss = value_part if policy_frozen else policy_loss + value_part
        (loss if counts else 0.0 * loss).backward()  # type: ignore[no-untyped-call]
        optimiser.collect()
        if bad or not counts:
            continue
        _observe(tally, piece, evaluation.logprobs.detach(), evaluation.values.detach(), settings)
        _tally_losses(tally, policy_loss.item() * denominator, value_loss.item() * denominator, settings.value_coef)
        tally.positions += piece.sequences.ids.numel()
    return tally.over(ranks), _agreed(bad, ranks)


def passes(
    lengths: Int[Tensor, "rows"], settings: UpdateSettings, ranks: Ranks = ALONE
) -> Sequence[tuple[Int[Tensor, "part"], bool]]:
    """The micro-batches of this rank, as places in the minibatch; as many as any rank has, since weights that are
    sharded are gathered by all in step. What fills up is passed through and does not count.
    """
    if ranks.count == 1:
        return [(part, True) for part in micro_batches(lengths, settings.tokens_per_micro_batch, settings.max_padding)]
    parts = [
        [share[part] for part in micro_batches(lengths[share], settings.tokens_per_micro_batch, settings.max_padding)]
        for share in shares_by_length(lengths, ranks.count)
    ]
    most, own = max(map(len, parts)), parts[ranks.rank]
    filler = lengths.argmin().unsqueeze(0)
    return [(part, True) for part in own] + [(filler, False)] * (most - len(own))


def shares_by_length(lengths: Int[Tensor, "rows"], count: int) -> list[Int[Tensor, "share"]]:
    """The rows in so many shares of about equal tokens, the first has the longest rows: like lengths pass together.

    There are at least as many rows as shares, and no share is empty.
    """
    order = lengths.argsort(descending=True, stable=True)
    done = lengths[order].cumsum(0)
    share = torch.div((done - lengths[order] // 2) * count, done[-1], rounding_mode="floor").tolist()
    last = len(order) - count
    mine = [max(min(share[place], count - 1, place), place - last) for place in range(len(order))]
    return [order[[place for place, to in enumerate(mine) if to == rank]] for rank in range(count)]


def _not_finite(policy_loss: Tensor, value_loss: Tensor) -> str | None:
    """Which of the losses is not finite."""
    losses = (("policy loss", policy_loss), ("value loss", value_loss))
    return next((name for name, loss in losses if not bool(torch.isfinite(loss))), None)


def _agreed(bad: str | None, ranks: Ranks) -> str | None:
    """What was not finite on any rank."""
    return (bad or "loss of another process") if ranks.any(bad is not None) else None


def _value_loss(
    evaluation: Evaluation, piece: Experience, clip_range: float | None, denominator: float
) -> Float[Tensor, ""]:
    """L^V, of both critics where there are two: that of the KL in units of 1/KL_UNIT nats, like the score's."""
    mask = piece.sequences.response_mask
    loss = clipped_value_loss(
        evaluation.values, piece.old_values, piece.returns, mask, clip_range, denominator=denominator
    )
    if evaluation.kl_values is None or piece.old_kl_values is None or piece.kl_returns is None:
        return loss
    values, old_values, returns = (
        KL_UNIT * nats for nats in (evaluation.kl_values, piece.old_kl_values, piece.kl_returns)
    )
    return loss + clipped_value_loss(values, old_values, returns, mask, clip_range, denominator=denominator)


def _observe(tally: _Tally, piece: Experience, logprobs: Tensor, values: Tensor, settings: UpdateSettings) -> None:
    mask = piece.sequences.response_mask
    ratio = torch.where(mask, logprobs - piece.old_logprobs, 0.0).exp()
    outside = (ratio - 1.0).abs() > settings.clip_range
    value_outside = (values - piece.old_values).abs() > (settings.value_clip_range or float("inf"))
    drift = torch.where(mask, kl_k3(piece.old_logprobs, logprobs), 0.0)
    tally.ratio_max = max(tally.ratio_max, float((ratio - 1.0).abs().max()))
    sums = {
        "approx_kl": float(drift.sum()),
        "clip_fraction": float((outside & mask).sum()),
        "value_clip_fraction": float((value_outside & mask).sum()),
        "total_tokens": float(piece.sequences.lengths.sum()),
    }
    tally.add(sums, float(mask.sum()))


def _tally_losses(tally: _Tally, policy_sum: float, value_sum: float, value_coef: float) -> None:
    tally.add(
        {"policy_loss": policy_sum, "value_loss": value_sum, "loss": policy_sum + value_coef * value_sum}, tokens=0.0
    )


def _drifted(tally: _Tally, settings: UpdateSettings) -> bool:
    limit = settings.early_stop_kl
    return limit is not None and tally.mean("approx_kl") > EARLY_STOP_FACTOR * limit


def _step(optimiser: Optimiser, bad: str | None, skipped: list[str], policy_frozen: bool, ranks: Ranks) -> float:
    """One optimiser step, unless something was not finite. Returns the gradient's norm."""
    optimiser.sum_gradients(ranks)
    if policy_frozen:
        optimiser.drop_policy_gradients()
    norm = optimiser.gradient_norm()
    if bad is None and bool(torch.isfinite(norm)):
        optimiser.step(norm)
        return float(norm)
    skipped.append(bad or "gradient")
    optimiser.clear()
    if len(skipped) >= SKIPS_BEFORE_STOP:
        raise NonFiniteError(
            f"{len(skipped)} optimiser steps of one update were not finite, the first in the {skipped[0]}. "
            "Lower the learning rate, or check the scores' scale; the last checkpoint is intact"
        )
    return float("nan")


def micro_batches(
    lengths: Int[Tensor, "rows"], tokens: int, max_padding: float = 0.05
) -> Sequence[Int[Tensor, "part"]]:
    """Rows grouped by length, longest first; a group has at most `tokens` positions, of them `max_padding` padding.

    A single row longer than the budget stands alone. Every row stands in exactly one group.
    """
    sizes: list[int] = lengths.tolist()
    if _fits(sum(sizes), max(sizes) * len(sizes), tokens, max_padding):
        return [torch.arange(len(sizes), device=lengths.device)]
    groups: list[list[int]] = []
    real = 0
    for row in sorted(range(len(sizes)), key=lambda row: -sizes[row]):
        positions = sizes[groups[-1][0]] * (len(groups[-1]) + 1) if groups else 0
        if groups and _fits(real + sizes[row], positions, tokens, max_padding):
            groups[-1].append(row)
            real += sizes[row]
        else:
            groups.append([row])
            real = sizes[row]
    return [torch.tensor(group, device=lengths.device) for group in groups]


def _fits(real: int, positions: int, tokens: int, max_padding: float) -> bool:
    """Whether that many real tokens may fill that many positions."""
    return positions <= tokens and real >= (1.0 - max_padding) * positions


def _summarise(epochs: list[_Tally], norms: list[float], skipped: int) -> dict[str, float]:
    """Means over the tokens of all epochs, but for what speaks of the first or the last epoch by name."""
    whole = _Tally()
    for epoch in epochs:
        whole.add(epoch.sums, epoch.tokens)
        whole.positions += epoch.positions
    finite = [norm for norm in norms if norm == norm]
    return {
        "loss/policy": whole.mean("policy_loss"),
        "loss/value": whole.mean("value_loss"),
        "loss/total": whole.mean("loss"),
        "ppo/approx_kl": epochs[-1].mean("approx_kl"),
        "ppo/approx_kl_first": epochs[0].mean("approx_kl"),
        "ppo/clip_fraction": whole.mean("clip_fraction"),
        "ppo/value_clip_fraction": whole.mean("value_clip_fraction"),
        "ppo/ratio_max": max(epoch.ratio_max for epoch in epochs),
        "ppo/ratio_first": epochs[0].ratio_first or 0.0,
        "ppo/epochs_used": float(len(epochs)),
        "ppo/skipped_steps": float(skipped),
        "grad/norm": sum(finite) / len(finite) if finite else float("nan"),
        "padding/waste": 1.0 - whole.sums.get("total_tokens", 0.0) / whole.positions if whole.positions else 0.0,
    }
