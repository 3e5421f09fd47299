"""COCO and VIA files: what is read, and what becomes a problem."""

import json
import math

import pytest
from PIL import Image

from data_builders.readers import READERS
from data_builders.records import ImageRecord, Problem
from data_builders.sources import Source

CLASSES = {"decay": "caries", "molar": "tooth", "arrow": None}


def read(reader, root, classes=None, **keys):
    source = Source(name="s", reader=reader, root=root, classes=classes or CLASSES, modality="panoramic", **keys)
    items = list(READERS[reader](source))
    return [i for i in items if isinstance(i, ImageRecord)], [i for i in items if isinstance(i, Problem)]


def write_image(path, size=(200, 100), **keys):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size).save(path, **keys)
    return path


def coco(annotations=(), images=None, categories=None):
    return {
        "images": [{"id": 0, "file_name": "a.jpg", "width": 200, "height": 100}] if images is None else images,
        "annotations": [
            {"id": number, "image_id": 0, "category_id": 1, "bbox": [20, 10, 80, 40], **annotation}
            for number, annotation in enumerate(annotations)
        ],
        "categories": categories
        or [{"id": 1, "name": "decay"}, {"id": 2, "name": "arrow"}, {"id": 0, "name": "dental"}],
    }


def read_coco(root, document, **keys):
    """Read a COCO document beside an image a.jpg of 200 by 100 pixels."""
    write_image(root / "a.jpg")
    text = document if isinstance(document, str) else json.dumps(document)
    (root / "instances.json").write_text(text)
    return read("coco", root, **keys)


def codes(problems):
    return [problem.code for problem in problems]


def test_a_coco_box_is_in_fractions_and_points_to_its_annotation(tmp_path):
    (record,), problems = read_coco(tmp_path, coco([{"id": 77}, {"category_id": 2}]))

    (finding,) = record.findings
    assert finding.parts == (((0.1, 0.1), (0.5, 0.1), (0.5, 0.5), (0.1, 0.5)),)
    assert (finding.finding_id, finding.where) == ("instances.json#77", "instances.json:/annotations/0")
    assert (record.width, record.height, record.ignored, problems) == (200, 100, ("arrow",), [])


@pytest.mark.parametrize(
    "segmentation",
    [
        pytest.param([[20, 10, 100, 10, 100, 50]], id="list of polygons"),
        pytest.param([20, 10, 100, 10, 100, 50], id="flat list"),
        pytest.param([[20, 10, 100, 10, 100, 50, 20, 10]], id="closed"),
    ],
)
def test_a_segmentation_goes_before_the_box(tmp_path, segmentation):
    (record,), problems = read_coco(tmp_path, coco([{"segmentation": segmentation}]))

    assert record.findings[0].shape == "polygon"
    assert record.findings[0].parts == (((0.1, 0.1), (0.5, 0.1), (0.5, 0.5)),)
    assert problems == []


@pytest.mark.parametrize(
    ("annotation", "code"),
    [
        pytest.param({"bbox": [20, 10, 80]}, "bad_annotation", id="3 numbers"),
        pytest.param({"bbox": None}, "bad_annotation", id="no box"),
        pytest.param({"bbox": ["20", 10, 80, 40]}, "bad_annotation", id="text"),
        pytest.param({"bbox": [math.nan, 10, 80, 40]}, "bad_annotation", id="NaN"),
        pytest.param({"bbox": [20, 10, math.inf, 40]}, "bad_annotation", id="infinite"),
        pytest.param({"bbox": [20, 10, 10**400, 40]}, "bad_annotation", id="401 digits"),
        pytest.param({"bbox": [20, 10, -80, 40]}, "negative_size", id="negative width"),
        pytest.param({"bbox": [20, 10, 0, 40]}, "zero_area", id="no width"),
        pytest.param({"bbox": [0.1, 0.1, 0.5, 0.5]}, "looks_like_fractions", id="fractions"),
        pytest.param({"bbox": [190, 10, 80, 40]}, "outside_image", id="mostly outside"),
        pytest.param({"segmentation": [[1, 2, 3, 4]]}, "bad_annotation", id="two points"),
        pytest.param({"segmentation": 5}, "bad_annotation", id="no segmentation"),
        pytest.param({"segmentation": {"counts": "abc", "size": [100, 200]}}, "bad_mask", id="RLE"),
        pytest.param({"category_id": 9}, "unknown_label", id="category that is not there"),
        pytest.param({"category_id": 0}, "unknown_label", id="category not in the map"),
    ],
)
def test_an_annotation_that_cannot_be_used_is_a_problem_with_its_pointer(tmp_path, annotation, code):
    (record,), problems = read_coco(tmp_path, coco([{}, annotation]), exhaustive=("caries",))

    assert (problems[0].code, problems[0].severity, problems[0].line) == (code, "error", "/annotations/1")
    assert (len(record.findings), record.exhaustive) == (1, ())


