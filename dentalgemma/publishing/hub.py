"""Publish a folder on the Hub: checked first, in one commit or none, private unless asked otherwise, read back after.

The token is the Hub client's own, from the environment or `hf auth login`; nothing here takes, shows or keeps one.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
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

from data_builders.secrets import find_secret
from dentalgemma.certificates import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MODEL_FILES, PROCESSOR_FILES
from dentalgemma.publishing.checks import Inspection, inspect
from dentalgemma.publishing.folders import Publication, PushRefused, recognise
from dentalgemma.publishing.outgoing import (
    PIECE,
    File,
    all_same,
    is_same,
    one_configuration_each,
    read_files,
    state_permissions,
    take_stamps,
)
from dentalgemma.publishing.push_report import progress_bar
from dentalgemma.publishing.remote import (
    PATIENCE,
    PAUSES,
    TOKEN_PAGE,
    PushError,
    Remote,
    Target,
    explained,
    how_long,
    insist,
    is_transient,
    limited_silence,
    list_files,
    look,
    status_of,
)

# What loading a repository picks up. Where it is there and not here, it is another release's: the commit deletes it.
# All else that is there and not here (.gitattributes, what people added) stays.
WEIGHTS = r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
STALE = {
    "model": re.compile("|".join([WEIGHTS, *map(re.escape, MODEL_FILES)])),
    "adapter": re.compile("|".join(map(re.escape, (ADAPTER_WEIGHTS, ADAPTER_CONFIG, *PROCESSOR_FILES)))),
    "dataset": re.compile(r"data/([^/]+/)?(train|validation|test)-\d{5}-of-\d{5}\.parquet"),
    "space": re.compile(r"(?!)"),  # nothing
}
GITATTRIBUTES = ".gitattributes"  # the Hub's own
TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")


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
    open_history: bool = False,
    progress: bool = True,
) -> dict:
    """Publish a model, adapter, dataset or Space folder as `repo_id`; returns a report ("push/1").

    There is one commit, with the newest one as its parent, or none where everything is there already. What was
    uploaded before an interruption is not sent again. A repository is made public only after every file was read back,
    and one with anything in it that this push did not check only where `open_history` says so.

    Raises:
        PushRefused: when the folder must not be published as it is.
        PushError: when the Hub does not let it through, or has other content afterwards.
    """
    folder = Path(folder)
    _check_names(str(folder), repo_id, tag, permissions)
    publication = recognise(folder, adapter_only=adapter_only)
    if permissions and publication.kind == "space":
        raise PushRefused("--permission is about the sources of a dataset or a model; a Space has none")
    if not dry_run and get_token() is None:
        raise PushError(
            f"no token for the Hub: run `hf auth login`, or set HF_TOKEN, with one that may write ({TOKEN_PAGE})"
        )
    stamps = take_stamps(publication)
    looked_into = {**publication.files, **publication.beside}
    with progress_bar("Checking", sum(path.stat().st_size for path in looked_into.values()), shown=progress) as advance:
        inspection = inspect(folder, publication, public=public, permissions=permissions, advance=advance)
    target = Target(HfApi(library_name="dentalgemma"), repo_id, publication.repo_type)
    with one_configuration_each(folder, publication, needed=inspection.per_source) as published, limited_silence():
        files = read_files(published, repo_id, permissions=permissions, progress=progress)
        plan = _Plan(target, publication.kind, files, public, tag, tuple(permissions), open_history, progress)

        def check_unchanged() -> None:
            if take_stamps(publication) != stamps:
                raise PushError(f"{folder} was changed while it was checked or sent: push again")

        check_unchanged()
        report = _describe(plan, published, inspection)
        if dry_run:
            return report | {"dry_run": True} | _foresee(plan)
        return report | _publish(plan, check_unchanged)


class _Plan(NamedTuple):
    """What is to come about: these files there, so visible, with this tag."""

    target: Target
    kind: str
    files: Sequence[File]
    public: bool
    tag: str | None
    permissions: tuple[str, ...]
    open_history: bool
    progress: bool


def _check_names(folder: str, repo_id: str, tag: str | None, permissions: Collection[str]) -> None:
    named = {"the folder": folder, "the repository": repo_id, "--tag": tag or ""}
    for what, name in (*named.items(), *(("--permission", name) for name in permissions)):
        if find_secret(name.encode(errors="replace")) is not None:
            raise PushRefused(
                f"what was given for {what} looks like a token: a token is never an argument (`hf auth login`), and "
                f"this one may stand in your shell's history: renew it ({TOKEN_PAGE})"
            )
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        repo_id = ""
    if repo_id.count("/") != 1:
        raise PushRefused(
            "a repository is named owner/name, of letters, digits, '-', '_' and '.': such as me/dentalgemma"
        )
    if tag is not None and not (TAG.fullmatch(tag) and ".." not in tag and not tag.endswith((".", ".lock"))):
        raise PushRefused(f"--tag {tag!r} is no name for a tag; take one such as v1.0")


def _describe(plan: _Plan, publication: Publication, inspection: Inspection) -> dict:
    return {
        "format": "push/1",
        "repo": plan.target.repo_id,
        "repo_type": plan.target.repo_type,
        "url": plan.target.url,
        "kind": plan.kind,
        "visibility": "public" if plan.public else "private",
        "tag": plan.tag,
        "licence": inspection.licence,
        "verdict": inspection.verdict,
        "one_configuration_per_source": inspection.per_source,
        "permissions": sorted(set(plan.permissions)),
        "warnings": inspection.warnings,
        "files": [{"path": file.path, "size": file.size, "sha256": file.sha256} for file in plan.files],
        "bytes": sum(file.size for file in plan.files),
        "left_here": publication.left_here,
    }


def _foresee(plan: _Plan) -> dict:
    """What a push would change on the Hub, as far as that can be told from here; nothing is created."""
    if get_token() is None:
        return {"remote": None, "remote_unknown": "there is no token for the Hub (`hf auth login`, or HF_TOKEN)"}
    try:
        with explained(plan.target):
            remote = look(plan.target)
    except PushError as error:
        return {"remote": None, "remote_unknown": str(error)}
    changes = _compare(plan, remote)
    if remote:
        _check_remote(plan, remote, changes)
    before = {"exists": remote is not None, "commit": remote.head if remote else None}
    return {"remote": {**before, **changes._asdict()}, "opens_history": bool(remote and remote.private and plan.public)}


def _publish(plan: _Plan, check_unchanged: Callable[[], None]) -> dict:
    target, tag = plan.target, plan.tag
    remote = insist(target, lambda: look(target))
    opens_history = bool(remote and remote.private and plan.public)
    if remote:
        _check_remote(plan, remote, _compare(plan, remote))
    else:
        remote = _create(target, public=plan.public)
    changes = _compare(plan, remote)
    commit = _commit(plan, remote, changes, check_unchanged) if changes.any else remote.head
    tagged, goes_public = tag is not None and tag not in remote.tags, plan.public and remote.private
    acts = changes.any or tagged or goes_public
    if acts:
        _read_back(plan, commit)
    if tagged:
        _tag(target, tag, commit)
    if goes_public:
        _open(target, commit)
    elif acts:
        _check_visibility(plan)
    return {
        "dry_run": False,
        "commit": commit,
        "committed": changes.any,
        "read_back": acts,
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


def _open(target: Target, commit: str) -> None:
    """Make a repository public that holds what was read back, and nothing else; private again if it does not.

    Raises:
        PushError: when somebody else's commit came in between.
    """
    moved = f"{target.url} changed after it was read back, and stays private: look at what is there, then push again"
    now = insist(target, lambda: look(target))
    if now is None or now.head != commit:
        raise PushError(moved)
    insist(target, lambda: target.api.update_repo_settings(**target.repo, private=False))
    now = insist(target, lambda: look(target))
    if now is None or now.head != commit:
        insist(target, lambda: target.api.update_repo_settings(**target.repo, private=True))
        raise PushError(f"{moved} (it was public for a moment)")


def _check_visibility(plan: _Plan) -> None:
    """What was to stay private may have been opened by somebody else meanwhile."""
    now = insist(plan.target, lambda: look(plan.target))
    if now is not None and now.private == plan.public:
        state = "private" if now.private else "public"
        raise PushError(f"{plan.target.url} was made {state} by somebody else meanwhile: see to it in its settings")


def _tag(target: Target, tag: str, commit: str) -> None:
    # An answer may get lost: the second try then finds the tag there.
    insist(target, lambda: target.api.create_tag(**target.repo, tag=tag, revision=commit, exist_ok=True))
    now = insist(target, lambda: look(target))
    if now is None or now.tags.get(tag) != commit:
        raise PushError(
            f"{target.url} has commit {commit[:12]}, and somebody's tag {tag} on another: take another --tag"
        )


def _compare(plan: _Plan, remote: Remote | None) -> Changes:
    there = remote.files if remote else {}
    only_there = sorted(set(there) - {file.path for file in plan.files})
    stale = [path for path in only_there if STALE[plan.kind].fullmatch(path)]
    return Changes(
        new=[file.path for file in plan.files if file.path not in there],
        changed=[file.path for file in plan.files if file.path in there and not is_same(file, there)],
        unchanged=[file.path for file in plan.files if is_same(file, there)],
        deleted=stale,
        kept=[path for path in only_there if path not in stale],
    )


def _check_remote(plan: _Plan, remote: Remote, changes: Changes) -> None:
    """Refuse what would change a repository into something that its users do not expect."""
    target, tag = plan.target, plan.tag
    if not remote.private and not plan.public:
        raise PushRefused(f"{target.url} is public: say --public, or take another name")
    if plan.kind == "adapter" and any(re.fullmatch(WEIGHTS, path) for path in remote.files):
        raise PushRefused(f"{target.url} holds a whole model: push its adapter to a repository of its own")
    if plan.kind == "model" and ADAPTER_CONFIG in remote.files:
        raise PushRefused(f"{target.url} holds an adapter: push the whole model to a repository of its own")
    if tag in remote.tags and (changes.any or remote.tags[tag] != remote.head):
        raise PushRefused(
            f"the tag {tag} of {target.url} is on commit {remote.tags[tag][:12]}, which has other content: take "
            "another --tag; a release does not change"
        )
    if remote.private and plan.public and not plan.open_history:
        unknown = insist(target, lambda: _find_unchecked(plan, remote, changes))
        if unknown:
            raise PushRefused(
                f"{target.url} holds what this push did not check, and --public would show it to everybody: {unknown}; "
                "take another name, or say --open-history if all of that may be seen"
            )


def _find_unchecked(plan: _Plan, remote: Remote, changes: Changes) -> str:
    """What would become public with a private repository beside the files of this push."""
    kept = [path for path in changes.kept if path != GITATTRIBUTES]
    if kept:
        return ", ".join(kept[:5]) + (f" and {len(kept) - 5:,} more files" if len(kept) > 5 else "")
    branches = [name for name in remote.branches if name != "main"]
    if branches:
        return f"the branch {branches[0]}"
    commits = [commit.commit_id for commit in plan.target.api.list_repo_commits(**plan.target.repo)]
    earlier = commits if changes.any else commits[1:]
    if len(earlier) > 1:  # the Hub's own when the repository was made is one
        return f"{len(earlier)} earlier commits"
    for commit in earlier:
        before = list_files(plan.target, commit)
        same = {file.path for file in plan.files if is_same(file, before)}
        if set(before) - same - {GITATTRIBUTES}:
            return f"the earlier commit {commit[:12]}"
    return ""


def _commit(plan: _Plan, remote: Remote, changes: Changes, check_unchanged: Callable[[], None]) -> str:
    """Upload what is not there yet, then make one commit on top of what was looked at; returns its hash."""
    target, sent = plan.target, {*changes.new, *changes.changed}
    additions = [_addition(file) for file in plan.files if file.path in sent]
    deletions = [CommitOperationDelete(path, is_folder=False) for path in changes.deleted]
    # Of the upload library, which tells nobody that it waits for its storage: by itself it does so for minutes.
    os.environ.setdefault("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "3")
    with _hub_bars(plan.progress):
        if plan.progress:
            size = sum(file.size for file in plan.files if file.path in sent)
            Console(stderr=True).print(
                f"Uploading up to {size:,} bytes to {target.url}", markup=False, highlight=False, soft_wrap=True
            )
        insist(target, lambda: target.api.preupload_lfs_files(additions=additions, free_memory=False, **target.repo))
        check_unchanged()
        return _commit_once(plan, remote, changes, [*additions, *deletions])


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
    addition = CommitOperationAdd(file.path, file.local if file.content is None else file.content)
    addition.upload_info.sha256 = bytes.fromhex(file.sha256)  # or it would read the file once more
    return addition


def _commit_once(plan: _Plan, remote: Remote, changes: Changes, operations: Sequence) -> str:
    """Make the commit; where the answer is lost, look whether it is there before asking again."""
    target, begun = plan.target, time.monotonic()
    stated = state_permissions(plan.permissions) if plan.permissions else None
    for pause in (*PAUSES, None):
        try:
            commit = target.api.create_commit(
                operations=list(operations),
                commit_message="Published with DentalGemma",
                commit_description=stated,
                parent_commit=remote.head,
                **target.repo,
            )
            return commit.oid
        except Exception as error:
            moved = status_of(error) == 412
            if not moved and not is_transient(error):
                with explained(target):
                    raise
            now = insist(target, lambda: look(target))
            if now and now.head != remote.head:
                if all_same(plan.files, now.files) and not set(changes.deleted) & set(now.files):
                    return now.head
                raise PushError(
                    f"{target.url} changed meanwhile, and nothing there was overwritten: look at what is there "
                    f"(commit {now.head[:12]}), then push again"
                ) from None
            if moved or pause is None or time.monotonic() - begun > PATIENCE:
                with explained(target):
                    raise
            time.sleep(how_long(error, pause))
    raise AssertionError("the last round returns or raises")


def _read_back(plan: _Plan, commit: str) -> None:
    """Download every file at this commit and compare it with the one here; nothing is kept.

    Raises:
        PushError: when one of them differs.
    """
    target, files = plan.target, plan.files
    with progress_bar("Reading back", sum(file.size for file in files), shown=plan.progress) as advance:
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
