"""What real exporters wrote, through audit and build: one sources file over five formats."""

import json
from collections import Counter

import pytest
from datasets import load_dataset

from data_builders.audit import audit
from data_builders.sources import load_sources
from data_builders.vqa import build_vqa


@pytest.fixture(scope="module")
def report(real_sources):
    found = audit(load_sources(real_sources), progress=False)
    json.dumps(found)
    return {source["name"]: source for source in found["sources"]}


@pytest.fixture(scope="module")
def built(real_dataset):
    return load_dataset(str(real_dataset))


def test_the_coco_splits_hold_418_images_and_5030_findings(report):
    source = report["cavity_photos"]

    assert (source["images"], source["findings"]) == (418, 5030)
    assert {label: counts["findings"] for label, counts in source["classes"].items()} == {
        "caries": 2040,
        "healthy_tooth": 2990,
    }
    assert source["problem_counts"]["image_missing"] == 418 - source["images_present"]


def test_the_panoramics_hold_1204_findings_under_the_true_class_map(report):
    source = report["opg_pathology"]

    assert source["findings"] == 1204
    assert {label: counts["images"] for label, counts in source["classes"].items()} == {
        "caries": 119,
        "infection": 23,
        "impacted_tooth": 87,
        "fractured_tooth": 13,
        "broken_down_crown_or_root": 52,
        "healthy_tooth": 223,
    }


def test_13_dota_boxes_are_read_and_5_clipped_3_of_them_with_a_warning(report):
    source = report["tooth_tracking"]
    clipped = [problem for problem in source["problems"] if problem["code"] == "clipped"]

    assert source["findings"] == 13
    assert Counter(problem["severity"] for problem in clipped) == {"warning": 3, "info": 2}


def test_27_via_polygons_are_read(report):
    assert report["tooth_decay"]["findings"] == 27


def test_no_image_is_in_two_splits(built):
    owners = [set(rows["image_id"]) for rows in built.values()]

    assert all(owners)
    assert not any(a & b for i, a in enumerate(owners) for b in owners[i + 1 :])


def test_every_source_is_built_into_rows_in_both_languages(built):
    rows = Counter(
        (row["source"], row["language"]) for split in built.values() for row in split.remove_columns("images")
    )

    assert {source for source, _ in rows} == {
        "cavity_photos", "opg_pathology", "ufba_teeth", "tooth_tracking", "tooth_decay",
    }  # fmt: skip
    assert all(rows[source, "en"] == rows[source, "es"] for source, _ in rows)


def test_photographs_are_never_called_radiographs_and_have_no_sides(built):
    for split in built.values():
        for row in split.remove_columns("images"):
            if row["source"] in {"cavity_photos", "tooth_decay", "tooth_tracking"}:
                text = f"{row['prompt'][-1]['content']} {row['completion'][0]['content']}".casefold()
                assert not any(word in text for word in ("radiogra", "x-ray", "left", "right", "izquierd", "derech"))


def test_nothing_is_denied_where_nothing_is_exhaustive(built):
    for split in built.values():
        for row in split.remove_columns("images"):
            if row["source"] == "tooth_decay":
                assert '"negated":true' not in row["claims"]


def test_augmented_copies_and_identical_pixels_share_a_group(third_party, tmp_path):
    """`168_jpg.rf.<hash>.jpg` is there three times, each with a copy of other name and the same pixels."""
    root = third_party / "opg_pathology_yolo/Dental OPG XRAY Dataset/Augmented_Data"
    path = tmp_path / "sources.yaml"
    path.write_text(
        f"sources: [{{name: s, reader: yolo, root: {root}, modality: panoramic, locations: false, classes: "
        "{0: caries, 1: infection, 2: impacted_tooth, 3: fractured_tooth, 4: broken_down_crown_or_root, 5: null}}]"
    )
    found = audit(load_sources(path), progress=False)
    build_vqa(load_sources(path), tmp_path / "out", progress=False)
    rows = [row for split in load_dataset(str(tmp_path / "out")).values() for row in split.remove_columns("images")]

    assert len(found["duplicates"]) == 3
    assert len({row["group_id"] for row in rows}) < len({row["image_id"] for row in rows})


def test_a_near_miss_of_coco_is_refused_in_one_sentence(third_party, tmp_path):
    path = tmp_path / "sources.yaml"
    path.write_text(
        f"sources:\n  - {{name: tufts, reader: coco, root: {third_party}/tufts_demo_json, modality: panoramic, "
        "classes: {x: caries}, annotations: tufts_bbox_demo.json}\n"
    )
    source = audit(load_sources(path), progress=False)["sources"][0]

    assert source["findings"] == 0
    assert [p["code"] for p in source["problems"] if p["severity"] == "error"] == ["not_coco"]
