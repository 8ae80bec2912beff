"""The processes that share a run: which one this is, and what they say to each other.

    with joined(): …            under torchrun or accelerate launch: one group of processes; else a process alone
    here().share(rows)          the rows that are this process's
    here().whole(mine, rows)    what each found for its rows → all rows, on every process
    here().sum · same · any     a sum over all; what the first process says; whether one of them says yes

Every process runs the same program over the same batch, whose numbers all of them hold; what is shared is the passes of
the models, row by row, and with them the gradients, as sums. So each decision is taken alike everywhere, and a seed
gives the same run at any number of processes, up to the order of sums. The transport is torch.distributed's: gloo
between CPUs, NCCL between GPUs. Knows no model and no room. Read next: `ranked.py`, `update.py`.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tether.errors import ConfigError, RunError, TetherError
from tether.runtime.interrupt import stop_without_launcher
from tether.runtime.network import choose_interface

T = TypeVar("T")
TIMEOUT = "TETHER_RANK_TIMEOUT"
TIMEOUT_SECONDS = 1800.0
"""How long a process waits for another; the environment variable above says otherwise."""


class Ranks:
    """A process alone: everything is its own. `Group` has the same form."""

    rank = 0
    """Which of the processes this is. The first, 0, alone writes the run folder and talks to people."""
    count = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, rows: int) -> slice:
        """This process's rows of so many: neighbours, at most one row more than anybody's."""
        return slice(self.rank * rows // self.count, (self.rank + 1) * rows // self.count)

    def whole(self, mine: Tensor, rows: int) -> Tensor:
        """All rows, of which `mine` are this process's share; the axes after the first are equal everywhere."""
        del rows
        return mine

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        return tensor

    def sum_all(self, tensors: Sequence[Tensor]) -> None:
        """The sums over all processes, in place, all on their way at once."""

    def largest(self, number: float) -> float:
        """The largest of what the processes say."""
        return number

    def any(self, wish: bool) -> bool:
        """Whether one of the processes says yes."""
        return self.largest(float(wish)) > 0.0

    def same(self, thing: T) -> T:
        """What the first process says; the others' own is not looked at."""
        return thing

    def said(self, own: T) -> list[T]:
        """What each process says, by rank."""
        return [own]

    def spread(self, tensors: Sequence[Tensor]) -> None:
        """Put the first process's numbers into everybody's tensors."""

    def ask_first(self, act: Callable[[], T]) -> T:
        """Run this on the first process alone; its result, or its TetherError, is everybody's."""
        return act()

    def together(self, act: Callable[[], T], *, first_ahead: bool = False) -> T:
        """Run this on every process, `first_ahead` lets the first fill a cache that the others then read.

        A TetherError of one is raised on all, and says whose it was.
        """
        del first_ahead
        return act()


class Group(Ranks):
    """The processes of torch.distributed's default group."""

    def __init__(self) -> None:
        self.rank, self.count = dist.get_rank(), dist.get_world_size()

    def whole(self, mine: Tensor, rows: int) -> Tensor:
        """Each fills its rows of zeros, and the sum is the whole: exact, since x + 0 is x."""
        every = torch.zeros((rows, *mine.shape[1:]), dtype=mine.dtype, device=mine.device)
        every[self.share(rows)] = mine
        return self.sum(every.view(torch.uint8)).view(torch.bool) if mine.dtype == torch.bool else self.sum(every)

    def sum(self, tensor: Tensor) -> Tensor:
        with _complaints(self, "a sum"):
            dist.all_reduce(tensor)
        return tensor

    def sum_all(self, tensors: Sequence[Tensor]) -> None:
        with _complaints(self, "the gradients' sum"):
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()

    def largest(self, number: float) -> float:
        said = torch.tensor([number], dtype=torch.float64, device=_place())
        with _complaints(self, "the largest number"):
            dist.all_reduce(said, op=dist.ReduceOp.MAX)
        return float(said)

    def same(self, thing: T) -> T:
        said: list[T | None] = [thing if self.is_first else None]
        with _complaints(self, "word of the first process"):
            dist.broadcast_object_list(said, src=0)
        return said[0]  # type: ignore[return-value]

    def said(self, own: T) -> list[T]:
        every: list[T | None] = [None] * self.count
        with _complaints(self, "word of all"):
            dist.all_gather_object(every, own)
        return every  # type: ignore[return-value]

    def spread(self, tensors: Sequence[Tensor]) -> None:
        with _complaints(self, "the first process's tensors"):
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def ask_first(self, act: Callable[[], T]) -> T:
        given, fault = _attempt(act) if self.is_first else (None, None)
        given, fault = self.same((given, fault))
        if fault is not None:
            raise fault
        return given  # type: ignore[return-value]

    def together(self, act: Callable[[], T], *, first_ahead: bool = False) -> T:
        given, fault = _attempt(act) if self.is_first or not first_ahead else (None, None)
        if first_ahead:
            self._raise_any(fault)
            if not self.is_first:
                given, fault = _attempt(act)
        self._raise_any(fault)
        return given  # type: ignore[return-value]

    def _raise_any(self, fault: TetherError | None) -> None:
        """Raise on all what one of them met."""
        own = None if fault is None else (f"process {self.rank} of {self.count}, on {socket.gethostname()}", fault)
        said = self.said(own)
        met = [one for one in said if one is not None]
        if met and said[0] is not None:
            raise met[0][1]  # the first process's, as a process alone would say it
        if met:
            raise type(met[0][1])(f"{met[0][0]}: {met[0][1]}")


