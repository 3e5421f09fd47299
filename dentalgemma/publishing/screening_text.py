"""What a text must not hold when it is published: tokens and keys, absolute paths, and pictures with metadata.

It is found also where it is written otherwise: with the escapes of JSON, HTML and URLs, and in base64.
"""

from __future__ import annotations

import base64
import binascii
import html
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from huggingface_hub import constants, get_token

from data_builders.secrets import SETTING, TOKEN
from dentalgemma.publishing.screening_pictures import is_picture, name_unreadable, screen_drawing, screen_picture

SECRET_VARIABLES = re.compile(r".*(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS)")
SHORTEST_SECRET = 12  # characters; shorter values of such variables are words such as "true"
REVOKE = "take it out, and revoke it, since it may have been seen"

ROOTS = (
    "home|Users|root|tmp|var|mnt|media|opt|srv|scratch|private|Volumes|workspaces?|kaggle|content|data|work|cluster|lustre"
    r"|gpfs|nfs|export|storage|projects?|gscratch|dbfs|usr/local|ceph|nas|raid\d*|hpc|beegfs|fsx|efs|afs|nobackup"
    r"|[hs]dd\d+|vol\d+|pscratch|lscratch|teamspace|runpod-volume|[pu]/[A-Za-z][\w.-]+"
)
PATHS = (
    re.compile(rf"/(?<![\w.~)\]}}%$@/-]/)(?:{ROOTS})/[^\s\"'`<>\\)\]]+"),
    re.compile(r"file://[^\s\"'<>)\]]{2,}"),
)
# Drives and shares of Windows are looked for only where there is what may be one: these take longer.
DRIVE_OR_SHARE = re.compile(r":[\\/](?!/)|\\\\")
DRIVES = (
    re.compile(
        r"(?<![A-Za-z0-9])[A-Za-z]:(?:\\{1,4}|/)"
        r"(?:Users|Documents and Settings|Windows|Program Files|ProgramData|Temp|Data|home)[\\/][^\s\"'`<>]+",
        re.IGNORECASE,
    ),
    re.compile(r"(?<![A-Za-z0-9])[A-Z]:\\(?![nrt\"'\\])[\w$.-]{2,}\\[\w$][^\s\"'`<>]*"),
    re.compile(r"(?<![A-Za-z0-9])[A-Z]:/[\w$.-]{2,}/[\w$][^\s\"'`<>]*"),
)
# A value of JSON or of a column that is nothing but a path, whatever it begins with.
JSON_VALUES = (
    re.compile(r"\"(/[^\s\"/\\]+/[^\s\"]+)\""),
    re.compile(r"\"([A-Za-z]:(?:\\\\|/)[^\"\n]*)\""),
    re.compile(r"\"(\\\\\\\\[\w.-]+\\\\[^\"\n]+)\""),
)
# A path of two or more parts, whatever it begins with; neither the address of a service nor a system's own.
ANY_PATH = (
    r"(?!(?:v\d+|api|resolve|spaces|models|dev|s?bin|etc|proc|sys|usr/s?bin)/)"
    r"[^\s\"'`/\\<>{}()|*?,]+/[^\s\"'`<>{}()|*?,]+"
)
DRIVE_PATH = r"(?:[A-Za-z]:[\\/](?![nrt\"'\\])[\w$. -]+[\\/]|\\\\[A-Za-z][\w.-]+\\[\w$][\w$. -]*\\[\w$])[^\s\"'`<>]*"
QUOTED_PATHS = (  # and the same of Windows
    re.compile(rf"/(?<=[\"'`]/)(?<!(?:href|\ssrc)=[\"']/){ANY_PATH}(?=[\"'`])"),
    re.compile(rf"(?<=[\"'`]){DRIVE_PATH}(?=[\"'`])"),
)
# The rest of a line that begins with a key of YAML, or the dash of a list, or with nothing.
VALUES = (
    re.compile(rf"/(?<=[\s\"']/){ANY_PATH}(?=[\"']?[ \t]*(?:#.*)?$)", re.MULTILINE),
    re.compile(rf"(?<=[\s\"']){DRIVE_PATH}(?=[\"']?[ \t]*(?:#.*)?$)", re.MULTILINE),
)
KEY = re.compile(r"\s*(?:- +)*(?:[\"']?\w[\w. -]{0,60}[\"']?:[ \t]+)?[\"']?")

