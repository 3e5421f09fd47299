"""Shapes that are as nearly all are take a shorter way through the readers; it must lead to the same records."""

import dataclasses
import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_builders.readers import READERS
from data_builders.readers.files import FEW_IMAGES, ImageFinder, ImagePath
from data_builders.readers.geometry import BadAnnotation, box_ring, fit, fit_boxes, fit_outlines
from data_builders.records import Finding, make_finding
from data_builders.sources import Source

WIDTH, HEIGHT = 640, 480
number = st.floats(-0.2, 1.2) | st.sampled_from([0.0, 0.5, 1.0, math.nan, math.inf])
crooked = st.lists(st.tuples(number, number), min_size=4, max_size=9)
star = st.lists(st.floats(0.05, 0.4), min_size=4, max_size=12).map(
    lambda radii: [
        (0.5 + r * math.cos(2 * math.pi * n / len(radii)), 0.5 + r * math.sin(2 * math.pi * n / len(radii)))
        for n, r in enumerate(radii)
    ]
)


def try_fit(shape, ring, size):
    """What `fit` makes of a shape that it finds nothing to say about."""
    try:
        _, parts, notes = fit(shape, [ring], size)
    except (BadAnnotation, ValueError):
        return None
    return parts[0] if not notes and len(parts) == 1 else None


@settings(deadline=None, max_examples=300)
@given(
    outlines=st.lists(crooked | star, min_size=1, max_size=4),
    is_closed=st.booleans(),
    size=st.sampled_from([None, (WIDTH, HEIGHT)]),
)
def test_outlines_fitted_together_are_as_fitted_one_by_one_or_left_over(outlines, is_closed, size):
    width, height = size or (1, 1)
    rings = [tuple((x * width, y * height) for x, y in outline) for outline in outlines]
    rings = [ring + ring[:1] for ring in rings] if is_closed else rings
    values = [[value for point in ring for value in point] for ring in rings]
    together = fit_outlines(values, size and np.array([size] * len(values)))

    assert len(together) == len(rings)
    for ring, fitted in zip(rings, together, strict=True):
        assert fitted is None or fitted == try_fit("polygon", ring, (width, height))


def test_most_outlines_are_not_left_over():
    square, bow_tie, outside = [1, 1, 9, 1, 9, 9, 1, 9], [1, 1, 9, 9, 9, 1, 1, 9], [5, 5, 15, 5, 15, 9, 5, 9]
    closed, in_fractions = [*square, 1, 1], [0.1, 0.1, 0.9, 0.1, 0.9, 0.9, 0.1, 0.9]
    dart = [1, 1, 9, 1, 5, 4, 5, 9]
    rings = fit_outlines([square, bow_tie, outside, closed, in_fractions, dart], np.array([(10, 10)] * 6))

    corners = ((0.1, 0.1), (0.9, 0.1), (0.9, 0.9), (0.1, 0.9))
    assert rings == [corners, None, None, corners, None, ((0.1, 0.1), (0.9, 0.1), (0.5, 0.4), (0.5, 0.9))]
    assert fit_outlines([in_fractions]) == [corners]
    assert fit_outlines([]) == []


@settings(deadline=None, max_examples=300)
@given(boxes=st.lists(st.lists(number | st.integers(-2, 700), min_size=4, max_size=4), max_size=5))
def test_boxes_fitted_together_are_as_fitted_one_by_one_or_left_over(boxes):
    together = fit_boxes(boxes, np.array([(WIDTH, HEIGHT)] * len(boxes)))

    assert len(together) == len(boxes)
    for (left, top, width, height), fitted in zip(boxes, together, strict=True):
        ring = box_ring(left, top, left + width, top + height)
        assert fitted is None or fitted == try_fit("box", ring, (WIDTH, HEIGHT))


def test_most_boxes_are_not_left_over():
    plain, empty, outside, endless = [1, 2, 3, 4], [1, 2, 0, 4], [8, 2, 3, 4], [1, 2, 10**400, 4]

    assert fit_boxes([plain, empty, outside], np.array([(10, 10)] * 3)) == [
        ((0.1, 0.2), (0.4, 0.2), (0.4, 0.6), (0.1, 0.6)),
        None,
        None,
    ]
    assert fit_boxes([plain, endless], np.array([(10, 10)] * 2)) == [None, None]


