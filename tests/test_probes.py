import hashlib
import io
import json
import subprocess
import sys
from collections import Counter

import pytest
from PIL import Image

from data_builders.chat import answer_messages, prompt_messages
from data_builders.dataset_folder import BuildError, write_jsonl, write_rows
from data_builders.dentition import fdi_region
from data_builders.images import measure
from data_builders.phantom import make_phantom
from data_builders.phantom_formats import write_phantoms
from data_builders.probes import HEALTHY, build_probe
from data_builders.sources import load_sources
from data_builders.vqa import build_vqa

OPG = ("caries", "impacted_tooth", "infection", "fractured_tooth")
PHANTOMS, SEED = 60, 5


def record(number, findings, *, exhaustive=OPG, modality="panoramic", locations=True, split="test", image_id=None):
    """What the builder writes of an image; `findings` are pairs of label and region."""
    return {
        "image_id": image_id or hashlib.sha256(str(number).encode()).hexdigest(),
        "source": f"source{number % 2}",
        "modality": modality,
        "split": split,
        "group_id": f"group{number}",
        "width": 8,
        "height": 8,
        "locations": locations,
        "exhaustive": list(exhaustive),
        "findings": [
            {"finding_id": f"{number}/{i}", "label": label, "region": region, "origin": "human"}
            for i, (label, region) in enumerate(findings)
        ],
    }


def write_dataset(folder, records):
    """A dataset folder whose rows only show the images; each image is one colour."""
    folder.mkdir()
    row = {"prompt": prompt_messages("?"), "completion": answer_messages("!"), "license": None, "language": "en"}
    rows = {}
    for entry in records:
        ids = {key: entry[key] for key in ("image_id", "group_id", "source")}
        own = {"row_id": entry["image_id"], "question_type": "findings", "claims": "{}", "images": [entry["image_id"]]}
        rows.setdefault(entry["split"], []).append(row | ids | own)
    write_rows(folder, rows, lambda image_id: (f"{image_id[:16]}.png", png(image_id)))
    write_jsonl(folder / "records.jsonl", records)
    return folder


def png(image_id):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), f"#{image_id[:6]}").save(buffer, "png")
    return buffer.getvalue()


def probe(folder, records, **settings):
    dataset = write_dataset(folder / "dataset", records)
    build_probe(dataset, "test", folder / "probe.jsonl", **settings)
    return read(folder / "probe.jsonl")


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder / "files", count=PHANTOMS, seed=SEED, formats=["yolo"], progress=False)
    build_vqa(load_sources(folder / "files/sources.yaml"), folder / "dataset", progress=False)
    build_probe(folder / "dataset", "train", folder / "probe.jsonl", languages=("en", "es"))
    return folder


def test_a_disease_is_asked_for_beside_three_that_the_annotations_rule_out(tmp_path):
    (item,) = probe(tmp_path, [record(1, [("infection", None)] * 2, modality="periapical")])

    assert "periapical radiograph" in item["question"]
    assert item["options"][item["answer"]] == "Periapical infection."
    assert set(item["options"].values()) == {
        "Periapical infection.",
        "Caries.",
        "An impacted tooth.",
        "A fractured tooth.",
    }
    assert (item["question_type"], item["finding"], item["source"]) == ("diagnosis", "infection", "source1")


def test_a_region_is_asked_for_where_a_disease_is_there_once(tmp_path):
    items = probe(tmp_path, [record(1, [("caries", "left_maxillary"), ("infection", "right_mandibular")])])

    right = {item["finding"]: item["options"][item["answer"]] for item in items}
    assert right == {"caries": "In the left maxillary region.", "infection": "In the right mandibular region."}
    assert all(len(set(item["options"].values())) == 4 for item in items)


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(record(1, [("caries", None)], exhaustive=OPG[:3]), id="absence of two only may be stated"),
        pytest.param(record(1, [("caries", None), ("infection", None)]), id="two kinds of disease"),
        pytest.param(record(1, []), id="no disease"),
        pytest.param(record(1, [("caries", "left_maxillary")] * 2, exhaustive=()), id="a disease twice"),
        pytest.param(record(1, [("caries", "bilateral_maxillary")], exhaustive=()), id="on both sides"),
        pytest.param(record(1, [("filling", "left_maxillary")]), id="no pathology"),
        pytest.param(record(1, [("caries", "left_maxillary")], exhaustive=(), locations=False), id="a flipped image"),
        pytest.param(
            record(1, [("caries", "left_maxillary")], exhaustive=(), modality="intraoral_photo"), id="a photo"
        ),
    ],
)
def test_nothing_is_asked_that_the_annotations_do_not_settle(tmp_path, entry):
    with pytest.raises(BuildError, match="nothing can be asked about split 'test': a question needs an image with"):
        probe(tmp_path, [entry])


