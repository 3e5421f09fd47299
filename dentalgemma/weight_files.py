"""Safetensors files, read and written piece by piece: a model of any size passes through a few megabytes.

Plain reads, no memory map: the pages of a map count as memory of the process, and a whole model would.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from data_builders.records import InputError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PIECE = 2**18  # entries read at a time
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: `start` in bytes from the beginning of the file."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """How many rows a matrix has; anything else counts as rows of one piece each, or a single row."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def width(self) -> int:
        return self.count // self.rows if self.rows else 0

    def pieces(self) -> Iterator[tuple[int, int]]:
        """First and last row of each piece that is read at once."""
        step = max(1, PIECE // max(1, self.width))
        return ((first, min(first + step, self.rows)) for first in range(0, self.rows, step))


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file and what its header says; `tensors` in the order of their data."""

    path: Path
    metadata: Mapping[str, str] | None
    tensors: Mapping[str, Stored]

    def read_rows(self, stored: Stored, first: int, last: int) -> torch.Tensor:
        """Rows `first` to `last` as a tensor of (rows, width)."""
        size = stored.dtype.itemsize
        with self.path.open("rb", buffering=0) as file:
            file.seek(stored.start + first * stored.width * size)
            data = _read_exactly(file, (last - first) * stored.width * size, self.path)
        if not data:
            return torch.empty(last - first, stored.width, dtype=stored.dtype)
        return torch.frombuffer(data, dtype=stored.dtype).view(last - first, stored.width)

    def read(self, key: str) -> torch.Tensor:
        """A whole tensor."""
        stored = self.tensors[key]
        return self.read_rows(stored, 0, stored.rows).view(stored.shape)


def open_weights(path: Path) -> WeightFile:
    """Read the header of a safetensors file.

    Raises:
        InputError: when it is none, is cut short, or stores numbers in a form that is not plain.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no safetensors file: {error}") from error
    metadata = header.pop("__metadata__", None)
    tensors = []
    for key, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise InputError(f"{path}: {key} is stored as {entry['dtype']}; a merge takes 16-bit or 32-bit weights")
        start = 8 + length + entry["data_offsets"][0]
        tensors.append(Stored(key, DTYPES[entry["dtype"]], tuple(entry["shape"]), start))
    tensors.sort(key=lambda stored: stored.start)
    if tensors and tensors[-1].start + tensors[-1].count * tensors[-1].dtype.itemsize > path.stat().st_size:
        raise InputError(f"{path} is cut short: {tensors[-1].key} is not all there")
    return WeightFile(path, metadata, {stored.key: stored for stored in tensors})


def open_model(folder: Path) -> list[WeightFile]:
    """The weight files of a model folder, as its index names them.

    Raises:
        InputError: when there are none.
    """
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return [open_weights(folder / name) for name in dict.fromkeys(index["weight_map"].values())]
    if not (folder / SINGLE).is_file():
        raise InputError(f"{folder} holds no weights ({SINGLE} or {INDEX})")
    return [open_weights(folder / SINGLE)]


def write_header(file: BinaryIO, tensors: list[Stored], metadata: Mapping[str, str] | None) -> None:
    """Write the header of a file whose tensors will follow in this order; their `start` is left out of account."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for stored in tensors:
        end = offset + stored.count * stored.dtype.itemsize
        header[stored.key] = {
            "dtype": NAMES[stored.dtype],
            "shape": list(stored.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def to_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor as they stand in a file, without a copy."""
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def _read_exactly(file: BinaryIO, size: int, path: Path) -> bytearray:
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        got = file.readinto(view[done:])
        if not got:
            raise InputError(f"{path} is cut short")
        done += got
    return data
