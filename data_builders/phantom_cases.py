"""Made-up clinical cases whose answer follows from their findings, for rehearsals and tests. They describe no patient.

Words are few and short, so that a model of two million parameters can learn them. What is planned is general guidance;
nothing is dosed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Disease(NamedTuple):
    """A condition, at which ages, places and times it is met, and how a case of it reads without naming it."""

    name: str
    ages: tuple[int, int]
    jaws: tuple[str, ...]
    teeth: tuple[str, ...]
    lasting: tuple[str, ...]
    complaints: tuple[str, ...]
    findings: tuple[str, ...]  # a case has two of them
    images: tuple[str, ...]
    plan: str


DAYS = ("two days", "three days", "four days", "five days", "a week")
MONTHS = ("a month", "two months", "three months", "half a year", "a year")
BOTH = ("upper", "lower")
MOLARS = ("first molar", "second molar")
TEETH = ("canine", "first premolar", "second premolar", *MOLARS)
DISEASES = (
    Disease(
        "dental caries",
        (12, 70),
        BOTH,
        TEETH,
        MONTHS,
        ("food gets stuck in the tooth", "a short pain on sweet food", "a rough hole in the tooth", "a brown spot"),
        ("soft brown floor in the pit", "cold gives a short normal pain", "no pain on tapping", "soft dark wall"),
        ("dark spot in the crown, far from the pulp", "dark spot under the enamel", "loss in the outer dentine"),
        "Remove the soft decay and place a filling.",
    ),
    Disease(
        "irreversible pulpitis",
        (16, 70),
        BOTH,
        TEETH,
        DAYS,
        ("pain that wakes at night", "pain that comes by itself", "long pain after cold drinks", "pain with hot tea"),
        ("cold pain lasts over a minute", "heat makes it worse", "deep hole near the pulp", "old deep filling"),
        ("dark spot that reaches the pulp", "deep filling next to the pulp", "deep crown loss, root tip normal"),
        "Root canal treatment, or take the tooth out.",
    ),
    Disease(
        "apical abscess",
        (16, 75),
        BOTH,
        TEETH,
        DAYS,
        ("swelling over the tooth", "the tooth feels high", "throbbing pain and a bad taste", "too sore to bite"),
        ("no response to cold", "strong pain on tapping", "pus from the gum near the root tip", "soft tender lump"),
        ("dark area round the root tip", "wide gap round the root tip", "round dark area below the root"),
        "Drain the pus, then root canal treatment or take the tooth out.",
    ),
    Disease(
        "gingivitis",
        (12, 60),
        BOTH,
        ("front teeth", "back teeth"),
        MONTHS,
        ("blood on the brush", "gums bleed when flossing", "red gums", "bleeding gums and bad breath"),
        ("plaque along the gum line", "bleeding on probing", "pockets of 2 to 3 mm", "no loose teeth"),
        ("bone level normal", "no bone loss", "bone reaches the necks of the teeth"),
        "Clean the teeth and show how to brush.",
    ),
    Disease(
        "periodontitis",
        (35, 80),
        BOTH,
        ("front teeth", "back teeth", *MOLARS),
        MONTHS,
        ("loose teeth", "teeth that drift apart", "gums that shrink and bleed", "food packs between long teeth"),
        ("pockets of 6 to 8 mm", "teeth move when pushed", "roots are bare and rough", "hard deposits below the gum"),
        ("bone loss to half the root", "flat loss of bone between the teeth", "deep bone defect beside the root"),
        "Clean below the gum and check again in three months.",
    ),
    Disease(
        "pericoronitis",
        (17, 30),
        ("lower",),
        ("third molar",),
        DAYS,
        ("pain behind the last tooth", "it is hard to open wide", "sore gum at the back", "pain when swallowing"),
        (
            "red gum flap over the crown",
            "pus under the gum flap",
            "tooth half through the gum",
            "bite marks on the flap",
        ),
        ("tooth tilted against its neighbour", "tooth partly in bone", "crown half covered by bone"),
        "Rinse under the flap, show how to clean it, decide later on the tooth.",
    ),
    Disease(
        "dentine hypersensitivity",
        (18, 65),
        BOTH,
        ("canine", "first premolar", "second premolar"),
        MONTHS,
        ("a sharp pain in cold air", "a quick sting with ice", "a brief pain when brushing", "cold water stings"),
        ("bare dentine at the neck", "worn neck of the tooth", "air gives a quick sharp pain", "no hole, no crack"),
        ("tooth and bone look normal", "no dark spot in the crown", "root tip and bone normal"),
        "Paste for sensitive teeth and a soft brush.",
    ),
    Disease(
        "alveolar osteitis",
        (18, 70),
        BOTH,
        ("first premolar", "second premolar", *MOLARS, "third molar"),
        DAYS,
        (
            "worse pain since the tooth was taken out",
            "deep ache where the tooth was",
            "pain to the ear, tooth taken out",
        ),
        ("no clot in the hole", "bare bone in the hole", "bad smell from the hole", "no pus and no swelling"),
        ("empty hole, no root left", "no piece of root left", "bone edge of the hole intact"),
        "Rinse the hole and place a dressing.",
    ),
)
HISTORIES = {
    "healthy": "",
    "no illness, no tablets": "",
    "smokes": "Advise to stop smoking.",
    "diabetes": "Ask about sugar control.",
    "blood thinner": "Ask about bleeding risk before surgery.",
    "penicillin allergy": "Record the allergy.",
}
QUESTIONS = ("What is your assessment and plan?", "Give assessment and plan.", "What is it, and what is done?")


def write_cases(path: Path, *, count: int, seed: int) -> None:
    """Write `count` cases as JSONL with `messages` and `condition`; each depends on the seed and its own index only."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for case in make_cases(count, seed=seed):
            file.write(json.dumps(case, ensure_ascii=False) + "\n")


def make_cases(count: int, *, seed: int) -> Iterator[dict]:
    """Yield the cases that `write_cases` writes; the conditions take turns."""
    for index in range(count):
        rng = random.Random(f"phantom case/{seed}/{index}")
        disease = DISEASES[index % len(DISEASES)]
        history = rng.choice(tuple(HISTORIES))
        messages = [
            {"role": "user", "content": _compose_prompt(disease, history, rng)},
            {"role": "assistant", "content": _compose_answer(disease, history)},
        ]
        yield {"messages": messages, "condition": disease.name, "synthetic": True}


def _compose_prompt(disease: Disease, history: str, rng: random.Random) -> str:
    tooth = f"{rng.choice(disease.jaws)} {rng.choice(('right', 'left'))} {rng.choice(disease.teeth)}"
    first, second = rng.sample(disease.findings, 2)
    lines = [
        f"Synthetic case: {rng.choice(('male', 'female'))}, {rng.randint(*disease.ages)} years.",
        f"Site: {tooth}.",
        f"Complaint: {rng.choice(disease.complaints)}, for {rng.choice(disease.lasting)}.",
        f"Findings: {first}; {second}.",
        f"X-ray: {rng.choice(disease.images)}.",
        f"History: {history}.",
        rng.choice(QUESTIONS),
    ]
    return "\n".join(lines)


def _compose_answer(disease: Disease, history: str) -> str:
    note = HISTORIES[history]
    return f"Assessment: {disease.name}.\nPlan: {disease.plan}" + (f"\nNote: {note}" if note else "")
