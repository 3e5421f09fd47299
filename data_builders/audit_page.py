"""The audit as a page: what each label looks like and where it lies, beside what the sources file says of it."""

from __future__ import annotations

import base64
import hashlib
import io
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image, ImageDraw

from data_builders.audit import SourceContent
from data_builders.images import ImageError, measure_pixels
from data_builders.label_evidence import GRID
from data_builders.records import Finding, ImageRecord, InputError

CROPS = 8  # of each label
CROP_SIDE = 176  # pixels
THUMBNAIL_SIDE = 320
SHOWN_PAIRS = 30
SHOWN_PROBLEMS = 20  # of each code
SEVERITIES = ("error", "warning", "info")


def check_writable(path: Path) -> None:
    """Make the folder that a page is to be written to; to be asked before a long audit begins.

    Raises:
        InputError: when no file can be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: its folder cannot be made: {error.strerror}") from None
    if path.is_dir():
        raise InputError(f"{path} is a folder; --html names a file")
    if path.exists() and not path.read_bytes()[:15].lower().startswith(b"<!doctype html"):
        raise InputError(f"{path} is no page of an audit; choose another --html")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"{path} cannot be written")


def write_audit_page(path: Path, report: Mapping, contents: Sequence[SourceContent]) -> None:
    """Write the page, which needs no other file and no network, to `path`.

    `report` is what `data_builders.audit.summarise` says of `contents`.
    """
    environment = Environment(
        loader=PackageLoader("data_builders", "pages"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    sources = [_describe_source(source, content) for source, content in zip(report["sources"], contents, strict=True)]
    page = environment.get_template("audit.html.jinja").render(
        sources=sources,
        pairs=[_show_pair(pair) for pair in report["near_duplicates"][:SHOWN_PAIRS]],
        mosaics=[_show_mosaic(mosaic) for mosaic in report["mosaics"][:SHOWN_PAIRS]],
        report=report,
        shown_pairs=SHOWN_PAIRS,
        shown_problems=SHOWN_PROBLEMS,
        grid=GRID,
        version=version("dentalgemma"),
    )
    path.write_text(page, encoding="utf-8")


def _describe_source(source: Mapping, content: SourceContent) -> dict:
    crops = _cut_crops(content.records)
    labels = [
        {
            "name": label,
            **counts,
            "expected": source["expected_images"].get(label),
            "raw": [raw for raw, entry in source["labels"].items() if entry["name"] == label],
            "places": source["places"].get(label),
            "cells": list(_heat_cells(source["places"][label]["heat"])) if label in source["places"] else [],
            "crops": crops.get(label, []),
        }
        for label, counts in source["classes"].items()
    ]
    order = {entry["name"]: place for place, entry in reversed(list(enumerate(source["labels"].values())))}
    labels.sort(key=lambda label: order.get(label["name"], len(order)))
    missing = [label for label in source["expected_images"] if label not in source["classes"]]
    return {**source, "label_rows": labels, "never_seen": missing, "problem_groups": _group_problems(source)}


def _group_problems(source: Mapping) -> list[dict]:
    groups: dict[tuple[str, str], list[Mapping]] = defaultdict(list)
    for problem in source["problems"]:
        groups[problem["severity"], problem["code"]].append(problem)
    order = sorted(groups, key=lambda key: (SEVERITIES.index(key[0]), key[1]))
    return [{"severity": severity, "code": code, "problems": groups[severity, code]} for severity, code in order]


def _heat_cells(heat: Sequence[Sequence[int]]) -> Iterator[dict]:
    """The cells of a heat map that hold anything, with their place on the grid and their share of the fullest."""
    fullest = max(map(max, heat))
    for row, counts in enumerate(heat):
        for column, count in enumerate(counts):
            if count:
                yield {"x": column, "y": row, "count": count, "share": round(0.15 + 0.85 * count / fullest, 2)}


def _cut_crops(records: Iterable[ImageRecord]) -> dict[str, list[dict]]:
    """Some findings of each label with what surrounds them, as many images as can be; the choice is the same each time.

    Findings without a shape are shown as their whole image.
    """
    by_label: dict[str, list[tuple[str, Finding, ImageRecord]]] = defaultdict(list)
    for record in records:
        if record.image_id:
            for finding in record.findings:
                key = hashlib.sha256(f"{record.image_id}/{finding.finding_id}".encode()).hexdigest()
                by_label[finding.label].append((key, finding, record))
    wanted: dict[Path, list[tuple[str, Finding, ImageRecord]]] = defaultdict(list)
    for label, items in sorted(by_label.items()):
        for finding, record in _from_many_images(sorted(items, key=lambda item: item[0])):
            wanted[record.path].append((label, finding, record))
    crops: dict[str, list[dict]] = defaultdict(list)
    for path, items in wanted.items():
        try:
            pixels = measure_pixels(path)[1]
        except ImageError:
            continue
        for label, finding, record in items:
            title = f"{record.path.name} {finding.where}"
            crops[label].append({"uri": _as_uri(_cut_crop(pixels, finding)), "title": title})
    return crops


def _from_many_images(items: Sequence[tuple[str, Finding, ImageRecord]]) -> list[tuple[Finding, ImageRecord]]:
    """The first findings, one of an image before any second one."""
    seen: dict[str, int] = defaultdict(int)
    turns = []
    for place, (_, finding, record) in enumerate(items):
        turns.append((seen[record.image_id or ""], place, finding, record))
        seen[record.image_id or ""] += 1
    return [(finding, record) for _, _, finding, record in sorted(turns, key=lambda turn: turn[:2])[:CROPS]]


def _cut_crop(pixels: Image.Image, finding: Finding) -> Image.Image:
    """A square around a finding, with its outline; as high and wide as twice the finding, and a tenth of the image."""
    if finding.bounds is None:
        return _shrink(pixels, CROP_SIDE)
    width, height = pixels.size
    left, top, right, bottom = finding.bounds
    side = max(2 * (right - left) * width, 2 * (bottom - top) * height, 0.1 * max(width, height))
    x, y = (left + right) / 2 * width - side / 2, (top + bottom) / 2 * height - side / 2
    crop = pixels.crop((round(x), round(y), round(x + side), round(y + side))).resize((CROP_SIDE, CROP_SIDE))
    pen = ImageDraw.Draw(crop)
    scale = CROP_SIDE / side
    for ring in finding.parts:
        points = [((px * width - x) * scale, (py * height - y) * scale) for px, py in ring]
        if len(points) == 1:
            (px, py) = points[0]
            pen.ellipse((px - 5, py - 5, px + 5, py + 5), outline="#ffd23f", width=2)
        else:
            closed = [*points, points[0]] if finding.shape != "polyline" else points
            pen.line(closed, fill="#ffd23f", width=2)
    return crop


def _show_pair(pair: Mapping) -> dict:
    return {**pair, "images": [{**place, "uri": _thumbnail(Path(place["path"]))} for place in pair["images"]]}


def _show_mosaic(mosaic: Mapping) -> dict:
    return {
        **mosaic,
        "uri": _thumbnail(Path(mosaic["images"][0]["path"])),
        "shows": [{**place, "uri": _thumbnail(Path(place["path"]))} for place in mosaic["shows"]],
    }


def _thumbnail(path: Path) -> str:
    return _as_uri(_shrink(measure_pixels(path)[1], THUMBNAIL_SIDE))


def _shrink(pixels: Image.Image, side: int) -> Image.Image:
    small = pixels.copy()
    small.thumbnail((side, side))
    return small


def _as_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=72)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
