"""Clinical figures, on questions made by hand so that every count can be checked on paper."""

import pytest

from data_builders.dentition import REGIONS
from dentalgemma.evaluation.clinical import HEALTHY, clinical_figures
from dentalgemma.evaluation.extraction import Extraction
from dentalgemma.evaluation.questions import EvaluationError, Question
from dentalgemma.evaluation.statistics import wilson_interval

LETTERS = "ABCD"


def ask(asked):
    """Questions of `(values, right value, chosen value or None)`, with the letters they stand for."""
    items, extractions = [], {}
    for number, (values, right, chosen) in enumerate(asked):
        letters = dict(zip(LETTERS, values.split(), strict=False))
        by_value = {value: letter for letter, value in letters.items()}
        item = Question(str(number), "?", by_value[right], letters, option_values=letters)
        items.append(item)
        extractions[item.item_id] = Extraction(by_value.get(chosen), "end_letter" if chosen else "failed")
    return items, extractions


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
    assert (caries["n_with"], caries["sensitivity"]) == (3, pytest.approx(1 / 3))
    assert (caries["n_without"], caries["specificity"]) == (2, 0.5)
    assert caries["sensitivity_wilson"] == pytest.approx(wilson_interval(1, 3))
    infection = findings["infection"]
    assert (infection["n_with"], infection["sensitivity"]) == (2, 0.5)
    assert (infection["n_without"], infection["specificity"]) == (3, pytest.approx(2 / 3))
    # Offered, but never there: no sensitivity can be given, rather than one of 0.
    assert findings["root"] == {
        "n_with": 0, "n_without": 1, "sensitivity": None, "sensitivity_wilson": None,
        "specificity": 1.0, "specificity_wilson": list(wilson_interval(1, 1)),
    }  # fmt: skip


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

    assert figures["missed_pathology"] == {
        "n": 4, "missed": 2, "share": 0.5, "wilson": list(wilson_interval(2, 4)), "unread": 1
    }  # fmt: skip
    assert figures["over_call"] == {
        "n": 3, "over_called": 1, "share": pytest.approx(1 / 3), "wilson": list(wilson_interval(1, 3)), "unread": 1
    }  # fmt: skip
    assert figures["abstentions"] == {
        "n": 8, "abstained": 3, "share": 0.375, "wilson": list(wilson_interval(3, 8))
    }  # fmt: skip
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
    assert regions["mirrored"] == {"n": 4, "mirrored": 1, "share": 0.25, "wilson": list(wilson_interval(1, 4))}


def test_a_letter_that_was_drawn_or_states_nothing_is_no_clinical_call():
    items, _ = ask([("caries cyst", "caries", "caries")] * 2)
    extractions = {"0": Extraction("A", "random_letter"), "1": Extraction("D", "end_letter")}

    figures = clinical_figures(items, extractions)

    assert figures["abstentions"]["abstained"] == 2
    assert figures["findings"]["caries"]["sensitivity"] == 0
    assert figures["findings"]["cyst"]["specificity"] == 1


def test_questions_that_do_not_say_what_their_options_state_have_no_clinical_figures():
    plain = Question("0", "?", "A", {"A": "x", "B": "y"})

    assert clinical_figures([plain], {"0": Extraction("A", "end_letter")}) is None
    with pytest.raises(EvaluationError, match="item 1: option_values do not say what its right option, A, states"):
        clinical_figures(
            [Question("1", "?", "A", {"A": "x", "B": "y"}, option_values={"B": "cyst"})],
            {"1": Extraction("A", "end_letter")},
        )
