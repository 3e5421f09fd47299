"""A benchmark of MMOral-Bench's shape, made up: its size, its columns, its categories, and its holes."""

from __future__ import annotations

import base64
import csv
import io
import random
from pathlib import Path

import numpy as np
from PIL import Image

CATEGORIES = ("Teeth", "Patho", "HisT", "Jaw", "SumRec")
FINDINGS = (
    "Dental caries", "Periapical abscess", "Impacted third molar", "Periodontal bone loss", "Root canal filling",
    "Dental implant", "Retained root", "Odontogenic cyst", "Crown restoration", "None", "Missing premolar",
)  # fmt: skip


def write_benchmark(
    folder: Path, *, images: int = 100, closed: int = 491, open_: int = 578, empty: int = 38, empty_gold: int = 32
) -> tuple[Path, Path]:
    """Write `closed.tsv` and `open.tsv`; of the `empty` items with an empty option, `empty_gold` have it as the key."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [_picture(number) for number in range(images)]
    rng = random.Random(0)
    rows = []
    for number in range(closed):
        options = rng.sample(FINDINGS, 4)
        answer = rng.randrange(4)
        if number < empty:
            options[answer if number < empty_gold else (answer + 1) % 4] = ""
        question = f"Question {number}: which finding is visible in region {number % 4 + 1}?"
        category = ",".join(rng.sample(CATEGORIES, 1 + (number % 10 == 0)))
        rows.append([number, pictures[number % images], question, *options, "ABCD"[answer], category])
    _write_tsv(folder / "closed.tsv", ["index", "image", "question", *"ABCD", "answer", "category"], rows)
    rows = []
    for number in range(open_):
        question = f"Question {number}: describe what is seen in region {number % 4 + 1}."
        answer = f"{rng.choice(FINDINGS)} in the {rng.choice(('right', 'left'))} mandible."
        category = rng.choice((*CATEGORIES, "Report"))
        rows.append([number, pictures[number % images], question, answer, category])
    _write_tsv(folder / "open.tsv", ["index", "image", "question", "answer", "category"], rows)
    return folder / "closed.tsv", folder / "open.tsv"


def _picture(number: int) -> str:
    """A small picture that no other one resembles, as the base64 of a PNG."""
    grey = np.random.default_rng(number).integers(0, 256, size=(6, 12), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(grey).resize((192, 96), Image.Resampling.BICUBIC).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _write_tsv(path: Path, header: list[str], rows: list[list]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerows([header, *rows])
