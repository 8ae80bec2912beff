"""Going on with a run folder as if the run had never stopped, and starting another from one of its checkpoints.

Read next: `checkpoint.py` (what is saved), `identity.py` (what is refused), `session.py` (the run itself).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from tether.checkpoint import Checkpoint, Checkpoints, Identity
from tether.config import RunSettings
from tether.errors import ConfigError, RunError
from tether.identity import WHERE, differences, made_by, recorded_settings, require_same_settings
from tether.ranked import shared
from tether.recipe_files import load_recipe
from tether.rewards import controller
from tether.runtime.ranks import here
from tether.session import Session, elsewhere, is_sharded, see_through, store_of
from tether.snapshot import plain
from tether.store import CHECKPOINTS, CONFIG_FILE, RunStore
from tether.task import Task, open_policy


def resume_run(
    folder: Path,
    open_task: Callable[[RunSettings], Task],
    console: Console,
    settings: RunSettings | None = None,
    *,
    way_on: str | None = None,
    moved: bool = False,
) -> Path:
    """Go on with a run from its last whole checkpoint, as if it had never stopped; returns its folder.

    `open_task` gives what the run was about. `settings`: by default those in the folder; they must be those that the
    run was started with, up to what is looked at and kept; with `moved` they may also say that model, prompts or judges
    lie elsewhere by now, and what lies there is held against its digest. Rows of `run.db` after the checkpoint are made
    again. A run without a checkpoint starts again from update 0; a finished one stays as it is.

    Raises RunError where the folder is no run, another process writes it, or settings, reference, tokenizer, reward or
    prompts are not what the run was started with, and whatever training raises.
    """
    chosen = load_recipe(str(folder / CONFIG_FILE)) if settings is None else settings
    with store_of(chosen, lambda: RunStore.open(folder, readonly=False)) as store:
        found = here().ask_first(lambda: _place(folder, store, chosen, console, WHERE if moved else ()))
        if isinstance(found, Path):
            return found
        task = here().together(lambda: open_task(chosen), first_ahead=True)
        policy = here().together(lambda: open_policy(task.model, chosen, task.tokenizer))
        session = Session(task, chosen, shared(policy, here(), is_sharded(chosen)), store, console, found.start)
        return here().same(see_through(session, way_on))


@dataclass(frozen=True)
class _Found:
    """Where a run goes on from; None is its beginning."""

    start: Checkpoint | None


def _place(folder: Path, store: RunStore, chosen: RunSettings, console: Console, free: Sequence[str]) -> _Found | Path:
    """The checkpoint to go on from, or the folder itself where the run is finished."""
    checkpoints = Checkpoints(folder / CHECKPOINTS, chosen.checkpoint)
    start = checkpoints.newest(lambda text: console.print(text, soft_wrap=True), _rows(store))
    recorded = store.meta()["config"] if start is None else start.identity.settings
    require_same_settings(recorded, chosen, elsewhere(folder), free)
    if _is_finished(store, chosen):
        console.print(f"{folder} is finished: {chosen.ppo.steps} updates", soft_wrap=True)
        return folder
    _tell_start(store, start, console)
    return _Found(start)


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
        states = {name: state for name, state in snapshot.states.items() if name != "rudder"}
        snapshot = replace(snapshot, beta=plain(controller(settings.ppo.reward)), states=states)
    kept = {key: start.identity.digests[key] for key in ("reference", "tokenizer")}
    with RunStore.open(parent) as store:
        source = settings.model.source or store.meta().get("source")
    lineage = {"run": str(parent.resolve()), "step": start.step, "checkpoint": start.digest}
    with RunStore.create(root, name, settings.dump()) as store:
        for key, fact in {"sigma": 1.0, "source": source, "lineage": lineage, "digests": kept}.items():
            store.put(key, fact)
        identity = Identity(settings.dump(), kept, start.identity.made_by)
        Checkpoints(store.path / CHECKPOINTS, settings.checkpoint).save(snapshot, identity)
        return store.path


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


def _ignore(text: str) -> None:
    del text
