"""Pictures as the vision tower sees them, computed once: for every epoch, question, stage and run that shares a tower.

A feature is what the tower makes of a picture, pooled, before the projector: exact also where the aligner trains. A
picture is named by the SHA-256 of its file, never by what a dataset calls it. What its features depend on besides,
image processor, tower, precision and number format, is their key; nothing is read under another one.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from huggingface_hub import constants
from PIL import Image as PillowImage
from rich.console import Console
from rich.progress import track
from torch import nn
from transformers import ProcessorMixin
from transformers.integrations import is_fsdp_enabled

from data_builders.images import UNREADABLE
from dentalgemma.models.processors import picture_tokens
from dentalgemma.training.backbone import backbone_of, supports_features
from dentalgemma.training.checkpoints import first_process, unchanged_randomness
from dentalgemma.training.data import PICTURES, DatasetError, image_source, name_row, open_image
from dentalgemma.training.feature_cache import KEY_FILE, LIVE, CacheError, FeatureCache, differences

FORMAT = 1
SHARD_PICTURES = 1024
SHARD_SECONDS = 60.0
SHARD_BYTES = 2**30  # crops make a picture several times as large
ABANDONED = 3600.0  # seconds after which an unfinished file is nobody's any more
SIZED = 500  # pictures whose headers are read for the estimate


def feature_root(folder: str | None) -> Path:
    """Where caches lie: the folder given, `$DENTALGEMMA_CACHE`, or beside the models and datasets of the Hub."""
    default = os.environ.get("DENTALGEMMA_CACHE") or Path(constants.HF_HOME) / "dentalgemma"
    return Path(folder) if folder else Path(default) / "features"


# Names


def name_pictures(dataset: Dataset) -> list[list[str]]:
    """The names of each row's pictures: SHA-256 of their stored bytes, hashed in place and in several threads.

    Raises:
        DatasetError: for a picture without bytes whose file cannot be read.
    """
    if "images" not in dataset.column_names:
        return [[]] * len(dataset)
    numbers = _stored_numbers(dataset)
    distinct = sorted(set(numbers))
    # Rows of one picture mostly follow one another, so that a block rarely begins within them.
    blocks = [distinct[start : start + 64] for start in range(0, len(distinct), 64)]
    column = dataset.data.column("images")
    with ThreadPoolExecutor(_threads()) as pool:
        named = [names for block in pool.map(lambda block: _name_block(column, block), blocks) for names in block]
    by_number = dict(zip(distinct, named, strict=True))
    for place, number in enumerate(numbers):
        if isinstance(error := by_number[number], Exception):
            raise DatasetError(f"{_name_of(dataset, place)}: a picture cannot be read: {error}") from error
    return [by_number[number] for number in numbers]


def _stored_numbers(dataset: Dataset) -> Sequence[int]:
    return range(len(dataset)) if dataset._indices is None else dataset._indices.column(0).to_pylist()


def _name_block(column: pa.ChunkedArray, numbers: Iterable[int]) -> list[list[str] | Exception]:
    """Names of the pictures of stored rows; equal neighbours are compared, which is faster than hashing them."""
    names: list[list[str] | Exception] = []
    before: tuple[pa.Buffer, str] | None = None
    for number in numbers:
        own = []
        try:
            for content in _contents(column[number]):
                if before is None or content.size != before[0].size or not content.equals(before[0]):
                    before = content, hashlib.sha256(content).hexdigest()
                own.append(before[1])
            names.append(own)
        except UNREADABLE as error:
            names.append(error)
    return names


def _contents(row: pa.ListScalar) -> Iterator[pa.Buffer]:
    """The encoded pictures of a row, in place where the dataset holds their bytes."""
    pictures = row.values
    for index in range(len(pictures or ())):
        content = pictures.field("bytes")[index]
        if content.is_valid:
            yield content.as_buffer()
        else:
            yield pa.py_buffer(Path(image_source(pictures[index].as_py())).read_bytes())


def _name_of(dataset: Dataset, place: int) -> str:
    return name_row(dataset.select_columns([name for name in ("row_id",) if name in dataset.column_names])[place])


def _threads() -> int:
    """Threads of this process, where those on one machine share its cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


# What features depend on


