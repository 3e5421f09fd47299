"""Publish a folder on the Hub: checked first, in one commit or none, private unless asked otherwise, read back after.

The token is the Hub client's own, from the environment or `hf auth login`; nothing here takes, shows or keeps one.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, hf_hub_url
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
    hf_raise_for_status,
    http_stream_backoff,
    validate_repo_id,
)
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from data_builders.records import InputError
from dentalgemma.publishing.checks import Inspection, inspect, refuse
from dentalgemma.publishing.folders import Publication, recognise
from dentalgemma.publishing.remote import (
    PAUSES,
    TOKEN_PAGE,
    PushError,
    Remote,
    Target,
    explained,
    insist,
    is_transient,
    look,
    status_of,
)
from dentalgemma.publishing.screening import screen

PIECE = 1 << 20
# What loading a repository picks up. Where it is there and not here, it is another release's: the commit deletes it.
# All else that is there and not here (.gitattributes, what people added) stays.
STALE = (
    *("data/*", "figures/*", "*.safetensors", "*.safetensors.index.json", "adapter_*", "tokenizer*", "chat_template.*"),
    *("*processor_config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json"),
)
WHOLE_MODEL = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")


@dataclass(frozen=True)
class File:
    """A file to publish. `git_sha1` is what git calls its content, `sha256` what large-file storage does."""

    path: str
    local: Path
    size: int
    sha256: str
    git_sha1: str


class Changes(NamedTuple):
    """What a commit would do, by path; `kept` is there, not here, and stays."""

    new: list[str]
    changed: list[str]
    unchanged: list[str]
    deleted: list[str]
    kept: list[str]

    @property
    def any(self) -> bool:
        return bool(self.new or self.changed or self.deleted)


def push(
    folder: Path,
    repo_id: str,
    *,
    public: bool = False,
    dry_run: bool = False,
    adapter_only: bool = False,
    tag: str | None = None,
    permissions: Collection[str] = (),
    progress: bool = True,
) -> dict:
    """Publish a model, adapter, dataset or Space folder as `repo_id`; returns a report ("push/1").

    There is one commit, with the newest one as its parent, or none where everything is there already. What was
    uploaded before an interruption is not sent again. A repository is made public only after every file was read back.

    Raises:
        PushRefused: when the folder must not be published as it is.
        PushError: when the Hub does not let it through, or has other content afterwards.
    """
    folder = Path(folder)
    _check_names(repo_id, tag)
    publication = recognise(folder, adapter_only=adapter_only)
    if not dry_run and get_token() is None:
        raise PushError(
            f"no token for the Hub: run `hf auth login`, or set HF_TOKEN, with one that may write ({TOKEN_PAGE})"
        )
    stamps = _stamps(publication)
    inspection = inspect(folder, publication, public=public, permissions=permissions)
    target = Target(HfApi(library_name="dentalgemma"), repo_id, publication.repo_type)
    with _as_published(folder, publication, inspection) as published:
        files = _hash_files(published, progress=progress)
        if _stamps(publication) != stamps:
            raise PushError(f"{folder} was changed while it was checked: push again")
        report = _describe(target, published, inspection, files, public=public, tag=tag)
        if dry_run:
            return report | {"dry_run": True} | _foresee(target, files, public=public, tag=tag, kind=publication.kind)
        return report | _publish(target, files, public=public, tag=tag, kind=publication.kind, progress=progress)


def _check_names(repo_id: str, tag: str | None) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        repo_id = ""
    if repo_id.count("/") != 1:
        raise InputError(
            "a repository is named owner/name, of letters, digits, '-', '_' and '.': such as me/dentalgemma"
        )
    if tag is not None and not (TAG.fullmatch(tag) and ".." not in tag and not tag.endswith((".", ".lock"))):
        raise InputError(f"--tag {tag!r} is no name for a tag; take one such as v1.0")


@contextmanager
def _as_published(folder: Path, publication: Publication, inspection: Inspection) -> Iterator[Publication]:
    """The publication itself, or one of a temporary folder with a configuration for each source of a dataset."""
    if not inspection.per_source:
        yield publication
        return
    from data_builders.configurations import split_by_source

    with TemporaryDirectory(prefix="dentalgemma-push-") as workshop:
        out = Path(workshop) / "dataset"
        split_by_source(folder, out)
        split = recognise(out)
        refuse(screen(split.files))
        yield split._replace(left_here=publication.left_here)


def _stamps(publication: Publication) -> dict[str, tuple[int, int]]:
    """Size and time of every file, by which a change is noticed: what was looked into is what is hashed and sent."""
    stats = {path: local.stat() for path, local in publication.files.items()}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def _hash_files(publication: Publication, *, progress: bool) -> list[File]:
    sizes = {path: local.stat().st_size for path, local in publication.files.items()}
    files = []
    with _bar("Reading", sum(sizes.values()), progress) as advance:
        for path, local in publication.files.items():
            sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % sizes[path], usedforsecurity=False)
            with local.open("rb") as file:
                while piece := file.read(PIECE):
                    sha256.update(piece)
                    git.update(piece)
                    advance(len(piece))
            files.append(File(path, local, sizes[path], sha256.hexdigest(), git.hexdigest()))
    return files


@contextmanager
def _bar(what: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar over bytes, with the time left, on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bars:
        task = bars.add_task(what, total=total)
        yield lambda size: bars.advance(task, size)


def _describe(
    target: Target,
    publication: Publication,
    inspection: Inspection,
    files: Sequence[File],
    *,
    public: bool,
    tag: str | None,
) -> dict:
    return {
        "format": "push/1",
        "repo": target.repo_id,
        "repo_type": target.repo_type,
        "url": target.url,
        "kind": publication.kind,
        "visibility": "public" if public else "private",
        "tag": tag,
        "licence": inspection.licence,
        "verdict": inspection.verdict,
        "one_configuration_per_source": inspection.per_source,
        "warnings": inspection.warnings,
        "files": [{"path": file.path, "size": file.size, "sha256": file.sha256} for file in files],
        "bytes": sum(file.size for file in files),
        "left_here": publication.left_here,
    }


def _foresee(target: Target, files: Sequence[File], *, public: bool, tag: str | None, kind: str) -> dict:
    """What a push would change on the Hub, as far as that can be told from here; nothing is created."""
    if get_token() is None:
        return {"remote": None, "remote_unknown": "there is no token for the Hub (`hf auth login`, or HF_TOKEN)"}
    try:
        with explained(target):
            remote = look(target)
    except PushError as error:
        return {"remote": None, "remote_unknown": str(error)}
    changes = _compare(files, remote)
    if remote:
        _check_remote(target, remote, changes, public=public, tag=tag, kind=kind)
    before = {"exists": remote is not None, "commit": remote.head if remote else None}
    return {"remote": {**before, **changes._asdict()}, "opens_history": bool(remote and remote.private and public)}


def _publish(
    target: Target, files: Sequence[File], *, public: bool, tag: str | None, kind: str, progress: bool
) -> dict:
    remote = insist(target, lambda: look(target))
    opens_history = bool(remote and remote.private and public)
    if remote:
        _check_remote(target, remote, _compare(files, remote), public=public, tag=tag, kind=kind)
    else:
        remote = _create(target, public=public)
    changes = _compare(files, remote)
    commit = _commit(target, files, remote, changes, progress=progress) if changes.any else remote.head
    tagged, goes_public = tag is not None and tag not in remote.tags, public and remote.private
    read_back = changes.any or tagged or goes_public
    if read_back:
        _read_back(target, files, commit, progress=progress)
    if tagged:
        _tag(target, tag, commit)
    if goes_public:
        insist(target, lambda: target.api.update_repo_settings(**target.repo, private=False))
    return {
        "dry_run": False,
        "commit": commit,
        "committed": changes.any,
        "read_back": read_back,
        "opens_history": opens_history,
        "remote": {"exists": True, "commit": remote.head, **changes._asdict()},
    }


def _create(target: Target, *, public: bool) -> Remote:
    """A new repository, private whatever is asked for: nobody is to see it half done."""
    space = {"space_sdk": "gradio"} if target.repo_type == "space" else {}
    insist(target, lambda: target.api.create_repo(**target.repo, private=True, exist_ok=True, **space))
    remote = insist(target, lambda: look(target))
    if remote is None:
        raise PushError(f"{target.url} was created and cannot be read: take a token that may ({TOKEN_PAGE})")
    if not remote.private and not public:
        raise PushError(f"{target.url} was made in public meanwhile: say --public, or take another name")
    return remote


def _tag(target: Target, tag: str, commit: str) -> None:
    # An answer may get lost: the second try then finds the tag there.
    insist(target, lambda: target.api.create_tag(**target.repo, tag=tag, revision=commit, exist_ok=True))
    now = insist(target, lambda: look(target))
    if now is None or now.tags.get(tag) != commit:
        raise PushError(
            f"{target.url} has commit {commit[:12]}, and somebody's tag {tag} on another: take another --tag"
        )


def _compare(files: Sequence[File], remote: Remote | None) -> Changes:
    there = remote.files if remote else {}
    here = {file.path for file in files}
    only_there = sorted(set(there) - here)
    stale = [path for path in only_there if any(fnmatchcase(path, pattern) for pattern in STALE)]
    return Changes(
        new=[file.path for file in files if file.path not in there],
        changed=[file.path for file in files if file.path in there and not _is_same(file, there)],
        unchanged=[file.path for file in files if _is_same(file, there)],
        deleted=stale,
        kept=[path for path in only_there if path not in stale],
    )


def _is_same(file: File, there: dict[str, str]) -> bool:
    return there.get(file.path) in (file.sha256, file.git_sha1)


def _check_remote(
    target: Target, remote: Remote, changes: Changes, *, public: bool, tag: str | None, kind: str
) -> None:
    """Refuse what would change a repository into something that its users do not expect."""
    if not remote.private and not public:
        raise PushError(f"{target.url} is public: say --public, or take another name")
    if kind == "adapter" and any(WHOLE_MODEL.fullmatch(path) for path in remote.files):
        raise PushError(f"{target.url} holds a whole model: push its adapter to a repository of its own")
    if kind == "model" and "adapter_config.json" in remote.files:
        raise PushError(f"{target.url} holds an adapter: push the whole model to a repository of its own")
    if tag in remote.tags and (changes.any or remote.tags[tag] != remote.head):
        raise PushError(
            f"the tag {tag} of {target.url} is on commit {remote.tags[tag][:12]}, which has other content: take "
            "another --tag; a release does not change"
        )


def _commit(target: Target, files: Sequence[File], remote: Remote, changes: Changes, *, progress: bool) -> str:
    """Upload what is not there yet, then make one commit on top of what was looked at; returns its hash."""
    sent = {*changes.new, *changes.changed}
    additions = [_addition(file) for file in files if file.path in sent]
    deletions = [CommitOperationDelete(path, is_folder=False) for path in changes.deleted]
    with _hub_bars(progress):
        insist(target, lambda: target.api.preupload_lfs_files(additions=additions, free_memory=False, **target.repo))
        return _commit_once(target, files, remote, changes, [*additions, *deletions])


@contextmanager
def _hub_bars(shown: bool) -> Iterator[None]:
    """Let the Hub's client show its own bars of an upload, or not."""
    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _addition(file: File) -> CommitOperationAdd:
    addition = CommitOperationAdd(file.path, file.local)
    addition.upload_info.sha256 = bytes.fromhex(file.sha256)  # or it would read the file once more
    return addition


