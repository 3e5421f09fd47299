"""The logs of other harnesses, read as they are: what was asked, in which order of options, what the model wrote.

Read from VLMEvalKit's sources, inspect_ai 0.3.285, lm_eval 0.4.13 and lmms_eval 0.7.3. Nothing is scored here: the
letters that a harness extracted are not looked at.
"""

from __future__ import annotations

import csv
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from string import ascii_uppercase
from typing import IO, NamedTuple

import pyarrow as pa

from dentalgemma.evaluation.files import read_text
from dentalgemma.evaluation.questions import EvaluationError
from dentalgemma.evaluation.spreadsheets import LARGEST, read_first_sheet

ZIP_ZSTD = 93  # inspect's compression, which zipfile reads from Python 3.14 on
UNPACKED_BY_ZIPFILE = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
SHUFFLED = "Choices were shuffled before generating a response"  # inspect_ai.scorer.choice says so in its explanation
REQUEST_FAILED = "Failed to obtain answer"  # VLMEvalKit writes it in place of an answer
ID_COLUMNS = ("item_id", "index", "id", "question_id", "qid")
FINISHED = {"stop": "stop", "max_tokens": "length", "model_length": "length"}


@dataclass(frozen=True, slots=True)
class LogAnswer:
    """One answer. `options` maps letters to texts as the model saw them: `{}` if there were none, None if not told.

    `index` is what the log calls the item, `position` its place in the harness's data set, `question` the text in that
    data set, `prompt` what was sent. `scores` are log-likelihoods by continuation. `more` are further keys of a line.
    """

    where: str
    output: str
    index: str | None = None
    position: int | None = None
    question: str | None = None
    prompt: str | None = None
    options: Mapping[str, str] | None = None
    scores: Sequence[tuple[str, float]] | None = None
    epoch: int | None = None
    error: str | None = None
    more: Mapping[str, object] = field(default_factory=dict)


class Log(NamedTuple):
    """What a log says; `model` and `version` are None where it does not."""

    answers: list[LogAnswer]
    model: str | None
    version: str | None
    settings: dict


def read_vlmevalkit(path: Path) -> Log:
    """Read a result file: `<model>_<dataset>` as .xlsx, .tsv, .csv or .json, one row an item with its `prediction`."""
    if path.suffix.lower() in (".pkl", ".pickle"):
        raise EvaluationError(
            f"{path}: a pickle can run code when it is opened; set PRED_FORMAT=tsv, or load and dump it in VLMEvalKit"
        )
    rows = list(_read_table(path))
    if rows and "prediction" not in rows[0][1]:
        raise EvaluationError(f"{path} has no column `prediction`, only {', '.join(rows[0][1])}")
    return Log([_vlmevalkit_answer(where, row) for where, row in rows], _model_in_name(path), None, {})


def _vlmevalkit_answer(where: str, row: Mapping[str, str]) -> LogAnswer:
    letters = {name: text for name, text in row.items() if len(name) == 1 and name in ascii_uppercase}
    numbered = [text for name, text in row.items() if re.fullmatch(r"option_?\d", name)]
    failed = REQUEST_FAILED in row["prediction"]
    return LogAnswer(
        where,
        "" if failed else row["prediction"],
        index=row.get("index") or None,
        question=row.get("question") or None,
        options=letters or letter_options(numbered),
        error=row["prediction"] if failed else None,
        more={"reasoning": row["thinking"]} if row.get("thinking") else {},
    )


