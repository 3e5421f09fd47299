"""The wheel holds what a user runs, and the ranges and pins agree."""

import os
import subprocess
import sys
import tomllib
import zipfile

import pytest
from conftest import REPOSITORY
from packaging.requirements import Requirement

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The wheel of the files as they stand, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    for name in filter(None, files):
        if (REPOSITORY / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((REPOSITORY / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source]
    subprocess.run(command, check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "unpacked")
    return folder / "unpacked"


@pytest.mark.parametrize(
    "name",
    [
        "dentalgemma/cli.py",
        "dentalgemma/recipes/stage1_vqa.py",
        "dentalgemma/recipes/stage1_vqa.yaml",
        "dentalgemma/recipes/stage2_instruct.yaml",
        "dentalgemma/recipes/accelerate/cpu.yaml",
        "dentalgemma/publishing/templates/model_card.md.jinja",
        "dentalgemma/publishing/templates/quickstart.html.jinja",
        "data_builders/readers/yolo.py",
        "data_builders/compose/vocabulary.yaml",
        "data_builders/lexicon/es.yaml",
        "data_builders/pages/gallery.html.jinja",
        "data_builders/presets/dentalgemma_vqa.yaml",
        "data_builders/compose/phrases/es.yaml",
    ],
)
def test_the_wheel_holds_code_recipes_and_data(unpacked, name):
    assert (unpacked / name).is_file()


def test_the_wheel_holds_no_tests_and_no_top_level_recipes(unpacked):
    names = {path.name for path in unpacked.iterdir() if path.suffix != ".dist-info"}

    assert names == {"dentalgemma", "data_builders"}


def test_a_recipe_starts_from_the_wheel_in_any_folder(unpacked, tmp_path):
    """It finds its own YAML, whose base is asked for before anything is downloaded."""
    done = subprocess.run(
        [sys.executable, "-m", "dentalgemma.recipes.stage1_vqa", "--dataset_name", "nowhere"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert "nowhere is neither a folder here nor a dataset" in done.stderr


def test_every_pin_lies_in_its_range():
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = {Requirement(line).name.lower().replace("_", "-"): line.split("==")[1] for line in lines if "==" in line}
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]

    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement


def test_the_core_needs_neither_torchvision_nor_ultralytics_nor_bitsandbytes():
    names = {Requirement(line).name for line in PROJECT["dependencies"]}

    assert not names & {"torchvision", "ultralytics", "bitsandbytes", "deepspeed"}
