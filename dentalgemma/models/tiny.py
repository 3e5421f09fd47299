"""A small random Gemma 3 with tokenizer, processor and chat template, for rehearsals: it loads as the real one does.

Two defaults of the architecture would make a rehearsal lie. Gemma 3 initialises its projector to zeros, so that images
have no effect at all until it trains; and a model of four layers would have sliding-window attention only.
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
    GemmaTokenizer,
    GenerationConfig,
    SiglipVisionConfig,
)
from trl.chat_template_utils import gemma3_chat_template

from data_builders.chat import SYSTEM_PROMPT
from data_builders.phantom_cases import make_cases

IMAGE_SIZE = 112  # pixels a side
PATCH_SIZE = 14
IMAGE_TOKENS = 16  # 8 x 8 patches, pooled two by two
HIDDEN = 128
INIT_STD = 0.15  # with tied embeddings at the usual 0.02 the logits are too flat for a small model to learn anything
SPECIAL_TOKENS = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<mask>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
)


def make_tiny_model(folder: Path, *, family: str = "gemma3", seed: int = 0) -> None:
    """Write a small random model of a family and its processor to `folder`; its tokenizer knows the phrase files."""
    if family != "gemma3":
        raise ValueError(f"no small model of family {family!r} yet, only gemma3")
    make_tiny_gemma3(folder, _known_texts(), seed=seed)


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
    processor = _make_processor(texts, vocab_size)
    tokenizer = processor.tokenizer
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
    config.rehearsal = True  # stays in config.json through training and merging: nobody shall take it for a real base
    torch.manual_seed(seed)
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=HIDDEN**-0.5)
    end_of_turn = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, end_of_turn],
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _make_processor(texts: Iterable[str], vocab_size: int) -> Gemma3Processor:
    vocab, merges = _learn_words(texts, vocab_size)
    tokenizer = GemmaTokenizer(
        vocab=vocab,
        merges=merges,
        extra_special_tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    # The plain Pillow processor: the default one needs torchvision, which the toolkit does not.
    image_processor = Gemma3ImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return Gemma3Processor(
        image_processor, tokenizer, chat_template=gemma3_chat_template, image_seq_length=IMAGE_TOKENS
    )


def _learn_words(texts: Iterable[str], vocab_size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
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
        vocab_size=vocab_size, special_tokens=[*SPECIAL_TOKENS, *fallback], show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    state = json.loads(learner.to_str())["model"]
    return state["vocab"], [tuple(pair) for pair in state["merges"]]
