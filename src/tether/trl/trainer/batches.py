"""What `step` is given, checked, and what it makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tether.errors import InputError, ShapeError
from tether.reward_numbers import numbers_of
from tether.trl.trainer.generation import one_row


@dataclass(frozen=True)
class Batch:
    """One batch between rollout and update; per-token tensors are [batch, T − 1], over query and response."""

    queries: Sequence[Tensor]
    responses: Sequence[Tensor]
    model_inputs: Mapping[str, Tensor]
    scores: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    masks: Tensor
    non_score_reward: Tensor
    kls: Tensor
    advantages: Tensor
    returns: Tensor

    def rows(self, places: Sequence[int]) -> Batch:
        """These rows, in this order."""
        index = torch.tensor(places, device=self.masks.device)
        return Batch(
            [self.queries[place] for place in places],
            [self.responses[place] for place in places],
            {name: tensor[index] for name, tensor in self.model_inputs.items()},
            *(getattr(self, name)[index] for name in list(Batch.__dataclass_fields__)[3:]),
        )


def checked(
    batch_size: int | None,
    queries: list[Tensor],
    responses: list[Tensor],
    scores: list[Tensor],
    masks: list[Tensor] | None,
    device: torch.device,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor] | None]:
    """The arguments of `step` on the device: rows of ids, scores without axes.

    Raises ValueError where they do not fit.
    """
    for name, given in {"queries": queries, "responses": responses, "scores": scores, "response_masks": masks}.items():
        if given is not None:
            _check_list(name, given, batch_size)
    rows = [one_row(query, f"query {place}").to(device) for place, query in enumerate(queries)]
    empty = next((place for place, row in enumerate(rows) if not len(row)), None)
    if empty is not None:
        raise InputError(f"query {empty} is empty, so nothing predicts its response; wanted one token at least (a BOS)")
    answers = [one_row(response, f"response {place}").to(device) for place, response in enumerate(responses)]
    covers = None if masks is None else [_mask(mask, answers[place], place) for place, mask in enumerate(masks)]
    return rows, answers, _scores(scores, device), covers


def _check_list(name: str, given: object, batch_size: int | None) -> None:
    if not isinstance(given, list):
        raise InputError(f"{name} is a {type(given).__name__}; wanted a list of tensors, one a response")
    if batch_size is not None and len(given) != batch_size:
        raise InputError(f"{name} holds {len(given)} entries; wanted config.batch_size = {batch_size}")
    strange = next((entry for entry in given if not isinstance(entry, Tensor)), None)
    if strange is not None:
        raise InputError(f"{name} holds a {type(strange).__name__}; wanted tensors: torch.tensor(…)")


def _mask(mask: Tensor, response: Tensor, place: int) -> Tensor:
    row = one_row(mask, f"response mask {place}")
    if len(row) != len(response):
        raise ShapeError(f"response mask {place} has {len(row)} entries and its response {len(response)} tokens")
    return row.to(response.device)


def _scores(scores: list[Tensor], device: torch.device) -> list[Tensor]:
    """Each score as a float32 without axes."""
    for place, score in enumerate(scores):
        if score.ndim > 1 or score.numel() != 1:
            raise ShapeError(f"score {place} has shape {list(score.shape)}; wanted one number: [] or [1]")
    numbers = numbers_of([float(score.detach()) for score in scores], len(scores), "scores")
    return list(torch.tensor(numbers, device=device).unbind())
