"""A model whose answer is known: what a page or a terminal makes of it can be compared with what it says."""

from pathlib import Path

import torch

from dentalgemma.models.loading import load_pretrained


def make_talking_model(source: Path, out: Path, pieces: list[str]) -> None:
    """Turn a small Gemma 3 into one that answers every question with `pieces`, a token each, and ends its turn.

    Its layers add nothing, so that what comes next depends on the last token alone; an output layer of its own names
    for each token the one after it. The answer begins after the line feed that the chat template ends with.
    """
    model, processor = load_pretrained(source)
    tokenizer = processor.tokenizer
    tokenizer.add_tokens(pieces)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    line_feed = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    chain = [line_feed, *tokenizer.convert_tokens_to_ids(pieces), tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        inputs = model.get_input_embeddings().weight
        inputs[chain] = torch.nn.functional.one_hot(torch.arange(len(chain)), inputs.shape[1]).to(inputs.dtype)
        outputs = torch.zeros_like(inputs)
        outputs[chain[1:]] = inputs[chain[:-1]]
    model.lm_head.weight = torch.nn.Parameter(outputs)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.save_pretrained(out)
    processor.save_pretrained(out)
