"""Real workers on a real Ray on this machine: equal to one process, outliving kills, one clear error for each fault.

`make ray` runs it; it starts a Ray of three workers, and some programs with a Ray of their own.
"""

from __future__ import annotations

import copy
import http.server
import importlib
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

import ranked_runs
from ranked_runs import REAL_WORKERS
from ray_run_of import STEPS, WORKERS, on_ray, updates_of
from resumable import count_words, left_behind, settings_of, task_of
from tether.batch import Prompt
from tether.config import RunSettings
from tether.errors import ModelError, WorkerError
from tether.runtime import ray_cluster, ray_crew
from tether.runtime_settings import RaySettings
from tether.session import train_run
from tether.store import RunStore
from tether.task import Judges, open_policy
from tether.workers import WritingWorker
from tolerances import ROUND_OFF, assert_close

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("unchecked_shapes"), pytest.mark.timeout(900),
              pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning")]  # fmt: skip

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def cluster() -> Iterator[ray_cluster.Cluster]:
    """One Ray for all tests in this process; runs that find it use it. Its workers find what the tests define."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])
    with ray_cluster.connected(RaySettings(**WORKERS)) as found:  # type: ignore[arg-type]
        yield found


@pytest.fixture
def crews(cluster: ray_cluster.Cluster) -> Iterator[ray_cluster.Cluster]:
    """The same, given back after each test."""
    yield cluster
    cluster.release()


class Clerk:
    """Answers, sleeps, fails, or lays down its life."""

    def double(self, number: int) -> int:
        return 2 * number

    def rest(self, seconds: float) -> str:
        time.sleep(seconds)
        return "rested"

    def fall(self, mark: str) -> str:
        """Dies at the first call, and says so at the next."""
        if Path(mark).exists():
            return "risen"
        Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)
        return "never"

    def complain(self) -> None:
        raise ModelError("no such folder")


# ── a crew ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_crew_answers_in_the_order_of_its_shares(crews: ray_cluster.Cluster) -> None:
    crews.reserve(2)
    crew = crews.crew("clerk", Clerk, 2)
    assert crew.ask("double", [(3,), (4,)]) == [6, 8]
    assert crew.ask("double", [(5,)]) == [10]
    assert len({process for _, process in crew.processes.values()}) == 2


def test_a_worker_that_dies_at_its_task_is_started_anew_and_asked_again(
    crews: ray_cluster.Cluster, tmp_path: Path
) -> None:
    crews.reserve(1)
    crew, told = crews.crew("clerk", Clerk, 1), []
    crew.on_restart = lambda: told.append(1)
    crew.ask("double", [(1,)])
    assert crew.ask("fall", [(str(tmp_path / "fell"),)]) == ["risen"]
    assert (crew.restarts, told) == (1, [1])


def test_a_worker_that_hangs_is_named_with_its_role_and_operation(crews: ray_cluster.Cluster) -> None:
    crews.reserve(2)
    crew = crews.crew("clerk", Clerk, 2)
    crew.ask("double", [(1,), (1,)])
    crew.limit_seconds = 2.0
    with pytest.raises(WorkerError, match=r"the clerk worker 1 did not answer 'rest' within 2 s.*answer_seconds"):
        crew.ask("rest", [(0.0,), (30.0,)])


def test_a_worker_s_complaint_is_of_its_own_kind_and_says_whose_it_is(crews: ray_cluster.Cluster) -> None:
    crews.reserve(1)
    with pytest.raises(ModelError, match=r"the clerk worker 0 on .*, at 'complain': no such folder"):
        crews.crew("clerk", Clerk, 1).ask("complain", [()])


def test_a_worker_without_the_model_on_its_machine_is_one_error(crews: ray_cluster.Cluster, tmp_path: Path) -> None:
    crews.reserve(1)
    opening = partial(open_policy, tmp_path / "nowhere", settings_of("full"), None)
    with pytest.raises(ModelError, match=r"the rollout worker 0 on .*, at 'hello': .*nowhere"):
        crews.crew("rollout", partial(WritingWorker, opening), 1).ask("hello", [()])


def test_a_cluster_without_room_says_what_is_free(crews: ray_cluster.Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "PLACE_SECONDS", 2.0)
    with pytest.raises(WorkerError, match=r"no room for 99 workers with 1 CPU each; free are \d+ CPU"):
        crews.reserve(99)
    crews.reserve(2)  # nothing is left of the first try


def test_a_store_that_is_too_small_is_told_before_anything_is_sent(crews: ray_cluster.Cluster) -> None:
    with pytest.raises(WorkerError, match=r"object store is too small: the weights take 9000 MiB .* holds 200"):
        crews.require_store(9000 * 2**20, "the weights")
    crews.require_store(2**20, "the weights")


@pytest.mark.parametrize("fault", ["ObjectStoreFullError", "OutOfDiskError"])
def test_a_store_that_fills_up_is_one_error(
    crews: ray_cluster.Cluster, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tether.runtime.ray_crew import deposit

    def full(thing: object) -> None:
        raise getattr(ray.exceptions, fault)("no room")

    monkeypatch.setattr(ray, "put", full)
    with pytest.raises(WorkerError, match=r"object store is full: the driver found no room at 'send weights'"):
        deposit([1], "send weights")


def test_what_answers_and_is_no_ray_is_one_error_within_seconds() -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started = time.monotonic()
        with pytest.raises(WorkerError, match="is no Ray"):
            ray_cluster._look(f"127.0.0.1:{server.server_port}")
        assert time.monotonic() - started < ray_cluster.ASK_SECONDS + 5.0
        server.shutdown()


def test_an_address_from_the_environment_is_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own word for where jobs are sent, a page's address, is none to join."""
    monkeypatch.setenv(ray_cluster.ADDRESS, "http://127.0.0.1:8265")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    told = r"RAY_ADDRESS is 'http://127\.0\.0\.1:8265'; wanted auto or HOST:PORT"
    with pytest.raises(WorkerError, match=told), ray_cluster.connected(RaySettings()):
        pass


