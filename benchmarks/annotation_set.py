"""A set of made-up annotations as large as real ones: the same boxes and outlines in every format, and image files.

The images are plain, so that 20,000 of them are made in seconds; `real_size/` holds a few of a radiograph's and a
photograph's size. All are distinct and can be decoded. One annotation in a hundred reaches over the edge of its image
and one in a thousand crosses itself, as in real files.
"""

from __future__ import annotations

import io
import json
import math
import os
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("caries", "infection", "impacted tooth", "fractured tooth", "broken down crown", "healthy tooth")
TEMPLATES = 24
REAL_SIZES = {"radiograph": (2880, 1440), "photograph": (4032, 3024)}
REAL_SIZE_COPIES = 20
ORIENTATION = 0x0112
USER_COMMENT = 0x9286
Outline = list[tuple[float, float]]
Region = tuple[int, str, Outline]  # class, "box", "turned" or "outline", corners in fractions


def write_annotation_set(folder: Path, *, images: int, objects: int, seed: int = 0) -> None:
    """Write `images` image files, and `objects` annotations of them in every format, below a new folder."""
    rng = random.Random(seed)
    sizes = _write_images(folder / "images", images, "jpg", rng)
    _write_images(folder / "png", images, "png", rng)
    _write_real_sizes(folder / "real_size", rng)
    counts = _share(objects, images, rng)
    boxes = [[_box(rng) for _ in range(count)] for count in counts]
    turned = [[_turned(rng) for _ in range(count)] for count in counts]
    outlines = [[_outline(rng) for _ in range(count)] for count in counts]
    _write_yolo(folder, "yolo_boxes", sizes, boxes)
    _write_yolo(folder, "yolo_segments", sizes, outlines)
    _write_yolo(folder, "yolo_obb", sizes, turned)
    _write_dota(folder, "dota", sizes, turned)
    _write_coco(folder, "coco_boxes", sizes, boxes)
    _write_coco(folder, "coco_polygons", sizes, outlines)
    _write_via(folder, "via1", sizes, outlines, lambda regions: {str(n): region for n, region in enumerate(regions)})
    _write_via(folder, "via2", sizes, outlines, lambda regions: regions)


def _share(objects: int, images: int, rng: random.Random) -> list[int]:
    counts = [0] * images
    for _ in range(objects):
        counts[rng.randrange(images)] += 1
    return counts


def _write_images(folder: Path, count: int, suffix: str, rng: random.Random) -> dict[str, tuple[int, int]]:
    """Write distinct images; their sizes as displayed, by file name."""
    folder.mkdir(parents=True)
    shapes = [(rng.randrange(640, 960), rng.randrange(320, 480)) for _ in range(TEMPLATES)]
    templates = [_encode(shape, suffix, rng, orientation=number % 8 + 1) for number, shape in enumerate(shapes)]
    sizes = {}
    for number in range(count):
        which = number % TEMPLATES
        name = f"opg_{number:05d}_jpg.rf.{rng.getrandbits(128):032x}.{suffix}"
        (folder / name).write_bytes(_make_distinct(templates[which], name))
        # Every second JPEG is a photograph with EXIF; orientations from 5 on exchange the sides.
        is_turned = suffix == "jpg" and which % 2 and which % 8 + 1 >= 5
        sizes[name] = shapes[which][::-1] if is_turned else shapes[which]
    return sizes


def _write_real_sizes(folder: Path, rng: random.Random) -> None:
    folder.mkdir(parents=True)
    for kind, size in REAL_SIZES.items():
        for suffix in ("jpg", "png"):
            template = _encode(size, suffix, rng, orientation=6)
            for number in range(REAL_SIZE_COPIES):
                name = f"{kind}_{number}.{suffix}"
                (folder / name).write_bytes(_make_distinct(template, name))


def _encode(size: tuple[int, int], suffix: str, rng: random.Random, *, orientation: int) -> bytes:
    coarse = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (6, 12), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST)  # large squares: a few kilobytes each
    buffer = io.BytesIO()
    if suffix == "png":
        image.save(buffer, format="PNG", compress_level=1)
    elif orientation % 2:
        image.save(buffer, format="JPEG", quality=85)
    else:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        exif.get_ifd(0x8769)[USER_COMMENT] = bytes(
            8_000
        )  # cameras put a thumbnail and notes of their own before the size
        image.convert("RGB").save(buffer, format="JPEG", quality=85, exif=exif)
    return buffer.getvalue()


def _make_distinct(content: bytes, text: str) -> bytes:
    """The same picture with a comment of its own."""
    if content.startswith(b"\xff\xd8"):
        return content[:-2] + b"\xff\xfe" + struct.pack(">H", len(text) + 2) + text.encode() + content[-2:]
    chunk = b"tEXtComment\0" + text.encode()
    end = content.rindex(b"IEND") - 4
    packed = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return content[:end] + packed + content[end:]


def _box(rng: random.Random) -> Region:
    width, height = rng.uniform(0.02, 0.2), rng.uniform(0.02, 0.2)
    left, top = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
    if rng.random() < 0.01:
        left = 1 - width * 0.8
    return (
        rng.randrange(6),
        "box",
        [(left, top), (left + width, top), (left + width, top + height), (left, top + height)],
    )


