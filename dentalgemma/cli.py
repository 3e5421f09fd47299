"""The command `dentalgemma`. Everything heavy is imported by the command that needs it, so that `--help` is instant."""

from __future__ import annotations

import io
import logging
import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from data_builders.records import InputError, Modality, Problem
from dentalgemma import __version__
from dentalgemma.cli_evaluation import app as evaluation_app
from dentalgemma.cli_output import AsJson, error_console, out_console, print_json, tell_written
from dentalgemma.cli_publishing import app as publishing_app
from dentalgemma.cli_rehearsing import app as rehearsing_app
from dentalgemma.cli_trying import app as trying_app

if TYPE_CHECKING:
    from data_builders.sources import SourcesFile

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    help="From dental annotation files to an adapted, merged, evaluated and documented vision-language model.",
)
SHOWN_PER_CODE = 5
DATA, TRAINING = "Data", "Training"

Seed = Annotated[int | None, typer.Option(help="Seed; the sources file's own where it is left out.")]
Workers = Annotated[int, typer.Option(min=1, help="Images decoded at a time. The result does not depend on it.")]


def _show_presets(names: list[str] | None) -> list[str] | None:
    """Print the presets and stop, where `list` is asked for."""
    if "list" in (names or ()):
        from data_builders.presets import list_presets, list_sources

        for name, path in list_presets().items():
            typer.echo(f"{name}  ({path})")
            for source, url in list_sources(path).items():
                typer.echo(f"  {source}  {url}")
        raise typer.Exit
    return names


Preset = Annotated[
    list[str] | None,
    typer.Option(
        help="Instead of a sources file: the public sets of a preset, or one of them; may be given several times. "
        "`--preset list` shows them.",
        callback=_show_presets,
        is_eager=True,
    ),
]
Data = Annotated[Path | None, typer.Option(help="The folder with the downloads that a preset reads.")]


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command(rich_help_panel=DATA)
def audit(
    sources: Annotated[Path | None, typer.Argument(help="A sources file.")] = None,
    preset: Preset = None,
    data: Data = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page with crops, heat maps and copies.")] = None,
    strict: Annotated[bool, typer.Option(help="Exit with 1 if there is any error.")] = False,
    as_json: AsJson = False,
    workers: Workers = 2,
) -> None:
    """Say what is in the sources: counts, problems with file and line, copies, mosaics, leaks. Changes nothing.

    Example: `dentalgemma audit sources.yaml --html audit.html`

    Example: `dentalgemma audit --preset opg_detection --data downloads`
    """
    from data_builders.audit import read_sources, summarise

    loaded = _load(sources, preset, data)
    if html:
        from data_builders.audit_page import check_writable, write_audit_page

        check_writable(html)
    contents = read_sources(loaded, workers=workers, progress=not as_json)
    report = summarise(contents)
    if html:
        write_audit_page(html, report, contents)
    if as_json:
        print_json(report)
    else:
        _print_audit(report)
        if html:
            out_console.print(f"Open {html}", soft_wrap=True)
    if strict and any(p["severity"] == "error" for source in report["sources"] for p in source["problems"]):
        raise typer.Exit(1)


def _print_audit(report: dict) -> None:
    for source in report["sources"]:
        _print_source(source)
    flipped = sum(pair["kind"] == "flipped" for pair in report["near_duplicates"])
    copies = len(report["near_duplicates"])
    out_console.print(f"{len(report['duplicates'])} sets of files show the same pixels.")
    out_console.print(f"{copies} pairs show the same picture in other pixels, {flipped} of them mirrored.")
    out_console.print(f"{len(report['mosaics'])} pictures are mosaics.")
    out_console.print(f"{len(report['leaks'])} groups lie in several of the sources' own splits.")
    for rate in report["leak_rates"]:
        if rate["also_in_train"]:
            leaked = f"{rate['also_in_train']} of {rate['images']} {rate['split']} images are also in train"
            out_console.print(f"  {rate['source']}: {leaked}", markup=False)


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


