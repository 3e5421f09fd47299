"""Load a vision-language model and its processor, from the Hub or a folder, for recipes and evaluation."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin
from trl import ModelConfig

from data_builders.records import InputError

GATED = "accept its terms on https://huggingface.co/{name} and log in with `hf auth login`"


class LoadError(InputError):
    """A model that cannot be loaded; the message says what to do."""


def load_model(config: ModelConfig) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load what `model_name_or_path` names, in `dtype`, for training.

    Raises:
        LoadError: when it is missing, gated, lacks weights, or carries an adapter instead of a model.
    """
    if config.model_name_or_path is None:
        raise LoadError("no model given: set --model_name_or_path to a Hub id or a folder")
    dtype = config.dtype if config.dtype in {"auto", None} else getattr(torch, config.dtype)
    return load_pretrained(
        config.model_name_or_path,
        dtype=dtype,
        revision=config.model_revision,
        attn_implementation=config.attn_implementation,
    )


def load_pretrained(
    name: str | Path,
    *,
    dtype: torch.dtype | str | None = "auto",
    revision: str | None = None,
    attn_implementation: str | None = None,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a model folder or Hub id as plain transformers users do; see `load_model` for the errors."""
    name = str(name)
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        hint = (
            "an adapter: run `dentalgemma merge` on it first" if (Path(name) / "adapter_config.json").is_file() else ""
        )
        raise LoadError(f"{name} holds no model (no config.json){'; it is ' + hint if hint else ''}")
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            name,
            dtype=dtype,
            revision=revision,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            use_safetensors=True,
        )
        processor = AutoProcessor.from_pretrained(name, revision=revision)
    except OSError as error:
        raise LoadError(_explain(name, error)) from error
    # A key that is not in the files would stay at its random start, and training would go on regardless.
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise LoadError(f"{name}: {len(missing)} weights are missing, for example {missing[0]}")
    return model, processor


def fingerprint_weights(model: torch.nn.Module) -> str:
    """A hash over a sample of every weight tensor: tells models apart that were written to the same folder."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        values = weight.detach().reshape(-1)
        sample = values[:: max(1, values.numel() // 64)][:64].float().cpu()
        digest.update(f"{name} {tuple(weight.shape)}\n".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _explain(name: str, error: OSError) -> str:
    text = str(error)
    if "gated" in text or "401" in text or "403" in text:
        return f"{name} is gated: {GATED.format(name=name)}"
    if Path(name).exists():
        return f"{name}: {text}"
    return f"{name} is neither a folder here nor a model that the Hub would give: {text}"
