"""Whether questions were seen in training: their images, texts and answers, looked for in a dataset. No torch."""

from __future__ import annotations

import hashlib
import io
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import Progress

from data_builders.alike import Look, look_at
from data_builders.dataset_folder import hash_file
from data_builders.image_copies import (
    ALIGNED,
    NEAREST,
    PROPOSED,
    WINDOWS,
    Match,
    cut,
    fit,
    hash_signs,
)
from data_builders.images import ImageError, measure_pixels
from data_builders.mosaics import find_parts, is_mosaic
from data_builders.similar_prompts import NEAR_DUPLICATE, SHINGLE, WORD, find_near_duplicates
from data_builders.splits import Groups
from dentalgemma.evaluation.questions import ASK_FOR_LETTER, EvaluationError, Question, load_questions

HELD_OUT = "test"  # the split that no model is trained or chosen on
FEWEST_WORDS = 8  # of a question that is looked for inside longer rows, and of one that tells its own case
ANSWER_WORDS = 12  # of a reference that nobody else would have worded alike
OFTEN = 3  # images; what is asked of more belongs to a template
RARE_TRIPLES, RARE_SHARE = 10, 0.75  # word triples that no template has: as many, or this share, make a text specific
CONTAINED = 0.9  # share of a question's word triples that a row holds which holds the question
SHOWN = 5  # matches in a message
TEXT_COLUMNS = ["prompt", "completion", "row_id", "image_id"]
FRAMES = [  # what `put_question` writes around a question; many a dataset has the same
    re.compile(
        rf"^\s*{re.escape(before.strip())}\s*(.+?)\s*{re.escape(after.partition('{options}')[0].strip())}",
        re.DOTALL | re.IGNORECASE | re.MULTILINE,
    )
    for before, _, after in (wording.partition("{question}") for wording in ASK_FOR_LETTER.values())
]

Triple = tuple[str, ...]


@dataclass
class Pictures:
    """Pictures by the SHA-256 of their pixels: what they look like, and where they stand (splits, or items)."""

    looks: dict[str, Look] = field(default_factory=dict)
    places: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))


@dataclass
class Text:
    """A text that rows of one split have in common: one of them, how many they are, and the images they show."""

    row_id: str
    text: str
    rows: int = 0
    images: set[str] = field(default_factory=set)
    bare: bool = False  # whether a row of it has no image


Texts = dict[tuple[str, str], Text]  # by split and normalized text


class Stored(NamedTuple):
    """What a dataset holds; of its answers those that are asked for."""

    pictures: Pictures
    questions: Texts
    answers: Texts
    rows: int


def check_contamination(questions: Path, dataset: Path, *, progress: bool = True) -> dict:
    """Look for the images, the texts and the answers of `questions` (JSONL) in all splits of a dataset folder.

    An image matches by its pixels, as a verified copy (re-encoded, resized, cropped a little), as a mirrored copy, or
    as a part of a mosaic. Every user turn of a row is compared with every question, without a frame such as
    "Question: … Options: …". It matches exactly but for case and punctuation, nearly (0.7 of the word triples of both;
    all numbers are one word), or contains the question (of 8 words and more, 0.9 of its triples). The reference of an
    open question (of 8 words and more) matches as `answer` where a row's answer is the same text. Rows of one split
    with one text are one match.

    Datasets ask "What is visible?" of every image, and "Where is the …?" of every finding: such a text is a `template`
    and tells nothing. A text is none, but specific to its case, if it has 8 words and more and what both sides share
    are mostly triples of words (10, or three quarters) that neither the dataset nor the question file has on more than
    3 images. An answer is specific from 12 words on, if it is not given for more than 3 images.

    The questions are `clean` if no training or validation split, that is no split but `test`, holds

    - one of their images,
    - a specific text of theirs, question or answer, with whatever image,
    - a template of theirs about the same image, or
    - the text of a question without an image, exactly or nearly, in a row without one, however short it is.

    Raises:
        EvaluationError: when a file is missing or an image of the questions cannot be decoded.
    """
    questions, dataset = Path(questions), Path(dataset)
    items = load_questions(questions)
    shards = _find_shards(dataset)
    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        asked = _read_question_pictures(items, bar)
        references = {_normalize(item.answer) for item in items if _tells_answer(item)}
        stored = _read_dataset(shards, bar, references, with_images=bool(asked.places))
        image_matches = _match_images(asked, stored.pictures)
    question_matches = _match_texts(items, stored, image_matches)
    leaks = [match for match in (*image_matches, *question_matches) if match["leak"]]
    return {
        "format": "contamination/1",
        "questions": {
            "name": questions.name,
            "sha256": hash_file(questions),
            "n": len(items),
            "images": len(asked.places),
        },
        "dataset": {
            "name": dataset.name or dataset.resolve().name,
            "fingerprint": _fingerprint(shards),
            "images": len(stored.pictures.places),
            "rows": stored.rows,
        },
        "image_matches": image_matches,
        "question_matches": question_matches,
        "counts": {"images": _count(image_matches), "questions": _count(question_matches), "leaks": len(leaks)},
        "clean": not leaks,
    }


