"""Question families about teeth: which there are, how many, and which number a diseased one has."""

from __future__ import annotations

from collections.abc import Iterator

from data_builders.claims import Claim, claim_present, has_places
from data_builders.compose.scene import Pair, Scene
from data_builders.compose.wording import Wording
from data_builders.dentition import JAWS, PERMANENT, THIRD_MOLARS, universal


def compose_tooth_types(scene: Scene, words: Wording) -> Iterator[Pair]:
    """Which types of teeth there are; counted only where the source annotates every tooth."""
    if not scene.tooth_types:
        return
    exhaustive = "tooth" in scene.record.exhaustive
    claims = tuple(claim_present("tooth", scene.placed, tooth=x, counted=exhaustive) for x in scene.tooth_types)
    question = words.draw("tooth_types", "questions", image=words.image(scene.modality))
    if exhaustive:
        answer = words.draw("tooth_types", "counted", findings=words.list(words.counted(claim) for claim in claims))
    else:
        types = words.list(words.types(claim) for claim in claims)
        answer = words.draw("tooth_types", "listed", types=types)
    yield Pair("tooth_types", question, answer, claims)


def compose_completeness(scene: Scene, words: Wording) -> Iterator[Pair]:
    """How many permanent teeth there are and which are not, where every tooth is annotated with its number."""
    if scene.permanent_teeth is None or "tooth" not in scene.record.exhaustive or not has_places(scene.record):
        return
    if scene.shown_elsewhere or any(item.finding.tooth not in scene.permanent_teeth for item in scene.placed):
        return  # something on a tooth that is not among the annotated ones: that tooth is there, perhaps impacted
    missing = [tooth for tooth in PERMANENT if tooth not in scene.permanent_teeth]
    claims = (claim_present("tooth", scene.placed), *(Claim("tooth", tooth=x, negated=True) for x in missing))
    if not missing:
        answer = words.draw("completeness", "complete")
    else:
        count = str(len(scene.permanent_teeth))
        form = "missing_one" if len(missing) == 1 else "missing_other"
        answer = words.draw("completeness", form, count=count, missing=words.teeth(missing))
        if set(missing) <= set(THIRD_MOLARS):
            answer += " " + words.phrases["completeness"]["third_molars_only"]
    question = words.draw("completeness", "questions", image=words.image(scene.modality))
    yield Pair("completeness", question, answer, claims)


def compose_overview(scene: Scene, words: Wording) -> Iterator[Pair]:
    """How many teeth there are, jaw by jaw, where the source annotates every tooth."""
    if not scene.teeth or "tooth" not in scene.record.exhaustive or not all(item.region for item in scene.teeth):
        return
    total = claim_present("tooth", scene.placed)
    jaws = [claim_present("tooth", scene.placed, region=jaw) for jaw in JAWS]
    if not all(claim.annotations for claim in jaws):
        return  # an image of one jaw
    counts = words.list(f"{claim.count} {words.in_region(claim.region)}" for claim in jaws)
    image = words.image(scene.modality)
    answer = words.draw("overview", "answers", image=image, count=str(total.count), jaws=counts)
    yield Pair("overview", words.draw("overview", "questions", image=image), answer, (total, *jaws))


def compose_tooth_number(scene: Scene, words: Wording) -> Iterator[Pair]:
    """Which teeth a disease is on, in FDI and, for permanent teeth, Universal numbers."""
    image = words.image(scene.modality)
    for label in scene.pathology_labels if has_places(scene.record) else ():
        numbers = scene.numbered_teeth(label)
        if not numbers or label in scene.shown_elsewhere:
            continue
        claims = tuple(claim_present(label, scene.placed, tooth=tooth, counted=False) for tooth in numbers)
        form = "one" if len(numbers) == 1 else "other"
        teeth = words.teeth(numbers)
        if all(tooth in PERMANENT for tooth in numbers):
            others = words.list(str(universal(tooth)) for tooth in numbers)
            answer = words.draw("tooth_number", f"both_{form}", teeth=teeth, universal=others)
        else:
            answer = words.draw("tooth_number", "fdi", teeth=teeth)
        question = words.draw("tooth_number", f"questions_{form}", image=image, **words.subject(claims[0]))
        yield Pair("tooth_number", question, answer, claims, asks=f"{label} {form}")
