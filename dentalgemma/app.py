"""The demo page: a picture, a question, the answer as it is written; the same page on a laptop and as a Space.

Pictures never touch a disk. Gradio's own upload writes them to a folder, so the page has a field of its own that sends
them inside the question, and the server refuses uploads. Nothing that a user sends is kept or logged.
"""

from __future__ import annotations

import base64
import binascii
import html
import io
import os
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from importlib.resources import files
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import parse_qs

from PIL import Image

from data_builders.compose.wording import capitalize, fill, load_phrases
from data_builders.dentition import ANTERIOR_HALF_WIDTH, REGIONS, finding_region
from data_builders.phantom import Phantom, make_phantoms
from data_builders.records import InputError, Modality
from data_builders.sources import Language, load_vocabulary
from dentalgemma import __version__
from dentalgemma.answering import DISCLAIMER, AnswerError, Loaded, load_answerer, open_picture, stream_answer

if TYPE_CHECKING:
    import gradio as gr

MODALITIES: tuple[Modality, ...] = ("panoramic", "periapical", "bitewing", "intraoral_photo")
LANGUAGES = {"English": "en", "Español": "es"}
DISCLAIMERS: Mapping[Language, str] = {
    "en": DISCLAIMER,
    "es": "Solo para investigación y enseñanza. No es un producto sanitario ni da diagnósticos; lo que dice un modelo "
    "debe comprobarlo un profesional de la odontología.",
}
EXAMPLES = 5
SAMPLES = 3
MAX_PICTURE = 30_000_000  # bytes of a file
MAX_BODY = 2 * MAX_PICTURE  # of a request: a picture in base64 takes a third more
MAX_QUESTION = 2000  # characters
MAX_NEW_TOKENS = 300
PREVIEW = 1200  # pixels on the longer side
MODELS, PICTURES = "models", "pictures"  # what waits for its turn: answers one at a time, previews beside them
TAKES_POST = ("/queue/join", "/cancel", "/reset", "/login")


class Sample(NamedTuple):
    """A synthetic picture that the page offers: its file, and what was drawn in it."""

    content: str  # base64 of a PNG
    truth: str


def run_demo(
    model: str,
    *,
    base: str | None = None,
    revision: str | None = None,
    host: str | None = None,
    port: int | None = None,
) -> None:
    """Load the models and serve the page until it is interrupted.

    Without `host` and `port` Gradio's environment variables decide, which a Space sets. Port 0 takes a free one.

    Raises:
        AnswerError: without Gradio, or when the port is taken.
        LoadError: when there is no such model.
    """
    _need_gradio()
    port = _check_port(host, port)
    models = [load_answerer(model, revision=revision)]
    if base:
        models.append(load_answerer(base))
    page = serve(build_page(models), host=host, port=port)
    print(f"Open {page.local_url}  (Ctrl-C ends it)", flush=True)
    page.block_thread()


def serve(page: gr.Blocks, *, host: str | None = None, port: int | None = None) -> gr.Blocks:
    """Start the server of a page and return; nothing about its users is sent, kept or logged."""
    from starlette.middleware import Middleware

    os.environ["GRADIO_RUN_HISTORY"] = "False"  # else Gradio keeps questions and answers in the browser
    page.queue(max_size=20)
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        enable_monitoring=False,
        state_session_capacity=20,  # of those that were left while an answer was written; see `_Guard`
        footer_links=[],
        ssr_mode=False,
        app_kwargs={"middleware": [Middleware(_Guard)]},
        theme=_theme(),
        css=_read("space_page.css"),
    )
    return page


