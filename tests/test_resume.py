"""Resume equals never having stopped, bit for bit; what is another run is refused; Ctrl-C saves.

The oracle is the same run without an interruption: its metrics (timings apart), samples, weights, moments and β.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread

import pytest
from rich.console import Console

from resumable import count_words, left_behind, prefer_short, settings_of, task_of
from tether import checkpoint
from tether.batch import Prompt, Reward
from tether.checkpoint import Checkpoints
from tether.config import RunSettings
from tether.demo import finished_run
from tether.errors import ConfigError, RunError
from tether.open_reward import as_reward
from tether.prompts import PromptSet
from tether.resuming import fork_run, resume_run
from tether.session import train_run
from tether.store import RunStore
from tether.task import Judges, Task
from tiny_models import build, build_tokenizer

pytestmark = pytest.mark.usefixtures("unchecked_shapes")  # whole runs: the rooms' own tests check the shapes


class PowerCut(BaseException):
    """Nobody catches it."""


@dataclass
class AtCall:
    """A reward that counts words, and does something at one of its calls."""

    call: int
    act: Callable[[], None]
    calls: int = 0

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str], **columns: Sequence[object]) -> list[float]:
        if self.calls == self.call:
            self.act()
        self.calls += 1
        return count_words(prompts, responses)

    def digest(self) -> str:
        return "words"


def cut() -> None:
    raise PowerCut


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models") / "sft"


def words(sft: Path, call: int = 10_000, act: Callable[[], None] = cut) -> Task:
    task = task_of(sft)
    return replace(task, judges=Judges(AtCall(call, act), {"gold": prefer_short}))


def silent() -> Console:
    return Console(file=io.StringIO(), width=200)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@dataclass
class Kept:
    """Runs that several tests begin with: each is trained once and copied for whoever asks."""

    sft: Path
    root: Path

    def whole(self, settings: RunSettings) -> dict[str, object]:
        """What the run of these settings leaves behind when nothing stops it."""
        return left_behind(self._of(settings, None))

    def finished(self, settings: RunSettings, root: Path) -> Path:
        return Path(shutil.copytree(self._of(settings, None), root / "run"))

    def stopped(self, settings: RunSettings, root: Path, call: int) -> Path:
        """The run as a power cut at this call of the reward leaves it."""
        return Path(shutil.copytree(self._of(settings, call), root / "run"))

    def _of(self, settings: RunSettings, call: int | None) -> Path:
        key = hashlib.sha256(f"{settings.model_dump_json()} {call}".encode()).hexdigest()[:16]
        if not (self.root / key).exists():
            task = words(self.sft) if call is None else words(self.sft, call)
            with nullcontext() if call is None else pytest.raises(PowerCut):
                train_run(task, settings, self.root, key, silent())
        return self.root / key


@pytest.fixture(scope="module")
def kept(sft: Path, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    return Kept(sft, tmp_path_factory.mktemp("kept"))


def resumed(run: Path, sft: Path) -> dict[str, object]:
    return left_behind(resume_run(run, lambda _: words(sft), silent()))


# ── equal to the last bit ───────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("mode", ["full", "lora", "top"])
def test_a_resumed_run_is_the_run_that_never_stopped(mode: str, sft: Path, tmp_path: Path, kept: Kept) -> None:
    """Call 5 of the reward is in update 3: the evaluations before updates 0 and 2 ask it too."""
    settings = settings_of(mode)
    run = kept.stopped(settings, tmp_path, 5)
    assert RunStore.open(run).last_step() == 2
    assert resumed(run, sft) == kept.whole(settings)


@pytest.mark.parametrize("call", [0, 1, 3, 5, 6], ids=lambda call: f"call {call}")
def test_it_may_stop_anywhere(call: int, sft: Path, tmp_path: Path, kept: Kept) -> None:
    """In the first evaluation, before the first checkpoint, in an evaluation, in an update, in the last evaluation."""
    settings = settings_of(checkpoint={"every": 2})
    assert resumed(kept.stopped(settings, tmp_path, call), sft) == kept.whole(settings)


def test_bfloat16_with_its_float32_masters_and_a_fixed_string(sft: Path, tmp_path: Path, kept: Kept) -> None:
    settings = settings_of("full", dtype="bfloat16", controller="fixed")
    run = kept.stopped(settings, tmp_path, 5)
    assert any(name.endswith(".master") for name in Checkpoints(run / "checkpoints").read(3).snapshot().optimiser)
    assert resumed(run, sft) == kept.whole(settings)


def test_a_torn_checkpoint_costs_time_and_nothing_else(sft: Path, tmp_path: Path, kept: Kept) -> None:
    settings = settings_of()
    run = kept.stopped(settings, tmp_path, 5)
    torn = run / "checkpoints" / f"step-{Checkpoints(run / 'checkpoints').latest():06d}" / "optimiser.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    console = silent()
    resume_run(run, lambda _: words(sft), console)
    assert f"passed over: {torn.parent} is torn" in said(console)
    assert left_behind(run) == kept.whole(settings)


@dataclass
class Centred:
    """A reward with a memory: each score is measured against the mean of all that came before."""

    broken_at: int | None = None
    count: int = 0
    total: float = 0.0

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str], **columns: Sequence[object]) -> list[float]:
        if self.count == self.broken_at:
            raise PowerCut
        scores = count_words(prompts, responses)
        mean = self.total / max(self.count, 1)
        self.count, self.total = self.count + len(scores), self.total + sum(scores)
        return [score - mean for score in scores]

    def digest(self) -> str:
        return "centred"

    def checkpoint_state(self) -> Mapping[str, object]:
        return {"count": self.count, "total": self.total}

    def restore_state(self, state: Mapping[str, object]) -> None:
        self.count, self.total = int(str(state["count"])), float(str(state["total"]))


@pytest.mark.parametrize(
    "given", [lambda reward: reward, as_reward, lambda reward: as_reward({"centred": (reward, 0.5)})],
    ids=["as it is", "as a function", "in a sum"],
)  # fmt: skip
def test_a_reward_with_a_memory_keeps_it(given: Callable[[Centred], Reward], sft: Path, tmp_path: Path) -> None:
    settings = settings_of(evaluation={"every": 4, "prompts": 4})

    def task(broken_at: int | None = None) -> Task:
        return replace(task_of(sft), judges=Judges(given(Centred(broken_at))))

    wanted = left_behind(train_run(task(), settings, tmp_path, "whole", silent()))
    with pytest.raises(PowerCut):
        train_run(task(broken_at=4 + 2 * 8), settings, tmp_path, "run", silent())
    assert left_behind(resume_run(tmp_path / "run", lambda _: task(), silent())) == wanted


def rewritten(run: Path, watch: Callable[[dict], object]) -> None:
    """The run's last checkpoint with what the checks had seen changed by `watch`."""
    checkpoints = Checkpoints(run / "checkpoints")
    last = checkpoints.read(checkpoints.latest() or 0)
    snapshot, seen = last.snapshot(), dict(last.states["watch"])
    watch(seen)
    shutil.rmtree(last.path)
    checkpoints.save(replace(snapshot, states={**snapshot.states, "watch": seen}), last.identity)


