"""A few steps of the recipe itself on the small model of the same family, with the user's rows and settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from data_builders.records import InputError
from dentalgemma.models.tiny import FAMILIES, make_tiny_model
from dentalgemma.quickstart import recipes_folder
from dentalgemma.training.config import read_stage
from dentalgemma.training.doctor import Diagnosis

STEPS = 4
SECONDS = 1800
ASKED = 4  # validation rows
ASKED_AT_MOST = 64  # where one of their metrics chooses the best step, and fewer might have no case of it
BY_LOSS = ("loss", "mean_token_accuracy")  # measured without asking
SHORTER = {
    "max_steps": STEPS,
    "eval_strategy": "steps",
    "eval_steps": STEPS // 2,
    "save_strategy": "steps",
    "save_steps": STEPS // 2,
    "logging_steps": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "warmup_steps": 0,
    "optim": "adamw_torch",
    "report_to": "none",
    "resume_from_checkpoint": "never",
    "gate_questions": "null",  # what a few steps on another model forget says nothing
    "gate_before": "null",
    "load_in_4bit": "false",
    "load_in_8bit": "false",
    "memory": "fixed",
    "attn_implementation": "sdpa",
    "use_cpu": "true",
    "bf16": "false",
    "fp16": "false",
    "dtype": "float32",
    "disable_tqdm": "true",
}


def rehearse(config: Path, overrides: Sequence[str], family: str) -> dict:
    """Run the recipe for a few steps and say what it recorded: `passed`, steps, losses, the proof of what trained.

    The batch stays as it is; accumulation, length of the run and precision are cut to what a CPU does in a minute.
    Nothing is left behind.

    Raises:
        InputError: for a family without a small model, or a configuration that cannot be read.
    """
    if family not in FAMILIES:
        raise InputError(f"--rehearse: there is no small model of the family {family!r}, only {', '.join(FAMILIES)}")
    asking = _asked(config, overrides)
    with TemporaryDirectory(prefix="rehearsal-") as folder:
        model, run = Path(folder) / "model", Path(folder) / "run"
        make_tiny_model(model, family=family)
        places = {"model_name_or_path": model, "output_dir": run, "feature_cache": Path(folder) / "features"}
        settings = {**places, **SHORTER, **asking}
        options = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
        started = time.monotonic()
        try:
            done = subprocess.run(
                [sys.executable, str(_recipe_of(config)), "--config", str(config), *overrides, *options],
                capture_output=True,
                text=True,
                timeout=SECONDS,
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""},
            )
        except subprocess.TimeoutExpired:
            error = f"{STEPS} steps did not end within {SECONDS} seconds: rehearse with a smaller batch or fewer rows"
            return {"passed": False, "seconds": SECONDS, "error": error}
        seconds = time.monotonic() - started
        if done.returncode != 0 or not (run / "run_facts.json").is_file():
            return {"passed": False, "seconds": seconds, "error": _last_words(done.stderr, folder)}
        facts = json.loads((run / "run_facts.json").read_text(encoding="utf-8"))
        proof = facts.get("proof") or {}
        return {
            "passed": bool(proof.get("passed", True)),
            "seconds": round(seconds, 1),
            "steps": facts["steps"],
            "losses": [entry["loss"] for entry in facts["losses"]["train"]],
            "validation_losses": [entry["loss"] for entry in facts["losses"]["validation"]],
            "proof": proof,
        }


def _asked(config: Path, overrides: Sequence[str]) -> dict[str, object]:
    """How many validation rows are asked: a few, or the user's own sample where it measures what chooses the best step.

    A sample too large for a CPU is cut, and the loss chooses instead.
    """
    stage, training, _ = read_stage(config, ["--config", str(config), *overrides], elsewhere=True)
    metric = (training.metric_for_best_model or "loss").removeprefix("eval_")
    if metric in BY_LOSS or not stage.validation_sample:
        return {"validation_sample": min(ASKED, stage.validation_sample)}
    if stage.validation_sample <= ASKED_AT_MOST:
        return {"validation_sample": stage.validation_sample}
    return {"validation_sample": ASKED, "metric_for_best_model": "eval_loss", "greater_is_better": "false"}


def add_rehearsal(found: Diagnosis, config: Path, overrides: Sequence[str]) -> None:
    """Rehearse what was diagnosed, unless something stands against it already."""
    if not found.sound or "family" not in found.facts:
        found.unchecked.append("the rehearsal: first mend what is refused")
        return
    with found.refusing():
        rehearsal = rehearse(config, overrides, found.facts["family"])
        found.facts["rehearsal"] = rehearsal
        if not rehearsal["passed"]:
            proof = rehearsal.get("proof") or {}
            raise InputError(f"the rehearsal failed: {rehearsal.get('error') or _failed(proof)}")


def _failed(proof: dict) -> str:
    counts = {key: len(value) for key, value in proof.items() if isinstance(value, list) and value}
    return "the proof of what trained did not pass: " + ", ".join(f"{key} {count}" for key, count in counts.items())


def _recipe_of(config: Path) -> Path:
    """The script beside a configuration, or stage 1's: they differ in their configuration alone."""
    beside = config.with_suffix(".py")
    return beside if beside.is_file() else recipes_folder() / "stage1_vqa.py"


def _last_words(output: str, folder: str) -> str:
    lines = [line for line in output.replace(folder, "REHEARSAL").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
