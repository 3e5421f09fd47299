"""The terms of models and datasets: what binds is said, nothing more is promised, and what must stop a push does."""

import re

import pytest

from data_builders.licences import Rule, find_cover, find_licence
from dentalgemma.publishing.licences import judge_dataset, judge_model, list_sources

MEDGEMMA, GEMMA4, GEMMA3 = "google/medgemma-1.5-4b-it", "google/gemma-4-31B-it", "google/gemma-3-4b-it"
HAI_DEF = {  # as the card of google/medgemma-1.5-4b-it has it
    "license": "other",
    "license_name": "health-ai-developer-foundations",
    "license_link": "https://developers.google.com/health-ai-developer-foundations/terms",
}
BY_SA, BY_NC_SA = "CC BY-SA 4.0", "CC-BY-NC-SA-4.0"


def sources(*licences):
    return [
        {"name": f"source_{number}", "license": licence, "url": None, "rows": 5}
        for number, licence in enumerate(licences)
    ]


@pytest.mark.parametrize("licences", [["Apache-2.0"], [BY_NC_SA], [None], ["MIT", BY_SA, BY_NC_SA]], ids=str)
@pytest.mark.parametrize("base", [MEDGEMMA, "unsloth/medgemma-1.5-4b-it-bnb-4bit", "me/my-MedGemma-dental"])
def test_what_was_made_from_medgemma_is_under_its_terms_whatever_the_data(base, licences):
    assert judge_model(base, sources(*licences)).metadata == HAI_DEF


def test_the_notice_has_the_sentence_that_the_terms_demand_the_restrictions_and_the_change():
    notice = judge_model(MEDGEMMA, sources("MIT")).notice

    assert notice.startswith(  # section 3.1 of the terms, word for word
        "HAI-DEF is provided under and subject to the Health AI Developer Foundations Terms of Use found at "
        "https://developers.google.com/health-ai-developer-foundations/terms\n"
    )
    one_line = " ".join(notice.split())
    assert "restrictions of section 3.2 of these terms are passed on" in one_line  # 3.1(1), and the three of 3.2
    assert "(1) for what the Prohibited Use Policy forbids" in one_line
    assert "https://developers.google.com/health-ai-developer-foundations/prohibited-use-policy" in notice
    assert "could cause a health regulatory authority to deem Google the “manufacturer” of a medical device" in one_line
    assert "(3) against laws and regulations" in one_line
    assert "gives a copy of them to those who get it (2)" in one_line  # of section 3.1
    assert f"made from {MEDGEMMA}" in notice
    assert notice == judge_model(MEDGEMMA, sources(BY_SA)).notice


@pytest.mark.parametrize("base", [MEDGEMMA, GEMMA3])
def test_where_the_terms_demand_it_the_rule_says_that_a_copy_of_them_is_passed_on(base):
    rule = judge_model(base, sources("MIT")).rules[0].text

    assert "pass on a copy of the terms (their section 3.1(2); put it beside as TERMS.md)" in rule
    assert "TERMS.md" not in judge_model(GEMMA4, sources("MIT")).rules[0].text


def test_gemma_3_and_llama_want_a_notice_too_and_apache_none():
    gemma = judge_model(GEMMA3, sources("MIT"))
    llama = judge_model("meta-llama/Llama-3.2-11B-Vision-Instruct", sources("MIT"))

    assert gemma.metadata == {"license": "gemma"}
    assert (
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
        in gemma.notice
    )
    assert llama.metadata == {"license": "llama3.2"}
    assert (
        "Llama 3.2 is licensed under the Llama 3.2 Community License, Copyright © Meta Platforms, Inc." in llama.notice
    )
    assert judge_model(GEMMA4, sources("MIT")).notice is None


@pytest.mark.parametrize(
    ("licences", "license_"),
    [
        pytest.param(
            ["Apache-2.0", "CC-BY-4.0", "CC0-1.0"], "apache-2.0", id="attribution is in the base's own licence"
        ),
        pytest.param([BY_NC_SA, "Apache-2.0"], "cc-by-nc-sa-4.0", id="one strict licence covers all"),
        pytest.param([BY_SA], "cc-by-sa-4.0", id="share-alike"),
        pytest.param(["CC-BY-NC-4.0", BY_NC_SA], "cc-by-nc-sa-4.0", id="the stricter of two"),
        pytest.param(["CC-BY-SA-3.0", BY_SA], "cc-by-sa-4.0", id="the later version"),
        pytest.param([BY_SA, BY_NC_SA], "other", id="no licence fits both"),
        pytest.param(["MIT", None], "other", id="one is not stated"),
        pytest.param(["MIT", "ask me"], "other", id="one is not known"),
    ],
)
@pytest.mark.parametrize("base", [GEMMA4, "Qwen/Qwen3-VL-8B-Instruct"])
def test_on_an_apache_base_the_card_promises_no_more_than_the_data_allow(base, licences, license_):
    assert judge_model(base, sources(*licences)).metadata["license"] == license_


