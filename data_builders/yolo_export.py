"""Records as a dataset that Ultralytics trains a detector on: images, label files, `data.yaml`.

To a detector everything that is not marked is background. An image on which nothing is marked therefore goes along only
where its source is exhaustive for every exported class, and what a detector found itself is never exported as truth.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import shapely
import yaml
from rich.console import Console
from rich.progress import track

from data_builders.audit import count_problems, find_alike, pick_unique, read_sources
from data_builders.chat import SPLITS
from data_builders.dataset_folder import BLOCKING, BuildError, check_replaceable, new_folder, stop_on, write_report
from data_builders.dentition import DECIDUOUS, PERMANENT, TOOTH_TYPES
from data_builders.images import read_stored
from data_builders.readers.geometry import AREAS, box_ring
from data_builders.records import Finding, ImageRecord, Problem, Ring, Split
from data_builders.sources import SourcesFile
from data_builders.splits import group_records, split_groups

Task = Literal["detect", "segment", "obb"]
ClassesFrom = Literal["label", "tooth"]
TEETH = (*PERMANENT, *DECIDUOUS, *TOOTH_TYPES)
FOLDERS: dict[Split, str] = {"train": "train", "validation": "val", "test": "test"}
CACHES = tuple(f"labels/{name}.cache" for name in FOLDERS.values())  # what Ultralytics keeps of label files


class Exported(NamedTuple):
    """What was written, and what could not be: `report` is also in the folder, `problems` name files and are not."""

    report: dict
    problems: tuple[Problem, ...]


class Marked(NamedTuple):
    """One object of a label file: its class, and its outline in fractions of the image."""

    name: str
    ring: Ring


@dataclass
class Picture:
    """One picture with what all sources mark on it."""

    records: list[ImageRecord]
    marks: list[Marked]

    @property
    def image_id(self) -> str:
        """SHA-256 of the pixels."""
        assert self.records[0].image_id is not None
        return self.records[0].image_id

    def is_negative(self, deniable: Iterable[str]) -> bool:
        """Whether somebody looked for all of these here and found nothing."""
        shown = any(record.findings or record.rejected for record in self.records)
        stated = {label for record in self.records for label in record.exhaustive}
        return not shown and stated >= set(deniable)


def export_yolo(
    sources_file: SourcesFile,
    out: Path,
    *,
    task: Task = "detect",
    classes: ClassesFrom = "label",
    seed: int | None = None,
    workers: int = 2,
    progress: bool = True,
) -> Exported:
    """Write the sources as an Ultralytics dataset to the folder `out`: `images/`, `labels/`, `data.yaml`.

    Classes are the findings' names in the order of the vocabulary, or with `classes="tooth"` tooth numbers. What a
    detector found is left out, whatever `detector_findings` says. No patient, original or picture lies in two splits.
    Images are copies, never links: Ultralytics rewrites JPEGs that it finds cut short.

    Raises:
        BuildError: when a label is outside the class map, or no finding can be exported.
    """
    if task not in get_args(Task) or classes not in get_args(ClassesFrom):
        raise BuildError(f"task is one of {get_args(Task)} and classes one of {get_args(ClassesFrom)}")
    check_replaceable(out, apart_from=CACHES)
    seed = sources_file.seed if seed is None else seed
    contents = read_sources(sources_file, workers=workers, progress=progress)
    problems = [problem for content in contents for problem in content.problems]
    stop_on([problem for problem in problems if problem.code in BLOCKING])
    records = [record for content in contents for record in pick_unique(content.records)[0]]
    sources = {source.name: source for source in sources_file.sources}
    groups = group_records(records, sources, find_alike(contents))
    records = [replace(record, group_id=group) for record, group in zip(records, groups, strict=True)]
    pictures = _collect(records, task, classes, problems)
    names = _class_names(pictures, TEETH if classes == "tooth" else tuple(sources_file.terms()))
    if not names:
        raise BuildError(
            f"{sources_file.path}: no finding can be exported; run `dentalgemma audit` to see what is there"
        )
    deniable = ("tooth",) if classes == "tooth" else names
    pictures = _choose(pictures, deniable, problems)
    problems += _say_what_is_background(sources_file, deniable, pictures)
    by_split = _split(pictures, sources_file, seed)
    report = {
        "seed": seed,
        "task": task,
        "names": list(names),
        "splits": {split: _count(members) for split, members in by_split.items() if members},
        "empty_splits": [split for split in SPLITS if getattr(sources_file.split, split) and not by_split[split]],
        "problem_counts": count_problems(problems),
    }
    _drop_caches(Path(out))
    with new_folder(out) as folder:
        for split, members in by_split.items():
            _write_split(folder, FOLDERS[split], members, names, task, progress=progress)
        _write_data_yaml(folder, names, with_test=bool(by_split["test"]))
        write_report(folder, report)
    return Exported(report, tuple(problems))


def _collect(
    records: Sequence[ImageRecord], task: Task, classes: ClassesFrom, problems: list[Problem]
) -> list[Picture]:
    """The distinct pictures in the order of their names, with the outlines that all sources give."""
    pictures: dict[str, Picture] = {}
    for record in records:
        marks = list(_marks(record, task, classes, problems))
        picture = pictures.setdefault(record.image_id or "", Picture([], []))
        if picture.records:
            message = f"is in source {picture.records[0].source!r} too; what both mark is in one label file"
            problems.append(Problem("image_in_several_sources", "info", record.path, None, message))
        picture.records.append(record)
        picture.marks += marks
    for picture in pictures.values():
        distinct = list(dict.fromkeys(picture.marks))
        if twice := len(picture.marks) - len(distinct):
            message = f"{twice} objects are marked twice in the same place; written once"
            problems.append(Problem("marked_twice", "info", picture.records[0].path, None, message))
        picture.marks = distinct
    return [pictures[image_id] for image_id in sorted(pictures)]


def _marks(record: ImageRecord, task: Task, classes: ClassesFrom, problems: list[Problem]) -> Iterator[Marked]:
    """The outlines of one record's findings; one problem for each reason why some have none."""
    left_out: dict[str, Counter[str]] = defaultdict(Counter)
    for finding in record.findings:
        name = finding.label if classes == "label" else finding.tooth
        if finding.origin == "model":
            left_out["model_finding"][finding.label] += 1
        elif finding.shape not in AREAS or not finding.parts:
            left_out["no_area"][finding.shape] += 1
        elif name is None:
            left_out["no_tooth"][finding.label] += 1
        else:
            assert record.width and record.height
            yield Marked(name, outline(finding, task, (record.width, record.height)))
    reasons = {
        "model_finding": "were found by a detector and are no truth to train another on",
        "no_area": "enclose no area",
        "no_tooth": "name no tooth",
    }
    for code, counts in left_out.items():
        what = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
        problems.append(Problem(code, "warning", record.path, None, f"{what}: {reasons[code]}; not exported"))


