"""Shapes as annotators draw them, made fit for a record: closed, of some area, within the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import shapely

from data_builders.records import Bounds, Ring, Severity, Shape

NOISE = 1e-6  # exporters round to six digits: so much over the edge is no overshoot
WARN_BEYOND = 0.01  # of a side; farther out, something is wrong with the annotation or its image
LEAST_INSIDE = 0.5
LEAST_AREA = 1e-12
FARTHEST_PIXEL = 1e7
NUMBERS = frozenset({int, float})
AREAS = frozenset({"box", "oriented_box", "polygon"})
IMAGE = shapely.box(0, 0, 1, 1)


class BadAnnotation(ValueError):
    """An annotation that cannot be used; `code` goes into its problem."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Note(NamedTuple):
    """What was done to a shape to make it fit."""

    code: str
    severity: Severity
    message: str


class Fitted(NamedTuple):
    """A shape in fractions of the image; `parts` is empty where the image's size is unknown."""

    shape: Shape
    parts: tuple[Ring, ...]
    notes: tuple[Note, ...] = ()


def box_ring(left: float, top: float, right: float, bottom: float) -> Ring:
    """The corners of a box, clockwise from the top left."""
    return (left, top), (right, top), (right, bottom), (left, bottom)


def ellipse_ring(cx: float, cy: float, rx: float, ry: float, theta: float = 0.0, points: int = 32) -> Ring:
    """An ellipse as a polygon; `theta` (radians, clockwise as seen) turns the axis of `rx`."""
    cos, sin = math.cos(theta), math.sin(theta)
    turns = [2 * math.pi * number / points for number in range(points)]
    unit = [(rx * math.cos(turn), ry * math.sin(turn)) for turn in turns]
    return tuple((cx + x * cos - y * sin, cy + x * sin + y * cos) for x, y in unit)


def read_pixels(values: object, what: str) -> list[float]:
    """Check numbers out of a JSON document; `what` names them in the message."""
    if not isinstance(values, (list, tuple)) or not NUMBERS.issuperset(map(type, values)):
        raise BadAnnotation("bad_annotation", f"{what} is not a list of numbers")
    if values:
        are_pixels = min(values) > -FARTHEST_PIXEL and max(values) < FARTHEST_PIXEL
        if not are_pixels or math.isnan(sum(values)):  # NaN may hide from min and max, but not from a sum
            raise BadAnnotation("bad_annotation", f"{what} has a number that cannot be a pixel")
    return list(map(float, values))


def survey_outlines(rings: Sequence[Ring]) -> list[Bounds | None]:
    """The bounds of each outline that encloses an area without crossing itself, `None` for any other: for `fit`.

    Many at once take a fifth of the time that `fit` takes to find it out for each.
    """
    bounds: list[Bounds | None] = [None] * len(rings)
    usable = [index for index, ring in enumerate(rings) if len(ring) > 3]
    if usable:
        counts = np.array([len(rings[index]) for index in usable])
        values = chain.from_iterable(chain.from_iterable([rings[index] for index in usable]))
        points = np.fromiter(values, float, 2 * counts.sum()).reshape(-1, 2)
        sides = np.hstack(_find_bounds(points, counts)).tolist()
        for index, is_simple, box in zip(usable, _are_simple(points, counts).tolist(), sides, strict=True):
            bounds[index] = tuple(box) if is_simple else None
    return bounds


