"""What a push did, or a dry run found, for a person to read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dentalgemma.publishing.remote import printable


@contextmanager
def progress_bar(what: str, total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar over bytes, with the time left, on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown, transient=True) as bars:
        task = bars.add_task(what, total=total)
        yield lambda size: bars.advance(task, size)


def print_report(report: dict, console: Console) -> None:
    """Show a push or a dry run to a person: files, sizes, licence, visibility, and what changed or would."""
    remote = report.get("remote") or {}
    marks = {path: name for name in ("new", "changed", "unchanged") for path in remote.get(name, ())}
    table = Table("file", "bytes", *(["on the Hub"] if marks else []), box=None)
    table.columns[1].justify = "right"
    for file in report["files"]:
        mark = [marks.get(file["path"], "")] if marks else []
        table.add_row(escape(printable(file["path"])), f"{file['size']:,}", *mark)
    console.print(table)
    for line in _list_facts(report, remote):
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


def _list_facts(report: dict, remote: dict) -> Iterator[str]:
    number = len(report["files"])
    yield f"{number} file{'s' * (number != 1)}, {report['bytes']:,} bytes; {report['kind']}, {report['visibility']}"
    yield f"Licence: {report['verdict']}"
    if report["one_configuration_per_source"]:
        yield "No one licence fits all of its sources: one configuration for each source, under its own terms"
    for warning in report["warnings"]:
        yield f"Warning: {warning}"
    if report.get("opens_history"):
        yield "Warning: what was private in this repository becomes public with it: earlier commits and kept files"
    if report["left_here"]:
        yield f"Left here: {', '.join(report['left_here'])}"
    if remote.get("deleted"):
        yield f"{'To be deleted' if report['dry_run'] else 'Deleted'} there: {', '.join(remote['deleted'])}"
    if remote.get("kept"):
        yield f"There and not here, and kept: {', '.join(remote['kept'])}"
    if report["dry_run"]:
        yield from _list_prospects(report)
        return
    yield f"{report['url']}: {'committed as' if report['committed'] else 'already there at'} {report['commit']}"
    if report["tag"]:
        yield f"Tag: {report['tag']}"
    if report["read_back"]:
        yield "Every file was read back and is the same"


def _list_prospects(report: dict) -> Iterator[str]:
    if report["remote"] is None:
        yield f"What is at {report['url']} is not known: {report['remote_unknown']}"
    elif not report["remote"]["exists"]:
        yield f"{report['url']} would be created"
    elif not any(report["remote"][name] for name in ("new", "changed", "deleted")):
        yield f"{report['url']} has all of it already, at {report['remote']['commit']}"
    else:
        yield f"{report['url']} would get one commit on top of {report['remote']['commit']}"
    yield "Dry run: nothing was sent"
