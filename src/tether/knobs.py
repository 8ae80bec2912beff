"""Knobs by name, and configurations read with all their faults at once.

    read_settings(recipe, overrides) → RunSettings        or one ConfigError that lists every fault:
                                                          path, what was got, what was wanted, "did you mean"

In a file a knob stands at its place, `ppo: {reward: {beta: 0.1}}`. There, on the command line and in Python it may be
named by any part of its path that leads to one knob only: `beta`, `ppo.beta`, `ppo.reward.beta`. The names of other
libraries are taken from `aliases.py`, everywhere. Knows no torch and no file. Read next: `config.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from types import UnionType
from typing import Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from tether.aliases import FALSE_FRIENDS, FRIENDS
from tether.config import RunSettings
from tether.errors import ConfigError
from tether.reward_spec import RewardPart
from tether.settings import Settings

PREFERRED = ("ppo.", "data.")
"""Where a short name leads if several knobs bear it."""
ASIDE = ("preferences.", "holdout.", "judge.")
"""Where one leads only if no other knob bears it."""
SHORT = {
    "policy": "model.source", "model": "model.source", "reward": "reward.source", "holdout": "holdout.source",
    "judge": "judge.source", "data": "data.prompts",
}  # fmt: skip
"""Sections that may be given as one value: `reward: my_reward.py:score`."""
SHOWN = 60
"""Characters of a wrong value that a complaint repeats."""
LIMITS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong in a configuration."""

    path: str
    """The knob, as `ppo.reward.beta`."""
    complaint: str
    """What was got, what was wanted, what to do."""

    def __str__(self) -> str:
        return f"{self.path}: {self.complaint}" if self.path else self.complaint


@dataclass(frozen=True)
class Named:
    """A knob found by name."""

    path: str
    note: str = ""
    """What to know of the name that was used."""


# ── the knobs ───────────────────────────────────────────────────────────────────────────────────────────────────────
@cache
def knobs() -> dict[str, FieldInfo]:
    """Every knob of a run by its path, in the order of the models."""
    return dict(_leaves(RunSettings, ""))


@cache
def sections() -> dict[str, type[Settings]]:
    """Every group of knobs by its path: `ppo`, `ppo.reward`, …"""
    return dict(_groups(RunSettings, ""))