def test_attributes_of_an_annotation_are_grades_where_the_source_names_them(tmp_path):
    stated = [{"grade": " moderate ", "occluded": False}, {"grade": 2}, {"grade": None}, {}]
    document = coco([{"attributes": attributes} for attributes in stated] + [{}, {"attributes": {"grade": ["2"]}}])

    (record,), problems = read_coco(tmp_path, document, attributes={"grade": "severity"})

    assert [dict(finding.attributes) for finding in record.findings] == [
        {"severity": "moderate"},
        {"severity": "2"},
        {},
        {},
        {},
    ]
    assert [(problem.code, problem.line) for problem in problems] == [("bad_annotation", "/annotations/5")]


def test_an_integer_of_thousands_of_digits_costs_one_annotation_only(tmp_path):
    text = json.dumps(coco([{}, {"bbox": [20, 10, 424242, 40]}])).replace("424242", "4" * 6000)

    (record,), problems = read_coco(tmp_path, text)

    assert (codes(problems), len(record.findings)) == (["bad_annotation"], 1)


def test_ids_that_contradict_each_other_are_problems(tmp_path):
    document = coco([{}, {"id": 0}, {"image_id": 5}])
    document["images"] += [{"id": 0, "file_name": "b.jpg", "width": 9, "height": 9}]
    document["categories"] += [{"id": 1, "name": "crown"}]

    (record,), problems = read_coco(tmp_path, document)

    assert set(codes(problems)) == {
        "duplicate_annotation_id",
        "annotation_without_image",
        "duplicate_image_id",
        "bad_category",
    }
    assert len({finding.finding_id for finding in record.findings}) == 2


def test_an_image_without_annotations_is_a_record_and_is_mentioned(tmp_path):
    (record,), problems = read_coco(tmp_path, coco(), exhaustive=("caries",))

    assert (record.findings, record.exhaustive) == ((), ("caries",))
    assert [(problem.code, problem.severity) for problem in problems] == [("image_without_annotations", "info")]


@pytest.mark.parametrize(
    ("stated", "findings", "what"),
    [
        pytest.param((400, 200), 1, "read in fractions", id="same form"),
        pytest.param((100, 200), 0, "left out", id="sides exchanged"),
    ],
)
def test_a_size_that_contradicts_the_file_is_an_error(tmp_path, stated, findings, what):
    image = {"id": 0, "file_name": "a.jpg", "width": stated[0], "height": stated[1]}

    (record,), problems = read_coco(tmp_path, coco([{}], images=[image]), exhaustive=("caries",))

    assert (len(record.findings), record.width, record.height, record.exhaustive) == (findings, 200, 100, ())
    assert [(problem.code, problem.severity) for problem in problems] == [("size_mismatch", "error")]
    assert what in problems[0].message


def test_sizes_are_those_displayed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    document = coco([{}], images=[{"id": 0, "file_name": "b.jpg", "width": 100, "height": 200}])
    write_image(tmp_path / "b.jpg", exif=exif)

    records, problems = read_coco(tmp_path, document)

    assert ([record.width for record in records], codes(problems)) == ([100], ["unlisted_images"])


@pytest.mark.parametrize(
    "name",
    ["../a.jpg", "x/../../a.jpg", "/etc/passwd", "C:\\a.jpg", "\\\\host\\a.jpg", "a\0.jpg", "\ud800.jpg", "a" * 300],
)
def test_a_path_out_of_the_source_is_never_opened(tmp_path, name):
    document = coco([{}], images=[{"id": 0, "file_name": name, "width": 200, "height": 100}])

    records, problems = read_coco(tmp_path / "root", document)

    assert records == []
    assert [problem.line for problem in problems if problem.code == "unsafe_path"] == ["/images/0"]


