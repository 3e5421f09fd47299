"""A dataset folder: parquet that `datasets.load_dataset` and `trl sft` take unchanged, with every image stored once."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from glob import escape
from importlib.metadata import version
from itertools import accumulate, groupby
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import track

from data_builders.chat import SPLITS, Row
from data_builders.records import InputError, Problem

REPORT = "build_report.json"
# What only the user can settle.
BLOCKING = ("class_map_incomplete", "class_map_suggestion", "names_missing", "label_attribute_needed")
ROW_GROUP_BYTES = 32 << 20  # of distinct images; Arrow and parquet hold them several times over while they write
ROW_GROUP_ROWS = 10_000
SHARD_BYTES = 500 << 20
DICTIONARY_LIMIT = 1 << 30  # pyarrow's default of 1 MiB falls back to writing an image once per row
IMAGE_COLUMNS = {"bytes": pa.binary(), "path": pa.string()}  # what `datasets.Image` is in Arrow

File = tuple[str, bytes]  # name, content
ReadImage = Callable[[str], File]  # by image id


class BuildError(InputError):
    """A build that must not go on; the message says what to do."""


def stop_on(problems: Sequence[Problem], why: str = "these problems stop the build") -> None:
    """Raise a BuildError that shows the problems, if there are any."""
    if problems:
        shown = "\n".join(str(problem) for problem in problems[:20])
        more = f"\n… and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise BuildError(f"{why}:\n{shown}{more}")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of `folder` once everything is written; until then an old build stays.

    It is made in a hidden workshop beside `folder`. What a killed build left there is cleared away by the next one,
    which knows it by its lock: the system lets go of that when a process dies, however it dies.

    Raises:
        BuildError: when `folder` holds anything that no build of ours wrote, or cannot be replaced.
    """
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(folder)
    check_replaceable(folder)
    workshop = Path(tempfile.mkdtemp(prefix=f".{folder.name}.build-", dir=folder.parent))
    with FileLock(workshop / "lock"):
        try:
            new = workshop / "new"
            new.mkdir()
            yield new
            if folder.exists():
                folder.rename(workshop / "old")
            new.rename(folder)
        finally:
            _clear(workshop, folder)


def _clear_leftovers(folder: Path) -> None:
    for lock in folder.parent.glob(f".{escape(folder.name)}.build-*/lock"):
        try:
            with FileLock(lock, timeout=0):
                _clear(lock.parent, folder)
        except Timeout:
            continue  # a build that is running


def _clear(workshop: Path, folder: Path) -> None:
    """Remove a workshop; the old dataset goes back if the build ended after it was put aside and before the swap."""
    old = workshop / "old"
    if old.exists() and not folder.exists():
        old.rename(folder)
    shutil.rmtree(workshop, ignore_errors=True)


