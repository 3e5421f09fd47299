"""Whatever names, labels and licences say, a dataset card has the intended metadata, and its page does nothing."""

import json
import re

import markdown
import pytest
import yaml
from huggingface_hub import DatasetCard

from data_builders.chat import SPLITS
from data_builders.configurations import split_by_source
from data_builders.dataset_card import escape_markdown, write_vqa_card
from data_builders.dataset_folder import Configuration, write_card
from data_builders.instruct_card import write_instruct_card
from data_builders.sources import load_vocabulary

pytestmark = pytest.mark.filterwarnings("ignore:Glyph")
RAN = "document.documentElement.dataset.ran=1"
HOSTILE = (
    f"</td><script>{RAN}</script>",
    f"[x](javascript:{RAN})",
    "\n---\nlicense: mit\n---\n",
    "*a",
    "!!python/object/apply:os.system [x]",
    f'<img src=x onerror="{RAN}">',
    f"<a href='javascript:{RAN}'>x</a>",
    "&lt;script&gt;, 5 < 6 & 7",
    "{{ 7 * 7 }} {% raw %}",
    "- a: [b, {c: d}] # e",
    "zähne 🦷 | عربى \u202etxt.exe\u202c `code` ```",
    "![x](https://example.org/a.png)",
    "null",
)
NASTY = " ".join(HOSTILE)


def front_matter(folder):
    """The metadata as YAML alone reads them; the card's first two lines of dashes enclose them."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    opening, block, _ = re.split(r"^---$", text, maxsplit=2, flags=re.MULTILINE)
    assert opening == ""
    return yaml.safe_load(block)


def report_of(folder):
    """The report as a build has it in hand; in its file the splits are in the order of their names."""
    report = json.loads((folder / "build_report.json").read_text())
    return report | {"splits": {split: report["splits"][split] for split in SPLITS}}


@pytest.fixture(scope="module")
def hostile(vqa_dataset, tmp_path_factory):
    """The VQA card of a report and rows in which every text from data is hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "data").mkdir()
    report = report_of(vqa_dataset)
    (source,) = report["sources"]
    report["sources"] = [
        {**source, "name": text, "license": text, "url": text, "fault_counts": {text: 2}, "origin": origin}
        for text, origin in zip((*HOSTILE, NASTY), ["human", "model"] * len(HOSTILE), strict=False)
    ]
    report["question_types_by_split"] = {text: {"train": 3} for text in HOSTILE}
    report["dropped_by_balance"] = {"train": dict.fromkeys(HOSTILE, 1)}
    row = {"language": "en", "images": ["x"]}
    rows = [
        {
            **row,
            "row_id": text,
            "source": text,
            "question_type": text,
            "prompt": [{"role": "user", "content": f"{text}\n{text}"}],
            "completion": [{"role": "assistant", "content": f"{NASTY}\n{text}"}],
        }
        for text in HOSTILE
    ]
    write_vqa_card(folder, report, {"train": rows}, vocabulary=load_vocabulary(), languages=["en"])
    return folder


