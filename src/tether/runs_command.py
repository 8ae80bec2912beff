"""`tether runs` lists runs, `tether show RUN` tells one run's numbers, in the terminal or as JSON.

Every number's unit, range and remedy come from the catalogue. Knows no torch. Read next: `runs.py`, which finds and
describes them.
"""

from __future__ import annotations

import json as jsonlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tether.database import to_json
from tether.metrics import CATALOGUE, Metric
from tether.records import Curve, Event
from tether.runs import LAST, ROOT, RunSummary, describe_run, find_run, list_runs, summarise_metric, summarise_run
from tether.store import RunStore
from tether.terminal import console_for_output, short, sparkline, table_of_columns

NOTED = 5
"""Warnings shown."""
UNITS = {"nats/response": "nats", "nats/token": "nats/tok", "tokens/s": "tok/s", "score/nat": "per nat", "1": ""}
"""Short forms for narrow terminals; a bare `nats` is per response, as everywhere."""
MAIN = (
    "score/mean", "score/std", "score/holdout", "score/gold", "objective/tethered", "reward/mean", "reward/non_score",
    "kl/mean", "kl/se", "kl/full", "beta",
    "entropy/per_token", "length/mean", "finished/share", "distinct_2",
    "loss/policy", "loss/value", "ppo/approx_kl", "ppo/clip_fraction", "ppo/ratio_first", "grad/norm", "learning_rate",
    "value/explained_variance",
    "eval/score", "eval/holdout", "eval/gold", "eval/kl", "eval/distinct_2", "eval/length", "eval/win_rate",
    "seconds/total", "tokens/per_second",
)  # fmt: skip
"""What `show` tells in the terminal; `--json` tells all."""


def main_runs(root: Path = ROOT, json: bool = False) -> None:
    """List the runs below a folder, the newest first.

    Args:
        root: The folder that holds the run folders.
        json: Print one JSON object instead of a table.
    """
    summaries = list_runs(root)
    if json:
        _print_json({"root": str(root), "runs": [asdict(summary) for summary in summaries]})
    else:
        print_runs(summaries, root)


def main_show(run: str, /, root: Path = ROOT, json: bool = False) -> None:
    """Show one run: its main metrics with a sparkline each, what is out of range, and its latest warnings.

    Args:
        run: The run's name below `root`, or the path of its folder.
        root: The folder that holds the run folders.
        json: Print one JSON object with every metric and event instead of a table.
    """
    path = find_run(run, root)
    with RunStore.open(path) as store:
        if json:
            _print_json(describe_run(store))
        else:
            print_run(store)


def print_runs(summaries: Sequence[RunSummary], root: Path) -> None:
    """A table, one run a line."""
    console = console_for_output()
    if not summaries:
        console.print(f"no runs in {root}; start one: tether train --world nano --steps 20 --name first", markup=False)
        return
    table = table_of_columns()
    for heading in ("run", "model"):
        table.add_column(heading, overflow="fold")
    for heading in ("β", "updates", "score", "KL"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("status", "started"):
        table.add_column(heading, no_wrap=True)
    for summary in summaries:
        numbers = [short(summary.beta), _progress(summary), short(summary.score), short(summary.kl)]
        cells = [summary.name, summary.model, *numbers, summary.status, _date(summary.created)]
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)
    for summary in summaries:
        if summary.fault:
            console.print(f"! {summary.fault}", style="yellow", markup=False)


def print_run(store: RunStore) -> None:
    """Header, main metrics with a sparkline each, what is out of range, and the latest warnings."""
    console = console_for_output()
    _print_header(console, summarise_run(store, store.name))
    latest = store.latest()
    if names := [name for name in MAIN if name in latest]:
        console.print(_metric_table(store.curves(names)))
    for name, last in latest.items():
        if name in CATALOGUE and CATALOGUE[name].is_outside(last):
            _print_outside(console, CATALOGUE[name], last)
    for event in [event for event in store.events() if event.severity != "info"][-NOTED:]:
        console.print(_event_line(event), style="yellow", markup=False)


def _print_header(console: Console, summary: RunSummary) -> None:
    parts = [summary.model, f"β {short(summary.beta)}", f"{_progress(summary)} updates", summary.status]
    started = f"started {_date(summary.created)} in {summary.path}"
    console.print(Text(summary.name, style="bold") + Text(" · " + " · ".join(part for part in parts if part)))
    console.print(Text(started, style="dim"))
    console.print()


def _metric_table(curves: Mapping[str, Curve]) -> Table:
    table = table_of_columns()
    table.add_column("metric", no_wrap=True)
    table.add_column("unit", no_wrap=True, style="dim")
    for heading in ("first", "last", "min", "max", f"last {LAST}"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name, curve in curves.items():
        told = summarise_metric(name, curve)
        numbers = (told.first, told.last, told.min, told.max, told.mean_of_last)
        unit = UNITS.get(told.unit, told.unit)
        table.add_row(Text(name), unit, *(short(number) for number in numbers), sparkline(curve.values))
    return table


def _print_outside(console: Console, metric: Metric, last: float) -> None:
    line = f"! {metric.name} is {short(last)}; healthy: {metric.healthy}. {metric.remedy}"
    console.print(line, style="yellow", markup=False)


def _event_line(event: Event) -> str:
    told = ", ".join(f"{key} {value}" for key, value in event.payload.items())
    where = "" if event.step is None else f"update {event.step} "
    return f"{where}{event.severity} {event.kind}" + (f": {told}" if told else "")


def _print_json(value: Mapping[str, object]) -> None:
    """One JSON object; numbers that are not finite are null."""
    print(jsonlib.dumps(jsonlib.loads(to_json(value)), indent=2))


def _progress(summary: RunSummary) -> str:
    return f"{summary.updates}/{summary.steps}" if summary.steps else str(summary.updates)


def _date(seconds: float | None) -> str:
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
