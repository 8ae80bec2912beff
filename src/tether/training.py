"""`tether train`: one run, of a recipe, of a world, or of your own model, reward and prompts.

Imports nothing heavy before the settings are found to be right, so that a misspelt knob is answered at once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from tether.alarms import check_fault
from tether.config import RunSettings
from tether.knobs import Named, Words, find_knob, read_settings
from tether.recipe_files import read_recipe
from tether.store import free_name

OWN = ("model.source", "data.prompts", "reward.")
"""Knobs that bring what a world has; a run with one of them starts from no recipe."""


@dataclass(frozen=True)
class Flags:
    """Flags of `tether train` beside the knobs."""

    recipe: Positional[str | None] = None
    """A YAML file, or a recipe by name; `tether recipes ls` shows these. By default that of --world, or smollm2."""
    name: str | None = None
    """Of the run's folder; by default recipe, β and time."""
    root: Path = Path("runs")
    """The folder that holds the run folders."""
    fault: str | None = None
    """Plant this failure on purpose, to see what the checks say of it: docs/checks.md lists them."""


def main(flags: Flags, overrides: Sequence[tuple[str, Words]]) -> int:
    """Train one policy by PPO; everything lands in ROOT/NAME."""
    settings, notes, recipe = choose(flags.recipe, overrides)
    fault = check_fault(flags.fault)
    name = free_name(flags.root, flags.name or generic_name(recipe, settings), numbered=not flags.name)
    from tether.api import carry_out
    from tether.faults import faulty_settings, planted
    from tether.runtime.processes import launch
    from tether.runtime.ranks import is_first, is_launched
    from tether.tasks import require_complete
    from tether.terminal import console_for_output

    require_complete(settings)
    if settings.runtime.processes > 1 and not is_launched():
        arguments = ["train", *sys.argv[2:]] if flags.name else ["train", *sys.argv[2:], "--name", name]
        return launch(settings.runtime.processes, arguments)
    if is_first():
        print(*notes, sep="\n", end="\n" * bool(notes), file=sys.stderr)
    console = console_for_output()
    with planted(fault):
        run = carry_out(faulty_settings(settings, fault), flags.root, name, console)
    if is_first():
        console.print(f"done: {run.folder}\nlook at it: tether show {run.folder}", soft_wrap=True)
    return 0


def choose(recipe: str | None, overrides: Sequence[tuple[str, object]]) -> tuple[RunSettings, list[str], str]:
    """The settings of a recipe and of the knobs beside it, notes on translated names, and what the run is called after.

    Raises ConfigError with all faults of both.
    """
    named = [(found.path, value) for name, value in overrides if isinstance(found := find_knob(name), Named)]
    worlds = [value for path, value in named if path == "world"]
    if recipe is None and not worlds and any(path.startswith(OWN) for path, _ in named):
        return *read_settings({}, overrides, "the command line"), "run"
    first = worlds[0] if worlds else "smollm2"
    chosen = recipe or (str(first[0]) if isinstance(first, tuple) and first else str(first))
    if recipe is None and chosen not in ("smollm2", "nano"):
        return *read_settings({}, overrides, "the command line"), "run"  # which says what worlds there are
    return *read_recipe(chosen, overrides), Path(chosen).stem


def generic_name(recipe: str, settings: RunSettings) -> str:
    """What a run is called where nobody says: its recipe, β and the time."""
    return f"{recipe}-beta{settings.ppo.reward.beta:g}-{time.strftime('%Y%m%d-%H%M%S')}"
