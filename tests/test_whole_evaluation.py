"""The whole path of an evaluation, by command: questions, plan, answers, verdicts, scores, decision, page."""

from __future__ import annotations

import json
import time

import pytest
from made_up_benchmark import write_benchmark
from stub_server import StubServer
from typer.testing import CliRunner

from dentalgemma.cli import app

PLAN = """
title: Which small model
candidates: {base: null, "<b>tuned</b>": null}
questions: mmoral.jsonl
extraction: seed/1
judge_prompt_sha256: PROMPT
sub_scores:
  closed: {weight: 0.6, from: closed.accuracy, linear: {from: [0, 1], to: [0, 10]}}
  open: {weight: 0.4, from: open.accuracy, linear: {from: [0, 1], to: [0, 10]}}
tests: {paired: mcnemar_exact, correction: holm, of: closed, alpha: 0.05}
different_when: intervals_do_not_overlap
tie_below: 0.05
tiebreakers: [closed.accuracy]
"""
TUNED = "<b>tuned</b>"  # a name as somebody might have it


def run(*arguments, exit_code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == exit_code, result.output
    return result.output


def judge_by_letters(body: dict) -> str:
    """A judge that is no use, but says both verdicts."""
    prompt = body["messages"][-1]["content"]
    return f"It was read.\nVERDICT: {'CORRECT' if sum(map(ord, prompt)) % 3 == 0 else 'INCORRECT'}"


def write_talkative(tiny_model, folder, *, seed):
    """A small model whose answers depend on what it is asked: with tied embeddings it repeats its last token."""
    import torch

    from dentalgemma.models.loading import load_pretrained

    model, processor = load_pretrained(tiny_model, dtype=torch.float32)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(model.lm_head.weight.shape, generator=generator)
    for letter in "ABCD":
        head[processor.tokenizer(letter, add_special_tokens=False)["input_ids"][0]] *= 4  # so that some can be read
    model.lm_head.weight = torch.nn.Parameter(head)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def evaluated(tiny_model, tmp_path_factory):
    """Every file of an evaluation of two small models of other weights on 1,069 questions, and the seconds it took."""
    from dentalgemma.evaluation.judge import PROMPT_SHA256

    folder = tmp_path_factory.mktemp("court")
    models = {
        name: write_talkative(tiny_model, folder / name, seed=seed) for seed, name in enumerate(("base", "tuned"))
    }
    began = time.monotonic()
    closed, open_ = write_benchmark(folder / "tsv")
    questions = folder / "mmoral.jsonl"
    run("import-questions", closed, open_, "--out", questions, "--allow-other-md5")
    (folder / "plan.yaml").write_text(PLAN.replace("PROMPT", PROMPT_SHA256))
    run("plan", folder / "plan.yaml", "--out", folder / "plan.lock.json")
    for name, model in models.items():
        lengths = ("--max-new-tokens", 4, "--max-new-tokens-open", 6)
        answers = folder / f"{name}.jsonl"
        run("evaluate", questions, "--model", model, "--out", answers, "--batch-size", 32, *lengths)
        with StubServer(answer=judge_by_letters) as server:
            run("judge", answers, "--questions", questions, "--server", server.url, "--model", "stub",
                "--out", folder / f"{name}_verdicts.jsonl", "--input-price", 3, "--output-price", 15)  # fmt: skip
        run("score", answers, "--questions", questions, "--verdicts", folder / f"{name}_verdicts.jsonl",
            "--name", name if name == "base" else TUNED, "--out", folder / f"{name}_scores.json")  # fmt: skip
    both = [folder / "base.jsonl", folder / "tuned.jsonl", "--questions", questions, "--name", "base", "--name", TUNED]
    both += ["--verdicts", folder / "base_verdicts.jsonl", "--verdicts", folder / "tuned_verdicts.jsonl"]
    run("compare", *both, "--out", folder / "comparison.json")
    run("decide", folder / "plan.lock.json", "--scores", f"base={folder / 'base_scores.json'}",
        "--scores", f"{TUNED}={folder / 'tuned_scores.json'}", "--comparison", folder / "comparison.json",
        "--out", folder / "decision.json")  # fmt: skip
    run("report", *both, "--decision", folder / "decision.json", "--out", folder / "report.html")
    return folder, time.monotonic() - began


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_question_is_answered_and_scored(evaluated):
    folder, seconds = evaluated
    scores = read(folder / "base_scores.json")

    assert (scores["closed"]["n"], scores["closed"]["answerable"]["n"]) == (491, 459)
    assert scores["closed"]["ceiling"] == pytest.approx(0.9348, abs=1e-4)
    assert scores["open"]["n"] == scores["open"]["judged"] == 578
    assert scores["combined"]["correct"] == scores["closed"]["correct"] + scores["open"]["correct"]
    assert scores["combined"]["n"] == 1069
    assert scores["closed"]["images_asked"] == 100
    assert seconds < 600
    assert 0 < scores["closed"]["failed"] < 1  # what follows is about answers of both kinds


def test_the_decision_is_pre_registered_since_the_plan_came_first(evaluated):
    folder, _ = evaluated
    decision = read(folder / "decision.json")

    assert decision["pre_registered"] is True, decision
    assert "pre-registered" in (folder / "decision.md").read_text()


def test_the_page_stands_in_a_browser_and_the_name_is_inert(evaluated, open_page):
    folder, _ = evaluated
    document = open_page(folder / "report.html")

    assert "&lt;b&gt;tuned" in document
    assert "<b>tuned" not in document
    assert "</html>" in document


def test_a_plan_that_came_later_is_not_pre_registration(evaluated, tmp_path):
    folder, _ = evaluated
    run("plan", folder / "plan.yaml", "--out", tmp_path / "late.lock.json")
    run("decide", tmp_path / "late.lock.json", "--scores", f"base={folder / 'base_scores.json'}",
        "--scores", f"{TUNED}={folder / 'tuned_scores.json'}", "--comparison", folder / "comparison.json",
        "--out", tmp_path / "decision.json")  # fmt: skip

    assert read(tmp_path / "decision.json")["pre_registered"] is False
    assert "is not after the lock" in (tmp_path / "decision.json").read_text()
