"""A small made-up evaluation: two models, forty closed and ten open questions on ten phantoms, with verdicts."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

from dentalgemma.evaluation.questions import load_questions

FINDINGS = ("caries", "impacted tooth", "periapical lesion", "bone loss")
REGIONS = ("right_maxillary", "left_maxillary", "right_mandibular", "left_mandibular")
JUDGE = {"model": "stub-judge", "api": "openai", "prompt_sha256": "ab" * 32}


def write_evaluation(folder: Path, pictures: list[Path], *, label: str = "caries", names=("base", "tuned")) -> Path:
    """Write `questions.jsonl`, `<name>.jsonl` and `<name>_verdicts.jsonl` for two models into `folder`.

    `label` stands for "caries" wherever that is written. The first model is right on 20 of 40 closed questions and on 3
    of 9 judged open ones, the second on 30 and 5; between them 4 closed answers are lost and 14 gained.
    """
    folder.mkdir(parents=True, exist_ok=True)
    questions = [_closed(number, pictures, label) for number in range(40)]
    questions += [_open(number, pictures, label) for number in range(10)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    items = load_questions(folder / "questions.jsonl")
    for model, name in enumerate(names):
        lines, verdicts = [], []
        for place, item in enumerate(items):
            number = place if item.kind == "closed" else place - 40
            right = _is_right(model, item.kind, number)
            output = _answer(item, right, number) if item.kind == "closed" else f"{name} says: {item.answer}"
            lines.append(_line(item, name, output, place))
            if item.kind == "open":
                verdicts.append(_verdict(item, output, "judge_error" if number == 9 else right))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / f"{name}_verdicts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in verdicts))
    return folder


def _is_right(model: int, kind: str, number: int) -> bool:
    if kind == "open":
        return number < (5 if model else 3)
    rank = random.Random(0).sample(range(40), 40)[number]
    return 4 <= rank < 34 if model else rank < 20


def _closed(number: int, pictures: list[Path], label: str) -> dict:
    kind = ("diagnosis", "diagnosis", "screening", "location")[number % 4]
    diseases = (label, *FINDINGS[1:])
    values = {"diagnosis": diseases, "screening": (*diseases[:3], "healthy"), "location": REGIONS}[kind]
    options = dict(zip("ABCD", (value.replace("_", " ") for value in values), strict=True))
    if number == 39:
        options["D"] = ""
    return {
        "item_id": f"closed/{number:02}",
        "question": f"Question {number}: " + ("where does it lie?" if kind == "location" else "what is visible?"),
        "options": options,
        "answer": "ABCD"[number // 4 % 4] if number != 39 else "D",
        "image": str(pictures[number % 10]),
        "image_id": f"image{number % 10}",
        "question_type": kind,
        "categories": ["Teeth"] if number % 3 else ["Teeth", "Patho"],
        "finding": None if kind == "location" or values[number // 4 % 4] == "healthy" else values[number // 4 % 4],
        "option_values": dict(zip("ABCD", values, strict=True)),
        "language": "es" if number % 5 == 0 else "en",
        "modality": "panoramic" if number % 2 else "bitewing",
        "split": "test",
    }


def _open(number: int, pictures: list[Path], label: str) -> dict:
    return {
        "item_id": f"open/{number:02}",
        "question": f"Open question {number}: what is seen?",
        "answer": f"{label} on the left",
        "image": str(pictures[number]),
        "image_id": f"image{number}",
        "categories": ["Report"],
        "modality": "panoramic",
        "split": "test",
    }


def _answer(item, right: bool, number: int) -> str:
    """A right or a wrong answer, worded so that each rule of the extractor has some to read."""
    if not right and number % 4 == 0:
        return "I cannot tell that from here, 12345 67890."
    letter = item.answer if right else "ABCD"["ABCD".index(item.answer) - 1]
    if not item.options[letter]:
        return f"The answer: {letter}"
    shapes = (
        f"It is {letter}.",
        f"{letter}) as far as one can see",
        f"there is {item.options[letter]} I think",
        letter,
    )
    return shapes[number % 4]


def _line(item, name: str, output: str, place: int) -> dict:
    return {
        "item_id": item.item_id,
        "image_id": item.image_id,
        "item_hash": item.item_hash,
        "image_shown": item.image_id,
        "output": output,
        "finish_reason": "stop",
        "latency_ms": 5_000.0 if place < 4 else 100.0 + place,
        "warm_up": place < 4,
        "answered_at": f"2026-05-01T10:00:{place:02}+00:00",
        "model": f"models/{name}",
        "weights": hashlib.sha256(name.encode()).hexdigest(),
        "dtype": "float32",
        "mode": "generate",
        "images": "true",
        "image_fit": "squash",
        "protocol": "letter/1" if item.kind == "closed" else "open/1",
        "system_prompt": "",
        "generation": {"do_sample": False, "max_new_tokens": 16 if item.kind == "closed" else 64},
        "batch_size": 4,
        "hardware": "a test's CPU",
    }


def _verdict(item, output: str, right: bool | str) -> dict:
    return {
        "item_id": item.item_id,
        "item_hash": item.item_hash,
        "answer_sha256": hashlib.sha256(output.encode()).hexdigest(),
        "verdict": right if isinstance(right, str) else "correct" if right else "incorrect",
        "reason": "It matches the reference." if right is True else "It does not.",
        "judge": {**JUDGE, "requested": {"temperature": 0, "seed": 0}, "honoured": {"temperature": 0}},
        "usage": {"input_tokens": 100, "output_tokens": 10},
        "cost_usd": 0.001,
        "seconds": 0.5,
        "attempts": 1,
        "cached": False,
        "judged_at": "2026-05-01T11:00:00+00:00",
    }
