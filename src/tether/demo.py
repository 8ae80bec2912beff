"""`tether demo`: the lesson's exercise end to end, with and without the string.

    preferences → two reward models → 100 updates at the recipe's β → 100 at β = 0 from the same seeds
    → best-of-n from the reference → curves.png, frontier.png, samples.md, summary

Each phase leaves its result in the output folder or the cache; a demo that was stopped goes on with the phase that was
not finished. Knows no training: that is `session.py`.
"""

from __future__ import annotations

import json as jsonlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tether.bank import BANK_FILE, bank_of
from tether.config import RunSettings
from tether.database import to_json
from tether.errors import ModelError, RunError
from tether.evaluation import BestOf, best_of_n, draw_scores
from tether.page.report import write_report
from tether.plots import BestOfN, Trail, moving_mean, plot_curves, plot_frontier
from tether.recipe_files import load_recipe
from tether.records import Sample
from tether.resuming import resume_run
from tether.session import prepare_process, train_run
from tether.store import RunStore
from tether.task import Task, open_policy, source_of
from tether.terminal import console_beside
from tether.world_judges import open_judges
from tether.worlds.world import World, WorldName, open_world

STRING, NO_STRING = "string", "no-string"
SHOWN_PROMPTS = 8
FRONTIER_TRAILS: tuple[tuple[str, str, Literal["proxy", "gold"]], ...] = (
    ("score/mean", "eval/score", "proxy"),
    ("score/gold", "eval/gold", "gold"),
)
BAND_UPDATES = 30
"""Updates at the end over which K is called a band."""


@dataclass(frozen=True)
class Outcome:
    """What the demo found, read from its run folders."""

    runs: Mapping[str, RunStore]
    best_of: Sequence[BestOf]
    settings: RunSettings


def main(
    world: WorldName = "smollm2",
    out: Path | None = None,
    steps: int | None = None,
    seed: int = 0,
    json: bool = False,
) -> None:
    """RLHF with PPO end to end: reward models, a run on the string, one without, pictures, samples.

    world: `smollm2` trains SmolLM2-135M-Instruct, `nano` a small language in about a minute with no download.
    out: folder for everything; `demo` or `demo-nano` by default. steps: updates of each run. seed: of every stream.
    json: print the summary as one JSON object.
    """
    prepare_process()
    console = console_beside(json)
    place = _open_or_fall_back(world, console)
    settings = load_recipe(place.name).with_seed(seed)
    settings = settings.with_steps(steps) if steps is not None else settings
    out = out or Path("demo" if place.name == "smollm2" else f"demo-{place.name}")
    task = Task.of_world(place, settings, open_judges(place, settings, console))
    loose = settings.with_beta(0.0)
    folders = {
        STRING: finished_run(task, settings, out / "runs", STRING, console),
        NO_STRING: finished_run(task, loose, out / "runs", NO_STRING, console),
    }
    best_of = best_of_reference(task, settings, out / "best_of_n.json", list(folders.values()), console)
    outcome = Outcome({name: RunStore.open(folder) for name, folder in folders.items()}, best_of, settings)
    pictures = [draw_curves(outcome, out), draw_frontier(outcome, out), write_samples(outcome, out)]
    if json:
        print(jsonlib.dumps(summary(outcome)))
        return
    print_summary(outcome, console)
    written = [*pictures, *folders.values(), *_report(list(folders.values()), out / "report.html", console)]
    console.print("\n".join(f"wrote {path}" for path in written), soft_wrap=True)
    console.print(f"look at both runs, and drag β on a live one: tether ui {out / 'runs'} --play", soft_wrap=True)


def _report(folders: Sequence[Path], target: Path, console: Console) -> list[Path]:
    """The page of both runs in one offline file; none where the page is not built."""
    try:
        return [write_report(folders, target)]
    except RunError as error:
        console.print(str(error), soft_wrap=True)
        return []


def _open_or_fall_back(name: WorldName, console: Console) -> World:
    try:
        return open_world(name)
    except ModelError as error:
        if name == "nano":
            raise
        console.print(f"{error}\nGoing on with the nano world, which needs no download.", soft_wrap=True)
        return open_world("nano")


