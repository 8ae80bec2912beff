"""`tether check RUN`: the verdict on a run, with its evidence; `--pluck` pulls at the string of its last checkpoint.

Exit code 0: attached and quiet. 1: alarmed. 2: misused (no such run, or no update yet).
"""

from __future__ import annotations

import json as jsonlib
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from tether.alarms import FAILURES
from tether.database import to_json
from tether.errors import RunError
from tether.runs import ROOT, crew_of, find_run
from tether.store import RunStore
from tether.terminal import console_for_output, short
from tether.verdict import Standing, Verdict, judge

if TYPE_CHECKING:
    from tether.pluck import Pluck

QUIET, ALARMED, MISUSED = 0, 1, 2
STYLES = {"NOT ATTACHED": "bold red", "SNAPPED": "bold red", "SLACK": "bold yellow", "TAUT": "bold yellow"}
RIM = {
    "the gain in score": "score_gain",
    "as the hold-out judge sees it": "holdout_gain",
    "as gold sees it": "gold_gain",
    "as gold sees it, at equal length": "eval/gain_at_equal_length",
    "of the ceiling σ√(2K)": "string/efficiency",
    "score a nat, of late": "string/slope",
    "price of a nat, β": "beta",
    "flatness, 1 → 0 at the optimum": "string/flatness",
}
"""What is told of every run beside its alarms."""


def main(run: str, /, root: Path = ROOT, json: bool = False, pluck: bool = False) -> int:
    """Say whether the string of a run is attached, and what speaks for it.

    Args:
        run: The run's name below `root`, or the path of its folder.
        root: The folder that holds the run folders.
        json: Print one JSON object instead.
        pluck: Pull at the string of the last checkpoint too: no reward, β fourfold, ten updates in memory.
    """
    try:
        folder = find_run(run, root)
        with RunStore.open(folder) as store:
            verdict = judge(store)
            crew = crew_of(store.meta(), store.latest())
        answer = _pluck(folder) if pluck else None
        verdict = plucked(verdict, answer)
    except RunError as error:
        print(f"tether check: {error}", file=sys.stderr)
        return MISUSED
    if json:
        told = described(verdict) | {"crew": crew} | ({} if answer is None else {"pluck": asdict(answer)})
        print(jsonlib.dumps(jsonlib.loads(to_json(told)), indent=2))
    else:
        show(verdict, console_for_output())
        print("".join(f"\nnext    {line}\n" for line in next_step(verdict, run)), end="")
        print("".join(f"\nshared by {line}" for line in crew), end="\n" * bool(crew))
        if answer is not None and answer.is_attached:
            print(f"\npluck: {answer.sentence()}")
    return QUIET if verdict.is_quiet else ALARMED


def _pluck(folder: Path) -> Pluck:
    from tether.pluck import pluck_run

    return pluck_run(folder, Console(stderr=True))


def plucked(verdict: Verdict, answer: Pluck | None) -> Verdict:
    """The verdict once the string was pulled at: one that does not answer is not attached, whatever was seen before."""
    if answer is None or answer.is_attached:
        return verdict
    return replace(verdict, word="NOT ATTACHED", reason=f"pulled at, {answer.sentence()}")


def described(verdict: Verdict) -> dict[str, object]:
    """The verdict as plain values."""
    return {
        "verdict": verdict.word,
        "reason": verdict.reason,
        "quiet": verdict.is_quiet,
        "updates": verdict.updates,
        "numbers": dict(verdict.numbers),
        "alarms": [asdict(alarm) for alarm in verdict.alarms],
    }


def show(verdict: Verdict, console: Console) -> None:
    """The word, its reason, and every alarm with what to do."""
    console.print(verdict.word, style=STYLES.get(verdict.word, "bold green"), end=" ")
    console.print(f"after {verdict.updates} updates: {verdict.reason}", markup=False, highlight=False)
    for label, name in RIM.items():
        if math.isfinite(verdict.numbers.get(name, math.nan)):
            console.print(f"  {label:<32} {short(verdict.numbers[name])}", markup=False, highlight=False)
    ghost = [verdict.numbers.get(f"ghost/{what}", math.nan) for what in ("gain", "kl", "beta", "effective")]
    if all(map(math.isfinite, ghost)):
        told = "the reference's samples reach a gain of {:.2f} at {:.2g} nats (β = {:.2g}, {:.0f} effective samples)"
        console.print("  " + told.format(*ghost), markup=False, highlight=False, soft_wrap=True)
    for alarm in verdict.alarms:
        _show_alarm(alarm, console)


def next_step(verdict: Verdict, run: str) -> list[str]:
    """What to type next; nothing where all is quiet."""
    beta, first = verdict.numbers.get("beta", math.nan), min((a.step for a in verdict.alarms if a.lasts), default=0)
    branch = f"tether fork {run}@STEP --name NEW"
    steps = {
        "NOT ATTACHED": f"mend the first cause; begin anew, or from a checkpoint before update {first} ({branch}); "
        "then pull at the string: tether check NEW --pluck",
        "SNAPPED": f"{branch} --beta {4 * beta:.2g}, from a checkpoint before update {first}",
        "SLACK": f"tether steer {run} beta={2 * beta:.2g} while it trains, or {branch} --beta {2 * beta:.2g}",
        "TAUT": f"tether steer {run} beta={0.5 * beta:.2g} while it trains, or {branch} --beta {0.5 * beta:.2g}",
    }
    if verdict.word == "NOT ATTACHED" and not any(alarm.lasts for alarm in verdict.alarms):
        return [f"mend what the sentence above names, begin anew, and pull again: tether check {run} --pluck"]
    if verdict.word in steps:
        return [steps[verdict.word]]
    return [] if verdict.is_quiet else [f"the string holds; mend the cause, then {branch}"]


def _show_alarm(alarm: Standing, console: Console) -> None:
    failure = FAILURES[alarm.reason]
    over = "" if alarm.lasts else ", over by now"
    console.print()
    style = "dim" if not alarm.lasts else "red" if alarm.severity == "alarm" else "yellow"
    console.print(f"{alarm.severity} {alarm.reason}: {failure.title} (update {alarm.step}{over})",
                  style=style, markup=False, highlight=False)  # fmt: skip
    rows = {"seen": alarm.seen, "why": failure.why, "do": alarm.remedy, "unless": failure.alike}
    for name, text in rows.items():
        if text:
            console.print(f"  {name:<7} {text}", markup=False, highlight=False, soft_wrap=True)
