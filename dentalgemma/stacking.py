"""One plain LoRA adapter that does to the base what a whole chain of adapters does, for PEFT and for servers.

The ranks are stacked: B₁A₁ + B₂A₂ = [B₁ B₂][A₁; A₂]. Nothing is approximated. A weight that fewer stages adapt is
filled up with zeros to the common rank, since not every reader of adapters (vLLM) knows patterns of ranks.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from safetensors import safe_open

from data_builders.dataset_folder import hash_file
from dentalgemma.adapters import PREFIX, Adapter
from dentalgemma.certificates import ADAPTER_CONFIG, ADAPTER_FOLDER, ADAPTER_WEIGHTS, PROCESSOR_FILES
from dentalgemma.folding import Update, wanted
from dentalgemma.models.parts import NO_LAYERS
from dentalgemma.weight_files import PIECE, Stored, to_bytes, write_header

# Of the norm of a weight's update: the same products in fp32, summed in another order.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class _Plan:
    """What goes into the file: `stacked` by weight, `whole` tensors that trained in full, by weight."""

    stacked: dict[str, tuple[Adapter, ...]]
    whole: dict[str, Adapter]
    modules_to_save: list[str]
    rank: int
    alpha: int
    scaled: bool  # whether B carries the scaling, since the stages do not agree on one
    dtype: torch.dtype

    def scaling(self, step: Adapter) -> float:
        return step.scaling if self.scaled else 1.0


def stack_adapters(
    updates: Mapping[str, Update], model: Path, *, base: str, revision: str | None
) -> tuple[dict, list[str]]:
    """Write `<model>/adapter`: one LoRA adapter equal to all `updates`, with the processor that lies in `model`.

    Returns facts for the certificate, and what is wrong with the file when it is read again. `base` is what the adapter
    is to be loaded on: a Hub id, or the bare name of a folder. The numbers have the type that the stages' adapters
    have; where the stages are scaled differently, B carries the scaling and all are fp32. Where a module trained in
    full and a later stage adapted it by LoRA there is no such adapter: the facts are `{"left_out": why}`.
    """
    again = sorted(update.name for update in updates.values() if _adapts_a_whole(update))
    if again:
        return {
            "left_out": f"{again[0]} was trained in full, and by LoRA in a later stage: PEFT has no such adapter"
        }, []
    plan = _make_plan(list(updates.values()))
    folder = model / ADAPTER_FOLDER
    folder.mkdir()
    _write_weights(plan, folder / ADAPTER_WEIGHTS)
    _write_config(plan, folder / ADAPTER_CONFIG, base=base, revision=revision)
    for name in PROCESSOR_FILES:  # an adapter has no config.json, and takes the base's generation settings
        if (model / name).is_file():
            shutil.copyfile(model / name, folder / name)
    largest, failures = _inspect(plan, updates, folder)
    facts = {
        "sha256": hash_file(folder / ADAPTER_WEIGHTS),
        "rank": plan.rank,
        "alpha": plan.alpha,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "tensors": len(plan.stacked) + len(plan.whole),
        "modules_to_save": plan.modules_to_save,
        "max_difference": largest,
    }
    return facts, failures


def _adapts_a_whole(update: Update) -> bool:
    """Whether a LoRA update came after one in full."""
    whole = [update.name in step.replaced for step in update.steps]
    return any(whole) and not whole[-1]


def _make_plan(updates: Sequence[Update]) -> _Plan:
    whole = {update.name: update.steps[-1] for update in updates if update.name in update.steps[-1].replaced}
    stacked = {update.name: update.steps for update in updates if update.name not in whole}
    ranks = [sum(_rank(step, name) for step in steps) for name, steps in stacked.items()]
    rank = max(ranks, default=1)
    scalings = {step.scaling for steps in stacked.values() for step in steps}
    common = scalings.pop() if len(scalings) == 1 else None
    scaled = bool(stacked) and (common is None or not (common * rank).is_integer())
    types = {
        step.file.tensors[key].dtype for name, steps in stacked.items() for step in steps for key in step.factors[name]
    } | {step.file.tensors[step.replaced[name]].dtype for name, step in whole.items()}
    dtype = torch.float32 if scaled else functools.reduce(torch.promote_types, types)
    alpha = rank if scaled or common is None else int(common * rank)
    return _Plan(stacked, whole, _modules_to_save(whole), rank, alpha, scaled, dtype)


def _rank(step: Adapter, name: str) -> int:
    return step.file.tensors[step.factors[name][0]].shape[0]


def _modules_to_save(whole: Mapping[str, Adapter]) -> list[str]:
    """The modules that trained in full, by the names that the stages gave them."""
    folders = {step.folder for step in whole.values()}
    names = {name for folder in folders for name in PeftConfig.from_pretrained(str(folder)).modules_to_save or ()}
    return sorted(name for name in names if any(f".{name}." in f".{weight}" for weight in whole))


def _tensors(plan: _Plan) -> Iterator[Stored]:
    """The header of the file: every tensor with its shape, without its numbers."""
    for name, steps in plan.stacked.items():
        a, b = (steps[0].file.tensors[key] for key in steps[0].factors[name])
        module = PREFIX + name.removesuffix(".weight")
        yield Stored(f"{module}.lora_A.weight", plan.dtype, (plan.rank, a.shape[1]), 0)
        yield Stored(f"{module}.lora_B.weight", plan.dtype, (b.shape[0], plan.rank), 0)
    for name, step in plan.whole.items():
        yield Stored(PREFIX + name, plan.dtype, step.file.tensors[step.replaced[name]].shape, 0)


def _numbers(plan: _Plan, stored: Stored) -> torch.Tensor:
    """The numbers of one tensor of the file."""
    name = stored.key.removeprefix(PREFIX)
    if name in plan.whole:
        step = plan.whole[name]
        return step.file.read(step.replaced[name]).to(stored.dtype)
    module, factor = name.removesuffix(".weight").rsplit(".", 1)
    result = torch.zeros(stored.shape, dtype=stored.dtype)
    first = 0
    for step in plan.stacked[f"{module}.weight"]:
        a, b = step.factors[f"{module}.weight"]
        last = first + _rank(step, f"{module}.weight")
        if factor == "lora_A":
            result[first:last] = step.file.read(a)
        else:
            result[:, first:last] = step.file.read(b).float() * plan.scaling(step)
        first = last
    return result


def _write_weights(plan: _Plan, path: Path) -> None:
    """One tensor is in memory at a time."""
    tensors = sorted(_tensors(plan), key=lambda stored: stored.key)
    with path.open("wb") as file:
        write_header(file, tensors, {"format": "pt"})
        for stored in tensors:
            file.write(to_bytes(_numbers(plan, stored)))


def _write_config(plan: _Plan, path: Path, *, base: str, revision: str | None) -> None:
    config = LoraConfig(
        r=plan.rank,
        lora_alpha=plan.alpha,
        # Whole paths: a name alone, such as q_proj, would be found in the vision tower too.
        target_modules=sorted(name.removesuffix(".weight") for name in plan.stacked) or NO_LAYERS,
        modules_to_save=plan.modules_to_save or None,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        revision=revision,
        inference_mode=True,
    )
    # PEFT keeps names in sets, whose order differs from run to run.
    entries = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    path.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _inspect(plan: _Plan, updates: Mapping[str, Update], folder: Path) -> tuple[float, list[str]]:
    """Read the written file and compare each update with the chain's: the largest difference, relative to its norm."""
    largest, failures = 0.0, []
    scaling = plan.alpha / plan.rank
    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
        for update in updates.values():
            path = PREFIX + update.name
            if update.name in plan.whole:
                step = plan.whole[update.name]
                if not torch.equal(file.get_tensor(path).float(), step.file.read(step.replaced[update.name]).float()):
                    failures.append(f"the adapter holds other numbers than {step.folder.name} for {update.name}")
                continue
            module = path.removesuffix(".weight")
            a, b = (file.get_tensor(f"{module}.{factor}.weight").float() for factor in ("lora_A", "lora_B"))
            difference = _difference(update.load(), a, b * scaling)
            largest = max(largest, difference)
            if not difference <= TOLERANCE:  # NaN fails
                failures.append(f"the stacked adapter is {difference:.2g} of its norm off for {update.name}")
    return largest, failures


def _difference(chain: list[tuple], a: torch.Tensor, b: torch.Tensor) -> float:
    """How far b @ a is from the sum of a chain's updates, piece by piece."""
    squares, off = 0.0, 0.0
    step = max(1, PIECE // a.shape[1])
    for first in range(0, b.shape[0], step):
        last = min(first + step, b.shape[0])
        expected = wanted(torch.zeros(last - first, a.shape[1]), chain, first, last)
        found = b[first:last] @ a
        squares += expected.square().sum(dtype=torch.float64).item()
        off += (found - expected).square().sum(dtype=torch.float64).item()
    return (off / squares) ** 0.5 if squares else float(off > 0)
