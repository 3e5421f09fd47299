"""Ask a model closed questions and write its predictions, resumably."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel, ProcessorMixin

from data_builders.chat import SYSTEM_PROMPT
from data_builders.images import to_rgb
from dentalgemma.evaluation.likelihood import complete, encode, score_options
from dentalgemma.evaluation.questions import (
    PROTOCOL_VERSIONS,
    EvaluationError,
    Mode,
    Question,
    put_question,
    read_predictions,
    swap_images,
)
from dentalgemma.models.loading import fingerprint_weights
from dentalgemma.models.processors import image_fit

Arm = Literal["true", "blank", "other"]
GREY = (128, 128, 128)


def evaluate_questions(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    items: Sequence[Question],
    *,
    mode: Mode,
    out: Path,
    images: Arm = "true",
    batch_size: int = 8,
    max_new_tokens: int = 64,
    system_prompt: str = SYSTEM_PROMPT,
    model_name: str | None = None,
    progress: bool = True,
) -> None:
    """Answer `items` and append each answer to `out` (JSONL); what `out` already answers is not asked again.

    `generate` lists the options, asks for a letter and decodes greedily; the letter is extracted later, from the file.

    `loglikelihood` asks the question alone and scores each option as the assistant's answer followed by the turn end.
    The score of an option is the mean of its tokens' log-probabilities: their sum over the tokens of option and turn
    end, divided by the number of these tokens, so that longer options are not at a disadvantage. Sum and mean are both
    written; the highest mean is the answer, the first one on a tie. An empty option cannot be answered.

    `images` says what is shown: each question's own image, a mid-grey one of the same size (`blank`), or one of another
    patient (`other`). `latency_ms` is the time of the batch, opening images included, divided by its items.

    Raises:
        EvaluationError: when `out` holds answers of another model, mode or setting, or to other questions.
    """
    if mode not in PROTOCOL_VERSIONS or images not in Arm.__args__:
        raise EvaluationError(f"no mode {mode!r} with images {images!r}; choose {PROTOCOL_VERSIONS} and {Arm.__args__}")
    settings = {
        "model": model_name or model.config._name_or_path,
        "weights": fingerprint_weights(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "mode": mode,
        "images": images,
        # Nothing for stretched pictures, as in files written before there was a choice.
        "image_fit": "pan_and_scan" if image_fit(processor) == "pan_and_scan" else None,
        "protocol": PROTOCOL_VERSIONS[mode],
        "system_prompt": system_prompt,
        "generation": {"do_sample": False, "max_new_tokens": max_new_tokens} if mode == "generate" else None,
    }
    swapped = swap_images(items) if images == "other" else {}
    shown = {item.item_id: swapped.get(item.image_id, item) for item in items}
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    done = _read_done(out, items, shown, settings)
    left = [item for item in items if item.item_id not in done]
    circumstances = settings | {"batch_size": batch_size, "hardware": _hardware(model)}
    answer = partial(_generate, max_new_tokens=max_new_tokens) if mode == "generate" else score_options
    was_training = model.training
    model.eval()
    with out.open("a", encoding="utf-8") as file, _progress(progress) as bar, torch.inference_mode():
        task = bar.add_task(f"Answering, {images} images", total=len(items), completed=len(done))
        for start in range(0, len(left), batch_size):
            batch = left[start : start + batch_size]
            began = time.perf_counter()
            conversations = [
                put_question(item, _open(shown[item.item_id], images), mode=mode, system_prompt=system_prompt)
                for item in batch
            ]
            answers = answer(model, processor, batch, conversations)
            latency = round((time.perf_counter() - began) * 1000 / len(batch), 3)
            for item, answered in zip(batch, answers, strict=True):
                line = _identify(item, shown) | answered | {"latency_ms": latency} | circumstances
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            bar.advance(task, len(batch))
    model.train(was_training)


def _generate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    batch: Sequence[Question],
    conversations: Sequence[list[dict]],
    *,
    max_new_tokens: int,
) -> list[dict]:
    return write_answers(model, processor, conversations, max_new_tokens=max_new_tokens)


def write_answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    conversations: Sequence[list[dict]],
    *,
    max_new_tokens: int,
    synced_gpus: bool | None = None,
) -> list[dict]:
    """Let the model answer a batch of conversations greedily: `output`, and `finish_reason` `stop` or `length`.

    `synced_gpus` keeps processes in step that hold one model between them; `None` lets transformers find out.
    """
    inputs = encode(processor, conversations).to(model.device, model.dtype)
    config = copy.deepcopy(model.generation_config)
    eos = config.eos_token_id or []
    turn_end = complete(processor, conversations[0], "")[-1]
    ends = {turn_end, *(eos if isinstance(eos, list) else [eos])}
    config.update(do_sample=False, temperature=None, top_k=None, top_p=None, max_new_tokens=max_new_tokens)
    config.update(eos_token_id=sorted(ends), pad_token_id=processor.tokenizer.pad_token_id, use_cache=True)
    written = model.generate(**inputs, generation_config=config, synced_gpus=synced_gpus)
    answers = []
    for tokens in written[:, inputs["input_ids"].shape[1] :].tolist():
        end = next((number for number, token in enumerate(tokens) if token in ends), None)
        output = processor.tokenizer.decode(tokens[:end], skip_special_tokens=True)
        answers.append({"output": output, "finish_reason": "length" if end is None else "stop"})
    return answers


def _read_done(
    out: Path, items: Sequence[Question], shown: Mapping[str, Question], settings: Mapping[str, object]
) -> set[str]:
    """The items that `out` answers already; a line that a killed run left unfinished is cut off."""
    if not out.exists():
        return set()
    content = out.read_bytes()
    complete_lines = content[: content.rfind(b"\n") + 1]
    if len(complete_lines) < len(content):
        out.write_bytes(complete_lines)
    done = read_predictions(out)
    asked = {item.item_id: _identify(item, shown) for item in items}
    for item_id, line in done.items():
        expected = asked.get(item_id, {"item_id": None}) | settings
        changed = {name: line.get(name) for name, value in expected.items() if line.get(name) != value}
        if changed:
            wanted = {name: expected[name] for name in changed}
            raise EvaluationError(
                f"{out} holds answers that do not belong to this run: {changed} there, {wanted} here; "
                "choose another file, or delete it to ask again"
            )
    return set(done)


def _identify(item: Question, shown: Mapping[str, Question]) -> dict:
    image_shown = shown[item.item_id].image_id
    return {"item_id": item.item_id, "image_id": item.image_id, "item_hash": item.item_hash, "image_shown": image_shown}


def _open(item: Question, images: Arm) -> Image.Image | None:
    if item.image is None:
        if images == "blank":
            raise EvaluationError(f"item {item.item_id} has no image that a blank one could replace")
        return None
    try:
        with Image.open(item.image) as opened:
            picture = to_rgb(opened)
    except OSError as error:
        raise EvaluationError(f"{item.image}: the image of item {item.item_id} cannot be opened: {error}") from None
    return Image.new("RGB", picture.size, GREY) if images == "blank" else picture


def _hardware(model: PreTrainedModel) -> str:
    return torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device)


def _progress(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not shown)
