"""Room 4: what is tethered, what a cut response is worth, and how β moves."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import brute_force
from ragged import Ragged, rows, unrows
from rollout_of import rollout_of
from tether.batch import Rewards, Scores
from tether.config import RewardSettings
from tether.errors import InputError, NonFiniteError, ShapeError
from tether.rewards import AdaptiveBeta, BudgetBeta, FixedBeta, controller, tether
from tolerances import EXACT, assert_close

LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=4)
SCORES = torch.tensor([1.5, -0.5, 2.0], dtype=torch.float64)


def tethered(beta: float = 0.3, finished: list[bool] | None = None, **knobs: object) -> Rewards:
    """The room on three responses of 3, 1 and 2 tokens."""
    return tether(Scores(SCORES), rollout_of([3, 1, 2], finished=finished), beta, RewardSettings(**knobs))


@given(LENGTHS, st.floats(0.0, 2.0), st.integers(0, 2**16))
def test_rewards_are_the_string_at_each_token_and_the_score_at_the_last(
    lengths: list[int], beta: float, seed: int
) -> None:
    rollout, scores = rollout_of(lengths, seed), torch.arange(len(lengths)).double() - 1.0
    mask = rollout.response_mask
    got = tether(Scores(scores), rollout, beta, RewardSettings())
    plain = rows(rollout.logprobs, mask), rows(rollout.ref_logprobs, mask)
    assert_close(got.rewards, unrows(brute_force.tethered_rewards(scores.tolist(), *plain, beta), mask), EXACT)
    assert torch.equal(got.scores, scores)
    assert got.beta == beta


def test_the_metrics_of_the_rewards_are_their_sums() -> None:
    rollout, metrics = rollout_of([3, 1, 2]), tethered(0.3).metrics
    kl = torch.where(rollout.response_mask, rollout.logprobs - rollout.ref_logprobs, 0.0).sum(dim=1)
    wanted = {
        "beta": 0.3,
        "reward/mean": float((SCORES - 0.3 * kl).mean()),
        "reward/non_score": float((-0.3 * kl).mean()),
        "objective/tethered": float((SCORES - 0.3 * kl).mean()),
    }
    assert metrics == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        ("replace", [1.5, -2.0, -2.0]),
        ("subtract", [1.5, -2.5, 0.0]),
        ("zero", [1.5, 0.0, 0.0]),
        ("keep", [1.5, -0.5, 2.0]),
    ],
)
def test_a_response_that_was_cut_is_scored_by_the_rule(rule: str, wanted: list[float]) -> None:
    for penalty in (-2.0, 2.0) if rule == "subtract" else (-2.0,):
        got = tethered(finished=[True, False, False], missing_eos=rule, missing_eos_score=penalty)
        assert got.scores.tolist() == wanted
        assert_close(
            got.rewards.sum(dim=1) - tethered(missing_eos="keep").rewards.sum(dim=1), got.scores - SCORES, EXACT
        )


def test_a_cut_response_may_be_worth_the_value_before_its_last_token() -> None:
    values = rollout_of([3, 1, 2]).values
    got = tethered(finished=[False, True, False], missing_eos="bootstrap")
    assert got.scores.tolist() == [values[0, 2], SCORES[1], values[2, 1]]


def test_a_missing_end_is_replaced_by_minus_one_unless_told() -> None:
    assert tethered(finished=[True, False, True]).scores.tolist() == [1.5, -1.0, 2.0]


def test_the_tethered_objective_is_that_of_the_scores_as_given() -> None:
    cut, whole = tethered(finished=[False] * 3, missing_eos="zero"), tethered()
    assert cut.metrics["objective/tethered"] == whole.metrics["objective/tethered"]
    assert cut.metrics["reward/non_score"] == pytest.approx(whole.metrics["reward/non_score"], abs=1e-12)


def test_rewards_may_be_whitened_and_keep_their_mean() -> None:
    plain, mask = tethered().rewards, rollout_of([3, 1, 2]).response_mask
    whitened = tethered(whiten=True)
    assert_close(whitened.rewards, unrows(brute_force.whiten(rows(plain, mask), False), mask), EXACT)
    assert whitened.metrics == tethered().metrics
    assert torch.equal(tethered(whiten=False).rewards, tethered().rewards)


# ── a reward's own token rewards ────────────────────────────────────────────────────────────────────────────────────
@given(LENGTHS, st.floats(0.0, 2.0), st.integers(0, 2**16))
def test_token_rewards_are_added_on_their_tokens_and_nothing_else_changes(
    lengths: list[int], beta: float, seed: int
) -> None:
    rollout, scores = rollout_of(lengths, seed), torch.arange(len(lengths)).double() - 1.0
    mask = rollout.response_mask
    tokens = Ragged(mask, seed).numbers("token rewards")  # NaN and infinities where masked
    got = tether(Scores(scores, token_rewards=tokens), rollout, beta, RewardSettings())
    plain = rows(rollout.logprobs, mask), rows(rollout.ref_logprobs, mask)
    wanted = brute_force.tethered_rewards(scores.tolist(), *plain, beta)
    for row, extra in enumerate(rows(tokens, mask)):
        for place, number in enumerate(extra):
            wanted[row][place] += number
        kl = sum(p - r for p, r in zip(plain[0][row], plain[1][row], strict=True))
        assert float(got.rewards[row].sum()) == pytest.approx(
            sum(extra) + float(scores[row]) - beta * kl, rel=1e-9, abs=1e-9
        )
    assert_close(got.rewards, unrows(wanted, mask), EXACT)
    assert torch.equal(got.scores, scores)
    assert got.token_rewards is not None
    assert_close(got.token_rewards, unrows(rows(tokens, mask), mask), EXACT)


def test_the_metrics_count_token_rewards_as_earned_and_not_as_the_strings() -> None:
    tokens = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0], [5.0, 6.0, 0.0]], dtype=torch.float64)
    rollout, plain = rollout_of([3, 1, 2], finished=[True, False, True]), tethered(finished=[True, False, True])
    got = tether(Scores(SCORES, token_rewards=tokens), rollout, 0.3, RewardSettings()).metrics
    earned = 21.0 / 3
    assert got["reward/mean"] == pytest.approx(plain.metrics["reward/mean"] + earned)
    assert got["reward/non_score"] == pytest.approx(plain.metrics["reward/non_score"])
    assert got["objective/tethered"] == pytest.approx(plain.metrics["objective/tethered"] + earned)


def test_a_response_that_was_cut_keeps_its_token_rewards() -> None:
    tokens = torch.ones(3, 3, dtype=torch.float64)
    rollout = rollout_of([3, 1, 2], finished=[False] * 3)
    got = tether(Scores(SCORES, token_rewards=tokens), rollout, 0.0, RewardSettings(missing_eos="zero"))
    assert got.rewards.sum(dim=1).tolist() == [3.0, 1.0, 2.0]
    assert tethered(0.0).token_rewards is None


def test_all_that_a_response_earned_is_its_score_and_its_token_rewards() -> None:
    tokens = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    assert Scores(torch.tensor([10.0, 20.0]), token_rewards=tokens).totals.tolist() == [13.0, 23.0]
    assert Scores(torch.tensor([10.0, 20.0])).totals.tolist() == [10.0, 20.0]


@pytest.mark.parametrize(
    ("tokens", "error", "said"),
    [
        (torch.zeros(1, 3), ShapeError, r"\[1, 3\] and the responses \[1, 2\]"),
        (torch.tensor([[0.0, math.nan]]), NonFiniteError, "token reward is NaN"),
    ],
    ids=["shape", "NaN"],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_token_rewards_that_do_not_fit_are_refused(tokens: Tensor, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        tether(Scores(torch.zeros(1), token_rewards=tokens), rollout_of([2]), 0.1, RewardSettings())


@pytest.mark.parametrize(("score", "beta", "error"), [(math.nan, 0.1, NonFiniteError), (0.0, -0.1, InputError)])
def test_what_cannot_be_tethered_is_refused(score: float, beta: float, error: type[Exception]) -> None:
    with pytest.raises(error):
        tether(Scores(torch.tensor([score])), rollout_of([2]), beta, RewardSettings())


# ── the hands that hold the string ──────────────────────────────────────────────────────────────────────────────────
def test_a_fixed_string_stays() -> None:
    assert FixedBeta(0.05).after(kl=100.0, episodes=64) == FixedBeta(0.05)


@pytest.mark.parametrize(
    ("kl", "factor"),
    [(6.0, 1.0), (6.6, 1.0 + 0.1 * 0.5), (5.4, 1.0 - 0.1 * 0.5), (60.0, 1.0 + 0.2 * 0.5), (0.0, 1.0 - 0.2 * 0.5)],
)
def test_the_adaptive_string_answers_to_the_relative_error_clipped_to_a_fifth(kl: float, factor: float) -> None:
    moved = AdaptiveBeta(0.1, target=6.0, horizon=1000).after(kl, episodes=500)
    assert moved.value == pytest.approx(0.1 * factor, rel=1e-12)
    assert (moved.target, moved.horizon) == (6.0, 1000)


def test_at_the_published_horizon_the_adaptive_string_doubles_in_68_updates_of_512() -> None:
    beta = AdaptiveBeta(0.1, target=6.0, horizon=10_000)
    for _ in range(68):
        beta = beta.after(kl=1e9, episodes=512)
    assert beta.value == pytest.approx(0.2, rel=1e-3)


@pytest.mark.parametrize(("kl", "exponent"), [(6.0, 0.0), (9.0, 0.25), (3.0, -0.25), (100.0, 0.5), (0.0, -0.5)])
def test_the_budget_string_climbs_on_the_logarithm_of_beta(kl: float, exponent: float) -> None:
    moved = BudgetBeta(0.1, budget=6.0, horizon=1000).after(kl, episodes=500)
    assert moved.value == pytest.approx(0.1 * math.exp(exponent), rel=1e-12)


def test_the_budget_string_stays_within_its_bounds() -> None:
    assert BudgetBeta(9.9, budget=6.0, horizon=1).after(100.0, episodes=500).value == 10.0
    assert BudgetBeta(2e-4, budget=6.0, horizon=1).after(0.0, episodes=500).value == 1e-4
    assert BudgetBeta(0.0, budget=6.0, horizon=1000).after(6.0, episodes=500).value == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("fixed", FixedBeta(0.2)), ("adaptive", AdaptiveBeta(0.2, 5.0, 900)), ("budget", BudgetBeta(0.2, 5.0, 900))],
)
def test_the_settings_choose_the_hand(name: str, wanted: object) -> None:
    assert controller(RewardSettings(controller=name, beta=0.2, target_kl=5.0, horizon=900)) == wanted
