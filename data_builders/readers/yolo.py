"""YOLO label files: boxes, segments, and the nine fields of Ultralytics' oriented boxes, all in fractions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from data_builders.readers.batches import read_in_batches
from data_builders.readers.data_yaml import DataYaml
from data_builders.readers.drafts import Draft, LabelBook, Meaning
from data_builders.readers.files import read_text, shorten
from data_builders.readers.geometry import LEAST_AREA, BadAnnotation, box_ring, survey_outlines
from data_builders.readers.outlines import Outlines, add_outlines
from data_builders.readers.pairs import Pair, pair_files, start_draft
from data_builders.readers.quarantine import quarantine_dicom
from data_builders.records import ImageRecord, Problem, Ring, Shape
from data_builders.sources import Source

LARGEST_FRACTION = 2.0
BLOCK = 200  # label files
NONE = Outlines([], [], [])
FORMS = "expected 4 coordinates, or 3 or more points, after the class id"


class Line(NamedTuple):
    """One line of a label file; four points are an oriented box until the rest of the file says otherwise."""

    class_id: int
    shape: Shape
    ring: Ring
    extra: float | None = None  # a confidence or a track id


@quarantine_dicom
@read_in_batches
def read_yolo(source: Source) -> Iterator[ImageRecord | Problem]:
    """Yield one record per image, and a problem for everything that could not be read."""
    book = LabelBook(source)
    pairs, problems = pair_files(source, "labels")
    yield from problems
    data_yaml = DataYaml(source)
    classes: dict[Path, Classes] = {}  # by folder of label files
    for start in range(0, len(pairs), BLOCK):
        yield from _read_block(book, pairs[start : start + BLOCK], data_yaml, classes)
    yield from data_yaml.problems
    yield from book.problems()


def parse_line(line: str, *, scored: bool = False) -> Line:
    """Parse `class cx cy w h` or `class x1 y1 … xn yn`, in fractions; a box or four points may have one number more.

    `scored` lines are a detector's, in which any polygon may end in its confidence.

    Raises:
        BadAnnotation: when it is neither.
    """
    try:
        if "_" in line:  # float() reads 1_000 as a number
            raise ValueError
        class_id, *values = map(float, line.split())
    except ValueError:
        raise BadAnnotation("bad_label_line", f"{shorten(line.strip())} has a field that is not a number") from None
    if len(values) == 4 and class_id.is_integer() and (ring := _read_plain_box(*values)):
        return Line(int(class_id), "box", ring)
    is_finite = math.isfinite(sum(values)) or all(map(math.isfinite, values))  # a sum may overflow
    if not is_finite or not class_id.is_integer():
        raise BadAnnotation(
            "bad_label_line", f"{shorten(line.strip())}: not finite, or the class id is no whole number"
        )
    count = len(values)
    extra = values.pop() if count in (5, 9) or (scored and count % 2 and count > 5) else None
    if count < 4 or len(values) % 2:
        raise BadAnnotation("bad_label_line", f"{FORMS}; got {count} numbers")
    if max(values) > LARGEST_FRACTION or min(values) < -LARGEST_FRACTION:
        message = f"fractions of the image are due, this looks like pixels: {shorten(line.strip())}"
        raise BadAnnotation("looks_like_pixels", message)
    if len(values) == 4 and (ring := _read_plain_box(*values)):
        return Line(int(class_id), "box", ring, extra)
    numbers = iter(values)
    ring = tuple(zip(numbers, numbers, strict=True))
    is_box = len(ring) == 4 and ring[0] != ring[-1]  # a triangle that closes on its first point has 9 fields too
    return Line(int(class_id), "oriented_box" if is_box else "polygon", ring, extra)


def _read_plain_box(cx: float, cy: float, width: float, height: float) -> Ring | None:
    """The corners of a box whose numbers are fractions; most lines are one, and need no other check."""
    if (
        -LARGEST_FRACTION <= cx <= LARGEST_FRACTION
        and -LARGEST_FRACTION <= cy <= LARGEST_FRACTION
        and -LARGEST_FRACTION <= width <= LARGEST_FRACTION
        and -LARGEST_FRACTION <= height <= LARGEST_FRACTION
    ):
        return box_ring(cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
    return None


class Classes(dict[str, Meaning | None]):
    """What a class id means, by how it is written; `None` where it is no number, or the class map lacks it."""

    def __init__(self, book: LabelBook, data_yaml: DataYaml, names: Mapping[int, str] | None) -> None:
        self._find = lambda class_id: book.find_meaning(data_yaml.spell(class_id, names))

    def __missing__(self, field: str) -> Meaning | None:
        try:
            class_id = float(field)
        except ValueError:
            class_id = math.nan
        self[field] = self._find(int(class_id)) if class_id.is_integer() else None
        return self[field]


class LabelFile(NamedTuple):
    """A label file's text, and the draft of its image; `classes` is `None` where each line is to be read with care."""

    draft: Draft
    text: str
    names: Mapping[int, str] | None
    classes: Classes | None


