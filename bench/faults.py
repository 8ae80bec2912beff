"""The confusion matrix of the checks: every fault planted in many runs of the nano world, and clean runs beside them.

    python bench/faults.py                        all of it; what is in the results already is not run again
    python bench/faults.py --seeds 2 --clean 4    a small one, to calibrate with
    python bench/faults.py --only kl_sign top_p   these faults alone; `--report` runs nothing and writes the page
    python bench/faults.py --world smollm2        the lesson's nine on SmolLM2, once, by its own recipe

A run of a fault ends a few updates after its own name was said, or at its limit. Each run is one line of JSON in
`results/faults.jsonl` (`faults-smollm2.jsonl`), so that an interrupted matrix goes on; `fault_report.py` makes
docs/faults.md of the lines.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fault_report import RESULTS, RESULTS_OF_SMOLLM2, write_report
from tether.alarms import FAILURES, FAULTS, Alarm
from tether.config import RunSettings
from tether.errors import AlarmError
from tether.fault_models import replace_attribute
from tether.faults import faulty_settings, planted
from tether.recipe_files import load_recipe
from tether.resuming import resume_run
from tether.session import prepare_process, train_run
from tether.store import RunStore
from tether.task import Judges, Task
from tether.watch import Watch
from tether.world_judges import open_judges
from tether.worlds.world import WorldName, open_world

Act = Callable[[Watch, list[Alarm]], None]
LIMITS = {"invariant": 8, "statistic": 60, "guard": 80, "hack": 80}
"""Updates after which a fault counts as missed, by the kind of its check."""
LONGER = {"adam_spike": 40, "controller_hunts": 80, "entropy_collapse": 160}
CLEAN_UPDATES = 200
AFTER = 3
"""Updates that a run goes on after its fault was named, to see what else is said."""
TRAINED_IN = ("full", "top", "lora")
"""Modes, in turn over the seeds."""
NINE = (
    "wrong_reference", "kl_sign", "dense_reward", "reference_moves", "too_many_epochs", "buzzwords", "sycophancy",
    "hedging", "exploit_token",
)  # fmt: skip
"""The lesson's gotchas and hacks."""


HACKED: dict[str, object] = {"ppo.batch_size": 32}
"""Knobs of the hacks, as the recipe has them: they are climbed, and so want batches that can be climbed on."""


@dataclass(frozen=True)
class Planned:
    """One run of the matrix."""

    fault: str
    """A name of `FAULTS`, or `clean`."""
    seed: int
    changes: dict[str, object]
    """Knobs beside the recipe's, by path."""
    updates: int
    reward: str = "model"
    """`model`, the world's reward model; `gold`, the truth as a function; `whole`, gold in whole numbers."""

    @property
    def key(self) -> str:
        return f"{self.fault}/{self.seed}"


def limit_of(fault: str) -> int:
    """Updates after which it counts as missed."""
    return LONGER.get(fault, LIMITS[FAILURES[fault].kind])


def nine(only: list[str]) -> Iterator[Planned]:
    """The lesson's nine, once, as a recipe has them."""
    for fault in NINE:
        if not only or fault in only:
            yield Planned(fault, 0, {}, limit_of(fault))


def plan(seeds: int, clean: int, only: list[str]) -> Iterator[Planned]:
    """Clean runs first; each fault over seeds, modes in turn."""
    for seed in range(clean if not only or "clean" in only else 0):
        variant = CLEAN[seed % len(CLEAN)]
        yield Planned("clean", seed, dict(variant[1]), CLEAN_UPDATES, variant[0])
    for fault in FAULTS:
        if only and fault not in only:
            continue
        for seed in range(seeds):
            mode = {"model.mode": TRAINED_IN[seed % len(TRAINED_IN)]}
            yield Planned(fault, seed, HACKED if FAILURES[fault].kind == "hack" else mode, limit_of(fault))


CLEAN: tuple[tuple[str, dict[str, object]], ...] = (
    ("model", {}),
    ("model", {"ppo.reward.controller": "adaptive", "ppo.reward.target_kl": 4.0, "ppo.reward.horizon": 400}),
    ("model", {"ppo.sampling.temperature": 0.7}),
    ("model", {"model.mode": "lora"}),
    ("model", {"model.mode": "top", "model.top_layers": 1}),
    ("gold", {"ppo.reward.beta": 0.4}),
    ("whole", {"ppo.reward.beta": 0.4}),
    ("model", {"ppo.batch_size": 8, "ppo.update.minibatches": 2}),
    ("model", {"model.dtype": "bfloat16"}),
    ("model", {"ppo.sampling.samples_per_prompt": 4}),
    ("model", {"ppo.reward.controller": "budget", "ppo.reward.target_kl": 4.0}),
    ("model", {"ppo.sampling.max_new_tokens": 48}),
    ("model", {"ppo.reward.beta": 0.1}),
    ("gold", {"ppo.sampling.temperature": 0.7, "ppo.reward.beta": 0.4}),
    ("model", {"ppo.reward.controller": "adaptive"}),
    ("model", {"ppo.reward.beta": 1.0}),
    ("model", {"model.critic": "split"}),
    ("model", {"ppo.reward.whiten": True}),
    ("model", {"ppo.batch_size": 64}),
    ("model", {"ppo.reward.beta": 0.05}),
)
"""Settings that are right, some of them unusual: (reward, knobs beside the recipe's)."""


