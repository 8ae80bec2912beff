"""A SQLite file of a run, opened so that one side writes while others read, and complaining in plain words.

    write-ahead log   readers never wait for the writer and see whole transactions only
    rollback journal  where the file system has no shared memory or is on a network; slower, as safe
    one writer        `hold` keeps a second process from writing the same run

It knows nothing of metrics or runs: it is handed a `Schema`. Read next: `store.py` and `control.py`.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tether.errors import InputError, RunError

BUSY_SECONDS = 10.0
"""How long a connection waits for another one's transaction."""
NETWORK_FILE_SYSTEMS = frozenset(
    [
        "9p",
        "afs",
        "beegfs",
        "ceph",
        "cifs",
        "fuse.sshfs",
        "glusterfs",
        "lustre",
        "ncpfs",
        "nfs",
        "nfs4",
        "smb3",
        "smbfs",
    ]
)
"""File systems on which a write-ahead log's shared memory is not shared between hosts."""
MOUNTS = Path("/proc/self/mounts")


@dataclass(frozen=True)
class Schema:
    """The tables of a file."""

    application: int
    """SQLite's application id: tells this kind of file from any other database."""
    version: int
    """Goes up with every change of the tables."""
    tables: str
    """SQL that creates them."""


class Database:
    """One connection to one file. Use `create` or `open`; close it, or use it in a `with` block."""

    def __init__(self, connection: sqlite3.Connection, path: Path, journal: str):
        self.path = path
        self.journal = journal
        """`wal`, or `delete` for a rollback journal."""
        self._connection = connection

    @staticmethod
    def create(path: Path, schema: Schema) -> Database:
        """A new file with empty tables. Raises RunError where the disk is full or the folder cannot be written."""
        with complaints(path), _closed_on_error(_connect(path, "rwc")) as connection:
            journal = _choose_journal(connection, path)
            connection.execute(f"PRAGMA application_id={schema.application}")
            connection.execute(f"PRAGMA user_version={schema.version}")
            connection.executescript(schema.tables)
            return Database(connection, path, journal)

    @staticmethod
    def open(path: Path, schema: Schema, *, readonly: bool) -> Database:
        """An existing file. Raises RunError where it is missing, torn, held, or of another kind or version."""
        if not path.is_file():
            raise RunError(f"there is no {path.name} in {path.parent}; wanted the folder of a run")
        with (
            complaints(path),
            _closed_on_error(_connect_readonly(path) if readonly else _connect(path, "rw")) as connection,
        ):
            _check_schema(connection, path, schema)
            if readonly:
                return Database(connection, path, str(connection.execute("PRAGMA journal_mode").fetchone()[0]))
            # SQLite opens a file that it cannot write for reading, and says so only when something is written.
            connection.executescript(f"BEGIN; PRAGMA user_version={schema.version}; ROLLBACK")
            return Database(connection, path, _choose_journal(connection, path))

    def rows(self, sql: str, *arguments: object) -> list[tuple]:
        """All rows of a query."""
        with complaints(self.path):
            return self._connection.execute(sql, arguments).fetchall()

    @contextmanager
    def transaction(self, what: str = "") -> Iterator[sqlite3.Connection]:
        """Everything inside is written, or nothing is. Raises RunError where the disk is full or the file is held.

        `what` says in those errors what was being written.
        """
        with complaints(self.path, what):
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # SQLite has rolled back by itself after some errors
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """All rows read inside are of one moment, whatever is written meanwhile."""
        with complaints(self.path):
            self._connection.execute("BEGIN")
        try:
            yield
        finally:
            with complaints(self.path):
                self._connection.execute("COMMIT")

    @contextmanager
    def forced(self) -> Iterator[None]:
        """What is committed inside is on the disk, with all before it, when its transaction ends.

        Elsewhere the last transactions of a write-ahead log may wait in the system's memory; a power cut takes them.
        """
        with complaints(self.path):
            self._connection.execute("PRAGMA synchronous=FULL")
        try:
            yield
        finally:
            with complaints(self.path):
                self._connection.execute(f"PRAGMA synchronous={_synchronous(self.journal)}")

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def hold(path: Path) -> sqlite3.Connection | None:
    """Hold a lock file until the connection is closed or the process dies; None where somebody else holds it.

    The lock is SQLite's own exclusive lock on an empty file: it works wherever SQLite does.
    """
    with complaints(path), _closed_on_error(sqlite3.connect(path, timeout=0.0, isolation_level=None)) as connection:
        try:
            connection.execute("PRAGMA journal_mode=MEMORY")  # no second file beside the lock
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            if _primary_code(error) != sqlite3.SQLITE_BUSY:
                raise
            connection.close()
            return None
        return connection


def network_file_system(path: Path, mounts: str) -> str | None:
    """The type of the network file system that holds the path, or None. `mounts` is the text of /proc/self/mounts.

    >>> network_file_system(Path("/home/ann/runs"), "disk / ext4 rw 0 0\\nhost:/home /home nfs4 rw 0 0")
    'nfs4'
    """
    best = ("", "")
    for line in mounts.splitlines():
        _, point, kind = line.split(" ")[:3]
        point = point.replace("\\040", " ")  # how the kernel writes a space
        if path.is_relative_to(point) and len(point) >= len(best[0]):
            best = (point, kind)
    return best[1] if best[1] in NETWORK_FILE_SYSTEMS else None


