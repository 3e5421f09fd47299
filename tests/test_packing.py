"""Which rows share a picture in one sequence, what they look like in it, and in what order they come."""

import random
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dentalgemma.training.batches import pad_lines, split_rows
from dentalgemma.training.packing import IGNORED, Example, ImageGroups, pack

IMAGE = 9
BEGIN = [2, IMAGE, IMAGE, 3]  # as a prompt about a picture begins: <bos>, two image tokens, a newline


def example(question, answer, *, begin=BEGIN, pictures=("a",)):
    return Example([*begin, *question, *answer], answer_start=len(begin) + len(question), pictures=pictures)


def test_three_questions_share_the_picture_and_what_they_begin_with_alike():
    rows = [example([4, 5], [6]), example([4, 7], [6, 6]), example([4, 8, 8], [1])]

    (packed,) = pack(rows, image_token_id=IMAGE)

    assert packed.ids == [*BEGIN, 4, *[5, 6], *[7, 6, 6], *[8, 8, 1]]
    assert packed.segment_ids == [0] * 5 + [1] * 2 + [2] * 3 + [3] * 3
    assert packed.position_ids == [0, 1, 2, 3, 4, 5, 6, 5, 6, 7, 5, 6, 7]
    assert packed.labels == [IGNORED] * 5 + [IGNORED, 6] + [IGNORED, 6, 6] + [IGNORED, IGNORED, 1]
    assert packed.rows == (0, 1, 2) and packed.pictures == ("a",)


def test_the_same_question_twice_keeps_its_last_prompt_token_to_itself():
    (packed,) = pack([example([4, 5], [6]), example([4, 5], [7])], image_token_id=IMAGE)

    assert packed.ids == [*BEGIN, 4, *[5, 6], *[5, 7]]
    assert packed.labels[5:] == [IGNORED, 6, IGNORED, 7]


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(example([5], [6], pictures=("b",)), id="another picture"),
        pytest.param(example([5], [6], pictures=("a", "b")), id="a picture more"),
        pytest.param(example([5], [6], begin=[2, 7, IMAGE, IMAGE, 3]), id="words before the picture"),
        pytest.param(example([5], [6], begin=[2, IMAGE, IMAGE, IMAGE, 3]), id="a crop more"),
        pytest.param(example([5], [6], begin=[2, 3], pictures=()), id="no picture"),
        pytest.param(Example([2, IMAGE, IMAGE, 6], 3, ("a",)), id="no prompt token after the picture"),
    ],
)
def test_what_cannot_share_stays_alone(other):
    rows = [example([4], [6]), other, example([7], [6])]

    packed = pack(rows, image_token_id=IMAGE)

    assert [sequence.rows for sequence in packed] == [(0, 2), (1,)]
    alone = packed[1]
    assert (alone.ids, alone.position_ids) == (other.ids, list(range(len(other.ids))))
    assert alone.segment_ids == [0] * len(other.ids)
    assert alone.labels == [IGNORED] * other.answer_start + other.ids[other.answer_start :]


def test_texts_without_pictures_never_share_though_they_begin_alike():
    rows = [example([4, 5], [number], begin=[2, 3], pictures=()) for number in (6, 7)]

    assert [sequence.rows for sequence in pack(rows, image_token_id=IMAGE)] == [(0,), (1,)]


@pytest.mark.parametrize(("questions", "sizes"), [(None, [5]), (3, [3, 2]), (2, [2, 2, 1]), (1, [1] * 5)])
def test_a_sequence_holds_at_most_so_many_questions(questions, sizes):
    packed = pack([example([number], [6]) for number in range(5)], image_token_id=IMAGE, questions=questions)

    assert [len(sequence.rows) for sequence in packed] == sizes


tokens = st.lists(st.integers(3, 5), max_size=4)
examples = st.builds(
    lambda question, end, answer, pictures: example([*question, end], [6, *answer], pictures=tuple(pictures)),
    *(tokens, st.integers(3, 5), tokens, st.sampled_from(["a", "b", "ab"])),
)


