"""Synthetic panoramic radiographs whose truth is known, for rehearsals and tests. They resemble no patient.

Tooth positions follow the medians measured on 3,605 real boxes; everything is drawn from `(seed, index)` alone, so an
image does not depend on how many others are made.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from data_builders.dentition import PERMANENT, THIRD_MOLARS
from data_builders.records import Finding, Point, Ring

WIDTH, HEIGHT = 448, 224  # panoramics are about twice as wide as high
CONDITIONS = ("caries", "infection", "impacted_tooth", "broken_down_crown_or_root")

# Median distance of positions 1 to 8 from the midline, in fractions of the image width.
OFFSETS = (0.017, 0.049, 0.087, 0.123, 0.163, 0.214, 0.270, 0.316)
TOOTH_WIDTHS = (0.030, 0.028, 0.032, 0.034, 0.036, 0.050, 0.050, 0.044)
CROWN_HEIGHT, ROOT_HEIGHT = 0.11, 0.17
ENAMEL, DENTINE, BONE, AIR, LUCENT = 225, 175, 95, 25, 5
SCALE = 2  # drawn larger, then reduced: smooth edges


@dataclass(frozen=True)
class Tooth:
    """A tooth in the drawing: its FDI number, centre line and the heights (fractions) of crown edge, neck and apex."""

    fdi: str
    x: float
    width: float
    edge: float
    neck: float
    apex: float

    @property
    def ring(self) -> Ring:
        return _box(self.x, (self.edge + self.apex) / 2, self.width, abs(self.apex - self.edge))


@dataclass(frozen=True)
class Phantom:
    """One synthetic radiograph: its pixels (mode L), every erupted tooth, and what is wrong with them."""

    name: str
    image: Image.Image
    teeth: tuple[Finding, ...]
    findings: tuple[Finding, ...]


def make_phantoms(count: int, *, seed: int, start: int = 0) -> Iterator[Phantom]:
    """Yield `count` phantoms from index `start`; each depends on the seed and its own index only."""
    for index in range(start, start + count):
        yield make_phantom(seed, index)


def make_phantom(seed: int, index: int) -> Phantom:
    """Draw one phantom: two arches with some teeth missing, and one or two diseases in about five of six images."""
    rng = random.Random(f"phantom/{seed}/{index}")
    name = f"phantom{index:05d}"
    teeth = _lay_out_teeth(rng)
    drawing = Image.new("L", (WIDTH * SCALE, HEIGHT * SCALE), AIR)
    pen = ImageDraw.Draw(drawing)
    _draw_bone(pen, rng)
    diseased = _choose_diseases(rng, teeth)
    erupted = {fdi: tooth for fdi, tooth in teeth.items() if diseased.get(fdi) != "impacted_tooth"}
    for fdi, tooth in erupted.items():
        _draw_tooth(pen, tooth, broken=diseased.get(fdi) == "broken_down_crown_or_root")
    findings = []
    for number, (fdi, condition) in enumerate(diseased.items(), start=1):
        ring = DRAW[condition](pen, teeth[fdi], rng)
        shape = "oriented_box" if condition == "impacted_tooth" else "box"
        findings.append(Finding(f"{name}#{number}", condition, shape, (ring,), tooth=fdi))
    boxes = tuple(Finding(f"{name}/{fdi}", "tooth", "box", (tooth.ring,), tooth=fdi) for fdi, tooth in erupted.items())
    return Phantom(name, _develop(drawing, rng), boxes, tuple(findings))


def _lay_out_teeth(rng: random.Random) -> dict[str, Tooth]:
    shift, spread, level = rng.uniform(-0.008, 0.008), rng.uniform(0.96, 1.04), rng.uniform(0.48, 0.52)
    missing = set(rng.sample(PERMANENT, rng.choice((0, 0, 1, 2, 3))))
    missing.update(tooth for tooth in THIRD_MOLARS if rng.random() < 0.3)
    teeth = {}
    for fdi in PERMANENT:
        quadrant, position = int(fdi[0]), int(fdi[1])
        away = OFFSETS[position - 1] * spread
        x = 0.5 + shift + (-away if quadrant in (1, 4) else away)
        direction = -1 if quadrant in (1, 2) else 1
        smile = level + 0.05 * (1 - (away / 0.33) ** 2)
        edge = smile + direction * 0.006
        neck = edge + direction * CROWN_HEIGHT * rng.uniform(0.92, 1.08)
        apex = neck + direction * ROOT_HEIGHT * rng.uniform(0.92, 1.08)
        if fdi not in missing:
            teeth[fdi] = Tooth(fdi, x, TOOTH_WIDTHS[position - 1] * rng.uniform(0.92, 1.0), edge, neck, apex)
    return teeth


def _choose_diseases(rng: random.Random, teeth: dict[str, Tooth]) -> dict[str, str]:
    """One disease per tooth, each tooth far from the other, so that no mark covers another."""
    diseased: dict[str, str] = {}
    for _ in range(rng.choice((0, 1, 1, 1, 2, 2))):
        condition = rng.choice(CONDITIONS)
        free = [
            fdi
            for fdi, tooth in teeth.items()
            if (condition != "impacted_tooth" or fdi in THIRD_MOLARS)
            and all(abs(tooth.x - teeth[other].x) > 0.12 for other in diseased)
        ]
        if free:
            diseased[rng.choice(free)] = condition
    return diseased


def _draw_bone(pen: ImageDraw.ImageDraw, rng: random.Random) -> None:
    wide = rng.uniform(0.42, 0.45)
    pen.ellipse(_pixels((0.5 - wide, 0.08), (0.5 + wide, 0.97)), fill=BONE)
    pen.ellipse(_pixels((0.36, -0.06), (0.64, 0.17)), fill=AIR + 25)  # nasal cavity


def _draw_tooth(pen: ImageDraw.ImageDraw, tooth: Tooth, *, broken: bool) -> None:
    half = tooth.width / 2
    root = [(tooth.x - half * 0.8, tooth.neck), (tooth.x + half * 0.8, tooth.neck), (tooth.x, tooth.apex)]
    pen.polygon(_pixels(*root), fill=DENTINE)
    if not broken:
        top, bottom = sorted((tooth.edge, tooth.neck))
        corners = _pixels((tooth.x - half, top), (tooth.x + half, bottom))
        pen.rounded_rectangle(corners, radius=half * WIDTH * SCALE * 0.5, fill=ENAMEL)


def _draw_caries(pen: ImageDraw.ImageDraw, tooth: Tooth, rng: random.Random) -> Ring:
    y = (tooth.edge + tooth.neck) / 2
    pen.ellipse(_pixels((tooth.x - 0.016, y - 0.04), (tooth.x + 0.016, y + 0.04)), fill=LUCENT)
    return _box(tooth.x, y, 0.032, 0.08)


def _draw_infection(pen: ImageDraw.ImageDraw, tooth: Tooth, rng: random.Random) -> Ring:
    radius = rng.uniform(0.024, 0.030)
    corners = _pixels((tooth.x - radius, tooth.apex - 2 * radius), (tooth.x + radius, tooth.apex + 2 * radius))
    pen.ellipse(corners, fill=LUCENT, outline=DENTINE, width=2)
    return _box(tooth.x, tooth.apex, 2 * radius, 4 * radius)


def _draw_impacted(pen: ImageDraw.ImageDraw, tooth: Tooth, rng: random.Random) -> Ring:
    """A third molar lying on its side inside the bone, crown towards the midline."""
    towards_midline = 1 if tooth.x < 0.5 else -1
    tilt = math.radians(rng.uniform(-15, 15))
    x, y = tooth.x - towards_midline * 0.01, tooth.neck

    def turned(along: float, across: float) -> Point:
        """A point given in fractions of the width, along and across the tooth's axis."""
        dx = along * math.cos(tilt) - across * math.sin(tilt)
        dy = along * math.sin(tilt) + across * math.cos(tilt)
        return x + towards_midline * dx, y + dy * WIDTH / HEIGHT

    pen.polygon(_pixels(turned(-0.055, 0), turned(0.005, -0.02), turned(0.005, 0.02)), fill=DENTINE)
    pen.polygon(_pixels(turned(0, -0.024), turned(0.04, -0.024), turned(0.04, 0.024), turned(0, 0.024)), fill=255)
    return tuple(turned(a, b) for a, b in ((-0.055, -0.024), (0.04, -0.024), (0.04, 0.024), (-0.055, 0.024)))


