"""The demo page, served by the app that `dentalgemma space` writes, and driven in headless Chromium."""

import base64
import hashlib
import http.client
import io
import json
import os
import re
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
from dentalgemma import demo_guard
from dentalgemma.answering import DISCLAIMER, AnswerError, Part, load_answerer
from dentalgemma.app import build_page, example_questions, region_question, run_demo, serve, tidy_answer
from dentalgemma.demo_drawing import draw_table
from dentalgemma.demo_guard import MAX_BODY
from dentalgemma.demo_words import WORDS as SAID
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

    assert page.evaluate("window.scrollY") > 300
    for text in (DISCLAIMER, SAID["es"]["disclaimer"]):  # whichever language is chosen
        box = page.get_by_text(text).bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] <= 160
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
    assert page.locator("#preview .grid div").all_inner_texts() == regions
    assert page.locator("#regions img, #regions script").count() == 0
    assert "the patient's right" in page.locator("#preview .sides div").first.inner_text()


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


def test_the_kind_of_picture_and_the_language_choose_questions_and_words(page, phantom_file):
    from playwright.sync_api import expect

    asked = page.locator("#question textarea")
    choose(page, phantom_file)
    expect(asked).to_have_value(example_questions("panoramic", "en")[0])
    page.get_by_text("Español").click()
    expect(asked).to_have_value(example_questions("panoramic", "es")[0])  # nobody had typed another
    for text in example_questions("panoramic", "es"):
        page.get_by_role("button", name=text).wait_for()
    page.get_by_label("Radiografía periapical").check()
    expect(asked).to_have_value(example_questions("periapical", "es")[0])
    expect(page.locator("#report")).to_be_hidden()
    expect(page.locator("#preview .grid")).to_have_count(0)  # regions are those of a panoramic
    expect(page.locator("#preview img")).to_have_count(1)
    page.get_by_role("button", name=example_questions("periapical", "es")[1]).click()
    expect(asked).to_have_value(example_questions("periapical", "es")[1])

    shown = page.locator("body").inner_text()
    words = {key: text for key, text in SAID["es"].items() if key in PLAIN_WORDS}
    assert [text for text in words.values() if text not in shown] == []
    others = [text for key, text in SAID["en"].items() if key in PLAIN_WORDS and text != SAID["es"][key]]
    assert [text for text in others if text in shown] == [DISCLAIMER]
    assert answer(page, 0).get_attribute("placeholder") == SAID["es"]["answer_here"]

    asked.fill("¿Y el canino?")
    page.get_by_text("English", exact=True).click()
    page.get_by_role("button", name="Ask", exact=True).wait_for()
    expect(asked).to_have_value("¿Y el canino?")  # a question of one's own stays


PLAIN_WORDS = ("disclaimer", "beside", "choose", "or_drop", "kind", "samples", "question", "stop", "footer")


def test_an_answer_never_stands_beside_another_picture(page, phantom_file):
    from playwright.sync_api import expect

    choose(page, phantom_file)
    page.click("#ask")
    wait_for_text(page, answer(page, 0), TUNED_SAYS)
    page.click("#report")
    page.wait_for_selector("#regions td")
    page.get_by_text("Periapical radiograph").click()
    expect(page.locator("#regions td")).to_have_count(0)
    wait_for_text(page, answer(page, 0), TUNED_SAYS)  # which is about the picture that is still there
    page.get_by_text("Panoramic radiograph", exact=True).click()
    page.click("#report")
    page.wait_for_selector("#regions td")
    page.click("#samples button >> nth=2")
    expect(page.locator("#regions td")).to_have_count(0)
    wait_for_text(page, answer(page, 0), "")
    time.sleep(1)  # a report that went on would write again

    expect(page.locator("#regions td")).to_have_count(0)


