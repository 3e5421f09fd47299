"""Do adapter and merged model answer alike? One of them is in memory at a time, the other is its logits."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from dentalgemma.adapters import PREFIX, Adapter
from dentalgemma.available_memory import available_memory
from dentalgemma.folding import Update, wanted
from dentalgemma.models.loading import fingerprint_weights, load_pretrained
from dentalgemma.training.config import StageConfig
from dentalgemma.training.data import ChatCollator, load_splits
from dentalgemma.weight_files import WeightFile

PROMPT = "What abnormalities are visible on this panoramic radiograph, and where?"
SYNTHETIC = "a synthetic picture and prompt"
ROWS = 4
SPARE = 2**30  # bytes of a GPU's memory for what a row needs beside the weights
POSITIONS = 64  # of each row, the last ones: the answer, and a bounded amount of memory at 262,144 logits a position

Batch = dict[str, torch.Tensor]


class Reference(NamedTuple):
    """Logits of each row: base, base with adapters, base with the updates that are to be written."""

    base: list[torch.Tensor]
    adapted: list[torch.Tensor]
    folded: list[torch.Tensor]
    peft_difference: float  # between PEFT's updates and ours, relative, the largest of any tensor
    failures: list[str]
    dtype: torch.dtype = torch.float32  # that they were computed in


class Answers(NamedTuple):
    """Logits of the merged folder, loaded alone: as its users load it, and computed with as the reference was."""

    loaded: list[torch.Tensor]
    as_reference: list[torch.Tensor]
    weights: str  # fingerprint


def make_batches(processor: ProcessorMixin, rows: str | None, split: str = "validation") -> tuple[list[Batch], str]:
    """Inputs of one row each and a few words on what they are: rows of a dataset, or a picture with a prompt.

    The picture joins rows without any, since an adapted aligner shows on pictures alone.
    """
    if rows is None:
        return [_synthetic(processor)], SYNTHETIC
    stage = StageConfig(dataset_name=rows, dataset_train_split=split, dataset_test_split=split)
    held_out = load_splits(stage)[split]
    number = min(ROWS, len(held_out))
    chosen = held_out.select([i * len(held_out) // number for i in range(number)])
    collate = ChatCollator(processor)
    batches = [{key: value for key, value in collate([row]).items() if key != "labels"} for row in chosen]
    described = f"{number} rows of {Path(rows).name}, {split}"
    if not any("pixel_values" in batch for batch in batches):
        return [*batches, _synthetic(processor)], f"{described}, and {SYNTHETIC}"
    return batches, described


def _synthetic(processor: ProcessorMixin) -> Batch:
    picture = Image.linear_gradient("L").convert("RGB")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": PROMPT}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def ask_reference(
    base: Path,
    adapters: Sequence[Adapter],
    batches: Sequence[Batch],
    files: Sequence[WeightFile],
    updates: Mapping[str, Update],
) -> Reference:
    """Load the base once and ask it bare, with the adapters as PEFT applies them, and with our updates.

    In fp32 where that fits into memory, else in bf16; on a GPU where it fits there too.
    """
    dtype = computing_dtype(files)
    model, _ = load_pretrained(base, dtype=dtype)
    model.to(computing_device(model)).eval()
    before = logits(model, batches)
    difference, failures = 0.0, []
    for adapter in adapters[:-1]:
        adapted = PeftModel.from_pretrained(model, str(adapter.folder)).eval()
        difference = max(difference, _compare_with_peft(adapted, adapter, updates, failures))
        model = adapted.merge_and_unload()
    adapted = PeftModel.from_pretrained(model, str(adapters[-1].folder)).eval()
    difference = max(difference, _compare_with_peft(adapted, adapters[-1], updates, failures))
    after = logits(adapted, batches)
    model = adapted.unload()
    _put_updates(model, files, updates)
    return Reference(before, after, logits(model, batches), difference, failures, dtype)


def computing_dtype(files: Sequence[WeightFile], available: int | None = None) -> torch.dtype:
    """What a model is asked in: fp32, or bf16 where fp32 would not leave a quarter of its size free (Colab: 12 GB)."""
    needed = 4 * sum(stored.count for file in files for stored in file.tensors.values())
    available = available_memory() if available is None else available
    return torch.float32 if needed * 1.25 < available else torch.bfloat16


def computing_device(model: torch.nn.Module) -> torch.device:
    """The GPU where its free memory holds the model and a row, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.empty_cache()  # what a model before has left behind is free, but does not count as that
    needed = 1.25 * sum(weight.numel() * weight.element_size() for weight in model.parameters()) + SPARE
    return torch.device("cuda" if needed < torch.cuda.mem_get_info()[0] else "cpu")


