"""DOTA label files (Roboflow's "YOLOv5 Oriented Bounding Boxes"): eight pixels, a class name, a difficulty."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

from data_builders.readers.batches import read_in_batches
from data_builders.readers.drafts import LabelBook
from data_builders.readers.files import read_text, shorten
from data_builders.readers.geometry import FARTHEST_PIXEL, BadAnnotation, survey_outlines
from data_builders.readers.pairs import Pair, pair_files, start_draft
from data_builders.readers.quarantine import quarantine_dicom
from data_builders.records import ImageRecord, Problem, Ring
from data_builders.sources import Source

BLOCK = 200  # label files
HEADERS = ("imagesource:", "gsd:")
DIFFICULTY = re.compile("[0-9]+")
NUMBER = re.compile(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?", re.IGNORECASE)


@quarantine_dicom
@read_in_batches
def read_dota(source: Source) -> Iterator[ImageRecord | Problem]:
    """Yield one record per image, and a problem for everything that could not be read."""
    book = LabelBook(source)
    pairs, problems = pair_files(source, "labelTxt")
    yield from problems
    for start in range(0, len(pairs), BLOCK):
        yield from _read_block(book, pairs[start : start + BLOCK])
    yield from book.problems()


def parse_line(line: str) -> tuple[str, Ring]:
    """Parse `x1 y1 x2 y2 x3 y3 x4 y4 class name difficulty`, in pixels.

    The name may hold blanks, and the difficulty, a whole number, may be missing.

    Raises:
        BadAnnotation: when it is not that.
    """
    fields = line.split()
    if len(fields) < 9:
        message = f"expected 8 coordinates, a class name and a difficulty; got {len(fields)} fields"
        raise BadAnnotation("bad_label_line", message)
    try:
        if "_" in line and any("_" in field for field in fields[:8]):  # float() reads 1_000 as a number
            raise ValueError
        values = list(map(float, fields[:8]))
    except ValueError:
        raise BadAnnotation("bad_label_line", f"{shorten(line.strip())}: a coordinate is not a number") from None
    if not math.isfinite(sum(values)) or max(values) >= FARTHEST_PIXEL or min(values) <= -FARTHEST_PIXEL:
        raise BadAnnotation("bad_label_line", f"{shorten(line.strip())}: a coordinate cannot be a pixel")
    name = fields[8:-1] if len(fields) > 9 and DIFFICULTY.fullmatch(fields[-1]) else fields[8:]
    if name == fields[8:] and NUMBER.fullmatch(name[-1]):  # the numbers of some other format
        message = f"expected a class name and a difficulty after 8 coordinates; got {shorten(' '.join(name))}"
        raise BadAnnotation("bad_label_line", message)
    return " ".join(name), tuple(zip(values[::2], values[1::2], strict=True))


def _read_block(book: LabelBook, pairs: list[Pair]) -> Iterator[ImageRecord | Problem]:
    """Read some label files together, for the sake of the check of their boxes."""
    read = []
    for pair in pairs:
        draft = start_draft(book, pair)
        draft.measure()
        read.append((draft, _read_lines(pair.labels) if pair.labels is not None else []))
    rings = [line[1] for _, lines in read for _, line in lines if not isinstance(line, BadAnnotation)]
    bounds = iter(survey_outlines(rings))
    for draft, lines in read:
        for number, line in lines:
            if isinstance(line, BadAnnotation):
                draft.note(line.code, "error", number, str(line))
            else:
                draft.add(number, [(line[0],)], "oriented_box", [line[1]], bounds=[next(bounds)])
        yield from draft.finish()


def _read_lines(path: Path) -> list[tuple[int | None, tuple[str, Ring] | BadAnnotation]]:
    """The lines by number, each parsed or with what is wrong with it; an unreadable file is one without a number."""
    try:
        text = read_text(path)
    except BadAnnotation as error:
        return [(None, error)]
    lines = []
    for number, content in enumerate(text.split("\n"), 1):
        if content and not content.isspace() and not content.lower().startswith(HEADERS):
            try:
                lines.append((number, parse_line(content)))
            except BadAnnotation as error:
                lines.append((number, error))
    return lines
