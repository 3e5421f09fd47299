"""The trainers that are measured: TRL's own on one side, ours as the recipe runs it on the other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from datasets import Dataset, DatasetDict
from peft import LoraConfig
from transformers import PreTrainedModel, ProcessorMixin
from trl import SFTConfig, SFTTrainer

from dentalgemma.models.parts import LANGUAGE_MODEL_LAYERS
from dentalgemma.quickstart import recipes_folder
from dentalgemma.training.backbone import rest_tower
from dentalgemma.training.config import parse_stage
from dentalgemma.training.trainer import StageTrainer

# What both sides are told; everything else is what the recipe says, or what TRL takes by itself.
SAME = {
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
    "max_grad_norm": 1.0,
    "optim": "adamw_torch_fused",
    "gradient_accumulation_steps": 1,
    "eval_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 10,
}
RECIPE = {
    "gradient_checkpointing": False,
    "load_best_model_at_end": False,
    "early_stopping_patience": "null",
    "validation_sample": 0,
    "lora_dropout": 0,
    "memory": "fixed",
    "vision_features": "cached",
}


def make_ours(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    dataset: DatasetDict,
    *,
    base: Path,
    data: Path,
    out: Path,
    cache: Path,
    questions: int,
    rank: int,
    options: Mapping[str, object],
) -> StageTrainer:
    """Stage 1 by its recipe, from the feature cache, with up to `questions` of an image in one sequence."""
    chosen = {
        **SAME,
        **RECIPE,
        **options,
        "model_name_or_path": base,
        "dataset_name": data,
        "output_dir": out,
        "feature_cache": cache,
        "pack_questions": questions,
        "lora_r": rank,
        "lora_alpha": rank,
    }
    argv = [part for name, value in chosen.items() for part in (f"--{name}", _word(value))]
    stage, training, model_config = parse_stage(recipes_folder() / "stage1_vqa.yaml", argv)
    return StageTrainer(
        model=model,
        processor=processor,
        stage=stage,
        training=training,
        model_config=model_config,
        dataset=dataset,
    )


def make_trl(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: Dataset,
    *,
    out: Path,
    rank: int,
    at_rest: bool,
    options: Mapping[str, object],
) -> SFTTrainer:
    """P2: TRL's trainer with its own collator on decoded images, rows in their order; P3: with the tower at rest."""
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(out), train_sampling_strategy="sequential", **SAME, **options),
        train_dataset=rows,
        processing_class=processor,
        peft_config=LoraConfig(
            r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=LANGUAGE_MODEL_LAYERS, task_type="CAUSAL_LM"
        ),
    )
    if at_rest:
        rest_tower(trainer.model)
    return trainer


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
