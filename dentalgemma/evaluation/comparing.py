"""Two models, or two arms of one, on the same questions: difference with intervals, exact McNemar, Holm over pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from dentalgemma.evaluation.questions import EvaluationError, Kind, Question
from dentalgemma.evaluation.runs import (
    Answered,
    Run,
    accuracy,
    part,
    read_run,
    resample,
    say_unreachable,
    say_ways,
    say_why_not,
)
from dentalgemma.evaluation.statistics import (
    LEVEL,
    bootstrap_interval,
    detectable_difference,
    holm,
    mcnemar_exact,
    minimum_detectable_effect,
    paired_counts,
    unseen_loss,
)

POWER = 0.8
ALPHA = 0.05
# Images. The 95 % interval by image holds the truth in 75 % of cases at 3, 83 % at 5, 92 % at 10 images, simulated by
# benchmarks/interval_coverage.py.
FEWEST = 10
OF_THE_MODEL = ("model", "weights", "hardware", "batch_size")  # what may differ without a word
FORMAT = "comparison/1"
SEVERAL_FORMAT = "comparisons/1"
KINDS: Mapping[str, tuple[Kind, ...]] = {"closed": ("closed",), "open": ("open",), "combined": ("closed", "open")}


def compare_predictions(
    a: Path,
    b: Path,
    questions: Path,
    *,
    verdicts: tuple[Path | None, Path | None] = (None, None),
    protocol: str = "seed",
    draws: int = 1_000,
    seed: int = 0,
) -> dict:
    """Read two runs and compare them.

    Raises:
        EvaluationError: as `read_run` and `compare_runs`.
    """
    runs = [
        read_run(path, questions, verdicts=own, protocol=protocol) for path, own in zip((a, b), verdicts, strict=True)
    ]
    return compare_runs(*runs, draws=draws, seed=seed)


def compare_runs(a: Run, b: Run, *, draws: int = 1_000, seed: int = 0) -> dict:
    """Two runs on the same questions, differences as b - a, for closed and open questions and for both pooled.

    McNemar's test takes questions as independent; where several are about one image its p is smaller than it should be,
    which the interval by image is not. An open question counts where both answers have a verdict; `left_out` says of
    each kind how many do not, and why.

    Raises:
        EvaluationError: when the two do not answer the same questions in the same mode, read by the same protocol, or
            when they have no outcome in common.
    """
    _check_pair(a, b)
    pairs: dict[str, dict | None] = {}
    for name, kinds in KINDS.items():
        both = name != "combined" or (pairs["closed"] and pairs["open"])
        pairs[name] = _pair(a, b, kinds, draws, seed) if both else None
    if not any(pairs.values()):
        raise EvaluationError(
            f"{a.name} and {b.name} have nothing to compare: their questions are open, and no answer has a verdict on "
            "both sides; run `dentalgemma judge` on each and give the files as --verdicts"
        )
    return {
        "format": FORMAT,
        "a": _identify(a),
        "b": _identify(b),
        "settings_that_differ": [name for name in a.settings if a.settings[name] != b.settings[name]],
        "questions_sha256": a.questions_sha256,
        "extraction": a.extraction,
        "splits": sorted({item.split or "unknown" for item in a.items}),
        "level": LEVEL,
        "bootstrap": {"draws": draws, "seed": seed},
        **pairs,
        "left_out": {name: _leave_out(a, b, kinds) for name, kinds in KINDS.items()},
        "warnings": _warn(a, b),
    }


def _identify(run: Run) -> dict:
    files = {"predictions_sha256": run.predictions_sha256, "verdicts_sha256": run.verdicts_sha256}
    return {"name": run.name, **run.settings, **files}


def _leave_out(a: Run, b: Run, kinds: Sequence[Kind]) -> dict[str, int]:
    """The questions that lack an outcome: those not judged on a side, and the others, whose judge could not be read."""
    asked = [item.item_id for kind in kinds for item in a.asked(kind)]
    left = [item_id for item_id in asked if None in (a.outcomes[item_id], b.outcomes[item_id])]
    failed = [item_id for item_id in left if item_id in a.verdicts and item_id in b.verdicts]
    return {"not_judged": len(left) - len(failed), "judge_errors": len(failed)}


def _warn(a: Run, b: Run) -> list[str]:
    unreachable = dict.fromkeys(filter(None, map(say_unreachable, (a, b))))  # said once, where it is the same
    return [*unreachable, *(f"{run.name}: {told}" for run in (a, b) if (told := say_ways(run)))]


def compare_all(runs: Sequence[Run], *, draws: int = 1_000, seed: int = 0) -> dict:
    """Every pair of runs, in the order given; `holm_p` corrects McNemar's p over all pairs of one kind of questions.

    `minimum_detectable_effect_holm` is what one pair needs to be significant by itself after that correction, where no
    other pair is.

    Raises:
        EvaluationError: with fewer than two runs, or two of one name, and as `compare_runs`.
    """
    names = [run.name for run in runs]
    if len(set(names)) < max(2, len(names)):
        raise EvaluationError(f"a comparison needs two runs or more, each of its own name; got {', '.join(names)}")
    comparisons = [compare_runs(a, b, draws=draws, seed=seed) for a, b in combinations(runs, 2)]
    for kind in KINDS:
        pairs = [comparison[kind] for comparison in comparisons if comparison[kind]]
        for pair, adjusted in zip(pairs, holm([pair["mcnemar_p"] for pair in pairs]), strict=True):
            detectable = minimum_detectable_effect(pair["n"], ALPHA / len(pairs))
            pair["holm_p"] = adjusted
            pair["minimum_detectable_effect_holm"] = detectable._asdict() if detectable else None
    return {"format": SEVERAL_FORMAT, "runs": names, "pairs": comparisons}


def is_worse(comparison: Mapping, *, kind: str = "closed", margin: float = 0.0, alpha: float = ALPHA) -> str | None:
    """Why b counts as worse than a, in one sentence that names the two, or `None`.

    Without a margin, b is worse when it is right less often and exact McNemar p < alpha. To pass is no proof that
    nothing was lost: a loss too small for the number of questions passes, and with few questions a large one does.

    With a margin (0.02: two points) b must be shown not to be worse by more: it fails when the lower end of the
    difference's interval by image is below -margin. It also fails where that cannot be told: on fewer than 10 images,
    and where no answer was lost, so that resampling can show no loss, unless there are enough questions to exclude
    it (`unseen_loss`).

    Raises:
        EvaluationError: when the runs have no such questions to compare.
    """
    pair = comparison[kind]
    if pair is None:
        raise EvaluationError(f"there are no {kind} answers to compare; choose among {', '.join(KINDS)}")
    a, b = comparison["a"]["name"], comparison["b"]["name"]
    lost = f"{_points(pair['difference'])} points on {pair['n']} {kind} questions"
    if not margin:
        p = pair["mcnemar_p"]
        worse = pair["difference"] < 0 and p < alpha
        return f"{b} is worse than {a} by {lost} (exact McNemar p = {p:.3g})" if worse else None
    not_shown = f"{b} cannot be shown to lose at most {100 * margin:g} points against {a}"
    if pair["n_clusters"] < FEWEST:
        why = pair["no_difference_by_image"] or f"{lost} are about {pair['n_clusters']} {_unit(pair)}, not {FEWEST}"
        return f"{not_shown}: too few to tell, {why}"
    low, high = pair["difference_by_image"]
    if _is_below(low, -margin):
        return (
            f"{b} may be worse than {a} by more than {100 * margin:g} points: {lost}, "
            f"95 % interval by {pair['clusters']} [{_points(low)}, {_points(high)}]"
        )
    unseen = 0.0 if pair["only_a"] else unseen_loss(pair["n"], pair["only_b"])
    if _is_below(-unseen, -margin):
        return (
            f"{not_shown}: too few to tell, none of {pair['n']} {kind} answers was lost, which excludes no loss of up "
            f"to {100 * unseen:.2f} points"
        )
    return None


def _is_below(value: float, limit: float) -> bool:
    return round(value - limit, 9) < 0  # a loss of just the margin passes, whatever floats make of it


def _unit(pair: Mapping) -> str:
    return "groups" if pair["clusters"] == "group" else "images" if pair["images_asked"] else "questions"


def format_comparison(document: Mapping) -> str:
    """A comparison, or all pairs of several runs, in lines for people."""
    if document["format"] != SEVERAL_FORMAT:
        return "\n".join(_format_pair(document))
    lines = [line for comparison in document["pairs"] for line in [*_format_pair(comparison), ""]]
    lines.append(f"All {len(document['pairs'])} pairs, exact McNemar p corrected by Holm:")
    for comparison in document["pairs"]:
        a, b = comparison["a"]["name"], comparison["b"]["name"]
        for kind in KINDS:
            if pair := comparison[kind]:
                lines.append(
                    f"  {a} → {b}, {kind}: {_points(pair['difference'])} points, "
                    f"p = {pair['mcnemar_p']:.3g}, Holm p = {pair['holm_p']:.3g}"
                )
    return "\n".join(lines)


def _check_pair(a: Run, b: Run) -> None:
    modes = a.settings["mode"], b.settings["mode"]
    if modes[0] != modes[1]:
        raise EvaluationError(f"{a.name} is in mode {modes[0]}, {b.name} in mode {modes[1]}: they cannot be compared")
    if a.protocol != b.protocol:
        raise EvaluationError(f"{a.name} is read by protocol {a.protocol}, {b.name} by {b.protocol}: take one for both")
    asked = [{item.item_id: (item.item_hash, item.answer) for item in run.items} for run in (a, b)]
    if asked[0] != asked[1]:
        differing = sorted(key for key in {*asked[0], *asked[1]} if asked[0].get(key) != asked[1].get(key))
        raise EvaluationError(
            f"{a.name} and {b.name} were not asked the same {len(differing)} questions, for example {differing[0]}"
        )
    if a.judge and b.judge and a.judge != b.judge:
        raise EvaluationError(f"{a.name} was judged by {a.judge}, {b.name} by {b.judge}: judge both alike")


def _pair(a: Run, b: Run, kinds: Sequence[Kind], draws: int, seed: int) -> dict | None:
    left, right = a.answered(*kinds), b.answered(*kinds)
    outcomes = [dict(zip((x.item_id for x in side.items), side.correct, strict=True)) for side in (left, right)]
    items = [item for item in left.items if item.item_id in outcomes[1]]
    if not items:
        return None
    first, second = (np.array([own[item.item_id] for item in items], dtype=bool) for own in outcomes)
    change = second.astype(int) - first.astype(int)
    clusters = Answered(items, first).clusters
    detectable = minimum_detectable_effect(len(items))
    discordance = float(np.mean(first != second))
    return {
        "n": len(items),
        "left_out": sum(len(a.asked(kind)) for kind in kinds) - len(items),
        "images_asked": len({item.image_id for item in items} - {None}),
        "a": accuracy(first),
        "b": accuracy(second),
        "difference": float(change.mean()),
        "difference_by_image": resample(change, clusters, draws, seed),
        "no_difference_by_image": say_why_not(clusters),
        "clusters": clusters.by,
        "n_clusters": clusters.n,
        "difference_by_question": list(bootstrap_interval(change, None, draws, seed)),
        **paired_counts(first, second)._asdict(),
        "mcnemar_p": _test(first, second),
        "minimum_detectable_effect": detectable._asdict() if detectable else None,
        "detectable_difference": {
            "power": POWER,
            "discordance": discordance,
            "points": detectable_difference(len(items), discordance, power=POWER),
        },
        **_breakdowns(items, first, second),
    }


def _breakdowns(items: Sequence[Question], a: np.ndarray, b: np.ndarray) -> dict[str, dict]:
    """The comparison in parts. Their p-values are not corrected: they say where to look, not what is proven."""

    def by(names: Callable[[Question], Iterable[str | None]]) -> dict[str, dict]:
        return {name: _compare_part(a[places], b[places]) for name, places in part(items, names).items()}

    return {
        "per_category": by(lambda item: item.categories),
        "per_question_type": by(lambda item: [item.question_type]),
        "per_language": by(lambda item: [item.language]),
        "per_modality": by(lambda item: [item.modality]),
        "per_finding": by(lambda item: [item.finding]),
    }


def _compare_part(a: np.ndarray, b: np.ndarray) -> dict:
    counts = paired_counts(a, b)
    return {
        "n": len(a),
        "a": float(a.mean()),
        "b": float(b.mean()),
        "difference": (counts.only_b - counts.only_a) / len(a),
        "only_a": counts.only_a,
        "only_b": counts.only_b,
        "mcnemar_p": _test(a, b),
    }


def _test(a: np.ndarray, b: np.ndarray) -> float:
    counts = paired_counts(a, b)
    return mcnemar_exact(counts.only_a, counts.only_b)


def _format_pair(comparison: Mapping) -> Iterator[str]:
    a, b = comparison["a"], comparison["b"]
    yield f"a: {_describe(a)}"
    yield f"b: {_describe(b)}"
    differing = [name for name in comparison["settings_that_differ"] if name not in OF_THE_MODEL]
    if differing:
        yield f"not only the model differs: {', '.join(differing)}"
    for warning in comparison["warnings"]:
        yield f"warning: {warning}"
    for kind in KINDS:
        if pair := comparison[kind]:
            yield from _format_kind(kind, pair)
    for reason, told in (("not_judged", "not judged"), ("judge_errors", "whose judge could not be read")):
        if count := comparison["left_out"]["open"][reason]:
            yield f"{count} open questions {told}: not compared"


def _describe(settings: Mapping) -> str:
    return (
        f"{settings['name']} ({settings['model'] or 'unnamed model'}, {settings['mode'] or 'unknown mode'}, "
        f"{settings['images'] or 'unknown'} images)"
    )


def _format_kind(kind: str, pair: Mapping) -> Iterator[str]:
    yield f"{kind}: {pair['n']} questions on {pair['images_asked']} images"
    for side in ("a", "b"):
        low, high = pair[side]["wilson"]
        yield (
            f"  {side}: {100 * pair[side]['accuracy']:.2f} % [{100 * low:.2f}, {100 * high:.2f}], "
            f"{pair[side]['correct']} right"
        )
    by_image = pair["difference_by_image"]
    interval = f"(no interval by image: {pair['no_difference_by_image']})"
    if by_image:
        interval = f"[{_points(by_image[0])}, {_points(by_image[1])}] (bootstrap by {pair['clusters']})"
    yield f"  difference b - a: {_points(pair['difference'])} points {interval}"
    yield f"  only a right: {pair['only_a']}, only b right: {pair['only_b']}; exact McNemar p = {pair['mcnemar_p']:.3g}"
    if effect := pair["minimum_detectable_effect"]:
        yield (
            f"  minimum detectable effect: {effect['items']} items ({100 * effect['points']:.2f} points) one way"
            + _format_power(pair["detectable_difference"])
        )
    else:
        yield "  minimum detectable effect: none, there are too few questions"
    for name, own in pair["per_category"].items():
        if kind != "combined" and (own["only_a"] or own["only_b"]):
            yield (
                f"    {name} ({own['n']}): {100 * own['a']:.1f} → {100 * own['b']:.1f} %, "
                f"lost {own['only_a']}, gained {own['only_b']}"
            )


def _format_power(detectable: Mapping) -> str:
    if detectable["points"] is None:
        return ""
    return (
        f"; at {100 * detectable['discordance']:.1f} % discordant items, a true difference of "
        f"{100 * detectable['points']:.1f} points is found in {100 * detectable['power']:.0f} % of comparisons"
    )


def _points(share: float) -> str:
    return f"{100 * share:+.2f}"
