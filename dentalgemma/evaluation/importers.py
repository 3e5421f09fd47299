"""Other harnesses' logs as predictions: the same questions, answered elsewhere, scored by the same rules."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

from dentalgemma.evaluation.files import write_whole
from dentalgemma.evaluation.harness_logs import (
    Log,
    LogAnswer,
    read_inspect,
    read_lm_eval,
    read_lmms_eval,
    read_vlmevalkit,
)
from dentalgemma.evaluation.questions import EvaluationError, Question, load_questions

Format = Literal["auto", "vlmevalkit", "lmms_eval", "lm_eval", "inspect"]
Match = Literal["auto", "index", "question"]
READERS = {
    "vlmevalkit": read_vlmevalkit,
    "lmms_eval": read_lmms_eval,
    "lm_eval": read_lm_eval,
    "inspect": read_inspect,
}
SHOWN = 5  # names in a message


def import_predictions(
    log: Path | Sequence[Path],
    questions: Path,
    out: Path,
    *,
    format: Format = "auto",
    model: str | None = None,
    match: Match = "auto",
    epoch: int | None = None,
) -> dict:
    """Write the answers in another harness's log as a predictions file; several logs of one model may be given.

    The output is the text that the model wrote, never the letter that the harness read in it. Answers find their
    question by the log's own index (`match="index"`; MMOral's 12 is `closed-12` or `open-12`), or by the words of
    question and options. Of repeated answers `epoch` takes one, counted from 1.

    A line says what the log says and nothing else: no image, no weights. `options_shown` stands where the model saw
    other letters before the options, or not all of them; then `item_hash` is that of the question as shown.

    Returns counts, and the ids of what is missing in the log, foreign to the questions, or failed.

    Raises:
        EvaluationError: when the log cannot be read, an answer fits several questions or none of the letters' texts,
            or an item was answered several times and no `epoch` chosen.
    """
    paths, out = [Path(log)] if isinstance(log, str | Path) else [Path(path) for path in log], Path(out)
    if out.exists():
        raise EvaluationError(f"{out} is there already; choose another file, or delete it")
    items = load_questions(questions)
    lines: dict[str, dict] = {}
    foreign: list[str] = []
    answers = 0
    for path in paths:
        name = _find_format(path) if format == "auto" else format
        read = _read_log(path, name)
        answers += len(read.answers)
        pairs, strangers = _match(read.answers, items, match)
        foreign += strangers
        common = _describe(path, name, read, model)
        for item, answer in _choose_epoch(pairs, epoch):
            if item.item_id in lines:
                raise EvaluationError(f"{answer.where}: item {item.item_id} was answered in another of the logs")
            lines[item.item_id] = _write_line(item, answer, common)
    if not lines:
        raise EvaluationError(
            f"{paths[0]}: none of {answers} answers belongs to a question of {questions}"
            + (f"; the log has for example {foreign[0]}" if foreign else "")
        )
    ordered = [lines[item.item_id] for item in items if item.item_id in lines]
    write_whole(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in ordered))
    return {
        "format": ordered[0]["imported"]["format"],
        "model": ordered[0]["model"],
        "answers": answers,
        "imported": len(ordered),
        "missing": [item.item_id for item in items if item.item_id not in lines],
        "foreign": foreign,
        "failed": [line["item_id"] for line in ordered if "error" in line],
        "empty": [line["item_id"] for line in ordered if not line["output"] and "error" not in line],
        "shown_otherwise": [line["item_id"] for line in ordered if "options_shown" in line],
    }


def format_import(summary: Mapping) -> str:
    """What `import_predictions` returns, in words for a person."""
    found, asked = summary["imported"], summary["imported"] + len(summary["missing"])
    lines = [f"Imported {found} of {asked} answers of {summary['model'] or 'an unnamed model'} ({summary['format']})"]
    notes = {
        "missing": "questions without an answer, which scoring refuses: give the other logs too",
        "foreign": "answers to other questions, left out",
        "failed": "requests that failed, which count as wrong",
        "empty": "empty answers",
        "shown_otherwise": "questions whose options the model saw in another order, or not all of them",
    }
    for key, what in notes.items():
        if names := summary[key]:
            more = ", …" if len(names) > SHOWN else ""
            lines.append(f"  {len(names)} {what}: {', '.join(names[:SHOWN])}{more}")
    return "\n".join(lines)


def _read_log(path: Path, name: str) -> Log:
    if name not in READERS:
        raise EvaluationError(f"no format {name!r}; choose auto, {', '.join(READERS)}")
    try:
        return READERS[name](path)
    except EvaluationError:
        raise
    except (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise EvaluationError(f"{path} is not built as a log of {name} is: {error!r}") from error


def _find_format(path: Path) -> str:
    """The harness that wrote a file, told by its name's end and the first keys in it."""
    suffix = path.suffix.lower()
    if suffix in (".xlsx", ".tsv", ".csv", ".pkl", ".pickle"):
        return "vlmevalkit"
    if suffix == ".eval":
        return "inspect"
    try:
        with path.open(encoding="utf-8-sig") as file:
            first = (file.readline() if suffix == ".jsonl" else file.read(65_536)).lstrip()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: cannot be read: {error}") from None
    if suffix == ".json" and first.startswith("["):
        return "vlmevalkit"
    if suffix == ".json" and '"eval"' in first:
        return "inspect"
    if suffix == ".jsonl" and '"doc_id"' in first:
        return "lm_eval" if '"arguments"' in first else "lmms_eval"
    raise EvaluationError(
        f"{path} is no log that is known: give a VLMEvalKit result file, `samples` of lm-evaluation-harness or "
        "lmms-eval (--log_samples), or an inspect log; or name its format"
    )


