"""The loop: prompts → responses → scores → tethered rewards → advantages → PPO, over and over.

`Run` holds what one training run is made of; `advance` is one update, the rooms in their order. Everything that an
update draws at random is a function of (seed, purpose, step), so a run that is given back a snapshot of itself
(`snapshot.py`) continues from that step as if never stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from tether.advantages import estimate
from tether.batch import Experience, Outcome, Policy, Reward, Rewards, Rollout, Scores
from tether.config import PPOSettings
from tether.optimiser import Optimiser, numbered
from tether.prompts import PromptSource
from tether.rewards import Beta, controller, tether
from tether.rollouts import sample
from tether.runtime.ranks import here
from tether.runtime.sharding import whole
from tether.scores import score
from tether.snapshot import Snapshot, load_weights, plain, restore_states, states_of, unplain
from tether.streams import permutation, uniforms
from tether.update import update


@dataclass(frozen=True)
class Record:
    """All that one update leaves behind, for whoever keeps it."""

    step: int
    metrics: dict[str, float]
    rollout: Rollout
    scores: Scores
    rewards: Rewards
    experience: Experience
    outcome: Outcome


def _look_away(run: Run, rollout: Rollout, scores: Scores, rewards: Rewards, experience: Experience) -> None:
    """Watches nothing."""


@dataclass
class Run:
    """A policy on its string: what trains, against what, on which prompts, with which knobs."""

    policy: Policy
    reward: Reward
    prompts: PromptSource
    settings: PPOSettings
    keep: Callable[[Record], None]
    """Called once an update, after it: stores, prints."""
    watch: Callable[[Run, Rollout, Scores, Rewards, Experience], None] = _look_away
    """Called in every update before the policy moves, while it is still the one that sampled: the place for checks."""
    beta: Beta = field(init=False)
    optimiser: Optimiser = field(init=False)
    step: int = 0
    """Updates done."""

    def __post_init__(self) -> None:
        self.beta = controller(self.settings.reward)
        self.optimiser = Optimiser(self.policy.trainable(), self.settings.update)

    def uniforms(self, keys: tuple[int, ...]) -> torch.Tensor:
        """The random numbers that this update's responses are drawn with, [batch, max_new_tokens]."""
        return uniforms(self.settings.seed, "response", self.step, keys, self.settings.sampling.max_new_tokens)

    def orders(self, rows: int) -> torch.Tensor:
        """The order of responses in each epoch of this update, [epochs, rows]."""
        epochs = range(self.settings.update.epochs)
        return torch.stack([permutation(self.settings.seed, "order", rows, self.step, epoch) for epoch in epochs])

    def snapshot(self) -> Snapshot:
        """The state that the next update starts from."""
        weights = {name: whole(weight.detach()) for name, weight in numbered(self.policy.trainable()).items()}
        states = states_of(reward=self.reward)
        return Snapshot(self.step, weights, self.optimiser.state(), plain(self.beta), states)

    def restore(self, snapshot: Snapshot) -> None:
        """Take up a snapshot of this run. Raises ModelError or RunError where it is of another one."""
        self.beta = unplain(snapshot.beta, self.beta)
        load_weights(self.policy, snapshot.weights)
        self.optimiser.load_state(snapshot.optimiser)
        restore_states(snapshot.states, reward=self.reward)
        self.step = snapshot.step


def train(run: Run, between: Callable[[int], None] | None = None) -> None:
    """Advance the run to its last step. `between` is called with the updates done, before each update and at the end:
    the place for evaluations.
    """
    while run.step < run.settings.steps:
        if between is not None:
            between(run.step)
        run.keep(advance(run))
    if between is not None:
        between(run.step)


def advance(run: Run) -> Record:
    """One update."""
    started, knobs = time.perf_counter(), run.settings
    warming_up = run.step < knobs.update.value_warmup
    learning_rate = run.optimiser.set_progress(run.step / knobs.steps)

    prompts = run.prompts.batch(run.step)
    rollout = sample(run.policy, prompts, run.uniforms(prompts.keys), knobs.sampling)
    scores = score(run.reward, rollout)
    rewards = tether(scores, rollout, run.beta.value, knobs.reward)
    experience = estimate(rewards, rollout, knobs.advantage)
    run.watch(run, rollout, scores, rewards, experience)
    outcome = update(
        run.policy, experience, run.optimiser, run.orders(len(rollout)), knobs.update,
        temperature=knobs.sampling.temperature, policy_frozen=warming_up, ranks=here(),
    )  # fmt: skip

    metrics = {"learning_rate": learning_rate} | _join(rollout, scores, rewards, experience, outcome)
    metrics["seconds/total"] = time.perf_counter() - started
    metrics["tokens/per_second"] = metrics["tokens/generated"] / metrics["seconds/total"]
    record = Record(run.step, metrics, rollout, scores, rewards, experience, outcome)
    run.beta = run.beta.after(metrics["kl/mean"], len(rollout))
    run.step += 1
    return record


def _join(*rooms: Rollout | Scores | Rewards | Experience | Outcome) -> dict[str, float]:
    return {name: number for room in rooms for name, number in room.metrics.items()}
