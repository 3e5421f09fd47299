"""The demo page: a picture, a question, the answer as it is written; the same page on a laptop and as a Space.

Pictures never touch a disk. Gradio's own upload writes them to a folder, so the page has a field of its own that sends
them inside the question, and the server refuses uploads. Nothing that a user sends is kept or logged.
"""

from __future__ import annotations

import base64
import html
import os
import re
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from importlib.resources import files
from itertools import zip_longest
from typing import TYPE_CHECKING

from PIL import Image

from data_builders.compose.wording import capitalize, fill, load_phrases
from data_builders.dentition import REGIONS
from data_builders.phantom import make_phantoms
from data_builders.records import InputError, Modality
from data_builders.sources import Language, load_vocabulary
from dentalgemma.answering import AnswerError, Loaded, Part, load_answerer, open_picture, stream_answer
from dentalgemma.demo_drawing import (
    Sample,
    draw_disclaimer,
    draw_drop_zone,
    draw_footer,
    draw_gallery,
    draw_preview,
    draw_table,
    draw_title,
    make_sample,
)
from dentalgemma.demo_guard import MAX_PICTURE, Guard
from dentalgemma.demo_words import LANGUAGES, name_column, take_words

if TYPE_CHECKING:
    import gradio as gr

MODALITIES: tuple[Modality, ...] = ("panoramic", "periapical", "bitewing", "intraoral_photo")
SAMPLES = 3
MAX_QUESTION = 2000  # characters
MAX_NEW_TOKENS = 300
# Scripts of the page: `window.left` says which answers are about a picture that is there no more.
STARTED = "(...sent) => {{ window.left = {{...window.left, {}: false}}; return sent; }}"
ENDED = "(...shown) => window.left.{} ? shown.map(() => '') : shown"
LEFT = "(...shown) => {{ window.left = {}; return shown.map(() => ''); }}"
MODELS, PICTURES = "models", "pictures"  # what waits for its turn: answers one at a time, previews beside them


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
        state_session_capacity=20,  # of those that were left while an answer was written; see `Guard`
        footer_links=[],
        ssr_mode=False,
        app_kwargs={"middleware": [Middleware(Guard)]},
        theme=_theme(),
        css=_read("space_page.css"),
    )
    return page


def build_page(models: Sequence[Loaded]) -> gr.Blocks:
    """The page for one model, or for two that answer side by side."""
    import gradio as gr

    samples = [make_sample(phantom) for phantom in make_phantoms(SAMPLES, seed=7, start=1)]
    names = [loaded.name for loaded in models]
    questions, words = example_questions("panoramic", "en"), take_words("en")
    take_picture = _read("space_picture.js").replace("MAX_PICTURE", str(MAX_PICTURE))
    with gr.Blocks(title="DentalGemma", analytics_enabled=False) as page:
        gr.HTML(draw_title(names))
        gr.HTML(draw_disclaimer(), elem_id="disclaimer")  # stays in view
        with gr.Row(elem_classes="columns"):
            with gr.Column(scale=5, min_width=320):
                preview = gr.HTML(draw_preview(None), elem_id="preview")
                picture = gr.HTML(None, html_template=draw_drop_zone(), js_on_load=take_picture, elem_id="picture")
                modality = gr.Radio(_modality_choices("en"), value="panoramic", label=words["kind"])
                language = gr.Radio(
                    [(name, code) for code, name in LANGUAGES.items()],
                    value="en",
                    label="Language / Idioma",
                    elem_id="language",
                )
                gallery = gr.HTML(
                    None, html_template=draw_gallery(samples), js_on_load=_read("space_samples.js"), elem_id="samples"
                )
            with gr.Column(scale=6, min_width=320):
                question = gr.Textbox(
                    label=words["question"], lines=2, max_length=MAX_QUESTION, elem_id="question", value=questions[0]
                )
                with gr.Row(elem_classes="examples"):
                    examples = [gr.Button(text, size="sm", variant="secondary") for text in questions]
                with gr.Row():
                    ask = gr.Button(words["ask"], variant="primary", elem_id="ask")
                    report = gr.Button(words["report"], elem_id="report")
                    stop = gr.Button(words["stop"], elem_id="stop", min_width=110, scale=0)
                with gr.Row():
                    answers = [
                        gr.Textbox(
                            label=name_column(names, number, "en"),
                            lines=4,
                            max_lines=12,
                            interactive=False,
                            placeholder=words["answer_here"],
                            min_width=240,
                            elem_classes="answer",
                        )
                        for number in range(len(models))
                    ]
                table = gr.HTML("", elem_id="regions")
        gr.HTML(draw_footer())

        chosen = [modality, language, question]
        asks = [question, *examples, report]  # what depends on the kind of picture
        # Gradio logs what its own checks refuse; ours do not.
        quiet = {"api_visibility": "private", "show_progress": "hidden", "preprocess": False}
        writes = {**quiet, "concurrency_id": MODELS, "concurrency_limit": 1}
        asked = gr.on(
            [ask.click, question.submit],
            _asker(models),
            [picture, question, language],
            answers,
            js=STARTED.format("answers"),
            **writes,
        )
        reported = report.click(
            _reporter(models), [picture, modality, language], table, js=STARTED.format("regions"), **writes
        )
        # No answer stands beside a picture that it is not about. What is being written ends, and that takes a moment.
        own = {"api_visibility": "private"}
        stop.click(None, None, None, cancels=[asked, reported], **own)
        asked.then(None, answers, answers, js=ENDED.format("answers"), **own)
        reported.then(None, table, table, js=ENDED.format("regions"), **own)
        written = [table, *answers]
        for changed in (picture.upload, gallery.choose):
            changed(None, None, None, cancels=[asked, reported], **own)
            changed(None, written, written, js=LEFT.format("{answers: true, regions: true}"), **own)
        modality.input(None, None, None, cancels=[reported], **own)
        modality.input(None, table, table, js=LEFT.format("{...window.left, regions: true}"), **own)

        # Of clicks that come while one is under way the last counts; Gradio would drop them all.
        looks = {**quiet, "concurrency_id": PICTURES, "concurrency_limit": 2, "trigger_mode": "always_last"}
        picture.upload(_show_picture, [picture, modality, language], preview, **looks)
        picture.refuse(_refuse_size, language, None, **looks)
        gallery.choose(
            _sample_chooser(samples), [gallery, language, question], [picture, modality, preview, *asks], **looks
        )
        modality.input(_change_kind, [picture, *chosen], [preview, *asks], **looks)
        language.input(
            _language_changer(names), chosen, [modality, ask, report, stop, question, *examples, *answers], **looks
        )
        for example in examples:
            example.click(_take_example, example, question, **looks)
    page.validate_inputs = _check_request
    return page


