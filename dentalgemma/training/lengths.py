"""How many tokens each row takes, without decoding a picture; which rows are too long; batches of like lengths."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, DatasetDict
from PIL import Image as PillowImage
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader
from transformers import Gemma3Processor, Gemma4Processor, PretrainedConfig, ProcessorMixin
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import SFTConfig

from data_builders.images import UNREADABLE
from dentalgemma.models.processors import crop_options, image_fit, picture_tokens, write_picture
from dentalgemma.training.config import StageConfig
from dentalgemma.training.data import ChatCollator, DatasetError, fill_places, image_source, name_row
from dentalgemma.training.mixture import describe_mixture

LIST_NAME = "left_out_rows.jsonl"
BATCH = 500  # rows
WORTH_A_BAR = 20_000  # rows; fewer take a few seconds


class Fitting(NamedTuple):
    """The splits without the rows that are too long; how many were left out of each, and the tokens of those kept."""

    dataset: DatasetDict
    left_out: dict[str, int]
    lengths: dict[str, list[int]]

    @property
    def longest(self) -> dict[str, int]:
        """Tokens of the longest row of each split."""
        return {split: max(lengths) for split, lengths in self.lengths.items()}


class LengthGroups(LengthGroupedSampler):
    """transformers' sampler, in an order that follows from seed and epoch.

    Theirs draws from the global random state, which a resumed run has somewhere else (transformers 5.23).
    """

    def __init__(self, batch_size: int, lengths: list[int], *, seed: int, epoch: Callable[[], int]) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch())
        return super().__iter__()


def set_epoch(loader: DataLoader, epoch: int) -> None:
    """Tell a loader's sampler its epoch, however deep it lies.

    accelerate 1.15 looks two samplers deep. Several processes that skip batches have one more, so that a run resumed
    within its second epoch would be shown the first one's order again.
    """
    sampler = loader.batch_sampler
    while hasattr(sampler, "batch_sampler"):
        sampler = sampler.batch_sampler
    sampler = getattr(sampler, "sampler", None)
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)


def keep_fitting(
    dataset: DatasetDict,
    processor: ProcessorMixin,
    config: PretrainedConfig,
    *,
    stage: StageConfig,
    training: SFTConfig,
) -> Fitting:
    """Leave out the rows of both splits that are longer than `max_row_tokens` or than the model's context.

    They are listed in `left_out_rows.jsonl` of the run folder. Where batches are grouped by length, the rows get the
    column that transformers takes the lengths from.

    Raises:
        DatasetError: when a split would be left empty.
    """
    context = config.get_text_config().max_position_embeddings
    limit = min(stage.max_row_tokens or context, context)
    kept, dropped, kept_lengths = DatasetDict(dataset), [], {}
    for split in dict.fromkeys((stage.dataset_train_split, stage.dataset_test_split)):
        rows = dataset[split]
        lengths = row_lengths(rows, processor, progress=training.process_index == 0)
        short = [number for number, length in enumerate(lengths) if length <= limit]
        if not short:
            raise DatasetError(
                f"split {split!r}: all {len(rows)} rows are longer than {limit:,} tokens (the shortest has "
                f"{min(lengths, default=0):,}); raise `max_row_tokens`, or build shorter rows"
            )
        kept_lengths[split] = [lengths[number] for number in short]
        if training.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
            rows = with_column(rows, training.length_column_name, lengths)
        if len(short) < len(rows):
            dropped += _list_longer(rows, split, lengths, limit)
            rows = rows.select(short)
        kept[split] = rows
    fitting = Fitting(kept, dict(Counter(row["split"] for row in dropped)), kept_lengths)
    if training.process_index == 0:
        _write_list(Path(training.output_dir) / LIST_NAME, dropped)
        lines = [describe_mixture(mixture)] if (mixture := getattr(dataset, "mixture", ())) else []
        lines.append(_describe(limit, fitting.longest, fitting.left_out))
        if (warning := _warn_of_no_crops(kept, processor)) is not None:
            lines.append(warning)
        for line in lines:
            Console(stderr=True).print(line, highlight=False, soft_wrap=True)
    return fitting


def _warn_of_no_crops(dataset: DatasetDict, processor: ProcessorMixin) -> str | None:
    """A sentence where pan and scan was asked for and does nothing to any picture."""
    if image_fit(processor) != "pan_and_scan":
        return None
    tokens = [count for rows in dataset.values() for own in image_tokens(rows, processor) for count in own]
    if not tokens or max(tokens) > processor.image_seq_length:
        return None
    options = crop_options(processor)
    return (
        "image_fit: pan_and_scan crops none of these pictures: it takes those whose sides differ by "
        f"{options['pan_and_scan_min_ratio_to_activate']:g} to 1 and whose crops would have at least "
        f"{options['pan_and_scan_min_crop_size']} pixels a side"
    )


def row_lengths(
    dataset: Dataset, processor: ProcessorMixin, *, batch_size: int = BATCH, progress: bool = True
) -> list[int]:
    """The number of tokens of every row as the collator makes it, padding aside.

    Pictures are not decoded: Gemma 3 takes the same number of tokens for each, unless it shows crops of long ones.
    Then, and for Gemma 4, the headers tell the sizes.

    Raises:
        DatasetError: for a row that cannot be rendered, or a picture without a size.
    """
    collator = ChatCollator(processor)
    if not isinstance(processor, (Gemma3Processor, Gemma4Processor)):
        return [int(collator([row])["attention_mask"].sum()) for row in dataset]
    tokens = image_tokens(dataset, processor)
    texts = dataset.select_columns(
        [name for name in ("prompt", "completion", "row_id") if name in dataset.column_names]
    )
    place = _image_places(processor)
    image_token = processor.tokenizer.image_token
    lengths: list[int] = []
    batches = track(
        texts.iter(batch_size),
        "Counting tokens",
        total=math.ceil(len(texts) / batch_size),
        console=Console(stderr=True),
        disable=not progress or len(texts) < WORTH_A_BAR,
    )
    for columns in batches:
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        prompts, answers = [], []
        for row, own in zip(rows, tokens[len(lengths) : len(lengths) + len(rows)], strict=True):
            prompt, answer = collator.render(row, len(own))
            prompts.append(fill_places(prompt, [place(count) for count in own], processor.image_token))
            answers.append(answer)
        ids = processor.tokenizer([*prompts, *answers], add_special_tokens=False, padding=False)["input_ids"]
        own_tokens = tokens[len(lengths) : len(lengths) + len(rows)]
        for prompt_ids, answer_ids, own in zip(ids[: len(rows)], ids[len(rows) :], own_tokens, strict=True):
            left_out = sum(count - place(count).count(image_token) for count in own)
            lengths.append(len(prompt_ids) + len(answer_ids) + left_out)
    return lengths


def _only(dataset: Dataset, *columns: str) -> Dataset:
    return dataset.select_columns([name for name in columns if name in dataset.column_names])


def _image_places(processor: ProcessorMixin) -> Callable[[int], str]:
    """What the processor writes for a picture of so many tokens, each run of them shortened to one: they are alike."""
    token = processor.tokenizer.image_token

    @cache
    def place(count: int) -> str:
        written = write_picture(processor, count)
        assert written.count(token) == count
        return re.sub(f"(?:{re.escape(token)})+", lambda run: token, written)

    return place


def image_tokens(dataset: Dataset, processor: ProcessorMixin) -> list[list[int]]:
    """How many tokens each picture of each row takes.

    The Arrow column is read in place: rows by number would copy the bytes of every picture.
    """
    if "images" not in dataset.column_names:
        return [[]] * len(dataset)
    column = dataset.data.column("images")
    numbers = range(len(dataset)) if dataset._indices is None else dataset._indices.column(0).to_pylist()
    if image_fit(processor) == "stretch":
        counts = pc.fill_null(pc.list_value_length(column), 0).to_pylist()
        return [[processor.image_seq_length] * counts[number] for number in numbers]
    tokens_of = cache(partial(picture_tokens, processor))
    known: dict[int, list[int]] = {}  # a mixture may show a row more than once
    for place, number in enumerate(numbers):
        if number not in known:
            pictures = column[number].values
            try:
                sizes = [_read_size(pictures, index) for index in range(len(pictures or ()))]
            except UNREADABLE as error:
                name = name_row(_only(dataset, "prompt", "row_id")[place])
                raise DatasetError(f"{name}: a picture cannot be read: {error}") from error
            known[number] = [tokens_of(height, width) for height, width in sizes]
    return [known[number] for number in numbers]


def _read_size(pictures: pa.StructArray, index: int) -> tuple[int, int]:
    """Height and width from the header; as stored, since a quarter turn does not change the number of tokens."""
    content = pictures.field("bytes")[index]
    path = pictures.field("path")[index].as_py()
    source = pa.BufferReader(content.as_buffer()) if content.is_valid else image_source({"path": path})
    with PillowImage.open(source) as opened:
        return opened.height, opened.width


def with_column(dataset: Dataset, name: str, values: list) -> Dataset:
    """The dataset with one more column; `add_column` alone would copy a dataset of chosen rows, pictures and all."""
    if name in dataset.column_names:
        dataset = dataset.remove_columns(name)
    if dataset._indices is None:
        return dataset.add_column(name, values)
    numbers = dataset._indices.column(0).to_pylist()
    spread = [None] * len(dataset.data)
    for number, value in zip(numbers, values, strict=True):
        spread[number] = value
    whole = Dataset(dataset._data, info=dataset.info, split=dataset.split, fingerprint=dataset._fingerprint)
    return whole.add_column(name, spread).select(numbers)


def _list_longer(rows: Dataset, split: str, lengths: Sequence[int], limit: int) -> list[dict]:
    longer = [number for number, length in enumerate(lengths) if length > limit]
    ids = rows.select_columns("row_id").select(longer)["row_id"][:] if "row_id" in rows.column_names else longer
    return [
        {"row_id": row_id, "split": split, "tokens": lengths[number]}
        for row_id, number in zip(ids, longer, strict=True)
    ]


def _write_list(path: Path, dropped: Sequence[dict]) -> None:
    path.unlink(missing_ok=True)  # a run before may have left out others
    if dropped:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in dropped), encoding="utf-8")


def _describe(limit: int, longest: dict[str, int], left_out: dict[str, int]) -> str:
    lengths = ", ".join(f"{split} {tokens:,}" for split, tokens in longest.items())
    if not left_out:
        return f"Longest rows in tokens: {lengths}; none is left out"
    counts = ", ".join(f"{count:,} of {split}" for split, count in left_out.items())
    return f"Left out for more than {limit:,} tokens: {counts} (see {LIST_NAME}); longest rows kept: {lengths}"
