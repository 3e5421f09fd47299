"""What is in the sources: counts, problems, evidence for the class map, duplicates, mosaics, leaks. Writes nothing."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace

from rich.console import Console
from rich.progress import track

from data_builders.alike import Alike, Comparison, Look, compare, look_at
from data_builders.augmentations import (
    describe_changes,
    find_changed,
    find_declared,
    states_locations,
    without_locations,
)
from data_builders.dentition import is_fdi
from data_builders.images import ImageError, measure_pixels
from data_builders.label_evidence import (
    check_names,
    check_synonyms,
    count_raw_labels,
    describe_places,
    shown_labels,
    suggest_class_map,
)
from data_builders.leaks import find_duplicates, find_leaks, measure_leaks, place_of
from data_builders.readers import READERS
from data_builders.readers.cases import Case, read_cases
from data_builders.readers.files import leaves_root, outward_link
from data_builders.records import Finding, ImageRecord, Problem
from data_builders.sources import Source, SourcesFile
from data_builders.splits import Groups

NOTHING_ALIKE = Comparison({}, ())
SAME_PLACE = 0.01  # of a side of the image


@dataclass(frozen=True)
class SourceContent:
    """All that one source holds: its images with what is measured of them, its cases, and what could not be used.

    `comparison` says which pictures of all sources are alike or mosaics, and is the same for every source that was read
    together; `looks` is what the comparison needs, and is empty after it.
    """

    source: Source
    records: tuple[ImageRecord, ...]
    problems: tuple[Problem, ...]
    cases: tuple[Case, ...] = ()
    comparison: Comparison = NOTHING_ALIKE
    looks: Mapping[str, Look] = field(default_factory=dict)


def read_sources(sources_file: SourcesFile, *, workers: int = 2, progress: bool = True) -> list[SourceContent]:
    """Read every source, measure its images (decoded whole, `workers` at a time) and compare all with each other.

    Mosaics and mirrored pictures come back with `locations=False`. What is alike belongs into one split: hand
    `find_alike(contents)` to `data_builders.splits.group_records`.
    """
    contents = [read_source(source, workers=workers, progress=progress) for source in sources_file.sources]
    vocabulary = sources_file.terms()
    looks = {image_id: look for content in contents for image_id, look in content.looks.items()}
    comparison = compare(looks)
    by_pixels: dict[str, list[ImageRecord]] = defaultdict(list)
    for content in contents:
        for record in content.records:
            by_pixels[record.image_id or ""].append(record)
    changed = find_changed(comparison, by_pixels)
    found: dict[str, list[Problem]] = defaultdict(list)
    for source_name, problem in describe_changes(comparison, by_pixels):
        found[source_name].append(problem)
    return [
        replace(
            content,
            records=tuple(without_locations(record, changed) for record in content.records),
            problems=(
                *content.problems,
                *check_names(content.source, content.records, vocabulary),
                *found[content.source.name],
            ),
            comparison=comparison,
            looks={},
        )
        for content in contents
    ]


def find_alike(contents: Sequence[SourceContent]) -> list[tuple[str, str]]:
    """The pairs of image ids that show the same picture, wholly or in part, and so belong into one split."""
    return sorted({(pair.first, pair.second) for content in contents for pair in content.comparison.alike})


def find_same_pictures(contents: Sequence[SourceContent]) -> Groups:
    """Which image ids show the same picture as a whole: a copy, mirrored or not; mosaics are not what they show."""
    pictures = Groups()
    for content in contents:
        for pair in content.comparison.alike:
            if pair.kind != "part":
                pictures.join(pair.first, pair.second)
    return pictures


def read_source(source: Source, *, workers: int = 2, progress: bool = True) -> SourceContent:
    """Read one source; an image that is missing or cannot be decoded keeps its findings but gets no `image_id`."""
    if source.reader == "cases":
        cases, problems = _sort_out(read_cases(source))
        return SourceContent(source, (), tuple(problems), tuple(cases))
    records, problems = _sort_out(READERS[source.reader](source))
    declared = list(find_declared(source))
    if declared and not states_locations(source):
        records = [replace(record, locations=False) for record in records]
    told = {(problem.path, problem.code) for problem in problems}  # some readers open the images too
    measured: list[ImageRecord] = []
    looks: dict[str, Look] = {}
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        results = track(
            pool.map(lambda record: _measure(source, record), records),
            description=f"Reading {source.name}",
            total=len(records),
            console=Console(stderr=True),
            disable=not progress,
        )
        for record, look, found in results:
            measured.append(record)
            problems += (problem for problem in found if (problem.path, problem.code) not in told)
            if look and record.image_id:
                looks[record.image_id] = look
    problems += declared
    problems += _check_patients(source, records)
    problems += pick_unique(measured)[1]
    problems += _check_counts(source, measured)
    problems += suggest_class_map(source, count_raw_labels(source, measured))
    problems += check_synonyms(source)
    problems += _check_teeth(measured)
    return SourceContent(source, tuple(measured), tuple(problems), looks=looks)


def _sort_out(items: Iterable) -> tuple[list, list[Problem]]:
    records, problems = [], []
    for item in items:
        (problems if isinstance(item, Problem) else records).append(item)
    return records, problems


def _measure(source: Source, record: ImageRecord) -> tuple[ImageRecord, Look | None, list[Problem]]:
    if record.path.is_symlink() and leaves_root(source, record.path):
        return record, None, [outward_link(record.path)]  # whoever made the path, it is not opened
    if not record.path.is_file():
        return record, None, []  # the reader reported it
    try:
        size, pixels = measure_pixels(record.path)
    except ImageError as error:
        problem = Problem(error.code, "error", record.path, None, f"{error}; the image is left out")
        return record, None, [problem]
    problems = []
    if size.is_deep:
        message = "has greys of more than 8 bits; it is stored as a PNG of 8 bits"
        problems.append(Problem("deep_greys", "info", record.path, None, message))
    record = replace(record, width=size.width, height=size.height, image_id=size.image_id)
    return record, look_at(pixels), problems


def _check_counts(source: Source, records: Sequence[ImageRecord]) -> Iterator[Problem]:
    """Compare with what the user knows of the source: a wrong class map gives other numbers of images."""
    for label, expected in source.expected_images.items():
        found = sum(label in shown_labels(record) for record in records)
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
    for same in same_pixels.values():
        first, *others = sorted(same, key=_is_silent)  # what says something before what says nothing
        names = ", ".join(other.path.name for other in others)
        if not all(_is_silent(other) or _are_annotated_alike(first, other) for other in others):
            message = f"shows the same pixels as {names} but is annotated differently; all are left out"
            problems.append(Problem("contradicting_duplicate", "error", first.path, None, message))
            continue
        if others:
            message = f"shows the same pixels as {names}; built once"
            problems.append(Problem("duplicate_image", "warning", first.path, None, message))
        unique.append(first)
    return unique, problems


def _is_silent(record: ImageRecord) -> bool:
    """Whether a record states nothing, neither what is there nor that something is not: it has no annotation file."""
    return not (record.findings or record.ignored or record.rejected or record.exhaustive)


def _are_annotated_alike(first: ImageRecord, second: ImageRecord) -> bool:
    """Whether each finding of one record is in the other as well."""
    left = list(second.findings)
    for finding in first.findings:
        match = next((number for number, other in enumerate(left) if _are_alike(finding, other)), None)
        if match is None:
            return False
        del left[match]
    return not left


def _are_alike(first: Finding, second: Finding) -> bool:
    """Whether two findings are the same, but for how an exporter rounds their places."""
    keys = ("label", "tooth", "shape", "attributes")
    if any(getattr(first, key) != getattr(second, key) for key in keys):
        return False
    if first.bounds is None or second.bounds is None:
        return first.bounds is second.bounds
    return all(abs(one - other) <= SAME_PLACE for one, other in zip(first.bounds, second.bounds, strict=True))


def audit(sources_file: SourcesFile, *, workers: int = 2, progress: bool = True) -> dict:
    """Counts, problems, duplicates, mosaics and leaks of all sources, ready for JSON."""
    return summarise(read_sources(sources_file, workers=workers, progress=progress))


def summarise(contents: Sequence[SourceContent]) -> dict:
    """What `audit` returns, of sources that were read together."""
    records = [record for content in contents for record in content.records]
    sources = {content.source.name: content.source for content in contents}
    comparison = contents[0].comparison
    by_id = {record.image_id: record for record in reversed(records)}
    return {
        "sources": [describe(content) for content in contents],
        "duplicates": find_duplicates(records),
        "near_duplicates": [_describe_pair(pair, by_id) for pair in comparison.alike if pair.kind != "part"],
        "mosaics": _describe_mosaics(comparison, records),
        "leaks": find_leaks(records, sources, find_alike(contents)),
        "leak_rates": measure_leaks(records, sources, find_alike(contents)),
    }


def _describe_mosaics(comparison: Comparison, records: Iterable[ImageRecord]) -> list[dict]:
    places: dict[str, list[dict]] = defaultdict(list)
    for record in records:
        places[record.image_id or ""].append(place_of(record))
    shows: dict[str, list[dict]] = defaultdict(list)
    for pair in comparison.alike:
        if pair.kind == "part":
            shows[pair.first].append(places[pair.second][0])
    return [
        {
            "image_id": image_id,
            "images": places[image_id],
            "cut_at": [round(crossing.x, 3), round(crossing.y, 3)],
            "shows": shows[image_id],
        }
        for image_id, crossing in comparison.mosaics.items()
    ]


def _describe_pair(pair: Alike, by_id: Mapping[str | None, ImageRecord]) -> dict:
    places = [place_of(by_id[pair.first]), place_of(by_id[pair.second])]
    return {"kind": pair.kind, "correlation": pair.correlation, "images": places}


def describe(content: SourceContent) -> dict:
    """One source in numbers. Counted is all that stands in the annotation files: also labels mapped to null
    (`ignored`), shapes of no use (`rejected`; a problem says why), and findings on images that are missing.
    """
    classes: dict[str, dict[str, int]] = {}
    ignored: dict[str, dict[str, int]] = {}
    for record in content.records:
        _count_labels(classes, shown_labels(record))
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
        "labels": count_raw_labels(content.source, content.records),
        "expected_images": dict(content.source.expected_images),
        "places": describe_places(content.records),
        "problems": [describe_problem(problem) for problem in content.problems],
        "problem_counts": count_problems(content.problems),
    }


def _count_labels(counts: dict[str, dict[str, int]], labels: Iterable[str]) -> None:
    for label, number in Counter(labels).items():
        entry = counts.setdefault(label, {"images": 0, "findings": 0})
        entry["images"] += 1
        entry["findings"] += number


def describe_problem(problem: Problem) -> dict:
    """A problem, ready for JSON."""
    return {**asdict(problem), "path": str(problem.path)}


def count_problems(problems: Iterable[Problem]) -> dict[str, int]:
    """How many problems there are of each code."""
    return dict(sorted(Counter(problem.code for problem in problems).items()))
