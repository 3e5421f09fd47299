"""Size and orientation from the first bytes of a file: what Pillow says, or nothing."""

import io
import random
import struct
import warnings
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data_builders.headers import read_header
from data_builders.images import EXIF_ORIENTATION, ImageError, read_orientation, read_size

SIZE = (37, 23)


def encode(kind, mode="L", orientation=None, **keys):
    exif = Image.Exif()
    if orientation is not None:
        exif[EXIF_ORIENTATION] = orientation
        exif[0x010E] = "a text before the orientation " * 3
        keys["exif"] = exif
    buffer = io.BytesIO()
    Image.new(mode, SIZE, 128 if mode in {"L", "I;16", "P"} else 0).save(buffer, format=kind, **keys)
    return buffer.getvalue()


def move_exif_behind_the_pixels(content):
    """Some programs write eXIf last; Pillow only finds it by decoding the image."""
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4])
    last = content.index(b"IEND") - 4
    return content[:start] + content[end:last] + content[start:end] + content[last:]


def put_in_front(content, segment):
    """A JPEG with one segment more behind its start."""
    return content[:2] + segment + content[2:]


def app(number, payload):
    return struct.pack(">BBH", 0xFF, 0xE0 + number, len(payload) + 2) + payload


XMP = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'
FILES = {
    **{f"JPEG turned {n}": encode("JPEG", "RGB", n) for n in range(1, 9)},
    **{f"PNG turned {n}": encode("PNG", "RGB", n) for n in range(1, 9)},
    **{f"PNG turned {n} behind its pixels": move_exif_behind_the_pixels(encode("PNG", "L", n)) for n in (3, 8)},
    "grey JPEG": encode("JPEG"),
    "progressive JPEG": encode("JPEG", "RGB", progressive=True),
    "CMYK JPEG": encode("JPEG", "CMYK"),
    "JPEG with a comment": encode("JPEG", comment=b"x" * 5_000),
    "JPEG with a thumbnail": put_in_front(encode("JPEG", "RGB", 6), app(4, bytes(60_000))),
    "JPEG turned by XMP": put_in_front(encode("JPEG"), app(1, XMP)),
    "JPEG with a colour profile": encode("JPEG", "RGB", 8, icc_profile=bytes(3_000)),
    "JPEG with an orientation of 9": encode("JPEG", "RGB", 9),
    "JPEG without a frame": app(0, b"JFIF\0\1\1\0\0\1\0\1\0\0").join((b"\xff\xd8", b"\xff\xda\0\x02")),
    "16-bit PNG": encode("PNG", "I;16"),
    "palette PNG": encode("PNG", "P"),
    "transparent PNG": encode("PNG", "RGBA"),
    "PNG with a colour profile": encode("PNG", "RGB", icc_profile=bytes(3_000)),
    "BMP": encode("BMP"),
    "TIFF": encode("TIFF", "RGB"),
    "WebP": encode("WEBP", "RGB", 6),
    "nothing": b"",
    "half a signature": b"\xff\xd8\xff",
}
FAST = [name for name in FILES if "JPEG turned" in name or "PNG turned" in name]
FAST = [*FAST, "grey JPEG", "progressive JPEG", "CMYK JPEG", "JPEG with a thumbnail", "16-bit PNG", "transparent PNG"]
FAST.remove("JPEG turned by XMP")


def two_pictures():
    buffer = io.BytesIO()
    Image.new("RGB", SIZE).save(buffer, format="MPO", save_all=True, append_images=[Image.new("RGB", SIZE)])
    return buffer.getvalue()


FILES["MPO of two pictures"] = two_pictures()


def ask_pillow(path, *, decode):
    """Size as stored and orientation, or `None` where Pillow takes the file for no image."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(path) as image:
                return image.size, image.getexif().get(EXIF_ORIENTATION, 1) if decode else None
        except (OSError, ValueError, SyntaxError):
            return None


@pytest.mark.parametrize("name", FILES)
def test_a_header_is_what_pillow_reads_or_is_left_to_it(tmp_path, name):
    path = tmp_path / "image"
    path.write_bytes(FILES[name])
    header, pillow = read_header(path), ask_pillow(path, decode=True)

    assert header is None or ((header.width, header.height), header.orientation) == pillow
    assert (header is not None) or name not in FAST


@pytest.mark.parametrize("name", [name for name in FILES if ask_pillow(io.BytesIO(FILES[name]), decode=True)])
def test_the_size_is_that_of_the_image_as_displayed(tmp_path, name):
    path = tmp_path / "image"
    path.write_bytes(FILES[name])
    with Image.open(path) as image:
        assert read_size(path) == ImageOps.exif_transpose(image).size
        expected = image.getexif().get(EXIF_ORIENTATION, 1)
    assert read_orientation(path) == (expected if expected in range(1, 9) else 1)


@settings(deadline=None, max_examples=300)
@given(name=st.sampled_from(sorted(FILES)), seed=st.integers(0, 2**32), kind=st.sampled_from(["cut", "flip", "both"]))
def test_of_a_damaged_file_a_header_is_read_as_pillow_reads_it_or_not_at_all(tmp_path_factory, name, seed, kind):
    rng = random.Random(seed)
    content = bytearray(FILES[name])
    if kind != "cut" and content:
        for _ in range(rng.randrange(1, 4)):
            content[rng.randrange(min(len(content), 700))] = rng.randrange(256)
    if kind != "flip":
        del content[rng.randrange(len(content) + 1) :]
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    header = read_header(path)

    if header is not None:
        size, orientation = ask_pillow(path, decode=not content.startswith(b"\x89PNG")) or (None, None)
        assert (header.width, header.height) == size
        # To find the orientation of a PNG Pillow decodes it, which a damaged one does not allow.
        assert orientation in (None, header.orientation)


def test_size_is_read_without_decoding(tmp_path):
    """The pixels are missing altogether."""
    jpeg, png = FILES["JPEG turned 6"], FILES["PNG turned 6"]
    (tmp_path / "a.jpg").write_bytes(jpeg[: jpeg.index(b"\xff\xda") + 20])
    (tmp_path / "b.png").write_bytes(png[: png.index(b"IDAT") + 6])

    assert read_size(tmp_path / "a.jpg") == read_size(tmp_path / "b.png") == SIZE[::-1]


def test_what_only_pillow_understands_and_refuses_is_an_image_error(tmp_path):
    chunk = b"iTXt" + b"XML:com.adobe.xmp\0\0\0\0\0"
    text = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    png = FILES["transparent PNG"]
    path = tmp_path / "a.png"
    path.write_bytes(png[:33] + text + png[33 : png.index(b"IDAT") + 6])

    with pytest.raises(ImageError, match="cannot be decoded"):
        read_size(path)


def test_headers_of_real_images_are_those_of_pillow(third_party: Path):
    paths = [path for path in third_party.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg", ".png"}]
    headers = {path: read_header(path) for path in paths}

    assert sum(header is not None for header in headers.values()) > 0.95 * len(paths) > 50
    for path, header in headers.items():
        assert header is None or ((header.width, header.height), header.orientation) == ask_pillow(path, decode=True)
