"""Rows of an image: what is asked of it, proven; and which rows stay, so that no answer is had from its question."""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from data_builders.chat import SYSTEM_PROMPT, Message, Row, answer_messages, make_row_id, prompt_messages
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
class Chosen:
    """The rows that stay in a split, how many of each question type the balance cost, and what is left to be guessed.

    `baselines` is, for each question type, the share of rows that somebody gets right who sees no image and gives to
    each question the answer that is its most frequent one in the whole data set.
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
        pairs = compose_pairs(
            record,
            vocabulary=vocabulary,
            language=language,
            seed=seed,
            shown_elsewhere=shown_elsewhere,
            families=families,
        )
        for pair in pairs:
            row = _row(pair, record, source, language, sources_file.system_prompt)
            if wrong := check_row(row, record, vocabulary):
                raise ProofError(
                    f"{record.path}: {pair.question_type} in {language}, {pair.question!r}: {'; '.join(wrong)}. "
                    "Was a phrase or the vocabulary changed? "
                    f"What can be read is in data_builders/lexicon/{language}.yaml"
                )
            yield row, pair


def _row(pair: Pair, record: ImageRecord, source: Source, language: str, system_prompt: str | None) -> Row:
    assert record.image_id and record.group_id
    claims = claims_to_json(pair.claims, [turn.claims for turn in pair.history])
    first, *later = [*pair.history, pair]
    prompt = prompt_messages(first.question, SYSTEM_PROMPT if system_prompt is None else system_prompt)
    for before, turn in zip(pair.history, later, strict=True):
        prompt += [*answer_messages(before.answer), Message(role="user", content=turn.question)]
    row = Row(
        images=[record.image_id],
        prompt=prompt,
        completion=answer_messages(pair.answer),
        row_id="",
        image_id=record.image_id,
        group_id=record.group_id,
        source=record.source,
        license=source.license,
        language=language,
        question_type=pair.question_type,
        claims=claims,
    )
    row["row_id"] = make_row_id(row)
    return row


def choose_rows(splits: Mapping[str, Sequence[Drafted]], sources_file: SourcesFile, *, seed: int) -> dict[str, Chosen]:
    """The rows of each split that stay: balanced, and as many of an image as the sources file asks for.

    Questions are drawn from what the balance left, so that an image does not spend its few on one that would go; what
    was drawn is balanced again.
    """
    questions = sources_file.questions
    wanted = {source.name: source.questions_per_image or questions.per_image for source in sources_file.sources}
    kept = _balance(splits, questions.cap)
    drawn = {split: _draw(items, wanted, questions.weights, seed) for split, items in kept.items()}
    last = _balance(drawn, questions.cap)
    guessed = _guess(last)
    chosen = {}
    for split, items in last.items():
        lost = _count(splits[split]) - _count(kept[split]) + (_count(drawn[split]) - _count(items))
        left = _count(items)
        chosen[split] = Chosen(
            [row for row, _ in items],
            {name: lost[name] for name in sorted(lost)},
            {name: guessed[split][name] / left[name] for name in sorted(left)},
        )
    return chosen


def _balance(splits: Mapping[str, Sequence[Drafted]], cap: float) -> dict[str, list[Drafted]]:
    """Leave out rows until no question can be answered without its image.

    In each split "yes" and "no" are made equally many for every condition of a source and language. Of every other
    question no answer keeps more than the share `cap` of its rows in all splits together, so that a small split is not
    emptied; one that always has the same answer goes. Which rows stay is decided by what they state, the same in every
    language. With `cap` 1 only the yes/no questions are balanced.
    """
    kept: dict[str, list[Drafted]] = {split: [] for split in splits}
    for answers in _group_answers(splits).values():
        counts = [len(items) for items in answers.values()]
        if answers.keys() & {True, False}:
            most = min(counts) if len(counts) == 2 else 0
        else:
            most = _most_of_one(counts, cap)
        for items in answers.values():
            for split, item in sorted(items, key=lambda placed: _order(placed[1]))[:most]:
                kept[split].append(item)
    return kept


def _group_answers(
    splits: Mapping[str, Sequence[Drafted]],
) -> Mapping[tuple, Mapping[object, list[tuple[str, Drafted]]]]:
    """Rows with their splits, by question and then by answer; yes/no questions are told apart by source and split."""
    grouped: dict[tuple, dict[object, list[tuple[str, Drafted]]]] = defaultdict(lambda: defaultdict(list))
    for split, items in splits.items():
        for row, pair in items:
            question = (row["question_type"], row["language"], pair.asks)
            if pair.verdict is None:
                grouped[question][pair.answer_key].append((split, (row, pair)))
            else:
                grouped[*question, row["source"], split][pair.verdict].append((split, (row, pair)))
    return grouped


def _draw(
    items: Sequence[Drafted], wanted: Mapping[str, int | None], weights: Mapping[str, float], seed: int
) -> list[Drafted]:
    """Draw rows of each image by the weight of their family, without replacement; the same ones in every language.

    The key of Efraimidis and Spirakis (2006): the largest u^(1/w) are a weighted sample.
    """
    by_image: dict[tuple, list[Drafted]] = defaultdict(list)
    for item in items:
        by_image[item[0]["source"], item[0]["image_id"], item[0]["language"]].append(item)
    drawn: list[Drafted] = []
    for (source, image_id, _), own in by_image.items():
        own.sort(key=_order)
        rng = random.Random(f"{seed}/{source}/{image_id}")
        # A family's weight is shared by its rows, so that six yes/no questions do not outnumber one report.
        families = [row["question_type"].removesuffix("_location") for row, _ in own]
        ranks = [rng.random() ** (families.count(family) / weights.get(family, 1.0)) for family in families]
        drawn += [own[place] for place in sorted(range(len(own)), key=lambda place: -ranks[place])[: wanted[source]]]
    return drawn


def _guess(splits: Mapping[str, Sequence[Drafted]]) -> dict[str, Counter[str]]:
    """How many rows of each split and question type the most frequent answer to each question gets right."""
    right: dict[str, Counter[str]] = {split: Counter() for split in splits}
    for answers in _group_answers(splits).values():
        for split, (row, _) in max(answers.values(), key=len):
            right[split][row["question_type"]] += 1
    return right


def _count(items: Iterable[Drafted]) -> Counter[str]:
    return Counter(row["question_type"] for row, _ in items)


def _order(item: Drafted) -> str:
    """A seemingly random order of rows which does not depend on the language, so that each language keeps the same."""
    row, _ = item
    key = "/".join((row["source"], row["image_id"] or "", row["question_type"], row["claims"]))
    return hashlib.sha256(key.encode()).hexdigest()


def _most_of_one(counts: Iterable[int], cap: float) -> int:
    """The largest number of rows with one answer that is at most the share `cap` of what is then kept."""
    counts = sorted(counts)
    most = counts[-1]
    while most and most > cap * sum(min(count, most) for count in counts) + 1e-9:
        most -= 1
    return most
