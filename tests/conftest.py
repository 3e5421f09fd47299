"""What several tests share: built once, small, offline."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
THIRD_PARTY = REPOSITORY.parent / "shared" / "data"


@pytest.fixture(scope="session")
def third_party() -> Path:
    """Real annotation files by others, which lie beside the clone where somebody put them."""
    if not THIRD_PARTY.is_dir():
        pytest.skip("third-party files are not shipped")
    return THIRD_PARTY


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty phantoms in every annotation format, and as many clinical cases."""
    from data_builders.phantom_formats import write_phantoms

    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder, count=40, cases=80, seed=3, progress=False)
    return folder


@pytest.fixture(scope="session")
def vqa_dataset(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VQA dataset folder of the phantoms' YOLO boxes."""
    from data_builders.sources import load_sources
    from data_builders.vqa import build_vqa

    folder = tmp_path_factory.mktemp("data") / "vqa"
    build_vqa(load_sources(phantoms / "sources.yaml"), folder, progress=False)
    return folder


@pytest.fixture(scope="session")
def instruct_dataset(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat dataset folder of the phantoms' clinical cases."""
    from data_builders.instruct import build_instruct
    from data_builders.sources import load_sources

    folder = tmp_path_factory.mktemp("data") / "instruct"
    build_instruct(load_sources(phantoms / "cases.yaml"), folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Gemma 3 with its processor."""
    from dentalgemma.models.tiny import make_tiny_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def real_sources(third_party: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One sources file over five real sets in four formats."""
    path = tmp_path_factory.mktemp("real") / "sources.yaml"
    path.write_text((REPOSITORY / "tests" / "data" / "real_sources.yaml").read_text().replace("DATA", str(third_party)))
    return path


@pytest.fixture(scope="session")
def real_dataset(real_sources: Path) -> Path:
    """The VQA dataset folder built from the real sets."""
    from data_builders.sources import load_sources
    from data_builders.vqa import build_vqa

    folder = real_sources.parent / "built"
    build_vqa(load_sources(real_sources), folder, progress=False)
    return folder


@pytest.fixture(scope="session")
def open_page(tmp_path_factory):
    """Open a page in headless Chromium and return its document as the browser has it."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    profile = tmp_path_factory.mktemp("chromium")

    def open_(path, fragment=""):
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-dev-shm-usage",
        ]
        command = [browser, *flags, f"--user-data-dir={profile}", "--virtual-time-budget=8000", "--dump-dom"]
        url = path.as_uri() + (f"#{fragment}" if fragment else "")
        return subprocess.run([*command, url], capture_output=True, text=True, timeout=90, check=True).stdout

    return open_
