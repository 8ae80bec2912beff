# ruff: noqa: ARG001, ARG005  (stand-ins keep the signature of what they stand in for)
"""Faults on purpose: each failure of the catalogue planted where it would really be, to see what the checks say of it.

    with planted("kl_sign"): train_run(task, faulty_settings(settings, "kl_sign"), …)

A fault is the error itself in the real code path (a swapped difference, a shared weight, a sampler that cuts the tail),
never a forged number. Faults of models and samplers stand in `fault_models.py`, what flawed rewards pay for in
`fault_rewards.py`. Nothing here is used by a run that asks for no fault. Read next: `failures.toml`, which says of each
what it plants.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

import tether.advantages
import tether.fault_models as models
import tether.rewards
import tether.session
import tether.trainer
import tether.update
from tether.alarms import PLANTED, check_fault
from tether.batch import Prompt, Reward, Rollout, Scores
from tether.config import RunSettings
from tether.fault_models import Plant, replace_attribute
from tether.fault_rewards import fondness
from tether.numerics import gae, kl_k3, tethered_rewards
from tether.optimiser import Optimiser
from tether.reward_model import RewardModel
from tether.trainer import Run
from tether.worlds.nano_gold import STRENGTHS, Flaw


@contextmanager
def planted(name: str | None) -> Iterator[None]:
    """Plant a fault for the duration; None plants nothing. Raises ConfigError for a name that is no fault."""
    with ExitStack() as stack:
        if check_fault(name) is not None:
            stack.callback(PLANTED.reset, PLANTED.set(name))
            PLANTS.get(str(name), _nothing)(stack)
        yield


def faulty_settings(settings: RunSettings, name: str | None) -> RunSettings:
    """The settings with those changed that the fault consists of."""
    if name is None or check_fault(name) not in SETTINGS:
        return settings
    values = settings.dump()
    for path, value in SETTINGS[name](settings).items():
        room = values
        *parents, knob = path.split(".")
        for parent in parents:
            room = room[parent]  # type: ignore[assignment]
        room[knob] = value
    return RunSettings.model_validate(values)


def _nothing(stack: ExitStack) -> None:
    """The fault is in the settings alone."""


# ── settings ────────────────────────────────────────────────────────────────────────────────────────────────────────
def _weaker(run: RunSettings) -> Mapping[str, object]:
    """A flaw of the reward is climbed on a weak string alone."""
    return {"ppo.reward.beta": 0.1 * run.ppo.reward.beta}


USUAL_LENGTH = 14.0
"""Words of a nano reply at the start."""


SETTINGS: Mapping[str, Callable[[RunSettings], Mapping[str, object]]] = {
    **dict.fromkeys(("buzzwords", "sycophancy", "hedging", "exploit_token", "length"), _weaker),
    "over_optimised": lambda run: {"ppo.reward.beta": 0.02 * run.ppo.reward.beta},
    "too_many_epochs": lambda run: {
        "ppo.update.epochs": 16,
        "ppo.update.early_stop_kl": None,
        "ppo.update.learning_rate": 8.0 * run.ppo.update.learning_rate,
    },
    "no_string": lambda run: {"ppo.reward.beta": 0.0, "ppo.reward.controller": "fixed"},
    "value_too_big": lambda run: {"ppo.update.value_learning_rate": 1e-9},
    "adam_spike": lambda run: {"ppo.update.adam_epsilon": 1e-12, "ppo.update.early_stop_kl": None},
    "controller_hunts": lambda run: {
        "ppo.reward.controller": "adaptive",
        "ppo.reward.target_kl": 2.0,
        "ppo.reward.horizon": 2 * run.ppo.batch_size,
    },
}


# ── rewards and advantages ──────────────────────────────────────────────────────────────────────────────────────────
def _room_4(make: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]) -> Plant:
    """Another way to put score and string together: (scores, log π, log π_ref, mask, β) → rewards."""

    def plant(stack: ExitStack) -> None:
        def wrong(
            scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, beta: float, **named: bool
        ) -> Tensor:
            return torch.where(mask, make(scores, logprobs, ref_logprobs, mask, float(beta)), 0.0)

        replace_attribute(stack, tether.rewards, "tethered_rewards", lambda original: wrong)

    return plant


def _dense(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, beta: float) -> Tensor:
    return scores[:, None] - beta * (logprobs - ref_logprobs)


def _averaged(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, beta: float) -> Tensor:
    lengths = mask.sum(dim=1, keepdim=True)
    return tethered_rewards(scores, logprobs / lengths, ref_logprobs / lengths, mask, beta)


def _by_k3(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, beta: float) -> Tensor:
    return tethered_rewards(scores, logprobs, logprobs, mask, beta) - beta * kl_k3(logprobs, ref_logprobs)


def _on_the_first(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, beta: float) -> Tensor:
    rewards = -beta * (logprobs - ref_logprobs)
    return torch.cat([rewards[:, :1] + scores[:, None], rewards[:, 1:]], dim=1)


def _whiten_over_pads(stack: ExitStack) -> None:
    def wrong(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
        return torch.where(mask, (x - x.mean()) / (x.var(correction=0) + 1e-8).sqrt(), 0.0)

    replace_attribute(stack, tether.advantages, "masked_whiten", lambda original: wrong)


def _wrong_advantages(stack: ExitStack) -> None:
    def wrong(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
        early = torch.cat([values[:, :1], values[:, :-1]], dim=1)
        return gae(rewards.roll(-1, dims=1), early, mask, gamma, lam)

    replace_attribute(stack, tether.advantages, "gae", lambda original: wrong)


# ── the reward ──────────────────────────────────────────────────────────────────────────────────────────────────────
def _reward(change: Callable[[Reward], Reward]) -> Plant:
    """Another reward in place of the run's own."""

    def plant(stack: ExitStack) -> None:
        def build(original: Callable[..., Run]) -> Callable[..., Run]:
            def run(policy: object, reward: Reward, *rest: object, **named: object) -> Run:
                return original(policy, change(reward), *rest, **named)

            return run

        replace_attribute(stack, tether.session, "Run", build)

    return plant