def format_contamination(result: Mapping) -> str:
    """What `check_contamination` found, in lines for people."""
    images, texts = result["image_matches"], result["question_matches"]
    leaks = {kind: [match for match in found if match["leak"]] for kind, found in (("image", images), ("text", texts))}
    templates = {_normalize(match["question"]) for match in texts if match["split"] != HELD_OUT and not match["leak"]}
    lines = [
        f"{result['dataset']['name']}: {'clean' if result['clean'] else 'NOT CLEAN'}; "
        f"{result['questions']['n']} questions on {result['questions']['images']} images against "
        f"{result['dataset']['rows']} rows and {result['dataset']['images']} images: "
        f"{len({match['question_image_id'] for match in leaks['image']})} of their images and the text of "
        f"{len({match['item_id'] for match in leaks['text']})} of them stand where a model is trained or chosen"
    ]
    if templates:
        one = len(templates) == 1
        further = "further " if leaks["text"] else ""
        lines.append(
            f"  {len(templates)} {further}{'text is' if one else 'texts are'} asked in training too, "
            + ("a short template question that tells" if one else "all of them short template questions that tell")
            + " nothing"
        )
    for match in leaks["image"][:SHOWN]:
        lines.append(f"  {match['kind']} in {match['split']}: the image of {', '.join(match['item_ids'][:SHOWN])}")
    for match in leaks["text"][:SHOWN]:
        lines.append(f"  {match['kind']} text in {match['split']}, row {match['row_id']}: question {match['item_id']}")
    return "\n".join(lines)


# --- reading --------------------------------------------------------------------------------------------------------


def _find_shards(dataset: Path) -> dict[Path, str]:
    """The dataset's parquet files with the split that each belongs to."""
    shards = {path: path.name.split("-")[0] for path in sorted((dataset / "data").glob("*-*.parquet"))}
    if not shards:
        raise EvaluationError(f"{dataset} holds no data/<split>-*.parquet: name a dataset folder that `build` wrote")
    for path in shards:
        try:
            pq.read_metadata(path)
        except (pa.ArrowException, OSError) as error:
            raise EvaluationError(f"{path} is no complete parquet file ({error}); build or download it again") from None
    return shards


def _fingerprint(shards: Mapping[Path, str]) -> str:
    hashes = "".join(f"{path.name} {hash_file(path)}\n" for path in shards)
    return hashlib.sha256(hashes.encode()).hexdigest()


def _read_question_pictures(items: Sequence[Question], bar: Progress) -> Pictures:
    pictures = Pictures()
    by_path: dict[Path, list[str]] = defaultdict(list)
    for item in items:
        if item.image is not None:
            by_path[item.image].append(item.item_id)
    for path, item_ids in bar.track(by_path.items(), description="Reading the questions' images"):
        try:
            measured, pixels = measure_pixels(path)
        except (ImageError, OSError) as error:
            raise EvaluationError(f"{path}: the image of item {item_ids[0]} cannot be read: {error}") from None
        pictures.looks.setdefault(measured.image_id, look_at(pixels))
        pictures.places[measured.image_id].update(item_ids)
    return pictures


