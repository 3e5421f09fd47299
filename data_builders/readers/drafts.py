"""An image record in the making, and the labels met on the way."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data_builders.images import ImageError, read_size
from data_builders.readers.files import declared_split, escape_surrogates, name_below_root, shorten
from data_builders.readers.geometry import BadAnnotation, fit
from data_builders.records import (
    Bounds,
    Finding,
    ImageRecord,
    Problem,
    Ring,
    Severity,
    Shape,
    Split,
    make_finding,
    make_record,
)
from data_builders.sources import Label, Source, UnknownLabel

MOST_LISTED = 200
Spellings = tuple[int | str, ...]  # how one label may be named in a class map, such as its id and its name


class Meaning(NamedTuple):
    """What a label of the class map stands for: nothing where the map ignores it."""

    spellings: Spellings
    raw: str
    label: Label | None


class LabelBook:
    """What the raw labels of one source mean, and how often each was met."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._is_standard = isinstance(source.classes, str)
        self.counts: Counter[Spellings] = Counter()
        self.doubtful: Counter[str] = Counter()  # what a detector was not sure enough of, by the reason
        self._known: dict[Spellings, tuple[str, Label | None]] = {}
        self._unknown: dict[Spellings, str] = {}

    def resolve(self, spellings: Spellings) -> tuple[str, Label | None]:
        """The raw label as the class map spells it, and its meaning, `None` where the map ignores it.

        The first of the spellings that the map knows counts. Where labels are tooth names, only the first is one: a
        category id 11 is not tooth 11.
        """
        spellings = spellings[:1] if self._is_standard else spellings
        self.counts[spellings] += 1
        if spellings in self._unknown:
            raise UnknownLabel(self._unknown[spellings])
        try:
            return self._known.get(spellings) or self._look_up(spellings)
        except UnknownLabel as error:
            self._unknown[spellings] = str(error)
            raise

    def find_meaning(self, spellings: Spellings) -> Meaning | None:
        """What `resolve` would find, but nothing is counted; `None` for a label that the map lacks."""
        spellings = spellings[:1] if self._is_standard else spellings
        try:
            return Meaning(spellings, *(self._known.get(spellings) or self._look_up(spellings)))
        except UnknownLabel:
            return None

    def _look_up(self, spellings: Spellings) -> tuple[str, Label | None]:
        tried = list(spellings)
        if len(tried) == 1 and re.fullmatch("0|[1-9][0-9]{0,8}", str(tried[0])):
            tried.append(int(tried[0]))  # YAML reads the key of `1: caries` as a number
        messages = []
        for raw in tried:
            try:
                self._known[spellings] = str(raw), self.source.resolve(raw)
                return self._known[spellings]
            except UnknownLabel as error:
                messages.append(str(error))
        raise UnknownLabel(messages[len(spellings) - 1])

    def problems(self) -> Iterator[Problem]:
        """One problem that lists all labels present and the map, if any label was not in it."""
        if self._unknown:
            present = [f"{_spell(key)} ({count})" for key, count in self.counts.items()]
            message = (
                f"the class map lacks {_list(map(_spell, self._unknown))}. Labels present: {_list(present)}. "
                f"The map: {self.source.class_map_text()}. "
                f"Add what is missing to `classes` of source {self.source.name!r}, or map it to null"
            )
            yield Problem("class_map_incomplete", "error", self.source.root, None, message)
        if self.doubtful:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.doubtful.items()))
            message = f"left out at `min_confidence: {self.source.min_confidence:g}`: {reasons}"
            yield Problem("below_min_confidence", "info", self.source.root, None, message)

    def is_sure(self, confidence: float | None) -> bool:
        """Whether a detector was sure enough of a finding; it is counted if not.

        Raises:
            BadAnnotation: for a confidence that is none, such as a track id.
        """
        if confidence is not None and not 0 <= confidence <= 1:
            raise BadAnnotation("bad_confidence", f"{shorten(confidence)} is no confidence: 0 to 1 is due")
        if confidence is None and self.source.min_confidence:
            self.doubtful["findings without a confidence"] += 1
            return False
        if confidence is not None and confidence < self.source.min_confidence:
            self.doubtful["findings below it"] += 1
            return False
        return True


def _spell(spellings: Spellings) -> str:
    return escape_surrogates(" ".join(str(raw)[:60] for raw in spellings))


def _list(texts: Iterable[str]) -> str:
    texts = sorted(texts)
    more = f" and {len(texts) - MOST_LISTED} more" if len(texts) > MOST_LISTED else ""
    return ", ".join(texts[:MOST_LISTED]) + more


