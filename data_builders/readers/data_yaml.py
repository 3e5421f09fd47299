"""Ultralytics' data.yaml: the names of the classes, and which images belong to which split."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

import yaml

from data_builders.readers.drafts import Spellings
from data_builders.readers.files import SPLITS, leaves_root, read_text, shorten
from data_builders.readers.geometry import BadAnnotation
from data_builders.records import Problem, Split
from data_builders.sources import Source

FILE_NAMES = ("data.yaml", "data.yml", "dataset.yaml")


class DataYaml:
    """The nearest data.yaml at or above each label file, not above the source's root."""

    def __init__(self, source: Source) -> None:
        self.source = source
        classes = source.classes
        self.is_standard = isinstance(classes, str)
        self.names_needed = self.is_standard or all(isinstance(raw, str) for raw in classes or {})
        self.problems: list[Problem] = []
        self._keypoints = 0  # numbers after the box in a line of a pose dataset
        self._names: dict[Path, Mapping[int, str] | None] = {}
        self._splits: dict[Path, Split | None] = {}  # of folders and image files that a data.yaml lists
        self._lists_files = False
        self._inherited: dict[Path, Split | None] = {}  # of folders, from those listed: the images of one share it

    def find_names(self, folder: Path) -> Mapping[int, str] | None:
        """The names by class id, or `None` where no data.yaml has any."""
        if folder not in self._names:
            own = self._read(folder)
            at_top = folder == self.source.root or self.source.root not in folder.parents
            self._names[folder] = own if own is not None or at_top else self.find_names(folder.parent)
        return self._names[folder]

    def find_split(self, image: Path, folder: Path | None = None) -> Split | None:
        """The split that a data.yaml puts an image into, by its path or its nearest folder; `None` for none or two."""
        if not self._splits:
            return None
        if self._lists_files and image in self._splits:
            return self._splits[image]
        folder = folder or image.parent
        if folder not in self._inherited:
            self._inherited[folder] = self._find_above(folder)
        return self._inherited[folder]

    def _find_above(self, folder: Path) -> Split | None:
        for place in (folder, *folder.parents):
            if place in self._splits:
                return self._splits[place]
            if place == self.source.root:
                break
        return None

    def spell(self, class_id: int, names: Mapping[int, str] | None) -> Spellings:
        """How the class map may name a class: a number is always an id, a text is a name if there are names."""
        if names is None:
            return (class_id,)
        name = names.get(class_id)
        if self.is_standard:
            return (name if name is not None else f"class {class_id} beyond data.yaml",)
        return (class_id,) if name is None else (class_id, name)

    def say_missing(self) -> None:
        """Say once that labels are names which nothing gives."""
        if not any(problem.code == "names_missing" for problem in self.problems):
            message = (
                f"classes are given by name ({self.source.class_map_text()}), the label files hold numbers, and no "
                "data.yaml with `names` lies beside or above them; add one, or map the numbers (without quotes)"
            )
            self.problems.append(Problem("names_missing", "error", self.source.root, None, message))

    def _read(self, folder: Path) -> Mapping[int, str] | None:
        path = next((folder / name for name in FILE_NAMES if (folder / name).is_file()), None)
        if path is None:
            return None
        try:
            document = self._load(path)
            names = _read_names(document)
        except BadAnnotation as error:
            self.problems.append(Problem(error.code, "error", path, None, str(error)))
            return None
        if document.get("nc", len(names)) != len(names):
            message = f"`nc` is {shorten(document['nc'])}, `names` are {len(names)}; the names count"
            self.problems.append(Problem("class_count_mismatch", "warning", path, None, message))
        self._read_splits(path, document)
        self._read_keypoints(path, document)
        return names

    def _load(self, path: Path) -> dict:
        if leaves_root(self.source, path):
            raise BadAnnotation("unsafe_path", "is a link that leaves the source folder")
        try:
            document = yaml.safe_load(read_text(path))
        except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
            if isinstance(error, BadAnnotation):
                raise
            raise BadAnnotation("bad_data_yaml", f"cannot be read: {shorten(str(error))}") from None
        if not isinstance(document, dict):
            raise BadAnnotation("bad_data_yaml", "has no list or mapping `names`")
        return document

    def _read_keypoints(self, path: Path, document: Mapping) -> None:
        shape = document.get("kpt_shape")
        if shape is None:
            return
        if not isinstance(shape, list) or not all(type(number) is int and number > 0 for number in shape):
            message = f"`kpt_shape` is {shorten(shape)}, not how many keypoints of how many numbers"
            self.problems.append(Problem("bad_data_yaml", "error", path, None, message))
            return
        self._keypoints = math.prod(shape)
        message = "labels hold keypoints after the box (`kpt_shape`), which were not read"
        self.problems.append(Problem("keypoints_not_read", "info", path, None, message))

    def drop_keypoints(self, text: str) -> str:
        """The lines of a label file without the keypoints that follow a box, which would look like a polygon."""
        if not self._keypoints:
            return text
        lines = [(line, line.split()) for line in text.split("\n")]
        length = 5 + self._keypoints
        return "\n".join(" ".join(fields[:5]) if len(fields) == length else line for line, fields in lines)

    def _read_splits(self, path: Path, document: Mapping) -> None:
        """Note the folders and files that `train`, `val` and `test` name, each of them a text or a list."""
        places: dict[Path, set[Split]] = {}
        for key in SPLITS:
            entries = document.get(key)
            for entry in entries if isinstance(entries, list) else [entries]:
                if isinstance(entry, str) and entry.strip():
                    for place in self._locate(path, document.get("path"), entry):
                        places.setdefault(place, set()).add(SPLITS[key])
        shared = sorted(place for place, splits in places.items() if len(splits) > 1)
        if shared:
            message = f"puts {shared[0].name} into several splits; such images have none of their own"
            self.problems.append(Problem("shared_split", "info", path, None, message))
        self._splits |= {place: min(splits) if len(splits) == 1 else None for place, splits in places.items()}
        self._lists_files |= any(not place.is_dir() for place in places)
        self._inherited.clear()

    def _locate(self, path: Path, base: object, entry: str) -> Iterator[Path]:
        """The folder that an entry means, or the images that the text file it means lists."""
        parts = _split_path(entry)
        least = 1 if PurePosixPath(entry).is_absolute() or PureWindowsPath(entry).is_absolute() else len(parts)
        place = _find_end(path.parent, (_split_path(base) if isinstance(base, str) else []) + parts, least)
        if place is None or leaves_root(self.source, place):
            message = f"names {shorten(entry)}, which is not there"
            self.problems.append(Problem("split_missing", "info", path, None, message))
        elif place.is_dir():
            yield place
        else:
            try:
                lines = read_text(place).split("\n")
            except BadAnnotation as error:
                self.problems.append(Problem(error.code, "error", place, None, str(error)))
                return
            yield from filter(None, (_find_end(place.parent, _split_path(line), 1) for line in lines if line.strip()))


def _read_names(document: Mapping) -> Mapping[int, str]:
    names = document.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict):
        raise BadAnnotation("bad_data_yaml", "has no list or mapping `names`")
    try:
        return {int(number): str(name) for number, name in names.items()}
    except (ValueError, TypeError, OverflowError):
        raise BadAnnotation("bad_data_yaml", "`names` has a key that is no class id") from None


def _split_path(text: str) -> list[str]:
    """The names in a path of whichever system, without what leads upwards or to the root."""
    return [part for part in text.strip().replace("\\", "/").split("/") if part.strip(". ") and "\0" not in part]


def _find_end(folder: Path, parts: Sequence[str], least: int) -> Path | None:
    """The longest end of a path, of at least so many names, that is there below `folder`.

    Exporters write paths of their own machine (`/home/me/set/train/images`) or of another place (`../train/images`).
    """
    for start in range(max(len(parts) - least, 0) + 1):
        place = folder.joinpath(*parts[start:])
        try:
            if place.exists():
                return place
        except (OSError, ValueError):  # a name that is too long, or that no file can have
            continue
    return None