def _check_request(block_fn: object, inputs: Sequence[object]) -> None:
    """In place of Gradio's own check, which logs what came in: the page sends texts and numbers."""
    import gradio as gr

    if len(inputs) < len(block_fn.inputs) or not all(isinstance(value, str | int | None) for value in inputs):
        raise gr.Error(take_words("en")["no_such_request"], print_exception=False)


def _asker(models: Sequence[Loaded]):
    """What "Ask" does: fill one column for each model, piece by piece."""

    def ask(content: object, question: object, language: object) -> Iterator[list[str]]:
        with _plain_messages(language) as words:
            if not isinstance(question, str) or not question.strip():
                raise AnswerError(words["no_question"])
            if len(question) > MAX_QUESTION:
                raise AnswerError(words["long_question"].format(limit=MAX_QUESTION))
            shown = _decode(content, words)
            yield from _stream_all(models, question.strip(), shown, words)

    return ask if len(models) > 1 else _single(ask)


def _single(several):
    """One output takes the answer itself, not a list of one."""

    def ask(content: object, question: object, language: object) -> Iterator[str]:
        with closing(several(content, question, language)) as parts:
            for part in parts:
                yield part[0]

    return ask


def _reporter(models: Sequence[Loaded]):
    """What "Region report" does: ask each of the six questions that the model was trained on."""

    def report(content: object, modality: object, language: object) -> Iterator[str]:
        with _plain_messages(language) as words:
            if modality != "panoramic":
                raise AnswerError(words["panoramic_only"])
            shown = _decode(content, words)
            phrases = load_phrases(_check_choice(language, tuple(LANGUAGES), words))
            rows: dict[str, list[str]] = {region: [] for region in REGIONS}
            for region in REGIONS:
                for answers in _stream_all(models, region_question(region, phrases), shown, words):
                    rows[region] = answers
                    yield draw_table(rows, [loaded.name for loaded in models])

    return report


def _stream_all(
    models: Sequence[Loaded], question: str, picture: Image.Image, words: Mapping[str, str]
) -> Iterator[list[str]]:
    """The answers of all models so far, each time one of them has gone on."""
    answers = [""] * len(models)
    streams = [stream_answer(loaded, question, picture, max_new_tokens=MAX_NEW_TOKENS) for loaded in models]
    try:
        for parts in zip_longest(*streams):
            for number, part in enumerate(parts):
                if part is not None:
                    answers[number] = tidy_answer(part, words)
            yield list(answers)
    finally:
        for stream in streams:
            stream.close()


def tidy_answer(part: Part, words: Mapping[str, str]) -> str:
    """An answer without empty lines around it; one in which nothing is to be seen says so once it is whole."""
    text = re.sub(r"\n(\s*\n){2,}", "\n\n", part.text.strip())
    if part.finish_reason and not any(letter.isprintable() and not letter.isspace() for letter in text):
        text = words["empty_answer"]
    return text + (" […]" if part.finish_reason == "length" else "")


