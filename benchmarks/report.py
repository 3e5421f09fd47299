"""One form for the figures of all benchmarks, and the table of them in the README.

python benchmarks/report.py            # writes the table anew from results/*.json
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
KEYS = ("benchmark", "command", "date", "hardware", "versions", "results")
BEGIN, END = "<!-- results: made by report.py -->", "<!-- end of results -->"
HEADER = ("benchmark", "measures", "last figures", "command", "hardware", "date")


def make_report(
    benchmark: str, results: Mapping, *, measures: str, headline: str, packages: Iterable[str], hardware: str = ""
) -> dict:
    """The figures of a run: `measures` and `headline` are what the table says of it."""
    return {
        "benchmark": benchmark,
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "hardware": hardware or describe_cpu(),
        "versions": {"python": platform.python_version()} | _installed(packages),
        "results": {"measures": measures, "headline": headline, **results},
    }


def write_report(report: Mapping, *, out: Path | None, as_json: bool) -> None:
    """To a file, to be read by another program, or for a person: the figures in a line."""
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    print(text if as_json else report["results"]["headline"])


def describe_cpu() -> str:
    """How many cores of which kind: names of machines say little, and would not be the reader's."""
    machine = {"x86_64": "x86-64", "AMD64": "x86-64"}.get(platform.machine(), platform.machine())
    return f"{os.cpu_count()} CPU cores ({machine})"


def make_table(folder: Path = RESULTS) -> str:
    """All that was measured, a line for each file of results, in the order of the names."""
    rows = [HEADER, ("---",) * len(HEADER)]
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        found = report["results"]
        name = f"[`{report['benchmark']}`]({path.relative_to(folder.parent).as_posix()})"
        rows.append(
            (name, found["measures"], found["headline"], f"`{report['command']}`", report["hardware"], report["date"])
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def put_table(text: str, table: str) -> str:
    """`text` with `table` between the two marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def _installed(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    readme = FOLDER / "README.md"
    readme.write_text(put_table(readme.read_text(encoding="utf-8"), make_table()), encoding="utf-8")
