"""The run folder: all that a run leaves behind, written by the trainer alone and read by everything else.

    runs/<name>/run.db        metrics, samples with per-token arrays, events, applied commands
                control.db    commands and labels: what people ask of the run (`control.py`)
                config.yaml   the resolved configuration, for people and for a next run
                checkpoints/

What belongs to one update is written in one transaction, so readers, and a run that was killed, see whole updates
only. It knows no torch and no terminal. Read next: `records.py` (what is in the tables), `runs.py`, `plots.py`.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import cast

import numpy as np

import tether
from tether.control import CONTROL, CONTROL_FILE
from tether.database import Database, complaints, hold, to_json
from tether.errors import InputError, RunError
from tether.metrics import CATALOGUE, check_known
from tether.records import (
    CHAIN,
    INSERT_APPLIED,
    INSERT_EVENT,
    RUN,
    SAMPLE_COLUMNS,
    Applied,
    Curve,
    Event,
    Heartbeat,
    Sample,
    Severity,
    Split,
    Status,
    Update,
    Verdict,
    nan_if_null,
)

__all__ = ["Applied", "Curve", "Event", "Heartbeat", "RunStore", "Sample", "Update", "check_name"]

RUN_FILE = "run.db"
LOCK_FILE = "run.lock"
CONFIG_FILE = "config.yaml"
CHECKPOINTS = "checkpoints"
NAME = re.compile(r"\w([\w.+=,-]*[\w+=])?")
"""Letters and digits of any script, and signs that every file system and shell takes as they are."""
LONGEST_NAME = 100  # bytes: leaves room for suffixes within the 255 of common file systems


class RunStore:
    """One run folder, open for writing (the trainer) or reading (everything else). Close it, or use `with`."""

    def __init__(
        self,
        path: Path,
        database: Database,
        lock: sqlite3.Connection | None = None,
        clock: Callable[[], float] = time.time,
    ):
        self.path = path
        self._database = database
        self._lock = lock
        self._clock = clock
        self.told: Callable[[int, Mapping[str, float]], None] | None = None
        """Who else hears the metrics of a step, once they are written."""

    def put_config(self, config: Mapping[str, object]) -> None:
        """The run's settings, in the place of those that were there, for people and for programs."""
        _write_config(self.path, config)
        self.put("config", config)

    # ── opening ─────────────────────────────────────────────────────────────────────────────────────────────────────
    @staticmethod
    def create(
        root: Path | str,
        name: str,
        config: Mapping[str, object],
        *,
        exist_ok: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> RunStore:
        """A new run folder `root/name`, open for writing. `clock` gives seconds since 1970.

        `exist_ok` goes on with a run that is there; `config` then takes the place of the recorded one.

        Raises InputError for a name that is no folder name, RunError where the run exists, is being written, or cannot
        be written; a folder that could not be finished is removed again.
        """
        path = Path(root) / check_name(name)
        if not path.exists():
            return _create(path, config, clock)
        if not (exist_ok and (path / RUN_FILE).is_file()):
            raise RunError(
                f"{path} exists{_standing(path)}; choose another name, resume that run, or delete the folder"
            )
        store = RunStore.open(path, readonly=False, clock=clock)
        store.put_config(config)
        store.event("continued")
        return store

    @staticmethod
    def open(path: Path | str, readonly: bool = True, *, clock: Callable[[], float] = time.time) -> RunStore:
        """An existing run folder. Reading is safe while a trainer writes; one process at a time may write.

        Raises RunError where there is no run, it was written by another version, or another process writes it.
        """
        path = Path(path)
        if readonly:
            return RunStore(path, Database.open(path / RUN_FILE, RUN, readonly=True), clock=clock)
        Database.open(path / RUN_FILE, RUN, readonly=True).close()  # complain of a wrong folder before touching it
        lock = hold(path / LOCK_FILE)
        if lock is None:
            raise RunError(f"{path} is being written{_standing(path)}; stop that process, or open the run for reading")
        try:
            if not (path / CONTROL_FILE).is_file():
                Database.create(path / CONTROL_FILE, CONTROL).close()
            database = Database.open(path / RUN_FILE, RUN, readonly=False)
            with database.transaction() as connection:
                connection.execute(CHAIN)  # runs of earlier versions lack it
            return RunStore(path, database, lock, clock)
        except BaseException:
            lock.close()
            raise

    def close(self) -> None:
        """Let go of the folder."""
        self._database.close()
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> RunStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ── writing ─────────────────────────────────────────────────────────────────────────────────────────────────────
    @contextmanager
    def update(self, step: int) -> Iterator[Update]:
        """Gather what update `step` leaves behind; written in one transaction when the block ends without an error.

        Steps never go back; one step may be written in several blocks (an evaluation after the update).

        Raises InputError where the step goes back, RunError where a metric, sample or command of it is there already
        or the disk is full; then nothing of the block is in the run and everything before it is.
        """
        last = self.last_step()
        if step < (0 if last is None else last):
            raise InputError(
                f"got step {step} after step {last}; wanted {last or 0} or later, or truncate_after({step - 1}) first"
            )
        update = Update(step)
        yield update
        with self._database.transaction(f"update {step}") as connection:
            wall = self._clock()
            update.write(connection, wall)
            _put(connection, "heartbeat", _beat(wall, step, "recorded", "running"))
        if self.told is not None:
            self.told(step, update.numbers)

    def heartbeat(self, step: int, phase: str, status: Status = "running") -> None:
        """Leave a sign of life: what the trainer is doing, or how the run ended."""
        self.put("heartbeat", _beat(self._clock(), step, phase, status))

    def flush(self, step: int, phase: str = "saving") -> None:
        """Leave a sign of life, and wait until it and all that was recorded before are on the disk."""
        with self._database.forced():
            self.heartbeat(step, phase)

    def event(
        self,
        kind: str,
        payload: Mapping[str, object] | None = None,
        severity: Severity = "info",
        step: int | None = None,
    ) -> None:
        """Note something that happened outside of an update."""
        with self._database.transaction() as connection:
            connection.execute(INSERT_EVENT, (step, self._clock(), kind, severity, to_json(payload or {})))

    def rule(self, command_id: int, step: int, payload: Mapping[str, object], outcome: Verdict) -> None:
        """Note what became of a command that changes no update: it was refused, or it paused or saved the run."""
        with self._database.transaction() as connection:
            connection.execute(INSERT_APPLIED, (command_id, step, outcome, to_json(payload)))

    def put(self, key: str, value: object) -> None:
        """Keep a fact of the whole run (digests, manifests) under `meta()[key]`; it replaces the one before."""
        with self._database.transaction() as connection:
            _put(connection, key, value)

    def truncate_after(self, step: int) -> None:
        """Drop what was recorded after `step`, so that a run can go on from its checkpoint there; an event says so."""
        with self._database.transaction() as connection:
            dropped = {
                table: connection.execute(f"DELETE FROM {table} WHERE step > ?", (step,)).rowcount
                for table in ("step", "metric", "sample", "event", "applied", "chain")
            }
            if any(dropped.values()):
                payload = to_json({"after": step, "dropped": dropped})
                connection.execute(INSERT_EVENT, (None, self._clock(), "truncated", "info", payload))

    # ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────
    @property
    def name(self) -> str:
        return self.path.resolve().name

    def meta(self) -> dict[str, object]:
        """All facts of the run: `created`, `version` (of tether), `config`, `heartbeat`, and what was `put`."""
        return {key: json.loads(text) for key, text in self._database.rows("SELECT key, json FROM meta")}

    def last_heartbeat(self) -> Heartbeat | None:
        """The trainer's last sign of life."""
        rows = self._database.rows("SELECT json FROM meta WHERE key = 'heartbeat'")
        return Heartbeat(**json.loads(rows[0][0])) if rows else None

    def last_step(self) -> int | None:
        """The last update that is whole in the run; None where there is none."""
        last: int | None = self._database.rows("SELECT MAX(step) FROM step")[0][0]
        return last

    def steps(self) -> list[int]:
        """Every step recorded."""
        return [step for (step,) in self._database.rows("SELECT step FROM step ORDER BY step")]

    def names(self) -> list[str]:
        """The metrics logged in this run, in the catalogue's order."""
        return _in_order({name for (name,) in self._database.rows("SELECT name FROM names")})

    def curve(self, name: str) -> Curve:
        """One metric through the run; empty where it was never logged. Raises InputError for an unknown name."""
        rows = self._database.rows(
            "SELECT step, value FROM metric WHERE name_id = (SELECT id FROM names WHERE name = ?) ORDER BY step", name
        )
        if not rows and name not in self.names():
            check_known([name])
        steps, values = zip(*rows, strict=True) if rows else ((), ())
        return Curve(np.array(steps, np.int64), np.array(values, np.float64))  # numpy reads None as NaN

    def curves(self, names: Iterable[str]) -> dict[str, Curve]:
        """Several metrics through the run."""
        return {name: self.curve(name) for name in names}

    def latest(self) -> dict[str, float]:
        """The last number of every metric logged."""
        newest = "SELECT value FROM metric WHERE name_id = names.id ORDER BY step DESC LIMIT 1"
        found = dict(self._database.rows(f"SELECT name, ({newest}) FROM names"))
        return {name: nan_if_null(found[name]) for name in _in_order(found.keys())}

    def samples(self, step: int | None = None, split: Split | None = None) -> list[Sample]:
        """The samples kept, of one step or all, of one split or both, in order."""
        rows = self._database.rows(
            f"SELECT {SAMPLE_COLUMNS} FROM sample WHERE step = ifnull(?, step) AND split = ifnull(?, split) "
            "ORDER BY step, split, row",
            *(step, split),
        )
        return [Sample.from_row(row) for row in rows]

    def events(self, after: int = 0) -> list[Event]:
        """Events with an id above `after`, oldest first."""
        columns = "id, step, wall, kind, severity, payload"
        rows = self._database.rows(f"SELECT {columns} FROM event WHERE id > ? ORDER BY id", after)
        return [
            Event(id, step, wall, kind, severity, json.loads(payload))
            for id, step, wall, kind, severity, payload in rows
        ]

    def chain(self) -> dict[int, str]:
        """The hash chain: for each update a digest of all that was computed up to its end."""
        if not self._database.rows("SELECT 1 FROM sqlite_schema WHERE name = 'chain'"):
            return {}
        return dict(self._database.rows("SELECT step, digest FROM chain ORDER BY step"))

    def applied(self, after: int = 0) -> list[Applied]:
        """What became of the commands with an id above `after`, in the order in which they were dealt with."""
        columns = "command_id, step, outcome, payload"
        rows = self._database.rows(f"SELECT {columns} FROM applied WHERE command_id > ? ORDER BY id", after)
        return [Applied(command, step, outcome, json.loads(payload)) for command, step, outcome, payload in rows]


def check_name(name: str) -> str:
    """The name, if it can be a folder's on every system. Raises InputError with the nearest name that can.

    >>> check_name("beta=0.05")
    'beta=0.05'
    """
    if NAME.fullmatch(name) and len(name.encode()) <= LONGEST_NAME:
        return name
    usable = re.sub(r"[^\w.+=,-]+", "-", name).strip(".,-").encode()[:LONGEST_NAME].decode(errors="ignore")
    raise InputError(
        f"{name!r} cannot be a run's name; wanted at most {LONGEST_NAME} bytes of letters, digits and _ . + = , - "
        f"that begin and end with a letter or digit; try {usable or 'run'!r}"
    )


def free_name(root: Path, name: str, *, numbered: bool = False) -> str:
    """The name, if a run can be made under it. Raises InputError, and RunError where it is taken or nothing can be
    written below `root`, before anything is loaded or trained.

    `numbered`: a name that nobody chose; it gets a number behind it where it is taken.
    """
    if numbered:
        name = next(free for free in (name, *map(f"{name}-{{}}".format, range(2, 1000))) if not (root / free).exists())
    path = root / check_name(name)
    if path.exists():
        raise RunError(
            f"{path} exists{_standing(path)}; choose another name, go on with it (tether resume {path}), or delete it"
        )
    with complaints(root):
        root.mkdir(parents=True, exist_ok=True)
        if not os.access(root, os.W_OK):
            raise PermissionError(errno.EACCES, "permission denied")
    return name


def _in_order(names: Set[str]) -> list[str]:
    """The names in the catalogue's order; those of another version's catalogue at the end."""
    return CATALOGUE.in_order(names)


def _create(path: Path, config: Mapping[str, object], clock: Callable[[], float]) -> RunStore:
    """Made aside and renamed, so that a process that is killed meanwhile leaves no half of a run under that name."""
    aside = path.with_name(f".{path.name}.new")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with complaints(path):
            aside.mkdir(parents=True)
        _fill(aside, {"name": path.name, "created": clock(), "version": tether.__version__, "config": config}, clock)
        with complaints(path):
            aside.rename(path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return RunStore.open(path, readonly=False, clock=clock)


def _fill(path: Path, facts: Mapping[str, object], clock: Callable[[], float]) -> None:
    with complaints(path):
        (path / CHECKPOINTS).mkdir()
    _write_config(path, cast(Mapping[str, object], facts["config"]))
    Database.create(path / CONTROL_FILE, CONTROL).close()
    with RunStore(path, Database.create(path / RUN_FILE, RUN), clock=clock) as store:
        database = store._database
        with database.transaction() as connection:
            for key, value in facts.items():
                _put(connection, key, value)
        store.event("created")
        if database.journal != "wal":
            store.event("rollback_journal", {"journal": database.journal, "why": "no shared memory for a log here"})


def _write_config(path: Path, config: Mapping[str, object]) -> None:
    """The configuration as YAML; the file is whole or the one before."""
    import yaml

    text = yaml.safe_dump(json.loads(to_json(config)), sort_keys=False, allow_unicode=True)
    aside = path / (CONFIG_FILE + ".new")
    with complaints(path / CONFIG_FILE):
        aside.write_text(text, encoding="utf-8")
        aside.replace(path / CONFIG_FILE)


def _put(connection: sqlite3.Connection, key: str, value: object) -> None:
    connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, to_json(value)))


def _beat(wall: float, step: int, phase: str, status: Status) -> dict[str, object]:
    return asdict(Heartbeat(wall, step, phase, status, os.getpid(), socket.gethostname()))


def _standing(path: Path) -> str:
    """What the heartbeat of a run says, for an error about it; nothing where it says nothing."""
    with suppress(RunError), RunStore.open(path) as store:
        if beat := store.last_heartbeat():
            return f" (step {beat.step}, {beat.status}, process {beat.process} on {beat.host})"
    return ""
