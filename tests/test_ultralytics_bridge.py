"""To Ultralytics and back: datasets that it trains on without a leak, and a detector's boxes as findings of a model."""

import ast
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import shapely
import yaml
from conftest import REPOSITORY
from PIL import Image, ImageDraw
from test_layers import imported_roots
from typer.testing import CliRunner

from data_builders.audit import pick_unique, read_sources
from data_builders.dataset_folder import BuildError
from data_builders.images import measure
from data_builders.readers import read_yolo
from data_builders.records import Finding, ImageRecord, Problem
from data_builders.sources import Source, SourcesError, load_sources
from data_builders.yolo_detect import DetectionError, detect
from data_builders.yolo_export import export_yolo, outline
from dentalgemma.cli import app

TASKS = ("detect", "segment", "obb")


def export(path, out, **keys):
    return export_yolo(load_sources(path), out, progress=False, **keys)


def read_back(folder, classes=None):
    """What our own reader finds in an exported folder: class name and ring of every finding, by the pixels."""
    names = yaml.safe_load((folder / "data.yaml").read_text())["names"]
    source = Source(name="s", reader="yolo", root=folder, modality="panoramic", classes=classes or names)
    records = [item for item in read_yolo(source) if isinstance(item, ImageRecord)]
    return {measure(record.path).image_id: record for record in records}


def write_source(folder, name="s", **keys):
    """Append a source whose root is `folder` to the sources file beside it."""
    path = folder.parent / "sources.yaml"
    document = yaml.safe_load(path.read_text()) if path.exists() else {"sources": []}
    defaults = {"reader": "yolo", "modality": "panoramic", "classes": {0: "caries", 1: "infection"}}
    document["sources"].append({"name": name, "root": folder.name, **defaults, **keys})
    path.write_text(yaml.safe_dump(document))
    return path


