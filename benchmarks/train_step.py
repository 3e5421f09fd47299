"""What a training step costs: ours beside the usual ones, on the same rows and trained weights.

    python benchmarks/train_step.py --mode flops --json
    python benchmarks/train_step.py --mode cpu --out benchmarks/results/train_step_cpu.json
    python benchmarks/train_step.py --mode cpu --full-stage --seeds 0 1 2
    python benchmarks/train_step.py --mode gpu --out benchmarks/results/train_step_gpu.json
    python benchmarks/train_step.py --mode gpu --size small --device cpu      # tries the script out

P1 is TRL's Gemma 3 example, P2 LoRA on the language model as TRL runs it, P3 the same with the frozen tower at rest;
ours reads the tower's features from the cache and, packed, shows an image once for its questions.

`flops` counts operations on the true 4B architecture without weights: a minute on any machine, the same on all. `cpu`
compares losses and gradients on a scaled model, and with `--full-stage` whole stages: validation loss and processor
time. `gpu` measures rows per second and peak memory on the true architecture with random weights.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from report import make_report, write_report

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=("flops", "cpu", "gpu"), required=True)
    parser.add_argument("--full-stage", action="store_true", help="cpu: train whole stages too")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="cpu: of the whole stages")
    parser.add_argument("--phantoms", type=int, default=40, help="cpu: pictures of the whole stages")
    parser.add_argument("--epochs", type=int, default=3, help="cpu: of the whole stages")
    parser.add_argument("--size", choices=("4b", "small"), default="4b", help="gpu: small tries the script out")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="gpu: where it runs")
    parser.add_argument("--repeats", type=int, default=3, help="gpu: measurements of each way, in turns")
    parser.add_argument("--steps", type=int, default=4, help="gpu: steps of each measurement")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="gpu: of the data loaders")
    parser.add_argument("--json", action="store_true", help="print JSON for another program")
    parser.add_argument("--out", type=Path, help="where to write all figures as JSON")
    asked = parser.parse_args()
    results, measures, headline, hardware = run(asked, parser)
    report = make_report(
        f"train_step {asked.mode}",
        results,
        measures=measures,
        headline=headline,
        packages=PACKAGES,
        hardware=hardware,
    )
    write_report(report, out=asked.out, as_json=asked.json)
    for line in results.get("failed", ()):
        print(line, file=sys.stderr)
    sys.exit(1 if results.get("failed") else 0)


def run(asked: argparse.Namespace, parser: argparse.ArgumentParser) -> tuple[dict, str, str, str]:
    """Results, what they measure, the figures in a line, and the hardware where it is more than a CPU."""
    if asked.mode == "flops":
        return run_flops()
    with tempfile.TemporaryDirectory() as folder:
        return run_cpu(asked, Path(folder)) if asked.mode == "cpu" else run_gpu(asked, parser, Path(folder))


def run_flops() -> tuple[dict, str, str, str]:
    from step_flops import describe_flops, measure_flops

    results = measure_flops()
    return results, "operations of a training step on the 4B architecture", describe_flops(results), ""


def run_cpu(asked: argparse.Namespace, folder: Path) -> tuple[dict, str, str, str]:
    from step_cpu import describe_cpu_mode, measure_cpu

    seeds = asked.seeds if asked.full_stage else []
    results = measure_cpu(folder, phantoms=asked.phantoms, epochs=asked.epochs, seeds=seeds)
    measures = "gradients, and a whole stage 1, of ours beside TRL's trainer on a scaled model"
    return results, measures, describe_cpu_mode(results), ""


def run_gpu(asked: argparse.Namespace, parser: argparse.ArgumentParser, folder: Path) -> tuple[dict, str, str, str]:
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # of several, the trainers would use all at once
    import torch

    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here; --size small --device cpu tries the script out")
    from step_gpu import describe_gpu_mode, find_slow, make_case, measure_gpu

    case = make_case(folder, size=asked.size, device=asked.device, workers=asked.workers)
    results = measure_gpu(case, repeats=asked.repeats, steps=asked.steps)
    if asked.size == "4b":
        results["failed"] = find_slow(results)
    hardware = f"one {torch.cuda.get_device_name()}" if case.on_gpu else ""
    return (
        results,
        f"training on the {asked.size} architecture, encoding included",
        describe_gpu_mode(results),
        hardware,
    )


if __name__ == "__main__":
    main()