def test_a_narrower_name_of_the_same_disease_is_no_wrong_answer(tmp_path):
    entry = record(1, [("deep_caries", None)], exhaustive=(*OPG, "deep_caries"), modality="bitewing")

    (item,) = probe(tmp_path, [entry])

    assert "Caries." not in item["options"].values()


def test_two_sources_of_one_picture_are_judged_together(tmp_path):
    one = record(1, [("caries", None)], modality="bitewing")
    two = record(2, [("bone_loss", None)], modality="bitewing", exhaustive=(), image_id=one["image_id"])

    with pytest.raises(BuildError, match="nothing can be asked"):
        probe(tmp_path, [one, two])


def test_the_right_option_is_what_the_phantom_was_drawn_with(phantoms):
    truth = {
        measure(path).image_id: make_phantom(SEED, int(path.stem.removeprefix("phantom"))).findings
        for path in (phantoms / "files/images").iterdir()
    }
    words = {"caries": "Caries.", "infection": "Periapical infection.", "impacted_tooth": "An impacted tooth."}
    words["broken_down_crown_or_root"] = "A broken-down crown or root."
    agree = []
    for item in read(phantoms / "probe.jsonl"):
        findings, right = truth[item["image_id"]], item["options"][item["answer"]]
        if item["language"] == "en" and item["question_type"] == "diagnosis":
            assert {words[finding.label] for finding in findings} == {right}
        elif item["language"] == "en" and item["question_type"] == "screening":
            assert {words[finding.label] for finding in findings} == {right} - {"No sign of disease."}
        elif item["language"] == "en":
            (finding,) = (finding for finding in findings if finding.label == item["finding"])
            agree.append(fdi_region(finding.tooth).replace("_", " ") in right)
    assert len(agree) > 30
    assert sum(agree) / len(agree) > 0.9  # boxes near the border of two regions may fall on its other side


def test_each_letter_is_the_right_one_equally_often(phantoms):
    for question_type in ("diagnosis", "location", "screening"):
        items = [item for item in read(phantoms / "probe.jsonl") if item["question_type"] == question_type]
        keys = Counter(item["answer"] for item in items)
        assert set(keys) == set("ABCD")
        assert max(keys.values()) - min(keys.values()) <= 2  # one question more, in two languages


def test_english_and_spanish_ask_the_same_with_the_same_key(phantoms):
    pairs = {}
    for item in read(phantoms / "probe.jsonl"):
        pairs.setdefault(item["pair_id"], {})[item["language"]] = item

    regions = {"In the right maxillary region.": "En la región maxilar derecha."}
    for pair in pairs.values():
        english, spanish = pair["en"], pair["es"]
        assert (english["answer"], english["image"]) == (spanish["answer"], spanish["image"])
        assert list(english["options"]) == list(spanish["options"]) == list("ABCD")
        assert english["question"] != spanish["question"]
        for letter, text in english["options"].items():
            assert spanish["options"][letter] == regions.get(text, spanish["options"][letter])


def test_images_lie_beside_the_questions_with_their_original_bytes(phantoms):
    originals = {path.read_bytes() for path in (phantoms / "files/images").iterdir()}

    for item in read(phantoms / "probe.jsonl"):
        path = phantoms / item["image"]
        assert path.read_bytes() in originals
        assert measure(path).image_id == item["image_id"]


def test_the_same_seed_writes_the_same_bytes_and_another_seed_other_keys(phantoms, tmp_path):
    for name, seed in (("same", 0), ("other", 1)):
        build_probe(phantoms / "dataset", "train", tmp_path / f"{name}/probe.jsonl", languages=("en", "es"), seed=seed)

    first, same, other = (path / "probe.jsonl" for path in (phantoms, tmp_path / "same", tmp_path / "other"))
    assert same.read_bytes() == first.read_bytes()
    one, two = ([i["item_id"] for i in read(path) if i["question_type"] != "screening"] for path in (first, other))
    assert one == two  # a screening draws the images too
    assert [item["answer"] for item in read(other)] != [item["answer"] for item in read(first)]


