"""Values that could only waste a run, refused before anything is loaded; the libraries fail on them late, or never."""

from __future__ import annotations

import re
from collections.abc import Callable

from transformers.integrations import INTEGRATION_TO_CALLBACK
from trl import ModelConfig, SFTConfig

from data_builders.records import InputError

Rule = tuple[Callable[[float], bool], str]
POSITIVE: Rule = (lambda value: value > 0, "must be above 0")
NOT_NEGATIVE: Rule = (lambda value: value >= 0, "must not be below 0")
AT_LEAST_ONE: Rule = (lambda value: value >= 1, "must be at least 1")
SHARE: Rule = (lambda value: 0 <= value < 1, "must be at least 0 and below 1")
TRAINING = {
    "learning_rate": POSITIVE,
    "num_train_epochs": POSITIVE,
    "per_device_train_batch_size": AT_LEAST_ONE,
    "per_device_eval_batch_size": AT_LEAST_ONE,
    "gradient_accumulation_steps": AT_LEAST_ONE,
    "max_grad_norm": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "save_total_limit": AT_LEAST_ONE,
    "logging_steps": POSITIVE,
    "eval_steps": POSITIVE,
    "save_steps": POSITIVE,
    "seed": NOT_NEGATIVE,
    "dataloader_num_workers": NOT_NEGATIVE,
}
MODEL = {"lora_r": AT_LEAST_ONE, "lora_alpha": POSITIVE, "lora_dropout": SHARE}
STAGE = {
    "early_stopping_patience": NOT_NEGATIVE,
    "validation_sample": NOT_NEGATIVE,
    "max_row_tokens": AT_LEAST_ONE,
    "pack_questions": AT_LEAST_ONE,
}
CHOICES = {
    "vision_features": ("auto", "cached", "live"),
    "image_fit": (None, "stretch", "pan_and_scan"),
    "memory": ("auto", "fixed"),
}
# What TRL would do to rows, and our collator does not: silence would look like consent.
NOT_HERE = {
    "packing": (True, "use `pack_questions` for rows with images, `pack_texts` for rows without"),
    "padding_free": (True, "use `pack_questions` for rows with images, `pack_texts` for rows without"),
    "assistant_only_loss": (True, "the loss is on the completion alone; leave it out"),
    "completion_only_loss": (False, "the loss is on the completion alone; leave it out"),
}


def check_values(stage: object, training: SFTConfig, model_config: ModelConfig) -> None:
    """Refuse numbers out of their range and options that would be ignored.

    Raises:
        InputError: naming the option, its value and what it must be.
    """
    for settings, rules in ((stage, STAGE), (training, TRAINING), (model_config, MODEL)):
        for name, (holds, words) in rules.items():
            value = getattr(settings, name)
            if value is not None and not holds(value):
                raise InputError(f"{name}: {value} {words}")
    for name, choices in CHOICES.items():
        # argparse checks the command line alone, not the YAML.
        if (value := getattr(stage, name)) not in choices:
            raise InputError(f"{name}: {value}: choose among {', '.join(str(choice) for choice in choices if choice)}")
    for name, (unwanted, words) in NOT_HERE.items():
        if getattr(training, name) is unwanted:
            raise InputError(f"{name}: {str(unwanted).lower()}: {words}")
    unknown = sorted(set(training.report_to) - set(INTEGRATION_TO_CALLBACK) - {"none", "all"})
    if unknown:
        raise InputError(f"report_to: {unknown[0]}: choose among none, {', '.join(sorted(INTEGRATION_TO_CALLBACK))}")
    if not re.fullmatch(r"[\w-]*", stage.stage):
        raise InputError(f"stage: {stage.stage!r}: it names a folder; use letters, digits, _ and -")
