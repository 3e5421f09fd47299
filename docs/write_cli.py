"""Write `docs/cli.md`, the page on the command line, from the commands themselves: `python docs/write_cli.py`."""

from __future__ import annotations

import enum
import inspect
import re
import types
import typing
from pathlib import Path

import typer

from dentalgemma.cli import app

PAGE = Path(__file__).with_name("cli.md")
HEAD = """\
# Command line

This page is written from the code by `python docs/write_cli.py`; `dentalgemma COMMAND --help` says the same.
`python -m dentalgemma` is the same command. `dentalgemma --install-completion` teaches the shell to complete it.

| exit code | means |
| --- | --- |
| 0 | done |
| 1 | failed, or the gate that was asked for did not hold |
| 2 | wrong use or bad input: one sentence says what to do |
| 75 | training was stopped by a signal, with a complete checkpoint |

With `--json` a command prints one JSON document to the standard output, and everything else to the standard error.
Recipes are scripts with options of their own: [Training](training.md).
"""
EXAMPLE = re.compile(r"^Example: `(?P<line>.+)`$", re.DOTALL)


def write_page() -> str:
    """The whole page; the same bytes for the same commands."""
    panels: dict[str, list[str]] = {}
    for name, command in typer.main.get_command(app).commands.items():
        if not command.hidden:
            panel = command.rich_help_panel
            panels.setdefault(panel if isinstance(panel, str) else "Commands", []).append(_describe(name, command))
    parts = [HEAD, _contents(panels)]
    for panel, commands in panels.items():
        parts += [f"## {panel}\n", *commands]
    return "\n".join(parts)


def _contents(panels: dict[str, list[str]]) -> str:
    rows = ["| | commands |", "| --- | --- |"]
    for panel, commands in panels.items():
        names = [re.match(r"### (\S+)", text)[1] for text in commands]
        rows.append(f"| [{panel}](#{_anchor(panel)}) | " + ", ".join(f"[`{n}`](#{n})" for n in names) + " |")
    return "\n".join(rows) + "\n"


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w]+", "-", heading.lower()).strip("-")


def _describe(name: str, command) -> str:
    paragraphs = [" ".join(part.split()) for part in (command.help or "").split("\n\n")]
    if command.epilog:
        paragraphs += [" ".join(part.split()) for part in command.epilog.split("\n\n")]
    examples = [match["line"] for part in paragraphs if (match := EXAMPLE.match(part))]
    parts = [f"### {name}\n", *(f"{_text(part)}\n" for part in paragraphs if part and not EXAMPLE.match(part))]
    kinds = typing.get_type_hints(inspect.unwrap(command.callback))
    arguments = [p for p in command.params if p.param_type_name == "argument" and not p.hidden]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden and p.name != "help"]
    parts.append(f"```text\n{_usage(name, arguments, options)}\n```\n")
    for title, parameters in (("argument", arguments), ("option", options)):
        if parameters:
            rows = [_row(parameter, kinds.get(parameter.name, str)) for parameter in parameters]
            parts.append("\n".join([f"| {title} | takes | default | |", "| --- | --- | --- | --- |", *rows]) + "\n")
    if examples:
        parts.append("```bash\n" + "\n".join(examples) + "\n```\n")
    return "\n".join(parts)


def _usage(name: str, arguments: list, options: list) -> str:
    shown = [p.name.upper() if p.required else f"[{p.name.upper()}]" for p in arguments]
    shown += [f"{_option(p)} {p.name.upper()}" for p in options if p.required]
    if any(not p.required for p in options):
        shown.append("[OPTIONS]")
    return " ".join(["dentalgemma", name, *shown])


def _option(parameter) -> str:
    return max(parameter.opts, key=len)


def _row(parameter, kind: object) -> str:
    if parameter.param_type_name == "argument":
        name = f"`{parameter.name.upper()}`"
    else:
        # A switch that is on by itself is known by what turns it off.
        shown = [*parameter.opts, *(parameter.secondary_opts if parameter.default is True else [])]
        name = ", ".join(f"`{option}`" for option in shown)
    required = "required" if parameter.required else ""
    return f"| {name} | {_kind(kind)} | {required or _default(parameter.default)} | {_text(parameter.help or '')} |"


def _kind(kind: object) -> str:
    """What a parameter takes, from the type of the function's argument."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return _kind(next(part for part in typing.get_args(kind) if part is not type(None)))
    if typing.get_origin(kind) in (list, tuple):
        return f"{_kind(typing.get_args(kind)[0])}, repeatable"
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(f"`{choice}`" for choice in typing.get_args(kind))
    if inspect.isclass(kind) and issubclass(kind, enum.Enum):
        return " or ".join(f"`{choice.value}`" for choice in kind)
    return {bool: "", Path: "path", int: "whole number", float: "number"}.get(kind, "text")


def _default(value: object) -> str:
    if value is None or value is False or value == [] or value == ():
        return ""
    if value is True:
        return "on"
    return f"`{value.value if isinstance(value, enum.Enum) else value}`"


def _text(text: str) -> str:
    """Help as Markdown: tags and bars are text there, and one paragraph has no line ends."""
    pieces = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(piece if piece.startswith("`") else piece.replace("<", "&lt;") for piece in pieces).replace(
        "|", r"\|"
    )


if __name__ == "__main__":
    PAGE.write_text(write_page(), encoding="utf-8")
    print(f"Wrote {PAGE.name}")
