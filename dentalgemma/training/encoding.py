"""Pictures through the vision tower, all processes together: what a feature cache lacks is computed and written."""

from __future__ import annotations

import copy
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from PIL import Image as PillowImage
from torch import nn
from tqdm import tqdm
from transformers import ProcessorMixin

from data_builders.images import UNREADABLE
from dentalgemma.models.processors import picture_tokens
from dentalgemma.training.backbone import backbone_of
from dentalgemma.training.checkpoints import first_process, said_once, say, unchanged_randomness
from dentalgemma.training.data import PICTURES, DatasetError, image_source, open_image
from dentalgemma.training.feature_cache import LIVE, CacheError, FeatureCache, describe_differences
from dentalgemma.training.features import call_options, make_pixels, plain
from dentalgemma.training.picture_names import count_threads, name_pictures, name_place, stored_number

SHARD_PICTURES = 1024
SHARD_SECONDS = 60.0
SHARD_BYTES = 2**30  # crops make a picture several times as large
ABANDONED = 3600.0  # seconds after which an unfinished file is nobody's any more
PATIENCE = 90.0  # seconds until a network file system shows what another machine wrote; NFS lists after up to 60
SIZED = 500  # pictures whose headers are read for the estimate


class Source(NamedTuple):
    """Where a picture that is to be encoded lies: a dataset, the place of a row in it, the number within the row."""

    dataset: Dataset
    row: int
    number: int


def encode_pictures(
    cache: FeatureCache,
    datasets: Iterable[Dataset],
    *,
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
        cache.refresh()  # another run may have mended it since it was opened
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
    _check_shared(cache, list(sources), accelerator)
    if missing and accelerator.is_main_process:
        seconds = time.monotonic() - started
        say(f"Encoded {_count(len(missing))} in {seconds:,.0f} s ({len(missing) / seconds:.1f} per second)")


def _find_sources(datasets: Iterable[Dataset]) -> dict[str, Source]:
    """Every distinct picture with the first row that shows it."""
    sources: dict[str, Source] = {}
    for dataset in datasets:
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
        raise said_once(
            CacheError(
                f"the processes would encode differently: {describe_differences(other, keys[0])}; load the same "
                f"weights in all of them, {LIVE}"
            ),
            accelerator,
        )


def _check_shared(cache: FeatureCache, names: Sequence[str], accelerator: Accelerator) -> None:
    seen = gather_object([wait_for(cache, names)])
    lacking, fault = max(seen, key=lambda entry: entry[0])
    if lacking:
        why = fault or f"all processes must share one --feature_cache, {LIVE}"
        raise said_once(
            CacheError(
                f"feature cache {cache.folder}: process {seen.index((lacking, fault))} does not see {lacking:,} of "
                f"{_count(len(names))}: {why}"
            ),
            accelerator,
        )


def wait_for(cache: FeatureCache, names: Sequence[str]) -> tuple[int, str | None]:
    """How many pictures the folder does not show, and what kept it from being read, when patience has run out."""
    pause, until = 0.1, time.monotonic() + PATIENCE
    while True:
        try:
            cache.refresh()
            fault = None
        except CacheError as error:  # said by all processes together, lest the others wait for this one
            fault = str(error)
        lacking = len(cache.missing(names))
        left = until - time.monotonic()
        if not lacking or left <= 0:
            return lacking, fault
        time.sleep(min(pause, left))
        pause = min(2 * pause, 10.0)


def _clear(cache: FeatureCache) -> None:
    """Set aside shards that are damaged, and delete what writers that are long gone left unfinished."""
    for path, fault in cache.damaged.items():
        say(f"Feature cache: {path.name} is set aside as *.damaged, its pictures are encoded again: {fault}")
        with suppress(FileNotFoundError):  # another run was faster
            path.replace(path.with_name(f"{path.name}.damaged"))
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
        say(f"Feature cache: {_count(total)}, all there already ({cache.folder})")
        return
    tokens, exact = _estimate_tokens(missing, processor)
    needed = tokens * cache.width * cache.dtype.itemsize
    there = f", {total - len(missing):,} there already" if len(missing) < total else ""
    about = "" if exact else "about "
    say(f"Feature cache: {_count(len(missing))} to encode{there}; {about}{_size(needed)} in {cache.folder}")
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
    return source.dataset.data.column("images")[stored_number(source.dataset, source.row)].values[source.number].as_py()


def _unreadable(source: Source, error: Exception) -> DatasetError:
    name = name_place(source.dataset, source.row)
    return DatasetError(f"{name}: image {source.number + 1} cannot be read: {error}")


def _encode_share(
    cache: FeatureCache,
    sources: Mapping[str, Source],
    encode: Callable[[Mapping[str, torch.Tensor]], torch.Tensor],
    processor: ProcessorMixin,
    accelerator: Accelerator,
) -> None:
    """Encode the pictures of this process and write them, a shard at a time."""
    options = call_options(processor)
    shard: dict[str, torch.Tensor] = {}
    size, begun = 0, time.monotonic()
    prepared = _ahead(lambda item: (item[0], _load_pixels(item[1], processor, options)), sources.items())
    words = "Encoding pictures" if accelerator.num_processes == 1 else "Encoding pictures (the first process's share)"
    # Not rich's, which shows nothing in a log file until all is done.
    with tqdm(prepared, words, len(sources), unit=" pictures", disable=not accelerator.is_main_process) as bar:
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
    threads = count_threads()
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
    projector = plain(backbone.multi_modal_projector)
    side = projector.patches_per_image
    grid = hidden.transpose(1, 2).reshape(len(hidden), -1, side, side).contiguous()
    return projector.avg_pool(grid).flatten(2).transpose(1, 2)


def _encode_gemma4(backbone: nn.Module, tower: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The tower pools, and strips its padding: (tokens, width)."""
    places = inputs["image_position_ids"]
    return tower(pixel_values=inputs["pixel_values"], pixel_position_ids=places).last_hidden_state


ENCODERS = {"gemma3": _encode_gemma3, "gemma4": _encode_gemma4}
