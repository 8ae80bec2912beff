"""Curves for the page: thinned to its pixels, and packed into columns of bytes.

    thin    of each of `width` columns of steps the least and the greatest value, in their order
    pack    "TTH1" · uint32 header length · header as JSON · float64 columns, little-endian

A spike of one update is seen at any width, which no mean and no every-nth-point would show. Knows no run.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from tether.records import Curve

MAGIC = b"TTH1"
ALIGNED = 8  # bytes: a browser reads float64 columns only from multiples of it


def thin(curve: Curve, width: int) -> Curve:
    """The curve in at most 2·width + 2 points: first, last, and each column's least and greatest value.

    A column in which nothing is finite keeps one NaN; a curve of at most that many points is whole.

    >>> thin(Curve(np.arange(6), np.array([0.0, 5.0, 1.0, 2.0, -3.0, 0.0])), 1).values.tolist()
    [0.0, 5.0, -3.0, 0.0]
    """
    count = len(curve.steps)
    if count <= 2 * width + 2:
        return curve
    steps = curve.steps
    place = (steps - steps[0]) * width // (steps[-1] - steps[0] + 1)
    begins = np.flatnonzero(np.diff(place, prepend=-1))
    low = _extremes(np.where(np.isnan(curve.values), np.inf, curve.values), begins, np.minimum)
    high = _extremes(np.where(np.isnan(curve.values), -np.inf, curve.values), begins, np.maximum)
    kept = np.unique(np.concatenate([[0], low, high, [count - 1]]))
    return Curve(steps[kept], curve.values[kept])


def _extremes(values: NDArray[np.float64], begins: NDArray[np.intp], best: np.ufunc) -> NDArray[np.intp]:
    """Where the first least or greatest value of each column stands."""
    lengths = np.diff(begins, append=len(values))
    is_best = values == np.repeat(best.reduceat(values, begins), lengths)
    places = np.flatnonzero(is_best)
    column = np.repeat(np.arange(len(begins)), lengths)[places]
    first: NDArray[np.intp] = places[np.flatnonzero(np.diff(column, prepend=-1))]
    return first


def pack(cursor: str, curves: Mapping[str, Curve], of: Mapping[str, int]) -> bytes:
    """The curves as the page's binary form; `of` says how many points each had before it was thinned."""
    series = [{"name": name, "points": len(curve.steps), "of": of[name]} for name, curve in curves.items()]
    header = json.dumps({"cursor": cursor, "series": series}, ensure_ascii=False).encode()
    header += b" " * (-len(header) % ALIGNED)
    columns = [column.astype("<f8").tobytes() for curve in curves.values() for column in curve]
    return b"".join([MAGIC, struct.pack("<I", len(header)), header, *columns])


def as_lists(cursor: str, curves: Mapping[str, Curve], of: Mapping[str, int]) -> dict[str, object]:
    """The same as plain values, for reports and programs."""
    series = {
        name: {"steps": curve.steps.tolist(), "values": curve.values.tolist(), "of": of[name]}
        for name, curve in curves.items()
    }
    return {"cursor": cursor, "series": series}
