"""The gallery: a page that needs nothing else, shows what it says it shows, and runs nothing that comes from data."""

import html
import json
import re
from collections import Counter

import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_builders.gallery import describe_claim, take_turns
from data_builders.sources import load_sources, load_vocabulary
from data_builders.vqa import build_vqa

# Without the marks that a name may not have.
HOSTILE = "</td></script><script>document['title']='PWNED'</script><img src=x onerror=document['title']='PWNED'>"


def page_data(folder):
    """What the page holds for its script."""
    text = (folder / "gallery.html").read_text()
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def sections(document):
    """The rows that a rendered page shows: family, source, language, split."""
    tags = re.findall(r'<section><div class="tags"><b>(.*?)</b>(.*?)</div>', document)
    return [(family.replace(" ", "_"), *rest.strip(" ·").split(" · ")[:3]) for family, rest in tags]


def test_the_page_shows_rows_with_their_pictures_findings_and_claims(open_page, vqa_dataset):
    document = open_page(vqa_dataset / "gallery.html")
    data = page_data(vqa_dataset)
    first = [row for row in data["rows"] if row["image"] == data["rows"][0]["image"]]
    record = data["records"][first[0]["record"]]

    assert document.count("<article>") == 10
    assert document.count('src="data:image/jpeg;base64,') == 10
    assert f"page 1 of 4 · {len(data['images'])} images, {len(data['rows'])} rows" in document
    article = document.split("<article>")[1]
    assert article.count("<path") == sum(len(finding["parts"]) for finding in record["findings"])
    for row in first:
        assert html.escape(row["question"], quote=False) in article
        assert html.escape(row["answer"], quote=False) in article
        assert all(html.escape(claim["text"], quote=False) in article for claim in row["claims"])


def test_filters_and_pages_are_taken_from_the_address(open_page, vqa_dataset):
    wanted = Counter(row["split"] for row in page_data(vqa_dataset)["rows"] if row["family"] == "presence")
    document = open_page(vqa_dataset / "gallery.html", "family=presence&split=train&page=2")

    assert re.search(rf"page 2 of \d+ · \d+ images, {wanted['train']} rows", document)
    assert {(family, split) for family, _, _, split in sections(document)} == {("presence", "train")}
    nothing = open_page(vqa_dataset / "gallery.html", "family=presence&language=es")
    assert sections(nothing) != []  # a language that no row has is no filter


def test_real_sets_in_two_languages_are_shown(open_page, real_dataset):
    document = open_page(real_dataset / "gallery.html", "source=opg_pathology&language=es")
    rows = sections(document)

    assert len(rows) > 10
    assert {(source, language) for _, source, language, _ in rows} == {("opg_pathology", "es")}
    assert 'lang="es"' in document


def test_labels_that_look_like_markup_are_shown_and_not_run(open_page, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    for number in range(3):
        Image.new("L", (60, 30), 40 * number).save(tmp_path / "images" / f"p{number}.png")
        (tmp_path / "labels" / f"p{number}.txt").write_text("0 .2 .7 .1 .1\n")
    names = json.dumps({"one": HOSTILE, "other": HOSTILE, "condition": HOSTILE})
    spanish = json.dumps({"one": HOSTILE, "other": HOSTILE, "condition": HOSTILE, "gender": "f"})
    (tmp_path / "own.yaml").write_text(f"odd_thing: {{kind: pathology, en: {names}, es: {spanish}}}\n")
    (tmp_path / "sources.yaml").write_text(
        "vocabulary: own.yaml\nquestions: {cap: 1}\nsources: [{name: s, reader: yolo, root: ., modality: panoramic, "
        "classes: {0: odd_thing}, license: '</td><script>alert(1)</script>'}]\n"
    )
    build_vqa(load_sources(tmp_path / "sources.yaml"), tmp_path / "out", progress=False)

    document = open_page(tmp_path / "out" / "gallery.html")

    assert len(sections(document)) > 5
    assert html.escape(HOSTILE, quote=False) in document
    assert "<title>Dental VQA gallery</title>" in document
    assert document.count("<script") == 2  # the data and the page's own
    assert "<img src=x" not in document
    card = (tmp_path / "out" / "README.md").read_text() + (tmp_path / "out" / "LICENSE.md").read_text()
    assert "<script" not in card.replace(r"\<script", "")


def test_the_page_loads_nothing_from_anywhere(vqa_dataset):
    text = (vqa_dataset / "gallery.html").read_text()

    assert "default-src 'none'" in text
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) == {"http://www.w3.org/2000/svg"}


