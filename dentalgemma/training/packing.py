"""Rows that show the same picture as one sequence: the picture once, then the questions, each blind to the others.

What keeps the questions apart is `segment_ids` (0 is the shared prefix, k the k-th question) with `position_ids` that
go on from the prefix in every question; `backbone.py` makes attention masks of both.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import Sampler

IGNORED = -100  # the label that cross entropy leaves out


class Example(NamedTuple):
    """One row as tokens; its answer begins at `answer_start`. `pictures` are the names of its pictures, in order."""

    ids: list[int]
    answer_start: int
    pictures: tuple[str, ...] = ()

    @property
    def labels(self) -> list[int]:
        """The answer's tokens, and nothing of the prompt."""
        return [IGNORED] * self.answer_start + list(self.ids[self.answer_start :])


class Packed(NamedTuple):
    """One sequence: `rows` are the numbers of its examples, in order. An example that stays alone is all prefix."""

    ids: list[int]
    labels: list[int]
    position_ids: list[int]
    segment_ids: list[int]
    pictures: tuple[str, ...]
    rows: tuple[int, ...]


def pack(examples: Sequence[Example], *, image_token_id: int, questions: int | None = None) -> list[Packed]:
    """Sequences of at most `questions` examples each (None: no limit), in the order of their first example.

    Examples share what they begin with alike, if they show the same pictures and are the same up to the last image
    token. The prefix ends before the last prompt token of each, so that every question keeps one: the first token of a
    question has no label, since the token before it in the sequence belongs to another.
    """
    groups: dict[Hashable, list[int]] = {}
    for number, example in enumerate(examples):
        end = _end_of_images(example.ids, image_token_id) if example.pictures else 0
        sharable = 0 < end < example.answer_start
        key = (example.pictures, tuple(example.ids[:end])) if sharable else number
        groups.setdefault(key, []).append(number)
    sequences = []
    for rows in groups.values():
        size = questions or len(rows)
        sequences += [_join(examples, rows[start : start + size]) for start in range(0, len(rows), size)]
    return sorted(sequences, key=lambda sequence: sequence.rows[0])


def _end_of_images(ids: Sequence[int], image_token_id: int) -> int:
    """The place after the last image token; 0 where there is none."""
    return next((place for place in range(len(ids), 0, -1) if ids[place - 1] == image_token_id), 0)


def _join(examples: Sequence[Example], rows: Sequence[int]) -> Packed:
    chosen = [examples[row] for row in rows]
    shared = _common_length([example.ids for example in chosen], min(example.answer_start for example in chosen) - 1)
    if len(chosen) == 1:
        shared = 0
    first = chosen[0]
    ids, labels = list(first.ids[:shared]), [IGNORED] * shared
    positions, segments = list(range(shared)), [0] * shared
    for question, example in enumerate(chosen, start=1 if shared else 0):
        ids += example.ids[shared:]
        labels += example.labels[shared:]
        positions += range(shared, len(example.ids))
        segments += [question] * (len(example.ids) - shared)
    return Packed(ids, labels, positions, segments, first.pictures, tuple(rows))


def _common_length(texts: Sequence[Sequence[int]], limit: int) -> int:
    """How many tokens all texts begin with alike, at most `limit`."""
    columns = zip(*texts, strict=False)
    return next((place for place, column in enumerate(columns) if place >= limit or len(set(column)) > 1), limit)


class ImageGroups(Sampler[int]):
    """Rows in an order for packing: up to `questions` rows of one picture lie together, inside one batch.

    `groups` says what each row shows (its picture names); rows with None or nothing are groups of one. Which rows come
    together, and in what order, follows from `seed + epoch()`. A group is torn only where no whole one would fill the
    batch. `batch_size` is that of one process and one micro-batch, which is what is packed.
    """

    def __init__(
        self,
        batch_size: int,
        groups: Sequence[Hashable],
        *,
        questions: int,
        seed: int,
        epoch: Callable[[], int],
    ) -> None:
        self.batch_size = batch_size
        self.questions = min(questions, batch_size)
        self.seed = seed
        self.epoch = epoch
        known: dict[Hashable, int] = {}
        numbers = [known.setdefault(group, len(known)) if group else -1 - row for row, group in enumerate(groups)]
        self.numbers = torch.tensor(numbers, dtype=torch.long)

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        chunks = self._draw_chunks(generator)
        batches = _fill_batches(chunks, self.batch_size)
        # Small groups fill gaps early and would be used up; whole batches in a random order have no such drift.
        last = [batches.pop()] if batches and len(batches[-1]) < self.batch_size else []
        order = torch.randperm(len(batches), generator=generator).tolist()
        return (row for batch in [*(batches[number] for number in order), *last] for row in batch)

    def _draw_chunks(self, generator: torch.Generator) -> list[list[int]]:
        """Every row once, in chunks of one group and at most `questions` rows, in random order."""
        shuffled = torch.randperm(len(self.numbers), generator=generator)
        shuffled = shuffled[torch.argsort(self.numbers[shuffled], stable=True)]
        _, sizes = torch.unique_consecutive(self.numbers[shuffled], return_counts=True)
        rows, start, chunks = shuffled.tolist(), 0, []
        for size in sizes.tolist():
            end = start + size
            chunks += [rows[first : min(first + self.questions, end)] for first in range(start, end, self.questions)]
            start = end
        return [chunks[number] for number in torch.randperm(len(chunks), generator=generator).tolist()]


def _fill_batches(chunks: Sequence[list[int]], batch_size: int) -> list[list[int]]:
    """Batches of `batch_size` rows, the last perhaps of fewer; a chunk is cut only where no later one fills the gap."""
    later: dict[int, deque[int]] = {}
    for number, chunk in enumerate(chunks):
        later.setdefault(len(chunk), deque()).append(number)
    taken = bytearray(len(chunks))
    batches, batch = [], []
    for number, chunk in enumerate(chunks):
        if taken[number]:
            continue
        taken[number] = 1
        while chunk:
            room = batch_size - len(batch)
            filler = _earliest(later, room, taken) if len(chunk) > room else None
            if filler is None:
                batch += chunk[:room]
                chunk = chunk[room:]
            else:
                batch += chunks[filler]
                taken[filler] = 1
            if len(batch) == batch_size:
                batches.append(batch)
                batch = []
    return [*batches, batch] if batch else batches


def _earliest(later: dict[int, deque[int]], room: int, taken: bytearray) -> int | None:
    """The first chunk not yet taken of at most `room` rows."""
    found = []
    for size in range(1, room + 1):
        numbers = later.get(size, ())
        while numbers and taken[numbers[0]]:
            numbers.popleft()
        found += [numbers[0]] if numbers else []
    return min(found, default=None)
