"""Steering: what is asked between two updates is judged, applied, recorded, and comes again bit by bit."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from resumable import count_words, left_behind, settings_of, task_of
from tether.batch import Prompt
from tether.control import Control
from tether.errors import ConfigError, InputError, RunError, StopError
from tether.helm import Rudder
from tether.replay import verify_run
from tether.resuming import resume_run
from tether.session import train_run
from tether.steering import parse_wishes, schedule_of, submit
from tether.store import RunStore
from tether.task import Judges, Task
from tether.wishes import STEERABLE, Reach, check_wish, judged, with_values

pytestmark = pytest.mark.timeout(60)
QUIET = Console(file=sys.stderr, quiet=True)
STEPS = 6


class Hand:
    """A reward that asks something of its own run while it is being scored: in update n, for update n + 1."""

    def __init__(self, run: Path, wishes: dict[int, Callable[[Path], object]]) -> None:
        self._run, self._wishes, self._said = run, wishes, set[int]()

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str], **columns: Sequence[object]) -> list[float]:
        with RunStore.open(self._run) as store:
            step = len(store.curve("score/mean").steps)
        if len(responses) == 8 and step in self._wishes and step not in self._said:  # a batch, no evaluation
            self._said.add(step)
            self._wishes[step](self._run)
        return count_words(prompts, responses, **columns)

    def digest(self) -> str:
        return "words"


def ask(kind: str, actor: str = "ann", base: int | None = None, **payload: object) -> Callable[[Path], object]:
    def wish(run: Path) -> int:
        with Control.open(run, readonly=False) as control:
            return control.command(actor, kind, payload, base_version=base)

    return wish


def steered(root: Path, name: str, wishes: dict[int, Callable[[Path], object]], **changes: object) -> tuple[Task, Path]:
    task = task_of(root / "sft")
    hand = Hand(root / name, wishes)
    own = Task(task.model, task.train, task.heldout, Judges(hand, task.judges.unseen))
    settings = settings_of(controller="fixed", steps=STEPS, **changes)
    return own, train_run(own, settings, root, name, QUIET)


def outcomes(run: Path) -> list[tuple[int, int, str]]:
    with RunStore.open(run) as store:
        return [(one.command_id, one.step, one.outcome) for one in store.applied()]


def betas(run: Path) -> list[float]:
    with RunStore.open(run) as store:
        return [float(value) for value in store.curve("beta").values]


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> tuple[Task, Path]:
    """A run whose β rises in two steps, is cut, and whose epochs and rate are changed."""
    root = tmp_path_factory.mktemp("steered")
    wishes = {
        0: ask("set", beta=1.0),
        2: ask("set", **{"beta": 0, "ppo.update.epochs": 3}),
        3: ask("set", learning_rate=2e-4),
    }
    return steered(root, "run", wishes)


def test_a_wish_acts_from_the_next_update_on_and_is_recorded_there(course: tuple[Task, Path]) -> None:
    _, run = course
    assert betas(run) == [0.1, 0.4, 1.0, 0.0, 0.0, 0.0]
    assert outcomes(run) == [(1, 1, "applied"), (2, 3, "applied"), (3, 4, "applied")]
    with RunStore.open(run) as store:
        assert store.curve("ppo/epochs_used").values.tolist() == [2, 2, 2, 3, 3, 3]
        rates = store.curve("learning_rate").values
        assert rates[4] == pytest.approx(2e-4 * (1 - 4 / STEPS))
        payload = store.applied()[0].payload
    assert payload == {"asked": {"ppo.reward.beta": 1.0}, "changes": {"ppo.reward.beta": [0.1, 0.4, 1.0]}}


def test_the_schedule_holds_what_the_knobs_really_were(course: tuple[Task, Path]) -> None:
    with RunStore.open(course[1]) as store:
        told = [(one["step"], one["knob"], one["value"]) for one in schedule_of(store)]
    assert told == [
        (1, "ppo.reward.beta", 0.4), (2, "ppo.reward.beta", 1.0),
        (3, "ppo.reward.beta", 0.0), (3, "ppo.update.epochs", 3), (4, "ppo.update.learning_rate", 2e-4),
    ]  # fmt: skip


def test_a_steered_run_that_was_cut_short_goes_on_bit_by_bit(course: tuple[Task, Path], tmp_path: Path) -> None:
    """As after a kill: the last checkpoint is of update 2, the rows go to 5, and β was on its way."""
    whole = course[1]
    root = tmp_path / "again"
    root.mkdir()
    # the same run with a checkpoint that is kept of update 2, where β is at 1.0 after its second step
    own, run = steered(
        root, "run", {0: ask("set", beta=1.0), 2: ask("set", **{"beta": 0, "ppo.update.epochs": 3}),
                      3: ask("set", learning_rate=2e-4)},
        checkpoint={"every": 1, "keep": 9},
    )  # fmt: skip
    assert left_behind(run)["bits"] == left_behind(whole)["bits"]
    expected = left_behind(run)
    for step in (2, 3, 4):
        (run / "checkpoints" / "latest").write_text(f"step-{step:06d}\n")
        with RunStore.open(run, readonly=False) as store:
            store.heartbeat(5, "recorded")  # as if it were still training when it was killed
        resume_run(run, lambda _: own, QUIET)
        assert left_behind(run) == expected, step
        assert outcomes(run) == [(1, 1, "applied"), (2, 3, "applied"), (3, 4, "applied")]


def test_what_is_asked_of_a_resumed_run_waits_for_what_had_been_asked_before(tmp_path: Path) -> None:
    wishes = {0: ask("set", beta=1.0), 2: ask("set", beta=0), 3: ask("set", learning_rate=2e-4)}
    own, run = steered(tmp_path, "run", wishes, checkpoint={"every": 1, "keep": 9})
    (run / "checkpoints" / "latest").write_text("step-000002\n")
    with RunStore.open(run, readonly=False) as store:
        store.heartbeat(5, "recorded")
    ask("set", beta=0.5)(run)
    resume_run(run, lambda _: own, QUIET)
    assert betas(run) == [0.1, 0.4, 1.0, 0.0, 0.0, 0.04]
    assert outcomes(run) == [(1, 1, "applied"), (2, 3, "applied"), (3, 4, "applied"), (4, 5, "applied")]


def test_a_run_whose_process_is_gone_is_not_steered(tmp_path: Path) -> None:
    import subprocess

    from tether.steering import main as steer

    gone = subprocess.Popen(["true"])
    gone.wait()
    with RunStore.create(tmp_path, "run", settings_of().dump()) as store:
        store.heartbeat(3, "recorded")
        beat = store.last_heartbeat()
        assert beat is not None
        store.put("heartbeat", {**vars(beat), "process": gone.pid})
    with pytest.raises(RunError, match="its process is gone"):
        steer("run", ("beta=0.1",), root=tmp_path)


def test_a_replay_of_a_steered_run_is_bit_equal(course: tuple[Task, Path]) -> None:
    task, run = course
    found = verify_run(run, QUIET, lambda settings, console: task)
    assert (found.is_same, found.updates, found.commands) == (True, STEPS, 3)


def test_a_replay_sees_a_ledger_that_was_changed(course: tuple[Task, Path], tmp_path: Path) -> None:
    import shutil
    import sqlite3

    task, run = course
    other = tmp_path / "run"
    shutil.copytree(run, other)
    with sqlite3.connect(other / "run.db") as connection:
        connection.execute("UPDATE applied SET payload = replace(payload, '1.0}', '0.9}') WHERE command_id = 1")
    connection.close()
    found = verify_run(other, QUIET, lambda settings, console: task)
    assert found.first_difference == 2
    assert found.differing["beta"] == (1.0, 0.9)


def test_looking_and_pausing_change_no_bit(tmp_path: Path) -> None:
    """A run that is paused, stepped and saved in between does what the undisturbed one does."""
    _, plain = steered(tmp_path, "plain", {})

    def pause_and_step(run: Path) -> None:
        ask("pause")(run)
        threading.Thread(target=_release, args=(run,), daemon=True).start()

    _, paused = steered(tmp_path, "paused", {1: pause_and_step, 3: ask("checkpoint")})
    assert left_behind(paused)["bits"] == left_behind(plain)["bits"]
    with RunStore.open(plain) as one, RunStore.open(paused) as other:
        assert one.chain() == other.chain()
        assert len(one.chain()) == STEPS
    assert [outcome for _, _, outcome in outcomes(paused)] == ["applied"] * 4


def _release(run: Path) -> None:
    """Once it is paused: one step, then on."""
    with RunStore.open(run) as store:
        _until(lambda: (beat := store.last_heartbeat()) is not None and beat.phase == "paused")
        before = len(store.curve("kl/mean").steps)
        ask("step")(run)
        _until(lambda: len(store.curve("kl/mean").steps) != before)
        time.sleep(0.2)
        stepped = len(store.curve("kl/mean").steps) - before
        ask("resume")(run)
    assert stepped == 1


def _until(claim: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not claim():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_stopped_run_is_saved_and_goes_on_without_stopping_again(tmp_path: Path) -> None:
    _, plain = steered(tmp_path, "plain", {})
    with pytest.raises(StopError, match="stopped by ann before update 3"):
        steered(tmp_path, "run", {2: ask("stop")})
    run = tmp_path / "run"
    with RunStore.open(run) as store:
        beat = store.last_heartbeat()
        assert beat is not None
        assert beat.status == "stopped"
    task = task_of(tmp_path / "sft")
    own = Task(task.model, task.train, task.heldout, Judges(Hand(run, {}), task.judges.unseen))
    resume_run(run, lambda _: own, QUIET)
    assert left_behind(run)["bits"] == left_behind(plain)["bits"]
    assert outcomes(run) == [(1, 3, "applied")]


def test_of_two_hands_the_later_wins_and_who_had_not_seen_it_is_told(tmp_path: Path) -> None:
    def both(run: Path) -> None:
        ask("set", beta=0.3)(run)
        ask("set", "bob", beta=0.2)(run)
        ask("set", "eve", base=0, beta=0.05)(run)

    _, run = steered(tmp_path, "run", {0: both})
    assert sorted(outcomes(run)) == [(1, 1, "superseded"), (2, 1, "applied"), (3, 1, "superseded")]
    assert betas(run)[1] == 0.2


@pytest.mark.parametrize(
    ("kind", "payload", "said"),
    [
        ("set", {"beta": -1}, "below 0"),
        ("set", {"beta": 1e9}, "at most 10"),
        ("set", {"beta": "nan"}, "wanted a number"),
        ("set", {"beta": float("nan")}, "wanted a number"),
        ("set", {"beta": True}, "wanted a number"),
        ("set", {"beta": [1]}, "one number or word"),
        ("set", {"ppo.update.epochs": 10**6}, "at most 16"),
        ("set", {"controller": "__import__('os').system('true')"}, "fixed"),
        ("set", {"seed": 1}, "fixed when a run starts"),
        ("set", {"model.source": "/etc/passwd"}, "fixed when a run starts"),
        ("set", {"reward": "evil.py:reward"}, "fixed when a run starts"),
        ("set", {"report_to": "wandb"}, "fixed when a run starts"),
        ("set", {"batch_size": 1}, "fixed when a run starts"),
        ("set", {"dtype": "bfloat16"}, "fixed when a run starts"),
        ("set", {"bta": 1}, "did you mean"),
        ("set", {}, "1 to 12 knobs"),
        ("set", ["beta"], "1 to 12 knobs"),
        ("pause", {"beta": 1}, "takes no payload"),
        ("step", {"updates": 10**9}, "1 to 1000"),
        ("eval", {"code": "1"}, "wanted one of"),
    ],
)
def test_what_may_not_be_asked_is_refused_with_the_reason(kind: str, payload: object, said: str) -> None:
    with pytest.raises((InputError, ConfigError), match=said):
        check_wish("ann", kind, payload, settings_of())


def test_the_trainer_refuses_what_reaches_it_past_the_page(tmp_path: Path) -> None:
    def flood(run: Path) -> None:
        for payload in ({"beta": -1}, {"seed": 7}, {"model.source": "/etc/passwd"}):
            ask("set", **payload)(run)
        ask("exec", code="print(1)")(run)
        with Control.open(run, readonly=False) as control:
            control.command("../ann", "pause", {})
            control.command("ann", "pause", {}, expires=1.0)

    _, run = steered(tmp_path, "run", {0: flood})
    assert outcomes(run) == [(number, 1, "rejected") for number in range(1, 7)]
    assert betas(run) == [0.1] * STEPS
    with RunStore.open(run) as store:
        assert "void" in str(store.applied()[-1].payload["why"])


def test_a_name_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match="the name of who asks"):
        check_wish("<script>", "pause", {}, settings_of())


def test_a_rising_knob_takes_its_factor_an_update_and_a_falling_one_falls() -> None:
    beta = Reach(slew=4.0, floor=0.01)
    course, value = [], 0.0
    while value != 0.5:
        value = float(str(beta.step(value, 0.5)))
        course.append(value)
    assert course == [0.04, 0.16, 0.5]
    assert beta.step(0.5, 0.0) == 0.0
    assert Reach().step("fixed", "adaptive") == "adaptive"
    assert Reach(slew=4.0).step(None, 1e-3) == 1e-3


def test_every_steerable_knob_can_be_set_to_what_it_is() -> None:
    from tether.wishes import value_of

    settings = settings_of()
    for path in STEERABLE:
        value = value_of(settings, path)
        assert with_values(settings, judged(settings, {path: value})) == settings


def test_the_knobs_of_a_checkpoint_are_those_that_were_steered_alone() -> None:
    rudder = Rudder(settings_of())
    assert rudder.checkpoint_state() == {"values": {}, "targets": {}}
    rudder.restore_state({"values": {"ppo.reward.beta": 0.7, "gone": 1}, "targets": {"ppo.reward.beta": 2.0}})
    assert rudder.settings == with_values(settings_of(), {"ppo.reward.beta": 0.7})
    assert json.loads(json.dumps(rudder.checkpoint_state())) == {
        "values": {"ppo.reward.beta": 0.7}, "targets": {"ppo.reward.beta": 2.0},
    }  # fmt: skip


def test_words_of_the_terminal_become_wishes() -> None:
    assert parse_wishes(["beta=0.1"]) == ("set", {"beta": "0.1"})
    assert parse_wishes(["value_learning_rate=null"]) == ("set", {"value_learning_rate": None})
    assert parse_wishes(["pause"]) == ("pause", {})
    assert parse_wishes(["step=3"]) == ("step", {"updates": 3})
    for wrong in (["beta"], ["pause", "beta=1"], ["pause=1"], ["step=x"]):
        with pytest.raises(InputError):
            parse_wishes(wrong)


def test_a_wish_is_judged_before_it_is_written_down(tmp_path: Path) -> None:
    with RunStore.create(tmp_path, "run", settings_of().dump()) as store:
        with pytest.raises(ConfigError):
            submit(store.path, "ann", "set", {"beta": -1}, settings_of())
        number = submit(store.path, "ann", "set", {"beta": 1}, settings_of(), base=4, clock=100.0)
        with Control.open(store.path) as control:
            assert [(one.id, one.base_version, one.expires) for one in control.commands()] == [(number, 4, 1000.0)]
