"""Every function of `tether.numerics` against loops over plain numbers, in value and in gradient.

The batches are ragged, padded on either side or with holes, and every masked place holds NaN, an infinity or 1e30;
the loops of `brute_force` see the real tokens only. Gradients are compared for every tensor argument.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import brute_force
from brute_force import Number, Rows, slopes
from ragged import Ragged, ragged_batches, rows, unrows
from tether import numerics
from tolerances import EXACT, assert_close

BATCHES = ragged_batches()
BETAS = st.floats(0.0, 2.0)
UNIT = st.floats(0.0, 1.0)
CLIP_RANGES = st.floats(0.01, 0.9)
TEMPERATURES = st.floats(0.2, 3.0)


def assert_matches(
    function: Callable[..., Tensor], loop: Callable[..., Number], arguments: list[Tensor], mask: Tensor
) -> None:
    """function(tensors) = loop(rows), and the gradients for each argument agree; they are 0 where masked."""
    leaves = [argument.clone().requires_grad_() for argument in arguments]
    got = function(*leaves)
    got.backward()
    plain = [rows(argument, mask) for argument in arguments]
    assert_close(got, brute_force.real(loop(*plain)), EXACT)
    for which, leaf in enumerate(leaves):
        gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        assert_close(gradient, unrows(slopes(loop, plain, which), mask), EXACT)


def assert_rows_match(
    function: Callable[..., Tensor], loop: Callable[..., Rows], arguments: list[Tensor], batch: Ragged
) -> None:
    """The same for a result of one number a token: all of its values, and the gradient of a random weighted sum."""
    mask, weights = batch.mask, batch.numbers("weights").where(batch.mask, 0.0)
    wanted = loop(*[rows(argument, mask) for argument in arguments])
    assert_close(function(*arguments), unrows(wanted, mask), EXACT)
    weight_rows = rows(weights, mask)
    assert_matches(
        lambda *tensors: (weights * function(*tensors)).sum(),
        lambda *plain: brute_force.dot(weight_rows, loop(*plain)),
        arguments,
        mask,
    )


# ── §1 means under a mask ───────────────────────────────────────────────────────────────────────────────────────────
@given(BATCHES)
def test_masked_mean_is_the_mean_over_real_tokens(batch: Ragged) -> None:
    mask = batch.mask
    assert_matches(lambda x: numerics.masked_mean(x, mask), brute_force.mean, [batch.numbers("x")], mask)


@given(BATCHES, st.floats(0.5, 100.0))
def test_a_denominator_replaces_the_number_of_tokens(batch: Ragged, denominator: float) -> None:
    x, mask = batch.numbers("x"), batch.mask
    assert_matches(
        lambda x: numerics.masked_mean(x, mask, denominator=denominator),
        lambda x: sum(brute_force.flat(x)) / denominator,
        [x],
        mask,
    )
    as_tensor = numerics.masked_mean(x, mask, denominator=torch.tensor(denominator, dtype=torch.float64))
    assert_close(as_tensor, sum(brute_force.flat(rows(x, mask))) / denominator, EXACT)


@pytest.mark.parametrize("shift_mean", [True, False])
@given(batch=BATCHES)
def test_whitening_divides_by_the_biased_deviation_of_the_real_tokens(shift_mean: bool, batch: Ragged) -> None:
    mask = batch.mask
    x = torch.where(mask.sum() > 1, batch.numbers("x") * 3.0 + 5.0, batch.numbers("x"))
    assert_rows_match(
        lambda x: numerics.masked_whiten(x, mask, shift_mean=shift_mean),
        lambda x: brute_force.whiten(x, shift_mean),
        [x],
        batch,
    )


# ── §2 what the policy says, §3 how far it has drifted ──────────────────────────────────────────────────────────────
def logits_of(batch: Ragged, name: str, vocab: int = 4) -> Tensor:
    """`[batch, response, vocab]`, finite everywhere: these functions take no mask."""
    return torch.stack([batch.numbers(f"{name}{v}", spread=2.0).where(batch.mask, 0.5 * v) for v in range(vocab)], -1)


def assert_states_match(
    function: Callable[..., Tensor], loop: Callable[..., Number], arguments: list[Tensor], places: list[tuple[int, int]]
) -> None:
    """At each state the value agrees, and so does its gradient with respect to the state's own logits."""
    leaves = [argument.clone().requires_grad_() for argument in arguments]
    result = function(*leaves)
    result.sum().backward()
    for row, column in places:
        plain = [[argument[row, column].tolist()] for argument in arguments]

        def state_loop(*one_row: Rows, here: tuple[int, int] = (row, column)) -> Number:
            return loop(here, *[entries[0] for entries in one_row])

        assert_close(result[row, column], brute_force.real(state_loop(*plain)), EXACT)
        for which, leaf in enumerate(leaves):
            assert_close(leaf.grad[row, column], slopes(state_loop, plain, which)[0], EXACT)


