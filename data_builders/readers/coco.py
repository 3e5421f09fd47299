"""COCO JSON: boxes, polygons and run-length masks in pixels, categories by id; DENTEX with its three lists of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from data_builders.images import ImageError, read_orientation
from data_builders.readers.batches import read_in_batches
from data_builders.readers.dentex import DentexNames, check_levels, is_dentex
from data_builders.readers.drafts import Draft, LabelBook, Spellings
from data_builders.readers.files import (
    Document,
    ImageFinder,
    drop_outward_links,
    escape_surrogates,
    load_json,
    nothing_found,
    repeated_keys_problem,
    shorten,
    unlisted_images,
)
from data_builders.readers.geometry import BadAnnotation, box_ring, read_pixels, survey_outlines
from data_builders.readers.masks import read_mask_size, trace_mask
from data_builders.readers.quarantine import quarantine_dicom
from data_builders.records import Bounds, ImageRecord, Point, Problem, Ring, Shape
from data_builders.sources import Source

ROBOFLOW = "_annotations.coco.json"
KEYS = ("images", "annotations", "categories")
SAME_ASPECT = 0.01
BLOCK = 1000  # annotations
Names = Mapping[int | str | None, str] | DentexNames
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


class Drawn(NamedTuple):
    """The shape of an annotation in pixels; `bounds` are what `survey_outlines` found of its rings."""

    name: Shape
    rings: list[Ring]
    bounds: list[Bounds | None]


@quarantine_dicom
@read_in_batches
def read_coco(source: Source) -> Iterator[ImageRecord | Problem]:
    """Yield one record per image, and a problem for everything that could not be read.

    Reads the files that `source.annotations` (a glob) names; else Roboflow's; else every JSON file that is COCO.
    """
    book = LabelBook(source)
    problems: list[Problem] = []
    everything = drop_outward_links(source, sorted(source.root.rglob("*.json")), problems)
    if source.annotations:
        files = drop_outward_links(source, sorted(source.root.glob(source.annotations)), problems)
    else:
        files = [path for path in everything if path.name == ROBOFLOW] or everything
        problems += [_unused(path, f"there are files {ROBOFLOW}") for path in everything if path not in files]
    yield from problems
    if not files:
        yield nothing_found(source, f"file {source.annotations or '*.json'}")
    seen: set[Path] = set()
    refused: list[Problem] = []
    for path in files:
        try:
            document = load_json(path)
            _check_keys(document)
            check_levels(source, document.value)
        except BadAnnotation as error:
            refused.append(Problem(error.code, "error", path, None, str(error)))
            continue
        for item in _read_document(book, path, document):
            if isinstance(item, ImageRecord):
                seen.add(item.path)
            yield item
    guessed = not source.annotations and len(refused) < len(files)
    for problem in refused:
        yield _unused(problem.path, problem.message) if guessed and problem.code == "not_coco" else problem
    yield from unlisted_images(source, seen)
    yield from book.problems()


def _unused(path: Path, reason: str) -> Problem:
    return Problem("unused_file", "info", path, None, f"not read: {reason}")


def _check_keys(document: Document) -> None:
    value = document.value
    keys = ("images", "annotations") if isinstance(value, dict) and is_dentex(value) else KEYS
    lacking = [key for key in keys if not isinstance(value, dict) or not isinstance(value.get(key), list)]
    if lacking:
        raise BadAnnotation("not_coco", f"is not COCO: it lacks the lists {', '.join(lacking)}")


def _read_document(book: LabelBook, path: Path, document: Document) -> Iterator[ImageRecord | Problem]:
    yield from repeated_keys_problem(path, document)
    problems: list[Problem] = []
    names = _read_names(book.source, path, document.value, problems)
    images = _read_images(book, path, document.value["images"], problems)
    annotations = document.value["annotations"]
    not_read = list(_not_read(book.source, path, annotations, names))
    used: set[str] = set()
    for index, (annotation, image, drawn) in enumerate(_take_shapes(images, annotations)):
        pointer = f"/annotations/{index}"
        if image is None:
            message = f"image_id {shorten(_get(annotation, 'image_id'))} is no image of this file"
            problems.append(Problem("annotation_without_image", "error", path, pointer, message))
            continue
        image.annotations += 1
        number = _get_id(annotation, "id")
        if str(number) in used:
            message = f"annotation id {shorten(number)} is there twice"
            image.draft.note("duplicate_annotation_id", "warning", pointer, message)
            number = f"{number}@{index}"
        if number is not None:
            used.add(str(number))
        if image.has_scale:
            _add(image, names, annotation, drawn, pointer, number)
    problems += not_read
    yield from problems
    once = {id(image): image for image in images.values()}.values()
    for image in sorted(once, key=lambda image: image.draft.path.parts):
        image.draft.flawed |= bool(document.repeated_keys)
        yield from _finish(image)


def _take_shapes(
    images: Mapping[int | str | None, Image], annotations: list
) -> Iterator[tuple[Any, Image | None, Drawn | BadAnnotation | None]]:
    """Each annotation with its image and its shape, or what is wrong with it; `annotations` is empty afterwards.

    Outlines are checked a block at a time, and an annotation's memory is free again when its finding takes some.
    """
    annotations.reverse()
    while annotations:
        block = [annotations.pop() for _ in range(min(BLOCK, len(annotations)))]
        of_images = [images.get(_get_id(annotation, "image_id")) for annotation in block]
        shapes: list[Drawn | BadAnnotation | None] = []
        for annotation, image in zip(block, of_images, strict=True):
            try:
                shapes.append(_read_shape(image, annotation) if image is not None and image.has_scale else None)
            except BadAnnotation as error:
                shapes.append(error)
        drawn = [shape for shape in shapes if isinstance(shape, Drawn)]
        outlines = [ring if shape.name == "polygon" else () for shape in drawn for ring in shape.rings]
        bounds = iter(survey_outlines(outlines))
        for shape in drawn:
            shape.bounds.extend(islice(bounds, len(shape.rings)))
        yield from zip(block, of_images, shapes, strict=True)


def _finish(image: Image) -> Iterator[ImageRecord | Problem]:
    draft = image.draft
    if not image.annotations:
        draft.note("image_without_annotations", "info", image.pointer, f"{draft.path.name} has no annotations")
    if draft.size != draft.unit:
        what = "read in fractions of the size stated" if image.has_scale else "left out"
        stated, true = (" x ".join(map(str, size)) for size in (draft.unit, draft.size))
        message = (
            f"{draft.path.name} is {true} pixels, stated are {stated}; its {image.annotations} annotations are {what}"
        )
        draft.note("size_mismatch", "error", image.pointer, message)
    if image.holes:
        message = f"{image.holes} holes in masks were filled: a finding is its outer outline"
        draft.note("mask_holes_filled", "info", image.pointer, message)
    yield from draft.finish()


def _not_read(source: Source, path: Path, annotations: list, names: Names) -> Iterator[Problem]:
    """One problem for each kind of statement that the source has no use for."""
    scores = sum(isinstance(entry, dict) and "score" in entry for entry in annotations)
    if scores and source.origin == "human":
        message = f"{scores} annotations have a score, which was not read; a detector's need `origin: model`"
        yield Problem("extra_field", "info", path, None, message)
    if isinstance(names, DentexNames) and names.diagnoses and source.classes == "fdi":
        message = "has diagnoses, which were not read: with `classes: fdi` labels are tooth numbers"
        yield Problem("diagnoses_not_read", "info", path, None, message)


def _read_names(source: Source, path: Path, document: Mapping, problems: list[Problem]) -> Names:
    if not is_dentex(document):
        return _read_categories(path, "categories", document, problems)
    return DentexNames(*(_read_categories(path, f"categories_{level}", document, problems) for level in (1, 2, 3)))


def _read_categories(path: Path, key: str, document: Mapping, problems: list[Problem]) -> dict[int | str, str]:
    names: dict[int | str, str] = {}
    entries = document.get(key)
    for index, entry in enumerate(entries if isinstance(entries, list) else ()):
        number, name = _get_id(entry, "id"), _get(entry, "name")
        if number is None or not isinstance(name, (str, int)):
            message = "a category needs an id and a name"
        elif names.get(number, str(name)) != str(name):
            message = f"category id {shorten(number)} is both {shorten(names[number])} and {shorten(name)}"
        else:
            names[number] = str(name)
            continue
        problems.append(Problem("bad_category", "error", path, f"/{key}/{index}", message))
    return names


def _read_images(book: LabelBook, path: Path, entries: list, problems: list[Problem]) -> dict[int | str | None, Image]:
    """One image for each image file, under all ids that the document gives it."""
    images: dict[int | str | None, Image] = {}
    by_path: dict[str, Image] = {}
    finder = ImageFinder(book.source, path.parent)
    for index, entry in enumerate(entries):
        number, pointer = _get_id(entry, "id"), f"/images/{index}"
        try:
            if number is None:
                raise BadAnnotation("bad_annotation", "an image needs an id and a file_name")
            if number in images:
                images[number].draft.flawed = True
                raise BadAnnotation("duplicate_image_id", f"image id {shorten(number)} is there twice; first one kept")
            file = finder.find(entry.get("file_name"))
        except BadAnnotation as error:
            problems.append(Problem(error.code, "error", path, pointer, str(error)))
            continue
        place = str(file)
        if place in by_path:
            by_path[place].draft.note("duplicate_image", "warning", pointer, f"{file.name} is listed under two ids")
        else:
            by_path[place] = _measure(Draft(book, file, path), entry, pointer)
        images[number] = by_path[place]
    return images


def _measure(draft: Draft, entry: Mapping, pointer: str) -> Image:
    """Take size and unit from the document; the image file, if it is there, may contradict it."""
    draft.measure()
    stated = entry.get("width"), entry.get("height")
    if not all(type(side) in (int, float) and 1 <= side <= 1e6 and side == int(side) for side in stated):
        return Image(draft, pointer)
    draft.unit = int(stated[0]), int(stated[1])
    draft.size = draft.size or draft.unit
    if draft.unit != draft.size and draft.unit == draft.size[::-1] and (turned := _read_turn(draft.path)) != 1:
        draft.unit = draft.size
        message = f"{draft.path.name} is stored on its side; its annotations are about it as stored and were turned too"
        draft.note("turned_with_exif", "info", pointer, message)
        return Image(draft, pointer, turned=turned)
    ratio = draft.unit[0] * draft.size[1] / (draft.unit[1] * draft.size[0])
    return Image(draft, pointer, has_scale=1 - SAME_ASPECT <= ratio <= 1 + SAME_ASPECT)


def _read_turn(path: Path) -> int:
    """The EXIF orientation of an image that is stored on its side, 1 for any other."""
    try:
        orientation = read_orientation(path)
    except ImageError:
        return 1
    return orientation if orientation in TURNS else 1


def _add(
    image: Image,
    names: Names,
    annotation: Mapping,
    drawn: Drawn | BadAnnotation,
    pointer: str,
    number: int | str | None,
) -> None:
    source = image.draft.book.source
    try:
        if isinstance(drawn, BadAnnotation):
            raise drawn
        labels, tooth = _read_label(source, names, annotation)
        grades = _read_grades(source, annotation) if source.attributes else None
        confidence = _read_score(annotation) if source.origin == "model" else None
    except BadAnnotation as error:
        image.draft.note(error.code, "error", pointer, str(error))
        return
    rings, bounds = drawn.rings, drawn.bounds
    if image.turned != 1:
        rings, bounds = [_turn(drawn.name, ring, image) for ring in rings], []
    image.draft.add(
        pointer,
        [labels],
        drawn.name,
        rings,
        number=number,
        attributes=grades,
        tooth=tooth,
        confidence=confidence,
        bounds=bounds,
    )


def _read_label(source: Source, names: Names, annotation: Mapping) -> tuple[Spellings, str | None]:
    if isinstance(names, DentexNames):
        ids = tuple(_get_id(annotation, f"category_id_{level}") for level in (1, 2, 3))
        return names.read(ids, by_number=source.classes == "fdi")
    category = _get_id(annotation, "category_id")
    name = names.get(category)
    return ((shorten(category),) if name is None else (name, category)), None


def _read_grades(source: Source, annotation: Mapping) -> dict[str, str]:
    stated = annotation.get("attributes") or {}
    if not isinstance(stated, dict):
        raise BadAnnotation("bad_annotation", f"attributes is no mapping: {shorten(stated)}")
    grades = {}
    for raw, name in source.attributes.items():
        value = stated.get(raw)
        if isinstance(value, (list, dict)):
            raise BadAnnotation("bad_annotation", f"attribute {shorten(raw)} is neither text nor a number")
        if value is not None and str(value).strip():
            grades[name] = escape_surrogates(str(value).strip())
    return grades


def _read_score(annotation: Mapping) -> float | None:
    score = annotation.get("score")
    if score is not None and type(score) not in (int, float):
        raise BadAnnotation("bad_confidence", f"score {shorten(score)} is no number")
    return score


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


def _read_shape(image: Image, annotation: Mapping) -> Drawn:
    segments = annotation.get("segmentation")
    if isinstance(segments, dict):
        return Drawn("polygon", _read_mask(image, segments), [])
    if not segments:
        left, top, width, height = _read_box(annotation.get("bbox"))
        return Drawn("box", [box_ring(left, top, left + width, top + height)], [])
    if not isinstance(segments, list):
        raise BadAnnotation("bad_annotation", f"segmentation is neither polygons nor a mask: {shorten(segments)}")
    rings = []
    for segment in segments if isinstance(segments[0], list) else [segments]:
        values = read_pixels(segment, "segmentation")
        if len(values) % 2 or len(values) < 6:
            raise BadAnnotation("bad_annotation", f"a polygon needs 3 or more points; got {len(values)} numbers")
        numbers = iter(values)
        rings.append(tuple(zip(numbers, numbers, strict=True)))
    return Drawn("polygon", rings, [])


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


def _get(entry: object, key: str) -> object:
    return entry.get(key) if isinstance(entry, dict) else None


def _get_id(entry: object, key: str) -> int | str | None:
    value = _get(entry, key)
    if type(value) is int:
        return value
    if type(value) is float and value.is_integer():
        return int(value)  # pandas writes ids so
    return value if type(value) is str else None
