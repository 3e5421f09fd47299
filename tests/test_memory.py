"""What a step needs, from the model's own code on shapes: held to published figures and to what is really loaded."""

import pytest
import torch
from transformers import AutoConfig, Gemma3Config, Gemma4Config
from trl import ModelConfig, SFTConfig

from dentalgemma.models.loading import load_model
from dentalgemma.models.parts import count_parameters
from dentalgemma.training import memory
from dentalgemma.training.memory import (
    GIB,
    GPUS,
    Batch,
    Sharding,
    Trace,
    build_on_meta,
    feature_bytes,
    head_bytes,
    head_flops,
    step_memory,
    steps_of,
    trace_step,
    weight_bytes,
    what_would_fit,
)

# The published architectures: MedGemma 4B (Gemma 3), Gemma 4 31B.
GEMMA3_4B = Gemma3Config(
    text_config={
        "vocab_size": 262208,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 1024,
    },
    vision_config={
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 896,
        "patch_size": 14,
        "vision_use_head": False,
    },
    mm_tokens_per_image=256,
)
GEMMA4_31B = Gemma4Config(
    text_config={
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 60,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "global_head_dim": 512,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 4,
        "hidden_size_per_layer_input": 0,
    },
    vision_config={
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 72,
    },
)


def lora(**options):
    return ModelConfig(**{"use_peft": True, "lora_r": 64, "lora_alpha": 64, "lora_dropout": 0.05} | options)


def training(**options):
    return SFTConfig(**{"output_dir": "nowhere", "use_cpu": True, "optim": "adamw_torch_fused"} | options)


def trace(architecture, batch, *, checkpointing=False, trains=("language_model",), vision="live", **options):
    model = build_on_meta(architecture, lora(dtype="bfloat16", **options), trains)
    return trace_step(model, batch, checkpointing=checkpointing, mixed_precision=True, vision=vision)


@pytest.fixture(scope="module")
def tiny_architecture(tiny_model):
    return AutoConfig.from_pretrained(tiny_model)


def test_the_published_sizes_are_counted_not_guessed():
    counts = count_parameters(build_on_meta(GEMMA3_4B, lora(dtype="bfloat16"), ["language_model"]))
    trained = counts["language_model"]["trainable"]

    assert sum(part["parameters"] for part in counts.values()) - trained == pytest.approx(4.300e9, rel=1e-3)
    assert counts["vision_tower"]["parameters"] == pytest.approx(417e6, rel=1e-2)
    inputs_and_outputs = 2 * (2560 + 2048) + 2 * (2560 + 1024) + 3 * (2560 + 10240)  # of a block's seven layers
    assert trained == 34 * 64 * inputs_and_outputs


def test_gemma_4_is_counted_too():
    counts = count_parameters(build_on_meta(GEMMA4_31B, lora(dtype="bfloat16", lora_r=8), ["aligner"]))

    assert sum(part["parameters"] for part in counts.values()) == pytest.approx(31.3e9, rel=1e-2)
    assert counts["aligner"]["trainable"] == 1152 * 5376


def test_activations_of_the_4b_model_are_those_measured_per_token():
    """5.85 MB a token without checkpointing, by itself: a LoRA dropout adds a byte for each number that it looks at."""
    short, long = (trace(GEMMA3_4B, Batch(1, tokens, 100), lora_dropout=0.0).peak for tokens in (300, 600))
    per_token = (long - short) / 300

    print(f"\nactivations: {per_token / 1e6:.2f} MB per token")
    assert per_token == pytest.approx(5.85e6, rel=0.15)


@pytest.mark.slow
def test_operations_of_the_4b_model_are_those_counted_elsewhere():
    """5.46 TFLOP for the tower, 4.09 and 4.34 forward and backward through the language model, at 600 tokens."""
    counted = trace(GEMMA3_4B, Batch(1, 600, 150, (256,)))

    assert counted.flops == pytest.approx((5.46 + 4.09 + 4.34) * 1e12, rel=0.02)


def test_cached_features_leave_the_language_model_alone():
    """8.4 TFLOP at 600 tokens, 4.09 forward and 4.34 backward; the head takes 0.4 for 150 answer tokens."""
    counted = trace(GEMMA3_4B, Batch(1, 600, 150, (256,)), vision="cached")

    print(f"\ncached, no checkpointing: {counted.flops / 1e12:.2f} TFLOP")
    assert counted.flops == pytest.approx((4.09 + 4.34) * 1e12, rel=0.02)
    assert head_flops(GEMMA3_4B, 150) == pytest.approx(0.40e12, rel=0.02)


