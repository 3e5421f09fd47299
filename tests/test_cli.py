"""The command: what it prints, what it returns, and how it says what is wrong."""

import inspect
import json
import re
import shlex
import sys
from importlib.util import find_spec

import pytest
import typer
from typer.testing import CliRunner

from dentalgemma import __version__
from dentalgemma.cli import app, main

COMMANDS = typer.main.get_command(app).commands


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def run_main(monkeypatch, capsys, *arguments):
    """The exit code and error text of a whole command, as a shell sees them."""
    monkeypatch.setattr(sys, "argv", ["dentalgemma", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("page", "message"),
    [
        pytest.param("taken/page.html", "its folder cannot be made", id="below a file"),
        pytest.param("folder", "is a folder; --html names a file", id="a folder"),
    ],
)
def test_a_page_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path, monkeypatch, capsys, page, message):
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "folder").mkdir()
    source = "{name: s, reader: yolo, root: ., modality: panoramic, classes: {0: caries}}"
    (tmp_path / "sources.yaml").write_text(f"sources: [{source}]\n")
    code, error = run_main(monkeypatch, capsys, "audit", tmp_path / "sources.yaml", "--html", tmp_path / page)

    assert (code, message in error, "Reading" in error) == (2, True, False)


def test_the_folder_of_a_page_is_made(tmp_path):
    source = "{name: s, reader: yolo, root: ., modality: panoramic, classes: {0: caries}}"
    (tmp_path / "sources.yaml").write_text(f"sources: [{source}]\n")
    run("audit", tmp_path / "sources.yaml", "--html", tmp_path / "new" / "pages" / "audit.html")

    assert "</html>" in (tmp_path / "new" / "pages" / "audit.html").read_text()


def examples(command):
    """The lines that the help of a command shows; one may be wrapped, and may hold several commands."""
    found = re.findall(r"Example: `(.+?)`$", inspect.cleandoc(command.help), flags=re.DOTALL | re.MULTILINE)
    return [part.split() and shlex.split(part) for line in found for part in line.split("&&")]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_examples_that_parse(name):
    shown = examples(COMMANDS[name])

    assert any(words[1] == name for words in shown)
    for program, command, *arguments in shown:
        assert program == "dentalgemma"
        COMMANDS[command].make_context(command, arguments)  # raises for what does not exist or is missing


