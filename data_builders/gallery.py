"""A page to look at what was built: pictures with their findings drawn, and every claim beside its answer."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from data_builders.chat import Row
from data_builders.dataset_folder import ReadImage
from data_builders.images import to_rgb
from data_builders.sources import Vocabulary

GALLERY = "gallery.html"
PREVIEW_SIDE = 720  # pixels of the longer side
PREVIEW_QUALITY = 70


def write_gallery(
    folder: Path,
    rows: Mapping[str, Sequence[Row]],
    documents: Iterable[Mapping],
    read_image: ReadImage,
    *,
    vocabulary: Vocabulary,
    limit: int,
    seed: int,
) -> None:
    """Write `gallery.html`, which needs no other file: at most `limit` images, each with all its rows.

    `rows` are those of each split, `documents` the lines of `records.jsonl`. The images are drawn with the seed so
    that splits, sources, families and languages take turns.
    """
    flat = [(split, row) for split, own in rows.items() for row in own if row["images"]]
    splits = {row["row_id"]: split for split, row in flat}
    all_images = {row["images"][0] for _, row in flat}
    turns = take_turns(
        (row for _, row in flat),
        lambda row: (splits[row["row_id"]], row["source"], row["question_type"], row["language"]),
        seed=seed,
    )
    chosen = list(dict.fromkeys(row["images"][0] for row in turns))[:limit]
    order = {image_id: number for number, image_id in enumerate(chosen)}
    shown = [row for _, row in flat if row["images"][0] in order]
    shown.sort(key=lambda row: (order[row["images"][0]], row["language"], row["question_type"], row["row_id"]))
    findings = {(d["source"], d["image_id"]): d for d in documents if d["image_id"] in order}
    data = {
        "images": {image_id: _preview(read_image(image_id)[1]) for image_id in chosen},
        "records": {_key(*place): _describe_record(found, vocabulary) for place, found in findings.items()},
        "rows": [_describe_row(row, splits[row["row_id"]], vocabulary) for row in shown],
    }
    page = (
        _environment()
        .get_template("gallery.html.jinja")
        .render(data=data, shown=len(chosen), total=len(all_images), seed=seed, version=version("dentalgemma"))
    )
    (folder / GALLERY).write_text(page, encoding="utf-8")


def take_turns(rows: Iterable[Row], stratum: Callable[[Row], Hashable], *, seed: int) -> Iterator[Row]:
    """All rows in a seeded order in which the strata take turns, so that the first few show something of each."""
    strata: dict[Hashable, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: _digest(seed, row["row_id"])):
        strata[stratum(row)].append(row)
    for turn in zip_longest(*strata.values()):
        yield from (row for row in turn if row is not None)


def _digest(*parts: object) -> str:
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()


def _key(source: str, image_id: str) -> str:
    return f"{source}/{image_id}"


def _preview(content: bytes) -> str:
    """A data URI of the picture, reduced."""
    with Image.open(io.BytesIO(content)) as image:
        image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))  # of a JPEG only as many pixels are decoded as that needs
        picture = to_rgb(image).convert("L" if image.mode == "L" else "RGB")
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=PREVIEW_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _describe_record(document: Mapping, vocabulary: Vocabulary) -> dict:
    kept = ("finding_id", "shape", "parts", "region", "tooth", "origin", "confidence", "attributes")
    findings = [
        {"name": vocabulary[finding["label"]].en.one, **{key: finding.get(key) for key in kept}}
        for finding in document["findings"]
    ]
    size = {key: document[key] for key in ("width", "height", "modality", "locations")}
    return {**size, "exhaustive": [vocabulary[name].en.other for name in document["exhaustive"]], "findings": findings}


def _describe_row(row: Row, split: str, vocabulary: Vocabulary) -> dict:
    *history, question = [turn for turn in row["prompt"] if turn["role"] != "system"]
    claims = json.loads(row["claims"])
    earlier = [claim for turn in claims.get("history", ()) for claim in turn]
    return {
        "image": row["images"][0],
        "record": _key(row["source"], row["images"][0]),
        "id": row["row_id"],
        "family": row["question_type"],
        "source": row["source"],
        "language": row["language"],
        "split": split,
        "history": [turn["content"] for turn in history],
        "question": question["content"],
        "answer": row["completion"][0]["content"],
        "claims": [
            {"text": describe_claim(claim, vocabulary), "annotations": claim.get("annotations") or []}
            for claim in [*earlier, *claims["claims"]]
        ],
    }


def describe_claim(claim: Mapping, vocabulary: Vocabulary) -> str:
    """A claim in a few words, as `no caries · region: left maxillary`; it states nothing that is not in its fields."""
    label = claim["label"]
    name = vocabulary[label].en.one if label in vocabulary else label
    text = f"no {name}" if claim.get("negated") else name
    if claim.get("count") is not None:
        text += f" × {claim['count']}"
    told = {"label", "negated", "count", "annotations"}
    parts = [text]
    for field, value in claim.items():
        if field not in told and value not in (None, False):
            parts.append(field if value is True else f"{field}: {str(value).replace('_', ' ')}")
    return " · ".join(parts)


def _environment() -> Environment:
    return Environment(loader=PackageLoader("data_builders", "pages"), undefined=StrictUndefined, autoescape=True)
