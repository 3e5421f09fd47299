"""What a model card is rendered from: the certificate and documents about this very model, and what they come to."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from data_builders.records import InputError
from data_builders.sources import load_vocabulary
from dentalgemma.certificates import CERTIFICATE, UNRECORDED, MergeError, read_certificate

LANGUAGE = re.compile(r"[a-z]{2,3}")
SIGNIFICANT = 0.05


class CardError(InputError):
    """A card that cannot be written; the message says which fact is missing."""


def read_recorded(model: Path) -> dict:
    """The certificate of a merge that passed, whose stages are all recorded and have passed too.

    Raises:
        CardError: naming what is missing.
    """
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


def read_comparison(path: Path, certificate: dict) -> dict:
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


def read_scores(path: Path, certificate: dict) -> dict:
    """The scores of this very model, shown the true images."""
    document = _read_document(path, "scores/1", "dentalgemma score")
    if document.get("weights") != certificate["weights"]:
        raise CardError(f"{path}: {document.get('name')} does not have the weights of this model")
    if document.get("images") != "true":
        raise CardError(f"{path}: scored with {document.get('images')} images: a control is no result of the model")
    return document


def read_decision(path: Path, certificate: dict, scores: dict | None) -> dict:
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


def read_contamination(path: Path) -> list[dict]:
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


def count_shown(stage: Mapping) -> dict:
    """What a stage's kept weights were shown: `{rows, images, seen}`; `seen` is None where it was every row.

    Rows that were left out as too long are not of them. `images` is None where the number is not recorded.
    """
    split = stage.get("train_split", "train")
    rows = stage["dataset_rows"][split] - (stage.get("left_out") or {}).get(split, 0)
    step = stage.get("best_step") or stage["steps"]
    epochs = stage["epochs"] * step / max(stage["steps"], 1)
    seen = min(step * stage["global_batch_size"], rows)
    images = (stage.get("vision") or {}).get("train_pictures")
    return {"rows": rows, "images": images, "seen": seen if epochs < 1 and seen < rows else None}


def list_languages(stages: Sequence[Mapping]) -> list[str]:
    """The languages of the training rows of all stages, as ISO codes."""
    found = {language for stage in stages for language in _contents(stage, "languages")}
    return sorted(language for language in found if LANGUAGE.fullmatch(language))


def list_findings(stages: Sequence[Mapping]) -> list[str]:
    """What was marked on the training images, as the vocabulary calls it, the most frequent first."""
    counts = count_by_stage(stages, lambda stage: _told(stage, "findings"))
    return sorted(counts, key=lambda name: (-sum(counts[name].values()), name))


def compose_panels(stages: Sequence[Mapping]) -> dict[str, dict[str, dict[str, int]]]:
    """The counts behind the figure of the training data: `{axis label: {name: {stage: number}}}`."""
    return {
        "rows by source, all splits": count_by_stage(
            stages, lambda stage: [(str(source["name"]), source.get("rows") or 0) for source in stage["data_sources"]]
        ),
        "training images with a finding": count_by_stage(stages, lambda stage: _told(stage, "findings")),
        "training rows by question type": count_by_stage(stages, lambda stage: _told(stage, "question_types")),
    }


def count_by_stage(
    stages: Sequence[Mapping], counted: Callable[[Mapping], Iterable[tuple[str, int]]]
) -> dict[str, dict[str, int]]:
    """`{name: {stage: number}}` without zeros."""
    counts: dict[str, dict[str, int]] = {}
    for number, stage in enumerate(stages, start=1):
        for name, count in counted(stage):
            if count:
                told = f"{number} {stage['stage']}"
                own = counts.setdefault(name, {})
                own[told] = own.get(told, 0) + count
    return counts


def _told(stage: Mapping, key: str) -> Iterator[tuple[str, int]]:
    """Counts of findings or question types under the names that people write."""
    vocabulary = load_vocabulary()
    for name, count in _contents(stage, key).items():
        yield vocabulary[name].en.other if name in vocabulary else name.replace("_", " "), count


def _contents(stage: Mapping, key: str) -> Mapping | Sequence:
    """What training rows hold, where the run recorded it."""
    return (stage.get("data_contents") or {}).get(key) or {}


def describe_procedure(stages: Sequence[Mapping]) -> list[tuple[str, list[str]]]:
    """A line for each fact of training, with its value in every stage; what no stage recorded is left out."""
    described = [dict(_describe_stage(stage)) for stage in stages]
    labels = dict.fromkeys(label for own in described for label in own)
    return [(label, [own.get(label, "–") for own in described]) for label in labels]


def _describe_stage(stage: Mapping) -> Iterator[tuple[str, str]]:
    settings, lora = stage["hyperparameters"], stage["lora"]
    parts = stage["parts"]
    yield "trained parts", ", ".join(stage["trains"])
    trainable = sum(part["trainable"] for part in parts.values())
    yield "trainable parameters", f"{trainable:,} of {sum(part['parameters'] for part in parts.values()):,}"
    yield "LoRA", f"r = {lora['r']}, α = {lora['alpha']}, dropout {lora['dropout']}"
    if stage.get("left_out"):
        yield "rows left out as too long", ", ".join(f"{name} {count}" for name, count in stage["left_out"].items())
    yield "epochs", f"{stage['epochs']:.2f}"
    yield "steps", f"{stage['steps']:,}"
    if stage.get("best_step"):
        yield "best step, kept", f"{stage['best_step']:,}"
    yield "rows a step (global batch)", _tell_batch(stage)
    yield "learning rate", f"{settings['learning_rate']:g}"
    for key, told in SETTINGS.items():
        if settings.get(key) is not None:
            value = settings[key]
            yield told, ("yes" if value else "no") if isinstance(value, bool) else str(value)
    yield "precision", str(stage["dtype"])
    if vision := stage.get("vision"):
        yield "image features", str(vision["features"])
    if (stage.get("packing") or {}).get("questions", 1) > 1:
        yield "questions of one image in a sequence", f"up to {stage['packing']['questions']}"
    if own := [point["loss"] for point in stage["losses"]["validation"] if point["loss"] is not None]:
        yield "validation loss, first → best", f"{own[0]:.4f} → {min(own):.4f}"
    if stage.get("proof"):
        yield "proof that these parts trained and no others", "passed"
    yield "hardware", _tell_hardware(stage)
    yield "minutes", f"{stage['seconds'] / 60:.1f}"


def list_versions(stages: Sequence[Mapping]) -> list[str]:
    """The versions that the stages ran with, once where they are all the same."""
    told = (", ".join(f"{name} {version}" for name, version in stage["versions"].items()) for stage in stages)
    return [versions for versions in dict.fromkeys(told) if versions]


SETTINGS = {
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warm-up (steps, or share of them below 1)",
    "optim": "optimizer",
    "weight_decay": "weight decay",
    "max_grad_norm": "gradients clipped to norm",
    "gradient_checkpointing": "gradient checkpointing",
    "seed": "seed",
}


def _tell_batch(stage: Mapping) -> str:
    settings, processes = stage["hyperparameters"], stage.get("processes", 1)
    rows, times = (settings.get(key) for key in ("per_device_train_batch_size", "gradient_accumulation_steps"))
    if not rows or not times:
        return str(stage["global_batch_size"])
    devices = f"{processes} process{'' if processes == 1 else 'es'}"
    return f"{stage['global_batch_size']} = {rows} × {times} accumulated × {devices}"


def _tell_hardware(stage: Mapping) -> str:
    hardware = stage["hardware"]
    told = str(hardware["device"])
    if hardware.get("count", 1) > 1 or stage.get("processes", 1) > 1:
        told = f"{stage.get('processes', hardware.get('count'))} × {told}"
    if peak := hardware.get("peak_gpu_memory"):
        told += f", at most {peak / 1e9:.1f} GB of its memory"
    return told


def find_test(comparison: Mapping | None, scores: Mapping | None) -> dict | None:
    """How often the model was right, for people who read no tables; None where it was not tested.

    `base` is how often the base was, on the same questions; `told` whether the difference is told from chance.
    """
    for kind in ("closed", "open"):
        pair = (comparison or {}).get(kind)
        own = (scores or {}).get(kind)
        own = own if own and own["accuracy"] is not None else None
        if not pair and not own:
            continue
        n = pair["n"] if pair else own["judged" if kind == "open" else "n"]
        return {
            "kind": kind,
            "n": n,
            "images": (pair or own).get("images_asked"),
            "held_out": bool(pair) and comparison["splits"] == ["test"],
            "correct": (pair["b"] if pair else own)["correct"],
            "wilson": (pair["b"] if pair else own)["wilson"],
            "base": pair["a"]["correct"] if pair else None,
            "better": pair["difference"] > 0 if pair else None,
            "told": pair["mcnemar_p"] < SIGNIFICANT if pair else None,
            "p": pair["mcnemar_p"] if pair else None,
            "chance": own.get("chance") if own and own.get("n") == n else None,
        }
    return None


def list_results(comparison: Mapping | None, scores: Mapping | None) -> list[dict]:
    """The accuracies that the figure of results shows: base and this model by kind of question, else its scores."""
    results = []
    for kind in ("closed", "open", "combined"):
        told = "pooled" if kind == "combined" else kind
        pair, own = (comparison or {}).get(kind), (scores or {}).get(kind)
        own = own if own and own["accuracy"] is not None else None
        if pair:
            chance = own.get("chance") if own and kind == "closed" and own["n"] == pair["n"] else None
            results += [
                _result(told, model, pair[side], n=pair["n"], chance=chance)
                for side, model in (("a", "base"), ("b", "this model"))
            ]
        elif own:
            n = own["judged"] if kind == "open" else own["n"]
            results.append(_result(told, "this model", own, n=n, chance=own.get("chance")))
    return results


def _result(kind: str, model: str, own: Mapping, *, n: int, chance: float | None) -> dict:
    figures = {key: own[key] for key in ("correct", "accuracy", "wilson")}
    return {"kind": kind, "model": model, "n": n, "chance": chance, **figures}


def list_missed(clinical: Mapping) -> list[tuple[str, int, int, float | None]]:
    """What a clinic would ask first, `(told, number, of, share that a guess would reach)`, where it was asked."""
    figures = (
        ("a disease was there, and it answered “healthy” or nothing that could be read", "missed_pathology", "missed"),
        ("the image was healthy, and it named a disease", "over_call", "over_called"),
    )
    told = []
    for text, key, count in figures:
        own = clinical.get(key)
        if own and own["n"]:
            told.append((text, own[count], own["n"], own.get("chance")))
    mirrored = (clinical.get("regions") or {}).get("mirrored")
    if mirrored and mirrored["n"]:
        text = "a finding was on one side of the patient, and it named the other side"
        told.append((text, mirrored["mirrored"], mirrored["n"], mirrored.get("chance")))
    return told