def feature_key(model: nn.Module, processor: ProcessorMixin, *, mixed_precision: bool | str) -> dict[str, Any]:
    """What the features depend on besides the pictures, as flat JSON; ranks and runs that agree on it share a cache.

    `mixed_precision` is what the run trains with: `no`, `bf16`, `fp16`; True stands for `bf16`. Features are stored in
    bf16 where the run computes in it, else in fp32.
    """
    mixed = {True: "bf16", False: "no"}.get(mixed_precision, mixed_precision)
    backbone = backbone_of(model)
    tower = backbone.vision_tower
    weights = next(parameter.dtype for parameter in tower.parameters() if parameter.is_floating_point())
    stored = torch.bfloat16 if torch.bfloat16 in (weights, {"bf16": torch.bfloat16}.get(mixed)) else torch.float32
    config = tower.config.to_dict()
    for name in CONFIG_NOISE:
        config.pop(name, None)
    key = {
        "format": FORMAT,
        "family": backbone.config.model_type,
        "pooling": _pooling(backbone),
        "width": tower.config.hidden_size,
        "stored": _dtype_name(stored),
        "precision": {"weights": _dtype_name(weights), "autocast": mixed},
        "attention": tower.config._attn_implementation,
        "image_processor": image_settings(processor),
        "tower": config | {"weights": _hash_weights(tower)},
    }
    return json.loads(json.dumps(dict(_flatten(key)), default=str))


# What a tower's configuration holds besides the tower.
CONFIG_NOISE = (
    *("transformers_version", "_name_or_path", "architectures", "dtype", "id2label", "label2id", "problem_type"),
    *("return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward", "initializer_range"),
    "is_encoder_decoder",
)
CALL_NOISE = ("return_tensors", "device", "disable_grouping", "data_format", "input_data_format")


def image_settings(processor: ProcessorMixin) -> dict[str, Any]:
    """What the image processor is told to do, by its own settings and by the processor around it, which win."""
    image_processor = processor.image_processor
    settings = image_processor.to_dict() | _call_options(processor)
    # Its dictionary hides which of two implementations it is; their pixels differ in the last bits.
    settings["image_processor_type"] = type(image_processor).__name__
    if not settings.get("do_pan_and_scan"):
        settings = {name: value for name, value in settings.items() if not name.startswith("pan_and_scan")}
    return {name: value for name, value in settings.items() if value is not None and name not in CALL_NOISE}


