"""The two-way proof: rows as they are composed pass, and whatever is changed in them is caught."""

import json
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_builders.claims import SEVERITY, Claim
from data_builders.compose.rows import balance, compose_rows
from data_builders.phantom import CONDITIONS, make_phantoms
from data_builders.proof import check_row, check_text
from data_builders.records import Finding, ImageRecord
from data_builders.sources import Source, SourcesFile, load_vocabulary

VOCABULARY = load_vocabulary()
KINDS = ("panoramic", "intraoral_photo", "flipped", "detector")


def sources():
    common = {"reader": "yolo", "root": Path(), "classes": {0: "caries"}, "modality": "panoramic"}
    return SourcesFile(
        path=Path("sources.yaml"), languages=("en", "es"), sources=[Source(name=kind, **common) for kind in KINDS]
    )


def records(count):
    """Phantoms as panoramics with every tooth, photographs with grades, flipped images, and a detector's findings."""
    rng = random.Random(5)
    for number, phantom in enumerate(make_phantoms(count, seed=9)):
        record = ImageRecord(
            path=Path(phantom.name), image_id=phantom.name, width=448, height=224, modality="panoramic",
            source="panoramic", group_id=f"g{number}", declared_split=None, exhaustive=(*CONDITIONS, "tooth"),
            findings=(*phantom.findings, *phantom.teeth),
        )  # fmt: skip
        kind = KINDS[number % 8] if number % 8 < len(KINDS) else "panoramic"
        diseases = tuple(replace(finding, tooth=None) for finding in phantom.findings)
        if kind == "intraoral_photo":
            grades = rng.choice(({}, {SEVERITY: "mild"}, {SEVERITY: "severe"}))
            graded = tuple(replace(finding, attributes=grades) for finding in diseases)
            record = replace(record, modality="intraoral_photo", findings=graded, exhaustive=CONDITIONS)
        elif kind == "flipped":
            record = replace(record, locations=False, findings=diseases, exhaustive=CONDITIONS)
        elif kind == "detector":
            found = tuple(replace(finding, origin="model", confidence=0.7) for finding in phantom.findings)
            record = replace(record, findings=found, exhaustive=())
        yield replace(record, source=kind)


@pytest.fixture(scope="module")
def composed():
    """More than 10,000 rows in two languages, each with the record of its image; composing proves them too."""
    loaded = sources()
    by_name = {source.name: source for source in loaded.sources}
    return [
        (row, pair, record)
        for record in records(270)
        for row, pair in compose_rows(record, by_name[record.source], loaded, seed=1)
    ]


def test_ten_thousand_rows_agree_with_their_annotations_both_ways(composed):
    wrong = [(row["completion"], found) for row, _, record in composed if (found := check_row(row, record, VOCABULARY))]

    assert len(composed) > 10_000
    assert wrong == []
    assert {row["language"] for row, _, _ in composed} == {"en", "es"}
    assert len({row["question_type"] for row, _, _ in composed}) == 22


def test_no_answer_can_be_had_from_its_question_beyond_the_stated_cap(composed):
    balanced = balance([(row, pair) for row, pair, _ in composed], cap=0.5)

    print("\nmajority-answer baseline per family, of", len(balanced.rows), "rows:")
    for family, share in balanced.baselines.items():
        print(f"  {family:<20} {share:.3f}")
    assert all(share <= 0.5 for share in balanced.baselines.values())
    # By the words of the questions too, where they are asked often enough to tell.
    asked: dict[str, Counter] = {}
    for row in balanced.rows:
        claims = re.sub(r'"annotations":\[[^]]*\],?', "", row["claims"])
        asked.setdefault(row["prompt"][-1]["content"], Counter())[claims] += 1
    often = {question: answers for question, answers in asked.items() if answers.total() >= 40}
    assert len(often) > 50
    assert max(answers.most_common(1)[0][1] / answers.total() for answers in often.values()) < 0.7