def build_page(models: Sequence[Loaded]) -> gr.Blocks:
    """The page for one model, or for two that answer side by side."""
    import gradio as gr

    samples = [_make_sample(phantom) for phantom in make_phantoms(SAMPLES, seed=7, start=1)]
    names = [loaded.name for loaded in models]
    questions = example_questions("panoramic", "en")
    take_picture = _read("space_picture.js").replace("MAX_PICTURE", str(MAX_PICTURE))
    with gr.Blocks(title="DentalGemma", analytics_enabled=False) as page:
        gr.HTML(_title(names))
        gr.HTML(_disclaimer("en"), elem_id="disclaimer")  # stays in view
        gr.HTML(_disclaimer("es"), elem_id="disclaimer-es")
        with gr.Row(elem_classes="columns"):
            with gr.Column(scale=5, min_width=320):
                preview = gr.HTML(draw_preview(None), elem_id="preview")
                picture = gr.HTML(None, html_template=DROP_ZONE, js_on_load=take_picture, elem_id="picture")
                modality = gr.Radio(_modality_choices("en"), value="panoramic", label="Kind of picture")
                language = gr.Radio(list(LANGUAGES), value="English", label="Language of the questions")
                gallery = gr.HTML(
                    None, html_template=_gallery(samples), js_on_load=_read("space_samples.js"), elem_id="samples"
                )
            with gr.Column(scale=6, min_width=320):
                question = gr.Textbox(
                    label="Question", lines=2, max_length=MAX_QUESTION, elem_id="question", value=questions[0]
                )
                with gr.Row(elem_classes="examples"):
                    examples = [gr.Button(text, size="sm", variant="secondary") for text in questions]
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", elem_id="ask")
                    report = gr.Button("Region report", elem_id="report")
                    stop = gr.Button("Stop", elem_id="stop", min_width=60, scale=0)
                with gr.Row():
                    answers = [
                        gr.Textbox(
                            label=_column_title(names, number),
                            lines=4,
                            max_lines=12,
                            interactive=False,
                            placeholder="The answer appears here.",
                            min_width=240,
                            elem_classes="answer",
                        )
                        for number in range(len(models))
                    ]
                table = gr.HTML("", elem_id="regions")
        gr.HTML(FOOTER)

        chosen = [picture, modality, language]
        quiet = {"api_visibility": "private", "show_progress": "hidden"}
        looks = {**quiet, "concurrency_id": PICTURES, "concurrency_limit": 2}
        picture.upload(_show_picture, chosen, preview, **looks)
        picture.refuse(_refuse_size, None, None, **looks)
        gallery.choose(
            _sample_chooser(samples), [gallery, language], [picture, modality, preview, *examples, report], **looks
        )
        gr.on([modality.input, language.input], _reword, chosen, [preview, modality, *examples, report], **looks)
        for example in examples:
            example.click(_take_example, example, question, **looks)
        writes = {**quiet, "concurrency_id": MODELS, "concurrency_limit": 1}
        asked = gr.on([ask.click, question.submit], _asker(models), [picture, question], answers, **writes)
        reported = report.click(_reporter(models), chosen, table, **writes)
        stop.click(None, None, None, cancels=[asked, reported], api_visibility="private")
    return page


def _asker(models: Sequence[Loaded]):
    """What "Ask" does: fill one column for each model, piece by piece."""

    def ask(content: object, question: object) -> Iterator[list[str]]:
        with _plain_messages():
            if not isinstance(question, str) or not question.strip():
                raise AnswerError("Type a question first.")
            if len(question) > MAX_QUESTION:
                raise AnswerError(f"The question is too long: at most {MAX_QUESTION:,} characters.")
            shown = _decode(content)
            yield from _stream_all(models, question.strip(), shown)

    return ask if len(models) > 1 else _single(ask)


def _single(several):
    """One output takes the answer itself, not a list of one."""

    def ask(content: object, question: object) -> Iterator[str]:
        with closing(several(content, question)) as parts:
            for part in parts:
                yield part[0]

    return ask


