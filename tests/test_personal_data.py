"""Signs of personal data in texts: what is found, and what dentists write all day and is none."""

import pytest

from data_builders.personal_data import find_personal_data


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("write to jane.roe@clinic.example", "e-mail address"),
        ("call (555) 010-4477", "phone number"),
        ("tel. +34 612 345 678", "phone number"),
        ("móvil 612 34 56 78", "phone number"),
        ("DOB: 12/03/1980", "date of birth"),
        ("born on March 3, 1980", "date of birth"),
        ("nacido el 3 de marzo de 1980", "date of birth"),
        ("MRN 0012345", "record number"),
        ("n.º de historia clínica: 99887", "record number"),
        ("078-05-1120", "social security number"),
        ("DNI 12345678Z", "identity number"),
        ("NIE X1234567L", "identity number"),
        ("referred by Dr. Smith", "name"),
        ("la Sra. López", "name"),
        ("Patient name: John Roe", "name"),
    ],
)
def test_personal_data_are_found_by_kind(text, kind):
    assert find_personal_data(["Pain on biting.", text]) == [kind]


@pytest.mark.parametrize(
    "text",
    [
        "Teeth 11 12 13 21 22 23 31 32 33 are missing.",
        "Probing 323 323 434 at 36, 5-6-7 mm at 46.",
        "45-year-old male, seen on 2024-05-06, blood pressure 120/80, HbA1c 7.2 %.",
        "Amoxicillin 500 mg, 3 times daily for 7 days; K02.9 on tooth #46.",
        "The dr said that mr and ms are titles.",
        "12345678A is no identity number: its letter is wrong.",
    ],
)
def test_teeth_depths_doses_and_dates_are_no_personal_data(text):
    assert find_personal_data([text]) == []
