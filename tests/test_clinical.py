"""Clinical figures, on questions made by hand so that every count can be checked on paper."""

import pytest

from data_builders.dentition import REGIONS
from dentalgemma.evaluation.clinical import HEALTHY, clinical_figures
from dentalgemma.evaluation.extraction import Extraction
from dentalgemma.evaluation.questions import EvaluationError, Question
from dentalgemma.evaluation.statistics import bootstrap_interval, wilson_interval

LETTERS = "ABCD"


def ask(asked, *, images=None, **more):
    """Questions of `(values, right value, chosen value or None)`, with the letters they stand for."""
    items, extractions = [], {}
    for number, (values, right, chosen) in enumerate(asked):
        letters = dict(zip(LETTERS, values.split(), strict=False))
        by_value = {value: letter for letter, value in letters.items()}
        own = more | ({"image_id": images[number]} if images else {})
        item = Question(str(number), "?", by_value[right], letters, option_values=letters, **own)
        items.append(item)
        extractions[item.item_id] = Extraction(by_value.get(chosen), "end_letter" if chosen else "failed")
    return items, extractions


def pick(figure, *names):
    return {name: figure[name] for name in names}


def test_sensitivity_and_specificity_are_counted_over_the_questions_with_and_without_a_finding():
    asked = [
        ("caries infection cyst", "caries", "caries"),
        ("caries infection cyst", "caries", "infection"),
        ("caries infection cyst", "caries", None),  # unread: the caries is missed, and no infection is called
        ("caries infection cyst", "infection", "infection"),
        ("caries infection root", "infection", "caries"),
    ]

    findings = clinical_figures(*ask(asked))["findings"]

    caries = findings["caries"]
    assert caries["images_with"] == 0  # these questions have none
    assert (caries["n_with"], caries["sensitivity"]) == (3, pytest.approx(1 / 3))
    assert (caries["n_without"], caries["specificity"]) == (2, 0.5)
    assert caries["sensitivity_wilson"] == pytest.approx(wilson_interval(1, 3))
    infection = findings["infection"]
    assert (infection["n_with"], infection["sensitivity"]) == (2, 0.5)
    assert (infection["n_without"], infection["specificity"]) == (3, pytest.approx(2 / 3))
    # Offered, but never there: no sensitivity can be given, rather than one of 0.
    root = findings["root"]
    assert (root["n_with"], root["sensitivity"], root["sensitivity_wilson"]) == (0, None, None)
    assert (root["sensitivity_chance"], root["sensitivity_no_interval_by_image"]) == (None, "nothing was asked")
    assert (root["n_without"], root["specificity"]) == (1, 1)
    assert root["specificity_wilson"] == list(wilson_interval(1, 1))


def test_missed_pathology_and_over_call_are_counted_where_healthy_was_offered():
    sick, sound = f"caries cyst {HEALTHY}", f"{HEALTHY} caries cyst infection"
    asked = [
        (sick, "caries", "caries"),
        (sick, "caries", "cyst"),  # the wrong disease, but not missed
        (sick, "cyst", HEALTHY),
        (sick, "cyst", None),
        ("caries cyst root", "caries", None),  # healthy was not offered
        (sound, HEALTHY, HEALTHY),
        (sound, HEALTHY, "caries"),
        (sound, HEALTHY, None),
    ]

    figures = clinical_figures(*ask(asked))

    missed, called, abstained = (figures[name] for name in ("missed_pathology", "over_call", "abstentions"))
    assert pick(missed, "n", "missed", "share", "unread") == {"n": 4, "missed": 2, "share": 0.5, "unread": 1}
    assert missed["wilson"] == list(wilson_interval(2, 4))
    assert pick(called, "n", "over_called", "unread") == {"n": 3, "over_called": 1, "unread": 1}
    assert (called["share"], called["wilson"]) == (pytest.approx(1 / 3), list(wilson_interval(1, 3)))
    assert pick(abstained, "n", "abstained", "share") == {"n": 8, "abstained": 3, "share": 0.375}
    # A guess is healthy in one of three, and a disease in three of four.
    assert missed["chance"] == pytest.approx(1 / 3)
    assert called["chance"] == pytest.approx(3 / 4)
    assert abstained["chance"] == 0
    assert HEALTHY not in figures["findings"]
    assert figures["regions"] is None


def test_regions_are_confused_by_truth_and_choice_and_the_other_side_is_counted_where_it_was_offered():
    both = "right_maxillary left_maxillary right_mandibular anterior_mandibular"
    asked = [
        (both, "right_maxillary", "right_maxillary"),
        (both, "right_maxillary", "left_maxillary"),  # mirrored
        (both, "right_maxillary", "right_mandibular"),  # the right side, the wrong jaw
        (both, "left_maxillary", None),
        (both, "right_mandibular", "anterior_mandibular"),  # its mirror image was not offered
        (both, "anterior_mandibular", "anterior_mandibular"),  # has none
    ]

    regions = clinical_figures(*ask(asked))["regions"]

    place = {region: number for number, region in enumerate(regions["labels"])}
    assert regions["labels"] == list(REGIONS)
    assert regions["counts"][place["right_maxillary"]][place["left_maxillary"]] == 1
    assert regions["counts"][place["left_maxillary"]][place["right_maxillary"]] == 0
    assert (regions["n"], sum(map(sum, regions["counts"])), regions["unread"]) == (6, 5, 1)
    assert pick(regions["mirrored"], "n", "mirrored", "share", "chance") == {
        "n": 4, "mirrored": 1, "share": 0.25, "chance": 0.25
    }  # fmt: skip
    assert regions["mirrored"]["wilson"] == list(wilson_interval(1, 4))


