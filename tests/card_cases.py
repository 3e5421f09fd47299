"""Merged folders as far as a card looks at them, with facts that a test chooses."""

import json

STAGE = {
    "stage": "vqa", "base_model": "google/medgemma-1.5-4b-it", "base_is_local": False, "base_is_rehearsal": False,
    "base_revision": "e9792da5fb8ee651083d345ec4bce07c3c9f1641", "base_weights": "aaaaaaaaaaaaaaaa",
    "trains": ["language_model"], "dataset": "vqa", "hub_datasets": [],
    "data_sources": [
        {"name": "opg", "license": "CC-BY-NC-SA-4.0", "url": "https://example.org/opg", "modality": "panoramic",
         "rows": 1200, "images": 400},
    ],
    "data_contents": {
        "images": True, "languages": ["en", "es"], "question_types": {"presence": 700, "location": 300},
        "findings": {"caries": 120, "impacted_tooth": 80},
    },
    "dataset_rows": {"train": 1000, "validation": 100, "test": 100},
    "dataset_fingerprints": {"train": "1111111111111111", "validation": "2222222222222222"},
    "left_out": {}, "mixture": [], "processes": 2, "global_batch_size": 16, "dtype": "bfloat16",
    "parts": {
        "vision_tower": {"parameters": 400, "trainable": 0}, "language_model": {"parameters": 600, "trainable": 50},
    },
    "proof": {"passed": True}, "adapter_sha256": "ab" * 32, "lora": {"r": 64, "alpha": 64, "dropout": 0.05},
    "hyperparameters": {
        "learning_rate": 5e-5, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "linear", "warmup_steps": 0.1, "optim": "adamw_torch_fused", "weight_decay": 0.0,
        "max_grad_norm": 1.0, "gradient_checkpointing": True, "seed": 42,
    },
    "vision": {"features": "cached", "reason": None, "pictures": 370, "train_pictures": 330},
    "packing": {"questions": 4, "texts": False},
    "steps": 600, "epochs": 9.6, "best_step": 400, "seconds": 5400.0,
    "losses": {
        "train": [{"step": step, "loss": 2.0 / step} for step in (100, 200, 400, 600)],
        "validation": [{"step": 200, "loss": 0.4}, {"step": 400, "loss": 0.2}, {"step": 600, "loss": 0.3}],
    },
    "hardware": {"device": "NVIDIA A100-SXM4-80GB", "count": 2, "peak_gpu_memory": 31_500_000_000},
    "versions": {"dentalgemma": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
}  # fmt: skip

CASES = {
    **STAGE, "stage": "instruct", "dataset": "owner/cases", "hub_datasets": ["owner/cases"],
    "data_sources": [{"name": "cases", "license": "Apache-2.0", "url": None, "modality": None, "rows": 90}],
    "adapter_sha256": "cd" * 32,
    "data_contents": {"images": False, "languages": ["en"], "question_types": {"case": 80}, "findings": {}},
    "dataset_rows": {"train": 80, "validation": 10}, 
    "vision": {"features": "live", "reason": "none", "pictures": None, "train_pictures": 0},
}  # fmt: skip

# Nothing to draw: a card of it is written at once.
PLAIN = {**STAGE, "losses": {"train": [], "validation": []}, "data_sources": [], "data_contents": {}}

SIDE = {"images": "true", "mode": "generate"}
PAIR = {
    "n": 400, "images_asked": 210, "difference": 0.45, "difference_by_image": [0.4, 0.5], "only_a": 20, "only_b": 200,
    "mcnemar_p": 1e-30, "a": {"accuracy": 0.25, "correct": 100, "wilson": [0.21, 0.29]},
    "b": {"accuracy": 0.7, "correct": 280, "wilson": [0.654, 0.743]},
}  # fmt: skip
FINDING = {
    "sensitivity": 0.8, "n_with": 100, "sensitivity_chance": 0.25,
    "specificity": 0.9, "n_without": 300, "specificity_chance": 0.75,
}  # fmt: skip
CLOSED = {
    "n": 400, "correct": 280, "accuracy": 0.7, "wilson": [0.654, 0.743], "interval_by_image": [0.64, 0.76],
    "images_asked": 210, "chance": 0.25, "ceiling": 1.0, "failed": 0.01,
    "per_category": {"caries": {"n": 400, "correct": 280, "accuracy": 0.7, "wilson": [0.654, 0.743]}},
}  # fmt: skip
CLINICAL = {
    "findings": {"caries": FINDING},
    "missed_pathology": {"missed": 30, "n": 120, "chance": 0.25},
    "over_call": {"over_called": 9, "n": 60, "chance": 0.75},
    "regions": None,
}


def write_folder(folder, *stages, stacked=False, **certificate):
    """A merged model folder of these stages, `STAGE` without any; with `stacked`, its adapter beside it."""
    from data_builders.dataset_folder import hash_file
    from dentalgemma.certificates import CERTIFICATE, hash_weights

    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    document = {
        "passed": True, "files": hash_weights(folder), "weights": "b87eff689059cb5b", "stages": list(stages or [STAGE]),
        "dtype": "bfloat16", "changed_tensors": 28, "tensors": 93, "max_logit_difference": 6.7e-6, "warnings": [],
        "reloaded_max_logit_difference": 0.02, "parity_inputs": "4 rows of vqa, validation",
        "rounding": {"relative_error": 0.03, "cosine": 0.999, "unchanged_share": 0.1},
    }  # fmt: skip
    if stacked:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"adapter")
        (folder / "adapter" / "adapter_config.json").write_text(
            json.dumps({"base_model_name_or_path": "my-copy", "r": 128, "revision": "abc"})
        )
        sha256 = hash_file(folder / "adapter" / "adapter_model.safetensors")
        document["adapter"] = {"sha256": sha256, "rank": 128, "max_difference": 6e-8}
    (folder / CERTIFICATE).write_text(json.dumps({**document, **certificate}))
    return folder


def make_comparison(**changes):
    """What `compare --json` prints of base and this model."""
    return {
        "splits": ["test"], "a": {**SIDE, "weights": "00"}, "b": {**SIDE, "weights": "b87eff689059cb5b"},
        "closed": PAIR, "open": None, "combined": None, **changes,
    }  # fmt: skip


def make_scores(**changes):
    """What `score` writes of this model."""
    return {
        "format": "scores/1", "name": "tuned", "weights": "b87eff689059cb5b", "images": "true", "mode": "generate",
        "extraction": "seed/1", "questions_sha256": "ef" * 32, "predictions_sha256": "12" * 32, "warnings": [],
        "closed": CLOSED, "open": None, "combined": None, "clinical": CLINICAL, **changes,
    }  # fmt: skip


def write_cards(folder, **options):
    """Write the cards of a folder; documents are given as such."""
    from dentalgemma.publishing.cards import write_model_card

    for name in ("comparison", "scores", "contamination", "decision"):
        if name in options:
            path = folder.parent / f"{name}.json"
            path.write_text(json.dumps(options[name]))
            options[name] = path
    return write_model_card(folder, options.pop("comparison", None), **options).read_text(encoding="utf-8")
