"""Two critics, one of the score and one of the KL: A = A_r − β·A_KL whatever β is, each critic with returns of its own.

The oracle is the brute-force GAE of score and KL apart; no line of it knows that there is a combined value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

import brute_force
from ragged import rows, unrows
from rollout_of import VOCAB, rollout_of
from tether.advantages import estimate
from tether.batch import KL_UNIT, Evaluation, Experience, Policy, Rollout, Scores, Sequences
from tether.checks import Moment, Tolerance, check_credit
from tether.config import AdvantageSettings, PPOSettings, RewardSettings, RunSettings, UpdateSettings
from tether.errors import ModelError
from tether.models import LanguagePolicy, load_policy
from tether.numerics import entropy, selected_logprobs
from tether.optimiser import Optimiser
from tether.rewards import tether
from tether.update import update
from tiny_models import build, build_tokenizer, ragged_sequences
from tolerances import EXACT, ROUND_OFF, assert_close

LENGTHS = [3, 1, 5, 2]
BETAS = st.sampled_from([0.0, 0.05, 0.7])
UNIT = st.floats(0.0, 1.0)


def two_critics(seed: int) -> Rollout:
    """A rollout whose entropy serves as V_KL."""
    rollout = rollout_of(LENGTHS, seed)
    return replace(rollout, kl_values=rollout.entropy)


def experience_of(rollout: Rollout, beta: float, **knobs: object) -> Experience:
    scores = Scores(torch.arange(len(rollout)).double())
    return estimate(
        tether(scores, rollout, beta, RewardSettings(beta=beta)), rollout, AdvantageSettings.model_validate(knobs)
    )


@given(BETAS, UNIT, UNIT, st.integers(0, 2**16))
def test_advantages_are_those_of_the_score_less_beta_times_those_of_the_kl(
    beta: float, gamma: float, lam: float, seed: int
) -> None:
    rollout = two_critics(seed)
    mask = rollout.response_mask
    assert rollout.kl_values is not None
    logprobs, ref_logprobs, values, kl_values = (
        rows(x, mask) for x in (rollout.logprobs, rollout.ref_logprobs, rollout.values, rollout.kl_values)
    )
    spent = [[p - q for p, q in zip(*pair, strict=True)] for pair in zip(logprobs, ref_logprobs, strict=True)]
    earned = [[0.0] * (length - 1) + [float(row)] for row, length in enumerate(LENGTHS)]
    of_score = unrows(brute_force.advantages(earned, values, gamma, lam), mask)
    of_kl = unrows(brute_force.advantages(spent, kl_values, gamma, lam), mask)
    experience = experience_of(rollout, beta, gamma=gamma, lam=lam, whiten=False)
    assert_close(experience.advantages, of_score - beta * of_kl, EXACT)
    assert_close(experience.returns, unrows(brute_force.returns(earned, values, gamma, lam), mask), EXACT)
    assert experience.kl_returns is not None
    assert_close(experience.kl_returns, unrows(brute_force.returns(spent, kl_values, gamma, lam), mask), EXACT)


def test_the_advantages_follow_a_beta_that_moves_though_no_critic_has_learned_since() -> None:
    """Perfect critics stay perfect on any string: no token is a surprise. One critic alone is stale at another β."""
    rollout = two_critics(seed=3)
    mask = rollout.response_mask
    spent = torch.where(mask, rollout.logprobs - rollout.ref_logprobs, 0.0)
    to_come = spent.flip(1).cumsum(1).flip(1)
    scores = torch.arange(len(rollout)).double()[:, None].expand_as(spent)
    perfect = replace(rollout, values=scores, kl_values=to_come)
    stale = replace(rollout, values=scores - 0.05 * to_come, kl_values=None)
    for beta in (0.05, 0.7):
        assert_close(experience_of(perfect, beta, whiten=False).advantages, torch.zeros_like(spent), EXACT)
    assert_close(experience_of(stale, 0.05, whiten=False).advantages, torch.zeros_like(spent), EXACT)
    assert float(experience_of(stale, 0.7, whiten=False).advantages.abs().max()) > 0.1


@pytest.mark.parametrize("rule", ["bootstrap", "keep"])
def test_the_credit_of_two_critics_is_checked_as_that_of_one(rule: str) -> None:
    rollout = replace(two_critics(seed=1), finished=torch.tensor([True, False, False, True]))
    settings = PPOSettings.model_validate({"reward": {"beta": 0.3, "missing_eos": rule}})
    scores = Scores(torch.arange(len(rollout)).double())
    rewards = tether(scores, rollout, 0.3, settings.reward)
    experience = estimate(rewards, rollout, settings.advantage)
    moment = Moment(0, settings, 0.3, rollout, scores, rewards, experience, Tolerance.of(torch.float32))
    assert list(check_credit(moment)) == []
    forgotten = replace(moment, rollout=replace(rollout, kl_values=None))
    assert [alarm.reason for alarm in check_credit(forgotten)] != []


class TwoValues(nn.Module, Policy):
    """One number for V_r and one for V_KL, the same at every token."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor([0.4, 8.0], dtype=torch.float64))

    def evaluate(self, sequences: Sequences, temperature: float) -> Evaluation:
        shape = sequences.response_mask.shape
        logits = torch.zeros(*shape, VOCAB, dtype=torch.float64)
        logprobs = selected_logprobs(logits, sequences.responses, temperature)
        values, kl_values = (number.expand(shape) for number in self.value.unbind())
        return Evaluation(logprobs, values, entropy(logits, temperature), kl_values)

    def trainable(self) -> Mapping[str, Sequence[nn.Parameter]]:
        return {"value": [self.value]}


