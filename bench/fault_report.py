"""From the lines of the matrix to docs/faults.md and its picture: rates, latencies, what fired, false alarms a run.

    results/faults.jsonl, faults-smollm2.jsonl ──▶ the block of docs/faults.md, docs/images/faults.png

Runs nothing. Read next: `faults.py`, which writes the lines.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tether.alarms import FAILURES, FAULTS

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "faults.jsonl"
RESULTS_OF_SMOLLM2 = RESULTS.with_name("faults-smollm2.jsonl")
PAGE, PICTURE = ROOT / "docs" / "faults.md", ROOT / "docs" / "images" / "faults.png"
BEGIN, END = "<!-- begin matrix -->\n", "<!-- end matrix -->\n"
Line = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """What became of the runs of one fault."""

    fault: str
    runs: int
    alarmed: int
    """Runs with any alarm."""
    named: int
    """Runs in which the alarm carries the fault's own name."""
    first: int
    """Runs in which that was the first alarm."""
    latency: float | None
    """Median update of the first alarm, counted from 0."""
    fired: Counter[str]
    """Runs by the name of what fired in them."""


def rows_of(lines: Sequence[Line]) -> list[Row]:
    """One row a fault, in the catalogue's order."""
    return [row for fault in FAULTS if (row := _row(fault, [line for line in lines if line["fault"] == fault]))]


def _row(fault: str, runs: Sequence[Line]) -> Row | None:
    if not runs:
        return None
    alarms = [[(step, name) for step, severity, name, _ in run["said"] if severity == "alarm"] for run in runs]
    names = [name for said in alarms for name in sorted({name for _, name in said})]
    steps = [said[0][0] for said in alarms if said]
    return Row(
        fault, len(runs), len(steps), sum(any(name == fault for _, name in said) for said in alarms),
        sum(bool(said) and fault in {name for step, name in said if step == said[0][0]} for said in alarms),
        median(steps) if steps else None, Counter(names),
    )  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Markdown, one line a fault."""
    head = (
        "| fault | check | runs | alarmed | by its name | median update | what fired |\n|---|---|--:|--:|--:|--:|---|\n"
    )
    return head + "".join(
        f"| [`{row.fault}`](failures/{row.fault}.md) | {FAILURES[row.fault].kind} | {row.runs} "
        f"| {row.alarmed / row.runs:.0%} "
        f"| {row.named / row.runs:.0%} | {'–' if row.latency is None else f'{row.latency:g}'} "
        f"| {', '.join(f'{name} {count}' for name, count in row.fired.most_common(4))} |\n"
        for row in rows
    )


def basis(rows: Sequence[Row], clean: Sequence[Line]) -> str:
    """How many runs it all stands on, and what was not planted yet."""
    runs, absent = [row.runs for row in rows], [fault for fault in FAULTS if fault not in {row.fault for row in rows}]
    told = f"It stands on {min(runs)} to {max(runs)} seeds of {len(rows)} faults and on {len(clean)} clean runs"
    return told + (f"; not run yet: {', '.join(f'`{fault}`' for fault in absent)}.\n" if absent else ".\n")


def summary(rows: Sequence[Row], clean: Sequence[Line]) -> str:
    """Rates by kind, and the clean runs."""
    told = []
    for kind in ("invariant", "statistic", "guard", "hack"):
        own = [row for row in rows if FAILURES[row.fault].kind == kind]
        runs = sum(row.runs for row in own)
        if runs:
            steps = [row.latency for row in own if row.latency is not None]
            told.append(f"- **{kind}**: {sum(row.alarmed for row in own) / runs:.1%} of {runs} runs alarmed, "
                        f"{sum(row.named for row in own) / runs:.1%} by the fault's name, median update "
                        f"{median(steps):g}" if steps else f"- **{kind}**: none of {runs} runs alarmed")  # fmt: skip
    for severity in ("alarm", "warning"):
        false = [line for line in clean if any(said[1] == severity for said in line["said"])]
        names = Counter(said[2] for line in false for said in line["said"] if said[1] == severity)
        which = f" ({', '.join(f'{name} {count}' for name, count in names.most_common())})" if names else ""
        updates = sum(line["updates"] for line in clean)
        told.append(f"- **clean, {severity}s**: {len(false)} of {len(clean)} runs, {updates} updates{which}")
    return "\n".join(told) + "\n"


def missed(lines: Sequence[Line]) -> str:
    """What was not detected, run by run."""
    silent = [
        f"- `{line['fault']}`, seed {line['seed']} ({', '.join(f'{k} {v}' for k, v in line['changes'].items())}): "
        f"silent for {line['updates']} updates"
        for line in lines
        if line["fault"] != "clean" and not any(said[1] == "alarm" for said in line["said"])
    ]
    return "\n".join(silent) + "\n" if silent else "Nothing: every planted fault was alarmed in every run.\n"


def nine(lines: Sequence[Line]) -> str:
    """The lesson's nine on SmolLM2, run by run, with the update of each first alarm."""
    told = "| fault | updates | alarms, with their update |\n|---|--:|---|\n"
    for line in lines:
        said = ", ".join(f"{name} {step}" for step, severity, name, _ in line["said"] if severity == "alarm")
        told += f"| [`{line['fault']}`](failures/{line['fault']}.md) | {line['updates']} | {said or 'none'} |\n"
    return told


def read_lines(results: Path) -> list[Line]:
    """The lines of a matrix; none where it was not run."""
    return [json.loads(line) for line in results.read_text("utf-8").splitlines()] if results.exists() else []


def write_report() -> None:
    """The page's block and the picture."""
    lines, once = read_lines(RESULTS), read_lines(RESULTS_OF_SMOLLM2)
    rows, clean = rows_of(lines), [line for line in lines if line["fault"] == "clean"]
    block = f"{basis(rows, clean)}\n{summary(rows, clean)}\n"
    block += f"![which check fires on which fault](images/faults.png)\n\n{table(rows)}\n"
    block += f"### Not detected\n\n{missed(lines)}"
    if once:
        block += f"\n### The lesson's nine on SmolLM2, once (`--world smollm2`)\n\n{nine(once)}"
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + block + END + rest.partition(END)[2], "utf-8")
    draw(rows, clean)


def draw(rows: Sequence[Row], clean: Sequence[Line]) -> None:
    """Share of runs in which each check fired, a line a fault, the clean runs below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    false = Counter(name for line in clean for name in {said[2] for said in line["said"] if said[1] == "alarm"})
    faults = [row.fault for row in rows]
    others = sorted({name for row in rows for name in row.fired} - set(faults)) + [
        name for name in false if name not in faults and all(name not in row.fired for row in rows)]  # fmt: skip
    columns = faults + others
    share = np.array([[row.fired[name] / row.runs for name in columns] for row in rows]
                     + [[false[name] / max(1, len(clean)) for name in columns]])  # fmt: skip
    figure, axes = plt.subplots(figsize=(0.26 * len(columns) + 3, 0.24 * len(share) + 2.5))
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7)
    axes.set_yticks(range(len(share)), [*faults, "clean"], fontsize=7)
    axes.set_xlabel("alarm that fired")
    axes.set_ylabel("fault that was planted")
    figure.colorbar(image, label="share of runs", fraction=0.03)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=110, metadata={"Software": None})
    plt.close(figure)
