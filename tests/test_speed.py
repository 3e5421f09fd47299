"""What makes reading fast must not change what is read; and it must stay fast."""

import gc
import json
import math
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_builders.images import walk
from data_builders.readers.batches import BATCH, read_in_batches
from data_builders.readers.geometry import BadAnnotation, fit, survey_outlines

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "read_annotations.py"


def test_reading_keeps_within_a_multiple_of_the_floor(tmp_path):
    """A coarse bound on a small set, to catch what has become many times slower; the benchmark has the real limits."""
    out = tmp_path / "figures.json"
    size = [
        "--images",
        "1000",
        "--objects",
        "6000",
        "--repeat",
        "1",
        "--no-peers",
        "--limit",
        "20",
        "--memory-limit",
        "4",
    ]
    done = subprocess.run([sys.executable, BENCHMARK, *size, "--out", out, "--check"], capture_output=True, text=True)
    figures = json.loads(out.read_text())["results"]["figures"]

    assert done.returncode == 0, done.stdout + done.stderr
    layouts = {name for name in figures if "ours" in figures[name]}
    assert len(layouts) == 8
    assert all(figures[name]["ours"]["count"] == figures[name]["floor"]["count"] == 6000 for name in layouts)


coordinate = st.floats(-0.2, 1.2) | st.sampled_from([0.0, 0.5, 1.0])
outline = st.lists(st.tuples(coordinate, coordinate), min_size=1, max_size=9).map(tuple)
star = st.lists(st.floats(0.05, 0.4), min_size=5, max_size=12).map(
    lambda radii: tuple(
        (0.5 + r * math.cos(2 * math.pi * n / len(radii)), 0.5 + r * math.sin(2 * math.pi * n / len(radii)))
        for n, r in enumerate(radii)
    )
)


@settings(deadline=None, max_examples=300)
@given(
    rings=st.lists(outline | star, min_size=1, max_size=3),
    shape=st.sampled_from(["polygon", "oriented_box"]),
    size=st.sampled_from([(1, 1), (640, 480), None]),
    is_closed=st.booleans(),
)
def test_outlines_surveyed_together_fit_as_each_by_itself(rings, shape, size, is_closed):
    width, height = size or (1, 1)
    rings = [
        tuple((x * width, y * height) for x, y in ring)
        + (((ring[0][0] * width, ring[0][1] * height),) if is_closed else ())
        for ring in rings
    ]

    def try_fit(**keys):
        try:
            return fit(shape, rings, size, **keys)
        except BadAnnotation as error:
            return error.code, str(error)

    assert try_fit(bounds=survey_outlines(rings)) == try_fit()


def test_a_survey_tells_outlines_with_an_area_from_others():
    square, bow_tie, line = ((0, 0), (1, 0), (1, 1), (0, 2)), ((0, 0), (1, 1), (1, 0), (0, 1)), ((0, 0),) * 5

    assert survey_outlines([square, bow_tie, line, ((0, 0),), ()]) == [(0, 0, 1, 2), None, None, None, None]


def test_files_are_walked_in_the_order_of_their_paths_and_links_to_folders_are_not_followed(tmp_path):
    for name in ("b/z.jpg", "b/a/k.txt", "b.jpg", "a.png", ".hidden/x.jpg", "b-1/x.jpg", "B/x.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "c").symlink_to(tmp_path / "b")
    (tmp_path / "d.jpg").symlink_to(tmp_path / "b.jpg")
    (tmp_path / "e.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "f.jpg").symlink_to(tmp_path / "f.jpg")

    found = [folder / entry.name for folder, entry in walk(tmp_path)]
    assert found == [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    assert list(walk(tmp_path / "nowhere")) == list(walk(tmp_path / "b.jpg")) == []


@pytest.mark.parametrize("was_enabled", [True, False])
def test_the_garbage_collector_is_paused_between_items_and_left_as_it_was(was_enabled):
    inside = []

    @read_in_batches
    def read(source):
        for number in range(2 * BATCH + 5):
            inside.append(gc.isenabled())
            yield number

    (gc.enable if was_enabled else gc.disable)()
    try:
        items = read(None)
        first = list(islice(items, 3))
        assert gc.isenabled() is was_enabled
        assert [*first, *items] == list(range(2 * BATCH + 5))
        assert gc.isenabled() is was_enabled
    finally:
        gc.enable()
    assert not any(inside)


def test_a_reader_that_fails_leaves_the_garbage_collector_on():
    @read_in_batches
    def read(source):
        yield 1
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        list(read(None))
    assert gc.isenabled()
