"""What is asked, how it is put, and what was answered: the files on either side of a model. Light: no torch."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from PIL import Image

from data_builders.chat import prompt_messages
from data_builders.records import InputError

Mode = Literal["generate", "loglikelihood"]
Kind = Literal["closed", "open"]
PROTOCOL_VERSIONS = {"generate": "letter/1", "loglikelihood": "option-mean/1"}  # how questions are put and scored
OPEN_PROTOCOL = "open/1"  # an open question is put as it stands
ASK_FOR_LETTER = {
    "en": "Question: {question}\nOptions:\n{options}\nAnswer with the letter of the correct option only.",
    "es": "Pregunta: {question}\nOpciones:\n{options}\nResponda solo con la letra de la opción correcta.",
}


class EvaluationError(InputError):
    """Questions or predictions that cannot be used as they are; the message names the file and the remedy."""


@dataclass(frozen=True, slots=True)
class Question:
    """A closed question: `options` maps letters to texts, `answer` is the right letter. An open one has no options,
    and `answer` is the reference that a judge compares with.

    An option may be empty, as some of the benchmark's are. `image` is the file to show, if there is one; `image_id`
    is what questions about one image have in common, `group_id` what images of one patient have in common, `pair_id`
    what translations of one question have in common. `option_values` says what each letter states, in labels of the
    vocabulary or regions: what clinical figures are counted from.
    """

    item_id: str
    question: str
    answer: str
    options: Mapping[str, str] = field(default_factory=dict)
    image: Path | None = None
    image_id: str | None = None
    group_id: str | None = None
    pair_id: str | None = None
    question_type: str = ""
    categories: tuple[str, ...] = ()
    finding: str | None = None
    option_values: Mapping[str, str] = field(default_factory=dict)
    language: str = "en"
    modality: str | None = None
    source: str | None = None
    split: str | None = None

    @property
    def kind(self) -> Kind:
        """Whether one of several options is to be chosen, or an answer to be written that a judge reads."""
        return "closed" if self.options else "open"

    @property
    def answerable(self) -> bool:
        """Whether the right answer is there to be given: the right option of some of the benchmark's is empty."""
        return bool((self.options[self.answer] if self.options else self.answer).strip())

    @property
    def item_hash(self) -> str:
        """Tells whether a prediction answers this question: of all that a model is shown, without the right letter."""
        shown = json.dumps([self.question, dict(self.options), self.image_id], ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(shown.encode()).hexdigest()[:16]


def load_questions(path: Path) -> list[Question]:
    """Read questions, closed and open ones, from JSONL such as `build-probe` and `import-questions` write.

    Image paths are relative to the file.

    Raises:
        EvaluationError: naming the line, when a question lacks something, or an id comes twice.
    """
    path = Path(path)
    questions: dict[str, Question] = {}
    for where, entry in _read_jsonl(path):
        try:
            values = {name: entry[name] for name in Question.__dataclass_fields__ if entry.get(name) is not None}
            question = Question(**values)
        except TypeError:
            raise EvaluationError(
                f"{where}: a question needs item_id, question and answer, and options if it is a closed one"
            ) from None
        if question.options and question.answer not in question.options:
            raise EvaluationError(f"{where}: answer {question.answer!r} is not among {', '.join(question.options)}")
        if question.item_id in questions:
            raise EvaluationError(f"{where}: item_id {question.item_id!r} comes twice")
        if question.image is not None:
            values["image"] = path.parent / question.image
        question = Question(**(values | {"categories": tuple(question.categories)}))
        questions[question.item_id] = question
    if not questions:
        raise EvaluationError(f"{path} holds no question")
    return list(questions.values())


def read_predictions(path: Path) -> dict[str, dict]:
    """Read a predictions file: one JSON object a line, by `item_id`.

    Raises:
        EvaluationError: naming the line that is not valid, or whose item was there before.
    """
    predictions: dict[str, dict] = {}
    for where, entry in _read_jsonl(Path(path)):
        item_id = entry.get("item_id")
        if not isinstance(item_id, str):
            raise EvaluationError(f"{where}: a prediction needs its item_id")
        if item_id in predictions:
            raise EvaluationError(f"{where}: item {item_id} was answered before; an item counts once")
        predictions[item_id] = entry
    return predictions


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                raise EvaluationError(f"{path}:{number}: not valid JSON: {error}") from None
            if not isinstance(entry, dict):
                raise EvaluationError(f"{path}:{number}: expected keys and values, got {type(entry).__name__}")
            yield f"{path}:{number}", entry


def put_question(item: Question, picture: Image.Image | None, *, mode: Mode, system_prompt: str) -> list[dict]:
    """The conversation that asks a question: the image before the words, as in training.

    Mode `loglikelihood` asks the question alone; `generate` lists the options, empty ones left out, and asks for a
    letter in the question's language. An open question is asked alone.
    """
    question = item.question
    if mode == "generate" and item.kind == "closed":
        options = "\n".join(f"{letter}. {text}" for letter, text in item.options.items() if text.strip())
        wording = ASK_FOR_LETTER.get(item.language, ASK_FOR_LETTER["en"])
        question = wording.format(question=question, options=options)
    pictures = [] if picture is None else [{"type": "image", "image": picture}]
    *system, user = prompt_messages(question, system_prompt)
    return [
        *({"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in system),
        {"role": "user", "content": [*pictures, {"type": "text", "text": user["content"]}]},
    ]


def swap_images(items: Sequence[Question]) -> dict[str, Question]:
    """For each image id a question whose image belongs to another group: the control with another patient's image.

    It is a rotation of the images, of the same modality wherever that has two groups. Where no group holds more than
    half of them every image is shown in place of exactly one other, so that as a whole the same pictures are seen.

    Raises:
        EvaluationError: when all images belong to one group.
    """
    images: dict[str, Question] = {}
    for item in items:
        if item.image is None or item.image_id is None:
            raise EvaluationError(f"item {item.item_id} has no image, so that no other one can take its place")
        images.setdefault(item.image_id, item)
    swapped: dict[str, Question] = {}
    pools: dict[str | None, list[Question]] = defaultdict(list)
    for item in images.values():
        pools[item.modality].append(item)
    for modality, pool in pools.items():
        candidates = pool if len({_group(item) for item in pool}) > 1 else list(images.values())
        swapped |= {item.image_id: other for item, other in _rotate(candidates) if item.modality == modality}
    return swapped


def _rotate(images: list[Question]) -> Iterator[tuple[Question, Question]]:
    """Pair each image with one of another group, which lies as many places on as the largest group is long."""
    images = sorted(images, key=lambda item: (_group(item), item.image_id or ""))
    sizes: dict[str, int] = defaultdict(int)
    for item in images:
        sizes[_group(item)] += 1
    if len(sizes) < 2:
        raise EvaluationError("all images belong to one group; another patient's image needs a second group_id")
    step = max(sizes.values())
    for number, item in enumerate(images):
        others = (images[(number + away) % len(images)] for away in range(step, step + len(images)))
        yield item, next(other for other in others if _group(other) != _group(item))


def _group(item: Question) -> str:
    return item.group_id or item.image_id or item.item_id
