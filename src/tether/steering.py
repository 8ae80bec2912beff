"""What may be steered while a run trains, and how a wish is judged; `tether steer RUN beta=0.1`.

    people: page, `tether steer`  ──▶ control.db: a wish          (`submit`)
    trainer, before each update   ──▶ judged, applied, run.db     (`helm.py`)

A wish is one of `KINDS`; of the knobs it may name those of `STEERABLE` alone, never the model, the tokenizer, the seed,
precision, the batch's shape, code or a path. Both sides judge by the same rules: the bounds of the configuration and
the ceilings here. A knob rises by at most its factor an update; it falls at once. Knows no torch. Read next: `helm.py`.
"""

from __future__ import annotations

import getpass
import json as jsonlib
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_origin

from tether.config import RunSettings
from tether.control import Command, Control
from tether.errors import ConfigError, InputError, RunError
from tether.knobs import Fault, Words, find_knob, kinds_of, knobs, read_settings
from tether.records import Event, Heartbeat
from tether.runs import ROOT, find_run
from tether.store import RunStore

KINDS = ("set", "pause", "resume", "step", "checkpoint", "stop")
ACTOR = re.compile(r"[\w.@-]{1,40}")
VALID_SECONDS = 15 * 60.0
"""A wish that the trainer has not seen by then is void: nobody expects it any more."""
LONGEST_WISH = 12
"""Knobs in one wish."""
LONGEST_WORD = 40
MOST_STEPS = 1000
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Reach:
    """How far a hand on the wheel may turn one knob, within the configuration's own bounds."""

    most: float | None = None
    """The greatest value that can be set while a run trains."""
    least: float | None = None
    slew: float | None = None
    """Greatest factor by which it rises in one update."""
    floor: float = 0.0
    """A smaller value rises as if it were this: a cut string is taken up again from here."""

    def step(self, before: object, target: object) -> object:
        """The value in the next update on the way to the target.

        >>> Reach(slew=4.0, floor=0.01).step(0.0, 1.0), Reach(slew=4.0).step(0.5, 0.1), Reach(slew=4.0).step(0.1, 0.3)
        (0.04, 0.1, 0.3)
        """
        if self.slew is None or not isinstance(before, int | float) or not isinstance(target, int | float):
            return target
        return min(target, max(before, self.floor) * self.slew)


STEERABLE: Mapping[str, Reach] = {
    "ppo.reward.beta": Reach(most=10.0, slew=4.0, floor=0.01),
    "ppo.reward.controller": Reach(),
    "ppo.reward.target_kl": Reach(most=1000.0),
    "ppo.reward.horizon": Reach(most=1e9),
    "ppo.reward.missing_eos_score": Reach(most=100.0, least=-100.0),
    "ppo.update.learning_rate": Reach(most=0.1, slew=4.0),
    "ppo.update.value_learning_rate": Reach(most=0.1, slew=4.0),
    "ppo.update.clip_range": Reach(most=1.0),
    "ppo.update.value_clip_range": Reach(most=100.0),
    "ppo.update.epochs": Reach(most=16),
    "ppo.update.value_coef": Reach(most=100.0),
    "keep_samples": Reach(most=256),
    "evaluation.every": Reach(most=1_000_000),
}
"""Knob → its reach. All but the last two change what is trained."""


def judged(settings: RunSettings, payload: object) -> dict[str, object]:
    """The knobs that a wish names, by their paths, each with the value it asks for.

    `settings` are those in force. Raises InputError for what cannot be steered, ConfigError for a value out of bounds,
    each with what was got and what was wanted.
    """
    if not isinstance(payload, Mapping) or not 0 < len(payload) <= LONGEST_WISH:
        raise InputError(f"wanted 1 to {LONGEST_WISH} knobs by name with their values, as beta: 0.1")
    asked: dict[str, object] = {}
    for name, value in payload.items():
        path = _steerable(str(name)[:LONGEST_WORD])
        if path in asked:
            raise InputError(f"{path} is named twice; leave one out")
        asked[path] = _scalar(path, value)
    now, _ = read_settings(settings.dump(), list(asked.items()), "steering")
    found = {path: value_of(now, path) for path in asked}
    for path, value in found.items():
        _within(path, value)
    return found


def _steerable(name: str) -> str:
    found = find_knob(name)
    if isinstance(found, Fault):
        raise InputError(str(found))
    if found.path not in STEERABLE:
        raise InputError(
            f"{found.path} is fixed when a run starts; what can be steered: {', '.join(map(short_name, STEERABLE))}"
        )
    return found.path


