"""VGG Image Annotator: 1.x JSON, 2.x JSON, 2.x projects and CSV; all in pixels, none with the image's size."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path

import numpy as np

from data_builders.readers.batches import read_in_batches
from data_builders.readers.drafts import Draft, LabelBook, Spellings
from data_builders.readers.files import (
    ImageFinder,
    drop_outward_links,
    escape_surrogates,
    nothing_found,
    shorten,
    unlisted_images,
)
from data_builders.readers.geometry import BadAnnotation, are_numbers, box_ring, ellipse_ring, fit_outlines, read_pixels
from data_builders.readers.quarantine import quarantine_dicom
from data_builders.readers.via_files import Options, Region, ViaFile, load_via
from data_builders.records import ImageRecord, Problem, Ring, Shape
from data_builders.sources import Source

BLOCK = 200  # images


@quarantine_dicom
@read_in_batches
def read_via(source: Source) -> Iterator[ImageRecord | Problem]:
    """Yield one record per image, and a problem for everything that could not be read.

    Reads the files that `source.annotations` (a glob) names, else every JSON and CSV file that VIA wrote.
    """
    book = LabelBook(source)
    problems: list[Problem] = []
    files, refused = _load_files(source, problems)
    yield from problems
    for problem in refused:
        not_via = problem.code == "not_via" and files and not source.annotations
        yield Problem("unused_file", "info", problem.path, None, problem.message) if not_via else problem
    if not files and not refused:
        yield nothing_found(source, f"file {source.annotations or '*.json or *.csv'}")
    seen: set[str] = set()
    for path, via in files:
        yield from _read_file(book, path, via, seen)
    yield from unlisted_images(source, seen)
    yield from book.problems()


def _load_files(source: Source, problems: list[Problem]) -> tuple[list[tuple[Path, ViaFile]], list[Problem]]:
    """What VIA wrote, each content once, and a problem for each file that it did not write."""
    patterns = [source.annotations] if source.annotations else ["**/*.json", "**/*.csv"]
    paths = sorted(path for pattern in patterns for path in source.root.glob(pattern) if path.is_file())
    files: list[tuple[Path, ViaFile]] = []
    refused: list[Problem] = []
    first: dict[tuple[Path, bytes], Path] = {}  # a copy in another folder speaks of other image files
    for path in drop_outward_links(source, paths, problems):
        try:
            via = load_via(path)
        except BadAnnotation as error:
            refused.append(Problem(error.code, "error", path, None, str(error)))
            continue
        twin = first.setdefault((path.parent, hashlib.sha256(path.read_bytes()).digest()), path)
        if twin == path:
            files.append((path, via))
        else:
            message = f"is the same file as {twin.relative_to(source.root).as_posix()}; read once"
            problems.append(Problem("duplicate_annotation_file", "warning", path, None, message))
    return files, refused


def _read_file(book: LabelBook, path: Path, via: ViaFile, seen: set[str]) -> Iterator[ImageRecord | Problem]:
    """Yield the records of a file and its problems; add the paths of its images to `seen`."""
    yield from via.problems
    attribute = None
    try:
        attribute = _label_attribute(book.source, [region for image in via.images for region in image.regions])
    except BadAnnotation as error:
        yield Problem(error.code, "error", path, None, str(error))
    flawed = attribute is None or any(problem.severity == "error" for problem in via.problems)
    drafts: dict[str, Draft] = {}
    finder = ImageFinder(book.source, path.parent)
    images = via.images[::-1]
    via.images.clear()
    while images:  # an image's memory is free again when its findings take some
        drawn: list[tuple[Draft, Region]] = []
        for image in [images.pop() for _ in range(min(BLOCK, len(images)))]:
            try:
                file = finder.find(image.file_name)
            except BadAnnotation as error:
                yield Problem(error.code, "error", path, image.line, str(error))
                continue
            draft = drafts.get(file.text)
            if draft is None:
                draft = drafts[file.text] = Draft(book, file.path, path, flawed=flawed, folder=file.folder)
                draft.measure()
            drawn += [(draft, region) for region in image.regions]
        if attribute is not None:
            # A detector's confidence, which VIA has no place for, is asked for before the shape.
            rings = _fit_polygons(drawn) if book.source.origin == "human" else [None] * len(drawn)
            for (draft, region), ring in zip(drawn, rings, strict=True):
                _add(draft, region, ring, attribute, via.options)
    seen.update(drafts)
    for draft in sorted(drafts.values(), key=lambda draft: draft.path.parts):
        yield from draft.finish()


def _fit_polygons(drawn: list[tuple[Draft, Region]]) -> list[Ring | None]:
    """What `fit` makes of a region that is as nearly all are, a polygon within its image; else `None`."""
    plain, polygons, sizes = [], [], []
    for index, (draft, region) in enumerate(drawn):
        shape = region.shape
        if draft.unit is not None and isinstance(shape, dict) and shape.get("name") == "polygon":
            xs, ys = shape.get("all_points_x"), shape.get("all_points_y")
            if isinstance(xs, list) and isinstance(ys, list) and len(xs) == len(ys) > 3:
                plain.append(index)
                polygons.append([*chain.from_iterable(zip(xs, ys, strict=True))])
                sizes.append(draft.unit)
    rings: list[Ring | None] = [None] * len(drawn)
    if are_numbers(polygons):
        for index, ring in zip(plain, fit_outlines(polygons, np.array(sizes)), strict=True):
            rings[index] = ring
    return rings


def _label_attribute(source: Source, regions: list[Region]) -> str:
    """The region attribute that holds the label: the one named in the source, else the only one there is."""
    if source.label_attribute:
        return source.label_attribute
    dicts = [region.attributes for region in regions if isinstance(region.attributes, dict)]
    found = sorted({key for attributes in dicts for key in attributes} - set(source.attributes))
    if len(found) > 1:
        shown = ", ".join(map(shorten, found[:20]))
        message = f"regions have the attributes {shown}; name the one with the label as `label_attribute`"
        raise BadAnnotation("label_attribute_needed", message)
    return found[0] if found else ""


def _add(draft: Draft, region: Region, ring: Ring | None, attribute: str, options: Options) -> None:
    """Add a region to the draft of its image; `ring` is its shape where that is fitted already."""
    source = draft.book.source
    try:
        shape, drawn = ("polygon", ring) if ring else _read_shape(region.shape)
        if not isinstance(region.attributes, dict):
            raise BadAnnotation("bad_annotation", "region_attributes is no mapping")
        labels = _read_labels(region.attributes.get(attribute), options.get(attribute, {}))
        if not labels:
            labels = [("",)]
            if isinstance(source.classes, str) or "" not in source.classes:
                message = f"has no {attribute!r}" if attribute else "has no attributes"
                raise BadAnnotation("label_missing", f'the region {message}; map it as `"": null` to leave such out')
        grades = _read_grades(source, region.attributes, options) if source.attributes else None
    except BadAnnotation as error:
        draft.note(error.code, "error", region.line, str(error))
        return
    add, rings = (draft.add_fitted, (ring,)) if ring else (draft.add, (drawn,))
    add(region.line, labels, shape, rings, number=region.number, attributes=grades)


def _read_labels(value: object, options: Mapping[str, str]) -> list[Spellings]:
    """The labels of a region: what its text, option, or ticked boxes say."""
    if isinstance(value, dict):
        values = [key for key, ticked in value.items() if ticked is True]
    elif value is None or isinstance(value, (str, int, float)):
        values = [str(value).strip()] if value is not None else []
    else:
        raise BadAnnotation("bad_annotation", f"a label is neither text nor options: {shorten(value)}")
    described = [(options.get(key) or key, key) for key in values if key]
    return [(key,) if key == text else (text, key) for text, key in described]


def _read_grades(source: Source, attributes: Mapping, options: Options) -> dict[str, str]:
    read = {name: _read_labels(attributes.get(raw), options.get(raw, {})) for raw, name in source.attributes.items()}
    texts = {name: ", ".join(str(spellings[0]) for spellings in labels) for name, labels in read.items() if labels}
    return {name: escape_surrogates(text) for name, text in texts.items()}


def _read_shape(value: object) -> tuple[Shape, Ring]:
    name = value.get("name") if isinstance(value, dict) else None
    if name == "rect":
        left, top, width, height = _get(value, "x", "y", "width", "height")
        return "box", box_ring(left, top, left + width, top + height)
    if name == "circle":
        cx, cy, r = _get_positive(value, "r")
        return "polygon", ellipse_ring(cx, cy, r, r)
    if name == "ellipse":
        cx, cy, rx, ry = _get_positive(value, "rx", "ry")
        return "polygon", ellipse_ring(cx, cy, rx, ry, *(_get(value, "theta") if "theta" in value else ()))
    if name == "point":
        cx, cy = _get(value, "cx", "cy")
        return "point", ((cx, cy),)
    if name in ("polygon", "polyline"):
        xs, ys = (read_pixels(value.get(key), key) for key in ("all_points_x", "all_points_y"))
        if len(xs) != len(ys) or not xs:
            raise BadAnnotation("bad_annotation", f"{len(xs)} x and {len(ys)} y coordinates")
        return name, tuple(zip(xs, ys, strict=True))
    raise BadAnnotation("bad_annotation", f"unknown shape {shorten(name)}")


def _get(shape: Mapping, *keys: str) -> list[float]:
    return read_pixels([shape.get(key) for key in keys], ", ".join(keys))


def _get_positive(shape: Mapping, *radii: str) -> list[float]:
    values = _get(shape, "cx", "cy", *radii)
    if min(values[2:]) < 0:
        raise BadAnnotation("negative_size", f"a radius is negative: {min(values[2:]):g}")
    return values
