"""TRL's small helpers, in TRL's conventions, on `tether.numerics`; scripts import them from `trl.core`.

Where the conventions differ from ours: a mask is 0/1 of any kind, and the variance has Bessel's correction,
σ² = Σ(x−μ)²·m / (Σ m − 1). They know no trainer. Read next: `trainer/losses.py`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import TopKLogitsWarper, TopPLogitsWarper

from tether import numerics
from tether.errors import EmptyMaskError, InputError
from tether.heads import CHUNK_ELEMENTS

WANDB_PADDING = -1


# ── means, variances, log-probabilities ─────────────────────────────────────────────────────────────────────────────
def masked_mean(values: Tensor, mask: Tensor, axis: int | None = None) -> Tensor:
    """Mean over the true entries: of everything, or along one axis. Raises EmptyMaskError where there is none.

    >>> masked_mean(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([1, 1, 0]))
    tensor(1.5000)
    """
    values, mask = torch.broadcast_tensors(values, mask)  # type: ignore[no-untyped-call]
    if axis is not None:
        return torch.where(mask.bool(), values, 0.0).sum(dim=axis) / mask.sum(dim=axis)
    return numerics.masked_mean(values, mask.bool())


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance over the true entries, with Bessel's correction n/(n − 1) unless told otherwise.

    Raises EmptyMaskError where no entry is true; one true entry alone gives NaN, as `torch.var` does.

    >>> masked_var(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([1, 1, 0]))
    tensor(0.5000)
    """
    count = mask.sum()
    if count == 0:
        raise EmptyMaskError(
            "the variance of no token is undefined: every response of the minibatch is empty; raise mini_batch_size"
        )
    variance = masked_mean((values - masked_mean(values, mask)) ** 2, mask)
    return variance * count / (count - 1) if unbiased else variance


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(x − μ)/√(σ² + 1e-8) with TRL's σ²; masked entries are moved and scaled as well. `shift_mean=False` keeps μ.

    >>> masked_whiten(torch.tensor([1.0, 2.0]), torch.tensor([1, 1]))
    tensor([-0.7071,  0.7071])
    """
    mean, variance = masked_mean(values, mask), masked_var(values, mask)
    whitened = (values - mean) * torch.rsqrt(variance + numerics.WHITEN_EPSILON)
    return whitened if shift_mean else whitened + mean


def whiten(values: Tensor, shift_mean: bool = True) -> Tensor:
    """`masked_whiten` of everything."""
    return masked_whiten(values, torch.ones_like(values), shift_mean)


def logprobs_from_logits(logits: Tensor, labels: Tensor | None, gather: bool = True) -> Tensor:
    """log π of the labels, [batch, tokens]; with `gather=False` of every token, [batch, tokens, vocab]."""
    if not gather or labels is None:
        return torch.log_softmax(logits, dim=-1)
    return numerics.selected_logprobs(logits, labels)


@torch.no_grad()
def entropy_from_logits(logits: Tensor) -> Tensor:
    """H(π) per token, nats, without gradient; a few rows at a time, so that no second [batch, tokens, vocab] exists."""
    rows = logits.reshape(-1, logits.shape[-1])
    parts = torch.split(rows, max(1, CHUNK_ELEMENTS // logits.shape[-1]))
    return torch.cat([numerics.entropy(part) for part in parts]).view(logits.shape[:-1])


def clip_by_value(x: Tensor, tensor_min: Tensor, tensor_max: Tensor) -> Tensor:
    """x between two tensors, entry by entry."""
    return torch.clamp(x, tensor_min, tensor_max)


# ── dictionaries of statistics ──────────────────────────────────────────────────────────────────────────────────────
def flatten_dict(nested: Mapping[str, Any], sep: str = "/") -> dict[str, Any]:
    """{'a': {'b': 1}} → {'a/b': 1}. Raises InputError where a key holds the separator.

    >>> flatten_dict({"loss": {"policy": 1}, "step": 2})
    {'loss/policy': 1, 'step': 2}
    """
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if sep in key:
            raise InputError(f"the key {key!r} holds {sep!r}, which joins the keys of the flat dictionary")
        if isinstance(value, Mapping):
            flat |= {f"{key}{sep}{inner}": deep for inner, deep in flatten_dict(value, sep).items()}
        else:
            flat[key] = value
    return flat


def stack_dicts(stats_dicts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One row a dictionary under each key, flat, padded with −1 where lengths differ."""
    return {
        key: pad_sequence([stats[key].flatten() for stats in stats_dicts], True, float(WANDB_PADDING))
        for key in stats_dicts[0]
    }


def stats_to_np(stats_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors as numpy arrays, half precision as float32, plain numbers as floats."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            return (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).numpy()
        return float(value) if isinstance(value, int | float | np.number) else value

    return {key: plain(value) for key, value in stats_dict.items()}


def convert_to_scalar(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors and arrays of one number as that number; TensorBoard takes no others."""

    def single(value: Any) -> bool:
        return isinstance(value, Tensor | np.ndarray) and tuple(value.shape) in ((), (1,))

    return {key: value.item() if single(value) else value for key, value in stats.items()}


# ── sampling and seeds ──────────────────────────────────────────────────────────────────────────────────────────────
def top_k_top_p_filtering(
    logits: Tensor,
    top_k: int = 0,
    top_p: float = 1.0,
    filter_value: float = -float("inf"),
    min_tokens_to_keep: int = 1,
) -> Tensor:
    """Logits [batch, vocab] with `filter_value` outside the k likeliest tokens and outside the nucleus of mass p."""
    none = torch.empty(0, dtype=torch.long)
    if top_k > 0:
        logits = TopKLogitsWarper(int(top_k), filter_value, min_tokens_to_keep)(none, logits)
    if 0 <= top_p < 1.0:
        logits = TopPLogitsWarper(top_p, filter_value, min_tokens_to_keep)(none, logits)
    return logits


@torch.no_grad()
def respond_to_batch(
    model: nn.Module, queries: Tensor, txt_len: int = 20, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Sample `txt_len` tokens after queries of one length; the responses alone, [batch, txt_len]."""
    input_ids = queries
    for _ in range(txt_len):
        logits = top_k_top_p_filtering(model(input_ids)[0][:, -1, :], top_k=top_k, top_p=top_p)
        token = torch.multinomial(torch.softmax(logits, dim=-1), num_samples=1)
        input_ids = torch.cat([input_ids, token], dim=-1)
    return input_ids[:, -txt_len:]


def set_seed(seed: int) -> None:
    """Seed `random`, numpy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class LengthSampler:
    """Draws a length from min_value … max_value − 1, from numpy's global stream."""

    def __init__(self, min_value: int, max_value: int) -> None:
        self.values = list(range(min_value, max_value))

    def __call__(self) -> int:
        return int(np.random.choice(self.values))


class PPODecorators:
    """`empty_device_cache()`: gives cached device memory back after a block, where `optimize_device_cache` is on."""

    optimize_device_cache = False

    @classmethod
    @contextmanager
    def empty_device_cache(cls) -> Iterator[None]:
        yield
        if cls.optimize_device_cache and torch.accelerator.is_available():
            torch.accelerator.memory.empty_cache()
