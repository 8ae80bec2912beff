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
    report_to: Sequence[object] | str | None = (),
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
    given = _Given(policy, reward, prompts, tokenizer, heldout, judge, holdout, report_to)
    settings, notes = read_settings(_tree(recipe), given.overrides(beta, steps, knobs), "tether.train")
    return _begin(settings, notes, given.brought, name, Path(root), quiet)


def _begin(
    settings: RunSettings, notes: Sequence[str], brought: Brought, name: str | None, root: Path, quiet: bool
) -> TrainedRun:
    require_complete(settings, brought)
    console = Console(quiet=True) if quiet else console_for_output()
    for note in notes:
        console.print(note, soft_wrap=True)
    chosen = free_name(root, name or time.strftime("run-%Y%m%d-%H%M%S"), numbered=not name)
    return carry_out(settings, root, chosen, console, brought)


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


@dataclass(frozen=True)
class _Given:
    """What `train` was given as an object, which only Python can hand over, or by name, which the settings keep."""

    policy: str | Path | PreTrainedModel | None
    reward: object | None
    prompts: object | None
    tokenizer: PreTrainedTokenizerBase | None
    heldout: object | None
    judge: object | None
    holdout: object | None
    report_to: Sequence[object] | str | None

    def __post_init__(self) -> None:
        if self.policy is not None and not isinstance(self.policy, str | Path | PreTrainedModel):
            raise ConfigError(
                f"policy is {type(self.policy).__name__}; wanted a folder, a name on the hub or a PreTrainedModel of "
                "transformers; one with PEFT adapters: policy=model.merge_and_unload()"
            )
        if isinstance(self.tokenizer, str | Path):
            raise ConfigError(
                f"tokenizer is {str(self.tokenizer)!r}; wanted the tokenizer itself: "
                f"tokenizer=AutoTokenizer.from_pretrained({str(self.tokenizer)!r})"
            )

    @property
    def brought(self) -> Brought:
        """The objects."""
        return Brought(
            model=self.policy if isinstance(self.policy, PreTrainedModel) else None, tokenizer=self.tokenizer,
            reward=_object(self.reward), prompts=_object(self.prompts), heldout=_object(self.heldout),
            judge=_object(self.judge), holdout=_object(self.holdout),
            trackers=tuple(tracker for tracker in self._trackers if not isinstance(tracker, str)),
        )  # fmt: skip

    def overrides(self, beta: float | None, steps: int | None, knobs: Mapping[str, object]) -> list[tuple[str, object]]:
        """The names as knobs beside the others: the run can then be gone on with and evaluated by command."""
        policy = None if self.policy is None or isinstance(self.policy, PreTrainedModel) else str(self.policy)
        said = {"beta": beta, "steps": steps, "policy": policy}
        found: list[tuple[str, object]] = [(key, value) for key, value in said.items() if value is not None]
        found += knobs.items()
        for name, data in (("prompts", self.prompts), ("heldout", self.heldout)):
            if isinstance(data, str | Path):
                found.append((f"data.{name}", str(data)))
        for name, judge in (("reward", self.reward), ("judge", self.judge), ("holdout", self.holdout)):
            if isinstance(judge, str | Path):
                found += [(f"{name}.source", str(judge)), (f"{name}.parts", {}), (f"{name}.ensemble", ())]
        names = [tracker for tracker in self._trackers if isinstance(tracker, str)]
        return [*found, ("report_to", names)] if names else found

    @property
    def _trackers(self) -> list[object]:
        return [self.report_to] if isinstance(self.report_to, str) else list(self.report_to or ())


def _object(given: object | None) -> object | None:
    """What is no name."""
    return None if isinstance(given, str | Path) else given


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