def test_the_last_of_hasty_clicks_counts(page, phantom_file):
    from playwright.sync_api import expect

    choose(page, phantom_file)
    slow = {"offline": False, "latency": 500, "downloadThroughput": -1, "uploadThroughput": -1}
    page.context.new_cdp_session(page).send("Network.emulateNetworkConditions", slow)
    page.get_by_text("Periapical radiograph").click()
    page.get_by_text("Panoramic radiograph", exact=True).click()
    time.sleep(4)  # all that is under way arrives

    expect(page.locator("#report")).to_be_visible()


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
        unannounced = client.post("/gradio_api/queue/join", content=iter([b"{}", b" "]))
        endless = send_chunks(url, b" " * 1_000_000, MAX_BODY // 1_000_000 + 1)
        page = client.get("/")
        info = client.get("/gradio_api/info").json()

    huge = http.client.HTTPConnection(url.split("/")[2])  # which may announce what it does not send
    huge.putrequest("POST", "/gradio_api/queue/join")
    huge.putheader("Content-Length", str(MAX_BODY + 1))
    huge.endheaders()

    assert [upload.status_code, link.status_code] == [403, 403]
    assert unannounced.status_code == 422  # it was read, and lacks what a request needs; as some proxies send it
    assert endless == 413
    assert huge.getresponse().status == 413
    assert page.status_code == 200
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    assert page.headers["referrer-policy"] == "no-referrer"
    assert info["named_endpoints"] == {} and info["unnamed_endpoints"] == {}
    assert sorted(folder.rglob("*")) == before


def send_chunks(url, chunk, number):
    """Send a body that announces no length, until somebody answers; return the status."""
    connection = http.client.HTTPConnection(url.split("/")[2], timeout=60)
    connection.putrequest("POST", "/gradio_api/queue/join")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    try:
        for _ in range(number):
            connection.send(b"%x\r\n%b\r\n" % (len(chunk), chunk))
    except OSError:  # the server has hung up
        pass
    return connection.getresponse().status


@pytest.fixture(scope="module")
def small_model(tiny_model):
    return load_answerer(str(tiny_model))


@pytest.fixture
def small_page(small_model):
    page = serve(build_page([small_model]), host="127.0.0.1", port=free_port())
    yield page
    page.close()


def join(client, page, name, data, session):
    number = next(number for number, fn in page.fns.items() if fn.name == name)
    sent = client.post("/gradio_api/queue/join", json={"data": data, "fn_index": number, "session_hash": session})
    assert sent.status_code == 200


def listen(client, session):
    """Yield what the server says of a session's questions, until one is answered."""
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as stream:
        for line in stream.iter_lines():
            if line.startswith("data:"):
                yield json.loads(line.removeprefix("data:"))
                if "process_completed" in line:
                    return


def wait_until(true):
    for _ in range(400):
        if true():
            return
        time.sleep(0.05)
    pytest.fail("it did not become true")


def test_the_server_forgets_a_visitor_when_the_answer_is_delivered(small_page):
    known = small_page.app.state_holder.session_data
    content = base64.b64encode(picture_of(30, 20)).decode()
    with httpx.Client(base_url=small_page.local_url, timeout=60) as client:
        join(client, small_page, "ask", [content, f"Is {CANARY} there?", "en"], "visitor")
        # Gradio does keep it; else this test would say nothing.
        wait_until(lambda: "visitor" in known and content in json.dumps(known["visitor"].config_values, default=str))
        *_, last = listen(client, "visitor")

    assert last["success"]
    wait_until(lambda: "visitor" not in known)


def test_the_server_forgets_a_visitor_who_asks_and_does_not_listen(monkeypatch, small_page):
    monkeypatch.setattr(demo_guard, "UNHEARD", 0.3)
    known, queue = small_page.app.state_holder.session_data, small_page._queue
    content = base64.b64encode(picture_of(30, 20)).decode()
    with httpx.Client(base_url=small_page.local_url, timeout=60) as client:
        wait_until(lambda: not known)
        join(client, small_page, "ask", [content, f"Is {CANARY} there?", "en"], "deaf")
        wait_until(lambda: "deaf" in known and content in json.dumps(known["deaf"].config_values, default=str))

    wait_until(lambda: "deaf" not in known and "deaf" not in queue.pending_messages_per_session)
    assert queue.event_ids_to_events == {}


@pytest.mark.parametrize(
    ("name", "data", "title"),
    [
        pytest.param("ask", ["ñ" + CANARY, "What is it?", "en"], "Please check", id="letters beyond base64"),
        pytest.param("report", [None, CANARY, "en"], "Please check", id="another kind"),
        pytest.param("_change_kind", [None, CANARY, "en", "?"], "Please check", id="another kind to show"),
        pytest.param("change", ["panoramic", CANARY, "?"], "Please check", id="another language"),
        pytest.param("choose", [CANARY, "en", "?"], "Please check", id="another sample"),
        pytest.param("ask", [CANARY], "Error", id="too few"),
        pytest.param("ask", [{"path": CANARY, "meta": {"_type": "gradio.FileData"}}, "?", "en"], "Error", id="a file"),
    ],
)
def test_what_the_page_never_sends_is_refused_and_not_logged(small_page, capfd, name, data, title):
    with httpx.Client(base_url=small_page.local_url, timeout=60) as client:
        join(client, small_page, name, data, "stranger")
        *_, last = listen(client, "stranger")

    assert (last["success"], last["title"]) == (False, title)
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize(("space", "shown"), [(None, True), ("someone/demo", False)])
def test_dicom_that_does_not_rule_out_text_is_shown_on_a_machine_of_ones_own(
    small_page, monkeypatch, tmp_path, space, shown
):
    pytest.importorskip("pydicom", reason="needs the extra `dicom`")
    from test_dicom import write_dicom

    content = write_dicom(tmp_path / "a.dcm", BurnedInAnnotation=None).read_bytes()
    monkeypatch.delenv("SPACE_ID", raising=False)
    if space:
        monkeypatch.setenv("SPACE_ID", space)
    with httpx.Client(base_url=small_page.local_url, timeout=60) as client:
        join(client, small_page, "_show_picture", [base64.b64encode(content).decode(), "panoramic", "en"], "x")
        said = json.dumps(list(listen(client, "x")))

    assert ("data:image/jpeg" in said, "BurnedInAnnotation" in said) == (shown, not shown)


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
    table = draw_table({"left_maxillary": [BASE_SAYS]}, ["<b>", "two"])

    assert "<img" not in table and "<script" not in table and "<b>" not in table
    assert "&lt;img src=x onerror=&quot;" in table


@pytest.mark.parametrize(
    ("part", "shown"),
    [
        (Part("\n\n \t\n", "stop"), "(empty answer)"),
        (Part("\u200b\n", "length"), "(empty answer) […]"),
        (Part("\n\n"), ""),  # more may follow
        (Part("\n\nOne\n\n\n \n\ntwo\n\n\n", "stop"), "One\n\ntwo"),
    ],
)
def test_answers_take_no_more_room_than_they_need(part, shown):
    assert tidy_answer(part, SAID["en"]) == shown


def test_the_page_says_the_same_in_both_languages():
    def find_blanks(text):
        return set(re.findall(r"{(\w+)", text))

    assert SAID["en"].keys() == SAID["es"].keys()
    assert all(find_blanks(text) == find_blanks(SAID["es"][key]) for key, text in SAID["en"].items())