def _turned(rng: random.Random) -> Region:
    cx, cy, width, height, angle = (rng.uniform(*limits) for limits in _TURNED_LIMITS)
    if rng.random() < 0.01:
        cx = 0.99
    cos, sin = math.cos(angle), math.sin(angle)
    corners = ((-width, -height), (width, -height), (width, height), (-width, height))
    return rng.randrange(6), "turned", [(cx + x * cos - y * sin, cy + x * sin + y * cos) for x, y in corners]


_TURNED_LIMITS = ((0.2, 0.8), (0.2, 0.8), (0.02, 0.1), (0.02, 0.1), (0.0, math.pi))


def _outline(rng: random.Random) -> Region:
    """An outline of 8 to 24 points around a centre, in the order of their angles: it does not cross itself."""
    count, cx, cy = rng.randrange(8, 25), rng.uniform(0.15, 0.85), rng.uniform(0.15, 0.85)
    if rng.random() < 0.01:
        cx = 0.95
    points = []
    for number in range(count):
        angle, radius = 2 * math.pi * number / count, rng.uniform(0.06, 0.12)
        points.append((cx + radius * math.cos(angle), cy + radius * math.sin(angle)))
    if rng.random() < 0.001:
        points[1], points[count // 2] = points[count // 2], points[1]
    return rng.randrange(6), "outline", points


def _images_of(folder: Path, name: str, sizes: dict, into: str) -> Iterator[tuple[str, int, int]]:
    """Put the images of one format in their place, as hard links; yield file name and size."""
    (folder / name / into).mkdir(parents=True, exist_ok=True)
    for file, (width, height) in sizes.items():
        os.link(folder / "images" / file, folder / name / into / file)
        yield file, width, height


def _write_yolo(folder: Path, name: str, sizes: dict, regions: list[list[Region]]) -> None:
    labels = folder / name / "labels"
    labels.mkdir(parents=True)
    for (file, *_), of_image in zip(_images_of(folder, name, sizes, "images"), regions, strict=True):
        lines = []
        for class_id, kind, points in of_image:
            if kind == "box":
                (left, top), _, (right, bottom), _ = points
                values = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
            else:
                values = [value for point in points for value in point]
            lines.append(f"{class_id} " + " ".join(f"{value:.6f}" for value in values) + "\n")
        (labels / file).with_suffix(".txt").write_text("".join(lines))
    (folder / name / "data.yaml").write_text(
        f"path: .\ntrain: images\nval: images\nnc: 6\nnames: {json.dumps(NAMES)}\n"
    )


def _write_dota(folder: Path, name: str, sizes: dict, regions: list[list[Region]]) -> None:
    labels = folder / name / "labelTxt"
    labels.mkdir(parents=True)
    for (file, width, height), of_image in zip(_images_of(folder, name, sizes, "images"), regions, strict=True):
        lines = ["imagesource:made-up\ngsd:null\n"]
        for class_id, _, points in of_image:
            pixels = " ".join(f"{x * width:.2f} {y * height:.2f}" for x, y in points)
            lines.append(f"{pixels} {NAMES[class_id]} 0\n")
        (labels / file).with_suffix(".txt").write_text("".join(lines))


def _write_coco(folder: Path, name: str, sizes: dict, regions: list[list[Region]]) -> None:
    images, annotations = [], []
    for (file, width, height), of_image in zip(_images_of(folder, name, sizes, "."), regions, strict=True):
        images.append({"id": len(images), "license": 1, "file_name": file, "height": height, "width": width})
        for class_id, kind, points in of_image:
            xs, ys = [round(x * width, 2) for x, _ in points], [round(y * height, 2) for _, y in points]
            left, top = min(xs), min(ys)
            box = [left, top, round(max(xs) - left, 2), round(max(ys) - top, 2)]
            flat = [value for point in zip(xs, ys, strict=True) for value in point]
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": len(images) - 1,
                    "category_id": class_id + 1,
                    "bbox": box,
                    "area": round(box[2] * box[3], 3),
                    "segmentation": [] if kind == "box" else [flat],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": number, "name": label, "supercategory": "teeth"} for number, label in enumerate(NAMES, 1)]
    document = {"info": {}, "licenses": [], "categories": categories, "images": images, "annotations": annotations}
    (folder / name / "_annotations.coco.json").write_text(json.dumps(document))


def _write_via(
    folder: Path, name: str, sizes: dict, regions: list[list[Region]], form: Callable[[list[dict]], object]
) -> None:
    document = {}
    for (file, width, height), of_image in zip(_images_of(folder, name, sizes, "."), regions, strict=True):
        made = []
        for class_id, _, points in of_image:
            xs, ys = [round(x * width) for x, _ in points], [round(y * height) for _, y in points]
            shape = {"name": "polygon", "all_points_x": [*xs, xs[0]], "all_points_y": [*ys, ys[0]]}
            made.append({"shape_attributes": shape, "region_attributes": {"name": NAMES[class_id]}})
        size = (folder / "images" / file).stat().st_size
        document[f"{file}{size}"] = {"filename": file, "size": size, "regions": form(made), "file_attributes": {}}
    (folder / name / "via_region_data.json").write_text(json.dumps(document))