def test_a_machine_that_is_no_node_of_the_cluster_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: object) -> None:
        raise ConnectionError("Failed to connect") from RuntimeError("No node info found")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(WorkerError, match=r"Failed to connect; No node info found\. Make this machine a node of it"):
        ray_cluster._connect("auto")


def test_a_ray_that_asks_for_its_token_says_how_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "…\nray.exceptions.AuthenticationError: RPC error: InvalidAuthToken: Authentication token is missing"
    monkeypatch.setattr(subprocess, "run", lambda words, **how: subprocess.CompletedProcess(words, 1, "", said))
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        with pytest.raises(WorkerError, match=rf"the Ray at {address} asks for its token; set RAY_AUTH_MODE=token"):
            ray_cluster._look(address)


def test_a_cluster_of_another_python_is_told_with_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.utils import check_version_info

    def refuse(**options: object) -> None:
        check_version_info({"ray_version": ray.__version__, "python_version": "3.9.1"}, "node 10.0.0.2")

    monkeypatch.setattr(ray, "init", refuse)
    own = rf"{sys.version_info.major}\.{sys.version_info.minor}\."
    with pytest.raises(WorkerError, match=rf"no Ray can be used at auto: .*Python: 3\.9\.1 .*Python: {own}"):
        ray_cluster._connect("auto")


def test_a_machine_without_the_program_is_told_with_what_it_lacks(
    crews: ray_cluster.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "from tether.runtime.ray_crew import Servant\n\n\nclass Here(Servant):\n    pass\n"
    (tmp_path / "here_alone.py").write_text(module, "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(ray_crew, "Servant", importlib.import_module("here_alone").Here)
    crews.reserve(1)
    with pytest.raises(WorkerError, match=r"the clerk worker 0 is gone [^\x1b]* No module named 'here_alone'"):
        crews.crew("clerk", Clerk, 1).ask("double", [(1,)])


def test_ray_takes_the_example_of_a_cluster_and_starts_its_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.autoscaler._private import commands, util

    told = yaml.safe_load((TESTS.parent / "docs" / "runtimes" / "ray-cluster.yaml").read_text("utf-8"))
    util.validate_config(util.prepare_config(copy.deepcopy(told)))  # as `ray up` does
    warnings: list[object] = []
    monkeypatch.setattr(commands.cli_logger, "warning", lambda text, *words: warnings.append((text, words)))
    commands.warn_about_bad_start_command(told["head_start_ray_commands"])
    assert not warnings


# ── whole runs ──────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass
class AtCalls:
    """A reward that counts words, and does something at some of its calls."""

    calls: Sequence[int]
    act: Callable[[], None]
    made: int = 0

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str], **columns: Sequence[object]) -> list[float]:
        self.made += 1
        if self.made in self.calls:
            self.act()
        return count_words(prompts, responses)


def carry_out(root: Path, name: str, settings: RunSettings, reward: object = count_words) -> dict[str, object]:
    task = replace(task_of(root / "sft"), judges=Judges(reward))  # type: ignore[arg-type]
    train_run(task, settings, root, name, Console(file=io.StringIO()))
    return left_behind(root / name)


