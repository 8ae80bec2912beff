"""From single updates to the results: medians, ratios within a round, shares of the floor, table and page.

Pure arithmetic and text; measures nothing. Read next: `ppo_speed.py`, which measures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from floor import Floor, Rates
from workload import PHASES, Measured

BASELINE = "trl"
TARGETS = {"full": 5.0, "lora": 6.0, "top": 12.0}
MEMORY_TARGET = 1 / 3  # of the peer's peak, in mode `top`
LABELS = {
    "trl": "TRL 1.12.0, full, float32", "trl-bf16": "TRL 1.12.0, full, all in bfloat16",
    "trl-lora": "TRL 1.12.0, LoRA, float32", "full": "tether full", "lora": "tether lora", "top": "tether top",
}  # fmt: skip
GIB = 2**30


@dataclass(frozen=True)
class Summary:
    """One row of the table: medians over the rounds."""

    system: str
    seconds: float
    cpu_seconds: float
    split: dict[str, float]
    """Seconds by phase, and `other`."""
    tokens_per_second: float
    peak_bytes: int
    device_peak_bytes: int
    speed: float | None
    """Times the baseline's speed: median over rounds of the ratio within a round; None for want of a baseline."""
    speed_range: tuple[float, float] | None
    memory: float | None
    """Share of the baseline's peak."""
    floor: Floor | None
    floor_share: float | None
    """Floor over measured seconds; 1 would be perfect."""


def summarise(rounds: Sequence[Mapping[str, Measured]], floors: Mapping[str, Floor]) -> list[Summary]:
    """One summary a system, in the order of the first round."""
    return [_summarise(system, rounds, floors.get(system)) for system in rounds[0]]


def _summarise(system: str, rounds: Sequence[Mapping[str, Measured]], floor: Floor | None) -> Summary:
    own = [measured[system] for measured in rounds]
    seconds = median(one.seconds for one in own)
    ratios = [measured[BASELINE].seconds / measured[system].seconds for measured in rounds if BASELINE in measured]
    peaks = [max(peak_of(measured[name]) for measured in rounds) for name in (system, BASELINE) if name in rounds[0]]
    return Summary(
        system=system,
        seconds=seconds,
        cpu_seconds=median(one.cpu_seconds for one in own),
        split=split_of(own),
        tokens_per_second=median(one.tokens / one.seconds for one in own),
        peak_bytes=max(one.peak_bytes for one in own),
        device_peak_bytes=max(one.device_peak_bytes for one in own),
        speed=median(ratios) if ratios else None,
        speed_range=(min(ratios), max(ratios)) if ratios else None,
        memory=peaks[0] / peaks[1] if len(peaks) == 2 else None,
        floor=floor,
        floor_share=None if floor is None else floor.total / seconds,
    )


def split_of(own: Sequence[Measured]) -> dict[str, float]:
    """Median seconds of each phase, and of what lies between the phases as `other`."""
    phases = {name: median(one.split.get(name, 0.0) for one in own) for name in PHASES}
    return phases | {"other": median(one.seconds - sum(one.split.values()) for one in own)}


def peak_of(measured: Measured) -> int:
    """The accelerator's peak where there is one, else the process's."""
    return measured.device_peak_bytes or measured.peak_bytes


def median_rates(rates: Sequence[Rates]) -> Rates:
    return Rates(*(median(getattr(one, name) for one in rates) for name in Rates.__dataclass_fields__))


def table(summaries: Sequence[Summary]) -> str:
    """The results as Markdown."""
    phases = (*PHASES, "other")
    head = [
        "",
        "seconds an update",
        "× TRL (range)",
        *phases,
        "CPU s",
        "tokens/s",
        "peak GiB",
        "of TRL's",
        "share of floor",
    ]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in summaries:
        low, high = row.speed_range or (0.0, 0.0)
        rows.append([
            LABELS[row.system],
            f"{row.seconds:.2f}",
            "" if row.speed is None else f"**{row.speed:.1f}** ({low:.1f}–{high:.1f})",
            *(f"{row.split[name]:.2f}" for name in phases),
            f"{row.cpu_seconds:.1f}",
            f"{row.tokens_per_second:.0f}",
            f"{(row.device_peak_bytes or row.peak_bytes) / GIB:.2f}",
            "" if row.memory is None else f"{row.memory:.2f}",
            "" if row.floor_share is None else f"{row.floor_share:.0%}",
        ])  # fmt: skip
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def verdicts(summaries: Sequence[Summary]) -> list[str]:
    """One line a target: reached or not."""
    lines = []
    for row in summaries:
        wanted = TARGETS.get(row.system)
        if wanted is not None and row.speed is not None:
            reached = _verdict(row.speed >= wanted)
            lines.append(f"{row.system}: {row.speed:.1f} × TRL's speed, wanted ≥ {wanted:g} ×: {reached}")
        if row.system == "top" and row.memory is not None:
            reached = _verdict(row.memory <= MEMORY_TARGET)
            lines.append(f"top: {row.memory:.2f} of TRL's peak memory, wanted ≤ {MEMORY_TARGET:.2f}: {reached}")
    return lines


def _verdict(reached: bool) -> str:
    return "reached" if reached else "not reached"


def page(summaries: Sequence[Summary], facts: Mapping[str, Any]) -> str:
    """The results with what they belong to."""
    here, rates = facts["machine"], facts["rates"]
    loads = ", ".join(f"{load:.1f}" for load in facts["load_averages"])
    return f"""# One PPO update on {here["accelerator"] or here["processor"]}

`{facts["command"]}`, {facts["date"]}, commit {facts["commit"]}

{here["cores"]} cores, {facts["workload"]["threads"]} threads a process, {here["memory_gib"]} GiB of memory.
Load average before each round: {loads}.
Measured in the same run: products {rates["bf16_flops"] / 1e12:.3f} TFLOP/s in bfloat16 and
{rates["fp32_flops"] / 1e12:.3f} in float32, memory read at {rates["read_bytes"] / 1e9:.1f} GB/s.

{table(summaries)}

""" + "".join(f"- {line}\n" for line in verdicts(summaries))
