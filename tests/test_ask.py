"""`dentalgemma ask`: a picture and a question in, the answer as it is written."""

import io
import threading
import zlib
from itertools import pairwise

import pytest
from PIL import Image
from talking_model import make_talking_model
from typer.testing import CliRunner

from data_builders.chat import SYSTEM_PROMPT
from data_builders.images import EXIF_ORIENTATION
from data_builders.phantom import make_phantom
from dentalgemma import cli
from dentalgemma.answering import DISCLAIMER, AnswerError, load_answerer, open_picture, stream_answer
from dentalgemma.evaluation.generation import write_answers
from dentalgemma.evaluation.questions import Question, put_question

QUESTION = "What abnormalities are visible on this panoramic radiograph, and where?"
SAYS = ["One carious lesion", " in the left mandibular region", ".\n", "\x1b[31mNothing else", ".\x07"]


@pytest.fixture(scope="module")
def tiny(tiny_model):
    return load_answerer(str(tiny_model))


@pytest.fixture(scope="module")
def talking(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "talking"
    make_talking_model(tiny_model, folder, SAYS)
    return folder


@pytest.fixture(scope="module")
def picture():
    return make_phantom(3, 1).image


def as_file(image, name="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=name, **options)
    return buffer.getvalue()


def run(*arguments, **options):
    """Run the command as `main` does, and return exit code, output and errors."""
    try:
        result = CliRunner().invoke(cli.app, ["ask", *map(str, arguments)], catch_exceptions=False, **options)
    except ValueError as error:  # which `main` prints as one sentence
        return getattr(error, "exit_code", 1), "", str(error)
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("shown", [True, False], ids=["picture", "text alone"])
def test_the_streamed_answer_is_word_for_word_the_one_that_evaluation_writes(tiny, picture, shown):
    image = open_picture(as_file(picture)) if shown else None
    asked = put_question(Question("1", QUESTION, ""), image, mode="generate", system_prompt=SYSTEM_PROMPT)
    [expected] = write_answers(tiny.model, tiny.processor, [asked], max_new_tokens=24)

    parts = list(stream_answer(tiny, QUESTION, image, max_new_tokens=24))

    assert (parts[-1].text, parts[-1].finish_reason) == (expected["output"], expected["finish_reason"])
    assert all(later.text.startswith(earlier.text) for earlier, later in pairwise(parts))


def test_the_first_piece_is_there_before_the_model_has_written_the_rest(talking):
    loaded, seen, passes = load_answerer(str(talking)), threading.Event(), []

    def wait(*_):
        passes.append(None)
        if len(passes) == 3 and not seen.wait(timeout=60):
            raise TimeoutError("nobody got the first piece")

    hook = loaded.model.register_forward_pre_hook(wait)
    answer = stream_answer(loaded, QUESTION)
    first = next(answer)
    assert first.text == SAYS[0]
    assert len(passes) <= 3
    seen.set()
    parts = list(answer)
    hook.remove()

    assert parts[-1].text == "".join(SAYS)
    assert parts[-1].finish_reason == "stop"


def test_what_fails_while_the_model_writes_reaches_the_caller(talking):
    loaded = load_answerer(str(talking))

    def fail(*_):
        raise RuntimeError("out of memory, say")

    loaded.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        list(stream_answer(loaded, QUESTION))


def test_closing_the_answer_stops_the_model(tiny):
    passes = []
    hook = tiny.model.register_forward_pre_hook(lambda *_: passes.append(None))
    answer = stream_answer(tiny, QUESTION, max_new_tokens=2000)
    next(answer)
    answer.close()
    hook.remove()

    assert len(passes) < 500
    assert tiny.turn.acquire(blocking=False)  # nobody is writing any more
    tiny.turn.release()


def test_the_command_prints_the_answer_alone_and_the_disclaimer_beside_it(talking, picture, tmp_path):
    picture.save(tmp_path / "phantom.png")

    code, output, notes = run(talking, tmp_path / "phantom.png", QUESTION)

    assert code == 0
    # Without the codes that a terminal would obey.
    assert output == "One carious lesion in the left mandibular region.\n[31mNothing else.\n"
    assert DISCLAIMER in notes


def test_a_question_may_come_from_standard_input_and_a_cut_answer_says_so(talking):
    code, output, notes = run(talking, "none", "-", "--max-new-tokens", "1", input=f"{QUESTION}\n")

    assert (code, output) == (0, f"{SAYS[0]}\n")
    assert "cut at 1 tokens; --max-new-tokens" in notes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"not a picture", "is no picture that can be read; give a PNG", id="text"),
        pytest.param(b"", "is no picture that can be read", id="empty"),
        pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no picture", id="PostScript"),
        pytest.param(as_file(Image.new("L", (64, 64)))[:60], "cannot be decoded", id="truncated"),
    ],
)
def test_a_bad_picture_is_one_sentence_before_any_model_is_loaded(content, message, tmp_path):
    path = tmp_path / "bad.png"
    path.write_bytes(content)

    code, output, error = run(tmp_path / "no model", path, QUESTION)

    assert (code, output) == (2, "")
    assert error.startswith(f"{path} ") and message in error
    assert "\n" not in error and "BytesIO" not in error


@pytest.mark.parametrize("stated", [None, "YES"])
def test_dicom_that_does_not_rule_out_text_is_read_where_it_stays_on_this_machine(stated, tmp_path):
    pytest.importorskip("pydicom", reason="needs the extra `dicom`")
    from test_dicom import GREYS, write_dicom

    path = write_dicom(tmp_path / "a.dcm", BurnedInAnnotation=stated)

    assert open_picture(path.read_bytes(), text_allowed=True).size == GREYS.shape[::-1]
    with pytest.raises(AnswerError, match="BurnedInAnnotation"):  # as in a Space
        open_picture(path.read_bytes())
    _, _, error = run(tmp_path / "no model", path, QUESTION)
    assert "no model" in error and "BurnedInAnnotation" not in error  # it got as far as the model


def test_an_answer_in_which_there_is_nothing_says_so_beside_it(tiny_model, tmp_path):
    make_talking_model(tiny_model, tmp_path / "silent", [" \t "])

    code, output, notes = run(tmp_path / "silent", "none", QUESTION)

    assert (code, output.strip()) == (0, "")
    assert "The answer is empty." in notes


def test_a_picture_that_claims_too_many_pixels_is_refused():
    bomb = bytearray(as_file(Image.new("1", (8, 8))))
    bomb[16:24] = (100_000).to_bytes(4) * 2  # width and height in the header
    crc = zlib.crc32(bomb[12:29])
    bomb[29:33] = crc.to_bytes(4)

    with pytest.raises(AnswerError, match=r"the file .*(pixels|picture)"):
        open_picture(bytes(bomb))


def test_an_empty_question_and_a_missing_file_say_so(tmp_path):
    assert run(tmp_path, "none", " ")[0::2] == (2, "the question is empty; type one, or pipe one in with -")
    with pytest.raises(FileNotFoundError):
        run(tmp_path, tmp_path / "missing.png", QUESTION)


def test_pictures_are_turned_upright_and_deep_greys_keep_their_contrast():
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    assert open_picture(as_file(Image.new("RGB", (40, 20)), "JPEG", exif=exif)).size == (20, 40)
    deep = Image.new("I;16", (2, 1))
    deep.putpixel((1, 0), 4095)  # 12 bits
    assert [open_picture(as_file(deep)).getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 0), (255, 255, 255)]
