"""Shapes as annotators draw them, made fit for a record: closed, of some area, within the image."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import shapely

from data_builders.records import Ring, Severity, Shape

NOISE = 1e-6  # exporters round to six digits: so much over the edge is no overshoot
WARN_BEYOND = 0.01  # of a side; farther out, something is wrong with the annotation or its image
LEAST_INSIDE = 0.5
LEAST_AREA = 1e-12
FARTHEST_PIXEL = 1e7
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
    if not isinstance(values, (list, tuple)) or not all(type(value) in (int, float) for value in values):
        raise BadAnnotation("bad_annotation", f"{what} is not a list of numbers")
    if not all(-FARTHEST_PIXEL < value < FARTHEST_PIXEL for value in values):  # false for NaN too
        raise BadAnnotation("bad_annotation", f"{what} has a number that cannot be a pixel")
    return [float(value) for value in values]


def fit(shape: Shape, rings: Iterable[Ring], size: tuple[int, int] | None = (1, 1)) -> Fitted:
    """Repair a shape, bring it from the units of `size` (pixels, or 1 by 1 for fractions) to fractions, and clip it.

    Raises:
        BadAnnotation: when nothing of use is left of it.
    """
    parts, notes = _repair(shape, tuple(rings))
    shape = _name(shape, parts)
    if size is None:
        return Fitted(shape, (), notes)
    if size != (1, 1):
        width, height = size
        if shape in AREAS and all(0 <= value <= 1 for ring in parts for point in ring for value in point):
            raise BadAnnotation("looks_like_fractions", "pixels are due here, these are fractions of the image")
        parts = tuple(tuple((x / width, y / height) for x, y in ring) for ring in parts)
    return _clip(shape, parts, notes)


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
    note = Note("bow_tie_repaired", "warning", f"the outline crosses itself; read as {len(parts)} polygon(s)")
    return tuple(parts), (note,) if crossed else ()


def _is_simple(ring: Ring) -> bool:
    if len(ring) == 4:  # four turns the same way make a convex outline, and this is 20 times faster than shapely
        (ax, ay), (bx, by), (cx, cy), (dx, dy) = ring
        turns = (
            (bx - ax) * (cy - by) - (by - ay) * (cx - bx),
            (cx - bx) * (dy - cy) - (cy - by) * (dx - cx),
            (dx - cx) * (ay - dy) - (dy - cy) * (ax - dx),
            (ax - dx) * (by - ay) - (ay - dy) * (bx - ax),
        )
        if min(turns) > LEAST_AREA or max(turns) < -LEAST_AREA:
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
    xs = [x for ring in parts for x, _ in ring]
    ys = [y for ring in parts for _, y in ring]
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