def test_the_page_is_bounded_and_says_so(phantoms, tmp_path):
    report = build_vqa(load_sources(phantoms / "sources.yaml"), tmp_path / "out", gallery=7, progress=False)
    images = sum(split["images"] for split in report["splits"].values())
    data = page_data(tmp_path / "out")

    assert f"Showing 7 of {images} images" in (tmp_path / "out" / "gallery.html").read_text()
    assert len(data["images"]) == len({row["image"] for row in data["rows"]}) == 7
    table = pq.read_table(tmp_path / "out" / "data").to_pylist()
    of_these = [row["row_id"] for row in table if row["image_id"] in data["images"]]
    assert sorted(row["id"] for row in data["rows"]) == sorted(of_these)
    assert {row["split"] for row in data["rows"]} == {"train", "validation", "test"}


def test_no_page_is_written_where_none_is_wanted(phantoms, tmp_path):
    build_vqa(load_sources(phantoms / "sources.yaml"), tmp_path / "out", gallery=0, progress=False)

    assert not (tmp_path / "out" / "gallery.html").exists()
    assert "gallery" not in (tmp_path / "out" / "README.md").read_text()


def test_pictures_are_reduced(phantoms, tmp_path):
    source = tmp_path / "s"
    (source / "images").mkdir(parents=True)
    (source / "labels").mkdir()
    for number in range(3):
        Image.effect_noise((2400, 1200), 80 + number).save(source / "images" / f"p{number}.jpg")
        (source / "labels" / f"p{number}.txt").write_text("0 .2 .7 .1 .1\n")
    (source / "sources.yaml").write_text(
        "questions: {cap: 1}\nsources: [{name: s, reader: yolo, root: ., modality: panoramic, classes: {0: caries}}]\n"
    )
    build_vqa(load_sources(source / "sources.yaml"), tmp_path / "out", progress=False)

    assert (tmp_path / "out" / "gallery.html").stat().st_size < 3 * 400_000
    assert (source / "images" / "p0.jpg").stat().st_size > 1_000_000


def test_rare_kinds_get_their_turn():
    rows = [{"row_id": f"{n}", "kind": "rare" if n < 3 else "common"} for n in range(100)]
    order = list(take_turns(rows, lambda row: row["kind"], seed=1))

    assert [row["kind"] for row in order[:6]].count("rare") == 3
    assert sorted(row["row_id"] for row in order) == sorted(row["row_id"] for row in rows)
    assert [row["row_id"] for row in order] != [
        row["row_id"] for row in take_turns(rows, lambda row: row["kind"], seed=2)
    ]


@pytest.mark.parametrize(
    ("claim", "text"),
    [
        ({"label": "caries", "count": 2, "region": "left_maxillary"}, "carious lesion × 2 · region: left maxillary"),
        ({"label": "caries", "negated": True}, "no carious lesion"),
        ({"label": "tooth", "count": 1, "tooth": "36", "annotations": ["a"]}, "tooth × 1 · tooth: 36"),
        ({"label": "caries", "hedged": True, "count": None}, "carious lesion · hedged"),
    ],
)
def test_a_claim_is_told_in_a_few_words(claim, text):
    assert describe_claim(claim, load_vocabulary()) == text
