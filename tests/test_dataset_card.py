"""The card and the terms: what sources ask for adds up, and nothing that comes from data becomes markup."""

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import DatasetCard
from matplotlib.figure import Figure
from PIL import Image

from data_builders.dataset_card import FAULTS, draw_bars, escape_markdown, link, quote
from data_builders.licences import combine_terms, find_licence
from data_builders.sources import load_sources
from data_builders.vqa import build_vqa

CAVITY, OPG = "CC BY-SA 4.0", "CC-BY-NC-SA-4.0"  # as the five sources of the published model state them


def titles(terms):
    return [rule.title for rule in terms.rules]


@pytest.mark.parametrize(
    ("text", "name", "asks"),
    [
        # attribution, commercial, share_alike, derivatives; https://creativecommons.org/share-your-work/cclicenses/
        ("CC-BY-4.0", "CC-BY-4.0", (True, True, False, True)),
        ("cc by-nc-sa 4.0", "CC-BY-NC-SA-4.0", (True, False, True, True)),
        ("CC_BY-SA_3.0", "CC-BY-SA-3.0", (True, True, True, True)),
        ("cc-by-nc-nd-4.0", "CC-BY-NC-ND-4.0", (True, False, False, False)),
        ("CC0-1.0", "CC0-1.0", (False, True, False, True)),
        ("apache-2.0", "Apache-2.0", (True, True, False, True)),
        ("ODbL-1.0", "ODbL-1.0", (True, True, True, True)),
    ],
)
def test_common_licences_are_known_however_they_are_spelled(text, name, asks):
    licence = find_licence(text)

    assert licence.name == name
    assert (licence.attribution, licence.commercial, licence.share_alike, licence.derivatives) == asks


@pytest.mark.parametrize("text", ["", None, "free for all", "CC-BY", "CC-BY-SA-ND-4.0", "private", "4.0"])
def test_what_is_no_known_licence_is_not_taken_for_one(text):
    assert find_licence(text) is None


def test_one_licence_for_all_is_the_licence_of_the_whole():
    terms = combine_terms({"a": "CC-BY-4.0", "b": "cc by 4.0"})

    assert (terms.verdict, terms.hub_id) == ("single", "cc-by-4.0")
    assert titles(terms) == ["Attribution"]


def test_share_alike_with_and_without_commerce_cannot_be_met_together():
    terms = combine_terms({"photos": CAVITY, "opg": OPG, "teeth": "CC-BY-SA-4.0", "cases": "Apache-2.0"})
    conflict = terms.rules[-1].text

    assert (terms.verdict, terms.hub_id) == ("mixed", None)
    assert titles(terms) == ["No commercial use", "Share alike", "Attribution", "No licence fits the whole"]
    assert "CC-BY-SA-4.0 (photos and teeth) and CC-BY-NC-SA-4.0 (opg) cannot be met together" in conflict


@pytest.mark.parametrize(
    ("stated", "verdict"),
    [
        pytest.param(["CC-BY-4.0", OPG], "combined", id="attribution joins share-alike"),
        pytest.param(["MIT", "Apache-2.0"], "combined", id="two permissive ones"),
        pytest.param(["CC-BY-SA-3.0", "CC-BY-SA-4.0"], "combined", id="an earlier version lets a later one in"),
        pytest.param(["CC-BY-SA-4.0", "CC-BY-NC-4.0"], "mixed", id="share-alike would allow what the other forbids"),
        pytest.param(["ODbL-1.0", "CC-BY-SA-4.0"], "mixed", id="two kinds of share-alike"),
        pytest.param(["CC-BY-4.0", None], "unclear", id="one that is not stated"),
        pytest.param(["CC-BY-4.0", "ask me"], "unclear", id="one that nobody knows"),
    ],
)
def test_what_follows_from_several_licences(stated, verdict):
    terms = combine_terms(dict(zip("ab", stated, strict=True)))

    assert (terms.verdict, terms.hub_id) == (verdict, None)


def test_what_is_not_stated_grants_nothing():
    (rule, attribution) = combine_terms({"a": " ", "b": "CC-BY-4.0"}).rules

    assert "a. That grants nothing" in rule.text
    assert "authors of b," in attribution.text


def test_the_card_of_real_sets_tells_terms_tables_and_examples(real_dataset):
    card = DatasetCard.load(real_dataset / "README.md")
    text = card.text

    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "per-source", "LICENSE.md")
    assert card.data.language == ["en", "es"]
    assert "**No licence stated**: ufba\\_teeth, tooth\\_tracking and tooth\\_decay." in text
    assert "**No commercial use**: opg\\_pathology" in text
    assert re.search(r"\| opg\\_pathology \| yolo \| annotators \| 13 \| \d+ \| unknown \| CC-BY-NC-SA-4.0 \|", text)
    assert text.count("> **A**: ") >= 10
    for figure in ("findings.png", "questions.png"):
        assert f"](figures/{figure})" in text
        assert Image.open(real_dataset / "figures" / figure).width == 800
    terms = (real_dataset / "LICENSE.md").read_text()
    assert "<https://creativecommons.org/licenses/by-nc-sa/4.0/>" in terms