@app.command(rich_help_panel=DATA)
def build(
    out: Annotated[Path, typer.Option(help="The dataset folder to write.")],
    sources: Annotated[Path | None, typer.Argument(help="A sources file.")] = None,
    preset: Preset = None,
    data: Data = None,
    seed: Seed = None,
    workers: Workers = 2,
    strict: Annotated[bool, typer.Option(help="Stop on any error instead of leaving out what it concerns.")] = False,
    gallery: Annotated[int, typer.Option(min=0, help="How many images gallery.html shows at most; 0: no page.")] = 200,
    as_json: AsJson = False,
) -> None:
    """Build the VQA dataset folder: questions and answers that the annotations carry, split by group.

    Example: `dentalgemma build sources.yaml --out data/vqa`

    Example: `dentalgemma build --preset dentalgemma_vqa --data downloads --out data/vqa`

    Example: `dentalgemma build --preset opg_detection --preset opg_classification --data downloads --out data/opg`
    """
    from data_builders.vqa import build_vqa

    loaded = _load(sources, preset, data)
    if all(source.reader == "cases" for source in loaded.sources):
        raise InputError(f"{loaded.path} holds clinical cases, no images; build them with `dentalgemma build-instruct`")
    report = build_vqa(loaded, out, seed=seed, workers=workers, strict=strict, gallery=gallery, progress=not as_json)
    _print_build(report, out, as_json=as_json)


@app.command(rich_help_panel=DATA)
def check(
    dataset: Annotated[Path, typer.Argument(help="A VQA dataset folder.")],
    as_json: AsJson = False,
) -> None:
    """Prove every row of a dataset folder again: its claims against the annotations, its words against its claims.

    Needs nothing but the folder, also one that was pulled from the Hub. Exit code 1 if any row fails.

    Example: `dentalgemma check data/vqa`
    """
    from rich.progress import track

    from data_builders.proof import check_dataset

    rows = _count_rows(dataset)
    checking = check_dataset(dataset)  # which refuses what is no dataset before there is a bar
    results = list(track(checking, "Checking", total=rows, console=error_console, disable=as_json))
    wrong = {row_id: found for row_id, found in results if found}
    if as_json:
        print_json({"rows": len(results), "wrong": wrong})
    else:
        for row_id, found in list(wrong.items())[:20]:
            error_console.print(f"{row_id}: {'; '.join(found)}", markup=False, soft_wrap=True)
        out_console.print(f"{len(results)} rows checked, {len(wrong)} of them wrong.")
    raise typer.Exit(1 if wrong else 0)


def _count_rows(dataset: Path) -> int:
    import pyarrow
    import pyarrow.parquet as pq

    rows = 0
    for path in sorted({*dataset.glob("*.parquet"), *dataset.glob("data/**/*.parquet")}):
        try:
            rows += pq.read_metadata(path).num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{path} is no complete parquet file ({error}); build or download it again") from None
    return rows


@app.command("build-instruct", rich_help_panel=DATA)
def build_instruct(
    out: Annotated[Path, typer.Option(help="The dataset folder to write.")],
    sources: Annotated[Path | None, typer.Argument(help="A sources file with sources of `reader: cases`.")] = None,
    preset: Preset = None,
    data: Data = None,
    seed: Seed = None,
    strict: Annotated[bool, typer.Option(help="Stop on any error instead of leaving out what it concerns.")] = False,
    as_json: AsJson = False,
) -> None:
    """Build the instruct dataset folder from clinical cases in JSONL, JSON lists or parquet.

    A prompt that names the condition it asks for is reported and repaired: `diagnosis_in_prompt` of its source says
    how, `drop` unless stated.

    Example: `dentalgemma build-instruct cases.yaml --out data/instruct`

    Example: `dentalgemma build-instruct --preset dentalgemma_instruct --data downloads --out data/instruct`
    """
    from data_builders.instruct import build_instruct as run_build

    report = run_build(_load(sources, preset, data), out, seed=seed, strict=strict)
    _print_build(report, out, as_json=as_json)


