"""Chains of adapters, bases with other names and shards, and what a merge refuses."""

import hashlib
import json
import re
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from data_builders.records import InputError
from dentalgemma.certificates import MergeError, read_certificate
from dentalgemma.folding import fold, plan_updates
from dentalgemma.merging import merge_adapter
from dentalgemma.models.loading import find_start, fingerprint_files, fold_adapters, load_pretrained
from dentalgemma.models.parts import LANGUAGE_MODEL_LAYERS, part_of
from dentalgemma.models.tiny import make_tiny_model
from dentalgemma.parity import computing_dtype
from dentalgemma.weight_files import open_model

ALIGNER = {"gemma3": "multi_modal_projector", "gemma4": "embed_vision"}
ALIGNER_TENSORS = {"gemma3": 2, "gemma4": 1}
LM_TENSORS = {"gemma3": 28, "gemma4": 26}  # Gemma 4's full-attention layers have no values of their own


def write_adapter(base, folder, *, seed, std=0.05, aligner=None, dtype=torch.float32, model=None, **facts):
    """A random adapter on the language model, and on the aligner in full where its name is given."""
    model = model or AutoModelForImageTextToText.from_pretrained(base, dtype=dtype)
    modules = [aligner] if aligner else None
    adapted = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=LANGUAGE_MODEL_LAYERS, modules_to_save=modules)
    )
    torch.manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
        elif "modules_to_save" in name:
            parameter.data += torch.randn_like(parameter) * 0.05
    adapted.save_pretrained(folder)
    (folder / "run_facts.json").write_text(json.dumps({"stage": folder.name, **facts}))
    return folder


def write_chain(base, run, family="gemma3", **settings):
    """A run on two earlier ones, the middle of which trained the aligner too."""
    write_adapter(base, run, seed=3, **settings)
    write_adapter(base, run / "chain" / "1_first", seed=1, **settings)
    write_adapter(base, run / "chain" / "2_second", seed=2, aligner=ALIGNER[family], **settings)
    return run


def fold_by_peft(base, folders):
    """The weights as PEFT merges them, one adapter after the other, in fp32."""
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    for folder in folders:
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    return model.state_dict()


@pytest.fixture(scope="module")
def chain(tiny_model, tmp_path_factory):
    return write_chain(tiny_model, tmp_path_factory.mktemp("chain") / "run")


