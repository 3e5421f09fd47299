"""Checkpoints that survive: a manifest written last, refusals on resume, an orderly stop on a signal, a full disk.

transformers writes a checkpoint in place and takes the newest folder, complete or not; without its optimizer, scheduler
or random state it goes on with other weights and says nothing. Here a checkpoint counts once `checkpoint_manifest.json`
lists every file of it with size and SHA-256, and a run goes on only from one that counts and is of the same run.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from peft import get_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from data_builders.dataset_folder import hash_file
from data_builders.records import InputError
from dentalgemma.certificates import ADAPTER_WEIGHTS
from dentalgemma.training.data import PICTURES
from dentalgemma.training.proof import START, local_shard

if TYPE_CHECKING:
    from dentalgemma.training.trainer import StageTrainer

MANIFEST = "checkpoint_manifest.json"
STATE = "trainer_state.json"
RESUME = "--resume_from_checkpoint auto"
NEWEST = {"auto", "true", "latest"}
SCRATCH = {"false", "none", "never"}
# `torchrun` passes on a signal that its processes may have had already, so two soon after one another count as one.
SECOND_SIGNAL_AFTER = 5.0  # seconds
SIGNALS = (signal.SIGTERM, signal.SIGINT)
# What may differ between a run and its continuation: where it writes, what it says, who reads the data.
# Data, base and adapter are compared by what they hold, not by how they are called.
FREE = re.compile(
    r"(output_dir|overwrite_|run_name|project|logging_|log_|save_|hub_|push_to_|report_to|trackio_|disable_tqdm|do_"
    r"|resume_from_|restore_callback_|enable_jit_|dataloader_(num|pin|prefetch|persistent|multi)|dataset_num_proc|local_"
    r"|ddp_(timeout|backend|broadcast)|skip_memory|dataset_(name|config|streaming)|mix_datasets|model_name|model_revision"
    r"|trust_remote_code|allow_changes|gate_|feature_cache|memory$|(gradient|activation)_checkpointing|debug|n_gpu|_)"
)
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# torch and safetensors wrap the error of the system, and torch keeps only that writing failed.
FULL_WORDS = ("No space left", "File too large", "quota exceeded", "PytorchStreamWriter", "iostream error")


class CheckpointError(InputError):
    """A checkpoint that a run cannot go on from; the message says why and what to do."""


class DiskFullError(InputError):
    """A checkpoint that could not be written; the message names the last good one."""

    exit_code = 1


class StoppedBySignal(InputError):
    """A run that was told to stop and did so with a complete checkpoint; the message says how to go on."""

    exit_code = 75


class EvaluationInterrupted(Exception):
    """A signal came during an evaluation, which the resumed run starts again."""


# The folder of a checkpoint


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, complete or not, by step."""
    folders = [path for path in Path(run).glob("checkpoint-*") if path.is_dir() and path.name[11:].isdigit()]
    return sorted(folders, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name[11:])


