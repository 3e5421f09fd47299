"""The readers against supervision and pycocotools, on the files that these can read, and against the phantoms' truth.

The differences that are left, and why:

- supervision and pycocotools keep a box that reaches over the edge of its image; ours ends there, with a problem that
  says so, and a box of which less than half is inside is left out (1 of 5,030 real ones).
- supervision turns polygons into masks of whole pixels, so that only the boxes around them can be compared, to a pixel.
- Neither knows DOTA, VIA or DENTEX: there the phantoms' truth is the oracle (`test_phantoms.py`, and DENTEX here).
"""

import json
import warnings
from collections import Counter, defaultdict

import numpy as np
import pytest

from data_builders.images import read_size
from data_builders.phantom import CONDITIONS, HEIGHT, WIDTH, make_phantoms
from data_builders.readers import READERS, read_coco
from data_builders.records import ImageRecord, Problem
from data_builders.sources import Source, load_sources

CAVITY = {"cavity": "caries", "normal": "healthy_tooth"}


@pytest.fixture(scope="module")
def supervision():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says at length that OpenCV is not there
        return pytest.importorskip("supervision")


@pytest.fixture(scope="module")
def mask_api():
    return pytest.importorskip("pycocotools.mask")


def read_boxes(source):
    """Label and box in pixels of every finding, by the name of its image; and the problems."""
    boxes, problems = defaultdict(list), []
    for item in READERS[source.reader](source):
        if isinstance(item, Problem):
            problems.append(item)
            continue
        width, height = item.width or WIDTH, item.height or HEIGHT
        for finding in item.findings:
            left, top, right, bottom = finding.bounds
            label = finding.tooth if finding.label == "tooth" else finding.label
            boxes[item.path.name].append((label, left * width, top * height, right * width, bottom * height))
    return boxes, problems


def supervision_boxes(dataset):
    boxes = defaultdict(list)
    for path, found in dataset.annotations.items():
        for class_id, box in zip(found.class_id, found.xyxy, strict=True):
            boxes[path.rsplit("/", 1)[-1]].append((dataset.classes[class_id], *map(float, box)))
    return boxes


def assert_same(ours, theirs, tolerance):
    """Every image has as many boxes of each label here and there, each within `tolerance` pixels of its like."""
    assert {name for name, boxes in ours.items() if boxes} == {name for name, boxes in theirs.items() if boxes}
    for name, boxes in theirs.items():
        assert Counter(box[0] for box in ours[name]) == Counter(box[0] for box in boxes)
        left = list(ours[name])
        for label, *corners in boxes:
            found = min(
                (box for box in left if box[0] == label), key=lambda box: np.abs(np.subtract(box[1:], corners)).max()
            )
            assert found[1:] == pytest.approx(corners, abs=tolerance)
            left.remove(found)


def phantom_source(phantoms, name):
    return load_sources(phantoms / f"sources_{name}.yaml").sources[0]


# --- phantoms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["yolo", "teeth"])
def test_yolo_boxes_are_those_of_supervision(phantoms, supervision, name):
    folder = phantoms / name
    theirs = supervision.DetectionDataset.from_yolo(f"{folder}/images", f"{folder}/labels", f"{folder}/data.yaml")

    ours, problems = read_boxes(phantom_source(phantoms, name))

    assert sum(map(len, ours.values())) > (30 if name == "yolo" else 1000)
    assert_same(ours, supervision_boxes(theirs), tolerance=0.01)
    assert not [problem for problem in problems if problem.severity == "error"]


def test_oriented_boxes_have_the_corners_that_supervision_reads(phantoms, supervision):
    folder = phantoms / "yolo_obb"
    theirs = supervision.DetectionDataset.from_yolo(
        f"{folder}/images", f"{folder}/labels", f"{folder}/data.yaml", is_obb=True
    )
    records = [item for item in READERS["yolo"](phantom_source(phantoms, "yolo_obb")) if isinstance(item, ImageRecord)]
    compared = 0
    for record in records:
        found = theirs.annotations[str(record.path)]
        corners = found.data.get("xyxyxyxy", ())
        labels = [theirs.classes[class_id] for class_id in found.class_id]
        assert labels == [finding.label for finding in record.findings]
        for finding, expected in zip(record.findings, corners, strict=True):
            if len(finding.parts[0]) == 4:
                assert finding.shape == "oriented_box"
                assert np.asarray(finding.parts[0]) * (WIDTH, HEIGHT) == pytest.approx(expected, abs=0.01)
                compared += 1
    assert compared > 30


