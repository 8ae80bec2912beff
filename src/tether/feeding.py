"""Text that a model reads on: prompts first, then one token a row after the other.

    CachedText   keys and values of what was read are kept; each distinct prompt is read once
    WholeText    everything is read again at every step: for models whose cache tether does not understand

Both give, for each row, the final hidden state of its last token, from which the next is predicted. A `Recorder` keeps
on the way what one layer received, so that a frozen trunk need not run again. Knows no head and draws nothing. Read
next: `decode.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from tether.attention import roomy_cache
from tether.trunk import agree, run_backbone


@runtime_checkable
class Text(Protocol):
    """Rows of text in the middle of being written."""

    hidden: Float[Tensor, "rows dim"]
    """Final states of each row's last token."""

    def feed(self, tokens: Int[Tensor, "rows"]) -> None:
        """Read one more token a row."""

    def keep(self, rows: Int[Tensor, "rows_left"]) -> None:
        """Go on with these rows alone."""


class Recorder:
    """Keeps what one layer receives while text is read, laid out as `Sequences`: the states of a frozen trunk."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self._inputs: Tensor | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        hook = self._layer.register_forward_pre_hook(self._note, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
            self._inputs = None

    def start(self, mask: Bool[Tensor, "batch prompt"], inverse: Int[Tensor, "batch"], width: int) -> None:
        """Lay out the states of the prompts just read, with room for `width` tokens more."""
        prompts = self._take()[inverse]
        self.states = prompts.new_zeros(len(mask), mask.shape[1] + width, prompts.shape[2])
        places = torch.arange(self.states.shape[1], device=mask.device) < mask.sum(dim=1, keepdim=True)
        self.states[places] = prompts[mask]

    def add(self, rows: Int[Tensor, "rows"], positions: Int[Tensor, "rows"]) -> None:
        """Put the states of the tokens just fed in their places."""
        self.states[rows, positions] = self._take()[:, 0]

    def _note(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inputs = args[0] if args else kwargs["hidden_states"]

    def _take(self) -> Tensor:
        assert self._inputs is not None, "the recorded layer did not run"
        return self._inputs


class CachedText:
    """Left-padded prompts and what follows, in a cache with room for it; position ids come from the mask."""

    def __init__(
        self,
        backbone: PreTrainedModel,
        ids: Int[Tensor, "batch prompt"],
        mask: Bool[Tensor, "batch prompt"],
        width: int,
        recorder: Recorder | None = None,
    ) -> None:
        self._backbone, self._recorder = backbone, recorder
        self._takes_positions = "position_ids" in inspect.signature(backbone.forward).parameters
        self._cache = roomy_cache(backbone.config, ids.shape[1] + width)
        self._padded = not bool(mask.all())  # without padding no mask is needed
        self._mask = F.pad(mask, (0, width), value=True)
        self._seen = ids.shape[1]
        self._rows = torch.arange(len(ids), device=ids.device)
        self._next_positions = mask.sum(dim=1)
        self._read_prompts(ids, mask, width)

    def feed(self, tokens: Int[Tensor, "rows"]) -> None:
        self._seen += 1
        mask = self._mask[:, : self._seen] if self._padded else None
        self.hidden = self._forward(tokens.unsqueeze(1), mask, self._next_positions.unsqueeze(1))[:, 0]
        if self._recorder is not None:
            self._recorder.add(self._rows, self._next_positions)
        self._next_positions = self._next_positions + 1

    def keep(self, rows: Int[Tensor, "rows_left"]) -> None:
        self._cache.reorder_cache(rows)
        self.hidden = self.hidden[rows]
        self._mask, self._rows, self._next_positions = self._mask[rows], self._rows[rows], self._next_positions[rows]

    def _read_prompts(self, ids: Tensor, mask: Tensor, width: int) -> None:
        """Each distinct prompt once; then one row a response, several rows sharing a prompt's cache by copy."""
        distinct, inverse = torch.unique(torch.where(mask, ids, -1), dim=0, return_inverse=True)
        real = distinct >= 0
        positions = (real.cumsum(dim=1) - 1).clamp(min=0)
        hidden = self._forward(distinct.clamp(min=0), real if self._padded else None, positions)[:, -1]
        self._cache.reorder_cache(inverse)
        self.hidden = hidden[inverse]
        if self._recorder is not None:
            self._recorder.start(mask, inverse, width)

    def _forward(self, ids: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        extra = {"position_ids": positions} if self._takes_positions else {}
        hidden: Tensor = self._backbone(
            input_ids=ids, attention_mask=mask, past_key_values=self._cache, use_cache=True, **extra
        ).last_hidden_state
        return hidden


class WholeText:
    """The same without a cache, right-padded: right for every causal model, and slow."""

    def __init__(
        self,
        backbone: PreTrainedModel,
        ids: Int[Tensor, "batch prompt"],
        mask: Bool[Tensor, "batch prompt"],
        width: int,
    ) -> None:
        self._backbone = backbone
        self.hidden: Tensor
        self._lengths = mask.sum(dim=1)
        self._ids = ids.new_zeros(len(ids), ids.shape[1] + width)
        self._ids[torch.arange(self._ids.shape[1], device=ids.device) < self._lengths[:, None]] = ids[mask]
        self._read()

    def feed(self, tokens: Int[Tensor, "rows"]) -> None:
        self._ids[torch.arange(len(tokens), device=tokens.device), self._lengths] = tokens
        self._lengths = self._lengths + 1
        self._read()

    def keep(self, rows: Int[Tensor, "rows_left"]) -> None:
        self._ids, self._lengths, self.hidden = self._ids[rows], self._lengths[rows], self.hidden[rows]

    def _read(self) -> None:
        hidden = run_backbone(self._backbone, self._ids[:, : int(self._lengths.max())])
        self.hidden = hidden[torch.arange(len(hidden), device=hidden.device), self._lengths - 1]


@torch.inference_mode()
def understands_cache(backbone: PreTrainedModel, ids: Int[Tensor, "1 total"], tolerance: float) -> bool:
    """Whether a step through the cache, after a padded and an unpadded prompt, gives the states of one whole pass."""
    length = ids.shape[1] - 2
    prompts = torch.stack([F.pad(ids[0, : length - 1], (1, 0)), ids[0, :length]])
    mask = torch.ones_like(prompts, dtype=torch.bool)
    mask[0, 0] = False
    whole = run_backbone(backbone, ids)[0, length - 1 : length + 1]
    try:
        text = CachedText(backbone, prompts, mask, width=1)
        text.feed(ids[0, length - 1 : length + 1])
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError):
        return False  # whatever the library raises, it says that this model reads otherwise
    return agree(text.hidden, whole, tolerance)


def listening(recorder: Recorder | None) -> Any:
    """`recorder.listening()`, or nothing."""
    return nullcontext() if recorder is None else recorder.listening()