def _reporter(models: Sequence[Loaded]):
    """What "Region report" does: ask each of the six questions that the model was trained on."""

    def report(content: object, modality: str, language: str) -> Iterator[str]:
        with _plain_messages():
            if modality != "panoramic":
                raise AnswerError("Regions are defined on a panoramic radiograph; choose that kind of picture.")
            shown = _decode(content)
            phrases = load_phrases(LANGUAGES.get(language, "en"))
            rows: dict[str, list[str]] = {capitalize(phrases["regions"][region]): [] for region in REGIONS}
            for region, title in zip(REGIONS, rows, strict=True):
                for answers in _stream_all(models, region_question(region, phrases), shown):
                    rows[title] = answers
                    yield draw_table(rows, [loaded.name for loaded in models])

    return report


def _stream_all(models: Sequence[Loaded], question: str, picture: Image.Image) -> Iterator[list[str]]:
    """The answers of all models so far, each time one of them has gone on."""
    answers = [""] * len(models)
    streams = [stream_answer(loaded, question, picture, max_new_tokens=MAX_NEW_TOKENS) for loaded in models]
    try:
        for parts in zip_longest(*streams):
            for number, part in enumerate(parts):
                if part is not None:
                    answers[number] = part.text + (" […]" if part.finish_reason == "length" else "")
            yield list(answers)
    finally:
        for stream in streams:
            stream.close()


def region_question(region: str, phrases: Mapping) -> str:
    """The question about one region of a panoramic, in the words of the training data."""
    whole = phrases["in"].get(region) or phrases["in_region"].format(region=phrases["regions"][region])
    return fill(phrases["region"]["questions"][0], in_region=whole, image=phrases["images"]["panoramic"])


def example_questions(modality: str, language: str) -> list[str]:
    """Questions in the words of the training data that suit a kind of picture."""
    phrases = load_phrases(language)
    image = phrases["images"][modality]
    condition = getattr(load_vocabulary()["caries"], language).condition

    def first(family: str) -> str:
        return fill(phrases[family]["questions"][0], image=image, condition=condition)

    if modality == "panoramic":
        families = [first(name) for name in ("findings_location", "presence", "structured_report", "completeness")]
        return [*families, region_question("left_mandibular", phrases)]
    return [first(name) for name in ("findings", "presence", "diagnosis", "healthy_or_abnormal", "image_type")]


def _show_picture(content: object, modality: str, language: str) -> str:
    import gradio as gr

    try:
        with _plain_messages():
            return draw_preview(_decode(content), regions=modality == "panoramic", language=language)
    except gr.Error as error:
        gr.Warning(error.message, title="Not this one")
        return draw_preview(None)  # not the picture before it, which would no longer be the one that is asked about


def _refuse_size() -> None:
    with _plain_messages():
        raise AnswerError(f"The file is too large: at most {MAX_PICTURE // 1_000_000} MB.")


def _take_example(text: str) -> str:
    return text


def _sample_chooser(samples: Sequence[Sample]):
    import gradio as gr

    def choose(number: object, language: str) -> list:
        with _plain_messages():
            if number not in range(len(samples)):
                raise AnswerError("There is no such sample.")
        content = samples[number].content
        preview, _, *rest = _reword(content, "panoramic", language)
        return [content, gr.update(value="panoramic", choices=_modality_choices(_code(language))), preview, *rest]

    return choose


def _reword(content: object, modality: str, language: str) -> list:
    """What depends on the kind of picture and the language: preview, names of the kinds, questions, the report."""
    import gradio as gr

    with _plain_messages():
        shown = _decode(content) if content else None
    questions = example_questions(modality if modality in MODALITIES else "panoramic", _code(language))
    return [
        draw_preview(shown, regions=modality == "panoramic", language=language),
        gr.update(choices=_modality_choices(_code(language))),
        *questions,
        gr.update(visible=modality == "panoramic"),
    ]


def _code(language: str) -> Language:
    return LANGUAGES.get(language, "en")


def _modality_choices(language: Language) -> list[tuple[str, str]]:
    names = load_phrases(language)["images"]
    return [(capitalize(names[modality]), modality) for modality in MODALITIES]


