"""YOLO and DOTA label files: what is read, and what becomes a problem."""

import math

import pytest
from PIL import Image

from data_builders.readers import READERS
from data_builders.readers.geometry import BadAnnotation
from data_builders.readers.yolo import parse_line
from data_builders.records import ImageRecord, Problem
from data_builders.sources import Source

CLASSES = {0: "caries", 1: "tooth", 2: None}


def read(reader, root, classes=None, **keys):
    source = Source(name="s", reader=reader, root=root, classes=classes or CLASSES, modality="panoramic", **keys)
    items = list(READERS[reader](source))
    return [i for i in items if isinstance(i, ImageRecord)], [i for i in items if isinstance(i, Problem)]


def write(path, text="", size=(200, 100)):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in {".jpg", ".png"}:
        Image.new("L", size).save(path)
    else:
        path.write_text(text, newline="")
    return path


def read_lines(root, text, reader="yolo", **keys):
    """Read one image with the given label lines; returns its record and the problems."""
    write(root / "images" / "a.jpg")
    write(root / ("labels" if reader == "yolo" else "labelTxt") / "a.txt", text)
    (record,), problems = read(reader, root, **keys)
    return record, problems


def codes(problems):
    return [problem.code for problem in problems]


@pytest.mark.parametrize(
    "line",
    [
        pytest.param("1 0.5 0.5 0.2 0.4", id="axis-aligned"),
        pytest.param("1 0.4 0.3 0.6 0.3 0.6 0.7 0.4 0.7", id="oriented"),
        pytest.param("1.0000e+00 0.5 0.5 0.2 0.4", id="class id as a float"),
        pytest.param("1 0.4 0.3 0.6 0.3 0.6 0.7 0.4 0.7 0.4 0.3", id="closed polygon"),
    ],
)
def test_each_form_of_a_line_covers_the_same_ground(tmp_path, line):
    record, problems = read_lines(tmp_path, line)

    assert problems == []
    assert record.findings[0].label == "tooth"
    (ring,) = record.findings[0].parts
    assert sum(ring, ()) == pytest.approx((0.4, 0.3, 0.6, 0.3, 0.6, 0.7, 0.4, 0.7))


def test_an_oriented_box_keeps_its_corners_and_their_order():
    line = parse_line("0 0.5 0.2 0.8 0.5 0.5 0.8 0.2 0.5")

    assert (line.class_id, line.shape) == (0, "oriented_box")
    assert line.ring == ((0.5, 0.2), (0.8, 0.5), (0.5, 0.8), (0.2, 0.5))


@pytest.mark.parametrize(
    ("line", "code"),
    [
        pytest.param("0 0.5 0.5 0.2", "bad_label_line", id="4 fields"),
        pytest.param("0 0.5 0.5 0.2 0.1 0.1 0.1 0.1", "bad_label_line", id="8 fields"),
        pytest.param("0", "bad_label_line", id="class only"),
        pytest.param("caries 0.5 0.5 0.2 0.2", "bad_label_line", id="name instead of id"),
        pytest.param("0.5 0.5 0.5 0.2 0.2", "bad_label_line", id="fractional class id"),
        pytest.param("0 nan 0.5 0.2 0.2", "bad_label_line", id="NaN"),
        pytest.param("0 inf 0.5 0.2 0.2", "bad_label_line", id="infinite"),
        pytest.param(f"0 0.5 0.5 0.2 {'9' * 5000}", "bad_label_line", id="5,000 digits"),
        pytest.param(f"{'9' * 5000} 0.5 0.5 0.2 0.2", "bad_label_line", id="class id of 5,000 digits"),
        pytest.param("0 0_5 0.5 0.2 0.2", "bad_label_line", id="underscore, which float() would read"),
        pytest.param("0 100 50 20 10", "looks_like_pixels", id="pixels"),
        pytest.param("0 0.5 0.5 -0.2 0.2", "negative_size", id="negative width"),
        pytest.param("0 0.5 0.5 0 0.2", "zero_area", id="no width"),
        pytest.param("0 0.1 0.1 0.2 0.2 0.3 0.3", "zero_area", id="points on a line"),
        pytest.param("0 1.2 0.5 0.2 0.2", "outside_image", id="outside"),
        pytest.param("7 0.5 0.5 0.2 0.2", "unknown_label", id="class not in the map"),
    ],
)
def test_a_line_that_cannot_be_used_is_a_problem_with_its_line_number(tmp_path, line, code):
    record, problems = read_lines(tmp_path, f"1 0.5 0.5 0.2 0.2\n\n{line}", exhaustive=("caries",))

    first = problems[0]
    assert (first.code, first.severity, first.line) == (code, "error", 3)
    assert first.path == tmp_path / "labels" / "a.txt"
    assert len(first.message) < 300
    assert [finding.where for finding in record.findings] == ["labels/a.txt:1"]
    assert record.exhaustive == ()


