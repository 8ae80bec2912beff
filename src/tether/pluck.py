"""Pull at the string: no reward, β fourfold, ten updates. An attached string brings the policy back, so K falls.

    pluck(run) ──▶ K after each update, and the answer: it pulls · it pushes · it is silent · there is nothing to pull

The run's own policy is plucked and put back bit for bit; its optimiser, prompts and random streams are not touched.
What the formula of the reward says of the string is checked elsewhere (`checks.py`): this asks the whole machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from tether.batch import Policy, Prompt
from tether.config import PPOSettings
from tether.errors import InputError
from tether.models import LanguagePolicy
from tether.resume import open_trained
from tether.task import source_of
from tether.tasks import open_task
from tether.trainer import Record, Run, advance

UPDATES = 10
FACTOR = 4.0
"""β during the test over β before; at least `LEAST_BETA`."""
LEAST_BETA = 0.05
"""A run on no string is plucked on this one: the machine is asked, not the run's β."""
TAUT_ENOUGH = 0.3
"""Nats of K below which there is nothing to pull at."""
SURE = 3.0
"""Standard errors by which K must have moved."""

Answer = Literal["pulls", "pushes", "silent", "nothing to pull"]


@dataclass(frozen=True)
class Pluck:
    """What the string answered."""

    answer: Answer
    kl: tuple[float, ...]
    """K of each update's rollout, nats per response, before the update."""
    z: float
    """(K of the last three updates − K of the first) in standard errors."""
    beta: float
    """What it was plucked with."""

    @property
    def is_attached(self) -> bool:
        return self.answer in ("pulls", "nothing to pull")

    def sentence(self) -> str:
        """The answer in words."""
        moved = f"K went from {self.kl[0]:.3g} to {self.kl[-1]:.3g} nats in {len(self.kl) - 1} updates without reward"
        return {
            "pulls": f"the string pulls: {moved} at β = {self.beta:g}",
            "pushes": f"the string pushes: {moved} at β = {self.beta:g}; look for the sign of the KL penalty",
            "silent": f"the string does not answer: {moved} at β = {self.beta:g}; look for a reference that moves, "
            "or a KL that never reaches the loss",
            "nothing to pull": f"there is nothing to pull at: K is {self.kl[0]:.3g} nats",
        }[self.answer]


def pluck(run: Run, updates: int = UPDATES, factor: float = FACTOR) -> Pluck:
    """Pluck the run's policy; afterwards every weight is as it was.

    `updates` updates on the run's prompts and seed from its step on, at its first learning rate, with every score 0.
    Raises InputError for fewer than three updates.
    """
    if updates < 3:
        raise InputError(f"updates is {updates}; wanted 3 or more, so that K can be seen to move")
    groups = run.policy.trainable()
    kept = {name: [weight.detach().clone() for weight in group] for name, group in groups.items()}
    beta = max(LEAST_BETA, factor * run.beta.value)
    plucked = Run(run.policy, _nothing, run.prompts, _settings(run.settings, beta), _keep_nothing)
    plucked.step = run.step
    try:
        _forget_values(run.policy)
        rollouts = [advance(plucked).metrics for _ in range(updates + 1)]
    finally:
        with torch.no_grad():
            for name, group in groups.items():
                for weight, before in zip(group, kept[name], strict=True):
                    weight.copy_(before)
    kl = tuple(metrics["kl/full"] for metrics in rollouts)
    return _judge(kl, tuple(metrics["kl/se"] for metrics in rollouts), beta)


def pluck_run(folder: Path, console: Console) -> Pluck:
    """Pluck the policy of a run's last checkpoint; nothing in the folder changes.

    Raises RunError where there is no whole checkpoint, and what opening the run's task raises.
    """
    trained = open_trained(folder)
    settings = trained.settings
    task, knobs = open_task(settings, console), settings.ppo
    copies = knobs.sampling.samples_per_prompt
    prompts = source_of(task.train, trained.policy, settings, knobs.batch_size // copies, copies)
    run = Run(trained.policy, _nothing, prompts, knobs, _keep_nothing)
    run.restore(trained.checkpoint.snapshot())
    return pluck(run)


def _settings(knobs: PPOSettings, beta: float) -> PPOSettings:
    """A fixed string, a steady rate, no warm-up, and nothing paid for an end."""
    values = knobs.model_dump()
    values["reward"] |= {"beta": beta, "controller": "fixed", "missing_eos": "keep"}
    values["update"] |= {"schedule": "constant", "value_warmup": 0}
    return PPOSettings.model_validate(values)


@torch.no_grad()
def _forget_values(policy: Policy) -> None:
    """V ≡ 0: a head that still expects the reward would drown the string in its own errors."""
    if isinstance(policy, LanguagePolicy):
        for weight in policy.value.head.parameters():
            weight.zero_()


def _judge(kl: tuple[float, ...], errors: tuple[float, ...], beta: float) -> Pluck:
    """From the full-vocabulary K; its error is taken from that of the sampled K, which is no smaller."""
    last, error = sum(kl[-3:]) / 3.0, math.sqrt(errors[0] ** 2 + sum(e**2 for e in errors[-3:]) / 9.0)
    z = (last - kl[0]) / error if error > 0 else 0.0
    answer: Answer = "silent"
    if kl[0] < TAUT_ENOUGH and last < 2.0 * TAUT_ENOUGH:
        answer = "nothing to pull"
    elif z < -SURE or last < 0.5 * kl[0]:
        answer = "pulls"
    elif z > SURE or last > 2.0 * kl[0]:
        answer = "pushes"
    return Pluck(answer, kl, z, beta)


def _nothing(prompts: Sequence[Prompt], responses: Sequence[str], **columns: Sequence[object]) -> list[float]:
    """A reward that pays nothing."""
    del prompts, columns
    return [0.0] * len(responses)


def _keep_nothing(record: Record) -> None:
    """For updates that leave nothing behind."""
    del record
