"""Phantoms on disk: one truth, written in every annotation format that the readers take."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

from data_builders.dentition import PERMANENT
from data_builders.phantom import CONDITIONS, HEIGHT, WIDTH, Phantom, make_phantoms
from data_builders.phantom_cases import write_cases
from data_builders.records import Finding, Point

FORMATS = ("yolo", "yolo_obb", "teeth", "dota", "coco", "via1", "via2", "via_csv", "class_folders")
HEALTHY_FOLDER = "no_finding"


def write_phantoms(
    folder: Path,
    *,
    count: int,
    seed: int,
    cases: int = 0,
    formats: Sequence[str] = FORMATS,
    families: Sequence[str] = (),
    progress: bool = True,
) -> None:
    """Write `count` phantoms to `folder` with their annotations in `formats`, and a sources file for each format.

    `sources.yaml` names the first format; `families` narrows what is asked about it. With `cases` so many clinical
    cases go to `cases/`, with `cases.yaml` beside. The image files of the formats are hard links where the disk allows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = folder / "images"
    pictures.mkdir(exist_ok=True)
    phantoms = []
    made = make_phantoms(count, seed=seed)
    for phantom in track(made, "Drawing", total=count, console=Console(stderr=True), disable=not progress):
        phantom.image.save(pictures / f"{phantom.name}.jpg", quality=90)
        phantoms.append(phantom)
    for name in formats:
        WRITERS[name](folder / name, phantoms, pictures)
        (folder / f"sources_{name}.yaml").write_text(_sources_yaml(name, seed, families), encoding="utf-8")
    (folder / "sources.yaml").write_text(_sources_yaml(formats[0], seed, families), encoding="utf-8")
    if cases:
        write_cases(folder / "cases" / "cases.jsonl", count=cases, seed=seed)
        source = "{name: phantom_cases, reader: cases, root: cases, license: Apache-2.0}"
        text = f"# Made-up cases: no patient, no licence needed.\nseed: {seed}\nsources:\n  - {source}\n"
        (folder / "cases.yaml").write_text(text, encoding="utf-8")


def _sources_yaml(name: str, seed: int, families: Sequence[str]) -> str:
    reader = {"yolo_obb": "yolo", "teeth": "yolo", "via1": "via", "via2": "via", "via_csv": "via"}.get(name, name)
    if name == "teeth":
        meaning = "    classes: fdi\n    exhaustive: [tooth]\n"
    else:
        by_id = reader == "yolo"
        labels = {number if by_id else label: label for number, label in enumerate(CONDITIONS)}
        if name == "class_folders":
            labels[HEALTHY_FOLDER] = "null"
        pairs = ", ".join(f"{raw}: {label}" for raw, label in labels.items())
        meaning = f"    classes: {{{pairs}}}\n    exhaustive: [{', '.join(CONDITIONS)}]\n"
    asked = f"families: [{', '.join(families)}]\n" if families else ""
    return (
        f"# Synthetic panoramics: no patient, no licence needed.\nseed: {seed}\nlanguages: [en]\n{asked}sources:\n"
        f"  - name: phantom_{name}\n    reader: {reader}\n    root: {name}\n    modality: panoramic\n"
        f"{meaning}    license: Apache-2.0\n"
    )


def _yolo(folder: Path, phantoms: Iterable[Phantom], pictures: Path) -> None:
    def lines(phantom: Phantom) -> Iterable[str]:
        return (_yolo_box(CONDITIONS.index(finding.label), finding) for finding in phantom.findings)

    _write_yolo(folder, phantoms, pictures, CONDITIONS, lines)


def _yolo_obb(folder: Path, phantoms: Iterable[Phantom], pictures: Path) -> None:
    def line(finding: Finding) -> str:
        corners = " ".join(f"{x:.7f} {y:.7f}" for x, y in finding.parts[0])
        return f"{CONDITIONS.index(finding.label)} {corners}"

    _write_yolo(folder, phantoms, pictures, CONDITIONS, lambda phantom: map(line, phantom.findings))


def _teeth(folder: Path, phantoms: Iterable[Phantom], pictures: Path) -> None:
    def lines(phantom: Phantom) -> Iterable[str]:
        return (_yolo_box(PERMANENT.index(tooth.tooth or ""), tooth) for tooth in phantom.teeth)

    _write_yolo(folder, phantoms, pictures, PERMANENT, lines)


def _yolo_box(class_id: int, finding: Finding) -> str:
    left, top, right, bottom = _bounds(finding)
    numbers = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
    return f"{class_id} " + " ".join(f"{number:.7f}" for number in numbers)


def _write_yolo(
    folder: Path,
    phantoms: Iterable[Phantom],
    pictures: Path,
    names: Sequence[str],
    lines: Callable[[Phantom], Iterable[str]],
) -> None:
    (folder / "labels").mkdir(parents=True, exist_ok=True)
    for phantom in phantoms:
        _link(pictures, phantom, folder / "images")
        text = "".join(line + "\n" for line in lines(phantom))
        (folder / "labels" / f"{phantom.name}.txt").write_text(text, encoding="utf-8")
    quoted = ", ".join(f"'{name}'" for name in names)
    text = f"path: .\ntrain: images\nval: images\nnc: {len(names)}\nnames: [{quoted}]\n"
    (folder / "data.yaml").write_text(text, encoding="utf-8")


