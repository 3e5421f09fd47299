"""A 4-bit copy of a merged model (bitsandbytes NF4), and how alike the two answer.

The weights of the language model's layers are quantised. Vision tower, aligner, embeddings, norms and head stay in
bf16: they are small, or lose most.
"""

from __future__ import annotations

import gc
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import PreTrainedModel
from trl import ModelConfig

from data_builders.records import InputError
from dentalgemma.certificates import CERTIFICATE, MODEL_FILES, hash_weights, read_certificate, write_certificate
from dentalgemma.folding import ModelNames
from dentalgemma.merging import rows_at_hand
from dentalgemma.models.loading import LoadError, fingerprint_weights, load_pretrained
from dentalgemma.models.parts import PARTS, part_of
from dentalgemma.parity import SYNTHETIC, Batch, compare_logits, computing_device, logits, make_batches
from dentalgemma.training.precision import quantization_config
from dentalgemma.weight_files import Stored, WeightFile, open_model

# Of a weight's norm. NF4 in blocks of 64 costs normally distributed weights 0.09; other weights than these, 1 or more.
WEIGHT_ERROR = 0.2
# How much of the logits' variance over the vocabulary must be left. Measured: 0.90 to 0.97 of small models, random and
# trained; 0.43 where the query weights of two layers are exchanged, below 0 where signs or numbers are garbled.
KEPT_VARIANCE = 0.5


class QuantizationError(InputError):
    """A 4-bit model that must not be used; the message says why."""

    exit_code = 1


def quantize_model(model: Path, out: Path, *, rows: str | None = None) -> dict:
    """Write a 4-bit copy of a merged model folder; return its certificate, the merged model's with `quantization`.

    Both models are asked the same: validation rows of the dataset `rows`, or of the run's own where it lies in its
    usual place, else a synthetic picture. `passed` stays true only where every number is accounted for: each quantised
    weight lies within `WEIGHT_ERROR` of the merged model's, all others are equal to it, and the 4-bit model's logits
    keep `KEPT_VARIANCE` of the variance of the merged model's. That catches garbled models. Whether the answers are
    still good enough is for `evaluate` and `compare` to say. The folder loads with plain transformers.

    Raises:
        QuantizationError: when a check failed; the certificate that says so lies in `out`.
        MergeError: when `model` is no merged model (NoCertificate), or its certificate is not valid.
        InputError: when it is quantised already, or bitsandbytes is not installed.
        LoadError: when `out` is not empty.
    """
    model, out = Path(model), Path(out)
    if find_spec("bitsandbytes") is None:
        raise InputError('4-bit weights need bitsandbytes: pip install "dentalgemma[bnb]"')
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LoadError(f"{out} is not empty; choose another --out")
    certificate = read_certificate(model)
    if "quantization" in certificate:
        raise InputError(f"{model} is quantised already; give the merged model that it was made from")
    unfinished = out.absolute().parent / f".{out.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)  # of a command that was killed
    try:
        unfinished.mkdir(parents=True)
        _write_model(model, unfinished)
        certificate |= _certify(model, unfinished, certificate, rows or rows_at_hand(certificate["stages"]))
        write_certificate(unfinished, certificate)
        if out.exists():
            out.rmdir()
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    if not certificate["passed"]:
        raise QuantizationError(f"{out} must not be used: {'; '.join(certificate['failures'])} (see its {CERTIFICATE})")
    return certificate


def _write_model(model: Path, out: Path) -> None:
    """Quantise while loading, and save before anything is computed: a forward pass on a CPU packs weights anew."""
    wanted = ModelConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", use_bnb_nested_quant=True, dtype="bfloat16")
    config = quantization_config(wanted)
    # transformers takes the patterns, servers that go by the parts of a module's path (vLLM) the bare names.
    names = [name for part, modules in PARTS.items() if part != "language_model" for name in modules]
    config.llm_int8_skip_modules = [*config.llm_int8_skip_modules, *names]
    quantised, _ = load_pretrained(model, dtype=torch.bfloat16, quantization_config=config)
    quantised.save_pretrained(out)
    for name in MODEL_FILES:
        if name != "config.json" and (model / name).is_file():
            shutil.copyfile(model / name, out / name)