def write_image(path, grey=0, size=(200, 100), boxes=()):
    """A dark image, with a lighter box for each (left, top, right, bottom, grey)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("L", size, grey)
    for *box, shade in boxes:
        ImageDraw.Draw(image).rectangle(box, fill=shade)
    image.save(path)
    return path


def write_pair(root, stem, label, **keys):
    """An image and its YOLO label file."""
    (root / "labels").mkdir(parents=True, exist_ok=True)
    (root / "labels" / f"{stem}.txt").write_text(label)
    return write_image(root / "images" / f"{stem}.png", **keys)


def gap(ours, theirs):
    """The farthest that the ground of some rings reaches from that of others, in fractions of the image."""
    first, second = (shapely.union_all([shapely.Polygon(ring) for ring in rings]) for rings in (ours, theirs))
    return first.hausdorff_distance(second)


# ---- the dataset that Ultralytics trains on


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("layout", ["yolo", "yolo_obb", "coco", "via1", "dota"])
def test_phantoms_come_back_as_they_were_drawn(phantoms, tmp_path, layout, task):
    exported = export(phantoms / f"sources_{layout}.yaml", tmp_path / "out", task=task)
    (content,) = read_sources(load_sources(phantoms / f"sources_{layout}.yaml"), progress=False)
    found = read_back(tmp_path / "out")

    assert sum(counts["images"] for counts in exported.report["splits"].values()) == len(found) == 40
    for record in content.records:
        ours = found[record.image_id].findings
        assert [finding.label for finding in ours] == [finding.label for finding in record.findings]
        for finding, truth in zip(ours, record.findings, strict=True):
            assert finding.bounds == pytest.approx(truth.bounds, abs=1e-6)
            if task != "detect":  # the four corners of a turned box are its smallest rectangle, also as a VIA polygon
                assert gap(finding.parts, truth.parts) < 1e-6


@pytest.mark.parametrize("task", TASKS)
def test_real_annotations_come_back_as_they_are(real_sources, tmp_path, task):
    export(real_sources, tmp_path / "out", task=task)
    found = read_back(tmp_path / "out")
    contents = read_sources(load_sources(real_sources), progress=False)
    records = [record for content in contents for record in pick_unique(content.records)[0] if record.findings]

    assert len(found) == len(records) > 60
    assert sum(len(record.findings) for record in records) > 700
    for record in records:
        ours = found[record.image_id].findings
        assert [finding.label for finding in ours] == [finding.label for finding in record.findings]
        for finding, truth in zip(ours, record.findings, strict=True):
            if task == "detect":
                assert finding.bounds == pytest.approx(truth.bounds, abs=1e-6)
            elif task == "segment" or truth.shape != "polygon":
                assert gap(finding.parts, truth.parts) < 1e-6
            else:
                check_smallest_rectangle(outline(truth, "obb", (record.width, record.height)), truth, record)


def check_smallest_rectangle(ring, truth, record):
    """A rectangle in pixels that holds the polygon, and no turned one tried degree by degree is smaller."""
    size = record.width, record.height
    pixels = shapely.Polygon([(x * size[0], y * size[1]) for x, y in truth.parts[0]])
    box = shapely.Polygon([(x * size[0], y * size[1]) for x, y in ring])
    turned = (shapely.affinity.rotate(pixels, degree, origin=(0, 0)) for degree in range(90))
    smallest = min(shapely.box(*polygon.bounds).area for polygon in turned)
    assert box.buffer(1e-6).covers(pixels)
    assert box.area <= smallest * (1 + 1e-9) or is_axis_aligned(ring)


def is_axis_aligned(ring):
    return len({round(x, 9) for x, _ in ring}) == len({round(y, 9) for _, y in ring}) == 2


def test_an_oriented_box_has_its_right_angles_in_the_pixels():
    turn = math.radians(30)
    middle, (half_width, half_height) = (200, 100), (80, 20)
    ring = []
    for x, y in [(-1, -1), (0, -1), (1, -1), (1, 1), (0.5, 0), (-1, 1)]:  # a rectangle with a notch
        x, y = x * half_width, y * half_height
        turned = x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)
        ring.append(((middle[0] + turned[0]) / 400, (middle[1] + turned[1]) / 200))
    finding = Finding("f", "caries", "polygon", (tuple(ring),))

    assert gap([outline(finding, "obb", (400, 200))], [[ring[0], ring[2], ring[3], ring[5]]]) < 1e-9
    assert gap([outline(finding, "detect", (400, 200))], [shapely.box(*finding.bounds).exterior.coords]) < 1e-9


def test_no_oriented_box_is_wider_than_the_image(tmp_path):
    """For one label wider than the image, Ultralytics leaves the image out with a line in its log."""
    band = ((0.0, 0.0), (1.0, 0.3), (1.0, 0.5), (0.5, 0.4), (0.0, 0.2))
    finding = Finding("f", "dentition", "polygon", (band,))

    assert outline(finding, "obb", (400, 400)) == ((0.0, 0.0), (1.0, 0.0), (1.0, 0.5), (0.0, 0.5))


def test_a_finding_of_two_parts_stays_one_finding(tmp_path):
    parts = [
        [20, 20, 60, 20, 60, 40, 20, 40],
        [100, 50, 140, 50, 140, 80, 120, 90, 100, 80],
        [100, 10, 120, 10, 110, 30],
    ]
    write_image(tmp_path / "coco" / "a.png")
    annotation = {
        "id": 1,
        "image_id": 1,
        "category_id": 1,
        "bbox": [20, 10, 120, 80],
        "segmentation": parts,
        "iscrowd": 0,
    }
    document = {
        "images": [{"id": 1, "file_name": "a.png", "width": 200, "height": 100}],
        "annotations": [{**annotation, "area": 2750}],
        "categories": [{"id": 1, "name": "caries"}],
    }
    (tmp_path / "coco" / "a.json").write_text(json.dumps(document))
    path = write_source(tmp_path / "coco", reader="coco", annotations="a.json", classes={"caries": "caries"})

    export(path, tmp_path / "out", task="segment")
    (record,) = read_back(tmp_path / "out").values()
    (finding,) = record.findings
    truth = [[(x / 200, y / 100) for x, y in zip(part[::2], part[1::2], strict=True)] for part in parts]

    assert len(finding.parts) == 3
    assert gap(finding.parts, truth) < 1e-6


def test_classes_stand_in_the_order_of_the_vocabulary_and_teeth_in_that_of_their_numbers(phantoms, tmp_path):
    conditions = export(phantoms / "sources_yolo.yaml", tmp_path / "a").report["names"]
    teeth = export(phantoms / "sources_teeth.yaml", tmp_path / "b", classes="tooth").report["names"]

    assert conditions == ["caries", "infection", "impacted_tooth", "broken_down_crown_or_root"]
    assert teeth == [f"{quadrant}{number}" for quadrant in "1234" for number in range(1, 9)]
    found = [finding for record in read_back(tmp_path / "b", "fdi").values() for finding in record.findings]
    (content,) = read_sources(load_sources(phantoms / "sources_teeth.yaml"), progress=False)
    assert Counter(finding.tooth for finding in found) == Counter(
        finding.tooth for record in content.records for finding in record.findings
    )


def test_copies_of_one_radiograph_stay_in_one_split(third_party, tmp_path):
    root = third_party / "opg_pathology_yolo" / "Dental OPG XRAY Dataset" / "Augmented_Data"
    names = ["caries", "infection", "impacted_tooth", "fractured_tooth", "broken_down_crown_or_root", "healthy_tooth"]
    source = {
        "name": "s",
        "reader": "yolo",
        "root": str(root),
        "modality": "panoramic",
        "classes": dict(enumerate(names)),
    }
    (tmp_path / "sources.yaml").write_text(
        yaml.safe_dump({"sources": [source], "split": {"train": 0.4, "validation": 0.3, "test": 0.3}})
    )

    exported = export(tmp_path / "sources.yaml", tmp_path / "out")
    (content,) = read_sources(load_sources(tmp_path / "sources.yaml"), progress=False)
    homes = {}
    for record in content.records:
        for place in (tmp_path / "out" / "images").glob(f"*/{(record.image_id or '-')[:16]}.*"):
            homes.setdefault(record.path.name.split(".rf.")[0], set()).add(place.parent.name)

    assert exported.report["splits"].keys() == {"train", "validation", "test"}
    assert Counter(map(len, homes.values())) == {1: len(homes)}
    assert len(homes) < exported.report["splits"]["train"]["images"] + 20


@pytest.mark.parametrize(
    ("exhaustive", "label", "exported"),
    [
        pytest.param(["caries", "infection"], "", True, id="known to be free of all classes"),
        pytest.param(["caries"], "", False, id="nobody looked for infections"),
        pytest.param([], "", False, id="nothing is known"),
        pytest.param(["caries", "infection"], None, False, id="no label file"),
        pytest.param(["caries", "infection"], "0 .5 .5\n", False, id="an unreadable line"),
        pytest.param(["caries", "infection"], "0 .5 .5 0 0\n", False, id="a box without area"),
    ],
)
def test_an_image_without_marks_is_a_negative_only_where_it_is_known_to_be_one(tmp_path, exhaustive, label, exported):
    for number, line in enumerate(["0 .5 .5 .2 .2\n", "1 .5 .5 .2 .2\n"]):
        write_pair(tmp_path / "s", number, line, grey=number)
    empty = measure(write_image(tmp_path / "s" / "images" / "empty.png", grey=9)).image_id
    if label is not None:
        (tmp_path / "s" / "labels" / "empty.txt").write_text(label)

    report, problems = export(write_source(tmp_path / "s", exhaustive=exhaustive), tmp_path / "out")

    assert (empty in read_back(tmp_path / "out")) == exported
    assert sum(counts["negatives"] for counts in report["splits"].values()) == exported
    assert report["problem_counts"].get("no_negative", 0) == (not exported)
    assert ("partly_marked" in report["problem_counts"]) == (len(exhaustive) < 2)
    assert all(str(problem).startswith(str(tmp_path)) for problem in problems)


def test_a_disease_without_a_box_makes_no_negative(tmp_path):
    """The class folder says caries somewhere; an empty label file would say caries nowhere."""
    boxed = write_pair(tmp_path / "boxes", "a", "0 .5 .5 .2 .2\n", grey=1)
    write_image(tmp_path / "folders" / "caries" / "b.png", grey=2)
    write_source(tmp_path / "boxes", "boxes", classes={0: "caries"}, exhaustive=["caries"])
    path = write_source(
        tmp_path / "folders", "folders", reader="class_folders", classes={"caries": "caries"}, exhaustive=["caries"]
    )

    report, problems = export(path, tmp_path / "out")

    assert list(read_back(tmp_path / "out")) == [measure(boxed).image_id]
    assert report["problem_counts"]["no_area"] == 1
    assert "1 image: enclose no area; not exported" in " ".join(map(str, problems))


def test_points_and_lines_are_counted_and_left_out(tmp_path):
    write_image(tmp_path / "via" / "a.png")
    shapes = [
        {"name": "point", "cx": 20, "cy": 20},
        {"name": "polyline", "all_points_x": [10, 40, 60], "all_points_y": [10, 40, 10]},
        {"name": "circle", "cx": 100, "cy": 50, "r": 20},
    ]
    regions = [{"shape_attributes": shape, "region_attributes": {"what": "caries"}} for shape in shapes]
    document = {"a.png-1": {"filename": "a.png", "size": -1, "file_attributes": {}, "regions": regions}}
    (tmp_path / "via" / "via.json").write_text(json.dumps(document))

    report, problems = export(
        write_source(tmp_path / "via", reader="via", classes={"caries": "caries"}, label_attribute="what"),
        tmp_path / "out",
    )

    assert report["splits"]["train"]["findings"] == 1
    assert "1 point, 1 polyline: enclose no area; not exported" in " ".join(map(str, problems))


def test_one_picture_in_two_sources_is_one_image_with_the_marks_of_both(tmp_path):
    for name, lines in [("a", "0 .5 .5 .2 .2\n"), ("b", "0 .5 .5 .2 .2\n1 .2 .2 .1 .1\n")]:
        write_pair(tmp_path / name, "x", lines)
        path = write_source(tmp_path / name, name)

    report, _ = export(path, tmp_path / "out")
    (record,) = read_back(tmp_path / "out").values()

    assert [finding.label for finding in record.findings] == ["caries", "infection"]
    assert report["problem_counts"] == {"image_in_several_sources": 1, "marked_twice": 1, "partly_marked": 2}


def test_what_a_detector_found_is_no_truth_for_another(tmp_path):
    for name, keys in [("drawn", {}), ("found", {"origin": "model"})]:
        write_pair(tmp_path / name, "x", "0 .5 .5 .2 .2 0.9\n", grey=ord(name[0]))
        path = write_source(tmp_path / name, name, **keys)

    report, _ = export(path, tmp_path / "out")

    assert report["splits"] == {"train": {"images": 1, "findings": 1, "negatives": 0}}
    assert report["problem_counts"]["model_finding"] == report["problem_counts"]["no_negative"] == 1


def test_the_folder_can_be_moved_and_its_images_are_copies_under_names_of_their_content(phantoms, tmp_path):
    originals = {path: path.read_bytes() for path in (phantoms / "yolo" / "images").rglob("*.jpg")}
    for workers in (1, 3):
        export(phantoms / "sources_yolo.yaml", tmp_path / f"out{workers}", workers=workers)
    first, second = (
        {p.relative_to(o): p.read_bytes() for p in o.rglob("*") if p.is_file()}
        for o in map(tmp_path.joinpath, ("out1", "out3"))
    )

    assert first == second
    stated = yaml.safe_load((tmp_path / "out1" / "data.yaml").read_text())
    assert {stated[split] for split in ("train", "val", "test")} == {f"images/{s}" for s in ("train", "val", "test")}
    assert "path" not in stated
    assert str(phantoms) not in "".join(path.read_text() for path in (tmp_path / "out1").glob("*.*"))
    images = list((tmp_path / "out1" / "images").rglob("*.jpg"))
    assert all(path.stat().st_nlink == 1 and path.stem == measure(path).image_id[:16] for path in images)
    assert {path: path.read_bytes() for path in originals} == originals


def test_an_image_is_exported_upright_and_without_its_metadata(tmp_path):
    """A photograph taken with the camera on its side, with a light box at the top right as it is displayed."""
    write_pair(tmp_path / "s", "a", "0 .9 .1 .2 .2\n").unlink()
    stored = Image.new("RGB", (200, 100))
    ImageDraw.Draw(stored).rectangle((0, 0, 39, 19), fill="white")
    exif = Image.Exif()
    exif[0x0112], exif[0x013B] = 6, "Dr. Canary"  # orientation: turn it by a quarter; artist
    stored.save(tmp_path / "s" / "images" / "a.jpg", exif=exif)

    export(write_source(tmp_path / "s"), tmp_path / "out")
    (path,) = (tmp_path / "out" / "images").rglob("*.*")

    assert b"Canary" not in path.read_bytes()
    with Image.open(path) as image:
        assert (image.size, dict(image.getexif())) == ((100, 200), {})
        assert image.convert("L").crop((81, 1, 99, 39)).getextrema()[0] > 250
    (label,) = (tmp_path / "out" / "labels").rglob("*.txt")
    assert [float(value) for value in label.read_text().split()] == pytest.approx([0, 0.9, 0.1, 0.2, 0.2])


def test_an_export_that_was_trained_on_can_be_written_again_and_a_folder_of_the_user_cannot(tmp_path):
    write_pair(tmp_path / "s", "a", "0 .5 .5 .2 .2\n")
    path = write_source(tmp_path / "s")
    export(path, tmp_path / "out")
    (tmp_path / "out" / "labels" / "train.cache").write_bytes(b"kept by Ultralytics")
    export(path, tmp_path / "out", task="obb")

    assert not list((tmp_path / "out").rglob("*.cache"))
    (tmp_path / "out" / "best.pt").write_bytes(b"weeks of training")
    (tmp_path / "out" / "labels" / "train.cache").write_bytes(b"kept by Ultralytics")
    before = sorted((tmp_path / "out").rglob("*"))
    with pytest.raises(BuildError, match=r"best\.pt"):
        export(path, tmp_path / "out")
    assert sorted((tmp_path / "out").rglob("*")) == before
    assert (tmp_path / "out" / "best.pt").read_bytes() == b"weeks of training"


def test_a_folder_that_cannot_be_replaced_is_refused_before_anything_is_read(tmp_path):
    """Reading the labels would say that the class map lacks 7."""
    write_pair(tmp_path / "s", "a", "7 .5 .5 .2 .2\n")
    (tmp_path / "thesis.txt").write_text("years of work")

    with pytest.raises(BuildError, match=r"holds|is not empty"):
        export(write_source(tmp_path / "s"), tmp_path)


def test_sources_without_any_area_are_refused(phantoms, tmp_path):
    with pytest.raises(BuildError, match="no finding can be exported"):
        export(phantoms / "sources_class_folders.yaml", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_exports_and_says_what_it_left_out(tmp_path):
    write_pair(tmp_path / "s", "a", "0 .5 .5 .2 .2\n")
    done = CliRunner().invoke(
        app, ["export-yolo", str(write_source(tmp_path / "s")), "--out", str(tmp_path / "out"), "--task", "obb"]
    )

    assert done.exit_code == 0, done.output
    assert "train: 1 findings on 1 images" in done.output
    assert "split validation is empty" in done.output
    assert "not exhaustive for caries" in done.output
    assert [len(path.read_text().split()) for path in (tmp_path / "out" / "labels").rglob("*.txt")] == [9]


def test_the_command_tells_another_program_every_problem(tmp_path):
    write_pair(tmp_path / "s", "a", "0 .5 .5 .2 .2\n0 .5 .5\n")
    done = CliRunner().invoke(
        app, ["export-yolo", str(write_source(tmp_path / "s")), "--out", str(tmp_path / "out"), "--json"]
    )
    told = json.loads(done.stdout)

    assert told["splits"]["train"] == {"images": 1, "findings": 1, "negatives": 0}
    assert [(p["code"], p["line"]) for p in told["problems"]] == [("bad_label_line", 2), ("partly_marked", None)]


# ---- a detector's boxes

STAND_IN = '''
"""What Ultralytics' YOLO gives back, on numpy. Its eye: the lightest box of an image is wide (0) or high (1)."""
import json, os, signal
from pathlib import Path
import numpy as np

