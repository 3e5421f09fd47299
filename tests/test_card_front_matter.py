"""Whatever stages, data, licences and folders are called: the metadata are what is meant, the page does nothing."""

import re

import pytest
import yaml
from card_cases import CLINICAL, CLOSED, FINDING, STAGE, make_comparison, make_scores, write_cards, write_folder
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

HOSTILE = [
    pytest.param("</td><script>document.title='RAN'</script>", id="script"),
    pytest.param("<img src=x onerror=\"document.title='RAN'\">", id="image"),
    pytest.param("[x](javascript:document.title='RAN') ![y](javascript:z) <javascript:a>", id="links"),
    pytest.param("x\n---\nlicense: mit\n---\n# y", id="front matter"),
    pytest.param("x\n```\n<script>document.title='RAN'</script>\n```python\n", id="fence"),
    pytest.param("`<script>document.title='RAN'</script>`", id="code span"),
    pytest.param("*a &b !!python/object:os.system {{ 7*7 }} {% raw %} | # : - ?", id="yaml and jinja"),
    pytest.param("🦷 müller's \u202elicense: mit\u202c \u2028 \x85 \x00 \\ $x_1$", id="unicode"),
]


def everywhere(text):
    """A stage in which everything that others may name is called so."""
    return {
        **STAGE, "stage": text, "dataset": text, "hub_datasets": [text, "owner/good"], "dtype": text, "trains": [text],
        "data_sources": [
            {"name": text, "license": text, "url": f"https://example.org/{text}", "modality": text, "rows": 7},
            {"name": text + "2", "license": "CC-BY-4.0", "url": f"javascript:{text}", "modality": None, "rows": 7},
        ],
        "data_contents": {
            "images": True, "languages": ["en", text], "question_types": {text: 3}, "findings": {text: 3},
        },
        "dataset_rows": {"train": 7, text: 7}, "dataset_fingerprints": {text: text}, "adapter_sha256": text,
        "mixture": [{"dataset": text, "rows": 3, "available": 9}], "base_weights": text, "base_revision": text,
        "hardware": {"device": text}, "versions": {text: text}, "left_out": {text: 3}, "vision": {"features": text},
        "hyperparameters": {**STAGE["hyperparameters"], "optim": text},
    }  # fmt: skip


def documents(text):
    """Scores, a comparison, contamination and a decision with it."""
    part = {"n": 400, "correct": 280, "accuracy": 0.7, "wilson": [0.6, 0.8]}
    opened = {
        **CLOSED, "judged": 400, "judge_errors": 0, "per_category": {text: part}, "chance": None,
        "judge": {"model": text, "prompt_sha256": text},
    }  # fmt: skip
    pair = make_comparison()["closed"]
    change = {"n": 1, "a": 0.1, "b": 0.2, "difference": 0.1, "only_a": 0, "only_b": 1}
    side = {"images": "true", "mode": text}
    return {
        "scores": make_scores(
            name=text, mode=text, extraction=text, warnings=[text], open=opened,
            clinical={**CLINICAL, "findings": {text: FINDING}},
        ),
        "comparison": make_comparison(
            splits=[text], a=side, b={**side, "weights": "b87eff689059cb5b"},
            closed={**pair, "per_category": {text: change}},
        ),
        "contamination": {
            "format": "contamination/1", "dataset": {"name": text}, "clean": True, "image_matches": [],
            "question_matches": [],
        },
        "decision": {
            "format": "decision/1", "title": text, "winner": text, "pre_registered": False, "reasons": [text],
            "plan": {"plan_sha256": text}, "scores": {text: {"weights": "b87eff689059cb5b"}},
        },
        "benchmark": text,
    }  # fmt: skip


QUANTIZATION = {"parity_inputs": None, "same_token_share": 0.9, "max_logit_difference": 0.1}


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """Both cards of a model in which everything is called so; written once for each text."""
    written = {}

    def write_(text):
        if text not in written:
            name = re.sub("[/\0]", "", text)  # what a folder may be called
            folder = write_folder(
                tmp_path_factory.mktemp("cards") / name, everywhere(text), stacked=True,
                parity_inputs=text, warnings=[text], dtype=text,
                quantization={**QUANTIZATION, "method": text, "source_weights": text, text: text},
            )  # fmt: skip
            card = write_cards(folder, **documents(text))
            written[text] = card, (folder / "adapter" / "README.md").read_text(encoding="utf-8"), name
        return written[text]

    return write_


