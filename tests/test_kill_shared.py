"""A run that two processes share, and kill -9 of its launcher or of one of the two at any moment: nothing of it stays
behind, and resumed it is the run that nobody killed.

`make kill` does it thirty times; the fast suite once.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from resumable import left_behind
from shared_runs import STEPS, environment, finish, tether, write_recipe
from test_kill import updates_done
from test_ranks import assert_same_course
from tether import cli
from tether.store import RunStore

KILLS = 30
LONG = 40
"""Updates of a run that is killed again and again."""
START_SECONDS = 6.0
"""What two processes take to start on a machine with nothing else to do."""
GONE_SECONDS = 60.0


class Started:
    """`tether ARGUMENTS` as a launcher and the processes below it."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log = log
        with log.open("w") as said:
            self.launcher = subprocess.Popen(
                tether(*arguments), env=environment(), stdout=said, stderr=subprocess.STDOUT, start_new_session=True
            )

    def ranks(self) -> list[int]:
        """The processes that share the run, the first one first."""
        found: list[int] = []
        with suppress(OSError):
            for task in Path(f"/proc/{self.launcher.pid}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
        return sorted(found)

    def kill(self, victim: int) -> list[int]:
        """SIGKILL to the launcher, 0, or to one of its processes, 1 or 2; all that ran with it."""
        family = [self.launcher.pid, *self.ranks()]
        with suppress(ProcessLookupError):
            os.kill(family[min(victim, len(family) - 1)], signal.SIGKILL)
        return family

    def said(self) -> str:
        return self.log.read_text("utf-8")[-3000:]


def await_gone(started: Started, family: list[int]) -> None:
    """No process may outlive the others for long."""
    until = time.monotonic() + GONE_SECONDS
    started.launcher.wait(GONE_SECONDS)
    while left := [process for process in family if lives(process)]:
        assert time.monotonic() < until, f"{left} of {family} still run\n{started.said()}"
        time.sleep(0.05)


def lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def await_updates(started: Started, run: Path, updates: int) -> bool:
    """Until this start has recorded so many updates; False where it ended before."""
    until = time.monotonic() + 200.0
    while time.monotonic() < until and started.launcher.poll() is None:
        ranks = started.ranks()
        if ranks and updates_done(ranks[0], run) >= updates:
            return True
        time.sleep(0.02)
    return False


def test_a_shared_run_whose_launcher_is_killed_stops_and_is_finished_by_one_process(tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path), tmp_path / "runs" / "killed"
    assert cli.run(["train", str(recipe), "--name", "alone", "--root", str(tmp_path / "runs")]) == 0
    words = ["train", str(recipe), "--name", run.name, "--root", str(run.parent), "--num-processes", "2"]
    started = Started(tmp_path / "log", *words)
    assert await_updates(started, run, 1), started.said()
    await_gone(started, started.kill(victim=0))
    with RunStore.open(run) as store:
        assert (store.last_step() or 0) + 1 < STEPS, "they went on without their launcher"
    assert cli.run(["resume", str(run), "--num-processes", "1"]) == 0
    assert_same_course(tmp_path / "runs" / "alone", run)


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_others_with_its_number_and_signal(tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path, steps=LONG), tmp_path / "runs" / "killed"
    words = ["train", str(recipe), "--name", run.name, "--root", str(run.parent), "--num-processes", "2"]
    started = Started(tmp_path / "log", *words)
    assert await_updates(started, run, 1), started.said()
    await_gone(started, started.kill(victim=2))
    assert "process 1 of 2 was ended by signal 9" in started.said()
    assert "Traceback" not in started.said()


def test_ctrl_c_at_the_launcher_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path, steps=LONG), tmp_path / "runs" / "stopped"
    words = ["train", str(recipe), "--name", run.name, "--root", str(run.parent), "--num-processes", "2"]
    started = Started(tmp_path / "log", *words)
    assert await_updates(started, run, 1), started.said()
    family = [started.launcher.pid, *started.ranks()]
    os.killpg(started.launcher.pid, signal.SIGINT)
    await_gone(started, family)
    assert started.launcher.returncode == 130
    said = started.said()
    assert said.count("stopping after this update, with a checkpoint") == 1
    assert f"go on with: tether resume {run}" in said
    assert "saved at update" in said
    assert not [word for word in ("Traceback", "elastic", "death signal") if word in said]


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_shared_run_killed_thirty_times_is_the_run_that_nobody_killed(tmp_path: Path) -> None:
    """A run that ends before the last kill is compared, and another one on another string is begun."""
    draw, kills, number = random.Random(2), 0, 0
    recipe = write_recipe(tmp_path, steps=LONG)
    while kills < KILLS:
        number += 1
        words = [
            "train",
            str(recipe),
            "--root",
            str(tmp_path / "runs"),
            "--num-processes",
            "2",
            "--beta",
            f"0.{number}",
        ]
        finish([*words, "--name", f"whole-{number}"], limit=1800.0)
        run, ended = tmp_path / "runs" / f"killed-{number}", -1
        while ended:
            command = ["resume", str(run)] if (run / "run.db").exists() else [*words, "--name", run.name]
            started = Started(tmp_path / "log", *command)
            if kills < KILLS and is_time(started, run, draw):
                await_gone(started, started.kill(draw.randrange(3)))
                kills += 1
            else:
                ended = started.launcher.wait(1800.0)
                assert ended == 0, started.said()
        assert all_of(run) == all_of(tmp_path / "runs" / f"whole-{number}"), f"run {number}, {kills} kills"
    print(f"{kills} kills over {number} runs: all equal")


def all_of(run: Path) -> dict[str, object]:
    """All that a run leaves, bit by bit; curves as text, in which a NaN equals a NaN."""
    left = left_behind(run)
    return left | {"curves": repr(left["curves"])}


def is_time(started: Started, run: Path, draw: random.Random) -> bool:
    """At a random moment: while it starts, or within some updates. False where it ended before."""
    wanted = draw.randint(-1, LONG // 5)
    if wanted >= 0 and not await_updates(started, run, wanted):
        return False
    time.sleep(draw.uniform(0.0, START_SECONDS if wanted < 0 else 0.5))
    return started.launcher.poll() is None
