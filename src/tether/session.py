"""From a recipe to a finished run folder: world, judges, policy, training, evaluation.

`train_run` trains one policy and leaves everything in `root/name`; `resume_run` goes on with such a folder as if the
run had never stopped; `fork_run` makes a new one that starts from a checkpoint of another. The jobs above (`demo.py`,
`sweep.py`, `training.py`, `resume.py`) are made of these.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from tether import __version__
from tether.batch import Reward
from tether.checkpoint import Checkpoint, Checkpoints, Identity, plain, restore_states
from tether.config import RunSettings
from tether.errors import ConfigError, RunError
from tether.evaluation import Judged, evaluate, summarise
from tether.identity import (
    differences,
    identify,
    made_by,
    recorded_settings,
    require_same_digests,
    require_same_settings,
)
from tether.loading import Source, layer_count
from tether.models import LanguagePolicy, load_policy
from tether.prompts import PromptSet, PromptSource, fit
from tether.recipe_files import load_recipe
from tether.recomputation import recompute_layers
from tether.recording import Keeper, Saver, Screen, probes
from tether.records import Status
from tether.rewards import controller
from tether.runtime.interrupt import Interrupt
from tether.runtime.memory import keep_freed_memory
from tether.store import CHECKPOINTS, CONFIG_FILE, RunStore
from tether.trackers import Trackers
from tether.trainer import Run, train
from tether.worlds.real import cache_folder
from tether.worlds.world import World

EVALUATED_AT_ONCE = 64
TOP_LAYERS = 6
"""Layers that mode `top` trains where the settings do not say."""
STOPPING = "stopping after this update, with a checkpoint; once more leaves at once"


@dataclass(frozen=True)
class Judges:
    """The reward that is optimised, and those that are not."""

    reward: Reward
    unseen: Mapping[str, Reward] = field(default_factory=dict)
    """Those that the policy never climbs, by the name that their metrics carry: `holdout`, `gold`."""

    @property
    def all(self) -> Mapping[str, Reward]:
        """Every judge by the name that its metrics carry."""
        return {"score": self.reward, **self.unseen}


@dataclass(frozen=True)
class Task:
    """What a run is about, whether a world's own or brought by the user: from what, on what, against what."""

    model: Source
    """The SFT checkpoint: the policy's start and the reference."""
    train: PromptSet
    heldout: PromptSet
    judges: Judges
    tokenizer: PreTrainedTokenizerBase | None = None
    """Where the model is an object; else it is the checkpoint's own."""
    trackers: tuple[object, ...] = ()
    """Trackers as objects, beside those that the settings name."""

    @staticmethod
    def of_world(world: World, settings: RunSettings, judges: Judges) -> Task:
        """The world's model, or the one that the settings name, on the world's prompts."""
        train, heldout = PromptSet(world.train_prompts), PromptSet(world.heldout_prompts)
        return Task(settings.model.source or world.model, train, heldout, judges)


def prepare_process() -> None:
    """What a program that trains wants of its process: freed memory kept, and no bars but its own."""
    keep_freed_memory()
    transformers_logging.disable_progress_bar()


def open_policy(
    source: Source, settings: RunSettings, tokenizer: PreTrainedTokenizerBase | None = None
) -> LanguagePolicy:
    """The policy at its start, with its frozen reference."""
    model = settings.model
    policy = load_policy(
        source,
        tokenizer,
        mode=model.mode,
        top_layers=model.top_layers or min(TOP_LAYERS, layer_count(source)),
        lora_rank=model.lora_rank,
        dtype=model.dtype,
    )
    if model.gradient_checkpointing:
        recompute_layers(policy.mode.model)
    return policy


