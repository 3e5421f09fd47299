"""Image files without what they say beside their pixels: no EXIF, GPS, XMP, comments, text, colour profile, thumbnails.

The compressed pixels are copied byte for byte, so that decoding gives what it gave before. A colour profile goes too,
since it may name a device: Pillow does not apply it, and a program that does shows the picture's colours slightly
otherwise.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

APP0, APP14, SCAN, END = 0xE0, 0xEE, 0xDA, 0xD9
# Frames, tables and scans: what a decoder needs. Huffman, arithmetic and quantisation tables, restart interval.
JPEG_KEPT = frozenset({*range(0xC0, 0xD0)} - {0xC8} | {SCAN, 0xDB, 0xDD})
# In a scan 0xFF stands for itself before 0x00, and restart markers belong to the pixels; any other marker ends it.
END_OF_SCAN = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_KEPT = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
WEBP_KEPT = frozenset({b"VP8X", b"ALPH", b"VP8 ", b"VP8L"})
WEBP_METADATA_FLAGS = 0x20 | 0x08 | 0x04  # of VP8X: colour profile, EXIF, XMP


class NotSeparable(ValueError):
    """A file whose pixels and metadata cannot be told apart with certainty."""


def strip_metadata(content: bytes) -> bytes:
    """The same JPEG, PNG or WebP with nothing left in it but its pixels; of several pictures in it the first.

    Raises:
        NotSeparable: for any other format, an animated WebP, and a file that is damaged or not built as its format
            demands.
    """
    if content.startswith(b"\xff\xd8\xff"):
        strip = _strip_jpeg
    elif content.startswith(PNG_SIGNATURE):
        strip = _strip_png
    elif content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        strip = _strip_webp
    else:
        raise NotSeparable("neither JPEG nor PNG nor WebP")
    try:
        return strip(content)
    except (IndexError, struct.error):
        raise NotSeparable("the file ends too early") from None


def _strip_jpeg(content: bytes) -> bytes:
    parts = [content[:2]]
    for marker, start, end in _segments(content):
        payload = content[start + 4 : end]
        if marker == APP0 and payload.startswith(b"JFIF\0") and len(payload) >= 14:
            # Its presence tells a decoder which colours these are; the two zeros say that no thumbnail follows.
            parts.append(_segment(APP0, payload[:12] + b"\0\0"))
        elif marker == APP14 and payload.startswith(b"Adobe") and len(payload) >= 12:
            parts.append(_segment(APP14, payload[:12]))  # says whether the colours are YCbCr, and CMYK inverted
        elif marker in JPEG_KEPT:
            parts.append(content[start:end])
    return b"".join([*parts, b"\xff\xd9"])


def _segments(content: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield marker, start and end of every segment of the first picture; a scan's compressed pixels belong to it."""
    position = 2
    while True:
        position = content.find(b"\xff", position)  # a decoder, too, passes over what stands between segments
        if position < 0:
            raise NotSeparable("the JPEG has no end")
        marker = content[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker == END:
            return
        if marker < 0xC0 or 0xD0 <= marker <= 0xD8:
            raise NotSeparable(f"marker {marker:#x} between the segments of a JPEG")
        end = position + 2 + struct.unpack_from(">H", content, position + 2)[0]
        if marker == SCAN:
            after = END_OF_SCAN.search(content, end)
            if after is None:
                raise NotSeparable("the JPEG has no end")
            end = after.start()
        yield marker, position, end
        position = end


def _segment(marker: int, payload: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload


def _strip_png(content: bytes) -> bytes:
    parts, position, kind = [PNG_SIGNATURE], len(PNG_SIGNATURE), b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", content, position)
        end = position + 12 + length
        if end > len(content):
            raise NotSeparable("the PNG ends too early")
        if kind in PNG_KEPT:
            parts.append(content[position:end])
        position = end
    return b"".join(parts)


def _strip_webp(content: bytes) -> bytes:
    position, stop = 12, min(len(content), 8 + struct.unpack_from("<I", content, 4)[0])
    parts = []
    while position < stop:
        kind, length = struct.unpack_from("<4sI", content, position)
        start, end = position + 8, position + 8 + length
        if end > len(content):
            raise NotSeparable("the WebP ends too early")
        payload = content[start:end]
        if kind == b"ANMF":
            raise NotSeparable("the WebP is animated")
        if kind == b"VP8X":
            payload = bytes([payload[0] & ~WEBP_METADATA_FLAGS]) + payload[1:]
        if kind in WEBP_KEPT:
            parts.append(struct.pack("<4sI", kind, length) + payload + b"\0" * (length % 2))
        position = end + length % 2
    body = b"WEBP" + b"".join(parts)
    return struct.pack("<4sI", b"RIFF", len(body)) + body