def test_an_image_that_is_a_link_out_of_the_source_is_never_opened(tmp_path):
    outside = write_image(tmp_path / "outside.jpg")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "b.jpg").symlink_to(outside)
    document = coco(images=[{"id": 0, "file_name": "b.jpg", "width": 200, "height": 100}])

    records, problems = read_coco(tmp_path / "root", document)

    assert (records, "unsafe_path" in codes(problems)) == ([], True)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        pytest.param("{", "bad_json", id="not JSON"),
        pytest.param("[" * 100_000, "bad_json", id="nested 100,000 deep"),
        pytest.param("version https://git-lfs.github.com/spec/v1\noid sha256:0", "lfs_pointer", id="LFS pointer"),
        pytest.param('{"images": []}', "not_coco", id="other JSON"),
        pytest.param('[{"Label": {}}]', "not_coco", id="a list"),
    ],
)
def test_a_file_that_is_not_coco_is_one_clear_error(tmp_path, text, code):
    records, problems = read_coco(tmp_path, text, annotations="*.json")

    assert (records, codes(problems)) == ([], [code, "unlisted_images"])
    assert problems[0].path == tmp_path / "instances.json"


def test_repeated_keys_are_an_error_since_what_they_held_is_lost(tmp_path):
    text = json.dumps(coco([{}])).replace('"bbox"', '"bbox": [1, 2, 3, 4], "bbox"')

    (record,), problems = read_coco(tmp_path, text, exhaustive=("caries",))

    assert (codes(problems), len(record.findings), record.exhaustive) == (["duplicate_json_keys"], 1, ())


def test_roboflow_files_go_before_other_json_which_is_mentioned(tmp_path):
    write_image(tmp_path / "valid" / "a.jpg")
    (tmp_path / "valid" / "_annotations.coco.json").write_text(json.dumps(coco([{}])))
    (tmp_path / "valid" / "copy.json").write_text(json.dumps(coco([{}])))

    (record,), problems = read("coco", tmp_path)

    assert (record.declared_split, len(record.findings), codes(problems)) == ("validation", 1, ["unused_file"])


def test_a_category_id_is_never_taken_for_a_tooth_number(tmp_path):
    document = coco([{"category_id": 11}, {"category_id": 12}])
    document["categories"] = [{"id": 11, "name": "48"}, {"id": 12, "name": "gap"}]

    (record,), problems = read_coco(tmp_path, document, classes="fdi")

    assert [finding.tooth for finding in record.findings] == ["48"]
    assert codes(problems) == ["unknown_label", "class_map_incomplete"]


def test_a_class_map_may_go_by_category_id(tmp_path):
    (record,), problems = read_coco(tmp_path, coco([{}]), classes={1: "caries"})

    assert ([finding.label for finding in record.findings], problems) == (["caries"], [])


RECT = {"name": "rect", "x": 20, "y": 10, "width": 80, "height": 40}


def region(shape=RECT, **attributes):
    return {"shape_attributes": shape, "region_attributes": attributes or {"name": "decay"}}


def via(*regions, file_name="a.jpg", version=2):
    listed = list(regions) if version == 2 else {str(number): item for number, item in enumerate(regions)}
    return {f"{file_name}-1": {"filename": file_name, "size": -1, "regions": listed, "file_attributes": {}}}


def read_via(root, document, **keys):
    write_image(root / "a.jpg")
    (root / "via.json").write_text(json.dumps(document))
    return read("via", root, **keys)


CSV_ROW = 'a.jpg,-1,"{}",2,{},"{""name"":""rect"",""x"":20,""y"":10,""width"":80,""height"":40}","{""name"":""decay""}"'
CSV_HEADER = "filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,region_attributes"


@pytest.mark.parametrize("form", ["1", "2", "project", "csv", "csv 1"])
def test_all_forms_of_via_say_the_same(tmp_path, form):
    write_image(tmp_path / "a.jpg")
    if form.startswith("csv"):
        header = f"#{CSV_HEADER}" if form == "csv 1" else CSV_HEADER
        text = "\n".join([header, CSV_ROW, 'b,c.jpg,-1,"{}",0,0,"{}","{}"'])
        (tmp_path / "via.csv").write_text(text)
    else:
        document = via(region(), version=1 if form == "1" else 2)
        document |= via(file_name="b,c.jpg", version=1 if form == "1" else 2)
        document = {"_via_settings": {}, "_via_img_metadata": document} if form == "project" else document
        (tmp_path / "via.json").write_text(json.dumps(document))

    (record, empty), problems = read("via", tmp_path)

    (finding,) = record.findings
    assert (finding.label, finding.shape, record.width, record.height) == ("caries", "box", 200, 100)
    assert finding.parts == (((0.1, 0.1), (0.5, 0.1), (0.5, 0.5), (0.1, 0.5)),)
    assert (empty.path, empty.findings, codes(problems)) == (tmp_path / "b,c.jpg", (), ["image_missing"])


