"""The commands that let a person try a model: in the terminal, on a page, in a Space."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dentalgemma.cli_output import AsJson, tell_written

app = typer.Typer(rich_markup_mode="markdown")

PANEL = "Trying a model"
Revision = Annotated[str | None, typer.Option(help="Commit or tag of a model on the Hub.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")]


@app.command(rich_help_panel=PANEL)
def ask(
    model: Annotated[str, typer.Argument(help="A model folder, a run folder with an adapter, or a Hub id.")],
    image: Annotated[str, typer.Argument(help="An image file, or `none` for a question without one.")],
    question: Annotated[str, typer.Argument(help="The question; `-` reads it from standard input.")],
    revision: Revision = None,
    max_new_tokens: MaxNewTokens = 300,
) -> None:
    """Ask a model one question; the answer appears as it is made. Research and education only, no diagnosis.

    Example: `dentalgemma ask models/dentalgemma panoramic.jpg "What abnormalities are visible, and where?"`
    """
    from dentalgemma.answering import ask as run_ask

    run_ask(model, image, question, revision=revision, max_new_tokens=max_new_tokens)


@app.command(rich_help_panel=PANEL)
def demo(
    model: Annotated[str, typer.Argument(help="A model folder, a run folder with an adapter, or a Hub id.")],
    base: Annotated[str | None, typer.Option(help="Another model to answer beside it, such as its base.")] = None,
    revision: Revision = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines reach the page.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 7860,
) -> None:
    """Open a page to try a model on. Pictures stay in memory and are never stored or logged.

    Needs `pip install "dentalgemma[demo]"`.

    Example: `dentalgemma demo models/dentalgemma --base google/medgemma-1.5-4b-it`
    """
    from dentalgemma.app import run_demo

    run_demo(model, base=base, revision=revision, host=host, port=port)


@app.command(rich_help_panel=PANEL)
def space(
    folder: Annotated[Path, typer.Argument(help="The folder to write; then `dentalgemma push` publishes it.")],
    model: Annotated[str, typer.Option(help="Hub id of the model that the page shows.")],
    base: Annotated[str | None, typer.Option(help="Hub id of a model to answer beside it.")] = None,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Write the demo page as a Space for the Hub: app.py, requirements.txt and its card.

    Example: `dentalgemma space space --model me/dentalgemma && dentalgemma push space me/dentalgemma-demo`
    """
    from dentalgemma.publishing.space import write_space

    written = write_space(folder, model, base=base, revision=revision)
    tell_written(written, f"Wrote {written}", as_json=as_json)
