"""Question families about where something is: regions, sides, quadrants. Only panoramics have any."""

from __future__ import annotations

from collections.abc import Iterator

from data_builders.claims import Claim, claim_present, has_places
from data_builders.compose.scene import Pair, Scene, regions_without
from data_builders.compose.wording import Wording, fill
from data_builders.dentition import CONTRALATERAL


def compose_location(scene: Scene, words: Wording) -> Iterator[Pair]:
    """In which region a disease lies, for one that is there exactly once."""
    image = words.image(scene.modality)
    for claim in scene.claims_by_place(scene.pathology) if scene.located else ():
        if claim.label in {item.finding.label for item in scene.single}:
            question = words.draw("location", "questions", image=image, **words.subject(claim))
            answer = words.draw("location", "answers", in_region=words.in_region(claim.region))
            yield Pair("location", question, answer, (claim,), asks=claim.label)


def compose_side(scene: Scene, words: Wording) -> Iterator[Pair]:
    """On which side a disease lies; on a photograph, which may be mirrored, that this cannot be told."""
    for item in scene.single:
        if item.side:
            claim = scene.claim(item, count=1, side=item.side)
            answer = words.draw("side", "answers", on_side=words.phrases["sides"][item.side])
        elif scene.modality == "intraoral_photo":
            claim = scene.claim(item, undetermined="side")
            answer = words.draw("side", "undetermined")
        else:
            continue
        question = words.draw("side", "questions", **words.subject(claim))
        yield Pair("side", question, answer, (claim,), asks=claim.label)


def compose_quadrant(scene: Scene, words: Wording) -> Iterator[Pair]:
    """In which quadrant a disease lies, unless it is on the midline or on both sides."""
    for item in scene.single:
        if item.quadrant:
            claim = scene.claim(item, count=1, region=item.quadrant)
            question = words.draw("quadrant", "questions", image=words.image(scene.modality), **words.subject(claim))
            answer = words.draw("quadrant", "answers", in_region=words.in_region(item.quadrant))
            yield Pair("quadrant", question, answer, (claim,), asks=claim.label)


def compose_structured_report(scene: Scene, words: Wording) -> Iterator[Pair]:
    """A line per region that has findings, then what the other regions do not have, where that may be said."""
    if not scene.located:
        return
    claims = scene.claims_by_place(scene.pathology)
    lines = []
    for region in dict.fromkeys(claim.region for claim in claims):
        findings = words.list(words.counted(claim) for claim in claims if claim.region == region)
        lines.append(fill(words.phrases["structured_report"]["line"], region=words.region(region), findings=findings))
    others = regions_without(claims)
    if others and scene.deniable:
        lines.append(words.phrases["structured_report"]["rest"].format(conditions=words.absent(scene.deniable)))
        claims += tuple(Claim(label, region=region, negated=True) for region in others for label in scene.deniable)
    question = words.draw("structured_report", "questions", image=words.image(scene.modality))
    yield Pair("structured_report", question, "\n".join(lines), claims)


def compose_region(scene: Scene, words: Wording) -> Iterator[Pair]:
    """What there is in one region: in one that has findings, and in one that has none where that may be said."""
    if not has_places(scene.record) or not all(item.region for item in scene.pathology):
        return
    claims = scene.claims_by_place(scene.pathology)
    free = regions_without(claims) if scene.deniable else ()
    crossed = {claim.region.removeprefix("bilateral_") for claim in claims if claim.region.startswith("bilateral_")}
    taken = sorted({claim.region for claim in claims if claim.region.split("_")[1] not in crossed})
    chosen = [scene.rng.choice(regions) for regions in (taken, free) if regions]
    for region in chosen:
        if own := tuple(claim for claim in claims if claim.region == region):
            findings = words.list(words.counted(claim) for claim in own)
            answer = words.draw("region", "answers", in_region=words.in_region(region), findings=findings)
        else:
            own = tuple(Claim(label, region=region, negated=True) for label in scene.deniable)
            conditions = words.absent(scene.deniable)
            answer = words.draw("region", "nothing", in_region=words.in_region(region), conditions=conditions)
        question = words.draw(
            "region", "questions", image=words.image(scene.modality), in_region=words.in_region(region)
        )
        yield Pair("region", question, answer, own, asks=region)


def compose_comparison(scene: Scene, words: Wording) -> Iterator[Pair]:
    """What a region has against its counterpart on the other side, counted disease by disease."""
    if not scene.located:
        return
    for right, left in CONTRALATERAL:
        jaw = right.removeprefix("right_")
        labels = sorted({item.finding.label for item in scene.pathology if item.region in (right, left)})
        crossing = any(item.region == f"bilateral_{jaw}" for item in scene.pathology)
        claims = {region: _compare(scene, labels, region) for region in (right, left)}
        if not labels or crossing or None in (claim for own in claims.values() for claim in own):
            continue
        sentences = []
        for region, own in claims.items():
            present = [words.counted(claim) for claim in own if not claim.negated]
            absent = [claim.label for claim in own if claim.negated]
            parts = [words.list(present)] if present else []
            parts += [words.draw("comparison", "nothing", conditions=words.absent(absent))] if absent else []
            side = fill(words.phrases["comparison"]["line"], region=words.region(region), findings="; ".join(parts))
            sentences.append(side)
        question = words.draw(
            "comparison",
            "questions",
            image=words.image(scene.modality),
            first=words.region(right),
            second=words.region(left),
        )
        yield Pair("comparison", question, " ".join(sentences), (*claims[right], *claims[left]), asks=jaw)


def _compare(scene: Scene, labels: list[str], region: str) -> list[Claim | None]:
    """What a region has of each label; `None` where it has none and nobody may say so."""
    claims: list[Claim | None] = []
    for label in labels:
        claim = claim_present(label, scene.placed, region=region)
        if not claim.annotations:
            claim = Claim(label, region=region, negated=True) if label in scene.deniable else None
        claims.append(claim)
    return claims
