"""The parts of a vision-language model: vision tower, aligner, language model. What trains, and how much of it."""

from __future__ import annotations

from collections.abc import Sequence

from peft import LoraConfig, PeftConfig
from torch import nn
from trl import ModelConfig, get_peft_config

from data_builders.records import InputError

# `all-linear` would adapt the vision tower too, and names alone would catch its q, k and v projections.
LANGUAGE_MODEL_LAYERS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
PARTS = {
    "vision_tower": ("vision_tower",),
    "aligner": ("multi_modal_projector", "embed_vision"),
    "language_model": ("language_model", "lm_head"),
}


def adapter_config(model_config: ModelConfig, trains: Sequence[str]) -> PeftConfig:
    """The LoRA configuration that adapts the parts named in `trains`.

    Raises:
        InputError: for a part that cannot be trained yet, or when LoRA is switched off.
    """
    if list(trains) != ["language_model"]:
        raise InputError(f"trains: {list(trains)}: only [language_model] can be trained so far")
    if model_config.lora_target_modules:
        raise InputError("lora_target_modules is set by `trains`; leave it out")
    config = get_peft_config(model_config)
    if not isinstance(config, LoraConfig):
        raise InputError("the recipes train LoRA adapters: set `use_peft: true`")
    config.target_modules = LANGUAGE_MODEL_LAYERS
    return config


def part_of(name: str) -> str:
    """Which part a parameter belongs to, from its name; `other` where it is none of them."""
    for part, modules in PARTS.items():
        if any(module in name.split(".") for module in modules):
            return part
    return "other"


def count_parameters(model: nn.Module) -> dict[str, dict[str, int]]:
    """Parameters and trainable parameters of each part; tied weights count once."""
    counts: dict[str, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        entry = counts.setdefault(part_of(name), {"parameters": 0, "trainable": 0})
        entry["parameters"] += parameter.numel()
        entry["trainable"] += parameter.numel() if parameter.requires_grad else 0
    return counts
