"""The shapes of COCO annotations: boxes, polygons and run-length masks, in pixels of an image as stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_builders.images import ImageError, read_orientation
from data_builders.readers.drafts import Draft
from data_builders.readers.files import shorten
from data_builders.readers.geometry import BadAnnotation, are_numbers, box_ring, fit_boxes, fit_outlines, read_pixels
from data_builders.readers.masks import read_mask_size, trace_mask
from data_builders.records import Point, Ring, Shape

# Where a pixel of an image stored on its side is displayed, by EXIF orientation; width and height as displayed.
TURNS: dict[int, Callable[[float, float, int, int], Point]] = {
    5: lambda x, y, width, height: (y, x),
    6: lambda x, y, width, height: (width - y, x),
    7: lambda x, y, width, height: (width - y, height - x),
    8: lambda x, y, width, height: (y, height - x),
}


@dataclass
class Image:
    """One entry of `images`; without a scale its stated size contradicts its file, and places mean nothing.

    `turned` is the EXIF orientation of a file whose annotations are about the pixels as stored, `holes` what masks had.
    """

    draft: Draft
    pointer: str
    has_scale: bool = True
    turned: int = 1
    annotations: int = 0
    holes: int = 0
    is_plain: bool = field(init=False)  # it is of known size, shown as stored, and its annotations are by persons

    def __post_init__(self) -> None:
        is_human = self.draft.book.source.origin == "human"
        self.is_plain = is_human and self.has_scale and self.turned == 1 and self.draft.unit is not None


class Drawn(NamedTuple):
    """Some shapes of a list of annotations: their places in it, their numbers, and the sizes of their images."""

    indices: list[int]
    values: list[list[float]]
    units: list[int]  # width and height in turn


def fit_shapes(annotations: list, of_images: list[Image | None]) -> list[Ring | None]:
    """What `fit` makes of an annotation that is as nearly all are, one box or polygon within its image; else `None`."""
    boxes, polygons = Drawn([], [], []), Drawn([], [], [])
    for index, (annotation, image) in enumerate(zip(annotations, of_images, strict=True)):
        if image is not None and image.is_plain:
            segments = annotation.get("segmentation")
            if not segments:
                drawn, values = boxes, annotation.get("bbox")
                is_plain = type(values) is list and len(values) == 4
            else:
                drawn, values = polygons, segments[0] if type(segments) is list and len(segments) == 1 else None
                is_plain = type(values) is list and len(values) >= 8 and len(values) % 2 == 0
            if is_plain:
                drawn.indices.append(index)
                drawn.values.append(values)
                drawn.units.extend(image.draft.unit)
    rings: list[Ring | None] = [None] * len(annotations)
    for drawn, fit in ((boxes, fit_boxes), (polygons, fit_outlines)):
        if are_numbers(drawn.values):
            for index, ring in zip(drawn.indices, fit(drawn.values, np.array(drawn.units).reshape(-1, 2)), strict=True):
                rings[index] = ring
    return rings


def read_shape(image: Image, annotation: Mapping) -> tuple[Shape, list[Ring]]:
    """The shape of an annotation, in pixels of the image as displayed."""
    shape, rings = _read_stored_shape(image, annotation)
    return shape, rings if image.turned == 1 else [_turn(shape, ring, image) for ring in rings]


def _read_stored_shape(image: Image, annotation: Mapping) -> tuple[Shape, list[Ring]]:
    segments = annotation.get("segmentation")
    if isinstance(segments, dict):
        return "polygon", _read_mask(image, segments)
    if not segments:
        left, top, width, height = _read_box(annotation.get("bbox"))
        return "box", [box_ring(left, top, left + width, top + height)]
    if not isinstance(segments, list):
        raise BadAnnotation("bad_annotation", f"segmentation is neither polygons nor a mask: {shorten(segments)}")
    rings = []
    for segment in segments if isinstance(segments[0], list) else [segments]:
        values = read_pixels(segment, "segmentation")
        if len(values) % 2 or len(values) < 6:
            raise BadAnnotation("bad_annotation", f"a polygon needs 3 or more points; got {len(values)} numbers")
        numbers = iter(values)
        rings.append(tuple(zip(numbers, numbers, strict=True)))
    return "polygon", rings


def _read_mask(image: Image, mask: dict) -> list[Ring]:
    height, width = read_mask_size(mask)
    unit = image.draft.unit if image.turned == 1 or image.draft.unit is None else image.draft.unit[::-1]
    if unit not in (None, (width, height)):
        message = f"the mask is of {width} x {height} pixels, the image of {unit[0]} x {unit[1]}"
        raise BadAnnotation("bad_mask", message)
    outlines = trace_mask(mask)
    image.holes += outlines.holes
    return outlines.rings


def _read_box(value: object) -> list[float]:
    values = read_pixels(value, "bbox")
    if len(values) != 4:
        raise BadAnnotation("bad_annotation", f"bbox needs x, y, width, height; got {len(values)} numbers")
    return values


def _turn(shape: Shape, ring: Ring, image: Image) -> Ring:
    """A ring in pixels of the image as stored, in those of the image as displayed."""
    assert image.draft.size is not None
    width, height = image.draft.size
    turned = tuple(TURNS[image.turned](x, y, width, height) for x, y in ring)
    (left, top), (right, bottom) = ring[0], ring[2]
    if shape != "box" or right < left or bottom < top:  # a negative size is refused as such
        return turned
    xs, ys = zip(*turned, strict=True)
    return box_ring(min(xs), min(ys), max(xs), max(ys))


def read_turn(path: Path) -> int:
    """The EXIF orientation of an image that is stored on its side, 1 for any other."""
    try:
        orientation = read_orientation(path)
    except ImageError:
        return 1
    return orientation if orientation in TURNS else 1
