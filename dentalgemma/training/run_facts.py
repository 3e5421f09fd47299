"""What a run recorded of itself, `run_facts.json`: the model card is rendered from it, nothing is typed by hand."""

from __future__ import annotations

import json
import platform
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, Value
from trl import ModelConfig

from data_builders.dataset_folder import REPORT, hash_file
from data_builders.records import InputError
from dentalgemma import __version__
from dentalgemma.certificates import ADAPTER_WEIGHTS, UNRECORDED
from dentalgemma.evaluation.files import without_folder
from dentalgemma.models.loading import fingerprint_files, run_around, weights_folder
from dentalgemma.models.processors import image_fit
from dentalgemma.training.config import StageConfig
from dentalgemma.training.data import PICTURES
from dentalgemma.training.proof import ProofError, explain
from dentalgemma.training.trainer import StageTrainer

FILE_NAME = "run_facts.json"
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "huggingface-hub")
HYPERPARAMETERS = (
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "bf16",
    "gradient_checkpointing",
    "max_length",
    "seed",
)


def write_run_facts(trainer: StageTrainer, stage: StageConfig, model_config: ModelConfig, dataset: DatasetDict) -> None:
    """Write the facts of a finished run into its folder; every process calls it, the first one writes.

    Raises:
        ProofError: after writing, when the run did not train what it was told to.
    """
    proof = trainer.proof.finish(trainer.args, trainer.state.global_step)
    if trainer.is_world_process_zero():
        _write(trainer, stage, model_config, dataset, proof)
    if not proof["passed"]:
        raise ProofError(explain(proof))


def _write(
    trainer: StageTrainer, stage: StageConfig, model_config: ModelConfig, dataset: DatasetDict, proof: dict
) -> None:
    state, args, start = trainer.state, trainer.args, trainer.start
    facts = {
        "stage": stage.stage,
        "trains": stage.trains,
        "base_model": without_folder(start.base),
        "base_is_local": Path(start.base).is_dir(),
        "base_is_rehearsal": getattr(trainer.model.config, "rehearsal", False),
        "base_revision": start.revision,
        "base_weights": fingerprint_files(weights_folder(start.base, start.revision)),
        "chain": [_without_chain(facts_of(adapter)) for adapter in start.adapters],
        "dataset": without_folder(stage.dataset_name),
        "data_sources": _data_sources(stage, dataset),
        "data_contents": _data_contents(stage, dataset),
        "hub_datasets": [name for name in _dataset_names(stage) if not Path(name).exists()],
        "train_split": stage.dataset_train_split,
        "dataset_rows": {split: len(rows) for split, rows in dataset.items()},
        "dataset_fingerprints": {split: rows._fingerprint for split, rows in dataset.items()},
        "left_out": trainer.rows.left_out,
        "longest_rows": trainer.rows.longest,
        "mixture": [
            {**entry, "dataset": without_folder(entry["dataset"])} for entry in getattr(dataset, "mixture", ())
        ],
        "parts": trainer.parts,
        "proof": proof,
        "adapter_sha256": _hash_adapter(Path(args.output_dir) / ADAPTER_WEIGHTS),
        "lora": {"r": model_config.lora_r, "alpha": model_config.lora_alpha, "dropout": model_config.lora_dropout},
        "dtype": model_config.dtype,
        "hyperparameters": {name: _plain(getattr(args, name)) for name in HYPERPARAMETERS},
        "processes": args.world_size,
        "global_batch_size": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "vision": {
            "features": "live" if trainer.live else "cached",
            "reason": trainer.live,
            "pictures": trainer.pictures,
            "train_pictures": len({name for names in trainer.train_dataset[PICTURES][:] for name in names}),
            "image_fit": image_fit(trainer.processing_class),
        },
        "packing": {"questions": stage.pack_questions, "texts": stage.pack_texts},
        "memory": trainer.memory,
        "data_wait": trainer.wait.share(),
        "steps": state.global_step,
        "epochs": state.epoch,
        "best_step": _step_of(state.best_model_checkpoint),
        "best_metric": {args.metric_for_best_model: state.best_metric} if args.metric_for_best_model else None,
        "seconds": round(trainer.seconds_before + (_last(state.log_history, "train_runtime") or 0), 1),
        "losses": losses(state.log_history),
        "sampled_validation": trainer.validation.facts(state) if trainer.validation else None,
        "hardware": hardware(),
        "versions": {"dentalgemma": __version__, "python": platform.python_version()}
        | {name: version(name) for name in PACKAGES},
        "command": [Path(sys.argv[0]).name, *map(without_folder, sys.argv[1:])],
    }
    text = json.dumps(facts, indent=2, ensure_ascii=False)
    (Path(args.output_dir) / FILE_NAME).write_text(text + "\n", encoding="utf-8")


