"""The trainer's side of steering: wishes are taken up between two updates, judged, applied and recorded.

    control.db ──▶ take      pause, step, checkpoint, stop act at once; knobs wait for the next update
               ──▶ Rudder    turns the knobs, a rising one by its factor an update
    run.db     ◀── rulings   what became of each wish, in the transaction of the update that it first acted in

A run that goes on from a checkpoint turns the same knobs before the same updates again: what was applied after the
checkpoint is kept (`ahead`) before its rows are dropped. Nothing here draws a random number, so looking and pausing
change no bit. Read next: `wishes.py` (what may be steered), `replay.py` (the same course once more).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, cast

from tether.config import RunSettings
from tether.control import Command, Control
from tether.errors import RunError, StopError, TetherError
from tether.records import Applied, Update, Verdict
from tether.rewards import controller
from tether.runtime.ranks import ALONE, Ranks
from tether.store import RunStore
from tether.trainer import Run
from tether.wishes import STEERABLE, check_wish, conflict, judged, updates_of, value_of, with_values

BETA = "ppo.reward.beta"
AHEAD = "ahead"
"""Where `run.db` keeps the rulings that a resumed run has yet to come to."""
POLL_SECONDS, BEAT_SECONDS = 0.05, 1.0

Word = Literal["wait", "save", "turn", "end"]
"""What the first of several processes tells the others between two updates."""
Changes = dict[str, list[object]]
"""Knob → before, after this update, target."""


@dataclass
class Rudder:
    """The knobs as steered so far, and those still on their way."""

    settings: RunSettings
    """In force; its β is where people last put it, the run's own where a controller moves it."""
    values: dict[str, object] = field(default_factory=dict)
    """What was steered so far."""
    targets: dict[str, object] = field(default_factory=dict)
    """Where the knobs are going that are not there yet."""

    def ask(self, asked: Mapping[str, object]) -> None:
        """Set knobs, judged before, on their way."""
        self.targets |= asked

    def turn(self, run: Run) -> Changes:
        """One update's move of every knob that is on its way; the run trains on with them."""
        changes: Changes = {}
        for path, target in list(self.targets.items()):
            before = run.beta.value if path == BETA else value_of(self.settings, path)
            after = STEERABLE[path].step(before, target)
            if after == target:
                del self.targets[path]
            changes[path] = [before, after, target]
        if changes:
            moved = {path: change[1] for path, change in changes.items()}
            self.values |= moved
            self.settings = with_values(self.settings, moved)
            self._take_hold(run, changes)
        return changes

    def _take_hold(self, run: Run, changes: Changes) -> None:
        run.settings = self.settings.ppo
        run.optimiser.settings = self.settings.ppo.update
        if any(path.startswith("ppo.reward.") for path in changes):
            beta = self.settings.ppo.reward.beta if BETA in changes else run.beta.value
            run.beta = controller(self.settings.ppo.reward.model_copy(update={"beta": beta}))

    def checkpoint_state(self) -> Mapping[str, object]:
        """The steered knobs, and their targets."""
        return {"values": dict(self.values), "targets": dict(self.targets)}

    def restore_state(self, state: Mapping[str, object]) -> None:
        """Go on from there; knobs of another version are left alone."""
        values = cast(Mapping[str, object], state.get("values", {}))
        self.values = {path: value for path, value in values.items() if path in STEERABLE}
        self.settings = with_values(self.settings, self.values)
        self.targets = dict(cast(Mapping[str, object], state.get("targets", {})))

    def put_into(self, run: Run) -> None:
        """Give a run that is about to be restored the settings that its snapshot was made under."""
        run.settings = self.settings.ppo
        run.optimiser.settings = self.settings.ppo.update
        run.beta = controller(self.settings.ppo.reward)


@dataclass(frozen=True)
class Ruling:
    """What becomes of a wish."""

    command: int
    outcome: Verdict
    payload: Mapping[str, object]


