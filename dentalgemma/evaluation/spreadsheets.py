"""The texts of a spreadsheet (.xlsx), with the standard library alone: as a tool wrote them, never as numbers."""

from __future__ import annotations

import posixpath
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from dentalgemma.evaluation.questions import EvaluationError

LARGEST = 2**28  # bytes that one part may unpack to
COLUMNS, ROWS = 16_384, 1_048_576  # XFD1048576 is the last cell that a spreadsheet has (ECMA-376, part 1, 18.18.62)
MOST = 2**24  # cells of the whole table with the empty ones in its gaps, and texts to share
MOST_IN_ONE = 2**20  # elements of one row, or of one shared text
CHUNK = 2**16
UNREADABLE = (OSError, EOFError, LookupError, RuntimeError, ValueError)  # RuntimeError: a part behind a password
KNOWN_PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def read_first_sheet(path: Path) -> list[list[str]]:
    """The rows of the first sheet, in the order of the workbook, as texts; an empty cell is "", an empty row [].

    A number keeps the digits it is stored with. A formula without a stored text is read as it was typed: an answer that
    begins with "=" may have become one.

    Raises:
        EvaluationError: when the file is no spreadsheet, or unpacks to more than a spreadsheet of answers needs.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            sheet, texts = _find_parts(archive)
            shared = [_join(entry) for entry in _iterate(archive, texts, "si")] if texts else []
            return _read_rows(archive, sheet, shared)
    except (*UNREADABLE, zipfile.BadZipFile, zlib.error, ElementTree.ParseError) as error:
        raise EvaluationError(f"{path}: cannot be read as a spreadsheet: {error}") from None


def _find_parts(archive: zipfile.ZipFile) -> tuple[str, str | None]:
    """Where the first sheet of cells lies, and the texts that its cells share; a chart may be a sheet before it."""
    parts: dict[str, tuple[str, str]] = {}
    for relation in _iterate(archive, "xl/_rels/workbook.xml.rels", "Relationship"):
        place = posixpath.normpath(posixpath.join("/xl", relation.get("Target", ""))).lstrip("/")
        parts[relation.get("Id", "")] = relation.get("Type", "").rpartition("/")[2], place
    for sheet in _iterate(archive, "xl/workbook.xml", "sheet"):
        kind, place = parts[next((value for name, value in sheet.items() if name.endswith("}id")), "")]
        if kind == "worksheet":
            return place, next((where for kind, where in parts.values() if kind == "sharedStrings"), None)
    raise ValueError("the workbook has no sheet of cells")


class _Collector:
    """Takes a parser's events and keeps the elements of one name, without namespaces, until they are fetched."""

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self.found: list[Element] = []
        self._builder: ElementTree.TreeBuilder | None = None
        self._depth = self._count = 0

    def doctype(self, *_: object) -> None:
        raise ValueError("it declares entities, which no spreadsheet needs")

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        name = tag.rpartition("}")[2]
        if self._builder is None and name == self.tag:
            self._builder, self._count = ElementTree.TreeBuilder(), 0
        if self._builder is not None:
            self._depth, self._count = self._depth + 1, self._count + 1
            if self._count > MOST_IN_ONE:
                raise ValueError(f"one <{self.tag}> holds more than {MOST_IN_ONE} elements")
            self._builder.start(name, attributes)

    def data(self, text: str) -> None:
        if self._builder is not None:
            self._builder.data(text)

    def end(self, tag: str) -> None:
        if self._builder is None:
            return
        self._builder.end(tag.rpartition("}")[2])
        self._depth -= 1
        if not self._depth:
            self.found.append(self._builder.close())
            self._builder = None

    def close(self) -> None: ...


def _iterate(archive: zipfile.ZipFile, name: str, tag: str) -> Iterator[Element]:
    """The elements of one name in a part, read piece by piece: what is small when packed may not be so unpacked."""
    if archive.getinfo(name).compress_type not in KNOWN_PACKINGS:
        raise ValueError(f"{name} is packed in a way that no spreadsheet is")
    collector = _Collector(tag)
    parser = ElementTree.XMLParser(target=collector)
    unpacked = count = 0
    with archive.open(name) as part:
        while chunk := part.read(CHUNK):
            unpacked += len(chunk)
            if unpacked > LARGEST:
                raise ValueError(f"{name} unpacks to more than {LARGEST} bytes")
            parser.feed(chunk)
            count += len(collector.found)
            if count > MOST:
                raise ValueError(f"{name} holds more than {MOST} <{tag}>")
            yield from collector.found
            collector.found.clear()
    parser.close()
    yield from collector.found


def _read_rows(archive: zipfile.ZipFile, sheet: str, shared: list[str]) -> list[list[str]]:
    """Rows at the places that they name; those that name none follow the one before them."""
    rows: dict[int, list[str]] = {}
    number = cells = 0
    for row in _iterate(archive, sheet, "row"):
        number = int(row.get("r", number + 1))
        if not 1 <= number <= ROWS or number in rows:
            raise ValueError(f"row {number} comes twice, or is none of {ROWS}")
        rows[number] = _read_row(row, number, shared)
        cells += len(rows[number])
        if cells > MOST:
            raise ValueError(f"the table has more than {MOST} cells")
    return [rows.get(place, []) for place in range(1, max(rows, default=0) + 1)]


def _read_row(row: Element, number: int, shared: list[str]) -> list[str]:
    cells: dict[int, str] = {}
    column = 0
    for cell in row.iter("c"):
        place = cell.get("r")
        column = _column(place, number) if place else column + 1
        if column > COLUMNS or column in cells:
            raise ValueError(f"column {column} of row {number} comes twice, or is beyond the last one, XFD")
        cells[column] = _read_cell(cell, shared)
    return [cells.get(place, "") for place in range(1, max(cells, default=0) + 1)]


def _read_cell(cell: Element, shared: list[str]) -> str:
    kind, value = cell.get("t"), cell.findtext("v") or ""
    if kind == "inlineStr":
        return "".join(map(_join, cell.iter("is")))
    formula = cell.findtext("f")
    if formula is not None and (not value or kind != "str"):
        return f"={_unescape(formula)}"
    if kind != "s" or not value:
        return _unescape(value)
    if not value.strip().isdecimal():
        raise ValueError(f"{value!r} is no number of a shared text")
    return shared[int(value)]


def _join(entry: Element) -> str:
    """The runs of a text; how it is pronounced (`rPh`) is not part of it."""
    runs = [run.findtext("t") or "" for run in entry.iterfind("r")]
    return _unescape((entry.findtext("t") or "") + "".join(runs))


def _unescape(text: str) -> str:
    """Characters that XML has no place for stand as `_x000D_`."""
    return re.sub(r"_x([0-9A-Fa-f]{4})_", lambda match: chr(int(match[1], 16)), text)


def _column(place: str, row: int) -> int:
    """1 for A1, 28 for AB7.

    Raises:
        ValueError: where it names no column up to XFD, or another row than the one it stands in.
    """
    named = re.fullmatch(r"([A-Z]{1,3})([0-9]{1,7})", place)
    if not named or int(named[2]) != row:
        raise ValueError(f"{place[:20]} is no cell of row {row}")
    number = 0
    for letter in named[1]:
        number = number * 26 + ord(letter) - ord("A") + 1
    return number
