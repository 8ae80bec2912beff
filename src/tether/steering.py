"""`tether steer RUN beta=0.1`: a wish is written down for the trainer; and what was steered so far.

    people: page, `tether steer`  ──▶ control.db: a wish          (`submit`)
    trainer, before each update   ──▶ judged, applied, run.db     (`helm.py`)

Both sides judge by the same rules (`wishes.py`). Knows no torch. Read next: `helm.py`.
"""

from __future__ import annotations

import getpass
import json as jsonlib
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tether.config import RunSettings
from tether.control import Control
from tether.errors import InputError, RunError
from tether.knobs import Fault, Words, find_knob, knobs
from tether.records import Event, Heartbeat
from tether.runs import ROOT, find_run
from tether.store import RunStore
from tether.wishes import KINDS, STEERABLE, check_wish, value_of, with_values

VALID_SECONDS = 15 * 60.0
"""A wish that the trainer has not seen by then is void: nobody expects it any more."""
POLL_SECONDS = 0.1


def submit(
    run: Path,
    actor: str,
    kind: str,
    payload: Mapping[str, object],
    settings: RunSettings,
    *,
    base: int | None = None,
    clock: float | None = None,
) -> int:
    """Judge a wish and write it down for the trainer; returns its id. Raises what `judged` raises, and InputError for
    an unknown kind or a name that is none.
    """
    check_wish(actor, kind, payload, settings)
    now = time.time() if clock is None else clock
    with Control.open(run, readonly=False) as control:
        return control.command(actor, kind, payload, base_version=base, expires=now + VALID_SECONDS)


def main(run: str, wishes: tuple[str, ...] = (), /, root: Path = ROOT, wait: float = 60.0, json: bool = False) -> int:
    """Steer a run that trains: tether steer RUN beta=0.1 · pause · resume · step · step=5 · checkpoint · stop

    Args:
        run: The run's name below `root`, or the path of its folder.
        wishes: Knobs with their values, or one of the words above; without any, what can be steered.
        root: The folder that holds the run folders.
        wait: Seconds to wait for the trainer's answer; 0 leaves at once.
        json: Print one JSON object instead.
    """
    folder = find_run(run, root)
    with RunStore.open(folder) as store:
        settings = current_settings(store)
        if not wishes:
            print(_standing(settings, json))
            return 0
        _require_running(store)
    kind, payload = parse_wishes(wishes)
    command = submit(folder, f"{_user()}@terminal", kind, payload, settings)
    return _tell(folder, command, wait, json)


def parse_wishes(wishes: Sequence[str]) -> tuple[str, dict[str, object]]:
    """Kind and payload of what stands on the command line. Raises InputError.

    >>> parse_wishes(["beta=0.1", "epochs=2"]), parse_wishes(["step=5"])
    (('set', {'beta': '0.1', 'epochs': '2'}), ('step', {'updates': 5}))
    """
    first, equals, value = wishes[0].partition("=")
    if first in KINDS[1:]:
        if len(wishes) > 1 or (equals and (first != "step" or not value.isdecimal())):
            raise InputError(f"got {' '.join(wishes)!r}; {first} stands alone" + (", or as step=5" * (first == "step")))
        return first, {"updates": int(value)} if equals else {}
    pairs = [wish.removeprefix("--").partition("=") for wish in wishes]
    if wrong := [name for name, equals, _ in pairs if not equals]:
        raise InputError(f"got {wrong[0]!r}; wanted KNOB=VALUE, as beta=0.1, or one of {', '.join(KINDS[1:])}")
    return "set", {name: _parsed(name, text) for name, _, text in pairs}


def _parsed(name: str, text: str) -> object:
    found = find_knob(name)
    return text if isinstance(found, Fault) else Words([text]).parse(knobs()[found.path])


def current_settings(store: RunStore) -> RunSettings:
    """The settings in force: those of the configuration, with what was steered since."""
    config = store.meta().get("config")
    try:
        settings = RunSettings.model_validate(config)
    except ValueError as error:
        raise RunError(
            f"{store.path} has settings of another version of tether; it can be read and not steered"
        ) from error
    values = {path: value for path, value in steered_values(store).items() if path in STEERABLE}
    return with_values(settings, values)


def steered_values(store: RunStore) -> dict[str, object]:
    """What was steered so far: knob → its value now."""
    return {str(entry["knob"]): entry["value"] for entry in schedule_of(store)}


def schedule_of(store: RunStore) -> list[dict[str, object]]:
    """Each change of each knob in the order in which it was made: `step`, `knob`, `value`."""
    return [
        {"step": event.step, "knob": path, "value": change[1]}
        for event in store.events()
        for path, change in _changes(event).items()
    ]


def _changes(event: Event) -> Mapping[str, Sequence[object]]:
    changes = event.payload.get("changes") if event.kind == "steered" else None
    return changes if isinstance(changes, Mapping) else {}


def _require_running(store: RunStore) -> None:
    beat = store.last_heartbeat()
    state = "not started" if beat is None else "dead, its process is gone" if is_gone(beat) else beat.status
    if state != "running":
        raise RunError(
            f"{store.path} is {state}; only a run that trains can be steered. Go on with it: tether resume {store.path}"
        )


def is_gone(beat: Heartbeat) -> bool:
    """Whether the process that trained was one of this machine and is no more."""
    if beat.status != "running" or beat.host != socket.gethostname():
        return False
    try:
        os.kill(beat.process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _standing(settings: RunSettings, json: bool) -> str:
    values = {path: value_of(settings, path) for path in STEERABLE}
    if json:
        return jsonlib.dumps(values)
    return "\n".join(f"{path:<32} {value}" for path, value in values.items())


def _tell(folder: Path, command: int, wait: float, json: bool) -> int:
    outcome, step, why = _await_outcome(folder, command, wait)
    if json:
        print(jsonlib.dumps({"command": command, "state": outcome, "step": step, "why": why}))
    else:
        where = "" if step is None else f" at update {step}"
        print(f"command {command}: {outcome}{where}{': ' * bool(why)}{why}")
    return 0 if outcome in ("applied", "pending") else 1


def _await_outcome(folder: Path, command: int, wait: float) -> tuple[str, int | None, str]:
    end = time.monotonic() + wait
    while True:
        with RunStore.open(folder) as store:
            found = [one for one in store.applied(command - 1) if one.command_id == command]
        if found:
            return found[0].outcome, found[0].step, str(found[0].payload.get("why", ""))
        if time.monotonic() >= end:
            return "pending", None, "the trainer takes it up before its next update"
        time.sleep(POLL_SECONDS)


def _user() -> str:
    try:
        return re.sub(r"[^\w.-]", "", getpass.getuser())[:24] or "someone"
    except (OSError, KeyError):
        return "someone"
