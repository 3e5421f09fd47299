"""One folder per class: labels without geometry, and the same picture often under several of them."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from data_builders.images import find_images
from data_builders.readers.drafts import LabelBook
from data_builders.readers.files import SPLITS, declared_split, drop_outward_links, nothing_found
from data_builders.readers.quarantine import quarantine_dicom
from data_builders.records import Finding, ImageRecord, Problem
from data_builders.sources import Source, UnknownLabel


@quarantine_dicom
def read_class_folders(source: Source) -> Iterator[ImageRecord | Problem]:
    """Yield one record per picture, with a finding for each class folder that holds it, and a problem for the rest.

    Files with equal bytes are one picture; equal names alone are not, since many sets number each folder from 1.
    """
    book = LabelBook(source)
    problems: list[Problem] = []
    root = source.root / (source.images or "")
    images = []
    for path in drop_outward_links(source, find_images(root), problems):
        if path.parent == root or path.parent.name.lower() in SPLITS:
            problems.append(Problem("image_without_class", "error", path, None, "lies in no class folder; not read"))
        else:
            images.append(path)
    problems += _empty_folders(root, images)
    unknown: Counter[Path] = Counter()
    pictures = _group_copies(source, images)
    problems += _same_names(source, pictures)
    if not images:
        problems.append(nothing_found(source, "image in a class folder"))
    yield from problems
    for copies in pictures:
        yield from _read_picture(book, copies, unknown)
    for folder in sorted(unknown):
        message = f"folder {folder.name!r} is not in the class map; {unknown[folder]} images lie in it"
        yield Problem("unknown_label", "error", folder, None, message)
    yield from book.problems()


def _read_picture(book: LabelBook, copies: list[Path], unknown: Counter[Path]) -> Iterator[ImageRecord | Problem]:
    source = book.source
    findings, ignored, labels = [], [], []
    flawed = False
    for path in {copy.parent: copy for copy in reversed(copies)}.values():  # the first of each folder
        try:
            raw, label = book.resolve((path.parent.name,))
        except UnknownLabel:
            unknown[path.parent] += 1
            flawed = True
            continue
        labels.append(raw)
        if label is None:
            ignored.append(raw)
        else:
            name = path.relative_to(source.root).as_posix()
            findings.append(Finding(name, label.name, "image", (), label.tooth, origin=source.origin, where=name))
    if len(labels) > 1:
        message = f"the same picture is in the class folders {', '.join(sorted(labels))}"
        yield Problem("several_classes", "info", copies[0], None, message)
    elif len(copies) > 1:
        message = f"is there {len(copies)} times, the last as {copies[-1].name}; read once"
        yield Problem("duplicate_image", "info", copies[0], None, message)
    yield ImageRecord(
        path=copies[0],
        image_id=None,
        width=None,
        height=None,
        modality=source.modality,
        source=source.name,
        group_id=None,
        declared_split=declared_split(source, copies[0]),
        exhaustive=() if flawed else source.exhaustive,
        findings=tuple(sorted(findings, key=lambda finding: finding.finding_id)),
        ignored=tuple(sorted(ignored)),
        locations=source.locations,
    )


def _group_copies(source: Source, images: list[Path]) -> list[list[Path]]:
    """Files with equal bytes together, but never across declared splits, where a copy is a leak and must show."""
    sizes = {path: path.stat().st_size for path in images}
    shared = Counter(sizes.values())
    copies: dict[tuple, list[Path]] = defaultdict(list)
    for path in images:
        is_alone = shared[sizes[path]] == 1
        content = path if is_alone else hashlib.sha256(path.read_bytes()).digest()
        copies[declared_split(source, path), content].append(path)
    return sorted(copies.values())


def _same_names(source: Source, pictures: list[list[Path]]) -> Iterator[Problem]:
    """One problem for all file names that stand for different pictures in different folders."""
    names = Counter(name for copies in pictures for name in {copy.name for copy in copies})
    repeated = sorted(name for name, count in names.items() if count > 1)
    if repeated:
        message = (
            f"{len(repeated)} file names, such as {repeated[0]}, are in several folders with different content: "
            "read as different pictures"
        )
        yield Problem("same_name", "info", source.root, None, message)


def _empty_folders(root: Path, images: list[Path]) -> Iterator[Problem]:
    occupied = {folder for path in images for folder in path.parents}
    for folder in sorted(root.rglob("*")):
        if folder.is_dir() and folder not in occupied and not folder.name.startswith("."):
            yield Problem("empty_folder", "warning", folder, None, "no image in it")
