"""The recipes, run as users run them: for a few steps, on the small model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from safetensors.torch import load_file

from data_builders.records import InputError
from dentalgemma.training.config import parse_stage

RECIPES = REPOSITORY / "recipes"
SHORT = {
    "--max_steps": 4,
    "--per_device_train_batch_size": 2,
    "--gradient_accumulation_steps": 2,
    "--per_device_eval_batch_size": 8,
    "--eval_steps": 2,
    "--save_steps": 2,
    "--logging_steps": 1,
    "--learning_rate": 1e-3,
    "--dataloader_num_workers": 0,
    "--validation_sample": 8,
}


def run(command, **environment):
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def launch(recipe, model, dataset, out, **options):
    settings = {"--model_name_or_path": model, "--dataset_name": dataset, "--output_dir": out, **SHORT, **options}
    arguments = [part for option in settings.items() for part in option]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", RECIPES / "accelerate/cpu.yaml"]
    run([*accelerate, RECIPES / f"{recipe}.py", *arguments])
    return json.loads((Path(out) / "run_facts.json").read_text())


@pytest.fixture(scope="module")
def stage1(tiny_model, vqa_dataset, tmp_path_factory):
    """A stage 1 run of four steps."""
    out = tmp_path_factory.mktemp("runs") / "stage1"
    launch("stage1_vqa", tiny_model, vqa_dataset, out)
    return out


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.py")), ids=lambda path: path.stem)
def test_every_recipe_has_a_config_that_parses(recipe):
    stage, training, model = parse_stage(recipe.with_suffix(".yaml"), argv=[])

    assert stage.trains == ["language_model"]
    assert training.max_length is None
    assert training.learning_rate == 5e-5
    assert (model.lora_r, model.lora_alpha, model.lora_dropout) == (64, 64, 0.05)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps in (4, 8)
    assert training.load_best_model_at_end


def test_the_command_line_overrides_the_yaml():
    _, training, model = parse_stage(
        RECIPES / "stage1_vqa.yaml", argv=["--learning_rate", "2e-5", "--dtype", "bfloat16"]
    )

    assert training.learning_rate == 2e-5
    assert model.dtype == "bfloat16"


@pytest.mark.parametrize("form", [["--config=CONFIG"], ["--config", "CONFIG"]], ids=["equals", "blank"])
def test_another_config_is_taken_in_both_spellings(tmp_path, form):
    config = tmp_path / "own.yaml"
    config.write_text((RECIPES / "stage1_vqa.yaml").read_text().replace("stage: vqa", "stage: own"))
    stage, _, _ = parse_stage(RECIPES / "stage1_vqa.yaml", argv=[part.replace("CONFIG", str(config)) for part in form])

    assert stage.stage == "own"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        pytest.param(["--max_length", "1024"], "max_length: 1024 would cut", id="truncation"),
        pytest.param(["--lerning_rate", "1"], "lerning_rate", id="unknown option"),
        pytest.param(["--resume_from_checkpoint", "nowhere"], "nowhere is no checkpoint folder", id="no checkpoint"),
    ],
)
def test_what_would_waste_the_run_is_refused(argv, message):
    with pytest.raises(InputError, match=message):
        parse_stage(RECIPES / "stage1_vqa.yaml", argv=argv)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"--dataset_name": "nowhere"}, "nowhere is neither a folder here nor a dataset", id="no dataset"),
        pytest.param({"--trains": "eyes"}, "choose one or more of aligner, language_model, vision_tower", id="no part"),
    ],
)
def test_a_recipe_says_what_is_wrong_in_one_sentence(tiny_model, vqa_dataset, tmp_path, options, message):
    settings = {"--model_name_or_path": tiny_model, "--dataset_name": vqa_dataset, "--output_dir": tmp_path} | options
    command = [sys.executable, RECIPES / "stage1_vqa.py", *(part for option in settings.items() for part in option)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)

    assert done.returncode == 2
    assert "stage1_vqa.py: " in done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_stage_1_trains_the_language_model_alone(stage1):
    facts = json.loads((stage1 / "run_facts.json").read_text())
    adapter = load_file(stage1 / "adapter_model.safetensors")

    assert facts["steps"] == 4
    assert facts["best_step"] in (2, 4)
    assert [entry["step"] for entry in facts["losses"]["validation"]] == [2, 4]
    assert facts["parts"]["vision_tower"]["trainable"] == facts["parts"]["aligner"]["trainable"] == 0
    assert facts["parts"]["language_model"]["trainable"] == sum(tensor.numel() for tensor in adapter.values())
    assert all("language_model" in name for name in adapter)
    assert any(tensor.abs().sum() > 0 for name, tensor in adapter.items() if "lora_B" in name)
    assert facts["dataset_rows"]["train"] > 20
    assert set(facts["versions"]) >= {"torch", "transformers", "trl", "peft"}
    assert facts["data_sources"][0]["license"] == "Apache-2.0"
    assert "/" not in json.dumps([facts["base_model"], facts["dataset"], facts["command"]])
    assert not list(stage1.rglob("README.md"))  # neither TRL's card nor PEFT's


def test_stage_2_trains_text_on_the_same_model_class(tiny_model, instruct_dataset, tmp_path):
    facts = launch("stage2_instruct", tiny_model, instruct_dataset, tmp_path / "stage2")

    assert facts["stage"] == "instruct"
    assert facts["steps"] == 4
    assert facts["losses"]["train"][0]["loss"] > 0


def test_the_recipe_trains_on_a_dataset_of_real_files(tiny_model, real_dataset, tmp_path):
    facts = launch("stage1_vqa", tiny_model, real_dataset, tmp_path / "run", **{"--max_steps": 2})

    assert facts["steps"] == 2
    assert facts["dataset_rows"]["train"] > 200


def test_trl_trains_on_the_dataset_folder_unchanged(tiny_model, real_dataset, tmp_path):
    command = [Path(sys.executable).parent / "trl", "sft"]
    options = {
        "--model_name_or_path": tiny_model,
        "--dataset_name": real_dataset,
        "--output_dir": tmp_path,
        "--max_steps": 2,
        "--per_device_train_batch_size": 2,
        "--use_cpu": "true",
        "--bf16": "false",
        "--dtype": "float32",
        "--report_to": "none",
        "--save_strategy": "no",
    }
    run([*command, *(part for option in options.items() for part in option)])

    assert (tmp_path / "config.json").is_file() or any(tmp_path.rglob("*.safetensors"))


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tiny_model, vqa_dataset, tmp_path):
    """Same rows per step, adapter dropout 0: the losses are those of one process at the same global batch."""
    # Which questions come together depends on the batch of a process, and packing groups them.
    same = {"--lora_dropout": 0, "--max_grad_norm": 1e9, "--max_steps": 3, "--pack_questions": 1}
    one = launch(
        "stage1_vqa",
        tiny_model,
        vqa_dataset,
        tmp_path / "one",
        **same | {"--per_device_train_batch_size": 4, "--gradient_accumulation_steps": 1},
    )
    settings = {"--model_name_or_path": tiny_model, "--dataset_name": vqa_dataset, "--output_dir": tmp_path / "two"}
    settings |= SHORT | same | {"--per_device_train_batch_size": 2, "--gradient_accumulation_steps": 1}
    settings |= {"--per_device_eval_batch_size": 3}  # the mean over answer tokens does not depend on batches
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", 29517]
    arguments = [part for option in settings.items() for part in option]
    run([*torchrun, RECIPES / "stage1_vqa.py", *arguments], ACCELERATE_USE_CPU="true")
    two = json.loads((tmp_path / "two" / "run_facts.json").read_text())

    assert two["processes"] == 2
    assert one["global_batch_size"] == two["global_batch_size"] == 4
    for kind in ("train", "validation"):
        for first, second in zip(one["losses"][kind], two["losses"][kind], strict=True):
            assert second["loss"] == pytest.approx(first["loss"], rel=1e-5)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], atol=1e-5), name
