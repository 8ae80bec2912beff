"""Pictures of runs: `curves.png` (score and KL on one step axis) and `frontier.png` (Δr over √K).

Here is what goes into a picture; `drawing.py` draws it, and is imported only when a picture is asked for, since
matplotlib takes its time. Reads run folders only; knows no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tether.database import complaints
from tether.errors import InputError
from tether.frontier import chord_bounds
from tether.store import RunStore

SMOOTHING = 20
"""A line is the moving mean over one part in this many of the run."""


@dataclass(frozen=True, eq=False)
class Series:
    """One quantity over the steps, without its gaps."""

    steps: NDArray[np.integer]
    values: NDArray[np.floating]
    errors: NDArray[np.floating]
    """One standard error each; 0 where none was measured."""

    def __len__(self) -> int:
        return len(self.steps)

    def smoothed(self) -> NDArray[np.floating]:
        """The moving mean of `moving_mean`."""
        return moving_mean(self.values)


@dataclass(frozen=True)
class RunCurves:
    """What `curves.png` shows of one run."""

    label: str
    score: Series
    kl: Series
    holdout: Series
    """Held-out prompts, hold-out reward model; may be empty, like gold."""
    gold: Series


@dataclass(frozen=True)
class Trail:
    """A run's way through the plane of KL and gain; a single point is a trail of one."""

    label: str
    """Trails of one label have one colour."""
    kl: Sequence[float]
    """Nats per response."""
    gain: Sequence[float]
    """Δr: mean score minus the reference's, in the score's unit."""
    kind: Literal["proxy", "gold"] = "proxy"
    """Measured by the reward that was optimised, or by the gold scorer."""


@dataclass(frozen=True)
class BestOfN:
    """The best of n reference samples: what no training buys."""

    n: int
    gain: float
    """Mean score of the best minus the reference's."""

    @property
    def kl(self) -> float:
        """K = log n − (n − 1)/n, nats per response. Stiennon et al. 2020, app. G.3.

        >>> round(BestOfN(4, 0.0).kl, 3)
        0.636
        """
        return math.log(self.n) - (self.n - 1) / self.n


@dataclass(frozen=True)
class SweepPoint:
    """Where the run of one β came to rest."""

    beta: float
    kl: float
    gain: float
    kl_se: float = 0.0
    gain_se: float = 0.0
    """Standard errors; those of points without noise are 0."""


@dataclass(frozen=True)
class Chord:
    """Two neighbouring points of a sweep: at their optima, β_a ≤ (r_a − r_b)/(K_a − K_b) ≤ β_b."""

    loose: SweepPoint
    """The smaller β: a longer string."""
    tight: SweepPoint

    @property
    def slope(self) -> float:
        """Gain per nat between the two; NaN where their KL is the same."""
        distance = self.loose.kl - self.tight.kl
        return (self.loose.gain - self.tight.gain) / distance if distance else math.nan

    @property
    def is_kept(self) -> bool:
        """Whether the chord law holds between the two, up to two standard errors.

        >>> Chord(SweepPoint(0.1, kl=10.0, gain=2.0), SweepPoint(0.2, kl=5.0, gain=1.3)).is_kept
        True
        """
        loose, tight = self.loose, self.tight
        nats, gain = loose.kl - tight.kl, loose.gain - tight.gain
        kls, gains = 2.0 * math.hypot(loose.kl_se, tight.kl_se), 2.0 * math.hypot(loose.gain_se, tight.gain_se)
        least, most = chord_bounds(loose.beta, tight.beta, nats, kls, gains)
        return nats > -kls and least <= gain <= most


