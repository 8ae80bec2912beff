"""Rewards made of others, and a list of scores: each a reward itself, so that they nest.

    WeightedSum   Σ_k w_k·r_k, each part's mean among the metrics
    Ensemble      mean, minimum, or mean − λ·variance of several judges of the same thing, their disagreement among them
    Listed        scores that are known already, found by prompt and response

A part that can read rollouts does so inside a sum too. Read next: `token_rewards.py`, `reward_endpoint.py`, and
`open_reward.py`, which makes rewards of what a YAML file or a caller says.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, TypeAlias, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor

from tether.batch import Prompt, Reward, Rollout, Scores, plain_text
from tether.data_files import DataSource, Row, open_rows
from tether.errors import InputError
from tether.judging import ask, judge
from tether.reward_numbers import numbers_of

Weighted: TypeAlias = tuple[Reward, float]
"""A part of a sum and its weight."""


class Joined(ABC):
    """Several rewards as one; whoever derives from it says how their scores become one."""

    def __init__(self, parts: Mapping[str, Reward]) -> None:
        if not parts:
            raise InputError(f"{type(self).__name__} got no reward; wanted at least one")
        for name, part in parts.items():
            if not callable(part):
                raise InputError(
                    f"{type(self).__name__}'s {name!r} is {part!r}; wanted a reward (as_reward makes one of a path, a "
                    "URL or a classifier)"
                )
        self.parts = dict(parts)

    @abstractmethod
    def join(self, given: Mapping[str, Scores]) -> Scores:
        """What the parts gave, as one."""

    def checkpoint_state(self) -> Mapping[str, object]:
        """Of those parts that have a memory, by name (`snapshot.py:Stateful`)."""
        return {name: part.checkpoint_state() for name, part in self.parts.items() if hasattr(part, "checkpoint_state")}

    def restore_state(self, state: Mapping[str, object]) -> None:
        """The inverse of `checkpoint_state`."""
        for name, part in self.parts.items():
            if name in state and hasattr(part, "restore_state"):
                part.restore_state(state[name])

    def judge_rollout(self, rollout: Rollout) -> Scores:
        """Every part asked about the rollout, in the fullest way that it can answer."""
        return self.join({name: judge(part, rollout) for name, part in self.parts.items()})

    def score_rollout(self, rollout: Rollout) -> list[float]:
        """All that the reward gives to each response of a rollout, as numbers."""
        totals: list[float] = self.judge_rollout(rollout).totals.tolist()
        return totals

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str], **columns: Sequence[object]) -> list[float]:
        """One number a response by texts alone."""
        given = {name: ask(part, prompts, responses, columns) for name, part in self.parts.items()}
        joined = self.join(
            {name: Scores(torch.tensor(numbers, dtype=torch.float64)) for name, numbers in given.items()}
        )
        scores: list[float] = joined.scores.tolist()
        return scores


class WeightedSum(Joined):
    """Σ_k w_k·r_k(x, y), each r_k in its own unit: σ of the reference samples for a reward model trained here.

    Logs `score/part/NAME`, each part's mean before its weight. A weight below 0 makes a cost of a part. Token rewards
    of parts are added on their tokens, by the same weights.
    """

    def __init__(self, parts: Mapping[str, Reward | Weighted]) -> None:
        """`{"quality": (model, 0.7), "brevity": (function, 0.3)}`; a reward without a weight counts once.

        Raises InputError where there is no part, a name is empty or holds a `/`, or a weight is no finite number.
        """
        pairs = {name: part if isinstance(part, tuple) else (part, 1.0) for name, part in parts.items()}
        for name, (_, weight) in pairs.items():
            if not name.strip() or "/" in name:
                raise InputError(f"a part is called {name!r}; wanted a name without `/`, which its metric will carry")
            if not isinstance(weight, int | float) or not math.isfinite(weight):
                raise InputError(f"the weight of {name!r} is {weight!r}; wanted a finite number, as (reward, 0.5)")
        self.weights = {name: float(weight) for name, (_, weight) in pairs.items()}
        super().__init__({name: part for name, (part, _) in pairs.items()})

    def join(self, given: Mapping[str, Scores]) -> Scores:
        metrics: dict[str, float] = {}
        for name, part in given.items():
            metrics |= _under(name, part.metrics) | {f"score/part/{name}": _mean(part.totals)}
        on_tokens = [
            self.weights[name] * part.token_rewards for name, part in given.items() if part.token_rewards is not None
        ]
        scores = sum(self.weights[name] * part.scores for name, part in given.items())
        assert isinstance(scores, Tensor)
        return Scores(scores, metrics, torch.stack(on_tokens).sum(dim=0) if on_tokens else None)


class Ensemble(Joined):
    """Several judges of the same thing as one careful judge; the disagreement is logged as `score/spread`.

    mean       r̄ = (1/M) Σ_m r_m
    min        min_m r_m: a response is as good as its severest judge says
    variance   r̄ − λ·(1/M) Σ_m (r_m − r̄)², λ = `penalty`, in 1/score

    Members should share a unit, as normalised reward models do. Coste et al. 2024.
    """

    def __init__(
        self, members: Sequence[Reward], by: Literal["mean", "min", "variance"] = "mean", penalty: float = 0.1
    ) -> None:
        """Raises InputError where there are fewer than two members, `by` is no rule, or λ is below 0."""
        if len(members) < 2:
            raise InputError(f"an ensemble got {len(members)} member; wanted two or more to compare")
        if by not in ("mean", "min", "variance"):
            raise InputError(f"by is {by!r}; wanted 'mean', 'min' or 'variance'")
        if not (math.isfinite(penalty) and penalty >= 0):
            raise InputError(f"penalty is {penalty}; wanted λ ≥ 0")
        self.by, self.penalty = by, penalty
        super().__init__({str(number): member for number, member in enumerate(members)})

    def join(self, given: Mapping[str, Scores]) -> Scores:
        if any(part.token_rewards is not None for part in given.values()):
            raise InputError("a member of an ensemble gives token rewards; wanted one score a response from each")
        scores = torch.stack([part.scores for part in given.values()])
        return Scores(self._joined(scores), {"score/spread": _mean(scores.std(dim=0, correction=0))})

    def _joined(self, scores: Float[Tensor, "members batch"]) -> Float[Tensor, "batch"]:
        rules: dict[str, Callable[[], Tensor]] = {
            "mean": lambda: scores.mean(dim=0),
            "min": lambda: scores.amin(dim=0),
            "variance": lambda: scores.mean(dim=0) - self.penalty * scores.var(dim=0, correction=0),
        }
        return rules[self.by]()


class Listed:
    """Scores that are known already, looked up by prompt and response.

    For responses that are fixed, such as those of a benchmark or of best-of-n: PPO samples new ones, which no list has.
    """

    def __init__(self, scores: Mapping[tuple[str, str], float] | DataSource) -> None:
        """`{(prompt, response): score}`, or rows with the columns `prompt`, `response` and `score`: a file, a data set,
        a list (`data_files.py`).

        Raises InputError where it cannot be read, a row lacks a column or a pair has two scores; NonFiniteError where a
        score is NaN or infinite.
        """
        self._known: dict[tuple[str, str], float] = {}
        for prompt, response, score in _pairs(scores) if _by_pair(scores) else map(_row, open_rows(scores)):
            if self._known.setdefault((_key(prompt), response), score) != score:
                first = self._known[_key(prompt), response]
                raise InputError(f"the list scores {_shown(prompt, response)} twice: {first:g} and {score:g}")
        self._prompts = {prompt for prompt, _ in self._known}

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str], **columns: Sequence[object]) -> list[float]:
        """The list's score of each pair. Raises InputError where a pair is not in it, naming row and pair."""
        del columns
        pairs = enumerate(zip(prompts, responses, strict=True))
        return [self._find(row, prompt, response) for row, (prompt, response) in pairs]

    def _find(self, row: int, prompt: Prompt, response: str) -> float:
        found = self._known.get((_key(prompt), response))
        if found is not None:
            return found
        known = "another response to this prompt" if _key(prompt) in self._prompts else "nothing to this prompt"
        raise InputError(
            f"the list has {known}: row {row} is {_shown(prompt, response)}, and {len(self._known)} pairs are listed. "
            "A list can score fixed responses only; PPO samples new ones and wants a model or a function"
        )