ALONE = Ranks()
_here: Ranks = ALONE


def here() -> Ranks:
    """This process among those that share the run."""
    return _here


def is_launched() -> bool:
    """Whether torchrun, accelerate launch or the like started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ and "MASTER_ADDR" in os.environ


def is_first() -> bool:
    """Whether this process is the one that talks to people, before and after the processes are joined too."""
    return not is_launched() or os.environ["RANK"] == "0"


def several_hosts() -> bool:
    """Whether some of the processes run on another machine, as far as their launcher says."""
    return os.environ.get("LOCAL_WORLD_SIZE", "1") != os.environ.get("WORLD_SIZE", "1")


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that were launched with this one, for as long as the block runs; alone where there are none.

    Raises RunError where they cannot be reached.
    """
    global _here
    if not is_launched() or _here is not ALONE:
        yield _here
        return
    stop_without_launcher()
    _join()
    _here = Group()
    try:
        yield _here
    finally:
        _here = ALONE
        _part()


def _join() -> None:
    backend, limit = "gloo", timedelta(seconds=_timeout())
    if torch.cuda.is_available():
        _require_gpus(torch.cuda.device_count())
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    choose_interface(os.environ["MASTER_ADDR"], several_hosts())
    try:
        dist.init_process_group(backend, timeout=limit)
    except (RuntimeError, ValueError, OSError) as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RunError(
            f"process {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} does not reach the others at {place}: "
            f"{_line(error)}. {_advice(error)}"
        ) from error


def _require_gpus(there: int) -> None:
    """Raise ConfigError, on all processes of a machine alike, where they outnumber its GPUs: NCCL wants one each."""
    started = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if started > there:
        raise ConfigError(
            f"{started} processes were started on {socket.gethostname()}, where {there} GPUs are to be seen; wanted "
            f"one each: start {there}, or set CUDA_VISIBLE_DEVICES= (nothing) to work on the CPU"
        )


def _advice(error: Exception) -> str:
    if "EADDRINUSE" in str(error):
        return "Another program listens there; give all of them another MASTER_PORT"
    return "Start all of them, with the same address and number of processes"


def _part() -> None:
    """Leave the group. Where another process died, leaving may fail as well, and has nothing to add."""
    with suppress(RuntimeError):
        dist.destroy_process_group()


def _timeout() -> float:
    said = os.environ.get(TIMEOUT, str(TIMEOUT_SECONDS))
    try:
        seconds = float(said)
    except ValueError:
        seconds = 0.0
    if not seconds > 0.0:
        raise ConfigError(f"{TIMEOUT} is {said!r}; wanted seconds, as 600")
    return seconds


@contextmanager
def _complaints(ranks: Ranks, what: str) -> Iterator[None]:
    """What torch.distributed says of a process that is gone, as one RunError."""
    try:
        yield
    except RuntimeError as error:
        raise RunError(
            f"process {ranks.rank} of {ranks.count}, on {socket.gethostname()}, waited for {what} and lost the others: "
            f"{_line(error)}. One of them died or cannot be reached; `tether resume` goes on from the last "
            "checkpoint, or anew where there is none"
        ) from error


def _attempt(act: Callable[[], T]) -> tuple[T | None, TetherError | None]:
    try:
        return act(), None
    except TetherError as fault:
        return None, fault


def _place() -> Literal["cpu"]:
    """Where small numbers are exchanged: gloo is always there."""
    return "cpu"


def _line(error: Exception) -> str:
    """The first sentence of an error, without torch's own stack and the place in its source."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[\S+:\d+\] ", "", first).partition(". ")[0][:200]
