"""The proof that runs: PPO in a world whose optimum is known, by the very rooms that train language models.

`tether ladder exact --beta 0.5` trains and prints how far from the best possible policy it ended; `--sweep` does so for
several strings, checks the chord law and draws the frontier with the trained points on it.
"""

from __future__ import annotations

import json as jsonlib
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tether.config import PPOSettings, RewardSettings, SamplingSettings, UpdateSettings
from tether.errors import InputError
from tether.prompts import PromptSource
from tether.trainer import Record, Run, advance
from tether.worlds.exact import ExactWorld, Standing, TabularPolicy, chord_law, frontier, standing

SWEEP = (0.1, 0.2, 0.5, 1.0)
CHORD_TOLERANCE = 0.02
"""Relative room for the noise of training in the chord law."""


def settings(world: ExactWorld, beta: float, steps: int, seed: int) -> PPOSettings:
    """The knobs that take a table to its optimum: big batches, steps that shrink to nothing."""
    return PPOSettings(
        sampling=SamplingSettings(max_new_tokens=world.length, samples_per_prompt=512),
        reward=RewardSettings(beta=beta),
        update=UpdateSettings(
            learning_rate=0.02, value_clip_range=None, minibatches=1, max_grad_norm=None, early_stop_kl=None,
            adam_epsilon=1e-8, tokens_per_micro_batch=1_000_000,
        ),
        batch_size=512 * world.prompts, steps=steps, seed=seed,
    )  # fmt: skip


def prompt_source(world: ExactWorld, knobs: PPOSettings) -> PromptSource:
    """The world's prompts; each is one token beyond the vocabulary of responses."""
    return PromptSource(
        texts=tuple(f"p{number}" for number in range(world.prompts)),
        ids=tuple((world.tokens + number,) for number in range(world.prompts)),
        prompts_per_batch=world.prompts,
        samples_per_prompt=knobs.sampling.samples_per_prompt,
        seed=knobs.seed,
    )


def train_exact(
    world: ExactWorld, beta: float, *, steps: int = 400, seed: int = 0, progress: Console | None = None
) -> Standing:
    """Train by PPO from the reference and say, by enumeration, where the policy ended.

    Raises InputError where β is not above 0: without a string the optimum has no finite K to compare with.
    """
    if not beta > 0:
        raise InputError(f"beta is {beta}; the exact optimum wants beta > 0. Try --beta 0.1")
    knobs = settings(world, beta, steps, seed)
    policy = TabularPolicy(world)
    run = Run(policy, world.score_text, prompt_source(world, knobs), knobs, keep=_forget)
    updates = range(knobs.steps)
    shown = track(updates, f"β = {beta:g}", console=progress, transient=True) if progress else updates
    for _ in shown:
        advance(run)
    return standing(world, policy.logits.detach(), beta)


def train_all(
    world: ExactWorld, betas: Sequence[float], steps: int, seed: int, progress: Console | None = None
) -> list[Standing]:
    """One run for each β; several share the cores, a process each."""
    if len(betas) == 1:
        return [train_exact(world, betas[0], steps=steps, seed=seed, progress=progress)]
    jobs = [(world, beta, steps, seed) for beta in betas]
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1), get_context("spawn")) as pool:
        shown = pool.map(_train_alone, jobs)
        return list(track(shown, "strings", len(jobs), console=progress, transient=True) if progress else shown)


def _train_alone(job: tuple[ExactWorld, float, int, int]) -> Standing:
    world, beta, steps, seed = job
    torch.set_num_threads(1)
    return train_exact(world, beta, steps=steps, seed=seed)


def _forget(record: Record) -> None:
    """What is asked of this world is read off its tables at the end."""


def main(
    beta: float = 0.5, sweep: bool = False, steps: int = 400, seed: int = 0, out: Path = Path("."), json: bool = False
) -> None:
    """Train in the exact world and print regret, K against K* and flatness.

    beta: β, the string. sweep: train at β = 0.1, 0.2, 0.5 and 1, check the chord law, draw `exact_frontier.png`.
    steps: PPO updates. seed: of world and run. out: folder of the picture. json: one object, no table.
    """
    console = Console()
    world = ExactWorld.create(seed=seed)
    betas = SWEEP if sweep else (beta,)
    progress = console if console.is_terminal and not json else None
    standings = train_all(world, betas, steps, seed, progress)
    broken = chord_law([(s.beta, s.score, s.kl) for s in standings], CHORD_TOLERANCE)
    picture = draw(world, standings, out / "exact_frontier.png") if sweep else None
    if json:
        one = asdict(standings[0])
        print(jsonlib.dumps(one if not sweep else {"runs": [asdict(s) for s in standings], "chord_law_broken": broken}))
        return
    console.print(_table(standings))
    if sweep:
        console.print(
            f"chord law: {'holds' if not broken else '; '.join(broken)}\nfrontier:  {picture}", highlight=False
        )


def _table(standings: Sequence[Standing]) -> Table:
    table = Table(title="PPO against the exact optimum (σ = 1, nats per response)")
    for head in ("β", "score", "score*", "K", "K*", "K/K* − 1", "regret", "flatness"):
        table.add_column(head, justify="right")
    for s in standings:
        table.add_row(
            f"{s.beta:g}", f"{s.score:.3f}", f"{s.score_optimum:.3f}", f"{s.kl:.3f}", f"{s.kl_optimum:.3f}",
            f"{s.kl / s.kl_optimum - 1:+.2%}", f"{s.regret:.4f}", f"{s.flatness:.4f}",
        )  # fmt: skip
    return table


def draw(world: ExactWorld, standings: Sequence[Standing], path: Path) -> Path:
    """The whole frontier, the ceiling σ√(2K), and the trained points: score over √K."""
    from matplotlib.figure import Figure

    curve = frontier(world, list(np.geomspace(0.03, 30.0, 120)))
    figure = Figure(figsize=(7.5, 4.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    roots = np.sqrt([point.kl for point in curve])
    axes.plot(roots, np.sqrt(2.0) * roots, color="#999999", ls=":", label="ceiling σ√(2K)")
    axes.plot(roots, [point.score for point in curve], color="#0072B2", label="exact frontier: π* of every β")
    axes.plot(
        [s.kl**0.5 for s in standings], [s.score for s in standings], "o", ms=7, mfc="none", mew=1.8, color="#D55E00",
        label="trained by PPO",
    )  # fmt: skip
    for s in standings:
        axes.annotate(f"β = {s.beta:g}", (s.kl**0.5, s.score), xytext=(8, -12), textcoords="offset points", fontsize=9)
    axes.set(xlabel="√K, K in nats per response", ylabel="mean score, in σ")
    axes.set_title("Every point of the string's frontier can be computed; PPO lands on it")
    axes.set_ylim(0, max(point.score for point in curve) * 1.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
