"""The report: one HTML page that needs no other file and no network, the same in Markdown, and its numbers as JSON."""

from __future__ import annotations

import base64
import io
import json
import platform
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from data_builders.images import ImageError, measure_pixels
from dentalgemma.evaluation import plots
from dentalgemma.evaluation.files import write_whole
from dentalgemma.evaluation.questions import EvaluationError, Question
from dentalgemma.evaluation.report_notes import (
    SINGLE,
    count_found,
    count_images,
    count_verdicts,
    find_foreign,
    find_single_parts,
    note_answers,
    tie_agreement,
    tie_gate,
)
from dentalgemma.evaluation.report_text import FILTERS, has_width, tidy, write_label, write_number
from dentalgemma.evaluation.scoring import Run

FORMAT = "report/1"
THUMBNAIL_SIDE = 320  # pixels
SHOWN_FLIPS = 20  # of each direction and pair
SHOWN_OUTPUT = 700  # characters of an answer
SHOWN_MATCHES = 30  # of contamination
LIBRARIES = ("dentalgemma", "numpy", "scipy", "matplotlib", "pillow")
BREAKDOWNS = {
    "per_category": "category",
    "per_modality": "modality",
    "per_language": "language",
    "per_finding": "finding",
    "per_question_type": "question type",
    "per_source": "source",
}
PLOTTED = ("per_category", "per_modality", "per_language", "per_finding")
BOUNDS = {
    "failures_wrong": "failed extractions wrong",
    "failures_at_chance": "failed extractions at chance",
    "extracted_only": "extracted answers only",
    "answerable_only": "answerable questions only",
}


class Thumbnail(NamedTuple):
    """A small picture as a data URI, with its size in pixels."""

    uri: str
    width: int
    height: int


def write_report(
    runs: Sequence[Run],
    out: Path,
    *,
    scores: Sequence[Mapping],
    comparisons: Mapping | Sequence[Mapping] = (),
    decision: Mapping | None = None,
    contamination: Mapping | Sequence[Mapping] | None = None,
    judge_agreement: Mapping | None = None,
    gate: Mapping | None = None,
    commands: Sequence[str] = (),
    title: str = "Evaluation",
    flips: int = SHOWN_FLIPS,
) -> None:
    """Write the page to `out`, and beside it the same as `.md` and as `.json`.

    `scores` are the runs' own, in their order; `comparisons` is what `compare_all` or `compare_runs` gave, or a list of
    the latter; `contamination` one document, or one for each dataset. The same inputs give the same bytes.

    Raises:
        EvaluationError: when the parts do not belong together, or `out` cannot be written.
    """
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise EvaluationError(f"{out}: a report is an HTML page; give it a name that ends in .html")
    document = compose_report(
        runs,
        scores=scores,
        comparisons=comparisons,
        decision=decision,
        contamination=contamination,
        judge_agreement=judge_agreement,
        gate=gate,
        commands=commands,
        title=title,
        flips=flips,
    )
    write_html(document, out, pictures=_make_thumbnails(runs, document))
    write_markdown(document, out.with_suffix(".md"))
    write_whole(out.with_suffix(".json"), json.dumps(document, indent=2, ensure_ascii=False, default=str) + "\n")


