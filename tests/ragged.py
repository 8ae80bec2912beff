"""Random ragged batches: rows of different lengths, padding on either side, holes, poison where masked.

A batch is a mask and a seed; `numbers(name)` draws one `[batch, response]` tensor for each name, NaN and infinities in
its masked places. `rows` hands an oracle what it needs and no more: each row's real numbers, as plain lists.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

POISON = (float("nan"), float("inf"), float("-inf"), 1e30)

Rows = list[list[complex]]  # floats, or what brute_force makes of them


@dataclass(frozen=True)
class Ragged:
    """A mask with at least one true entry in each row, and the seed of the numbers that go with it."""

    mask: Tensor
    """`[batch, response]`, boolean."""
    seed: int

    def numbers(self, name: str, spread: float = 1.0) -> Tensor:
        """`[batch, response]`, float64, normal with this standard deviation; poison where masked."""
        real = torch.randn(self.mask.shape, generator=self._generator(name), dtype=torch.float64) * spread
        return poisoned(real, self.mask)

    def scores(self) -> Tensor:
        """`[batch]`, float64, normal: one score a response."""
        return torch.randn(len(self.mask), generator=self._generator("scores"), dtype=torch.float64)

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{name}".encode()))


def poisoned(x: Tensor, mask: Tensor) -> Tensor:
    """x with NaN, ∞, −∞ and 1e30 in turn where masked."""
    poison = torch.tensor(POISON, dtype=x.dtype).repeat(x.numel() // len(POISON) + 1)[: x.numel()].reshape(x.shape)
    return torch.where(mask, x, poison)


def rows(x: Tensor, mask: Tensor) -> Rows:
    """Each row's real numbers as a plain list: what is left of a batch when padding is taken away."""
    return [row[keep].tolist() for row, keep in zip(x, mask, strict=True)]


def unrows(values: Rows, mask: Tensor) -> Tensor:
    """The inverse of `rows`, 0 where masked."""
    x = torch.zeros(mask.shape, dtype=torch.float64)
    x[mask] = torch.tensor([(value + 0j).real for row in values for value in row], dtype=torch.float64)
    return x


@st.composite
def ragged_batches(draw: st.DrawFn, max_batch: int = 4, max_response: int = 6) -> Ragged:
    """Prefix masks, suffix masks (padding on the left) and masks with holes, one to `max_batch` rows."""
    form = draw(st.sampled_from(["right padding", "left padding", "holes"]))
    batch, response = draw(st.integers(1, max_batch)), draw(st.integers(3 if form == "holes" else 1, max_response))
    if form == "holes":
        one_row = st.lists(st.booleans(), min_size=response, max_size=response).filter(any)
        mask = torch.tensor([draw(one_row) for _ in range(batch)])
        mask[0, [0, -1]] = True
        mask[0, draw(st.integers(1, response - 2))] = False  # a hole between two tokens, in every such batch
    else:
        lengths = torch.tensor([draw(st.integers(1, response)) for _ in range(batch)])
        mask = torch.arange(response) < lengths[:, None]
        mask = mask.flip(1) if form == "left padding" else mask
    return Ragged(mask, draw(st.integers(0, 2**16)))
