"""The errors that `run.py` plants, read from `mutants.diff`: each a single line, of the kind that people make.

    @@ module | kind | what is wrong            the head of one error
     a line of the module, for orientation      the lines that begin with a space or `-` stand, together and whole,
    -the line as it is                          exactly once in the module
    +the line as it is planted

An error that changes nothing that could be observed is not listed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DIFF = Path(__file__).with_name("mutants.diff")

NUMERICS = [
    "tests/test_numerics_errors.py",
    "tests/test_numerics_known_values.py",
    "tests/test_numerics.py",
    "tests/test_tether_gradient.py",
    "tests/test_numerics_invariances.py",
    "tests/test_importance.py",
]
TESTS = {
    "numerics.py": NUMERICS,
    "rewards.py": ["tests/test_rewards.py"],
    "advantages.py": ["tests/test_advantages.py", "tests/test_critics.py"],
    "update.py": ["tests/test_update.py", "tests/test_critics.py"],
}
"""What is run against the mutants of a module, the quickest first."""


@dataclass(frozen=True)
class Mutant:
    """One planted error."""

    module: str
    """File under `src/tether`."""
    kind: str
    """sign, mask, denominator, off by one, …"""
    error: str
    """What is wrong, in a few words; no two mutants share them."""
    lines: tuple[str, ...]
    """Marked by their first character."""

    @property
    def original(self) -> str:
        return "".join(f"{line[1:]}\n" for line in self.lines if line[0] in " -")

    @property
    def mutated(self) -> str:
        return "".join(f"{line[1:]}\n" for line in self.lines if line[0] in " +")

    def plant(self, source: str) -> str:
        """The source with the error in it. Raises ValueError unless its lines stand there exactly once."""
        found = f"\n{source}".count(f"\n{self.original}")
        if found != 1:
            raise ValueError(
                f"«{self.error}» stands {found} times in {self.module}; wanted once: bring mutants.diff up to date"
            )
        return f"\n{source}".replace(f"\n{self.original}", f"\n{self.mutated}")[1:]

    def line(self, source: str) -> int:
        """Number of the first changed line."""
        before = f"\n{source}".split(f"\n{self.original}")[0]
        return before.count("\n") + 1 + next(i for i, line in enumerate(self.lines) if line[0] != " ")


def read(text: str) -> list[Mutant]:
    """The errors of a diff in the form above."""
    mutants = []
    for block in text.strip().split("\n\n@@ "):
        head, *lines = block.removeprefix("@@ ").splitlines()
        module, kind, error = head.split(" | ")
        mutants.append(Mutant(module, kind, error, tuple(lines)))
    return mutants


MUTANTS = read(DIFF.read_text(encoding="utf-8"))
