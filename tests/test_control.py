"""Commands and labels: what people ask of a run, and what becomes of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tether.control import Control
from tether.errors import RunError
from tether.store import RunStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    with RunStore.create(tmp_path, "run", {}) as created:
        yield created


def test_commands_pass_from_people_to_the_trainer_and_their_outcome_back(store: RunStore) -> None:
    with Control.open(store.path, readonly=False, clock=lambda: 50.0) as people, Control.open(store.path) as trainer:
        first = people.command("ann", "set", {"beta": 0.1}, base_version=0, expires=60.0)
        second = people.command("ann", "pause", {})
        got = trainer.commands()
        assert [(one.id, one.actor, one.kind, one.payload) for one in got] == [
            (first, "ann", "set", {"beta": 0.1}),
            (second, "ann", "pause", {}),
        ]
        assert (got[0].base_version, got[0].expires, got[0].created) == (0, 60.0, 50.0)
        assert [got[0].has_expired(now) for now in (60.0, 61.0)] == [False, True]
        assert not got[1].has_expired(1e12)
        assert [one.id for one in trainer.commands(after=first)] == [second]
        with store.update(4) as update:
            update.applied(first, {"beta": [0.05, 0.1]})
            update.applied(second, {"why": "the run is over"}, outcome="rejected")
        with pytest.raises(RunError, match="cannot be written"):
            trainer.command("trainer", "set", {})
    assert [(one.command_id, one.step, one.outcome, one.payload) for one in store.applied()] == [
        (first, 4, "applied", {"beta": [0.05, 0.1]}),
        (second, 4, "rejected", {"why": "the run is over"}),
    ]
    assert [one.command_id for one in store.applied(after=first)] == [second]


def test_a_command_cannot_be_applied_twice(store: RunStore) -> None:
    with store.update(0) as update:
        update.applied(1)
    with pytest.raises(RunError, match="in the run already"), store.update(1) as update:
        update.applied(1)


def test_labels_are_kept(store: RunStore) -> None:
    with Control.open(store.path, readonly=False) as people:
        label = people.label("ann", "preference", {"chosen": 3, "rejected": 4})
        assert [(one.id, one.actor, one.kind, one.payload) for one in people.labels()] == [
            (label, "ann", "preference", {"chosen": 3, "rejected": 4})
        ]
        assert people.labels(after=label) == []
