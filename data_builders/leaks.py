"""What several files share: the same pixels, and pictures that lie in more than one of a source's own splits."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from data_builders.records import ImageRecord
from data_builders.sources import Source
from data_builders.splits import Groups, find_keys


def find_duplicates(records: Iterable[ImageRecord]) -> list[dict]:
    """Files that show the same pixels, within and across sources."""
    by_pixels: dict[str, list[ImageRecord]] = defaultdict(list)
    for record in records:
        if record.image_id:
            by_pixels[record.image_id].append(record)
    return [
        {"image_id": image_id, "images": [place_of(record) for record in same]}
        for image_id, same in sorted(by_pixels.items())
        if len({record.path for record in same}) > 1
    ]


def find_leaks(
    records: Iterable[ImageRecord], sources: Mapping[str, Source], alike: Iterable[tuple[str, str]] = ()
) -> list[dict]:
    """What the sources' own splits (their `train`, `valid`, `test` folders) share.

    Within a source: a patient, a Roboflow original, pixels, a copy. Between sources: pixels and copies.
    """
    groups = _group_declared(records, sources, alike)
    leaking = [same for same in groups if len({record.declared_split for record in same}) > 1]
    return [{"images": [{**place_of(record), "split": record.declared_split} for record in same]} for same in leaking]


def measure_leaks(
    records: Iterable[ImageRecord], sources: Mapping[str, Source], alike: Iterable[tuple[str, str]] = ()
) -> list[dict]:
    """For each source's own validation and test split how many of its images are also in its train split."""
    images: Counter[tuple[str, str]] = Counter()
    leaked: Counter[tuple[str, str]] = Counter()
    for same in _group_declared(records, sources, alike):
        trained = {record.source for record in same if record.declared_split == "train"}
        for record in same:
            if record.declared_split != "train":
                key = record.source, str(record.declared_split)
                images[key] += 1
                leaked[key] += record.source in trained
    return [
        {"source": source, "split": split, "images": number, "also_in_train": leaked[source, split]}
        for (source, split), number in sorted(images.items())
    ]


def _group_declared(
    records: Iterable[ImageRecord], sources: Mapping[str, Source], alike: Iterable[tuple[str, str]]
) -> list[list[ImageRecord]]:
    groups = Groups()
    for first, second in alike:
        groups.join(("pixels", first), ("pixels", second))
    declared = [record for record in records if record.declared_split]
    for number, record in enumerate(declared):
        for key in find_keys(record, sources[record.source]):
            groups.join(number, key)
    members: dict[object, list[ImageRecord]] = defaultdict(list)
    for number, record in enumerate(declared):
        members[groups.find(number)].append(record)
    return list(members.values())


def place_of(record: ImageRecord) -> dict[str, str]:
    """Source and path of an image, for JSON."""
    return {"source": record.source, "path": str(record.path)}
