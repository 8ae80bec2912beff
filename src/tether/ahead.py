"""The next update's responses, written while this one trains: by weights that are one update old.

    update n      takes what was begun in update n − 1 → has n + 1 begun with the weights as they stand → trains

Prompts and uniforms of an update are functions of its number, so what it will ask is known before it asks. It is
known, not promised: a knob turned between two updates changes it, and then what was begun is dropped and written anew.
The generation's origin says that it is one update old, by which `rollouts.py` corrects it: min(π/q, cap) on each token.
The first update has nothing begun, and so is not old.

Where a checkpoint falls, what was begun is waited for and saved with it: the weights that wrote it are gone by then. So
a run that is resumed, or killed, is the run that was not. Knows no worker and no engine. Read next: `remote.py`.
"""

from __future__ import annotations

import base64
import copy
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from jaxtyping import Float
from safetensors.torch import load, save
from torch import Tensor

from tether.batch import Generation, Origin, Prompts

if TYPE_CHECKING:
    from tether.trainer import Run


@runtime_checkable
class Pending(Protocol):
    """Responses on their way."""

    def take(self) -> Generation:
        """The responses; waits for them."""


@runtime_checkable
class Begins(Protocol):
    """A writer that works elsewhere."""

    def begin(self, prompts: Prompts, uniforms: Float[Tensor, "batch response"], temperature: float) -> Pending:
        """Have responses written by the weights as they stand now, and do not wait."""


@dataclass(frozen=True)
class Request:
    """What a writer is asked."""

    prompts: Prompts
    uniforms: Float[Tensor, "batch response"]
    temperature: float

    def is_same(self, other: Request) -> bool:
        """Whether the same weights would answer both alike."""
        return self.digest == other.digest

    @property
    def digest(self) -> str:
        """sha256 of tokens, uniforms and temperature."""
        parts = (self.prompts.ids, self.prompts.mask, self.uniforms)
        digest = hashlib.sha256(repr([self.temperature, *(tuple(part.shape) for part in parts)]).encode())
        for part in parts:
            digest.update(part.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class _There:
    """Responses that have come."""

    generation: Generation

    def take(self) -> Generation:
        return self.generation


class Ahead:
    """A `Writer` that begins the next update's responses as soon as this one has its own."""

    def __init__(self, writer: Begins) -> None:
        self._writer = writer
        self._begun: tuple[str, Pending] | None = None
        """What was begun, by the digest of its request."""
        self.following: Callable[[Request], Request | None] = _nothing
        """What will be asked after this request; None where that is not known."""

    def write(self, prompts: Prompts, uniforms: Float[Tensor, "batch response"], temperature: float) -> Generation:
        """What was begun for this request, else written now."""
        request = Request(prompts, uniforms, temperature)
        begun, following = self._begun, self.following(request)
        pending = begun[1] if begun is not None and begun[0] == request.digest else self._writer.begin(*_parts(request))
        generation = pending.take()
        if following is not None:
            self._begun = following.digest, self._writer.begin(*_parts(following))
        elif begun is not None and pending is begun[1]:
            self._begun = None
        return generation

    def checkpoint_state(self) -> Mapping[str, object]:
        """What was begun, waited for; without it a resumed run could not write the same."""
        if self._begun is None:
            return {}
        digest, pending = self._begun
        generation = pending.take()
        self._begun = digest, _There(generation)
        tensors = {name: getattr(generation, name).contiguous() for name in _TENSORS}
        origin = generation.origin
        told = {"engine": origin.engine, "staleness": origin.staleness, "version": origin.version}
        return {"request": digest, **told, "responses": base64.b64encode(save(tensors)).decode("ascii")}

    def restore_state(self, state: Mapping[str, object]) -> None:
        """Go on from what `checkpoint_state` gave."""
        if "request" not in state:
            self._begun = None
            return
        tensors = load(base64.b64decode(str(state["responses"])))
        origin = Origin(str(state["engine"]), int(str(state["staleness"])), int(str(state["version"])))
        self._begun = str(state["request"]), _There(Generation(**tensors, origin=origin))


_TENSORS = ("responses", "response_mask", "sampler_logprobs", "finished")


def look_ahead(writer: object, run: Run) -> None:
    """Tell a writer that works ahead what this run will ask of it."""
    if isinstance(writer, Ahead):
        writer.following = lambda request: following(run, request)


def following(run: Run, asked: Request) -> Request | None:
    """What the run asks in its next update, where `asked` is what it asks in this one; None after the last."""
    if run.step + 1 >= run.settings.steps or not asked.is_same(request_of(run, run.step)):
        return None
    return request_of(run, run.step + 1)


def request_of(run: Run, step: int) -> Request:
    """What the run asks in an update, by its knobs as they stand."""
    at = copy.copy(run)
    at.step = step
    prompts = at.prompts.batch(step)
    return Request(prompts, at.uniforms(prompts.keys), at.settings.sampling.temperature)


def _parts(request: Request) -> tuple[Prompts, Tensor, float]:
    return request.prompts, request.uniforms, request.temperature


def _nothing(request: Request) -> None:
    del request
