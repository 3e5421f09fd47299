"""Clinical cases as chat: JSONL, JSON lists and parquet, in the column forms that instruct datasets have."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_builders.chat import Message
from data_builders.prompt_repair import match_line
from data_builders.readers.files import (
    LFS_POINTER,
    MAX_BYTES,
    leaves_root,
    load_json,
    nothing_found,
    read_text,
    shorten,
)
from data_builders.readers.geometry import BadAnnotation
from data_builders.records import Problem, place
from data_builders.sources import Source

DIALOGUES = ("messages", "conversations")
PAIRS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("question", "answer"))
CONDITION_KEYS = ("condition", "diagnosis", "label", "category")
COLUMNS = {*DIALOGUES, *sum(PAIRS, ()), *CONDITION_KEYS, "input", "system"}
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
UTF16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, slots=True)
class Case:
    """One clinical case: the turns before the last answer, that answer, and the condition it is about, if stated.

    `prompt` begins with a system turn only where the case brings its own; then user and assistant take turns, and the
    last of it is the user's. `line` is a line or row number, or a JSON pointer.
    """

    prompt: tuple[Message, ...]
    answer: str
    condition: str | None
    path: Path
    line: int | str

    @property
    def where(self) -> str:
        """`path:line` of the case."""
        return place(self.path, self.line)


def read_cases(source: Source) -> Iterator[Case | Problem]:
    """Yield one case for each line that holds one, and a problem for each that does not.

    Reads the files that `source.annotations` (a glob) names, else every `.jsonl`, `.json` and `.parquet` below the
    root. `source.label_attribute` names the key that holds the condition, `source.condition_line` the line of the
    prompt that does.
    """
    files = list(_find_files(source))
    if not files:
        yield nothing_found(source, f"file {source.annotations or '*.jsonl, *.json or *.parquet'}")
    for path in files:
        if leaves_root(source, path):
            yield Problem("unsafe_path", "error", path, None, "lies outside the source folder; not read")
            continue
        load = LOADERS.get(path.suffix.lower(), _load_lines)
        try:
            for line, entry in load(path, {*COLUMNS, source.label_attribute}):
                yield from _read_entry(entry, source, path, line)
        except BadAnnotation as error:
            # A JSON file that nobody named as cases may well be something else, such as a dataset's description.
            is_other = error.code == "not_cases" and not source.annotations
            code, severity = ("unused_file", "info") if is_other else (error.code, "error")
            yield Problem(code, severity, path, None, str(error))


def _find_files(source: Source) -> Iterator[Path]:
    for path in sorted(source.root.glob(source.annotations or "**/*")):
        is_hidden = any(part.startswith(".") for part in path.parts[len(source.root.parts) :])
        if path.is_file() and (source.annotations or (path.suffix.lower() in LOADERS and not is_hidden)):
            yield path


def _read_entry(entry: object, source: Source, path: Path, line: int | str | None) -> Iterator[Case | Problem]:
    try:
        prompt, answer = parse_turns(entry)
    except BadAnnotation as error:
        yield Problem(error.code, "error", path, line, str(error))
        return
    try:
        condition = parse_condition(entry, source.label_attribute)
        if source.condition_line:
            condition = condition or parse_condition_line(prompt, source.condition_line)
    except BadAnnotation as error:
        yield Problem(error.code, "warning", path, line, str(error))
        condition = None
    yield Case(prompt, answer, condition, path, line)


def parse_turns(entry: object) -> tuple[tuple[Message, ...], str]:
    """Split an entry of any column form into the turns before the last answer, and that answer.

    Raises:
        BadAnnotation: when it is no dialogue that ends with an answer.
    """
    if isinstance(entry, BadAnnotation):  # what a loader could not read
        raise entry
    if not isinstance(entry, dict):
        raise BadAnnotation(
            "bad_case", f"expected an object with `messages` or question and answer, got {_kind(entry)}"
        )
    turns = [_read_turn(turn) for turn in _find_turns(entry)]
    if turns and turns[0]["role"] == "system" and not turns[0]["content"]:
        turns = turns[1:]
    _check_turns(turns)
    return tuple(turns[:-1]), turns[-1]["content"]


def parse_condition(entry: Mapping[str, Any], key: str | None = None) -> str | None:
    """The condition that a case is about, from `key` or else the first usual key that holds one.

    Raises:
        BadAnnotation: when the named key is missing, or a condition is neither text nor a whole number.
    """
    for name in (key,) if key else CONDITION_KEYS:
        value = entry.get(name)
        if isinstance(value, str):
            condition = " ".join(_encodable(value).split())
            if condition:
                return condition
        elif type(value) is int:
            return str(value)
        elif value is not None and not (isinstance(value, float) and math.isnan(value)):  # pandas writes NaN for none
            remedy = "name another key as `label_attribute` of the source"
            raise BadAnnotation("bad_condition", f"{name!r} is {_kind(value)}, not a condition's name; {remedy}")
    if key:
        raise BadAnnotation("condition_missing", f"has no condition under {key!r}, the source's `label_attribute`")
    return None


def parse_condition_line(prompt: Iterable[Message], label: str) -> str:
    """The condition from the line `label: …` of the user's turns, as in `PATIENT: irreversible pulpitis`.

    Raises:
        BadAnnotation: when there is no such line.
    """
    for turn in prompt:
        line = match_line(turn["content"], label) if turn["role"] == "user" else None
        if line:
            return " ".join(line[1].strip("*_ ").split())
    raise BadAnnotation("condition_missing", f"has no line `{label}: …` in its prompt, the source's `condition_line`")


def _find_turns(entry: Mapping[str, Any]) -> list:
    """The turns as they stand in the entry, whichever column form it has."""
    dialogue = next((key for key in DIALOGUES if entry.get(key) is not None), None)
    if dialogue:
        turns = entry[dialogue]
        if not isinstance(turns, list):
            raise BadAnnotation("bad_case", f"{dialogue!r} is {_kind(turns)}, not a list of turns")
    else:
        question, answer = _find_pair(entry)
        turns = [*_as_turns("user", _with_input(entry, question)), *_as_turns("assistant", entry[answer])]
    if isinstance(entry.get("system"), str) and not any(_get(turn, "role", "from") == "system" for turn in turns):
        return [{"role": "system", "content": entry["system"]}, *turns]
    return turns


def _find_pair(entry: Mapping[str, Any]) -> tuple[str, str]:
    present = [pair for pair in PAIRS if entry.keys() >= set(pair)]
    if not present:
        forms = ", ".join(("messages", "conversations", *("/".join(pair) for pair in PAIRS)))
        raise BadAnnotation("bad_case", f"has none of {forms}; its keys are {shorten(', '.join(map(str, entry)))}")
    # A table made from several sources has all columns, most of them empty.
    return next((pair for pair in present if all(entry[key] is not None for key in pair)), present[0])


def _with_input(entry: Mapping[str, Any], key: str) -> object:
    question, more = entry[key], entry.get("input")
    if key == "instruction" and isinstance(question, str) and isinstance(more, str) and more.strip():
        return f"{question.strip()}\n\n{more}"
    return question


def _as_turns(role: str, value: object) -> list:
    if isinstance(value, list) and any(_get(turn, "role", "from") is not None for turn in value):
        return value
    return [{"role": role, "content": value}]


def _read_turn(turn: object) -> Message:
    if not isinstance(turn, dict):
        raise BadAnnotation("bad_turn", f"a turn is {_kind(turn)}, not an object with role and content")
    role = _get(turn, "role", "from")
    known = ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        raise BadAnnotation("bad_role", f"role {_name(role)} is none of {', '.join(ROLES)}")
    return {"role": known, "content": _read_text(_get(turn, "content", "value"))}


def _read_text(content: object) -> str:
    """The text of a turn, given as such or as a list of text parts; empty where there is none."""
    parts = content if isinstance(content, list) else [content]
    texts = []
    for part in parts:
        text = _get(part, "text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if isinstance(text, str):
            texts.append(text)
        elif isinstance(part, dict):
            raise BadAnnotation("not_text", f"a content part of type {_name(part.get('type'))}: cases are text only")
        elif part is not None:
            raise BadAnnotation("not_text", f"the content of a turn is {_kind(part)}, not text")
    return _encodable("\n".join(texts)).strip()


def _check_turns(turns: list[Message]) -> None:
    roles = [turn["role"] for turn in turns]
    if "system" in roles[1:]:
        raise BadAnnotation("system_not_first", "a system turn may only be the first, and there may only be one")
    start = 1 if roles[:1] == ["system"] else 0
    if roles[-1:] != ["assistant"]:
        raise BadAnnotation("no_answer", "the last turn must be the assistant's: there is nothing to learn")
    expected = [("user", "assistant")[number % 2] for number in range(len(roles) - start)]
    if roles[start:] != expected:
        raise BadAnnotation("bad_turns", f"user and assistant must take turns, user first; got {', '.join(roles[:9])}")
    if not turns[-1]["content"]:
        raise BadAnnotation("empty_answer", "the answer is empty")
    if not all(turn["content"] for turn in turns):
        raise BadAnnotation("empty_turn", "a turn before the answer is empty")


def _load_lines(path: Path, _columns: Set[str | None]) -> Iterator[tuple[int, object]]:
    """Yield each line's number and value; what cannot be read costs its line, not the file."""
    for number, line in enumerate(_open_lines(path), start=1):
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8") if isinstance(line, bytes) else line
            yield number, json.loads(text, object_pairs_hook=_make_dict)
        except BadAnnotation as error:
            yield number, error
        except UnicodeDecodeError as error:
            yield number, BadAnnotation("unreadable_line", f"is not UTF-8 text: {error.reason} at byte {error.start}")
        except RecursionError:
            yield number, BadAnnotation("bad_json", "is nested too deeply to be a case")
        except ValueError as error:
            yield number, BadAnnotation("bad_json", f"is not valid JSON: {error}")


