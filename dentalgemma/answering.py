"""Ask a model one question, and see its answer while it is written: in the terminal, and on the page of `app.py`."""

from __future__ import annotations

import io
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from queue import SimpleQueue
from typing import Literal, NamedTuple

import torch
from PIL import Image
from rich.console import Console
from transformers import PreTrainedModel, ProcessorMixin
from transformers.generation.streamers import BaseStreamer

from data_builders.chat import SYSTEM_PROMPT
from data_builders.images import UNREADABLE, ImageError, is_dicom, measure_pixels
from data_builders.records import InputError
from dentalgemma.evaluation.generation import decode_greedily
from dentalgemma.evaluation.likelihood import encode
from dentalgemma.evaluation.questions import Question, put_question
from dentalgemma.models.loading import check_sound, find_start, fold_adapters, load_pretrained
from dentalgemma.models.processors import take_image_fit

DISCLAIMER = (
    "Research and education only. This is no medical device and gives no diagnosis; what a model says must be checked "
    "by a dental professional."
)
NO_IMAGE = "none"
# Pillow knows many more; some of them, such as EPS, start other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what a terminal would obey; tab and line feed stay
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what tokens decode to that are only the first bytes of a letter


class AnswerError(InputError):
    """A question that cannot be put; the message says what to mend."""


class Loaded(NamedTuple):
    """A model that is ready to answer, and what to call it; it writes one answer at a time."""

    name: str
    model: PreTrainedModel
    processor: ProcessorMixin
    turn: threading.Lock


class Part(NamedTuple):
    """An answer as far as it is written; `finish_reason` is None until it is whole, `length` where it was cut."""

    text: str
    finish_reason: Literal["stop", "length"] | None = None


class _StoppedError(Exception):
    """Nobody waits for the rest of the answer."""


def ask(model: str, image: str, question: str, *, revision: str | None = None, max_new_tokens: int = 300) -> None:
    """Print a model's answer as it is written, and the disclaimer to stderr.

    `image` is a file, or `none`; a `question` of `-` is read from standard input.

    Raises:
        AnswerError: for a picture that cannot be read, or an empty question.
        OSError: when there is no such file.
        LoadError: when there is no such model.
    """
    notes = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    question = (sys.stdin.read() if question == "-" else question).strip()
    if not question:
        raise AnswerError("the question is empty; type one, or pipe one in with -")
    picture = None
    if image != NO_IMAGE:  # before a model is loaded for minutes
        picture = open_picture(Path(image).read_bytes(), name=image, text_allowed=True)
    notes.print(DISCLAIMER, style="yellow")
    loaded = load_answerer(model, revision=revision)
    shown, part = 0, Part("")
    with closing(stream_answer(loaded, question, picture, max_new_tokens=max_new_tokens)) as parts:
        for part in parts:
            sys.stdout.write(CONTROLS.sub("", part.text[shown:]))
            sys.stdout.flush()
            shown = len(part.text)
    sys.stdout.write("\n")
    if not part.text.strip():
        notes.print("The answer is empty.", style="yellow")
    if part.finish_reason == "length":
        notes.print(f"The answer was cut at {max_new_tokens} tokens; --max-new-tokens allows more.", style="yellow")


def open_picture(content: bytes, *, name: str = "the file", text_allowed: bool = False) -> Image.Image:
    """The pixels of a picture file as evaluation shows them to a model: RGB, upright, at the size of the file.

    `text_allowed` is for pictures that leave this machine in no way: DICOM need not state that its pixels are free of
    text, which may name a patient.

    Raises:
        AnswerError: when it is no picture, is damaged, or is too large; it calls the file `name`.
    """
    try:
        if not is_dicom(io.BytesIO(content)):
            Image.open(io.BytesIO(content), formats=FORMATS)  # reads the header alone
        return measure_pixels(io.BytesIO(content), text_allowed=text_allowed)[1]
    except ImageError as error:
        raise AnswerError(f"{name} {error}") from None
    except (*UNREADABLE, Image.DecompressionBombWarning):
        raise AnswerError(
            f"{name} is no picture that can be read; give a PNG, JPEG, WebP, BMP, TIFF or DICOM"
        ) from None


def load_answerer(name: str, *, revision: str | None = None) -> Loaded:
    """Load a model folder, a run folder with its adapters, or a Hub id, as evaluation does, onto the accelerator.

    Raises:
        LoadError: when it is missing, gated, or known to be wrong.
    """
    start = find_start(name, revision)
    check_sound(start)
    model, processor = load_pretrained(start.base, revision=start.revision)
    fold_adapters(model, start.adapters)
    if start.adapters:
        take_image_fit(processor, start.adapters[-1])
    # Quantised weights are loaded where they stay.
    if torch.accelerator.is_available() and not getattr(model, "is_quantized", False):
        model.to(torch.accelerator.current_accelerator())
    called = Path(name).resolve().name if Path(name).is_dir() else name
    return Loaded(called, model.eval(), processor, threading.Lock())


def stream_answer(
    loaded: Loaded, question: str, picture: Image.Image | None = None, *, max_new_tokens: int = 300
) -> Iterator[Part]:
    """Yield the answer to an open question as it is written: the words that `evaluate` would put into its file.

    The prompt is evaluation's, decoding is greedy. What fails while the model writes is raised here; closing the
    iterator ends the writing.
    """
    asked = Question(item_id="asked", question=question, answer="")
    conversation = put_question(asked, picture, mode="generate", system_prompt=SYSTEM_PROMPT)
    model, processor = loaded.model, loaded.processor
    inputs = encode(processor, [conversation]).to(model.device, model.dtype)
    config = decode_greedily(model, processor, conversation, max_new_tokens=max_new_tokens)
    written = _Written(processor, set(config.eos_token_id))

    def write() -> None:
        try:
            with loaded.turn, torch.inference_mode():
                model.generate(**inputs, generation_config=config, streamer=written)
        except BaseException as error:
            written.parts.put(error)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        while True:
            part = written.parts.get()
            if isinstance(part, BaseException):
                raise part
            yield part
            if part.finish_reason:
                return
    finally:
        written.stopped = True
        thread.join()


class _Written(BaseStreamer):
    """Takes tokens from `generate` and puts into `parts` what they say; once `stopped`, it ends the generation."""

    def __init__(self, processor: ProcessorMixin, ends: set[int]) -> None:
        self.tokenizer, self.ends = processor.tokenizer, ends
        self.parts: SimpleQueue[Part | BaseException] = SimpleQueue()
        self.tokens: list[int] = []
        self.prompted = self.stopped = self.ended = False

    def put(self, value: torch.Tensor) -> None:
        if self.stopped:
            raise _StoppedError
        if not self.prompted:  # the first call brings the prompt
            self.prompted = True
            return
        for token in value.reshape(-1).tolist():
            self.ended = self.ended or token in self.ends
            if not self.ended:
                self.tokens.append(token)
        text = self._decode()
        if not text.endswith(UNFINISHED):
            self.parts.put(Part(text))

    def end(self) -> None:
        self.parts.put(Part(self._decode(), "stop" if self.ended else "length"))

    def _decode(self) -> str:
        return self.tokenizer.decode(self.tokens, skip_special_tokens=True)
