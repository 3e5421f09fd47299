"""Rows to batches. An own collator, since TRL's processes every image, changes its examples and needs `images`."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from itertools import groupby, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pyarrow.compute as pc
import torch
from datasets import Dataset, DatasetDict, Image, List, Value, load_dataset, load_from_disk
from datasets.fingerprint import Hasher
from jinja2 import TemplateError
from PIL import Image as PillowImage
from transformers import ProcessorMixin

from data_builders.images import UNREADABLE, to_rgb
from data_builders.records import InputError
from dentalgemma.models.loading import HUB_ERRORS, explain
from dentalgemma.models.processors import write_picture
from dentalgemma.training.batches import lay_end_to_end, pad_lines, split_rows
from dentalgemma.training.mixture import mix_in
from dentalgemma.training.packing import IGNORED, Example, pack

if TYPE_CHECKING:
    from dentalgemma.training.config import StageConfig
    from dentalgemma.training.features import FeatureCache

NO_DATASET = "no dataset given: set --dataset_name to a folder or a Hub id"
RENDERS_DIFFERENTLY = "the chat template renders a prompt differently when an answer follows it"
PICTURES = "pictures"  # a column: the names of a row's pictures, SHA-256 of their bytes as stored
TEXT_KEYS = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"})


class DatasetError(InputError):
    """A dataset that a recipe cannot train on; the message says what is missing."""

    def __init__(self, message: str) -> None:
        # torch raises anew what happened in a worker, with that worker's traceback for a message.
        super().__init__(message.rstrip().rpartition("DatasetError: ")[2] if "Traceback" in message else message)


def load_splits(stage: StageConfig) -> DatasetDict:
    """Load the dataset folder or Hub dataset of a stage; images stay undecoded bytes until their batch is made.

    Where the stage mixes other data in, the training split holds both, and `mixture` of what is returned says how much
    of each.

    Raises:
        DatasetError: when a split or a column is missing.
    """
    name = stage.dataset_name
    if name is None:
        raise DatasetError(NO_DATASET)
    dataset = _load(name, stage.dataset_config)
    for split in (stage.dataset_train_split, stage.dataset_test_split):
        if split not in dataset:
            raise DatasetError(f"{name} has no split {split!r}, only {', '.join(dataset)}")
        missing = {"prompt", "completion"} - set(dataset[split].column_names)
        if missing:
            raise DatasetError(
                f"{name} lacks the columns {', '.join(sorted(missing))}: build it with `dentalgemma build`"
            )
        if dataset[split].features["prompt"] == Value("string"):
            raise DatasetError(f"{name}: `prompt` holds texts where lists of messages are needed")
        dataset[split] = _keep_undecoded(dataset[split], name)
    if not stage.mix_datasets:
        return dataset
    return mix_in(dataset, [_load_training_rows(other) for other in stage.mix_datasets], stage)


def _load_training_rows(name: str) -> Dataset:
    splits = _load(name)
    if "train" not in splits:
        raise DatasetError(f"{name} has no split 'train' to mix in, only {', '.join(splits)}")
    return _keep_undecoded(splits["train"], name)


def _load(name: str, config: str | None = None) -> DatasetDict:
    if Path(name).is_dir() and (Path(name) / "dataset_dict.json").is_file():
        return load_from_disk(name)
    try:
        return load_dataset(name, name=config)
    except (*HUB_ERRORS, ValueError) as error:  # ValueError: which of its configurations?
        if "corresponds to no data" in str(error):
            raise DatasetError(f"{name}: a split of it has no rows: {error}") from error
        if configs := re.search(r"Config name is missing.*?(\[.*?\])", str(error), re.DOTALL):
            raise DatasetError(
                f"{name} has several configurations: set --dataset_config to one of {configs[1]}"
            ) from None
        if unknown := re.search(r"BuilderConfig '.*?' not found\. Available: (\[.*?\])", str(error), re.DOTALL):
            raise DatasetError(f"{name} has no configuration {config!r}, only {unknown[1]}") from None
        raise DatasetError(explain(name, error, kind="dataset")) from error


def _keep_undecoded(dataset: Dataset, name: str) -> Dataset:
    if "images" not in dataset.column_names:
        return dataset
    features = dataset.features.copy()
    features["images"] = List(Image(decode=False))
    if features.arrow_schema.field("images").type != dataset.features.arrow_schema.field("images").type:
        try:
            return dataset.cast(features)  # paths, or no image at all
        except (TypeError, ValueError) as error:
            raise DatasetError(f"{name}: `images` must be a list of images in every row: {error}") from error
    # A cast would write every picture to a second file (datasets 5.2), though the bytes stay as they are.
    info = dataset.info.copy()
    info.features = features
    fingerprint = Hasher.hash([dataset._fingerprint, "undecoded"])
    return Dataset(
        dataset.data, info=info, split=dataset.split, indices_table=dataset._indices, fingerprint=fingerprint
    )


class Turns(NamedTuple):
    """How a chat template marks turns: the ids that open the model's turn, and the id that ends a turn.

    `prefill` is what it opens the model's turn with for generation alone: templates of large Gemma 4 put an empty
    thought there.
    """

    opening: list[int]
    end: int | None
    prefill: str = ""


class ChatCollator:
    """Rows with `prompt`, `completion` and, where there are any, `images`, to a padded batch of tensors.

    Labels are the completion (answer and turn end) and nothing else. Every batch says which tokens are image tokens,
    also one without images: Gemma builds its attention mask from that (`token_type_ids`; `mm_token_type_ids` in Gemma
    4). Each batch is checked by `check_batch`, since all that it finds would train without an error.

    With `features`, a row's pictures are read from there by their names (column `pictures`) and none is opened: the
    batch has `image_features` (image tokens of the batch, width of the tower) in place of pixels. With
    `pack_questions` above 1, so many rows of the same pictures share them in one sequence, which `position_ids` and
    `segment_ids` keep apart. With `pack_texts`, a batch without any image is one sequence of its rows end to end.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        features: FeatureCache | None = None,
        *,
        pack_questions: int = 1,
        pack_texts: bool = False,
    ) -> None:
        self.processor = processor
        self.features = features
        self.pack_questions = pack_questions
        self.pack_texts = pack_texts
        self.tokenizer = processor.tokenizer
        self.image_token_id = processor.tokenizer.image_token_id
        self.token_types = token_types_key(processor)
        self.turns = find_turns(processor)

    def __call__(self, rows: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        examples, pixels = (self._look_up(rows), {}) if self.features is not None else self._open(rows)
        if self.pack_texts and not any(example.pictures or self.image_token_id in example.ids for example in examples):
            batch, order = lay_end_to_end(examples), range(len(rows))
        else:
            lines = pack(examples, image_token_id=self.image_token_id, questions=self.pack_questions)
            batch, order = pad_lines(lines, self.tokenizer.pad_token_id), [row for line in lines for row in line.rows]
            if len(lines) < len(rows):
                pixels = self._choose(pixels, examples, [line.rows[0] for line in lines])
            if self.features is not None and any(line.pictures for line in lines):
                names = [name for line in lines for name in line.pictures]
                pixels = {"image_features": self.features.read(names)}
        batch[self.token_types] = (batch["input_ids"] == self.image_token_id).long()
        batch |= pixels
        names = [name_row(rows[number]) for number in order]
        problems = check_batch(batch, self.processor, turns=self.turns, names=names)
        if problems:
            raise DatasetError(problems[0])
        return batch

    def _open(self, rows: Sequence[Mapping]) -> tuple[list[Example], dict[str, torch.Tensor]]:
        """Rows as tokens, and what the tower needs to see of their pictures."""
        images = [open_images(row) for row in rows]
        texts = [self.render(row, len(own)) for row, own in zip(rows, images, strict=True)]
        # The rendered template already begins with <bos>; special tokens on top would double it.
        inputs = self.processor(
            text=[prompt for prompt, _ in texts],
            images=images if any(images) else None,
            add_special_tokens=False,
            padding=False,  # Gemma 4's processor pads unless told not to
        )
        examples = self._tokenize(inputs["input_ids"], [answer for _, answer in texts], rows)
        keys = [key for key in inputs if key not in TEXT_KEYS]  # pixels; in Gemma 4 also where each patch lies
        return examples, {key: torch.stack([torch.as_tensor(picture) for picture in inputs[key]]) for key in keys}

    def _choose(
        self, pixels: Mapping[str, torch.Tensor], examples: Sequence[Example], chosen: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """Of tensors (pictures and crops of all examples, …), the part of the chosen examples."""
        counts = [count_runs(example.ids, self.image_token_id) for example in examples]
        parts = {key: values.split(counts) for key, values in pixels.items()}
        return {key: torch.cat([own[number] for number in chosen]) for key, own in parts.items()}

    def _look_up(self, rows: Sequence[Mapping]) -> list[Example]:
        """Rows as tokens; how many image tokens a picture takes, its features tell."""
        for row in rows:
            if row.get("images") and PICTURES not in row:
                raise DatasetError(f"{name_row(row)}: its pictures are not named, so their features cannot be found")
        pictures = [row.get(PICTURES) or [] for row in rows]
        texts = [self.render(row, len(own)) for row, own in zip(rows, pictures, strict=True)]
        prompts = []
        for (prompt, _), own in zip(texts, pictures, strict=True):
            written = [write_picture(self.processor, self.features.tokens(name)) for name in own]
            prompts.append(fill_places(prompt, written, self.processor.image_token))
        ids = self.tokenizer(prompts, add_special_tokens=False, padding=False)["input_ids"]
        return self._tokenize(ids, [answer for _, answer in texts], rows)

    def _tokenize(self, prompts: Sequence[list[int]], answers: Sequence[str], rows: Sequence[Mapping]) -> list[Example]:
        endings = self.tokenizer(list(answers), add_special_tokens=False, padding=False)["input_ids"]
        return [
            Example([*prompt, *ending], answer_start=len(prompt), pictures=tuple(row.get(PICTURES) or ()))
            for prompt, ending, row in zip(prompts, endings, rows, strict=True)
        ]

    def render(self, row: Mapping, image_count: int) -> tuple[str, str]:
        """Prompt as the chat template writes it for generation, and the answer with its turn end.

        Images stand where the messages say; where none says so, before the first user's words.

        Raises:
            DatasetError: when the template refuses the row, or its places for images are more or fewer than its images.
        """
        prompt, completion = place_images(row["prompt"], image_count), _messages(row["completion"])
        if not prompt:
            raise DatasetError(f"{name_row(row)}: its prompt is empty")
        try:
            start = self.processor.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
            whole = self.processor.apply_chat_template([*prompt, *completion], tokenize=False)
        except TemplateError as error:
            raise DatasetError(f"{name_row(row)}: the chat template refuses it: {error}") from error
        places = whole.count(self.processor.image_token)
        if places != image_count:
            raise DatasetError(
                f"{name_row(row)}: images: {image_count}, places for images in its messages: {places}; "
                "give one for each, or leave the places out"
            )
        stem = start.removesuffix(self.turns.prefill)
        if not whole.startswith(stem):
            raise DatasetError(f"{name_row(row)}: {RENDERS_DIFFERENTLY}")
        return start, whole[len(stem) :]


def count_runs(ids: Sequence[int], token_id: int) -> int:
    """How many runs of a token there are: each picture, or crop of one, is a run of image tokens."""
    return sum(same for same, _ in groupby(token == token_id for token in ids))


def fill_places(prompt: str, written: Sequence[str], token: str) -> str:
    """A prompt with what stands for each picture written in the place of its token."""
    first, *rest = prompt.split(token)
    return first + "".join(picture + text for picture, text in zip(written, rest, strict=True))


def place_images(messages: Sequence[Mapping], image_count: int) -> list[dict]:
    """Copies of a row's messages, in parts, its images where they say; where none does, before the first user's words.

    In training and in asking alike: a model that is asked without its image would be judged on guesses.
    """
    placed = _messages(messages)
    if image_count and not any(part["type"] == "image" for message in placed for part in message["content"]):
        first_user = next((message for message in placed if message["role"] == "user"), None)
        if first_user is not None:
            first_user["content"][:0] = [{"type": "image"} for _ in range(image_count)]
    return placed


def _messages(messages: Sequence[Mapping]) -> list[dict]:
    """Copies whose content is a list of parts; Arrow fills keys that a part has not with None."""
    return [{**message, "content": _parts(message["content"])} for message in messages]


def _parts(content: str | Sequence[Mapping] | None) -> list[dict]:
    if isinstance(content, str) or content is None:
        return [{"type": "text", "text": content or ""}]
    # What an image part holds is not looked at: the pictures of a row are those of its column `images`.
    return [
        {key: value for key, value in part.items() if key == "type" or (part["type"] != "image" and value is not None)}
        for part in content
    ]


def name_row(row: Mapping) -> str:
    """A row as error messages name it."""
    return f"row {row['row_id']}" if row.get("row_id") else "a row without row_id"


def open_images(row: Mapping) -> list[PillowImage.Image]:
    """The images of a row in RGB; none where it has no column `images`.

    Raises:
        DatasetError: for one that cannot be read; the message names the row.
    """
    pictures = []
    for number, image in enumerate(row.get("images") or [], start=1):
        try:
            pictures.append(open_image(image))
        except UNREADABLE as error:
            raise DatasetError(f"{name_row(row)}: image {number} cannot be read: {error}") from error
    return pictures


def open_image(image: Mapping | PillowImage.Image | bytes | str | Path) -> PillowImage.Image:
    """An image of a row in RGB as displayed: undecoded (`bytes` or `path`), or already a Pillow image."""
    if isinstance(image, PillowImage.Image):
        return to_rgb(image)
    with PillowImage.open(image_source(image)) as opened:
        return to_rgb(opened)


def image_source(image: Mapping | bytes | str | Path) -> io.BytesIO | str | Path:
    """Where Pillow can read an undecoded image from."""
    if isinstance(image, Mapping):
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    if image is None:
        raise ValueError("neither bytes nor a path")
    return io.BytesIO(image) if isinstance(image, bytes) else image


def count_without_images(rows: Dataset) -> int:
    """How many rows have no image; no picture is read."""
    if "images" not in rows.column_names:
        return len(rows)
    batches = rows.select_columns(["images"]).with_format("arrow").iter(batch_size=1000)
    columns = (batch["images"] for batch in batches)
    return sum(pc.sum(pc.equal(pc.fill_null(pc.list_value_length(column), 0), 0)).as_py() for column in columns)


def check_pictures(rows: Dataset, trains: Sequence[str], name: str) -> None:
    """What only pictures reach cannot learn from rows without one, and has no loss to go back from there.

    Raises:
        DatasetError: naming the part and the counts.
    """
    blind = [part for part in trains if part != "language_model"]
    without = count_without_images(rows) if blind else 0
    if blind and without == len(rows):
        raise DatasetError(f"trains: {', '.join(blind)}: no row of {name} has an image to learn from")
    if without and "language_model" not in trains:
        raise DatasetError(
            f"trains: {', '.join(blind)}: {without} of {len(rows)} rows have no image and teach nothing; leave them "
            "out, or train the language model too"
        )


def token_types_key(processor: ProcessorMixin) -> str:
    """What the model of a processor calls the mark of image tokens: Gemma 3 and 4 differ."""
    return "token_type_ids" if "token_type_ids" in processor.model_input_names else "mm_token_type_ids"


def find_turns(processor: ProcessorMixin) -> Turns:
    """Read off the chat template which tokens open the model's turn and end it.

    Raises:
        DatasetError: when the template renders a prompt differently once an answer follows.
    """
    question = {"role": "user", "content": [{"type": "text", "text": "a"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "b"}]}
    asked = processor.apply_chat_template([question], tokenize=False)
    opened = processor.apply_chat_template([question], add_generation_prompt=True, tokenize=False)
    answered = processor.apply_chat_template([question, answer], tokenize=False)
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(opened, answered, strict=False))
    stem = opened[: sum(1 for _ in shared)]
    if not (opened.startswith(asked) and len(stem) > len(asked) and answered[len(stem) :].startswith("b")):
        raise DatasetError(RENDERS_DIFFERENTLY)
    opening, end = processor.tokenizer(
        [opened[len(asked) :], answered[len(stem) + 1 :]], add_special_tokens=False, padding=False
    )["input_ids"]
    return Turns(opening, end[0] if end else None, prefill=opened[len(stem) :])


def check_batch(
    batch: Mapping[str, torch.Tensor],
    processor: ProcessorMixin,
    *,
    turns: Turns | None = None,
    names: Sequence[str] | None = None,
) -> list[str]:
    """What is wrong with a batch, a sentence for each: labels, <bos>, marks of image tokens, images.

    `names` are what the sentences call the rows. An empty list is a sound batch.
    """
    turns = turns or find_turns(processor)
    tokenizer = processor.tokenizer
    problems = []
    if turns.end is None:
        problems.append("the chat template writes nothing after an answer: the model would never learn to stop")
    if tokenizer.pad_token_id in (turns.end, tokenizer.eos_token_id):
        problems.append(f"the tokenizer pads with {tokenizer.pad_token!r}, which also ends a turn or a text")
    for number, (ids, labels) in enumerate(split_rows(batch)):
        name = names[number] if names else f"row {number + 1} of the batch"
        sentences = _check_row(ids, labels, processor, turns)
        problems.extend(f"{name}: {sentence}" for sentence in sentences)
    return problems + _check_tensors(batch, processor)


def _check_row(ids: list[int], labels: list[int], processor: ProcessorMixin, turns: Turns) -> list[str]:
    bos, image = processor.tokenizer.bos_token_id, processor.tokenizer.image_token_id
    problems = []
    if bos is not None and ids.count(bos) != 1:
        problems.append(f"<bos> occurs {ids.count(bos)} times instead of once: the template's own is enough")
    trained = [place for place, label in enumerate(labels) if label != IGNORED]
    if not trained:
        return [*problems, "no token is trained: its answer is empty or was cut off"]
    first, answer = trained[0], labels[trained[0] : trained[-1] + 1]
    if image in answer:
        problems.append("image tokens are in the labels")
    if ids[:first][-len(turns.opening) :] != turns.opening or len(answer) != len(trained):
        problems.append("the labels are not the answer alone: part of the prompt is trained, or of the answer is not")
    elif answer != ids[first:]:
        problems.append("the labels are not the tokens of the answer up to its end")
    if turns.end is not None and answer.count(turns.end) != 1:
        problems.append(f"the turn end occurs {answer.count(turns.end)} times in the labels instead of once")
    elif answer[0] == turns.end:
        problems.append("its answer is empty")
    return problems


def _check_tensors(batch: Mapping[str, torch.Tensor], processor: ProcessorMixin) -> list[str]:
    key = token_types_key(processor)
    is_image = batch["input_ids"] == processor.tokenizer.image_token_id
    problems = []
    if key not in batch:
        problems.append(f"{key} is missing: the attention mask would be another than the model was trained with")
    elif not torch.equal(batch[key] == 1, is_image):
        problems.append(f"{key} does not mark the image tokens and them alone")
    features = _count_features(batch, processor)
    if features is not None and features != is_image.sum():
        problems.append(f"the pictures make {features} image tokens, the texts have {int(is_image.sum())}")
    return problems


def _count_features(batch: Mapping[str, torch.Tensor], processor: ProcessorMixin) -> int | None:
    """How many image tokens the pictures of a batch fill; None for a family that we cannot count."""
    if "image_features" in batch:
        return len(batch["image_features"])
    if "pixel_values" not in batch:
        return 0
    if "image_position_ids" in batch:
        patches = (batch["image_position_ids"] != -1).all(-1).sum(-1)
        return int((patches // processor.image_processor.pooling_kernel_size**2).sum())
    if token_types_key(processor) == "token_type_ids":
        return len(batch["pixel_values"]) * processor.image_seq_length
    return None
