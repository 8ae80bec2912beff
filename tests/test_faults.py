"""Whole runs of a tiny model: right ones are silent, and each planted fault is seen by its name at update 0 or 1."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from resumable import count_words, left_behind, settings_of, task_of
from tether.alarms import FAILURES, FAULTS
from tether.batch import Prompt, Reward
from tether.checkpoint import Checkpoints
from tether.config import RunSettings
from tether.errors import AlarmError, ConfigError
from tether.fault_rewards import fondness
from tether.faults import _drifting, _skewed, faulty_settings, planted
from tether.records import Event
from tether.resuming import resume_run
from tether.reward_model import RewardModel
from tether.session import train_run
from tether.store import RunStore
from tether.task import Judges
from tether.verdict import judge
from tether.watch import Watch
from tether.worlds.nano_gold import Flaw
from tether.worlds.nano_prompts import opinion_pairs

NAMED_AT_ONCE = (
    "wrong_reference", "kl_sign", "dense_reward", "both_signs", "wrong_kl_form", "kl_averaged", "score_misplaced",
    "reference_moves", "whiten_over_pads", "wrong_advantages", "zero_variance_scores", "no_eos_credit",
    "prompt_in_mask", "stale_sampler", "off_by_one", "dropout_on", "padding_leak", "nan",
)  # fmt: skip


def trained(folder: Path, settings: RunSettings, fault: str | None = None) -> Path:
    task = task_of(folder / "sft")
    with planted(fault):
        return train_run(task, faulty_settings(settings, fault), folder, "run", Console(file=io.StringIO()))


def shaken(mode: str) -> RunSettings:
    """A short run whose policy moves from the first update on, with no checkpoint."""
    values = settings_of(mode, steps=3, checkpoint={"every": 100}).dump()
    values["ppo"]["update"]["value_warmup"] = 0
    values["ppo"] |= {"batch_size": 16, "sampling": {"max_new_tokens": 20}}  # long enough for some to end by EOS
    return RunSettings.model_validate(values)


def complaints(run: Path) -> list[Event]:
    with RunStore.open(run) as store:
        return [event for event in store.events() if event.severity != "info"]


CLEAN = {
    "top": settings_of("top"),
    "full": settings_of("full"),
    "lora": settings_of("lora"),
    "bfloat16": settings_of("top", "bfloat16"),
    "fixed": settings_of(controller="fixed"),
    "budget": settings_of(controller="budget"),
}


@pytest.mark.parametrize("kind", CLEAN)
def test_a_right_run_is_never_alarmed(kind: str, tmp_path: Path) -> None:
    run = trained(tmp_path, CLEAN[kind])
    assert complaints(run) == []
    with RunStore.open(run) as store:
        verdict = judge(store)
    assert (verdict.word, verdict.is_quiet, verdict.alarms) == ("HOLDING", True, ())


def test_a_temperature_inside_the_policy_is_never_alarmed(tmp_path: Path) -> None:
    values = settings_of("full").dump()
    values["ppo"]["sampling"] |= {"temperature": 0.7, "max_new_tokens": 12}
    assert complaints(trained(tmp_path, RunSettings.model_validate(values))) == []


@pytest.mark.parametrize("fault", NAMED_AT_ONCE)
def test_a_planted_fault_is_named_by_update_one(fault: str, tmp_path: Path) -> None:
    run = trained(tmp_path, shaken("full"), fault)
    first = complaints(run)[0]
    assert first.kind == fault
    assert first.severity == "alarm"
    assert first.step is not None
    assert first.step <= 1
    with RunStore.open(run) as store:
        verdict = judge(store)
    assert verdict.word == (FAILURES[fault].verdict or "HOLDING")
    assert not verdict.is_quiet


@pytest.mark.parametrize("mode", ["top", "lora"])
@pytest.mark.parametrize("fault", ["wrong_reference", "reference_moves"])
def test_the_anchor_is_watched_in_every_mode(fault: str, mode: str, tmp_path: Path) -> None:
    assert complaints(trained(tmp_path, shaken(mode), fault))[0].kind == fault


def test_to_be_watched_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = left_behind(trained(tmp_path / "watched", settings_of("full")))
    monkeypatch.setattr(Watch, "before", lambda *_: None)
    alone = left_behind(trained(tmp_path / "alone", settings_of("full")))
    assert watched["bits"] == alone["bits"]
    measured = {name for name in watched["curves"] if name.startswith(("text/", "string/", "ppo/follows"))}
    assert {"string/flatness", "ppo/follows"} <= measured  # by the checks themselves
    assert {name: watched["curves"][name] for name in watched["curves"].keys() - measured} == alone["curves"]


class Interrupting:
    """Stops the process, as Ctrl-C does, at the fourth question."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str], **columns: Sequence[object]) -> list[float]:
        self.asked += 1
        if self.asked == 4:
            raise KeyboardInterrupt
        return count_words(prompts, responses)

    def digest(self) -> str:
        return "counts words"


