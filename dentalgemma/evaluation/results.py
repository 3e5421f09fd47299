"""A model's results as the Hub reads them: `model-index` for a card, `.eval_results/*.yaml` for a benchmark's page."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml, parse_eval_result_entries

from dentalgemma.evaluation.files import write_whole
from dentalgemma.evaluation.questions import EvaluationError
from dentalgemma.evaluation.report_text import has_width

Kind = Literal["closed", "open"]
TASK_TYPE = "visual-question-answering"
KIND_NAMES = {"closed": "closed questions", "open": "open questions", "combined": "closed and open, pooled"}
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
TASK_ID = re.compile(r"[A-Za-z0-9][\w.-]*")
REVISION = re.compile(r"[0-9a-f]{40}")


def model_index(
    scores: Mapping, *, dataset_name: str, dataset_id: str | None = None, revision: str | None = None
) -> list[EvalResult]:
    """A scores document as entries of a card's `model-index`: accuracies in percent, each with n and its interval.

    `dataset_id` is the Hub's, where the questions come from there. Goes into `ModelCardData(eval_results=…)`.

    Raises:
        EvaluationError: for a control (blank images, another patient's), which is no result of the model.
    """
    _check_arm(scores)
    _check_dataset(dataset_id, revision)
    results = []
    for kind, told in KIND_NAMES.items():
        own = scores.get(kind)
        if own and own["accuracy"] is not None:
            results.append(
                EvalResult(
                    task_type=TASK_TYPE,
                    task_name=f"Dental visual question answering, {told}",
                    dataset_type=dataset_id or "custom",
                    dataset_name=dataset_name,
                    dataset_config=kind,
                    dataset_revision=revision,
                    metric_type="accuracy",
                    metric_name=f"accuracy, {told} (%)",
                    metric_value=_percent(own["accuracy"]),
                    metric_args=_describe(scores, kind),
                )
            )
    return results


def write_eval_results(
    folder: Path,
    scores: Mapping,
    *,
    dataset_id: str,
    task_id: str,
    revision: str | None = None,
    kind: Kind = "closed",
    protocol: str = "official",
) -> Path:
    """Write `.eval_results/<task_id>.yaml` into a model's folder and return its path.

    `revision` is the commit of the benchmark's dataset that the questions are from. The value is the accuracy in
    percent: of closed questions as `protocol` reads the answers, since the benchmark's page compares it with others'
    official scores; the notes say what the headline is. Entries of other benchmarks that the file holds stay.

    Raises:
        EvaluationError: for no dataset of the Hub, a branch instead of a commit, a control, or where the number is not
            in the scores.
    """
    _check_arm(scores)
    _check_dataset(dataset_id, revision)
    if not TASK_ID.fullmatch(task_id):
        raise EvaluationError(f"{task_id!r} is no task id: letters, digits, points, dashes and underscores")
    value, notes = _closed_value(scores, protocol) if kind == "closed" else _open_value(scores)
    entry = EvalResultEntry(
        dataset_id=dataset_id,
        task_id=task_id,
        value=value,
        dataset_revision=revision,
        date=(scores.get("answered") or {}).get("last"),
        notes=notes,
    )
    path = Path(folder) / ".eval_results" / f"{task_id}.yaml"
    kept = [old for old in _read_entries(path) if (old.dataset_id, old.task_id) != (dataset_id, task_id)]
    document = eval_result_entries_to_yaml([*kept, entry])
    write_whole(path, yaml.safe_dump(document, sort_keys=False, allow_unicode=True))
    return path


def _check_arm(scores: Mapping) -> None:
    if scores.get("images") not in ("true", None):
        raise EvaluationError(
            f"{scores.get('name')}: scored with {scores['images']} images: a control, no result to publish"
        )


def _check_dataset(dataset_id: str | None, revision: str | None) -> None:
    if dataset_id is not None and not REPO_ID.fullmatch(dataset_id):
        raise EvaluationError(f"{dataset_id!r} is no dataset of the Hub: expected owner/name")
    if revision is not None and not REVISION.fullmatch(revision):
        raise EvaluationError(f"revision {revision!r} is no commit: expected its 40 hexadecimal digits")


def _closed_value(scores: Mapping, protocol: str) -> tuple[float, str]:
    closed = scores.get("closed")
    own = ((closed or {}).get("protocols") or {}).get(protocol)
    if not own:
        raise EvaluationError(f"{scores.get('name')}: no closed answers in words were scored under {protocol}")
    low, high = closed["wilson"]
    told = "a failed extraction gets a seeded random letter" if protocol == "official" else "a failed one is wrong"
    return _percent(own["accuracy"]), (
        f"closed questions, n = {own['n']}, extraction protocol {protocol} ({told}); headline {scores['extraction']}: "
        f"{_percent(closed['accuracy'])} % [{_percent(low)}, {_percent(high)}] (95 % Wilson), "
        f"{_percent(closed['failed'])} % not read; questions SHA-256 {scores['questions_sha256']}; DentalGemma"
    )


def _open_value(scores: Mapping) -> tuple[float, str]:
    own = scores.get("open")
    if not own or own["accuracy"] is None:
        raise EvaluationError(f"{scores.get('name')}: no open answers were judged")
    judge = own.get("judge") or {}
    return _percent(own["accuracy"]), (
        f"open questions, {own['judged']} of {own['n']} judged, {own['judge_errors']} judge errors left out; binary "
        f"judge {judge.get('model')}, prompt SHA-256 {judge.get('prompt_sha256')}; "
        f"questions SHA-256 {scores['questions_sha256']}; DentalGemma"
    )


def _describe(scores: Mapping, kind: str) -> dict:
    own = scores[kind]
    by_image = own["interval_by_image"]
    described = {
        "n": own.get("judged") if kind == "open" else own["n"],
        "correct": own["correct"],
        "wilson_95": [_percent(share) for share in own["wilson"]],
        # An interval without width is none: answers that are all alike tell nothing of others.
        **({"by_image_95": [_percent(share) for share in by_image]} if has_width(by_image) else {}),
        "mode": scores["mode"],
        "questions_sha256": scores["questions_sha256"],
    }
    if kind != "open":
        described["extraction"] = scores["extraction"]
    if kind != "closed" and (judge := scores["open"].get("judge")):
        described["judge"] = {key: judge.get(key) for key in ("model", "prompt_sha256")}
    return described


def _read_entries(path: Path) -> list[EvalResultEntry]:
    if not path.exists():
        return []
    try:
        return parse_eval_result_entries(yaml.safe_load(path.read_text(encoding="utf-8")) or [])
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(f"{path} is there and is no list of results: {error}; move it away") from None


def _percent(share: float) -> float:
    return round(100 * share, 2)