def _dota(folder: Path, phantoms: Iterable[Phantom], pictures: Path) -> None:
    (folder / "labelTxt").mkdir(parents=True, exist_ok=True)
    for phantom in phantoms:
        _link(pictures, phantom, folder / "images")
        lines = ["imagesource:phantom", "gsd:null"]
        for finding in phantom.findings:
            corners = " ".join(f"{x:.4f} {y:.4f}" for x, y in _pixels(finding))
            lines.append(f"{corners} {finding.label} 0")
        (folder / "labelTxt" / f"{phantom.name}.txt").write_text("\n".join(lines), encoding="utf-8")


def _coco(folder: Path, phantoms: Iterable[Phantom], pictures: Path) -> None:
    images, annotations = [], []
    for number, phantom in enumerate(phantoms):
        _link(pictures, phantom, folder)
        images.append({"id": number, "file_name": f"{phantom.name}.jpg", "width": WIDTH, "height": HEIGHT})
        for finding in phantom.findings:
            points = _pixels(finding)
            left, top = min(x for x, _ in points), min(y for _, y in points)
            width, height = max(x for x, _ in points) - left, max(y for _, y in points) - top
            turned = finding.shape == "oriented_box"
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": number,
                    "category_id": CONDITIONS.index(finding.label) + 1,
                    "bbox": [left, top, width, height],
                    "area": width * height,
                    "segmentation": [[value for point in points for value in point]] if turned else [],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": number, "name": label} for number, label in enumerate(CONDITIONS, start=1)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "_annotations.coco.json").write_text(json.dumps(document), encoding="utf-8")


def _via1(folder: Path, phantoms: Iterable[Phantom], pictures: Path) -> None:
    _write_via(folder, phantoms, pictures, lambda regions: {str(n): region for n, region in enumerate(regions)})


def _via2(folder: Path, phantoms: Iterable[Phantom], pictures: Path) -> None:
    _write_via(folder, phantoms, pictures, list)


def _write_via(
    folder: Path, phantoms: Iterable[Phantom], pictures: Path, form: Callable[[Iterable[dict]], object]
) -> None:
    document = {}
    for phantom in phantoms:
        size = _link(pictures, phantom, folder).stat().st_size
        name = f"{phantom.name}.jpg"
        regions = [
            {"shape_attributes": _via_shape(finding), "region_attributes": {"condition": finding.label}}
            for finding in phantom.findings
        ]
        document[f"{name}{size}"] = {"filename": name, "size": size, "file_attributes": {}, "regions": form(regions)}
    (folder / "via_region_data.json").write_text(json.dumps(document), encoding="utf-8")


def _via_csv(folder: Path, phantoms: Iterable[Phantom], pictures: Path) -> None:
    header = "filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,region_attributes"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "via_region_data.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header.split(","))
        for phantom in phantoms:
            size = _link(pictures, phantom, folder).stat().st_size
            start = (f"{phantom.name}.jpg", size, "{}", len(phantom.findings))
            for number, finding in enumerate(phantom.findings):
                label = {"condition": finding.label}
                writer.writerow([*start, number, json.dumps(_via_shape(finding)), json.dumps(label)])
            if not phantom.findings:
                writer.writerow([*start, 0, "{}", "{}"])


def _via_shape(finding: Finding) -> dict:
    points = _pixels(finding)
    xs, ys = [x for x, _ in points], [y for _, y in points]
    if finding.shape == "box":
        return {"name": "rect", "x": xs[0], "y": ys[0], "width": xs[2] - xs[0], "height": ys[2] - ys[0]}
    return {"name": "polygon", "all_points_x": [*xs, xs[0]], "all_points_y": [*ys, ys[0]]}  # VIA closes polygons


def _class_folders(folder: Path, phantoms: Iterable[Phantom], pictures: Path) -> None:
    for name in (*CONDITIONS, HEALTHY_FOLDER):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for phantom in phantoms:
        for label in {finding.label for finding in phantom.findings} or {HEALTHY_FOLDER}:
            _link(pictures, phantom, folder / label)


WRITERS: dict[str, Callable[[Path, Sequence[Phantom], Path], None]] = {
    "yolo": _yolo,
    "yolo_obb": _yolo_obb,
    "teeth": _teeth,
    "dota": _dota,
    "coco": _coco,
    "via1": _via1,
    "via2": _via2,
    "via_csv": _via_csv,
    "class_folders": _class_folders,
}


def _bounds(finding: Finding) -> tuple[float, float, float, float]:
    bounds = finding.bounds
    assert bounds is not None and all(math.isfinite(value) for value in bounds)
    return bounds


def _pixels(finding: Finding) -> list[Point]:
    return [(x * WIDTH, y * HEIGHT) for x, y in finding.parts[0]]


def _link(pictures: Path, phantom: Phantom, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    original, link = pictures / f"{phantom.name}.jpg", folder / f"{phantom.name}.jpg"
    link.unlink(missing_ok=True)
    try:
        os.link(original, link)
    except OSError:
        link.write_bytes(original.read_bytes())
    return link
