"""What the README says can be typed: its sources file loads, its commands and options exist."""

import re
import shlex

import pytest
import typer
from conftest import REPOSITORY

from data_builders.sources import load_sources
from dentalgemma.cli import app

TEXT = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path for path in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))}
COMMANDS = typer.main.get_command(app).commands
LINES = [
    line.split(" #")[0].split(" > ")[0].strip()
    for page in PAGES.values()
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for line in block.splitlines()
]


def test_the_sources_file_loads(tmp_path):
    for folder in ("opg/Original_Data", "photos", "teeth"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "sources.yaml").write_text(re.search(r"```yaml\n(seed: .*?)```", TEXT, flags=re.DOTALL)[1])

    assert [source.name for source in load_sources(tmp_path / "sources.yaml").sources] == [
        "opg_detection",
        "photographs",
        "teeth",
    ]


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("dentalgemma ")])
def test_every_command_exists_with_its_options(line):
    _, name, *arguments = shlex.split(line)
    known = {option for parameter in COMMANDS[name].params for option in parameter.opts}

    assert {argument for argument in arguments if argument.startswith("--")} <= known


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("accelerate ")])
def test_every_recipe_exists(line):
    assert (REPOSITORY / next(part for part in shlex.split(line) if part.endswith(".py"))).is_file()


@pytest.mark.parametrize("page", PAGES)
def test_every_local_link_leads_somewhere(page):
    path = PAGES[page]

    for target in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def test_every_make_target_exists():
    makefile = (REPOSITORY / "Makefile").read_text()

    for target in re.findall(r"make ([a-z][a-z-]+)", TEXT):
        assert f"\n{target}:" in makefile


def test_it_is_short_enough_to_be_read():
    assert len(TEXT.splitlines()) <= 250