@pytest.mark.slow
def test_a_resting_tower_costs_one_pass_under_checkpointing_too():
    """18.4 TFLOP with the head: the tower once, the language model's forward twice."""
    counted = trace(GEMMA3_4B, Batch(1, 600, 150, (256,)), checkpointing=True)

    print(f"\nlive, checkpointing: {counted.flops / 1e12:.2f} TFLOP")
    assert counted.flops + head_flops(GEMMA3_4B, 150) == pytest.approx(18.4e12, rel=0.02)


@pytest.mark.parametrize("family", ["tiny_model", "tiny_gemma4"])
def test_what_a_tower_costs_depends_on_how_pictures_come(request, family):
    architecture = AutoConfig.from_pretrained(request.getfixturevalue(family))
    batch = Batch(2, 80, 10, (16,))
    cached, live, stock = (
        trace(architecture, batch, vision=vision, checkpointing=True, lora_r=8)
        for vision in ("cached", "live", "stock")
    )
    trained = [
        trace(architecture, batch, vision=vision, trains=["vision_tower"], lora_r=8) for vision in ("cached", "live")
    ]
    aligner = trace(architecture, batch, vision="cached", trains=["aligner"], lora_r=8)

    assert cached.flops < live.flops <= stock.flops
    assert cached.peak <= live.peak <= stock.peak
    if family == "tiny_model":  # Gemma 4's patch embeddings are not made to want gradients
        assert live.flops < stock.flops
    assert trained[0] == trained[1]  # a tower that trains has no features to cache
    assert aligner.flops > 0


def test_features_take_what_the_fact_sheet_says():
    assert feature_bytes(GEMMA3_4B, 256, torch.bfloat16) == 0.5625 * 2**20
    assert feature_bytes(GEMMA3_4B, 1024, torch.float32) == 8 * 0.5625 * 2**20


@pytest.mark.slow
def test_checkpointing_costs_the_frozen_tower_a_second_and_third_pass():
    """17.36 TFLOP for the tower instead of 5.46, and the language model's forward twice: transformers and TRL alone."""
    counted = trace(GEMMA3_4B, Batch(1, 600, 150, (256,)), checkpointing=True, vision="stock")

    assert counted.flops == pytest.approx((17.36 + 2 * 4.09 + 4.34) * 1e12, rel=0.05)


@pytest.mark.parametrize(
    ("family", "trains"),
    [
        ("tiny_model", ["language_model"]),
        ("tiny_gemma4", ["aligner"]),
        ("tiny_gemma4", ["language_model", "aligner", "vision_tower"]),
    ],
)
def test_every_family_and_choice_of_parts_can_be_traced(request, family, trains):
    architecture = AutoConfig.from_pretrained(request.getfixturevalue(family))
    batch = Batch(rows=2, tokens=80, answer_tokens=10, images=(16,))
    plain, checkpointed = (
        trace(architecture, batch, trains=trains, checkpointing=checkpointing, lora_r=8)
        for checkpointing in (False, True)
    )
    text_only = trace(architecture, Batch(2, 80, 10), trains=trains, lora_r=8) if trains != ["aligner"] else None

    assert checkpointed.peak > 0
    assert checkpointed.flops > plain.flops
    if text_only:
        assert text_only.flops < plain.flops
    if "language_model" in trains:
        assert checkpointed.peak < plain.peak


def test_masks_are_counted_and_kept_by_every_layer_without_checkpointing(tiny_architecture, monkeypatch):
    """A byte for each two tokens of a sequence and kind of layer, and for each layer a number, in bf16."""
    rows, tokens = 3, 600
    batch, layers = Batch(rows, tokens, 50, (16,), questions=2), tiny_architecture.text_config.num_hidden_layers
    peaks = [trace(tiny_architecture, batch, checkpointing=switch, lora_r=8).peak for switch in (False, True)]
    monkeypatch.setattr(memory, "_make_masks", lambda *_: dict.fromkeys(("full_attention", "sliding_attention")))
    without = [trace(tiny_architecture, batch, checkpointing=switch, lora_r=8).peak for switch in (False, True)]
    plain, checkpointed = (with_ - none for with_, none in zip(peaks, without, strict=True))

    assert plain >= rows * tokens**2 * (2 + 2 * layers)
    assert plain > checkpointed >= rows * tokens**2 * 2


def test_activations_grow_with_rows_and_weights_do_not(tiny_architecture):
    one, four = (trace(tiny_architecture, Batch(rows, 200, 50), lora_r=8).peak for rows in (1, 4))

    assert four == pytest.approx(4 * one, rel=0.1)


