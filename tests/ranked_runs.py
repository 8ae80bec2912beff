"""Tiny runs that one process or several can train; the processes of `test_ranks.py`.

    torchrun --nproc-per-node 2 ranked_runs.py FOLDER [NAME …]      trains each run of `RUNS` in FOLDER/NAME

The reward posts commands to the run that it belongs to, so that β is turned before update 2 and, in the run `stopped`,
the run ends before update 3. It is asked by the first process alone, and says so where that does not hold. Workers, in
the runs that have some, stand in the first process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from rich.console import Console

import tether.ray_run
from resumable import prefer_short, settings_of, task_of
from stand_in_workers import local_roles
from tether.batch import Prompt
from tether.config import RunSettings
from tether.control import Control
from tether.errors import StopError
from tether.resuming import resume_run
from tether.runtime.ranks import joined
from tether.session import train_run
from tether.task import Judges, Task

STEPS = 5
WORKERS = {"writer": "ray", "ray": {"rollout_workers": 2, "scoring_workers": 1, "object_store_mb": 200}}
REAL_WORKERS = "TETHER_TEST_REAL_WORKERS"
"""Environment variable: workers on a Ray, not in the first process."""
RUNS = {
    "full": settings_of("full", steps=STEPS, controller="fixed"),
    "lora": settings_of("lora", steps=STEPS, controller="fixed"),
    "top": settings_of("top", steps=STEPS, controller="fixed"),
    "full-in-shares": settings_of("full", steps=STEPS, controller="fixed", runtime={"sharding": "fsdp"}),
    "lora-in-shares": settings_of("lora", steps=STEPS, controller="fixed", runtime={"sharding": "fsdp"}),
    "top-in-shares": settings_of("top", steps=STEPS, controller="fixed", runtime={"sharding": "fsdp"}),
    "full-with-workers": settings_of("full", steps=STEPS, controller="fixed", runtime=WORKERS),
    "top-with-workers": settings_of("top", steps=STEPS, controller="fixed", runtime=WORKERS),
    "stopped": settings_of("top", steps=STEPS, controller="fixed"),
    "stopped-in-shares": settings_of("full", steps=STEPS, controller="fixed", runtime={"sharding": "fsdp"}),
}


class Posting:
    """Counts words, and turns the run's β, or stops it, at its own calls."""

    def __init__(self, run: Path, posts: bool = True) -> None:
        self._run, self._posts, self._calls = run, posts, 0

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str], **columns: Sequence[object]) -> list[float]:
        assert os.environ.get("RANK", "0") == "0", "a function is the first process's alone"
        self._calls += len(responses) == 8  # an update's batch; an evaluation has 4
        if not self._posts:
            return self._scores(responses)
        if self._calls == 2 and len(responses) == 8:
            self._post("set", {"ppo.reward.beta": 0.15})
        if self._calls == 3 and len(responses) == 8 and self._run.name.startswith("stopped"):
            self._post("stop", {})
        return self._scores(responses)

    def _scores(self, responses: Sequence[str]) -> list[float]:
        return [0.1 * sum(len(word) % 3 for word in response.split()) for response in responses]

    def _post(self, kind: str, payload: dict[str, object]) -> None:
        with Control.open(self._run, readonly=False) as control:
            control.command("test", kind, payload)


def task(run: Path, posts: bool = True) -> Task:
    return replace(task_of(run.parent / "sft"), judges=Judges(Posting(run, posts), {"gold": prefer_short}))


def train(run: Path, settings: RunSettings, console: Console) -> None:
    with suppress(StopError):
        train_run(task(run), settings, run.parent, run.name, console)


def finish(run: Path, console: Console) -> None:
    """Go on with a run that was stopped; its β stays where it was turned to."""
    resume_run(run, lambda settings: task(run, posts=False), console)


def main() -> None:
    if REAL_WORKERS not in os.environ:
        tether.ray_run.ray_roles = local_roles
    folder, names = Path(sys.argv[1]), sys.argv[2:] or list(RUNS)
    with joined() as ranks:
        console = Console(quiet=not ranks.is_first)
        for name in names:
            ranks.together(lambda run=folder / name: task(run), first_ahead=True)
            train(folder / name, RUNS[name], console)


if __name__ == "__main__":
    main()
