"""Images and the label files that belong to them, for formats with one text file per image."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path, PurePath
from typing import NamedTuple

from data_builders.images import find_images
from data_builders.readers.drafts import Draft, LabelBook
from data_builders.readers.files import drop_outward_links
from data_builders.records import Problem
from data_builders.sources import Source

NO_LABELS = re.compile(r"readme.*|classes|.*\.(roboflow|dataset)|\..*", re.IGNORECASE)  # stems


class Pair(NamedTuple):
    """An image and its label file; either may be missing, not both."""

    image: Path
    has_image: bool
    labels: Path | None


def pair_files(source: Source, folder: str) -> tuple[list[Pair], list[Problem]]:
    """Match `images/…/a.jpg` with `<folder>/…/a.txt`, and `a.jpg` with an `a.txt` beside it."""
    problems: list[Problem] = []
    images_root, labels_root = source.root / (source.images or ""), source.root / (source.labels or "")
    images = defaultdict(list)
    for path in drop_outward_links(source, find_images(images_root), problems):
        images[_key(path.relative_to(images_root), folder)].append(path)
    texts = [
        path
        for path in sorted(labels_root.rglob("*"))
        if path.suffix.lower() == ".txt" and path.is_file() and not NO_LABELS.fullmatch(path.stem)
    ]
    labels = _choose_labels(source, folder, drop_outward_links(source, texts, problems), images, problems)
    pairs = []
    for key, paths in images.items():
        pairs.append(Pair(paths[0], True, labels.pop(key, None)))
        for path in paths[1:]:
            message = f"{path.name} and {paths[0].name} would share a label file; it was read for {paths[0].name}"
            problems.append(Problem("shared_label_file", "error", path, None, message))
            pairs.append(Pair(path, True, None))
    pairs += [Pair(_missing_image(source, folder, path), False, path) for path in labels.values()]
    return sorted(pairs, key=lambda pair: (pair.image, str(pair.labels))), problems


def _key(relative: PurePath, folder: str) -> tuple[str, ...]:
    """What an image and its label file have in common: their path without the folders that tell them apart."""
    return *(part for part in relative.parts[:-1] if part.lower() not in {"images", folder.lower()}), relative.stem


def _choose_labels(
    source: Source, folder: str, texts: list[Path], images: dict, problems: list[Problem]
) -> dict[tuple[str, ...], Path]:
    """The label files by key: first those in label folders, then those beside images; the rest is reported."""
    root = source.root / (source.labels or "")
    in_folder = {path for path in texts if source.labels or folder.lower() in _folders(path.relative_to(root))}
    with_images = {path.parent for paths in images.values() for path in paths}
    chosen: dict[tuple[str, ...], Path] = {}
    for path in sorted(texts, key=lambda path: (path not in in_folder, path)):
        key = _key(path.relative_to(root), folder)
        beside = key in images or (not in_folder and (path.parent in with_images or not images))
        if key not in chosen and (path in in_folder or beside):
            chosen[key] = path
        else:
            message = f"is neither in a folder {folder!r} nor beside an image, or it is there twice; not read"
            problems.append(Problem("unused_file", "info", path, None, message))
    return chosen


def _missing_image(source: Source, folder: str, labels: Path) -> Path:
    """Where the image of a label file would be."""
    relative = labels.relative_to(source.root / (source.labels or ""))
    if source.images or source.labels:
        return (source.root / (source.images or "images") / relative).with_suffix(".jpg")
    folders = _folders(relative)
    parts = list(relative.parts)
    if folder.lower() in folders:
        parts[len(folders) - 1 - folders[::-1].index(folder.lower())] = "images"
    return source.root.joinpath(*parts).with_suffix(".jpg")


def _folders(relative: PurePath) -> list[str]:
    return [part.lower() for part in relative.parts[:-1]]


def start_draft(book: LabelBook, pair: Pair) -> Draft:
    """A draft for the image of a pair, which says what of the pair is missing."""
    draft = Draft(book, pair.image, pair.labels)
    if pair.labels is None:
        message = "has no label file, which does not mean that there is nothing to see"
        draft.note("labels_missing", "warning", None, message)
        draft.flawed = True
    return draft