def test_the_map_and_all_labels_present_are_listed_when_a_label_is_unknown(tmp_path):
    _, problems = read_lines(tmp_path, "7 0.5 0.5 0.2 0.2\n1 0.5 0.5 0.2 0.2\n7 0.2 0.2 0.2 0.2")

    assert codes(problems) == ["unknown_label", "unknown_label", "class_map_incomplete"]
    assert problems[-1].path == tmp_path
    assert "1 (1), 7 (2)" in problems[-1].message
    assert "0: caries, 1: tooth, 2: null" in problems[-1].message


@pytest.mark.parametrize(
    ("cx", "severity"),
    [pytest.param(0.905, "info", id="0.5 % over"), pytest.param(0.95, "warning", id="5 % over")],
)
def test_a_box_over_the_edge_is_clipped_and_counted_once(tmp_path, cx, severity):
    record, problems = read_lines(tmp_path, f"1 {cx} 0.5 0.2 0.2")

    assert [(problem.code, problem.severity) for problem in problems] == [("clipped", severity)]
    assert record.findings[0].bounds == pytest.approx((cx - 0.1, 0.4, 1.0, 0.6))


def test_the_share_that_clipping_cost_is_stated(tmp_path):
    _, problems = read_lines(tmp_path, "1 0.95 0.5 0.2 0.2")

    assert "25.0% of it lost" in problems[0].message


def test_rounding_noise_over_the_edge_is_no_problem(tmp_path):
    record, problems = read_lines(tmp_path, "1 0.9 0.5 0.2000005 0.2")

    assert problems == []
    assert record.findings[0].bounds[2] == 1.0


def test_an_oriented_box_that_loses_a_corner_becomes_a_polygon(tmp_path):
    record, problems = read_lines(tmp_path, "1 0.8 0.3 1.1 0.6 0.8 0.9 0.5 0.6")

    assert codes(problems) == ["clipped"]
    assert record.findings[0].shape == "polygon"
    assert len(record.findings[0].parts[0]) == 5
    assert "5.6% of it lost" in problems[0].message  # a triangle of 0.2 by 0.1 off a square of 0.18


def test_a_bow_tie_is_repaired_and_said_so(tmp_path):
    record, problems = read_lines(tmp_path, "1 0.2 0.2 0.6 0.6 0.6 0.2 0.2 0.6")

    assert [(problem.code, problem.severity) for problem in problems] == [("bow_tie_repaired", "warning")]
    assert len(record.findings[0].parts) == 2
    assert record.findings[0].shape == "polygon"


def test_nine_fields_among_other_lines_are_polygons_and_said_once(tmp_path):
    nine = "1 0.4 0.3 0.6 0.3 0.6 0.7 0.4 0.7"
    record, problems = read_lines(tmp_path, f"{nine}\n1 0.5 0.5 0.2 0.2\n{nine}")

    assert [(problem.code, problem.severity) for problem in problems] == [("ambiguous_nine_fields", "info")]
    assert [finding.shape for finding in record.findings] == ["polygon", "box", "polygon"]


