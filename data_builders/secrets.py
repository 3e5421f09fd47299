"""What tokens and keys look like, wherever they turn up: in settings that are read, and in files that are published."""

from __future__ import annotations

import re
from pathlib import Path

from data_builders.records import InputError

# What a token begins with, in no word, and what follows. All begin with one given letter, so weights are searched fast.
TOKENS = (
    (rb"hf_", rb"(?:oauth_)?[A-Za-z0-9]{16,}"),
    (rb"api_org_", rb"[A-Za-z0-9]{16,}"),
    (rb"sk-", rb"(?=[A-Za-z_-]*\d)[\w-]{20,}"),
    (rb"gh[pousr]_", rb"[A-Za-z0-9]{20,}"),
    (rb"github_pat_", rb"\w{20,}"),
    (rb"glpat-", rb"[\w-]{16,}"),
    (rb"A[KS]IA", rb"[0-9A-Z]{16}(?![0-9A-Za-z])"),
    (rb"AIza", rb"[\w-]{35}"),
    (rb"ya29\.", rb"[\w-]{20,}"),
    (rb"GOCSPX-", rb"[\w-]{20,}"),
    (rb"xox[abprs]-", rb"[\w-]{10,}"),
    (rb"xapp-", rb"\d-[\w-]{16,}"),
    (rb"hooks\.slack\.com/services/", rb"\w{6,}/\w{6,}/\w{16,}"),
    (rb"sk_live_", rb"[A-Za-z0-9]{16,}"),
    (rb"rk_live_", rb"[A-Za-z0-9]{16,}"),
    (rb"gsk_", rb"[A-Za-z0-9]{32,}"),
    (rb"r8_", rb"[A-Za-z0-9]{30,}"),
    (rb"npm_", rb"[A-Za-z0-9]{30,}"),
    (rb"nvapi-", rb"[\w-]{32,}"),
    (rb"pypi-", rb"AgE[\w-]{20,}"),
    (rb"wandb_v1_", rb"\w{30,}"),
    (rb"KGAT_", rb"\w{20,}"),
    (rb"AccountKey=", rb"[A-Za-z0-9+/]{60,}"),
    (rb"eyJ", rb"[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{16,}"),  # a JSON web token
    (rb"WANDB_API_KEY", rb"\W{1,8}[0-9a-f]{40}"),
    (rb"KAGGLE_KEY", rb"\W{1,8}[0-9a-f]{32}"),
    (rb"AWS_SECRET_ACCESS_KEY", rb"\W{1,8}[A-Za-z0-9/+]{40}"),
    (rb"-----BEGIN ", rb"[A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----"),
)
TOKEN = re.compile(b"|".join(rb"%b(?<![A-Za-z0-9]%b)%b" % (begin, begin, rest) for begin, rest in TOKENS))
# Settings that hold a key of no form of its own, in text that was lowered: of W&B, Kaggle, AWS, a .netrc, a URL.
SETTING = re.compile(
    rb"wandb_api_key\W{1,8}[0-9a-f]{40}"
    rb"|kaggle_key\W{1,8}[0-9a-f]{32}"
    rb"|aws_secret_access_key\W{1,8}[a-z0-9/+]{40}"
    rb"|\"username\"[^{}]{0,200}\"key\"\s*:\s*\"[0-9a-f]{32}\""
    rb"|\"key\"\s*:\s*\"[0-9a-f]{32}\"[^{}]{0,200}\"username\""
    rb"|machine\s+\S+\s+login\s+\S+\s+password\s+\S{6}"
    rb"|://[\w.%+-]+:(?!(?:password|token|secret|x-oauth-basic)@)[^\s/@:\"'<>{}$*\[\]\x7f-\xff]{6,}@[a-z0-9]"
)
REMEDY = "take it out, log in with `hf auth login` instead, and revoke it where others may have seen it"


def find_secret(content: bytes) -> int | None:
    """Where the first token or key of a known form begins, as bytes from the start, or None."""
    found = TOKEN.search(content) or SETTING.search(content.lower())
    return found.start() if found else None


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
