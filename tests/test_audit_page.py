"""The audit page in a real browser: what it shows, and that nothing in a label or a file name runs."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from dentalgemma.cli import app

HOSTILE = "</td><script>document.title='PWNED'</script><img src=x onerror=document.title='PWNED'>"
NAMES = {"one": "thing", "other": "things", "condition": "a thing"}


def run_audit(*arguments):
    result = CliRunner().invoke(app, ["audit", *map(str, arguments)])
    assert not isinstance(result.exception, Exception) or isinstance(result.exception, SystemExit), result.output
    return result


@pytest.fixture(scope="module")
def hostile(phantoms, tmp_path_factory):
    """Phantoms whose raw label, finding and annotation file names try to be HTML."""
    root = tmp_path_factory.mktemp("hostile")
    document = json.loads((phantoms / "coco" / "_annotations.coco.json").read_text())
    document["categories"][0]["name"] = HOSTILE
    (root / "_annotations.coco.json").write_text(json.dumps(document))
    for path in (phantoms / "coco").glob("*.jpg"):
        shutil.copy(path, root)
    shutil.copy(root / "phantom00001.jpg", root / "<b>phantom.jpg")
    (root / "README.txt").write_text("* 50% probability of <script>document.title='PWNED'</script> flip\n")
    term = {"kind": "pathology", "en": NAMES, "es": {**NAMES, "gender": "f"}}
    (root / "more.yaml").write_text(json.dumps({HOSTILE: term}))
    classes = {category["name"]: category["name"] for category in document["categories"]}
    source = {"name": "s", "reader": "coco", "root": ".", "modality": "panoramic", "classes": classes}
    source["expected_images"] = {HOSTILE: 1}
    (root / "sources.yaml").write_text(json.dumps({"vocabulary": "more.yaml", "sources": [source]}))
    return root


def test_labels_that_are_html_are_text_and_no_script_runs(hostile, open_page, tmp_path):
    run_audit(hostile / "sources.yaml", "--html", tmp_path / "audit.html")
    document = open_page(tmp_path / "audit.html")

    assert "<title>Audit of annotations</title>" in document
    assert "PWNED'&lt;/script&gt;" in document
    assert "<script" not in document
    assert "onerror=document.title='PWNED'&gt;" in document


def test_the_page_holds_everything_itself(hostile, open_page, tmp_path):
    run_audit(hostile / "sources.yaml", "--html", tmp_path / "audit.html")
    page = (tmp_path / "audit.html").read_text()
    document = open_page(tmp_path / "audit.html")

    assert "http://" not in page
    assert "https://" not in page
    assert all(part.startswith("data:image/jpeg;base64,") for part in page.split('src="')[1:])
    for label in ("infection", "impacted tooth", "broken down crown or root"):
        assert f"<h4>{label}</h4>" in document
        section = document.split(f"<h4>{label}</h4>")[1].split("</section>")[0]
        assert section.count("<img") == 8
        assert section.count("<rect") >= 3


def test_strict_fails_on_an_error_and_only_then(hostile, phantoms):
    assert run_audit(hostile / "sources.yaml").exit_code == 0
    assert run_audit(hostile / "sources.yaml", "--strict").exit_code == 1
    assert run_audit(phantoms / "sources.yaml", "--strict").exit_code == 0


def test_copies_mosaics_and_leaks_are_told_in_the_terminal(third_party, tmp_path):
    root = third_party / "opg_pathology_yolo" / "Dental OPG XRAY Dataset" / "Augmented_Data"
    classes = {str(number): "caries" for number in range(6)}
    source = {"name": "s", "reader": "yolo", "root": str(root), "modality": "panoramic", "classes": classes}
    (tmp_path / "s.yaml").write_text(json.dumps({"sources": [source]}))
    output = run_audit(tmp_path / "s.yaml").output

    assert "3 sets of files show the same pixels." in output
    assert "0 pairs show the same picture in other pixels, 0 of them mirrored." in output
    assert "6 pictures are mosaics." in output
