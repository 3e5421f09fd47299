"""Presets: sources files for public data sets, with their true class maps and licences, to be found in any download."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from data_builders.sources import SourcesError, SourcesFile, read_yaml, validate_sources

DEEPEST = 3  # folders that archives wrap around what is looked for


def list_presets() -> dict[str, Path]:
    """The presets by name: sources files that come with the toolkit."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}


def list_sources(preset: Path) -> dict[str, str]:
    """The names of a preset's sources, which are presets too, and where each is downloaded from."""
    urls: dict[str, dict[str, None]] = {}
    for entry in read_yaml(preset)["sources"]:
        urls.setdefault(entry["name"], {})[entry["url"]] = None
    return {name: " or ".join(own) for name, own in urls.items()}


def load_preset(names: Sequence[str], data: Path) -> SourcesFile:
    """Load a preset (`dentalgemma_vqa`), or some sources of one (`opg_detection`), from the downloads below `data`.

    In a preset `root` is a pattern below `data`, in which `**/` stands for up to three folders, and sources of one
    name are forms of one set, of which one is to be there.

    Raises:
        SourcesError: for an unknown name, and when a set is missing or there twice; it says what belongs where.
    """
    path = _find_preset(names)
    document = read_yaml(path)
    wanted = [entry for entry in document["sources"] if path.stem in names or entry["name"] in names]
    roots = [_find_folders(Path(data).absolute(), entry["root"]) for entry in wanted]
    found: dict[str, list[Path]] = {}
    for entry, folders in zip(wanted, roots, strict=True):
        found.setdefault(entry["name"], []).extend(folders)
    _check_found(found, Path(data), path)
    document["sources"] = [entry | {"root": str(own[0])} for entry, own in zip(wanted, roots, strict=True) if own]
    return validate_sources(document, path)


def _find_preset(names: Sequence[str]) -> Path:
    known = {path: {path.stem, *list_sources(path)} for path in list_presets().values()}
    for path, own in known.items():
        if own.issuperset(names):
            return path
    listed = "; ".join(f"{path.stem}, of which {', '.join(sorted(own - {path.stem}))}" for path, own in known.items())
    raise SourcesError(f"no preset holds {', '.join(names)}; there are {listed}")


def _find_folders(data: Path, pattern: str) -> list[Path]:
    """The innermost folders that fit; `**/` is spelt out, since that of `glob` follows no links."""
    tail = pattern.removeprefix("**/")
    places = {path.resolve(): path for depth in range(DEEPEST + 1) for path in sorted(data.glob("*/" * depth + tail))}
    folders = {place: path for place, path in places.items() if path.is_dir()}
    outer = {parent for place in folders for parent in place.parents}
    return [path for place, path in folders.items() if place not in outer]


def _check_found(found: dict[str, list[Path]], data: Path, preset: Path) -> None:
    for name, folders in found.items():
        if len(folders) > 1:
            raise SourcesError(f"{name} is there {len(folders)} times, keep one: {', '.join(map(str, folders))}")
    missing = [name for name, folders in found.items() if not folders]
    if not missing:
        return
    present = " ".join(f"--preset {name}" for name in found if name not in missing)
    remedy = f" To build from what is there: {present}." if present else ""
    raise SourcesError(f"{data} lacks {', '.join(missing)}.{remedy} What belongs where:\n{_head(preset)}")


def _head(preset: Path) -> str:
    """The comment at the head of a preset, which says what it expects."""
    lines = takewhile(lambda line: line.startswith("#"), preset.read_text(encoding="utf-8").splitlines())
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines)
