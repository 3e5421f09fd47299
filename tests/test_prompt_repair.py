"""The diagnosis that stands in a prompt: found in whatever spelling, taken out with as little else as possible."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_builders.phantom_cases import DISEASES
from data_builders.prompt_repair import find_names, repair_prompt

STORY = "Cold pain lasts over a minute since three days."


def repair(text, condition, **options):
    """The repaired text of a prompt of one turn, `None` where the case is to be left out."""
    prompt = [{"role": "user", "content": text}]
    repaired = repair_prompt(prompt, condition, **{"treatment": "drop", **options})
    return repaired and repaired[0]["content"]


def names(text, condition, synonyms=()):
    return [text[start:end] for start, end in find_names(text, condition, synonyms)]


@pytest.mark.parametrize(
    ("text", "condition", "found"),
    [
        pytest.param("DENTAL CARIES", "dental caries", ["DENTAL CARIES"], id="capitals"),
        pytest.param("dental_caries", "dental caries", ["dental_caries"], id="underscore"),
        pytest.param("dental\ncaries", "Dental caries", ["dental\ncaries"], id="line break"),
        pytest.param("peri-implantitis", "Periimplantitis", ["peri-implantitis"], id="hyphen in the text"),
        pytest.param("periimplantitis", "peri-implantitis", ["periimplantitis"], id="hyphen in the name"),
        pytest.param("perio-\ndontitis", "periodontitis", ["perio-\ndontitis"], id="hyphenated"),
        pytest.param("cáries", "caries", ["cáries"], id="accent in the text"),
        pytest.param("lesion apical", "lesión apical", ["lesion apical"], id="accent in the name"),
        pytest.param("ca\u00adri\u200bes", "caries", ["ca\u00adri\u200bes"], id="invisible characters"),
        pytest.param("impacted teeth", "impacted_tooth", ["impacted teeth"], id="teeth"),
        pytest.param("impacted tooth", "Impacted teeth", ["impacted tooth"], id="tooth"),
        pytest.param("apical abscesses", "apical abscess", ["apical abscesses"], id="plural in the text"),
        pytest.param("apical abscess", "apical abscesses", ["apical abscess"], id="plural in the name"),
        pytest.param("a cavity", "cavities", ["cavity"], id="cavities"),
        pytest.param("periodontitides", "periodontitis", ["periodontitides"], id="Greek plural"),
        pytest.param("abscesos apicales", "absceso apical", ["abscesos apicales"], id="Spanish plural"),
        pytest.param("fracturas de raíces", "fractura de raíz", ["fracturas de raíces"], id="z and c"),
        pytest.param("TMD, TMDs", "temporomandibular disorder (TMD)", ["TMD", "TMDs"], id="abbreviation"),
        pytest.param("coded K02.9", "dental caries (K02.9)", ["K02.9"], id="code"),
        pytest.param("temporomandibular disorder", "TMD (temporomandibular disorder)", ["temporomandibular disorder"],
                     id="abbreviation spelt out"),
        pytest.param("dry socket", "Alveolar osteitis / dry socket", ["dry socket"], id="two names"),
        pytest.param("it is tmd", "temporomandibular disorder (TMD)", [], id="small letters are no abbreviation"),
        pytest.param("moderate pain", "caries (moderate)", [], id="a parenthesis that is no name"),
        pytest.param("stage III", "periodontitis (III)", [], id="a number is no abbreviation"),
        pytest.param("precarious", "caries", [], id="inside another word"),
        pytest.param("caries", "dental caries", [], id="part of the name"),
        pytest.param("a tooth", "A", [], id="a letter"),
        pytest.param("tooth 36", "36", [], id="a number"),
    ],
)  # fmt: skip
def test_a_condition_is_found_in_whatever_spelling_and_nothing_else_is(text, condition, found):
    assert names(text, condition) == found


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        pytest.param(
            f"PATIENT: 45-year-old male with dental caries, smoker.\n{STORY}",
            f"PATIENT: 45-year-old male, smoker.\n{STORY}",
            id="with",
        ),
        pytest.param(f"PATIENT: Dental Caries\nAGE: 45\n{STORY}", f"AGE: 45\n{STORY}", id="whole field"),
        pytest.param(f"**Patient:** male, dental caries\n{STORY}", f"**Patient:** male\n{STORY}", id="clause"),
        pytest.param(
            f"PACIENTE: mujer de 30 años con dental caries\n{STORY}", f"PACIENTE: mujer de 30 años\n{STORY}", id="con"
        ),
        pytest.param(f"{STORY} Is it dental caries? He smokes.", f"{STORY} He smokes.", id="sentence"),
        pytest.param("Cold pain lasts over a minute (dental caries).", "Cold pain lasts over a minute.", id="aside"),
        pytest.param(f"Dental\ncaries of tooth 36. {STORY}", STORY, id="over two lines"),
        pytest.param(f"dental (dental caries) caries. {STORY}", STORY, id="named again once the rest is gone"),
        pytest.param(STORY, STORY, id="not named"),
        pytest.param("  Pulpitis?\r\n\r\n\r\nNo. ", "  Pulpitis?\r\n\r\n\r\nNo. ", id="untouched to the byte"),
        pytest.param("What is the treatment of dental caries?", None, id="nothing else"),
        pytest.param("PATIENT: dental caries\n\nGive your plan.\nWhat is it?", None, id="only instructions left"),
    ],
)
def test_the_smallest_piece_that_names_the_condition_is_dropped(text, kept):
    assert repair(text, "dental caries") == kept


def test_a_mask_takes_the_place_of_every_name_and_of_nothing_else():
    text = f"PATIENT: Dental caries (moderate)\nDENTAL CARIES of 36 (K02.9). {STORY}"
    masked = repair(text, "dental caries (K02.9)", treatment="mask", mask="[diagnóstico]", condition_line="PATIENT")

    assert masked == f"PATIENT: [diagnóstico]\n[diagnóstico] of 36 ([diagnóstico]). {STORY}"


def test_the_system_prompt_is_repaired_too():
    prompt = [{"role": "system", "content": "You treat dental caries."}, {"role": "user", "content": STORY}]

    assert repair_prompt(prompt, "dental caries", treatment="drop") == ({"role": "user", "content": STORY},)


def test_what_an_earlier_answer_has_told_is_no_secret():
    told = [
        {"role": "user", "content": f"{STORY} Dental caries?"},
        {"role": "assistant", "content": "It is dental caries."},
        {"role": "user", "content": "How is dental caries treated?"},
    ]
    repaired = repair_prompt(told, "dental caries", treatment="drop")

    assert repaired == ({"role": "user", "content": STORY}, *told[1:])


def letters(text):
    return "".join(c for c in unicodedata.normalize("NFKD", text).casefold() if c.isalpha())


SPELLINGS = (
    str,
    str.upper,
    str.title,
    lambda name: name.replace(" ", "_"),
    lambda name: name.replace(" ", "-"),
    lambda name: name.replace(" ", "\n"),
    lambda name: name.replace(" ", "  "),
    lambda name: name.replace(" ", ""),
    lambda name: name.replace("i", "í").replace("a", "á"),
    lambda name: name[:3] + "\u200b" + name[3:],
    lambda name: unicodedata.normalize("NFD", name.replace("e", "é")),
    lambda name: name.translate({ord(c): ord(c) + 0xFEE0 for c in "abcdeilnoprstuv"}),  # full-width letters
)
PLACES = (
    "PATIENT: {}\n{story}",
    "PATIENT: male, 40 years, with {}, smoker.\n{story}",
    "{story} I think of {}; what else? {}!",
    "{story} ({})",
    "COMPLAINT: pain. {} since a year, worse at night\n{story}\n\n{}",
    "- Seen: {}/{}\n{story}",
    "{}: {story}\n{story}",
)


@given(
    disease=st.sampled_from(DISEASES),
    spelling=st.sampled_from(SPELLINGS),
    place=st.sampled_from(PLACES),
    treatment=st.sampled_from(["drop", "mask"]),
)
def test_no_repaired_prompt_names_its_condition(disease, spelling, place, treatment):
    name = spelling(disease.name)
    text = place.format(name, name, story=STORY)
    repaired = repair(text, disease.name, treatment=treatment)

    assert letters(disease.name) in letters(text)
    assert letters(disease.name) not in letters(repaired)
    assert STORY in repaired


@given(st.text(max_size=80), st.text(max_size=20), st.sampled_from(["drop", "mask"]))
def test_any_text_is_repaired_or_left_out(text, condition, treatment):
    repaired = repair(text or "x", condition, treatment=treatment)

    assert repaired is None or not find_names(repaired, condition)