@given(st.lists(examples, min_size=1, max_size=6), st.sampled_from([None, 1, 2, 3]))
def test_every_row_comes_back_as_it_was(rows, questions):
    packed = pack(rows, image_token_id=IMAGE, questions=questions)

    order = [row for sequence in packed for row in sequence.rows]
    assert sorted(order) == list(range(len(rows)))
    for number, (ids, labels) in zip(order, split_rows(pad_lines(packed, 0)), strict=True):
        row = rows[number]
        assert ids == row.ids
        assert labels[: len(ids)] == [IGNORED] * row.answer_start + row.ids[row.answer_start :]
    for sequence in packed:
        # The token before a question's first belongs to another: it must not be asked to predict it.
        starts = [
            place for place, segment in enumerate(sequence.segment_ids) if segment not in sequence.segment_ids[:place]
        ]
        assert all(sequence.labels[place] == IGNORED for place in starts)


def groups_of(*sizes):
    return [(f"picture {number}",) for number, size in enumerate(sizes) for _ in range(size)]


def draw(groups, *, batch_size, questions, seed=0, epoch=0):
    return list(ImageGroups(batch_size, groups, questions=questions, seed=seed, epoch=lambda: epoch))


def batches_of(order, batch_size):
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def test_every_row_comes_once_in_each_epoch_and_in_another_order_in_the_next():
    groups = [*groups_of(5, 1, 3, 8, 2, 2), None, (), ()]
    random.Random(1).shuffle(groups)

    first, again, second, other = (
        draw(groups, batch_size=4, questions=3, epoch=epoch, seed=seed)
        for epoch, seed in [(0, 0), (0, 0), (1, 0), (0, 9)]
    )

    assert sorted(first) == sorted(second) == list(range(len(groups)))
    assert first == again and first != second and first != other


def test_questions_of_a_picture_lie_in_one_batch_in_groups_of_the_size_asked_for():
    groups = groups_of(*[6] * 20)

    for batch in batches_of(draw(groups, batch_size=6, questions=3), 6):
        assert all(size in (3, 6) for size in Counter(groups[row] for row in batch).values())


def sequences_in(order, groups, *, batch_size, questions):
    """Into how many sequences the collator packs the batches."""
    counts = (Counter(groups[row] for row in batch) for batch in batches_of(order, batch_size))
    return sum(-(-count // questions) for own in counts for count in own.values())


@pytest.mark.parametrize(
    ("sizes", "batch_size", "questions", "at_most"),
    [
        pytest.param([3] * 400 + [1] * 400, 4, 3, 1.02 * 800, id="a group and a single row fill a batch"),
        pytest.param([12] * 100, 6, 3, 400, id="two groups fill a batch"),
        pytest.param([12] * 100, 4, 3, 2 * 300, id="any batch of four needs two sequences"),
        pytest.param([*range(1, 13)] * 20, 16, 4, 1.01 * 20 * 24, id="groups of all sizes"),
    ],
)
def test_a_group_is_torn_only_where_no_other_fits(sizes, batch_size, questions, at_most):
    groups = groups_of(*sizes)

    order = draw(groups, batch_size=batch_size, questions=questions)

    assert sequences_in(order, groups, batch_size=batch_size, questions=questions) <= at_most
    # The control: rows in random order share next to nothing.
    random.Random(0).shuffle(order)
    assert sequences_in(order, groups, batch_size=batch_size, questions=questions) > 1.4 * at_most


def test_small_groups_that_fill_gaps_are_not_used_up_early():
    groups = groups_of(*[3] * 200, *[1] * 100)

    order = draw(groups, batch_size=4, questions=3)
    places = [place for place, row in enumerate(order) if row >= 600]
    assert sum(places) / len(places) == pytest.approx(350, abs=60)


def test_rows_without_pictures_are_no_group_of_one_another():
    order = draw([()] * 30 + [None] * 30, batch_size=4, questions=4)

    assert order != sorted(order) and sorted(order) == list(range(60))
    assert len(ImageGroups(4, [()] * 30, questions=4, seed=0, epoch=lambda: 0)) == 30


@pytest.mark.slow
def test_a_million_rows_are_ordered_within_ten_seconds_of_work():
    groups = [(f"{number // 3:064x}",) for number in range(1_000_000)]
    random.Random(0).shuffle(groups)
    started = time.process_time()

    assert len(draw(groups, batch_size=8, questions=3)) == 1_000_000
    assert time.process_time() - started < 10


def test_packing_costs_little_beside_tokenising():
    rows = [
        Example([2, *[IMAGE] * 256, *[random.randrange(3, 8) for _ in range(300)]], 400, (str(number // 3),))
        for number in range(900)
    ]
    started = time.process_time()

    assert len(pack(rows, image_token_id=IMAGE)) == 300
    assert time.process_time() - started < 2  # a tenth of it here