def test_a_check_that_the_checkpoint_knows_nothing_of_begins_anew(sft: Path, tmp_path: Path, kept: Kept) -> None:
    settings = settings_of()
    run = kept.stopped(settings, tmp_path, 5)
    rewritten(run, lambda seen: [seen.pop(name) for name in ("hacks", "climb", "honesty", "trends")])
    found, wanted = resumed(run, sft), kept.whole(settings)
    assert {name: found[name] for name in ("bits", "samples", "beta")} == {
        name: wanted[name] for name in ("bits", "samples", "beta")
    }


def test_what_a_check_cannot_read_is_one_error(sft: Path, tmp_path: Path, kept: Kept) -> None:
    run = kept.stopped(settings_of(), tmp_path, 5)
    rewritten(run, lambda seen: seen.update(climb={"of": "another form"}))
    with pytest.raises(RunError, match=r"keeps what climb has seen in a form that .* \(KeyError: 'history'\)"):
        resumed(run, sft)


# ── Ctrl-C ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_saves_after_the_update_and_names_the_way_on(
    number: signal.Signals, sft: Path, tmp_path: Path, kept: Kept
) -> None:
    settings, console = settings_of(checkpoint={"every": 100}), silent()
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    task = words(sft, call=4, act=lambda: os.kill(os.getpid(), number))
    with pytest.raises(KeyboardInterrupt):
        train_run(task, settings, tmp_path, "run", console)
    run = tmp_path / "run"
    assert f'saved at update 3; go on with: tether.resuming.resume_run(Path("{run}")' in said(console)
    assert Checkpoints(run / "checkpoints").latest() == 3, "update 2, in which the signal came, was finished"
    beat = RunStore.open(run).last_heartbeat()
    assert beat is not None
    assert beat.status == "stopped"
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert resumed(run, sft) == kept.whole(settings)