def _open_lines(path: Path) -> Iterable[bytes | str]:
    try:
        with path.open("rb") as file:
            head = file.read(len(LFS_POINTER))
            if head[:2] not in UTF16 and head != LFS_POINTER and path.stat().st_size <= MAX_BYTES:
                file.seek(0)
                yield from file
                return
    except OSError as error:
        raise BadAnnotation("unreadable_file", f"cannot be read: {error.strerror}") from None
    yield from read_text(path).split("\n")  # which says what is wrong with a pointer or a giant


def _make_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        # Which of two answers belongs to the question cannot be known.
        raise BadAnnotation("duplicate_json_keys", "a key stands twice in one object")
    return made


def _load_list(path: Path, _columns: Set[str | None]) -> Iterator[tuple[int | str | None, object]]:
    try:
        document = load_json(path)
    except BadAnnotation as error:
        remedy = "; a file with one case a line must be named .jsonl" if error.code == "bad_json" else ""
        raise BadAnnotation(error.code, f"{error}{remedy}") from None
    if not isinstance(document.value, list):
        raise BadAnnotation("not_cases", f"not read: holds {_kind(document.value)}, not a list of cases")
    if document.repeated_keys:
        keys = ", ".join(shorten(key) for key in sorted(set(document.repeated_keys))[:5])
        yield None, BadAnnotation("duplicate_json_keys", f"keys that stand twice in one object: {keys}")
    for number, entry in enumerate(document.value):
        yield f"/{number}", entry


