import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from data_builders.probes import build_probe
from dentalgemma.evaluation.contamination import check_contamination
from dentalgemma.evaluation.questions import EvaluationError


@pytest.fixture(scope="module")
def stored(vqa_dataset):
    """One training image and one test image of the dataset, as files' bytes."""
    images = {}
    for split in ("train", "test"):
        (shard,) = (vqa_dataset / "data").glob(f"{split}-*.parquet")
        batch = next(pq.ParquetFile(shard).iter_batches(batch_size=1, columns=["images", "image_id"]))
        images[split] = batch["images"][0].as_py()[0]["bytes"]
    return images


def write_questions(folder: Path, *questions: dict) -> Path:
    path = folder / "questions.jsonl"
    lines = [
        json.dumps({"item_id": f"q{number}", "answer": "yes", **question}) for number, question in enumerate(questions)
    ]
    path.write_text("\n".join(lines))
    return path


def ask_about(folder: Path, picture: Image.Image, name: str = "asked.png", **options) -> Path:
    picture.convert("RGB").save(folder / name, **options)
    return write_questions(folder, {"question": "What is visible?", "image": name, "image_id": name})


def open_stored(folder: Path, content: bytes) -> Image.Image:
    (folder / "stored").write_bytes(content)
    return Image.open(folder / "stored").convert("RGB")


def test_a_probe_of_the_test_split_is_clean_and_one_of_the_training_split_is_not(vqa_dataset, tmp_path):
    for split in ("test", "train"):
        build_probe(vqa_dataset, split, tmp_path / f"{split}.jsonl", languages=("en", "es"))
    held_out, trained = (
        check_contamination(tmp_path / f"{split}.jsonl", vqa_dataset, progress=False) for split in ("test", "train")
    )

    assert held_out["clean"]
    assert {match["split"] for match in held_out["image_matches"]} == {"test"}
    assert len(held_out["image_matches"]) == held_out["questions"]["images"]
    assert any(match["kind"] == "exact" and match["split"] == "train" for match in held_out["question_matches"])
    assert not trained["clean"]
    assert {(match["split"], match["kind"]) for match in trained["image_matches"]} == {("train", "pixels")}
    assert trained["counts"]["images"] == {"train": {"pixels": trained["questions"]["images"]}}


