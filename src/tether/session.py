"""From a task to a finished run folder: policy, training, evaluation, checkpoints, and how it ended.

`train_run` trains one policy and leaves everything in `root/name`, with checkpoints that `resuming.py` goes on from.
The jobs above (`demo.py`, `sweep.py`, `training.py`) are made of it.
"""

from __future__ import annotations

import shlex
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from tether.ahead import look_ahead
from tether.alarms import PLANTED
from tether.bank import bank_size, keep_bank
from tether.checkpoint import Checkpoint, Checkpoints, Identity
from tether.config import RunSettings
from tether.control import Control
from tether.errors import AlarmError, RunError, StopError
from tether.evaluation import Judged, evaluate, summarise
from tether.helm import Helm, Rudder, keep_ahead
from tether.identity import identify, require_same_digests
from tether.models import LanguagePolicy
from tether.prompts import PromptSource
from tether.ranked import shared, shared_snapshot
from tether.recording import Keeper, Saver, Screen, pieces_of, probes
from tether.records import Applied, Status
from tether.runtime.interrupt import Interrupt
from tether.runtime.memory import keep_freed_memory
from tether.runtime.ranks import here
from tether.snapshot import restore_states
from tether.store import CHECKPOINTS, RunStore
from tether.task import EVALUATED_AT_ONCE, Task, heldout_source, open_policy, source_of
from tether.trackers import Trackers
from tether.trainer import Run, train
from tether.watch import Watch
from tether.writers import catch_up, helped

STOPPING = "stopping after this update, with a checkpoint; once more leaves at once"


def prepare_process() -> None:
    """What a program that trains wants of its process: freed memory kept, and no bars but its own."""
    keep_freed_memory()
    transformers_logging.disable_progress_bar()


