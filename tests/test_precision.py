"""Number formats: what is refused before anything is loaded, and what bitsandbytes does on a CPU."""

import sys

import pytest
import torch
import yaml
from conftest import REPOSITORY
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText
from trl import ModelConfig, SFTConfig

from data_builders.records import InputError
from dentalgemma.models.loading import load_model
from dentalgemma.training.config import parse_stage
from dentalgemma.training.data import load_splits
from dentalgemma.training.precision import check_attention, check_precision, gpu_capability, quantization_config
from dentalgemma.training.trainer import StageTrainer

RECIPES = REPOSITORY / "recipes"
T4, A100 = (7, 5), (8, 0)
NF4 = {"load_in_4bit": "true", "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": "true"}


def settings(tmp_path, **options):
    return SFTConfig(output_dir=str(tmp_path), use_cpu=True, **{"bf16": False} | options)


def train(model, dataset, out, config=RECIPES / "stage1_vqa.yaml", **options):
    """Two steps through the trainer, on the CPU."""
    short = {
        "model_name_or_path": model,
        "dataset_name": dataset,
        "output_dir": out,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "logging_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": "false",
        "early_stopping_patience": 0,
        "lora_r": 4,
        "dataloader_num_workers": 0,
    }
    argv = [part for name, value in (short | options).items() for part in (f"--{name}", str(value))]
    stage, training, model_config = parse_stage(config, argv=["--config", str(config), *argv])
    loaded, processor = load_model(model_config)
    trainer = StageTrainer(
        model=loaded,
        processor=processor,
        stage=stage,
        training=training,
        model_config=model_config,
        dataset=load_splits(stage),
    )
    trainer.train()
    trainer.save_model()
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.known_bug(18)
@pytest.mark.parametrize(
    ("training", "model"),
    [
        pytest.param({"bf16": True}, {"dtype": "float32"}, id="bf16"),
        pytest.param({}, {"dtype": "bfloat16"}, id="weights in bf16"),
        pytest.param({}, {"dtype": "auto"}, id="weights as in the files"),
    ],
)
def test_a_gpu_that_only_emulates_bf16_is_refused_with_what_works_instead(tmp_path, training, model):
    training, model = settings(tmp_path, **training), ModelConfig(**model)
    check_precision(training, model, A100)
    check_precision(training, model, None)

    with pytest.raises(InputError, match=r"compute capability 7\.5.*--load_in_4bit true --dtype float32 --bf16 false"):
        check_precision(training, model, T4)


@pytest.mark.known_bug(18)
def test_bf16_from_the_launcher_counts_as_well(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")

    with pytest.raises(InputError, match="only emulates it"):
        check_precision(settings(tmp_path), ModelConfig(dtype="float32"), T4)


@pytest.mark.known_bug(18)
def test_several_gpus_in_one_process_are_refused_with_the_command(tmp_path):
    training = settings(tmp_path)
    training._n_gpu = 2  # what transformers counts where two GPUs are visible and no launcher is at work

    with pytest.raises(InputError, match=r"sees 2 GPUs.*accelerate/multi_gpu"):
        check_precision(training, ModelConfig(dtype="float32"), None)


@pytest.mark.parametrize("capability", [T4, A100, None])
def test_float16_is_refused_everywhere(tmp_path, capability):
    with pytest.raises(InputError, match="65,504"):
        check_precision(settings(tmp_path), ModelConfig(dtype="float16"), capability)


def test_a_cpu_has_no_capability_to_judge(tmp_path):
    assert gpu_capability(settings(tmp_path)) is None


@pytest.mark.known_bug(8)
def test_flash_attention_is_refused_where_it_cannot_take_the_heads_or_the_mask(tmp_path, tiny_model, tiny_gemma4):
    large = AutoConfig.from_pretrained(tiny_gemma4)
    large.text_config.per_layer_config = {"1": {"head_dim": 512}}  # as in the 31B

    with pytest.raises(InputError, match=r"heads have size 512.*256 at most; use `sdpa`"):
        check_attention(large, "flash_attention_2")
    for folder in (tiny_model, tiny_gemma4):
        with pytest.raises(InputError, match="hide an image's later tokens"):
            parse(tmp_path, "stage1_vqa", model_name_or_path=folder, attn_implementation="flash_attention_2")
        parse(tmp_path, "stage1_vqa", model_name_or_path=folder, attn_implementation="eager")


@pytest.mark.known_bug(8)
def test_flash_attention_would_indeed_lose_the_mask_among_image_tokens():
    """Why it is refused: transformers gives it no mask at all where nothing is padded, whatever the mask function."""
    from transformers.masking_utils import flash_attention_mask, sdpa_mask

    everything = lambda batch, head, query, key: query >= 0  # noqa: E731
    given = dict(
        batch_size=1, q_length=4, kv_length=4, mask_function=everything, attention_mask=torch.ones(1, 4).bool()
    )

    assert flash_attention_mask(**given) is None
    assert sdpa_mask(**given, allow_is_causal_skip=False).all()


def parse(tmp_path, recipe, **options):
    argv = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return parse_stage(RECIPES / f"{recipe}.yaml", argv=[*argv, "--output_dir", str(tmp_path)])


@pytest.mark.parametrize("option", [{"load_in_4bit": True}, {"load_in_8bit": True}], ids=["4-bit", "8-bit"])
@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_only_the_layers_of_the_language_model_are_quantised(option, family, tiny_model, tiny_gemma4):
    folder = {"gemma3": tiny_model, "gemma4": tiny_gemma4}[family]
    kind = {"load_in_4bit": "Linear4bit", "load_in_8bit": "Linear8bitLt"}[next(iter(option))]
    model, _ = load_model(ModelConfig(model_name_or_path=str(folder), dtype="float32", **option))
    quantised = {name for name, module in model.named_modules() if type(module).__name__ == kind}
    layers = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "language_model.layers" in name
    }

    assert quantised == layers
    assert len(quantised) >= 26


