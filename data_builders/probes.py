"""Closed questions with four options from a split of a dataset folder: what is asked before and after training."""

from __future__ import annotations

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import get_args

import pyarrow.parquet as pq

from data_builders.claims import Claim
from data_builders.compose.wording import Wording
from data_builders.dataset_folder import BuildError, write_jsonl
from data_builders.dentition import REGIONS
from data_builders.parts import Part, find_parts, find_vocabulary
from data_builders.records import Modality
from data_builders.sources import Language, Vocabulary

LETTERS = "ABCD"
QUESTION_TYPES = ("diagnosis", "location", "screening")
HEALTHY = "healthy"  # the value of the option that denies any disease
NEEDS = (
    "a question needs an image with one kind of disease and three others whose absence may be stated (`exhaustive`), "
    "or a disease that a panoramic shows exactly once, in one region, or for `screening` images with and without "
    "disease from one source"
)


@dataclass(frozen=True, slots=True)
class Draft:
    """What is asked of an image: the finding asked for, the right value, and three that the annotations rule out.

    Values are labels for `diagnosis`, regions for `location`, labels and `HEALTHY` for `screening`.
    """

    question_type: str
    record: Mapping
    finding: str
    right: str
    wrong: tuple[str, ...]

    @property
    def pair_id(self) -> str:
        key = "/".join((self.record["source"], self.record["image_id"], self.question_type, self.finding))
        return hashlib.sha256(key.encode()).hexdigest()[:16]


def build_probe(
    dataset_dir: Path,
    split: str,
    out: Path,
    *,
    languages: Sequence[Language] = ("en",),
    seed: int = 0,
    question_types: Sequence[str] = QUESTION_TYPES,
    modalities: Sequence[Modality] | None = None,
    findings: Sequence[str] | None = None,
    per_finding: int | None = None,
    limit: int | None = None,
) -> int:
    """Write closed questions on the images of `split` to `out` (JSONL) and return their number.

    The images lie beside it in `<name of out>_images`, as the bytes they had. Each letter is the right one equally
    often. With several languages every question is there in each, with the same options in the same order and one
    `pair_id`.

    `diagnosis` asks which disease an image shows, `location` in which region it lies. `screening` offers three diseases
    and that there is no sign of any: on an image without disease that is right, and each of these comes with an image
    of the same source that shows one of the diseases, where it is wrong. So the option alone tells nothing; choosing it
    there misses pathology, not choosing it on the other is an over-call.

    `modalities` and `findings` (labels) restrict what is asked about; `per_finding` is the most questions of one type
    about one finding, in all languages together counted once, and `limit` the most lines of the file, which hold whole
    pairs of languages and of screening, spread evenly over question types and findings.

    Raises:
        BuildError: when there is no such dataset, split, language, modality or finding, or nothing that can be asked.
    """
    out = Path(out)
    _check_names("language", languages, get_args(Language))
    _check_names("question type", question_types, QUESTION_TYPES)
    _check_names("modality", modalities or get_args(Modality), get_args(Modality))
    if any(number is not None and number < least for number, least in ((per_finding, 1), (limit, len(languages)))):
        raise BuildError(
            f"per_finding {per_finding} or limit {limit} leaves no question in each of {len(languages)} "
            "languages; choose a larger one"
        )
    parts = find_parts(dataset_dir)
    if not parts:
        raise BuildError(f"{dataset_dir} is no VQA dataset folder; build one with `dentalgemma build`")
    shards = [shard for part in parts for shard in part.shards if shard.name.startswith(f"{split}-")]
    records = _read_records(parts, split)
    available = {image_id for shard in shards for image_id in _image_ids(shard)}
    terms = find_vocabulary(dataset_dir)
    diseases = sorted(label for label, term in terms.items() if term.kind == "pathology")
    _check_names("finding", findings or diseases, diseases)
    drafts = [
        draft
        for draft in _draft(records, terms, seed)
        if draft.record["image_id"] in available
        and draft.question_type in question_types
        and (modalities is None or draft.record["modality"] in modalities)
        and (findings is None or draft.finding in (*findings, HEALTHY))
    ]
    drafts = _choose(
        drafts, per_finding=per_finding, limit=None if limit is None else limit // len(languages), seed=seed
    )
    silent = [label for label in findings or () if label not in {draft.finding for draft in drafts}]
    if not drafts or silent:
        about = f" ({', '.join(silent)})" if silent else ""
        raise BuildError(f"{dataset_dir}: nothing can be asked about split {split!r}{about}: {NEEDS}")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f"{out.stem}_images")
    names = _write_images(shards, {draft.record["image_id"] for draft in drafts}, folder)
    keys = _balanced_keys(drafts, seed)
    items = [
        _item(draft, keys[draft.pair_id], language, terms, seed) | {"image": names[draft.record["image_id"]]}
        for draft in drafts
        for language in languages
    ]
    partial = out.with_name(out.name + ".partial")
    write_jsonl(partial, items)
    partial.replace(out)
    return len(items)


