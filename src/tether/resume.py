"""`tether resume` and `tether fork`: go on with a run, or start another one where it stood.

What a run is about is opened again by its settings (`tasks.py`); `open_trained` gives the policy of a run as it stood
at one of its checkpoints. Knows no training: that is `session.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from tyro.conf import Positional

from tether.checkpoint import Checkpoint, Checkpoints
from tether.config import RunSettings
from tether.errors import ModelError, RunError
from tether.identity import FREE, of_tensors, of_tokenizer, recorded_settings, require_same_digests
from tether.knobs import Words
from tether.loading import Source, require_there
from tether.models import LanguagePolicy
from tether.recipe_files import load_recipe, read_recipe
from tether.resuming import fork_run, resume_run
from tether.runs import ROOT, find_run
from tether.runtime.processes import launch, require_processes
from tether.runtime.ranks import is_first, is_launched, joined
from tether.session import prepare_process
from tether.snapshot import load_weights
from tether.store import CHECKPOINTS, CONFIG_FILE, RunStore, check_name
from tether.task import open_policy
from tether.tasks import open_task
from tether.terminal import console_for_output
from tether.worlds.world import open_world

TRIES = 3
"""At the last checkpoint of a run that is being trained, which may be gone by the time that it is read."""


KNOBS = FREE
"""Sections of the knobs that a run may go on with otherwise."""


@dataclass(frozen=True)
class Flags:
    """Flags of `tether resume` beside the knobs."""

    run: Positional[str]
    """The run's name below `root`, or the path of its folder."""
    root: Path = ROOT
    """The folder that holds the run folders."""
    num_processes: int | None = None
    """Processes that share it from here on; by default as many as before."""
    model: str | None = None
    """The SFT checkpoint, where it no longer lies where the run found it."""
    prompts: str | None = None
    """The training prompts, where they lie elsewhere by now."""
    reward: str | None = None
    """The reward, where it lies elsewhere by now."""

    def changes(self) -> list[tuple[str, object]]:
        """Knobs that say where something lies by now, with its place."""
        places = {"model.source": self.model, "data.prompts": self.prompts, "reward.source": self.reward}
        return [(name, place) for name, place in places.items() if place is not None]

    def words(self) -> list[str]:
        """As a command line, for another process; without `num_processes`, as the folder's path."""
        given = {"model": self.model, "prompts": self.prompts, "reward": self.reward}
        flags = [word for name, value in given.items() if value is not None for word in (f"--{name}", value)]
        return ["resume", str(find_run(self.run, self.root)), *flags]


def main(flags: Flags, overrides: Sequence[tuple[str, Words]] = ()) -> int:
    """Go on with a run that was stopped or killed, as if it never had been; with other workers where knobs say so."""
    prepare_process()
    console = console_for_output()
    found = find_run(flags.run, flags.root)
    settings, notes = read_recipe(str(found / CONFIG_FILE), [*flags.changes(), *overrides])
    processes = settings.runtime.processes if flags.num_processes is None else flags.num_processes
    if processes > 1 and not is_launched():
        knobs = [word for name, words in overrides for word in (f"--{name}", *words)]
        return launch(processes, [*flags.words(), "--num-processes", str(processes), *knobs])
    settings = settings.with_processes(processes)
    if is_first():
        print(*notes, sep="\n", end="\n" * bool(notes), file=sys.stderr)
    if settings.model.source is not None:
        require_source(found, settings.model.source)
    with joined() as ranks:
        console = console if ranks.is_first else Console(quiet=True)
        require_processes(settings, ranks)
        folder = resume_run(found, lambda settings: open_task(settings, console), console, settings, moved=True)
    if is_first():
        console.print(f"done: {folder}\nlook at it: tether show {folder}", soft_wrap=True)
    return 0