def _read_block(
    book: LabelBook, pairs: list[Pair], data_yaml: DataYaml, classes: dict[Path, Classes]
) -> Iterator[ImageRecord | Problem]:
    """Read some label files together, for the sake of the check of their outlines."""
    files = [_open(book, pair, data_yaml, classes) for pair in pairs]
    others = [file for file in files if not _add_plain_boxes(file)]
    outlines = [_read_plain_outlines(file) for file in others]
    added = add_outlines([file.draft for file in others], outlines, LARGEST_FRACTION)
    _add_lines([file for file, is_done in zip(others, added, strict=True) if not is_done], data_yaml)
    for file in files:
        yield from file.draft.finish()


def _open(book: LabelBook, pair: Pair, data_yaml: DataYaml, classes: dict[Path, Classes]) -> LabelFile:
    draft = start_draft(book, pair)
    if not pair.has_image:
        draft.say_missing()
    names = data_yaml.find_names(pair.folder)
    draft.split = data_yaml.find_split(pair.image, pair.image_folder)
    text = ""
    if pair.labels is not None:
        try:
            text = data_yaml.drop_keypoints(read_text(pair.labels))
        except BadAnnotation as error:
            draft.note(error.code, "error", None, str(error))
    if pair.folder not in classes:
        classes[pair.folder] = Classes(book, data_yaml, names)
    has_names = names is not None or not data_yaml.names_needed
    is_plain = has_names and book.source.origin == "human" and "_" not in text  # float() reads 1_000 as a number
    return LabelFile(draft, text, names, classes[pair.folder] if is_plain else None)


def _add_plain_boxes(file: LabelFile) -> bool:
    """Add the boxes of a file that has nothing else, all within the image; add nothing of any other.

    Nearly all files of boxes are such, and this takes half of the time that `_add_lines` takes.
    """
    if file.classes is None:
        return False
    lines = []
    for number, line in enumerate(file.text.split("\n"), 1):
        fields = line.split()
        if len(fields) == 5:
            try:
                meaning, cx, cy, width, height = file.classes[fields[0]], *map(float, fields[1:])
            except ValueError:
                return False
            left, top, right, bottom = cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2
            is_within = 0 <= left < right <= 1 and 0 <= top < bottom <= 1
            if meaning is None or not is_within or (right - left) * (bottom - top) <= LEAST_AREA:
                return False
            lines.append((number, number, meaning, box_ring(left, top, right, bottom)))
        elif fields:
            return False
    file.draft.add_plain("box", lines)
    return True


def _read_plain_outlines(file: LabelFile) -> Outlines:
    """The lines of a file that holds outlines of four points or more, and either no other or none of four.

    Those of any other file are left to `_add_lines`, which takes half as long again.
    """
    outlines = Outlines([], [], [])
    if file.classes is None:
        return outlines
    for number, line in enumerate(file.text.split("\n"), 1):
        fields = line.split()
        if fields:
            meaning = file.classes[fields.pop(0)]
            if meaning is None or len(fields) < 8 or len(fields) % 2:
                return NONE
            try:
                outlines.values.append([*map(float, fields)])
            except ValueError:
                return NONE
            outlines.numbers.append(number)
            outlines.meanings.append(meaning)
    lengths = set(map(len, outlines.values))
    return outlines if lengths == {8} or 8 not in lengths else NONE


def _add_lines(files: list[LabelFile], data_yaml: DataYaml) -> None:
    """Add the lines of files in which anything may be odd."""
    read = [(file, _read_lines(file, data_yaml)) for file in files]
    outlines = [line.ring if line.shape != "box" else () for _, lines in read for _, line in lines]
    bounds = iter(survey_outlines(outlines))
    for file, lines in read:
        for number, (class_id, shape, ring, extra) in lines:
            labels = [data_yaml.spell(class_id, file.names)]
            file.draft.add(number, labels, shape, [ring], confidence=extra, bounds=[next(bounds)])


def _read_lines(file: LabelFile, data_yaml: DataYaml) -> list[tuple[int, Line]]:
    draft = file.draft
    scored = draft.book.source.origin == "model"
    lines: list[tuple[int, Line]] = []
    for number, content in enumerate(file.text.split("\n"), 1):
        if content and not content.isspace():
            try:
                lines.append((number, parse_line(content, scored=scored)))
            except BadAnnotation as error:
                draft.note(error.code, "error", number, str(error))
    mixed = _note_forms(draft, lines)
    if lines and file.names is None and data_yaml.names_needed:
        data_yaml.say_missing()
        draft.flawed = True
        return []
    if mixed:
        return [
            (number, line._replace(shape="polygon") if line.shape == "oriented_box" else line) for number, line in lines
        ]
    return lines


def _note_forms(draft: Draft, lines: list[tuple[int, Line]]) -> bool:
    """Say once per file what is odd in its lines; whether lines of nine fields stand among others."""
    nine = [(number, line) for number, line in lines if len(line.ring) == 4 and line.shape != "box"]
    mixed = 0 < len(nine) < len(lines)
    if mixed:
        boxes = sum(line.shape == "oriented_box" for _, line in nine)
        message = f"{len(nine)} lines have 9 fields, the others have not: read as polygons. "
        message += f"{boxes} might be oriented boxes, with the same corners; {len(nine) - boxes} are closed triangles"
        draft.note("ambiguous_nine_fields", "info", nine[0][0], message)
    extra = [number for number, line in lines if line.extra is not None]
    if extra and draft.book.source.origin == "human":
        message = f"{len(extra)} lines end in one number more, which was not read; a detector's need `origin: model`"
        draft.note("extra_field", "info", extra[0], message)
    return mixed
