"""The demo page, served by the app that `dentalgemma space` writes, and driven in headless Chromium."""

import base64
import hashlib
import http.client
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx2 as httpx
import pytest
from PIL import Image
from talking_model import make_talking_model

from data_builders.compose.wording import load_phrases
from data_builders.phantom import make_phantom
from dentalgemma.answering import DISCLAIMER, AnswerError, load_answerer
from dentalgemma.app import MAX_BODY, build_page, draw_table, example_questions, region_question, run_demo, serve
from dentalgemma.publishing.space import write_space

WORDS = [f" finding{number}" for number in range(40)]  # long enough to be seen while it is written
OWNED = "document.title='owned'"
HOSTILE = [
    "I see",
    f' <img src=x onerror="{OWNED}">',
    f"</td><script>{OWNED}</script>",
    " {{value}} ${" + OWNED + "} `",
]
CANARY = "zanahoria-4711"
HOSTILE_NAME = f"{CANARY} <img src=x onerror={OWNED.replace('/', '')}>.png"
WAIT = 60_000  # milliseconds; the machine may be busy


@pytest.fixture(scope="module")
def demo(tiny_model, tmp_path_factory):
    """The page of a Space, with its models named by folders; yields its address, its log and its temporary folder."""
    root = tmp_path_factory.mktemp("demo")
    make_talking_model(tiny_model, root / "tuned", ["This radiograph shows", *WORDS])
    make_talking_model(tiny_model, root / "base", HOSTILE)
    app = write_space(root / "space", "someone/tuned", base="someone/base") / "app.py"
    text = app.read_text().replace("'someone/tuned'", repr(str(root / "tuned")))
    app.write_text(text.replace("'someone/base'", repr(str(root / "base"))))
    (root / "tmp").mkdir()
    settings = {"TMPDIR": str(root / "tmp"), "HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "1"}
    settings |= {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(free_port())}
    with (root / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, app], env=os.environ | settings, stdout=subprocess.PIPE, stderr=log, text=True
        )
        started = next((line for line in server.stdout if line.startswith("Open http")), None)
        if started is None:
            pytest.fail((root / "log").read_text()[-2000:])
        output = []
        reader = threading.Thread(target=lambda: output.extend(server.stdout), daemon=True)
        reader.start()
        yield started.split()[1], lambda: (root / "log").read_text() + "".join(output), root / "tmp"
        server.terminate()
        server.wait(timeout=30)


def free_port():
    with socket.socket() as test:
        test.bind(("127.0.0.1", 0))
        return test.getsockname()[1]


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=flags)
        yield opened
        opened.close()


@pytest.fixture
def page(demo, browser):
    """A fresh page; at its end, nothing went elsewhere and no script of a model or a file ran."""
    url, _, _ = demo
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    opened.set_default_timeout(WAIT)
    asked, errors = [], []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: errors.append(error))
    opened.goto(url)
    opened.wait_for_selector("#ask")
    yield opened
    assert opened.title() == "DentalGemma"
    assert [found for found in asked if not found.startswith((url, "data:", "blob:"))] == []
    assert errors == []
    opened.close()


@pytest.fixture(scope="module")
def phantom_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / HOSTILE_NAME
    make_phantom(3, 1).image.save(path)
    return path


def choose(page, path):
    page.set_input_files("#picture input", path)
    page.wait_for_selector("#preview img")


def answer(page, number):
    return page.locator(".answer textarea").nth(number)


@contextmanager
def watching(page, selector):
    """Record every text that an element shows, one a frame."""
    page.evaluate(
        """selector => { window.seen = []; const look = () => {
            const text = document.querySelector(selector).value;
            if (text && text !== window.seen.at(-1)) window.seen.push(text);
            requestAnimationFrame(look); }; look(); }""",
        selector,
    )
    seen = []
    yield seen
    seen.extend(page.evaluate("window.seen"))


def wait_for_text(page, locator, text):
    from playwright.sync_api import expect

    expect(locator).to_have_value(text, timeout=WAIT)


TUNED_SAYS, BASE_SAYS = "This radiograph shows" + "".join(WORDS), "".join(HOSTILE)


