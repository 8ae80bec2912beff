"""The pluck test on a tiny model: a string that is there pulls, a turned one pushes, none is silent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tether.task
import tether.trainer
from resumable import settings_of, task_of
from tether.batch import Rewards, Rollout, Scores
from tether.config import PPOSettings, RunSettings
from tether.errors import InputError
from tether.faults import planted
from tether.pluck import Pluck, pluck
from tether.trainer import Run, advance

CLIMBED = 20
"""Updates before the string is plucked."""


@pytest.fixture(scope="module")
def drifted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose policy has climbed a reward on a weak string; to be plucked changes nothing in it."""
    folder = tmp_path_factory.mktemp("drifted")
    values = settings_of("full", controller="fixed", steps=100).dump()
    values["ppo"] |= {"batch_size": 128, "sampling": {"max_new_tokens": 4}}
    values["ppo"]["reward"]["beta"] = 0.02
    values["ppo"]["update"] |= {"learning_rate": 5e-4, "value_warmup": 0, "schedule": "constant"}
    settings = RunSettings.model_validate(values)
    task = task_of(folder / "sft")
    policy = tether.task.open_policy(task.model, settings)
    knobs: PPOSettings = settings.ppo
    prompts = tether.task.source_of(task.train, policy, settings, knobs.batch_size)
    run = Run(policy, task.judges.reward, prompts, knobs, lambda record: None)
    for _ in range(CLIMBED):
        advance(run)
    return run


def weights(run: Run) -> list[torch.Tensor]:
    return [weight.detach().clone() for group in run.policy.trainable().values() for weight in group]


def test_an_attached_string_pulls_and_the_run_stays_as_it_was(drifted: Run) -> None:
    run = drifted
    before, steps = weights(run), run.optimiser.steps_taken
    answer = pluck(run)
    assert answer.answer == "pulls"
    assert answer.is_attached
    assert answer.kl[0] > 1.0
    assert answer.kl[-1] < 0.7 * answer.kl[0]
    assert all(torch.equal(now, then) for now, then in zip(weights(run), before, strict=True))
    assert (run.step, run.optimiser.steps_taken) == (CLIMBED, steps)


def test_a_turned_string_pushes(drifted: Run) -> None:
    with planted("kl_sign"):
        answer = pluck(drifted, updates=6)
    assert answer.answer == "pushes"
    assert not answer.is_attached


def test_a_string_that_never_reaches_the_loss_is_silent(drifted: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = tether.trainer.tether

    def untethered(scores: Scores, rollout: Rollout, beta: float, settings: object) -> Rewards:
        given = cut(scores, rollout, beta, settings)
        return replace(given, rewards=torch.zeros_like(given.rewards))

    monkeypatch.setattr(tether.trainer, "tether", untethered)
    assert pluck(drifted, updates=6).answer == "silent"


def test_at_the_reference_there_is_nothing_to_pull(tmp_path: Path) -> None:
    task, settings = task_of(tmp_path / "sft"), settings_of("full")
    policy = tether.task.open_policy(task.model, settings)
    prompts = tether.task.source_of(task.train, policy, settings, settings.ppo.batch_size)
    answer = pluck(Run(policy, task.judges.reward, prompts, settings.ppo, lambda record: None), updates=3)
    assert answer.answer == "nothing to pull"
    assert "nothing to pull" in answer.sentence()


def test_too_few_updates_are_refused(drifted: Run) -> None:
    with pytest.raises(InputError, match="3 or more"):
        pluck(drifted, updates=2)


@pytest.mark.parametrize("answer", ["pulls", "pushes", "silent", "nothing to pull"])
def test_every_answer_has_its_sentence(answer: str) -> None:
    told = Pluck(answer, (4.0, 3.0, 2.0), -1.0, 0.2)  # type: ignore[arg-type]
    assert told.sentence()
