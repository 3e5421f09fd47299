"""Other data mixed in: the shares of the YAML, the same rows for the same seed, whatever form their messages have."""

import io
from collections import Counter
from pathlib import Path

import pytest
from conftest import REPOSITORY
from datasets import Dataset, Image, List, Value
from PIL import Image as PillowImage

from data_builders.chat import answer_messages, prompt_messages
from data_builders.records import InputError
from dentalgemma.models.processors import load_processor
from dentalgemma.training.config import StageConfig, parse_stage
from dentalgemma.training.data import ChatCollator, load_splits
from dentalgemma.training.lengths import row_lengths
from dentalgemma.training.mixture import describe_mixture

RECIPE = REPOSITORY / "recipes" / "stage1_vqa.yaml"


def picture(colour=90):
    buffer = io.BytesIO()
    PillowImage.new("RGB", (64, 40), colour).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def parts(role, text, images=0):
    pictures = [{"type": "image", "text": None}] * images
    return {"role": role, "content": [{"type": "text", "text": text}, *pictures]}


def chat(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def general(tmp_path_factory):
    """General medical data of several shapes, each a folder with a split `train`."""
    folder = tmp_path_factory.mktemp("general")
    numbers = range(60)
    shapes = {
        "texts": Dataset.from_dict(
            {
                "prompt": [prompt_messages(f"Question {number}?") for number in numbers],
                "completion": [answer_messages(f"Answer {number}.") for number in numbers],
                "licence_of_row": ["CC0"] * 60,
            }
        ),
        "messages": Dataset.from_dict(
            {
                "messages": [
                    [*chat("First?", "One."), *chat(f"Second {number}?", "Two."), {"role": "user", "content": "Bye."}]
                    for number in numbers
                ]
            }
        ),
        "pictures": Dataset.from_dict(
            {
                "messages": [
                    [parts("user", f"What is {number}?", 1), parts("assistant", "Grey.")] for number in numbers
                ],
                "images": [[picture(number)] for number in numbers],
            }
        ).cast_column("images", List(Image(decode=False))),
        "plain": Dataset.from_dict({"prompt": ["Why?"] * 4, "completion": [f"Because {n}." for n in range(4)]}),
    }
    for name, dataset in shapes.items():
        (folder / name).mkdir()
        dataset.to_parquet(folder / name / "train.parquet")
    return folder


@pytest.fixture(scope="module", params=["gemma3", "gemma4"])
def processor(request, tiny_model, tiny_gemma4):
    return load_processor({"gemma3": tiny_model, "gemma4": tiny_gemma4}[request.param])


def mix(folder, general, *, seed=42, split="validation", **weights):
    return load_splits(
        StageConfig(
            dataset_name=str(folder),
            dataset_test_split=split,
            mix_datasets=[str(general / name) for name in weights],
            mix_weights=list(weights.values()),
            mix_seed=seed,
        )
    )


def origins(rows):
    return Counter(row_id.partition("/")[0] if "/" in row_id else "main" for row_id in rows["row_id"])


def test_each_dataset_has_the_share_that_its_weight_says(instruct_dataset, general):
    main = len(load_splits(StageConfig(dataset_name=str(instruct_dataset), dataset_test_split="validation"))["train"])
    mixed = mix(instruct_dataset, general, texts=0.25, messages=0.1)
    counts = origins(mixed["train"])
    whole = main / 0.65

    assert counts == {"main": main, "texts": round(0.25 * whole), "messages": round(0.1 * whole)}
    assert counts["texts"] / sum(counts.values()) == pytest.approx(0.25, abs=0.01)
    assert [entry["rows"] for entry in mixed.mixture] == [main, counts["texts"], counts["messages"]]
    assert [entry["weight"] for entry in mixed.mixture] == pytest.approx([0.65, 0.25, 0.1])
    assert len({entry["fingerprint"] for entry in mixed.mixture}) == 3


def test_no_row_of_the_stage_is_lost_and_none_of_the_others_comes_twice(vqa_dataset, general):
    alone = load_splits(StageConfig(dataset_name=str(vqa_dataset), dataset_test_split="validation"))
    mixed = mix(vqa_dataset, general, texts=0.1)
    ids = Counter(mixed["train"]["row_id"])

    assert set(alone["train"]["row_id"]) <= ids.keys()
    assert set(ids.values()) == {1}


def test_the_same_seed_takes_the_same_rows_and_another_takes_others(vqa_dataset, general):
    rows = [mix(vqa_dataset, general, seed=seed, pictures=0.08)["train"] for seed in (1, 1, 2)]
    first, again, other = (list(chosen["row_id"]) for chosen in rows)

    assert first == again
    assert rows[0]._fingerprint == rows[1]._fingerprint != rows[2]._fingerprint
    assert sorted(first) != sorted(other)


def test_too_few_rows_are_repeated_evenly_and_that_is_said(instruct_dataset, general):
    mixed = mix(instruct_dataset, general, plain=0.2)
    again = Counter(row_id for row_id in mixed["train"]["row_id"] if row_id.startswith("plain/"))
    wanted = mixed.mixture[1]["rows"]

    assert wanted > 4
    assert sum(again.values()) == wanted
    assert max(again.values()) - min(again.values()) <= 1
    assert f"each of its 4 about {wanted / 4:.1f} times" in describe_mixture(mixed.mixture)


def test_the_last_answer_of_messages_is_what_trains(instruct_dataset, general, processor):
    mixed = mix(instruct_dataset, general, messages=0.3)
    row = next(row for row in mixed["train"] if row["row_id"].startswith("messages/"))
    number = row["row_id"].partition("/")[2]

    assert [message["content"] for message in row["prompt"]] == ["First?", "One.", f"Second {number}?"]
    assert row["completion"] == answer_messages("Two.")
    assert ChatCollator(processor)([row])["labels"].shape[0] == 1


def test_images_within_messages_keep_their_places(vqa_dataset, general, processor):
    """The images of the mixed-in rows come after their words, those of the stage before, as in their own data."""
    mixed = mix(vqa_dataset, general, pictures=0.05)["train"]
    foreign = next(row for row in mixed if row["row_id"].startswith("pictures/"))
    own = next(row for row in mixed if not row["row_id"].startswith("pictures/"))
    alone = load_splits(StageConfig(dataset_name=str(vqa_dataset), dataset_test_split="validation"))["train"]
    before = next(row for row in alone if row["row_id"] == own["row_id"])
    collator = ChatCollator(processor)
    text, _ = collator.render(foreign, 1)

    assert text.index("What is") < text.index(processor.image_token)
    assert collator.render(own, 1) == collator.render(before, 1)
    assert own["images"] == before["images"]
    assert own["claims"] == before["claims"]


def test_lengths_of_mixed_rows_are_those_of_the_collator(vqa_dataset, general, processor):
    mixed = mix(vqa_dataset, general, texts=0.05, pictures=0.05)["train"].select(range(80))
    collator = ChatCollator(processor)

    assert set(origins(mixed)) == {"main", "texts", "pictures"}
    assert row_lengths(mixed, processor) == [int(collator([row])["attention_mask"].sum()) for row in mixed]


def test_validation_rows_stay_those_of_the_stage(vqa_dataset, general):
    alone = load_splits(StageConfig(dataset_name=str(vqa_dataset), dataset_test_split="validation"))
    mixed = mix(vqa_dataset, general, texts=0.2, pictures=0.2)

    assert mixed["validation"]._fingerprint == alone["validation"]._fingerprint
    assert mixed["validation"].features == alone["validation"].features


def test_no_image_is_copied_by_mixing(vqa_dataset, general):
    """The pictures stay in the files that the datasets came from: rows are told by number."""
    alone = load_splits(StageConfig(dataset_name=str(vqa_dataset), dataset_test_split="validation"))["train"]
    mixed = mix(vqa_dataset, general, pictures=0.1)["train"]

    assert mixed._indices is not None
    assert len(mixed.data) == len(alone) + 60
    assert {file["filename"] for file in alone.cache_files} <= {file["filename"] for file in mixed.cache_files}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        pytest.param({"question": ["?"]}, "neither `prompt` and `completion` nor `messages`", id="no chat"),
        pytest.param({"messages": [[{"role": "user", "content": "?"}]]}, "row odd/0 has no answer", id="no answer"),
    ],
)
def test_what_is_no_dialogue_is_refused(instruct_dataset, tmp_path, columns, message):
    (tmp_path / "odd").mkdir()
    Dataset.from_dict(columns).to_parquet(tmp_path / "odd" / "train.parquet")

    with pytest.raises(InputError, match=message):
        mix(instruct_dataset, tmp_path, odd=0.5)


