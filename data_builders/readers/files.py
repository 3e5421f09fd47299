"""Files of a source: text and JSON that may be anything, and paths that must not lead out of the source's folder."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from data_builders.images import is_image_file, walk
from data_builders.readers.geometry import BadAnnotation
from data_builders.records import Problem, Split
from data_builders.sources import ARCHIVE_SUFFIXES, Source

MAX_BYTES = 512 * 1024**2
FIRST_READ = 16 * 1024  # most label files are smaller
FEW_IMAGES = 100  # to ask for each of so few is faster than to list a folder of thousands
SPLITS: dict[str, Split] = {
    "train": "train",
    "valid": "validation",
    "val": "validation",
    "validation": "validation",
    "test": "test",
}
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
ARCHIVES = (b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"7z\xbc\xaf\x27\x1c", b"Rar!", b"\x28\xb5\x2f\xfd")
TAR = slice(257, 262)
DRIVE = re.compile("[A-Za-z]:")


class Document(NamedTuple):
    """A JSON file's content; where a key stood twice in one object, only the last value is left of it."""

    value: Any
    repeated_keys: tuple[str, ...]


def read_text(path: Path | str) -> str:
    """Read a text file whatever its byte order mark and line ends.

    Raises:
        BadAnnotation: when it is too big, a Git-LFS pointer, or not text.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            content = file.read(FIRST_READ)
            if len(content) >= min(FIRST_READ, MAX_BYTES):
                if os.fstat(file.fileno()).st_size > MAX_BYTES:
                    raise BadAnnotation("file_too_big", f"is over {MAX_BYTES // 1024**2} MB; split it")
                file.seek(0)
                content = file.readall()
    except OSError as error:
        raise BadAnnotation("unreadable_file", f"cannot be read: {error.strerror}") from None
    if content.startswith(LFS_POINTER):
        raise BadAnnotation("lfs_pointer", "is a Git-LFS pointer, not the file itself; run `git lfs pull`")
    if content.startswith(ARCHIVES) or content[TAR] == b"ustar":
        raise BadAnnotation("archive", "is an archive; unpack it, and name the folder or the files in it")
    try:
        is_utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16") if is_utf_16 else content.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise BadAnnotation("unreadable_file", f"is not UTF-8 text: {error.reason} at byte {error.start}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def load_json(path: Path) -> Document:
    """Read a JSON file; raise BadAnnotation when there is no reading it."""
    text = read_text(path)
    repeated: list[str] = []

    def make_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            keys = [key for key, _ in pairs]
            repeated.extend(key for key in made if keys.count(key) > 1)
        return made

    try:
        try:
            value = json.loads(text, object_pairs_hook=make_dict)
        except json.JSONDecodeError:
            raise
        except ValueError:  # an integer of thousands of digits must not cost the whole file
            value = json.loads(text, object_pairs_hook=make_dict, parse_int=_read_integer)
    except json.JSONDecodeError as error:
        raise BadAnnotation("bad_json", f"is not valid JSON: {error}") from None
    except RecursionError:
        raise BadAnnotation("bad_json", "is nested too deeply to be annotations") from None
    return Document(value, tuple(repeated))


def _read_integer(digits: str) -> int | float:
    return int(digits) if len(digits) < 1000 else float(digits)


def repeated_keys_problem(path: Path, document: Document) -> Iterator[Problem]:
    """Say that values were lost, which the images of this file must not be called exhaustive after."""
    if document.repeated_keys:
        keys = ", ".join(shorten(key) for key in sorted(set(document.repeated_keys))[:5])
        yield Problem("duplicate_json_keys", "error", path, None, f"keys that stand twice in one object: {keys}")


def declared_split(source: Source, path: Path, folder: Path | None = None) -> Split | None:
    """The split that the nearest folder below the source's root is named after; `folder` is the path's, if at hand."""
    return _split_of_folder(source.root, folder or os.path.dirname(path))


@lru_cache  # many images share a folder
def _split_of_folder(root: Path, folder: Path | str) -> Split | None:
    names = map(str.lower, reversed(Path(folder).relative_to(root).parts))
    return next((SPLITS[name] for name in names if name in SPLITS), None)


def name_below_root(source: Source, path: Path | str) -> str:
    """A path as it is written in ids and places: relative to the source's root, with slashes."""
    name = str(path)[_length_with_slash(source.root) :]
    return name if os.sep == "/" else name.replace(os.sep, "/")


@lru_cache
def _length_with_slash(root: Path) -> int:
    return len(str(root / "_")) - 1  # of `.` nothing is left


def leaves_root(source: Source, path: Path) -> bool:
    """Whether a path leads out of the source's folder by way of links."""
    return not path.resolve().is_relative_to(source.root.resolve())


def drop_outward_links(source: Source, paths: Iterable[Path], problems: list[Problem]) -> list[Path]:
    """The paths that may be opened, in order; a problem for each other one."""
    kept = []
    for path in paths:
        if path.is_symlink() and leaves_root(source, path):
            problems.append(outward_link(path))
        else:
            kept.append(path)
    return kept


