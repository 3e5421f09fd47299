"""The command `dentalgemma`. Everything heavy is imported by the command that needs it, so that `--help` is instant."""

from __future__ import annotations

import json
import sys
from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from data_builders.records import InputError
from dentalgemma import __version__

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    help="From dental annotation files to an adapted, merged, evaluated and documented vision-language model.",
)
out_console = Console()
error_console = Console(stderr=True)

SHOWN_PER_CODE = 5

Seed = Annotated[int | None, typer.Option(help="Seed; the sources file's own where it is left out.")]
Workers = Annotated[int, typer.Option(min=1, help="Images decoded at a time. The result does not depend on it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for another program.")]


class Family(StrEnum):
    gemma3 = "gemma3"


class Mode(StrEnum):
    generate = "generate"
    loglikelihood = "loglikelihood"


class Dtype(StrEnum):
    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class Images(StrEnum):
    true = "true"
    blank = "blank"
    other = "other"


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def audit(
    sources: Annotated[Path, typer.Argument(help="A sources file.")],
    as_json: AsJson = False,
    workers: Workers = 2,
) -> None:
    """Say what is in the sources: counts, problems with file and line, duplicates, leaks. Writes nothing.

    Example: `dentalgemma audit sources.yaml --json > audit.json`
    """
    from data_builders.audit import audit as run_audit
    from data_builders.sources import load_sources

    report = run_audit(load_sources(sources), workers=workers, progress=not as_json)
    if as_json:
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False))
        return
    for source in report["sources"]:
        _print_source(source)
    out_console.print(f"{len(report['duplicates'])} sets of files show the same pixels.")
    out_console.print(f"{len(report['leaks'])} groups lie in several of the sources' own splits.")


def _print_source(source: dict) -> None:
    from rich.markup import escape
    from rich.table import Table

    what = f"{source['cases']} cases" if source["reader"] == "cases" else f"{source['images']} images"
    title = f"{source['name']} ({source['reader']}): {what}, {source['images_present']} present"
    table = Table(title=escape(f"{title}, {source['findings']} findings"), title_justify="left")
    table.add_column("label")
    table.add_column("images", justify="right")
    table.add_column("findings", justify="right")
    for label, counts in source["classes"].items():
        table.add_row(escape(label), str(counts["images"]), str(counts["findings"]))
    for label, counts in source["ignored"].items():
        table.add_row(f"[dim]{escape(label)} (ignored)", str(counts["images"]), str(counts["findings"]))
    out_console.print(table)
    shown: Counter[str] = Counter()
    for problem in source["problems"]:
        shown[problem["code"]] += 1
        if shown[problem["code"]] <= SHOWN_PER_CODE:
            place = problem["path"] if problem["line"] is None else f"{problem['path']}:{problem['line']}"
            out_console.print(escape(f"  {problem['severity']}: {place}: {problem['message']}"), soft_wrap=True)
    for code, count in source["problem_counts"].items():
        if count > SHOWN_PER_CODE:
            out_console.print(f"  … {count} problems of the kind {code}; all of them with --json")


@app.command()
def build(
    sources: Annotated[Path, typer.Argument(help="A sources file.")],
    out: Annotated[Path, typer.Option(help="The dataset folder to write.")],
    seed: Seed = None,
    workers: Workers = 2,
    strict: Annotated[bool, typer.Option(help="Stop on any error instead of leaving out what it concerns.")] = False,
    as_json: AsJson = False,
) -> None:
    """Build the VQA dataset folder: questions and answers that the annotations carry, split by group.

    Example: `dentalgemma build sources.yaml --out data/vqa`
    """
    from data_builders.sources import load_sources
    from data_builders.vqa import build_vqa

    loaded = load_sources(sources)
    report = build_vqa(loaded, out, seed=seed, workers=workers, strict=strict, progress=not as_json)
    _print_build(report, out, as_json=as_json)


@app.command("build-instruct")
def build_instruct(
    sources: Annotated[Path, typer.Argument(help="A sources file with sources of `reader: cases`.")],
    out: Annotated[Path, typer.Option(help="The dataset folder to write.")],
    seed: Seed = None,
    strict: Annotated[bool, typer.Option(help="Stop on any error instead of leaving out what it concerns.")] = False,
    as_json: AsJson = False,
) -> None:
    """Build the instruct dataset folder from clinical cases in JSONL.

    Example: `dentalgemma build-instruct cases.yaml --out data/instruct`
    """
    from data_builders.instruct import build_instruct as run_build
    from data_builders.sources import load_sources

    report = run_build(load_sources(sources), out, seed=seed, strict=strict)
    _print_build(report, out, as_json=as_json)


