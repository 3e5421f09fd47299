"""Pictures that show the same in other pixels are found, and no two patients are ever merged."""

import io
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy import ndimage

from data_builders.image_copies import SIDE, find_copies, fit, make_thumbnail, perceptual_hash
from data_builders.phantom import make_phantoms
from data_builders.splits import original_stem

CROWD = [phantom.image for phantom in make_phantoms(60, seed=21)]
CHANGED = range(12)  # of the crowd, these have a changed copy


def compress(image, quality=30):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def crop(image, left, top, right, bottom):
    """Cut off these shares of the sides."""
    width, height = image.size
    return image.crop((int(left * width), int(top * height), int((1 - right) * width), int((1 - bottom) * height)))


def brighten(image):
    return ImageEnhance.Contrast(ImageEnhance.Brightness(image).enhance(1.3)).enhance(0.7)


def find(images):
    return {(match.first, match.second): match for match in find_copies([make_thumbnail(image) for image in images])}


@pytest.mark.parametrize(
    ("change", "at_least"),
    [
        pytest.param(compress, 12, id="JPEG of quality 30"),
        pytest.param(lambda image: image.resize((224, 112)), 12, id="half the size"),
        pytest.param(lambda image: image.resize((640, 640)), 12, id="stretched to a square"),
        pytest.param(brighten, 11, id="brighter, less contrast"),
        pytest.param(lambda image: ImageEnhance.Brightness(image).enhance(0.6), 12, id="darker"),
        pytest.param(lambda image: crop(image, 0.02, 0.02, 0.02, 0.02), 12, id="2 % cut off on all sides"),
        pytest.param(lambda image: crop(image, 0.04, 0.04, 0.04, 0.04), 12, id="4 % cut off on all sides"),
        pytest.param(lambda image: crop(image, 0.08, 0.0, 0.0, 0.08), 12, id="8 % cut off at a corner"),
        pytest.param(lambda image: image.rotate(2), 11, id="turned by 2 degrees"),
        pytest.param(lambda image: compress(crop(brighten(image), 0.0, 0.05, 0.05, 0.0)), 9, id="all at once"),
    ],
)
def test_a_changed_copy_is_found_in_a_crowd_and_nothing_else_is(change, at_least):
    found = find([*CROWD, *(change(CROWD[place]) for place in CHANGED)])
    truth = {(place, len(CROWD) + place) for place in CHANGED}

    assert set(found) <= truth
    assert len(set(found) & truth) >= at_least
    assert not any(match.flipped for match in found.values())


def test_a_mirrored_copy_is_found_and_called_so():
    mirrored = [CROWD[place].transpose(Image.Transpose.FLIP_LEFT_RIGHT) for place in CHANGED]
    found = find([*CROWD, *map(compress, mirrored)])

    assert set(found) == {(place, len(CROWD) + place) for place in CHANGED}
    assert all(match.flipped for match in found.values())


def test_copies_of_copies_hang_together():
    image = CROWD[0]
    versions = [image, *(compress(image, quality) for quality in (20, 30, 40, 50, 60)), image.rotate(1)]
    found = find([*versions, *CROWD[1:]])
    reached, before = {0}, set()
    while reached != before:
        before = set(reached)
        reached |= {place for pair in found if before & set(pair) for place in pair}

    assert reached == set(range(len(versions)))


def test_pictures_of_one_layout_stay_apart():
    """Two hundred phantoms differ by a few teeth and lesions; 64-bit hashes of many of them are equal."""
    assert find([phantom.image for phantom in make_phantoms(200, seed=5)]) == {}


def test_pictures_without_structure_are_no_copies():
    blank = [np.full((SIDE, SIDE), grey, np.uint8) for grey in (0, 0, 90, 255)]

    assert find_copies(blank) == []
    assert find_copies(blank[:1]) == []
    assert fit(blank[0], blank[2]) == 0


def test_the_hash_keeps_through_compression_and_tells_pictures_apart():
    hashes = perceptual_hash(np.stack([make_thumbnail(image) for image in CROWD]))
    again = perceptual_hash(np.stack([make_thumbnail(compress(image)) for image in CROWD]))
    differing = (hashes[:, None] != again[None]).mean(axis=2)

    assert hashes.shape == (60, 256)
    assert differing.diagonal().max() < 0.1
    assert (differing.argmin(axis=1) == np.arange(60)).all()


def test_of_98_real_pictures_exactly_the_copies_are_found(third_party):
    """Truth by eye: four originals have an augmented version that is whole; two radiographs are there three times.

    Further three files are there twice with the same pixels.
    """
    paths = sorted(path for path in third_party.rglob("*.jpg") if "Thumbs" not in path.name)
    names = [path.name for path in paths]
    found = {frozenset(short(names[place]) for place in pair) for pair in find([Image.open(path) for path in paths])}
    expected = {
        frozenset(pair)
        for pair in [
            ("104.jpg", "104_jpg.rf.0550"),
            ("105.jpg", "105_jpg.rf.fc10"),
            ("106.jpg", "106_jpg.rf.55f7"),
            ("36.jpg", "36_jpg.rf.150c"),
            ("168_jpg.rf.8502", "168_jpg.rf.8502-TVXP22"),
            ("168_jpg.rf.eb2f", "168_jpg.rf.eb2f-9scXOK"),
            ("168_jpg.rf.fc9c", "168_jpg.rf.fc9c-aGN4Ks"),
            ("cate2-00029_jpg.rf.12ba", "cate2-00029_jpg.rf.18be"),
            ("cate2-00029_jpg.rf.12ba", "cate2-00029_jpg.rf.3b29"),
            ("cate2-00029_jpg.rf.18be", "cate2-00029_jpg.rf.3b29"),
            ("cate2-00109_jpg.rf.3cc8", "cate2-00109_jpg.rf.4f7b"),
            ("cate2-00109_jpg.rf.3cc8", "cate2-00109_jpg.rf.988f"),
            ("cate2-00109_jpg.rf.4f7b", "cate2-00109_jpg.rf.988f"),
        ]
    }

    assert len(paths) == 98
    assert found == expected


def short(name):
    """`104_jpg.rf.0550`: a Roboflow name with four digits of its hash."""
    stem = original_stem(Path(name).stem)
    if stem is None:
        return name
    digest, _, suffix = Path(name).stem.removeprefix(f"{stem}.rf.").partition("-")
    return f"{stem}.rf.{digest[:4]}" + (f"-{suffix}" if suffix else "")


@pytest.mark.slow
def test_20_000_pictures_are_compared_in_minutes():
    """Clouds of random shape, 400 of which have a copy that is brighter, noisier and cut off at a corner."""
    rng = np.random.default_rng(0)
    clouds = ndimage.gaussian_filter(rng.normal(size=(20_000, 60, 60)).astype(np.float32), (0, 2, 2))
    pictures = [Image.fromarray(to_greys(cloud)).resize((300, 300)) for cloud in clouds]
    for place in range(400):
        grain = rng.normal(0, 4, (300, 300))
        changed = np.clip(np.asarray(pictures[place]) * 0.8 + 30 + grain, 0, 255).astype(np.uint8)
        pictures[-1 - place] = crop(Image.fromarray(changed), 0.03, 0.0, 0.0, 0.05)
    thumbnails = [make_thumbnail(picture) for picture in pictures]
    started = time.process_time()
    found = {(match.first, match.second) for match in find_copies(thumbnails)}

    assert found == {(place, 19_999 - place) for place in range(400)}
    assert time.process_time() - started < 300


def to_greys(values):
    return (255 * (values - values.min()) / np.ptp(values)).astype(np.uint8)
