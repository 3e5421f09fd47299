"""What really trained: every trainable tensor had a gradient and changed, and no frozen tensor did.

Runs have gone wrong silently either way: a "frozen" aligner that trained, a vision tower's LoRA whose gradients were
all zero under reentrant checkpointing. Here the weights themselves are asked, before and after.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from data_builders.records import InputError
from dentalgemma.models.parts import part_of
from dentalgemma.training.sharding import shards_weights

START = "weights_at_start"
# LoRA's A has no gradient while its B is zero, which it is at the start and after a warm-up's first step of length 0.
FEWEST_STEPS = 3
EARLY = 20  # steps after which a tensor without gradient stops the run, if others of its part have had one
HASHED_AT_ONCE = 1 << 24  # bytes; what is copied from the device at a time


class ProofError(InputError):
    """A run that trained something else than it was told to."""

    exit_code = 1


class TrainingProof(TrainerCallback):
    """Hashes all weights when training starts, notes which had a gradient, and compares at the end.

    Of sharded weights each process sees its own shards; `finish` puts together what they saw.
    """

    def __init__(self, model: nn.Module, training: TrainingArguments) -> None:
        self.model = model
        self.path = Path(training.output_dir) / f"{START}-{training.process_index}.json"
        self.had_gradient: set[str] = set()
        self.hashes: dict[str, str] = {}
        self.changed: set[str] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Take the hashes of a new run; a resumed one is held to those of its start."""
        if state.global_step and self.path.is_file():
            before = json.loads(self.path.read_text(encoding="utf-8"))
            self.hashes, self.had_gradient = before["hashes"], set(before["had_gradient"])
        else:
            self.hashes = {name: hash_tensor(parameter) for name, parameter in self.model.named_parameters()}

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Look at those gradients that were never seen yet; after a few steps none are left to look at."""
        for name, parameter in self.model.named_parameters():
            unseen = parameter.requires_grad and name not in self.had_gradient and parameter.grad is not None
            if unseen and bool(local_shard(parameter.grad).any()):
                self.had_gradient.add(name)
        # Sharded, a process may hold no part of a tensor; and a part may wait for its first image.
        if state.global_step == EARLY and not _is_sharded(args):
            parts = {part_of(name) for name in self.had_gradient}
            missing = [name for name in self._trainable() - self.had_gradient if part_of(name) in parts]
            if missing:
                raise ProofError(
                    f"after {EARLY} steps {len(missing)} trainable tensors had no gradient, for example {min(missing)}"
                )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Keep what a resumed run will need."""
        text = json.dumps({"hashes": self.hashes, "had_gradient": sorted(self.had_gradient)})
        self.path.write_text(text, encoding="utf-8")

    def look(self) -> None:
        """Note what changed so far: the best checkpoint, loaded at the end, may be from before all of it did."""
        now = {name: hash_tensor(parameter) for name, parameter in self.model.named_parameters()}
        self.changed |= {name for name in now if now[name] != self.hashes.get(name)}

    def finish(self, args: TrainingArguments, steps: int) -> dict:
        """Compare with the start after so many steps; every process must call it.

        Returns:
            passed, parts, the number of trained and frozen tensors, and the names of those that went wrong.
        """
        self.look()
        changed, had_gradient = _union(self.changed), _union(self.had_gradient)
        trainable = self._trainable()
        waiting = {name for name in trainable if ".lora_A." in name} if steps < FEWEST_STEPS else set()
        # DeepSpeed steps within its backward pass and leaves no gradient to look at.
        without = trainable - had_gradient if args.deepspeed_plugin is None else set()
        wrong = {
            "without_gradient": sorted(without - waiting),
            "unchanged": sorted(trainable - changed - waiting),
            "frozen_changed": sorted(changed - trainable),
            "not_finite": sorted(_union({name for name in trainable if not self._is_finite(name)})),
        }
        self.path.unlink(missing_ok=True)
        return {
            "passed": bool(trainable) and not any(wrong.values()),
            "parts": sorted({part_of(name) for name in trainable}),
            "trained_tensors": len(trainable),
            "frozen_tensors": len(self.hashes) - len(trainable),
            "gradients_seen": args.deepspeed_plugin is None,
            **wrong,
        }

    def _is_finite(self, name: str) -> bool:
        return bool(local_shard(self.model.get_parameter(name)).isfinite().all())

    def _trainable(self) -> set[str]:
        return {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}


def _is_sharded(args: TrainingArguments) -> bool:
    return shards_weights(args) is not None or args.deepspeed_plugin is not None


def _union(names: set[str]) -> set[str]:
    return set(gather_object(sorted(names)))


def explain(proof: dict) -> str:
    """One sentence on a proof that failed."""
    words = {
        "without_gradient": "trainable tensors never had a gradient",
        "unchanged": "trainable tensors did not change",
        "frozen_changed": "frozen tensors changed",
        "not_finite": "trained tensors hold what is no number",
    }
    found = [f"{len(proof[kind])} {what}, for example {proof[kind][0]}" for kind, what in words.items() if proof[kind]]
    return "this run did not train what it was told to: " + ("; ".join(found) or "nothing was trainable")


def hash_tensor(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes, or of this process's shard of it."""
    digest = hashlib.sha256()
    flat = local_shard(tensor).detach().contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, flat.numel(), HASHED_AT_ONCE):
        digest.update(flat[start : start + HASHED_AT_ONCE].cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard under FSDP2 (`to_local`) or ZeRO-3 (`ds_tensor`), else the tensor itself."""
    if hasattr(tensor, "to_local"):
        return tensor.to_local()
    return getattr(tensor, "ds_tensor", tensor)
