"""Rollouts without a model: responses of given lengths with random numbers, for the rooms that only do arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from ragged import Ragged
from tether.batch import Prompts, Rollout, Sequences

VOCAB = 5


def sequences_of(lengths: Tensor, seed: int = 0) -> Sequences:
    """Prompts of 1 to 3 tokens, responses of these lengths, tokens drawn at random from `VOCAB`."""
    draw = torch.Generator().manual_seed(seed)
    prompt_lengths = torch.randint(1, 4, lengths.shape, generator=draw)
    total = int((prompt_lengths + lengths).max())
    return Sequences(torch.randint(VOCAB, (len(lengths), total), generator=draw), prompt_lengths, lengths)


def rollout_of(lengths: list[int], seed: int = 0, finished: list[bool] | None = None) -> Rollout:
    """A rollout of normal numbers in float64, with NaN, infinities and 1e30 where masked."""
    sequences = sequences_of(torch.tensor(lengths), seed)
    batch, size = Ragged(sequences.response_mask, seed), len(lengths)
    prompts = Prompts(
        torch.zeros(size, 1, dtype=torch.long), torch.ones(size, 1).bool(), ("",) * size, tuple(range(size))
    )
    return Rollout(
        prompts=prompts,
        sequences=sequences,
        texts=("",) * size,
        logprobs=batch.numbers("policy"),
        sampler_logprobs=batch.numbers("policy"),
        ref_logprobs=batch.numbers("reference"),
        values=batch.numbers("values"),
        entropy=batch.numbers("entropy"),
        full_kl=batch.numbers("full_kl"),
        finished=torch.tensor([True] * size if finished is None else finished),
    )
