"""An image as the question families see it, and what a question with its answer is."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from data_builders.claims import SEVERITY, Claim, Placed, claim_present, claims_to_json, count_findings
from data_builders.dentition import DECIDUOUS, JAWS, PERMANENT, REGIONS, TOOTH_TYPES, is_fdi, tooth_type
from data_builders.records import ImageRecord, Modality
from data_builders.sources import Vocabulary

GRADES = ("mild", "moderate", "severe")


@dataclass(frozen=True, slots=True)
class Pair:
    """A question, its answer, and what the answer states.

    `asks` is what is asked apart from the wording: pairs with the same `question_type` and `asks` are one question,
    whose answers are balanced over the data set. `verdict` is whether the answer to a yes/no question is yes.
    `history` are the earlier turns of a dialogue.
    """

    question_type: str
    question: str
    answer: str
    claims: tuple[Claim, ...]
    asks: str = ""
    verdict: bool | None = None
    history: tuple[Pair, ...] = ()

    @property
    def answer_key(self) -> str:
        """What is answered apart from the wording: the claims without the annotations behind them."""
        return claims_to_json(replace(claim, annotations=()) for claim in self.claims)


@dataclass(frozen=True)
class Scene:
    """One image: findings with their places, and what may be said of them.

    `rng` chooses what to ask where there is a choice; it does not depend on the language, so that every language asks
    the same. `shown_elsewhere` is what other sources show on the same picture.
    """

    record: ImageRecord
    placed: tuple[Placed, ...]
    vocabulary: Vocabulary
    rng: random.Random
    shown_elsewhere: frozenset[str] = frozenset()

    @property
    def modality(self) -> Modality:
        return self.record.modality

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
    def is_free(self) -> bool:
        """Whether no source shows a disease, and the absence of some may be stated."""
        elsewhere = any(self.vocabulary[label].kind == "pathology" for label in self.shown_elsewhere)
        return not self.pathology and not elsewhere and bool(self.deniable)

    def denials(self) -> tuple[Claim, ...]:
        """That there is none of what was looked for."""
        return tuple(Claim(label, negated=True) for label in self.deniable)

    @cached_property
    def only_disease(self) -> str | None:
        """The disease of the image where there is one kind of it, in whatever source."""
        shown = {x for x in self.shown_elsewhere if self.vocabulary[x].kind == "pathology"}
        labels = self.pathology_labels
        return labels[0] if len(labels) == 1 and shown <= set(labels) else None

    @cached_property
    def single(self) -> tuple[Placed, ...]:
        """The findings of diseases that are there exactly once, and in no other source."""
        own = [item for item in self.pathology if item.finding.label not in self.shown_elsewhere]
        counts = {label: count_findings(i.finding for i in own if i.finding.label == label) for label in self.labels}
        return tuple(item for item in own if counts[item.finding.label] == 1)

    @cached_property
    def labels(self) -> frozenset[str]:
        return frozenset(item.finding.label for item in self.placed)

    @cached_property
    def located(self) -> bool:
        """Whether every disease of the image has a place."""
        return bool(self.pathology) and all(item.region for item in self.pathology)

    @cached_property
    def tooth_types(self) -> tuple[str, ...] | None:
        """The types of the annotated teeth in the order of `TOOTH_TYPES`; `None` unless every tooth has one."""
        teeth = [item.finding.tooth for item in self.teeth]
        if any(tooth in DECIDUOUS for tooth in teeth):
            return None
        types = {tooth_type(tooth) for tooth in teeth if tooth is not None}
        return tuple(kind for kind in TOOTH_TYPES if kind in types) if teeth and None not in teeth else None

    @cached_property
    def permanent_teeth(self) -> tuple[str, ...] | None:
        """The FDI numbers annotated, when all are permanent teeth and none is there twice; else `None`."""
        teeth = [item.finding.tooth for item in self.teeth]
        usable = teeth and len(set(teeth)) == len(teeth) and all(tooth in PERMANENT for tooth in teeth)
        return tuple(sorted(teeth)) if usable else None

    @cached_property
    def teeth(self) -> tuple[Placed, ...]:
        return tuple(item for item in self.placed if item.finding.label == "tooth")

    def of(self, label: str) -> tuple[Placed, ...]:
        """The findings of one label."""
        return tuple(item for item in self.placed if item.finding.label == label)

    def claim(self, item: Placed, **stated: str | int | None) -> Claim:
        """A claim about one finding."""
        finding = item.finding
        return Claim(finding.label, hedged=finding.origin == "model", annotations=(finding.finding_id,), **stated)

    def claims_by_place(self, items: Iterable[Placed]) -> tuple[Claim, ...]:
        """One claim per label and region, maxilla before mandible, right before left."""
        order = {region: number for number, region in enumerate(REGIONS)}
        pairs = sorted(
            {(item.region, item.finding.label) for item in items},
            key=lambda pair: (order.get(pair[0] or "", len(order)), pair[0] or "", pair[1]),
        )
        return tuple(claim_present(label, self.placed, region=region) for region, label in pairs)

    def severity(self, label: str) -> str | None:
        """The one grade that all findings of a label have, of those that can be worded; else `None`."""
        grades = {item.finding.attributes.get(SEVERITY, "").strip().casefold() for item in self.of(label)}
        return next(iter(grades)) if len(grades) == 1 and grades <= set(GRADES) else None

    def numbered_teeth(self, label: str) -> tuple[str, ...] | None:
        """The FDI numbers of the teeth that a disease is on; `None` unless every finding of it has one."""
        teeth = [item.finding.tooth for item in self.of(label)]
        return tuple(sorted(set(teeth))) if teeth and all(tooth and is_fdi(tooth) for tooth in teeth) else None


def regions_without(claims: Iterable[Claim]) -> tuple[str, ...]:
    """The regions that none of the claims is about; a bilateral finding covers its whole jaw."""
    taken = {claim.region for claim in claims}
    covered = {jaw for jaw in JAWS if f"bilateral_{jaw}" in taken}
    return tuple(region for region in REGIONS if region not in taken and region.split("_")[1] not in covered)
