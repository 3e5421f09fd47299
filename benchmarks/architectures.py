"""Models to measure: the 4B architecture without weights of its own, and a scaled one for two CPU cores."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, ProcessorMixin

from dentalgemma.models.processors import load_processor
from dentalgemma.models.tiny import make_tiny_model

# Gemma 3 4B, MedGemma's architecture.
TEXT = {
    "vocab_size": 262_208,
    "hidden_size": 2560,
    "intermediate_size": 10_240,
    "num_hidden_layers": 34,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 1024,
    "max_position_embeddings": 131_072,
}
VISION = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 896,
    "patch_size": 14,
    "vision_use_head": False,
}
IMAGE_TOKENS = 256
# As much work in the tower, beside the language model, as in the 4B model: 1.38 times its forward pass of a row (600
# tokens there, 128 here).
SCALED_TEXT = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "query_pre_attn_scalar": 48,
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,
}
SCALED_VISION = {
    "hidden_size": 128,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 224,
    "patch_size": 14,
    "vision_use_head": False,
}
SCALED_IMAGE_TOKENS = 64


def gemma3_4b(**options: object) -> Gemma3Config:
    return Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=IMAGE_TOKENS, **options)


def write_gemma3_4b(folder: Path) -> None:
    """Random bf16 weights of the 4B architecture, 8.6 GB, with the small model's tokenizer."""
    make_tiny_model(folder)
    processor = load_processor(folder)
    generation = Gemma3ForConditionalGeneration.from_pretrained(folder).generation_config
    model = make_gemma3_4b(processor)
    model.generation_config = generation
    model.save_pretrained(folder)
    fit_processor(processor, side=VISION["image_size"], tokens=IMAGE_TOKENS)
    processor.save_pretrained(folder)


def make_gemma3_4b(processor: ProcessorMixin) -> Gemma3ForConditionalGeneration:
    """The 4B architecture with random bf16 weights, on the GPU where there is one."""
    config = gemma3_4b(**_image_tokens_of(processor))
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Gemma3ForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    return _finish(model)


def write_scaled(folder: Path, *, seed: int) -> None:
    """A random Gemma 3 with the 4B model's proportion of tower to language model, and its processor."""
    make_tiny_model(folder, seed=seed)
    processor = load_processor(folder)
    generation = Gemma3ForConditionalGeneration.from_pretrained(folder).generation_config
    torch.manual_seed(seed)
    model = _finish(Gemma3ForConditionalGeneration(scaled(processor)))
    model.generation_config = generation
    model.save_pretrained(folder)
    fit_processor(processor, side=SCALED_VISION["image_size"], tokens=SCALED_IMAGE_TOKENS)
    processor.save_pretrained(folder)


def scaled(processor: ProcessorMixin) -> Gemma3Config:
    text = SCALED_TEXT | {"vocab_size": len(processor.tokenizer)}
    return Gemma3Config(
        text_config=text,
        vision_config=SCALED_VISION,
        mm_tokens_per_image=SCALED_IMAGE_TOKENS,
        **_image_tokens_of(processor),
    )


def fit_processor(processor: ProcessorMixin, *, side: int, tokens: int) -> None:
    """Make a small model's processor that of a model with another image size, once it is saved and loaded again."""
    processor.image_processor.size = {"height": side, "width": side}
    processor.image_seq_length = tokens


def _image_tokens_of(processor: ProcessorMixin) -> dict[str, int]:
    tokenizer = processor.tokenizer
    return {
        "boi_token_index": tokenizer.boi_token_id,
        "eoi_token_index": tokenizer.eoi_token_id,
        "image_token_index": tokenizer.image_token_id,
    }


def _finish(model: Gemma3ForConditionalGeneration) -> Gemma3ForConditionalGeneration:
    """Say that it is no real base, and let images have an effect: Gemma 3 begins with a projector of zeros."""
    model.config.rehearsal = True
    width = model.config.vision_config.hidden_size
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=width**-0.5)
    return model