def check_replaceable(folder: Path, *, apart_from: Collection[str] = ()) -> None:
    """Whether a build may put its result in the place of `folder`; to be asked before a long one begins.

    Files below it that are named in `apart_from` (with slashes) do not count.

    Raises:
        BuildError: when `folder` holds anything that no build of ours wrote, or cannot be replaced.
    """
    folder = Path(folder).resolve()
    if folder.is_mount():
        raise BuildError(f"{folder} is a mount point, which cannot be replaced; --out names a folder below it")
    if folder.exists() and not folder.is_dir():  # a file, or a device such as /dev/null
        raise BuildError(f"{folder} is no folder; --out names one")
    found = {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()
    }
    if not found:
        return
    try:
        ours = {REPORT, *json.loads((folder / REPORT).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise BuildError(f"{folder} is not empty and no dataset folder; choose another --out or empty it") from None
    ours.update(apart_from)
    if found - ours:
        raise BuildError(f"{folder} holds {min(found - ours)}, which no build wrote; move it, or choose another --out")


def write_rows(
    folder: Path,
    rows: Mapping[str, Sequence[Row]],
    read_image: ReadImage,
    *,
    place: str = "data",
    workers: int = 1,
    progress: bool = False,
) -> dict[str, dict[str, int]]:
    """Write the splits as `<place>/<split>-xxxxx-of-xxxxx.parquet`; returns rows, images and bytes of each.

    Rows are put in the order of their images, so that one image's rows lie in one row group, whose dictionary holds
    the image's bytes once; `workers` images are read ahead, and no more than one row group is held in memory. The
    column `images` is left out where no row has one.
    """
    schema = features(have_images(rows)).arrow_schema
    data = folder / place
    data.mkdir(parents=True)
    written = {}
    for split in SPLITS:
        if rows.get(split):
            ordered = sorted(rows[split], key=lambda row: (row["images"], row["source"], row["row_id"]))
            by_image = [list(same) for _, same in groupby(ordered, key=lambda row: row["images"] or row["row_id"])]
            shown = track(by_image, f"Writing {split}", console=Console(stderr=True), disable=not progress)
            written[split] = _write_split(data, split, _with_images(shown, read_image, workers), schema)
    return written


def have_images(rows: Mapping[str, Iterable[Row]]) -> bool:
    """Whether any row of any split shows an image; where none does, the dataset has no such column."""
    return any(row["images"] for split_rows in rows.values() for row in split_rows)


def _with_images(
    by_image: Iterable[list[Row]], read_image: ReadImage, workers: int
) -> Iterator[tuple[list[Row], dict[str, File]]]:
    """Yield the rows of each image with its file."""
    waiting: deque = deque()

    def wait() -> tuple[list[Row], dict[str, File]]:
        rows, files = waiting.popleft()
        return rows, {image_id: file.result() for image_id, file in files.items()}

    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        for rows in by_image:
            waiting.append((rows, {image_id: pool.submit(read_image, image_id) for image_id in rows[0]["images"]}))
            if len(waiting) > 2 * workers:
                yield wait()
        while waiting:
            yield wait()


def _write_split(
    data: Path, split: str, items: Iterable[tuple[list[Row], dict[str, File]]], schema: pa.Schema
) -> dict[str, int]:
    shards: list[Path] = []
    written = {"rows": 0, "images": 0, "image_bytes": 0, "bytes": 0}
    writer, shard_bytes = None, 0
    for rows, files in _row_groups(items):
        size = sum(len(content) for _, content in files.values())
        if writer is None or shard_bytes + size > SHARD_BYTES:
            if writer is not None:
                writer.close()
            shards.append(data / f"{split}-{len(shards):05d}.parquet")
            writer, shard_bytes = _open_writer(shards[-1], schema), 0
        table = _make_table(rows, files, schema)
        writer.write_table(table, row_group_size=len(rows))
        shard_bytes += size
        text_bytes = table.select([name for name in schema.names if name != "images"]).nbytes
        for key, number in zip(written, (len(rows), len(files), size, size + text_bytes), strict=True):
            written[key] += number
        del rows, files, table  # before the next group is read
    assert writer is not None
    writer.close()
    for number, shard in enumerate(shards):
        shard.rename(data / f"{split}-{number:05d}-of-{len(shards):05d}.parquet")
    return written


def _row_groups(
    items: Iterable[tuple[list[Row], dict[str, File]]],
) -> Iterator[tuple[list[Row], dict[str, File]]]:
    """Yield rows with the images they show, cut between images once a group is full."""
    group: list[Row] = []
    files: dict[str, File] = {}
    size = 0
    for rows, own in items:
        if group and (size >= ROW_GROUP_BYTES or len(group) >= ROW_GROUP_ROWS):
            yield group, files
            group, files, size = [], {}, 0
        size += sum(len(content) for image_id, (_, content) in own.items() if image_id not in files)
        files |= own
        group += rows
    yield group, files


def _open_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """A writer for tables of `_make_table`, which leaves `datasets` the schema that it knows the columns by."""
    writer = pq.ParquetWriter(
        path,
        _with_image_dictionary(schema),
        compression="zstd",
        dictionary_pagesize_limit=DICTIONARY_LIMIT,
        write_page_index=True,
        store_schema=False,  # of the dictionaries, which nobody who reads the file has to know of
    )
    writer.add_key_value_metadata(schema.metadata)
    return writer


def _make_table(rows: Sequence[Row], files: Mapping[str, File], schema: pa.Schema) -> pa.Table:
    """The rows as Arrow. An image's bytes are there once, in a dictionary, also before parquet makes one of its own."""
    text = pa.schema([field for field in schema if field.name != "images"])
    table = pa.Table.from_pylist(rows, schema=text)
    if "images" not in schema.names:
        return table.replace_schema_metadata(schema.metadata)
    position = {image_id: number for number, image_id in enumerate(files)}
    shown = pa.array([position[image_id] for row in rows for image_id in row["images"]], pa.int32())
    names, contents = zip(*files.values(), strict=True)
    columns = {"bytes": pa.array(contents, pa.binary()), "path": pa.array(names, pa.string())}
    images = pa.StructArray.from_arrays(
        [pa.DictionaryArray.from_arrays(shown, values) for values in columns.values()], names=list(columns)
    )
    offsets = pa.array(accumulate((len(row["images"]) for row in rows), initial=0), pa.int32())
    lists = pa.ListArray.from_arrays(offsets, images)
    target = _with_image_dictionary(schema)
    return pa.Table.from_arrays([lists if name == "images" else table[name] for name in schema.names], schema=target)


def _with_image_dictionary(schema: pa.Schema) -> pa.Schema:
    if "images" not in schema.names:
        return schema
    struct = pa.struct({name: pa.dictionary(pa.int32(), kind) for name, kind in IMAGE_COLUMNS.items()})
    return schema.set(schema.get_field_index("images"), pa.field("images", pa.list_(struct)))


def features(with_images: bool):
    """The columns of a dataset as `datasets.Features`; `datasets` is imported here since that takes a second."""
    from datasets import Features, Image, List, Value

    text = Value("string")
    messages = List({"role": text, "content": text})
    columns = {"images": List(Image())} if with_images else {}
    columns |= {"prompt": messages, "completion": messages}
    columns |= dict.fromkeys(
        ("row_id", "image_id", "group_id", "source", "license", "language", "question_type", "claims"), text
    )
    return Features(columns)


class Configuration(NamedTuple):
    """One of the datasets in a folder: where its parquet lies, what `write_rows` said of it, whether it has images."""

    place: str
    written: Mapping[str, Mapping[str, int]]
    with_images: bool


def write_card(folder: Path, body: str, configurations: Mapping[str, Configuration], **data) -> None:
    """Write `README.md`: metadata as `Dataset.push_to_hub` writes it, so that the Hub's viewer works, then `body`.

    A folder with one dataset has one configuration, `default`. `data` are the metadata beside `dataset_info` and
    `configs`; they are put into YAML here, whatever they hold.
    """
    from datasets.info import DatasetInfosDict
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard, DatasetCardData

    card_data = DatasetCardData(**data)
    infos = {name: _describe(folder, configuration) for name, configuration in configurations.items()}
    DatasetInfosDict(infos).to_dataset_card_data(card_data)
    files = {
        name: {"data_files": [{"split": split, "path": f"{own.place}/{split}-*"} for split in own.written]}
        for name, own in configurations.items()
    }
    MetadataConfigs(files).to_dataset_card_data(card_data)
    DatasetCard(f"---\n{card_data}\n---\n\n{body}").save(folder / "README.md")


def _describe(folder: Path, configuration: Configuration):
    from datasets import DatasetInfo, SplitDict, SplitInfo

    splits = SplitDict()
    for split, counts in configuration.written.items():
        splits.add(SplitInfo(split, num_bytes=counts["bytes"], num_examples=counts["rows"]))
    info = DatasetInfo(features=features(configuration.with_images), splits=splits)
    info.download_size = sum(path.stat().st_size for path in (folder / configuration.place).glob("*.parquet"))
    info.dataset_size = sum(counts["bytes"] for counts in configuration.written.values())
    return info


def write_report(folder: Path, report: Mapping) -> None:
    """Write `build_report.json`: what was built, from what, with which versions, and the hash of every file."""
    hashes = {
        path.relative_to(folder).as_posix(): hash_file(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }
    packages = {name: version(name) for name in ("dentalgemma", "datasets", "pyarrow", "pillow")}
    document = {**report, "versions": packages, "files": hashes}
    text = json.dumps(document, indent=2, ensure_ascii=False, sort_keys=True)
    (folder / REPORT).write_text(text + "\n", encoding="utf-8")


def hash_file(path: Path) -> str:
    """The SHA-256 of a file's content in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_jsonl(path: Path, items: Iterable[Mapping]) -> None:
    """Write one canonical JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        for item in items:
            file.write(json.dumps(item, ensure_ascii=False, sort_keys=True, separators=(",", ":")) + "\n")
