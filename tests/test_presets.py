"""Presets: the true class maps on layouts as the exporters write them, and on the real files where they are."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from datasets import load_dataset

from data_builders.audit import audit
from data_builders.dataset_folder import BuildError
from data_builders.dentition import TOOTH_TYPES, tooth_type
from data_builders.phantom import HEIGHT, WIDTH, make_phantoms
from data_builders.phantom_cases import DISEASES, make_cases
from data_builders.presets import list_presets, load_preset
from data_builders.sources import SourcesError
from data_builders.vqa import build_vqa
from dentalgemma.cli import main

# As the public sets have them; the panoramics' ids are not in the order of the alphabet.
OPG_IDS = {"caries": 0, "infection": 1, "impacted_tooth": 2, "broken_down_crown_or_root": 4}
OPG_FOLDERS = {
    "caries": "Caries",
    "infection": "Infection",
    "impacted_tooth": "Impacted teeth",
    "broken_down_crown_or_root": "BDC-BDR",
}
COUNT = 16


def pixels(finding):
    return [(x * WIDTH, y * HEIGHT) for x, y in finding.parts[0]]


def save(phantom, folder, name=None):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (name or f"{phantom.name}.jpg")
    phantom.image.save(path)
    return path


def write_photographs(root, phantoms):
    """YOLOv5-OBB as Roboflow writes it: pixels, class names, a difficulty."""
    for number, phantom in enumerate(phantoms):
        split = root / ("train", "valid", "test")[number % 3]
        save(phantom, split / "images")
        (split / "labelTxt").mkdir(exist_ok=True)
        lines = []
        for finding in phantom.findings:
            corners = " ".join(f"{value:.1f}" for point in pixels(finding) for value in point)
            lines.append(f"{corners} {'cavity' if finding.label == 'caries' else 'normal'} 0\n")
        (split / "labelTxt" / f"{phantom.name}.txt").write_text("".join(lines))
    (root / "data.yaml").write_text("train: ../train/images\nnc: 2\nnames: ['cavity', 'normal']\n")


def write_class_folders(root, phantoms):
    for phantom in phantoms:
        for label in {finding.label for finding in phantom.findings}:
            save(phantom, root / OPG_FOLDERS[label])
    save(next(p for p in phantoms if not p.findings), root / "Healthy Teeth")


def write_detection(root, phantoms):
    """Label files beside the images, no data.yaml."""
    for phantom in phantoms:
        save(phantom, root)
        lines = []
        for finding in phantom.findings:
            left, top, right, bottom = finding.bounds
            box = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
            lines.append(f"{OPG_IDS[finding.label]} {' '.join(f'{value:.6f}' for value in box)}")
        (root / f"{phantom.name}.txt").write_text("\n".join(lines))


def write_outlines(root, phantoms):
    """VIA 2 without labels: an empty attribute, or none; the last image is listed and not annotated."""
    document = {}
    for phantom in phantoms:
        size = save(phantom, root).stat().st_size
        regions = []
        for number, tooth in enumerate(phantom.teeth if phantom is not phantoms[-1] else ()):
            xs, ys = zip(*pixels(tooth), strict=True)
            shape = {"name": "polygon", "all_points_x": [*xs, xs[0]], "all_points_y": [*ys, ys[0]]}
            regions.append({"shape_attributes": shape, "region_attributes": {"Teeth": ""} if number % 3 else {}})
        name = f"{phantom.name}.jpg"
        document[f"{name}{size}"] = {"filename": name, "size": size, "regions": regions, "file_attributes": {}}
    (root / "annotations.json").write_text(json.dumps(document))


def write_tooth_types(root, phantoms):
    """Roboflow's COCO with a first category named after the project, and the images in a folder of their own."""
    names = ["dental", *(name.replace("_", " ") for name in TOOTH_TYPES)]
    images, annotations = [], []
    for number, phantom in enumerate(phantoms):
        save(phantom, root / "imgs")
        images.append({"id": number, "file_name": f"{phantom.name}.jpg", "width": WIDTH, "height": HEIGHT})
        for tooth in phantom.teeth:
            (left, top), (right, bottom) = (f(pixels(tooth)) for f in (min, max))
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": number,
                    "category_id": 1 + TOOTH_TYPES.index(tooth_type(tooth.tooth)),
                    "bbox": [left, top, right - left, bottom - top],
                    "segmentation": [],
                    "iscrowd": 0,
                }
            )
    categories = [
        {"id": n, "name": name, "supercategory": "none" if not n else "dental"} for n, name in enumerate(names)
    ]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (root / "_annotations.coco.json").write_text(json.dumps(document))


@pytest.fixture(scope="module")
def truth():
    """Different phantoms for each set."""
    names = ("photographs", "opg", "outlines", "types")
    return {name: list(make_phantoms(COUNT, seed=5, start=100 * n)) for n, name in enumerate(names)}