def finished_run(task: Task, settings: RunSettings, root: Path, name: str, console: Console) -> Path:
    """The folder of a finished run with these settings: the one that is there, gone on with if need be, or a new one.

    A run that is there and had other settings is kept under another name.
    """
    folder = root / name
    if folder.exists():
        if has_settings(folder, settings):
            return resume_run(folder, lambda _: task, console, settings)
        aside = next(kept for n in range(1, 10_000) if not (kept := root / f"{name}.kept-{n}").exists())
        folder.rename(aside)
        console.print(f"{name}: what was there is kept as {aside}", soft_wrap=True)
    return train_run(task, settings, root, name, console)


def has_settings(folder: Path, settings: RunSettings) -> bool:
    """Whether the folder holds a run of exactly these settings."""
    try:
        with RunStore.open(folder) as store:
            return store.meta().get("config") == settings.dump()
    except RunError:
        return False


def best_of_reference(
    task: Task, settings: RunSettings, path: Path, folders: Sequence[Path], console: Console
) -> list[BestOf]:
    """Best-of-n from the reference, the baseline that needs no training; kept in `path`.

    The scores that it is drawn from are left in the run folders for the page's ghost, a bank at least as large as what
    the runs drew for it themselves.
    """
    if path.is_file():
        kept = jsonlib.loads(path.read_text("utf-8"))
        if kept["settings"] == settings.dump():
            return [BestOf(**entry) for entry in kept["best_of"]]
    policy = open_policy(task.model, settings)
    prompts = task.heldout.first(settings.evaluation.best_of_prompts)
    source = source_of(prompts, policy, settings, 1, max(settings.evaluation.best_of))
    ns, knobs = settings.evaluation.best_of, settings.ppo
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task(f"best of {max(ns)} from the reference", total=len(prompts))
        scores, gold = draw_scores(
            policy, source, task.judges.all, knobs.sampling, knobs.seed,
            lambda done: progress.update(bar, completed=done),
        )  # fmt: skip
    for folder in folders:
        (folder / BANK_FILE).write_text(to_json(bank_of(scores, gold)), "utf-8")
    best_of = [best_of_n(scores, gold, n) for n in ns]
    entries = [{"n": best.n, "score": best.score, "gold": best.gold} for best in best_of]
    path.write_text(jsonlib.dumps({"settings": settings.dump(), "best_of": entries}), "utf-8")
    return best_of


def draw_curves(outcome: Outcome, out: Path) -> Path:
    """Reward and KL of both runs on one step axis."""
    return plot_curves([(_label(store), store) for store in outcome.runs.values()], out / "curves.png")


def draw_frontier(outcome: Outcome, out: Path) -> Path:
    """Gain over √K: both runs by the reward and by gold, best-of-n, and the ceiling; all in σ."""
    trails: list[Trail] = []
    for store in outcome.runs.values():
        kl = moving_mean(np.maximum(store.curve("kl/mean").values, 0.0)).tolist()
        for metric, start_metric, kind in FRONTIER_TRAILS:
            values = moving_mean(store.curve(metric).values)
            start = float(store.curve(start_metric).values[0])
            trails.append(Trail(_label(store), kl, (values - start).tolist(), kind))
    start = float(outcome.runs[STRING].curve("eval/score").values[0])
    best = [BestOfN(best.n, best.score - start) for best in outcome.best_of]
    return plot_frontier(trails, best, 1.0, out / "frontier.png")


def _label(store: RunStore) -> str:
    return f"β = {store.curve('beta').values[0]:g}"


