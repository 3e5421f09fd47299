"""Dialogues: several turns on one image, each of which asks for what the earlier answers did not tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from data_builders.compose.scene import Pair, Scene
from data_builders.compose.wording import Wording
from data_builders.sources import Family

PLACES: tuple[Family, ...] = ("location", "side", "quadrant")


def compose(
    scene: Scene, words: Wording, families: Mapping[Family, Callable[[Scene, Wording], Iterator[Pair]]]
) -> Iterator[Pair]:
    """Yield at most one dialogue: which and where for a lone finding; else two diseases asked in turn."""
    turns = _narrow_down(scene, words, families) or _ask_in_turn(scene, words, families)
    if turns:
        *history, last = turns
        # What was answered before is part of the question: a last "no" must not follow from a first "yes".
        asks = " > ".join([*(turn.asks + turn.answer_key for turn in history), f"{last.question_type} {last.asks}"])
        yield replace(last, question_type="dialogue", asks=asks, history=tuple(history))


def _narrow_down(scene: Scene, words: Wording, families: Mapping) -> list[Pair]:
    """Which disease is it, and where is it?"""
    if not scene.only_disease or not scene.located or len(scene.single) != 1:
        return []
    places = [name for name in PLACES if name in families]
    if "diagnosis" not in families or not places:
        return []
    first = next(families["diagnosis"](scene, words), None)
    where = next(families[scene.rng.choice(places)](scene, words), None)
    if first is None or where is None:
        return []
    question = words.draw("dialogue", where.question_type)
    return [first, replace(where, question=question)]


def _ask_in_turn(scene: Scene, words: Wording, families: Mapping) -> list[Pair]:
    """Is there one disease, and is there another?"""
    pairs = list(families["presence"](scene, words)) if "presence" in families else []
    return scene.rng.sample(pairs, 2) if len(pairs) > 1 else []
