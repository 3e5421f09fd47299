"""What is in the sources: counts, problems, duplicates and leaks. Reads, writes nothing."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace

from rich.console import Console
from rich.progress import track

from data_builders.dentition import is_fdi
from data_builders.images import ImageError, measure
from data_builders.readers import READERS
from data_builders.readers.cases import Case, read_cases
from data_builders.records import ImageRecord, Problem
from data_builders.sources import Source, SourcesFile
from data_builders.splits import Groups, original_stem


@dataclass(frozen=True)
class SourceContent:
    """All that one source holds: its images with what is measured of them, its cases, and what could not be used."""

    source: Source
    records: tuple[ImageRecord, ...]
    problems: tuple[Problem, ...]
    cases: tuple[Case, ...] = ()


def read_sources(sources_file: SourcesFile, *, workers: int = 2, progress: bool = True) -> list[SourceContent]:
    """Read every source and measure its images (decoded whole, `workers` at a time)."""
    return [read_source(source, workers=workers, progress=progress) for source in sources_file.sources]


def read_source(source: Source, *, workers: int = 2, progress: bool = True) -> SourceContent:
    """Read one source; an image that is missing or cannot be decoded keeps its findings but gets no `image_id`."""
    if source.reader == "cases":
        cases, problems = _sort_out(read_cases(source))
        return SourceContent(source, (), tuple(problems), tuple(cases))
    records, problems = _sort_out(READERS[source.reader](source))
    measured: list[ImageRecord] = []
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        results = track(
            pool.map(_measure, records),
            description=f"Reading {source.name}",
            total=len(records),
            console=Console(stderr=True),
            disable=not progress,
        )
        for result in results:
            record, found = result
            measured.append(record)
            problems += found
    problems += _check_patients(source, records)
    problems += pick_unique(measured)[1]
    problems += _check_counts(source, measured)
    problems += _check_teeth(measured)
    return SourceContent(source, tuple(measured), tuple(problems))


def _sort_out(items: Iterable) -> tuple[list, list[Problem]]:
    records, problems = [], []
    for item in items:
        (problems if isinstance(item, Problem) else records).append(item)
    return records, problems


def _measure(record: ImageRecord) -> tuple[ImageRecord, list[Problem]]:
    if not record.path.is_file():
        return record, []  # the reader reported it
    try:
        size = measure(record.path)
    except ImageError as error:
        return record, [Problem("image_unreadable", "error", record.path, None, f"{error}; the image is left out")]
    problems = []
    if size.is_deep:
        message = "has greys of more than 8 bits; it is stored as a PNG of 8 bits"
        problems.append(Problem("deep_greys", "info", record.path, None, message))
    return replace(record, width=size.width, height=size.height, image_id=size.image_id), problems


def _check_counts(source: Source, records: Sequence[ImageRecord]) -> Iterator[Problem]:
    """Compare with what the user knows of the source: a wrong class map gives other numbers of images."""
    for label, expected in source.expected_images.items():
        found = sum(label in {*record.rejected, *(f.label for f in record.findings)} for record in records)
        if found != expected:
            message = f"{found} images show {label}, {expected} are expected: is the class map right?"
            yield Problem("unexpected_count", "error", source.root, None, message)


def _check_teeth(records: Iterable[ImageRecord]) -> Iterator[Problem]:
    """A tooth number that stands twice on one image: one of the two is some other tooth."""
    for record in records:
        numbers = Counter(f.tooth for f in record.findings if f.label == "tooth" and f.tooth and is_fdi(f.tooth))
        if twice := sorted(number for number, count in numbers.items() if count > 1):
            message = f"tooth {', '.join(twice)} is annotated more than once; nothing is asked about completeness"
            yield Problem("duplicate_tooth", "warning", record.path, None, message)


def _check_patients(source: Source, records: Sequence[ImageRecord]) -> list[Problem]:
    """A pattern that fits no file name would silently group nothing."""
    if source.group is None:
        return []
    unmatched = [record.path.name for record in records if not re.search(source.group.pattern, record.path.name)]
    if not unmatched:
        return []
    message = f"group pattern {source.group.pattern!r} does not fit {len(unmatched)} of {len(records)} file names"
    return [Problem("group_pattern", "warning", source.root, None, f"{message}, for example {unmatched[0]}")]


def pick_unique(records: Iterable[ImageRecord]) -> tuple[list[ImageRecord], list[Problem]]:
    """Of the decoded images of one source that show the same pixels the first one, and a problem for the others.

    Where such files are annotated differently nobody knows which is right, and none is picked.
    """
    same_pixels: dict[str, list[ImageRecord]] = defaultdict(list)
    for record in records:
        if record.image_id:
            same_pixels[record.image_id].append(record)
    unique, problems = [], []
    for first, *others in same_pixels.values():
        names = ", ".join(other.path.name for other in others)
        if any(_labels(other) != _labels(first) for other in others):
            message = f"shows the same pixels as {names} but is annotated differently; all are left out"
            problems.append(Problem("contradicting_duplicate", "error", first.path, None, message))
            continue
        if others:
            message = f"shows the same pixels as {names}; built once"
            problems.append(Problem("duplicate_image", "warning", first.path, None, message))
        unique.append(first)
    return unique, problems


def _labels(record: ImageRecord) -> Counter:
    return Counter((finding.label, finding.tooth) for finding in record.findings)


def audit(sources_file: SourcesFile, *, workers: int = 2, progress: bool = True) -> dict:
    """Counts, problems, duplicates and leaks of all sources, ready for JSON."""
    contents = read_sources(sources_file, workers=workers, progress=progress)
    records = [record for content in contents for record in content.records]
    return {
        "sources": [describe(content) for content in contents],
        "duplicates": find_duplicates(records),
        "leaks": find_leaks(records),
    }


def describe(content: SourceContent) -> dict:
    """One source in numbers. Counted is all that stands in the annotation files: also labels mapped to null
    (`ignored`), shapes of no use (`rejected`; a problem says why), and findings on images that are missing.
    """
    classes: dict[str, dict[str, int]] = {}
    ignored: dict[str, dict[str, int]] = {}
    for record in content.records:
        _count_labels(classes, [*(finding.label for finding in record.findings), *record.rejected])
        _count_labels(ignored, record.ignored)
    return {
        "name": content.source.name,
        "reader": content.source.reader,
        "license": content.source.license,
        "images": len(content.records),
        "images_present": sum(record.image_id is not None for record in content.records),
        "cases": len(content.cases),
        "findings": sum(len(r.findings) + len(r.ignored) + len(r.rejected) for r in content.records),
        "rejected": sum(len(record.rejected) for record in content.records),
        "classes": dict(sorted(classes.items())),
        "ignored": dict(sorted(ignored.items())),
        "problems": [{**asdict(problem), "path": str(problem.path)} for problem in content.problems],
        "problem_counts": count_problems(content.problems),
    }


def _count_labels(counts: dict[str, dict[str, int]], labels: Iterable[str]) -> None:
    for label, number in Counter(labels).items():
        entry = counts.setdefault(label, {"images": 0, "findings": 0})
        entry["images"] += 1
        entry["findings"] += number


def count_problems(problems: Iterable[Problem]) -> dict[str, int]:
    """How many problems there are of each code."""
    return dict(sorted(Counter(problem.code for problem in problems).items()))


def find_duplicates(records: Iterable[ImageRecord]) -> list[dict]:
    """Files that show the same pixels, within and across sources."""
    by_pixels: dict[str, list[ImageRecord]] = defaultdict(list)
    for record in records:
        if record.image_id:
            by_pixels[record.image_id].append(record)
    return [
        {"image_id": image_id, "images": [_place(record) for record in same]}
        for image_id, same in sorted(by_pixels.items())
        if len({record.path for record in same}) > 1
    ]


def find_leaks(records: Iterable[ImageRecord]) -> list[dict]:
    """What a source's own splits (its `train`, `valid`, `test` folders) share: pixels, or a Roboflow original."""
    groups = Groups()
    declared = [record for record in records if record.declared_split]
    for number, record in enumerate(declared):
        stem = original_stem(record.path.stem)
        if record.image_id:
            groups.join(number, ("pixels", record.image_id))
        if stem:
            groups.join(number, ("original", record.source, stem))
    members: dict[object, list[ImageRecord]] = defaultdict(list)
    for number, record in enumerate(declared):
        members[groups.find(number)].append(record)
    leaking = [same for same in members.values() if len({record.declared_split for record in same}) > 1]
    return [{"images": [{**_place(record), "split": record.declared_split} for record in same]} for same in leaking]


def _place(record: ImageRecord) -> dict[str, str]:
    return {"source": record.source, "path": str(record.path)}
