"""The run folder: whole updates or nothing, one writer, readers at any time, plain complaints."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from tether.errors import InputError, RunError
from tether.store import RunStore, Sample, Update, check_name


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    with RunStore.create(tmp_path, "run", {"beta": 0.05}, clock=lambda: 1000.0) as created:
        yield created


def record(store: RunStore, step: int, **metrics: float) -> None:
    with store.update(step) as update:
        update.metrics({name.replace("__", "/"): value for name, value in metrics.items()})


def make_sample(step: int, row: int = 0, **changes: object) -> Sample:
    tokens = np.array([5, 70_000, 2])
    logs = np.array([-0.5, -1.25, -3.0])
    fields = {"prompt": "p", "response": "r", "score": 1.5, "reward_total": 1.25, "kl": 5.0}
    arrays = {"tokens": tokens, "logprobs": logs, "ref_logprobs": 2 * logs, "values": 3 * logs, "advantages": 4 * logs}
    return Sample(step=step, row=row, **(fields | arrays | changes))  # type: ignore[arg-type]


def fill(store: RunStore) -> None:
    """Updates 1, 2, … of several pages each, until something happens."""
    for step in range(1, 100):
        with store.update(step) as update:
            update.metrics({"beta": 0.05})
            update.sample(make_sample(step, prompt="x" * 5000))


# ── what goes in comes out ──────────────────────────────────────────────────────────────────────────────────────────
def test_curves_come_back_as_they_were_logged(store: RunStore) -> None:
    for step in range(5):
        record(store, step, kl__mean=step**2, beta=0.05)
    steps, values = store.curve("kl/mean")
    assert steps.tolist() == [0, 1, 2, 3, 4]
    assert values.tolist() == [0.0, 1.0, 4.0, 9.0, 16.0]
    assert store.curves(["beta"])["beta"].values.tolist() == [0.05] * 5
    assert store.latest() == {"kl/mean": 16.0, "beta": 0.05}
    assert store.names() == ["kl/mean", "beta"], "the catalogue's order"
    assert store.steps() == [0, 1, 2, 3, 4]
    assert store.last_step() == 4


def test_a_metric_never_logged_is_an_empty_curve_and_an_unknown_one_is_an_error(store: RunStore) -> None:
    assert store.curve("kl/mean").values.tolist() == []
    with pytest.raises(InputError, match="did you mean 'kl/mean'"):
        store.curve("kl/men")


def test_samples_come_back_with_every_token(store: RunStore) -> None:
    extra = {"columns": {"topic": "β", "n": 3}, "pieces": ("Hel", "lo", "</s>")}
    with store.update(7) as update:
        update.sample(make_sample(7, row=1))
        update.sample(make_sample(7, row=0, split="probe", **extra))
        update.sample(make_sample(7, row=0, values=np.empty(0), advantages=np.empty(0)))
    probe = store.samples(split="probe")[0]
    assert (probe.step, probe.row, probe.prompt, probe.response) == (7, 0, "p", "r")
    assert (probe.score, probe.reward_total, probe.kl) == (1.5, 1.25, 5.0)
    assert probe.tokens.tolist() == [5, 70_000, 2]
    for name, factor in (("logprobs", 1), ("ref_logprobs", 2), ("values", 3), ("advantages", 4)):
        assert getattr(probe, name).tolist() == [-0.5 * factor, -1.25 * factor, -3.0 * factor]
    assert (probe.pieces, probe.columns) == (("Hel", "lo", "</s>"), {"topic": "β", "n": 3})
    train = store.samples(step=7, split="train")
    assert [sample.row for sample in train] == [0, 1]
    assert [len(sample.values) for sample in train] == [0, 3]
    assert store.samples(step=6) == []


def test_text_that_no_file_can_hold_is_kept_as_near_as_can_be(store: RunStore) -> None:
    with store.update(0) as update:
        update.sample(make_sample(0, prompt="zero \x00 byte", response="half \ud800 pair", score=float("nan")))
    kept = store.samples()[0]
    assert (kept.prompt, kept.response) == ("zero \x00 byte", "half ? pair")
    assert math.isnan(kept.score)


def test_what_is_not_finite_is_kept_as_nan_and_an_event_names_it(store: RunStore) -> None:
    record(store, 3, loss__policy=float("nan"), grad__norm=float("inf"), beta=0.05)
    assert math.isnan(store.curve("loss/policy").values[0])
    assert math.isnan(store.latest()["grad/norm"])
    event = store.events()[-1]
    assert (event.kind, event.severity, event.step) == ("non_finite", "warning", 3)
    assert event.payload == {"loss/policy": "nan", "grad/norm": "inf"}


def test_events_are_numbered_and_timed_and_can_be_read_on_from_a_number(store: RunStore) -> None:
    first = store.events()
    assert [event.kind for event in first] == ["created"]
    store.event("checkpoint", {"path": Path("checkpoints/5"), "loss": float("nan")})
    with store.update(5) as update:
        update.event("alarm", {"z": np.float32(6.5)}, severity="alarm")
    later = store.events(after=first[-1].id)
    assert [(event.kind, event.severity, event.step, event.wall) for event in later] == [
        ("checkpoint", "info", None, 1000.0),
        ("alarm", "alarm", 5, 1000.0),
    ]
    assert [event.payload for event in later] == [{"path": "checkpoints/5", "loss": None}, {"z": 6.5}]


def test_facts_heartbeat_and_configuration_are_kept(store: RunStore, tmp_path: Path) -> None:
    assert store.meta()["config"] == {"beta": 0.05}
    assert store.meta()["created"] == 1000.0
    assert store.last_heartbeat() is None
    store.put("digest", {"policy": "abc"})
    store.put("digest", {"policy": "def"})
    assert store.meta()["digest"] == {"policy": "def"}
    store.heartbeat(9, "generate")
    beat = store.last_heartbeat()
    assert beat is not None
    assert (beat.step, beat.phase, beat.status, beat.process) == (9, "generate", "running", os.getpid())
    record(store, 10, beta=0.05)
    beat = store.last_heartbeat()
    assert beat is not None
    assert (beat.step, beat.status) == (10, "running"), "a recorded update is a sign of life"
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()) == {"beta": 0.05}
    assert (tmp_path / "run" / "checkpoints").is_dir()


def test_configurations_with_paths_and_tuples_are_written_as_plain_yaml(tmp_path: Path) -> None:
    RunStore.create(tmp_path, "run", {"path": Path("a/b"), "betas": (0.1, 0.2), "name": "β"}).close()
    text = (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text) == {"path": "a/b", "betas": [0.1, 0.2], "name": "β"}
    assert "β" in text


# ── whole updates or nothing ────────────────────────────────────────────────────────────────────────────────────────
def test_an_error_inside_an_update_leaves_nothing_of_it(store: RunStore) -> None:
    record(store, 0, beta=0.05)
    with pytest.raises(KeyboardInterrupt), store.update(1) as update:  # noqa: PT012
        update.metrics({"beta": 0.05})
        update.sample(make_sample(1))
        raise KeyboardInterrupt
    assert (store.last_step(), len(store.curve("beta").steps), store.samples()) == (0, 1, [])


def test_an_update_that_cannot_be_written_whole_is_not_written_at_all(store: RunStore) -> None:
    record(store, 0, beta=0.05)
    before = len(store.events())
    with pytest.raises(RunError, match=r"update 0: this is in the run already"):
        record(store, 0, kl__mean=1.0, grad__norm=float("nan"), beta=0.1)
    assert store.latest() == {"beta": 0.05}
    assert len(store.events()) == before
    record(store, 0, kl__mean=2.0)
    assert store.latest() == {"kl/mean": 2.0, "beta": 0.05}, "the same step may be written in several blocks"


def test_a_full_disk_loses_nothing_that_was_finished(store: RunStore) -> None:
    record(store, 0, beta=0.05)
    pages = store._database.rows("PRAGMA page_count")[0][0]
    store._database.rows(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(RunError, match=r"update \d+: the disk is full.*everything before it is.*resume"):
        fill(store)
    last = store.last_step()
    assert last is not None
    assert store.curve("beta").steps.tolist() == list(range(last + 1))
    assert [sample.step for sample in store.samples()] == list(range(1, last + 1))
    store._database.rows("PRAGMA max_page_count = 100000")
    record(store, last + 1, beta=0.05)
    assert store.last_step() == last + 1, "with space again, the run goes on"


def test_a_run_killed_at_any_moment_holds_whole_updates_only(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np; from tether.store import RunStore, Sample\n"
        "store = RunStore.create(sys.argv[1], 'run', {})\n"
        "for step in range(1_000_000):\n"
        "    with store.update(step) as update:\n"
        "        update.metrics({'beta': step, 'kl/mean': step})\n"
        "        update.event('tick')\n"
        "    print(step, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    confirmed = [int(process.stdout.readline()) for _ in range(50)][-1]
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    process.wait()
    with RunStore.open(tmp_path / "run", readonly=False) as store:  # the dead writer's lock is gone
        last = store.last_step()
        assert last is not None
        assert last >= confirmed
        steps = list(range(last + 1))
        assert store.curve("beta").steps.tolist() == store.curve("kl/mean").steps.tolist() == steps
        assert [event.step for event in store.events() if event.kind == "tick"] == steps
        record(store, last + 1, beta=0.0)


def test_reading_is_safe_while_another_process_writes(tmp_path: Path) -> None:
    code = (
        "import sys; from tether.store import RunStore\n"
        "with RunStore.create(sys.argv[1], 'run', {}) as store:\n"
        "    print(flush=True)\n"
        "    for step in range(300):\n"
        "        with store.update(step) as update:\n"
        "            update.metrics({'beta': step, 'kl/mean': step})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    seen = []
    with RunStore.open(tmp_path / "run") as reader:
        while process.poll() is None:
            first, second = reader.curve("beta"), reader.curve("kl/mean")
            assert first.steps.tolist() == list(range(len(first.steps)))
            assert len(second.steps) >= len(first.steps), "an update is seen whole, and what was seen stays"
            seen.append(len(first.steps))
        assert reader.last_step() == 299
    process.stdout.close()
    assert process.returncode == 0
    assert seen == sorted(seen)


# ── going back ──────────────────────────────────────────────────────────────────────────────────────────────────────
def test_truncation_drops_what_came_later_and_nothing_else(store: RunStore) -> None:
    for step in range(6):
        with store.update(step) as update:
            update.metrics({"beta": float(step)})
            update.sample(make_sample(step))
            update.event("tick")
            update.applied(command_id=step + 1)
    newest = store.events()[-1].id
    store.truncate_after(3)
    assert store.steps() == store.curve("beta").steps.tolist() == [0, 1, 2, 3]
    assert [sample.step for sample in store.samples()] == [0, 1, 2, 3]
    assert [event.step for event in store.events() if event.kind == "tick"] == [0, 1, 2, 3]
    assert [one.step for one in store.applied()] == [0, 1, 2, 3]
    event = store.events()[-1]
    assert (event.kind, event.payload["after"]) == ("truncated", 3)
    assert event.id > newest, "a reader that has seen the dropped events sees this one"
    record(store, 4, beta=40.0)
    assert store.latest()["beta"] == 40.0


def test_truncation_of_nothing_leaves_no_trace(store: RunStore) -> None:
    record(store, 0, beta=0.05)
    before = store.events()
    store.truncate_after(0)
    assert store.events() == before


def test_steps_never_go_back_unasked(store: RunStore) -> None:
    record(store, 5, beta=0.05)
    with pytest.raises(InputError, match=r"got step 4 after step 5; .*truncate_after\(3\)"), store.update(4):
        pass
    with (
        pytest.raises(InputError, match="wanted 0 or later"),
        RunStore.create(store.path.parent, "other", {}) as other,
        other.update(-1),
    ):
        pass


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_number_without_an_entry_in_the_catalogue_is_refused(store: RunStore) -> None:
    with pytest.raises(InputError, match="'my/number' is not in the catalogue"), store.update(0) as update:
        update.metrics({"my/number": 1.0})
    update = Update(0)
    update.metrics({"beta": 1.0})
    with pytest.raises(InputError, match="logged twice at step 0: beta"):
        update.metrics({"beta": 1.0})
    assert store.last_step() is None


@pytest.mark.parametrize("name", ["logprobs", "ref_logprobs", "values", "advantages", "pieces"])
def test_arrays_that_do_not_fit_the_tokens_are_refused(store: RunStore, name: str) -> None:
    wrong: object = ("a", "b") if name == "pieces" else np.zeros(2)
    with pytest.raises(InputError, match=f"row 4 has 3 tokens but 2 {name}"), store.update(0) as update:
        update.sample(make_sample(0, row=4, **{name: wrong}))
    if name.endswith("logprobs"):
        with pytest.raises(InputError, match=f"3 tokens but 0 {name}"), store.update(0) as update:
            update.sample(make_sample(0, row=4, **{name: np.zeros(0)}))


def test_a_sample_of_another_step_is_refused(store: RunStore) -> None:
    with pytest.raises(InputError, match="a sample of step 3 came with update 0"), store.update(0) as update:
        update.sample(make_sample(3))


@pytest.mark.parametrize("name", ["demo", "beta=0.05", "run_1", "größe-2.b", "a", "x" * 100])
def test_sensible_names_are_taken(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    ("name", "better"),
    [
        ("a/b", "a-b"),
        ("../up", "up"),
        ("", "run"),
        ("..", "run"),
        (".hidden", "hidden"),
        ("-rf", "rf"),
        ("two words", "two-words"),
        ("run@5", "run-5"),
        ("a\\b", "a-b"),
        ("nul\0", "nul"),
        ("line\n", "line"),
        ("dot.", "dot"),
        ("x" * 101, "x" * 100),
        ("ß" * 60, "ß" * 50),
    ],
)
def test_names_that_are_no_folder_names_are_refused_with_one_that_is(name: str, better: str) -> None:
    with pytest.raises(InputError) as caught:
        check_name(name)
    assert str(caught.value).endswith(f"try {better!r}")
    check_name(better)


def test_an_existing_run_is_refused_with_its_standing(store: RunStore) -> None:
    store.heartbeat(99, "done", "finished")
    with pytest.raises(
        RunError, match=r"exists \(step 99, finished, .*choose another name, resume that run, or delete"
    ):
        RunStore.create(store.path.parent, "run", {})


def test_a_run_can_go_on_with_another_configuration(store: RunStore) -> None:
    record(store, 0, beta=0.05)
    root = store.path.parent
    store.close()
    with RunStore.create(root, "run", {"beta": 0.1}, exist_ok=True) as again:
        assert again.last_step() == 0
        assert again.meta()["config"] == {"beta": 0.1}
        assert again.events()[-1].kind == "continued"
    assert yaml.safe_load((root / "run" / "config.yaml").read_text()) == {"beta": 0.1}


def test_a_folder_that_is_no_run_is_never_taken_over(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for exist_ok in (False, True):
        with pytest.raises(RunError, match="mine exists; choose another name"):
            RunStore.create(tmp_path, "mine", {}, exist_ok=exist_ok)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_only_one_process_may_write_a_run(store: RunStore) -> None:
    store.heartbeat(3, "update")
    with pytest.raises(RunError, match=rf"is being written \(step 3, running, process {os.getpid()} on .*\); stop"):
        RunStore.open(store.path, readonly=False)
    store.close()
    RunStore.open(store.path, readonly=False).close()


def test_a_reader_cannot_write(store: RunStore) -> None:
    with RunStore.open(store.path) as reader, pytest.raises(RunError, match="cannot be written"):
        reader.put("key", 1)


def test_a_folder_that_could_not_be_finished_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RunError, match=r"config\.yaml: cannot be written or read \(No space left on device\)"):
        RunStore.create(tmp_path, "run", {})
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_is_a_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(RunError, match="cannot be written or read"):
        RunStore.create(tmp_path / "runs", "run", {})
