"""The chat form of a row: the system prompt, and the columns of a dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal, TypedDict

SYSTEM_PROMPT = "You are an expert dental clinician and radiologist AI assistant."
SPLITS = ("train", "validation", "test")


class Message(TypedDict):
    """One turn; where an image belongs is told by the `images` column, so the content is plain text."""

    role: Literal["system", "user", "assistant"]
    content: str


class Row(TypedDict):
    """One row of a dataset: what TRL trains on (`images`, `prompt`, `completion`), and where it comes from.

    `images` are ids (SHA-256 of the pixels) until the dataset folder is written, which puts the files' bytes in their
    place. `claims` is canonical JSON.
    """

    images: list[str]
    prompt: list[Message]
    completion: list[Message]
    row_id: str
    image_id: str | None
    group_id: str
    source: str
    license: str | None
    language: str
    question_type: str
    claims: str


def make_row_id(row: Mapping) -> str:
    """What tells a row of a VQA dataset from all others: source, image, language, question type and claims, hashed."""
    key = "/".join(str(row[name]) for name in ("source", "image_id", "language", "question_type", "claims"))
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def prompt_messages(question: str, system_prompt: str = SYSTEM_PROMPT) -> list[Message]:
    """System prompt and question; an empty system prompt is left out."""
    system: list[Message] = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": question}]


def answer_messages(answer: str) -> list[Message]:
    """The completion: one assistant turn."""
    return [{"role": "assistant", "content": answer}]
