"""What the model is trained on: the answer and its turn end, nothing else; and the same tensors as TRL's collator."""

import copy
import io
import re

import numpy as np
import pytest
import torch
from datasets import Dataset, Image, List, load_dataset
from PIL import Image as PillowImage
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from data_builders.chat import answer_messages, prompt_messages
from dentalgemma.models.loading import load_pretrained
from dentalgemma.models.processors import load_processor
from dentalgemma.training.batches import split_rows
from dentalgemma.training.config import StageConfig
from dentalgemma.training.data import IGNORED, ChatCollator, DatasetError, check_batch, load_splits, open_image

TURN_ENDS = {"gemma3": "<end_of_turn>\n", "gemma4": "<turn|>\n"}


@pytest.fixture(scope="module", params=["gemma3", "gemma4"])
def folder(request, tiny_model, tiny_gemma4):
    return {"gemma3": tiny_model, "gemma4": tiny_gemma4}[request.param]


@pytest.fixture(scope="module")
def processor(folder):
    return load_processor(folder)


@pytest.fixture(scope="module")
def turn_end(processor):
    return TURN_ENDS["gemma3" if "token_type_ids" in processor.model_input_names else "gemma4"]


@pytest.fixture(scope="module")
def rows(vqa_dataset):
    dataset = load_dataset(str(vqa_dataset), split="train").cast_column("images", List(Image(decode=False)))
    return [dataset[number] for number in range(0, 60, 10)]


@pytest.fixture
def text_rows():
    return [
        {"prompt": prompt_messages("What is caries?"), "completion": answer_messages("A disease of teeth.")},
        {"prompt": prompt_messages("And this?", ""), "completion": answer_messages("It is none.")},
    ]


def decode_labels(batch, processor, row):
    return processor.tokenizer.decode(batch["labels"][row][batch["labels"][row] != IGNORED])


def token_types(batch):
    return batch["token_type_ids"] if "token_type_ids" in batch else batch["mm_token_type_ids"]


def picture(mode="RGB", size=(90, 60), kind="PNG"):
    """A picture of noise, as the bytes of its file."""
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PillowImage.fromarray(noise).convert(mode).save(buffer, kind)
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.mark.known_bug(1)
@pytest.mark.known_bug(3)
def test_labels_are_answer_and_turn_end_and_nothing_else(rows, processor, turn_end):
    batch = ChatCollator(processor)(rows)

    for number, row in enumerate(rows):
        assert decode_labels(batch, processor, number) == row["completion"][0]["content"] + turn_end


@pytest.mark.known_bug(1)
@pytest.mark.known_bug(2)
def test_every_row_has_one_bos_and_no_label_on_an_image_token(rows, processor):
    batch = ChatCollator(processor)(rows)
    is_image = batch["input_ids"] == processor.tokenizer.image_token_id

    assert ((batch["input_ids"] == processor.tokenizer.bos_token_id).sum(1) == 1).all()
    assert (batch["labels"] != processor.tokenizer.image_token_id).all()
    assert (is_image.sum(1) >= 16).all()
    assert ((token_types(batch) == 1) == is_image).all()
    assert len(batch["pixel_values"]) == len(rows)


@pytest.mark.known_bug(6)
def test_rows_without_images_say_so_too(text_rows, processor, turn_end):
    batch = ChatCollator(processor)(text_rows)

    assert "pixel_values" not in batch
    assert token_types(batch).shape == batch["input_ids"].shape
    assert not token_types(batch).any()
    assert decode_labels(batch, processor, 0) == "A disease of teeth." + turn_end
    assert ((batch["input_ids"] == processor.tokenizer.bos_token_id).sum(1) == 1).all()


@pytest.mark.known_bug(6)
def test_the_mark_of_image_tokens_reaches_the_model_and_matters(rows, folder):
    """Without it the model computes something else, and says nothing."""
    model, processor = load_pretrained(folder, dtype=torch.float32)
    batch = ChatCollator(processor)(rows[:1])
    key = "token_type_ids" if "token_type_ids" in batch else "mm_token_type_ids"
    unmarked = {name: tensor for name, tensor in batch.items() if name not in (key, "labels")}
    with torch.no_grad():
        marked = model(**unmarked, **{key: batch[key]}).logits
        silent = model(**unmarked).logits

    assert (marked - silent).abs().max() > 1e-3