def write_manifest(folder: Path, **facts: object) -> None:
    """List every file below `folder` with size and hash, all on the disk before the list is.

    Raises:
        CheckpointError: when a part is missing, as where the processes of a run do not share their output folder.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    manifest = {"files": files, **facts}
    missing = _missing_parts(manifest)
    if missing:
        raise CheckpointError(f"{folder} was written without {missing}: all processes must share one output_dir")
    draft = folder / f".{MANIFEST}"
    with draft.open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1, default=str)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(folder / MANIFEST)
    _sync_folder(folder)
    _sync_folder(folder.parent)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete checkpoint."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def find_fault(folder: Path, *, hashes: bool = True) -> str | None:
    """Why a run cannot go on from a checkpoint, or `None`; without `hashes` only sizes are compared."""
    try:
        manifest = read_manifest(folder)
        files, missing = manifest["files"], _missing_parts(manifest)
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was not written to its end"
    except (ValueError, TypeError, KeyError):
        return f"its {MANIFEST} is damaged"
    if missing:
        return f"it has no {missing}"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
    for name, expected in files.items() if hashes else ():
        if hash_file(folder / name) != expected["sha256"]:
            return f"{name} has changed since it was written"
    return None


def _missing_parts(manifest: Mapping[str, Any]) -> str | None:
    """The first part that resuming needs and the list of files lacks; FSDP and DeepSpeed name theirs otherwise."""
    names, processes = list(manifest["files"]), manifest["run"]["processes"]
    parts = {
        "adapter or model weights": r"(adapter_model|model).*\.safetensors|pytorch_model_fsdp.*|global_step.*",
        "optimizer": r"optimizer\.(pt|bin)|optimizer_\d+/.*|global_step.*",
        "scheduler": r"scheduler\.pt|global_step.*",
        STATE: re.escape(STATE),
    }
    for number in range(processes):
        name = "rng_state.pth" if processes == 1 else f"rng_state_{number}.pth"
        parts[name] = re.escape(name)
    return next((part for part, form in parts.items() if not any(re.fullmatch(form, name) for name in names)), None)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass  # some network file systems cannot
    finally:
        os.close(handle)


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, its manifest first: half deleted it must not pass for complete."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def rotate(run: Path, *, keep: int | None, best: str | None) -> None:
    """Keep the newest `keep` complete checkpoints, always the newest and the best; `None` or 0 keeps all.

    Incomplete ones go once a newer one is complete.
    """
    checkpoints = list_checkpoints(run)
    complete = [path for path in checkpoints if find_fault(path, hashes=False) is None]
    if not complete:
        return
    for path in checkpoints:
        if path not in complete and step_of(path) < step_of(complete[-1]):
            remove_checkpoint(path)
    protected = {complete[-1].name, Path(best).name if best else ""}
    extra = len(complete) - keep if keep and keep > 0 else 0
    for path in [path for path in complete if path.name not in protected][: max(0, extra)]:
        remove_checkpoint(path)


# Which checkpoint a run goes on from


def choose_checkpoint(run: Path, wanted: str | bool | None, *, say: Callable[[str], object]) -> Path | None:
    """The checkpoint to go on from, checked to the last byte, or `None` to start anew.

    `wanted` is a folder, or one of `auto`, `true` and `latest` for the newest complete one in `run`.

    Raises:
        CheckpointError: for a folder that is not complete, and where a run would write over another's checkpoints.
    """
    run, present = Path(run), list_checkpoints(run)
    word = str(wanted).lower()
    if wanted is None or word in SCRATCH:
        return _start_anew(run, present, say)
    if word not in NEWEST:
        folder = Path(str(wanted))
        fault = find_fault(folder)
        if fault:
            raise CheckpointError(f"{folder} cannot be resumed: {fault}; `{RESUME}` takes the newest complete one")
        newer = [path for path in present if step_of(path) > _saved_step(folder)]
        if newer and folder.resolve().parent == run.resolve():
            raise CheckpointError(
                f"{newer[-1]} is newer than {folder.name}, and one folder cannot hold both courses: "
                "move it away, or set another --output_dir"
            )
        return folder
    for folder in reversed(present):
        fault = find_fault(folder)
        if fault is None:
            say(f"Resuming from {folder}")
            return folder
        say(f"Skipping {folder}: {fault}")
    say(f"No complete checkpoint in {run}: starting from step 0")
    return None


def _start_anew(run: Path, present: list[Path], say: Callable[[str], object]) -> None:
    """TRL would write over what is there, and a later resume would mix two runs."""
    complete = [path for path in present if find_fault(path, hashes=False) is None]
    if complete:
        raise CheckpointError(
            f"{run} already holds {complete[-1].name} of an earlier run: go on with {RESUME}, "
            "or start anew in another --output_dir"
        )
    for path in present:
        say(f"{path} is incomplete and will be deleted once a newer checkpoint is complete")


def _saved_step(folder: Path) -> int:
    return int(read_manifest(folder)["step"])


def find_changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between the run of a checkpoint and this one, each as a phrase."""
    changes = []
    if saved["processes"] != now["processes"]:
        changes.append(f"processes {saved['processes']} → {now['processes']}")
    changes += [f"{split} rows" for split, digest in saved["data"].items() if now["data"].get(split) != digest]
    # What is frozen is hashed, so another choice of parts gives another hash of the same base.
    if saved["base"] != now["base"] and saved["trainable"] == now["trainable"]:
        changes.append("weights of the base model")
    for part in ("trainable", "configuration"):
        before, after = saved[part], json.loads(json.dumps(now[part], default=str))
        keys = sorted(key for key in set(before) | set(after) if not FREE.match(key))
        changes += [f"{key} {before.get(key)} → {after.get(key)}" for key in keys if before.get(key) != after.get(key)]
    return changes


def find_best(folder: Path) -> Path | None:
    """The best checkpoint that a resumed run knows of, beside the one resumed, wherever the run lay before.

    Raises:
        CheckpointError: when it is gone or damaged, since the run would end with another model.
    """
    known = json.loads((folder / STATE).read_text(encoding="utf-8"))["best_model_checkpoint"]
    if not known:
        return None
    best = folder.parent / Path(known).name
    fault = find_fault(best) if best.is_dir() else "it is not there"
    if fault:
        raise CheckpointError(
            f"{folder.name} counts on {best.name} as the best so far, which cannot be used: {fault}; "
            f"put it back beside {folder.name}, or start anew in another --output_dir"
        )
    return best


