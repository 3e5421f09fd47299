"""Question families: what may be asked of an image, and the answer that its annotations carry.

A family is a generator from a scene to pairs. It decides what is asked and which claims the answer makes; the words
come from `compose/phrases`. Every statement of an answer is worded from a claim, never beside it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

from data_builders.claims import (
    IMAGE,
    Claim,
    Placed,
    claim_present,
    count_findings,
    has_places,
    place_findings,
)
from data_builders.compose import dialogues, places, teeth
from data_builders.compose.scene import Pair, Scene
from data_builders.compose.wording import Wording
from data_builders.records import ImageRecord
from data_builders.sources import Family, Language, Vocabulary

Compose = Callable[[Scene, Wording], Iterator[Pair]]


def _diagnosis(scene: Scene, words: Wording) -> Iterator[Pair]:
    """Which disease it is, where there is one kind of it, in whatever source; and of images that have none.

    A question that only diseased images are asked would tell that there is a disease.
    """
    image = words.image(scene.modality)
    if label := scene.only_disease:
        claim = claim_present(label, scene.placed, counted=False)
        question = words.draw("diagnosis", "questions", image=image)
        answer = words.draw("diagnosis", "answers", condition=words.condition(label, hedged=claim.hedged))
        yield Pair("diagnosis", question, answer, (claim,))
    elif scene.is_free:
        question = words.draw("diagnosis", "questions", image=image)
        answer = words.draw("no_findings", "answers", image=image, conditions=words.absent(scene.deniable))
        yield Pair("diagnosis", question, answer, scene.denials())


def _findings(scene: Scene, words: Wording) -> Iterator[Pair]:
    """Everything that is there, with its place where the image allows it; and, where it may be said, what is not.

    An image without disease is asked as one with diseases is: the question must not tell.
    """
    image = words.image(scene.modality)
    family = "findings_location" if scene.located or (scene.is_free and has_places(scene.record)) else "findings"
    visible = scene.pathology if family == "findings_location" else _said_without_place(scene)
    claims: tuple[Claim, ...] = ()
    sentences = []
    if visible:
        claims = scene.claims_by_place(visible)
        findings = words.list(words.finding(claim) for claim in claims)
        sentences.append(words.draw(family, "answers", image=image, findings=findings))
    if scene.is_free:
        claims += scene.denials()
        sentences.append(words.draw("no_findings", "answers", image=image, conditions=words.absent(scene.deniable)))
    if not sentences:
        return
    answer = " ".join(sentences)
    yield Pair(family, words.draw(family, "questions", image=image), answer, claims)


def _said_without_place(scene: Scene) -> tuple[Placed, ...]:
    """Everything but plain teeth, which have families of their own."""
    return tuple(item for item in scene.placed if item.finding.label != "tooth")


def _presence(scene: Scene, words: Wording) -> Iterator[Pair]:
    """Yes or no on every disease that is there, or whose absence may be stated."""
    image = words.image(scene.modality)
    for label in sorted({*scene.pathology_labels, *scene.deniable}):
        items = scene.of(label)
        if items:
            claims = scene.claims_by_place(items)
            findings = words.list(words.finding(claim) for claim in claims)
            kind = "suspected" if any(claim.hedged for claim in claims) else "affirmed"
            answer = words.draw("presence", kind, image=image, findings=findings)
        else:
            claims = (Claim(label, negated=True),)
            answer = words.draw("presence", "denied", image=image, condition=words.absent([label]))
        question = words.draw("presence", "questions", image=image, condition=words.condition(label))
        yield Pair("presence", question, answer, claims, asks=label, verdict=bool(items))


def _healthy_or_abnormal(scene: Scene, words: Wording) -> Iterator[Pair]:
    """Whether there is any disease; "nothing abnormal" names what was looked for and goes no further."""
    image = words.image(scene.modality)
    if scene.pathology:
        claims = tuple(claim_present(label, scene.placed, counted=False) for label in scene.pathology_labels)
        conditions = words.list(words.condition(claim.label, hedged=claim.hedged) for claim in claims)
        kind = "suspected" if any(claim.hedged for claim in claims) else "abnormal"
        answer = words.draw("healthy_or_abnormal", kind, image=image, conditions=conditions)
    elif scene.is_free:
        claims = scene.denials()
        answer = words.draw("healthy_or_abnormal", "nothing", image=image, conditions=words.absent(scene.deniable))
    else:
        return
    question = words.draw("healthy_or_abnormal", "questions", image=image)
    yield Pair("healthy_or_abnormal", question, answer, claims, verdict=bool(scene.pathology))


def _counting(scene: Scene, words: Wording) -> Iterator[Pair]:
    """How many there are of a disease that the source annotates exhaustively."""
    for label in scene.pathology_labels:
        if label in scene.deniable and label not in scene.shown_elsewhere:
            claim = claim_present(label, scene.placed)
            names = words.other(label)
            question = words.draw(
                "counting",
                "questions",
                image=words.image(scene.modality),
                findings=names,
                how_many=words.how_many(label),
            )
            answer = words.draw(
                "counting", "answers", image=words.image(scene.modality), findings=words.numbered(claim)
            )
            yield Pair("counting", question, answer, (claim,), asks=label)


def _image_type(scene: Scene, words: Wording) -> Iterator[Pair]:
    """What kind of picture it is; balanced away where a data set has only one kind."""
    claim = Claim(IMAGE, modality=scene.modality)
    answer = words.draw("image_type", "answers", image=words.a_image(scene.modality))
    yield Pair("image_type", words.draw("image_type", "questions"), answer, (claim,))


def _severity(scene: Scene, words: Wording) -> Iterator[Pair]:
    """The grade, where the annotation gives one."""
    for label in scene.pathology_labels:
        if grade := scene.severity(label):
            found = claim_present(label, scene.placed, counted=False)
            claim = Claim(label, severity=grade, hedged=found.hedged, annotations=found.annotations)
            form = "one" if count_findings(item.finding for item in scene.of(label)) == 1 else "other"
            question = words.draw("severity", f"questions_{form}", **words.subject(claim))
            answer = words.draw("severity", "answers", grade=words.phrases["grades"][grade])
            yield Pair("severity", question, answer, (claim,), asks=f"{label} {form}")


def _guidance(family: Family) -> Compose:
    """A family that states the one disease of the image, then what is generally done or thought of about it."""

    def compose(scene: Scene, words: Wording) -> Iterator[Pair]:
        label = scene.only_disease
        if label and (advice := scene.vocabulary[label].advice(family, words.language)):
            image = words.image(scene.modality)
            claim = claim_present(label, scene.placed, counted=False)
            shown = words.draw("guidance", "shown", image=image, condition=words.condition(label, hedged=claim.hedged))
            answer = f"{shown} {words.phrases['guidance']['marker']} {advice}"
            yield Pair(family, words.draw(family, "questions", image=image), answer, (claim,))

    return compose


# In the order in which a sources file may name them; `compose_pairs` asks in this order.
FAMILIES: dict[Family, Compose] = {
    "diagnosis": _diagnosis,
    "findings": _findings,
    "location": places.compose_location,
    "presence": _presence,
    "structured_report": places.compose_structured_report,
    "tooth_types": teeth.compose_tooth_types,
    "completeness": teeth.compose_completeness,
    "image_type": _image_type,
    "severity": _severity,
    "follow_up": _guidance("follow_up"),
    "urgency": _guidance("urgency"),
    "differential": _guidance("differential"),
    "healthy_or_abnormal": _healthy_or_abnormal,
    "overview": teeth.compose_overview,
    "region": places.compose_region,
    "counting": _counting,
    "side": places.compose_side,
    "quadrant": places.compose_quadrant,
    "tooth_number": teeth.compose_tooth_number,
    "comparison": places.compose_comparison,
}
# A dialogue is made of the pairs of the other families that are asked.
DIALOGUE: Family = "dialogue"
# Their questions do not name the kind of picture, which would give the answer away.
NEUTRAL: tuple[Family, ...] = ("image_type", "severity", "side")


def compose_pairs(
    record: ImageRecord,
    *,
    vocabulary: Vocabulary,
    language: Language,
    seed: int,
    shown_elsewhere: Collection[str] = (),
    families: Collection[Family] = (*FAMILIES, DIALOGUE),
) -> Iterator[Pair]:
    """Yield the pairs for one image; the same image always gets the same pairs, whatever else is built.

    `shown_elsewhere` are the labels that other sources show on the same picture.
    """
    placed = place_findings(record)
    asked = {name: compose for name, compose in FAMILIES.items() if name in families}

    def ask(family: Family) -> Iterator[Pair]:
        key = f"{seed}/{record.source}/{record.image_id}/{family}"
        scene = Scene(record, placed, vocabulary, random.Random(key), frozenset(shown_elsewhere))
        words = Wording(language, vocabulary, random.Random(f"{key}/{language}"))
        pairs = dialogues.compose(scene, words, asked) if family == DIALOGUE else FAMILIES[family](scene, words)
        if family in NEUTRAL:
            yield from pairs
        else:
            yield from (replace(pair, asks=f"{record.modality} {pair.asks}".strip()) for pair in pairs)

    for family in (*FAMILIES, DIALOGUE):
        if family in families:
            yield from ask(family)
