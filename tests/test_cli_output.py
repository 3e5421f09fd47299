"""What other programs see of a command: its JSON, its exit code, its signals, and terminals that know no UTF-8."""

import json
import os
import signal
import subprocess
import sys

import pytest
import typer
from conftest import REPOSITORY

from dentalgemma.cli import app, main

COMMANDS = typer.main.get_command(app).commands
LOGS = REPOSITORY / "tests" / "data" / "imports"
QUESTIONS, PREDICTIONS = LOGS / "questions.jsonl", LOGS / "predictions.jsonl"
SOURCE = "{name: s, reader: yolo, root: ., modality: panoramic, classes: {0: caries}}"
COMMAND = [sys.executable, "-m", "dentalgemma"]


@pytest.fixture
def call(monkeypatch, capfd, tmp_path):
    """Run a command in an empty folder; its exit code and all that reached the standard output, by whatever way."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["dentalgemma", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code or 0, capfd.readouterr().out

    return run


def test_every_command_but_those_for_people_prints_json():
    without = {
        name
        for name, command in COMMANDS.items()
        if not any("--json" in parameter.opts for parameter in command.params)
    }

    assert without == {"ask", "demo", "score", "judge-agreement"}  # the last two print nothing else


def test_json_is_all_that_reaches_the_standard_output(call, tmp_path, phantoms, vqa_dataset):
    (tmp_path / "other.jsonl").write_bytes(PREDICTIONS.read_bytes())
    named = ("--questions", QUESTIONS, "--json")
    lines = {
        "env": ["--json"],
        "phantom": ["p", "--images", 2, "--json"],
        "audit": [phantoms / "sources.yaml", "--json", "--html", "audit.html"],
        "build": ["p/sources.yaml", "--out", "vqa", "--json"],
        "build-instruct": ["p/cases.yaml", "--out", "instruct", "--json"],
        "check": [vqa_dataset, "--json"],
        "build-probe": [vqa_dataset, "--split", "train", "--out", "probe.jsonl", "--limit", 4, "--json"],
        "export-yolo": ["p/sources.yaml", "--out", "yolo", "--json"],
        "contamination": ["probe.jsonl", vqa_dataset, "--json"],
        "compare": [PREDICTIONS, "other.jsonl", *named],
        "gate": [PREDICTIONS, "other.jsonl", *named],
        "report": [PREDICTIONS, "other.jsonl", *named, "--out", "report.html"],
    }
    for name, arguments in lines.items():
        code, shown = call(name, *arguments)

        assert code == 0, name
        assert isinstance(json.loads(shown), dict), name


def test_what_was_written_is_named_with_its_figures(call, vqa_dataset):
    _, shown = call("build-probe", vqa_dataset, "--split", "train", "--out", "p.jsonl", "--limit", "4", "--json")

    assert json.loads(shown) == {"wrote": "p.jsonl", "questions": 4}


@pytest.fixture(scope="module")
def spanish(tmp_path_factory):
    """A source with a bad line in a file whose name is not ASCII, and so many lines that no pipe holds them."""
    folder = tmp_path_factory.mktemp("fuente")
    (folder / "labels").mkdir()
    (folder / "labels" / "niño✓.txt").write_text("0 .5 .5\n" * 2_000)
    (folder / "sources.yaml").write_text(f"sources: [{SOURCE}]\n")
    return folder / "sources.yaml"


def test_a_terminal_without_utf_8_gets_no_traceback_and_complete_json(spanish):
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "COLUMNS": "80"}
    shown = subprocess.run([*COMMAND, "audit", spanish], env=ascii_only, capture_output=True, timeout=120)
    as_json = subprocess.run([*COMMAND, "audit", spanish, "--json"], env=ascii_only, capture_output=True, timeout=120)

    assert (shown.returncode, as_json.returncode) == (0, 0), shown.stderr + as_json.stderr
    assert b"ni?o?.txt:1:" in shown.stdout
    problems = json.loads(as_json.stdout.decode("ascii"))["sources"][0]["problems"]
    assert any(problem["path"].endswith("niño✓.txt") for problem in problems)


def test_a_reader_that_leaves_is_no_traceback(spanish):
    """As in `dentalgemma audit sources.yaml --json | head -1`."""
    process = subprocess.Popen([*COMMAND, "audit", spanish, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    process.wait(timeout=120)

    assert b"Traceback" not in errors
    assert b"Exception ignored" not in errors


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_ctrl_c_ends_a_command_with_130_and_no_traceback(tmp_path):
    os.mkfifo(tmp_path / "sources.yaml")
    process = subprocess.Popen(
        [*COMMAND, "audit", "sources.yaml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell's background job ignores the signal, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    with (tmp_path / "sources.yaml").open("wb"):  # returns when the command has opened it, and now waits for text
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)

    assert process.returncode == 130
    assert b"Traceback" not in errors