def test_a_batch_may_mix_rows_with_none_one_and_several_images(rows, text_rows, processor):
    two = {**rows[1], "images": [*rows[1]["images"], picture(size=(40, 160))]}
    collator = ChatCollator(processor)
    batch = collator([text_rows[0], rows[0], two])
    alone = [collator([row]) for row in (text_rows[0], rows[0], two)]
    is_image = batch["input_ids"] == processor.tokenizer.image_token_id

    assert is_image.sum(1).tolist() == [(own["input_ids"] == processor.tokenizer.image_token_id).sum() for own in alone]
    assert len(batch["pixel_values"]) == 3
    for key in batch.keys() - {"input_ids", "attention_mask", "labels", "token_type_ids", "mm_token_type_ids"}:
        assert torch.equal(batch[key], torch.cat([own[key] for own in alone[1:]])), key
    for number, own in enumerate(alone):
        assert torch.equal(batch["input_ids"][number, batch["attention_mask"][number] == 1], own["input_ids"][0])


def test_a_row_trains_alike_alone_and_in_a_mixed_batch(rows, text_rows, folder):
    """Variable numbers of patches per picture end up with the row that they belong to."""
    model, processor = load_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    two = {**rows[1], "images": [picture(size=(40, 160)), *rows[1]["images"]]}
    collator = ChatCollator(processor)
    kinds = [rows[0], text_rows[0], two]
    with torch.no_grad():
        together = collator(kinds)
        logits = model(**{key: tensor for key, tensor in together.items() if key != "labels"}).logits
        for number, row in enumerate(kinds):
            own = collator([row])
            alone = model(**{key: tensor for key, tensor in own.items() if key != "labels"}).logits[0]
            assert torch.allclose(logits[number, : len(alone)], alone, atol=2e-3), number


@pytest.mark.known_bug(6)
def test_the_batch_is_the_one_trl_makes(rows, processor):
    ours = ChatCollator(processor)(rows)
    decoded = load_rows_as_trl_does(rows)
    theirs = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)(decoded)

    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], torch.as_tensor(theirs[key])), key


def test_a_mixed_batch_is_the_one_trl_makes(rows, text_rows, processor):
    mixed = [{**text_rows[0], "images": []}, rows[0], {**rows[1], "images": [*rows[1]["images"], *rows[2]["images"]]}]
    ours = ChatCollator(processor)(mixed)
    theirs = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)(load_rows_as_trl_does(mixed))

    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], torch.as_tensor(theirs[key])), key


def test_a_dialogue_trains_its_last_answer_alone(rows, processor, turn_end):
    history = [*rows[0]["prompt"], *rows[0]["completion"], {"role": "user", "content": "And elsewhere?"}]
    row = {**rows[0], "prompt": history, "completion": answer_messages("Nothing else.")}
    collator = ChatCollator(processor)
    batch = collator([row])

    assert decode_labels(batch, processor, 0) == "Nothing else." + turn_end
    assert token_types(batch).sum() == token_types(collator([rows[0]])).sum()


@pytest.mark.known_bug(7)
def test_images_stay_where_the_messages_put_them(processor):
    parts = [{"type": "text", "text": "Before:"}, {"type": "image"}, {"type": "text", "text": "after:"}]
    parts = [*parts, {"type": "image", "text": None}, {"type": "text", "text": "which is worse?", "image": None}]
    row = {"prompt": [{"role": "user", "content": parts}], "completion": answer_messages("The first.")}
    collator = ChatCollator(processor)
    ids = collator([{**row, "images": [picture(), picture(size=(50, 50))]}])["input_ids"][0]
    text = processor.tokenizer.decode(ids).replace(processor.tokenizer.image_token, "")
    start, end = (re.escape(token) for token in (processor.tokenizer.boi_token, processor.tokenizer.eoi_token))

    assert re.search(rf"Before:\s*{start}{end}\s*after:\s*{start}{end}\s*which is worse\?", text)


