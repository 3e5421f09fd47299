"""What annotation files and images really hold, line by line: everything bad is a problem, and nothing is edited."""

import csv
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from data_builders import images
from data_builders.audit import read_source
from data_builders.readers import files
from data_builders.sources import Source, SourcesError, load_sources

BY_ID, BY_NAME = {0: "caries", 1: "tooth"}, {"decay": "caries", "molar": "tooth"}
BOX = [20, 10, 80, 40]


def write_image(path, size=(200, 100), mode="L", **keys):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 90 if mode in ("L", "P", "I;16") else None).save(path, **keys)
    return path


def write_coco(root, annotations=({},), images=None, name="coco.json", **more):
    """An image a.png of 200 by 100 pixels, and a COCO file with annotations of it."""
    write_image(root / "a.png")
    entries = [{"id": n, "image_id": 0, "category_id": 1, "bbox": BOX, **a} for n, a in enumerate(annotations)]
    document = {
        "images": images or [{"id": 0, "file_name": "a.png", "width": 200, "height": 100}],
        "annotations": entries,
        "categories": [{"id": 1, "name": "decay"}, {"id": 2, "name": "molar"}],
        **more,
    }
    (root / name).write_text(json.dumps(document))
    return document


def write_lines(root, text, folder="labels", name="a"):
    write_image(root / "images" / f"{name}.png")
    (root / folder).mkdir(exist_ok=True)
    (root / folder / f"{name}.txt").write_text(text)


def source(root, reader, **keys):
    classes = BY_ID if reader == "yolo" else BY_NAME
    return Source(name="s", reader=reader, root=root, classes=classes, modality="panoramic", **keys)


def read(root, reader, **keys):
    """Records and problems of a source whose images were decoded too; the problems of single lines only."""
    content = read_source(source(root, reader, **keys), progress=False)
    return content.records, [p for p in content.problems if p.code != "class_map_incomplete"]


def codes(problems):
    return [(problem.code, problem.severity) for problem in problems]


