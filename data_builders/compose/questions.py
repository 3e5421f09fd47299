"""Question families: what may be asked of an image, and the answer that its annotations carry.

A family is a generator from a scene to pairs. It decides what is asked and which claims the answer makes; the words
come from `compose/phrases`. Every statement of an answer is worded from a claim, never beside it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property

from data_builders.claims import Claim, Placed, claim_present, place_findings
from data_builders.compose.wording import Wording, fill
from data_builders.dentition import PERMANENT, REGIONS, THIRD_MOLARS, TOOTH_TYPES, tooth_type
from data_builders.records import ImageRecord
from data_builders.sources import Family, Language, Vocabulary


@dataclass(frozen=True, slots=True)
class Pair:
    """A question, its answer, and what the answer states.

    `asks` and `verdict` are set for yes/no questions, which are balanced over the data set: what is asked for, and
    whether the answer is yes.
    """

    question_type: str
    question: str
    answer: str
    claims: tuple[Claim, ...]
    asks: str | None = None
    verdict: bool | None = None


@dataclass(frozen=True)
class Scene:
    """An image as the question families see it: findings with their places, and what may be said of them."""

    record: ImageRecord
    placed: tuple[Placed, ...]
    vocabulary: Vocabulary
    shown_elsewhere: frozenset[str] = frozenset()  # what other sources show on the same picture

    @cached_property
    def pathology(self) -> tuple[Placed, ...]:
        return tuple(item for item in self.placed if self.vocabulary[item.finding.label].kind == "pathology")

    @cached_property
    def pathology_labels(self) -> tuple[str, ...]:
        return tuple(sorted({item.finding.label for item in self.pathology}))

    @cached_property
    def deniable(self) -> tuple[str, ...]:
        """Diseases whose absence may be stated."""
        return tuple(sorted(x for x in self.record.exhaustive if self.vocabulary[x].kind == "pathology"))

    @cached_property
    def located(self) -> bool:
        """Whether every disease of the image has a place."""
        return bool(self.pathology) and all(item.region for item in self.pathology)

    @cached_property
    def tooth_types(self) -> tuple[str, ...] | None:
        """The types of the annotated teeth in the order of `TOOTH_TYPES`; `None` unless every tooth has one."""
        teeth = [item.finding.tooth for item in self.placed if item.finding.label == "tooth"]
        try:
            types = {tooth_type(tooth) for tooth in teeth if tooth is not None}
        except ValueError:  # a deciduous molar
            return None
        return tuple(kind for kind in TOOTH_TYPES if kind in types) if teeth and None not in teeth else None

    @cached_property
    def permanent_teeth(self) -> tuple[str, ...] | None:
        """The FDI numbers annotated, when all are permanent teeth and none is there twice; else `None`."""
        teeth = [item.finding.tooth for item in self.placed if item.finding.label == "tooth"]
        usable = teeth and len(set(teeth)) == len(teeth) and all(tooth in PERMANENT for tooth in teeth)
        return tuple(sorted(teeth)) if usable else None

    def claims_by_place(self, items: tuple[Placed, ...]) -> tuple[Claim, ...]:
        """One claim per label and region, maxilla before mandible, right before left."""
        order = {region: number for number, region in enumerate(REGIONS)}
        pairs = sorted(
            {(item.region, item.finding.label) for item in items},
            key=lambda pair: (order.get(pair[0] or "", len(order)), pair[0] or "", pair[1]),
        )
        return tuple(claim_present(label, self.placed, region=region) for region, label in pairs)


def _diagnosis(scene: Scene, words: Wording) -> Iterator[Pair]:
    """Which disease it is, where there is one kind of it, in whatever source."""
    diseases = {x for x in scene.shown_elsewhere if scene.vocabulary[x].kind == "pathology"}
    if len(scene.pathology_labels) == 1 and diseases <= set(scene.pathology_labels):
        label = scene.pathology_labels[0]
        claim = claim_present(label, scene.placed, counted=False)
        question = words.draw("diagnosis", "questions", image=words.image(scene.record.modality))
        yield Pair(
            "diagnosis", question, words.draw("diagnosis", "answers", condition=words.condition(label)), (claim,)
        )


def _findings(scene: Scene, words: Wording) -> Iterator[Pair]:
    """Everything that is there, with its place where the image allows it; and, where it may be said, what is not."""
    image = words.image(scene.record.modality)
    visible = scene.pathology if scene.located else _said_without_place(scene)
    family = "findings_location" if scene.located else "findings"
    claims: tuple[Claim, ...] = ()
    sentences = []
    if visible:
        claims = scene.claims_by_place(visible)
        findings = words.list(words.finding(claim) for claim in claims)
        sentences.append(words.draw(family, "answers", image=image, findings=findings))
    if not scene.pathology and scene.deniable:
        claims += tuple(Claim(label, negated=True) for label in scene.deniable)
        conditions = words.list((words.absent(label) for label in scene.deniable), last="or")
        sentences.append(words.draw("no_findings", "answers", image=image, conditions=conditions))
    if not sentences:
        return
    answer = " ".join(sentences)
    yield Pair(family, words.draw(family, "questions", image=image), answer, claims)


def _said_without_place(scene: Scene) -> tuple[Placed, ...]:
    """Everything but plain teeth, which have families of their own."""
    return tuple(item for item in scene.placed if item.finding.label != "tooth")


def _location(scene: Scene, words: Wording) -> Iterator[Pair]:
    """Where a disease lies, for one that is there exactly once."""
    image = words.image(scene.record.modality)
    for claim in scene.claims_by_place(scene.pathology) if scene.located else ():
        if claim.label not in scene.shown_elsewhere and claim_present(claim.label, scene.placed).count == 1:
            name = words.name(claim.label)
            question = words.draw("location", "questions", image=image, finding=name, the=words.the(claim.label))
            answer = words.draw("location", "answers", in_region=words.in_region(claim.region))
            yield Pair("location", question, answer, (claim,))


def _presence(scene: Scene, words: Wording) -> Iterator[Pair]:
    """Yes or no on every disease that is there, or whose absence may be stated."""
    image = words.image(scene.record.modality)
    for label in sorted({*scene.pathology_labels, *scene.deniable}):
        condition = words.condition(label)
        items = tuple(item for item in scene.pathology if item.finding.label == label)
        if items:
            claims = scene.claims_by_place(items)
            findings = words.list(words.finding(claim) for claim in claims)
            answer = words.draw("presence", "affirmed", image=image, condition=condition, findings=findings)
        else:
            claims = (Claim(label, negated=True),)
            answer = words.draw("presence", "denied", image=image, condition=words.absent(label))
        question = words.draw("presence", "questions", image=image, condition=condition)
        yield Pair("presence", question, answer, claims, asks=label, verdict=bool(items))


def _structured_report(scene: Scene, words: Wording) -> Iterator[Pair]:
    """A line per region that has findings, then what the other regions do not have, where that may be said."""
    if not scene.located:
        return
    claims = scene.claims_by_place(scene.pathology)
    lines = []
    for region in dict.fromkeys(claim.region for claim in claims):
        findings = words.list(words.counted(claim) for claim in claims if claim.region == region)
        lines.append(fill(words.phrases["structured_report"]["line"], region=words.region(region), findings=findings))
    others = _regions_without(claims)
    if others and scene.deniable:
        conditions = words.list((words.absent(label) for label in scene.deniable), last="or")
        lines.append(words.phrases["structured_report"]["rest"].format(conditions=conditions))
        claims += tuple(Claim(label, region=region, negated=True) for region in others for label in scene.deniable)
    question = words.draw("structured_report", "questions", image=words.image(scene.record.modality))
    yield Pair("structured_report", question, "\n".join(lines), claims)


def _regions_without(claims: tuple[Claim, ...]) -> list[str]:
    """The regions that none of the claims is about; a bilateral finding covers its whole jaw."""
    taken = {claim.region for claim in claims}
    covered = {region.removeprefix("bilateral_") for region in taken if region.startswith("bilateral_")}
    return [region for region in REGIONS if region not in taken and region.split("_")[1] not in covered]


def _tooth_types(scene: Scene, words: Wording) -> Iterator[Pair]:
    """Which types of teeth there are; counted only where the source annotates every tooth."""
    if not scene.tooth_types:
        return
    exhaustive = "tooth" in scene.record.exhaustive
    claims = tuple(claim_present("tooth", scene.placed, tooth=x, counted=exhaustive) for x in scene.tooth_types)
    question = words.draw("tooth_types", "questions", image=words.image(scene.record.modality))
    if exhaustive:
        answer = words.draw("tooth_types", "counted", findings=words.list(words.counted(claim) for claim in claims))
    else:
        types = words.list(words.phrases["tooth_type_names"][kind]["other"] for kind in scene.tooth_types)
        answer = words.draw("tooth_types", "listed", types=types)
    yield Pair("tooth_types", question, answer, claims)


def _completeness(scene: Scene, words: Wording) -> Iterator[Pair]:
    """How many permanent teeth there are and which are not, where every tooth is annotated with its number."""
    if scene.permanent_teeth is None or "tooth" not in scene.record.exhaustive:
        return
    missing = [tooth for tooth in PERMANENT if tooth not in scene.permanent_teeth]
    claims = (claim_present("tooth", scene.placed), *(Claim("tooth", tooth=x, negated=True) for x in missing))
    if not missing:
        answer = words.draw("completeness", "complete")
    else:
        count = str(len(scene.permanent_teeth))
        answer = words.draw("completeness", "missing", count=count, missing=words.teeth(missing))
        if set(missing) <= set(THIRD_MOLARS):
            answer += " " + words.phrases["completeness"]["third_molars_only"]
    question = words.draw("completeness", "questions", image=words.image(scene.record.modality))
    yield Pair("completeness", question, answer, claims)


FAMILIES: dict[Family, Callable[[Scene, Wording], Iterator[Pair]]] = {
    "diagnosis": _diagnosis,
    "findings": _findings,
    "location": _location,
    "presence": _presence,
    "structured_report": _structured_report,
    "tooth_types": _tooth_types,
    "completeness": _completeness,
}


def compose_pairs(
    record: ImageRecord,
    *,
    vocabulary: Vocabulary,
    language: Language,
    seed: int,
    shown_elsewhere: Collection[str] = (),
    families: tuple[Family, ...] = tuple(FAMILIES),
) -> Iterator[Pair]:
    """Yield the pairs for one image; the same image always gets the same pairs, whatever else is built.

    `shown_elsewhere` are the labels that other sources show on the same picture.
    """
    scene = Scene(record, place_findings(record), vocabulary, frozenset(shown_elsewhere))
    for family in families:
        rng = random.Random(f"{seed}/{record.source}/{record.image_id}/{family}/{language}")
        yield from FAMILIES[family](scene, Wording(language, vocabulary, rng))
