"""Every statement of a generated answer is carried by an annotation, and what is not carried is caught."""

import random
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from data_builders.claims import Claim, claims_from_json, claims_to_json, read_claims
from data_builders.compose.questions import DIALOGUE, FAMILIES, compose_pairs
from data_builders.compose.wording import Wording
from data_builders.reading import read_text
from data_builders.records import Finding, ImageRecord
from data_builders.sources import Family, load_vocabulary

VOCABULARY = load_vocabulary()
LEFT_MOLAR = ((0.75, 0.6), (0.85, 0.6), (0.85, 0.8), (0.75, 0.8))
RIGHT_MOLAR = ((0.15, 0.6), (0.25, 0.6), (0.25, 0.8), (0.15, 0.8))


# What may be asked of an image in which nothing has a place.
NOWHERE = {"diagnosis", "findings", "presence", "image_type", "follow_up", "urgency", "differential",
           "healthy_or_abnormal", "counting", "dialogue"}  # fmt: skip


def image(*findings, modality="panoramic", exhaustive=("caries", "infection")):
    return ImageRecord(Path("a.jpg"), "id", 10, 10, modality, "s", "g", None, exhaustive, findings)


def finding(number, label, ring=LEFT_MOLAR, **more):
    return Finding(f"f{number}", label, "box" if ring else "image", (ring,) if ring else (), **more)


def pairs(record, language="en", **options):
    return {
        p.question_type: p for p in compose_pairs(record, vocabulary=VOCABULARY, language=language, seed=1, **options)
    }


def test_claims_come_back_from_json():
    claims = (Claim("caries", 2, "left_mandibular", annotations=("a", "b")), Claim("infection", negated=True))

    assert claims_from_json(claims_to_json(claims)) == claims
    assert read_claims(claims_to_json(claims)).history == ()
    assert read_claims(claims_to_json(claims, [claims[:1], claims[1:]])).history == (claims[:1], claims[1:])
    with pytest.raises(ValueError, match="schema_version"):
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

    assert "no sign of caries or periapical infection" in composed["findings_location"].answer
    assert "no sign of caries or periapical infection" in composed["healthy_or_abnormal"].answer
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

    assert set(composed) == NOWHERE
    assert not any(claim.region or claim.side for pair in composed.values() for claim in pair.claims)


def test_a_label_without_geometry_gets_no_place():
    composed = pairs(image(finding(1, "caries", None)))

    assert set(composed) == NOWHERE
    assert not any(claim.region or claim.side for pair in composed.values() for claim in pair.claims)


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
        "28 of the 32 permanent teeth are present. Not present: teeth 18, 28, 38 and 48. "
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
    assert {*FAMILIES, DIALOGUE} == set(get_args(Family))  # what a sources file may name


def test_severity_is_said_only_where_it_is_graded():
    graded = pairs(image(finding(1, "caries", attributes={"severity": "Moderate"})))
    mixed = pairs(image(finding(1, "caries", attributes={"severity": "mild"}), finding(2, "caries")))

    assert graded["severity"].answer == "Severity: moderate."
    assert "severity" not in pairs(image(finding(1, "caries")))
    assert "severity" not in mixed


def test_the_side_of_a_photograph_cannot_be_determined():
    photograph = pairs(image(finding(1, "caries"), modality="intraoral_photo"))["side"]
    panoramic = pairs(image(finding(1, "caries")))["side"]

    assert photograph.answer.startswith("The side cannot be determined")
    assert panoramic.answer == "The finding is on the patient's left."
    assert "photograph" not in photograph.question and photograph.asks == panoramic.asks


@pytest.mark.parametrize(
    ("tooth", "answer"),
    [
        ("36", "FDI tooth 36, number 19 in the Universal system."),
        ("48", "FDI tooth 48, number 32 in the Universal system."),
        ("75", "FDI tooth 75."),  # deciduous teeth have letters there
    ],
)
def test_a_diseased_tooth_is_named_in_both_notations(tooth, answer):
    assert pairs(image(finding(1, "caries", tooth=tooth)))["tooth_number"].answer == answer


