"""Fold an adapter into its base in fp32, cast once, and prove that the merged model answers as the adapter did."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from PIL import Image
from transformers import ProcessorMixin

from data_builders.records import InputError
from dentalgemma.models.loading import LoadError, fingerprint_weights, load_pretrained
from dentalgemma.training.run_facts import FILE_NAME, read_run_facts, without_folder

CERTIFICATE = "merge_certificate.json"
UNRECORDED = "unrecorded"
DTYPES = ("bfloat16", "float16", "float32")
PARITY_PROMPT = "What abnormalities are visible on this panoramic radiograph, and where?"
# Of the largest logit. fp32 rounding stays below it; a merge that garbles weights is off by whole units.
PARITY_TOLERANCE = 1e-3


class MergeError(InputError):
    """A merge that must not be used; the message says why."""

    exit_code = 1


def merge_adapter(run: Path, out: Path, *, base: str | None = None, dtype: str = "bfloat16") -> dict:
    """Merge the adapter in `run` into its base, write a model folder to `out`, and return the merge certificate.

    The arithmetic is fp32 throughout; `dtype` is what the weights are cast to at the very end. The folder holds
    safetensors, processor, chat template, generation configuration and `merge_certificate.json`, and loads with plain
    transformers.

    Raises:
        MergeError: when nothing changed, or when the merged logits are not the adapter's.
        LoadError: when base or adapter cannot be loaded, or `out` is not empty.
    """
    run, out = Path(run), Path(out)
    if dtype not in DTYPES:
        raise LoadError(f"no dtype {dtype!r} for a merged model; choose among {', '.join(DTYPES)}")
    if out.exists() and any(out.iterdir()):
        raise LoadError(f"{out} is not empty; choose another --out")
    if not (run / "adapter_config.json").is_file():
        raise LoadError(f"{run} holds no adapter (no adapter_config.json)")
    base = base or PeftConfig.from_pretrained(str(run)).base_model_name_or_path
    if base is None:
        raise LoadError(f"{run} does not say which base it adapts; name it with --base")
    model, processor = load_pretrained(base, dtype=torch.float32)
    names = set(model.state_dict())
    adapted = PeftModel.from_pretrained(model, str(run)).eval()
    inputs = _parity_inputs(processor)
    expected = _logits(adapted, inputs)
    changed = _count_changes(adapted)
    merged = adapted.merge_and_unload()
    found = _logits(merged, inputs)
    if set(merged.state_dict()) != names:
        odd = sorted(set(merged.state_dict()) ^ names)
        raise MergeError(f"the merged model has other weights than its base, for example {odd[0]}")
    if not changed:
        raise MergeError(f"the adapter in {run} changes no weight of {base}; did it train?")
    certificate = {
        "base_model": without_folder(str(base)),
        "adapter": run.name,
        "dtype": dtype,
        "tensors": len(names),
        "changed_tensors": changed,
        **_compare_logits(expected, found),
    }
    # Written so that NaN fails: no comparison with it is ever true.
    if not certificate["max_logit_difference"] <= PARITY_TOLERANCE * max(1.0, expected.abs().max().item()):
        raise MergeError(f"merged logits differ from the adapter's by {certificate['max_logit_difference']:.2g}")
    merged.to(getattr(torch, dtype)).save_pretrained(out)
    processor.save_pretrained(out)
    certificate |= _reload(out, inputs, expected)
    certificate["stages"] = _lineage(base, run)
    (out / CERTIFICATE).write_text(json.dumps(certificate, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return certificate


def _lineage(base: str, run: Path) -> list[dict]:
    """The facts of every stage behind a model, the earliest first: those its base carries, then this run's.

    A checkpoint's are those of the run around it. A stage without facts is kept as unrecorded, and has no card.
    """
    path = Path(base) / CERTIFICATE
    earlier = json.loads(path.read_text(encoding="utf-8"))["stages"] if path.is_file() else []
    for folder in (run, run.parent):
        if (folder / FILE_NAME).is_file():
            return [*earlier, read_run_facts(folder) | {"merged_from": run.name}]
    return [*earlier, {"stage": UNRECORDED, "merged_from": run.name, "base_model": without_folder(str(base))}]


def _parity_inputs(processor: ProcessorMixin) -> dict[str, torch.Tensor]:
    picture = Image.linear_gradient("L").convert("RGB")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": PARITY_PROMPT}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


@torch.inference_mode()
def _logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    return model(**cast).logits.float()


def _count_changes(adapted: PeftModel) -> int:
    """How many weights the adapter changes: those whose product of low-rank factors is not zero throughout."""
    layers = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
    return sum(bool(layer.get_delta_weight(name).any()) for layer in layers for name in layer.active_adapters)


def _compare_logits(expected: torch.Tensor, found: torch.Tensor, prefix: str = "") -> dict:
    difference = (expected - found).abs()
    return {
        f"{prefix}max_logit_difference": difference.max().item(),
        f"{prefix}mean_logit_difference": difference.mean().item(),
        f"{prefix}top1_agreement": (expected.argmax(-1) == found.argmax(-1)).float().mean().item(),
    }


def _reload(folder: Path, inputs: dict[str, torch.Tensor], expected: torch.Tensor) -> dict:
    """Load the folder alone, as its users will, and compare again; this includes what the cast lost."""
    model, _ = load_pretrained(folder)
    compared = _compare_logits(expected, _logits(model.eval(), inputs), prefix="reloaded_")
    if not math.isfinite(compared["reloaded_max_logit_difference"]):
        raise MergeError(f"{folder} answers with numbers that are not finite after the cast; use --dtype float32")
    return {**compared, "weights": fingerprint_weights(model)}
