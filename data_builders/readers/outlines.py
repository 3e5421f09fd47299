"""The outlines of many label files at once: what is odd in none of their lines is fitted and added together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from data_builders.readers.drafts import Draft, Meaning
from data_builders.readers.geometry import fit_outlines
from data_builders.records import Ring


class Outlines(NamedTuple):
    """The lines of a label file: their numbers, their classes, and x and y of four points or more of each in turn."""

    numbers: list[int]
    meanings: list[Meaning]
    values: list[list[float]]


def add_outlines(drafts: Sequence[Draft], outlines: Sequence[Outlines], limit: float) -> list[bool]:
    """Add the outlines of each file to its draft, sooner than `Draft.add` does; say for each file whether it was.

    A file without any is not, nor is one with a number beyond `limit`. The outlines are those of persons, and in one
    file either all have four points or none has.
    """
    units = np.array([draft.unit or (1, 1) for draft in drafts]).reshape(-1, 2)
    lengths = np.array([len(of_file.values) for of_file in outlines], int)
    values = [numbers for of_file in outlines for numbers in of_file.values]
    rings = iter(fit_outlines(values, None if (units == 1).all() else np.repeat(units, lengths, axis=0)))
    return [
        _add_file(draft, of_file, list(islice(rings, len(of_file.values))), limit)
        for draft, of_file in zip(drafts, outlines, strict=True)
    ]


def _add_file(draft: Draft, outlines: Outlines, rings: list[Ring | None], limit: float) -> bool:
    if not rings:
        return False
    shape = "oriented_box" if len(outlines.values[0]) == 8 else "polygon"
    if None not in rings:
        draft.add_plain(shape, zip(outlines.numbers, outlines.numbers, outlines.meanings, rings, strict=True))
        return True
    others = [values for values, ring in zip(outlines.values, rings, strict=True) if ring is None]
    if not all(-limit < value < limit for values in others for value in values):
        return False
    for number, meaning, values, ring in zip(*outlines, rings, strict=True):
        if ring is None:
            drawn = tuple(zip(values[::2], values[1::2], strict=True))
            draft.add(number, [meaning.spellings], shape, [drawn])
        else:
            draft.add_plain(shape, [(number, number, meaning, ring)])
    return True