def test_a_letter_that_was_drawn_or_states_nothing_is_no_clinical_call():
    items, _ = ask([("caries cyst", "caries", "caries")] * 2)
    extractions = {"0": Extraction("A", "random_letter"), "1": Extraction("D", "end_letter")}

    figures = clinical_figures(items, extractions)

    assert pick(figures["abstentions"], "abstained", "no_letter", "states_nothing") == {
        "abstained": 2, "no_letter": 1, "states_nothing": 1
    }  # fmt: skip
    assert figures["findings"]["caries"]["sensitivity"] == 0
    assert figures["findings"]["cyst"]["specificity"] == 1


def test_a_label_beside_a_region_makes_no_question_of_regions():
    figures = clinical_figures(*ask([("caries right_maxillary", "caries", "caries")]))

    assert figures["regions"] is None
    assert figures["findings"]["caries"]["sensitivity"] == 1


def test_two_languages_are_two_questions_on_one_image_and_widen_no_sample():
    """Each answer comes twice: Wilson takes that for twice the sample, the interval by image does not."""
    values, chosen = "caries cyst root infection", ["caries"] * 6 + ["cyst"] * 4
    asked = [(values, "caries", own) for own in chosen]
    images = [f"i{number}" for number in range(10)]

    once = clinical_figures(*ask(asked, images=images))["findings"]["caries"]
    twice = clinical_figures(*ask(asked * 2, images=images * 2))["findings"]["caries"]

    assert (once["n_with"], once["images_with"]) == (10, 10)
    assert (twice["n_with"], twice["images_with"]) == (20, 10)
    assert twice["sensitivity_interval_by_image"] == once["sensitivity_interval_by_image"]
    assert twice["sensitivity_wilson"][0] > once["sensitivity_wilson"][0]
    correct = [own == "caries" for own in chosen]
    assert once["sensitivity_interval_by_image"] == list(bootstrap_interval(correct, images))
    # The same for the other figures.
    figures = clinical_figures(*ask([(f"{HEALTHY} caries", HEALTHY, "caries")] * 4, images=["a", "b"] * 2))
    assert pick(figures["over_call"], "n", "images", "clusters") == {"n": 4, "images": 2, "clusters": "image"}
    assert figures["abstentions"]["images"] == 2


def test_one_image_has_no_clinical_interval_by_image_and_the_reason_stands_there():
    asked = [("caries cyst", "caries", "caries"), ("caries cyst", "caries", "cyst")]

    caries = clinical_figures(*ask(asked, images=["a", "a"]))["findings"]["caries"]

    assert caries["sensitivity_interval_by_image"] is None
    assert "one image" in caries["sensitivity_no_interval_by_image"]


def test_the_images_of_one_patient_are_resampled_together():
    asked = [("caries cyst", "caries", "caries"), ("caries cyst", "caries", "cyst")]

    caries = clinical_figures(*ask(asked, images=["a", "b"], group_id="patient"))["findings"]["caries"]

    assert (caries["images_with"], caries["sensitivity_clusters"]) == (2, "group")
    assert "one group" in caries["sensitivity_no_interval_by_image"]


def test_chance_is_that_of_a_guess_among_the_options_that_were_shown():
    four, two = "caries cyst root infection", "caries cyst"
    items, extractions = ask([(four, "caries", "caries"), (two, "caries", "caries"), (four, "cyst", "cyst")])
    # An empty option is not shown: a guess takes one of the three others.
    shown = {"A": "caries", "B": "cyst", "C": "root", "D": " "}
    empty = Question("3", "?", "A", shown, option_values={"A": "caries", "B": "cyst", "C": "root"})

    caries = clinical_figures([*items, empty], {**extractions, "3": Extraction(None, "failed")})["findings"]["caries"]

    assert caries["sensitivity_chance"] == pytest.approx((1 / 4 + 1 / 2 + 1 / 3) / 3)
    assert caries["specificity_chance"] == pytest.approx(3 / 4)


def test_questions_that_do_not_say_what_their_options_state_have_no_clinical_figures():
    plain = Question("0", "?", "A", {"A": "x", "B": "y"})

    assert clinical_figures([plain], {"0": Extraction("A", "end_letter")}) is None
    with pytest.raises(EvaluationError, match="item 1: option_values do not say what its right option, A, states"):
        clinical_figures(
            [Question("1", "?", "A", {"A": "x", "B": "y"}, option_values={"B": "cyst"})],
            {"1": Extraction("A", "end_letter")},
        )
