"""The records of a run: the tables of `run.db`, and what one update writes into them.

    Sample   a response with its per-token arrays      Event    something that happened once
    Curve    one metric through the run                Applied  what became of a command
    Update   all that one update leaves behind         Heartbeat the trainer's last sign of life

It opens no file: `store.py` does, and hands out these.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tether.database import Schema, to_json
from tether.errors import InputError
from tether.metrics import check_known

CHAIN = "CREATE TABLE IF NOT EXISTS chain (step INTEGER PRIMARY KEY, digest TEXT NOT NULL)"
RUN = Schema(
    application=0x74657468,
    version=1,
    tables=f"""
    CREATE TABLE meta (key TEXT PRIMARY KEY, json TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE step (step INTEGER PRIMARY KEY, wall REAL NOT NULL);
    CREATE TABLE names (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
    CREATE TABLE metric (
        name_id INTEGER NOT NULL REFERENCES names, step INTEGER NOT NULL, value REAL, PRIMARY KEY (name_id, step)
    ) WITHOUT ROWID;
    CREATE TABLE sample (
        id INTEGER PRIMARY KEY, step INTEGER NOT NULL, row INTEGER NOT NULL, split TEXT NOT NULL,
        prompt TEXT NOT NULL, response TEXT NOT NULL, score REAL, reward_total REAL, kl REAL,
        tokens BLOB NOT NULL, logprobs BLOB NOT NULL, ref_logprobs BLOB NOT NULL, "values" BLOB NOT NULL,
        advantages BLOB NOT NULL, pieces TEXT NOT NULL, columns TEXT NOT NULL, UNIQUE (step, split, row)
    );
    CREATE TABLE event (
        id INTEGER PRIMARY KEY AUTOINCREMENT, step INTEGER, wall REAL NOT NULL, kind TEXT NOT NULL,
        severity TEXT NOT NULL, payload TEXT NOT NULL
    );
    CREATE TABLE applied (
        id INTEGER PRIMARY KEY AUTOINCREMENT, command_id INTEGER NOT NULL UNIQUE, step INTEGER NOT NULL,
        outcome TEXT NOT NULL, payload TEXT NOT NULL
    );
    {CHAIN};
    """,
)
"""One curve is one range scan of `metric`; a value that was not finite is NULL. Arrays are little-endian blobs."""

SAMPLE_COLUMNS = (
    "step, row, split, prompt, response, score, reward_total, kl, "
    'tokens, logprobs, ref_logprobs, "values", advantages, pieces, columns'
)
INSERT_EVENT = "INSERT INTO event (step, wall, kind, severity, payload) VALUES (?, ?, ?, ?, ?)"
INSERT_APPLIED = "INSERT INTO applied (command_id, step, outcome, payload) VALUES (?, ?, ?, ?)"
TOKEN, NUMBER = np.dtype("<i4"), np.dtype("<f4")

Severity = Literal["info", "warning", "alarm"]
Status = Literal["running", "finished", "stopped", "failed"]
Split = Literal["train", "probe"]
Verdict = Literal["applied", "rejected", "superseded"]
Floats = NDArray[np.floating]
_NONE = np.empty(0, NUMBER)


@dataclass(frozen=True, eq=False)
class Sample:
    """One response with what is known of each of its tokens. The arrays have one entry a response token."""

    step: int
    row: int
    """Place in the batch."""
    prompt: str
    response: str
    score: float
    reward_total: float
    """Σ_t R_t: the score minus the string's price."""
    kl: float
    """Σ_t log π_old − log π_ref, nats."""
    tokens: NDArray[np.integer]
    """Token ids, kept as int32."""
    logprobs: Floats
    """log π_old(y_t|s_t), nats; this and the arrays below are kept as float32."""
    ref_logprobs: Floats
    values: Floats = field(default_factory=_NONE.copy)
    """May be left out, like the advantages: an evaluation has none."""
    advantages: Floats = field(default_factory=_NONE.copy)
    split: Split = "train"
    """`probe`: one of the fixed prompts that are answered again and again."""
    pieces: tuple[str, ...] = ()
    """The text of each token, for readers without the tokenizer; may be left out."""
    columns: Mapping[str, object] = field(default_factory=dict)
    """Further columns of the data set."""

    def to_row(self) -> tuple[object, ...]:
        """The row of the table, in the order of `SAMPLE_COLUMNS`."""
        arrays = (self.logprobs, self.ref_logprobs, self.values, self.advantages)
        return (
            *(self.step, self.row, self.split, _text(self.prompt), _text(self.response)),
            *(null_unless_finite(number) for number in (self.score, self.reward_total, self.kl)),
            np.asarray(self.tokens, TOKEN).tobytes(),
            *(np.asarray(array, NUMBER).tobytes() for array in arrays),
            *(_text(to_json(self.pieces)), _text(to_json(self.columns))),
        )

    @staticmethod
    def from_row(row: Sequence) -> Sample:
        """The inverse of `to_row`; NaN where the table holds NULL."""
        step, place, split, prompt, response, *numbers = row[:8]
        tokens, *arrays = row[8:13]
        logprobs, ref_logprobs, values, advantages = (np.frombuffer(blob, NUMBER) for blob in arrays)
        score, reward_total, kl = (nan_if_null(number) for number in numbers)
        return Sample(
            *(step, place, prompt, response, score, reward_total, kl, np.frombuffer(tokens, TOKEN)),
            *(logprobs, ref_logprobs, values, advantages, split, tuple(json.loads(row[13])), json.loads(row[14])),
        )


class Curve(NamedTuple):
    """One metric through the run."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    """NaN where the number was not finite."""


@dataclass(frozen=True)
class Event:
    """Something that happened once."""

    id: int
    """Grows with time and is never used twice."""
    step: int | None
    wall: float
    """Seconds since 1970."""
    kind: str
    severity: str
    payload: Mapping[str, object]


@dataclass(frozen=True)
class Applied:
    """What became of a command from `control.db`."""

    command_id: int
    step: int
    outcome: str
    """`applied`, `rejected` or `superseded`."""
    payload: Mapping[str, object]


@dataclass(frozen=True)
class Heartbeat:
    """The trainer's last sign of life."""

    wall: float
    """Seconds since 1970."""
    step: int
    phase: str
    """What it was doing."""
    status: Status
    process: int
    host: str


class Update:
    """What one update leaves behind, gathered in a `with store.update(step)` block and written at its end."""

    def __init__(self, step: int):
        self.step = step
        self._metrics: dict[str, float] = {}
        self._samples: list[Sample] = []
        self._events: list[tuple[str, str, str]] = []
        self._applied: list[tuple[int, str, str]] = []
        self._link: str | None = None

    @property
    def numbers(self) -> Mapping[str, float]:
        """The metrics gathered so far."""
        return self._metrics

    def metrics(self, numbers: Mapping[str, float]) -> None:
        """Log numbers of the catalogue. One that is not finite is kept as NaN, and an event names it.

        Raises InputError for a name that is not in the catalogue, or is logged twice in this block.
        """
        check_known(numbers)
        if twice := sorted(self._metrics.keys() & numbers.keys()):
            raise InputError(f"logged twice at step {self.step}: {', '.join(twice)}; wanted each metric once an update")
        found = {name: float(number) for name, number in numbers.items()}
        self._metrics |= found
        if bad := {name: str(number) for name, number in found.items() if not math.isfinite(number)}:
            self.event("non_finite", bad, severity="warning")

    def sample(self, sample: Sample) -> None:
        """Keep a response. Raises InputError where its step or the lengths of its arrays do not fit."""
        if sample.step != self.step:
            raise InputError(f"a sample of step {sample.step} came with update {self.step}; wanted its own step's")
        length = len(sample.tokens)
        for name in ("logprobs", "ref_logprobs", "values", "advantages", "pieces"):
            got, may_be_absent = len(getattr(sample, name)), not name.endswith("logprobs")
            if got != length and not (got == 0 and may_be_absent):
                raise InputError(f"row {sample.row} has {length} tokens but {got} {name}; wanted one a token")
        self._samples.append(sample)

    def event(self, kind: str, payload: Mapping[str, object] | None = None, severity: Severity = "info") -> None:
        """Note something that happened in this update."""
        self._events.append((kind, severity, to_json(payload or {})))

    def applied(
        self, command_id: int, payload: Mapping[str, object] | None = None, outcome: Verdict = "applied"
    ) -> None:
        """Note what became of a command from `control.db`."""
        self._applied.append((command_id, outcome, to_json(payload or {})))

    def link(self, digest: str) -> None:
        """Note the hash chain's digest at the end of this update."""
        self._link = digest

    def write(self, connection: sqlite3.Connection, wall: float) -> None:
        """Write everything gathered, inside the caller's transaction."""
        connection.execute("INSERT OR IGNORE INTO step VALUES (?, ?)", (self.step, wall))
        connection.executemany("INSERT OR IGNORE INTO names (name) VALUES (?)", [(name,) for name in self._metrics])
        connection.executemany(
            "INSERT INTO metric SELECT id, ?, ? FROM names WHERE name = ?",
            [(self.step, null_unless_finite(number), name) for name, number in self._metrics.items()],
        )
        connection.executemany(
            f"INSERT INTO sample ({SAMPLE_COLUMNS}) VALUES ({', '.join('?' * 15)})",
            [sample.to_row() for sample in self._samples],
        )
        connection.executemany(INSERT_EVENT, [(self.step, wall, *event) for event in self._events])
        connection.executemany(
            INSERT_APPLIED,
            [(command, self.step, outcome, payload) for command, outcome, payload in self._applied],
        )
        if self._link is not None:
            connection.execute("INSERT INTO chain VALUES (?, ?)", (self.step, self._link))


def null_unless_finite(number: float) -> float | None:
    """SQLite has no NaN: what is not finite is stored as NULL."""
    return float(number) if math.isfinite(number) else None


def nan_if_null(number: float | None) -> float:
    """The inverse of `null_unless_finite`, up to which kind of not finite it was."""
    return math.nan if number is None else number


def _text(text: str) -> str:
    """Text that SQLite can hold: half of a surrogate pair, which UTF-8 does not have, becomes `?`."""
    return text.encode("utf-8", "replace").decode("utf-8")