def _read_table(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows as texts. Numbers stay as they are written, an empty cell and JSON's NaN are an empty text."""
    suffix = path.suffix.lower()
    if suffix == ".json":
        yield from _read_records(path)
        return
    if suffix == ".xlsx":
        table = read_first_sheet(path)
    else:
        usual = csv.field_size_limit(2**31 - 1)  # a column of images is longer than the default allows
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                table = list(csv.reader(file, delimiter="\t" if suffix == ".tsv" else ",", strict=True))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise EvaluationError(f"{path}: cannot be read: {error}") from None
        finally:
            csv.field_size_limit(usual)  # it is the whole process's
    filled = [(number, row) for number, row in enumerate(table, start=1) if any(row)]
    (_, header), *rows = filled or [(1, [])]
    if len(set(header)) < len(header):
        raise EvaluationError(f"{path}: a column's name comes twice among {', '.join(header)}")
    for number, row in rows:
        if len(row) > len(header) or (suffix != ".xlsx" and len(row) < len(header)):
            raise EvaluationError(f"{path}: row {number} has {len(row)} cells under {len(header)} names")
        yield f"{path}: row {number}", dict(zip(header, [*row, *[""] * (len(header) - len(row))], strict=True))


def _read_records(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    try:
        records = json.loads(read_text(path), parse_int=str, parse_float=str, parse_constant=lambda _: None)
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise EvaluationError(f"{path}: expected a list of records, each with a `prediction`")
    names = dict.fromkeys(name for record in records for name in record)
    for number, record in enumerate(records, start=1):
        where = f"{path}: record {number}"
        answer = {"prediction": _answer_text(record.get("prediction"), where)} if "prediction" in names else {}
        yield where, {name: _text(record.get(name)) for name in names} | answer


def _model_in_name(path: Path) -> str | None:
    """VLMEvalKit writes `<model>/<run>/<model>_<dataset>.xlsx`, and both names may hold the character between them."""
    folders = [folder.name for folder in path.absolute().parents if folder.name]
    named = next((name for name in folders if path.stem.startswith(f"{name}_")), None)
    parts = path.stem.split("_")
    return named or (parts[0] if len(parts) == 2 else None)


def read_lm_eval(path: Path) -> Log:
    """Read `samples_<task>_<date>.jsonl` and, if it lies beside, `results_<date>.json`.

    A sample is written once for each filter: its first line is taken, as all of them hold the same raw answers.
    """
    samples, filters = [], {}
    for where, sample in _read_lines(path):
        if filters.setdefault(sample.get("doc_id"), sample.get("filter")) == sample.get("filter"):
            samples.append((where, sample))
    date = re.search(r"_(\d{4}-\d\d-\d\dT[\d.-]+)$", path.stem)
    results = _read_beside(path.with_name(f"results_{date[1]}.json") if date else None)
    answers = [answer for where, sample in samples for answer in _lm_eval_answers(where, sample)]
    begun = results.get("date")
    if isinstance(begun, float | int):
        when = {"answered_at": datetime.fromtimestamp(begun, UTC).isoformat(timespec="seconds")}
        answers = [_with(answer, when) for answer in answers]
    return Log(answers, _harness_model(results, path), results.get("lm_eval_version"), _harness_settings(results))


def _lm_eval_answers(where: str, sample: Mapping) -> Iterator[LogAnswer]:
    arguments, resps = sample.get("arguments") or {}, sample.get("resps")
    requests = [list(call.values()) for call in arguments.values()] if isinstance(arguments, dict) else arguments
    if not requests or not isinstance(resps, list) or len(resps) != len(requests):
        raise EvaluationError(f"{where}: expected `arguments` and as many `resps`; log with --log_samples")
    if not all(isinstance(answers, list) and answers for answers in resps):
        raise EvaluationError(f"{where}: expected in `resps` a list of answers for every request")
    doc = sample["doc"] if isinstance(sample.get("doc"), dict) else {}
    prompt = str(requests[0][0])
    about = {
        "index": next((str(doc[name]) for name in ID_COLUMNS if doc.get(name) is not None), None),
        "position": sample["doc_id"] if isinstance(sample.get("doc_id"), int) else None,
        "question": doc["question"] if isinstance(doc.get("question"), str) else None,
        "prompt": prompt,
        "options": find_options(prompt) or _doc_options(doc),
    }
    if isinstance(resps[0][0], list):
        if any(request[0] != prompt for request in requests):
            raise EvaluationError(f"{where}: log-likelihoods under several prompts; only one prompt can be read")
        pairs = zip(requests, resps, strict=True)
        scores = [(str(request[1]), _number(answers[0][0], where)) for request, answers in pairs]
        options = about["options"] or letter_options([words.strip() for words, _ in scores])
        yield LogAnswer(where, "", scores=scores, **about | {"options": options})
        return
    if len(requests) > 1:
        raise EvaluationError(f"{where}: {len(requests)} texts for one item; log a task that asks once")
    generation = next((value for value in requests[0][1:] if isinstance(value, dict)), None)
    yield from _repeats(where, resps[0], {**about, "more": {"generation": generation} if generation else {}})


def read_lmms_eval(path: Path) -> Log:
    """Read `<date>_samples_<task>.jsonl` and, if it lies beside, `<date>_results.json`.

    The samples hold no doc, and `resps` only where a filter changed them. Their time is of no told zone: it is left
    out. Scores of options are refused: the models log losses or log-likelihoods, each as it likes.
    """
    results = _read_beside(path.with_name(f"{path.stem.split('_samples_')[0]}_results.json"))
    answers = [answer for where, sample in _read_lines(path) for answer in _lmms_eval_answers(where, sample)]
    version = next((results[name] for name in ("lmms_eval_version", "git_hash") if results.get(name)), None)
    return Log(answers, _harness_model(results, path), version, _harness_settings(results))


def _lmms_eval_answers(where: str, sample: Mapping) -> Iterator[LogAnswer]:
    outputs = sample.get("resps", sample.get("filtered_resps"))
    if isinstance(outputs, str):
        outputs = [outputs]
    while isinstance(outputs, list) and len(outputs) == 1 and isinstance(outputs[0], list):
        outputs = outputs[0]
    if not isinstance(outputs, list) or not outputs or not all(isinstance(output, str) for output in outputs):
        raise EvaluationError(
            f"{where}: no text that a model wrote; scores of options cannot be imported from lmms-eval, where some "
            "models log losses and others log-likelihoods"
        )
    prompt = _content_text(sample.get("input"), {})
    doc = sample["doc"] if isinstance(sample.get("doc"), dict) else {}
    about = {
        "index": next((str(doc[name]) for name in ID_COLUMNS if doc.get(name) is not None), None),
        "position": sample["doc_id"] if isinstance(sample.get("doc_id"), int) else None,
        "question": doc["question"] if isinstance(doc.get("question"), str) else None,
        "prompt": prompt or None,
        "options": find_options(prompt) or _doc_options(doc),
    }
    yield from _repeats(where, outputs, about)


def _repeats(where: str, outputs: Sequence[str], about: Mapping) -> Iterator[LogAnswer]:
    for number, output in enumerate(outputs, start=1):
        yield LogAnswer(where, _answer_text(output, where), epoch=number if len(outputs) > 1 else None, **about)


def _harness_model(results: Mapping, path: Path) -> str | None:
    """The name in the results, or the folder, in which a slash has become two underscores."""
    return results.get("model_name") or path.absolute().parent.name.replace("__", "/") or None


def _harness_settings(results: Mapping) -> dict:
    system = results.get("system_instruction")
    return {"system_prompt": system} if system else {}


def _doc_options(doc: Mapping) -> dict[str, str] | None:
    """The options in a data set's own row; the harnesses prescribe no name for them."""
    choices = doc.get("choices", doc.get("options"))
    if isinstance(choices, dict):
        choices = choices.get("text", list(choices.values()))
    if choices is None:
        choices = [value for name, value in doc.items() if len(name) == 1 and name in ascii_uppercase]
    return letter_options(list(map(_text, choices))) if isinstance(choices, list) and choices else None


def read_inspect(path: Path) -> Log:
    """Read an inspect log, `.eval` or `.json`.

    `choices` of a sample are in the order shown, also after `shuffle_choices` of the data set. A solver that shuffles
    (`multiple_choice(shuffle=…)`) rewrites the messages and the output as if it had not: then the order stands in the
    scorer's explanation alone, and what the model wrote in the events.
    """
    header, samples = _read_inspect_file(path)
    spec, plan = header.get("eval") or {}, header.get("plan") or {}
    shuffles = any((step.get("params") or {}).get("shuffle") for step in plan.get("steps") or [])
    config = {**(plan.get("config") or {}), **(spec.get("model_generate_config") or {})}
    settings = {"generation": config} if config else {}
    answers = [
        _inspect_answer(f"{path}: sample {sample.get('id')}", sample, spec, shuffles=shuffles) for sample in samples
    ]
    return Log(answers, spec.get("model"), (spec.get("packages") or {}).get("inspect_ai"), settings)


def _inspect_answer(where: str, sample: Mapping, spec: Mapping, *, shuffles: bool) -> LogAnswer:
    attachments = sample.get("attachments") or {}
    asked = sample.get("input")
    if isinstance(asked, list):
        asked = "\n".join(_content_text(turn.get("content"), attachments) for turn in asked if turn["role"] == "user")
    question = _content_text(asked, attachments)
    options = letter_options(list(map(str, sample.get("choices") or []))) or find_options(question)
    output, shuffled = sample.get("output") or {}, _find_shuffled(sample)
    if shuffles or shuffled:
        options = shuffled or options
        output = _written(where, sample, spec)
    choice = next(iter(output.get("choices") or []), {})
    content = (choice.get("message") or {}).get("content")
    if not isinstance(content, list):
        content = _answer_text(content, where)
    thoughts = (
        [part.get("reasoning") for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    )
    when = sample.get("completed_at") or spec.get("created")
    more = {
        "answered_at": datetime.fromisoformat(when).astimezone(UTC).isoformat(timespec="seconds") if when else None,
        "finish_reason": FINISHED.get(choice.get("stop_reason"), choice.get("stop_reason")),
        "reasoning": "\n".join(filter(None, thoughts)) or None,
        "latency_ms": round(output["time"] * 1000, 3) if output.get("time") is not None else None,
    }
    return LogAnswer(
        where,
        _content_text(content, attachments),
        index=str(sample["id"]),
        question=question,
        options=options or None,
        epoch=sample["epoch"] if isinstance(sample.get("epoch"), int) else None,
        error=(sample.get("error") or {}).get("message"),
        more={name: value for name, value in more.items() if value is not None},
    )


def _find_shuffled(sample: Mapping) -> dict[str, str] | None:
    """The order in which a solver's own shuffling showed the options; None where it did not shuffle."""
    for score in (sample.get("scores") or {}).values():
        explanation = score.get("explanation") or ""
        if explanation.startswith(SHUFFLED):
            return find_options(explanation.rsplit("\nShuffled answer:", 1)[0])
    return None


def _written(where: str, sample: Mapping, spec: Mapping) -> dict:
    """What the model wrote when it was asked, before the solver rewrote it; the scorers' calls come after."""
    written = None
    for event in sample.get("events") or []:
        if event.get("event") == "span_begin" and event.get("type") == "scorers":
            break
        if event.get("event") == "model" and event.get("model") == spec.get("model"):
            written = event.get("output")
    if written is None:
        raise EvaluationError(
            f"{where}: the solver shuffled the options and rewrote the answer, and the log holds no events that tell "
            "what the model wrote; import the log with its events, or run again with shuffle_choices of the data set"
        )
    return written


def _read_inspect_file(path: Path) -> tuple[dict, Iterator[dict]]:
    if path.suffix.lower() == ".eval" and not zipfile.is_zipfile(path):
        raise EvaluationError(f"{path}: cannot be read: it is not a whole zip archive")
    if not zipfile.is_zipfile(path):
        log = _load_json(read_text(path), str(path))
        if "eval" not in log:
            raise EvaluationError(f"{path} is no inspect log: it has no `eval`")
        return log, iter(log.get("samples") or [])
    try:
        with zipfile.ZipFile(path) as archive:
            names = dict.fromkeys(archive.namelist())
    except (OSError, zipfile.BadZipFile) as error:
        raise EvaluationError(f"{path}: cannot be read: {error}") from None
    begun = next((name for name in ("header.json", "_journal/start.json") if name in names), None)
    if begun is None:
        raise EvaluationError(f"{path} is no inspect log: it has neither header.json nor _journal/start.json")
    members = [name for name in names if name.startswith("samples/")]
    return next(_read_members(path, [begun])), _read_members(path, members)


def _read_members(path: Path, names: Sequence[str]) -> Iterator[dict]:
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            for name in names:
                yield _load_json(_decompress(archive, file, archive.getinfo(name)).decode(), f"{path}: {name}")
    except (OSError, zipfile.BadZipFile, zlib.error, struct.error, UnicodeDecodeError, pa.ArrowException) as error:
        raise EvaluationError(f"{path}: cannot be read: {error}") from None


def _decompress(archive: zipfile.ZipFile, file: IO[bytes], info: zipfile.ZipInfo) -> bytes:
    if info.file_size > LARGEST:
        raise zipfile.BadZipFile(f"{info.filename} unpacks to more than {LARGEST} bytes")
    if info.compress_type in UNPACKED_BY_ZIPFILE:
        with archive.open(info) as member:
            return member.read(LARGEST)  # with a number, since read() unpacks all before it looks at the size
    if info.compress_type != ZIP_ZSTD:
        raise zipfile.BadZipFile(f"{info.filename} is packed in a way that inspect does not use")
    file.seek(info.header_offset)
    name_length, extra_length = struct.unpack("<26x2H", file.read(30))
    file.seek(name_length + extra_length, 1)
    packed = pa.BufferReader(file.read(info.compress_size))
    content = pa.CompressedInputStream(packed, "zstd").read(info.file_size + 1)
    if len(content) != info.file_size or zlib.crc32(content) != info.CRC:
        raise zipfile.BadZipFile(f"{info.filename} is damaged")
    return content


def letter_options(texts: Sequence[str]) -> dict[str, str]:
    """A, B, … for options in the order shown."""
    return dict(zip(ascii_uppercase, texts, strict=False))


def find_options(prompt: str) -> dict[str, str]:
    """The options that a prompt lists on lines `A. …`, `A) …` or `(A) …`; of several lists the last one.

    An option without words is left out, as in VLMEvalKit's prompts: letters may be missing, but never go back.
    """
    lists: list[dict[str, str]] = [{}]
    for line in prompt.splitlines():
        label = re.match(r"\s*(?:\(([A-Z])\)|([A-Z])[.):])(?:\s+|$)(.*)", line)
        if label is None:
            continue
        letter = label[1] or label[2]
        if letter == "A":
            lists.append({})
        if letter > max(lists[-1], default=""):
            lists[-1][letter] = label[3].strip()
    return next((listed for listed in reversed(lists) if len(listed) > 1), {})


def _content_text(content: object, attachments: Mapping[str, str]) -> str:
    """The words of a message: a text, or a list of parts of which only texts count."""
    if isinstance(content, list):
        parts = [part.get("text") or "" for part in content if isinstance(part, dict) and part.get("type") == "text"]
        return "".join(_content_text(part, attachments) for part in parts)
    text = _text(content)
    return attachments.get(text.removeprefix("attachment://"), text) if text.startswith("attachment://") else text


def _text(value: object) -> str:
    return "" if value is None or value != value else str(value)


def _answer_text(value: object, where: str) -> str:
    """What a model wrote; how another language would write a list or a yes is nothing that it wrote."""
    if isinstance(value, (bool, list, dict)):
        raise EvaluationError(
            f"{where}: the answer is of the type {type(value).__name__}; put the text that the model wrote in its place"
        )
    return _text(value)


def _number(value: object, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise EvaluationError(f"{where}: {value!r} is no log-likelihood") from None
    if number != number:
        raise EvaluationError(f"{where}: a log-likelihood is NaN, so that no option is the most likely")
    return number


def _with(answer: LogAnswer, more: Mapping) -> LogAnswer:
    values = {name: getattr(answer, name) for name in LogAnswer.__dataclass_fields__}
    return LogAnswer(**(values | {"more": {**answer.more, **more}}))


def _read_lines(path: Path) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", _load_json(line, f"{path}:{number}")


def _read_beside(path: Path | None) -> dict:
    return _load_json(read_text(path), str(path)) if path and path.is_file() else {}


def _load_json(text: str, where: str) -> dict:
    try:
        loaded = json.loads(text)
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(loaded, dict):
        raise EvaluationError(f"{where}: expected keys and values, got {type(loaded).__name__}")
    return loaded
