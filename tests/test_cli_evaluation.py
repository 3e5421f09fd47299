"""The commands of the evaluation: what they refuse, what they return, and what they do not tell."""

import hashlib
import json
import sys

import pytest
from conftest import REPOSITORY

from dentalgemma.cli import main

LOGS = REPOSITORY / "tests" / "data" / "imports"
QUESTIONS, PREDICTIONS = LOGS / "questions.jsonl", LOGS / "predictions.jsonl"


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Run a command in an empty folder; returns exit code, output and errors, as a shell sees them."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["dentalgemma", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def wrong(tmp_path):
    """The same eight answers, but for the letter, which is the wrong one everywhere."""
    keys = {item["item_id"]: item["answer"] for item in map(json.loads, QUESTIONS.read_text().splitlines())}
    lines = [json.loads(line) for line in PREDICTIONS.read_text().splitlines()]
    for line in lines:
        line["output"] = "B" if keys[line["item_id"]] == "A" else "A"
    (tmp_path / "wrong.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "wrong.jsonl"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(["--workers", "3"], "--workers needs --server", id="workers without a server"),
        pytest.param(
            ["--server", "http://localhost:1", "--batch-size", "3"],
            "--batch-size is for models loaded here",
            id="batch",
        ),
        pytest.param(["--stretch", "896"], "--stretch needs --server", id="stretch without a server"),
        pytest.param(
            ["--server", "http://localhost:1", "--images", "none", "--stretch", "896"],
            "--stretch is about pictures",
            id="stretch without pictures",
        ),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(call, options, message):
    code, _, error = call("evaluate", QUESTIONS, "--model", "m", "--out", "p.jsonl", *options)

    assert (code, message in error) == (2, True), error


@pytest.mark.parametrize("option", ["--decision", "--contamination", "--agreement", "--gate"])
def test_a_report_takes_no_document_for_another(call, tmp_path, option):
    (tmp_path / "scores.json").write_text('{"format": "scores/1"}')
    code, _, error = call("report", PREDICTIONS, "--questions", QUESTIONS, "--out", "r.html", option, "scores.json")

    assert code == 2
    assert "scores.json is scores/1, not" in error


def test_a_report_tells_its_command_without_folders(call, tmp_path):
    code, _, error = call("report", PREDICTIONS, "--questions", QUESTIONS, "--out", tmp_path / "deep" / "r.html")
    page = (tmp_path / "deep" / "r.html").read_text()

    assert code == 0, error
    assert "dentalgemma report predictions.jsonl --questions questions.jsonl" in page
    assert str(tmp_path) not in page
    assert str(LOGS) not in page


def test_fail_if_worse_tells_a_pipeline_by_its_exit_code(call, wrong):
    same = call("compare", PREDICTIONS, PREDICTIONS, "--questions", QUESTIONS, "--name", "a", "--name", "b")
    better = call("compare", wrong, PREDICTIONS, "--questions", QUESTIONS, "--fail-if-worse")
    worse = call("compare", PREDICTIONS, wrong, "--questions", QUESTIONS, "--fail-if-worse", "--margin", "0.02")

    assert [same[0], better[0], worse[0]] == [0, 0, 1]
    assert "worse:" in worse[2]


def test_models_of_one_name_are_to_be_told_apart(call, tmp_path):
    code, _, error = call("compare", PREDICTIONS, PREDICTIONS, "--questions", QUESTIONS)

    assert (code, "--name" in error) == (2, True)


def test_scores_go_to_a_file_or_to_the_screen(call, tmp_path):
    _, shown, _ = call("score", PREDICTIONS, "--questions", QUESTIONS)
    _, said, _ = call("score", PREDICTIONS, "--questions", QUESTIONS, "--out", "s.json")

    assert json.loads(shown) == json.loads((tmp_path / "s.json").read_text())
    assert said.strip() == "Wrote s.json"


def test_a_price_has_two_parts(call):
    code, _, error = call("judge", PREDICTIONS, "--questions", QUESTIONS, "--out", "v", "--model", "m",
                          "--input-price", "3")  # fmt: skip

    assert (code, "--output-price" in error) == (2, True)


def test_an_agreement_says_on_which_verdicts_it_rests(call, tmp_path):
    item = {"item_id": "1", "question": "What is seen?", "answer": "Caries."}
    (tmp_path / "q.jsonl").write_text(json.dumps(item))
    verdict = {"item_id": "1", "verdict": "correct", "answer_sha256": "0" * 64, "item_hash": "0", "method": "judge"}
    (tmp_path / "v.jsonl").write_text(json.dumps(verdict) + "\n")
    (tmp_path / "human.csv").write_text("item_id,verdict\n1,correct\n")
    code, shown, error = call("judge-agreement", "v.jsonl", "human.csv")

    assert code == 0, error
    assert json.loads(shown)["verdicts_sha256"] == hashlib.sha256((tmp_path / "v.jsonl").read_bytes()).hexdigest()


def test_open_answers_without_verdicts_are_reported_and_not_compared(call, tmp_path):
    (tmp_path / "q.jsonl").write_text(json.dumps({"item_id": "1", "question": "What is seen?", "answer": "Caries."}))
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"item_id": "1", "output": "Caries.", "mode": "generate"}))
    code, _, error = call("compare", "a.jsonl", "b.jsonl", "--questions", "q.jsonl", "--fail-if-worse")
    shown, _, _ = call("report", "a.jsonl", "b.jsonl", "--questions", "q.jsonl", "--out", "r.html")

    assert (code, "dentalgemma judge" in error) == (2, True), error
    assert shown == 0