def _print_build(report: dict, out: Path, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False))
        return
    for split, counts in report["splits"].items():
        images = f" on {counts['images']} images" if counts.get("images") else ""
        out_console.print(f"{split}: {counts['rows']} rows{images}")
    for source in report["sources"]:
        if not source.get("rows", source.get("cases")):
            out_console.print(f"[yellow]source {source['name']} gave no rows", soft_wrap=True)
    for split in report.get("empty_splits", ()):
        out_console.print(f"[yellow]split {split} is empty: there are too few groups", soft_wrap=True)
    for code, count in report["problem_counts"].items():
        out_console.print(f"  {count} x {code}")
    if report["problem_counts"]:
        out_console.print("`dentalgemma audit` shows each problem with file and line.")
    out_console.print(f"Wrote {out}", soft_wrap=True)


@app.command("build-probe")
def build_probe(
    dataset: Annotated[Path, typer.Argument(help="A dataset folder.")],
    out: Annotated[Path, typer.Option(help="The questions file (JSONL) to write; images go to a folder beside it.")],
    split: Annotated[str, typer.Option(help="The split to ask about.")] = "test",
    language: Annotated[list[str] | None, typer.Option(help="en, es; may be given twice.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the options and their order.")] = 0,
) -> None:
    """Make closed questions with four options from a held-out split.

    Example: `dentalgemma build-probe data/vqa --split test --out probe.jsonl`
    """
    from data_builders.probes import build_probe as run_build

    number = run_build(dataset, split, out, languages=tuple(language or ["en"]), seed=seed)
    out_console.print(f"Wrote {number} questions to {out}", soft_wrap=True)


@app.command()
def phantom(
    folder: Annotated[Path, typer.Argument(help="The folder to write.")],
    images: Annotated[int, typer.Option(min=1, help="How many radiographs to draw.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed; every image depends on it and its own number alone.")] = 0,
) -> None:
    """Draw synthetic panoramics with known truth, written in every annotation format, and as many clinical cases.

    Example: `dentalgemma phantom phantoms --images 200 && dentalgemma build phantoms/sources.yaml --out data/phantoms`
    """
    from data_builders.phantom_formats import write_phantoms

    _need_empty(folder)
    write_phantoms(folder, count=images, cases=images, seed=seed)
    out_console.print(f"Wrote {images} phantoms to {folder}", soft_wrap=True)


@app.command("tiny-model")
def tiny_model(
    folder: Annotated[Path, typer.Argument(help="The model folder to write.")],
    family: Annotated[Family, typer.Option(help="Which architecture.")] = Family.gemma3,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
) -> None:
    """Make a small random model with tokenizer and processor that loads as the real one does, without a network.

    Example: `dentalgemma tiny-model models/tiny`
    """
    from dentalgemma.models.tiny import make_tiny_model

    _need_empty(folder)
    make_tiny_model(folder, family=family.value, seed=seed)
    out_console.print(f"Wrote a small random {family.value} to {folder}", soft_wrap=True)


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(help="A run folder with an adapter.")],
    out: Annotated[Path, typer.Option(help="The model folder to write.")],
    base: Annotated[str | None, typer.Option(help="The base, where the adapter does not name the right one.")] = None,
    dtype: Annotated[str, typer.Option(help="What the merged weights are cast to: bfloat16 or float32.")] = "bfloat16",
    as_json: AsJson = False,
) -> None:
    """Fold an adapter into its base, check the result, and write a model folder with its certificate.

    Example: `dentalgemma merge runs/stage1_vqa --out models/stage1_vqa`
    """
    from dentalgemma.merging import merge_adapter

    certificate = merge_adapter(run, out, base=base, dtype=dtype)
    if as_json:
        typer.echo(json.dumps(certificate, indent=2))
        return
    changed = f"{certificate['changed_tensors']} of {certificate['tensors']} tensors changed"
    parity = f"logits differ by at most {certificate['max_logit_difference']:.1e} in fp32"
    cast = f"{certificate['reloaded_max_logit_difference']:.1e} after the cast to {dtype}"
    out_console.print(f"Wrote {out}: {changed}; {parity}, {cast}", soft_wrap=True)


