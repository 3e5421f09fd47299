"""Where the time of `dentalgemma build` goes, and how much memory it takes.

    python benchmarks/build_dataset.py --images 4000 --out benchmarks/results/build_dataset.json

Draws phantoms of the size of real panoramics, builds a dataset from them in a process of its own, and prints the time
of each part beside two floors on the same files: reading their bytes, and decoding them with Pillow alone, with as
many workers. The bytes of every image are read twice, since its split is known only when all are decoded and nothing
is held in memory until then: once to decode it, once to store it.
"""

from __future__ import annotations

import argparse
import functools
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from contenders import peak_memory
from PIL import Image
from report import make_report, write_report

import data_builders.audit as audit
import data_builders.vqa as builder
from data_builders.phantom_formats import write_phantoms
from data_builders.sources import load_sources

PARTS = {  # where the builder looks each one up
    (builder, "read_sources"): "read annotations, decode images",
    (audit, "compare"): "find near duplicates and mosaics",
    (builder, "_with_groups"): "group",
    (builder, "_compose_all"): "compose and prove",
    (builder, "choose_rows"): "balance",
    (builder, "write_rows"): "write parquet",
    (builder, "write_jsonl"): "write records",
    (builder, "write_gallery"): "write gallery",
    (builder, "write_vqa_card"): "write card",
    (builder, "write_report"): "hash files",
}


def write_set(folder: Path, *, images: int, width: int, per_image: int, seed: int) -> None:
    """Phantoms with YOLO boxes, enlarged to `width` pixels with a grain as fine as that of a real radiograph."""
    write_phantoms(folder, count=images, seed=seed, formats=("yolo",))
    paths = sorted((folder / "yolo" / "images").iterdir())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_enlarge, paths, [width] * images, range(images)))
    sources = folder / "sources.yaml"
    sources.write_text(f"questions: {{per_image: {per_image}}}\n" + sources.read_text())


def _enlarge(path: Path, width: int, seed: int) -> None:
    with Image.open(path) as image:
        large = np.asarray(image.resize((width, width // 2), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = np.random.default_rng(seed).normal(0, 4, large.shape).astype(np.int16)
    Image.fromarray((large + grain).clip(0, 255).astype(np.uint8)).save(path, quality=90)


def measure_build(folder: Path, workers: int) -> dict:
    """Build once and return the seconds of each part, rows, images and the peak of memory."""
    seconds: Counter[str] = Counter()
    peaks: dict[str, float] = {}
    inside: list[float] = [0.0]  # seconds of the parts inside those that are running

    def timed(name: str, part: Callable) -> Callable:
        @functools.wraps(part)
        def run(*args, **options):
            inside.append(0.0)
            start = time.perf_counter()
            try:
                return part(*args, **options)
            finally:
                elapsed = time.perf_counter() - start
                seconds[name] += elapsed - inside.pop()
                inside[-1] += elapsed
                peaks[name] = peak_memory()

        return run

    for (module, function), name in PARTS.items():
        setattr(module, function, timed(name, getattr(module, function)))
    before = peak_memory()
    start = time.perf_counter()
    report = builder.build_vqa(load_sources(folder / "sources.yaml"), folder / "built", workers=workers, progress=False)
    total = time.perf_counter() - start
    splits = report["splits"].values()
    return {
        "rows": sum(split["rows"] for split in splits),
        "images": sum(split["images"] for split in splits),
        "image_mb": sum(split["image_bytes"] for split in splits) / 2**20,
        "seconds": dict(seconds),
        "peak_mb_until_then": peaks,
        "other": total - sum(seconds.values()),
        "total": total,
        "peak_mb": peak_memory(),
        "peak_mb_before": before,
    }


def measure_floor(paths: Iterable[Path], read: Callable[[Path], object], workers: int) -> float:
    """Seconds to do `read` with every file and nothing else."""
    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(read, paths):
            pass
    return time.perf_counter() - start


def _decode(path: Path) -> None:
    with Image.open(path) as image:
        image.convert("RGB")


def main() -> None:
    """Write a set, measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--width", type=int, default=1200, help="pixels; the height is half of it")
    parser.add_argument("--per-image", type=int, default=4, help="questions drawn for each image, before balancing")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print JSON for another program")
    parser.add_argument("--out", type=Path, help="where to write all figures as JSON")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "set"
        write_set(folder, images=asked.images, width=asked.width, per_image=asked.per_image, seed=asked.seed)
        paths = sorted((folder / "yolo" / "images").iterdir())
        floors = {"read bytes": measure_floor(paths, Path.read_bytes, asked.workers)}
        floors["decode with Pillow"] = measure_floor(paths, _decode, asked.workers)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            built = pool.submit(measure_build, folder, asked.workers).result()
    if not asked.json:
        print_result(built, floors)
    results = {
        "settings": {key: value for key, value in vars(asked).items() if key not in ("out", "json")},
        "built": built,
        "floors": floors,
    }
    report = make_report(
        "build_dataset",
        results,
        measures="where the time of `dentalgemma build` goes",
        headline=describe(results),
        packages=("pillow", "pyarrow", "datasets"),
    )
    write_report(report, out=asked.out, as_json=asked.json)


def describe(results: Mapping[str, Mapping]) -> str:
    """The figures in a line."""
    built = results["built"]
    return (
        f"{built['rows']:,} rows on {built['images']:,} images ({built['image_mb']:,.0f} MB) in {built['total']:.0f} s "
        f"with {results['settings']['workers']} workers, at most {built['peak_mb']:,.0f} MB of memory; decoding the "
        f"images alone takes {results['floors']['decode with Pillow']:.1f} s"
    )


def print_result(built: dict, floors: dict[str, float]) -> None:
    """The parts in the order of their time, with the peak of memory when each ended; then the floors."""
    print(f"{built['rows']:,} rows on {built['images']:,} images ({built['image_mb']:,.0f} MB)")
    for part, seconds in sorted({**built["seconds"], "other": built["other"]}.items(), key=lambda item: -item[1]):
        peak = f"{built['peak_mb_until_then'][part]:8,.0f} MB" if part in built["peak_mb_until_then"] else ""
        print(f"  {part:34} {seconds:8.2f} s {100 * seconds / built['total']:6.1f} % {peak}")
    print(f"  {'total':34} {built['total']:8.2f} s; peak of memory {built['peak_mb']:,.0f} MB", end="")
    print(f", {built['peak_mb_before']:,.0f} MB of it with all modules loaded")
    for floor, seconds in floors.items():
        print(f"  for comparison, {floor:18} {seconds:8.2f} s")


if __name__ == "__main__":
    main()
