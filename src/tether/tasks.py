"""From the settings of a run to its task: model, prompts and judges, of a world or of your own.

    open_task(settings, console, brought) → Task

Whatever is given takes the place of the world's: a run may have a world's model and prompts with a reward function of
its own. What a caller of `tether.train` hands over as objects is `Brought`; it takes the place of what settings name.
Read next: `session.py`, which trains a task.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.batch import Prompt, Reward
from tether.config import DataSettings, JudgeSettings, RunSettings
from tether.data import read_prompts
from tether.errors import ConfigError, InputError
from tether.loading import require_there
from tether.open_reward import as_reward, open_reward
from tether.prompts import PromptSet
from tether.sft_checkpoint import NANO_MANIFEST, is_sft, require_sft
from tether.streams import permutation
from tether.task import Judges, Task
from tether.world_judges import open_judges
from tether.worlds.world import World, open_world


@dataclass(frozen=True)
class Brought:
    """Objects in place of what settings can only name; None where the settings say it."""

    model: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    prompts: object | None = None
    """Texts, conversations, rows, a `datasets.Dataset`, or any file that `data.py` reads."""
    heldout: object | None = None
    reward: object | None = None
    holdout: object | None = None
    judge: object | None = None
    trackers: tuple[object, ...] = ()


@dataclass(frozen=True)
class _Opening:
    """One task on its way."""

    settings: RunSettings
    console: Console
    brought: Brought
    world: World | None
    notes: list[str] = field(default_factory=list)

    def model(self) -> Path | str | PreTrainedModel:
        if self.brought.model is not None:
            return self.brought.model
        if self.settings.model.source is None:
            assert self.world is not None
            return self.world.model
        require_there(self.settings.model.source)
        self._look_for_base(self.settings.model.source)
        return self.settings.model.source

    def _look_for_base(self, source: str) -> None:
        """Refuse what is known to be a base model; say of what may be one that it may be."""
        if self.settings.model.allow_base or is_sft(source):
            return
        if (Path(source).resolve().parent / NANO_MANIFEST).is_file():
            require_sft(source)
        self.console.print(
            f"{source} has no chat template and no manifest of `tether sft`: prompts are taken as plain text. If it "
            "was never fine-tuned, the string is tied to the wrong post; model.allow_base: true says that it is meant",
            soft_wrap=True,
        )

    def prompts(self) -> tuple[PromptSet, PromptSet]:
        """Those to train on and those held out."""
        data, given = self.settings.data, self.brought.prompts
        if given is None and data.prompts is None:
            assert self.world is not None
            train, heldout = PromptSet(self.world.train_prompts), PromptSet(self.world.heldout_prompts)
        else:
            train = _read(data.prompts if given is None else given, data)
            heldout = None
        asked = data.heldout if self.brought.heldout is None else self.brought.heldout
        if asked is not None:
            return train, _read(asked, data)
        if heldout is not None:
            return train, heldout
        if len(distinct(train)) == 1:
            self.console.print("one prompt alone: it is trained on and evaluated on, so nothing is held out")
            return train, train
        return hold_out(train, data.heldout_share, self.settings.ppo.seed)

    def judges(self) -> Judges:
        """The reward, and what is watched beside it: the world's own where it is the world that is asked about."""
        settings, brought = self.settings, self.brought
        reward = _judge(settings.reward, brought.reward)
        unseen = {"holdout": _judge(settings.holdout, brought.holdout), "gold": _judge(settings.judge, brought.judge)}
        own_prompts = brought.prompts is not None or settings.data.prompts is not None
        if reward is None:
            assert self.world is not None
            worlds = open_judges(self.world, settings, self.console)
            reward, known = worlds.reward, {} if own_prompts else dict(worlds.unseen)
        else:
            known = {} if self.world is None or own_prompts else {"gold": self.world.gold}
        given = {name: judge for name, judge in unseen.items() if judge is not None}
        return Judges(reward, known | given)


def open_task(settings: RunSettings, console: Console, brought: Brought | None = None) -> Task:
    """What a run is about: everything is read and checked here, before anything trains.

    Raises ConfigError where model, prompts or reward is missing, naming all that are; and what reading them raises.
    """
    brought = brought or Brought()
    require_complete(settings, brought)
    world = open_world(settings.world) if settings.world is not None else None
    opening = _Opening(settings, console, brought, world)
    train, heldout = opening.prompts()
    model = opening.model()
    return Task(model, train, heldout, opening.judges(), brought.tokenizer, brought.trackers)


def require_complete(settings: RunSettings, brought: Brought | None = None) -> None:
    """Raise ConfigError, naming all that is missing, unless there is a model, a reward and prompts, or a world."""
    brought = brought or Brought()
    if settings.world is not None:
        return
    missing = [
        (settings.model.source is None and brought.model is None, "model.source", "a folder or hub name"),
        (settings.data.prompts is None and brought.prompts is None, "data.prompts", "a file, a hub data set or a list"),
        (not settings.reward.is_given and brought.reward is None, "reward.source", "a classifier, function or address"),
    ]
    lacking = [f"{path} ({what})" for lacks, path, what in missing if lacks]
    if lacking:
        raise ConfigError(f"the run has no {', no '.join(lacking)}; give them, or a world that has all: --world nano")


def hold_out(given: PromptSet, share: float, seed: int) -> tuple[PromptSet, PromptSet]:
    """A share of the prompts for the evaluation, chosen by the seed, and the rest. A prompt that stands several times
    stands on one side only.
    """
    places = distinct(given)
    count = min(max(1, round(share * len(places))), len(places) - 1)
    order: list[int] = permutation(seed, "heldout", len(places)).tolist()
    groups = list(places.values())
    held = sorted(place for group in order[:count] for place in groups[group])
    kept = sorted(place for group in order[count:] for place in groups[group])
    return given.take(kept), given.take(held)


def distinct(given: PromptSet) -> dict[str, list[int]]:
    """Where each prompt stands, by its text."""
    places: dict[str, list[int]] = {}
    for place, prompt in enumerate(given.prompts):
        places.setdefault(_text(prompt), []).append(place)
    return places


def _text(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else json.dumps([dict(message) for message in prompt], sort_keys=True)


def _read(source: object, data: DataSettings) -> PromptSet:
    if not isinstance(source, str | Path | Iterable):
        raise InputError(f"got {source!r:.80} as prompts; wanted a list of texts, rows, a data set or a file")
    return read_prompts(
        list(source) if isinstance(source, tuple) else source,
        split=data.split, subset=data.subset, prompt_column=data.prompt_column, limit=data.limit,
    )  # fmt: skip


def _judge(settings: JudgeSettings, given: object | None) -> Reward | None:
    """The object handed over, or what the settings name; None where there is neither."""
    if given is not None:
        return as_reward(given, timeout_seconds=settings.timeout_seconds)
    if settings.spec is None:
        return None
    for source in settings.classifiers:
        require_there(source)
    return open_reward(settings.spec)