def as_name(text):
    """The same on one line, without what is not to be seen or turns the text around."""
    shown = "".join(c for c in text if c not in "\u202a\u202b\u202c\u202d\u202e")
    return " ".join("".join(c if c.isprintable() else " " for c in shown).split())


@pytest.mark.parametrize("text", HOSTILE)
def test_the_front_matter_of_both_cards_is_exactly_what_is_meant(write, text, tmp_path):
    card, adapter, name = write(text)
    common = {
        "language": ["en"],
        "pipeline_tag": "image-text-to-text",
        "tags": ["dental", "medical", "radiology", "dentalgemma"],
        "datasets": ["owner/good"],
        "base_model": "google/medgemma-1.5-4b-it",
        "license": "other",
        "license_name": "health-ai-developer-foundations",
        "license_link": "https://developers.google.com/health-ai-developer-foundations/terms",
    }
    wanted = {
        "README.md": {**common, "library_name": "transformers", "base_model_relation": "finetune"},
        "adapter.md": {**common, "library_name": "peft", "base_model_relation": "adapter"},
    }
    for file, content in (("README.md", card), ("adapter.md", adapter)):
        (tmp_path / file).write_text(content, encoding="utf-8")
        metadata = yaml.safe_load(content.split("\n---\n")[0].removeprefix("---\n"))
        assert ModelCard.load(tmp_path / file).data.to_dict() == metadata
        index = metadata.pop("model-index", None)
        assert metadata == wanted[file]
        if file == "README.md":
            (entry,) = index
            assert entry["name"] == as_name(name)
            assert {result["dataset"]["name"] for result in entry["results"]} == {as_name(text)}
            assert [result["metrics"][0]["value"] for result in entry["results"]] == [70.0, 70.0]
            assert entry["results"][0]["metrics"][0]["args"]["mode"] == as_name(text)


def render(text):
    """Markdown as the Hub renders it, before it takes out what it forbids: nothing here rests on that."""
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(text)


def body(card):
    return card.split("\n---\n", 1)[1]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_others_becomes_markup(write, text):
    card, adapter, _ = write(text)
    for content in (card, adapter):
        page = render(body(content))
        addresses = set(re.findall(r'(?:href|src)="([^"]*)"', page))

        assert not re.findall(r"<(?!/?(?:a|blockquote|code|em|h[1-6]|img|li|ol|p|pre|strong|t[a-z]+|ul)\b)[^>]*>", page)
        assert all(re.match(r"https://|figures/\w+\.png$|NOTICE$|merge_certificate\.json$", own) for own in addresses)
        assert len(re.findall("<img", page)) == 3 == page.count('src="figures/')
        assert page.count("<h1>") == 1 == page.count("<h1>DentalGemma (")
        assert "\nlicense: mit" not in content
        assert "\u202e" not in content


def test_the_pages_do_nothing_in_a_browser(write, open_page, tmp_path):
    texts = [parameter.values[0] for parameter in HOSTILE]
    pages = [render(body(card)) for text in texts for card in write(text)[:2]]
    (tmp_path / "cards.html").write_text(f"<!doctype html><meta charset=utf-8><title>quiet</title>{''.join(pages)}")
    (tmp_path / "control.html").write_text(f"<!doctype html><meta charset=utf-8><title>quiet</title>{render(texts[0])}")

    assert "<title>quiet</title>" in open_page(tmp_path / "cards.html")
    assert "<title>RAN</title>" in open_page(tmp_path / "control.html")  # what is not escaped does run


def test_plain_names_stay_as_they_are(tmp_path):
    stage = {**STAGE, "stage": "stage_1-vqa", "dataset": "dental_vqa.v2"}
    text = write_cards(write_folder(tmp_path / "dental_gemma-4b", stage), scores=documents("caries_probe")["scores"])

    for name in ("stage_1-vqa", "dental_vqa.v2", "adamw_torch_fused", "NVIDIA A100-SXM4-80GB", "dental_gemma-4b"):
        assert name in text
    assert "\\" not in body(text).replace("\\_", "").split("## Citation")[0]
