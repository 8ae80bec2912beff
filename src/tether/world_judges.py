"""A world's own judges: a reward model and its hold-out twin, trained on halves of one set of comparisons, and gold.

Trained once and kept in the cache under a digest of all that they depend on. Read next: `preferences.py`,
`reward_training.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev

from rich.console import Console
from rich.progress import Progress

from tether.batch import Prompt, Reward
from tether.config import RunSettings
from tether.preferences import Pairs, sample_pairs
from tether.prompts import PromptSet
from tether.reward_model import RewardModel
from tether.reward_report import RewardReport
from tether.reward_training import train_two
from tether.session import Judges, judges_folder, open_policy, source_of
from tether.worlds.world import World

PAIRS_AT_ONCE = 32
ROLES = ("reward", "holdout")
GOLD_FILE = "gold.json"


def open_judges(world: World, settings: RunSettings, console: Console) -> Judges:
    """The reward model and the hold-out one of these settings; trained once, later taken from the cache."""
    folder = judges_folder(world, settings)
    if not (folder / "holdout" / "config.json").is_file():
        _train_both(world, settings, folder, console)
    models = [RewardModel.load(folder / role, dtype=settings.model.dtype) for role in ROLES]
    scale = json.loads((folder / GOLD_FILE).read_text("utf-8"))
    gold = StandardGold(world.gold, scale["mean"], scale["std"])
    return Judges(models[0], {"holdout": models[1], "gold": gold})


@dataclass(frozen=True)
class StandardGold:
    """Gold in σ of the SFT model: mean 0 and standard deviation 1 on its own replies, like the reward models."""

    gold: Reward
    mean: float
    std: float

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str], **columns: Sequence[object]) -> list[float]:
        return [(score - self.mean) / self.std for score in self.gold(prompts, responses, **columns)]


def _keep_gold_scale(pairs: Pairs, gold: Reward, path: Path) -> None:
    scores = [*gold(pairs.prompts, pairs.chosen), *gold(pairs.prompts, pairs.rejected)]
    path.write_text(json.dumps({"mean": fmean(scores), "std": pstdev(scores) or 1.0}), "utf-8")


def _train_both(world: World, settings: RunSettings, folder: Path, console: Console) -> None:
    knobs = settings.preferences
    policy = open_policy(settings.model.source or world.model, settings)
    console.print(
        f"{knobs.pairs} comparisons of the SFT model's own replies, labelled by gold with noise {knobs.noise:g}"
    )
    source = source_of(PromptSet(world.train_prompts), policy, settings, PAIRS_AT_ONCE)
    pairs = sample_pairs(
        policy, source, world.gold, knobs.pairs,
        noise=knobs.noise, settings=settings.ppo.sampling, seed=settings.ppo.seed,
    )  # fmt: skip
    del policy
    with Progress(console=console, transient=True) as progress:
        tasks = {role: progress.add_task(f"{role} model", total=None) for role in ROLES}
        two = train_two(
            pairs, world.model, top_layers=knobs.top_layers, learning_rate=knobs.learning_rate,
            batch_pairs=knobs.batch_pairs, seed=settings.ppo.seed, dtype=settings.model.dtype,
            progress=lambda role, done, total, _: progress.update(tasks[role], completed=done, total=total),
        )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    _keep_gold_scale(pairs, world.gold, folder / GOLD_FILE)
    for role, model, report in zip(
        ROLES, (two.reward, two.holdout), (two.reward_report, two.holdout_report), strict=True
    ):
        model.save_pretrained(folder / role)
        console.print(_report_line(role, report), soft_wrap=True)
        for warning in report.warnings:
            console.print(f"  warning: {warning}", soft_wrap=True)


def _report_line(role: str, report: RewardReport) -> str:
    known = [("best possible", report.ceiling_accuracy), ("correlation with gold", report.gold_pearson)]
    notes = "".join(f", {name} {number:.2f}" for name, number in known if number is not None)
    return (
        f"{role} model: accuracy {report.accuracy:.3f} ± {report.accuracy_se:.3f} on {report.pairs} held-out "
        f"comparisons (bag of words {report.floor_accuracy:.3f}{notes}), "
        f"correlation with length {report.length_correlation:+.2f}"
    )
