"""Numbers, sides and regions against published tables and real boxes."""

import pytest

from data_builders.dentition import (
    PERMANENT,
    arch_middle,
    fdi_region,
    parse_fdi,
    parse_tooth_type,
    region,
    side,
    tooth_type,
    universal,
)
from data_builders.readers import read_yolo
from data_builders.records import ImageRecord
from data_builders.sources import Source


@pytest.mark.parametrize(
    ("fdi", "number"),
    [("18", 1), ("11", 8), ("21", 9), ("28", 16), ("38", 17), ("31", 24), ("41", 25), ("48", 32)],
)
def test_universal_numbers_are_those_of_the_ada_chart(fdi, number):
    assert universal(fdi) == number


def test_universal_numbers_are_1_to_32():
    assert sorted(map(universal, PERMANENT)) == list(range(1, 33))


@pytest.mark.parametrize("text", ["36", "3.6", "tooth_36", "#36"])
def test_fdi_is_read_as_people_write_it(text):
    assert parse_fdi(text) == "36"


@pytest.mark.parametrize("text", ["19", "96", "5", "", "first molar", "3636"])
def test_what_is_no_fdi_number_is_refused(text):
    with pytest.raises(ValueError, match="FDI"):
        parse_fdi(text)


@pytest.mark.parametrize("text", ["3rd Molar", "third-molar", "Third Molars", "third_molar"])
def test_tooth_types_are_read_as_people_write_them(text):
    assert parse_tooth_type(text) == "third_molar"


def test_a_deciduous_molar_has_no_permanent_type():
    assert tooth_type("53") == "canine"
    with pytest.raises(ValueError, match="54"):
        tooth_type("54")


def test_the_left_of_the_image_is_the_patients_right():
    assert region((0.1, 0.6, 0.2, 0.8)) == "right_mandibular"
    assert fdi_region("48") == "right_mandibular"


def test_a_box_over_both_sides_is_bilateral():
    assert side((0.2, 0.3, 0.8, 0.5)) == "bilateral"
    assert region((0.2, 0.3, 0.8, 0.4)) == "bilateral_maxillary"
    assert side((0.495, 0.3, 0.509, 0.5)) == "midline"


def test_the_region_rule_holds_on_real_fdi_boxes(third_party):
    """Measured on 4,629 boxes by others; the thresholds are those of the anatomy fact sheet."""
    root = third_party / "ufba_teeth_yolo/Dataset/yolo_train_dataset"
    source = Source(name="ufba", reader="yolo", root=root, classes="fdi", modality="panoramic")
    right = {"region": 0, "jaw": 0, "side": 0}
    total = 0
    for record in read_yolo(source):
        if isinstance(record, ImageRecord):
            middle = arch_middle(record.findings)
            for finding in record.findings:
                expected, found = fdi_region(finding.tooth), region(finding.bounds, middle)
                total += 1
                right["region"] += expected == found
                right["jaw"] += expected.split("_")[1] == found.split("_")[1]
                center = (finding.bounds[0] + finding.bounds[2]) / 2
                right["side"] += (center < 0.5) == (finding.tooth[0] in "14")
    shares = {name: count / total for name, count in right.items()}

    assert total == 4629
    assert shares["region"] >= 0.93
    assert shares["jaw"] >= 0.99
    assert shares["side"] >= 0.97