def _leaves(model: type[Settings], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, info in model.model_fields.items():
        if isinstance(info.default, Settings):
            yield from _leaves(type(info.default), f"{prefix}{name}.")
        else:
            yield prefix + name, info


def _groups(model: type[Settings], prefix: str) -> Iterator[tuple[str, type[Settings]]]:
    for name, info in model.model_fields.items():
        if isinstance(info.default, Settings):
            yield prefix + name, type(info.default)
            yield from _groups(type(info.default), f"{prefix}{name}.")


def allowed(field: FieldInfo) -> str:
    """What a knob may be: `> 0`, `≥ 0, ≤ 1`, or its choices.

    >>> allowed(knobs()["ppo.advantage.lam"]), allowed(knobs()["model.mode"])
    ('≥ 0, ≤ 1', '`full`, `lora`, `top`')
    """
    kinds = kinds_of(field)
    choices = [f"`{choice}`" for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    limits = [
        f"{sign} {getattr(limit, key)}"
        for limit in field.metadata
        for key, sign in LIMITS.items()
        if hasattr(limit, key)
    ]
    return ", ".join(choices or limits) or ("`true`, `false`" if bool in kinds else "")


def kinds_of(field: FieldInfo) -> tuple[object, ...]:
    """The types that a knob may have; `float | None` is two."""
    several = get_args(field.annotation) if get_origin(field.annotation) in (Union, UnionType) else ()
    return several or (field.annotation,)


def told(field: FieldInfo, what: Literal["usual", "used"]) -> str:
    """The usual range of a knob, or who uses what."""
    extra = field.json_schema_extra
    return str(extra.get(what, "")) if isinstance(extra, Mapping) else ""


def wanted(field: FieldInfo) -> str:
    """What a knob may be, as a complaint says it: kind, bounds, and null where that is allowed."""
    kinds = kinds_of(field)
    names = {
        bool: "true or false", int: "a whole number", float: "a number", str: "text",
        tuple[int, ...]: "a list of whole numbers", tuple[str, ...]: "a list of texts",
        dict[str, RewardPart]: "sources by name",
    }  # fmt: skip
    limits = allowed(field)
    base = limits.replace("`", "") if any(get_origin(kind) is Literal for kind in kinds) else ""
    if not base:
        base = " or ".join(name for kind, name in names.items() if kind in kinds)
        base += f" {limits}" if limits and bool not in kinds else ""
    return base + (", or null" if type(None) in kinds else "")


# ── by name ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def find_knob(name: str) -> Named | Fault:
    """The knob of this name: its path, any part of the path that leads to one knob, or another library's name."""
    name = name.strip().replace("-", "_")
    if name in knobs() or name in SHORT:
        return Named(SHORT.get(name, name))
    found = [path for path in knobs() if _abbreviates(name, path)]
    found = [path for path in found if not path.startswith(ASIDE)] or found
    found = [path for path in found if path.startswith(PREFERRED)] or found
    if len(found) == 1:
        return Named(found[0])
    if found:
        return Fault(name, f"means {' or '.join(found)}; write one of them")
    return _foreign(name) or Fault(name, "there is no such knob" + did_you_mean(name))


def _foreign(name: str) -> Named | Fault | None:
    """The knob that another library calls so."""
    last = name.rpartition(".")[2]
    if alias := FRIENDS.get(last):
        return Named(alias.path, f"{last} → {alias.path}" + (f": {alias.note}" if alias.note else ""))
    if false := FALSE_FRIENDS.get(last):
        return Fault(name, f"a name of {' and '.join(false.libraries)} that is not taken over: {false.instead}")
    return None


def _abbreviates(name: str, path: str) -> bool:
    """Whether the name is the path with groups left out."""
    parts, wanted_parts = path.split("."), name.split(".")
    rest = iter(parts)
    return parts[-1] == wanted_parts[-1] and all(part in rest for part in wanted_parts)


def did_you_mean(name: str) -> str:
    """A hint at the nearest knob or group: of the same last word, else of one spelled alike; those beside it first."""
    group, _, last = name.rpartition(".")
    paths = [*knobs(), *sections()]
    words = {_last(path) for path in paths}
    nearest = [last] if last in words else get_close_matches(last, sorted(words), n=1, cutoff=0.7)
    found = [path for path in paths if _last(path) in nearest]
    beside = [path for path in found if group and path.rpartition(".")[0] == group]
    shown = beside or sorted(found, key=lambda path: not path.startswith(PREFERRED))[:2]
    return f"; did you mean {' or '.join(shown)}?" if shown else "; `tether train --help` lists them all"


def _last(path: str) -> str:
    return path.rpartition(".")[2]


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def read_settings(
    tree: object, overrides: Sequence[tuple[str, object]] = (), where: str = "the configuration"
) -> tuple[RunSettings, list[str]]:
    """Settings from a recipe and the knobs named beside it, which win; and notes on names that were translated.

    Raises ConfigError with every fault of both.
    """
    reading = _Reading()
    if not isinstance(tree, Mapping):
        reading.faults.append(Fault("", f"holds {_shown(tree)}; wanted knobs by name, as `ppo: {{steps: 100}}`"))
        tree = {}
    reading.flatten(tree, "")
    reading.override(overrides)
    settings, more = _validate(reading.values)
    faults, notes = reading.faults + more, reading.notes
    if settings is None or faults:
        raise ConfigError(report(faults, where))
    return settings, notes


def report(faults: Sequence[Fault], where: str) -> str:
    """All faults as one message, a line each."""
    if len(faults) == 1:
        return f"{where}: {faults[0]}"
    return "\n".join([f"{where} has {len(faults)} faults:", *(f"  {fault}" for fault in faults)])


@dataclass
class _Reading:
    """What a recipe and the knobs beside it say, knob by knob."""

    values: dict[str, object] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    """The name under which each knob was given."""

    def flatten(self, tree: Mapping[object, object], prefix: str) -> None:
        """Take in the knobs of a nested mapping; what is no knob becomes a fault."""
        for key, value in tree.items():
            path = f"{prefix}{key}"
            if path in knobs():
                self._take(Named(path), path, value)
            elif isinstance(value, Mapping) and (value or path in sections()):
                self.flatten(value, f"{path}.")
            elif path in SHORT and value is not None:
                self._take(Named(SHORT[path]), path, value)
            elif path not in sections():
                self._take(find_knob(path), path, value)
            elif value is not None:
                self.faults.append(Fault(path, f"got {_shown(value)}; wanted knobs by name: {_members(path)}"))

    def override(self, overrides: Sequence[tuple[str, object]]) -> None:
        """Take in knobs that win over those of the recipe."""
        self.names.clear()
        for name, value in overrides:
            if name in sections() and (isinstance(value, Mapping) or name not in SHORT):
                self.flatten({name: value}, "")  # a group, as a recipe says it
            else:
                self._take(find_knob(name), name, value)

    def _take(self, found: Named | Fault, name: str, value: object) -> None:
        if isinstance(found, Fault):
            self.faults.append(found)
        elif self.names.setdefault(found.path, name) != name:
            twice = f"given twice, as {self.names[found.path]} and as {name}; leave one out"
            self.faults.append(Fault(found.path, twice))
        else:
            self.values[found.path] = value.parse(knobs()[found.path]) if isinstance(value, Words) else value
            self.notes += [found.note] if found.note else []


class Words(tuple[str, ...]):
    """What stood after a flag on the command line; what it means depends on the knob."""

    def parse(self, field: FieldInfo) -> object:
        """One value, or a list where there are several words; no word at all is `true`."""
        kinds = kinds_of(field)
        if not self:
            return True if bool in kinds else ""
        words = [part for word in self for part in ([word] if str in kinds else word.split(","))]
        values = [_parse_word(word, kinds) for word in words]
        return values[0] if len(values) == 1 else values


def _parse_word(word: str, kinds: Sequence[object]) -> object:
    if word in ("null", "none", "None"):
        return None
    if bool in kinds and word.lower() in ("true", "false"):
        return word.lower() == "true"
    return word


def _validate(values: Mapping[str, object]) -> tuple[RunSettings | None, list[Fault]]:
    """Settings of these knobs, or every fault: of single knobs first, then of those that do not go together."""
    faults = {path: fault for path, value in values.items() if (fault := _wrong_kind(path, value))}
    good = {path: _as_list(path, value) for path, value in values.items() if path not in faults}
    try:
        return RunSettings.model_validate(_nested(good)), list(faults.values())
    except ValidationError as error:
        for path, fault in _faults_of(error, good):
            faults.setdefault(path, fault)
    single = set(faults)
    rest = {path: value for path, value in good.items() if path not in single}
    try:
        RunSettings.model_validate(_nested(rest))
    except ValidationError as error:
        for path, fault in _faults_of(error, rest, leave_out=single):
            faults.setdefault(path, fault)
    return None, list(faults.values())


def _faults_of(
    error: ValidationError,
    values: Mapping[str, object],
    leave_out: set[str] = frozenset(),  # type: ignore[assignment]
) -> Iterator[tuple[str, Fault]]:
    """pydantic's complaints in our words. Contradictions that involve a knob of `leave_out` are left out."""
    for entry in error.errors():
        location = ".".join(str(part) for part in entry["loc"])
        if entry["type"] == "contradiction":
            involved = [f"{location}.{name}" for name in entry["ctx"]["knobs"]]
            if not leave_out & set(involved):
                yield involved[0], Fault(location, entry["msg"])
            continue
        path = max((path for path in knobs() if f"{location}.".startswith(f"{path}.")), key=len, default=location)
        value = values.get(path)
        near = get_close_matches(str(value), allowed(knobs()[path]).replace("`", "").split(", "), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        yield path, Fault(path, f"got {_shown(value)}; wanted {wanted(knobs()[path])}{hint}")


def _wrong_kind(path: str, value: object) -> Fault | None:
    """A fault where pydantic would bend the value, true for a number, or take it for none: an empty text."""
    field = knobs()[path]
    kinds = kinds_of(field)
    number = isinstance(value, float) and not math.isfinite(value)
    nothing = isinstance(value, str) and not value.strip() and str in kinds
    if (isinstance(value, bool) and bool not in kinds) or number or nothing:
        return Fault(path, f"got {_shown(value)}; wanted {wanted(field)}")
    return None


def _as_list(path: str, value: object) -> object:
    """A single entry as a list of one, where a list alone is wanted."""
    kinds = kinds_of(knobs()[path])
    wants_list = any(get_origin(kind) is tuple for kind in kinds) and str not in kinds
    return [value] if wants_list and not isinstance(value, list | tuple | None) else value


def _nested(values: Mapping[str, object]) -> dict[str, object]:
    tree: dict[str, object] = {}
    for path, value in values.items():
        *groups, last = path.split(".")
        level = tree
        for group in groups:
            level = level.setdefault(group, {})  # type: ignore[assignment]
        level[last] = value
    return tree


def _members(section: str) -> str:
    return ", ".join(sections()[section].model_fields)


def _shown(value: object) -> str:
    if isinstance(value, Words):
        value = " ".join(value)
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
