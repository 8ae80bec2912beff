"""A recipe in OpenRLHF's and in verl's words: what has a counterpart by number, and a word on everything else."""

from __future__ import annotations

import shlex

import pytest

from tether.aliases import TRANSLATED
from tether.cli import run
from tether.config import RunSettings
from tether.moving_out import OTHER_MEANING, SECTIONS, Target, exported

SETTINGS = RunSettings.model_validate(
    {
        "model": {"source": "org/sft", "mode": "full"},
        "data": {"prompts": "prompts.parquet"},
        "reward": {"source": "org/reward"},
        "ppo": {
            "batch_size": 64, "steps": 200, "sampling": {"samples_per_prompt": 4, "max_new_tokens": 128},
            "reward": {"beta": 0.07}, "update": {"epochs": 3, "minibatches": 2, "learning_rate": 2e-6,
                                                 "clip_range": 0.15},
        },
    }
)  # fmt: skip


def words_of(target: Target, settings: RunSettings = SETTINGS) -> dict[str, str]:
    """Flag → value, of the command alone."""
    command = "\n".join(line for line in exported(settings, target).splitlines() if not line.startswith("#"))
    words = shlex.split(command.replace("\\\n", " "))[3:]
    if target == "verl":
        return dict(word.split("=", 1) for word in words)
    pairs: dict[str, str] = {}
    for place, word in enumerate(words):
        if word.startswith("--"):
            after = words[place + 1] if place + 1 < len(words) else "--"
            pairs[word[2:]] = "" if after.startswith("--") else after
    return pairs


def comments_of(target: Target, settings: RunSettings = SETTINGS) -> str:
    return "\n".join(line for line in exported(settings, target).splitlines() if line.startswith("#"))


def test_openrlhf_gets_the_same_numbers_under_its_names() -> None:
    wanted = {
        "pretrain": "org/sft", "reward_pretrain": "org/reward", "prompt_data": "prompts.parquet",
        "init_kl_coef": "0.07", "eps_clip": "0.15", "max_epochs": "3", "actor_learning_rate": "2e-06",
        "critic_learning_rate": "2e-06", "generate_max_len": "128", "n_samples_per_prompt": "4",
        "freezing_actor_steps": "-1",
    }  # fmt: skip
    assert wanted.items() <= words_of("openrlhf").items()


def test_verl_gets_the_same_numbers_under_its_keys() -> None:
    wanted = {
        "actor_rollout_ref.model.path": "org/sft", "reward_model.model.path": "org/reward",
        "algorithm.kl_ctrl.kl_coef": "0.07", "actor_rollout_ref.actor.clip_ratio": "0.15",
        "actor_rollout_ref.actor.ppo_epochs": "3", "actor_rollout_ref.actor.optim.lr": "2e-06",
        "data.max_response_length": "128", "trainer.total_training_steps": "200",
        "actor_rollout_ref.rollout.n": "4", "algorithm.use_kl_in_reward": "True", "algorithm.kl_penalty": "kl",
    }  # fmt: skip
    assert wanted.items() <= words_of("verl").items()


def test_sizes_are_told_in_the_units_of_each() -> None:
    """64 responses are 16 prompts of 4; half of them are a minibatch: 32 responses, 8 prompts."""
    ours = words_of("openrlhf")
    assert (ours["rollout_batch_size"], ours["train_batch_size"]) == ("16", "32")
    theirs = words_of("verl")
    assert (theirs["data.train_batch_size"], theirs["actor_rollout_ref.actor.ppo_mini_batch_size"]) == ("16", "8")


def test_what_has_no_counterpart_is_said() -> None:
    odd = SETTINGS.model_copy(update={"model": SETTINGS.model.model_copy(update={"mode": "top"})})
    for target in ("openrlhf", "verl"):
        assert "model.mode=top: has no counterpart" in comments_of(target, odd)
        assert "model.mode=top" not in comments_of(target)
        assert "value_coef" in comments_of(target)
    assert "ppo.steps=200: num_episodes counts passes" in comments_of("openrlhf")


@pytest.mark.parametrize("source", ["my.py:score", "https://judge.example/score"])
def test_a_function_is_no_reward_model(source: str) -> None:
    changed = SETTINGS.model_copy(update={"reward": SETTINGS.reward.model_copy(update={"source": source})})
    words = words_of("openrlhf", changed)
    assert words["remote_rm_url"] == source
    assert "reward_pretrain" not in words
    assert "reward_model.model.path" not in words_of("verl", changed)


def test_every_name_of_verl_has_its_place() -> None:
    names = {alias.name for alias in TRANSLATED if "verl" in alias.libraries} - OTHER_MEANING
    assert names == SECTIONS.keys()


def test_the_command_prints_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipes", "to", "verl", "own"]) in (0, 1)
    assert run(["recipes", "to", "openrlhf", "smollm2"]) == 0
    assert "--init_kl_coef 0.1" in capsys.readouterr().out
