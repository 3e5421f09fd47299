"""Whatever a file holds, a reader gives records and problems: never another exception, never an edit of the input."""

import csv
import hashlib
import io
import json
import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_builders.readers import READERS, read_cases
from data_builders.readers.cases import Case
from data_builders.records import ImageRecord, Problem
from data_builders.sources import Source

FUZZ = settings(derandomize=True, deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
CLASSES = {0: "caries", 1: "tooth", "decay": "caries", "molar": None}
SEVERITIES = {"error", "warning", "info"}


def picture():
    buffer = io.BytesIO()
    Image.new("L", (20, 10)).save(buffer, "PNG")
    return buffer.getvalue()


PICTURE = picture()


def check(reader, files, **keys):
    """Write the files, read them, and hold what comes back to what a record and a problem promise."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, content in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
        before = digest(root)
        if reader == "cases":
            items = list(read_cases(Source(name="s", reader="cases", root=root, **keys)))
        else:
            keys = {"classes": CLASSES, "modality": "panoramic", "exhaustive": ("caries",), **keys}
            items = list(READERS[reader](Source(name="s", reader=reader, root=root, **keys)))
        assert digest(root) == before
        for item in items:
            check_item(item, root)
        ids = [finding.finding_id for item in items if isinstance(item, ImageRecord) for finding in item.findings]
        assert len(ids) == len(set(ids))
        return items


def check_item(item, root):
    str(item).encode("utf-8")  # can be written to any report
    if isinstance(item, Problem):
        assert item.severity in SEVERITIES
        assert item.message
        assert len(item.message) < 2000
        assert item.path.is_relative_to(root)
    elif isinstance(item, ImageRecord):
        assert item.path.is_relative_to(root)
        for finding in item.findings:
            numbers = [value for ring in finding.parts for point in ring for value in point]
            assert all(math.isfinite(value) and 0 <= value <= 1 for value in numbers)
            json.dumps([finding.finding_id, dict(finding.attributes), finding.where], ensure_ascii=False).encode()
            assert finding.label in {"caries", "tooth"}
            assert finding.confidence is None or 0 <= finding.confidence <= 1
    else:
        assert isinstance(item, Case)
        assert item.answer
        assert item.prompt[-1]["role"] == "user"


def digest(root):
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    return [(path, hashlib.sha256(path.read_bytes()).digest()) for path in paths]


# --- any bytes -----------------------------------------------------------------------------------------------------

PLACES = {
    "yolo": ("yolo", "a.txt"),
    "data.yaml": ("yolo", "data.yaml"),
    "dota": ("dota", "a.txt"),
    "coco": ("coco", "a.json"),
    "via": ("via", "a.json"),
    "via csv": ("via", "a.csv"),
    "class_folders": ("class_folders", "decay/b.png"),
    "dicom": ("coco", "a.png"),
    "cases": ("cases", "a.jsonl"),
    "cases json": ("cases", "a.json"),
    "cases parquet": ("cases", "a.parquet"),
}
STARTS = (
    b"",
    b"\xff\xfe",
    b"\xfe\xff",
    b"\xef\xbb\xbf",
    b"{",
    b"PAR1",
    bytes(128) + b"DICM",
    b"names: ",
    b"version https://git-lfs",
)
COCO = {
    "images": [{"id": 1, "file_name": "a.png", "width": 20, "height": 10}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 2, 5, 5]}],
    "categories": [{"id": 1, "name": "decay"}],
}


@pytest.mark.parametrize("place", PLACES)
@FUZZ
@given(st.builds(bytes.__add__, st.sampled_from(STARTS), st.binary(max_size=200)))
def test_any_bytes_give_records_and_problems(place, content):
    reader, name = PLACES[place]
    files = {"a.png": PICTURE, "c.json": json.dumps(COCO).encode(), name: content}
    if reader != "coco":
        del files["c.json"]
    check(reader, files)


# --- label files ---------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.sampled_from(["0", "1", "2", "0.5", "-0", "1e-7", "1.0000e+00", "nan", "inf", "-1", "1_0", "1e308", "٣", "0x1"]),
    st.floats(-3, 3).map(str),
    st.integers().map(str),
)
FIELDS = st.lists(st.one_of(NUMBERS, st.text(max_size=3)), max_size=14).map(" ".join)
YOLO_LINES = st.one_of(
    FIELDS,
    st.lists(NUMBERS, min_size=5, max_size=12).map(" ".join),
    st.builds("{} {}".format, st.integers(0, 2), st.lists(st.floats(-0.5, 1.5), min_size=4, max_size=10).map(
        lambda values: " ".join(map(repr, values))
    )),
)  # fmt: skip
DOTA_LINES = st.one_of(
    FIELDS,
    st.builds(
        "{} {} {}".format,
        st.lists(st.floats(-10, 30), min_size=8, max_size=8).map(lambda values: " ".join(map(repr, values))),
        st.sampled_from(["decay", "third molar", "molar", "0", ""]),
        st.sampled_from(["0", "1", "", "x", "0.5"]),
    ),
)
NAMES = st.sampled_from(
    ["names: [decay, molar]", "names: {0: decay}", "names: 3", "nc: 1\nnames: [decay]\ntrain: x", ""]
)


@pytest.mark.parametrize("origin", ["human", "model"])
@FUZZ
@given(st.lists(YOLO_LINES, max_size=6).map("\n".join), NAMES)
def test_any_yolo_lines(origin, text, names):
    keys = {"origin": "model", "exhaustive": (), "min_confidence": 0.2} if origin == "model" else {}
    check("yolo", {"a.png": PICTURE, "a.txt": text.encode(errors="replace"), "data.yaml": names.encode()}, **keys)


@FUZZ
@given(st.lists(DOTA_LINES, max_size=6).map("\n".join))
def test_any_dota_lines(text):
    check("dota", {"a.png": PICTURE, "a.txt": text.encode(errors="replace")})


# --- JSON and CSV: valid files of which a few values were replaced ----------------------------------------------------

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 30),
    st.sampled_from([10**400, -(10**30), 1e308, float("nan"), float("inf"), 0.5, "", "a.png", "../a.png", "\ud800"]),
    st.text(max_size=4),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)
POLYGON = [2, 2, 12, 2, 12, 8]
MASK = {"size": [10, 20], "counts": "P155000000000\\3"}  # rows 2 to 6 of columns 3 to 8
DENTEX = {
    "images": COCO["images"],
    "annotations": [
        {"id": 1, "image_id": 1, "bbox": [2, 2, 5, 5], "category_id_1": 0, "category_id_2": 1, "category_id_3": 0}
    ],
    "categories_1": [{"id": 0, "name": "1"}],
    "categories_2": [{"id": 1, "name": "6"}],
    "categories_3": [{"id": 0, "name": "decay"}],
}
COCOS = (
    COCO,
    {**COCO, "annotations": [{**COCO["annotations"][0], "segmentation": [POLYGON], "score": 0.5}]},
    {**COCO, "annotations": [{**COCO["annotations"][0], "segmentation": POLYGON, "attributes": {"grade": "2"}}]},
    {**COCO, "annotations": [{**COCO["annotations"][0], "segmentation": {**MASK, "counts": [11, 5, 184]}}]},
    {
        **COCO,
        "annotations": [{**COCO["annotations"][0], "segmentation": MASK}],
    },
    DENTEX,
)
SHAPES = (
    {"name": "rect", "x": 2, "y": 2, "width": 5, "height": 5},
    {"name": "circle", "cx": 5, "cy": 5, "r": 2},
    {"name": "ellipse", "cx": 5, "cy": 5, "rx": 2, "ry": 1, "theta": 0.5},
    {"name": "polygon", "all_points_x": [2, 12, 12], "all_points_y": [2, 2, 8]},
    {"name": "polyline", "all_points_x": [2, 12, 12], "all_points_y": [2, 2, 8]},
    {"name": "point", "cx": 5, "cy": 5},
)
REGIONS = [{"shape_attributes": shape, "region_attributes": {"name": "decay"}} for shape in SHAPES]
VIA = {"a.png1": {"filename": "a.png", "size": 1, "file_attributes": {}, "regions": REGIONS}}
VIAS = (
    VIA,
    {"a.png1": {**VIA["a.png1"], "regions": {str(number): item for number, item in enumerate(REGIONS)}}},
    {
        "_via_img_metadata": VIA,
        "_via_attributes": {"region": {"name": {"type": "dropdown", "options": {"decay": "decay"}}}},
    },
)
CASES = (
    {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Caries."}]},
    {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Caries."}], "system": "Be kind."},
    {"instruction": "What?", "input": "A tooth.", "output": "Caries.", "condition": "caries"},
)


def places(value, path=()):
    """The way to every value of a document."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def change(value, path, replacement):
    """A document with one value replaced, or left out where the replacement is `...`."""
    if not path:
        return value if replacement is ... else replacement
    key, *rest = path
    changed = dict(value) if isinstance(value, dict) else list(value)
    if rest or replacement is not ...:
        changed[key] = change(value[key], rest, replacement)
    else:
        del changed[key]
    return changed


@st.composite
def changed(draw, documents):
    """One of the documents with one to three values replaced, left out or doubled."""
    document = draw(st.sampled_from(documents))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(document))))
        document = change(document, path, draw(st.one_of(VALUES, st.just(...))))
    return document


