"""Two processes on two hosts, 20 ms apart with one packet in a hundred lost, end where one process ends; cut off for
seconds, they go on; cut off for good, they say so in time, and the run is finished by one.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import wire
from shared_runs import STEPS, environment, finish, tether, write_recipe
from test_ranks import assert_same_course
from tether.store import RunStore

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.timeout(600),
    pytest.mark.skipif(wire.why_not() is not None, reason=wire.why_not() or ""),
]
DELAY_SECONDS, LOSS = 0.02, 0.01
PORT = 29511
PATIENCE_SECONDS = 20.0
"""How long a process waits for one that was cut off for good."""


@pytest.fixture
def hosts() -> Iterator[wire.Hosts]:
    with wire.two_hosts(DELAY_SECONDS, LOSS) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, and `runs/alone`, which one process trained."""
    folder = tmp_path_factory.mktemp("hosts")
    path = write_recipe(folder)
    finish(["train", str(path), "--name", "alone", "--root", str(folder / "runs")])
    return path


class Shared:
    """A run that two hosts share."""

    def __init__(self, hosts: wire.Hosts, recipe: Path, name: str, limit: float = 120.0) -> None:
        self.run = recipe.parent / "runs" / name
        self.logs = [recipe.parent / f"{name}-{host}.log" for host in range(2)]
        words = tether("train", str(recipe), "--name", name, "--root", str(self.run.parent))
        self.processes = [
            hosts.start(host, words, seat(host, limit), log) for host, log in enumerate(self.logs)
        ]  # fmt: skip

    def said(self, host: int) -> str:
        return self.logs[host].read_text("utf-8")

    def ended(self, seconds: float) -> list[int]:
        """How each ended, at the latest after so many seconds."""
        until = time.monotonic() + seconds
        return [process.wait(max(1.0, until - time.monotonic())) for process in self.processes]

    def updates(self) -> int:
        """Updates that are recorded."""
        if not (self.run / "run.db").exists():
            return 0
        with RunStore.open(self.run) as store:
            last = store.last_step()
            return 0 if last is None else last + 1

    def wait_for(self, updates: int) -> None:
        wait_until(lambda: self.updates() >= updates, self.processes)


def seat(host: int, limit: float) -> dict[str, str]:
    """The environment of the process on this host, as a launcher sets it."""
    ranks = {"RANK": str(host), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return environment(**ranks, MASTER_ADDR=wire.ADDRESSES[0], MASTER_PORT=str(PORT), TETHER_RANK_TIMEOUT=str(limit))


def wait_until(holds: Callable[[], bool], processes: list[subprocess.Popen[str]]) -> None:
    until = time.monotonic() + 120.0
    while not holds():
        assert time.monotonic() < until, "nothing happened for two minutes"
        assert all(process.poll() is None for process in processes), "a process ended before its time"
        time.sleep(0.05)


def test_two_hosts_end_in_the_losses_and_weights_of_one_process(hosts: wire.Hosts, recipe: Path) -> None:
    shared = Shared(hosts, recipe, "two")
    assert shared.ended(240.0) == [0, 0], shared.said(0)[-3000:] + shared.said(1)[-3000:]
    assert_same_course(recipe.parent / "runs" / "alone", shared.run)
    assert hosts.lost > 10, "the wire was too good"


def test_torchrun_on_each_host_does_the_same(hosts: wire.Hosts, recipe: Path) -> None:
    logs = [recipe.parent / f"torchrun-{host}.log" for host in range(2)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    launcher += ["--master-addr", wire.ADDRESSES[0], "--master-port", str(PORT)]
    words = tether("train", str(recipe), "--name", "torchrun", "--root", str(recipe.parent / "runs"))[1:]
    started = [
        hosts.start(host, [*launcher, "--node-rank", str(host), *words], environment(), log)
        for host, log in enumerate(logs)
    ]
    assert [process.wait(240.0) for process in started] == [0, 0], logs[0].read_text() + logs[1].read_text()
    assert_same_course(recipe.parent / "runs" / "alone", recipe.parent / "runs" / "torchrun")


def test_a_host_that_is_cut_off_for_seconds_is_waited_for(hosts: wire.Hosts, recipe: Path) -> None:
    shared = Shared(hosts, recipe, "cut")
    shared.wait_for(1)
    hosts.cut()
    time.sleep(6.0)
    assert all(process.poll() is None for process in shared.processes)
    assert shared.updates() < STEPS, "nothing was left to do for the host that came back"
    hosts.mend()
    assert shared.ended(240.0) == [0, 0], shared.said(0)[-3000:] + shared.said(1)[-3000:]
    assert_same_course(recipe.parent / "runs" / "alone", shared.run)


def test_a_host_whose_interface_goes_down_and_up_again_is_waited_for(hosts: wire.Hosts, recipe: Path) -> None:
    shared = Shared(hosts, recipe, "down")
    shared.wait_for(1)
    hosts.interface(1, "down")
    time.sleep(5.0)
    assert all(process.poll() is None for process in shared.processes)
    hosts.interface(1, "up")
    assert shared.ended(240.0) == [0, 0], shared.said(0)[-3000:] + shared.said(1)[-3000:]
    assert_same_course(recipe.parent / "runs" / "alone", shared.run)


def test_a_host_that_is_lost_is_told_of_in_time_and_one_process_finishes_the_run(
    hosts: wire.Hosts, recipe: Path
) -> None:
    shared = Shared(hosts, recipe, "lost", limit=PATIENCE_SECONDS)
    shared.wait_for(2)
    hosts.cut()
    cut_at = time.monotonic()
    assert all(shared.ended(3.0 * PATIENCE_SECONDS)), "an end without an error"
    assert time.monotonic() - cut_at < 2.0 * PATIENCE_SECONDS
    for host in range(2):
        words = rf"process {host} of 2, on \S+, waited for .* and lost the others: .* goes on from the last checkpoint"
        assert len(re.findall(words, shared.said(host))) == 1, shared.said(host)[-3000:]
        assert "Traceback" not in shared.said(host)
    assert f"go on with: tether resume {shared.run}" in shared.said(0)
    finish(["resume", str(shared.run)])
    assert_same_course(recipe.parent / "runs" / "alone", shared.run)


def test_a_pause_outlasts_the_time_limit(hosts: wire.Hosts, recipe: Path) -> None:
    """A paused run is silent for as long as people like; its processes must not take that for a loss."""
    shared = Shared(hosts, recipe, "paused", limit=15.0)
    shared.wait_for(1)
    finish(["steer", str(shared.run), "pause"])
    wait_until(lambda: phase(shared.run) == "paused", shared.processes)
    time.sleep(20.0)
    assert all(process.poll() is None for process in shared.processes), shared.said(0)[-3000:]
    finish(["steer", str(shared.run), "resume"])
    assert shared.ended(240.0) == [0, 0], shared.said(0)[-3000:]
    assert_same_course(recipe.parent / "runs" / "alone", shared.run)


def phase(run: Path) -> str:
    with RunStore.open(run) as store:
        beat = store.last_heartbeat()
        return "" if beat is None else beat.phase


def test_a_first_process_that_is_not_there_is_told_of_in_time(hosts: wire.Hosts, recipe: Path) -> None:
    log = recipe.parent / "nobody.log"
    words = tether("train", str(recipe), "--name", "nobody", "--root", str(recipe.parent / "runs"))
    assert hosts.start(1, words, seat(1, limit=3.0), log).wait(60.0) == 1
    assert f"process 1 of 2 does not reach the others at {wire.ADDRESSES[0]}:{PORT}" in log.read_text("utf-8")
