"""kill -9 at any moment, resumed each time: equal to the run that nobody killed.

`make kill` does it fifty times to `tether train --world nano`; the fast suite a few times to a tiny run.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, PIPE

import pytest

from resumable import left_behind
from tether.store import RunStore

KILLS = 50
TESTS = Path(__file__).parent
TETHER = [sys.executable, "-m", "tether.cli"]


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}


def start(command: Sequence[str], cwd: Path) -> subprocess.Popen[bytes]:
    with (cwd / "log").open("ab") as log:
        return subprocess.Popen(command, env=environment(), cwd=cwd, stdout=log, stderr=log)


def finish(command: Sequence[str], cwd: Path) -> None:
    process = start(command, cwd)
    assert process.wait(timeout=600) == 0, (cwd / "log").read_text("utf-8")[-3000:]


def begun(run: Path, process: int, still_there: Callable[[], bool]) -> bool:
    """Wait until the process writes its run; False where it ended before."""
    while still_there():
        beat = RunStore.open(run).last_heartbeat() if run.is_dir() else None
        if beat is not None and beat.process == process:
            return True
        time.sleep(0.01)
    return False


def kill_after(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """SIGKILL after so long; whether it was still there to be killed."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True
    return False


@pytest.fixture
def tiny() -> Iterator[Tiny]:
    program = [sys.executable, str(TESTS / "resumable.py")]
    with subprocess.Popen(program, env=environment(), stdin=PIPE, stdout=PIPE, stderr=DEVNULL, text=True) as process:
        yield Tiny(process)


@dataclass
class Tiny:
    """The program `resumable.py`, which forks a process for each line."""

    program: subprocess.Popen[str]

    def start(self, run: Path) -> int:
        assert self.program.stdin is not None
        self.program.stdin.write(f"{run}\n")
        self.program.stdin.flush()
        return self._number()

    def status(self) -> int:
        """How the last process ended: 0, or minus the signal that killed it."""
        return os.waitstatus_to_exitcode(self._number())

    def _number(self) -> int:
        assert self.program.stdout is not None
        return int(self.program.stdout.readline())


def test_a_tiny_run_killed_again_and_again_is_the_run_that_nobody_killed(tmp_path: Path, tiny: Tiny) -> None:
    draw, kills = random.Random(0), 0
    tiny.start(tmp_path / "whole")
    assert tiny.status() == 0
    wanted = left_behind(tmp_path / "whole")
    for number in range(2):
        run, status = tmp_path / f"killed-{number}", -signal.SIGKILL
        while status:
            process = tiny.start(run)
            begun(run, process, lambda process=process: Path(f"/proc/{process}").exists())
            time.sleep(draw.uniform(0.0, 0.5))
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            status = tiny.status()
            assert status in (0, -signal.SIGKILL)
            kills += status != 0
        assert left_behind(run) == wanted, f"{kills} kills"
    assert kills >= 3


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_nano_run_killed_fifty_times_is_the_run_that_nobody_killed(tmp_path: Path) -> None:
    """Half of the kills fall anywhere in the process's life, half after it has begun to write.

    A run that ends before the fiftieth kill is compared, and another one on another string is begun.
    """
    draw, kills, number = random.Random(1), 0, 0
    while kills < KILLS:
        number += 1
        settings = recipe(tmp_path, number)
        finish([*TETHER, "train", str(settings), "--name", f"whole-{number}"], tmp_path)
        run = tmp_path / "runs" / f"killed-{number}"
        while True:
            known = run.is_dir()
            command = ["resume", str(run)] if known else ["train", str(settings), "--name", run.name]
            process = start([*TETHER, *command], tmp_path)
            if draw.random() < 0.5:
                begun(run, process.pid, lambda process=process: process.poll() is None)
                alive = kill_after(process, draw.uniform(0.0, 6.0))
            else:
                alive = kill_after(process, draw.uniform(0.0, 20.0))
            if not alive:
                assert process.returncode == 0, (tmp_path / "log").read_text("utf-8")[-3000:]
                break
            kills += 1
            if kills >= KILLS:
                finish([*TETHER, *(["resume", str(run)] if run.is_dir() else command)], tmp_path)
                break
        assert left_behind(run) == left_behind(tmp_path / "runs" / f"whole-{number}"), f"run {number}, {kills} kills"
    print(f"{kills} kills over {number} runs: all equal")


def recipe(folder: Path, number: int) -> Path:
    """The nano exercise, shorter, with a checkpoint every second update, on a string of 0.1 times this number."""
    path = folder / f"nano-{number}.yaml"
    path.write_text(
        "world: nano\nmodel: {mode: full}\n"
        "preferences: {pairs: 4096, noise: 0.25, learning_rate: 1.0e-3, batch_pairs: 32, top_layers: null}\n"
        f"ppo: {{batch_size: 32, steps: 60, sampling: {{max_new_tokens: 24}}, reward: {{beta: {number / 10}, "
        "controller: adaptive}, update: {learning_rate: 2.0e-4, early_stop_kl: null, max_padding: 1.0}}\n"
        "evaluation: {every: 20, prompts: 64}\ncheckpoint: {every: 2}\n",
        "utf-8",
    )
    return path
