"""The commands that ask, judge, score, compare, decide and report. Each file they write is the next one's input."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dentalgemma.cli_output import AsJson, out_console, print_json, tell_written
from dentalgemma.evaluation.files import EvaluationError, read_text, without_folder, write_json

if TYPE_CHECKING:
    from dentalgemma.evaluation.scoring import Run

app = typer.Typer(rich_markup_mode="markdown")
PANEL = "Evaluation"

Questions = Annotated[Path, typer.Option(help="The questions that were asked (JSONL).")]
Verdicts = Annotated[
    list[Path] | None,
    typer.Option(help="A judge's verdicts on the open answers; once for each predictions file, in their order."),
]
Names = Annotated[
    list[str] | None, typer.Option("--name", help="What to call a model; once for each predictions file, in order.")
]
Draws = Annotated[int, typer.Option(min=100, help="Resamples of the bootstrap.")]
Seed = Annotated[int, typer.Option(help="Seed of the bootstrap.")]


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
    none = "none"


class Api(StrEnum):
    openai = "openai"
    anthropic = "anthropic"


class LogFormat(StrEnum):
    auto = "auto"
    vlmevalkit = "vlmevalkit"
    lmms_eval = "lmms_eval"
    lm_eval = "lm_eval"
    inspect = "inspect"


class Match(StrEnum):
    auto = "auto"
    index = "index"
    question = "question"


class Kind(StrEnum):
    closed = "closed"
    open = "open"


class Protocol(StrEnum):
    seed = "seed"
    strict = "strict"
    official = "official"


@app.command("import-questions", rich_help_panel=PANEL)
def import_questions(
    out: Annotated[Path, typer.Option(help="The questions file (JSONL) to write; images go to a folder beside it.")],
    files: Annotated[list[Path] | None, typer.Argument(help="The TSV files of MMOral-Bench, closed, open or both.")] = (
        None
    ),
    repo: Annotated[str | None, typer.Option(help="Instead of files: the Hub id of the data set.")] = None,
    revision: Annotated[str | None, typer.Option(help="The commit of the Hub data set, 40 hexadecimal digits.")] = None,
    allow_other_md5: Annotated[bool, typer.Option(help="Take files that are not the published ones.")] = False,
    as_json: AsJson = False,
) -> None:
    """Turn MMOral-Bench, closed and open, into one questions file. Other questions: any JSONL in that form.

    Example: `dentalgemma import-questions MMOral_closed.tsv MMOral_open.tsv --out mmoral.jsonl`
    """
    from dentalgemma.evaluation.mmoral import download
    from dentalgemma.evaluation.mmoral import import_questions as run_import

    if bool(files) == bool(repo) or bool(repo) != bool(revision):
        raise EvaluationError("give either TSV files, or --repo with --revision")
    paths = files or download(repo, revision, out.with_name(f"{out.stem}_download"))
    summary = run_import(paths, out, allow_other_md5=allow_other_md5)
    if as_json:
        print_json(summary)
        return
    typer.echo(f"Wrote {summary['closed']} closed and {summary['open']} open questions on {summary['images']} images")
    if summary["closed"]:
        typer.echo(
            f"{summary['empty_options']} closed ones have an empty option, {summary['unanswerable']} as the right "
            f"one: nobody can reach more than {summary['ceiling']:.2%}"
        )
    for file in summary["files"]:
        if not file["recognised"]:
            typer.echo(f"{file['name']} is not the published file: its MD5 is {file['md5']}")


@app.command(rich_help_panel=PANEL)
def evaluate(
    context: typer.Context,
    questions: Annotated[Path, typer.Argument(help="Questions, closed and open ones, as JSONL.")],
    model: Annotated[str, typer.Option(help="A model folder or Hub id; with --server the server's name for it.")],
    out: Annotated[Path, typer.Option(help="The predictions (JSONL) to write; a started file is completed.")],
    mode: Annotated[Mode, typer.Option(help="Let the model write, or rank the options by likelihood.")] = Mode.generate,
    images: Annotated[
        Images, typer.Option(help="The true images, or a control: blank, another patient's, none at all.")
    ] = Images.true,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions at a time.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer to a closed question.")] = 64,
    max_new_tokens_open: Annotated[int, typer.Option(min=1, help="Longest answer to an open question.")] = 512,
    dtype: Annotated[Dtype, typer.Option(help="Precision of the weights; auto takes that of the files.")] = Dtype.auto,
    revision: Annotated[str | None, typer.Option(help="Revision of a Hub model.")] = None,
    server: Annotated[
        str | None, typer.Option(help="Ask an OpenAI-compatible server at this URL, such as vLLM's, instead.")
    ] = None,
    api: Annotated[Api, typer.Option(help="How the server is spoken to.")] = Api.openai,
    key_variable: Annotated[
        str | None, typer.Option(help="Environment variable that holds the server's key, if it wants one.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Requests at a time to a server.")] = 4,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that a server may take for an answer.")] = 120,
    hardware: Annotated[str | None, typer.Option(help="The server's hardware, for the record.")] = None,
    stretch: Annotated[
        int | None,
        typer.Option(min=1, help="Stretch pictures to a square of so many pixels, for llama.cpp: 896 for MedGemma."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Ask a model questions and keep its answers; what is answered already is not asked again.

    Example: `dentalgemma evaluate probe.jsonl --model models/stage1_vqa --out tuned.jsonl --mode loglikelihood`

    Example: `dentalgemma evaluate probe.jsonl --server http://localhost:8000/v1 --model gemma --out gemma.jsonl`
    """
    from dentalgemma.evaluation.questions import check_images, load_questions

    here = ("batch_size", "dtype", "revision")
    there = ("api", "key_variable", "workers", "timeout", "hardware", "stretch")
    _refuse_given(context, here if server else there, "is for models loaded here" if server else "needs --server")
    items = load_questions(questions)
    if images == Images.none and stretch:
        raise EvaluationError("--stretch is about pictures, and --images none shows none: leave one of them out")
    if images != Images.none:
        check_images(items)  # before a model is loaded for minutes
    lengths = {"max_new_tokens": max_new_tokens, "max_new_tokens_open": max_new_tokens_open}
    if server:
        from dentalgemma.evaluation.endpoints import open_endpoint
        from dentalgemma.evaluation.server import ask_server

        with open_endpoint(server, model, api=api.value, key_variable=key_variable, timeout=timeout) as endpoint:
            ask_server(
                endpoint,
                items,
                out=out,
                mode=mode.value,
                images=images.value,
                workers=workers,
                hardware=hardware,
                stretch=stretch,
                **lengths,
            )
    else:
        _evaluate_here(
            items,
            model,
            dtype,
            revision,
            out=out,
            mode=mode.value,
            images=images.value,
            batch_size=batch_size,
            **lengths,
        )
    tell_written(out, f"Wrote {out}", as_json=as_json, questions=len(items))


