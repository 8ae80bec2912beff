"""The formulas once more, as loops over plain numbers: slow, obvious, and sharing no line with tether.

Rows are lists of real tokens only: there is no padding and no mask here, so nothing can leak through one. Each
function works on complex numbers too, which gives exact derivatives: `slopes` is the complex step, Im f(x + ih)/h
(Squire & Trapp 1998), free of the cancellation of finite differences. Comparisons look at the real part.
"""

from __future__ import annotations

from cmath import exp, log, sqrt
from collections.abc import Callable
from itertools import chain

Number = float | complex
Rows = list[list[Number]]

STEP = 1e-40  # so small that h² vanishes beside any number of the tests


def slopes(function: Callable[..., Number], arguments: list[Rows], which: int) -> Rows:
    """∂f/∂x for every entry x of one argument."""

    def slope(row: int, column: int) -> float:
        moved = [list(entries) for entries in arguments[which]]
        moved[row][column] += 1j * STEP
        return (function(*arguments[:which], moved, *arguments[which + 1 :]) + 0j).imag / STEP

    return [[slope(row, column) for column in range(len(entries))] for row, entries in enumerate(arguments[which])]


def real(number: Number) -> float:
    return (number + 0j).real


def larger(a: Number, b: Number) -> Number:
    return a if real(a) >= real(b) else b


def clip(x: Number, low: float, high: float) -> Number:
    return low if real(x) < low else high if real(x) > high else x


def flat(rows: Rows) -> list[Number]:
    return list(chain.from_iterable(rows))


def dot(weights: Rows, rows: Rows) -> Number:
    return sum(w * x for w, x in zip(flat(weights), flat(rows), strict=True))


# ── §1 ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
def mean(rows: Rows) -> Number:
    return sum(flat(rows)) / len(flat(rows))


def variance(rows: Rows) -> Number:
    centre = mean(rows)
    return sum((x - centre) ** 2 for x in flat(rows)) / len(flat(rows))


def whiten(rows: Rows, shift_mean: bool) -> Rows:
    centre, spread = mean(rows), sqrt(variance(rows) + 1e-8)
    return [[(x - centre) / spread + (0.0 if shift_mean else centre) for x in row] for row in rows]


# ── §2, §3: one state, a list of logits ─────────────────────────────────────────────────────────────────────────────
def probabilities(logits: list[Number], temperature: float) -> list[Number]:
    weights = [exp(z / temperature) for z in logits]
    return [weight / sum(weights) for weight in weights]


def logprob(logits: list[Number], token: int, temperature: float) -> Number:
    return log(probabilities(logits, temperature)[token])


def entropy(logits: list[Number], temperature: float) -> Number:
    return -sum(p * log(p) for p in probabilities(logits, temperature))


def full_kl(logits: list[Number], ref_logits: list[Number], temperature: float) -> Number:
    pairs = zip(probabilities(logits, temperature), probabilities(ref_logits, temperature), strict=True)
    return sum(p * log(p / q) for p, q in pairs)


def k1(logprob: Number, ref_logprob: Number) -> Number:
    return logprob - ref_logprob


def k2(logprob: Number, ref_logprob: Number) -> Number:
    return (logprob - ref_logprob) * (logprob - ref_logprob) / 2


def k3(logprob: Number, ref_logprob: Number) -> Number:
    return exp(ref_logprob - logprob) - 1 - (ref_logprob - logprob)


# ── §4, §5 ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def tethered_rewards(scores: list[Number], logprobs: Rows, ref_logprobs: Rows, beta: float) -> Rows:
    rewards = []
    for score, row, ref_row in zip(scores, logprobs, ref_logprobs, strict=True):
        rewards.append([-beta * (logp - ref_logp) for logp, ref_logp in zip(row, ref_row, strict=True)])
        rewards[-1][-1] += score
    return rewards


def advantages(rewards: Rows, values: Rows, gamma: float, lam: float) -> Rows:
    """A_t = Σ_k (γλ)^k δ_{t+k}, the sum written out instead of the recursion."""
    result = []
    for row_rewards, row_values in zip(rewards, values, strict=True):
        length = len(row_rewards)
        following = [*row_values[1:], 0.0]
        surprise = [row_rewards[t] + gamma * following[t] - row_values[t] for t in range(length)]
        result.append([sum((gamma * lam) ** (s - t) * surprise[s] for s in range(t, length)) for t in range(length)])
    return result


def returns(rewards: Rows, values: Rows, gamma: float, lam: float) -> Rows:
    pairs = zip(advantages(rewards, values, gamma, lam), values, strict=True)
    return [[a + v for a, v in zip(row, row_values, strict=True)] for row, row_values in pairs]


# ── §6, §7, §8 ──────────────────────────────────────────────────────────────────────────────────────────────────────
def policy_loss(logprobs: Rows, old_logprobs: Rows, advantages: Rows, clip_range: float) -> Number:
    losses = []
    for logp, old_logp, advantage in zip(flat(logprobs), flat(old_logprobs), flat(advantages), strict=True):
        ratio = exp(logp - old_logp)
        losses.append(larger(-advantage * ratio, -advantage * clip(ratio, 1 - clip_range, 1 + clip_range)))
    return sum(losses) / len(losses)


def value_loss(values: Rows, old_values: Rows, returns: Rows, clip_range: float | None) -> Number:
    losses = []
    for value, old_value, wanted in zip(flat(values), flat(old_values), flat(returns), strict=True):
        loss = (value - wanted) ** 2
        if clip_range is not None:
            clipped = value
            if real(value - old_value) > clip_range:
                clipped = old_value + clip_range
            if real(value - old_value) < -clip_range:
                clipped = old_value - clip_range
            loss = larger(loss, (clipped - wanted) ** 2) / 2
        losses.append(loss)
    return sum(losses) / len(losses)


def explained_variance(values: Rows, returns: Rows) -> Number:
    pairs = zip(values, returns, strict=True)
    residuals = [[g - v for v, g in zip(row, row_returns, strict=True)] for row, row_returns in pairs]
    return 1 - variance(residuals) / variance(returns)


def bradley_terry_loss(chosen: list[Number], rejected: list[Number]) -> Number:
    """P(chosen wins) = e^{r_c}/(e^{r_c} + e^{r_r}), and the mean of minus its logarithm."""
    return -sum(log(exp(c) / (exp(c) + exp(r))) for c, r in zip(chosen, rejected, strict=True)) / len(chosen)
