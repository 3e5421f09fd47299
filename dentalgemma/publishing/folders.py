"""Which kind of folder is to be published, and which of its files belong in the repository."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import yaml

from data_builders.dataset_folder import REPORT
from data_builders.records import InputError
from dentalgemma.certificates import ADAPTER_FOLDER, CERTIFICATE

RUN_FACTS = "run_facts.json"
CARD = "README.md"
# What the system or an editor left; a hidden file is never published either.
LITTER = frozenset({"__pycache__", "Thumbs.db", "desktop.ini"})


class PushRefused(InputError):
    """A folder that must not be published as it is; one sentence for each reason, with its remedy."""


class Publication(NamedTuple):
    """What is to be published: `files` by their path in the repository, `left_here` what stays on this machine."""

    kind: Literal["model", "adapter", "dataset", "space"]
    repo_type: Literal["model", "dataset", "space"]
    files: dict[str, Path]
    left_here: list[str]


def recognise(folder: Path, *, adapter_only: bool = False) -> Publication:
    """Tell a model, its adapter, a dataset and a Space apart by what lies in the folder, and list its files.

    Hidden files, empty folders and what no build wrote into a dataset stay here. `adapter_only` takes the subfolder
    `adapter` of a model folder, with the model's certificate; without it that subfolder stays here.

    Raises:
        PushRefused: when it is none of these, or has a link that leads out of it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PushRefused(f"{folder} is no folder: name a model folder, a dataset folder, or what `space` wrote")
    kind = _tell_kind(folder)
    if adapter_only and kind != "model":
        raise PushRefused(f"{folder} is no merged model: --adapter-only takes the adapter out of one")
    if adapter_only:
        return _take_adapter(folder)
    files, left_here = _list_files(folder)
    belongs = _built_files(folder) if kind == "dataset" else None
    left = [
        path
        for path in files
        if (path.startswith(f"{ADAPTER_FOLDER}/") if kind == "model" else belongs is not None and path not in belongs)
    ]
    kept = {path: local for path, local in files.items() if path not in set(left)}
    return Publication(kind, kind, kept, sorted([*left_here, *left]))


def _built_files(folder: Path) -> set[str] | None:
    """What a build wrote into a dataset folder; `None` where its report does not tell, which the checks refuse."""
    try:
        return {REPORT, *json.loads((folder / REPORT).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _tell_kind(folder: Path) -> Literal["model", "dataset", "space"]:
    if (folder / CERTIFICATE).is_file():
        return "model"
    if (folder / RUN_FACTS).is_file() or (folder / "adapter_config.json").is_file():
        raise PushRefused(
            f"{folder} is a run folder: merge it first (`dentalgemma merge {folder} --out MODEL`), then push MODEL, or "
            "its adapter with --adapter-only"
        )
    if (folder / REPORT).is_file() and (folder / "data").is_dir():
        return "dataset"
    if (folder / "app.py").is_file() and read_front_matter(folder / CARD).get("sdk") == "gradio":
        return "space"
    if any(folder.glob("*.safetensors")):
        raise PushRefused(f"{folder} has weights and no {CERTIFICATE}: make it with `dentalgemma merge`")
    raise PushRefused(
        f"{folder} is no folder that `merge`, `quantize`, `build`, `build-instruct` or `space` wrote: it has neither "
        f"{CERTIFICATE}, nor {REPORT} with data/, nor app.py with a card for a gradio Space"
    )


def _take_adapter(folder: Path) -> Publication:
    if not (folder / ADAPTER_FOLDER).is_dir():
        raise PushRefused(f"{folder}: {_why_no_adapter(folder)}")
    files, left_here = _list_files(folder / ADAPTER_FOLDER)
    files[CERTIFICATE] = folder / CERTIFICATE
    return Publication("adapter", "model", dict(sorted(files.items())), left_here)


def _why_no_adapter(folder: Path) -> str:
    try:
        reason = json.loads((folder / CERTIFICATE).read_text(encoding="utf-8"))["adapter"]["left_out"]
    except (ValueError, LookupError, TypeError):
        return f"it has no subfolder {ADAPTER_FOLDER}/: merge again, which writes one"
    return f"it has no adapter of its own, since {reason}; push the whole model"


def _list_files(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """The files of a folder by their path in it, and what stays here.

    Raises:
        PushRefused: when a link leads out of it.
    """
    root = folder.resolve()
    files: dict[str, Path] = {}
    left_here: list[str] = []
    for path in _walk(folder):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() and not (path.is_file() and path.resolve().is_relative_to(root)):
            raise PushRefused(f"{path} is a link that leads out of {folder}: put the file itself there, or remove it")
        if path.name.startswith(".") or path.name in LITTER:
            left_here.append(name + "/" * path.is_dir())
        elif path.is_dir():
            left_here.append(f"{name}/ (empty)")
        elif path.is_file():
            files[name] = path
        else:
            raise PushRefused(f"{path} is no plain file: remove it")
    return files, left_here


def _walk(folder: Path) -> Iterator[Path]:
    """Every file below a folder, its empty folders, and its hidden ones without what is in them; in a fixed order."""
    for path in sorted(folder.iterdir()):
        closed = path.is_symlink() or path.name.startswith(".") or path.name in LITTER
        if not closed and path.is_dir() and any(path.iterdir()):
            yield from _walk(path)
        else:
            yield path


def read_front_matter(card: Path) -> dict:
    """The metadata at the head of a card; empty where it has none.

    Raises:
        PushRefused: when the head is no YAML mapping.
    """
    try:
        lines = card.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError):
        raise PushRefused(f"{card} cannot be read as text: write it again") from None
    if not lines or lines[0].strip() != "---" or "---" not in lines[1:]:
        return {}
    text = "\n".join(lines[1 : lines.index("---", 1)])
    try:
        head, node = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise PushRefused(f"{card}:{mark.line + 2 if mark else 1}: its metadata is no YAML: write it again") from None
    if not isinstance(head, dict):
        raise PushRefused(f"{card}:1: its metadata is no mapping of names to values: write it again")
    names = [key.value for key, _ in node.value]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:  # readers differ in which one counts
        raise PushRefused(f"{card}: its metadata names {twice} twice: write it again")
    return head
