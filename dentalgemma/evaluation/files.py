"""Files that are written as a whole or not at all, and read with one clear sentence where that fails."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

from data_builders.records import InputError


class EvaluationError(InputError):
    """Questions or predictions that cannot be used as they are; the message names the file and the remedy."""


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file under another name first, so that a reader never finds half of it.

    Half a surrogate pair, which models do write and no UTF-8 file can hold, is spelt out.

    Raises:
        EvaluationError: when the file cannot be written.
    """
    data = content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")
    # Its own name for every writer: two threads may keep the same reply.
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise EvaluationError(f"{path} cannot be written: {error.strerror}") from None


def write_json(path: Path, document: dict | list) -> None:
    """Write a document as indented JSON."""
    write_whole(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Raises:
        EvaluationError: when it cannot be read or is no such text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: cannot be read: {error}") from None


def without_folder(value: str | None) -> str | None:
    """A path of this machine as its last part, a Hub id or any other value as it is: facts end up in public cards."""
    if not value:
        return value
    name, equals, rest = value.partition("=")
    if equals and name.startswith("--"):
        return f"{name}={without_folder(rest)}"
    # A Hub id has one slash; whatever begins like a path, or has more of them, is one.
    is_path = value.startswith(("/", "~", ".")) or value.count("/") > 1 or "\\" in value
    return Path(value).name if is_path or Path(value).exists() else value