@pytest.fixture(scope="module")
def downloads(truth, tmp_path_factory):
    """All downloads below one folder, unpacked as it happens: some with a second folder of the same name around."""
    data = tmp_path_factory.mktemp("downloads")
    opg = data / "archive" / "Dental OPG XRAY Dataset" / "Dental OPG XRAY Dataset"
    panoramic = data / "Panoramic Dental Xray Dataset" / "Panoramic Dental Xray Dataset"
    write_photographs(data / "Dental Cavity Detection Dataset", truth["photographs"])
    write_class_folders(opg / "Dental OPG (Classification)", truth["opg"])
    write_detection(opg / "Dental OPG (Object Detection)" / "Original Dataset", truth["opg"])
    write_outlines(panoramic / "firstpart", truth["outlines"])
    write_tooth_types(panoramic / "secondpart" / "train", truth["types"])
    return data


@pytest.fixture(scope="module")
def report(downloads):
    found = audit(load_preset(["dentalgemma_vqa"], downloads), progress=False)
    return {source["name"]: source for source in found["sources"]}


def count(phantoms):
    return Counter(finding.label for phantom in phantoms for finding in phantom.findings)


def counted(source):
    return {label: counts["findings"] for label, counts in source["classes"].items()}


def test_the_photographs_are_read_as_cavities_and_normal_teeth(report, truth):
    labels = count(truth["photographs"])

    assert report["cavity_photos"]["reader"] == "dota"
    assert counted(report["cavity_photos"]) == {
        "carious_tooth": labels["caries"],
        "healthy_tooth": labels.total() - labels["caries"],
    }


def test_detection_and_classification_give_every_disease_its_own_name(report, truth):
    images = Counter(label for phantom in truth["opg"] for label in {f.label for f in phantom.findings})

    assert counted(report["opg_detection"]) == count(truth["opg"])
    assert counted(report["opg_classification"]) == images + Counter(healthy_tooth=1)


def test_teeth_are_read_from_outlines_without_labels_and_from_types(report, truth):
    assert counted(report["panoramic_teeth_via"]) == {"tooth": sum(len(p.teeth) for p in truth["outlines"][:-1])}
    assert counted(report["panoramic_teeth_coco"]) == {"tooth": sum(len(p.teeth) for p in truth["types"])}


def test_the_only_errors_are_numbers_of_images_that_the_full_sets_would_have(report):
    errors = {(name, p["code"]) for name, s in report.items() for p in s["problems"] if p["severity"] == "error"}

    assert errors == {("opg_classification", "unexpected_count"), ("opg_detection", "unexpected_count")}


def test_a_part_of_the_sets_is_built_and_every_source_has_rows_under_its_licence(downloads, tmp_path):
    sources = load_preset(["dentalgemma_vqa"], downloads)
    build_vqa(sources, tmp_path / "out", progress=False)
    rows = [row for split in load_dataset(str(tmp_path / "out")).values() for row in split.remove_columns("images")]

    assert {(row["source"], row["license"]) for row in rows} == {
        ("cavity_photos", "CC-BY-SA-4.0"),
        ("opg_classification", "CC-BY-NC-SA-4.0"),
        ("opg_detection", "CC-BY-NC-SA-4.0"),
        ("panoramic_teeth_coco", "CC-BY-SA-4.0"),
        ("panoramic_teeth_via", "CC-BY-SA-4.0"),
    }
    with pytest.raises(BuildError, match="images show caries, 119 are expected: is the class map right"):
        build_vqa(sources, tmp_path / "strict", strict=True, progress=False)


def test_links_to_downloads_elsewhere_are_followed(downloads, tmp_path):
    (tmp_path / "link").symlink_to(downloads / "archive")

    assert [source.name for source in load_preset(["opg_detection"], tmp_path).sources] == ["opg_detection"]


def test_what_is_missing_is_said_with_its_layout_and_where_it_is_from(downloads, tmp_path):
    (tmp_path / "Dental Cavity Detection Dataset").symlink_to(downloads / "Dental Cavity Detection Dataset")
    with pytest.raises(SourcesError) as caught:
        load_preset(["dentalgemma_vqa"], tmp_path)

    message = str(caught.value)
    assert f"{tmp_path} lacks opg_classification, panoramic_teeth_via, panoramic_teeth_coco, opg_detection." in message
    assert "To build from what is there: --preset cavity_photos." in message
    assert "Dental OPG (Classification)/{BDC-BDR,Caries," in message
    assert "https://www.kaggle.com/datasets/imtkaggleteam/dental-opg-xray-dataset" in message
    assert [source.name for source in load_preset(["cavity_photos"], tmp_path).sources] == ["cavity_photos"]


def test_a_set_that_is_there_in_two_forms_is_refused(tmp_path):
    for name in ("Dental Cavity Detection Dataset", "cavity.v2.coco"):
        (tmp_path / name).mkdir()

    with pytest.raises(SourcesError, match=r"cavity_photos is there 2 times, keep one: .*Dataset, .*cavity\.v2\.coco"):
        load_preset(["cavity_photos"], tmp_path)


