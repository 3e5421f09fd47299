"""What a run trained is what it was told to train; anything else makes it fail."""

import itertools
import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    MllamaConfig,
    MllamaForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from trl import ModelConfig

from data_builders.records import InputError
from dentalgemma.models.parts import LANGUAGE_MODEL_LAYERS, adapter_config, check_trainable, part_of
from dentalgemma.training.config import parse_stage
from dentalgemma.training.proof import ProofError, hash_tensor
from dentalgemma.training.run_facts import write_run_facts

LORA = ModelConfig(use_peft=True, lora_r=4, lora_alpha=8)
ALL = ["language_model", "aligner", "vision_tower"]


@pytest.fixture(params=["gemma3", "gemma4"])
def folder(request, tiny_model, tiny_gemma4):
    return {"gemma3": tiny_model, "gemma4": tiny_gemma4}[request.param]


def load(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


def finish(trainer):
    trainer.train()
    trainer.save_model()
    stage, model_config, dataset = trainer.facts_of
    write_run_facts(trainer, stage, model_config, dataset)


@pytest.mark.known_bug(9)
@pytest.mark.parametrize("trains", [["language_model"], ["aligner"], ["language_model", "aligner"], ALL], ids="+".join)
def test_just_the_parts_that_are_named_can_learn(folder, trains):
    model = get_peft_model(load(folder), adapter_config(load(folder), LORA, trains))

    counts = check_trainable(model, trains)

    assert {part for part, entry in counts.items() if entry["trainable"]} == set(trains)
    if "aligner" in trains:
        assert counts["aligner"]["trainable"] == counts["aligner"]["parameters"]


def test_every_linear_layer_of_the_blocks_gets_lora(folder):
    model = get_peft_model(load(folder), adapter_config(load(folder), LORA, ALL))
    adapted = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    blocks = {
        f"base_model.model.{name}"
        for name, module in load(folder).named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }

    assert adapted == blocks


SIZES = {"hidden_size": 64, "intermediate_size": 64}
TEXT = SIZES | {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 300}
OTHERS = {
    Qwen3VLForConditionalGeneration: Qwen3VLConfig(
        text_config=TEXT | {"head_dim": 32},
        vision_config=SIZES | {"depth": 2, "num_heads": 2, "out_hidden_size": 64, "deepstack_visual_indexes": [0]},
    ),
    MllamaForConditionalGeneration: MllamaConfig(
        text_config=TEXT | {"cross_attention_layers": [1], "pad_token_id": 0},
        vision_config=SIZES
        | {"num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2}
        | {"intermediate_layers_indices": [0], "vision_output_dim": 128},
    ),
}


@pytest.mark.parametrize("trains", [["language_model"], ["aligner"], ["vision_tower"], ALL], ids="+".join)
@pytest.mark.parametrize("family", OTHERS, ids=lambda family: family.__name__)
def test_the_parts_of_other_families_are_found_too(family, trains):
    with torch.device("meta"):
        model = family(OTHERS[family])
    model = get_peft_model(model, adapter_config(model, LORA, trains))

    counts = check_trainable(model, trains)

    assert set(counts) == set(ALL)
    assert all(bool(entry["trainable"]) == (part in trains) for part, entry in counts.items())


@pytest.mark.known_bug(9)
@pytest.mark.parametrize(
    "targets",
    [
        pytest.param("all-linear", id="all-linear"),
        pytest.param(["q_proj", "v_proj"], id="bare names"),
        pytest.param(LANGUAGE_MODEL_LAYERS.replace("language_model", ""), id="a pattern that is too wide"),
    ],
)
def test_targets_that_reach_the_tower_are_refused(tiny_model, targets):
    config = adapter_config(load(tiny_model), LORA, ["language_model"])
    config.target_modules = set(targets) if isinstance(targets, list) else targets
    model = get_peft_model(load(tiny_model), config)

    with pytest.raises(InputError, match=r"parameters of vision_tower would train, but `trains` is"):
        check_trainable(model, ["language_model"])


@pytest.mark.known_bug(11)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_modules_to_save": ["lm_head", "embed_tokens"]}, "lm_head and embeddings are never trained"),
        ({"lora_target_modules": ["q_proj"]}, "is set by `trains`"),
        ({"use_dora": True}, "cannot be folded"),
    ],
)
def test_settings_that_contradict_trains_are_refused(tiny_model, settings, message):
    with pytest.raises(InputError, match=message):
        adapter_config(load(tiny_model), ModelConfig(use_peft=True, **settings), ["language_model"])


@pytest.mark.parametrize("trains", [[], ["eyes"]])
def test_a_part_that_does_not_exist_is_refused(tiny_model, trains):
    with pytest.raises(InputError, match="choose one or more of aligner, language_model, vision_tower"):
        adapter_config(load(tiny_model), LORA, trains)


@pytest.mark.known_bug(10)
def test_reentrant_checkpointing_is_refused_where_a_tower_trains(tmp_path):
    settings = ["--trains", "vision_tower", "--gradient_checkpointing_kwargs", '{"use_reentrant": true}']
    config = tmp_path / "stage.yaml"
    config.write_text("dataset_name: data\nmax_length: null\nuse_peft: true\noutput_dir: runs/x\n")

    with pytest.raises(InputError, match="use_reentrant: false"):
        parse_stage(config, settings)