@pytest.mark.parametrize("classes", [CLASSES, "fdi"], ids=["map", "fdi"])
@pytest.mark.parametrize("origin", ["human", "model"])
@FUZZ
@given(changed(COCOS))
def test_any_change_of_a_coco_file(classes, origin, document):
    exhaustive = ("caries",) if origin == "human" and classes == CLASSES else ()
    keys = {"classes": classes, "origin": origin, "exhaustive": exhaustive, "attributes": {"grade": "severity"}}
    check("coco", {"a.png": PICTURE, "a.json": json.dumps(document).encode()}, **keys)


@FUZZ
@given(changed(VIAS))
def test_any_change_of_a_via_file(document):
    check("via", {"a.png": PICTURE, "a.json": json.dumps(document).encode()}, attributes={"grade": "severity"})


@FUZZ
@given(st.lists(st.tuples(st.text(max_size=6), changed(SHAPES), changed(({"name": "decay"},))), max_size=4), st.data())
def test_any_change_of_a_via_csv(rows, data):
    header = "filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,region_attributes"
    file = io.StringIO()
    writer = csv.writer(file)
    for name, shape, attributes in rows:
        writer.writerow(["a.png" + name, 1, "{}", 1, 0, json.dumps(shape), json.dumps(attributes)])
    text = file.getvalue()
    cut = data.draw(st.integers(0, len(text)))
    text = f"{header}\n{text[:cut]}{data.draw(st.text(max_size=3))}{text[cut:]}"
    check("via", {"a.png": PICTURE, "a.csv": text.encode(errors="replace")})


