"""What must not leave this machine: every file that is to be uploaded is looked into, by its content, not its name.

Refused are names that hold secrets or training state, pickles, tokens and keys (also this machine's own, also in
weights and parquet), absolute paths, pictures that carry more than their pixels, and whatever cannot be looked into. A
token that was found is never shown, not even in part.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import json
import os
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import constants, get_token

from data_builders.metadata import PNG_SIGNATURE, NotSeparable, strip_metadata

PIECE = 8 << 20  # bytes that are looked at together
OVERLAP = 1024  # bytes that two pieces share, so that nothing is cut in two; longer than any token
WHOLE = 256 << 20  # bytes of a text or picture that is looked at whole

NAMES = (
    (
        re.compile(r"training_args\.bin|(?:optimizer|scheduler|scaler|rng_state)[\w.-]*\.(?:pt|pth|bin|safetensors)"),
        "the state of a training run; leave it out",
    ),
    (
        re.compile(r".*\.(?:pt|pth|bin|pkl|pickle|ckpt|joblib|dill)"),
        "a pickle by its name, which can run code when it is loaded; save weights as safetensors",
    ),
    (
        re.compile(
            r"\.env(?:\..*)?|[._]netrc|token|stored_tokens|\.git-credentials|\.pypirc|\.npmrc|kaggle\.json|id_(?:rsa|dsa|ecdsa"
            r"|ed25519).*|.*\.(?:pem|key|p12|pfx|kdbx)|credentials(?:\..*)?"
        ),
        "a file that usually holds secrets; leave it out",
    ),
)
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
SECRET_VARIABLES = re.compile(r".*(?:TOKEN|API_KEY|SECRET|PASSWORD)")
SHORTEST_SECRET = 12  # characters; shorter values of such variables are words such as "true"

ROOTS = (
    "home|Users|root|tmp|var|mnt|media|opt|srv|scratch|private|Volumes|workspaces?|kaggle|content|data|work|cluster|lustre"
    "|gpfs|nfs|export|storage|projects?|gscratch|dbfs|usr/local"
)
PATHS = (
    re.compile(rf"/(?<![\w.~)\]}}%$@/-]/)(?:{ROOTS})/[^\s\"'`<>\\)\]]+"),
    re.compile(r"file://[^\s\"'<>)\]]{2,}"),
    re.compile(
        r"(?<![A-Za-z0-9])[A-Za-z]:(?:\\{1,4}|/)"
        r"(?:Users|Documents and Settings|Windows|Program Files|ProgramData|Temp|Data|home)[\\/][^\s\"'`<>]+",
        re.IGNORECASE,
    ),
    re.compile(r"(?<![A-Za-z0-9])[A-Z]:\\(?![nrt\"'\\])[\w$.-]{2,}\\[\w$][^\s\"'`<>]*"),
)
# A value of JSON or of a column that is nothing but a path, whatever it begins with.
PATH_VALUES = (
    re.compile(r"\"(/[^\s\"/\\]+/[^\s\"]+)\""),
    re.compile(r"\"([A-Za-z]:(?:\\\\|/)[^\"\n]*)\""),
    re.compile(r"\"(\\\\\\\\[\w.-]+\\\\[^\"\n]+)\""),
)
# Vocabularies hold all sorts of words, "/home/" among them.
VOCABULARIES = frozenset(
    {"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "tokenizer.model", "spiece.model"}
)
SENTENCEPIECE = frozenset({"tokenizer.model", "spiece.model"})
JSON = frozenset({".json", ".jsonl", ".ipynb"})

PICTURE_IN_TEXT = re.compile(
    r"(?<![A-Za-z0-9+/])(?:/9j/|iVBORw0KGgo|UklGR)(?:[A-Za-z0-9+/]++(?:\\n|\r?\n[ \t]*)?+)*+={0,2}(?:\\n)?"
)
SMALLEST_PICTURE = 60  # bytes; what is shorter is the beginning of one, as texts about formats show it
DATA_URI = re.compile(r"data:[\w.+-]+/[\w.+-]+(?:;[\w=.+-]+)*;base64,([A-Za-z0-9+/]+={0,2})")
HARMLESS_CHUNKS = frozenset({b"pHYs", b"sRGB", b"gAMA", b"cHRM", b"sBIT", b"bKGD"})  # of PNG: numbers of its own format
SVG_ACTIVE = re.compile(r"<script\b|\bon[a-z]+\s*=\s*[\"']|javascript:", re.IGNORECASE)
SVG_METADATA = re.compile(r"<metadata\b.*?</metadata\s*>", re.DOTALL | re.IGNORECASE)
# What matplotlib writes of itself.
SVG_OWN = re.compile(r"image/svg\+xml|Matplotlib v[\d.a-z+-]+, https://matplotlib\.org/|\s+")
UNREADABLE = (
    (b"PK\x03\x04", "an archive"),
    (b"\x1f\x8b", "an archive"),
    (b"BZh91AY&SY", "an archive"),
    (b"\xfd7zXZ", "an archive"),
    (b"7z\xbc\xaf", "an archive"),
    (b"\x28\xb5\x2f\xfd", "an archive"),
    (b"%PDF", "a PDF"),
    (b"GIF87a", "a GIF"),
    (b"GIF89a", "a GIF"),
    (b"II*\0", "a TIFF"),
    (b"MM\0*", "a TIFF"),
    (b"\x93NUMPY", "a NumPy file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"SQLite format", "a database"),
    (b"GGUF\x02\0", "a GGUF file"),
    (b"GGUF\x03\0", "a GGUF file"),
    (b"\x7fELF", "a program"),
)


class Own(NamedTuple):
    """What tells of this machine: its tokens, and its home and present folder."""

    secrets: tuple[bytes, ...]
    places: tuple[str, ...]


def screen(files: Mapping[str, Path], *, advance: Callable[[int], None] | None = None) -> list[str]:
    """What speaks against uploading these files, by their path in the repository: one sentence for each objection.

    Large files are read in pieces, and `advance` is told the bytes looked into. An empty list means that nothing was
    found.
    """
    own = Own(_own_secrets(), _own_places())
    found: list[str] = []
    for name, path in sorted(files.items()):
        objections = [*_screen_name(name, own)]
        try:
            objections += _screen_file(name, Path(path), own)
            if advance:
                advance(Path(path).stat().st_size)
        except OSError as error:
            objections.append(f"it cannot be read: {error.strerror}")
        found += [f"{_hide(name, own)}: {sentence}" for sentence in dict.fromkeys(objections)]
    return found


def _screen_name(name: str, own: Own) -> Iterator[str]:
    last = name.rpartition("/")[2].casefold()
    for pattern, what in NAMES:
        if pattern.fullmatch(last):
            yield f"its name says that this is {what}"
            break
    if _has_token(name.encode(), own.secrets):
        yield "its name holds what looks like a token: rename it, and revoke the token"


def _screen_file(name: str, path: Path, own: Own) -> Iterator[str]:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(4096)
    last = name.rpartition("/")[2]
    if any(_has_token(piece, own.secrets) for piece in _read_pieces(path)):
        yield "it holds what looks like a token or a key: take it out, and revoke it, since it may have been seen"
    if what := _find_pickle(path, head, size):
        yield f"it holds {what}, which can run code when it is loaded: save weights as safetensors, data as parquet"
    elif head.startswith(b"PAR1"):
        yield from _screen_parquet(path, own)
    elif _is_picture(head):
        yield from _screen_picture(path.read_bytes() if size <= WHOLE else b"")
    elif last.endswith(".safetensors"):
        yield from _screen_safetensors(path, size, own)
    elif what := _name_unreadable(head):
        yield f"it is {what}, which cannot be looked into: leave it out, or save it in a form that can be"
    elif last not in SENTENCEPIECE:
        yield from _screen_text_file(name, path, size, own)


# Tokens


def _own_secrets() -> tuple[bytes, ...]:
    """The tokens of this machine: of the environment, and of `hf auth login`."""
    values = [value for name, value in os.environ.items() if SECRET_VARIABLES.fullmatch(name.upper())]
    values.append(get_token() or "")
    for file in (constants.HF_TOKEN_PATH, constants.HF_STORED_TOKENS_PATH):
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, ValueError):
            continue
        values += re.findall(r"(?m)^\s*\w*token\w*\s*=\s*(\S+)", text) if "=" in text else [text]
    return tuple(sorted({value.strip().encode() for value in values if len(value.strip()) >= SHORTEST_SECRET}))


def _has_token(content: bytes, secrets: Iterable[bytes]) -> bool:
    return any(secret in content for secret in secrets) or any(
        pattern.match(content, place) for prefix, pattern in TOKENS for place in _places_of(prefix, content)
    )


def _places_of(prefix: bytes, content: bytes) -> Iterator[int]:
    place = content.find(prefix)
    while place >= 0:
        yield place
        place = content.find(prefix, place + 1)


def _hide(text: str, own: Own) -> str:
    """The text on one line, without what looks like a token in it."""
    content = text.encode()
    for _, pattern in TOKENS:
        content = pattern.sub(b"[token]", content)
    for secret in own.secrets:
        content = content.replace(secret, b"[token]")
    return " ".join(content.decode(errors="replace").split())


def _read_pieces(path: Path) -> Iterator[bytes]:
    """The content in pieces that overlap."""
    with path.open("rb") as file:
        rest = b""
        while piece := file.read(PIECE):
            yield rest + piece
            rest = piece[-OVERLAP:]


# Pickles and what cannot be looked into


def _find_pickle(path: Path, head: bytes, size: int) -> str | None:
    if re.match(rb"\x80[\x02-\x05][\x00-\xff]", head) and (head[1] < 4 or head[2:3] == b"\x95" or size < 64):
        return "a pickle"
    if head.startswith(b"PK\x03\x04"):
        try:
            with zipfile.ZipFile(path) as archive:
                if any(name.endswith(".pkl") for name in archive.namelist()):
                    return "a pickle (a PyTorch file)"
        except (zipfile.BadZipFile, OSError):
            return None
    if head[:1] in b"(]}cI" and 4 < size <= WHOLE and _is_old_pickle(path):
        return "a pickle"
    return None


def _is_old_pickle(path: Path) -> bool:
    """Whether it is a pickle of a protocol without a magic number, which is text."""
    with path.open("rb") as file:
        try:
            *_, (_, _, position) = pickletools.genops(file)
        except Exception:
            return False
        return not file.read().strip() and position > 2


def _name_unreadable(head: bytes) -> str | None:
    if head[128:132] == b"DICM":
        return "a DICOM file"
    if head[257:262] == b"ustar":
        return "an archive"
    if head.startswith(b"BM") and head[6:10] == b"\0\0\0\0":
        return "a BMP"
    return next((what for magic, what in UNREADABLE if head.startswith(magic)), None)


# Pictures


def _is_picture(head: bytes) -> bool:
    return head.startswith((b"\xff\xd8\xff", PNG_SIGNATURE)) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def _screen_picture(content: bytes) -> Iterator[str]:
    try:
        bare = strip_metadata(content)
    except NotSeparable as error:
        yield f"a picture in it cannot be told apart from its metadata ({error}): save it anew as a plain PNG"
        return
    if bare != (_drop_harmless(content) if content.startswith(PNG_SIGNATURE) else content):
        yield (
            "a picture in it carries more than its pixels (EXIF, text, a colour profile, a thumbnail): save it "
            "without, for example with `exiftool -all= FILE`"
        )


def _drop_harmless(content: bytes) -> bytes:
    """A PNG without the chunks that hold only numbers about its pixels."""
    parts, position = [content[:8]], 8
    while position + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, position)
        end = position + 12 + length
        if kind not in HARMLESS_CHUNKS:
            parts.append(content[position:end])
        position = end
    return b"".join([*parts, content[position:]])


def _screen_embedded(text: str) -> Iterator[str]:
    """Pictures in base64, whether in a page, a notebook, or JSON, and what else a data URI holds."""
    for found in PICTURE_IN_TEXT.finditer(text):
        yield from _screen_decoded(re.sub(r"\\n|\s", "", found[0]))
    if "base64," in text:
        for found in DATA_URI.finditer(text):
            if not PICTURE_IN_TEXT.match(found[1]):
                yield from _screen_decoded(found[1])


def _screen_decoded(encoded: str) -> Iterator[str]:
    try:
        content = base64.b64decode(encoded + "=" * (-len(encoded) % 4))
    except (binascii.Error, ValueError):
        return
    if _is_picture(content):
        if len(content) > SMALLEST_PICTURE:
            yield from _screen_picture(content)
    elif what := _name_unreadable(content):
        yield f"it embeds {what}, which cannot be looked into: leave it out"
    elif b"<svg" in content[:4096]:
        yield from _screen_svg(content.decode("utf-8", errors="replace"))
    if _has_token(content, ()):
        yield "it embeds what looks like a token or a key: take it out, and revoke it, since it may have been seen"


def _screen_svg(text: str) -> Iterator[str]:
    if SVG_ACTIVE.search(text):
        yield "this drawing can run code: save it without scripts"
    for block in SVG_METADATA.findall(text):
        if SVG_OWN.sub("", re.sub(r"<[^>]*>", "", block)):
            yield "this drawing carries metadata (an author, a date, a title): save it without"


# Text


def _own_places() -> tuple[str, ...]:
    """The home folder and the present one, where these tell more than the root of a file system."""
    found = {Path.home(), Path.cwd(), Path.cwd().resolve()}
    return tuple(sorted(str(place) for place in found if len(place.parts) > 2))


def _screen_text_file(name: str, path: Path, size: int, own: Own) -> Iterator[str]:
    last = name.rpartition("/")[2]
    suffix = Path(last).suffix.casefold()
    line = 1
    try:
        for text, overlap in _read_text(path, size):
            if last not in VOCABULARIES:
                for number, found in _find_paths(text, own.places, as_values=suffix in JSON):
                    yield _describe_path(found, own, line=line + number)
                    break
            if suffix == ".svg":
                yield from _screen_svg(text)
            yield from _screen_embedded(text)
            line += text.count("\n", 0, len(text) - overlap)
    except UnicodeDecodeError:
        yield "it is neither UTF-8 text nor a format that can be looked into: leave it out, or convert it"


def _read_text(path: Path, size: int) -> Iterator[tuple[str, int]]:
    """The text, whole where it is not very long, else in pieces; with each, how much of it the next one begins with."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest = ""
    with path.open("rb") as file:
        for piece in iter(partial(file.read, WHOLE), b""):
            text = rest + decoder.decode(piece)
            if "\0" in text:
                raise UnicodeDecodeError("utf-8", b"\0", 0, 1, "binary")
            rest = text[-OVERLAP:] if size > WHOLE else ""
            yield text, len(rest)
        decoder.decode(b"", final=True)