@pytest.mark.known_bug(7)
@pytest.mark.parametrize(
    ("content", "count", "message"),
    [
        pytest.param([{"type": "image"}, {"type": "text", "text": "?"}], 2, "images: 2, places .*: 1", id="two"),
        pytest.param([{"type": "image"}, {"type": "text", "text": "?"}], 0, "images: 0, places .*: 1", id="no image"),
        pytest.param("What is IMAGE_TOKEN?", 0, "images: 0, places .*: 1", id="place in the words"),
    ],
)
def test_more_or_fewer_places_than_images_are_refused(processor, content, count, message):
    if isinstance(content, str):
        content = content.replace("IMAGE_TOKEN", processor.image_token)
    row = {"row_id": "a7", "prompt": [{"role": "user", "content": content}], "completion": answer_messages("Yes.")}

    with pytest.raises(DatasetError, match=f"^row a7: {message}"):
        ChatCollator(processor)([{**row, "images": [picture()] * count}])


@pytest.mark.known_bug(7)
def test_a_row_without_a_user_has_no_place_for_its_image(processor):
    row = {"row_id": "b1", "prompt": [{"role": "assistant", "content": "Hm."}], "completion": answer_messages("Yes.")}

    with pytest.raises(DatasetError, match=r"row b1: (images: 1, places .*: 0|the chat template refuses it)"):
        ChatCollator(processor)([{**row, "images": [picture()]}])


@pytest.mark.known_bug(7)
@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "I;16"])
def test_pictures_of_every_mode_become_rgb(processor, mode):
    row = {"prompt": prompt_messages("What?"), "completion": answer_messages("Noise."), "images": [picture(mode)]}
    batch = ChatCollator(processor)([row])

    assert open_image(picture(mode)).mode == "RGB"
    assert torch.isfinite(batch["pixel_values"]).all()


def test_pictures_come_as_bytes_paths_or_opened(tmp_path):
    stored = picture()
    (tmp_path / "a.png").write_bytes(stored["bytes"])
    forms = [stored, stored["bytes"], tmp_path / "a.png", {"bytes": None, "path": str(tmp_path / "a.png")}]
    pixels = [np.asarray(open_image(form)) for form in [*forms, PillowImage.open(tmp_path / "a.png")]]

    assert all(np.array_equal(pixels[0], other) for other in pixels[1:])


@pytest.mark.known_bug(7)
@pytest.mark.parametrize("broken", [{"bytes": b"no picture", "path": None}, {"bytes": None, "path": None}])
def test_a_broken_image_names_its_row(processor, rows, broken):
    row = {**rows[1], "row_id": "x9", "images": [*rows[1]["images"], broken]}

    with pytest.raises(DatasetError, match=r"^row x9: image 2 cannot be read: "):
        ChatCollator(processor)([rows[0], row])


def test_an_error_in_a_worker_is_one_sentence_too(processor, rows):
    row = {**rows[1], "row_id": "x9", "images": [{"bytes": b"no picture", "path": None}]}
    loader = torch.utils.data.DataLoader([rows[0], row], 2, num_workers=1, collate_fn=ChatCollator(processor))

    with pytest.raises(DatasetError, match=r"\Arow x9: image 1 cannot be read: [^\n]+\Z"):
        next(iter(loader))


@pytest.mark.known_bug(7)
def test_no_image_is_decoded_before_its_batch(tmp_path):
    """A dataset of pictures that nobody can decode loads; its rows hold bytes."""
    rows = {"prompt": [prompt_messages("?")] * 3, "completion": [answer_messages("!")] * 3}
    for split in ("train", "validation"):
        data = Dataset.from_dict({**rows, "images": [[{"bytes": b"no picture", "path": None}]] * 3})
        data.cast_column("images", List(Image(decode=False))).to_parquet(tmp_path / f"{split}.parquet")
    loaded = load_splits(StageConfig(dataset_name=str(tmp_path), dataset_test_split="validation"))

    assert loaded["train"][0]["images"] == [{"bytes": b"no picture", "path": None}]


