"""The policy's weights as others read them: plain tensors under plain Hugging Face names, and a number that tells
whether they have moved.

    changed_weights(policy)   every tensor that training can change, as `AutoModelForCausalLM.state_dict()` names it
    all_weights(policy)       these and the frozen ones
    tied_names(policy)        the second names of those that are two weights in one
    weights_version(policy)   another number whenever a trained weight was modified

Whoever holds the checkpoint that the policy started from and copies the changed weights over it has the policy: another
engine that writes responses, a worker elsewhere. Adapters are folded into the weights that they adapt, one layer at a
time on a copy of that layer, so that the policy is never disturbed and never stands in memory twice. Tied weights come
once, under the first of their names. Knows no engine and no wire. Read next: `modes.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tether.errors import ModelError
from tether.models import LanguagePolicy

NESTED = "base_layer."
"""What PEFT puts between a layer's name and its weight's, once for each adapter round the layer."""


def changed_weights(policy: LanguagePolicy) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of each weight that training can change, in the policy's precision and on its device; no grad.

    full   all weights             top   those of the top layers and the final norm
    lora   W + scale·BA of each adapted layer, and whatever else the adapters' configuration trains

    The tensors of `full` and `top` are the policy's own: read them before the next update, and never write to them.
    Shards (FSDP2) are gathered, so there every process must come along. Raises ModelError where an adapter sits on one
    of two tied weights, which no plain checkpoint can hold.
    """
    trained = {id(parameter) for parameter in policy.trainable()["policy"]}
    return _weights(policy.mode.model, lambda parameter: id(parameter) in trained, adapted_only=True)


def all_weights(policy: LanguagePolicy) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every weight of the policy as it stands; else as `changed_weights`."""
    return _weights(policy.mode.model, lambda parameter: True, adapted_only=False)  # noqa: ARG005


def tied_names(policy: LanguagePolicy) -> dict[str, str]:
    """Further names of trained weights that stand in the model twice (a head tied to the embeddings) → the first."""
    trained = {id(parameter) for parameter in policy.trainable()["policy"]}
    first = {id(parameter): name for name, parameter in policy.mode.model.named_parameters()}
    every = policy.mode.model.named_parameters(remove_duplicate=False)
    return {name: first[id(one)] for name, one in every if id(one) in trained and first[id(one)] != name}


def weights_version(policy: LanguagePolicy) -> int:
    """A number that grows with every in-place change of a trained weight, an optimiser's step above all.

    It is torch's own count of such changes over the policy's weights (the value function is not asked), so equal
    numbers of one process mean equal weights; numbers of two processes mean nothing to each other.
    """
    return sum(parameter._version for parameter in policy.trainable()["policy"])


def _weights(
    model: nn.Module, wanted: Callable[[nn.Parameter], bool], *, adapted_only: bool
) -> Iterator[tuple[str, Tensor]]:
    """The weights that are wanted, and those of adapted layers; there only what adapters change, where so asked."""
    folded: list[str] = []
    for name, module in _wrapped(model):
        folded.append(f"{name}.")
        _refuse_tied(model, name, module)
        yield from _fold(name, module, adapted_only)
    for name, parameter in model.named_parameters():
        if wanted(parameter) and not name.startswith(tuple(folded)):
            yield name, _whole(parameter)


def _wrapped(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that PEFT put in place of the model's own."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inside: str | None = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            inside = f"{name}."
            yield name, module


@torch.no_grad()
def _fold(name: str, module: nn.Module, adapted_only: bool) -> Iterator[tuple[str, Tensor]]:
    """The weights of the layer that the adapters stand round, with the adapters in them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    twin = copy.deepcopy(module)
    if not isinstance(twin, BaseTunerLayer):  # whole modules or single embeddings that train beside the adapters
        plain = twin.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)  # type: ignore[operator]
        for own, parameter in plain.named_parameters():
            yield f"{name}.{own}", _whole(parameter)
        return
    layers = [layer for layer in twin.modules() if isinstance(layer, BaseTunerLayer)]
    adapted = {name for layer in layers for name in _adapted(layer)}
    for layer in reversed(layers):  # the innermost first
        layer.merge()
    for own, parameter in layers[0].get_base_layer().named_parameters():
        if not adapted_only or own in adapted or parameter.requires_grad:
            yield f"{name}.{own}", _whole(parameter)


def _adapted(layer: nn.Module) -> set[str]:
    """The parameters of its base layer that an adapter changes."""
    with_bias = any(getattr(layer, "lora_bias", {}).values())
    return {str(getattr(layer, "parameter_name", "weight"))} | ({"bias"} if with_bias else set())


def _refuse_tied(model: nn.Module, name: str, module: nn.Module) -> None:
    """Raise ModelError where a weight under this module is also another module's."""
    own = {id(parameter) for parameter in module.parameters()}
    others = [
        other for other, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in own and not other.startswith(f"{name}.")
    ]  # fmt: skip
    if others:
        raise ModelError(
            f"adapters sit on {name}, whose weight is tied to {others[0].replace(NESTED, '')}: folded in, they would "
            "change both; wanted adapters on layers that are not tied (target_modules without embeddings and head), or "
            "mode: full"
        )


def _whole(tensor: Tensor) -> Tensor:
    plain = tensor.detach()
    return plain.full_tensor() if isinstance(plain, DTensor) else plain
