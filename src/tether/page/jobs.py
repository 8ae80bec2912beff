"""Runs that are started from the page: `tether train --world nano`, `tether fork`, `tether resume`, each as a process.

A job's command line is made of numbers in their bounds and of checked names alone; what the page sends is never a
path, a program or code. A job goes on when the server ends. Read next: `app.py`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tether.alarms import FAULTS
from tether.errors import InputError, RunError
from tether.store import RUN_FILE, check_name

LOGS = ".page"
"""Folder of the jobs' output, below the root."""
MOST_JOBS = 2
TAIL = 12
"""Lines of a job's output that the page shows."""
MOST_STEPS = 100_000
PLAY_STEPS = 2000
PLAY_KNOBS: Mapping[str, object] = {
    "--schedule": "constant", "--evaluation.every": 50, "--checkpoint.every": 100, "--keep-samples": 4,
}  # fmt: skip
"""A run that is played with goes on for long at one rate, and shows a few samples of each update."""
MOST_BETA = 10.0
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

Facts = dict[str, object]


@dataclass
class Job:
    """One process."""

    id: str
    kind: str
    run: str
    """The run's id."""
    folder: Path
    log: Path
    process: subprocess.Popen[bytes]
    started: float

    @property
    def state(self) -> str:
        """`starting`, `running`, `done` or `failed`."""
        code = self.process.poll()
        if code is None:
            return "running" if (self.folder / RUN_FILE).is_file() else "starting"
        return "done" if code == 0 else "failed"

    def facts(self) -> Facts:
        """As the page is told."""
        state = self.state
        tail = self._tail() if state in ("starting", "failed") else []
        return {
            "id": self.id, "kind": self.kind, "run": self.run, "state": state, "started": self.started,
            "exit": self.process.returncode, "tail": tail,
        }  # fmt: skip

    def _tail(self) -> list[str]:
        try:
            text = self.log.read_bytes()[-8192:].decode("utf-8", "replace")
        except OSError:
            return []
        lines = [CONTROL.sub("", line.rpartition("\r")[2]).rstrip() for line in text.split("\n")]
        return [line for line in lines if line][-TAIL:]


class Jobs:
    """The processes that this server started."""

    def __init__(
        self, root: Path, clock: Callable[[], float] = time.time, program: Sequence[str] | None = None
    ) -> None:
        self._root = root
        self._clock = clock
        self._program = list(program or [sys.executable, "-m", "tether.cli"])
        self._jobs: list[Job] = []

    def facts(self) -> list[object]:
        """All jobs, the newest first."""
        return [job.facts() for job in reversed(self._jobs)]

    def play(self, wish: Mapping[str, object]) -> Facts:
        """A run of the nano world. Raises InputError for what is no number in its bounds or no name."""
        _only(wish, "beta", "steps", "seed", "fault", "name")
        fault = wish.get("fault")
        if fault is not None and fault not in FAULTS:
            raise InputError(f"got {str(fault)[:40]!r} as a fault; wanted one of {', '.join(FAULTS)}")
        name = self._free_name(wish.get("name"), str(fault or "play"))
        words = ["train", "--world", "nano", "--name", name, "--root", str(self._root)]
        words += [str(part) for pair in PLAY_KNOBS.items() for part in pair]
        words += ["--steps", str(_whole(wish, "steps", PLAY_STEPS, 1, MOST_STEPS))]
        words += ["--seed", str(_whole(wish, "seed", 0, 0, 2**31 - 1))]
        if "beta" in wish:
            words += ["--beta", str(_beta(wish))]
        if fault is not None:
            words += ["--fault", str(fault)]
        return self._start("play", name, self._root / name, words)

    def fork(self, id: str, folder: Path, step: int | None, wish: Mapping[str, object]) -> Facts:
        """Another run from a checkpoint of this one, beside it."""
        _only(wish, "name", "beta", "step", "train")
        given = wish.get("name")
        if not isinstance(given, str):
            raise InputError("wanted a name for the fork")
        name = check_name(given)
        if (folder.parent / name).exists():
            raise RunError(f"there is a run {name!r} already; choose another name")
        words = ["fork", f"{folder}@{step}" if step is not None else str(folder), "--name", name]
        if "beta" in wish:
            words += ["--beta", str(_beta(wish))]
        if wish.get("train") is False:
            words += ["--no-train"]
        return self._start("fork", id.rpartition("~")[0] + "~" * ("~" in id) + name, folder.parent / name, words)

    def resume(self, id: str, folder: Path) -> Facts:
        """Go on with a run."""
        return self._start("resume", id, folder, ["resume", str(folder)])

    def _free_name(self, given: object, stem: str) -> str:
        if given is None:
            return next(name for n in range(1, 10_000) if not (self._root / (name := f"{stem}-{n}")).exists())
        if not isinstance(given, str):
            raise InputError(f"got {type(given).__name__} as a name; wanted text")
        if (self._root / check_name(given)).exists():
            raise RunError(f"there is a run {given!r} already; choose another name")
        return given

    def _start(self, kind: str, run: str, folder: Path, words: Sequence[str]) -> Facts:
        busy = [job for job in self._jobs if job.process.poll() is None]
        if len(busy) >= MOST_JOBS:
            raise RunError(f"{len(busy)} jobs of this page are running; stop one first")
        if any(job.folder == folder for job in busy):
            raise RunError(f"{run} is being worked on already")
        logs = self._root / LOGS
        try:
            logs.mkdir(parents=True, exist_ok=True)
            log = logs / f"{folder.name}.log"
            with log.open("wb") as output:
                process = subprocess.Popen(
                    [*self._program, *words], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                    start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "100"},
                )  # fmt: skip
        except OSError as error:
            raise RunError(f"the job could not be started: {error.strerror or error}") from error
        job = Job(f"j{len(self._jobs) + 1}", kind, run, folder, log, process, self._clock())
        self._jobs.append(job)
        return job.facts()


def _only(wish: Mapping[str, object], *names: str) -> None:
    if strange := sorted(wish.keys() - set(names)):
        raise InputError(f"got {strange[0][:40]!r}; wanted {', '.join(names)} alone")


def _whole(wish: Mapping[str, object], name: str, default: int, least: int, most: int) -> int:
    value = wish.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InputError(f"got {str(value)[:40]} as {name}; wanted a whole number from {least} to {most}")
    return value


def _beta(wish: Mapping[str, object]) -> float:
    value = wish.get("beta")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MOST_BETA:
        raise InputError(f"got {str(value)[:40]} as beta; wanted a number from 0 to {MOST_BETA:g}")
    return float(value)
