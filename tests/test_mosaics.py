"""Mosaics are found from their pixels: by their seams, or by quarters that show other pictures."""

import io
import random

import pytest
from PIL import Image

from data_builders.alike import compare, look_at
from data_builders.mosaics import find_crossing
from data_builders.phantom import make_phantoms

CROWD = [phantom.image for phantom in make_phantoms(80, seed=31)]
# By eye, of the 24 augmented panoramics that are present.
REAL_MOSAICS = {
    "108_jpg.rf.2bff6770541bc92ad93920663e81991e.jpg",
    "108_jpg.rf.4d94c645d27a36a6176ff69e81db4eeb.jpg",
    "168_jpg.rf.850210b413447722ed3e1224ba14e6fd.jpg",
    "168_jpg.rf.850210b413447722ed3e1224ba14e6fd-TVXP22.jpg",
    "168_jpg.rf.eb2f654fefc378aebe937d0b0b4c04d3.jpg",
    "168_jpg.rf.eb2f654fefc378aebe937d0b0b4c04d3-9scXOK.jpg",
    "36_jpg.rf.2f47d6741f91d975b9f038087fb29fac.jpg",
    "36_jpg.rf.c7b90aaeadf7232f681013e29af7a8eb.jpg",
}


def put_together(images, rng, *, pieces):
    """A mosaic of four images that meet anywhere in the middle; of `pieces` of them, or of each the whole."""
    width, height = images[0].size
    x, y = round(width * rng.uniform(0.3, 0.7)), round(height * rng.uniform(0.3, 0.7))
    mosaic = Image.new(images[0].mode, (width, height))
    for image, box in zip(
        images, ((0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)), strict=True
    ):
        side = rng.uniform(0.4, 0.6) if pieces else 1.0
        left, top = rng.uniform(0, 1 - side) * image.width, rng.uniform(0.2, 0.3) * image.height if pieces else 0
        seen = (left, top, left + side * image.width, min(top + side * image.height, image.height))
        mosaic.paste(image.resize((box[2] - box[0], box[3] - box[1]), box=seen), box[:2])
    return mosaic, (x / width, y / height)


def compress(image):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=75)
    return Image.open(buffer)


def test_of_98_real_pictures_exactly_the_mosaics_are_found(third_party):
    found = {path.name for path in third_party.rglob("*.jpg") if find_crossing(Image.open(path)).clear >= 1}

    assert found == REAL_MOSAICS


def test_no_phantom_is_taken_for_a_mosaic():
    looks = {f"{place:03}": look_at(image) for place, image in enumerate(CROWD)}

    assert not compare(looks).mosaics


def test_mosaics_of_pieces_are_found_by_their_seams():
    rng = random.Random(0)
    made = [put_together(rng.sample(CROWD, 4), rng, pieces=True) for _ in range(40)]
    found = [(find_crossing(compress(mosaic)), where) for mosaic, where in made]
    clear = [(crossing, where) for crossing, where in found if crossing.clear >= 1]

    assert len(clear) >= 30
    assert all((c.x, c.y) == pytest.approx(where, abs=0.01) for c, where in clear)


def test_mosaics_of_whole_pictures_name_the_pictures_they_show(third_party):
    """Real panoramics, since phantoms are dark at the edges, where their mosaics meet."""
    folder = third_party / "opg_pathology_yolo" / "Dental OPG XRAY Dataset" / "Original_Data"
    originals = [Image.open(path).convert("L").resize((900, 450)) for path in sorted(folder.glob("*.jpg"))]
    looks = {f"original {place:02}": look_at(image) for place, image in enumerate(originals)}
    rng, truth = random.Random(1), {}
    for number in range(20):
        chosen = rng.sample(range(len(originals)), 4)
        name = f"mosaic {number:02}"
        truth[name] = {f"original {place:02}" for place in chosen}
        looks[name] = look_at(compress(put_together([originals[place] for place in chosen], rng, pieces=False)[0]))
    comparison = compare(looks)
    shown = {name: {pair.second for pair in comparison.alike if pair.first == name} for name in truth}

    assert set(comparison.mosaics) <= set(truth)
    assert len(comparison.mosaics) >= 17
    assert all(shown[name] <= truth[name] for name in truth)
    assert sum(map(len, shown.values())) >= 0.8 * 80


@pytest.mark.parametrize("size", [(1, 1), (47, 300), (60, 60)])
def test_small_pictures_have_no_seams_and_do_no_harm(size):
    assert find_crossing(Image.new("RGB", size)).clear == 0