@dataclass
class Helm:
    """Takes up what people ask of one run."""

    run: Run
    store: RunStore
    rudder: Rudder
    save: Callable[[], None]
    """Saves the run as it stands."""
    interrupted: Callable[[], bool]
    """Whether somebody at the terminal wants it to stop."""
    say: Callable[[str], None]
    control: Control | None = None
    clock: Callable[[], float] = time.time
    ahead: dict[int, list[Applied]] = field(default_factory=dict)
    """What was ruled after the checkpoint that the run goes on from, by update."""
    paused: bool = False
    ranks: Ranks = ALONE
    """The processes that share the run; the first hears the wishes, the others do as it says."""
    _steps: int = 0
    """Updates that a paused run may still make."""
    _seen: int = 0
    _deferred: list[Command] = field(default_factory=list)
    """Wishes that wait until the run is past everything that was asked before it was resumed."""
    _waiting: list[tuple[Command, dict[str, object]]] = field(default_factory=list)
    """Knobs asked for, to be turned before the next update."""
    _rulings: list[Ruling] = field(default_factory=list)
    _changes: Changes = field(default_factory=dict)
    _last: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Who last turned a knob: command and actor."""

    # ── between two updates ─────────────────────────────────────────────────────────────────────────────────────────
    def before(self) -> None:
        """Take up what is asked, wait while the run is paused, then turn the knobs of the next update.

        Raises StopError where the run is asked to stop, KeyboardInterrupt where somebody at the terminal wants it to.
        """
        if not self.ranks.is_first:
            self._follow()
            return
        try:
            self._take()
            self._wait()
        except (TetherError, KeyboardInterrupt) as end:
            self._tell("end", end)
            raise
        self._turn()

    def _tell(self, word: Word, what: object = None) -> None:
        """Let the processes that follow know what this one does."""
        if self.ranks.count > 1:
            self.ranks.same((word, what))

    def _follow(self) -> None:
        """Do what the first process does, until it goes on."""
        while True:
            word, what = self.ranks.same(("wait", None))
            if word == "save":
                self.save()
            if word == "end" and isinstance(what, BaseException):
                raise what
            if word == "turn" and isinstance(what, list):
                for asked in what:
                    self.rudder.ask(asked)
                self.rudder.turn(self.run)
                return

    def _save(self) -> None:
        self._tell("save")
        self.save()

    def write(self, entry: Update) -> None:
        """Record what this update turned, and what became of the wishes, in its transaction."""
        for ruling in self._rulings:
            entry.applied(ruling.command, ruling.payload, ruling.outcome)
        if self._changes:
            entry.event("steered", {"changes": self._changes})
        self._rulings, self._changes = [], {}

    def _wait(self) -> None:
        beat = -math.inf
        while self.paused and not self._steps:
            if self.interrupted():
                self._save()
                raise KeyboardInterrupt
            if self.clock() - beat >= BEAT_SECONDS:
                beat = self.clock()
                self.store.heartbeat(self.run.step, "paused")
                self._tell("wait")
            time.sleep(POLL_SECONDS)
            self._take()
        self._steps = max(0, self._steps - 1)

    # ── taking up ───────────────────────────────────────────────────────────────────────────────────────────────────
    def _take(self) -> None:
        waited, self._deferred = self._deferred, []
        for command in [*waited, *self._new()]:
            self._seen = max(self._seen, command.id)
            if command.kind == "set" and self.ahead:
                self._deferred.append(command)  # what was asked before comes first
                continue
            try:
                if command not in waited and command.has_expired(self.clock()):
                    raise RunError("it waited too long for the trainer, and is void")
                check_wish(command.actor, command.kind, command.payload, self.rudder.settings)
            except TetherError as error:
                self._rule(command, "rejected", {"why": str(error)})
                continue
            self._take_one(command)

    def _new(self) -> Sequence[Command]:
        """Commands that nothing was ruled on, the oldest first."""
        if self.control is None:
            return []
        fresh = self.control.commands(self._seen)
        if not fresh:
            return []
        ruled = {one.command_id for one in self.store.applied(self._seen)}
        ruled |= {one.command_id for rulings in self.ahead.values() for one in rulings}
        return [command for command in fresh if command.id not in ruled]

    def _take_one(self, command: Command) -> None:
        if command.kind == "set":
            self._take_knobs(command)
            return
        self._rule(command, "applied", {})
        if command.kind == "step":
            self._steps += updates_of(command.payload)
            self.paused = True
        if command.kind in ("pause", "resume"):
            self.paused, self._steps = command.kind == "pause", 0
            self.say(f"{command.kind}d by {command.actor} before update {self.run.step}")
        if command.kind in ("checkpoint", "stop"):
            self._save()
        if command.kind == "stop":
            raise StopError(f"stopped by {command.actor} before update {self.run.step}, with a checkpoint")

    def _take_knobs(self, command: Command) -> None:
        asked = judged(self.rudder.settings, command.payload)
        if late := conflict(command, self._last, list(asked)):
            self._rule(command, "superseded", {"why": late})
            return
        for older, knobs in list(self._waiting):
            if knobs.keys() <= asked.keys():
                self._waiting.remove((older, knobs))
                self._rule(
                    older, "superseded", {"why": f"command {command.id} asked for another value before the update"}
                )
        self._waiting.append((command, asked))
        self._last |= dict.fromkeys(asked, (command.id, command.actor))

    def _rule(self, command: Command, outcome: Verdict, payload: Mapping[str, object]) -> None:
        """Record at once what changes nothing that is trained."""
        self.store.rule(command.id, self.run.step, payload, outcome)

    # ── turning ─────────────────────────────────────────────────────────────────────────────────────────────────────
    def _turn(self) -> None:
        mine: list[tuple[int, dict[str, object]]] = []
        for one in self.ahead.pop(self.run.step, []):
            asked = one.payload.get("asked")
            if one.outcome == "applied" and isinstance(asked, Mapping):
                mine.append((one.command_id, dict(asked)))
            else:
                self._rulings.append(Ruling(one.command_id, cast(Verdict, one.outcome), one.payload))
        mine += [(command.id, asked) for command, asked in self._waiting]
        self._waiting = []
        self._tell("turn", [asked for _, asked in mine])
        for _, asked in mine:
            self.rudder.ask(asked)
        self._changes = self.rudder.turn(self.run)
        for command, asked in mine:
            changes = {path: self._changes[path] for path in asked if path in self._changes}
            self._rulings.append(Ruling(command, "applied", {"asked": asked, "changes": changes}))


def keep_ahead(store: RunStore, step: int) -> dict[int, list[Applied]]:
    """The rulings of updates from `step` on, which the run will come to again; kept before their rows are dropped."""
    known = store.meta().get(AHEAD)
    rows = [Applied(**one) for one in known] if isinstance(known, list) else []
    found = {one.command_id: one for one in [*rows, *store.applied()] if one.step >= step}
    if found or rows:
        store.put(AHEAD, [asdict(one) for one in found.values()])
    by_step: dict[int, list[Applied]] = {}
    for one in found.values():
        by_step.setdefault(one.step, []).append(one)
    return by_step