def digest(root):
    """Names and contents of all files, and when they were last written."""
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    return [(str(p), hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in paths]


# --- numbers -------------------------------------------------------------------------------------------------------

GOOD_DOTA = "20 10 100 10 100 50 20 50"
BAD_LINES = {
    "4 fields": ("yolo", "0 0.5 0.5 0.2"),
    "8 fields": ("yolo", "0 0.1 0.1 0.2 0.1 0.2 0.2 0.3"),
    "not numeric": ("yolo", "0 0.5 half 0.2 0.2"),
    "NaN": ("yolo", "0 nan 0.5 0.2 0.2"),
    "Infinity": ("yolo", "0 0.5 0.5 Infinity 0.2"),
    "5,000 digits": ("yolo", f"0 0.5 0.5 0.2 {'7' * 5000}"),
    "DOTA, not numeric": ("dota", "20 10 100 ten 100 50 20 50 decay 0"),
    "DOTA, NaN": ("dota", "20 10 100 nan 100 50 20 50 decay 0"),
    "DOTA, 5,000 digits": ("dota", f"20 10 100 {'7' * 5000} 100 50 20 50 decay 0"),
    "DOTA, 7 coordinates": ("dota", "20 10 100 10 100 50 20 decay 0"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_line_that_is_no_known_form_is_skipped_with_path_and_line(tmp_path, case):
    reader, line = BAD_LINES[case]
    folder, good = ("labels", "0 0.5 0.5 0.2 0.2") if reader == "yolo" else ("labelTxt", f"{GOOD_DOTA} decay 0")
    write_lines(tmp_path, f"{good}\n{line}\n", folder)

    (record,), (problem,) = read(tmp_path, reader, exhaustive=("caries",))

    assert str(problem).startswith(f"{tmp_path / folder / 'a.txt'}:2: ")
    assert (problem.code, problem.severity, len(problem.message) < 300) == ("bad_label_line", "error", True)
    assert (len(record.findings), record.exhaustive) == (1, ())


@pytest.mark.parametrize(
    "number", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, '"20"', "null", "true", "[20]"], ids=str.strip
)
@pytest.mark.parametrize("reader", ["coco", "via"])
def test_a_number_that_is_none_costs_its_annotation(tmp_path, reader, number):
    if reader == "coco":
        write_coco(tmp_path, [{}, {"bbox": [424242, 10, 80, 40]}])
    else:
        write_via(tmp_path, region(), region(x=424242))
    path = tmp_path / f"{reader}.json"
    path.write_text(path.read_text().replace("424242", number))

    (record,), (problem,) = read(tmp_path, reader)

    assert (problem.severity, problem.path, problem.line[-1]) == ("error", path, "1")
    assert len(record.findings) == 1


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        # The five boxes of a real DOTA set overshoot by 0.53, 0.65, 1.7, 2.3 and 6.0 per cent of a side.
        pytest.param(0.9053, [("clipped", "info")], id="0.53 %"),
        pytest.param(0.9065, [("clipped", "info")], id="0.65 %"),
        pytest.param(0.917, [("clipped", "warning")], id="1.7 %"),
        pytest.param(0.923, [("clipped", "warning")], id="2.3 %"),
        pytest.param(0.96, [("clipped", "warning")], id="6 %"),
        pytest.param(0.999, [("clipped", "warning")], id="just above half inside"),
        pytest.param(1.001, [("outside_image", "error")], id="just below half inside"),
    ],
)
@pytest.mark.parametrize("reader", ["yolo", "coco", "via", "dota"])
def test_a_shape_partly_outside_is_clipped_or_left_out(tmp_path, reader, x, expected):
    left, right = (x - 0.1) * 200, (x + 0.1) * 200
    if reader == "yolo":
        write_lines(tmp_path, f"0 {x} 0.5 0.2 0.2")
    elif reader == "dota":
        write_lines(tmp_path, f"{left} 40 {right} 40 {right} 60 {left} 60 decay 0", "labelTxt")
    elif reader == "coco":
        write_coco(tmp_path, [{"bbox": [left, 40, right - left, 20]}])
    else:
        write_via(tmp_path, region(x=left, y=40, width=right - left, height=20))

    (record,), problems = read(tmp_path, reader)

    assert codes(problems) == expected
    assert [finding.bounds for finding in record.findings] == (
        [] if x > 1 else [pytest.approx((x - 0.1, 0.4, 1.0, 0.6))]
    )


@pytest.mark.parametrize(
    ("reader", "line", "code"),
    [
        pytest.param("yolo", "0 100 50 20 10", "looks_like_pixels", id="pixels for fractions"),
        pytest.param("yolo", "0 2.01 0.5 0.2 0.2", "looks_like_pixels", id="just above 2"),
        pytest.param("yolo", "0 0.5 0.5 -0.2 0.2", "negative_size", id="negative size"),
        pytest.param("yolo", f"0 {GOOD_DOTA}", "looks_like_pixels", id="pixels for an oriented box"),
        pytest.param("dota", "0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.5 decay 0", "looks_like_fractions", id="fractions"),
    ],
)
def test_units_that_are_not_due_are_refused_with_what_they_look_like(tmp_path, reader, line, code):
    write_lines(tmp_path, line, "labels" if reader == "yolo" else "labelTxt")

    (record,), problems = read(tmp_path, reader)

    assert (record.findings, codes(problems)) == ((), [(code, "error")])


@pytest.mark.parametrize(
    ("line", "code", "severity", "parts"),
    [
        pytest.param("0 0.5 0.5 0 0.2", "zero_area", "error", 0, id="a line for a box"),
        pytest.param("0 0.1 0.1 0.2 0.2 0.3 0.3", "zero_area", "error", 0, id="a line for a polygon"),
        pytest.param("0 0.2 0.2 0.6 0.6 0.6 0.2 0.2 0.6", "bow_tie_repaired", "warning", 2, id="bow tie"),
    ],
)
def test_zero_area_is_left_out_and_a_bow_tie_repaired(tmp_path, line, code, severity, parts):
    write_lines(tmp_path, line)

    (record,), problems = read(tmp_path, "yolo")

    assert codes(problems) == [(code, severity)]
    assert sum(len(finding.parts) for finding in record.findings) == parts


