"""Fold an adapter, and all that it was trained on top of, into its base once; and certify what came out.

Nothing that was merged is taken on trust: every tensor is read again and compared with the base, every update with
PEFT's own, and the folder, loaded alone, must answer as the adapters did. A folder whose certificate failed gets no
card and is not pushed.
"""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError
from transformers import ProcessorMixin

from data_builders.dataset_folder import hash_file
from data_builders.records import InputError
from dentalgemma.adapters import Adapter, check_numbers, read_adapter
from dentalgemma.certificates import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CERTIFICATE,
    MODEL_FILES,
    UNRECORDED,
    MergeError,
    hash_weights,
    read_certificate,
    write_certificate,
)
from dentalgemma.evaluation.files import without_folder
from dentalgemma.folding import COSINE_WARNING, Update, check_space, fold, inspect_fold, plan_updates
from dentalgemma.models.loading import LoadError, Start, find_start, fingerprint_files, run_around, weights_folder
from dentalgemma.models.processors import load_processor, take_image_fit, write_image_fit
from dentalgemma.parity import SYNTHETIC, Answers, Reference, ask_merged, ask_reference, compare_logits, make_batches
from dentalgemma.stacking import stack_adapters
from dentalgemma.training.run_facts import FILE_NAME, facts_of
from dentalgemma.weight_files import open_model

DTYPES = ("bfloat16", "float16", "float32")
PREPROCESSOR = "preprocessor_config.json"
# Of the largest logit. Rounding stays below it; a merge that garbles weights is off by whole units.
PARITY_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
# Of the adapter's own effect on the logits: rounding may cost part of it, and is warned of earlier. A lost adapter is
# as far off as the base, a garbled one farther.
NEARER_THAN_BASE = 0.75
# Share of the adapted tensors that may lie below COSINE_WARNING without a word.
TENSORS_BELOW = 0.1
# Both multiply the same factors in fp32, in another order.
PEFT_TOLERANCE = 1e-4


