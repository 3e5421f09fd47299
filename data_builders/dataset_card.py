"""The card of a VQA dataset, rendered from its build report: for a clinician who reads it and for the Hub."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from data_builders.chat import SPLITS, Row
from data_builders.dataset_folder import Configuration, write_card
from data_builders.gallery import GALLERY, take_turns
from data_builders.licences import combine_terms, find_licence, name_dataset_terms
from data_builders.sources import Vocabulary

LANGUAGES = {"en": "English", "es": "Spanish"}
MODALITIES = {
    "panoramic": "panoramic radiographs",
    "intraoral_photo": "intraoral photographs",
    "periapical": "periapical radiographs",
    "bitewing": "bitewing radiographs",
}
FIGURES = "figures"
COLOURS = {"train": "#0072B2", "validation": "#E69F00", "test": "#009E73"}  # Okabe and Ito: apart for every eye
EXAMPLES = 10
GUIDED = {"follow_up", "urgency", "differential"}
MARKDOWN = re.compile(r"([\\`*_{}\[\]>|#~$!])")
ENTITIES = {"&": "&amp;", "<": "&lt;"}  # which every renderer of Markdown knows, as not all know a backslash before <
# Problems that are no stop for a build, in the words of people who do not read codes; docs/datasets.md has all.
FAULTS = {
    "annotation_without_image": "annotations of an image that is not there",
    "bad_annotation": "annotations that could not be read",
    "bad_category": "categories that could not be read",
    "bad_confidence": "findings of a detector whose confidence is no share",
    "bad_csv": "lines of a table that could not be read",
    "bad_data_yaml": "descriptions of the set that could not be read",
    "bad_json": "annotation files that could not be read",
    "bad_label_line": "lines of annotations that could not be read",
    "bad_mask": "outlines that could not be read",
    "bow_tie_repaired": "outlines that cross themselves, taken as several",
    "burned_in_annotation": "images left out since text may be burned into them",
    "class_count_mismatch": "descriptions of the set whose number of classes is wrong",
    "clipped": "marks that reached over the edge of the image and were cut",
    "contradicting_duplicate": "groups of equal images that are annotated differently, left out",
    "contradicting_name": "file names that say something else than the annotations",
    "declared_augmentation": "altered copies that the source declares, so that no places are named",
    "dicom_unreadable": "DICOM files that could not be read",
    "duplicate_annotation_file": "annotation files that are there twice, read once",
    "duplicate_annotation_id": "annotations that share a number",
    "duplicate_image": "groups of equal images, taken once",
    "duplicate_image_id": "images that share a number",
    "duplicate_json_keys": "annotation files in which an entry stands twice",
    "duplicate_tooth": "images on which a tooth number stands twice",
    "empty_folder": "classes without images",
    "flipped_copy": "mirrored copies, on which no places are named",
    "group_pattern": "rules for naming patients that do not fit all file names",
    "image_missing": "images that are annotated and not there",
    "image_unreadable": "images that could not be read, left out",
    "image_without_class": "images without a class, left out",
    "label_missing": "marks without a label",
    "labels_missing": "images without annotations, of which nothing is denied",
    "looks_like_fractions": "annotations in another unit than their format's, left out",
    "looks_like_pixels": "annotations in another unit than their format's, left out",
    "mosaic": "images put together from several, on which no places are named",
    "negative_size": "marks of a negative size",
    "outside_image": "marks that lie outside their image",
    "shared_label_file": "images that share an annotation file with another, left out",
    "similar_labels": "labels that are spelt alike and mean different things",
    "size_mismatch": "images of another size than their annotations say",
    "too_few_points": "outlines of fewer than three points",
    "unexpected_count": "findings on more or fewer images than was expected",
    "unknown_label": "marks whose label is not known",
    "unreadable_file": "files that could not be read",
    "unsafe_path": "files outside the folder of the source, not read",
    "zero_area": "marks without an area",
}
HIDDEN = re.compile(r"[\x00-\x08\x0e-\x1f\x7f\u202a-\u202e\u2066-\u2069]")  # control, and what turns a line's direction


def write_vqa_card(
    folder: Path,
    report: Mapping,
    rows: Mapping[str, Sequence[Row]],
    *,
    vocabulary: Vocabulary,
    languages: Sequence[str],
) -> None:
    """Write `README.md`, `LICENSE.md` and the plots they show, from the report and the rows that were written."""
    stated = {source["name"]: source["license"] for source in report["sources"] if source["rows"]}
    terms = combine_terms(stated)
    draw_bars(
        folder / FIGURES / "findings.png",
        {vocabulary[name].en.other: _of_splits(counts, "images") for name, counts in report["findings"].items()},
        "images that show it",
    )
    draw_bars(
        folder / FIGURES / "questions.png",
        {name.replace("_", " "): counts for name, counts in report["question_types_by_split"].items()},
        "questions",
    )
    facts = {
        "report": report,
        "terms": terms,
        "vocabulary": vocabulary,
        "languages": [LANGUAGES[language] for language in languages],
        "modalities": _count_modalities(report),
        "guesses": _list_guesses(report),
        "examples": _choose_examples(rows, report["seed"]),
        "totals": {key: sum(split[key] for split in report["splits"].values()) for key in ("rows", "images")},
        "guided": GUIDED & set(report["question_types"]),
        "gallery": GALLERY if (folder / GALLERY).is_file() else None,
    }
    write_terms(folder, report["sources"])
    write_card(
        folder,
        _environment().get_template("vqa_card.md.jinja").render(facts),
        {"default": Configuration("data", report["splits"], with_images=True)},
        language=list(languages),
        task_categories=["image-text-to-text"],
        tags=["dental", "medical", "vqa", "dentalgemma"],
        **name_dataset_terms(stated),
    )


def write_terms(folder: Path, sources: Sequence[Mapping]) -> None:
    """Write `LICENSE.md`: each source's licence, and what follows for the whole; `sources` are those of the report."""
    terms = combine_terms({source["name"]: source["license"] for source in sources if source["rows"]})
    text = _environment().get_template("licence.md.jinja").render(sources=sources, terms=terms)
    (folder / "LICENSE.md").write_text(text, encoding="utf-8")


