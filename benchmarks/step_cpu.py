"""Ours beside TRL's own trainer on a scaled Gemma 3: the same losses and gradients, the same stage in less time.

The scaled model has the 4B model's proportion of work in tower and language model. fp32, one thread, phantoms.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from architectures import write_scaled
from contestants import make_ours, make_trl
from datasets import DatasetDict, load_dataset
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin
from trl import SFTTrainer

from data_builders.phantom_formats import write_phantoms
from data_builders.sources import load_sources
from data_builders.vqa import build_vqa
from dentalgemma.models.processors import load_processor
from dentalgemma.training.config import StageConfig
from dentalgemma.training.data import IGNORED, ChatCollator, load_splits

BATCH = 12
QUESTIONS = 4
RANK = 8
LEARNING_RATE = 3e-3
HIGHEST_LOSS_DIFFERENCE = 0.01  # of the validation loss
HIGHEST_TIME = 0.5  # of TRL's
EXACT = 1e-5  # of the largest gradient
WRONG = 1e-2  # what a control must exceed


class Setting(NamedTuple):
    """A scaled model and phantoms to train it on."""

    folder: Path
    epochs: int = 1

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def data(self) -> Path:
        return self.folder / "vqa"


def write_setting(folder: Path, *, phantoms: int, epochs: int, seed: int) -> Setting:
    setting = Setting(folder, epochs)
    write_scaled(setting.base, seed=seed)
    write_phantoms(folder / "phantoms", count=phantoms, seed=seed, formats=("yolo",), progress=False)
    build_vqa(load_sources(folder / "phantoms" / "sources.yaml"), setting.data, progress=False)
    return setting


# Losses and gradients


def compare_steps(setting: Setting) -> dict:
    """Loss and LoRA gradients of one batch: ours, cached and packed, against TRL's; and what must differ, does."""
    rows = _load_whole_batches(setting)
    chosen = list(range(BATCH))  # neighbours show the same pictures
    live = _make_trl(setting, seed=0, order=chosen, out=setting.folder / "live")
    reference = take_step(live, [live.train_dataset[number] for number in chosen])
    found = {}
    for name, questions in (("cached", 1), ("cached, packed", QUESTIONS)):
        trainer = _make_ours(setting, rows, seed=0, questions=questions, out=setting.folder / name)
        trainer.encode()
        batch_rows = [trainer.train_dataset[number] for number in chosen]
        for label, spoil in _controls(packed=questions > 1).items():
            loss, gradients = take_step(trainer, batch_rows, spoil=spoil)
            found[f"{name}{label}"] = {
                "loss": abs(loss - reference[0]) / reference[0],
                "gradients": relative_difference(gradients, reference[1]),
            }
    return found


