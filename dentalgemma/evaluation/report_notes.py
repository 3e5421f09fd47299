"""What a report says beside its figures: what they cannot show, and whether a document is of the same answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from dentalgemma.evaluation.report_text import has_width, write_many, write_percent, write_span
from dentalgemma.evaluation.runs import Run

HELD_OUT = "test"  # as in `contamination`, which reads images and is not needed here
ONE_LETTER = 0.95  # from this share on a model is said to give one letter
FEWEST = 5  # answers of which that can be said
SINGLE = {"per_modality": "of modality", "per_language": "in", "per_question_type": "of type", "per_source": "from"}


def note_answers(run: Run, score: Mapping) -> dict[str, list[str]]:
    """By kind of question, what must be known to read a model's row in the table of accuracies."""
    notes = {kind: _note_intervals(score[kind]) for kind in ("closed", "open", "combined") if score[kind]}
    if score["closed"]:
        notes["closed"] += _note_letters(run) + note_chance(score["closed"])
        if unshown := score["closed"].get("right_unshown"):
            notes["closed"].append(f"{write_many(unshown, 'right answer')} by the letter of an option that is empty")
    if score["open"]:
        notes["open"] += _note_errors(score["open"])
    return notes


def _note_intervals(own: Mapping) -> list[str]:
    if own["accuracy"] is None:
        return []
    notes = []
    if own.get("no_interval_by_image"):
        notes.append(f"no interval by image: {own['no_interval_by_image']}")
    elif own.get("clusters") == "group":
        notes.append(f"resampled by groups (patients), {own['n_clusters']} of them, since these hold several images")
    if any(own.get(key) and not has_width(own[key]) for key in ("interval_by_image", "interval_by_question")):
        alike = {0: "all its answers are wrong", 1: "all its answers are right"}
        why = alike.get(own["accuracy"], "every image has the same share of right answers")
        notes.append(f"{why}: resampling gives no interval, Wilson's stands")
    return notes


def _note_errors(own: Mapping) -> list[str]:
    bounds = own.get("bounds") or {}
    if not own["judge_errors"] or not {"errors_wrong", "errors_right"} <= bounds.keys():
        return []
    low, high = (write_percent(bounds[key]["accuracy"]) for key in ("errors_wrong", "errors_right"))
    return [f"{low} if all answers with a judge error were wrong, {high} if all were right"]


def _note_letters(run: Run) -> list[str]:
    letters = Counter(read.letter for read in run.extractions.values())
    n = letters.total()
    letter, count = letters.most_common(1)[0]
    if n < FEWEST or count < ONE_LETTER * n:
        return []
    if letter is None:
        return [f"no letter could be read {count} of {n} times"]
    right = sum(item.answer == letter for item in run.asked("closed"))
    return [f"answers {letter} {count} of {n} times, which is the right letter {write_many(right, 'time')}"]


def note_chance(closed: Mapping) -> list[str]:
    """Whether the interval by image, or Wilson's where there is none, holds chance or lies below it."""
    by_image = has_width(closed["interval_by_image"])
    interval = closed["interval_by_image"] if by_image else closed["wilson"]
    if interval is None or interval[0] > closed["chance"]:
        return []
    told = f"its interval {'by image' if by_image else 'after Wilson'} ({write_span(interval)})"
    chance = write_percent(closed["chance"])
    if interval[1] < closed["chance"]:
        return [f"{told} lies below chance, {chance}"]
    return [f"{told} holds chance, {chance}: it is not told from guessing"]


def find_foreign(decision: Mapping | None, scores: Sequence[Mapping]) -> list[str]:
    """Candidates that were decided on by answers, or verdicts, that this report is not about."""
    decided = (decision or {}).get("scores") or {}
    return [name for name, own in decided.items() if not any(_is_decided_on(own, score) for score in scores)]


def _is_decided_on(own: Mapping, score: Mapping) -> bool:
    judged = own.get("verdicts_sha256")  # older decisions do not tell
    same = own.get("predictions_sha256") == score["predictions_sha256"]
    return same and (judged is None or judged == score.get("verdicts_sha256"))


