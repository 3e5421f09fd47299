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
from dentalgemma.training.doctor import Diagnosis

STEPS = 4
SECONDS = 1800
SHORTER = {
    "max_steps": STEPS,
    "eval_strategy": "steps",
    "eval_steps": STEPS // 2,
    "save_strategy": "steps",
    "save_steps": STEPS // 2,
    "logging_steps": 1,
    "gradient_accumulation_steps": 1,
    "validation_sample": 4,
    "dataloader_num_workers": 0,
    "warmup_steps": 0,
    "optim": "adamw_torch",
    "report_to": "none",
    "resume_from_checkpoint": "never",
    "load_in_4bit": "false",
    "load_in_8bit": "false",
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
        InputError: for a family without a small model.
    """
    if family not in FAMILIES:
        raise InputError(f"--rehearse: there is no small model of the family {family!r}, only {', '.join(FAMILIES)}")
    with TemporaryDirectory(prefix="rehearsal-") as folder:
        model, run = Path(folder) / "model", Path(folder) / "run"
        make_tiny_model(model, family=family)
        settings = {"model_name_or_path": model, "output_dir": run, **SHORTER}
        options = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, str(_recipe_of(config)), "--config", str(config), *overrides, *options],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""},
        )
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
