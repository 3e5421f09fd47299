"""What tokens and keys look like, wherever they turn up: in settings that are read, and in files that are published."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from data_builders.records import InputError

# What a token begins with, and the whole of it. The beginning is searched first, which is fast also in weights.
TOKENS = [
    (prefix, re.compile(rb"(?<![A-Za-z0-9])" + pattern))
    for prefix, pattern in (
        (b"hf_", rb"hf_(?:oauth_)?[A-Za-z0-9]{16,}"),
        (b"api_org_", rb"api_org_[A-Za-z0-9]{16,}"),
        (b"sk-", rb"sk-(?=[A-Za-z_-]*\d)[\w-]{20,}"),
        *((b"gh%c_" % kind, rb"gh%c_[A-Za-z0-9]{20,}" % kind) for kind in b"pousr"),
        (b"github_pat_", rb"github_pat_\w{20,}"),
        (b"glpat-", rb"glpat-[\w-]{16,}"),
        (b"AKIA", rb"AKIA[0-9A-Z]{16}(?![0-9A-Za-z])"),
        (b"ASIA", rb"ASIA[0-9A-Z]{16}(?![0-9A-Za-z])"),
        (b"AIza", rb"AIza[\w-]{35}"),
        (b"xox", rb"xox[abprs]-[\w-]{10,}"),
        (b"pypi-", rb"pypi-AgE[\w-]{20,}"),
        (b"WANDB_API_KEY", rb"WANDB_API_KEY\W{1,8}[0-9a-f]{40}"),
        (b"KAGGLE_KEY", rb"KAGGLE_KEY\W{1,8}[0-9a-f]{32}"),
        (b"-----BEGIN", rb"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----"),
    )
]
REMEDY = "take it out, log in with `hf auth login` instead, and revoke it where others may have seen it"


def find_secret(content: bytes) -> int | None:
    """Where a token or key of a known form begins, as bytes from the start, or None; the first of the first form."""
    for prefix, pattern in TOKENS:
        for place in _places_of(prefix, content):
            if pattern.match(content, place):
                return place
    return None


def _places_of(prefix: bytes, content: bytes) -> Iterator[int]:
    place = content.find(prefix)
    while place >= 0:
        yield place
        place = content.find(prefix, place + 1)


def refuse_secrets(text: str, path: Path, error: type[InputError] = InputError) -> None:
    """Refuse a settings file that holds a token, naming the line alone: what it sets ends up in cards and reports.

    Raises:
        InputError: as the given child; the token is not in the message, not even in part.
    """
    content = text.encode(errors="replace")
    place = find_secret(content)
    if place is not None:
        line = content.count(b"\n", 0, place) + 1
        raise error(f"{path}:{line}: this looks like a token or a key; {REMEDY}")
