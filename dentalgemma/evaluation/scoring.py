"""From predictions to numbers: one model's accuracies, with all that they depend on. Deterministic, on a CPU."""

from __future__ import annotations

import datetime
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from dentalgemma.evaluation.clinical import clinical_figures
from dentalgemma.evaluation.comparing import (
    compare_all,
    compare_predictions,
    compare_runs,
    format_comparison,
    is_worse,
)
from dentalgemma.evaluation.extraction import PROTOCOL_LABELS, PROTOCOLS
from dentalgemma.evaluation.questions import Question, labels_sha256
from dentalgemma.evaluation.runs import (
    SAME_FOR_A_KIND,
    SAME_FOR_ALL,
    Answered,
    Run,
    accuracy,
    list_values,
    part,
    read_run,
    resample,
    say_unreachable,
    say_ways,
    say_why_not,
    was_read,
)
from dentalgemma.evaluation.statistics import (
    LEVEL,
    bootstrap_interval,
    design_effect,
    intraclass_correlation,
    minimum_detectable_effect,
)

__all__ = [
    "Run",
    "compare_all",
    "compare_predictions",
    "compare_runs",
    "format_comparison",
    "is_worse",
    "read_run",
    "score_predictions",
    "score_run",
]

FORMAT = "scores/1"
TOLD = (*SAME_FOR_ALL, *SAME_FOR_A_KIND, "hardware")


def score_predictions(
    predictions: Path,
    questions: Path,
    *,
    verdicts: Path | None = None,
    protocol: str = "seed",
    draws: int = 1_000,
    seed: int = 0,
) -> dict:
    """Read a run and score it.

    Raises:
        EvaluationError: as `read_run`.
    """
    return score_run(read_run(predictions, questions, verdicts=verdicts, protocol=protocol), draws=draws, seed=seed)


def score_run(run: Run, *, draws: int = 1_000, seed: int = 0) -> dict:
    """All figures of one run: closed and open questions, both pooled, clinical counts and latency, each with its n.

    A closed answer from which no letter can be read is wrong and stays in the denominator. An open answer whose verdict
    is missing or could not be read is left out of numerator and denominator, and counted; `open.complete` says that
    there is none. `warnings` are sentences on what the figures would not tell by themselves.
    """
    closed, open_ = run.answered("closed"), run.answered("open")
    both = run.answered("closed", "open") if closed.items and open_.items else None
    return {
        "format": FORMAT,
        "name": run.name,
        **{name: run.settings[name] for name in TOLD},
        "questions_sha256": run.questions_sha256,
        "labels_sha256": labels_sha256(run.items),
        "predictions_sha256": run.predictions_sha256,
        "verdicts_sha256": run.verdicts_sha256,
        "extraction": run.extraction,
        "answered": _when(run.lines.values()),
        "level": LEVEL,
        "bootstrap": {"draws": draws, "seed": seed},
        "closed": _closed(run, closed, draws, seed) if closed.items else None,
        "open": _open(run, open_, draws, seed) if run.asked("open") else None,
        "combined": accuracy(both.correct) | _intervals(both, draws, seed) if both else None,
        "clinical": clinical_figures(run.items, run.extractions, draws=draws, seed=seed),
        "latency": _latency(run),
        "warnings": _warn(run, open_),
    }


def _warn(run: Run, judged: Answered) -> list[str]:
    warnings = [text for text in (say_unreachable(run), say_ways(run)) if text]
    if unjudged := len(run.asked("open")) - len(judged.items):
        warnings.append(f"{unjudged} of {len(run.asked('open'))} open answers have no verdict: these are in no figure")
    return warnings


def chance(item: Question) -> float:
    """How often a guess among the options shown is right: never where the right one is empty."""
    return 1 / sum(bool(text.strip()) for text in item.options.values()) if item.answerable else 0.0


