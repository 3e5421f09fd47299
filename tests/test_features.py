"""The feature cache: exact, shared, resumable, and refused where anything that features depend on is another."""

import copy
import errno
import hashlib
import importlib.metadata
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
import zlib
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import REPOSITORY
from datasets import Dataset, Features, Image, List, Value, load_dataset
from feature_cases import BLOCK, SHARD, build
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from PIL import Image as PillowImage
from torch.utils.data import DataLoader

from dentalgemma.models.loading import load_pretrained
from dentalgemma.models.processors import set_image_fit
from dentalgemma.training import encoding, feature_cache
from dentalgemma.training.data import PICTURES, ChatCollator, DatasetError
from dentalgemma.training.encoding import encode_pictures
from dentalgemma.training.feature_cache import CacheError
from dentalgemma.training.features import FeatureCache, feature_key, feature_root, find_cache, why_not
from dentalgemma.training.picture_names import name_pictures

KEY = {"format": 1, "stored": "bfloat16", "width": 8}
LANGUAGE = r".*language_model.*\.q_proj"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As the processes of torchrun have it; the last bits depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture(params=["tiny_model", "tiny_gemma4"])
def family(request):
    """A frozen model with its processor, of each family."""
    return frozen(request.getfixturevalue(request.param))


@pytest.fixture
def gemma3(tiny_model):
    return frozen(tiny_model)


def frozen(folder):
    model, processor = load_pretrained(folder)
    return model.requires_grad_(False), processor


def picture(seed, width=200, height=100):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    PillowImage.fromarray(pixels).save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


def rows_of(*pictures):
    """One row for each list of pictures, as `load_splits` gives them."""
    messages = {"prompt": "Is a tooth missing?", "completion": "No."}
    roles = {"prompt": "user", "completion": "assistant"}
    rows = {name: [[{"role": roles[name], "content": text}]] * len(pictures) for name, text in messages.items()}
    rows |= {"row_id": [f"r{number}" for number in range(len(pictures))], "images": list(pictures)}
    message = List({"role": Value("string"), "content": Value("string")})
    types = {"prompt": message, "completion": message, "row_id": Value("string"), "images": List(Image(decode=False))}
    return Dataset.from_dict(rows, features=Features(types))


def some_rows():
    a, b, c = (picture(seed, width) for seed, width in ((0, 200), (1, 100), (2, 320)))
    return rows_of([a], [a], [b, c], [], [b])


def named(rows):
    return rows.add_column(PICTURES, name_pictures(rows))


def encoded(root, rows, model, processor, accelerator):
    cache = find_cache(root, feature_key(model, processor, mixed_precision="no"))
    encode_pictures(cache, [rows], model=model, processor=processor, accelerator=accelerator)
    return cache


def live_features(model, batch):
    """What goes into the projector when a batch's pixels run through the model."""
    seen = []
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone = base.model
    if hasattr(backbone, "multi_modal_projector"):
        module = backbone.multi_modal_projector
        module = getattr(module, "original_module", module).mm_soft_emb_norm
        handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    else:
        handle = backbone.embed_vision.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
    with torch.no_grad():
        backbone.get_image_features(**{key: batch[key] for key in batch if key.startswith(("pixel", "image_p"))})
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])


def test_each_picture_alone_is_encoded_as_the_live_path_does_in_a_batch(family, tmp_path, accelerator):
    """Bit for bit, on a CPU in fp32; pictures of other shapes, several in a row, none in another."""
    model, processor = family
    rows = named(some_rows())
    cache = encoded(tmp_path, rows, model, processor, accelerator)
    live = live_features(model.train(), ChatCollator(processor)(list(rows)))

    names = [name for row in rows[PICTURES] for name in row]
    assert len(names) == 5
    assert len(cache) == 3
    assert torch.equal(cache.read(names), live)
    assert sum(cache.tokens(name) for name in names) == len(live)
    assert not torch.equal(cache.read(names[::-1]), live)  # negative control: another order is another matter


def test_crops_of_a_long_picture_follow_it(gemma3, tmp_path, accelerator):
    model, processor = gemma3
    processor.image_processor.pan_and_scan_min_crop_size = 64
    set_image_fit(processor, "pan_and_scan")
    rows = named(some_rows())
    cache = encoded(tmp_path, rows, model, processor, accelerator)

    names = [name for row in rows[PICTURES] for name in row]
    assert [cache.tokens(name) for name in names] == [48, 48, 16, 64, 16]  # 2, 0 and 3 crops of 16 tokens each
    assert torch.equal(cache.read(names), live_features(model, processor_inputs(processor, rows)))


def processor_inputs(processor, rows):
    pictures = [[PillowImage.open(io.BytesIO(entry["bytes"])) for entry in row] for row in rows["images"] if row]
    return {"pixel_values": torch.as_tensor(np.stack(processor(images=pictures)["pixel_values"]))}


@pytest.mark.parametrize("projector", [[], ["multi_modal_projector"]], ids=["frozen", "trained"])
def test_an_adapter_and_a_trained_projector_change_no_feature(projector, gemma3, tmp_path, accelerator):
    model, processor = gemma3
    plain = copy.deepcopy(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=LANGUAGE, modules_to_save=projector or None))
    rows = named(some_rows())

    assert why_not(adapted, processor, datasets=[rows]) is None
    assert feature_key(adapted, processor, mixed_precision="no") == feature_key(plain, processor, mixed_precision="no")
    first = encoded(tmp_path / "a", rows, adapted, processor, accelerator)
    second = encoded(tmp_path / "b", rows, plain, processor, accelerator)
    names = [name for row in rows[PICTURES] for name in row]
    assert torch.equal(first.read(names), second.read(names))


