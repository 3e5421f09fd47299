"""What is true of teeth: numbers, types, sides and regions. Standard library only.

Image coordinates are fractions; on a panoramic the patient's right is on the image's left. The thresholds were
measured on 4,629 FDI boxes of panoramics: jaw right in 99.6 %, side in 97.7 %, six-region name in 93.8 %.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from data_builders.records import Bounds, Finding

POSITIONS = {
    1: "central_incisor",
    2: "lateral_incisor",
    3: "canine",
    4: "first_premolar",
    5: "second_premolar",
    6: "first_molar",
    7: "second_molar",
    8: "third_molar",
}
TOOTH_TYPES = tuple(POSITIONS.values())
PERMANENT = tuple(f"{quadrant}{position}" for quadrant in (1, 2, 3, 4) for position in range(1, 9))
DECIDUOUS = tuple(f"{quadrant}{position}" for quadrant in (5, 6, 7, 8) for position in range(1, 6))
THIRD_MOLARS = ("18", "28", "38", "48")
REGIONS = (
    "right_maxillary",
    "anterior_maxillary",
    "left_maxillary",
    "right_mandibular",
    "anterior_mandibular",
    "left_mandibular",
)

JAWS = ("maxillary", "mandibular")
QUADRANTS = ("upper_right", "upper_left", "lower_left", "lower_right")  # FDI's 1 to 4
CONTRALATERAL = tuple((f"right_{jaw}", f"left_{jaw}") for jaw in JAWS)

MIDLINE_HALF_WIDTH = 0.02  # within it a box cannot be called right or left
ANTERIOR_HALF_WIDTH = 0.105  # canine to canine
ARCH_NEEDS_TEETH = 8  # fewer boxes do not tell where the occlusal line is

_TYPE_WORDS = {"1st": "first", "2nd": "second", "3rd": "third", "cuspid": "canine", "wisdom": "third"}


def is_fdi(tooth: str) -> bool:
    """Whether `tooth` is a permanent or deciduous FDI number."""
    return tooth in PERMANENT or tooth in DECIDUOUS


def tooth_type(tooth: str) -> str:
    """The type behind an FDI number or type name; a deciduous molar has no type among the eight permanent ones.

    Raises:
        ValueError: for a deciduous molar, or what is neither an FDI number nor a type.
    """
    if tooth in TOOTH_TYPES:
        return tooth
    if tooth in PERMANENT or (tooth in DECIDUOUS and int(tooth[1]) <= 3):
        return POSITIONS[int(tooth[1])]
    raise ValueError(f"{tooth!r} has no permanent tooth type")


def universal(fdi: str) -> int:
    """The Universal number (1 to 32) of a permanent FDI tooth."""
    if fdi not in PERMANENT:
        raise ValueError(f"{fdi!r} is not a permanent FDI number")
    quadrant, position = int(fdi[0]), int(fdi[1])
    return {1: 9 - position, 2: 8 + position, 3: 25 - position, 4: 24 + position}[quadrant]


def parse_fdi(text: str) -> str:
    """Read `36`, `3.6`, `tooth_36` or `#36` as an FDI number; raise ValueError for anything else."""
    digits = re.sub(r"[^0-9]", "", text)
    if is_fdi(digits):
        return digits
    raise ValueError(f"{text!r} is not an FDI tooth number (11-18, 21-28, 31-38, 41-48; deciduous 51-85)")


def parse_tooth_type(text: str) -> str:
    """Read `3rd Molar`, `third-molar` or `Canine` as one of the eight tooth types; raise ValueError otherwise."""
    words = re.sub(r"[^a-z0-9]+", " ", text.casefold()).split()
    name = "_".join(_TYPE_WORDS.get(word, word) for word in words if word not in {"tooth", "teeth"})
    name = name.removesuffix("s")
    if name in TOOTH_TYPES:
        return name
    raise ValueError(f"{text!r} is not one of the tooth types {', '.join(TOOTH_TYPES)}")


def fdi_region(fdi: str) -> str:
    """The region that anatomy gives an FDI tooth: anterior is canine to canine."""
    quadrant = _quadrant(fdi)
    jaw = "maxillary" if quadrant in (1, 2) else "mandibular"
    if int(fdi[1]) <= 3:
        return f"anterior_{jaw}"
    return f"{'right' if quadrant in (1, 4) else 'left'}_{jaw}"


def arch_middle(findings: Iterable[Finding]) -> float:
    """Height (fraction of the image) of the line between the jaws: the mean height of the tooth boxes, if enough.

    The mean over all teeth names the jaw right in 99.6 % of real boxes, the image's middle in 96.7 %. Boxes of
    diseases alone do not count: they may all lie in one jaw.
    """
    boxes = [finding.bounds for finding in findings if finding.tooth and finding.bounds]
    heights = [(box[1] + box[3]) / 2 for box in boxes]
    return sum(heights) / len(heights) if len(heights) >= ARCH_NEEDS_TEETH else 0.5


def side(bounds: Bounds) -> str:
    """The patient's side on a panoramic: `right`, `left`, `midline`, or `bilateral` where a box spans both sides."""
    left, _, right, _ = bounds
    center = (left + right) / 2
    if left < 0.5 - ANTERIOR_HALF_WIDTH and right > 0.5 + ANTERIOR_HALF_WIDTH:
        return "bilateral"
    if abs(center - 0.5) < MIDLINE_HALF_WIDTH:
        return "midline"
    return "right" if center < 0.5 else "left"


def region(bounds: Bounds, middle: float = 0.5) -> str:
    """One of the six regions for a box on a panoramic, or `bilateral_<jaw>` where it spans both posterior sides."""
    left, top, right, bottom = bounds
    jaw = "maxillary" if (top + bottom) / 2 < middle else "mandibular"
    if side(bounds) == "bilateral":
        return f"bilateral_{jaw}"
    center = (left + right) / 2
    if abs(center - 0.5) < ANTERIOR_HALF_WIDTH:
        return f"anterior_{jaw}"
    return f"{'right' if center < 0.5 else 'left'}_{jaw}"


def finding_region(finding: Finding, middle: float = 0.5) -> str | None:
    """The region of a finding: from its FDI number where it has one, else from its box, else `None`."""
    if finding.tooth and is_fdi(finding.tooth):
        return fdi_region(finding.tooth)
    return region(finding.bounds, middle) if finding.bounds else None


def finding_side(finding: Finding) -> str | None:
    """The patient's side of a finding: from its FDI number where it has one, else from its box, else `None`."""
    if finding.tooth and is_fdi(finding.tooth):
        return "right" if _quadrant(finding.tooth) in (1, 4) else "left"
    return side(finding.bounds) if finding.bounds else None


def finding_quadrant(finding: Finding, middle: float = 0.5) -> str | None:
    """The quadrant of a finding, one of `QUADRANTS`; `None` for what lies on the midline or spans both sides."""
    if finding.tooth and is_fdi(finding.tooth):
        return QUADRANTS[_quadrant(finding.tooth) - 1]
    own_side, own_region = finding_side(finding), finding_region(finding, middle)
    if own_region is None or own_side not in ("right", "left"):
        return None
    return f"{'upper' if own_region.endswith('maxillary') else 'lower'}_{own_side}"


def _quadrant(fdi: str) -> int:
    """1 to 4; the deciduous quadrants 5 to 8 lie where these do."""
    return (int(fdi[0]) - 1) % 4 + 1
