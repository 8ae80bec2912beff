"""The mathematics of RLHF with PPO, as pure functions of tensors, in the order in which data flows.

    §1 means under a mask        masked_mean · masked_whiten
    §2 what the policy says      selected_logprobs · entropy
    §3 how far it has drifted    kl_k1 · kl_k2 · kl_k3 · full_kl
    §4 score + string            tethered_rewards
    §5 surprise                  gae
    §6 the proximal step         clipped_policy_loss · truncated_weights
    §7 the baseline              clipped_value_loss · explained_variance
    §8 preferences               bradley_terry_loss

Conventions, the same everywhere:
  axes      `[batch, response]`; a vocabulary axis comes last.
  mask      boolean, True = a real response token. A masked value, NaN and infinity included, reaches neither a
            result nor a gradient. Masked entries of a result are 0.
  unit      nats for log-probabilities, entropies and divergences; the score's own unit for rewards.
  precision half precision is computed in float32; float32 and float64 stay what they are.
  purity    no argument is changed, no random number is drawn.

It knows no model, configuration, device or log. Read next: `rewards.py`, `advantages.py`, `update.py`, which call it,
and `ladder/plain.py`, the same functions in the standard library, against which these are proved.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tether.errors import EmptyMaskError, InputError, NonFiniteError, ShapeError

WHITEN_EPSILON = 1e-8  # added to the variance, in the squared unit of x (OpenAI lm-human-preferences, TRL)


# ── §1 means under a mask ───────────────────────────────────────────────────────────────────────────────────────────
def masked_mean(
    x: Float[Tensor, "*axes"], mask: Bool[Tensor, "*axes"], *, denominator: float | Tensor | None = None
) -> Float[Tensor, ""]:
    """Mean of x over the true entries of the mask, all axes together: Σ x·m / Σ m.

    Averaged over tokens, never over responses first: a long response weighs more than a short one.
    `denominator` replaces Σ m where x is one piece of a larger batch (a micro-batch, a rank): pass the number of true
    entries of the whole, and the pieces' results add up to the mean of the whole.

    Raises ShapeError where x and mask differ, EmptyMaskError where no entry is true and no denominator is given.

    >>> masked_mean(torch.tensor([[1.0, 2.0, float("nan")]]), torch.tensor([[True, True, False]]))
    tensor(1.5000)
    """
    _check_same_shape(x=x, mask=mask)
    _check_mask(mask)
    total = _clear(x, mask).sum()
    if denominator is None:
        _check_not_empty(mask)
        return total / mask.sum()
    return total / _checked_denominator(denominator)


def masked_whiten(
    x: Float[Tensor, "*axes"], mask: Bool[Tensor, "*axes"], shift_mean: bool = True
) -> Float[Tensor, "*axes"]:
    """(x − μ)/√(σ² + 1e-8), with μ and the biased variance σ² = Σ(x−μ)²·m / Σ m over the true entries.

    `shift_mean=False` adds μ back: the spread becomes 1 and the mean stays (OpenAI's and TRL's meaning of the name).
    Masked entries become 0. One true entry alone becomes 0 (or keeps its value).

    Raises ShapeError, EmptyMaskError. Ziegler et al. 2019 (code, `utils.core.whiten`).

    >>> masked_whiten(torch.tensor([1.0, 3.0, 99.0]), torch.tensor([True, True, False]))
    tensor([-1.,  1.,  0.])
    """
    mean = masked_mean(x, mask)
    variance = masked_mean((_clear(x, mask) - mean) ** 2, mask)
    whitened = (_clear(x, mask) - mean) * torch.rsqrt(variance + WHITEN_EPSILON)
    return _clear(whitened if shift_mean else whitened + mean, mask)


# ── §2 what the policy says ─────────────────────────────────────────────────────────────────────────────────────────
def selected_logprobs(
    logits: Float[Tensor, "batch response vocab"], tokens: Int[Tensor, "batch response"], temperature: float = 1.0
) -> Float[Tensor, "batch response"]:
    """log π(y_t | s_t) = z_y/T − log Σ_v e^{z_v/T}, in nats, per token: log_softmax(z/T) at the chosen token.

    The temperature T is part of the policy: sampler, old, new and reference log-probabilities take the same one.

    Raises ShapeError; InputError where T ≤ 0 or a token lies outside the vocabulary.

    >>> selected_logprobs(torch.tensor([[[0.0, 0.0]]]), torch.tensor([[1]]))
    tensor([[-0.6931]])
    """
    _check_temperature(temperature)
    if logits.ndim != 3 or tokens.shape != logits.shape[:2]:
        raise ShapeError(
            f"selected_logprobs got logits {_shape(logits)} and tokens {_shape(tokens)}; "
            "wanted [batch, response, vocab] and [batch, response]"
        )
    _check_tokens(tokens, logits.shape[-1])
    scaled = _precise(logits) / temperature
    chosen = scaled.gather(-1, tokens.long().unsqueeze(-1)).squeeze(-1)
    return chosen - scaled.logsumexp(dim=-1)


def entropy(logits: Float[Tensor, "*axes vocab"], temperature: float = 1.0) -> Float[Tensor, "*axes"]:
    """H(π(·|s_t)) = −Σ_v π(v) log π(v), in nats, per token, of the policy at temperature T.

    A token of probability 0 (a logit of −∞) adds 0. Raises InputError where T ≤ 0.

    >>> entropy(torch.tensor([0.0, 0.0, float("-inf")]))
    tensor(0.6931)
    """
    _check_temperature(temperature)
    logprobs = F.log_softmax(_precise(logits) / temperature, dim=-1)
    return -_expectation(logprobs, logprobs)


# ── §3 how far it has drifted ───────────────────────────────────────────────────────────────────────────────────────
def kl_k1(logprobs: Float[Tensor, "*axes"], ref_logprobs: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """k1 = d = log π(y_t|s_t) − log ρ(y_t|s_t), nats per token; may be negative.

    On tokens sampled from π its mean is KL(π‖ρ), without bias. In the reward it is the tether; as a loss its expected
    gradient is zero. Raises ShapeError. Schulman 2020, «Approximating KL divergence».

    >>> kl_k1(torch.tensor([-1.0]), torch.tensor([-1.5]))
    tensor([0.5000])
    """
    _check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    return _precise(logprobs) - _precise(ref_logprobs)


def kl_k2(logprobs: Float[Tensor, "*axes"], ref_logprobs: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """k2 = ½d², nats per token, never negative; biased in value.

    As a loss on policy, ½(Σ_t d_t)² has the gradient ∇KL of the response, as k1 in the reward has; Σ_t ½d_t² has that
    of the KL at the visited states alone, blind to the states that a token leads to. Raises ShapeError. Schulman 2020.

    >>> kl_k2(torch.tensor([-1.0]), torch.tensor([-1.5]))
    tensor([0.1250])
    """
    return 0.5 * kl_k1(logprobs, ref_logprobs) ** 2


def kl_k3(logprobs: Float[Tensor, "*axes"], ref_logprobs: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """k3 = e^{−d} − 1 + d, nats per token, never negative, unbiased for KL(π‖ρ) where ρ covers π. For display only.

    Put into the reward it is no tether: its gradient is reverse minus forward KL. Raises ShapeError. Schulman 2020.

    >>> kl_k3(torch.tensor([-1.0]), torch.tensor([-1.5]))
    tensor([0.1065])
    """
    difference = kl_k1(logprobs, ref_logprobs)
    return torch.expm1(-difference) + difference


def full_kl(
    logits: Float[Tensor, "*axes vocab"], ref_logits: Float[Tensor, "*axes vocab"], temperature: float = 1.0
) -> Float[Tensor, "*axes"]:
    """KL(π(·|s_t)‖ρ(·|s_t)) = Σ_v π(v) (log π(v) − log ρ(v)), nats per token, over the whole vocabulary.

    Exact at each state, so free of the noise of k1; both distributions are taken at temperature T. A token to which
    the policy gives probability 0 adds 0. Raises ShapeError; InputError where T ≤ 0.

    >>> full_kl(torch.tensor([0.0, 0.0]), torch.tensor([3.0, 1.0]).log())
    tensor(0.1438)
    """
    _check_temperature(temperature)
    _check_same_shape(logits=logits, ref_logits=ref_logits)
    logprobs = F.log_softmax(_precise(logits) / temperature, dim=-1)
    ref_logprobs = F.log_softmax(_precise(ref_logits) / temperature, dim=-1)
    return _expectation(logprobs, logprobs) - _expectation(logprobs, ref_logprobs)


# ── §4 score + string ───────────────────────────────────────────────────────────────────────────────────────────────
def tethered_rewards(
    scores: Float[Tensor, "batch"],
    logprobs: Float[Tensor, "batch response"],
    ref_logprobs: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    beta: float | Tensor,
    *,
    allow_negative_beta: bool = False,
) -> Float[Tensor, "batch response"]:
    """R_t = −β·(log π_θ(y_t|s_t) − log π_ref(y_t|s_t)) + score·1[t = T]: the string at every token, the score once.

    T is the last true position of the row's mask. Summed over a response: Σ_t R_t = score − β·Σ_t d_t, exactly.
    `logprobs` are those of the policy that sampled the response. The result carries no gradient by itself; pass
    detached log-probabilities.

    Raises ShapeError; EmptyMaskError where a row has no token to carry its score; NonFiniteError where a score is NaN
    or infinite; InputError where β < 0 (a slingshot, not a string), unless `allow_negative_beta=True` asks for it by
    name. Ouyang et al. 2022, eq. 2; Ziegler et al. 2019, eq. 2.

    >>> row = torch.tensor([[-1.0, -2.0, float("nan")]]), torch.tensor([[-1.5, -2.0, float("nan")]])
    >>> tethered_rewards(torch.tensor([1.0]), *row, torch.tensor([[True, True, False]]), beta=0.1)
    tensor([[-0.0500,  1.0000,  0.0000]])
    """
    _check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask)
    _check_mask(mask)
    _check_rows(mask)
    _check_scores(scores, mask)
    _check_beta(beta, allow_negative_beta)
    string = -beta * kl_k1(logprobs, ref_logprobs)
    carries_score = F.one_hot(_last_token(mask), mask.shape[1]).bool()
    destination = torch.where(carries_score, _precise(scores).unsqueeze(1), 0.0)
    return _clear(string, mask) + destination


# ── §5 surprise ─────────────────────────────────────────────────────────────────────────────────────────────────────
def gae(
    rewards: Float[Tensor, "batch response"],
    values: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Float[Tensor, "batch response"], Float[Tensor, "batch response"]]:
    """Advantages A_t = δ_t + γλ·A_{t+1} with δ_t = R_t + γ·V_{t+1} − V_t, and returns G_t = A_t + V_t.

    V_t is the value before y_t is emitted; after a response's last token V = 0 and A = 0. Masked positions are
    transparent: t+1 is the row's next real token. Neither result is whitened; both are 0 where masked.

    Raises ShapeError; InputError where γ or λ leaves [0, 1]. Schulman et al. 2016, eq. 11–16.

    >>> gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]]), torch.tensor([[True, True]]))[0]
    tensor([[0.4750, 0.5000]])
    """
    _check_same_shape(rewards=rewards, values=values, mask=mask)
    _check_mask(mask)
    _check_rows(mask)
    _check_unit_interval(gamma=gamma, lam=lam)
    rewards, values = _clear(rewards, mask), _clear(values, mask)
    next_value = next_advantage = torch.zeros_like(values[:, 0]) if values.shape[1] else values.sum(1)
    reversed_advantages = []
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(mask[:, t], delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        reversed_advantages.append(next_advantage)
    advantages = torch.stack(reversed_advantages[::-1], dim=1) if reversed_advantages else rewards
    advantages = _clear(advantages, mask)
    return advantages, advantages + values


# ── §6 the proximal step ────────────────────────────────────────────────────────────────────────────────────────────
def clipped_policy_loss(
    logprobs: Float[Tensor, "batch response"],
    old_logprobs: Float[Tensor, "batch response"],
    advantages: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    clip_range: float = 0.2,
    *,
    denominator: float | Tensor | None = None,
    weights: Float[Tensor, "batch response"] | None = None,
) -> Float[Tensor, ""]:
    """L(θ) = E_t[w_t·max(−Â_t·r_t, −Â_t·clip(r_t, 1−ε, 1+ε))], r_t = π_θ(y_t|s_t)/π_θold(y_t|s_t): minus L^CLIP.

    w_t = 1 unless `weights` says how much more probable a token is under π_θold than under what drew it
    (`truncated_weights`). The mean runs over the true tokens; with `denominator`, the global token count, the losses of
    micro-batches and ranks add up to that of the whole batch. The gradient flows through `logprobs` alone where the
    others are detached. It vanishes for a token whose ratio has left the clip on the side that its advantage pulls to.

    Raises ShapeError; EmptyMaskError; InputError where ε ≤ 0. Schulman et al. 2017, eq. 7.

    >>> logprobs, old_logprobs = torch.tensor([[0.5]]), torch.tensor([[0.0]])
    >>> clipped_policy_loss(logprobs, old_logprobs, torch.tensor([[1.0]]), torch.tensor([[True]]))  # −1·1.2
    tensor(-1.2000)
    """
    _check_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    _check_mask(mask)
    _check_clip_range(clip_range)
    ratio = kl_k1(_clear(logprobs, mask), _clear(old_logprobs, mask)).exp()
    advantages = _clear(advantages, mask)
    clipped_ratio = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    losses = torch.maximum(-advantages * ratio, -advantages * clipped_ratio)
    if weights is not None:
        _check_same_shape(weights=weights, mask=mask)
        losses = _clear(weights, mask) * losses
    return masked_mean(losses, mask, denominator=denominator)


def truncated_weights(
    old_logprobs: Float[Tensor, "batch response"],
    sampler_logprobs: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    cap: float = 2.0,
) -> Float[Tensor, "batch response"]:
    """w_t = min(π_θold(y_t|s_t)/q(y_t|s_t), cap), 0 where masked: corrects an expectation over q to one over π_θold.

    The cap bounds the variance and biases towards q, only where q missed π by more than that. No gradient.

    Raises ShapeError; EmptyMaskError; InputError where the cap is not above 0. Ionides 2008, «Truncated importance
    sampling»; Espeholt et al. 2018, ρ̄.

    >>> q, mask = torch.tensor([[0.1, 0.2]]).log(), torch.tensor([[True, True]])
    >>> truncated_weights(torch.tensor([[0.5, 0.1]]).log(), q, mask, cap=2.0)
    tensor([[2.0000, 0.5000]])
    """
    _check_same_shape(old_logprobs=old_logprobs, sampler_logprobs=sampler_logprobs, mask=mask)
    _check_mask(mask)
    if not cap > 0.0:
        raise InputError(f"cap is {cap}; wanted a number above 0, as 2")
    ratio = kl_k1(_clear(old_logprobs.detach(), mask), _clear(sampler_logprobs.detach(), mask)).exp()
    return torch.where(mask, ratio.clamp(max=cap), 0.0)


# ── §7 the baseline ─────────────────────────────────────────────────────────────────────────────────────────────────
def clipped_value_loss(
    values: Float[Tensor, "batch response"],
    old_values: Float[Tensor, "batch response"],
    returns: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    clip_range: float | None = 0.2,
    *,
    denominator: float | Tensor | None = None,
) -> Float[Tensor, ""]:
    """½·E_t[max((V_t − G_t)², (clip(V_t, V_old ± ε) − G_t)²)], in the squared unit of the score.

    `clip_range=None` is the plain MSE of the lesson, E_t[(V_t − G_t)²], without clip and without the ½.
    ε is in the score's unit. `denominator` as in `clipped_policy_loss`.

    Raises ShapeError; EmptyMaskError; InputError where ε ≤ 0. OpenAI baselines, ppo2; the ½ as in TRL and CleanRL.

    >>> arguments = torch.tensor([[1.0]]), torch.tensor([[0.0]]), torch.tensor([[2.0]]), torch.tensor([[True]])
    >>> clipped_value_loss(*arguments), clipped_value_loss(*arguments, clip_range=None)  # ½·(0.2 − 2)², (1 − 2)²
    (tensor(1.6200), tensor(1.))
    """
    _check_same_shape(values=values, old_values=old_values, returns=returns, mask=mask)
    _check_mask(mask)
    values, returns = _clear(values, mask), _clear(returns, mask)
    squared_error = (values - returns) ** 2
    if clip_range is None:
        return masked_mean(squared_error, mask, denominator=denominator)
    _check_clip_range(clip_range)
    old_values = _clear(old_values, mask)
    clipped_values = old_values + (values - old_values).clamp(-clip_range, clip_range)
    worst = torch.maximum(squared_error, (clipped_values - returns) ** 2)
    return 0.5 * masked_mean(worst, mask, denominator=denominator)


def explained_variance(
    values: Float[Tensor, "batch response"],
    returns: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
) -> Float[Tensor, ""]:
    """1 − Var(G − V)/Var(G) over the true tokens: 1 = a perfect baseline, 0 = as good as a constant, < 0 = worse.

    NaN where the returns do not vary, since nothing is there to explain. Raises ShapeError, EmptyMaskError.

    >>> explained_variance(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 4.0]]), torch.tensor([[True, True]]))
    tensor(0.7500)
    """
    _check_same_shape(values=values, returns=returns, mask=mask)
    returns_variance = _masked_variance(returns, mask)  # round-off may leave it above 0 where all returns are equal
    returns_vary = torch.where(mask, returns, -torch.inf).max() > torch.where(mask, returns, torch.inf).min()
    residual_variance = _masked_variance(_clear(returns, mask) - _clear(values, mask), mask)
    return torch.where(returns_vary, 1.0 - residual_variance / returns_variance, torch.nan)


# ── §8 preferences ──────────────────────────────────────────────────────────────────────────────────────────────────
def bradley_terry_loss(
    chosen_scores: Float[Tensor, "pairs"], rejected_scores: Float[Tensor, "pairs"]
) -> Float[Tensor, ""]:
    """−E[log σ(r_chosen − r_rejected)], the mean over pairs, in nats; log 2 for a model that cannot tell.

    Raises ShapeError; EmptyMaskError where there is no pair; NonFiniteError where a score is NaN or infinite.
    Bradley & Terry 1952; Stiennon et al. 2020, eq. 1.

    >>> bradley_terry_loss(torch.tensor([1.0]), torch.tensor([1.0]))
    tensor(0.6931)
    """
    _check_same_shape(chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    if chosen_scores.numel() == 0:
        raise EmptyMaskError("bradley_terry_loss got no pair; wanted at least one")
    margin = _precise(chosen_scores) - _precise(rejected_scores)
    if not bool(torch.isfinite(margin).all()):
        raise NonFiniteError(f"bradley_terry_loss got a non-finite margin in pair {_first_bad(margin)}; check scores")
    return -F.logsigmoid(margin).mean()


# ── what the sections share ─────────────────────────────────────────────────────────────────────────────────────────
def _precise(x: Tensor) -> Tensor:
    """float32 or better: half precision and integers are lifted, float32 and float64 stay."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _clear(x: Tensor, mask: Tensor) -> Tensor:
    """x with 0 where masked; neither the value nor the gradient of a masked entry passes, NaN included."""
    return torch.where(mask, _precise(x), 0.0)


