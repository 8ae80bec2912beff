"""Weights that several processes hold in shares: FSDP2, layer by layer.

    shard(layers, ranks)      each decoder layer's weights are cut into as many pieces as there are processes
    gathered(layers)          whole on every process while a block without gradients runs, then in pieces again
    local · whole · piece     a tensor's own piece; all of it, from all processes; this process's piece of a whole one

With gradients a layer is gathered when it is reached and its gradients are summed into pieces on the way back, so that
weights, gradients, masters and Adam's moments of the layers take 1/n of their memory. Embeddings, head and norms are
whole everywhere. The sampler reads every weight for every token, so it runs on gathered layers. Knows no mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tether.runtime.ranks import Ranks


def shard(layers: Sequence[nn.Module], ranks: Ranks) -> list[FSDPModule]:
    """Cut each layer's weights into pieces, one a process; gradients are added up, not averaged.

    Every process passes over its share of a minibatch with the whole minibatch's denominator: the sum is the gradient.
    """
    if not layers:
        return []
    first = next(layers[0].parameters())
    mesh = init_device_mesh(first.device.type, (ranks.count,))
    precise = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    sharded: list[FSDPModule] = [
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, mp_policy=precise) for layer in layers
    ]
    for layer in sharded:
        layer.set_gradient_divide_factor(1.0)
        layer.set_force_sum_reduction_for_comms(True)
    with gathered(sharded):  # its buffers are made at the first use, which must not be in inference mode
        return sharded


@contextmanager
def gathered(layers: Sequence[FSDPModule]) -> Iterator[None]:
    """Every weight whole on this process while the block runs; all processes enter it together."""
    for layer in layers:
        layer.set_reshard_after_forward(False)
        layer.unshard()
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True)
            layer.reshard()


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a piece of the tensor only."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's piece, in the same memory; the tensor itself where it is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every process asks, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_of(part: Tensor, like: Tensor) -> Tensor:
    """All of what every process holds a piece of, cut as `like` is; the piece itself where that is whole."""
    if not isinstance(like, DTensor) or part.shape != like.to_local().shape:
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    ).full_tensor()


def piece(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's piece of a whole tensor, cut as `like` is."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    there = tensor.to(like.to_local().device)
    return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None).to_local()