def draw_bars(path: Path, counts: Mapping[str, Mapping[str, int]], axis: str) -> None:
    """Draw a bar for each name, the longest first, with the splits one after another, and write it as PNG."""
    from matplotlib.figure import Figure

    counts = dict(sorted(counts.items(), key=lambda item: -sum(item[1].values())))
    figure = Figure(figsize=(8, 1.4 + 0.3 * len(counts)), dpi=100, layout="constrained")
    axes = figure.subplots()
    places = range(len(counts))
    start = [0] * len(counts)
    for split, colour in COLOURS.items():
        own = [by_split.get(split, 0) for by_split in counts.values()]
        axes.barh(places, own, left=start, color=colour, label=split)
        start = [a + b for a, b in zip(start, own, strict=True)]
    for place, total in zip(places, start, strict=True):
        axes.annotate(f" {total:,}", (total, place), va="center", fontsize=8)
    axes.set_yticks(places, labels=list(counts), parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel(axis)
    axes.margins(x=0.08)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside upper left", ncols=len(COLOURS))  # a bar may reach any place inside
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Software": None})  # the same picture is the same file


def _of_splits(counts: Mapping[str, Mapping[str, int]], what: str) -> dict[str, int]:
    return {split: counts[split][what] for split in SPLITS if split in counts}


def _count_modalities(report: Mapping) -> list[tuple[str, int]]:
    counts: dict[str, int] = {}
    for source in report["sources"]:
        if source["images_built"]:
            counts[source["modality"]] = counts.get(source["modality"], 0) + source["images_built"]
    return [(MODALITIES[modality], number) for modality, number in counts.items()]


def _list_guesses(report: Mapping) -> list[dict]:
    """What guessing gets right and what balancing left out, for each question type; empty where nothing is reported."""
    shares, dropped = report.get("majority_answer_baseline", {}), report.get("dropped_by_balance", {})
    names = sorted({name for counts in (*shares.values(), *dropped.values()) for name in counts})
    return [
        {
            "name": name,
            "shares": {split: own[name] for split, own in shares.items() if name in own},
            "dropped": sum(own.get(name, 0) for own in dropped.values()),
        }
        for name in names
    ]


def _choose_examples(rows: Mapping[str, Sequence[Row]], seed: int) -> list[Row]:
    flat = (row for split in SPLITS for row in rows.get(split, ()))
    return list(islice(take_turns(flat, lambda row: row["question_type"], seed=seed), EXAMPLES))


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("data_builders", "pages"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.globals |= {"FAULTS": FAULTS, "LANGUAGES": LANGUAGES, "SPLITS": SPLITS, "find_licence": find_licence}
    environment.filters |= {"plain": escape_markdown, "quote": quote, "number": "{:,}".format, "link": link}
    return environment


def escape_markdown(text: object) -> str:
    """Text from data as Markdown that shows it and does nothing else; line breaks become blanks."""
    plain = HIDDEN.sub("", " ".join(str(text).split())).translate(str.maketrans(ENTITIES))
    return MARKDOWN.sub(r"\\\1", plain)


def quote(text: str, speaker: str) -> str:
    """What somebody says, from data, as a quotation that keeps its lines; none of them begins a list."""
    lines = (re.sub(r"^(?=[-+=])", r"\\", escape_markdown(line)) for line in text.splitlines())
    return f"> **{speaker}**: " + "  \n> ".join(lines)


def link(url: str | None) -> str:
    """A web address as a link; anything else as text."""
    if url and re.fullmatch(r"https?://[^\s<>()\[\]\"'`|\\]+", url):
        return f"<{url}>"
    return escape_markdown(url or "")
