"""EXIF orientation: annotations are about the image as displayed, or about the file's pixels if they say so."""

import json

import numpy as np
import pytest
from PIL import Image

from data_builders.images import EXIF_ORIENTATION, measure, to_rgb
from data_builders.readers import READERS
from data_builders.records import ImageRecord, Problem
from data_builders.sources import Source

STORED = (60, 40)
MARK = (6, 4, 18, 12)  # left, top, right, bottom of a white mark, in pixels as stored
SIDEWAYS = (5, 6, 7, 8)


def write_photo(path, orientation):
    pixels = np.zeros((STORED[1], STORED[0]), np.uint8)
    left, top, right, bottom = MARK
    pixels[top:bottom, left:right] = 255
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    Image.fromarray(pixels).save(path, exif=exif, quality=100)


def displayed_mark(path):
    """Where the mark is seen, in fractions: by Pillow, which turns the pixels."""
    pixels = np.asarray(to_rgb(Image.open(path)))[..., 0] > 127
    rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
    height, width = pixels.shape
    return columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height


def read(root, document, reader="coco"):
    (root / "a.json").write_text(json.dumps(document))
    source = Source(name="s", reader=reader, root=root, classes={"decay": "caries"}, modality="intraoral_photo")
    items = list(READERS[reader](source))
    (record,) = [i for i in items if isinstance(i, ImageRecord)]
    return record, [i for i in items if isinstance(i, Problem)]


def coco(size, **annotation):
    left, top, right, bottom = MARK
    shape = annotation or {"bbox": [left, top, right - left, bottom - top]}
    return {
        "images": [{"id": 1, "file_name": "a.jpg", "width": size[0], "height": size[1]}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, **shape}],
        "categories": [{"id": 1, "name": "decay"}],
    }


def mask():
    left, top, right, bottom = MARK
    pixels = np.zeros((STORED[1], STORED[0]), np.uint8)
    pixels[top:bottom, left:right] = 1
    changes = np.flatnonzero(np.diff(pixels.flatten(order="F"), prepend=0)).tolist()
    return {"size": [STORED[1], STORED[0]], "counts": np.diff([0, *changes, pixels.size]).tolist()}


LEFT, TOP, RIGHT, BOTTOM = MARK
SHAPES = {
    "box": {},
    "polygon": {"segmentation": [[LEFT, TOP, RIGHT, TOP, RIGHT, BOTTOM, LEFT, BOTTOM]]},
    "mask": {"segmentation": mask()},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("orientation", SIDEWAYS)
def test_shapes_of_pixels_as_stored_are_turned_with_them(tmp_path, orientation, shape):
    write_photo(tmp_path / "a.jpg", orientation)

    record, problems = read(tmp_path, coco(STORED, **SHAPES[shape]))

    (finding,) = record.findings
    assert finding.bounds == pytest.approx(displayed_mark(tmp_path / "a.jpg"), abs=1e-9)
    assert (record.width, record.height) == measure(tmp_path / "a.jpg")[:2] == (40, 60)
    assert [(problem.code, problem.severity, problem.line) for problem in problems] == [
        ("turned_with_exif", "info", "/images/0")
    ]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_shapes_of_the_image_as_displayed_stay_where_they_are(tmp_path, orientation):
    write_photo(tmp_path / "a.jpg", orientation)
    left, top, right, bottom = displayed_mark(tmp_path / "a.jpg")
    width, height = STORED[::-1] if orientation in SIDEWAYS else STORED
    box = [left * width, top * height, (right - left) * width, (bottom - top) * height]

    record, problems = read(tmp_path, coco((width, height), bbox=box))

    assert record.findings[0].bounds == pytest.approx((left, top, right, bottom))
    assert problems == []


@pytest.mark.parametrize("orientation", range(1, 9))
def test_via_draws_on_the_image_as_displayed(tmp_path, orientation):
    write_photo(tmp_path / "a.jpg", orientation)
    left, top, right, bottom = displayed_mark(tmp_path / "a.jpg")
    width, height = STORED[::-1] if orientation in SIDEWAYS else STORED
    shape = {"name": "rect", "x": left * width, "y": top * height}
    shape |= {"width": (right - left) * width, "height": (bottom - top) * height}
    region = {"shape_attributes": shape, "region_attributes": {"name": "decay"}}

    record, problems = read(tmp_path, {"a": {"filename": "a.jpg", "size": 1, "regions": [region]}}, "via")

    assert record.findings[0].bounds == pytest.approx((left, top, right, bottom))
    assert problems == []


def test_a_negative_size_is_refused_in_a_turned_image_too(tmp_path):
    write_photo(tmp_path / "a.jpg", 6)

    record, problems = read(tmp_path, coco(STORED, bbox=[20, 10, -5, 5]))

    assert record.findings == ()
    assert [problem.code for problem in problems] == ["turned_with_exif", "negative_size"]


def test_exchanged_sides_without_exif_remain_a_contradiction(tmp_path):
    write_photo(tmp_path / "a.jpg", 1)

    record, problems = read(tmp_path, coco(STORED[::-1]))

    assert (record.findings, [problem.code for problem in problems]) == ((), ["size_mismatch"])
