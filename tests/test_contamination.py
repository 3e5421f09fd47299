import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from data_builders.probes import build_probe
from dentalgemma.evaluation.contamination import check_contamination, format_contamination
from dentalgemma.evaluation.questions import EvaluationError, load_questions, put_question


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


CASE = "Why does tooth 36 of this smoker show a halo after his second root canal treatment?"  # 16 words
TEMPLATE = "Where is the carious lesion on this panoramic radiograph?"
EVERYDAY = [
    f"Where is the {name} on this panoramic radiograph?" for name in ("cyst", "implant", "retained root", "crown")
]
REFERENCE = "The apical halo of the first lower molar is a scar after surgery and needs no treatment at all"  # 18 words


def draw(number: int) -> Image.Image:
    return Image.effect_noise((64, 48), 20 + number).convert("RGB")


def write_dataset(folder: Path, *rows: dict) -> Path:
    """A dataset folder of rows {split, asked: one or several user turns, said: between them, answer, image: number}."""
    for split in {row.get("split", "train") for row in rows}:
        table = [
            {
                "prompt": _turns(row["asked"], row.get("said", "I see.")),
                "completion": [{"role": "assistant", "content": row.get("answer", "Yes.")}],
                "row_id": f"row{number}",
                "image_id": f"image{row['image']}" if "image" in row else None,
                "images": [{"bytes": _png(folder, row["image"]), "path": "x.png"}] if "image" in row else [],
            }
            for number, row in enumerate(rows)
            if row.get("split", "train") == split
        ]
        (folder / "set" / "data").mkdir(parents=True, exist_ok=True)
        schema = pa.schema(
            {
                "prompt": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
                "completion": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
                "row_id": pa.string(),
                "image_id": pa.string(),
                "images": pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})),
            }
        )
        shard = folder / "set" / "data" / f"{split}-00000-of-00001.parquet"
        pq.write_table(pa.Table.from_pylist(table, schema=schema), shard)
    return folder / "set"


def _turns(asked: str | list[str], said: str) -> list[dict]:
    first, *further = [asked] if isinstance(asked, str) else asked
    answered = [t for turn in further for t in (("assistant", said), ("user", turn))]
    return [{"role": role, "content": text} for role, text in [("system", "Be brief."), ("user", first), *answered]]


def _png(folder: Path, number: int) -> bytes:
    path = folder / f"image{number}.png"
    if not path.exists():  # noise is another one with every call
        draw(number).save(path)
    return path.read_bytes()


def check(folder: Path, question: dict, *rows: dict) -> tuple[bool, list[dict]]:
    """Whether the question is clean, and the matches of its text."""
    found = check_contamination(write_questions(folder, question), write_dataset(folder, *rows), progress=False)
    return found["clean"], found["question_matches"]


def on_images(*texts: str, start: int = 10) -> list[dict]:
    return [{"asked": text, "image": start + number} for number, text in enumerate(texts)]


CLOSED = {"question": "Which nerve is at risk?", "options": ["Lingual", "Facial", "Optic", "Mental"], "answer": "A"}


@pytest.mark.parametrize("language", ["en", "es"])
def test_a_row_that_is_the_question_as_it_is_put_to_a_model_is_the_same_question(language, tmp_path):
    (item,) = load_questions(write_questions(tmp_path, CLOSED | {"language": language}))
    put = put_question(item, None, mode="generate", system_prompt="")[-1]["content"][0]["text"]
    assert "Lingual" in put

    clean, (match,) = check(tmp_path, CLOSED, {"asked": put})

    assert not clean
    assert (match["kind"], match["row_question"], match["template"]) == ("exact", put, False)


@pytest.mark.parametrize("before", ["Doctor, a difficult one for you today, please read carefully:", ""])
def test_a_row_that_holds_the_whole_question_and_much_more_is_a_leak(before, tmp_path):
    asked = (
        f"{before} {CASE.upper()} Choose between scar, cyst, granuloma, sclerosis, and explain your choice at length."
    )
    clean, (match,) = check(tmp_path, {"question": CASE}, {"asked": asked, "image": 1})

    assert not clean
    assert (match["kind"], match["similarity"], match["leak"]) == ("contained", 1.0, True)


@pytest.mark.parametrize(("changed", "share"), [((), 1.0), ((15,), 0.9), ((10, 20), None)])
def test_a_row_contains_a_question_if_it_holds_nine_tenths_of_its_word_triples(changed, share, tmp_path):
    words = [f"word{chr(97 + n)}{chr(97 + n % 7)}" for n in range(26)] + ["why", "does", "it", "hurt", "so", "badly"]
    asked = ["other" if n in changed else word for n, word in enumerate(words)]  # each is in 3 of the 30 triples
    filling = " ".join(f"filling{chr(97 + n)}" for n in range(20))
    clean, matches = check(tmp_path, {"question": " ".join(words)}, {"asked": f"{' '.join(asked)} {filling}"})

    assert clean is (share is None)
    assert [(m["kind"], m["similarity"]) for m in matches] == ([("contained", share)] if share else [])


