"""The commands that need no data and no GPU: the rehearsal, its parts, and what to put into a bug report."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dentalgemma.cli_output import AsJson, need_empty, print_json, tell_written

app = typer.Typer(rich_markup_mode="markdown")

PANEL = "Rehearsing and checking"


class Family(StrEnum):
    gemma3 = "gemma3"
    gemma4 = "gemma4"


@app.command(rich_help_panel=PANEL)
def quickstart(
    out: Annotated[Path, typer.Option(help="The folder to write; it must be new or a quickstart's.")] = Path(
        "quickstart"
    ),
    seed: Annotated[int, typer.Option(help="Seed of phantoms, model and training.")] = 0,
    control: Annotated[bool, typer.Option(help="Also train on shuffled images, which must learn nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """The whole path on a CPU, offline: phantoms, datasets, two stages, merge, evaluation, card and a page.

    Example: `dentalgemma quickstart --out quickstart`
    """
    from dentalgemma.quickstart import run_quickstart

    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        page = run_quickstart(out, seed=seed, control=control)
    tell_written(page, f"Open {page}", as_json=as_json)


@app.command(rich_help_panel=PANEL)
def phantom(
    folder: Annotated[Path, typer.Argument(help="The folder to write.")],
    images: Annotated[int, typer.Option(min=1, help="How many radiographs to draw.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed; every image depends on it and its own number alone.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Draw synthetic panoramics with known truth, written in every annotation format, and as many clinical cases.

    Example: `dentalgemma phantom phantoms --images 200 && dentalgemma build phantoms/sources.yaml --out data/phantoms`
    """
    from data_builders.phantom_formats import write_phantoms

    need_empty(folder)
    write_phantoms(folder, count=images, cases=images, seed=seed, progress=not as_json)
    tell_written(folder, f"Wrote {images} phantoms to {folder}", as_json=as_json, images=images, cases=images)


@app.command("tiny-model", rich_help_panel=PANEL)
def tiny_model(
    folder: Annotated[Path, typer.Argument(help="The model folder to write.")],
    family: Annotated[Family, typer.Option(help="Which architecture.")] = Family.gemma3,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Make a small random model with tokenizer and processor that loads as the real one does, without a network.

    Example: `dentalgemma tiny-model models/tiny`
    """
    from dentalgemma.models.tiny import make_tiny_model

    need_empty(folder)
    with redirect_stdout(sys.stderr):  # libraries may print when they are imported
        make_tiny_model(folder, family=family.value, seed=seed)
    tell_written(folder, f"Wrote a small random {family.value} to {folder}", as_json=as_json, family=family.value)


@app.command(rich_help_panel=PANEL)
def env(as_json: AsJson = False) -> None:
    """Versions and hardware, for a bug report. Prints no secrets, no paths and no names.

    Example: `dentalgemma env`
    """
    from dentalgemma.environment import describe_environment

    facts = describe_environment()
    if as_json:
        print_json(facts)
    else:
        typer.echo("\n".join(f"{key}: {value}" for key, value in facts.items()))