def _certify(model: Path, out: Path, certificate: dict, rows: str | None) -> dict:
    """What is new in the certificate of the 4-bit folder `out`; the two models are never in memory at once."""
    gc.collect()
    before, processor = load_pretrained(model)
    batches, described = make_batches(processor, rows)
    expected = _ask(before, batches)
    del before
    gc.collect()
    after, _ = load_pretrained(out)
    weights = fingerprint_weights(after)
    facts, failures = _compare_weights(model, after)
    found = logits(after.eval(), batches)
    parity = _compare_answers(expected, found)
    if not parity["kept_variance"] >= KEPT_VARIANCE:  # NaN fails
        failures.append(
            f"the 4-bit model's logits keep {parity['kept_variance']:.0%} of the merged model's variance, not "
            f"{KEPT_VARIANCE:.0%}"
        )
    quantization = {
        "method": "bitsandbytes nf4",
        "double_quantization": True,
        "compute_dtype": "bfloat16",
        "source_weights": certificate["weights"],
        "parity_inputs": described,
        **parity,
        **facts,
        "bytes_before": _size(model),
        "bytes_after": _size(out),
        "versions": {name: version(name) for name in ("bitsandbytes", "torch", "transformers")},
    }
    doubts = [f"merged and 4-bit model were compared on {SYNTHETIC} alone: name a dataset with --rows"]
    return {
        "passed": not failures,
        "failures": failures,
        "warnings": certificate["warnings"] + (doubts if rows is None else []),
        "weights": weights,
        "files": hash_weights(out),
        "adapter": {"left_out": "it lies beside the 16-bit weights that this model was made from"},
        "quantization": quantization,
    }


def _ask(model: PreTrainedModel, batches: Sequence[Batch]) -> list[torch.Tensor]:
    return logits(model.to(computing_device(model)).eval(), batches)


def _compare_answers(expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> dict:
    """Figures over all positions: logits, most likely tokens, divergence in nats for each token.

    `kept_variance` is 1 less the variance of the error over that of the logits, both around the mean over the
    vocabulary, since a constant added to all logits changes no answer.
    """
    figures = compare_logits(expected, found)
    figures["same_token_share"] = figures.pop("top1_agreement")
    divergence, error, signal = [], 0.0, 0.0
    for before, after in zip(expected, found, strict=True):
        p, q = before.log_softmax(-1), after.log_softmax(-1)
        divergence.append((p.exp() * (p - q)).sum(-1))
        before, after = (answer - answer.mean(-1, keepdim=True) for answer in (before, after))
        error += (after - before).square().sum(dtype=torch.float64).item()
        signal += before.square().sum(dtype=torch.float64).item()
    return {
        "tokens": sum(len(answer) for answer in expected),
        **figures,
        "mean_divergence": torch.cat(divergence).mean().item(),
        "kept_variance": 1 - error / signal if signal else math.nan,
    }


def _compare_weights(model: Path, quantised: PreTrainedModel) -> tuple[dict, list[str]]:
    """Compare every tensor of the merged model's files with what the 4-bit folder was loaded as."""
    files = open_model(model)
    stored = {key: (file, tensor) for file in files for key, tensor in file.tensors.items()}
    names = ModelNames(model, [tensor for _, tensor in stored.values()])
    loaded = dict(quantised.named_parameters(remove_duplicate=False)) | dict(quantised.named_buffers())
    errors, kept, failures = {}, Counter(), []
    for name, key in names.keys.items():
        if name not in loaded:
            failures.append(f"{name} is not in the 4-bit model")
        elif (state := getattr(loaded[name], "quant_state", None)) is not None:
            errors[name] = _weight_error(*stored[key], loaded[name], state)
        else:
            kept[part_of(name)] += 1
            if not _is_kept(*stored[key], loaded[name]):
                failures.append(f"{name} is not the merged model's, though it is not quantised")
    wrong = [name for name, error in errors.items() if not error <= WEIGHT_ERROR]  # NaN is wrong
    failures += [f"{name} is {errors[name]:.0%} of its norm off" for name in wrong[:3]]
    if not errors:
        failures.append("no weight was quantised")
    facts = {
        "quantized_tensors": dict(sorted(Counter(part_of(name) for name in errors).items())),
        "kept_tensors": dict(sorted(kept.items())),  # in bf16
        "weight_error": {"mean": sum(errors.values()) / max(1, len(errors)), "max": max(errors.values(), default=0.0)},
        "not_compared": sorted(names.converted),
    }
    return facts, failures


def _weight_error(file: WeightFile, stored: Stored, weight: torch.Tensor, state: object) -> float:
    from bitsandbytes.functional import dequantize_4bit

    before = file.read(stored.key).float()
    after = dequantize_4bit(weight.data, state).float().cpu()
    if after.shape != before.shape:
        return math.inf
    return ((after - before).norm() / before.norm().clamp(min=1e-30)).item()


def _is_kept(file: WeightFile, stored: Stored, weight: torch.Tensor) -> bool:
    """Whether a tensor is the file's, cast to the type that it was loaded in; piece by piece."""
    if tuple(weight.shape) != stored.shape:
        return False
    rows = weight.detach().reshape(stored.rows, stored.width)
    return all(
        torch.equal(rows[first:last].cpu(), file.read_rows(stored, first, last).to(weight.dtype))
        for first, last in stored.pieces()
    )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
