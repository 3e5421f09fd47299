"""Load a vision-language model and its processor, from the Hub or a folder, for recipes and evaluation.

What a stage starts from may be a base (Hub id or folder), a merged model folder, or the adapter of an earlier stage. A
run that started from an adapter keeps copies of all earlier ones, so that it and the base are all that a merge needs:

    <run>/adapter_model.safetensors      what the run itself trained
    <run>/chain/1_vqa/                   the stage before it: adapter_config.json, its weights, run_facts.json
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from functools import lru_cache
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple, TypeVar

import httpx2
import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import PeftConfig
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import cached_file
from transformers.utils.hub import resolve_revision
from trl import ModelConfig

from data_builders.records import InputError
from dentalgemma.adapters import Adapter, check_numbers, read_adapter
from dentalgemma.certificates import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from dentalgemma.models.processors import load_processor, take_image_fit
from dentalgemma.weight_files import open_model

CHAIN = "chain"
# The last for how pictures were fitted, should somebody go on from one of them: see `set_image_fit`.
CHAIN_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, "run_facts.json", "tokenizer_config.json")
WEIGHT_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "chain/**")
GATED = "accept its terms on https://huggingface.co/{name} and log in with `hf auth login`"
ADAPTER_UNDER_ZERO3 = (
    "under ZeRO-3 no process has whole weights to fold an adapter into: `dentalgemma merge` it and start from the "
    "merged model, or use recipes/accelerate/zero2.yaml"
)
SAMPLED = 64  # values of each tensor that go into a fingerprint
Error = TypeVar("Error", bound=BaseException)
# What asking the Hub may raise: its own errors are OSError, those of the network come as the HTTP client has them.
HUB_ERRORS = (OSError, httpx2.HTTPError)


class LoadError(InputError):
    """A model that cannot be loaded; the message says what to do."""


class Start(NamedTuple):
    """What a stage starts from: a base (Hub id or folder), and the adapters to fold into it, the earliest first.

    `revision` is the commit of a base on the Hub, None for a folder.
    """

    base: str
    revision: str | None
    adapters: tuple[Path, ...]


def find_start(name: str | Path, revision: str | None = None) -> Start:
    """Say what a model name stands for: a model, or an adapter with those before it and the base of them all.

    Raises:
        LoadError: when an adapter does not say what it adapts.
    """
    name = str(name)
    folder = _adapter_folder(name, revision)
    if folder is None:
        return Start(name, commit_of(name, revision), ())
    config = PeftConfig.from_pretrained(str(folder))
    if config.base_model_name_or_path is None:
        raise LoadError(f"{name} is an adapter that does not say which base it adapts (base_model_name_or_path)")
    base = str(config.base_model_name_or_path)
    return Start(base, commit_of(base, config.revision), (*earlier_adapters(folder), folder))


@lru_cache(maxsize=16)
def commit_of(name: str, revision: str | None) -> str | None:
    """The commit that a revision of a model on the Hub stands for, asked once; None for a folder.

    transformers 5 no longer notes it in the configuration. Where it cannot be found out, the revision stays as it is.
    """
    if Path(name).is_dir():
        return None
    resolved = resolve_revision(name, revision)
    return getattr(resolved, "resolved", None) or revision


def run_around(adapter: Path) -> Path:
    """The run folder of an adapter: around a checkpoint, else the adapter's own."""
    return adapter.parent if re.fullmatch(r"checkpoint-\d+", adapter.name) else adapter


def earlier_adapters(adapter: Path) -> tuple[Path, ...]:
    """The adapters that a run was started on, the earliest first.

    Raises:
        LoadError: when its chain holds anything else.
    """
    chain = run_around(adapter) / CHAIN
    folders = list(chain.iterdir()) if chain.is_dir() else []
    for folder in folders:
        if not re.match(r"\d+_", folder.name) or not (folder / ADAPTER_CONFIG).is_file():
            raise LoadError(f"{folder} is no adapter: {chain} must hold those of the earlier stages and nothing else")
    return tuple(sorted(folders, key=lambda path: int(path.name.partition("_")[0])))


