"""The VQA builder: from a sources file to a dataset folder in which every answer is carried by an annotation."""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from rich.progress import track

from data_builders.audit import SourceContent, count_problems, pick_unique, read_sources
from data_builders.chat import SPLITS, Row
from data_builders.claims import place_findings
from data_builders.compose.questions import Pair
from data_builders.compose.rows import balance, compose_rows
from data_builders.dataset_folder import (
    BuildError,
    new_folder,
    stop_on,
    write_card,
    write_jsonl,
    write_report,
    write_rows,
)
from data_builders.images import read_stored
from data_builders.records import ImageRecord
from data_builders.sources import Source, SourcesFile, Vocabulary
from data_builders.splits import group_records, split_groups

BLOCKING = ("class_map_incomplete", "names_missing", "label_attribute_needed")  # what only the user can settle


def build_vqa(
    sources_file: SourcesFile,
    out: Path,
    *,
    seed: int | None = None,
    workers: int = 2,
    strict: bool = False,
    progress: bool = True,
) -> dict:
    """Build the dataset folder `out` and return its build report.

    Findings and images with a problem are left out and counted; with `strict` any error stops the build instead.

    Raises:
        BuildError: when a label is outside the class map, when nothing is left to build, or, with `strict`, on errors.
    """
    seed = sources_file.seed if seed is None else seed
    contents = read_sources(sources_file, workers=workers, progress=progress)
    problems = [problem for content in contents for problem in content.problems]
    stop_on([p for p in problems if p.code in BLOCKING or (strict and p.severity == "error")])
    records = [record for content in contents for record in pick_unique(content.records)[0]]
    if not records:
        raise BuildError(f"{sources_file.path}: no image can be built; run `dentalgemma audit` to see why")
    sources = {source.name: source for source in sources_file.sources}
    records = _with_groups(records, sources, sources_file.terms())
    composed = _compose_all(records, sources_file, sources, seed, progress=progress)
    splits = split_groups(
        [record.group_id for record, _ in composed],
        [record.source for record, _ in composed],
        shares=sources_file.split,
        seed=seed,
    )
    by_split: dict[str, list[tuple[Row, Pair]]] = {split: [] for split in SPLITS}
    for record, rows in composed:
        by_split[splits[record.group_id]] += rows
    balanced = {split: balance(items) for split, items in by_split.items()}
    if not any(balanced.values()):
        raise BuildError(f"{sources_file.path}: the annotations support no question; run `dentalgemma audit`")
    paths = {record.image_id: record.path for record in reversed(records)}
    with new_folder(out) as folder:
        written = write_rows(folder, balanced, lambda image_id: _read_image(image_id, paths[image_id]))
        write_jsonl(folder / "records.jsonl", _records((record for record, _ in composed), splits))
        if sources_file.vocabulary:
            shutil.copyfile(sources_file.vocabulary, folder / "vocabulary.yaml")
        report = _report(contents, balanced, written, seed)
        report["empty_splits"] = [s for s in SPLITS if getattr(sources_file.split, s) and s not in written]
        body = _card(report, sources_file)
        write_card(
            folder,
            body,
            written,
            with_images=True,
            language=list(sources_file.languages),
            task_categories=["image-text-to-text"],
            tags=["dental", "medical", "vqa", "dentalgemma"],
            license="other",
            license_name="per-source",
            license_link="#sources-and-licences",
        )
        write_report(folder, report)
    return report


def _with_groups(
    records: Sequence[ImageRecord], sources: Mapping[str, Source], vocabulary: Vocabulary
) -> list[ImageRecord]:
    """Give each record its group and finding ids without file names.

    A label also ceases to be deniable where another source shows it on the same picture, or where something is shown
    that the vocabulary calls not free of it: what has deep caries has caries.
    """
    shown = _shown_labels(records)
    ready = []
    for record, group_id in zip(records, group_records(records, sources), strict=True):
        own = {finding.label for finding in record.findings}
        elsewhere = {label for source, label in shown[record.image_id] if source != record.source}
        not_free_of = {name for label in own | elsewhere for name in vocabulary[label].not_free_of} - own
        deniable = tuple(label for label in record.exhaustive if label not in elsewhere | not_free_of)
        findings = tuple(
            replace(finding, finding_id=f"{record.source}/{(record.image_id or '')[:12]}/{number}", where="")
            for number, finding in enumerate(record.findings)
        )
        ready.append(replace(record, group_id=group_id, exhaustive=deniable, findings=findings))
    return sorted(ready, key=lambda record: (record.source, record.image_id or ""))


