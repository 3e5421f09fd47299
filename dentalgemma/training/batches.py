"""Tokens to padded tensors, and back to rows: one row in a line, several that share an image, or several end to end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dentalgemma.training.packing import IGNORED, Example, Packed

PREFIX, PADDING = 0, -1  # segments: what all questions of a line share, what is no token


def pad_lines(lines: Sequence[Packed], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Tensors (lines, longest line): `input_ids`, `attention_mask`, `labels`, and what keeps questions apart.

    `position_ids` and `segment_ids` are left out where no line holds more than one row: then nothing is to be kept
    apart, and the model makes its masks itself.
    """
    shape = (len(lines), max(len(line.ids) for line in lines))
    batch = {
        "input_ids": torch.full(shape, pad_token_id),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, IGNORED),
    }
    if any(len(line.rows) > 1 for line in lines):
        batch |= {"position_ids": torch.zeros(shape, dtype=torch.long), "segment_ids": torch.full(shape, PADDING)}
    for number, line in enumerate(lines):
        values = {
            "input_ids": line.ids,
            "attention_mask": [1] * len(line.ids),
            "labels": line.labels,
            "position_ids": line.position_ids,
            "segment_ids": line.segment_ids,
        }
        for key, tensor in batch.items():
            tensor[number, : len(line.ids)] = torch.tensor(values[key])
    return batch


def lay_end_to_end(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Tensors (1, tokens of all rows) without padding; positions begin anew with each row.

    There is no `attention_mask`: transformers finds the rows by their positions and keeps them apart.
    """
    ids = [token for example in examples for token in example.ids]
    labels = [label for example in examples for label in example.labels]
    positions = [position for example in examples for position in range(len(example.ids))]
    return {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.tensor([positions]),
    }


def split_rows(batch: Mapping[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of every row of a batch, line by line, as if it stood alone."""
    columns = [batch[key].tolist() for key in ("input_ids", "labels")]
    if "segment_ids" in batch:
        return [
            row
            for ids, labels, segments in zip(*columns, batch["segment_ids"].tolist(), strict=True)
            for row in _split_segments(ids, labels, segments)
        ]
    if "attention_mask" not in batch:
        return _split_positions(columns[0][0], columns[1][0], batch["position_ids"][0].tolist())
    lengths = batch["attention_mask"].sum(1).tolist()
    return [(ids[:length], labels) for ids, labels, length in zip(*columns, lengths, strict=True)]


def _split_segments(
    ids: Sequence[int], labels: Sequence[int], segments: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    rows = []
    for question in range(1, max(segments) + 1) if max(segments) else [PREFIX]:
        places = [place for place, segment in enumerate(segments) if segment in (PREFIX, question)]
        rows.append(([ids[place] for place in places], [labels[place] for place in places]))
    return rows


def _split_positions(
    ids: Sequence[int], labels: Sequence[int], positions: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    starts = [place for place, position in enumerate(positions) if position == 0]
    ends = [*starts[1:], len(ids)]
    return [(list(ids[start:end]), list(labels[start:end])) for start, end in zip(starts, ends, strict=True)]
