"""The VQA builder: from a sources file to a dataset folder in which every answer is carried by an annotation."""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from rich.progress import track

from data_builders.audit import (
    SourceContent,
    count_problems,
    describe_problem,
    find_alike,
    find_same_pictures,
    pick_unique,
    read_sources,
)
from data_builders.chat import SPLITS, Row
from data_builders.claims import place_findings
from data_builders.compose.rows import Chosen, Drafted, choose_rows, compose_rows
from data_builders.dataset_card import write_vqa_card
from data_builders.dataset_folder import (
    BLOCKING,
    BuildError,
    File,
    check_replaceable,
    new_folder,
    stop_on,
    write_jsonl,
    write_report,
    write_rows,
)
from data_builders.gallery import write_gallery
from data_builders.images import read_stored
from data_builders.label_evidence import shown_labels
from data_builders.licences import combine_terms
from data_builders.records import ImageRecord, Problem, Split
from data_builders.sources import Source, SourcesFile, Vocabulary
from data_builders.splits import group_records, split_groups


def build_vqa(
    sources_file: SourcesFile,
    out: Path,
    *,
    contents: Sequence[SourceContent] | None = None,
    seed: int | None = None,
    workers: int = 2,
    strict: bool = False,
    gallery: int = 200,
    progress: bool = True,
) -> dict:
    """Build the dataset folder `out` and return its build report, to which the list of `problems` is added.

    Findings and images with a problem are left out and counted; with `strict` any error stops the build instead. The
    report in the folder holds counts alone, since the paths of problems may name patients. `contents` is what
    `audit.read_sources` gave, where the sources were read already. `gallery` is how many images its page shows at
    most; 0 for none.

    Raises:
        BuildError: when a label is outside the class map, when nothing is left to build, or, with `strict`, on errors.
    """
    check_replaceable(out)
    seed = sources_file.seed if seed is None else seed
    if not sources_file.detector_findings:
        by_humans = tuple(source for source in sources_file.sources if source.origin == "human")
        sources_file = sources_file.model_copy(update={"sources": by_humans})
    if contents is not None:
        contents = [content for content in contents if content.source in sources_file.sources]
    else:
        contents = read_sources(sources_file, workers=workers, progress=progress)
    records = _pick_usable(sources_file, contents, strict=strict)
    sources = {source.name: source for source in sources_file.sources}
    shown = Shown(contents)
    groups = group_records(records, sources, find_alike(contents))
    records = _with_groups(records, groups, shown, sources_file.terms())
    composed = _compose_all(records, shown, sources_file, sources, seed, progress=progress)
    splits, kept = _split_and_balance(composed, sources_file, seed)
    rows = {split: own.rows for split, own in kept.items()}
    pictures = Pictures(records)
    with new_folder(out) as folder:
        written = write_rows(folder, rows, pictures.read, workers=workers, progress=progress)
        documents = list(_records((record for record, _ in composed), splits))
        write_jsonl(folder / "records.jsonl", documents)
        if sources_file.vocabulary:
            shutil.copyfile(sources_file.vocabulary, folder / "vocabulary.yaml")
        vocabulary = sources_file.terms()
        if gallery:
            write_gallery(folder, rows, documents, pictures.read, vocabulary=vocabulary, limit=gallery, seed=seed)
        problems = {c.source.name: [*c.problems, *pictures.problems(c.source.name)] for c in contents}
        report = _report(contents, problems, rows, documents, written) | {"seed": seed}
        report["dropped_by_balance"] = {split: dict(own.dropped) for split, own in kept.items()}
        report["majority_answer_baseline"] = {split: dict(kept[split].baselines) for split in written}
        report["empty_splits"] = [s for s in SPLITS if getattr(sources_file.split, s) and s not in written]
        write_vqa_card(folder, report, rows, vocabulary=vocabulary, languages=sources_file.languages)
        write_report(folder, report)
    return report | {"problems": [describe_problem(problem) for own in problems.values() for problem in own]}


def _pick_usable(sources_file: SourcesFile, contents: Sequence[SourceContent], *, strict: bool) -> list[ImageRecord]:
    """The images that can be built."""
    problems = [problem for content in contents for problem in content.problems]
    stop_on([p for p in problems if p.code in BLOCKING or (strict and p.severity == "error")])
    records = [record for content in contents for record in pick_unique(content.records)[0]]
    if not records:
        raise BuildError(f"{sources_file.path}: no image can be built; run `dentalgemma audit` to see why")
    return records


def _split_and_balance(
    composed: Sequence[tuple[ImageRecord, list[Drafted]]], sources_file: SourcesFile, seed: int
) -> tuple[dict[str, Split], dict[str, Chosen]]:
    """The split of each group, and the rows that stay in each split."""
    splits = split_groups(
        [record.group_id for record, _ in composed],
        [record.source for record, _ in composed],
        shares=sources_file.split,
        seed=seed,
    )
    by_split: dict[str, list[Drafted]] = {split: [] for split in SPLITS}
    for record, rows in composed:
        by_split[splits[record.group_id]] += rows
    kept = choose_rows(by_split, sources_file, seed=seed)
    if not any(own.rows for own in kept.values()):
        raise BuildError(f"{sources_file.path}: the annotations support no question; run `dentalgemma audit`")
    return splits, kept


