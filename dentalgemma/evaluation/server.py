"""Ask a model behind an endpoint the same questions, by the same prompts, into the same file. Light: no torch."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image

from data_builders.chat import SYSTEM_PROMPT
from data_builders.images import STORED_AS_IT_IS, ImageError, read_stored
from dentalgemma.evaluation.asking import Outcome, ask_all
from dentalgemma.evaluation.endpoints import Endpoint, Reply
from dentalgemma.evaluation.predictions import (
    Arm,
    append_predictions,
    choose_images,
    identify,
    open_image,
    progress_bar,
    utc_now,
)
from dentalgemma.evaluation.questions import EvaluationError, Mode, Question, put_question

AS_THE_FILE_IS = ("L", "RGB")  # pixels that every reader takes for the same; palettes and transparency are not


def ask_server(
    endpoint: Endpoint,
    items: Sequence[Question],
    *,
    out: Path,
    mode: Mode = "generate",
    images: Arm = "true",
    stretch: int | None = None,
    workers: int = 4,
    max_new_tokens: int = 64,
    max_new_tokens_open: int = 512,
    system_prompt: str = SYSTEM_PROMPT,
    model_name: str | None = None,
    hardware: str | None = None,
    progress: bool = True,
) -> None:
    """Answer `items` by `workers` requests at a time and append each answer to `out` (JSONL); resumes as
    `evaluate_questions` does.

    Temperature 0 and seed 0 are asked for; each line says what the server took. An empty answer is an answer. Lines
    come in the order of the answers. `latency_ms` is the time of the request as this side sees it, with so many others
    beside it; None where it took several tries. `hardware` is the server's, for the record.

    `stretch` is the side in pixels of the square that pictures are scaled to before they are sent, as Gemma 3's
    processor does: llama.cpp keeps their shape instead, between black bars (mtmd-image.cpp, commit 0c1e570). Without
    it they travel at their own size.

    Raises:
        EvaluationError: when some items got no answer, after all others have theirs; the same command asks for these
            alone. Before anything is asked, when `out` holds other answers, or for mode `loglikelihood`.
    """
    if mode != "generate":
        raise EvaluationError(
            f"mode {mode} scores options by the logits of a model that is loaded here, which a server does not give; "
            "use mode generate, or --model with a folder"
        )
    shown = choose_images(items, mode=mode, images=images)
    limits = {"closed": max_new_tokens, "open": max_new_tokens_open}
    settings = {
        "model": model_name or endpoint.model,
        "weights": None,
        "dtype": None,
        "mode": mode,
        "images": images,
        "image_fit": f"stretch to {stretch}" if stretch and images != "none" else None,
        "system_prompt": system_prompt,
        "server": {"url": endpoint.url, "api": endpoint.api, "served_model": endpoint.model},
    }
    asked = {
        item.item_id: identify(item, shown[item.item_id], mode=mode)
        | settings
        | {"generation": {"temperature": 0, "seed": 0, "max_tokens": limits[item.kind]}}
        for item in items
    }
    with append_predictions(out, asked) as file, progress_bar(progress) as bar:
        left = [item for item in items if item.item_id not in file.done]
        task = bar.add_task(f"Asking {settings['model']}, {images} images", total=len(items), completed=len(file.done))
        warm_up = {item.item_id for item in left[:workers]}  # the first one of each worker

        def ask(item: Question) -> EvaluationError | None:
            known = asked[item.item_id]
            try:
                system, messages = write_messages(
                    item, shown[item.item_id], images=images, system_prompt=system_prompt, stretch=stretch
                )
                reply = endpoint.complete(messages, system=system, **known["generation"])
            except EvaluationError as failure:
                return failure
            circumstances = {"warm_up": item.item_id in warm_up, "batch_size": None, "hardware": hardware}
            file.write([_compose_line(known, reply, workers=workers) | circumstances])
            bar.advance(task)
            return None

        outcome = ask_all(ask, left, workers=workers, interrupt=endpoint.close)
    if outcome.failures:
        raise _explain(out, outcome)


def write_messages(
    item: Question, shown: Question | None, *, images: Arm, system_prompt: str, stretch: int | None = None
) -> tuple[str | None, list[dict]]:
    """System prompt and messages in OpenAI's form, of the conversation that a model loaded here is asked."""
    picture = open_image(shown, images=images)
    *system, user = put_question(item, picture, mode="generate", system_prompt=system_prompt)
    content = [
        {"type": "image_url", "image_url": {"url": _write_url(shown, part["image"], images=images, stretch=stretch)}}
        if part["type"] == "image"
        else part
        for part in user["content"]
    ]
    return (system[0]["content"][0]["text"] if system else None), [{"role": "user", "content": content}]


def _write_url(shown: Question, picture: Image.Image, *, images: Arm, stretch: int | None) -> str:
    """A `data:` URL of a picture: the file's own bytes without metadata, which may name a patient, where any reader
    sees the same pixels in them; else a PNG of these pixels."""
    if stretch:
        picture = picture.resize((stretch, stretch), Image.Resampling.BILINEAR)
    elif images != "blank" and _is_plain(shown.image):
        with suppress(ImageError):
            stored = read_stored(shown.image)
            return _data_url(stored.content, kind="jpeg" if stored.suffix == ".jpg" else "png")
    picture.info.clear()  # Pillow would write a colour profile that is in there
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return _data_url(buffer.getvalue(), kind="png")


def _data_url(content: bytes, *, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _is_plain(path: Path) -> bool:
    with Image.open(path) as image:
        suffix = STORED_AS_IT_IS.get(image.format or "")
        return suffix in (".jpg", ".png") and image.mode in AS_THE_FILE_IS and "transparency" not in image.info


def _compose_line(known: Mapping, reply: Reply, *, workers: int) -> dict:
    server = {
        "model": reply.model,
        "requested": reply.requested,
        "honoured": reply.honoured,
        "usage": reply.usage,
        "attempts": reply.attempts,
        "workers": workers,
    }
    return {
        **known,
        "output": reply.text,
        "finish_reason": reply.finish_reason,
        "latency_ms": round(reply.seconds * 1000, 3) if reply.attempts == 1 else None,
        "answered_at": utc_now(),
        "server": known["server"] | server,
    }


def _explain(out: Path, outcome: Outcome) -> EvaluationError:
    failed, unasked = outcome.failures, outcome.unasked
    item, error = failed[0]
    named = ", ".join(item.item_id for item, _ in failed[:10]) + (", …" if len(failed) > 10 else "")
    left = f"; {unasked} were not asked, since they would fail as well" if unasked else ""
    return EvaluationError(
        f"{out}: {len(failed) + unasked} items have no answer; the request failed for {named}{left}; "
        f"{item.item_id}: {error}; all answers are saved, and the same command asks only for what is missing"
    )
