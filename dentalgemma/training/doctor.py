"""`dentalgemma doctor`: what would waste a run is found before the run is paid for. It changes nothing.

A refusal is what would make the run fail, or end with nothing worth having. A warning is for a human to judge. What
could not be looked at from here is said too: silence never means that all is well.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml
from datasets import DatasetDict
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoConfig, PretrainedConfig, ProcessorMixin
from transformers.utils import logging as transformers_logging
from trl import ModelConfig, SFTConfig

from data_builders.records import InputError
from dentalgemma.available_memory import available_memory
from dentalgemma.models.loading import (
    HUB_ERRORS,
    Start,
    check_sound,
    explain,
    find_start,
    load_model,
    load_processor,
)
from dentalgemma.models.parts import count_parameters
from dentalgemma.models.processors import set_image_fit, take_image_fit
from dentalgemma.training.backbone import FAMILIES
from dentalgemma.training.config import StageConfig, check_stage, read_stage
from dentalgemma.training.data import (
    IGNORED,
    ChatCollator,
    DatasetError,
    check_pictures,
    load_splits,
    token_types_key,
)
from dentalgemma.training.features import feature_root
from dentalgemma.training.first_loss import check_first_loss
from dentalgemma.training.lengths import image_tokens, row_lengths
from dentalgemma.training.memory import (
    GIB,
    GPUS,
    TIGHT,
    UTILISATION,
    Batch,
    Gpu,
    Memory,
    Sharding,
    build_on_meta,
    feature_bytes,
    head_bytes,
    head_flops,
    rows_per_second,
    steps_of,
    weight_bytes,
    weights_dtype,
    what_would_fit,
)
from dentalgemma.training.memory_policy import (
    Rows,
    Run,
    choose,
    count_cuts,
    estimate,
    heaviest_batch,
    lay_out,
    measure_batch,
    set_arguments,
)
from dentalgemma.training.picture_names import name_pictures
from dentalgemma.training.precision import check_precision, gpu_capability
from dentalgemma.training.sharding import check_architecture, check_rows, check_start

# What Gemma builds its attention mask from: image tokens see each other. Without it the logits change without an error.
TOKEN_TYPES = {"gemma3": "token_type_ids", "gemma4": "mm_token_type_ids"}
LOOKED_AT = 16  # rows of each split that are made into batches
SHOWN = 2  # rows whose prompt is printed
LOSS_ROWS = 4
SPARE = 2 * GIB  # disk space to leave free
VARIANTS = {"ti", "super", "laptop", "mobile", "d", "mig"}  # words in the name of another GPU, or of a part of one
WEIGHTS = ("*.safetensors", "*.json")


@dataclass
class Diagnosis:
    """What the doctor found. `facts` is what a machine may read; it holds no path that the user did not give."""

    refusals: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    facts: dict = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        return not self.refusals

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Note what would stop the run, and go on looking for more."""
        try:
            yield
        except InputError as error:
            self.refuse(str(error))

    def refuse(self, sentence: str) -> None:
        if sentence not in self.refusals:
            self.refusals.append(sentence)

    def as_json(self) -> dict:
        lists = {"refusals": self.refusals, "warnings": self.warnings, "unchecked": self.unchecked}
        return {"sound": self.sound, **lists, **self.facts}


@dataclass
class Case:
    """What a run consists of; a part that could not be had is None."""

    stage: StageConfig
    training: SFTConfig
    model_config: ModelConfig
    gpu: Gpu | None
    sharding: Sharding
    start: Start | None = None
    architecture: PretrainedConfig | None = None
    processor: ProcessorMixin | None = None
    dataset: DatasetDict | None = None
    lengths: dict[str, list[int]] = field(default_factory=dict)
    row: Batch | None = None  # one of the longest rows, with the pictures of one that has some
    rows: Rows | None = None  # those that train
    shown: int = 0  # pictures of that row; of a picture with crops each is one of `row.images`
    pictures: int = 0  # different ones, of both splits

    @property
    def run(self) -> Run:
        return Run(self.architecture, self.training, self.model_config, self.stage.trains, _vision(self), self.sharding)


