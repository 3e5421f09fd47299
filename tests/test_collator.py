"""What the model is trained on: the answer and its turn end, nothing else; and the same tensors as TRL's collator."""

import copy

import pytest
import torch
from datasets import Image, List, load_dataset
from transformers import AutoProcessor
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from data_builders.chat import answer_messages, prompt_messages
from dentalgemma.training.config import StageConfig
from dentalgemma.training.data import IGNORED, ChatCollator, DatasetError, load_splits


@pytest.fixture(scope="module")
def processor(tiny_model):
    return AutoProcessor.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def rows(vqa_dataset):
    dataset = load_dataset(str(vqa_dataset), split="train").cast_column("images", List(Image(decode=False)))
    return [dataset[number] for number in range(0, 60, 10)]


@pytest.fixture
def text_rows():
    return [
        {"prompt": prompt_messages("What is caries?"), "completion": answer_messages("A disease of teeth.")},
        {"prompt": prompt_messages("And this?", ""), "completion": answer_messages("It is none.")},
    ]


def decode_labels(batch, processor, row):
    return processor.tokenizer.decode(batch["labels"][row][batch["labels"][row] != IGNORED])


def test_labels_are_answer_and_turn_end_and_nothing_else(rows, processor):
    batch = ChatCollator(processor)(rows)

    for number, row in enumerate(rows):
        assert decode_labels(batch, processor, number) == row["completion"][0]["content"] + "<end_of_turn>\n"


def test_every_row_has_one_bos_and_no_label_on_an_image_token(rows, processor):
    batch = ChatCollator(processor)(rows)
    image_token = processor.tokenizer.image_token_id

    assert ((batch["input_ids"] == processor.tokenizer.bos_token_id).sum(1) == 1).all()
    assert (batch["labels"] != image_token).all()
    assert ((batch["input_ids"] == image_token).sum(1) == 16).all()
    assert ((batch["token_type_ids"] == 1) == (batch["input_ids"] == image_token)).all()
    assert batch["pixel_values"].shape == (len(rows), 3, 112, 112)


def test_rows_without_images_have_token_type_ids_too(text_rows, processor):
    batch = ChatCollator(processor)(text_rows)

    assert "pixel_values" not in batch
    assert batch["token_type_ids"].shape == batch["input_ids"].shape
    assert not batch["token_type_ids"].any()
    assert decode_labels(batch, processor, 0) == "A disease of teeth.<end_of_turn>\n"
    assert ((batch["input_ids"] == processor.tokenizer.bos_token_id).sum(1) == 1).all()


def test_a_batch_may_mix_rows_with_none_one_and_several_images(rows, text_rows, processor):
    two = {**rows[1], "images": [*rows[1]["images"], *rows[2]["images"]]}
    batch = ChatCollator(processor)([text_rows[0], rows[0], two])
    images = (batch["input_ids"] == processor.tokenizer.image_token_id).sum(1) // 16

    assert images.tolist() == [0, 1, 2]
    assert len(batch["pixel_values"]) == 3
    assert torch.equal(batch["pixel_values"][0], ChatCollator(processor)([rows[0]])["pixel_values"][0])


def test_the_batch_is_the_one_trl_makes(rows, processor):
    ours = ChatCollator(processor)(rows)
    decoded = load_rows_as_trl_does(rows)
    theirs = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)(decoded)

    for key in ("input_ids", "attention_mask", "token_type_ids", "labels", "pixel_values"):
        assert torch.equal(ours[key], torch.as_tensor(theirs[key])), key


def test_a_dialogue_trains_its_last_answer_alone(rows, processor):
    history = [*rows[0]["prompt"], *rows[0]["completion"], {"role": "user", "content": "And elsewhere?"}]
    row = {**rows[0], "prompt": history, "completion": answer_messages("Nothing else.")}
    batch = ChatCollator(processor)([row])

    assert decode_labels(batch, processor, 0) == "Nothing else.<end_of_turn>\n"
    assert (batch["input_ids"] == processor.tokenizer.image_token_id).sum() == 16


def test_the_rows_are_left_as_they_were(rows, processor):
    before = copy.deepcopy(rows)
    ChatCollator(processor)(rows)

    assert rows == before


def test_a_dataset_without_answers_is_refused(tmp_path, vqa_dataset):
    bare = load_dataset(str(vqa_dataset)).remove_columns("completion")
    bare.save_to_disk(str(tmp_path / "bare"))

    with pytest.raises(DatasetError, match="completion"):
        load_splits(StageConfig(dataset_name=str(tmp_path / "bare"), dataset_test_split="validation"))
    with pytest.raises(DatasetError, match="no split 'dev', only train, validation, test"):
        load_splits(StageConfig(dataset_name=str(vqa_dataset), dataset_test_split="dev"))


def load_rows_as_trl_does(rows):
    image = Image()
    return [{**row, "images": [image.decode_example(picture) for picture in row["images"]]} for row in rows]
