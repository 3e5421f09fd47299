"""What ZeRO-3 and FSDP cannot train, refused before anything trains; and how FSDP2 is to cut a model up."""

from __future__ import annotations

import os
from collections.abc import Sequence

from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from transformers import PretrainedConfig
from trl import SFTConfig

from data_builders.records import InputError
from dentalgemma.models.loading import ADAPTER_UNDER_ZERO3, Start
from dentalgemma.training.data import count_without_images

INSTEAD = "use recipes/accelerate/zero2.yaml or multi_gpu.yaml"


def shards_weights(training: SFTConfig) -> str | None:
    """`ZeRO-3` or `FSDP` where the weights are cut up among the processes, None where each holds all of them."""
    if training.deepspeed_plugin is not None:
        return "ZeRO-3" if training.deepspeed_plugin.zero_stage == 3 else None
    fsdp = bool(training.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in {"1", "true"}
    return "FSDP" if fsdp else None


def check_architecture(architecture: PretrainedConfig, training: SFTConfig) -> None:
    """Refuse a family that loads wrongly.

    Raises:
        InputError: for Gemma 4 under ZeRO-3, whose buffers load wrong, so that the loss begins at 30 (ms-swift#9078).
    """
    if shards_weights(training) == "ZeRO-3" and architecture.model_type.startswith("gemma4"):
        raise InputError(f"ZeRO-3 loads Gemma 4's buffers wrong (the loss would begin near 30): {INSTEAD}")


def check_start(start: Start, training: SFTConfig) -> None:
    """Refuse to start from an adapter where no process has whole weights.

    Raises:
        InputError: naming what would work.
    """
    if start.adapters and shards_weights(training) == "ZeRO-3":
        raise InputError(ADAPTER_UNDER_ZERO3)


def check_rows(rows: Dataset, training: SFTConfig, *, split: str, trains: Sequence[str]) -> None:
    """Refuse rows with and without images in one split where all processes must compute the same modules.

    A process whose batch has no image skips tower and aligner. Under ZeRO-3 the others then wait for its part of their
    weights for ever (ms-swift#9258); under FSDP2, cut up by `wrap_decoder_layers`, gradients of unequal size meet.

    Raises:
        InputError: naming the counts.
    """
    sharding = shards_weights(training)
    gathers = sharding == "ZeRO-3" or (sharding == "FSDP" and set(trains) != {"language_model"})
    if not gathers or "images" not in rows.column_names:
        return
    without = count_without_images(rows)
    if 0 < without < len(rows):
        raise InputError(
            f"{without} of {len(rows)} rows of split {split!r} have no image: under {sharding} a process without "
            f"images would hang the others, or bring them down; {INSTEAD}"
        )


def wrap_decoder_layers(accelerator: Accelerator, model: nn.Module) -> None:
    """Tell FSDP2 to cut up the language model layer by layer, and leave tower and aligner to the root.

    transformers' own list of layers names classes that these models do not have, on which accelerate 1.15 stops; and a
    tower that is cut up hangs as soon as one process has no image.

    Raises:
        InputError: when the launcher names other classes.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    layers = next(module for name, module in model.named_modules() if name.endswith("language_model.layers"))
    classes = sorted({type(layer).__name__ for layer in layers})
    if plugin.transformer_cls_names_to_wrap not in (None, classes):
        named = ",".join(plugin.transformer_cls_names_to_wrap)
        raise InputError(f"fsdp_transformer_layer_cls_to_wrap: {named}: leave it out, {','.join(classes)} is found")
    plugin.transformer_cls_names_to_wrap = classes
