"""A model behind an endpoint is asked what a model loaded here is asked; nothing is lost, asked twice or made up."""

import _thread
import base64
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from stub_server import StubServer, prompt_text

from dentalgemma.evaluation.asking import ask_all
from dentalgemma.evaluation.endpoints import Endpoint
from dentalgemma.evaluation.predictions import open_image
from dentalgemma.evaluation.questions import EvaluationError, Question, put_question, read_predictions
from dentalgemma.evaluation.server import ask_server

SYSTEM = "You are a dentist."
PATIENT = "DOE^JANE"


def noise(seed, size=(32, 48), channels=(3,), dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, (*size, *channels), dtype=dtype)


def save_images(folder):
    """Pictures that readers may take for others than they are: turned, deep, transparent, with a palette."""
    exif = Image.Exif()
    exif[0x010E] = PATIENT  # ImageDescription
    Image.fromarray(noise(0)).save(folder / "plain.png")
    Image.fromarray(noise(1)).save(folder / "plain.jpg", exif=exif)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(noise(2)).save(folder / "turned.jpg", exif=turned)
    Image.fromarray(noise(3, channels=(), dtype=np.uint16)).save(folder / "deep.png")
    Image.fromarray(noise(4, channels=(4,))).save(folder / "transparent.png")
    Image.fromarray(noise(5)).quantize(16).save(folder / "palette.png")
    Image.fromarray(noise(6, channels=())).save(folder / "grey.png")
    Image.fromarray(noise(7)).save(folder / "lossless.webp", lossless=True)
    Image.fromarray(noise(8)).save(folder / "plain.tif")


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    """A question on each picture, closed and open ones, one in Spanish, and one without a picture."""
    folder = tmp_path_factory.mktemp("images")
    save_images(folder)
    pictures = sorted(folder.iterdir())
    closed = [
        Question(
            item_id=f"closed{number}",
            question=f"What is seen? {{{number}}}",
            options={"A": "Caries", "B": "", "C": "«Nothing»"},
            answer="A",
            image=picture,
            image_id=picture.stem,
            group_id=picture.stem,
            language="es" if number == 3 else "en",
        )
        for number, picture in enumerate(pictures)
    ]
    opened = [
        Question(f"open{number}", "Describe it.", "Caries.", image=picture, image_id=picture.stem)
        for number, picture in enumerate(pictures[:2])
    ]
    return [*closed, *opened, Question("bare", "What is caries?", "A disease.")]


def connect(server, **settings):
    return Endpoint(server.url, "stub", **({"backoff": 0.01, "retries": 1} | settings))


def ask(server, items, out, endpoint=None, **settings):
    settings = {"system_prompt": SYSTEM, "progress": False} | settings
    ask_server(endpoint or connect(server), items, out=out, **settings)
    return read_predictions(out)


def by_item(server, items):
    """The request that asked each item, found by its words and its picture."""
    return {request_key(body): body for body in server.requests}


def request_key(body):
    *_, user = body["messages"]
    return user["content"][-1]["text"], *(decode(part) for part in user["content"] if part["type"] == "image_url")


def decode(part):
    header, _, content = part["image_url"]["url"].partition(";base64,")
    assert header in ("data:image/png", "data:image/jpeg")
    with Image.open(io.BytesIO(base64.b64decode(content, validate=True))) as image:
        assert image.format == header.removeprefix("data:image/").upper()
        return image.convert("RGB").size, image.convert("RGB").tobytes()


@pytest.mark.parametrize("images", ["true", "none"])
def test_words_and_pixels_are_those_that_a_model_loaded_here_is_asked(items, tmp_path, images):
    with StubServer() as server:
        ask(server, items, tmp_path / "p.jsonl", images=images)

    requests = by_item(server, items)
    assert len(server.requests) == len(requests if images == "true" else items) == len(items)
    for item in items:
        picture = open_image(item if images == "true" else None, images=images)
        system, user = put_question(item, picture, mode="generate", system_prompt=SYSTEM)
        pixels = [] if picture is None else [(picture.size, picture.tobytes())]
        body = requests[(user["content"][-1]["text"], *pixels)]
        assert body["messages"][0] == {"role": "system", "content": system["content"][0]["text"]}
        kinds = [part["type"] for part in body["messages"][1]["content"]]
        assert kinds == ["image_url"] * len(pixels) + ["text"]  # in this order, as in training


def test_files_travel_as_they_are_but_without_what_may_name_a_patient(items, tmp_path):
    photo = next(item for item in items if item.image_id == "plain" and item.image.suffix == ".jpg")
    with StubServer() as server:
        ask(server, [photo], tmp_path / "p.jsonl")

    (body,) = server.requests
    content = base64.b64decode(body["messages"][1]["content"][0]["image_url"]["url"].partition(",")[2])
    own = photo.image.read_bytes()
    assert PATIENT.encode() in own
    assert PATIENT.encode() not in content
    scan = own[own.index(b"\xff\xda") :]
    assert content.endswith(scan)  # the compressed picture itself, not one compressed again