def draw_preview(picture: Image.Image | None, *, regions: bool = False, language: str = "English") -> str:
    """The picture as the model gets it, with the six regions of a panoramic drawn over it."""
    if picture is None:
        return '<div class="empty">No picture yet: drop one below, paste it, or take a sample.</div>'
    small = picture.copy()
    small.info.clear()
    small.thumbnail((PREVIEW, PREVIEW))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=88)
    source = base64.b64encode(buffer.getvalue()).decode()
    note = f"{picture.width} × {picture.height} pixels, as the model gets it"
    image = f'<img alt="The picture that is asked about" src="data:image/jpeg;base64,{source}">'
    if not regions:
        return f'<figure><div class="frame">{image}</div><figcaption>{note}</figcaption></figure>'
    names = load_phrases(_code(language))["regions"]
    share = 2 * ANTERIOR_HALF_WIDTH
    columns = f"grid-template-columns: {1 - share:g}fr {2 * share:g}fr {1 - share:g}fr"
    cells = "".join(f"<span>{html.escape(capitalize(names[region]))}</span>" for region in REGIONS)
    sides = "<b>R</b> the patient's right", "the patient's left <b>L</b>"
    return (
        f'<figure><div class="frame">{image}<div class="grid" style="{columns}">{cells}</div></div>'
        f'<div class="sides"><span>{sides[0]}</span><span>{sides[1]}</span></div>'
        f"<figcaption>{note}. Borders of the regions are approximate.</figcaption></figure>"
    )


def draw_table(rows: Mapping[str, Sequence[str]], names: Sequence[str]) -> str:
    """The answers region by region; every text is escaped."""
    heads = "".join(f"<th>{html.escape(_column_title(names, number))}</th>" for number in range(len(names)))
    lines = []
    for title, answers in rows.items():
        waiting = ["…"] * (len(names) - len(answers))
        cells = "".join(f"<td><div>{html.escape(text)}</div></td>" for text in (*answers, *waiting))
        lines.append(f'<tr><th scope="row">{html.escape(title)}</th>{cells}</tr>')
    head = f"<thead><tr><th>Region</th>{heads}</tr></thead>"
    return f'<table style="--models: {len(names)}">{head}<tbody>{"".join(lines)}</tbody></table>'


def _column_title(names: Sequence[str], number: int) -> str:
    if len(names) == 1:
        return "Answer"
    return f"{'Tuned' if number == 0 else 'Base'}: {names[number]}"


def _title(names: Sequence[str]) -> str:
    models = " beside ".join(f"<code>{html.escape(name)}</code>" for name in names)
    return f'<div class="title"><h1>DentalGemma</h1><p>{models}</p></div>'


def _disclaimer(language: Language) -> str:
    text = html.escape(DISCLAIMERS[language])
    return f'<div class="disclaimer" role="note"><p lang="{language}">{text}</p></div>'


def _gallery(samples: Sequence[Sample]) -> str:
    buttons = "".join(
        f'<button type="button" data-number="{number}"><img alt="Synthetic panoramic {number + 1}" '
        f'src="data:image/png;base64,{sample.content}"><span>{html.escape(sample.truth)}</span></button>'
        for number, sample in enumerate(samples)
    )
    return f'<p class="label">Samples: synthetic drawings, of no patient</p><div class="gallery">{buttons}</div>'


def _make_sample(phantom: Phantom) -> Sample:
    buffer = io.BytesIO()
    phantom.image.save(buffer, format="PNG")
    phrases, vocabulary = load_phrases("en"), load_vocabulary()
    drawn = [
        f"{vocabulary[finding.label].en.one}, {phrases['regions'][finding_region(finding)]}"
        for finding in phantom.findings
    ]
    truth = capitalize("; ".join(drawn)) or "Nothing abnormal"
    return Sample(base64.b64encode(buffer.getvalue()).decode(), f"Drawn: {truth}")


