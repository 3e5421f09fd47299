"""What a model was asked and what it answered, read from files and refused where they do not belong together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from dentalgemma.evaluation.extraction import PROTOCOL_LABELS, PROTOCOLS, Extraction, extract
from dentalgemma.evaluation.judge import read_verdicts
from dentalgemma.evaluation.questions import (
    EvaluationError,
    Kind,
    Question,
    load_questions,
    questions_sha256,
    read_predictions,
)
from dentalgemma.evaluation.statistics import bootstrap_interval, wilson_interval

SAME_FOR_ALL = ("model", "weights", "dtype", "mode", "images", "image_fit", "system_prompt")
SAME_FOR_A_KIND = ("protocol", "generation")  # an open question is put otherwise, and its answer may be longer
SAME_JUDGE = ("model", "api", "prompt_sha256", "requested")
RIGHT = {"correct": True, "incorrect": False}  # any other verdict, or none, leaves it open
DRAWN = "random_letter"  # the method of a letter that protocol `official` draws where it reads none


class Clusters(NamedTuple):
    """What is resampled as one: `labels` say of each question where it belongs, `by` whether to an image or a group."""

    by: Literal["image", "group"]
    labels: list[str]

    @property
    def n(self) -> int:
        return len(set(self.labels))


def cluster_items(items: Sequence[Question]) -> Clusters:
    """The image of each question; without one the questions that it is a translation of, or it stands for itself.

    Where a group, a patient's, holds several images, these are no more independent than the questions about one: then
    the whole group counts as one.
    """
    images: dict[str, set[str]] = {}
    for item in items:
        if item.group_id and item.image_id:
            images.setdefault(item.group_id, set()).add(item.image_id)
    by = "group" if any(len(own) > 1 for own in images.values()) else "image"
    return Clusters(by, [_cluster(item, by) for item in items])


def _cluster(item: Question, by: str) -> str:
    if by == "group" and item.group_id:
        return f"group {item.group_id}"
    if item.image_id:
        return f"image {item.image_id}"
    return f"pair {item.pair_id}" if item.pair_id else f"item {item.item_id}"


class Answered(NamedTuple):
    """Questions with whether each was answered rightly."""

    items: list[Question]
    correct: np.ndarray

    @property
    def clusters(self) -> Clusters:
        return cluster_items(self.items)


@dataclass(frozen=True)
class Run:
    """One model's answers. `settings` are what all of them have in common, `outcomes` whether each is right.

    An outcome is `None` where no verdict says: the open answer was not judged, or the judge could not be read. A closed
    answer from which no letter can be read is wrong, never `None`. `settings` is empty of what the lines do not tell,
    as those of other tools may not.
    """

    name: str
    items: Sequence[Question]
    lines: Mapping[str, Mapping]
    extractions: Mapping[str, Extraction]
    verdicts: Mapping[str, Mapping]
    settings: Mapping[str, object]
    judge: Mapping[str, object] | None
    outcomes: Mapping[str, bool | None]
    protocol: str
    questions_sha256: str
    predictions_sha256: str
    verdicts_sha256: str | None = None

    @property
    def extraction(self) -> str | None:
        """How letters were read from text, with the version; `None` where options were scored."""
        return None if self.settings["mode"] == "loglikelihood" else PROTOCOL_LABELS[self.protocol]

    def asked(self, kind: Kind) -> list[Question]:
        return [item for item in self.items if item.kind == kind]

    def answered(self, *kinds: Kind) -> Answered:
        """The questions of these kinds whose outcome is known, closed ones before open ones."""
        items = [item for kind in kinds for item in self.asked(kind) if self.outcomes[item.item_id] is not None]
        return Answered(items, np.array([self.outcomes[item.item_id] for item in items], dtype=bool))

    def unreachable(self) -> list[str]:
        """The closed questions whose right letter, given alone, is not read as such: `seed` reads A to D only.

        Questions whose right option is empty are not among them: these nobody can answer, however they are read.
        """
        if self.settings["mode"] == "loglikelihood":
            return []
        asked = [item for item in self.asked("closed") if item.answerable]
        return [item.item_id for item in asked if not _reaches(self.lines[item.item_id], item, self.protocol)]

    def read_again(self, protocol: str) -> dict[str, Extraction]:
        """The closed answers as another protocol reads them; none where options were scored and no text was written."""
        if self.settings["mode"] == "loglikelihood":
            return {}
        if protocol == self.protocol:
            return dict(self.extractions)
        return {item.item_id: _read(self.lines[item.item_id], item, protocol) for item in self.asked("closed")}


def read_run(
    predictions: Path,
    questions: Path,
    *,
    verdicts: Path | None = None,
    protocol: str = "seed",
    name: str | None = None,
) -> Run:
    """Read a predictions file with the questions it answers, and the verdicts on its open answers if there are any.

    Raises:
        EvaluationError: when items are missing, foreign, asked differently or answered under different settings, when
            a verdict is about another answer or reference, or two judges judged.
    """
    predictions, questions = Path(predictions), Path(questions)
    if protocol not in PROTOCOLS:
        raise EvaluationError(f"no extraction protocol {protocol!r}; choose among {', '.join(PROTOCOLS)}")
    items, lines = load_questions(questions), read_predictions(predictions)
    _check_items(predictions, questions, items, lines)
    closed = [item for item in items if item.kind == "closed"]
    read = {item.item_id: _read(lines[item.item_id], item, protocol) for item in closed}
    judged = read_verdicts(verdicts) if verdicts else {}
    _check_verdicts(Path(verdicts or ""), judged, items, lines)
    outcomes = {item.item_id: RIGHT.get(judged.get(item.item_id, {}).get("verdict")) for item in items}
    outcomes |= {item.item_id: read[item.item_id].letter == item.answer for item in closed}
    return Run(
        name=name or predictions.stem,
        items=items,
        lines=lines,
        extractions=read,
        verdicts=judged,
        settings=_settings(predictions, items, lines),
        judge=_judge_settings(Path(verdicts or ""), judged),
        outcomes=outcomes,
        protocol=protocol,
        questions_sha256=questions_sha256(items),
        predictions_sha256=hashlib.sha256(predictions.read_bytes()).hexdigest(),
        verdicts_sha256=hashlib.sha256(Path(verdicts).read_bytes()).hexdigest() if verdicts else None,
    )


def _read(line: Mapping, item: Question, protocol: str) -> Extraction:
    """The letter as scored, or as extracted from text; predictions of others may have text only.

    Where another tool showed the options otherwise, the letter is the one that stands before the same words here.
    """
    if line.get("mode") == "loglikelihood":
        return Extraction(line.get("letter"), "loglikelihood")
    shown = line.get("options_shown") or item.options
    read = extract(line.get("output") or "", shown, protocol, key=item.item_id)
    if shown is item.options or read.letter is None:
        return read
    words = shown[read.letter].split()
    return read._replace(letter=next((own for own, text in item.options.items() if text.split() == words), None))


def _reaches(line: Mapping, item: Question, protocol: str) -> bool:
    """Whether an answer that is the right letter alone, as it was shown, is read as right."""
    shown = line.get("options_shown") or item.options
    words = item.options[item.answer].split()
    letters = [item.answer] if shown is item.options else [own for own, text in shown.items() if text.split() == words]
    return any(_read({**line, "output": letter}, item, protocol).letter == item.answer for letter in letters)


def _check_items(predictions: Path, questions: Path, items: Sequence[Question], lines: Mapping[str, Mapping]) -> None:
    missing = [item.item_id for item in items if item.item_id not in lines]
    if missing:
        raise EvaluationError(
            f"{predictions} lacks {len(missing)} of {len(items)} items, for example {missing[0]}: "
            "run `dentalgemma evaluate` again with the same settings, it goes on where it stopped"
        )
    foreign = sorted(set(lines) - {item.item_id for item in items})
    if foreign:
        raise EvaluationError(f"{predictions} answers {len(foreign)} items that {questions} does not ask: {foreign[0]}")
    for item in items:
        line = lines[item.item_id]
        for name in ("output", "letter"):
            if not isinstance(line.get(name), str | None):
                raise EvaluationError(f"{predictions}: the {name} of item {item.item_id} is no text: {line[name]!r}")
        shown = line.get("options_shown") or item.options
        asked = replace(item, options=shown)
        own = {" ".join(text.split()) for text in item.options.values()}
        foreign = [text for text in shown.values() if " ".join(text.split()) not in own]
        if foreign or line.get("item_hash", asked.item_hash) != asked.item_hash:
            raise EvaluationError(
                f"{predictions}: item {item.item_id} was asked differently from what {questions} asks"
            )


def _check_verdicts(
    path: Path, verdicts: Mapping[str, Mapping], items: Sequence[Question], lines: Mapping[str, Mapping]
) -> None:
    """A verdict belongs to a run only if it was given on this very answer to this very question."""
    asked = {item.item_id: item for item in items if item.kind == "open"}
    for item_id, verdict in verdicts.items():
        if item_id not in asked:
            raise EvaluationError(f"{path} judges item {item_id}, which is no open question of these")
        if verdict.get("item_hash") != asked[item_id].item_hash:
            raise EvaluationError(f"{path}: the verdict on {item_id} is about another question; judge again")
        # The hash of the item is that of what a model is shown, which leaves the reference out.
        reference = hashlib.sha256(asked[item_id].answer.encode()).hexdigest()
        if verdict.get("reference_sha256", reference) != reference:
            raise EvaluationError(
                f"{path}: the verdict on {item_id} was given by another reference answer than the questions have now; "
                "judge again"
            )
        answer = hashlib.sha256((lines[item_id].get("output") or "").encode(errors="surrogatepass")).hexdigest()
        if verdict.get("answer_sha256") != answer:
            raise EvaluationError(
                f"{path}: the verdict on {item_id} is about another answer than this run's; judge again"
            )


def _settings(predictions: Path, items: Sequence[Question], lines: Mapping[str, Mapping]) -> dict:
    """What all lines have in common; hardware and batch size may change where a run went on elsewhere.

    `honoured` holds, for each kind of question, what servers took of the parameters asked for: several entries where
    they did not take the same for all, so that the answers were not decoded in one way.
    """
    answers = list(lines.values())
    settings = {name: _common(predictions, answers, name) for name in SAME_FOR_ALL}
    for name in SAME_FOR_A_KIND:
        kinds = {}
        for kind in ("closed", "open"):
            of_kind = [lines[item.item_id] for item in items if item.kind == kind]
            if of_kind:
                kinds[kind] = _common(predictions, of_kind, name)
        settings[name] = kinds
    settings["honoured"] = {
        kind: ways
        for kind in ("closed", "open")
        if (ways := _honoured(lines[item.item_id] for item in items if item.kind == kind))
    }
    return settings | {name: list_values(answers, name) for name in ("hardware", "batch_size")}


def _honoured(lines: Iterable[Mapping]) -> list[dict]:
    servers = [line["server"] for line in lines if isinstance(line.get("server"), Mapping)]
    ways = {json.dumps(server["honoured"], sort_keys=True) for server in servers if server.get("honoured") is not None}
    return [json.loads(way) for way in sorted(ways)]


def _common(path: Path, lines: Sequence[Mapping], name: str, *, whose: str = "") -> object:
    values = {json.dumps(line.get(name), sort_keys=True, ensure_ascii=False) for line in lines}
    if len(values) > 1:
        first, second = sorted(values)[:2]
        raise EvaluationError(f"{path} mixes {whose}{name} {first} and {second}; one number takes one of them")
    return json.loads(values.pop())


def list_values(lines: Sequence[Mapping], name: str) -> object:
    """The one value that lines have, or all of them as one text."""
    values = {str(line[name]): line[name] for line in lines if line.get(name) is not None}
    return next(iter(values.values())) if len(values) == 1 else ", ".join(sorted(values)) or None


def _judge_settings(path: Path, verdicts: Mapping[str, Mapping]) -> dict | None:
    """What all verdicts say of who gave them; one that says nothing is not by the same judge as one that does."""
    judges = [judge if isinstance(judge := verdict.get("judge"), Mapping) else {} for verdict in verdicts.values()]
    return {name: _common(path, judges, name, whose="judge's ") for name in SAME_JUDGE} if any(judges) else None


def was_read(extraction: Extraction) -> bool:
    """Whether the answer itself gave the letter."""
    return extraction.letter is not None and extraction.method != DRAWN


def accuracy(correct: np.ndarray) -> dict:
    """`correct` of `n` with the Wilson interval; without answers there is no accuracy, rather than one of 0."""
    right, n = int(correct.sum()), len(correct)
    return {
        "n": n,
        "correct": right,
        "accuracy": right / n if n else None,
        "wilson": list(wilson_interval(right, n)) if n else None,
    }


def resample(values: np.ndarray, clusters: Clusters, draws: int, seed: int) -> list[float] | None:
    """The interval of a mean over resampled images or groups; `None` with fewer than two of them."""
    return list(bootstrap_interval(values, clusters.labels, draws, seed)) if clusters.n > 1 else None


def say_why_not(clusters: Clusters) -> str | None:
    """Why there is no interval by image."""
    if clusters.n > 1:
        return None
    if not clusters.n:
        return "nothing was judged"
    one = {"image": "one image", "group": "one group (group_id)"}[clusters.by]
    return f"all questions are about {one}, so that there are no {clusters.by}s to resample"


def say_unreachable(run: Run) -> str | None:
    """One sentence where `unreachable` names any question."""
    if not (unreachable := run.unreachable()):
        return None
    return (
        f"{len(unreachable)} closed questions, for example {unreachable[0]}, have a right letter that the extraction "
        f"{run.extraction} does not read: answered by the letter alone they count as wrong"
    )


def say_ways(run: Run) -> str | None:
    """One sentence where a server did not decode all answers of a kind in one way."""
    mixed = {kind: ways for kind, ways in run.settings["honoured"].items() if len(ways) > 1}
    told = "; ".join(f"{kind}: {', '.join(map(json.dumps, ways))}" for kind, ways in mixed.items())
    return f"the server did not decode all answers in one way ({told})" if mixed else None


def part(items: Sequence[Question], names: Callable[[Question], Iterable[str | None]]) -> dict[str, np.ndarray]:
    """The places of the items of each name; an item of several counts in each, one without a name in none."""
    places: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        for name in filter(None, names(item)):
            places.setdefault(name, []).append(place)
    return {name: np.array(places[name]) for name in sorted(places)}