def _read_dataset(shards: Mapping[Path, str], bar: Progress, references: set[str], *, with_images: bool) -> Stored:
    """The pictures of a dataset with their splits, its questions, and those answers that are one of `references`."""
    pictures, questions, answers, rows = Pictures(), {}, {}, 0
    files = {path: pq.ParquetFile(path) for path in shards}
    task = bar.add_task("Reading the dataset", total=sum(file.metadata.num_rows for file in files.values()))
    known: dict[str, str] = {}  # SHA-256 of a file's bytes to that of its pixels
    for path, file in files.items():
        wanted = [*TEXT_COLUMNS, "images"] if with_images else TEXT_COLUMNS
        columns = [name for name in wanted if name in file.schema_arrow.names]
        if "prompt" not in columns:
            raise EvaluationError(f"{path} has no column `prompt`: build the dataset folder again with `build`")
        # A few rows at a time: read as a whole, the column would hold an image's bytes once per row.
        for batch in file.iter_batches(batch_size=16 if "images" in columns else 1000, columns=columns):
            for number, row in enumerate(batch.select([c for c in columns if c != "images"]).to_pylist()):
                images = [row["image_id"]] if row.get("image_id") else []
                if with_images:
                    images = _picture_ids(path, batch, number, pictures, known)
                for image_id in images:
                    pictures.places[image_id].add(shards[path])
                row["row_id"] = row.get("row_id") or f"{path.name}:{rows + number}"
                for text in _user_texts(row):
                    _add_text(questions, shards[path], _question_part(text), text, row, images)
                for text in _answer_texts(row):
                    if _normalize(text) in references:
                        _add_text(answers, shards[path], text, text, row, images)
            rows += len(batch)
            bar.advance(task, len(batch))
    return Stored(pictures, questions, answers, rows)


def _picture_ids(
    path: Path, batch: pa.RecordBatch, number: int, pictures: Pictures, known: dict[str, str]
) -> list[str]:
    if "images" not in batch.schema.names:
        return []
    image_ids = []
    for image in batch["images"][number].as_py() or ():
        key = hashlib.sha256(image["bytes"] or b"").hexdigest()
        if key not in known:
            try:
                measured, pixels = measure_pixels(io.BytesIO(image["bytes"] or b""))
            except ImageError as error:
                raise EvaluationError(f"{path}: image {image['path']} cannot be read: {error}") from None
            known[key] = measured.image_id
            pictures.looks.setdefault(measured.image_id, look_at(pixels))
        image_ids.append(known[key])
    return image_ids


def _user_texts(row: Mapping) -> set[str]:
    """Every user turn of a row, and all together."""
    turns = [turn["content"] for turn in row["prompt"] if turn["role"] == "user"]
    return {*turns, "\n".join(turns)}


def _answer_texts(row: Mapping) -> set[str]:
    turns = [*row["prompt"], *(row.get("completion") or ())]
    return {turn["content"] for turn in turns if turn["role"] == "assistant"}


def _question_part(text: str) -> str:
    """The question in "Question: … Options: …", or the whole text."""
    return next((match[1] for frame in FRAMES if (match := frame.search(text))), text)


def _add_text(texts: Texts, split: str, compared: str, text: str, row: Mapping, images: Sequence[str]) -> None:
    found = texts.setdefault((split, _normalize(compared)), Text(row["row_id"], text))
    found.rows += 1
    found.images.update(images)
    found.bare |= not images


# --- images ---------------------------------------------------------------------------------------------------------


def _match_images(asked: Pictures, stored: Pictures) -> list[dict]:
    found = {(image_id, image_id): ("pixels", 1.0) for image_id in asked.places if image_id in stored.places}
    first, second = sorted(asked.looks), sorted(stored.looks)
    if first and second:
        for match in _find_copies(
            [asked.looks[i].thumbnail for i in first], [stored.looks[i].thumbnail for i in second]
        ):
            pair = first[match.first], second[match.second]
            found.setdefault(pair, ("flipped" if match.flipped else "copy", match.correlation))
        for (one, other), correlation in _find_mosaic_parts(asked, stored):
            found.setdefault((one, other), ("part", correlation))
    return [
        {
            "question_image_id": one,
            "item_ids": sorted(asked.places[one]),
            "dataset_image_id": other,
            "split": split,
            "kind": kind,
            "correlation": correlation,
            "leak": split != HELD_OUT,
        }
        for (one, other), (kind, correlation) in sorted(found.items())
        for split in sorted(stored.places[other])
    ]


def _find_copies(asked: Sequence[np.ndarray], stored: Sequence[np.ndarray]) -> list[Match]:
    """Verified pairs of a thumbnail of either list, as `image_copies.find_copies` verifies those of one list.

    Each is also looked for in what a crop would have left of the other.
    """
    best: dict[tuple[int, int], Match] = {}
    whole_asked, whole_stored = hash_signs(np.stack(asked)), hash_signs(np.stack(stored))
    for flipped in (False, True):
        for window in WINDOWS:
            # A whole picture that is looked for in whole pictures finds the same both ways.
            ways = ((asked, whole_stored, stored, False), (stored, whole_asked, asked, True))
            for queries, whole, others, swapped in ways[: 1 if window == WINDOWS[0] else 2]:
                for first, near in _walk(queries, whole, window, flipped=flipped):
                    for second, cutting in near:
                        pair = (second, first) if swapped else (first, second)
                        if pair in best and best[pair].correlation >= ALIGNED:
                            continue
                        correlation = round(fit(cutting, others[second]), 3)
                        if pair not in best or correlation > best[pair].correlation:
                            best[pair] = Match(*pair, flipped, correlation)
    return sorted(match for match in best.values() if match.shows_the_same)


