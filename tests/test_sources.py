"""The sources file: what is refused, in one sentence, before anything is read."""

import pytest
import yaml

from data_builders.readers import read_yolo
from data_builders.records import ImageRecord
from data_builders.sources import SourcesError, load_sources, load_vocabulary

IMAGES = {"name": "s", "reader": "yolo", "root": ".", "modality": "panoramic", "classes": {0: "caries"}}
CASES = {"name": "s", "reader": "cases", "root": "."}
TERM = {
    "kind": "pathology",
    "en": {"one": "odd thing", "other": "odd things", "condition": "an odd thing"},
    "es": {"one": "cosa rara", "other": "cosas raras", "condition": "una cosa rara", "gender": "f"},
}


def write(folder, source, **keys):
    path = folder / "sources.yaml"
    path.write_text(yaml.safe_dump({"sources": [source], **keys}))
    return path


@pytest.mark.parametrize("sources", ["5", "true", "caries", "{name: s}", "[5]", "[[]]", "null", "[]"])
def test_sources_that_are_no_list_of_sources_get_one_sentence(tmp_path, sources):
    (tmp_path / "sources.yaml").write_text(f"sources: {sources}\n")

    with pytest.raises(SourcesError, match=r"sources\.yaml: sources"):
        load_sources(tmp_path / "sources.yaml")


@pytest.mark.parametrize(
    ("base", "key", "value"),
    [
        pytest.param(IMAGES, "min_confidence", 0.5, id="people state no confidence"),
        pytest.param(IMAGES, "condition_line", "PATIENT", id="images have no prompt"),
        pytest.param(IMAGES, "synonyms", {"caries": ["decay"]}, id="synonyms of a condition"),
        pytest.param(IMAGES, "diagnosis_in_prompt", "mask", id="diagnosis in a prompt"),
        pytest.param(IMAGES, "pii", "off", id="texts are searched"),
        pytest.param(IMAGES, "label_attribute", "name", id="YOLO has no attributes"),
        pytest.param(IMAGES, "attributes", {"grade": "severity"}, id="nor grades"),
        pytest.param(IMAGES, "annotations", "*.json", id="YOLO reads label files"),
        pytest.param(IMAGES | {"reader": "coco"}, "labels", "labels", id="COCO has no label files"),
        pytest.param(CASES, "modality", "panoramic", id="cases are no images"),
        pytest.param(CASES, "classes", {0: "caries"}, id="nor have they classes"),
        pytest.param(CASES, "group", {"pattern": "^(?P<patient>.)"}, id="nor files of patients"),
    ],
)
def test_a_key_without_effect_is_refused_and_named(tmp_path, base, key, value):
    load_sources(write(tmp_path, base))

    with pytest.raises(SourcesError, match=f"'{key}' has no effect with"):
        load_sources(write(tmp_path, base | {key: value}))


def test_a_vocabulary_may_lie_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "own.yaml").write_text(yaml.safe_dump({"odd_thing": TERM}))

    assert "odd_thing" in load_sources(write(tmp_path, IMAGES, vocabulary="~/own.yaml")).terms()


def test_a_vocabulary_that_was_edited_is_read_again(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({"odd_thing": TERM}))
    first = load_vocabulary(path)
    path.write_text(yaml.safe_dump({"odd_thing": TERM | {"icd10cm": "K08.9"}}))

    assert load_vocabulary(path)["odd_thing"].icd10cm == "K08.9"
    assert first["odd_thing"].icd10cm is None
    assert load_vocabulary(path) is load_vocabulary(path)


def read_labels(folder, classes, names=None):
    (folder / "a.txt").write_text("0 .5 .5 .1 .1\n1 .2 .5 .1 .1\n")
    (folder / "a.png").write_bytes(b"")
    if names:
        (folder / "data.yaml").write_text(yaml.safe_dump({"names": names}))
    (source,) = load_sources(write(folder, IMAGES | {"classes": classes})).sources
    items = list(read_yolo(source))
    labels = [finding.label for item in items if isinstance(item, ImageRecord) for finding in item.findings]
    return labels, [str(item) for item in items if not isinstance(item, ImageRecord)]


def test_quoted_numbers_are_names_where_names_are_given(tmp_path):
    """Names that are numbers, in another order than the ids: read as ids they would be the other class."""
    labels, problems = read_labels(tmp_path, {"0": "caries", "1": "infection"}, names=["1", "0"])

    assert (labels, problems) == (["infection", "caries"], [])


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        pytest.param({"0": "caries", "1": "infection"}, "classes are given by name ('0': caries, '1': inf", id="all"),
        pytest.param(
            {"0": "caries", 1: "infection"}, "lacks 0. Labels present: 0 (1), 1 (1). The map: '0': ", id="one"
        ),
    ],
)
def test_a_quoted_id_is_no_id_and_the_message_shows_the_quotes(tmp_path, classes, message):
    _, problems = read_labels(tmp_path, classes)

    assert message in problems[-1]


def test_an_item_that_is_wrong_is_not_said_to_be_missing_as_well(tmp_path):
    path = tmp_path / "sources.yaml"
    path.write_text("sources:\n- {name: s, reader: yollo, root: .}\n")

    with pytest.raises(SourcesError) as caught:
        load_sources(path)
    assert "sources.0.reader: Input should be" in str(caught.value)
    assert "at least 1 item" not in str(caught.value)
    path.write_text("sources: []\n")
    with pytest.raises(SourcesError, match="sources: Tuple should have at least 1 item"):
        load_sources(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty: expected keys and values"),
        ("# nothing yet\n", "is empty: expected keys and values"),
        ("- a\n", "expected keys and values, got a list"),
        ("caries\n", "expected keys and values, got one text"),
    ],
)
def test_what_is_no_mapping_is_said_in_plain_words(tmp_path, text, message):
    path = tmp_path / "sources.yaml"
    path.write_text(text)

    with pytest.raises(SourcesError, match=message):
        load_sources(path)
