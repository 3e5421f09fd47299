"""Whether a model's own settings fit the base that is stated for it: terms cannot be chosen by naming another base."""

from __future__ import annotations

import json
import re
from pathlib import Path

# `model_type` in config.json (transformers) of the models whose names are known here; the first that fits counts.
FAMILIES = (
    (re.compile(r"medgemma", re.IGNORECASE), ("gemma3", "gemma4")),
    (re.compile(r"\bgemma-4\b", re.IGNORECASE), ("gemma4",)),
    (re.compile(r"\bgemma-3n\b", re.IGNORECASE), ("gemma3n",)),
    (re.compile(r"\bgemma-3\b", re.IGNORECASE), ("gemma3",)),
    (re.compile(r"\bqwen3-vl\b", re.IGNORECASE), ("qwen3_vl",)),
    (re.compile(r"\bllama-3\.2-.*vision", re.IGNORECASE), ("mllama",)),
)


def contradict_base(config: Path, base: str) -> str | None:
    """What `config.json` says against `base`, a Hub id, in a clause; None where nothing does.

    Bases of a name that is not known here fit any model; their terms are not known either.
    """
    types = next((types for name, types in FAMILIES if name.search(base)), None)
    if types is None or not config.is_file():
        return None
    try:
        own = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return "config.json cannot be read"
    # Variants of a family add to its name: gemma4_unified, qwen3_vl_moe.
    if isinstance(own, str) and any(own == known or own.startswith(f"{known}_") for known in types):
        return None
    return f"config.json says model_type {own}, and {base} is {' or '.join(types)}"