def moving_mean(values: NDArray[np.floating]) -> NDArray[np.floating]:
    """The centred mean over 1/20 of the series: of shrinking width at its start, of its last part at its end.

    So the first value stays what it was (a KL of 0), and the last one does not hang on one update.

    >>> moving_mean(np.array([0.0] * 39 + [4.0]))[-2:]
    array([1.33333333, 2.        ])
    """
    reach = len(values) // SMOOTHING // 2
    index = np.arange(len(values))
    before = np.minimum(index, reach)
    after = np.minimum(before, index[::-1])
    sums = np.concatenate([[0.0], np.cumsum(values)])
    smooth: NDArray[np.floating] = (sums[index + after + 1] - sums[index - before]) / (before + after + 1)
    return smooth


def plot_curves(runs: Sequence[tuple[str, RunStore]], out: Path, budget: float | None = None) -> Path:
    """Draw the runs' mean score and KL (± 1 standard error) over the steps as a PNG 1200 pixels wide; returns `out`.

    `runs`: label and store of each. `budget` draws a line at that KL, nats per response. Where the runs hold
    evaluations, gold and hold-out scores are drawn as marks.

    Raises InputError where there is nothing to draw, RunError where `out` cannot be written.
    """
    curves = [read_curves(label, store) for label, store in runs]
    if not any(len(run.score) or len(run.kl) for run in curves):
        raise InputError(f"nothing to draw: none of {len(curves)} runs has a mean score or a KL; wanted one update")
    from tether.drawing import draw_curves

    return _save(out, lambda target: draw_curves(curves, target, budget))


def plot_frontier(
    trails: Sequence[Trail],
    best_of_n: Sequence[BestOfN],
    sigma: float,
    out: Path,
    chord: Sequence[SweepPoint] | None = None,
) -> Path:
    """Draw Δr over √K: trails, best-of-n, the ceiling σ√(2K) and a sweep's chords, as a PNG; returns `out`.

    `sigma` is the standard deviation of the score on reference samples. `chord`: one point a β; chords that break the
    chord law are marked.

    Raises InputError where there is nothing to draw or σ is no positive number, RunError where `out` cannot be written.
    """
    if not (sigma > 0 and math.isfinite(sigma)):
        raise InputError(f"sigma is {sigma}; wanted the spread of the score on reference samples, a positive number")
    if not any(len(trail.kl) for trail in trails) and not best_of_n and not chord:
        raise InputError("nothing to draw: no trail, no best-of-n and no sweep; wanted at least one point")
    for trail in trails:
        if len(trail.kl) != len(trail.gain):
            raise InputError(f"{trail.label!r} has {len(trail.kl)} KLs and {len(trail.gain)} gains; wanted as many")
    from tether.drawing import draw_frontier

    chords = chords_of(chord or ())
    return _save(out, lambda target: draw_frontier(trails, best_of_n, sigma, target, chord or (), chords))


def read_curves(label: str, store: RunStore) -> RunCurves:
    """What `curves.png` shows of one run, out of its folder."""
    return RunCurves(
        label=label,
        score=_read(store, "score/mean", "score/se"),
        kl=_read(store, "kl/mean", "kl/se"),
        holdout=_read(store, "eval/holdout", "eval/holdout_se"),
        gold=_read(store, "eval/gold", "eval/gold_se"),
    )


def chords_of(points: Sequence[SweepPoint]) -> list[Chord]:
    """The chords between neighbours in β, the smallest β first."""
    return [Chord(loose, tight) for loose, tight in pairwise(sorted(points, key=lambda point: point.beta))]


def _read(store: RunStore, name: str, error_name: str) -> Series:
    """The metric where it is finite, each value with its standard error where one was logged."""
    curve, errors = store.curve(name), store.curve(error_name)
    finite = np.isfinite(curve.values)
    error_of = dict(zip(errors.steps.tolist(), np.nan_to_num(errors.values).tolist(), strict=True))
    steps = curve.steps[finite]
    return Series(steps, curve.values[finite], np.array([error_of.get(step, 0.0) for step in steps.tolist()]))


def _save(out: Path, draw: Callable[[Path], None]) -> Path:
    with complaints(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        draw(out)
    return out
