import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dentalgemma.evaluation.extraction import BEHAVIOUR, PROTOCOL_LABELS, PROTOCOLS, extract

DATA = Path(__file__).parent / "data"
CASES, STRICT_CASES = (
    [json.loads(line) for line in (DATA / name).read_text("utf-8").splitlines()]
    for name in ("extraction_public.jsonl", "extraction_strict.jsonl")
)
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


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_protocol_reads_the_cases_as_it_always_did(protocol):
    outcomes = [extract(case["output"], case["options"], protocol, key=case["id"]) for case in CASES + STRICT_CASES]
    behaviour = hashlib.sha256(json.dumps(outcomes).encode()).hexdigest()

    assert behaviour == BEHAVIOUR[protocol], (
        f"{PROTOCOL_LABELS[protocol]} is frozen: a changed rule is a new protocol version, with a name of its own"
    )


def test_every_protocol_has_a_version_and_a_pinned_behaviour():
    assert PROTOCOL_LABELS.keys() == PROTOCOLS.keys() == BEHAVIOUR.keys()


@pytest.mark.parametrize(
    ("output", "letter", "method"),
    [
        pytest.param("(C)", "C", "bracketed_letter", id="brackets"),
        pytest.param("The answer is B", "B", "lone_letter", id="letter"),
        pytest.param("B. Periapical abscess", "B", "lone_letter", id="letter and text"),
        pytest.param("D or (B) or (A)", "B", "bracketed_letter", id="brackets first, then the first of several"),
        pytest.param("It is Impacted tooth", "C", "option_text", id="text, case and all"),
        pytest.param("A periapical view, answer D ", "A", "lone_letter", id="an article counts as well"),
    ],
)
def test_official_infers_a_letter_as_the_benchmark_does(output, letter, method):
    assert extract(output, FINDINGS, "official") == (letter, method)


@pytest.mark.parametrize("output", ["impacted tooth", "b", "", "**C**", "B. because"])
def test_official_draws_a_letter_where_it_finds_none_and_always_the_same_for_an_item(output):
    drawn = [extract(output, FINDINGS, "official", key=str(number)) for number in range(400)]

    assert drawn == [extract(output, FINDINGS, "official", key=str(number)) for number in range(400)]
    assert {method for _, method in drawn} == {"random_letter"}
    # 100 of each expected; 60 and 140 are more than four standard deviations away
    assert all(60 < number < 140 for number in Counter(letter for letter, _ in drawn).values())


def test_official_does_not_find_an_empty_option_in_every_text():
    assert extract("dominant", {"A": "", "B": "dominant"}, "official") == ("B", "option_text")