def _load_table(path: Path, columns: Set[str | None]) -> Iterator[tuple[int, object]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise BadAnnotation("lfs_pointer", "is a Git-LFS pointer, not the file itself; run `git lfs pull`")
        with pq.ParquetFile(path) as table:
            # Not every type of column can be read as Python values, and only those of cases need to be.
            names = [name for name in table.schema_arrow.names if name in columns]
            for batch in table.iter_batches(batch_size=1000, columns=names):
                for entry in batch.to_pylist():
                    number += 1
                    yield number, entry
    except BadAnnotation:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        where = f" after row {number}" if number else ""
        raise BadAnnotation("unreadable_file", f"cannot be read as parquet{where}: {shorten(str(error))}") from None


# Each yields places and entries of a file; the columns are those a reader may ask for.
LOADERS: dict[str, Callable[[Path, Set[str | None]], Iterator[tuple[int | str | None, object]]]] = {
    ".jsonl": _load_lines,
    ".json": _load_list,
    ".parquet": _load_table,
}


def _get(entry: object, *keys: str) -> Any:
    """The first value that is there under one of the keys."""
    if isinstance(entry, dict):
        return next((entry[key] for key in keys if entry.get(key) is not None), None)
    return None


def _encodable(text: str) -> str:
    """Refuse half of a surrogate pair, which JSON can spell and no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadAnnotation("not_text", "holds half of a surrogate pair, which is no character") from None
    return text


def _name(value: object) -> str:
    return shorten(value) if isinstance(value, str) else _kind(value)


def _kind(value: object) -> str:
    return {dict: "an object", list: "a list", str: "a text", type(None): "null"}.get(type(value), "a number")
