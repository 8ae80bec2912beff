"""`tether recipes to`: a run's settings as OpenRLHF's command line, or as verl's Hydra overrides.

Names are those of `aliases.py`, read the other way; what has another unit there is computed, and what has no
counterpart is said in a comment instead of being dropped. Knows no torch. Read next: `aliases.py`, docs/moving.md.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from typing import Literal

from tether.aliases import TRANSLATED
from tether.config import RunSettings
from tether.recipe_files import load_recipe
from tether.wishes import value_of

Target = Literal["openrlhf", "verl"]
LIBRARY: Mapping[Target, str] = {"openrlhf": "OpenRLHF", "verl": "verl"}

SECTIONS: Mapping[str, str] = {
    "kl_coef": "algorithm.kl_ctrl.kl_coef", "clip_ratio": "actor_rollout_ref.actor.clip_ratio",
    "cliprange_value": "critic.cliprange_value", "ppo_epochs": "actor_rollout_ref.actor.ppo_epochs",
    "lr": "actor_rollout_ref.actor.optim.lr", "grad_clip": "actor_rollout_ref.actor.grad_clip",
    "critic_warmup": "trainer.critic_warmup",
    "ppo_max_token_len_per_gpu": "actor_rollout_ref.actor.ppo_max_token_len_per_gpu",
    "max_response_length": "data.max_response_length", "total_training_steps": "trainer.total_training_steps",
    "test_freq": "trainer.test_freq", "save_freq": "trainer.save_freq", "train_files": "data.train_files",
    "val_files": "data.val_files",
    "enable_gradient_checkpointing": "actor_rollout_ref.model.enable_gradient_checkpointing",
}  # fmt: skip
"""Where verl's configuration keeps a name."""
OTHER_MEANING = {"kl_loss_coef", "remote_rm_url", "reward_pretrain", "freezing_actor_steps"}
"""Names that `aliases.py` takes in, and that say something else, or depend on more, on the way out."""
SILENT = ("evaluation", "checks", "preferences", "runtime", "judge", "report_to", "keep_samples", "world")
"""Sections that speak of this program alone."""


def exported(settings: RunSettings, target: Target) -> str:
    """The command, a flag a line, after comments on what it does not carry over."""
    flags, notes = named_flags(settings, target)
    computed: Callable[[RunSettings], tuple[dict[str, object], list[str]]] = (
        _openrlhf if target == "openrlhf" else _verl
    )
    more, told = computed(settings)
    start = "python -m openrlhf.cli.train_ppo_ray" if target == "openrlhf" else "python -m verl.trainer.main_ppo"
    form = _flag if target == "openrlhf" else _override
    words = [form(name, value) for name, value in (flags | more).items()]
    comments = [f"# {note}" for note in [*notes, *told, *_common(settings)]]
    return "\n".join([*comments, " \\\n  ".join([start, *filter(None, words)])])


def named_flags(settings: RunSettings, target: Target) -> tuple[dict[str, object], list[str]]:
    """What the table of names carries over, number for number; the notes of names that want one."""
    flags: dict[str, object] = {}
    notes: list[str] = []
    for alias in TRANSLATED:
        if LIBRARY[target] not in alias.libraries or alias.name in OTHER_MEANING:
            continue
        value = value_of(settings, alias.path)
        name = alias.name if target == "openrlhf" else SECTIONS[alias.name]
        if value is None or name in flags:
            continue
        flags[name] = value
        if alias.note:
            notes.append(f"{name}: {alias.note}")
    return flags, notes


