"""The certificate of a merged model, and whether it still is about the weights that lie beside it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from data_builders.dataset_folder import hash_file
from data_builders.records import InputError

CERTIFICATE = "merge_certificate.json"
UNRECORDED = "unrecorded"  # the stage of an adapter whose run left no facts
# Where the adapters of all stages lie as one; transformers looks for an adapter in the model folder itself alone.
ADAPTER_FOLDER = "adapter"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# What makes pictures and words into inputs.
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
# What a model folder consists of beside its weights; anything else in a folder is not the model's.
MODEL_FILES = ("config.json", "generation_config.json", *PROCESSOR_FILES)
FINGERPRINT = re.compile(r"[0-9a-f]{16,64}")
SHA256 = re.compile(r"[0-9a-f]{64}")


class MergeError(InputError):
    """A merge that must not be used; the message says why."""

    exit_code = 1


class NoCertificate(MergeError):
    """A folder that no merge wrote was named."""

    exit_code = 2


def write_certificate(folder: Path, certificate: dict) -> None:
    """Write the certificate of a model folder; numbers that are not finite, which JSON lacks, become null."""
    text = json.dumps(_without_nan(certificate), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / CERTIFICATE).write_text(text + "\n", encoding="utf-8")


def _without_nan(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def hash_weights(folder: Path) -> dict[str, str]:
    """SHA-256 of each weight file of a model folder, and of their index; about a second for each gigabyte."""
    return {path.name: hash_file(path) for path in sorted(folder.glob("*.safetensors*"))}


def read_certificate(folder: Path) -> dict:
    """Read the certificate of a merged model that may be used.

    Every byte of the weights is read again: 10 s for the 8.6 GB of MedGemma 4B.

    Raises:
        NoCertificate: when there is none.
        MergeError: when it failed or is damaged, or when the weights are no longer those that it is about.
    """
    path = Path(folder) / CERTIFICATE
    if not path.is_file():
        raise NoCertificate(f"{path} is missing: make the folder with `dentalgemma merge`")
    try:
        certificate = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MergeError(f"{path} is no JSON: {error}; merge again") from error
    if not isinstance(certificate, dict):
        raise MergeError(f"{path} is damaged: it is no JSON object; merge again")
    if certificate.get("passed") is not True:
        failures = certificate.get("failures")
        reasons = "; ".join(map(str, failures if isinstance(failures, list) else ()))
        raise MergeError(f"{path}: the merge failed: {reasons or 'it says of no check that it passed'}; merge again")
    damage = next(_find_damage(certificate), None)
    if damage is not None:
        raise MergeError(f"{path} is damaged: {damage}; merge again")
    if certificate["files"] != hash_weights(Path(folder)):
        raise MergeError(f"{path} is about other weights than those that lie beside it; merge again")
    _check_adapter(certificate, Path(folder) / ADAPTER_FOLDER)
    return certificate


def _find_damage(certificate: Mapping) -> Iterator[str]:
    """What everybody who reads a certificate relies on, and is not there or has another form."""
    if not FINGERPRINT.fullmatch(str(certificate.get("weights"))):
        yield "weights is no fingerprint"
    files = certificate.get("files")
    if not isinstance(files, dict) or not files:
        yield "files names no weights"
    elif not all(isinstance(sha256, str) and SHA256.fullmatch(sha256) for sha256 in files.values()):
        yield "files holds something else than SHA-256 hashes"
    stages = certificate.get("stages")
    if not isinstance(stages, list) or not stages:
        yield "stages is empty"
        return
    for number, stage in enumerate(stages, start=1):
        if not isinstance(stage, dict) or not all(_is_text(stage.get(key)) for key in ("stage", "base_model")):
            yield f"stage {number} does not say what it is, or on which base_model it was trained"
            continue
        sources = stage.get("data_sources") or []
        if not isinstance(sources, list) or not all(
            isinstance(source, dict) and _is_text(source.get("name")) for source in sources
        ):
            yield f"data_sources of stage {number} has a source without a name"
        if not isinstance(stage.get("proof") or {}, dict):
            yield f"the proof of stage {number} is no record of one"


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _check_adapter(certificate: dict, adapter: Path) -> None:
    """The adapter beside the weights may be missing, but not another one."""
    facts = certificate.get("adapter")
    if not adapter.exists() or not isinstance(facts, dict) or "sha256" not in facts:
        return
    weights = adapter / ADAPTER_WEIGHTS
    if not weights.is_file() or hash_file(weights) != facts["sha256"]:
        raise MergeError(f"{weights} is not the adapter that {CERTIFICATE} is about; merge again")