def diagnose(
    config: Path,
    overrides: Sequence[str] = (),
    *,
    gpu: str | None = None,
    gpus: int | None = None,
    accelerate: Path | None = None,
    throughput: float | None = None,
    first_loss: bool = True,
) -> Diagnosis:
    """Look at everything that a stage's configuration leads to. `throughput` is in rows per second, of all GPUs.

    Raises:
        InputError: for a configuration that cannot be read, or a GPU that is not in the table.
    """
    with _quiet():
        return _diagnose(config, overrides, gpu, gpus, accelerate, throughput, first_loss)


@contextmanager
def _quiet() -> Iterator[None]:
    """The page is to be read, not searched among the progress bars and deprecations of libraries."""
    transformers_bars = transformers_logging.is_progress_bar_enabled()
    datasets_bars = not are_progress_bars_disabled()
    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if datasets_bars:
            enable_progress_bars()
        if transformers_bars:
            transformers_logging.enable_progress_bar()


def _diagnose(
    config: Path,
    overrides: Sequence[str],
    gpu: str | None,
    gpus: int | None,
    accelerate: Path | None,
    throughput: float | None,
    measure_loss: bool,
) -> Diagnosis:
    found = Diagnosis()
    device = _find_gpu(gpu)
    # Without a named GPU the run is meant for this machine, as the recipe would take it.
    stage, training, model_config = read_stage(config, ["--config", str(config), *overrides], elsewhere=gpu is not None)
    case = Case(stage, training, model_config, device, _find_sharding(accelerate, gpus))
    found.facts["gpu"] = {
        "name": gpu or _this_device(),
        "named": gpu is not None,
        "gpus": case.sharding.gpus,
        "sharing": case.sharding.kind,
    }
    with found.refusing():
        check_stage(stage, training, model_config)
    training.max_length = None  # said once; what follows looks at whole rows
    stage.mix_seed = training.seed if stage.mix_seed is None else stage.mix_seed
    with found.refusing():
        check_precision(training, model_config, device.capability if gpu else gpu_capability(training))
    _find_model(case, found)
    _find_rows(case, found)
    _check_steps(case, found, throughput)
    _check_parts_and_memory(case, found, throughput)
    _check_disk(case, found)
    if measure_loss:
        _check_first_loss(case, found)
    return found


def _find_gpu(name: str | None) -> Gpu | None:
    if name is None:
        if not torch.cuda.is_available():
            return None
        properties = torch.cuda.get_device_properties(0)
        label = gpu_label(properties.name)
        tflops = GPUS[label].tflops if label else 0
        return Gpu(properties.total_memory / GIB, (properties.major, properties.minor), tflops)
    label = name.lower() if name.lower() in GPUS else gpu_label(name)
    if label is None:
        raise InputError(f"--gpu {name}: choose one of {', '.join(GPUS)}")
    return GPUS[label]


def gpu_label(name: str) -> str | None:
    """A GPU of the table by what its driver calls it: "Tesla V100-SXM2-32GB", "NVIDIA GeForce RTX 3090".

    None for a kind that is not in it, also where only its name is like one: an L40 is no L4, an RTX 3090 Ti no 3090.
    """
    words = re.findall(r"[a-z0-9]+", name.lower())
    if VARIANTS & set(words):
        return None
    words += [first + second for first, second in pairwise(words)]
    for label in sorted(GPUS, key=len, reverse=True):
        kind, _, memory = label.partition("-")
        if kind in words and (not memory or f"{memory}gb" in words):
            return label
    return None


def _this_device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "this machine's CPU"