def compose_report(
    runs: Sequence[Run],
    *,
    scores: Sequence[Mapping],
    comparisons: Mapping | Sequence[Mapping] = (),
    decision: Mapping | None = None,
    contamination: Mapping | Sequence[Mapping] | None = None,
    judge_agreement: Mapping | None = None,
    gate: Mapping | None = None,
    commands: Sequence[str] = (),
    title: str = "Evaluation",
    flips: int = SHOWN_FLIPS,
) -> dict:
    """Everything the page shows, without pictures; what is not there is None and the page says so.

    Raises:
        EvaluationError: when the parts do not belong together.
    """
    by_name = {run.name: run for run in runs}
    if not runs or len(by_name) < len(runs):
        raise EvaluationError("a report needs at least one run, and a name of its own for each (--name)")
    if [score["name"] for score in scores] != list(by_name):
        raise EvaluationError(f"the scores are of {[s['name'] for s in scores]}, the runs are {list(by_name)}")
    if isinstance(comparisons, Mapping):
        comparisons = comparisons.get("pairs", [comparisons])
    for comparison in comparisons:
        for side in ("a", "b"):
            if comparison[side]["name"] not in by_name:
                raise EvaluationError(f"{comparison[side]['name']!r} is compared, but is not among the runs")
    pairs = [(by_name[c["a"]["name"]], by_name[c["b"]["name"]]) for c in comparisons]
    return {
        "format": FORMAT,
        "title": title,
        "models": [dict(score) for score in scores],
        "comparisons": [dict(comparison) for comparison in comparisons],
        "orders": order_by_reading(scores),
        "decision": decision,
        "decided_on_others": find_foreign(decision, scores),
        "notes": {run.name: note_answers(run, score) for run, score in zip(runs, scores, strict=True)},
        "counts": {run.name: _count(run) for run in runs},
        "flips": [find_flips(a, b, limit=flips) for a, b in pairs],
        "judge_agreement": judge_agreement,
        "agreement_of": None if judge_agreement is None else tie_agreement(judge_agreement, runs),
        "contamination": [contamination] if isinstance(contamination, Mapping) else contamination or None,
        "gate": gate,
        "gate_of_others": None if gate is None else tie_gate(gate, scores),
        "generation": [_describe_settings(run) for run in runs],
        "commands": list(commands),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
    }


def _count(run: Run) -> dict:
    return {"closed": count_images(run), "verdicts": count_verdicts(run)}


def order_by_reading(scores: Sequence[Mapping]) -> dict[str, dict]:
    """The models' closed accuracies and their order under each protocol and bound, and whether the order is another.

    The headline, the test and the decision use one protocol alone, `seed` unless said otherwise; this says what they
    rest on. `order` holds those of one accuracy together; `changed` is `yes` where two models change places, `tie`
    where two that differ in the headline do not, else `no`. Empty where a model has no closed answer in words.
    """
    readings: dict[str, dict[str, float]] = {}
    for score in scores:
        closed = score["closed"]
        if not closed or not closed.get("protocols"):
            return {}
        for name, own in closed["protocols"].items():
            readings.setdefault(name, {})[score["name"]] = own["accuracy"]
        for name, own in (closed.get("bounds") or {}).items():
            if own and own["accuracy"] is not None:  # none, where nothing could be read
                readings.setdefault(name, {})[score["name"]] = own["accuracy"]
    complete = {name: own for name, own in readings.items() if len(own) == len(scores)}
    headline = complete.get("failures_wrong", {})
    return {
        name: {"accuracy": own, "order": _order(own), "changed": _compare_order(headline, own)}
        for name, own in complete.items()
    }


def _order(accuracies: Mapping[str, float]) -> list[list[str]]:
    ranks = sorted(set(accuracies.values()), reverse=True)
    return [[name for name, accuracy in accuracies.items() if accuracy == rank] for rank in ranks]


def _compare_order(headline: Mapping[str, float], other: Mapping[str, float]) -> str:
    signs = [
        (headline[a] - headline[b]) * (other[a] - other[b])
        for a, b in combinations(headline, 2)
        if headline[a] != headline[b]
    ]
    return "yes" if any(sign < 0 for sign in signs) else "tie" if 0 in signs else "no"


def find_flips(a: Run, b: Run, *, limit: int = SHOWN_FLIPS) -> dict:
    """What one model gets right and the other wrong, losses first: up to `limit` of each, and how many there are."""
    items = {item.item_id: item for item in a.items}
    changed = [
        item
        for item_id, item in items.items()
        if {a.outcomes.get(item_id), b.outcomes.get(item_id)} == {True, False}  # None: not judged
    ]
    losses = [item for item in changed if a.outcomes[item.item_id]]
    gains = [item for item in changed if not a.outcomes[item.item_id]]
    return {
        "a": a.name,
        "b": b.name,
        "losses": len(losses),
        "gains": len(gains),
        "shown_losses": [_describe_flip(item, a, b) for item in losses[:limit]],
        "shown_gains": [_describe_flip(item, a, b) for item in gains[:limit]],
    }