@pytest.mark.parametrize("clip_range", [None, 0.2])
def test_the_value_loss_is_that_of_both_critics_the_kls_in_the_scores_unit(clip_range: float | None) -> None:
    experience = replace(experience_of(two_critics(seed=2), 0.05))
    assert experience.old_kl_values is not None
    assert experience.kl_returns is not None
    mask, policy = experience.sequences.response_mask, TwoValues()
    settings = UpdateSettings(epochs=1, minibatches=1, value_clip_range=clip_range, early_stop_kl=None)
    order = torch.arange(len(LENGTHS))[None]
    outcome = update(policy, experience, Optimiser(policy.trainable(), settings), order, settings, policy_frozen=True)

    def loss(value: float, scale: float, old: Tensor, target: Tensor) -> float:
        old_rows, target_rows = (rows(scale * x, mask) for x in (old, target))
        constant = [[scale * value] * length for length in LENGTHS]
        return float(brute_force.value_loss(constant, old_rows, target_rows, clip_range))

    wanted = loss(0.4, 1.0, experience.old_values, experience.returns)
    wanted += loss(8.0, KL_UNIT, experience.old_kl_values, experience.kl_returns)
    assert outcome.metrics["loss/value"] == pytest.approx(wanted, rel=1e-9)
    assert bool((policy.value != torch.tensor([0.4, 8.0])).all())


def language_policy(**options: object) -> LanguagePolicy:
    return load_policy(build("llama"), build_tokenizer(), mode="full", **options)


def test_both_critics_start_at_zero_and_learn_apart() -> None:
    policy, sequences = language_policy(critic="split"), ragged_sequences()
    said = policy.evaluate(sequences, 1.0)
    assert said.kl_values is not None
    assert not said.values.any()
    assert not said.kl_values.any()
    said.kl_values.sum().backward()
    gradient = policy.value.head.linear.weight.grad
    assert gradient is not None
    assert not gradient[0].any()
    assert gradient[1].any()
    with torch.no_grad():
        policy.value.head.linear.bias[1] = 0.5
        kl_values = policy.evaluate(sequences, 1.0).kl_values
    assert kl_values is not None
    assert_close(kl_values[sequences.response_mask], torch.full((int(sequences.response_mask.sum()),), 10.0), ROUND_OFF)


def test_a_saved_pair_of_critics_is_read_again_and_never_as_one(tmp_path: Path) -> None:
    policy = language_policy(critic="split")
    with torch.no_grad():
        policy.value.head.linear.weight.normal_(generator=torch.Generator().manual_seed(0))
    policy.save_pretrained(tmp_path)
    again = language_policy(critic="split", value_source=tmp_path)
    assert torch.equal(again.value.head.linear.weight, policy.value.head.linear.weight)
    with pytest.raises(ModelError, match="the same critic"):
        language_policy(value_source=tmp_path)


@pytest.mark.usefixtures("unchecked_shapes")
def test_unknown_critics_and_whitened_rewards_are_refused() -> None:
    with pytest.raises(ModelError, match="wanted 'single' or 'split'"):
        language_policy(critic="double")
    with pytest.raises(ValidationError, match="critic is split and rewards are whitened"):
        RunSettings.model_validate({"model": {"critic": "split"}, "ppo": {"reward": {"whiten": True}}})
