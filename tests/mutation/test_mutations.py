"""Each planted error is seen by a test, and docs/mutations.md says by which."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from mutants import MUTANTS, TESTS, Mutant
from run import HEAD, TABLE, known_tests, row

PARTS = 6
"""Processes that share the work, so that both cores have some."""
QUICK = (0, 3)
"""Parts that every `make test` plants, each third error; the others are planted by `pytest -m slow tests/mutation`."""


def check(what: str) -> dict[str, dict[str, str | None]]:
    command = [sys.executable, str(Path(__file__).with_name("run.py")), "--check", what]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


@pytest.mark.parametrize(
    "part", [pytest.param(part, marks=[] if part in QUICK else pytest.mark.slow) for part in range(PARTS)]
)
def test_every_planted_error_is_seen_by_the_test_that_the_table_names(part: int) -> None:
    verdicts, known = check(f"{part}/{PARTS}"), known_tests()
    assert set(verdicts) == {mutant.error for mutant in MUTANTS[part::PARTS]}
    assert {error: v for error, v in verdicts.items() if v["broken"] or not v["failed"]} == {}
    moved = {error: v["failed"] for error, v in verdicts.items() if v["failed"] != known.get(error)}
    assert moved == {}, "seen, but by another test than the table says: make mutants"


def test_the_same_tests_pass_where_nothing_is_planted() -> None:
    assert check("nothing") == {"nothing planted": {"failed": None, "broken": None}}


def test_the_table_is_that_of_the_planted_errors() -> None:
    known = known_tests()
    assert TABLE.read_text(encoding="utf-8") == HEAD + "".join(row(m, known.get(m.error, "")) for m in MUTANTS)


def test_the_planted_errors_are_many_and_no_two_are_alike() -> None:
    assert max(Counter(mutant.error for mutant in MUTANTS).values()) == 1
    assert max(Counter((mutant.module, mutant.original, mutant.mutated) for mutant in MUTANTS).values()) == 1
    assert {mutant.module for mutant in MUTANTS} == set(TESTS)
    assert len(MUTANTS) >= 200


def test_an_error_whose_line_is_gone_is_a_complaint_and_not_a_success() -> None:
    stale = Mutant("numerics.py", "sign", "a line of another day", ("-    return nothing_of_the_kind", "+    return 0"))
    with pytest.raises(ValueError, match=r"stands 0 times in numerics\.py; wanted once"):
        stale.plant("def f():\n    return 1\n")