def _describe_flip(item: Question, a: Run, b: Run) -> dict:
    return {
        "item_id": item.item_id,
        "picture": _picture_key(item),
        "kind": item.kind,
        "question": item.question,
        "options": dict(item.options),
        "answer": item.answer,
        "answerable": item.answerable,
        "categories": list(item.categories),
        "question_type": item.question_type,
        "language": item.language,
        "modality": item.modality,
        "before": _describe_answer(item, a),
        "after": _describe_answer(item, b),
    }


def _describe_answer(item: Question, run: Run) -> dict:
    extraction, verdict = run.extractions.get(item.item_id), run.verdicts.get(item.item_id)
    output = str(run.lines[item.item_id].get("output") or "")
    return {
        "right": run.outcomes[item.item_id],
        "output": output[:SHOWN_OUTPUT],
        "characters": len(output),
        "letter": extraction.letter if extraction else None,
        "method": extraction.method if extraction else None,
        "verdict": verdict.get("verdict") if verdict else None,
        "reason": verdict.get("reason") if verdict else None,
        "image_shown": run.settings.get("images"),
    }


def _describe_settings(run: Run) -> dict:
    """How the answers were made; of a server and an imported file what all lines say alike."""
    settings = {"name": run.name, **run.settings}
    for key in ("server", "imported"):
        lines = [line[key] for line in run.lines.values() if line.get(key)]
        first = lines[0] if lines else {}
        settings[key] = {name: own for name, own in first.items() if all(x.get(name) == own for x in lines)} or None
    return settings


def write_html(document: Mapping, out: Path, *, pictures: Mapping[str, Thumbnail]) -> None:
    """Write the page; `pictures` are the flips' thumbnails, by their key."""
    template = _environment(autoescape=True).get_template("report.html.jinja")
    page = template.render(
        **_names(document),
        pictures=pictures,
        picture_numbers={key: number for number, key in enumerate(pictures, start=1)},
        plots=_draw(document),
    )
    write_whole(out, page)


def write_markdown(document: Mapping, out: Path) -> None:
    """Write the report's tables and sentences as Markdown: without plots, pictures and the answers that flipped."""
    write_whole(out, _environment(autoescape=False).get_template("report.md.jinja").render(**_names(document)))


def _names(document: Mapping) -> dict:
    """What both templates call by name."""
    models = document["models"]

    def parts(kind: str, key: str) -> list[str]:
        return sorted({part for model in models if model[kind] for part in model[kind].get(key) or ()})

    headline = all(m["closed"].get("headline", "failures_wrong") for m in models if m["closed"])
    used = {method for model in models if model["closed"] for method in model["closed"]["methods"]}

    def leaks(found: Mapping, *, leak: bool = True) -> list[Mapping]:
        return [m for key in ("image_matches", "question_matches") for m in found[key] if m.get("leak", True) is leak]

    return {
        "in_line": _write_in_line,
        "leaks": leaks,
        "no_leaks": partial(leaks, leak=False),
        "has_width": has_width,
        "count_found": count_found,
        "notes": {kind: _gather_notes(document, kind) for kind in ("closed", "open", "combined")},
        "single": {kind: find_single_parts(models, kind) for kind in ("closed", "open")},
        "single_words": SINGLE,
        "report": document,
        "models": models,
        "numbers": {model["name"]: number for number, model in enumerate(models, start=1)},
        "parts": parts,
        "methods": [*plots.METHOD_STYLES, *sorted(used - {*plots.METHOD_STYLES, "loglikelihood"})],
        "breakdowns": BREAKDOWNS,
        "bounds": BOUNDS | ({"failures_wrong": f"{BOUNDS['failures_wrong']} (the headline)"} if headline else {}),
        "shown_matches": SHOWN_MATCHES,
    }


def _gather_notes(document: Mapping, kind: str) -> dict[str, list[str]]:
    """Each note of the table of one kind, with the models that it is about."""
    gathered: dict[str, list[str]] = {}
    for name, notes in document["notes"].items():
        for note in notes.get(kind, ()):
            gathered.setdefault(note, []).append(name)
    return gathered


