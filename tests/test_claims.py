"""Every statement of a generated answer is carried by an annotation, and what is not carried is caught."""

import random
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from data_builders.claims import Claim, check_claims, claims_from_json, claims_to_json, place_findings
from data_builders.compose.questions import FAMILIES, compose_pairs
from data_builders.dentition import REGIONS
from data_builders.phantom import CONDITIONS, make_phantoms
from data_builders.records import Finding, ImageRecord
from data_builders.sources import Family, load_vocabulary

VOCABULARY = load_vocabulary()
LEFT_MOLAR = ((0.75, 0.6), (0.85, 0.6), (0.85, 0.8), (0.75, 0.8))
RIGHT_MOLAR = ((0.15, 0.6), (0.25, 0.6), (0.25, 0.8), (0.15, 0.8))


def image(*findings, modality="panoramic", exhaustive=("caries", "infection")):
    return ImageRecord(Path("a.jpg"), "id", 10, 10, modality, "s", "g", None, exhaustive, findings)


def finding(number, label, ring=LEFT_MOLAR, **more):
    return Finding(f"f{number}", label, "box" if ring else "image", (ring,) if ring else (), **more)


def pairs(record, language="en", **options):
    return {
        p.question_type: p for p in compose_pairs(record, vocabulary=VOCABULARY, language=language, seed=1, **options)
    }


def phantom_records(count):
    for phantom in make_phantoms(count, seed=9):
        yield ImageRecord(
            Path(phantom.name), phantom.name, 448, 224, "panoramic", "s", "g", None, (*CONDITIONS, "tooth"),
            (*phantom.findings, *phantom.teeth),
        )  # fmt: skip


@pytest.mark.parametrize("language", ["en", "es"])
def test_every_claim_of_every_phantom_is_carried(language):
    number = 0
    for record in phantom_records(60):
        placed = place_findings(record)
        for pair in compose_pairs(record, vocabulary=VOCABULARY, language=language, seed=1):
            assert pair.claims
            assert check_claims(pair.claims, placed, record.exhaustive) == []
            assert "{" not in pair.question + pair.answer
            number += 1
    assert number > 400


def test_a_wrong_claim_is_caught():
    """Each mutation changes what is stated; none may pass."""
    rng = random.Random(0)
    caught = 0
    for record in phantom_records(30):
        placed = place_findings(record)
        for pair in compose_pairs(record, vocabulary=VOCABULARY, language="en", seed=1):
            for claim in pair.claims:
                wrong = mutate(claim, rng)
                assert check_claims([wrong], placed, record.exhaustive), f"{wrong} passed for {claim}"
                caught += 1
    assert caught > 500


def mutate(claim, rng):
    if claim.negated:
        return replace(claim, label="gingivitis")
    choices = [replace(claim, negated=True), replace(claim, annotations=(*claim.annotations, "another"))]
    if claim.count is not None:
        choices.append(replace(claim, count=claim.count + 1))
    if claim.region:
        choices.append(replace(claim, region=rng.choice([r for r in REGIONS if r != claim.region])))
    if claim.label in CONDITIONS:
        choices.append(replace(claim, label=rng.choice([c for c in CONDITIONS if c != claim.label])))
    return rng.choice(choices)


def test_claims_come_back_from_json():
    claims = (Claim("caries", 2, "left_mandibular", annotations=("a", "b")), Claim("infection", negated=True))

    assert claims_from_json(claims_to_json(claims)) == claims
    with pytest.raises(ValueError, match="schema version 99"):
        claims_from_json('{"schema_version":99,"claims":[]}')


def test_absence_is_stated_only_of_what_is_annotated_exhaustively():
    composed = list(compose_pairs(image(finding(1, "caries")), vocabulary=VOCABULARY, language="en", seed=1))
    denied = {claim.label for pair in composed for claim in pair.claims if claim.negated}

    assert denied == {"caries", "infection"}  # caries in the regions where there is none
    nothing_known = image(finding(1, "caries"), exhaustive=())
    assert not any(
        claim.negated
        for pair in compose_pairs(nothing_known, vocabulary=VOCABULARY, language="en", seed=1)
        for claim in pair.claims
    )


