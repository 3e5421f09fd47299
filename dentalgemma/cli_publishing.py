"""The commands that make a merged model ready for others: its card, its 4-bit copy, the Hub."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from dentalgemma.cli_output import AsJson, out_console, print_json, tell_written

app = typer.Typer(rich_markup_mode="markdown")

PANEL = "Publishing"


@app.command(rich_help_panel=PANEL)
def card(
    model: Annotated[Path, typer.Argument(help="A merged model folder.")],
    comparison: Annotated[Path | None, typer.Option(help="Base and this model: what `compare --json` printed.")] = None,
    base: Annotated[str | None, typer.Option(help="Hub id of the base, where training started from a folder.")] = None,
    scores: Annotated[
        Path | None, typer.Option(help="This model's scores, as `score` wrote them; also the card's model-index.")
    ] = None,
    benchmark: Annotated[str | None, typer.Option(help="What the questions of these scores are called.")] = None,
    contamination: Annotated[Path | None, typer.Option(help="What `contamination` wrote.")] = None,
    decision: Annotated[Path | None, typer.Option(help="What `decide` wrote.")] = None,
    quantized_from: Annotated[
        str | None,
        typer.Option(help="Of a 4-bit copy: the repository on the Hub of the merged model that it was made from."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the model card from recorded facts: run facts, merge certificate, evaluation. Nothing is typed by hand.

    Example: `dentalgemma card models/stage2_instruct --comparison comparison.json --scores scores.json`
    """
    from dentalgemma.publishing.cards import write_model_card

    written = write_model_card(
        model,
        comparison,
        base=base,
        scores=scores,
        contamination=contamination,
        decision=decision,
        benchmark=benchmark,
        quantized_from=quantized_from,
    )
    tell_written(written, f"Wrote {written}", as_json=as_json)


@app.command(rich_help_panel=PANEL)
def push(
    folder: Annotated[Path, typer.Argument(help="A merged model, a dataset folder, or what `space` wrote.")],
    repo: Annotated[str, typer.Argument(help="The repository on the Hub: owner/name.")],
    public: Annotated[bool, typer.Option("--public", help="Let everybody see it; private otherwise.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list what would be uploaded; no more.")] = False,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="Of a merged model: its adapter, for PEFT, instead of the weights.")
    ] = False,
    tag: Annotated[str | None, typer.Option(help="A tag for this release, such as v1.0.")] = None,
    permission: Annotated[
        list[str] | None,
        typer.Option(help="A source without a stated licence whose owner agreed; once for each source."),
    ] = None,
    open_history: Annotated[
        bool,
        typer.Option(
            "--open-history", help="With `--public`: also show what a private repository held before, unchecked."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check a folder and publish it on the Hub in one commit, privately unless `--public`; then read it back.

    The token is that of `hf auth login`, or of the environment variable HF_TOKEN. What is there already is not sent
    again; an interrupted push goes on where it stopped.

    Example: `dentalgemma push models/dentalgemma me/dentalgemma --dry-run`

    Example: `dentalgemma push data/vqa me/dental-vqa --public --tag v1.0`
    """
    from dentalgemma.publishing.hub import push as run_push
    from dentalgemma.publishing.push_report import print_report

    report = run_push(
        folder,
        repo,
        public=public,
        dry_run=dry_run,
        adapter_only=adapter_only,
        tag=tag,
        permissions=tuple(permission or ()),
        open_history=open_history,
        progress=not as_json,
    )
    if as_json:
        print_json(report)
    else:
        print_report(report, out_console)


@app.command(rich_help_panel=PANEL)
def quantize(
    model: Annotated[Path, typer.Argument(help="A merged model folder.")],
    out: Annotated[Path, typer.Option(help="The model folder to write.")],
    rows: Annotated[
        str | None, typer.Option(help="The dataset whose validation rows both models must answer alike.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a 4-bit copy (bitsandbytes NF4) of a merged model, and into its certificate how alike the two answer.

    Needs `pip install "dentalgemma[bnb]"`.

    Example: `dentalgemma quantize models/dentalgemma --out models/dentalgemma-nf4 --rows data/vqa`
    """
    with redirect_stdout(sys.stderr):  # as `merge` does
        from dentalgemma.quantizing import quantize_model

        certificate = quantize_model(model, out, rows=rows)
    if as_json:
        print_json(certificate)
        return
    found = certificate["quantization"]
    alike = f"{found['same_token_share']:.1%} of the most likely tokens are the same"
    out_console.print(f"Wrote {out}: {alike}, on {found['parity_inputs']}", soft_wrap=True)
    for warning in certificate["warnings"]:
        out_console.print(warning, style="yellow", markup=False, soft_wrap=True)