def _closed(run: Run, closed: Answered, draws: int, seed: int) -> dict:
    """The figures of closed questions.

    `ceiling` is the share of the questions whose right option can be chosen by what it says, and whose right letter the
    protocol reads: it leaves out those whose right option is empty, and the `unreachable` ones. It is none of what a
    score can be, since the letter of an option that was never shown counts as right where it is: `right_unshown` are
    the answers that got there so. `headline` names the bound that the accuracy is; under `official`, which draws
    letters, it is none of them.
    """
    failed = np.array([not was_read(run.extractions[item.item_id]) for item in closed.items])
    methods = Counter(run.extractions[item.item_id].method for item in closed.items)
    answerable = np.array([item.answerable for item in closed.items])
    unreachable = set(run.unreachable())
    reached = np.array([item.item_id not in unreachable for item in closed.items])
    detectable = minimum_detectable_effect(len(closed.items))
    return {
        **accuracy(closed.correct),
        **_intervals(closed, draws, seed),
        "chance": float(np.mean([chance(item) for item in closed.items])),
        "ceiling": float((answerable & reached).mean()),
        "unreachable": len(unreachable),
        "right_unshown": int((closed.correct & ~answerable).sum()),
        "images_asked": len({item.image_id for item in closed.items} - {None}),
        "methods": dict(sorted(methods.items(), key=lambda entry: (-entry[1], entry[0]))),
        "failed": float(failed.mean()),
        "answerable": accuracy(closed.correct[answerable]),
        "headline": None if run.extraction == PROTOCOL_LABELS["official"] else "failures_wrong",
        "bounds": _bounds(closed, failed, answerable),
        **_protocols(run, closed.items),
        **_breakdowns(closed),
        "minimum_detectable_effect": detectable._asdict() if detectable else None,
        "clustering": _clustering(closed),
    }


def _open(run: Run, judged: Answered, draws: int, seed: int) -> dict:
    verdicts = list(run.verdicts.values())
    asked, errors = run.asked("open"), sum(verdict["verdict"] == "judge_error" for verdict in verdicts)
    costs = [own.get("cost_usd") for own in verdicts if own["verdict"] != "judge_error" or own.get("cost_usd")]
    return {
        **accuracy(judged.correct),
        "n": len(asked),
        "complete": len(judged.items) == len(asked),
        "judged": len(judged.items),
        "judge_errors": errors,
        "not_judged": len(asked) - len(judged.items) - errors,
        **_intervals(judged, draws, seed),
        "images_asked": len({item.image_id for item in asked} - {None}),
        "bounds": _judge_bounds(judged, errors),
        **_breakdowns(judged),
        "judge": run.judge
        and {
            **run.judge,
            # One verdict without a price would make a sum of the others too low.
            "cost_usd": sum(costs) if None not in costs else None,
            "seconds": sum(verdict.get("seconds") or 0 for verdict in verdicts),
            "errors": errors,
        },
    }


def _judge_bounds(judged: Answered, errors: int) -> dict[str, dict]:
    """The accuracy if all answers whose verdict could not be read were wrong, or right; not judged ones stay out."""
    right, n = int(judged.correct.sum()), len(judged.items) + errors
    counts = {"errors_wrong": right, "errors_right": right + errors}
    return {name: {"n": n, "accuracy": count / n if n else None} for name, count in counts.items()}


def _intervals(answered: Answered, draws: int, seed: int) -> dict:
    """Bootstrap intervals; with a single image there is none by image, and the reason stands beside it.

    `clusters` says what the interval by image resampled: images, or groups where a group holds several images.
    """
    clusters, correct = answered.clusters, answered.correct
    return {
        "interval_by_image": resample(correct, clusters, draws, seed),
        "interval_by_question": list(bootstrap_interval(correct, None, draws, seed)) if answered.items else None,
        "no_interval_by_image": say_why_not(clusters),
        "clusters": clusters.by,
        "n_clusters": clusters.n,
    }


def _bounds(closed: Answered, failed: np.ndarray, answerable: np.ndarray) -> dict[str, dict]:
    """The accuracy if answers that cannot be read, or questions whose right option is empty, counted otherwise."""
    guessed = sum(chance(item) for item, unread in zip(closed.items, failed, strict=True) if unread)
    read = closed.correct & ~failed
    kept = {
        "failures_wrong": accuracy(read),
        "extracted_only": accuracy(closed.correct[~failed]),
        "answerable_only": accuracy(closed.correct[answerable]),
    }
    bounds = {name: {key: own[key] for key in ("n", "accuracy")} for name, own in kept.items()}
    return bounds | {"failures_at_chance": {"n": len(read), "accuracy": float(read.sum() + guessed) / len(read)}}