def _commit_once(target: Target, files: Sequence[File], remote: Remote, changes: Changes, operations: Sequence) -> str:
    """Make the commit; where the answer is lost, look whether it is there before asking again."""
    message = "Published with DentalGemma"
    for pause in (*PAUSES, None):
        try:
            commit = target.api.create_commit(
                operations=list(operations), commit_message=message, parent_commit=remote.head, **target.repo
            )
            return commit.oid
        except Exception as error:
            moved = status_of(error) == 412
            if not moved and not is_transient(error):
                with explained(target):
                    raise
            now = insist(target, lambda: look(target))
            if now and now.head != remote.head:
                if _holds(now, files, changes):
                    return now.head
                raise PushError(
                    f"{target.url} changed meanwhile, and nothing there was overwritten: look at what is there "
                    f"(commit {now.head[:12]}), then push again"
                ) from None
            if moved or pause is None:
                with explained(target):
                    raise
            time.sleep(pause)
    raise AssertionError("the last round returns or raises")


def _holds(remote: Remote, files: Sequence[File], changes: Changes) -> bool:
    """Whether a repository has all that the commit was to bring, and nothing that it was to delete."""
    return all(_is_same(file, remote.files) for file in files) and not set(changes.deleted) & set(remote.files)


def _read_back(target: Target, files: Sequence[File], commit: str, *, progress: bool) -> None:
    """Download every file at this commit and compare it with the one here; nothing is kept.

    Raises:
        PushError: when one of them differs.
    """
    with _bar("Reading back", sum(file.size for file in files), progress) as advance:
        for file in files:
            size, sha256 = insist(target, lambda file=file: _hash_remote(target, file.path, commit, advance))
            if (size, sha256) != (file.size, file.sha256):
                raise PushError(
                    f"{target.url} has another {file.path} at commit {commit[:12]} than {file.local} ({size:,} bytes, "
                    f"here {file.size:,}): was the file changed during the push? push again"
                )


def _hash_remote(target: Target, path: str, commit: str, advance: Callable[[int], None]) -> tuple[int, str]:
    url = hf_hub_url(target.repo_id, path, repo_type=target.repo_type, revision=commit)
    size, sha256 = 0, hashlib.sha256()
    try:
        with http_stream_backoff("GET", url, headers=build_hf_headers(library_name="dentalgemma")) as response:
            hf_raise_for_status(response)
            for piece in response.iter_bytes(PIECE):
                size += len(piece)
                sha256.update(piece)
                advance(len(piece))
    except BaseException:
        advance(-size)  # the next try begins anew
        raise
    return size, sha256.hexdigest()
