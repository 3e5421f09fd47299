"""The adapter beside the merged weights does to the base what all stages together did."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from data_builders.dataset_folder import hash_file
from dentalgemma.adapters import read_adapter
from dentalgemma.certificates import CERTIFICATE, MergeError, read_certificate
from dentalgemma.merging import merge_adapter
from dentalgemma.models.loading import find_start, load_pretrained
from dentalgemma.models.parts import LANGUAGE_MODEL_LAYERS
from dentalgemma.models.processors import load_processor
from dentalgemma.parity import logits, make_batches

ATTENTION = r".*language_model.*\.(q_proj|v_proj)"
ALIGNER = {"gemma3": "multi_modal_projector", "gemma4": "embed_vision"}


def write_adapter(base, folder, *, seed, dtype=torch.float32, **settings):
    """A random adapter, as a stage leaves it."""
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, **settings}))
    torch.manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
        elif "modules_to_save" in name:
            parameter.data += torch.randn_like(parameter) * 0.05
    adapted.to(dtype).save_pretrained(folder)
    (folder / "run_facts.json").write_text(json.dumps({"stage": folder.name}))
    return folder


def write_unlike_stages(base, run, aligner):
    """Three stages of other ranks, scalings and layers; the first also trained the aligner."""
    write_adapter(base, run / "chain" / "1_align", seed=1, r=3, lora_alpha=5, modules_to_save=[aligner])
    write_adapter(base, run / "chain" / "2_vqa", seed=2, r=8, use_rslora=True, target_modules=LANGUAGE_MODEL_LAYERS)
    return write_adapter(base, run, seed=3, r=4, lora_alpha=8)


def answers(base, adapter=None):
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    return logits(model, make_batches(load_processor(base), None)[0])[0]


@pytest.fixture(scope="module")
def stages(tiny_model, tmp_path_factory):
    """Two stages alike, and the model merged of them."""
    folder = tmp_path_factory.mktemp("stages")
    write_adapter(tiny_model, folder / "run" / "chain" / "1_vqa", seed=1)
    write_adapter(tiny_model, folder / "run", seed=2)
    return folder, merge_adapter(folder / "run", folder / "model", dtype="float32")


@pytest.mark.parametrize("case", ["two alike", "gemma3, unlike", "gemma4, unlike"])
def test_base_and_stacked_adapter_answer_as_the_merged_model(case, request, tmp_path):
    if case == "two alike":
        base, (folder, certificate) = (request.getfixturevalue(name) for name in ("tiny_model", "stages"))
        model = folder / "model"
    else:
        family = case.split(",")[0]
        base, model = request.getfixturevalue({"gemma3": "tiny_model"}.get(family, "tiny_gemma4")), tmp_path / "model"
        run = write_unlike_stages(base, tmp_path / "run", ALIGNER[family])
        certificate = merge_adapter(run, model, dtype="float32")
    merged, bare = answers(model), answers(base)

    assert (answers(base, model / "adapter") - merged).abs().max() < 1e-4
    assert (merged - bare).abs().max() > 0.01
    assert certificate["adapter"]["max_difference"] < 1e-6
    assert certificate["adapter"]["sha256"] == hash_file(model / "adapter" / "adapter_model.safetensors")


def test_peft_neither_misses_a_weight_of_the_stacked_adapter_nor_finds_one_too_many(stages, tiny_model):
    folder, _ = stages
    adapted = PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(tiny_model), folder / "model/adapter"
    )
    written = load_file(folder / "model" / "adapter" / "adapter_model.safetensors")
    result = adapted.load_adapter(folder / "model" / "adapter", "again")

    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if ".again." in key]
    assert {key.replace(".again", "") for key in adapted.state_dict() if ".again." in key} == written.keys()


def test_stages_of_one_scaling_keep_their_numbers_to_the_bit(stages):
    folder, certificate = stages
    config = json.loads((folder / "model" / "adapter" / "adapter_config.json").read_text())
    stacked = load_file(folder / "model" / "adapter" / "adapter_model.safetensors")
    first, second = (
        load_file(path / "adapter_model.safetensors") for path in (folder / "run/chain/1_vqa", folder / "run")
    )

    assert (config["r"], config["lora_alpha"]) == (8, 16)  # 4 + 4; the scaling stays 2
    assert stacked.keys() == first.keys()
    for key, tensor in stacked.items():
        assert torch.equal(tensor, torch.cat([first[key], second[key]], dim=0 if "lora_A" in key else 1))
    assert certificate["adapter"]["dtype"] == "float32"


def test_stages_in_bf16_stay_in_bf16_and_the_same_run_gives_the_same_bytes(tiny_model, tmp_path):
    run = write_adapter(tiny_model, tmp_path / "run", seed=1, dtype=torch.bfloat16)
    for name in ("a", "b"):
        certificate = merge_adapter(run, tmp_path / name, dtype="float32")

    assert certificate["adapter"]["dtype"] == "bfloat16"
    assert (certificate["adapter"]["rank"], certificate["adapter"]["alpha"]) == (4, 8)
    written = [{path.name: path.read_bytes() for path in (tmp_path / name / "adapter").iterdir()} for name in "ab"]
    assert written[0] == written[1]


def test_weights_of_fewer_stages_are_filled_up_to_the_common_rank(tiny_model, tmp_path):
    """vLLM reads one rank and one scaling for all weights."""
    run = write_unlike_stages(tiny_model, tmp_path / "run", ALIGNER["gemma3"])
    merge_adapter(run, tmp_path / "model", dtype="float32")
    config = json.loads((tmp_path / "model" / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "model" / "adapter" / "adapter_model.safetensors")

    assert (config["r"], config["lora_alpha"]) == (15, 15)  # 3 + 8 + 4
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["use_rslora"]
    assert config["modules_to_save"] == ["multi_modal_projector"]
    assert {tensor.shape[0 if "lora_A" in key else 1] for key, tensor in tensors.items() if "lora" in key} == {15}
    gate = next(tensor for key, tensor in tensors.items() if "gate_proj.lora_A" in key)
    assert gate[8:].eq(0).all() and gate[:8].ne(0).all()  # of the second stage alone


def test_the_folder_of_the_adapter_stands_alone(stages):
    folder, _ = stages
    adapter = folder / "model" / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())

    assert (
        AutoProcessor.from_pretrained(adapter).chat_template
        == AutoProcessor.from_pretrained(folder / "model").chat_template
    )
    assert config["base_model_name_or_path"] == "tiny"  # no path of this machine
    assert not any(str(folder).encode() in path.read_bytes() for path in adapter.iterdir())
    assert len(read_adapter(adapter).factors) == 8


def test_the_model_folder_loads_as_the_merged_model_and_not_as_base_and_adapter(stages):
    """transformers takes a folder with an adapter_config.json for an adapter, but looks in no folder below."""
    folder, _ = stages
    model, _ = load_pretrained(folder / "model")
    stored = load_file(folder / "model" / "model.safetensors")

    assert not hasattr(model, "peft_config")
    weight = model.state_dict()["model.language_model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(weight, stored["language_model.model.layers.0.self_attn.q_proj.weight"])
    assert find_start(folder / "model").adapters == ()


def test_an_adapter_that_is_not_the_certificates_is_found_and_one_that_is_gone_is_not_missed(stages, tmp_path):
    folder, _ = stages
    shutil.copytree(folder / "model", tmp_path / "model")
    assert read_certificate(tmp_path / "model")["passed"]
    path = tmp_path / "model" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] += 1
    save_file(tensors, path, metadata={"format": "pt"})

    with pytest.raises(MergeError, match=r"adapter_model.safetensors is not the adapter that merge_certificate.json"):
        read_certificate(tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "adapter")
    assert read_certificate(tmp_path / "model")["passed"]


def test_a_stacked_adapter_that_was_written_wrongly_fails_the_certificate(stages, tmp_path, monkeypatch):
    import dentalgemma.stacking as stacking

    folder, _ = stages
    right = stacking._numbers

    def wrong(plan, stored):
        return -right(plan, stored) if "layers.2.self_attn.q_proj.lora_B" in stored.key else right(plan, stored)

    monkeypatch.setattr(stacking, "_numbers", wrong)

    with pytest.raises(MergeError, match=r"the stacked adapter is 2 of its norm off for .*layers.2.self_attn.q_proj"):
        merge_adapter(folder / "run", tmp_path / "model", dtype="float32")
    assert json.loads((tmp_path / "model" / CERTIFICATE).read_text())["passed"] is False


def test_where_no_adapter_is_equal_to_the_chain_the_certificate_says_why(tiny_gemma4, stages, tmp_path):
    run = tmp_path / "run"
    write_adapter(tiny_gemma4, run / "chain" / "1_align", seed=1, modules_to_save=["embed_vision"])
    write_adapter(tiny_gemma4, run, seed=2, target_modules=r".*embed_vision\.embedding_projection")
    later = write_adapter(stages[0] / "model", tmp_path / "later", seed=3)

    in_full_and_again = merge_adapter(run, tmp_path / "a", dtype="float32")["adapter"]
    on_a_merged_model = merge_adapter(later, tmp_path / "b", dtype="float32")["adapter"]
    assert (
        "embedding_projection.weight was trained in full, and by LoRA in a later stage" in in_full_and_again["left_out"]
    )
    assert on_a_merged_model["left_out"] == "the base model is a merged model itself: its own stages would be missing"
    assert not (tmp_path / "a" / "adapter").exists() and not (tmp_path / "b" / "adapter").exists()


def test_an_adapter_of_the_aligner_alone_is_one_for_peft_too(tiny_model, tmp_path):
    run = write_adapter(
        tiny_model, tmp_path / "run", seed=1, target_modules="dummy-target-modules", modules_to_save=[ALIGNER["gemma3"]]
    )
    merge_adapter(run, tmp_path / "model", dtype="float32")

    assert (answers(tiny_model, tmp_path / "model" / "adapter") - answers(tmp_path / "model")).abs().max() < 1e-4
