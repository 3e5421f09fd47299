"""Mosaics, found from the pixels: four pictures put together to one, as detectors are trained with.

Their names do not tell them, and a place in a mosaic is no place in a mouth. Two things give one away: a straight step
through the whole width and another through the whole height, or quarters that show other pictures of the set.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_builders.image_copies import cut, fit, hash_signs, walk_nearest

STEP = 8.0  # grey levels between two rows that neighbour rows do not have
SHARP = 0.33  # share of an arm that must be such a step; measured: mosaics 0.53 and more, other pictures 0.21 and less
STEEP = 2.0  # how many times the change across an arm exceeds that beside it; measured: 2.6 and more, 1.9 and less
BESIDE = (-4, -3, -2, 2, 3, 4)  # rows that a seam blurred by resizing does not reach
BORDER = 0.05  # share of the picture at its edges where no seam is looked for: there are frames
LONGEST = 1024  # pixels; what is larger is reduced first
SHORTEST = 48
CANDIDATES = 4
SAME_PART = 0.9  # correlation of a quarter with the picture it shows; a quarter is small, so this is looser than a copy


class Crossing(NamedTuple):
    """Where two seams seem to cross, in fractions of width and height; `clear` is 1 or more where there is no doubt."""

    x: float
    y: float
    clear: float


def find_crossing(image: Image.Image) -> Crossing:
    """The point where a horizontal and a vertical seam through the whole picture cross, or come nearest to doing so."""
    grey = image.convert("L")
    grey.thumbnail((LONGEST, LONGEST), Image.Resampling.BOX)
    best = Crossing(0.5, 0.5, 0.0)
    for _ in range(3):
        if min(grey.size) < SHORTEST:
            break
        best = max(best, _find_crossing(np.asarray(grey, dtype=np.float32)), key=lambda crossing: crossing.clear)
        grey = grey.reduce(2)  # a seam that was blurred by resizing is sharp again
    return best


def _find_crossing(grey: np.ndarray) -> Crossing:
    height, width = grey.shape
    across, down = np.abs(np.diff(grey, axis=0, prepend=grey[:1])), np.abs(np.diff(grey.T, axis=0, prepend=grey.T[:1]))
    best = Crossing(0.5, 0.5, 0.0)
    for y in _strongest(across):
        for x in _strongest(down):
            across_arms = np.split(_around(across, y), [x], axis=1)
            down_arms = np.split(_around(down, x), [y], axis=1)
            arms = [*across_arms, *down_arms]
            clear = max(min(map(_sharp, arms)) / SHARP, min(map(_steep, arms)) / STEEP)
            if clear > best.clear:
                best = Crossing(x / width, y / height, round(clear, 3))
    return best


def _strongest(change: np.ndarray) -> list[int]:
    """The rows whose change stands out most from that of the rows beside them."""
    rows = change.mean(axis=1)
    beside = np.max([np.roll(rows, by) for by in BESIDE], axis=0)
    border = max(5, int(len(rows) * BORDER))
    order = np.argsort((rows / (beside + 1))[border:-border])[::-1]
    return [int(row) + border for row in order[:CANDIDATES]]


def _around(change: np.ndarray, row: int) -> np.ndarray:
    """The changes across a row and across the four rows before and after it; the row itself comes fifth."""
    return change[row - 4 : row + 5]


def _sharp(arm: np.ndarray) -> float:
    """Share of a seam's length at which the step is sharp within one pixel."""
    change, beside = arm[4], np.maximum(arm[3], arm[5])
    return float(((change > STEP) & (change > 2 * beside)).mean())


def _steep(arm: np.ndarray) -> float:
    """How many times the mean change across a seam exceeds that anywhere beside it."""
    rows = arm.mean(axis=1)
    return float(rows[4] / (max(rows[4 + by] for by in BESIDE) + 1))


class Part(NamedTuple):
    """A quarter of a picture (0 top left, 1 top right, 2 bottom left, 3 bottom right) that shows a whole other one."""

    quarter: int
    shows: int
    correlation: float


def find_parts(thumbnails: Sequence[np.ndarray], crossings: Sequence[Crossing]) -> Mapping[int, list[Part]]:
    """Which pictures have quarters that show others of the list, by their places in it.

    A picture is cut where its seams cross or seem to. A quarter that shows only a piece of a picture, or one that is
    turned, is not found.
    """
    if len(thumbnails) < 2:
        return {}
    stack = np.stack(thumbnails)
    whole = hash_signs(stack)
    found: dict[int, list[Part]] = defaultdict(list)
    for quarter in range(4):
        windows = [_quarter(crossing, quarter) for crossing in crossings]
        parts = np.stack([cut(thumbnail, window) for thumbnail, window in zip(stack, windows, strict=True)])

        def verify(place: int, other: int, parts: np.ndarray = parts, quarter: int = quarter) -> bool:
            correlation = fit(parts[place], stack[other], finest=48)
            if correlation >= SAME_PART:
                found[place].append(Part(quarter, other, round(correlation, 3)))
            return correlation >= SAME_PART

        walk_nearest(hash_signs(parts), whole, verify)
    return found


def _quarter(crossing: Crossing, quarter: int) -> tuple[float, float, float, float]:
    left, right = ((0.0, crossing.x), (crossing.x, 1.0))[quarter % 2]
    top, bottom = ((0.0, crossing.y), (crossing.y, 1.0))[quarter // 2]
    return left, top, right, bottom


def is_mosaic(crossing: Crossing, parts: Sequence[Part]) -> bool:
    """Whether a picture is a mosaic: its seams are clear, or two of its quarters show two other pictures."""
    return crossing.clear >= 1 or len({part.shows for part in parts}) >= 2
