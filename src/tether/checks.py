"""Invariants of one update: identities that hold in every right run, whatever it learns, and fail at once in others.

    rollout, scores, rewards, experience ──▶ check(moment) ──▶ alarms

They recompute, in float64 and by other means than the rooms, what the rooms made: what stands on each token, where
responses begin and end, credit, moments. There is nothing to tune but round-off. They know no model and no history.
Read next: `probes.py` (what models must keep to), `honesty.py` (whether responses are samples of the policy).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from tether.alarms import Alarm
from tether.batch import Experience, Outcome, Rewards, Rollout, Scores
from tether.config import PPOSettings

CREDIT_ROWS = 4
"""Responses whose returns are computed anew in each update."""
REWARD_ROUND_OFF = 2e-5
"""Relative to the largest number of the update: what float32 sums of some hundred numbers may lose."""
NOISE_EXPLAINS = 30.0
"""The largest difference of a batch's tokens, over the root mean square of two passes: it has a long tail."""
MOMENT_ROUND_OFF = 1e-3
"""Of the whitened advantages' mean and standard deviation."""


@dataclass(frozen=True)
class Tolerance:
    """Round-off of log-probabilities, nats: how far two passes may differ that do the same in another order."""

    start: float
    """Between policy and reference at the start: they run the same steps, so nothing but a library's freedom."""
    logprob: float
    """Root mean square over tokens, between two passes with other padding, or between sampler and policy."""
    ratio: float
    """Largest |ratio − 1| of a token, of the first minibatch."""

    @staticmethod
    def of(dtype: torch.dtype) -> Tolerance:
        """That of weights in this precision; measured on clean runs, with a margin of five or more."""
        half = dtype in (torch.bfloat16, torch.float16)
        return Tolerance(0.05, 0.08, 0.5) if half else Tolerance(1e-4, 1e-3, 1e-2)


@dataclass(frozen=True)
class Moment:
    """One update, seen after the rollout is scored and credited and before the policy moves."""

    step: int
    settings: PPOSettings
    beta: float
    """What the controller says β is."""
    rollout: Rollout
    scores: Scores
    rewards: Rewards
    experience: Experience
    tolerance: Tolerance
    stops: frozenset[int] = field(default_factory=frozenset)
    """Tokens that end a response; empty where they are not known."""


def check(moment: Moment) -> list[Alarm]:
    """Every invariant of the moment that does not hold; where a number is not finite, that alone is told."""
    bad = list(check_finite(moment))
    checks: tuple[Callable[[Moment], Iterator[Alarm]], ...] = (
        check_layout, check_kl, check_rewards, check_whitening, check_credit,
    )  # fmt: skip
    return bad or [alarm for every in checks for alarm in every(moment)]


def check_start(moment: Moment, noise: float = 0.0) -> Iterator[Alarm]:
    """log π = log π_ref on the first batch, before any update: the policy starts as its reference.

    `noise`: nats by which equal passes are known to differ, by dropout or padding; what that explains is not told.
    """
    rollout = moment.rollout
    distance = _real(rollout, rollout.logprobs - rollout.ref_logprobs).abs().max()
    divergence = _real(rollout, rollout.full_kl).max()
    least = max(moment.tolerance.start, NOISE_EXPLAINS * noise)
    if distance > least or divergence > least:
        kl = float(rollout.kl.mean())
        yield Alarm(
            "wrong_reference",
            f"before any update |log π − log π_ref| is up to {float(distance):.3g} nats a token (wanted 0, at most "
            f"{moment.tolerance.start:g}); K is {kl:.3g} nats a response",
            {"largest": float(distance), "largest_full_kl": float(divergence), "kl": kl},
        )


def check_finite(moment: Moment) -> Iterator[Alarm]:
    """No number of a real token or a response is NaN or infinite."""
    rollout, experience = moment.rollout, moment.experience
    tensors = {
        "log π": rollout.logprobs, "log π_ref": rollout.ref_logprobs, "values": rollout.values,
        "rewards": moment.rewards.rewards, "advantages": experience.advantages, "returns": experience.returns,
    }  # fmt: skip
    for name, tensor in tensors.items():
        broken = int((~torch.isfinite(_real(rollout, tensor))).sum())
        if broken:
            yield Alarm("nan", f"{broken} of the update's {name} are not finite", {"tensor": name, "count": broken})


