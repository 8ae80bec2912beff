"""kill -9 of any process of a run on Ray at random moments: learner, writers, scorer, and Ray's own; resumed where it
ended, the run is the one that nobody killed.

`make kill-ray` does it thirty times; nothing of this is in the fast suite. Where RAY_ADDRESS names a Ray, the runs use
it, and only learner and workers are killed.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from ray_run_of import updates_of
from resumable import left_behind
from tether.store import RunStore

pytest.importorskip("ray")
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(4 * 3600)]

TESTS = Path(__file__).parent
KILLS = int(os.environ.get("TETHER_TEST_KILLS", "30"))
UPDATES = 12
OWN = ("raylet", "gcs_server")
"""Ray's own processes, which the learner's program started."""
STARTING_SECONDS = 20.0
WAIT_SECONDS = 1200.0


@dataclass
class Program:
    """`ray_run_of.py` on its way, and whom it could lose."""

    run: Path
    process: subprocess.Popen[bytes]

    @staticmethod
    def start(run: Path) -> Program:
        paths = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(TESTS / "ray_run_of.py"), str(run), "", str(UPDATES)]
        with run.with_suffix(".log").open("wb") as log:
            return Program(run, subprocess.Popen(command, env=environment, stdout=log, stderr=log))

    def said(self) -> str:
        return self.run.with_suffix(".log").read_text("utf-8", errors="replace")[-3000:]

    def family(self) -> dict[int, str]:
        """Process ids of all that the program started, with the names that they give themselves."""
        every, parents = {}, {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                number, _, rest = stat.read_text().partition(" (")
                parents[int(number)] = int(rest.rpartition(")")[2].split()[1])
                every[int(number)] = (stat.parent / "cmdline").read_bytes().decode(errors="replace")
        found = {self.process.pid: "learner"}
        grown = True
        while grown:
            grown = False
            for number, parent in parents.items():
                if parent in found and number not in found:
                    found[number], grown = every[number], True
        return found

    def victim(self, draw: random.Random) -> tuple[int, str]:
        """Somebody of a random role, of those that are there: the learner always is."""
        roles: dict[str, list[int]] = {"learner": [self.process.pid], "worker": workers_of(self.run)}
        for number, words in self.family().items():
            roles.setdefault(Path(words.partition("\0")[0]).name, []).append(number)
        role = draw.choice(["learner", "worker", "worker", "worker", *OWN])
        role = role if roles.get(role) else "learner"
        return draw.choice(roles[role]), role

    def await_updates(self, updates: int) -> bool:
        """Until the run has so many; False where the program ended before."""
        until = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < until:
            if self.process.poll() is not None:
                return False
            if updates_of(self.run) >= updates:
                return True
            time.sleep(0.02)
        raise AssertionError(f"no update {updates} within {WAIT_SECONDS:g} s\n{self.said()}")

    def await_end(self) -> int:
        try:
            return self.process.wait(WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"it neither went on nor ended\n{self.said()}") from None


def workers_of(run: Path) -> list[int]:
    """Processes of writers and scorers, by the run's folder; those that live."""
    if not (run / "run.db").is_file():
        return []
    with RunStore.open(run) as store:
        told = store.meta().get("workers")
    if not isinstance(told, dict):
        return []
    every = [int(one["process"]) for role in ("rollout", "scoring") for one in told[role]["workers"]]
    return [process for process in every if Path(f"/proc/{process}").exists()]


def test_a_run_on_ray_killed_thirty_times_is_the_run_that_nobody_killed(tmp_path: Path) -> None:
    draw, kills, number, told = random.Random(3), 0, 0, dict[str, int]()
    whole = tmp_path / "whole"
    first = Program.start(whole)
    assert first.await_end() == 0, first.said()
    expected = repr(left_behind(whole))
    while kills < KILLS:
        number += 1
        run, ended = tmp_path / f"killed-{number}", False
        program = Program.start(run)
        while not ended:
            if kills < KILLS and is_time(program, draw):
                victim, role = program.victim(draw)
                with suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
                kills, told[role] = kills + 1, told.get(role, 0) + 1
                print(f"kill {kills}: {role} after {updates_of(run)} updates of run {number}", flush=True)
                if role == "worker":
                    continue  # Ray starts it anew
            ended = program.await_end() == 0
            if not ended:
                program = Program.start(run)
        assert repr(left_behind(run)) == expected, f"run {number} after {kills} kills"
    print(f"{kills} kills over {number} runs ({told}): all equal")


def is_time(program: Program, draw: random.Random) -> bool:
    """At a random moment: while it starts, or between or within some updates. False where it ended before."""
    ahead = draw.randint(-1, UPDATES // 2)
    if ahead >= 0 and not program.await_updates(min(updates_of(program.run) + ahead, UPDATES - 1)):
        return False
    time.sleep(draw.uniform(0.0, STARTING_SECONDS if ahead < 0 else 0.5))
    return program.process.poll() is None