def _hash_adapter(path: Path) -> str | None:
    return hash_file(path) if path.is_file() else None


def _dataset_names(stage: StageConfig) -> list[str]:
    return [name for name in (stage.dataset_name, *(stage.mix_datasets or ())) if name]


def _data_sources(stage: StageConfig, dataset: DatasetDict) -> list[dict]:
    """Name, licence and rows of the sources behind every dataset of a stage, whose terms its model is under.

    From the build report of a folder; without one, as from the Hub, as each row states it. A dataset that tells neither
    is a source of its own whose licence is not stated.
    """
    sources = []
    for name in _dataset_names(stage):
        own = _reported_sources(_build_report(name))
        if not own and name == stage.dataset_name:
            own = _stated_sources(dataset[stage.dataset_train_split])
        sources += own or [_silent_source(name, dataset)]
    return sources


def _build_report(dataset: str | None) -> dict:
    path = Path(dataset or "") / REPORT
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def _reported_sources(report: dict) -> list[dict]:
    keys = ("name", "license", "url", "modality", "rows")
    return [
        {key: source.get(key) for key in keys} | {"images": source.get("images_built")}
        for source in report.get("sources", ())
    ]


def _stated_sources(rows: Dataset) -> list[dict]:
    """What the columns `source` and `license` of a dataset by `dentalgemma build` say."""
    if not all(rows.features.get(column) == Value("string") for column in ("source", "license")):
        return []
    counts = Counter((source, terms) for source, terms in zip(rows["source"], rows["license"], strict=True) if source)
    return [
        {"name": source, "license": terms, "url": None, "modality": None, "rows": count, "images": None}
        for (source, terms), count in counts.items()
    ]


def _silent_source(name: str, dataset: DatasetDict) -> dict:
    url = None if Path(name).exists() else f"https://huggingface.co/datasets/{name}"
    mixed = {entry["dataset"]: entry["available"] for entry in getattr(dataset, "mixture", ())}
    rows = mixed.get(name) or sum(map(len, dataset.values()))
    return {"name": without_folder(name), "license": None, "url": url, "modality": None, "rows": rows, "images": None}


def _data_contents(stage: StageConfig, dataset: DatasetDict) -> dict:
    """What the training rows hold: images or not, languages, question types, images with each finding."""
    rows = dataset[stage.dataset_train_split]
    counts = {
        column: Counter(filter(None, rows[column]) if rows.features.get(column) == Value("string") else ())
        for column in ("language", "question_type")
    }
    findings = _build_report(stage.dataset_name).get("findings", {})
    trained = {label: by_split.get("train", {}).get("images") for label, by_split in findings.items()}
    return {
        "images": "images" in rows.column_names,
        "languages": sorted(counts["language"]),
        "question_types": dict(sorted(counts["question_type"].items())),
        "findings": {label: images for label, images in trained.items() if images},
    }


def read_run_facts(run: Path) -> dict:
    """Read the facts of a run folder.

    Raises:
        InputError: when the folder holds none, as while the run still goes on.
    """
    path = Path(run) / FILE_NAME
    if not path.is_file():
        raise InputError(f"{path} is missing: {run} is no folder of a finished run")
    return json.loads(path.read_text(encoding="utf-8"))


def facts_of(adapter: Path) -> dict:
    """The facts behind an adapter; a checkpoint's are those of the run around it, where it was finished.

    A stage without facts is kept as unrecorded, and has no card.
    """
    folder = run_around(adapter)
    return read_run_facts(folder) if (folder / FILE_NAME).is_file() else {"stage": UNRECORDED}


def _without_chain(facts: dict) -> dict:
    return {key: value for key, value in facts.items() if key != "chain"}


def losses(log_history: list[dict]) -> dict[str, list[dict[str, float]]]:
    """Training and validation losses by step."""
    train = [{"step": entry["step"], "loss": entry["loss"]} for entry in log_history if "loss" in entry]
    held_out = [{"step": entry["step"], "loss": entry["eval_loss"]} for entry in log_history if "eval_loss" in entry]
    return {"train": train, "validation": held_out}


def hardware() -> dict[str, object]:
    """The device that trains, and how many of them this process sees."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()  # of this process, in bytes, since it began
        return {
            "device": torch.cuda.get_device_name(),
            "count": torch.cuda.device_count(),
            "peak_gpu_memory": peak,
        }
    return {"device": f"CPU {platform.machine()}", "threads": torch.get_num_threads()}


def _last(log_history: list[dict], key: str) -> float | None:
    return next((entry[key] for entry in reversed(log_history) if key in entry), None)


def _step_of(checkpoint: str | None) -> int | None:
    return int(Path(checkpoint).name.rpartition("-")[2]) if checkpoint else None


def _plain(value: object) -> object:
    value = getattr(value, "value", value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