class Resume(NamedTuple):
    """What a run goes on from; all `None` for one that starts anew. Only the first process knows `run`."""

    folder: Path | None
    best: Path | None
    run: dict[str, Any] | None


def prepare_resume(trainer: StageTrainer, wanted: str | bool | None) -> Resume:
    """Choose the checkpoint and compare its run with this one; the first process looks, all get its answer.

    Raises:
        CheckpointError: when there is none to go on from, or the run was another.
    """

    def look() -> Resume:
        folder = choose_checkpoint(Path(trainer.args.output_dir), wanted, say=say)
        run = describe_run(trainer)
        if folder is None:
            return Resume(None, None, run)
        changes = find_changes(read_manifest(folder)["run"], run)
        if changes and not trainer.settings["allow_changes_on_resume"]:
            raise CheckpointError(
                f"{folder} is of a run with other settings or data: {'; '.join(changes)}; "
                "put them back, or pass --allow_changes_on_resume true"
            )
        if changes:
            say(f"Resuming in spite of changes: {'; '.join(changes)}")
        for path in folder.glob(f"{START}-*.json"):
            shutil.copy(path, trainer.args.output_dir)
        return Resume(folder, find_best(folder) if trainer.args.load_best_model_at_end else None, run)

    return first_process(trainer.accelerator, look)


def check_shared(run: Path, accelerator: Accelerator) -> None:
    """Make sure before training that all processes write into one folder.

    Raises:
        CheckpointError: on machines that do not share it, where no checkpoint could ever be complete.
    """
    probe = run / ".shared"
    if accelerator.is_main_process:
        run.mkdir(parents=True, exist_ok=True)
        probe.touch()
    accelerator.wait_for_everyone()
    seen = all(gather_object([probe.is_file()]))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        probe.unlink(missing_ok=True)
    if not seen:
        error = CheckpointError(f"output_dir: {run} must be one folder for all processes and machines")
        raise said_once(error, accelerator)


def first_process(accelerator: Accelerator, look: Callable[[], Any]) -> Any:
    """What `look` finds in the first process, in all; its errors too, of which only the first one is printed."""
    found: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            found[0] = look()
        except InputError as error:
            found[1] = error
    broadcast_object_list(found)
    if found[1] is not None:
        raise said_once(found[1], accelerator)
    return found[0]


def said_once(error: InputError, accelerator: Accelerator | PartialState) -> InputError:
    """An error that all processes raise and only the first one prints."""
    error.said_elsewhere = not accelerator.is_main_process
    return error


def say(text: str) -> None:
    """A line to whoever watches the run."""
    print(text, file=sys.stderr, flush=True)


# What makes two runs the same


def describe_run(trainer: StageTrainer) -> dict[str, Any]:
    """What must not change between a run and its continuation; call it before the model is wrapped or sharded."""
    return {
        "processes": trainer.args.world_size,
        "configuration": describe_settings(trainer),
        "trainable": trainable_counts(trainer.model),
        "base": hash_frozen(trainer.model),
        "data": {"training": hash_rows(trainer.train_dataset), "validation": hash_rows(trainer.eval_dataset)},
    }


def describe_settings(trainer: StageTrainer) -> dict[str, Any]:
    """The settings that must not change, as they are now: a plan for memory may have set some."""
    return {key: value for key, value in sorted(trainer.settings.items()) if not FREE.match(key)}


def trainable_counts(model: nn.Module) -> dict[str, int]:
    """Number and size of what trains."""
    sizes = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    return {"trainable tensors": len(sizes), "trainable parameters": sum(sizes)}