def merge_adapter(
    run: str | Path, out: Path, *, base: str | None = None, dtype: str = "bfloat16", rows: str | None = None
) -> dict:
    """Fold the adapter `run`, after those in its `chain`, into its base, once; write a model folder.

    Returns its certificate.

    `run` is a run folder, a checkpoint in one, or an adapter on the Hub. The arithmetic is fp32 throughout; `dtype` is
    what the weights are cast to at the very end. `rows` names a dataset whose validation rows the merged model must
    answer as the adapters did; without it the run's own is taken where it lies in its usual place, and where it does
    not, the certificate warns that a synthetic picture had to do. The folder appears under its name only when it is
    complete, and loads with plain transformers. In it lies `adapter/`: all adapters as one, see `stacking`.

    Raises:
        MergeError: when nothing changed, or when the certificate failed; in the latter case it lies in `out`.
        InputError: when adapter and base do not belong together, or cannot be folded with a proof.
        LoadError: when base or adapter cannot be loaded, or `out` is not empty.
    """
    out = Path(out)
    if dtype not in DTYPES:
        raise LoadError(f"no dtype {dtype!r} for a merged model; choose among {', '.join(DTYPES)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LoadError(f"{out} is not empty; choose another --out")
    if Path(run).is_dir() and not (Path(run) / ADAPTER_CONFIG).is_file():
        raise LoadError(f"{run} holds no adapter (no adapter_config.json)")
    start = find_start(run)
    if not start.adapters:
        raise LoadError(f"{run} holds no adapter; a merge needs a run folder, or the Hub id of one")
    folder = _base_folder(base, start)
    adapters = [read_adapter(adapter) for adapter in start.adapters]
    name = without_folder(str(base or start.base))
    stages, doubts = _lineage(folder, start.adapters, name)
    weights = fingerprint_files(folder)
    _check_base(folder, weights, stages)
    for adapter in adapters:
        if not check_numbers(adapter):
            raise MergeError(f"the adapter in {adapter.folder} changes no weight of {folder}; did it train?")
    certificate = {
        "base_model": name,
        "base_revision": None if base else start.revision,
        "base_weights": weights,
        "run": Path(run).name,
        "adapters": [adapter.folder.name for adapter in adapters],
        "dtype": dtype,
    }
    rows = rows or rows_at_hand(stages)
    if rows is None:
        doubts.append(f"adapter and merged model were compared on {SYNTHETIC} alone: name a dataset with --rows")
    unfinished = out.absolute().parent / f".{out.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)  # of a merge that was killed
    try:
        unfinished.mkdir(parents=True)
        named = (certificate["base_model"], certificate["base_revision"])
        certificate |= _merge(folder, adapters, unfinished, getattr(torch, dtype), rows, named)
        certificate["warnings"] += doubts
        certificate |= {"stages": stages, "adapted": certificate.pop("adapted")}  # the longest last
        write_certificate(unfinished, certificate)
        if out.exists():
            out.rmdir()
        unfinished.rename(out)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise MergeError(f"no space left for the merged model in {unfinished.parent}; nothing was kept") from error
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    if not certificate["passed"]:
        raise MergeError(f"{out} must not be used: {'; '.join(certificate['failures'])} (see its {CERTIFICATE})")
    return certificate


def _base_folder(base: str | None, start: Start) -> Path:
    name = base or start.base
    try:
        return weights_folder(name, None if base else start.revision)
    except LoadError as error:
        raise LoadError(f"{error}; --base names the adapter's base if it lies elsewhere") from error
    except HFValidationError:  # the path of a folder that is gone
        raise LoadError(f"{name} is not here; --base names the adapter's base if it lies elsewhere") from None


def _merge(
    folder: Path,
    adapters: Sequence[Adapter],
    out: Path,
    dtype: torch.dtype,
    rows: str | None,
    named: tuple[str, str | None],
) -> dict:
    """Write the model folder and return what was found in it; base, adapters and result are never in memory at once.

    `named` is the base and its revision, for whoever loads the adapter.
    """
    files = open_model(folder)
    updates = plan_updates(folder, files, adapters)
    check_space(files, dtype, out)
    processor = load_processor(folder)
    take_image_fit(processor, adapters[-1].folder)
    batches, described = make_batches(processor, rows)
    _copy_settings(folder, out, dtype, processor)
    fold(files, updates, out, dtype)
    facts, failures = inspect_fold(files, updates, out, dtype)
    facts["parity_inputs"] = described
    if not failures:  # a folder that is wrong already might not even load
        facts["adapter"], failures = _stack(folder, updates, out, named)
        reference = ask_reference(folder, adapters, batches, files, updates)
        failures += reference.failures
        answers = ask_merged(out, batches, reference.dtype)
        facts |= _judge(reference, answers, failures)
        facts["weights"] = answers.weights
        facts["files"] = hash_weights(out)
    return {"passed": not failures, "failures": failures, "warnings": _warnings(facts, dtype), **facts}


def _stack(
    folder: Path, updates: Mapping[str, Update], out: Path, named: tuple[str, str | None]
) -> tuple[dict, list[str]]:
    """Write all adapters as one into `out`, unless they are only the last part of what was trained."""
    if (folder / CERTIFICATE).is_file():
        return {"left_out": f"the base {named[0]} is a merged model itself: its own stages would be missing"}, []
    return stack_adapters(updates, out, base=named[0], revision=named[1])


def _judge(reference: Reference, answers: Answers, failures: list[str]) -> dict:
    """Compare logits with those of the adapters: in fp32 before the cast, the cast weights in fp32, and as loaded."""
    facts = {"peft_difference": reference.peft_difference, "parity_dtype": _plain(reference.dtype)}
    facts |= compare_logits(reference.adapted, reference.folded)
    facts |= compare_logits(reference.adapted, answers.as_reference, "cast_")
    facts |= compare_logits(reference.adapted, answers.loaded, "reloaded_")
    facts |= compare_logits(reference.adapted, reference.base, "base_")
    largest = max(logits.abs().max().item() for logits in reference.adapted)
    # Each is written so that NaN fails: no comparison with it is ever true.
    if not facts["peft_difference"] <= PEFT_TOLERANCE:
        failures.append(f"updates differ from PEFT's by {facts['peft_difference']:.2g} of their norm")
    if not facts["max_logit_difference"] <= PARITY_TOLERANCE[reference.dtype] * max(1.0, largest):
        failures.append(f"folded logits differ from the adapter's by {facts['max_logit_difference']:.2g}")
    near, far = facts["cast_mean_logit_difference"], facts["base_mean_logit_difference"]
    if not near < NEARER_THAN_BASE * far:
        failures.append(
            f"the adapter is lost: the merged model's logits are {near:.2g} from the adapter's on average, the bare "
            f"base's {far:.2g}; merge with --dtype float32 if rounding did it"
        )
    if not math.isfinite(facts["reloaded_max_logit_difference"]):
        failures.append("the merged model answers with numbers that are not finite; use --dtype float32")
    return facts


def _warnings(facts: dict, dtype: torch.dtype) -> list[str]:
    """What the cast cost, where that is more than `COSINE_WARNING` allows."""
    figures, tensors = facts["rounding"], facts["adapted"].values()
    below = sum(tensor["cosine"] < COSINE_WARNING for tensor in tensors)
    # Both, since one aligner trained in full may be larger than all the updates of a language model together.
    if figures["cosine"] >= COSINE_WARNING and below <= TENSORS_BELOW * len(tensors):
        return []
    return [
        f"rounding to {_plain(dtype)} left an error of {figures['relative_error']:.0%} of the update (cosine "
        f"{figures['cosine']:.2f}, below {COSINE_WARNING} in {below} of {facts['adapted_tensors']} tensors; "
        f"{figures['unchanged_share']:.0%} of its entries have no effect): --dtype float32 keeps it whole"
    ]


def _check_base(folder: Path, weights: str, stages: Sequence[dict]) -> None:
    """Refuse a base that is quantised or not the one that was trained on, and a run that is known to be wrong."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    parts = (config, *(value for value in config.values() if isinstance(value, dict)))
    quantised = next((part["quantization_config"] for part in parts if part.get("quantization_config")), None)
    if quantised is not None:
        raise InputError(
            f"{folder} is quantised ({quantised.get('quant_method', 'quantization_config')}): an adapter is folded "
            "into 16-bit weights; name the 16-bit model with --base"
        )
    for stage in stages:
        if "merged_into" in stage:
            continue
        trained_on = stage.get("base_weights")
        if trained_on is not None and trained_on != weights:
            raise InputError(
                f"{stage['merged_from']} was trained on other weights than those in {folder} (fingerprint "
                f"{trained_on}, here {weights}); name its own base with --base"
            )
        if (stage.get("proof") or {}).get("passed") is False:
            raise InputError(
                f"{stage['merged_from']} did not train what it was to train: see `proof` in its {FILE_NAME}; "
                "it is not merged"
            )


def _lineage(folder: Path, adapters: Sequence[Path], name: str) -> tuple[list[dict], list[str]]:
    """The facts of every stage behind a model, the earliest first: those its base carries, then the adapters'.

    And what they do not prove. A checkpoint's are those of the run around it, which proved its last weights alone. A
    stage without facts is kept as unrecorded, and has no card.

    Raises:
        InputError: when the facts beside an adapter, or its run's chain, are about other weights.
    """
    stages, doubts = [], []
    if (folder / CERTIFICATE).is_file():
        stages = [{"merged_into": name, **stage} for stage in read_certificate(folder)["stages"]]
    for number, adapter in enumerate(adapters):
        facts = {"base_model": name, **facts_of(adapter), "merged_from": adapter.name}
        earlier = facts.pop("chain", None)  # the same facts as those of the adapters before it
        if earlier is not None:
            _check_chain(adapter, earlier, adapters[:number])
        if facts["stage"] == UNRECORDED:
            doubts.append(f"{adapter.name}: no record of what was trained: not proven")
        elif run_around(adapter) != adapter:
            doubts.append(f"{adapter.name} is a checkpoint: what its run proved is about the end of the run")
            facts |= {"from_checkpoint": True, "adapter_sha256": hash_file(adapter / ADAPTER_WEIGHTS)}
            if (facts.get("proof") or {}).get("passed") is not False:
                facts.pop("proof", None)
        elif facts.get("adapter_sha256") not in (None, hash_file(adapter / ADAPTER_WEIGHTS)):
            raise InputError(
                f"{adapter}: {ADAPTER_WEIGHTS} is not what its {FILE_NAME} is about; take both from one run"
            )
        stages.append(facts)
    return stages, doubts


def _check_chain(run: Path, recorded: Sequence[dict], adapters: Sequence[Path]) -> None:
    """The adapters before a run must be those that it says it was trained on.

    A copied checkpoint has no facts of its own: it is known by its weights where they were recorded.
    """
    names = [stage.get("stage") for stage in recorded]
    if len(names) != len(adapters):
        raise InputError(
            f"{run} was trained on {len(names)} earlier adapters ({', '.join(map(str, names)) or 'none'}), its chain "
            f"holds {len(adapters)}: take the whole run folder"
        )
    for stage, adapter in zip(recorded, adapters, strict=True):
        here = facts_of(adapter)["stage"]
        same_name = here in (UNRECORDED, stage.get("stage"))
        same_weights = here == UNRECORDED or stage.get("adapter_sha256") in (None, hash_file(adapter / ADAPTER_WEIGHTS))
        if not (same_name and same_weights):
            raise InputError(
                f"{adapter} ({here}) is not the adapter of stage {stage.get('stage')} that {run.name} was trained on: "
                "take the whole run folder"
            )


def rows_at_hand(stages: Sequence[dict]) -> str | None:
    """The last stage's dataset, where it lies in `data/` as in the documentation, or is named by a path that exists."""
    name = stages[-1].get("dataset")
    places = [Path(name), Path("data") / Path(name).name] if name else []
    return next((str(place) for place in places if (place / "build_report.json").is_file()), None)


def _copy_settings(folder: Path, out: Path, dtype: torch.dtype, processor: ProcessorMixin) -> None:
    """Configuration, processor, tokenizer and chat template as the base has them.

    But for the type of the weights, and for how `processor` fits pictures to the tower.
    """
    for name in MODEL_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name in ("dtype", "torch_dtype"):
            if part.get(name) in DTYPES:
                part[name] = _plain(dtype)
    (out / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if not (out / PREPROCESSOR).is_file():
        _write_preprocessor_config(processor, out / PREPROCESSOR)
    write_image_fit(processor, out)


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_preprocessor_config(processor: ProcessorMixin, path: Path) -> None:
    """What transformers 4 wrote beside a model, and servers built on it read: transformers 5 writes it no more."""
    settings = processor.image_processor.to_dict()
    kind = type(processor.image_processor).__name__
    settings["image_processor_type"] = kind.removesuffix("Pil").removesuffix("Fast")
    settings["processor_class"] = type(processor).__name__
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