def fit_outlines(outlines: Sequence[list[float]], sizes: np.ndarray | None = None) -> list[Ring | None]:
    """What `fit` makes of outlines that are as nearly all are, in a fourth of its time; `None` for any other.

    Such an outline does not cross itself and lies within its image. Each is x and y of four points or more in turn,
    in pixels where `sizes` are width and height of the image of each, else in fractions.
    """
    if not outlines:
        return []
    counts = np.array([len(values) // 2 for values in outlines])
    points = _as_rows(outlines, 2)
    fits = _lie_within(*_find_bounds(points, counts), sizes)
    fits[fits] = _are_simple(points[np.repeat(fits, counts)], counts[fits])
    ends = np.cumsum(counts)
    is_closed = (points[ends - counts] == points[ends - 1]).all(axis=1)
    if sizes is None:
        values = chain.from_iterable(outlines)
        pairs = zip(values, values, strict=True)
    else:
        pairs = zip(*(points / np.repeat(sizes, counts, axis=0)).T.tolist(), strict=True)
    rings = [tuple(islice(pairs, count)) for count in counts.tolist()]
    return [
        (ring[:-1] if closed else ring) if fit and (len(ring) > 4 or not closed) else None
        for ring, fit, closed in zip(rings, fits.tolist(), is_closed.tolist(), strict=True)
    ]


def fit_boxes(boxes: Sequence[list[float]], sizes: np.ndarray) -> list[Ring | None]:
    """What `fit` makes of boxes (left, top, width, height) like nearly all, in a third of its time; `None` for others.

    Such a box has an area and lies within its image. `sizes` are width and height of the image of each, in pixels.
    """
    if not boxes:
        return []
    numbers = _as_rows(boxes, 4)
    with np.errstate(over="ignore", invalid="ignore"):  # of numbers far outside of any image
        low, high = numbers[:, :2], numbers[:, :2] + numbers[:, 2:]
        fits = _lie_within(low, high, sizes) & (low < high).all(axis=1)
        fits &= np.prod(high - low, axis=1) > LEAST_AREA
    sides = zip(*(low / sizes).T.tolist(), *(high / sizes).T.tolist(), fits.tolist(), strict=True)
    return [
        ((left, top), (right, top), (right, bottom), (left, bottom)) if fit else None
        for left, top, right, bottom, fit in sides
    ]


def are_numbers(lists: Sequence[list]) -> bool:
    """Whether some lists out of a JSON document hold nothing but numbers."""
    return NUMBERS.issuperset(map(type, chain.from_iterable(lists)))


def _as_rows(lists: Sequence[list[float]], columns: int) -> np.ndarray:
    """The numbers of some lists, so many to a row; all are NaN if one is an integer that no float can hold."""
    count = sum(map(len, lists))
    try:
        return np.fromiter(chain.from_iterable(lists), float, count).reshape(-1, columns)
    except OverflowError:
        return np.full((count // columns, columns), math.nan)


def _lie_within(low: np.ndarray, high: np.ndarray, sizes: np.ndarray | None) -> np.ndarray:
    """Whether each shape lies within its image, and is in pixels if `sizes` are given."""
    if sizes is None:
        return (low >= 0).all(axis=1) & (high <= 1).all(axis=1)
    is_in_pixels = (high > 1).any(axis=1) | (sizes == 1).all(axis=1)
    return is_in_pixels & (low >= 0).all(axis=1) & (high <= sizes).all(axis=1)


def _find_bounds(points: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The left top and the right bottom of each outline."""
    starts = np.cumsum(counts) - counts
    return np.minimum.reduceat(points, starts), np.maximum.reduceat(points, starts)


def _are_simple(points: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Whether each outline encloses an area without crossing itself."""
    simple = np.zeros(len(counts), bool)
    four = counts == 4
    simple[four] = _are_convex(points[np.repeat(four, counts)].reshape(-1, 4, 2))
    rest = ~simple
    indices = np.repeat(np.arange(rest.sum()), counts[rest])
    polygons = shapely.polygons(shapely.linearrings(points[np.repeat(rest, counts)], indices=indices))
    simple[rest] = shapely.is_valid(polygons) & (shapely.area(polygons) > LEAST_AREA)
    return simple


def _are_convex(corners: np.ndarray) -> np.ndarray:
    """Whether four corners turn clearly the same way at each, which takes far less time than what shapely does."""
    sides = np.roll(corners, -1, axis=1) - corners
    following = np.roll(sides, -1, axis=1)
    turns = sides[..., 0] * following[..., 1] - sides[..., 1] * following[..., 0]
    turns *= np.sign(turns[:, :1])
    return (turns.min(axis=1) > NOISE * turns.max(axis=1)) & (turns.sum(axis=1) / 4 > LEAST_AREA)


def fit(
    shape: Shape,
    rings: Sequence[Ring],
    size: tuple[int, int] | None = (1, 1),
    *,
    bounds: Sequence[Bounds | None] = (),
) -> Fitted:
    """Repair a shape, bring it from the units of `size` (pixels, or 1 by 1 for fractions) to fractions, and clip it.

    `bounds` are what `survey_outlines` found of the rings, where it was asked.

    Raises:
        BadAnnotation: when nothing of use is left of it.
    """
    if len(rings) == 1 and size is not None:
        if shape == "box":
            ring = _fit_plain_box(rings[0], size)
        else:
            ring = _fit_plain_outline(rings[0], bounds[0], size) if bounds and bounds[0] and shape in AREAS else None
        if ring:
            return Fitted(_name(shape, (ring,)), (ring,))
    parts, notes = _repair(shape, tuple(rings))
    shape = _name(shape, parts)
    if size is None:
        return Fitted(shape, (), notes)
    if size != (1, 1):
        width, height = size
        if shape in AREAS and all(0 <= value <= 1 for ring in parts for point in ring for value in point):
            raise BadAnnotation("looks_like_fractions", "pixels are due here, these are fractions of the image")
        parts = tuple([tuple([(x / width, y / height) for x, y in ring]) for ring in parts])
    return _clip(shape, parts, notes)


def _fit_plain_box(ring: Ring, size: tuple[int, int]) -> Ring | None:
    """A box in fractions if it is as nearly all are, well-formed and within the image: two thirds of the time saved."""
    (left, top), _, (right, bottom), _ = ring
    width, height = size
    if (
        not (0 <= left < right <= width and 0 <= top < bottom <= height)
        or (right - left) * (bottom - top) <= LEAST_AREA
    ):
        return None
    if size == (1, 1):
        return ring
    is_in_pixels = right > 1 or bottom > 1
    return box_ring(left / width, top / height, right / width, bottom / height) if is_in_pixels else None


def _fit_plain_outline(ring: Ring, bounds: Bounds, size: tuple[int, int]) -> Ring | None:
    """An outline in fractions if it lies within the image, given that it does not cross itself."""
    left, top, right, bottom = bounds
    width, height = size
    if left < 0 or top < 0 or right > width or bottom > height:
        return None
    ring = ring[:-1] if ring[0] == ring[-1] else ring
    if size == (1, 1):
        return ring
    is_in_pixels = right > 1 or bottom > 1
    return tuple([(x / width, y / height) for x, y in ring]) if is_in_pixels else None


def _repair(shape: Shape, rings: tuple[Ring, ...]) -> tuple[tuple[Ring, ...], tuple[Note, ...]]:
    if shape not in AREAS:
        return rings, ()
    if shape == "box":
        (left, top), _, (right, bottom), _ = rings[0]
        if right < left or bottom < top:
            raise BadAnnotation("negative_size", "the box has a negative width or height")
        if (right - left) * (bottom - top) <= LEAST_AREA:
            raise BadAnnotation("zero_area", "the box has no area")
        return rings, ()
    parts: list[Ring] = []
    crossed = False
    for ring in rings:
        ring = ring[:-1] if len(ring) > 1 and ring[0] == ring[-1] else ring
        if len(ring) < 3:
            raise BadAnnotation("too_few_points", f"a polygon needs 3 points; got {len(ring)}")
        if _is_simple(ring):
            parts.append(ring)
        else:
            parts += _rings(shapely.make_valid(shapely.Polygon(ring)))
            crossed = True
    if not parts:
        raise BadAnnotation("zero_area", "the polygon has no area")
    if not crossed:
        return tuple(parts), ()
    return tuple(parts), (
        Note("bow_tie_repaired", "warning", f"the outline crosses itself; read as {len(parts)} polygon(s)"),
    )


def _is_simple(ring: Ring) -> bool:
    if len(ring) == 4:  # four turns the same way make a convex outline, and this is 20 times faster than shapely
        (ax, ay), (bx, by), (cx, cy), (dx, dy) = ring
        turn = (bx - ax) * (cy - by) - (by - ay) * (cx - bx)
        turns = (
            turn,
            (cx - bx) * (dy - cy) - (cy - by) * (dx - cx),
            (dx - cx) * (ay - dy) - (dy - cy) * (ax - dx),
            (ax - dx) * (by - ay) - (ay - dy) * (bx - ax),
        )
        if (min(turns) > LEAST_AREA) if turn > 0 else (max(turns) < -LEAST_AREA):
            return True
    polygon = shapely.Polygon(ring)
    return polygon.is_valid and polygon.area > LEAST_AREA


def _rings(geometry: shapely.Geometry) -> list[Ring]:
    """The outlines of all polygons in a geometry; lines and points that a repair or a cut leaves over have no area."""
    pieces = getattr(geometry, "geoms", [geometry])
    nested = [ring for piece in pieces if hasattr(piece, "geoms") for ring in _rings(piece)]
    polygons = [piece for piece in pieces if piece.geom_type == "Polygon" and piece.area > LEAST_AREA]
    return nested + [tuple(piece.exterior.coords[:-1]) for piece in polygons]


def _clip(shape: Shape, parts: tuple[Ring, ...], notes: tuple[Note, ...]) -> Fitted:
    xs, ys = zip(*(parts[0] if len(parts) == 1 else chain.from_iterable(parts)), strict=True)
    overshoot = max(-min(xs), max(xs) - 1, -min(ys), max(ys) - 1)
    if overshoot <= 0:
        return Fitted(shape, parts, notes)
    if overshoot <= NOISE:
        return Fitted(shape, tuple(map(_clamp, parts)), notes)
    if shape == "box":
        kept = [_clamp(parts[0])]
        inside = _box_area(kept[0]) / _box_area(parts[0])
    elif shape in AREAS:
        polygons = [shapely.Polygon(ring) for ring in parts]
        kept = [_clamp(ring) for polygon in polygons for ring in _rings(polygon.intersection(IMAGE))]
        inside = sum(shapely.Polygon(ring).area for ring in kept) / sum(polygon.area for polygon in polygons)
    else:
        kept, inside = _clip_lines(parts)
    if inside < LEAST_INSIDE:
        raise BadAnnotation("outside_image", f"only {inside:.0%} of the shape lies within the image")
    message = f"reaches over the edge of the image by {overshoot:.2%} of a side; clipped, {1 - inside:.1%} of it lost"
    severity: Severity = "warning" if overshoot > WARN_BEYOND else "info"
    return Fitted(_name(shape, kept), tuple(kept), (*notes, Note("clipped", severity, message)))


def _name(shape: Shape, parts: Sequence[Ring]) -> Shape:
    """An oriented box has four corners; what a repair or a cut made of it is a polygon."""
    return "polygon" if shape == "oriented_box" and (len(parts) != 1 or len(parts[0]) != 4) else shape


def _clip_lines(parts: Sequence[Ring]) -> tuple[list[Ring], float]:
    lines = [shapely.LineString(ring) for ring in parts if len(ring) > 1]
    length = sum(line.length for line in lines)
    if not length:
        return [], 0.0  # a point is inside or it is not
    cut = [line.intersection(IMAGE) for line in lines]
    pieces = [piece for geometry in cut for piece in getattr(geometry, "geoms", [geometry])]
    kept = [piece for piece in pieces if piece.geom_type == "LineString" and piece.length]
    return [_clamp(tuple(piece.coords)) for piece in kept], sum(piece.length for piece in kept) / length


def _box_area(ring: Ring) -> float:
    return (ring[2][0] - ring[0][0]) * (ring[2][1] - ring[0][1])


def _clamp(ring: Ring) -> Ring:
    return tuple((min(max(x, 0.0), 1.0), min(max(y, 0.0), 1.0)) for x, y in ring)