def test_coco_boxes_are_those_of_supervision_and_pycocotools(phantoms, supervision):
    coco = pytest.importorskip("pycocotools.coco")
    path = phantoms / "coco" / "_annotations.coco.json"
    theirs = supervision.DetectionDataset.from_coco(str(path.parent), str(path))
    index = coco.COCO(str(path))
    listed = defaultdict(list)
    for annotation in index.loadAnns(index.getAnnIds()):
        x, y, w, h = annotation["bbox"]
        name = index.imgs[annotation["image_id"]]["file_name"]
        listed[name].append((index.cats[annotation["category_id"]]["name"], x, y, x + w, y + h))

    ours, _ = read_boxes(phantom_source(phantoms, "coco"))

    assert_same(ours, listed, tolerance=1e-6)
    assert_same(ours, supervision_boxes(theirs), tolerance=0.01)


def test_class_folders_are_those_of_supervision(phantoms, supervision):
    theirs = supervision.ClassificationDataset.from_folder_structure(str(phantoms / "class_folders"))
    listed = defaultdict(set)
    for path, found in theirs.annotations.items():
        listed[path.rsplit("/", 1)[-1]] |= {theirs.classes[class_id] for class_id in found.class_id}
    source = phantom_source(phantoms, "class_folders")
    ours = {
        item.path.name: {finding.label for finding in item.findings} | set(item.ignored)
        for item in READERS["class_folders"](source)
        if isinstance(item, ImageRecord)
    }

    assert ours == listed


@pytest.mark.parametrize("packed", [True, False], ids=["text", "list"])
def test_masks_have_the_box_and_the_area_that_pycocotools_gives_them(phantoms, tmp_path, mask_api, packed):
    images, annotations, truth = [], [], {}
    for number, phantom in enumerate(make_phantoms(40, seed=3)):
        images.append({"id": number, "file_name": f"{phantom.name}.jpg", "width": WIDTH, "height": HEIGHT})
        for finding in phantom.findings:
            points = [value for x, y in finding.parts[0] for value in (x * WIDTH, y * HEIGHT)]
            mask = mask_api.frPyObjects([points], HEIGHT, WIDTH)[0]
            flat = mask_api.decode(mask).flatten(order="F")
            changes = np.flatnonzero(np.diff(flat, prepend=0)).tolist()
            counts = mask["counts"].decode() if packed else np.diff([0, *changes, flat.size]).tolist()
            category = CONDITIONS.index(finding.label)
            segmentation = {"size": [HEIGHT, WIDTH], "counts": counts}
            truth[len(annotations)] = mask
            annotations.append(
                {"id": len(annotations), "image_id": number, "category_id": category, "segmentation": segmentation}
            )
    names = [{"id": number, "name": name} for number, name in enumerate(CONDITIONS)]
    document = {"images": images, "annotations": annotations, "categories": names}
    (tmp_path / "masks.json").write_text(json.dumps(document))
    classes = dict(zip(CONDITIONS, CONDITIONS, strict=True))
    source = Source(name="s", reader="coco", root=tmp_path, classes=classes, modality="panoramic")

    records = [item for item in read_coco(source) if isinstance(item, ImageRecord)]

    findings = {int(f.finding_id.split("#")[1]): f for record in records for f in record.findings}
    assert len(findings) == len(truth) > 30
    for number, mask in truth.items():
        left, top, width, height = mask_api.toBbox(mask)
        box = (left / WIDTH, top / HEIGHT, (left + width) / WIDTH, (top + height) / HEIGHT)
        assert findings[number].bounds == pytest.approx(box, abs=1e-9)
        area = sum(shoelace(ring) for ring in findings[number].parts) * WIDTH * HEIGHT
        assert area == pytest.approx(float(mask_api.area(mask)), abs=1e-6)