def keep_chain(start: Start, run: Path) -> None:
    """Copy the adapters that a run starts from into its folder, in place of what was there."""
    unfinished = run / f".{CHAIN}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    for number, adapter in enumerate(start.adapters, start=1):
        folder = unfinished / f"{number}_{stage_name(adapter)}"
        folder.mkdir(parents=True)
        for name in CHAIN_FILES:
            if (adapter / name).is_file():
                shutil.copyfile(adapter / name, folder / name)
    shutil.rmtree(run / CHAIN, ignore_errors=True)
    if start.adapters:
        unfinished.rename(run / CHAIN)


def check_output(start: Start, run: Path) -> None:
    """Refuse to write a run over the adapter it starts from.

    Raises:
        LoadError: naming both.
    """
    run = run.resolve()
    for adapter in (path.resolve() for path in start.adapters):
        if adapter.is_relative_to(run) or run.is_relative_to(adapter):
            raise LoadError(f"output_dir: {run.name} holds the adapter that the run starts from; choose another folder")


def stage_name(adapter: Path) -> str:
    """What the run behind an adapter called its stage, `stage` where that was not recorded."""
    return re.sub(r"\W+", "_", _facts(adapter).get("stage") or "") or "stage"


def load_model(config: ModelConfig) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load what `model_name_or_path` names, in `dtype` or quantised, for training; earlier adapters are folded in.

    The processor is the base's, fitting pictures as the last adapter was trained on them.

    Raises:
        LoadError: when it is missing, gated, lacks weights, or is an adapter of something else.
    """
    from dentalgemma.training.precision import quantization_config

    if config.model_name_or_path is None:
        raise LoadError("no model given: set --model_name_or_path to a Hub id or a folder")
    start = find_start(config.model_name_or_path, config.model_revision)
    if start.adapters and is_deepspeed_zero3_enabled():
        raise LoadError(ADAPTER_UNDER_ZERO3)
    check_sound(start)
    quantization = quantization_config(config)
    if quantization is not None and start.adapters:
        raise LoadError(
            f"{config.model_name_or_path} is an adapter, which cannot be folded into a quantised base: "
            "`dentalgemma merge` it and start from the merged model"
        )
    model, processor = load_pretrained(
        start.base,
        dtype=config.dtype if config.dtype in {"auto", None} else getattr(torch, config.dtype),
        revision=start.revision,
        attn_implementation=config.attn_implementation,
        quantization_config=quantization,
    )
    _check_generation(start.base, model, processor)
    fold_adapters(model, start.adapters)
    if start.adapters:
        take_image_fit(processor, start.adapters[-1])
    return model, processor


def load_pretrained(
    name: str | Path,
    *,
    dtype: torch.dtype | str | None = "auto",
    revision: str | None = None,
    attn_implementation: str | None = None,
    quantization_config: object = None,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a model folder or Hub id as plain transformers users do; see `load_model` for the errors."""
    name = str(name)
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        is_adapter = (Path(name) / ADAPTER_CONFIG).is_file()
        hint = "; it is an adapter: run `dentalgemma merge` on it first" if is_adapter else ""
        raise LoadError(f"{name} holds no model (no config.json){hint}")
    quantised = {} if quantization_config is None else {"quantization_config": quantization_config}
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            name,
            dtype=dtype,
            revision=revision,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            use_safetensors=True,
            **quantised,
        )
        processor = load_processor(name, revision=revision)
    except HUB_ERRORS as error:
        raise LoadError(explain(name, error, revision=revision)) from error
    except InputError:
        raise
    except ValueError as error:  # no model_type, or one that this version of transformers does not know
        raise LoadError(f"{name}: {str(error).splitlines()[0]}") from error
    # A key that is not in the files would stay at its random start, and training would go on regardless.
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise LoadError(f"{name}: {len(missing)} weights are missing, for example {missing[0]}")
    return model, processor


