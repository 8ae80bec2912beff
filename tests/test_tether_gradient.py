"""Which forms of the KL are a tether, decided by enumeration: expected gradients are computed, not sampled.

The policy is a table: 3 tokens, of which token 0 ends the response, and at most 3 of them; 15 ragged responses, 7
states, all probabilities known. `expected_gradient` is what PPO's machinery pulls on average over responses drawn from
the policy; the oracles are derivatives of sums over all responses that no line of `tether` takes part in.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tether import numerics
from tolerances import EXACT, assert_close

VOCAB, LENGTH, END = 3, 3, 0
NAN = float("nan")


def every_response() -> list[tuple[int, ...]]:
    """Those that end by token 0, and those cut at full length."""
    prefixes = [p for length in range(LENGTH + 1) for p in itertools.product(range(VOCAB), repeat=length)]
    return [y for y in prefixes if y and END not in y[:-1] and (y[-1] == END or len(y) == LENGTH)]


RESPONSES = every_response()
STATES = sorted({y[:t] for y in RESPONSES for t in range(len(y))})
MASK = torch.tensor([[t < len(y) for t in range(LENGTH)] for y in RESPONSES])
TOKENS = torch.tensor([[*y, *[END] * (LENGTH - len(y))] for y in RESPONSES])
STATE_OF = torch.tensor([[STATES.index(y[:t]) if t < len(y) else 0 for t in range(LENGTH)] for y in RESPONSES])


def table(seed: int, spread: float = 1.0) -> Tensor:
    """Logits at each state."""
    return torch.randn(len(STATES), VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread


POLICY, REFERENCE, DIRECTION = table(0), table(1), table(2)
SCORES = torch.randn(len(RESPONSES), generator=torch.Generator().manual_seed(3), dtype=torch.float64)


# ── oracles: sums over all responses, in probabilities ──────────────────────────────────────────────────────────────
def token_probabilities(logits: Tensor) -> Tensor:
    """π(y_t|s_t), `[responses, length]`; 1 where masked."""
    return torch.where(MASK, torch.softmax(logits, dim=-1)[STATE_OF, TOKENS], 1.0)


def probabilities(logits: Tensor) -> Tensor:
    return token_probabilities(logits).prod(dim=1)


def expected_score(logits: Tensor) -> Tensor:
    return (probabilities(logits) * SCORES).sum()


def kl(logits: Tensor, ref_logits: Tensor = REFERENCE) -> Tensor:
    """KL(π‖ρ) over whole responses."""
    p, q = probabilities(logits), probabilities(ref_logits)
    return (p * (p / q).log()).sum()


def kl_at_visited_states(logits: Tensor, forward: bool, visiting: Tensor) -> Tensor:
    """E over the states that `visiting` reaches of KL(π(·|s)‖ρ(·|s)), or of the forward KL(ρ(·|s)‖π(·|s))."""
    p, q = torch.softmax(logits, dim=-1), torch.softmax(REFERENCE, dim=-1)
    at_state = (q * (q / p).log()).sum(-1) if forward else (p * (p / q).log()).sum(-1)
    return (probabilities(visiting)[:, None] * torch.where(MASK, at_state[STATE_OF], 0.0)).sum()


def slope(function: Callable[..., Tensor], *arguments: object) -> Tensor:
    """The derivative for the policy's logits."""
    return torch.func.grad(lambda logits: function(logits, *arguments))(POLICY)


# ── the machinery under proof ───────────────────────────────────────────────────────────────────────────────────────
def logprobs_of(logits: Tensor) -> Tensor:
    """log π(y_t|s_t), NaN where masked: nothing may read it there."""
    return torch.where(MASK, numerics.selected_logprobs(logits[STATE_OF], TOKENS), NAN)


def summed(per_token: Tensor) -> Tensor:
    return torch.where(MASK, per_token, 0.0).sum(dim=1)


def expected_gradient(rewards: Tensor, policy: Tensor = POLICY, values: Tensor | None = None) -> Tensor:
    """E_π[Σ_t Â_t·∇log π(y_t|s_t)]: minus the gradient of PPO's clipped loss at ratio 1, averaged over responses."""
    logits = policy.clone().requires_grad_()
    logprobs, old_logprobs = logprobs_of(logits), logprobs_of(policy)
    values = torch.where(MASK, 0.0, NAN).double() if values is None else values
    advantages, _ = numerics.gae(rewards, values, MASK, gamma=1.0, lam=1.0)
    for row, weight in enumerate(probabilities(policy)):
        here = slice(row, row + 1)
        loss = numerics.clipped_policy_loss(
            logprobs[here], old_logprobs[here], advantages[here], MASK[here], denominator=1.0
        )
        (-weight * loss).backward(retain_graph=True)
    return logits.grad