PLAIN = ["0 0.5 0.5 0.2 0.1", "1.0 0.25 0.5 0.5 0.25"]
OUTLINES = ["0 0.1 0.1 0.3 0.1 0.3 0.4 0.1 0.4", "1 0.5 0.5 0.9 0.5 0.9 0.9 0.5 0.8"]


@pytest.mark.parametrize("lines", [pytest.param(PLAIN, id="boxes"), pytest.param(OUTLINES, id="oriented boxes")])
def test_a_line_with_an_error_does_not_change_how_the_others_are_read(tmp_path, lines):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for name, content in {"alone": lines, "beside": [*lines, "0 0.5 0.5"]}.items():
        Image.new("L", (WIDTH, HEIGHT)).save(tmp_path / "images" / f"{name}.png")
        (tmp_path / "labels" / f"{name}.txt").write_text("\n".join(content))
    classes = {0: "caries", 1: None}
    source = Source(name="s", reader="yolo", root=tmp_path, classes=classes, modality="panoramic")
    alone, problem, beside = READERS["yolo"](source)

    assert (problem.code, problem.line) == ("bad_label_line", 3)
    assert [(found.label, found.shape, found.parts) for found in alone.findings] == [
        (found.label, found.shape, found.parts) for found in beside.findings
    ]
    assert [found.finding_id for found in alone.findings] == ["labels/alone.txt#1"]
    assert alone.ignored == beside.ignored == ("1",)


def test_a_finding_made_fast_is_a_finding_like_any_other():
    fields = ("a.txt#1", "caries", "box", (((0.0, 0.0), (1.0, 1.0)),), None, {}, "human", None, "a.txt:1")
    made, constructed = make_finding(*fields), Finding(*fields)

    assert made == constructed
    assert type(made) is Finding
    assert pickle.loads(pickle.dumps(made)) == dataclasses.replace(made) == constructed
    assert made.bounds == (0.0, 0.0, 1.0, 1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.label = "infection"


def test_images_are_found_alike_whether_a_file_names_few_or_many(tmp_path):
    outside, root = tmp_path / "outside", tmp_path / "root"
    for folder in (outside, root / "images", root / "sub"):
        folder.mkdir(parents=True)
    for path in (outside / "x.png", root / "a.png", root / "images" / "a.png", root / "images" / "b.png"):
        path.write_bytes(b"")
    for link, target in {
        "leaves.png": outside / "x.png",
        "stays.png": root / "a.png",
        "images/a2.png": "a.png",
    }.items():
        (root / link).symlink_to(target)
    (root / "images" / "leaves.png").write_bytes(b"")
    (root / "xrays").symlink_to(outside)
    source = Source(name="s", reader="coco", root=root, classes={"a": "caries"}, modality="panoramic")
    names = ["a.png", "b.png", "./a.png", "images/b.png", "stays.png", "a2.png", "leaves.png", "x.png", "sub", "no.png"]

    def find(finder, name):
        try:
            return finder.find(name)
        except BadAnnotation as error:
            return error.code

    many = ImageFinder(source, root)
    for _ in range(FEW_IMAGES):
        many.find("a.png")
    found = {name: find(many, name) for name in names}

    assert found == {name: find(ImageFinder(source, root), name) for name in names}
    assert {name: file.text if isinstance(file, ImagePath) else file for name, file in found.items()} == {
        "a.png": f"{root}/a.png",
        "b.png": f"{root}/images/b.png",
        "./a.png": f"{root}/a.png",
        "images/b.png": f"{root}/images/b.png",
        "stays.png": f"{root}/stays.png",
        "a2.png": f"{root}/images/a2.png",
        "leaves.png": "unsafe_path",
        "x.png": "unsafe_path",
        "sub": f"{root}/sub",
        "no.png": f"{root}/no.png",
    }