def test_yes_and_no_are_equally_many_for_each_condition(composed):
    balanced = {row["row_id"] for row in balance([(row, pair) for row, pair, _ in composed]).rows}
    verdicts = Counter(
        (row["source"], row["language"], pair.asks, pair.verdict)
        for row, pair, _ in composed
        if row["row_id"] in balanced and row["question_type"] == "presence"
    )

    assert verdicts
    for (source, language, asks, verdict), number in verdicts.items():
        assert verdicts[source, language, asks, not verdict] == number


# What is changed in the words: in each language, what stands there and what is put in its place.
SWAPS = {
    "en": {
        "side": {"right": "left", "left": "right"},
        "region": {
            "maxillary": "mandibular",
            "mandibular": "maxillary",
            "anterior": "right",
            "in the maxilla": "in the mandible",
            "in the mandible": "in the maxilla",
            "upper": "lower",
            "lower": "upper",
        },
        "negation": {
            "there is no sign of": "there are signs of",
            "no sign of": "visible",
            "shows no sign of": "shows",
            "No, ": "Yes, ",
            "Yes, ": "No, ",
            "Yes: ": "No, ",
            "Not present": "Present",
            "Abnormal:": "Nothing abnormal:",
            "Nothing abnormal": "Abnormal",
        },
        "count": {
            r"an? (?=FINDING)": "two ",
            r"two (?=FINDING)": "three ",
            r"three (?=FINDING)": "two ",
            r"four (?=FINDING)": "three ",
            r"\d+ (?=of the|FINDING|in the)": "9 ",
        },
        "modality": {"panoramic radiograph": "intraoral photograph", "intraoral photograph": "bitewing radiograph"},
        "severity": {
            "mild": "severe",
            "severe": "moderate",
            "cannot be determined from this image alone": "is severe",
        },
        "hedge": {"possible ": "", "Possible ": ""},
    },
    "es": {
        "side": {"derecha": "izquierda", "izquierda": "derecha", "derecho": "izquierdo", "izquierdo": "derecho"},
        "region": {
            "región maxilar": "región mandibular",
            "región mandibular": "región maxilar",
            "región maxilar anterior": "región maxilar derecha",
            "en el maxilar": "en la mandíbula",
            "en la mandíbula": "en el maxilar",
            "superior": "inferior",
            "inferior": "superior",
        },
        "negation": {
            "no hay signos de": "hay",
            "no muestra signos de": "muestra",
            "sin signos de": "con",
            "No, ": "Sí, ",
            "Sí, ": "No, ",
            "Sí: ": "No, ",
            "No están presentes": "Están presentes",
            "Anormal:": "Nada anormal:",
            "Nada anormal": "Anormal",
        },
        "count": {
            r"una? (?=FINDING)": "dos ",
            r"dos (?=FINDING)": "tres ",
            r"tres (?=FINDING)": "dos ",
            r"cuatro (?=FINDING)": "tres ",
            r"\d+ (?=de los|FINDING|en el|en la)": "9 ",
        },
        "modality": {
            "radiografía panorámica": "fotografía intraoral",
            "fotografía intraoral": "radiografía periapical",
        },
        "severity": {
            "leve": "grave",
            "grave": "moderada",
            "no se puede determinar solo con esta imagen": "es grave",
        },
        "hedge": {"posible ": "", "Posible ": "", "posibles ": ""},
    },
}
ANSWERS_ONLY = ("count", "severity", "negation", "hedge")  # a question states none of them
NAMES = {
    language: sorted(
        {name for term in VOCABULARY.values() for name in (getattr(term, language).one, getattr(term, language).other)},
        key=len,
        reverse=True,
    )
    for language in SWAPS
}
FINDING = {
    language: "(?:possible |posibles? )?(?:" + "|".join(map(re.escape, names)) + ")"
    for language, names in NAMES.items()
}
TEETH = {"en": r"((?:tooth|teeth) (?:\d\d, )*)(\d\d)", "es": r"(dientes? (?:\d\d, )*)(\d\d)"}
MARKER = {"en": "As general guidance", "es": "Como orientación general"}