def is_sharded(settings: RunSettings) -> bool:
    """Whether several processes hold the layers' weights in shares."""
    return settings.runtime.sharding == "fsdp"


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
        with (
            Interrupt(STOPPING) as interrupt,
            Screen(self.console, knobs.steps, title, start) as screen,
            Control.open(self.store.path) as control,
            self._help(),
        ):
            watch = Watch.of(self.settings.checks)
            rudder = Rudder(self.settings)
            keeper = Keeper(self.store, screen, judges.unseen, self.settings.keep_samples, watch, self._pieces)
            run = Run(self.policy, judges.reward, prompts, knobs, keeper, watch.before)
            look_ahead(self.policy.writer, run)
            ahead = self._take_up(run, heldout, watch, rudder)
            saver = Saver(run, self.checkpoints, identity, self.store, watch, rudder)
            keeper.digest = self.store.chain().get(run.step - 1, "")
            helm = keeper.helm = Helm(
                run, self.store, rudder, saver.save, lambda: interrupt.wanted, self._say,
                control, ahead=ahead, ranks=here(),
            )  # fmt: skip
            if run.step == 0:
                self._keep_bank(identity)
            try:
                train(run, self._between(saver, heldout, interrupt, helm))
            except AlarmError:
                saver.answer(watch.on_alarm)
                raise

    def _help(self) -> AbstractContextManager[None]:
        """Workers and engines, where the settings ask for some."""
        source, moved = self.task.model, 0
        if self.start is not None:  # the weights are not yet the checkpoint's, which are one version further
            moved = max(0, self.start.step - self.settings.ppo.update.value_warmup) - 1
        if isinstance(source, str | Path) and Path(source).exists():
            source = Path(source).resolve()  # a worker stands in another folder
        opening = partial(open_policy, source, self.settings, self.task.tokenizer)
        rewards = self.task.judges.all.values()
        return helped(self.settings, self.policy, opening, rewards, self.store.put, moved)

    def _identify(self, prompts: PromptSource) -> Identity:
        """What this run is. Raises RunError where its folder says that it is another."""
        identity = identify(self.settings, self.policy, self.task.judges.reward, prompts.ids, prompts.columns)
        _require_one_start(identity)
        recorded = dict(self.start.identity.digests) if self.start is not None else {}
        known = self.store.meta().get("digests")
        recorded |= known if isinstance(known, dict) else {}
        require_same_digests(recorded, identity.digests, elsewhere(self.store.path))
        self.store.put_config(self.settings.dump())
        self.store.put("source", _source(self.task))
        self.store.put("processes", _processes(self.settings))
        self.store.put("digests", dict(identity.digests))
        self.store.put("made_by", dict(identity.made_by))
        return identity

    def _keep_bank(self, identity: Identity) -> None:
        """Samples of the reference with their scores, at the price of an evaluation: what the ghost is made of."""
        count, copies = bank_size(self.settings, len(self.task.heldout))
        if not count:
            return
        prompts = self.task.heldout.first(count)
        source = source_of(prompts, self.policy, self.settings, count, copies)
        source = source.in_equal_batches(max(1, EVALUATED_AT_ONCE // copies))
        self.store.heartbeat(0, "evaluating")
        knobs, judges = self.settings.ppo, self.task.judges.all
        keep_bank(self.store.path, identity.digests, self.policy, source, judges, knobs.sampling, knobs.seed)

    def _pieces(self, tokens: Sequence[int]) -> tuple[str, ...]:
        return pieces_of(self.policy.tokenizer, tokens)

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False, highlight=False)

    def _take_up(self, run: Run, heldout: PromptSource, watch: object, rudder: Rudder) -> dict[int, list[Applied]]:
        """Go on from the checkpoint; what `run.db` holds of later updates is dropped, to be made again, but for what
        became of commands in them, which is returned.
        """
        if self.start is not None:
            if self.start.step:
                self.reference = self._judge(heldout)  # the weights are still the reference's own
            restore_states(self.start.states, watch=watch, rudder=rudder, writer=self.policy.writer)
            rudder.put_into(run)
            run.restore(shared_snapshot(self.start.snapshot, here()))
            if here().is_first:
                self.checkpoints.point_at(run.step)
        ahead = keep_ahead(self.store, run.step)
        self.store.truncate_after(run.step - 1)
        return ahead

    def _between(self, saver: Saver, heldout: PromptSource, interrupt: Interrupt, helm: Helm) -> Callable[[int], None]:
        def between(step: int) -> None:
            wanted = here().any(interrupt.wanted)
            if saver.is_due() or wanted:
                saver.save()
            if wanted:
                raise KeyboardInterrupt
            self._evaluate(step, heldout, helm)
            if step < saver.run.settings.steps:
                helm.before()

        return between

    def _judge(self, heldout: PromptSource) -> Judged:
        knobs = self.settings.ppo
        here().together(lambda: catch_up(self.policy.writer))
        return evaluate(self.policy, heldout, self.task.judges.all, knobs.sampling, knobs.seed)

    def _evaluate(self, step: int, heldout: PromptSource, helm: Helm) -> None:
        if step % helm.rudder.settings.evaluation.every and step != self.settings.ppo.steps:
            return
        self.store.heartbeat(step, "evaluating")
        judged = self._judge(heldout)
        self.reference = self.reference or judged
        with self.store.update(step) as entry:
            entry.metrics(summarise(judged, self.reference))
            for probe in probes(judged, step, helm.run.beta.value, self._pieces):
                entry.sample(probe)


def train_run(
    task: Task, settings: RunSettings, root: Path, name: str, console: Console, *, way_on: str | None = None
) -> Path:
    """Train one policy; returns its run folder. A run that ends early stays readable, says how it ended, and goes on
    from its last checkpoint.

    `way_on`: what to tell the user then; by default the command `tether resume FOLDER`, or the function where settings
    alone do not say what the run is about.

    Raises RunError where the folder exists or cannot be written, and whatever training raises.
    """
    ranks = here()
    policy = shared(
        ranks.together(lambda: open_policy(task.model, settings, task.tokenizer)), ranks, is_sharded(settings)
    )
    with store_of(settings, lambda: RunStore.create(root, name, settings.dump())) as store:
        store.put("sigma", 1.0)
        store.put("planted", PLANTED.get())
        store.put("source", _source(task))
        return see_through(Session(task, settings, policy, store, console), way_on)


@contextmanager
def store_of(settings: RunSettings, open_store: Callable[[], RunStore]) -> Iterator[RunStore]:
    """The run's folder, which the first process alone writes; the others keep the same books in a folder of their own
    that is gone with them. Raises on all what opening the folder raises.
    """
    ranks = here()
    with ExitStack() as stack:
        if ranks.is_first:
            store = ranks.together(open_store)
        else:
            aside = Path(stack.enter_context(TemporaryDirectory(prefix="tether-")))
            store = ranks.together(lambda: RunStore.create(aside, "aside", settings.dump()))
        yield stack.enter_context(store)


def _source(task: Task) -> str | None:
    """Where the model that the run starts from lies; None where it is an object."""
    return None if isinstance(task.model, PreTrainedModel) else str(task.model)


def _processes(settings: RunSettings) -> dict[str, object]:
    """Who shares the run, for the run folder."""
    hosts = here().said(socket.gethostname())
    return {"count": here().count, "sharding": settings.runtime.sharding, "hosts": hosts}


def _require_one_start(identity: Identity) -> None:
    """Raise RunError where this process starts from something else than the first."""
    ranks = here()
    first = ranks.same(dict(identity.digests))

    def compare() -> None:
        require_same_digests(first, identity.digests, "Give every process the same files")

    ranks.together(compare)


def see_through(session: Session, way_on: str | None) -> Path:
    """Train to the end; however it ends, the folder says so and the terminal says how to go on."""
    store = session.store
    named = [*session.settings.report_to, *session.task.trackers] if here().is_first else []
    try:
        with Trackers.open(named, store.path, session.settings, session.console) as trackers:
            store.told = trackers.log
            session.train()
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | AlarmError | StopError)
        told = "stopped by Ctrl-C" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
        _leave_word(store, told, "stopped" if stopped else "failed")
        saved = session.checkpoints.latest()
        if stopped or saved is not None:
            where = "no checkpoint yet" if saved is None else f"saved at update {saved}"
            session.console.print(f"{where}; go on with: {way_on or _way_on(session)}", soft_wrap=True, markup=False)
        raise
    store.heartbeat(session.settings.ppo.steps, "done", "finished")
    return store.path


def _way_on(session: Session) -> str:
    """The command that goes on, or the call where model, prompts or reward came from Python."""
    settings, folder = session.settings, session.store.path
    named = (settings.model.source, settings.data.prompts, settings.reward.source)
    if isinstance(session.task.model, PreTrainedModel) or (settings.world is None and None in named):
        return f'tether.resuming.resume_run(Path("{folder}"), lambda settings: task, console)'
    return f"tether resume {shlex.quote(str(folder))}"


def _leave_word(store: RunStore, phase: str, status: Status) -> None:
    with suppress(RunError):  # a full disk has said so already
        store.heartbeat(store.last_step() or 0, phase, status)


def elsewhere(folder: Path) -> str:
    """What to do where a run cannot go on as it is."""
    return f"Give the run back what it had, or start another from it: tether fork {shlex.quote(str(folder))} --name NEW"
