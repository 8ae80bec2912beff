"""Hidden states between passes: which of them responses need, and which need not be computed twice.

    gather · lay_out     [batch, total, dim] ↔ one row a real response token ↔ [batch, response]
    parts_of             rows in runs that fit into one pass without gradients
    Heard                a frozen trunk's states from the sampler, for the tokens it drew
    Remembered           the policy's states from the pass before, for the reference's KL

Knows no model. Read next: `models.py`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tether.batch import Closing, Sequences

TOKENS_AT_ONCE = 8192  # padded positions of one forward pass without gradients


@dataclass(frozen=True)
class Heard:
    """The states of a frozen trunk that the sampler went through, and the tokens they belong to."""

    sequences: Sequences
    states: Float[Tensor, "batch room dim"]
    closing: int | None
    """What was read after the responses that were cut; its states stand one place beyond them."""

    def joined_to(self, sequences: Sequences) -> Sequences | None:
        """The sequences with their states, where these are the same tokens; else None."""
        known = self.sequences
        same = (
            torch.equal(known.prompt_lengths, sequences.prompt_lengths)
            and torch.equal(known.response_lengths, sequences.response_lengths)
            and known.ids.shape == sequences.ids.shape
            and torch.equal(known.ids[known.mask], sequences.ids[known.mask])
        )
        if not same:
            return None
        states = self.states[:, : known.ids.shape[1]].clone()
        if self.closing is None:
            return sequences.with_states(states)
        rows = torch.arange(len(known), device=states.device)
        beyond = known.lengths.to(states.device).clamp(max=self.states.shape[1] - 1)
        return sequences.with_states(states, Closing(self.closing, self.states[rows, beyond]))


class Remembered:
    """The policy's states from the pass before, good while neither the sequences nor a weight have changed."""

    def __init__(self) -> None:
        self._sequences: weakref.ref[Sequences] | None = None
        self._versions: list[int] = []
        self._hidden: Tensor | None = None

    def keep(self, sequences: Sequences, weights: Sequence[Tensor], hidden: Tensor) -> None:
        self._sequences, self._hidden = weakref.ref(sequences), hidden
        self._versions = [weight._version for weight in weights]

    def knows(self, sequences: Sequences, weights: Sequence[Tensor]) -> bool:
        """Whether `recall` would give the states."""
        known = self._sequences
        same = known is not None and known() is sequences
        return same and self._versions == [weight._version for weight in weights]

    def recall(self, sequences: Sequences, weights: Sequence[Tensor]) -> Tensor | None:
        """The states kept; None where they are of other sequences or other weights."""
        return self._hidden if self.knows(sequences, weights) else None

    def forget(self) -> None:
        """Give their memory back."""
        self._sequences = self._hidden = None


def gather(sequences: Sequences, hidden: Float[Tensor, "batch total dim"]) -> Float[Tensor, "tokens dim"]:
    """The states one place before each real response token."""
    places = sequences.response_positions - 1 + torch.arange(len(sequences))[:, None] * hidden.shape[1]
    chosen = places[sequences.response_mask].to(hidden.device)
    return hidden.flatten(0, 1).index_select(0, chosen)


def lay_out(flat: Float[Tensor, "tokens"], mask: Bool[Tensor, "batch response"]) -> Float[Tensor, "batch response"]:
    """One number a real token → [batch, response], 0 where masked."""
    empty = torch.zeros(mask.shape, dtype=flat.dtype, device=mask.device)
    return empty.masked_scatter(mask, flat.to(mask.device))


def parts_of(sequences: Sequences) -> Iterator[Sequences]:
    """Runs of rows that fit into one pass without gradients; policy and reference see the same ones."""
    size = max(1, TOKENS_AT_ONCE // sequences.ids.shape[1])
    if size >= len(sequences):
        yield sequences
        return
    for index in torch.split(torch.arange(len(sequences)), size):
        yield sequences.rows(index)
