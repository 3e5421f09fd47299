"""The texts of a spreadsheet (.xlsx), with the standard library alone: as a tool wrote them, never as numbers."""

from __future__ import annotations

import re
import zipfile
import zlib
from pathlib import Path
from xml.etree import ElementTree

from dentalgemma.evaluation.questions import EvaluationError

SPACE = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
LARGEST = 2**30  # bytes of one unpacked part


def read_first_sheet(path: Path) -> list[list[str]]:
    """The rows of the first sheet as texts, an empty cell as "".

    A number keeps the digits it is stored with. A formula without a stored text is read as it was typed: an answer that
    begins with "=" may have become one.

    Raises:
        EvaluationError: when the file is no spreadsheet.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            shared = _read_shared(archive)
            return [_read_row(row, shared) for row in _parse(archive, "xl/worksheets/sheet1.xml").iter(f"{SPACE}row")]
    except (OSError, KeyError, IndexError, ValueError, zipfile.BadZipFile, zlib.error, ElementTree.ParseError) as error:
        raise EvaluationError(f"{path}: cannot be read as a spreadsheet: {error}") from None


def _parse(archive: zipfile.ZipFile, name: str) -> ElementTree.Element:
    if archive.getinfo(name).file_size > LARGEST:
        raise ValueError(f"{name} unpacks to more than {LARGEST} bytes")
    content = archive.read(name)
    if b"<!DOCTYPE" in content:
        raise ValueError(f"{name} declares entities, which no spreadsheet needs")
    return ElementTree.fromstring(content)


def _read_shared(archive: zipfile.ZipFile) -> list[str]:
    if "xl/sharedStrings.xml" not in archive.namelist():
        return []
    return [_join(entry) for entry in _parse(archive, "xl/sharedStrings.xml").iter(f"{SPACE}si")]


def _read_row(row: ElementTree.Element, shared: list[str]) -> list[str]:
    cells: list[str] = []
    for cell in row.iter(f"{SPACE}c"):
        place = cell.get("r")
        column = _column(place) if place else len(cells)
        cells += [""] * (column - len(cells))
        cells.append(_read_cell(cell, shared))
    return cells


def _read_cell(cell: ElementTree.Element, shared: list[str]) -> str:
    kind, value = cell.get("t"), cell.findtext(f"{SPACE}v") or ""
    if kind == "inlineStr":
        return "".join(map(_join, cell.iter(f"{SPACE}is")))
    formula = cell.findtext(f"{SPACE}f")
    if formula is not None and (not value or kind != "str"):
        return f"={_unescape(formula)}"
    return shared[int(value)] if kind == "s" and value else _unescape(value)


def _join(entry: ElementTree.Element) -> str:
    """The runs of a text; how it is pronounced (`rPh`) is not part of it."""
    runs = [run.findtext(f"{SPACE}t") or "" for run in entry.iterfind(f"{SPACE}r")]
    return _unescape((entry.findtext(f"{SPACE}t") or "") + "".join(runs))


def _unescape(text: str) -> str:
    """Characters that XML has no place for stand as `_x000D_`."""
    return re.sub(r"_x([0-9A-Fa-f]{4})_", lambda match: chr(int(match[1], 16)), text)


def _column(place: str) -> int:
    """0 for A1, 27 for AB7."""
    number = 0
    for letter in re.match(r"[A-Z]+", place)[0]:
        number = number * 26 + ord(letter) - ord("A") + 1
    return number - 1