@pytest.mark.known_bug(7)
def test_loading_copies_no_picture(vqa_dataset):
    """`cast_column` would write all of them to a second file."""
    plain = load_dataset(str(vqa_dataset), split="train")
    loaded = load_splits(StageConfig(dataset_name=str(vqa_dataset), dataset_test_split="validation"))["train"]
    again = load_splits(StageConfig(dataset_name=str(vqa_dataset), dataset_test_split="validation"))["train"]

    assert loaded.cache_files == plain.cache_files
    assert loaded._fingerprint == again._fingerprint
    assert loaded[0]["images"][0]["bytes"]


@pytest.mark.parametrize(
    "images",
    [
        pytest.param(["PATH"], id="paths"),
        pytest.param([], id="none in the whole dataset"),
        pytest.param(None, id="nothing in the whole dataset"),
    ],
)
def test_images_may_be_paths_or_nowhere(tmp_path, images, processor):
    (tmp_path / "data").mkdir()
    PillowImage.new("L", (50, 40)).save(tmp_path / "a.png")
    own = [str(tmp_path / "a.png")] if images else images
    row = {"prompt": prompt_messages("?"), "completion": answer_messages("!"), "images": own}
    for split in ("train", "validation"):
        Dataset.from_list([row] * 2).to_json(tmp_path / "data" / f"{split}.jsonl")
    stage = StageConfig(dataset_name=str(tmp_path / "data"), dataset_test_split="validation")
    loaded = load_splits(stage)["train"]
    batch = ChatCollator(processor)([loaded[0], loaded[1]])

    assert ("pixel_values" in batch) == bool(own)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        pytest.param({"prompt": "a", "completion": "b"}, "holds texts where lists of messages are needed", id="texts"),
        pytest.param(
            {"prompt": prompt_messages("?"), "completion": answer_messages("!"), "images": "a.png"},
            "must be a list of images in every row",
            id="one image, no list",
        ),
    ],
)
def test_columns_of_another_form_are_refused(tmp_path, row, message):
    for split in ("train", "validation"):
        Dataset.from_list([row]).to_json(tmp_path / f"{split}.jsonl")

    with pytest.raises(DatasetError, match=message):
        load_splits(StageConfig(dataset_name=str(tmp_path), dataset_test_split="validation"))


def test_an_empty_prompt_names_its_row(processor):
    row = {"row_id": "e1", "prompt": [], "completion": answer_messages("!")}

    with pytest.raises(DatasetError, match="row e1: its prompt is empty"):
        ChatCollator(processor)([row])


def test_the_rows_are_left_as_they_were(rows, processor):
    before = copy.deepcopy(rows)
    ChatCollator(processor)(rows)

    assert rows == before


def damage_batch(batch, processor, damage):
    key = "token_type_ids" if "token_type_ids" in batch else "mm_token_type_ids"
    first = int((batch["labels"][0] != IGNORED).nonzero()[0, 0])
    last = int((batch["labels"][0] != IGNORED).nonzero()[-1, 0])
    if damage == "prompt":
        batch["labels"][0, first - 3 : first] = batch["input_ids"][0, first - 3 : first]
    elif damage == "everything":
        batch["labels"] = batch["input_ids"].clone()
    elif damage == "bos":
        batch["input_ids"][0, 1] = processor.tokenizer.bos_token_id
    elif damage == "cut":
        batch["labels"][0, last - 1 : last + 1] = IGNORED
    elif damage == "nothing trained":
        batch["labels"][0] = IGNORED
    elif damage == "no marks":
        del batch[key]
    elif damage == "wrong marks":
        batch[key][0, first] = 1
    else:
        batch["pixel_values"] = batch["pixel_values"][1:]
        if "image_position_ids" in batch:
            batch["image_position_ids"] = batch["image_position_ids"][1:]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        pytest.param("prompt", "labels are not the answer alone", marks=pytest.mark.known_bug(1)),
        pytest.param("everything", "image tokens are in the labels", marks=pytest.mark.known_bug(1)),
        pytest.param("bos", "<bos> occurs 2 times", marks=pytest.mark.known_bug(2)),
        pytest.param("cut", "the turn end occurs 0 times", marks=pytest.mark.known_bug(3)),
        pytest.param("nothing trained", "no token is trained", marks=pytest.mark.known_bug(1)),
        pytest.param("no marks", "token_type_ids is missing", marks=pytest.mark.known_bug(6)),
        pytest.param("wrong marks", "token_type_ids does not mark the image tokens", marks=pytest.mark.known_bug(6)),
        pytest.param("a picture less", "the pictures make ", marks=pytest.mark.known_bug(7)),
    ],
)
def test_a_damaged_batch_is_told_in_a_sentence(rows, processor, damage, sentence):
    batch = ChatCollator(processor)(rows[:2])
    sound = check_batch(batch, processor)
    damage_batch(batch, processor, damage)

    assert sound == []
    assert any(sentence in problem for problem in check_batch(batch, processor))


