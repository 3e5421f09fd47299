"""Short training runs that tests/test_scale.py compares between one process and two; run by torchrun, or imported.

    torchrun --nproc_per_node 2 tests/scale_cases.py CASES.json

`CASES.json` is a list of `{"rows": "images"|"text"|"mixed", "model": …, "dataset": …, "out": …, "batch": 1, …}`.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from accelerate import DistributedType, PartialState
from datasets import DatasetDict

from dentalgemma.models.loading import load_model
from dentalgemma.training.config import leave_process_group, parse_stage
from dentalgemma.training.data import load_splits
from dentalgemma.training.trainer import StageTrainer

RECIPES = Path(__file__).parents[1] / "recipes"
STEPS = 3
GLOBAL_BATCH = 4
FIXED = {
    "max_steps": STEPS,
    "per_device_eval_batch_size": 4,
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": "false",
    "early_stopping_patience": 0,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "adam_epsilon": 1e-3,  # else Adam makes full steps of gradients that are nothing but rounding
    "lora_dropout": 0,
    "lora_r": 4,
    "max_grad_norm": 1e9,
    "dataloader_num_workers": 0,
    "memory": "fixed",
    "pack_questions": 1,  # which questions come together depends on the batch of a process
}
# What `accelerate launch --config_file recipes/accelerate/fsdp2.yaml` puts into the environment; a test compares.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def run_case(case: dict) -> dict:
    """Train three steps; losses by step, and the adapter written to `out` by the first process."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    options = FIXED | {
        "model_name_or_path": case["model"],
        "dataset_name": case["dataset"],
        "output_dir": case["out"],
        "per_device_train_batch_size": GLOBAL_BATCH // processes,
        "gradient_accumulation_steps": 1,
    }
    options |= case.get("options", {})
    for name, value in FSDP2.items():
        if case.get("sharded"):
            os.environ[name] = value
        else:
            os.environ.pop(name, None)
    argv = [part for name, value in options.items() for part in (f"--{name}", *str(value).split())]
    stage, training, model_config = parse_stage(RECIPES / "stage1_vqa.yaml", argv=argv)
    if case.get("sharded"):
        # accelerate 1.15 shards on accelerators only; torch's `fully_shard` runs over gloo as well.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    model, processor = load_model(model_config)
    dataset = load_splits(stage)
    if case["rows"] == "mixed":
        dataset = DatasetDict({split: mixed(rows) for split, rows in dataset.items()})
    trainer = StageTrainer(
        model=model,
        processor=processor,
        stage=stage,
        training=training,
        model_config=model_config,
        dataset=dataset,
    )
    with_images = []
    trainer.encode()
    collate = trainer.packing_collator

    def watch(rows):
        batch = collate(rows)
        with_images.append("image_features" in batch or "pixel_values" in batch)
        return batch

    trainer.packing_collator = watch
    trainer.train()
    trainer.save_model()
    return {
        "with_images": with_images,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "norms": [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry],
        "processes": training.world_size,
        "wrapper": type(trainer.model_wrapped).__name__,
    }


def mixed(rows):
    """One row in four keeps its image: of four rows in two processes, some process mostly has none."""
    return rows.map(lambda row, i: {"images": [] if i % 4 else row["images"]}, with_indices=True)


def main() -> None:
    results = []
    for case in json.loads(Path(sys.argv[1]).read_text()):
        results.append(run_case(case))
    rank = os.environ.get("RANK", "0")
    Path(sys.argv[1]).with_suffix(f".{rank}.json").write_text(json.dumps(results))
    leave_process_group()


if __name__ == "__main__":
    main()
