"""The audit as evidence: what it finds in real files, and in phantoms to which something was done."""

import json
import random
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from data_builders.audit import audit, find_alike, pick_unique, read_sources
from data_builders.audit_page import write_audit_page
from data_builders.label_evidence import check_synonyms, describe_places
from data_builders.phantom import CONDITIONS
from data_builders.records import Finding, ImageRecord
from data_builders.sources import Source, load_sources
from data_builders.splits import group_records

TRUE_MAP = {
    0: "caries",
    1: "infection",
    2: "impacted_tooth",
    3: "fractured_tooth",
    4: "broken_down_crown_or_root",
    5: "healthy_tooth",
}
ALPHABETICAL = dict(enumerate(sorted(TRUE_MAP.values())))
# Images in the class folders of the same data set.
STATED = {
    "caries": 119,
    "infection": 23,
    "impacted_tooth": 87,
    "fractured_tooth": 13,
    "broken_down_crown_or_root": 52,
    "healthy_tooth": 223,
}


def write_sources(path, **source):
    """A sources file with one source, loaded."""
    source = {"name": "s", "reader": "yolo", "modality": "panoramic", **source, "root": str(source["root"])}
    path.write_text(yaml.safe_dump({"sources": [source]}))
    return load_sources(path)


def originals(third_party):
    return third_party / "opg_pathology_yolo" / "Dental OPG XRAY Dataset" / "Original_Data"


def codes(problems):
    return {problem.code for problem in problems}


@pytest.fixture
def copies(tmp_path, phantoms):
    """Twelve phantoms with boxes, and a function that adds one made from others."""
    root = tmp_path / "set"
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    for path in sorted((phantoms / "yolo" / "images").iterdir())[:12]:
        shutil.copy(path, root / "images")
        shutil.copy(phantoms / "yolo" / "labels" / f"{path.stem}.txt", root / "labels")

    def add(name, image):
        image.save(root / "images" / f"{name}.png")
        (root / "labels" / f"{name}.txt").write_text("0 .3 .4 .1 .1\n")

    return root, add


def open_phantom(root, number):
    return Image.open(sorted((root / "images").glob("phantom*.jpg"))[number]).convert("L")


def twins(root, *lines):
    """Files of the same pixels, one for each text of labels."""
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    for number, text in enumerate(lines):
        Image.new("L", (400, 200), 90).save(root / "images" / f"{number}.png")
        (root / "labels" / f"{number}.txt").write_text(text)
    return root


@pytest.mark.parametrize(
    ("other", "code"),
    [
        pytest.param("0 .5 .5 .1 .1\n1 .2 .5 .1 .1\n", "duplicate_image", id="in another order"),
        pytest.param("1 .200001 .5 .1 .1\n0 .5 .5 .1 .1\n", "duplicate_image", id="rounded otherwise"),
        pytest.param("1 .7 .5 .1 .1\n0 .5 .5 .1 .1\n", "contradicting_duplicate", id="elsewhere"),
        pytest.param("1 .2 .5 .1 .1\n0 .5 .5 .3 .1\n", "contradicting_duplicate", id="larger"),
        pytest.param(
            "1 .2 .5 .1 .1\n0 .45 .45 .55 .45 .55 .55\n", "contradicting_duplicate", id="an outline and a box"
        ),
        pytest.param("1 .2 .5 .1 .1\n0 .5 .5 .1 .1\n" * 2, "contradicting_duplicate", id="twice as many"),
    ],
)
def test_equal_pixels_are_built_once_only_where_the_same_is_annotated_in_the_same_place(tmp_path, other, code):
    root = twins(tmp_path / "s", "1 .2 .5 .1 .1\n0 .5 .5 .1 .1\n", other)

    assert code in codes(read(root, tmp_path / "s.yaml").problems)


def test_a_twin_without_a_label_file_contradicts_nothing(tmp_path):
    root = twins(tmp_path / "s", "", "1 .2 .5 .1 .1\n")
    (root / "labels" / "0.txt").unlink()
    content = read(root, tmp_path / "s.yaml")
    (record,), problems = pick_unique(content.records)

    assert [problem.code for problem in problems] == ["duplicate_image"]
    assert (record.path.name, len(record.findings)) == ("1.png", 1)


def test_an_image_that_is_linked_from_elsewhere_is_never_opened(tmp_path):
    root = twins(tmp_path / "s", "0 .5 .5 .1 .1\n")
    (root / "images" / "0.png").rename(tmp_path / "outside.png")
    (root / "images" / "0.png").symlink_to(tmp_path / "outside.png")
    content = read(root, tmp_path / "s.yaml")

    assert [p.code for p in content.problems].count("unsafe_path") == 1
    assert content.records == ()  # nor is it looked for again by the name of its labels