def test_sources_of_different_presets_are_not_mixed(tmp_path):
    with pytest.raises(
        SourcesError, match="no preset holds opg_detection, dental_25k_instruct; there are dentalgemma_"
    ):
        load_preset(["opg_detection", "dental_25k_instruct"], tmp_path)


@pytest.mark.parametrize("path", list_presets().values(), ids=list(list_presets()))
def test_every_source_of_a_preset_states_licence_and_origin_and_its_head_names_the_origin(path):
    text = path.read_text(encoding="utf-8")
    for source in yaml.safe_load(text)["sources"]:
        assert source["license"]
        assert source["url"] in text.split("sources:")[0]


# The real files


def test_the_real_photographs_are_418_with_5030_findings(third_party):
    source = audit(load_preset(["cavity_photos"], third_party), progress=False)["sources"][0]

    assert (source["reader"], source["license"]) == ("coco", "CC-BY-4.0")
    assert (source["images"], source["findings"]) == (418, 5030)
    assert "unexpected_count" not in source["problem_counts"]


def test_the_real_panoramics_agree_with_the_classification_set(third_party):
    source = audit(load_preset(["opg_detection"], third_party), progress=False)["sources"][0]

    assert (source["images"], source["findings"]) == (232, 1204)
    assert {label: counts["images"] for label, counts in source["classes"].items()} == {
        "caries": 119,
        "infection": 23,
        "impacted_tooth": 87,
        "fractured_tooth": 13,
        "broken_down_crown_or_root": 52,
        "healthy_tooth": 223,
    }
    assert "unexpected_count" not in source["problem_counts"]


# The command


def run(monkeypatch, capsys, *arguments):
    """The exit code and the texts of a whole command."""
    monkeypatch.setattr(sys, "argv", ["dentalgemma", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code, capsys.readouterr()


def test_one_source_of_a_preset_is_built_by_the_command(monkeypatch, capsys, downloads, tmp_path):
    monkeypatch.chdir(downloads.parent)
    code, text = run(
        monkeypatch, capsys, "build", "--preset", "opg_detection", "--data", downloads.name, "--out", tmp_path / "out"
    )
    built = json.loads((tmp_path / "out" / "build_report.json").read_text())

    assert code == 0, text.err
    assert "train:" in text.out
    assert [source["name"] for source in built["sources"]] == ["opg_detection"]


def test_the_instruct_preset_takes_the_diagnosis_from_the_line_and_out_of_it(monkeypatch, capsys, tmp_path):
    folder = tmp_path / "downloads" / "dental-2.5k-instruct"
    folder.mkdir(parents=True)
    lines = []
    for case in make_cases(64, seed=6):
        text = f"Please evaluate this dental patient:\n\nPATIENT: {case['condition']}\n{case['messages'][0]['content']}"
        lines.append(json.dumps({"messages": [{"role": "user", "content": text}, case["messages"][1]]}))
    (folder / "cases.jsonl").write_text("\n".join(lines))
    code, text = run(
        monkeypatch, capsys, "build-instruct", "--preset", "dentalgemma_instruct", "--data", tmp_path / "downloads",
        "--out", tmp_path / "out",
    )  # fmt: skip
    rows = [row for split in load_dataset(str(tmp_path / "out")).values() for row in split]

    assert code == 0, text.err
    assert len(rows) == 64
    assert not any(disease.name in row["prompt"][-1]["content"].lower() for row in rows for disease in DISEASES)
    assert {row["license"] for row in rows} == {"Apache-2.0"}


def test_list_shows_every_preset_with_its_sources_and_where_its_file_is(monkeypatch, capsys):
    code, text = run(monkeypatch, capsys, "build", "--preset", "list")

    assert code == 0
    for name, path in list_presets().items():
        assert f"{name}  ({path})" in text.out
        assert all(source["name"] in text.out for source in yaml.safe_load(Path(path).read_text())["sources"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["build"], "name either a sources file, or a --preset with --data", id="neither"),
        pytest.param(["build", "s.yaml", "--preset", "x"], "name either a sources file, or a --preset", id="both"),
        pytest.param(["build", "--preset", "opg_detection"], "--preset opg_detection needs --data", id="no data"),
        pytest.param(["build", "--preset", "opg", "--data", "."], "no preset holds opg; there are", id="unknown"),
        pytest.param(
            ["build", "--preset", "opg_detection", "--data", "."], ". lacks opg_detection.", id="nothing there"
        ),
        pytest.param(["build-instruct", "--preset", "x"], "--preset x needs --data", id="instruct"),
    ],
)
def test_wrong_use_of_presets_is_one_message_and_exit_code_2(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, text = run(monkeypatch, capsys, *arguments, "--out", "out")

    assert code == 2
    assert message in text.err
    assert "Traceback" not in text.err


def test_cases_are_no_images(monkeypatch, capsys, tmp_path):
    (tmp_path / "dental-2.5k-instruct").mkdir()
    code, text = run(
        monkeypatch, capsys, "build", "--preset", "dental_25k_instruct", "--data", tmp_path, "--out", tmp_path / "out"
    )

    assert code == 2
    assert "build them with `dentalgemma build-instruct`" in text.err
