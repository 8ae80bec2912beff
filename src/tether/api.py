"""A run in one call: `tether.train(policy=…, reward=…, prompts=…, beta=…, steps=…)`, and what it gives back.

Everything that a recipe can say, a keyword can say: each knob by its name. Read next: `tasks.py`, `session.py`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.config import RunSettings
from tether.errors import ConfigError
from tether.export import export_run
from tether.knobs import read_settings
from tether.memory_plan import memory_errors_explained
from tether.models import LanguagePolicy
from tether.recipe_files import parse_recipe
from tether.resume import open_trained
from tether.runtime.processes import require_processes
from tether.runtime.ranks import joined
from tether.session import prepare_process, train_run
from tether.store import RunStore, free_name
from tether.tasks import Brought, open_task, require_complete
from tether.terminal import console_for_output
from tether.trackers import our_name, wanted


@dataclass(frozen=True)
class TrainedRun:
    """A finished run: its folder, its policy, its numbers."""

    folder: Path
    settings: RunSettings
    brought: Brought = field(default_factory=Brought)

    @cached_property
    def policy(self) -> LanguagePolicy:
        """The policy as training left it, with its value head and its frozen reference."""
        return open_trained(self.folder, model=self.brought.model, tokenizer=self.brought.tokenizer).policy

    def save_pretrained(self, folder: str | Path, *, merged: bool = False) -> Path:
        """Write the policy as an ordinary Hugging Face folder, tokenizer, value head and model card beside it.

        Mode `lora` writes its adapters, or with `merged` the whole model. Raises RunError where the folder exists.
        """
        model, tokenizer = self.brought.model, self.brought.tokenizer
        return export_run(self.folder, Path(folder), merged=merged, model=model, tokenizer=tokenizer)

    def metrics(self, name: str) -> NDArray[np.float64]:
        """One number of every update, as `kl/mean` (TRL's name, `objective/kl`, is known too).

        Raises InputError where no number is called so.
        """
        with RunStore.open(self.folder) as store:
            return store.curve(our_name(name)).values


def train(
    policy: str | Path | PreTrainedModel | None = None,
    reward: object | None = None,
    prompts: object | None = None,
    *,
    beta: float | None = None,
    steps: int | None = None,
    recipe: str | Path | Mapping[str, object] | RunSettings | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    heldout: object | None = None,
    judge: object | None = None,
    holdout: object | None = None,
    name: str | None = None,
    root: str | Path = "runs",
    report_to: Sequence[object] | str = (),
    quiet: bool = False,
    **knobs: object,
) -> TrainedRun:
    """Train a policy by PPO against a reward, on the string of a KL penalty to the checkpoint that it starts from.

    policy     folder or hub name of the SFT checkpoint, or a model, which is copied (then pass `tokenizer`)
    reward     function (prompts, responses, **columns) → one number a response; a classifier, a path, an address
    prompts    texts or conversations, rows, a `datasets.Dataset`, or a file; further columns reach the reward
    beta       the string: price of one nat of KL in units of the score (default 0.05)
    steps      updates (default 100)
    recipe     YAML file, recipe by name, or settings to start from; what is passed beside it wins
    heldout    prompts of the evaluation; by default a tenth of `prompts` is held out
    judge      a reward that says who is better and is never climbed; holdout: a second one that is watched
    report_to  trackers beside the run's own store: names, or `accelerate.tracking.GeneralTracker` objects
    knobs      any other knob by name: `batch_size=16`, `max_new_tokens=64`, `mode="full"`, `cliprange=0.1`

    Returns the run: `.save_pretrained(folder)`, `.policy`, `.metrics(name)`, `.folder`. Raises ConfigError with all
    faults of the knobs together, InputError, ModelError, RewardError or RunError where something cannot be used.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    brought = Brought(
        model=policy if isinstance(policy, PreTrainedModel) else None, tokenizer=tokenizer, reward=_object(reward),
        prompts=_object(prompts), heldout=_object(heldout), judge=_object(judge), holdout=_object(holdout),
        trackers=tuple(tracker for tracker in names if not isinstance(tracker, str)),
    )  # fmt: skip
    said = {"beta": beta, "steps": steps, "policy": None if brought.model else policy and str(policy)}
    overrides = [(key, value) for key, value in said.items() if value is not None] + list(knobs.items())
    overrides += _named(
        {"prompts": prompts, "heldout": heldout}, {"reward": reward, "judge": judge, "holdout": holdout}
    )
    if len(names) > len(brought.trackers):
        overrides.append(("report_to", [name for name in names if isinstance(name, str)]))
    settings, notes = read_settings(_tree(recipe), overrides, "tether.train")
    require_complete(settings, brought)
    console = Console(quiet=True) if quiet else console_for_output()
    for note in notes:
        console.print(note, soft_wrap=True)
    chosen = free_name(Path(root), name or time.strftime("run-%Y%m%d-%H%M%S"))
    return carry_out(settings, Path(root), chosen, console, brought)


def carry_out(
    settings: RunSettings,
    root: Path,
    name: str,
    console: Console,
    brought: Brought | None = None,
) -> TrainedRun:
    """Open what the settings name, train, and leave everything in `root/name`."""
    prepare_process()
    brought = brought or Brought()
    with joined() as ranks, memory_errors_explained(settings):
        wanted([*settings.report_to, *brought.trackers])  # complains before anything is loaded
        require_processes(settings, ranks)
        console, name = console if ranks.is_first else Console(quiet=True), ranks.same(name)
        task = ranks.together(lambda: open_task(settings, console, brought), first_ahead=True)
        folder = ranks.same(train_run(task, settings, root, name, console))
    return TrainedRun(folder, settings, brought)


def _object(given: object | None) -> object | None:
    """What only Python can hand over; None where it is a name, which the run's settings keep."""
    return None if isinstance(given, str | Path) else given


def _named(data: Mapping[str, object], judges: Mapping[str, object]) -> list[tuple[str, object]]:
    """What was given by name, as knobs: the run can then be gone on with and evaluated by command."""
    found: list[tuple[str, object]] = [
        (f"data.{name}", str(given)) for name, given in data.items() if isinstance(given, str | Path)
    ]
    for name, given in judges.items():
        if isinstance(given, str | Path):
            found += [(f"{name}.source", str(given)), (f"{name}.parts", {}), (f"{name}.ensemble", ())]
    return found


def _tree(recipe: str | Path | Mapping[str, object] | RunSettings | None) -> object:
    if recipe is None:
        return {}
    if isinstance(recipe, RunSettings):
        return recipe.dump()
    if isinstance(recipe, Mapping):
        return recipe
    if isinstance(recipe, str | Path):
        return parse_recipe(recipe)
    raise ConfigError(f"recipe is {type(recipe).__name__}; wanted a YAML file, a recipe by name, settings or a mapping")
