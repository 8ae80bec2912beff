"""A tiny run on a Ray of its own, which a process of its own can train, be killed in, and go on with.

python ray_run_of.py FOLDER [overlap] [UPDATES]       starts the run there, or goes on with it
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from rich.console import Console

from resumable import settings_of, task_of
from tether.config import RunSettings
from tether.resuming import resume_run
from tether.session import train_run
from tether.store import RunStore

STEPS = 6
WORKERS = {"rollout_workers": 2, "scoring_workers": 1, "object_store_mb": 200, "answer_seconds": 240}


def on_ray(*, overlap: bool = False, mode: str = "full", steps: int = STEPS, **ray: object) -> RunSettings:
    """Settings of a tiny run with workers, a checkpoint after every update."""
    runtime = {"writer": "ray", "overlap": overlap, "ray": WORKERS | ray}
    return settings_of(mode, steps=steps, runtime=runtime)


def updates_of(run: Path) -> int:
    """Updates that the run folder holds; 0 where there is none."""
    if not (run / "run.db").is_file():
        return 0
    with RunStore.open(run) as store:
        last = store.last_step()
    return 0 if last is None else last + 1


def main(folder: str, overlap: str = "", updates: str = str(STEPS)) -> None:
    torch.set_num_threads(1)
    run, console = Path(folder), Console(file=sys.stderr)
    task = task_of(run.parent / "sft")
    if (run / "run.db").is_file():
        resume_run(run, lambda _: task, console)
    else:
        train_run(task, on_ray(overlap=bool(overlap), steps=int(updates)), run.parent, run.name, console)


if __name__ == "__main__":
    main(*sys.argv[1:])
