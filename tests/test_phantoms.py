"""One truth, nine layouts: every reader must find the same things."""

import hashlib

import pytest

from data_builders.audit import read_source
from data_builders.dentition import fdi_region, region
from data_builders.phantom import CONDITIONS, make_phantom, make_phantoms
from data_builders.phantom_formats import FORMATS, write_phantoms
from data_builders.sources import load_sources

GEOMETRIC = [name for name in FORMATS if name not in {"teeth", "class_folders"}]


def read(phantoms, name):
    content = read_source(load_sources(phantoms / f"sources_{name}.yaml").sources[0], progress=False)
    return {record.path.stem: record for record in content.records}, content.problems


@pytest.mark.parametrize("name", GEOMETRIC)
def test_every_format_gives_the_truth_back(phantoms, name):
    records, problems = read(phantoms, name)

    assert not [problem for problem in problems if problem.severity == "error"]
    assert len(records) == 40
    for phantom in make_phantoms(40, seed=3):
        found = sorted((f.label, f.bounds) for f in records[phantom.name].findings)
        truth = sorted((f.label, f.bounds) for f in phantom.findings)
        assert [label for label, _ in found] == [label for label, _ in truth]
        for (_, bounds), (_, expected) in zip(found, truth, strict=True):
            assert bounds == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["yolo_obb", "dota"])
def test_a_turned_box_keeps_its_corners(phantoms, name):
    records, _ = read(phantoms, name)
    compared = 0
    for phantom in make_phantoms(40, seed=3):
        truth = {f.label: f for f in phantom.findings if f.label == "impacted_tooth"}
        found = [f for f in records[phantom.name].findings if f.label == "impacted_tooth"]
        if len(truth) == len(found) == 1 and len(found[0].parts[0]) == 4:
            for corner, expected in zip(found[0].parts[0], truth["impacted_tooth"].parts[0], strict=True):
                assert corner == pytest.approx(expected, abs=1e-4)
            compared += found[0].shape == "oriented_box"
    assert compared >= 3


def test_class_folders_give_the_labels_back(phantoms):
    records, _ = read(phantoms, "class_folders")

    for phantom in make_phantoms(40, seed=3):
        found = next(r for r in records.values() if r.path.stem == phantom.name)
        assert {f.label for f in found.findings} == {f.label for f in phantom.findings}


def test_the_teeth_layout_gives_every_erupted_tooth_its_number(phantoms):
    records, _ = read(phantoms, "teeth")

    for phantom in make_phantoms(40, seed=3):
        assert [f.tooth for f in records[phantom.name].findings] == [f.tooth for f in phantom.teeth]


def test_boxes_lie_in_the_region_of_their_tooth():
    """The drawing keeps what anatomy promises: right is on the image's left, canine to canine is anterior."""
    teeth = [tooth for phantom in make_phantoms(30, seed=5) for tooth in phantom.teeth]
    right = sum(region(tooth.bounds) == fdi_region(tooth.tooth) for tooth in teeth)

    assert len(teeth) > 800
    assert right / len(teeth) > 0.97


def test_a_phantom_depends_on_seed_and_index_alone(tmp_path):
    alone = make_phantom(7, 11)
    among = list(make_phantoms(12, seed=7))[11]

    assert alone.findings == among.findings
    assert alone.image.tobytes() == among.image.tobytes()
    assert make_phantom(8, 11).image.tobytes() != alone.image.tobytes()


def test_the_same_seed_writes_the_same_files(tmp_path):
    for name in ("a", "b"):
        write_phantoms(tmp_path / name, count=5, cases=5, seed=1, progress=False)

    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_every_condition_is_drawn():
    drawn = [finding.label for phantom in make_phantoms(200, seed=0) for finding in phantom.findings]

    assert all(drawn.count(condition) > 20 for condition in CONDITIONS)
    assert any(not phantom.findings for phantom in make_phantoms(20, seed=0))


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(path.relative_to(folder).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]