def test_confidences_are_accepted_not_read_and_said_once(tmp_path):
    record, problems = read_lines(tmp_path, "1 0.5 0.5 0.2 0.4 0.87\n0 0.5 0.5 0.2 0.4 0.5", exhaustive=("caries",))

    assert [(problem.code, problem.severity) for problem in problems] == [("extra_field", "info")]
    assert [finding.label for finding in record.findings] == ["tooth", "caries"]
    assert record.exhaustive == ("caries",)


def test_an_ignored_class_is_counted(tmp_path):
    record, problems = read_lines(tmp_path, "2 0.5 0.5 0.2 0.4\n1 0.5 0.5 0.2 0.4")

    assert (record.ignored, len(record.findings), problems) == (("2",), 1, [])


def test_an_empty_label_file_says_no_objects_and_a_missing_one_says_nothing(tmp_path):
    write(tmp_path / "images" / "a.jpg")
    write(tmp_path / "images" / "b.jpg")
    write(tmp_path / "labels" / "a.txt")

    (empty, missing), problems = read("yolo", tmp_path, exhaustive=("caries",))

    assert (empty.findings, empty.exhaustive) == ((), ("caries",))
    assert (missing.findings, missing.exhaustive) == ((), ())
    assert [(problem.code, problem.severity, problem.path.name) for problem in problems] == [
        ("labels_missing", "warning", "b.jpg")
    ]


def test_findings_of_a_missing_image_are_read(tmp_path):
    write(tmp_path / "train" / "labels" / "a.b.txt", "1 0.5 0.5 0.2 0.4")

    (record,), problems = read("yolo", tmp_path)

    assert record.path == tmp_path / "train" / "images" / "a.b.jpg"
    assert (record.declared_split, len(record.findings)) == ("train", 1)
    assert [(problem.code, problem.severity) for problem in problems] == [("image_missing", "warning")]


@pytest.mark.parametrize(
    ("image", "labels", "split"),
    [
        ("images/a.jpg", "labels/a.txt", None),
        ("valid/images/a.jpg", "valid/labels/a.txt", "validation"),
        ("images/test/a.jpg", "labels/test/a.txt", "test"),
        ("set/a.jpg", "set/a.txt", None),
        ("Images/a.png", "Labels/a.txt", None),
    ],
)
def test_layouts_in_use_are_found(tmp_path, image, labels, split):
    write(tmp_path / image)
    write(tmp_path / labels, "1 0.5 0.5 0.2 0.4")
    for name in ("README.dataset.txt", "README.roboflow.txt", "classes.txt"):
        write(tmp_path / name, "no labels")

    (record,), problems = read("yolo", tmp_path)

    assert (record.path, record.declared_split, len(record.findings), problems) == (tmp_path / image, split, 1, [])


