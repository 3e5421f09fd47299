"""Which kind of folder is to be published, and which of its files belong in the repository."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from data_builders.dataset_folder import REPORT
from data_builders.records import InputError
from dentalgemma.certificates import (
    ADAPTER_CONFIG,
    ADAPTER_FOLDER,
    ADAPTER_WEIGHTS,
    CERTIFICATE,
    MODEL_FILES,
    PROCESSOR_FILES,
)

RUN_FACTS = "run_facts.json"
CARD, NOTICE = "README.md", "NOTICE"
TERMS = ("TERMS.md", "TERMS.txt")  # a copy of the base's terms, which its owner wants recipients to be given
PAPERS = (CARD, NOTICE, CERTIFICATE, *TERMS)
SPACE_FILES = (CARD, "app.py", "requirements.txt")
RESULTS = ".eval_results"  # what `export-results` writes: the one hidden folder that the Hub reads
FIGURE = re.compile(r"\bfigures/[\w.-]+")
# What the system or an editor left; a hidden file is never published either.
LITTER = frozenset({"__pycache__", "Thumbs.db", "desktop.ini"})


class PushRefused(InputError):
    """A folder that must not be published as it is; one sentence for each reason, with its remedy."""


class Publication(NamedTuple):
    """What is to be published: `files` by their path in the repository, `left_here` what stays on this machine.

    `beside` are those files of `left_here` that lie right beside a model or a Space without being part of it: they are
    looked into all the same, since a token there is one too many. What lies in folders of its own is not.
    """

    kind: Literal["model", "adapter", "dataset", "space"]
    repo_type: Literal["model", "dataset", "space"]
    files: dict[str, Path]
    left_here: list[str]
    beside: dict[str, Path] = {}


def recognise(folder: Path, *, adapter_only: bool = False) -> Publication:
    """Tell a model, its adapter, a dataset and a Space apart by what lies in the folder, and list its files.

    A repository gets what `merge`, `card`, `quantize`, `build` and `space` write, and no other file: of a model the
    weights that its certificate lists, settings and processor, papers, and the figures that its card shows.
    `adapter_only` takes the subfolder `adapter` of a model folder, with the model's certificate; without it that
    subfolder stays here.

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
    if kind == "model":
        left_here = _take_results(folder, files, left_here)
        belongs = {*PAPERS, *MODEL_FILES, *_certified_files(folder), *_shown_figures(folder)}
        return _sort_out("model", files, left_here, lambda path: path in belongs or path.startswith(f"{RESULTS}/"))
    if kind == "space":
        return _sort_out("space", files, left_here, lambda path: path in SPACE_FILES)
    built = _built_files(folder)
    return _sort_out("dataset", files, left_here, lambda path: built is None or path in built)


def _sort_out(
    kind: Literal["model", "adapter", "dataset", "space"],
    files: Mapping[str, Path],
    left_here: Iterable[str],
    belongs: Callable[[str], bool],
) -> Publication:
    """Split files into those that are published and those that stay here."""
    kept = {path: local for path, local in sorted(files.items()) if belongs(path)}
    left = [path for path in files if path not in kept]
    beside = {path: files[path] for path in left if kind != "dataset" and "/" not in path}
    repo_type = "model" if kind == "adapter" else kind
    return Publication(kind, repo_type, kept, sorted([*left_here, *_name_folders(left, kept)]), beside)


def _name_folders(left: Iterable[str], kept: Iterable[str]) -> Iterator[str]:
    """A folder of which nothing is published in one word, `adapter/ (11 files)`; else every file."""
    part = {path.split("/")[0] for path in kept}
    whole: dict[str, int] = {}
    for path in left:
        top = path.split("/")[0]
        if top == path or top in part:
            yield path
        else:
            whole[top] = whole.get(top, 0) + 1
    yield from (f"{top}/ ({count} file{'s' * (count != 1)})" for top, count in whole.items())


def _certified_files(folder: Path) -> set[str]:
    """The weights that the certificate lists; none where it is damaged, which the checks refuse."""
    try:
        return set(json.loads((folder / CERTIFICATE).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, LookupError, TypeError):
        return set()


def _shown_figures(folder: Path) -> set[str]:
    try:
        return set(FIGURE.findall((folder / CARD).read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError):
        return set()


def _take_results(folder: Path, files: dict[str, Path], left_here: list[str]) -> list[str]:
    """Add the results that the Hub shows on a model's page; returns what is left here without them."""
    results = folder / RESULTS
    if results.is_symlink() or not results.is_dir():
        return left_here
    files |= {
        f"{RESULTS}/{path.name}": path for path in results.glob("*.yaml") if path.is_file() and not path.is_symlink()
    }
    others = [path for path in sorted(results.iterdir()) if f"{RESULTS}/{path.name}" not in files]
    return [*(path for path in left_here if path != f"{RESULTS}/"), *(f"{RESULTS}/{path.name}" for path in others)]


def _built_files(folder: Path) -> set[str] | None:
    """What a build wrote into a dataset folder; `None` where its report does not tell, which the checks refuse."""
    try:
        return {REPORT, *json.loads((folder / REPORT).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _tell_kind(folder: Path) -> Literal["model", "dataset", "space"]:
    if (folder / CERTIFICATE).is_file():
        return "model"
    if (folder / RUN_FACTS).is_file() or (folder / ADAPTER_CONFIG).is_file():
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
    adapter = folder / ADAPTER_FOLDER
    files, left_here = _list_files(adapter)
    files[CERTIFICATE] = folder / CERTIFICATE
    for name in TERMS:
        if (folder / name).is_file() and not (folder / name).is_symlink():
            files.setdefault(name, folder / name)
    belongs = {*PAPERS, *PROCESSOR_FILES, ADAPTER_WEIGHTS, ADAPTER_CONFIG, *_shown_figures(adapter)}
    return _sort_out("adapter", files, left_here, lambda path: path in belongs)


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
        text = card.read_bytes().decode("utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError):
        raise PushRefused(f"{card} cannot be read as text: write it again") from None
    head = _find_head(text)
    by_hub = REGEX_YAML_BLOCK.search(text)
    if head != (by_hub and by_hub.group(2).replace("\r\n", "\n")) or (head and "\r" in head):
        raise PushRefused(f"{card}: its metadata do not stand between two lines of --- alone: write it again")
    if head is None:
        return {}
    text = head
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


def _find_head(text: str) -> str | None:
    """What stands between a first line `---` and the next one; the Hub's own reader is more lenient."""
    lines = text.replace("\r\n", "\n").split("\n")
    if lines[0] != "---" or "---" not in lines[1:]:
        return None
    return "\n".join(lines[1 : lines.index("---", 1)])