def _scalar(path: str, value: object) -> object:
    text = isinstance(value, str) and len(value) <= LONGEST_WORD
    if value is None or isinstance(value, int | float) or text:
        return value
    raise InputError(f"{path}: got {type(value).__name__}; wanted one number or word")


def _within(path: str, value: object) -> None:
    reach = STEERABLE[path]
    if not isinstance(value, int | float):
        return
    if reach.most is not None and value > reach.most:
        raise ConfigError(f"{path}: got {value:g}; while a run trains it may be at most {reach.most:g}")
    if reach.least is not None and value < reach.least:
        raise ConfigError(f"{path}: got {value:g}; while a run trains it may be at least {reach.least:g}")


def value_of(settings: RunSettings, path: str) -> object:
    """The value of a knob by its path.

    >>> value_of(RunSettings(), "ppo.reward.beta")
    0.05
    """
    level: object = settings
    for name in path.split("."):
        level = getattr(level, name)
    return level


def with_values(settings: RunSettings, values: Mapping[str, object]) -> RunSettings:
    """The settings with these knobs in place of their own; the values were judged before."""
    tree = settings
    for path, value in values.items():
        tree = _with(tree, path.split("."), value)
    return tree


def _with(level, names: Sequence[str], value: object):  # type: ignore[no-untyped-def]  # any of the settings' models
    first, *rest = names
    inner = _with(getattr(level, first), rest, value) if rest else value
    return level.model_copy(update={first: inner})


def short_name(path: str) -> str:
    """The last word of a knob's path.

    >>> short_name("ppo.reward.beta"), short_name("evaluation.every")
    ('beta', 'evaluation.every')
    """
    return path if path.startswith("evaluation.") else path.rpartition(".")[2]


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


def check_wish(actor: str, kind: str, payload: object, settings: RunSettings) -> None:
    """Raise InputError or ConfigError unless the trainer would take this."""
    if not ACTOR.fullmatch(actor):
        raise InputError(f"got {actor[:60]!r} as the name of who asks; wanted 1 to 40 letters, digits, . _ @ -")
    if kind not in KINDS:
        raise InputError(f"got {str(kind)[:40]!r}; wanted one of {', '.join(KINDS)}")
    if kind == "set":
        judged(settings, payload)
    elif kind == "step":
        updates_of(payload)
    elif payload != {}:
        raise InputError(f"{kind} takes no payload; wanted {{}}")


def updates_of(payload: object) -> int:
    """How many updates a `step` asks for."""
    if not isinstance(payload, Mapping) or payload.keys() - {"updates"}:
        raise InputError('step takes `updates` alone, as {"updates": 1}')
    updates = payload.get("updates", 1)
    if isinstance(updates, bool) or not isinstance(updates, int) or not 1 <= updates <= MOST_STEPS:
        raise InputError(f"got {updates!r} updates; wanted a whole number from 1 to {MOST_STEPS}")
    return updates


def conflict(command: Command, last: Mapping[str, tuple[int, str]], paths: Sequence[str]) -> str:
    """Why a wish comes too late: somebody else turned one of its knobs after what its actor had seen. Else ''."""
    if command.base_version is None:
        return ""
    for path in paths:
        changed, actor = last.get(path, (0, command.actor))
        if changed > command.base_version and actor != command.actor:
            return f"{actor} changed {short_name(path)} in the meantime (command {changed})"
    return ""


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────────────
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


def knob_facts(path: str) -> dict[str, object]:
    """What a control for this knob needs to know: its kind, bounds, help and usual range."""
    info, reach = knobs()[path], STEERABLE[path]
    kinds = kinds_of(info)
    choices = [choice for kind in kinds if get_origin(kind) is not None for choice in getattr(kind, "__args__", ())]
    limits = {
        key: getattr(limit, key) for limit in info.metadata for key in ("ge", "gt", "le", "lt") if hasattr(limit, key)
    }
    least = limits.get("ge", limits.get("gt", 0.0 if path.endswith(".beta") else reach.least))
    extra = info.json_schema_extra
    return {
        "path": path, "name": short_name(path),
        "kind": "choice" if choices else "whole" if int in kinds else "number",
        "min": least, "min_exclusive": "gt" in limits, "max": limits.get("le", reach.most),
        "choices": choices or None, "nullable": type(None) in kinds, "slew": reach.slew, "help": info.description or "",
        "usual": str(extra.get("usual", "")) if isinstance(extra, Mapping) else "",
    }  # fmt: skip
