"""A world's own judges: a reward model and its hold-out twin, trained on halves of one set of comparisons, and gold.

Trained once and kept in the cache under a digest of all that they depend on. Read next: `preferences.py`,
`reward_training.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, pstdev

from rich.console import Console

from tether import __version__
from tether.batch import Prompt, Reward
from tether.config import RunSettings
from tether.phases import phases
from tether.places import cache_folder
from tether.preferences import Pairs, sample_pairs
from tether.prompts import PromptSet
from tether.reward_model import RewardModel
from tether.reward_training import train_two
from tether.task import Judges, open_policy, source_of
from tether.worlds.world import World

REPLIES_AT_ONCE = 64
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


def judges_folder(world: World, settings: RunSettings) -> Path:
    """Where the two reward models of these settings are kept: equal settings and seeds share them."""
    recipe = {
        "version": __version__,
        "world": world.name,
        "model": settings.model.source or world.model.name,
        "preferences": settings.preferences.model_dump(),
        "sampling": settings.ppo.sampling.model_dump(exclude={"importance_cap"}),  # which no sample depends on
        "seed": settings.ppo.seed,
    }
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    return cache_folder() / "rewards" / f"{world.name}-{digest}"


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


def world_pairs(world: World, settings: RunSettings, console: Console) -> Pairs:
    """Comparisons of the SFT model's own replies, labelled by the world's gold scorer with the recipe's noise."""
    knobs, started = settings.preferences, settings.model.source or world.model
    policy = open_policy(started, settings)
    source = source_of(PromptSet(world.train_prompts), policy, settings, max(1, REPLIES_AT_ONCE // knobs.replies))
    with phases(console) as tell:
        pairs = sample_pairs(
            policy, source, world.gold, knobs.pairs, noise=knobs.noise, settings=settings.ppo.sampling,
            seed=settings.ppo.seed, replies=knobs.replies, progress=partial(tell, "comparisons"),
        )  # fmt: skip
    console.print(
        f"{len(pairs)} comparisons of the SFT model's own replies, {knobs.replies} to a prompt, labelled by gold with "
        f"noise {knobs.noise:g}",
        soft_wrap=True,
    )
    return pairs


def _train_both(world: World, settings: RunSettings, folder: Path, console: Console) -> None:
    knobs, pairs = settings.preferences, world_pairs(world, settings, console)
    with phases(console) as tell:
        two = train_two(
            pairs, world.model, top_layers=knobs.top_layers, epochs=knobs.epochs, learning_rate=knobs.learning_rate,
            batch_pairs=knobs.batch_pairs, seed=settings.ppo.seed, dtype=settings.model.dtype,
            progress=lambda role, done, total, loss: tell(f"{role} model", done, total, f"loss {loss:.3f}"),
        )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    _keep_gold_scale(pairs, world.gold, folder / GOLD_FILE)
    for role, model, report in zip(
        ROLES, (two.reward, two.holdout), (two.reward_report, two.holdout_report), strict=True
    ):
        model.save_pretrained(folder / role)
        console.print(report.line(role), soft_wrap=True)
        for warning in report.warnings:
            console.print(f"  warning: {warning}", soft_wrap=True)
