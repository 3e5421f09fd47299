"""The layers are a test, not a diagram: recipes → dentalgemma → data_builders, and what is light stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

HEAVY = {"torch", "transformers", "trl", "peft", "accelerate"}
FORBIDDEN = {
    "dentalgemma": {"recipes"},
    "data_builders": {"dentalgemma", "recipes", *HEAVY},
}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_one_way(package):
    for path in sorted((REPOSITORY / package).rglob("*.py")):
        found = imported_roots(path) & FORBIDDEN[package]
        assert not found, f"{path} imports {found}"


def test_nothing_imports_a_recipe():
    recipes = {path.stem for path in (REPOSITORY / "recipes").glob("*.py")}
    sources = [*(REPOSITORY / "dentalgemma").rglob("*.py"), *(REPOSITORY / "data_builders").rglob("*.py")]

    assert recipes >= {"stage1_vqa", "stage2_instruct"}
    assert not any(imported_roots(path) & recipes for path in sources)
    # A launched script's folder heads sys.path: a recipe named after a library would hide it.
    assert not recipes & {"datasets", "evaluate", "accelerate", "trl", "peft", "transformers", "torch"}


@pytest.mark.parametrize(
    "command",
    [
        pytest.param("import data_builders", id="data_builders"),
        pytest.param("import data_builders.vqa, data_builders.instruct, data_builders.probes", id="builders"),
        pytest.param(
            "import sys; sys.argv = ['dentalgemma', '--help']; from dentalgemma.cli import main; main()", id="help"
        ),
        pytest.param(
            "import sys; sys.argv = ['dentalgemma', 'build', '--help']; from dentalgemma.cli import main; main()",
            id="build help",
        ),
    ],
)
def test_what_is_light_loads_no_torch(command):
    report = f"import atexit, sys; atexit.register(lambda: print('HEAVY', sorted(set(sys.modules) & {HEAVY!r})))"
    done = subprocess.run([sys.executable, "-c", f"{report}\n{command}"], capture_output=True, text=True, timeout=60)

    assert "HEAVY []" in done.stdout, done.stdout[-500:] + done.stderr[-500:]


def imported_roots(path: Path) -> set[str]:
    roots = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            roots.add(node.module.split(".")[0])
    return roots