def source_of(
    given: PromptSet, policy: LanguagePolicy, settings: RunSettings, per_batch: int, copies: int = 1
) -> PromptSource:
    """These prompts, tokenised for the policy; those that are too long by the settings' rule."""
    room = policy.context - settings.ppo.sampling.max_new_tokens
    if room < 1:
        raise ConfigError(
            f"ppo.sampling.max_new_tokens is {settings.ppo.sampling.max_new_tokens} and the model's context "
            f"{policy.context} tokens, which leaves no room for a prompt; try {policy.context // 2}"
        )
    fitted = fit(given, policy.tokenizer, max_tokens=room, too_long=settings.data.too_long)
    kept = fitted.prompts
    return PromptSource(
        kept.prompts, fitted.ids, per_batch, copies, settings.ppo.seed, policy.pad, kept.columns, fitted.note
    )


def heldout_source(heldout: PromptSet, policy: LanguagePolicy, settings: RunSettings) -> PromptSource:
    """The held-out prompts of the evaluation, in batches that cover each once."""
    count = min(settings.evaluation.prompts, len(heldout))
    per_batch = min(count, EVALUATED_AT_ONCE)
    return source_of(heldout.first(count - count % per_batch), policy, settings, per_batch)


def judges_folder(world: World, settings: RunSettings) -> Path:
    """Where the two reward models of these settings are kept: equal settings and seeds share them."""
    recipe = {
        "version": __version__,
        "world": world.name,
        "model": settings.model.source or world.model.name,
        "preferences": settings.preferences.model_dump(),
        "sampling": settings.ppo.sampling.model_dump(),
        "seed": settings.ppo.seed,
    }
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    return cache_folder() / "rewards" / f"{world.name}-{digest}"


@dataclass
class Session:
    """One training run with its evaluations, from the first sample, or a checkpoint, to the finished folder."""

    task: Task
    settings: RunSettings
    policy: LanguagePolicy
    """As it starts: at the reference."""
    store: RunStore
    console: Console
    start: Checkpoint | None = None
    """Where it goes on from."""
    reference: Judged | None = None
    """The evaluation before the first update, which is of the reference."""

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.store.path / CHECKPOINTS, self.settings.checkpoint)

    def train(self) -> None:
        """All updates, with an evaluation before the first, every n, and after the last; Ctrl-C saves and stops."""
        knobs, judges = self.settings.ppo, self.task.judges
        prompts = source_of(
            self.task.train, self.policy, self.settings,
            knobs.batch_size // knobs.sampling.samples_per_prompt, knobs.sampling.samples_per_prompt,
        )  # fmt: skip
        heldout = heldout_source(self.task.heldout, self.policy, self.settings)
        identity = self._identify(prompts)
        title = f"{self.store.name} · β = {knobs.reward.beta:g}"
        start = 0 if self.start is None else self.start.step
        with Interrupt(STOPPING) as interrupt, Screen(self.console, knobs.steps, title, start) as screen:
            keeper = Keeper(self.store, screen, judges.unseen, self.settings.keep_samples)
            run = Run(self.policy, judges.reward, prompts, knobs, keeper, keeper.watch.before)
            watch = getattr(keeper, "watch", None)
            self._take_up(run, heldout, watch)
            saver = Saver(run, self.checkpoints, identity, self.store, watch)
            train(run, self._between(saver, heldout, interrupt))

    def _identify(self, prompts: PromptSource) -> Identity:
        """What this run is. Raises RunError where its folder says that it is another."""
        identity = identify(self.settings, self.policy, self.task.judges.reward, prompts.ids)
        recorded = dict(self.start.identity.digests) if self.start is not None else {}
        known = self.store.meta().get("digests")
        recorded |= known if isinstance(known, dict) else {}
        require_same_digests(recorded, identity.digests, _elsewhere(self.store.path))
        self.store.put("digests", dict(identity.digests))
        return identity

    def _take_up(self, run: Run, heldout: PromptSource, watch: object) -> None:
        """Go on from the checkpoint; what `run.db` holds of later updates is dropped, to be made again."""
        if self.start is not None:
            if self.start.step:
                self.reference = self._judge(heldout)  # the weights are still the reference's own
            run.restore(self.start.snapshot())
            restore_states(self.start.states, watch=watch)
            self.checkpoints.point_at(run.step)
        self.store.truncate_after(run.step - 1)

    def _between(self, saver: Saver, heldout: PromptSource, interrupt: Interrupt) -> Callable[[int], None]:
        def between(step: int) -> None:
            if saver.is_due() or interrupt.wanted:
                saver.save()
            if interrupt.wanted:
                raise KeyboardInterrupt
            self._evaluate(step, heldout)

        return between

    def _judge(self, heldout: PromptSource) -> Judged:
        knobs = self.settings.ppo
        return evaluate(self.policy, heldout, self.task.judges.all, knobs.sampling, knobs.seed)

    def _evaluate(self, step: int, heldout: PromptSource) -> None:
        if step % self.settings.evaluation.every and step != self.settings.ppo.steps:
            return
        self.store.heartbeat(step, "evaluating")
        judged = self._judge(heldout)
        self.reference = self.reference or judged
        with self.store.update(step) as entry:
            entry.metrics(summarise(judged, self.reference))
            for probe in probes(judged, step, self.settings.ppo.reward.beta):
                entry.sample(probe)


