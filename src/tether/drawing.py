"""The drawing of `plots.py`'s pictures with matplotlib: colours, panels, direct labels.

Colours are Okabe and Ito's, told apart by colour-blind readers too; every run has a dash pattern of its own besides.
No pyplot: figures are objects, nothing global is changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import IdentityTransform
from numpy.typing import NDArray

from tether.labels import Box, place, spread
from tether.plots import BestOfN, Chord, RunCurves, Series, SweepPoint, Trail, moving_mean

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[object, ...] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)), (0, (8, 2, 2, 2, 2, 2)))
INK, FAINT, WARNING, SWEEP = "#333333", "#777777", "#B00020", "#00724F"
WIDE, HIGH, DPI = 10.0, 7.5, 120  # inches and dots an inch: 1200 × 900 pixels
LABEL_GAP = 21.0
"""Pixels between the middles of labels at the lines' ends."""
MARGIN = 14.0
"""Pixels between a panel and the labels beside it."""
BESIDE = 12.0
"""Pixels between a point and its label."""
LONGEST_LABEL = 15
SMALL = 9.5
STYLE: dict[str, object] = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": SMALL,
}


@dataclass(frozen=True)
class _Label:
    """A label and the point that it belongs to, in the axes' own units."""

    x: float
    y: float
    text: str
    colour: str


# ── curves ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def draw_curves(runs: Sequence[RunCurves], out: Path, budget: float | None) -> None:
    """Two panels on one step axis: the mean score above, KL below."""
    with _figure(out) as figure:
        above, below = figure.subplots(2, 1, sharex=True)
        figure.subplots_adjust(left=0.085, right=0.79, top=0.93, bottom=0.075, hspace=0.22)
        _head(above, "Mean score", "in the score's unit, σ where it is normalised; moving mean ± 1 s.e.")
        _head(below, "KL to the reference", "nats per response, moving mean ± 1 s.e.")
        for number, run in enumerate(runs):
            colour, dash = _look(number)
            _draw_line(above, run.score, colour, dash)
            _draw_line(below, run.kl, colour, dash)
            _draw_marks(above, run.gold, colour, "D")
            _draw_marks(above, run.holdout, colour, "o")
        _draw_budget(below, budget)
        below.set_xlabel("update")
        below.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        below.set_ylim(bottom=min(0.0, below.dataLim.y0))
        below.margins(x=0.01)
        if below.dataLim.width == 0.0:
            below.set_xlim(below.dataLim.x0 - 1.0, below.dataLim.x0 + 1.0)
        taken = _explain_marks(above, runs)
        _label_ends(above, [(run.label, run.score) for run in runs], "{:+.2f}", taken)
        _label_ends(below, [(run.label, run.kl) for run in runs], "{:.3g}", 0.0)


def _draw_line(axes: Axes, series: Series, colour: str, dash: object) -> None:
    if not len(series):
        return
    smooth = series.smoothed()
    axes.plot(series.steps, series.values, color=colour, alpha=0.25, linewidth=0.8)
    axes.fill_between(series.steps, smooth - series.errors, smooth + series.errors, color=colour, alpha=0.15, lw=0)
    marker = "o" if len(series) == 1 else None
    axes.plot(series.steps, smooth, color=colour, linestyle=dash, linewidth=2.0, marker=marker, zorder=3)


def _draw_marks(axes: Axes, series: Series, colour: str, marker: str) -> None:
    if not len(series):
        return
    axes.errorbar(
        series.steps, series.values, yerr=series.errors if series.errors.any() else None, color=colour,
        marker=marker, markersize=5, markerfacecolor="white", linestyle=":", linewidth=1.0, elinewidth=0.8, zorder=4,
    )  # fmt: skip