@pytest.mark.known_bug(10)
def test_a_tower_is_not_trained_where_checkpoints_become_reentrant(tmp_path, monkeypatch):
    monkeypatch.setattr("dentalgemma.training.config.shards_weights", lambda training: "ZeRO-3")
    config = tmp_path / "stage.yaml"
    config.write_text(
        "dataset_name: data\nmax_length: null\nuse_peft: true\noutput_dir: runs/x\ntrains: [vision_tower]\n"
    )

    parse_stage(config, ["--gradient_checkpointing", "false"])
    with pytest.raises(
        InputError, match="under ZeRO-3 tower and aligner learn only with gradient_checkpointing: false"
    ):
        parse_stage(config, [])


@pytest.mark.known_bug(10)
def test_a_tower_has_gradients_under_checkpointing(folder, make_trainer, tmp_path):
    trainer = make_trainer(folder, tmp_path / "run", trains=["vision_tower"], gradient_checkpointing="true")

    finish(trainer)

    proof = json.loads((tmp_path / "run" / "run_facts.json").read_text())["proof"]
    assert proof["passed"]
    assert proof["parts"] == ["vision_tower"]


@pytest.mark.known_bug(9)
@pytest.mark.parametrize("part", ["language_model", "aligner"])
def test_no_tensor_of_another_part_changes(folder, make_trainer, tmp_path, part):
    trainer = make_trainer(folder, tmp_path / "run", trains=[part])
    before = {name: hash_tensor(value) for name, value in trainer.model.named_parameters()}

    finish(trainer)

    changed = {name for name, value in trainer.model.named_parameters() if hash_tensor(value) != before[name]}
    assert {part_of(name) for name in changed} == {part}
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert {part_of(name) for name in saved} == {part}
    assert len(saved) == len(changed)
    facts = json.loads((tmp_path / "run" / "run_facts.json").read_text())
    assert facts["proof"]["passed"]
    assert facts["proof"]["trained_tensors"] == len(changed)
    assert not (tmp_path / "run" / "weights_at_start-0.json").exists()


def meddle(trainer, kind):
    """Make a run go wrong behind its own back."""
    parameters = dict(trainer.model.named_parameters())
    trained = next(value for name, value in parameters.items() if value.requires_grad and "lora_A" in name)
    frozen = next(value for name, value in parameters.items() if "vision_tower" in name)
    if kind == "without_gradient":
        trained.register_hook(torch.zeros_like)
    elif kind == "unchanged":
        copy = trained.detach().clone()
        trainer.add_callback(restore(trained, copy))
    else:
        trainer.add_callback(restore(frozen, frozen.detach() + 1))


def restore(parameter, value):
    from transformers import TrainerCallback

    class Restore(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            parameter.data.copy_(value)

    return Restore()


@pytest.mark.known_bug(9)
@pytest.mark.parametrize("kind", ["without_gradient", "unchanged", "frozen_changed"])
def test_a_run_that_trained_something_else_says_that_it_failed(tiny_model, make_trainer, tmp_path, kind):
    trainer = make_trainer(tiny_model, tmp_path / "run")
    meddle(trainer, kind)

    with pytest.raises(ProofError, match="did not train what it was told to") as error:
        finish(trainer)

    assert error.value.exit_code == 1
    proof = json.loads((tmp_path / "run" / "run_facts.json").read_text())["proof"]
    assert not proof["passed"]
    assert len(proof[kind]) == 1


def test_a_best_checkpoint_from_before_all_had_changed_is_no_failure(tiny_model, make_trainer, tmp_path, monkeypatch):
    """After the first step only one of LoRA's two factors differs from its start."""
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tiny_model, tmp_path / "run", **steps, load_best_model_at_end="true")
    worse_and_worse = itertools.count(1.0)
    monkeypatch.setattr(trainer, "evaluate", lambda *args, **kwargs: {"eval_loss": next(worse_and_worse)})

    finish(trainer)

    facts = json.loads((tmp_path / "run" / "run_facts.json").read_text())
    assert facts["best_step"] == 1
    assert facts["proof"]["passed"]


@pytest.mark.known_bug(10)
def test_a_tensor_without_gradient_stops_the_run_early(tiny_model, make_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr("dentalgemma.training.proof.EARLY", 2)
    trainer = make_trainer(tiny_model, tmp_path / "run", max_steps=50)
    meddle(trainer, "without_gradient")

    with pytest.raises(ProofError, match="after 2 steps 1 trainable tensors had no gradient"):
        trainer.train()

    assert trainer.state.global_step == 2


def test_an_aligner_that_would_never_see_an_image_is_refused(tiny_model, instruct_dataset, make_trainer, tmp_path):
    with pytest.raises(InputError, match=r"no row of .* has an image to learn from"):
        make_trainer(tiny_model, tmp_path / "run", dataset_name=instruct_dataset, trains=["aligner"])
