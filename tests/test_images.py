"""Image files: identity by pixels, size as displayed, and files that only pretend."""

import io
import struct
import warnings
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_builders.images import EXIF_ORIENTATION, ImageError, find_images, measure, read_size, read_stored, to_rgb


@pytest.fixture
def picture():
    return Image.fromarray((np.arange(30 * 20) % 251).astype(np.uint8).reshape(20, 30))


def test_equal_pixels_have_one_id_whatever_the_file(picture, tmp_path):
    picture.save(tmp_path / "a.png")
    picture.convert("RGB").save(tmp_path / "b.bmp")
    picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "c.png")
    ids = [measure(tmp_path / name).image_id for name in ("a.png", "b.bmp", "c.png")]

    assert ids[0] == ids[1] != ids[2]


def test_two_shapes_of_the_same_bytes_are_two_images(tmp_path):
    for name, size in (("a.png", (30, 20)), ("b.png", (20, 30))):
        Image.new("L", size, 7).save(tmp_path / name)

    assert measure(tmp_path / "a.png").image_id != measure(tmp_path / "b.png").image_id


def test_a_turned_photograph_has_the_size_it_is_shown_with(picture, tmp_path):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    picture.save(tmp_path / "a.jpg", exif=exif)

    assert read_size(tmp_path / "a.jpg") == (20, 30)
    assert measure(tmp_path / "a.jpg")[:2] == (20, 30)


@pytest.mark.parametrize(
    ("mode", "value", "grey"),
    [
        pytest.param("L", 100, 100, id="grey"),
        pytest.param("I;16", 0xFFFF, 255, id="16 bits"),
        pytest.param("I;16", 0x0FFF, 255, id="12 bits in a file of 16"),
        pytest.param("I;16", 100, 100, id="8 bits in a file of 16"),
        pytest.param("RGBA", (100, 100, 100, 255), 100, id="opaque"),
        pytest.param("RGBA", (100, 100, 100, 0), 0, id="transparent is black"),
        pytest.param("1", 1, 255, id="one bit"),
    ],
)
def test_every_mode_becomes_rgb_by_one_rule(mode, value, grey):
    assert to_rgb(Image.new(mode, (2, 2), value)).getpixel((0, 0)) == (grey,) * 3


def test_deep_greys_are_stored_as_8_bits_and_all_else_as_it_is(picture, tmp_path):
    """Pillow's own conversion to RGB turns them white, for everybody who loads the dataset."""
    Image.fromarray((np.arange(600) * 6).astype(np.uint16).reshape(20, 30)).save(tmp_path / "deep.png")
    picture.save(tmp_path / "a.jpg")
    suffix, content, _ = read_stored(tmp_path / "deep.png")
    stored = Image.open(io.BytesIO(content)).convert("RGB")

    assert measure(tmp_path / "deep.png").is_deep
    assert suffix == ".png"
    assert stored.tobytes() == to_rgb(Image.open(tmp_path / "deep.png")).tobytes()
    assert 100 < np.asarray(stored).mean() < 130
    assert read_stored(tmp_path / "a.jpg") == (".jpg", (tmp_path / "a.jpg").read_bytes(), False)


def test_a_truncated_file_is_refused(picture, tmp_path):
    picture.resize((300, 200)).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:2000])

    with pytest.raises(ImageError, match="cannot be decoded"):
        measure(tmp_path / "a.jpg")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not an image", id="svg named png"),
        pytest.param(b"8BPS" + bytes(100), "is not an image", id="psd named png"),
        pytest.param(b"", "is not an image", id="empty"),
        pytest.param("bomb", "claims 20000 x 20000 pixels|exceeds limit", id="bomb"),
    ],
)
def test_what_only_pretends_to_be_an_image_is_refused_from_its_header(tmp_path, content, message):
    path = tmp_path / "a.png"
    path.write_bytes(png_header(20_000) if content == "bomb" else content)

    for look in (read_size, measure):
        with pytest.raises(ImageError, match=message):
            look(path)


def test_damaged_exif_costs_at_most_its_image(picture, tmp_path):
    """Each byte of the EXIF in turn is made 0 and 255: the picture is read, turned or not, or is one ImageError."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION], exif[0x011A] = 6, 72.0  # XResolution
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", exif=exif)
    content, path = buffer.getvalue(), tmp_path / "a.jpg"
    start, sizes = content.index(b"Exif"), set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, on what is damaged
        for place in range(start, start + 6 + len(exif.tobytes())):
            for value in (0, 255):
                path.write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
                with suppress(ImageError):
                    sizes.add(measure(path)[:2])
                    assert read_stored(path).content

    assert sizes == {(20, 30), (30, 20)}


def test_an_orientation_counts_beside_a_damaged_tag(picture, tmp_path):
    """`ImageOps.exif_transpose` raises struct.error here, since it writes the EXIF anew."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION], exif[0x011A] = 6, 72.0  # XResolution, a fraction
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", exif=exif)
    damaged = buffer.getvalue().replace(b"\x01\x1a\0\x05", b"\x01\x00\0\x05")  # now it is ImageWidth
    (tmp_path / "a.jpg").write_bytes(damaged)

    with pytest.raises(struct.error):
        ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg"))
    assert read_size(tmp_path / "a.jpg") == measure(tmp_path / "a.jpg")[:2] == (20, 30)
    assert read_stored(tmp_path / "a.jpg").turned


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_pillow_turns_them(picture, orientation):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", exif=exif)

    expected = ImageOps.exif_transpose(Image.open(buffer)).convert("RGB")
    assert to_rgb(Image.open(buffer)).tobytes() == expected.tobytes()


def test_images_are_found_in_the_order_of_their_names(picture, tmp_path):
    for name in ("b/z.JPG", "a/y.png", "x.bmp", "notes.txt", ".hidden.png", "Thumbs.db"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture.save(tmp_path / name, format="BMP")

    assert [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)] == ["a/y.png", "b/z.JPG", "x.bmp"]


def png_header(side):
    """A PNG of a few bytes that claims to be enormous."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
