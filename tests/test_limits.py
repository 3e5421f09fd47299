"""What could only waste a run is refused before it starts, in one sentence that names the option."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY
from safetensors.torch import load_file, save_file
from trl import ModelConfig

from data_builders.records import InputError
from dentalgemma.models.loading import LoadError, load_model
from dentalgemma.training.config import parse_stage
from dentalgemma.training.first_loss import DivergedError
from dentalgemma.training.proof import explain
from dentalgemma.training.run_facts import write_run_facts

RECIPE = REPOSITORY / "recipes" / "stage1_vqa.yaml"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("learning_rate", "0", "learning_rate: 0.0 must be above 0"),
        ("learning_rate", "-1", "learning_rate: -1.0 must be above 0"),
        ("num_train_epochs", "0", "num_train_epochs: 0.0 must be above 0"),
        ("per_device_train_batch_size", "0", "per_device_train_batch_size: 0 must be at least 1"),
        ("gradient_accumulation_steps", "0", "gradient_accumulation_steps: 0 must be at least 1"),
        ("max_grad_norm", "-1", "max_grad_norm: -1.0 must not be below 0"),
        ("save_total_limit", "0", "save_total_limit: 0 must be at least 1"),
        ("seed", "-1", "seed: -1 must not be below 0"),
        ("lora_r", "0", "lora_r: 0 must be at least 1"),
        ("lora_alpha", "0", "lora_alpha: 0 must be above 0"),
        ("lora_dropout", "1.5", "lora_dropout: 1.5 must be at least 0 and below 1"),
        ("early_stopping_patience", "-1", "early_stopping_patience: -1 must not be below 0"),
        ("validation_sample", "-1", "validation_sample: -1 must not be below 0"),
        ("packing", "true", "use `pack_questions` for rows with images"),
        ("completion_only_loss", "false", "the loss is on the completion alone"),
        ("report_to", "nonesuch", "report_to: nonesuch: choose among none, .*tensorboard"),
        ("stage", "my stage/../x", "it names a folder"),
    ],
)
def test_values_that_could_only_waste_a_run_are_refused(name, value, message):
    with pytest.raises(InputError, match=message):
        parse_stage(RECIPE, [f"--{name}", value])


def test_a_broken_yaml_is_one_sentence(tmp_path):
    (tmp_path / "stage.yaml").write_text("foo: [")

    with pytest.raises(InputError, match="the configuration is no YAML"):
        parse_stage(tmp_path / "stage.yaml", [])


@pytest.mark.parametrize("words", [["language_model", "aligner"], ["[language_model, aligner]"]])
def test_parts_may_be_given_on_the_command_line_as_in_the_yaml(words):
    stage, _, _ = parse_stage(RECIPE, ["--trains", *words])

    assert stage.trains == ["language_model", "aligner"]


@pytest.mark.known_bug(5)
def test_a_run_that_diverges_stops_and_says_so(tiny_model, make_trainer, tmp_path):
    trainer = make_trainer(tiny_model, tmp_path / "run", learning_rate=1e30, max_steps=20, logging_steps=1)

    with pytest.raises(DivergedError, match=r"is nan at step \d+: the run diverged; lower learning_rate"):
        trainer.train()


@pytest.mark.known_bug(9)
def test_trained_numbers_that_are_none_fail_the_proof(tiny_model, make_trainer, tmp_path):
    trainer = make_trainer(tiny_model, tmp_path / "run")
    trainer.train()
    next(value for value in trainer.model.parameters() if value.requires_grad).data[0] = torch.nan

    proof = trainer.proof.finish(trainer.args, 3)

    assert not proof["passed"]
    assert "no number" in explain(proof)


@pytest.fixture
def run(tiny_model, make_trainer, tmp_path):
    trainer = make_trainer(tiny_model, tmp_path / "run")
    trainer.train()
    trainer.save_model()
    write_run_facts(trainer, *trainer.facts_of)
    return tmp_path / "run"


def start(folder):
    return load_model(ModelConfig(model_name_or_path=str(folder), dtype="float32"))


def test_a_stage_does_not_start_from_a_run_whose_proof_failed(run):
    start(run)
    facts = json.loads((run / "run_facts.json").read_text())
    facts["proof"]["passed"] = False
    (run / "run_facts.json").write_text(json.dumps(facts))

    with pytest.raises(LoadError, match="did not train what it was told to"):
        start(run)


def test_a_stage_does_not_start_from_an_adapter_that_holds_no_numbers(run):
    weights = load_file(run / "adapter_model.safetensors")
    next(iter(weights.values()))[0] = torch.nan
    save_file(weights, run / "adapter_model.safetensors", metadata={"format": "pt"})

    with pytest.raises(InputError, match="not finite; the run diverged"):
        start(run)


def test_a_stage_does_not_start_from_a_merge_that_failed(tiny_model, tmp_path):
    for path in tiny_model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    start(tmp_path)
    (tmp_path / "merge_certificate.json").write_text(json.dumps({"passed": False}))

    with pytest.raises(LoadError, match="is a merge whose certificate failed"):
        start(tmp_path)


def test_an_output_folder_that_cannot_be_made_is_one_sentence(tiny_model, vqa_dataset, tmp_path):
    (tmp_path / "file").write_text("in the way")
    options = {"model_name_or_path": tiny_model, "dataset_name": vqa_dataset, "output_dir": tmp_path / "file" / "run"}
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    command = [sys.executable, str(RECIPE.with_suffix(".py")), *arguments]

    done = subprocess.run(command, capture_output=True, text=True, timeout=120)

    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert ": Not a directory" in done.stderr