def _flawed(flaw: Flaw, strength: float = 1.0, usual: float = 0.0) -> Callable[[Reward], Reward]:
    """The reward and, for each thing that the flaw counts beyond the usual, some points more.

    A score far off 0 in all replies alike would be another fault: the value head's error then shakes the shared trunk.
    """

    def change(reward: Reward) -> Reward:
        def wrong(prompts: Sequence[Prompt], responses: Sequence[str], **columns: Sequence[object]) -> list[float]:
            given = reward(prompts, responses, **columns)
            counts = [fondness(flaw, x, y) for x, y in zip(prompts, responses, strict=True)]
            points = strength * STRENGTHS[flaw]
            return [score + points * (count - usual) for score, count in zip(given, counts, strict=True)]

        return wrong

    return change


def _constant(reward: Reward) -> Reward:
    return lambda prompts, responses, **columns: [0.5] * len(responses)


def _drifting(reward: Reward) -> Reward:
    """The gain of a reward model grows by 2 % at each call."""
    assert isinstance(reward, RewardModel), "only a reward model has a gain"
    changed, original, calls = copy.copy(reward), reward.normalise, [0]

    def wrong(raw: Tensor) -> list[float]:
        calls[0] += 1
        return [1.02 ** calls[0] * score for score in original(raw)]

    changed.normalise = wrong  # type: ignore[method-assign]
    return changed


def _prompt_alone(reward: Reward) -> Reward:
    """A reward model is handed empty replies, in the rollout as elsewhere."""
    assert isinstance(reward, RewardModel), "only a reward model is asked again"
    changed = copy.copy(reward)

    class Deaf(type(reward)):  # type: ignore[misc]
        def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str], **columns: object) -> list[float]:
            return list(reward(prompts, [""] * len(responses), **columns))  # type: ignore[arg-type]

        def score_rollout(self, rollout: Rollout) -> list[float]:
            return self(rollout.prompts.texts, rollout.texts)

    changed.__class__ = Deaf
    return changed


def _shifted(reward: Reward) -> Reward:
    """Scores come back one row late."""

    def wrong(prompts: Sequence[Prompt], responses: Sequence[str], **columns: Sequence[object]) -> list[float]:
        given = list(reward(prompts, responses, **columns))
        return given[-1:] + given[:-1]

    return wrong