def settings_of(planned: Planned, world: WorldName = "nano") -> RunSettings:
    """The world's recipe with small batches, no evaluation to speak of, and the run's own knobs."""
    values = load_recipe(world).dump()
    changes = {
        "ppo.batch_size": 16, "ppo.steps": planned.updates, "ppo.seed": planned.seed, "keep_samples": 0,
        "evaluation.every": 10**6, "evaluation.prompts": 16, "checkpoint.every": 10**6, **planned.changes,
    }  # fmt: skip
    for path, value in changes.items():
        room: dict[str, object] = values
        *parents, knob = path.split(".")
        for parent in parents:
            room = room[parent]  # type: ignore[assignment]
        room[knob] = value
    return RunSettings.model_validate(values)


class Matrix:
    """Runs what is planned, on one world and one pair of reward models."""

    def __init__(self, name: WorldName) -> None:
        prepare_process()
        self.name, self.world = name, open_world(name)
        self.judges = open_judges(self.world, load_recipe(name), Console(stderr=True))

    def run(self, planned: Planned) -> dict[str, object]:
        """One run, as a line of the results."""
        started, folder = time.perf_counter(), Path(tempfile.mkdtemp(prefix="tether-faults-"))
        error = None
        try:
            self._train(planned, folder)
        except AlarmError:
            pass
        except Exception as failure:  # a fault may end its run by an error of its own: that is an answer too
            error = f"{type(failure).__name__}: {failure}"[:200]
        try:
            with RunStore.open(folder / "run") as store:
                said = [
                    [event.step, event.severity, event.kind, str(event.payload.get("seen", ""))[:160]]
                    for event in store.events() if event.severity != "info" and event.kind in FAILURES
                ]  # fmt: skip
                updates = len(store.curve("kl/mean").steps)
        finally:
            shutil.rmtree(folder)
        return {
            "key": planned.key, "fault": planned.fault, "seed": planned.seed, "changes": planned.changes,
            "reward": planned.reward, "updates": updates, "said": said, "error": error,
            "seconds": round(time.perf_counter() - started, 1),
        }  # fmt: skip

    def _train(self, planned: Planned, folder: Path) -> None:
        fault = None if planned.fault == "clean" else planned.fault
        settings = faulty_settings(settings_of(planned, self.name), fault)
        task = Task.of_world(self.world, settings, self._judges(planned.reward))
        console = Console(file=io.StringIO())
        with ExitStack() as stack:
            if fault is not None:
                replace_attribute(stack, Watch, "act", lambda _: _stop_after(fault))
            if fault == "resume_jump":
                self._cut(task, settings, folder, console)
                stack.enter_context(planted(fault))
                resume_run(folder / "run", lambda _: task, console)
                return
            stack.enter_context(planted(fault))
            train_run(task, settings, folder, "run", console)

    def _cut(self, task: Task, settings: RunSettings, folder: Path, console: Console) -> None:
        """A run that stops on its way, with a checkpoint of each update."""
        values = settings.dump()
        values["checkpoint"]["every"] = 1
        with ExitStack() as stack:
            replace_attribute(stack, Watch, "act", lambda _: _stop_at(3))
            try:
                train_run(task, RunSettings.model_validate(values), folder, "run", console)
            except AlarmError:
                return

    def _judges(self, reward: str) -> Judges:
        gold = self.judges.unseen["gold"]
        if reward == "model":
            return self.judges
        scale = 1.0 if reward == "gold" else 2.0
        kind = float if reward == "gold" else round
        return Judges(lambda prompts, texts, **columns: [kind(scale * x) for x in gold(prompts, texts, **columns)])


def _stop_after(fault: str) -> Act:
    """In place of `Watch.act`: ends the run AFTER updates after its fault was named."""
    left = [-1]

    def act(_: Watch, alarms: list[Alarm]) -> None:
        if left[0] < 0 and any(alarm.reason == fault and alarm.severity == "alarm" for alarm in alarms):
            left[0] = AFTER
        if left[0] == 0:
            raise AlarmError("named")
        left[0] -= left[0] > 0

    return act


def _stop_at(updates: int) -> Act:
    left = [updates]

    def act(*_: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise AlarmError("cut")

    return act


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="runs of each fault")
    parser.add_argument("--clean", type=int, default=2 * len(CLEAN), help="clean runs")
    parser.add_argument("--only", nargs="*", default=[], help="faults, or `clean`")
    parser.add_argument("--world", choices=("nano", "smollm2"), default="nano")
    parser.add_argument("--results", type=Path, help="by default the world's own, which the page is made of")
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args()
    results = options.results or (RESULTS if options.world == "nano" else RESULTS_OF_SMOLLM2)
    if not options.report:
        whole = plan(options.seeds, options.clean, options.only)
        run_all(whole if options.world == "nano" else nine(options.only), options.world, results)
    if results in (RESULTS, RESULTS_OF_SMOLLM2):
        write_report()
    return 0


def run_all(planned: Iterable[Planned], world: WorldName, results: Path) -> None:
    """Each run that has no line yet, with a line for it at the end of `results`."""
    lines = results.read_text("utf-8").splitlines() if results.exists() else []
    done = {json.loads(line)["key"] for line in lines}
    left = [one for one in planned if one.key not in done]
    matrix = Matrix(world) if left else None
    for number, one in enumerate(left, start=1):
        assert matrix is not None
        line = matrix.run(one)
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        told = ", ".join(f"{name}@{step}" for step, severity, name, _ in line["said"] if severity == "alarm")
        print(f"{number}/{len(left)} {one.key}: {told or line['error'] or 'silent'} "
              f"({line['updates']} updates, {line['seconds']} s)", flush=True)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
