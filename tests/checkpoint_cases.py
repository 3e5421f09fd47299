"""Ten steps of training on a few mixed rows, whole, resumed or cut off, for tests/test_checkpoints.py.

    torchrun --nproc_per_node 2 tests/checkpoint_cases.py CASES.json

`CASES.json` is a list of `{"model": …, "dataset": …, "out": …, "resume": …, "kill_at": …, options of the recipe}`.
"""

import json
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from accelerate import DistributedType, PartialState
from datasets import DatasetDict
from scale_cases import FSDP2
from transformers import TrainerCallback

from dentalgemma.models.loading import load_model
from dentalgemma.training import checkpoints
from dentalgemma.training.config import parse_stage, plain_errors
from dentalgemma.training.data import load_splits
from dentalgemma.training.trainer import StageTrainer

RECIPES = Path(__file__).parents[1] / "recipes"
FIXED = {
    "max_steps": 10,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 2,
    "eval_steps": 2,
    "save_steps": 1,
    "save_total_limit": "null",
    "load_best_model_at_end": "false",
    "early_stopping_patience": "null",
    "logging_steps": 3,  # a log entry then spans steps before and after most checkpoints
    "learning_rate": 1e-2,
    "warmup_steps": 0.3,
    "lora_dropout": 0.1,
    "lora_r": 4,
    "gradient_checkpointing": "false",
    "dataloader_num_workers": 0,
    "validation_sample": 0,
    "disable_tqdm": "true",
}


def make(model, dataset, out, rows=24, **options):
    """A trainer as the recipe makes it; every third row is without an image, and ten steps are almost two epochs."""
    chosen = {"model_name_or_path": model, "dataset_name": dataset, "output_dir": out, **FIXED, **options}
    argv = [part for name, value in chosen.items() for part in (f"--{name}", *str(value).split())]
    stage, training, model_config = parse_stage(RECIPES / "stage1_vqa.yaml", argv)
    if os.environ.get("ACCELERATE_USE_FSDP"):
        # accelerate 1.15 shards on accelerators only; torch's `fully_shard` runs over gloo as well.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    splits = DatasetDict(load_splits(stage))
    splits["train"] = splits["train"].select(range(rows)).map(_leave_out_images, with_indices=True)
    splits["validation"] = splits["validation"].select(range(4))
    loaded, processor = load_model(model_config)
    return StageTrainer(
        model=loaded,
        processor=processor,
        stage=stage,
        training=training,
        model_config=model_config,
        dataset=splits,
    )


def _leave_out_images(row, number):
    return row | {"images": [] if number % 3 == 0 else row["images"]}


def train(*args, resume=None, callbacks=(), **options):
    """Train, and keep adapter and log entries as a recipe would."""
    trainer = make(*args, **options)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    if trainer.is_world_process_zero():
        (Path(trainer.args.output_dir) / "log.json").write_text(json.dumps(entries(trainer.state.log_history)))
    return trainer


def entries(log_history):
    """Log entries without times and without the summary of the last call."""
    timed = ("runtime", "per_second", "total_flos", "data_wait")
    return [
        {key: value for key, value in entry.items() if not any(word in key for word in timed)}
        for entry in log_history
        if "train_runtime" not in entry
    ]


class At(TrainerCallback):
    """Does something when a step begins (or at another event of transformers)."""

    def __init__(self, step, act, event="on_step_begin"):
        self.step, self.act = step, act
        setattr(self, event, self._come)

    def _come(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


def kill_before_manifest(step):
    """From now on, die as by `kill -9` when the manifest of this step is due."""
    write = checkpoints.write_manifest

    def die(folder, **facts):
        if facts["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)
        write(folder, **facts)

    checkpoints.write_manifest = die


if __name__ == "__main__":
    with plain_errors():
        for case in json.loads(Path(sys.argv[1]).read_text()):
            if "kill_at" in case:
                kill_before_manifest(case.pop("kill_at"))
            if case.pop("sharded", False):
                os.environ.update(FSDP2)
            at, own = case.pop("signal_at", None), os.environ.get("RANK") == "1"
            send = [At(at, lambda: os.kill(os.getpid(), signal.SIGTERM))] if at and own else []
            where = [case.pop(name) for name in ("model", "dataset", "out")]
            train(*where, resume=case.pop("resume", None), callbacks=send, **case)
