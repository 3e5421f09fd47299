"""Both stages on the true architecture with random weights: does it train on this GPU, and in the memory foretold?

    python benchmarks/gpu_check.py --out benchmarks/results/gpu_check.json

Writes a Gemma 3 4B (MedGemma's architecture) with random bf16 weights, 8.6 GB, draws phantoms, trains stage 1 and stage
2 by their recipes for 20 steps each, merges both adapters and loads the result. The peak memory of each stage is held
against what `dentalgemma doctor` estimates for it; more than 15 % apart fails. `--size small` is the same on the small
model, for trying this script out on a CPU, where there is no memory of a GPU to compare.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from data_builders.instruct import build_instruct
from data_builders.phantom_formats import write_phantoms
from data_builders.sources import load_sources
from data_builders.vqa import build_vqa
from dentalgemma.merging import merge_adapter
from dentalgemma.models.processors import load_processor
from dentalgemma.models.tiny import make_tiny_model
from dentalgemma.quickstart import recipes_folder
from dentalgemma.training.doctor import diagnose
from dentalgemma.training.run_facts import describe_environment, read_run_facts

ALLOWED = 0.15  # of the peak
TEXT = {
    "vocab_size": 262_208,
    "hidden_size": 2560,
    "intermediate_size": 10_240,
    "num_hidden_layers": 34,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 1024,
    "max_position_embeddings": 131_072,
}
VISION = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 896,
    "patch_size": 14,
    "vision_use_head": False,
}


def write_base(folder: Path, size: str) -> None:
    """The small model, or one of the true architecture around its tokenizer."""
    make_tiny_model(folder)
    if size == "small":
        return
    processor = load_processor(folder)
    tokenizer = processor.tokenizer
    config = Gemma3Config(
        text_config=TEXT,
        vision_config=VISION,
        mm_tokens_per_image=256,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    config.rehearsal = True
    generation = Gemma3ForConditionalGeneration.from_pretrained(folder).generation_config
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Gemma3ForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=1152**-0.5)
    model.generation_config = generation
    model.save_pretrained(folder)
    processor.image_processor.size = {"height": 896, "width": 896}
    processor.image_seq_length = 256
    processor.save_pretrained(folder)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("4b", "small"), default="4b")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, help="where the JSON goes; else it is printed")
    parser.add_argument("--folder", type=Path, help="where models and runs are written; else a temporary folder")
    settings = parser.parse_args()
    if settings.size == "4b" and not torch.cuda.is_available():
        parser.error("no GPU here; --size small tries the script out on a CPU")
    with tempfile.TemporaryDirectory() as temporary:
        folder = settings.folder or Path(temporary)
        write_base(folder / "base", settings.size)
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
    result = {
        "command": " ".join(["python", "benchmarks/gpu_check.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "size": settings.size,
        "environment": describe_environment(),
        "estimate_against_peak": differences,
        "stages": stages,
        "certificate": {key: certificate[key] for key in kept},
    }
    text = json.dumps(result, indent=2) + "\n"
    if settings.out:
        settings.out.write_text(text, encoding="utf-8")
    else:
        print(text)
    if any(difference is not None and abs(difference) > ALLOWED for difference in differences.values()):
        sys.exit(f"the estimate is more than {ALLOWED:.0%} from the peak: {differences}")


if __name__ == "__main__":
    main()
