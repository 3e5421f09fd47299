"""COCO's run-length masks, brought to outlines without ever drawing the mask."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import shapely

from data_builders.images import MAX_PIXELS
from data_builders.readers.geometry import BadAnnotation
from data_builders.records import Ring

MAX_BOXES = 20_000  # a mask of a whole panoramic has some hundred; joining more takes many seconds
Run = tuple[int, int, int]  # column, first row, row after the last


class Outlines(NamedTuple):
    """The outer outlines of a mask in pixels; a pixel is the square to the right of and below its numbers."""

    rings: list[Ring]
    holes: int


def trace_mask(mask: dict) -> Outlines:
    """Outline a COCO mask `{"size": [height, width], "counts": …}`, whose counts are a list or COCO's text.

    Raises:
        BadAnnotation: when the counts are none, do not add up to the size, or make noise and no shape.
    """
    height, _ = read_mask_size(mask)
    boxes = _merge_columns(_split_columns(_read_counts(mask), height))
    if len(boxes) > MAX_BOXES:
        raise BadAnnotation("bad_mask", f"the mask is torn into {len(boxes):,} pieces, which is noise and no finding")
    shape = shapely.union_all(shapely.box(*np.array(boxes).reshape(-1, 4).T)).simplify(0)
    polygons = [piece for piece in getattr(shape, "geoms", [shape]) if piece.geom_type == "Polygon" and piece.area]
    rings = [tuple(polygon.exterior.coords[:-1]) for polygon in polygons]
    if not rings:
        raise BadAnnotation("zero_area", "the mask is empty")
    return Outlines(rings, sum(len(polygon.interiors) for polygon in polygons))


def read_mask_size(mask: dict) -> tuple[int, int]:
    """Height and width that a mask states, in pixels; raise BadAnnotation where they are none."""
    size = mask.get("size")
    if (
        not isinstance(size, list)
        or len(size) != 2
        or not all(type(side) is int and side >= 1 for side in size)
        or size[0] * size[1] > MAX_PIXELS
    ):
        raise BadAnnotation("bad_mask", "a mask needs `size: [height, width]` in pixels")
    return size[0], size[1]


def _read_counts(mask: dict) -> list[int]:
    counts = mask.get("counts")
    if isinstance(counts, str):
        counts = decode_counts(counts)
    height, width = read_mask_size(mask)
    if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
        raise BadAnnotation("bad_mask", "the counts of a mask are neither whole numbers from 0 nor COCO's text")
    if sum(counts) != height * width:
        message = f"the counts of the mask do not add up to its size of {width} x {height} pixels"
        raise BadAnnotation("bad_mask", message)
    return counts


def decode_counts(text: str) -> list[int]:
    """Read COCO's compressed counts: five bits to a character, lowest first, from the third on as differences.

    Not left to pycocotools, which draws the whole mask first, and takes text that does not fill it (2.0.11).
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 60:
            raise BadAnnotation("bad_mask", f"{character!r} at that place is no part of a mask's compressed counts")
        value |= (code & 31) << shift
        shift += 5
        if code & 32:  # more to come
            continue
        if code & 16:  # negative
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    if shift:
        raise BadAnnotation("bad_mask", "the compressed counts of the mask end in the middle of a number")
    return counts


def _split_columns(counts: Iterable[int], height: int) -> Iterator[Run]:
    """The runs of ones (every second count), cut where one column ends and the next begins."""
    ends = list(accumulate(counts))
    for start, end in zip(ends[::2], ends[1::2], strict=False):
        while start < end:
            column, row = divmod(start, height)
            stop = min(end, (column + 1) * height)
            yield column, row, stop - column * height
            start = stop


def _merge_columns(runs: Iterable[Run]) -> list[tuple[int, int, int, int]]:
    """Boxes of neighbouring columns with the same rows: a mask with straight sides has few."""
    columns: dict[tuple[int, int], list[int]] = defaultdict(list)
    for column, top, bottom in runs:
        columns[top, bottom].append(column)
    boxes = []
    for (top, bottom), members in columns.items():
        left = previous = members[0]
        for column in members[1:]:
            if column != previous + 1:
                boxes.append((left, top, previous + 1, bottom))
                left = column
            previous = column
        boxes.append((left, top, previous + 1, bottom))
    return boxes
