"""What is asked, how it is put, and what was answered: the files on either side of a model. Light: no torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import Literal

from PIL import Image

from data_builders.chat import prompt_messages
from dentalgemma.evaluation.files import EvaluationError, read_text, write_whole

Mode = Literal["generate", "loglikelihood"]
Kind = Literal["closed", "open"]
PROTOCOL_VERSIONS = {"generate": "letter/1", "loglikelihood": "option-mean/1"}  # how questions are put and scored
OPEN_PROTOCOL = "open/1"  # an open question is put as it stands
ASK_FOR_LETTER = {
    "en": "Question: {question}\nOptions:\n{options}\nAnswer with the letter of the correct option only.",
    "es": "Pregunta: {question}\nOpciones:\n{options}\nResponda solo con la letra de la opción correcta.",
}
# Names that other formats have for what would otherwise pass unread, and turn a closed question into an open one.
MISNAMED = {
    "id": "item_id",
    "index": "item_id",
    "choices": "options",
    "image_path": "image",
    "images": "image",
    "category": "categories",
}


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
    """Read questions, closed and open ones, from any JSONL whose keys are the fields of `Question`.

    A list of options gets the letters A, B, …; an answer may be a letter, or the text of exactly one option. Image
    paths are relative to the file, and the path stands for an `image_id` that is not given. Other keys are left alone.

    Raises:
        EvaluationError: naming the line, when a question lacks something, or an id comes twice.
    """
    path = Path(path)
    questions: dict[str, Question] = {}
    for where, entry in _read_jsonl(path):
        question = _read_question(entry, where, path.parent)
        if question.item_id in questions:
            raise EvaluationError(f"{where}: item_id {question.item_id!r} comes twice")
        questions[question.item_id] = question
    if not questions:
        raise EvaluationError(f"{path} holds no question")
    return list(questions.values())


def _read_question(entry: Mapping, where: str, folder: Path) -> Question:
    for name, meant in MISNAMED.items():
        if name in entry and entry.get(meant) is None:
            raise EvaluationError(f"{where}: {name!r} is not read; rename it to {meant!r}")
    values = {name: entry[name] for name in Question.__dataclass_fields__ if entry.get(name) is not None}
    missing = [name for name in ("item_id", "question", "answer") if name not in values]
    if missing:
        raise EvaluationError(
            f"{where}: a question needs item_id, question and answer, and options if it is a closed one; there is no "
            f"{' and no '.join(missing)}"
        )
    if type(values["item_id"]) is int:
        values["item_id"] = str(values["item_id"])
    if isinstance(values.get("categories"), str):
        values["categories"] = [values["categories"]]
    _check_texts(values, where)
    options = _read_options(values.get("options", {}), where)
    values |= {"options": options, "categories": tuple(values.get("categories", ()))}
    values["answer"] = _find_letter(values["answer"], options, where) if options else values["answer"]
    if len(options) == 1:
        raise EvaluationError(f"{where}: a closed question needs two options at least; an open one has none")
    stray = set(values.get("option_values", {})) - set(options)
    if stray:
        raise EvaluationError(
            f"{where}: option_values has {', '.join(sorted(stray))}, which is no letter of the options"
        )
    if "image" in values:
        values.setdefault("image_id", values["image"])
        values["image"] = folder / values["image"]
    return Question(**values)


def _check_texts(values: Mapping, where: str) -> None:
    """Every field is a text but `options`, a list of texts (`categories`), or texts by letter (`option_values`)."""
    for name, value in values.items():
        if name == "options":
            continue
        texts = [value]
        if name == "categories" and isinstance(value, list):
            texts = value
        elif name == "option_values" and isinstance(value, dict):
            texts = list(value.values())
        elif name == "option_values":
            raise EvaluationError(f"{where}: option_values should map letters to values, got {json.dumps(value)}")
        for text in texts:
            _check_text(text, f"{where}: {name}")
    for name in ("item_id", "question", "image"):
        if name in values and not values[name].strip():
            raise EvaluationError(f"{where}: {name} is empty")
    if "://" in values.get("image", "")[:10] or values.get("image", "").startswith("data:"):
        raise EvaluationError(f"{where}: image is a URL; save the image and give the path of its file")


def _check_text(text: object, what: str) -> None:
    if not isinstance(text, str):
        raise EvaluationError(f"{what} should be a text, got {json.dumps(text)}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise EvaluationError(f"{what} holds half a character (a lone surrogate); write the text anew") from None


def _read_options(options: object, where: str) -> dict[str, str]:
    if isinstance(options, list):
        if len(options) > len(ascii_uppercase):
            raise EvaluationError(f"{where}: {len(options)} options, more than there are letters")
        options = dict(zip(ascii_uppercase, options, strict=False))
    if not isinstance(options, dict):
        raise EvaluationError(f"{where}: options should map letters to texts, or list texts, got {json.dumps(options)}")
    for letter, text in options.items():
        if len(letter) != 1 or letter not in ascii_uppercase:
            raise EvaluationError(
                f"{where}: option {letter!r} needs one capital letter, A to Z; or give a list of texts"
            )
        if isinstance(text, bool) or not isinstance(text, str | int | float):
            raise EvaluationError(
                f'{where}: option {letter} should be a text, got {json.dumps(text)}; an option that is empty is ""'
            )
    options = {letter: str(text) for letter, text in options.items()}
    for letter, text in options.items():
        _check_text(text, f"{where}: option {letter}")
    return options


def _find_letter(answer: str, options: Mapping[str, str], where: str) -> str:
    """The right letter; an answer that is no letter may be the text of exactly one option."""
    if answer in options:
        return answer
    same = [letter for letter, text in options.items() if text.strip() and text.strip() == answer.strip()]
    if len(same) == 1:
        return same[0]
    if same:
        raise EvaluationError(f"{where}: answer {answer!r} is the text of {', '.join(same)}; give the letter")
    raise EvaluationError(f"{where}: answer {answer!r} is not among {', '.join(options)}, nor the text of an option")


def check_images(items: Iterable[Question]) -> None:
    """Stop before the first answer, rather than in the middle, where an image is missing.

    Raises:
        EvaluationError: naming the first missing files.
    """
    files = {item.image: item.item_id for item in items if item.image is not None}
    missing = [(image, item_id) for image, item_id in files.items() if not image.is_file()]
    if missing:
        shown = "; ".join(f"{image} (item {item_id})" for image, item_id in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise EvaluationError(f"no such image: {shown}{more}; image paths are relative to the questions file")


def write_questions(path: Path, items: Sequence[Question]) -> None:
    """Write questions so that `load_questions` reads the same; image paths become relative to the file."""
    path = Path(path)
    lines = [json.dumps(_to_json(item, path.parent), ensure_ascii=False, separators=(",", ":")) for item in items]
    write_whole(path, "".join(line + "\n" for line in lines))


def _to_json(item: Question, folder: Path) -> dict:
    values = {name: getattr(item, name) for name in Question.__dataclass_fields__}
    values |= {"options": dict(item.options), "option_values": dict(item.option_values)}
    if item.image is not None:
        values["image"] = Path(os.path.relpath(item.image, folder)).as_posix()
    kept = {name: value for name, value in values.items() if value or name == "answer"}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}


def questions_sha256(items: Iterable[Question]) -> str:
    """Identifies a set of questions with its key, in whatever order or file: of what is asked, shown and right."""
    asked = sorted(
        [item.item_id, item.question, sorted(item.options.items()), item.image_id, item.answer] for item in items
    )
    return hashlib.sha256(json.dumps(asked, ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()


def labels_sha256(items: Iterable[Question]) -> str:
    """Identifies what `questions_sha256` leaves out and figures are made of: labels, categories, groups, language.

    Of everything in a question but the file of its image, which may lie anywhere.
    """
    names = [name for name in Question.__dataclass_fields__ if name != "image"]
    rows = [{name: getattr(item, name) for name in names} for item in items]
    rows = [row | {name: dict(row[name]) for name in ("options", "option_values")} for row in rows]
    rows.sort(key=lambda row: row["item_id"])
    text = json.dumps(rows, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


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
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                entry = json.loads(line, object_pairs_hook=_keep_all)
            except (ValueError, RecursionError) as error:
                raise EvaluationError(f"{path}:{number}: not valid JSON: {error}") from None
            if not isinstance(entry, dict):
                raise EvaluationError(f"{path}:{number}: expected keys and values, got {type(entry).__name__}")
            yield f"{path}:{number}", entry


def _keep_all(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object; JSON itself would take the last of two equal keys and drop the first without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found


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