def test_another_image_changes_no_other_images_options(tmp_path):
    records = [record(number, [("caries", "left_maxillary")]) for number in range(6)]
    (tmp_path / "few").mkdir()
    (tmp_path / "more").mkdir()

    few = {item["item_id"]: item for item in probe(tmp_path / "few", records[:5])}
    more = {item["item_id"]: item for item in probe(tmp_path / "more", records)}

    assert few.keys() < more.keys()
    for item_id, item in few.items():
        assert more[item_id]["question"] == item["question"]
        assert set(more[item_id]["options"].values()) == set(item["options"].values())


def test_each_letter_says_what_it_states_in_labels_or_regions(phantoms):
    words = {"caries": "Caries.", "left_mandibular": "In the left mandibular region.", HEALTHY: "No sign of disease."}
    items = [item for item in read(phantoms / "probe.jsonl") if item["language"] == "en"]

    seen = Counter()
    for item in items:
        assert list(item["option_values"]) == list(item["options"])
        assert item["categories"] == [item["finding"]]
        if item["question_type"] != "location":
            assert item["option_values"][item["answer"]] == item["finding"]
        for letter, value in item["option_values"].items():
            if value in words:
                seen[value] += 1
                assert item["options"][letter] == words[value]
    assert set(seen) == set(words)


def test_no_sign_of_disease_is_right_in_exactly_every_second_screening(phantoms):
    """On as many images it is a wrong option as it is the right one, so that it gives nothing away."""
    items = [item for item in read(phantoms / "probe.jsonl") if item["question_type"] == "screening"]
    right = [item for item in items if item["option_values"][item["answer"]] == HEALTHY]

    assert len(right) >= 6
    assert len(items) == 2 * len(right)
    assert all(list(item["option_values"].values()).count(HEALTHY) == 1 for item in items)
    assert not {item["image_id"] for item in right} & {item["image_id"] for item in items if item not in right}


def test_healthy_is_only_an_image_whose_every_source_shows_no_disease(tmp_path):
    sick = record(2, [("caries", None)], modality="bitewing")
    free, unread = record(4, [], modality="bitewing"), record(6, [], modality="bitewing", exhaustive=OPG[:2])
    shared = record(8, [], modality="bitewing")
    elsewhere = record(9, [("bone_loss", None)], modality="bitewing", exhaustive=(), image_id=shared["image_id"])

    items = probe(tmp_path, [sick, free, unread, shared, elsewhere], question_types=["screening"])

    assert {item["image_id"]: item["finding"] for item in items} == {
        sick["image_id"]: "caries",
        free["image_id"]: HEALTHY,
    }
    assert {item["option_values"][item["answer"]] for item in items} == {"caries", HEALTHY}


def test_healthy_and_diseased_images_of_different_sources_are_not_put_side_by_side(tmp_path):
    """The kind of picture would tell them apart."""
    records = [record(2, [("caries", None)], modality="bitewing"), record(3, [], modality="bitewing")]

    with pytest.raises(BuildError, match="images with and without disease from one source"):
        probe(tmp_path, records, question_types=["screening"])


def test_screening_changes_nothing_about_the_other_questions(phantoms, tmp_path):
    build_probe(
        phantoms / "dataset",
        "train",
        tmp_path / "probe.jsonl",
        languages=("en", "es"),
        question_types=("diagnosis", "location"),
    )

    others = [item for item in read(phantoms / "probe.jsonl") if item["question_type"] != "screening"]
    assert read(tmp_path / "probe.jsonl") == others


def test_questions_of_one_modality_and_of_chosen_findings(tmp_path):
    opg = record(1, [("caries", "left_maxillary"), ("infection", "right_mandibular")])
    photo = record(2, [("caries", None)], modality="intraoral_photo")

    (tmp_path / "photo").mkdir()
    (tmp_path / "finding").mkdir()
    photos = probe(tmp_path / "photo", [opg, photo], modalities=["intraoral_photo"])
    infections = probe(tmp_path / "finding", [opg, photo], findings=["infection"])

    assert {item["image_id"] for item in photos} == {photo["image_id"]}
    assert {(item["image_id"], item["finding"]) for item in infections} == {(opg["image_id"], "infection")}


