"""Image files: size as displayed, identity by pixels."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})
MAX_PIXELS = 80_000_000  # four times the largest panoramic we know; beyond it a header is taken for a bomb
EXIF_ORIENTATION = 0x0112
DEEP_MODES = frozenset({"I", "I;16", "I;16B", "I;16L", "I;16N", "F"})
SIDEWAYS = frozenset({5, 6, 7, 8})  # EXIF orientations that exchange width and height


class ImageError(ValueError):
    """An image file that cannot be used; the message says why."""


class Measured(NamedTuple):
    """What an image file holds: its size in pixels as displayed, and the SHA-256 of those pixels as RGB.

    `is_deep` says that its greys have more than 8 bits.
    """

    width: int
    height: int
    image_id: str
    is_deep: bool = False


def find_images(folder: Path) -> Iterator[Path]:
    """Every image file below a folder, in the order of their names; hidden files are left out."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file():
            yield path


def read_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels as displayed (EXIF orientation applied), from the header alone.

    Raises:
        ImageError: when the file is no image, or claims more than `MAX_PIXELS`.
    """
    with _open(path) as image:
        width, height = image.size
        # Reading EXIF of a PNG decodes the whole image, and orientation in PNG is a curiosity: only JPEG and TIFF.
        sideways = image.format in {"JPEG", "MPO", "TIFF"} and image.getexif().get(EXIF_ORIENTATION) in SIDEWAYS
    return (height, width) if sideways else (width, height)


def measure(path: Path) -> Measured:
    """Decode an image whole and take its size and identity; two files with equal pixels have the same id.

    Raises:
        ImageError: when it cannot be decoded to its last row.
    """
    with _open(path) as image:
        is_deep = image.mode in DEEP_MODES
        try:
            pixels = to_rgb(image)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ImageError(f"cannot be decoded: {error}") from None
    width, height = pixels.size
    digest = hashlib.sha256(f"{width}x{height}\n".encode())
    digest.update(pixels.tobytes())
    return Measured(width, height, digest.hexdigest(), is_deep)


def read_stored(path: Path) -> tuple[str, bytes]:
    """Suffix and bytes to store for an image: the file's own; of greys beyond 8 bits a PNG of what `to_rgb` gives.

    Pillow turns those white when somebody who loads the dataset converts them to RGB.
    """
    with _open(path) as image:
        if image.mode not in DEEP_MODES:
            return path.suffix.lower(), path.read_bytes()
        buffer = io.BytesIO()
        to_rgb(image).convert("L").save(buffer, format="PNG")
    return ".png", buffer.getvalue()


def to_rgb(image: Image.Image) -> Image.Image:
    """The pixels as displayed, in RGB: orientation applied, transparency on black, deep greys reduced to 8 bits.

    Greys are divided by a power of two, so that the bits that the image uses become 8: 12 bits are as common in
    radiographs as 16, and both come in files of 16.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in DEEP_MODES:
        values = np.nan_to_num(np.asarray(image, dtype=np.float64)).clip(min=0)
        used = max(8, int(values.max(initial=0)).bit_length())
        image = Image.fromarray((values / 2 ** (used - 8)).clip(max=255).astype(np.uint8))
    if image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")
    return image.convert("RGB")


def _open(path: Path) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(path)
        except (
            OSError,
            ValueError,
            SyntaxError,
            Image.DecompressionBombWarning,
            Image.DecompressionBombError,
        ) as error:
            raise ImageError(f"is not an image that can be read: {error}") from None
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"claims {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
    return image