@pytest.mark.parametrize("stretch", [None, 28])
def test_no_profile_exif_or_text_reaches_the_server_whatever_the_file(tmp_path, stretch):
    exif, text = Image.Exif(), PngInfo()
    exif[0x010E] = PATIENT
    text.add_text("Name", PATIENT)
    told = {"icc_profile": PATIENT.encode() * 9, "exif": exif}
    rgb = Image.fromarray(noise(9))
    rgb.quantize(16).save(tmp_path / "palette.png", pnginfo=text, **told)
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg", comment=PATIENT, **told)
    rgb.save(tmp_path / "lossless.webp", lossless=True, xmp=PATIENT.encode(), **told)
    items = [
        Question(path.stem, "What is seen?", "Caries.", image=path, image_id=path.stem) for path in tmp_path.iterdir()
    ]
    with StubServer() as server:
        ask(server, items, tmp_path / "p.jsonl", stretch=stretch)

    assert len(server.requests) == 3
    for item in items:
        with Image.open(item.image) as own:
            assert {"icc_profile", "exif"} <= own.info.keys(), "a control: it is there"
    for body in server.requests:
        content = base64.b64decode(body["messages"][1]["content"][0]["image_url"]["url"].partition(",")[2])
        assert PATIENT.encode() not in content
        with Image.open(io.BytesIO(content)) as sent:
            sent.load()
            assert (sent.format, sent.info, dict(sent.getexif())) == ("PNG", {}, {})


def test_blank_pictures_are_grey_ones_of_the_same_size_and_other_ones_another_patients(items, tmp_path):
    pictured = [item for item in items if item.item_id.startswith("closed")]
    sizes = {item.item_id: open_image(item, images="true").size for item in pictured}
    with StubServer() as blank, StubServer() as other:
        ask(blank, pictured, tmp_path / "blank.jsonl", images="blank")
        lines = ask(other, pictured, tmp_path / "other.jsonl", images="other")

    pictures = [request_key(body)[1] for body in blank.requests]
    assert sorted(size for size, _ in pictures) == sorted(sizes.values())
    assert all(set(pixels) == {128} for _, pixels in pictures)
    assert all(line["image_shown"] not in (None, line["image_id"]) for line in lines.values())


@pytest.mark.parametrize("images", ["true", "blank"])
def test_pictures_are_stretched_for_a_server_that_would_put_bars_around_them(items, tmp_path, images):
    pictured = [item for item in items if item.item_id.startswith("closed")]
    with StubServer() as server:
        lines = ask(server, pictured, tmp_path / "p.jsonl", images=images, stretch=28)

    assert {line["image_fit"] for line in lines.values()} == {"stretch to 28"}
    expected = [
        open_image(item, images=images).resize((28, 28), Image.Resampling.BILINEAR).tobytes() for item in pictured
    ]
    assert sorted(request_key(body)[1] for body in server.requests) == sorted(((28, 28), own) for own in expected)


def test_a_line_says_what_was_asked_of_whom_and_what_the_server_took(items, tmp_path):
    with StubServer(["refuses:seed"], answer="A") as server:
        lines = ask(server, [items[0], items[-1]], tmp_path / "p.jsonl", workers=1, hardware="1x H200")

    closed, opened = lines[items[0].item_id], lines["bare"]
    assert (closed["protocol"], opened["protocol"]) == ("letter/1", "open/1")
    assert (closed["model"], closed["weights"], closed["mode"], closed["output"]) == ("stub", None, "generate", "A")
    assert (closed["generation"]["max_tokens"], opened["generation"]["max_tokens"]) == (64, 512)
    assert [body["max_tokens"] for body in server.requests] == [64, 64, 512]
    assert closed["server"]["url"] == server.url
    assert closed["server"]["requested"] == {"temperature": 0, "seed": 0, "max_tokens": 64}
    assert closed["server"]["honoured"] == {"temperature": 0, "max_tokens": 64}
    assert closed["server"]["usage"].keys() == {"input_tokens", "output_tokens"}
    assert (closed["latency_ms"], closed["warm_up"]) == (None, True)  # two tries: no time of the model's
    assert opened["latency_ms"] > 0
    assert opened["warm_up"] is False
    assert closed["hardware"] == "1x H200"


def test_an_empty_answer_is_an_answer_and_so_is_half_a_character(items, tmp_path):
    with StubServer(["empty", "half \ud83d of one"]) as server:
        lines = ask(server, items[:2], tmp_path / "p.jsonl", workers=1)
        again = ask(server, items[:2], tmp_path / "p.jsonl")

    assert [line["output"] for line in lines.values()] == ["", "half � of one"]
    assert lines[items[0].item_id]["finish_reason"] == "stop"
    assert again == lines
    assert len(server.requests) == 2


