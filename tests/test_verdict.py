"""The verdict on a run folder: its word, the numbers beside it and the exit code of `tether check`.

The folders are written by hand, so what a run is said to be is known beforehand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

import tether.checking
from tether.alarms import FAILURES
from tether.checking import main
from tether.config import RunSettings
from tether.pluck import Answer, Pluck
from tether.store import RunStore
from tether.verdict import judge

UPDATES = 30
EVENT = {"seen": "K is 7 nats", "remedy": "stop", "evidence": {"kl": 7.0}}


def run_of(
    root: Path, alarms: Mapping[str, tuple[int, str]] | None = None, evaluations: Mapping[int, float] | None = None
) -> Path:
    """A run whose score and K rise by a tenth an update; alarms by their update and severity."""
    with RunStore.create(root, "run", RunSettings(world="nano").dump()) as store:
        for step in range(UPDATES):
            with store.update(step) as entry:
                entry.metrics({"score/mean": 0.1 * step, "kl/mean": 0.1 * step, "beta": 0.05, "seconds/checks": 0.0})
                if step in (evaluations or {}):
                    entry.metrics({"eval/gain_at_equal_length": (evaluations or {})[step]})
            for reason, (when, severity) in (alarms or {}).items():
                if when == step:
                    store.event(reason, EVENT, severity, step)
    return root / "run"


def test_numbers_of_updates_are_means_of_the_last_twenty_and_an_evaluation_counts_alone(tmp_path: Path) -> None:
    with RunStore.open(run_of(tmp_path, evaluations={0: 0.0, 10: 0.4, 20: 0.9})) as store:
        verdict = judge(store)
    assert verdict.numbers["score/mean"] == pytest.approx(1.95)
    assert verdict.numbers["eval/gain_at_equal_length"] == 0.9
    assert verdict.numbers["score_gain"] == pytest.approx(1.95 - 0.2)  # less the first 5 updates


@pytest.mark.parametrize(
    ("alarms", "word", "code"),
    [
        ({}, "HOLDING", 0),
        ({"over_optimised": (12, "warning")}, "HOLDING", 0),
        ({"too_many_epochs": (12, "alarm")}, "HOLDING", 1),
        ({"budget_exceeded": (12, "alarm")}, "SNAPPED", 1),
        ({"budget_exceeded": (12, "alarm"), "kl_sign": (1, "alarm")}, "NOT ATTACHED", 1),
    ],
    ids=["quiet", "a warning", "an alarm of no word", "beyond the budget", "the gravest"],
)
def test_the_gravest_word_is_said_and_the_exit_code_tells_quiet_from_alarmed(
    alarms: Mapping[str, tuple[int, str]], word: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path, alarms)
    assert main(str(run)) == code
    said = capsys.readouterr().out
    assert said.startswith(f"{word} after {UPDATES} updates")
    assert ("next    " in said) == (code == 1)
    for reason, (_, severity) in alarms.items():
        if severity == "alarm" and word in ("HOLDING", FAILURES[reason].verdict):
            assert FAILURES[reason].title in " ".join(said.split("\n\n")[0].split())  # already in the headline
    assert main(str(run), json=True) == code
    told = json.loads(capsys.readouterr().out)
    assert (told["verdict"], told["quiet"], told["updates"]) == (word, code == 0, UPDATES)
    assert {alarm["reason"] for alarm in told["alarms"]} == set(alarms)


def test_what_is_no_run_or_has_no_update_is_misused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(str(tmp_path / "nowhere")) == 2
    RunStore.create(tmp_path, "empty", RunSettings(world="nano").dump()).close()
    assert main(str(tmp_path / "empty")) == 2
    assert "no update yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "word", "code"),
    [("pulls", "HOLDING", 0), ("nothing to pull", "HOLDING", 0), ("silent", "NOT ATTACHED", 1),
     ("pushes", "NOT ATTACHED", 1)],
)  # fmt: skip
def test_a_string_that_does_not_answer_is_not_attached_whatever_was_seen_before(
    answer: Answer, word: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    told = Pluck(answer, (4.2, 4.3, 4.4), 0.5, 0.8)
    monkeypatch.setattr(tether.checking, "_pluck", lambda _: told)
    run_of(tmp_path)
    assert main("run", root=tmp_path, pluck=True) == code
    out = " ".join(capsys.readouterr().out.split())
    assert out.startswith(word)
    assert told.sentence() in out
    assert ("next" in out) == (code == 1)
    assert main("run", root=tmp_path, pluck=True, json=True) == code
    said = json.loads(capsys.readouterr().out)
    assert (said["verdict"], said["pluck"]["answer"]) == (word, answer)
