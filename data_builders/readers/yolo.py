"""YOLO label files: boxes, segments, and the nine fields of Ultralytics' oriented boxes, all in fractions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import yaml

from data_builders.readers.drafts import Draft, LabelBook, Spellings
from data_builders.readers.files import leaves_root, read_text, shorten
from data_builders.readers.geometry import BadAnnotation, box_ring
from data_builders.readers.pairs import pair_files, start_draft
from data_builders.records import ImageRecord, Problem, Ring, Shape
from data_builders.sources import Source

LARGEST_FRACTION = 2.0
FORMS = "expected 4 coordinates, or 3 or more points, after the class id"


class Line(NamedTuple):
    """One line of a label file; four points are an oriented box until the rest of the file says otherwise."""

    class_id: int
    shape: Shape
    ring: Ring
    has_extra: bool


def read_yolo(source: Source) -> Iterator[ImageRecord | Problem]:
    """Yield one record per image, and a problem for everything that could not be read."""
    book = LabelBook(source)
    pairs, problems = pair_files(source, "labels")
    yield from problems
    names = ClassNames(source)
    for pair in pairs:
        draft = start_draft(book, pair)
        if not pair.has_image:
            draft.say_missing()
        if pair.labels is not None:
            _read_labels(draft, pair.labels, names)
        yield from draft.finish()
    yield from names.problems
    yield from book.problems()


def parse_line(line: str) -> Line:
    """Parse `class cx cy w h` or `class x1 y1 … xn yn`, in fractions; a box or four points may have one number more.

    Raises:
        BadAnnotation: when it is neither.
    """
    try:
        if "_" in line:  # float() reads 1_000 as a number
            raise ValueError
        class_id, *values = map(float, line.split())
    except ValueError:
        raise BadAnnotation("bad_label_line", f"{shorten(line.strip())} has a field that is not a number") from None
    if not all(map(math.isfinite, values)) or not class_id.is_integer():
        raise BadAnnotation(
            "bad_label_line", f"{shorten(line.strip())}: not finite, or the class id is no whole number"
        )
    count = len(values)
    if has_extra := count in (5, 9):
        del values[-1]
    if count < 4 or (count % 2 and not has_extra):
        raise BadAnnotation("bad_label_line", f"{FORMS}; got {count} numbers")
    if max(values) > LARGEST_FRACTION or min(values) < -LARGEST_FRACTION:
        message = f"fractions of the image are due, this looks like pixels: {shorten(line.strip())}"
        raise BadAnnotation("looks_like_pixels", message)
    if len(values) == 4:
        cx, cy, width, height = values
        ring = box_ring(cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
        return Line(int(class_id), "box", ring, has_extra)
    ring = tuple(zip(values[::2], values[1::2], strict=True))
    is_box = len(ring) == 4 and ring[0] != ring[-1]  # a triangle that closes on its first point has 9 fields too
    return Line(int(class_id), "oriented_box" if is_box else "polygon", ring, has_extra)


def _read_labels(draft: Draft, path: Path, names: ClassNames) -> None:
    try:
        text = read_text(path)
    except BadAnnotation as error:
        draft.note(error.code, "error", None, str(error))
        return
    lines: list[tuple[int, Line]] = []
    for number, content in enumerate(text.split("\n"), 1):
        if content and not content.isspace():
            try:
                lines.append((number, parse_line(content)))
            except BadAnnotation as error:
                draft.note(error.code, "error", number, str(error))
    mixed = _note_forms(draft, lines)
    known = names.find(path.parent)
    if lines and known is None and names.needed:
        names.say_missing()
        draft.flawed = True
        return
    for number, (class_id, shape, ring, _) in lines:
        shape = "polygon" if mixed and shape == "oriented_box" else shape
        draft.add(number, [names.spell(class_id, known)], shape, [ring])


def _note_forms(draft: Draft, lines: list[tuple[int, Line]]) -> bool:
    """Say once per file what is odd in its lines; whether lines of nine fields stand among others."""
    nine = [(number, line) for number, line in lines if len(line.ring) == 4 and line.shape != "box"]
    mixed = 0 < len(nine) < len(lines)
    if mixed:
        boxes = sum(line.shape == "oriented_box" for _, line in nine)
        message = f"{len(nine)} lines have 9 fields, the others have not: read as polygons. "
        message += f"{boxes} might be oriented boxes, with the same corners; {len(nine) - boxes} are closed triangles"
        draft.note("ambiguous_nine_fields", "info", nine[0][0], message)
    if extra := [number for number, line in lines if line.has_extra]:
        message = f"{len(extra)} lines end in one number more (a confidence or a track id), which was not read"
        draft.note("extra_field", "info", extra[0], message)
    return mixed


class ClassNames:
    """The `names` of the nearest data.yaml at or above a label file, not above the source's root."""

    def __init__(self, source: Source) -> None:
        self.source = source
        classes = source.classes
        self.is_standard = isinstance(classes, str)
        self.needed = self.is_standard or all(isinstance(raw, str) for raw in classes or {})
        self.problems: list[Problem] = []
        self._found: dict[Path, Mapping[int, str] | None] = {}

    def find(self, folder: Path) -> Mapping[int, str] | None:
        """The names by class id, or `None` where no data.yaml has any."""
        if folder not in self._found:
            own = self._read(folder / "data.yaml")
            at_top = folder == self.source.root or self.source.root not in folder.parents
            self._found[folder] = own if own is not None or at_top else self.find(folder.parent)
        return self._found[folder]

    def spell(self, class_id: int, names: Mapping[int, str] | None) -> Spellings:
        """How the class map may name a class: a number is always an id, a text is a name if there are names."""
        if names is None:
            return (class_id,)
        name = names.get(class_id)
        if self.is_standard:
            return (name if name is not None else f"class {class_id} beyond data.yaml",)
        return (class_id,) if name is None else (class_id, name)

    def say_missing(self) -> None:
        """Say once that labels are names which nothing gives."""
        if not any(problem.code == "names_missing" for problem in self.problems):
            message = (
                f"classes are given by name ({self.source.class_map_text()}), the label files hold numbers, and no "
                "data.yaml with `names` lies beside or above them; add one, or map the numbers (without quotes)"
            )
            self.problems.append(Problem("names_missing", "error", self.source.root, None, message))

    def _read(self, path: Path) -> Mapping[int, str] | None:
        if not path.is_file():
            return None
        try:
            if leaves_root(self.source, path):
                raise BadAnnotation("unsafe_path", "is a link that leaves the source folder")
            document = yaml.safe_load(read_text(path))
            names = document.get("names") if isinstance(document, dict) else None
            if isinstance(names, list):
                names = dict(enumerate(names))
            if not isinstance(names, dict):
                raise BadAnnotation("bad_data_yaml", "has no list or mapping `names`")
            return {int(number): str(name) for number, name in names.items()}
        except BadAnnotation as error:
            self.problems.append(Problem(error.code, "error", path, None, str(error)))
        except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
            reason = shorten(str(error).replace("\n", " "))
            self.problems.append(Problem("bad_data_yaml", "error", path, None, f"cannot be read: {reason}"))
        return None
