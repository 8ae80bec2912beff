"""From a recipe to a finished run folder: world, judges, policy, training, evaluation.

`open_judges` yields the reward model, its hold-out twin and gold; `train_run` trains one policy and leaves everything
in `root/name`. The jobs above (`demo.py`, `sweep.py`, `training.py`) are made of these.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import numpy as np
import yaml
from pydantic import ValidationError
from rich.console import Console
from transformers.utils import logging as transformers_logging

from tether import __version__
from tether.batch import Reward, plain_text
from tether.config import RunSettings
from tether.errors import ConfigError
from tether.evaluation import Judged, evaluate, summarise
from tether.loading import Source
from tether.models import LanguagePolicy, load_policy
from tether.prompts import PromptSet, PromptSource, encode
from tether.recording import Keeper, Screen
from tether.records import Sample
from tether.runtime.memory import keep_freed_memory
from tether.store import RunStore
from tether.trainer import Run, train
from tether.worlds.real import cache_folder
from tether.worlds.world import World

EVALUATED_AT_ONCE = 64


def load_recipe(name: str) -> RunSettings:
    """The settings of a recipe that ships with tether (`smollm2`, `nano`), or of a YAML file.

    Raises ConfigError where there is no such recipe or a knob is unknown or out of bounds; all faults at once.
    """
    shipped = files("tether").joinpath(f"recipes/{name}.yaml")
    path = Path(name)
    if not shipped.is_file() and not path.is_file():
        raise ConfigError(f"there is no recipe {name!r} and no such file; recipes: nano, smollm2")
    text = shipped.read_text("utf-8") if shipped.is_file() else path.read_text("utf-8")
    try:
        return RunSettings.model_validate(yaml.safe_load(text) or {})
    except (ValidationError, yaml.YAMLError) as error:
        raise ConfigError(f"{name}: {error}") from error


@dataclass(frozen=True)
class Judges:
    """The reward that is optimised, and those that are not."""

    reward: Reward
    unseen: Mapping[str, Reward] = field(default_factory=dict)
    """Those that the policy never climbs, by the name that their metrics carry: `holdout`, `gold`."""

    @property
    def all(self) -> Mapping[str, Reward]:
        """Every judge by the name that its metrics carry."""
        return {"score": self.reward, **self.unseen}


@dataclass(frozen=True)
class Task:
    """What a run is about, whether a world's own or brought by the user: from what, on what, against what."""

    model: Source
    """The SFT checkpoint: the policy's start and the reference."""
    train: PromptSet
    heldout: PromptSet
    judges: Judges

    @staticmethod
    def of_world(world: World, settings: RunSettings, judges: Judges) -> Task:
        """The world's model, or the one that the settings name, on the world's prompts."""
        train, heldout = PromptSet(world.train_prompts), PromptSet(world.heldout_prompts)
        return Task(settings.model.source or world.model, train, heldout, judges)


def prepare_process() -> None:
    """What a program that trains wants of its process: freed memory kept, and no bars but its own."""
    keep_freed_memory()
    transformers_logging.disable_progress_bar()


def open_policy(source: Source, settings: RunSettings) -> LanguagePolicy:
    """The policy at its start, with its frozen reference."""
    model = settings.model
    return load_policy(
        source,
        mode=model.mode,
        top_layers=model.top_layers,
        lora_rank=model.lora_rank,
        dtype=model.dtype,
    )


def source_of(
    given: PromptSet, policy: LanguagePolicy, settings: RunSettings, per_batch: int, copies: int = 1
) -> PromptSource:
    """These prompts, tokenised for the policy."""
    room = policy.context - settings.ppo.sampling.max_new_tokens
    ids = encode(given.prompts, policy.tokenizer, max_tokens=room)
    return PromptSource(given.prompts, ids, per_batch, copies, settings.ppo.seed, policy.pad, given.columns)


def heldout_source(heldout: PromptSet, policy: LanguagePolicy, settings: RunSettings) -> PromptSource:
    """The held-out prompts of the evaluation, in batches that cover each once."""
    count = min(settings.evaluation.prompts, len(heldout))
    per_batch = min(count, EVALUATED_AT_ONCE)
    return source_of(heldout.first(count - count % per_batch), policy, settings, per_batch)


