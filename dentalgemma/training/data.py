"""Rows to batches. An own collator, since TRL's processes every image, changes its examples and needs `images`."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from datasets import DatasetDict, Image, List, load_dataset, load_from_disk
from PIL import Image as PillowImage
from transformers import ProcessorMixin

from data_builders.images import to_rgb
from data_builders.records import InputError
from dentalgemma.training.config import StageConfig

IGNORED = -100  # the label that cross entropy leaves out


class DatasetError(InputError):
    """A dataset that a recipe cannot train on; the message says what is missing."""


def load_splits(stage: StageConfig) -> DatasetDict:
    """Load the dataset folder or Hub dataset of a stage; images stay undecoded bytes until their batch is made.

    Raises:
        DatasetError: when a split or a column is missing.
    """
    name = stage.dataset_name
    assert name is not None
    if Path(name).is_dir() and (Path(name) / "dataset_dict.json").is_file():
        dataset = load_from_disk(name)
    else:
        try:
            dataset = load_dataset(name, name=stage.dataset_config)
        except (FileNotFoundError, ConnectionError) as error:
            raise DatasetError(
                f"{name} is neither a folder here nor a dataset that the Hub would give: {error}"
            ) from error
    for split in (stage.dataset_train_split, stage.dataset_test_split):
        if split not in dataset:
            raise DatasetError(f"{name} has no split {split!r}, only {', '.join(dataset)}")
        missing = {"prompt", "completion"} - set(dataset[split].column_names)
        if missing:
            raise DatasetError(
                f"{name} lacks the columns {', '.join(sorted(missing))}: build it with `dentalgemma build`"
            )
        if "images" in dataset[split].column_names:
            dataset[split] = dataset[split].cast_column("images", List(Image(decode=False)))
    return dataset


class ChatCollator:
    """Rows with `prompt`, `completion` and, where there are any, `images`, to a padded batch of tensors.

    Labels are the completion (answer and turn end) and nothing else. `token_type_ids` mark image tokens in every
    batch, also in one without images: Gemma 3 needs them to build its attention mask.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.image_token_id = processor.tokenizer.image_token_id

    def __call__(self, rows: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        images = [[open_image(image) for image in row.get("images") or []] for row in rows]
        texts = [self.render(row, len(own)) for row, own in zip(rows, images, strict=True)]
        # The rendered template already begins with <bos>; special tokens on top would double it.
        inputs = self.processor(
            text=[prompt for prompt, _ in texts],
            images=images if any(images) else None,
            add_special_tokens=False,
        )
        prompts: list[list[int]] = inputs.pop("input_ids")
        answers = self.tokenizer([answer for _, answer in texts], add_special_tokens=False)["input_ids"]
        batch = self._pad(prompts, answers)
        if any(images):
            batch["pixel_values"] = torch.stack([torch.as_tensor(picture) for picture in inputs["pixel_values"]])
        return batch

    def render(self, row: Mapping, image_count: int) -> tuple[str, str]:
        """Prompt and answer as the chat template writes them; images stand before the first user's words."""
        prompt = [dict(message) for message in row["prompt"]]
        first_user = next(i for i, message in enumerate(prompt) if message["role"] == "user")
        for i, message in enumerate(prompt):
            if isinstance(message["content"], str):
                pictures = [{"type": "image"}] * (image_count if i == first_user else 0)
                message["content"] = [*pictures, {"type": "text", "text": message["content"]}]
        completion = [
            {**message, "content": [{"type": "text", "text": message["content"]}]}
            if isinstance(message["content"], str)
            else dict(message)
            for message in row["completion"]
        ]
        start = self.processor.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        whole = self.processor.apply_chat_template([*prompt, *completion], tokenize=False)
        if not whole.startswith(start):
            raise DatasetError("the chat template renders a prompt differently when an answer follows it")
        return start, whole[len(start) :]

    def _pad(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
        shape = (len(prompts), length)
        input_ids = torch.full(shape, self.tokenizer.pad_token_id)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORED)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            end = len(prompt) + len(answer)
            input_ids[i, :end] = torch.tensor([*prompt, *answer])
            attention_mask[i, :end] = 1
            labels[i, len(prompt) : end] = torch.tensor(answer)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": (input_ids == self.image_token_id).long(),
            "labels": labels,
        }


def open_image(image: Mapping | PillowImage.Image) -> PillowImage.Image:
    """An image of a row in RGB as displayed: undecoded (`bytes` or `path`) or already a Pillow image."""
    if isinstance(image, PillowImage.Image):
        return to_rgb(image)
    source = io.BytesIO(image["bytes"]) if image.get("bytes") is not None else image["path"]
    with PillowImage.open(source) as opened:
        return to_rgb(opened)