def _protocols(run: Run, items: Sequence[Question]) -> dict:
    """Every protocol's reading of the same answers, and how often two agree; nothing where options were scored."""
    readings = {protocol: read for protocol in PROTOCOLS if (read := run.read_again(protocol))}
    if not readings:
        return {"protocols": None, "agreement": None}
    chosen = {protocol: [read[item.item_id].letter for item in items] for protocol, read in readings.items()}
    right = {
        protocol: np.array([letter == item.answer for letter, item in zip(letters, items, strict=True)])
        for protocol, letters in chosen.items()
    }
    return {
        "protocols": {
            protocol: accuracy(right[protocol]) | {"failed": sum(not was_read(x) for x in read.values()) / len(items)}
            for protocol, read in readings.items()
        },
        "agreement": {
            "protocols": list(chosen),
            "share": [
                [float(np.mean([x == y for x, y in zip(a, b, strict=True)])) for b in chosen.values()]
                for a in chosen.values()
            ],
            "seed_by_strict": _cross(chosen["seed"], chosen["strict"]) if "strict" in chosen else None,
        },
    }


def _cross(rows: Sequence[str | None], columns: Sequence[str | None]) -> dict:
    """How often one protocol read this letter and the other that one; `None` is an answer that was not read."""
    letters = [*sorted({*rows, *columns} - {None}), None]
    pairs = Counter(zip(rows, columns, strict=True))
    return {"letters": letters, "counts": [[pairs[row, column] for column in letters] for row in letters]}


def _breakdowns(answered: Answered) -> dict[str, dict]:
    """Accuracy in parts; an item of several categories counts in each, one without a value in none."""

    def by(names: Callable[[Question], Iterable[str | None]]) -> dict[str, dict]:
        return {name: accuracy(answered.correct[index]) for name, index in part(answered.items, names).items()}

    return {
        "per_question_type": by(lambda item: [item.question_type]),
        "per_category": by(lambda item: item.categories),
        "per_modality": by(lambda item: [item.modality]),
        "per_language": by(lambda item: [item.language]),
        "per_finding": by(lambda item: [item.finding]),
        "per_source": by(lambda item: [item.source]),
    }


def _clustering(closed: Answered) -> dict:
    """How alike the answers about one image are, and by how much that widens an interval; `None` where undefined."""
    clusters = closed.clusters
    icc = intraclass_correlation(closed.correct, clusters.labels)
    return {
        "icc": icc,
        "design_effect": None if icc is None else design_effect(clusters.labels, icc),
        "mean_cluster_size": len(closed.items) / clusters.n,
    }


def _latency(run: Run) -> dict | None:
    """Median and 95th percentile of the time for an item, the first batch of each process left out."""
    timed = [line for line in run.lines.values() if _is_finite(line.get("latency_ms"))]
    if not timed:
        return None
    warm = [line for line in timed if not line.get("warm_up")]
    kinds = {kind: {item.item_id for item in run.asked(kind)} for kind in ("closed", "open")}
    return {
        **_times(warm),
        "per_kind": {
            kind: _times([line for line in warm if line["item_id"] in ids]) for kind, ids in kinds.items() if ids
        },
        "batch_size": list_values(timed, "batch_size"),
        "hardware": list_values(timed, "hardware"),
        "warm_up_excluded": len(timed) - len(warm),
    }


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _times(lines: Sequence[Mapping]) -> dict:
    if not lines:
        return {"n": 0, "median_ms": None, "p95_ms": None}
    median, p95 = np.percentile([line["latency_ms"] for line in lines], [50, 95])
    return {"n": len(lines), "median_ms": float(median), "p95_ms": float(p95)}


def _when(lines: Iterable[Mapping]) -> dict:
    """First and last answer in UTC, and how many are dated.

    A time without its zone counts as no date, nor does one that UTC has no year for.
    """
    dated = sorted(moment for line in lines if (moment := _moment(line.get("answered_at"))))
    return {
        "first": dated[0].isoformat() if dated else None,
        "last": dated[-1].isoformat() if dated else None,
        "dated": len(dated),
    }


def _moment(text: object) -> datetime.datetime | None:
    try:
        moment = datetime.datetime.fromisoformat(str(text))
        return moment.astimezone(datetime.UTC) if moment.tzinfo else None
    except (ValueError, OverflowError):
        return None