def test_nine_fields_among_other_lines_are_said_once_per_file(tmp_path):
    nine = "0 0.4 0.3 0.6 0.3 0.6 0.7 0.4 0.7"
    for name in ("a", "b"):
        write_lines(tmp_path, f"{nine}\n1 0.5 0.5 0.2 0.2\n{nine}", name=name)
    write_image(tmp_path / "images" / "b.png", (20, 10))

    records, problems = read(tmp_path, "yolo")

    assert codes(problems) == [("ambiguous_nine_fields", "info")] * 2
    corners = {finding.parts[0] for record in records for finding in record.findings if finding.label == "caries"}
    assert corners == {((0.4, 0.3), (0.6, 0.3), (0.6, 0.7), (0.4, 0.7))}


# --- labels, ids, files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", ["yolo", "dota", "coco", "via", "class_folders"])
def test_a_label_outside_the_map_is_an_error_that_lists_labels_and_map(tmp_path, reader):
    if reader in ("yolo", "dota"):
        line = "7 0.5 0.5 0.2 0.2" if reader == "yolo" else f"{GOOD_DOTA} crown 0"
        write_lines(tmp_path, line, "labels" if reader == "yolo" else "labelTxt")
    elif reader == "coco":
        write_coco(tmp_path, [{"category_id": 7}], categories=[{"id": 7, "name": "crown"}])
    elif reader == "via":
        write_via(tmp_path, {**region(), "region_attributes": {"name": "crown"}})
    else:
        write_image(tmp_path / "crown" / "a.png")
    content = read_source(source(tmp_path, reader), progress=False)

    assert [finding for record in content.records for finding in record.findings] == []
    assert codes(content.problems) == [("unknown_label", "error"), ("class_map_incomplete", "error")]
    message = content.problems[-1].message
    assert ("7 (1)" if reader == "yolo" else "crown") in message
    assert ("0: caries, 1: tooth" if reader == "yolo" else "decay: caries, molar: tooth") in message


@pytest.mark.parametrize(
    ("change", "code", "severity", "pointer"),
    [
        pytest.param(
            lambda d: d["images"].append({"id": 0, "file_name": "b.png"}),
            "duplicate_image_id",
            "error",
            "/images/1",
            id="image id twice",
        ),
        pytest.param(
            lambda d: d["annotations"].append(d["annotations"][0]),
            "duplicate_annotation_id",
            "warning",
            "/annotations/1",
            id="annotation id twice",
        ),
        pytest.param(
            lambda d: d["annotations"].append({**d["annotations"][0], "id": 9, "image_id": 9}),
            "annotation_without_image",
            "error",
            "/annotations/1",
            id="annotation for no image",
        ),
        pytest.param(
            lambda d: d["annotations"].clear(),
            "image_without_annotations",
            "info",
            "/images/0",
            id="image without annotation",
        ),
        pytest.param(
            lambda d: d["images"][0].update(file_name="b.png"), "image_missing", "warning", None, id="image missing"
        ),
        pytest.param(
            lambda d: d["images"][0].update(width=400, height=200), "size_mismatch", "error", "/images/0", id="size"
        ),
        pytest.param(
            lambda d: d["categories"].append({"id": 1, "name": "crown"}),
            "bad_category",
            "error",
            "/categories/2",
            id="category id twice",
        ),
        pytest.param(lambda d: d["images"][0].pop("file_name"), "bad_annotation", "error", "/images/0", id="no name"),
        pytest.param(
            lambda d: d["annotations"].append(7), "annotation_without_image", "error", "/annotations/1", id="no mapping"
        ),
    ],
)
def test_what_contradicts_itself_is_a_problem_with_its_pointer(tmp_path, change, code, severity, pointer):
    document = write_coco(tmp_path)
    change(document)
    (tmp_path / "coco.json").write_text(json.dumps(document))

    _, problems = read(tmp_path, "coco")

    assert (code, severity, pointer) in [(p.code, p.severity, p.line) for p in problems]