def test_a_run_whose_settings_say_all_goes_on_by_command(sft: Path, tmp_path: Path) -> None:
    console = silent()
    settings = settings_of(world="nano")
    with pytest.raises(KeyboardInterrupt):
        train_run(words(sft, 4, lambda: os.kill(os.getpid(), signal.SIGINT)), settings, tmp_path, "run", console)
    assert f"saved at update 3; go on with: tether resume {tmp_path / 'run'}" in said(console)


def test_a_second_ctrl_c_leaves_at_once(sft: Path, tmp_path: Path, kept: Kept) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("still here")

    settings = settings_of(checkpoint={"every": 2})
    with pytest.raises(KeyboardInterrupt):
        train_run(words(sft, 5, twice), settings, tmp_path, "run", silent())
    run = tmp_path / "run"
    assert Checkpoints(run / "checkpoints").latest() == 2
    assert resumed(run, sft) == kept.whole(settings)


def test_outside_of_the_main_thread_a_run_trains_without_listening(sft: Path, tmp_path: Path) -> None:
    settings = settings_of(steps=1)
    thread = Thread(target=lambda: train_run(words(sft), settings, tmp_path, "run", silent()))
    thread.start()
    thread.join()
    beat = RunStore.open(tmp_path / "run").last_heartbeat()
    assert beat is not None
    assert beat.status == "finished"


