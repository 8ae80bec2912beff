"""A hash chain over a run: after each update a digest of everything that was computed up to its end.

    hₙ = H(hₙ₋₁ · tokens, log-probabilities, values, scores, rewards, advantages, measurements of update n)

Two runs with the same digest at update n did the same, bit by bit, up to there: had a weight differed in one bit, the
log-probabilities of the next update would. What the clock says is left out. Read next: `replay.py`.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator

import torch
from torch import Tensor

from tether.trainer import Record

TIMES = ("seconds/", "tokens/per_second", "memory/")
"""Metrics that are no function of the run."""
DIGEST_BYTES = 16


def link(before: str, record: Record) -> str:
    """hₙ of hₙ₋₁ (empty at the start) and update n, 32 hexadecimal digits."""
    digest = hashlib.blake2b(before.encode(), digest_size=DIGEST_BYTES)
    digest.update(struct.pack("<q", record.step))
    for tensor in _computed(record):
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(plain.view(torch.uint8).numpy().data)
    for name in sorted(record.metrics):
        if not name.startswith(TIMES):
            digest.update(name.encode() + struct.pack("<d", record.metrics[name]))
    return digest.hexdigest()


def _computed(record: Record) -> Iterator[Tensor]:
    rollout = record.rollout
    yield from (rollout.sequences.responses, rollout.response_mask, rollout.logprobs, rollout.ref_logprobs)
    yield from (rollout.values, record.scores.totals, record.rewards.rewards)
    yield from (record.experience.advantages, record.experience.returns)
