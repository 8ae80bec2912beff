"""The two tolerances that tests may use, and how two tensors are compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """|got − wanted| ≤ absolute + relative·|wanted|, entry by entry."""

    relative: float
    absolute: float


EXACT = Tolerance(relative=1e-12, absolute=1e-12)
"""float64 on both sides: the same formula up to the order of a few additions."""
ROUND_OFF = Tolerance(relative=1e-5, absolute=1e-5)
"""float32 on one side."""


def assert_close(got: Tensor, wanted: Tensor | float | list, tolerance: Tolerance) -> None:
    """Equal in shape and, up to the tolerance, in every entry; a NaN is never close to anything."""
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(
        got.detach().double().cpu(), wanted.detach(), rtol=tolerance.relative, atol=tolerance.absolute
    )
