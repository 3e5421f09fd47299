"""Rows per second and peak memory of training on the true architecture: random bf16 weights, pictures drawn here.

Each way trains by its own trainer, from JPEG files to optimizer steps, with as many rows at a time as fit. The ways
take turns and share the frozen weights. What encoding costs once is spread over the rows of all epochs of a stage.
"""

from __future__ import annotations

import copy
import gc
import io
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from architectures import IMAGE_TOKENS, fit_processor, make_gemma3_4b, write_scaled
from contestants import make_ours, make_trl
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PillowImage
from step_flops import ANSWER, ARMS, RANK, TERA, count
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin, TrainerCallback
from trl import SFTTrainer

from data_builders.chat import answer_messages, prompt_messages
from dentalgemma.models.processors import load_processor
from dentalgemma.models.tiny import make_tiny_model
from dentalgemma.training.data import ChatCollator

CONTENDERS = ("P2", "P3", "ours", "ours, packed")
EPOCHS = 5  # of the recipe, over which encoding is spread
QUESTIONS = (2, 3)  # of a picture, in turns
WARM_UP = 2  # steps
MOST_ROWS = 24  # at a time
TRIAL_ROWS = 4
HEADROOM = 0.9  # of the memory, for what the trial does not show
GOALS = {"P2": (3.0, 2.5), "P3": (1.6, 1.6)}  # times as fast, at the shorter and the longer rows


class Case(NamedTuple):
    """What is trained, and where."""

    model: PreTrainedModel
    processor: ProcessorMixin
    base: Path
    folder: Path
    lengths: tuple[int, int]
    picture: tuple[int, int]  # width and height in pixels
    pictures: int
    workers: int
    on_gpu: bool


class Speed(NamedTuple):
    """One measurement."""

    rows_per_second: float
    peak_gib: float
    waiting: float  # share of the time in which the trainer waits for its next batch


class Clock(TrainerCallback):
    """Seconds from the end of the warm-up to the end of the last step."""

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self.begin = self.end = self.waited = 0.0

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        if state.global_step in (WARM_UP, state.max_steps):
            if self.on_gpu:
                torch.cuda.synchronize()
            self.end = time.perf_counter()
            if state.global_step == WARM_UP:
                self.begin, self.waited = self.end, 0.0

    def time_batches(self, trainer: SFTTrainer) -> None:
        fetch = trainer.get_batch_samples

        def timed(*args: object, **kwargs: object) -> tuple:
            if self.on_gpu:
                torch.cuda.synchronize()  # what the GPU has still to do is no waiting for data
            start = time.perf_counter()
            try:
                return fetch(*args, **kwargs)
            finally:
                self.waited += time.perf_counter() - start

        trainer.get_batch_samples = timed


def make_case(folder: Path, *, size: str, device: str, workers: int) -> Case:
    base = folder / "base"
    on_gpu = device == "cuda"
    if size == "small":
        write_scaled(base, seed=0)
        processor = load_processor(base)
        model = AutoModelForImageTextToText.from_pretrained(base)
        return Case(model.to(device), processor, base, folder, (128, 192), (256, 128), 8, workers, on_gpu)
    make_tiny_model(base)
    processor = load_processor(base)
    fit_processor(processor, side=896, tokens=IMAGE_TOKENS)
    processor.save_pretrained(base)
    processor = load_processor(base)
    return Case(make_gemma3_4b(processor), processor, base, folder, (400, 600), (1600, 800), 100, workers, on_gpu)


def measure_gpu(case: Case, *, repeats: int, steps: int) -> dict:
    """For each length the medians of all ways, and how many times as fast ours are."""
    found = {}
    for length in case.lengths:
        rows = write_rows(case, length)
        encoding, rows_at_once = 0.0, {}
        for name in CONTENDERS:
            if name == "ours":
                encoding = time_encoding(case, rows, length)
            rows_at_once[name] = find_rows(case, rows, name, length)
        speeds: dict[str, list[Speed]] = {name: [] for name in CONTENDERS}
        for _ in range(repeats):
            for name in CONTENDERS:
                speeds[name].append(train(case, rows, name, length, rows_at_once[name], steps))
        found[str(length)] = {
            name: summarise(case, name, length, speeds[name], rows_at_once[name], encoding) for name in CONTENDERS
        }
    ratios = {length: _ratios(ways) for length, ways in found.items()}
    return {
        "settings": {
            "pictures": case.pictures,
            "picture": case.picture,
            "questions": QUESTIONS,
            "epochs": EPOCHS,
            "workers": case.workers,
            "repeats": repeats,
            "steps": steps,
            "lora_r": RANK,
        },
        "ways": found,
        "ratios": ratios,
    }


