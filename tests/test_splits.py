"""Groups and splits: nothing that belongs together is ever torn apart."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_builders.records import ImageRecord
from data_builders.sources import Group, Shares, Source
from data_builders.splits import group_records, original_stem, split_groups

SHARES = Shares()


def record(name, *, source="s", pixels=None):
    return ImageRecord(Path(name), pixels or f"id {name}", 10, 10, "panoramic", source, None, None, (), ())


def source(name="s", pattern=None):
    group = Group(pattern=pattern) if pattern else None
    return Source(name=name, reader="yolo", root=Path(), classes={0: "caries"}, modality="panoramic", group=group)


@pytest.mark.parametrize(
    ("stem", "original"),
    [
        ("101_jpg.rf.05501644f89b63b3f9ba38f2c2436c75", "101_jpg"),
        ("168_jpg.rf.850210b413447722ed3e1224ba14e6fd-TVXP22", "168_jpg"),
        ("IMG-20161128-WA0026", None),
        ("performance.rf", None),
    ],
)
def test_roboflow_names_give_their_original_away(stem, original):
    assert original_stem(stem) == original


def test_augmented_copies_of_one_original_are_one_group():
    names = [f"168_jpg.rf.{letter * 32}.jpg" for letter in "abc"]
    groups = group_records([*map(record, names), record("169_jpg.rf." + "d" * 32 + ".jpg")], {"s": source()})

    assert len(set(groups[:3])) == 1
    assert groups[3] != groups[0]


def test_identical_pixels_are_one_group_over_all_sources():
    groups = group_records(
        [record("a.jpg", pixels="same"), record("b.jpg", source="t", pixels="same"), record("c.jpg")],
        {"s": source(), "t": source("t")},
    )

    assert groups[0] == groups[1] != groups[2]


def test_copies_and_mosaics_are_one_group_with_what_they_show():
    records = [record("a.jpg", pixels="a"), record("b.jpg", source="t", pixels="b"), record("c.jpg", pixels="c")]
    sources = {"s": source(), "t": source("t")}

    assert len(set(group_records(records, sources))) == 3
    groups = group_records(records, sources, [("b", "a"), ("not built", "c")])
    assert groups[0] == groups[1] != groups[2]
    assert len(set(group_records(records, sources, [("a", "not built"), ("not built", "c")]))) == 2


def test_patients_are_told_by_the_sources_own_pattern():
    groups = group_records(
        [record("p1_left.jpg"), record("p1_right.jpg"), record("p2_left.jpg")],
        {"s": source(pattern="^(?P<patient>[^_]+)_")},
    )

    assert groups[0] == groups[1] != groups[2]


def test_group_names_do_not_depend_on_the_order_of_files():
    records = [record("a.jpg", pixels="x"), record("b.jpg", pixels="x"), record("c.jpg")]
    sources = {"s": source()}

    assert group_records(records, sources) == group_records(records[::-1], sources)[::-1]


@given(st.lists(st.integers(0, 15), min_size=3, max_size=120), st.integers(0, 5))
def test_every_split_gets_a_group_and_shares_hold(numbers, seed):
    group_ids = [f"g{number}" for number in numbers]
    splits = split_groups(group_ids, ["s"] * len(group_ids), shares=SHARES, seed=seed)
    largest = max(group_ids.count(group_id) for group_id in group_ids)

    assert set(splits) == set(group_ids)
    if len(splits) >= 3:
        assert set(splits.values()) == {"train", "validation", "test"}
    if len(splits) >= 10:
        train = sum(splits[group_id] == "train" for group_id in group_ids)
        assert abs(train - 0.8 * len(group_ids)) <= largest + 2


def test_a_new_group_moves_only_what_lies_at_a_cut():
    before = [f"g{number}" for number in range(200)]
    after = [*before, "new"]
    old = split_groups(before, ["s"] * 200, shares=SHARES, seed=1)
    new = split_groups(after, ["s"] * 201, shares=SHARES, seed=1)

    assert sum(old[group_id] != new[group_id] for group_id in before) <= 2


def test_each_source_has_its_own_shares():
    group_ids = [f"{name}{number}" for name in "ab" for number in range(50)]
    splits = split_groups(group_ids, [group_id[0] for group_id in group_ids], shares=SHARES, seed=0)

    for name in "ab":
        own = [splits[group_id] for group_id in group_ids if group_id[0] == name]
        assert (own.count("train"), own.count("validation"), own.count("test")) == (40, 5, 5)