def test_folders_named_in_the_source_are_used(tmp_path):
    write(tmp_path / "pictures" / "a.jpg")
    write(tmp_path / "boxes" / "a.txt", "1 0.5 0.5 0.2 0.4")
    write(tmp_path / "boxes" / "b.txt", "1 0.5 0.5 0.2 0.4")

    records, problems = read("yolo", tmp_path, images="pictures", labels="boxes")

    assert [record.path for record in records] == [tmp_path / "pictures" / "a.jpg", tmp_path / "pictures" / "b.jpg"]
    assert codes(problems) == ["image_missing"]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"\xef\xbb\xbf1 0.5 0.5 0.2 0.4", id="BOM"),
        pytest.param(b"1 0.5 0.5 0.2 0.4\r\n", id="CRLF"),
        pytest.param("1 0.5 0.5 0.2 0.4\n".encode("utf-16"), id="UTF-16"),
    ],
)
def test_text_of_other_systems_is_read(tmp_path, content):
    write(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_bytes(content)

    (record,), problems = read("yolo", tmp_path)

    assert (len(record.findings), problems) == (1, [])


def test_a_file_that_is_no_text_or_only_a_pointer_is_one_clear_error(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jpg")
    (tmp_path / "a.txt").write_bytes(b"\x81\x82\x83")
    (tmp_path / "b.txt").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")

    records, problems = read("yolo", tmp_path, exhaustive=("caries",))

    assert codes(problems) == ["unreadable_file", "lfs_pointer"]
    assert [record.exhaustive for record in records] == [(), ()]


def test_a_link_out_of_the_source_is_never_opened(tmp_path):
    secret = write(tmp_path / "secret.txt", "1 0.5 0.5 0.2 0.4")
    root = tmp_path / "root"
    write(root / "a.jpg")
    (root / "a.txt").symlink_to(secret)

    (record,), problems = read("yolo", root)

    assert (record.findings, codes(problems)) == ((), ["unsafe_path", "labels_missing"])


@pytest.mark.parametrize("names", ["['18', '36']", "{0: '18', 1: '36'}", "[18, 36]"])
def test_tooth_numbers_come_from_the_names_in_data_yaml(tmp_path, names):
    write(tmp_path / "data.yaml", f"train: ../train/images\nnames: {names}")
    write(tmp_path / "train" / "labels" / "a.txt", "1 0.5 0.5 0.2 0.4")

    (record,), _ = read("yolo", tmp_path, classes="fdi")

    assert [(finding.label, finding.tooth) for finding in record.findings] == [("tooth", "36")]


def test_a_class_map_by_name_goes_through_data_yaml(tmp_path):
    write(tmp_path / "data.yaml", "names: [decay, 'null class']")

    record, problems = read_lines(
        tmp_path, "0 0.5 0.5 0.2 0.4\n1 0.5 0.5 0.2 0.4", classes={"decay": "caries", "null class": None}
    )

    assert ([finding.label for finding in record.findings], record.ignored) == (["caries"], ("null class",))
    assert problems == []


@pytest.mark.parametrize("classes", ["fdi", "tooth_types", {"11": "tooth"}])
def test_labels_by_name_without_names_are_one_error_and_never_guessed(tmp_path, classes):
    record, problems = read_lines(
        tmp_path, "11 0.5 0.5 0.2 0.4\n11 0.5 0.5 0.2 0.4", classes=classes, exhaustive=("caries",)
    )

    assert [(problem.code, problem.severity) for problem in problems] == [("names_missing", "error")]
    assert (record.findings, record.exhaustive) == ((), ())


def test_a_broken_data_yaml_is_a_problem(tmp_path):
    write(tmp_path / "data.yaml", "names: {a: b")

    _, problems = read_lines(tmp_path, "0 0.5 0.5 0.2 0.4")

    assert codes(problems) == ["bad_data_yaml"]


def test_two_images_never_share_a_label_file_in_silence(tmp_path):
    write(tmp_path / "a.jpg")
    write(tmp_path / "a.png")
    write(tmp_path / "a.txt", "1 0.5 0.5 0.2 0.4")

    records, problems = read("yolo", tmp_path)

    assert [len(record.findings) for record in records] == [1, 0]
    assert codes(problems) == ["shared_label_file", "labels_missing"]


DOTA = {"third molar": "tooth", "decay": "caries", "person": None}


def test_dota_reads_pixels_names_with_blanks_and_header_lines(tmp_path):
    text = "imagesource:GoogleEarth\ngsd:0.1\n20 10 100 10 100 50 20 50 third molar 0\n"

    record, problems = read_lines(tmp_path, text, "dota", classes=DOTA)

    (finding,) = record.findings
    assert (finding.label, finding.shape, finding.where) == ("tooth", "oriented_box", "labelTxt/a.txt:3")
    assert finding.parts == (((0.1, 0.1), (0.5, 0.1), (0.5, 0.5), (0.1, 0.5)),)
    assert (record.width, record.height, problems) == (200, 100, [])


@pytest.mark.parametrize(
    ("tail", "label"),
    [
        pytest.param("third molar 0", "tooth", id="name with a blank"),
        pytest.param("third molar", "tooth", id="and no difficulty"),
        pytest.param("decay", "caries", id="no difficulty"),
        pytest.param("36 1", "crown", id="a number for a name"),
        pytest.param("E 2", "filling", id="a letter that floats have too"),
        pytest.param("E", "filling", id="and no difficulty either"),
    ],
)
def test_a_dota_name_may_hold_blanks_and_the_difficulty_may_be_missing(tmp_path, tail, label):
    classes = {**DOTA, 36: "crown", "E": "filling"}

    record, problems = read_lines(tmp_path, f"20 10 100 10 100 50 20 50 {tail}", "dota", classes=classes)

    assert ([finding.label for finding in record.findings], problems) == ([label], [])


@pytest.mark.parametrize("head", ["imagesource:GoogleEarth\ngsd:0.1", "imageSource:x\nGSD:null", "\n\ngsd:None", ""])
def test_header_lines_of_dota_are_no_labels(tmp_path, head):
    record, problems = read_lines(tmp_path, f"{head}\n20 10 100 10 100 50 20 50 decay 0", "dota", classes=DOTA)

    assert (len(record.findings), problems) == (1, [])


def test_dota_reads_a_rotated_box_as_its_author_computed_it(tmp_path):
    # A box of 80 by 40 pixels around (100, 50), turned by 30 degrees.
    cos, sin = math.cos(math.pi / 6), math.sin(math.pi / 6)
    corners = [
        (100 + x * cos - y * sin, 50 + x * sin + y * cos) for x, y in [(-40, -20), (40, -20), (40, 20), (-40, 20)]
    ]
    text = " ".join(f"{value}" for corner in corners for value in corner) + " decay 1"

    record, _ = read_lines(tmp_path, text, "dota", classes=DOTA)

    # Half extents of the rotated box: 40 cos 30 + 20 sin 30 = 44.641, 40 sin 30 + 20 cos 30 = 37.321.
    expected = (0.276795, 0.126795, 0.723205, 0.873205)
    assert record.findings[0].bounds == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        pytest.param("20 10 100 10 100 50 20 decay 0", "bad_label_line", id="7 coordinates"),
        pytest.param("20 10 100 10 100 50 20 50 0", "bad_label_line", id="no name"),
        pytest.param("0 0.1 0.1 0.2 0.1 0.2 0.2 0.1 0.2", "bad_label_line", id="YOLO-OBB"),
        pytest.param("20 10 100 nan 100 50 20 50 decay 0", "bad_label_line", id="NaN"),
        pytest.param("0.1 0.1 0.2 0.1 0.2 0.2 0.1 0.2 decay 0", "looks_like_fractions", id="fractions"),
        pytest.param("20 10 20 10 20 10 20 10 decay 0", "zero_area", id="no area"),
        pytest.param("220 10 300 10 300 50 220 50 decay 0", "outside_image", id="outside"),
        pytest.param("20 10 100 10 100 50 20 50 crown 0", "unknown_label", id="class not in the map"),
    ],
)
def test_a_dota_line_that_cannot_be_used_is_a_problem(tmp_path, line, code):
    record, problems = read_lines(tmp_path, line, "dota", classes=DOTA)

    assert (problems[0].code, problems[0].line, record.findings) == (code, 1, ())


def test_pixels_of_a_missing_image_have_no_place_but_are_counted(tmp_path):
    write(tmp_path / "labelTxt" / "a.txt", "20 10 100 10 100 50 20 50 decay 0\n20 10 100 10 100 50 20 50 person 0")

    (record,), problems = read("dota", tmp_path, DOTA)

    assert [(finding.label, finding.parts) for finding in record.findings] == [("caries", ())]
    assert (record.ignored, record.width, codes(problems)) == (("person",), None, ["image_missing"])


def test_a_parser_raises_what_the_reader_reports():
    with pytest.raises(BadAnnotation, match="expected 4 coordinates, or 3 or more points, after the class id; got 2"):
        parse_line("0 0.1 0.2")
