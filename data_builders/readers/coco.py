"""COCO JSON: boxes and polygons in pixels, categories by id."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from data_builders.readers.drafts import Draft, LabelBook
from data_builders.readers.files import (
    Document,
    drop_outward_links,
    find_image,
    load_json,
    repeated_keys_problem,
    shorten,
    unlisted_images,
)
from data_builders.readers.geometry import BadAnnotation, box_ring, read_pixels
from data_builders.records import ImageRecord, Problem, Ring, Shape
from data_builders.sources import Source

ROBOFLOW = "_annotations.coco.json"
KEYS = ("images", "annotations", "categories")
SAME_ASPECT = 0.01


@dataclass
class Image:
    """One entry of `images`; without a scale its stated size contradicts its file, and places mean nothing."""

    draft: Draft
    pointer: str
    has_scale: bool = True
    annotations: int = 0


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
        message = f"no file {source.annotations or '*.json'} in the source folder"
        yield Problem("annotations_missing", "error", source.root, None, message)
    seen: set[Path] = set()
    refused: list[Problem] = []
    for path in files:
        try:
            document = load_json(path)
            _check_keys(document)
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
    lacking = [key for key in KEYS if not isinstance(value, dict) or not isinstance(value.get(key), list)]
    if lacking:
        raise BadAnnotation("not_coco", f"is not COCO: it lacks the lists {', '.join(lacking)}")


def _read_document(book: LabelBook, path: Path, document: Document) -> Iterator[ImageRecord | Problem]:
    yield from repeated_keys_problem(path, document)
    problems: list[Problem] = []
    names = _read_categories(path, document.value["categories"], problems)
    images = _read_images(book, path, document.value["images"], problems)
    used: set[str] = set()
    for index, annotation in enumerate(document.value["annotations"]):
        pointer = f"/annotations/{index}"
        image = images.get(_get_id(annotation, "image_id"))
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
            _add(image.draft, names, annotation, pointer, number)
    yield from problems
    for image in sorted({id(image): image for image in images.values()}.values(), key=lambda image: image.draft.path):
        image.draft.flawed |= bool(document.repeated_keys)
        yield from _finish(image)


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
    yield from draft.finish()


def _read_categories(path: Path, entries: list, problems: list[Problem]) -> dict[int | str, str]:
    names: dict[int | str, str] = {}
    for index, entry in enumerate(entries):
        number, name = _get_id(entry, "id"), _get(entry, "name")
        if number is None or not isinstance(name, (str, int)):
            message = "a category needs an id and a name"
        elif names.get(number, str(name)) != str(name):
            message = f"category id {shorten(number)} is both {shorten(names[number])} and {shorten(name)}"
        else:
            names[number] = str(name)
            continue
        problems.append(Problem("bad_category", "error", path, f"/categories/{index}", message))
    return names


def _read_images(book: LabelBook, path: Path, entries: list, problems: list[Problem]) -> dict[int | str | None, Image]:
    """One image for each image file, under all ids that the document gives it."""
    images: dict[int | str | None, Image] = {}
    by_path: dict[Path, Image] = {}
    for index, entry in enumerate(entries):
        number, pointer = _get_id(entry, "id"), f"/images/{index}"
        try:
            if number is None:
                raise BadAnnotation("bad_annotation", "an image needs an id and a file_name")
            if number in images:
                images[number].draft.flawed = True
                raise BadAnnotation("duplicate_image_id", f"image id {shorten(number)} is there twice; first one kept")
            file = find_image(book.source, path.parent, entry.get("file_name"))
        except BadAnnotation as error:
            problems.append(Problem(error.code, "error", path, pointer, str(error)))
            continue
        if file in by_path:
            by_path[file].draft.note("duplicate_image", "warning", pointer, f"{file.name} is listed under two ids")
        else:
            by_path[file] = _measure(Draft(book, file, path), entry, pointer)
        images[number] = by_path[file]
    return images


def _measure(draft: Draft, entry: Mapping, pointer: str) -> Image:
    """Take size and unit from the document; the image file, if it is there, may contradict it."""
    draft.measure()
    stated = entry.get("width"), entry.get("height")
    if not all(type(side) in (int, float) and 1 <= side <= 1e6 and side == int(side) for side in stated):
        return Image(draft, pointer)
    draft.unit = int(stated[0]), int(stated[1])
    draft.size = draft.size or draft.unit
    ratio = draft.unit[0] * draft.size[1] / (draft.unit[1] * draft.size[0])
    return Image(draft, pointer, has_scale=1 - SAME_ASPECT <= ratio <= 1 + SAME_ASPECT)


def _add(draft: Draft, names: Mapping, annotation: Mapping, pointer: str, number: int | str | None) -> None:
    try:
        shape, rings = _read_shape(annotation)
    except BadAnnotation as error:
        draft.note(error.code, "error", pointer, str(error))
        return
    category = _get_id(annotation, "category_id")
    name = names.get(category)
    labels = (shorten(category),) if name is None else (name, category)
    draft.add(pointer, [labels], shape, rings, number=number)


def _read_shape(annotation: Mapping) -> tuple[Shape, list[Ring]]:
    segments = annotation.get("segmentation")
    if isinstance(segments, dict):
        raise BadAnnotation("rle_unsupported", "run-length masks are not read yet; export polygons")
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
        rings.append(tuple(zip(values[::2], values[1::2], strict=True)))
    return "polygon", rings


def _read_box(value: object) -> list[float]:
    values = read_pixels(value, "bbox")
    if len(values) != 4:
        raise BadAnnotation("bad_annotation", f"bbox needs x, y, width, height; got {len(values)} numbers")
    return values


def _get(entry: object, key: str) -> object:
    return entry.get(key) if isinstance(entry, dict) else None


def _get_id(entry: object, key: str) -> int | str | None:
    value = _get(entry, key)
    if type(value) is float and value.is_integer():
        return int(value)  # pandas writes ids so
    return value if type(value) in (int, str) else None
