"""Annotation files to records: one function per format, each a generator of `ImageRecord` and `Problem`."""

from collections.abc import Callable, Iterator

from data_builders.readers.cases import read_cases
from data_builders.readers.class_folders import read_class_folders
from data_builders.readers.coco import read_coco
from data_builders.readers.dota import read_dota
from data_builders.readers.via import read_via
from data_builders.readers.yolo import read_yolo
from data_builders.records import ImageRecord, Problem
from data_builders.sources import Source

Reader = Callable[[Source], Iterator[ImageRecord | Problem]]
READERS: dict[str, Reader] = {
    "yolo": read_yolo,
    "dota": read_dota,
    "coco": read_coco,
    "via": read_via,
    "class_folders": read_class_folders,
}

__all__ = ["READERS", "Reader", "read_cases", "read_class_folders", "read_coco", "read_dota", "read_via", "read_yolo"]