def every_place(batch: Ragged) -> list[tuple[int, int]]:
    return [(b, t) for b in range(batch.mask.shape[0]) for t in range(batch.mask.shape[1])]


@given(ragged_batches(max_batch=2, max_response=3), TEMPERATURES)
def test_selected_logprobs_are_the_log_of_the_chosen_probability(batch: Ragged, temperature: float) -> None:
    tokens = torch.randint(4, batch.mask.shape, generator=torch.Generator().manual_seed(batch.seed))
    assert_states_match(
        lambda logits: numerics.selected_logprobs(logits, tokens, temperature),
        lambda here, logits: brute_force.logprob(logits, int(tokens[here]), temperature),
        [logits_of(batch, "z")],
        every_place(batch),
    )


@given(ragged_batches(max_batch=2, max_response=3), TEMPERATURES)
def test_entropy_is_minus_the_expected_log_probability(batch: Ragged, temperature: float) -> None:
    assert_states_match(
        lambda logits: numerics.entropy(logits, temperature),
        lambda _, logits: brute_force.entropy(logits, temperature),
        [logits_of(batch, "z")],
        every_place(batch),
    )


@given(ragged_batches(max_batch=2, max_response=3), TEMPERATURES)
def test_full_kl_is_the_sum_over_the_whole_vocabulary(batch: Ragged, temperature: float) -> None:
    assert_states_match(
        lambda logits, ref_logits: numerics.full_kl(logits, ref_logits, temperature),
        lambda _, logits, ref_logits: brute_force.full_kl(logits, ref_logits, temperature),
        [logits_of(batch, "policy"), logits_of(batch, "reference")],
        every_place(batch),
    )


@pytest.mark.parametrize("form", ["k1", "k2", "k3"])
@given(batch=BATCHES)
def test_the_kl_estimators_are_their_formulas(form: str, batch: Ragged) -> None:
    mask = batch.mask
    estimator, one_token = getattr(numerics, f"kl_{form}"), getattr(brute_force, form)

    def loop(logprobs: Rows, ref_logprobs: Rows) -> Rows:
        pairs = zip(logprobs, ref_logprobs, strict=True)
        return [[one_token(p, q) for p, q in zip(row, ref_row, strict=True)] for row, ref_row in pairs]

    finite = [batch.numbers(name).where(mask, 0.0) for name in ("policy", "reference")]
    assert_rows_match(estimator, loop, finite, batch)


# ── §4 score + string ───────────────────────────────────────────────────────────────────────────────────────────────
@given(BATCHES, BETAS)
def test_tethered_rewards_are_the_string_at_each_token_and_the_score_at_the_last(batch: Ragged, beta: float) -> None:
    scores, mask = batch.scores(), batch.mask
    assert_rows_match(
        lambda logprobs, ref_logprobs: numerics.tethered_rewards(scores, logprobs, ref_logprobs, mask, beta),
        lambda logprobs, ref_logprobs: brute_force.tethered_rewards(scores.tolist(), logprobs, ref_logprobs, beta),
        [batch.numbers("policy"), batch.numbers("reference")],
        batch,
    )