def outward_link(path: Path) -> Problem:
    """The problem of a link that leads out of the source's folder; it is never opened."""
    return Problem("unsafe_path", "error", path, None, "is a link that leaves the source folder")


class ImagePath(NamedTuple):
    """The path of an image file, its folder, and the path as a text: each takes longer to make from it than to keep."""

    path: Path
    folder: Path
    text: str


class ImageFinder:
    """Finds the images that the annotation files in one folder name."""

    def __init__(self, source: Source, folder: Path) -> None:
        self.source = source
        self.folders = (
            [source.root / source.images]
            if source.images
            else [folder, folder / "images", folder / "xrays", source.root / "images"]  # `xrays` is DENTEX's
        )
        self._asked = 0
        self._outside: dict[str, bool] = {}  # of folders, whether links lead them out of the source

    def find(self, name: object) -> ImagePath:
        """Where an image lies, or would lie if it were there.

        Raises:
            BadAnnotation: for a path that leaves the source folder; it is never opened.
        """
        relative = _check_name(name)
        self._asked += 1
        found = self._find_listed(relative) if self._asked > FEW_IMAGES else None
        if found:
            return found
        text = next(filter(os.path.isfile, (f"{folder}/{relative}" for folder in self.folders)), None)
        path = Path(text or f"{self.folders[0]}/{relative}")
        if leaves_root(self.source, path) if path.is_symlink() else self._leads_out(os.path.dirname(path)):
            raise BadAnnotation("unsafe_path", f"{shorten(name)} is a link that leaves the source folder")
        return ImagePath(path, path.parent, str(path))

    def _find_listed(self, name: str) -> ImagePath | None:
        """Where a plain file of that name lies, if that can be told from the lists of the folders' files."""
        for folder, start, is_plain in self._listed:
            if name in is_plain:
                is_safe = is_plain[name] and not self._leads_out(start)
                return ImagePath(folder / name, folder, start + name) if is_safe else None
        return None

    @cached_property
    def _listed(self) -> list[tuple[Path, str, dict[str, bool]]]:
        """Each folder, the start of its files' paths, and its entries by name, with whether they are plain files."""
        return [(folder, str(folder / "_")[:-1], _list_entries(folder)) for folder in dict.fromkeys(self.folders)]

    def _leads_out(self, folder: str) -> bool:
        if folder not in self._outside:
            self._outside[folder] = leaves_root(self.source, Path(folder))
        return self._outside[folder]


def _list_entries(folder: Path) -> dict[str, bool]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry.is_file(follow_symlinks=False) for entry in entries}
    except OSError:
        return {}


def _check_name(name: object) -> str:
    if not isinstance(name, str) or not name.strip("./\\ "):
        raise BadAnnotation("bad_annotation", f"{shorten(name)} is not the name of an image file")
    relative = name.replace("\\", "/")
    parts = relative.split("/")
    if relative.startswith("/") or ".." in parts or DRIVE.match(relative) or not _is_encodable(parts):
        raise BadAnnotation("unsafe_path", f"{shorten(name)} is not a path below the source folder")
    return relative


def _is_encodable(parts: list[str]) -> bool:
    if len(parts) == 1 and len(parts[0]) < 256 and parts[0].isascii() and "\0" not in parts[0]:
        return True
    try:
        return not any("\0" in part or len(part.encode()) > 255 for part in parts) and len(parts) < 100
    except UnicodeEncodeError:
        return False


def unlisted_images(source: Source, seen: set[str]) -> Iterator[Problem]:
    """One problem for all image files that no annotation file speaks of."""
    unlisted = []
    parent, start = None, ""
    for folder, entry in walk(source.root / (source.images or "")):
        if folder is not parent:
            parent, start = folder, str(folder / "_")[:-1]
        if start + entry.name not in seen and is_image_file(folder, entry):
            unlisted.append(entry.name)
    if unlisted:
        message = f"{len(unlisted)} image files are in no annotation file, the first is {unlisted[0]}; not read"
        yield Problem("unlisted_images", "info", source.root, None, message)


def nothing_found(source: Source, what: str) -> Problem:
    """The problem of a source folder without any file of its format; an archive in it is never unpacked."""
    message = f"no {what} in the source folder"
    archives = [path.name for path in sorted(source.root.rglob("*")) if path.name.lower().endswith(ARCHIVE_SUFFIXES)]
    if archives:
        message += f"; unpack {', '.join(archives[:3])} first"
    return Problem("annotations_missing", "error", source.root, None, message)


def escape_surrogates(text: str) -> str:
    """A text from a JSON file as it can be written to one; "\\ud800" alone is valid in JSON and not in UTF-8."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def shorten(value: object) -> str:
    """A value as it stands in a file, cut for a message."""
    try:
        text = f"{value:.9g}" if isinstance(value, (int, float)) else repr(value)
    except OverflowError:  # an integer beyond any float
        text = "a number of hundreds of digits"
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"
