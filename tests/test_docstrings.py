"""The worked examples in the docstrings are run, and each public function of `tether.numerics` has one."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import tether
from tether import numerics

SOURCE = Path(tether.__file__).parent
WITH_EXAMPLES = [path for path in sorted(SOURCE.rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: path.stem)
def test_the_worked_examples_of_a_module_hold(path: Path) -> None:
    module = importlib.import_module(".".join(["tether", *path.relative_to(SOURCE).with_suffix("").parts]))
    outcome = doctest.testmod(module)
    assert outcome.attempted > 0
    assert outcome.failed == 0


def test_every_public_function_of_numerics_has_a_worked_example() -> None:
    for name, function in vars(numerics).items():
        if callable(function) and getattr(function, "__module__", "") == numerics.__name__ and name[0] != "_":
            assert ">>> " in function.__doc__, name
