"""Workers of one role in processes of Ray's, asked in shares, waited for with a limit, outliving their own deaths.

    call = crew.begin("write", [arguments of worker 0, of worker 1, …])       all at once, does not wait
    answers = call.take()                                                     in the order of the shares

A worker's answer is a function of what it is asked alone: whoever asks sends along all that it depends on, weights by
their place in Ray's object store. So Ray itself starts a worker that died anew (`max_restarts`) and asks it again what
it had not answered (`max_task_retries`), and nobody notices but by the clock. What a worker raises comes back as a
value, so that Ray repeats nothing that would fail again. Knows no model. Read next: `remote.py`.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tether import errors
from tether.errors import TetherError, WorkerError

if TYPE_CHECKING:
    from ray import ObjectRef

COLOURS = re.compile(r"\x1b\[[\d;]*m")
FOR_EVER = -1
"""Ray's word for a worker that is started again however often it dies; the limit of each answer bounds that."""


@dataclass(frozen=True)
class Answer:
    """What a worker gives back."""

    process: int
    host: str
    value: object = None
    fault: str | None = None
    """What it raised, in words."""
    kind: str = ""
    """The class of that."""


class Servant:
    """What runs in a worker's process: a thing of its role, made when it is first needed."""

    def __init__(self, limit_seconds: float) -> None:
        self._limit = limit_seconds
        self._thing: object | None = None

    def call(self, build: Sequence[ObjectRef], operation: str, arguments: Sequence[object]) -> Answer:
        """What the thing's method gives, or how it failed; never raises.

        `build`: where in the object store lies what makes the thing; Ray wants to start workers anew by themselves, so
        it comes with each call and not with the first.
        """
        process, host = os.getpid(), socket.gethostname()
        try:
            if self._thing is None:
                self._thing = collect(build, self._limit)()
            return Answer(process, host, getattr(self._thing, operation)(*arguments))
        except Exception as fault:
            return Answer(process, host, fault=str(fault) or repr(fault), kind=type(fault).__name__)


@dataclass
class Call:
    """An operation that a crew is at."""

    crew: Crew
    operation: str
    parts: list[ObjectRef]
    """One a share."""

    def take(self) -> list[object]:
        """The answers, share by share; waits for them, at most as long as the crew's limit.

        Raises WorkerError, with role, number and operation, where a worker does not answer in time or is gone for
        good; the worker's own complaint, as what it is, where it has one.
        """
        import ray

        with _complaints(self.crew.role, self.operation):
            done, late = ray.wait(self.parts, num_returns=len(self.parts), timeout=self.crew.limit_seconds)
        if late:
            raise WorkerError(
                f"the {self.crew.role} worker {self.parts.index(late[0])} did not answer {self.operation!r} within "
                f"{self.crew.limit_seconds:g} s; look whether its machine is up, or raise runtime.ray.answer_seconds"
            )
        del done
        return [self._answer(worker) for worker in range(len(self.parts))]

    def _answer(self, worker: int) -> object:
        import ray

        with _complaints(self.crew.role, self.operation, worker):
            answer = ray.get(self.parts[worker], timeout=self.crew.limit_seconds)
        assert isinstance(answer, Answer)
        self.crew.heard(worker, answer)
        if answer.fault is None:
            return answer.value
        raise _as_raised(answer, f"the {self.crew.role} worker {worker} on {answer.host}, at {self.operation!r}: ")


@dataclass
class Crew:
    """The workers of one role."""

    role: str
    build: Callable[[], object]
    """What a worker holds; runs in its process, at its first task."""
    places: Sequence[Mapping[str, object]]
    """What Ray shall give each worker."""
    limit_seconds: float
    processes: dict[int, tuple[str, int]] = field(default_factory=dict)
    """Host and process of each worker that has answered."""
    restarts: int = 0
    """Times that a worker answered from another process than before."""
    on_restart: Callable[[], None] | None = None
    """Told of each."""

    def __post_init__(self) -> None:
        import ray

        actor = ray.remote(Servant)
        self._build = [deposit(self.build, f"make a {self.role} worker")]
        self._workers = [
            actor.options(max_restarts=FOR_EVER, max_task_retries=FOR_EVER, **place).remote(self.limit_seconds)
            for place in self.places
        ]

    def __len__(self) -> int:
        return len(self._workers)

    def begin(self, operation: str, shares: Sequence[Sequence[object]]) -> Call:
        """Ask the first workers, one share each. Raises WorkerError where what they are sent finds no room."""
        pairs = zip(self._workers, shares, strict=False)
        with _complaints(self.role, operation):
            return Call(self, operation, [worker.call.remote(self._build, operation, share) for worker, share in pairs])

    def ask(self, operation: str, shares: Sequence[Sequence[object]]) -> list[object]:
        """Begin, and take."""
        return self.begin(operation, shares).take()

    def heard(self, worker: int, answer: Answer) -> None:
        """Note where the worker lives."""
        place = (answer.host, answer.process)
        moved = self.processes.get(worker, place) != place
        self.processes[worker] = place
        if moved:
            self.restarts += 1
            if self.on_restart is not None:
                self.on_restart()

    def dismiss(self) -> None:
        """End the workers."""
        import ray

        for worker in self._workers:
            ray.kill(worker)
        self._workers = []


def deposit(thing: object, what: str) -> ObjectRef:
    """Put a thing into Ray's object store, once for all who read it. Raises WorkerError where it is full."""
    import ray

    with _complaints("driver", what):
        return ray.put(thing)


def collect(place: Sequence[ObjectRef], limit_seconds: float) -> Any:
    """What lies at a place in the object store. Raises WorkerError where it does not come in time."""
    import ray

    with _complaints("object store", "collect"):
        return ray.get(place[0], timeout=limit_seconds)


@contextmanager
def _complaints(role: str, operation: str, worker: int | None = None) -> Iterator[None]:
    """What Ray says, as one WorkerError."""
    from ray import exceptions

    who = f"the {role}" if worker is None else f"the {role} worker {worker}"
    try:
        yield
    except (exceptions.ObjectStoreFullError, exceptions.OutOfDiskError) as error:
        raise WorkerError(
            f"Ray's object store is full: {who} found no room at {operation!r} ({_line(error)}); raise "
            "runtime.ray.object_store_mb, or --object-store-memory of `ray start`"
        ) from error
    except exceptions.GetTimeoutError as error:
        raise WorkerError(f"{who} had no answer to {operation!r} in time: {_line(error)}") from error
    except exceptions.RayActorError as error:
        raise WorkerError(
            f"{who} is gone and did not come back at {operation!r}: {_line(error)}. The last checkpoint is whole: "
            "resume from it"
        ) from error
    except exceptions.RayError as error:
        raise WorkerError(f"Ray failed {who} at {operation!r}: {type(error).__name__}: {_line(error)}") from error


def _as_raised(answer: Answer, prefix: str) -> TetherError:
    """A worker's complaint in this process: of the same class where it is one of tether's."""
    kind = getattr(errors, answer.kind, None)
    if isinstance(kind, type) and issubclass(kind, TetherError):
        return kind(f"{prefix}{answer.fault}")
    return WorkerError(f"{prefix}{answer.kind}: {answer.fault}")


def _line(error: BaseException) -> str:
    """What happened, and the line after it that names the reason: the last, as of a worker's traceback."""
    text = COLOURS.sub("", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    said = lines[0] if len(lines) == 1 else f"{lines[0][:300]} … {lines[-1]}"
    return said[:600].rstrip(".")