def test_a_region_and_its_counterpart_are_compared():
    record = image(
        finding(1, "caries", LEFT_MOLAR), finding(2, "caries", LEFT_MOLAR), finding(3, "infection", RIGHT_MOLAR)
    )
    answer = pairs(record)["comparison"].answer

    assert answer == (
        "Right mandibular region: a periapical infection; no sign of caries. "
        "Left mandibular region: two carious lesions; no sign of periapical infection."
    )
    assert "comparison" not in pairs(replace(record, exhaustive=()))  # nobody may say what a side does not have


def test_a_detectors_findings_are_possible_ones_and_deny_nothing():
    found = finding(1, "impacted_tooth", origin="model", confidence=0.8)
    for language, words in (("en", "a possible impacted tooth"), ("es", "un posible diente impactado")):
        composed = pairs(image(found, exhaustive=()), language)
        assert words in composed["findings_location"].answer
        assert composed["presence"].answer.startswith(("Possibly", "Posiblemente"))
        assert not any(claim.negated for pair in composed.values() for claim in pair.claims)
        assert all(claim.hedged for claim in composed["diagnosis"].claims)


def test_guidance_is_marked_as_general_and_follows_what_the_image_shows():
    composed = pairs(image(finding(1, "infection")))

    for family in ("follow_up", "urgency", "differential"):
        shown, _, advice = composed[family].answer.partition(" As general guidance, not about this patient: ")
        assert shown == "This panoramic radiograph shows periapical infection."
        assert advice == VOCABULARY["infection"].guidance[family].en
    two = pairs(image(finding(1, "infection"), finding(2, "caries")))
    assert not {"follow_up", "urgency", "differential"} & set(two)


def test_every_pathology_has_guidance_in_both_languages():
    for label, term in VOCABULARY.items():
        if term.kind == "pathology":
            assert set(term.guidance) == {"follow_up", "urgency", "differential"}, label
            for advice in term.guidance.values():
                for language in ("en", "es"):
                    read = read_text(getattr(advice, language), language, VOCABULARY)
                    assert not read.words_of_place and not read.modalities  # it fits any kind of picture


def test_an_impacted_tooth_is_not_called_absent():
    numbers = [f"{q}{p}" for q in (1, 2, 3, 4) for p in range(1, 8)]
    teeth = [finding(n, "tooth", tooth=tooth) for n, tooth in enumerate(numbers)]
    record = image(*teeth, finding(99, "impacted_tooth", tooth="38"), exhaustive=("tooth", "impacted_tooth"))

    assert "completeness" not in pairs(record)


def test_every_language_asks_the_same():
    for number in range(20):
        record = replace(image(finding(1, "caries"), finding(2, "infection", RIGHT_MOLAR)), image_id=f"i{number}")
        english, spanish = (
            [
                (pair.question_type, pair.asks, pair.claims)
                for pair in compose_pairs(record, vocabulary=VOCABULARY, language=language, seed=1)
            ]
            for language in ("en", "es")
        )
        assert english == spanish


def test_a_dialogue_asks_for_what_its_earlier_answers_do_not_tell():
    lone = pairs(image(finding(1, "caries")))["dialogue"]

    assert [turn.question_type for turn in lone.history] == ["diagnosis"]
    assert lone.question.startswith(("And", "In which"))
    several = pairs(image(finding(1, "caries"), finding(2, "infection")))["dialogue"]
    assert several.history[0].claims[0].label != several.claims[0].label


@pytest.mark.parametrize(
    ("language", "labels", "text"),
    [
        ("es", ["caries", "infection"], "caries e infección"),
        ("es", ["infection", "caries"], "infección periapical y caries"),
    ],
)
def test_spanish_and_changes_before_i(language, labels, text):
    words = Wording(language, VOCABULARY, random.Random(0))

    assert text in words.list(words.condition(label) for label in labels)
