"""The dataset folder: reproducible to the byte, images once, nothing leaked, nothing half-written."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from PIL import Image

from data_builders.audit import audit
from data_builders.claims import claims_from_json
from data_builders.dataset_folder import BuildError
from data_builders.proof import check_row
from data_builders.records import record_from_json
from data_builders.sources import SourcesError, load_sources, load_vocabulary
from data_builders.vqa import build_vqa

HEAD = "questions: {cap: 1}\nsources:\n"
ABOUT_FINDINGS = "families: [diagnosis, findings, location, presence, structured_report]\n"


def build(sources, out, **options):
    return build_vqa(load_sources(sources), out, progress=False, **options)


def digest(folder):
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files(folder)}


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def yolo_source(folder, lines, *, extra=""):
    """A YOLO source of three drawn pictures whose label files hold `lines`."""
    for number in range(3):
        (folder / "images").mkdir(parents=True, exist_ok=True)
        (folder / "labels").mkdir(exist_ok=True)
        Image.new("L", (40, 20), 60 * number).save(folder / "images" / f"p{number}.png")
        (folder / "labels" / f"p{number}.txt").write_text(lines)
    # Three pictures with the same answer are no test of balancing: the cap is lifted.
    text = (
        f"{HEAD}  - {{name: s, reader: yolo, root: ., modality: panoramic, "
        f"classes: {{0: caries, 1: infection}}, exhaustive: [caries, infection]{extra}}}\n"
    )
    (folder / "sources.yaml").write_text(text)
    return folder / "sources.yaml"


def test_the_folder_loads_as_datasets_and_trl_expect(vqa_dataset):
    dataset = load_dataset(str(vqa_dataset))
    row = dataset["train"][0]

    assert set(dataset) == {"train", "validation", "test"}
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    assert [message["role"] for message in row["completion"]] == ["assistant"]
    assert row["images"][0].size == (448, 224)
    assert row["license"] == "Apache-2.0"
    assert json.loads(row["claims"])["schema_version"] == 2


@pytest.mark.parametrize(("hash_seed", "workers"), [("1", 1), ("2", 3)])
def test_rows_do_not_depend_on_hash_seed_or_workers(phantoms, vqa_dataset, tmp_path, hash_seed, workers):
    command = [
        sys.executable,
        "-m",
        "dentalgemma",
        "build",
        str(phantoms / "sources.yaml"),
        "--out",
        str(tmp_path / "b"),
    ]
    subprocess.run(
        [*command, "--workers", str(workers), "--json"],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        check=True,
        capture_output=True,
    )

    assert digest(tmp_path / "b") == digest(vqa_dataset)


def test_another_seed_asks_otherwise(phantoms, vqa_dataset, tmp_path):
    build(phantoms / "sources.yaml", tmp_path / "b", seed=99)

    assert digest(tmp_path / "b")["records.jsonl"] != digest(vqa_dataset)["records.jsonl"]


def test_each_image_is_stored_once_with_its_original_bytes(phantoms, vqa_dataset):
    stored = b"".join(path.read_bytes() for path in files(vqa_dataset) if path.suffix == ".parquet")
    originals = [path.read_bytes() for path in (phantoms / "images").glob("*.jpg")]
    rows = sum(pq.read_metadata(path).num_rows for path in vqa_dataset.rglob("*.parquet"))

    assert rows > 3 * len(originals)
    # Compressed pages hold JPEG bytes verbatim or not at all: the size tells whether they are there twice.
    assert len(stored) < 1.3 * sum(map(len, originals))
    table = pq.read_table(vqa_dataset / "data").to_pylist()
    assert {row["images"][0]["bytes"] for row in table} <= set(originals)


def test_images_carry_no_file_names(vqa_dataset):
    table = pq.read_table(vqa_dataset / "data").to_pylist()

    assert all(row["images"][0]["path"] == row["image_id"][:16] + ".jpg" for row in table)
    assert not any(b"phantom000" in path.read_bytes() for path in files(vqa_dataset))


def test_no_image_and_no_group_is_in_two_splits(vqa_dataset):
    dataset = load_dataset(str(vqa_dataset))

    for column in ("image_id", "group_id"):
        owners = [set(rows[column]) for rows in dataset.values()]
        assert not any(a & b for i, a in enumerate(owners) for b in owners[i + 1 :])


def test_every_row_is_proven_again_from_the_written_records(vqa_dataset):
    """What stands in the folder suffices to check the folder."""
    lines = [json.loads(line) for line in (vqa_dataset / "records.jsonl").read_text().splitlines()]
    records = {(line["source"], line["image_id"]): record_from_json(line) for line in lines}
    rows = pq.read_table(vqa_dataset / "data").to_pylist()

    assert len(rows) > 100
    for row in rows:
        assert check_row(row, records[row["source"], row["image_id"]], load_vocabulary()) == []
    others = [record for record in records.values() if record.image_id != rows[0]["image_id"]]
    assert any(check_row(rows[0], record, load_vocabulary()) for record in others)


def test_yes_and_no_are_equally_frequent_for_every_condition(vqa_dataset):
    for rows in load_dataset(str(vqa_dataset)).values():
        verdicts = {}
        for row in rows.filter(lambda kind: kind == "presence", input_columns="question_type"):
            claim = claims_from_json(row["claims"])[0]
            verdicts.setdefault(claim.label, []).append(claim.negated)
            assert row["completion"][0]["content"].startswith("No, " if claim.negated else ("Yes, ", "Yes: "))
        assert all(asked.count(True) == asked.count(False) for asked in verdicts.values())


def test_a_label_outside_the_map_stops_the_build_and_says_what_is_there(tmp_path):
    sources = yolo_source(tmp_path / "s", "0 .2 .7 .1 .1\n7 .5 .5 .1 .1\n")

    with pytest.raises(BuildError, match=r"the class map lacks 7\. Labels present: 0 \(3\), 7 \(3\)"):
        build(sources, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unreadable_line_takes_the_no_away_from_its_image(tmp_path):
    """The line may have held the very disease that a "no" would deny."""
    good = yolo_source(tmp_path / "good", "0 .2 .7 .1 .1\n")
    bad = yolo_source(tmp_path / "bad", "0 .2 .7 .1 .1\nnonsense\n")

    assert '"negated":true' in rows_text(good, tmp_path / "a")
    report = build(bad, tmp_path / "b")
    assert report["problem_counts"]["bad_label_line"] == 3
    assert '"negated":true' not in "".join(row["claims"] for row in pq.read_table(tmp_path / "b" / "data").to_pylist())


def rows_text(sources, out):
    build(sources, out)
    return "".join(row["claims"] for row in pq.read_table(out / "data").to_pylist())


def test_strict_stops_on_what_skip_leaves_out(tmp_path):
    sources = yolo_source(tmp_path / "s", "0 .2 .7 .1 .1\n0 nan .5 .1 .1\n")

    build(sources, tmp_path / "skip")
    with pytest.raises(BuildError, match=r"p0\.txt:2"):
        build(sources, tmp_path / "strict", strict=True)


def test_files_that_show_the_same_pixels_are_built_once_and_contradictions_not_at_all(tmp_path):
    sources = yolo_source(tmp_path / "s", "0 .2 .7 .1 .1\n")
    images, labels = tmp_path / "s" / "images", tmp_path / "s" / "labels"
    shutil.copy(images / "p0.png", images / "copy.png")
    shutil.copy(labels / "p0.txt", labels / "copy.txt")
    shutil.copy(images / "p1.png", images / "other.png")
    (labels / "other.txt").write_text("1 .2 .7 .1 .1\n")

    report = build(sources, tmp_path / "out")

    assert report["problem_counts"] == {"contradicting_duplicate": 1, "duplicate_image": 1}
    assert report["sources"][0]["images_built"] == 2


def test_what_has_deep_caries_is_not_said_to_be_free_of_caries(tmp_path):
    sources = yolo_source(tmp_path / "s", "0 .2 .7 .1 .1\n")
    text = sources.read_text().replace("{0: caries, 1: infection}", "{0: deep_caries, 1: infection, 2: caries}")
    sources.write_text(text)

    denied = {claim.label for claim in built_claims(sources, tmp_path / "out") if claim.negated}

    assert denied == {"infection"}


def test_absence_cannot_be_claimed_of_what_nobody_annotates(tmp_path):
    sources = yolo_source(tmp_path / "s", "0 .2 .7 .1 .1\n")
    sources.write_text(sources.read_text().replace("1: infection", "1: null"))

    with pytest.raises(SourcesError, match="exhaustive names 'infection', which no label is mapped to"):
        load_sources(sources)


def two_sources_on_one_picture(folder, first, second):
    """Sources `a` and `b` that hold the same picture, each with one line of its own."""
    texts = []
    for name, line in (("a", first), ("b", second)):
        yolo_source(folder / name, line)
        for number in (1, 2):
            (folder / name / "images" / f"p{number}.png").unlink()
            (folder / name / "labels" / f"p{number}.txt").unlink()
        text = (folder / name / "sources.yaml").read_text()
        texts.append(text.replace("name: s", f"name: {name}").replace("root: .", f"root: {name}"))
    (folder / "both.yaml").write_text(ABOUT_FINDINGS + texts[0] + texts[1].removeprefix(HEAD))
    return folder / "both.yaml"


def test_two_sources_on_one_picture_do_not_contradict_each_other(tmp_path):
    """The published ancestor taught "no caries" on radiographs that lay in the folder "Caries" as well."""
    same = two_sources_on_one_picture(tmp_path / "same", "0 .2 .3 .1 .1\n", "0 .8 .7 .1 .1\n")
    other = two_sources_on_one_picture(tmp_path / "other", "0 .2 .3 .1 .1\n", "1 .8 .7 .1 .1\n")

    assert {claim.label for claim in built_claims(same, tmp_path / "1") if claim.negated} == {"infection"}
    kinds = {row["question_type"] for row in pq.read_table(tmp_path / "1" / "data").to_pylist()}
    assert kinds == {"diagnosis", "findings_location", "structured_report"}  # where "the" lesion is, is not one place
    # Each source still says where else its own disease is not; neither denies the other's.
    assert all(claim.region for claim in built_claims(other, tmp_path / "2") if claim.negated)
    kinds = {row["question_type"] for row in pq.read_table(tmp_path / "2" / "data").to_pylist()}
    assert kinds == {"findings_location", "location", "structured_report"}  # which disease it is, has two answers


def textured(folder, name, seed, *, mirrored=False):
    """A picture with structure, so that it is known again in other pixels."""
    small = random.Random(seed).randbytes(24 * 12)
    picture = Image.frombytes("L", (24, 12), small).resize((480, 240), Image.Resampling.BICUBIC)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "labels").mkdir(exist_ok=True)
    if mirrored:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    picture.save(folder / "images" / name, **({"quality": 80} if name.endswith("jpg") else {}))


def write_labels(folder, name, lines):
    (folder / "labels" / f"{name}.txt").write_text(lines)


CARIES, INFECTION = "0 .2 .3 .1 .1\n", "1 .8 .7 .1 .1\n"


@pytest.mark.parametrize("mirrored", [False, True])
def test_no_source_denies_what_another_shows_on_the_same_picture_in_other_pixels(tmp_path, mirrored):
    """Source a as PNG, source b as JPEG of the same picture: each shows what the other would deny."""
    entry = "reader: yolo, modality: panoramic, classes: {0: caries, 1: infection}, exhaustive: [caries, infection]"
    for name, file, lines in (("a", "x.png", CARIES), ("b", "y.jpg", INFECTION)):
        textured(tmp_path / name, file, seed=1, mirrored=mirrored and name == "b")
        write_labels(tmp_path / name, file[0], lines)
    text = "".join(f"  - {{name: {name}, root: {name}, {entry}}}\n" for name in "ab")
    (tmp_path / "s.yaml").write_text(HEAD + text)

    records = [json.loads(line) for line in built_records(tmp_path / "s.yaml", tmp_path / "out")]
    rows = pq.read_table(tmp_path / "out" / "data").to_pylist()
    claims = [claim for row in rows for claim in claims_from_json(row["claims"])]

    assert len({row["image_id"] for row in rows}) == 2
    assert len({row["group_id"] for row in rows}) == 1
    assert [record["exhaustive"] for record in records] == [["caries"], ["infection"]]
    assert not [claim for claim in claims if claim.negated and claim.region is None]


def test_no_image_denies_what_a_copy_in_its_own_source_shows(tmp_path):
    sources = yolo_source(tmp_path / "s", "")
    shutil.rmtree(tmp_path / "s" / "images")
    for file, lines in (("x.png", CARIES), ("y.jpg", INFECTION), ("other.png", CARIES)):
        textured(tmp_path / "s", file, seed=file == "other.png")
        write_labels(tmp_path / "s", file.split(".")[0], lines)
    for number in range(3):
        (tmp_path / "s" / "labels" / f"p{number}.txt").unlink()
    records = [json.loads(line) for line in built_records(sources, tmp_path / "out")]

    by_label = sorted(([f["label"] for f in r["findings"]], r["exhaustive"]) for r in records)
    assert by_label == [
        (["caries"], ["caries"]),
        (["caries"], ["caries", "infection"]),
        (["infection"], ["infection"]),
    ]


def test_copies_that_were_annotated_together_keep_their_questions(tmp_path):
    sources = yolo_source(tmp_path / "s", "")
    shutil.rmtree(tmp_path / "s" / "images")
    for file in ("p0.png", "p1.jpg", "p2.png"):
        textured(tmp_path / "s", file, seed=file == "p2.png")
        write_labels(tmp_path / "s", file.split(".")[0], CARIES)

    records = [json.loads(line) for line in built_records(sources, tmp_path / "out")]

    assert [record["exhaustive"] for record in records] == [["caries", "infection"]] * 3


def test_what_a_file_that_is_not_built_shows_is_not_denied_either(tmp_path):
    """Source a contradicts itself, so that neither of its files is built; it may still be right about caries."""
    both = two_sources_on_one_picture(tmp_path, CARIES, INFECTION)
    shutil.copy(tmp_path / "a" / "images" / "p0.png", tmp_path / "a" / "images" / "q.png")
    write_labels(tmp_path / "a", "q", INFECTION)
    (record,) = [json.loads(line) for line in built_records(both, tmp_path / "out")]

    assert (record["source"], record["exhaustive"]) == ("b", [])


def built_records(sources, out):
    build(sources, out)
    return (out / "records.jsonl").read_text().splitlines()


def built_claims(sources, out):
    build(sources, out)
    return [c for row in pq.read_table(out / "data").to_pylist() for c in claims_from_json(row["claims"])]


def test_images_that_nothing_is_asked_about_take_no_place_in_a_split(tmp_path):
    sources = yolo_source(tmp_path / "s", "0 .2 .7 .1 .1\n")
    for number in range(30):
        Image.new("L", (40, 20), 130 + number).save(tmp_path / "s" / "images" / f"unlabelled{number}.png")
    sources.write_text(ABOUT_FINDINGS + sources.read_text())

    report = build(sources, tmp_path / "out")

    assert {split: counts["images"] for split, counts in report["splits"].items()} == {
        "train": 1, "validation": 1, "test": 1,
    }  # fmt: skip
    assert report["empty_splits"] == []


def test_annotations_that_support_no_question_are_no_dataset(tmp_path):
    sources = yolo_source(tmp_path / "s", "0 .2 .7 .1 .1\n")
    text = sources.read_text().replace("{0: caries, 1: infection}, exhaustive: [caries, infection]", "{0: null}")
    sources.write_text(ABOUT_FINDINGS + text)

    with pytest.raises(BuildError, match="support no question"):
        build(sources, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_counts_that_the_user_knows_are_compared(tmp_path):
    sources = yolo_source(tmp_path / "s", "0 .2 .7 .1 .1\n", extra=", expected_images: {caries: 3, infection: 2}")
    source = audit(load_sources(sources), progress=False)["sources"][0]

    assert [problem["message"] for problem in source["problems"]] == [
        "0 images show infection, 2 are expected: is the class map right?"
    ]


def test_a_tooth_number_that_is_there_twice_is_reported(tmp_path):
    sources = yolo_source(tmp_path / "s", "0 .2 .7 .1 .1\n0 .8 .7 .1 .1\n")
    (tmp_path / "s" / "data.yaml").write_text("names: ['11']\n")
    text = sources.read_text().replace("{0: caries, 1: infection}, exhaustive: [caries, infection]", "fdi")
    sources.write_text(text)
    source = audit(load_sources(sources), progress=False)["sources"][0]

    assert source["problem_counts"] == {"duplicate_tooth": 3}


def test_an_image_that_cannot_be_decoded_is_left_out_and_said(tmp_path):
    sources = yolo_source(tmp_path / "s", "0 .2 .7 .1 .1\n")
    picture = tmp_path / "s" / "images" / "p0.png"
    picture.write_bytes(picture.read_bytes()[:-20])

    report = build(sources, tmp_path / "out")

    assert report["problem_counts"] == {"image_unreadable": 1}
    assert report["sources"][0]["images_built"] == 2


def test_a_failed_build_leaves_the_old_folder_and_no_half_one(tmp_path, monkeypatch):
    sources = yolo_source(tmp_path / "s", "0 .2 .7 .1 .1\n")
    build(sources, tmp_path / "out")
    before = digest(tmp_path / "out")
    monkeypatch.setattr("data_builders.vqa.write_vqa_card", lambda *args, **kwargs: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        build(sources, tmp_path / "out", seed=5)
    assert digest(tmp_path / "out") == before
    assert {path.name for path in tmp_path.iterdir()} == {"s", "out"}


def test_a_build_replaces_its_own_files_and_no_others(tmp_path):
    sources = yolo_source(tmp_path / "s", "0 .2 .7 .1 .1\n")
    build(sources, tmp_path / "out")
    build(sources, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")

    with pytest.raises(BuildError, match=r"holds notes\.txt, which no build wrote"):
        build(sources, tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_folder_of_something_else_is_never_replaced(tmp_path):
    sources = yolo_source(tmp_path / "s", "0 .2 .7 .1 .1\n")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")

    with pytest.raises(BuildError, match="not empty"):
        build(sources, tmp_path / "precious")
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years of work"


def test_a_file_is_no_folder_to_build_into(tmp_path):
    sources = yolo_source(tmp_path / "s", "0 .2 .7 .1 .1\n")
    (tmp_path / "out").write_text("mine")

    with pytest.raises(BuildError, match="is no folder"):
        build(sources, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_inputs_are_left_as_they_are(phantoms, tmp_path):
    before = digest(phantoms / "yolo")
    build(phantoms / "sources.yaml", tmp_path / "out")

    assert digest(phantoms / "yolo") == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(("reader: yolo", "reader: yolov5"), "sources.0.reader", id="unknown reader"),
        pytest.param(("0: caries", "0: cavities"), "'cavities' is not in the vocabulary", id="unknown finding"),
        pytest.param(("root: .", "root: nowhere"), "is not a folder", id="missing root"),
        pytest.param(("modality: panoramic, ", ""), "needs 'modality'", id="no modality"),
        pytest.param(("sources:", "source:"), "source: Extra inputs", id="misspelt key"),
        pytest.param(("sources:", "sources: ["), ":3: not valid YAML", id="not YAML"),
        pytest.param(("1: infection", "no: infection"), "put it in quotes", id="YAML's no is a boolean"),
        pytest.param(("1: infection", "0: infection"), "the key 0 is there twice", id="key twice"),
        pytest.param(("1: infection", "? [1] : infection"), "unhashable key", id="key that is a list"),
        pytest.param(("sources:", "families: [riddles]\nsources:"), "riddles", id="unknown family"),
    ],
)
def test_a_wrong_sources_file_gets_one_error_that_names_the_key(tmp_path, change, message):
    sources = yolo_source(tmp_path / "s", "0 .2 .7 .1 .1\n")
    sources.write_text(sources.read_text().replace(*change))

    with pytest.raises(SourcesError, match=r"sources\.yaml") as raised:
        load_sources(sources)
    assert message in str(raised.value)


def test_a_user_extends_the_vocabulary_without_code(tmp_path):
    sources = yolo_source(tmp_path / "s", "1 .2 .7 .1 .1\n")
    (tmp_path / "s" / "own.yaml").write_text(
        "supernumerary_tooth:\n  kind: pathology\n"
        "  en: {one: supernumerary tooth, other: supernumerary teeth, condition: a supernumerary tooth}\n"
        "  es: {one: diente supernumerario, other: dientes supernumerarios, "
        "condition: un diente supernumerario, gender: m}\n"
    )
    text = sources.read_text().replace("1: infection", "1: supernumerary_tooth").replace(", infection]", "]")
    sources.write_text("vocabulary: own.yaml\nlanguages: [en, es]\n" + text)

    build(sources, tmp_path / "out")

    answers = " ".join(row["completion"][0]["content"] for row in pq.read_table(tmp_path / "out/data").to_pylist())
    assert "a supernumerary tooth in the right mandibular region" in answers
    assert "un diente supernumerario en la región mandibular derecha" in answers


def test_a_detectors_findings_are_hedged_and_can_be_left_out(phantoms, tmp_path):
    """The same labels once as a human's, once as a detector's: with and without the detector."""
    base = (phantoms / "sources.yaml").read_text().replace("root: yolo", f"root: {phantoms / 'yolo'}")
    entry = base[base.index("  - name") :]
    detector = entry.replace("phantom_yolo", "detector").replace(
        entry[entry.index("    exhaustive") : entry.index("    license")], "    origin: model\n"
    )
    both = tmp_path / "both.yaml"
    both.write_text(base + detector + "questions: {cap: 1}\n")
    humans = tmp_path / "humans.yaml"
    humans.write_text(base + detector + "questions: {cap: 1}\ndetector_findings: false\n")

    build_vqa(load_sources(both), tmp_path / "both", progress=False, gallery=0)
    build_vqa(load_sources(humans), tmp_path / "humans", progress=False, gallery=0)
    rows = pq.read_table(tmp_path / "both" / "data").to_pylist()
    detected = [row for row in rows if row["source"] == "detector"]
    said = [row for row in detected if row["question_type"] == "findings_location"]

    assert said and all("possible" in row["completion"][0]["content"] for row in said)
    assert not any(claim.negated for row in detected for claim in claims_from_json(row["claims"]))
    sources = pq.read_table(tmp_path / "humans" / "data", columns=["source"])["source"].unique().to_pylist()
    assert sources == ["phantom_yolo"]
