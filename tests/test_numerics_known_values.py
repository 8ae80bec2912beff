"""`tether.numerics` against torch's own functions, closed forms, and the claims that its docstrings make."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ragged import Ragged, poisoned, ragged_batches
from tether import numerics
from tolerances import EXACT, assert_close

BATCHES = ragged_batches()
INFINITY = float("inf")


def normal(*shape: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread


def gradient(result: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(result.sum(), leaf)[0]


EVERYWHERE = torch.ones(3, 5, dtype=torch.bool)


# ── §1 means under a mask ───────────────────────────────────────────────────────────────────────────────────────────
@given(BATCHES.filter(lambda batch: int(batch.mask.sum()) > 1))
def test_whitened_tokens_have_mean_0_and_deviation_1(batch: Ragged) -> None:
    x, mask = batch.numbers("x", spread=4.0), batch.mask
    whitened = numerics.masked_whiten(x + 3.0, mask)[mask]
    deviation = x[mask].std(correction=0)
    assert_close(whitened.mean(), 0.0, EXACT)
    assert_close(whitened.std(correction=0), deviation / (deviation**2 + 1e-8).sqrt(), EXACT)


@given(BATCHES)
def test_whitening_without_the_shift_keeps_the_mean(batch: Ragged) -> None:
    x, mask = batch.numbers("x", spread=4.0), batch.mask
    kept = numerics.masked_whiten(x, mask, shift_mean=False)
    assert_close(kept[mask].mean(), x[mask].mean(), EXACT)
    assert_close(kept[mask] - x[mask].mean(), numerics.masked_whiten(x, mask)[mask], EXACT)


def test_whitening_one_token_gives_zero_or_keeps_it() -> None:
    x, mask = torch.tensor([[float("nan"), 7.0]]), torch.tensor([[False, True]])
    assert numerics.masked_whiten(x, mask).tolist() == [[0.0, 0.0]]
    assert numerics.masked_whiten(x, mask, shift_mean=False).tolist() == [[0.0, 7.0]]


def test_whitening_numbers_that_do_not_vary_gives_zeros() -> None:
    assert not numerics.masked_whiten(torch.full((3, 5), 0.5), EVERYWHERE).any()


# ── §2 what the policy says ─────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_selected_logprobs_agree_with_log_softmax(temperature: float) -> None:
    logits, tokens = normal(3, 5, 11, spread=3.0), torch.arange(15).reshape(3, 5) % 11
    wanted = F.log_softmax(logits / temperature, dim=-1).gather(-1, tokens[..., None])[..., 0]
    assert_close(numerics.selected_logprobs(logits, tokens, temperature), wanted, EXACT)
    assert_close(numerics.selected_logprobs(logits, tokens.int(), temperature), wanted, EXACT)


def test_the_temperature_is_one_unless_told() -> None:
    logits, tokens = normal(1, 2, 4), torch.tensor([[0, 3]])
    for function, arguments in [
        (numerics.selected_logprobs, (logits, tokens)),
        (numerics.entropy, (logits,)),
        (numerics.full_kl, (logits, logits.flip(-1))),
    ]:
        assert torch.equal(function(*arguments), function(*arguments, 1.0))
        assert not torch.allclose(function(*arguments), function(*arguments, 1.1))


def test_logits_of_a_thousand_do_not_overflow() -> None:
    logits = torch.tensor([[[1000.0, 999.0, -1000.0]]], dtype=torch.float64)
    chosen = numerics.selected_logprobs(logits, torch.tensor([[1]]))
    assert_close(chosen, [[-1.0 - math.log1p(math.exp(-1.0))]], EXACT)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_entropy_agrees_with_torch_distributions(temperature: float) -> None:
    logits = normal(3, 5, 11, spread=3.0)
    wanted = torch.distributions.Categorical(logits=logits / temperature).entropy()
    assert_close(numerics.entropy(logits, temperature), wanted, EXACT)


def test_an_impossible_token_adds_nothing_to_the_entropy_and_its_gradient_is_finite() -> None:
    possible = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    logits = torch.cat([possible, torch.full((2,), -INFINITY, dtype=torch.float64)]).detach().requires_grad_()
    assert_close(numerics.entropy(logits), numerics.entropy(possible), EXACT)
    slope = gradient(numerics.entropy(logits), logits)
    assert_close(slope[:3], gradient(numerics.entropy(possible), possible), EXACT)
    assert slope[3:].tolist() == [0.0, 0.0]


# ── §3 how far it has drifted ───────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_full_kl_agrees_with_torch_kl_div(temperature: float) -> None:
    logits, ref_logits = normal(3, 5, 11, spread=2.0), normal(3, 5, 11, seed=1, spread=2.0)
    logprobs, ref_logprobs = (F.log_softmax(z / temperature, dim=-1) for z in (logits, ref_logits))
    wanted = F.kl_div(ref_logprobs, logprobs, reduction="none", log_target=True).sum(-1)
    assert_close(numerics.full_kl(logits, ref_logits, temperature), wanted, EXACT)


def test_a_token_impossible_to_the_policy_adds_nothing_to_full_kl() -> None:
    both = torch.tensor([0.3, -1.0, -INFINITY], dtype=torch.float64, requires_grad=True)
    ref_both = torch.tensor([1.0, 0.5, -INFINITY], dtype=torch.float64, requires_grad=True)
    ref_all = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64, requires_grad=True)
    wanted = numerics.full_kl(both[:2].detach(), ref_both[:2].detach())
    assert_close(numerics.full_kl(both, ref_both), wanted, EXACT)
    rest_of_ref = math.log(torch.exp(ref_all[:2]).sum().item() + 1.0) - torch.logsumexp(ref_all[:2], 0).item()
    assert_close(numerics.full_kl(both, ref_all), wanted + rest_of_ref, EXACT)
    for ref in (ref_both, ref_all):
        for leaf in (both, ref):
            assert gradient(numerics.full_kl(both, ref), leaf).isfinite().all()


def test_a_token_impossible_to_the_reference_alone_makes_full_kl_infinite() -> None:
    assert numerics.full_kl(torch.tensor([0.0, 0.0]), torch.tensor([0.0, -INFINITY])) == INFINITY


def test_nan_logits_are_not_hidden_as_zero_entropy_or_zero_drift() -> None:
    broken, sound = torch.tensor([float("nan"), 0.0]), torch.tensor([1.0, 0.0])
    assert numerics.entropy(broken).isnan()
    assert numerics.full_kl(broken, sound).isnan()
    assert numerics.full_kl(sound, broken).isnan()


def test_k1_and_k3_are_unbiased_for_the_kl_and_k2_is_not() -> None:
    logits, ref_logits = normal(7), normal(7, seed=1)
    logprobs, ref_logprobs = F.log_softmax(logits, -1), F.log_softmax(ref_logits, -1)
    kl = F.kl_div(ref_logprobs, logprobs, reduction="sum", log_target=True)

    def expected(estimator: Tensor) -> Tensor:
        return (logprobs.exp() * estimator).sum()

    assert_close(expected(numerics.kl_k1(logprobs, ref_logprobs)), kl, EXACT)
    assert_close(expected(numerics.kl_k3(logprobs, ref_logprobs)), kl, EXACT)
    assert (expected(numerics.kl_k2(logprobs, ref_logprobs)) - kl).abs() > 0.01
    assert numerics.kl_k1(logprobs, ref_logprobs).min() < 0.0 <= numerics.kl_k3(logprobs, ref_logprobs).min()


def test_k3_of_a_tiny_drift_keeps_its_digits_in_float32() -> None:
    """e^{−d} − 1 + d in this order loses them all: 1e-4 of drift is 5e-9 nats, beside a round-off of 6e-8."""
    k3 = numerics.kl_k3(torch.tensor([-1e-4, 1e-4]), torch.zeros(2))
    assert ((k3 / 5e-9 - 1.0).abs() < 0.01).all()


# ── §4 score + string ───────────────────────────────────────────────────────────────────────────────────────────────
@given(BATCHES, st.floats(0.0, 2.0))
def test_the_rewards_of_a_response_sum_to_its_score_minus_beta_times_its_kl(batch: Ragged, beta: float) -> None:
    scores, mask = batch.scores(), batch.mask
    logprobs, ref_logprobs = batch.numbers("policy"), batch.numbers("reference")
    rewards = numerics.tethered_rewards(scores, logprobs, ref_logprobs, mask, beta)
    kl = torch.stack([(p - q)[m].sum() for p, q, m in zip(logprobs, ref_logprobs, mask, strict=True)])
    assert_close(rewards.sum(dim=1), scores - beta * kl, EXACT)


@pytest.mark.parametrize(
    ("mask", "last"),
    [([1, 1, 1, 1], 3), ([1, 1, 0, 0], 1), ([0, 0, 1, 1], 3), ([1, 0, 1, 0], 2), ([0, 1, 0, 0], 1), ([1, 0, 0, 0], 0)],
)
def test_the_score_lands_on_the_last_real_token_only(mask: list[int], last: int) -> None:
    keep, same = torch.tensor([mask]).bool(), torch.full((1, 4), -1.0)
    rewards = numerics.tethered_rewards(torch.tensor([5.0]), same, same, keep, 0.1)
    assert rewards.nonzero().tolist() == [[0, last]]
    assert rewards[0, last] == 5.0


def test_drifting_from_the_reference_costs_and_returning_pays() -> None:
    logprobs, ref_logprobs = torch.tensor([[-1.0, -3.0]]), torch.tensor([[-2.0, -2.0]])
    rewards = numerics.tethered_rewards(torch.zeros(1), logprobs, ref_logprobs, torch.ones(1, 2).bool(), 0.5)
    assert rewards.tolist() == [[-0.5, 0.5]]


def test_beta_may_be_a_tensor_and_negative_beta_works_when_named() -> None:
    row, ref_row, mask = torch.tensor([[-1.0]]), torch.tensor([[-2.0]]), torch.ones(1, 1).bool()
    assert numerics.tethered_rewards(torch.ones(1), row, ref_row, mask, torch.tensor(0.25)).tolist() == [[0.75]]
    slingshot = numerics.tethered_rewards(torch.ones(1), row, ref_row, mask, -0.25, allow_negative_beta=True)
    assert slingshot.tolist() == [[1.25]]


# ── §5 surprise ─────────────────────────────────────────────────────────────────────────────────────────────────────
def return_to_go(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    result = torch.zeros_like(rewards)
    for b, t in mask.nonzero().tolist():
        later = [s for s in range(t, mask.shape[1]) if mask[b, s]]
        result[b, t] = sum(gamma**k * rewards[b, s] for k, s in enumerate(later))
    return result


@given(BATCHES, st.floats(0.0, 1.0))
def test_gae_without_values_and_with_full_trust_is_the_return_to_go(batch: Ragged, gamma: float) -> None:
    rewards, mask = batch.numbers("rewards"), batch.mask
    advantages, returns = numerics.gae(rewards, torch.where(mask, 0.0, rewards), mask, gamma, 1.0)
    assert_close(advantages, return_to_go(rewards, mask, gamma), EXACT)
    assert torch.equal(advantages, returns)


@given(BATCHES)
def test_gae_with_full_trust_telescopes_to_return_minus_value(batch: Ragged) -> None:
    rewards, values, mask = batch.numbers("rewards"), batch.numbers("values"), batch.mask
    advantages, returns = numerics.gae(rewards, values, mask, 1.0, 1.0)
    assert_close(returns, return_to_go(rewards, mask), EXACT)
    assert_close(advantages, torch.where(mask, return_to_go(rewards, mask) - values, 0.0), EXACT)


def test_gae_without_trust_is_the_one_step_surprise() -> None:
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.5, 0.25, 8.0]])
    advantages, returns = numerics.gae(rewards, values, torch.ones(1, 3).bool(), 0.5, 0.0)
    assert advantages.tolist() == [[1.0 + 0.125 - 0.5, 2.0 + 4.0 - 0.25, 4.0 - 8.0]]
    assert returns.tolist() == [[1.125, 6.0, 4.0]]


def test_a_hole_in_a_response_is_as_if_it_were_not_there() -> None:
    rewards, values = torch.tensor([[1.0, 9.0, 2.0]]), torch.tensor([[0.5, 9.0, 0.25]])
    with_hole = numerics.gae(rewards, values, torch.tensor([[True, False, True]]), 0.5, 0.5)
    without = numerics.gae(rewards[:, ::2], values[:, ::2], torch.ones(1, 2).bool(), 0.5, 0.5)
    for holed, whole in zip(with_hole, without, strict=True):
        assert holed[:, ::2].tolist() == whole.tolist()
        assert holed[0, 1] == 0.0


def test_a_row_without_a_token_has_neither_advantage_nor_return() -> None:
    nothing, nan = torch.zeros(2, 3, dtype=torch.bool), torch.full((2, 3), float("nan"))
    assert [x.tolist() for x in numerics.gae(nan, nan, nothing)] == [[[0.0] * 3] * 2] * 2


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_gae_of_nothing_is_nothing(shape: tuple[int, int]) -> None:
    empty = torch.zeros(shape)
    assert [x.shape for x in numerics.gae(empty, empty, empty.bool())] == [shape, shape]


# ── §6 the proximal step ────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("advantage", "ratio", "moves"),
    [
        (+1.0, 1.21, False),  # pulled up, beyond 1 + ε: pinned
        (+1.0, 1.19, True),
        (+1.0, 0.50, True),  # pulled up from far below: still free to come back
        (-1.0, 0.79, False),  # pushed down, beyond 1 − ε: pinned
        (-1.0, 0.81, True),
        (-1.0, 2.00, True),  # pushed down from far above
        (0.0, 1.00, False),
    ],
)
def test_the_clip_stops_the_pull_beyond_it_and_never_the_way_back(advantage: float, ratio: float, moves: bool) -> None:
    logprobs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    zero, mask = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1).bool()
    loss = numerics.clipped_policy_loss(logprobs, zero, torch.full_like(zero, advantage), mask, 0.2)
    slope = gradient(loss, logprobs)
    assert_close(loss, -advantage * (ratio if moves else min(max(ratio, 0.8), 1.2)), EXACT)
    assert_close(slope, [[-advantage * ratio if moves else 0.0]], EXACT)
    assert moves or slope.item() == 0.0


def test_at_ratio_one_the_loss_is_minus_the_mean_advantage_and_its_gradient_too() -> None:
    logprobs, advantages = normal(3, 5).requires_grad_(), normal(3, 5, seed=1)
    loss = numerics.clipped_policy_loss(logprobs, logprobs.detach(), advantages, EVERYWHERE)
    assert_close(loss, -advantages.mean(), EXACT)
    assert_close(gradient(loss, logprobs), -advantages / advantages.numel(), EXACT)


# ── §7 the baseline ─────────────────────────────────────────────────────────────────────────────────────────────────
def test_without_clip_the_value_loss_is_torch_mse() -> None:
    values, returns = normal(3, 5).requires_grad_(), normal(3, 5, seed=1)
    plain = numerics.clipped_value_loss(values, values.detach(), returns, EVERYWHERE, None)
    mse = F.mse_loss(values, returns)
    assert_close(plain, mse, EXACT)
    assert_close(gradient(plain, values), gradient(mse, values), EXACT)


def test_an_idle_value_clip_gives_half_of_torch_mse() -> None:
    values, returns = normal(3, 5), normal(3, 5, seed=1)
    clipped = numerics.clipped_value_loss(values, values, returns, EVERYWHERE, 0.2)
    assert_close(clipped, 0.5 * F.mse_loss(values, returns), EXACT)


@pytest.mark.parametrize(
    ("value", "wanted_return", "loss", "slope"),
    [
        (1.0, 2.0, 0.5 * 1.8**2, 0.0),  # moved towards the return, beyond the clip: the clipped error is the larger
        (1.0, -2.0, 0.5 * 3.0**2, 3.0),  # moved away: the true error is the larger, and it pulls back
        (-1.0, -2.0, 0.5 * 1.8**2, 0.0),
        (-1.0, 2.0, 0.5 * 3.0**2, -3.0),
        (0.1, 2.0, 0.5 * 1.9**2, -1.9),  # inside the clip
    ],
)
def test_the_value_clip_takes_the_larger_error(value: float, wanted_return: float, loss: float, slope: float) -> None:
    values, mask = torch.tensor([[value]], dtype=torch.float64, requires_grad=True), torch.ones(1, 1).bool()
    got = numerics.clipped_value_loss(
        values, torch.zeros(1, 1).double(), torch.tensor([[wanted_return]]).double(), mask, 0.2
    )
    assert_close(got, loss, EXACT)
    assert_close(gradient(got, values), [[slope]], EXACT)


def test_explained_variance_of_perfect_constant_and_reversed_values() -> None:
    returns = normal(3, 5)
    assert numerics.explained_variance(returns, returns, EVERYWHERE) == 1.0
    assert_close(numerics.explained_variance(returns + 2.0, returns, EVERYWHERE), 1.0, EXACT)
    assert_close(numerics.explained_variance(torch.full_like(returns, 3.0), returns, EVERYWHERE), 0.0, EXACT)
    assert_close(numerics.explained_variance(-returns, returns, EVERYWHERE), -3.0, EXACT)


@given(BATCHES, st.floats(-10.0, 10.0))
def test_explained_variance_is_nan_where_the_returns_do_not_vary(batch: Ragged, constant: float) -> None:
    """Also where round-off keeps their computed variance above 0, as for three returns of 0.1."""
    returns = poisoned(torch.full(batch.mask.shape, constant, dtype=torch.float64), batch.mask)
    assert numerics.explained_variance(batch.numbers("values"), returns, batch.mask).isnan()


def test_three_equal_returns_do_not_vary_though_their_variance_is_not_zero() -> None:
    returns, mask = torch.full((1, 3), 0.1, dtype=torch.float64), torch.ones(1, 3).bool()
    assert numerics.masked_mean((returns - numerics.masked_mean(returns, mask)) ** 2, mask) > 0.0
    assert numerics.explained_variance(normal(1, 3), returns, mask).isnan()


# ── §8 preferences ──────────────────────────────────────────────────────────────────────────────────────────────────
def test_bradley_terry_agrees_with_torch_binary_cross_entropy() -> None:
    chosen, rejected = normal(9, spread=3.0).requires_grad_(), normal(9, seed=1, spread=3.0)
    loss = numerics.bradley_terry_loss(chosen, rejected)
    wanted = F.binary_cross_entropy_with_logits(chosen - rejected, torch.ones(9, dtype=torch.float64))
    assert_close(loss, wanted, EXACT)
    assert_close(gradient(loss, chosen), gradient(wanted, chosen), EXACT)


def test_bradley_terry_does_not_overflow_for_a_hopeless_pair() -> None:
    assert numerics.bradley_terry_loss(torch.tensor([-1000.0]), torch.tensor([1000.0])) == 2000.0
