"""What may be asked of a run that trains, and how a wish is judged: by the page, the terminal and the trainer alike.

A wish is one of `KINDS`; of the knobs it may name those of `STEERABLE` alone, never the model, the tokenizer, the seed,
precision, the batch's shape, code or a path. Its bounds are those of the configuration and the ceilings here. A knob
rises by at most its factor an update; it falls at once. Knows no torch, no run folder. Read next: `steering.py` (a wish
is written down), `helm.py` (a wish is applied).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_origin

from tether.config import RunSettings
from tether.control import Command
from tether.errors import ConfigError, InputError
from tether.knobs import Fault, find_knob, kinds_of, knobs, read_settings

KINDS = ("set", "pause", "resume", "step", "checkpoint", "stop")
ACTOR = re.compile(r"[\w.@-]{1,40}")
LONGEST_WISH = 12
"""Knobs in one wish."""
LONGEST_WORD = 40
MOST_STEPS = 1000


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