PICTURE_IN_TEXT = re.compile(
    r"(?:(?<![A-Za-z0-9+/])|(?<=\\[nrt]))(?:/9j/|iVBORw0KGgo|UklGR)"
    r"(?:[A-Za-z0-9+/]++(?:\\n|\r?\n[ \t]*)?+)*+={0,2}(?:\\n)?"
)
SMALLEST_PICTURE = 60  # bytes; what is shorter is the beginning of one, as texts about formats show it
DATA_URI = re.compile(r"data:[\w.+-]+/[\w.+-]+(?:;[\w=.+-]+)*;base64,\s*([A-Za-z0-9+/%]+={0,2})")
DRAWING_URI = re.compile(r"data:image/svg\+xml[^,\s]{0,60},([^\"'\n]+)")
ESCAPED = re.compile(r"\\u00([2-7][0-9A-Fa-f])|%([2-7][0-9A-Fa-f])|&#?\w{2,8};")
BASE64 = re.compile(r"[A-Za-z0-9+/_-]{24,}+")
URL_SAFE = str.maketrans("-_", "+/")


class Own(NamedTuple):
    """What tells of this machine: its home and present folder, and its tokens; `token` finds those and all others."""

    places: tuple[str, ...]
    token: re.Pattern[bytes]


def read_own() -> Own:
    """The tokens of the environment and of `hf auth login`, and the folders where these tell more than a root."""
    values = [value for name, value in os.environ.items() if SECRET_VARIABLES.fullmatch(name.upper())]
    values.append(get_token() or "")
    for file in (constants.HF_TOKEN_PATH, constants.HF_STORED_TOKENS_PATH):
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, ValueError):
            continue
        values += re.findall(r"(?m)^\s*\w*token\w*\s*=\s*(\S+)", text) if "=" in text else [text]
    secrets = sorted({value.strip().encode() for value in values if len(value.strip()) >= SHORTEST_SECRET})
    places = {Path.home(), Path.cwd(), Path.cwd().resolve()}
    return Own(
        tuple(sorted(str(place) for place in places if len(place.parts) > 2)),
        re.compile(b"|".join([TOKEN.pattern, *(re.escape(secret) for secret in secrets)])),
    )


def hide(text: str, own: Own) -> str:
    """The text on one line, without what looks like a token in it."""
    return " ".join(own.token.sub(b"[token]", text.encode(errors="replace")).decode(errors="replace").split())


def screen_text(text: str, own: Own, *, paths: bool = True, as_values: bool = False) -> Iterator[tuple[int, str]]:
    """Yield the number of lines before it and a sentence for what speaks against publishing a text.

    `paths`: whether paths are looked for; `as_values`: whether it is JSON, where any quoted path is one.
    """
    line = find_token(text, own)
    if line is not None:
        yield line, f"it holds what looks like a token or a key: {REVOKE}"
    if paths:
        for number, found in find_paths(text, own.places, as_values=as_values):
            yield number, describe_path(found, own)
            break
    yield from _screen_embedded(text, own)


def find_token(text: str, own: Own) -> int | None:
    """The number of lines before a token, however it is written; `None` where there is none."""
    for form in dict.fromkeys((text, _unescape(text))):
        content = form.encode(errors="replace")
        if found := own.token.search(content) or SETTING.search(content.lower()):
            return content.count(b"\n", 0, found.start())
    for word in BASE64.finditer(text):
        if own.token.search(_decode(word[0]) or b""):
            return text.count("\n", 0, word.start())
    return None


def _unescape(text: str) -> str:
    """The text with the letters that JSON, HTML and URLs write otherwise; its lines stay."""

    def unescape(found: re.Match[str]) -> str:
        code = found[1] or found[2]
        letter = chr(int(code, 16)) if code else html.unescape(found[0])
        return letter if letter.isascii() and letter.isprintable() else found[0]

    return ESCAPED.sub(unescape, text)