# ── §5 surprise ─────────────────────────────────────────────────────────────────────────────────────────────────────
@given(BATCHES, UNIT, UNIT)
def test_gae_is_the_discounted_sum_of_surprises(batch: Ragged, gamma: float, lam: float) -> None:
    mask = batch.mask
    arguments = [batch.numbers("rewards"), batch.numbers("values")]
    for place, loop in enumerate((brute_force.advantages, brute_force.returns)):
        assert_rows_match(
            lambda rewards, values, place=place: numerics.gae(rewards, values, mask, gamma, lam)[place],
            lambda rewards, values, loop=loop: loop(rewards, values, gamma, lam),
            arguments,
            batch,
        )


def test_gae_discounts_nothing_and_trusts_by_95_percent_unless_told() -> None:
    rewards, values = torch.tensor([[0.5, -1.0, 2.0]]).double(), torch.tensor([[0.25, 1.0, -0.5]]).double()
    wanted = brute_force.advantages(rewards.tolist(), values.tolist(), 1.0, 0.95)
    assert_close(numerics.gae(rewards, values, torch.ones(1, 3, dtype=torch.bool))[0], wanted, EXACT)


# ── §6 the proximal step, §7 the baseline ───────────────────────────────────────────────────────────────────────────
@given(BATCHES, CLIP_RANGES)
def test_the_policy_loss_is_the_pessimistic_clipped_mean(batch: Ragged, clip_range: float) -> None:
    mask = batch.mask
    assert_matches(
        lambda *tensors: numerics.clipped_policy_loss(*tensors, mask, clip_range),
        lambda *plain: brute_force.policy_loss(*plain, clip_range),
        [batch.numbers("now", spread=0.4), batch.numbers("old", spread=0.4), batch.numbers("advantages")],
        mask,
    )


@given(BATCHES, st.none() | CLIP_RANGES)
def test_the_value_loss_is_half_the_pessimistic_squared_error(batch: Ragged, clip_range: float | None) -> None:
    mask = batch.mask
    assert_matches(
        lambda *tensors: numerics.clipped_value_loss(*tensors, mask, clip_range),
        lambda *plain: brute_force.value_loss(*plain, clip_range),
        [batch.numbers("now"), batch.numbers("old"), batch.numbers("returns")],
        mask,
    )


@given(BATCHES)
def test_the_clips_are_a_fifth_unless_told(batch: Ragged) -> None:
    a, b, c = (batch.numbers(name) for name in "abc")
    plain = [rows(x, batch.mask) for x in (a, b, c)]
    policy_loss, value_loss = numerics.clipped_policy_loss, numerics.clipped_value_loss
    assert_close(policy_loss(a, b, c, batch.mask), brute_force.policy_loss(*plain, 0.2).real, EXACT)
    assert_close(value_loss(a, b, c, batch.mask), brute_force.value_loss(*plain, 0.2), EXACT)


@given(BATCHES.filter(lambda batch: int(batch.mask.sum()) > 1))
def test_explained_variance_is_one_minus_the_share_left_over(batch: Ragged) -> None:
    mask = batch.mask
    assert_matches(
        lambda values, returns: numerics.explained_variance(values, returns, mask),
        brute_force.explained_variance,
        [batch.numbers("values"), batch.numbers("returns")],
        mask,
    )


# ── §8 preferences ──────────────────────────────────────────────────────────────────────────────────────────────────
@given(st.integers(1, 8), st.integers(0, 2**16))
def test_bradley_terry_is_minus_the_mean_log_probability_of_the_winner(pairs: int, seed: int) -> None:
    scores = torch.randn(2, 1, pairs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3.0
    assert_matches(
        lambda chosen, rejected: numerics.bradley_terry_loss(chosen[0], rejected[0]),
        lambda chosen, rejected: brute_force.bradley_terry_loss(chosen[0], rejected[0]),
        [scores[0], scores[1]],
        torch.ones(1, pairs, dtype=torch.bool),
    )