def test_keys_that_coco_does_not_need_may_be_missing(tmp_path):
    write_coco(tmp_path)
    document = json.loads((tmp_path / "coco.json").read_text())
    del document["images"][0]["width"], document["images"][0]["height"], document["annotations"][0]["id"]
    (tmp_path / "coco.json").write_text(json.dumps(document))

    (record,), problems = read(tmp_path, "coco")

    assert record.findings[0].bounds == pytest.approx((0.1, 0.1, 0.5, 0.5))
    assert problems == []


def test_the_project_name_that_roboflow_puts_into_the_categories_is_in_nobodys_way(tmp_path):
    names = [{"id": 0, "name": "decay", "supercategory": "none"}, {"id": 1, "name": "decay", "supercategory": "decay"}]
    write_coco(tmp_path, categories=names, name="_annotations.coco.json")

    (record,), problems = read(tmp_path, "coco")

    assert ([finding.label for finding in record.findings], problems) == (["caries"], [])


@pytest.mark.parametrize(
    ("text", "code"),
    [
        pytest.param(b'{"images": [], "images": []', "bad_json", id="cut short"),
        pytest.param(b"[" * 100_000, "bad_json", id="nested 100,000 deep"),
        pytest.param(b'{"a":' * 100_000, "bad_json", id="nested 100,000 deep, keys"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3", "lfs_pointer", id="LFS"),
        pytest.param(b"\x89PNG\r\n\x1a\n\0\0\xff", "unreadable_file", id="bytes"),
        pytest.param(b"PK\x03\x04" + bytes(50), "archive", id="zip"),
        pytest.param(b"\x1f\x8b\x08" + bytes(50), "archive", id="gzip"),
        pytest.param(b"a" * 257 + b"ustar\x0000", "archive", id="tar"),
        pytest.param(b"", "bad_json", id="empty"),
    ],
)
@pytest.mark.parametrize("reader", ["coco", "via"])
def test_a_file_that_cannot_be_read_is_one_clear_error(tmp_path, reader, text, code):
    (tmp_path / "a.json").write_bytes(text)

    records, problems = read(tmp_path, reader, annotations="*.json")

    assert (records, codes(problems)) == ((), [(code, "error")])
    assert problems[0].path == tmp_path / "a.json"
    assert len(problems[0].message) < 300


@pytest.mark.parametrize("reader", ["yolo", "dota", "coco", "via"])
def test_a_file_over_the_limit_is_not_opened(tmp_path, reader, monkeypatch):
    assert files.MAX_BYTES == 512 * 1024**2
    monkeypatch.setattr(files, "MAX_BYTES", 10)
    if reader in ("yolo", "dota"):
        write_lines(tmp_path, "0 0.5 0.5 0.2 0.2", "labels" if reader == "yolo" else "labelTxt")
    else:
        write_coco(tmp_path)

    records, problems = read(tmp_path, reader)

    assert ("file_too_big", "error") in codes(problems)
    assert [finding for record in records for finding in record.findings] == []


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("reader", ["yolo", "dota", "coco", "via", "via_csv"])
def test_text_of_other_systems_is_read(tmp_path, reader, encoding):
    if reader in ("yolo", "dota"):
        text = "0 0.5 0.5 0.2 0.2\n" if reader == "yolo" else f"{GOOD_DOTA} decay 0\n"
        write_lines(tmp_path, text, "labels" if reader == "yolo" else "labelTxt")
    elif reader == "coco":
        write_coco(tmp_path)
    elif reader == "via":
        write_via(tmp_path, region())
    else:
        write_csv(tmp_path, json.dumps(region()["shape_attributes"]))
    for path in [*tmp_path.rglob("*.txt"), *tmp_path.rglob("*.json"), *tmp_path.rglob("*.csv")]:
        content = path.read_text().replace("\n", "\r\n")
        mark = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}.get(encoding, b"")
        path.write_bytes(mark + content.encode(encoding))

    (record,), problems = read(tmp_path, reader.removesuffix("_csv"))

    assert (len(record.findings), problems) == (1, [])


