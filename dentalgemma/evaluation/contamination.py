"""Whether questions were seen in training: their images and their texts, looked for in a dataset folder. No torch."""

from __future__ import annotations

import hashlib
import io
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
from dentalgemma.evaluation.questions import EvaluationError, Question, load_questions

HELD_OUT = "test"  # the split that no model is trained or chosen on
SPECIFIC_WORDS = 25  # from this length on a text says by itself what is asked; templates have fewer words
SHOWN = 5  # matches in a message
TEXT_COLUMNS = ["prompt", "row_id", "image_id"]


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


def check_contamination(questions: Path, dataset: Path, *, progress: bool = True) -> dict:
    """Look for the images and the texts of `questions` (JSONL) in all splits of a dataset folder.

    An image matches by its pixels, as a verified copy (re-encoded, resized, cropped a little), as a mirrored copy, or
    as a part of a mosaic. A text matches exactly but for case and punctuation, or nearly (0.7 of the word triples);
    rows of one split with one text are one match. The questions are `clean` if no training or validation split, that
    is no split but `test`, holds

    - one of their images, or
    - the text of a question without an image in a row without one, or any text of 25 words and more.

    The short text of a question about an image tells nothing: datasets ask "What is visible?" of every image. Such
    matches are listed with `leak: false`.

    Raises:
        EvaluationError: when a file is missing or an image of the questions cannot be decoded.
    """
    questions, dataset = Path(questions), Path(dataset)
    items = load_questions(questions)
    shards = _find_shards(dataset)
    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        asked = _read_question_pictures(items, bar)
        stored, texts, rows = _read_dataset(shards, bar, with_images=bool(asked.places))
        image_matches = _match_images(asked, stored)
    question_matches = _match_texts(items, texts, image_matches)
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
            "images": len(stored.places),
            "rows": rows,
        },
        "image_matches": image_matches,
        "question_matches": question_matches,
        "counts": {"images": _count(image_matches), "questions": _count(question_matches), "leaks": len(leaks)},
        "clean": not leaks,
    }


def format_contamination(result: Mapping) -> str:
    """What `check_contamination` found, in lines for people."""
    images, texts = result["image_matches"], result["question_matches"]
    name, leaks = result["dataset"]["name"], result["counts"]["leaks"]
    lines = [
        f"{name}: {'clean' if result['clean'] else 'NOT CLEAN'}; {result['questions']['n']} questions on "
        f"{result['questions']['images']} images against {result['dataset']['rows']} rows and "
        f"{result['dataset']['images']} images: {len(images)} images and {len(texts)} texts found, {leaks} of them "
        "where a model is trained or chosen on them"
    ]
    for match in [match for match in images if match["leak"]][:SHOWN]:
        lines.append(f"  {match['kind']} in {match['split']}: the image of {', '.join(match['item_ids'][:SHOWN])}")
    for match in [match for match in texts if match["leak"]][:SHOWN]:
        lines.append(f"  {match['kind']} text in {match['split']}, row {match['row_id']}: question {match['item_id']}")
    return "\n".join(lines)


# --- reading --------------------------------------------------------------------------------------------------------


def _find_shards(dataset: Path) -> dict[Path, str]:
    """The dataset's parquet files with the split that each belongs to."""
    shards = {path: path.name.split("-")[0] for path in sorted((dataset / "data").glob("*-*.parquet"))}
    if not shards:
        raise EvaluationError(f"{dataset} holds no data/<split>-*.parquet: name a dataset folder that `build` wrote")
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


def _read_dataset(
    shards: Mapping[Path, str], bar: Progress, *, with_images: bool
) -> tuple[Pictures, dict[tuple[str, str], Text], int]:
    """The pictures of a dataset with their splits, its texts by split and normalized text, and the number of rows."""
    pictures, texts, rows = Pictures(), {}, 0
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
                _add_text(texts, shards[path], row, f"{path.name}:{rows + number}", images)
            rows += len(batch)
            bar.advance(task, len(batch))
    return pictures, texts, rows


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


def _add_text(texts: dict[tuple[str, str], Text], split: str, row: Mapping, place: str, images: Sequence[str]) -> None:
    asked = "\n".join(turn["content"] for turn in row["prompt"] if turn["role"] == "user")
    text = texts.setdefault((split, " ".join(_words(asked))), Text(row.get("row_id") or place, asked))
    text.rows += 1
    text.images.update(images)
    text.bare |= not images


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


def _triples(words: Sequence[str]) -> frozenset[tuple[str, ...]]:
    """All numbers are one word, since another age does not make another case."""
    words = ["0" if re.fullmatch(r"\d+", word) else word for word in words]
    return frozenset(zip(*(words[start:] for start in range(SHINGLE)), strict=False)) or frozenset([tuple(words)])


def _match_texts(
    items: Sequence[Question], texts: Mapping[tuple[str, str], Text], images: Sequence[Mapping]
) -> list[dict]:
    pictures: dict[str, set[str]] = defaultdict(set)  # item to the dataset's images that show the same
    for match in images:
        for item_id in match["item_ids"]:
            pictures[item_id].add(match["dataset_image_id"])
    by_text: dict[str, list[tuple[str, Text]]] = defaultdict(list)
    for (split, text), found in texts.items():
        by_text[text].append((split, found))
    near = _find_near({" ".join(_words(item.question)) for item in items} - {""}, set(by_text) - {""})
    matches = []
    for item in items:
        asked = " ".join(_words(item.question))
        similar = near.get(asked, {}) | ({asked: 1.0} if asked in by_text else {})
        places = [(split, text, found) for text in sorted(similar) for split, found in by_text[text]]
        for split, text, found in places:
            same_image = bool(found.images & pictures[item.item_id])
            specific = (item.image is None and found.bare) or len(asked.split()) >= SPECIFIC_WORDS
            matches.append(
                {
                    "item_id": item.item_id,
                    "row_id": found.row_id,
                    "rows": found.rows,
                    "split": split,
                    "kind": "exact" if text == asked else "near",
                    "similarity": round(similar[text], 3),
                    "same_image": same_image,
                    "leak": split != HELD_OUT and (same_image or specific),
                    "question": item.question,
                    "row_question": found.text,
                }
            )
    return matches


def _find_near(asked: set[str], stored: set[str]) -> dict[str, dict[str, float]]:
    """For each normalized text those with nearly the same word triples, and the share that both have in common."""
    sides = [defaultdict(list), defaultdict(list)]
    for side, texts in zip(sides, (asked, stored), strict=True):
        for text in sorted(texts):
            side[_triples(text.split())].append(text)
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
