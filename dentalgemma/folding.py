"""Fold a chain of adapters into the weight files of their base, in fp32 and with one cast; then look at what came out.

The base's files pass through piece by piece; what is written has the same names, keys and order. `fold` writes,
`inspect_fold` reads everything again and knows nothing of what `fold` did.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from data_builders.records import InputError
from dentalgemma.adapters import Adapter
from dentalgemma.weight_files import INDEX, NAMES, Stored, WeightFile, open_model, open_weights, to_bytes, write_header

# Below it the rounding error is half as large as the update itself or larger: tan(acos 0.9) = 0.48.
COSINE_WARNING = 0.9


@dataclass(frozen=True)
class Update:
    """All that a chain of adapters does to one tensor: `name` in memory, `key` in the files; `steps` in order."""

    name: str
    key: str
    steps: tuple[Adapter, ...]

    def load(self) -> list[tuple]:
        """Its factors and whole tensors, a few megabytes, for `wanted`."""
        return [
            ("whole", step.file.read(step.replaced[self.name]).float())
            if self.name in step.replaced
            else ("factors", *(step.file.read(key).float() for key in step.factors[self.name]), step.scaling)
            for step in self.steps
        ]


def wanted(weight: torch.Tensor, loaded: Iterable[tuple], first: int, last: int) -> torch.Tensor:
    """Rows `first` to `last` of a tensor after all updates, in fp32, before any cast."""
    start = weight.float()
    total = torch.zeros_like(start)  # of all stages: added once, since every sum rounds
    for kind, *parts in loaded:
        if kind == "whole":
            start, total = parts[0].view(-1, start.shape[1])[first:last], torch.zeros_like(start)
        else:
            a, b, scaling = parts
            total += (b[first:last] @ a) * scaling
    return start + total


def plan_updates(folder: Path, files: Sequence[WeightFile], adapters: Sequence[Adapter]) -> dict[str, Update]:
    """Which tensors of the base's files the adapters change, by key.

    Raises:
        InputError: when an adapter does not belong to this base, or changes a tensor that is more than renamed at load.
    """
    names = ModelNames(folder, [stored for file in files for stored in file.tensors.values()])
    steps: dict[str, list[Adapter]] = {}
    for adapter in adapters:
        for name in [*adapter.factors, *adapter.replaced]:
            steps.setdefault(names.in_memory(name), []).append(_renamed(adapter, name, names.in_memory(name)))
    stored = {tensor.key: tensor for file in files for tensor in file.tensors.values()}
    updates = {}
    for name, taken in steps.items():
        key = names.on_disk(name)
        update = Update(name, key, tuple(taken))
        _check_shapes(update, stored[key], folder)
        updates[key] = update
    return updates


def _renamed(adapter: Adapter, name: str, new: str) -> Adapter:
    if name == new:
        return adapter
    factors, replaced = dict(adapter.factors), dict(adapter.replaced)
    for names in (factors, replaced):
        if name in names:
            names[new] = names[name]
    return replace(adapter, factors=factors, replaced=replaced)


def _check_shapes(update: Update, stored: Stored, folder: Path) -> None:
    for step in update.steps:
        if update.name in step.replaced:
            shape = step.file.tensors[step.replaced[update.name]].shape
        else:
            a, b = (step.file.tensors[key].shape for key in step.factors[update.name])
            shape = (b[0], a[1])
        if shape != stored.shape:
            raise InputError(
                f"{step.folder} is an adapter of another base than {folder}: "
                f"{update.key} is {list(stored.shape)} there and {list(shape)} in the adapter"
            )
    if not stored.dtype.is_floating_point:
        raise InputError(f"{folder} stores {update.key} as {stored.dtype}; name its 16-bit model with --base")


@dataclass
class ModelNames:
    """How the tensors of a folder's files are called in the model that transformers makes of them."""

    folder: Path
    tensors: Iterable[Stored]
    keys: dict[str, str] = field(default_factory=dict)  # name in memory → key in the files
    converted: set[str] = field(default_factory=set)  # names that are made from several tensors, or from parts of one

    def __post_init__(self) -> None:
        with torch.device("meta"):
            self.model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(self.folder))
        self.shapes = self.model.state_dict()
        mapping = get_model_conversion_mapping(self.model)
        self.renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        # In transformers' own order: some renamings depend on which key they saw first.
        for key in sorted((stored.key for stored in self.tensors), key=dot_natural_key):
            name, converter = self._rename(key)
            if converter is not None:
                self.converted.add(name)
            elif name in self.keys:
                raise InputError(f"{self.folder}: {key} and {self.keys[name]} are both loaded as {name}")
            else:
                self.keys[name] = key

    def _rename(self, key: str) -> tuple[str, str | None]:
        prefix = self.model.base_model_prefix
        name, converter = rename_source_key(key, self.renamings, self.converters, prefix, self.shapes)
        if name not in self.shapes and key in self.shapes:
            return rename_source_key(key, [], [], prefix, self.shapes)
        return name, converter

    def in_memory(self, name: str) -> str:
        """The present name of a weight that an adapter may know by an older one."""
        return name if name in self.shapes else self._rename(name)[0]

    def on_disk(self, name: str) -> str:
        """The key of a weight in the files.

        Raises:
            InputError: when there is no such weight, or it is tied, fused or split at load.
        """
        if name in self.converted:
            raise InputError(f"{name} is made of other tensors when {self.folder} is loaded: no adapter can be folded")
        tied = {**self.model.all_tied_weights_keys}
        if name in tied or name in tied.values():
            raise InputError(f"{name} is tied to another weight in {self.folder}: folding an adapter would change both")
        if name not in self.keys:
            raise InputError(f"an adapter changes {name}, which {self.folder} does not have: it is of another base")
        return self.keys[name]


