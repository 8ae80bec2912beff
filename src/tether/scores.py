"""Room 3: responses → one score each, by whatever the user holds to be good.

A reward is any callable `(prompts, responses, **columns) -> one number a response`. It does not know the policy, the
reference or β: the string is put on in room 4.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import torch

from tether.batch import Reward, Rollout, Scores, ScoresRollouts, check_rows
from tether.errors import InputError, NonFiniteError


def score(reward: Reward, rollout: Rollout) -> Scores:
    """One score a response, [batch] float32, in the reward's own unit.

    Raises InputError where the reward gives another number of scores than responses or something that is no number,
    NonFiniteError where one is NaN or infinite; each names the row.
    """
    started = time.perf_counter()
    if isinstance(reward, ScoresRollouts):
        given = reward.score_rollout(rollout)
    else:
        given = reward(rollout.prompts.texts, rollout.texts, **rollout.prompts.columns)
    scores = torch.tensor(_as_numbers(given, len(rollout)), dtype=torch.float32, device=rollout.logprobs.device)
    spread = float(scores.std(correction=0))
    metrics = {
        "score/mean": float(scores.mean()),
        "score/std": spread,
        "score/se": spread / max(len(rollout) - 1, 1) ** 0.5,
        "seconds/score": time.perf_counter() - started,
    }
    return Scores(scores, metrics)


def _as_numbers(given: Iterable[object], wanted: int) -> list[float]:
    try:
        listed = given.tolist() if isinstance(given, torch.Tensor) else list(given)
    except TypeError as error:
        raise InputError(f"the reward gave {type(given).__name__}; wanted a list of {wanted} numbers") from error
    check_rows("the reward", len(listed), wanted)
    return [_as_number(entry, row) for row, entry in enumerate(listed)]


def _as_number(entry: object, row: int) -> float:
    if isinstance(entry, Sequence) and not isinstance(entry, str) and len(entry) == 1:
        entry = entry[0]
    try:
        number = float(entry)  # type: ignore[arg-type]  # numbers, numpy scalars and one-element tensors alike
    except (TypeError, ValueError) as error:
        raise InputError(f"the reward gave {entry!r} for response {row}; wanted one number") from error
    if number - number != 0.0:
        raise NonFiniteError(f"the reward gave {number} for response {row}; wanted a finite number")
    return number
