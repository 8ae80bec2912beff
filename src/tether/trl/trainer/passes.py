"""Queries and responses → one padded batch → log-probabilities, values and masks, over query and response together.

TRL's layout: all results are [batch, T − 1] for rows of T tokens; position t speaks of token t + 1, and the mask is 1
where that token belongs to the response. Models run in eval mode: dropout off. Position ids come from the attention
mask where rows are padded on the left, so that padding never changes a log-probability.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import BatchEncoding, PreTrainedTokenizerBase

from tether.recomputation import recomputing
from tether.trl.core import logprobs_from_logits
from tether.trl.trainer.generation import pad_token

Passes = tuple[Tensor, Tensor | None, Tensor, Tensor]
"""logprobs, logits or None, values, masks."""


class PadRows:
    """Pads rows of ids to one length, on the tokenizer's side; also where the tokenizer has no pad token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __call__(self, rows: Sequence[Mapping[str, Tensor]]) -> BatchEncoding:
        fills = {"input_ids": pad_token(self.tokenizer), "attention_mask": 0}
        side = self.tokenizer.padding_side
        padded = {
            name: torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], True, fill, padding_side=side)
            for name, fill in fills.items()
        }
        return BatchEncoding(padded)


def forward(
    model: nn.Module,
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    model_inputs: Mapping[str, Tensor],
    chunk: int,
    return_logits: bool = False,
    response_masks: Sequence[Tensor] | None = None,
) -> Passes:
    """The passes over a batch, `chunk` rows at a time."""
    model.eval()
    parts: list[Any] = []
    with _forgetting(model):
        for start in range(0, len(queries), chunk):
            rows = slice(start, start + chunk)
            inputs = {name: tensor[rows] for name, tensor in model_inputs.items()}
            logits, _, values = model(**with_positions(model, inputs))
            logprobs = logprobs_from_logits(logits[:, :-1], inputs["input_ids"][:, 1:])
            own = None if response_masks is None else response_masks[rows]
            masks = masks_of(inputs["attention_mask"], queries[rows], responses[rows], own)
            parts.append((logprobs, logits[:, :-1] if return_logits else None, values[:, :-1], masks))
    kept = [torch.cat([part[kind] for part in parts]) for kind in (0, 2, 3)]
    every = torch.cat([part[1] for part in parts]) if return_logits else None
    return kept[0], every, kept[1], kept[2]


def masks_of(
    attention_mask: Int[Tensor, "batch tokens"],
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    response_masks: Sequence[Tensor] | None = None,
) -> Int[Tensor, "batch shifted"]:
    """1 where position t speaks of a response token (t + 1), times the response's own mask where one was given."""
    masks = torch.zeros_like(attention_mask[:, 1:])
    first = attention_mask.argmax(dim=1).tolist()  # of the query: padding on the left comes before it
    for row, (query, response) in enumerate(zip(queries, responses, strict=True)):
        start = first[row] + len(query) - 1
        own = torch.ones_like(response) if response_masks is None else response_masks[row]
        masks[row, start : start + len(response)] = own.to(masks)
    return masks


def with_positions(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs, with position ids where the rows are padded on the left and the model reads positions."""
    mask = inputs["attention_mask"]
    if bool(mask[:, 0].all()) or "position_ids" in inputs or not reads_positions(model):
        return inputs
    return inputs | {"position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)}


def reads_positions(model: Any) -> bool:
    wrapped = getattr(model, "module", model).pretrained_model
    base = wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped
    return "position_ids" in inspect.signature(base.forward).parameters


def _forgetting(model: Any) -> AbstractContextManager[None]:
    """Layers whose gradient checkpointing was switched on keep no activations, where a gradient is taken."""
    return recomputing(model) if torch.is_grad_enabled() else nullcontext()