def _describe(path: Path, name: str, log: Log, model: str | None) -> dict:
    """What all lines of a log have in common."""
    model = model or log.model
    if not model:
        raise EvaluationError(f"{path} does not tell which model answered; name it with --model")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    source = {"format": name, "version": log.version, "file_name": path.name, "sha256": digest}
    return {"model": model, **log.settings, "imported": {key: value for key, value in source.items() if value}}


def _match(
    answers: Sequence[LogAnswer], items: Sequence[Question], match: Match
) -> tuple[list[tuple[Question, LogAnswer]], list[str]]:
    """Answers with their questions, and the names of answers that have none."""
    if match not in Match.__args__:
        raise EvaluationError(f"no match {match!r}; choose {', '.join(Match.__args__)}")
    words = [_read_words(item) for item in items]
    if match != "question":
        try:
            pairs, foreign = _match_by_index(answers, words)
        except EvaluationError:
            if match == "index":
                raise
        else:
            if pairs or match == "index":
                return pairs, foreign
    return _match_by_question(answers, words)


class _Words(NamedTuple):
    """A question, and its texts with all blanks alike; an empty option is left out."""

    item: Question
    question: str
    options: dict[str, str]
    texts: frozenset[str]


def _read_words(item: Question) -> _Words:
    options = {letter: text for letter, option in item.options.items() if (text := _squash(option))}
    return _Words(item, _squash(item.question), options, frozenset(options.values()))


def _match_by_index(
    answers: Sequence[LogAnswer], words: Sequence[_Words]
) -> tuple[list[tuple[Question, LogAnswer]], list[str]]:
    by_id = {own.item.item_id: own for own in words}
    pairs, foreign = [], []
    for answer in answers:
        if answer.index is not None:
            names = (answer.index, f"closed-{answer.index}", f"open-{answer.index}")
            candidates = [by_id[name] for name in names if name in by_id]
        else:
            place = answer.position if answer.position is not None else -1
            candidates = words[place : place + 1] if place >= 0 else []
        # A place in a data set says something only if the words there are the same.
        fitting = _find_fitting(answer, candidates)
        if candidates and not fitting:
            raise EvaluationError(
                f"{answer.where} asks something else than item {candidates[0].item.item_id}: other words or other "
                "options; match by question if the log counts its items otherwise"
            )
        if len(fitting) > 1:
            raise EvaluationError(f"{answer.where} may be item {fitting[0].item.item_id} or {fitting[1].item.item_id}")
        pairs += [(own.item, answer) for own in fitting]
        foreign += [] if fitting else [_name(answer)]
    return pairs, foreign


def _match_by_question(
    answers: Sequence[LogAnswer], words: Sequence[_Words]
) -> tuple[list[tuple[Question, LogAnswer]], list[str]]:
    """By the words of question and options; where only the prompt is known, by the longest question in it."""
    by_question: dict[str, list[_Words]] = defaultdict(list)
    for own in words:
        by_question[own.question].append(own)
    longest_first = sorted(by_question, key=len, reverse=True)
    pairs, foreign = [], []
    for answer in answers:
        asked = _squash(answer.question or answer.prompt or "")
        same = [asked] if answer.question and asked in by_question else longest_first
        fitting: list[_Words] = []
        for question in same:
            if fitting and len(question) < len(fitting[0].question):
                break
            if question in asked or not asked:
                fitting += _find_fitting(answer, by_question[question])
        if len(fitting) > 1:
            raise EvaluationError(
                f"{answer.where} may be item {fitting[0].item.item_id} or {fitting[1].item.item_id}: both ask in the "
                "same words; only a log that holds the items' ids can tell them apart (match by index)"
            )
        pairs += [(own.item, answer) for own in fitting]
        foreign += [] if fitting else [_name(answer)]
    return pairs, foreign


