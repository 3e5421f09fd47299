"""Small random Gemmas with tokenizer, processor and chat template, for rehearsals: they load as the real ones do.

Two defaults of Gemma 3 would make a rehearsal lie. It initialises its projector to zeros, so that images have no effect
at all until it trains; and a model of four layers would have sliding-window attention only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Gemma3TextConfig,
    Gemma4AudioFeatureExtractor,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4ImageProcessorPil,
    Gemma4TextConfig,
    Gemma4VisionConfig,
    GemmaTokenizer,
    GenerationConfig,
    PreTrainedModel,
    SiglipVisionConfig,
)
from trl.chat_template_utils import gemma3_chat_template, gemma4_v5_chat_template

from data_builders.chat import SYSTEM_PROMPT
from data_builders.phantom_cases import make_cases
from data_builders.records import InputError
from dentalgemma.models.processors import Gemma4Processor, VideoSettings

IMAGE_SIZE = 112  # pixels a side
PATCH_SIZE = 14
IMAGE_TOKENS = 16  # 8 x 8 patches, pooled two by two
GEMMA4_PATCH_SIZE = 8  # pooled three by three: 24 pixels a side for each image token
HIDDEN = 128
INIT_STD = 0.15  # with tied embeddings at the usual 0.02 the logits are too flat for a small model to learn anything
COMMON_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
GEMMA3_TOKENS = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
    "sot_token": "<start_of_turn>",
    "eot_token": "<end_of_turn>",
}
GEMMA4_TOKENS = {
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "image_token": "<|image|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
    "audio_token": "<|audio|>",
    "sot_token": "<|turn>",
    "eot_token": "<turn|>",
    "soc_token": "<|channel>",
    "eoc_token": "<channel|>",
    "think_token": "<|think|>",
    "video_token": "<|video|>",
}


def make_tiny_model(folder: Path, *, family: str = "gemma3", seed: int = 0) -> None:
    """Write a small random model of a family and its processor to `folder`; its tokenizer knows the phrase files."""
    if family not in FAMILIES:
        raise InputError(f"no small model of family {family!r}; choose among {', '.join(FAMILIES)}")
    FAMILIES[family](folder, _known_texts(), seed=seed)


def _known_texts() -> list[str]:
    """The words of the toolkit's phrase files and rehearsal cases, which the rehearsal's rows are made of."""
    compose = files("data_builders.compose")
    names = ("phrases/en.yaml", "phrases/es.yaml", "vocabulary.yaml")
    phrases = [line for name in names for line in compose.joinpath(name).read_text(encoding="utf-8").splitlines()]
    cases = [message["content"] for case in make_cases(500, seed=0) for message in case["messages"]]
    return [SYSTEM_PROMPT, "user", "model", *phrases, *cases]


def make_tiny_gemma3(folder: Path, texts: Iterable[str], *, seed: int = 0, vocab_size: int = 3072) -> None:
    """Write a random Gemma 3 of about 1.5 million parameters and its processor to `folder`.

    `texts` is what the tokenizer learns its words from; any other text falls back to bytes.
    """
    tokenizer = _make_tokenizer(texts, vocab_size, GEMMA3_TOKENS)
    config = Gemma3Config(
        text_config=Gemma3TextConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            intermediate_size=3 * HIDDEN,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            query_pre_attn_scalar=32,
            sliding_window=64,
            layer_types=["sliding_attention", "full_attention"] * 2,
            max_position_embeddings=4096,
            initializer_range=INIT_STD,
        ),
        vision_config=SiglipVisionConfig(
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            vision_use_head=False,
        ),
        mm_tokens_per_image=IMAGE_TOKENS,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
        initializer_range=INIT_STD,
    )
    torch.manual_seed(seed)
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=HIDDEN**-0.5)
    # The plain Pillow processor: the default one needs torchvision, which the toolkit does not.
    image_processor = Gemma3ImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor = Gemma3Processor(
        image_processor, tokenizer, chat_template=gemma3_chat_template, image_seq_length=IMAGE_TOKENS
    )
    _save(folder, model, processor)


def make_tiny_gemma4(folder: Path, texts: Iterable[str], *, seed: int = 0, vocab_size: int = 3072) -> None:
    """Write a random Gemma 4 of about 1.5 million parameters and its processor to `folder`.

    It has what sets the large dense one apart: keys that serve as values in the full-attention layers, wider heads
    there, image tokens that see each other, and as many tokens per image as its shape asks for (at most 70).
    """
    tokenizer = _make_tokenizer(texts, vocab_size, GEMMA4_TOKENS)
    config = Gemma4Config(
        text_config=Gemma4TextConfig(
            vocab_size=len(tokenizer),
            vocab_size_per_layer_input=len(tokenizer),
            hidden_size_per_layer_input=0,
            hidden_size=HIDDEN,
            intermediate_size=3 * HIDDEN,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            global_head_dim=64,
            attention_k_eq_v=True,
            num_global_key_value_heads=1,
            sliding_window=64,
            layer_types=["sliding_attention", "full_attention"] * 2,
            use_bidirectional_attention="vision",
            final_logit_softcapping=30.0,
            max_position_embeddings=4096,
            initializer_range=INIT_STD,
        ),
        vision_config=Gemma4VisionConfig(
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            patch_size=GEMMA4_PATCH_SIZE,
            position_embedding_size=256,
        ),
        boi_token_id=tokenizer.boi_token_id,
        eoi_token_id=tokenizer.eoi_token_id,
        image_token_id=tokenizer.image_token_id,
        boa_token_id=tokenizer.boa_token_id,
        eoa_token_index=tokenizer.eoa_token_id,
        audio_token_id=tokenizer.audio_token_id,
        video_token_id=tokenizer.video_token_id,
        initializer_range=INIT_STD,
    )
    torch.manual_seed(seed)
    model = Gemma4ForConditionalGeneration(config)
    image_processor = Gemma4ImageProcessorPil(patch_size=GEMMA4_PATCH_SIZE, max_soft_tokens=70)
    video = VideoSettings(video_processor_type="Gemma4VideoProcessor", patch_size=GEMMA4_PATCH_SIZE, max_soft_tokens=70)
    processor = Gemma4Processor(
        Gemma4AudioFeatureExtractor(), image_processor, tokenizer, video, gemma4_v5_chat_template, image_seq_length=70
    )
    _save(folder, model, processor)


FAMILIES = {"gemma3": make_tiny_gemma3, "gemma4": make_tiny_gemma4}


def _save(folder: Path, model: PreTrainedModel, processor: Gemma3Processor | Gemma4Processor) -> None:
    model.config.rehearsal = True  # stays in config.json through training and merging: nobody takes it for a real base
    tokenizer = processor.tokenizer
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.eot_token_id],
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _make_tokenizer(texts: Iterable[str], vocab_size: int, special_tokens: dict[str, str]) -> GemmaTokenizer:
    vocab, merges = _learn_words(texts, vocab_size, [*COMMON_TOKENS, *special_tokens.values()])
    return GemmaTokenizer(vocab=vocab, merges=merges, extra_special_tokens=special_tokens)


def _learn_words(
    texts: Iterable[str], vocab_size: int, special_tokens: list[str]
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-pair merges that never cross a word, in the form that `GemmaTokenizer` takes."""
    learner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("▁", "merged_with_next"),
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split(Regex(r"[^\w▁]"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[*special_tokens, *fallback], show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    state = json.loads(learner.to_str())["model"]
    return state["vocab"], [tuple(pair) for pair in state["merges"]]
