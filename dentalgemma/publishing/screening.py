"""What must not leave this machine: every file that is to be uploaded is looked into, by its content, not its name.

Refused are names that hold secrets or training state, pickles, tokens and keys (also this machine's own, also in
weights and parquet), absolute paths, pictures that carry more than their pixels, and whatever cannot be looked into. A
token that was found is never shown, not even in part.
"""

from __future__ import annotations

import codecs
import json
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dentalgemma.publishing.screening_pictures import is_picture, name_unreadable, screen_drawing, screen_picture
from dentalgemma.publishing.screening_text import REVOKE, Own, describe_path, find_paths, hide, read_own, screen_text

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
# Vocabularies hold all sorts of words, "/home/" among them.
VOCABULARIES = frozenset(
    {"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "tokenizer.model", "spiece.model"}
)
SENTENCEPIECE = frozenset({"tokenizer.model", "spiece.model"})
JSON = frozenset({".json", ".jsonl", ".ipynb"})

Advance = Callable[[int], None]


def screen(files: Mapping[str, Path], *, advance: Advance | None = None) -> list[str]:
    """What speaks against uploading these files, by their path in the repository: one sentence for each objection.

    Of a text the line is named (`notes.txt:3`). Large files are read in pieces; `advance` is told the bytes that were
    looked into, of every file its size. An empty list means that nothing was found.
    """
    own = read_own()
    found: list[str] = []
    for name, path in sorted(files.items()):
        shown = hide(name, own)
        objections = [(0, sentence) for sentence in _screen_name(name, own)]
        try:
            objections += _screen_file(name, Path(path), own, advance or _ignore)
        except OSError as error:
            objections.append((0, f"it cannot be read: {error.strerror}"))
        for line, sentence in dict.fromkeys(objections):
            found.append(f"{shown}:{line}: {sentence}" if line else f"{shown}: {sentence}")
    return found


def _ignore(size: int) -> None:
    pass


def _screen_name(name: str, own: Own) -> Iterator[str]:
    last = name.rpartition("/")[2].casefold()
    for pattern, what in NAMES:
        if pattern.fullmatch(last):
            yield f"its name says that this is {what}"
            break
    if own.token.search(name.encode(errors="replace")):
        yield "its name holds what looks like a token: rename it, and revoke the token"


def _screen_file(name: str, path: Path, own: Own, advance: Advance) -> Iterator[tuple[int, str]]:
    """Yield the line, 0 where there are none, and what speaks against this file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(4096)
    last = name.rpartition("/")[2]
    if what := _find_pickle(path, head, size):
        objections = [
            f"it holds {what}, which can run code when it is loaded: save weights as safetensors, data as parquet"
        ]
    elif head.startswith(b"PAR1"):
        objections = _screen_parquet(path, own)
    elif is_picture(head):
        objections = screen_picture(path.read_bytes() if size <= WHOLE else b"")
    elif last.endswith(".safetensors"):
        objections = _screen_safetensors(path, size, own)
    elif what := name_unreadable(head):
        objections = [f"it is {what}, which cannot be looked into: leave it out, or save it in a form that can be"]
    elif last in SENTENCEPIECE:
        objections = []
    else:
        yield from _screen_text_file(last, path, size, own, advance)
        return
    if _has_token(path, own, advance):
        yield 0, f"it holds what looks like a token or a key: {REVOKE}"
    yield from ((0, sentence) for sentence in objections)


def _has_token(path: Path, own: Own, advance: Advance) -> bool:
    """Whether the bytes of a file hold a token; it is read in pieces that overlap."""
    found, rest = False, b""
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            found = found or bool(own.token.search(rest + piece))
            rest = (rest + piece)[-OVERLAP:]
            advance(len(piece))
    return found


# Pickles


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


# Text


def _screen_text_file(last: str, path: Path, size: int, own: Own, advance: Advance) -> Iterator[tuple[int, str]]:
    suffix = Path(last).suffix.casefold()
    line = 1
    try:
        for text, overlap in _read_text(path, size, advance):
            for number, sentence in screen_text(text, own, paths=last not in VOCABULARIES, as_values=suffix in JSON):
                yield line + number, sentence
            if suffix == ".svg":
                yield from ((0, sentence) for sentence in screen_drawing(text))
            line += text.count("\n", 0, len(text) - overlap)
    except UnicodeDecodeError:
        yield 0, "it is neither UTF-8 text nor a format that can be looked into: leave it out, or convert it"


def _read_text(path: Path, size: int, advance: Advance) -> Iterator[tuple[str, int]]:
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
            advance(len(piece))
        decoder.decode(b"", final=True)


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
    yield from (sentence for _, sentence in screen_text(text, own, as_values=True))


def _screen_parquet(path: Path, own: Own) -> Iterator[str]:
    try:
        columns = pq.ParquetFile(path).schema
        leaves = [columns.column(number).path for number in range(len(columns))]
        file = pq.ParquetFile(path, read_dictionary=leaves)  # a picture is there once, not once for each row
        yield from _screen_strings("its metadata", [*_describe(file), *leaves], own)
        for number in range(file.num_row_groups):
            for field in file.schema_arrow.names:
                table = file.read_row_group(number, columns=[field])
                for where, values in _distinct(field, table.column(field)):
                    yield from _screen_values(f"the column {where}", values, own)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        yield f"it cannot be read as parquet ({hide(str(error), own)}): write it again"


def _describe(file: pq.ParquetFile) -> Iterator[str]:
    """What is written about a table, and about each of its columns, however deep it lies."""
    fields = [file.schema_arrow.field(number) for number in range(len(file.schema_arrow))]
    described = [file.metadata.metadata]
    while fields:
        field = fields.pop()
        described.append(field.metadata)
        if pa.types.is_nested(field.type):
            fields += [field.type.field(number) for number in range(field.type.num_fields)]
    for pairs in described:
        for key, text in (pairs or {}).items():
            if key != b"ARROW:schema":  # in base64 what is read here anyhow
                yield from (key.decode(), text.decode())


def _distinct(where: str, column: pa.ChunkedArray | pa.Array) -> Iterator[tuple[str, pa.Array]]:
    """Yield where they stand and the distinct values of every column of strings or bytes, however deep it lies."""
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
            if pa.types.is_uint8(kind.value_type) or pa.types.is_int8(kind.value_type):
                yield where, chunk  # bytes, one by one
            else:
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
    if not _is_bytes(values.type):
        yield f"{where} holds bytes as numbers, which cannot be looked into: save them as bytes, or leave it out"
        return
    for value in values:
        content = value.as_buffer().to_pybytes()
        if is_picture(content):
            yield from (f"in {where}, {sentence}" for sentence in screen_picture(content))
        elif content:
            yield f"{where} holds bytes that are no JPEG, PNG or WebP, so they cannot be looked into: leave it out"
        if own.token.search(content):
            yield f"{where} holds what looks like a token or a key: take it out, and revoke it"


def _screen_strings(where: str, values: list[str], own: Own) -> Iterator[str]:
    text = "\n".join(values)
    if where.endswith(".path") and re.search(r"[/\\]", text):
        yield f"{where} holds names of pictures with folders: name them by their content"
    for _, sentence in screen_text(text, own, paths=False):
        yield f"in {where}, {sentence}"
    for _, found in find_paths("\n".join(f'"{value}"' for value in values), own.places, as_values=True):
        yield f"in {where}, {describe_path(found, own)}"
        break