def _call_options(processor: ProcessorMixin) -> dict[str, Any]:
    """The options that a processor hands to its image processor when it is called (transformers 5.23)."""
    tokenizer = getattr(processor, "tokenizer", None)
    return processor._merge_kwargs(tokenizer_init_kwargs=getattr(tokenizer, "init_kwargs", {}))["images_kwargs"]


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, entry in sorted(value.items()):
        if isinstance(entry, Mapping):
            yield from _flatten(entry, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", entry


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _hash_weights(tower: nn.Module) -> str:
    """SHA-256 over names, shapes and all values of the tower's weights and buffers."""

    def hash_one(item: tuple[str, torch.Tensor]) -> str:
        name, tensor = item
        values = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
        return f"{name} {tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(values).hexdigest()}\n"

    with ThreadPoolExecutor(_threads()) as pool:
        lines = list(pool.map(hash_one, sorted(tower.state_dict().items())))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def find_cache(root: Path, key: Mapping[str, Any]) -> FeatureCache:
    """The cache of a key below `root`, made when there is none; an empty one says why others there are not used."""
    content = json.dumps(json.loads(json.dumps(key)), sort_keys=True)
    cache = FeatureCache(Path(root) / hashlib.sha256(content.encode()).hexdigest()[:16], key)
    if not len(cache) and os.environ.get("RANK", "0") == "0":
        for line in _explain_others(Path(root), cache):
            _say(line)
    return cache


def _explain_others(root: Path, cache: FeatureCache) -> list[str]:
    """Why the other caches below a folder are of no use: at most three, the most alike first."""
    others = []
    for path in sorted(root.glob(f"*/{KEY_FILE}")):
        try:
            found = differences(json.loads(path.read_text(encoding="utf-8")), cache.key)
        except (OSError, ValueError, AttributeError):
            continue
        if found and any(path.parent.glob("*.safetensors")):
            others.append((len(found), f"feature cache {path.parent} is not used: {'; '.join(found)}"))
    return [line for _, line in sorted(others)[:3]]


# Encoding


class Source(NamedTuple):
    """Where a picture that is to be encoded lies: a dataset, the place of a row in it, the number within the row."""

    dataset: Dataset
    row: int
    number: int


def encode_pictures(
    cache: FeatureCache,
    datasets: Iterable[Dataset] | Mapping[str, Dataset],
    model: nn.Module,
    processor: ProcessorMixin,
    accelerator: Accelerator,
) -> None:
    """Compute what the cache lacks of the datasets' pictures; all processes share the work and call it together.

    Each picture is encoded by itself, so that its features depend on no other. What is written stays when a run is
    killed, and the next one goes on from there.

    Raises:
        DatasetError: for a picture that cannot be read, naming its row.
        CacheError: when the disk is too small, or the processes do not agree on the cache or share its folder.
    """
    sources = _find_sources(datasets)
    if not sources:
        return
    _check_agreement(cache, accelerator)

    def look() -> list[str]:
        _clear(cache)
        missing = cache.missing(sources)
        _announce(cache, [sources[name] for name in missing], len(sources), processor)
        return missing

    missing = first_process(accelerator, look)
    own = missing[accelerator.process_index :: accelerator.num_processes]
    started = time.monotonic()
    if own:
        with _resting_tower(model, accelerator.device) as encode:
            _encode_share(cache, {name: sources[name] for name in own}, encode, processor, accelerator)
    accelerator.wait_for_everyone()
    cache.refresh()
    _check_shared(cache, list(sources), accelerator)
    if missing and accelerator.is_main_process:
        seconds = time.monotonic() - started
        _say(f"Encoded {_count(len(missing))} in {seconds:,.0f} s ({len(missing) / seconds:.1f} per second)")


def _find_sources(datasets: Iterable[Dataset] | Mapping[str, Dataset]) -> dict[str, Source]:
    """Every distinct picture with the first row that shows it."""
    sources: dict[str, Source] = {}
    for dataset in datasets.values() if isinstance(datasets, Mapping) else datasets:
        if "images" not in dataset.column_names:
            continue
        rows = dataset[PICTURES][:] if PICTURES in dataset.column_names else name_pictures(dataset)
        for row, names in enumerate(rows):
            for number, name in enumerate(names or ()):
                if name not in sources:
                    sources[name] = Source(dataset, row, number)
    return sources


def _check_agreement(cache: FeatureCache, accelerator: Accelerator) -> None:
    keys = gather_object([cache.key])
    if any(key != keys[0] for key in keys):
        other = next(key for key in keys if key != keys[0])
        raise _once(
            CacheError(
                f"the processes would encode differently: {'; '.join(differences(other, keys[0]))}; load the same "
                f"weights in all of them, {LIVE}"
            ),
            accelerator,
        )


def _check_shared(cache: FeatureCache, names: Sequence[str], accelerator: Accelerator) -> None:
    lacking = gather_object([len(cache.missing(names))])
    if any(lacking):
        raise _once(
            CacheError(
                f"feature cache {cache.folder}: process {np.argmax(lacking)} does not see {max(lacking):,} of "
                f"{_count(len(names))}: all processes must share one --feature_cache, {LIVE}"
            ),
            accelerator,
        )


def _once(error: CacheError, accelerator: Accelerator) -> CacheError:
    """An error that all processes raise and only the first one prints."""
    error.said_elsewhere = not accelerator.is_main_process
    return error


def _clear(cache: FeatureCache) -> None:
    """Delete shards that cannot be read, and what writers that are long gone left unfinished."""
    for path, fault in cache.damaged.items():
        _say(f"Feature cache: {path.name} is deleted and its pictures are encoded again: {fault}")
        path.unlink(missing_ok=True)
    cache.damaged = {}
    for path in cache.folder.glob(".*.part"):
        try:
            if time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink()
        except FileNotFoundError:  # another run was faster
            continue


def _announce(cache: FeatureCache, missing: Sequence[Source], total: int, processor: ProcessorMixin) -> None:
    """Say how much will be encoded.

    Raises:
        CacheError: when there is no room for it.
    """
    if not missing:
        _say(f"Feature cache: {_count(total)}, all there already ({cache.folder})")
        return
    tokens, exact = _estimate_tokens(missing, processor)
    needed = tokens * cache.width * cache.dtype.itemsize
    there = f", {total - len(missing):,} there already" if len(missing) < total else ""
    about = "" if exact else "about "
    _say(f"Feature cache: {_count(len(missing))} to encode{there}; {about}{_size(needed)} in {cache.folder}")
    free = shutil.disk_usage(cache.folder).free
    if needed * 1.02 > free:
        raise CacheError(
            f"the features take {_size(needed)}, {cache.folder} has {_size(free)} free: make room, give another "
            f"--feature_cache, {LIVE}"
        )


def _count(number: int) -> str:
    return f"{number:,} picture{'' if number == 1 else 's'}"


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.2f} MiB"


