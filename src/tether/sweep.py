"""`tether sweep`: real runs on strings of several lengths, one frontier, the chord law, the text at each β."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from tether.demo import finished_run
from tether.errors import ConfigError
from tether.plots import SweepPoint, Trail, plot_frontier
from tether.recipe_files import load_recipe
from tether.session import prepare_process
from tether.store import RunStore
from tether.task import Task
from tether.terminal import console_beside
from tether.world_judges import open_judges
from tether.worlds.exact import chord_law
from tether.worlds.world import WorldName, open_world

AT_REST = 20
"""Updates at the end whose mean is a run's place on the frontier."""
SHOWN_PROMPTS = 4


@dataclass(frozen=True)
class Point:
    """Where the run of one β came to rest: means over its last updates, with their standard errors."""

    beta: float
    score: float
    score_se: float
    kl: float
    kl_se: float
    gold: float
    distinct_2: float
    text: str


def main(
    beta: tuple[float, ...] = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5),
    world: WorldName = "nano",
    out: Path = Path("sweep"),
    steps: int | None = None,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Train one run for each β from the same seeds, draw the frontier, check the chord law.

    beta: the strings. world: `nano` or `smollm2`. out: folder of runs, `frontier.png` and `texts.md`. steps: updates of
    each run. seed: of every stream. json: one object instead of the table.
    """
    prepare_process()
    console = console_beside(json)
    if len(set(beta)) < 2 or min(beta) < 0:
        raise ConfigError(f"a sweep wants at least two different β ≥ 0; got {list(beta)}. Try --beta 0 0.05 0.2")
    place = open_world(world)
    settings = load_recipe(world).with_seed(seed)
    settings = settings.with_steps(steps) if steps is not None else settings
    task = Task.of_world(place, settings, open_judges(place, settings, console))
    stores = [
        RunStore.open(finished_run(task, settings.with_beta(b), out / "runs", f"beta-{b:g}", console))
        for b in sorted(set(beta))
    ]
    points = [at_rest(store) for store in stores]
    strung = [p for p in points if p.beta > 0]
    broken = chord_law([(p.beta, p.score, p.kl) for p in strung], errors=[(p.score_se, p.kl_se) for p in strung])
    picture, texts = _draw(stores, points, out), _write_texts(stores, out / "texts.md")
    if json:
        print(jsonlib.dumps({"points": [asdict(p) for p in points], "chord_law_broken": broken}))
        return
    console.print(_table(points))
    told = "holds, within two standard errors" if not broken else "; ".join(broken)
    console.print(f"chord law: {told}", soft_wrap=True)
    console.print(f"wrote {picture}\nwrote {texts}", soft_wrap=True)


def at_rest(store: RunStore) -> Point:
    """The run's last updates as one point."""

    def last(name: str) -> tuple[float, float]:
        values = store.curve(name).values[-AT_REST:]
        return float(np.nanmean(values)), float(np.nanstd(values) / len(values) ** 0.5)

    (score, score_se), (kl, kl_se) = last("score/mean"), last("kl/mean")
    probes = store.samples(split="probe")
    return Point(
        last("beta")[0], score, score_se, kl, kl_se, last("score/gold")[0], last("distinct_2")[0],
        probes[-1].response if probes else "",
    )  # fmt: skip


def _table(points: Sequence[Point]) -> Table:
    table = Table(title="where each string came to rest", box=None, pad_edge=False, title_justify="left")
    for head in ("β", "score", "KL", "gold", "distinct-2", "a reply"):
        table.add_column(head, justify="left" if head == "a reply" else "right", no_wrap=head != "a reply")
    for p in points:
        table.add_row(
            f"{p.beta:g}", f"{p.score:+.2f} ± {p.score_se:.2f}", f"{p.kl:z.2f} ± {p.kl_se:.2f}", f"{p.gold:+.2f}",
            f"{p.distinct_2:.2f}", p.text,
        )  # fmt: skip
    return table


def _draw(stores: Sequence[RunStore], points: Sequence[Point], out: Path) -> Path:
    start = float(np.mean([store.curve("eval/score").values[0] for store in stores]))
    trails = [Trail(f"β = {p.beta:g}", [max(p.kl, 0.0)], [p.score - start]) for p in points if p.beta == 0]
    chords = [SweepPoint(p.beta, max(p.kl, 0.0), p.score - start, p.kl_se, p.score_se) for p in points if p.beta > 0]
    return plot_frontier(trails, [], 1.0, out / "frontier.png", chords)


def _write_texts(stores: Sequence[RunStore], path: Path) -> Path:
    lines = ["# What the text reads like on each string", ""]
    for row in range(SHOWN_PROMPTS):
        for store in stores:
            last = [sample for sample in store.samples(store.last_step(), "probe") if sample.row == row]
            for sample in last:
                if store is stores[0]:
                    lines += [f"## {sample.prompt}", ""]
                beta = store.curve("beta").values[0]
                lines += [f"**β = {beta:g}** · score {sample.score:+.2f} · KL {sample.kl:.1f}", ""]
                lines += [f"> {sample.response.strip() or '(nothing)'}", ""]
    path.write_text("\n".join(lines), "utf-8")
    return path