def assert_same_course(got: dict[str, object], wanted: dict[str, object]) -> None:
    """Every metric, and every weight and moment, to round-off."""
    curves, expected = got["curves"], wanted["curves"]
    assert isinstance(curves, dict)
    assert isinstance(expected, dict)
    assert curves.keys() == expected.keys()
    for name, (steps, values) in expected.items():
        assert curves[name][0] == steps
        assert curves[name][1] == pytest.approx(values, rel=1e-4, abs=1e-5, nan_ok=True), name
    bits, others = got["bits"], wanted["bits"]
    assert isinstance(bits, dict)
    assert isinstance(others, dict)
    for name in others:
        one, other = (torch.frombuffer(bytearray(each[name]), dtype=torch.float32) for each in (bits, others))
        assert_close(one, other.double(), ROUND_OFF)


@pytest.mark.parametrize("mode", ["full", "lora", "top"])
@pytest.mark.usefixtures("cluster")
def test_two_writers_and_a_scorer_end_where_one_process_ends(tmp_path: Path, mode: str) -> None:
    alone = carry_out(tmp_path, "alone", settings_of(mode, steps=5))
    assert_same_course(carry_out(tmp_path, "helped", on_ray(mode=mode, steps=5)), alone)


def test_two_learners_and_their_workers_end_where_one_process_ends(tmp_path: Path) -> None:
    """The first of the two talks to Ray; the other hears from it."""
    ranked = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)]),
              "OMP_NUM_THREADS": "1", REAL_WORKERS: "1"}  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    names = ["full-with-workers", "top-with-workers"]
    done = subprocess.run(
        [*command, str(TESTS / "ranked_runs.py"), str(tmp_path), *names], env=ranked, capture_output=True, text=True,
        timeout=800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name in names:
        mode = name.partition("-")[0]
        ranked_runs.train(tmp_path / mode, ranked_runs.RUNS[mode], Console(quiet=True))
        assert_same_course(left_behind(tmp_path / name), left_behind(tmp_path / mode))
        with RunStore.open(tmp_path / name) as store:
            told = store.meta()
        assert (told["processes"]["count"], told["workers"]["runtime"]) == (2, "ray")  # type: ignore[index]


def workers_of(run: Path) -> list[int]:
    """Process ids of the workers, by the run folder."""
    with RunStore.open(run) as store:
        told = store.meta()["workers"]
    assert isinstance(told, dict)
    return [int(one["process"]) for role in ("rollout", "scoring") for one in told[role]["workers"]]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.usefixtures("cluster")
def test_killed_workers_change_nothing(tmp_path: Path, overlap: bool) -> None:
    """kill -9 of one writer, of all writers, of the scorer: each in the middle of an update."""
    victims = iter([slice(0, 1), slice(0, 2), slice(2, 3)])

    def kill() -> None:
        for process in workers_of(tmp_path / "killed")[next(victims)]:
            os.kill(process, signal.SIGKILL)

    settings = on_ray(overlap=overlap)
    whole = carry_out(tmp_path, "whole", settings, AtCalls((), kill))
    # a reward is called in each update, and in the evaluations before, between and after
    killed = carry_out(tmp_path, "killed", settings, AtCalls((3, 5, 7), kill))
    assert next(victims, None) is None
    assert killed == whole
    with RunStore.open(tmp_path / "killed") as store:
        told = store.meta()["workers"]
    assert isinstance(told, dict)
    assert told["rollout"]["restarts"] >= 2
    assert told["scoring"]["restarts"] >= 1


# ── the learner killed ──────────────────────────────────────────────────────────────────────────────────────────────
def program(run: Path, overlap: bool) -> subprocess.Popen[bytes]:
    """`ray_run_of.py` on its way."""
    paths = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "ray_run_of.py"), str(run), *(["overlap"] if overlap else [])]
    with (run.parent / f"{run.name}.log").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_learner_that_was_killed_goes_on_from_its_checkpoint(tmp_path: Path, overlap: bool) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert program(whole, overlap).wait() == 0, (tmp_path / "whole.log").read_text()[-3000:]
    learner = program(killed, overlap)
    while updates_of(killed) < STEPS // 2:
        assert learner.poll() is None, (tmp_path / "killed.log").read_text()[-3000:]
        time.sleep(0.05)
    orphans = workers_of(killed)
    learner.send_signal(signal.SIGKILL)
    assert learner.wait() == -signal.SIGKILL
    assert program(killed, overlap).wait() == 0, (tmp_path / "killed.log").read_text()[-3000:]
    assert left_behind(killed) == left_behind(whole)
    assert not [process for process in orphans if Path(f"/proc/{process}").exists()]