def test_another_grade_contradicts_too(tmp_path):
    """Two photographs of equal pixels, of which one is graded mild and one severe."""
    boxes = []
    for number, grade in enumerate(("mild", "severe")):
        Image.new("L", (400, 200), 90).save(tmp_path / f"{number}.png")
        boxes.append({"id": number, "image_id": number, "category_id": 1, "bbox": [10, 10, 40, 40]})
        boxes[-1]["attributes"] = {"grade": grade}
    images = [{"id": number, "file_name": f"{number}.png", "width": 400, "height": 200} for number in range(2)]
    document = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "decay"}]}
    (tmp_path / "a.json").write_text(json.dumps(document))
    source = {"reader": "coco", "classes": {"decay": "caries"}, "attributes": {"grade": "severity"}}
    (content,) = read_sources(write_sources(tmp_path / "s.yaml", root=tmp_path, **source), progress=False)

    assert codes(content.problems) == {"contradicting_duplicate"}


@pytest.mark.parametrize("reader", ["yolo", "coco"])
def test_an_image_that_cannot_be_decoded_is_one_problem(tmp_path, reader):
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "a.txt").write_text("0 .5 .5 .1 .1\n")
    document = {
        "images": [{"id": 0, "file_name": "a.png", "width": 400, "height": 200}],
        "annotations": [{"id": 0, "image_id": 0, "category_id": 0, "bbox": [10, 10, 40, 40]}],
        "categories": [{"id": 0, "name": "decay"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(document))
    classes = {0: "caries"} if reader == "yolo" else {"decay": "caries"}
    loaded = write_sources(tmp_path / "s.yaml", root=tmp_path, reader=reader, classes=classes)

    assert audit(loaded, progress=False)["sources"][0]["problem_counts"]["image_unreadable"] == 1


def test_one_patient_in_two_declared_splits_is_a_leak(tmp_path):
    for split, patients in (("train", "AB"), ("test", "BC")):
        for folder in ("images", "labels"):
            (tmp_path / split / folder).mkdir(parents=True)
        for number, patient in enumerate(patients):
            name = f"{patient}_{split}"
            Image.new("L", (400, 200), 20 * number + 90 * (split == "train")).save(
                tmp_path / split / "images" / f"{name}.png"
            )
            (tmp_path / split / "labels" / f"{name}.txt").write_text("0 .5 .5 .1 .1\n")
    leaks = {}
    for group in ({}, {"group": {"pattern": "^(?P<patient>.)_"}}):
        loaded = write_sources(tmp_path / "s.yaml", root=tmp_path, classes={0: "caries"}, **group)
        report = audit(loaded, progress=False)
        leaks[bool(group)] = (
            [sorted(Path(image["path"]).stem for image in leak["images"]) for leak in report["leaks"]],
            report["leak_rates"],
        )

    assert leaks[False] == ([], [{"source": "s", "split": "test", "images": 2, "also_in_train": 0}])
    assert leaks[True] == (
        [["B_test", "B_train"]],
        [{"source": "s", "split": "test", "images": 2, "also_in_train": 1}],
    )


def read(root, path, **source):
    loaded = write_sources(path, root=root, classes=dict(enumerate(CONDITIONS)), **source)
    (content,) = read_sources(loaded, progress=False)
    return content


def by_name(content):
    return {record.path.stem: record for record in content.records}


def test_the_alphabetical_class_map_is_flagged_and_the_true_one_suggested(third_party, tmp_path):
    loaded = write_sources(
        tmp_path / "s.yaml", root=originals(third_party), classes=ALPHABETICAL, expected_images=STATED
    )
    source = audit(loaded, progress=False)["sources"][0]
    (suggestion,) = [problem for problem in source["problems"] if problem["code"] == "class_map_suggestion"]

    assert source["problem_counts"]["unexpected_count"] == 6
    assert all(f"{raw}: {label} (" in suggestion["message"] for raw, label in TRUE_MAP.items())
    assert source["labels"]["0"] == {"name": ALPHABETICAL[0], "images": 119, "findings": 198, "shared_with": []}


@pytest.mark.parametrize(
    ("classes", "stated"),
    [
        pytest.param(TRUE_MAP, STATED, id="the true map"),
        pytest.param(ALPHABETICAL, {}, id="nothing is stated"),
        pytest.param(ALPHABETICAL, dict.fromkeys(STATED, 100), id="counts that fit no map"),
        pytest.param(ALPHABETICAL, {**STATED, "infection": 13}, id="two labels with one count"),
    ],
)
def test_no_class_map_is_suggested_without_evidence(third_party, tmp_path, classes, stated):
    loaded = write_sources(tmp_path / "s.yaml", root=originals(third_party), classes=classes, expected_images=stated)

    assert "class_map_suggestion" not in codes(read_sources(loaded, progress=False)[0].problems)


def test_30_real_names_contradict_their_labels(third_party, tmp_path):
    """23 `healthy_teeth_…` with cavities, one more whose cavity lies outside it, 6 `unhealthy_teeth_…` without any."""
    root = third_party / "cavity_photos_coco"
    classes = {"cavity": "caries", "normal": "healthy_tooth"}
    loaded = write_sources(tmp_path / "s.yaml", root=root, reader="coco", modality="intraoral_photo", classes=classes)
    problems = [p for p in read_sources(loaded, progress=False)[0].problems if p.code == "contradicting_name"]

    assert len(problems) == 30
    assert sum(problem.path.name.startswith("healthy_teeth") for problem in problems) == 24
    assert sum(problem.path.name.startswith("unhealthy_teeth") for problem in problems) == 6


def test_a_class_name_in_a_file_name_is_compared_too(copies, tmp_path):
    root, add = copies
    add("impacted_tooth_7", open_phantom(root, 0).resize((300, 300)))
    add("Caries 12", open_phantom(root, 1).resize((300, 300)))
    problems = [p for p in read(root, tmp_path / "s.yaml").problems if p.code == "contradicting_name"]

    assert [problem.path.name for problem in problems] == ["impacted_tooth_7.png"]


def copy_into_train_and_val(third_party, root):
    """The 15 photographs in both splits; the annotations of train are formatted, as another exporter would."""
    for split in ("train", "val"):
        shutil.copytree(third_party / "tooth_decay_via1" / "val", root / split)
    for path in (root / "train").glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()), indent=1))
    return {"root": root, "reader": "via", "modality": "intraoral_photo", "classes": {"Decay": "caries"}}


