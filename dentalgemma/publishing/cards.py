"""The model card, rendered from recorded facts: merge certificate, run facts of every stage, a comparison."""

from __future__ import annotations

import json
import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from data_builders.chat import SYSTEM_PROMPT
from data_builders.records import InputError
from dentalgemma.evaluation.report_notes import count_found, note_chance
from dentalgemma.evaluation.report_text import FILTERS, has_width
from dentalgemma.evaluation.results import model_index
from dentalgemma.merging import CERTIFICATE, MergeError, read_certificate
from dentalgemma.training.run_facts import UNRECORDED

HAI_DEF = {
    "license": "other",
    "license_name": "health-ai-developer-foundations",
    "license_link": "https://developers.google.com/health-ai-developer-foundations/terms",
}
MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#])")


class CardError(InputError):
    """A card that cannot be written; the message says which fact is missing."""


def write_model_card(
    model: Path,
    comparison: Path | None = None,
    *,
    base: str | None = None,
    scores: Path | None = None,
    contamination: Path | None = None,
    decision: Path | None = None,
    benchmark: str | None = None,
) -> Path:
    """Write `README.md` into a merged model folder and return its path.

    `base` is the Hub id of the base, where the runs started from a folder. `scores` of this model also become the
    card's `model-index`, where `benchmark` says what the questions are called. `contamination` is one document, or a
    list of one for each dataset.

    Raises:
        CardError: when a fact is missing, or one of the files is not about this model and its questions.
    """
    model = Path(model)
    certificate = _read_certificate(model)
    stages = certificate["stages"]
    first = stages[0]
    rehearsal = first["base_is_rehearsal"]
    if first["base_is_local"] and not rehearsal and base is None:
        raise CardError(
            f"the first stage started from a folder, {first['base_model']}: say with --base which Hub model that is, "
            "since its terms pass on to this one"
        )
    base = base or first["base_model"]
    compared = _read_comparison(Path(comparison), certificate) if comparison else None
    scored = _read_scores(Path(scores), certificate) if scores else None
    body = (
        _environment()
        .get_template("model_card.md.jinja")
        .render(
            title=f"DentalGemma ({model.resolve().name})",
            base="A small random model for rehearsals" if rehearsal else f"`{base}`",
            repo=model.resolve().name,
            stages=stages,
            sources=[source for stage in stages for source in stage["data_sources"]],
            certificate=certificate,
            comparison=compared,
            scores=scored,
            contamination=_read_contamination(Path(contamination)) if contamination else None,
            decision=_read_decision(Path(decision), certificate, scored) if decision else None,
            has_width=has_width,
            note_chance=note_chance,
            count_found=count_found,
            system_prompt=SYSTEM_PROMPT,
        )
    )
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["dental", "medical", "dentalgemma"],
        **(_index(model, scored, benchmark) if scored else {}),
        **({"license": "other", "license_name": "rehearsal"} if rehearsal else _base_data(base)),
    )
    ModelCard(f"---\n{data}\n---\n\n{body}").save(model / "README.md")
    return model / "README.md"


def _read_certificate(model: Path) -> dict:
    """The certificate of a merge that passed, whose stages are all recorded and have passed too."""
    try:
        certificate = read_certificate(model)
    except MergeError as error:
        raise CardError(str(error)) from error
    for stage in certificate["stages"]:
        if stage["stage"] == UNRECORDED:
            raise CardError(
                f"{model / CERTIFICATE}: nothing is recorded of {stage['merged_from']}: its run has no run_facts.json"
            )
        if (stage.get("proof") or {}).get("passed") is False:
            raise CardError(f"{model / CERTIFICATE}: {stage['merged_from']} did not train what it was to train")
    return certificate


def _read_comparison(path: Path, certificate: dict) -> dict:
    """A comparison of the base with this very model, each shown the true images."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        pairs = [document[kind] for kind in ("closed", "open") if document[kind]]
        pairs[0]["a"]["wilson"], pairs[0]["b"]["wilson"], pairs[0]["mcnemar_p"], document["splits"]
    except (OSError, ValueError, LookupError, TypeError):
        raise CardError(f"{path} is no comparison; make it with `dentalgemma compare … --json > {path}`") from None
    if document["b"]["weights"] != certificate["weights"]:
        raise CardError(f"{path}: its second model, {document['b']['model']}, does not have the weights of this one")
    if not document["a"]["images"] == document["b"]["images"] == "true":
        raise CardError(f"{path}: a card compares models on their true images, not on controls")
    return document


def _read_scores(path: Path, certificate: dict) -> dict:
    """The scores of this very model, shown the true images."""
    document = _read_document(path, "scores/1", "dentalgemma score")
    if document.get("weights") != certificate["weights"]:
        raise CardError(f"{path}: {document.get('name')} does not have the weights of this model")
    if document.get("images") != "true":
        raise CardError(f"{path}: scored with {document.get('images')} images: a control is no result of the model")
    return document


def _read_decision(path: Path, certificate: dict, scores: dict | None) -> dict:
    """A decision between candidates of whom one is this very model; `candidate` is what it is called there.

    `same_answers` says whether it was decided on the answers that the card shows the scores of.
    """
    document = _read_document(path, "decision/1", "dentalgemma decide")
    decided = document.get("scores") or {}
    own = [name for name, score in decided.items() if score.get("weights") == certificate["weights"]]
    if not own:
        raise CardError(
            f"{path} decides between {', '.join(decided) or 'nobody'}, and none of them has the weights of this model"
        )
    answers = {decided[name].get("predictions_sha256") for name in own}
    same = scores is None or scores.get("predictions_sha256") in answers
    candidate = document.get("winner") if document.get("winner") in own else own[0]
    return {**document, "candidate": candidate, "same_answers": same}


def _read_contamination(path: Path) -> list[dict]:
    """What was found of the questions in training data: one document, or a list of one for each dataset."""
    documents = _read_json(path)
    documents = documents if isinstance(documents, list) and documents else [documents]
    return [_check_format(path, document, "contamination/1", "dentalgemma contamination") for document in documents]


def _read_document(path: Path, kind: str, command: str) -> dict:
    return _check_format(path, _read_json(path), kind, command)


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CardError(f"{path} cannot be read: {error}") from None


def _check_format(path: Path, document: object, kind: str, command: str) -> dict:
    if not isinstance(document, dict) or document.get("format") != kind:
        raise CardError(f"{path} is no {kind} document; make it with `{command}`")
    return document


def _index(model: Path, scores: dict, benchmark: str | None) -> dict:
    name = benchmark or f"questions {scores['questions_sha256'][:12]}"
    return {"model_name": model.resolve().name, "eval_results": model_index(scores, dataset_name=name)}


def _base_data(base: str) -> dict:
    """What the front matter says of the base, with MedGemma's terms passed on."""
    terms = HAI_DEF if "medgemma" in base.lower() else {"license": "apache-2.0"} if "gemma-4" in base.lower() else {}
    return {"base_model": base, "base_model_relation": "finetune", **terms}


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("dentalgemma.publishing"), undefined=StrictUndefined, trim_blocks=True, autoescape=False
    )
    environment.filters |= {
        "cell": lambda value: MARKDOWN.sub(r"\\\1", str(value)).replace("\n", " "),
        "points": lambda share: f"{100 * share:+.1f}",
        "percent": lambda share: "–" if share is None else f"{100 * share:.1f} %",
        **{name: FILTERS[name] for name in ("many", "label", "tidy")},
    }
    return environment
