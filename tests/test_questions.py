import json
from pathlib import Path

import pytest

from dentalgemma.evaluation.questions import (
    EvaluationError,
    Question,
    check_images,
    load_questions,
    questions_sha256,
    write_questions,
)

WHOLE = {"item_id": "1", "question": "?", "options": {"A": "yes", "B": "no"}, "answer": "A"}


def load(folder, *entries):
    path = folder / "q.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return load_questions(path)


@pytest.mark.parametrize(
    ("options", "answer", "letters", "right"),
    [
        pytest.param(["yes", "no"], "no", "AB", "B", id="yes or no, the answer by its text"),
        pytest.param(["1", "2", "3"], "C", "ABC", "C", id="three in a list"),
        pytest.param({"A": "1", "B": "2", "C": "3", "D": "4", "E": "5"}, "E", "ABCDE", "E", id="five"),
        pytest.param([28, 30, 31, 32], "30", "ABCD", "B", id="numbers"),
        pytest.param(["B", "A"], "A", "AB", "A", id="a letter is a letter, whatever the texts"),
        pytest.param({"A": "caries", "B": "", "C": "", "D": "None"}, "B", "ABCD", "B", id="an empty option is right"),
    ],
)
def test_two_to_five_options_load_as_letters_or_as_a_list(tmp_path, options, answer, letters, right):
    (item,) = load(tmp_path, WHOLE | {"options": options, "answer": answer})

    assert ("".join(item.options), item.answer, item.kind) == (letters, right, "closed")


def test_an_open_question_has_a_reference_and_no_options(tmp_path):
    first, second = load(
        tmp_path, {"item_id": 7, "question": "What?", "answer": "A cyst."}, WHOLE | {"options": [], "answer": ""}
    )

    assert (first.item_id, first.kind, first.answer, first.answerable) == ("7", "open", "A cyst.", True)
    assert (second.kind, second.answerable) == ("open", False)


def test_questions_about_one_image_file_have_its_path_in_common_where_no_image_id_is_given(tmp_path):
    one, two, three = load(
        tmp_path,
        WHOLE | {"image": "a.png"},
        WHOLE | {"item_id": "2", "image": "a.png"},
        WHOLE | {"item_id": "3", "image": "b.png"},
    )

    assert one.image_id == two.image_id != three.image_id
    assert one.image == tmp_path / "a.png"
    assert one.item_hash != three.item_hash


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"item_id": None}, "q.jsonl:1: a question needs .*; there is no item_id"),
        ({"question": None, "answer": None}, "there is no question and no answer"),
        ({"item_id": ["1"]}, r'item_id should be a text, got \["1"\]'),
        ({"question": 3}, "question should be a text, got 3"),
        ({"question": " "}, "question is empty"),
        ({"options": "yes, no"}, 'options should map letters to texts, or list texts, got "yes, no"'),
        ({"options": {"1": "yes", "2": "no"}, "answer": "1"}, "option '1' needs one capital letter"),
        ({"options": {"A": "yes", "B": None}}, 'option B should be a text, got null; an option that is empty is ""'),
        ({"options": {"A": "yes", "B": ["no"]}}, "option B should be a text"),
        ({"options": ["yes"]}, "needs two options at least"),
        ({"options": ["x"] * 27}, "27 options, more than there are letters"),
        ({"options": ["yes", "yes"], "answer": "yes"}, "answer 'yes' is the text of A, B; give the letter"),
        ({"answer": "C"}, "answer 'C' is not among A, B, nor the text of an option"),
        ({"answer": 0}, "answer should be a text, got 0"),
        ({"answer": ""}, "answer '' is not among A, B"),
        ({"categories": [1]}, "categories should be a text, got 1"),
        ({"option_values": ["caries"]}, "option_values should map letters to values"),
        ({"option_values": {"C": "caries"}}, "option_values has C, which is no letter"),
        ({"image": 5}, "image should be a text"),
        ({"image": "https://example.org/a.png"}, "image is a URL; save the image"),
        ({"options": None, "choices": ["yes", "no"]}, "'choices' is not read; rename it to 'options'"),
        ({"image_path": "a.png"}, "'image_path' is not read; rename it to 'image'"),
        ({"question": "\ud800"}, "half a character"),
    ],
)
def test_what_cannot_be_used_is_named_by_its_line_and_what_to_do(tmp_path, change, reason):
    with pytest.raises(EvaluationError, match=reason):
        load(tmp_path, WHOLE | change)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "holds no question"),
        (b"\n\n", "holds no question"),
        (b'{"item_id": "1", "item_id": "2"}', "q.jsonl:1: not valid JSON: a key comes twice"),
        (b'{"item_id": "1", "options": {"A": "x", "A": "y"}}', "a key comes twice"),
        (b"[" * 100_000, "q.jsonl:1: not valid JSON"),
        ("{}".encode("utf-16"), "cannot be read"),
        (b"\x00", "not valid JSON"),
    ],
)
def test_a_file_that_is_no_jsonl_is_one_error(tmp_path, content, reason):
    (tmp_path / "q.jsonl").write_bytes(content)

    with pytest.raises(EvaluationError, match=reason):
        load_questions(tmp_path / "q.jsonl")