def _draw_budget(axes: Axes, budget: float | None) -> None:
    if budget is None:
        return
    axes.axhline(budget, color=INK, linewidth=1.0, linestyle=(0, (1, 2)))
    axes.annotate(
        f"budget {budget:g}", (0.0, budget), (4, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
        fontsize=SMALL,
    )  # fmt: skip


def _label_ends(axes: Axes, ends: Sequence[tuple[str, Series]], form: str, taken: float) -> None:
    """Each run's label and last value to the right of its line's end, moved apart where they would touch.

    `taken`: pixels at the foot of the margin that hold something else.
    """
    shown = [(number, label, series) for number, (label, series) in enumerate(ends) if len(series)]
    lasts = [float(series.smoothed()[-1]) for _, _, series in shown]
    wanted = [float(axes.transData.transform((0.0, last))[1]) for last in lasts]
    heights = spread(wanted, LABEL_GAP, axes.bbox.y0 + taken, axes.bbox.y1)
    left = axes.bbox.x1 + MARGIN
    for (number, label, series), last, pixel, height in zip(shown, lasts, wanted, heights, strict=True):
        colour, _ = _look(number)
        start = float(axes.transData.transform((series.steps[-1], 0.0))[0])
        leader = Line2D(
            [start, axes.bbox.x1, left - 4], [pixel, pixel, height], color=colour, alpha=0.45, linewidth=0.8,
            transform=IdentityTransform(),
        )  # fmt: skip
        axes.figure.add_artist(leader)
        text = f"{_shorten(label)}  {form.format(last).replace('-', '−')}"
        axes.figure.text(left, height, text, color=colour, va="center", fontweight="bold", transform=None)


def _explain_marks(axes: Axes, runs: Sequence[RunCurves]) -> float:
    """What the marks mean, at the foot of the right margin; returns the height that it takes in pixels."""
    marks = {"gold score": ("D", [run.gold for run in runs]), "hold-out score": ("o", [run.holdout for run in runs])}
    handles = [
        Line2D([], [], color=FAINT, marker=marker, markerfacecolor="white", linestyle=":", linewidth=1.0, label=label)
        for label, (marker, series) in marks.items()
        if any(len(one) for one in series)
    ]
    if not handles:
        return 0.0
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(1.0, 0.0), borderaxespad=0.0,
        title="on held-out prompts:", title_fontsize=SMALL, alignment="left",
    )  # fmt: skip
    return LABEL_GAP * (len(handles) + 2)


# ── frontier ────────────────────────────────────────────────────────────────────────────────────────────────────────
def draw_frontier(
    trails: Sequence[Trail],
    best_of_n: Sequence[BestOfN],
    sigma: float,
    out: Path,
    sweep: Sequence[SweepPoint],
    chords: Sequence[Chord],
) -> None:
    """Δr over √K, with the ceiling that no policy passes, best-of-n, trails and a sweep's chords."""
    points = [point for trail in trails for point in zip(trail.kl, trail.gain, strict=True)]
    points += [(one.kl, one.gain) for one in best_of_n] + [(one.kl, one.gain) for one in sweep]
    with _figure(out) as figure:
        axes = figure.subplots()
        figure.subplots_adjust(left=0.085, right=0.97, top=0.86, bottom=0.085)
        _head(axes, "What the KL buys", "gain in mean score over the reference, against the distance paid", lift=48.0)
        _frame_frontier(axes, [kl for kl, _ in points], [gain for _, gain in points] + [0.0, sigma / 2])
        labels = _draw_trails(axes, trails) + _draw_best_of_n(axes, best_of_n) + _draw_sweep(axes, sweep, chords)
        _place_labels(axes, [*labels, _draw_ceiling(axes, sigma)])


