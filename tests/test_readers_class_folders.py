"""Class folders: the folder is the label, and a picture may lie in several."""

import shutil

from PIL import Image

from data_builders.readers import READERS
from data_builders.records import ImageRecord, Problem
from data_builders.sources import Source

CLASSES = {"Caries": "caries", "Healthy Teeth": "healthy_tooth", "Other": None}


def read(root, **keys):
    source = Source(name="s", reader="class_folders", root=root, classes=CLASSES, modality="panoramic", **keys)
    items = list(READERS["class_folders"](source))
    return [i for i in items if isinstance(i, ImageRecord)], [i for i in items if isinstance(i, Problem)]


def write_image(path, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (20, 10), shade).save(path)
    return path


def copy(path, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, target)


def test_the_folder_is_the_label_of_the_whole_image(tmp_path):
    write_image(tmp_path / "train" / "Caries" / "1.jpg", 10)
    write_image(tmp_path / "Other" / "2.jpg", 20)

    (other, caries), problems = read(tmp_path, exhaustive=("caries",))

    (finding,) = caries.findings
    assert (finding.label, finding.shape, finding.parts, finding.bounds) == ("caries", "image", (), None)
    assert (finding.where, caries.declared_split, caries.exhaustive) == ("train/Caries/1.jpg", "train", ("caries",))
    assert (other.findings, other.ignored, problems) == ((), ("Other",), [])


def test_the_same_picture_in_several_folders_is_one_record_with_several_findings(tmp_path):
    copy(write_image(tmp_path / "Caries" / "1.jpg", 10), tmp_path / "Healthy Teeth" / "one.jpg")

    (record,), problems = read(tmp_path)

    assert record.path == tmp_path / "Caries" / "1.jpg"
    assert [finding.label for finding in record.findings] == ["caries", "healthy_tooth"]
    assert [(problem.code, problem.severity) for problem in problems] == [("several_classes", "info")]


def test_an_equal_name_alone_does_not_make_two_pictures_one(tmp_path):
    write_image(tmp_path / "Caries" / "1.jpg", 10)
    write_image(tmp_path / "Healthy Teeth" / "1.jpg", 200)

    records, problems = read(tmp_path)

    assert [[finding.label for finding in record.findings] for record in records] == [["caries"], ["healthy_tooth"]]
    assert [problem.code for problem in problems] == ["same_name"]


def test_a_copy_in_another_split_stays_a_record_of_its_own_so_that_the_leak_shows(tmp_path):
    copy(write_image(tmp_path / "train" / "Caries" / "1.jpg", 10), tmp_path / "test" / "Caries" / "1.jpg")

    records, _ = read(tmp_path)

    assert [record.declared_split for record in records] == ["test", "train"]


def test_unknown_empty_and_missing_folders_are_problems(tmp_path):
    write_image(tmp_path / "Crowns" / "1.jpg", 10)
    write_image(tmp_path / "Crowns" / "2.jpg", 20)
    write_image(tmp_path / "stray.jpg", 30)
    (tmp_path / "Healthy Teeth").mkdir()

    records, problems = read(tmp_path, exhaustive=("caries",))

    assert [(record.findings, record.exhaustive) for record in records] == [((), ())] * 2
    assert [(problem.code, problem.path.name) for problem in problems[:-1]] == [
        ("image_without_class", "stray.jpg"),
        ("empty_folder", "Healthy Teeth"),
        ("unknown_label", "Crowns"),
    ]
    assert problems[-1].code == "class_map_incomplete"
    assert "Crowns (2)" in problems[-1].message
