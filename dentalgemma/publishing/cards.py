"""The cards of a model and of its adapter, rendered from recorded facts: certificate, run facts, scores."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import yaml
from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from data_builders.chat import SYSTEM_PROMPT
from data_builders.dataset_card import LANGUAGES, MODALITIES
from data_builders.licences import find_licence
from dentalgemma import __version__
from dentalgemma.certificates import ADAPTER_CONFIG, ADAPTER_FOLDER
from dentalgemma.evaluation.files import write_whole
from dentalgemma.evaluation.report_notes import count_found, note_chance
from dentalgemma.evaluation.report_text import FILTERS, TURNS, escape_markdown, has_width, write_code
from dentalgemma.evaluation.results import REPO_ID, model_index
from dentalgemma.publishing.card_facts import (
    CardError,
    compose_panels,
    count_shown,
    describe_procedure,
    find_test,
    list_findings,
    list_languages,
    list_missed,
    list_results,
    list_versions,
    read_comparison,
    read_contamination,
    read_decision,
    read_recorded,
    read_scores,
)
from dentalgemma.publishing.card_figures import draw_composition, draw_losses, draw_results
from dentalgemma.publishing.families import contradict_base
from dentalgemma.publishing.licences import ModelTerms, find_base, judge_model, list_sources

README, NOTICE, FIGURES = "README.md", "NOTICE", "figures"
TAGS = ["dental", "medical", "radiology", "dentalgemma"]
OWN_NAME = "OWNER/NAME"  # the card's own repository, which is not known yet: `push` puts the name in its place
WEB = re.compile(r"https?://[^\s<>()\[\]\"'`|\\]+")
NO_CITATION = re.compile(r"[^\w .,:/-]")
PROJECT = "https://github.com/dentalgemma/dentalgemma"

__all__ = ["CardError", "write_model_card"]


class Kind(NamedTuple):
    """What a card is about: its front matter's library and relation to the base, and the template of its page."""

    library: str
    relation: str
    template: str


MODEL = Kind("transformers", "finetune", "model_card.md.jinja")
LORA = Kind("peft", "adapter", "adapter_card.md.jinja")


def write_model_card(
    model: Path,
    comparison: Path | None = None,
    *,
    base: str | None = None,
    scores: Path | None = None,
    contamination: Path | None = None,
    decision: Path | None = None,
    benchmark: str | None = None,
    quantized_from: str | None = None,
) -> Path:
    """Write `README.md`, its figures and, where the base's terms ask for one, `NOTICE` into a merged model folder.

    The folder's `adapter/`, where there is one, gets its own, and its configuration names the base. `base` is the Hub
    id of the base, where the runs started from a folder. `scores` of this model also become the card's `model-index`,
    where `benchmark` says what the questions are called. `contamination` is one document, or a list of one for each
    dataset. `quantized_from` is the repository on the Hub of the merged model that a 4-bit copy was made from. The
    cards call their own repository OWNER/NAME; `push` puts its name in. Returns the path of the model's card.

    Raises:
        CardError: when a fact is missing, or one of the files is not about this model and its questions.
    """
    model = Path(model).resolve()
    certificate = read_recorded(model)
    stages = certificate["stages"]
    rehearsal = bool(stages[0]["base_is_rehearsal"])
    base = _find_base(stages[0], base, config=model / "config.json")
    _check_origin(quantized_from, certificate)
    scored = read_scores(Path(scores), certificate) if scores else None
    compared = read_comparison(Path(comparison), certificate) if comparison else None
    sources = list_sources(stages)
    terms = judge_model(base, sources, rehearsal=rehearsal)
    facts = {
        "certificate": certificate,
        "stages": stages,
        "shown": list(map(count_shown, stages)),
        "rehearsal": rehearsal,
        "base": base,
        "quantized_from": quantized_from,
        "origin": "a small random model for rehearsals" if rehearsal else f"`{base}`",
        "splits": list(dict.fromkeys(split for stage in stages for split in stage["dataset_rows"])),
        "terms": terms,
        "non_commercial": any(map(_forbids_commerce, sources)),
        "comparison": compared,
        "scores": scored,
        "contamination": read_contamination(Path(contamination)) if contamination else None,
        "decision": read_decision(Path(decision), certificate, scored) if decision else None,
        "test": find_test(compared, scored),
        "adapter": _stacked(model, certificate),
        "languages": list_languages(stages),
        "findings": list_findings(stages),
        "versions": list_versions(stages),
        "procedure": describe_procedure(stages),
    }
    figures = {
        "loss.png": draw_losses(stages),
        "results.png": draw_results(list_results(compared, scored)),
        "data.png": draw_composition(compose_panels(stages)),
    }
    index = _index(model, scored, benchmark) if scored else {}
    if facts["adapter"]:
        _write(model / ADAPTER_FOLDER, LORA, facts, figures, name=model.name)
        _name_base(model / ADAPTER_FOLDER / ADAPTER_CONFIG, base, rehearsal=rehearsal)
    return _write(model, MODEL, facts, figures, name=model.name, index=index)