def check_layout(moment: Moment) -> Iterator[Alarm]:
    """Responses begin after the last prompt token, and end with a stop token or fill the room they had."""
    rollout, sequences = moment.rollout, moment.rollout.sequences
    shifted = sequences.prompt_lengths != rollout.prompts.lengths
    if bool(shifted.any()):
        row = int(shifted.nonzero()[0])
        given, kept = int(rollout.prompts.lengths[row]), int(sequences.prompt_lengths[row])
        yield Alarm(
            "prompt_in_mask",
            f"response {row} begins after {kept} tokens, and its prompt has {given}",
            {"row": row, "prompt_tokens": given, "begins_after": kept, "rows": int(shifted.sum())},
        )
        return
    if moment.stops:
        yield from _check_ends(moment)


def _check_ends(moment: Moment) -> Iterator[Alarm]:
    rollout, sequences = moment.rollout, moment.rollout.sequences
    stops = torch.tensor(sorted(moment.stops), device=sequences.ids.device)
    is_stop = torch.isin(sequences.responses, stops) & sequences.response_mask
    last = sequences.response_lengths - 1
    ends = is_stop.gather(1, last[:, None]).squeeze(1)
    complaints = {
        "finished but its last token is no stop token": rollout.finished & ~ends,
        "going on after a stop token": is_stop.sum(dim=1) > ends.long(),
        "cut before the room it had was full": ~rollout.finished
        & (sequences.response_lengths < moment.settings.sampling.max_new_tokens),
    }
    for what, rows in complaints.items():
        if bool(rows.any()):
            yield Alarm(
                "no_eos_credit",
                f"{int(rows.sum())} of {len(rollout)} responses are {what}",
                {"rows": int(rows.sum()), "first": int(rows.nonzero()[0])},
            )


def check_kl(moment: Moment) -> Iterator[Alarm]:
    """The K that is logged and steers β is the mean over responses of Σ_t log π − log π_ref; β is the controller's."""
    rollout = moment.rollout
    logged, own = rollout.metrics.get("kl/mean"), float(_kl(rollout).sum(dim=1).mean())
    if logged is not None and abs(logged - own) > 1e-4 * (1.0 + abs(own)):
        ratio = logged / own if own else float("nan")
        yield Alarm(
            "kl_averaged" if 0.0 < ratio < 1.0 else "wrong_kl_form",
            f"the K that is logged is {logged:.4g}, Σ log π − log π_ref is {own:.4g} nats a response",
            {"logged": logged, "summed": own},
        )
    if abs(moment.rewards.beta - moment.beta) > 1e-9 * (1.0 + abs(moment.beta)):
        yield Alarm(
            "wrong_kl_form",
            f"rewards were made with β = {moment.rewards.beta:g} and the controller says {moment.beta:g}",
            {"used": moment.rewards.beta, "controller": moment.beta},
        )


def check_rewards(moment: Moment) -> Iterator[Alarm]:
    """R_t = −β·(log π − log π_ref) on every token, and the score on the last real one; so Σ_t R_t = score − βΣℓ."""
    rollout, given = moment.rollout, moment.rewards.rewards.double()
    kl, last, scores = _kl(rollout), _last(rollout), expected_scores(moment)
    wanted = -moment.beta * kl + last * scores[:, None]
    if moment.scores.token_rewards is not None:
        wanted = wanted + _clear(rollout, moment.scores.token_rewards.double())
    if moment.settings.reward.whiten:
        wanted = _whitened(wanted, rollout, keep_mean=True)
    scale = 1.0 + float(scores.abs().max()) + moment.beta * float(kl.abs().max())
    error = float(_real(rollout, given - wanted).abs().max())
    if error <= REWARD_ROUND_OFF * scale:
        return
    reason, seen = _explain_rewards(moment, given, kl, last, scores, REWARD_ROUND_OFF * scale)
    total, right = (float(tensor.sum(dim=1).mean()) for tensor in (_clear(rollout, given), _clear(rollout, wanted)))
    yield Alarm(reason, f"{seen}: Σ R is {total:.4g} a response, wanted score − β·Σ ℓ = {right:.4g}",
                {"sum": total, "wanted": right, "largest_error": error})  # fmt: skip