def _skewed(reward: Reward) -> Reward:
    """A reward model reads the first third of each response on the path of the rollout."""
    assert isinstance(reward, RewardModel), "only a reward model has a path of its own"
    changed = copy.copy(reward)

    def wrong(rollout: Rollout) -> list[float]:
        texts = [text[: len(text) // 3] for text in rollout.texts]
        return list(reward(rollout.prompts.texts, texts))

    changed.score_rollout = wrong  # type: ignore[method-assign]
    return changed


def _pays_entropy(per_nat: float) -> Plant:
    """The mean surprisal of a response, less the batch's, is added to its score: E[−∇log π·log π] is the gradient of
    the entropy. The entropy of the states that it went through would not do: it is no gain of the token drawn there.
    """

    def plant(stack: ExitStack) -> None:
        def wrap(original: Callable[[Reward, Rollout], Scores]) -> Callable[[Reward, Rollout], Scores]:
            def wrong(reward: Reward, rollout: Rollout) -> Scores:
                given = original(reward, rollout)
                mean = -rollout.logprobs.sum(dim=1) / rollout.response_mask.sum(dim=1)
                return Scores(given.scores + per_nat * (mean - mean.mean()), given.metrics)

            return wrong

        _reward(lambda reward: lambda prompts, responses, **columns: reward(prompts, responses, **columns))(stack)
        replace_attribute(stack, tether.trainer, "score", wrap)

    return plant


# ── the optimiser ───────────────────────────────────────────────────────────────────────────────────────────────────
def _nan(stack: ExitStack) -> None:
    """One entry of a gradient becomes NaN in every seventh step."""
    calls = [0]

    def wrap(original: Callable[[Optimiser], Tensor]) -> Callable[[Optimiser], Tensor]:
        def wrong(self: Optimiser) -> Tensor:
            calls[0] += 1
            gradients = [p.grad for masters in self.masters.values() for p in masters if p.grad is not None]
            if calls[0] % 7 == 0 and gradients:
                gradients[0].view(-1)[0] = torch.nan
            return original(self)

        return wrong

    replace_attribute(stack, Optimiser, "gradient_norm", wrap)


def _value_dead(stack: ExitStack) -> None:
    def wrap(original: Callable[[Optimiser], Tensor]) -> Callable[[Optimiser], Tensor]:
        def wrong(self: Optimiser) -> Tensor:
            for master in self.masters.get("value", []):
                master.grad = None
            return original(self)

        return wrong

    replace_attribute(stack, Optimiser, "gradient_norm", wrap)


def _policy_still(stack: ExitStack) -> None:
    """The optimiser steps copies of the weights, which nobody reads."""

    def wrap(original: Callable[[Optimiser, Tensor], None]) -> Callable[[Optimiser, Tensor], None]:
        def wrong(self: Optimiser, norm: Tensor) -> None:
            weights = [weight for group in self.groups.values() for weight in group]
            before = [weight.detach().clone() for weight in weights]
            original(self, norm)
            with torch.no_grad():
                for weight, kept in zip(weights, before, strict=True):
                    weight.copy_(kept)

        return wrong

    replace_attribute(stack, Optimiser, "step", wrap)


def _wrong_update(stack: ExitStack) -> None:
    """The policy's loss has the wrong sign where it is made, so that it reports of itself that it falls."""
    replace_attribute(
        stack, tether.update, "clipped_policy_loss", lambda original: lambda *rest, **named: -original(*rest, **named)
    )


def _adam_spike(stack: ExitStack) -> None:
    """The first five updates run at twenty times the learning rate."""

    def wrap(original: Callable[[Optimiser, float], float]) -> Callable[[Optimiser, float], float]:
        calls = [0]

        def wrong(self: Optimiser, fraction_done: float) -> float:
            rate = original(self, fraction_done)
            calls[0] += 1
            if calls[0] <= 5:
                for group in self.adam.param_groups:
                    group["lr"] *= 20.0
            return rate

        return wrong

    replace_attribute(stack, Optimiser, "set_progress", wrap)


def _resume_jump(stack: ExitStack) -> None:
    def wrap(original: Callable[..., None]) -> Callable[..., None]:
        def wrong(self: Run, *rest: object) -> None:
            original(self, *rest)
            models.perturb(parameter for group in self.policy.trainable().values() for parameter in group)

        return wrong

    replace_attribute(stack, Run, "restore", wrap)


PLANTS: dict[str, Plant] = {
    "kl_sign": _room_4(lambda scores, new, ref, mask, beta: tethered_rewards(scores, ref, new, mask, beta)),
    "dense_reward": _room_4(_dense),
    "both_signs": _room_4(lambda scores, new, ref, mask, beta: -tethered_rewards(scores, new, ref, mask, beta)),
    "wrong_kl_form": _room_4(_by_k3),
    "kl_averaged": _room_4(_averaged),
    "score_misplaced": _room_4(_on_the_first),
    "whiten_over_pads": _whiten_over_pads,
    "wrong_advantages": _wrong_advantages,
    "buzzwords": _reward(_flawed("buzzwords")),
    "sycophancy": _reward(_flawed("sycophancy")),
    "hedging": _reward(_flawed("hedging")),
    "exploit_token": _reward(_flawed("exploit_token")),
    "length": _reward(_flawed("length", 3.0, USUAL_LENGTH)),
    "over_optimised": _reward(_flawed("buzzwords", 0.5)),
    "zero_variance_scores": _reward(_constant),
    "reward_drift": _reward(_drifting),
    "reward_skew": _reward(_skewed),
    "reward_shifted": _reward(_shifted),
    "reward_reads_prompt_only": _reward(_prompt_alone),
    "policy_still": _policy_still,
    "wrong_update": _wrong_update,
    "entropy_collapse": _pays_entropy(-10.0),
    "entropy_explosion": _pays_entropy(10.0),
    "nan": _nan,
    "value_dead": _value_dead,
    "adam_spike": _adam_spike,
    "resume_jump": _resume_jump,
} | models.PLANTS
