"""Where the rows of a dataset lie: a folder as it was built, one with a configuration per source, or one of these."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from data_builders.sources import Vocabulary, load_vocabulary

RECORDS = "records.jsonl"


class Part(NamedTuple):
    """Rows, and the records that they were made from."""

    shards: tuple[Path, ...]  # parquet, `<split>-…`
    records: Path


def find_parts(folder: Path) -> list[Part]:
    """The parts of a VQA dataset; none where it is no such dataset.

    `split_by_source` put each source of a dataset with mixed terms into `data/<source>/`, its records beside its rows.
    """
    folder = Path(folder)
    places = [(folder / "data", folder / RECORDS)]
    places += [(records.parent, records) for records in sorted(folder.glob(f"data/*/{RECORDS}"))]
    places += [(folder, folder / RECORDS)]  # one configuration alone
    parts = [Part(tuple(sorted(place.glob("*-*.parquet"))), records) for place, records in places]
    return [part for part in parts if part.shards and part.records.is_file()]


def find_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary of a dataset: with the user's own terms, where the build was given some."""
    folder = Path(folder)
    is_configuration = folder.resolve().parent.name == "data" and not (folder / "data").is_dir()
    own = (folder.resolve().parent.parent if is_configuration else folder) / "vocabulary.yaml"
    return load_vocabulary(own if own.is_file() else None)