def _find_sharding(accelerate: Path | None, gpus: int | None) -> Sharding:
    """How an accelerate configuration shares a run out among GPUs."""
    if gpus is not None and gpus < 1:
        raise InputError(f"--gpus {gpus}: at least 1")
    if accelerate is None:
        return Sharding("ddp" if (gpus or 1) > 1 else "none", gpus or 1)
    try:
        settings = yaml.safe_load(accelerate.read_text(encoding="utf-8"))
        kind = str(settings["distributed_type"]).upper()
        number = gpus or int(settings["num_processes"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{accelerate} is no accelerate configuration: {error!r}") from error
    if kind == "DEEPSPEED":
        zero = int((settings.get("deepspeed_config") or {}).get("zero_stage", 2))
        return Sharding(f"zero{zero}" if zero in (2, 3) else "ddp", number)
    if kind == "FSDP":
        options = settings.get("fsdp_config") or {}
        # accelerate's own default is true.
        return Sharding("fsdp", number, str(options.get("fsdp_cpu_ram_efficient_loading", True)).lower() == "true")
    return Sharding("ddp" if number > 1 else "none", number)


def _find_model(case: Case, found: Diagnosis) -> None:
    """Where the run starts from: access, configuration, processor; weights are not needed."""
    name = case.model_config.model_name_or_path
    if name is None:
        found.refuse("no model given: set --model_name_or_path to a Hub id or a folder")
        return
    if not Path(name).is_dir() and not _check_access(name, case.model_config.model_revision, found):
        return
    with found.refusing():
        case.start = find_start(name, case.model_config.model_revision)
    if case.start is None:
        return
    base, revision = case.start.base, case.start.revision
    if base != name and not Path(base).is_dir() and not _check_access(base, revision, found):
        return
    found.facts["model"] = {"name": name, "base": base, "earlier_adapters": len(case.start.adapters)}
    try:
        case.architecture = AutoConfig.from_pretrained(base, revision=revision)
        found.facts["family"] = case.architecture.model_type
        case.processor = load_processor(base, revision=revision)
        with found.refusing():
            if case.start.adapters:
                take_image_fit(case.processor, case.start.adapters[-1])
            set_image_fit(case.processor, case.stage.image_fit)
    except HUB_ERRORS as error:
        found.refuse(explain(base, error, revision=revision))
    except ValueError as error:  # a model_type that this version of transformers does not know, or no processor
        found.refuse(f"{base}: {str(error).splitlines()[0]}")
    with found.refusing():
        check_start(case.start, _shared(case))
    if case.architecture is not None:
        with found.refusing():
            check_architecture(case.architecture, _shared(case))
    if case.processor is not None and (lacking := _lacking_mark(case.processor, case.architecture)):
        found.refuse(
            f"the processor ({type(case.processor).__name__}) gives no {lacking}: {case.architecture.model_type} would "
            "build another attention mask than it was trained with, without an error; take the processor of the base"
        )
        found.unchecked.append("rows and labels: the processor is not the model's")
        case.processor = None


def _lacking_mark(processor: ProcessorMixin, architecture: PretrainedConfig) -> str | None:
    """The mark of image tokens that the model needs and the processor does not give, in training or to a generator."""
    key = TOKEN_TYPES.get(architecture.model_type)
    given = processor(text=[processor.tokenizer.bos_token or "a"], add_special_tokens=False)
    return key if key is not None and (key not in given or token_types_key(processor) != key) else None


def _check_access(name: str, revision: str | None, found: Diagnosis) -> bool:
    """Ask the Hub whether it would give this model; False where there is no point in going on."""
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=10)
        found.facts["access"] = "granted"
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:  # also a gated one
        found.facts["access"] = "denied"
        found.refuse(explain(name, error, revision=revision))
        return False
    except (*HUB_ERRORS, ValueError) as error:
        if getattr(getattr(error, "response", None), "status_code", None) == HTTPStatus.UNAUTHORIZED:
            found.facts["access"] = "denied"
            found.refuse(explain(name, error, revision=revision))
            return False
        # What lies in the cache can be looked at all the same.
        found.facts["access"] = "not checked"
        found.unchecked.append(f"access to {name}: the Hub could not be asked (offline?)")
    return True


def _find_rows(case: Case, found: Diagnosis) -> None:
    """The dataset, and what the collator makes of it."""
    with found.refusing():
        case.dataset = load_splits(case.stage)
    if case.dataset is None:
        return
    splits = (case.stage.dataset_train_split, case.stage.dataset_test_split)
    facts = found.facts["dataset"] = {"name": case.stage.dataset_name, "rows": {}}
    for split in dict.fromkeys(splits):
        facts["rows"][split] = len(case.dataset[split])
        if not len(case.dataset[split]):
            found.refuse(f"{case.stage.dataset_name}: split {split!r} is empty")
    _check_pictures(case, found)
    if case.processor is None:
        return
    for split in dict.fromkeys(splits):
        if len(case.dataset[split]):
            with found.refusing():
                case.lengths[split] = row_lengths(case.dataset[split], case.processor)
    _check_lengths(case, found)
    _look_at_rows(case, found)


def _check_pictures(case: Case, found: Diagnosis) -> None:
    rows = case.dataset[case.stage.dataset_train_split]
    with found.refusing():
        check_pictures(rows, case.stage.trains, case.stage.dataset_name)
    if case.sharding.kind in {"zero3", "fsdp"}:
        for split in dict.fromkeys((case.stage.dataset_train_split, case.stage.dataset_test_split)):
            with found.refusing():
                check_rows(case.dataset[split], _shared(case), split=split, trains=case.stage.trains)


def _shared(case: Case) -> SimpleNamespace:
    """As much of a run's arguments as says how it cuts up the weights."""
    plugin = SimpleNamespace(zero_stage=3) if case.sharding.kind == "zero3" else None
    return SimpleNamespace(deepspeed_plugin=plugin, fsdp=case.sharding.kind == "fsdp", world_size=case.sharding.gpus)


def _check_lengths(case: Case, found: Diagnosis) -> None:
    context = math.inf
    if case.architecture is not None:
        context = case.architecture.get_text_config().max_position_embeddings
    limit = min(case.stage.max_row_tokens or context, context)
    facts = found.facts["lengths"] = {}
    for split, lengths in case.lengths.items():
        kept = [length for length in lengths if length <= limit]
        if split == case.stage.dataset_train_split and kept:
            with found.refusing():
                case.rows = _training_rows(case, limit)
        left_out = len(lengths) - len(kept)
        if lengths and not kept:
            found.refuse(f"split {split!r}: all {len(lengths)} rows are longer than {limit:,} tokens")
        elif left_out:
            share = left_out / len(lengths)
            found.warnings.append(
                f"{left_out} rows of {split} ({share:.0%}) are longer than {limit:,} tokens and will be left out"
            )
        if kept:
            middle = sorted(kept)[len(kept) // 2]
            facts[split] = {"shortest": min(kept), "median": middle, "longest": max(kept), "left_out": left_out}
            facts[split]["histogram"] = _histogram(kept)


def _training_rows(case: Case, limit: float) -> Rows:
    """The rows that are not too long; which of them show the same pictures, their bytes tell, as in the run."""
    rows, lengths = case.dataset[case.stage.dataset_train_split], case.lengths[case.stage.dataset_train_split]
    kept = [number for number, length in enumerate(lengths) if length <= limit]
    rows = rows.select(kept)
    return Rows(
        [lengths[number] for number in kept],
        [tuple(names) for names in name_pictures(rows)] if case.stage.pack_questions > 1 else None,
        [sum(tokens) for tokens in image_tokens(rows, case.processor)],
        questions=case.stage.pack_questions,
        cuts=count_cuts(case.training, case.sharding.gpus),
    )


def _count_pictures(case: Case) -> int:
    """Different pictures of both splits."""
    splits = {case.stage.dataset_train_split, case.stage.dataset_test_split}
    return len({name for split in splits for names in name_pictures(case.dataset[split]) for name in names})


def _histogram(lengths: Sequence[int], bars: int = 10) -> list[tuple[int, int]]:
    """Upper end of each bar, in round numbers of tokens, and the rows that it holds."""
    span = max(lengths) - min(lengths) + 1
    width = next(step for power in range(9) for step in (10**power, 2 * 10**power, 5 * 10**power) if step * bars > span)
    first = min(lengths) // width
    counts = [0] * (max(lengths) // width - first + 1)
    for length in lengths:
        counts[length // width - first] += 1
    return [((first + number + 1) * width, count) for number, count in enumerate(counts)]


def _look_at_rows(case: Case, found: Diagnosis) -> None:
    """Make rows into batches as training will, the longest among them, and look at what is trained."""
    with found.refusing():
        collator = ChatCollator(case.processor)
        looked_at = trained = 0
        for split, lengths in case.lengths.items():
            rows, heaviest = case.dataset[split], None
            images, shown = (), 0
            for number in _spread(lengths):
                row = rows[number]
                try:
                    batch = collator([row])
                except DatasetError as error:
                    found.refuse(str(error))
                    continue
                looked_at += 1
                trained += int((batch["labels"] != IGNORED).sum())
                measured = measure_batch(batch, case.processor)
                if heaviest is None or measured.tokens > heaviest.tokens:
                    heaviest = measured
                if sum(measured.images) > sum(images):
                    images, shown = measured.images, len(row["images"])
                if split == case.stage.dataset_train_split and len(found.facts.setdefault("shown", [])) < SHOWN:
                    found.facts["shown"].append(show_row(batch, case.processor))
            if heaviest is not None and split == case.stage.dataset_train_split and case.rows is not None:
                # A longest row may be text alone, while others of its batch have pictures.
                case.row, case.shown = replace(heaviest, images=images), shown
                case.pictures = _count_pictures(case) if images else 0
        if looked_at:
            found.facts["labels"] = {"rows_looked_at": looked_at, "trained_tokens_per_row": trained / looked_at}


def _spread(lengths: Sequence[int]) -> list[int]:
    """The first row, the longest, the shortest, and others at equal distances."""
    if not lengths:
        return []
    step = max(1, len(lengths) // LOOKED_AT)
    ends = [lengths.index(max(lengths)), lengths.index(min(lengths))]
    return list(dict.fromkeys([0, *ends, *range(0, len(lengths), step)]))[:LOOKED_AT]


def show_row(batch: dict[str, torch.Tensor], processor: ProcessorMixin) -> list[tuple[str, str]]:
    """A batch of one row as pieces of text, each with its kind: `prompt`, `image` or `trained`."""
    image = processor.tokenizer.image_token_id
    pieces: list[tuple[str, list[int]]] = []
    for token, label in zip(batch["input_ids"][0].tolist(), batch["labels"][0].tolist(), strict=True):
        kind = "trained" if label != IGNORED else "image" if token == image else "prompt"
        if not pieces or pieces[-1][0] != kind:
            pieces.append((kind, []))
        pieces[-1][1].append(token)
    return [
        (kind, f"[{len(ids)} image tokens]" if kind == "image" else processor.tokenizer.decode(ids))
        for kind, ids in pieces
    ]


def _check_steps(case: Case, found: Diagnosis, throughput: float | None) -> None:
    lengths = case.lengths.get(case.stage.dataset_train_split)
    if not lengths:
        return
    training, gpus = case.training, case.sharding.gpus
    kept = found.facts["lengths"].get(case.stage.dataset_train_split, {}).get("left_out", 0)
    rows = len(lengths) - kept
    each = training.per_device_train_batch_size * training.gradient_accumulation_steps * gpus
    epoch, steps = steps_of(rows, training, gpus)
    passes = steps * each / max(rows, 1)
    found.facts["steps"] = {"rows_per_step": each, "per_epoch": epoch, "in_all": steps, "epochs": round(passes, 2)}
    if each > rows:
        found.refuse(
            f"one step takes {each} rows (batch {training.per_device_train_batch_size} x accumulation "
            f"{training.gradient_accumulation_steps} x {gpus} GPUs), the training split has {rows}: lower one of them"
        )
    intervals = (
        ("eval", "evaluated", training.eval_strategy, training.eval_steps),
        ("save", "saved", training.save_strategy, training.save_steps),
    )
    for option, what, strategy, interval in intervals:
        if strategy != "steps" or interval is None or interval <= steps:
            continue
        found.warnings.append(
            f"the run ends after {steps} steps and is {what} only then ({option}_steps: {interval:g}): lower it, or "
            "there is no choice among steps"
        )
    if training.eval_strategy == "no":
        found.warnings.append("eval_strategy: no: nothing will show overfitting, and no best step can be kept")
    if throughput:
        _note_time(found, rows, steps * each, throughput, "stated")


def _note_time(found: Diagnosis, rows: int, in_all: float, rows_per_second: float, origin: str) -> None:
    found.facts["time"] = {
        "rows_per_second": round(rows_per_second, 3),
        "origin": origin,
        "hours_per_epoch": round(rows / rows_per_second / 3600, 3),
        "hours_in_all": round(in_all / rows_per_second / 3600, 3),
    }


def _check_parts_and_memory(case: Case, found: Diagnosis, throughput: float | None) -> None:
    if case.architecture is None:
        return
    model = None
    with found.refusing():
        model = build_on_meta(case.architecture, case.model_config, case.stage.trains, case.start.adapters)
    with found.refusing():
        _check_start(case)
    if model is None:
        return
    found.facts["parts"] = count_parameters(model)
    found.facts["weight_bytes"] = weight_bytes(model, replace(case.model_config, load_in_4bit=False))
    if case.row is None:
        return
    _check_vision(case, found)
    chosen = case.stage.memory == "auto"
    if chosen:
        set_arguments(choose(case.run, case.row, case.rows, available=_available(case)), case.training)
    training = case.training
    batch = heaviest_batch(case.rows, training.per_device_train_batch_size, case.row)
    by_checkpointing = {switch: estimate(case.run, batch, checkpointing=switch).memory for switch in (True, False)}
    memory = by_checkpointing[training.gradient_checkpointing]
    found.facts["memory"] = {
        "batch": {
            "rows": batch.rows,
            "tokens": batch.tokens,
            "images": len(batch.images),
            "questions": batch.questions,
        },
        "per_device_train_batch_size": training.per_device_train_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "chosen": chosen,
        "vision": case.run.vision if batch.images else None,
        "bytes": vars(memory) | {"total": memory.total},
        "checkpointing": training.gradient_checkpointing,
        "activations_with_checkpointing": by_checkpointing[True].activations,
        "activations_without_checkpointing": by_checkpointing[False].activations,
        "all_logits": head_bytes(model, batch, fused=False),
        "available": _available(case),
    }
    _check_fit(case, found, batch, memory)
    if not throughput and case.gpu is not None and case.gpu.tflops and "steps" in found.facts:
        _estimate_time(case, found)


def _vision(case: Case) -> str:
    """How pictures reach the language model: `cached` or `live`, as the trainer would decide."""
    whole = case.sharding.kind != "zero3" and not case.sharding.one_loads
    frozen = "vision_tower" not in case.stage.trains
    known = case.architecture is not None and case.architecture.model_type in FAMILIES
    return "cached" if case.stage.vision_features != "live" and whole and frozen and known else "live"


def _check_vision(case: Case, found: Diagnosis) -> None:
    """Whether features can be stored, and what they take on the disk."""
    if not case.row.images:
        return
    if _vision(case) == "live":
        if case.stage.vision_features == "cached":
            reason = "the tower trains" if "vision_tower" in case.stage.trains else "this family or sharding has none"
            found.refuse(f"vision_features: cached: {reason}; set `vision_features: live`")
        return
    half = case.training.bf16 or weights_dtype(case.architecture, case.model_config).itemsize == 2
    tokens = case.pictures * sum(case.row.images) // case.shown
    found.facts["features"] = {
        "pictures": case.pictures,
        "bytes": feature_bytes(case.architecture, tokens, torch.bfloat16 if half else torch.float32),
    }


def _estimate_time(case: Case, found: Diagnosis) -> None:
    """Time from the operations of an average sequence; the pictures are encoded once, where they are cached."""
    loads = lay_out(case.rows, case.training.per_device_train_batch_size)
    questions = len(case.rows.lengths) / len(loads)
    tokens = math.ceil(sum(load.tokens for load in loads) / len(loads))
    average = replace(case.row, tokens=max(tokens, sum(case.row.images) + 1), questions=questions)
    checkpointing = case.training.gradient_checkpointing
    flops = estimate(case.run, average, checkpointing=checkpointing).flops
    per_row = flops / questions + head_flops(case.architecture, case.row.answer_tokens)
    steps, sharing = found.facts["steps"], (case.gpu, case.sharding.gpus)
    speed = rows_per_second(per_row, *sharing)
    _note_time(found, len(case.rows.lengths), steps["in_all"] * steps["rows_per_step"], speed, "estimated")
    time = found.facts["time"]
    time |= {"tflop_per_row": per_row / 1e12, "utilisation": UTILISATION, "rows_per_sequence": round(questions, 3)}
    if features := found.facts.get("features"):
        live = estimate(replace(case.run, vision="live"), average, checkpointing=checkpointing).flops
        each = (live - flops) / case.shown
        time["encoding_hours"] = round(case.pictures / rows_per_second(max(each, 1), *sharing) / 3600, 4)
        time["hours_in_all"] = round(time["hours_in_all"] + time["encoding_hours"], 3)
        features["tflop_each"] = each / 1e12


def _available(case: Case) -> int:
    if case.gpu is not None:
        return int(case.gpu.gib * GIB)
    return available_memory()


def _check_fit(case: Case, found: Diagnosis, batch: Batch, memory: Memory) -> None:
    available = _available(case)
    device = found.facts["gpu"]["name"]
    needed = f"the longest rows need about {memory.total / GIB:.1f} GiB on each GPU, {device} has {available / GIB:.1f}"
    if memory.total <= TIGHT * available:
        return
    if memory.total <= available:
        found.warnings.append(f"{needed}: tight, since the estimate is good to about 15 %")
        return
    for option, fewer, checkpointing, model_config in what_would_fit(batch, case.training, case.model_config):
        milder = estimate(replace(case.run, model_config=model_config), fewer, checkpointing=checkpointing).memory
        if milder.total <= TIGHT * available:
            found.refuse(f"{needed}: `{option}` would need {milder.total / GIB:.1f}")
            return
    found.refuse(f"{needed}: no batch size, checkpointing or 4-bit loading would fit; take a larger GPU or zero3/fsdp2")


def _check_start(case: Case) -> None:
    """What the run starts from must be sound, and its adapters of this very base."""
    if Path(case.start.base).is_dir():
        check_sound(case.start)


def _check_disk(case: Case, found: Diagnosis) -> None:
    """Space for the download, the checkpoints and the merged model, on the disks where they will lie."""
    if "parts" not in found.facts:
        return
    trained = sum(part["trainable"] for part in found.facts["parts"].values())
    parameters = sum(part["parameters"] for part in found.facts["parts"].values())
    # What is trained is kept in fp32, with two moments for each number.
    checkpoint = trained * (4 + 8)
    kept = _checkpoints_kept(case, found)
    needs = {"checkpoints": kept * checkpoint, "merged model": (parameters - trained) * 2}
    places: dict[int, list] = {}
    output = _existing(Path(case.training.output_dir))
    for what, size in needs.items():
        places.setdefault(output.stat().st_dev, [output]).append((what, size))
    if features := found.facts.get("features"):
        root = feature_root(case.stage.feature_cache)
        # What lies there may be of this run: no refusal for want of space that is not needed.
        there = sum(path.stat().st_size for path in root.rglob("*.safetensors"))
        needs["features"] = max(0, features["bytes"] - there)
        place = _existing(root)
        if (root.exists() and not root.is_dir()) or not os.access(place, os.W_OK):
            found.refuse(
                f"feature_cache: {root} is no folder that can be written to: give another, or set "
                "`vision_features: live`"
            )
        places.setdefault(place.stat().st_dev, [place]).append(("features", needs["features"]))
    if not Path(case.start.base).is_dir() and _cached(case.start) is None:
        needs["download"] = found.facts["weight_bytes"]
        cache = _existing(Path(constants.HF_HUB_CACHE))
        places.setdefault(cache.stat().st_dev, [cache]).append(("download", needs["download"]))
    free = {}
    for place, *wanted in places.values():
        available, total = shutil.disk_usage(place).free, sum(size for _, size in wanted)
        names = " and ".join(what for what, _ in wanted).replace(" and ", ", ", len(wanted) - 2)
        free[names] = available
        if total + SPARE > available:
            detail = f" ({kept} checkpoints of {_size(checkpoint)})" if kept else ""
            found.refuse(
                f"no disk space: {names} take about {_size(total)}{detail}, {_size(available)} are free: make room, "
                "choose another output_dir, or lower save_total_limit"
            )
    found.facts["disk"] = {"needs": needs, "checkpoints": kept, "free": free}


def _checkpoints_kept(case: Case, found: Diagnosis) -> int:
    training = case.training
    steps = found.facts.get("steps", {"in_all": 1, "per_epoch": 1})
    if training.save_strategy == "no":
        return 0
    interval = steps["per_epoch"]
    if training.save_strategy == "steps":
        interval = training.save_steps if training.save_steps >= 1 else training.save_steps * steps["in_all"]
    made = max(1, math.ceil(steps["in_all"] / max(interval, 1)))
    # One is written before the oldest goes, and the best stays beside the newest.
    return min(made, training.save_total_limit + 2) if training.save_total_limit else made


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _size(number: float) -> str:
    return f"{number / GIB:,.1f} GiB" if number >= GIB / 10 else f"{number / 2**20:,.1f} MiB"


def _cached(start: Start) -> Path | None:
    """The folder with a model's weights, if they are on this machine."""
    folder = Path(start.base)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(start.base, revision=start.revision, local_files_only=True))
        except (OSError, ValueError):
            return None
    return folder if any(folder.glob("*.safetensors")) else None


def _check_first_loss(case: Case, found: Diagnosis) -> None:
    """The loss of the model as it starts, on a few validation rows, where its weights are here and fit."""
    if case.start is None or case.architecture is None or not case.lengths.get(case.stage.dataset_test_split):
        return
    if _cached(case.start) is None:
        found.unchecked.append("the first loss: the weights of the base are not on this machine")
        return
    if found.facts.get("weight_bytes", 0) * 1.5 > _free_memory():
        found.unchecked.append("the first loss: the base does not fit into this machine's memory")
        return
    with found.refusing():
        loss = first_loss(case)
        found.facts["first_loss"] = round(loss, 4)
        if warning := check_first_loss(loss, case.architecture):
            found.warnings.append(warning)


def first_loss(case: Case) -> float:
    """Mean loss over the answer tokens of a few validation rows, without the adapter that is to be trained."""
    here = replace(case.model_config, load_in_4bit=False, load_in_8bit=False)
    model, processor = load_model(here)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model.to(device).eval()
    rows, lengths = case.dataset[case.stage.dataset_test_split], case.lengths[case.stage.dataset_test_split]
    collator = ChatCollator(processor)
    loss, tokens = 0.0, 0
    for number in _spread(lengths)[:LOSS_ROWS]:
        batch = {key: value.to(device) for key, value in collator([rows[number]]).items()}
        labels = batch.pop("labels")[0, 1:]
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits[0, :-1].float()
        kept = labels != IGNORED
        loss += torch.nn.functional.cross_entropy(logits[kept], labels[kept], reduction="sum").item()
        tokens += int(kept.sum())
    return loss / tokens


def _free_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return available_memory()