def outline(finding: Finding, task: Task, size: tuple[int, int]) -> Ring:
    """The outline that a task's label line holds, in fractions; `size` is the image's width and height in pixels."""
    assert finding.bounds is not None
    if task == "segment":
        return _join(finding.parts)
    if task == "detect" or finding.shape == "box":
        return box_ring(*finding.bounds)
    if finding.shape == "oriented_box":
        return finding.parts[0]
    return _smallest_rectangle(finding.parts, size) or box_ring(*finding.bounds)


def _smallest_rectangle(parts: Sequence[Ring], size: tuple[int, int]) -> Ring | None:
    """The rectangle of the smallest area around the parts, which may reach over the edge of the image.

    `None` where it is wider or higher than the image: for such a label Ultralytics leaves out the whole image.
    """
    # Right angles and areas are those of the pixels: in fractions of a panoramic, twice as wide as high, they are not.
    points = [(x * size[0], y * size[1]) for ring in parts for x, y in ring]
    corners = shapely.oriented_envelope(shapely.MultiPoint(points)).exterior.coords[:-1]
    xs, ys = [x / size[0] for x, _ in corners], [y / size[1] for _, y in corners]
    too_large = max(xs) - min(xs) > 1 or max(ys) - min(ys) > 1
    return None if too_large else tuple(zip(xs, ys, strict=True))


def _join(parts: Sequence[Ring]) -> Ring:
    """One outline for a finding of several parts: a label line has room for one.

    They are joined where they come nearest, there and back, so that the joint has no area.
    """
    if len(parts) == 1:
        return parts[0]
    merged = shapely.union_all([shapely.Polygon(ring) for ring in parts])
    rings = [piece.exterior.coords[:-1] for piece in getattr(merged, "geoms", [merged])]
    joined = list(rings[0])
    for ring in rings[1:]:
        gaps = np.linalg.norm(np.array(joined)[:, None] - np.array(ring)[None], axis=2)
        here, there = np.unravel_index(gaps.argmin(), gaps.shape)
        joined[here : here + 1] = [joined[here], *ring[there:], *ring[: there + 1], joined[here]]
    return tuple(joined)