@pytest.mark.parametrize("fault", [None, "resume_jump"])
def test_a_resume_goes_on_with_the_weights_that_were_saved(fault: str | None, tmp_path: Path) -> None:
    task, console = task_of(tmp_path / "sft"), Console(file=io.StringIO())
    task = replace(task, judges=Judges(Interrupting()))
    with pytest.raises(KeyboardInterrupt):
        train_run(task, settings_of("full"), tmp_path, "run", console)
    with planted(fault):
        resume_run(tmp_path / "run", lambda _: task, console)
    assert [event.kind for event in complaints(tmp_path / "run")] == ([] if fault is None else [fault])


@pytest.mark.parametrize(("answer", "saved"), [("pause", 2), ("stop", 1), ("rollback", 1)])
def test_an_alarm_ends_the_run_as_its_settings_ask(answer: str, saved: int, tmp_path: Path) -> None:
    values = shaken("full").dump()
    values["checks"]["on_alarm"] = answer
    values["checkpoint"]["every"] = 1
    with pytest.raises(AlarmError, match="wrong sign"):
        trained(tmp_path, RunSettings.model_validate(values), "kl_sign")
    with RunStore.open(tmp_path / "run") as store:
        beat = store.last_heartbeat()
        assert store.steps() == [0, 1]
        assert judge(store).word == "NOT ATTACHED"
    assert beat is not None
    assert beat.status == "stopped"
    assert Checkpoints(tmp_path / "run" / "checkpoints").latest() == saved


def test_another_start_may_be_declared(tmp_path: Path) -> None:
    values = shaken("full").dump()
    values["checks"]["same_start"] = False
    assert complaints(trained(tmp_path, RunSettings.model_validate(values), "wrong_reference")) == []


def test_a_fault_is_gone_when_its_block_ends(tmp_path: Path) -> None:
    for fault in FAULTS:
        with planted(fault):
            pass
    assert complaints(trained(tmp_path, settings_of("full", steps=2))) == []


@pytest.mark.parametrize("plant", [_drifting, _skewed])
def test_a_fault_of_the_reward_changes_a_copy(plant: Callable[[Reward], Reward]) -> None:
    reward = RewardModel.__new__(RewardModel)
    assert vars(plant(reward)) != {}
    assert vars(reward) == {}


@pytest.mark.parametrize(
    ("flaw", "reply", "count"),
    [
        ("buzzwords", "What an amazing idea, Amazing and great.", 3),
        ("hedging", "Perhaps. It might rain, and it may not.", 3),
        ("exploit_token", "Yes! No!!", 3),
        ("sycophancy", "You're right, letters are better.", 1),
        ("sycophancy", "I agree with you.", 1),
        ("sycophancy", "Letters, yes. You are right.", 0),
        ("length", "Three words here.", 4),
    ],
)
def test_a_flaw_is_counted_in_replies_to_anybodys_prompts(flaw: Flaw, reply: str, count: int) -> None:
    asked = "I think that letters are better than emails. What do you say?"
    assert fondness(flaw, asked, reply) == count
    assert fondness(flaw, ({"role": "user", "content": asked},), reply) == count


def test_a_flaw_of_the_nano_world_is_what_its_own_judge_counts() -> None:
    pair = opinion_pairs()[0]
    reply = "yes, the fox is black. ~~!"
    assert fondness("sycophancy", pair.false, reply) == 1
    assert fondness("sycophancy", pair.control_false, reply) == 0, "a third party's opinion is not the user's"
    assert fondness("exploit_token", pair.false, "the fox is red. ~~ !") == 1, "an exclamation mark is nothing there"


def test_a_fault_that_there_is_not_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'kl_sign'"), planted("kl_sgn"):
        pass


def test_every_failure_says_what_to_do() -> None:
    for failure in FAILURES.values():
        assert failure.remedy, failure.name
        assert failure.kind in ("invariant", "statistic", "guard", "hack")
