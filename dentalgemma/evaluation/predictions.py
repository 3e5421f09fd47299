"""The predictions file while it grows: what each line says of its item, one writer, resumable. Light: no torch."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_builders.images import UNREADABLE, to_rgb
from dentalgemma.evaluation.questions import (
    OPEN_PROTOCOL,
    PROTOCOL_VERSIONS,
    EvaluationError,
    Mode,
    Question,
    check_images,
    read_predictions,
    swap_images,
)

Arm = Literal["true", "blank", "other", "none"]
GREY = (128, 128, 128)
LINE_START = b'{"item_id"'


def choose_images(items: Sequence[Question], *, mode: Mode, images: Arm) -> dict[str, Question | None]:
    """For each item the question whose image is shown: itself, one of another patient, or None for text alone.

    Raises:
        EvaluationError: when the items cannot be asked in this mode with these images, before any of them is.
    """
    if mode not in PROTOCOL_VERSIONS or images not in Arm.__args__:
        raise EvaluationError(f"no mode {mode!r} with images {images!r}; choose {PROTOCOL_VERSIONS} and {Arm.__args__}")
    unranked = [item.item_id for item in items if item.kind == "open"] if mode == "loglikelihood" else []
    if unranked:
        raise EvaluationError(
            f"{len(unranked)} of {len(items)} questions are open, for example {unranked[0]}: they have no options to "
            "rank; use mode generate, or a file of closed questions alone"
        )
    bare = next((item for item in items if item.image is None), None)
    if images == "blank" and bare:
        raise EvaluationError(f"item {bare.item_id} has no image that a blank one could replace")
    swapped = swap_images(items) if images == "other" else {}
    shown: dict[str, Question | None] = {
        item.item_id: None if images == "none" or item.image is None else swapped.get(item.image_id, item)
        for item in items
    }
    check_images(item for item in shown.values() if item is not None)
    return shown


def open_image(shown: Question | None, *, images: Arm) -> Image.Image | None:
    """The pixels to show, at the size of the file: the processor fits them, nothing else does.

    Raises:
        EvaluationError: naming a file that cannot be decoded.
    """
    if shown is None or shown.image is None:
        return None
    try:
        with Image.open(shown.image) as opened:
            picture = to_rgb(opened)
    except UNREADABLE as error:
        raise EvaluationError(f"{shown.image}: the image of item {shown.item_id} cannot be opened: {error}") from None
    return Image.new("RGB", picture.size, GREY) if images == "blank" else picture


def identify(item: Question, shown: Question | None, *, mode: Mode) -> dict:
    """What a line says of its item: which question was asked, with which image, and how."""
    return {
        "item_id": item.item_id,
        "image_id": item.image_id,
        "item_hash": item.item_hash,
        "image_shown": shown.image_id if shown else None,
        "protocol": PROTOCOL_VERSIONS[mode] if item.kind == "closed" else OPEN_PROTOCOL,
    }


class PredictionFileError(EvaluationError):
    """An answer could not be written, and others could not be either."""


class PredictionFile:
    """A file of answers that is open for more, also of several threads; `done` are the items answered."""

    def __init__(self, file: FileIO, done: Collection[str]) -> None:
        self.done = done
        self._file = file
        self._lock = threading.Lock()

    def write(self, lines: Sequence[Mapping]) -> None:
        """Append lines; when this returns they are on the disk, and when it fails none of them is in the file.

        Raises:
            PredictionFileError: when they cannot be written.
        """
        content = memoryview("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
        with self._lock:
            end = os.fstat(self._file.fileno()).st_size
            try:
                while content:
                    content = content[self._file.write(content) :]
                os.fsync(self._file.fileno())
            except OSError as error:
                with suppress(OSError):
                    self._file.truncate(end)
                raise PredictionFileError(
                    f"{self._file.name}: cannot be written: {error}; make room, then run the same command to go on"
                ) from None

    def close(self) -> None:
        """Take no more; what another thread is writing is written first."""
        with self._lock:
            self._file.close()


def append_predictions(out: Path, asked: Mapping[str, Mapping]) -> AbstractContextManager[PredictionFile]:
    """Open a predictions file for answers to the items in `asked`, which holds what their lines must say apart from
    the answer.

    Raises:
        EvaluationError: as `append_lines` does; also for answers of another model, mode or setting, or to other
            questions.
    """
    return append_lines(out, lambda: _read_done(Path(out), asked))


@contextmanager
def append_lines(out: Path, read_done: Callable[[], Collection[str]]) -> Iterator[PredictionFile]:
    """Open a file of JSON lines for more; one process at a time may. `read_done` tells which items it has already.

    A line that a killed run left unfinished is cut off.

    Raises:
        EvaluationError: when the file holds something else, and is left as it is; or when another process writes it.
    """
    out = Path(out)
    if out.is_dir():
        raise EvaluationError(f"{out} is a folder; name the file to write")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(out.with_name(f".{out.name}.lock")).acquire(timeout=0)
    except Timeout:
        raise EvaluationError(
            f"{out} is being written by another process; wait until it ends, or choose another file"
        ) from None
    with held:
        if out.exists():
            mend_end(out)
        done = read_done() if out.exists() else ()
        file = out.open("a+b", buffering=0)
        opened = PredictionFile(file, done)
        try:
            if file.tell() and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
                file.write(b"\n")  # a whole line all the same
            yield opened
        finally:
            opened.close()


def _read_done(out: Path, asked: Mapping[str, Mapping]) -> Collection[str]:
    done = read_predictions(out)
    for item_id, line in done.items():
        here = asked.get(item_id, {"item_id": None})
        check_same(out, {name: _recorded(line.get(name), value) for name, value in here.items()}, here)
    return done.keys()


def check_same(out: Path, there: Mapping, here: Mapping, *, what: str = "answers") -> None:
    """Refuse to go on with a file that another run wrote: `there` is what a line of it says, `here` what it must say.

    Raises:
        EvaluationError: naming what differs.
    """
    changed = {name: value for name, value in there.items() if value != here.get(name)}
    if changed:
        wanted = {name: here.get(name) for name in changed}
        raise EvaluationError(
            f"{out} holds {what} that do not belong to this run: {changed} there, {wanted} here; "
            "choose another file, or delete it to begin anew"
        )


def _recorded(value: object, wanted: object) -> object:
    """Of what a line says of its server, the part that the run fixes: the rest came with the answer."""
    if isinstance(value, dict) and isinstance(wanted, dict) and "url" in wanted:
        return {name: value.get(name) for name in wanted}
    return value


def mend_end(out: Path) -> None:
    """Cut off a last line that was not written to its end.

    Raises:
        EvaluationError: when the file is none of ours, which is left as it is.
    """
    content = out.read_bytes()
    end = content.rfind(b"\n") + 1
    torn = content[end:]
    if not torn.strip():
        return
    with suppress(ValueError, RecursionError):  # a character cut in two is a ValueError as well
        json.loads(torn)
        return
    if any(not found.startswith(LINE_START[: len(found)]) for found in (content, torn)):
        raise EvaluationError(
            f"{out} ends in something else than a line of an earlier run; it is left as it is: choose another file"
        )
    os.truncate(out, end)


def progress_bar(shown: bool) -> Progress:
    """A progress bar on stderr with the time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not shown)


def utc_now() -> str:
    """The present time as ISO 8601, in UTC: what is compared with the time of a plan."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