def _write_in_line(value: object) -> str | None:
    """A short list of numbers or words in one line; None for anything else."""
    if (
        not isinstance(value, (list, tuple))
        or not value
        or not all(isinstance(own, (str, int, float)) for own in value)
    ):
        return None
    text = ", ".join(tidy(own) if isinstance(own, str) else write_number(own) for own in value)
    return text if len(text) <= 80 else None


def _draw(document: Mapping) -> dict[str, str]:
    """Plots as data URIs of SVG: an image runs no script and loads nothing, whatever a model is called."""
    drawn = {}
    models = document["models"]
    for kind in ("closed", "open", "combined"):
        rows = [
            {"name": m["name"], "interval": _interval(m[kind]), **_pick(m[kind], "accuracy", "wilson")}
            for m in models
            if m[kind] and m[kind].get("accuracy") is not None
        ]
        closed = kind == "closed" and rows
        if rows:
            chances = {m["closed"]["chance"] for m in models if m["closed"]} if closed else set()
            ceilings = {m["closed"]["ceiling"] for m in models if m["closed"]} if closed else set()
            drawn[kind] = plots.draw_accuracy(rows, chance=_only(chances), ceiling=_only(ceilings))
    methods = [
        {"name": m["name"], "methods": m["closed"]["methods"]}
        for m in models
        if m["closed"] and m["mode"] != "loglikelihood"
    ]
    if methods:
        drawn["methods"] = plots.draw_methods(methods)
    differences = [
        {"name": f"{_number(models, c['a'])} → {_number(models, c['b'])}, {kind}", "difference": pair["difference"]}
        | {"interval": pair["difference_by_image"]}
        for c in document["comparisons"]
        for kind in ("closed", "open", "combined")
        if (pair := c[kind])
    ]
    if differences:
        drawn["differences"] = plots.draw_differences(differences)
    for key in PLOTTED:
        parts = sorted({part for m in models if m["closed"] for part in m["closed"][key]})
        if len(parts) > 1 or (parts and key == "per_category"):
            rows = [{"name": m["name"], "parts": _relabel(m["closed"][key])} for m in models if m["closed"]]
            drawn[key] = plots.draw_parts(list(dict.fromkeys(map(write_label, parts))), rows)
    return {name: "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode() for name, svg in drawn.items()}


def _pick(values: Mapping, *names: str) -> dict:
    return {name: values[name] for name in names}


def _interval(own: Mapping) -> Sequence[float] | None:
    return own["interval_by_image"] if has_width(own["interval_by_image"]) else None


def _relabel(parts: Mapping[str, Mapping]) -> dict[str, Mapping]:
    return {write_label(name): own for name, own in parts.items()}


def _only(values: set) -> float | None:
    return values.pop() if len(values) == 1 else None


def _number(models: Sequence[Mapping], side: Mapping) -> int:
    return 1 + [model["name"] for model in models].index(side["name"])


def _picture_key(item: Question) -> str | None:
    return None if item.image is None else item.image_id or str(item.image)


def _make_thumbnails(runs: Sequence[Run], document: Mapping) -> dict[str, Thumbnail]:
    """Small JPEGs of the images that flips show, each once; one that cannot be read is left out, and the page says it.

    Nothing that a file says beside its pixels comes along.
    """
    shown = {
        flip["picture"] for pair in document["flips"] for part in ("losses", "gains") for flip in pair[f"shown_{part}"]
    }
    pictures = {}
    for run in runs:
        for item in run.items:
            key = _picture_key(item)
            if key in shown and key not in pictures and item.image is not None:
                try:
                    pictures[key] = _thumbnail(measure_pixels(item.image)[1])
                except (ImageError, OSError):
                    continue
    return pictures


def _thumbnail(image: Image.Image) -> Thumbnail:
    small = image.copy()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    small = small.convert("RGB")
    small.info.clear()  # Pillow would copy a JPEG's comment
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=72)
    return Thumbnail("data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(), *small.size)


def _environment(*, autoescape: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader("dentalgemma.publishing"),
        undefined=StrictUndefined,
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    return environment
