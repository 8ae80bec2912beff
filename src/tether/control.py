"""`control.db` of a run folder: what people ask of a run (commands) and what they say of it (labels).

Only people's side writes it: the page, `tether steer`. The trainer reads it at each update's start, and what became of
a command stands in `run.db` (`RunStore.applied`). A command is a wish, never code and never a path; the trainer
validates it. Both tables only grow.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tether.database import Database, Schema, to_json

CONTROL_FILE = "control.db"
CONTROL = Schema(
    application=0x74656374,
    version=1,
    tables="""
    CREATE TABLE commands (
        id INTEGER PRIMARY KEY AUTOINCREMENT, actor TEXT NOT NULL, kind TEXT NOT NULL, payload TEXT NOT NULL,
        base_version INTEGER, expires REAL, created REAL NOT NULL
    );
    CREATE TABLE labels (
        id INTEGER PRIMARY KEY AUTOINCREMENT, actor TEXT NOT NULL, kind TEXT NOT NULL, payload TEXT NOT NULL,
        created REAL NOT NULL
    );
    """,
)


@dataclass(frozen=True)
class Command:
    """What somebody asks of the run."""

    id: int
    """Grows with time and is never used twice."""
    actor: str
    """Who asks."""
    kind: str
    payload: Mapping[str, object]
    base_version: int | None
    """The last command whose outcome the actor had seen; None where it does not matter."""
    expires: float | None
    """Seconds since 1970 after which the wish is void; None: never."""
    created: float
    """Seconds since 1970."""

    def has_expired(self, now: float) -> bool:
        return self.expires is not None and now > self.expires


@dataclass(frozen=True)
class Label:
    """What somebody says of the run's samples."""

    id: int
    actor: str
    kind: str
    payload: Mapping[str, object]
    created: float


class Control:
    """The control file of one run, open for reading (the trainer) or writing (people's side)."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time):
        self._database = database
        self._clock = clock

    @staticmethod
    def open(run: Path | str, readonly: bool = True, *, clock: Callable[[], float] = time.time) -> Control:
        """The control file of a run folder. Raises RunError where there is none or it cannot be opened."""
        return Control(Database.open(Path(run) / CONTROL_FILE, CONTROL, readonly=readonly), clock)

    def command(
        self,
        actor: str,
        kind: str,
        payload: Mapping[str, object],
        *,
        base_version: int | None = None,
        expires: float | None = None,
    ) -> int:
        """Write a wish down; returns its id."""
        row = (actor, kind, to_json(payload), base_version, expires, self._clock())
        columns = "actor, kind, payload, base_version, expires, created"
        return self._insert(f"INSERT INTO commands ({columns}) VALUES (?, ?, ?, ?, ?, ?) RETURNING id", row)

    def label(self, actor: str, kind: str, payload: Mapping[str, object]) -> int:
        """Write a judgement down; returns its id."""
        row = (actor, kind, to_json(payload), self._clock())
        return self._insert("INSERT INTO labels (actor, kind, payload, created) VALUES (?, ?, ?, ?) RETURNING id", row)

    def commands(self, after: int = 0) -> list[Command]:
        """Commands with an id above `after`, oldest first."""
        columns = "id, actor, kind, payload, base_version, expires, created"
        rows = self._database.rows(f"SELECT {columns} FROM commands WHERE id > ? ORDER BY id", after)
        return [Command(id, actor, kind, json.loads(payload), *rest) for id, actor, kind, payload, *rest in rows]

    def labels(self, after: int = 0) -> list[Label]:
        """Labels with an id above `after`, oldest first."""
        rows = self._database.rows(
            "SELECT id, actor, kind, payload, created FROM labels WHERE id > ? ORDER BY id", after
        )
        return [Label(id, actor, kind, json.loads(payload), created) for id, actor, kind, payload, created in rows]

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _insert(self, sql: str, row: tuple[object, ...]) -> int:
        with self._database.transaction() as connection:
            return int(connection.execute(sql, row).fetchone()[0])
