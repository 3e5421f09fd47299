"""`dentalgemma space`: the demo page as a folder that a Space of the Hub runs as it is."""

import ast
import re
from importlib.metadata import version

import pytest
import yaml
from conftest import REPOSITORY
from typer.testing import CliRunner

from data_builders.records import InputError
from dentalgemma import __version__, cli
from dentalgemma.publishing.space import SpaceError, name_revision, write_space

MODEL, BASE = "someone/dentalgemma", "google/medgemma-1.5-4b-it"


def front_matter(folder):
    _, front, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), body


def test_a_space_is_three_files_with_the_front_matter_that_the_hub_reads(tmp_path):
    folder = write_space(tmp_path / "space", MODEL, base=BASE, revision="v1.0")

    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "app.py", "requirements.txt"]
    front, body = front_matter(folder)
    assert front == {
        "title": "DentalGemma",
        "emoji": "🦷",
        "colorFrom": "green",
        "colorTo": "gray",
        "sdk": "gradio",
        "sdk_version": version("gradio"),
        "python_version": "3.11",
        "app_file": "app.py",
        "suggested_hardware": "l4x1",
        "license": "apache-2.0",
        "models": [MODEL, BASE],
        "short_description": "Research demo on dental images, no diagnosis",
    }
    for said in ("no medical device", "HF_TOKEN", "not stored", f"terms of {MODEL}", "revision `v1.0`"):
        assert said in body
    assert f"dentalgemma demo {MODEL} --base {BASE} --revision v1.0\n" in body
    code = name_revision(__version__)
    pinned = f"dentalgemma[demo] @ git+https://github.com/dentalgemma/dentalgemma@{code}"
    assert (folder / "requirements.txt").read_text() == f"{pinned}\n"
    assert f'pip install "{pinned}"' in body and f"that of `{code}`" in body


@pytest.mark.parametrize(
    ("written_by", "code", "said"),
    [
        ("0.1.0", "v0.1.0", "The build fails where GitHub has no such tag"),
        ("0.2.0.dev0", "main", "It changes: put a commit or a release in its place"),
    ],
)
def test_a_release_names_its_tag_and_code_between_releases_the_main_branch(
    written_by, code, said, tmp_path, monkeypatch
):
    monkeypatch.setattr("dentalgemma.publishing.space.__version__", written_by)
    folder = write_space(tmp_path / "space", MODEL)
    _, body = front_matter(folder)

    assert (folder / "requirements.txt").read_text().endswith(f"/dentalgemma/dentalgemma@{code}\n")
    assert f'dentalgemma@{code}"\n' in body
    assert said in body


def test_the_pinned_gradio_is_the_one_of_the_constraints(tmp_path):
    constraints = (REPOSITORY / "constraints.txt").read_text()
    front, _ = front_matter(write_space(tmp_path / "space", MODEL))

    assert f"gradio=={front['sdk_version']}\n" in constraints
    assert len(front["short_description"]) <= 60  # the Hub refuses longer ones


def test_the_app_calls_the_demo_with_what_was_named(tmp_path):
    tree = ast.parse((write_space(tmp_path / "space", MODEL, revision="a1b2c3") / "app.py").read_text())
    constants = {node.targets[0].id: node.value.value for node in tree.body if isinstance(node, ast.Assign)}

    assert constants == {"MODEL": MODEL, "BASE": None, "REVISION": "a1b2c3"}


@pytest.mark.parametrize(
    "name",
    ["models/dentalgemma/merged", "dentalgemma", "/models/x", "./model", "some one/x", 'a/b"; import os', "a/b\n"],
)
def test_a_space_takes_hub_ids_alone(name, tmp_path):
    with pytest.raises(SpaceError, match="give the Hub id"):
        write_space(tmp_path / "space", name)
    with pytest.raises(SpaceError, match="--base"):
        write_space(tmp_path / "space", MODEL, base=name)
    assert not (tmp_path / "space").exists()


@pytest.mark.parametrize("revision", ['x"\n---\nlicense: mit', "main`", "$(whoami)", ""])
def test_a_revision_that_git_would_not_take_is_refused(revision, tmp_path):
    with pytest.raises(SpaceError, match="--revision"):
        write_space(tmp_path / "space", MODEL, revision=revision)


def test_a_folder_of_this_machine_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "models" / "dentalgemma").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    with pytest.raises(SpaceError, match="give the Hub id"):
        write_space(tmp_path / "space", "models/dentalgemma")


def test_a_space_overwrites_nothing(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")

    with pytest.raises(InputError, match="is not empty"):
        write_space(tmp_path, MODEL)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_command_writes_the_folder(tmp_path):
    result = CliRunner().invoke(cli.app, ["space", str(tmp_path / "space"), "--model", MODEL], catch_exceptions=False)

    assert result.exit_code == 0
    assert re.search(r"Wrote \S+space", result.stdout)