def write_samples(outcome: Outcome, out: Path) -> Path:
    """The same held-out prompts before and after, with and without string, with every judge's score."""
    last = outcome.settings.ppo.steps
    columns = {
        "update 0: the SFT model": outcome.runs[STRING].samples(0, "probe"),
        f"update {last}, on the string": outcome.runs[STRING].samples(last, "probe"),
        f"update {last}, no string": outcome.runs[NO_STRING].samples(last, "probe"),
    }
    lines = ["# The same prompts, before and after", ""]
    lines += ["Score is what PPO climbs, gold the truth that it never saw, both in σ of the SFT model; KL in nats.", ""]
    for row in range(min(SHOWN_PROMPTS, *map(len, columns.values()))):
        lines += [f"## {next(iter(columns.values()))[row].prompt}", ""]
        for title, samples in columns.items():
            lines += [_sample_heading(title, samples[row]), "", _quoted(samples[row].response), ""]
    path = out / "samples.md"
    path.write_text("\n".join(lines), "utf-8")
    return path


def _sample_heading(title: str, sample: Sample) -> str:
    return f"**{title}** · score {sample.score:+.2f} · gold {_gold(sample):+.2f} · KL {sample.kl:.1f}"


def _gold(sample: Sample) -> float:
    return float(str(sample.columns["gold"]))


def _quoted(text: str) -> str:
    shown = text.strip() or "(nothing)"
    return "\n".join(f"> {line}" for line in shown.splitlines())


def summary(outcome: Outcome) -> dict[str, object]:
    """The numbers of the summary, for programs."""
    runs = {
        name: {key: float(store.curve(key).values[-1]) for key in EVALUATED} for name, store in outcome.runs.items()
    }
    start = {key: float(outcome.runs[STRING].curve(key).values[0]) for key in EVALUATED}
    band = {name: kl_band(store) for name, store in outcome.runs.items()}
    best = [{"n": best.n, "score": best.score, "gold": best.gold, "kl": best.kl} for best in outcome.best_of]
    return {"world": outcome.settings.world, "sft": start, "runs": runs, "kl_band": band, "best_of_n": best}


EVALUATED = (
    "eval/score", "eval/score_se", "eval/holdout", "eval/holdout_se", "eval/gold", "eval/gold_se", "eval/kl",
    "eval/kl_se", "eval/distinct_2", "eval/length", "eval/win_rate", "eval/win_rate_low", "eval/win_rate_high",
)  # fmt: skip


def kl_band(store: RunStore) -> tuple[float, float]:
    """Mean and standard deviation of K over the last 30 updates, nats per response."""
    last = store.curve("kl/mean").values[-BAND_UPDATES:]
    return float(last.mean()), float(last.std())


def print_summary(outcome: Outcome, console: Console) -> None:
    """One line a policy, within 80 columns."""
    table = Table(title="on held-out prompts", box=None, pad_edge=False, title_justify="left")
    for head in ("policy", "score", "hold-out", "gold", "KL", "distinct-2", "win rate, 95 %"):
        table.add_column(head, justify="left" if head == "policy" else "right", no_wrap=True)
    store = outcome.runs[STRING]
    table.add_row("SFT model", *_row({key: store.curve(key).values[0] for key in EVALUATED}))
    for store in outcome.runs.values():
        table.add_row(f"PPO, {_label(store)}", *_row({key: store.curve(key).values[-1] for key in EVALUATED}))
    for best in outcome.best_of:
        table.add_row(f"best of {best.n}", f"{best.score:+.2f}", "", f"{best.gold:+.2f}", f"{best.kl:.1f}", "", "")
    console.print(table)
    console.print("gold: ± one standard error. win rate: by gold against the SFT model's reply, prompt by prompt.")
    for store in outcome.runs.values():
        mean, spread = kl_band(store)
        console.print(f"{_label(store)}: KL over the last {BAND_UPDATES} updates {mean:.1f} ± {spread:.1f} nats")


def _row(values: Mapping[str, float]) -> list[str]:
    win = f"{values['eval/win_rate']:.0%} [{values['eval/win_rate_low']:.0%}, {values['eval/win_rate_high']:.0%}]"
    return [
        f"{values['eval/score']:+.2f}", f"{values['eval/holdout']:+.2f}",
        f"{values['eval/gold']:+.2f} ± {values['eval/gold_se']:.2f}", f"{values['eval/kl']:.1f}",
        f"{values['eval/distinct_2']:.2f}", win,
    ]  # fmt: skip
