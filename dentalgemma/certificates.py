"""The certificate of a merged model, and whether it still is about the weights that lie beside it."""

from __future__ import annotations

import json
import math
from pathlib import Path

from data_builders.dataset_folder import hash_file
from data_builders.records import InputError

CERTIFICATE = "merge_certificate.json"
UNRECORDED = "unrecorded"  # the stage of an adapter whose run left no facts
# Where the adapters of all stages lie as one; transformers looks for an adapter in the model folder itself alone.
ADAPTER_FOLDER = "adapter"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


class MergeError(InputError):
    """A merge that must not be used; the message says why."""

    exit_code = 1


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
        MergeError: when there is none, when it failed, or when the weights are no longer those that it is about.
    """
    path = Path(folder) / CERTIFICATE
    if not path.is_file():
        raise MergeError(f"{path} is missing: make the folder with `dentalgemma merge`")
    try:
        certificate = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MergeError(f"{path} is no JSON: {error}; merge again") from error
    if certificate.get("passed") is not True:
        reasons = "; ".join(certificate.get("failures", ())) or "it says of no check that it passed"
        raise MergeError(f"{path}: the merge failed: {reasons}; merge again")
    if certificate.get("files") != hash_weights(Path(folder)):
        raise MergeError(f"{path} is about other weights than those that lie beside it; merge again")
    _check_adapter(certificate, Path(folder) / ADAPTER_FOLDER)
    return certificate


def _check_adapter(certificate: dict, adapter: Path) -> None:
    """The adapter beside the weights may be missing, but not another one."""
    facts = certificate.get("adapter")
    if not adapter.exists() or not isinstance(facts, dict) or "sha256" not in facts:
        return
    weights = adapter / ADAPTER_WEIGHTS
    if not weights.is_file() or hash_file(weights) != facts["sha256"]:
        raise MergeError(f"{weights} is not the adapter that {CERTIFICATE} is about; merge again")
