"""A stage's configuration: TRL's dataclasses plus a few lines of ours; the command line overrides the YAML."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser

from data_builders.records import InputError

CPU_DEFAULTS = ("--use_cpu", "true", "--bf16", "false", "--dtype", "float32")


@dataclass
class StageConfig(ScriptArguments):
    """What a stage adds to TRL's own arguments."""

    stage: str = field(default="", metadata={"help": "Short name shown in run facts and the model card."})
    trains: list[str] = field(default_factory=lambda: ["language_model"], metadata={"help": "Parts that learn."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after this many evaluations without a better one."}
    )


def parse_stage(default_config: Path, argv: list[str] | None = None) -> tuple[StageConfig, SFTConfig, ModelConfig]:
    """Read a stage's YAML, then let the command line override it; without a GPU, bf16 is off unless asked for.

    Raises:
        InputError: on an unknown option or a value that would waste the run.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not any(a == "--config" or a.startswith("--config=") for a in argv):
        argv = ["--config", str(default_config), *argv]
    # TrlParser looks for the bare token "--config"; it does not read "--config=path".
    argv = [part for a in argv for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    if not torch.accelerator.is_available():
        argv = [*CPU_DEFAULTS, *argv]
    try:
        stage, training, model_config = TrlParser((StageConfig, SFTConfig, ModelConfig)).parse_args_and_config(argv)
    except ValueError as error:
        raise InputError(str(error)) from error
    _check(stage, training)
    return stage, training, model_config


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn what a user can mend into one sentence and exit code 2; anything else keeps its traceback."""
    try:
        yield
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _check(stage: StageConfig, training: SFTConfig) -> None:
    if stage.dataset_name is None:
        raise InputError("no dataset given: set --dataset_name to a folder or a Hub id")
    if training.resume_from_checkpoint is not None and not Path(training.resume_from_checkpoint).is_dir():
        raise InputError(f"resume_from_checkpoint: {training.resume_from_checkpoint} is no checkpoint folder")
    if training.max_length is not None:
        raise InputError(f"max_length: {training.max_length} would cut image tokens or answers; set `max_length: null`")
    # Our collator takes whole rows and does all the preparation itself.
    training.remove_unused_columns = False
    training.dataset_kwargs = {"skip_prepare_dataset": True}