def _evaluate_here(items: Sequence, model: str, dtype: Dtype, revision: str | None, **settings: object) -> None:
    import torch

    from dentalgemma.evaluation.generation import evaluate_questions
    from dentalgemma.models.loading import load_pretrained

    loaded, processor = load_pretrained(
        model, dtype="auto" if dtype == Dtype.auto else getattr(torch, dtype.value), revision=revision
    )
    if torch.accelerator.is_available():
        loaded.to(torch.accelerator.current_accelerator())
    # Without its folder: the name goes into predictions, scores and reports, which are published.
    evaluate_questions(loaded, processor, items, model_name=without_folder(model), **settings)


def _refuse_given(context: typer.Context, names: Sequence[str], why: str) -> None:
    """Refuse options that were typed and would do nothing."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise EvaluationError(f"--{name.replace('_', '-')} {why}")


@app.command("import-predictions", rich_help_panel=PANEL)
def import_predictions(
    logs: Annotated[
        list[Path],
        typer.Argument(help="Result files or logs of one model, by VLMEvalKit, lmms-eval, lm_eval, inspect."),
    ],
    questions: Questions,
    out: Annotated[Path, typer.Option(help="The predictions (JSONL) to write.")],
    log_format: Annotated[
        LogFormat, typer.Option("--format", help="Which tool wrote it, where the file does not tell.")
    ] = LogFormat.auto,
    model: Annotated[str | None, typer.Option(help="The model's name, where the log does not tell.")] = None,
    match: Annotated[
        Match, typer.Option(help="Find the question by the log's own index, or by the words of question and options.")
    ] = Match.auto,
    epoch: Annotated[
        int | None, typer.Option(min=1, help="Of answers that were repeated, the one to take, from 1.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Turn a run of another tool into predictions, so that it is scored, compared and reported like our own.

    It takes what the model wrote, never the letter that the tool read in it.

    Example: `dentalgemma import-predictions gpt-4o_MMOral.xlsx --questions mmoral.jsonl --out gpt-4o.jsonl`
    """
    from dentalgemma.evaluation.importers import format_import
    from dentalgemma.evaluation.importers import import_predictions as run_import

    summary = run_import(logs, questions, out, format=log_format.value, model=model, match=match.value, epoch=epoch)
    if as_json:
        print_json(summary)
    else:
        typer.echo(format_import(summary))


