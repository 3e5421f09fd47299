"""Both stages on the true architecture with random weights: does it train on this GPU, and in the memory foretold?

    python benchmarks/gpu_check.py --out benchmarks/results/gpu_check.json

Writes a Gemma 3 4B (MedGemma's architecture) with random bf16 weights, 8.6 GB, draws phantoms, trains stage 1 and stage
2 by their recipes for 20 steps each, merges both adapters and loads the result. The peak memory of each stage is held
against what `dentalgemma doctor` estimates for it; more than 15 % apart fails. `--size small` is the same on the small
model, for trying this script out on a CPU, where there is no memory of a GPU to compare.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from architectures import write_gemma3_4b
from report import make_report, write_report

from data_builders.instruct import build_instruct
from data_builders.phantom_formats import write_phantoms
from data_builders.sources import load_sources
from data_builders.vqa import build_vqa
from dentalgemma.merging import merge_adapter
from dentalgemma.models.tiny import make_tiny_model
from dentalgemma.quickstart import recipes_folder
from dentalgemma.training.doctor import diagnose
from dentalgemma.training.run_facts import read_run_facts

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")
ALLOWED = 0.15  # of the peak


def write_data(folder: Path) -> None:
    """Phantoms and cases, built into both datasets."""
    write_phantoms(folder / "phantoms", count=60, cases=120, seed=0, formats=("yolo",), progress=False)
    build_vqa(load_sources(folder / "phantoms" / "sources.yaml"), folder / "vqa", progress=False)
    build_instruct(load_sources(folder / "phantoms" / "cases.yaml"), folder / "instruct")


def run_stage(recipe: str, start: Path, data: Path, out: Path, steps: int) -> dict:
    """Train one stage by its recipe, and what the doctor had said of it."""
    options = {
        "--model_name_or_path": start,
        "--dataset_name": data,
        "--output_dir": out,
        "--feature_cache": out.parent / "features",  # not among the user's own
        "--max_steps": steps,
        "--eval_steps": steps,
        "--save_steps": steps,
        "--validation_sample": 8,
        "--learning_rate": 2e-3,  # so that a few steps change more than bf16 rounds away
    }
    arguments = [str(part) for option in options.items() for part in option]
    script = recipes_folder() / f"{recipe}.py"
    memory = diagnose(script.with_suffix(".yaml"), arguments, first_loss=False).facts["memory"]["bytes"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    subprocess.run([*launcher, str(script), *arguments], check=True)
    facts = read_run_facts(out)
    trained = {key: facts[key] for key in ("steps", "seconds", "losses", "proof", "hardware", "parts")}
    return {
        **trained,
        # PyTorch does not count what CUDA itself takes.
        "estimated_peak": memory["total"] - memory["context"],
        "measured_peak": facts["hardware"].get("peak_gpu_memory"),
    }


def compare(stage: dict) -> float | None:
    """How far the estimate is from the peak, as a share of the peak; None without a GPU."""
    peak = stage["measured_peak"]
    return None if peak is None else (stage["estimated_peak"] - peak) / peak


def describe(results: dict) -> str:
    """The figures in a line."""
    certificate = "passed" if results["certificate"]["passed"] else "failed"
    parts = [f"the merge {certificate}"]
    for name, difference in results["estimate_against_peak"].items():
        parts.append(
            f"{name} estimated {difference:+.0%} from its peak" if difference is not None else f"{name} trains"
        )
    return ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("4b", "small"), default="4b")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print JSON for another program")
    parser.add_argument("--out", type=Path, help="where to write all figures as JSON")
    parser.add_argument("--folder", type=Path, help="where models and runs are written; else a temporary folder")
    settings = parser.parse_args()
    if settings.size == "4b" and not torch.cuda.is_available():
        parser.error("no GPU here; --size small tries the script out on a CPU")
    with tempfile.TemporaryDirectory() as temporary:
        folder = settings.folder or Path(temporary)
        (write_gemma3_4b if settings.size == "4b" else make_tiny_model)(folder / "base")
        write_data(folder)
        stages = {
            "stage1_vqa": run_stage("stage1_vqa", folder / "base", folder / "vqa", folder / "1", settings.steps),
            "stage2_instruct": run_stage(
                "stage2_instruct", folder / "1", folder / "instruct", folder / "2", settings.steps
            ),
        }
        certificate = merge_adapter(folder / "2", folder / "merged", rows=str(folder / "vqa"))
    kept = ("passed", "tensors", "changed_tensors", "rounding", "top1_agreement", "reloaded_top1_agreement")
    differences = {name: compare(stage) for name, stage in stages.items()}
    results = {
        "size": settings.size,
        "estimate_against_peak": differences,
        "stages": stages,
        "certificate": {key: certificate[key] for key in kept},
    }
    report = make_report(
        "gpu_check",
        results,
        measures="peak memory of both stages against the doctor's estimate, merge and reload",
        headline=describe(results),
        packages=PACKAGES,
        hardware=f"one {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "",
    )
    write_report(report, out=settings.out, as_json=settings.json)
    if any(difference is not None and abs(difference) > ALLOWED for difference in differences.values()):
        sys.exit(f"the estimate is more than {ALLOWED:.0%} from the peak: {differences}")


if __name__ == "__main__":
    main()
