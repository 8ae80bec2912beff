"""Recipes: whole runs as YAML, those that come with the program and your own; `tether recipes ls` and `cp`.

    read_recipe("nano" | "run.yaml", overrides) → RunSettings, and notes on names that were translated

Knows no torch. Read next: `knobs.py`, which checks what a recipe says.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

import yaml

from tether.config import RunSettings
from tether.errors import ConfigError
from tether.knobs import read_settings


def shipped() -> dict[str, str]:
    """The recipes that come with the program: name → text, in order."""
    folder = files("tether").joinpath("recipes")
    found = {entry.name.removesuffix(".yaml"): entry for entry in folder.iterdir() if entry.name.endswith(".yaml")}
    return {name: found[name].read_text("utf-8") for name in sorted(found)}


def load_recipe(name: str | Path) -> RunSettings:
    """The settings of a recipe by name, or of a YAML file. Raises ConfigError with all faults at once."""
    return read_recipe(name)[0]


def read_recipe(name: str | Path, overrides: Sequence[tuple[str, object]] = ()) -> tuple[RunSettings, list[str]]:
    """The settings of a recipe, with these knobs in place of its own; and notes on names that were translated.

    Raises ConfigError where there is no such recipe, the file cannot be read or is no YAML, or a knob is wrong: all
    faults of file and overrides together.
    """
    return read_settings(parse_recipe(name), overrides, str(name))


def parse_recipe(name: str | Path) -> object:
    """What the YAML holds, unchecked; an empty file is no knob at all."""
    text = shipped().get(str(name))
    if text is None:
        text = _read(Path(name))
    try:
        given = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is no YAML: {' '.join(str(error).split())}") from error
    return {} if given is None else given


def _read(path: Path) -> str:
    if not path.exists():
        near = get_close_matches(str(path), shipped(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"there is no recipe {str(path)!r} and no such file; recipes: {', '.join(shipped())}{hint}")
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise ConfigError(f"{path} cannot be read: {reason}; wanted a YAML file") from error


# ── commands ────────────────────────────────────────────────────────────────────────────────────────────────────────
def main_list(json: bool = False) -> None:
    """List the recipes that come with the program.

    json: one object, name → its first comment.
    """
    about = {name: text.partition("\n")[0].lstrip("# ") for name, text in shipped().items()}
    if json:
        import json as jsonlib

        print(jsonlib.dumps(about))
        return
    width = max(map(len, about))
    print("\n".join(f"{name:<{width}}  {line}" for name, line in about.items()))
    print("\nto run one: tether train NAME        to change one: tether recipes cp NAME run.yaml")


def main_copy(name: str, file: Path | None = None, /) -> None:
    """Copy a recipe into a file of your own, comments included.

    name: as `tether recipes ls` shows it. file: by default NAME.yaml here; a file that is there is left alone.
    """
    if name not in shipped():
        near = get_close_matches(name, shipped(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"there is no recipe {name!r}; recipes: {', '.join(shipped())}{hint}")
    target = file or Path(f"{name}.yaml")
    if target.exists():
        raise ConfigError(f"{target} exists; choose another file, or delete it")
    try:
        target.write_text(shipped()[name], "utf-8")
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror}; choose another file") from error
    print(f"wrote {target}; run it: tether train {target}")
