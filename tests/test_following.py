"""Whether a policy follows its advantages, and a reward its replies: on numbers written down here."""

from __future__ import annotations

import json
from typing import cast

import pytest
import torch
from torch import Tensor

from rollout_of import rollout_of
from tether.advantages import estimate
from tether.alarms import Alarm
from tether.batch import Evaluation, Generation, Outcome, Policy, Prompts, ReferenceEvaluation, Scores, Sequences
from tether.checks import Tolerance
from tether.config import PPOSettings
from tether.following import REMEMBERED, Following, PromptScores
from tether.rewards import tether

EXACT = Tolerance.of(torch.float32)


class Moved:
    """A policy whose log-probabilities are the rollout's, and a change."""

    def __init__(self, logprobs: Tensor, change: Tensor) -> None:
        self.said = logprobs + change
        """Of the whole rollout, of which the first rows are asked for."""

    def generate(self, prompts: Prompts, uniforms: Tensor, temperature: float) -> Generation:
        raise AssertionError("nothing is written")

    def prepare(self, sequences: Sequences) -> Sequences:
        return sequences

    def evaluate_reference(self, sequences: Sequences, temperature: float) -> ReferenceEvaluation:
        raise AssertionError("the reference is not asked")

    def decode(self, responses: Tensor, mask: Tensor) -> list[str]:
        raise AssertionError("nothing is read")

    def trainable(self) -> dict[str, list[torch.nn.Parameter]]:
        return {"policy": [], "value": []}

    def evaluate(self, sequences: Sequences, temperature: float) -> Evaluation:
        assert temperature == 1.0
        rows, width = sequences.response_mask.shape
        said = self.said[:rows, :width]
        return Evaluation(said, said, said)


def looked(move: str, times: int = 4, rate: float = 1e-4, **metrics: float) -> list[Alarm]:
    """What is said when in each of some updates the policy moves along its advantages, or not."""
    rollout = rollout_of([3, 2, 4, 3, 2, 3, 4, 1, 2, 7])  # the last ones are not looked at, and are longer
    knobs = PPOSettings()
    experience = estimate(
        tether(Scores(torch.tensor([1.0, -0.5, 0.3, 0.0, 2.0, 1.0, -1.0, 0.4, 0.1, 0.9])), rollout, 0.1, knobs.reward),
        rollout,
        knobs.advantage,
    )
    changes = {
        "along": 0.1 * experience.advantages,
        "against": -0.1 * experience.advantages,
        "not": torch.zeros_like(rollout.logprobs),
        "hardly": -1e-6 * experience.advantages,
    }
    policy = cast(Policy, Moved(rollout.logprobs, changes[move]))
    following, alarms = Following(knobs, EXACT), list[Alarm]()
    outcome = Outcome(4, 0, {"ppo/epochs_used": 4.0, "ppo/ratio_max": 0.3} | metrics)
    for _ in range(times):
        alarms += following.check(policy, rollout, experience, outcome, rate)[1]
    return alarms


def test_a_policy_that_follows_is_left_alone() -> None:
    assert looked("along", 20) == []


def test_a_policy_that_goes_the_other_way_is_named() -> None:
    assert {alarm.reason for alarm in looked("against")} == {"wrong_update"}
    assert looked("against", times=2) == []


def test_a_move_below_round_off_says_nothing() -> None:
    assert looked("hardly", 20) == []


def test_few_steps_are_mostly_memory_and_say_nothing() -> None:
    assert looked("against", 20, **{"ppo/epochs_used": 0.0}) == []


@pytest.mark.parametrize(("rate", "names"), [(1e-4, {"policy_still"}), (0.0, set())])
def test_a_policy_that_stands_still_is_named_unless_it_should(rate: float, names: set[str]) -> None:
    assert {alarm.reason for alarm in looked("not", rate=rate)} == names


def test_a_ratio_that_is_always_one_is_named() -> None:
    assert {alarm.reason for alarm in looked("along", **{"ppo/ratio_max": 0.0})} == {"wrong_update"}


def told(scores: list[list[float]], reply: str = "r{update}") -> list[Alarm]:
    """What is said of updates of the same prompts, each with other replies."""
    checked = PromptScores()
    return [
        alarm
        for update, given in enumerate(scores)
        for alarm in checked.check(
            [f"p{row}" for row in range(len(given))], [reply.format(update=update)] * len(given), given
        )
    ]


def test_a_reward_that_reads_the_prompt_alone_is_named() -> None:
    assert {alarm.reason for alarm in told([[0.1 * row for row in range(10)]] * 3)} == {"reward_reads_prompt_only"}


def test_one_reply_with_another_score_settles_it() -> None:
    scores = [[0.1 * row for row in range(10)] for _ in range(3)]
    scores[1][3] = 7.0
    assert told(scores) == []


def test_a_reward_of_few_values_may_repeat_itself() -> None:
    assert told([[float(row % 2) for row in range(10)]] * 5) == []


def test_one_reply_may_have_one_score() -> None:
    assert told([[0.1 * row for row in range(10)]] * 5, reply="the same") == []


def test_what_is_remembered_goes_on_from_its_state() -> None:
    """Eleven pairs before and one after a resume are twelve; a second reading of the same state says the same."""
    prompts, texts = [f"p{i // 2}" for i in range(22)], [f"reply {i}" for i in range(22)]
    first = PromptScores()
    assert not list(first.check(prompts, texts, [float(i // 2) for i in range(22)]))
    again = PromptScores()
    again.restore(json.loads(json.dumps(first.state())))
    assert [alarm.reason for alarm in again.check(["p0"], ["another"], [0.0])] == ["reward_reads_prompt_only"]
    assert not list(PromptScores().check(["p0"], ["another"], [0.0]))


def test_data_without_end_do_not_fill_the_memory() -> None:
    scores = PromptScores()
    count = 2 * REMEMBERED
    assert not list(scores.check([f"p{i}" for i in range(count)], ["one"] * count, [float(i) for i in range(count)]))
    assert len(scores.state()["told"]) == REMEMBERED  # type: ignore[arg-type]
