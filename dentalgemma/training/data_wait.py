"""How long training waits for its batches: a GPU that waits is paid for and does nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator

LOOKED_AT = 50  # steps after which the share is judged, once
TOO_LONG = 0.1  # of the wall time


class DataWait:
    """Counts the seconds in which the training loop waits for the next batch, as a share of the time that passes.

    A trainer wraps the iterator that it takes its batches from (`watch`), adds `take_share` to its log entries, and
    calls `end_step` once per step. Validation and checkpoints count as time that passes.
    """

    def __init__(self, workers: int, *, cached: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self.workers = workers
        self.cached = cached
        self.clock = clock
        self.begin()

    def begin(self) -> None:
        """Start counting; training begins, or goes on from a checkpoint."""
        self.started = self.since = self.clock()
        self.waited = self.waited_since = 0.0
        self.steps = 0

    def watch(self, batches: Iterator) -> Iterator:
        """The same batches, with the time counted that each takes to come."""
        while True:
            asked = self.clock()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                seconds = self.clock() - asked
                self.waited += seconds
                self.waited_since += seconds
            yield batch

    def take_share(self) -> float:
        """The share of the time since the last call, or since the beginning, that was spent waiting."""
        now = self.clock()
        share = self.waited_since / max(now - self.since, 1e-9)
        self.since, self.waited_since = now, 0.0
        return round(share, 4)

    def share(self) -> float:
        """The share of the time since the beginning that was spent waiting."""
        return round(self.waited / max(self.clock() - self.started, 1e-9), 4)

    def end_step(self) -> str | None:
        """A warning after the first steps, where training waits for its data for long; said once."""
        self.steps += 1
        if self.steps != LOOKED_AT:
            return None
        share = self.share()
        if share <= TOO_LONG:
            return None
        more = f"--dataloader_num_workers {max(4, 2 * self.workers)}"
        remedy = more if self.cached else f"cached features (--vision_features cached), or {more}"
        return f"training waits for its data {share:.0%} of the time: try {remedy}"


def say_wait(warning: str | None) -> None:
    """Print a warning of `DataWait.end_step`, if there is one."""
    if warning:
        print(f"Data: {warning}", file=sys.stderr, flush=True)