def _expectation(logprobs: Tensor, values: Tensor) -> Tensor:
    """Σ_v e^{logprobs}·values, where an outcome of probability 0 adds 0 to the value and to the gradient; NaN stays."""
    possible = logprobs != -torch.inf
    return (logprobs.exp() * torch.where(possible, values, 0.0)).sum(dim=-1)


def _masked_variance(x: Tensor, mask: Tensor) -> Tensor:
    mean = masked_mean(x, mask)
    return masked_mean((_clear(x, mask) - mean) ** 2, mask)


def _last_token(mask: Tensor) -> Tensor:
    """Index of the last true entry of each row. A row without one is an EmptyMaskError."""
    empty = ~mask.any(dim=1)
    if bool(empty.any()):
        raise EmptyMaskError(
            f"row {int(empty.nonzero()[0])} of the mask has no true token, so nothing carries its score; "
            "an empty response still has one action, its EOS"
        )
    positions = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, positions, -1).amax(dim=1)


# ── complaints ──────────────────────────────────────────────────────────────────────────────────────────────────────
def _shape(x: Tensor) -> list[int]:
    return list(x.shape)


def _first_bad(x: Tensor) -> int:
    return int((~torch.isfinite(x)).nonzero()[0])


def _check_same_shape(**tensors: Tensor) -> None:
    if len({t.shape for t in tensors.values()}) > 1:
        got = ", ".join(f"{name} {_shape(t)}" for name, t in tensors.items())
        raise ShapeError(f"shapes differ: {got}; wanted one shape for all")


