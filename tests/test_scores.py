"""Room 3: whatever the reward is and whatever it gives, one finite number a response, or one clear complaint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rollout_of import rollout_of
from tether.batch import Rollout, Scores
from tether.errors import InputError, NonFiniteError, RewardError
from tether.scores import score
from tolerances import EXACT, ROUND_OFF, assert_close

PROMPTS, RESPONSES = ("p0", "p1", "p2"), ("a", "bb", "ccc")


def rollout(**columns: tuple[object, ...]) -> Rollout:
    """Three responses of 3, 1 and 2 tokens."""
    made = rollout_of([3, 1, 2])
    return replace(made, texts=RESPONSES, prompts=replace(made.prompts, texts=PROMPTS, columns=columns))


def length(prompts: Iterable[str], responses: Iterable[str]) -> list[float]:
    return [float(len(response)) for response in responses]


def giving(given: object) -> Callable[..., object]:
    def reward(prompts: object, responses: object) -> object:
        return given

    return reward


def test_a_function_is_asked_with_prompts_responses_and_columns() -> None:
    seen = []

    def reward(prompts, responses, **columns):
        seen.append((prompts, responses, columns))
        return [1.0, 2.0, 4.0]

    got = score(reward, rollout(answer=("x", "y", "z")))
    assert seen == [(PROMPTS, RESPONSES, {"answer": ("x", "y", "z")})]
    assert got.scores.dtype == torch.float32
    assert got.scores.tolist() == [1.0, 2.0, 4.0]
    assert got.token_rewards is None


def test_the_metrics_are_those_of_the_scores() -> None:
    metrics = dict(score(giving([1.0, 2.0, 6.0]), rollout()).metrics)
    assert metrics.pop("seconds/score") >= 0.0
    spread = math.sqrt((4 + 1 + 9) / 3)
    assert metrics == pytest.approx({"score/mean": 3.0, "score/std": spread, "score/se": spread / math.sqrt(2)})


@pytest.mark.parametrize(
    "given",
    [
        (1, 2.5, True),
        iter([1.0, 2.5, 1.0]),
        np.array([1.0, 2.5, 1.0], dtype=np.float16),
        np.array([[1.0], [2.5], [1.0]]),
        [np.float32(1.0), np.int64(2) + 0.5, np.array(1.0)],
        torch.tensor([1.0, 2.5, 1.0], requires_grad=True),
        torch.tensor([[1.0], [2.5], [1.0]], dtype=torch.bfloat16),
        [torch.tensor(1.0), torch.tensor([2.5]), torch.tensor([[1.0]]).squeeze()],
        [[1.0], (2.5,), 1.0],
        [Decimal("1"), Decimal("2.5"), 1],
        SimpleNamespace(tolist=lambda: [1.0, 2.5, 1.0]),  # as a data frame's column has it
    ],
    ids=lambda given: type(given).__name__,
)
def test_numbers_may_come_in_any_container(given: object) -> None:
    assert score(giving(given), rollout()).scores.tolist() == [1.0, 2.5, 1.0]


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        (None, InputError, r"gave None; wanted a list of 3 numbers: does it end in `return`"),
        (1.5, InputError, r"gave 1\.5; wanted a list of 3 numbers"),
        (torch.tensor(1.5), InputError, "wanted a list of 3 numbers"),
        ("123", InputError, "gave '123'; wanted a list"),
        ({"scores": [1, 2, 3]}, InputError, "gave {'scores'.*wanted a list"),
        ({1.0, 2.0, 3.0}, InputError, "wanted a list"),
        ([1.0, 2.0], InputError, "2 entries for 3 responses"),
        ([1.0, 2.0, 3.0, 4.0], InputError, "4 entries for 3 responses"),
        ([], InputError, "0 entries for 3 responses"),
        ([1.0, None, 2.0], InputError, "gave None for response 1; wanted one number"),
        ([1.0, 2.0, "0.5"], InputError, r"gave '0\.5' for response 2; wanted one number"),
        ([1.0, 2.0, b"1"], InputError, "for response 2"),
        ([1.0, 1j, 2.0], InputError, "for response 1"),
        ([1.0, {"score": 1.0}, 2.0], InputError, "for response 1"),
        ([float("nan"), 1.0, 2.0], NonFiniteError, "gave nan for response 0"),
        ([1.0, 2.0, float("-inf")], NonFiniteError, "gave -inf for response 2"),
        ([1.0, 1e39, 2.0], NonFiniteError, "gave 1e.39 for response 1"),
        ([1.0, 2.0, 10**400], NonFiniteError, "for response 2"),
        (torch.tensor([1.0, float("inf"), 2.0]), NonFiniteError, "for response 1"),
        (np.array([1.0, 2.0, np.nan]), NonFiniteError, "for response 2"),
    ],
)
def test_what_is_no_number_a_response_is_one_complaint_that_names_function_and_row(
    given: object, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said) as caught:
        score(giving(given), rollout())
    assert "the reward function reward gave" in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        [[0.1, 0.2, 0.3], [0.1], [0.1, 0.2]],
        [1.0, [0.1, 0.2], 1.0],
        [1.0, [], 1.0],
        torch.zeros(3, 4),
        np.zeros((3, 4)),
        [torch.zeros(2), torch.zeros(1), torch.zeros(3)],
        [np.zeros(2)] * 3,
    ],
)
def test_a_list_a_response_is_refused_and_told_how_to_be_asked_for(given: object) -> None:
    with pytest.raises(InputError, match=r"wanted one score a response.*TokenRewards\(function\)"):
        score(giving(given), rollout())


def test_a_reward_that_scores_rollouts_is_given_the_rollout() -> None:
    class Reader:
        def __call__(self, prompts, responses, **columns):
            raise AssertionError("asked by texts")

        def score_rollout(self, rollout: Rollout) -> list[float]:
            return rollout.sequences.response_lengths.tolist()

    assert score(Reader(), rollout()).scores.tolist() == [3.0, 1.0, 2.0]

    class Wrong(Reader):
        def score_rollout(self, rollout: Rollout) -> list[float]:
            return [1.0, float("nan"), 2.0]

    with pytest.raises(NonFiniteError, match="the reward Wrong gave nan for response 1"):
        score(Wrong(), rollout())


def test_token_rewards_are_kept_beside_the_scores_and_counted_in_the_metrics() -> None:
    class Judge:
        def __call__(self, prompts, responses, **columns):
            raise AssertionError("asked by texts")

        def judge_rollout(self, rollout: Rollout) -> Scores:
            tokens = torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, 0.0], [0.0, 4.0, 0.0]], dtype=torch.float64)
            return Scores(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), {"score/part/x": 7.0}, tokens)

    got = score(Judge(), rollout())
    assert got.scores.tolist() == [1.0, 2.0, 3.0]
    assert got.token_rewards is not None
    assert got.token_rewards.dtype == torch.float32
    assert got.totals.tolist() == [4.0, 5.0, 7.0]
    assert got.metrics["score/mean"] == pytest.approx(16 / 3)
    assert got.metrics["score/std"] == pytest.approx(math.sqrt(sum((x - 16 / 3) ** 2 for x in (4, 5, 7)) / 3))
    assert got.metrics["score/token_rewards"] == pytest.approx(10 / 3)
    assert got.metrics["score/part/x"] == 7.0


def test_a_function_that_fails_is_one_error_with_its_cause() -> None:
    def reward(prompts, responses):
        return [float(len(r)) / (len(r) - 2) for r in responses]

    with pytest.raises(RewardError, match=r"the reward function reward failed on response 1: ZeroDivisionError") as e:
        score(reward, rollout())
    assert isinstance(e.value.__cause__, ZeroDivisionError)
    assert "Prompt: 'p1' Response: 'bb'" in str(e.value)


def test_an_async_function_is_awaited() -> None:
    async def reward(prompts, responses):
        return length(prompts, responses)

    assert_close(score(reward, rollout()).scores, [1.0, 2.0, 3.0], EXACT)


def test_scores_are_rounded_once_to_float32() -> None:
    assert_close(score(giving([0.1, 1e-9, 123456.789]), rollout()).scores, [0.1, 1e-9, 123456.789], ROUND_OFF)
