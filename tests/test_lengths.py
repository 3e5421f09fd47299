"""Lengths of rows: exact without decoding a picture; what is too long is left out and listed; batches of like rows."""

import io
import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import (
    BatchSamplerShard,
    DataLoaderShard,
    SeedableRandomSampler,
    skip_first_batches,
)
from conftest import REPOSITORY
from datasets import Dataset, DatasetDict, Image, List, concatenate_datasets, load_dataset
from PIL import Image as PillowImage
from torch.utils.data import BatchSampler

from data_builders.chat import answer_messages, prompt_messages
from data_builders.records import InputError
from dentalgemma.models.processors import load_processor
from dentalgemma.training.config import StageConfig, parse_stage
from dentalgemma.training.data import ChatCollator, DatasetError, load_splits
from dentalgemma.training.lengths import LIST_NAME, LengthGroups, keep_fitting, row_lengths, set_epoch

PATHS = List(Image(decode=False))


@pytest.fixture(scope="module", params=["gemma3", "gemma4"])
def processor(request, tiny_model, tiny_gemma4):
    return load_processor({"gemma3": tiny_model, "gemma4": tiny_gemma4}[request.param])


def picture(size, kind="PNG", mode="RGB", **options):
    buffer = io.BytesIO()
    PillowImage.new(mode, size, 90).save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def make_rows(rows):
    keys = ("row_id", "prompt", "completion", "images")
    columns = {key: [row.get(key) for row in rows] for key in keys}
    return Dataset.from_dict(columns).cast_column("images", PATHS)


@pytest.fixture(scope="module")
def kinds():
    """Rows of every kind: no picture, one, several; grey, turned by EXIF, very narrow; long and short texts."""
    turned = PillowImage.Exif()
    turned[0x0112] = 6
    pictures = [
        [],
        None,
        [picture((300, 140))],
        [picture((64, 64), mode="L"), picture((700, 90)), picture((31, 500))],
        [picture((400, 100), "JPEG", exif=turned)],
        [picture((9, 200)), picture((1200, 600), "JPEG")],
    ]
    texts = [
        ("Which teeth?", "None."),
        ("¿Qué dientes están afectados? 🦷", "Los molares.\n\n- 36\n- 46"),
        ("\n\nA?", "B."),
    ]
    rows = [
        {
            "row_id": f"r{number}",
            "prompt": [
                *(prompt_messages(*(question, "") if number % 2 else (question,))),
                *([*answer_messages(" Maybe. "), {"role": "user", "content": "Sure?"}] if number % 3 == 0 else []),
            ],
            "completion": answer_messages(answer),
            "images": own,
        }
        for number, (own, (question, answer)) in enumerate((own, text) for own in pictures for text in texts)
    ]
    return make_rows(rows)


@pytest.fixture
def splits(kinds):
    return DatasetDict(train=kinds, validation=kinds.select(range(6)), test=kinds)


def settings(tmp_path, **others):
    chosen = {"output_dir": str(tmp_path), "process_index": 0, "train_sampling_strategy": "random"}
    return SimpleNamespace(**chosen | {"length_column_name": "length"} | others)


def context_of(tokens):
    text = SimpleNamespace(max_position_embeddings=tokens)
    return SimpleNamespace(get_text_config=lambda: text)


def stage_of(**options):
    return StageConfig(dataset_name="x", dataset_test_split="validation", **options)


def collated_lengths(dataset, processor):
    collator = ChatCollator(processor)
    return [int(collator([row])["attention_mask"].sum()) for row in dataset]


def test_lengths_are_those_of_the_collator_for_rows_of_every_kind(kinds, processor):
    lengths = row_lengths(kinds, processor, batch_size=4)

    assert len(set(lengths)) > 8
    assert lengths == collated_lengths(kinds, processor)


def test_lengths_are_those_of_the_collator_for_built_datasets(vqa_dataset, instruct_dataset, processor):
    for folder in (vqa_dataset, instruct_dataset):
        rows = load_splits(StageConfig(dataset_name=str(folder), dataset_test_split="validation"))["train"]
        rows = rows.select(range(0, len(rows), 7))
        assert row_lengths(rows, processor) == collated_lengths(rows, processor)


def test_lengths_of_chosen_rows_follow_the_choice(kinds, processor):
    """Chosen rows stay where they are in the file, and are reached by number."""
    everything = row_lengths(kinds, processor)
    chosen = [17, 3, 3, 9, 0]

    assert row_lengths(kinds.select(chosen), processor) == [everything[number] for number in chosen]