def test_an_id_counts_once(tmp_path):
    with pytest.raises(EvaluationError, match=r"q\.jsonl:2: item_id '1' comes twice"):
        load(tmp_path, WHOLE, WHOLE)


def test_missing_images_are_named_before_anything_is_asked(tmp_path):
    (tmp_path / "there.png").touch()
    entries = [WHOLE | {"item_id": str(number), "image": f"{number}.png"} for number in range(5)]
    items = load(tmp_path, *entries, WHOLE | {"item_id": "x", "image": "there.png"}, WHOLE | {"item_id": "y"})

    check_images(items[5:])
    with pytest.raises(EvaluationError, match=r"0\.png \(item 0\).*2\.png \(item 2\) and 2 more"):
        check_images(items)


def test_what_is_written_is_read_again(tmp_path):
    items = [
        Question("1", "¿Qué muestra?", "B", {"A": "", "B": "None"}, tmp_path / "i/a.png", "f" * 64, "g", "p",
                 "screening", ("Teeth", "Patho"), "caries", {"A": "healthy", "B": "caries"}, "es", "panoramic",
                 "DENTEX", "test"),
        Question("2", "Open?", ""),
        Question("3", "Order?", "C", {"C": "z", "A": "y"}),
    ]  # fmt: skip
    write_questions(tmp_path / "q.jsonl", items)

    assert load_questions(tmp_path / "q.jsonl") == items
    assert list(load_questions(tmp_path / "q.jsonl")[2].options) == ["C", "A"]
    assert [path.name for path in tmp_path.iterdir()] == ["q.jsonl"]
    assert str(tmp_path) not in (tmp_path / "q.jsonl").read_text()


def test_the_hash_is_of_what_is_asked_shown_and_right_and_not_of_the_file():
    one = Question("1", "?", "A", {"A": "x", "B": "y"}, Path("a/1.png"), "f" * 64)
    two = Question("2", "?", "A", {"A": "x", "B": "y"}, Path("a/1.png"), "f" * 64)
    moved = Question("1", "?", "A", {"B": "y", "A": "x"}, Path("b/2.png"), "f" * 64, categories=("Teeth",))

    assert questions_sha256([one, two]) == questions_sha256([two, moved])
    others = [
        [one],
        [one, Question("2", "?", "B", {"A": "x", "B": "y"}, None, "f" * 64)],
        [one, Question("2", "?", "A", {"A": "x", "B": "z"}, None, "f" * 64)],
        [one, Question("2", "!", "A", {"A": "x", "B": "y"}, None, "f" * 64)],
        [one, Question("2", "?", "A", {"A": "x", "B": "y"}, None, "e" * 64)],
        [one, Question("3", "?", "A", {"A": "x", "B": "y"}, None, "f" * 64)],
    ]
    assert len({questions_sha256(items) for items in [[one, two], *others]}) == 7