def _find_base(first: Mapping, base: str | None, *, config: Path) -> str:
    """The Hub id of the base; of a rehearsal the name of its folder."""
    recorded = first["base_model"]
    if first["base_is_rehearsal"]:
        return base or recorded
    if first["base_is_local"]:
        if base is None:
            raise CardError(
                f"the first stage started from a folder, {recorded}: say with --base which Hub model that is, "
                "since its terms pass on to this one"
            )
    elif base not in (None, recorded):
        raise CardError(f"the first stage was trained from {recorded}, not from {base}: leave --base out")
    base = base or recorded
    if not REPO_ID.fullmatch(base):
        raise CardError(f"{base!r} is no model of the Hub: --base is its owner/name")
    by_name = find_base(recorded)
    if by_name and find_base(base) is not by_name:
        raise CardError(
            f"the first stage started from a folder {recorded}, which is under the {by_name.title}, and {base} is not: "
            "name the right model with --base"
        )
    if found := contradict_base(config, base):
        raise CardError(f"{config.parent} was not made from {base}: {found}; name the right model with --base")
    return base


def _check_origin(repo: str | None, certificate: Mapping) -> None:
    """The merged model of a 4-bit copy: a repository, and only where there is such a copy."""
    if repo is None:
        return
    if not certificate.get("quantization"):
        raise CardError("--quantized-from is for what `dentalgemma quantize` wrote, and this model is not quantised")
    if not REPO_ID.fullmatch(repo):
        raise CardError(f"--quantized-from: {repo!r} is no repository of the Hub: expected owner/name")


def _forbids_commerce(source: Mapping) -> bool:
    licence = find_licence(source.get("license")) if source.get("rows", 1) else None
    return licence is not None and not licence.commercial


def _stacked(model: Path, certificate: Mapping) -> dict | None:
    """What the certificate says of the folder's own adapter; None where there is none."""
    found = certificate.get("adapter")
    here = (model / ADAPTER_FOLDER / ADAPTER_CONFIG).is_file()
    return found if here and isinstance(found, dict) and "left_out" not in found else None


def _write(
    folder: Path,
    kind: Kind,
    facts: Mapping,
    figures: Mapping[str, bytes | None],
    *,
    name: str,
    index: Mapping | None = None,
) -> Path:
    """Write one card, what it shows and its NOTICE; the card last, since a push looks for it."""
    title = f"DentalGemma ({_show(name)}{', adapter' if kind is LORA else ''})"
    body = (
        _environment()
        .get_template(kind.template)
        .render(
            **facts,
            title=title,
            repo=OWN_NAME,
            figures=figures,
            citations=_cite(facts, name),
        )
    )
    text = f"---\n{_front_matter(kind, facts, index or {})}---\n\n{body}"
    for file, content in figures.items():
        if content is None:
            (folder / FIGURES / file).unlink(missing_ok=True)  # of an earlier card
        else:
            write_whole(folder / FIGURES / file, content)
    terms: ModelTerms = facts["terms"]
    if terms.notice:
        write_whole(folder / NOTICE, terms.notice)
    write_whole(folder / README, text)
    return folder / README


def _front_matter(kind: Kind, facts: Mapping, index: Mapping) -> str:
    """The card's metadata as YAML, which reads back as exactly what was meant."""
    stages = facts["stages"]
    datasets = dict.fromkeys(name for stage in stages for name in stage.get("hub_datasets") or ())
    data = ModelCardData(
        language=facts["languages"] or None,
        library_name=kind.library,
        pipeline_tag="image-text-to-text",
        tags=[*TAGS, *(["non-commercial"] if facts["non_commercial"] else ())],
        datasets=[name for name in datasets if REPO_ID.fullmatch(name)] or None,
        **_name_origin(kind, facts),
        **facts["terms"].metadata,
        **index,
    ).to_dict()
    data = _plain_values(data)
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=1_000_000)
    assert ModelCard(f"---\n{text}---\n").data.to_dict() == data == yaml.safe_load(text)
    return text


def _name_origin(kind: Kind, facts: Mapping) -> dict[str, str]:
    """The base and the relation to it; of a 4-bit copy the merged model, where its repository is known.

    The base whose terms apply has a key of ours then.
    """
    if facts["rehearsal"]:
        return {}
    if kind is MODEL and facts["quantized_from"]:
        merged = {"base_model": facts["quantized_from"], "base_model_relation": "quantized"}
        return {**merged, "original_base_model": facts["base"]}
    return {"base_model": facts["base"], "base_model_relation": kind.relation}