def test_images_with_their_own_places_count_too(processor):
    parts = [{"type": "text", "text": "One:"}, {"type": "image", "text": None}, {"type": "text", "text": "Healthy?"}]
    row = {"prompt": [{"role": "user", "content": parts}], "completion": answer_messages("Yes.")}
    answer = [{"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}]
    dataset = make_rows([{**row, "completion": answer, "row_id": "a", "images": [picture((100, 100))]}])

    assert row_lengths(dataset, processor) == collated_lengths(dataset, processor)


@pytest.mark.known_bug(7)
def test_no_picture_is_decoded_to_count_tokens(processor):
    """A picture cut off after its header has a size, and no pixels that could be read."""
    whole = picture((300, 140))["bytes"]
    row = {"row_id": "r", "prompt": prompt_messages("?"), "completion": answer_messages("!")}
    cut = make_rows([{**row, "images": [{"bytes": whole[:60], "path": None}]}])
    sound = make_rows([{**row, "images": [{"bytes": whole, "path": None}]}])

    assert row_lengths(cut, processor) == row_lengths(sound, processor)
    with pytest.raises(DatasetError, match="row r: image 1 cannot be read"):
        ChatCollator(processor)([cut[0]])


@pytest.mark.known_bug(7)
def test_a_picture_without_a_size_names_its_row(tiny_gemma4):
    row = {"row_id": "r5", "prompt": prompt_messages("?"), "completion": answer_messages("!")}
    rows = make_rows([{**row, "images": [{"bytes": b"no picture", "path": None}]}])

    with pytest.raises(DatasetError, match="row r5: a picture cannot be read"):
        row_lengths(rows, load_processor(tiny_gemma4))


def test_long_rows_are_left_out_counted_and_listed(splits, processor, tmp_path, capsys):
    lengths = row_lengths(splits["train"], processor)
    limit = sorted(lengths)[9]
    kept = keep_fitting(
        splits, processor, context_of(4096), stage=stage_of(max_row_tokens=limit), training=settings(tmp_path)
    )
    listed = [json.loads(line) for line in (tmp_path / LIST_NAME).read_text().splitlines()]
    expected = [(f"r{number}", "train", length) for number, length in enumerate(lengths) if length > limit]

    assert [row["row_id"] for row in kept.dataset["train"]] == [
        f"r{number}" for number, length in enumerate(lengths) if length <= limit
    ]
    assert [(row["row_id"], row["split"], row["tokens"]) for row in listed if row["split"] == "train"] == expected
    assert kept.left_out["train"] == len(expected)
    assert sum(kept.left_out.values()) == len(listed)
    assert kept.longest["train"] == limit
    assert kept.dataset["test"] is splits["test"]
    assert f"Left out for more than {limit} tokens: {len(expected)} of train" in capsys.readouterr().err


def test_rows_beyond_the_context_are_left_out_unasked(splits, processor, tmp_path):
    lengths = row_lengths(splits["train"], processor)
    context = max(lengths) - 1
    kept = keep_fitting(splits, processor, context_of(context), stage=stage_of(), training=settings(tmp_path))

    assert kept.left_out == {"train": sum(length > context for length in lengths)}
    assert kept.longest["train"] <= context


def test_without_a_limit_every_row_stays_and_the_longest_is_told(splits, processor, tmp_path, capsys):
    (tmp_path / LIST_NAME).write_text("what a run before left out\n")
    kept = keep_fitting(splits, processor, context_of(4096), stage=stage_of(), training=settings(tmp_path))
    longest = max(row_lengths(splits["train"], processor))

    assert kept.left_out == {}
    assert len(kept.dataset["train"]) == len(splits["train"])
    assert not (tmp_path / LIST_NAME).exists()
    assert f"Longest rows in tokens: train {longest:,}" in capsys.readouterr().err


def test_a_split_that_would_be_left_empty_is_refused(splits, processor, tmp_path):
    with pytest.raises(DatasetError, match=r"split 'train': all 18 rows are longer than 5 tokens .*max_row_tokens"):
        keep_fitting(splits, processor, context_of(4096), stage=stage_of(max_row_tokens=5), training=settings(tmp_path))


def test_a_limit_of_nothing_is_refused():
    with pytest.raises(InputError, match="max_row_tokens: 0 must be at least 1"):
        parse_stage(REPOSITORY / "recipes" / "stage1_vqa.yaml", argv=["--max_row_tokens", "0"])


@pytest.mark.parametrize("is_chosen", [False, True], ids=["whole file", "chosen rows"])
def test_the_length_column_is_added_when_batches_are_grouped(splits, processor, tmp_path, is_chosen):
    if is_chosen:
        train = concatenate_datasets([splits["train"], splits["train"]]).select([20, 5, 5, 11])
        splits = DatasetDict({**splits, "train": train})
    lengths = row_lengths(splits["train"], processor)
    training = settings(tmp_path, train_sampling_strategy="group_by_length")
    grouped = keep_fitting(splits, processor, context_of(4096), stage=stage_of(), training=training).dataset
    plain = keep_fitting(splits, processor, context_of(4096), stage=stage_of(), training=settings(tmp_path)).dataset

    assert grouped["train"]["length"][:] == lengths
    assert grouped["train"][1]["row_id"] == splits["train"][1]["row_id"]
    assert grouped["validation"]["length"][:] == row_lengths(splits["validation"], processor)
    assert "length" not in plain["train"].column_names


def test_grouped_batches_waste_less_padding_and_come_in_the_same_order_each_time():
    lengths = [10 + (number * 37) % 500 for number in range(400)]
    epoch = 0
    groups = LengthGroups(8, lengths, seed=3, epoch=lambda: epoch)
    first = list(groups)
    again = list(LengthGroups(8, lengths, seed=3, epoch=lambda: epoch))
    epoch = 1
    second = list(groups)

    def padding(order):
        batches = [order[start : start + 8] for start in range(0, len(order), 8)]
        return sum(max(lengths[row] for row in batch) - lengths[row] for batch in batches for row in batch)

    assert sorted(first) == sorted(second) == list(range(400))
    assert first == again != second
    assert padding(first) < 0.15 * padding(range(400))


@pytest.mark.known_bug(21)
def test_several_processes_resume_in_the_order_of_their_epoch():
    """accelerate alone shows them the first epoch's order again: the control, which fails when that is mended."""
    rows = list(range(16))

    def loader():
        sampler = SeedableRandomSampler(rows, generator=torch.Generator(), data_seed=5)
        shard = BatchSamplerShard(BatchSampler(sampler, 2, False), num_processes=2, process_index=0)
        return DataLoaderShard(rows, batch_sampler=shard)

    def order(of):
        of.set_epoch(1)
        return [batch.tolist() for batch in of]

    whole, mended = order(loader()), loader()
    set_epoch(mended, 1)

    assert order(skip_first_batches(mended, 2)) == whole[2:]
    assert order(skip_first_batches(loader(), 2)) != whole[2:]


@pytest.fixture(scope="module")
def train(tmp_path_factory, tiny_model, vqa_dataset):
    """Train for a few steps of grouped batches, twelve an epoch; returns the trainer."""
    from trl import ModelConfig, SFTConfig

    from dentalgemma.models.loading import load_model
    from dentalgemma.training.trainer import StageTrainer

    folder = tmp_path_factory.mktemp("runs")
    chosen = load_dataset(str(vqa_dataset)).cast_column("images", PATHS)
    rows, held_out = chosen["train"].select(range(0, 96, 2)), chosen["validation"].select(range(4))
    dataset = DatasetDict(train=rows, validation=held_out)

    def train_(name, *, max_steps=18, resume=None, **options):
        training = SFTConfig(
            output_dir=str(folder / name),
            per_device_train_batch_size=4,
            num_train_epochs=2,
            max_steps=max_steps,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            max_length=None,
            report_to="none",
            disable_tqdm=True,
            gradient_checkpointing=False,
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            train_sampling_strategy="group_by_length",
            **options,
        )
        model_config = ModelConfig(model_name_or_path=str(tiny_model), dtype="float32", use_peft=True, lora_r=4)
        model, processor = load_model(model_config)
        stage = StageConfig(dataset_name=str(vqa_dataset), dataset_test_split="validation", stage="t")
        trainer = StageTrainer(
            model=model, processor=processor, stage=stage, training=training, model_config=model_config, dataset=dataset
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return train_


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_grouped_batches_train_and_a_resumed_run_takes_the_same_ones(train):
    """Resumed in the middle of the second epoch, whose order must be that of the second."""
    whole = train("whole", save_strategy="steps", save_steps=15)
    resumed = train("resumed", resume=f"{whole.args.output_dir}/checkpoint-15", save_strategy="no")

    assert isinstance(whole._get_train_sampler(), LengthGroups)
    assert len(losses_of(whole)) == 18
    assert losses_of(resumed)[-3:] == losses_of(whole)[-3:]


def test_grouped_validation_takes_every_row_once(train):
    trainer = train("validated", max_steps=1, save_strategy="no", per_device_eval_batch_size=3)
    order = list(trainer._get_eval_sampler(trainer.eval_dataset))

    assert sorted(order) == list(range(4))
    assert trainer.evaluate()["eval_loss"] > 0