def test_a_bare_name_would_leave_the_tower_quantised(tiny_model):
    """Negative control: why the patterns match whole module names."""
    config = quantization_config(ModelConfig(load_in_4bit=True, dtype="float32"))
    config.llm_int8_skip_modules = ["vision_tower", "multi_modal_projector", "lm_head"]
    model = AutoModelForImageTextToText.from_pretrained(tiny_model, dtype=torch.float32, quantization_config=config)

    assert any(type(module).__name__ == "Linear4bit" for module in model.model.vision_tower.modules())


@pytest.mark.parametrize(
    ("options", "kind"), [(NF4, "Linear4bit"), ({"load_in_8bit": "true"}, "Linear8bitLt")], ids=["4-bit", "8-bit"]
)
def test_qlora_learns_on_a_cpu_and_keeps_its_adapters_in_float32(options, kind, tiny_model, vqa_dataset, tmp_path):
    trainer = train(tiny_model, vqa_dataset, tmp_path, **options, max_steps=6, learning_rate=3e-3)
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    model = trainer.model.eval()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    with torch.no_grad():
        learned = model(**batch).loss
        with model.disable_adapter():
            start = model(**batch).loss

    assert learned < start - 0.1
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert any(type(module).__name__ == kind for module in model.modules())


@pytest.mark.parametrize(
    ("optimizer", "bits"),
    [
        ("adamw_8bit", torch.uint8),
        ("paged_adamw_8bit", torch.uint8),
        ("paged_adamw_32bit", torch.float32),
    ],
)
def test_optimizers_of_bitsandbytes_run_on_a_cpu(optimizer, bits, tiny_model, vqa_dataset, tmp_path, recwarn):
    """Pages live in CUDA's unified memory: on a CPU bitsandbytes says so once and keeps ordinary tensors."""
    trainer = train(tiny_model, vqa_dataset, tmp_path, optim=optimizer, lora_r=64)
    weight = next(p for n, p in trainer.model.named_parameters() if "gate_proj.lora_A" in n)
    state = trainer.optimizer.state[weight]

    assert weight.numel() >= 4096  # smaller tensors keep 32 bits
    assert state["state1"].dtype == bits
    assert any("Paged optimizers are not supported on CPU" in str(w.message) for w in recwarn) == ("paged" in optimizer)
    assert all(loss == loss for loss in losses(trainer))


def test_the_t4_recipe_is_the_recipe_but_for_its_numbers():
    usual, t4 = (yaml.safe_load((RECIPES / name).read_text()) for name in ("stage1_vqa.yaml", "stage1_vqa_t4.yaml"))
    changed = {key for key in usual.keys() | t4.keys() if usual.get(key) != t4.get(key)}

    assert changed == {
        "dtype", "bf16", "load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant", "optim",
        "num_train_epochs", "per_device_eval_batch_size", "output_dir",
    }  # fmt: skip


@pytest.mark.known_bug(18)
def test_the_t4_recipe_passes_where_the_usual_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)  # no options for a CPU are put in front
    cpu = ["--use_cpu", "true", "--output_dir", str(tmp_path)]
    _, training, model = parse_stage(RECIPES / "stage1_vqa_t4.yaml", argv=cpu)
    check_precision(training, model, T4)

    assert quantization_config(model).bnb_4bit_compute_dtype == torch.float32
    _, training, model = parse_stage(RECIPES / "stage1_vqa.yaml", argv=cpu)
    with pytest.raises(InputError, match=r"stage1_vqa_t4\.yaml"):
        check_precision(training, model, T4)


def test_the_t4_recipe_trains(tiny_model, vqa_dataset, tmp_path):
    trainer = train(tiny_model, vqa_dataset, tmp_path, config=RECIPES / "stage1_vqa_t4.yaml")

    assert len(losses(trainer)) == 2
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("option", [{"load_in_4bit": True}, {"load_in_8bit": True}, {"optim": "adamw_8bit"}])
def test_bitsandbytes_that_is_not_installed_is_named(option, tmp_path, monkeypatch):
    # None in sys.modules is how Python itself marks a module that cannot be imported.
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    training = settings(tmp_path, **{k: v for k, v in option.items() if k == "optim"})
    model = ModelConfig(dtype="float32", **{k: v for k, v in option.items() if k != "optim"})

    with pytest.raises(InputError, match=r'pip install "dentalgemma\[bnb\]"'):
        check_precision(training, model, None)
