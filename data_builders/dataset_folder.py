"""A dataset folder: parquet that `datasets.load_dataset` and `trl sft` take unchanged, with every image stored once."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_builders.chat import SPLITS, Row
from data_builders.records import InputError, Problem

REPORT = "build_report.json"
ROW_GROUP_BYTES = 64 << 20  # of distinct images; what a reader decodes at a time
SHARD_BYTES = 500 << 20
DICTIONARY_LIMIT = 1 << 30  # pyarrow's default of 1 MiB falls back to writing an image once per row

ReadImage = Callable[[str], tuple[str, bytes]]  # image id -> file name, bytes


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
    """A folder beside `folder` that takes its place only when everything was written; an old build is replaced.

    Raises:
        BuildError: when `folder` holds anything that no build of ours wrote.
    """
    folder = Path(folder).resolve()
    _check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        partial.chmod(0o755)  # mkdtemp's folder is for its owner alone
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_replaceable(folder: Path) -> None:
    if folder.is_file():
        raise BuildError(f"{folder} is a file; --out names a folder")
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if not found:
        return
    try:
        ours = {REPORT, *json.loads((folder / REPORT).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise BuildError(f"{folder} is not empty and no dataset folder; choose another --out or empty it") from None
    if found - ours:
        raise BuildError(f"{folder} holds {min(found - ours)}, which no build wrote; move it, or choose another --out")


def write_rows(folder: Path, rows: Mapping[str, Sequence[Row]], read_image: ReadImage) -> dict[str, dict[str, int]]:
    """Write the splits as `data/<split>-xxxxx-of-xxxxx.parquet`; returns rows, images and bytes of each.

    Rows are put in the order of their images, so that one image's rows lie in one row group, whose dictionary holds
    the image's bytes once. The column `images` is left out where no row has one.
    """
    with_images = any(row["images"] for split_rows in rows.values() for row in split_rows)
    schema = features(with_images).arrow_schema
    data = folder / "data"
    data.mkdir()
    written = {}
    for split in SPLITS:
        if rows.get(split):
            ordered = sorted(rows[split], key=lambda row: (row["images"], row["source"], row["row_id"]))
            written[split] = _write_split(data, split, ordered, schema, read_image)
    return written


def _write_split(
    data: Path, split: str, rows: Sequence[Row], schema: pa.Schema, read_image: ReadImage
) -> dict[str, int]:
    shards: list[Path] = []
    writer, shard_bytes, total_bytes, images, text_bytes = None, 0, 0, 0, 0
    for group, distinct, size in _row_groups(rows, read_image):
        if writer is None or shard_bytes + size > SHARD_BYTES:
            if writer is not None:
                writer.close()
            shards.append(data / f"{split}-{len(shards):05d}.parquet")
            writer = pq.ParquetWriter(
                shards[-1],
                schema,
                compression="zstd",
                dictionary_pagesize_limit=DICTIONARY_LIMIT,
                write_page_index=True,
            )
            shard_bytes = 0
        table = pa.Table.from_pylist([_with_bytes(row, distinct, schema) for row in group], schema=schema)
        writer.write_table(table, row_group_size=len(group))
        shard_bytes, total_bytes, images = shard_bytes + size, total_bytes + size, images + len(distinct)
        text_bytes += table.select([name for name in schema.names if name != "images"]).nbytes
    assert writer is not None
    writer.close()
    for number, shard in enumerate(shards):
        shard.rename(data / f"{split}-{number:05d}-of-{len(shards):05d}.parquet")
    return {"rows": len(rows), "images": images, "image_bytes": total_bytes, "bytes": text_bytes + total_bytes}


def _row_groups(
    rows: Sequence[Row], read_image: ReadImage
) -> Iterator[tuple[list[Row], dict[str, tuple[str, bytes]], int]]:
    """Yield rows with the images they show, cut between images once a group is full."""
    group: list[Row] = []
    distinct: dict[str, tuple[str, bytes]] = {}
    for _, same in groupby(rows, key=lambda row: row["images"] or row["row_id"]):
        same = list(same)
        size = sum(len(content) for _, content in distinct.values())
        if group and (size >= ROW_GROUP_BYTES or len(group) >= 10_000):
            yield group, distinct, size
            group, distinct = [], {}
        for image_id in same[0]["images"]:
            if image_id not in distinct:
                distinct[image_id] = read_image(image_id)
        group.extend(same)
    yield group, distinct, sum(len(content) for _, content in distinct.values())


def _with_bytes(row: Row, images: Mapping[str, tuple[str, bytes]], schema: pa.Schema) -> dict:
    if "images" not in schema.names:
        return {key: value for key, value in row.items() if key != "images"}
    files = [images[image_id] for image_id in row["images"]]
    return {**row, "images": [{"bytes": content, "path": name} for name, content in files]}


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


def write_card(folder: Path, body: str, written: Mapping[str, Mapping[str, int]], *, with_images: bool, **data) -> None:
    """Write `README.md`: metadata as `Dataset.push_to_hub` writes it, so that the Hub's viewer works, then `body`."""
    from datasets import DatasetInfo, SplitDict, SplitInfo
    from datasets.info import DatasetInfosDict
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard, DatasetCardData

    splits = SplitDict()
    for split, counts in written.items():
        splits.add(SplitInfo(split, num_bytes=counts["bytes"], num_examples=counts["rows"]))
    info = DatasetInfo(features=features(with_images), splits=splits)
    info.download_size = sum(path.stat().st_size for path in (folder / "data").iterdir())
    info.dataset_size = sum(counts["bytes"] for counts in written.values())
    card_data = DatasetCardData(**data)
    DatasetInfosDict({"default": info}).to_dataset_card_data(card_data)
    files = [{"split": split, "path": f"data/{split}-*"} for split in written]
    MetadataConfigs({"default": {"data_files": files}}).to_dataset_card_data(card_data)
    DatasetCard(f"---\n{card_data}\n---\n\n{body}").save(folder / "README.md")


def write_report(folder: Path, report: Mapping) -> None:
    """Write `build_report.json`: what was built, from what, with which versions, and the hash of every file."""
    hashes = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    packages = {name: version(name) for name in ("dentalgemma", "datasets", "pyarrow", "pillow")}
    document = {**report, "versions": packages, "files": hashes}
    text = json.dumps(document, indent=2, ensure_ascii=False, sort_keys=True)
    (folder / REPORT).write_text(text + "\n", encoding="utf-8")


def write_jsonl(path: Path, items: Iterable[Mapping]) -> None:
    """Write one canonical JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        for item in items:
            file.write(json.dumps(item, ensure_ascii=False, sort_keys=True, separators=(",", ":")) + "\n")
