"""Several processes that share a run end where one process ends, and what goes wrong is said once and clearly."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ranked_runs import RUNS, STEPS, finish, train
from resumable import TIMES
from tether.checkpoint import Checkpoints
from tether.config import RunSettings, UpdateSettings
from tether.errors import ConfigError, InputError, RunError
from tether.runtime.processes import require_processes
from tether.runtime.ranks import ALONE, TIMEOUT, Ranks, is_launched, joined
from tether.store import RunStore
from tether.update import micro_batches, passes, shares_by_length

TESTS = Path(__file__).parent
ROUND_OFF = 2e-6
"""Of numbers of order 1 after five updates in float32, whose sums are taken in another order."""


class Seat(Ranks):
    """One of several ranks, who never meet."""

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count


def launched(folder: Path, *names: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    program = [*command, str(TESTS / "ranked_runs.py"), str(folder), *names]
    return subprocess.run(program, env=environment, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run, trained by two processes."""
    folder = tmp_path_factory.mktemp("two")
    done = launched(folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run, trained by this process."""
    folder = tmp_path_factory.mktemp("one")
    for name in ("full", "lora", "top"):
        train(folder / name, RUNS[name], Console(quiet=True))
    return folder


def curves(run: Path) -> dict[str, list[float]]:
    with RunStore.open(run) as store:
        names = [name for name in store.names() if not name.startswith(TIMES)]
        return {name: curve.values.tolist() for name, curve in store.curves(names).items()}


def weights(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return Checkpoints(run / "checkpoints").read(step).weights()


def assert_same_course(one: Path, other: Path) -> None:
    left, right = curves(one), curves(other)
    assert left.keys() == right.keys()
    for name, values in left.items():
        assert len(values) == len(right[name]), name
        for a, b in zip(values, right[name], strict=True):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-5) or (math.isnan(a) and math.isnan(b)), name
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < ROUND_OFF


# ── the same run ────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("mode", ["full", "lora", "top"])
def test_two_processes_end_in_the_losses_and_weights_of_one(alone: Path, shared: Path, mode: str) -> None:
    assert_same_course(alone / mode, shared / mode)


@pytest.mark.parametrize("mode", ["full", "lora", "top"])
def test_weights_held_in_shares_are_trained_like_whole_ones(alone: Path, shared: Path, mode: str) -> None:
    assert_same_course(alone / mode, shared / f"{mode}-in-shares")


@pytest.mark.parametrize("mode", ["full", "top"])
def test_workers_that_the_first_of_two_processes_asks_change_nothing(alone: Path, shared: Path, mode: str) -> None:
    assert_same_course(alone / mode, shared / f"{mode}-with-workers")


def test_the_policy_moved(alone: Path) -> None:
    """Else the runs above would be alike without any training."""
    before, after = weights(alone / "top", STEPS - 1), weights(alone / "top")
    assert max(float((before[name] - after[name]).abs().max()) for name in after) > 1e-4


def test_a_wish_is_heard_by_the_first_process_and_followed_by_all(shared: Path) -> None:
    assert curves(shared / "top")["beta"] == [0.1, 0.1, 0.15, 0.15, 0.15]
    with RunStore.open(shared / "stopped") as store:
        assert store.last_step() == 2
        assert [one.outcome for one in store.applied()] == ["applied", "applied"]


def test_a_run_begun_by_two_processes_is_finished_by_one(alone: Path, shared: Path) -> None:
    finish(shared / "stopped", Console(quiet=True))
    assert_same_course(alone / "top", shared / "stopped")


def test_shares_are_put_together_in_a_checkpoint(alone: Path, shared: Path) -> None:
    """Two processes hold the run in shares; one finishes it."""
    finish(shared / "stopped-in-shares", Console(quiet=True))
    assert_same_course(alone / "full", shared / "stopped-in-shares")


def test_the_first_process_alone_writes(shared: Path) -> None:
    assert sorted(path.name for path in shared.iterdir()) == sorted([*RUNS, "sft"])


def test_an_error_of_the_first_process_ends_all_with_its_words(shared: Path) -> None:
    """The folder of the run is there already."""
    done = launched(shared, "top")
    assert done.returncode != 0
    assert "top exists (step 5, finished" in done.stderr


# ── who does what ───────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("rows", [1, 2, 7, 64])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shares_are_neighbours_that_cover_each_row_once(rows: int, count: int) -> None:
    shares = [list(range(rows))[Seat(rank, count).share(rows)] for rank in range(count)]
    assert [row for share in shares for row in share] == list(range(rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("count", [2, 3, 8])
def test_every_row_of_a_minibatch_is_passed_over_by_one_rank(count: int) -> None:
    lengths = torch.randint(3, 60, (24,), generator=torch.Generator().manual_seed(count))
    settings = UpdateSettings(tokens_per_micro_batch=100, max_padding=0.2)
    seats = [passes(lengths, settings, Seat(rank, count)) for rank in range(count)]
    assert sorted(int(row) for own in seats for part, counts in own if counts for row in part) == list(range(24))
    assert len({len(own) for own in seats}) == 1, "weights that are sharded are gathered by all in step"


def test_shares_of_a_minibatch_hold_like_rows_and_about_equal_tokens() -> None:
    lengths = torch.tensor([10, 50, 20, 40, 10, 30])
    assert [sorted(lengths[share].tolist()) for share in shares_by_length(lengths, 2)] == [[40, 50], [10, 10, 20, 30]]


@pytest.mark.parametrize("lengths", [[1000, 1, 1], [1, 1, 1000], [5, 5, 5], [7, 900, 900]])
def test_no_share_is_empty_however_long_a_row_is(lengths: list[int]) -> None:
    shares = shares_by_length(torch.tensor(lengths), 3)
    assert sorted(int(row) for share in shares for row in share) == [0, 1, 2]
    assert all(len(share) == 1 for share in shares)


def test_rows_of_one_length_are_shared_though_one_pass_would_hold_them_all() -> None:
    seats = [passes(torch.full((8,), 10), UpdateSettings(), Seat(rank, 2)) for rank in range(2)]
    assert [sum(len(part) for part, counts in own if counts) for own in seats] == [4, 4]


def test_a_process_alone_passes_over_its_rows_in_their_order() -> None:
    lengths = torch.tensor([5, 5, 5])
    parts = [part.tolist() for part, counts in passes(lengths, UpdateSettings(), ALONE) if counts]
    assert parts == [part.tolist() for part in micro_batches(lengths, 4096)]


def test_a_minibatch_smaller_than_the_processes_is_refused() -> None:
    settings = RunSettings.model_validate({"ppo": {"batch_size": 8, "update": {"minibatches": 4}}})
    with pytest.raises(ConfigError, match=r"a minibatch has 2 responses and 3 processes share it.*batch_size=12"):
        require_processes(settings, Seat(0, 3))


def test_processes_that_nobody_launched_are_refused_with_the_way_to_launch_them() -> None:
    with pytest.raises(ConfigError, match=r"runtime.processes is 4 and this process stands alone.*--nproc-per-node 4"):
        require_processes(RunSettings().with_processes(4), ALONE)


# ── what can go wrong ───────────────────────────────────────────────────────────────────────────────────────────────
def test_an_address_where_nobody_is_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "9",
        TIMEOUT: "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match=r"process 1 of 2 does not reach the others at localhost:9"), joined():
        pass


def test_a_port_that_another_program_has_is_named_with_the_variable_that_changes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port, TIMEOUT: "2"}
        for name, value in said.items():
            monkeypatch.setenv(name, value)
        told = rf"process 0 of 2 does not reach the others at localhost:{port}: .*another MASTER_PORT"
        with pytest.raises(RunError, match=told), joined():
            pass


def test_more_processes_than_gpus_are_refused_on_all_of_them_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "localhost"}
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"3 processes .* where 2 GPUs are to be seen; .*start 2"), joined():
        pass


def test_a_time_limit_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", TIMEOUT: "soon"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"TETHER_RANK_TIMEOUT is 'soon'; wanted seconds"), joined():
        pass


def test_one_process_of_one_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not is_launched()
    with joined() as ranks:
        assert ranks is ALONE


def test_a_process_alone_says_its_own_errors() -> None:
    def fail() -> None:
        raise InputError("no")

    with pytest.raises(InputError, match=r"^no$"):
        ALONE.together(fail)
