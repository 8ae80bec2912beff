"""The mathematics of RLHF with PPO on nested lists: the functions of `tether.numerics`, in the standard library.

Same names, same arguments, same order, and not a line in common: `numerics` is proved against these in value and in
gradient. Slow and obvious on purpose.

    §1 means under a mask        masked_mean · masked_whiten
    §2 what the policy says      selected_logprobs · entropy
    §3 how far it has drifted    kl_k1 · kl_k2 · kl_k3 · full_kl
    §4 score + string            tethered_rewards
    §5 surprise                  gae
    §6 the proximal step         clipped_policy_loss · truncated_weights
    §7 the baseline              clipped_value_loss · explained_variance
    §8 preferences               bradley_terry_loss

Conventions, the same everywhere: grids are `[batch][response]`, with a third axis for the vocabulary where it is named.
`mask` is True for a real response token; a masked number, NaN included, reaches no result, and masked entries of a
result are 0. KL and log-probabilities are in nats. Numbers are floats or Scalars: pass Scalars in, call `backward()` on
the result, and each of them holds its gradient. What does not fit is a ValueError. Read next: `plain.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

from tether.ladder.scalar import Number, exp, log, logsumexp, total, value_of

Row: TypeAlias = Sequence[Number]
Grid: TypeAlias = Sequence[Row]  # [batch][response]
Mask: TypeAlias = Sequence[Sequence[bool]]  # [batch][response], True = a real response token
Tokens: TypeAlias = Sequence[Sequence[int]]  # [batch][response], or [batch][prompt]


# ── §1 means under a mask ────────────────────────────────────────────────────────────────────────────────────────────
def masked_mean(x: Grid, mask: Mask, *, denominator: float | None = None) -> Number:
    """Σ x·m / Σ m over the tokens of all responses; `denominator` replaces Σ m where x is a piece of a larger batch.

    >>> masked_mean([[1.0, 2.0, math.nan]], [[True, True, False]])
    1.5
    """
    real = [number for _, _, (number,) in _real_entries(mask, x)]
    count = len(real) if denominator is None else denominator
    require(0 < count < math.inf, f"a mean over {count} tokens is undefined; pass a mask with a true entry")
    return total(real) / count


def masked_whiten(x: Grid, mask: Mask, shift_mean: bool = True) -> list[list[Number]]:
    """(x − μ)/√(σ² + 1e-8), σ² the biased variance over the real tokens; `shift_mean=False` adds μ back.

    >>> [[round(value_of(number), 6) for number in row] for row in masked_whiten([[1.0, 3.0]], [[True, True]])]
    [[-1.0, 1.0]]
    """
    mean = masked_mean(x, mask)
    scale = (_variance(x, mask) + 1e-8) ** -0.5
    return _masked_map(lambda number: (number - mean) * scale + (0.0 if shift_mean else mean), mask, x)


# ── §2 what the policy says ──────────────────────────────────────────────────────────────────────────────────────────
def selected_logprobs(logits: Sequence[Grid], tokens: Tokens, temperature: float = 1.0) -> list[list[Number]]:
    """log π(y_t | s_t) = z_y/T − log Σ_v e^{z_v/T}, per token; logits are `[batch][response][vocab]`.

    >>> selected_logprobs([[[0.0, 0.0]]], [[1]])[0][0] == math.log(1 / 2)
    True
    """

    def logprob(row: Row, token: int) -> Number:
        require(0 <= token < len(row), f"token {token} is not in the vocabulary 0…{len(row) - 1}")
        scaled = _scaled(row, temperature)
        return scaled[token] - logsumexp(scaled)

    return _pairwise(logprob, logits, tokens)


def entropy(logits: Sequence[Grid], temperature: float = 1.0) -> list[list[Number]]:
    """H(π(·|s_t)) = −Σ_v π(v) log π(v), nats per token; a token of probability 0 adds 0.

    >>> entropy([[[0.0, 0.0, -math.inf]]])[0][0] == math.log(2)
    True
    """
    return [[-_expectation(lp, lp) for lp in (log_softmax(row, temperature) for row in rows)] for rows in logits]


# ── §3 how far it has drifted ────────────────────────────────────────────────────────────────────────────────────────
def kl_k1(logprobs: Grid, ref_logprobs: Grid) -> list[list[Number]]:
    """k1 = d = log π − log ρ, per token. On samples of π its mean is KL(π‖ρ): the tether.

    >>> kl_k1([[-1.0]], [[-1.5]])
    [[0.5]]
    """
    return _pairwise(lambda logprob, ref_logprob: logprob - ref_logprob, logprobs, ref_logprobs)


def kl_k2(logprobs: Grid, ref_logprobs: Grid) -> list[list[Number]]:
    """k2 = ½d², per token.

    >>> kl_k2([[-1.0]], [[-1.5]])
    [[0.125]]
    """
    return _pairwise(lambda logprob, ref_logprob: 0.5 * (logprob - ref_logprob) ** 2, logprobs, ref_logprobs)


def kl_k3(logprobs: Grid, ref_logprobs: Grid) -> list[list[Number]]:
    """k3 = e^{−d} − 1 + d, per token: for display.

    >>> kl_k3([[-1.0]], [[-1.5]])[0][0] == math.exp(-0.5) - 0.5
    True
    """
    return _pairwise(lambda logprob, ref: exp(ref - logprob) - 1 + (logprob - ref), logprobs, ref_logprobs)


def full_kl(logits: Sequence[Grid], ref_logits: Sequence[Grid], temperature: float = 1.0) -> list[list[Number]]:
    """KL(π(·|s_t)‖ρ(·|s_t)) = Σ_v π(v) (log π(v) − log ρ(v)), per token, over the whole vocabulary.

    >>> round(value_of(full_kl([[[0.0, 0.0]]], [[[math.log(3.0), 0.0]]])[0][0]), 4)  # ½ log(½/¾) + ½ log(½/¼)
    0.1438
    """

    def divergence(row: Row, ref_row: Row) -> Number:
        logprobs, ref_logprobs = log_softmax(row, temperature), log_softmax(ref_row, temperature)
        return _expectation(logprobs, logprobs) - _expectation(logprobs, ref_logprobs)

    return _pairwise(divergence, logits, ref_logits)


# ── §4 score + string ────────────────────────────────────────────────────────────────────────────────────────────────
def tethered_rewards(
    scores: Row, logprobs: Grid, ref_logprobs: Grid, mask: Mask, beta: float, *, allow_negative_beta: bool = False
) -> list[list[Number]]:
    """R_t = −β·(log π − log ρ) at every real token, plus the score at the last one. Σ_t R_t = score − β·Σ_t d_t.

    >>> tethered_rewards([1.0], [[-1.0, -2.0, -9.0]], [[-1.5, -2.0, 0.0]], [[True, True, False]], beta=0.1)
    [[-0.05, 1.0, 0.0]]
    """
    require(math.isfinite(beta), f"beta is {beta}; wanted a finite number ≥ 0")
    require(beta >= 0 or allow_negative_beta, f"beta is {beta}; below 0 it pays for drifting: use beta ≥ 0")
    require(len(scores) == len(mask), f"got {len(scores)} scores for {len(mask)} responses; wanted one for each")
    rewards = _masked_map(lambda logprob, ref: beta * (ref - logprob), mask, logprobs, ref_logprobs)
    for number, (row, real, score) in enumerate(zip(rewards, mask, scores, strict=True)):
        require(any(real), f"response {number} has no real token to carry its score; its EOS is one")
        require(math.isfinite(value_of(score)), f"score {number} is {score}; wanted a finite number")
        last = max(t for t, is_real in enumerate(real) if is_real)
        row[last] = row[last] + score
    return rewards


# ── §5 surprise ──────────────────────────────────────────────────────────────────────────────────────────────────────
def gae(
    rewards: Grid, values: Grid, mask: Mask, gamma: float = 1.0, lam: float = 0.95
) -> tuple[list[list[Number]], list[list[Number]]]:
    """Advantages A_t = δ_t + γλ·A_{t+1}, δ_t = R_t + γ·V_{t+1} − V_t, and returns A_t + V_t (not whitened).

    t+1 is the response's next real token; after its last one V = A = 0.

    >>> gae([[0.0, 1.0]], [[0.5, 0.5]], [[True, True]])
    ([[0.475, 0.5]], [[0.975, 1.0]])
    """
    require(0 <= gamma <= 1 and 0 <= lam <= 1, f"gamma is {gamma}, lam is {lam}; wanted both in [0, 1]")
    _check_shapes(mask, rewards, values)
    advantages: list[list[Number]] = [[0.0 for _ in row] for row in mask]
    returns: list[list[Number]] = [[0.0 for _ in row] for row in mask]
    for number, row in enumerate(mask):
        next_value: Number = 0.0
        next_advantage: Number = 0.0
        for t in reversed([t for t, is_real in enumerate(row) if is_real]):
            value = values[number][t]
            delta = rewards[number][t] + gamma * next_value - value
            next_value, next_advantage = value, delta + gamma * lam * next_advantage
            advantages[number][t], returns[number][t] = next_advantage, next_advantage + value
    return advantages, returns


# ── §6 the proximal step ─────────────────────────────────────────────────────────────────────────────────────────────
def clipped_policy_loss(
    logprobs: Grid,
    old_logprobs: Grid,
    advantages: Grid,
    mask: Mask,
    clip_range: float = 0.2,
    *,
    denominator: float | None = None,
    weights: Grid | None = None,
) -> Number:
    """Token mean of w·max(−A·ratio, −A·clip(ratio, 1 − ε, 1 + ε)), ratio = π_θ/π_old: minus the lesson's L^CLIP.

    w is 1 unless given: how much more probable a token is under π_old than under what drew it.

    >>> clipped_policy_loss([[0.5]], [[0.0]], [[1.0]], [[True]])
    -1.2
    """
    require(clip_range > 0, f"clip_range is {clip_range}; wanted a number above 0, usually 0.2")

    def token_loss(logprob: Number, old_logprob: Number, advantage: Number) -> Number:
        ratio = exp(logprob - old_logprob)
        return max(-advantage * ratio, -advantage * _clip(ratio, 1 - clip_range, 1 + clip_range))

    losses = _masked_map(token_loss, mask, logprobs, old_logprobs, advantages)
    if weights is not None:
        losses = _masked_map(lambda loss, weight: loss * weight, mask, losses, weights)
    return masked_mean(losses, mask, denominator=denominator)


def truncated_weights(old_logprobs: Grid, sampler_logprobs: Grid, mask: Mask, cap: float = 2.0) -> list[list[Number]]:
    """min(π_old/q, cap) of each token: turns a mean over what q drew into one over what π_old would have drawn.

    >>> truncated_weights([[0.0, -1.0]], [[-1.0, -1.0]], [[True, True]])
    [[2.0, 1.0]]
    """
    require(cap > 0, f"cap is {cap}; wanted a number above 0, as 2")
    return _masked_map(lambda old, own: min(exp(old - own), cap), mask, old_logprobs, sampler_logprobs)


# ── §7 the baseline ──────────────────────────────────────────────────────────────────────────────────────────────────
def clipped_value_loss(
    values: Grid,
    old_values: Grid,
    returns: Grid,
    mask: Mask,
    clip_range: float | None = 0.2,
    *,
    denominator: float | None = None,
) -> Number:
    """½ · token mean of max((V − G)², (clip(V, V_old ± ε) − G)²); `clip_range=None` is the plain mean of (V − G)².

    >>> [clipped_value_loss([[1.0]], [[0.0]], [[2.0]], [[True]], clip_range) for clip_range in (0.2, None)]
    [1.62, 1.0]
    """
    if clip_range is None:
        errors = _masked_map(lambda value, target: (value - target) ** 2, mask, values, returns)
        return masked_mean(errors, mask, denominator=denominator)
    radius = clip_range
    require(radius > 0, f"clip_range is {radius}; wanted a number above 0, or None for no clip")

    def token_loss(value: Number, old_value: Number, target: Number) -> Number:
        clipped = _clip(value, old_value - radius, old_value + radius)
        return max((value - target) ** 2, (clipped - target) ** 2)

    losses = _masked_map(token_loss, mask, values, old_values, returns)
    return 0.5 * masked_mean(losses, mask, denominator=denominator)


def explained_variance(values: Grid, returns: Grid, mask: Mask) -> Number:
    """1 − Var(G − V)/Var(G), biased, over the real tokens; NaN where the returns do not vary.

    >>> explained_variance([[1.0, 2.0]], [[2.0, 4.0]], [[True, True]])
    0.75
    """
    residuals = _masked_map(lambda target, value: target - value, mask, returns, values)
    real = [value_of(target) for _, _, (target,) in _real_entries(mask, returns)]
    require(bool(real), "explained_variance got no real token; pass a mask with a true entry")
    # compared, not computed: round-off leaves the variance of equal numbers above 0
    return 1 - _variance(residuals, mask) / _variance(returns, mask) if max(real) > min(real) else math.nan


# ── §8 preferences ───────────────────────────────────────────────────────────────────────────────────────────────────
def bradley_terry_loss(chosen_scores: Row, rejected_scores: Row) -> Number:
    """−mean log σ(r_chosen − r_rejected) over pairs; log 2 for a model that cannot tell.

    >>> bradley_terry_loss([1.0], [1.0]) == math.log(2)
    True
    """
    margins = [chosen - rejected for chosen, rejected in zip(chosen_scores, rejected_scores, strict=True)]
    require(bool(margins), "bradley_terry_loss got no pair; wanted at least one")
    # log σ(m) = min(m, 0) − log(1 + e^{−|m|}): no exponent is positive, so nothing overflows
    return total(log(1 + exp(min(m, -m))) - min(m, 0.0) for m in margins) / len(margins)


# ── what the sections share ──────────────────────────────────────────────────────────────────────────────────────────
def _scaled(logits: Row, temperature: float) -> list[Number]:
    require(temperature > 0, f"temperature is {temperature}; wanted a number above 0")
    return [z / temperature for z in logits]


def log_softmax(logits: Row, temperature: float = 1.0) -> list[Number]:
    """log π(v) = z_v/T − log Σ_u e^{z_u/T}, for every v."""
    scaled = _scaled(logits, temperature)
    log_total = logsumexp(scaled)
    return [z - log_total for z in scaled]


def _expectation(logprobs: Row, numbers: Row) -> Number:
    """Σ_v e^{logprob}·number; a token of probability 0 adds 0, a NaN stays one."""
    pairs = zip(logprobs, numbers, strict=True)
    return total(exp(logprob) * number for logprob, number in pairs if value_of(logprob) != -math.inf)


def _variance(x: Grid, mask: Mask) -> Number:
    mean = masked_mean(x, mask)
    return masked_mean(_masked_map(lambda number: (number - mean) ** 2, mask, x), mask)


def _clip(x: Number, low: Number, high: Number) -> Number:
    return max(low, min(x, high))


def _pairwise(function: Callable[..., Number], *grids: Sequence[Sequence[object]]) -> list[list[Number]]:
    return [[function(*cell) for cell in zip(*rows, strict=True)] for rows in zip(*grids, strict=True)]


def _masked_map(function: Callable[..., Number], mask: Mask, *grids: Grid) -> list[list[Number]]:
    """The function of the grids' numbers at every real token, 0 elsewhere."""
    result: list[list[Number]] = [[0.0 for _ in row] for row in mask]
    for number, t, cell in _real_entries(mask, *grids):
        result[number][t] = function(*cell)
    return result


def _real_entries(mask: Mask, *grids: Grid) -> list[tuple[int, int, tuple[Number, ...]]]:
    """(response, t, the grids' numbers there) for every real token, in order."""
    _check_shapes(mask, *grids)
    return [
        (number, t, tuple(grid[number][t] for grid in grids))
        for number, row in enumerate(mask)
        for t, is_real in enumerate(row)
        if is_real
    ]


def _check_shapes(mask: Mask, *grids: Grid) -> None:
    wanted = [len(row) for row in mask]
    for grid in grids:
        got = [len(row) for row in grid]
        require(got == wanted, f"got rows of {got} numbers for a mask with rows of {wanted}; wanted equal shapes")


def require(condition: bool, complaint: str) -> None:
    """Raise a ValueError with this complaint where the condition does not hold."""
    if not condition:
        raise ValueError(complaint)