def test_encoding_leaves_no_trace_in_the_model_and_the_random_states(family, tmp_path, accelerator):
    model, processor = family
    model.train()
    model.model.vision_tower.encoder.layers[0].eval()
    modes = [module.training for module in model.modules()]
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
    encoded(tmp_path, some_rows(), model, processor, accelerator)

    assert [module.training for module in model.modules()] == modes
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert np.random.get_state()[1].tolist() == states[2]


def test_a_run_in_bf16_stores_bf16(gemma3, tmp_path, accelerator):
    model, processor = gemma3
    assert feature_key(model, processor, mixed_precision="no")["stored"] == "float32"
    assert feature_key(model, processor, mixed_precision="fp16")["stored"] == "float32"
    assert feature_key(model, processor, mixed_precision="bf16")["stored"] == "bfloat16"

    rows = named(some_rows())
    model.bfloat16()
    cache = encoded(tmp_path, rows, model, processor, accelerator)
    names = [name for row in rows[PICTURES] for name in row]
    assert cache.read(names).dtype == torch.bfloat16
    assert torch.equal(cache.read(names), live_features(model, ChatCollator(processor)(list(rows))))


def test_the_tower_runs_in_the_precision_that_training_has_it_in(gemma3, tmp_path, accelerator):
    model, processor = gemma3
    rows = named(some_rows())
    names = [name for row in rows[PICTURES] for name in row]
    mixed = SimpleNamespace(
        autocast=lambda: torch.autocast("cpu", torch.bfloat16),
        **{
            name: getattr(accelerator, name) for name in ("device", "is_main_process", "process_index", "num_processes")
        },
        wait_for_everyone=accelerator.wait_for_everyone,
    )
    cache = find_cache(tmp_path, feature_key(model, processor, mixed_precision="bf16"))
    encode_pictures(cache, [rows], model=model, processor=processor, accelerator=mixed)
    batch = ChatCollator(processor)(list(rows))
    with torch.autocast("cpu", torch.bfloat16):
        live = live_features(model, batch)

    assert torch.equal(cache.read(names), live.bfloat16())
    assert not torch.equal(cache.read(names), live_features(model, batch).bfloat16())  # negative control


# Names


def test_the_folder_of_caches_is_the_one_given_or_beside_the_hub(tmp_path, monkeypatch):
    monkeypatch.delenv("DENTALGEMMA_CACHE", raising=False)
    assert feature_root(str(tmp_path)) == tmp_path
    assert feature_root(None) == Path(constants.HF_HOME) / "dentalgemma" / "features"
    monkeypatch.setenv("DENTALGEMMA_CACHE", str(tmp_path / "own"))
    assert feature_root(None) == tmp_path / "own" / "features"


def test_pictures_are_named_by_their_bytes_and_not_by_what_the_dataset_calls_them(tmp_path):
    a, b = picture(0), picture(1)
    (tmp_path / "b.png").write_bytes(b["bytes"])
    on_disk = {"bytes": None, "path": str(tmp_path / "b.png")}
    rows = rows_of([a], [a, b], [], [b], [on_disk]).add_column("image_id", ["same"] * 5)
    first, second = (hashlib.sha256(entry["bytes"]).hexdigest() for entry in (a, b))

    expected = [[first], [first, second], [], [second], [second]]
    assert name_pictures(rows) == expected
    assert name_pictures(rows.select([4, 0, 2, 0])) == [expected[number] for number in (4, 0, 2, 0)]
    assert name_pictures(rows.shuffle(seed=0)) == [expected[int(row[1])] for row in rows.shuffle(seed=0)["row_id"]]
    assert name_pictures(rows.remove_columns("images")) == [[]] * 5


