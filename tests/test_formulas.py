"""The mathematics in the standard library against closed forms, sums written out, torch and central differences."""

from __future__ import annotations

import inspect
import math
from random import Random

import pytest
import torch
import torch.nn.functional as F

from tether import numerics
from tether.ladder import formulas, plain
from tether.ladder.formulas import (
    bradley_terry_loss,
    clipped_policy_loss,
    clipped_value_loss,
    entropy,
    explained_variance,
    full_kl,
    gae,
    kl_k1,
    kl_k2,
    kl_k3,
    masked_mean,
    masked_whiten,
    selected_logprobs,
    tethered_rewards,
)
from tether.ladder.scalar import Scalar, dot, gradients, total, value_of

FUNCTIONS = [
    masked_mean,
    masked_whiten,
    selected_logprobs,
    entropy,
    kl_k1,
    kl_k2,
    kl_k3,
    full_kl,
    tethered_rewards,
    gae,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    bradley_terry_loss,
]
NAN = math.nan
MASK = [[True, True, False, True], [False, True, True, False]]  # ragged on both sides, with a hole
LOG2 = math.log(2)


def grid(seed, spread=1.0):
    """Random numbers where MASK is true, NaN elsewhere."""
    random = Random(seed)
    return [[random.gauss(0.0, spread) if is_real else NAN for is_real in row] for row in MASK]


def lifted(numbers):
    return [[Scalar(number) for number in row] for row in numbers]


def flat(rows):
    return [value_of(number) for row in rows for number in row]


# ── the same functions as numerics ──────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("function", FUNCTIONS)
def test_names_arguments_order_and_defaults_are_those_of_numerics(function):
    def shape(module):
        parameters = inspect.signature(getattr(module, function.__name__)).parameters.values()
        return [(parameter.name, parameter.kind, parameter.default) for parameter in parameters]

    assert shape(plain) == shape(formulas) == shape(numerics)


# ── §1 ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_mean_counts_tokens_not_responses():
    assert masked_mean([[1.0, 2.0, 6.0], [11.0, NAN, NAN]], [[True] * 3, [True, False, False]]) == 5.0


def test_the_pieces_of_a_batch_add_up_to_its_mean():
    x = grid(1)
    pieces = [masked_mean([row], [mask], denominator=5) for row, mask in zip(x, MASK, strict=True)]
    assert sum(pieces) == pytest.approx(masked_mean(x, MASK), rel=1e-15)


def test_whitened_numbers_have_mean_zero_and_variance_one():
    whitened = masked_whiten([[1.0, 2.0, NAN], [6.0, NAN, NAN]], [[True, True, False], [True, False, False]])
    # μ = 3, σ² = (4 + 1 + 9)/3
    scale = 1 / math.sqrt(14 / 3 + 1e-8)
    assert flat(whitened) == pytest.approx([-2 * scale, -scale, 0.0, 3 * scale, 0.0, 0.0], rel=1e-14)


def test_without_the_shift_the_mean_stays():
    kept = masked_whiten([[1.0, 2.0, NAN], [6.0, NAN, NAN]], [[True, True, False], [True, False, False]], False)
    scale = 1 / math.sqrt(14 / 3 + 1e-8)
    assert flat(kept) == pytest.approx([3 - 2 * scale, 3 - scale, 0.0, 3 + 3 * scale, 0.0, 0.0], rel=1e-14)


# ── §2, §3 ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_what_the_policy_says_is_what_torch_makes_of_its_logits(temperature):
    generator = torch.Generator().manual_seed(3)
    logits, ref_logits = (torch.randn(2, 3, 5, generator=generator, dtype=torch.float64) * 3 for _ in "ab")
    tokens = torch.randint(5, (2, 3), generator=generator)
    policy = torch.distributions.Categorical(logits=logits / temperature)
    reference = torch.distributions.Categorical(logits=ref_logits / temperature)
    wanted = [policy.log_prob(tokens), policy.entropy(), torch.distributions.kl_divergence(policy, reference)]
    got = [
        selected_logprobs(logits.tolist(), tokens.tolist(), temperature),
        entropy(logits.tolist(), temperature),
        full_kl(logits.tolist(), ref_logits.tolist(), temperature),
    ]
    for mine, theirs in zip(got, wanted, strict=True):
        assert flat(mine) == pytest.approx(theirs.flatten().tolist(), rel=1e-12)


def test_an_impossible_token_adds_nothing():
    logits, ref_logits = [[[0.0, 0.0, -math.inf]]], [[[0.0, 0.0, 0.0]]]
    assert entropy(logits)[0][0] == pytest.approx(LOG2)
    assert full_kl(logits, ref_logits)[0][0] == pytest.approx(math.log(1.5))
    assert full_kl(ref_logits, logits)[0][0] == math.inf


