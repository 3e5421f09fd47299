"""Number formats: what a GPU, a model and bitsandbytes can do together, checked before anything is loaded."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from transformers import AutoConfig, BitsAndBytesConfig, PretrainedConfig
from trl import ModelConfig, SFTConfig

from data_builders.records import InputError
from dentalgemma.models.parts import PARTS
from dentalgemma.training.sharding import check_architecture, shards_weights

AMPERE = 8  # the first major compute capability with bf16 in hardware
FLASH_HEAD_SIZE = 256  # the largest that FlashAttention 2 takes
# Families whose image tokens see each other in both directions.
BLOCK_ATTENTION = ("gemma3", "gemma4")
T4_OPTIONS = "`--load_in_4bit true --dtype float32 --bf16 false` (recipes/stage1_vqa_t4.yaml has them)"


def gpu_capability(training: SFTConfig) -> tuple[int, int] | None:
    """Compute capability of the GPU that trains, such as (7, 5) for a T4; None on a CPU."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() and not training.use_cpu else None


def check_precision(training: SFTConfig, model_config: ModelConfig, capability: tuple[int, int] | None) -> None:
    """Refuse number formats and attention kernels that this GPU or this model cannot compute with.

    Raises:
        InputError: naming the options that would work.
    """
    _check_float16(training, model_config)
    # torch.cuda.is_bf16_supported() says yes on a T4, which only emulates bf16: the capability decides.
    if capability is not None and capability[0] < AMPERE and _wants_bf16(training, model_config):
        number = ".".join(map(str, capability))
        raise InputError(f"this GPU (compute capability {number}) has no bf16, it only emulates it: give {T4_OPTIONS}")
    _check_bitsandbytes(training, model_config)
    if training.n_gpu > 1:
        raise InputError(
            f"one process sees {training.n_gpu} GPUs and would use DataParallel, which cannot train this model: start "
            "with `accelerate launch --config_file recipes/accelerate/multi_gpu.yaml`, or set CUDA_VISIBLE_DEVICES=0"
        )
    architecture = _known_architecture(model_config)
    if architecture is not None:
        check_architecture(architecture, training)
        check_attention(architecture, model_config.attn_implementation)


def check_attention(architecture: PretrainedConfig, attn_implementation: str | None) -> None:
    """Refuse FlashAttention where it would fail, or silently leave out a part of the attention mask."""
    if "flash" not in (attn_implementation or ""):
        return
    head_size = max(_head_sizes(architecture), default=0)
    if head_size > FLASH_HEAD_SIZE:
        reason = f"this model's heads have size {head_size}, FlashAttention takes {FLASH_HEAD_SIZE} at most"
    elif architecture.model_type in BLOCK_ATTENTION:
        # transformers 5.23 drops the mask function for FlashAttention and goes on with a causal mask.
        reason = "FlashAttention would hide an image's later tokens from its earlier ones"
    else:
        return
    raise InputError(f"attn_implementation: {attn_implementation}: {reason}; use `sdpa`")


def _head_sizes(architecture: PretrainedConfig) -> list[int]:
    # Gemma 4's full-attention layers have larger heads than the others, and an own entry each.
    text = architecture.get_text_config().to_dict()
    layers = [text, *(text.get("per_layer_config") or {}).values()]
    return [layer[key] for layer in layers for key in ("head_dim", "global_head_dim") if layer.get(key)]


def quantization_config(model_config: ModelConfig) -> BitsAndBytesConfig | None:
    """How bitsandbytes quantises the base: the language model's layers alone, never the head, tower or aligner."""
    if not (model_config.load_in_4bit or model_config.load_in_8bit):
        return None
    # Patterns for whole module names: a bare `vision_tower` would match none, and the tower be quantised all the same.
    kept = [rf"(.*\.)?{module}" for part, modules in PARTS.items() if part != "language_model" for module in modules]
    kept.append("lm_head")
    if model_config.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    named = model_config.dtype not in {"auto", None}
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=model_config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=model_config.use_bnb_nested_quant,
        bnb_4bit_quant_storage=model_config.bnb_4bit_quant_storage,
        bnb_4bit_compute_dtype=getattr(torch, model_config.dtype) if named else torch.bfloat16,
        llm_int8_skip_modules=kept,
    )


def _wants_bf16(training: SFTConfig, model_config: ModelConfig) -> bool:
    # `auto` takes the type of the files, and every base here is published in bf16.
    return training.mixed_precision == "bf16" or model_config.dtype in {"bfloat16", "auto", None}


def _check_float16(training: SFTConfig, model_config: ModelConfig) -> None:
    if training.mixed_precision == "fp16" or model_config.dtype == "float16":
        raise InputError(
            "float16: activations of Gemma 3 exceed its range of 65,504 and turn into infinities and NaN; use bf16, or "
            f"on a GPU without it {T4_OPTIONS}"
        )


def _check_bitsandbytes(training: SFTConfig, model_config: ModelConfig) -> None:
    optimizer = training.optim.value
    wanted = "load_in_4bit" if model_config.load_in_4bit else "load_in_8bit" if model_config.load_in_8bit else None
    if wanted is None and ("8bit" in optimizer or "paged" in optimizer):
        wanted = f"optim: {optimizer}"
    if wanted is not None and find_spec("bitsandbytes") is None:
        raise InputError(f'{wanted} needs bitsandbytes: pip install "dentalgemma[bnb]"')
    sharding = shards_weights(training)
    if sharding and (model_config.load_in_4bit or model_config.load_in_8bit):
        # Tried: FSDP2 aborts in its first step. ZeRO-3 was not.
        raise InputError(
            f"{wanted}: a quantised base is not cut up by {sharding}: use recipes/accelerate/multi_gpu.yaml"
        )


def _known_architecture(model_config: ModelConfig) -> PretrainedConfig | None:
    """The model's configuration where it lies on this machine; nothing is downloaded to check an option."""
    if model_config.model_name_or_path is None:
        return None
    try:
        return AutoConfig.from_pretrained(
            model_config.model_name_or_path, revision=model_config.model_revision, local_files_only=True
        )
    except (OSError, ValueError):
        return None
