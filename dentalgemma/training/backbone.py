"""Between a batch and the model's backbone: stored image features, packed questions, and a frozen tower at rest.

Batches stay flat tensors, which trainers, samplers of several processes and pinned memory understand. One hook before
the backbone (`Gemma3Model`, `Gemma4Model`) makes of them what its `forward` takes; calls without our keys, generation
among them, pass through untouched.
"""

from __future__ import annotations

import inspect

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.gemma3.modeling_gemma3 import get_block_sequence_ids_for_mask

from data_builders.records import InputError
from dentalgemma.models.parts import PARTS

FAMILIES = ("gemma3", "gemma4")
TAKE_MASKS = ("sdpa", "eager")
LAYER_TYPES = {"full_attention", "sliding_attention"}


def backbone_of(model: nn.Module) -> nn.Module | None:
    """The module that joins vision tower and language model, under PEFT or not; None in a model without a tower."""
    return next(
        (module for module in model.modules() if {"vision_tower", "language_model"} <= set(module._modules)), None
    )


def tower_of(model: nn.Module) -> nn.Module | None:
    """The vision tower, whatever the family calls it."""
    names = PARTS["vision_tower"]
    return next((module for name, module in model.named_modules() if name.rpartition(".")[2] in names), None)


def supports_features(model: nn.Module) -> bool:
    """Whether the hook knows this family, and its backbone takes what a tower would have put out."""
    backbone = backbone_of(model)
    return (
        backbone is not None
        and getattr(backbone, "vision_tower", None) is not None
        and backbone.config.model_type in FAMILIES
        and "mm_encoder_outputs" in inspect.signature(type(backbone).forward).parameters
    )


def check_packing(config: PretrainedConfig | str | None) -> None:
    """Refuse what cannot take the masks of packed questions: a model's config, or an attention implementation alone.

    Raises:
        InputError: naming what would work.
    """
    attention = config if isinstance(config, str) else getattr(config, "_attn_implementation", None)
    if attention is not None and attention not in TAKE_MASKS:
        raise InputError(
            f"attn_implementation: {attention} cannot take the masks that keep packed questions apart: use "
            "`attn_implementation: sdpa`, or `pack_questions: 1`"
        )
    if not isinstance(config, PretrainedConfig):
        return
    text = config.get_text_config()
    if config.model_type not in FAMILIES or not set(text.layer_types) <= LAYER_TYPES or _sees_ahead(text):
        raise InputError(f"pack_questions: no masks are known for {config.model_type} models: use `pack_questions: 1`")


def _sees_ahead(text: PretrainedConfig) -> bool:
    """Whether text tokens attend to later ones: embedding models do, which answer no questions."""
    return text.use_bidirectional_attention not in (None, False, "vision")


def prepare_backbone(model: nn.Module) -> None:
    """Let the backbone take `image_features` in place of pixels, and `segment_ids` with `position_ids` as masks.

    `image_features`: (image tokens of the batch, width of the tower), the tower's pooled output before the projector,
    picture after picture as in the batch. `segment_ids`: (sequences, length), 0 shared by the questions of a sequence,
    k its k-th question, -1 padding.

    Raises:
        InputError: for a family whose backbone does not take them; it would ignore the keys without a word.
    """
    if not supports_features(model):
        raise InputError("vision_features: this model's backbone takes no stored features: use `vision_features: live`")
    backbone = backbone_of(model)
    if _convert not in backbone._forward_pre_hooks.values():
        backbone.register_forward_pre_hook(_convert, with_kwargs=True)