def test_broken_logits_stay_visible():
    assert math.isnan(entropy([[[NAN, 0.0]]])[0][0])
    assert math.isnan(full_kl([[[0.0, NAN]]], [[[0.0, 0.0]]])[0][0])


def test_the_three_estimates_of_the_kl_have_their_closed_forms():
    ratio = [[math.log(0.5), math.log(0.25)]], [[math.log(0.25), math.log(0.5)]]  # π/ρ = 2 and ½
    assert flat(kl_k1(*ratio)) == pytest.approx([LOG2, -LOG2])
    assert flat(kl_k2(*ratio)) == pytest.approx([LOG2**2 / 2, LOG2**2 / 2])
    assert flat(kl_k3(*ratio)) == pytest.approx([0.5 - 1 + LOG2, 2 - 1 - LOG2])


# ── §4 ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_score_sits_on_the_last_real_token_and_the_string_on_all():
    rewards = tethered_rewards([2.0, -3.0], grid(1), grid(2), MASK, beta=0.3)
    wanted = []
    for mine, theirs, real, score in zip(grid(1), grid(2), MASK, [2.0, -3.0], strict=True):
        wanted.append([-0.3 * (a - b) if is_real else 0.0 for a, b, is_real in zip(mine, theirs, real, strict=True)])
        wanted[-1][3 if real[3] else 2] += score
    assert flat(rewards) == pytest.approx(flat(wanted), rel=1e-14)
    drift = [grid(1)[0][t] - grid(2)[0][t] for t in (0, 1, 3)]
    assert sum(rewards[0]) == pytest.approx(2.0 - 0.3 * sum(drift), rel=1e-14)


def test_a_negative_beta_must_be_asked_for_by_name():
    with pytest.raises(ValueError, match=r"beta is -0\.1"):
        tethered_rewards([1.0], [[0.0]], [[1.0]], [[True]], -0.1)
    rewards = tethered_rewards([1.0], [[0.0]], [[1.0]], [[True]], -0.1, allow_negative_beta=True)
    assert rewards == [[pytest.approx(0.9)]]


# ── §5 ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0), (0.0, 0.3)])
def test_an_advantage_is_the_discounted_sum_of_the_surprises_after_it(gamma, lam):
    advantages, returns = gae(grid(1), grid(2), MASK, gamma, lam)
    for row in range(2):
        real = [t for t in range(4) if MASK[row][t]]
        rewards, values = [grid(1)[row][t] for t in real], [grid(2)[row][t] for t in real] + [0.0]
        surprises = [rewards[k] + gamma * values[k + 1] - values[k] for k in range(len(real))]
        for k, t in enumerate(real):
            wanted = sum((gamma * lam) ** j * surprise for j, surprise in enumerate(surprises[k:]))
            assert advantages[row][t] == pytest.approx(wanted, rel=1e-13)
            assert returns[row][t] == pytest.approx(wanted + values[k], rel=1e-13)
        assert all(advantages[row][t] == returns[row][t] == 0.0 for t in range(4) if not MASK[row][t])


def test_with_gamma_and_lambda_one_the_return_is_the_sum_of_the_rewards_to_come():
    _, returns = gae([[1.0, 2.0, 4.0]], [[9.0, -7.0, 5.0]], [[True] * 3], 1.0, 1.0)
    assert flat(returns) == pytest.approx([7.0, 6.0, 4.0])


# ── §6, §7 ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.1, 2.0, -2.2, -2.2),  # inside: the gradient of −A·e^{logp − old} is −A·ratio
        (1.5, 2.0, -2.4, 0.0),  # too far up, praised: pinned at 1 + ε
        (0.5, 2.0, -1.0, -1.0),  # too far down, praised: pulled back
        (0.5, -2.0, 1.6, 0.0),  # too far down, blamed: pinned at 1 − ε
        (1.5, -2.0, 3.0, 3.0),  # too far up, blamed: pulled back
    ],
)
def test_the_clip_forbids_the_push_and_never_the_way_back(ratio, advantage, loss, slope):
    logprob = Scalar(math.log(ratio) - 3.0)
    result = clipped_policy_loss([[logprob]], [[-3.0]], [[advantage]], [[True]])
    assert value_of(result) == pytest.approx(loss, rel=1e-14)
    assert gradients(result, [logprob]) == pytest.approx([slope], rel=1e-14)


