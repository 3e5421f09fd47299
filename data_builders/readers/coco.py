"""COCO JSON: boxes, polygons and run-length masks in pixels, categories by id; DENTEX with its three lists of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_builders.readers.batches import read_in_batches
from data_builders.readers.coco_shapes import Image, fit_shapes, read_shape, read_turn
from data_builders.readers.dentex import DentexNames, check_levels, is_dentex
from data_builders.readers.drafts import Draft, LabelBook, Meaning, Spellings
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
from data_builders.readers.geometry import NUMBERS, BadAnnotation
from data_builders.readers.quarantine import quarantine_dicom
from data_builders.records import ImageRecord, Problem, Ring
from data_builders.sources import Source

ROBOFLOW = "_annotations.coco.json"
KEYS = ("images", "annotations", "categories")
SAME_ASPECT = 0.01
BLOCK = 1000  # annotations
Names = Mapping[int | str | None, str] | DentexNames


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
    seen: set[str] = set()
    refused: list[Problem] = []
    for path in files:
        try:
            document = load_json(path)
            _check_keys(document)
            check_levels(source, document.value)
        except BadAnnotation as error:
            refused.append(Problem(error.code, "error", path, None, str(error)))
            continue
        yield from _read_document(book, path, document, seen)
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


def _read_document(book: LabelBook, path: Path, document: Document, seen: set[str]) -> Iterator[ImageRecord | Problem]:
    """Yield the records of a file and its problems; add the paths of its images to `seen`."""
    yield from repeated_keys_problem(path, document)
    problems: list[Problem] = []
    names = _read_names(book.source, path, document.value, problems)
    images = _read_images(book, path, document.value["images"], problems, seen)
    annotations = document.value["annotations"]
    not_read = list(_not_read(book.source, path, annotations, names))
    meanings = Categories(book, names)
    numbers = _get_ids(annotations, "id")
    are_unique = {int}.issuperset(map(type, numbers)) and len(set(numbers)) == len(numbers)
    used: set[str] = set()
    for index, (annotation, image, ring) in enumerate(_take_annotations(images, annotations)):
        pointer = f"/annotations/{index}"
        if image is None:
            message = f"image_id {shorten(_get(annotation, 'image_id'))} is no image of this file"
            problems.append(Problem("annotation_without_image", "error", path, pointer, message))
            continue
        image.annotations += 1
        number = numbers[index]
        if not are_unique:
            if str(number) in used:
                message = f"annotation id {shorten(number)} is there twice"
                image.draft.note("duplicate_annotation_id", "warning", pointer, message)
                number = f"{number}@{index}"
            if number is not None:
                used.add(str(number))
        category = annotation.get("category_id")
        meaning = meanings[category] if ring and type(category) is type(number) is int else None
        if meaning:
            shape = "polygon" if annotation.get("segmentation") else "box"
            image.draft.add_plain(shape, ((pointer, number, meaning, ring),))
        elif image.has_scale:
            _add(image, names, annotation, ring, pointer, number)
    problems += not_read
    yield from problems
    once = {id(image): image for image in images.values()}.values()
    for image in sorted(once, key=lambda image: image.draft.path.parts):
        image.draft.flawed |= bool(document.repeated_keys)
        yield from _finish(image)


def _take_annotations(
    images: Mapping[int | str | None, Image], annotations: list
) -> Iterator[tuple[Any, Image | None, Ring | None]]:
    """Each annotation with its image, and its shape where that was fitted; `annotations` is empty afterwards.

    Shapes are fitted a block at a time, and an annotation's memory is free again when its finding takes some.
    """
    annotations.reverse()
    while annotations:
        block = [annotations.pop() for _ in range(min(BLOCK, len(annotations)))]
        of_images = list(map(images.get, _get_ids(block, "image_id")))
        yield from zip(block, of_images, fit_shapes(block, of_images), strict=True)


class Categories(dict[int, Meaning | None]):
    """What category ids mean, `None` for those that are not in the file or not in the class map."""

    def __init__(self, book: LabelBook, names: Names) -> None:
        self._book = book
        self._names = names if isinstance(names, dict) and not book.source.attributes else {}

    def __missing__(self, category: int) -> Meaning | None:
        name = self._names.get(category)
        self[category] = None if name is None else self._book.find_meaning((name, category))
        return self[category]


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


def _read_images(
    book: LabelBook, path: Path, entries: list, problems: list[Problem], seen: set[str]
) -> dict[int | str | None, Image]:
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
        if file.text in by_path:
            message = f"{file.path.name} is listed under two ids"
            by_path[file.text].draft.note("duplicate_image", "warning", pointer, message)
        else:
            by_path[file.text] = _measure(Draft(book, file.path, path, folder=file.folder), entry, pointer)
        images[number] = by_path[file.text]
    seen.update(by_path)
    return images


def _measure(draft: Draft, entry: Mapping, pointer: str) -> Image:
    """Take size and unit from the document; the image file, if it is there, may contradict it."""
    draft.measure()
    width, height = entry.get("width"), entry.get("height")
    if not _is_side(width) or not _is_side(height):
        return Image(draft, pointer)
    draft.unit = int(width), int(height)
    draft.size = draft.size or draft.unit
    if draft.unit == draft.size:
        return Image(draft, pointer)
    if draft.unit == draft.size[::-1] and (turned := read_turn(draft.path)) != 1:
        draft.unit = draft.size
        message = f"{draft.path.name} is stored on its side; its annotations are about it as stored and were turned too"
        draft.note("turned_with_exif", "info", pointer, message)
        return Image(draft, pointer, turned=turned)
    ratio = draft.unit[0] * draft.size[1] / (draft.unit[1] * draft.size[0])
    return Image(draft, pointer, has_scale=1 - SAME_ASPECT <= ratio <= 1 + SAME_ASPECT)


def _is_side(value: object) -> bool:
    return type(value) in NUMBERS and 1 <= value <= 1e6 and value == int(value)


def _add(
    image: Image,
    names: Names,
    annotation: Mapping,
    ring: Ring | None,
    pointer: str,
    number: int | str | None,
) -> None:
    """Add an annotation to the draft of its image; `ring` is its shape where that is fitted already."""
    draft = image.draft
    source = draft.book.source
    shape = "polygon" if annotation.get("segmentation") else "box"
    try:
        shape, rings = (shape, (ring,)) if ring else read_shape(image, annotation)
        labels, tooth = _read_label(source, names, annotation)
        grades = _read_grades(source, annotation) if source.attributes else None
        confidence = _read_score(annotation) if source.origin == "model" else None
    except BadAnnotation as error:
        draft.note(error.code, "error", pointer, str(error))
        return
    add = draft.add_fitted if ring else draft.add
    add(pointer, [labels], shape, rings, number=number, attributes=grades, tooth=tooth, confidence=confidence)


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


def _get(entry: object, key: str) -> object:
    return entry.get(key) if isinstance(entry, dict) else None


def _get_ids(entries: list, key: str) -> list[int | str | None]:
    """What `_get_id` finds in each, without asking it where all of them are whole numbers."""
    ids = [entry.get(key) if type(entry) is dict else None for entry in entries]
    return ids if {int}.issuperset(map(type, ids)) else [_get_id(entry, key) for entry in entries]


def _get_id(entry: object, key: str) -> int | str | None:
    value = entry.get(key) if type(entry) is dict else None
    if type(value) is int:
        return value
    if type(value) is float and value.is_integer():
        return int(value)  # pandas writes ids so
    return value if type(value) is str else None
