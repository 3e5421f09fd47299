"""Metadata go, pixels stay: what is stored of an image decodes to what its file decoded to."""

import io
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from data_builders.images import EXIF_ORIENTATION, measure, read_stored, to_rgb
from data_builders.metadata import NotSeparable, strip_metadata

CANARY = b"Ximena Quetzal 1961-04-23"
FORMATS = {
    "JPEG": ("L", "RGB", "CMYK"),
    "MPO": ("L", "RGB"),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "F"),
    "BMP": ("1", "L", "P", "RGB"),
}


def picture(mode, seed, size=(37, 23)):
    """Noise on a slope in any mode."""
    values = np.add.outer(np.arange(size[1]), np.arange(size[0])) * 3
    values = values + np.random.default_rng(seed).integers(0, 40, values.shape)
    if mode in {"I;16", "F"}:
        return Image.fromarray((values * 60).astype(np.uint16 if mode == "I;16" else np.float32))
    grey = Image.fromarray((values % 256).astype(np.uint8))
    if mode in {"1", "L", "P"}:
        return grey.convert(mode)
    turned = grey.transpose(Image.Transpose.ROTATE_180)
    bands = [grey, turned, Image.new("L", size, 90), grey.point(lambda value: 255 - value // 2)]
    return Image.merge(mode, [bands[0], bands[3]] if mode == "LA" else bands[: len(mode)])


def exif(orientation=1):
    tags = Image.Exif()
    tags[EXIF_ORIENTATION] = orientation
    tags[0x013B] = CANARY.decode()  # artist
    tags.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0" + CANARY  # user comment
    tags.get_ifd(0x8825).update({1: "N", 2: (19.0, 25.0, 57.0), 0x1D: CANARY.decode()})  # GPS
    return tags.tobytes()


def written(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def with_metadata(image, kind, orientation, options):
    """The picture in a file that says as much beside its pixels as Pillow can write."""
    if kind in {"JPEG", "MPO"}:
        options = {**options, "comment": CANARY, "icc_profile": CANARY * 9, "exif": exif(orientation)}
        options |= {"append_images": [picture("L", 9)], "save_all": True} if kind == "MPO" else {"xmp": CANARY}
        return written(image, kind, **options) + CANARY
    if kind == "PNG":
        text = PngImagePlugin.PngInfo()
        text.add_text("Patient", CANARY.decode())
        text.add_text("Note", CANARY.decode(), zip=True)
        text.add_itxt("XML:com.adobe.xmp", CANARY.decode())
        text.add(b"prVt", CANARY, after_idat=True)
        return written(image, kind, pnginfo=text, icc_profile=CANARY, exif=exif(orientation)) + CANARY
    if kind == "WEBP":
        lossless = options.get("progressive", False)
        return written(image, kind, lossless=lossless, exif=exif(orientation), xmp=CANARY, icc_profile=CANARY) + CANARY
    if kind == "TIFF":
        return written(image, kind, tiffinfo={270: CANARY.decode(), EXIF_ORIENTATION: orientation})
    return written(image, kind) + CANARY


def shown(content):
    """The RGB values by our one rule, whatever the mode."""
    with Image.open(io.BytesIO(content)) as image:
        return to_rgb(image)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind_and_mode=st.sampled_from([(kind, mode) for kind, modes in FORMATS.items() for mode in modes]),
    orientation=st.integers(1, 8),
    progressive=st.booleans(),
    subsampling=st.sampled_from([0, 1, 2]),
    restarts=st.integers(0, 3),
    quality=st.integers(20, 98),
    seed=st.integers(0, 99),
)
def test_what_is_stored_has_the_same_pixels_and_says_nothing_else(
    tmp_path, kind_and_mode, orientation, progressive, subsampling, restarts, quality, seed
):
    kind, mode = kind_and_mode
    options = {"progressive": progressive, "quality": quality, "restart_marker_blocks": restarts}
    if mode == "RGB":
        options["subsampling"] = subsampling
    path = tmp_path / "a.img"
    path.write_bytes(with_metadata(picture(mode, seed), kind, orientation, options))
    assert CANARY in path.read_bytes()
    assert Image.open(path).format == kind

    stored = read_stored(path)

    assert shown(stored.content).tobytes() == shown(path.read_bytes()).tobytes()
    path.write_bytes(stored.content)
    assert CANARY not in stored.content
    assert not Image.open(path).getexif()
    assert {"exif", "xmp", "icc_profile", "comment", "Patient"}.isdisjoint(Image.open(path).info)


@pytest.mark.parametrize(
    ("kind", "mode", "suffix"),
    [
        ("JPEG", "L", ".jpg"),
        ("JPEG", "CMYK", ".jpg"),
        ("MPO", "RGB", ".jpg"),
        ("PNG", "P", ".png"),
        ("WEBP", "RGBA", ".webp"),
    ],
)
def test_the_compressed_pixels_are_copied_and_not_made_again(tmp_path, kind, mode, suffix):
    """A second compression would lose quality (JPEG, WebP) or make the file six times larger (PNG of a JPEG)."""
    image = picture(mode, 0, (400, 300))
    path = tmp_path / "a.img"
    path.write_bytes(with_metadata(image, kind, 1, {}))
    stored = read_stored(path)
    bare = written(image, "JPEG" if kind == "MPO" else kind, **({"lossless": False} if kind == "WEBP" else {}))

    assert stored.suffix == suffix
    assert not stored.turned
    assert bare[-2000:-20] in stored.content
    assert len(stored.content) < len(bare) + 100


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_turned_photograph_is_stored_as_it_is_displayed(tmp_path, orientation):
    """Whoever decodes it without a look at EXIF, which is gone, must see the boxes where they belong."""
    path = tmp_path / "a.jpg"
    path.write_bytes(with_metadata(picture("RGB", 1), "JPEG", orientation, {}))
    before = measure(path)
    stored = read_stored(path)
    path.write_bytes(stored.content)

    assert stored.turned
    assert stored.suffix == ".png"
    assert Image.open(path).size == before[:2]
    assert measure(path).image_id == before.image_id


def test_xmp_can_turn_a_picture_too(tmp_path):
    """Pillow looks there when EXIF says nothing."""
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", '<rdf tiff:Orientation="6"/>')
    path = tmp_path / "a.png"
    picture("L", 2).save(path, pnginfo=text)

    assert read_stored(path).turned
    assert shown(read_stored(path).content).size == (23, 37)


def test_a_thumbnail_of_the_unmasked_picture_goes_with_the_header(tmp_path):
    """A JFIF header may hold one, uncompressed; programs that mask a name often leave it as it was."""
    content = written(picture("L", 3), "JPEG")
    assert content[2:4] == b"\xff\xe0"
    thumbnail = CANARY[:24].ljust(24, b" ")  # 4 x 2 pixels of RGB
    header = content[6:18] + bytes([4, 2]) + thumbnail
    content = content[:2] + b"\xff\xe0" + struct.pack(">H", len(header) + 2) + header + content[20:]

    stripped = strip_metadata(content)

    assert thumbnail in content
    assert thumbnail not in stripped
    assert shown(stripped).tobytes() == shown(content).tobytes()


def test_what_stands_between_segments_and_scans_goes_too():
    content = written(picture("RGB", 4), "JPEG", progressive=True)
    comment = b"\xff\xfe" + struct.pack(">H", len(CANARY) + 2) + CANARY
    last = content.rindex(b"\xff\xda")
    hidden = content[:last] + comment + b"\xff" + content[last:-2] + b"\xff\xd9" + CANARY

    assert strip_metadata(hidden) == strip_metadata(content)
    assert CANARY not in strip_metadata(hidden)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"GIF89a" + bytes(30), id="another format"),
        pytest.param(written(picture("L", 5), "JPEG")[:-2], id="JPEG without an end"),
        pytest.param(written(picture("L", 5), "JPEG")[:300], id="JPEG cut in its tables"),
        pytest.param(b"\xff\xd8\xff\xd8\xff\xd9", id="JPEG that starts twice"),
        pytest.param(written(picture("L", 5), "PNG")[:-12], id="PNG without an end"),
        pytest.param(written(picture("RGB", 5), "WEBP")[:-40], id="WebP cut"),
        pytest.param(
            written(picture("RGB", 5), "WEBP", save_all=True, append_images=[picture("RGB", 6)]), id="animated WebP"
        ),
    ],
)
def test_what_cannot_be_told_apart_is_refused(content):
    with pytest.raises(NotSeparable):
        strip_metadata(content)


def test_a_file_that_cannot_be_stripped_is_stored_as_png(tmp_path):
    path = tmp_path / "a.webp"
    picture("RGB", 5).save(path, save_all=True, append_images=[picture("RGB", 6)])
    stored = read_stored(path)

    assert stored.suffix == ".png"
    assert shown(stored.content).tobytes() == shown(path.read_bytes()).tobytes()


@given(st.binary(max_size=200), st.sampled_from([b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x40\0\0\0WEBP", b""]))
@settings(max_examples=300, deadline=None)
def test_no_bytes_make_it_fail_in_another_way(content, signature):
    try:
        stripped = strip_metadata(signature + content)
    except NotSeparable:
        return
    assert strip_metadata(stripped) == stripped


def test_real_files_keep_their_pixels(third_party):
    images = sorted(path for suffix in ("jpg", "png") for path in third_party.rglob(f"*.{suffix}"))
    assert len(images) > 90
    for path in images:
        stored = read_stored(path)
        assert shown(stored.content).tobytes() == shown(path.read_bytes()).tobytes(), path
        assert stored.suffix == ".jpg" or path.suffix == ".png", path