def test_the_card_tells_how_far_guessing_gets(vqa_dataset):
    table = (vqa_dataset / "README.md").read_text().partition("How far one gets without looking")[2]

    assert re.search(r"\| presence \| 50\.0 % \| 50\.0 % \| 50\.0 % \| \d+ \|", table)


def test_known_limits_are_told_in_words_and_only_where_something_is_wrong(tmp_path):
    for number in range(4):
        for folder in ("images", "labels"):
            (tmp_path / folder).mkdir(exist_ok=True)
        Image.new("L", (40, 20), 60 * number).save(tmp_path / "images" / f"p{number}.png")
        (tmp_path / "labels" / f"p{number}.txt").write_text("0 .2 .7 .1 .1\n" + "0 .2 .7\n" * (number == 0))
    (tmp_path / "data.yaml").write_text("names: [caries]\ntrain: images\nval: images\n")  # shared_split, an info
    source = {"name": "s", "reader": "yolo", "root": ".", "modality": "panoramic", "classes": {"caries": "caries"}}
    (tmp_path / "sources.yaml").write_text(yaml.safe_dump({"questions": {"cap": 1}, "sources": [source]}))
    build_vqa(load_sources(tmp_path / "sources.yaml"), tmp_path / "out", progress=False)
    (counts,) = json.loads((tmp_path / "out" / "build_report.json").read_text())["sources"]
    limits = (tmp_path / "out" / "README.md").read_text().partition("## Known limits")[2]

    assert counts["problem_counts"]["shared_split"] == 1
    assert counts["fault_counts"] == {"bad_label_line": 1}
    assert "- s: lines of annotations that could not be read (1). `dentalgemma audit` says where." in limits
    assert "shared" not in limits


def test_every_problem_that_a_card_words_is_one_that_is_documented():
    page = (Path(__file__).parents[1] / "docs" / "datasets.md").read_text()

    assert all(f"| `{code}` |" in page for code in FAULTS)


def test_the_legend_lies_on_no_bar(tmp_path, monkeypatch):
    """The shortest bar is at the bottom, where a legend was: all are as long as the longest here."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    draw_bars(tmp_path / "p" / "p.png", {f"finding {n}": {"train": 5, "test": 4} for n in range(9)}, "images")
    (figure,) = drawn
    figure.canvas.draw()
    (legend,) = figure.legends

    assert not figure.axes[0].get_window_extent().overlaps(legend.get_window_extent())
    assert [text.get_text() for text in legend.get_texts()] == ["train", "validation", "test"]


def test_a_set_under_one_licence_says_so_to_the_hub(vqa_dataset):
    data = DatasetCard.load(vqa_dataset / "README.md").data

    assert data.license == "apache-2.0"
    assert not {"license_name", "license_link"} & set(data.to_dict())


def test_text_from_a_sources_file_stays_text(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    for number in range(3):
        Image.new("L", (40, 20), 60 * number).save(tmp_path / "images" / f"p{number}.png")
        (tmp_path / "labels" / f"p{number}.txt").write_text("0 .2 .7 .1 .1\n")
    licence = "MIT |\n---\nlicense: mit\n[x](javascript:alert(1)) <script>"
    source = {"name": "s", "reader": "yolo", "root": ".", "modality": "panoramic", "classes": {0: "caries"}}
    source |= {"license": licence, "url": "javascript:alert(1)"}
    (tmp_path / "sources.yaml").write_text(yaml.safe_dump({"questions": {"cap": 1}, "sources": [source]}))
    build_vqa(load_sources(tmp_path / "sources.yaml"), tmp_path / "out", progress=False)

    for name in ("README.md", "LICENSE.md"):
        text = (tmp_path / "out" / name).read_text()
        assert "\nlicense: mit" not in text
        assert not re.search(r"(?<!\\)\]\(javascript", text)
        assert "<script" not in text.replace(r"\<script", "")
    assert DatasetCard.load(tmp_path / "out" / "README.md").data.license == "other"


def test_markdown_is_escaped_and_only_web_addresses_are_links():
    assert escape_markdown("a|b\n# c_d") == r"a\|b \# c\_d"
    assert quote("- left: caries\n- right: none", "A") == "> **A**: \\- left: caries  \n> \\- right: none"
    assert link("https://example.org/a_b") == "<https://example.org/a_b>"
    assert link("https://example.org/a> [x](y)") == r"https://example.org/a\> \[x\](y)"
    assert link(None) == ""


def test_the_same_plot_is_the_same_file(tmp_path):
    counts = {"$x^2$ lesions": {"train": 3, "test": 1}, "teeth": {"train": 9}}
    for name in "ab":
        draw_bars(tmp_path / name / "p.png", counts, "images")

    assert (tmp_path / "a" / "p.png").read_bytes() == (tmp_path / "b" / "p.png").read_bytes()
    assert b"matplotlib" not in (tmp_path / "a" / "p.png").read_bytes().lower()
