"""A Ray to work on: one that is there, found by its address, or one of the run's own on this machine.

    with connected(settings) as cluster: …       leaves as it came; a Ray of the run's own ends with it
    cluster.crew(role, build, count)             workers of one role, each a process with what `build` gives

All crews of a run are asked for together (`cluster.reserve`) in one placement group (PACK: as few machines as hold
them), so that a run either gets all its workers or says what it lacks. Ray is imported here, when somebody asks for it,
and nowhere else but in `ray_crew.py`. Knows no model. Read next: `ray_crew.py`.
"""

from __future__ import annotations

import importlib
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tether.errors import MissingExtraError, WorkerError
from tether.runtime.ray_crew import Crew
from tether.runtime_settings import RaySettings

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

ADDRESS = "RAY_ADDRESS"
"""Where Ray itself, and `ray job submit`, say which cluster is meant."""
KNOB = "runtime.ray.address"
KNOCK_SECONDS = 5.0
"""For somebody to answer at the address at all."""
ASK_SECONDS = 15.0
"""For a Ray to say that it is one. Left to itself, `ray.init` tries for two minutes and ends the process."""
PLACE_SECONDS = 60.0
"""For a cluster to find room for the workers; one that grows by itself may take longer, and wants a second start."""
STARTS = 3
"""Tries to start a Ray of the run's own: it gives each of its processes 30 s, which a machine at its limit exceeds."""
MIB = 2**20


@dataclass
class Cluster:
    """A Ray that this process is connected to."""

    settings: RaySettings
    address: str
    _group: PlacementGroup | None = None
    _taken: int = 0
    _crews: list[Crew] = field(default_factory=list)

    @property
    def version(self) -> str:
        """Of Ray, which is the same on all its machines."""
        import ray

        return str(ray.__version__)

    def reserve(self, workers: int) -> None:
        """Room for all workers of the run, at once. Raises WorkerError where the cluster has none within a minute."""
        import ray
        from ray.util.placement_group import placement_group

        wanted = {"CPU": self.settings.cpus_per_worker, "GPU": self.settings.gpus_per_worker}
        bundle = {name: amount for name, amount in wanted.items() if amount}
        self._group = placement_group([bundle] * workers, strategy="PACK")
        if not self._group.wait(timeout_seconds=PLACE_SECONDS):
            free = {name: ray.available_resources().get(name, 0.0) for name in bundle}
            self.release()
            raise WorkerError(
                f"the Ray at {self.address} has no room for {workers} workers with {_amounts(bundle)} each; free are "
                f"{_amounts(free)}: lower runtime.ray.rollout_workers or scoring_workers, or start more nodes"
            )

    def require_store(self, size: int, what: str) -> None:
        """Raise WorkerError where the object store of some machine holds less than this many bytes.

        Ray would go on, through files on the disk and at their pace; a run would be slow and nobody would know why.
        """
        import ray

        nodes = [node for node in ray.nodes() if node["Alive"]]
        least = min(float(node["Resources"].get("object_store_memory", 0.0)) for node in nodes)
        if size > least:
            raise WorkerError(
                f"Ray's object store is too small: {what} take {size / MIB:.0f} MiB and a machine's store holds "
                f"{least / MIB:.0f}; raise runtime.ray.object_store_mb, or --object-store-memory of `ray start`"
            )

    def crew(self, role: str, build: Callable[[], object], count: int) -> Crew:
        """So many workers of a role, in the room that was reserved; they start now, and answer when they have."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        places = [
            {
                "num_cpus": self.settings.cpus_per_worker,
                "num_gpus": self.settings.gpus_per_worker,
                "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, self._taken + worker),
            }
            for worker in range(count)
        ]
        self._taken += count
        crew = Crew(role, build, places, self.settings.answer_seconds)
        self._crews.append(crew)
        return crew

    def release(self) -> None:
        """End the workers, and give their room back."""
        from ray.util.placement_group import remove_placement_group

        for crew in self._crews:
            crew.dismiss()
        if self._group is not None:
            remove_placement_group(self._group)
        self._crews, self._group, self._taken = [], None, 0


@contextmanager
def connected(settings: RaySettings) -> Iterator[Cluster]:
    """A Ray for the length of a run: by `settings.address`, else by RAY_ADDRESS, else one of the run's own.

    A Ray that this process was connected to before is used as it is, and left connected. Raises MissingExtraError
    where Ray is not installed, WorkerError where nobody answers at the address, or no Ray.
    """
    _prepare()
    require_ray()
    import ray

    address, named = settings.address, KNOB
    if not address:
        address, named = os.environ.get(ADDRESS), ADDRESS
    before = ray.is_initialized()
    if not before:
        if not address:
            _start(settings)
        else:
            _connect(address, named)
    cluster = Cluster(settings, address or "this machine")
    try:
        yield cluster
    finally:
        cluster.release()
        if not before:
            ray.shutdown()


def require_ray() -> None:
    """Raise MissingExtraError, with the install line, where Ray is not installed."""
    try:
        importlib.import_module("ray")
    except ImportError as error:
        raise MissingExtraError("runtime.writer: ray wants Ray; install it: pip install 'tether[ray]'") from error


def _prepare() -> None:
    """What Ray reads from the environment, where the user has not said otherwise.

    It tells of its start and of every worker on the terminal, where the run's own lines stand; it starts workers at
    niceness 15, although the learner waits for them; and it shows every GPU to a worker that was given none.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")