def _load(sources: Path | None, preset: list[str] | None, data: Path | None) -> SourcesFile:
    """The sources file that a command is to build from: the user's own, or a preset."""
    from data_builders.presets import load_preset
    from data_builders.sources import load_sources

    if (sources is None) == (not preset):
        raise InputError("name either a sources file, or a --preset with --data; `--preset list` shows the presets")
    if sources is not None:
        return load_sources(sources)
    if data is None:
        raise InputError(f"--preset {' --preset '.join(preset or ())} needs --data, the folder with the downloads")
    return load_preset(preset or (), data)


def _print_build(report: dict, out: Path, *, as_json: bool) -> None:
    if as_json:
        print_json(report)
        return
    for split, counts in report["splits"].items():
        images = f" on {counts['images']} images" if counts.get("images") else ""
        out_console.print(f"{split}: {counts['rows']} rows{images}")
    for source in report["sources"]:
        if not source.get("rows", source.get("cases")):
            out_console.print(f"[yellow]source {source['name']} gave no rows", soft_wrap=True)
    for split in report.get("empty_splits", ()):
        out_console.print(f"[yellow]split {split} is empty: there are too few groups", soft_wrap=True)
    if "problems" in report:
        _print_problems(Problem(**problem) for problem in report["problems"])
    else:
        for code, count in report["problem_counts"].items():
            out_console.print(f"  {count} x {code}")
        if report["problem_counts"]:
            out_console.print("`dentalgemma audit` shows each problem with file and line.")
    out_console.print(f"Wrote {out}", soft_wrap=True)