def _convert(backbone: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if kwargs.get("image_features") is not None:
        kwargs["mm_encoder_outputs"] = {"image": _project(backbone, kwargs["image_features"])}
    if kwargs.get("segment_ids") is not None:
        kwargs["attention_mask"] = make_masks(
            backbone, kwargs["input_ids"], kwargs["segment_ids"], kwargs["position_ids"]
        )
    return args, {key: value for key, value in kwargs.items() if key not in ("image_features", "segment_ids")}


def _project(backbone: nn.Module, features: torch.Tensor) -> BaseModelOutputWithPooling:
    """Stored features through the live projector; in fp32 as the live path has them, in order, dtype and even strides.

    (pictures × image tokens, width of the tower) in Gemma 3, (image tokens of all pictures, width) in Gemma 4. A run in
    bf16 has stored them rounded to it, while layer norms under autocast hand fp32 to the live projector.
    """
    if backbone.config.model_type == "gemma4":
        projector = backbone.embed_vision
        pooled = _like(backbone, projector.embedding_projection.weight, features)
        return BaseModelOutputWithPooling(pooler_output=(projector(inputs_embeds=pooled),))
    projector = backbone.multi_modal_projector
    pooled = _like(backbone, projector.mm_input_projection_weight, features)
    pooled = pooled.unflatten(0, (-1, backbone.config.mm_tokens_per_image))
    # The live path pools images that lie channel by channel; other strides, and gradients differ in the last bits.
    pooled = pooled.transpose(1, 2).contiguous().transpose(1, 2)
    image = projector.mm_soft_emb_norm(pooled) @ projector.mm_input_projection_weight
    return BaseModelOutputWithPooling(pooler_output=image)


def _like(backbone: nn.Module, weight: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Features where and as what the projector computes; weights in 4 or 8 bits say neither."""
    dtype = weight.dtype if weight.is_floating_point() else backbone.get_input_embeddings().weight.dtype
    return features.to(weight.device, dtype)


def make_masks(
    backbone: nn.Module, input_ids: torch.Tensor, segment_ids: torch.Tensor, position_ids: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Attention masks by layer type in which each question sees the prefix and itself, as if it stood alone.

    All arguments are (sequences, length), the masks (sequences, 1, length, length). Image tokens of one picture see
    each other both ways, in Gemma 3 in all layers, in Gemma 4 in sliding layers and only in models trained so. Windows
    are counted in positions, not places. transformers could make the same masks of functions of four indices; that took
    a fifth of a step of a small model.
    """
    config = backbone.config
    text = config.get_text_config()
    check_packing(config)
    key, query = segment_ids[:, None, :], segment_ids[:, :, None]
    belongs = ((key == query) | (key == 0)) & (key >= 0)
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    causal = places[:, None] >= places
    pictures = get_block_sequence_ids_for_mask((input_ids == config.image_token_id).long())
    both_ways = causal | ((pictures[:, :, None] == pictures[:, None, :]) & (pictures >= 0)[:, None, :])
    positions = position_ids.int()  # their differences are as large as the masks, times the bytes of a number
    near = positions[:, :, None] - positions[:, None, :] < text.sliding_window
    gemma4 = config.model_type == "gemma4"
    sees = {
        "full_attention": (causal if gemma4 else both_ways) & belongs,
        "sliding_attention": (
            (causal if gemma4 and text.use_bidirectional_attention != "vision" else both_ways) & belongs & near
        ),
    }
    if text._attn_implementation == "eager":  # which adds its mask
        dtype = backbone.get_input_embeddings().weight.dtype
        sees = {
            kind: torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
            for kind, mask in sees.items()
        }
    return {kind: mask[:, None] for kind, mask in sees.items()}


def rest_tower(model: nn.Module) -> None:
    """Run a frozen vision tower without recording gradients and outside checkpointing, whatever is switched on later.

    `enable_input_require_grads` makes the tower's patch embeddings want gradients, too: stock trainers recompute a
    frozen tower and back-propagate through it in every step (trl 1.16, transformers 5.23), three times its own cost. A
    tower with anything to train is left alone.
    """
    tower = tower_of(model)
    if tower is not None and _begin_rest not in tower._forward_pre_hooks.values():
        tower._recording = []
        tower.register_forward_pre_hook(_begin_rest)
        tower.register_forward_hook(_end_rest, always_call=True)  # also when the forward fails


def _begin_rest(tower: nn.Module, args: tuple) -> None:
    tower._recording.append(torch.is_grad_enabled())
    if any(parameter.requires_grad for parameter in tower.parameters()):
        return
    for layer in tower.modules():
        if getattr(layer, "gradient_checkpointing", False):
            layer.gradient_checkpointing = False
    torch.set_grad_enabled(False)


def _end_rest(tower: nn.Module, args: tuple, output: object) -> None:
    torch.set_grad_enabled(tower._recording.pop())