def test_a_picture_and_a_question_give_two_answers_piece_by_piece(page, phantom_file):
    choose(page, phantom_file)
    page.fill("#question textarea", f"What is this, {CANARY}?")
    with watching(page, ".answer textarea") as seen:
        page.click("#ask")
        wait_for_text(page, answer(page, 0), TUNED_SAYS)
    wait_for_text(page, answer(page, 1), BASE_SAYS)  # as text, whatever it looks like

    assert len(seen) > 1  # half an answer was to be seen before the whole
    assert all(TUNED_SAYS.startswith(text) for text in seen)
    columns = page.locator(".answer").all_inner_texts()
    assert [column.split("\n")[0] for column in columns] == ["Tuned: tuned", "Base: base"]


def test_the_disclaimer_stays_in_view(page, phantom_file):
    choose(page, phantom_file)
    page.set_viewport_size({"width": 400, "height": 700})
    page.keyboard.press("End")
    page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    box = page.get_by_text(DISCLAIMER).bounding_box()

    assert page.evaluate("window.scrollY") > 300
    assert box["y"] >= 0 and box["y"] + box["height"] <= 700
    assert page.evaluate("document.documentElement.scrollWidth") <= 400  # nothing is wider than a telephone


def test_the_region_report_fills_six_rows_and_stays_inert(page, phantom_file):
    choose(page, phantom_file)
    page.click("#report")
    page.wait_for_function(
        "last => document.querySelectorAll('#regions td').length === 12"
        " && document.querySelectorAll('#regions td')[10].innerText === last",
        arg=TUNED_SAYS,
    )
    page.wait_for_function("last => document.querySelectorAll('#regions td')[11].innerText === last", arg=BASE_SAYS)

    regions = [region.capitalize() for region in list(load_phrases("en")["regions"].values())[:6]]
    assert page.locator("#regions tbody th").all_inner_texts() == regions
    assert page.locator("#preview .grid span").all_inner_texts() == regions
    assert page.locator("#regions img, #regions script").count() == 0
    assert "the patient's right" in page.locator("#preview .sides span").first.inner_text()


def test_what_a_user_can_mend_is_a_message(page, phantom_file, tmp_path):
    page.click("#ask")
    page.get_by_text("Choose a picture first").wait_for()
    (tmp_path / "notes.png").write_text("not a picture")
    page.set_input_files("#picture input", tmp_path / "notes.png")
    page.get_by_text("The file is no picture that can be read").first.wait_for()
    (tmp_path / "large.png").write_bytes(bytes(30_000_001))
    page.set_input_files("#picture input", tmp_path / "large.png")
    page.get_by_text("The file is too large: at most 30 MB").first.wait_for()
    choose(page, phantom_file)
    page.fill("#question textarea", "  ")
    page.click("#ask")
    page.get_by_text("Type a question first").wait_for()

    assert answer(page, 0).input_value() == ""


def test_the_kind_of_picture_and_the_language_choose_the_questions(page, phantom_file):
    from playwright.sync_api import expect

    choose(page, phantom_file)
    page.get_by_text("Español").click()
    for text in example_questions("panoramic", "es"):
        page.get_by_role("button", name=text).wait_for()
    page.get_by_label("Radiografía periapical").check()
    page.get_by_role("button", name=example_questions("periapical", "es")[0]).click()

    expect(page.locator("#question textarea")).to_have_value(example_questions("periapical", "es")[0])
    expect(page.locator("#report")).to_be_hidden()
    expect(page.locator("#preview .grid")).to_have_count(0)  # regions are those of a panoramic
    expect(page.locator("#preview img")).to_have_count(1)


def test_a_sample_a_pasted_picture_and_a_stopped_answer(page, phantom_file):
    page.click("#samples button >> nth=1")
    page.wait_for_selector("#preview img")
    page.click("#ask")
    page.wait_for_function("document.querySelector('.answer textarea').value.length > 0")
    page.click("#stop")
    page.evaluate(
        """content => { const bytes = Uint8Array.from(atob(content), c => c.charCodeAt(0));
            const data = new DataTransfer(); data.items.add(new File([bytes], 'x.png', {type: 'image/png'}));
            document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data})); }""",
        base64.b64encode(picture_of(60, 44)).decode(),
    )
    page.get_by_text("60 × 44 pixels").wait_for()
    page.click("#ask")

    wait_for_text(page, answer(page, 0), TUNED_SAYS)


def picture_of(width, height):
    buffer = io.BytesIO()
    Image.new("L", (width, height), 90).save(buffer, format="PNG")
    return buffer.getvalue()


