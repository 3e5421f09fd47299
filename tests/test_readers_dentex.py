"""DENTEX files: quadrant, tooth and diagnosis become a tooth number and a finding."""

import json

import pytest
from PIL import Image

from data_builders.readers import read_coco
from data_builders.records import ImageRecord, Problem
from data_builders.sources import Source

DIAGNOSES = ["Impacted", "Caries", "Periapical Lesion", "Deep Caries"]
CLASSES = dict(
    zip(DIAGNOSES, ["impacted_tooth", "caries", "periapical_lesion", "deep_caries"], strict=True)
)  # fmt: skip


def categories(names):
    return [{"id": number, "name": name, "supercategory": name} for number, name in enumerate(names)]


def dentex(annotations, levels=3):
    """A file as the challenge published it: lists of categories by level, whose ids start at 0."""
    lists = [categories("1234"), categories("12345678"), categories(DIAGNOSES)]
    document = {
        "images": [{"id": 1, "file_name": "train_0.png", "width": 200, "height": 100}],
        "annotations": [
            {
                "id": number,
                "image_id": 1,
                "iscrowd": 0,
                "bbox": [20, 10, 80, 40],
                "segmentation": [[20, 10, 100, 10, 100, 50]],
                **{f"category_id_{level}": value for level, value in enumerate(ids[:levels], 1)},
            }
            for number, ids in enumerate(annotations, 1)
        ],
    }
    return document | {f"categories_{level}": entries for level, entries in enumerate(lists[:levels], 1)}


def read(root, document, classes=CLASSES, **keys):
    (root / "xrays").mkdir(exist_ok=True)
    Image.new("L", (200, 100)).save(root / "xrays" / "train_0.png")
    (root / "train.json").write_text(json.dumps(document))
    source = Source(name="dentex", reader="coco", root=root, classes=classes, modality="panoramic", **keys)
    items = list(read_coco(source))
    return [i for i in items if isinstance(i, ImageRecord)], [i for i in items if isinstance(i, Problem)]


@pytest.mark.parametrize(
    ("ids", "tooth", "label"),
    [
        pytest.param((0, 7, 0), "18", "impacted_tooth", id="upper right third molar"),
        pytest.param((1, 0, 1), "21", "caries", id="upper left central incisor"),
        pytest.param((2, 5, 2), "36", "periapical_lesion", id="lower left first molar"),
        pytest.param((3, 2, 3), "43", "deep_caries", id="lower right canine"),
    ],
)
def test_quadrant_tooth_and_diagnosis_become_a_number_and_a_finding(tmp_path, ids, tooth, label):
    (record,), problems = read(tmp_path, dentex([ids]))

    (finding,) = record.findings
    assert (finding.tooth, finding.label, finding.shape) == (tooth, label, "polygon")
    assert (record.path, problems) == (tmp_path / "xrays" / "train_0.png", [])


def test_names_count_and_ids_never(tmp_path):
    document = dentex([(40, 10, 30)])
    document["categories_1"] = [{"id": 40, "name": "1"}]
    document["categories_2"] = [{"id": 10, "name": "6"}]
    document["categories_3"] = [{"id": 30, "name": "Caries"}]

    (record,), _ = read(tmp_path, document)

    assert (record.findings[0].tooth, record.findings[0].label) == ("16", "caries")


def test_an_enumeration_file_gives_tooth_numbers(tmp_path):
    (record,), problems = read(tmp_path, dentex([(2, 5), (0, 0)], levels=2), classes="fdi")

    assert [(finding.label, finding.tooth) for finding in record.findings] == [("tooth", "36"), ("tooth", "11")]
    assert problems == []


def test_an_empty_list_of_plain_categories_beside_them_changes_nothing(tmp_path):
    (record,), problems = read(tmp_path, {**dentex([(2, 5, 1)]), "categories": []})

    assert ([finding.tooth for finding in record.findings], problems) == (["36"], [])


def test_diagnoses_that_the_source_does_not_ask_for_are_mentioned_once(tmp_path):
    (record,), problems = read(tmp_path, dentex([(2, 5, 1), (2, 6, 1)]), classes="fdi")

    assert [(finding.label, finding.tooth) for finding in record.findings] == [("tooth", "36"), ("tooth", "37")]
    assert [(problem.code, problem.severity) for problem in problems] == [("diagnoses_not_read", "info")]


def plain_quadrants():
    document = dentex([(0,)], levels=0) | {"categories": categories("1234")}
    document["annotations"][0]["category_id"] = 2
    return document


@pytest.mark.parametrize(
    ("document", "classes", "code"),
    [
        pytest.param(dentex([(0,)], levels=1), "fdi", "quadrants_only", id="first level alone"),
        pytest.param(plain_quadrants(), "fdi", "quadrants_only", id="as plain categories"),
        pytest.param(plain_quadrants(), CLASSES, "quadrants_only", id="beside a map of diagnoses"),
        pytest.param(dentex([(0, 1)], levels=2), CLASSES, "diagnoses_missing", id="numbers where diagnoses are due"),
    ],
)
def test_a_file_of_another_level_is_one_clear_problem(tmp_path, document, classes, code):
    records, problems = read(tmp_path, document, classes)

    assert records == []
    assert [(problem.code, problem.path.name) for problem in problems if problem.severity == "error"] == [
        (code, "train.json")
    ]


def test_quadrants_may_be_ignored_by_the_map(tmp_path):
    (record,), problems = read(tmp_path, plain_quadrants(), {str(number): None for number in range(1, 5)})

    assert (record.ignored, problems) == (("3",), [])


@pytest.mark.parametrize(
    "ids",
    [
        pytest.param((7, 5, 1), id="no such quadrant"),
        pytest.param((2, None, 1), id="no tooth"),
        pytest.param((2, 5, 9), id="no such diagnosis"),
        pytest.param(("2", 5, 1), id="an id of another type"),
    ],
)
def test_an_id_without_a_name_is_a_problem_of_its_annotation(tmp_path, ids):
    (record,), problems = read(tmp_path, dentex([(2, 5, 1), ids]), exhaustive=("caries",))

    assert [(problem.code, problem.line) for problem in problems] == [("bad_category", "/annotations/1")]
    assert (len(record.findings), record.exhaustive) == (1, ())
