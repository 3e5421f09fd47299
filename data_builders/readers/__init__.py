"""Annotation files to records: one function per format, each a generator of `ImageRecord` and `Problem`."""

from data_builders.readers.cases import read_cases
from data_builders.readers.class_folders import read_class_folders
from data_builders.readers.coco import read_coco
from data_builders.readers.dota import read_dota
from data_builders.readers.quarantine import Reader
from data_builders.readers.via import read_via
from data_builders.readers.yolo import read_yolo

READERS: dict[str, Reader] = {
    "yolo": read_yolo,
    "dota": read_dota,
    "coco": read_coco,
    "via": read_via,
    "class_folders": read_class_folders,
}

__all__ = ["READERS", "Reader", "read_cases", "read_class_folders", "read_coco", "read_dota", "read_via", "read_yolo"]