def _index(model: Path, scores: Mapping, benchmark: str | None) -> dict:
    name = benchmark or f"questions {scores['questions_sha256'][:12]}"
    return {"model_name": model.name, "eval_results": model_index(scores, dataset_name=name)}


def _plain_values(value):
    """The same mapping or list with every text in it on one visible line."""
    if isinstance(value, dict):
        return {key: _plain_values(own) for key, own in value.items()}
    if isinstance(value, list):
        return [_plain_values(own) for own in value]
    return _show(value) if isinstance(value, str) else value


def _show(text: object) -> str:
    """A text as one line of visible characters, which nothing in it turns around."""
    shown = "".join(c if c.isprintable() else " " for c in TURNS.sub("", str(text)))
    return " ".join(shown.split())


def _name_base(config: Path, base: str, *, rehearsal: bool) -> None:
    """Let the adapter be loaded on the Hub's base instead of the folder that it was trained from."""
    if rehearsal:
        return
    settings = json.loads(config.read_text(encoding="utf-8"))
    if settings.get("base_model_name_or_path") != base:
        # The commit was that of another repository.
        settings |= {"base_model_name_or_path": base, "revision": None}
        write_whole(config, json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _cite(facts: Mapping, name: str) -> list[str]:
    """BibTeX entries of this model, the toolkit and the base: what is recorded of them, no invented authors."""
    weights = facts["certificate"]["weights"]
    version = facts["stages"][-1]["versions"].get("dentalgemma", __version__)
    own = {"title": name, "note": f"A dental vision-language model, weights {weights}"}
    entries = [
        _bibtex("misc", f"{name} {weights}", {**own, **_published(OWN_NAME)}),
        _bibtex("software", "dentalgemma", {"title": "DentalGemma", "version": version, "url": PROJECT}),
    ]
    if not facts["rehearsal"]:
        revision = facts["stages"][0].get("base_revision")
        note = {"note": f"Base model, revision {revision}"} if revision else {"note": "Base model"}
        entries.append(_bibtex("misc", facts["base"], {"title": facts["base"], **note, **_published(facts["base"])}))
    return entries


def _published(repo: str) -> dict[str, str]:
    return {"publisher": "Hugging Face", "url": f"https://huggingface.co/{repo}"}


def _bibtex(kind: str, key: str, fields: Mapping[str, str]) -> str:
    """An entry whose values hold nothing that BibTeX, LaTeX or a code block could take for a command."""
    values = {name: " ".join(NO_CITATION.sub(" ", value).split()) for name, value in fields.items()}
    # An underscore in a text is a subscript to LaTeX; in `url` it is meant.
    values = {name: value if name == "url" else value.replace("_", "\\_") for name, value in values.items()}
    lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in values.items())
    return f"@{kind}{{{re.sub('[^A-Za-z0-9]+', '-', key).strip('-').lower() or 'model'},\n{lines}\n}}"


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("dentalgemma.publishing"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.globals |= {
        "has_width": has_width,
        "note_chance": note_chance,
        "count_found": count_found,
        "list_missed": list_missed,
        "system_prompt": SYSTEM_PROMPT,
        "project": PROJECT,
        "hub_url": _hub_url,
        "LANGUAGES": LANGUAGES,
        "MODALITIES": MODALITIES,
    }
    environment.filters |= {
        "points": lambda share: f"{100 * share:+.1f}",
        "percent": lambda share: "–" if share is None else f"{100 * share:.1f} %",
        "of_100": lambda share: f"{100 * share:.0f} of 100",
        "number": lambda count: "–" if count is None else f"{count:,}",
        "python": _python_literal,
        "licence": _link_licence,
        "linked": _link_source,
        "cell": _escape,
        "code": lambda value: write_code(_show(value)),
        **{name: FILTERS[name] for name in ("many", "label", "tidy")},
    }
    return environment


def _escape(value: object) -> str:
    return escape_markdown(_show(value))


def _python_literal(text: str) -> str:
    """A text as Python source: one line, and nothing in it that an editor would not show."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in json.dumps(text, ensure_ascii=False))


def _link_licence(text: str | None) -> str:
    """A licence as its source states it, with a link where it is known."""
    told = _escape(text or "not stated")
    licence = find_licence(text)
    return f"[{told}]({licence.url})" if licence else told


def _hub_url(stage: Mapping) -> str | None:
    """Where a stage's dataset is on the Hub, if the run took it from there."""
    name = stage["dataset"]
    return f"https://huggingface.co/datasets/{name}" if name in (stage.get("hub_datasets") or ()) else None


def _link_source(source: Mapping) -> str:
    """A source's name, with a link where its address is one of the web."""
    told, url = _escape(source["name"]), source.get("url")
    return f"[{told}]({url})" if url and WEB.fullmatch(url) else told