@pytest.fixture(scope="module")
def hostile_cases(instruct_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile_cases")
    (folder / "data").mkdir()
    report = report_of(instruct_dataset)
    (source,) = report["sources"]
    report["sources"] = [{**source, "name": text, "license": text, "url": text, "pii": "off"} for text in HOSTILE]
    report["conditions"] = {text: {"train": 1, "validation": 0, "test": 0} for text in HOSTILE}
    write_instruct_card(folder, report, language="en")
    return folder


def test_hostile_names_labels_and_licences_leave_the_metadata_as_intended(vqa_dataset, hostile):
    intended = front_matter(vqa_dataset)
    terms = {"license": "other", "license_name": "per-source", "license_link": "LICENSE.md"}
    sizes = {"download_size": 0}  # there is no parquet beside this card

    assert intended["license"] == "apache-2.0"
    assert front_matter(hostile) == {**intended, **terms, "dataset_info": {**intended["dataset_info"], **sizes}}
    assert DatasetCard.load(hostile / "README.md").data.to_dict() == front_matter(hostile)


def test_hostile_cases_leave_the_metadata_as_intended(instruct_dataset, hostile_cases):
    intended = front_matter(instruct_dataset)
    terms = {"license": "other", "license_name": "per-source", "license_link": "LICENSE.md"}

    assert front_matter(hostile_cases) == {
        **intended,
        **terms,
        "dataset_info": {**intended["dataset_info"], "download_size": 0},
    }


def test_metadata_keep_every_value_as_it_is_whatever_yaml_would_make_of_it(tmp_path):
    (tmp_path / "data").mkdir()
    names = ("null", "yes", "1e3", "0x1F", "2024-01-01", "*a", "!!python/none", "a: b", "# c", "zähne 🦷", *HOSTILE)
    own = Configuration("data", {"train": {"rows": 1, "bytes": 5}}, with_images=True)
    write_card(tmp_path, NASTY, dict.fromkeys(names, own), tags=list(names), license_name=NASTY)
    found = front_matter(tmp_path)

    assert found["tags"] == list(names)
    assert found["license_name"] == NASTY
    assert {entry["config_name"] for entry in found["configs"]} == set(names)
    assert {entry["config_name"] for entry in found["dataset_info"]} == set(names)
    assert set(found) == {"tags", "license_name", "configs", "dataset_info"}


def test_metadata_are_those_that_push_to_hub_writes_and_reads(vqa_dataset):
    from datasets.info import DatasetInfosDict
    from datasets.utils.metadata import MetadataConfigs

    data = DatasetCard.load(vqa_dataset / "README.md").data
    info = DatasetInfosDict.from_dataset_card_data(data)["default"]

    assert data["configs"] == [
        {
            "config_name": "default",
            "data_files": [{"split": split, "path": f"data/{split}-*"} for split in ("train", "validation", "test")],
        }
    ]
    assert MetadataConfigs.from_dataset_card_data(data).get_default_config_name() == "default"
    assert info.features["images"].feature.dtype == "PIL.Image.Image"
    assert list(info.splits) == ["train", "validation", "test"]


def as_page(path, *texts):
    """The texts as a Markdown renderer that lets HTML pass shows them; a browser has to be safe even then."""
    bodies = [markdown.markdown(text, extensions=["tables", "fenced_code"]) for text in texts]
    path.write_text(f"<!doctype html><html><meta charset=utf-8><body>{'<hr>'.join(bodies)}</body></html>", "utf-8")
    return path


def test_the_pages_are_inert_in_a_browser(hostile, hostile_cases, tmp_path, open_page):
    cards = [hostile / "README.md", hostile / "LICENSE.md", hostile_cases / "README.md", hostile_cases / "LICENSE.md"]
    texts = [path.read_text("utf-8").split("\n---\n", 1)[-1] for path in cards]
    page = open_page(as_page(tmp_path / "cards.html", *texts))
    control = open_page(as_page(tmp_path / "control.html", NASTY))

    assert "data-ran" in control.partition(">")[0] + control.partition("<html")[2][:40]
    assert 'href="javascript:' in control
    assert "data-ran" not in page
    assert not re.search(r"<(?:script|img src=.?x|a href=.?javascript)", page)
    assert "example.org/a.png" not in "".join(re.findall(r"<img[^>]*>", page))
    assert page.count("zähne 🦷") > 5  # and what they say is still there
    assert page.count("</table>") >= 6


def test_what_hides_or_turns_text_is_dropped_and_plain_names_stay():
    assert escape_markdown("a\u202eb\u0007c") == "abc"
    assert (
        escape_markdown("Zahn 36, caries (deep) ≥ 2 mm: OPG-Scan/1 عربى")
        == "Zahn 36, caries (deep) ≥ 2 mm: OPG-Scan/1 عربى"
    )


def test_a_card_split_by_source_is_as_safe(vqa_dataset, hostile, tmp_path):
    """The body that was there goes along; what is added to it comes from the report."""
    report = json.loads((vqa_dataset / "build_report.json").read_text())
    name = report["sources"][0]["name"]
    (tmp_path / "in" / "data").mkdir(parents=True)
    for path in (vqa_dataset / "data").iterdir():
        (tmp_path / "in" / "data" / path.name).symlink_to(path)
    report["sources"][0] |= {"license": NASTY, "url": NASTY}
    (tmp_path / "in" / "build_report.json").write_text(json.dumps(report))
    (tmp_path / "in" / "README.md").write_text((hostile / "README.md").read_text())
    split_by_source(tmp_path / "in", tmp_path / "out")
    found = front_matter(tmp_path / "out")
    table = (tmp_path / "out" / "README.md").read_text().partition("## Configurations")[2].partition("\n## ")[0]

    assert [entry["config_name"] for entry in found["configs"]] == [name]
    assert found["license"] == "other"
    assert "<script" not in table
    assert not re.search(r"(?<!\\)\]\(javascript", table)