def judges_folder(world: World, settings: RunSettings) -> Path:
    """Where the two reward models of these settings are kept: equal settings and seeds share them."""
    recipe = {
        "version": __version__,
        "world": world.name,
        "model": settings.model.source or world.model.name,
        "preferences": settings.preferences.model_dump(),
        "sampling": settings.ppo.sampling.model_dump(),
        "seed": settings.ppo.seed,
    }
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    return cache_folder() / "rewards" / f"{world.name}-{digest}"


@dataclass
class Session:
    """One training run with its evaluations, from the first sample to the finished folder."""

    task: Task
    settings: RunSettings
    policy: LanguagePolicy
    store: RunStore
    console: Console
    reference: Judged | None = None
    """The evaluation before the first update, which is of the reference."""

    def train(self) -> None:
        """All updates, with an evaluation before the first, every n, and after the last."""
        knobs = self.settings.ppo
        prompts = source_of(
            self.task.train, self.policy, self.settings,
            knobs.batch_size // knobs.sampling.samples_per_prompt, knobs.sampling.samples_per_prompt,
        )  # fmt: skip
        heldout = heldout_source(self.task.heldout, self.policy, self.settings)
        title = f"{self.store.name} · β = {knobs.reward.beta:g}"
        with Screen(self.console, knobs.steps, title) as screen:
            keeper = Keeper(self.store, screen, self.task.judges.unseen, self.settings.keep_samples)
            run = Run(self.policy, self.task.judges.reward, prompts, knobs, keeper)
            train(run, self._evaluator(heldout))

    def _evaluator(self, heldout: PromptSource) -> Callable[[int], None]:
        def between(step: int) -> None:
            if step % self.settings.evaluation.every and step != self.settings.ppo.steps:
                return
            self.store.heartbeat(step, "evaluating")
            knobs = self.settings.ppo
            judged = evaluate(self.policy, heldout, self.task.judges.all, knobs.sampling, knobs.seed)
            self.reference = self.reference or judged
            with self.store.update(step) as entry:
                entry.metrics(summarise(judged, self.reference))
                for probe in probes(judged, step, knobs.reward.beta):
                    entry.sample(probe)

        return between


def probes(judged: Judged, step: int, beta: float) -> list[Sample]:
    """Held-out responses as samples of the split `probe`, with every judge's score in their columns."""
    samples: list[Sample] = []
    for rollout in judged.rollouts:
        for row in range(len(rollout)):
            place, mask = len(samples), rollout.response_mask[row]
            scores = {name: float(every[place]) for name, every in judged.scores.items()}
            kl = float(rollout.kl[row])
            samples.append(
                Sample(
                    step=step, row=place, prompt=plain_text(rollout.prompts.texts[row]), response=rollout.texts[row],
                    score=scores["score"], reward_total=scores["score"] - beta * kl, kl=kl,
                    tokens=rollout.sequences.responses[row][mask].cpu().numpy(),
                    logprobs=np.asarray(rollout.logprobs[row][mask].cpu()),
                    ref_logprobs=np.asarray(rollout.ref_logprobs[row][mask].cpu()),
                    split="probe", columns=scores,
                )
            )  # fmt: skip
    return samples


def train_run(task: Task, settings: RunSettings, root: Path, name: str, console: Console) -> Path:
    """Train one policy; returns its run folder. A run that ends early stays readable, and says how it ended.

    Raises RunError where the folder exists or cannot be written, and whatever training raises.
    """
    policy = open_policy(task.model, settings)
    with RunStore.create(root, name, settings.dump()) as store:
        store.put("sigma", 1.0)
        try:
            Session(task, settings, policy, store, console).train()
        except KeyboardInterrupt:
            store.heartbeat(store.last_step() or 0, "stopped by Ctrl-C", "stopped")
            raise
        except BaseException as error:
            store.heartbeat(store.last_step() or 0, f"{type(error).__name__}: {error}", "failed")
            raise
        store.heartbeat(settings.ppo.steps, "done", "finished")
        return store.path