@pytest.mark.parametrize(
    "name",
    ["../a.png", "x/../../a.png", "/etc/passwd", "C:\\a.png", "c:a.png", "\\\\host\\a.png", "a\0.png", "\ud800.png"],
)
@pytest.mark.parametrize("reader", ["coco", "via"])
def test_a_path_that_leaves_the_source_is_never_opened(tmp_path, reader, name):
    write_image(tmp_path / "a.png")
    root = tmp_path / "root"
    if reader == "coco":
        write_coco(root, images=[{"id": 0, "file_name": name, "width": 200, "height": 100}])
    else:
        write_via(root, region(), file_name=name)

    records, problems = read(root, reader)

    assert records == ()
    assert ("unsafe_path", "error") in codes(problems)


@pytest.mark.parametrize("reader", ["yolo", "dota", "coco", "via", "class_folders"])
def test_a_link_out_of_the_source_is_never_opened(tmp_path, reader):
    secret = write_image(tmp_path / "secret.png")
    root = tmp_path / "root"
    if reader in ("coco", "via"):
        write_coco(root) if reader == "coco" else write_via(root, region())
        (root / "a.png").unlink()
        (root / "a.png").symlink_to(secret)
    else:
        (root / "decay").mkdir(parents=True)
        (root / "decay" / "a.png").symlink_to(secret)

    records, problems = read(root, reader)

    assert not any(record.image_id for record in records)
    assert ("unsafe_path", "error") in codes(problems)


@pytest.mark.parametrize("key", ["annotations", "images", "labels"])
@pytest.mark.parametrize("path", ["../x", "/etc", "C:\\x", "a/../../b"])
def test_a_sources_file_cannot_point_out_of_its_source(tmp_path, key, path):
    sources = {"name": "s", "reader": "yolo", "root": ".", "modality": "panoramic", "classes": {0: "caries"}}
    (tmp_path / "sources.yaml").write_text(json.dumps({"sources": [{**sources, key: path}]}))

    with pytest.raises(SourcesError, match="not a path below `root`"):
        load_sources(tmp_path / "sources.yaml")


# --- images --------------------------------------------------------------------------------------------------------


def truncated_jpeg():
    buffer = io.BytesIO()
    Image.fromarray(np.arange(200 * 100, dtype=np.uint32).astype(np.uint8).reshape(100, 200)).save(buffer, "JPEG")
    return buffer.getvalue()[:-200]


def png_header(side):
    content = io.BytesIO()
    Image.new("L", (1, 1)).save(content, "PNG")
    content = bytearray(content.getvalue())
    content[16:24] = side.to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("a.jpg", truncated_jpeg(), id="truncated, which verify() accepts"),
        pytest.param("a.png", png_header(20_000), id="20,000 squared"),
        pytest.param("a.png", png_header(10_000), id="10,000 squared, of which Pillow only warns"),
        pytest.param("a.png", png_header(65_535 * 2), id="decompression bomb"),
        pytest.param("a.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", id="SVG"),
        pytest.param("a.png", b"8BPS\0\1" + bytes(100), id="PSD"),
        pytest.param("a.png", b"", id="empty"),
        pytest.param("a.png", png_header(4)[:40], id="header alone"),
    ],
)
@pytest.mark.parametrize("reader", ["yolo", "coco"])
def test_an_image_that_cannot_be_decoded_is_left_out(tmp_path, reader, name, content):
    if reader == "yolo":
        (tmp_path / "a.txt").write_text("0 0.5 0.5 0.2 0.2")
    else:
        write_coco(tmp_path, images=[{"id": 0, "file_name": name, "width": 200, "height": 100}])
    (tmp_path / name).write_bytes(content)

    (record,), problems = read(tmp_path, reader)

    assert record.image_id is None
    assert {(p.code, p.severity) for p in problems} - {("unlisted_images", "info")} == {("image_unreadable", "error")}


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("L", ".jpg"), ("P", ".png"), ("RGBA", ".png"), ("LA", ".png"), ("1", ".png"), ("I;16", ".png"), ("CMYK", ".jpg")],
)
def test_images_of_every_mode_become_rgb_and_keep_their_size(tmp_path, mode, suffix):
    path = write_image(tmp_path / f"a{suffix}", mode=mode)
    (tmp_path / "a.txt").write_text("0 0.5 0.5 0.2 0.2")

    (record,), problems = read(tmp_path, "yolo")

    assert (record.width, record.height) == (200, 100)
    assert codes(problems) == ([("deep_greys", "info")] if mode == "I;16" else [])
    assert images.to_rgb(Image.open(path)).mode == "RGB"


