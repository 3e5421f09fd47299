"""Sources whose findings a detector made: confidence is kept, doubt is counted, and nothing is ever denied."""

import json

import pytest
from PIL import Image
from pydantic import ValidationError

from data_builders.readers import READERS
from data_builders.records import ImageRecord, Problem
from data_builders.sources import Source, SourcesError, load_sources


def read(root, reader, **keys):
    classes = {0: "caries", "decay": "caries"}
    source = Source(
        name="s", reader=reader, root=root, classes=classes, modality="panoramic", **{"origin": "model", **keys}
    )
    items = list(READERS[reader](source))
    return [i for i in items if isinstance(i, ImageRecord)], [i for i in items if isinstance(i, Problem)]


def read_lines(root, text, **keys):
    Image.new("L", (20, 10)).save(root / "a.png")
    (root / "a.txt").write_text(text)
    (record,), problems = read(root, "yolo", **keys)
    return record, problems


@pytest.mark.parametrize(
    ("line", "shape", "confidence"),
    [
        pytest.param("0 0.5 0.5 0.2 0.4 0.87", "box", 0.87, id="box"),
        pytest.param("0 0.4 0.3 0.6 0.3 0.6 0.7 0.4 0.7 0.5", "oriented_box", 0.5, id="oriented box"),
        pytest.param("0 0.4 0.3 0.6 0.3 0.6 0.7 0.25", "polygon", 0.25, id="triangle"),
        pytest.param("0 0.5 0.5 0.2 0.4", "box", None, id="none stated"),
        pytest.param("0 0.5 0.5 0.2 0.4 1", "box", 1.0, id="certain"),
    ],
)
def test_the_last_number_of_a_line_is_the_confidence(tmp_path, line, shape, confidence):
    record, problems = read_lines(tmp_path, line)

    (finding,) = record.findings
    assert (finding.shape, finding.origin, finding.confidence) == (shape, "model", confidence)
    assert problems == []


def test_findings_below_the_threshold_are_left_out_and_counted_once(tmp_path):
    lines = [f"0 0.5 0.5 0.2 0.4 {confidence}" for confidence in (0.1, 0.49, 0.5, 0.9)] + ["0 0.5 0.5 0.2 0.4"]

    record, problems = read_lines(tmp_path, "\n".join(lines), min_confidence=0.5)

    assert [finding.confidence for finding in record.findings] == [0.5, 0.9]
    assert [(problem.code, problem.severity) for problem in problems] == [("below_min_confidence", "info")]
    assert "2 findings below it, 1 findings without a confidence" in problems[0].message


@pytest.mark.parametrize("value", ["7", "-0.1", "1.01"])
def test_a_track_id_is_no_confidence(tmp_path, value):
    record, problems = read_lines(tmp_path, f"0 0.5 0.5 0.2 0.4 {value}")

    assert record.findings == ()
    assert [(problem.code, problem.line) for problem in problems] == [("bad_confidence", 1)]


def test_people_have_no_confidence(tmp_path):
    record, problems = read_lines(tmp_path, "0 0.5 0.5 0.2 0.4 0.87", origin="human")

    (finding,) = record.findings
    assert (finding.origin, finding.confidence) == ("human", None)
    assert [problem.code for problem in problems] == ["extra_field"]


@pytest.mark.parametrize(
    ("score", "confidence", "codes"),
    [(0.75, 0.75, []), (None, None, []), ("high", None, ["bad_confidence"]), (3, None, ["bad_confidence"])],
)
def test_a_coco_score_is_the_confidence(tmp_path, score, confidence, codes):
    found = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 2, 5, 5], "score": score}
    image = {"id": 1, "file_name": "a.png", "width": 20, "height": 10}
    document = {"images": [image], "annotations": [found], "categories": [{"id": 1, "name": "decay"}]}
    Image.new("L", (20, 10)).save(tmp_path / "a.png")
    (tmp_path / "a.json").write_text(json.dumps(document))

    (record,), problems = read(tmp_path, "coco")

    assert [finding.confidence for finding in record.findings] == ([] if codes else [confidence])
    assert [problem.code for problem in problems] == codes
    (record,), problems = read(tmp_path, "coco", origin="human")
    assert [(finding.origin, finding.confidence) for finding in record.findings] == [("human", None)]
    assert [(problem.code, problem.severity) for problem in problems] == [("extra_field", "info")]


def test_class_folders_of_a_classifier_are_its_findings(tmp_path):
    (tmp_path / "decay").mkdir()
    Image.new("L", (20, 10)).save(tmp_path / "decay" / "a.png")

    (record,), _ = read(tmp_path, "class_folders")

    assert [finding.origin for finding in record.findings] == ["model"]


def test_a_detectors_silence_is_no_no(tmp_path):
    path = tmp_path / "sources.yaml"
    path.write_text(
        "sources: [{name: s, reader: yolo, root: ., classes: {0: caries}, modality: panoramic, "
        "origin: model, exhaustive: [caries]}]"
    )

    with pytest.raises(SourcesError, match="`exhaustive` does not go with `origin: model`"):
        load_sources(path)
    with pytest.raises(ValidationError, match="exhaustive"):
        read(tmp_path, "yolo", exhaustive=("caries",))