def _frame_frontier(axes: Axes, kls: Sequence[float], gains: Sequence[float]) -> None:
    lowest, highest = min(gains), max(gains)
    span = highest - lowest
    right = 1.12 * _root(max(*kls, 1.0))
    axes.set_xlim(0.0, right)
    axes.set_ylim(lowest - 0.06 * span, highest + 0.18 * span)
    axes.axhline(0.0, color=FAINT, linewidth=1.0)
    axes.set_xlabel("√K")
    axes.set_ylabel("Δr, in the score's unit")
    nats = [kl for kl in (0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if _root(kl) < right][-6:]
    top = axes.secondary_xaxis("top")
    top.set_xticks([_root(kl) for kl in nats], [f"{kl:g}" for kl in nats])
    top.set_xlabel("K, the KL to the reference, nats per response")


def _draw_ceiling(axes: Axes, sigma: float) -> _Label:
    """Δr ≤ σ√(2K) where the score is sub-Gaussian under the reference: a straight line over √K."""
    right, high = axes.get_xlim()[1], axes.get_ylim()[1]
    slope = sigma * np.sqrt(2.0)
    ends = np.array([0.0, right])
    axes.plot(ends, slope * ends, color=INK, linewidth=1.2, linestyle=(0, (1, 2)))
    axes.fill_between(ends, slope * ends, max(high, slope * right), color="#F3F3F3", lw=0, zorder=0)
    where = 0.93 * min(high / slope, right)
    return _Label(where, slope * where, f"ceiling σ√(2K), σ = {sigma:.3g}", FAINT)


def _draw_trails(axes: Axes, trails: Sequence[Trail]) -> list[_Label]:
    numbers = {label: number for number, label in enumerate(dict.fromkeys(trail.label for trail in trails))}
    return [_draw_trail(axes, trail, *_look(numbers[trail.label])) for trail in trails if len(trail.kl)]


def _draw_trail(axes: Axes, trail: Trail, colour: str, dash: object) -> _Label:
    """The trail's moving mean, the updates themselves as faint dots, and a mark at its end."""
    roots, gains = np.sqrt(np.maximum(np.asarray(trail.kl, float), 0.0)), np.asarray(trail.gain, float)
    gold = trail.kind == "gold"
    x, y = moving_mean(roots), moving_mean(gains)
    axes.scatter(roots, gains, color=colour, s=6, alpha=0.3, linewidth=0)
    axes.plot(x, y, color=colour, linestyle=":" if gold else dash, linewidth=1.8, alpha=0.8)
    axes.plot(
        x[-1:], y[-1:], color=colour, marker="D" if gold else "o", markersize=8, linestyle="",
        markerfacecolor="white" if gold else colour, markeredgewidth=1.6, zorder=5,
    )  # fmt: skip
    return _Label(float(x[-1]), float(y[-1]), _shorten(trail.label) + (", gold" if gold else ""), colour)


def _draw_best_of_n(axes: Axes, best_of_n: Sequence[BestOfN]) -> list[_Label]:
    ordered = sorted(best_of_n, key=lambda one: one.n)
    labels = [_Label(_root(one.kl), one.gain, f"best of {one.n}", INK) for one in ordered]
    axes.plot([one.x for one in labels], [one.y for one in labels], color=INK, marker="s", markersize=5, linewidth=1.0)
    return labels


def _draw_sweep(axes: Axes, sweep: Sequence[SweepPoint], chords: Sequence[Chord]) -> list[_Label]:
    """One point a β, and the chords between them: straight over K, so bent over √K."""
    for chord in chords:
        share = np.linspace(0.0, 1.0, 40)
        nats = chord.tight.kl + share * (chord.loose.kl - chord.tight.kl)
        gains = chord.tight.gain + share * (chord.loose.gain - chord.tight.gain)
        colour, line = (INK, "-") if chord.is_kept else (WARNING, (0, (4, 2)))
        axes.plot(np.sqrt(np.maximum(nats, 0.0)), gains, color=colour, linestyle=line, linewidth=1.2)
    labels = [_Label(_root(one.kl), one.gain, f"β = {one.beta:g}", SWEEP) for one in sweep]
    axes.plot([one.x for one in labels], [one.y for one in labels], "o", color=SWEEP, markersize=7)
    if any(not chord.is_kept for chord in chords):
        told = "chord law broken: the slope dr/dK is not between the two β"
        axes.legend(handles=[Line2D([], [], color=WARNING, linestyle=(0, (4, 2)), label=told)], loc="lower right")
    return labels


def _place_labels(axes: Axes, labels: Sequence[_Label]) -> None:
    """Each label beside its point, where it covers least of the lines and of the other labels."""
    lines, taken = _pixels_of_lines(axes), list[Box]()
    inside = Box(axes.bbox.x0, axes.bbox.y0, axes.bbox.width, axes.bbox.height)
    for label in labels:
        text = axes.text(0, 0, label.text, color=label.colour, fontweight="bold", fontsize=10, transform=None)
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white", alpha=0.8)])
        width, height = _size(text)
        x, y = axes.transData.transform((label.x, label.y))
        box = place((float(x), float(y)), (width, height), inside, taken, lines, BESIDE)
        text.set(position=(box.left, box.bottom + box.height / 2), verticalalignment="center")
        taken.append(box)


def _pixels_of_lines(axes: Axes) -> NDArray[np.floating]:
    """Points along everything drawn with a line, a few pixels apart, one a row."""
    found = [np.empty((0, 2))]
    for line in axes.lines:
        corners = axes.transData.transform(np.atleast_2d(line.get_xydata()))
        found.append(corners)
        for start, end in pairwise(corners):
            share = np.linspace(0.0, 1.0, int(np.hypot(*(end - start)) / 5) + 2)[:, None]
            found.append(start + share * (end - start))
    return np.concatenate(found)


# ── both ────────────────────────────────────────────────────────────────────────────────────────────────────────────
@contextmanager
def _figure(out: Path) -> Iterator[Figure]:
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDE, HIGH), dpi=DPI, facecolor="white")
        FigureCanvasAgg(figure)
        yield figure
        figure.savefig(out, format="png", metadata={"Software": None})


def _head(axes: Axes, title: str, told: str, lift: float = 8.0) -> None:
    """The panel's quantity above it, in bold, and its unit beside: read without turning the head."""
    head = axes.annotate(title, (0.0, 1.0), (0.0, lift), xycoords="axes fraction", textcoords="offset points")
    head.set(fontsize=12, fontweight="bold")
    beside = (head, "axes fraction")
    axes.annotate(f"  {told}", (1.0, 1.0), (4.0, lift), xycoords=beside, textcoords="offset points", color=FAINT)


def _look(number: int) -> tuple[str, object]:
    """Colour and dash pattern of the n-th run."""
    return COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]


def _shorten(label: str) -> str:
    return label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1] + "…"


def _root(kl: float) -> float:
    """√K; an estimate a little below 0 counts as 0."""
    return float(np.sqrt(max(kl, 0.0)))


def _size(text: Text) -> tuple[float, float]:
    extent = text.get_window_extent()
    return float(extent.width), float(extent.height)
