"""Pictures that were changed to train detectors: declared by the exporter, or found from the pixels.

A place means nothing in a mirrored picture, in one that was turned and in a mosaic, so nothing is located in them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from data_builders.alike import Comparison
from data_builders.readers.files import read_text
from data_builders.readers.geometry import BadAnnotation
from data_builders.records import ImageRecord, Problem
from data_builders.sources import Source

# What Roboflow's README files say: "* 50% probability of horizontal flip", "* Random rotation of between -15 and +15".
DECLARED = re.compile(r"^\s*[*-]\s.*\b(flip\w*|rotat\w*|mosaic\w*)", re.IGNORECASE)
SPOILS_PLACES = (
    "so nothing is located in any image of this source; if none is changed, remove the line or state `locations: true`"
)
ByPixels = Mapping[str, Sequence[ImageRecord]]


def find_declared(source: Source) -> Iterator[Problem]:
    """A warning for each line of the source's README files that declares flips, rotations or mosaics."""
    for path in sorted(source.root.rglob("[Rr][Ee][Aa][Dd][Mm][Ee]*")):
        if path.suffix.lower() not in {".txt", ".md", ""} or not path.is_file():
            continue
        try:
            lines = read_text(path).splitlines()
        except BadAnnotation:
            continue  # a README that is no text declares nothing
        for number, line in enumerate(lines, start=1):
            if DECLARED.match(line):
                what = line.strip(" *-\t")[:120]
                yield Problem("declared_augmentation", "warning", path, number, f"declares {what!r}, {SPOILS_PLACES}")


def states_locations(source: Source) -> bool:
    """Whether the sources file itself says that places mean something, not merely nothing to the contrary."""
    return source.locations and "locations" in source.model_fields_set


def without_locations(record: ImageRecord, changed: frozenset[str]) -> ImageRecord:
    """The record, with no places where its pixels are among the changed ones."""
    return replace(record, locations=False) if record.locations and record.image_id in changed else record


def find_changed(comparison: Comparison, by_pixels: ByPixels) -> frozenset[str]:
    """The image ids of mosaics and of mirrored pairs.

    Of a mirrored pair nobody knows which is the mirrored one, so it is both, unless one is known to have no places.
    """
    changed = set(comparison.mosaics)
    for pair in comparison.alike:
        if pair.kind == "flipped":
            known = {i for i in (pair.first, pair.second) if not all(record.locations for record in by_pixels[i])}
            changed |= known or {pair.first, pair.second}
    return frozenset(changed)


def describe_changes(comparison: Comparison, by_pixels: ByPixels) -> Iterator[tuple[str, Problem]]:
    """The source and the problem of each mosaic and of each picture that is like another one."""
    shown: dict[str, list[str]] = defaultdict(list)
    for pair in comparison.alike:
        if pair.kind == "part":
            shown[pair.first].append(by_pixels[pair.second][0].path.name)
            continue
        first, second = by_pixels[pair.first][0], by_pixels[pair.second][0]
        same = f"the same picture as {second.path.name} (correlation {pair.correlation:.2f})"
        if pair.kind == "flipped":
            message = f"shows, mirrored, {same}; nobody knows which is the true one, so nothing is located in either"
            yield first.source, Problem("flipped_copy", "warning", first.path, None, message)
        else:
            message = f"shows {same}; they go to the same split"
            yield first.source, Problem("near_duplicate", "info", first.path, None, message)
    for image_id, crossing in sorted(comparison.mosaics.items()):
        parts = f", showing {', '.join(sorted(set(shown[image_id])))}" if shown[image_id] else ""
        message = (
            f"is a mosaic of several pictures, cut at {crossing.x:.0%} of its width and {crossing.y:.0%} of its "
            f"height{parts}; nothing is located in it. Better train on the originals and remove it"
        )
        for record in by_pixels[image_id]:
            yield record.source, Problem("mosaic", "warning", record.path, None, message)
