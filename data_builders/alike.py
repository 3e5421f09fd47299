"""What the pictures of all sources have in common: copies, mirrored copies, and mosaics with the pictures they show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from data_builders.image_copies import find_copies, make_thumbnail
from data_builders.mosaics import Crossing, find_crossing, find_parts, is_mosaic


class Look(NamedTuple):
    """What is kept of a decoded picture to compare it with others; about 9 KB."""

    thumbnail: np.ndarray
    crossing: Crossing


class Alike(NamedTuple):
    """Two pictures, by image id, that show the same: a copy, a mirrored copy, or a mosaic (first) and a part of it."""

    first: str
    second: str
    kind: Literal["copy", "flipped", "part"]
    correlation: float


class Comparison(NamedTuple):
    """Image ids of mosaics with where their seams cross, and every pair of pictures that are alike."""

    mosaics: Mapping[str, Crossing]
    alike: tuple[Alike, ...]


def look_at(pixels: Image.Image) -> Look:
    """What is to be kept of a picture."""
    return Look(make_thumbnail(pixels), find_crossing(pixels))


def compare(looks: Mapping[str, Look]) -> Comparison:
    """Compare pictures of different pixels, each with each; the result does not depend on their order."""
    ids = sorted(looks)
    thumbnails, crossings = [looks[i].thumbnail for i in ids], [looks[i].crossing for i in ids]
    copies = find_copies(thumbnails)
    alike = [Alike(ids[m.first], ids[m.second], "flipped" if m.flipped else "copy", m.correlation) for m in copies]
    parts = find_parts(thumbnails, crossings)
    mosaics = {}
    for place, crossing in enumerate(crossings):
        if is_mosaic(crossing, parts.get(place, [])):
            mosaics[ids[place]] = crossing
            alike += [Alike(ids[place], ids[p.shows], "part", p.correlation) for p in parts.get(place, [])]
    return Comparison(mosaics, tuple(sorted(set(alike))))
