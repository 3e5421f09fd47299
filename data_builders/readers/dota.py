"""DOTA label files (Roboflow's "YOLOv5 Oriented Bounding Boxes"): eight pixels, a class name, a difficulty."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

from data_builders.readers.drafts import Draft, LabelBook
from data_builders.readers.files import read_text, shorten
from data_builders.readers.geometry import FARTHEST_PIXEL, BadAnnotation
from data_builders.readers.pairs import pair_files, start_draft
from data_builders.records import ImageRecord, Problem, Ring
from data_builders.sources import Source

HEADERS = ("imagesource:", "gsd:")


def read_dota(source: Source) -> Iterator[ImageRecord | Problem]:
    """Yield one record per image, and a problem for everything that could not be read."""
    book = LabelBook(source)
    pairs, problems = pair_files(source, "labelTxt")
    yield from problems
    for pair in pairs:
        draft = start_draft(book, pair)
        draft.measure()
        if pair.labels is not None:
            _read_labels(draft, pair.labels)
        yield from draft.finish()
    yield from book.problems()


def parse_line(line: str) -> tuple[str, Ring]:
    """Parse `x1 y1 x2 y2 x3 y3 x4 y4 class name difficulty`, in pixels; the name may hold blanks.

    Raises:
        BadAnnotation: when it is not that.
    """
    fields = line.split()
    if len(fields) < 9:
        message = f"expected 8 coordinates, a class name and a difficulty; got {len(fields)} fields"
        raise BadAnnotation("bad_label_line", message)
    try:
        if any("_" in field for field in fields[:8]):  # float() reads 1_000 as a number
            raise ValueError
        values = [float(field) for field in fields[:8]]
    except ValueError:
        raise BadAnnotation("bad_label_line", f"{shorten(line.strip())}: a coordinate is not a number") from None
    if not all(math.isfinite(value) and abs(value) < FARTHEST_PIXEL for value in values):
        raise BadAnnotation("bad_label_line", f"{shorten(line.strip())}: a coordinate cannot be a pixel")
    name = fields[8:-1] if len(fields) > 9 and re.fullmatch("[0-9]+", fields[-1]) else fields[8:]
    if name == fields[8:] and (len(name) > 1 or re.fullmatch("[-+.0-9eE]+", name[0])):
        message = f"expected a class name and a difficulty after 8 coordinates; got {shorten(' '.join(name))}"
        raise BadAnnotation("bad_label_line", message)
    return " ".join(name), tuple(zip(values[::2], values[1::2], strict=True))


def _read_labels(draft: Draft, path: Path) -> None:
    try:
        text = read_text(path)
    except BadAnnotation as error:
        draft.note(error.code, "error", None, str(error))
        return
    for number, content in enumerate(text.split("\n"), 1):
        if not content or content.isspace() or content.lower().startswith(HEADERS):
            continue
        try:
            name, ring = parse_line(content)
        except BadAnnotation as error:
            draft.note(error.code, "error", number, str(error))
        else:
            draft.add(number, [(name,)], "oriented_box", [ring])
