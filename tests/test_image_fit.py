"""Crops of long pictures: the same in training and in asking, in the folder of each stage and in the merged model."""

import ast
import io
import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Image, List
from PIL import Image as PillowImage
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
from transformers.models import gemma3

from data_builders.chat import answer_messages, prompt_messages
from data_builders.phantom import make_phantoms
from dentalgemma.evaluation.generation import evaluate_questions
from dentalgemma.evaluation.questions import EvaluationError, Question, read_predictions
from dentalgemma.models.loading import find_start, load_model
from dentalgemma.models.processors import (
    CROP_OPTIONS,
    ImageFitError,
    count_crops,
    crop_options,
    image_fit,
    load_processor,
    picture_tokens,
    set_image_fit,
    take_image_fit,
    write_image_fit,
    write_picture,
)
from dentalgemma.training.data import ChatCollator, open_image
from dentalgemma.training.lengths import row_lengths

QUESTION = "Which teeth are affected?"
SIZES = list(itertools.product((40, 111, 112, 150, 224, 333, 448, 900, 1300), repeat=2))


@pytest.fixture(scope="module")
def phantom():
    """A phantom radiograph, 448 by 224 pixels."""
    return next(iter(make_phantoms(1, seed=5))).image.convert("RGB")


@pytest.fixture(scope="module")
def base(tiny_model, tmp_path_factory):
    """The small model, whose image processor asks for crops of at least 112 pixels where 256 is usual."""
    folder = tmp_path_factory.mktemp("base") / "base"
    shutil.copytree(tiny_model, folder)
    path = folder / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["image_processor"]["pan_and_scan_min_crop_size"] = 112
    path.write_text(json.dumps(settings))
    return folder


@pytest.fixture
def cropping(base):
    processor = load_processor(base)
    set_image_fit(processor, "pan_and_scan")
    return processor


def conversation(picture):
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": parts}]


