"""What README and docs say can be typed: the sources file loads, commands, options, recipes and settings exist."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer
import yaml
from conftest import REPOSITORY

from data_builders.sources import load_sources
from dentalgemma.cli import app

TEXT = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = {
    str(path.relative_to(REPOSITORY)): path
    for pattern in ("README.md", "docs/*.md", "[!.]*/README.md", "examples/*/README.md")
    for path in sorted(REPOSITORY.glob(pattern))
}
COMMANDS = typer.main.get_command(app).commands
LINES = [
    part.strip()
    for page in PAGES.values()
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    for part in line.split(" #")[0].split(" > ")[0].split(" && ")
]


def settings():
    """The settings that a recipe takes: of the YAML files, of `StageConfig`, and those of transformers."""
    names = {key for path in (REPOSITORY / "recipes").glob("*.yaml") for key in yaml.safe_load(path.read_text())}
    classes = [REPOSITORY / "dentalgemma" / "training" / "config.py"]
    classes += [Path(folder) / "training_args.py" for folder in find_spec("transformers").submodule_search_locations]
    return names.union(
        *(re.findall(r"^    (\w+): ", path.read_text(encoding="utf-8"), re.MULTILINE) for path in classes)
    )


def options(arguments):
    return {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}


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
    if name.startswith("--"):
        assert name in ("--help", "--version", "--install-completion", "--show-completion")
        return
    command = COMMANDS[name]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    if command.context_settings.get("allow_extra_args"):  # the doctor hands them to the recipe
        known |= {f"--{setting}" for setting in settings()}

    assert options(arguments) <= known | {"--help"}


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("accelerate launch")])
def test_every_recipe_exists_with_its_settings(line):
    arguments = shlex.split(line)
    place = next(
        n for n, part in enumerate(arguments) if part.endswith(".py") or part.startswith("dentalgemma.recipes.")
    )
    recipe = arguments[place].removeprefix("dentalgemma.").replace("recipes.", "recipes/").removesuffix(".py")

    assert (REPOSITORY / f"{recipe}.py").is_file()
    assert options(arguments[place:]) <= {f"--{setting}" for setting in settings()} | {"--config"}
    for file in (part for part in arguments if part.endswith(".yaml")):
        assert (REPOSITORY / file).is_file()


def test_what_does_not_exist_would_be_noticed():
    assert {"--learning_rate", "--trains", "--max_steps"} <= {f"--{setting}" for setting in settings()}
    assert "learning_rat" not in settings()


@pytest.mark.parametrize("page", PAGES)
def test_every_local_link_leads_somewhere(page):
    path = PAGES[page]

    for target in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def test_every_make_target_exists():
    makefile = (REPOSITORY / "Makefile").read_text()

    for target in re.findall(r"make ([a-z][a-z-]+)", TEXT):
        assert f"\n{target}:" in makefile


def test_it_is_short_enough_to_be_read():
    assert len(TEXT.splitlines()) <= 250
