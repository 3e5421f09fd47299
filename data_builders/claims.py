"""What a text states about an image: structured claims, and how they are drawn from the findings of a record."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from data_builders.dentition import (
    JAWS,
    QUADRANTS,
    arch_middle,
    finding_quadrant,
    finding_region,
    finding_side,
    is_fdi,
    tooth_type,
)
from data_builders.records import Finding, ImageRecord

SCHEMA_VERSION = 2
IMAGE = "image"  # the label of a claim about the picture itself
SEVERITY = "severity"  # the attribute of a finding that grades it


@dataclass(frozen=True, slots=True)
class Claim:
    """One statement: that `count` findings of `label` are there, or (`negated`) that there is none.

    `region` narrows it to a region, jaw or quadrant of a panoramic, `side` to the patient's side, `tooth` to an FDI
    number or a tooth type. `count` is `None` where the text says only that there is at least one. `severity` is the
    grade that the annotation gives. `undetermined` names what the image cannot tell of the finding (`side`,
    `severity`). `hedged` says that a detector found it and no human did. `annotations` are the ids of the findings
    behind it, in the order of the annotation file; a negated claim has none and rests on the source's exhaustive
    labels. A claim with the label `image` states the picture's `modality`.
    """

    __pydantic_config__: ClassVar = ConfigDict(strict=True, extra="forbid")
    label: str
    count: int | None = None
    region: str | None = None
    side: str | None = None
    tooth: str | None = None
    negated: bool = False
    severity: str | None = None
    undetermined: str | None = None
    hedged: bool = False
    modality: str | None = None
    annotations: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Placed:
    """A finding and where it lies; all `None` where the image allows no places (a photograph, a mosaic)."""

    finding: Finding
    region: str | None = None
    side: str | None = None
    quadrant: str | None = None


def place_findings(record: ImageRecord) -> tuple[Placed, ...]:
    """Give each finding its places; only panoramics have any, and none whose places mean nothing."""
    if not has_places(record):
        return tuple(Placed(finding) for finding in record.findings)
    middle = arch_middle(record.findings)
    return tuple(
        Placed(finding, finding_region(finding, middle), finding_side(finding), finding_quadrant(finding, middle))
        for finding in record.findings
    )


def has_places(record: ImageRecord) -> bool:
    """Whether sides and regions may be named: intraoral photographs may be mirrored and show any view."""
    return record.modality == "panoramic" and record.locations


def claims_to_json(claims: Iterable[Claim], history: Iterable[Iterable[Claim]] = ()) -> str:
    """Canonical JSON with `schema_version`: the `claims` column of a dataset; `history` of a dialogue's earlier turns.

    Fields that state nothing are left out.
    """
    document: dict = {"schema_version": SCHEMA_VERSION, "claims": [_stated(claim) for claim in claims]}
    if turns := [[_stated(claim) for claim in turn] for turn in history]:
        document["history"] = turns
    return json.dumps(document, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _stated(claim: Claim) -> dict:
    values = {field.name: getattr(claim, field.name) for field in fields(claim)}
    return {name: value for name, value in values.items() if value not in (None, False, ())}


@dataclass(frozen=True, slots=True)
class ClaimsDocument:
    """The `claims` column: what the completion of a row states, and what a dialogue's earlier answers did."""

    __pydantic_config__: ClassVar = ConfigDict(strict=True, extra="forbid")
    schema_version: Literal[2]
    claims: tuple[Claim, ...]
    history: tuple[tuple[Claim, ...], ...] = ()


_DOCUMENT = TypeAdapter(ClaimsDocument)


def read_claims(text: str) -> ClaimsDocument:
    """Read the `claims` column back.

    Raises:
        ValueError: when it was written by another schema version, or is not of this form.
    """
    try:
        return _DOCUMENT.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{place}: {first['msg']}, found {first['input']!r}"[:300]) from None


def claims_from_json(text: str) -> tuple[Claim, ...]:
    """What the completion of a row states; raises as `read_claims` does."""
    return read_claims(text).claims


def claim_present(
    label: str,
    placed: Iterable[Placed],
    *,
    region: str | None = None,
    tooth: str | None = None,
    counted: bool = True,
) -> Claim:
    """The claim that findings of `label` (in a region, of a tooth) are there, with the annotations behind it."""
    behind = [
        item.finding
        for item in placed
        if item.finding.label == label
        and (region is None or lies_in(item, region))
        and (tooth is None or _is_tooth(item.finding, tooth))
    ]
    return Claim(
        label,
        count_findings(behind) if counted else None,
        region,
        tooth=tooth,
        hedged=any(finding.origin == "model" for finding in behind),
        annotations=tuple(finding.finding_id for finding in behind),
    )


def lies_in(item: Placed, region: str) -> bool:
    """Whether a finding lies in a region, a jaw or a quadrant."""
    if region in QUADRANTS:
        return item.quadrant == region
    if region in JAWS:
        return item.region is not None and item.region.endswith(region)
    return item.region == region


def _is_tooth(finding: Finding, tooth: str) -> bool:
    if finding.tooth is None:
        return False
    return tooth == (finding.tooth if is_fdi(tooth) else type_or_none(finding.tooth))


def type_or_none(tooth: str) -> str | None:
    """The tooth type behind a number or type name; `None` for a deciduous molar."""
    try:
        return tooth_type(tooth)
    except ValueError:
        return None


def count_findings(findings: Iterable[Finding]) -> int:
    """How many there are: two boxes on one FDI number are one tooth, everything else counts by annotation."""
    numbered = {
        (finding.label, finding.tooth)
        if finding.label == "tooth" and finding.tooth and is_fdi(finding.tooth)
        else finding.finding_id
        for finding in findings
    }
    return len(numbered)