def _openrlhf(settings: RunSettings) -> tuple[dict[str, object], list[str]]:
    ppo, copies = settings.ppo, settings.ppo.sampling.samples_per_prompt
    flags: dict[str, object] = {
        "rollout_batch_size": ppo.batch_size // copies, "train_batch_size": ppo.batch_size // ppo.update.minibatches,
        "gamma": ppo.advantage.gamma, "temperature": ppo.sampling.temperature, "seed": ppo.seed,
        "advantage_estimator": "gae", "kl_estimator": "k1", "freezing_actor_steps": ppo.update.value_warmup or -1,
        "critic_learning_rate": ppo.update.value_learning_rate or ppo.update.learning_rate,
        "bf16": settings.model.dtype != "float32",
    }  # fmt: skip
    source = settings.reward.source
    flags |= {"remote_rm_url" if _is_function(source) else "reward_pretrain": source} if source else {}
    flags |= {"lora_rank": settings.model.lora_rank} if settings.model.mode == "lora" else {}
    flags |= {"gradient_checkpointing": True} if settings.model.gradient_checkpointing else {}
    return flags, [
        f"ppo.steps={ppo.steps}: num_episodes counts passes over the data there; choose it for as many updates",
        "remote_rm_url, of a file: its function is called reward_func there and has other arguments",
        "the reference is the model of `pretrain`; the critic is a model of its own, here a head on the policy",
    ]


def _verl(settings: RunSettings) -> tuple[dict[str, object], list[str]]:
    ppo, copies = settings.ppo, settings.ppo.sampling.samples_per_prompt
    source, rate = settings.reward.source, ppo.update.value_learning_rate or ppo.update.learning_rate
    prompts = ppo.batch_size // copies
    flags: dict[str, object] = {
        "actor_rollout_ref.model.path": settings.model.source, "critic.model.path": settings.model.source,
        "data.train_batch_size": prompts, "actor_rollout_ref.rollout.n": copies,
        "actor_rollout_ref.actor.ppo_mini_batch_size": max(1, prompts // ppo.update.minibatches),
        "critic.ppo_epochs": ppo.update.epochs, "critic.optim.lr": rate, "algorithm.gamma": ppo.advantage.gamma,
        "algorithm.lam": ppo.advantage.lam, "algorithm.adv_estimator": "gae", "algorithm.use_kl_in_reward": True,
        "algorithm.kl_penalty": "kl", "actor_rollout_ref.actor.use_kl_loss": False,
        "actor_rollout_ref.actor.entropy_coeff": 0, "actor_rollout_ref.rollout.temperature": ppo.sampling.temperature,
    }  # fmt: skip
    if source and _is_function(source):
        path, _, name = source.partition(":")
        flags |= {"custom_reward_function.path": path, "custom_reward_function.name": name}
    elif source:
        flags |= {"reward_model.enable": True, "reward_model.model.path": source}
    flags |= {"actor_rollout_ref.model.lora_rank": settings.model.lora_rank} if settings.model.mode == "lora" else {}
    return {name: value for name, value in flags.items() if value is not None}, [
        "data.train_files wants Parquet with a column `prompt` of conversations",
        "the critic is a model of its own, here a head on the policy",
    ]


def _common(settings: RunSettings) -> list[str]:
    """What neither has, where these settings use it."""
    reward, update = settings.ppo.reward, settings.ppo.update
    told = {
        f"ppo.reward.controller={reward.controller}: write its own controller, whose target is in another unit":
            reward.controller != "fixed",
        f"ppo.reward.missing_eos={reward.missing_eos}: do it in the reward function": reward.missing_eos != "keep",
        f"ppo.update.early_stop_kl={update.early_stop_kl}: has no counterpart": update.early_stop_kl is not None,
        f"ppo.update.value_coef={update.value_coef}: the critic has an optimiser of its own": True,
        "model.mode=top: has no counterpart; all weights train": settings.model.mode == "top",
        "reward: only a single source is carried over": settings.reward.source is None,
        "model.source is the world's own; name one": settings.model.source is None,
    }  # fmt: skip
    return [*(text for text, holds in told.items() if holds), f"of this program alone: {', '.join(SILENT)}"]


def _is_function(source: str) -> bool:
    return source.startswith(("http://", "https://")) or ":" in source


def _flag(name: str, value: object) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else ""
    return f"--{name} {shlex.quote(str(value))}"


def _override(name: str, value: object) -> str:
    return shlex.quote(f"{name}={value}")


def main(target: Target, recipe: str, /) -> None:
    """Print a recipe as OpenRLHF's command line, or as verl's Hydra overrides; what is not carried over as comments.

    target: openrlhf or verl. recipe: a YAML file, a run's config.yaml, or a recipe by name.
    """
    print(exported(load_recipe(recipe), target))
