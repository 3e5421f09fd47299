"""One configuration per source, each under its own terms, of a dataset whose licences cannot be met together."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_builders.chat import SPLITS, Row
from data_builders.dataset_card import escape_markdown, link
from data_builders.dataset_folder import (
    REPORT,
    BuildError,
    Configuration,
    File,
    have_images,
    write_card,
    write_jsonl,
    write_report,
    write_rows,
)
from data_builders.licences import combine_terms, find_licence

PER_SOURCE = ("records.jsonl", "cases.jsonl")  # their lines name their source and go along with its rows
NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"  # what a sources file allows, good for a folder
LOADING = "## How to load"
SECTION = (
    "## Sources and licences"  # of the card; the configurations stand before it, in the place of how to load the whole
)
PICTURES = ("images.list.element.bytes", "images.list.element.path")


def split_by_source(folder: Path, out: Path) -> None:
    """Write the dataset of `folder` into `out`, an empty or new folder, as one configuration per source.

    `datasets.load_dataset(out, "<source>")` loads one of them. Its parquet, and the lines of `records.jsonl` or
    `cases.jsonl` about it, lie in `data/<source>/`, each of its images once. The rows are the same; the card gets a
    section on the configurations; everything else goes along as it is. The same folder gives the same bytes.

    Raises:
        BuildError: when `folder` is no dataset folder that a build wrote.
    """
    folder, out = Path(folder), Path(out)
    report = _read_report(folder)
    out.mkdir(parents=True, exist_ok=True)
    sources = [source for source in report["sources"] if source["rows"]]
    for source in sources:
        if not re.fullmatch(NAME, source["name"]):
            raise BuildError(f"{folder / REPORT}: {source['name']!r} is no name of a source; build the dataset again")
    shards = sorted((folder / "data").glob("*-*.parquet"))
    pictures = _Pictures(shards)
    configurations = {}
    for source in sources:
        name, place = source["name"], f"data/{source['name']}"
        rows = {split: _read_rows(shards, split, name) for split in SPLITS}
        written = write_rows(out, rows, pictures.read, place=place)
        if sum(counts["rows"] for counts in written.values()) != source["rows"]:
            raise BuildError(f"{folder / REPORT} says that {name} has {source['rows']} rows, which the parquet has not")
        configurations[name] = Configuration(place, written, have_images(rows))
        for file in PER_SOURCE:
            if (folder / file).is_file():
                write_jsonl(out / place / file, _read_lines(folder / file, name))
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        built = name in report["files"]  # what else lies there is the user's
        if built and not name.startswith("data/") and name not in ("README.md", *PER_SOURCE):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, out / name)
    _write_card(folder, out, sources, configurations)
    write_report(out, {**report, "configurations": {name: own.place for name, own in configurations.items()}})


def _read_report(folder: Path) -> dict:
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        report["sources"][0]["rows"]
    except (OSError, ValueError, LookupError, TypeError):
        raise BuildError(f"{folder} is no dataset folder: it has no {REPORT} of a build") from None
    return report


def _read_rows(shards: Sequence[Path], split: str, source: str) -> list[Row]:
    """The rows of one source; in the place of the images are the names of their files."""
    rows: list[Row] = []
    for shard in shards:
        if shard.name.split("-")[0] == split:
            table = pq.ParquetFile(shard).read(columns=_without_bytes(shard))
            rows += table.filter(pc.equal(table["source"], source)).to_pylist()
    for row in rows:
        row["images"] = [image["path"] for image in row.get("images") or ()]
    return rows


def _without_bytes(shard: Path) -> list[str]:
    columns = pq.ParquetFile(shard).schema
    return [path for number in range(len(columns)) if (path := columns.column(number).path) != PICTURES[0]]


class _Pictures:
    """The images of a dataset by the names of their files; it holds those of one row group."""

    def __init__(self, shards: Sequence[Path]) -> None:
        self.places: dict[str, tuple[Path, int]] = {}
        self.held: tuple[tuple[Path, int] | None, dict[str, bytes]] = (None, {})
        for shard in shards:
            file = pq.ParquetFile(shard)
            if "images" in file.schema_arrow.names:
                for number in range(file.num_row_groups):
                    for name in _flatten(file.read_row_group(number, columns=[PICTURES[1]])).field("path").unique():
                        self.places.setdefault(name.as_py(), (shard, number))

    def read(self, name: str) -> File:
        place, contents = self.held
        if place != self.places[name]:
            place = self.places[name]
            file = pq.ParquetFile(place[0], read_dictionary=PICTURES)  # each image once, not once for each row
            images = _flatten(file.read_row_group(place[1], columns=["images"]))
            contents = {
                path.as_py(): content.as_py()
                for path, content in zip(images.field("path"), images.field("bytes"), strict=True)
            }
            self.held = (place, contents)
        return name, contents[name]


def _flatten(table: pa.Table) -> pa.StructArray:
    return pa.concat_arrays([chunk.flatten() for chunk in table["images"].chunks])


def _read_lines(path: Path, source: str) -> Iterator[Mapping]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            if (document := json.loads(line))["source"] == source:
                yield document


def _write_card(
    folder: Path, out: Path, sources: Sequence[Mapping], configurations: Mapping[str, Configuration]
) -> None:
    from huggingface_hub import DatasetCard

    card = DatasetCard.load(folder / "README.md")
    data = {key: value for key, value in card.data.to_dict().items() if key not in ("dataset_info", "configs")}
    before, heading, after = card.text.strip().partition(f"\n{SECTION}\n")
    before = before.partition(f"\n{LOADING}\n")[0]
    section = "\n\n".join(_describe(sources, configurations))
    write_card(out, f"{before.rstrip()}\n\n{section}\n{heading}{after}\n", configurations, **data)


def _describe(sources: Sequence[Mapping], configurations: Mapping[str, Configuration]) -> Iterator[str]:
    yield "## Configurations"
    yield (
        "No one licence fits all of these rows, so each source is a configuration of its own, under its own licence. "
        "Whoever takes several together has to meet the terms of each."
    )
    head = ["| configuration | rows | splits | licence | asks for | from |", "| --- | ---: | --- | --- | --- | --- |"]
    yield "\n".join(head + [_describe_one(source, configurations[source["name"]]) for source in sources])
    first = next(iter(configurations))
    split = next(iter(configurations[first].written))
    yield (
        "```python\nfrom datasets import load_dataset\n\n"
        f'rows = load_dataset("OWNER/NAME", "{first}", split="{split}")\n```'
    )
    yield "Beside the parquet of each, in `data/<configuration>/`, lie the facts that its rows were made from."


def _describe_one(source: Mapping, configuration: Configuration) -> str:
    licence = find_licence(source["license"])
    asked = [rule.title for rule in combine_terms({source["name"]: source["license"]}).rules]
    deed = f" {link(licence.url)}" if licence else ""
    cells = (
        f"`{source['name']}`",
        f"{source['rows']:,}",
        ", ".join(f"{split} {counts['rows']:,}" for split, counts in configuration.written.items()),
        escape_markdown(source["license"] or "not stated") + deed,
        ", ".join(asked) or "nothing more",
        link(source["url"]),
    )
    return f"| {' | '.join(cells)} |"