def hash_frozen(model: nn.Module) -> str:
    """A hash over a sample of every frozen tensor: tells apart bases that were written to the same folder."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and not parameter.is_meta:
            values = local_shard(parameter).detach().reshape(-1)
            sample = values[:: max(1, values.numel() // 64)][:64].float().cpu()
            digest.update(f"{name} {tuple(parameter.shape)}\n".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def hash_rows(rows: Dataset) -> str:
    """A hash of texts and images, in order: the same rows in another folder count as the same data.

    Images count by the names of their pictures, hashes of their bytes, where these were needed; else by `image_id`, the
    hash of their pixels; those of rows without it, as rows of another dataset that are mixed in, by their sizes.
    """
    digest = hashlib.sha256()
    texts = [name for name in ("row_id", "image_id", PICTURES, "prompt", "completion") if name in rows.column_names]
    for batch in rows.select_columns(texts).with_format("arrow").iter(1000):
        digest.update(json.dumps(batch.to_pylist(), sort_keys=True, default=str).encode())
    named = rows.data.column("image_id") if "image_id" in rows.column_names else None
    if "images" in rows.column_names and PICTURES not in rows.column_names and (named is None or named.null_count):
        sizes = _picture_sizes(rows)
        for number in range(len(sizes)) if rows._indices is None else rows._indices.column(0).to_pylist():
            if named is None or not named[number].is_valid:
                digest.update(json.dumps(sizes[number]).encode())
    return digest.hexdigest()


def _picture_sizes(rows: Dataset) -> list[list[int | str | None]]:
    """Bytes of each picture of each stored row, or the name of its file; the offsets tell, no picture is read."""
    sizes: list[list[int | str | None]] = []
    for chunk in rows.data.column("images").chunks:
        pictures = chunk.flatten()
        lengths = pc.binary_length(pictures.field("bytes")).to_pylist()
        paths = pictures.field("path") if None in lengths else ()
        for number, length in enumerate(lengths):
            if length is None:
                lengths[number] = Path(paths[number].as_py() or "").name
        start = 0
        for count in pc.fill_null(pc.list_value_length(chunk), 0).to_pylist():
            sizes.append(lengths[start : start + count])
            start += count
    return sizes


def check_adapter_keys(folder: Path, model: nn.Module) -> None:
    """Refuse an adapter that would leave weights at their start, which PEFT only warns about.

    Raises:
        CheckpointError: naming one weight that is missing, left over or of another shape.
    """
    path = folder / ADAPTER_WEIGHTS
    expected = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}
    with safe_open(path, framework="pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    for names, what in ((set(expected) - set(found), "lacks"), (set(found) - set(expected), "has a left-over")):
        if names:
            raise CheckpointError(f"{path} {what} {min(names)} ({len(names)} such weights): it is of another model")
    for name in sorted(expected):
        if expected[name] != found[name]:
            raise CheckpointError(f"{path}: {name} has shape {found[name]}, this model needs {expected[name]}")


# What transformers and TRL keep in memory and forget


def unsaved_progress(trainer: StageTrainer) -> dict[str, Any]:
    """Sums since the last log entry, so that a resumed run logs what the uninterrupted one would have."""
    return {
        "loss_sums": trainer.accelerator.gather(trainer._tr_loss.detach().reshape(1)).tolist(),
        "last_logged": trainer._globalstep_last_logged,
        "metrics": dict(trainer._metrics["train"]),
        "tokens": trainer._total_train_tokens,
        "seconds": trainer.seconds_before + time.monotonic() - trainer.started,
        "evaluation_due": trainer.evaluation_due,
    }


def restore_progress(trainer: StageTrainer, progress: Mapping[str, Any]) -> None:
    """Put back what `unsaved_progress` saved; under another number of processes only what is common to all."""
    trainer._total_train_tokens = progress["tokens"]
    trainer.seconds_before = progress["seconds"]
    trainer._metrics["train"].update(progress["metrics"])
    losses = progress["loss_sums"]
    if len(losses) == trainer.args.world_size:
        trainer._tr_loss += losses[trainer.args.process_index]
        trainer._globalstep_last_logged = progress["last_logged"]
        # The mean loss at the end is of this call alone: what came before it is taken off again.
        trainer._total_loss_scalar = -sum(losses) / len(losses)


def restore_state(trainer: StageTrainer) -> None:
    """The best checkpoint where it lies now, and the count of early stopping; its patience is today's.

    transformers drops a best checkpoint whose folder was moved, and restores old patience with the count or nothing.
    """
    best = trainer.resume.best
    trainer.state.best_model_checkpoint = str(best) if best else None
    stored = trainer.state.stateful_callbacks
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, EarlyStoppingCallback):
            attributes = stored.setdefault("EarlyStoppingCallback", {}).get("attributes", {})
            callback.early_stopping_patience_counter = attributes.get("early_stopping_patience_counter", 0)
    stored.setdefault("TrainerControl", {})


def is_finished(trainer: StageTrainer) -> bool:
    """Whether a resumed run has nothing left to train; transformers would take one more step."""
    patience_over = any(
        callback.early_stopping_patience_counter >= callback.early_stopping_patience
        for callback in trainer.callback_handler.callbacks
        if isinstance(callback, EarlyStoppingCallback)
    )
    return trainer.state.global_step >= trainer.state.max_steps or patience_over


@contextmanager
def unchanged_randomness() -> Iterator[None]:
    """Leave every random state as it was: an evaluation must not change what is trained after it."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


# Writing a checkpoint