def fold_adapters(model: PreTrainedModel, folders: Sequence[Path]) -> None:
    """Add adapters to the weights of a model in memory: in fp32, each weight rounded once, whatever their number.

    Raises:
        LoadError: when an adapter adapts weights that the model does not have, or of another shape.
    """
    adapters = [read_adapter(folder) for folder in folders]
    weights = dict(model.named_parameters())
    for adapter in adapters:
        _check_fit(adapter, weights)
    for name in sorted({name for adapter in adapters for name in (*adapter.factors, *adapter.replaced)}):
        weight = weights[name].data
        summed = weight.float()
        for adapter in adapters:
            if name in adapter.replaced:
                summed = adapter.file.read(adapter.replaced[name]).float().to(weight.device)
            elif name in adapter.factors:
                summed = summed + adapter.delta(name).to(weight.device)
        weight.copy_(summed)


def check_sound(start: Start) -> None:
    """Refuse to build on what is known to be wrong: a failed merge, a failed proof, an adapter of another base.

    Raises:
        LoadError: naming the folder.
    """
    certificate = Path(start.base) / "merge_certificate.json"
    if certificate.is_file() and json.loads(certificate.read_text(encoding="utf-8")).get("passed") is False:
        raise LoadError(f"{start.base} is a merge whose certificate failed; merge again, or start from the adapter")
    for adapter in start.adapters:
        if _facts(adapter).get("proof", {}).get("passed") is False:
            raise LoadError(
                f"{adapter} did not train what it was told to (proof in its run_facts.json); train it again"
            )
        if not check_numbers(read_adapter(adapter)):
            raise LoadError(f"{adapter} changes no weight; did it train?")
    recorded = {adapter: _facts(adapter).get("base_weights") for adapter in start.adapters}
    if not any(recorded.values()):
        return
    present = fingerprint_files(weights_folder(start.base, start.revision))
    for adapter, weights in recorded.items():
        if weights not in (None, present):
            raise LoadError(
                f"{adapter} is an adapter of another base: it was trained on weights {weights}, {start.base} holds "
                f"{present}"
            )


def _facts(adapter: Path) -> dict:
    path = run_around(adapter) / "run_facts.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _check_fit(adapter: Adapter, weights: dict[str, torch.nn.Parameter]) -> None:
    for name in (*adapter.factors, *adapter.replaced):
        if name not in weights:
            raise LoadError(
                f"{adapter.folder} is an adapter of another base: it adapts {name}, which this one lacks; if it only "
                "has older names, `dentalgemma merge` it and start from the merged model"
            )
        if name in adapter.factors:
            a, b = (adapter.file.tensors[key].shape for key in adapter.factors[name])
            shape = (b[0], a[1])
        else:
            shape = adapter.file.tensors[adapter.replaced[name]].shape
        if tuple(shape) != tuple(weights[name].shape):
            raise LoadError(
                f"{adapter.folder} is an adapter of another base: {name} is {list(shape)} there and "
                f"{list(weights[name].shape)} here"
            )


