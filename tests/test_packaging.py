"""The wheel holds what a user runs, and the ranges and pins agree."""

import ast
import json
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import packages_distributions

import pytest
from conftest import REPOSITORY
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The files as they stand, without what git ignores."""
    folder = tmp_path_factory.mktemp("clone") / "source"
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    for name in filter(None, files):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((REPOSITORY / name).read_bytes())
    return folder


def build_wheel(source, folder):
    """The wheel of a source tree or of a source distribution."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def unpacked(wheel):
    """The wheel, unpacked."""
    with zipfile.ZipFile(wheel) as file:
        file.extractall(wheel.parent / "unpacked")
    return wheel.parent / "unpacked"


def contents(wheel):
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


def test_the_source_distribution_builds_the_same_wheel_and_holds_the_tests(source, wheel, tmp_path):
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, source]
    subprocess.run(command, check=True, capture_output=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}

    assert {"tests/conftest.py", "Makefile", "constraints.txt", "CHANGELOG.md"} <= names
    assert not any(name.endswith(".pyc") or name.startswith(".") for name in names)
    assert contents(build_wheel(sdist, tmp_path)) == contents(wheel)


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


def test_a_recipe_of_the_wheel_trains_in_any_folder_by_accelerate_launch(unpacked, tiny_model, vqa_dataset, tmp_path):
    """It finds its own YAML beside itself; two steps, as the first one's learning rate is 0."""
    options = {
        "model_name_or_path": tiny_model,
        "dataset_name": vqa_dataset,
        "output_dir": "run",
        "max_steps": 2,
        "eval_steps": 2,
        "save_steps": 2,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "validation_sample": 0,
        "dataloader_num_workers": 0,
        "learning_rate": 1e-3,
    }
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
    ]
    done = subprocess.run(
        [*launch, "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "dentalgemma.recipes.stage1_vqa"]
        + [part for name, value in options.items() for part in (f"--{name}", str(value))],
        cwd=tmp_path,
        # Printed where it is imported from: the tests' own environment has the clone, which would do as well.
        env={**os.environ, "PYTHONPATH": str(unpacked), "OMP_NUM_THREADS": "1", "PYTHONVERBOSE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "run_facts.json").read_text())["steps"] == 2
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert f"{unpacked}/dentalgemma/training/trainer.py" in done.stderr
    assert f"{REPOSITORY}/dentalgemma/training" not in done.stderr


def test_every_pin_lies_in_its_range():
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = {Requirement(line).name.lower().replace("_", "-"): line.split("==")[1] for line in lines if "==" in line}
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]

    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement


def test_the_lowest_versions_that_are_tested_are_the_lower_ends_of_the_ranges():
    lines = (REPOSITORY / "constraints-lowest.txt").read_text().splitlines()
    lowest = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines if "==" in line}

    for requirement in map(Requirement, PROJECT["dependencies"]):
        name = canonicalize_name(requirement.name)
        (bound,) = (part.version for part in requirement.specifier if part.operator == ">=")
        assert requirement.specifier.contains(lowest[name]), requirement
        # No CPU build of torch 2.11 is at hand everywhere; with its CUDA build the same tests passed on a CPU.
        assert name == "torch" or f"{lowest[name]}.".startswith(f"{bound}."), requirement


def test_the_core_needs_neither_torchvision_nor_ultralytics_nor_bitsandbytes():
    names = {Requirement(line).name for line in PROJECT["dependencies"]}

    assert not names & {"torchvision", "ultralytics", "bitsandbytes", "deepspeed"}


def test_nothing_imports_what_is_not_installed_with_it():
    """At import time the core dependencies alone; within a function also what an extra brings. No dev dependency."""
    extras = PROJECT["optional-dependencies"]
    core = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    optional = core | {
        canonicalize_name(Requirement(line).name) for extra in extras.keys() - {"dev", "docs"} for line in extras[extra]
    }
    brought_by = packages_distributions()
    wrong, seen = [], set()
    for package in ("dentalgemma", "data_builders", "recipes"):
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            for name, line, at_import in imported_names(path):
                name = COMES_WITH.get(name, name)
                owners = {canonicalize_name(owner) for owner in brought_by.get(name, [name])}
                seen |= owners
                allowed = core if at_import and (path.name, name) not in WITH_THEIR_EXTRA else optional
                if not owners & allowed:
                    wrong.append(f"{path.relative_to(REPOSITORY)}:{line} imports {name}")

    assert wrong == []
    assert seen >= {"torch", "trl", "pydicom", "pillow", "pyyaml"}  # it does look


# A module that is only imported within a function which tells what to install.
WITH_THEIR_EXTRA = {("dicom.py", "pydicom")}
COMES_WITH = {"starlette": "gradio"}  # what its pages are served by


def imported_names(path):
    """Top-level packages of others that a file imports: name, line, and whether at import time."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    within = {inner for function in functions for inner in ast.walk(function)}
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        else:
            continue
        for root in {name.partition(".")[0] for name in names}:
            if root not in sys.stdlib_module_names | {"dentalgemma", "data_builders"}:
                yield root, node.lineno, node not in within | for_types