@FUZZ
@given(st.lists(changed(CASES), min_size=1, max_size=4), st.sampled_from([None, "condition"]))
def test_any_change_of_cases(entries, key):
    lines = "\n".join(map(json.dumps, entries)).encode()
    check("cases", {"a.jsonl": lines, "b.json": json.dumps(entries).encode()}, label_attribute=key)


FOLDERS = st.sampled_from(["decay", "molar", "train/decay", "crown", "images", "", "train", "decay/decay", "\u0661"])
FILES = st.sampled_from(["a.png", "b.PNG", "c.jpg", "Thumbs.db", ".hidden.png", "noext", "d.dcm"])


@FUZZ
@given(
    st.dictionaries(st.tuples(FOLDERS, FILES), st.sampled_from([PICTURE, b"", bytes(128) + b"DICM", b"x"]), max_size=6)
)
def test_any_folders(files):
    check("class_folders", {"/".join(filter(None, place)): content for place, content in files.items()})


@pytest.mark.parametrize(
    ("reader", "document"), [*(("coco", document) for document in COCOS), *(("via", document) for document in VIAS)]
)
def test_the_files_that_are_changed_are_valid_themselves(reader, document):
    items = check(reader, {"a.png": PICTURE, "a.json": json.dumps(document).encode()})

    assert [item for item in items if isinstance(item, Problem) and item.severity == "error"] == []
    assert sum(len(item.findings) for item in items if isinstance(item, ImageRecord)) >= 1