@app.command(rich_help_panel=PANEL)
def judge(
    context: typer.Context,
    predictions: Annotated[Path, typer.Argument(help="Predictions with answers to open questions.")],
    questions: Questions,
    out: Annotated[Path, typer.Option(help="The verdicts (JSONL) to write; a started file is completed.")],
    model: Annotated[str, typer.Option(help="The judge: the endpoint's name for it, or with --local a model folder.")],
    server: Annotated[str | None, typer.Option(help="URL of the endpoint; the vendor's own where left out.")] = None,
    api: Annotated[Api, typer.Option(help="How the endpoint is spoken to.")] = Api.openai,
    local: Annotated[bool, typer.Option("--local", help="Judge on this machine, with a model folder or Hub id.")] = (
        False
    ),
    key_variable: Annotated[
        str | None, typer.Option(help="Environment variable that holds the key, if not the vendor's usual one.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="A folder of replies to reuse, for this run and others.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 4,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that the endpoint may take for a verdict.")] = 120,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest reply; a judge that reasons needs more.")] = 1024,
    input_price: Annotated[float | None, typer.Option(min=0, help="US dollars per million input tokens.")] = None,
    output_price: Annotated[float | None, typer.Option(min=0, help="US dollars per million output tokens.")] = None,
    as_json: AsJson = False,
) -> None:
    """Let a judge read the open answers: right or wrong against the reference, with its cost and time.

    A verdict that cannot be read is an error, never a wrong answer; run again, and just those are asked for.
    OPENAI_API_KEY and ANTHROPIC_API_KEY go to their vendors alone; for another server name the variable.

    Example: `dentalgemma judge tuned.jsonl --questions mmoral.jsonl --api anthropic --model claude-sonnet-4-5
    --out verdicts.jsonl --cache judge_cache --input-price 3 --output-price 15`
    """
    from dentalgemma.evaluation.judge import format_summary, judge_answers

    if local:
        remote = ("server", "api", "key_variable", "workers", "timeout")
        _refuse_given(context, remote, "is for a judge elsewhere, not for --local")
    if (input_price is None) != (output_price is None):
        raise EvaluationError("a price has two parts: give both --input-price and --output-price")
    price = None
    if input_price is not None:
        price = {"input_per_million": input_price, "output_per_million": output_price}
    with _open_judge(model, server, api, local=local, key_variable=key_variable, timeout=timeout) as asked:
        summary = judge_answers(
            predictions,
            questions,
            judge=asked,
            out=out,
            cache=cache,
            workers=1 if local else workers,
            price=price,
            max_tokens=max_tokens,
        )
    if as_json:
        print_json(summary)
    else:
        typer.echo(format_summary(summary))
    if summary["judge_errors"]:
        raise typer.Exit(1)


