"""Personal data in texts: light patterns, English and Spanish, that need no model. A hint where to look, not a proof.

Found are e-mail addresses, phone numbers (international, North American, Spanish), stated dates of birth, stated record
numbers, US social security and Spanish identity numbers, and names after a title or a label. Not found are names
without either, addresses, employers, rare stories, and anything in other languages.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

MONTH = r"[^\W\d_]{3,10}"
DATE = (
    r"(?:\d{1,4}[-/. ]\d{1,2}[-/. ]\d{1,4}"
    rf"|\d{{1,2}}(?:st|nd|rd|th)? (?:de )?{MONTH},? (?:de )?\d{{4}}|{MONTH} \d{{1,2}},? \d{{4}})"
)
BIRTH = r"(?:d\.?o\.?b\.?|date of birth|birth ?date|born(?: on)?|fecha de nacimiento|nacid[oa] el)"
RECORD = (
    r"(?:mrn|nhc|(?:medical record|chart|patient|record) (?:number|no\.?|id)"
    r"|n[.º° ]{1,3}(?:de )?historia(?: cl[ií]nica)?|historia cl[ií]nica n[.º° ]{1,3})"
)
NAME = r"(?-i:[A-ZÁÉÍÓÚÜÑ][^\W\d_]+(?:[-'’][^\W\d_]+)*)"  # capitalized
PATTERNS = {
    "e-mail address": r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+",
    "phone number": r"(?<![\w+])\+\d(?:[ ().-]{0,2}\d){7,14}\b"
    r"|(?<![\w.])\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4}\b"
    r"|(?<![\w.])[6-9]\d{2}(?:[ .-]\d{3}){2}\b|(?<![\w.])[6-9]\d{2}(?:[ .-]\d{2}){3}\b|(?<![\w.])[67]\d{8}\b",
    "date of birth": rf"\b{BIRTH}\W{{0,3}}{DATE}",
    "record number": rf"\b{RECORD}\W{{0,3}}(?=[\w-]*\d)[\w-]{{3,}}",
    "social security number": r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])",
    "name": rf"\b(?:mr|mrs|ms|dr|prof|sr|sra|srta|dra)\.? {NAME}"
    rf"|\b(?:patient name|name of the patient|nombre(?: del paciente)?)\s?: ?{NAME} {NAME}",
}
COMPILED = {kind: re.compile(pattern, re.IGNORECASE) for kind, pattern in PATTERNS.items()}
SPANISH_ID = re.compile(r"\b([XYZ]?)(\d{7,8})-?([A-Z])\b")
CHECK_LETTERS = "TRWAGMYFPDXBNJZSQVHLCKE"


def find_personal_data(texts: Iterable[str]) -> list[str]:
    """The kinds of personal data that the texts seem to hold, each once; never the data themselves."""
    text = "\n".join(texts)
    return [
        *(kind for kind, pattern in COMPILED.items() if pattern.search(text)),
        *(["identity number"] if any(_spanish_ids(text)) else []),
    ]


def _spanish_ids(text: str) -> Iterator[bool]:
    for prefix, digits, letter in SPANISH_ID.findall(text):
        number = int(f"{'XYZ'.index(prefix) if prefix else ''}{digits}")
        yield len(prefix + digits) == 8 and CHECK_LETTERS[number % 23] == letter