def written_tensors(file: WeightFile, dtype: torch.dtype) -> list[Stored]:
    """What will be written for a file: the same keys, numbers cast to `dtype`, the order kept.

    Wider numbers come first, as safetensors itself has it, so that every tensor is aligned.
    """
    tensors = [
        replace(stored, dtype=dtype if stored.dtype.is_floating_point else stored.dtype)
        for stored in file.tensors.values()
    ]
    return sorted(tensors, key=lambda stored: -stored.dtype.itemsize)


def check_space(files: Sequence[WeightFile], dtype: torch.dtype, out: Path) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        InputError: when there is less space than the merged model takes.
    """
    need = sum(t.count * t.dtype.itemsize for file in files for t in written_tensors(file, dtype)) + 2**26
    place = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if free < need:
        raise InputError(f"the merged model takes {need / 1e9:.1f} GB, but {place} has {free / 1e9:.1f} GB free")


def fold(files: Sequence[WeightFile], updates: Mapping[str, Update], out: Path, dtype: torch.dtype) -> None:
    """Write the base's weight files to the folder `out` with the updates folded in and all numbers cast to `dtype`."""
    for file in files:
        tensors = written_tensors(file, dtype)
        with (out / file.path.name).open("wb") as target, Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task(f"Writing {file.path.name}", total=sum(new.count for new in tensors))
            write_header(target, tensors, file.metadata)
            for new in tensors:
                stored = file.tensors[new.key]
                loaded = updates[new.key].load() if new.key in updates else ()
                for first, last in stored.pieces():
                    rows = file.read_rows(stored, first, last)
                    target.write(to_bytes((wanted(rows, loaded, first, last) if loaded else rows).to(new.dtype)))
                bar.advance(task, new.count)
    index = files[0].path.parent / INDEX
    if index.is_file():
        document = json.loads(index.read_text(encoding="utf-8"))
        if "total_size" in document.get("metadata", {}):
            sizes = (t.count * t.dtype.itemsize for file in files for t in written_tensors(file, dtype))
            document["metadata"]["total_size"] = sum(sizes)
        (out / INDEX).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


