"""Truncated importance weights: what was drawn from q, counted as if it were drawn from π."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rollout_of import rollout_of
from tether.advantages import estimate
from tether.batch import Evaluation, Generation, Origin, Prompts, ReferenceEvaluation, Sequences
from tether.config import AdvantageSettings, RewardSettings, SamplingSettings
from tether.errors import InputError
from tether.ladder import formulas
from tether.numerics import clipped_policy_loss, truncated_weights
from tether.rewards import tether
from tether.rollouts import sample
from tether.scores import score

MASK = torch.tensor([[True, True, True], [True, False, False]])
NOTHING = float("nan")


class Echo:
    """A policy that says [1, 2], under π = .5 a token, drawn from a q of .1 and of .8."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin

    def generate(self, prompts, uniforms, temperature):
        rows = torch.ones(len(prompts), 2, dtype=torch.bool)
        q = torch.tensor([[0.1, 0.8]]).log().expand(len(prompts), 2)
        tokens = torch.tensor([[1, 2]]).expand(len(prompts), 2)
        return Generation(tokens, rows, q, torch.ones(len(prompts), dtype=torch.bool), self.origin)

    def prepare(self, sequences: Sequences) -> Sequences:
        return sequences

    def evaluate(self, sequences, temperature):
        half = torch.full((len(sequences), 2), 0.5).log()
        return Evaluation(half, torch.zeros_like(half), torch.zeros_like(half))

    def evaluate_reference(self, sequences, temperature):
        half = torch.full((len(sequences), 2), 0.5).log()
        return ReferenceEvaluation(half, torch.zeros_like(half))

    def decode(self, responses, mask):
        return ["said"] * len(responses)

    def trainable(self):
        return {}


def one_rollout(origin: Origin, cap: float | None = 2.0):
    prompts = Prompts(torch.ones(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool), ("?",), (0,))
    return sample(Echo(origin), prompts, torch.zeros(1, 2), SamplingSettings(importance_cap=cap))


def test_a_weight_is_the_ratio_up_to_the_cap_and_nothing_where_masked():
    policy = torch.tensor([[0.5, 0.1, 0.3], [0.9, NOTHING, NOTHING]]).log()
    sampler = torch.tensor([[0.1, 0.2, 0.3], [0.6, NOTHING, NOTHING]]).log()
    wanted = torch.tensor([[2.0, 0.5, 1.0], [1.5, 0.0, 0.0]])
    assert torch.allclose(truncated_weights(policy, sampler, MASK, 2.0), wanted, atol=1e-6)


def test_weights_are_those_of_the_standard_library() -> None:
    policy, sampler = [[-0.3, -2.0, -1.0], [-0.5, NOTHING, NOTHING]], [[-1.9, -1.0, -1.1], [-0.4, NOTHING, NOTHING]]
    wanted = formulas.truncated_weights(policy, sampler, MASK.tolist(), cap=1.5)
    given = truncated_weights(torch.tensor(policy), torch.tensor(sampler), MASK, cap=1.5)
    assert torch.allclose(given, torch.tensor(wanted), atol=1e-6)


def test_a_cap_of_nothing_is_refused():
    with pytest.raises(InputError, match=r"cap is 0.0; wanted a number above 0"):
        truncated_weights(torch.zeros(2, 3), torch.zeros(2, 3), MASK, 0.0)


def test_uncapped_weights_turn_a_mean_over_q_into_one_over_the_policy():
    q, policy = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    worth = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    tokens = torch.arange(3)[None]
    weights = truncated_weights(policy.log()[tokens], q.log()[tokens], torch.ones(1, 3, dtype=torch.bool), 1e9)
    assert float((q * weights[0] * worth).sum()) == pytest.approx(float((policy * worth).sum()), abs=1e-12)


def test_a_weight_scales_loss_and_gradient_of_its_token_alone():
    logprobs = torch.zeros(2, 3, requires_grad=True)
    advantages = torch.tensor([[1.0, -2.0, 3.0], [4.0, NOTHING, NOTHING]])
    weights = torch.tensor([[2.0, 0.5, 1.0], [0.0, NOTHING, NOTHING]])
    loss = clipped_policy_loss(logprobs, torch.zeros(2, 3), advantages, MASK, weights=weights)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(-(2.0 * 1.0 - 0.5 * 2.0 + 3.0) / 4)
    assert torch.allclose(logprobs.grad, torch.tensor([[-2.0, 1.0, -3.0], [0.0, 0.0, 0.0]]) / 4)


@pytest.mark.parametrize("origin", [Origin("other"), Origin("tether", staleness=1)])
def test_responses_of_another_engine_or_of_older_weights_are_weighted(origin):
    assert torch.allclose(one_rollout(origin).weights, torch.tensor([[2.0, 0.625]]))


def test_responses_of_the_policy_itself_are_not_weighted():
    assert one_rollout(Origin()).weights is None
    assert one_rollout(Origin("other"), cap=None).weights is None


def test_weights_go_with_their_rows_into_the_update():
    rollout = rollout_of([3, 1, 2])
    rollout = replace(rollout, weights=torch.arange(9.0).reshape(3, 3))
    rewards = tether(score(lambda prompts, responses: [1.0, 2.0, 3.0], rollout), rollout, 0.1, RewardSettings())
    experience = estimate(rewards, rollout, AdvantageSettings())
    assert torch.equal(experience.rows(torch.tensor([2, 1])).weights, torch.tensor([[6.0, 7.0], [3.0, 4.0]]))
