"""What a Ray of one rollout worker costs beside the policy's own sampler, one thread each; and what overlap wins.

    python bench/ray_cost.py [--updates 20]

Start-up is from nothing to a worker that has read its model. Own and remote writing alternate on the same prompts and
weights, so that a loaded machine is unfair to neither; the overhead is the difference of their medians, over the median
of a whole update of the run that is given. Prints one line a number. Wants `pip install 'tether[ray]'`.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from rich.console import Console

from tether.config import RunSettings
from tether.ray_run import ray_roles
from tether.recipe_files import read_recipe
from tether.session import train_run
from tether.store import RunStore
from tether.streams import uniforms
from tether.task import open_policy, source_of
from tether.tasks import open_task


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def run(settings: RunSettings, **runtime: object) -> dict[str, float]:
    """Medians of a run's updates, the first left out; its last score and K, and its wall time."""
    quiet = Console(file=io.StringIO())
    chosen = RunSettings.model_validate(settings.dump() | {"runtime": runtime})
    with tempfile.TemporaryDirectory() as folder:
        task, started = open_task(chosen, quiet), time.perf_counter()
        train_run(task, chosen, Path(folder), "run", quiet)
        wall = time.perf_counter() - started
        with RunStore.open(Path(folder) / "run") as store:
            names = ("seconds/total", "score/mean", "kl/mean")
            curves = {name: curve.values[1:].tolist() for name, curve in store.curves(names).items()}
    late = len(curves["score/mean"]) // 2
    return {
        "wall_seconds": wall,
        "update_seconds": median(curves["seconds/total"]),
        "score": sum(curves["score/mean"][late:]) / max(1, len(curves["score/mean"][late:])),
        "kl": sum(curves["kl/mean"][late:]) / max(1, len(curves["kl/mean"][late:])),
    }


def writing(settings: RunSettings, repeats: int) -> tuple[float, float, float]:
    """Seconds of start-up, and medians of own and remote writing."""
    task = open_task(settings, Console(file=io.StringIO()))
    policy = open_policy(task.model, settings)
    source = source_of(task.train, policy, settings, settings.ppo.batch_size)
    opening = partial(open_policy, task.model, settings)
    started = time.perf_counter()
    with ray_roles(settings, policy, opening, [], {}.__setitem__) as roles:
        begun = time.perf_counter() - started
        own, remote = [], []
        for step in range(repeats):
            prompts = source.batch(step)
            draws = uniforms(0, "response", step, prompts.keys, settings.ppo.sampling.max_new_tokens)
            torch.autograd.graph.increment_version(list(policy.trainable()["policy"]))  # new weights each time
            own.append(seconds(lambda p=prompts, d=draws: policy.generate(p, d, 1.0)))
            remote.append(seconds(lambda p=prompts, d=draws: roles.writer.write(p, d, 1.0)))
    return begun, median(own[1:]), median(remote[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--recipe", default="nano")
    given = parser.parse_args()
    torch.set_num_threads(1)
    settings = read_recipe(given.recipe, [("ppo.steps", str(given.updates))])[0]
    workers = {"rollout_workers": 1, "scoring_workers": 0, "object_store_mb": 200}
    here = RunSettings.model_validate(settings.dump() | {"runtime": {"writer": "ray", "ray": workers}})
    begun, own, remote = writing(here, given.updates)
    alone = run(settings)
    print(f"start-up            {begun:.1f} s")
    print(f"writing, own        {1e3 * own:.1f} ms")
    print(f"writing, one worker {1e3 * remote:.1f} ms")
    print(f"overhead            {(remote - own) / alone['update_seconds']:+.1%} of an update")
    for name, runtime in (("alone", {}), ("ray", {"overlap": False}), ("overlapped", {"overlap": True})):
        made = run(settings, writer="ray", ray=workers, **runtime) if runtime else alone
        print(f"{name:<12}" + "  ".join(f"{key} {value:.3f}" for key, value in made.items()))


if __name__ == "__main__":
    main()