def take_step(
    trainer: SFTTrainer, rows: Sequence[Mapping], *, spoil: Callable[[dict], None] = lambda batch: None
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one batch, adapters at values that let everything through."""
    _fill_adapters(trainer.model)
    trainer.model.train()
    collator = getattr(trainer, "packing_collator", trainer.data_collator)
    batch = dict(collator([dict(row) for row in rows]))
    spoil(batch)
    trainer.model.zero_grad()
    answers = (batch["labels"][:, 1:] != IGNORED).sum()
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=answers)
    loss.backward()
    return loss.item(), {
        name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters() if parameter.requires_grad
    }


def relative_difference(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> float:
    """The largest difference of any gradient, as a share of the largest gradient."""
    largest = max(gradient.abs().max() for gradient in wanted.values())
    return (max((found[name] - wanted[name]).abs().max() for name in wanted) / largest).item()


def _fill_adapters(model: nn.Module) -> None:
    """LoRA begins with zeros, through which half of the gradients would be zero."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            values = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(values * parameter.shape[1] ** -0.5)


def _controls(*, packed: bool) -> dict[str, Callable[[dict], None]]:
    """Nothing wrong, and two or three things that are."""

    def swap_pictures(batch: dict) -> None:
        batch["image_features"] = batch["image_features"].flip(0)

    def draw_noise(batch: dict) -> None:
        generator = torch.Generator().manual_seed(2)
        batch["image_features"] = torch.randn(batch["image_features"].shape, generator=generator)

    def join_questions(batch: dict) -> None:
        batch["segment_ids"] = batch["segment_ids"].clamp(max=0)

    controls = {"": lambda batch: None, ", other features": swap_pictures, ", noise": draw_noise}
    return controls | ({", questions see each other": join_questions} if packed else {})


# Whole stages


def compare_stages(setting: Setting, seeds: Sequence[int]) -> dict[str, dict]:
    """For each seed a stage by ours and one by TRL on the same rows in the same order, each in a process of its own."""
    found = {}
    for seed in seeds:
        ours = _run_alone(setting, "ours", seed)
        trl = _run_alone(setting, "trl", seed, ours.pop("order"))
        found[str(seed)] = {
            "ours": ours,
            "trl": trl,
            "loss_difference": abs(ours["validation_loss"] - trl["validation_loss"]) / trl["validation_loss"],
            "time": ours["seconds"] / trl["seconds"],
            "time_with_imports": ours["process_seconds"] / trl["process_seconds"],
        }
    return found


def _run_alone(setting: Setting, arm: str, seed: int, order: Sequence[int] | None = None) -> dict:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(run_stage, setting, arm, seed, order).result()


def run_stage(setting: Setting, arm: str, seed: int, order: Sequence[int] | None) -> dict:
    """Train one stage; processor seconds from the loaded model to the trained one, encoding included."""
    torch.set_num_threads(1)
    out = setting.folder / f"{arm}-{seed}"
    rows = _load_whole_batches(setting)
    untrained = AutoModelForImageTextToText.from_pretrained(setting.base)
    before = validation_loss(untrained, load_processor(setting.base), rows)
    start = time.process_time()
    if arm == "ours":
        trainer = _make_ours(setting, rows, seed=seed, questions=QUESTIONS, out=out)
        shown = _record_order(trainer, rows["train"]["row_id"][:])
    else:
        trainer = _make_trl(setting, seed=seed, order=order, out=out)
        shown = list(order or ())
    trainer.train()
    seconds = time.process_time() - start
    return {
        "seconds": seconds,
        "process_seconds": time.process_time(),
        "loss_before": before,
        "validation_loss": validation_loss(trainer.model, trainer.processing_class, rows),
        "steps": trainer.state.global_step,
        "rows": len(shown),
        **({"order": shown} if arm == "ours" else {}),
    }


def validation_loss(model: PreTrainedModel, processor: ProcessorMixin, rows: DatasetDict) -> float:
    """The mean over the answer tokens of the validation rows, by the plain forward pass and the live tower."""
    collator, total, count = ChatCollator(processor), 0.0, 0
    model.eval()
    for start in range(0, len(rows["validation"]), BATCH):
        numbers = range(start, min(start + BATCH, len(rows["validation"])))
        batch = collator([rows["validation"][number] for number in numbers])
        labels = batch.pop("labels")[:, 1:]
        with torch.no_grad():
            logits = model(**batch).logits[:, :-1].float()
        total += nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        count += int((labels != IGNORED).sum())
    return total / count


def _record_order(trainer: SFTTrainer, row_ids: Sequence[str]) -> list[int]:
    """Rows in the order in which batches are made of them, filled while it trains."""
    places = {row_id: place for place, row_id in enumerate(row_ids)}
    shown: list[int] = []
    collate = trainer.packing_collator

    def record(rows: Sequence[Mapping]) -> dict:
        shown.extend(places[row["row_id"]] for row in rows)
        return collate(rows)

    encode = trainer.encode

    def encode_first() -> None:
        encode()  # gives the collator its features
        trainer.packing_collator = record

    trainer.encode = encode_first
    return shown


def _load_whole_batches(setting: Setting) -> DatasetDict:
    """The dataset, its training rows as many as fill whole batches: epochs then end where TRL's batches do."""
    rows = load_splits(StageConfig(dataset_name=str(setting.data), dataset_test_split="validation"))
    rows["train"] = rows["train"].select(range(len(rows["train"]) // BATCH * BATCH))
    return rows


def _options(seed: int, epochs: int) -> dict[str, object]:
    return {
        "per_device_train_batch_size": BATCH,
        "learning_rate": LEARNING_RATE,
        "num_train_epochs": epochs,
        "dataloader_num_workers": 0,
        "seed": seed,
    }


def _make_ours(setting: Setting, rows: DatasetDict, *, seed: int, questions: int, out: Path) -> SFTTrainer:
    return make_ours(
        AutoModelForImageTextToText.from_pretrained(setting.base),
        load_processor(setting.base),
        rows,
        base=setting.base,
        data=setting.data,
        out=out,
        cache=out / "features",
        questions=questions,
        rank=RANK,
        options=_options(seed, setting.epochs),
    )


def _make_trl(setting: Setting, *, seed: int, order: Sequence[int] | None, out: Path) -> SFTTrainer:
    """One epoch over rows that already come in the order of all epochs."""
    rows = load_dataset(str(setting.data), split="train").select(list(order or ()))
    return make_trl(
        AutoModelForImageTextToText.from_pretrained(setting.base),
        load_processor(setting.base),
        rows,
        out=out,
        rank=RANK,
        at_rest=False,
        options=_options(seed, 1) | {"use_cpu": True, "bf16": False},
    )


def measure_cpu(folder: Path, *, phantoms: int, epochs: int, seeds: Sequence[int]) -> dict:
    """Steps, and for each seed whole stages; `failed` says what is not as it should be."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    setting = write_setting(folder, phantoms=phantoms, epochs=epochs, seed=0)
    steps = compare_steps(setting)
    stages = compare_stages(setting, seeds)
    return {"steps": steps, "stages": stages, "failed": find_failures(steps, stages)}


def find_failures(steps: Mapping[str, Mapping], stages: Mapping[str, Mapping]) -> list[str]:
    failed = []
    for name, differences in steps.items():
        is_control = name not in ("cached", "cached, packed")
        off = differences["gradients"]
        if is_control and off < WRONG:
            failed.append(f"{name}: gradients differ by {off:.1e} only: the comparison sees nothing")
        if not is_control and off > EXACT:
            failed.append(f"{name}: gradients differ by {off:.1e}, at most {EXACT} are due")
    for seed, stage in stages.items():
        if stage["loss_difference"] > HIGHEST_LOSS_DIFFERENCE:
            failed.append(f"seed {seed}: validation losses differ by {stage['loss_difference']:.2%}")
        if stage["time"] >= HIGHEST_TIME:
            failed.append(f"seed {seed}: {stage['time']:.2f} of the processor time of TRL, less than half is due")
    return failed


def describe_cpu_mode(results: Mapping) -> str:
    """The figures in a line."""
    cached, packed = (results["steps"][name]["gradients"] for name in ("cached", "cached, packed"))
    exact = "bit by bit" if cached == 0 else f"within {cached:.0e}"
    parts = [f"gradients are TRL's {exact} from the cache, within {packed:.0e} packed as well"]
    stages = list(results["stages"].values())
    if stages:
        time = max(stage["time"] for stage in stages)
        loss = max(stage["loss_difference"] for stage in stages)
        parts.append(
            f"a stage of {stages[0]['ours']['rows']:,} rows takes {time:.0%} of the processor time of TRL's, encoding "
            f"included, and ends within {loss:.0e} of its validation loss (the worst of {len(stages)} seeds)"
        )
    return "; ".join(parts)
