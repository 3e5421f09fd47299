"""The model card, rendered from recorded facts: merge certificate, run facts of every stage, a comparison."""

from __future__ import annotations

import json
import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from data_builders.chat import SYSTEM_PROMPT
from dentalgemma.merging import CERTIFICATE

HAI_DEF = {
    "license": "other",
    "license_name": "health-ai-developer-foundations",
    "license_link": "https://developers.google.com/health-ai-developer-foundations/terms",
}
MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#])")


class CardError(ValueError):
    """A card that cannot be written; the message says which fact is missing."""


def write_model_card(model: Path, comparison: Path | None = None) -> Path:
    """Write `README.md` into a merged model folder and return its path.

    Raises:
        CardError: when the folder has no merge certificate or no facts of its stages.
    """
    model = Path(model)
    path = model / CERTIFICATE
    if not path.is_file():
        raise CardError(f"{path} is missing: make the folder with `dentalgemma merge`")
    certificate = json.loads(path.read_text(encoding="utf-8"))
    stages = certificate["stages"]
    if not stages:
        raise CardError(f"{path} knows no stage: the merged run has no run_facts.json")
    compared = _read_comparison(comparison) if comparison else None
    base = stages[0]["base_model"]
    body = (
        _environment()
        .get_template("model_card.md.jinja")
        .render(
            title=f"DentalGemma ({model.resolve().name})",
            base=_public_name(base),
            repo=model.resolve().name,
            stages=stages,
            certificate=certificate,
            comparison=compared,
            system_prompt=SYSTEM_PROMPT,
        )
    )
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["dental", "medical", "dentalgemma"],
        **_base_data(base),
    )
    ModelCard(f"---\n{data}\n---\n\n{body}").save(model / "README.md")
    return model / "README.md"


def _read_comparison(path: Path) -> dict:
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        document["a"]["wilson"], document["b"]["wilson"], document["mcnemar_p"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CardError(f"{path} is no comparison; make it with `dentalgemma compare … --json > {path}`") from None
    return document


def _base_data(base: str) -> dict:
    """What the front matter says of the base: never a path of this machine, and MedGemma's terms passed on."""
    if Path(base).is_dir():
        return {"license": "other", "license_name": "rehearsal"}
    terms = HAI_DEF if "medgemma" in base.lower() else {"license": "apache-2.0"} if "gemma-4" in base.lower() else {}
    return {"base_model": base, "base_model_relation": "finetune", **terms}


def _public_name(base: str) -> str:
    return f"a small random model ({Path(base).name})" if Path(base).is_dir() else base


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("dentalgemma.publishing"), undefined=StrictUndefined, trim_blocks=True, autoescape=False
    )
    environment.filters |= {
        "cell": lambda value: MARKDOWN.sub(r"\\\1", str(value)).replace("\n", " "),
        "code": lambda value: "`" + str(value).replace("`", "'") + "`",
        "percent": lambda share: f"{100 * share:.1f} %",
        "base_name": lambda value: value if not Path(value).is_dir() else Path(value).name,
    }
    return environment