def expected_scores(moment: Moment) -> Float[Tensor, "batch"]:
    """The scores after the settings' rule for responses that were cut, float64."""
    rule, rollout = moment.settings.reward, moment.rollout
    scores = moment.scores.scores.double()
    last_value = (_clear(rollout, rollout.values_at(moment.beta).double()) * _last(rollout)).sum(dim=1)
    cut = {
        "replace": torch.full_like(scores, rule.missing_eos_score), "subtract": scores - abs(rule.missing_eos_score),
        "zero": torch.zeros_like(scores), "bootstrap": last_value, "keep": scores,
    }[rule.missing_eos]  # fmt: skip
    return torch.where(rollout.finished, scores, cut)


def _explain_rewards(
    moment: Moment, given: Tensor, kl: Tensor, last: Tensor, scores: Tensor, close: float
) -> tuple[str, str]:
    """Which error gives these rewards: exactly one of the known ones, or what a regression on ℓ and score says."""
    beta, lengths = moment.beta, moment.rollout.sequences.response_lengths.double()[:, None]
    everywhere = scores[:, None].expand_as(kl)
    known = {
        ("kl_sign", "the string's part is +β·ℓ"): beta * kl + last * everywhere,
        ("both_signs", "score and string are both negated"): beta * kl - last * everywhere,
        ("both_signs", "the score is negated"): -beta * kl - last * everywhere,
        ("dense_reward", "the score stands on every token"): -beta * kl + everywhere,
        ("dense_reward", "the score is spread over the tokens"): -beta * kl + everywhere / lengths,
        ("kl_averaged", "the string's part is divided by the length"): -beta * kl / lengths + last * everywhere,
        ("wrong_kl_form", "the string's part of all tokens stands on the last"): last
        * (everywhere - beta * kl.sum(dim=1, keepdim=True)),
        ("wrong_kl_form", "the string has no part in them"): last * everywhere,
        ("wrong_kl_form", "the string's part is −β·k3"): -beta * (torch.expm1(-kl) + kl) + last * everywhere,
        ("wrong_kl_form", "the string's part is −β·k2"): -beta * 0.5 * kl**2 + last * everywhere,
    }
    for (reason, seen), candidate in known.items():
        if float(_real(moment.rollout, given - candidate).abs().max()) <= close:
            return reason, seen
    return _regress_rewards(moment, given, kl, last, everywhere, close)


def _regress_rewards(
    moment: Moment, given: Tensor, kl: Tensor, last: Tensor, scores: Tensor, close: float
) -> tuple[str, str]:
    """What is left of R_t beside the string: the score elsewhere, something like the score, or something like ℓ."""
    rest, mask = _clear(moment.rollout, given + moment.beta * kl), moment.rollout.response_mask
    before = mask & (last == 0.0)
    if not bool(before.any()) or float(rest[before].abs().max()) <= close:
        return "score_misplaced", _last_token(rest.sum(dim=1), scores[:, 0], close)
    if float((rest.sum(dim=1) - scores[:, 0]).abs().max()) <= 10.0 * close:
        return "score_misplaced", "the score stands on other tokens than the last"
    if _alike(rest[before], scores[before]) > _alike(rest[before], kl[before]):
        return "dense_reward", "tokens before the last carry some of the score"
    slope = float((given[before] * kl[before]).sum() / (kl[before] ** 2).sum())
    seen = f"the string's part is about {slope:+.3g}·ℓ, wanted {-moment.beta:+.3g}·ℓ"
    return ("kl_sign" if slope > 0.0 else "wrong_kl_form"), seen


def _last_token(given: Float[Tensor, "batch"], scores: Float[Tensor, "batch"], close: float) -> str:
    """What the last real tokens carry in place of the score."""
    times = float(given @ scores) / max(float(scores @ scores), 1e-12)
    if float((given - times * scores).abs().max()) <= 10.0 * close and abs(times) > 1e-6:
        return f"the last real token carries {times:.3g} × the score"
    return "the last real token does not carry the score"


def _alike(a: Float[Tensor, "tokens"], b: Float[Tensor, "tokens"]) -> float:
    """|cosine| of two lists of numbers; 0 where one is all 0."""
    size = float(a.norm() * b.norm())
    return abs(float(a @ b)) / size if size > 0.0 else 0.0


