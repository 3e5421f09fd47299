"""A merged model answers as its adapter did, and needs nothing of this project to load."""

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from dentalgemma.merging import CERTIFICATE, MergeError, merge_adapter
from dentalgemma.models.loading import LoadError, load_for_inference
from dentalgemma.models.parts import LANGUAGE_MODEL_LAYERS
from dentalgemma.publishing.cards import CardError, write_model_card

FACTS = {
    "stage": "vqa",
    "trains": ["language_model"],
    "dataset": "data/vqa|x",
    "dataset_rows": {"train": 10},
    "parts": {"language_model": {"parameters": 10, "trainable": 5}},
    "lora": {"r": 8, "alpha": 8, "dropout": 0.0},
    "dtype": "float32",
    "hyperparameters": {"learning_rate": 5e-5},
    "global_batch_size": 4,
    "steps": 4,
    "epochs": 1.0,
    "best_step": 2,
    "seconds": 60.0,
    "losses": {"train": [], "validation": [{"step": 2, "loss": 1.5}, {"step": 4, "loss": 1.25}]},
    "hardware": {"device": "CPU"},
    "versions": {"torch": "2"},
}


def write_adapter(base, folder, *, std=0.05, facts=True):
    """An adapter on the language model with random weights, as a run leaves it."""
    model = AutoModelForImageTextToText.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=8, target_modules=LANGUAGE_MODEL_LAYERS))
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std) if std else None
    adapted.save_pretrained(folder)
    if facts:
        (folder / "run_facts.json").write_text(json.dumps({**FACTS, "base_model": str(base)}))
    return adapted


@pytest.fixture(scope="module")
def merged(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged")
    write_adapter(tiny_model, folder / "run")
    certificate = merge_adapter(folder / "run", folder / "model", dtype="float32")
    return folder / "model", certificate


def test_the_certificate_says_what_changed(merged, tiny_model):
    _, certificate = merged

    assert certificate["changed_tensors"] == 4 * 7  # layers x adapted projections
    assert certificate["max_logit_difference"] < 1e-3
    assert certificate["reloaded_max_logit_difference"] < 1e-3
    assert certificate["top1_agreement"] == certificate["reloaded_top1_agreement"] == 1
    assert certificate["stages"][0]["stage"] == "vqa"


def test_tower_and_projector_are_the_bases(merged, tiny_model):
    folder, _ = merged
    with (
        safe_open(folder / "model.safetensors", "pt") as ours,
        safe_open(tiny_model / "model.safetensors", "pt") as base,
    ):
        assert set(ours.keys()) == set(base.keys())
        changed = {key for key in set(base.keys()) if not torch.equal(ours.get_tensor(key), base.get_tensor(key))}
    assert len(changed) == 28
    assert not any("vision_tower" in key or "projector" in key for key in changed)


def test_the_folder_loads_and_generates_where_this_project_is_not_importable(merged):
    folder, _ = merged
    code = f"""
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("dentalgemma", "data_builders"):
            raise ImportError(name + " is hidden")
sys.meta_path.insert(0, Hidden())
sys.path = [p for p in sys.path if p not in ("", ".")]
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained({str(folder)!r}).eval()
processor = AutoProcessor.from_pretrained({str(folder)!r})
content = [{{"type": "image", "image": Image.new("RGB", (200, 100))}}, {{"type": "text", "text": "What is it?"}}]
inputs = processor.apply_chat_template([{{"role": "user", "content": content}}], add_generation_prompt=True,
    tokenize=True, return_dict=True, return_tensors="pt")
print("TOKENS", model.generate(**inputs, max_new_tokens=5, do_sample=False).shape[1] - inputs["input_ids"].shape[1])
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=folder, timeout=120)

    assert "TOKENS" in done.stdout, done.stderr[-2000:]
    assert int(done.stdout.split("TOKENS")[1]) >= 1


def test_processor_template_and_generation_config_travel_along(merged):
    folder, _ = merged
    ours = AutoProcessor.from_pretrained(folder)

    assert {"chat_template.jinja", "generation_config.json", "processor_config.json", CERTIFICATE} <= {
        path.name for path in folder.iterdir()
    }
    assert ours.tokenizer.convert_tokens_to_ids("<end_of_turn>") in (
        AutoModelForImageTextToText.from_pretrained(folder).generation_config.eos_token_id
    )


def test_a_bf16_merge_says_what_the_cast_cost(tiny_model, tmp_path):
    write_adapter(tiny_model, tmp_path / "run")
    certificate = merge_adapter(tmp_path / "run", tmp_path / "model")

    assert certificate["max_logit_difference"] < 1e-3 < certificate["reloaded_max_logit_difference"]
    assert load_for_inference(tmp_path / "model")[0].dtype == torch.bfloat16


def test_an_adapter_that_changes_nothing_is_refused(tiny_model, tmp_path):
    write_adapter(tiny_model, tmp_path / "run", std=0)

    with pytest.raises(MergeError, match="changes no weight"):
        merge_adapter(tmp_path / "run", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_folder_in_use_is_not_overwritten(tiny_model, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").write_text("years")

    with pytest.raises(MergeError, match="not empty"):
        merge_adapter(tmp_path, tmp_path / "model")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda folder: folder.mkdir(), "no config.json", id="empty folder"),
        pytest.param(lambda folder: None, "neither a folder here nor a model", id="nothing"),
    ],
)
def test_what_is_no_model_is_said_in_one_sentence(tmp_path, make, message):
    make(tmp_path / "m")
    with pytest.raises(LoadError, match=message):
        load_for_inference(tmp_path / "m")


def test_missing_weights_are_refused(tiny_model, tmp_path):
    """transformers would start them at random and only warn."""
    from safetensors.torch import load_file, save_file

    for path in tiny_model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop(next(name for name in weights if "language_model" in name and "q_proj" in name))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(LoadError, match=r"1 weights are missing, for example .*q_proj"):
        load_for_inference(tmp_path)


def test_the_card_is_rendered_from_facts_alone(merged):
    folder, _ = merged
    text = write_model_card(folder).read_text()

    assert "\n\n- vqa: 1.5000 → 1.2500\n\n## Evaluation\n\nNot evaluated yet.\n\n## Merge\n" in text
    assert r"data/vqa\|x" in text
    assert "license_name: rehearsal" in text
    assert "base_model:" not in text  # never a path of this machine
    assert str(folder.parent) not in text


def test_a_medgemma_base_passes_its_terms_on(merged):
    folder, certificate = merged
    own = json.loads((folder / CERTIFICATE).read_text())
    own["stages"][0]["base_model"] = "google/medgemma-1.5-4b-it"
    (folder / CERTIFICATE).write_text(json.dumps(own))
    text = write_model_card(folder).read_text()
    (folder / CERTIFICATE).write_text(json.dumps(certificate))

    assert "license_name: health-ai-developer-foundations" in text
    assert "base_model: google/medgemma-1.5-4b-it" in text
    assert "license: apache-2.0" not in text


def test_a_folder_without_certificate_gets_no_card(tiny_model):
    with pytest.raises(CardError, match="dentalgemma merge"):
        write_model_card(tiny_model)
