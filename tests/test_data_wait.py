"""Time that training waits for its data, on a clock that the test turns."""

import pytest

from dentalgemma.training.data_wait import LOOKED_AT, DataWait


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def train(wait, clock, *, steps, waits, computes):
    """As the loop of a trainer: the next batch, then work on it; the warnings that came."""

    def batches():
        for number in range(steps):
            clock.now += waits
            yield number

    iterator, seen, warnings = batches(), [], []
    for _ in range(steps):
        seen.append(next(wait.watch(iterator)))  # each step wraps the same iterator anew
        clock.now += computes
        warnings.append(wait.end_step())
    assert seen == list(range(steps))
    return [warning for warning in warnings if warning]


@pytest.fixture
def clock():
    return Clock()


def test_the_share_is_that_of_the_time_since_the_last_entry(clock):
    wait = DataWait(2, clock=clock)
    train(wait, clock, steps=10, waits=1, computes=3)
    first = wait.take_share()
    train(wait, clock, steps=10, waits=1, computes=1)

    assert (first, wait.take_share()) == (0.25, 0.5)
    assert wait.take_share() == 0  # nothing waited for since
    assert wait.share() == pytest.approx(20 / 60, abs=1e-4)


def test_a_long_wait_is_warned_of_once_and_the_remedy_is_named(clock):
    live = train(DataWait(2, clock=clock), clock, steps=3 * LOOKED_AT, waits=1, computes=3)
    cached = train(DataWait(8, cached=True, clock=clock), clock, steps=LOOKED_AT, waits=1, computes=3)

    assert live == [
        "training waits for its data 25% of the time: try cached features (--vision_features cached), or "
        "--dataloader_num_workers 4"
    ]
    assert cached == ["training waits for its data 25% of the time: try --dataloader_num_workers 16"]


def test_a_short_wait_and_the_first_steps_are_not(clock):
    assert train(DataWait(2, clock=clock), clock, steps=2 * LOOKED_AT, waits=1, computes=20) == []
    assert train(DataWait(2, clock=clock), clock, steps=LOOKED_AT - 1, waits=1, computes=1) == []


def test_the_end_of_an_epoch_ends_the_watched_iterator_too(clock):
    assert list(DataWait(0, clock=clock).watch(iter([1, 2]))) == [1, 2]
