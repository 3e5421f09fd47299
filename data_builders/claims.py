"""What a text states about an image: structured claims, and the proof that the annotations carry them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from data_builders.dentition import arch_middle, finding_region, is_fdi, tooth_type
from data_builders.records import Finding, ImageRecord

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Claim:
    """One statement: that `count` findings of `label` are there, or (`negated`) that there is none.

    `region` narrows it to one region of a panoramic, `tooth` to an FDI number or a tooth type. `count` is `None`
    where the text says only that there is at least one. `annotations` are the ids of the findings behind it, in the
    order of the annotation file; a negated claim has none and rests on the source's exhaustive labels.
    """

    label: str
    count: int | None = None
    region: str | None = None
    tooth: str | None = None
    negated: bool = False
    annotations: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Placed:
    """A finding and the region it lies in; `None` where the image allows no places (a photograph, a mosaic)."""

    finding: Finding
    region: str | None


def place_findings(record: ImageRecord) -> tuple[Placed, ...]:
    """Give each finding its region; only panoramics have regions, and none whose places mean nothing."""
    if record.modality != "panoramic" or not record.locations:
        return tuple(Placed(finding, None) for finding in record.findings)
    middle = arch_middle(record.findings)
    return tuple(Placed(finding, finding_region(finding, middle)) for finding in record.findings)


def claims_to_json(claims: Iterable[Claim]) -> str:
    """Canonical JSON with `schema_version`: the `claims` column of a dataset."""
    document = {"schema_version": SCHEMA_VERSION, "claims": [asdict(claim) for claim in claims]}
    return json.dumps(document, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def claims_from_json(text: str) -> tuple[Claim, ...]:
    """Read the `claims` column back.

    Raises:
        ValueError: when it was written by another schema version.
    """
    document = json.loads(text)
    if document.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"claims of schema version {document.get('schema_version')}, expected {SCHEMA_VERSION}")
    return tuple(Claim(**{**claim, "annotations": tuple(claim["annotations"])}) for claim in document["claims"])


def check_claims(claims: Iterable[Claim], placed: Sequence[Placed], exhaustive: Iterable[str]) -> list[str]:
    """Derive every claim again from the findings; return what does not hold, in words. Empty means proven."""
    exhaustive = set(exhaustive)
    wrong = []
    for claim in claims:
        behind = [item.finding.finding_id for item in placed if _is_about(claim, item)]
        if claim.negated:
            if behind:
                wrong.append(f"{claim} denies what {', '.join(behind)} show")
            if claim.label not in exhaustive:
                wrong.append(f"{claim}: the absence of {claim.label} may not be stated, it is not exhaustive")
        elif tuple(behind) != claim.annotations:
            wrong.append(f"{claim} rests on {', '.join(behind) or 'nothing'}")
        elif claim.count is None and not behind:
            wrong.append(f"{claim} rests on nothing")
        elif claim.count is not None and claim.count != _count(claim, placed):
            wrong.append(f"{claim}: there are {_count(claim, placed)}")
    return wrong


def claim_present(
    label: str,
    placed: Iterable[Placed],
    *,
    region: str | None = None,
    tooth: str | None = None,
    counted: bool = True,
) -> Claim:
    """The claim that findings of `label` (in a region, of a tooth) are there, with the annotations behind it."""
    wanted = Claim(label, region=region, tooth=tooth)
    behind = [item for item in placed if _is_about(wanted, item)]
    count = _count(wanted, behind) if counted else None
    return Claim(label, count, region, tooth, annotations=tuple(item.finding.finding_id for item in behind))


def _is_about(claim: Claim, item: Placed) -> bool:
    finding = item.finding
    if finding.label != claim.label or (claim.region is not None and item.region != claim.region):
        return False
    if claim.tooth is None:
        return True
    if finding.tooth is None:
        return False
    return claim.tooth == (finding.tooth if is_fdi(claim.tooth) else _type_or_none(finding.tooth))


def _type_or_none(tooth: str) -> str | None:
    try:
        return tooth_type(tooth)
    except ValueError:
        return None


def _count(claim: Claim, placed: Iterable[Placed]) -> int:
    """How many there are: two boxes on one FDI number are one tooth, everything else counts by annotation."""
    teeth = Counter()
    for item in placed:
        if _is_about(claim, item):
            tooth = item.finding.tooth
            numbered = item.finding.label == "tooth" and tooth is not None and is_fdi(tooth)
            teeth[tooth if numbered else item.finding.finding_id] += 1
    return len(teeth)