def main_fork(
    run: str,
    /,
    name: str,
    beta: float | None = None,
    steps: int | None = None,
    seed: int | None = None,
    root: Path = ROOT,
    train: bool = True,
) -> None:
    """Start another run, beside this one, from one of its checkpoints.

    Args:
        run: RUN or RUN@STEP: name or path of the run, and the update to start from; by default its last checkpoint.
        name: The new run's name.
        beta: Its string; β's controller then starts anew.
        steps: Its number of updates, those before the fork included.
        seed: Of its random streams.
        root: The folder that holds the run folders.
        train: Train it at once; `--no-train` makes the folder only.
    """
    prepare_process()
    console = console_for_output()
    parent, step = find_point(run, root)
    settings = load_recipe(str(parent / CONFIG_FILE))
    settings = settings.with_beta(beta) if beta is not None else settings
    settings = settings.with_steps(steps) if steps is not None else settings
    settings = settings.with_seed(seed) if seed is not None else settings
    folder = fork_run(parent, step, parent.parent, check_name(name), settings)
    console.print(f"{folder}: starts where {run} stands; train it with: tether resume {folder}", soft_wrap=True)
    if train:
        resume_run(folder, lambda settings: open_task(settings, console), console)


def find_point(run: str, root: Path) -> tuple[Path, int | None]:
    """The folder and the step of RUN@STEP; the step is None where only RUN is given. Raises RunError."""
    name, at, step = run.rpartition("@")
    if not at:
        return find_run(run, root), None
    if not step.isdecimal():
        raise RunError(f"got {run!r}; wanted RUN@STEP with a whole number, as {name}@25")
    return find_run(name, root), int(step)


@dataclass(frozen=True)
class Trained:
    """The policy of a run as it stood at a checkpoint."""

    policy: LanguagePolicy
    settings: RunSettings
    source: Source
    """What it started from, which is its reference."""
    checkpoint: Checkpoint

    def reference(self) -> LanguagePolicy:
        """A policy of its own that stands where this one started."""
        return open_policy(self.source, self.settings, self.policy.tokenizer)


def open_trained(
    folder: Path,
    step: int | None = None,
    model: Source | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Trained:
    """The policy of a run at this step, by default at its last whole checkpoint.

    `model`: the SFT checkpoint, where it no longer lies where the run found it; an object wants its `tokenizer` too.
    Raises RunError where there is no such checkpoint or the model is another one, ModelError where it cannot be read.
    """
    found, weights = _read_weights(folder, step)
    settings = recorded_settings(found.identity.settings)
    source = require_source(folder, _source(folder, settings)) if model is None else model
    policy = open_policy(source, settings, tokenizer)
    digests = {"reference": of_tensors(policy.mode.reference()), "tokenizer": of_tokenizer(policy.tokenizer)}
    require_same_digests(found.identity.digests, digests, "Give the SFT checkpoint that the run started from: --model")
    load_weights(policy, weights)
    return Trained(policy, settings, source, found)


def _read_weights(folder: Path, step: int | None) -> tuple[Checkpoint, dict[str, Tensor]]:
    """The checkpoint with its weights, read at once: a run that is being trained removes it before long."""
    checkpoints = Checkpoints(folder / CHECKPOINTS)
    for left in reversed(range(TRIES)):
        found = checkpoints.newest(print) if step is None else checkpoints.read(step)
        if found is None:
            raise RunError(f"{folder} holds no whole checkpoint; train it, or go on with it: tether resume {folder}")
        try:
            return found, found.weights()
        except RunError:
            if not left or step is not None:
                raise
    raise AssertionError("the last try returns or raises")


def require_source(folder: Path, source: Source) -> Source:
    """The checkpoint that a run started from, if it is there. Raises ModelError that names the flag, if it is not."""
    try:
        if isinstance(source, str | Path):
            require_there(source)
    except ModelError as error:
        raise ModelError(
            f"{folder} started from {str(source)!r}, which is not there: say where it lies by now with --model FOLDER "
            f"({error})"
        ) from error
    return source


def _source(folder: Path, settings: RunSettings) -> Source:
    with RunStore.open(folder) as store:
        noted = store.meta().get("source")
    if isinstance(noted, str):
        return noted
    if settings.model.source is not None:
        return settings.model.source
    if settings.world is None:
        raise RunError(f"{folder} does not say which model it started from, which came from Python; pass --model")
    return open_world(settings.world).model