def test_an_example_that_does_not_parse_would_be_found():
    with pytest.raises(Exception, match="--outt"):
        COMMANDS["build"].make_context("build", ["sources.yaml", "--outt", "data"])


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help_fits_a_terminal_of_80_columns(monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    text = run(*filter(None, [name]), "--help").output

    assert "Usage" in text
    assert max(map(len, text.splitlines())) <= 80
    assert not re.search(r"\w…", text)  # no name is cut off


def test_the_version_can_be_asked_for_alone():
    assert run("--version").output.strip() == __version__


def test_commands_are_grouped_in_the_order_of_the_work():
    panels = [command.rich_help_panel for command in COMMANDS.values()]

    assert list(dict.fromkeys(panels)) == [
        "Data",
        "Training",
        "Evaluation",
        "Publishing",
        "Trying a model",
        "Rehearsing and checking",
    ]


def test_phantoms_are_audited_built_and_asked_about(tmp_path):
    run("phantom", tmp_path / "p", "--images", 30, "--seed", 4)
    audited = json.loads(run("audit", tmp_path / "p" / "sources.yaml", "--json").stdout)
    built = run("build", tmp_path / "p" / "sources.yaml", "--out", tmp_path / "vqa").output
    chats = run("build-instruct", tmp_path / "p" / "cases.yaml", "--out", tmp_path / "instruct").output
    asked = run("build-probe", tmp_path / "vqa", "--split", "train", "--out", tmp_path / "probe.jsonl").output

    assert audited["sources"][0]["images"] == 30
    assert set(audited["sources"][0]) >= {
        "name",
        "reader",
        "images",
        "findings",
        "classes",
        "problems",
        "problem_counts",
    }
    assert (audited["duplicates"], audited["leaks"]) == ([], [])
    assert "train:" in built
    assert "train:" in chats
    assert "questions to" in asked


def test_audit_prints_problems_as_places_an_editor_can_open(tmp_path, phantoms):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("0 .5 .5 .1 .1\n0 .5 .5\n")
    (tmp_path / "s.yaml").write_text(
        "sources: [{name: s, reader: yolo, root: ., modality: panoramic, classes: {0: caries}}]"
    )
    output = run("audit", tmp_path / "s.yaml").output

    assert "labels/a.txt:2: expected 4 coordinates, or 3 or more points, after the class id" in output
    problems = json.loads(run("audit", tmp_path / "s.yaml", "--json").stdout)["sources"][0]["problems"]
    assert {"code", "severity", "path", "line", "message"} == set(problems[0])


@pytest.fixture
def odd_files(monkeypatch, tmp_path):
    """An empty folder to work in, with files that are not what a command asks for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name, content in (
        ("empty.yaml", b""),
        ("broken.yaml", b"a: ["),
        ("bytes.yaml", b"\xff\xfe\xff"),
        ("empty.jsonl", b""),
        ("broken.json", b"{"),
        ("list.json", b"[1]"),
        ("scores.json", b'{"format": "scores/1"}'),
        ("q.jsonl", b'{"item_id": "1", "question": "What is seen?", "answer": "Caries."}\n'),
    ):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "link").symlink_to("link")
    (tmp_path / "torn" / "data").mkdir(parents=True)
    (tmp_path / "torn" / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    return tmp_path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        pytest.param("audit nowhere.yaml", "nowhere.yaml: no such file", id="no sources file"),
        pytest.param("audit", "a sources file, or a --preset", id="neither sources nor preset"),
        pytest.param("audit empty.yaml", "empty.yaml is empty: expected keys and values", id="empty sources file"),
        pytest.param("audit broken.yaml", "broken.yaml:1: not valid YAML", id="broken YAML"),
        pytest.param("audit bytes.yaml", "bytes.yaml: cannot be read", id="no text"),
        pytest.param("audit folder", "folder: cannot be read", id="a folder for a file"),
        pytest.param("audit link", "link: cannot be read", id="a link to itself"),
        pytest.param("build --preset nonsense --data folder --out d", "nonsense", id="unknown preset"),
        pytest.param("build --preset opg_detection --out d", "needs --data", id="preset without data"),
        pytest.param(
            "quantize folder --out m",
            "make the folder with `dentalgemma merge`" if find_spec("bitsandbytes") else "dentalgemma[bnb]",
            id="no model to quantise",
        ),
        pytest.param("check folder", "build one with `dentalgemma build`", id="no dataset to check"),
        pytest.param("check torn", "train-00000-of-00001.parquet is no complete parquet file", id="half a download"),
        pytest.param("build-probe nowhere --out p.jsonl", "nowhere", id="no dataset to ask about"),
        pytest.param("detect nowhere.pt folder --out o", "name the .pt file", id="no detector"),
        pytest.param("export-yolo broken.yaml --out o", "not valid YAML", id="broken YAML for a detector"),
        pytest.param("phantom list.json", "choose a new folder", id="a file for a folder"),
        pytest.param("merge nowhere --out m", "nowhere holds no adapter", id="no run"),
        pytest.param("doctor nowhere.yaml", "nowhere.yaml: No such file", id="no recipe"),
        pytest.param("import-questions --out o", "give either TSV files, or --repo", id="nothing to import"),
        pytest.param("import-predictions empty.jsonl --questions q.jsonl --out o", "empty.jsonl", id="empty log"),
        pytest.param("evaluate empty.jsonl --model m --out o", "holds no question", id="no question"),
        pytest.param("evaluate q.jsonl --model m --out o --server x", "is not the URL", id="no URL"),
        pytest.param("score p.jsonl --questions nowhere.jsonl", "nowhere.jsonl: cannot be read", id="no questions"),
        pytest.param("score empty.jsonl --questions q.jsonl", "run `dentalgemma evaluate` again", id="no answers"),
        pytest.param("compare q.jsonl --questions q.jsonl", "two predictions files or more", id="one model"),
        pytest.param("judge-agreement broken.json broken.json", "broken.json:1: not a verdict", id="no verdict"),
        pytest.param("plan empty.yaml --out l", "empty.yaml is empty: expected keys and values", id="empty plan"),
        pytest.param("decide scores.json --scores a=scores.json --out o", "`dentalgemma plan` writes", id="no lock"),
        pytest.param("decide scores.json --scores a --out o", "expected candidate=scores.json", id="no candidate"),
        pytest.param("contamination q.jsonl torn", "is no complete parquet file", id="half a download to search"),
        pytest.param("contamination q.jsonl folder", "name a dataset folder", id="nothing to search"),
        pytest.param("report q.jsonl --questions q.jsonl --out r.txt", "ends in .html", id="no page"),
        pytest.param(
            "export-results list.json folder --dataset-id a/b --task-id t", "not scores/1", id="another document"
        ),
        pytest.param("card folder", "make the folder with `dentalgemma merge`", id="no model"),
        pytest.param("tiny-model m --family gemma7", "gemma7", id="unknown family"),
        pytest.param("phantom p --images many", "'--images'", id="no number"),
        pytest.param("build", "Missing option '--out'", id="missing option"),
        pytest.param("build --outt x", "No such option", id="mistyped option, with a hint"),
        pytest.param("bild", "Did you mean 'build'?", id="mistyped command, with a hint"),
    ],
)
def test_wrong_use_is_one_sentence_and_exit_code_2(monkeypatch, capsys, odd_files, line, message):
    before = {path.name for path in odd_files.iterdir()}
    code, text = run_main(monkeypatch, capsys, *line.split())

    assert code == 2
    assert message in text
    assert "Traceback" not in text
    assert {path.name for path in odd_files.iterdir()} == before


@pytest.mark.parametrize("command", ["phantom", "tiny-model"])
def test_folders_in_use_are_left_alone(monkeypatch, capsys, tmp_path, command):
    (tmp_path / "thesis.txt").write_text("years")
    code, text = run_main(monkeypatch, capsys, command, tmp_path)

    assert code == 2
    assert "is not empty" in text
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_model_is_asked_scored_and_compared(tmp_path, tiny_model, vqa_dataset):
    run("build-probe", vqa_dataset, "--split", "train", "--out", tmp_path / "probe.jsonl")
    for arm in ("true", "blank"):
        run(
            "evaluate", tmp_path / "probe.jsonl", "--model", tiny_model, "--out", tmp_path / f"{arm}.jsonl",
            "--mode", "loglikelihood", "--images", arm, "--batch-size", 16,
        )  # fmt: skip
    scores = json.loads(run("score", tmp_path / "true.jsonl", "--questions", tmp_path / "probe.jsonl").stdout)
    text = run(
        "compare", tmp_path / "true.jsonl", tmp_path / "blank.jsonl", "--questions", tmp_path / "probe.jsonl"
    ).output

    closed = scores["closed"]
    assert scores["model"] == tiny_model.name  # without its folder: scores are published
    assert closed["n"] > 20
    assert 0 <= closed["wilson"][0] <= closed["accuracy"] <= closed["wilson"][1] <= 1
    assert "exact McNemar p" in text
