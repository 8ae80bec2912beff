"""The catalogue of metrics: for every number that a run logs, its unit, formula, source, healthy range and remedy.

A number that is not in `CATALOGUE` cannot be logged (`store.py` refuses it), so the terminal, the pictures, the page
and the docs can explain every number from the same entry. The entries themselves are data: `metrics.toml`, whose head
explains the letters of the formulas. An entry whose name ends in `/*` explains every name that begins as it does.
Knows no run and no tensor. Read next: `store.py`.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tether.errors import InputError


@dataclass(frozen=True)
class Metric:
    """One number of a run, explained."""

    name: str
    """How it is logged: `group/what`, or one word."""
    title: str
    """A few words for an axis or a heading."""
    unit: str
    """`nats/response` is summed over a response's tokens; `score` is the score's own unit; `1` is a pure number."""
    formula: str
    """What is averaged or summed over what."""
    source: str
    """Paper or convention."""
    healthy: str
    """What a run that learns shows."""
    remedy: str
    """What to look at when it is not so, first cause first."""
    low: float | None = None
    """Lower bound of the healthy range, where one holds for every run."""
    high: float | None = None
    """Upper bound, likewise."""

    def is_outside(self, value: float) -> bool:
        """Whether the value lies outside the bounds that hold for every run; NaN lies outside every bound.

        >>> CATALOGUE["ppo/clip_fraction"].is_outside(0.35), CATALOGUE["kl/mean"].is_outside(35.0)
        (True, False)
        """
        inside = (self.low is None or value >= self.low) and (self.high is None or value <= self.high)
        return not inside


class Catalogue(Mapping[str, Metric]):
    """Entries by name, in the order in which they are shown; `group/family/*` is the entry of a whole family.

    A family's member is known and has the family's entry under its own name; only entries are counted and listed.

    >>> member = CATALOGUE["score/part/style"]
    >>> member.name, member.unit, "score/part/style" in CATALOGUE, "score/part/style" in list(CATALOGUE)
    ('score/part/style', 'score', True, False)
    """

    def __init__(self, entries: Iterable[Metric]) -> None:
        self._entries = {entry.name: entry for entry in entries}
        self._places = {name: place for place, name in enumerate(self._entries)}

    def __getitem__(self, name: str) -> Metric:
        return replace(self._entries[self._entry(name)], name=name)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._entry(name) in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def in_order(self, names: Iterable[str]) -> list[str]:
        """The names as the catalogue has them, a family's members by name; those that it does not know at the end."""
        return sorted(names, key=lambda name: (self._places.get(self._entry(name), len(self)), name))

    def _entry(self, name: str) -> str:
        """The entry that explains the name: its own, else the nearest family's."""
        parts = name.split("/")
        families = ("/".join([*parts[:end], "*"]) for end in range(len(parts) - 1, 0, -1))
        return next((known for known in (name, *families) if known in self._entries), name)


def _load(path: Path) -> Catalogue:
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    return Catalogue(Metric(name=name, **table) for name, table in tables.items())


CATALOGUE = _load(Path(__file__).with_name("metrics.toml"))
"""Every metric by its name."""


def did_you_mean(got: str, known: Collection[str]) -> str:
    """`; did you mean 'kl/mean'?` for the nearest known name, or nothing where none is near.

    >>> did_you_mean("kl/men", ["kl/mean", "beta"])
    "; did you mean 'kl/mean'?"
    """
    near = difflib.get_close_matches(got, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_known(names: Iterable[str]) -> None:
    """Raise InputError unless every name is in the catalogue; all that are not are reported together."""
    unknown = [name for name in names if name not in CATALOGUE]
    if unknown:
        faults = [f"{name!r} is not in the catalogue{did_you_mean(name, CATALOGUE)}" for name in unknown]
        raise InputError(
            "unknown metric: " + "\n  ".join(faults) + "\nEvery logged number needs its entry in tether/metrics.toml."
        )


def describe(name: str) -> str:
    """The entry as a paragraph for the terminal. Raises InputError where the name is not in the catalogue.

    >>> print(describe("ppo/skipped_steps"))
    ppo/skipped_steps: optimiser steps skipped [1]
      formula  optimiser steps whose loss or gradient was not finite
      source   tether
      healthy  0
      else     Any: look for infinite scores, half-precision overflow or a too large learning rate.
    """
    check_known([name])
    metric = CATALOGUE[name]
    return (
        f"{name}: {metric.title} [{metric.unit}]\n"
        f"  formula  {metric.formula}\n"
        f"  source   {metric.source}\n"
        f"  healthy  {metric.healthy}\n"
        f"  else     {metric.remedy}"
    )