def write_rows(case: Case, length: int) -> Dataset:
    """Rows of about `length` tokens, a quarter of them answer, two or three to a picture."""
    words = _single_tokens(case.processor)
    answer = int(ANSWER * length)
    width, height = case.picture
    draw = np.random.default_rng(0)
    first = _row("0", _jpeg(draw, width, height), ["a"], draw.choice(words, answer - 2))
    frame = ChatCollator(case.processor)([{**first, "images": [{"bytes": first["images"][0]["bytes"]}]}])
    question = max(1, length - frame["input_ids"].shape[1] + 1)
    rows = []
    for number in range(case.pictures):
        picture = _jpeg(draw, width, height)
        for place in range(QUESTIONS[number % 2]):
            rows.append(
                _row(f"{number}.{place}", picture, draw.choice(words, question), draw.choice(words, answer - 2))
            )
    message = List({"role": Value("string"), "content": Value("string")})
    features = Features(images=List(Image()), prompt=message, completion=message, row_id=Value("string"))
    return Dataset.from_list(rows, features=features)


def _row(row_id: str, picture: bytes, question: list[str], answer: list[str]) -> dict:
    return {
        "images": [{"bytes": picture, "path": None}],
        "prompt": prompt_messages(" ".join(question), ""),
        "completion": answer_messages(" ".join(answer)),
        "row_id": row_id,
    }