def ask(processor, *pictures):
    """Tokens and pixels as a plain transformers user gets them."""
    return processor.apply_chat_template(
        [conversation(picture) for picture in pictures],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


def stored(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def rows_of(*pictures):
    rows = [
        {"prompt": prompt_messages(QUESTION, ""), "completion": answer_messages("36."), "images": own}
        for own in pictures
    ]
    return Dataset.from_list(rows).cast_column("images", List(Image(decode=False)))


def blank(height, width):
    return PillowImage.new("RGB", (width, height), (90, 90, 90))


def test_a_phantom_is_seen_whole_and_in_two_halves(cropping, base, phantom):
    seen, stretched = ask(cropping, phantom), ask(load_processor(base), phantom)
    left, right = (stretched_alone(base, phantom.crop(box)) for box in ((0, 0, 224, 224), (224, 0, 448, 224)))

    assert phantom.size == (448, 224)
    assert seen["pixel_values"].shape == (3, 3, 112, 112)
    assert torch.equal(seen["pixel_values"][:1], stretched["pixel_values"])
    assert torch.equal(seen["pixel_values"][1:2], left)
    assert torch.equal(seen["pixel_values"][2:], right)
    assert (seen["input_ids"] == cropping.tokenizer.image_token_id).sum() == 3 * cropping.image_seq_length


def stretched_alone(base, picture):
    return ask(load_processor(base), picture)["pixel_values"]


@pytest.mark.parametrize(("height", "width"), [(224, 260), (224, 224), (200, 230), (90, 400)], ids=str)
def test_a_picture_near_square_or_too_small_is_not_cropped(cropping, base, height, width):
    """Crops begin at a ratio of 1.2, and are no smaller than the image processor says."""
    own, plain = ask(cropping, blank(height, width)), ask(load_processor(base), blank(height, width))

    assert own.keys() == plain.keys()
    assert all(torch.equal(own[key], plain[key]) for key in own)


def test_training_and_asking_give_the_same_tokens_and_pixels(cropping, phantom):
    rows = rows_of([stored(phantom)])
    batch = ChatCollator(cropping)([rows[0]])
    asked = ask(cropping, phantom)
    length = asked["input_ids"].shape[1]

    assert torch.equal(batch["input_ids"][:, :length], asked["input_ids"])
    assert torch.equal(batch["token_type_ids"][:, :length], asked["token_type_ids"])
    assert torch.equal(batch["pixel_values"], asked["pixel_values"])
    assert (batch["labels"][0, :length] == -100).all()


@pytest.mark.parametrize("options", [{}, {"do_pan_and_scan": True}], ids=["stretched", "cropped"])
def test_what_is_written_for_a_picture_is_what_the_processor_writes(base, options):
    processor = load_processor(base)
    if options:
        set_image_fit(processor, "pan_and_scan")
    for height, width in SIZES[::5]:
        tokens = picture_tokens(processor, height, width)
        text = f"a {processor.image_token} b"
        theirs = processor(text=[text], images=[[blank(height, width)]], add_special_tokens=False)["input_ids"][0]
        ours = text.replace(processor.image_token, write_picture(processor, tokens))

        assert processor.tokenizer(ours, add_special_tokens=False)["input_ids"] == theirs


def test_what_is_written_for_a_picture_is_what_gemma_4_writes(tiny_gemma4):
    processor = load_processor(tiny_gemma4)
    for height, width in SIZES[::7]:
        tokens = picture_tokens(processor, height, width)
        text = f"a {processor.image_token} b"
        theirs = processor(text=[text], images=[[blank(height, width)]], add_special_tokens=False, padding=False)
        ours = text.replace(processor.image_token, write_picture(processor, tokens))

        assert processor.tokenizer(ours, add_special_tokens=False, padding=False)["input_ids"] == theirs["input_ids"][0]


def test_tokens_that_no_number_of_crops_makes_are_refused(cropping):
    with pytest.raises(ValueError, match="17 image tokens are no multiple of the 16"):
        write_picture(cropping, 17)


def test_lengths_count_crops_from_headers(cropping, phantom):
    """Also of a picture turned by EXIF, of several in a row, and of one that is cut off after its header."""
    turned = PillowImage.Exif()
    turned[0x0112] = 6
    pictures = [
        [stored(phantom)],
        [stored(blank(224, 230)), stored(blank(1000, 300)), stored(phantom)],
        [stored(blank(300, 700), "JPEG", exif=turned)],
        [],
    ]
    rows = rows_of(*pictures)
    collator = ChatCollator(cropping)
    whole = stored(phantom)["bytes"]
    cut = rows_of([{"bytes": whole[:60], "path": None}])

    assert row_lengths(rows, cropping) == [int(collator([row])["attention_mask"].sum()) for row in rows]
    assert row_lengths(cut, cropping) == row_lengths(rows.select([0]), cropping)


def test_a_quarter_turn_shows_in_the_crops_and_not_in_their_number(cropping):
    """A panoramic stored upright, with the tag that turns it, is cropped as it is displayed."""
    turned = PillowImage.Exif()
    turned[0x0112] = 6
    upright = PillowImage.fromarray(np.random.default_rng(0).integers(0, 256, (448, 224, 3), dtype=np.uint8))
    opened = open_image(stored(upright, "PNG", exif=turned))
    displayed = ask(cropping, opened)["pixel_values"]

    assert opened.size == (448, 224)
    assert picture_tokens(cropping, 448, 224) == picture_tokens(cropping, 224, 448) == 48
    assert torch.equal(displayed[1:2], ask(cropping, opened.crop((0, 0, 224, 224)))["pixel_values"])


def test_crops_are_counted_as_the_processor_makes_them(cropping):
    counted = [count_crops(cropping, height, width) for height, width in SIZES]
    made = [cropping.image_processor(blank(*size))["num_crops"][0] for size in SIZES]

    assert counted == made
    assert set(counted) == {0, 2, 3, 4}


def test_the_processor_with_torchvision_crops_by_the_same_rule(cropping):
    """It is not installed here: its rule is taken from the source, and asked without the rest."""
    tree = ast.parse(Path(gemma3.__file__).with_name("image_processing_gemma3.py").read_text(encoding="utf-8"))
    rule = next(node for node in ast.walk(tree) if getattr(node, "name", None) == "pan_and_scan_batched")
    names = {"itertools": itertools, "math": math}
    exec(ast.unparse(rule), names)
    options = {name: value for name, value in crop_options(cropping).items() if name != "do_pan_and_scan"}
    for height, width in SIZES:
        picture = np.arange(height * width).reshape(1, height, width)
        theirs = names["pan_and_scan_batched"](None, picture, **options)
        ours = cropping.image_processor.pan_and_scan(picture, **options)

        assert len(theirs) == len(ours)
        assert all(np.array_equal(a, b) for a, b in zip(theirs, ours, strict=True))


def test_what_the_saved_image_processor_says_alone_is_not_heard(base, phantom, tmp_path):
    """Why the option stands with the tokenizer too: when this fails, transformers has come to hear it."""
    processor = AutoProcessor.from_pretrained(base)
    processor.image_processor.do_pan_and_scan = True
    shutil.copytree(base, tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    plain, ours = AutoProcessor.from_pretrained(tmp_path / "model"), load_processor(tmp_path / "model")

    assert plain.image_processor.do_pan_and_scan
    assert len(ask(plain, phantom)["pixel_values"]) == 1
    assert image_fit(ours) == "stretch"
    assert not ours.image_processor.do_pan_and_scan  # asked alone, it does what the whole processor does


def test_a_saved_processor_crops_for_whoever_loads_it(cropping, phantom, tmp_path):
    cropping.save_pretrained(tmp_path)
    plain = AutoProcessor.from_pretrained(tmp_path)
    expected, found = ask(cropping, phantom), ask(plain, phantom)

    assert crop_options(plain) == crop_options(cropping)
    assert crop_options(plain)["pan_and_scan_min_crop_size"] == 112
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert len(plain.image_processor(phantom)["pixel_values"]) == 3


def test_stretch_takes_the_option_back_and_none_leaves_it(cropping, base, tmp_path):
    set_image_fit(cropping, None)
    kept = image_fit(cropping)
    set_image_fit(cropping, "stretch")
    cropping.save_pretrained(tmp_path)

    assert (kept, image_fit(cropping), image_fit(AutoProcessor.from_pretrained(tmp_path))) == (
        "pan_and_scan",
        "stretch",
        "stretch",
    )
    assert not cropping.image_processor.do_pan_and_scan
    assert "do_pan_and_scan" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


def test_stretch_changes_nothing_in_a_plain_base(base, tmp_path):
    processor = load_processor(base)
    processor.save_pretrained(tmp_path / "before")
    set_image_fit(processor, "stretch")
    processor.save_pretrained(tmp_path / "after")

    for name in ("processor_config.json", "tokenizer_config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


def test_gemma_4_keeps_shapes_and_takes_no_fit(tiny_gemma4):
    processor = load_processor(tiny_gemma4)
    set_image_fit(processor, None)

    assert image_fit(processor) is None
    with pytest.raises(ImageFitError, match=r"image_fit: stretch: Gemma4Processor .* keeps each picture's shape"):
        set_image_fit(processor, "stretch")


def test_a_fit_that_there_is_not_is_refused(base):
    with pytest.raises(ImageFitError, match="'crop' is unknown; choose among stretch, pan_and_scan"):
        set_image_fit(load_processor(base), "crop")


def test_files_of_a_model_keep_all_but_the_fit(cropping, base, tmp_path):
    shutil.copytree(base, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    write_image_fit(load_processor(base), tmp_path / "model")
    untouched = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    write_image_fit(cropping, tmp_path / "model")
    written = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())

    assert untouched == before
    assert {name: written.pop(name) for name in CROP_OPTIONS} == crop_options(cropping)
    assert written == json.loads(before["tokenizer_config.json"])
    write_image_fit(load_processor(base), tmp_path / "model")
    assert image_fit(AutoProcessor.from_pretrained(tmp_path / "model")) == "stretch"


def test_an_adapter_without_a_processor_leaves_the_fit_of_the_base(cropping, tmp_path):
    take_image_fit(cropping, tmp_path)

    assert image_fit(cropping) == "pan_and_scan"


@pytest.fixture(scope="module")
def chain(base, make_trainer, tmp_path_factory):
    """Two stages and their merged model: the first sets pan and scan, the second says nothing of it."""
    from dentalgemma.merging import merge_adapter

    folder = tmp_path_factory.mktemp("chain")
    first = make_trainer(base, folder / "first", max_steps=1, rows=4, image_fit="pan_and_scan")
    first.train()
    first.save_model()
    second = make_trainer(folder / "first", folder / "second", max_steps=1, rows=4)
    second.train()
    second.save_model()
    merge_adapter(folder / "second", folder / "merged", dtype="float32")
    return folder


@pytest.mark.slow
@pytest.mark.known_bug(16)
def test_the_fit_travels_through_stages_and_merge_to_plain_transformers(chain, cropping, phantom):
    expected = ask(cropping, phantom)
    for name in ("first", "second", "merged"):
        plain = AutoProcessor.from_pretrained(chain / name)
        found = ask(plain, phantom)

        assert crop_options(plain) == crop_options(cropping)
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    older = json.loads((chain / "merged" / "preprocessor_config.json").read_text())
    assert {name: older[name] for name in CROP_OPTIONS} == crop_options(cropping)


@pytest.mark.slow
def test_an_adapter_in_the_chain_of_a_run_knows_its_fit(chain):
    kept = find_start(chain / "second").adapters[0]

    assert kept.parent.name == "chain"
    assert take_fit_of(kept, chain) == "pan_and_scan"


def take_fit_of(adapter, chain):
    from trl import ModelConfig

    _, processor = load_model(ModelConfig(model_name_or_path=str(adapter), dtype="float32"))
    return image_fit(processor)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pictures"), [("merged", 3), ("base", 1)])
def test_a_pipeline_on_the_merged_model_crops(name, pictures, chain, base, phantom):
    asked, seen = pipeline("image-text-to-text", model=str({"merged": chain / "merged", "base": base}[name])), []
    asked.model.model.vision_tower.register_forward_pre_hook(
        lambda tower, args, kwargs: seen.append(kwargs["pixel_values"].shape[0]), with_kwargs=True
    )
    answers = asked(conversation(phantom), max_new_tokens=2, return_full_text=False)

    assert seen == [pictures]
    assert isinstance(answers[0]["generated_text"], str)


@pytest.fixture(scope="module")
def questions(phantom, tmp_path_factory):
    """Of phantoms, of a square one, and one without a picture."""
    folder = tmp_path_factory.mktemp("questions")
    pictures = [phantom, phantom.resize((224, 224)), phantom.transpose(PillowImage.Transpose.FLIP_LEFT_RIGHT), None]
    items = []
    for number, picture in enumerate(pictures):
        path = None if picture is None else folder / f"{number}.png"
        if picture is not None:
            picture.save(path)
        items.append(
            Question(
                item_id=f"q{number}",
                question=QUESTION,
                options={"A": "36.", "B": "None at all."},
                answer="A",
                image=path,
                image_id=f"i{number}",
                group_id=f"g{number}",
                question_type="diagnosis",
                language="en",
            )
        )
    return items


def test_options_are_scored_with_the_crops_of_their_own_picture(base, cropping, questions, tmp_path):
    """In one batch of pictures with and without crops as each question alone."""
    model = AutoModelForImageTextToText.from_pretrained(base)
    settings = {"mode": "loglikelihood", "progress": False}
    evaluate_questions(model, cropping, questions, out=tmp_path / "batch.jsonl", batch_size=4, **settings)
    evaluate_questions(model, cropping, questions, out=tmp_path / "alone.jsonl", batch_size=1, **settings)
    stretched = load_processor(base)
    evaluate_questions(model, stretched, questions, out=tmp_path / "stretched.jsonl", batch_size=4, **settings)
    batch, alone, other = (scores(tmp_path / f"{name}.jsonl") for name in ("batch", "alone", "stretched"))

    assert batch == pytest.approx(alone, abs=1e-4)
    assert [a == pytest.approx(b, abs=1e-4) for a, b in zip(batch, other, strict=True)] == [False] * 2 + [True] * 2 + [
        False
    ] * 2 + [True] * 2


def test_answers_to_pictures_fitted_otherwise_are_not_gone_on_with(base, cropping, questions, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(base)
    settings = {"mode": "loglikelihood", "progress": False, "out": tmp_path / "answers.jsonl"}
    evaluate_questions(model, cropping, questions[:1], **settings)

    with pytest.raises(EvaluationError, match=r"\{'image_fit': 'pan_and_scan'\} there, \{'image_fit': None\} here"):
        evaluate_questions(model, load_processor(base), questions, **settings)


def scores(path):
    lines = sorted(read_predictions(path).values(), key=lambda line: line["item_id"])
    return [score["sum"] for line in lines for score in line["option_scores"].values()]


@pytest.mark.slow
def test_crops_out_of_the_cache_train_as_live_ones(base, make_trainer, tmp_path):
    """Three steps with the same losses; one stretched run that must differ."""

    def train(name, **options):
        trainer = make_trainer(base, tmp_path / name, rows=12, logging_steps=1, **options)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    crops = {"image_fit": "pan_and_scan"}
    cached = train("cached", vision_features="cached", **crops)
    live = train("live", vision_features="live", **crops)

    assert len(cached) == 3
    assert cached == live
    assert train("stretched", vision_features="cached") != cached


@pytest.mark.slow
def test_packed_questions_share_a_picture_and_its_crops(base, make_trainer, tmp_path):
    trainer = make_trainer(base, tmp_path / "run", rows=12, image_fit="pan_and_scan", pack_questions=4)
    trainer.encode()
    batch = next(iter(trainer.get_train_dataloader()))
    tokens = (batch["input_ids"] == trainer.processing_class.tokenizer.image_token_id).sum(dim=1)

    assert len(batch["input_ids"]) < 4  # rows of the batch
    assert (tokens == 48).all()
    assert len(batch["image_features"]) == tokens.sum()