def _decode(content: object) -> Image.Image:
    """The picture inside a request."""
    if not content:
        raise AnswerError("Choose a picture first, or take a sample.")
    if not isinstance(content, str) or len(content) > MAX_PICTURE * 4 // 3 + 4:
        raise AnswerError(f"The file is too large: at most {MAX_PICTURE // 1_000_000} MB.")
    try:
        return open_picture(base64.b64decode(content, validate=True), name="The file")
    except binascii.Error:
        raise AnswerError("The file did not arrive whole; choose it again.") from None


@contextmanager
def _plain_messages() -> Iterator[None]:
    """What a user can mend is a message on the page; of anything else the log gets the place, not what was asked."""
    import gradio as gr

    try:
        yield
    except InputError as error:
        raise gr.Error(html.escape(str(error), quote=False), title="Please check", print_exception=False) from None
    except Exception as error:
        print(f"{type(error).__name__} at", *traceback.format_tb(error.__traceback__), sep="\n", file=sys.stderr)
        message = "The model could not answer; the machine that serves this page has the reason in its log."
        raise gr.Error(message, title="Failed", print_exception=False) from None


class _Guard:
    """Refuses what the page never sends: uploads and other ways to leave data on the server, and huge requests.

    It also lets Gradio forget a visitor as soon as the answer is delivered. The headers keep a browser from sending
    anything elsewhere.
    """

    HEADERS = (
        (b"content-security-policy", b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"),
        (b"referrer-policy", b"no-referrer"),
        (b"x-content-type-options", b"nosniff"),
    )

    def __init__(self, app) -> None:
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *self.HEADERS]}
            await send(message)

        status = self._refuse(scope)
        if status:
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": b"This page takes no such request."})
            return
        try:
            await self.app(scope, receive, send_with_headers)
        finally:
            if scope["path"].endswith("/queue/data"):  # the answers are delivered, or nobody waits for them
                self._forget(scope)

    def _forget(self, scope) -> None:
        """Drop what Gradio remembers of a visitor: the last picture, question and answer, for as long as it runs."""
        session = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
        scope["app"].state_holder.session_data.pop(session, None)

    def _refuse(self, scope) -> int | None:
        path = scope["path"].rstrip("/")
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            # A "deep link" would write what is on the page to a file.
            return 403 if path.endswith("/deep_link") or "/monitoring" in path else None
        if not path.endswith(TAKES_POST):
            return 403
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit():
            return 411
        return 413 if int(length) > MAX_BODY else None


def _read(name: str) -> str:
    """A style sheet or script of the page."""
    return files("dentalgemma.publishing").joinpath("templates", name).read_text(encoding="utf-8")


def _need_gradio() -> None:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError:
        raise AnswerError('the page needs Gradio: pip install "dentalgemma[demo]"') from None


def _check_port(host: str | None, port: int | None) -> int | None:
    """A port that is free now, before a model is loaded for minutes."""
    if port is None:
        return None
    with socket.socket() as test:
        test.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            test.bind((host or "127.0.0.1", port))
        except OSError as error:
            raise AnswerError(f"port {port} of {host} cannot be used ({error.strerror}); give another --port") from None
        return test.getsockname()[1]


def _theme() -> gr.themes.Base:
    """Fonts of the machine: Gradio's own ones come over the network."""
    import gradio as gr

    return gr.themes.Default(
        primary_hue="teal",
        neutral_hue="slate",
        radius_size="md",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Consolas", "monospace"],
    )


DROP_ZONE = """<label class="drop"><input type="file" accept="image/*,.tif,.tiff,.dcm" aria-label="Choose a picture">
<strong>Choose a picture</strong><span>or drop it here, or paste it. It stays in memory while the model
answers and is never stored.</span></label>"""
FOOTER = (
    f'<p class="foot">DentalGemma {html.escape(__version__)}. Pictures and questions are held in memory while they are '
    "answered; they are not stored, not logged, and sent nowhere else. Do not send pictures that show who the patient "
    "is.</p>"
)