def test_a_full_leak_is_found_and_its_rate_told(third_party, tmp_path):
    """All 15 validation photographs were in train where this set was published."""
    source = copy_into_train_and_val(third_party, tmp_path / "leak")
    report = audit(write_sources(tmp_path / "s.yaml", **source), progress=False)

    assert len(report["leaks"]) == 15
    assert report["leak_rates"] == [{"source": "s", "split": "validation", "images": 15, "also_in_train": 15}]


def test_a_leak_in_other_pixels_is_found_too(third_party, tmp_path):
    source = copy_into_train_and_val(third_party, tmp_path / "leak")
    for path in (tmp_path / "leak" / "val").glob("*.jpg"):
        Image.open(path).reduce(2).save(path, quality=60)
    report = audit(write_sources(tmp_path / "s.yaml", **source), progress=False)

    assert report["duplicates"] == []
    assert len(report["near_duplicates"]) == 15
    assert report["leak_rates"] == [{"source": "s", "split": "validation", "images": 15, "also_in_train": 15}]


def test_a_mirrored_pair_loses_its_places_and_shares_a_group(copies, tmp_path):
    root, add = copies
    add("mirrored", open_phantom(root, 3).transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    content = read(root, tmp_path / "s.yaml")
    without = {name for name, record in by_name(content).items() if not record.locations}
    groups = group_records(content.records, {"s": content.source}, find_alike([content]))

    assert without == {"mirrored", "phantom00003"}
    assert "flipped_copy" in codes(content.problems)
    assert len(set(groups)) == len(groups) - 1


def test_a_mosaic_is_in_one_group_with_what_it_shows_and_has_no_places(copies, tmp_path):
    root, add = copies
    mosaic = Image.new("L", (448, 224))
    for place in range(4):
        brighter = open_phantom(root, place).resize((224, 112)).point(lambda grey, by=place: min(255, grey + 12 * by))
        mosaic.paste(brighter, (place % 2 * 224, place // 2 * 112))
    add("made", mosaic)
    content = read(root, tmp_path / "s.yaml")
    records = by_name(content)
    groups = dict(
        zip(records, group_records(content.records, {"s": content.source}, find_alike([content])), strict=True)
    )
    together = {name for name, group in groups.items() if group == groups["made"]}

    assert [name for name, record in records.items() if not record.locations] == ["made"]
    assert [problem.path.name for problem in content.problems if problem.code == "mosaic"] == ["made.png"]
    assert len(together) >= 3
    assert together <= {"made", *(f"phantom{place:05}" for place in range(4))}


def test_declared_flips_take_the_places_of_all_images(third_party, tmp_path):
    root = third_party / "tooth_tracking_dota" / "datasets" / "roboflow"
    classes = {"teeth": "dentition", "head": None, "mouth": None, "person": None}
    source = {"root": root, "reader": "dota", "modality": "intraoral_photo", "classes": classes}
    (content,) = read_sources(write_sources(tmp_path / "s.yaml", **source), progress=False)
    declared = [problem for problem in content.problems if problem.code == "declared_augmentation"]
    (trusted,) = read_sources(write_sources(tmp_path / "s.yaml", **source, locations=True), progress=False)

    assert [(p.path.name, p.line) for p in declared] == [("README.roboflow.txt", 29), ("README.roboflow.txt", 31)]
    assert not any(record.locations for record in content.records)
    assert any(record.locations for record in trusted.records)


def test_a_source_without_declared_flips_keeps_its_places(third_party, tmp_path):
    source = {"reader": "coco", "modality": "intraoral_photo", "classes": {"cavity": "caries", "normal": None}}
    loaded = write_sources(tmp_path / "s.yaml", root=third_party / "cavity_photos_coco", **source)
    (content,) = read_sources(loaded, progress=False)

    assert "declared_augmentation" not in codes(content.problems)
    assert all(record.locations for record in content.records)


def test_labels_that_mean_or_look_the_same_are_told():
    classes = {"Caries": "caries", "caries.": "caries", "Fractured Teeth": "fractured_tooth", "fractured tooth": None}
    source = Source(name="s", reader="coco", root=Path(), modality="panoramic", classes=classes)
    problems = list(check_synonyms(source))

    assert [(problem.code, problem.severity) for problem in problems] == [
        ("synonyms", "info"),
        ("similar_labels", "warning"),
    ]
    assert "Caries, caries. are all read as caries" in problems[0].message


def test_places_say_how_far_from_the_middle_findings_lie():
    def box(left, top, right, bottom):
        ring = ((left, top), (right, top), (right, bottom), (left, bottom))
        return Finding("f", "impacted_tooth", "box", (ring,))

    findings = (box(0.0, 0.0, 0.1, 0.1), box(0.9, 0.5, 1.0, 0.9), box(0.45, 0.4, 0.55, 0.5), box(0.1, 0.5, 0.3, 0.6))
    record = ImageRecord(Path("a.jpg"), "id", 200, 100, "panoramic", "s", None, None, (), findings)
    described = describe_places([record])["impacted_tooth"]

    assert (described["findings"], described["far"], described["landscape"]) == (4, 0.75, 0.75)
    assert described["area"] == pytest.approx(0.015)
    assert sum(map(sum, described["heat"])) == 4
    assert described["heat"][0][1] == 1


def test_the_result_does_not_depend_on_workers_or_the_order_of_sources(copies, tmp_path):
    root, add = copies
    add("small", open_phantom(root, 2).resize((224, 112)))
    sources = [
        {"name": name, "reader": "yolo", "root": str(root), "modality": "panoramic"}
        | {"classes": dict(enumerate(CONDITIONS))}
        for name in ("a", "b")
    ]
    reports = []
    for workers in (1, 3):
        path = tmp_path / f"{workers}.yaml"
        path.write_text(yaml.safe_dump({"sources": random.Random(workers).sample(sources, 2)}))
        reports.append(audit(load_sources(path), workers=workers, progress=False))

    assert len(reports[0]["near_duplicates"]) == 1
    for report in reports:
        report["sources"].sort(key=lambda source: source["name"])
        for place in [p for pair in report["near_duplicates"] for p in pair["images"]]:
            place.pop("source")
    assert reports[0]["sources"][0]["classes"] == reports[1]["sources"][0]["classes"]
    assert reports[0]["near_duplicates"] == reports[1]["near_duplicates"]


def test_the_page_is_whole_without_images_or_findings(tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("0 .5 .5 .1 .1\n")
    loaded = write_sources(tmp_path / "s.yaml", root=tmp_path, classes={0: "caries"}, expected_images={"infection": 3})
    contents = read_sources(loaded, progress=False)
    write_audit_page(tmp_path / "audit.html", audit(loaded, progress=False), contents)
    page = (tmp_path / "audit.html").read_text()

    assert "No image file of this label is present." in page
    assert '<td class="number bad">3</td>' in page