def test_where_no_one_licence_fits_the_link_leads_to_the_strictest():
    metadata = judge_model(GEMMA4, sources(BY_SA, BY_NC_SA, "MIT")).metadata

    assert metadata["license_link"] == "https://creativecommons.org/licenses/by-nc-sa/4.0/"


def test_terms_that_allow_commerce_are_not_all_that_the_card_says_where_the_data_forbid_it():
    metadata = judge_model(GEMMA3, sources(BY_NC_SA)).metadata

    assert metadata == {
        "license": "other",
        "license_name": "gemma-and-training-data",
        "license_link": "https://ai.google.dev/gemma/terms",
    }


@pytest.mark.parametrize("base", [MEDGEMMA, GEMMA4, GEMMA3])
def test_what_one_source_forbids_is_forbidden_for_the_model(base):
    titles = {rule.title: rule.text for rule in judge_model(base, sources("MIT", BY_NC_SA)).rules}

    assert titles["No commercial use"] == "source_1; therefore none of the model."
    assert titles["Share alike"].startswith("source_1. ")
    assert "https://" in titles["Terms of the base"]


@pytest.mark.parametrize(
    ("licence", "why"),
    [
        (None, "source_0 states no licence, which grants nothing: ask its owner, then push with --permission source_0"),
        (" ", "source_0 states no licence"),
        ("free for all", "states a licence that is not known to this toolkit (free for all): read it"),
        ("CC-BY-NC-ND-4.0", "allows no adaptation to be shared: ask its owner"),
    ],
)
@pytest.mark.parametrize(
    "judge", [lambda *a, **k: judge_model(MEDGEMMA, *a, **k), judge_dataset], ids=["model", "dataset"]
)
def test_a_source_that_grants_too_little_stops_a_public_push_until_its_owner_agreed(judge, licence, why):
    (blocking,) = judge(sources(licence, "MIT")).blocking

    assert why in blocking
    assert judge(sources(licence, "MIT"), permissions=["source_0"]).blocking == ()
    assert judge(sources(licence, "MIT"), permissions=["source_1"]).blocking == (blocking,)


def test_sources_that_exclude_each_other_stop_a_model_until_enough_of_their_owners_agreed():
    mixed = sources(BY_SA, BY_SA, BY_NC_SA, "Apache-2.0")
    (blocking,) = judge_model(MEDGEMMA, mixed).blocking

    assert "no licence meets what all of its sources ask for" in blocking
    assert judge_model(MEDGEMMA, mixed, permissions=["source_0"]).blocking  # source_1 still excludes source_2
    assert not judge_model(MEDGEMMA, mixed, permissions=["source_0", "source_1"]).blocking
    assert not judge_model(MEDGEMMA, mixed, permissions=["source_2"]).blocking


def test_permission_changes_nothing_that_the_card_says():
    for licences in ([None], [BY_SA, BY_NC_SA], ["CC-BY-ND-4.0"]):
        for base in (MEDGEMMA, GEMMA4, GEMMA3):
            asked, agreed = (
                judge_model(base, sources(*licences)),
                judge_model(base, sources(*licences), permissions=["source_0", "source_1"]),
            )
            assert asked[:2] == agreed[:2] and asked.notice == agreed.notice
            assert asked.blocking and not agreed.blocking


@pytest.mark.parametrize(
    "base", ["someone/dental-gemma-4", "google/paligemma-3b", "/home/me/gemma-4", "gemma-4-31B-it"]
)
def test_the_terms_of_an_unknown_base_are_not_made_up(base):
    terms = judge_model(base, sources("MIT"))

    assert terms.metadata["license_name"] == "unknown"
    assert any(base in sentence and "add them to BASES" in sentence for sentence in terms.blocking)


def test_a_model_whose_data_nobody_recorded_is_not_for_the_public():
    stages = [{"dataset": "somebody/rows", "data_sources": []}]

    assert "somebody/rows states no licence" in judge_model(GEMMA4, list_sources(stages)).blocking[0]
    assert "nothing is recorded" in judge_model(GEMMA4, []).blocking[0]


def test_sources_of_all_stages_count_once_and_what_was_mixed_in_counts_too():
    (photos,) = sources(BY_SA)
    mixture = [{"dataset": "vqa"}, {"dataset": "org/general"}]
    stages = [
        {"dataset": "vqa", "data_sources": [photos], "mixture": []},
        {"dataset": "vqa", "data_sources": [photos], "mixture": mixture},
    ]

    assert [source["name"] for source in list_sources(stages)] == ["source_0", "org/general"]


def test_a_source_that_states_two_licences_is_asked_about_by_its_own_name():
    twice = [{"name": "photos", "license": "MIT"}, {"name": "photos", "license": None}]
    (blocking,) = judge_model(GEMMA4, twice).blocking

    assert blocking.endswith("push with --permission photos")
    assert judge_model(GEMMA4, twice, permissions=["photos"]).blocking == ()