@dataclass(slots=True)
class Draft:
    """One image while its annotations are read from `file`.

    `unit` is what the annotations' coordinates are to be divided by: (1, 1) where they are fractions, `None` where they
    are pixels of an image of unknown size. `size` is the image's own, in pixels, where the reader came to know it.
    """

    book: LabelBook
    path: Path
    file: Path | str | None
    unit: tuple[int, int] | None = (1, 1)
    size: tuple[int, int] | None = None
    split: Split | None = None  # where something else than the folders' names tells it
    folder: Path | None = None  # of the image, where the reader has it at hand
    flawed: bool = False  # a line could not be used: it may have held any label
    findings: list[Finding] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    identity_start: str = field(init=False)
    place_start: str = field(init=False)

    def __post_init__(self) -> None:
        file_name = name_below_root(self.book.source, self.file) if self.file else ""
        self.identity_start = f"{escape_surrogates(file_name)}#"
        self.place_start = f"{file_name}:"

    def note(self, code: str, severity: Severity, line: int | str | None, message: str) -> None:
        """Record a problem of the annotation file."""
        self.flawed |= severity == "error"
        self.problems.append(Problem(code, severity, Path(self.file or self.path), line, message))

    def measure(self) -> None:
        """Take size and unit from the image file, for formats in pixels."""
        self.unit = None
        try:
            self.unit = self.size = read_size(self.path)
        except ImageError as error:
            if not self.path.is_file():
                self.say_missing()
                return
            self.flawed = True
            if error.code == "image_unreadable":  # what is wrong with DICOM is said by `quarantine_dicom`, once
                self.problems.append(Problem(error.code, "error", self.path, None, str(error)))

    def say_missing(self) -> None:
        """Record that the image file is not there."""
        self.problems.append(Problem("image_missing", "warning", self.path, None, "the image file is missing"))

    def add(
        self,
        line: int | str,
        labels: Sequence[Spellings],
        shape: Shape,
        rings: Sequence[Ring],
        *,
        number: int | str | None = None,
        attributes: Mapping[str, str] | None = None,
        tooth: str | None = None,
        confidence: float | None = None,
        bounds: Sequence[Bounds | None] = (),
    ) -> None:
        """Add one annotation: a finding for each of its labels, or the problem with it.

        `number` is what tells it from the others of its file, the line if nothing else does. `tooth` is an FDI number
        that the annotation states beside its label, `confidence` the detector's where the source's origin is a model.
        `bounds` are what `survey_outlines` found of the rings, where it was asked.
        """
        origin = self.book.source.origin
        if origin == "human":
            confidence = None
        try:
            if origin == "model" and not self.book.is_sure(confidence):
                return
            shape, parts, notes = fit(shape, rings, self.unit, bounds=bounds)
        except BadAnnotation as error:
            self.note(error.code, "error", line, str(error))
            self._reject(labels)
            return
        for note in notes:
            self.note(note.code, note.severity, line, note.message)
        self.add_fitted(
            line, labels, shape, parts, number=number, attributes=attributes, tooth=tooth, confidence=confidence
        )

    def add_fitted(
        self,
        line: int | str,
        labels: Sequence[Spellings],
        shape: Shape,
        parts: tuple[Ring, ...],
        *,
        number: int | str | None = None,
        attributes: Mapping[str, str] | None = None,
        tooth: str | None = None,
        confidence: float | None = None,
    ) -> None:
        """Add an annotation whose shape is in fractions and fits the image already."""
        origin = self.book.source.origin
        for spellings in labels:
            try:
                raw, label = self.book.resolve(spellings)
            except UnknownLabel as error:
                self.note("unknown_label", "error", line, str(error))
                continue
            if label is None:
                self.ignored.append(raw)
                continue
            identity = f"{self.identity_start}{escape_surrogates(str(line if number is None else number))}"
            if len(labels) > 1:
                identity += escape_surrogates(f"/{raw}")
            self.findings.append(
                make_finding(
                    identity,
                    label.name,
                    shape,
                    parts,
                    label.tooth or tooth,
                    attributes or {},
                    origin,
                    confidence,
                    f"{self.place_start}{line}",
                )
            )

    def add_plain(self, shape: Shape, annotations: Iterable[tuple[int | str, int, Meaning, Ring]]) -> None:
        """Add what persons annotated: of each its line, its number in the file, its label, its shape as `fit` left it.

        Nothing can be wrong with these any more, which saves a quarter of the time that `add_fitted` takes.
        """
        counts, start, place = self.book.counts, self.identity_start, self.place_start
        for line, number, (spellings, raw, label), ring in annotations:
            counts[spellings] += 1
            if label is None:
                self.ignored.append(raw)
                continue
            name, tooth = label
            identity, where = f"{start}{number}", f"{place}{line}"
            self.findings.append(make_finding(identity, name, shape, (ring,), tooth, {}, "human", None, where))

    def _reject(self, labels: Iterable[Spellings]) -> None:
        """Count what was annotated though its shape is of no use."""
        for spellings in labels:
            try:
                raw, label = self.book.resolve(spellings)
            except UnknownLabel:
                continue
            (self.ignored if label is None else self.rejected).append(raw if label is None else label.name)

    def finish(self) -> Iterator[ImageRecord | Problem]:
        """Yield the problems, then the record."""
        yield from self.problems
        source = self.book.source
        assert source.modality is not None
        width, height = self.size or (None, None)
        yield make_record(
            self.path,
            None,
            width,
            height,
            source.modality,
            source.name,
            None,
            self.split or declared_split(source, self.path, self.folder),
            () if self.flawed else source.exhaustive,
            tuple(self.findings),
            tuple(self.ignored),
            tuple(self.rejected),
            source.locations,
        )