@pytest.fixture(scope="module")
def merged_chain(chain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged") / "first"
    return folder, merge_adapter(chain, folder, dtype="float32")


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_a_chain_of_three_is_what_peft_makes_of_it(family, request, tmp_path):
    if family == "gemma3":
        base, run = (request.getfixturevalue(name) for name in ("tiny_model", "chain"))
        folder, certificate = request.getfixturevalue("merged_chain")
    else:
        base, folder = request.getfixturevalue("tiny_gemma4"), tmp_path / "model"
        run = write_chain(base, tmp_path / "run", family)
        certificate = merge_adapter(run, folder, dtype="float32")
    theirs = fold_by_peft(base, [run / "chain/1_first", run / "chain/2_second", run])
    ours = load_pretrained(folder)[0].state_dict()
    bare = load_pretrained(base, dtype=torch.float32)[0].state_dict()

    assert certificate["changed_tensors"] == LM_TENSORS[family] + ALIGNER_TENSORS[family]
    assert certificate["peft_difference"] < 1e-6
    assert certificate["top1_agreement"] == 1
    assert [stage["stage"] for stage in certificate["stages"]] == ["1_first", "2_second", "run"]
    assert certificate["adapters"] == ["1_first", "2_second", "run"]
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.allclose(weight, theirs[name], atol=1e-5), name
    changed = {part_of(name) for name, weight in ours.items() if not torch.equal(weight, bare[name])}
    assert changed == {"language_model", "aligner"}
    assert list(open_model(folder)[0].tensors) == list(open_model(base)[0].tensors)


def test_a_checkpoint_has_the_chain_of_its_run(chain, tmp_path):
    shutil.copytree(chain, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-2"
    shutil.copytree(chain, checkpoint, ignore=shutil.ignore_patterns("chain"))

    assert [folder.name for folder in find_start(checkpoint).adapters] == ["1_first", "2_second", "checkpoint-2"]


def test_what_a_stage_trains_on_is_what_the_merge_of_its_chain_would_be(chain, merged_chain, tiny_model):
    """Folding in memory at the start of a run, and folding files after it, are one arithmetic."""
    model, _ = load_pretrained(tiny_model, dtype=torch.float32)
    fold_adapters(model, find_start(chain).adapters)
    merged = load_pretrained(merged_chain[0])[0].state_dict()

    for name, weight in model.state_dict().items():
        assert torch.allclose(weight, merged[name], atol=1e-6), name


def test_a_merge_on_a_merged_model_carries_its_stages_along(merged_chain, tmp_path):
    first, _ = merged_chain
    write_adapter(first, tmp_path / "later", seed=9, base_weights=fingerprint_files(first))
    certificate = merge_adapter(tmp_path / "later", tmp_path / "second", dtype="float32")

    assert [stage["stage"] for stage in certificate["stages"]] == ["1_first", "2_second", "run", "later"]


NAMINGS = {
    "in memory": [(r"^language_model\.model\.", "model.language_model."), (r"^(vision|multi)", r"model.\1")],
    "older, as on the Hub": [(r"^vision_tower\.", "vision_tower.vision_model.")],
}


@pytest.mark.known_bug(17)
@pytest.mark.parametrize("naming", NAMINGS)
def test_a_base_keeps_the_names_that_it_has_in_its_files(naming, chain, tiny_model, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    tensors = {}
    for key, tensor in load_file(tiny_model / "model.safetensors").items():
        for pattern, new in NAMINGS[naming]:
            key = re.sub(pattern, new, key)
        tensors[key] = tensor
    assert tensors.keys() != load_file(tiny_model / "model.safetensors").keys()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    certificate = merge_adapter(chain, tmp_path / "model", base=str(base), dtype="float32")
    merged = load_file(tmp_path / "model" / "model.safetensors")

    assert certificate["changed_tensors"] == 30
    assert merged.keys() == tensors.keys()
    theirs = fold_by_peft(tiny_model, [chain / "chain/1_first", chain / "chain/2_second", chain])
    for name, weight in load_pretrained(tmp_path / "model")[0].state_dict().items():
        assert torch.allclose(weight, theirs[name], atol=1e-5), name


@pytest.mark.known_bug(17)
def test_shards_index_and_configuration_are_the_bases_but_for_the_type_of_the_numbers(chain, tiny_model, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    (base / "model.safetensors").unlink()
    load_pretrained(tiny_model)[0].save_pretrained(base, max_shard_size="2MB")
    before = json.loads((base / "model.safetensors.index.json").read_text())
    certificate = merge_adapter(chain, tmp_path / "model", base=str(base))
    after = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())

    assert len(set(before["weight_map"].values())) > 2
    assert after["weight_map"] == before["weight_map"]
    assert after["metadata"]["total_size"] == before["metadata"]["total_size"] // 2  # fp32 to bf16
    assert certificate["tensors"] == len(before["weight_map"])
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "model", base))
    assert ours["architectures"] == theirs["architectures"] == ["Gemma3ForConditionalGeneration"]
    assert (ours["dtype"], theirs["dtype"]) == ("bfloat16", "float32")
    for document in (ours, theirs):
        for part in (document, *(value for value in document.values() if isinstance(value, dict))):
            part.pop("dtype", None)
    assert ours == theirs


@pytest.mark.known_bug(14)
def test_a_quantised_base_is_refused_and_its_adapter_folded_into_16_bits(tiny_model, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    half = tmp_path / "half"
    shutil.copytree(tiny_model, half)
    load_pretrained(tiny_model, dtype=torch.bfloat16)[0].save_pretrained(half)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=[".*vision.*"])
    quantised = AutoModelForImageTextToText.from_pretrained(half, quantization_config=config)
    assert any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in quantised.modules())
    run = write_adapter(half, tmp_path / "run", seed=1, model=quantised, base_weights=fingerprint_files(half))
    quantised_folder = tmp_path / "nf4"
    shutil.copytree(half, quantised_folder)
    document = json.loads((half / "config.json").read_text())
    document["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantised_folder / "config.json").write_text(json.dumps(document))

    with pytest.raises(InputError, match=r"nf4 is quantised \(bitsandbytes\).* name the 16-bit model with --base"):
        merge_adapter(run, tmp_path / "wrong", base=str(quantised_folder))
    certificate = merge_adapter(run, tmp_path / "model", base=str(half))
    assert certificate["changed_tensors"] == 28
    assert {stored.dtype for file in open_model(tmp_path / "model") for stored in file.tensors.values()} == {
        torch.bfloat16
    }


def test_weights_stored_in_four_bits_are_refused_even_without_a_configuration(chain, tiny_model, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    tensors = load_file(base / "model.safetensors")
    name = next(name for name in tensors if "q_proj" in name and "language_model" in name)
    tensors[name] = tensors[name].to(torch.uint8)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(InputError, match="name its 16-bit model with --base"):
        merge_adapter(chain, tmp_path / "model", base=str(base))


def other_weights(base):
    make_tiny_model(base, seed=1)


def other_shapes(base):
    tensors = load_file(base / "model.safetensors")
    tensors = {key: value[:64].clone() if "down_proj" in key else value for key, value in tensors.items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def fewer_layers(base):
    tensors = load_file(base / "model.safetensors")
    kept = {key: value for key, value in tensors.items() if "language_model.model.layers.3" not in key}
    save_file(kept, base / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.known_bug(12)
@pytest.mark.parametrize(
    ("change", "recorded", "message"),
    [
        pytest.param(other_weights, True, "was trained on other weights than those in", id="other weights"),
        pytest.param(other_shapes, False, r"adapter of another base than .*: .* is \[64, 384\] there", id="shapes"),
        pytest.param(fewer_layers, False, r"does not have: it is of another base", id="layers"),
    ],
)
def test_an_adapter_of_another_base_is_refused(change, recorded, message, tiny_model, tmp_path):
    facts = {"base_weights": fingerprint_files(tiny_model)} if recorded else {}
    run = write_adapter(tiny_model, tmp_path / "run", seed=1, **facts)
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    change(base)

    with pytest.raises(InputError, match=message):
        merge_adapter(run, tmp_path / "model", base=str(base), dtype="float32")
    assert not (tmp_path / "model").exists()


def test_an_adapter_file_that_lacks_a_layer_of_its_configuration_is_found(tiny_model, tmp_path):
    """PEFT would leave that layer at its start and only warn."""
    run = write_adapter(tiny_model, tmp_path / "run", seed=1)
    tensors = load_file(run / "adapter_model.safetensors")
    kept = {key: value for key, value in tensors.items() if "layers.2.mlp.up_proj" not in key}
    save_file(kept, run / "adapter_model.safetensors", metadata={"format": "pt"})

    with pytest.raises(MergeError, match=r"PEFT adapts other tensors than run holds, for example .*layers.2.mlp.up_p"):
        merge_adapter(run, tmp_path / "model", dtype="float32")


@pytest.mark.known_bug(9)
def test_a_run_whose_proof_failed_is_not_merged(tiny_model, tmp_path):
    run = write_adapter(tiny_model, tmp_path / "run", seed=1, proof={"passed": False})

    with pytest.raises(InputError, match="run did not train what it was to train"):
        merge_adapter(run, tmp_path / "model")


def record(adapter, **facts):
    """Facts as a finished run leaves them beside its adapter."""
    facts = {"proof": {"passed": True}, "adapter_sha256": sha256(adapter), **facts}
    path = adapter / "run_facts.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    return json.loads(path.read_text())


def sha256(adapter):
    return hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()


def other_adapter(base, adapter):
    """Another adapter in the place of one, whose facts stay."""
    write_adapter(base, adapter.parent / "other", seed=77)
    (adapter.parent / "other" / "adapter_model.safetensors").replace(adapter / "adapter_model.safetensors")
    shutil.rmtree(adapter.parent / "other")


@pytest.mark.known_bug(9)
def test_an_adapter_that_its_facts_are_not_about_is_refused(tiny_model, tmp_path):
    """What was proven of one adapter would be said of another."""
    run = write_adapter(tiny_model, tmp_path / "run", seed=1)
    record(run)
    other_adapter(tiny_model, run)

    with pytest.raises(InputError, match=r"adapter_model.safetensors is not what its run_facts.json is about"):
        merge_adapter(run, tmp_path / "wrong")


@pytest.mark.known_bug(9)
def test_a_checkpoint_is_merged_without_the_proof_of_its_run_and_not_where_that_failed(tiny_model, tmp_path):
    run = write_adapter(tiny_model, tmp_path / "run", seed=1)
    checkpoint = write_adapter(tiny_model, run / "checkpoint-2", seed=2)
    (checkpoint / "run_facts.json").unlink()
    record(run)
    certificate = merge_adapter(checkpoint, tmp_path / "model", dtype="float32")
    (stage,) = certificate["stages"]

    assert stage["from_checkpoint"]
    assert "proof" not in stage
    assert stage["adapter_sha256"] == sha256(checkpoint) != sha256(run)
    assert any(warning.startswith("checkpoint-2 is a checkpoint") for warning in certificate["warnings"])
    record(run, proof={"passed": False})
    with pytest.raises(InputError, match="did not train what it was to train"):
        merge_adapter(checkpoint, tmp_path / "wrong")


@pytest.fixture
def recorded_chain(chain, tmp_path):
    """A run on two earlier ones that recorded what it was trained on."""
    run = tmp_path / "run"
    shutil.copytree(chain, run)
    stages = [record(run / "chain" / "1_first", chain=[])]
    stages.append(record(run / "chain" / "2_second", chain=[dict(stages[0])]))
    for stage in stages:
        stage.pop("chain", None)
    record(run, chain=stages)
    return run


def swapped(run, base):
    other_adapter(base, run / "chain" / "1_first")


def swapped_with_its_facts(run, base):
    other_adapter(base, run / "chain" / "2_second")
    record(run / "chain" / "2_second")


def renamed(run, base):
    record(run / "chain" / "2_second", stage="another")


def left_out(run, base):
    shutil.rmtree(run / "chain" / "1_first")


def added(run, base):
    record(write_adapter(base, run / "chain" / "3_third", seed=5))


@pytest.mark.known_bug(12)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swapped, "is not what its run_facts.json is about"),
        (swapped_with_its_facts, r"2_second \(2_second\) is not the adapter of stage 2_second that run was trained on"),
        (renamed, r"2_second \(another\) is not the adapter of stage 2_second"),
        (left_out, r"trained on 1 earlier adapters \(1_first\), its chain holds 0"),
        (added, r"trained on 2 earlier adapters \(1_first, 2_second\), its chain holds 3"),
    ],
)
def test_a_chain_that_the_run_was_not_trained_on_is_refused(recorded_chain, tiny_model, tmp_path, change, message):
    change(recorded_chain, tiny_model)

    with pytest.raises(InputError, match=message):
        merge_adapter(recorded_chain, tmp_path / "model", dtype="float32")
    assert not (tmp_path / "model").exists()


def test_a_chain_that_agrees_with_what_was_recorded_is_merged(recorded_chain, tmp_path):
    certificate = merge_adapter(recorded_chain, tmp_path / "model", dtype="float32")

    assert [stage["proof"]["passed"] for stage in certificate["stages"]] == [True] * 3
    assert len(certificate["warnings"]) == 1  # of the rows


@pytest.mark.known_bug(11)
def test_tied_embeddings_are_not_folded(tiny_model, tmp_path):
    """They are the output layer too, which the adapter did not change."""
    model = AutoModelForImageTextToText.from_pretrained(tiny_model)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    adapted.save_pretrained(tmp_path / "run")
    tensors = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert any("embed_tokens" in key for key in tensors)

    with pytest.raises(InputError, match=r"embed_tokens.weight is tied to another weight"):
        merge_adapter(tmp_path / "run", tmp_path / "model")


def test_an_adapter_with_names_of_another_version_finds_its_weights(chain, tiny_model):
    """transformers 4 wrote `language_model.model.layers…` for what is `model.language_model.layers…` today."""
    from dataclasses import replace

    from dentalgemma.adapters import read_adapter

    adapter = read_adapter(chain)
    older = {
        name.replace("model.language_model.", "language_model.model."): keys for name, keys in adapter.factors.items()
    }
    files = open_model(tiny_model)
    renamed = plan_updates(tiny_model, files, [replace(adapter, factors=older)])

    assert renamed.keys() == plan_updates(tiny_model, files, [adapter]).keys()


def test_a_full_disk_is_said_before_anything_is_written(chain, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10_000})()
    monkeypatch.setattr("dentalgemma.folding.shutil.disk_usage", lambda path: usage)

    with pytest.raises(InputError, match=r"takes 0\.1 GB, but .* has 0\.0 GB free"):
        merge_adapter(chain, tmp_path / "out" / "model")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_merge_leaves_nothing_behind(chain, tmp_path, monkeypatch, stop):
    def interrupted(*arguments):
        fold(*arguments)
        raise stop

    monkeypatch.setattr("dentalgemma.merging.fold", interrupted)
    expected = KeyboardInterrupt if stop is KeyboardInterrupt else MergeError

    with pytest.raises(expected):
        merge_adapter(chain, tmp_path / "out" / "model")
    assert not list((tmp_path / "out").iterdir())


