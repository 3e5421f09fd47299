"""Memory and time of folding an adapter into a model, beside loading that model whole.

    python benchmarks/merge.py --megabytes 1000 --out benchmarks/results/merge.json

Writes a random bf16 Gemma 3 of that size with an adapter on every layer of its language model. Folding, the second
reading of every tensor, and loading as plain transformers users do each run in a process of their own that starts with
everything imported; what it takes beyond that is measured (peak of resident memory).
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from pathlib import Path

import torch
from peft import LoraConfig
from report import make_report, write_report
from safetensors.torch import save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

from dentalgemma.adapters import read_adapter
from dentalgemma.folding import fold, inspect_fold, plan_updates
from dentalgemma.weight_files import open_model

HIDDEN = 1024
VOCABULARY = 32_768
LAYER_MB = 31  # of the language model, in bf16
RANK = 16
SHARD = "400MB"


def write_model(folder: Path, megabytes: int) -> None:
    """A random Gemma 3 of about that size in bf16, in shards."""
    layers = max(1, round((megabytes - 2 * VOCABULARY * HIDDEN / 1e6) / LAYER_MB))
    config = Gemma3Config(
        text_config=Gemma3TextConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=4 * HIDDEN,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=HIDDEN // 8,
        ),
        vision_config=SiglipVisionConfig(
            hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vision_use_head=False
        ),
    )
    torch.set_default_dtype(torch.bfloat16)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder, max_shard_size=SHARD)


def write_adapter(model: Path, folder: Path) -> None:
    """An adapter with small random updates on each linear layer of the language model."""
    LoraConfig(r=RANK, lora_alpha=RANK, target_modules=r".*language_model.*_proj").save_pretrained(folder)
    tensors = {}
    for file in open_model(model):
        for key, stored in file.tensors.items():
            if "language_model" in key and key.endswith("_proj.weight"):
                module = f"base_model.model.{key.removesuffix('.weight')}"
                tensors[f"{module}.lora_A.weight"] = torch.randn(RANK, stored.shape[1])
                tensors[f"{module}.lora_B.weight"] = torch.randn(stored.shape[0], RANK) * 1e-4
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def fold_model(model: Path, adapter: Path, out: Path) -> None:
    """What `dentalgemma merge` does with files."""
    files = open_model(model)
    updates = plan_updates(model, files, [read_adapter(adapter)])
    out.mkdir()
    fold(files, updates, out, torch.bfloat16)
    _, failures = inspect_fold(files, updates, out, torch.bfloat16)
    if failures:
        raise SystemExit("; ".join(failures))


def load_model(model: Path) -> None:
    """What everybody does."""
    loaded = Gemma3ForConditionalGeneration.from_pretrained(model, dtype="auto")
    # Every page is touched: a part of a memory map that nobody reads takes no memory.
    if sum(parameter.view(-1)[::1024].float().sum().item() for parameter in loaded.parameters()) == 0:
        raise SystemExit("a model of zeros")


def measure(job: Callable, *arguments: Path | int) -> dict[str, float]:
    """Run `job` in a process of its own: MB beyond what the imports take, and seconds."""
    context = get_context("fork")  # imports are done once; a child's peak begins with what it was given
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        before, start = _peak(), time.perf_counter()
        job(*arguments)
        sender.send({"mb": _peak() - before, "seconds": time.perf_counter() - start})

    child = context.Process(target=run)
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise SystemExit(f"{job.__name__} failed") from None
    finally:
        child.join()


def _peak() -> float:
    """Peak of resident memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def main() -> None:
    """Write a model, measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--folder", type=Path, help="where the model is written; a temporary folder otherwise")
    parser.add_argument("--json", action="store_true", help="print JSON for another program")
    parser.add_argument("--out", type=Path, help="where to write all figures as JSON")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        folder = Path(name)
        model, adapter = folder / "model", folder / "adapter"
        measure(write_model, model, asked.megabytes)
        measure(write_adapter, model, adapter)
        size = sum(path.stat().st_size for path in model.glob("*.safetensors")) / 1e6
        folded, loaded = measure(fold_model, model, adapter, folder / "out"), measure(load_model, model)
    results = {
        "model_mb": size,
        "fold_mb": folded["mb"],
        "fold_seconds": folded["seconds"],
        "load_mb": loaded["mb"],
        "load_seconds": loaded["seconds"],
        "ratio": folded["mb"] / loaded["mb"],
    }
    report = make_report(
        "merge",
        results,
        measures="memory and time of folding an adapter, beside loading the model whole",
        headline=describe(results),
        packages=("torch", "transformers", "peft"),
    )
    write_report(report, out=asked.out, as_json=asked.json)


def describe(results: Mapping[str, float]) -> str:
    """The figures in a line."""
    return (
        f"a model of {results['model_mb']:,.0f} MB: folding and inspecting takes {results['fold_mb']:,.0f} MB and "
        f"{results['fold_seconds']:.1f} s, loading it whole {results['load_mb']:,.0f} MB and "
        f"{results['load_seconds']:.1f} s"
    )


if __name__ == "__main__":
    main()