def test_nothing_of_a_user_is_left_on_the_disk_or_in_the_log(page, demo, phantom_file):
    _, read_log, folder = demo
    choose(page, phantom_file)
    page.fill("#question textarea", f"Is {CANARY} there?")
    page.click("#ask")
    wait_for_text(page, answer(page, 0), TUNED_SAYS)
    content = phantom_file.read_bytes()
    left = [path for path in folder.parent.rglob("*") if path.is_file() and "tuned" not in path.parts]

    assert any(path.name == "app.py" for path in left)  # so that the search looks where there is something
    for path in left:
        own = path.read_bytes()
        assert content not in own and base64.b64encode(content)[:200] not in own, path
        assert hashlib.sha256(content).hexdigest() not in str(path)
        assert CANARY.encode() not in own and CANARY not in path.name
    log = read_log()
    assert CANARY not in log and "finding7" not in log and "Is " not in log
    assert page.evaluate("indexedDB.databases().then(found => found.length)") == 0
    stored = page.evaluate("JSON.stringify({...localStorage, ...sessionStorage})")
    assert CANARY not in stored and "finding7" not in stored


def test_the_server_refuses_what_the_page_never_sends(demo):
    url, _, folder = demo
    before = sorted(folder.rglob("*"))
    with httpx.Client(base_url=url) as client:
        upload = client.post("/gradio_api/upload", files={"files": ("x.png", picture_of(9, 9))})
        link = client.get("/gradio_api/deep_link", params={"session_hash": "x"})
        endless = client.post("/gradio_api/queue/join", content=iter([b"{}"]))
        page = client.get("/")
        info = client.get("/gradio_api/info").json()

    huge = http.client.HTTPConnection(url.split("/")[2])  # which may announce what it does not send
    huge.putrequest("POST", "/gradio_api/queue/join")
    huge.putheader("Content-Length", str(MAX_BODY + 1))
    huge.endheaders()

    assert [upload.status_code, link.status_code, endless.status_code] == [403, 403, 411]
    assert huge.getresponse().status == 413
    assert page.status_code == 200
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    assert page.headers["referrer-policy"] == "no-referrer"
    assert info["named_endpoints"] == {} and info["unnamed_endpoints"] == {}
    assert sorted(folder.rglob("*")) == before


def test_the_server_forgets_a_visitor_when_the_answer_is_delivered(tiny_model):
    page = serve(build_page([load_answerer(str(tiny_model))]), host="127.0.0.1", port=free_port())
    number = next(number for number, fn in page.fns.items() if fn.name == "ask")
    content = base64.b64encode(picture_of(30, 20)).decode()
    body = {"data": [content, f"Is {CANARY} there?"], "fn_index": number, "session_hash": "visitor"}
    remembered = []
    with httpx.Client(base_url=page.local_url, timeout=60) as client:
        assert client.post("/gradio_api/queue/join", json=body).status_code == 200
        with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": "visitor"}) as stream:
            for line in stream.iter_lines():
                if "process_generating" in line:
                    state = page.app.state_holder.session_data["visitor"]
                    remembered.append(content in json.dumps(state.config_values, default=str))
                done = "process_completed" in line and '"success":true' in line.replace(" ", "")
                if done:
                    break
    for _ in range(200):
        if not page.app.state_holder.session_data:
            break
        time.sleep(0.05)
    page.close()

    assert done
    assert any(remembered)  # Gradio does keep it; else this test would say nothing
    assert not page.app.state_holder.session_data


def test_a_port_that_is_taken_is_one_sentence_before_any_model_is_loaded(demo):
    port = int(demo[0].rstrip("/").rpartition(":")[2])

    with pytest.raises(AnswerError, match=f"port {port} of 127.0.0.1 cannot be used .* give another --port"):
        run_demo("no model", host="127.0.0.1", port=port)


def test_region_questions_are_worded_as_in_the_training_data():
    asked = region_question("left_mandibular", load_phrases("en"))
    assert asked == "What abnormalities are there in the left mandibular region on this panoramic radiograph?"
    spanish = region_question("right_maxillary", load_phrases("es"))
    assert spanish.startswith("¿Qué alteraciones hay en la región maxilar derecha")


def test_texts_in_the_table_are_escaped():
    table = draw_table({"<b>": [BASE_SAYS]}, ["one"])

    assert "<img" not in table and "<script" not in table and "<b>" not in table
    assert "&lt;img src=x onerror=&quot;" in table
