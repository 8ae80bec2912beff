"""Rewards of single tokens or steps, for who asks for them by name; a score a response is the rule.

    TokenRewards(function)               one number a response token, the EOS that ends it included
    StepRewards(function, tokenizer)     one number a step, a step being what `response.split(separator)` gives

They stand where they are earned, beside −β·KL: Σ_t R_t = Σ_t token reward + score − β·Σ_t ℓ_t. The score on the last
token is 0 unless the reward is part of a `WeightedSum` with others. The rule for responses that were cut before EOS
is of the score alone. Step rewards: Lightman et al. 2024; Uesato et al. 2022.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from tether.batch import Prompt, Rollout, Scores
from tether.errors import InputError
from tether.reward_functions import FunctionReward
from tether.reward_numbers import token_rows_of
from tether.runtime.ranks import here


class _Placed(ABC):
    """A function's numbers, several a response, each at the token where it is earned."""

    def __init__(self, function: Callable[..., object], *, timeout_seconds: float | None = None) -> None:
        self._function = FunctionReward(function, timeout_seconds=timeout_seconds)

    @abstractmethod
    def places(self, ids: Sequence[int], text: str, row: int) -> list[int]:
        """The token at which each number of a response stands."""

    @abstractmethod
    def counts(self, responses: Sequence[str]) -> Sequence[int | None]:
        """How many numbers each response wants, where its text tells."""

    unit: str

    def judge_rollout(self, rollout: Rollout) -> Scores:
        """The numbers at their tokens, [batch, response], and a score of 0."""
        mask = rollout.response_mask
        ids = [row[real].tolist() for row, real in zip(rollout.sequences.responses, mask, strict=True)]
        places = [self.places(tokens, rollout.texts[row], row) for row, tokens in enumerate(ids)]
        columns = {**rollout.prompts.columns, "response_ids": ids}
        given = here().ask_first(lambda: self._function.ask(rollout.prompts.texts, rollout.texts, columns))
        rewards = torch.zeros(mask.shape, dtype=torch.float64)
        rows = token_rows_of(given, [len(wanted) for wanted in places], self.unit, self._function.name)
        for row, (numbers, wanted) in enumerate(zip(rows, places, strict=True)):
            rewards[row].index_add_(0, torch.tensor(wanted), torch.tensor(numbers, dtype=torch.float64))
        return Scores(torch.zeros(len(rollout), dtype=torch.float64), {}, rewards)

    def score_rollout(self, rollout: Rollout) -> list[float]:
        """The sum of each response's numbers."""
        totals: list[float] = self.judge_rollout(rollout).totals.tolist()
        return totals

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str], **columns: Sequence[object]) -> list[float]:
        """The sum of each response's numbers, by texts alone: a function that wants `response_ids` cannot be asked."""
        given = self._function.ask(prompts, responses, columns)
        rows = token_rows_of(given, self.counts(responses), self.unit, self._function.name)
        return [sum(row) for row in rows]


class TokenRewards(_Placed):
    """One number a response token: `(prompts, responses, response_ids) -> list of lists`.

    `response_ids`, the token ids of each response, is a column that every such function may take. The EOS that ends a
    response counts as a token of it.
    """

    unit = "token"

    def places(self, ids: Sequence[int], text: str, row: int) -> list[int]:
        del text, row
        return list(range(len(ids)))

    def counts(self, responses: Sequence[str]) -> Sequence[None]:
        """A text does not tell its tokens."""
        return [None] * len(responses)


class StepRewards(_Placed):
    """One number a step, at the token that completes it; the last step's stands on the response's last token.

    Steps are those of `response.split(separator)`, an empty one included.
    """

    unit = "step"

    def __init__(
        self,
        function: Callable[..., object],
        tokenizer: PreTrainedTokenizerBase,
        separator: str = "\n\n",
        *,
        timeout_seconds: float | None = None,
    ) -> None:
        """`tokenizer` is the policy's. Raises InputError where the separator is empty."""
        super().__init__(function, timeout_seconds=timeout_seconds)
        if not separator:
            raise InputError("the separator of steps is empty; wanted the text that stands between them")
        self.tokenizer, self.separator = tokenizer, separator

    def places(self, ids: Sequence[int], text: str, row: int) -> list[int]:
        """A step is complete at the first token up to which the text holds the separator behind it."""
        if self._separators(ids) != text.count(self.separator):
            raise InputError(
                f"the tokenizer finds other steps in response {row} than its text has; wanted the policy's tokenizer"
            )
        ends = range(1, len(ids) + 1)
        steps = range(1, text.count(self.separator) + 1)
        inner = [bisect_left(ends, step, key=lambda end: self._separators(ids[:end])) for step in steps]
        return [*inner, len(ids) - 1]

    def counts(self, responses: Sequence[str]) -> Sequence[int]:
        return [response.count(self.separator) + 1 for response in responses]

    def _separators(self, ids: Sequence[int]) -> int:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.count(self.separator)
