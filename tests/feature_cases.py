"""Builds a feature cache in one process or two, to the end or until it is killed, for tests/test_features.py.

    torchrun --nproc_per_node 2 tests/feature_cases.py CASE.json

`CASE.json` is `{"model": …, "dataset": …, "root": …, "kill_after": pictures or null}`. Two processes
write what else they saw into the root, `process0.json` and `process1.json`.
"""

import json
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from accelerate import Accelerator
from datasets import Dataset, Features, Image, List, load_dataset

from data_builders.records import InputError
from dentalgemma.models.loading import load_pretrained
from dentalgemma.training import encoding, picture_names
from dentalgemma.training.features import FeatureCache, feature_key, find_cache
from dentalgemma.training.picture_names import name_pictures

SHARD = 4  # pictures
BLOCK = 8  # rows


def build(case: dict, accelerator: Accelerator, watch=None) -> FeatureCache:
    """Encode the pictures of both splits; `watch` is called before each is."""
    encoding.SHARD_PICTURES = SHARD
    model, processor = load_pretrained(case["model"])
    model.requires_grad_(False)
    if watch:
        model.model.vision_tower.register_forward_pre_hook(lambda *_: watch())
    return encode(load_dataset(case["dataset"]).values(), case["root"], model, processor, accelerator)


def encode(datasets, root, model, processor, accelerator: Accelerator) -> FeatureCache:
    cache = find_cache(Path(root), feature_key(model, processor, mixed_precision="no"))
    encoding.encode_pictures(cache, datasets, model=model, processor=processor, accelerator=accelerator)
    return cache


def report(case: dict, accelerator: Accelerator) -> dict:
    """What a process of several names, and how it is refused where they do not agree."""
    rank = accelerator.process_index
    model, processor = load_pretrained(case["model"])
    model.requires_grad_(False)
    rows = load_dataset(case["dataset"])["train"]
    few = rows.select(range(4 * BLOCK))
    seen = {
        "names": watch_names(rows.shuffle(seed=0)),
        "names of other rows": watch_names(rows.select(range(9 + rank))),
    }
    seen["gone"] = refusal(lambda: name_pictures(rows_with_a_picture_gone()))
    encoding.PATIENCE = 0.2
    root = Path(case["root"])
    seen["folders"] = refusal(lambda: encode([few], root / f"of{rank}", model, processor, accelerator))
    with torch.no_grad():
        model.model.vision_tower.encoder.layers[1].mlp.fc2.weight[3, 5] += rank
    seen["weights"] = refusal(lambda: encode([few], root, model, processor, accelerator))
    return seen


def watch_names(rows) -> dict:
    """The names, and which of the stored rows this process has hashed for them."""
    hashed, name_block = [], picture_names._name_block
    picture_names.BLOCK = BLOCK
    picture_names._name_block = lambda column, block: hashed.extend(block) or name_block(column, block)
    names = name_pictures(rows)
    picture_names._name_block = name_block
    return {"names": names, "hashed": sorted(hashed)}


def rows_with_a_picture_gone() -> Dataset:
    """In the share of the second process."""
    images = [[{"bytes": b"here", "path": None}]] * BLOCK + [[{"bytes": None, "path": "gone.png"}]]
    return Dataset.from_dict({"images": images}, features=Features({"images": List(Image(decode=False))}))


def refusal(act) -> dict | None:
    try:
        act()
    except InputError as error:
        return {"kind": type(error).__name__, "text": str(error), "said_elsewhere": error.said_elsewhere}


def main() -> None:
    case = json.loads(Path(sys.argv[1]).read_text())
    left = [case["kill_after"]]

    def kill_in_time() -> None:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= left[0] is not None

    accelerator = Accelerator(cpu=True)
    build(case, accelerator, kill_in_time if case["kill_after"] is not None else None)
    if accelerator.num_processes > 1:
        seen = json.dumps(report(case, accelerator))
        (Path(case["root"]) / f"process{accelerator.process_index}.json").write_text(seen)
    accelerator.end_training()


if __name__ == "__main__":
    main()