def _find_paths(text: str, places: Iterable[str], *, as_values: bool) -> Iterator[tuple[int, str]]:
    """Yield the number of lines before it and the path, for every absolute path in a text."""
    text = PICTURE_IN_TEXT.sub(lambda found: "\n" * found[0].count("\n"), text).replace("\\/", "/")
    for pattern in PATHS:
        for found in pattern.finditer(text):
            yield text.count("\n", 0, found.start()), found[0]
    for pattern in PATH_VALUES if as_values else ():
        for found in pattern.finditer(text):
            yield text.count("\n", 0, found.start()), found[1]
    for place in places:
        if place in text:
            for found in re.finditer(rf"(?<![\w.])(?:{re.escape(place)})(?![\w.-])", text):
                yield text.count("\n", 0, found.start()), found[0]


def _describe_path(path: str, own: Own, *, line: int | None = None) -> str:
    where = f"line {line}" if line else "it"
    shown = _hide(path, own)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}…"
    return f"{where} holds a path of this or another machine, {shown}: write what others can use, such as a name"


# Formats with a structure


def _screen_safetensors(path: Path, size: int, own: Own) -> Iterator[str]:
    """Names and metadata of the tensors; the numbers themselves are searched for tokens like every file."""
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        header = file.read(length) if 8 + length <= min(size, WHOLE) else b""
    try:
        text = json.dumps(json.loads(header), ensure_ascii=False)
    except ValueError:
        yield "it is no safetensors file, so it cannot be looked into: save the weights again"
        return
    for _, found in _find_paths(text, own.places, as_values=True):
        yield _describe_path(found, own)
        return


