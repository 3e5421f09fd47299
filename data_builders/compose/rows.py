"""Rows of an image: what is asked of it, proven; and which rows stay, so that no answer is had from its question."""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from data_builders.chat import SYSTEM_PROMPT, Message, Row, answer_messages, prompt_messages
from data_builders.claims import claims_to_json
from data_builders.compose.questions import DIALOGUE, FAMILIES, compose_pairs
from data_builders.compose.scene import Pair
from data_builders.proof import check_row
from data_builders.records import ImageRecord, InputError
from data_builders.sources import Source, SourcesFile

Drafted = tuple[Row, Pair]


class ProofError(InputError):
    """A row that its annotations do not carry: a phrase that says something else than its claims, or our own bug."""


@dataclass(frozen=True)
class Balanced:
    """The rows that stay, how many of each question type were left out, and what is left to be guessed.

    `baselines` is, for each question type, the share of rows that somebody gets right who sees no image and gives the
    most frequent answer to each question.
    """

    rows: list[Row]
    dropped: Mapping[str, int]
    baselines: Mapping[str, float]


def compose_rows(
    record: ImageRecord,
    source: Source,
    sources_file: SourcesFile,
    seed: int,
    shown_elsewhere: Collection[str] = (),
) -> Iterator[Drafted]:
    """Yield the rows of an image in every language of the sources file, each of them proven.

    Raises:
        ProofError: when claims do not hold in the annotations or the words do not say what the claims say.
    """
    vocabulary, questions = sources_file.terms(), sources_file.questions
    families = [name for name in sources_file.families or (*FAMILIES, DIALOGUE) if questions.weights.get(name, 1.0) > 0]
    for language in sources_file.languages:
        pairs = list(
            compose_pairs(
                record,
                vocabulary=vocabulary,
                language=language,
                seed=seed,
                shown_elsewhere=shown_elsewhere,
                families=families,
            )
        )
        wanted = source.questions_per_image or questions.per_image
        for pair in _draw(pairs, wanted, questions.weights, f"{seed}/{record.source}/{record.image_id}"):
            row = _row(pair, record, source, language, sources_file.system_prompt)
            if wrong := check_row(row, record, vocabulary):
                raise ProofError(
                    f"{record.path}: {pair.question_type} in {language}, {pair.question!r}: {'; '.join(wrong)}. "
                    "Was a phrase or the vocabulary changed? "
                    f"What can be read is in data_builders/lexicon/{language}.yaml"
                )
            yield row, pair


def _draw(pairs: Sequence[Pair], wanted: int | None, weights: Mapping[str, float], key: str) -> Sequence[Pair]:
    """Draw pairs by the weight of their family, without replacement; the same ones in every language.

    The key of Efraimidis and Spirakis (2006): the largest u^(1/w) are a weighted sample.
    """
    if wanted is None or len(pairs) <= wanted:
        return pairs
    rng = random.Random(key)
    # A family's weight is shared by its pairs, so that six yes/no questions do not outnumber one report.
    sizes = Counter(_family(pair) for pair in pairs)
    ranks = [rng.random() ** (sizes[_family(pair)] / weights.get(_family(pair), 1.0)) for pair in pairs]
    chosen = sorted(range(len(pairs)), key=lambda number: -ranks[number])[:wanted]
    return [pairs[number] for number in sorted(chosen)]


def _family(pair: Pair) -> str:
    return pair.question_type.removesuffix("_location")


def _row(pair: Pair, record: ImageRecord, source: Source, language: str, system_prompt: str | None) -> Row:
    assert record.image_id and record.group_id
    claims = claims_to_json(pair.claims, [turn.claims for turn in pair.history])
    key = "/".join((record.source, record.image_id, language, pair.question_type, claims))
    first, *later = [*pair.history, pair]
    prompt = prompt_messages(first.question, SYSTEM_PROMPT if system_prompt is None else system_prompt)
    for before, turn in zip(pair.history, later, strict=True):
        prompt += [*answer_messages(before.answer), Message(role="user", content=turn.question)]
    return Row(
        images=[record.image_id],
        prompt=prompt,
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


def balance(items: Sequence[Drafted], *, cap: float = 0.5) -> Balanced:
    """Leave out rows until no question can be answered without its image.

    "Yes" and "no" are made equally many for every condition of a source and language; of every other question no answer
    keeps more than the share `cap` of the rows, and one that always has the same answer goes. Which rows stay is
    decided by what they state, the same in every language. With `cap` 1 only the yes/no questions are balanced.
    """
    by_question: dict[tuple, dict[object, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row, pair in items:
        question = (row["question_type"], row["language"], pair.asks)
        if pair.verdict is None:
            by_question[question][pair.answer_key].append(row)
        else:
            by_question[*question, row["source"]][pair.verdict].append(row)
    kept: list[Row] = []
    guessed: Counter[str] = Counter()
    for question, answers in by_question.items():
        if verdicts := answers.keys() & {True, False}:
            most = min(len(rows) for rows in answers.values()) if len(verdicts) == 2 else 0
        else:
            most = _most_of_one([len(rows) for rows in answers.values()], cap)
        for rows in answers.values():
            kept += sorted(rows, key=_order)[:most]
        guessed[question[0]] += min(most, max(map(len, answers.values())))
    asked = Counter(row["question_type"] for row, _ in items)
    left = Counter(row["question_type"] for row in kept)
    return Balanced(
        kept,
        {name: asked[name] - left[name] for name in sorted(asked) if asked[name] > left[name]},
        {name: guessed[name] / left[name] for name in sorted(left)},
    )


def _order(row: Row) -> str:
    """A seemingly random order of rows which does not depend on the language, so that each language keeps the same."""
    key = "/".join((row["source"], row["image_id"] or "", row["question_type"], row["claims"]))
    return hashlib.sha256(key.encode()).hexdigest()


def _most_of_one(counts: Iterable[int], cap: float) -> int:
    """The largest number of rows with one answer that is at most the share `cap` of what is then kept."""
    counts = sorted(counts)
    most = counts[-1]
    while most and most > cap * sum(min(count, most) for count in counts) + 1e-9:
        most -= 1
    return most
