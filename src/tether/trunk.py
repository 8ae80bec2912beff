"""A causal LM cut in two: a frozen trunk, and the top layers that are trained on its hidden states.

    ids → embeddings → layers 0 … n−k−1 ─ states ─→ layers n−k … n−1 → final norm → hidden
          └──────────── trunk ────────┘             └───────── top, twice: policy and frozen originals ──┘

Every part is run by the model's own forward code, so masks, position embeddings and layer types are those of the
architecture, whichever it is: a part is a copy of the model's shell (no weight is copied) in which the layers that it
does not run are replaced by ones that let the states pass. Knows no head, loss or sampler. Read next: `models.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tether.errors import ModelError

SAME = 1e-3  # relative; the parts run the same steps as the whole, so the difference is 0 in practice


def run_backbone(backbone: nn.Module, ids: Int[Tensor, "batch total"]) -> Float[Tensor, "batch total dim"]:
    """Final hidden states of right-padded rows.

    No mask is passed and none is needed: under causal attention a real token never sees the padding on its right, and
    its position is its column.
    """
    hidden: Tensor = backbone(input_ids=ids, use_cache=False).last_hidden_state
    return hidden


def agree(left: Tensor, right: Tensor, tolerance: float) -> bool:
    """Whether two tensors are equal up to this share of the largest entry; never where one is not finite."""
    scale = float(right.abs().max()) or 1.0
    return float((left.float() - right.float()).abs().max()) <= tolerance * scale


def decoder_layers(backbone: nn.Module, count: int) -> str:
    """Dotted name of the list of decoder layers within the backbone: its outermost ModuleList of `count` entries.

    Raises ModelError where there is none.
    """
    lists = [name for name, module in backbone.named_modules() if isinstance(module, nn.ModuleList)]
    fitting: list[str] = [name for name in lists if len(backbone.get_submodule(name)) == count]  # type: ignore[arg-type]
    if not fitting:
        raise ModelError(
            f"{type(backbone).__name__} has no list of {count} decoder layers (found: {', '.join(lists) or 'none'}), "
            "so its top layers cannot be trained alone; use mode='full' or mode='lora'"
        )
    return min(fitting, key=lambda name: name.count("."))


class SplitBackbone:
    """The trunk, the trained top and the frozen original top of one backbone."""

    def __init__(self, backbone: nn.Module, layers: str, top_layers: int, probe: Int[Tensor, "batch total"]) -> None:
        """Cut `top_layers` off the list named `layers`; `probe` is any valid input, run once to see the data flow.

        The original top is copied here, so `backbone` must still hold the reference's weights.
        """
        found: nn.ModuleList = backbone.get_submodule(layers)  # type: ignore[assignment]
        cut = len(found) - top_layers
        tail, as_tuple = _observe(backbone, layers, probe)
        passing: list[nn.Module] = [_Pass(layer, as_tuple) for layer in found]
        frozen_top = copy.deepcopy(nn.ModuleList(found[cut:])).requires_grad_(False)
        frozen_tail = {name: copy.deepcopy(module).requires_grad_(False) for name, module in tail.items()}
        self._capture = _Capture(found[cut], as_tuple)
        self._resume, self._resume_frozen = _Resume(found[cut]), _Resume(frozen_top[0])
        self._trunk = _shell(backbone, layers, [*found[:cut], self._capture, *passing[cut + 1 :]], {})
        self._top = _shell(backbone, layers, [*passing[:cut], self._resume, *found[cut + 1 :]], {})
        self._frozen = _shell(backbone, layers, [*passing[:cut], self._resume_frozen, *frozen_top[1:]], frozen_tail)
        self.first_trained: nn.Module = found[cut]
        self.trained: list[nn.Module] = [*found[cut:], *tail.values()]
        self.originals: list[nn.Module] = [*frozen_top, *frozen_tail.values()]
        self.frozen_layers: list[nn.Module] = list(frozen_top)
        self._check(backbone, probe)

    @torch.no_grad()
    def _check(self, backbone: nn.Module, probe: Int[Tensor, "batch total"]) -> None:
        """Raise ModelError where the top needs more of the trunk than its states (keys of lower layers, say)."""
        ids = probe.expand(2, -1)
        try:
            same = agree(self.frozen_top(ids, self.states(ids)), run_backbone(backbone, ids), SAME)
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError):
            same = False
        if not same:
            raise ModelError(
                f"the top layers of {type(backbone).__name__} do not run on the states of the layers below alone; "
                "use mode='full' or mode='lora'"
            )

    @torch.no_grad()
    def states(self, ids: Int[Tensor, "batch total"]) -> Float[Tensor, "batch total dim"]:
        """What the first trained layer receives."""
        run_backbone(self._trunk, ids)
        return self._capture.take()

    def top(
        self, ids: Int[Tensor, "batch total"], states: Float[Tensor, "batch total dim"]
    ) -> Float[Tensor, "batch total dim"]:
        """Final hidden states of the policy."""
        self._resume.states = states
        return run_backbone(self._top, ids)

    @torch.no_grad()
    def frozen_top(
        self, ids: Int[Tensor, "batch total"], states: Float[Tensor, "batch total dim"]
    ) -> Float[Tensor, "batch total dim"]:
        """Final hidden states of the reference."""
        self._resume_frozen.states = states
        return run_backbone(self._frozen, ids)


class _Pass(nn.Module):
    """Stands for a layer and returns its input. Attributes that the model reads from a layer are the layer's own."""

    def __init__(self, layer: nn.Module, as_tuple: bool) -> None:
        super().__init__()
        self._stands_for = (layer,)  # in a tuple, so that it is no submodule
        self._as_tuple = as_tuple

    def __getattr__(self, name: str) -> Any:
        if name in ("_stands_for", "_as_tuple"):
            raise AttributeError(name)
        return getattr(self._stands_for[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Any, ...]:
        states: Tensor = args[0] if args else kwargs["hidden_states"]
        return (states,) if self._as_tuple else states


class _Capture(_Pass):
    """Keeps the states that reach it."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Any, ...]:
        result = super().forward(*args, **kwargs)
        self._states = result[0] if isinstance(result, tuple) else result
        return result

    def take(self) -> Tensor:
        states: Tensor = self.__dict__.pop("_states")
        return states


class _Resume(_Pass):
    """Runs its layer on given states, whatever reaches it."""

    states: Tensor | None

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer, as_tuple=False)
        self.states = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Any, ...]:
        states, self.states = self.states, None  # dropped at once: they belong to the rollout
        result: Tensor | tuple[Any, ...]
        if args:
            result = self._stands_for[0](states, *args[1:], **kwargs)
        else:
            result = self._stands_for[0](**{**kwargs, "hidden_states": states})
        return result


def _shell(backbone: nn.Module, layers: str, parts: list[nn.Module], replaced: Mapping[str, nn.Module]) -> nn.Module:
    """A backbone that shares all weights of the given one, with other layers, and other modules beside them."""
    outer = _shallow(backbone)
    *path, name = layers.split(".")
    parent = outer
    for step in path:
        parent._modules[step] = _shallow(parent.get_submodule(step))
        parent = parent.get_submodule(step)
    parent._modules.update({name: nn.ModuleList(parts), **replaced})
    return outer


def _shallow(module: nn.Module) -> nn.Module:
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


@torch.no_grad()
def _observe(backbone: nn.Module, layers: str, probe: Int[Tensor, "batch total"]) -> tuple[dict[str, nn.Module], bool]:
    """The modules beside the layers that run after them (the final norm), and whether layers return tuples."""
    parent = backbone.get_submodule(layers.rpartition(".")[0])
    last_layer: nn.Module = backbone.get_submodule(layers)[-1]  # type: ignore[index]
    calls: list[tuple[nn.Module, object]] = []

    def note(module: nn.Module, _: object, output: object) -> None:
        calls.append((module, output))

    watched = [module for module in parent.children() if not isinstance(module, nn.ModuleList)]
    hooks = [module.register_forward_hook(note) for module in (*watched, last_layer)]
    try:
        run_backbone(backbone, probe)
    finally:
        for hook in hooks:
            hook.remove()
    order = [module for module, _ in calls]
    last = order.index(last_layer)
    tail = {name: module for name, module in parent.named_children() if any(module is m for m in order[last + 1 :])}
    return tail, isinstance(calls[last][1], tuple)
