"""The state of a run between two updates, as what can be saved: tensors by name, and plain values.

    trainable weights · Adam's moments and masters · β's controller · whatever else is `Stateful`

Every random draw is a function of seed, purpose and step (`streams.py`), and so is the position in the data: neither
needs to be saved. Knows no file and no room. Read next: `checkpoint.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from tether.batch import Policy
from tether.errors import ModelError, RunError
from tether.optimiser import numbered
from tether.runtime.sharding import local, piece

Controller = TypeVar("Controller")
KIND = "controller"


@runtime_checkable
class Stateful(Protocol):
    """What changes while a run goes on, as a reward with a running mean, and must go on from where it was."""

    def checkpoint_state(self) -> Mapping[str, object]:
        """What it needs to go on: plain values, as JSON has them."""

    def restore_state(self, state: Mapping[str, object]) -> None:
        """Go on from what `checkpoint_state` gave."""


@dataclass(frozen=True)
class Snapshot:
    """The state that update `step` starts from. The tensors are the run's own, not copies."""

    step: int
    """Updates done; the rows of updates 0 … step − 1 are in `run.db`."""
    weights: Mapping[str, Tensor]
    """What trains, by name."""
    optimiser: Mapping[str, Tensor]
    beta: Mapping[str, object]
    """β's controller: the name of its class, and its fields."""
    states: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """Of all that is `Stateful`: the reward, and what watches the run; plain values."""


@torch.no_grad()
def load_weights(policy: Policy, weights: Mapping[str, Tensor]) -> None:
    """Put the weights of a snapshot into a policy. Raises ModelError, and changes nothing, where they do not fit."""
    own = numbered(policy.trainable())
    strange = sorted(own.keys() ^ weights.keys())
    strange += [name for name in own.keys() & weights.keys() if _kind(own[name]) != _kind(weights[name])]
    if strange:
        raise ModelError(
            f"the checkpoint's weights do not fit this policy in {len(strange)} places, as {strange[0]}; wanted the "
            "same model, mode, number of layers or rank, and precision"
        )
    for name, weight in own.items():
        local(weight).copy_(piece(weights[name], weight))


def plain(controller: Controller) -> dict[str, object]:
    """A frozen dataclass (β's controller) as plain values: the name of its class, and its fields."""
    names = [one.name for one in fields(controller)]  # type: ignore[arg-type]  # a protocol cannot say «dataclass»
    return {KIND: type(controller).__name__} | {name: getattr(controller, name) for name in names}


def unplain(values: Mapping[str, object], like: Controller) -> Controller:
    """The inverse of `plain`. Raises RunError where the values are of another class than `like`."""
    if values.keys() != plain(like).keys() or values[KIND] != type(like).__name__:
        raise RunError(
            f"the checkpoint's β is held by {values.get(KIND)} and the settings ask for {type(like).__name__}; set "
            "ppo.reward.controller back, or fork the run"
        )
    changed: Controller = replace(like, **{name: value for name, value in values.items() if name != KIND})  # type: ignore[type-var]
    return changed


def states_of(**things: object) -> dict[str, Mapping[str, object]]:
    """The states of those that have one, by name."""
    return {name: thing.checkpoint_state() for name, thing in things.items() if isinstance(thing, Stateful)}


def restore_states(states: Mapping[str, Mapping[str, object]], **things: object) -> None:
    """Give those that have a state theirs back."""
    for name, thing in things.items():
        if isinstance(thing, Stateful) and name in states:
            thing.restore_state(states[name])


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype
