"""Pictures as the vision tower sees them, computed once: for every epoch, question, stage and run that shares a tower.

A feature is what the tower makes of a picture, pooled, before the projector: right also where the aligner trains. In
fp32 it is exact, in a bf16 run it is so up to its rounding to bf16. A picture is named by the SHA-256 of its file,
never by what a dataset calls it. What its features depend on besides, image processor, tower, precision, number format
and the software that made them, is their key; nothing is read under another one.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from huggingface_hub import constants
from PIL import Image as PillowImage
from torch import nn
from transformers import ProcessorMixin
from transformers.integrations import is_fsdp_enabled

from dentalgemma.training.backbone import backbone_of, supports_features
from dentalgemma.training.checkpoints import say, unchanged_randomness
from dentalgemma.training.feature_cache import (
    KEY_FILE,
    CacheError,
    FeatureCache,
    describe_differences,
    differences,
    read_key,
)
from dentalgemma.training.picture_names import count_threads

FORMAT = 1


def feature_root(folder: str | None) -> Path:
    """Where caches lie: the folder given, `$DENTALGEMMA_CACHE`, or beside the models and datasets of the Hub.

    Raises:
        CacheError: when the folder is one of the caches.
    """
    default = os.environ.get("DENTALGEMMA_CACHE") or Path(constants.HF_HOME) / "dentalgemma"
    root = Path(folder) if folder else Path(default) / "features"
    if (root / KEY_FILE).exists():
        raise CacheError(f"--feature_cache {root} is itself a cache: give the folder that it lies in, {root.parent}")
    return root


# What features depend on


def feature_key(model: nn.Module, processor: ProcessorMixin, *, mixed_precision: str) -> dict[str, Any]:
    """What the features depend on besides the pictures, as flat JSON; ranks and runs that agree on it share a cache.

    `mixed_precision` is what the run trains with: `no`, `bf16`, `fp16`. Features are stored in bf16 where the run
    computes in it, else in fp32.
    """
    backbone = backbone_of(model)
    tower = backbone.vision_tower
    weights = next(parameter.dtype for parameter in tower.parameters() if parameter.is_floating_point())
    stored = torch.bfloat16 if weights == torch.bfloat16 or mixed_precision == "bf16" else torch.float32
    config = tower.config.to_dict()
    for name in CONFIG_NOISE:
        config.pop(name, None)
    key = {
        "format": FORMAT,
        "family": backbone.config.model_type,
        "pooling": _pooling(backbone),
        "width": tower.config.hidden_size,
        "stored": _dtype_name(stored),
        "precision": {"weights": _dtype_name(weights), "autocast": mixed_precision},
        "attention": tower.config._attn_implementation,
        "image_processor": image_settings(processor),
        "tower": config | {"weights": _hash_weights(tower)},
        # As a setting: transformers turns it on through an interface beside which torch refuses to read `allow_tf32`.
        "tf32": torch.backends.cuda.matmul.fp32_precision == "tf32",
        "transformers": _version("transformers"),
        "resized_by": _resizing_library(processor),
    }
    return json.loads(json.dumps(dict(_flatten(key)), default=str))


# What a tower's configuration holds besides the tower.
CONFIG_NOISE = (
    *("transformers_version", "_name_or_path", "architectures", "dtype", "id2label", "label2id", "problem_type"),
    *("return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward", "initializer_range"),
    "is_encoder_decoder",
)
CALL_NOISE = ("return_tensors", "device", "disable_grouping", "data_format", "input_data_format")


def _version(library: str) -> str:
    """Major and minor: what comes after them mends, and leaves numbers as they are."""
    return ".".join(importlib.metadata.version(library).split(".")[:2])


def _resizing_library(processor: ProcessorMixin) -> str:
    library = {"pil": "Pillow"}.get(processor.image_processor.backend, processor.image_processor.backend)
    return f"{library} {_version(library)}"


def image_settings(processor: ProcessorMixin) -> dict[str, Any]:
    """What the image processor is told to do, by its own settings and by the processor around it, which win."""
    image_processor = processor.image_processor
    settings = image_processor.to_dict() | call_options(processor)
    # Its dictionary hides which of two implementations it is; their pixels differ in the last bits.
    settings["image_processor_type"] = type(image_processor).__name__
    if not settings.get("do_pan_and_scan"):
        settings = {name: value for name, value in settings.items() if not name.startswith("pan_and_scan")}
    return {name: value for name, value in settings.items() if value is not None and name not in CALL_NOISE}


def call_options(processor: ProcessorMixin) -> dict[str, Any]:
    """The options that a processor hands to its image processor when it is called (transformers 5.23)."""
    tokenizer = getattr(processor, "tokenizer", None)
    return processor._merge_kwargs(tokenizer_init_kwargs=getattr(tokenizer, "init_kwargs", {}))["images_kwargs"]


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, entry in sorted(value.items()):
        if isinstance(entry, Mapping):
            yield from _flatten(entry, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", entry


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _hash_weights(tower: nn.Module) -> str:
    """SHA-256 over names, shapes and all values of the tower's weights and buffers."""

    def hash_one(item: tuple[str, torch.Tensor]) -> str:
        name, tensor = item
        values = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
        return f"{name} {tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(values).hexdigest()}\n"

    with ThreadPoolExecutor(count_threads()) as pool:
        lines = list(pool.map(hash_one, sorted(tower.state_dict().items())))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def find_cache(root: Path, key: Mapping[str, Any]) -> FeatureCache:
    """The cache of a key below `root`, made when there is none; an empty one says why others there are not used."""
    content = json.dumps(json.loads(json.dumps(key)), sort_keys=True)
    cache = FeatureCache(Path(root) / hashlib.sha256(content.encode()).hexdigest()[:16], key)
    if not len(cache) and os.environ.get("RANK", "0") == "0":
        for line in _explain_others(Path(root), cache):
            say(line)
    return cache


def _explain_others(root: Path, cache: FeatureCache) -> list[str]:
    """Why the other caches of a family below a folder are of no use: at most three, the most alike first."""
    others = []
    for path in sorted(root.glob(f"*/{KEY_FILE}")):
        try:
            key = read_key(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        count = len(differences(key, cache.key))
        if count and key.get("family") == cache.key.get("family") and any(path.parent.glob("*.safetensors")):
            why = describe_differences(key, cache.key)
            others.append((count, f"feature cache {path.parent} is not used: {why}"))
    return [line for _, line in sorted(others)[:3]]


def _pooling(backbone: nn.Module) -> str:
    if backbone.config.model_type != "gemma3":
        return "the tower's own"
    projector = plain(backbone.multi_modal_projector)
    return f"average of {projector.kernel_size} x {projector.kernel_size} of {projector.patches_per_image} a side"


def plain(module: nn.Module) -> nn.Module:
    """A module without the wrapper that PEFT puts around what trains in full."""
    return getattr(module, "original_module", module)


def make_pixels(
    picture: PillowImage.Image, processor: ProcessorMixin, options: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """The tower's inputs for one picture, without the text that the processor would tokenise along with it."""
    made = processor.image_processor([picture], **options)
    return {
        name: torch.stack([torch.as_tensor(entry) for entry in made[name]])
        for name in ("pixel_values", "image_position_ids")
        if name in made
    }


# When a run must stay live


def why_not(model: nn.Module, processor: ProcessorMixin, *, datasets: Iterable[Dataset]) -> str | None:
    """Why features cannot be computed beforehand, or None where they can."""
    if not supports_features(model):
        return f"models of family {model.config.model_type} do not take features in place of pixels"
    reason = _why_not_tower(backbone_of(model).vision_tower)
    if reason:
        return reason
    for rows in datasets:
        if rows.format["type"] == "custom":
            return "a transform changes the rows when they are read (`set_transform`), perhaps at random"
    if _is_random(processor):
        return "the image processor gives other pixels for the same picture each time"
    return None


def _why_not_tower(tower: nn.Module) -> str | None:
    parameters = list(tower.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    if trained:
        return f"the vision tower trains ({trained:,} of its parameters), so that its features change with every step"
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        return "ZeRO-3 cuts up the tower's weights among the processes"
    if any(parameter.is_meta for parameter in parameters) or is_fsdp_enabled():
        return "not every process has the tower's weights (`fsdp_cpu_ram_efficient_loading: true`)"
    if any(hasattr(parameter, "device_mesh") for parameter in parameters):
        return "FSDP has cut up the tower's weights among the processes"
    return None


def _is_random(processor: ProcessorMixin) -> bool:
    """Whether a picture of noise comes out differently, or a random state has moved meanwhile."""
    pixels = np.random.default_rng(0).integers(0, 256, (256, 512, 3), dtype=np.uint8)
    picture, options = PillowImage.fromarray(pixels), call_options(processor)
    with unchanged_randomness():
        before = _random_states()
        first, *others = (make_pixels(picture, processor, options) for _ in range(4))
        if _random_states() != before:
            return True
    return any(not torch.equal(first[name], other[name]) for other in others for name in first)


def _random_states() -> tuple[bytes, ...]:
    numpy, position = np.random.get_state()[1:3]
    states = repr(random.getstate()).encode(), numpy.tobytes(), torch.get_rng_state().numpy().tobytes()
    return *states, str(position).encode()
