"""Adam over the policy's parameter groups, with float32 master copies of half-precision weights.

The forward pass runs in the weights' own precision; the step is taken in float32 and copied back, since a bfloat16
weight swallows steps below its 2⁻⁸ relative spacing. It knows no loss and no schedule: the update room sets the rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from tether.config import UpdateSettings
from tether.errors import ModelError
from tether.runtime.ranks import Ranks, here
from tether.runtime.sharding import is_sharded, local, piece, whole_of

ADAM_BETAS = (0.9, 0.999)
STEPS_TAKEN = "steps_taken"
MASTER, COUNT = "master", "step"
SUMMED_ALONE = 1 << 16
"""Entries from which the ranks add up a gradient where it lies; smaller ones go together, in a copy."""


def numbered(groups: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """The tensors of all groups by name: `policy.0003` is the fourth of the group `policy`.

    >>> list(numbered({"policy": [torch.zeros(2), torch.zeros(3)], "value": [torch.zeros(1)]}))
    ['policy.0000', 'policy.0001', 'value.0000']
    """
    return {f"{name}.{place:04d}": tensor for name, group in groups.items() for place, tensor in enumerate(group)}


class Optimiser:
    """Adam, weight decay 0, one parameter group for each of the policy's (`policy`, `value`)."""

    def __init__(self, groups: Mapping[str, Sequence[torch.nn.Parameter]], settings: UpdateSettings) -> None:
        self.groups = {name: list(parameters) for name, parameters in groups.items() if len(parameters)}
        self.settings = settings
        self.masters = {
            name: [_master(parameter) for parameter in parameters] for name, parameters in self.groups.items()
        }
        self.adam = torch.optim.Adam(
            [{"params": masters, "name": name} for name, masters in self.masters.items()],
            lr=settings.learning_rate,
            betas=ADAM_BETAS,
            eps=settings.adam_epsilon,
            fused=True,  # one pass over weights, gradients and moments; of twenty million weights a tenth of the time
        )
        self.steps_taken = 0
        pairs = [pair for name in self.groups for pair in zip(self.groups[name], self.masters[name], strict=True)]
        self._pieces = [master for parameter, master in pairs if is_sharded(parameter)]
        self._whole = [master for parameter, master in pairs if not is_sharded(parameter)]

    def set_progress(self, fraction_done: float) -> float:
        """Set the learning rates for this share of the run; returns the policy's."""
        scale = 1.0 - fraction_done if self.settings.schedule == "linear" else 1.0
        for group in self.adam.param_groups:
            own = self.settings.value_learning_rate if group["name"] == "value" else None
            group["lr"] = (own or self.settings.learning_rate) * scale
        return self.settings.learning_rate * scale

    def collect(self) -> None:
        """Add the gradients of weights that have masters to these, in float32, and clear them."""
        for parameter, master in self._halves():
            if parameter.grad is not None:
                gradient = local(parameter.grad).float()
                master.grad = gradient if master.grad is None else master.grad + gradient
                parameter.grad = None

    def sum_gradients(self, ranks: Ranks) -> None:
        """Add up what the ranks collected, each its share: then all hold the gradient of the whole minibatch."""
        if ranks.count == 1:
            return
        given = [p.grad for p in self._whole if p.grad is not None]  # those of pieces were added up on the way back
        small = [gradient for gradient in given if gradient.numel() < SUMMED_ALONE]
        ranks.sum_all([gradient for gradient in given if gradient.numel() >= SUMMED_ALONE])
        if small:
            flat = ranks.sum(torch.cat([gradient.reshape(-1) for gradient in small]))
            for gradient, part in zip(small, torch.split(flat, [g.numel() for g in small]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def drop_policy_gradients(self) -> None:
        """Forget the gradients of all but the value head, so that its fit alone makes the step."""
        for name, masters in self.masters.items():
            if name != "value":
                for master in masters:
                    master.grad = None

    def gradient_norm(self) -> Tensor:
        """Global L2 norm over all groups."""
        gradients = [p.grad for p in self._whole if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
        if not self._pieces:
            return norm
        pieces = [p.grad for p in self._pieces if p.grad is not None]
        squares = torch.nn.utils.get_total_norm(pieces).square() if pieces else torch.zeros(())
        return (norm.square() + here().sum(squares.to(norm.device))).sqrt()

    def step(self, norm: Tensor) -> None:
        """Clip to the settings' norm, step, and copy the masters back into the weights."""
        if self.settings.max_grad_norm is not None:
            every = [p for masters in self.masters.values() for p in masters]
            torch.nn.utils.clip_grads_with_norm_(every, self.settings.max_grad_norm, norm)
        self.steps_taken += 1
        for group in self.adam.param_groups:
            group["eps"] = self._epsilon()
        stepped = [p for masters in self.masters.values() for p in masters if p.grad is not None]
        self.adam.step()
        increment_version(stepped)  # a fused step writes without counting, and who keeps copies goes by the count
        with torch.no_grad():
            for parameter, master in self._halves():
                local(parameter).copy_(master)
                increment_version(parameter)
        self.clear()

    def clear(self) -> None:
        """Drop all gradients."""
        self.adam.zero_grad(set_to_none=True)
        for parameters in self.groups.values():
            for parameter in parameters:
                parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """What the next step depends on beside weights and settings, by name; shared, not copied, unless this process
        holds pieces only: then all processes ask, and get the whole.

        `policy.0003.exp_avg` and the like are Adam's, of each weight that was stepped; `policy.0003.master` is the
        float32 master of a half-precision weight; `steps_taken` counts.
        """
        state = {STEPS_TAKEN: torch.tensor(self.steps_taken)}
        weights, masters = numbered(self.groups), numbered(self.masters)
        state |= {name: whole_of(own, weights[_weight_of(name)]) for name, own in self._named_masters().items()}
        for name, master in masters.items():
            known = self.adam.state.get(master, {}).items()
            state |= {f"{name}.{part}": whole_of(tensor, weights[name]) for part, tensor in known}
        return state

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave; the tensors are copied.

        Raises ModelError where they are of other weights; then nothing was changed.
        """
        weights, masters, own = numbered(self.groups), numbered(self.masters), self._named_masters()
        moments = {name: tensor for name, tensor in state.items() if name != STEPS_TAKEN and name not in own}
        strange = sorted({STEPS_TAKEN, *own} - state.keys())
        strange += [name for name in own.keys() & state.keys() if weights[_weight_of(name)].shape != state[name].shape]
        strange += [name for name, moment in moments.items() if not _is_moment(name, moment, weights)]
        if strange:
            raise ModelError(
                f"the optimiser's state does not fit this policy in {', '.join(strange[:3])}; wanted that of the same "
                "model, mode and precision"
            )
        self.steps_taken = int(state[STEPS_TAKEN])
        for name, master in own.items():
            master.copy_(piece(state[name], weights[_weight_of(name)]))
        self.adam.state.clear()
        for name, moment in moments.items():
            weight, _, part = name.rpartition(".")
            like = moment if part == COUNT else masters[weight]  # Adam keeps its counts on the CPU
            given = moment if part == COUNT else piece(moment, weights[weight])
            self.adam.state[masters[weight]][part] = torch.empty_like(like).copy_(given)

    def _named_masters(self) -> dict[str, Tensor]:
        """The masters that hold other numbers than the weights of the policy: those of half-precision weights."""
        weights, masters = numbered(self.groups), numbered(self.masters)
        return {f"{name}.{MASTER}": masters[name] for name in masters if _is_half(weights[name])}

    def _epsilon(self) -> float:
        """ε as torch's Adam wants it. TensorFlow adds ε before the bias correction of √v: ε/√(1 − β₂ᵗ) here."""
        if self.settings.adam_style == "pytorch":
            return self.settings.adam_epsilon
        return self.settings.adam_epsilon / math.sqrt(1.0 - ADAM_BETAS[1] ** self.steps_taken)

    def _halves(self) -> list[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
        pairs = [pair for name in self.groups for pair in zip(self.groups[name], self.masters[name], strict=True)]
        return [(parameter, master) for parameter, master in pairs if parameter is not master]


def _master(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """What Adam steps: the weight itself, a float32 copy of a half-precision one, or the piece that is held here."""
    if _is_half(parameter):
        return torch.nn.Parameter(local(parameter.detach()).float().clone())
    return torch.nn.Parameter(local(parameter.detach())) if is_sharded(parameter) else parameter


def _weight_of(name: str) -> str:
    """`policy.0003` of `policy.0003.master`."""
    return name.rpartition(".")[0]


def _is_moment(name: str, tensor: Tensor, weights: Mapping[str, Tensor]) -> bool:
    """Whether this can be one of Adam's tensors of one of these weights."""
    weight, _, part = name.rpartition(".")
    if weight not in weights or part == MASTER:
        return False
    return tensor.shape == (torch.Size() if part == COUNT else weights[weight].shape)


def _is_half(parameter: Tensor) -> bool:
    return parameter.dtype in (torch.float16, torch.bfloat16)