@pytest.mark.parametrize(
    ("shape", "read_as", "bounds"),
    [
        pytest.param({"name": "circle", "cx": 100, "cy": 50, "r": 20}, "polygon", (0.4, 0.3, 0.6, 0.7), id="circle"),
        pytest.param(
            {"name": "ellipse", "cx": 100, "cy": 50, "rx": 40, "ry": 20}, "polygon", (0.3, 0.3, 0.7, 0.7), id="ellipse"
        ),
        pytest.param(
            {"name": "ellipse", "cx": 100, "cy": 50, "rx": 40, "ry": 20, "theta": math.pi / 2},
            "polygon",
            (0.4, 0.1, 0.6, 0.9),
            id="ellipse upright",
        ),
        pytest.param(
            {"name": "polygon", "all_points_x": [20, 100, 100, 20], "all_points_y": [10, 10, 50, 10]},
            "polygon",
            (0.1, 0.1, 0.5, 0.5),
            id="closed polygon",
        ),
        pytest.param(
            {"name": "polyline", "all_points_x": [20, 100], "all_points_y": [10, 10]},
            "polyline",
            (0.1, 0.1, 0.5, 0.1),
            id="polyline",
        ),
        pytest.param({"name": "point", "cx": 100, "cy": 50}, "point", (0.5, 0.5, 0.5, 0.5), id="point"),
    ],
)
def test_every_via_shape_is_read(tmp_path, shape, read_as, bounds):
    (record,), problems = read_via(tmp_path, via(region(shape)))

    assert (record.findings[0].shape, problems) == (read_as, [])
    assert record.findings[0].bounds == pytest.approx(bounds)


@pytest.mark.parametrize(
    ("item", "code"),
    [
        pytest.param(region({"name": "blob"}), "bad_annotation", id="unknown shape"),
        pytest.param(region({"name": "rect", "x": 1}), "bad_annotation", id="rect without size"),
        pytest.param(region({**RECT, "width": -5}), "negative_size", id="negative width"),
        pytest.param(region({"name": "circle", "cx": 9, "cy": 9, "r": -1}), "negative_size", id="negative radius"),
        pytest.param(
            region({"name": "polygon", "all_points_x": [1, 2], "all_points_y": [1]}), "bad_annotation", id="odd points"
        ),
        pytest.param({"shape_attributes": RECT, "region_attributes": {}}, "label_missing", id="no label"),
        pytest.param({"shape_attributes": RECT, "region_attributes": [1]}, "bad_annotation", id="list of attributes"),
        pytest.param("text", "bad_annotation", id="no region"),
        pytest.param(region(name="crown"), "unknown_label", id="label not in the map"),
        pytest.param(region(name=["decay"]), "bad_annotation", id="label is a list"),
    ],
)
def test_a_region_that_cannot_be_used_is_a_problem_with_its_pointer(tmp_path, item, code):
    (record,), problems = read_via(tmp_path, via(region(), item), exhaustive=("caries",))

    assert (problems[0].code, problems[0].severity) == (code, "error")
    assert problems[0].line == "/a.jpg-1/regions/1"
    assert (len(record.findings), record.exhaustive) == (1, ())


def test_regions_without_a_label_are_ignored_where_the_map_says_so(tmp_path):
    empty = {"shape_attributes": RECT, "region_attributes": {}}

    (record,), problems = read_via(tmp_path, via(region(), empty), classes={"decay": "caries", "": None})

    assert (len(record.findings), record.ignored, problems) == (1, ("",), [])


def test_several_attributes_ask_for_the_one_with_the_label(tmp_path):
    document = via(region(kind="decay", grade="2"))

    (record,), problems = read_via(tmp_path, document)
    assert (record.findings, codes(problems)) == ((), ["label_attribute_needed"])
    assert "'grade', 'kind'" in problems[0].message

    (record,), problems = read_via(tmp_path, document, label_attribute="kind", attributes={"grade": "severity"})
    assert (record.findings[0].label, record.findings[0].attributes) == ("caries", {"severity": "2"})
    assert problems == []


