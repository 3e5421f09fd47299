"""Pictures and drawings that are to be published: nothing but pixels, no code, no metadata."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from data_builders.metadata import PNG_SIGNATURE, NotSeparable, strip_metadata

# Of PNG: numbers about its pixels, and how many bytes they take at most.
HARMLESS_CHUNKS = {b"pHYs": 9, b"sRGB": 1, b"gAMA": 4, b"cHRM": 32, b"sBIT": 4, b"bKGD": 6}
SVG_ACTIVE = re.compile(r"<script\b|<[^<>]*?[\s\"'/]on[a-z]{3,}\s*=|javascript:", re.IGNORECASE)
SVG_METADATA = re.compile(r"<metadata\b.*?</metadata\s*>", re.DOTALL | re.IGNORECASE)
# What matplotlib writes of itself.
SVG_OWN = re.compile(r"image/svg\+xml|Matplotlib v[\d.a-z+-]+, https://matplotlib\.org/|\s+")
UNREADABLE = (
    (b"PK\x03\x04", "an archive"),
    (b"\x1f\x8b", "an archive"),
    (b"BZh91AY&SY", "an archive"),
    (b"\xfd7zXZ", "an archive"),
    (b"7z\xbc\xaf", "an archive"),
    (b"\x28\xb5\x2f\xfd", "an archive"),
    (b"%PDF", "a PDF"),
    (b"GIF87a", "a GIF"),
    (b"GIF89a", "a GIF"),
    (b"II*\0", "a TIFF"),
    (b"MM\0*", "a TIFF"),
    (b"\x93NUMPY", "a NumPy file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"SQLite format", "a database"),
    (b"GGUF\x02\0", "a GGUF file"),
    (b"GGUF\x03\0", "a GGUF file"),
    (b"\x7fELF", "a program"),
)
# Pictures that are text, with comments.
COMMENTS = rb"\s+(?:#[^\n]*+\s++)*+"
TEXT_PICTURE = re.compile(rb"#define \w+_width \d|P[1-6]%b\d+%b\d+\s|P7%bWIDTH \d" % (COMMENTS, COMMENTS, COMMENTS))


def is_picture(head: bytes) -> bool:
    """Whether this is how a JPEG, PNG or WebP begins."""
    return head.startswith((b"\xff\xd8\xff", PNG_SIGNATURE)) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def name_unreadable(head: bytes) -> str | None:
    """What begins so, where it is of a kind that is not looked into."""
    if head[128:132] == b"DICM":
        return "a DICOM file"
    if head[257:262] == b"ustar":
        return "an archive"
    if head.startswith(b"BM") and head[6:10] == b"\0\0\0\0":
        return "a BMP"
    if TEXT_PICTURE.match(head):
        return "a picture in the form of text"
    return next((what for magic, what in UNREADABLE if head.startswith(magic)), None)


def screen_picture(content: bytes) -> Iterator[str]:
    """Say so where a JPEG, PNG or WebP holds more than its pixels."""
    try:
        bare = strip_metadata(content)
    except NotSeparable as error:
        yield f"a picture in it cannot be told apart from its metadata ({error}): save it anew as a plain PNG"
        return
    if bare != (_drop_harmless(content) if content.startswith(PNG_SIGNATURE) else content):
        yield (
            "a picture in it carries more than its pixels (EXIF, text, a colour profile, a thumbnail): save it "
            "without, for example with `exiftool -all= FILE`"
        )


def _drop_harmless(content: bytes) -> bytes:
    """A PNG without the chunks that hold only numbers about its pixels."""
    parts, position = [content[:8]], 8
    while position + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, position)
        end = position + 12 + length
        if length > HARMLESS_CHUNKS.get(kind, -1):
            parts.append(content[position:end])
        position = end
    return b"".join([*parts, content[position:]])


def screen_drawing(text: str) -> Iterator[str]:
    """Say so where an SVG, or another page, can run code or tells of its author."""
    if SVG_ACTIVE.search(text):
        yield "this drawing can run code: save it without scripts"
    for block in SVG_METADATA.findall(text):
        if SVG_OWN.sub("", re.sub(r"<[^>]*>", "", block)):
            yield "this drawing carries metadata (an author, a date, a title): save it without"