def shoelace(ring):
    xs, ys = np.asarray(ring).T
    return abs(np.dot(xs, np.roll(ys, -1)) - np.dot(ys, np.roll(xs, -1))) / 2


def test_dentex_gives_the_phantoms_truth_back(phantoms, tmp_path):
    """Quadrant, tooth and diagnosis of every finding, written as the challenge writes them."""
    images, annotations, truth = [], [], []
    for number, phantom in enumerate(make_phantoms(40, seed=3)):
        images.append({"id": number, "file_name": f"{phantom.name}.jpg", "width": WIDTH, "height": HEIGHT})
        for finding in phantom.findings:
            left, top, right, bottom = finding.bounds
            ids = int(finding.tooth[0]) - 1, int(finding.tooth[1]) - 1, CONDITIONS.index(finding.label)
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": number,
                    "bbox": [left * WIDTH, top * HEIGHT, (right - left) * WIDTH, (bottom - top) * HEIGHT],
                    **{f"category_id_{level}": value for level, value in enumerate(ids, 1)},
                }
            )
            truth.append((finding.label, finding.tooth))
    lists = ("1234", "12345678", CONDITIONS)
    document = {"images": images, "annotations": annotations}
    for level, names in enumerate(lists, 1):
        document[f"categories_{level}"] = [{"id": number, "name": name} for number, name in enumerate(names)]
    (tmp_path / "dentex.json").write_text(json.dumps(document))
    classes = dict(zip(CONDITIONS, CONDITIONS, strict=True))
    source = Source(name="s", reader="coco", root=tmp_path, classes=classes, modality="panoramic")

    records = [item for item in read_coco(source) if isinstance(item, ImageRecord)]

    assert [(f.label, f.tooth) for record in records for f in record.findings] == truth
    assert len(truth) > 30


# --- files of others -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_real_coco_boxes_are_those_of_supervision(third_party, supervision, split):
    folder = third_party / "cavity_photos_coco" / split
    dataset = supervision.DetectionDataset.from_coco(str(folder), str(folder / "_annotations.coco.json"))
    sizes = {
        image["file_name"]: (image["width"], image["height"])
        for image in json.loads((folder / "_annotations.coco.json").read_text())["images"]
    }
    theirs, outside = defaultdict(list), 0
    for name, boxes in supervision_boxes(dataset).items():
        width, height = sizes[name]
        for label, left, top, right, bottom in boxes:
            clipped = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
            inside = (clipped[2] - clipped[0]) * (clipped[3] - clipped[1])
            if clipped[3] > clipped[1] and inside >= 0.5 * (right - left) * (bottom - top):
                theirs[name].append((CAVITY[label], *clipped))
            else:
                outside += 1
    source = Source(name="s", reader="coco", root=folder, classes=CAVITY, modality="intraoral_photo")

    ours, problems = read_boxes(source)

    assert_same(ours, theirs, tolerance=0.01)
    assert outside == sum(problem.code == "outside_image" for problem in problems) == (split == "train")


def test_real_yolo_boxes_are_those_of_supervision(third_party, supervision, tmp_path):
    """On the panoramics that are there; supervision wants a data.yaml, which this set was published without."""
    root = third_party / "opg_pathology_yolo" / "Dental OPG XRAY Dataset" / "Original_Data"
    names = ["caries", "infection", "impacted_tooth", "fractured_tooth", "broken_down_crown_or_root", "healthy_tooth"]
    (tmp_path / "data.yaml").write_text(json.dumps({"names": names}))
    dataset = supervision.DetectionDataset.from_yolo(str(root), str(root), str(tmp_path / "data.yaml"))
    source = Source(name="s", reader="yolo", root=root, classes=dict(enumerate(names)), modality="panoramic")
    ours = defaultdict(list)
    for item in READERS["yolo"](source):
        if isinstance(item, ImageRecord) and item.path.is_file():
            width, height = read_size(item.path)
            for finding in item.findings:
                left, top, right, bottom = finding.bounds
                box = left * width, top * height, right * width, bottom * height
                ours[item.path.name].append((finding.label, *box))

    assert sum(map(len, ours.values())) > 50
    assert_same(ours, supervision_boxes(dataset), tolerance=0.05)
