"""Records are made many at a time, lest Python's garbage collector look through all of them again and again."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import wraps
from itertools import islice
from typing import TypeVar

from data_builders.sources import Source

BATCH = 4096
Item = TypeVar("Item")


def read_in_batches(reader: Callable[[Source], Iterator[Item]]) -> Callable[[Source], Iterator[Item]]:
    """Make a reader work ahead by some thousand items, with the collector of reference cycles paused meanwhile.

    Records and parsed JSON have no cycles, and there are millions of small objects in them: the collector, which wakes
    up with their number, takes a third of the time of a reading and half of the time of `json.load`. While a batch
    is in the hands of the caller, it runs as the caller left it.
    """

    @wraps(reader)
    def read(source: Source) -> Iterator[Item]:
        items = reader(source)
        while batch := _take(items):
            yield from batch

    return read


def _take(items: Iterator[Item]) -> list[Item]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return list(islice(items, BATCH))
    finally:
        if was_enabled:
            if not gc.get_freeze_count():  # filed among the old objects, a batch is not looked through right away
                gc.freeze()
                gc.unfreeze()
            gc.enable()
