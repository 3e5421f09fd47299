import json
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dentalgemma.evaluation.extraction import PROTOCOLS, extract

DATA = Path(__file__).parent / "data"
FINDINGS = {"A": "Dental caries", "B": "Periapical abscess", "C": "Impacted tooth", "D": "Periodontal bone loss"}
HALLAZGOS = {"A": "Caries dental", "B": "Absceso periapical", "C": "Diente impactado", "D": "Pérdida ósea periodontal"}


def read_cases(name):
    return [json.loads(line) for line in (DATA / name).read_text("utf-8").splitlines() if line.strip()]


PUBLIC = read_cases("extraction_public.jsonl")
OWN = read_cases("extraction_strict.jsonl")
LETTERS = st.sampled_from(["A", "B", "C", "D", "E", "a", "b", "(C)", "**D**", "B.", "c)", "'A'"])
PHRASES = (
    "the answer is|la respuesta es|not|no|sino|but|or|o|and|y|option|opción|I choose|elijo|,|.|:|\n|<answer>|</answer>"
    "|<think>|</think>|\\boxed{|}|{|\"|'|🦷|vitamin|°C|because|correct|incorrecta|is|Dental caries|Impacted tooth|1"
)
WORDS = st.sampled_from(PHRASES.split("|"))


def test_strict_agrees_with_a_careful_reader_on_the_public_cases():
    agreed = sum(
        extract(case["output"], case["options"], "strict").letter == case["intended_letter"] for case in PUBLIC
    )

    assert len(PUBLIC) == 61
    assert agreed >= 58


def test_strict_agrees_with_a_careful_reader_on_cases_written_by_another():
    cases = read_cases("extraction_held_out.jsonl")
    agreed = sum(extract(case["output"], case["options"], "strict").letter == case["intended_letter"] for case in cases)

    assert len(cases) == 60
    assert agreed >= 54


@pytest.mark.parametrize("case", [pytest.param(case, id=case["id"]) for case in OWN])
def test_strict_takes_what_a_careful_reader_would(case):
    assert extract(case["output"], case["options"], "strict").letter == case["intended_letter"]


@pytest.mark.parametrize(
    ("output", "letter", "method"),
    [
        pytest.param("The answer is B because the apex is dark", "B", "declared", id="phrase"),
        pytest.param("so it is \\boxed{\\text{C}}", "C", "boxed", id="latex"),
        pytest.param("<answer>D</answer>", "D", "tagged", id="tag"),
        pytest.param('{"reasoning": "not A", "answer": "B"}', "B", "json", id="json"),
        pytest.param("C) Impacted tooth", "C", "bare_letter", id="opens with a letter"),
        pytest.param("One sees an impacted tooth here", "C", "option_text", id="text"),
        pytest.param("Periapical abcess", "B", "similar_text", id="spelling"),
        pytest.param("A or B", None, "abstained", id="two at once"),
        pytest.param("I cannot see the image", None, "abstained", id="refusal"),
        pytest.param("2", None, "failed", id="nothing"),
    ],
)
def test_the_rule_that_decided_is_named(output, letter, method):
    assert extract(output, FINDINGS, "strict") == (letter, method)


@pytest.mark.parametrize("name", ["vitamin", "hepatitis", "Type", "Kennedy class", "4 °", "Figure", "vitamina", "tipo"])
@pytest.mark.parametrize("letter", "ABCD")
def test_a_capital_that_is_part_of_a_name_is_no_answer(name, letter):
    assert extract(f"{name} {letter}", FINDINGS, "strict").letter is None
    assert extract(f"{name} {letter}", FINDINGS, "seed").letter == letter  # what makes `strict` necessary


@pytest.mark.parametrize("letter", "ABCD")
@pytest.mark.parametrize(
    ("declares", "denies"),
    [("The answer is {}.", "The answer is not {}."), ("La respuesta es la {}.", "La respuesta no es la {}.")],
)
def test_the_last_declaration_wins_and_a_denied_one_does_not_count(declares, denies, letter):
    other = "ABCD"["BCDA".index(letter)]

    assert extract(f"{declares.format(letter)} {declares.format(other)}", FINDINGS, "strict").letter == other
    assert extract(f"{declares.format(letter)} {denies.format(other)}", FINDINGS, "strict").letter == letter
    assert extract(denies.format(letter), FINDINGS, "strict").letter is None


def test_an_option_text_in_any_case_and_without_accents_is_the_option():
    for letter, option in HALLAZGOS.items():
        for written in (option, option.upper(), option.lower(), option.replace("é", "e").replace("ó", "o")):
            assert extract(f"Se observa {written}.", HALLAZGOS, "strict").letter == letter


def test_two_options_of_the_same_text_are_told_apart_by_letter_alone():
    options = {"A": "Crown", "B": "Implant", "C": "Crown"}

    assert extract("Crown", options, "strict") == (None, "abstained")
    assert extract("C. Crown", options, "strict").letter == "C"


@pytest.mark.parametrize("protocol", PROTOCOLS)
@settings(max_examples=150, deadline=None)
@given(
    st.one_of(st.text(), st.lists(st.one_of(WORDS, LETTERS, st.text(max_size=3)), max_size=25).map(" ".join)),
    st.dictionaries(st.sampled_from("ABCDEFI"), st.one_of(st.text(), st.sampled_from([*FINDINGS.values(), "", "Sí"]))),
)
@example('{"answer":' * 3000, FINDINGS)
@example("[" * 100_000, FINDINGS)
@example("\\boxed{" * 3000, FINDINGS)
@example("<answer>" * 3000, FINDINGS)
@example("\ud800 B", FINDINGS)
@example('{"answer": ' + "9" * 5000 + "}", FINDINGS)
def test_no_output_raises_and_a_letter_is_always_one_of_the_options(protocol, output, options):
    letter, method = extract(output, options, protocol, key="1")

    assert letter in {*options, None}
    assert (letter is None) == (method in ("failed", "abstained"))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "loop",
    [
        "the ",
        "dental caries ",
        "A or B, ",
        "<think>",
        "the answer is ",
        "***",
        "\n",
        "\\boxed{",
        '"',
        "elaela",
        "most ",
    ],
)
def test_an_answer_that_runs_on_is_read_in_less_than_a_second(protocol, loop):
    output = (loop * 100_000)[:100_000] + ". The answer is C."
    began = time.process_time()
    extract(output, FINDINGS, protocol)

    assert time.process_time() - began < 1