@app.command("build-probe", rich_help_panel=DATA)
def build_probe(
    dataset: Annotated[Path, typer.Argument(help="A dataset folder.")],
    out: Annotated[Path, typer.Option(help="The questions file (JSONL) to write; images go to a folder beside it.")],
    split: Annotated[str, typer.Option(help="The split to ask about.")] = "test",
    language: Annotated[list[str] | None, typer.Option(help="en, es; may be given twice, for pairs.")] = None,
    question_type: Annotated[
        list[str] | None, typer.Option(help="diagnosis, location, screening (is there any disease); all else.")
    ] = None,
    modality: Annotated[list[str] | None, typer.Option(help="Only images of this kind; may be repeated.")] = None,
    finding: Annotated[list[str] | None, typer.Option(help="Only questions on this finding; may be repeated.")] = None,
    per_finding: Annotated[int | None, typer.Option(min=1, help="At most so many questions on a finding.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many lines; pairs stay whole.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the options and their order.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Make closed questions with four options from a held-out split.

    Example: `dentalgemma build-probe data/vqa --split test --out probe.jsonl --language en --language es`
    """
    from data_builders.probes import QUESTION_TYPES
    from data_builders.probes import build_probe as run_build

    number = run_build(
        dataset,
        split,
        out,
        languages=tuple(language or ["en"]),
        seed=seed,
        question_types=tuple(question_type or QUESTION_TYPES),
        modalities=modality or None,
        findings=finding or None,
        per_finding=per_finding,
        limit=limit,
    )
    tell_written(out, f"Wrote {number} questions to {out}", as_json=as_json, questions=number)


@app.command("export-yolo", rich_help_panel=DATA)
def export_yolo(
    sources: Annotated[Path, typer.Argument(help="A sources file.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    task: Annotated[
        Literal["detect", "segment", "obb"], typer.Option(help="Boxes, outlines, or oriented boxes.")
    ] = "detect",
    classes: Annotated[
        Literal["label", "tooth"], typer.Option(help="Classes are what was found, or the tooth it was found on.")
    ] = "label",
    seed: Seed = None,
    workers: Workers = 2,
    as_json: AsJson = False,
) -> None:
    """Write the sources as a dataset that Ultralytics trains a detector on, split by group.

    What a detector found (`origin: model`) is never exported: it is no truth to train another one on.

    Example: `dentalgemma export-yolo sources.yaml --out data/yolo --task obb`
    """
    from data_builders.audit import describe_problem
    from data_builders.sources import load_sources
    from data_builders.yolo_export import export_yolo as run_export

    loaded = load_sources(sources)
    report, problems = run_export(
        loaded, out, task=task, classes=classes, seed=seed, workers=workers, progress=not as_json
    )
    if as_json:
        listed = [describe_problem(problem) for problem in problems]
        print_json({**report, "problems": listed})
        return
    for split, counts in report["splits"].items():
        without = f", {counts['negatives']} of them without any" if counts["negatives"] else ""
        out_console.print(f"{split}: {counts['findings']} findings on {counts['images']} images{without}")
    for split in report["empty_splits"]:
        out_console.print(f"[yellow]split {split} is empty: there are too few groups", soft_wrap=True)
    _print_problems(problems)
    out_console.print(f"Wrote {out}; train with data={out / 'data.yaml'}", soft_wrap=True)


@app.command(rich_help_panel=DATA)
def detect(
    weights: Annotated[Path, typer.Argument(help="A trained Ultralytics model (.pt): a pickle, so one you trust.")],
    images: Annotated[Path, typer.Argument(help="A folder of images that nobody labelled.")],
    out: Annotated[Path, typer.Option(help="The folder to write; a started one is completed.")],
    confidence: Annotated[float, typer.Option(min=0, max=1, help="Boxes below it are left out.")] = 0.25,
    modality: Annotated[Modality | None, typer.Option(help="What the images are, for the sources file.")] = None,
    model_license: Annotated[str | None, typer.Option(help="Licence of the weights, to be noted beside.")] = None,
    as_json: AsJson = False,
) -> None:
    """Look for findings with a trained detector; its boxes become a source of `origin: model`.

    Needs `pip install "dentalgemma[yolo]"`. Ultralytics and the models it publishes are under AGPL-3.0, which asks more
    of you than this toolkit's own licence.

    Example: `dentalgemma detect best.pt unlabelled --out detected --confidence 0.25 --model-license AGPL-3.0`
    """
    from data_builders.yolo_detect import detect as run_detect

    with redirect_stdout(sys.stderr):  # what Ultralytics prints
        found = run_detect(
            weights,
            images,
            out,
            confidence=confidence,
            modality=modality,
            model_license=model_license,
            progress=not as_json,
        )
    if as_json:
        from data_builders.audit import describe_problem

        figures = {"boxes": found.boxes, "images": found.images, "done_before": found.done_before}
        listed = [describe_problem(problem) for problem in found.problems]
        print_json({"wrote": str(out), **figures, "problems": listed})
        return
    _print_problems(found.problems)
    before = f"; {found.done_before} images were done before" if found.done_before else ""
    out_console.print(f"{found.boxes} boxes on {found.images} images{before}", soft_wrap=True)
    out_console.print(f"Say in {out / 'sources.yaml'} what each class means, then build from it", soft_wrap=True)


def _print_problems(problems: Iterable[Problem]) -> None:
    counts: Counter[str] = Counter()
    for problem in problems:
        counts[problem.code] += 1
        if counts[problem.code] <= SHOWN_PER_CODE:
            out_console.print(f"  {problem.severity}: {problem}", markup=False, highlight=False, soft_wrap=True)
    for code, count in counts.items():
        if count > SHOWN_PER_CODE:
            out_console.print(f"  … {count} problems of the kind {code}")


@app.command(rich_help_panel=TRAINING, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def doctor(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="A stage's YAML; options of its recipe may follow.")],
    gpu: Annotated[str | None, typer.Option(help="The GPU that will train: t4, l4, a10g, a100, h100, …")] = None,
    gpus: Annotated[int | None, typer.Option(help="How many of them; else as accelerate has it.")] = None,
    accelerate: Annotated[Path | None, typer.Option(help="The accelerate configuration of the run.")] = None,
    throughput: Annotated[float | None, typer.Option(min=1e-6, help="Rows per second, where it is known.")] = None,
    first_loss: Annotated[bool, typer.Option(help="Measure the first loss, if the weights are here.")] = True,
    rehearse: Annotated[bool, typer.Option(help="Also run the recipe for a few steps on a small model.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check a training run before it costs money: rows, labels, memory, time, disk. Exits with 2 if it would be wasted.

    Example: `dentalgemma doctor recipes/stage1_vqa.yaml --gpu l4 --dataset_name data/vqa --rehearse`
    """
    with redirect_stdout(sys.stderr):  # see `merge`
        from dentalgemma.training.doctor import diagnose

        found = diagnose(
            config,
            context.args,
            gpu=gpu,
            gpus=gpus,
            accelerate=accelerate,
            throughput=throughput,
            first_loss=first_loss,
        )
        if rehearse:
            from dentalgemma.training.dry_run import add_rehearsal

            add_rehearsal(found, config, context.args)
    if as_json:
        print_json(found.as_json())
    else:
        from dentalgemma.training.doctor_page import print_page

        print_page(found.as_json(), out_console)
    if not found.sound:
        raise typer.Exit(2)


@app.command(rich_help_panel=TRAINING)
def merge(
    run: Annotated[str, typer.Argument(help="A run folder with an adapter, a checkpoint, or an adapter's Hub id.")],
    out: Annotated[Path, typer.Option(help="The model folder to write.")],
    base: Annotated[str | None, typer.Option(help="The base, where the adapter does not name the right one.")] = None,
    dtype: Annotated[
        str, typer.Option(help="What the merged weights are cast to: bfloat16, float16; float32 loses nothing.")
    ] = "bfloat16",
    rows: Annotated[
        str | None, typer.Option(help="The dataset whose validation rows adapter and merged model must answer alike.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fold an adapter and those before it into their base, once, and write a model folder with its certificate.

    Every tensor is read again and compared, and the folder must answer as the adapters did. Exit code 1 if a check
    fails: such a folder gets no card and is not pushed.

    Example: `dentalgemma merge runs/stage1_vqa --out models/stage1_vqa --rows data/vqa`
    """
    with redirect_stdout(sys.stderr):  # DeepSpeed, where it is installed, logs to stdout when it is imported
        from dentalgemma.merging import merge_adapter

        certificate = merge_adapter(run, out, base=base, dtype=dtype, rows=rows)
    if as_json:
        print_json(certificate)
        return
    update = certificate["rounding"]
    changed = f"{certificate['changed_tensors']} of {certificate['tensors']} tensors changed"
    parity = f"logits differ by at most {certificate['max_logit_difference']:.1e} in fp32"
    cast = f"{certificate['reloaded_max_logit_difference']:.1e} after the cast to {dtype}"
    out_console.print(f"Wrote {out}: {changed}; {parity}, {cast}, on {certificate['parity_inputs']}", soft_wrap=True)
    out_console.print(
        f"The cast: error {update['relative_error']:.1%} of the update, cosine {update['cosine']:.4f}, "
        f"{update['unchanged_share']:.1%} of its entries without effect",
        soft_wrap=True,
    )
    adapter = certificate["adapter"]
    stacked = "all stages as one LoRA adapter, rank {rank}: adapter/" if "rank" in adapter else "No adapter: {left_out}"
    out_console.print(stacked.format(**adapter), soft_wrap=True, markup=False, highlight=False)
    for warning in certificate["warnings"]:
        out_console.print(f"[yellow]{warning}", soft_wrap=True)


app.add_typer(evaluation_app)
app.add_typer(publishing_app)
app.add_typer(trying_app)
app.add_typer(rehearsing_app)


def main() -> None:
    """Run the command; what a user can mend is one sentence and its exit code, a failure of ours a traceback and 1.

    Ctrl-C ends it with 130, as a shell has it; recipes, which save before they stop, with 75.
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal that is not UTF-8 gets a "?" instead of a traceback
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    # Where bitsandbytes is installed, it tells everybody without a GPU of a kernel that only 4-bit models would use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app(prog_name="dentalgemma")
    except InputError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("stopped", 130)
    except OSError as error:
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}", 2)


def _fail(message: str, exit_code: int) -> NoReturn:
    error_console.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(exit_code)
