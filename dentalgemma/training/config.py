"""A stage's configuration: TRL's dataclasses plus a few lines of ours; the command line overrides the YAML."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
import yaml
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser

from data_builders.records import InputError
from data_builders.secrets import REMEDY, find_secret, refuse_secrets
from dentalgemma.training.checkpoints import NEWEST, SCRATCH, is_disk_full
from dentalgemma.training.data import NO_DATASET
from dentalgemma.training.gate import check_gate
from dentalgemma.training.limits import check_values
from dentalgemma.training.precision import check_precision, gpu_capability
from dentalgemma.training.sharding import shards_weights

CPU_DEFAULTS = ("--use_cpu", "true", "--bf16", "false", "--dtype", "float32")


@dataclass
class StageConfig(ScriptArguments):
    """What a stage adds to TRL's own arguments."""

    stage: str = field(default="", metadata={"help": "Short name shown in run facts and the model card."})
    trains: list[str] = field(default_factory=lambda: ["language_model"], metadata={"help": "Parts that learn."})
    max_row_tokens: int | None = field(
        default=None, metadata={"help": "Longer rows are left out, counted and listed; none is ever cut."}
    )
    vision_features: str = field(
        default="auto",
        metadata={
            "help": "`cached`: a frozen tower encodes each picture once, for all epochs, questions and runs; `live`: "
            "in every step; `auto`: cached where possible, and says why where not.",
            "choices": ["auto", "cached", "live"],
        },
    )
    feature_cache: str | None = field(
        default=None, metadata={"help": "Folder of the features; default `$HF_HOME/dentalgemma/features`."}
    )
    pack_questions: int = field(
        default=1, metadata={"help": "At most so many questions of one image share its tokens in one sequence."}
    )
    pack_texts: bool = field(default=False, metadata={"help": "Rows without images are laid end to end, unpadded."})
    image_fit: str | None = field(
        default=None,
        metadata={
            "help": "`stretch` to the tower's square or `pan_and_scan` (crops beside it); not given: as the model has.",
            "choices": ["stretch", "pan_and_scan"],
        },
    )
    memory: str = field(
        default="fixed",
        metadata={
            "help": "`auto`: micro-batch and gradient checkpointing are chosen to fit, the rows of a step stay as "
            "configured; `fixed`: as configured.",
            "choices": ["auto", "fixed"],
        },
    )
    mix_datasets: list[str] = field(
        default_factory=list, metadata={"help": "Folders or Hub ids whose training rows are mixed in."}
    )
    mix_weights: list[float] = field(
        default_factory=list, metadata={"help": "The share of each of `mix_datasets` in the training rows."}
    )
    mix_seed: int | None = field(default=None, metadata={"help": "Seed of the choice; `seed` where not given."})
    allow_changes_on_resume: bool = field(
        default=False, metadata={"help": "Go on although data, settings or the number of processes are others."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after this many evaluations without a better one."}
    )
    validation_sample: int = field(
        default=0, metadata={"help": "Validation rows that the model answers at each evaluation; 0 asks none."}
    )
    gate_questions: str | None = field(
        default=None,
        metadata={
            "help": "Closed questions (JSONL) that start and end answer; a significant loss ends with exit code 1."
        },
    )
    gate_before: str | None = field(
        default=None,
        metadata={"help": "Answers of an earlier model to them; not given: those in the gate of the run started from."},
    )
    gate_margin: float = field(
        default=0.0, metadata={"help": "Share of the questions that may be lost: 0.02 is 2 points."}
    )


def parse_stage(default_config: Path, argv: list[str] | None = None) -> tuple[StageConfig, SFTConfig, ModelConfig]:
    """Read a stage's YAML, then let the command line override it; without a GPU, bf16 is off unless asked for.

    Raises:
        InputError: on an unknown option or a value that would waste the run.
    """
    stage, training, model_config = read_stage(default_config, argv)
    check_stage(stage, training, model_config)
    check_precision(training, model_config, gpu_capability(training))
    return stage, training, model_config


def read_stage(
    default_config: Path, argv: list[str] | None = None, *, elsewhere: bool = False
) -> tuple[StageConfig, SFTConfig, ModelConfig]:
    """What `parse_stage` reads, unchecked; `elsewhere`: for a machine whose GPU has bf16, whatever this one has.

    Raises:
        InputError: on an unknown option.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not any(a == "--config" or a.startswith("--config=") for a in argv):
        argv = ["--config", str(default_config), *argv]
    # TrlParser looks for the bare token "--config"; it does not read "--config=path".
    argv = [part for a in argv for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    _refuse_tokens(argv)
    if elsewhere:
        argv = ["--use_cpu", "true", *argv]  # else transformers refuses bf16 where this machine has none
    elif not torch.accelerator.is_available():
        argv = [*CPU_DEFAULTS, *argv]
    try:
        stage, training, model_config = TrlParser((StageConfig, SFTConfig, ModelConfig)).parse_args_and_config(argv)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        raise InputError(f"the configuration is no YAML{line}: {getattr(error, 'problem', error)}") from error
    except (ValueError, ZeroDivisionError) as error:
        raise InputError(str(error)) from error
    if len(stage.trains) == 1 and stage.trains[0].startswith("["):
        stage.trains = yaml.safe_load(stage.trains[0])  # on the command line as the YAML has it
    return stage, training, model_config


def _refuse_tokens(argv: Sequence[str]) -> None:
    """Refuse tokens before anything can quote them: what is set here ends up in run facts, cards and messages."""
    for before, part in zip(["", *argv], argv, strict=False):
        if find_secret(part.encode(errors="replace")) is None:
            if before == "--config" and Path(part).is_file():
                refuse_secrets(Path(part).read_text(encoding="utf-8", errors="replace"), Path(part))
            continue
        option, _, value = part.partition("=")
        name = option if value else before
        where = f" after {name}" if name.startswith("--") and find_secret(name.encode()) is None else ""
        raise InputError(f"the command line holds what looks like a token or a key{where}; {REMEDY}")


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn what a user can mend into one sentence and exit code 2; anything else keeps its traceback."""
    try:
        yield
        leave_process_group()
    except InputError as error:
        # Where all processes stop for the same reason, the first one says so.
        if not getattr(error, "said_elsewhere", False):
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None and not is_disk_full(error):
            print(f"{Path(sys.argv[0]).name}: {error.filename}: {error.strerror}", file=sys.stderr)
            sys.exit(2)
        if not is_disk_full(error):
            raise
        print(f"{Path(sys.argv[0]).name}: no space left: {error}; the checkpoints are as they were", file=sys.stderr)
        sys.exit(1)


def leave_process_group() -> None:
    """Take leave of the other processes; threads of gloo that still run at exit now and then abort a finished run."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def check_stage(stage: StageConfig, training: SFTConfig, model_config: ModelConfig) -> None:
    """Refuse what would waste a run, and set what our rows need.

    Raises:
        InputError: naming the option, its value and the remedy.
    """
    if stage.dataset_name is None:
        raise InputError(NO_DATASET)
    _check_checkpoints(training)
    if training.max_length is not None:
        raise InputError(f"max_length: {training.max_length} would cut image tokens or answers; set `max_length: null`")
    check_values(stage, training, model_config)
    _check_mixture(stage)
    check_gate(stage, training)
    stage.mix_seed = training.seed if stage.mix_seed is None else stage.mix_seed
    reentrant = (training.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    if training.gradient_checkpointing and reentrant and set(stage.trains) & {"vision_tower", "aligner"}:
        # Pictures carry no gradient into the tower, so a reentrant checkpoint would give its adapters none either.
        raise InputError("gradient_checkpointing_kwargs: tower and aligner learn only with use_reentrant: false")
    if stage.pack_questions > 1 and training.train_sampling_strategy == "group_by_length":
        raise InputError(
            "pack_questions keeps the questions of an image together, train_sampling_strategy: group_by_length would "
            "part them; choose one"
        )
    sees = set(stage.trains) != {"language_model"}
    if sees and training.gradient_checkpointing and shards_weights(training) == "ZeRO-3":
        # TRL 1.16 turns reentrant checkpointing on for adapters under ZeRO-3, whatever was asked for.
        raise InputError("under ZeRO-3 tower and aligner learn only with gradient_checkpointing: false; or use ZeRO-2")
    for tracker in {"tensorboard", "trackio", "wandb"}.intersection(training.report_to):
        if find_spec(tracker) is None:
            raise InputError(f"report_to: {tracker} is not installed: `pip install {tracker}`, or `report_to: none`")
    # Our collator takes whole rows and does all the preparation itself.
    training.remove_unused_columns = False
    training.dataset_kwargs = {"skip_prepare_dataset": True}
    training.logging_nan_inf_filter = False  # transformers would log a loss that is no number as 0


def _check_checkpoints(training: SFTConfig) -> None:
    wanted = training.resume_from_checkpoint
    if wanted is not None and str(wanted).lower() not in NEWEST | SCRATCH and not Path(wanted).is_dir():
        raise InputError(f"resume_from_checkpoint: {wanted} is no checkpoint folder; `auto` takes the newest")
    if training.enable_jit_checkpoint:
        raise InputError("enable_jit_checkpoint: after SIGTERM it would go on as if trained to the end; leave it out")
    if training.save_only_model:
        raise InputError("save_only_model: a checkpoint without optimizer state cannot be resumed; leave it out")
    if training.push_to_hub or training.hub_token:
        raise InputError("push_to_hub and hub_token: a recipe uploads nothing; leave them out")


def _check_mixture(stage: StageConfig) -> None:
    names, weights = stage.mix_datasets, stage.mix_weights
    if len(names) != len(weights):
        raise InputError(f"mix_datasets names {len(names)} datasets, mix_weights gives {len(weights)}: one for each")
    if any(weight <= 0 for weight in weights) or sum(weights) >= 1:
        raise InputError(f"mix_weights: {weights} must be above 0 and sum to less than 1, the rest is `dataset_name`")