def _check_names(what: str, given: Sequence[str], known: Sequence[str]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown or not given:
        raise BuildError(f"no {what} {', '.join(unknown)!r}; choose among {', '.join(known)}")


def _read_records(parts: Sequence[Part], split: str) -> list[Mapping]:
    records = []
    for part in parts:
        with part.records.open(encoding="utf-8") as file:
            records += [json.loads(line) for line in file if line.strip()]
    path = parts[0].records
    if not records:
        raise BuildError(f"{path} holds no image; build the dataset folder again with `dentalgemma build`")
    chosen = [record for record in records if record["split"] == split]
    if not chosen:
        there = ", ".join(sorted({record["split"] for record in records}))
        raise BuildError(f"{path} has no image in split {split!r}; choose among {there}")
    return chosen


def _draft(records: Sequence[Mapping], terms: Vocabulary, seed: int) -> Iterator[Draft]:
    """Yield what can be asked of each image; a picture that two sources annotate is judged by both together."""
    shown: dict[str, list[str]] = defaultdict(list)
    for record in records:
        for label in {*record["exhaustive"], *(finding["label"] for finding in record["findings"])} - set(terms):
            raise BuildError(f"{label!r} is not in the vocabulary; build the dataset folder again")
        shown[record["image_id"]] += [finding["label"] for finding in record["findings"]]
    for record in records:
        if any(finding["origin"] == "model" for finding in record["findings"]):
            continue  # a detector's opinion is no key for an examination
        labels = shown[record["image_id"]]
        diseases = sorted({label for label in labels if terms[label].kind == "pathology"})
        rng = random.Random(f"{seed}/{record['source']}/{record['image_id']}")
        if len(diseases) == 1 and any(finding["label"] == diseases[0] for finding in record["findings"]):
            absent = [x for x in sorted(set(record["exhaustive"])) if _may_be_wrong(x, diseases[0], labels, terms)]
            if len(absent) >= 3:
                yield Draft("diagnosis", record, diseases[0], diseases[0], tuple(rng.sample(absent, 3)))
            if len(absent) >= 2:
                wrong = (*_screening_rng(record, seed).sample(absent, 2), HEALTHY)
                yield Draft("screening", record, diseases[0], diseases[0], wrong)
        deniable = sorted({label for label in record["exhaustive"] if terms[label].kind == "pathology"})
        if not diseases and len(deniable) >= 3:
            wrong = tuple(_screening_rng(record, seed).sample(deniable, 3))
            yield Draft("screening", record, HEALTHY, HEALTHY, wrong)
        if record["modality"] != "panoramic" or not record["locations"]:
            continue
        for finding in record["findings"]:
            label, region = finding["label"], finding["region"]
            if label in diseases and labels.count(label) == 1 and region in REGIONS:
                others = [other for other in REGIONS if other != region]
                yield Draft("location", record, label, region, tuple(rng.sample(others, 3)))


def _screening_rng(record: Mapping, seed: int) -> random.Random:
    return random.Random(f"{seed}/{record['source']}/{record['image_id']}/screening")


def _choose(drafts: Sequence[Draft], *, per_finding: int | None, limit: int | None, seed: int) -> list[Draft]:
    """At most `limit` drafts, in the order they have, those of screening after the others and in couples.

    They are drawn in a seeded order from each question type and finding in turn.
    """
    units: dict[tuple[str, str], list[tuple[Draft, ...]]] = defaultdict(list)
    for draft in _shuffle(drafts, seed):
        if draft.question_type != "screening":
            units[draft.question_type, draft.finding].append((draft,))
    for couple in _couple([draft for draft in drafts if draft.question_type == "screening"], seed):
        units["screening", couple[0].finding].append(couple)
    queues = [units[key][:per_finding] for key in sorted(units)]
    left = len(drafts) if limit is None else limit
    chosen = set()
    for turn in zip_longest(*queues):
        for unit in turn:
            if unit is not None and len(unit) <= left:
                left -= len(unit)
                chosen |= {draft.pair_id for draft in unit}
    kept = [draft for draft in drafts if draft.pair_id in chosen]
    return sorted(kept, key=lambda draft: draft.question_type == "screening")


def _couple(drafts: Sequence[Draft], seed: int) -> Iterator[tuple[Draft, Draft]]:
    """Put to each image with a disease one without of the same source, each image once, findings in turn.

    Were they of different sources, the kind of picture or the diseases offered would tell which is which.
    """
    pools: dict[tuple[str, str], dict[str, dict[str, Draft]]] = defaultdict(lambda: defaultdict(dict))
    for draft in _shuffle(drafts, seed):
        pool = pools[draft.record["modality"], draft.record["source"]]
        pool[draft.finding].setdefault(draft.record["image_id"], draft)
    for _, pool in sorted(pools.items()):
        healthy = list(pool.pop(HEALTHY, {}).values())
        turns = zip_longest(*(pool[finding].values() for finding in sorted(pool)))
        diseased = [draft for turn in turns for draft in turn if draft is not None]
        yield from zip(diseased, healthy, strict=False)


def _shuffle(drafts: Sequence[Draft], seed: int) -> list[Draft]:
    """A seeded order in which another image changes no other two's."""
    return sorted(drafts, key=lambda draft: hashlib.sha256(f"{seed}/{draft.pair_id}".encode()).digest())


def _may_be_wrong(label: str, right: str, shown: Sequence[str], terms: Vocabulary) -> bool:
    """Whether a disease is a wrong answer: not there, and not another name of the right one (caries, deep caries)."""
    term = terms[label]
    same_code = term.icd10cm is not None and term.icd10cm == terms[right].icd10cm
    return term.kind == "pathology" and label not in shown and not same_code


def _balanced_keys(drafts: Sequence[Draft], seed: int) -> dict[str, str]:
    """The right letter of each question: in a seeded order of the questions of one type, A to D in turn.

    Those on healthy images come after the others, so that both halves of a screening are balanced.
    """
    keys = {}
    for question_type in QUESTION_TYPES:
        chosen = _shuffle([draft for draft in drafts if draft.question_type == question_type], seed)
        chosen.sort(key=lambda draft: draft.finding == HEALTHY)
        keys |= {draft.pair_id: LETTERS[number % len(LETTERS)] for number, draft in enumerate(chosen)}
    return keys


def _item(draft: Draft, key: str, language: Language, terms: Vocabulary, seed: int) -> dict:
    record = draft.record
    values = list(draft.wrong)
    random.Random(f"{seed}/{draft.pair_id}").shuffle(values)
    values.insert(LETTERS.index(key), draft.right)
    words = Wording(language, terms, random.Random(f"{seed}/{draft.pair_id}/question"))
    subject = {} if draft.finding == HEALTHY else words.subject(Claim(draft.finding))
    question = words.draw(draft.question_type, "questions", image=words.image(record["modality"]), **subject)
    return {
        "item_id": f"{draft.pair_id}-{language}",
        "pair_id": draft.pair_id,
        "image_id": record["image_id"],
        "question": question,
        "options": {
            letter: _option(draft, value, language, terms, seed) for letter, value in zip(LETTERS, values, strict=True)
        },
        "option_values": dict(zip(LETTERS, values, strict=True)),
        "answer": key,
        "question_type": draft.question_type,
        "language": language,
        "finding": draft.finding,
        "categories": [draft.finding],
        "modality": record["modality"],
        "source": record["source"],
        "group_id": record["group_id"],
        "split": record["split"],
    }


def _option(draft: Draft, value: str, language: Language, terms: Vocabulary, seed: int) -> str:
    """An option as the family words its answers; all options of a question draw the same phrase."""
    words = Wording(language, terms, random.Random(f"{seed}/{draft.pair_id}/options"))
    if value == HEALTHY:
        return words.phrases["screening"]["healthy"]
    if draft.question_type != "location":
        return words.draw(draft.question_type, "answers", condition=words.condition(value))
    return words.draw("location", "answers", in_region=words.in_region(value))


def _image_ids(shard: Path) -> set[str]:
    return set(pq.read_table(shard, columns=["image_id"])["image_id"].to_pylist())


def _write_images(shards: Sequence[Path], wanted: set[str], folder: Path) -> dict[str, str]:
    """Write the images as files; returns their paths relative to the folder's parent."""
    folder.mkdir(parents=True, exist_ok=True)
    names: dict[str, str] = {}
    for shard in shards:
        # A few rows at a time: read as a whole, the column would hold an image's bytes once per row.
        for batch in pq.ParquetFile(shard).iter_batches(batch_size=16, columns=["image_id", "images"]):
            for image_id, images in zip(batch["image_id"].to_pylist(), batch["images"], strict=True):
                if image_id in wanted and image_id not in names:
                    image = images[0].as_py()
                    name = f"{image_id[:16]}{Path(image['path'] or '').suffix.lower()}"
                    (folder / name).write_bytes(image["bytes"])
                    names[image_id] = f"{folder.name}/{name}"
    return names
