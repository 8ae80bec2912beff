"""Flags of a command that takes every knob of a run: which are its own, which are knobs, and the help that lists both.

    ["run.yaml", "--name", "a", "--ppo.beta", "0.1"]  →  ["run.yaml", "--name", "a"],  [("ppo.beta", ("0.1",))]

Knows no torch. Read next: `cli.py`, `knobs.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from textwrap import wrap
from typing import get_origin

from tether.config import RunSettings
from tether.errors import ConfigError
from tether.knobs import Fault, Words, allowed, find_knob, kinds_of, knobs, sections, told

NUMBER = re.compile(r"-\.?\d")
"""A word that begins with a dash and is a number all the same."""
WIDTH = 100


def split_flags(
    arguments: Sequence[str], own: Collection[str], switches: Collection[str] = ()
) -> tuple[list[str], list[tuple[str, Words]]]:
    """What the command reads itself, and the knobs with the words behind each.

    `own` flags take one word, `switches` none. A knob takes one word, all that follow where it is a list, none where it
    is true or false and none follows. Raises ConfigError where a flag has no name.
    """
    mine: list[str] = []
    found: list[tuple[str, Words]] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            mine.append(word)
        elif not name:
            raise ConfigError(f"got {word!r}; wanted --KNOB VALUE, as --beta 0.1")
        elif name.replace("-", "_") in {*own, *switches, "help"}:
            mine.append(word)
            if name.replace("-", "_") in own and not equals and rest:
                mine.append(rest.pop(0))
        else:
            found.append((name, Words([value]) if equals else Words(_values(name, rest))))
    return mine, found


def _values(name: str, rest: list[str]) -> list[str]:
    """Take the words that belong to a knob from the front of `rest`."""
    ahead = next((place for place, word in enumerate(rest) if _is_flag(word)), len(rest))
    knob = find_knob(name)
    kinds = () if isinstance(knob, Fault) else kinds_of(knobs()[knob.path])
    is_list = any(get_origin(kind) is tuple for kind in kinds)
    boolean = bool in kinds and not (ahead and rest[0].lower() in ("true", "false"))
    count = ahead if is_list else 0 if boolean else min(ahead, 1)
    taken, rest[:] = rest[:count], rest[count:]
    return taken


def _is_flag(word: str) -> bool:
    return word.startswith("-") and not NUMBER.match(word) and word != "-"


def knobs_help(only: Collection[str] | None = None) -> str:
    """Every knob with its default, what is allowed, the usual range and who uses what, section by section.

    `only`: those whose path begins with one of these words.
    """
    chosen = [path for path in knobs() if only is None or path.split(".")[0] in only]
    path = "ppo.reward.beta" if only is None else "runtime.ray.address"
    lines = [f"knobs, each by any part of its path that leads to one, as --{path} or --{path.partition('.')[2]}"]
    for section in ["", *sections()]:
        own = [path for path in chosen if path.rpartition(".")[0] == section]
        if own:
            about = (sections()[section] if section else RunSettings).__doc__ or ""
            lines += ["", *wrap(f"{section or 'the run'}: {about.splitlines()[0]}", WIDTH)]
        for path in own:
            lines += _knob_lines(path)
    return "\n".join(lines)


def _knob_lines(path: str) -> list[str]:
    info = knobs()[path]
    facts = [
        f"default {_plain(info.default)}",
        allowed(info).replace("`", ""),
        (usual := told(info, "usual")) and f"usual {usual}",
        told(info, "used"),
    ]
    text = f"{info.description} [{' · '.join(fact for fact in facts if fact)}]"
    return [f"  --{path}", *(f"      {line}" for line in wrap(text, WIDTH - 6, break_on_hyphens=False))]


def _plain(default: object) -> str:
    if default is None or default in ((), {}):
        return "none"
    if isinstance(default, tuple):
        return " ".join(map(str, default))
    return str(default).lower() if isinstance(default, bool) else str(default)