def test_an_image_with_only_sound_teeth_is_not_called_healthy():
    composed = pairs(image(finding(1, "healthy_tooth")))

    assert "no sign of caries or periapical infection" in composed["findings"].answer
    assert not any("healthy patient" in pair.answer or "healthy mouth" in pair.answer for pair in composed.values())


def test_the_patients_left_is_on_the_images_right():
    composed = pairs(image(finding(1, "caries", LEFT_MOLAR)))

    assert "left mandibular region" in composed["findings_location"].answer
    assert composed["location"].answer == "In the left mandibular region."


def test_a_report_names_what_the_other_regions_do_not_have():
    report = pairs(image(finding(1, "caries", LEFT_MOLAR), finding(2, "caries", RIGHT_MOLAR)))["structured_report"]

    assert report.answer.splitlines() == [
        "- Right mandibular region: a carious lesion.",
        "- Left mandibular region: a carious lesion.",
        "There is no sign of caries or periapical infection in the other regions.",
    ]


@pytest.mark.parametrize("language", ["en", "es"])
def test_photographs_have_no_sides_and_are_no_radiographs(language):
    record = image(finding(1, "caries"), finding(2, "healthy_tooth", RIGHT_MOLAR), modality="intraoral_photo")
    text = " ".join(pair.question + " " + pair.answer for pair in pairs(record, language).values()).casefold()

    for word in ("right", "left", "derech", "izquierd", "x-ray", "radiograph", "radiograf", "region", "región"):
        assert word not in text
    assert ("photograph" if language == "en" else "fotografía") in text


def test_mosaics_and_flipped_images_get_no_places():
    composed = pairs(replace(image(finding(1, "caries")), locations=False))

    assert set(composed) == {"diagnosis", "findings", "presence"}
    assert not any(claim.region for pair in composed.values() for claim in pair.claims)


def test_a_label_without_geometry_gets_no_place():
    assert set(pairs(image(finding(1, "caries", None)))) == {"diagnosis", "findings", "presence"}


@pytest.mark.parametrize(
    ("language", "answer"),
    [
        ("en", "two impacted teeth in the left mandibular region"),
        ("es", "dos dientes impactados en la región mandibular izquierda"),
    ],
)
def test_number_and_gender_agree(language, answer):
    record = image(finding(1, "impacted_tooth"), finding(2, "impacted_tooth"))

    assert answer in pairs(record, language)["findings_location"].answer


def test_articles_agree():
    record = image(finding(1, "impacted_tooth"), finding(2, "caries", RIGHT_MOLAR))

    assert "a carious lesion in the right" in pairs(record)["findings_location"].answer
    assert "an impacted tooth in the left" in pairs(record)["findings_location"].answer
    assert "una lesión de caries en la región mandibular derecha" in pairs(record, "es")["findings_location"].answer


def test_completeness_counts_teeth_and_excuses_third_molars():
    numbers = [f"{q}{p}" for q in (1, 2, 3, 4) for p in range(1, 8)]
    teeth = [finding(n, "tooth", tooth=tooth) for n, tooth in enumerate(numbers)]
    pair = pairs(image(*teeth, exhaustive=("tooth",)))["completeness"]

    assert pair.answer == (
        "Permanent teeth present: 28 of 32. Not present: teeth 18, 28, 38 and 48. "
        "Only third molars are absent, which is no pathology."
    )
    assert "completeness" not in pairs(image(*teeth, exhaustive=()))
    twice = image(*teeth, finding(99, "tooth", tooth="11"), exhaustive=("tooth",))
    assert "completeness" not in pairs(twice)  # one of the two is some other tooth


def test_the_same_image_always_gets_the_same_pairs():
    record = image(finding(1, "caries"))
    first, again = (list(compose_pairs(record, vocabulary=VOCABULARY, language="en", seed=4)) for _ in "ab")
    others = [tuple(compose_pairs(record, vocabulary=VOCABULARY, language="en", seed=seed)) for seed in range(8)]

    assert first == again
    assert len(set(others)) > 1
    assert tuple(FAMILIES) == get_args(Family)  # what a sources file may name