@pytest.mark.parametrize("options", [{}, {"load_in_4bit": True}, {"load_in_4bit": True, "use_bnb_nested_quant": True}])
def test_weights_take_what_is_really_loaded(tiny_model, tiny_architecture, options):
    settings = lora(model_name_or_path=str(tiny_model), dtype="float32", **options)
    loaded, _ = load_model(settings)
    states = [getattr(parameter, "quant_state", None) for parameter in loaded.parameters()]
    scales = [
        tensor
        for state in states
        if state is not None
        for tensor in (state.absmax, *([state.state2.absmax] if state.nested else []))
    ]
    really = sum(t.numel() * t.element_size() for t in (*loaded.parameters(), *loaded.buffers(), *scales))
    model = build_on_meta(tiny_architecture, settings, ["language_model"])

    assert weight_bytes(model, settings) == pytest.approx(really, rel=0.01)


@pytest.mark.parametrize(
    ("optim", "bytes_per_number"),
    [("adamw_torch_fused", 8), ("adamw_torch", 8), ("paged_adamw_8bit", 2), ("adamw_8bit", 2), ("sgd", 0)],
)
def test_the_optimizer_keeps_two_moments_of_what_is_trained(tiny_architecture, optim, bytes_per_number):
    memory = estimate(tiny_architecture, optim=optim)

    assert memory.optimizer == memory.adapters // 4 * bytes_per_number
    assert memory.adapters == memory.gradients


def estimate(architecture, sharding=None, **options):
    model = build_on_meta(architecture, lora(), ["language_model"])
    return step_memory(model, Trace(10**6, 0), Batch(1, 100, 20), training(**options), lora(), sharding or Sharding())


def test_sharing_out_among_gpus_takes_off_what_it_shares(tiny_architecture):
    alone = estimate(tiny_architecture)
    ddp, zero2, zero3, fsdp = (
        estimate(tiny_architecture, Sharding(kind, 4)) for kind in ("ddp", "zero2", "zero3", "fsdp")
    )

    assert ddp.weights == zero2.weights == alone.weights
    assert ddp.gradients == 2 * alone.gradients  # buckets
    assert zero2.gradients == alone.gradients // 2 // 4  # in bf16, a quarter each
    assert zero2.optimizer == alone.optimizer * 12 // 8 // 4  # with an fp32 copy of what is trained
    assert zero3.weights < alone.weights
    assert fsdp.adapters == alone.adapters // 4
    assert {memory.activations for memory in (alone, ddp, zero2, zero3, fsdp)} == {10**6}


def test_four_bits_unpack_one_layer_at_a_time():
    settings = lora(dtype="bfloat16", load_in_4bit=True)
    model = build_on_meta(GEMMA3_4B, settings, ["language_model"])
    memory = step_memory(model, Trace(0, 0), Batch(1, 100, 20), training(), settings, Sharding())

    assert memory.weights - weight_bytes(model, settings) == 2560 * 10240 * 2


def test_the_fused_head_never_holds_all_logits(tiny_architecture):
    model = build_on_meta(GEMMA3_4B, lora(dtype="bfloat16"), ["language_model"])
    batch = Batch(4, 1000, 100)

    assert head_bytes(model, batch, fused=False) == 4 * 1000 * 262208 * 4 * 2
    assert head_bytes(model, batch) < 0.1 * GIB


@pytest.mark.parametrize(
    ("rows", "options", "gpus", "steps"),
    [
        pytest.param(2529, {"num_train_epochs": 5, "gradient_accumulation_steps": 4}, 1, (633, 3165), id="one GPU"),
        pytest.param(2529, {"num_train_epochs": 5, "gradient_accumulation_steps": 4}, 8, (80, 400), id="eight"),
        pytest.param(100, {"max_steps": 7}, 1, (100, 7), id="max_steps"),
        pytest.param(3, {"num_train_epochs": 1, "gradient_accumulation_steps": 8}, 1, (1, 1), id="few rows"),
    ],
)
def test_steps_are_those_of_the_trainer(rows, options, gpus, steps):
    assert steps_of(rows, training(per_device_train_batch_size=1, **options), gpus) == steps


def test_what_would_fit_keeps_the_rows_of_a_step():
    settings = training(gradient_checkpointing=False)
    eight, one = ([option for option, *_ in what_would_fit(Batch(rows, 600, 100), settings, lora())] for rows in (8, 1))

    assert eight[0] == "--gradient_checkpointing true"
    assert "--per_device_train_batch_size 1 --gradient_accumulation_steps 8" in eight[1]
    assert eight[-1].endswith("--load_in_4bit true")
    assert one == ["--gradient_checkpointing true", "--gradient_checkpointing true --load_in_4bit true"]


def test_gpus_without_bf16_are_known_as_such():
    assert {name for name, gpu in GPUS.items() if gpu.capability[0] < 8} == {"p100", "v100", "v100-32", "t4"}
