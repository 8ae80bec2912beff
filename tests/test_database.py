"""The SQLite files of a run: on every file system, and what they say when they cannot be used."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tether import database
from tether.database import network_file_system, to_json
from tether.errors import InputError, RunError
from tether.store import RunStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    with RunStore.create(tmp_path, "run", {}) as created:
        yield created


def record(store: RunStore, step: int) -> None:
    with store.update(step) as update:
        update.metrics({"beta": 0.05})


def test_missing_torn_foreign_and_old_files_are_each_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"there is no run\.db in .*nowhere; wanted the folder of a run"):
        RunStore.open(tmp_path / "nowhere")
    for name in ("torn", "foreign", "old", "newer"):
        RunStore.create(tmp_path, name, {}).close()
    (tmp_path / "torn" / "run.db").write_bytes(b"this is no database" * 1000)
    for name, pragma in (("foreign", "application_id=1"), ("old", "user_version=0"), ("newer", "user_version=9")):
        connection = sqlite3.connect(tmp_path / name / "run.db")
        connection.execute(f"PRAGMA {pragma}")
        connection.close()
    wanted = {
        "torn": "no database of a run, or is damaged",
        "foreign": "is a database, but not one of a run",
        "old": "has schema 0, written by an older version",
        "newer": "has schema 9, written by a newer version",
    }
    for name, complaint in wanted.items():
        for readonly in (True, False):
            with pytest.raises(RunError, match=complaint):
                RunStore.open(tmp_path / name, readonly=readonly)
    assert not (tmp_path / "nowhere").exists()


def test_a_file_system_without_shared_memory_gets_a_rollback_journal_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = database._connect
    monkeypatch.setattr(
        database, "_connect", lambda path, mode, *options: connect(path, mode, *options, "vfs=unix-dotfile")
    )
    with RunStore.create(tmp_path, "run", {}) as store:
        record(store, 0)
        assert [event.kind for event in store.events()] == ["created", "rollback_journal"]
        assert store._database.rows("PRAGMA journal_mode") == [("delete",)]
        assert store._database.rows("PRAGMA synchronous") == [(2,)], "FULL: NORMAL is safe in a write-ahead log only"
        with RunStore.open(store.path) as reader:
            assert reader.last_step() == 0


def test_a_medium_that_cannot_be_written_is_refused_at_once(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.close()
    connect = database._connect

    def connect_as_sqlite_does_there(path: Path, mode: str, *options: str) -> sqlite3.Connection:
        return connect(path, "ro" if mode == "rw" else mode, *options)  # silently, unless it is asked to write

    monkeypatch.setattr(database, "_connect", connect_as_sqlite_does_there)
    with pytest.raises(RunError, match="cannot be written; change its permissions, or choose or copy it"):
        RunStore.open(store.path, readonly=False)
    monkeypatch.undo()
    RunStore.open(store.path, readonly=False).close()  # the lock was let go


def test_a_local_disk_gets_a_write_ahead_log(store: RunStore) -> None:
    assert store._database.rows("PRAGMA journal_mode") == [("wal",)]
    assert store._database.rows("PRAGMA synchronous") == [(1,)]
    assert [event.kind for event in store.events()] == ["created"]


def test_network_file_systems_are_told_by_their_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = "host:/x /net nfs4 rw 0 0\ndisk / ext4 rw 0 0\ndisk /net/local\\040disk xfs rw 0 0\n//h/s /smb cifs rw 0 0"
    kinds = {"/home/a": None, "/net/runs": "nfs4", "/network": None, "/net/local disk/a": None, "/smb": "cifs"}
    assert {path: network_file_system(Path(path), mounts) for path in kinds} == kinds
    (tmp_path / "mounts").write_text(f"host:/x {tmp_path.resolve()} nfs rw 0 0\n")
    monkeypatch.setattr(database, "MOUNTS", tmp_path / "mounts")
    with RunStore.create(tmp_path, "run", {}) as store:
        assert store.events()[-1].payload["journal"] == "delete"


def test_a_copy_of_a_running_run_can_be_read(store: RunStore, tmp_path: Path) -> None:
    for step in range(3):
        record(store, step)
    shutil.copytree(store.path, tmp_path / "copy")
    record(store, 3)
    with RunStore.open(tmp_path / "copy") as copy:
        assert copy.steps() == [0, 1, 2]


def test_json_has_neither_nan_nor_numpy() -> None:
    value = {"a": float("inf"), "b": (1, np.int64(2)), 3: np.array([1.0, np.nan]), "c": True}
    assert json.loads(to_json(value)) == {"a": None, "b": [1, 2], "3": [1.0, None], "c": True}
    with pytest.raises(InputError, match="a object cannot be written as JSON"):
        to_json(object())