def _jpeg(draw: np.random.Generator, width: int, height: int) -> bytes:
    """Grey clouds with a fine grain: about as large a file as a radiograph's."""
    clouds = PillowImage.fromarray(draw.integers(0, 256, (height // 32, width // 32), dtype=np.uint8))
    pixels = np.asarray(clouds.resize((width, height), PillowImage.Resampling.BICUBIC), dtype=np.int16)
    pixels = (pixels + draw.normal(0, 4, pixels.shape)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    PillowImage.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def _single_tokens(processor: ProcessorMixin) -> list[str]:
    """Words of one token each, so that the length of a text is that of its list of words."""
    return sorted(token[1:] for token in processor.tokenizer.get_vocab() if re.fullmatch("▁[a-z]{3,}", token))


def make_trainer(case: Case, rows: Dataset, name: str, length: int, rows_at_once: int, steps: int) -> SFTTrainer:
    options = {
        "per_device_train_batch_size": rows_at_once,
        "max_steps": WARM_UP + steps,
        "learning_rate": 1e-4,
        "dataloader_num_workers": case.workers,
        "seed": 0,
    }
    if not case.on_gpu:
        options |= {"use_cpu": True, "bf16": False}
    model, out = share_weights(case.model), case.folder / f"{name} {length}"
    if name in ("P2", "P3"):
        return make_trl(model, case.processor, rows, out=out, rank=RANK, at_rest=name == "P3", options=options)
    undecoded = rows.cast_column("images", List(Image(decode=False)))
    return make_ours(
        model,
        case.processor,
        DatasetDict(train=undecoded, validation=undecoded.select(range(2))),
        base=case.base,
        data=case.folder,
        out=out,
        cache=case.folder / f"features {length}",
        questions=max(QUESTIONS) if "packed" in name else 1,
        rank=RANK,
        options=options,
    )


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same weights, whose modules can be hooked and adapted by themselves."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def time_encoding(case: Case, rows: Dataset, length: int) -> float:
    """Seconds for each picture, from its file to the cache."""
    trainer = make_trainer(case, rows, "ours", length, 1, 1)
    start = time.perf_counter()
    trainer.encode()
    return (time.perf_counter() - start) / case.pictures


def find_rows(case: Case, rows: Dataset, name: str, length: int) -> int:
    """As many rows as fit: foretold by a trial with few of them, then tried."""
    if not case.on_gpu:
        return TRIAL_ROWS
    before = torch.cuda.memory_allocated()
    trial = _try(lambda: train(case, rows, name, length, TRIAL_ROWS, 1))
    if trial is None:
        return 1
    each = (trial.peak_gib * 2**30 - before) / TRIAL_ROWS
    room = torch.cuda.get_device_properties(0).total_memory * HEADROOM - before
    wanted = max(TRIAL_ROWS, min(MOST_ROWS, int(room / each)))
    while wanted > 1 and _try(lambda: train(case, rows, name, length, wanted, 1)) is None:  # noqa: B023
        wanted = wanted * 3 // 4
    return wanted


def _try(run: Callable[[], Speed]) -> Speed | None:
    try:
        return run()
    except torch.OutOfMemoryError:
        return None
    finally:
        _clean_up()


def train(case: Case, rows: Dataset, name: str, length: int, rows_at_once: int, steps: int) -> Speed:
    """Train a few steps and take the time of those after the warm-up."""
    _clean_up()
    trainer = make_trainer(case, rows, name, length, rows_at_once, steps)
    clock = Clock(case.on_gpu)
    clock.time_batches(trainer)
    trainer.add_callback(clock)
    if case.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    peak = torch.cuda.max_memory_allocated() / 2**30 if case.on_gpu else 0.0
    seconds = clock.end - clock.begin
    return Speed(rows_at_once * steps / seconds, peak, clock.waited / seconds)


def _clean_up() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def summarise(case: Case, name: str, length: int, speeds: list[Speed], rows_at_once: int, encoding: float) -> dict:
    """Medians; for ours also the seconds of encoding a picture, and the speed with them spread over all its rows."""
    speed = median(speed.rows_per_second for speed in speeds)
    each = sum(QUESTIONS) / len(QUESTIONS)
    cost = encoding / (each * EPOCHS) if name.startswith("ours") else 0.0
    return {
        "rows_at_once": rows_at_once,
        "rows_per_second": 1 / (1 / speed + cost),
        "rows_per_second_once_encoded": speed,
        "encoding_seconds_per_picture": encoding if cost else 0.0,
        "peak_gib": median(speed.peak_gib for speed in speeds) if case.on_gpu else None,
        "tflops_per_second": speed * flops_per_row(case, name, length) / TERA,
        "waiting_for_data": median(speed.waiting for speed in speeds),
        "all": [speed._asdict() for speed in speeds],
    }


def flops_per_row(case: Case, name: str, length: int) -> float:
    """Operations that a row really takes, what checkpointing repeats included."""
    arm, config = ARMS[name], case.model.config
    prefix = config.mm_tokens_per_image + 6
    if arm.questions == 1:
        return count(arm, length, config=config, prefix=prefix).total
    groups = [count(arm._replace(questions=number), length, config=config, prefix=prefix).total for number in QUESTIONS]
    return sum(each * number for each, number in zip(groups, QUESTIONS, strict=True)) / sum(QUESTIONS)


def _ratios(ways: Mapping[str, Mapping]) -> dict[str, float]:
    return {
        f"{name} / {peer}": ways[name]["rows_per_second"] / ways[peer]["rows_per_second"]
        for name in ("ours", "ours, packed")
        for peer in ("P2", "P3")
    }


def find_slow(results: Mapping) -> list[str]:
    """Which goals are missed by the faster of ours."""
    return [
        f"{length} tokens: {best:.2f} times {peer}, {goals[place]} are due"
        for place, (length, ratios) in enumerate(results["ratios"].items())
        for peer, goals in GOALS.items()
        if (best := max(ratios[f"{name} / {peer}"] for name in ("ours", "ours, packed"))) < goals[place]
    ]


def describe_gpu_mode(results: Mapping) -> str:
    """The figures in a line."""
    return "; ".join(f"{length} tokens: " + ", ".join(_describe(ways)) for length, ways in results["ways"].items())


def _describe(ways: Mapping[str, Mapping]) -> Iterator[str]:
    for name, way in ways.items():
        memory = f" in {way['peak_gib']:.0f} GiB" if way["peak_gib"] else ""
        yield f"{name} {way['rows_per_second']:.1f} rows a second{memory}"
