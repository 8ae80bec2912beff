"""One run as the page reads it: rows since a cursor, curves, samples, commands and what became of them.

    cursor   update.evaluation.event.applied.sample.command    what has been told of the run, as six numbers

The tables are the log that the stream is told from, so a cursor is good for ever: a server that was started anew goes
on from it. A `Reader` is used by one thread at a time. Read next: `stream.py`, `library.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tether.control import CONTROL, CONTROL_FILE, Command
from tether.database import Database
from tether.errors import InputError, RunError
from tether.records import RUN, SAMPLE_COLUMNS, Curve, Event, Heartbeat, Sample, nan_if_null
from tether.store import RUN_FILE

UPDATE, EVALUATION = "score/mean", "eval/score"
"""A step is a whole update where it has the first, and an evaluation where it has the second."""
EVALUATIONS = "eval/"
AT_ONCE = 256
"""Updates in one message of the stream."""
LAST = 10


@dataclass(frozen=True)
class Cursor:
    """How much of a run has been told."""

    update: int = -1
    """The last whole update."""
    evaluation: int = -1
    """The update before which the last evaluation was made."""
    event: int = 0
    applied: int = 0
    """The last row of what became of commands."""
    sample: int = 0
    command: int = 0

    def __str__(self) -> str:
        """
        >>> str(Cursor(412, 400, 87)), Cursor.parse("412.400.87.0.0.0") == Cursor(412, 400, 87)
        ('412.400.87.0.0.0', True)
        """
        return ".".join(map(str, astuple(self)))

    @staticmethod
    def parse(text: str) -> Cursor:
        """The inverse of `str`. Raises InputError for what is no cursor."""
        parts = text.split(".")
        if len(parts) != 6 or not all(part.removeprefix("-").isdecimal() and len(part) < 16 for part in parts):
            raise InputError(f"got {text[:40]!r} as a cursor; wanted what the server gave")
        return Cursor(*map(int, parts))


class Steps(NamedTuple):
    """Consecutive updates, or evaluations, in columns; false where there are none."""

    steps: list[int]
    metrics: dict[str, list[float | None]]

    def __bool__(self) -> bool:
        return bool(self.steps)


class Outcome(NamedTuple):
    """One row of what became of commands."""

    row: int
    command: int
    step: int
    outcome: str
    payload: Mapping[str, object]


class Reader:
    """A run folder, open for the page."""

    def __init__(self, path: Path) -> None:
        """Raises RunError where it cannot be opened."""
        self.path = path
        self._run = Database.open(path / RUN_FILE, RUN, readonly=True)
        self._control: Database | None = None
        self._deep = 0

    def close(self) -> None:
        self._run.close()
        if self._control is not None:
            self._control.close()

    # ── one moment ──────────────────────────────────────────────────────────────────────────────────────────────────
    def version(self) -> tuple[int, int]:
        """Changes whenever another process wrote to the run or to its commands."""
        return _version(self._run), _version(self._commands_file())

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """All that is read of the run inside is of one moment."""
        self._deep += 1
        try:
            with self._run.snapshot() if self._deep == 1 else nullcontext():
                yield
        finally:
            self._deep -= 1

    def verdict_key(self) -> tuple[int, int]:
        """What the verdict depends on: the last update and the last event."""
        return self._last_step(UPDATE), self._largest("event")

    def cursor(self) -> Cursor:
        """Where the run stands now."""
        with self.snapshot():
            return Cursor(
                self._last_step(UPDATE), self._last_step(EVALUATION), self._largest("event"), self._largest("applied"),
                self._largest("sample"), self._last_command(),
            )  # fmt: skip

    def meta(self) -> dict[str, object]:
        """All facts of the run."""
        return {key: json.loads(text) for key, text in self._run.rows("SELECT key, json FROM meta")}

    def heartbeat(self) -> Heartbeat | None:
        """The trainer's last sign of life."""
        rows = self._run.rows("SELECT json FROM meta WHERE key = 'heartbeat'")
        return Heartbeat(**json.loads(rows[0][0])) if rows else None

    def names(self) -> list[str]:
        """The metrics logged."""
        return [name for (name,) in self._run.rows("SELECT name FROM names")]

    def latest(self) -> dict[str, float | None]:
        """The last number of every metric."""
        newest = "SELECT value FROM metric WHERE name_id = names.id ORDER BY step DESC LIMIT 1"
        return dict(self._run.rows(f"SELECT name, ({newest}) FROM names"))

    def count(self, name: str) -> int:
        """How many numbers of a metric there are."""
        found: int = self._run.rows("SELECT COUNT(*) FROM metric WHERE name_id = (SELECT id FROM names WHERE name = ?)",
                                    name)[0][0]  # fmt: skip
        return found

    def recent(self, name: str, count: int = LAST) -> list[float]:
        """The last finite numbers of a metric, the newest first."""
        rows = self._run.rows(
            "SELECT value FROM metric WHERE name_id = (SELECT id FROM names WHERE name = ?) AND value IS NOT NULL "
            "ORDER BY step DESC LIMIT ?",
            *(name, count),
        )
        return [value for (value,) in rows]

    # ── curves ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def curves(self, names: Iterable[str], start: int, end: int) -> tuple[str, dict[str, Curve]]:
        """Metrics between two steps, both included, and the cursor that belongs to them."""
        with self.snapshot():
            known = dict(self._run.rows("SELECT name, id FROM names"))
            found = {name: self._curve(known[name], start, end) for name in names if name in known}
            return str(self.cursor()), found

    def _curve(self, name: int, start: int, end: int) -> Curve:
        rows = self._run.rows(
            "SELECT step, value FROM metric WHERE name_id = ? AND step BETWEEN ? AND ? ORDER BY step", name, start, end
        )
        steps, values = zip(*rows, strict=True) if rows else ((), ())
        return Curve(np.array(steps, np.int64), np.array(values, np.float64))

    def updates(self, after: int) -> Steps:
        """Whole updates after a step, at most 256 of them."""
        return self._steps(after, UPDATE)

    def evaluations(self, after: int) -> Steps:
        """Evaluations after a step."""
        return self._steps(after, EVALUATION)

    def _steps(self, after: int, mark: str) -> Steps:
        steps = [
            step
            for (step,) in self._run.rows(
                "SELECT step FROM metric WHERE name_id = (SELECT id FROM names WHERE name = ?) AND step > ? "
                "ORDER BY step LIMIT ?",
                *(mark, after, AT_ONCE),
            )
        ]
        if not steps:
            return Steps([], {})
        metrics: dict[str, list[float | None]] = {}
        for id, name in self._run.rows("SELECT id, name FROM names"):
            if name.startswith(EVALUATIONS) == mark.startswith(EVALUATIONS):
                rows = dict(
                    self._run.rows(
                        "SELECT step, value FROM metric WHERE name_id = ? AND step BETWEEN ? AND ?",
                        *(id, steps[0], steps[-1]),
                    )
                )
                if rows:
                    metrics[name] = [rows.get(step) for step in steps]
        return Steps(steps, metrics)

    # ── events, samples, commands ───────────────────────────────────────────────────────────────────────────────────
    def events(self, after: int = 0) -> list[Event]:
        """Events with an id above `after`, oldest first."""
        rows = self._run.rows(
            "SELECT id, step, wall, kind, severity, payload FROM event WHERE id > ? ORDER BY id", after
        )
        return [
            Event(id, step, wall, kind, severity, json.loads(payload))
            for id, step, wall, kind, severity, payload in rows
        ]

    def sample_steps(self, split: str) -> list[int]:
        """The steps of which samples are kept."""
        return [
            step for (step,) in self._run.rows("SELECT DISTINCT step FROM sample WHERE split = ? ORDER BY step", split)
        ]

    def samples(self, split: str, step: int | None = None, row: int | None = None) -> list[Sample]:
        """The samples of one step, or of one row through time, or all."""
        rows = self._run.rows(
            f"SELECT {SAMPLE_COLUMNS} FROM sample WHERE split = ? AND step = ifnull(?, step) AND row = ifnull(?, row) "
            "ORDER BY step, row",
            *(split, step, row),
        )
        return [Sample.from_row(row) for row in rows]

    def new_samples(self, after: int) -> list[tuple[str, int]]:
        """Split and step of the samples that came after one; the last few alone where they are many."""
        rows = self._run.rows("SELECT DISTINCT split, step FROM sample WHERE id > ? ORDER BY step", after)
        return [(split, step) for split, step in rows[-AT_ONCE:]]

    def beta_at(self, step: int) -> float:
        """β in an update, or in the last one before it; NaN where there was none."""
        rows = self._run.rows(
            "SELECT value FROM metric WHERE name_id = (SELECT id FROM names WHERE name = 'beta') AND step <= ? "
            "ORDER BY step DESC LIMIT 1",
            step,
        )
        return nan_if_null(rows[0][0]) if rows else float("nan")

    def commands(self, after: int = 0) -> list[Command]:
        """What was asked of the run, oldest first."""
        file = self._commands_file()
        if file is None:
            return []
        columns = "id, actor, kind, payload, base_version, expires, created"
        rows = file.rows(f"SELECT {columns} FROM commands WHERE id > ? ORDER BY id", after)
        return [Command(id, actor, kind, json.loads(payload), *rest) for id, actor, kind, payload, *rest in rows]

    def outcomes(self, after: int = 0) -> list[Outcome]:
        """What became of commands, in the order in which it was written."""
        rows = self._run.rows(
            "SELECT id, command_id, step, outcome, payload FROM applied WHERE id > ? ORDER BY id", after
        )
        return [
            Outcome(id, command, step, outcome, json.loads(payload)) for id, command, step, outcome, payload in rows
        ]

    # ── inside ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def _last_step(self, name: str) -> int:
        rows = self._run.rows(
            "SELECT MAX(step) FROM metric WHERE name_id = (SELECT id FROM names WHERE name = ?)", name
        )
        return -1 if rows[0][0] is None else int(rows[0][0])

    def _largest(self, table: str) -> int:
        return int(self._run.rows(f"SELECT ifnull(MAX(id), 0) FROM {table}")[0][0])

    def _last_command(self) -> int:
        file = self._commands_file()
        return 0 if file is None else int(file.rows("SELECT ifnull(MAX(id), 0) FROM commands")[0][0])

    def _commands_file(self) -> Database | None:
        """`control.db`, which a run copied from elsewhere may lack."""
        if self._control is None and (self.path / CONTROL_FILE).is_file():
            try:
                self._control = Database.open(self.path / CONTROL_FILE, CONTROL, readonly=True)
            except RunError:
                return None
        return self._control


def rewound(cursor: Cursor, now: Cursor, events: Sequence[Event]) -> Cursor | None:
    """The cursor after a run went on from an earlier update than the one it tells of; None where it did not.

    A run that goes on drops the rows after its checkpoint and leaves the event `truncated`.
    """
    turns = [_whole(event.payload.get("after")) for event in events if event.kind == "truncated"]
    last = min([now.update, *turns]) if now.update < cursor.update or turns else cursor.update
    if last >= cursor.update and cursor.evaluation <= now.evaluation:
        return None
    return replace(cursor, update=min(last, cursor.update), evaluation=min(cursor.evaluation, now.evaluation, last),
                   sample=min(cursor.sample, now.sample))  # fmt: skip


def _whole(value: object) -> int:
    return value if isinstance(value, int) else -1


def _version(file: Database | None) -> int:
    return 0 if file is None else int(file.rows("PRAGMA data_version")[0][0])
