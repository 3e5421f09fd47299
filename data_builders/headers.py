"""Size and orientation of plain JPEG and PNG files, straight from their first bytes.

Pillow takes three times as long for a JPEG, and decodes a PNG whole to find its orientation. What is odd in
any way is left to it: each function here gives `None` rather than a guess.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

FIRST_READ, LAST_READ = 16_384, 1 << 20  # most headers, and those with thumbnails and colour profiles
MOST_CHUNKS = 100_000

JPEG = b"\xff\xd8\xff"
FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended, progressive
PLAIN_SEGMENTS = frozenset({0xC4, 0xDD, 0xFE})  # Huffman tables, restart interval, comment
SCAN, QUANTISATION, EXIF, COLOUR, ADOBE = 0xDA, 0xDB, 0xE1, 0xE2, 0xEE

PNG = b"\x89PNG\r\n\x1a\n"
PNG_DEPTHS = {0: {1, 2, 4, 8, 16}, 2: {8, 16}, 3: {1, 2, 4, 8}, 4: {8, 16}, 6: {8, 16}}  # by colour type
PLAIN_CHUNKS = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"pHYs": 9, b"tIME": 7}  # with their lengths
LOOSE_CHUNKS = frozenset({b"PLTE", b"sBIT", b"bKGD", b"hIST", b"tEXt"})
TURNING_CHUNKS = frozenset({b"iTXt", b"zTXt", b"tEXt"})  # may hold EXIF or XMP as text

ORIENTATION, SHORT = 0x0112, 3
FIELD_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}  # by TIFF field type


class Header(NamedTuple):
    """Size in pixels as stored, and EXIF orientation, 1 to 8."""

    width: int
    height: int
    orientation: int = 1


class _MoreNeeded(Exception):
    """The header goes on beyond the bytes at hand."""


def read_header(path: Path) -> Header | None:
    """The header of a plain JPEG or PNG; `None` for all else, which is for Pillow to judge."""
    try:
        with open(path, "rb", buffering=0) as file:
            head = file.read(FIRST_READ)
            try:
                return _parse(head, file)
            except _MoreNeeded:
                return _parse(head + file.read(LAST_READ), file)
    except (OSError, ValueError, struct.error, IndexError, _MoreNeeded):
        return None


def _parse(head: bytes, file: BinaryIO) -> Header | None:
    if head.startswith(JPEG):
        return _parse_jpeg(head)
    return _parse_png(head, file) if head.startswith(PNG) else None


def _parse_jpeg(head: bytes) -> Header | None:
    """Walk the segments up to the first scan."""
    size: tuple[int, int] | None = None
    orientation: int | None = None
    position = 2
    while True:
        if position + 4 > len(head):
            raise _MoreNeeded
        mark, kind, length = struct.unpack_from(">BBH", head, position)
        start, position = position + 4, position + 2 + length
        if position > len(head):
            raise _MoreNeeded
        if mark != 0xFF or length < 2:
            return None
        if kind == SCAN:
            break
        if kind in FRAMES and size is None:
            bits, height, width, layers = struct.unpack_from(">BHHB", head, start)
            size = width, height
            if bits != 8 or layers not in (1, 3, 4) or length != 8 + 3 * layers:
                return None
        elif kind == EXIF and head.startswith(b"Exif\0\0", start) and orientation is None:
            orientation = _parse_exif(head[start + 6 : position])
        elif not _is_plain_segment(kind, head[start:position]):
            return None
    return None if size is None or 0 in size or orientation == 0 else Header(*size, orientation or 1)


def _is_plain_segment(kind: int, content: bytes) -> bool:
    """Whether a segment tells nothing of size or orientation, and Pillow takes it as it is."""
    if kind in PLAIN_SEGMENTS:
        return True
    if kind == QUANTISATION:
        return len(content) % 65 == 0 and all(table < 16 for table in content[::65])
    if kind == 0xE0:
        return not content.startswith(b"JFIF") or len(content) >= 12
    if kind == COLOUR:
        return content.startswith(b"ICC_PROFILE\0") and len(content) > 14
    if kind == ADOBE:
        return len(content) >= 12
    return 0xE3 <= kind <= 0xEC or kind == 0xEF


def _parse_png(head: bytes, file: BinaryIO) -> Header | None:
    """Walk the chunks to the end of the file; of the pixels only their places are looked at."""
    if len(head) < 33 or head[8:16] != b"\0\0\0\rIHDR":
        return None
    width, height, depth, colour, _, filtering, _ = struct.unpack_from(">IIBBBBB", head, 16)
    if depth not in PNG_DEPTHS.get(colour, ()) or filtering or not width or not height:
        return None
    position, kind, orientation = 8, b"", None
    while kind != b"IDAT":
        if position + 8 > len(head):
            raise _MoreNeeded
        length, kind = struct.unpack_from(">I4s", head, position)
        start, position = position + 8, position + 12 + length
        if kind == b"IDAT":
            break
        if position > len(head):
            raise _MoreNeeded
        content = head[start : start + length]
        if zlib.crc32(content, zlib.crc32(kind)) != int.from_bytes(head[position - 4 : position]):
            return None
        if kind == b"eXIf" and orientation is None:
            orientation = _parse_exif(content)
        elif PLAIN_CHUNKS.get(kind) != length and kind not in LOOSE_CHUNKS and kind != b"IHDR":
            return None
        if kind == b"tEXt" and _may_turn(content):
            return None
    orientation = _find_late_exif(file, position, orientation)
    return None if orientation == 0 else Header(width, height, orientation or 1)


def _find_late_exif(file: BinaryIO, position: int, orientation: int | None) -> int | None:
    """The orientation that stands behind the pixels, 0 where only Pillow can tell; a cut file simply ends."""
    for _ in range(MOST_CHUNKS):
        chunk = _read_at(file, position, 8)
        if len(chunk) < 8 or chunk[4:] == b"IEND":
            return orientation
        length, kind = struct.unpack(">I4s", chunk)
        if kind in TURNING_CHUNKS and (kind != b"tEXt" or _may_turn(_read_at(file, position + 8, min(length, 80)))):
            return 0
        if kind == b"eXIf":
            if orientation is not None or length > LAST_READ:
                return 0
            orientation = _parse_exif(_read_at(file, position + 8, length))
        position += 12 + length
    return 0


def _read_at(file: BinaryIO, position: int, length: int) -> bytes:
    file.seek(position)
    return file.read(length)


def _may_turn(text: bytes) -> bool:
    return text.lower().startswith((b"raw profile", b"xml:com.adobe.xmp", b"xmp"))


def _parse_exif(content: bytes) -> int:
    """The orientation in a TIFF structure, 1 where it has none; 0 for what is odd."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(content[:4])
    if order is None:
        return 0
    (start,) = struct.unpack_from(order + "I", content, 4)
    (count,) = struct.unpack_from(order + "H", content, start)
    found, total = [], 0
    for position in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind, length, value = struct.unpack_from(order + "HHIH", content, position)
        (place,) = struct.unpack_from(order + "I", content, position + 8)
        size = length * FIELD_BYTES.get(kind, len(content))
        total += size if size > 4 else 0
        if total > len(content) or (size > 4 and place + size > len(content)):
            return 0
        if tag == ORIENTATION:
            found.append(value if kind == SHORT and length == 1 and 1 <= value <= 8 else 0)
    return (found or [1])[0] if len(found) < 2 else 0
