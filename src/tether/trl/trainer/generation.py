"""Queries → responses: rows of any length, left-padded a chunk at a time, cut where the response ends.

    [q₁, q₂, …] ──pad left──▶ model.generate ──▶ strip padding, cut after the first EOS of the response

A query of shape (1, L) gives a response of shape (1, L'). Knows no trainer. Read next: `ppo_trainer.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tether.errors import InputError, ShapeError


@dataclass(frozen=True)
class Asked:
    """What is asked of a generation, beside the queries."""

    tokenizer: PreTrainedTokenizerBase
    length_sampler: Callable[[], int] | None = None
    return_prompt: bool = True
    remove_padding: bool = True
    pad_to_multiple_of: int | None = None
    options: Mapping[str, Any] | None = None
    """What goes to `model.generate`."""

    def of_chunk(self) -> dict[str, Any]:
        """The options of one chunk: a length drawn for it, and a pad token where nobody named one."""
        options = {"pad_token_id": pad_token(self.tokenizer), **(self.options or {})}
        if self.length_sampler is not None:
            options["max_new_tokens"] = int(self.length_sampler())
        return options

    def stops(self) -> set[int]:
        """Tokens that a response ends with."""
        named = (self.options or {}).get("eos_token_id")
        several = named if isinstance(named, list | tuple) else [named]
        return {int(token) for token in (*several, self.tokenizer.eos_token_id) if token is not None and token >= 0}


@torch.no_grad()
def respond(
    model: nn.Module, queries: Sequence[Tensor], asked: Asked, batch_size: int, device: torch.device
) -> list[Tensor]:
    """One response a query, in order; on the model's device."""
    if not len(queries):
        raise InputError("got no query; wanted at least one")
    rows = [one_row(query, "a query").to(device) for query in queries]
    responses: list[Tensor] = []
    for start in range(0, len(rows), batch_size):
        responses += _chunk(model, rows[start : start + batch_size], asked)
    return [row if query.ndim == 1 else row[None] for row, query in zip(responses, queries, strict=True)]


def _chunk(model: Any, rows: list[Tensor], asked: Asked) -> Iterator[Tensor]:
    options = asked.of_chunk()
    ids, mask = pad_left(rows, options["pad_token_id"], asked.pad_to_multiple_of)
    output = model.generate(input_ids=ids, attention_mask=mask, **options)
    for row, generated in zip(rows, output[:, ids.shape[1] :], strict=True):
        response = cut_at_end(generated, asked.stops()) if asked.remove_padding else generated
        yield torch.cat([row, response]) if asked.return_prompt else response


def cut_at_end(response: Int[Tensor, "tokens"], stops: set[int]) -> Int[Tensor, "cut"]:
    """The response up to its first stop token, which belongs to it.

    >>> cut_at_end(torch.tensor([5, 2, 2, 0]), {2})
    tensor([5, 2])
    """
    ends = torch.isin(response, torch.tensor(sorted(stops), dtype=torch.long, device=response.device)).nonzero()
    return response[: int(ends[0]) + 1] if len(ends) else response


def pad_left(
    rows: Sequence[Int[Tensor, "_"]], pad: int, multiple: int | None = None
) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"]]:
    """Ids and attention mask of the rows, flush right."""
    width = max(map(len, rows))
    width += -width % multiple if multiple else 0
    ids = torch.full((len(rows), width), pad, dtype=torch.long, device=rows[0].device)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        if len(row):
            ids[place, -len(row) :] = row
            mask[place, -len(row) :] = 1
    return ids, mask


def one_row(tokens: Tensor, name: str) -> Int[Tensor, "tokens"]:
    """A row of ids; a batch dimension of one is taken off. Raises ShapeError, a ValueError, for anything else."""
    if tokens.ndim == 2 and tokens.shape[0] == 1:
        return tokens[0]
    if tokens.ndim != 1:
        raise ShapeError(
            f"{name} has shape {list(tokens.shape)}; wanted one row of token ids, [L] or [1, L]; pass several rows as "
            "a list of tensors, without padding"
        )
    return tokens


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """A valid id to fill padding with; it has no meaning, lengths come from masks."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(token) for token in known if token is not None), 0)
