"""Room 5: surprises, what they are measured against, and what is whitened."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import brute_force
from ragged import rows, unrows
from rollout_of import rollout_of
from tether.advantages import estimate
from tether.batch import Experience, Rewards
from tether.config import AdvantageSettings
from tolerances import EXACT, assert_close

LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=4)
UNIT = st.floats(0.0, 1.0)


def estimated(lengths: list[int], seed: int, **knobs: object) -> tuple[Experience, brute_force.Rows, brute_force.Rows]:
    """The room's answer, and the rewards and values as plain rows; the rollout's entropy serves as rewards."""
    rollout = rollout_of(lengths, seed)
    rewards = Rewards(rollout.entropy, torch.zeros(len(lengths)), 0.1, {})
    mask = rollout.response_mask
    return (
        estimate(rewards, rollout, AdvantageSettings(**knobs)),
        rows(rollout.entropy, mask),
        rows(rollout.values, mask),
    )


@given(LENGTHS, UNIT, UNIT, st.integers(0, 2**16))
def test_advantages_and_returns_are_the_discounted_sums_of_surprises(
    lengths: list[int], gamma: float, lam: float, seed: int
) -> None:
    experience, rewards, values = estimated(lengths, seed, gamma=gamma, lam=lam, whiten=False)
    mask = experience.sequences.response_mask
    assert_close(experience.advantages, unrows(brute_force.advantages(rewards, values, gamma, lam), mask), EXACT)
    assert_close(experience.returns, unrows(brute_force.returns(rewards, values, gamma, lam), mask), EXACT)


@given(LENGTHS.filter(lambda lengths: sum(lengths) > 1), st.integers(0, 2**16))
def test_advantages_are_whitened_over_the_batch_and_returns_never(lengths: list[int], seed: int) -> None:
    experience, rewards, values = estimated(lengths, seed)
    mask = experience.sequences.response_mask
    surprises = brute_force.advantages(rewards, values, 1.0, 0.95)
    assert_close(experience.advantages, unrows(brute_force.whiten(surprises, True), mask), EXACT)
    assert_close(experience.returns, unrows(brute_force.returns(rewards, values, 1.0, 0.95), mask), EXACT)


def test_the_metrics_speak_of_surprises_before_whitening() -> None:
    experience, rewards, values = estimated([3, 1, 2], seed=5, gamma=0.9, lam=0.8)
    surprises, returns = (f(rewards, values, 0.9, 0.8) for f in (brute_force.advantages, brute_force.returns))
    wanted = {
        "advantage/mean": brute_force.mean(surprises),
        "advantage/std": brute_force.variance(surprises) ** 0.5,
        "returns/mean": brute_force.mean(returns),
        "returns/std": brute_force.variance(returns) ** 0.5,
        "value/mean": brute_force.mean(values),
        "value/explained_variance": brute_force.explained_variance(values, returns),
    }
    assert experience.metrics == pytest.approx(wanted, rel=1e-9)


def test_the_update_is_given_the_old_policy_and_the_old_values() -> None:
    rollout = rollout_of([3, 1, 2])
    experience = estimate(Rewards(rollout.entropy, torch.zeros(3), 0.1, {}), rollout, AdvantageSettings())
    assert experience.old_logprobs is rollout.logprobs
    assert experience.old_values is rollout.values
    assert experience.sequences is rollout.sequences
