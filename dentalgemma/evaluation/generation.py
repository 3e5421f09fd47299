"""Ask a model questions, closed and open ones, and write its predictions, resumably."""

from __future__ import annotations

import copy
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import transformers
from rich.console import Console
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin

from data_builders.chat import SYSTEM_PROMPT
from dentalgemma.certificates import CERTIFICATE, MergeError, read_certificate
from dentalgemma.evaluation.likelihood import complete, encode, score_options
from dentalgemma.evaluation.predictions import (
    Arm,
    append_predictions,
    choose_images,
    identify,
    open_image,
    progress_bar,
    utc_now,
)
from dentalgemma.evaluation.questions import Mode, Question, put_question
from dentalgemma.models.loading import fingerprint_weights
from dentalgemma.models.processors import image_fit

# What a generation config says beside how tokens are chosen.
NO_DECODING = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_cache",
    "cache_implementation",
    "num_beams",
    "transformers_version",
)
SOFTWARE = {"torch": torch.__version__, "transformers": transformers.__version__}


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
    max_new_tokens_open: int = 512,
    system_prompt: str = SYSTEM_PROMPT,
    model_name: str | None = None,
    progress: bool = True,
) -> None:
    """Answer `items` and append each answer to `out` (JSONL); what `out` already answers is not asked again.

    `generate` decodes greedily, so that there is no seed to record. Of a closed question it lists the options and asks
    for a letter, which is extracted later, from the file; an open one stands alone. The two are never in one batch.

    `loglikelihood` asks the question alone and scores each option as the assistant's answer followed by the turn end.
    The score of an option is the mean of its tokens' log-probabilities: their sum over the tokens of option and turn
    end, divided by the number of these tokens, so that longer options are not at a disadvantage. Sum and mean are both
    written; the highest mean is the answer, the first one on a tie. An empty option cannot be answered.

    `images` says what is shown: each question's own image, a mid-grey one of the same size (`blank`), one of another
    patient (`other`), or the text alone (`none`). `latency_ms` is the time of the batch, opening images included,
    divided by its items; lines of the first batch say `warm_up`, since it waits for what later ones find ready.

    Raises:
        EvaluationError: when `out` holds answers of another model, mode or setting, or to other questions, or another
            process is writing it; for open questions with `loglikelihood`.
    """
    shown = choose_images(items, mode=mode, images=images)
    limits = {"closed": max_new_tokens, "open": max_new_tokens_open}
    settings = {
        "model": model_name or model.config._name_or_path,
        "weights": fingerprint_weights(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "mode": mode,
        "images": images,
        # Nothing for stretched pictures, as in files written before there was a choice.
        "image_fit": "pan_and_scan" if images != "none" and image_fit(processor) == "pan_and_scan" else None,
        "system_prompt": system_prompt,
    }
    decoding = {kind: _describe(model, limit) if mode == "generate" else None for kind, limit in limits.items()}
    asked = {
        item.item_id: identify(item, shown[item.item_id], mode=mode) | settings | {"generation": decoding[item.kind]}
        for item in items
    }
    circumstances = {
        "batch_size": batch_size,
        "hardware": _hardware(model.device),
        "attention": model.config._attn_implementation,
        "software": SOFTWARE,
        "certificate": _read_certificate(model, settings["weights"]),
    }
    was_training = model.training
    model.eval()
    try:
        with append_predictions(out, asked) as file, progress_bar(progress) as bar, torch.inference_mode():
            left = [item for item in items if item.item_id not in file.done]
            task = bar.add_task(f"Answering, {images} images", total=len(items), completed=len(file.done))
            for number, batch in enumerate(_batches(left, batch_size)):
                began = _clock(model.device)
                pictures = [open_image(shown[item.item_id], images=images) for item in batch]
                conversations = [
                    put_question(item, picture, mode=mode, system_prompt=system_prompt)
                    for item, picture in zip(batch, pictures, strict=True)
                ]
                if mode == "generate":
                    answers = write_answers(model, processor, conversations, max_new_tokens=limits[batch[0].kind])
                else:
                    answers = score_options(model, processor, batch, conversations)
                latency = round((_clock(model.device) - began) * 1000 / len(batch), 3)
                when = {"latency_ms": latency, "warm_up": number == 0, "answered_at": utc_now()}
                pairs = zip(batch, answers, strict=True)
                file.write([asked[item.item_id] | answered | when | circumstances for item, answered in pairs])
                bar.advance(task, len(batch))
    finally:
        model.train(was_training)


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
    config = decode_greedily(model, processor, conversations[0], max_new_tokens=max_new_tokens)
    ends = set(config.eos_token_id)
    written = model.generate(**inputs, generation_config=config, synced_gpus=synced_gpus)
    answers = []
    for tokens in written[:, inputs["input_ids"].shape[1] :].tolist():
        end = next((number for number, token in enumerate(tokens) if token in ends), None)
        output = processor.tokenizer.decode(tokens[:end], skip_special_tokens=True)
        answers.append({"output": output, "finish_reason": "length" if end is None else "stop"})
    return answers


def decode_greedily(
    model: PreTrainedModel, processor: ProcessorMixin, conversation: list[dict], *, max_new_tokens: int
) -> GenerationConfig:
    """Greedy decoding that ends where the model says so, or where its chat template ends a turn (`eos_token_id`)."""
    config = _without_sampling(model, max_new_tokens)
    own = config.eos_token_id or []
    ends = {complete(processor, conversation, "")[-1], *(own if isinstance(own, list) else [own])}
    config.update(eos_token_id=sorted(ends), pad_token_id=processor.tokenizer.pad_token_id, use_cache=True)
    return config


def _without_sampling(model: PreTrainedModel, max_new_tokens: int) -> GenerationConfig:
    config = copy.deepcopy(model.generation_config)
    config.update(do_sample=False, temperature=None, top_k=None, top_p=None, num_beams=1, max_new_tokens=max_new_tokens)
    return config


def _describe(model: PreTrainedModel, max_new_tokens: int) -> dict:
    """The decoding parameters, and what else a model's own config asks for, such as a penalty for repetitions."""
    config = _without_sampling(model, max_new_tokens).to_diff_dict()
    own = {name: value for name, value in config.items() if name not in NO_DECODING and not name.startswith("_")}
    return {"do_sample": False, "max_new_tokens": max_new_tokens} | own


def _batches(items: Sequence[Question], size: int) -> Iterator[Sequence[Question]]:
    """Closed questions first, then open ones: a batch lasts as long as its longest answer."""
    for kind in ("closed", "open"):
        own = [item for item in items if item.kind == kind]
        for start in range(0, len(own), size):
            yield own[start : start + size]


def _clock(device: torch.device) -> float:
    """Seconds, after all that was asked of the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _hardware(device: torch.device) -> str:
    """The name of the GPU, or of the processor with the threads that are used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor_name()}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or f"CPU {platform.machine()}"


def _read_certificate(model: PreTrainedModel, weights: str) -> str | None:
    """`passed` or `failed`, as the merge certificate beside the weights says; None where none is about these weights.

    The weights of a failed merge are answered with all the same, so that what went wrong can be looked into.
    """
    folder = Path(model.config._name_or_path or "/")
    if not (folder / CERTIFICATE).is_file():
        return None
    try:
        certificate = read_certificate(folder)
    except MergeError as error:
        message = f"Warning: {error}; its answers say nothing of the model that was to be merged"
        Console(file=sys.stderr).print(message, soft_wrap=True, markup=False, highlight=False)
        return "failed"
    return "passed" if certificate.get("weights") == weights else None