def test_a_question_that_ends_every_case_is_a_template(tmp_path):
    everyday = "What is your diagnosis and what would you do first?"
    cases = ("A swollen cheek since the night.", "A bitter taste for two years.", "A lost filling.", "Gums that bleed.")
    rows = [{"asked": f"{case * 3} {everyday}"} for case in cases]
    clean, matches = check(tmp_path, {"question": everyday}, *rows)

    assert clean
    assert [(match["kind"], match["template"]) for match in matches] == [("contained", True)] * 4
    assert not check(tmp_path, {"question": everyday}, *rows[:3])[0]


def test_a_case_behind_words_that_open_every_question_is_specific(tmp_path):
    opening = "Look closely at this panoramic radiograph and then answer the question that follows as well as you can: "
    everyday = [opening + text for text in ("What?", "Where?", "Which?", "Why?")]
    clean, matches = check(tmp_path, {"question": opening + CASE}, *on_images(*everyday, opening + CASE))

    assert not clean
    assert [match["template"] for match in matches if match["kind"] == "exact"] == [False]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_an_image_of_the_validation_split_is_a_leak_as_well(split, tmp_path):
    _png(tmp_path, 1)
    questions = write_questions(tmp_path, {"question": "What else?", "image": "image1.png"})
    dataset = write_dataset(tmp_path, {"asked": "What is visible?", "image": 1, "split": split})
    found = check_contamination(questions, dataset, progress=False)

    assert [(m["kind"], m["split"], m["leak"]) for m in found["image_matches"]] == [("pixels", split, split != "test")]
    assert found["clean"] is (split == "test")


def test_a_question_of_seven_words_is_not_looked_for_inside_other_texts(tmp_path):
    short = "What is your diagnosis and your plan?"
    asked = f"A woman of 40 with pain at night and a swelling of the left cheek. {short}"

    assert check(tmp_path, {"question": short}, {"asked": asked}) == (True, [])


@pytest.mark.parametrize("place", [0, 1, 2])
def test_every_turn_of_a_dialogue_is_compared(place, tmp_path):
    turns = ["Good morning.", "Which teeth are there?", "Thank you, and what else?"]
    turns[place] = "Which nerve is at risk?"
    clean, matches = check(tmp_path, {"question": "Which nerve is at risk?"}, {"asked": turns})

    assert not clean
    assert [match["kind"] for match in matches] == ["exact"]


@pytest.mark.parametrize("with_image", [False, True], ids=["question without image", "question about another image"])
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_specific_text_is_a_leak_whatever_image_it_is_asked_of(split, with_image, tmp_path):
    question = {"question": CASE}
    if with_image:
        _png(tmp_path, 1)
        question |= {"image": "image1.png"}
    clean, (match,) = check(tmp_path, question, {"asked": CASE, "image": 2, "split": split})

    assert clean is (split == "test")
    assert (match["kind"], match["template"], match["same_image"]) == ("exact", False, False)
    assert match["leak"] is (split != "test")


def test_a_text_that_the_dataset_asks_of_many_images_is_a_template(tmp_path):
    for number, clean in ((3, True), (4, False)):
        result, matches = check(tmp_path, {"question": CASE}, *on_images(*[CASE] * number))
        assert result is not clean
        assert {match["template"] for match in matches} == {not clean}


def test_a_text_that_the_question_file_asks_of_many_images_is_a_template(tmp_path):
    for number in range(5):
        _png(tmp_path, number)
    dataset = write_dataset(tmp_path, {"asked": CASE, "image": 9})
    for number, clean in ((3, False), (4, True)):
        questions = write_questions(tmp_path, *({"question": CASE, "image": f"image{n}.png"} for n in range(number)))
        assert check_contamination(questions, dataset, progress=False)["clean"] is clean


def test_a_template_with_a_finding_that_is_asked_for_once_is_a_template(tmp_path):
    _png(tmp_path, 1)
    question = {"question": TEMPLATE, "image": "image1.png"}
    clean, matches = check(tmp_path, question, *on_images(*EVERYDAY, TEMPLATE))

    assert clean
    assert [match["template"] for match in matches if match["kind"] == "exact"] == [True]
    assert not check(tmp_path, question, *on_images(TEMPLATE))[0]  # nothing tells that it is one


def test_a_template_about_the_same_image_is_a_leak(tmp_path):
    _png(tmp_path, 1)
    rows = on_images(*EVERYDAY, TEMPLATE, start=1)
    rows[-1]["image"] = 1
    clean, matches = check(tmp_path, {"question": TEMPLATE, "image": "image1.png"}, *rows)
    (match,) = [match for match in matches if match["kind"] == "exact"]

    assert not clean
    assert (match["template"], match["same_image"], match["leak"]) == (True, True, True)


