"""Stages whose frozen tower sees each picture once: the same training as live, whatever is packed."""

import json

import pytest
import torch

from data_builders.records import InputError
from dentalgemma.training import backbone, checkpoints
from dentalgemma.training.data import PICTURES, DatasetError
from dentalgemma.training.run_facts import write_run_facts

EXACT = {"lora_dropout": 0, "train_sampling_strategy": "sequential", "eval_strategy": "steps", "eval_steps": 3}


@pytest.fixture(params=["gemma3", "gemma4"])
def model(request, tiny_model, tiny_gemma4):
    return {"gemma3": tiny_model, "gemma4": tiny_gemma4}[request.param]


def train(make_trainer, model, out, **options):
    trainer = make_trainer(model, out, **EXACT, **options)
    trainer.train()
    return trainer


def losses(trainer):
    return [
        entry.get("loss", entry.get("eval_loss")) for entry in trainer.state.log_history if "train_loss" not in entry
    ]


def weights(trainer):
    return torch.cat([weight.detach().flatten() for weight in trainer.model.parameters() if weight.requires_grad])


def count_calls(module):
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("trains", [["language_model"], ["language_model", "aligner"]], ids="+".join)
def test_a_run_with_stored_features_is_bit_for_bit_the_live_one(make_trainer, model, trains, tmp_path):
    live = train(make_trainer, model, tmp_path / "live", vision_features="live", trains=trains, logging_steps=1)
    trainer = make_trainer(model, tmp_path / "cached", **EXACT, trains=trains, logging_steps=1)
    trainer.encode()
    calls = count_calls(backbone.tower_of(trainer.model))
    trainer.train()

    assert not calls
    assert "images" not in trainer.train_dataset.column_names
    assert losses(trainer) == losses(live)
    assert torch.equal(weights(trainer), weights(live))


def test_packed_questions_train_what_separate_ones_do(make_trainer, model, tmp_path):
    options = {"per_device_train_batch_size": 8, "logging_steps": 1}
    apart = train(make_trainer, model, tmp_path / "apart", vision_features="live", **options)
    packed = train(make_trainer, model, tmp_path / "packed", pack_questions=4, **options)
    other = train(make_trainer, model, tmp_path / "other", pack_questions=4, seed=7, **options)

    assert packed.state.num_input_tokens_seen == apart.state.num_input_tokens_seen
    assert packed._total_train_tokens < 0.85 * apart._total_train_tokens
    assert losses(packed) == pytest.approx(losses(apart), rel=1e-5)
    assert losses(other) != pytest.approx(losses(apart), rel=1e-5)


def test_questions_of_an_image_come_together_by_themselves(make_trainer, tiny_model, tmp_path):
    options = {"per_device_train_batch_size": 8, "pack_questions": 4, "max_steps": 2}
    trainer = make_trainer(tiny_model, tmp_path, **options)
    trainer.encode()
    batches = [batch["input_ids"].shape[0] for batch in trainer.get_train_dataloader()]

    assert sum(batches) <= 10  # of 24 rows


def test_a_second_run_finds_the_features_of_the_first(make_trainer, tiny_model, tmp_path, capsys):
    for name in ("first", "second"):
        make_trainer(tiny_model, tmp_path / name, feature_cache=tmp_path / "features").encode()
    said = capsys.readouterr().err

    assert "pictures to encode" in said
    assert "all there already" in said


def test_rows_of_another_dataset_are_evaluated_with_their_pictures(make_trainer, tiny_model, tmp_path):
    trainer = make_trainer(tiny_model, tmp_path / "cached", rows=40)
    live = make_trainer(tiny_model, tmp_path / "live", rows=40, vision_features="live")
    others = trainer.facts_of[2]["test"]
    blind = others.map(lambda row: {"images": []})

    assert PICTURES not in others.column_names
    assert trainer.evaluate(others)["eval_loss"] == live.evaluate(others)["eval_loss"]
    assert trainer.evaluate(blind)["eval_loss"] != live.evaluate(others)["eval_loss"]
    with pytest.raises(DatasetError, match="its pictures are not named"):
        trainer.data_collator([others[0]])


