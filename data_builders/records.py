"""The one form behind every annotation format: what a reader yields and everything after it consumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any, Literal

Shape = Literal["box", "oriented_box", "polygon", "polyline", "point", "image"]
Modality = Literal["panoramic", "intraoral_photo", "periapical", "bitewing"]
Origin = Literal["human", "model"]
Severity = Literal["error", "warning", "info"]
Split = Literal["train", "validation", "test"]
Point = tuple[float, float]
Ring = tuple[Point, ...]
Bounds = tuple[float, float, float, float]


class InputError(ValueError):
    """What a user can mend: a file, a setting or a command that cannot be used as it is; the message says what to do.

    Commands and recipes print it as one sentence and exit with `exit_code`.
    """

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Finding:
    """One labelled thing in an image.

    `parts` are rings of points in fractions of image width and height; (0, 0) is the top left, which on a panoramic
    is the patient's right. A label without geometry (a class folder) has no parts, and so has a shape given in pixels
    of an image whose size nobody knows because its file is missing.

    `label` is a name of the vocabulary. `tooth` is an FDI number ("36") or a tooth type ("first_molar"); one finding
    may name tooth and disease. `attributes` are what the annotator graded, such as `{"severity": "moderate"}`.
    `confidence` is a detector's, 0 to 1, where `origin` is "model". `where` is `path:line` of the annotation.
    """

    finding_id: str
    label: str
    shape: Shape
    parts: tuple[Ring, ...] = ()
    tooth: str | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)
    origin: Origin = "human"
    confidence: float | None = None
    where: str = ""

    @property
    def bounds(self) -> Bounds | None:
        """Left, top, right, bottom in fractions of the image, or `None` for a label without geometry."""
        points = [point for ring in self.parts for point in ring]
        if not points:
            return None
        xs, ys = zip(*points, strict=True)
        return min(xs), min(ys), max(xs), max(ys)


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image and what its annotations say; a field that is not measured yet is `None`.

    A reader fills `path`, `modality`, `source`, `declared_split`, `exhaustive`, `findings`, `ignored`, `rejected` and
    `locations`. `image_id` (SHA-256 of the pixels), `width` and `height` (pixels, as displayed) are measured from the
    file, `group_id` is given by `data_builders.splits`. `exhaustive` names the labels whose absence may be stated; a
    reader empties it when a line of this image could not be read, since the line may have held such a label. `ignored`
    are the raw labels of annotations whose class is mapped to null, `rejected` the labels of those whose shape could
    not be used. `locations` is false where places mean nothing: in a flipped image, in a mosaic.
    """

    path: Path
    image_id: str | None
    width: int | None
    height: int | None
    modality: Modality
    source: str
    group_id: str | None
    declared_split: Split | None
    exhaustive: tuple[str, ...]
    findings: tuple[Finding, ...]
    ignored: tuple[str, ...] = ()
    rejected: tuple[str, ...] = ()
    locations: bool = True


# A frozen dataclass calls `object.__setattr__` for each of its fields, which takes two thirds of its making.
# What readers make, which may be millions, has the same slots, is filled while they may be, and then becomes the class.
_UnfrozenFinding = make_dataclass("_UnfrozenFinding", Finding.__slots__, slots=True)
_UnfrozenRecord = make_dataclass("_UnfrozenRecord", ImageRecord.__slots__, slots=True)


def make_finding(*fields: Any) -> Finding:
    """A `Finding` of all its fields in their order, in a third of the time that its constructor takes."""
    made = _UnfrozenFinding(*fields)
    made.__class__ = Finding
    return made


def make_record(*fields: Any) -> ImageRecord:
    """An `ImageRecord` of all its fields in their order, in a third of the time that its constructor takes."""
    made = _UnfrozenRecord(*fields)
    made.__class__ = ImageRecord
    return made


def record_from_json(document: Mapping) -> ImageRecord:
    """A record as a line of a dataset folder's `records.jsonl` holds it; the path of its image is not kept there."""
    findings = tuple(
        Finding(
            **{key: finding[key] for key in ("finding_id", "label", "shape", "tooth", "origin", "confidence")},
            parts=tuple(tuple((x, y) for x, y in ring) for ring in finding["parts"]),
            attributes=finding["attributes"],
        )
        for finding in document["findings"]
    )
    known = ("image_id", "width", "height", "modality", "source", "group_id", "locations")
    return ImageRecord(
        path=Path(),
        declared_split=None,
        exhaustive=tuple(document["exhaustive"]),
        findings=findings,
        **{key: document[key] for key in known},
    )


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in an input that could not be used as it stands; `line` is a line number or a JSON pointer."""

    code: str
    severity: Severity
    path: Path
    line: int | str | None
    message: str

    def __str__(self) -> str:
        return f"{place(self.path, self.line)}: {self.message}"


def place(path: Path, line: int | str | None) -> str:
    """`path:line`, which an editor can open."""
    return f"{path}" if line is None else f"{path}:{line}"
