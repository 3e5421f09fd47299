"""The files that a push sends: those of the folder, with the repository's name in their card."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from data_builders.dataset_card import escape_markdown
from data_builders.dataset_folder import REPORT
from dentalgemma.publishing.checks import refuse
from dentalgemma.publishing.folders import CARD, Publication, PushRefused, recognise
from dentalgemma.publishing.push_report import progress_bar
from dentalgemma.publishing.screening import screen

PIECE = 1 << 20
SMALL = 10_000_000  # bytes; the Hub takes no larger file but into large-file storage, which is asked for by SHA-256
PLACEHOLDER = b"OWNER/NAME"  # of cards, which are written before anybody knows what the repository is called


@dataclass(frozen=True)
class File:
    """A file to publish. `git_sha1` is what git calls its content, `sha256` what large-file storage does.

    `content` is what was hashed, where that fits into memory: what changes on disk afterwards is not sent.
    """

    path: str
    local: Path
    size: int
    sha256: str
    git_sha1: str
    content: bytes | None = None


def read_files(
    publication: Publication, repo_id: str, *, permissions: Collection[str] = (), progress: bool = True
) -> list[File]:
    """Hash what is to be sent, and hold what is small. The files in the folder stay as they are."""
    filled = _fill_in(publication, repo_id, permissions)
    sizes = {path: local.stat().st_size for path, local in publication.files.items()}
    files = []
    with progress_bar("Reading", sum(sizes.values()), shown=progress) as advance:
        for path, local in publication.files.items():
            content = filled.get(path)
            if content is None and sizes[path] <= SMALL:
                content = local.read_bytes()
            size = sizes[path] if content is None else len(content)
            sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
            for piece in _read(local) if content is None else (content,):
                sha256.update(piece)
                git.update(piece)
                advance(len(piece))
            files.append(File(path, local, size, sha256.hexdigest(), git.hexdigest(), content))
    return files


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            yield piece


def _fill_in(publication: Publication, repo_id: str, permissions: Collection[str]) -> dict[str, bytes]:
    """The card with the repository's name in it, and a dataset's report with the hash of that card."""
    if CARD not in publication.files:
        return {}
    before = publication.files[CARD].read_bytes()
    after = before.replace(PLACEHOLDER, repo_id.encode())
    if permissions:
        after = after.rstrip() + f"\n\n## Permissions\n\n{state_permissions(permissions)}\n".encode()
    filled = {CARD: after}
    if REPORT in publication.files:
        hashes = [hashlib.sha256(card).hexdigest().encode() for card in (before, after)]
        filled[REPORT] = publication.files[REPORT].read_bytes().replace(*hashes)
    return filled


def state_permissions(permissions: Collection[str]) -> str:
    names = ", ".join(escape_markdown(name) for name in sorted(set(permissions)))
    return f"Whoever published this states that the owners of these sources agreed to it: {names}."


@contextmanager
def one_configuration_each(folder: Path, publication: Publication, *, needed: bool) -> Iterator[Publication]:
    """The publication itself or, where `needed`, that of a copy with a configuration for each source of a dataset.

    The copy lies in a hidden folder beside the dataset, where there is room for such things, until it was sent.

    Raises:
        PushRefused: when the disk has no room for it.
    """
    if not needed:
        yield publication
        return
    from data_builders.configurations import split_by_source

    beside = folder.resolve().parent
    size, free = sum(path.stat().st_size for path in publication.files.values()), shutil.disk_usage(beside).free
    if free < size:
        raise PushRefused(
            f"one configuration for each source is written beside {folder} before it is sent: that takes {size:,} "
            f"bytes, and {free:,} are free"
        )
    with TemporaryDirectory(prefix=".dentalgemma-push-", dir=beside) as workshop:
        out = Path(workshop) / "dataset"
        split_by_source(folder, out)
        split = recognise(out)
        refuse(screen(split.files))
        yield split._replace(left_here=publication.left_here)


def take_stamps(publication: Publication) -> dict[str, tuple[int, int]]:
    """Size and time of every file, by which a change is noticed: what was looked into is what is hashed and sent."""
    stats = {path: local.stat() for path, local in publication.files.items() if local.exists()}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def is_same(file: File, there: dict[str, str]) -> bool:
    return there.get(file.path) in (file.sha256, file.git_sha1)


def all_same(files: Sequence[File], there: dict[str, str]) -> bool:
    return all(is_same(file, there) for file in files)