# ── what ends a run early, and what is there already ────────────────────────────────────────────────────────────────
def test_a_full_disk_ends_the_run_with_one_error_and_it_goes_on_later(
    sft: Path, tmp_path: Path, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(checkpoint={"every": 2})

    def fill() -> None:
        monkeypatch.setattr(checkpoint, "save_file", full)

    def full(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match="the disk is full; that of update 2 is intact"):
        train_run(words(sft, 4, fill), settings, tmp_path, "run", silent())
    monkeypatch.undo()
    assert resumed(tmp_path / "run", sft) == kept.whole(settings)


def test_a_finished_run_stays_as_it_is(sft: Path, tmp_path: Path, kept: Kept) -> None:
    run = kept.finished(settings_of(), tmp_path)
    before, console = (run / "run.db").read_bytes(), silent()
    resume_run(run, lambda _: pytest.fail("opened"), console)
    assert "is finished: 4 updates" in said(console)
    assert (run / "run.db").read_bytes() == before


def test_a_run_whose_rows_were_lost_goes_on_from_where_it_has_them(sft: Path, tmp_path: Path, kept: Kept) -> None:
    settings, console = settings_of(), silent()
    run = kept.stopped(settings, tmp_path, 5)
    with RunStore.open(run, readonly=False) as store:
        store.truncate_after(1)  # as if an older copy of run.db had been put back
    resume_run(run, lambda _: words(sft), console)
    assert "run.db holds 2 updates only" in said(console)
    assert left_behind(run) == kept.whole(settings)


def test_a_demo_goes_on_with_a_run_that_was_stopped_and_keeps_one_of_other_settings(
    sft: Path, tmp_path: Path, kept: Kept
) -> None:
    settings = settings_of(checkpoint={"every": 2})
    run = kept.stopped(settings, tmp_path, 5)
    made = RunStore.open(run).meta()["created"]
    assert finished_run(words(sft), settings, tmp_path, "run", silent()) == run
    assert left_behind(run) == kept.whole(settings)
    assert RunStore.open(run).meta()["created"] == made
    finished_run(words(sft), settings.with_beta(0.7).with_steps(1), tmp_path, "run", silent())
    assert RunStore.open(tmp_path / "run.kept-1").meta()["created"] == made
    assert RunStore.open(run).curve("beta").values.tolist() == [0.7]


# ── what is another run ─────────────────────────────────────────────────────────────────────────────────────────────
def other(sft: Path, what: str) -> Task:
    task = words(sft)
    if what == "the reference":
        return replace(task, model=other_sft(sft, "other-weights", seed=1))
    if what == "the tokenizer":
        return replace(task, model=other_sft(sft, "other-words", template="{{ messages[0]['content'] }}"))
    if what == "the reward":
        return replace(task, judges=Judges(prefer_short, task.judges.unseen))
    return replace(task, train=PromptSet(task.train.prompts[::-1]))


def other_sft(sft: Path, name: str, seed: int = 0, template: str | None = None) -> Path:
    folder = sft.parent / name
    if not folder.exists():
        build("llama", seed).save_pretrained(folder)
        tokenizer = build_tokenizer()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("saved", [True, False], ids=["from a checkpoint", "from the start"])
@pytest.mark.parametrize("what", ["the reference", "the tokenizer", "the reward", "the set of training prompts"])
def test_another_run_is_refused_by_name(what: str, saved: bool, sft: Path, tmp_path: Path, kept: Kept) -> None:
    settings = settings_of(checkpoint={"every": 1 if saved else 100})
    run = kept.stopped(settings, tmp_path, 3)
    rows = RunStore.open(run).steps()
    with pytest.raises(RunError, match=rf"(?s){what}.*: sha256 \w+… at the start, .* tether fork .*run --name NEW"):
        resume_run(run, lambda _: other(sft, what), silent())
    assert RunStore.open(run).steps() == rows, "nothing was dropped"


def test_other_settings_are_refused_by_knob_and_what_is_only_looked_at_is_free(
    sft: Path, tmp_path: Path, kept: Kept
) -> None:
    settings = settings_of(checkpoint={"every": 2})
    run = kept.stopped(settings, tmp_path, 5)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("beta: 0.1", "beta: 0.3").replace("epochs: 2", "epochs: 3"))
    with pytest.raises(
        RunError, match=r"(?s)ppo\.reward\.beta: 0\.1 in the checkpoint, 0\.3 now\n  ppo\.update\.epochs"
    ):
        resume_run(run, lambda _: words(sft), silent())
    changed = settings.model_copy(update={"checkpoint": settings.checkpoint.model_copy(update={"keep": 9})})
    resume_run(run, lambda _: words(sft), silent(), changed)
    assert left_behind(run) == kept.whole(settings)
    assert Checkpoints(run / "checkpoints").steps() == [2, 4]


def test_settings_of_another_version_are_one_clear_error(sft: Path, tmp_path: Path, kept: Kept) -> None:
    settings = settings_of()
    run = kept.stopped(settings, tmp_path, 1)
    with RunStore.open(run, readonly=False) as store:
        store.put("config", settings.dump() | {"knob_of_the_future": 1})
    with pytest.raises(RunError, match=r"(?s)not those of this version of tether .*knob_of_the_future"):
        resume_run(run, lambda _: words(sft), silent(), settings)