def _mean(x: Float[Tensor, "batch"]) -> float:
    return float(x.mean()) if len(x) else 0.0


def _under(part: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """A part's own metrics under its name: `score/spread` → `score/spread/PART`, `score/part/x` → `score/part/PART/x`.

    >>> _under("style", {"score/spread": 0.5, "score/part/tone": 1.0})
    {'score/spread/style': 0.5, 'score/part/style/tone': 1.0}
    """
    split = ((name.split("/", 2), number) for name, number in metrics.items())
    return {"/".join([*words[:2], part, *words[2:]]): number for words, number in split}


def _by_pair(scores: Mapping[tuple[str, str], float] | DataSource) -> TypeGuard[Mapping[tuple[str, str], float]]:
    return isinstance(scores, Mapping) and any(isinstance(key, tuple) for key in scores)


def _pairs(scores: Mapping[tuple[str, str], float]) -> Iterator[tuple[Prompt, str, float]]:
    numbers = numbers_of(list(scores.values()), len(scores), "the list of scores")
    for key, number in zip(scores, numbers, strict=True):
        if not (isinstance(key, tuple) and len(key) == 2 and all(isinstance(text, str) for text in key)):
            raise InputError(f"a list of scores has the key {key!r}; wanted (prompt, response)")
        yield *key, number


def _row(row: Row) -> tuple[Prompt, str, float]:
    content = row.content if isinstance(row.content, Mapping) else {}
    missing = [column for column in ("prompt", "response", "score") if column not in content]
    if missing:
        found = ", ".join(content) or "none"
        raise InputError(f"{row.where} lacks {', '.join(missing)}; wanted prompt, response, score; found: {found}")
    prompt, response = content["prompt"], content["response"]
    if not isinstance(response, str) or not isinstance(prompt, str | Sequence):
        raise InputError(f"{row.where} has {response!r:.60} as response to {prompt!r:.60}; wanted texts")
    (number,) = numbers_of([content["score"]], 1, row.where)
    return prompt, response, number


def _key(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else json.dumps([dict(turn) for turn in prompt], sort_keys=True)


def _shown(prompt: Prompt, response: str) -> str:
    return f"({plain_text(prompt)[:60]!r}, {response[:60]!r})"