def weights_folder(name: str | Path, revision: str | None = None) -> Path:
    """The folder with the files of a model: itself, or where the Hub's are cached (downloaded when they are not).

    Raises:
        LoadError: when it is neither a folder nor a model that the Hub would give.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=list(WEIGHT_FILES)))
    except (*HUB_ERRORS, HFValidationError) as error:
        raise LoadError(explain(str(name), error, revision=revision)) from error


def fingerprint_files(folder: Path) -> str:
    """A hash over a sample of every weight tensor in a model's files: key, shape and values, whatever the sharding."""
    lines = []
    for file in open_model(folder):
        for stored in file.tensors.values():
            digest = hashlib.sha256()
            for first in sorted({0, stored.rows // 2, max(stored.rows - 1, 0)}):
                row = file.read_rows(stored, first, min(first + 1, stored.rows)).reshape(-1)
                digest.update(row[:: max(1, row.numel() // SAMPLED)].double().numpy().tobytes())
            lines.append(f"{stored.key} {list(stored.shape)} {digest.hexdigest()}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()[:16]


def fingerprint_weights(model: torch.nn.Module) -> str:
    """A hash over a sample of every weight tensor: tells models apart that were written to the same folder."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        values = weight.detach().reshape(-1)
        sample = values[:: max(1, values.numel() // SAMPLED)][:SAMPLED].float().cpu()
        digest.update(f"{name} {tuple(weight.shape)}\n".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _adapter_folder(name: str, revision: str | None) -> Path | None:
    """The folder of an adapter, downloaded from the Hub if need be, or None for anything else."""
    if Path(name).is_dir():
        return Path(name) if (Path(name) / ADAPTER_CONFIG).is_file() else None
    try:
        found = cached_file(
            name,
            ADAPTER_CONFIG,
            revision=revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except HUB_ERRORS:
        return None  # loading it as a model will say why
    return weights_folder(name, revision) if found else None


def _check_generation(name: str, model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """A model that does not stop at the turn end, or pads with it, would learn and answer without an end."""
    tokenizer = processor.tokenizer
    end = turn_end(processor)
    stops = model.generation_config.eos_token_id
    stops = [stops] if isinstance(stops, int) else stops or []
    if end is not None and end not in stops:
        raise LoadError(
            f"{name}: generation does not stop at {tokenizer.convert_ids_to_tokens(end)!r}: add {end} to "
            "eos_token_id in its generation_config.json"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise LoadError(f"{name}: its tokenizer pads with the end of text; give it a pad token of its own")


def turn_end(processor: ProcessorMixin) -> int | None:
    """The id of the token that ends a turn in Gemma's chat templates, None in another family's."""
    vocabulary = processor.tokenizer.get_vocab()
    return next((vocabulary[token] for token in ("<end_of_turn>", "<turn|>") if token in vocabulary), None)


def explain(name: str, error: BaseException, *, revision: str | None = None, kind: str = "model") -> str:
    """Say in one sentence why the Hub did not give a model (or `kind` dataset), and what to do.

    The cause is told from the errors behind it, never from their words: those of transformers fit no command of ours.
    """
    missing = f"{name} is neither a folder here nor a {kind} that the Hub would give"
    page = f"{'datasets/' if kind == 'dataset' else ''}{name}"
    causes = list(_causes(error))
    if _first(causes, GatedRepoError):
        return f"{name} is gated: {GATED.format(name=page)}"
    if _first(causes, RepositoryNotFoundError):
        return f"{missing}: it does not exist there, or is private and your login may not see it"
    if _first(causes, RevisionNotFoundError):
        return f"{name} has no revision {revision or 'of this name'}: see https://huggingface.co/{page}/tree/main"
    if Path(name).exists():
        return f"{name}: {_one_line(error)}"
    if _first(causes, HFValidationError):
        return f"{missing}: it is written OWNER/NAME there"
    if constants.HF_HUB_OFFLINE or _first(causes, OfflineModeIsEnabled):
        return f"{missing}: the Hub is not asked (HF_HUB_OFFLINE is set), and it was not downloaded before"
    if refusal := _first(causes, HfHubHTTPError):
        status = refusal.response.status_code
        if status == HTTPStatus.UNAUTHORIZED:
            return (
                f"{name}: your token is not valid, or no longer: log in again with `hf auth login`, or unset HF_TOKEN"
            )
        if status == HTTPStatus.FORBIDDEN:
            return f"{name}: your token may not read it: give it that right on https://huggingface.co/settings/tokens"
        return f"{missing}: it answered with {status}; try again later"
    if lost := _first(causes, httpx2.TransportError) or _first(causes, ConnectionError):
        return f"{missing}: the Hub cannot be reached ({_one_line(lost)}); is there a network?"
    return f"{missing}: {_one_line(error)}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first(causes: Sequence[BaseException], kind: type[Error]) -> Error | None:
    return next((cause for cause in causes if isinstance(cause, kind)), None)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
