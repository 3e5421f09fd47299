"""The names of pictures: SHA-256 of their stored bytes, never what a dataset calls them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset

from data_builders.images import UNREADABLE
from dentalgemma.training.checkpoints import said_once
from dentalgemma.training.data import DatasetError, image_source, name_row

BLOCK = 64  # rows; those of one picture mostly follow one another, so that a block rarely begins within them


def name_pictures(dataset: Dataset) -> list[list[str]]:
    """The names of each row's pictures, their bytes hashed in place and in several threads.

    Where several processes run, all call it together and each hashes its share.

    Raises:
        DatasetError: for a picture without bytes whose file cannot be read.
    """
    if "images" not in dataset.column_names:
        return [[]] * len(dataset)
    numbers = _stored_numbers(dataset)
    distinct = sorted(set(numbers))
    column = dataset.data.column("images")
    state = _state_if_alike([len(distinct), hash(tuple(distinct)), column.nbytes])
    by_number = dict(zip(distinct, _name_rows(column, distinct, state), strict=True))
    for place, number in enumerate(numbers):
        if isinstance(fault := by_number[number], str):
            error = DatasetError(f"{name_place(dataset, place)}: {fault}")
            raise said_once(error, state) if state else error
    return [by_number[number] for number in numbers]


def _state_if_alike(facts: list[int]) -> PartialState | None:
    """The processes that can share the work; None for one alone, or where they do not hold the same rows."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    everyone = gather_object([facts])
    return PartialState() if all(others == facts for others in everyone) else None


def _name_rows(column: pa.ChunkedArray, numbers: Sequence[int], state: PartialState | None) -> list[list[str] | str]:
    """The names of stored rows, in their order; for a row that cannot be read, why."""
    blocks = [numbers[start : start + BLOCK] for start in range(0, len(numbers), BLOCK)]
    rank, processes = (state.process_index, state.num_processes) if state else (0, 1)
    with ThreadPoolExecutor(count_threads()) as pool:
        shares = [list(pool.map(lambda block: _name_block(column, block), blocks[rank::processes]))]
    if processes > 1:
        shares = gather_object(shares)
    return [names for number in range(len(blocks)) for names in shares[number % processes][number // processes]]


def _stored_numbers(dataset: Dataset) -> Sequence[int]:
    return range(len(dataset)) if dataset._indices is None else dataset._indices.column(0).to_pylist()


def _name_block(column: pa.ChunkedArray, numbers: Iterable[int]) -> list[list[str] | str]:
    """Names of the pictures of stored rows; equal neighbours are compared, which is faster than hashing them."""
    names: list[list[str] | str] = []
    before: tuple[pa.Buffer, str] | None = None
    for number in numbers:
        own = []
        try:
            for content in _contents(column[number]):
                if before is None or content.size != before[0].size or not content.equals(before[0]):
                    before = content, hashlib.sha256(content).hexdigest()
                own.append(before[1])
            names.append(own)
        except UNREADABLE as error:
            names.append(f"image {len(own) + 1} cannot be read: {error}")  # not every error travels to another process
    return names


def _contents(row: pa.ListScalar) -> Iterator[pa.Buffer]:
    """The encoded pictures of a row, in place where the dataset holds their bytes."""
    pictures = row.values
    for index in range(len(pictures or ())):
        content = pictures.field("bytes")[index]
        if content.is_valid:
            yield content.as_buffer()
        else:
            yield pa.py_buffer(Path(image_source(pictures[index].as_py())).read_bytes())


def name_place(dataset: Dataset, place: int) -> str:
    """What a message calls a row: its `row_id`, or where it lies in the split as stored."""
    row = dataset.select_columns("row_id")[place] if "row_id" in dataset.column_names else {}
    if row.get("row_id"):
        return name_row(row)
    return f"{name_row(row)} (row {stored_number(dataset, place)} of the split, counted from 0)"


def stored_number(dataset: Dataset, place: int) -> int:
    """Where a row is stored; its place is another one where rows were chosen or shuffled."""
    return place if dataset._indices is None else dataset._indices.column(0)[place].as_py()


def count_threads() -> int:
    """Threads of this process, where those on one machine share its cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
