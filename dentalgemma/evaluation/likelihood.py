"""The log-likelihood of answers: how a model ranks the options of a question without having to write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from dentalgemma.evaluation.questions import EvaluationError, Question
from dentalgemma.training.data import find_turns


def encode(processor: ProcessorMixin, conversations: Sequence[list[dict]]) -> BatchFeature:
    """Tokens and pixels of conversations that wait for an answer, padded on the left."""
    return processor.apply_chat_template(
        list(conversations),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )


def complete(processor: ProcessorMixin, conversation: list[dict], answer: str) -> list[int]:
    """Tokens of an answer and its turn end, as the chat template writes them after the conversation."""
    turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    start = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    whole = processor.apply_chat_template([*conversation, turn], tokenize=False)
    # Some templates put an empty thought into the prompt, and none before an answer that is given.
    stem = start.removesuffix(_prefill(processor))
    if not whole.startswith(stem):
        raise EvaluationError("the chat template renders a prompt differently when an answer follows it")
    return processor.tokenizer(whole[len(stem) :].rstrip(), add_special_tokens=False)["input_ids"]


@lru_cache(maxsize=4)
def _prefill(processor: ProcessorMixin) -> str:
    return find_turns(processor).prefill


def score_options(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    batch: Sequence[Question],
    conversations: Sequence[list[dict]],
) -> list[dict]:
    """Score the options of each question of a batch; see `evaluate_questions` for what a score is."""
    rows = [
        (number, letter, complete(processor, conversations[number], text))
        for number, item in enumerate(batch)
        for letter, text in item.options.items()
        if text.strip()
    ]
    owners, completions = [number for number, _, _ in rows], [tokens for _, _, tokens in rows]
    inputs = encode(processor, conversations)
    pictured = [number for number, turns in enumerate(conversations) if turns[-1]["content"][0]["type"] == "image"]
    places = [pictured.index(owner) for owner in owners if owner in pictured]
    image_tokens = (inputs["input_ids"] == processor.tokenizer.image_token_id).sum(dim=1)[pictured].tolist()
    sums = _sum_log_probabilities(model, inputs, owners, completions, places, image_tokens) if rows else []
    scores: list[dict[str, dict]] = [{} for _ in batch]
    for (number, letter, tokens), total in zip(rows, sums, strict=True):
        scores[number][letter] = {"sum": total, "mean": total / len(tokens), "tokens": len(tokens)}
    answers = []
    for item, own in zip(batch, scores, strict=True):
        letter = max(own, key=lambda letter: own[letter]["mean"], default=None)
        output = item.options[letter] if letter else ""
        answers.append({"output": output, "letter": letter, "option_scores": own, "finish_reason": "scored"})
    return answers


def _sum_log_probabilities(
    model: PreTrainedModel,
    inputs: BatchFeature,
    owners: Sequence[int],
    completions: Sequence[Sequence[int]],
    places: Sequence[int],
    image_tokens: Sequence[int],
) -> list[float]:
    """Sum of the log-probabilities of each completion after the prompt of its owner, all in one padded batch.

    `places` names the image of each row that has one, counted among the images of the batch; `image_tokens` says how
    many tokens each of these takes, its crops included.

    Rows are padded on the left, so that the completions end together and logits are needed for the last positions
    only: those of whole prompts over a vocabulary of 262,000 would not fit. Each image is encoded once.
    """
    mask = inputs["attention_mask"].bool()
    texts = {name: values for name, values in inputs.items() if values.shape == mask.shape}
    pictures = {name: values for name, values in inputs.items() if name not in texts}
    longest = max(map(len, completions), default=0)
    width = longest + int(mask.sum(dim=1).max())
    padded = {name: torch.zeros(len(owners), width, dtype=torch.long) for name in texts}
    answered = torch.zeros(len(owners), longest)
    for row, (owner, completion) in enumerate(zip(owners, completions, strict=True)):
        after = {"input_ids": torch.tensor(completion), "attention_mask": torch.ones(len(completion))}
        for name, values in texts.items():
            whole = torch.cat([values[owner][mask[owner]], after.get(name, torch.zeros(len(completion)))])
            padded[name][row, width - len(whole) :] = whole
        answered[row, longest - len(completion) :] = 1
    padded["position_ids"] = (padded["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    logits = model(
        **{name: values.to(model.device) for name, values in padded.items()},
        mm_encoder_outputs={"image": _encode_images(model, pictures, places, image_tokens)} if pictures else None,
        logits_to_keep=longest + 1,
        use_cache=False,
    ).logits[:, :-1]
    targets = padded["input_ids"][:, width - longest :, None].to(logits.device)
    chosen = logits.float().log_softmax(dim=-1).gather(-1, targets)[..., 0]
    return (chosen * answered.to(chosen.device)).sum(dim=1).tolist()


def _encode_images(
    model: PreTrainedModel,
    pictures: Mapping[str, torch.Tensor],
    places: Sequence[int],
    image_tokens: Sequence[int],
):
    """Features of each image, encoded once and repeated for every option of its question."""
    pictures = {
        name: values.to(model.device, model.dtype if values.is_floating_point() else None)
        for name, values in pictures.items()
    }
    encoded = model.get_image_features(**pictures, return_dict=True)
    features = encoded.pooler_output
    if isinstance(features, torch.Tensor):  # Gemma 3: (images and crops, tokens of each, width)
        features = features.split([tokens // features.shape[1] for tokens in image_tokens])
        encoded.pooler_output = torch.cat([features[place] for place in places])
    else:
        encoded.pooler_output = [features[place] for place in places]
    return encoded