def mutate_text(text, language, kind, number):
    """The text with one thing changed, or `None` where there is no such thing in it; `number` chooses among them."""
    if kind == "tooth":
        found = list(re.finditer(TEETH[language], text))
        spans = [(match.start(2), match.end(2), "18" if match[2] != "18" else "27") for match in found]
    elif kind == "universal":
        pattern = r"(\d+)(?= in the Universal| en el sistema universal)"
        spans = [(m.start(), m.end(), str(int(m[0]) % 32 + 1)) for m in re.finditer(pattern, text)]
    elif kind == "finding":
        known = rf"\b(?:{FINDING[language]})\b"
        spans = [(m.start(), m.end(), "gingivitis") for m in re.finditer(known, text)]
    else:
        spans = [
            (match.start(), match.end(), new)
            for old, new in SWAPS[language][kind].items()
            for match in re.finditer(rf"\b{old.replace('FINDING', FINDING[language])}", text)
        ]
    cut = text.find(MARKER[language])
    spans = [span for span in spans if cut < 0 or span[0] < cut]
    if not spans:
        return None
    start, end, new = spans[number % len(spans)]
    return text[:start] + new + text[end:]


def texts(row):
    """Where the words of a row are: every user and assistant turn."""
    turns = [message for message in (*row["prompt"], *row["completion"]) if message["role"] != "system"]
    return [(number, turn["role"] == "assistant") for number, turn in enumerate(turns)]


def with_text(row, number, change):
    """A copy of the row in which the turn `number` is changed, or `None`."""
    copied = json.loads(json.dumps(row))
    turn = [message for message in (*copied["prompt"], *copied["completion"]) if message["role"] != "system"][number]
    changed = change(turn["content"])
    if changed is None or changed == turn["content"]:
        return None
    turn["content"] = changed
    return copied


WORD_KINDS = ("side", "region", "negation", "count", "tooth", "universal", "finding", "modality", "severity", "hedge")


@pytest.mark.parametrize("kind", WORD_KINDS)
def test_a_changed_word_is_caught(composed, kind):
    """Every place of every third row at which a word of this kind can be exchanged."""
    tried, escaped = 0, []
    for row, _, record in composed[::3]:
        for number, is_answer in texts(row):
            if not is_answer and kind in ANSWERS_ONLY:
                continue
            seen = set()
            for position in range(12):
                changed = with_text(
                    row, number, lambda text, row=row, at=position: mutate_text(text, row["language"], kind, at)
                )
                if changed is None or (words := str(changed["prompt"]) + str(changed["completion"])) in seen:
                    continue
                seen.add(words)
                tried += 1
                if not check_row(changed, record, VOCABULARY):
                    escaped.append((row["question_type"], changed["prompt"][-1], changed["completion"]))

    assert tried > 20
    assert escaped == []


def mutate_claim(claim, field, rng):
    changed = dict(claim)
    if field == "label":
        changed["label"] = rng.choice([name for name in VOCABULARY if name != claim["label"]])
    elif field == "region":
        changed["region"] = rng.choice([r for r in ("left_maxillary", "right_mandibular") if r != claim.get("region")])
    elif field == "side":
        changed["side"] = "left" if claim.get("side") == "right" else "right"
    elif field == "count":
        changed["count"] = claim.get("count", 1) + 1
    elif field == "tooth":
        changed["tooth"] = "18" if claim.get("tooth") != "18" else "27"
    elif field == "negated":
        changed["negated"] = not claim.get("negated", False)
    elif field == "annotations":
        changed["annotations"] = [*claim.get("annotations", ()), "another"]
    elif field == "severity":
        changed["severity"] = "moderate"
    elif field == "hedged":
        changed["hedged"] = not claim.get("hedged", False)
    elif field == "modality":
        changed["modality"] = "periapical"
    return changed


FIELDS = ("label", "region", "side", "count", "tooth", "negated", "annotations", "severity", "hedged", "modality")


