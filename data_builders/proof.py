"""The proof of a row: its claims hold in the annotations, and its words say what its claims say, no more and no less.

Claims are derived again from the findings, and texts are read back by `data_builders.reading`: of what composes rows
only the rules of anatomy (`data_builders.dentition`) and the names of the vocabulary are shared. The checker sees a row
and the record of its image, as a dataset folder holds them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pyarrow.parquet as pq

from data_builders.chat import make_row_id
from data_builders.claims import IMAGE, SEVERITY, Claim, read_claims
from data_builders.dentition import (
    JAWS,
    QUADRANTS,
    THIRD_MOLARS,
    arch_middle,
    finding_quadrant,
    finding_region,
    finding_side,
    is_fdi,
    tooth_type,
)
from data_builders.parts import Part, find_parts, find_vocabulary
from data_builders.reading import Reading, Statement, read_text
from data_builders.records import Finding, ImageRecord, InputError, record_from_json
from data_builders.sources import Language, Vocabulary


def check_row(row: Mapping, record: ImageRecord, vocabulary: Vocabulary) -> list[str]:
    """What is wrong with a row, in words; empty means proven.

    Every turn of a dialogue is checked, the earlier answers too: they stand in the prompt.
    """
    try:
        document = read_claims(row["claims"] or "")
    except ValueError as error:
        return [f"the claims cannot be read: {error}"]
    messages = [*row["prompt"], *row["completion"]]
    if any(not isinstance(message["content"], str) for message in messages):
        return ["a turn has no text"]
    if messages[0]["role"] == "system":
        messages = messages[1:]
    roles = [message["role"] for message in messages]
    stated = [*document.history, document.claims]
    if roles != ["user", "assistant"] * len(stated) or len(row["completion"]) != 1:
        return [f"the turns are {', '.join(roles)}, the claims are of {len(stated)} turns"]
    if row["language"] not in get_args(Language):
        return [f"the language is {row['language']!r}"]
    wrong: list[str] = []
    subject: frozenset[str] = frozenset()
    for number, claims in enumerate(stated):
        question, answer = (message["content"] for message in messages[2 * number : 2 * number + 2])
        kind = row["question_type"] if number == len(document.history) else "dialogue"
        wrong += check_claims(claims, record)
        wrong += _check_scope(kind, claims, record, vocabulary)
        wrong += check_text(
            question, answer, claims, record, row["language"], vocabulary, subject=subject, question_type=kind
        )
        subject = frozenset(claim.label for claim in claims)
    return wrong


def check_claims(claims: Iterable[Claim], record: ImageRecord) -> list[str]:
    """Derive every claim again from the findings; return what does not hold, in words."""
    claims = tuple(claims)
    if not claims or len(set(claims)) < len(claims):
        return ["the answer states nothing, or something twice"]
    middle = arch_middle(record.findings) if any(claim.region for claim in claims) else 0.5
    return [problem for claim in claims for problem in _check_claim(claim, record, middle)]


def _check_claim(claim: Claim, record: ImageRecord, middle: float) -> Iterator[str]:
    if claim.label == IMAGE:
        if claim != Claim(IMAGE, modality=record.modality):
            yield f"{claim}: the image is {record.modality}"
        return
    if claim.modality:
        yield f"{claim}: only a claim about the image has a modality"
    if (claim.region or claim.side or is_fdi(claim.tooth or "")) and not _has_places(record):
        yield f"{claim}: nothing has a place in this image, and a tooth number names one"
        return
    behind = [finding for finding in record.findings if _may_show(finding, claim, middle)]
    if claim.negated:
        if behind:
            yield f"{claim} denies what {', '.join(finding.finding_id for finding in behind)} may show"
        if claim.label not in record.exhaustive:
            yield f"{claim}: the absence of {claim.label} may not be stated, it is not annotated exhaustively"
        if claim.annotations or claim.count is not None or claim.hedged:
            yield f"{claim}: a denial rests on no annotation and counts nothing"
        return
    if not behind:
        yield f"{claim} rests on nothing"
    if tuple(finding.finding_id for finding in behind) != claim.annotations:
        yield f"{claim} rests on {', '.join(finding.finding_id for finding in behind)}"
    if claim.count is not None and claim.count != _number_of(behind):
        yield f"{claim}: there are {_number_of(behind)}"
    if claim.hedged != any(finding.origin == "model" for finding in behind):
        yield f"{claim}: a detector's finding is a possible one, a human's is not"
    grades = {finding.attributes.get(SEVERITY, "").strip().casefold() for finding in behind}
    if claim.severity is not None and grades != {claim.severity}:
        yield f"{claim}: the annotation grades {', '.join(sorted(grades)) or 'nothing'}"
    if claim.undetermined == "side" and record.modality != "intraoral_photo":
        yield f"{claim}: only a photograph may be mirrored"
    if claim.undetermined == SEVERITY and grades != {""}:
        yield f"{claim}: the annotation grades it"


def _has_places(record: ImageRecord) -> bool:
    return record.modality == "panoramic" and record.locations


def _may_show(finding: Finding, claim: Claim, middle: float) -> bool:
    """Whether a finding is what a claim is about; for a denial whether it could be, as far as the record tells.

    `middle` is the height of the line between the jaws.
    """
    if claim.negated and claim.label == "tooth" and claim.tooth:
        return finding.tooth is None or _is_tooth(finding, claim.tooth)  # a disease on a tooth shows the tooth too
    if finding.label != claim.label:
        return False
    if claim.tooth is not None and not _is_tooth(finding, claim.tooth):
        return claim.negated and finding.tooth is None
    side, quadrant = finding_side(finding), finding_quadrant(finding, middle)
    region = finding_region(finding, middle)
    if claim.negated:
        return _may_lie(claim, side, quadrant, region)
    return (claim.side is None or side == claim.side) and (
        claim.region is None
        or claim.region in (region, quadrant)
        or (claim.region in JAWS and (region or "").endswith(claim.region))
    )


def _may_lie(claim: Claim, side: str | None, quadrant: str | None, region: str | None) -> bool:
    """Whether something may lie in the place of a denial: it has no place, or one that overlaps or is not sure."""
    if claim.side is not None and side not in (claim.side, "midline", "bilateral", None):
        return False
    if claim.region is None or region is None:
        return True
    jaw = region.rpartition("_")[2]
    if claim.region in QUADRANTS:
        return jaw == JAWS[not claim.region.startswith("upper")] and quadrant in (claim.region, None)
    if claim.region in JAWS:
        return jaw == claim.region
    return region in (claim.region, f"bilateral_{claim.region.rpartition('_')[2]}")


def _is_tooth(finding: Finding, tooth: str) -> bool:
    if finding.tooth is None or is_fdi(tooth):
        return finding.tooth == tooth
    try:
        return tooth_type(finding.tooth) == tooth
    except ValueError:  # a deciduous molar
        return False


def _number_of(findings: Sequence[Finding]) -> int:
    """Two boxes on one tooth number are one tooth; everything else counts by annotation."""
    teeth = {finding.tooth for finding in findings if finding.label == "tooth" and is_fdi(finding.tooth or "")}
    others = [f for f in findings if not (f.label == "tooth" and is_fdi(f.tooth or ""))]
    return len(teeth) + len(others)


def check_text(
    question: str,
    answer: str,
    claims: Sequence[Claim],
    record: ImageRecord,
    language: Language,
    vocabulary: Vocabulary,
    *,
    subject: frozenset[str] = frozenset(),
    question_type: str = "",
) -> list[str]:
    """Compare what the words say with the claims, both ways; `subject` is what the turn before was about."""
    asked, said = read_text(question, language, vocabulary, question=True), read_text(answer, language, vocabulary)
    context = frozenset(label for labels in asked.labels for label in labels) or subject
    wrong = [*_check_image(asked, record), *_check_image(said, record)]
    wrong += _check_question(asked, claims, question_type)
    wrong += _check_verdict(said, claims, question_type)
    wrong += _check_guidance(said.guidance, claims, record, language, vocabulary, question_type)
    statements = [statement for statement in said.statements if not is_introduction(statement)]
    about_findings = [claim for claim in claims if claim.label != IMAGE]
    for statement in statements:
        if not any(agree(statement, claim, context) for claim in about_findings):
            wrong.append(f"the answer {answer!r} says {_describe(statement)}, which no claim does")
    for claim in about_findings:
        if not any(agree(statement, claim, context) for statement in statements):
            wrong.append(f"the answer {answer!r} does not say {claim}")
    for claim in claims:
        if claim.label == IMAGE and frozenset([claim.modality]) not in said.modalities:
            wrong.append(f"the answer {answer!r} does not say that the image is {claim.modality}")
    if said.only_third_molars and not _only_third_molars(claims):
        wrong.append(f"the answer {answer!r} speaks of third molars only, and others are absent")
    return wrong


def _check_image(reading: Reading, record: ImageRecord) -> Iterator[str]:
    """The kind of picture that a text names, and whether it may speak of places."""
    if reading.unknown:
        yield f"nobody knows what {', '.join(map(repr, reading.unknown))} says"
    for modalities in reading.modalities:
        if record.modality not in modalities:
            yield f"the text calls the image {' or '.join(sorted(modalities))}, it is {record.modality}"
    if reading.words_of_place and not _has_places(record):
        yield f"the text names a place ({', '.join(reading.words_of_place)}) in an image that has none"


def _check_question(asked: Reading, claims: Sequence[Claim], question_type: str) -> Iterator[str]:
    """What a question is about is what its answer is about, and it states nothing itself."""
    mentioned = {label for labels in asked.labels for label in labels}
    stated = {claim.label for claim in claims}
    if mentioned and not stated <= mentioned:
        yield f"the question is about {', '.join(sorted(mentioned))}, the answer about {', '.join(sorted(stated))}"
    for labels in asked.labels:
        if stated.isdisjoint(labels):
            yield f"the question asks about {' or '.join(sorted(labels))}, the answer does not speak of it"
    places, regions = set(asked.words_of_place), {claim.region for claim in claims}
    if question_type in NAME_THEIR_PLACE and places != regions:
        yield f"the question is about {sorted(places)}, the answer about {sorted(map(str, regions))}"
    if question_type not in NAME_THEIR_PLACE and places:
        yield f"the question names {sorted(places)}, which is for the answer to tell"
    for statement in asked.statements:
        if statement.negated or statement.severity or statement.tooth or statement.count not in (None, 1):
            yield f"the question itself states {_describe(statement)}"
    if asked.guidance is not None:
        yield "the question holds general guidance"


NAME_THEIR_PLACE = ("region", "comparison")


def _check_verdict(said: Reading, claims: Sequence[Claim], question_type: str) -> Iterator[str]:
    """A yes is borne by what humans marked, a maybe by a detector alone, a no by nothing that is there."""
    right = {
        "yes": not any(claim.negated or claim.hedged for claim in claims),
        "maybe": all(claim.hedged for claim in claims),
        "no": all(claim.negated for claim in claims),
        None: question_type not in ("presence", "healthy_or_abnormal"),
    }
    if not right[said.verdict]:
        yield f"the answer begins with {said.verdict or 'no verdict'}, which the claims do not bear out"


def _check_guidance(
    guidance: str | None,
    claims: Sequence[Claim],
    record: ImageRecord,
    language: Language,
    vocabulary: Vocabulary,
    question_type: str,
) -> Iterator[str]:
    """General guidance comes word for word from the vocabulary: on the one finding that is stated, as asked for."""
    advice = None
    if len(claims) == 1 and not claims[0].negated and claims[0].label in vocabulary:
        advice = vocabulary[claims[0].label].advice(question_type, language)
    if guidance != (None if advice is None else advice.casefold()):
        yield f"the guidance is {guidance!r}, the vocabulary's is {advice!r}"
    if guidance is not None:
        read = read_text(guidance, language, vocabulary)
        if read.words_of_place or any(record.modality not in modalities for modalities in read.modalities):
            yield f"the guidance {guidance!r} names a place or another kind of image"


def _check_scope(
    question_type: str, claims: Sequence[Claim], record: ImageRecord, vocabulary: Vocabulary
) -> Iterator[str]:
    """What claims to name all that is there leaves out no disease."""
    if question_type not in ("findings", "findings_location", "structured_report", "region"):
        return
    named = {finding_id for claim in claims for finding_id in claim.annotations}
    middle = arch_middle(record.findings)
    regions = {str(claim.region) for claim in claims}
    covered = regions | {f"bilateral_{region.rpartition('_')[2]}" for region in regions}
    for finding in record.findings:
        region = finding_region(finding, middle)
        in_scope = question_type != "region" or region in covered
        if vocabulary[finding.label].kind == "pathology" and in_scope and finding.finding_id not in named:
            yield f"the answer leaves out {finding.finding_id} ({finding.label})"


def is_introduction(statement: Statement) -> bool:
    """`These teeth can be identified: …` counts nothing and denies nothing."""
    return statement in (Statement(labels=statement.labels),) and "tooth" in statement.labels


def agree(statement: Statement, claim: Claim, context: frozenset[str]) -> bool:
    """Whether a statement says what a claim does; `context` is what it speaks of where it names no finding."""
    labels = statement.labels or context or (frozenset(["tooth"]) if statement.tooth else context)
    if labels and claim.label not in labels:
        return False
    one_at_least = claim.count in (None, 1) and statement.count in (None, 1)  # "an impacted tooth", "caries"
    return (
        (statement.count == claim.count or one_at_least)
        and (statement.hedged == claim.hedged or not statement.labels)
        and all(getattr(statement, name) == getattr(claim, name) for name in COMPARED)
    )


COMPARED = ("region", "side", "tooth", "negated", "severity", "undetermined")


def _describe(statement: Statement) -> str:
    stated = {name: getattr(statement, name) for name in ("labels", "count", "hedged", *COMPARED)}
    stated["labels"] = " or ".join(sorted(statement.labels))
    return ", ".join(f"{name} {value}" for name, value in stated.items() if value not in (None, False, ""))


def _only_third_molars(claims: Sequence[Claim]) -> bool:
    absent = {claim.tooth for claim in claims if claim.negated}
    return bool(absent) and absent <= set(THIRD_MOLARS)


def check_dataset(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Prove every row of a dataset folder again from what stands in it; yield each row id with what is wrong.

    A folder with one configuration per source, as `push` makes of mixed terms, is proven whole, and so is one of these
    configurations.

    Raises:
        InputError: at once, when the folder is no VQA dataset folder.
    """
    parts = find_parts(folder)
    if not parts:
        raise InputError(f"{folder} is no VQA dataset folder; build one with `dentalgemma build`")
    return _check_parts(parts, find_vocabulary(folder))


def _check_parts(parts: Sequence[Part], vocabulary: Vocabulary) -> Iterator[tuple[str, list[str]]]:
    columns = ["row_id", "image_id", "source", "language", "question_type", "prompt", "completion", "claims"]
    seen: set[str] = set()
    for part in parts:
        records = {(record.source, record.image_id): record for record in _read_records(part.records)}
        for row in (row for shard in part.shards for batch in _read_shard(shard, columns) for row in batch):
            record = records.get((row["source"], row["image_id"]))
            wrong = check_row(row, record, vocabulary) if record else [f"{part.records.name} lacks its image"]
            if row["row_id"] != make_row_id(row):
                wrong.append("source, image, language, type or claims are not those that its id was made from")
            if row["row_id"] in seen:
                wrong.append("is there twice")
            seen.add(row["row_id"])
            yield row["row_id"], wrong


def _read_records(path: Path) -> Iterator[ImageRecord]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield record_from_json(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path}:{number}: is no record of an image: {error}") from None


def _read_shard(path: Path, columns: list[str]) -> Iterator[list[dict]]:
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024, columns=columns):
            yield batch.to_pylist()
    except pa.ArrowException as error:
        raise InputError(f"{path}: cannot be read as rows of a dataset: {error}") from None