@pytest.mark.parametrize(
    ("value", "old_value", "target", "loss", "slope"),
    [
        (0.1, 0.0, 2.0, 0.5 * 1.9**2, -1.9),  # inside the clip
        (1.0, 0.0, 2.0, 0.5 * 1.8**2, 0.0),  # went too far towards the target: judged as if at V_old + ε
        (-1.0, 0.0, 2.0, 0.5 * 3.0**2, -3.0),  # went the wrong way: judged as it is
        (-1.0, 0.0, -2.0, 0.5 * 1.8**2, 0.0),
    ],
)
def test_the_value_loss_takes_the_worse_of_the_two(value, old_value, target, loss, slope):
    moved = Scalar(value)
    result = clipped_value_loss([[moved]], [[old_value]], [[target]], [[True]])
    assert value_of(result) == pytest.approx(loss, rel=1e-14)
    assert gradients(result, [moved]) == pytest.approx([slope], rel=1e-14)


def test_without_a_clip_the_value_loss_is_the_plain_mean_square_with_no_half():
    value = Scalar(1.0)
    result = clipped_value_loss([[value, NAN]], [[NAN, NAN]], [[3.0, NAN]], [[True, False]], None)
    assert value_of(result) == 4.0
    assert gradients(result, [value]) == [-4.0]


@pytest.mark.parametrize("loss", [clipped_policy_loss, clipped_value_loss])
def test_the_losses_of_micro_batches_add_up(loss):
    arguments = [grid(seed, 0.3) for seed in (1, 2, 3)]
    pieces = [loss(*([x[row]] for x in arguments), [MASK[row]], denominator=5) for row in range(2)]
    assert sum(pieces) == pytest.approx(loss(*arguments, MASK), rel=1e-14)


def test_explained_variance_by_hand():
    # returns 1, 2, 6 vary by 14/3; what is left, 0, −1, 1, varies by 2/3
    assert explained_variance([[1.0, 3.0, 5.0]], [[1.0, 2.0, 6.0]], [[True] * 3]) == pytest.approx(1 - 2 / 14)
    assert math.isnan(explained_variance([[1.0, 2.0, 3.0]], [[0.1, 0.1, 0.1]], [[True] * 3]))


# ── §8 ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_bradley_terry_is_torchs_logsigmoid_of_the_margin():
    chosen, rejected = [1.0, -0.5, 800.0, 0.0], [0.2, 1.5, 0.0, 900.0]
    leaves = [Scalar(score) for score in chosen]
    margin = torch.tensor(chosen, dtype=torch.float64, requires_grad=True)
    wanted = -F.logsigmoid(margin - torch.tensor(rejected, dtype=torch.float64)).mean()
    wanted.backward()
    result = bradley_terry_loss(leaves, rejected)
    assert value_of(result) == pytest.approx(wanted.item(), rel=1e-14)
    assert gradients(result, leaves) == pytest.approx(margin.grad.tolist(), rel=1e-12, abs=1e-300)
    assert bradley_terry_loss([0.3], [0.3]) == pytest.approx(LOG2)


# ── gradients and masks, for all ────────────────────────────────────────────────────────────────────────────────────
OTHER, THIRD = grid(12, 0.4), grid(13, 0.4)


def weighted(rows):
    return dot((0.3, -1.2, 2.0, 0.7, 1.1, -0.4, 0.9, 1.6), rows[0] + rows[1])


def nudged(numbers, row, t, step):
    copy = [list(row) for row in numbers]
    copy[row][t] += step
    return copy


OF_ONE_GRID = {
    "masked_mean": lambda x: masked_mean(x, MASK),
    "masked_whiten": lambda x: weighted(masked_whiten(x, MASK)),
    "masked_whiten, unshifted": lambda x: weighted(masked_whiten(x, MASK, shift_mean=False)),
    "tethered_rewards": lambda x: weighted(tethered_rewards([1.0, -1.0], x, OTHER, MASK, 0.2)),
    "gae of rewards": lambda x: weighted(gae(x, OTHER, MASK, 0.9, 0.8)[0]),
    "gae of values": lambda x: weighted(gae(OTHER, x, MASK, 0.9, 0.8)[0]),
    "gae, returns": lambda x: weighted(gae(OTHER, x, MASK, 0.9, 0.8)[1]),
    "clipped_policy_loss": lambda x: clipped_policy_loss(x, OTHER, THIRD, MASK, 0.3),
    "clipped_value_loss": lambda x: clipped_value_loss(x, OTHER, THIRD, MASK, 0.3),
    "clipped_value_loss, unclipped": lambda x: clipped_value_loss(x, OTHER, THIRD, MASK, None),
    "explained_variance": lambda x: explained_variance(x, OTHER, MASK),
}