@pytest.mark.parametrize("field", FIELDS)
def test_a_changed_claim_is_caught(composed, field):
    rng = random.Random(field)
    for row, _, record in composed[::5]:
        document = json.loads(row["claims"])
        at = rng.randrange(len(document["claims"]))
        document["claims"][at] = mutate_claim(document["claims"][at], field, rng)
        changed = {**row, "claims": json.dumps(document)}

        assert check_row(changed, record, VOCABULARY), (row["question_type"], document["claims"][at])


@settings(derandomize=True, deadline=None, max_examples=600)
@given(data=st.data())
def test_no_change_drawn_at_random_passes(composed, data):
    row, _, record = composed[data.draw(st.integers(0, len(composed) - 1), label="row")]
    kind = data.draw(st.sampled_from((*WORD_KINDS, *FIELDS)), label="what is changed")
    if kind in FIELDS and data.draw(st.booleans(), label="in the claims"):
        document = json.loads(row["claims"])
        at = data.draw(st.integers(0, len(document["claims"]) - 1))
        document["claims"][at] = mutate_claim(document["claims"][at], kind, random.Random(at))
        changed = {**row, "claims": json.dumps(document)}
    elif kind in WORD_KINDS:
        turns = [number for number, is_answer in texts(row) if is_answer or kind not in ANSWERS_ONLY]
        number = data.draw(st.sampled_from(turns), label="turn")
        at = data.draw(st.integers(0, 11), label="place")
        changed = with_text(row, number, lambda text: mutate_text(text, row["language"], kind, at))
    else:
        changed = None
    if changed is not None:
        assert check_row(changed, record, VOCABULARY)


def test_words_and_claims_that_lie_together_are_caught_by_the_annotations(composed):
    tried = 0
    for row, _, record in composed[::2]:
        if row["question_type"] != "location" or row["language"] != "en":
            continue
        region = json.loads(row["claims"])["claims"][0]["region"]
        other = "left_maxillary" if region != "left_maxillary" else "right_mandibular"
        changed = json.loads(json.dumps(row).replace(region, other))
        changed["completion"][0]["content"] = f"In the {other.replace('_', ' ')} region."

        assert check_row(changed, record, VOCABULARY)
        tried += 1
    assert tried > 30


def test_the_record_of_another_image_does_not_carry_a_row(composed):
    by_image = {record.image_id: record for _, _, record in composed}
    identities = list(by_image)
    for row, _, record in composed[:3000]:
        other = by_image[identities[(identities.index(record.image_id) + 8) % len(identities)]]
        if (
            row["question_type"] in ("location", "side", "quadrant", "structured_report")
            and other.source == record.source
        ):
            assert check_row(row, other, VOCABULARY)


@pytest.mark.parametrize(
    ("question", "answer", "says"),
    [
        ("Is there caries on this panoramic radiograph?", "Yes, it shows caries and gingivitis.", "gingivitis"),
        ("Is there caries on this panoramic radiograph?", "Yes, it shows severe caries.", "severe"),
        ("Is there caries on this panoramic radiograph?", "Yes, it shows caries on the left.", "left"),
        ("Is there caries on this x-ray of tooth 36?", "Yes, it shows caries.", "teeth"),
        ("Is there caries on this photograph?", "Yes, it shows caries.", "intraoral_photo"),
        ("Is there caries in the left mandibular region?", "Yes, it shows caries.", "left_mandibular"),
    ],
)
def test_what_no_claim_states_may_not_be_said(question, answer, says):
    ring = ((0.75, 0.6), (0.85, 0.6), (0.85, 0.8), (0.75, 0.8))
    record = ImageRecord(
        Path("a"), "a", 100, 50, "panoramic", "s", "g", None, (), (Finding("f", "caries", "box", (ring,)),)
    )
    claims = (Claim("caries", annotations=("f",)),)

    assert check_text("Is there caries?", "Yes, it shows caries.", claims, record, "en", VOCABULARY) == []
    assert says in " ".join(check_text(question, answer, claims, record, "en", VOCABULARY))