def _find_fitting(answer: LogAnswer, candidates: Sequence[_Words]) -> list[_Words]:
    """The questions that the answer may be one to: their words occur, and no option is another's.

    None, where the log says neither what was asked nor the item's own id.
    """
    if not (answer.question or answer.prompt or answer.index):
        return []
    asked = _squash(answer.question or answer.prompt or "")
    candidates = [own for own in candidates if own.question in asked or not asked]
    if answer.options is not None:
        shown = {_squash(text) for text in answer.options.values()} - {""}
        return [own for own in candidates if bool(shown) == bool(own.texts) and shown <= own.texts]
    # Options that were found nowhere as a list: each has to stand behind its own letter.
    return [own for own in candidates if not asked or _lists_options(own, asked)]


def _lists_options(own: _Words, asked: str) -> bool:
    if any(text not in asked for text in own.texts):  # said for nearly all, and faster than patterns
        return False
    labelled = (rf"(?<!\w){letter}\W{{1,4}}{re.escape(text)}" for letter, text in own.options.items())
    return all(re.search(label, asked) for label in labelled)


def _choose_epoch(pairs: Sequence[tuple[Question, LogAnswer]], epoch: int | None) -> list[tuple[Question, LogAnswer]]:
    """One answer an item: the only one, or the chosen one of several."""
    by_item: dict[str, list[tuple[Question, LogAnswer]]] = defaultdict(list)
    for item, answer in pairs:
        by_item[item.item_id].append((item, answer))
    chosen = []
    for item_id, repeats in by_item.items():
        if len(repeats) > 1 and epoch is None:
            first, second = repeats[0][1], repeats[1][1]
            raise EvaluationError(
                f"item {item_id} was answered {len(repeats)} times ({first.where}; {second.where}); an item counts "
                "once: choose an epoch, from 1"
            )
        numbered = {answer.epoch or place: (item, answer) for place, (item, answer) in enumerate(repeats, start=1)}
        if len(repeats) == 1 or epoch in numbered:
            chosen.append(repeats[0] if len(repeats) == 1 else numbered[epoch])
    return chosen


def _write_line(item: Question, answer: LogAnswer, common: Mapping) -> dict:
    shown = dict(answer.options or {})
    line = {"item_id": item.item_id, "image_id": item.image_id, "item_hash": item.item_hash}
    if answer.scores is not None:
        line |= _scored(item, answer)
    else:
        # Half a character, which JSON can hold and UTF-8 cannot, becomes the sign for one that is lost.
        output = answer.output.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        line |= {"output": output, "mode": "generate"}
        if shown and not _same_letters(item.options, shown):
            _check_unique(item, answer)
            line |= {"item_hash": replace(item, options=shown).item_hash, "options_shown": shown}
    if answer.error:
        line |= {"finish_reason": "error", "error": answer.error}
    return {**line, **common, **answer.more, "protocol": None}


def _same_letters(own: Mapping[str, str], shown: Mapping[str, str]) -> bool:
    """Whether each letter stood before the same words; an empty option may be listed or left out."""
    return all(_squash(own.get(letter, "")) == _squash(shown.get(letter, "")) for letter in {*own, *shown})


def _check_unique(item: Question, answer: LogAnswer) -> None:
    texts = [_squash(text) for text in item.options.values() if text.strip()]
    if len(set(texts)) < len(texts):
        raise EvaluationError(
            f"{answer.where}: the options were shown in another order than in item {item.item_id}, two of which read "
            "the same: nothing tells which of them was meant"
        )


def _scored(item: Question, answer: LogAnswer) -> dict:
    """The option of the highest log-likelihood, the first one on a tie, as our letter.

    The harness ranked continuations: the letters that the prompt listed, or the options' own words.
    """
    words = [continuation.strip() for continuation, _ in answer.scores]
    if answer.options and all(word in answer.options for word in words):
        words = [answer.options[word] for word in words]
    words = [_squash(word) for word in words]
    own = {letter: _squash(text) for letter, text in item.options.items()}
    if words == list(own.values()):
        letters = list(own)
    elif sorted(words) == sorted(own.values()) and len(set(words)) == len(words):
        letters = [next(letter for letter, text in own.items() if text == word) for word in words]
    else:
        raise EvaluationError(
            f"{answer.where}: the harness ranked {words}, which are not the options of item {item.item_id}"
        )
    sums = {letter: number for letter, (_, number) in zip(letters, answer.scores, strict=True)}
    best = max(sums, key=lambda letter: sums[letter])
    return {
        "output": item.options[best],
        "mode": "loglikelihood",
        "letter": best,
        "option_scores": {letter: {"sum": number} for letter, number in sums.items()},
        "finish_reason": "scored",
    }


def _name(answer: LogAnswer) -> str:
    return answer.index or answer.where


def _squash(text: str) -> str:
    return " ".join(text.split())
