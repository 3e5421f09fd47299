"""The cards of a model and its adapter: what they say, that it was recorded, and what they refuse."""

import json

import pytest
from card_cases import CASES, CLINICAL, PAIR, PLAIN, STAGE, make_comparison, make_scores, write_cards, write_folder
from huggingface_hub import ModelCard
from PIL import Image

from data_builders.metadata import strip_metadata
from dentalgemma.publishing.cards import CardError
from dentalgemma.publishing.licences import judge_model, list_sources

MEDGEMMA = "google/medgemma-1.5-4b-it"
# From https://developers.google.com/health-ai-developer-foundations/terms
NOTICE = (
    "HAI-DEF is provided under and subject to the Health AI Developer Foundations Terms of Use found at "
    "https://developers.google.com/health-ai-developer-foundations/terms"
)
FIGURES = {"loss.png", "results.png", "data.png"}


EVALUATED = {"comparison": make_comparison(), "scores": make_scores(), "benchmark": "Held-out questions"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of two stages, evaluated, with its cards; no test changes it."""
    folder = write_folder(tmp_path_factory.mktemp("cards") / "dental", STAGE, CASES, stacked=True)
    write_cards(folder, **EVALUATED)
    return folder


@pytest.fixture(scope="module")
def text(folder):
    return (folder / "README.md").read_text()


@pytest.fixture
def plain(tmp_path):
    """A model of whom nothing is recorded that could be drawn."""
    return write_folder(tmp_path / "dental", PLAIN, stacked=True)


def front(text):
    return ModelCard(text).data.to_dict()


def section(text, title):
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_front_matter_says_what_it_is_and_under_which_terms(text):
    metadata = front(text)

    assert metadata["language"] == ["en", "es"]
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "image-text-to-text"
    assert (metadata["base_model"], metadata["base_model_relation"]) == (MEDGEMMA, "finetune")
    assert metadata["datasets"] == ["owner/cases"]  # the other one was a folder
    assert metadata["license"] == "other"
    assert metadata["license_name"] == "health-ai-developer-foundations"
    assert metadata["license_link"] == "https://developers.google.com/health-ai-developer-foundations/terms"
    assert metadata["model-index"][0]["results"][0]["metrics"][0]["value"] == 70.0
    assert {"dental", "medical", "non-commercial"} <= set(metadata["tags"])  # a source is under CC BY-NC-SA


def test_a_model_is_not_called_non_commercial_where_no_source_says_so(tmp_path):
    free = {**PLAIN, "data_sources": [{**STAGE["data_sources"][0], "license": "Apache-2.0"}]}
    unused = {**PLAIN, "data_sources": [*free["data_sources"], {**STAGE["data_sources"][0], "name": "b", "rows": 0}]}

    assert "non-commercial" not in front(write_cards(write_folder(tmp_path / "free", free)))["tags"]
    assert "non-commercial" not in front(write_cards(write_folder(tmp_path / "unused", unused)))["tags"]


def test_a_clinician_reads_how_often_it_was_right_what_it_missed_and_what_it_is_not_for(text):
    own = section(text, "For clinicians")

    assert "1,000 questions with answers about 330 images (panoramic radiographs)" in own
    assert "80 questions with answers in words alone" in own
    assert "carious lesions, impacted teeth" in own
    assert "English and Spanish" in own
    assert "asked 400 multiple-choice questions about 210 images that were held out from training" in own
    assert "280 answers were right: 70 of 100" in own
    assert "anything from 65 to 74 of 100" in own
    assert "before this training was right 25 of 100 times; the training helped" in own
    assert "Guessing would be right about 25 of 100" in own
    assert "answered “healthy” or nothing that could be read: 30 of 120 times (a guess would in 25 of 100)" in own
    assert "the image was healthy, and it named a disease: 9 of 60 times (a guess would in 75 of 100)" in own
    assert "| carious lesion | 80.0 % | 100 | 25.0 % | 90.0 % | 300 | 75.0 % |" in own
    assert "must not be used for.** Diagnosis, screening, triage or treatment decisions" in own


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        pytest.param({}, "In stage vqa, 1,000 questions with answers about 330 images", id="several epochs"),
        pytest.param({"left_out": {"train": 10, "test": 2}}, "990 questions with answers about 330", id="too long"),
        pytest.param(
            {"steps": 4, "epochs": 0.06, "best_step": None},  # of 16 rows each
            "a part of 1,000 questions with answers about 330 images: it saw 64 of these questions.",
            id="a few steps",
        ),
        pytest.param({"best_step": 50}, "it saw 800 of these questions", id="an early step was kept"),
        pytest.param({"steps": 63, "epochs": 1.0, "best_step": None}, "1,000 questions with answers about", id="one"),
        pytest.param(
            {"vision": {"features": "cached", "reason": None, "pictures": 370}},
            "1,000 questions with answers.",  # of an older run: 370 were training and validation
            id="not recorded",
        ),
    ],
)
def test_what_it_was_shown_is_what_changed_the_kept_weights(tmp_path, facts, told):
    own = section(write_cards(write_folder(tmp_path / "dental", {**PLAIN, **facts})), "For clinicians")

    assert told in own
    assert ("a part of" in own) == ("it saw" in told)
    assert "370" not in own


@pytest.mark.parametrize(
    ("options", "told"),
    [
        pytest.param({}, "**How often it is right is not known.**", id="not tested"),
        pytest.param({"scores": make_scores(clinical=None)}, "there**, was not measured.", id="no clinical figures"),
        pytest.param(
            {"comparison": make_comparison(closed={**PAIR, "difference": -0.3})}, "made it worse", id="a worse model"
        ),
        pytest.param(
            {"comparison": make_comparison(closed={**PAIR, "mcnemar_p": 0.2})}, "may be chance (p = 0.2)", id="chance"
        ),
        pytest.param(
            {"comparison": make_comparison(closed={**PAIR, "n": 40, "b": {**PAIR["b"], "correct": 28}})},
            "These are few questions",
            id="few questions",
        ),
        pytest.param(
            {"comparison": make_comparison(splits=["validation"])},
            "not known to be of images that were held out",
            id="no test split",
        ),
        pytest.param(
            {
                "scores": make_scores(),
                "contamination": {
                    "format": "contamination/1", "dataset": {"name": "vqa"}, "clean": False,
                    "image_matches": [{"leak": True}], "question_matches": [],
                },
            },
            "Some of these questions or images were in the training data",
            id="leaks",
        ),
    ],
)  # fmt: skip
def test_bad_news_is_told_too(plain, options, told):
    assert told in write_cards(plain, **options)


def test_healthy_news_is_not_told_of_a_model_that_was_not_asked(plain):
    clinical = {**CLINICAL, "over_call": None, "missed_pathology": {**CLINICAL["missed_pathology"], "n": 0}}
    text = write_cards(plain, scores=make_scores(clinical=clinical))

    assert "it named a disease" not in text
    assert "was not measured on whole images" in text


def test_training_data_are_listed_with_their_licences_and_splits(text):
    data = section(text, "Training data")
    deed = "[CC-BY-NC-SA-4.0](https://creativecommons.org/licenses/by-nc-sa/4.0/)"

    assert f"| vqa | [opg](https://example.org/opg) | panoramic radiographs | 400 | 1,200 | {deed} |" in data
    assert "| instruct | cases | – | – | 90 | [Apache-2.0](https://spdx.org/licenses/Apache-2.0.html) |" in data
    assert "| vqa | vqa | 1,000 | 100 | 100 |" in data
    assert "| instruct | [owner/cases](https://huggingface.co/datasets/owner/cases) | 80 | 10 | – |" in data


def test_the_procedure_of_every_stage_is_told(text):
    training = section(text, "Training")

    for line in (
        "| | 1 vqa | 2 instruct |",
        "| LoRA | r = 64, α = 64, dropout 0.05 | r = 64, α = 64, dropout 0.05 |",
        "| trainable parameters | 50 of 1,000 | 50 of 1,000 |",
        "| best step, kept | 400 | 400 |",
        "| rows a step (global batch) | 16 = 4 × 2 accumulated × 2 processes | ",
        "| learning rate | 5e-05 | 5e-05 |",
        "| validation loss, first → best | 0.4000 → 0.2000 | ",
        "| hardware | 2 × NVIDIA A100-SXM4-80GB, at most 31.5 GB of its memory | ",
        "| minutes | 90.0 | 90.0 |",
    ):
        assert line in training
    assert training.count("Versions: dentalgemma 0.1.0, torch 2.13.0, transformers 5.23.0.") == 1


def test_the_lineage_names_base_stages_and_weights_by_their_hashes(text, folder):
    lineage = section(text, "Lineage")
    certificate = json.loads((folder / "merge_certificate.json").read_text())

    for value in (STAGE["base_revision"], "aaaaaaaaaaaaaaaa", "ab" * 32, "cd" * 32, "1111111111111111"):
        assert f"`{value}`" in lineage
    assert f"`{certificate['weights']}`" in lineage
    assert f"`{certificate['files']['model.safetensors']}`" in lineage


def test_terms_notice_and_the_engine_agree(text, folder):
    terms = judge_model(MEDGEMMA, list_sources([STAGE, CASES]))

    assert {key: front(text)[key] for key in terms.metadata} == terms.metadata
    for place in (folder, folder / "adapter"):
        assert (place / "NOTICE").read_text() == terms.notice
        assert NOTICE in (place / "NOTICE").read_text()
    assert "**No commercial use**: opg" in section(text, "Terms")
    assert "It is no legal advice." in section(text, "Terms")


def test_what_is_not_settled_is_said(text, tmp_path):
    silent = {**PLAIN, "data_sources": [{**STAGE["data_sources"][0], "license": None}]}
    other = write_cards(write_folder(tmp_path / "dental", silent))

    assert "Not settled, and to be settled before it is made public" in other
    assert "the source opg states no licence" in other
    assert "Not settled" not in text


def test_a_gemma_4_base_is_apache_and_needs_no_notice(tmp_path):
    free = {
        **PLAIN, "base_model": "google/gemma-4-31B-it",
        "data_sources": [{**STAGE["data_sources"][0], "license": "Apache-2.0"}],
    }  # fmt: skip
    folder = write_folder(tmp_path / "dental", free)
    metadata = front(write_cards(folder))

    assert (metadata["license"], metadata["base_model"]) == ("apache-2.0", "google/gemma-4-31B-it")
    assert not (folder / "NOTICE").exists()


def test_the_adapter_has_a_card_of_its_own(text, folder):
    card = (folder / "adapter" / "README.md").read_text()
    metadata = front(card)

    assert (metadata["library_name"], metadata["base_model_relation"]) == ("peft", "adapter")
    assert metadata["base_model"] == MEDGEMMA
    assert "PeftModel.from_pretrained(base, name)" in card
    assert f'"{MEDGEMMA}", dtype="auto", device_map="auto", revision="{STAGE["base_revision"]}"' in card
    assert "A LoRA adapter of rank 128" in card
    assert "PeftModel" not in text
    assert json.loads((folder / "merge_certificate.json").read_text())["adapter"]["sha256"] in card
    assert {path.name for path in (folder / "adapter" / "figures").iterdir()} == FIGURES


def test_the_adapter_s_configuration_names_the_base_on_the_hub(text, folder):
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())

    assert settings == {"base_model_name_or_path": MEDGEMMA, "r": 128, "revision": None}


@pytest.mark.parametrize(
    "adapter",
    [pytest.param({"left_out": "a module was trained in full"}, id="left out"), pytest.param("b", id="an older merge")],
)
def test_without_a_stacked_adapter_there_is_no_card_of_one(tmp_path, adapter):
    folder = write_folder(tmp_path / "dental", PLAIN, adapter=adapter)
    text = write_cards(folder)

    assert ("There is no adapter beside it: a module was trained in full" in text) == isinstance(adapter, dict)
    assert not (folder / "adapter" / "README.md").exists()


def test_a_4_bit_copy_says_so_and_how_alike_it_answers(tmp_path):
    quantization = {
        "method": "bitsandbytes nf4", "compute_dtype": "bfloat16", "source_weights": "cccccccccccccccc",
        "parity_inputs": "4 rows of vqa, validation", "same_token_share": 0.981, "max_logit_difference": 0.71875,
        "versions": {"bitsandbytes": "0.50.0"},
    }  # fmt: skip
    folder = write_folder(tmp_path / "small", PLAIN, quantization=quantization)
    text = write_cards(folder)
    of_own = write_cards(folder, quantized_from="owner/dental")

    # The Hub takes `base_model` for what was quantised, which the base of the first stage is not.
    assert (front(text)["base_model"], front(text)["base_model_relation"]) == (MEDGEMMA, "finetune")
    assert (front(of_own)["base_model"], front(of_own)["base_model_relation"]) == ("owner/dental", "quantized")
    assert front(of_own)["original_base_model"] == MEDGEMMA
    assert front(of_own)["license_name"] == front(text)["license_name"] == "health-ai-developer-foundations"
    assert "[owner/dental](https://huggingface.co/owner/dental)" in section(of_own, "Quantisation")
    assert "`cccccccccccccccc`" in section(text, "Quantisation")
    assert "the most likely token is the same at 98.1 % of the places" in section(text, "Quantisation")
    assert "pip install torch transformers accelerate pillow bitsandbytes" in text
    assert "BitsAndBytesConfig" not in text  # the folder is quantised already


def test_the_same_facts_give_the_same_card_and_figures_which_hold_nothing_but_pixels(text, folder, tmp_path):
    again = write_folder(tmp_path / "again" / "dental", STAGE, CASES, stacked=True)
    assert write_cards(again, **EVALUATED) == text

    for name in FIGURES:
        content = (folder / "figures" / name).read_bytes()
        assert content == (again / "figures" / name).read_bytes()
        assert content == strip_metadata(content)
        assert Image.open(folder / "figures" / name).width > 600
        assert f"](figures/{name})" in text


def test_there_is_no_figure_where_there_is_nothing_to_show(plain):
    evaluated = write_cards(plain, **EVALUATED)
    assert [path.name for path in (plain / "figures").iterdir()] == ["results.png"]
    text = write_cards(plain)  # what an earlier card showed goes

    assert "](figures/results.png)" in evaluated
    assert not list((plain / "figures").iterdir())
    assert "](figures/" not in text


def test_losses_that_are_no_numbers_are_left_out(tmp_path):
    losses = {"train": [{"step": 1, "loss": None}, {"step": 2, "loss": 1.0}], "validation": [{"step": 2, "loss": None}]}

    assert "validation loss, first" not in write_cards(write_folder(tmp_path / "dental", {**PLAIN, "losses": losses}))


def test_code_and_citation_leave_room_for_the_repository(text, folder):
    """`push` puts its name in the place of each OWNER/NAME."""
    adapter = (folder / "adapter" / "README.md").read_text()

    for card in (text, adapter):
        assert 'name = "OWNER/NAME"  # this repository, or a folder with its files' in card
        assert "url = {https://huggingface.co/OWNER/NAME}" in card
        assert '"dental"' not in card
    assert text.count("OWNER/NAME") == 4  # transformers, pipeline, 4 bits, citation
    assert adapter.count("OWNER/NAME") == 2


def test_the_citation_names_model_toolkit_and_base_and_nobody_else(text):
    citation = section(text, "Citation")

    assert citation.count("@") == 3
    assert "title = {dental}" in citation
    assert "url = {https://github.com/dentalgemma/dentalgemma}" in citation
    assert f"url = {{https://huggingface.co/{MEDGEMMA}}}" in citation
    assert "author" not in citation


@pytest.mark.parametrize(
    ("stage", "base", "message"),
    [
        pytest.param({}, "google/gemma-4-31B-it", "was trained from google/medgemma-1.5-4b-it, not from", id="another"),
        pytest.param({"base_is_local": True}, "my/folder/medgemma", "is no model of the Hub", id="a path"),
        pytest.param(
            {"base_is_local": True, "base_model": "medgemma-copy"}, "google/gemma-4-31B-it", "is under the", id="terms"
        ),
    ],
)
def test_the_base_cannot_be_talked_away(tmp_path, stage, base, message):
    folder = write_folder(tmp_path / "dental", {**STAGE, **stage})

    with pytest.raises(CardError, match=message):
        write_cards(folder, base=base)
    assert not (folder / "README.md").exists()


@pytest.mark.parametrize(
    ("model_type", "base", "fits"),
    [
        pytest.param("gemma3", "google/medgemma-1.5-4b-it", True, id="medgemma"),
        pytest.param("gemma3", "google/gemma-4-E4B-it", False, id="medgemma called gemma 4"),
        pytest.param("gemma4", "google/gemma-4-E4B-it", True, id="gemma 4"),
        pytest.param("gemma4_unified", "google/gemma-4-E4B-it", True, id="a variant"),
        pytest.param("gemma3n", "google/gemma-3-4b-it", False, id="gemma 3n called gemma 3"),
        pytest.param("qwen3_vl_moe", "Qwen/Qwen3-VL-30B-A3B-Instruct", True, id="qwen"),
        pytest.param("gemma3", "Qwen/Qwen3-VL-8B-Instruct", False, id="medgemma called qwen"),
        pytest.param("gemma3", "owner/some-tune", True, id="terms not known"),
        pytest.param(None, "google/gemma-4-E4B-it", False, id="no model type"),
    ],
)
def test_the_base_must_be_of_the_model_s_own_family(tmp_path, model_type, base, fits):
    folder = write_folder(tmp_path / "dental", {**PLAIN, "base_is_local": True, "base_model": "my-base"})
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))

    if fits:
        assert front(write_cards(folder, base=base))["base_model"] == base
    else:
        with pytest.raises(CardError, match=f"not made from {base}: config.json says model_type {model_type}, and"):
            write_cards(folder, base=base)
        assert not (folder / "README.md").exists()


@pytest.mark.parametrize(
    ("certificate", "repo", "message"),
    [
        pytest.param({}, "owner/dental", "this model is not quantised", id="16 bits"),
        pytest.param({"quantization": {"method": "nf4"}}, "just-a-name", "expected owner/name", id="no repository"),
    ],
)
def test_what_a_4_bit_copy_was_made_from_is_a_repository(tmp_path, certificate, repo, message):
    folder = write_folder(tmp_path / "small", PLAIN, **certificate)

    with pytest.raises(CardError, match=message):
        write_cards(folder, quantized_from=repo)
    assert not (folder / "README.md").exists()
