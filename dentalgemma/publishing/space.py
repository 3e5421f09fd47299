"""Write the demo page as a Space for the Hub: `app.py`, `requirements.txt` and the card."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, PackageLoader, StrictUndefined

from data_builders.records import InputError
from dentalgemma import __version__
from dentalgemma.evaluation.files import write_whole

GRADIO = "6.31.0"  # what the page was tested with, where Gradio is not installed
PYTHON = "3.11"
HARDWARE = "l4x1"  # a suggestion that whoever duplicates the Space sees


class SpaceError(InputError):
    """A Space that cannot be written; the message says what to do."""


def write_space(folder: Path, model: str, *, base: str | None = None, revision: str | None = None) -> Path:
    """Write a Space that shows `model`, beside `base` where one is given, and return its folder.

    Both are Hub ids: a Space cannot see folders of this machine. `revision` is the model's commit or tag.

    Raises:
        SpaceError: for a folder in place of a Hub id, a revision that cannot be one, or a `folder` that is not empty.
    """
    folder = Path(folder)
    for name, option in ((model, "--model"), (base, "--base")):
        if name is not None:
            _check_hub_id(name, option)
    if revision is not None and not re.fullmatch(r"[\w.][\w./-]*", revision):
        raise SpaceError(f"--revision {revision!r} is no commit or tag; give one of the model's, as in v1.0")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise SpaceError(f"{folder} is not empty; choose a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    environment = Environment(
        loader=PackageLoader("dentalgemma.publishing"),
        undefined=StrictUndefined,
        autoescape=False,  # what goes in was checked, and holds no sign of Markdown, YAML or Python
        keep_trailing_newline=True,
    )
    environment.filters["python"] = repr
    facts = {"model": model, "base": base, "revision": revision, "code": name_revision(__version__)}
    card = {
        "title": "DentalGemma",
        "emoji": "🦷",
        "colorFrom": "green",
        "colorTo": "gray",
        "sdk": "gradio",
        "sdk_version": _gradio_version(),
        "python_version": PYTHON,
        "app_file": "app.py",
        "suggested_hardware": HARDWARE,
        "license": "apache-2.0",
        "models": [name for name in (model, base) if name],
        "short_description": "Research demo on dental images, no diagnosis",
    }
    front = yaml.safe_dump(card, sort_keys=False, allow_unicode=True)
    for name in ("README.md", "app.py", "requirements.txt"):
        text = environment.get_template(f"space_{name}.jinja").render(front=front, **facts)
        write_whole(folder / name, text)
    return folder


def name_revision(version: str) -> str:
    """What installs this version from GitHub: the tag of a release; `main` between releases, which have no tag."""
    return "main" if "dev" in version else f"v{version}"


def _check_hub_id(name: str, option: str) -> None:
    problem = f"{option} {name}: a Space loads its model from the Hub; give the Hub id, as in name/model"
    if Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise SpaceError(problem)
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise SpaceError(problem) from None


def _gradio_version() -> str:
    try:
        return version("gradio")
    except PackageNotFoundError:
        return GRADIO