def _walk(
    queries: Sequence[np.ndarray], whole: np.ndarray, window: tuple[float, ...], *, flipped: bool
) -> Iterator[tuple[int, list[tuple[int, np.ndarray]]]]:
    """Yield the place of each query with the pictures of a near hash, nearest first, and what is cut from the query."""
    bits = whole.shape[1]
    for start in range(0, len(queries), 500):
        block = [cut(query[:, ::-1] if flipped else query, window) for query in queries[start : start + 500]]
        distance = (bits - hash_signs(np.stack(block)) @ whole.T) / (2 * bits)
        for row in np.flatnonzero((distance <= PROPOSED).any(axis=1)):
            nearest = np.argsort(distance[row], kind="stable")[:NEAREST]
            yield start + int(row), [(int(place), block[row]) for place in nearest if distance[row, place] <= PROPOSED]


def _find_mosaic_parts(asked: Pictures, stored: Pictures) -> Iterator[tuple[tuple[str, str], float]]:
    """Pairs of an asked and a stored picture of which one is a mosaic, by its clear seams, that shows the other."""
    for mosaics, shown, swapped in ((asked, stored, False), (stored, asked, True)):
        clear = [i for i in sorted(mosaics.looks) if is_mosaic(mosaics.looks[i].crossing, ())]
        ids = [*clear, *sorted(set(shown.looks) - set(clear))]
        looks = [mosaics.looks[i] for i in clear] + [shown.looks[i] for i in ids[len(clear) :]]
        parts = find_parts([look.thumbnail for look in looks], [look.crossing for look in looks]) if clear else {}
        for place in range(len(clear)):
            for part in parts.get(place, ()):
                if ids[part.shows] in shown.looks:
                    pair = ids[place], ids[part.shows]
                    yield (pair[::-1] if swapped else pair), part.correlation


# --- texts ----------------------------------------------------------------------------------------------------------


def _words(text: str) -> list[str]:
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _normalize(text: str) -> str:
    return " ".join(_words(text))


def _triples(text: str) -> frozenset[Triple]:
    """The word triples of a normalized text. All numbers are one word: another age does not make another case."""
    words = ["0" if re.fullmatch(r"\d+", word) else word for word in text.split()]
    return frozenset(zip(*(words[start:] for start in range(SHINGLE)), strict=False)) or frozenset([tuple(words)])


def _match_texts(items: Sequence[Question], stored: Stored, images: Sequence[Mapping]) -> list[dict]:
    pictures: dict[str, set[str]] = defaultdict(set)  # item to the dataset's images that show the same
    for match in images:
        for item_id in match["item_ids"]:
            pictures[item_id].add(match["dataset_image_id"])
    asked = {item.item_id: _normalize(_question_part(item.question)) for item in items}
    questions, answers = _by_text(stored.questions), _by_text(stored.answers)
    similar = _find_similar(set(asked.values()) - {""}, set(questions) - {""})
    common = _common_triples(items, stored.questions)
    matches = []
    for item in items:
        for text, (kind, similarity) in sorted(similar.get(asked[item.item_id], {}).items()):
            specific = _is_specific(asked[item.item_id], text, common)
            for split, found in questions[text]:
                alone = item.image is None and found.bare and kind != "contained"
                same_image = bool(found.images & pictures[item.item_id])
                matches.append(_text_match(item, split, found, kind, similarity, same_image, not (specific or alone)))
        for split, found in answers.get(_normalize(item.answer), ()) if _tells_answer(item) else ():
            often = len({image for _, other in answers[_normalize(item.answer)] for image in other.images}) > OFTEN
            template = often or len(_words(item.answer)) < ANSWER_WORDS
            same_image = bool(found.images & pictures[item.item_id])
            matches.append(_text_match(item, split, found, "answer", 1.0, same_image, template))
    return matches