@dataclass
class Change:
    """Sums over a tensor, or many, of the update that was wanted and the one that the written numbers make."""

    entries: int = 0  # where an update was wanted
    unchanged: int = 0  # of these, where the number stayed as it was
    wanted: float = 0.0  # squares
    real: float = 0.0  # squares
    both: float = 0.0  # products
    error: float = 0.0  # squares of the difference

    def add(self, other: Change) -> None:
        """Take in the sums of another part."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def figures(self) -> dict[str, float]:
        """Relative norm of the error, cosine, share of entries unchanged, share of the update that survived."""
        if self.wanted == 0:
            return {"relative_error": 0.0, "cosine": 1.0, "unchanged_share": 0.0, "survived_share": 1.0}
        return {
            "relative_error": math.sqrt(self.error / self.wanted),
            "cosine": self.both / math.sqrt(self.wanted * self.real) if self.real else 0.0,
            "unchanged_share": self.unchanged / self.entries,
            "survived_share": self.both / self.wanted,
        }


def compare_update(base: torch.Tensor, goal: torch.Tensor, written: torch.Tensor) -> Change:
    """How much of the way from `base` to `goal` the `written` numbers make."""
    base, written = base.float(), written.float()
    delta, real = goal - base, written - base

    def squares(values: torch.Tensor) -> float:
        return values.square().sum(dtype=torch.float64).item()

    meant = delta != 0
    return Change(
        entries=int(meant.sum()),
        unchanged=int((meant & (real == 0)).sum()),
        wanted=squares(delta),
        real=squares(real),
        both=(delta * real).sum(dtype=torch.float64).item(),
        error=squares(real - delta),
    )


def inspect_fold(
    files: Sequence[WeightFile], updates: Mapping[str, Update], out: Path, dtype: torch.dtype
) -> tuple[dict, list[str]]:
    """Read base and merged files again and compare every tensor: facts for the certificate, and what is wrong.

    A tensor without update must be the base's byte for byte (or its cast); an updated one the nearest numbers to what
    was wanted.
    """
    failures = _compare_keys(files, out, dtype)
    total, changes, changed, strays = Change(), {}, 0, []
    for file in files if not failures else ():
        merged = open_weights(out / file.path.name)
        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task(f"Checking {file.path.name}", total=sum(t.count for t in file.tensors.values()))
            for key, stored in file.tensors.items():
                result = _inspect_tensor(file, stored, merged, updates.get(key), dtype)
                bar.advance(task, stored.count)
                changed += result.differs
                if key in updates:
                    total.add(result.change)
                    changes[key] = result.change.figures()
                    if not result.near:
                        failures.append(f"{key} is not, rounded, what was to be written")
                elif result.differs:
                    strays.append(key)
    if strays:
        failures.append(f"{len(strays)} tensors changed that no adapter changes, for example {strays[0]}")
    facts = {
        "tensors": sum(len(file.tensors) for file in files),
        "adapted_tensors": len(updates),
        "changed_tensors": changed,
        "frozen_changed": strays,
        "rounding": total.figures(),
        "adapted": changes,
    }
    return facts, failures


@dataclass
class _Inspected:
    differs: bool  # from the base, or from its cast
    near: bool
    change: Change


def _inspect_tensor(
    file: WeightFile, stored: Stored, merged: WeightFile, update: Update | None, dtype: torch.dtype
) -> _Inspected:
    found = merged.tensors[stored.key]
    loaded = update.load() if update else ()
    result = _Inspected(differs=False, near=True, change=Change())
    for first, last in stored.pieces():
        base, written = file.read_rows(stored, first, last), merged.read_rows(found, first, last)
        expected = base.to(found.dtype)
        result.differs |= bytes(to_bytes(expected)) != bytes(to_bytes(written))
        if update:
            goal = wanted(base, loaded, first, last)
            result.near &= _is_nearest(written, goal, dtype)
            result.change.add(compare_update(base, goal, written))
    return result


def _is_nearest(written: torch.Tensor, goal: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether numbers are those wanted but for the rounding of their type; NaN and infinity never are."""
    info = torch.finfo(dtype)
    # A sum of products depends on their order in the last bits of fp32, whatever is rounded afterwards.
    slack = goal.abs() * (info.eps / 2 + 1e-6) + info.smallest_normal * info.eps + 1e-7
    return bool(((written.float() - goal).abs() <= slack).all())


def _compare_keys(files: Sequence[WeightFile], out: Path, dtype: torch.dtype) -> list[str]:
    """Read the headers with safetensors itself: the same files, keys, shapes, and the type asked for; the index too."""
    failures = []
    for file in files:
        path = out / file.path.name
        try:
            with safe_open(path, "pt") as merged:
                slices = {key: merged.get_slice(key) for key in merged.keys()}  # noqa: SIM118
                found = {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}
        except Exception as error:
            return [f"{path.name} cannot be read: {error}"]
        expected = {stored.key: (stored.shape, NAMES[stored.dtype]) for stored in written_tensors(file, dtype)}
        odd = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
        if odd:
            failures.append(f"{path.name} has other tensors than the base's, for example {odd[0]}")
    written = {file.path.name for file in open_model(out)} if not failures else set()
    if not failures and written != {file.path.name for file in files}:
        failures.append("the index of the merged model names other files than the base's")
    return failures