@pytest.mark.parametrize(
    ("alter", "kind"),
    [
        pytest.param(lambda picture: picture, "pixels", id="same pixels in another format"),
        pytest.param(
            lambda picture: picture.resize((picture.width * 3 // 4, picture.height // 2)), "copy", id="resized"
        ),
        pytest.param(ImageOps.mirror, "flipped", id="mirrored"),
        pytest.param(lambda p: p.crop((0, 0, int(p.width * 0.94), int(p.height * 0.94))), "copy", id="cropped"),
    ],
)
def test_a_copy_of_a_training_image_is_found(alter, kind, stored, vqa_dataset, tmp_path):
    questions = ask_about(tmp_path, alter(open_stored(tmp_path, stored["train"])))
    found = check_contamination(questions, vqa_dataset, progress=False)

    assert not found["clean"]
    assert kind in {match["kind"] for match in found["image_matches"] if match["split"] == "train"}
    assert found["image_matches"][0]["item_ids"] == ["q0"]


def test_a_training_image_in_jpeg_is_found_as_a_copy(stored, vqa_dataset, tmp_path):
    questions = ask_about(tmp_path, open_stored(tmp_path, stored["train"]), "asked.jpg", quality=60)
    (match,) = check_contamination(questions, vqa_dataset, progress=False)["image_matches"]

    assert (match["kind"], match["split"], match["leak"]) == ("copy", "train", True)
    assert match["correlation"] >= 0.97


def test_a_mosaic_that_shows_a_training_image_is_found(stored, vqa_dataset, tmp_path):
    training = open_stored(tmp_path, stored["train"]).resize((400, 200))
    mosaic = Image.new("RGB", (800, 400))
    shades = {
        (0, 0): training,
        (400, 0): Image.effect_noise((400, 200), 30),
        (400, 200): Image.new("L", (400, 200), 200),
    }
    for place, picture in shades.items():
        mosaic.paste(picture.convert("RGB"), place)
    mosaic.paste(Image.effect_noise((400, 200), 90).convert("RGB"), (0, 200))
    found = check_contamination(ask_about(tmp_path, mosaic), vqa_dataset, progress=False)

    assert {(match["kind"], match["split"]) for match in found["image_matches"]} == {("part", "train")}


def test_other_images_and_their_everyday_questions_are_no_leak(vqa_dataset, tmp_path):
    from data_builders.phantom_formats import write_phantoms

    write_phantoms(tmp_path / "others", count=6, cases=2, seed=99, progress=False)
    pictures = sorted(path for path in (tmp_path / "others").rglob("*.jpg"))[:6]
    assert len(pictures) == 6
    entries = [
        {"question": "In which region is the impacted tooth?", "image": str(path), "image_id": path.name}
        for path in pictures
    ]
    found = check_contamination(write_questions(tmp_path, *entries), vqa_dataset, progress=False)

    assert found["clean"]
    assert found["image_matches"] == []
    assert found["question_matches"]  # the text alone is there, and is no leak
    assert not any(match["leak"] for match in found["question_matches"])


def read_prompts(dataset: Path, split: str) -> list[str]:
    (shard,) = (dataset / "data").glob(f"{split}-*.parquet")
    return [prompt[-1]["content"] for prompt in pq.read_table(shard, columns=["prompt"])["prompt"].to_pylist()]


@pytest.mark.parametrize(
    ("split", "change", "kind", "clean"),
    [
        pytest.param("train", str.upper, "exact", False, id="training case, other case"),
        pytest.param("validation", str, "exact", False, id="validation case"),
        pytest.param("train", lambda text: text.replace("male, ", "male patient, "), "near", False, id="one more word"),
        pytest.param("test", str, "exact", True, id="held-out case"),
    ],
)
def test_a_question_without_image_leaks_by_its_text(split, change, kind, clean, instruct_dataset, tmp_path):
    text = read_prompts(instruct_dataset, split)[0]
    found = check_contamination(write_questions(tmp_path, {"question": change(text)}), instruct_dataset, progress=False)

    assert found["clean"] is clean
    assert (kind, split) in {(match["kind"], match["split"]) for match in found["question_matches"]}
    assert found["dataset"]["images"] == 0


def test_a_question_that_no_row_resembles_is_clean(instruct_dataset, tmp_path):
    questions = write_questions(tmp_path, {"question": "Which nerve supplies the lower incisors of an adult?"})
    found = check_contamination(questions, instruct_dataset, progress=False)

    assert found["clean"]
    assert found["question_matches"] == []


def test_a_text_of_a_question_without_image_is_no_leak_where_rows_need_one(vqa_dataset, tmp_path):
    questions = write_questions(tmp_path, {"question": read_prompts(vqa_dataset, "train")[0]})
    found = check_contamination(questions, vqa_dataset, progress=False)

    assert found["clean"]
    assert found["question_matches"]
    assert found["dataset"]["images"] == 40


def test_the_result_tells_which_files_it_is_about(vqa_dataset, instruct_dataset, tmp_path):
    questions = write_questions(tmp_path, {"question": "Why?"})
    first, again, other = (
        check_contamination(questions, dataset, progress=False)
        for dataset in (vqa_dataset, vqa_dataset, instruct_dataset)
    )

    assert first == again
    assert first["format"] == "contamination/1"
    assert first["dataset"]["fingerprint"] != other["dataset"]["fingerprint"]
    assert json.loads(json.dumps(first)) == first


def test_a_folder_without_rows_and_a_missing_image_are_refused(vqa_dataset, tmp_path):
    questions = write_questions(tmp_path, {"question": "Why?"})
    with pytest.raises(EvaluationError, match="holds no data"):
        check_contamination(questions, tmp_path, progress=False)
    lost = write_questions(tmp_path, {"question": "Why?", "image": "lost.png"})
    with pytest.raises(EvaluationError, match=r"lost\.png: the image of item q0 cannot be read"):
        check_contamination(lost, vqa_dataset, progress=False)
