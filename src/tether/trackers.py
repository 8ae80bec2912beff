"""Trackers beside the run's own store: TensorBoard, Weights & Biases, Trackio, MLflow and whatever accelerate knows.

The run folder is written whatever happens; a tracker gets the same numbers, and TRL's names for those that mean the
same there. One that fails, at its start or later, is left out with one line of warning, and training goes on.
Nothing is sent anywhere unless `report_to` says so. Knows no model. Read next: `store.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from tether.config import RunSettings
from tether.errors import ConfigError, InputError
from tether.knobs import knobs

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

TRL_NAMES = {
    "kl/mean": "objective/kl",
    "score/mean": "objective/scores",
    "reward/mean": "objective/rlhf_reward",
    "reward/non_score": "objective/non_score_reward",
    "loss/policy": "loss/policy_avg",
    "loss/value": "loss/value_avg",
    "ppo/clip_fraction": "policy/clipfrac_avg",
    "ppo/value_clip_fraction": "val/clipfrac_avg",
    "entropy/per_token": "policy/entropy_avg",
    "learning_rate": "lr",
}
"""TRL 1.12's names of the numbers that mean the same there; its `approxkl` is another estimator, so it is left out."""
INSTALL = {"comet_ml": "comet-ml"}
"""Packages whose name is not the tracker's."""
PROJECT = "tether"


def our_name(name: str) -> str:
    """The catalogue's name of a number that may be called by TRL's."""
    return {theirs: ours for ours, theirs in TRL_NAMES.items()}.get(name, name)


def with_trl_names(numbers: Mapping[str, float]) -> dict[str, float]:
    """The numbers, and TRL's names for those that mean the same there."""
    return {**numbers, **{TRL_NAMES[name]: number for name, number in numbers.items() if name in TRL_NAMES}}


@dataclass
class Trackers:
    """The trackers of one run that still work. Use it in a `with` block, which ends them."""

    console: Console
    live: dict[str, GeneralTracker] = field(default_factory=dict)

    @staticmethod
    def open(report_to: Iterable[object], folder: Path, settings: RunSettings, console: Console) -> Trackers:
        """Start each, tell it the knobs, and warn of those that cannot be started.

        `report_to`: names, or trackers as objects. Raises ConfigError for a name that no tracker has, InputError for an
        object that is no tracker.
        """
        trackers = Trackers(console)
        for number, given in enumerate(wanted(report_to)):
            name = given if isinstance(given, str) else f"{getattr(given, 'name', type(given).__name__)}#{number}"
            trackers._start(name, given, folder, settings)
        return trackers

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Hand the numbers of a step to every tracker."""
        values = with_trl_names(numbers)
        for name, tracker in list(self.live.items()):
            try:
                tracker.log(values, step=step)
            except Exception as fault:
                self._leave_out(name, fault, f"at update {step}")

    def close(self) -> None:
        """End every tracker."""
        for name, tracker in list(self.live.items()):
            try:
                tracker.finish()
            except Exception as fault:
                self._leave_out(name, fault, "at its end")
        self.live.clear()

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, name: str, given: str | GeneralTracker, folder: Path, settings: RunSettings) -> None:
        try:
            tracker = _made(given, folder) if isinstance(given, str) else given
            tracker.start()
            tracker.store_init_configuration(flat(settings))
        except (Exception, SystemExit) as fault:
            self._leave_out(name, fault, "at its start")
        else:
            self.live[name] = tracker

    def _leave_out(self, name: str, fault: BaseException, when: str) -> None:
        self.live.pop(name, None)
        reason = " ".join(str(fault).split()) or type(fault).__name__
        self.console.print(
            f"warning: the tracker {name} failed {when} and is left out ({type(fault).__name__}: {reason}); the run "
            "goes on, and its own store has every number",
            soft_wrap=True, markup=False,
        )  # fmt: skip


def wanted(report_to: Iterable[object]) -> Sequence[str | GeneralTracker]:
    """The trackers asked for, each once, in order; `none` is none of them.

    Raises ConfigError for a name that no tracker has, InputError for an object that is no tracker.
    """
    asked = list(report_to)
    if not asked:
        return []
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

    known = sorted(str(name) for name in LOGGER_TYPE_TO_CLASS)
    found: list[str | GeneralTracker] = []
    for one in asked:
        if not isinstance(one, str | GeneralTracker):
            raise InputError(f"report_to holds {one!r:.80}; wanted a tracker's name or a GeneralTracker of accelerate")
        if isinstance(one, str) and one not in (*known, "none"):
            near = get_close_matches(one, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"report_to: there is no tracker {one!r}; wanted one of {', '.join(known)}{hint}")
        if one != "none" and one not in found:
            found.append(one)
    return found


def flat(settings: RunSettings) -> dict[str, str | int | float | bool | None]:
    """Every knob by its path, as trackers take them: lists and mappings as JSON."""
    values: dict[str, str | int | float | bool | None] = {}
    for path in knobs():
        value: object = settings
        for part in path.split("."):
            value = getattr(value, part)
        plain = isinstance(value, str | int | float | None)
        values[path] = value if plain else json.dumps(value, default=list)  # type: ignore[assignment]
    return values


def _made(name: str, folder: Path) -> GeneralTracker:
    """accelerate's tracker of this name, not started yet. Raises ImportError with the install line."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if name not in [str(known) for known in get_available_trackers()]:
        raise ImportError(f"it is not installed: pip install {INSTALL.get(name, name)}")
    kind = LOGGER_TYPE_TO_CLASS[name]
    tracker: GeneralTracker = kind(folder.name, str(folder)) if kind.requires_logging_directory else kind(PROJECT)
    return tracker
