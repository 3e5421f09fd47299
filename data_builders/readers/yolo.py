"""YOLO label files: boxes, segments, and the nine fields of Ultralytics' oriented boxes, all in fractions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from data_builders.readers.batches import read_in_batches
from data_builders.readers.data_yaml import DataYaml
from data_builders.readers.drafts import Draft, LabelBook
from data_builders.readers.files import read_text, shorten
from data_builders.readers.geometry import BadAnnotation, box_ring, survey_outlines
from data_builders.readers.pairs import Pair, pair_files, start_draft
from data_builders.readers.quarantine import quarantine_dicom
from data_builders.records import ImageRecord, Problem, Ring, Shape
from data_builders.sources import Source

LARGEST_FRACTION = 2.0
BLOCK = 200  # label files
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
    for start in range(0, len(pairs), BLOCK):
        yield from _read_block(book, pairs[start : start + BLOCK], data_yaml)
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


def _read_block(book: LabelBook, pairs: list[Pair], data_yaml: DataYaml) -> Iterator[ImageRecord | Problem]:
    """Read some label files together, for the sake of the check of their outlines."""
    read = []
    for pair in pairs:
        draft = start_draft(book, pair)
        if not pair.has_image:
            draft.say_missing()
        names = data_yaml.find_names(pair.folder)
        draft.split = data_yaml.find_split(pair.image)
        lines = _read_lines(draft, pair.labels, data_yaml, names) if pair.labels is not None else []
        read.append((draft, names, lines))
    outlines = [line.ring if line.shape != "box" else () for _, _, lines in read for _, line in lines]
    bounds = iter(survey_outlines(outlines))
    for draft, names, lines in read:
        for number, (class_id, shape, ring, extra) in lines:
            labels = [data_yaml.spell(class_id, names)]
            draft.add(number, labels, shape, [ring], confidence=extra, bounds=[next(bounds)])
        yield from draft.finish()


def _read_lines(
    draft: Draft, path: Path, data_yaml: DataYaml, names: Mapping[int, str] | None
) -> list[tuple[int, Line]]:
    scored = draft.book.source.origin == "model"
    try:
        text = read_text(path)
    except BadAnnotation as error:
        draft.note(error.code, "error", None, str(error))
        return []
    lines: list[tuple[int, Line]] = []
    for number, content in enumerate(text.split("\n"), 1):
        if content and not content.isspace():
            try:
                lines.append((number, parse_line(data_yaml.drop_keypoints(content), scored=scored)))
            except BadAnnotation as error:
                draft.note(error.code, "error", number, str(error))
    mixed = _note_forms(draft, lines)
    if lines and names is None and data_yaml.names_needed:
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
