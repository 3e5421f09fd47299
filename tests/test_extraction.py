import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dentalgemma.evaluation.extraction import extract

CASES = [
    json.loads(line)
    for line in (Path(__file__).parent / "data/extraction_public.jsonl").read_text("utf-8").splitlines()
]
FINDINGS = {"A": "Dental caries", "B": "Periapical abscess", "C": "Impacted tooth", "D": "Periodontal bone loss"}


def test_all_public_cases_are_there():
    assert len(CASES) == 61


@pytest.mark.parametrize("case", [pytest.param(case, id=case["id"]) for case in CASES])
def test_a_public_case_is_read_as_the_protocol_says(case):
    assert list(extract(case["output"], case["options"])) in case["accept"]


@given(st.text(), st.dictionaries(st.sampled_from("ABCDE"), st.text()))
def test_no_output_raises_and_a_letter_is_always_one_of_the_options(output, options):
    letter, method = extract(output, options)

    assert letter in {*options, None}
    assert (letter is None) == (method == "failed")


@given(st.text(alphabet=" ABCD.*:()\nàé²4caries", max_size=40))
def test_answers_made_of_letters_and_marks_never_leave_the_options(output):
    assert extract(output, {"B": "caries", "C": ""}).letter in {"B", "C", None}


def test_a_letter_that_is_no_option_is_passed_over():
    assert extract("an impacted tooth, D", {"A": "Impacted tooth", "B": "Caries"}) == ("A", "option_text")


@pytest.mark.parametrize("output", ["", " \n", "​"])
def test_an_empty_answer_does_not_choose_an_empty_option(output):
    assert extract(output, {"A": "Caries", "D": ""}) == (None, "failed")


def test_the_last_of_several_mentioned_options_wins():
    assert extract("not dental caries but a periapical abscess", FINDINGS) == ("B", "option_text")


def test_markdown_around_an_option_does_not_hide_it():
    assert extract("this is _impacted tooth_ here", FINDINGS) == ("C", "option_text")


def test_an_answer_that_runs_on_is_read_in_no_time():
    assert extract("the " * 50_000, FINDINGS) == (None, "failed")
    assert extract("dental caries " * 50_000, FINDINGS) == ("A", "option_text")


def test_an_unknown_protocol_is_refused_with_those_that_exist():
    with pytest.raises(ValueError, match="'lenient' does not exist; there is seed"):
        extract("A", FINDINGS, protocol="lenient")
