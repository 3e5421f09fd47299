"""DOTA label files (Roboflow's "YOLOv5 Oriented Bounding Boxes"): eight pixels, a class name, a difficulty."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from data_builders.readers.batches import read_in_batches
from data_builders.readers.drafts import Draft, LabelBook, Meaning
from data_builders.readers.files import read_text, shorten
from data_builders.readers.geometry import FARTHEST_PIXEL, BadAnnotation, survey_outlines
from data_builders.readers.outlines import Outlines, add_outlines
from data_builders.readers.pairs import Pair, pair_files, start_draft
from data_builders.readers.quarantine import quarantine_dicom
from data_builders.records import ImageRecord, Problem, Ring
from data_builders.sources import Source

BLOCK = 200  # label files
HEADERS = ("imagesource:", "gsd:")
NONE = Outlines([], [], [])
DIFFICULTIES = frozenset("0123456789")
DIFFICULTY = re.compile("[0-9]+")
NUMBER = re.compile(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?", re.IGNORECASE)


@quarantine_dicom
@read_in_batches
def read_dota(source: Source) -> Iterator[ImageRecord | Problem]:
    """Yield one record per image, and a problem for everything that could not be read."""
    book = LabelBook(source)
    pairs, problems = pair_files(source, "labelTxt")
    yield from problems
    meanings = Meanings(book)
    for start in range(0, len(pairs), BLOCK):
        yield from _read_block(book, pairs[start : start + BLOCK], meanings)
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


class Meanings(dict[str, Meaning | None]):
    """What the end of a line, a class name and a difficulty of one digit, means; `None` for any other end."""

    def __init__(self, book: LabelBook) -> None:
        self._book = book

    def __missing__(self, end: str) -> Meaning | None:
        *name, difficulty = end.split()
        self[end] = self._book.find_meaning((" ".join(name),)) if name and difficulty in DIFFICULTIES else None
        return self[end]


def _read_block(book: LabelBook, pairs: list[Pair], meanings: Meanings) -> Iterator[ImageRecord | Problem]:
    """Read some label files together, for the sake of the check of their boxes."""
    files = [_open(book, pair) for pair in pairs]
    outlines = [_read_plain(file, meanings) for file in files]
    added = add_outlines([file.draft for file in files], outlines, FARTHEST_PIXEL)
    _add_lines([file for file, is_done in zip(files, added, strict=True) if not is_done])
    for file in files:
        yield from file.draft.finish()


class LabelFile(NamedTuple):
    """A label file that was read, and the image it is about."""

    draft: Draft
    text: str


def _open(book: LabelBook, pair: Pair) -> LabelFile:
    draft = start_draft(book, pair)
    draft.measure()
    text = ""
    if pair.labels is not None:
        try:
            text = read_text(pair.labels)
        except BadAnnotation as error:
            draft.note(error.code, "error", None, str(error))
    return LabelFile(draft, text)


def _read_plain(file: LabelFile, meanings: Meanings) -> Outlines:
    """The lines of a file none of which is odd; those of any other are left to `_add_lines`, which takes longer."""
    outlines = Outlines([], [], [])
    if file.draft.unit is None or file.draft.book.source.origin != "human":
        return outlines
    has_underscore = "_" in file.text  # float() reads 1_000 as a number
    for number, line in enumerate(file.text.split("\n"), 1):
        fields = line.split(None, 8)
        if len(fields) < 9:
            if fields and not line.lower().startswith(HEADERS):
                return NONE
            continue
        meaning = meanings[fields.pop()]
        if meaning is None or (has_underscore and "_" in "".join(fields)):
            return NONE
        try:
            outlines.values.append([*map(float, fields)])
        except ValueError:
            return NONE
        outlines.numbers.append(number)
        outlines.meanings.append(meaning)
    return outlines


def _add_lines(files: list[LabelFile]) -> None:
    """Add the lines of files in which anything may be odd."""
    read = [(file.draft, _read_lines(file.text)) for file in files]
    rings = [line[1] for _, lines in read for _, line in lines if not isinstance(line, BadAnnotation)]
    bounds = iter(survey_outlines(rings))
    for draft, lines in read:
        for number, line in lines:
            if isinstance(line, BadAnnotation):
                draft.note(line.code, "error", number, str(line))
            else:
                draft.add(number, [(line[0],)], "oriented_box", [line[1]], bounds=[next(bounds)])


def _read_lines(text: str) -> list[tuple[int, tuple[str, Ring] | BadAnnotation]]:
    """The lines by number, each parsed or with what is wrong with it."""
    lines = []
    for number, content in enumerate(text.split("\n"), 1):
        if content and not content.isspace() and not content.lower().startswith(HEADERS):
            try:
                lines.append((number, parse_line(content)))
            except BadAnnotation as error:
                lines.append((number, error))
    return lines