def _start(settings: RaySettings) -> None:
    """A Ray on this machine that ends with this process, with a core for each worker whether there is one or not."""
    import ray

    workers, store = settings.rollout_workers + settings.scoring_workers, settings.object_store_mb
    for left in reversed(range(STARTS)):
        try:
            ray.init(
                num_cpus=max(os.cpu_count() or 1, round(workers * settings.cpus_per_worker + 0.5)),
                object_store_memory=None if store is None else store * MIB,
                include_dashboard=False, configure_logging=False, log_to_driver=False,
            )  # fmt: skip
            return
        except Exception as error:
            ray.shutdown()
            if not left:
                raise WorkerError(
                    f"Ray did not start on this machine: {_line(error)}. Its own words are in "
                    "/tmp/ray/session_latest/logs; it wants a few hundred MB of memory and of /dev/shm"
                ) from error


def _connect(address: str, named: str = KNOB) -> None:
    """Join the Ray at an address, after a look whether there is one; `named`: where the user says which."""
    import ray

    if address != "auto":
        _look(address, named)
    try:
        ray.init(address=address, configure_logging=False, log_to_driver=False)
    except (Exception, SystemExit) as error:
        raise WorkerError(
            f"no Ray can be used at {address}: {_in_one_line(error)}. Make this machine a node of it (ray start, with "
            f"the same Python and Ray), send the run there (ray job submit), or leave {named} out for a Ray of its own"
        ) from error


def _look(address: str, named: str = KNOB) -> None:
    """Raise WorkerError unless a Ray of this version answers at HOST:PORT."""
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdecimal():
        raise WorkerError(
            f"{named} is {address!r}; wanted auto or HOST:PORT of a head node, as 10.0.0.1:6379 (from another machine: "
            "ray job submit)"
        )
    try:
        socket.create_connection((host, int(port)), KNOCK_SECONDS).close()
    except OSError as error:
        raise WorkerError(
            f"nobody answers at {named} {address}: {error}. Is the head node up, and the port that of `ray start "
            "--head` (6379)?"
        ) from error
    asked = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=ASK_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise WorkerError(
            f"what answers at {named} {address} is no Ray, or one that says nothing for {ASK_SECONDS:g} s; wanted the "
            "head node's port, 6379 by default"
        ) from None
    if "AuthenticationError" in said.stderr:  # Ray's own clients send a token to no address that is given to them
        raise WorkerError(
            f"the Ray at {address} asks for its token; set RAY_AUTH_MODE=token here, with the head's ~/.ray/auth_token "
            "copied or RAY_AUTH_TOKEN set"
        )
    if said.returncode:
        raise WorkerError(f"the Ray at {address} cannot be used: {_last_line(said.stderr or said.stdout)}")


def _amounts(resources: dict[str, float]) -> str:
    """`2 CPU and 1 GPU`."""
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")


def _in_one_line(error: BaseException) -> str:
    """All of it, with its cause: where versions differ, Ray says which in the lines after the first."""
    told = [" ".join(str(each).split()) for each in (error, error.__cause__) if each is not None]
    return ("; ".join(told) or type(error).__name__)[:500].rstrip(".")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it says nothing"])[-1][:300]
