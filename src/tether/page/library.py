"""The runs of a folder, each read in a thread of its own, so that one on a slow disk holds up no other.

    Library(root)   finds runs        Shelf   one run: its id, its thread, its last known summary

A question to a run that does not answer in time raises `Slow`; while it hangs, further ones are refused at once. Knows
no HTTP. Read next: `reading.py`, `facts.py`.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tether.errors import RunError, TetherError
from tether.page.reading import Reader
from tether.runs import run_folders

Answer = TypeVar("Answer")
PATIENCE = 10.0
"""Seconds that a question to one run may take; a run that has owed an answer for longer is asked no more meanwhile."""
GLANCE = 1.0
"""Seconds that the list waits for one run's summary."""
IDLE = 60.0
"""Seconds after which a thread that was asked nothing ends."""
STRANGE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What reading a damaged or a made-up run may raise."""
SEPARATOR = "~"
"""Stands for `/` in an id; no run's name has it."""


@contextmanager
def understood(name: str) -> Iterator[None]:
    """Rows that no version of tether writes are a RunError of their run: it is told of, and others go on."""
    try:
        yield
    except TetherError:
        raise
    except STRANGE as error:
        what = f"{type(error).__name__}: {error}"[:200]
        raise RunError(f"{name} holds what is no run's ({what}); restore it from a copy") from error


class Slow(RunError):
    """A run whose disk does not answer; others do."""


class Worker:
    """One thread that answers one question after the other; it ends when nobody asks, and never holds up the exit."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._questions: queue.SimpleQueue[tuple[Future, Callable[[], object]]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._owed: tuple[Future, float] | None = None
        """The oldest question that somebody gave up waiting for, and when it was asked."""

    async def ask(self, question: Callable[[], Answer], patience: float) -> Answer:
        """The answer, or `Slow` where it takes longer; the thread goes on waiting for it."""
        now = time.monotonic()
        if self._owed is not None and not self._owed[0].done() and now - self._owed[1] > PATIENCE:
            raise Slow(f"{self._name}: its disk does not answer; other runs do")
        future: Future[Answer] = Future()
        with self._lock:
            self._questions.put((future, question))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()
        try:
            return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(future)), patience)
        except TimeoutError as error:
            if self._owed is None or self._owed[0].done():
                self._owed = (future, now)
            raise Slow(f"{self._name}: its disk did not answer within {patience:.0f} s; other runs do") from error

    def _work(self) -> None:
        while True:
            try:
                future, question = self._questions.get(timeout=IDLE)
            except queue.Empty:
                with self._lock:
                    if self._questions.empty():
                        self._thread = None
                        return
                continue
            try:
                future.set_result(question())
            except BaseException as error:
                future.set_exception(error)


@dataclass
class Shelf:
    """One run."""

    id: str
    path: Path
    name: str
    worker: Worker
    known: Mapping[str, object] = field(default_factory=dict)
    """The last summary that it gave."""
    cached: dict[str, tuple[object, object]] = field(default_factory=dict)
    """What was worked out of it, by name, with what it depends on."""
    _reader: Reader | None = None
    _file: tuple[int, int] | None = None

    async def ask(self, question: Callable[[Reader], Answer], patience: float = PATIENCE) -> Answer:
        """Ask in the run's own thread. Raises RunError where it cannot be read, `Slow` where it takes too long."""

        def answer() -> Answer:
            with understood(self.name):
                return question(self.reader())

        return await self.worker.ask(answer, patience)

    def reader(self) -> Reader:
        """The run, opened anew where another folder stands in its place; in the run's own thread only."""
        try:
            seen = (self.path / "run.db").stat()
        except OSError as error:
            raise RunError(f"{self.path} cannot be read: {error.strerror or error}; is it still there?") from error
        file = (seen.st_dev, seen.st_ino)
        if self._reader is None or file != self._file:
            if self._reader is not None:
                self._reader.close()
            self._reader, self._file = None, None
            self._reader, self._file = Reader(self.path), file
        return self._reader

    def once(self, name: str, depends_on: object, work: Callable[[], Answer]) -> Answer:
        """`work()`, or what it gave last where nothing that it depends on has changed; in the run's own thread only."""
        known = self.cached.get(name)
        if known is None or known[0] != depends_on:
            known = self.cached[name] = (depends_on, work())
        return known[1]  # type: ignore[return-value]


class Library:
    """All runs below a folder, or the one run that the folder is."""

    def __init__(self, root: Path, clock: Callable[[], float] = time.time) -> None:
        self.selected: str | None = None
        if (root / "run.db").is_file():
            self.selected, root = root.resolve().name, root.resolve().parent
        self.root = root
        self.clock = clock
        self._shelves: dict[str, Shelf] = {}
        self._scanner = Worker(str(root))

    async def scan(self) -> list[Shelf]:
        """The runs that are there now; those known before where the folder's disk does not answer."""
        try:
            folders = await self._scanner.ask(lambda: run_folders(self.root), PATIENCE)
        except (Slow, OSError):
            return list(self._shelves.values())
        found = {identify(path.relative_to(self.root)): path for path in folders}
        for id in self._shelves.keys() - found.keys():
            del self._shelves[id]
        for id, path in found.items():
            self._shelves.setdefault(id, Shelf(id, path, str(path.relative_to(self.root)), Worker(str(path))))
        return [self._shelves[id] for id in found]

    def shelves(self) -> list[Shelf]:
        """The runs that the last scan found."""
        return list(self._shelves.values())

    async def find(self, id: str) -> Shelf | None:
        """The run of an id. Only ids of runs that a scan found are known, so no id is ever a path."""
        if id not in self._shelves:
            await self.scan()
        return self._shelves.get(id)


def identify(path: Path) -> str:
    """The id of a run's path below the root.

    >>> identify(Path("runs/beta-0.1"))
    'runs~beta-0.1'
    """
    return SEPARATOR.join(path.parts)