def train_run(
    task: Task, settings: RunSettings, root: Path, name: str, console: Console, *, way_on: str | None = None
) -> Path:
    """Train one policy; returns its run folder. A run that ends early stays readable, says how it ended, and goes on
    with `resume_run`.

    `way_on`: what to tell the user then; by default the command `tether resume FOLDER`.

    Raises RunError where the folder exists or cannot be written, and whatever training raises.
    """
    policy = open_policy(task.model, settings, task.tokenizer)
    with RunStore.create(root, name, settings.dump()) as store:
        store.put("sigma", 1.0)
        store.put("source", None if isinstance(task.model, PreTrainedModel) else str(task.model))
        return _see_through(Session(task, settings, policy, store, console), way_on)


def resume_run(
    folder: Path,
    open_task: Callable[[RunSettings], Task],
    console: Console,
    settings: RunSettings | None = None,
    *,
    way_on: str | None = None,
) -> Path:
    """Go on with a run from its last whole checkpoint, as if it had never stopped; returns its folder.

    `open_task` gives what the run was about. `settings`: by default those in the folder; they must be those that the
    run was started with, up to what is looked at and kept. Rows of `run.db` after the checkpoint are made again. A run
    without a checkpoint starts again from update 0; a finished one stays as it is.

    Raises RunError where the folder is no run, another process writes it, or settings, reference, tokenizer, reward or
    prompts are not what the run was started with, and whatever training raises.
    """
    with RunStore.open(folder, readonly=False) as store:
        chosen = load_recipe(str(folder / CONFIG_FILE)) if settings is None else settings
        checkpoints = Checkpoints(folder / CHECKPOINTS, chosen.checkpoint)
        start = checkpoints.newest(lambda text: console.print(text, soft_wrap=True), _rows(store))
        recorded = store.meta()["config"] if start is None else start.identity.settings
        require_same_settings(recorded, chosen, _elsewhere(folder))
        if _is_finished(store, chosen):
            console.print(f"{folder} is finished: {chosen.ppo.steps} updates", soft_wrap=True)
            return folder
        _tell_start(store, start, console)
        store.put("config", chosen.dump())
        task = open_task(chosen)
        policy = open_policy(task.model, chosen, task.tokenizer)
        return _see_through(Session(task, chosen, policy, store, console, start), way_on)


