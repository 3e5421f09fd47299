"""Adapters as files: what one changes, in terms of the weights of its base, without loading either."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig

from data_builders.records import InputError
from dentalgemma.certificates import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from dentalgemma.weight_files import WeightFile, open_weights

PREFIX = "base_model.model."
# Each of these changes what an adapter's numbers mean, or trains something that is not in its two factors.
UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "target_parameters",
    "fan_in_fan_out",
    "layer_replication",
    "trainable_token_indices",
    "megatron_config",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "alora_invocation_tokens",
)
# The others (pissa, olora, corda, loftq, …) begin by changing the base.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk. Names are those of the weights in the model in memory."""

    folder: Path
    scaling: float
    file: WeightFile
    factors: dict[str, tuple[str, str]]  # weight → keys of A (rank, in) and B (out, rank)
    replaced: dict[str, str]  # weight → key of the tensor trained in full

    def delta(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """What is added to rows `first` to `last` of a weight, in fp32."""
        a, b = (self.file.read(key).float() for key in self.factors[name])
        return (b[first:last] @ a) * self.scaling


def read_adapter(folder: Path) -> Adapter:
    """Read what an adapter folder says it changes.

    Raises:
        InputError: when it is no plain LoRA adapter, with whole modules or without.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        raise InputError(f"{folder} holds no adapter (no adapter_config.json)")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise InputError(f"{folder} holds no adapter weights ({ADAPTER_WEIGHTS})")
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise InputError(f"{folder} holds a {config.peft_type} adapter; only LoRA adapters can be folded")
    unsupported = [f"{name}: {getattr(config, name)}" for name in UNSUPPORTED if getattr(config, name, None)]
    if config.bias != "none":
        unsupported.append(f"bias: {config.bias}")
    if config.init_lora_weights not in PLAIN_STARTS:
        unsupported.append(f"init_lora_weights: {config.init_lora_weights}")
    if unsupported:
        raise InputError(f"{folder} was trained with {', '.join(unsupported)}, which cannot be folded with a proof")
    file = open_weights(folder / ADAPTER_WEIGHTS)
    factors, replaced = _sort_keys(file, config)
    scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    return Adapter(folder, scaling, file, factors, replaced)


def _sort_keys(file: WeightFile, config: LoraConfig) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    factors: dict[str, tuple[str, str]] = {}
    replaced = {}
    for key, stored in file.tensors.items():
        name = key.removeprefix(PREFIX)
        for mine, other in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
            module = name.removesuffix(f".{mine}.weight")
            if module == name:
                continue
            partner = f"{key.removesuffix(f'.{mine}.weight')}.{other}.weight"
            if partner not in file.tensors:
                raise InputError(f"{file.path}: {key} has no {other} beside it")
            rank = stored.shape[0] if mine == "lora_A" else stored.shape[-1]
            if len(stored.shape) != 2 or rank != config.r:
                raise InputError(f"{file.path}: {key} has the shape {list(stored.shape)}, not that of rank {config.r}")
            factors[f"{module}.weight"] = (key, partner) if mine == "lora_A" else (partner, key)
            break
        else:
            if not _is_saved(name, config):
                raise InputError(f"{file.path}: {key} is neither a LoRA factor nor part of modules_to_save")
            replaced[name] = key
    if not factors and not replaced:
        raise InputError(f"{file.path} holds no weights")
    return factors, replaced


def _is_saved(name: str, config: LoraConfig) -> bool:
    """Whether a tensor lies in a module that trained in full; PEFT finds those by the end of their path."""
    path = name.split(".")[:-1]
    ends = {".".join(path[i:j]) for j in range(1, len(path) + 1) for i in range(j)}
    return any(module in ends for module in config.modules_to_save or ())


def check_numbers(adapter: Adapter) -> bool:
    """Whether an adapter changes anything at all.

    Raises:
        InputError: when a number in it is not finite.
    """
    moving = {}
    for key, stored in adapter.file.tensors.items():
        moving[key] = False
        for first, last in stored.pieces():
            piece = adapter.file.read_rows(stored, first, last)
            if not piece.isfinite().all():
                raise InputError(f"{adapter.folder}: {key} holds numbers that are not finite; the run diverged")
            moving[key] = moving[key] or bool(piece.any())
    return bool(adapter.replaced) or any(moving[a] and moving[b] for a, b in adapter.factors.values())