def test_a_run_may_go_on_with_its_memory_chosen_otherwise(make_trainer, tiny_model, tmp_path):
    """Nothing about the data has changed then, and nothing must say so."""
    runs = [
        checkpoints.describe_run(make_trainer(tiny_model, tmp_path / kind, memory=kind, vision_features="live"))
        for kind in ("auto", "fixed")
    ]

    assert checkpoints.find_changes(*runs) == []


def test_a_tower_that_trains_sees_live_and_says_so(make_trainer, tiny_model, tmp_path, capsys):
    trains = ["language_model", "vision_tower"]
    trainer = make_trainer(tiny_model, tmp_path / "auto", trains=trains)

    assert "the vision tower trains" in trainer.live
    assert "the vision tower trains" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"vision_features: cached: the vision tower trains.*vision_features: live"):
        make_trainer(tiny_model, tmp_path / "cached", trains=trains, vision_features="cached")


def test_facts_say_how_pictures_were_seen(make_trainer, tiny_model, tmp_path):
    trainer = make_trainer(tiny_model, tmp_path, pack_questions=2, memory="auto")
    trainer.train()
    trainer.save_model()
    write_run_facts(trainer, *trainer.facts_of)
    facts = json.loads((tmp_path / "run_facts.json").read_text())

    trained, validated = (
        {name for own in rows[PICTURES] for name in own} for rows in (trainer.train_dataset, trainer.eval_dataset)
    )
    assert validated - trained
    assert facts["vision"] == {
        "features": "cached", "reason": None, "pictures": len(trained | validated), "train_pictures": len(trained),
        "image_fit": "stretch",
    }  # fmt: skip
    assert facts["packing"] == {"questions": 2, "texts": False}
    assert facts["memory"]["rows"] * facts["memory"]["accumulation"] == 4
    assert 0 <= facts["data_wait"] < 1


def test_texts_end_to_end_train_what_padded_ones_do(make_trainer, model, instruct_dataset, tmp_path):
    options = {"recipe": "stage2_instruct", "dataset_name": instruct_dataset, "logging_steps": 1, **EXACT}
    padded = make_trainer(model, tmp_path / "padded", pack_texts="false", **options)
    packed = make_trainer(model, tmp_path / "packed", pack_texts="true", **options)
    for trainer in (padded, packed):
        trainer.train()

    assert packed.live == "there are no images"
    assert "attention_mask" not in next(iter(packed.get_train_dataloader()))
    assert losses(packed) == pytest.approx(losses(padded), rel=1e-5)


def test_rows_with_and_without_images_train_together(make_trainer, model, vqa_dataset, instruct_dataset, tmp_path):
    mix = {"mix_datasets": [instruct_dataset], "mix_weights": [0.4]}
    options = {"rows": 60, "per_device_train_batch_size": 8, "logging_steps": 1, **mix}
    live = train(make_trainer, model, tmp_path / "live", vision_features="live", **options)
    packed = train(make_trainer, model, tmp_path / "packed", pack_questions=4, pack_texts="true", **options)
    held = {bool(names) for names in packed.train_dataset[PICTURES]}

    assert held == {True, False}
    assert losses(packed) == pytest.approx(losses(live), rel=1e-5)


def test_a_fit_that_crops_no_picture_says_so(make_trainer, tiny_model, tmp_path, capsys):
    make_trainer(tiny_model, tmp_path / "stretched")
    assert "crops none" not in capsys.readouterr().err
    make_trainer(tiny_model, tmp_path / "cropped", image_fit="pan_and_scan")

    assert "crops none of these pictures" in capsys.readouterr().err  # phantoms of 448 x 224, crops of at least 256


def test_grouping_by_length_and_by_image_exclude_each_other(make_trainer, tiny_model, tmp_path):
    with pytest.raises(InputError, match="pack_questions keeps the questions of an image together"):
        make_trainer(tiny_model, tmp_path, pack_questions=2, train_sampling_strategy="group_by_length")