def _text_match(
    item: Question, split: str, found: Text, kind: str, similarity: float, same_image: bool, template: bool
) -> dict:
    return {
        "item_id": item.item_id,
        "row_id": found.row_id,
        "rows": found.rows,
        "split": split,
        "kind": kind,
        "similarity": round(similarity, 3),
        "same_image": same_image,
        "template": template,
        "leak": split != HELD_OUT and (same_image or not template),
        "question": item.answer if kind == "answer" else item.question,
        "row_question": found.text,
    }


def _tells_answer(item: Question) -> bool:
    return item.kind == "open" and len(_words(item.answer)) >= FEWEST_WORDS


def _by_text(texts: Texts) -> dict[str, list[tuple[str, Text]]]:
    by_text = defaultdict(list)
    for (split, text), found in texts.items():
        by_text[text].append((split, found))
    return by_text


def _common_triples(items: Sequence[Question], texts: Texts) -> set[Triple]:
    """Those that the dataset, or the question file, has on more than `OFTEN` images; a row without counts as one."""
    stored = ((text, found.images or {found.row_id}) for (_, text), found in texts.items())
    asked = ((_normalize(item.question), {item.image_id}) for item in items if item.image is not None)
    common = set()
    for side in (stored, asked):
        places: dict[Triple, set[str]] = defaultdict(set)
        for text, images in side:
            for triple in _triples(text) - common:
                places[triple].update(islice(images, OFTEN + 1))
                if len(places[triple]) > OFTEN:
                    common.add(triple)
                    del places[triple]
    return common


def _is_specific(asked: str, text: str, common: set[Triple]) -> bool:
    shared = _triples(asked) & _triples(text)
    return len(asked.split()) >= FEWEST_WORDS and len(shared - common) >= min(RARE_TRIPLES, RARE_SHARE * len(shared))


def _find_similar(asked: set[str], stored: set[str]) -> dict[str, dict[str, tuple[str, float]]]:
    """For each normalized text those that are the same, nearly the same, or hold it, with kind and similarity."""
    similar: dict[str, dict[str, tuple[str, float]]] = defaultdict(dict)
    for text, share in _find_contained(asked, stored):
        similar[text[0]][text[1]] = ("contained", share)
    for one, others in _find_near(asked, stored).items():
        similar[one] |= {other: ("near", similarity) for other, similarity in others.items()}
    for text in asked & stored:
        similar[text][text] = ("exact", 1.0)
    return similar


def _find_contained(asked: set[str], stored: set[str]) -> Iterator[tuple[tuple[str, str], float]]:
    """Pairs of a text and one that holds it; it holds one of the rarest triples, or too many would be missing."""
    wanted = {text: _triples(text) for text in sorted(asked) if len(text.split()) >= FEWEST_WORDS}
    frequency = Counter(triple for triples in wanted.values() for triple in triples)
    index: dict[Triple, list[str]] = defaultdict(list)
    for text, triples in wanted.items():
        rarest = sorted(triples, key=lambda triple: (frequency[triple], triple))
        for triple in rarest[: len(triples) - math.ceil(CONTAINED * len(triples)) + 1]:
            index[triple].append(text)
    for other in sorted(stored) if index else ():
        held = _triples(other)
        for text in sorted({text for triple in held for text in index.get(triple, ())}):
            share = len(wanted[text] & held) / len(wanted[text])
            if share >= CONTAINED:
                yield (text, other), share


def _find_near(asked: set[str], stored: set[str]) -> dict[str, dict[str, float]]:
    """For each normalized text those with nearly the same word triples, and the share that both have in common."""
    sides = [defaultdict(list), defaultdict(list)]
    for side, texts in zip(sides, (asked, stored), strict=True):
        for text in sorted(texts):
            side[_triples(text)].append(text)
    sets = [*sides[0], *sides[1]]
    apart = Groups()  # what is of one side is not compared
    apart.join(0, *range(1, len(sides[0])))
    apart.join(len(sides[0]), *range(len(sides[0]) + 1, len(sets)))
    near: dict[str, dict[str, float]] = defaultdict(dict)
    for pair in find_near_duplicates(sets, NEAR_DUPLICATE, known=apart):
        first, second = sets[min(pair)], sets[max(pair)]
        similarity = len(first & second) / len(first | second)
        for one in sides[0][first]:
            near[one] |= dict.fromkeys(sides[1][second], similarity)
    return near


def _count(matches: Sequence[Mapping]) -> dict[str, dict[str, int]]:
    """How many matches of each kind there are in each split."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for match in matches:
        counts[match["split"]][match["kind"]] += 1
    return {split: dict(sorted(kinds.items())) for split, kinds in sorted(counts.items())}
