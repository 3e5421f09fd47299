"""A 4-bit copy says in its certificate how far it is from the merged model, and loads without this project."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

import dentalgemma.quantizing as quantizing
from data_builders.records import InputError
from dentalgemma.certificates import CERTIFICATE, MergeError, read_certificate
from dentalgemma.cli import app
from dentalgemma.merging import merge_adapter
from dentalgemma.models.loading import LoadError, fingerprint_weights, load_pretrained
from dentalgemma.models.parts import LANGUAGE_MODEL_LAYERS, part_of
from dentalgemma.parity import logits
from dentalgemma.quantizing import QuantizationError, quantize_model

pytest.importorskip("bitsandbytes")

LINEARS = {"gemma3": 28, "gemma4": 26}  # Gemma 4's full-attention layers have no values of their own


def merge_tiny(base, folder, dtype="bfloat16"):
    model = AutoModelForImageTextToText.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=LANGUAGE_MODEL_LAYERS))
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(folder / "run")
    merge_adapter(folder / "run", folder / "model", dtype=dtype)
    return folder / "model"


@pytest.fixture(scope="module")
def merged(tiny_model, tmp_path_factory):
    return merge_tiny(tiny_model, tmp_path_factory.mktemp("merged"))


@pytest.fixture(scope="module")
def quantised(merged, vqa_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised") / "nf4"
    return folder, quantize_model(merged, folder, rows=str(vqa_dataset))


def test_the_certificate_is_the_merges_and_says_how_alike_the_two_answer(quantised, merged):
    folder, certificate = quantised
    before, found = read_certificate(merged), certificate["quantization"]

    assert certificate["passed"] and read_certificate(folder) == certificate
    assert certificate["stages"] == before["stages"] and certificate["base_weights"] == before["base_weights"]
    assert found["source_weights"] == before["weights"] != certificate["weights"]
    assert found["parity_inputs"] == "4 rows of vqa, validation"
    assert found["tokens"] > 100
    assert 0.3 < found["same_token_share"] <= 1
    assert 0 < found["mean_divergence"] < 1
    assert 0 < found["mean_logit_difference"] < found["max_logit_difference"]
    assert set(found["versions"]) == {"bitsandbytes", "torch", "transformers"}


def test_nf4_costs_weights_what_its_authors_say(quantised):
    """QLoRA's paper (arXiv 2305.14314) has 4 bits and an 8-bit constant for 64 numbers; 0.09 is a normal's error."""
    _, certificate = quantised

    assert 0.08 < certificate["quantization"]["weight_error"]["mean"] < 0.1
    assert certificate["quantization"]["weight_error"]["max"] < 0.11


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_layers_of_the_language_model_are_in_4_bits_and_nothing_else_is(family, request, tmp_path):
    if family == "gemma3":
        folder, certificate = request.getfixturevalue("quantised")
        source = request.getfixturevalue("merged")
    else:
        source = merge_tiny(request.getfixturevalue("tiny_gemma4"), tmp_path, dtype="float32")
        folder = tmp_path / "nf4"
        certificate = quantize_model(source, folder)
    found = certificate["quantization"]
    model, _ = load_pretrained(folder)
    in_4_bits = {name for name, weight in model.named_parameters() if type(weight).__name__ == "Params4bit"}
    original = load_pretrained(source, dtype=torch.bfloat16)[0].state_dict()

    assert found["quantized_tensors"] == {"language_model": LINEARS[family]}
    assert len(in_4_bits) == LINEARS[family] and {part_of(name) for name in in_4_bits} == {"language_model"}
    assert not any("embed" in name or "head" in name for name in in_4_bits)
    assert set(found["kept_tensors"]) == {"aligner", "language_model", "vision_tower"}
    for name, weight in model.named_parameters():
        if name not in in_4_bits:
            assert torch.equal(weight, original[name]), name
    assert found["bytes_after"] < found["bytes_before"]
    assert found["not_compared"] == []
    assert certificate["weights"] == fingerprint_weights(model)


def test_a_fresh_process_without_this_project_loads_the_folder_and_generates(quantised):
    folder, _ = quantised
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
print("BITS", model.config.quantization_config.load_in_4bit)
print("TOKENS", model.generate(**inputs, max_new_tokens=5, do_sample=False).shape[1] - inputs["input_ids"].shape[1])
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=folder, timeout=180)

    assert "BITS True" in done.stdout, done.stderr[-2000:]
    assert int(done.stdout.split("TOKENS")[1]) >= 1


def test_the_folder_names_no_place_and_has_what_belongs_to_a_model(quantised, merged):
    folder, certificate = quantised
    names = {path.name for path in folder.iterdir()}

    assert {"chat_template.jinja", "generation_config.json", "tokenizer.json", CERTIFICATE} <= names
    assert not {"adapter", "README.md"} & names
    assert "left_out" in certificate["adapter"]
    for name in ("config.json", CERTIFICATE):
        assert str(merged.parent) not in (folder / name).read_text()
    # vLLM goes by the parts of a module's path, not by patterns.
    skipped = json.loads((folder / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert {"vision_tower", "multi_modal_projector", "lm_head"} <= set(skipped)


def swap_scales(tensors):
    """The 4 bits of one layer with the scale of none."""
    name = next(name for name in tensors if name.endswith("down_proj.weight.absmax"))
    tensors[name] = tensors[name].flip(0)


def shift_tower(tensors):
    tensors["vision_tower.post_layernorm.bias"] += 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(swap_scales, r"down_proj.weight is \d+% of its norm off", id="4-bit weights"),
        pytest.param(
            shift_tower, "post_layernorm.bias is not the merged model's, though it is not", id="other weights"
        ),
    ],
)
def test_a_4_bit_model_of_other_numbers_fails_its_certificate(spoil, message, merged, tmp_path, monkeypatch):
    write = quantizing._write_model

    def write_and_spoil(model, out):
        write(model, out)
        tensors = {key: value.clone() for key, value in load_file(out / "model.safetensors").items()}
        spoil(tensors)
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(quantizing, "_write_model", write_and_spoil)

    with pytest.raises(QuantizationError, match=message) as caught:
        quantize_model(merged, tmp_path / "nf4")
    assert caught.value.exit_code == 1
    assert json.loads((tmp_path / "nf4" / CERTIFICATE).read_text())["passed"] is False
    with pytest.raises(MergeError, match="the merge failed"):
        read_certificate(tmp_path / "nf4")


def test_garbled_answers_fail_even_where_every_weight_is_right(merged, tmp_path, monkeypatch):
    monkeypatch.setattr(quantizing, "_ask", lambda model, batches: [-each for each in logits(model, batches)])

    with pytest.raises(QuantizationError, match=r"logits keep -\d+% of the merged model's variance, not 50%"):
        quantize_model(merged, tmp_path / "nf4")


def test_figures_of_two_answers_are_those_computed_by_hand():
    """Two tokens, one position: p = (3/4, 1/4) against q = (1/2, 1/2)."""
    before, after = torch.tensor([[3.0, 1.0]]).log(), torch.tensor([[1.0, 1.0]]).log()
    figures = quantizing._compare_answers([before], [after])

    assert figures["mean_divergence"] == pytest.approx(0.1308, abs=1e-4)  # 3/4 ln 3/2 + 1/4 ln 1/2
    assert figures["kept_variance"] == pytest.approx(0)  # a flat answer keeps nothing
    assert figures["tokens"] == 1
    assert quantizing._compare_answers([before], [before + 7])["kept_variance"] == pytest.approx(1)
    assert quantizing._compare_answers([before], [before + 7])["mean_divergence"] == pytest.approx(0, abs=1e-6)


def test_what_cannot_be_quantised_is_said_in_one_sentence(quantised, merged, tiny_model, tmp_path, monkeypatch):
    folder, _ = quantised
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("years")

    with pytest.raises(InputError, match="make the folder with `dentalgemma merge`") as caught:
        quantize_model(tiny_model, tmp_path / "out")
    assert caught.value.exit_code == 2  # as `card` says of it
    with pytest.raises(InputError, match="is quantised already"):
        quantize_model(folder, tmp_path / "out")
    with pytest.raises(LoadError, match="not empty"):
        quantize_model(merged, tmp_path / "used")
    monkeypatch.setattr(quantizing, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "dentalgemma\[bnb\]"'):
        quantize_model(merged, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"used"}


def test_weights_changed_since_the_merge_are_not_quantised(merged, tmp_path):
    shutil.copytree(merged, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    save_file({key: value + 1 for key, value in tensors.items()}, tmp_path / "model" / "model.safetensors")

    with pytest.raises(MergeError, match="is about other weights"):
        quantize_model(tmp_path / "model", tmp_path / "nf4")


def test_an_adapter_is_not_folded_into_the_4_bit_copy(quantised, merged, tmp_path):
    with pytest.raises(InputError, match=r"is quantised \(bitsandbytes\).* name the 16-bit model with --base"):
        merge_adapter(merged.parent / "run", tmp_path / "model", base=str(quantised[0]))


def test_the_command_prints_the_certificate_as_json(merged, tmp_path):
    done = CliRunner().invoke(app, ["quantize", str(merged), "--out", str(tmp_path / "nf4"), "--json"])

    assert done.exit_code == 0, done.output
    certificate = json.loads(done.stdout)
    assert certificate["quantization"]["parity_inputs"] == "a synthetic picture and prompt"
    assert any("name a dataset with --rows" in warning and "4-bit" in warning for warning in certificate["warnings"])
