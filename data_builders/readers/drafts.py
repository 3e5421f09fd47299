"""An image record in the making, and the labels met on the way."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from data_builders.images import ImageError, read_size
from data_builders.readers.files import declared_split, escape_surrogates
from data_builders.readers.geometry import BadAnnotation, fit
from data_builders.records import Finding, ImageRecord, Problem, Ring, Severity, Shape
from data_builders.sources import Label, Source, UnknownLabel

MOST_LISTED = 200
Spellings = tuple[int | str, ...]  # how one label may be named in a class map, such as its id and its name


class LabelBook:
    """What the raw labels of one source mean, and how often each was met."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.counts: Counter[Spellings] = Counter()
        self._known: dict[Spellings, tuple[str, Label | None]] = {}
        self._unknown: dict[Spellings, str] = {}

    def resolve(self, spellings: Spellings) -> tuple[str, Label | None]:
        """The raw label as the class map spells it, and its meaning, `None` where the map ignores it.

        The first of the spellings that the map knows counts. Where labels are tooth names, only the first is one: a
        category id 11 is not tooth 11.
        """
        spellings = spellings[:1] if isinstance(self.source.classes, str) else spellings
        self.counts[spellings] += 1
        if spellings not in self._known and spellings not in self._unknown:
            self._look_up(spellings)
        if spellings in self._unknown:
            raise UnknownLabel(self._unknown[spellings])
        return self._known[spellings]

    def _look_up(self, spellings: Spellings) -> None:
        tried = list(spellings)
        if len(tried) == 1 and re.fullmatch("0|[1-9][0-9]{0,8}", str(tried[0])):
            tried.append(int(tried[0]))  # YAML reads the key of `1: caries` as a number
        messages = []
        for raw in tried:
            try:
                self._known[spellings] = str(raw), self.source.resolve(raw)
                return
            except UnknownLabel as error:
                messages.append(str(error))
        self._unknown[spellings] = messages[len(spellings) - 1]

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


def _spell(spellings: Spellings) -> str:
    return escape_surrogates(" ".join(str(raw)[:60] for raw in spellings))


def _list(texts: Iterable[str]) -> str:
    texts = sorted(texts)
    more = f" and {len(texts) - MOST_LISTED} more" if len(texts) > MOST_LISTED else ""
    return ", ".join(texts[:MOST_LISTED]) + more


@dataclass
class Draft:
    """One image while its annotations are read from `file`.

    `unit` is what the annotations' coordinates are to be divided by: (1, 1) where they are fractions, `None` where they
    are pixels of an image of unknown size. `size` is the image's own, in pixels, where the reader came to know it.
    """

    book: LabelBook
    path: Path
    file: Path | None
    unit: tuple[int, int] | None = (1, 1)
    size: tuple[int, int] | None = None
    flawed: bool = False  # a line could not be used: it may have held any label
    findings: list[Finding] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.file_name = self.file.relative_to(self.book.source.root).as_posix() if self.file else ""

    def note(self, code: str, severity: Severity, line: int | str | None, message: str) -> None:
        """Record a problem of the annotation file."""
        self.flawed |= severity == "error"
        self.problems.append(Problem(code, severity, self.file or self.path, line, message))

    def measure(self) -> None:
        """Take size and unit from the image file, for formats in pixels."""
        self.unit = None
        if not self.path.is_file():
            self.say_missing()
            return
        try:
            self.unit = self.size = read_size(self.path)
        except ImageError as error:
            self.flawed = True
            self.problems.append(Problem("image_unreadable", "error", self.path, None, str(error)))

    def say_missing(self) -> None:
        """Record that the image file is not there."""
        self.problems.append(Problem("image_missing", "warning", self.path, None, "the image file is missing"))

    def add(
        self,
        line: int | str,
        labels: Iterable[Spellings],
        shape: Shape,
        rings: Iterable[Ring],
        *,
        number: int | str | None = None,
        attributes: Mapping[str, str] | None = None,
    ) -> None:
        """Add one annotation: a finding for each of its labels, or the problem with it.

        `number` is what tells it from the others of its file, the line if nothing else does.
        """
        labels = list(labels)
        try:
            shape, parts, notes = fit(shape, rings, self.unit)
        except BadAnnotation as error:
            self.note(error.code, "error", line, str(error))
            self._reject(labels)
            return
        for note in notes:
            self.note(note.code, note.severity, line, note.message)
        for spellings in labels:
            try:
                raw, label = self.book.resolve(spellings)
            except UnknownLabel as error:
                self.note("unknown_label", "error", line, str(error))
                continue
            if label is None:
                self.ignored.append(raw)
                continue
            finding_id = f"{self.file_name}#{escape_surrogates(str(line if number is None else number))}"
            finding_id += f"/{raw}" if len(labels) > 1 else ""
            where = f"{self.file_name}:{line}"
            self.findings.append(
                Finding(finding_id, label.name, shape, parts, label.tooth, attributes or {}, "human", None, where)
            )

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
        yield ImageRecord(
            path=self.path,
            image_id=None,
            width=width,
            height=height,
            modality=source.modality,
            source=source.name,
            group_id=None,
            declared_split=declared_split(source, self.path),
            exhaustive=() if self.flawed else source.exhaustive,
            findings=tuple(self.findings),
            ignored=tuple(self.ignored),
            rejected=tuple(self.rejected),
            locations=source.locations,
        )
