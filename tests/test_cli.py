"""The command: what it prints, what it returns, and how it says what is wrong."""

import json
import sys

import pytest
import typer
from typer.testing import CliRunner

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


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name):
    text = run(name, "--help").output

    assert "Usage" in text
    assert name == "env" or "Example" in text


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["audit", "nowhere.yaml"], "nowhere.yaml: no such file", id="no sources file"),
        pytest.param(["merge", "nowhere", "--out", "m"], "nowhere holds no adapter", id="no run"),
        pytest.param(["card", "nowhere"], "make the folder with `dentalgemma merge`", id="no model"),
        pytest.param(["score", "p.jsonl", "--questions", "q.jsonl"], "q.jsonl: cannot be read", id="no questions"),
        pytest.param(["build-probe", "nowhere", "--out", "p.jsonl"], "nowhere", id="no dataset"),
        pytest.param(["tiny-model", "m", "--family", "gemma7"], "gemma7", id="unknown family"),
    ],
)
def test_wrong_use_is_one_sentence_and_exit_code_2(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, text = run_main(monkeypatch, capsys, *arguments)

    assert code == 2
    assert message in text
    assert "Traceback" not in text


@pytest.mark.parametrize("command", ["phantom", "tiny-model"])
def test_folders_in_use_are_left_alone(monkeypatch, capsys, tmp_path, command):
    (tmp_path / "thesis.txt").write_text("years")
    code, text = run_main(monkeypatch, capsys, command, tmp_path)

    assert code == 2
    assert "is not empty" in text
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_env_tells_versions_and_no_paths():
    facts = json.loads(run("env", "--json").stdout)

    assert set(facts) >= {"dentalgemma", "python", "torch", "transformers", "trl", "peft", "device"}
    assert not any("/" in str(value) for value in facts.values())


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