@app.command()
def evaluate(
    questions: Annotated[Path, typer.Argument(help="Closed questions, as `build-probe` writes them.")],
    model: Annotated[str, typer.Option(help="A model folder or Hub id.")],
    out: Annotated[Path, typer.Option(help="The predictions (JSONL) to write; a started file is completed.")],
    mode: Annotated[Mode, typer.Option(help="Let the model write, or rank the options by likelihood.")] = Mode.generate,
    images: Annotated[
        Images, typer.Option(help="The true images, or a control without their information.")
    ] = Images.true,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions at a time.")] = 8,
    dtype: Annotated[Dtype, typer.Option(help="Precision of the weights; auto takes that of the files.")] = Dtype.auto,
    revision: Annotated[str | None, typer.Option(help="Revision of a Hub model.")] = None,
) -> None:
    """Ask a model closed questions and keep its answers.

    Example: `dentalgemma evaluate probe.jsonl --model models/stage1_vqa --out tuned.jsonl --mode loglikelihood`
    """
    import torch

    from dentalgemma.evaluation.generation import evaluate_questions
    from dentalgemma.evaluation.questions import load_questions
    from dentalgemma.models.loading import load_pretrained

    items = load_questions(questions)
    loaded, processor = load_pretrained(
        model, dtype="auto" if dtype == Dtype.auto else getattr(torch, dtype.value), revision=revision
    )
    if torch.accelerator.is_available():
        loaded.to(torch.accelerator.current_accelerator())
    evaluate_questions(
        loaded, processor, items, mode=mode.value, images=images.value, batch_size=batch_size, out=out, model_name=model
    )
    out_console.print(f"Wrote {out}", soft_wrap=True)


@app.command()
def score(
    predictions: Annotated[Path, typer.Argument(help="What `evaluate` wrote.")],
    questions: Annotated[Path, typer.Option(help="The questions that were asked.")],
    out: Annotated[Path | None, typer.Option(help="Also write the scores to this file.")] = None,
) -> None:
    """Accuracy with intervals, as JSON.

    Example: `dentalgemma score tuned.jsonl --questions probe.jsonl --out scores.json`
    """
    from dentalgemma.evaluation.scoring import score_predictions

    text = json.dumps(score_predictions(predictions, questions), indent=2, ensure_ascii=False)
    if out:
        out.write_text(text + "\n", encoding="utf-8")
    typer.echo(text)


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="Predictions of the model before.")],
    after: Annotated[Path, typer.Argument(help="Predictions of the model after, on the same questions.")],
    questions: Annotated[Path, typer.Option(help="The questions that were asked.")],
    as_json: AsJson = False,
) -> None:
    """Two models on the same questions: accuracies, difference with interval, exact McNemar test.

    Example: `dentalgemma compare base.jsonl tuned.jsonl --questions probe.jsonl`
    """
    from dentalgemma.evaluation.scoring import compare_predictions, format_comparison

    result = compare_predictions(before, after, questions)
    typer.echo(json.dumps(result, indent=2, ensure_ascii=False) if as_json else format_comparison(result))


@app.command()
def card(
    model: Annotated[Path, typer.Argument(help="A merged model folder.")],
    comparison: Annotated[Path | None, typer.Option(help="Base and this model: what `compare --json` printed.")] = None,
    base: Annotated[str | None, typer.Option(help="Hub id of the base, where training started from a folder.")] = None,
) -> None:
    """Write the model card from recorded facts: run facts, merge certificate, a comparison. Nothing is typed by hand.

    Example: `dentalgemma card models/stage2_instruct --comparison comparison.json`
    """
    from dentalgemma.publishing.cards import write_model_card

    out_console.print(f"Wrote {write_model_card(model, comparison, base=base)}", soft_wrap=True)


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="The folder to write; it must be new or a quickstart's.")] = Path(
        "quickstart"
    ),
    seed: Annotated[int, typer.Option(help="Seed of phantoms, model and training.")] = 0,
    control: Annotated[bool, typer.Option(help="Also train on shuffled images, which must learn nothing.")] = False,
) -> None:
    """The whole path on a CPU, offline: phantoms, datasets, two stages, merge, evaluation, card and a page.

    Example: `dentalgemma quickstart --out quickstart`
    """
    from dentalgemma.quickstart import run_quickstart

    page = run_quickstart(out, seed=seed, control=control)
    out_console.print(f"Open {page}", soft_wrap=True)


@app.command()
def env(as_json: AsJson = False) -> None:
    """Versions and hardware, for a bug report. Prints no secrets and no paths."""
    from dentalgemma.training.run_facts import describe_environment

    facts = describe_environment()
    typer.echo(json.dumps(facts, indent=2) if as_json else "\n".join(f"{key}: {value}" for key, value in facts.items()))


def main() -> None:
    """Run the command; what a user can mend is one sentence and its exit code, a failure of ours a traceback and 1."""
    try:
        app(prog_name="dentalgemma")
    except InputError as error:
        error_console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)


def _need_empty(folder: Path) -> None:
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise InputError(f"{folder} is not empty; choose a new folder")
