"""A trained detector's boxes on images that nobody labelled, as a source of `origin: model`.

Ultralytics is AGPL-3.0 and an optional extra: it is imported by the one function that loads a model, and nowhere else.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from PIL import Image
from rich.console import Console
from rich.progress import track

from data_builders.images import ImageError, find_images, read_stored, to_rgb
from data_builders.records import InputError, Modality, Problem
from data_builders.sources import load_vocabulary

FACTS = "detection.json"
TASKS = ("detect", "segment", "obb")


class DetectionError(InputError):
    """A detection that cannot be run as asked; the message says what to do."""


class Detected(NamedTuple):
    """How many images were looked at now, how many were done before, the boxes found now, and what went wrong."""

    images: int
    done_before: int
    boxes: int
    problems: tuple[Problem, ...]


def detect(
    weights: Path,
    images: Path,
    out: Path,
    *,
    confidence: float = 0.25,
    modality: Modality | None = None,
    model_license: str | None = None,
    progress: bool = True,
) -> Detected:
    """Look for objects in every image below the folder `images` and write YOLO labels with confidences to `out`.

    `weights` is a `.pt` file of Ultralytics: detect, segment or obb. `out` gets `labels/`, `data.yaml`,
    `detection.json` (which weights, which confidence) and a `sources.yaml` whose class map is for the user to complete.
    The images stay where they are. An image that has a label file is not looked at again, so a run that was stopped is
    continued by the same command.

    Raises:
        DetectionError: without Ultralytics, weights or images, or where `out` holds boxes of another model.
    """
    weights, images, out = Path(weights), Path(images), Path(out)
    if not weights.is_file():
        raise DetectionError(f"{weights} is no file; name the .pt file of a trained Ultralytics model")
    if not 0 <= confidence <= 1:
        raise DetectionError(f"confidence is between 0 and 1, not {confidence}")
    problems: list[Problem] = []
    labels = _label_files(images, out / "labels", problems)
    if not labels:
        raise DetectionError(f"{images} holds no image files")
    model, facts = _load_model(weights)
    where = Path(os.path.relpath(images.resolve(), out.resolve())).as_posix()
    _claim_folder(out, {**facts, "images": where, "confidence": confidence, "model_license": model_license})
    _write_whole(out / "data.yaml", yaml.safe_dump({"names": facts["names"]}, sort_keys=False, allow_unicode=True))
    if not (out / "sources.yaml").exists():  # the user may have completed it
        stub = _sources_yaml(images, out, facts["names"], confidence, modality, model_license)
        _write_whole(out / "sources.yaml", stub)
    todo = [path for path in labels if not labels[path].exists()]
    looked_at = boxes = 0
    for path in track(todo, "Detecting", console=Console(stderr=True), disable=not progress):
        try:
            pixels = _decode(path)
        except ImageError as error:
            problems.append(Problem("image_unreadable", "error", path, None, f"{error}; not looked at"))
            continue
        # One at a time: when suppressing overlaps takes too long, Ultralytics returns the rest of a batch empty.
        (result,) = model.predict(source=[pixels], conf=confidence, stream=False, save=False, verbose=False)
        lines = label_lines(result)
        _write_whole(labels[path], "".join(f"{line}\n" for line in lines))
        looked_at, boxes = looked_at + 1, boxes + len(lines)
    return Detected(looked_at, len(labels) - len(todo), boxes, tuple(problems))


def label_lines(result: Any) -> list[str]:
    """The label lines of one `Results` of Ultralytics: class, box, corners or outline in fractions, confidence."""
    boxes = result.boxes if result.obb is None else result.obb
    if boxes is None or not len(boxes):
        return []
    if result.obb is not None:
        shapes = boxes.xyxyxyxyn.reshape(-1, 8).tolist()
    else:
        shapes = boxes.xywhn.tolist()
    if result.masks is not None:  # a mask of a pixel or two has no outline: its box stands for it
        outlines = result.masks.xyn
        shapes = [
            outline.reshape(-1).tolist() if len(outline) > 2 else box
            for outline, box in zip(outlines, shapes, strict=True)
        ]
    return [
        " ".join([str(int(class_id)), *(f"{value:.7f}" for value in shape), f"{confidence:.6f}"])
        for class_id, shape, confidence in zip(boxes.cls.tolist(), shapes, boxes.conf.tolist(), strict=True)
    ]


def _load_model(weights: Path) -> tuple[Any, dict]:
    """The model, and what tells its boxes from those of another."""
    try:
        import ultralytics
    except ImportError as error:
        raise DetectionError(f'detection needs ultralytics ({error}): pip install "dentalgemma[yolo]"') from None
    try:
        model = ultralytics.YOLO(str(weights))
    except Exception as error:  # a file that is no checkpoint raises whatever its unpickling does
        raise DetectionError(f"{weights} cannot be loaded as an Ultralytics model: {error}") from error
    if model.task not in TASKS:
        raise DetectionError(f"{weights} is a model for {model.task!r}; boxes come from {', '.join(TASKS)}")
    facts = {
        "weights": weights.name,
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "task": model.task,
        "names": {int(class_id): str(name) for class_id, name in model.names.items()},
        "ultralytics": ultralytics.__version__,
    }
    return model, facts


def _claim_folder(out: Path, facts: Mapping) -> None:
    """Record what finds the boxes; boxes of two models or thresholds never lie in one folder."""
    stated = json.loads(json.dumps(facts))  # keys as JSON has them
    path = out / FACTS
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        differs = [key for key in ("weights_sha256", "images", "confidence") if before.get(key) != stated[key]]
        if differs:
            raise DetectionError(f"{out} holds boxes found with other {' and '.join(differs)}; choose another --out")
        return
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise DetectionError(f"{out} is not empty and holds no {FACTS}; choose a new folder")
    out.mkdir(parents=True, exist_ok=True)
    _write_whole(path, json.dumps(stated, indent=2, ensure_ascii=False) + "\n")


def _label_files(images: Path, labels: Path, problems: list[Problem]) -> dict[Path, Path]:
    """The label file of each image; of two images that would share one, the second is left out."""
    owners: dict[Path, Path] = {}
    for path in find_images(images):
        target = (labels / path.relative_to(images)).with_suffix(".txt")
        if target in owners:
            message = f"would share a label file with {owners[target].name}; rename one of them. Not looked at"
            problems.append(Problem("shared_label_file", "error", path, None, message))
        else:
            owners[target] = path
    return {path: target for target, path in owners.items()}


def _decode(path: Path) -> Image.Image:
    """The pixels that a dataset holds of this image; Ultralytics reads 16-bit greys another way, and no DICOM."""
    try:
        with Image.open(io.BytesIO(read_stored(path).content)) as image:
            return to_rgb(image)
    except (OSError, ValueError, SyntaxError) as error:  # an ImageError is a ValueError
        raise ImageError(f"cannot be decoded: {error}") from None


def _write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _sources_yaml(
    images: Path,
    out: Path,
    names: Mapping[int, str],
    confidence: float,
    modality: Modality | None,
    model_license: str | None,
) -> str:
    """A sources file for the boxes. A detector's class is mapped only where the vocabulary has its very name."""
    common = _common_folder(images, out)
    vocabulary = load_vocabulary()
    classes = [
        f"{class_id}: {name}"
        if name in vocabulary
        else f"# {class_id}:   the detector calls it {json.dumps(name, ensure_ascii=False)}"
        for class_id, name in names.items()
    ]
    kind = modality or "         # panoramic | intraoral_photo | periapical | bitewing"
    detector = "is not stated" if model_license is None else f"is {json.dumps(model_license, ensure_ascii=False)}"
    lines = [
        "# What a detector found. Map each of its classes to a name of the vocabulary, or to null to ignore it.",
        "sources:",
        "  - name: detected",
        "    reader: yolo",
        f"    root: {_relative(common, out)}",
        f"    images: {_relative(images, common)}",
        f"    labels: {_relative(out / 'labels', common)}",
        f"    modality: {kind}",
        "    origin: model",
        f"    min_confidence: {confidence}",
        f"    license:          # of the images; the detector's {detector}",
        "    classes:",
        *(f"      {line}" for line in classes),
    ]
    return "\n".join(lines) + "\n"


def _common_folder(images: Path, out: Path) -> Path:
    try:
        return Path(os.path.commonpath([images.resolve(), (out / "labels").resolve()]))
    except ValueError:
        raise DetectionError(f"{images} and {out} lie on different drives; choose an --out beside the images") from None


def _relative(path: Path, start: Path) -> str:
    """A path for YAML, in quotes: relative, so that both folders can move together."""
    return json.dumps(Path(os.path.relpath(path.resolve(), start.resolve())).as_posix(), ensure_ascii=False)