__version__ = "8.0.0"


class Boxes:
    def __init__(self, box, size, shade):
        width, height = size
        left, top, right, bottom = box
        self.cls, self.conf = np.array([float(bottom - top > right - left)]), np.array([shade / 255])
        self.xywhn = np.array([[(left + right) / 2 / width, (top + bottom) / 2 / height,
                                (right - left) / width, (bottom - top) / height]])
        corners = [[left, top], [right, top], [right, bottom], [left, bottom]]
        self.xyxyxyxyn = np.array([corners]) / [width, height]

    def __len__(self):
        return len(self.cls)


class Masks:
    def __init__(self, corners):
        (left, top), _, (right, bottom), _ = corners
        middle = (left + right) / 2
        outline = [[left, bottom], [left, top], [middle, top], [right, top], [right, bottom]]
        self.xyn = [np.array(outline if right - left > 0.05 else outline[:1])]


class Results:
    def __init__(self, task, boxes):
        self.boxes = None if task == "obb" else boxes
        self.obb = boxes if task == "obb" else None
        self.masks = Masks(boxes.xyxyxyxyn[0]) if task == "segment" and boxes else None


class YOLO:
    def __init__(self, weights):
        stated = json.loads(Path(weights).read_text())
        self.task, self.names = stated["task"], {int(key): name for key, name in stated["names"].items()}
        self.dies_at, self.calls = stated.get("dies_at"), 0

    def predict(self, source, conf, stream=False, save=True, verbose=True):
        assert not stream and not save and isinstance(source, list)
        self.calls += 1
        if self.calls == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return [self._look(np.asarray(image.convert("L")), conf) for image in source]

    def _look(self, pixels, conf):
        shade = pixels.max()
        rows, columns = np.nonzero(pixels == shade)
        boxes = Boxes((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1), pixels.shape[::-1], shade)
        if shade / 255 < conf or shade == pixels.min():
            boxes.cls = boxes.conf = np.array([])
            boxes.xywhn, boxes.xyxyxyxyn = np.zeros((0, 4)), np.zeros((0, 4, 2))
        return Results(self.task, boxes)