@contextmanager
def writing(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Write a checkpoint into `folder`, over what a killed run left there; on a full disk the unfinished folder goes.

    Raises:
        DiskFullError: naming the last good checkpoint.
    """
    try:
        if accelerator.is_main_process:
            remove_checkpoint(folder)
        accelerator.wait_for_everyone()
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        remove_checkpoint(folder)
        good = [path for path in list_checkpoints(folder.parent) if find_fault(path, hashes=False) is None]
        last = f"the last good checkpoint is {good[-1]}" if good else "there is no complete checkpoint yet"
        raise DiskFullError(
            f"no space to write {folder}, which was removed; {last}; make room, then go on with {RESUME}"
        ) from error


def complete(trainer: StageTrainer, folder: Path) -> None:
    """Write the manifest once all processes have written their part, and only then delete older checkpoints."""
    progress = unsaved_progress(trainer)
    # The weights' hashes at the start go along: what trained is proved against them, wherever the run ends.
    trainer.proof.on_save(trainer.args, trainer.state, trainer.control)
    shutil.copy(trainer.proof.path, folder)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        write_manifest(folder, step=trainer.state.global_step, run=trainer.resume.run, progress=progress)
        rotate(folder.parent, keep=trainer.checkpoints_kept, best=trainer.state.best_model_checkpoint)
    # The first process to leave may end the run for all.
    trainer.accelerator.wait_for_everyone()


def is_saved(trainer: StageTrainer) -> bool:
    """Whether the state that training ended with is in a complete checkpoint."""
    folder = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
    return find_fault(folder, hashes=False) is None


def check_best(trainer: StageTrainer) -> None:
    """Refuse to end with a best checkpoint that was damaged since it was written.

    Raises:
        CheckpointError: naming the file.
    """
    best = Path(trainer.state.best_model_checkpoint)

    def look() -> None:
        fault = find_fault(best)
        if fault:
            raise CheckpointError(f"{best} was the best, and cannot be used: {fault}")

    first_process(trainer.accelerator, look)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, says that nothing more could be written."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if any(words in str(error) for words in FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


# Signals


class StopSignal:
    """Catches SIGTERM and SIGINT while a run trains; the step is finished, a second signal ends the process at once."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        self.name = None
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _receive(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.name is None:
            self.name, self._since = signal.Signals(number).name, now
            # print() may be what this very signal interrupted, and cannot be entered twice.
            os.write(2, f"\n{self.name}: finishing this step, then saving; a second one stops at once\n".encode())
        elif now - self._since > SECOND_SIGNAL_AFTER:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


class StepHooks(TrainerCallback):
    """Where the loop of transformers lets us in: before the first step and after each."""

    def __init__(self, trainer: StageTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Restore what only a manifest holds, and make up for an evaluation that a signal cut off."""
        trainer, folder = self.trainer, self.trainer.resume.folder
        if folder is None:
            return
        progress = read_manifest(folder)["progress"]
        restore_progress(trainer, progress)
        if progress["evaluation_due"]:
            metrics = trainer._evaluate(None, None)
            if trainer._determine_best_metric(metrics, None):
                state.best_model_checkpoint = str(folder)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Save at once; an evaluation that would come first may outlast the patience of who sent the signal."""
        if self.trainer.must_stop():
            control.should_save = True
            self.trainer.evaluation_due = control.should_evaluate
            control.should_evaluate = False


def stopped(trainer: StageTrainer) -> StoppedBySignal:
    """The error that ends a run after a signal, with the newest complete checkpoint and how to go on."""
    run = Path(trainer.args.output_dir)
    good = [path for path in list_checkpoints(run) if find_fault(path, hashes=False) is None]
    what = f"{good[-1]} is complete" if good else "there is no checkpoint yet"
    how = f"go on with: {resume_command()}" if good else "start again"
    error = StoppedBySignal(f"stopped by {trainer.stop.name or 'a signal'}; {what}; {how}")
    return said_once(error, trainer.accelerator)


def resume_command() -> str:
    """This command line, with the flag that goes on where it stopped."""
    words, flag = sys.argv[1:], "--resume_from_checkpoint"
    kept = [
        word for before, word in zip(["", *words], words, strict=False) if not word.startswith(flag) and before != flag
    ]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return f"the same command, its launcher included, and {RESUME}"
    return f"{shlex.join(['python', sys.argv[0], *kept])} {RESUME}"


def ignore_signals(start: Callable[[int], object] | None, worker: int) -> None:
    """Start of a data loader's worker: a signal to the whole process group must not take the data from the last step.

    Workers end with the process that started them, by their own watch on it.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if start is not None:
        start(worker)
