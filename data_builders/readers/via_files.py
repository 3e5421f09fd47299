"""The four files that VIA writes, brought to one form."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from data_builders.readers.files import MAX_BYTES, escape_surrogates, load_json, read_text, repeated_keys_problem
from data_builders.readers.geometry import BadAnnotation
from data_builders.records import Problem

Options = Mapping[str, Mapping[str, str]]  # attribute → option id → its text
HEADER = "filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,region_attributes"


@dataclass(slots=True)
class Region:
    """One region as it stands in the file; `shape` and `attributes` should be mappings."""

    line: int | str
    number: str
    shape: object
    attributes: object


@dataclass(slots=True)
class ViaImage:
    """One image as it stands in the file."""

    line: int | str
    file_name: object
    regions: list[Region] = field(default_factory=list)


@dataclass
class ViaFile:
    """What a file says, whichever of VIA's forms it has."""

    images: list[ViaImage]
    options: Options
    problems: list[Problem]


def load_via(path: Path) -> ViaFile:
    """Read a file that VIA wrote; raise BadAnnotation with code `not_via` for any other."""
    return _load_csv(path) if path.suffix.lower() == ".csv" else _load_json(path)


def _load_json(path: Path) -> ViaFile:
    document = load_json(path)
    value, prefix, options = document.value, "", {}
    if isinstance(value, dict) and "_via_img_metadata" in value:
        options = _read_options(value.get("_via_attributes"))
        value, prefix = value["_via_img_metadata"], "/_via_img_metadata"
    elif not isinstance(value, dict) or not any(
        isinstance(entry, dict) and "regions" in entry for entry in value.values()
    ):
        raise BadAnnotation(
            "not_via", "is not VIA: it lacks `_via_img_metadata`, or images with `filename` and `regions`"
        )
    if not isinstance(value, dict):
        raise BadAnnotation("not_via", "is not VIA: `_via_img_metadata` is no mapping")
    images, problems = [], list(repeated_keys_problem(path, document))
    for key, entry in value.items():
        pointer = f"{prefix}/{_escape(key)}"
        regions = entry.get("regions", []) if isinstance(entry, dict) else None
        if not isinstance(regions, (dict, list)):
            problems.append(Problem("bad_annotation", "error", path, pointer, "is no image with `regions`"))
            continue
        image = ViaImage(pointer, entry.get("filename"))
        for index, region in regions.items() if isinstance(regions, dict) else enumerate(regions):
            region = region if isinstance(region, dict) else {}
            place = f"{pointer}/regions/{index if type(index) is int else _escape(index)}"
            image.regions.append(
                Region(place, place, region.get("shape_attributes"), region.get("region_attributes", {}))
            )
        images.append(image)
    return ViaFile(images, options, problems)


def _load_csv(path: Path) -> ViaFile:
    rows = csv.reader(io.StringIO(read_text(path), newline=""))
    images: dict[str, ViaImage] = {}
    problems: list[Problem] = []
    limit = csv.field_size_limit(MAX_BYTES)  # an outline of 10,000 points is longer than csv's own limit
    try:
        if [name.strip().lstrip("#") for name in next(rows, [])] != HEADER.split(","):
            raise BadAnnotation("not_via", "is not VIA: its first line does not name the seven columns of a VIA CSV")
        for row in rows:
            if row:
                _add_row(images, row, path, rows.line_num, problems)
    except csv.Error as error:
        message = f"is not valid CSV: {error}; the rest of the file was not read"
        problems.append(Problem("bad_csv", "error", path, rows.line_num, message))
    finally:
        csv.field_size_limit(limit)
    return ViaFile(list(images.values()), {}, problems)


def _add_row(images: dict[str, ViaImage], row: list[str], path: Path, line: int, problems: list[Problem]) -> None:
    name = ",".join(row[:-6])  # VIA does not quote file names
    image = images.setdefault(name, ViaImage(line, name)) if name else None
    try:
        if image is None:
            raise ValueError(f"expected 7 columns; got {len(row)}")
        shape, attributes = json.loads(row[-2]), json.loads(row[-1])
    except (ValueError, RecursionError) as error:
        problems.append(Problem("bad_annotation", "error", path, line, f"a row that cannot be read: {error}"))
        return
    if shape != {}:  # an image without regions has one row with an empty shape
        image.regions.append(Region(line, str(line), shape, attributes))


def _read_options(attributes: object) -> Options:
    of_regions = attributes.get("region") if isinstance(attributes, dict) else None
    if not isinstance(of_regions, dict):
        return {}
    return {
        name: {key: text for key, text in attribute["options"].items() if isinstance(text, str)}
        for name, attribute in of_regions.items()
        if isinstance(attribute, dict) and isinstance(attribute.get("options"), dict)
    }


def _escape(key: str) -> str:
    return escape_surrogates(key.replace("~", "~0").replace("/", "~1"))