def to_json(value: object) -> str:
    """Compact JSON; NaN and infinities, which JSON does not have, become null."""
    return json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":"), default=_plain, allow_nan=False)


@contextmanager
def complaints(path: Path, what: str = "") -> Iterator[None]:
    """Turn what SQLite and the system say into a RunError that says what to do."""
    where = f"{path}, {what}" if what else str(path)
    try:
        yield
    except sqlite3.Error as error:
        advice = _ADVICE.get(_primary_code(error), "the file cannot be used; see the reason in brackets")
        raise RunError(f"{where}: {advice} ({error})") from error
    except OSError as error:
        raise RunError(
            f"{where}: cannot be written or read ({error.strerror or error}); choose another folder"
        ) from error


_FULL = (
    "the disk is full; what was being written is not in the run, everything before it is. "
    "Free some space, then resume the run"
)
_READONLY = "this folder or file cannot be written; change its permissions, or choose or copy it to another folder"
_TORN = "the file is no database of a run, or is damaged; restore it from a copy"
_ADVICE = {
    sqlite3.SQLITE_FULL: _FULL,
    sqlite3.SQLITE_IOERR: "the disk failed or is full; what was being written is not in the run, all before it is",
    sqlite3.SQLITE_READONLY: _READONLY,
    sqlite3.SQLITE_CANTOPEN: _READONLY,
    sqlite3.SQLITE_PERM: _READONLY,
    sqlite3.SQLITE_BUSY: f"another process has held the file for {BUSY_SECONDS:.0f} s; stop it, or try again",
    sqlite3.SQLITE_LOCKED: "another connection holds the file; close it, or try again",
    sqlite3.SQLITE_CONSTRAINT: "this is in the run already; each metric, sample and command goes in once a step",
    sqlite3.SQLITE_NOTADB: _TORN,
    sqlite3.SQLITE_CORRUPT: _TORN,
}


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: object) -> object:
    """What JSON does not know: paths as text, numbers of other libraries as numbers."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    as_list: Callable[[], object] | None = getattr(value, "tolist", None)
    if as_list is not None:
        return _finite(as_list())
    raise InputError(f"a {type(value).__name__} cannot be written as JSON; wanted text, numbers, lists or mappings")


def _primary_code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF  # extended codes keep the primary one in the low byte


def _connect(path: Path, mode: str, *options: str) -> sqlite3.Connection:
    """Autocommit: transactions are begun by hand. Readers may be used from any thread, a writer from its own only."""
    uri = "&".join([f"{path.resolve().as_uri()}?mode={mode}", *options])
    connection = sqlite3.connect(
        uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=mode != "ro"
    )
    connection.execute("PRAGMA foreign_keys=ON")
    return connection


@contextmanager
def _closed_on_error(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    try:
        yield connection
    except BaseException:
        connection.close()
        raise


def _connect_readonly(path: Path) -> sqlite3.Connection:
    """Read-only; on a medium that cannot be written at all, without the log's shared memory."""
    with _closed_on_error(_connect(path, "ro")) as connection:
        try:
            connection.execute("SELECT 1 FROM sqlite_schema").fetchone()
        except sqlite3.OperationalError as error:
            log = path.with_name(path.name + "-wal")
            cannot_share = _primary_code(error) in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)
            if not cannot_share or (log.exists() and log.stat().st_size):
                raise
            connection.close()
            return _connect(path, "ro", "immutable=1")
        return connection


def _choose_journal(connection: sqlite3.Connection, path: Path) -> str:
    """A write-ahead log where it works, else a rollback journal; returns which."""
    mounts = MOUNTS.read_text() if MOUNTS.exists() else ""
    journal = "delete" if network_file_system(path.resolve(), mounts) else "wal"
    try:
        journal = str(connection.execute(f"PRAGMA journal_mode={journal}").fetchone()[0])
        connection.execute("SELECT 1 FROM sqlite_schema").fetchone()  # touches the log's shared memory
    except sqlite3.OperationalError:
        journal = str(connection.execute("PRAGMA journal_mode=delete").fetchone()[0])
    connection.execute(f"PRAGMA synchronous={_synchronous(journal)}")
    return journal


def _synchronous(journal: str) -> str:
    """In a write-ahead log NORMAL can lose the last transactions in a power cut, but tears nothing."""
    return "NORMAL" if journal == "wal" else "FULL"


def _check_schema(connection: sqlite3.Connection, path: Path, schema: Schema) -> None:
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if application != schema.application:
        raise RunError(f"{path} is a database, but not one of a run; wanted the folder of a run")
    if version != schema.version:
        which = "an older" if version < schema.version else "a newer"
        raise RunError(
            f"{path} has schema {version}, written by {which} version of tether; this one reads schema "
            f"{schema.version}. Use the version that wrote it, or start a new run"
        )