def test_an_item_without_answer_is_named_after_all_others_have_theirs_and_asked_alone_next_time(items, tmp_path):
    out, broken = tmp_path / "p.jsonl", items[2]

    def fail_on_one(body):
        return "500" if "{2}" in prompt_text(body) else "text"

    with StubServer(fail_on_one) as server:
        with pytest.raises(EvaluationError, match=rf"1 items have no answer.*{broken.item_id}.*500.*only for what is"):
            ask(server, items, out)
        assert read_predictions(out).keys() == {item.item_id for item in items} - {broken.item_id}
        asked = len(server.requests)
        server.script = ["text"]
        ask(server, items, out)

    assert asked == len(items) + 1  # one retry
    assert len(server.requests) == asked + 1
    assert len(out.read_text().splitlines()) == len(items)


def test_a_picture_that_cannot_be_decoded_costs_its_own_question_only(items, tmp_path):
    torn = tmp_path / "torn.png"
    torn.write_bytes(items[0].image.read_bytes()[:60])
    with StubServer() as server, pytest.raises(EvaluationError, match=r"1 items.*torn\.png.*cannot be opened"):
        ask(server, [replace(items[0], image=torn), *items[1:]], tmp_path / "p.jsonl")

    assert len(read_predictions(tmp_path / "p.jsonl")) == len(items) - 1


@pytest.mark.parametrize(("status", "tries"), [("401", 1), ("404", 1), ("503", 20)])
def test_a_server_that_will_answer_nothing_is_left_alone(tmp_path, status, tries):
    many = [Question(f"q{number}", f"Question {number}?", "Answer") for number in range(40)]
    with StubServer([status]) as server, pytest.raises(EvaluationError, match=r"40 items have no answer.*not asked"):
        ask(server, many, tmp_path / "p.jsonl", workers=1)

    assert tries <= len(server.requests) <= tries + 4  # what was under way when the run gave up


def test_requests_refused_for_what_they_hold_do_not_end_the_run(tmp_path):
    many = [Question(f"q{number:02}", f"Question {number:02}?", "Answer") for number in range(30)]
    with (
        StubServer(lambda body: "400" if prompt_text(body)[-3:] < "25?" else "text") as server,
        pytest.raises(EvaluationError, match="25 items have no answer"),
    ):
        ask(server, many, tmp_path / "p.jsonl", workers=1, system_prompt="")

    assert len(server.requests) == 30
    assert len(read_predictions(tmp_path / "p.jsonl")) == 5


def test_as_many_requests_run_at_once_as_there_are_workers(tmp_path):
    many = [Question(f"q{number}", f"Question {number}?", "Answer") for number in range(12)]
    with StubServer(["slow"], delay=0.1) as server:
        lines = ask(server, many, tmp_path / "p.jsonl", workers=3)

    assert 2 <= server.most_at_once <= 3
    assert sum(line["warm_up"] for line in lines.values()) == 3
    assert all(line["latency_ms"] >= 100 for line in lines.values())


def test_the_other_api_answers_the_same_questions(items, tmp_path):
    with StubServer(answer="A") as server:
        lines = ask(server, items[:2], tmp_path / "p.jsonl", connect(server, api="anthropic"), workers=1)

    assert {line["output"] for line in lines.values()} == {"A"}
    assert server.requests[0]["system"] == SYSTEM
    assert [part["type"] for part in server.requests[0]["messages"][0]["content"]] == ["image", "text"]
    assert lines[items[0].item_id]["server"]["honoured"].keys() == {"temperature", "max_tokens"}


def test_ranking_by_likelihood_is_refused_with_the_remedy(items, tmp_path):
    with StubServer() as server, pytest.raises(EvaluationError, match="use mode generate, or --model"):
        ask(server, items, tmp_path / "p.jsonl", mode="loglikelihood")

    assert not server.requests
    assert not (tmp_path / "p.jsonl").exists()


def test_answers_of_another_server_model_or_length_do_not_mix(items, tmp_path):
    out = tmp_path / "p.jsonl"
    with StubServer() as server, StubServer() as elsewhere:
        ask(server, items[:2], out)
        before = out.read_bytes()
        for endpoint, settings, named in (
            (connect(elsewhere), {}, "server"),
            (replace(connect(server), model="larger"), {}, "model"),
            (connect(server), {"max_new_tokens": 8}, "max_tokens"),
            (connect(server), {"images": "none"}, "images"),
            (connect(server), {"stretch": 28}, "image_fit"),
        ):
            with pytest.raises(EvaluationError, match=f"do not belong to this run.*{named}"):
                ask(server, items, out, endpoint, **settings)
        assert out.read_bytes() == before
        assert not elsewhere.requests


