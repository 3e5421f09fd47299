"""Closed answers as a clinic would count them: missed, called without cause, on the wrong side, not answered at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from data_builders.dentition import REGIONS
from data_builders.probes import HEALTHY
from dentalgemma.evaluation.extraction import Extraction
from dentalgemma.evaluation.questions import EvaluationError, Question
from dentalgemma.evaluation.runs import was_read
from dentalgemma.evaluation.statistics import wilson_interval

SIDES = {"right": "left", "left": "right"}


class Choice(NamedTuple):
    """What the options of a question state, which of it is true, and which was chosen; `None`: no answer was read."""

    offered: frozenset[str]
    truth: str
    chosen: str | None


def clinical_figures(items: Sequence[Question], extractions: Mapping[str, Extraction]) -> dict | None:
    """Clinical figures of the closed questions that say what their options state; `None` where none does.

    `findings`: for each label, `sensitivity` is the share of the questions with that finding (its option is the right
    one) in which it was chosen, `specificity` the share of the questions without it (its option is a wrong one) in
    which it was not. An answer that could not be read is no call: it misses the finding that is there, and calls none
    that is not. Both depend on what else was offered: they are figures of a choice among options, not of free reading.

    `missed_pathology`: of the questions on a disease that also offered "healthy", those whose answer was "healthy" or
    could not be read. `over_call`: of the questions on images without disease, those whose answer was a disease; an
    unread answer is none. `regions`: true region by chosen region, and how often the answer was the same region on the
    other side of the patient, where that was offered. `abstentions`: all of these questions whose answer was not read.

    Questions count one by one: with two languages, every image counts in both.

    Raises:
        EvaluationError: naming the item whose `option_values` do not say what its right option states.
    """
    choices = list(_choices(items, extractions))
    if not choices:
        return None
    regions = [choice for choice in choices if choice.offered <= set(REGIONS)]
    labels = [choice for choice in choices if not choice.offered <= set(REGIONS)]
    unread = sum(choice.chosen is None for choice in choices)
    return {
        "findings": _findings(labels),
        "missed_pathology": _missed(labels),
        "over_call": _over_call(labels),
        "regions": _regions(regions),
        "abstentions": _share("abstained", unread, len(choices)),
    }


def _choices(items: Sequence[Question], extractions: Mapping[str, Extraction]) -> Iterator[Choice]:
    for item in items:
        if item.kind == "closed" and item.option_values:
            values = item.option_values
            if item.answer not in values:
                raise EvaluationError(
                    f"item {item.item_id}: option_values do not say what its right option, {item.answer}, states"
                )
            extraction = extractions[item.item_id]
            chosen = values.get(extraction.letter or "") if was_read(extraction) else None
            yield Choice(frozenset(values.values()), values[item.answer], chosen)


def _findings(choices: Sequence[Choice]) -> dict[str, dict]:
    figures = {}
    for label in sorted(set().union(*(choice.offered for choice in choices)) - {HEALTHY}):
        calls = [choice.chosen == label for choice in choices if choice.truth == label]
        others = [choice.chosen != label for choice in choices if label in choice.offered and choice.truth != label]
        figures[label] = {
            "n_with": len(calls),
            "n_without": len(others),
            **_rate("sensitivity", sum(calls), len(calls)),
            **_rate("specificity", sum(others), len(others)),
        }
    return figures


def _missed(choices: Sequence[Choice]) -> dict | None:
    diseased = [choice for choice in choices if HEALTHY in choice.offered and choice.truth != HEALTHY]
    unread = sum(choice.chosen is None for choice in diseased)
    missed = unread + sum(choice.chosen == HEALTHY for choice in diseased)
    return _share("missed", missed, len(diseased)) | {"unread": unread} if diseased else None


def _over_call(choices: Sequence[Choice]) -> dict | None:
    healthy = [choice for choice in choices if choice.truth == HEALTHY]
    unread = sum(choice.chosen is None for choice in healthy)
    called = sum(choice.chosen not in (None, HEALTHY) for choice in healthy)
    return _share("over_called", called, len(healthy)) | {"unread": unread} if healthy else None


def _regions(choices: Sequence[Choice]) -> dict | None:
    """Rows are the true regions, columns the chosen ones, both in the order of `labels`."""
    if not choices:
        return None
    counts = [
        [sum((choice.truth, choice.chosen) == (truth, chosen) for choice in choices) for chosen in REGIONS]
        for truth in REGIONS
    ]
    offered = [choice for choice in choices if _mirror(choice.truth) in choice.offered]
    mirrored = sum(choice.chosen == _mirror(choice.truth) for choice in offered)
    return {
        "n": len(choices),
        "labels": list(REGIONS),
        "counts": counts,
        "unread": sum(choice.chosen is None for choice in choices),
        "mirrored": _share("mirrored", mirrored, len(offered)),
    }


def _mirror(region: str) -> str | None:
    """The same region on the other side of the patient; an anterior one has none."""
    side, _, jaw = region.partition("_")
    return f"{SIDES[side]}_{jaw}" if side in SIDES else None


def _share(name: str, count: int, n: int) -> dict:
    return {
        "n": n,
        name: count,
        "share": count / n if n else None,
        "wilson": list(wilson_interval(count, n)) if n else None,
    }


def _rate(name: str, count: int, n: int) -> dict:
    return {name: count / n if n else None, f"{name}_wilson": list(wilson_interval(count, n)) if n else None}
