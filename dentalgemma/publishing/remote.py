"""A repository on the Hub as it is now, and what its client raises in one sentence with the remedy."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

from huggingface_hub import HfApi, constants, get_token, set_client_factory
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # of whatever the client speaks HTTP with
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import _http

from data_builders.records import InputError

PAUSES = (1.0, 3.0)  # seconds before another try
PATIENCE = 45.0  # seconds after which nothing is begun anew: the client underneath has tried a few times by itself
LONGEST_PAUSE = 300.0  # seconds, where the Hub says when to come again
ANSWER = 60.0  # seconds that the Hub may keep silent; three times as long where something is sent
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
TOKEN_PAGE = "https://huggingface.co/settings/tokens"

Result = TypeVar("Result")


class PushError(InputError):
    """A push that the Hub did not let through; the message says what the state is and what to do."""

    exit_code = 1


class Remote(NamedTuple):
    """A repository as it is: newest commit, hash of each file there, visibility, tags by commit, branches."""

    head: str
    private: bool
    files: dict[str, str]
    tags: dict[str, str]
    branches: list[str]


class Target(NamedTuple):
    """Where to push."""

    api: HfApi
    repo_id: str
    repo_type: str

    @property
    def repo(self) -> dict[str, str]:
        return {"repo_id": self.repo_id, "repo_type": self.repo_type}

    @property
    def url(self) -> str:
        prefix = {"model": "", "dataset": "datasets/", "space": "spaces/"}[self.repo_type]
        return f"{constants.ENDPOINT}/{prefix}{self.repo_id}"


def look(target: Target) -> Remote | None:
    """The repository as it is now, or `None` where there is none that this token may see."""
    try:
        info = target.api.repo_info(**target.repo)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError as error:
        if error.response.status_code == 404:
            return None
        raise
    refs = target.api.list_repo_refs(**target.repo)
    tags = {ref.name: ref.target_commit for ref in refs.tags}
    branches = [ref.name for ref in refs.branches]
    return Remote(str(info.sha), bool(info.private), list_files(target, str(info.sha)), tags, branches)


def list_files(target: Target, commit: str) -> dict[str, str]:
    """The files at a commit with their hashes: SHA-256 of those in large-file storage, git's of the others."""
    tree = target.api.list_repo_tree(**target.repo, revision=commit, recursive=True)
    return {entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id for entry in tree if hasattr(entry, "blob_id")}


@contextmanager
def limited_silence() -> Iterator[None]:
    """Let no request wait for good: by itself the Hub's client sets no limit to most of them."""
    made = _http._GLOBAL_CLIENT_FACTORY

    def limit(request) -> None:
        seconds = ANSWER if request.method in ("GET", "HEAD") else 3 * ANSWER
        asked = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {
            name: seconds if asked.get(name) is None else asked[name] for name in ("connect", "read", "write", "pool")
        }

    def make():
        client = made()
        hooks = client.event_hooks
        client.event_hooks = {**hooks, "request": [*hooks["request"], limit]}
        return client

    set_client_factory(make)
    try:
        yield
    finally:
        set_client_factory(made)


def insist(target: Target, act: Callable[[], Result]) -> Result:
    """Do something that may be done twice, a few times where the Hub or the line fails.

    Raises:
        PushError: when it does not come about.
    """
    begun = time.monotonic()
    for pause in PAUSES:
        with explained(target):
            try:
                return act()
            except Exception as error:
                if not is_transient(error) or time.monotonic() - begun > PATIENCE:
                    raise
                pause = how_long(error, pause)
        time.sleep(pause)
    with explained(target):
        return act()


def how_long(error: Exception, pause: float) -> float:
    """Seconds to wait after this failure: as the Hub asks, within reason, or `pause`."""
    asked = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return max(pause, min(float(asked), LONGEST_PAUSE)) if asked.isdecimal() else pause


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, RuntimeError) and error.__cause__:  # around an upload
        error = error.__cause__
    if isinstance(error, OfflineModeIsEnabled):
        return False
    if (status := status_of(error)) is not None:
        return status in TRANSIENT
    # An answer that is no JSON is a gateway's page.
    return isinstance(error, (HTTPError, TimeoutError, ConnectionError, json.JSONDecodeError))


def status_of(error: BaseException) -> int | None:
    """The status that the Hub answered with. Its upload library, hf_xet, raises errors of the system instead."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code
    if isinstance(error, ConnectionError):
        said = re.search(r"HTTP status \w+ error \((\d{3})\b", str(error))
        return int(said[1]) if said else None
    if isinstance(error, OSError) and error.filename is None:
        return 403 if isinstance(error, PermissionError) else 404 if isinstance(error, FileNotFoundError) else None
    return None


@contextmanager
def explained(target: Target) -> Iterator[None]:
    """Turn what the Hub's client raises into one sentence with the remedy, without any part of a token."""
    try:
        yield
    except InputError:
        raise
    except OfflineModeIsEnabled:
        raise PushError("HF_HUB_OFFLINE is set, so the Hub is not asked: unset it to push") from None
    except GatedRepoError:
        raise PushError(
            f"{target.url} is gated: accept its terms on that page, with the account of this token"
        ) from None
    except (HTTPError, OSError) as error:
        if isinstance(error, OSError) and not isinstance(error, HfHubHTTPError) and error.filename is not None:
            raise  # about a file of this machine
        raise PushError(_explain(target, error)) from None
    except RuntimeError as error:
        if not isinstance(error.__cause__, (HTTPError, OSError)):
            raise
        raise PushError(_explain(target, error.__cause__)) from None
    except json.JSONDecodeError as error:
        raise PushError(_lost(target, error)) from None
    except ValueError as error:  # of the card's metadata, say
        raise PushError(f"{target.url}: {_one_line(str(error))}") from None


def _lost(target: Target, error: Exception) -> str:
    return (
        f"the Hub cannot be reached or breaks off ({type(error).__name__}), {target.url} is as it was or complete: run "
        "the same command again; what was uploaded is not sent twice"
    )


def _explain(target: Target, error: Exception) -> str:
    status, said = status_of(error), ""
    if status is None:
        return _lost(target, error)
    if isinstance(error, HfHubHTTPError):
        said = error.response.headers.get("X-Error-Message") or error.server_message or ""
        said = f" ({_one_line(said)})" if said else ""
    if status == 401:
        return (
            f"the Hub does not accept the token for {target.url} (401): log in again with `hf auth login`, or renew "
            f"HF_TOKEN ({TOKEN_PAGE})"
        )
    if status == 403:
        return (
            f"this token may not do that with {target.url} (403){said}: take one that may write there ({TOKEN_PAGE}), "
            "or a repository of your own"
        )
    if status == 404:
        return f"{target.url} is not there, or this token may not see it (404): check its name and {TOKEN_PAGE}"
    if status in (409, 412):
        return (
            f"{target.url} changed meanwhile ({status}), and nothing there was overwritten: look at it, then push again"
        )
    if status in TRANSIENT:
        return (
            f"the Hub has trouble ({status}){said}, {target.url} is as it was or complete: run the same command again "
            "later; what was uploaded is not sent twice"
        )
    return f"the Hub refuses the push to {target.url} ({status}){said}"


def _one_line(text: str) -> str:
    """What a server said, in one line of at most 200 characters, without the token."""
    token = get_token()
    if token:
        text = text.replace(token, "…")
    return printable(" ".join(text.split()))[:200]


def printable(text: str) -> str:
    """Text of others for a terminal, on which control characters and changes of direction would act."""
    return "".join(sign if sign.isprintable() or sign == "\n" else "\ufffd" for sign in text)