@pytest.mark.parametrize("name", OF_ONE_GRID)
def test_the_gradient_is_the_central_difference_and_nothing_passes_the_mask(name):
    function, numbers, h = OF_ONE_GRID[name], grid(11, 0.4), 1e-6
    leaves = lifted(numbers)
    result = function(leaves)
    assert math.isfinite(value_of(result))
    slopes = iter(gradients(result, leaves[0] + leaves[1]))
    for row in range(2):
        for t in range(4):
            slope = next(slopes)
            if not MASK[row][t]:
                assert slope == 0.0
                continue
            up, down = (function(nudged(numbers, row, t, step)) for step in (h, -h))
            difference = value_of(up) - value_of(down)
            assert slope == pytest.approx(difference / (2 * h), rel=1e-6, abs=1e-8)


UNIFORM = torch.distributions.Categorical(logits=torch.zeros(2, 3, dtype=torch.float64))
OF_THE_LOGITS = {
    "selected_logprobs": (lambda z: selected_logprobs(z, [[2, 0]], 0.8), lambda p: p.log_prob(torch.tensor([2, 0]))),
    "entropy": (lambda z: entropy(z, 0.8), lambda p: p.entropy()),
    "full_kl": (lambda z: full_kl(z, [[[0.0] * 3] * 2], 0.8), lambda p: torch.distributions.kl_divergence(p, UNIFORM)),
}


@pytest.mark.parametrize("name", OF_THE_LOGITS)
def test_the_gradients_of_what_the_policy_says_are_torchs(name):
    mine, theirs = OF_THE_LOGITS[name]
    rows = [[0.3, -1.0, 2.0], [1.5, 0.2, -0.7]]
    leaves = lifted(rows)
    logits = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
    wanted = theirs(torch.distributions.Categorical(logits=logits / 0.8)).sum()
    wanted.backward()
    result = total(mine([leaves])[0])
    assert value_of(result) == pytest.approx(wanted.item(), rel=1e-12)
    slopes = logits.grad.flatten().tolist()
    assert gradients(result, leaves[0] + leaves[1]) == pytest.approx(slopes, rel=1e-11, abs=1e-14)


# ── complaints ──────────────────────────────────────────────────────────────────────────────────────────────────────
ONE, REAL, NONE = [[0.0]], [[True]], [[False]]


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: masked_mean(ONE, NONE), "a mean over 0 tokens"),
        (lambda: masked_mean(ONE, REAL, denominator=-1.0), "a mean over -1.0 tokens"),
        (lambda: masked_mean([[0.0, 1.0]], REAL), "wanted equal shapes"),
        (lambda: masked_mean([[0.0], [1.0]], REAL), "wanted equal shapes"),
        (lambda: masked_whiten(ONE, NONE), "a mean over 0 tokens"),
        (lambda: explained_variance(ONE, ONE, NONE), "no real token"),
        (lambda: selected_logprobs([[[0.0, 0.0]]], [[2]]), "token 2 is not in the vocabulary 0…1"),
        (lambda: selected_logprobs([[[0.0, 0.0]]], [[-1]]), "token -1"),
        (lambda: selected_logprobs([[[0.0, 0.0]]], [[0]], 0.0), "temperature is 0.0"),
        (lambda: entropy([[[0.0, 0.0]]], -1.0), "temperature is -1.0"),
        (lambda: kl_k1([[0.0, 1.0]], [[0.0]]), "argument 2 is shorter"),
        (lambda: tethered_rewards([0.0], ONE, ONE, NONE, 0.1), "response 0 has no real token"),
        (lambda: tethered_rewards([NAN], ONE, ONE, REAL, 0.1), "score 0 is nan"),
        (lambda: tethered_rewards([0.0, 0.0], ONE, ONE, REAL, 0.1), "2 scores for 1 responses"),
        (lambda: tethered_rewards([0.0], ONE, ONE, REAL, NAN), "beta is nan"),
        (lambda: gae(ONE, ONE, REAL, 1.1), "gamma is 1.1"),
        (lambda: gae(ONE, ONE, REAL, 1.0, -0.1), "lam is -0.1"),
        (lambda: gae(ONE, [[0.0, 0.0]], REAL), "wanted equal shapes"),
        (lambda: clipped_policy_loss(ONE, ONE, ONE, REAL, 0.0), "clip_range is 0.0"),
        (lambda: clipped_value_loss(ONE, ONE, ONE, REAL, -0.2), "clip_range is -0.2"),
        (lambda: bradley_terry_loss([], []), "no pair"),
    ],
)
def test_what_cannot_be_used_is_named(call, complaint):
    with pytest.raises(ValueError, match=complaint):
        call()
