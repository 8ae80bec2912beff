"""Gradient checkpointing: activations inside a layer are computed again on the way back instead of being kept.

Memory of the update falls from every activation of every trained layer to one layer's, plus the layers' inputs; time
grows by about one forward pass. The numbers are the same: dropout is off, so a layer computes the same twice. The
library's own switch works in training mode alone, in which dropout would be on. Chen et al. 2016.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from tether.trunk import decoder_layers


def recompute_layers(model: PreTrainedModel) -> None:
    """Make every decoder layer of the model forget its activations; where no gradient is taken nothing changes."""
    backbone = model.base_model
    layers = backbone.get_submodule(decoder_layers(backbone, model.config.get_text_config().num_hidden_layers))
    for layer in layers.children():
        layer.forward = _forgetful(layer.forward)


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Within the block, layers that the library's own switch marked forget their activations, in eval mode too.

    What was computed in the block may be taken back through after it.
    """
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing
    ]
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = _forgetful(layer.forward)
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            del layer.forward
            if own is not None:
                layer.forward = own


def _forgetful(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return recomputed