def _shown_labels(records: Iterable[ImageRecord]) -> dict[str | None, set[tuple[str, str]]]:
    """Source and label of everything that is shown on a picture, over all sources."""
    shown: dict[str | None, set[tuple[str, str]]] = defaultdict(set)
    for record in records:
        shown[record.image_id].update((record.source, finding.label) for finding in record.findings)
    return shown


def _compose_all(
    records: Sequence[ImageRecord],
    sources_file: SourcesFile,
    sources: Mapping[str, Source],
    seed: int,
    *,
    progress: bool,
) -> list[tuple[ImageRecord, list[tuple[Row, Pair]]]]:
    """The images that something is asked about, with their rows; others must not take a place in a split."""
    shown = _shown_labels(records)
    composed = []
    for record in track(records, "Composing", console=Console(stderr=True), disable=not progress):
        elsewhere = {label for source, label in shown[record.image_id] if source != record.source}
        rows = list(compose_rows(record, sources[record.source], sources_file, seed, elsewhere))
        if rows:
            composed.append((record, rows))
    return composed


def _read_image(image_id: str, path: Path) -> tuple[str, bytes]:
    suffix, content = read_stored(path)
    return f"{image_id[:16]}{suffix}", content


def _records(records: Iterable[ImageRecord], splits: Mapping[str, str]) -> Iterator[dict]:
    """What the checker, the gallery, probes and clinical scores need to know of each image; no file names."""
    for record in records:
        findings = []
        for item in place_findings(record):
            document = {**asdict(item.finding), "region": item.region}
            document.pop("where")
            findings.append(document)
        yield {
            "image_id": record.image_id,
            "source": record.source,
            "group_id": record.group_id,
            "split": splits[record.group_id],
            "modality": record.modality,
            "width": record.width,
            "height": record.height,
            "locations": record.locations,
            "exhaustive": list(record.exhaustive),
            "findings": findings,
        }


def _report(
    contents: Sequence[SourceContent],
    rows: Mapping[str, Sequence[Row]],
    written: Mapping[str, Mapping[str, int]],
    seed: int,
) -> dict:
    all_rows = [row for split_rows in rows.values() for row in split_rows]
    sources = []
    for content in contents:
        own = [row for row in all_rows if row["source"] == content.source.name]
        sources.append(
            {
                "name": content.source.name,
                "reader": content.source.reader,
                "license": content.source.license,
                "url": content.source.url,
                "modality": content.source.modality,
                "patients": "by file name" if content.source.group else "unknown",
                "images_read": len(content.records),
                "images_built": len({row["image_id"] for row in own}),
                "rows": len(own),
                "problem_counts": count_problems(content.problems),
            }
        )
    problems = [problem for content in contents for problem in content.problems]
    return {
        "seed": seed,
        "splits": dict(written),
        "sources": sources,
        "question_types": dict(sorted(Counter(row["question_type"] for row in all_rows).items())),
        "problem_counts": count_problems(problems),
        "severities": dict(sorted(Counter(problem.severity for problem in problems).items())),
    }


def _card(report: Mapping, sources_file: SourcesFile) -> str:
    lines = [
        "# Dental VQA dataset",
        "",
        "Questions and answers on dental images, composed from annotations with "
        "[DentalGemma](https://github.com/dentalgemma/dentalgemma). Every statement of an answer is worded from a "
        "claim in the column `claims`, which names the annotations behind it; `records.jsonl` holds those.",
        "",
        "| split | rows | images |",
        "| --- | ---: | ---: |",
        *(f"| {split} | {counts['rows']} | {counts['images']} |" for split, counts in report["splits"].items()),
        "",
        "No identical picture and no original behind augmented copies lies in two splits; no patient either, where the "
        "column *patients* says how file names tell them.",
        "",
        "## Sources and licences",
        "",
        "| source | format | images | rows | patients | licence |",
        "| --- | --- | ---: | ---: | --- | --- |",
    ]
    for source in report["sources"]:
        licence = source["license"] or "not stated"
        lines.append(
            f"| {source['name']} | {source['reader']} | {source['images_built']} | {source['rows']} "
            f"| {source['patients']} | {licence} |"
        )
    lines += [
        "",
        "The rows of each source stay under that source's licence. A licence that is not stated grants nothing.",
        "",
        "## Question types",
        "",
        *(f"- `{name}`: {count}" for name, count in report["question_types"].items()),
        "",
        "## Limits",
        "",
        'Answers say what was annotated, no more: "no sign of" appears only for conditions that the source annotates '
        "exhaustively. Regions of a panoramic are derived from where a box lies and are approximate near their "
        "borders. Not for diagnosis; for research and education.",
        "",
        f"Built from `{sources_file.path.name}` with seed {report['seed']}.",
    ]
    return "\n".join(lines) + "\n"
