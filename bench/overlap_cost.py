"""What responses written ahead cost in reward at equal K, over seeds: the same runs with and without `overlap`.

    python bench/overlap_cost.py [--seeds 5] [--updates 30]

With overlap the responses of an update come from the weights of the update before, and each of their tokens counts
min(π/q, cap) times. Who writes changes nothing of that, so the workers stand in this process and no time is measured:
`ray_cost.py` does that. K grows with the updates, so a run is a curve of score over K; a pair of runs of one seed is
compared at the largest K that both reach, after a running mean over five updates. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import io
import math
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

import tether.ray_run
from tether.batch import Reward
from tether.config import RunSettings
from tether.models import LanguagePolicy
from tether.ray_run import Roles
from tether.recipe_files import read_recipe
from tether.remote import Published, RemoteWriter
from tether.session import train_run
from tether.store import RunStore
from tether.task import Task
from tether.tasks import open_task
from tether.workers import WritingWorker

SMOOTHED = 5
"""Updates of the running mean."""


@dataclass(frozen=True)
class There:
    """Answers that have come."""

    answers: list[object]

    def take(self) -> list[object]:
        return self.answers


@dataclass(frozen=True)
class Here:
    """A worker in this process, which answers when it is asked: by the weights of that moment."""

    worker: WritingWorker
    role: str = "rollout"

    def __len__(self) -> int:
        return 1

    def begin(self, operation: str, shares: Sequence[Sequence[object]]) -> There:
        return There([getattr(self.worker, operation)(*shares[0])])


@contextmanager
def roles_here(
    settings: RunSettings,
    policy: LanguagePolicy,
    open_policy: Callable[[], LanguagePolicy],
    rewards: Iterable[Reward],  # noqa: ARG001
    note: Callable[[str, object], None],  # noqa: ARG001
    first: int = 0,
) -> Iterator[Roles]:
    """`ray_run.ray_roles` without Ray."""

    def keep(tensors: Sequence[Tensor]) -> Callable[[], Sequence[Tensor]]:
        kept = [tensor.clone() for tensor in tensors]
        return lambda: kept

    published = Published(policy, keep, first)
    writer = RemoteWriter(Here(WritingWorker(open_policy)), published, bound=int(settings.runtime.overlap))
    yield Roles(writer, None, [])


def curves(task: Task, base: RunSettings, seed: int, overlap: bool) -> tuple[np.ndarray, np.ndarray]:
    """Score and K of each update of one run, smoothed."""
    changed = {"ppo": base.ppo.model_dump() | {"seed": seed}}
    runtime = {"runtime": {"writer": "ray", "overlap": True, "ray": {"scoring_workers": 0}}} if overlap else {}
    settings = RunSettings.model_validate(base.dump() | changed | runtime)
    with tempfile.TemporaryDirectory() as folder:
        train_run(task, settings, Path(folder), "run", Console(file=io.StringIO()))
        with RunStore.open(Path(folder) / "run") as store:
            found = store.curves(("score/mean", "kl/mean"))
            return tuple(_smooth(found[name].values) for name in ("score/mean", "kl/mean"))  # type: ignore[return-value]


def _smooth(values: np.ndarray) -> np.ndarray:
    return np.convolve(values, np.ones(SMOOTHED) / SMOOTHED, mode="valid")


def score_at(kl: float, scores: np.ndarray, kls: np.ndarray) -> float:
    """The score where the run's K first exceeds this one, between updates by a line."""
    place = int(np.argmax(kls >= kl))
    if place == 0:
        return float(scores[0])
    share = (kl - kls[place - 1]) / (kls[place] - kls[place - 1])
    return float(scores[place - 1] + share * (scores[place] - scores[place - 1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--recipe", default="nano")
    given = parser.parse_args()
    torch.set_num_threads(1)
    tether.ray_run.ray_roles = roles_here
    changes = [("ppo.steps", str(given.updates)), ("evaluation.every", "1000")]
    base = read_recipe(given.recipe, changes)[0]
    task, gaps = open_task(base, Console(file=io.StringIO())), []
    print("| seed | score, K | score, K ahead | at equal K | score | score ahead |\n| --- |" + " ---: |" * 5)
    for seed in range(given.seeds):
        (own, own_kl), (ahead, ahead_kl) = (curves(task, base, seed, overlap) for overlap in (False, True))
        kl = float(min(own_kl.max(), ahead_kl.max()))
        pair = score_at(kl, own, own_kl), score_at(kl, ahead, ahead_kl)
        gaps.append(pair[1] - pair[0])
        print(f"| {seed} | {own[-1]:.3f}, {own_kl[-1]:.2f} | {ahead[-1]:.3f}, {ahead_kl[-1]:.2f} | {kl:.2f} "
              f"| {pair[0]:.3f} | {pair[1]:.3f} |", flush=True)  # fmt: skip
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
    print(
        f"\nahead less own at equal K: {statistics.fmean(gaps):+.3f} ± {error:.3f}, mean and standard error over seeds"
    )


if __name__ == "__main__":
    main()