def _decode(encoded: str) -> bytes | None:
    encoded = encoded.rstrip("=").translate(URL_SAFE)
    try:
        return base64.b64decode(encoded + "=" * (-len(encoded) % 4))
    except (binascii.Error, ValueError):
        return None


def find_paths(text: str, places: Iterable[str], *, as_values: bool) -> Iterator[tuple[int, str]]:
    """Yield the number of lines before it and the path, for every absolute path in a text."""
    if _may_have_picture(text):
        text = PICTURE_IN_TEXT.sub(lambda found: "\n" * found[0].count("\n"), text)
    text = text.replace("\\/", "/")
    windows = DRIVE_OR_SHARE.search(text) is not None
    for pattern in PATHS + DRIVES if windows else PATHS:
        for found in pattern.finditer(text):
            yield text.count("\n", 0, found.start()), found[0]
    if as_values:
        for pattern in JSON_VALUES:
            for found in pattern.finditer(text):
                yield text.count("\n", 0, found.start()), found[1]
    else:
        yield from _find_other_paths(text, windows=windows)
    for place in places:
        if place in text:
            for found in re.finditer(rf"(?<![\w.])(?:{re.escape(place)})(?![\w.-])", text):
                yield text.count("\n", 0, found.start()), found[0]


def _may_have_picture(text: str) -> bool:
    """Whether the pattern for pictures need be tried, which is slow."""
    return any(beginning in text for beginning in ("/9j/", "iVBORw0KGgo", "UklGR"))


def _find_other_paths(text: str, *, windows: bool) -> Iterator[tuple[int, str]]:
    """Paths with any beginning: in quotes, and as the whole value of a line."""
    for pattern in QUOTED_PATHS if windows else QUOTED_PATHS[:1]:
        for found in pattern.finditer(text):
            yield text.count("\n", 0, found.start()), found[0]
    for pattern in VALUES if windows else VALUES[:1]:
        for found in pattern.finditer(text):
            if KEY.fullmatch(text, text.rfind("\n", 0, found.start()) + 1, found.start()):
                yield text.count("\n", 0, found.start()), found[0]


def describe_path(path: str, own: Own) -> str:
    shown = hide(path, own)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}…"
    return f"it holds a path of this or another machine, {shown}: write what others can use, such as a name"


def _screen_embedded(text: str, own: Own) -> Iterator[tuple[int, str]]:
    """Pictures in base64, whether in a page, a notebook, or JSON, and what else a data URI holds."""
    for found in PICTURE_IN_TEXT.finditer(text) if _may_have_picture(text) else ():
        content = _decode(re.sub(r"\\n|\s", "", found[0]))
        if content and is_picture(content) and len(content) > SMALLEST_PICTURE:
            yield from _at(text, found, screen_picture(content))
    if "base64," in text:
        for found in DATA_URI.finditer(text):
            if not PICTURE_IN_TEXT.match(found[1]) or "%" in found[1]:
                yield from _at(text, found, _screen_decoded(_decode(unquote(found[1])) or b"", own))
    if "image/svg+xml" in text:
        for found in DRAWING_URI.finditer(text):
            yield from _at(text, found, screen_drawing(unquote(found[1])))


def _at(text: str, found: re.Match[str], sentences: Iterable[str]) -> Iterator[tuple[int, str]]:
    for sentence in sentences:
        yield text.count("\n", 0, found.start()), sentence


def _screen_decoded(content: bytes, own: Own) -> Iterator[str]:
    """The content of a data URI: a plain picture, or text without anything that a file must not hold."""
    if is_picture(content):
        if len(content) > SMALLEST_PICTURE:
            yield from screen_picture(content)
        return
    if what := name_unreadable(content):
        yield f"it embeds {what}, which cannot be looked into: leave it out"
        return
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        if len(content) > SMALLEST_PICTURE:
            yield "it embeds what is neither a plain picture nor text, which cannot be looked into: leave it out"
        return
    for _, sentence in screen_text(text, own):
        yield sentence
    yield from screen_drawing(text)
