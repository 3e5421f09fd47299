"""Images and the label files that belong to them, for formats with one text file per image."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import NamedTuple

from data_builders.images import is_image_file, walk
from data_builders.readers.drafts import Draft, LabelBook
from data_builders.readers.files import leaves_root, nothing_found, outward_link
from data_builders.records import Problem
from data_builders.sources import Source

NO_LABELS = re.compile(r"readme.*|classes|.*\.(roboflow|dataset)|\..*", re.IGNORECASE)  # stems


class Pair(NamedTuple):
    """An image and its label file; either may be missing, not both."""

    image: Path
    has_image: bool
    labels: str | None
    folder: Path  # of the labels, or of the image where there are none
    image_folder: Path | None = None  # where the image is there; to take it from `image` costs as much as a line


class Candidate(NamedTuple):
    """A file that may be half of a pair; files that belong together have the same `key`."""

    key: str
    folder: Path
    name: str
    text: str  # the path, which takes longer to make as a `Path`

    @property
    def path(self) -> Path:
        return self.folder / self.name


class Found(NamedTuple):
    """The files of one kind below a folder; `refused` are the keys of those that are links out of the source."""

    candidates: list[Candidate]
    problems: list[Problem]
    refused: set[str]


def pair_files(source: Source, folder: str) -> tuple[list[Pair], list[Problem]]:
    """Match `images/…/a.jpg` with `<folder>/…/a.txt`, and `a.jpg` with an `a.txt` beside it."""
    found, texts = _find(source, source.images, folder)
    if source.labels != source.images:
        _, texts = _find(source, source.labels, folder)
    problems = found.problems + texts.problems
    images: dict[str, list[Candidate]] = defaultdict(list)
    for image in found.candidates:
        images[image.key].append(image)
    labels = _choose_labels(source, folder, texts.candidates, images, problems)
    pairs = []
    for key, candidates in images.items():
        image, *others = candidates
        text = labels.pop(key, None)
        pairs.append(Pair(image.path, True, text and text.text, (text or image).folder, image.folder))
        for other in others:
            message = f"{other.name} and {image.name} would share a label file; it was read for {image.name}"
            problems.append(Problem("shared_label_file", "error", other.path, None, message))
            pairs.append(Pair(other.path, True, None, other.folder, other.folder))
    for text in labels.values():
        if text.key in found.refused:
            continue  # its image was refused, and must not be looked for by the name of its labels
        pairs.append(Pair(_missing_image(source, folder, text.path), False, text.text, text.folder))
    if not pairs:
        problems.append(nothing_found(source, f"image, and no label file in a folder {folder!r}"))
    if len(pairs) > len(images):  # else they are in order, as they were found
        pairs.sort(key=lambda pair: (pair.image, str(pair.labels)))
    return pairs, problems


def _find(source: Source, below: str | None, folder: str) -> tuple[Found, Found]:
    """Image files and label files, in the order of their paths, and a problem for each link out of the source."""
    root = source.root / (below or "")
    images, texts = Found([], [], set()), Found([], [], set())
    parent, key_start, path_start = None, "", ""
    for current, entry in walk(root):
        name = entry.name
        stem, _, suffix = name.rpartition(".")
        if suffix.lower() == "txt":
            if NO_LABELS.fullmatch(stem):
                continue
            found = texts
        elif is_image_file(current, entry):
            found = images
            stem = name if suffix.isdecimal() else stem  # DICOM that is named by its UID
        else:
            continue
        if entry.is_symlink() and leaves_root(source, current / name):
            found.problems.append(outward_link(current / name))
            found.refused.add(_start_key(current.relative_to(root), folder) + (stem or name))
            continue
        if current is not parent:
            parent, path_start = current, str(current / "_")[:-1]
            key_start = _start_key(current.relative_to(root), folder)
        found.candidates.append(Candidate(key_start + (stem or name), current, name, path_start + name))
    return images, texts


def _start_key(relative: PurePath, folder: str) -> str:
    """What a folder adds to the keys of its files: its path without the folders that tell images and labels apart."""
    return "".join(f"{part}/" for part in relative.parts if part.lower() not in {"images", folder.lower()})


def _choose_labels(
    source: Source, folder: str, texts: list[Candidate], images: Mapping[str, list[Candidate]], problems: list[Problem]
) -> dict[str, Candidate]:
    """The label files by key: first those in label folders, then those beside images; the rest is reported."""
    root = source.root / (source.labels or "")
    label_folders = {
        parent
        for parent in {text.folder for text in texts}
        if source.labels or folder.lower() in map(str.lower, parent.relative_to(root).parts)
    }
    with_images = {image.folder for candidates in images.values() for image in candidates}
    chosen: dict[str, Candidate] = {}
    for text in sorted(texts, key=lambda text: text.folder not in label_folders):
        in_folder = text.folder in label_folders
        beside = text.key in images or (not label_folders and (text.folder in with_images or not images))
        if text.key not in chosen and (in_folder or beside):
            chosen[text.key] = text
        else:
            message = f"is neither in a folder {folder!r} nor beside an image, or it is there twice; not read"
            problems.append(Problem("unused_file", "info", text.path, None, message))
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
    draft = Draft(book, pair.image, pair.labels, folder=pair.image_folder)
    if pair.labels is None:
        message = "has no label file, which does not mean that there is nothing to see"
        draft.note("labels_missing", "warning", None, message)
        draft.flawed = True
    return draft
