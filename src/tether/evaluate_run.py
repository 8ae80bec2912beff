"""`tether eval RUN`: a run's policy beside its reference on held-out prompts, by every judge.

For each judge: mean of both, the gain prompt by prompt, what is left of it at equal length, and the win rate with its
interval; beside them K, length and diversity, and best-of-n of the reference, which is what no training buys. The same
uniform numbers draw both, as in the run's own evaluations.
"""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from tether.config import RunSettings
from tether.database import to_json
from tether.errors import ConfigError
from tether.evaluation import (
    BestOf,
    Gain,
    Judged,
    WinRate,
    draw_best_of_n,
    evaluate,
    gain,
    standard_error,
    win_rate,
)
from tether.identity import of_reward
from tether.knobs import read_settings
from tether.memory_plan import memory_errors_explained
from tether.models import LanguagePolicy
from tether.resume import Trained, find_point, open_trained
from tether.runs import ROOT
from tether.session import prepare_process
from tether.task import Task, heldout_source, open_policy, source_of
from tether.tasks import open_task
from tether.terminal import console_beside

WANTED = {"reward": "FILE.py:NAME", "prompts": "FILE"}
"""What the flags take, as errors say it."""
LABELS = {"score": "score (proxy)", "holdout": "hold-out", "gold": "gold"}


@dataclass(frozen=True)
class Flags:
    """Flags of `tether eval`."""

    run: Positional[str]
    """RUN or RUN@STEP: name or path of the run, and the update; by default its last checkpoint."""
    prompts: str | None = None
    """Held-out prompts of your own: a file or a hub data set."""
    prompt_column: str | None = None
    """What their column is called; by default as in the run."""
    split: str | None = None
    """Their split, where they are a hub data set; by default as in the run."""
    count: int | None = None
    """Prompts at most; by default as many as the run's own evaluations."""
    reward: str | None = None
    """The reward, where the run got it from Python."""
    judge: str | None = None
    """A judge of your own, as FILE.py:NAME or whatever a reward may be."""
    timeout: float | None = None
    """Seconds that the reward and the judge have for a batch; by default as the run has it, else no limit."""
    model: str | None = None
    """The SFT checkpoint, where it no longer lies where the run found it."""
    best_of: bool = True
    """Draw best-of-n of the reference too; `--no-best-of` leaves it out."""
    json: bool = False
    """Print one JSON object."""
    root: Path = ROOT
    """The folder that holds the run folders."""


@dataclass(frozen=True)
class Verdict:
    """One judge on both policies."""

    reference: float
    policy: float
    policy_se: float
    gain: Gain
    win_rate: WinRate


@dataclass(frozen=True)
class Report:
    """What held-out prompts say of a run."""

    step: int
    prompts: int
    kl: float
    kl_se: float
    length: tuple[float, float]
    """Mean tokens a response: reference, policy."""
    distinct_2: tuple[float, float]
    judges: Mapping[str, Verdict]
    best_of: tuple[BestOf, ...]
    """Of the reference."""


def main(flags: Flags) -> None:
    """Compare a run's policy with the model that it started from, on prompts that it was not trained on."""
    prepare_process()
    console = console_beside(flags.json)
    folder, step = find_point(flags.run, flags.root)
    trained = open_trained(folder, step, flags.model)
    settings = _settings(flags, trained, folder)
    with memory_errors_explained(settings), redirect_stdout(sys.stderr if flags.json else sys.stdout):
        task = open_task(settings, console)
        foreign = _another_reward(trained, task, folder)
        if foreign:
            console.print(f"warning: {foreign}", soft_wrap=True, markup=False)
        report = evaluate_run(task, settings, trained.policy, trained.checkpoint.step, best_of=flags.best_of)
    if flags.json:
        told = {"run": str(folder), "warnings": [foreign] if foreign else []}
        print(jsonlib.dumps(told | jsonlib.loads(to_json(asdict(report)))))
    else:
        show(report, console)