'''

SHOWN = {  # file -> box in an image of 200 x 100 pixels with its grey, class, confidence
    "a.png": ((20, 10, 79, 39, 230), "caries", 230 / 255),
    "sub/b.png": ((120, 40, 139, 89, 153), "root rest", 153 / 255),
    "sub/c.png": ((150, 50, 154, 52, 204), "caries", 204 / 255),
    "d.png": ((60, 60, 99, 79, 51), None, None),  # below the confidence
    "e.png": (None, None, None),
}


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A folder that comes first on the path and holds a package that behaves as Ultralytics does at its boundary."""
    (tmp_path / "site" / "ultralytics").mkdir(parents=True)
    (tmp_path / "site" / "ultralytics" / "__init__.py").write_text(STAND_IN)
    real = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "ultralytics"}
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield tmp_path / "site"
    sys.modules.pop("ultralytics", None)
    sys.modules.update(real)


@pytest.fixture
def unlabelled(tmp_path):
    for name, (box, _, _) in SHOWN.items():
        write_image(tmp_path / "unlabelled" / name, grey=3, boxes=[box] if box else [])
    return tmp_path / "unlabelled"


def write_weights(path, **keys):
    path.write_text(json.dumps({"task": "detect", "names": {0: "caries", 1: "root rest"}, **keys}))
    return path


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("task", TASKS)
def test_boxes_come_back_as_findings_of_a_model(stand_in, unlabelled, tmp_path, task):
    before = contents(unlabelled)
    out = tmp_path / "found"
    weights = write_weights(tmp_path / "w.pt", task=task)

    done = detect(weights, unlabelled, out, modality="intraoral_photo", progress=False)
    text = (out / "sources.yaml").read_text()
    (out / "sources.yaml").write_text(text.replace("# 1:", "1: broken_down_crown_or_root #"))
    (source,) = load_sources(out / "sources.yaml").sources
    items = list(read_yolo(source))
    records = {r.path.resolve().relative_to(unlabelled).as_posix(): r for r in items if isinstance(r, ImageRecord)}

    assert (done.images, done.done_before, done.boxes, done.problems) == (5, 0, 3, ())
    assert not [item for item in items if isinstance(item, Problem) and item.severity == "error"]
    assert records.keys() == SHOWN.keys()
    for name, (box, label, confidence) in SHOWN.items():
        findings = records[name].findings
        assert len(findings) == (label is not None)
        if findings:
            left, top, right, bottom, _ = box
            truth = left / 200, top / 100, (right + 1) / 200, (bottom + 1) / 100
            assert findings[0].label == {"caries": "caries"}.get(label, "broken_down_crown_or_root")
            assert findings[0].bounds == pytest.approx(truth, abs=1e-6)
            assert findings[0].confidence == pytest.approx(confidence, abs=1e-5)
            assert findings[0].origin == "model"
        assert records[name].exhaustive == ()
    assert contents(unlabelled) == before


def test_what_a_class_means_is_for_the_user_to_say(stand_in, unlabelled, tmp_path):
    detect(write_weights(tmp_path / "w.pt"), unlabelled, tmp_path / "found", model_license="AGPL-3.0", progress=False)
    path = tmp_path / "found" / "sources.yaml"
    text = path.read_text()

    assert "0: caries\n" in text  # the vocabulary has this very name
    assert '# 1:   the detector calls it "root rest"' in text
    assert 'the detector\'s is "AGPL-3.0"' in text
    with pytest.raises(SourcesError, match="needs 'modality'"):
        load_sources(path)
    path.write_text(text.replace("modality:", "modality: panoramic"))
    with pytest.raises(BuildError, match=r"the class map lacks 1 root rest"):
        export(path, tmp_path / "out")


def test_a_completed_sources_file_is_not_written_over(stand_in, unlabelled, tmp_path):
    detect(write_weights(tmp_path / "w.pt"), unlabelled, tmp_path / "found", progress=False)
    (tmp_path / "found" / "sources.yaml").write_text("mine")
    detect(write_weights(tmp_path / "w.pt"), unlabelled, tmp_path / "found", progress=False)

    assert (tmp_path / "found" / "sources.yaml").read_text() == "mine"


def test_a_run_that_was_killed_leaves_whole_files_and_is_continued(stand_in, unlabelled, tmp_path):
    weights = write_weights(tmp_path / "w.pt", dies_at=3)
    code = (
        "from pathlib import Path; from data_builders.yolo_detect import detect; "
        f"detect(Path({str(weights)!r}), Path({str(unlabelled)!r}), Path({str(tmp_path / 'found')!r}), progress=False)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(stand_in), str(REPOSITORY)])}

    runs = [subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=120)]
    left = contents(tmp_path / "found" / "labels")
    runs += [subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=120)]
    runs += [subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=120)]
    detect(write_weights(tmp_path / "other.pt"), unlabelled, tmp_path / "at_once", progress=False)

    assert [run.returncode for run in runs] == [-9, -9, 0], runs[-1].stderr.decode()
    whole = contents(tmp_path / "at_once" / "labels")
    assert len(whole) == 5
    assert len(left) == 2 and left.items() <= whole.items()
    assert contents(tmp_path / "found" / "labels") == whole


def test_a_label_file_is_there_whole_or_not_at_all(stand_in, unlabelled, tmp_path, monkeypatch):
    weights = write_weights(tmp_path / "w.pt")
    into_place = os.replace

    def stop_at_labels(partial, path):
        if "labels" in Path(path).parts:
            raise KeyboardInterrupt
        into_place(partial, path)

    monkeypatch.setattr(os, "replace", stop_at_labels)
    with pytest.raises(KeyboardInterrupt):
        detect(weights, unlabelled, tmp_path / "found", progress=False)
    monkeypatch.setattr(os, "replace", into_place)
    assert not list((tmp_path / "found").rglob("*.txt"))

    assert detect(weights, unlabelled, tmp_path / "found", progress=False).images == 5
    assert len(contents(tmp_path / "found" / "labels")) == 5


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        pytest.param({"confidence": 0.5}, "found with other confidence", id="another confidence"),
        pytest.param({"weights": "other.pt"}, "found with other weights_sha256", id="other weights"),
        pytest.param({"images": "more"}, "found with other images", id="other images"),
        pytest.param({"out": "thesis"}, "is not empty and holds no detection.json", id="a folder of the user's"),
        pytest.param({"weights": "none.pt"}, "none.pt is no file", id="no weights"),
        pytest.param({"weights": "junk.pt"}, "cannot be loaded as an Ultralytics model", id="no model"),
        pytest.param({"weights": "classify.pt"}, "is a model for 'classify'", id="no boxes"),
        pytest.param({"images": "thesis"}, "holds no image files", id="no images"),
        pytest.param({"confidence": 25}, "between 0 and 1", id="per cent"),
    ],
)
def test_wrong_use_is_refused_and_changes_nothing(stand_in, unlabelled, tmp_path, keys, message):
    write_weights(tmp_path / "w.pt")
    write_weights(tmp_path / "other.pt", names={0: "x"})
    write_weights(tmp_path / "classify.pt", task="classify")
    (tmp_path / "junk.pt").write_text("hello")
    write_image(tmp_path / "more" / "x.png")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("years")
    detect(tmp_path / "w.pt", unlabelled, tmp_path / "found", progress=False)
    before = contents(tmp_path)
    asked = {"weights": "w.pt", "images": "unlabelled", "out": "found", "confidence": 0.25, **keys}

    with pytest.raises(DetectionError, match=message):
        detect(
            tmp_path / asked["weights"],
            tmp_path / asked["images"],
            tmp_path / asked["out"],
            confidence=asked["confidence"],
            progress=False,
        )
    changed = {name for name, content in contents(tmp_path).items() if before.get(name) != content}
    assert not {name for name in changed if "__pycache__" not in name}


def test_what_cannot_be_looked_at_is_said_and_tried_again(stand_in, unlabelled, tmp_path):
    (unlabelled / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    write_image(unlabelled / "a.bmp")
    weights = write_weights(tmp_path / "w.pt")

    first = detect(weights, unlabelled, tmp_path / "found", progress=False)
    write_image(unlabelled / "broken.jpg", boxes=[(20, 20, 60, 40, 255)])
    second = detect(weights, unlabelled, tmp_path / "found", progress=False)

    assert {problem.code for problem in first.problems} == {"image_unreadable", "shared_label_file"}
    assert (second.images, second.boxes, second.done_before) == (1, 1, 5)


def test_the_command_detects(stand_in, unlabelled, tmp_path):
    write_weights(tmp_path / "w.pt")
    arguments = [
        "detect",
        str(tmp_path / "w.pt"),
        str(unlabelled),
        "--out",
        str(tmp_path / "found"),
        "--confidence",
        "0.7",
    ]
    done = CliRunner().invoke(app, arguments)

    assert done.exit_code == 0, done.output
    assert "2 boxes on 5 images" in done.output
    assert json.loads((tmp_path / "found" / "detection.json").read_text())["confidence"] == 0.7
    assert "5 images were done before" in CliRunner().invoke(app, arguments).output


def test_without_the_extra_one_sentence_says_what_to_install(unlabelled, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ultralytics", None)  # what Python does for a package that is not there

    with pytest.raises(DetectionError, match=r'pip install "dentalgemma\[yolo\]"'):
        detect(write_weights(tmp_path / "w.pt"), unlabelled, tmp_path / "found", progress=False)
    assert not (tmp_path / "found").exists()


def test_ultralytics_is_imported_where_a_model_is_loaded_and_nowhere_else():
    """It is under AGPL-3.0: nobody gets it into a process without asking for a detection."""
    paths = [*REPOSITORY.glob("data_builders/**/*.py"), *REPOSITORY.glob("dentalgemma/**/*.py")]
    importers = [path for path in paths if "ultralytics" in imported_roots(path)]

    assert [path.name for path in importers] == ["yolo_detect.py"]
    (path,) = importers
    at_import = ast.Module(
        [node for node in ast.parse(path.read_text()).body if not isinstance(node, ast.FunctionDef)], type_ignores=[]
    )
    assert "ultralytics" not in ast.unparse(at_import).replace(ast.get_docstring(at_import) or "", "")


# ---- the real one, where it is installed

NEEDS = 'needs the extra: pip install "dentalgemma[yolo]", and torchvision for the torch that is installed'


@pytest.fixture
def ultralytics(tmp_path, monkeypatch):
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path / "settings"))
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    monkeypatch.chdir(tmp_path)
    return pytest.importorskip("ultralytics", reason=NEEDS, exc_type=ImportError)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("which", ["phantoms", "real"])
def test_ultralytics_finds_nothing_wrong_with_an_export(ultralytics, request, phantoms, tmp_path, task, which):
    from ultralytics.data.utils import check_det_dataset, img2label_paths, verify_image_label

    path = phantoms / "sources_via1.yaml" if which == "phantoms" else request.getfixturevalue("real_sources")
    report, _ = export(path, tmp_path / "out", task=task)
    stated = check_det_dataset(str(tmp_path / "out" / "data.yaml"), autodownload=False)
    images = sorted(str(path) for path in (tmp_path / "out" / "images").rglob("*.*"))
    verified = [
        verify_image_label((image, labels, "", False, stated["nc"], 0, 0, False))
        for image, labels in zip(images, img2label_paths(images), strict=True)
    ]

    assert list(stated["names"].values()) == report["names"]
    assert [one[9] for one in verified if one[9]] == []  # messages: corrupt, out of bounds, duplicate, restored
    counts = report["splits"].values()
    assert len(verified) == sum(split["images"] for split in counts)
    assert sum(len(one[1]) for one in verified) == sum(split["findings"] for split in counts)
    assert sum(one[7] for one in verified) == sum(split["negatives"] for split in counts)


@pytest.mark.slow  # random oriented boxes overlap so much that sorting them out takes Ultralytics seconds an image
@pytest.mark.parametrize("model", ["yolov8n.yaml", "yolov8n-seg.yaml", "yolov8n-obb.yaml"])
def test_a_real_detector_with_random_weights_is_run_and_read(ultralytics, third_party, tmp_path, model):
    weights = tmp_path / "random.pt"
    ultralytics.YOLO(model).save(weights)
    images = third_party / "tooth_tracking_dota" / "datasets" / "roboflow" / "valid"

    done = detect(weights, images, tmp_path / "found", confidence=0.0, modality="intraoral_photo", progress=False)
    text = (tmp_path / "found" / "sources.yaml").read_text()
    (tmp_path / "found" / "sources.yaml").write_text(
        f"{text}      {{{', '.join(f'{n}: caries' for n in range(80))}}}\n"
    )
    (source,) = load_sources(tmp_path / "found" / "sources.yaml").sources
    records = [item for item in read_yolo(source) if isinstance(item, ImageRecord)]

    assert done.problems == ()
    assert done.images == len(records) > 0
    assert done.boxes == sum(len(record.findings) + len(record.rejected) for record in records) > 0
    assert all(finding.origin == "model" for record in records for finding in record.findings)
    assert not [path for path in tmp_path.iterdir() if path.name == "runs"]