def test_a_dataset_without_a_training_split_is_refused(instruct_dataset, tmp_path):
    (tmp_path / "odd").mkdir()
    Dataset.from_dict({"prompt": ["?"], "completion": ["!"]}).to_parquet(tmp_path / "odd" / "test.parquet")

    with pytest.raises(InputError, match="no split 'train' to mix in, only test"):
        mix(instruct_dataset, tmp_path, odd=0.5)


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        pytest.param(["a", "b"], ["0.2"], "names 2 datasets, mix_weights gives 1", id="one too few"),
        pytest.param(["a"], ["1.0"], "sum to less than 1", id="nothing left for the stage"),
        pytest.param(["a"], ["-0.1"], "must be above 0", id="negative"),
    ],
)
def test_weights_that_make_no_mixture_are_refused(names, weights, message):
    with pytest.raises(InputError, match=message):
        parse_stage(RECIPE, argv=["--mix_datasets", *names, "--mix_weights", *weights])


def test_the_yaml_names_datasets_and_weights_flat_and_the_seed_is_that_of_the_run(tmp_path):
    config = tmp_path / "own.yaml"
    config.write_text(RECIPE.read_text() + "mix_datasets: [data/general, org/more]\nmix_weights: [0.2, 0.1]\n")
    stage, _, _ = parse_stage(config, argv=["--seed", "7"])

    assert (stage.mix_datasets, stage.mix_weights, stage.mix_seed) == (["data/general", "org/more"], [0.2, 0.1], 7)


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_rows_with_and_without_images_train_together(family, vqa_dataset, general, tiny_model, tiny_gemma4, tmp_path):
    from trl import ModelConfig, SFTConfig

    from dentalgemma.models.loading import load_model
    from dentalgemma.training.run_facts import read_run_facts, write_run_facts
    from dentalgemma.training.trainer import StageTrainer

    stage = StageConfig(
        dataset_name=str(vqa_dataset),
        dataset_test_split="validation",
        mix_datasets=[str(general / "texts"), str(general / "pictures")],
        mix_weights=[0.3, 0.2],
        mix_seed=0,
        stage="mixed",
        max_row_tokens=150,
    )
    folder = {"gemma3": tiny_model, "gemma4": tiny_gemma4}[family]
    model_config = ModelConfig(model_name_or_path=str(folder), dtype="float32", use_peft=True, lora_r=4)
    training = SFTConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        max_length=None,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    dataset = load_splits(stage)
    model, processor = load_model(model_config)
    trainer = StageTrainer(
        model=model, processor=processor, stage=stage, training=training, model_config=model_config, dataset=dataset
    )
    seen = []
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: seen.append([len(row["images"] or []) for row in rows]) or collate(rows)
    trainer.train()
    write_run_facts(trainer, stage, model_config, dataset)
    facts = read_run_facts(tmp_path)

    assert [(entry["dataset"], entry["rows"]) for entry in facts["mixture"]] == [
        (Path(entry["dataset"]).name, entry["rows"]) for entry in dataset.mixture
    ]
    assert sum(entry["rows"] for entry in facts["mixture"]) == facts["dataset_rows"]["train"]
    assert facts["left_out"] == trainer.rows.left_out
    assert len(trainer.train_dataset) == facts["dataset_rows"]["train"] - facts["left_out"].get("train", 0)
    assert trainer.state.global_step == 2
    assert all(set(batch) == {0, 1} for batch in seen)
    assert all(entry["loss"] > 0 for entry in trainer.state.log_history if "loss" in entry)


def test_features_of_the_training_rows_are_those_of_the_stage(vqa_dataset, general):
    mixed = mix(vqa_dataset, general, texts=0.1)["train"]

    assert mixed.features["prompt"] == List({"role": Value("string"), "content": Value("string")})
    assert "licence_of_row" not in mixed.column_names
    assert next(row for row in mixed if row["row_id"].startswith("texts/"))["images"] is None