def tie_gate(gate: Mapping, scores: Sequence[Mapping]) -> str | None:
    """Why a gate cannot be tied to the answers that a report shows; `None` where each of its runs is among them."""
    asked = [score for score in scores if score["closed"] and score["questions_sha256"] == gate.get("questions_sha256")]
    if not asked:
        return "This gate asked other questions than this report's: nothing here shows what it rests on."
    runs = gate.get("runs") or ()
    foreign = [str(run.get("name")) for run in runs if not any(_is_run(run, score) for score in asked)]
    if foreign or not runs:
        whose = ", ".join(foreign) or "unnamed runs"
        return f"This gate is of other answers than this report's: {whose}. Nothing here shows what they rest on."
    return None


def _is_run(run: Mapping, score: Mapping) -> bool:
    keys = ("weights", "mode", "images") if run.get("weights") else ("weights", "model", "mode", "images")
    counts = [(own.get("n"), own.get("correct")) for own in (run, score["closed"])]
    return counts[0] == counts[1] and all(run.get(key) == score.get(key) for key in keys)


def tie_agreement(agreement: Mapping, runs: Sequence[Run]) -> str | None:
    """Why an agreement cannot be tied to a report's verdicts, of which it may say only how many they were."""
    if known := agreement.get("verdicts_sha256"):
        if known in {run.verdicts_sha256 for run in runs}:
            return None
        return "It is of other verdicts than this report's."
    left = agreement.get("left_out") or {}
    parts = [agreement.get("n"), left.get("judge_errors"), left.get("not_audited")]
    of = sum(parts) if all(isinstance(own, int) for own in parts) else None
    if of is not None and of not in {len(run.verdicts) for run in runs}:
        return (
            f"It is of {write_many(of, 'verdict')}, and no model here has as many: of other answers than this report's."
        )
    return "Given by the author, not tied to these answers: the file says how many verdicts it is of, not which."


def count_verdicts(run: Run) -> dict | None:
    """How many verdicts the file holds, and for how many of them the judge was asked in the run that wrote it."""
    lines = list(run.verdicts.values())
    empty = sum(line.get("method") == "empty" for line in lines)
    cached = sum(bool(line.get("cached")) for line in lines)
    counts = {"verdicts": len(lines), "asked": len(lines) - empty - cached, "cached": cached, "empty": empty}
    return counts if lines else None


def count_images(run: Run) -> dict:
    """Closed questions that are about an image, and these images; one without is not an image of its own."""
    about = [item.image_id for item in run.asked("closed") if item.image_id]
    return {"questions": len(about), "images": len(set(about))}


def count_found(found: Mapping) -> dict[str, int]:
    """Of a contamination document the images and questions that leaked, the templates, and what is held out anyway."""
    both = [("question_image_id", match) for match in found["image_matches"]]
    both += [("item_id", match) for match in found["question_matches"]]
    leaks = {(key, match.get(key, place)) for place, (key, match) in enumerate(both) if match.get("leak", True)}
    others = [match for _, match in both if not match.get("leak", True)]
    templates = {match.get("question") for match in others if match.get("split") != HELD_OUT}
    held_out = sum(match.get("split") == HELD_OUT for match in others)
    return {"leaks": len(leaks), "templates": len(templates), "held_out": held_out}


def find_single_parts(models: Sequence[Mapping], kind: str) -> dict[str, str]:
    """Breakdowns with one part that holds all questions, which a sentence tells as well as a table."""
    single = {}
    for key in SINGLE:
        parts = {name for model in models if model[kind] for name in model[kind].get(key) or ()}
        if len(parts) == 1 and all(_is_whole(model[kind], key, kind) for model in models if model[kind]):
            single[key] = parts.pop()
    return single


def _is_whole(own: Mapping, key: str, kind: str) -> bool:
    asked = own["judged"] if kind == "open" else own["n"]
    return [part["n"] for part in own[key].values()] == [asked]