@pytest.mark.known_bug(2)
def test_a_template_that_doubles_bos_stops_the_first_batch(folder, rows):
    processor = load_processor(folder)
    processor.chat_template = "{{ bos_token }}" + processor.chat_template

    with pytest.raises(DatasetError, match=f"^row {rows[0]['row_id']}: <bos> occurs 2 times"):
        ChatCollator(processor)(rows[:1])


def test_an_answer_is_trained_after_what_generation_puts_before_it(tiny_gemma4, text_rows):
    """Templates of large Gemma 4 open the model's turn with an empty thought, for generation alone."""
    processor = load_processor(tiny_gemma4)
    head, opening, tail = processor.chat_template.rpartition("{{- '<|turn>model\\n' -}}")
    processor.chat_template = head + opening + "{{- '<|channel>thought\\n<channel|>' -}}" + tail
    collator = ChatCollator(processor)
    batch = collator(text_rows)
    prompt, answer = collator.render(text_rows[0], 0)
    text = processor.tokenizer.decode(batch["input_ids"][0][batch["attention_mask"][0] == 1])

    assert prompt.endswith("<|turn>model\n<|channel>thought\n<channel|>")
    assert text == prompt + answer
    assert decode_labels(batch, processor, 0) == "A disease of teeth.<turn|>\n"


@pytest.mark.known_bug(1)
def test_an_answer_with_an_image_token_stops_its_batch(processor, text_rows):
    row = {**text_rows[0], "row_id": "c3", "completion": answer_messages(f"See {processor.tokenizer.image_token} here")}

    with pytest.raises(DatasetError, match=r"^row c3: (image tokens are in the labels|images: 0, places .*: 1)"):
        ChatCollator(processor)([row])


@pytest.mark.known_bug(3)
def test_an_empty_answer_or_a_turn_end_within_one_stops_its_batch(processor, text_rows, turn_end):
    for answer, sentence in (("  ", "its answer is empty"), (f"No.{turn_end}Yes.", "the turn end occurs 2 times")):
        with pytest.raises(DatasetError, match=sentence):
            ChatCollator(processor)([{**text_rows[0], "completion": answer_messages(answer)}])


@pytest.mark.known_bug(3)
def test_a_pad_token_that_ends_turns_stops_the_first_batch(folder, text_rows):
    processor = load_processor(folder)
    processor.tokenizer.pad_token = processor.tokenizer.eos_token

    with pytest.raises(DatasetError, match="pads with '<eos>'"):
        ChatCollator(processor)(text_rows)


def test_a_dataset_without_answers_is_refused(tmp_path, vqa_dataset):
    bare = load_dataset(str(vqa_dataset)).remove_columns("completion")
    bare.save_to_disk(str(tmp_path / "bare"))

    with pytest.raises(DatasetError, match="completion"):
        load_splits(StageConfig(dataset_name=str(tmp_path / "bare"), dataset_test_split="validation"))
    with pytest.raises(DatasetError, match="no split 'dev', only train, validation, test"):
        load_splits(StageConfig(dataset_name=str(vqa_dataset), dataset_test_split="dev"))


def load_rows_as_trl_does(rows):
    image = Image()
    return [{**row, "images": [image.decode_example(picture) for picture in row["images"]]} for row in rows]


class Shelf:
    """Features that a collator may read, of pictures that need not exist."""

    def __init__(self, tokens, width=8):
        self.features = {
            name: torch.full((count, width), float(number)) for number, (name, count) in enumerate(tokens.items())
        }

    def tokens(self, name):
        return len(self.features[name])

    def read(self, names):
        return torch.cat([self.features[name] for name in names])