def _class_names(pictures: Iterable[Picture], order: Sequence[str]) -> tuple[str, ...]:
    present = {mark.name for picture in pictures for mark in picture.marks}
    return tuple(name for name in order if name in present)


def _choose(pictures: Iterable[Picture], deniable: Sequence[str], problems: list[Problem]) -> list[Picture]:
    """The pictures with marks, and those of which it is known that there is nothing to mark."""
    chosen: list[Picture] = []
    left_out: dict[str, list[Path]] = defaultdict(list)
    for picture in pictures:
        if picture.marks or picture.is_negative(deniable):
            chosen.append(picture)
        else:
            left_out[picture.records[0].source].append(picture.records[0].path)
    for source, paths in left_out.items():
        message = (
            f"{len(paths)} images of source {source!r}, this one first, have nothing to mark and are not known to be "
            "free of all exported classes; left out"
        )
        problems.append(Problem("no_negative", "info", paths[0], None, message))
    return chosen


def _say_what_is_background(
    sources_file: SourcesFile, deniable: Sequence[str], pictures: Iterable[Picture]
) -> Iterator[Problem]:
    """What a source does not annotate exhaustively may be on its images unmarked, and is learned as background."""
    used = {record.source for picture in pictures for record in picture.records}
    for source in sources_file.sources:
        missing = [name for name in deniable if name not in source.exhaustive]
        if source.name in used and source.origin == "human" and missing:
            message = (
                f"source {source.name!r} is not exhaustive for {', '.join(missing)}: where its images show them "
                "unmarked, a detector learns them as background; complete its annotations, or export it apart"
            )
            yield Problem("partly_marked", "warning", source.root, None, message)


def _split(pictures: Sequence[Picture], sources_file: SourcesFile, seed: int) -> dict[Split, list[Picture]]:
    groups = [picture.records[0].group_id or "" for picture in pictures]
    homes = [picture.records[0].source for picture in pictures]
    splits = split_groups(groups, homes, shares=sources_file.split, seed=seed)
    by_split: dict[Split, list[Picture]] = {split: [] for split in SPLITS}
    for picture, group in zip(pictures, groups, strict=True):
        by_split[splits[group]].append(picture)
    return by_split


def _count(pictures: Sequence[Picture]) -> dict[str, int]:
    marks = [len(picture.marks) for picture in pictures]
    return {"images": len(marks), "findings": sum(marks), "negatives": marks.count(0)}


def _drop_caches(out: Path) -> None:
    """Remove what Ultralytics kept of an earlier export's labels, which is void; the folder is known to be ours."""
    for name in CACHES:
        (out / name).unlink(missing_ok=True)


def _write_split(
    folder: Path, name: str, pictures: Sequence[Picture], names: Sequence[str], task: Task, *, progress: bool
) -> None:
    images, labels = folder / "images" / name, folder / "labels" / name
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    class_ids = {name: number for number, name in enumerate(names)}
    for picture in track(pictures, f"Writing {name}", console=Console(stderr=True), disable=not progress):
        stored = read_stored(picture.records[0].path)
        stem = picture.image_id[:16]
        (images / f"{stem}{stored.suffix}").write_bytes(stored.content)
        lines = (f"{class_ids[mark.name]} {_numbers(mark.ring, task)}\n" for mark in picture.marks)
        (labels / f"{stem}.txt").write_text("".join(lines), encoding="utf-8")


def _numbers(ring: Ring, task: Task) -> str:
    if task == "detect":
        (left, top), _, (right, bottom), _ = ring
        values = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
    else:
        values = [value for point in ring for value in point]
    return " ".join(f"{value:.8f}" for value in values)


def _write_data_yaml(folder: Path, names: Sequence[str], *, with_test: bool) -> None:
    # Without `path` Ultralytics takes the folder of data.yaml; `path: .` would be the folder it was started in.
    document: Mapping = {
        "train": f"images/{FOLDERS['train']}",
        "val": f"images/{FOLDERS['validation']}",
        **({"test": f"images/{FOLDERS['test']}"} if with_test else {}),
        "names": dict(enumerate(names)),
    }
    (folder / "data.yaml").write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