def test_a_short_text_without_image_is_no_leak_where_the_same_text_needs_an_image(tmp_path):
    short = "Which nerve is at risk?"

    _png(tmp_path, 1)
    assert check(tmp_path, {"question": short, "image": "image1.png"}, {"asked": short})[0]
    assert check(tmp_path, {"question": short}, {"asked": short, "image": 1})[0]
    assert not check(tmp_path, {"question": short}, {"asked": short})[0]


def test_another_age_does_not_make_another_case(tmp_path):
    rows = {"asked": "A man of 42, tooth 17, pain on biting: which?"}
    clean, (match,) = check(tmp_path, {"question": "A man of 67, tooth 25, pain on biting: which?"}, rows)

    assert not clean
    assert (match["kind"], match["similarity"]) == ("near", 1.0)


@pytest.mark.parametrize(
    ("reference", "row", "leak"),
    [
        pytest.param(REFERENCE, {"answer": REFERENCE.upper() + "."}, True, id="specific"),
        pytest.param(REFERENCE, {"answer": REFERENCE, "split": "validation"}, True, id="validation"),
        pytest.param(REFERENCE, {"answer": REFERENCE, "split": "test"}, False, id="test split"),
        pytest.param(
            " ".join(REFERENCE.split()[:11]), {"answer": " ".join(REFERENCE.split()[:11])}, False, id="11 words"
        ),
        pytest.param(
            " ".join(REFERENCE.split()[:12]), {"answer": " ".join(REFERENCE.split()[:12])}, True, id="12 words"
        ),
        pytest.param(" ".join(REFERENCE.split()[:7]), {"answer": " ".join(REFERENCE.split()[:7])}, None, id="7 words"),
        pytest.param(REFERENCE, {"answer": REFERENCE + " Really."}, None, id="another answer"),
    ],
)
def test_the_reference_of_an_open_question_is_looked_for_in_answers(reference, row, leak, tmp_path):
    question = {"question": "What is it?", "answer": reference}
    clean, matches = check(tmp_path, question, {"asked": "Tell me.", **row})

    assert [(match["kind"], match["leak"]) for match in matches] == ([] if leak is None else [("answer", leak)])
    assert clean is not leak or leak is None


def test_an_answer_inside_a_dialogue_is_compared_as_well(tmp_path):
    question = {"question": "What is it?", "answer": "I see one small scar beside the root of the first lower molar."}
    clean, (match,) = check(tmp_path, question, {"asked": ["Tell me.", "Where?"], "said": question["answer"]})

    assert not clean
    assert match["kind"] == "answer"


def test_a_short_reference_is_a_leak_about_the_same_image_and_a_template_on_many(tmp_path):
    _png(tmp_path, 1)
    short = "There is no sign of any disease here"
    question = {"question": "What is it?", "answer": short, "image": "image1.png"}
    _, (match,) = check(tmp_path, question, {"asked": "Tell me.", "answer": short, "image": 1})
    assert (match["same_image"], match["leak"]) == (True, True)

    question = {"question": "What is it?", "answer": REFERENCE}
    rows = [row | {"answer": REFERENCE} for row in on_images(*["Tell me."] * 4)]
    assert check(tmp_path, question, *rows)[0]
    assert not check(tmp_path, question, *rows[:3])[0]


def test_the_letter_of_a_closed_question_is_no_reference(tmp_path):
    assert check(tmp_path, CLOSED, {"asked": "Tell me.", "answer": "A"}) == (True, [])


def test_the_message_does_not_say_that_a_template_is_not_in_training(tmp_path):
    _png(tmp_path, 1)
    question = {"question": "What is visible?", "image": "image1.png"}
    questions = write_questions(tmp_path, question, question | {"question": "What is on it?"}, {"question": CASE})
    rows = [{"asked": "What is visible?", "image": 2}, {"asked": "What is on it?", "image": 2}]
    clean = format_contamination(check_contamination(questions, write_dataset(tmp_path, *rows), progress=False))
    rows.append({"asked": CASE, "image": 2})
    leak = format_contamination(check_contamination(questions, write_dataset(tmp_path, *rows), progress=False))

    assert clean.startswith("set: clean; 3 questions on 1 images against 2 rows and 1 images: 0 of their images")
    assert "2 texts are asked in training too, all of them short template questions that tell nothing" in clean
    assert leak.startswith("set: NOT CLEAN")
    assert "0 of their images and the text of 1 of them stand where a model is trained" in leak
    assert "2 further texts are asked in training too" in leak
    assert "exact text in train, row row2: question q2" in leak
