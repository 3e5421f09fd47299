"""Closed answers as a clinic would count them: missed, called without cause, on the wrong side, not answered at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from data_builders.dentition import REGIONS
from data_builders.probes import HEALTHY
from dentalgemma.evaluation.extraction import Extraction
from dentalgemma.evaluation.questions import EvaluationError, Question
from dentalgemma.evaluation.runs import cluster_items, resample, say_why_not, was_read
from dentalgemma.evaluation.statistics import wilson_interval

SIDES = {"right": "left", "left": "right"}


class Choice(NamedTuple):
    """What the options of a question state, which of it is true, and which was chosen; `None`: nothing stated was.

    `guess` is how often a guess among all options shown takes a value, and `read` whether a letter was read at all.
    """

    item: Question
    guess: Mapping[str, float]
    truth: str
    chosen: str | None
    read: bool

    @property
    def offered(self) -> set[str]:
        return set(self.guess)


class Figures(NamedTuple):
    """How the intervals by image are drawn."""

    draws: int
    seed: int

    def share(self, choices: Sequence[Choice], hits: Sequence[bool], chances: Sequence[float]) -> dict:
        """The share of hits among questions, what a guess would reach, and both intervals; `None` without questions."""
        n, clusters = len(choices), cluster_items([choice.item for choice in choices])
        return {
            "n": n,
            "images": len({choice.item.image_id for choice in choices} - {None}),
            "share": sum(hits) / n if n else None,
            "wilson": list(wilson_interval(sum(hits), n)) if n else None,
            "interval_by_image": resample(np.array(hits), clusters, *self),
            "no_interval_by_image": say_why_not(clusters) if n else "nothing was asked",
            "clusters": clusters.by,
            "chance": float(np.mean(chances)) if n else None,
        }

    def count(self, name: str, choices: Sequence[Choice], hits: Sequence[bool], chances: Sequence[float]) -> dict:
        return {name: sum(hits), **self.share(choices, hits, chances)}


def clinical_figures(
    items: Sequence[Question], extractions: Mapping[str, Extraction], *, draws: int = 1_000, seed: int = 0
) -> dict | None:
    """Clinical figures of the closed questions that say what their options state; `None` where none does.

    All of them are figures of a forced choice among the options of a question, not of free reading: what is not offered
    cannot be chosen. `chance` says what a guess among the options shown would reach: at four options a sensitivity of
    25 % and a specificity of 75 %.

    `findings`: for each label, `sensitivity` is the share of the questions with that finding (its option is the right
    one) in which it was chosen, `specificity` the share of the questions without it (its option is a wrong one) in
    which it was not. An answer that could not be read is no call: it misses the finding that is there, and calls none
    that is not.

    `missed_pathology`: of the questions on a disease that also offered "healthy", those whose answer was "healthy" or
    could not be read. `over_call`: of the questions on images without disease, those whose answer was a disease; an
    unread answer is none. `regions`: true region by chosen region, and how often the answer was the same region on the
    other side of the patient, where that was offered. `abstentions`: all of these questions whose answer chose nothing
    that an option states, and of these how often no letter was read, and how often a letter was whose option states
    nothing.

    Each `n` counts questions: with two languages, an image counts in both. `images` counts the images, and intervals by
    image resample these (groups, where a group holds several; `clusters` says which); Wilson intervals take questions
    as independent.

    Raises:
        EvaluationError: naming the item whose `option_values` do not say what its right option states.
    """
    choices = list(_choices(items, extractions))
    if not choices:
        return None
    figures = Figures(draws, seed)
    regions = [choice for choice in choices if choice.offered <= set(REGIONS)]
    labels = [choice for choice in choices if not choice.offered <= set(REGIONS)]
    return {
        "findings": _findings(labels, figures),
        "missed_pathology": _missed(labels, figures),
        "over_call": _over_call(labels, figures),
        "regions": _regions(regions, figures),
        "abstentions": _abstentions(choices, figures),
    }


def _choices(items: Sequence[Question], extractions: Mapping[str, Extraction]) -> Iterator[Choice]:
    for item in items:
        if item.kind == "closed" and item.option_values:
            values = item.option_values
            if item.answer not in values:
                raise EvaluationError(
                    f"item {item.item_id}: option_values do not say what its right option, {item.answer}, states"
                )
            shown = [letter for letter, text in item.options.items() if text.strip()]
            guess = dict.fromkeys(values.values(), 0.0)
            for letter in shown:
                if letter in values:
                    guess[values[letter]] += 1 / len(shown)
            extraction = extractions[item.item_id]
            read = was_read(extraction)
            chosen = values.get(extraction.letter or "") if read else None
            yield Choice(item, guess, values[item.answer], chosen, read)


def _findings(choices: Sequence[Choice], figures: Figures) -> dict[str, dict]:
    found = {}
    for label in sorted(set().union(*(choice.offered for choice in choices)) - {HEALTHY}):
        having = [choice for choice in choices if choice.truth == label]
        lacking = [choice for choice in choices if label in choice.offered and choice.truth != label]
        called = figures.share(having, [x.chosen == label for x in having], [x.guess[label] for x in having])
        spared = figures.share(lacking, [x.chosen != label for x in lacking], [1 - x.guess[label] for x in lacking])
        found[label] = {
            "n_with": called["n"],
            "n_without": spared["n"],
            "images_with": called["images"],
            "images_without": spared["images"],
            **_rename("sensitivity", called),
            **_rename("specificity", spared),
        }
    return found


def _rename(name: str, figure: Mapping) -> dict:
    """A share under its own name: `sensitivity`, `sensitivity_wilson`, `sensitivity_chance`, …"""
    kept = ("wilson", "interval_by_image", "no_interval_by_image", "clusters", "chance")
    return {name: figure["share"]} | {f"{name}_{key}": figure[key] for key in kept}


def _missed(choices: Sequence[Choice], figures: Figures) -> dict | None:
    diseased = [choice for choice in choices if HEALTHY in choice.offered and choice.truth != HEALTHY]
    if not diseased:
        return None
    missed = [choice.chosen in (None, HEALTHY) for choice in diseased]
    chances = [choice.guess[HEALTHY] for choice in diseased]
    return figures.count("missed", diseased, missed, chances) | {"unread": _count_unread(diseased)}


def _over_call(choices: Sequence[Choice], figures: Figures) -> dict | None:
    healthy = [choice for choice in choices if choice.truth == HEALTHY]
    if not healthy:
        return None
    called = [choice.chosen not in (None, HEALTHY) for choice in healthy]
    chances = [sum(choice.guess.values()) - choice.guess[HEALTHY] for choice in healthy]
    return figures.count("over_called", healthy, called, chances) | {"unread": _count_unread(healthy)}


def _abstentions(choices: Sequence[Choice], figures: Figures) -> dict:
    abstained = [choice.chosen is None for choice in choices]
    chances = [round(1 - sum(choice.guess.values()), 9) for choice in choices]  # of an option that states nothing
    no_letter = sum(not choice.read for choice in choices)
    return figures.count("abstained", choices, abstained, chances) | {
        "no_letter": no_letter,
        "states_nothing": sum(abstained) - no_letter,
    }


def _count_unread(choices: Sequence[Choice]) -> int:
    return sum(choice.chosen is None for choice in choices)


def _regions(choices: Sequence[Choice], figures: Figures) -> dict | None:
    """Rows are the true regions, columns the chosen ones, both in the order of `labels`."""
    if not choices:
        return None
    counts = [
        [sum((choice.truth, choice.chosen) == (truth, chosen) for choice in choices) for chosen in REGIONS]
        for truth in REGIONS
    ]
    offered = [choice for choice in choices if _mirror(choice.truth) in choice.offered]
    mirrored = [choice.chosen == _mirror(choice.truth) for choice in offered]
    chances = [choice.guess[_mirror(choice.truth)] for choice in offered]
    return {
        "n": len(choices),
        "images": len({choice.item.image_id for choice in choices} - {None}),
        "labels": list(REGIONS),
        "counts": counts,
        "unread": _count_unread(choices),
        "mirrored": figures.count("mirrored", offered, mirrored, chances),
    }


def _mirror(region: str) -> str | None:
    """The same region on the other side of the patient; an anterior one has none."""
    side, _, jaw = region.partition("_")
    return f"{SIDES[side]}_{jaw}" if side in SIDES else None
