import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from dentalgemma.evaluation.generation import evaluate_questions
from dentalgemma.evaluation.likelihood import complete, encode
from dentalgemma.evaluation.questions import (
    EvaluationError,
    Question,
    load_questions,
    put_question,
    read_predictions,
    swap_images,
)
from dentalgemma.evaluation.scoring import score_predictions
from dentalgemma.models.loading import load_pretrained
from dentalgemma.models.tiny import make_tiny_gemma3

SYSTEM = "You are a dentist."
OPTIONS = {
    "A": "Caries.",
    "B": "An impacted tooth.",
    "C": "In the left maxillary region.",
    "D": "Periapical infection.",
}
WORDING = ("Where is it on this panoramic radiograph?", "What does it show?", "Which abnormality is there? {x}")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_gemma3(folder, [*OPTIONS.values(), *WORDING, SYSTEM], vocab_size=600)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    _untie(model)
    return model, AutoProcessor.from_pretrained(folder)


def _untie(model):
    """With tied embeddings a random model repeats the last token of whatever it is asked."""
    shape = model.lm_head.weight.shape
    model.lm_head.weight = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    """Seven questions on four images of three patients."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 256, (30 + number, 60, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    return [
        Question(
            item_id=f"item{number}",
            question=WORDING[number % 3],
            options=dict(list(OPTIONS.items())[: 3 + number % 2]),
            answer="A",
            image=folder / f"{number % 4}.png",
            image_id=f"image{number % 4}",
            group_id=f"patient{number % 4 % 3}",
            question_type="diagnosis",
            language="es" if number == 6 else "en",
        )
        for number in range(7)
    ]


def answer(tiny, items, out, **settings):
    settings = {"mode": "loglikelihood", "system_prompt": SYSTEM, "progress": False} | settings
    evaluate_questions(*tiny, items, out=out, **settings)
    return list(read_predictions(out).values())


def scores(lines):
    return [score["sum"] for line in lines for score in line["option_scores"].values()]


def ask(tiny, item, picture, **settings):
    """The inputs of one question alone, unpadded."""
    settings = {"mode": "loglikelihood", "system_prompt": SYSTEM} | settings
    return encode(tiny[1], [put_question(item, picture, **settings)])


def forward(tiny, inputs, tokens, *, with_types=True):
    """Sum of the log-probabilities of `tokens` after the prompt, by one plain forward pass."""
    model, _ = tiny
    answer = torch.tensor([tokens])
    whole = {
        "input_ids": torch.cat([inputs["input_ids"], answer], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(answer)], dim=1),
    }
    if with_types:
        whole["token_type_ids"] = torch.cat([inputs["token_type_ids"], torch.zeros_like(answer)], dim=1)
    with torch.inference_mode():
        logits = model(**whole, pixel_values=inputs["pixel_values"]).logits
    chosen = logits[0, -len(tokens) - 1 : -1].log_softmax(dim=-1)
    return chosen.gather(1, answer.T).sum().item()


def test_scores_are_those_of_each_option_alone_in_a_plain_forward_pass(tiny, items, tmp_path):
    _, processor = tiny
    lines = answer(tiny, items, tmp_path / "p.jsonl", batch_size=4)

    for line, item in zip(lines, items, strict=True):
        inputs = ask(tiny, item, Image.open(item.image))
        for letter, text in item.options.items():
            tokens = processor.tokenizer(f"{text}<end_of_turn>", add_special_tokens=False)["input_ids"]
            score = line["option_scores"][letter]
            assert score["sum"] == pytest.approx(forward(tiny, inputs, tokens), abs=1e-4)
            assert score["mean"] == pytest.approx(score["sum"] / len(tokens))
            assert score["tokens"] == len(tokens)


def test_the_letter_is_the_option_with_the_highest_mean(tiny, items, tmp_path):
    for line, item in zip(answer(tiny, items, tmp_path / "p.jsonl"), items, strict=True):
        means = {letter: score["mean"] for letter, score in line["option_scores"].items()}
        assert means[line["letter"]] == max(means.values())
        assert line["output"] == item.options[line["letter"]]


def test_without_token_types_the_scores_would_be_others(tiny, items):
    inputs = ask(tiny, items[0], Image.open(items[0].image))
    tokens = tiny[1].tokenizer("Caries.", add_special_tokens=False)["input_ids"]

    with_types, without = (forward(tiny, inputs, tokens, with_types=value) for value in (True, False))

    assert abs(with_types - without) > 1e-3


@pytest.mark.parametrize("mode", ["generate", "loglikelihood"])
def test_a_batch_has_one_bos_a_row_and_marks_exactly_the_image_tokens(tiny, items, mode):
    _, processor = tiny
    conversations = [put_question(item, Image.open(item.image), mode=mode, system_prompt=SYSTEM) for item in items[:3]]
    inputs = encode(processor, conversations)

    ids = inputs["input_ids"]
    assert (ids == processor.tokenizer.bos_token_id).sum(dim=1).tolist() == [1, 1, 1]
    assert torch.equal(inputs["token_type_ids"], (ids == processor.tokenizer.image_token_id).long())
    assert inputs["token_type_ids"].sum(dim=1).tolist() == [16, 16, 16]
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1, 1]


def test_an_answer_is_the_option_and_the_turn_end_and_nothing_else(tiny, items):
    tokens = complete(tiny[1], put_question(items[0], None, mode="generate", system_prompt=""), "An impacted tooth.")

    assert tiny[1].tokenizer.decode(tokens) == "An impacted tooth.<end_of_turn>"


def test_generation_lists_the_options_and_asks_for_a_letter_in_the_language_of_the_question(items):
    english = replace(items[2], options={"A": "One {brace}", "B": "", "C": "Two"})

    (turn,) = put_question(english, None, mode="generate", system_prompt="")
    *_, spanish = put_question(items[6], None, mode="generate", system_prompt=SYSTEM)

    assert turn["content"][0]["text"] == (
        "Question: Which abnormality is there? {x}\nOptions:\nA. One {brace}\nC. Two\n"
        "Answer with the letter of the correct option only."
    )
    assert spanish["content"][0]["text"].endswith("Responda solo con la letra de la opción correcta.")


def test_generation_in_a_padded_batch_is_that_of_each_question_alone(tiny, items, tmp_path):
    model, processor = tiny
    lines = answer(tiny, items, tmp_path / "p.jsonl", mode="generate", batch_size=4, max_new_tokens=6)

    for line, item in zip(lines, items, strict=True):
        inputs = ask(tiny, item, Image.open(item.image), mode="generate")
        tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert line["output"] == processor.tokenizer.decode(tokens, skip_special_tokens=True)
        ended = processor.tokenizer.convert_tokens_to_ids("<end_of_turn>") in tokens or len(tokens) < 6
        assert line["finish_reason"] == ("stop" if ended else "length")
        assert line["generation"] == {"do_sample": False, "max_new_tokens": 6}
    assert len({line["output"] for line in lines}) > 4


def test_generation_stops_at_the_turn_end_and_says_so_whatever_the_generation_config(tiny, items, tmp_path):
    model, processor = tiny
    certain = torch.zeros(model.config.text_config.vocab_size)
    certain[processor.tokenizer.convert_tokens_to_ids("<end_of_turn>")] = 1e6
    own_ends = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    hook = model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + certain)
    try:
        (line,) = answer(tiny, items[:1], tmp_path / "p.jsonl", mode="generate", max_new_tokens=4)
    finally:
        hook.remove()
        model.generation_config.eos_token_id = own_ends

    assert (line["output"], line["finish_reason"]) == ("", "stop")


@pytest.mark.parametrize("mode", ["generate", "loglikelihood"])
def test_a_run_that_was_killed_goes_on_to_the_same_answers(tiny, items, tmp_path, mode):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    expected = answer(tiny, items, whole, mode=mode, batch_size=2, max_new_tokens=4)
    content = whole.read_bytes()
    kept = content[: content.index(b"\n", content.index(b"item2")) + 1]
    cut.write_bytes(kept + b'{"item_id": "item3", "outp')

    resumed = answer(tiny, items, cut, mode=mode, batch_size=3, max_new_tokens=4)

    assert cut.read_bytes().startswith(kept)
    assert [line["item_id"] for line in resumed] == [item.item_id for item in items]
    assert [line["output"] for line in resumed] == [line["output"] for line in expected]
    if mode == "loglikelihood":
        assert scores(resumed) == pytest.approx(scores(expected), abs=1e-4)


def test_a_finished_run_is_not_repeated(tiny, items, tmp_path):
    out = tmp_path / "p.jsonl"
    answer(tiny, items, out)
    before = out.read_bytes()

    answer(tiny, items, out)

    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        pytest.param({"mode": "generate"}, "'mode': 'loglikelihood'", id="mode"),
        pytest.param({"images": "blank"}, "'images': 'true'", id="images"),
        pytest.param({"system_prompt": ""}, "'system_prompt': 'You are a dentist.'", id="system prompt"),
        pytest.param({"model_name": "other"}, "'model':", id="model"),
    ],
)
def test_a_file_with_other_settings_is_refused_and_left_alone(tiny, items, tmp_path, changed, named):
    out = tmp_path / "p.jsonl"
    answer(tiny, items[:2], out)
    before = out.read_bytes()

    with pytest.raises(EvaluationError, match=named):
        answer(tiny, items, out, **changed)
    assert out.read_bytes() == before


def test_answers_to_a_changed_question_or_of_changed_weights_are_refused(tiny, items, tmp_path):
    model, _ = tiny
    out = tmp_path / "p.jsonl"
    answer(tiny, items[:2], out)

    with pytest.raises(EvaluationError, match="item_hash"):
        answer(tiny, [replace(items[0], question="Another?"), *items[1:]], out)
    with pytest.raises(EvaluationError, match="do not belong to this run"):
        answer(tiny, items[:1], out)
    model.model.multi_modal_projector.mm_input_projection_weight.data.neg_()
    try:
        with pytest.raises(EvaluationError, match="weights"):
            answer(tiny, items, out)
    finally:
        model.model.multi_modal_projector.mm_input_projection_weight.data.neg_()


def test_blank_images_are_mid_grey_ones_of_the_same_size(tiny, items, tmp_path):
    grey = []
    for item in items:
        Image.new("RGB", Image.open(item.image).size, (128, 128, 128)).save(tmp_path / f"{item.item_id}.png")
        grey.append(replace(item, image=tmp_path / f"{item.item_id}.png"))

    blank = scores(answer(tiny, items, tmp_path / "blank.jsonl", images="blank"))
    by_hand = scores(answer(tiny, grey, tmp_path / "grey.jsonl"))
    true = scores(answer(tiny, items, tmp_path / "true.jsonl"))

    assert blank == pytest.approx(by_hand, abs=1e-4)
    assert all(abs(a - b) > 1e-3 for a, b in zip(blank, true, strict=True))


def test_other_images_are_those_of_another_patient(tiny, items, tmp_path):
    lines = answer(tiny, items, tmp_path / "other.jsonl", images="other")
    files, patients = ({item.image_id: getattr(item, x) for item in items} for x in ("image", "group_id"))
    by_hand = [replace(item, image=files[line["image_shown"]]) for item, line in zip(items, lines, strict=True)]

    assert all(patients[line["image_shown"]] != patients[line["image_id"]] for line in lines)
    expected = answer(tiny, by_hand, tmp_path / "by_hand.jsonl")
    assert scores(lines) == pytest.approx(scores(expected), abs=1e-4)


def test_swapping_is_a_rotation_where_no_patient_has_more_than_half_of_the_images(items):
    many = [replace(items[0], image_id=f"i{n}", group_id=f"g{n // 3}", modality="panoramic") for n in range(12)]
    photos = [replace(items[0], image_id=f"p{n}", group_id=f"h{n}", modality="intraoral_photo") for n in range(2)]

    swapped = swap_images([*many, *photos])

    assert Counter(other.image_id for other in swapped.values()) == Counter(swapped.keys())
    for item in [*many, *photos]:
        other = swapped[item.image_id]
        assert other.group_id != item.group_id
        assert other.modality == item.modality


def test_swapping_copes_with_a_patient_who_has_most_images_and_refuses_a_single_one(items):
    images = [replace(items[0], image_id=f"i{n}", group_id="big" if n < 4 else "small") for n in range(5)]

    assert all(swap_images(images)[f"i{n}"].image_id == "i4" for n in range(4))
    with pytest.raises(EvaluationError, match="a second group_id"):
        swap_images(images[:4])


def test_questions_without_image_are_answered_beside_others(tiny, items, tmp_path):
    mixed = [items[0], replace(items[1], image=None, image_id=None), items[2]]

    together = answer(tiny, mixed, tmp_path / "together.jsonl")
    alone = [answer(tiny, [item], tmp_path / f"{item.item_id}.jsonl")[0] for item in mixed]

    assert scores(together) == pytest.approx(scores(alone), abs=1e-4)
    with pytest.raises(EvaluationError, match="item1 has no image"):
        answer(tiny, mixed, tmp_path / "blank.jsonl", images="blank")
    with pytest.raises(EvaluationError, match="item1 has no image"):
        answer(tiny, mixed, tmp_path / "other.jsonl", images="other")


def test_an_empty_option_is_never_the_answer(tiny, items, tmp_path):
    hole = replace(items[0], options={"A": "", "B": "Caries.", "C": " "})
    nothing = replace(items[1], options={"A": "", "B": ""})

    lines = answer(tiny, [hole], tmp_path / "hole.jsonl") + answer(tiny, [nothing], tmp_path / "nothing.jsonl")

    assert [line["letter"] for line in lines] == ["B", None]
    assert list(lines[0]["option_scores"]) == ["B"]


def test_the_model_trains_on_as_it_did_before(tiny, items, tmp_path):
    tiny[0].train()
    answer(tiny, items[:1], tmp_path / "p.jsonl")

    assert tiny[0].training
    tiny[0].eval()


def test_predictions_of_a_real_run_are_scored_by_their_letters(tiny, items, tmp_path):
    lines = answer(tiny, items, tmp_path / "p.jsonl")
    entries = [
        {"item_id": item.item_id, "question": item.question, "options": item.options, "image_id": item.image_id}
        | {"answer": line["letter"], "image": str(item.image)}
        for item, line in zip(items, lines, strict=True)
    ]

    (tmp_path / "q.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))

    closed = score_predictions(tmp_path / "p.jsonl", tmp_path / "q.jsonl")["closed"]

    assert (closed["accuracy"], closed["n"]) == (1.0, 7)
    assert closed["methods"] == {"loglikelihood": 7}
    assert closed["protocols"] is None  # there is no text to read


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", r"q.jsonl:1: not valid JSON"),
        ("[]", r"q.jsonl:1: expected keys and values, got list"),
        ('{"item_id": "1"}', r"q.jsonl:1: a question needs item_id, question and answer"),
        ('{"item_id": "1", "question": "?", "options": {"A": "x"}, "answer": "B"}', r"answer 'B' is not among A"),
        ("", "holds no question"),
    ],
)
def test_a_bad_question_is_named_by_its_line(tmp_path, line, reason):
    (tmp_path / "q.jsonl").write_text(line)

    with pytest.raises(EvaluationError, match=reason):
        load_questions(tmp_path / "q.jsonl")


def test_gemma_4_is_scored_as_one_option_at_a_time_would_be(tiny_gemma4, items, tmp_path):
    gemma4 = load_pretrained(tiny_gemma4, dtype=torch.float32)
    together = answer(gemma4, items, tmp_path / "together.jsonl", batch_size=4)

    alone = [replace(item, options={letter: text}) for item in items for letter, text in item.options.items()]
    alone = [replace(item, item_id=f"{item.item_id}{letter}") for item in alone for letter in item.options]
    singly = answer(gemma4, alone, tmp_path / "singly.jsonl", batch_size=1)

    assert scores(together) == pytest.approx(scores(singly), abs=1e-4)
    assert len(set(scores(together))) > len(items)


def test_gemma_4_writes_the_same_in_batches_and_alone(tiny_gemma4, items, tmp_path):
    gemma4 = load_pretrained(tiny_gemma4, dtype=torch.float32)
    _untie(gemma4[0])
    outputs = [
        [line["output"] for line in answer(gemma4, items, tmp_path / f"{size}.jsonl", mode="generate", batch_size=size)]
        for size in (1, 4)
    ]

    assert outputs[0] == outputs[1]
    assert len(set(outputs[0])) > 3
