"""What several files share: the same pixels, and pictures that lie in more than one of a source's own splits."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from data_builders.records import ImageRecord
from data_builders.splits import Groups, original_stem


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


def find_leaks(records: Iterable[ImageRecord], alike: Iterable[tuple[str, str]] = ()) -> list[dict]:
    """What a source's own splits (its `train`, `valid`, `test` folders) share: pixels, a copy, a Roboflow original."""
    leaking = [same for same in _group_declared(records, alike) if len({record.declared_split for record in same}) > 1]
    return [{"images": [{**place_of(record), "split": record.declared_split} for record in same]} for same in leaking]


def measure_leaks(records: Iterable[ImageRecord], alike: Iterable[tuple[str, str]] = ()) -> list[dict]:
    """For each source's own validation and test split how many of its images are also in its train split."""
    images: Counter[tuple[str, str]] = Counter()
    leaked: Counter[tuple[str, str]] = Counter()
    for same in _group_declared(records, alike):
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


def _group_declared(records: Iterable[ImageRecord], alike: Iterable[tuple[str, str]]) -> list[list[ImageRecord]]:
    groups = Groups()
    for first, second in alike:
        groups.join(("pixels", first), ("pixels", second))
    declared = [record for record in records if record.declared_split]
    for number, record in enumerate(declared):
        stem = original_stem(record.path.stem)
        if record.image_id:
            groups.join(number, ("pixels", record.image_id))
        if stem:
            groups.join(number, ("original", record.source, stem))
    members: dict[object, list[ImageRecord]] = defaultdict(list)
    for number, record in enumerate(declared):
        members[groups.find(number)].append(record)
    return list(members.values())


def place_of(record: ImageRecord) -> dict[str, str]:
    """Source and path of an image, for JSON."""
    return {"source": record.source, "path": str(record.path)}
