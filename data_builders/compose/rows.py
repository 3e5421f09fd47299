"""Rows of an image: what is asked of it, proven; and which rows stay, so that no answer is had from its question."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence

from data_builders.chat import SYSTEM_PROMPT, Row, answer_messages, prompt_messages
from data_builders.claims import check_claims, claims_to_json, place_findings
from data_builders.compose.questions import FAMILIES, Pair, compose_pairs
from data_builders.dataset_folder import BuildError
from data_builders.records import ImageRecord
from data_builders.sources import Source, SourcesFile


def compose_rows(
    record: ImageRecord, source: Source, sources_file: SourcesFile, seed: int, shown_elsewhere: Collection[str]
) -> Iterator[tuple[Row, Pair]]:
    """Yield the rows of an image; one whose claims the annotations do not carry is our own bug and stops the build."""
    placed = place_findings(record)
    for language in sources_file.languages:
        for pair in compose_pairs(
            record,
            vocabulary=sources_file.terms(),
            language=language,
            seed=seed,
            shown_elsewhere=shown_elsewhere,
            families=sources_file.families or tuple(FAMILIES),
        ):
            wrong = check_claims(pair.claims, placed, record.exhaustive)
            if wrong:
                raise BuildError(f"{record.path}: {pair.question_type}: {'; '.join(wrong)}")
            yield _row(pair, record, source, language, sources_file.system_prompt), pair


def _row(pair: Pair, record: ImageRecord, source: Source, language: str, system_prompt: str | None) -> Row:
    assert record.image_id and record.group_id
    claims = claims_to_json(pair.claims)
    key = "/".join((record.source, record.image_id, language, pair.question_type, claims))
    return Row(
        images=[record.image_id],
        prompt=prompt_messages(pair.question, SYSTEM_PROMPT if system_prompt is None else system_prompt),
        completion=answer_messages(pair.answer),
        row_id=hashlib.sha256(key.encode()).hexdigest()[:16],
        image_id=record.image_id,
        group_id=record.group_id,
        source=record.source,
        license=source.license,
        language=language,
        question_type=pair.question_type,
        claims=claims,
    )


def balance(items: Sequence[tuple[Row, Pair]]) -> list[Row]:
    """As many "yes" as "no" for every condition of a source and language; which stay is decided by the row's id."""
    verdicts: dict[tuple, dict[bool, list[Row]]] = defaultdict(lambda: {True: [], False: []})
    kept = []
    for row, pair in items:
        if pair.verdict is None:
            kept.append(row)
        else:
            verdicts[row["source"], row["language"], pair.asks][pair.verdict].append(row)
    for answers in verdicts.values():
        number = min(len(answers[True]), len(answers[False]))
        for rows in answers.values():
            kept += sorted(rows, key=lambda row: row["row_id"])[:number]
    return kept
