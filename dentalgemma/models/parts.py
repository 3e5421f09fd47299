"""The parts of a vision-language model: vision tower, aligner, language model. What trains, and how much of it.

Names of the parts: Gemma 3 and MedGemma `vision_tower`, `multi_modal_projector`, `language_model`; Gemma 4
`vision_tower`, `embed_vision`, `language_model`; Qwen3-VL `visual` with its `merger`, `language_model`; Llama 3.2
Vision `vision_model`, `multi_modal_projector`, `language_model`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from peft import LoraConfig
from rich.table import Table
from torch import nn
from trl import ModelConfig, get_peft_config

from data_builders.records import InputError

# The aligner first: Qwen3-VL's lies inside its tower.
PARTS = {
    "aligner": ("multi_modal_projector", "embed_vision", "merger", "deepstack_merger_list"),
    "vision_tower": ("vision_tower", "visual", "vision_model"),
    "language_model": ("language_model", "lm_head"),
}
# `all-linear` would adapt the vision tower too, and names alone would catch its q, k and v projections.
LANGUAGE_MODEL_LAYERS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
NO_LAYERS = "dummy-target-modules"  # PEFT's own word for an adapter of whole modules only


def adapter_config(model: nn.Module, model_config: ModelConfig, trains: Sequence[str]) -> LoraConfig:
    """The adapter that trains the parts named in `trains`.

    The layers of language model and vision tower get LoRA. The aligner, small and in Gemma 3 a bare matrix, trains in
    full (`modules_to_save`).

    Raises:
        InputError: for an unknown part, a part that the model lacks, or settings that contradict `trains`.
    """
    _check_settings(model_config, trains)
    config = get_peft_config(model_config)
    if not isinstance(config, LoraConfig):
        raise InputError("the recipes train LoRA adapters: set `use_peft: true`")
    patterns = []
    if "language_model" in trains:
        patterns.append(LANGUAGE_MODEL_LAYERS)
    if "vision_tower" in trains:
        patterns.append(_tower_layers(model))
    config.target_modules = "|".join(patterns) or NO_LAYERS
    if "aligner" in trains:
        config.modules_to_save = _aligner_modules(model)
    return config


def _check_settings(model_config: ModelConfig, trains: Sequence[str]) -> None:
    unknown = [part for part in trains if part not in PARTS]
    if unknown or not trains:
        raise InputError(f"trains: {list(trains)}: choose one or more of {', '.join(sorted(PARTS))}")
    for name in ("lora_target_modules", "lora_target_parameters"):
        if getattr(model_config, name):
            raise InputError(f"{name}: {getattr(model_config, name)} is set by `trains`; leave it out")
    if model_config.lora_modules_to_save:
        # lm_head and embeddings would add 1.3 billion trained parameters to the 4B model, and untie its weights.
        raise InputError(
            f"lora_modules_to_save: {model_config.lora_modules_to_save} is set by `trains`; leave it out "
            "(lm_head and embeddings are never trained)"
        )
    if model_config.use_dora:
        raise InputError("use_dora: DoRA adapters cannot be folded with a proof; leave it out")


def _tower_layers(model: nn.Module) -> str:
    """A pattern of the linear layers in the vision tower's blocks: their names, and nesting, differ by family."""
    names = {
        re.sub(r"\.\d+\.", ".N.", name)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and part_of(name) == "vision_tower" and re.search(r"\.\d+\.", name)
    }
    if not names:
        raise InputError("trains: vision_tower: this model has none whose layers can be adapted")
    return "|".join(re.escape(name).replace(r"\.N\.", r"\.\d+\.") for name in sorted(names))


def _aligner_modules(model: nn.Module) -> list[str]:
    """The outermost modules between vision tower and language model."""
    found = set()
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if name in PARTS["aligner"]:
            # PEFT wraps modules, not lists of them (Qwen3-VL has an aligner for several depths of its tower).
            found |= {f"{name}.{i}" for i in range(len(module))} if isinstance(module, nn.ModuleList) else {name}
    if not found:
        raise InputError("trains: aligner: this model has none")
    return sorted(found)


def part_of(name: str) -> str:
    """Which part a module or parameter belongs to, from its name; `other` where it is none of them."""
    pieces = name.split(".")
    return next((part for part, modules in PARTS.items() if any(module in pieces for module in modules)), "other")


def count_parameters(model: nn.Module) -> dict[str, dict[str, int]]:
    """Parameters and trainable parameters of each part; tied weights count once, 4-bit ones as two a byte."""
    counts: dict[str, dict[str, int]] = {}
    for name, parameter in _own_parameters(model):
        entry = counts.setdefault(part_of(name), {"parameters": 0, "trainable": 0})
        number = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 holds a share of it here
        if type(parameter).__name__ == "Params4bit":
            number *= 2  # two to a byte
        entry["parameters"] += number
        entry["trainable"] += number if parameter.requires_grad else 0
    return counts


def _own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters without the untrained originals that PEFT keeps beside modules that train in full."""
    return ((name, parameter) for name, parameter in model.named_parameters() if ".original_module." not in name)


def check_trainable(model: nn.Module, trains: Sequence[str]) -> dict[str, dict[str, int]]:
    """Count the parameters of each part, after making sure that just the parts in `trains` can learn.

    Raises:
        InputError: when another part is trainable, or a part that should learn has nothing to learn with.
    """
    counts = count_parameters(model)
    for part, entry in counts.items():
        if entry["trainable"] and part not in trains:
            raise InputError(f"{entry['trainable']:,} parameters of {part} would train, but `trains` is {list(trains)}")
    for part in trains:
        if not counts.get(part, {}).get("trainable"):
            raise InputError(f"trains: {part}: nothing of it would train in this model")
    return counts


def parts_table(counts: dict[str, dict[str, int]]) -> Table:
    """The counts as a table for the terminal."""
    table = Table("part", *(("parameters", "trainable", "share")), title="What trains")
    for column in table.columns[1:]:
        column.justify = "right"
    total = {key: sum(entry[key] for entry in counts.values()) for key in ("parameters", "trainable")}
    for part, entry in [*sorted(counts.items()), ("all", total)]:
        share = entry["trainable"] / max(entry["parameters"], 1)
        table.add_row(part, f"{entry['parameters']:,}", f"{entry['trainable']:,}", f"{share:.2%}")
    return table