def _draw_broken(pen: ImageDraw.ImageDraw, tooth: Tooth, rng: random.Random) -> Ring:
    """Only the root is left; the crown's place is dark (the root itself was drawn with the other teeth)."""
    half = tooth.width / 2
    top, bottom = sorted((tooth.edge, tooth.neck))
    pen.rectangle(_pixels((tooth.x - half, top), (tooth.x + half, bottom)), fill=AIR)
    return tooth.ring


DRAW: dict[str, Callable[[ImageDraw.ImageDraw, Tooth, random.Random], Ring]] = {
    "caries": _draw_caries,
    "infection": _draw_infection,
    "impacted_tooth": _draw_impacted,
    "broken_down_crown_or_root": _draw_broken,
}


def _develop(drawing: Image.Image, rng: random.Random) -> Image.Image:
    """Reduce, blur, and give the picture an exposure and grain of its own."""
    picture = drawing.resize((WIDTH, HEIGHT), Image.Resampling.BOX).filter(ImageFilter.GaussianBlur(0.7))
    values = np.asarray(picture, dtype=np.float32) * rng.uniform(0.85, 1.05) + rng.uniform(-8, 12)
    grain = np.random.default_rng(rng.getrandbits(32)).normal(0, 5, values.shape)
    return Image.fromarray(np.clip(values + grain, 0, 255).astype(np.uint8), mode="L")


def _box(x: float, y: float, width: float, height: float) -> Ring:
    left, top, right, bottom = x - width / 2, y - height / 2, x + width / 2, y + height / 2
    return (left, top), (right, top), (right, bottom), (left, bottom)


def _pixels(*points: Point) -> list[Point]:
    return [(x * WIDTH * SCALE, y * HEIGHT * SCALE) for x, y in points]
