"""kill -9 at any moment, resumed each time: equal to the run that nobody killed.

`make kill` does it fifty times to `tether train` in the nano world; the fast suite a few times to a tiny run.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE

import pytest

from resumable import left_behind
from tether.store import RunStore

KILLS = 50
FEW_KILLS = 3
TESTS = Path(__file__).parent


@dataclass
class Nursery:
    """The program `resumable.py`, which forks a process for each command."""

    program: subprocess.Popen[str]
    log: Path

    def start(self, *command: str) -> int:
        """Start a process; its id."""
        assert self.program.stdin is not None
        self.program.stdin.write(json.dumps(command) + "\n")
        self.program.stdin.flush()
        return self._number()

    def ended(self) -> int:
        """How the last process ended: 0, or minus the signal that killed it."""
        return os.waitstatus_to_exitcode(self._number())

    def finish(self, *command: str) -> None:
        self.start(*command)
        assert self.ended() == 0, self.log.read_text("utf-8")[-3000:]

    def _number(self) -> int:
        assert self.program.stdout is not None
        return int(self.program.stdout.readline())


@pytest.fixture
def nursery(tmp_path: Path) -> Iterator[Nursery]:
    paths = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    program = [sys.executable, str(TESTS / "resumable.py")]
    log = tmp_path / "log"
    with (
        log.open("w") as said,
        subprocess.Popen(
            program, env=environment, cwd=tmp_path, stdin=PIPE, stdout=PIPE, stderr=said, text=True
        ) as process,
    ):
        yield Nursery(process, log)


def kill_somewhere(process: int, run: Path, draw: random.Random, updates: int) -> None:
    """SIGKILL within so many updates of the process, or while it starts, or in the fraction of a second after."""
    wanted, deadline = draw.randint(-1, updates), time.monotonic() + 300.0
    while wanted >= 0 and time.monotonic() < deadline and Path(f"/proc/{process}").exists():
        if updates_done(process, run) >= wanted:
            break
        time.sleep(0.02)
    time.sleep(draw.uniform(0.0, 0.5))
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def updates_done(process: int, run: Path) -> int:
    """Updates that this process has recorded; −1 before it writes the run."""
    if not run.is_dir():
        return -1
    with RunStore.open(run) as store:
        beat, resumed = store.last_heartbeat(), [event for event in store.events() if event.kind == "resumed"]
        begun = int(str(resumed[-1].payload["step"])) if resumed else 0
        if beat is None or beat.process != process:
            return -1
        return (store.last_step() or 0) - begun


def test_a_tiny_run_killed_again_and_again_is_the_run_that_nobody_killed(tmp_path: Path, nursery: Nursery) -> None:
    draw, kills, number = random.Random(0), 0, 0
    nursery.finish("tiny", str(tmp_path / "whole"))
    wanted = left_behind(tmp_path / "whole")
    while kills < FEW_KILLS:
        number += 1
        run, ended = tmp_path / f"killed-{number}", -signal.SIGKILL
        while ended:
            kill_somewhere(nursery.start("tiny", str(run)), run, draw, updates=2)
            ended = nursery.ended()
            assert ended in (0, -signal.SIGKILL), nursery.log.read_text("utf-8")[-3000:]
            kills += ended != 0
        assert left_behind(run) == wanted, f"run {number}, {kills} kills"


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_nano_run_killed_fifty_times_is_the_run_that_nobody_killed(tmp_path: Path, nursery: Nursery) -> None:
    """A run that ends before the fiftieth kill is compared, and another one on another string is begun."""
    draw, kills, number = random.Random(1), 0, 0
    while kills < KILLS:
        number += 1
        settings = recipe(tmp_path, number)
        nursery.finish("tether", "train", settings, "--name", f"whole-{number}")
        run, ended = tmp_path / "runs" / f"killed-{number}", -signal.SIGKILL
        while ended:
            command = ["resume", str(run)] if run.is_dir() else ["train", settings, "--name", run.name]
            process = nursery.start("tether", *command)
            if kills < KILLS:
                kill_somewhere(process, run, draw, updates=6)
            ended = nursery.ended()
            assert ended in (0, -signal.SIGKILL), nursery.log.read_text("utf-8")[-3000:]
            kills += ended != 0
        assert left_behind(run) == left_behind(tmp_path / "runs" / f"whole-{number}"), f"run {number}, {kills} kills"
    print(f"{kills} kills over {number} runs: all equal")


def recipe(folder: Path, number: int) -> str:
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
    return str(path)
