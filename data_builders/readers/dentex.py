"""DENTEX's kind of COCO: quadrant, tooth and diagnosis in three lists of categories, each with ids of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from data_builders.dentition import parse_fdi
from data_builders.readers.drafts import Spellings
from data_builders.readers.files import shorten
from data_builders.readers.geometry import BadAnnotation
from data_builders.sources import Source

QUADRANTS = frozenset("1234")
Names = Mapping[int | str, str]


class DentexNames(NamedTuple):
    """The names behind `category_id_1` (quadrant), `category_id_2` (tooth) and `category_id_3` (diagnosis)."""

    quadrants: Names
    teeth: Names
    diagnoses: Names

    def read(self, ids: tuple, *, by_number: bool) -> tuple[Spellings, str]:
        """The label of an annotation, and its FDI number; `by_number`, the number is the label too.

        The file's own names count, never an id: ids start at 0 here, quadrants and teeth at 1.
        """
        quadrant, tooth, diagnosis = ids
        try:
            number = parse_fdi(f"{self.quadrants[quadrant]}{self.teeth[tooth]}")
        except (KeyError, ValueError):
            place = f"category_id_1 {shorten(quadrant)} and category_id_2 {shorten(tooth)}"
            raise BadAnnotation("bad_category", f"{place} name no FDI tooth number") from None
        if by_number:
            return (number,), number
        if diagnosis not in self.diagnoses:
            raise BadAnnotation("bad_category", f"category_id_3 {shorten(diagnosis)} is no diagnosis of this file")
        return (self.diagnoses[diagnosis], diagnosis), number


def is_dentex(document: Mapping[str, Any]) -> bool:
    """Whether a document has lists of categories by level."""
    return isinstance(document.get("categories_1"), list)


def check_levels(source: Source, document: Mapping[str, Any]) -> None:
    """Refuse a DENTEX file that does not hold what the source's class map asks for.

    Raises:
        BadAnnotation: when it has quadrants only, or no diagnoses though the class map names some.
    """
    if is_dentex(document):
        only_quadrants = not document.get("categories_2")
    else:
        categories = [entry for entry in document["categories"] if isinstance(entry, dict)]
        names, ids = ({str(entry.get(key)) for entry in categories} for key in ("name", "id"))
        mapped = set() if isinstance(source.classes, str) else set(map(str, source.classes or {}))
        only_quadrants = names == QUADRANTS and not (names | ids) & mapped
    if only_quadrants:
        message = "marks quadrants of the mouth only, which are no findings; leave it out by naming the others"
        raise BadAnnotation("quadrants_only", f"{message} as `annotations` of source {source.name!r}")
    if is_dentex(document) and not document.get("categories_3") and source.classes != "fdi":
        message = "numbers teeth and names no diagnosis; read it as a source of its own with `classes: fdi`"
        raise BadAnnotation("diagnoses_missing", message)