def test_a_source_without_rows_binds_nobody():
    unused = {"name": "unused", "license": None, "url": None, "rows": 0}

    assert judge_model(GEMMA4, [*sources("MIT"), unused]).blocking == ()
    assert judge_dataset([*sources("MIT"), unused]).verdict == "single"


def test_a_rehearsal_is_bound_by_nothing_and_may_be_shown():
    terms = judge_model("base", sources(None), rehearsal=True)

    assert (terms.metadata, terms.blocking, terms.notice) == (
        {"license": "other", "license_name": "rehearsal"},
        (),
        None,
    )


@pytest.mark.parametrize(
    ("licences", "verdict", "metadata"),
    [
        (["cc by 4.0", "CC-BY-4.0"], "single", {"license": "cc-by-4.0"}),
        (
            ["CC-BY-SA-2.0"],  # which the Hub has no name for
            "single",
            {
                "license": "other",
                "license_name": "cc-by-sa-2.0",
                "license_link": "https://creativecommons.org/licenses/by-sa/2.0/",
            },
        ),
        (
            ["MIT", BY_NC_SA],
            "combined",
            {"license": "other", "license_name": "per-source", "license_link": "LICENSE.md"},
        ),
        ([BY_SA, BY_NC_SA], "mixed", {"license": "other", "license_name": "per-source", "license_link": "LICENSE.md"}),
        (
            [BY_SA, BY_NC_SA, None],
            "mixed",
            {"license": "other", "license_name": "per-source", "license_link": "LICENSE.md"},
        ),
    ],
)
def test_what_a_dataset_card_says_of_its_terms(licences, verdict, metadata):
    terms = judge_dataset(sources(*licences))

    assert (terms.verdict, terms.metadata) == (verdict, metadata)


def test_the_licence_that_covers_all_is_never_a_laxer_one():
    stated = [
        "MIT",
        "CC-BY-4.0",
        "CC-BY-SA-4.0",
        "CC-BY-NC-4.0",
        "CC-BY-NC-SA-4.0",
        "CC0-1.0",
        "ODbL-1.0",
        "CC-BY-ND-4.0",
    ]
    for a in stated:
        for b in stated:
            cover = find_cover({"a": a, "b": b})
            if cover is not None:
                assert not cover.commercial or not any("-NC" in own for own in (a, b))
                assert cover.share_alike or not any("-SA" in own or own == "ODbL-1.0" for own in (a, b))
    assert find_cover({"a": "CC-BY-NC-SA-4.0", "b": "CC-BY-4.0"}).hub_id == "cc-by-nc-sa-4.0"


def test_reasons_are_sentences_with_a_remedy_that_name_the_source():
    terms = judge_model("a/b", sources(None, "?", "CC-BY-ND-4.0", BY_SA, BY_NC_SA))

    assert len(terms.blocking) == 5
    assert all(re.search(r"--permission|add them to BASES", sentence) for sentence in terms.blocking)
    assert all(isinstance(rule, Rule) and rule.text.endswith(".") for rule in terms.rules)


@pytest.mark.parametrize(
    ("one", "other", "verdict"),
    [
        ("CC-BY-SA-1.0", "CC-BY-SA-4.0", "mixed"),  # 1.0 allows no later version
        ("CC-BY-SA-1.0", "CC-BY-SA-1.0", "single"),
        ("CC-BY-SA-2.0", "CC-BY-SA-4.0", "combined"),
        ("CC-BY-SA-4.0", "CC-BY-NC-4.0", "mixed"),  # what may be sold, with what may not
        ("CC-BY-NC-SA-4.0", "CC-BY-NC-4.0", "combined"),
        ("GPL-3.0-only", "GPL-3.0-or-later", "combined"),
        ("GPL-3.0", "GPL-3.0-only", "single"),
        ("GPL-3.0-only", "AGPL-3.0", "mixed"),
    ],
)
def test_licences_that_share_alike_go_together_where_their_texts_let_them(one, other, verdict):
    assert judge_dataset(sources(one, other)).verdict == verdict
    assert judge_dataset(sources(other, one)).verdict == verdict


def test_under_both_of_them_only_the_version_that_both_allow_is_left():
    for pair in ({"a": "GPL-3.0-only", "b": "GPL-3.0-or-later"}, {"a": "GPL-3.0-or-later", "b": "GPL-3.0-only"}):
        assert find_cover(pair).name == "GPL-3.0-only"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("MIT License", "MIT"),
        ("mit licence", "MIT"),
        ("Apache License 2.0", "Apache-2.0"),
        ("CC BY-NC-SA 4.0 International", "CC-BY-NC-SA-4.0"),
        ("CC BY-SA 3.0 Unported", "CC-BY-SA-3.0"),
        ("GPL-3.0", "GPL-3.0-only"),
        ("AGPL-3.0", "AGPL-3.0-only"),
    ],
)
def test_licences_are_known_by_their_common_names(text, name):
    assert find_licence(text).name == name


@pytest.mark.parametrize("text", ["International", "License", "my MIT", "MIT or later", "CC BY 5.0 International"])
def test_other_names_are_not_guessed_at(text):
    assert find_licence(text) is None
