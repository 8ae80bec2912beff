"""What can go wrong, and the word for it: the catalogue of failures, and the alarm that says one was seen.

`FAILURES` is data (`failures.toml`): title, kind, what shows, why it matters, what to do, what looks alike. An `Alarm`
names one of them with the evidence of this run. Knows no run and no tensor. Read next: `checks.py`, `verdict.py`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType

from tether.errors import ConfigError
from tether.records import Severity


@dataclass(frozen=True)
class Failure:
    """One way in which a run fails, explained."""

    name: str
    title: str
    """A few words."""
    kind: str
    """`invariant`, `statistic`, `guard` or `world`: what the detector rests on."""
    verdict: str
    """What the run is called while it lasts; empty where the string is not in question."""
    seen: str
    """What shows in the numbers."""
    why: str
    """What it does to the run."""
    remedy: str
    """Likely causes in order, and what to do."""
    alike: str
    """What looks the same, and the test that parts them."""
    planted: str
    """What `--fault NAME` changes; empty where nothing can be planted."""


def _load(path: Path) -> Mapping[str, Failure]:
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    return MappingProxyType({name: Failure(name=name, **table) for name, table in tables.items()})


FAILURES: Mapping[str, Failure] = _load(Path(__file__).with_name("failures.toml"))
"""Every failure by its name."""
FAULTS: tuple[str, ...] = tuple(name for name, failure in FAILURES.items() if failure.planted)
"""Those that can be planted on purpose."""


PLANTED: ContextVar[str | None] = ContextVar("planted", default=None)
"""The fault that is planted just now; a run that begins notes it."""


def check_fault(name: str | None) -> str | None:
    """The name, if there is such a fault, or None for none. Raises ConfigError with the nearest."""
    if name is None or name in FAULTS:
        return name
    near = get_close_matches(name, FAULTS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"there is no fault {name!r}{hint}; faults: {', '.join(FAULTS)}")


@dataclass(frozen=True)
class Alarm:
    """A failure that was seen in this run.

    >>> alarm = Alarm("kl_sign", "the string's part is +1.00 × β·ℓ", {"ratio": 1.0})
    >>> alarm.severity, alarm.verdict
    ('alarm', 'NOT ATTACHED')
    """

    reason: str
    """Its name in `FAILURES`."""
    seen: str
    """What was seen, with its numbers, in one sentence."""
    evidence: Mapping[str, object] = field(default_factory=dict)
    """The numbers by name."""
    severity: Severity = "alarm"

    @property
    def failure(self) -> Failure:
        return FAILURES[self.reason]

    @property
    def verdict(self) -> str:
        """What the run is called while this lasts; empty where the string is not in question."""
        return self.failure.verdict

    @property
    def remedy(self) -> str:
        return self.failure.remedy

    def payload(self) -> dict[str, object]:
        """As the run's events keep it."""
        told = {"seen": self.seen, "why": self.failure.why, "remedy": self.remedy, "alike": self.failure.alike}
        return {name: text for name, text in told.items() if text} | {"evidence": dict(self.evidence)}
