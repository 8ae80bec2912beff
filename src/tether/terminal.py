"""Numbers, curves and tables in a terminal: short, aligned, and sane in 80 columns and in pipes.

Knows no run and no metric.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

SPARKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 10
WIDTH = 6
"""Characters of a number."""
NARROWEST = 80
"""Columns that a table is laid out for; a narrower terminal wraps its lines."""


def short(number: float | None) -> str:
    """The number in at most six characters.

    >>> [short(number) for number in (0.05, -0.01234, 12345.0, 2.5e9, 0.00012, float("nan"), None)]
    ['0.05', '-0.012', '12345', '2.5G', '1.2e-4', '–', '–']
    """
    if number is None or not math.isfinite(number):
        return "–"
    size = abs(number)
    if size < 1e-99:
        return "0"
    if size < 0.00095 or size >= 1e18:
        exact, rough = (f"{number:.{digits}e}".replace("e-0", "e-").replace("e+", "e") for digits in (1, 0))
        return exact if len(exact) <= WIDTH else rough
    if size < 999.5:
        return next(text for digits in (3, 2, 1) if len(text := f"{number:.{digits}g}") <= WIDTH)
    return f"{number:.0f}" if size < 99_999.5 else _with_suffix(number)


def _with_suffix(number: float) -> str:
    scales = ((1000.0**power, suffix) for power, suffix in enumerate("kMGTPE", start=1))
    return next(f"{number / scale:.3g}{suffix}" for scale, suffix in scales if abs(number) / scale < 999.5)


def short_time(seconds: float) -> str:
    """The duration in its largest unit.

    >>> short_time(12), short_time(125), short_time(8000), short_time(200_000)
    ('12 s', '2 min', '2 h', '2 d')
    """
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def sparkline(values: NDArray[np.float64], width: int = SPARK_WIDTH) -> str:
    """The curve in block characters, lowest to highest; a gap where nothing was finite.

    >>> sparkline(np.array([0.0, 1.0, 2.0, 7.0]))
    '▁▂▃█'
    """
    buckets = np.array_split(values, min(width, len(values))) if len(values) else []
    means = [float(bucket[np.isfinite(bucket)].mean()) if np.isfinite(bucket).any() else None for bucket in buckets]
    finite = [mean for mean in means if mean is not None]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    top = len(SPARKS) - 1
    levels = [None if mean is None else round((mean - low) / span * top) if span else top // 2 for mean in means]
    return "".join(" " if level is None else SPARKS[level] for level in levels)


def table_of_columns() -> Table:
    return Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")


def console_for_output() -> Console:
    """Where commands print: as wide as the terminal, 80 columns in a pipe.

    Signs that the output's encoding lacks become `?` instead of an error.
    """
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower()
    if not encoding.startswith("utf") and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    console = Console(highlight=False)
    console.width = max(console.width, NARROWEST)
    return console


def console_beside(json: bool) -> Console:
    """Where a command tells people how it goes: its output, or standard error where that is one JSON object."""
    return Console(stderr=True) if json else console_for_output()


def print_warnings(warnings: Iterable[str], console: Console) -> None:
    for warning in warnings:
        console.print(f"  warning: {warning}", soft_wrap=True)
