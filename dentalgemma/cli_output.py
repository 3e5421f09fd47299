"""What all commands share: where they print, and how another program reads them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from data_builders.records import InputError

out_console = Console()
error_console = Console(stderr=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for another program.")]


def print_json(document: dict | list) -> None:
    """Print one JSON document; where the terminal is not UTF-8, in ASCII, so that no character is lost."""
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "")
    # Half a surrogate pair, which models do write, is spelt out: no UTF-8 holds it.
    text = json.dumps(document, indent=2, ensure_ascii=False)
    if encoding != "utf8" or any("\ud800" <= letter <= "\udfff" for letter in text):
        text = json.dumps(document, indent=2)
    typer.echo(text)


def tell_written(path: Path, sentence: str, *, as_json: bool, **figures: object) -> None:
    """The last line of a command that writes something: a sentence, or with `--json` the path and its figures."""
    if as_json:
        print_json({"wrote": str(path), **figures})
    else:
        out_console.print(sentence, markup=False, soft_wrap=True)


def need_empty(folder: Path) -> None:
    """Refuse to write into a folder that somebody uses."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise InputError(f"{folder} is not empty; choose a new folder")