def test_a_file_of_something_else_is_left_as_it_is(tmp_path):
    out = tmp_path / "questions.jsonl"
    item = Question("q0", "Question?", "Answer")
    for content in ('{"item_id": "q0", "question": "Question?", "answer": "Answer"}', '{"a": 1}', 'Notes\n{"item_id'):
        out.write_text(content)
        with StubServer() as server, pytest.raises(EvaluationError, match=r"another file|needs its item_id"):
            ask(server, [item], out)
        assert out.read_text() == content
        assert not server.requests


def test_a_last_line_without_its_end_of_line_is_one_all_the_same(tmp_path):
    out = tmp_path / "p.jsonl"
    items = [Question(f"q{number}", f"Question {number}?", "Answer") for number in range(2)]
    with StubServer() as server:
        endpoint = connect(server)
        ask(server, items[:1], out, endpoint)
        out.write_bytes(out.read_bytes().rstrip(b"\n"))
        lines = ask(server, items, out, endpoint)

    assert lines.keys() == {"q0", "q1"}
    assert len(server.requests) == 2


def test_the_key_is_sent_and_written_nowhere(items, tmp_path, capfd):
    key = "sk-canary-5f2b"
    with (
        StubServer(lambda body: "500" if "{1}" in prompt_text(body) else key) as server,
        pytest.raises(EvaluationError) as failure,
    ):
        ask(server, items[:3], tmp_path / "p.jsonl", connect(server, api_key=key), progress=True)

    assert server.headers[0]["authorization"] == f"Bearer {key}"
    written = (tmp_path / "p.jsonl").read_text() + str(failure.value) + "".join(capfd.readouterr())
    assert "canary" not in written


KILLED_RUN = """
import json, sys
from dentalgemma.evaluation.endpoints import Endpoint
from dentalgemma.evaluation.questions import Question
from dentalgemma.evaluation.server import ask_server
items = [Question(f"q{n}", f"Question {n}?", "Answer") for n in range(60)]
ask_server(Endpoint(sys.argv[1], "stub"), items, out=sys.argv[2], workers=3, progress=False)
"""


@pytest.mark.parametrize("act", ["429:300", "slow", "dripping"])
def test_an_interrupt_waits_neither_for_pauses_nor_for_answers_and_keeps_those_that_came(tmp_path, act):
    out = tmp_path / "p.jsonl"
    with StubServer(["text", "text", act], delay=300) as server:
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED_RUN, server.url, str(out)], cwd=tmp_path, stderr=subprocess.PIPE
        )
        try:
            deadline = time.monotonic() + 60
            while not (len(server.requests) == 5 and out.read_bytes().count(b"\n") == 2):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
            process.wait()

    assert b"KeyboardInterrupt" in said
    assert b"Exception in thread" not in said
    assert process.returncode != 0
    assert len(read_predictions(out)) == 2


def test_an_answer_that_is_there_when_the_run_is_broken_off_is_still_written():
    interrupted, never = threading.Event(), threading.Event()
    written = []

    def ask_one(item):
        if item == "hangs":
            never.wait()
            return
        _thread.interrupt_main()
        assert interrupted.wait(30)
        written.append(item)

    with pytest.raises(KeyboardInterrupt):
        ask_all(ask_one, ["hangs", "answers", "later"], workers=2, interrupt=interrupted.set)

    assert written == ["answers"]
    never.set()


def test_a_process_killed_in_the_middle_leaves_only_what_is_missing_to_ask(tmp_path):
    out = tmp_path / "p.jsonl"
    items = [Question(f"q{number}", f"Question {number}?", "Answer") for number in range(60)]
    with StubServer(["slow"], delay=0.05, answer=lambda body: prompt_text(body)[-3:]) as server:
        process = subprocess.Popen([sys.executable, "-c", KILLED_RUN, server.url, str(out)], cwd=tmp_path)
        try:
            deadline = time.monotonic() + 60
            while (not out.exists() or out.read_bytes().count(b"\n") < 10) and time.monotonic() < deadline:
                time.sleep(0.01)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        saved = out.read_bytes()
        time.sleep(0.2)  # what was under way ends at the server
        before = len(server.requests)
        ask_server(connect(server), items, out=out, progress=False)

    kept = saved.count(b"\n")
    assert 10 <= kept < 60
    assert before - kept <= 3  # under way, one a worker
    assert out.read_bytes().startswith(saved[: saved.rfind(b"\n") + 1])
    assert len(server.requests) - before == 60 - kept
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(line["item_id"] for line in lines) == sorted(item.item_id for item in items)
    assert all(line["output"] == f"{line['item_id'][1:]}?"[-3:].rjust(3) for line in lines)