# ── forks ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def fork(sft: Path, root: Path, step: int | None, settings: RunSettings) -> Path:
    folder = fork_run(root / "run", step, root, "fork", settings)
    return resume_run(folder, lambda _: words(sft), silent())


def test_a_fork_with_the_same_settings_takes_the_same_course(sft: Path, tmp_path: Path, kept: Kept) -> None:
    settings = settings_of(checkpoint={"every": 1, "keep": 9})
    kept.finished(settings, tmp_path)
    forked = left_behind(fork(sft, tmp_path, 2, settings))
    course = kept.whole(settings)
    assert forked["bits"] == course["bits"]
    assert forked["beta"] == course["beta"]
    assert forked["steps"] == [2, 3, 4]
    store, parent = RunStore.open(tmp_path / "fork"), RunStore.open(tmp_path / "run")
    for name in ("kl/mean", "score/mean", "loss/policy", "eval/win_rate"):
        steps, values = parent.curve(name)
        assert store.curve(name).values.tolist() == values[steps >= 2].tolist()
    lineage = store.meta()["lineage"]
    digest = Checkpoints(tmp_path / "run" / "checkpoints").read(2).digest
    assert lineage == {"run": str((tmp_path / "run").resolve()), "step": 2, "checkpoint": digest}


def test_a_fork_on_another_string_starts_its_controller_anew(sft: Path, tmp_path: Path, kept: Kept) -> None:
    settings = settings_of()
    kept.finished(settings, tmp_path)
    longer = settings.with_beta(0.4).with_steps(6)
    folder = fork(sft, tmp_path, None, longer)
    assert RunStore.open(folder).curve("beta").values.tolist()[0] == 0.4
    assert RunStore.open(folder).steps() == [4, 5, 6]
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [3, 4], "the parent's stay as they were"


def test_a_fork_that_was_stopped_goes_on(sft: Path, tmp_path: Path, kept: Kept) -> None:
    settings = settings_of()
    kept.finished(settings, tmp_path)
    longer = settings.with_steps(6)
    wanted = left_behind(fork(sft, tmp_path, None, longer))
    again = fork_run(tmp_path / "run", None, tmp_path, "again", longer)
    for call in (1, 2):
        with pytest.raises(PowerCut):
            resume_run(again, lambda _, call=call: words(sft, call), silent())
    assert left_behind(resume_run(again, lambda _: words(sft), silent())) == wanted


def test_a_fork_may_have_another_reward_but_no_other_reference(sft: Path, tmp_path: Path, kept: Kept) -> None:
    settings = settings_of()
    kept.finished(settings, tmp_path)
    folder = fork_run(tmp_path / "run", None, tmp_path, "fork", settings.with_steps(5))
    with pytest.raises(RunError, match="the reference"):
        resume_run(folder, lambda _: other(sft, "the reference"), silent())
    resume_run(folder, lambda _: other(sft, "the reward"), silent())
    assert RunStore.open(folder).steps() == [4, 5]


def test_a_fork_with_nothing_to_start_from_or_to_do_is_refused(sft: Path, tmp_path: Path, kept: Kept) -> None:
    settings = settings_of()
    run = kept.stopped(settings, tmp_path, 1)
    with pytest.raises(RunError, match="no whole checkpoint to start from"):
        fork_run(run, None, tmp_path, "fork", settings)
    resume_run(run, lambda _: words(sft), silent())
    with pytest.raises(ConfigError, match=r"starts at update 4 and its settings end at 4; .*--steps 8"):
        fork_run(run, None, tmp_path, "fork", settings)
    with pytest.raises(RunError, match="no checkpoint of update 1; there are: 3, 4"):
        fork_run(run, 1, tmp_path, "fork", settings)
    assert not (tmp_path / "fork").exists()
