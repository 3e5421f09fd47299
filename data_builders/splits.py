"""Groups, then a split that no group crosses.

What belongs to one patient, comes from one Roboflow original, or shows the same picture is one group. Groups are put in
the order of a seeded hash and cut by their share of images, source by source: a new image moves at most the groups at
the cuts.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence

from data_builders.chat import SPLITS
from data_builders.records import ImageRecord, Split
from data_builders.sources import Shares, Source

ROBOFLOW_NAME = re.compile(r"^(?P<stem>.+)\.rf\.[0-9A-Za-z]{16,}(?:-[0-9A-Za-z]+)?$")


class Groups:
    """Disjoint sets: `join` what belongs together, then ask which set a thing is in."""

    def __init__(self) -> None:
        self._parent: dict[Hashable, Hashable] = {}

    def join(self, first: Hashable, *others: Hashable) -> None:
        root = self.find(first)
        for other in others:
            self._parent[self.find(other)] = root

    def find(self, item: Hashable) -> Hashable:
        self._parent.setdefault(item, item)
        while self._parent[item] != item:
            self._parent[item] = self._parent[self._parent[item]]
            item = self._parent[item]
        return item


def original_stem(file_stem: str) -> str | None:
    """The name of the original behind a Roboflow export (`101_jpg.rf.<hash>` comes from `101_jpg`), else `None`."""
    match = ROBOFLOW_NAME.match(file_stem)
    return match["stem"] if match else None


def group_records(
    records: Sequence[ImageRecord], sources: Mapping[str, Source], alike: Iterable[tuple[str, str]] = ()
) -> list[str]:
    """The group id of each record: records that share a patient, an original or their picture get the same.

    Patients are told apart by each source's own pattern, originals by their name within a source, pixels over all
    sources. `alike` are pairs of image ids of copies, and of mosaics with what they show
    (`data_builders.audit.find_alike`).
    """
    groups = Groups()
    for first, second in alike:
        groups.join(("pixels", first), ("pixels", second))
    for number, record in enumerate(records):
        for key in find_keys(record, sources[record.source]):
            groups.join(number, key)
    members: dict[Hashable, list[str]] = defaultdict(list)
    for number, record in enumerate(records):
        members[groups.find(number)].append(f"{record.source}/{record.image_id or record.path.name}")
    # Named by its smallest member, so that neither the order of files nor that of joining shows.
    names = {root: _digest("group", min(ids)) for root, ids in members.items()}
    return [names[groups.find(number)] for number in range(len(records))]


def find_keys(record: ImageRecord, source: Source) -> Iterator[Hashable]:
    """Yield what a record shares with all others of its group: pixels, a Roboflow original, a patient."""
    if record.image_id:
        yield "pixels", record.image_id
    stem = original_stem(record.path.stem)
    if stem:
        yield "original", record.source, stem
    if source.group:
        match = re.search(source.group.pattern, record.path.name)
        if match:
            yield "patient", record.source, match["patient"]


def split_groups(group_ids: Iterable[str], strata: Iterable[str], *, shares: Shares, seed: int) -> dict[str, Split]:
    """Which split each group goes to; `group_ids` and `strata` (a source, a condition) run along the items.

    Within a stratum the shares hold for the number of items as closely as whole groups allow, and every split with a
    share gets a group where there are enough. A group that lies in several strata is counted in the first by name.
    """
    sizes: dict[str, int] = defaultdict(int)
    home: dict[str, str] = {}
    for group_id, stratum in zip(group_ids, strata, strict=True):
        sizes[group_id] += 1
        home[group_id] = min(home.get(group_id, stratum), stratum)
    by_stratum: dict[str, list[str]] = defaultdict(list)
    for group_id in sorted(sizes, key=lambda group_id: _digest(seed, group_id)):
        by_stratum[home[group_id]].append(group_id)
    assigned: dict[str, Split] = {}
    for members in by_stratum.values():
        assigned.update(_cut(members, sizes, shares))
    return assigned


def _cut(members: Sequence[str], sizes: Mapping[str, int], shares: Shares) -> dict[str, Split]:
    wanted = [(split, getattr(shares, split)) for split in SPLITS if getattr(shares, split) > 0]
    total = sum(sizes[member] for member in members)
    assigned: dict[str, Split] = {}
    done, current, filled = 0, 0, 0
    for position, member in enumerate(members):
        end_of_current = sum(share for _, share in wanted[: current + 1]) * total
        later, left = len(wanted) - current - 1, len(members) - position
        past_the_cut = done + sizes[member] / 2 > end_of_current
        if filled and later and (past_the_cut or left <= later):
            current, filled = current + 1, 0
        assigned[member] = wanted[current][0]
        done, filled = done + sizes[member], filled + 1
    return assigned


def _digest(*parts: object) -> str:
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:16]