def _screen_parquet(path: Path, own: Own) -> Iterator[str]:
    try:
        columns = pq.ParquetFile(path).schema
        leaves = [columns.column(number).path for number in range(len(columns))]
        file = pq.ParquetFile(path, read_dictionary=leaves)  # a picture is there once, not once for each row
        described = [text.decode() for pair in (file.metadata.metadata or {}).items() for text in pair]
        yield from _screen_strings("its metadata", described + leaves, own)
        for number in range(file.num_row_groups):
            for field in file.schema_arrow.names:
                table = file.read_row_group(number, columns=[field])
                for where, values in _distinct(field, table.column(field)):
                    yield from _screen_values(f"the column {where}", values, own)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        yield f"it cannot be read as parquet ({_hide(str(error), own)}): write it again"


def _distinct(where: str, column: pa.ChunkedArray | pa.Array) -> Iterator[tuple[str, pa.Array]]:
    """Yield where they stand and the distinct values of every string and binary column, however deep it lies."""
    kind = column.type
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    for chunk in chunks:
        if pa.types.is_struct(kind):
            for number, field in enumerate(kind):
                yield from _distinct(f"{where}.{field.name}", chunk.field(number))
        elif pa.types.is_map(kind):
            yield from _distinct(f"{where}.key", chunk.keys)
            yield from _distinct(f"{where}.value", chunk.items)
        elif pa.types.is_nested(kind):
            yield from _distinct(where, chunk.values)
        elif pa.types.is_dictionary(kind):
            yield from _distinct(where, chunk.dictionary)
        elif _is_text(kind) or _is_bytes(kind):
            yield where, chunk.unique().drop_null()


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _screen_values(where: str, values: pa.Array, own: Own) -> Iterator[str]:
    if _is_text(values.type):
        yield from _screen_strings(where, values.to_pylist(), own)
        return
    for value in values:
        content = value.as_buffer().to_pybytes()
        if _is_picture(content):
            yield from (f"in {where}, {sentence}" for sentence in _screen_picture(content))
        elif content:
            yield f"{where} holds bytes that are no JPEG, PNG or WebP, so they cannot be looked into: leave it out"
        if _has_token(content, own.secrets):
            yield f"{where} holds what looks like a token or a key: take it out, and revoke it"


def _screen_strings(where: str, values: list[str], own: Own) -> Iterator[str]:
    text = "\n".join(values)
    if _has_token(text.encode(errors="replace"), own.secrets):
        yield f"{where} holds what looks like a token or a key: take it out, and revoke it"
    if where.endswith(".path") and re.search(r"[/\\]", text):
        yield f"{where} holds names of pictures with folders: name them by their content"
    for _, found in _find_paths("\n".join(f'"{value}"' for value in values), own.places, as_values=True):
        yield f"in {where}, {_describe_path(found, own)}"
        break
    yield from (f"in {where}, {sentence}" for sentence in _screen_embedded(text))
