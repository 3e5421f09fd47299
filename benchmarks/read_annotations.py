"""How fast annotations are read and checked, beside what nobody can do without and what other libraries take.

    python benchmarks/read_annotations.py --out benchmarks/results/read_annotations.json --check
    python benchmarks/read_annotations.py --peers-python /path/to/a/venv/bin/python

Writes a made-up set, reads it in every layout, each time in a new process with all modules imported before the clock
starts and the files in the page cache, and prints medians. Seconds are those of the processor (user and system), which
other work on the machine disturbs least; those of the wall are in the JSON file. Memory is the growth of the peak
(`VmHWM`, elsewhere `ru_maxrss`) over its value with the same modules imported. The floor is `json.load`, or a loop
that opens each label file, splits its lines and makes numbers of the fields, and keeps them.

`--check` fails unless reading and validating takes at most 2.5 times the floor, sizes of images apart; a size at most
0.1 ms; memory at most twice that of `json.load`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median

from report import make_report, write_report
from rich.console import Console
from rich.table import Table

CONTENDERS = Path(__file__).with_name("contenders.py")
PEERS = {
    "yolo_boxes": ("globox", "supervision", "ultralytics"),
    "yolo_segments": ("ultralytics",),
    "yolo_obb": ("supervision", "ultralytics"),
    "dota": (),
    "coco_boxes": ("pycocotools", "globox", "supervision"),
    "coco_polygons": ("pycocotools",),
    "via1": (),
    "via2": (),
}
IMAGES = ("images", "png", "real_size")
REMARKS = {
    "globox": "boxes alone; opens each image of YOLO, none of COCO",
    "supervision": "opens each image of YOLO, none of COCO; outlines become masks, so it is left out there",
    "ultralytics": "the check of its training; opens and verifies each image",
    "pycocotools": "loads and indexes; checks nothing, opens no image",
    "ours": "checks everything, opens the header of each image but for YOLO",
}
ANNOTATION_HEADER = ["layout", "reader", "annotations", "seconds", "of them sizes", "× floor", "MB", "× floor"]
SIZE_HEADER = ["images", "read by", "ms each"]
PACKAGES = ("numpy", "pillow", "pydantic", "shapely")
LIMIT_SIZE_MS = 0.1
LONGEST = 1800  # seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--objects", type=int, default=120_000)
    parser.add_argument("--repeat", type=int, default=5, help="readings of ours and the floor, in turns; of peers one")
    parser.add_argument("--peers-python", default=sys.executable, help="the Python that has the other libraries")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--limit", type=float, default=2.5, help="times the floor that `--check` allows")
    parser.add_argument("--memory-limit", type=float, default=2.0, help="times the memory of json.load that it allows")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a limit is not kept")
    parser.add_argument("--json", action="store_true", help="print JSON for another program")
    parser.add_argument("--out", type=Path, help="where to write all figures as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own: what writes the set would count in the memory of those that read it.
        code = f"from annotation_set import *; write_annotation_set(Path({folder!r}) / 'set', images={options.images}, "
        code += f"objects={options.objects})"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=CONTENDERS.parent)
        figures = run_all(Path(folder) / "set", options)
    broken = find_broken_limits(figures, options.limit, options.memory_limit)
    results = {
        "settings": {"images": options.images, "objects": options.objects, "repeat": options.repeat},
        "remarks": REMARKS,
        "figures": figures,
        "limits_not_kept": broken,
    }
    report = make_report(
        "read_annotations",
        results,
        measures="reading and checking annotations in eight layouts, beside a bare loop over them and other libraries",
        headline=describe(results),
        packages=PACKAGES,
    )
    report["versions"] |= peer_versions(figures)
    if not options.json:
        print_tables(figures)
    write_report(report, out=options.out, as_json=options.json)
    if options.out:
        write_markdown(options.out.with_suffix(".md"), report)
    for line in broken:
        print(line, file=sys.stderr)
    sys.exit(1 if options.check and broken else 0)


def describe(results: Mapping) -> str:
    """The figures in a line."""
    figures, settings = results["figures"], results["settings"]
    ratios = [annotation_ratio(figures[layout]) for layout in PEERS]
    seconds = [figures[layout]["ours"]["cpu_seconds"] for layout in PEERS]
    return (
        f"{settings['objects']:,} annotations of {settings['images']:,} images in {min(seconds):.1f} to "
        f"{max(seconds):.1f} s of processor time, {min(ratios):.1f} to {max(ratios):.1f} times the floor"
    )


def run_all(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, dict]]:
    """The medians by layout and contender; a peer that could not be run has its reason in their place."""
    figures: dict[str, dict[str, dict]] = {}
    for layout, peers in PEERS.items():
        figures[layout] = run_in_turns(("floor", "ours"), layout, folder, options.repeat)
        for peer in () if options.no_peers else peers:
            figures[layout][peer] = run(peer, layout, folder, python=options.peers_python)
    for layout in IMAGES:
        figures[layout] = run_in_turns(("read_size", "Pillow"), layout, folder, options.repeat)
    return figures


def run_in_turns(contenders: tuple[str, ...], layout: str, folder: Path, repeat: int) -> dict[str, dict]:
    """Medians of readings in turns, so that a busy moment of the machine hits all alike."""
    rounds = [{name: run(name, layout, folder) for name in contenders} for _ in range(repeat)]
    return {
        name: {key: median(turn[name][key] for turn in rounds) for key in rounds[0][name] if key != "version"}
        for name in contenders
    }


def run(contender: str, layout: str, folder: Path, *, python: str = sys.executable) -> dict:
    command = [python, str(CONTENDERS), contender, layout, str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST)
    except subprocess.TimeoutExpired:
        return {"not_run": f"took over {LONGEST} s"}
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["killed"])[-1]
        if contender in REMARKS and contender != "ours":
            return {"not_run": reason}
        sys.exit(f"{contender} on {layout} failed: {done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def annotation_ratio(figures: dict[str, dict]) -> float:
    """Times the floor that reading and validating takes, apart from the sizes of the images."""
    ours = figures["ours"]
    return (ours["cpu_seconds"] - ours["size_seconds"]) / figures["floor"]["cpu_seconds"]


def milliseconds_each(figures: dict) -> float:
    return figures["cpu_seconds"] / figures["count"] * 1000


def find_broken_limits(figures: dict[str, dict[str, dict]], limit: float, memory_limit: float) -> list[str]:
    broken = []
    for layout in PEERS:
        ratio = annotation_ratio(figures[layout])
        if ratio > limit:
            broken.append(f"{layout}: {ratio:.2f} times the floor, at most {limit} are due")
        memory = figures[layout]["ours"]["memory_mb"] / figures[layout]["floor"]["memory_mb"]
        if layout.startswith(("coco", "via")) and memory > memory_limit:
            broken.append(f"{layout}: {memory:.2f} times the memory of json.load, at most {memory_limit} are due")
    for layout in IMAGES:
        each = milliseconds_each(figures[layout]["read_size"])
        if each > LIMIT_SIZE_MS:
            broken.append(f"{layout}: {each:.3f} ms for the size of an image, at most {LIMIT_SIZE_MS} are due")
    return broken


def peer_versions(figures: dict[str, dict[str, dict]]) -> dict[str, str]:
    return {
        name: facts["version"] for layout in figures.values() for name, facts in layout.items() if "version" in facts
    }


def annotation_rows(figures: dict[str, dict[str, dict]]) -> list[list[str]]:
    rows = []
    for layout in PEERS:
        floor = figures[layout]["floor"]
        for name, facts in figures[layout].items():
            if "not_run" in facts:
                rows.append([layout, name, f"not run: {facts['not_run']}", "", "", "", "", ""])
                continue
            sizes = facts.get("size_seconds", 0.0)
            rows.append(
                [
                    layout,
                    name,
                    f"{facts['count']:,.0f}",
                    f"{facts['cpu_seconds']:.2f}",
                    f"{sizes:.2f}" if sizes else "",
                    f"{(facts['cpu_seconds'] - sizes) / floor['cpu_seconds']:.2f}",
                    f"{facts['memory_mb']:.0f}",
                    f"{facts['memory_mb'] / floor['memory_mb']:.2f}",
                ]
            )
    return rows


def size_rows(figures: dict[str, dict[str, dict]]) -> list[list[str]]:
    return [
        [layout, name, f"{milliseconds_each(facts):.4f}"]
        for layout in IMAGES
        for name, facts in figures[layout].items()
    ]


def print_tables(figures: dict[str, dict[str, dict]]) -> None:
    console = Console(width=110)
    for header, rows in ((ANNOTATION_HEADER, annotation_rows(figures)), (SIZE_HEADER, size_rows(figures))):
        table = Table(*header)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for name, remark in REMARKS.items():
        console.print(f"{name}: {remark}")


def write_markdown(path: Path, report: dict) -> None:
    results, settings = report["results"], report["results"]["settings"]
    figures = results["figures"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"{settings['images']:,} images, {settings['objects']:,} annotations; medians of {settings['repeat']} readings,"
        f" of other libraries one. {report['hardware']}, {versions}. Seconds of the processor; `× floor` leaves out the"
        " time for the sizes of images.",
        "",
    ]
    for header, rows in ((ANNOTATION_HEADER, annotation_rows(figures)), (SIZE_HEADER, size_rows(figures))):
        lines += ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]] + [""]
    lines += [f"- {name}: {remark}" for name, remark in results["remarks"].items()]
    lines += ["", "Limits that are not kept:", ""] + [f"- {line}" for line in results["limits_not_kept"] or ["none"]]
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