def name_pictures(rows):
    """The rows with names for their pictures, equal where the pictures are."""
    names = {}
    return [
        {**row, "pictures": [names.setdefault(image["bytes"], f"p{len(names)}") for image in row.get("images") or []]}
        for row in rows
    ]


def shelf_of(rows, processor):
    collator = ChatCollator(processor)
    tokens = {}
    for row in rows:
        if row["pictures"]:
            ids = collator([row])["input_ids"][0]
            tokens[row["pictures"][0]] = int((ids == processor.tokenizer.image_token_id).sum())
    return Shelf(tokens)


@pytest.fixture
def questions(vqa_dataset):
    """Two images with three questions each, and one with one."""
    dataset = load_dataset(str(vqa_dataset), split="train").cast_column("images", List(Image(decode=False)))
    by_image = {}
    for number, image_id in enumerate(dataset["image_id"]):
        by_image.setdefault(image_id, []).append(number)
    first, second, third = [numbers for numbers in by_image.values() if len(numbers) >= 3][:3]
    chosen = [first[0], second[0], first[1], third[0], second[1], first[2], second[2]]
    return name_pictures([dataset[number] for number in chosen])


def test_with_features_a_batch_has_the_same_tokens_and_no_picture_is_opened(questions, text_rows, processor):
    rows = [*questions, *({**row, "pictures": []} for row in text_rows)]
    live = ChatCollator(processor)(rows)
    unopened = [{**row, "images": None} for row in rows]
    cached = ChatCollator(processor, shelf_of(questions, processor))(unopened)

    assert set(live) - set(cached) == {"pixel_values"} | ({"image_position_ids"} & set(live))
    for key in set(live) & set(cached):
        assert torch.equal(cached[key], live[key]), key
    assert len(cached["image_features"]) == (live["input_ids"] == processor.tokenizer.image_token_id).sum()


def test_features_of_another_number_of_tokens_stop_the_batch(questions, processor):
    shelf = shelf_of(questions, processor)
    collator = ChatCollator(processor, shelf)
    collator(questions)
    shelf.read = lambda names: Shelf.read(shelf, names)[:-1]

    with pytest.raises(DatasetError, match="image tokens"):
        collator(questions)


def test_questions_of_an_image_share_its_tokens_and_come_apart_unchanged(questions, processor):
    separate = split_rows(ChatCollator(processor)(questions))
    live = ChatCollator(processor, pack_questions=4)(questions)
    packed = ChatCollator(processor, shelf_of(questions, processor), pack_questions=4)(questions)
    order = [0, 2, 5, 1, 4, 6, 3]

    assert len(packed["input_ids"]) == len(live["pixel_values"]) == 3
    assert split_rows(packed) == [trim(separate[number]) for number in order]
    assert packed["image_features"][:, 0].unique_consecutive().tolist() == [0, 1, 2]
    assert packed["attention_mask"].sum() < 0.8 * sum(len(ids) for ids, _ in separate)
    whole = ChatCollator(processor)(questions)
    assert torch.equal(live["pixel_values"], whole["pixel_values"][[0, 1, 3]])


def trim(row):
    ids, labels = row
    return ids, labels[: len(ids)]


def test_a_damaged_question_of_a_sequence_is_named(questions, processor):
    collator = ChatCollator(processor, pack_questions=4)
    broken = [dict(row) for row in questions]
    broken[4] = {**broken[4], "row_id": "broken", "completion": answer_messages("")}

    with pytest.raises(DatasetError, match="row broken: its answer is empty"):
        collator(broken)


def test_texts_lie_end_to_end_and_images_never_do(text_rows, questions, processor, turn_end):
    separate = split_rows(ChatCollator(processor)(text_rows))
    collator = ChatCollator(processor, pack_texts=True)
    batch = collator(text_rows)

    assert batch["input_ids"].shape == (1, sum(len(ids) for ids, _ in separate))
    assert "attention_mask" not in batch
    assert split_rows(batch) == [trim(row) for row in separate]
    assert "attention_mask" in collator([text_rows[0], questions[0]])
