"""data.yaml in the forms that exporters write: names, counts, and which images belong to which split."""

import pytest
from PIL import Image

from data_builders.readers import read_yolo
from data_builders.records import ImageRecord, Problem
from data_builders.sources import Source

LINE = "1 0.5 0.5 0.2 0.4"


def write(root, yaml, *images, name="data.yaml", **texts):
    """A data.yaml, images at the given places, and label files where YOLO looks for them."""
    for image in images:
        path = root / image
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (20, 10)).save(path)
        labels = root / image.replace("images/", "labels/")
        labels.parent.mkdir(parents=True, exist_ok=True)
        labels.with_suffix(".txt").write_text(LINE)
    (root / name).write_text(yaml)
    for text, content in texts.items():
        (root / f"{text}.txt").write_text(content)


def read(root, classes="fdi"):
    source = Source(name="s", reader="yolo", root=root, classes=classes, modality="panoramic")
    items = list(read_yolo(source))
    records = {i.path.relative_to(root).as_posix(): i for i in items if isinstance(i, ImageRecord)}
    return records, [i for i in items if isinstance(i, Problem) and i.code != "unused_file"]


@pytest.mark.parametrize(
    "names",
    [
        "names: ['18', '36']",
        "names: [18, 36]",
        "names:\n- '18'\n- '36'",
        "names: {0: '18', 1: '36'}",
        "names:\n  1: 36\n  0: 18",
        "nc: 2\nnames: ['18', '36']",
        "\ufeffnames: ['18', '36']\r\n",
    ],
)
@pytest.mark.parametrize("name", ["data.yaml", "data.yml", "dataset.yaml"])
def test_names_are_a_list_or_a_mapping(tmp_path, names, name):
    write(tmp_path, names, "images/a.png", name=name)

    records, problems = read(tmp_path)

    assert [finding.tooth for finding in records["images/a.png"].findings] == ["36"]
    assert problems == []


def test_a_count_that_is_not_that_of_the_names_is_a_warning(tmp_path):
    write(tmp_path, "nc: 4\nnames: ['18', '36']", "images/a.png")

    _, problems = read(tmp_path)

    assert [(problem.code, problem.severity) for problem in problems] == [("class_count_mismatch", "warning")]
    assert "`nc` is 4, `names` are 2" in problems[0].message


def test_a_class_beyond_the_names_is_an_unknown_label(tmp_path):
    write(tmp_path, "names: ['18']", "images/a.png")

    records, problems = read(tmp_path)

    assert records["images/a.png"].findings == ()
    assert {problem.code for problem in problems} == {"unknown_label", "class_map_incomplete"}


@pytest.mark.parametrize(
    "yaml",
    [
        pytest.param("train: one/images\nval: two/images", id="folders"),
        pytest.param("train: ../one/images\nval: ../two/images", id="Roboflow"),
        pytest.param("path: .\ntrain: one/images\nval: two/images", id="path beside"),
        pytest.param("path: /home/me/datasets/teeth\ntrain: one/images\nval: two/images", id="path of another machine"),
        pytest.param("path: teeth/v1\ntrain: one/images\nval: two/images", id="path that is not there"),
        pytest.param("train: /home/me/teeth/one/images\nval: C:\\teeth\\two\\images", id="absolute on other machines"),
        pytest.param("train: [one/images]\nval: [two/images, three/images]", id="lists"),
        pytest.param("train: train.txt\nval: val.txt", id="text files"),
        pytest.param("path: ../datasets\ntrain: ./train.txt\nval: [val.txt]", id="text files in a list"),
    ],
)
def test_train_and_val_say_which_images_belong_to_them(tmp_path, yaml):
    lists = {"train": "./one/images/a.png\n", "val": "/home/me/teeth/two/images/b.png\r\ntwo/images/none.png\n"}
    write(tmp_path, f"names: ['18', '36']\n{yaml}", "one/images/a.png", "two/images/b.png", **lists)
    (tmp_path / "three" / "images").mkdir(parents=True)

    records, problems = read(tmp_path)

    assert {name: record.declared_split for name, record in records.items()} == {
        "one/images/a.png": "train",
        "two/images/b.png": "validation",
    }
    assert problems == []


def test_a_folder_that_is_not_there_leaves_the_split_to_the_folders_names(tmp_path):
    write(tmp_path, "names: ['18', '36']\ntrain: nowhere/images", "test/images/a.png")

    records, problems = read(tmp_path)

    assert records["test/images/a.png"].declared_split == "test"
    assert [(problem.code, problem.severity) for problem in problems] == [("split_missing", "info")]


def test_images_that_are_put_into_two_splits_have_none_of_their_own(tmp_path):
    write(tmp_path, "names: ['18', '36']\ntrain: images\nval: images", "images/a.png")

    records, problems = read(tmp_path)

    assert records["images/a.png"].declared_split is None
    assert [(problem.code, problem.severity) for problem in problems] == [("shared_split", "info")]


@pytest.mark.parametrize(
    "yaml",
    [
        pytest.param("names: {a: b", id="not YAML"),
        pytest.param("- 18\n- 36", id="a list"),
        pytest.param("names: 2", id="a number for names"),
        pytest.param("names: {first: '18'}", id="a name for an id"),
        pytest.param("!!python/object/apply:os.system ['echo']", id="code"),
        pytest.param("[" * 1500, id="nested"),
        pytest.param("", id="empty"),
    ],
)
def test_a_data_yaml_that_cannot_be_read_is_one_problem_of_its_own(tmp_path, yaml):
    write(tmp_path, yaml, "images/a.png")

    records, problems = read(tmp_path, {"0": "tooth", "36": "tooth", 1: "tooth"})

    assert [finding.label for finding in records["images/a.png"].findings] == ["tooth"]
    assert [(problem.code, problem.path.name) for problem in problems] == [("bad_data_yaml", "data.yaml")]


@pytest.mark.parametrize(
    ("shape", "points"),
    [("[2, 3]", "0.41 0.41 2 0.6 0.6 1"), ("[3, 2]", "0.4 0.4 0.5 0.5 0.6 0.6")],
    ids=["visibility", "places alone"],
)
def test_keypoints_after_a_box_are_never_taken_for_a_polygon(tmp_path, shape, points):
    write(tmp_path, f"names: ['18', '36']\nkpt_shape: {shape}", "images/a.png")
    (tmp_path / "labels" / "a.txt").write_text(f"{LINE} {points}\n")

    records, problems = read(tmp_path)

    (finding,) = records["images/a.png"].findings
    assert (finding.shape, finding.bounds) == ("box", pytest.approx((0.4, 0.3, 0.6, 0.7)))
    assert [(problem.code, problem.severity) for problem in problems] == [("keypoints_not_read", "info")]


@pytest.mark.parametrize("entry", ["../../outside", "/etc", "~/x", "a\\0b", "x" * 5000, "", "."])
def test_an_entry_never_leads_out_of_the_source(tmp_path, entry):
    (tmp_path / "outside").mkdir()
    root = tmp_path / "deep" / "root"
    root.mkdir(parents=True)
    write(root, f"names: ['18', '36']\ntrain: '{entry}'", "images/a.png")

    records, problems = read(root)

    assert list(records) == ["images/a.png"]
    assert {problem.code for problem in problems} <= {"split_missing"}
