"""Builds a feature cache in one process or two, to the end or until it is killed, for tests/test_features.py.

    torchrun --nproc_per_node 2 tests/feature_cases.py CASE.json

`CASE.json` is `{"model": …, "dataset": …, "root": …, "kill_after": pictures or null}`.
"""

import json
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from accelerate import Accelerator
from datasets import load_dataset

from dentalgemma.models.loading import load_pretrained
from dentalgemma.training import features

SHARD = 4  # pictures


def build(case: dict, accelerator: Accelerator, watch=None) -> features.FeatureCache:
    """Encode the pictures of both splits; `watch` is called before each is."""
    features.SHARD_PICTURES = SHARD
    model, processor = load_pretrained(case["model"])
    model.requires_grad_(False)
    if watch:
        model.model.vision_tower.register_forward_pre_hook(lambda *_: watch())
    cache = features.find_cache(Path(case["root"]), features.feature_key(model, processor, mixed_precision=False))
    features.encode_pictures(cache, load_dataset(case["dataset"]), model, processor, accelerator)
    return cache


def main() -> None:
    case = json.loads(Path(sys.argv[1]).read_text())
    left = [case["kill_after"]]

    def kill_in_time() -> None:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= left[0] is not None

    accelerator = Accelerator(cpu=True)
    build(case, accelerator, kill_in_time if case["kill_after"] is not None else None)
    accelerator.end_training()


if __name__ == "__main__":
    main()
