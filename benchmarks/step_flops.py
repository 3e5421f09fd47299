"""Operations of a training step on the true 4B architecture, counted on tensors without values.

The models' own code runs forward and backward, with our hook where features are cached, and PyTorch counts what it
multiplies. Attention counts as two products, whatever the kernel would skip; element-wise work is not counted.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from architectures import IMAGE_TOKENS, gemma3_4b
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from dentalgemma.models.parts import LANGUAGE_MODEL_LAYERS
from dentalgemma.training.backbone import prepare_backbone, rest_tower

LENGTHS = (400, 600)  # tokens of a row
ANSWER = 0.25  # of them
QUESTIONS = 3  # of an image in one sequence
PREFIX = IMAGE_TOKENS + 6  # the image between its marks, and what opens the user's turn
RANK = 64
TERA = 1e12


class Arm(NamedTuple):
    """A way to train: what is adapted, and what each step does with the tower."""

    adapted: str = LANGUAGE_MODEL_LAYERS
    checkpointing: bool = True
    tower: str = "as it comes"  # or `at rest` (no gradient), or `cached`
    questions: int = 1
    full_head: bool = False


ARMS = {
    "P1": Arm(adapted="all-linear", full_head=True),
    "P2": Arm(),
    "P3": Arm(tower="at rest"),
    "ours": Arm(checkpointing=False, tower="cached"),
    "ours, packed": Arm(checkpointing=False, tower="cached", questions=QUESTIONS),
}
DESCRIPTIONS = {
    "P1": "TRL's Gemma 3 example: LoRA on all linear layers, gradient checkpointing, loss on every token",
    "P2": "LoRA on the language model, gradient checkpointing, loss on the answer",
    "P3": "P2 with the frozen tower under no_grad and outside checkpointing",
    "ours": "P2's trained weights; features cached, no checkpointing",
    "ours, packed": f"the same, {QUESTIONS} questions of an image in one sequence",
}


class Work(NamedTuple):
    """Operations for one row (one question): tower, head and all; the head scored anew in the backward pass apart."""

    tower: float
    head: float
    total: float
    rescored: float


def measure_flops() -> dict:
    """TFLOP for each arm and length, and how many times ours the others take."""
    work = {str(length): {name: count(arm, length) for name, arm in ARMS.items()} for length in LENGTHS}
    ratios = {
        length: {
            f"{peer} / {name}": arms[peer].total / arms[name].total
            for name in ("ours", "ours, packed")
            for peer in ("P1", "P2", "P3")
        }
        for length, arms in work.items()
    }
    with_rescoring = {
        length: {
            f"P2 / {name}": (arms["P2"].total + arms["P2"].rescored) / (arms[name].total + arms[name].rescored)
            for name in ("ours", "ours, packed")
        }
        for length, arms in work.items()
    }
    return {
        "settings": {"answer": ANSWER, "questions": QUESTIONS, "prefix": PREFIX, "lora_r": RANK},
        "arms": DESCRIPTIONS,
        "tflop_per_row": {
            length: {name: {key: value / TERA for key, value in row._asdict().items()} for name, row in arms.items()}
            for length, arms in work.items()
        },
        "ratios": ratios,
        "ratios_with_head_scored_anew": with_rescoring,
    }


def count(arm: Arm, length: int, *, config: Gemma3Config | None = None, prefix: int = PREFIX) -> Work:
    """Run one step of an arm on a row of `length` tokens, or on `questions` rows that share their first `prefix`.

    The head is that of TRL on a GPU: the answer's positions alone. TRL multiplies it out a second time in the backward
    pass to save memory; that third product is `rescored` and not in the total.
    """
    config = config or gemma3_4b()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers' own words for checkpointing
        model = build(arm, config)
    batch = make_batch(arm, length, config, prefix)
    with _without_checks_of_values(), FlopCounterMode(display=False) as counter:
        hidden = model.get_base_model().model(**batch, use_cache=False).last_hidden_state
        scored = hidden if arm.full_head else hidden[:, -int(ANSWER * length) * arm.questions :]
        with FlopCounterMode(display=False) as head_counter:
            logits = model.get_output_embeddings()(scored)
        logits.sum().backward()
    forward = head_counter.get_total_flops()
    counts = counter.get_flop_counts()
    tower = next((sum(ops.values()) for name, ops in counts.items() if name.endswith("Model.vision_tower")), 0)
    each = (tower, 2 * forward, counter.get_total_flops(), forward)
    return Work(*(value / arm.questions for value in each))


def count_forward(config: Gemma3Config, length: int) -> dict[str, float]:
    """Operations of one row's forward pass in the tower and in the language model, without head or adapters."""
    arm = Arm()
    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    batch = make_batch(arm, length, config, prefix=0)
    with torch.no_grad(), _without_checks_of_values(), FlopCounterMode(display=False) as counter:
        model.model(**batch, use_cache=False)
    counts = counter.get_flop_counts()
    return {
        "tower": sum(counts["Gemma3Model.vision_tower"].values()),
        "language_model": sum(counts["Gemma3Model.language_model"].values()),
    }


def build(arm: Arm, config: Gemma3Config) -> PeftModel:
    """The model of an arm as its trainer would set it up, every tensor a shape without values."""
    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        adapter = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=arm.adapted, task_type="CAUSAL_LM")
        adapted = get_peft_model(model, adapter, autocast_adapter_dtype=False)
    prepare_backbone(adapted)
    if arm.tower != "as it comes":
        rest_tower(adapted)
    adapted.train()
    if arm.checkpointing:
        # Random numbers have no state here that checkpointing could keep.
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        adapted.enable_input_require_grads()  # as TRL does for adapters
    return adapted


def make_batch(arm: Arm, length: int, config: Gemma3Config, prefix: int) -> dict[str, torch.Tensor]:
    """One sequence in the form that our collator gives it."""
    total = prefix + arm.questions * (length - prefix) if arm.questions > 1 else length
    ids = torch.zeros(1, total, dtype=torch.long, device="meta")
    batch = {"input_ids": ids, "attention_mask": ids, "token_type_ids": ids}
    if arm.questions > 1:
        batch |= {"position_ids": ids, "segment_ids": ids}
    vision = config.vision_config
    if arm.tower == "cached":
        shape = (config.mm_tokens_per_image, vision.hidden_size)
        return batch | {"image_features": torch.empty(shape, dtype=torch.bfloat16, device="meta")}
    shape = (1, 3, vision.image_size, vision.image_size)
    return batch | {"pixel_values": torch.empty(shape, dtype=torch.bfloat16, device="meta")}


@contextmanager
def _without_checks_of_values() -> Iterator[None]:
    """transformers compares how many image tokens there are with how many features, which needs values."""
    name = "TRANSFORMERS_DISABLE_TORCH_CHECK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def describe_flops(results: dict) -> str:
    """The figures in a line."""
    parts = []
    for length, arms in results["tflop_per_row"].items():
        ratios = results["ratios"][length]
        ours, packed = arms["ours"]["total"], arms["ours, packed"]["total"]
        parts.append(
            f"{length} tokens: P1 {arms['P1']['total']:.1f}, P2 {arms['P2']['total']:.1f}, "
            f"P3 {arms['P3']['total']:.1f}, ours {ours:.1f}, packed {packed:.1f} TFLOP a row: "
            f"{ratios['P2 / ours']:.1f} and {ratios['P2 / ours, packed']:.1f} times fewer than P2, "
            f"{ratios['P3 / ours']:.1f} and {ratios['P3 / ours, packed']:.1f} than P3"
        )
    return "; ".join(parts)