def fork_run(parent: Path, step: int | None, root: Path, name: str, settings: RunSettings) -> Path:
    """A new run folder `root/name` that starts where a checkpoint of `parent` stands; `resume_run` trains it.

    `step`: by default the last whole checkpoint. `settings` may differ from the parent's in what does not change the
    model: β (its controller then starts anew), steps, seed, rates. Its `meta()["lineage"]` says where it comes from.

    Raises RunError where there is no such checkpoint or the new folder exists, ConfigError where no update is left.
    """
    checkpoints = Checkpoints(parent / CHECKPOINTS)
    start = checkpoints.newest(_ignore) if step is None else checkpoints.read(step)
    if start is None:
        raise RunError(f"{parent} holds no whole checkpoint to start from; wait for its first one")
    if settings.ppo.steps <= start.step:
        raise ConfigError(
            f"the fork starts at update {start.step} and its settings end at {settings.ppo.steps}; wanted more: "
            f"try --steps {2 * start.step}"
        )
    before = recorded_settings(start.identity.settings)
    snapshot = start.snapshot()
    if settings.ppo.reward != before.ppo.reward:
        snapshot = replace(snapshot, beta=plain(controller(settings.ppo.reward)))
    kept = {key: start.identity.digests[key] for key in ("reference", "tokenizer")}
    with RunStore.open(parent) as store:
        source = store.meta().get("source")
    lineage = {"run": str(parent.resolve()), "step": start.step, "checkpoint": start.digest}
    with RunStore.create(root, name, settings.dump()) as store:
        for key, fact in {"sigma": 1.0, "source": source, "lineage": lineage, "digests": kept}.items():
            store.put(key, fact)
        identity = Identity(settings.dump(), kept, start.identity.made_by)
        Checkpoints(store.path / CHECKPOINTS, settings.checkpoint).save(snapshot, identity)
        return store.path


def _see_through(session: Session, way_on: str | None) -> Path:
    """Train to the end; however it ends, the folder says so and the terminal says how to go on."""
    store = session.store
    way_on = way_on or f"tether resume {shlex.quote(str(store.path))}"
    named = [*session.settings.report_to, *session.task.trackers]
    try:
        with Trackers.open(named, store.path, session.settings, session.console) as trackers:
            store.told = trackers.log
            session.train()
    except KeyboardInterrupt:
        _leave_word(store, "stopped by Ctrl-C", "stopped")
        saved = session.checkpoints.latest()
        where = "no checkpoint yet" if saved is None else f"saved at update {saved}"
        session.console.print(f"{where}; go on with: {way_on}", soft_wrap=True)
        raise
    except BaseException as error:
        _leave_word(store, f"{type(error).__name__}: {error}", "failed")
        raise
    store.heartbeat(session.settings.ppo.steps, "done", "finished")
    return store.path


def _leave_word(store: RunStore, phase: str, status: Status) -> None:
    with suppress(RunError):  # a full disk has said so already
        store.heartbeat(store.last_step() or 0, phase, status)


def _rows(store: RunStore) -> int:
    """Updates of which `run.db` holds the rows; those before a fork are its parent's."""
    lineage, last = store.meta().get("lineage"), store.last_step()
    begun = int(lineage["step"]) if isinstance(lineage, dict) else 0
    return begun if last is None else max(begun, last + 1)


def _is_finished(store: RunStore, settings: RunSettings) -> bool:
    beat = store.last_heartbeat()
    return beat is not None and beat.status == "finished" and beat.step == settings.ppo.steps


def _tell_start(store: RunStore, start: Checkpoint | None, console: Console) -> None:
    """Say and note where the run goes on from, and what may move its last bits."""
    step = 0 if start is None else start.step
    console.print(f"{store.name}: goes on from update {step}" if start else f"{store.name}: no checkpoint, starts anew")
    changed = [] if start is None else differences(start.identity.made_by, made_by())
    if changed:
        console.print(f"the last bits may differ from those of an uninterrupted run: {'; '.join(changed)}")
    store.event("resumed", {"step": step, "changed": changed})


def _elsewhere(folder: Path) -> str:
    """What to do where a run cannot go on as it is."""
    return f"Give the run back what it had, or start another from it: tether fork {shlex.quote(str(folder))} --name NEW"


def _ignore(text: str) -> None:
    del text