def _estimate_tokens(sources: Sequence[Source], processor: ProcessorMixin) -> tuple[int, bool]:
    """Image tokens of pictures, and whether that is exact; where they differ by shape, from a sample's shapes."""
    step = -(-len(sources) // SIZED)
    sample = sources[::step]
    tokens = sum(_picture_tokens(source, processor) for source in sample)
    return round(tokens * len(sources) / len(sample)), step == 1


def _picture_tokens(source: Source, processor: ProcessorMixin) -> int:
    try:
        with PillowImage.open(image_source(_stored_picture(source))) as opened:
            width, height = opened.size
    except UNREADABLE as error:
        raise _unreadable(source, error) from error
    return picture_tokens(processor, height, width)


def _stored_picture(source: Source) -> dict[str, Any]:
    number = source.row if source.dataset._indices is None else source.dataset._indices.column(0)[source.row].as_py()
    return source.dataset.data.column("images")[number].values[source.number].as_py()


def _unreadable(source: Source, error: Exception) -> DatasetError:
    name = _name_of(source.dataset, source.row)
    return DatasetError(f"{name}: image {source.number + 1} cannot be read: {error}")


def _encode_share(
    cache: FeatureCache,
    sources: Mapping[str, Source],
    encode: Callable[[Mapping[str, torch.Tensor]], torch.Tensor],
    processor: ProcessorMixin,
    accelerator: Accelerator,
) -> None:
    """Encode the pictures of this process and write them, a shard at a time."""
    options = _call_options(processor)
    shard: dict[str, torch.Tensor] = {}
    size, begun = 0, time.monotonic()
    prepared = _ahead(lambda item: (item[0], _load_pixels(item[1], processor, options)), sources.items())
    words = "Encoding pictures" if accelerator.num_processes == 1 else "Encoding pictures (the first process's share)"
    bar = track(
        prepared,
        words,
        total=len(sources),
        console=Console(stderr=True),
        disable=not accelerator.is_main_process or not sources,
    )
    for name, pixels in bar:
        inputs = {field: value.to(accelerator.device) for field, value in pixels.items()}
        with torch.no_grad(), accelerator.autocast():
            features = encode(inputs)
        shard[name] = features.reshape(-1, features.shape[-1]).to("cpu", cache.dtype)
        size += shard[name].nbytes
        if len(shard) >= SHARD_PICTURES or size >= SHARD_BYTES or time.monotonic() - begun > SHARD_SECONDS:
            cache.write(shard)
            shard, size, begun = {}, 0, time.monotonic()
    cache.write(shard)


def _ahead(prepare: Callable, items: Iterable) -> Iterator:
    """What `prepare` makes of each item, in order; threads work a little ahead, so that the tower does not wait."""
    threads = _threads()
    waiting: deque = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(prepare, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _load_pixels(source: Source, processor: ProcessorMixin, options: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What the collator would give to the tower for one picture: its pixels, crops after it, and their places."""
    try:
        picture = open_image(_stored_picture(source))
    except UNREADABLE as error:
        raise _unreadable(source, error) from error
    return make_pixels(picture, processor, options)


def make_pixels(
    picture: PillowImage.Image, processor: ProcessorMixin, options: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """The tower's inputs for one picture, without the text that the processor would tokenise along with it."""
    made = processor.image_processor([picture], **options)
    return {
        name: torch.stack([torch.as_tensor(entry) for entry in made[name]])
        for name in ("pixel_values", "image_position_ids")
        if name in made
    }


# The tower


@contextmanager
def _resting_tower(model: nn.Module, device: torch.device) -> Iterator[Callable]:
    """A function from pixels to features, by the model's own tower in evaluation mode, or a copy of it on `device`.

    The tower stays where it is: FSDP cuts up what lies on the CPU.
    """
    backbone = backbone_of(model)
    tower = backbone.vision_tower
    if next(tower.parameters()).device.type != device.type:  # one of them may not say which of several it is
        tower = copy.deepcopy(tower).to(device)
    training = [module for module in tower.modules() if module.training]
    tower.eval()
    encode = ENCODERS[backbone.config.model_type]
    try:
        with unchanged_randomness():
            yield lambda inputs: encode(backbone, tower, inputs)
    finally:
        for module in training:
            module.training = True


def _encode_gemma3(backbone: nn.Module, tower: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """As `Gemma3MultiModalProjector.forward` begins (transformers 5.23): (crops, tokens, width)."""
    hidden = tower(pixel_values=inputs["pixel_values"]).last_hidden_state
    projector = _plain(backbone.multi_modal_projector)
    side = projector.patches_per_image
    grid = hidden.transpose(1, 2).reshape(len(hidden), -1, side, side).contiguous()
    return projector.avg_pool(grid).flatten(2).transpose(1, 2)


def _encode_gemma4(backbone: nn.Module, tower: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The tower pools, and strips its padding: (tokens, width)."""
    places = inputs["image_position_ids"]
    return tower(pixel_values=inputs["pixel_values"], pixel_position_ids=places).last_hidden_state


ENCODERS = {"gemma3": _encode_gemma3, "gemma4": _encode_gemma4}


def _pooling(backbone: nn.Module) -> str:
    if backbone.config.model_type != "gemma3":
        return "the tower's own"
    projector = _plain(backbone.multi_modal_projector)
    return f"average of {projector.kernel_size} x {projector.kernel_size} of {projector.patches_per_image} a side"


def _plain(module: nn.Module) -> nn.Module:
    """A module without the wrapper that PEFT puts around what trains in full."""
    return getattr(module, "original_module", module)


# When a run must stay live


def why_not(
    model: nn.Module, processor: ProcessorMixin, dataset: Dataset | Iterable[Dataset] | Mapping[str, Dataset]
) -> str | None:
    """Why features cannot be computed beforehand, or None where they can."""
    if not supports_features(model):
        return f"models of family {model.config.model_type} do not take features in place of pixels"
    reason = _why_not_tower(backbone_of(model).vision_tower)
    if reason:
        return reason
    datasets = [dataset] if isinstance(dataset, Dataset) else dataset
    for rows in datasets.values() if isinstance(datasets, Mapping) else datasets:
        if rows.format["type"] == "custom":
            return "a transform changes the rows when they are read (`set_transform`), perhaps at random"
    if _is_random(processor):
        return "the image processor gives other pixels for the same picture each time"
    return None


def _why_not_tower(tower: nn.Module) -> str | None:
    parameters = list(tower.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    if trained:
        return f"the vision tower trains ({trained:,} of its parameters), so that its features change with every step"
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        return "ZeRO-3 cuts up the tower's weights among the processes"
    if any(parameter.is_meta for parameter in parameters) or is_fsdp_enabled():
        return "not every process has the tower's weights (`fsdp_cpu_ram_efficient_loading: true`)"
    if any(hasattr(parameter, "device_mesh") for parameter in parameters):
        return "FSDP has cut up the tower's weights among the processes"
    return None


def _is_random(processor: ProcessorMixin) -> bool:
    """Whether a picture of noise comes out differently, or a random state has moved meanwhile."""
    pixels = np.random.default_rng(0).integers(0, 256, (256, 512, 3), dtype=np.uint8)
    picture, options = PillowImage.fromarray(pixels), _call_options(processor)
    with unchanged_randomness():
        before = _random_states()
        first, *others = (make_pixels(picture, processor, options) for _ in range(4))
        if _random_states() != before:
            return True
    return any(not torch.equal(first[name], other[name]) for other in others for name in first)


def _random_states() -> tuple[bytes, ...]:
    numpy, position = np.random.get_state()[1:3]
    states = repr(random.getstate()).encode(), numpy.tobytes(), torch.get_rng_state().numpy().tobytes()
    return *states, str(position).encode()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