# --- archives ------------------------------------------------------------------------------------------------------


def write_archive(path):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("../outside.txt", "0 0.5 0.5 0.2 0.2")
    else:
        with tarfile.open(path, "w") as archive:
            archive.addfile(tarfile.TarInfo("../outside.txt"))
    return path


@pytest.mark.parametrize("name", ["export.zip", "export.tar"])
def test_an_archive_for_a_root_is_refused_with_what_to_do(tmp_path, name):
    write_archive(tmp_path / name)
    source = {"name": "s", "reader": "yolo", "root": name, "modality": "panoramic", "classes": {0: "caries"}}
    (tmp_path / "sources.yaml").write_text(json.dumps({"sources": [source]}))

    with pytest.raises(SourcesError, match="is an archive; unpack it and name the folder"):
        load_sources(tmp_path / "sources.yaml")
    assert not (tmp_path.parent / "outside.txt").exists()


@pytest.mark.parametrize("reader", ["yolo", "dota", "coco", "via", "class_folders"])
def test_a_folder_with_nothing_but_an_archive_says_so(tmp_path, reader):
    write_archive(tmp_path / "export.zip")

    records, problems = read(tmp_path, reader)

    assert (records, codes(problems)) == ((), [("annotations_missing", "error")])
    assert "unpack export.zip first" in problems[0].message
    assert [path.name for path in tmp_path.iterdir()] == ["export.zip"]


# --- what went wrong elsewhere -------------------------------------------------------------------------------------


def test_a_csv_cell_longer_than_pythons_limit_is_read_and_the_limit_left_alone(tmp_path):
    angles = np.linspace(0, 2 * np.pi, 12_000, endpoint=False)
    xs, ys = (100 + 50 * np.cos(angles)).tolist(), (50 + 40 * np.sin(angles)).tolist()
    write_csv(tmp_path, json.dumps({"name": "polygon", "all_points_x": xs, "all_points_y": ys}))
    before = csv.field_size_limit()
    assert (tmp_path / "via.csv").stat().st_size > 3 * before

    (record,), problems = read(tmp_path, "via")

    assert (len(record.findings[0].parts[0]), problems, csv.field_size_limit()) == (12_000, [], before)


@pytest.mark.parametrize(
    ("reader", "text"),
    [
        ("yolo", "0 120 60 40 20\n0 0.5 0.5 0.2 0.2"),
        ("dota", f"{GOOD_DOTA} decay 0\n-5 10 100 10 100 50 -5 50 decay 0"),
    ],
)
def test_no_coordinate_is_ever_a_giant_fraction(tmp_path, reader, text):
    write_lines(tmp_path, text, "labels" if reader == "yolo" else "labelTxt")

    (record,), _ = read(tmp_path, reader)

    assert record.findings
    assert all(0 <= value <= 1 for finding in record.findings for value in finding.bounds)