def check_whitening(moment: Moment) -> Iterator[Alarm]:
    """Whitened advantages have masked mean 0 and masked standard deviation 1."""
    surprise = moment.experience.returns_at(moment.beta) - moment.rollout.values_at(moment.beta)
    unwhitened = _real(moment.rollout, surprise.double())
    scale = float(unwhitened.std(correction=0))
    if not moment.settings.advantage.whiten or scale <= 1e-3 * (1e-4 + float(unwhitened.abs().max())):
        return
    advantages = _real(moment.rollout, moment.experience.advantages.double())
    mean, spread = float(advantages.mean()), float(advantages.std(correction=0))
    if abs(mean) > MOMENT_ROUND_OFF or abs(spread - 1.0) > MOMENT_ROUND_OFF + 1e-8 / scale**2:
        yield Alarm(
            "whiten_over_pads",
            f"the advantages' masked mean is {mean:.4g} and their masked deviation {spread:.4g}; wanted 0 and 1",
            {"mean": mean, "std": spread},
        )


def check_credit(moment: Moment) -> Iterator[Alarm]:
    """A_t = Σ_k (γλ)^k δ_{t+k} and G = A + V, on a few rows, token by token."""
    knobs, rollout, experience = moment.settings.advantage, moment.rollout, moment.experience
    error, size = 0.0, 1.0
    for row in range(min(CREDIT_ROWS, len(rollout))):
        length = int(rollout.sequences.response_lengths[row])
        rewards, values, returns = (
            tensor[row, :length].double().tolist()
            for tensor in (moment.rewards.rewards, rollout.values_at(moment.beta), experience.returns_at(moment.beta))
        )
        advantage, later = 0.0, 0.0
        for t in reversed(range(length)):
            advantage = rewards[t] + knobs.gamma * later - values[t] + knobs.gamma * knobs.lam * advantage
            later = values[t]
            error = max(error, abs(returns[t] - (advantage + values[t])))
            size = max(size, abs(returns[t]), abs(values[t]))
    if error <= 1e-4 * size and not list(check_whitening(moment)):
        error = _policy_credit_error(moment)
    if error > 1e-4 * size:
        yield Alarm("wrong_advantages", f"returns or advantages are off by up to {error:.3g}", {"largest_error": error})


def _policy_credit_error(moment: Moment) -> float:
    """How far the advantages are from the returns minus the values, whitened where the settings say so."""
    rollout, experience = moment.rollout, moment.experience
    wanted = experience.returns_at(moment.beta).double() - rollout.values_at(moment.beta).double()
    if moment.settings.advantage.whiten:
        if float(_real(rollout, wanted).std(correction=0)) < 1e-3:
            return 0.0  # round-off of the returns is as large as what is whitened
        wanted = _whitened(wanted, rollout)
    error = float(_real(rollout, experience.advantages.double() - wanted).abs().max())
    return error if error > MOMENT_ROUND_OFF * (1.0 + float(_real(rollout, wanted).abs().max())) else 0.0


def check_outcome(outcome: Outcome, tolerance: Tolerance) -> Iterator[Alarm]:
    """The first minibatch's ratio is 1, and no step was skipped."""
    first = outcome.metrics.get("ppo/ratio_first", 0.0)
    if not first <= tolerance.ratio:
        yield Alarm(
            "first_ratio",
            f"|ratio − 1| is up to {first:.3g} before any step, wanted {tolerance.ratio:g} at most",
            {"largest": first},
        )
    skipped = outcome.skipped_steps
    if skipped:
        yield Alarm("nan", f"{skipped} optimiser steps were not finite", {"skipped": skipped})


# ── what the checks share ───────────────────────────────────────────────────────────────────────────────────────────
def _real(rollout: Rollout, x: Tensor) -> Tensor:
    """The entries of real tokens, flat."""
    return x[rollout.response_mask]


def _clear(rollout: Rollout, x: Tensor) -> Tensor:
    return torch.where(rollout.response_mask, x, 0.0)


def _kl(rollout: Rollout) -> Float[Tensor, "batch response"]:
    """ℓ_t in float64, 0 where masked."""
    return _clear(rollout, rollout.logprobs.double() - rollout.ref_logprobs.double())


def _last(rollout: Rollout) -> Float[Tensor, "batch response"]:
    """1 on the last real token of each row."""
    places = torch.arange(rollout.response_mask.shape[1], device=rollout.response_mask.device)
    return (places == rollout.sequences.response_lengths[:, None] - 1).double()


def _whitened(x: Tensor, rollout: Rollout, *, keep_mean: bool = False) -> Tensor:
    real = _real(rollout, x)
    mean = real.mean()
    whitened = (x - mean) / (real.var(correction=0) + 1e-8).sqrt()
    return _clear(rollout, whitened + mean if keep_mean else whitened)
