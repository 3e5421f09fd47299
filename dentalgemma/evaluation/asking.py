"""Put many questions to an endpoint, several at a time, until all have their answers or it is gone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import NamedTuple, TypeVar

from dentalgemma.evaluation.endpoints import EndpointError
from dentalgemma.evaluation.questions import EvaluationError

REFUSED = (400, 413, 422)  # statuses that are about one request, such as one that is too long
HOPELESS = (301, 302, 303, 307, 308, 401, 403, 404)  # statuses that every other request would meet as well
GIVE_UP_AFTER = 10  # failures in a row that are about no request: the server is gone
GRACE = 1.5  # seconds that an interrupted run gives answers that are there to be written

Item = TypeVar("Item")


class Outcome(NamedTuple):
    """What failed, in the order of its failing; where that stopped the run, by what, and how many were not asked."""

    failures: list[tuple[Item, EvaluationError]]
    stopped_by: EvaluationError | None
    unasked: int


def ask_all(
    ask: Callable[[Item], EvaluationError | None],
    items: Sequence[Item],
    *,
    workers: int,
    interrupt: Callable[[], None],
) -> Outcome:
    """Let `ask` ask and write each item, and return what it failed by; what it raises ends the run.

    A worker takes the next item when its answer is written, so that a kill costs one each. Where the run is broken off,
    as by Ctrl-C, `interrupt` ends what is under way, answers that are there are still written, and nothing is waited
    for beyond that: these are no threads of a `ThreadPoolExecutor`, on which Python waits before it exits.
    """
    left, ended = iter(items), SimpleQueue()
    stopped, lock = threading.Event(), threading.Lock()
    asked, in_a_row, failures, stopped_by = 0, 0, [], None

    def note(item: Item, failure: EvaluationError | None) -> None:
        """Count an outcome; under the lock, so that no worker takes another item before it is counted."""
        nonlocal asked, in_a_row, stopped_by
        asked += 1
        in_a_row = in_a_row + _is_about_the_server(failure) if failure else 0
        if failure:
            failures.append((item, failure))
        if getattr(failure, "status", None) in HOPELESS or in_a_row >= GIVE_UP_AFTER:
            stopped_by = stopped_by or failure
            stopped.set()

    def work() -> None:
        try:
            while True:
                with lock:
                    item = None if stopped.is_set() else next(left, None)
                if item is None:
                    break
                failure = ask(item)
                with lock:
                    note(item, failure)
        except BaseException as error:
            ended.put(error)
        else:
            ended.put(None)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(max(1, workers), len(items)))]
    try:
        for thread in threads:
            thread.start()
        for _ in threads:
            if error := ended.get():
                raise error
    except BaseException:
        stopped.set()
        interrupt()
        deadline = time.monotonic() + GRACE
        for thread in threads:
            if thread.is_alive():
                thread.join(max(0.0, deadline - time.monotonic()))
        raise
    return Outcome(failures, stopped_by, unasked=len(items) - asked)


def _is_about_the_server(failure: EvaluationError) -> bool:
    """Whether other items would fail as well; a picture that cannot be opened, or is too large, concerns its own."""
    return isinstance(failure, EndpointError) and failure.status not in REFUSED
