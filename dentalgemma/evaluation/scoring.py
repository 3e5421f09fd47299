"""From predictions to numbers: one model's accuracy, and two models on the same questions. Deterministic, on a CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dentalgemma.evaluation.extraction import Extraction, extract
from dentalgemma.evaluation.questions import EvaluationError, Question, load_questions, read_predictions
from dentalgemma.evaluation.statistics import (
    LEVEL,
    bootstrap_interval,
    mcnemar_exact,
    paired_counts,
    wilson_interval,
)


@dataclass(frozen=True)
class Judged:
    """Questions with what a model chose; `settings` are what all its predictions have in common."""

    items: Sequence[Question]
    extractions: Sequence[Extraction]
    settings: Mapping[str, str | None]

    @property
    def correct(self) -> np.ndarray:
        pairs = zip(self.items, self.extractions, strict=True)
        return np.array([extraction.letter == item.answer for item, extraction in pairs])

    @property
    def images(self) -> list[str]:
        return [item.image_id or item.item_id for item in self.items]


def score_predictions(
    predictions: Path, questions: Path, *, protocol: str = "seed", draws: int = 1_000, seed: int = 0
) -> dict:
    """Accuracy with its intervals, per question type and language; an answer that cannot be read counts as wrong.

    Raises:
        EvaluationError: when items are missing, foreign, or answered in different modes.
    """
    judged = _judge(Path(predictions), Path(questions), protocol)
    correct, n = judged.correct, len(judged.items)
    return {
        **judged.settings,
        "extraction": protocol if judged.settings["mode"] == "generate" else None,
        **_accuracy(correct),
        "chance": float(np.mean([1 / sum(bool(x.strip()) for x in item.options.values()) for item in judged.items])),
        "images_asked": len(set(judged.images)),
        "level": LEVEL,
        "interval_by_image": list(bootstrap_interval(correct, judged.images, draws, seed)),
        "interval_by_question": list(bootstrap_interval(correct, None, draws, seed)),
        "bootstrap": {"draws": draws, "seed": seed},
        "per_question_type": _by(correct, [item.question_type for item in judged.items]),
        "per_language": _by(correct, [item.language for item in judged.items]),
        "methods": dict(Counter(extraction.method for extraction in judged.extractions).most_common()),
        "failed": sum(extraction.letter is None for extraction in judged.extractions) / n,
    }


def compare_predictions(
    a: Path, b: Path, questions: Path, *, protocol: str = "seed", draws: int = 1_000, seed: int = 0
) -> dict:
    """Two models, or two arms of one, on the same questions: difference (b - a), discordant items, exact McNemar test.

    Raises:
        EvaluationError: when the two do not answer the same items in the same mode.
    """
    first, second = (_judge(Path(path), Path(questions), protocol) for path in (a, b))
    if first.settings["mode"] != second.settings["mode"]:
        raise EvaluationError(
            f"{a} is in mode {first.settings['mode']}, {b} in mode {second.settings['mode']}: they cannot be compared"
        )
    counts = paired_counts(first.correct, second.correct)
    change = second.correct.astype(int) - first.correct.astype(int)
    return {
        "n": len(first.items),
        "images_asked": len(set(first.images)),
        "splits": sorted({item.split or "unknown" for item in first.items}),
        "level": LEVEL,
        "a": {**first.settings, **_accuracy(first.correct)},
        "b": {**second.settings, **_accuracy(second.correct)},
        "difference": float(change.mean()),
        "difference_by_image": list(bootstrap_interval(change, first.images, draws, seed)),
        "difference_by_question": list(bootstrap_interval(change, None, draws, seed)),
        "bootstrap": {"draws": draws, "seed": seed},
        **counts._asdict(),
        "mcnemar_p": mcnemar_exact(counts.only_a, counts.only_b),
    }


def format_comparison(comparison: Mapping) -> str:
    """A comparison in lines for people."""
    lines = [f"{comparison['n']} questions on {comparison['images_asked']} images"]
    for side in ("a", "b"):
        own = comparison[side]
        low, high = own["wilson"]
        lines.append(
            f"  {side}: {100 * own['accuracy']:.2f} % [{100 * low:.2f}, {100 * high:.2f}], {own['correct']} right"
            f"  ({own['model'] or 'unnamed model'}, {own['mode']}, {own['images']} images)"
        )
    low, high = comparison["difference_by_image"]
    lines += [
        f"  difference b - a: {100 * comparison['difference']:+.2f} points "
        f"[{100 * low:+.2f}, {100 * high:+.2f}] (bootstrap by image)",
        f"  only a right: {comparison['only_a']}, only b right: {comparison['only_b']}; "
        f"exact McNemar p = {comparison['mcnemar_p']:.3g}",
    ]
    return "\n".join(lines)


def _judge(predictions: Path, questions: Path, protocol: str) -> Judged:
    items, answered = load_questions(questions), read_predictions(predictions)
    ids = {item.item_id for item in items}
    missing = [item.item_id for item in items if item.item_id not in answered]
    if missing:
        raise EvaluationError(
            f"{predictions} lacks {len(missing)} of {len(items)} items, for example {missing[0]}: "
            "run `dentalgemma evaluate` again with the same settings, it goes on where it stopped"
        )
    foreign = sorted(set(answered) - ids)
    if foreign:
        raise EvaluationError(f"{predictions} answers {len(foreign)} items that {questions} does not ask: {foreign[0]}")
    for item in items:
        if answered[item.item_id].get("item_hash", item.item_hash) != item.item_hash:
            raise EvaluationError(
                f"{predictions}: item {item.item_id} was asked differently from what {questions} asks"
            )
    settings = {
        name: _common(predictions, answered, name) for name in ("model", "weights", "mode", "images", "protocol")
    }
    extractions = [_choose(answered[item.item_id], item, protocol) for item in items]
    return Judged(items, extractions, settings)


def _common(predictions: Path, answered: Mapping[str, Mapping], name: str) -> str | None:
    values = {line.get(name) for line in answered.values()}
    if len(values) > 1:
        raise EvaluationError(f"{predictions} mixes {name} {sorted(map(str, values))}; one number takes one of them")
    return values.pop()


def _choose(prediction: Mapping, item: Question, protocol: str) -> Extraction:
    """The letter as scored, or as extracted from text; predictions of others may have text only."""
    if prediction.get("mode") == "loglikelihood":
        return Extraction(prediction.get("letter"), "loglikelihood")
    return extract(prediction.get("output") or "", item.options, protocol)


def _accuracy(correct: np.ndarray) -> dict:
    right, n = int(correct.sum()), len(correct)
    return {"n": n, "correct": right, "accuracy": right / n, "wilson": list(wilson_interval(right, n))}


def _by(correct: np.ndarray, names: Sequence[str]) -> dict[str, dict]:
    names = np.array(names)
    return {str(name): _accuracy(correct[names == name]) for name in np.unique(names)}