def _check_mask(mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise InputError(f"mask has dtype {mask.dtype}; wanted torch.bool, True = a real token: try mask.bool()")


def _check_rows(mask: Tensor) -> None:
    if mask.ndim != 2:
        raise ShapeError(f"got tensors of shape {_shape(mask)}; wanted [batch, response], one row a response")


def _check_not_empty(mask: Tensor) -> None:
    if not bool(mask.any()):
        raise EmptyMaskError(f"the mask {_shape(mask)} has no true entry; a mean over no token is undefined")


def _checked_denominator(denominator: float | Tensor) -> float | Tensor:
    if not 0.0 < float(denominator) < float("inf"):
        raise InputError(f"denominator is {float(denominator)}; wanted the number of real tokens of the whole batch")
    return denominator


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise InputError(f"temperature is {temperature}; wanted a number above 0 (greedy decoding has no policy ratio)")


def _check_tokens(tokens: Tensor, vocab: int) -> None:
    if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= vocab):
        raise InputError(
            f"tokens range over {int(tokens.min())}…{int(tokens.max())}; wanted 0…{vocab - 1}. "
            "Fill padding with any valid token (the mask hides it), not with −100"
        )


def _check_scores(scores: Tensor, mask: Tensor) -> None:
    if scores.ndim != 1 or scores.shape[0] != mask.shape[0]:
        raise ShapeError(f"scores {_shape(scores)}; wanted one score a response: [{mask.shape[0]}]")
    if not bool(torch.isfinite(_precise(scores)).all()):
        bad = _first_bad(_precise(scores))
        raise NonFiniteError(f"score {bad} is {float(scores[bad])}; wanted a finite number for every response")


def _check_beta(beta: float | Tensor, allow_negative: bool) -> None:
    if not bool(torch.isfinite(torch.as_tensor(beta)).all()):
        raise NonFiniteError(f"beta is {beta}; wanted a finite number ≥ 0")
    lowest = float(beta.min()) if isinstance(beta, Tensor) else beta
    if lowest < 0 and not allow_negative:
        raise InputError(
            f"beta is {lowest}; a negative beta pays the policy for drifting from its reference. "
            "Use beta ≥ 0, or pass allow_negative_beta=True to study the sign error"
        )


def _check_unit_interval(**numbers: float) -> None:
    for name, number in numbers.items():
        if not 0.0 <= number <= 1.0:
            raise InputError(f"{name} is {number}; wanted a number in [0, 1]")


def _check_clip_range(clip_range: float) -> None:
    if not clip_range > 0:
        raise InputError(f"clip_range is {clip_range}; wanted a number above 0, usually 0.2")
