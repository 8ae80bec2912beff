"""Linear layers laid out for small batches while one samples.

A decoding step multiplies a few rows with every weight of the model. In bfloat16 on a CPU the library lays each weight
out anew for its kernel at every call, which costs as much as the product itself; here it is done once, with the same
kernel and the same bits as result. A frozen weight stays packed from one rollout to the next, a trained one is packed
again once it has moved. Elsewhere than in bfloat16 on a CPU this does nothing. Read next: `decode.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

WORTH_ITS_COST = 12  # decoding steps after which packing a weight anew has paid for itself (two Zen 4 cores)


class PackedLinears:
    """All plain linear layers of some modules, with the packed form of those that did not change since."""

    def __init__(self, *roots: nn.Module) -> None:
        self._linears = [module for root in roots for module in root.modules() if type(module) is nn.Linear]
        self._packed: dict[int, tuple[int, Tensor]] = {}

    @contextmanager
    def in_use(self, rows: int, steps: int) -> Iterator[None]:
        """For the duration, run the layers on packed weights: `steps` passes of about `rows` rows, no gradients."""
        chosen = [linear for linear in self._linears if _can_pack(linear) and self._pays(linear, steps)]
        for linear in chosen:
            linear.forward = partial(_apply, self._pack(linear, rows), linear.bias)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for linear in chosen:
                del linear.__dict__["forward"]
                if linear.weight.requires_grad:
                    self._packed.pop(id(linear), None)

    def _pays(self, linear: nn.Linear, steps: int) -> bool:
        return steps >= WORTH_ITS_COST or not linear.weight.requires_grad

    def _pack(self, linear: nn.Linear, rows: int) -> Tensor:
        version, packed = self._packed.get(id(linear), (-1, None))
        if packed is None or version != linear.weight._version:
            packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
            self._packed[id(linear)] = (linear.weight._version, packed)
        return packed


def _can_pack(linear: nn.Linear) -> bool:
    weight = linear.weight
    plain = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and "forward" not in linear.__dict__
    has_onednn = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    return plain and has_onednn and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def _apply(packed: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return result
