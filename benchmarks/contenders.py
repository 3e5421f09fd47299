"""One reading of one layout by one program, in a process of its own: what `read_annotations.py` starts.

    python benchmarks/contenders.py ours coco_boxes SET_FOLDER

prints the seconds, the growth of memory and the number of annotations as JSON. Only what a contender needs is imported,
so that the peers may live in another Python environment than this project.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

TERMS = ("caries", "infection", "impacted_tooth", "fractured_tooth", "broken_down_crown_or_root", "healthy_tooth")
COCO_FILE = "_annotations.coco.json"
VIA_FILE = "via_region_data.json"
Reading = Callable[[Path], object]  # takes the folder of one layout; what it returns is kept until the peak is taken
Counting = Callable[[Any], int]


def measure(contender: str, layout: str, folder: Path) -> dict:
    """Read once; the time and the memory are those of the reading alone, with all modules imported before."""
    prepare, package = CONTENDERS[contender]
    read, count = prepare(layout)
    gc.collect()
    memory = peak_memory()
    cpu, wall = time.process_time(), time.perf_counter()
    result = read(folder / layout)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    memory = peak_memory() - memory
    facts = {"cpu_seconds": cpu, "wall_seconds": wall, "memory_mb": memory, "count": count(result)}
    facts |= {"version": metadata.version(package)} if package else {}
    return facts | {"size_seconds": SIZE_CLOCK.seconds} if contender == "ours" else facts


def peak_memory() -> float:
    """The most memory that this process ever held, in MB."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss also counts what the parent held before it became this program
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    unit = 1024**2 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


class SizeClock:
    """Adds up the time that is spent in `read_size`."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, read_size: Callable) -> Callable:
        def timed(path: object) -> object:
            start = time.process_time()
            try:
                return read_size(path)
            finally:
                self.seconds += time.process_time() - start

        return timed


SIZE_CLOCK = SizeClock()


def prepare_floor(layout: str) -> tuple[Reading, Counting]:
    """What nobody can do without: `json.load`, or splitting the lines and making numbers of their fields."""
    _import_ours()  # so that both start from the same memory
    if layout.startswith("yolo"):
        return lambda folder: _split_lines(folder / "labels", slice(None)), _count_all
    if layout == "dota":
        return lambda folder: _split_lines(folder / "labelTxt", slice(8)), _count_all
    if layout.startswith("coco"):
        return lambda folder: _load_json(folder / COCO_FILE), lambda document: len(document["annotations"])
    return lambda folder: _load_json(folder / VIA_FILE), lambda document: sum(
        len(image["regions"]) for image in document.values()
    )


def _load_json(path: Path) -> object:
    with path.open(encoding="utf-8") as file:
        return json.load(file)


def _split_lines(folder: Path, numbers: slice) -> list[list[list[float]]]:
    read = []
    for name in os.listdir(folder):
        with open(f"{folder}/{name}", encoding="utf-8") as file:
            lines = [line.split()[numbers] for line in file if not line.startswith(("imagesource", "gsd"))]
            read.append([[float(field) for field in fields] for fields in lines])
    return read


def _count_all(lists: list[list]) -> int:
    return sum(map(len, lists))


def _import_ours() -> None:
    import data_builders.readers  # noqa: F401


def prepare_ours(layout: str) -> tuple[Reading, Counting]:
    """Records and problems of every annotation, held in memory; opens the header of each image but for YOLO."""
    from annotation_set import NAMES

    from data_builders.readers import READERS, drafts
    from data_builders.records import ImageRecord
    from data_builders.sources import Source

    reader = layout.split("_")[0].rstrip("12")
    classes = dict(enumerate(TERMS)) if reader == "yolo" else dict(zip(NAMES, TERMS, strict=True))
    drafts.read_size = SIZE_CLOCK.wrap(drafts.read_size)

    def read(folder: Path) -> list:
        source = Source(name=layout, reader=reader, root=folder, classes=classes, modality="panoramic")
        return list(READERS[reader](source))

    return read, lambda items: sum(len(item.findings) for item in items if isinstance(item, ImageRecord))


def prepare_sizes(_: str) -> tuple[Reading, Counting]:
    """The size of each image as displayed, by `read_size`."""
    from data_builders.images import read_size

    return lambda folder: [read_size(Path(entry.path)) for entry in os.scandir(folder)], len


def prepare_pillow(_: str) -> tuple[Reading, Counting]:
    """The same size by Pillow; that of a PNG without its orientation, to find which Pillow decodes it."""
    from PIL import Image

    def read(path: str) -> tuple[int, int]:
        with Image.open(path) as image:
            sideways = image.format == "JPEG" and image.getexif().get(0x0112) in (5, 6, 7, 8)
            return image.size[::-1] if sideways else image.size

    return lambda folder: [read(entry.path) for entry in os.scandir(folder)], len


def prepare_pycocotools(layout: str) -> tuple[Reading, Counting]:
    """Loads the JSON and indexes it."""
    from pycocotools.coco import COCO

    return lambda folder: COCO(folder / COCO_FILE), lambda coco: len(coco.anns)


def prepare_globox(layout: str) -> tuple[Reading, Counting]:
    """Boxes alone; of YOLO it opens each image for its size, of COCO none."""
    from globox import AnnotationSet

    def read(folder: Path) -> AnnotationSet:
        if layout.startswith("coco"):
            return AnnotationSet.from_coco(folder / COCO_FILE)
        return AnnotationSet.from_yolo_v5(folder / "labels", image_folder=folder / "images")

    return read, lambda annotations: sum(len(annotation.boxes) for annotation in annotations)


def prepare_supervision(layout: str) -> tuple[Reading, Counting]:
    """Opens each image for its size in YOLO, none in COCO; turns every outline into a mask of the image's size."""
    from supervision import DetectionDataset

    def read(folder: Path) -> DetectionDataset:
        if layout.startswith("coco"):
            return DetectionDataset.from_coco(str(folder), str(folder / COCO_FILE))
        paths = (str(folder / part) for part in ("images", "labels", "data.yaml"))
        return DetectionDataset.from_yolo(*paths, is_obb=layout == "yolo_obb")

    return read, lambda dataset: sum(len(found) for found in dataset.annotations.values())


def prepare_ultralytics(layout: str) -> tuple[Reading, Counting]:
    """The check of its training: opens and verifies each image, reads its label file as boxes and outlines."""
    from ultralytics.data.utils import verify_image_label

    def read(folder: Path) -> list:
        verified = []
        for image in sorted(os.listdir(folder / "images")):
            labels = f"{folder}/labels/{image.removesuffix('.jpg')}.txt"
            verified.append(
                verify_image_label((f"{folder}/images/{image}", labels, "", False, len(TERMS), 0, 0, False))
            )
        return verified

    return read, lambda verified: sum(len(item[1]) for item in verified if item[1] is not None)


CONTENDERS = {
    "floor": (prepare_floor, None),
    "ours": (prepare_ours, None),
    "read_size": (prepare_sizes, None),
    "Pillow": (prepare_pillow, "pillow"),
    "pycocotools": (prepare_pycocotools, "pycocotools"),
    "globox": (prepare_globox, "globox"),
    "supervision": (prepare_supervision, "supervision"),
    "ultralytics": (prepare_ultralytics, "ultralytics"),
}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2], Path(sys.argv[3]))))