def test_a_base_that_is_gone_must_be_named(chain, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(chain, run)
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone/base"}))

    with pytest.raises(InputError, match=r"/gone/base is neither a folder here.*--base names the adapter's base"):
        merge_adapter(run, tmp_path / "model")


@pytest.mark.parametrize(
    ("run", "message"),
    [("nowhere", "nowhere holds no adapter"), (".", "holds no adapter")],
    ids=["nothing", "a folder"],
)
def test_what_is_no_adapter_is_not_merged(tmp_path, run, message):
    with pytest.raises(InputError, match=message):
        merge_adapter(run, tmp_path / "model")


def test_rows_are_taken_from_the_usual_place_and_what_a_killed_merge_left_is_removed(
    tiny_model, vqa_dataset, tmp_path, monkeypatch
):
    (tmp_path / ".model.unfinished").mkdir()
    (tmp_path / ".model.unfinished" / "model.safetensors").write_bytes(b"half")
    run = write_adapter(tiny_model, tmp_path / "run", seed=1, dataset="vqa")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "vqa").symlink_to(vqa_dataset)
    monkeypatch.chdir(tmp_path)

    assert merge_adapter(run, tmp_path / "model", dtype="float32")["parity_inputs"] == "4 rows of vqa, validation"
    assert read_certificate(tmp_path / "model")["passed"]
    assert {path.name for path in tmp_path.iterdir()} == {"data", "model", "run"}


def test_without_room_for_fp32_the_models_are_asked_in_bf16(chain, tmp_path, monkeypatch):
    monkeypatch.setattr("dentalgemma.parity.computing_dtype", lambda files: torch.bfloat16)

    certificate = merge_adapter(chain, tmp_path / "model")

    assert certificate["passed"]
    assert certificate["parity_dtype"] == "bfloat16"
    assert certificate["cast_mean_logit_difference"] < certificate["base_mean_logit_difference"]


def test_models_are_asked_in_fp32_where_that_leaves_room(tiny_model):
    files = open_model(tiny_model)
    size = 4 * sum(stored.count for file in files for stored in file.tensors.values())

    assert computing_dtype(files, available=2 * size) == torch.float32
    assert computing_dtype(files, available=size) == torch.bfloat16
