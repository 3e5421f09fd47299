"""COCO's run-length masks: outlines that cover the pixels of the mask, all of them and no other."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageDraw

from data_builders.readers import read_coco
from data_builders.readers.geometry import BadAnnotation
from data_builders.readers.masks import decode_counts, trace_mask
from data_builders.records import ImageRecord
from data_builders.sources import Source

SQUARE = {"size": [5, 6], "counts": [11, 3, 2, 3, 11]}  # rows 1 to 3 of columns 2 and 3


def draw(rings, height, width):
    """The pixels whose middle lies in a ring: what another program would make of the outlines."""
    image = Image.new("1", (width * 4, height * 4))
    for ring in rings:
        ImageDraw.Draw(image).polygon([(x * 4 - 0.5, y * 4 - 0.5) for x, y in ring], fill=1)
    return np.asarray(image)[2::4, 2::4]


def read(root, segmentation, **image):
    document = {
        "images": [{"id": 1, "file_name": "a.png", "width": 6, "height": 5, **image}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "segmentation": segmentation}],
        "categories": [{"id": 1, "name": "caries"}],
    }
    Image.new("L", (6, 5)).save(root / "a.png")
    (root / "a.json").write_text(json.dumps(document))
    source = Source(name="s", reader="coco", root=root, classes={"caries": "caries"}, modality="panoramic")
    record, *problems = sorted(read_coco(source), key=lambda item: not isinstance(item, ImageRecord))
    return record, problems


@pytest.mark.parametrize("counts", [SQUARE["counts"], ";3209"], ids=["list", "text"])
def test_a_mask_becomes_its_outline(tmp_path, counts):
    record, problems = read(tmp_path, {**SQUARE, "counts": counts})

    (finding,) = record.findings
    assert (finding.shape, problems) == ("polygon", [])
    assert finding.bounds == pytest.approx((2 / 6, 1 / 5, 4 / 6, 4 / 5))
    assert len(finding.parts[0]) == 4


@settings(derandomize=True, deadline=None, max_examples=150)
@given(arrays(np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.integers(0, 1)))
def test_outlines_have_the_box_and_the_pixels_of_the_mask(mask):
    encoded = pytest.importorskip("pycocotools.mask")
    packed = encoded.encode(np.asfortranarray(mask))
    text = packed["counts"].decode()
    if not mask.any():
        with pytest.raises(BadAnnotation, match="empty"):
            trace_mask({"size": list(mask.shape), "counts": text})
        return
    rings, holes = trace_mask({"size": list(mask.shape), "counts": text})
    left, top, width, height = encoded.toBbox(packed)
    xs, ys = [x for ring in rings for x, _ in ring], [y for ring in rings for _, y in ring]
    drawn = draw(rings, *mask.shape)

    assert (min(xs), min(ys), max(xs), max(ys)) == (left, top, left + width, top + height)
    assert drawn[mask == 1].all()
    assert holes or (drawn == mask).all()


@settings(derandomize=True, deadline=None, max_examples=100)
@given(arrays(np.uint8, st.tuples(st.integers(1, 60), st.integers(1, 60)), elements=st.integers(0, 1)))
def test_compressed_counts_are_those_of_pycocotools(mask):
    encoded = pytest.importorskip("pycocotools.mask").encode(np.asfortranarray(mask))
    flat = mask.flatten(order="F")
    changes = np.flatnonzero(np.diff(flat, prepend=0)).tolist()
    runs = np.diff([0, *changes, flat.size]).tolist()

    assert decode_counts(encoded["counts"].decode()) == runs


def test_two_pieces_are_two_parts_of_one_finding(tmp_path):
    record, _ = read(tmp_path, {"size": [5, 6], "counts": [0, 2, 20, 2, 6]})

    (finding,) = record.findings
    assert len(finding.parts) == 2


def test_holes_are_filled_and_counted(tmp_path):
    record, problems = read(tmp_path, {"size": [5, 6], "counts": [0, 12, 1, 17]})

    assert record.findings[0].bounds == (0, 0, 1, 1)
    assert [(problem.code, problem.severity) for problem in problems] == [("mask_holes_filled", "info")]


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        pytest.param({**SQUARE, "counts": [11, 3]}, "do not add up", id="too few"),
        pytest.param({**SQUARE, "counts": [11, -3, 22]}, "neither whole numbers", id="negative"),
        pytest.param({**SQUARE, "counts": [11, 2.5, 16.5]}, "neither whole numbers", id="fractions"),
        pytest.param({**SQUARE, "counts": None}, "neither whole numbers", id="no counts"),
        pytest.param({**SQUARE, "counts": "é"}, "no part of a mask", id="not COCO's text"),
        pytest.param({**SQUARE, "counts": "o" * 50}, "no part of a mask", id="a number without end"),
        pytest.param({**SQUARE, "counts": "o"}, "in the middle of a number", id="cut short"),
        pytest.param({**SQUARE, "counts": [30]}, "empty", id="empty"),
        pytest.param({"counts": [30]}, "needs `size", id="no size"),
        pytest.param({"counts": [0, 10**12], "size": [10**6, 10**6]}, "needs `size", id="bomb"),
        pytest.param({"counts": [0, 30], "size": [6, 5]}, "5 x 6 pixels, the image of 6 x 5", id="of another image"),
    ],
)
def test_a_false_mask_is_a_problem_of_its_annotation(tmp_path, segmentation, message):
    record, problems = read(tmp_path, segmentation)

    assert record.findings == ()
    assert [(problem.line, problem.severity) for problem in problems] == [("/annotations/0", "error")]
    assert message in problems[0].message


def test_noise_is_refused_before_it_costs_minutes():
    with pytest.raises(BadAnnotation, match="45,150 pieces, which is noise and no finding"):
        trace_mask({"size": [301, 300], "counts": [1] * 90_300})
