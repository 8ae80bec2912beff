"""What a run is about: its model, its prompts, its judges; and these as its policy reads them.

    Task ─ open_policy ─▶ the policy at its start        source_of, heldout_source ─▶ prompts in its token ids

Read next: `tasks.py`, from settings to a task; `session.py`, which trains one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from tether.batch import Reward
from tether.config import RunSettings
from tether.errors import ConfigError
from tether.loading import Source, layer_count
from tether.models import LanguagePolicy, load_policy
from tether.prompts import PromptSet, PromptSource, fit
from tether.recomputation import recompute_layers
from tether.worlds.world import World

EVALUATED_AT_ONCE = 64
"""Held-out prompts in a batch, at most."""


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
    tokenizer: PreTrainedTokenizerBase | None = None
    """Where the model is an object; else it is the checkpoint's own."""
    trackers: tuple[object, ...] = ()
    """Trackers as objects, beside those that the settings name."""

    @staticmethod
    def of_world(world: World, settings: RunSettings, judges: Judges) -> Task:
        """The world's model, or the one that the settings name, on the world's prompts."""
        train, heldout = PromptSet(world.train_prompts), PromptSet(world.heldout_prompts)
        return Task(settings.model.source or world.model, train, heldout, judges)


def open_policy(
    source: Source, settings: RunSettings, tokenizer: PreTrainedTokenizerBase | None = None
) -> LanguagePolicy:
    """The policy at its start, with its frozen reference."""
    model = settings.model
    policy = load_policy(
        source,
        tokenizer,
        mode=model.mode,
        top_layers=model.trained_layers(layer_count(source)),
        lora_rank=model.lora_rank,
        dtype=model.dtype,
        critic=model.critic,
    )
    if model.gradient_checkpointing:
        recompute_layers(policy.mode.model)
    return policy


def source_of(
    given: PromptSet, policy: LanguagePolicy, settings: RunSettings, per_batch: int, copies: int = 1
) -> PromptSource:
    """These prompts, tokenised for the policy; those that are too long by the settings' rule."""
    room = policy.context - settings.ppo.sampling.max_new_tokens
    if room < 1:
        raise ConfigError(
            f"ppo.sampling.max_new_tokens is {settings.ppo.sampling.max_new_tokens} and the model's context "
            f"{policy.context} tokens, which leaves no room for a prompt; try {policy.context // 2}"
        )
    fitted = fit(given, policy.tokenizer, max_tokens=room, too_long=settings.data.too_long)
    policy.require_embedded(fitted.ids)
    kept = fitted.prompts
    return PromptSource(
        kept.prompts, fitted.ids, per_batch, copies, settings.ppo.seed, policy.pad, kept.columns, fitted.note
    )


def heldout_source(heldout: PromptSet, policy: LanguagePolicy, settings: RunSettings) -> PromptSource:
    """The held-out prompts of the evaluation, in batches that hold each once."""
    given = heldout.first(settings.evaluation.prompts)
    return source_of(given, policy, settings, len(given)).in_equal_batches(EVALUATED_AT_ONCE)