def test_a_maximum_per_finding_and_a_limit_are_spread_over_the_findings_in_whole_pairs(phantoms, tmp_path):
    settings = {"languages": ("en", "es"), "question_types": ("diagnosis", "location")}
    build_probe(phantoms / "dataset", "train", tmp_path / "two.jsonl", per_finding=2, **settings)
    build_probe(phantoms / "dataset", "train", tmp_path / "fifty.jsonl", limit=50, languages=("en", "es"))
    build_probe(phantoms / "dataset", "train", tmp_path / "odd.jsonl", limit=25, languages=("en", "es"))

    two, fifty, odd = (read(tmp_path / f"{name}.jsonl") for name in ("two", "fifty", "odd"))
    each = Counter((item["question_type"], item["finding"], item["language"]) for item in two)
    assert max(each.values()) == 2
    assert (len(fifty), len(odd)) == (50, 24)
    assert set(Counter(item["pair_id"] for item in fifty).values()) == {2}
    located = Counter(item["finding"] for item in fifty if item["question_type"] == "location")
    assert max(located.values()) - min(located.values()) <= 2  # one question more, in two languages
    keys = Counter(item["answer"] for item in fifty if item["question_type"] == "location")
    assert max(keys.values()) - min(keys.values()) <= 2
    screening = Counter(item["finding"] == HEALTHY for item in fifty if item["question_type"] == "screening")
    assert screening[True] == screening[False] > 0


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"modalities": ["mri"]}, "no modality 'mri'; choose among panoramic"),
        ({"findings": ["cariez"]}, "no finding 'cariez'; choose among bone_loss, "),
        ({"findings": ["caries", "calculus"]}, r"nothing can be asked about split 'test' \(calculus\)"),
        ({"question_types": ["severity"]}, "no question type 'severity'; choose among diagnosis, location, screening"),
        ({"languages": ("en", "es"), "limit": 1}, "limit 1 leaves no question in each of 2 languages"),
        ({"per_finding": 0}, "per_finding 0"),
    ],
)
def test_a_choice_that_leaves_nothing_is_an_error(tmp_path, settings, reason):
    with pytest.raises(BuildError, match=reason):
        probe(tmp_path, [record(1, [("caries", "left_maxillary")])], **settings)


def test_wrong_use_is_answered_with_what_to_do(tmp_path):
    dataset = write_dataset(tmp_path / "dataset", [record(1, [("caries", None)], split="train")])
    own = write_dataset(tmp_path / "own", [record(1, [("tongue_tie", None)])])
    out = tmp_path / "probe.jsonl"

    with pytest.raises(BuildError, match="is no VQA dataset folder; build one with `dentalgemma build`"):
        build_probe(tmp_path, "test", out)
    with pytest.raises(BuildError, match="no image in split 'test'; choose among train"):
        build_probe(dataset, "test", out)
    with pytest.raises(BuildError, match="no language 'fr'; choose among en, es"):
        build_probe(dataset, "train", out, languages=("fr",))
    with pytest.raises(BuildError, match="'tongue_tie' is not in the vocabulary"):
        build_probe(own, "test", out)
    assert not out.exists()


def test_an_own_vocabulary_words_its_findings(tmp_path):
    """The builder leaves it in the dataset folder, so that nobody has to name it again."""
    names = "{one: tongue tie, other: tongue ties, condition: a tongue tie, gender: f}"
    dataset = write_dataset(tmp_path / "dataset", [record(1, [("tongue_tie", None)], modality="bitewing")])
    (dataset / "vocabulary.yaml").write_text(f"tongue_tie:\n  kind: pathology\n  en: {names}\n  es: {names}\n")
    build_probe(dataset, "test", tmp_path / "probe.jsonl")
    (item,) = read(tmp_path / "probe.jsonl")

    assert item["options"][item["answer"]] == "A tongue tie."


def test_probes_load_without_torch():
    code = "import sys, data_builders.probes; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"

    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_detectors_findings_are_no_key(tmp_path):
    found, detected = record(1, [("caries", "left_maxillary")]), record(2, [("caries", "left_maxillary")])
    detected["findings"][0]["origin"] = "model"
    write_dataset(tmp_path / "d", [found, detected])
    build_probe(tmp_path / "d", "test", tmp_path / "probe.jsonl")
    items = [json.loads(line) for line in (tmp_path / "probe.jsonl").read_text().splitlines()]

    assert {item["image_id"] for item in items} == {found["image_id"]}