def test_names_survive_blocks_slices_and_rows_without_images():
    pictures = [picture(seed, 8, 8) for seed in range(70)]
    rows = rows_of(*[None if number % 7 == 0 else [pictures[number // 2]] for number in range(140)])
    expected = [
        [] if number % 7 == 0 else [hashlib.sha256(pictures[number // 2]["bytes"]).hexdigest()] for number in range(140)
    ]

    assert name_pictures(rows) == expected
    assert name_pictures(rows.select(range(65, 130))) == expected[65:130]


def test_a_picture_that_is_gone_or_broken_names_its_row(gemma3, tmp_path, accelerator):
    gone = rows_of([picture(0)], [{"bytes": None, "path": str(tmp_path / "gone.png")}])
    with pytest.raises(DatasetError, match=r"row r1: image 1 cannot be read: .*gone\.png"):
        name_pictures(gone)
    cut = picture(1)
    whole = rows_of([picture(0)], [{**cut, "bytes": cut["bytes"][:2000]}])
    with pytest.raises(DatasetError, match=r"row r1: image 1 cannot be read: .*truncated"):
        encoded(tmp_path, whole, *gemma3, accelerator)


@pytest.mark.parametrize("ids", ["no column", "no value"])
def test_without_row_ids_a_bad_picture_is_named_by_the_place_of_its_row(ids, gemma3, tmp_path, accelerator):
    """In the split as it is stored, also where rows before it were left out."""
    gone, cut = {"bytes": None, "path": str(tmp_path / "gone.png")}, picture(1)
    for fault, bad in {"No such file": gone, "truncated": cut | {"bytes": cut["bytes"][:2000]}}.items():
        rows = rows_of([picture(0)], [], [picture(0), bad]).remove_columns("row_id")
        if ids == "no value":
            rows = rows.add_column("row_id", [""] * 3)
        for split in (rows, rows.select([2, 0])):
            sentence = (
                rf"^a row without row_id \(row 2 of the split, counted from 0\): image 2 cannot be read: .*{fault}"
            )
            with pytest.raises(DatasetError, match=sentence) as refused:
                encoded(tmp_path, split, *gemma3, accelerator)
            assert refused.value.exit_code == 2


# The folder


def some_features(count=6, tokens=4, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{number:064x}": torch.randn(tokens + number, width, generator=generator).bfloat16() for number in range(count)
    }


def test_what_is_read_is_what_was_written(tmp_path):
    written = some_features()
    names = list(written)
    cache = FeatureCache(tmp_path / "cache", KEY)
    cache.write({name: written[name] for name in names[:4]})
    cache.write({name: written[name] for name in names[4:]})

    for there in (cache, FeatureCache(tmp_path / "cache", KEY)):
        assert len(there) == 6
        assert names[5] in there and "f" * 64 not in there
        assert there.tokens(names[5]) == 9
        assert there.missing(["f" * 64, *names, "f" * 64]) == ["f" * 64]
        wanted = [names[5], names[0], names[5]]
        assert torch.equal(there.read(wanted), torch.cat([written[name] for name in wanted]))
        assert there.read([]).shape == (0, 8)
        with pytest.raises(CacheError, match=r"lacks picture ffff.*--vision_features live"):
            there.read(["f" * 64])


def test_a_change_to_what_was_read_does_not_reach_the_cache(tmp_path):
    written = some_features(1)
    cache = FeatureCache(tmp_path, KEY)
    cache.write(written)
    cache.read(list(written)).zero_()

    assert torch.equal(cache.read(list(written)), *written.values())
    assert torch.equal(FeatureCache(tmp_path, KEY).read(list(written)), *written.values())


def test_only_the_owner_may_look_into_the_folder(tmp_path):
    FeatureCache(tmp_path / "a" / "b", KEY)

    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700


def test_two_runs_may_write_the_same_pictures(tmp_path):
    written = some_features()
    first, second = FeatureCache(tmp_path, KEY), FeatureCache(tmp_path, KEY)
    first.write(written)
    second.write(written)
    second.write({name: written[name] for name in list(written)[:2]})

    first.refresh()
    assert len(first) == 6
    assert torch.equal(first.read(list(written)), torch.cat(list(written.values())))
    assert not list(tmp_path.glob(".*.part"))


class Reads(torch.utils.data.Dataset):
    def __init__(self, cache, names):
        self.cache, self.names = cache, names

    def __len__(self):
        return len(self.names)

    def __getitem__(self, number):
        return self.cache.read([self.names[number]])


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_a_data_loader_read_it(start, tmp_path):
    written = some_features()
    cache = FeatureCache(tmp_path, KEY)
    cache.write(written)
    cache.read(list(written))  # its maps are open when the workers start
    loader = DataLoader(Reads(cache, list(written)), None, num_workers=1, multiprocessing_context=start)

    assert all(torch.equal(read, features) for read, features in zip(loader, written.values(), strict=True))


def test_a_pickled_cache_carries_neither_index_nor_handles(tmp_path):
    written = some_features(200)
    cache = FeatureCache(tmp_path, KEY)
    cache.write(written)
    content = pickle.dumps(cache)

    assert len(content) < 1000
    assert torch.equal(pickle.loads(content).read(list(written)), cache.read(list(written)))


def test_three_hundred_shards_take_no_file_handles(tmp_path):
    written = some_features(300, tokens=1)
    cache = FeatureCache(tmp_path, KEY)
    for name in written:
        cache.write({name: written[name]})
    open_now = len(os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 20, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):  # negative control
            _kept = [path.open("rb") for path in tmp_path.glob("*.safetensors")]
        again = FeatureCache(tmp_path, KEY)
        assert torch.equal(again.read(list(written)), torch.cat(list(written.values())))
        assert len(again.shards) == 300
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_full_disk_while_writing_leaves_no_trace(tmp_path, monkeypatch):
    cache = FeatureCache(tmp_path, KEY)

    def write_half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_cache, "save_file", write_half)
    sentence = r"written to .*: \[Errno 28\] No space left on device; make room, .* \(what is written stays\)"
    with pytest.raises(CacheError, match=sentence):
        cache.write(some_features())
    assert [path.name for path in tmp_path.iterdir()] == ["key.json"]


def test_a_limit_on_the_size_of_files_is_said_as_the_system_says_it(tmp_path):
    cache = FeatureCache(tmp_path, KEY)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(
            CacheError, match=r"written to .*: .*File too large.*; make room, or lift the limit"
        ) as refused:
            cache.write(some_features(100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "No space" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["key.json"]


def flip(shard, place):
    """Turn over one bit of a file that stays as long as it was."""
    content = bytearray(shard.read_bytes())
    content[place] ^= 1
    shard.unlink()  # a map of the old file stays as it was
    shard.write_bytes(content)


def test_values_that_are_not_as_they_were_written_are_refused(tmp_path):
    written = some_features()
    cache = FeatureCache(tmp_path, KEY)
    cache.write(written)
    (shard,) = cache.shards
    flip(shard, -1)
    again = FeatureCache(tmp_path, KEY)
    whole, lost = 0, []
    for name in written:
        try:
            whole += torch.equal(again.read([name]), written[name])
        except CacheError as error:
            lost.append(str(error))

    assert len(again) == 6
    assert whole == 5
    assert len(lost) == 1
    assert re.search(rf"{shard} is damaged: picture 0.* is not as it was written; delete this file and start", lost[0])
    shard.unlink()
    FeatureCache(tmp_path, KEY).write(written)
    assert torch.equal(FeatureCache(tmp_path, KEY).read(list(written)), torch.cat(list(written.values())))


def test_each_picture_is_compared_once_in_a_process(tmp_path, monkeypatch):
    written = some_features()
    FeatureCache(tmp_path, KEY).write(written)
    cache, compared, real = FeatureCache(tmp_path, KEY), [], zlib.crc32
    monkeypatch.setattr(feature_cache.zlib, "crc32", lambda content: compared.append(1) or real(content))
    for _ in range(3):
        cache.read([*written, *written])

    assert len(compared) == 6


def test_other_values_of_the_same_pictures_take_no_ones_place(tmp_path):
    """Two runs on other GPUs may differ in the last bit; who reads the first shard goes on reading it."""
    first, second = FeatureCache(tmp_path, KEY), FeatureCache(tmp_path, KEY)
    first.write(some_features())
    second.write(some_features(seed=1))

    names = list(some_features())
    assert torch.equal(first.read(names), torch.cat(list(some_features().values())))
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


# What features depend on


def change_one_weight(model, processor):
    with torch.no_grad():
        model.model.vision_tower.encoder.layers[1].mlp.fc2.weight[3, 5] += 1e-3


def change_size(model, processor):
    processor.image_processor.size = {"height": 84, "width": 84}


def change_mean(model, processor):
    processor.image_processor.image_mean = [0.4, 0.5, 0.5]


CHANGES = {
    "image size": (change_size, ["image_processor.size.height is 112 there and 84 here"]),
    "processor option": (change_mean, ["image_processor.image_mean is [0.5, 0.5, 0.5] there and [0.4, 0.5, 0.5] here"]),
    "crops": (
        lambda _, processor: set_image_fit(processor, "pan_and_scan"),
        ["image_processor.do_pan_and_scan is False there and True here", "pan_and_scan_max_num_crops is not set there"],
    ),
    "dtype": (
        lambda model, _: model.bfloat16(),
        ["precision.weights is float32 there and bfloat16 here", "stored is float32 there and bfloat16 here"],
    ),
    "one weight": (change_one_weight, ["tower.weights is "]),
    "attention": (lambda model, _: model.set_attn_implementation("eager"), ["attention is sdpa there and eager here"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_cache_of_other_features_is_refused_with_the_reason(change, gemma3, tmp_path, accelerator, capsys):
    model, processor = gemma3
    cache = encoded(tmp_path, some_rows(), model, processor, accelerator)
    alter, reasons = CHANGES[change]
    alter(model, processor)
    key = feature_key(model, processor, mixed_precision="no")
    capsys.readouterr()

    with pytest.raises(CacheError) as refused:
        FeatureCache(cache.folder, key)
    other = find_cache(tmp_path, key)
    said = capsys.readouterr().err
    assert len(other) == 0
    assert other.folder != cache.folder
    for reason in reasons:
        assert reason in str(refused.value)
        assert reason in said
    assert f"feature cache {cache.folder} is not used: " in said


def test_the_same_model_loaded_anew_finds_its_cache(family, tiny_model, tiny_gemma4, tmp_path, accelerator, capsys):
    """Negative control of the refusals; what does not reach a feature does not refuse it either."""
    model, processor = family
    cache = encoded(tmp_path, some_rows(), model, processor, accelerator)
    again, processor_again = frozen({"gemma3": tiny_model, "gemma4": tiny_gemma4}[model.config.model_type])
    with torch.no_grad():
        again.model.language_model.layers[0].mlp.down_proj.weight.mul_(2)
    again.config.vision_config.transformers_version = "5.99"
    if model.config.model_type == "gemma3":
        processor_again.image_processor.pan_and_scan_min_crop_size = 5  # no crops are made
        set_image_fit(processor_again, "stretch")
    capsys.readouterr()

    found = find_cache(tmp_path, feature_key(again, processor_again, mixed_precision="no"))
    assert found.folder == cache.folder
    assert len(found) == 3
    assert capsys.readouterr().err == ""


def test_precision_of_the_run_is_part_of_the_key(gemma3):
    keys = [feature_key(*gemma3, mixed_precision=mixed) for mixed in ("no", "bf16", "fp16")]

    assert [key["precision.autocast"] for key in keys] == ["no", "bf16", "fp16"]
    assert all(key == json.loads(json.dumps(key)) for key in keys)


def test_the_software_that_made_the_features_is_part_of_the_key(gemma3, tmp_path, accelerator, monkeypatch, capsys):
    model, processor = gemma3
    cache = encoded(tmp_path, some_rows(), model, processor, accelerator)
    version = importlib.metadata.version
    later = {"transformers": "5.99.1", "Pillow": "99.8.7", "torchvision": "99.8.7"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: later.get(name) or version(name))
    before, torch.backends.cuda.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision, "tf32"
    try:
        key = feature_key(model, processor, mixed_precision="no")
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    capsys.readouterr()
    find_cache(tmp_path, key)
    said = capsys.readouterr().err

    library = {"pil": "Pillow"}.get(processor.image_processor.backend, processor.image_processor.backend)
    short = [".".join(version(name).split(".")[:2]) for name in ("transformers", library)]
    assert f"transformers is {short[0]} there and 5.99 here" in said
    assert f"resized_by is {library} {short[1]} there and {library} 99.8 here" in said
    assert "tf32 is False there and True here" in said
    assert str(cache.folder) in said


def test_where_torchvision_resizes_its_version_counts(gemma3, monkeypatch):
    model, processor = gemma3
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.29.1+cpu")
    monkeypatch.setattr(type(processor.image_processor), "backend", "torchvision")

    assert feature_key(model, processor, mixed_precision="no")["resized_by"] == "torchvision 0.29"


@pytest.mark.parametrize(("release", "features_stay"), [("5.23.9", True), ("5.24.0", False)])
def test_a_release_that_only_mends_keeps_the_cache(release, features_stay, gemma3, monkeypatch):
    version = importlib.metadata.version

    def key_under(transformers):
        known = {"transformers": transformers}
        monkeypatch.setattr(importlib.metadata, "version", lambda name: known.get(name) or version(name))
        return feature_key(*gemma3, mixed_precision="no")

    assert (key_under("5.23.0") == key_under(release)) == features_stay


def test_of_other_caches_three_are_named_the_most_alike_first(tmp_path, capsys):
    for number in range(5):
        changed = {f"field{name}": name for name in range(number + 1)}
        find_cache(tmp_path, KEY | changed).write(some_features(1))
    find_cache(tmp_path, KEY | {"empty": 1})
    capsys.readouterr()
    find_cache(tmp_path, KEY)
    lines = capsys.readouterr().err.splitlines()

    assert [line.count("field") for line in lines] == [1, 2, 3]
    assert lines[0].endswith("is not used: field0 is 0 there and not set here")


def test_of_many_differences_four_are_named(tmp_path, capsys):
    other = find_cache(tmp_path, KEY | {f"field{number}": number for number in range(41)})
    other.write(some_features(1))
    find_cache(tmp_path, KEY)
    (line,) = capsys.readouterr().err.splitlines()
    with pytest.raises(CacheError) as refused:
        FeatureCache(other.folder, KEY)

    for said in (line, str(refused.value)):
        assert said.count("field") == 4
        assert "not set here; and 37 more" in said


def test_caches_of_another_family_are_not_spoken_of(tmp_path, capsys):
    for family in ("gemma3", "gemma4"):
        find_cache(tmp_path, KEY | {"family": family, "size": 1}).write(some_features(1))
    capsys.readouterr()
    find_cache(tmp_path, KEY | {"family": "gemma4", "size": 2})

    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_folder_that_is_itself_a_cache_is_refused(tmp_path):
    cache = find_cache(tmp_path, KEY)

    with pytest.raises(
        CacheError, match=rf"{cache.folder} is itself a cache: give the folder that it lies in, {tmp_path}$"
    ):
        feature_root(str(cache.folder))
    assert feature_root(str(tmp_path)) == tmp_path


def test_a_shard_of_another_cache_is_refused(tmp_path):
    first, second = FeatureCache(tmp_path / "a", KEY), FeatureCache(tmp_path / "b", KEY | {"image": 1})
    second.write(some_features())
    shutil.copy(second.shards[0], first.folder)

    with pytest.raises(CacheError, match=r"\.safetensors is of other features: image is 1 there and not set here"):
        FeatureCache(tmp_path / "a", KEY)


# Encoding: said beforehand, checked beforehand, resumed


def count_encoded(model):
    seen = []
    model.model.vision_tower.register_forward_pre_hook(lambda *_: seen.append(1))
    return seen


def test_the_size_is_said_beforehand_and_what_is_there_is_not_computed_again(gemma3, tmp_path, accelerator, capsys):
    model, processor = gemma3
    seen = count_encoded(model)
    rows = named(some_rows())
    cache = encoded(tmp_path, rows.select([0, 1]), model, processor, accelerator)
    one, *_ = capsys.readouterr().err.splitlines()
    encode_pictures(cache, [rows], model=model, processor=processor, accelerator=accelerator)
    two, *_ = capsys.readouterr().err.splitlines()
    encode_pictures(cache, [rows, rows], model=model, processor=processor, accelerator=accelerator)
    three = capsys.readouterr().err.splitlines()

    size = 16 * 128 * 4 / 2**20  # tokens, width and bytes of a number
    assert one == f"Feature cache: 1 picture to encode; {size:.2f} MiB in {cache.folder}"
    assert two == f"Feature cache: 2 pictures to encode, 1 there already; {2 * size:.2f} MiB in {cache.folder}"
    assert three == [f"Feature cache: 3 pictures, all there already ({cache.folder})"]
    assert len(seen) == 3


@pytest.mark.parametrize("fit", ["gemma3", "crops", "gemma4"])
def test_the_size_said_is_the_size_written(fit, tiny_model, tiny_gemma4, tmp_path, accelerator, capsys):
    model, processor = frozen(tiny_gemma4 if fit == "gemma4" else tiny_model)
    if fit == "crops":
        processor.image_processor.pan_and_scan_min_crop_size = 64
        set_image_fit(processor, "pan_and_scan")
    rows = named(some_rows())
    cache = encoded(tmp_path, rows, model, processor, accelerator)

    written = cache.read(sorted({name for row in rows[PICTURES] for name in row})).nbytes
    assert f"; {written / 2**20:.2f} MiB in " in capsys.readouterr().err


def test_too_small_a_disk_is_one_sentence_before_any_work(gemma3, tmp_path, accelerator, monkeypatch):
    model, processor = gemma3
    seen = count_encoded(model)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(encoding.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))

    with pytest.raises(CacheError, match=r"the features take 0\.02 MiB, .* has 0\.00 MiB free: make room"):
        encoded(tmp_path, some_rows(), model, processor, accelerator)
    assert not seen


def test_progress_with_the_time_left_shows_in_a_log_file_while_it_is_made(gemma3, tmp_path, accelerator, capsys):
    model, processor = gemma3
    said = []

    def watch(*_):
        time.sleep(0.15)  # the bar moves every 0.1 s
        said.append(capsys.readouterr().err)

    model.model.vision_tower.register_forward_pre_hook(watch)
    encoded(tmp_path, some_rows(), model, processor, accelerator)
    assert re.search(r"Encoding pictures: +67%.* 2/3 \[00:0\d<00:0\d, .* pictures", said[2])  # while it does the third


def test_rows_without_pictures_need_no_word(gemma3, tmp_path, accelerator, capsys):
    cache = encoded(tmp_path, rows_of([], []), *gemma3, accelerator)

    assert len(cache) == 0
    assert capsys.readouterr().err == ""


def test_a_slow_build_writes_what_it_has_every_minute(gemma3, tmp_path, accelerator, monkeypatch):
    monkeypatch.setattr(encoding, "SHARD_SECONDS", 0.0)

    assert len(encoded(tmp_path, some_rows(), *gemma3, accelerator).shards) == 3


def with_header(header):
    text = json.dumps(header).encode()
    return lambda _: len(text).to_bytes(8, "little") + text


DAMAGES = {
    "cut short": lambda content: content[:-1],
    "no header": lambda content: b"\xff" * len(content),
    "another shape": lambda content: content.replace(b"[16,128]", b"[8,256] "),
    "empty": lambda _: b"",
    "a list": with_header([1]),
    "a list for a picture": with_header({"a": [1]}),
    "no key": with_header({"__metadata__": {"format": "pt"}}),
    "a list for a key": with_header({"__metadata__": {"key": "[1]"}}),
    "a number for a key": with_header({"__metadata__": {"key": 1}}),
    "no checksums": lambda content: content.replace(b"crc32", b"crc64"),
    "another name in the checksums": lambda content: re.sub(rb'(crc32":"\{\\").', rb"\1?", content),
    "words for metadata": with_header({"__metadata__": "key"}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_found_said_and_encoded_again(damage, gemma3, tmp_path, accelerator, monkeypatch, capsys):
    monkeypatch.setattr(encoding, "SHARD_PICTURES", 1)
    model, processor = gemma3
    seen = count_encoded(model)
    rows = named(some_rows())
    cache = encoded(tmp_path, rows, model, processor, accelerator)
    names = list(dict.fromkeys(name for row in rows[PICTURES] for name in row))
    whole = cache.read(names).clone()
    shard, content = cache.shards[1], cache.shards[1].read_bytes()
    shard.unlink()  # a map of the old file stays as it was
    shard.write_bytes(DAMAGES[damage](content))

    assert len(FeatureCache(cache.folder, cache.key)) == 2
    again = encoded(tmp_path, rows, model, processor, accelerator)
    said = capsys.readouterr().err
    assert f"Feature cache: {shard.name} is set aside as *.damaged, its pictures are encoded again: " in said
    assert shard.with_name(f"{shard.name}.damaged").read_bytes() == DAMAGES[damage](content)
    assert len(seen) == 4
    assert torch.equal(again.read(names), whole)


@pytest.mark.parametrize("fault", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES])
def test_a_shard_that_cannot_be_read_at_the_moment_stays(fault, gemma3, tmp_path, accelerator, monkeypatch):
    model, processor = gemma3
    cache = encoded(tmp_path, some_rows(), model, processor, accelerator)
    before = {path: path.read_bytes() for path in cache.folder.iterdir()}
    fail_to_open(cache.shards[0], fault, monkeypatch)

    sentence = rf"cannot be read at the moment: .*{os.strerror(fault)}.*nothing of it is lost: .*--vision_features live"
    with pytest.raises(CacheError, match=sentence):
        encoded(tmp_path, some_rows(), model, processor, accelerator)
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in cache.folder.iterdir()} == before
    assert len(FeatureCache(cache.folder, cache.key)) == 3


def fail_to_open(shard, fault, monkeypatch):
    real = Path.open

    def fail(path, *args, **kwargs):
        if path == shard:
            raise OSError(fault, os.strerror(fault), str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", fail)


def test_a_shard_that_another_run_sets_aside_meanwhile_is_simply_missing(tmp_path, monkeypatch):
    cache = FeatureCache(tmp_path, KEY)
    cache.write(some_features())
    fail_to_open(cache.shards[0], errno.ENOENT, monkeypatch)

    again = FeatureCache(tmp_path, KEY)
    assert (len(again), again.damaged) == (0, {})


def test_a_shard_that_another_run_has_mended_meanwhile_stays(gemma3, tmp_path, accelerator, capsys):
    model, processor = gemma3
    cache = encoded(tmp_path, some_rows(), model, processor, accelerator)
    shard, content = cache.shards[0], cache.shards[0].read_bytes()
    shard.unlink()
    shard.write_bytes(content[:-1])
    late = FeatureCache(cache.folder, cache.key)
    assert list(late.damaged) == [shard]
    shard.write_bytes(content)
    capsys.readouterr()
    encode_pictures(late, [some_rows()], model=model, processor=processor, accelerator=accelerator)

    assert "3 pictures, all there already" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"[1]", b"null", b"{", b"\xff"])
def test_a_key_file_that_holds_no_key_is_one_sentence_with_a_remedy(content, tmp_path):
    FeatureCache(tmp_path, KEY).write(some_features())
    (tmp_path / "key.json").write_bytes(content)

    sentence = r"its key\.json is damaged \(.*\); delete it, or the whole folder, and start again, give another"
    with pytest.raises(CacheError, match=sentence):
        FeatureCache(tmp_path, KEY)
    (tmp_path / "key.json").unlink()
    assert len(FeatureCache(tmp_path, KEY)) == 6


def test_a_folder_that_shows_late_what_others_wrote_is_waited_for(tmp_path, monkeypatch):
    """NFS lists what another machine wrote up to a minute later; here the third look finds it."""
    written = some_features()
    cache = FeatureCache(tmp_path / "cache", KEY)
    FeatureCache(tmp_path / "cache", KEY).write(written)
    (shard,) = (tmp_path / "cache").glob("*.safetensors")
    hidden, pauses = tmp_path / "hidden", []
    shard.rename(hidden)

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 3:
            hidden.rename(shard)

    monkeypatch.setattr(encoding.time, "sleep", sleep)
    assert encoding.wait_for(cache, list(written)) == (0, None)
    assert pauses == pytest.approx([0.1, 0.2, 0.4])


def test_patience_with_a_folder_ends(tmp_path, monkeypatch):
    """After 90 seconds; a shard that cannot be read is waited for like one that is not listed, and is the reason."""
    written, now = some_features(), [0.0]
    monkeypatch.setattr(encoding.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(encoding.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    cache = FeatureCache(tmp_path, KEY)
    assert encoding.wait_for(cache, list(written)) == (6, None)
    assert now[0] == pytest.approx(90)

    FeatureCache(tmp_path, KEY).write(written)
    (shard,) = tmp_path.glob("*.safetensors")
    fail_to_open(shard, errno.ESTALE, monkeypatch)
    lacking, fault = encoding.wait_for(cache, list(written))
    assert lacking == 6
    assert "cannot be read at the moment" in fault
    monkeypatch.undo()
    assert encoding.wait_for(cache, list(written)) == (0, None)


def test_only_unfinished_files_that_nobody_writes_any_more_are_deleted(gemma3, tmp_path, accelerator):
    cache = find_cache(tmp_path, feature_key(*gemma3, mixed_precision="no"))
    old, new = cache.folder / ".a.part", cache.folder / ".b.part"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, time.time() - 7200))
    model, processor = gemma3
    encode_pictures(cache, [some_rows()], model=model, processor=processor, accelerator=accelerator)

    assert not old.exists()
    assert new.exists()


@pytest.fixture(scope="module")
def built_elsewhere(tiny_model, vqa_dataset, tmp_path_factory):
    """Roots of a cache by two processes and of one whose only process was killed, and how the two ended."""
    folder = tmp_path_factory.mktemp("elsewhere")
    commands = {
        "two": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
        "killed": [sys.executable],
    }
    running = {}
    for name, command in commands.items():
        case = {"model": str(tiny_model), "dataset": str(vqa_dataset), "root": str(folder / name)}
        path = folder / f"{name}.json"
        path.write_text(json.dumps(case | {"kill_after": 2 * SHARD + 2 if name == "killed" else None}))
        running[name] = subprocess.Popen(
            [*command, str(REPOSITORY / "tests/feature_cases.py"), str(path)],
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY / "tests",
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(REPOSITORY)},
        )
    errors = {name: process.communicate(timeout=120)[1] for name, process in running.items()}
    assert running["two"].returncode == 0, errors["two"][-4000:]
    return folder, running["killed"].returncode, errors


def case_of(model, dataset, root):
    return {"model": str(model), "dataset": str(dataset), "root": str(root)}


@pytest.fixture(scope="module")
def alone(tiny_model, vqa_dataset, tmp_path_factory, accelerator):
    """The cache as one process builds it, and the names of its pictures."""
    cache = build(case_of(tiny_model, vqa_dataset, tmp_path_factory.mktemp("alone")), accelerator)
    splits = load_dataset(str(vqa_dataset)).values()
    names = sorted({name for split in splits for row in name_pictures(split) for name in row})
    return cache, names


def test_two_processes_build_the_cache_that_one_builds(built_elsewhere, alone):
    folder, _, errors = built_elsewhere
    cache, names = alone
    together = FeatureCache(folder / "two" / cache.folder.name, cache.key)

    assert len(names) == len(together) == len(cache) == 40
    for name in names:
        assert torch.equal(together.read([name]), cache.read([name]))
    assert errors["two"].count(f"Feature cache: {len(names)} pictures to encode") == 1  # only the first process speaks
    half = -(-len(names) // 2)
    assert errors["two"].count(f" 0/{half} [") == 1
    assert len(together.shards) == 2 * -(-half // SHARD)  # each wrote its own share


def test_a_killed_build_goes_on_with_what_is_missing(built_elsewhere, alone, tiny_model, vqa_dataset, accelerator):
    folder, code, _ = built_elsewhere
    cache, names = alone
    assert code == -signal.SIGKILL
    assert len(FeatureCache(folder / "killed" / cache.folder.name, cache.key)) == 2 * SHARD
    seen = []
    resumed = build(case_of(tiny_model, vqa_dataset, folder / "killed"), accelerator, lambda: seen.append(1))

    assert len(seen) == len(names) - 2 * SHARD
    assert torch.equal(resumed.read(names), cache.read(names))


@pytest.fixture(scope="module")
def processes(built_elsewhere):
    """What each of the two processes saw besides."""
    folder, *_ = built_elsewhere
    return [json.loads((folder / "two" / f"process{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_share_the_hashing_and_know_all_names(processes, vqa_dataset):
    rows = load_dataset(str(vqa_dataset))["train"]
    first, second = (seen["names"] for seen in processes)

    assert first["names"] == second["names"] == name_pictures(rows.shuffle(seed=0))
    assert sorted(first["hashed"] + second["hashed"]) == list(range(len(rows)))
    assert abs(len(first["hashed"]) - len(second["hashed"])) <= BLOCK


def test_processes_that_hold_other_rows_name_their_own(processes, vqa_dataset):
    rows = load_dataset(str(vqa_dataset))["train"]

    for rank, seen in enumerate(processes):
        assert seen["names of other rows"]["names"] == name_pictures(rows.select(range(9 + rank)))
        assert seen["names of other rows"]["hashed"] == list(range(9 + rank))


def test_a_picture_that_one_process_cannot_read_stops_all_and_is_said_once(processes):
    assert [seen["gone"]["said_elsewhere"] for seen in processes] == [False, True]
    for seen in processes:
        assert seen["gone"]["kind"] == "DatasetError"
        assert "image 1 cannot be read: [Errno 2] No such file or directory: 'gone.png'" in seen["gone"]["text"]


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("weights", r"the processes would encode differently: tower\.weights is [0-9a-f]{10}… there and "),
        ("folders", r"process \d does not see \d+ of \d+ pictures: all processes must share one --feature_cache"),
    ],
)
def test_processes_that_hold_other_weights_or_folders_are_told_once(fault, sentence, processes):
    assert [seen[fault]["said_elsewhere"] for seen in processes] == [False, True]
    for seen in processes:
        assert re.search(sentence, seen[fault]["text"])


# When a run must stay live


def test_nothing_speaks_against_a_frozen_tower(family):
    model, processor = family

    assert why_not(model, processor, datasets=[some_rows()]) is None
    assert why_not(model.train(), processor, datasets=[some_rows(), named(some_rows())]) is None


def test_a_tower_that_trains_stays_live(family):
    model, processor = family
    adapted = get_peft_model(model, LoraConfig(target_modules=r".*vision_tower.*(fc1|q_proj\.linear)", r=2))
    reason = why_not(adapted, processor, datasets=[some_rows()])

    assert reason.startswith("the vision tower trains (")
    assert "its features change with every step" in reason


def test_rows_that_are_changed_when_read_stay_live(gemma3):
    rows = some_rows()
    rows.set_transform(lambda batch: batch)

    assert "set_transform" in why_not(*gemma3, datasets=[some_rows(), rows])


@pytest.mark.parametrize("source", ["python", "numpy", "own"])
def test_an_image_processor_that_augments_stays_live(source, gemma3):
    model, processor = gemma3
    own = np.random.default_rng(0)
    draw = {"python": random.random, "numpy": np.random.random, "own": own.random}[source]
    kind = type(processor.image_processor)

    class Augmenting(kind):
        def preprocess(self, images, **options):
            turned = draw() < 0.5  # now and then no picture differs
            return super().preprocess([image.rotate(180) if turned else image for image in images], **options)

    processor.image_processor.__class__ = Augmenting
    assert "other pixels for the same picture" in why_not(model, processor, datasets=[some_rows()])


def test_a_tower_without_its_weights_stays_live(gemma3):
    model, processor = gemma3
    model.model.vision_tower.to("meta")

    assert "not every process has the tower's weights" in why_not(model, processor, datasets=[some_rows()])


def test_a_tower_cut_up_by_zero_3_stays_live(gemma3):
    model, processor = gemma3
    next(model.model.vision_tower.parameters()).ds_id = 1

    assert "ZeRO-3" in why_not(model, processor, datasets=[some_rows()])


def test_a_family_that_takes_no_features_stays_live(gemma3):
    model, processor = gemma3
    model.config.model_type = model.model.config.model_type = "mllama"

    assert (
        why_not(model, processor, datasets=[some_rows()])
        == "models of family mllama do not take features in place of pixels"
    )