def ask_merged(folder: Path, batches: Sequence[Batch], dtype: torch.dtype = torch.float32) -> Answers:
    """Load a model folder alone, as its users will, and ask it."""
    gc.collect()  # modules point at each other, so that the reference model might still be there
    model, _ = load_pretrained(folder)
    model.eval()
    weights = fingerprint_weights(model)
    loaded = logits(model.to(computing_device(model)), batches)
    if model.dtype == dtype:
        return Answers(loaded, loaded, weights)
    model.to("cpu", dtype)
    return Answers(loaded, logits(model.to(computing_device(model)), batches), weights)


@torch.inference_mode()
def logits(model: torch.nn.Module, batches: Sequence[Batch]) -> list[torch.Tensor]:
    """The logits of the last positions of each row, (positions, vocabulary) in fp32, on the CPU."""
    first = next(model.parameters())
    answers = []
    for batch in batches:
        inputs = {
            key: value.to(first.device, first.dtype if value.is_floating_point() else None)
            for key, value in batch.items()
        }
        answers.append(model(**inputs, logits_to_keep=POSITIONS, use_cache=False).logits[0].float().cpu())
    return answers


def compare_logits(expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor], prefix: str = "") -> dict:
    """Largest and mean difference over all rows, and how often both would go on with the same token."""
    difference = torch.cat([(a - b).abs().flatten() for a, b in zip(expected, found, strict=True)])
    same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(expected, found, strict=True)])
    return {
        f"{prefix}max_logit_difference": difference.max().item(),
        f"{prefix}mean_logit_difference": difference.mean().item(),
        f"{prefix}top1_agreement": same.float().mean().item(),
    }


def _compare_with_peft(
    adapted: PeftModel, adapter: Adapter, updates: Mapping[str, Update], failures: list[str]
) -> float:
    """The largest relative difference between what PEFT adds to a tensor and what we do; both must change the same."""
    ours = {update.name: step for update in updates.values() for step in update.steps if step.file is adapter.file}
    theirs, largest = set(), 0.0
    for path, module in adapted.named_modules():
        path = path.removeprefix(PREFIX)
        if isinstance(module, LoraLayer):
            theirs.add(f"{path}.weight")
            if f"{path}.weight" in ours:
                delta, own = module.get_delta_weight("default").cpu(), ours[f"{path}.weight"].delta(f"{path}.weight")
                largest = max(largest, ((delta - own).norm() / delta.norm().clamp(min=1e-30)).item())
        elif isinstance(module, ModulesToSaveWrapper):
            for name, value in module.modules_to_save["default"].state_dict().items():
                name = f"{path}.{name}"
                theirs.add(name)
                if name in ours and not torch.equal(value, ours[name].file.read(ours[name].replaced[name]).to(value)):
                    failures.append(f"PEFT loads other numbers than {adapter.folder.name} holds for {name}")
    odd = sorted(theirs ^ set(ours))
    if odd:
        failures.append(f"PEFT adapts other tensors than {adapter.folder.name} holds, for example {odd[0]}")
    return largest


@torch.no_grad()
def _put_updates(model: PreTrainedModel, files: Sequence[WeightFile], updates: Mapping[str, Update]) -> None:
    """Give a model in memory what `fold` writes, before the cast."""
    parameters = dict(model.named_parameters())
    for file in files:
        for key in file.tensors.keys() & updates.keys():
            update, stored = updates[key], file.tensors[key]
            target, loaded = parameters[update.name].view(stored.rows, stored.width), update.load()
            for first, last in stored.pieces():
                target[first:last] = wanted(file.read_rows(stored, first, last), loaded, first, last)