def expected_loss_gradient(loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """E_π[∇loss(y)] for a loss of the responses' log-probabilities, responses drawn from the policy."""
    logits = POLICY.clone().requires_grad_()
    (probabilities(POLICY) * loss(logprobs_of(logits), logprobs_of(REFERENCE))).sum().backward()
    return logits.grad


def in_the_reward(estimator: Callable[[Tensor, Tensor], Tensor], policy: Tensor = POLICY) -> Tensor:
    """What −estimator as the reward of each token pulls, turned round: a tether's equals ∇KL."""
    penalty = -estimator(logprobs_of(policy), logprobs_of(REFERENCE))
    return -expected_gradient(penalty, policy)


# ── k1 in the reward is the tether ──────────────────────────────────────────────────────────────────────────────────
def test_the_world_is_whole() -> None:
    assert (len(RESPONSES), len(STATES)) == (15, 7)
    assert_close(probabilities(POLICY).sum(), 1.0, EXACT)


def test_the_expected_kl_estimates_are_the_kl_of_whole_responses() -> None:
    """k1, k3 and the full-vocabulary KL, summed over tokens and averaged over responses."""
    logprobs, ref_logprobs = logprobs_of(POLICY), logprobs_of(REFERENCE)
    full_kl = numerics.full_kl(POLICY[STATE_OF], REFERENCE[STATE_OF])
    for per_token in (numerics.kl_k1(logprobs, ref_logprobs), numerics.kl_k3(logprobs, ref_logprobs), full_kl):
        assert_close((probabilities(POLICY) * summed(per_token)).sum(), kl(POLICY), EXACT)


@pytest.mark.parametrize("beta", [0.0, 0.05, 1.0])
def test_tethered_rewards_pull_along_score_minus_beta_kl(beta: float) -> None:
    rewards = numerics.tethered_rewards(SCORES, logprobs_of(POLICY), logprobs_of(REFERENCE), MASK, beta)
    assert_close(expected_gradient(rewards), slope(expected_score) - beta * slope(kl), EXACT)


def test_a_baseline_changes_the_expected_gradient_by_nothing() -> None:
    """Values are a function of the state: the same wherever a state occurs."""
    values = torch.where(MASK, table(4)[STATE_OF, 0], NAN)
    rewards = numerics.tethered_rewards(SCORES, logprobs_of(POLICY), logprobs_of(REFERENCE), MASK, 0.3)
    assert_close(expected_gradient(rewards, values=values), expected_gradient(rewards), EXACT)


def test_the_clipped_loss_at_ratio_one_pulls_as_the_plain_policy_gradient() -> None:
    logits = POLICY.clone().requires_grad_()
    score_to_go = torch.where(MASK, SCORES[:, None], 0.0)  # β = 0: the whole score is still to come at each token
    (probabilities(POLICY) * summed(logprobs_of(logits) * score_to_go)).sum().backward()
    rewards = numerics.tethered_rewards(SCORES, logprobs_of(POLICY), logprobs_of(REFERENCE), MASK, 0.0)
    assert_close(expected_gradient(rewards), logits.grad, EXACT)


def test_at_the_optimum_the_tether_and_the_score_cancel() -> None:
    """π* ∝ ρ·e^{r/β}: built state by state from the sums of what may follow."""
    beta, weight = 0.5, probabilities(REFERENCE) * (SCORES / 0.5).exp()
    mass = [
        [sum(weight[i] for i, y in enumerate(RESPONSES) if y[: len(s) + 1] == (*s, v)) for v in range(VOCAB)]
        for s in STATES
    ]
    optimum = torch.tensor(mass, dtype=torch.float64).log()
    rewards = numerics.tethered_rewards(SCORES, logprobs_of(optimum), logprobs_of(REFERENCE), MASK, beta)
    assert_close(expected_gradient(rewards, optimum), torch.zeros_like(optimum), EXACT)
    tautness = summed(rewards)
    assert_close(tautness, torch.full_like(tautness, beta * weight.sum().log().item()), EXACT)


def test_the_wrong_sign_is_a_slingshot() -> None:
    towards_reference = -in_the_reward(numerics.kl_k1)
    assert (towards_reference * slope(kl)).sum() < 0.0
    zero, row = torch.zeros_like(SCORES), (logprobs_of(POLICY), logprobs_of(REFERENCE), MASK)
    slingshot = numerics.tethered_rewards(zero, *row, -1.0, allow_negative_beta=True)
    assert_close(expected_gradient(slingshot), slope(kl), EXACT)


# ── k3 in the reward is none ────────────────────────────────────────────────────────────────────────────────────────
def test_k3_in_the_reward_pulls_along_reverse_minus_forward_kl() -> None:
    """∇KL(π‖ρ) − E_s[∇KL(ρ(·|s)‖π(·|s))], the states s as the policy visits them."""
    forward = slope(kl_at_visited_states, True, POLICY)
    assert_close(in_the_reward(numerics.kl_k3), slope(kl) - forward, EXACT)
    assert not torch.allclose(in_the_reward(numerics.kl_k3), slope(kl), rtol=0.1)


def share_of_the_tether_left(estimator: Callable[[Tensor, Tensor], Tensor], distance: float) -> float:
    """Norm of the estimator's pull over the norm of ∇KL, for a policy at this distance from the reference."""
    near = REFERENCE + distance * DIRECTION
    true = torch.func.grad(kl)(near)
    return float(in_the_reward(estimator, near).norm() / true.norm())


def test_k3_in_the_reward_lets_go_near_the_reference_where_k1_holds() -> None:
    """A tether's pull falls with the distance, that of k3 with its square: ten times nearer, a tenth of the share."""
    shares = [share_of_the_tether_left(numerics.kl_k3, distance) for distance in (0.5, 0.05, 0.005, 0.0005)]
    assert shares[0] < 0.1
    assert shares[1] / shares[2] == pytest.approx(10.0, rel=0.1)
    assert shares[2] / shares[3] == pytest.approx(10.0, rel=0.01)
    assert share_of_the_tether_left(numerics.kl_k1, 0.05) == pytest.approx(1.0, abs=1e-9)


# ── k1, k2, k3 as losses ────────────────────────────────────────────────────────────────────────────────────────────
def test_k1_as_a_loss_pulls_nowhere_on_average() -> None:
    pull = expected_loss_gradient(lambda logprobs, ref_logprobs: summed(numerics.kl_k1(logprobs, ref_logprobs)))
    assert_close(pull, torch.zeros_like(POLICY), EXACT)


def test_k2_of_a_whole_response_as_a_loss_pulls_along_the_kl() -> None:
    """½(Σ_t d_t)²: on policy the same as k1 in the reward."""
    pull = expected_loss_gradient(lambda logprobs, ref_logprobs: numerics.kl_k2(summed(logprobs), summed(ref_logprobs)))
    assert_close(pull, slope(kl), EXACT)


def test_k2_per_token_as_a_loss_forgets_where_tokens_lead() -> None:
    """Σ_t ½d_t² pulls along the KL at the visited states only; that a token leads to other states is left out."""
    pull = expected_loss_gradient(lambda logprobs, ref_logprobs: summed(numerics.kl_k2(logprobs, ref_logprobs)))
    assert_close(pull, slope(kl_at_visited_states, False, POLICY), EXACT)
    assert not torch.allclose(pull, slope(kl), rtol=0.1)


def test_k3_as_a_loss_pulls_along_the_forward_kl() -> None:
    pull = expected_loss_gradient(lambda logprobs, ref_logprobs: summed(numerics.kl_k3(logprobs, ref_logprobs)))
    assert_close(pull, slope(kl_at_visited_states, True, POLICY), EXACT)


def test_full_kl_as_a_loss_pulls_as_k2_per_token_does() -> None:
    """Exact at each state, and blind to the path between them."""
    logits = POLICY.clone().requires_grad_()
    per_token = numerics.full_kl(logits[STATE_OF], REFERENCE[STATE_OF])
    (probabilities(POLICY) * summed(per_token)).sum().backward()
    assert_close(logits.grad, slope(kl_at_visited_states, False, POLICY), EXACT)