class Pictures:
    """The image files of a build, read by image id; remembers which ones their metadata turned."""

    def __init__(self, records: Sequence[ImageRecord]) -> None:
        self._records = {record.image_id: record for record in reversed(records)}  # the first source's, if several
        self._turned: set[str] = set()

    def read(self, image_id: str) -> File:
        """Name and content as they are stored."""
        stored = read_stored(self._records[image_id].path)
        if stored.turned:
            self._turned.add(image_id)
        return f"{image_id[:16]}{stored.suffix}", stored.content

    def problems(self, source: str) -> Iterator[Problem]:
        """A note on every picture of a source that could not keep its own bytes since its metadata turned it."""
        for image_id in sorted(self._turned):
            record = self._records[image_id]
            if record.source == source:
                message = (
                    "is turned by its metadata, so it is stored as a larger PNG of what is displayed; to keep its own "
                    "bytes, turn it without loss first, for example with `jpegtran -rotate`"
                )
                yield Problem("orientation_baked", "info", record.path, None, message)


class Shown:
    """What all annotations of a picture show, also those of its copies and of files that are not built."""

    def __init__(self, contents: Sequence[SourceContent]) -> None:
        self._pictures = find_same_pictures(contents)
        self._told: dict[Hashable, set[tuple[str, str, int]]] = defaultdict(set)  # source, label, how many
        for content in contents:
            for record in content.records:
                if record.image_id:
                    told = Counter(shown_labels(record)).items()
                    picture = self._pictures.find(record.image_id)
                    self._told[picture].update((record.source, label, number) for label, number in told)

    def elsewhere(self, record: ImageRecord) -> set[str]:
        """The labels that others show on the same picture: other sources, and copies in its own source.

        A copy with as many of a label was annotated together with the record, and tells nothing new of it.
        """
        own = Counter(shown_labels(record))
        told = self._told[self._pictures.find(record.image_id)]
        return {label for source, label, number in told if source != record.source or number != own[label]}


def _with_groups(
    records: Sequence[ImageRecord], groups: Sequence[str], shown: Shown, vocabulary: Vocabulary
) -> list[ImageRecord]:
    """Give each record its group and finding ids without file names.

    A label also ceases to be deniable where it is shown elsewhere on the same picture, or where something is shown that
    the vocabulary calls not free of it: what has deep caries has caries.
    """
    ready = []
    for record, group_id in zip(records, groups, strict=True):
        own = {finding.label for finding in record.findings}
        elsewhere = shown.elsewhere(record)
        not_free_of = {name for label in own | elsewhere for name in vocabulary[label].not_free_of} - own
        deniable = tuple(label for label in record.exhaustive if label not in elsewhere | not_free_of)
        findings = tuple(
            replace(finding, finding_id=f"{record.source}/{(record.image_id or '')[:12]}/{number}", where="")
            for number, finding in enumerate(record.findings)
        )
        ready.append(replace(record, group_id=group_id, exhaustive=deniable, findings=findings))
    return sorted(ready, key=lambda record: (record.source, record.image_id or ""))


def _compose_all(
    records: Sequence[ImageRecord],
    shown: Shown,
    sources_file: SourcesFile,
    sources: Mapping[str, Source],
    seed: int,
    *,
    progress: bool,
) -> list[tuple[ImageRecord, list[Drafted]]]:
    """The images that something is asked about, with their rows; others must not take a place in a split."""
    composed = []
    for record in track(records, "Composing", console=Console(stderr=True), disable=not progress):
        rows = list(compose_rows(record, sources[record.source], sources_file, seed, shown.elsewhere(record)))
        if rows:
            composed.append((record, rows))
    return composed


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
    problems: Mapping[str, Sequence[Problem]],
    rows: Mapping[str, Sequence[Row]],
    documents: Sequence[Mapping],
    written: Mapping[str, Mapping[str, int]],
) -> dict:
    """What was built, in numbers: no file names, which may be those of patients."""
    own_rows: dict[str, list[Row]] = defaultdict(list)
    types: dict[str, Counter[str]] = defaultdict(Counter)
    for split, split_rows in rows.items():
        for row in split_rows:
            own_rows[row["source"]].append(row)
            types[row["question_type"]][split] += 1
    sources = [
        {
            "name": source.name,
            "reader": source.reader,
            "license": source.license,
            "url": source.url,
            "modality": source.modality,
            "origin": source.origin,
            "patients": "by file name" if source.group else "unknown",
            "images_read": len(content.records),
            "images_built": len({row["image_id"] for row in own_rows[source.name]}),
            "rows": len(own_rows[source.name]),
            "problem_counts": count_problems(problems[source.name]),
            "fault_counts": count_problems(p for p in problems[source.name] if p.severity != "info"),
        }
        for content in contents
        for source in [content.source]
    ]
    asked = {(row["source"], row["image_id"]) for own in own_rows.values() for row in own}
    all_problems = [problem for own in problems.values() for problem in own]
    terms = combine_terms({source["name"]: source["license"] for source in sources if source["rows"]})
    return {
        "splits": dict(written),
        "sources": sources,
        "terms": terms.verdict,
        "findings": _count_findings(d for d in documents if (d["source"], d["image_id"]) in asked),
        "question_types": {name: counts.total() for name, counts in sorted(types.items())},
        "question_types_by_split": {name: dict(counts) for name, counts in sorted(types.items())},
        "problem_counts": count_problems(all_problems),
        "severities": dict(sorted(Counter(problem.severity for problem in all_problems).items())),
    }


def _count_findings(documents: Iterable[Mapping]) -> dict[str, dict[str, dict[str, int]]]:
    """Images and findings of every label in every split."""
    counts: dict[str, dict[str, dict[str, int]]] = defaultdict(
        lambda: defaultdict(lambda: {"images": 0, "findings": 0})
    )
    for document in documents:
        for label, number in Counter(finding["label"] for finding in document["findings"]).items():
            counts[label][document["split"]]["images"] += 1
            counts[label][document["split"]]["findings"] += number
    return {label: dict(by_split) for label, by_split in sorted(counts.items())}
