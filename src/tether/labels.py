"""Where labels stand in a picture, so that none covers another: arithmetic on positions, no drawing.

spread   along one line, each as near to its own place as the others allow
place    around points of a plane, in the emptiest of the neighbouring places
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DIRECTIONS = ((1, 0), (1, 1), (1, -1), (-1, 0), (0, 1), (0, -1), (-1, 1), (-1, -1))
"""Where a label may stand from its point, the best first."""


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels, the origin at the lower left."""

    left: float
    bottom: float
    width: float
    height: float

    @property
    def right(self) -> float:
        return self.left + self.width

    @property
    def top(self) -> float:
        return self.bottom + self.height

    def overlap(self, other: Box) -> float:
        """The common area, in square pixels.

        >>> Box(0, 0, 2, 2).overlap(Box(1, 1, 2, 2))
        1
        """
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(wide, 0) * max(high, 0)

    def count(self, points: NDArray[np.floating]) -> int:
        """How many of the points, one a row, lie in it."""
        x, y = points[:, 0], points[:, 1]
        return int(((self.left <= x) & (x <= self.right) & (self.bottom <= y) & (y <= self.top)).sum())


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions at least `gap` apart within [low, high], with the least total squared distance from those wanted.

    Order is kept. Where they do not fit, they are laid out evenly over [low, high].

    >>> spread([1.0, 1.2, 5.0], gap=1.0, low=0.0, high=10.0)
    [0.6, 1.6, 5.0]
    """
    if len(wanted) > 1 and gap * (len(wanted) - 1) > high - low:
        gap = (high - low) / (len(wanted) - 1)
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    # With the gaps taken out, the positions need only not fall: isotonic regression by pooling neighbours.
    blocks: list[list[float]] = []
    for rank, index in enumerate(order):
        blocks.append([wanted[index] - rank * gap])
        while len(blocks) > 1 and _mean(blocks[-2]) > _mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    level = [_mean(block) for block in blocks for _ in block]
    top = high - gap * (len(wanted) - 1)
    positions = dict(zip(order, level, strict=True))
    ranks = {index: rank for rank, index in enumerate(order)}
    return [min(max(positions[index], low), top) + ranks[index] * gap for index in range(len(wanted))]


def place(
    anchor: tuple[float, float],
    size: tuple[float, float],
    inside: Box,
    taken: Sequence[Box],
    points: NDArray[np.floating],
    distance: float,
) -> Box:
    """The place for a label of this size beside the anchor that covers the least of other labels and points.

    All in pixels; points one a row. Tried are the eight directions at the distance and at twice it; among equals the
    first is taken: to the right and near.
    """

    def cost(trial: tuple[int, Box]) -> float:
        factor, box = trial
        outside = size[0] * size[1] - box.overlap(inside)
        covered = sum(box.overlap(other) for other in taken)
        return 10.0 * (outside + covered) + 40.0 * box.count(points) + 80.0 * factor

    trials = [(factor, _beside(anchor, size, dx, dy, factor * distance)) for factor in (1, 2) for dx, dy in DIRECTIONS]
    return min(trials, key=cost)[1]


def _beside(anchor: tuple[float, float], size: tuple[float, float], dx: int, dy: int, distance: float) -> Box:
    left = anchor[0] + dx * distance + (dx - 1) / 2 * size[0]
    return Box(left, anchor[1] + dy * distance + (dy - 1) / 2 * size[1], *size)


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)