def _settings(flags: Flags, trained: Trained, folder: Path) -> RunSettings:
    """The run's settings with what was given beside them.

    Raises ConfigError, naming the flag, where prompts or reward came from Python and are not given.
    """
    own = trained.settings
    needed = [("reward", own.reward.is_given or flags.reward), ("prompts", own.data.prompts or flags.prompts)]
    lacking = [f"--{name} {WANTED[name]}" for name, known in needed if own.world is None and not known]
    if lacking:
        raise ConfigError(
            f"{folder} does not say what its {' and '.join(name for name, known in needed if not known)} were, which "
            f"came from Python; give them: {' '.join(lacking)}"
        )
    given: dict[str, object] = {
        "data.prompts": flags.prompts, "data.heldout": flags.prompts, "data.prompt_column": flags.prompt_column,
        "data.split": flags.split, "evaluation.prompts": flags.count,
        "model.source": None if own.world else str(trained.source),
    }  # fmt: skip
    for name, source in (("reward", flags.reward), ("judge", flags.judge)):
        if source is not None:
            given |= {f"{name}.source": source, f"{name}.parts": {}, f"{name}.ensemble": ()}
        given[f"{name}.timeout_seconds"] = flags.timeout
    overrides = [(path, value) for path, value in given.items() if value is not None]
    return read_settings(own.dump(), overrides, str(folder))[0]


def _another_reward(trained: Trained, task: Task, folder: Path) -> str | None:
    """What a reader should know where the score is not that of the reward which the run climbed."""
    recorded = trained.checkpoint.identity.digests.get("reward")
    if recorded is None or recorded == of_reward(task.judges.reward):
        return None
    return (
        f"the score below is not that of the reward which {folder} was trained against: it changed since, or came "
        f"from Python; give that one for its score: --reward {WANTED['reward']}"
    )


def evaluate_run(
    task: Task, settings: RunSettings, policy: LanguagePolicy, step: int, *, best_of: bool = True
) -> Report:
    """The policy and its reference on the task's held-out prompts."""
    before, best = _reference(task, settings, best_of)
    after = _judged(task, settings, policy)
    longer = after.lengths - before.lengths
    judges = {
        name: Verdict(
            float(before.scores[name].mean()), float(scores.mean()), standard_error(scores),
            gain(scores, before.scores[name], longer), win_rate(scores, before.scores[name]),
        )
        for name, scores in after.scores.items()
    }  # fmt: skip
    return Report(
        step=step,
        prompts=len(after.prompts),
        kl=float(after.kl.mean()),
        kl_se=standard_error(after.kl),
        length=(float(before.lengths.mean()), float(after.lengths.mean())),
        distinct_2=(before.distinct_2, after.distinct_2),
        judges=judges,
        best_of=best,
    )


def _judged(task: Task, settings: RunSettings, policy: LanguagePolicy) -> Judged:
    heldout = heldout_source(task.heldout, policy, settings)
    return evaluate(policy, heldout, task.judges.all, settings.ppo.sampling, settings.ppo.seed)


def _reference(task: Task, settings: RunSettings, best_of: bool) -> tuple[Judged, tuple[BestOf, ...]]:
    """The policy before training: its responses, and best-of-n."""
    policy = open_policy(task.model, settings, task.tokenizer)
    judged = _judged(task, settings, policy)
    ns = settings.evaluation.best_of
    if not (best_of and ns):
        return judged, ()
    source = source_of(task.heldout.first(settings.evaluation.best_of_prompts), policy, settings, 1, max(ns))
    knobs = settings.ppo
    drawn = draw_best_of_n(policy, source, task.judges.all, knobs.sampling, ns, knobs.seed, lambda _: None)
    return judged, tuple(drawn)


def show(report: Report, console: Console) -> None:
    """One line a judge, within 100 columns."""
    console.print(f"update {report.step} on {report.prompts} held-out prompts, against the model it started from")
    table = Table(box=None, pad_edge=False)
    for head in ("judge", "before", "after", "gain", "at equal length", "win rate, 95 %"):
        table.add_column(head, justify="left" if head == "judge" else "right", no_wrap=True)
    for name, one in report.judges.items():
        wins, told = one.win_rate, one.gain
        table.add_row(
            LABELS.get(name, name), f"{one.reference:+.3f}", f"{one.policy:+.3f}", f"{told.mean:+.3f} ± {told.se:.3f}",
            f"{told.at_equal_length:+.3f} ± {told.at_equal_length_se:.3f}",
            f"{wins.rate:.0%} [{wins.low:.0%}, {wins.high:.0%}]",
        )  # fmt: skip
    console.print(table)
    (short, long), (some, fewer) = report.length, report.distinct_2
    console.print(f"KL {report.kl:z.2f} ± {report.kl_se:.2f} nats per response", soft_wrap=True)
    console.print(f"length {short:.1f} → {long:.1f} tokens, distinct-2 {some:.2f} → {fewer:.2f}", soft_wrap=True)
    for best in report.best_of:
        gold = "" if best.gold != best.gold else f", gold {best.gold:+.3f}"
        console.print(f"best of {best.n} of the reference: score {best.score:+.3f}{gold}, KL {best.kl:.2f}")