def test_options_are_resolved_and_each_ticked_box_is_a_finding(tmp_path):
    project = {
        "_via_img_metadata": via(region(find={"k1": True, "k2": True, "k3": False})),
        "_via_attributes": {"region": {"find": {"type": "checkbox", "options": {"k1": "decay", "k2": "molar"}}}},
    }

    (record,), problems = read_via(tmp_path, project)

    assert ([finding.label for finding in record.findings], problems) == (["caries", "tooth"], [])
    assert len({finding.finding_id for finding in record.findings}) == 2


@pytest.mark.parametrize("kind", ["radio", "dropdown"])
def test_the_one_option_of_a_region_is_its_text_and_not_its_id(tmp_path, kind):
    project = {
        "_via_img_metadata": via(region(find="0", grade="g2"), region(find="1", grade="")),
        "_via_attributes": {
            "region": {
                "find": {"type": kind, "options": {"0": "decay", "1": "molar"}, "default_options": {"0": True}},
                "grade": {"type": kind, "options": {"g2": "moderate"}},
            }
        },
    }

    (record,), problems = read_via(tmp_path, project, attributes={"grade": "severity"})

    assert [(finding.label, dict(finding.attributes)) for finding in record.findings] == [
        ("caries", {"severity": "moderate"}),
        ("tooth", {}),
    ]
    assert problems == []


def test_a_clipped_region_with_two_labels_is_one_problem(tmp_path):
    wide = {**RECT, "x": -10}

    (record,), problems = read_via(tmp_path, via(region(wide, name={"decay": True, "molar": True})))

    assert (len(record.findings), codes(problems)) == (2, ["clipped"])


def test_a_csv_row_that_cannot_be_read_is_a_problem_with_its_line(tmp_path):
    write_image(tmp_path / "a.jpg")
    (tmp_path / "via.csv").write_text("\n".join([CSV_HEADER, CSV_ROW, 'a.jpg,-1,"{}",2,1,"{","{}"', "a,b"]))

    (record,), problems = read("via", tmp_path)

    assert [(problem.code, problem.line) for problem in problems] == [("bad_annotation", 3), ("bad_annotation", 4)]
    assert len(record.findings) == 1


def test_a_byte_identical_annotation_file_is_read_once(tmp_path):
    (tmp_path / "via .json").write_text(json.dumps(via(region())))

    (record,), problems = read_via(tmp_path, via(region()))

    assert len(record.findings) == 1
    assert [(problem.code, problem.severity) for problem in problems] == [("duplicate_annotation_file", "warning")]


def test_files_that_via_did_not_write_are_mentioned_or_refused(tmp_path):
    (tmp_path / "Thumbs.db").write_bytes(b"\0")
    (tmp_path / "notes.csv").write_text("a,b\n")
    (records, problems) = read("via", tmp_path)
    assert (records, codes(problems)) == ([], ["not_via"])

    (records, problems) = read_via(tmp_path, via(region()))
    assert (len(records), codes(problems)) == (1, ["unused_file"])


def test_attribute_names_that_are_no_text_are_named_in_a_message_that_can_be_written(tmp_path):
    shape = {"name": "point", "cx": 1, "cy": 1}
    regions = [{"shape_attributes": shape, "region_attributes": {name: "decay"}} for name in ("name", "\ud800")]
    document = {"a.png1": {"filename": "a.png", "size": 1, "file_attributes": {}, "regions": regions}}
    (tmp_path / "via.json").write_text(json.dumps(document))
    source = Source(name="s", reader="via", root=tmp_path, classes={"decay": "caries"}, modality="panoramic")
    problem = next(item for item in READERS["via"](source) if getattr(item, "code", "") == "label_attribute_needed")

    assert str(problem).encode()
    assert "'name', '\\ud800'" in problem.message


def test_equal_annotation_files_in_two_folders_speak_of_different_images(tmp_path):
    region = {"shape_attributes": {"name": "point", "cx": 1, "cy": 1}, "region_attributes": {"name": "decay"}}
    document = {"a.png1": {"filename": "a.png", "size": 1, "file_attributes": {}, "regions": [region]}}
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "via.json").write_text(json.dumps(document))
    source = Source(name="s", reader="via", root=tmp_path, classes={"decay": "caries"}, modality="panoramic")
    splits = [item.declared_split for item in READERS["via"](source) if isinstance(item, ImageRecord)]

    assert sorted(splits) == ["train", "validation"]