def test_a_row_of_four_fields_leaves_nothing_behind_not_even_its_class(tmp_path):
    write_lines(tmp_path, "0 0.5 0.5 0.2 0.2\n1 0.5 0.5 0.2\n0 0.3 0.3 0.1 0.1")

    (record,), problems = read(tmp_path, "yolo")

    assert [(finding.label, finding.where) for finding in record.findings] == [
        ("caries", "labels/a.txt:1"),
        ("caries", "labels/a.txt:3"),
    ]
    assert (record.ignored, record.rejected, [problem.line for problem in problems]) == ((), (), [2])


def test_a_missing_label_file_is_not_an_empty_one(tmp_path):
    write_lines(tmp_path, "", name="empty")
    write_image(tmp_path / "images" / "missing.png", (20, 10))

    (empty, missing), problems = read(tmp_path, "yolo", exhaustive=("caries",))

    assert (empty.exhaustive, missing.exhaustive) == (("caries",), ())
    assert codes(problems) == [("labels_missing", "warning")]


def test_ids_are_not_restarted_with_every_file(tmp_path):
    for split in ("train", "valid"):
        write_coco(tmp_path / split, [{}, {"bbox": [50, 50, 20, 20]}])
        write_image(tmp_path / split / "a.png", (200, 100))

    records, _ = read(tmp_path, "coco")

    ids = [finding.finding_id for record in records for finding in record.findings]
    assert len(ids) == len(set(ids)) == 4


def test_reading_every_format_changes_no_file(phantoms):
    before = digest(phantoms)
    for path in sorted(phantoms.glob("sources_*.yaml")):
        read_source(load_sources(path).sources[0], progress=False)

    assert digest(phantoms) == before


SCRIPT = """
import sys
from data_builders.audit import read_source
from data_builders.sources import load_sources
for path in sys.argv[2:]:
    print(read_source(load_sources(path).sources[0], workers=int(sys.argv[1]), progress=False))
"""


def test_neither_hash_seed_nor_workers_change_what_is_read(phantoms):
    paths = [str(path) for path in sorted(phantoms.glob("sources_*.yaml"))]
    printed = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT, workers, *paths],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed, workers in (("0", "1"), ("1", "4"))
    ]

    assert len(printed[0]) > 100_000
    assert printed[0] == printed[1]


@pytest.mark.parametrize("stated", [0, 1, 42])
def test_seed_0_is_a_seed(tmp_path, stated):
    from data_builders.phantom import make_phantom
    from data_builders.splits import split_groups

    source = "{name: s, reader: yolo, root: ., modality: panoramic, classes: {0: caries}}"
    (tmp_path / "sources.yaml").write_text(f"seed: {stated}\nsources: [{source}]")
    loaded = load_sources(tmp_path / "sources.yaml")
    names = [f"g{number}" for number in range(200)]
    drawn = [split_groups(names, ["s"] * 200, shares=loaded.split, seed=seed) for seed in (stated, 0, 1, 42)]
    pictures = [make_phantom(seed, 0).image.tobytes() for seed in (stated, 0, 1, 42)]

    assert loaded.seed == stated
    for outcomes in (drawn, pictures):
        assert [outcome == outcomes[0] for outcome in outcomes[1:]] == [stated == seed for seed in (0, 1, 42)]


# --- files of VIA --------------------------------------------------------------------------------------------------


def region(**shape):
    rect = {"name": "rect", "x": 20, "y": 10, "width": 80, "height": 40, **shape}
    return {"shape_attributes": rect, "region_attributes": {"name": "decay"}}


def write_via(root, *regions, file_name="a.png"):
    write_image(root / "a.png")
    document = {"a": {"filename": file_name, "size": -1, "regions": list(regions), "file_attributes": {}}}
    (root / "via.json").write_text(json.dumps(document))


def write_csv(root, shape):
    write_image(root / "a.png")
    header = "filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,region_attributes"
    cells = [text.replace('"', '""') for text in ("{}", shape, '{"name": "decay"}')]
    row = 'a.png,-1,"{}",1,0,"{}","{}"'.format(*cells)
    (root / "via.csv").write_text(f"{header}\n{row}\n")
