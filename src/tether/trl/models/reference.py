"""The frozen reference: a copy of the policy as it stands, or of its upper layers on a frozen trunk that both share."""

from __future__ import annotations

import copy

from torch import nn

from tether.errors import InputError
from tether.trl.models.modeling_base import PreTrainedModelWrapper
from tether.trunk import decoder_layers


def create_reference_model(
    model: PreTrainedModelWrapper, num_shared_layers: int | None = None, pattern: str | None = None
) -> PreTrainedModelWrapper:
    """A frozen copy in eval mode.

    With `num_shared_layers` = N the embeddings and the first N layers are shared: they are frozen in the policy too,
    and the copy reads the policy's own memory. `pattern` names a layer where it is not found by itself, as
    "transformer.h.{layer}". Raises InputError where the model has no layer N.
    """
    reference = copy.deepcopy(model)
    reference.requires_grad_(False).eval()
    if num_shared_layers is None:
        return reference
    first = (pattern or _layer_names(model)).format(layer=num_shared_layers)
    names = [name for name, _ in model.named_parameters()]
    cut = next((place for place, name in enumerate(names) if first in name), None)
    if cut is None:
        raise InputError(
            f"no weight of {type(model.pretrained_model).__name__} is called …{first}…; wanted num_shared_layers below "
            "the number of layers, or a pattern such as 'transformer.h.{layer}'"
        )
    for name in names[:cut]:
        _share(model, reference, name)
    return reference


def _layer_names(model: PreTrainedModelWrapper) -> str:
    base = model.pretrained_model.get_base_model() if model.is_peft_model else model.pretrained_model
    backbone = base.base_model
    layers = decoder_layers(backbone, base.config.get_text_config().num_hidden_layers)
    return f"{layers}.{{layer}}."


def _share(model: nn.Module, reference: nn.Module, name: str) -> None:
    """Freeze one weight in the policy and let the reference read its memory."""
    parameter = model.get_parameter(name).requires_grad_(False)
    reference.get_parameter(name).data = parameter.data