def region_question(region: str, phrases: Mapping) -> str:
    """The question about one region of a panoramic, in the words of the training data."""
    whole = phrases["in"].get(region) or phrases["in_region"].format(region=phrases["regions"][region])
    return fill(phrases["region"]["questions"][0], in_region=whole, image=phrases["images"]["panoramic"])


def example_questions(modality: Modality, language: Language) -> list[str]:
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


def _show_picture(content: object, modality: object, language: object) -> str:
    import gradio as gr

    try:
        with _plain_messages(language) as words:
            return draw_preview(_decode(content, words), regions=modality == "panoramic")
    except gr.Error as error:
        gr.Warning(error.message)
        # Not the picture before it, which would no longer be the one that is asked about.
        return draw_preview(None)


def _refuse_size(language: object) -> None:
    with _plain_messages(language) as words:
        raise AnswerError(words["large_picture"].format(limit=MAX_PICTURE // 1_000_000))


def _take_example(text: str) -> str:
    return text


def _sample_chooser(samples: Sequence[Sample]):
    import gradio as gr

    def choose(number: object, language: object, question: object) -> list:
        with _plain_messages(language) as words:
            content = samples[_check_choice(number, tuple(range(len(samples))), words)].content
        kind = gr.update(value="panoramic")
        return [content, kind, *_change_kind(content, "panoramic", language, question)]

    return choose


def _change_kind(content: object, modality: object, language: object, question: object) -> list:
    """What depends on the kind of picture: the preview, the question, the examples, the report."""
    import gradio as gr

    with _plain_messages(language) as words:
        preview = draw_preview(_decode(content, words) if content else None, regions=modality == "panoramic")
        return [preview, *_reword(question, modality, language, words), gr.update(visible=modality == "panoramic")]


def _language_changer(names: Sequence[str]):
    import gradio as gr

    def change(modality: object, language: object, question: object) -> list:
        """What Gradio shows in one language; the rest is there in both, see `demo_drawing`."""
        with _plain_messages(language) as words:
            questions = _reword(question, modality, language, words)
            return [
                gr.update(choices=_modality_choices(language), label=words["kind"]),
                words["ask"],
                words["report"],
                words["stop"],
                gr.update(value=questions[0], label=words["question"]),
                *questions[1:],
                *[
                    gr.update(label=name_column(names, number, language), placeholder=words["answer_here"])
                    for number in range(len(names))
                ],
            ]

    return change


def _reword(question: object, modality: object, language: object, words: Mapping[str, str]) -> list:
    """The question, which is exchanged where it is one of the page's own, and the examples."""
    _check_choice(modality, MODALITIES, words)
    examples = example_questions(modality, _check_choice(language, tuple(LANGUAGES), words))
    for own in (example_questions(kind, code) for kind in MODALITIES for code in LANGUAGES):
        if question in own:
            return [examples[own.index(question)], *examples]
    return [question, *examples]


def _check_choice(value: object, choices: Sequence, words: Mapping[str, str]):
    if value not in choices:
        raise AnswerError(words["no_such_request"])
    return value


def _modality_choices(language: Language) -> list[tuple[str, str]]:
    names = load_phrases(language)["images"]
    return [(capitalize(names[modality]), modality) for modality in MODALITIES]


def _decode(content: object, words: Mapping[str, str]) -> Image.Image:
    """The picture inside a request."""
    if not content:
        raise AnswerError(words["picture_first"])
    if not isinstance(content, str) or len(content) > MAX_PICTURE * 4 // 3 + 4:
        raise AnswerError(words["large_picture"].format(limit=MAX_PICTURE // 1_000_000))
    try:
        decoded = base64.b64decode(content, validate=True)
    except ValueError:  # of other letters too, of which `binascii.Error` says nothing
        raise AnswerError(words["broken_picture"]) from None
    try:
        # A Space is for anybody's pictures; on a machine of one's own they stay there.
        return open_picture(decoded, name="The file", text_allowed="SPACE_ID" not in os.environ)
    except AnswerError as error:
        raise AnswerError(words["unreadable"].format(reason=error)) from None


@contextmanager
def _plain_messages(language: object) -> Iterator[Mapping[str, str]]:
    """What a user can mend is a message on the page; of anything else the log gets the place, not what was asked."""
    import gradio as gr

    words = take_words(language)
    try:
        yield words
    except InputError as error:
        message = html.escape(str(error), quote=False)
        raise gr.Error(message, title=words["please_check"], print_exception=False) from None
    except Exception as error:
        print(f"{type(error).__name__} at", *traceback.format_tb(error.__traceback__), sep="\n", file=sys.stderr)
        raise gr.Error(words["see_log"], title=words["failed"], print_exception=False) from None


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
        if os.name == "posix":  # elsewhere this would take a port that another program listens on
            test.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was left just now is free
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