def _open_judge(
    model: str, server: str | None, api: Api, *, local: bool, key_variable: str | None, timeout: float
) -> AbstractContextManager:
    if not local:
        from dentalgemma.evaluation.endpoints import open_endpoint

        return open_endpoint(server, model, api=api.value, key_variable=key_variable, timeout=timeout)
    import torch

    from dentalgemma.evaluation.judge import LocalJudge
    from dentalgemma.models.loading import load_pretrained

    loaded, processor = load_pretrained(model, dtype="auto")
    if torch.accelerator.is_available():
        loaded.to(torch.accelerator.current_accelerator())
    return nullcontext(LocalJudge(loaded, processor, name=without_folder(model)))


@app.command("judge-sample", rich_help_panel=PANEL)
def judge_sample(
    verdicts: Annotated[Path, typer.Argument(help="What `judge` wrote.")],
    predictions: Annotated[Path, typer.Argument(help="The predictions that were judged.")],
    questions: Questions,
    out: Annotated[Path, typer.Option(help="The CSV to write; `judge-agreement` reads it when filled in.")],
    size: Annotated[int, typer.Option(min=1, help="Answers to draw.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Draw judged answers for a person to judge blindly.

    Example: `dentalgemma judge-sample verdicts.jsonl tuned.jsonl --questions mmoral.jsonl --out for_a_dentist.csv`
    """
    from dentalgemma.evaluation.agreement import write_audit_sample
    from dentalgemma.evaluation.judge import read_verdicts

    number = write_audit_sample(read_verdicts(verdicts), predictions, questions, out=out, n=size, seed=seed)
    sentence = f"Wrote {number} answers to {out}: fill in the column verdict"
    tell_written(out, sentence, as_json=as_json, answers=number)


@app.command("judge-agreement", rich_help_panel=PANEL)
def judge_agreement(
    verdicts: Annotated[Path, typer.Argument(help="What `judge` wrote.")],
    human: Annotated[Path, typer.Argument(help="A person's verdicts on the same answers (CSV or JSONL).")],
    out: Annotated[Path | None, typer.Option(help="Write the figures to this file instead, for `report`.")] = None,
) -> None:
    """How far the judge agrees with a person: Cohen's kappa with its interval, as JSON.

    Example: `dentalgemma judge-agreement verdicts.jsonl for_a_dentist.csv --out agreement.json`
    """
    from data_builders.dataset_folder import hash_file
    from dentalgemma.evaluation.agreement import agreement
    from dentalgemma.evaluation.judge import read_verdicts

    figures = agreement(read_verdicts(verdicts), human)
    _show(figures | {"verdicts_sha256": hash_file(verdicts)}, out)


@app.command(rich_help_panel=PANEL)
def score(
    predictions: Annotated[Path, typer.Argument(help="What `evaluate` or `import-predictions` wrote.")],
    questions: Questions,
    verdicts: Annotated[Path | None, typer.Option(help="A judge's verdicts on the open answers.")] = None,
    protocol: Annotated[Protocol, typer.Option(help="How a letter is read from an answer.")] = Protocol.seed,
    name: Annotated[str | None, typer.Option(help="What to call the model; the file's name else.")] = None,
    draws: Draws = 1_000,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Write the scores to this file instead.")] = None,
) -> None:
    """Accuracy with intervals, bounds, categories, clinical figures and latency, as JSON.

    Example: `dentalgemma score tuned.jsonl --questions probe.jsonl --out scores.json`
    """
    from dentalgemma.evaluation.scoring import read_run, score_run

    run = read_run(predictions, questions, verdicts=verdicts, protocol=protocol.value, name=name)
    scores = score_run(run, draws=draws, seed=seed)
    for warning in scores["warnings"]:
        typer.echo(f"note: {warning}", err=True)
    _show(scores, out)


@app.command(rich_help_panel=PANEL)
def compare(
    predictions: Annotated[list[Path], typer.Argument(help="Predictions on the same questions; the first is before.")],
    questions: Questions,
    verdicts: Verdicts = None,
    names: Names = None,
    protocol: Annotated[Protocol, typer.Option(help="How a letter is read from an answer.")] = Protocol.seed,
    draws: Draws = 1_000,
    seed: Seed = 0,
    fail_if_worse: Annotated[
        bool, typer.Option("--fail-if-worse", help="Exit with 1 where the last is worse than the first.")
    ] = False,
    margin: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="With --fail-if-worse: 0 asks for a significant loss (exact McNemar p < 0.05); 0.02 fails unless the "
            "interval of the difference, by image, excludes a loss of more than 2 points.",
        ),
    ] = 0.0,
    as_json: AsJson = False,
    out: Annotated[Path | None, typer.Option(help="Also write the comparison (JSON) to this file.")] = None,
) -> None:
    """Models on the same questions: differences with intervals, exact McNemar tests, Holm over all pairs.

    Exit codes: 0, or with --fail-if-worse 1 where the last model is worse than the first, and 2 for bad input.

    Example: `dentalgemma compare base.jsonl tuned.jsonl --questions probe.jsonl --fail-if-worse`
    """
    from dentalgemma.evaluation.scoring import compare_all, compare_runs, format_comparison, is_worse

    if len(predictions) < 2:
        raise EvaluationError("a comparison takes two predictions files or more")
    runs = _read_runs(predictions, questions, verdicts, names, protocol)
    first_to_last = compare_runs(runs[0], runs[-1], draws=draws, seed=seed)
    result = first_to_last if len(runs) == 2 else compare_all(runs, draws=draws, seed=seed)
    if out:
        write_json(out, result)
    if as_json:
        print_json(result)
    else:
        typer.echo(format_comparison(result))
    if fail_if_worse:
        reasons = [
            is_worse(first_to_last, kind=kind, margin=margin) for kind in ("closed", "open") if first_to_last[kind]
        ]
        for reason in filter(None, reasons):
            typer.echo(f"worse: {reason}", err=True)
        if any(reasons):
            raise typer.Exit(1)


@app.command(rich_help_panel=PANEL)
def gate(
    predictions: Annotated[list[Path], typer.Argument(help="Predictions of base, stage 1, stage 2, … in this order.")],
    questions: Questions,
    names: Names = None,
    margin: Annotated[float, typer.Option(min=0, max=1, help="Loss of accuracy that is let pass.")] = 0.0,
    as_json: AsJson = False,
    out: Annotated[Path | None, typer.Option(help="Also write the gate (JSON) to this file.")] = None,
) -> None:
    """What each stage learned and forgot, per category; exits with 1 where the last lost significantly.

    Recipes do the same while training, when asked: `--gate_questions probe.jsonl`.

    Example: `dentalgemma gate base.jsonl stage1.jsonl stage2.jsonl --questions probe.jsonl`
    """
    from dentalgemma.evaluation.gates import format_gate, gate_runs

    result = gate_runs(_read_runs(predictions, questions, None, names, Protocol.seed), margin=margin)
    if out:
        write_json(out, result)
    if as_json:
        print_json(result)
    else:
        typer.echo(format_gate(result))
    if not result["passed"]:
        raise typer.Exit(1)


@app.command(rich_help_panel=PANEL)
def plan(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN.yaml", help="The plan, as examples/ shows one.")],
    out: Annotated[Path, typer.Option(help="The locked plan (JSON) to write; a lock is never overwritten.")],
    as_json: AsJson = False,
) -> None:
    """Write and lock a pre-registration: weights, mappings, tests, tie rule, veto. Publish its hash at once.

    Example: `dentalgemma plan plan.yaml --out plan.lock.json`
    """
    from dentalgemma.evaluation.plan import write_plan

    lock = write_plan(plan_file, out)
    if as_json:
        print_json({"wrote": str(out), "locked_at": lock["locked_at"], "plan_sha256": lock["plan_sha256"]})
        return
    out_console.print(f"Locked {out} at {lock['locked_at']}", soft_wrap=True)
    out_console.print(f"SHA-256 {lock['plan_sha256']}", soft_wrap=True, highlight=False)
    out_console.print("Publish this hash before the first answer: a clock of one's own proves nothing to others.")


@app.command(rich_help_panel=PANEL)
def decide(
    locked: Annotated[Path, typer.Argument(metavar="PLAN.lock.json", help="What `plan` wrote.")],
    scores: Annotated[
        list[str], typer.Option(help="candidate=scores.json, once for each candidate, as the plan names it.")
    ],
    out: Annotated[Path, typer.Option(help="The decision (JSON) to write; the same in Markdown goes beside it.")],
    declared: Annotated[Path | None, typer.Option(help="Grades given after the lock (YAML); they are noted.")] = None,
    comparison: Annotated[
        list[Path] | None, typer.Option(help="The paired tests, as `compare --out` writes them; names as in the plan.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Apply a locked plan to scores: each rule with its input and outcome.

    Example: `dentalgemma decide plan.lock.json --scores base=base.json --scores tuned=tuned.json --out decision.json`
    """
    from dentalgemma.evaluation.decision import decide as run_decide

    paths = {}
    for part in scores:
        name, equals, path = part.rpartition("=")
        if not (equals and name and path) or name in paths:
            raise EvaluationError(f"--scores {part}: expected candidate=scores.json, each candidate once")
        paths[name] = Path(path)
    result = run_decide(locked, paths, out=out, declared=declared, comparisons=comparison or ())
    if as_json:
        print_json(result)
    else:
        typer.echo(out.with_suffix(".md").read_text(encoding="utf-8"))


@app.command(rich_help_panel=PANEL)
def contamination(
    questions: Annotated[Path, typer.Argument(help="The questions (JSONL), with their images.")],
    dataset: Annotated[list[Path], typer.Argument(help="Dataset folders that a model was trained on.")],
    out: Annotated[Path | None, typer.Option(help="Also write the result (JSON), for `report` and `card`.")] = None,
    fail_if_found: Annotated[
        bool, typer.Option("--fail-if-found", help="Exit with 1 where a question was in training data.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Look for the questions' images and texts in training data: the same pixels, copies, mirrored ones, mosaics.

    Example: `dentalgemma contamination mmoral.jsonl data/vqa data/instruct --out contamination.json`
    """
    from dentalgemma.evaluation.contamination import check_contamination, format_contamination

    results = [check_contamination(questions, folder, progress=not as_json) for folder in dataset]
    document = results[0] if len(results) == 1 else results
    if out:
        write_json(out, document)
    if as_json:
        print_json(document)
    else:
        typer.echo("\n".join(map(format_contamination, results)))
    if fail_if_found and not all(result["clean"] for result in results):
        raise typer.Exit(1)


@app.command(rich_help_panel=PANEL)
def report(
    predictions: Annotated[list[Path], typer.Argument(help="Predictions on the same questions; the first is before.")],
    questions: Questions,
    out: Annotated[Path, typer.Option(help="The page (.html) to write; .md and .json go beside it.")],
    verdicts: Verdicts = None,
    names: Names = None,
    decision: Annotated[Path | None, typer.Option(help="What `decide` wrote.")] = None,
    contamination: Annotated[Path | None, typer.Option(help="What `contamination` wrote.")] = None,
    agreement: Annotated[Path | None, typer.Option(help="What `judge-agreement` wrote.")] = None,
    gate: Annotated[Path | None, typer.Option(help="What `gate` or a recipe wrote.")] = None,
    title: Annotated[str, typer.Option(help="The page's title.")] = "Evaluation",
    flips: Annotated[int, typer.Option(min=0, help="Answers that changed, shown for each kind.")] = 24,
    protocol: Annotated[Protocol, typer.Option(help="How a letter is read from an answer.")] = Protocol.seed,
    draws: Draws = 1_000,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """One self-contained page: decision, accuracies, pairs, bounds, flips, clinical figures, latency, hashes.

    Example: `dentalgemma report base.jsonl tuned.jsonl --questions probe.jsonl --out report.html`
    """
    from dentalgemma.evaluation.report import write_report
    from dentalgemma.evaluation.scoring import compare_all, score_run

    runs = _read_runs(predictions, questions, verdicts, names, protocol)
    comparable = runs[0].asked("closed") or all(run.verdicts for run in runs)  # else the page says what is missing
    write_report(
        runs,
        out,
        scores=[score_run(run, draws=draws, seed=seed) for run in runs],
        comparisons=compare_all(runs, draws=draws, seed=seed) if len(runs) > 1 and comparable else (),
        decision=_read_document(decision, "decision/1"),
        contamination=_read_document(contamination, "contamination/1", many=True),
        judge_agreement=_read_document(agreement, "agreement/1"),
        gate=_read_document(gate, "gate/1"),
        # Without folders: a report is published, and they may name people and machines.
        commands=[shlex.join(["dentalgemma", *map(without_folder, sys.argv[1:])])],
        title=title,
        flips=flips,
    )
    tell_written(out, f"Open {out}", as_json=as_json)


@app.command("export-results", rich_help_panel=PANEL)
def export_results(
    scores: Annotated[Path, typer.Argument(help="What `score` wrote.")],
    folder: Annotated[Path, typer.Argument(help="The model folder; the file goes to its `.eval_results`.")],
    dataset_id: Annotated[str, typer.Option(help="Hub id of the benchmark.")],
    task_id: Annotated[str, typer.Option(help="The task's name in the benchmark.")],
    revision: Annotated[str | None, typer.Option(help="Commit of the benchmark.")] = None,
    kind: Annotated[Kind, typer.Option(help="Which of the scores.")] = Kind.closed,
    protocol: Annotated[
        Protocol, typer.Option(help="How letters were read; a leaderboard compares official ones.")
    ] = Protocol.official,
    as_json: AsJson = False,
) -> None:
    """Write scores as the Hub's `.eval_results/*.yaml`, so that they show on the model's page and in leaderboards.

    Example: `dentalgemma export-results scores.json models/dentalgemma --dataset-id OralGPT/MMOral-OPG-Bench
    --task-id closed`
    """
    from dentalgemma.evaluation.results import write_eval_results

    document = _read_document(scores, "scores/1")
    written = write_eval_results(
        folder,
        document,
        dataset_id=dataset_id,
        task_id=task_id,
        revision=revision,
        kind=kind.value,
        protocol=protocol.value,
    )
    tell_written(written, f"Wrote {written}", as_json=as_json)


def _read_runs(
    predictions: Sequence[Path],
    questions: Path,
    verdicts: Sequence[Path] | None,
    names: Sequence[str] | None,
    protocol: Protocol,
) -> list[Run]:
    from dentalgemma.evaluation.scoring import read_run

    for option, values in (("--verdicts", verdicts), ("--name", names)):
        if values and len(values) != len(predictions):
            raise EvaluationError(
                f"{option} is given {len(values)} times for {len(predictions)} predictions files: give it once for each"
            )
    names = list(names) if names else [path.stem for path in predictions]
    if len(set(names)) < len(names):
        raise EvaluationError("two predictions files have the same name; tell them apart with --name, once for each")
    judged = verdicts or [None] * len(predictions)
    return [
        read_run(path, questions, verdicts=own, protocol=protocol.value, name=name)
        for path, own, name in zip(predictions, judged, names, strict=True)
    ]


def _read_document(path: Path | None, kind: str, *, many: bool = False) -> dict | list | None:
    """Read what another command wrote; `kind` is the format that it names, `many` admits a list of them."""
    if path is None:
        return None
    try:
        document = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{path}: no JSON document: {error}") from None
    for part in document if many and isinstance(document, list) else [document]:
        found = part.get("format") if isinstance(part, dict) else None
        if found != kind:
            raise EvaluationError(f"{path} is {found or 'no document of ours'}, not {kind}")
    return document


def _show(document: dict, out: Path | None) -> None:
    if out:
        write_json(out, document)
        out_console.print(f"Wrote {out}", soft_wrap=True)
    else:
        print_json(document)
