"""Real files of others: counts that were made by hand or by another tool."""

from collections import Counter
from pathlib import Path

import pytest

from data_builders.readers import READERS
from data_builders.records import ImageRecord, Problem
from data_builders.sources import Source

DATA = Path(__file__).parents[2] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="third-party files are not shipped")

OPG = DATA / "opg_pathology_yolo" / "Dental OPG XRAY Dataset"
OPG_CLASSES = {
    0: "caries",
    1: "infection",
    2: "impacted_tooth",
    3: "fractured_tooth",
    4: "broken_down_crown_or_root",
    5: "healthy_tooth",
}


def read(reader, root, classes, **keys):
    source = Source(name="s", reader=reader, root=root, classes=classes, modality="panoramic", **keys)
    items = list(READERS[reader](source))
    return [i for i in items if isinstance(i, ImageRecord)], [i for i in items if isinstance(i, Problem)]


def findings_of(records):
    findings = [finding for record in records for finding in record.findings]
    assert len({finding.finding_id for finding in findings}) == len(findings)
    return findings


def count(problems):
    return Counter((problem.code, problem.severity) for problem in problems)


def test_distinct_images_per_class_of_the_panoramic_set_are_those_of_its_classification_half():
    records, problems = read("yolo", OPG / "Original_Data", OPG_CLASSES)

    images = Counter(label for record in records for label in {finding.label for finding in record.findings})
    assert (len(records), len(findings_of(records))) == (232, 1204)
    assert [images[label] for label in OPG_CLASSES.values()] == [119, 23, 87, 13, 52, 223]
    assert count(problems) == {("image_missing", "warning"): 219}


def test_the_augmented_half_keeps_its_splits_and_names_images_without_labels():
    records, problems = read("yolo", OPG / "Augmented_Data", OPG_CLASSES)

    without = [problem.path.name for problem in problems if problem.code == "labels_missing"]
    labelled = Counter(record.declared_split for record in records if record.path.name not in without)
    assert labelled == {"train": 558, "validation": 23, "test": 23}
    assert len(without) == 3
    assert all(".rf." in name and "-" in name for name in without)


def test_the_teeth_set_mixes_boxes_and_polygons():
    records, problems = read("yolo", DATA / "ufba_teeth_yolo" / "Dataset" / "yolo_train_dataset", "fdi")

    findings = findings_of(records)
    assert len(findings) == 4629
    assert Counter(finding.shape for finding in findings) == {"box": 4614, "polygon": 15}
    assert sum(len(record.findings) > len([f for f in record.findings if f.shape == "box"]) for record in records) == 12
    # The six lines of nine fields look like oriented boxes, and are triangles that close on their first point.
    assert sum(finding.shape == "polygon" and len(finding.parts[0]) == 3 for finding in findings) == 6
    assert count(problems)["ambiguous_nine_fields", "info"] == 3
    assert all(finding.tooth for finding in findings)


def test_the_five_dota_boxes_over_the_edge_are_clipped_three_of_them_with_a_warning():
    classes = {"teeth": "tooth", "mouth": None, "head": None, "person": None}

    records, problems = read("dota", DATA / "tooth_tracking_dota", classes)

    assert (len(records), len(findings_of(records)), sum(len(record.ignored) for record in records)) == (11, 9, 4)
    assert count(problems) == {("clipped", "warning"): 3, ("clipped", "info"): 2}
    by_hand = {"6.01", "2.29", "1.69", "0.65", "0.53"}  # per cent of a side
    assert {problem.message.split("%")[0].split()[-1] for problem in problems} == by_hand


def test_the_cavity_photos_are_read_whole():
    records, problems = read("coco", DATA / "cavity_photos_coco", {"cavity": "caries", "normal": "healthy_tooth"})

    # 5,030 annotations stand in the files; /annotations/809 of train lies below the image's last row.
    assert (len(records), len(findings_of(records))) == (418, 5029)
    assert count(problems) == {
        ("image_missing", "warning"): 418 - 22,
        ("image_without_annotations", "info"): 3,
        ("unused_file", "info"): 1,
        ("clipped", "info"): 107,
        ("outside_image", "error"): 1,
    }
    assert [problem.line for problem in problems if problem.severity == "error"] == ["/annotations/809"]


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_boxes_are_those_that_pycocotools_reads(split):
    coco = pytest.importorskip("pycocotools.coco")
    path = DATA / "cavity_photos_coco" / split / "_annotations.coco.json"
    theirs = coco.COCO(str(path))

    records, _ = read("coco", path.parent, {"cavity": "caries", "normal": "healthy_tooth"})

    assert len(records) == len(theirs.imgs)
    pairs = [(image, finding) for image in records for finding in image.findings]
    for record, finding in pairs:
        annotation = theirs.anns[int(finding.finding_id.split("#")[1])]
        x, y, w, h = annotation["bbox"]
        left, top, right, bottom = finding.bounds
        sides = record.width, record.height, record.width, record.height
        ours = [value * side for value, side in zip((left, top, right, bottom), sides, strict=True)]
        assert ours == pytest.approx([x, y, min(x + w, record.width), min(y + h, record.height)], abs=1e-6)
        assert theirs.imgs[annotation["image_id"]]["file_name"] == record.path.name
        assert {"cavity": "caries", "normal": "healthy_tooth"}[
            theirs.cats[annotation["category_id"]]["name"]
        ] == finding.label


def test_a_near_miss_of_coco_is_refused_with_one_clear_error():
    records, problems = read("coco", DATA / "tufts_demo_json", {"1": "tooth"}, annotations="tufts_bbox_demo.json")

    assert (records, count(problems)) == ([], {("not_coco", "error"): 1})
    assert "images, annotations, categories" in problems[0].message


def test_via_1_polygons_are_read_once_and_opened():
    records, problems = read("via", DATA / "tooth_decay_via1", {"Decay": "caries"})

    findings = findings_of(records)
    assert (len(records), len(findings)) == (15, 27)
    assert count(problems) == {("duplicate_annotation_file", "warning"): 1}
    assert all(finding.shape == "polygon" and finding.parts[0][0] != finding.parts[0][-1] for finding in findings)
    assert all(0 <= value <= 1 for finding in findings for value in finding.bounds)


def test_via_2_polylines_are_read_without_their_images():
    records, problems = read("via", DATA / "via2_polylines_nondental", {"manhole": "crown", "handhole": None})

    findings = findings_of(records)
    assert (len(records), len(findings), sum(len(record.ignored) for record in records)) == (112, 27, 88)
    assert {(finding.shape, finding.parts) for finding in findings} == {("polyline", ())}
    assert count(problems) == {("image_missing", "warning"): 112}
