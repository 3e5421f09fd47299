"""Closed and open questions in one file, the arms, what each line records, and runs that were killed."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from dentalgemma.evaluation.generation import evaluate_questions
from dentalgemma.evaluation.likelihood import encode
from dentalgemma.evaluation.predictions import append_predictions
from dentalgemma.evaluation.questions import EvaluationError, Question, load_questions, put_question, read_predictions
from dentalgemma.models.loading import fingerprint_weights, load_pretrained

SYSTEM = "You are a dentist."


@pytest.fixture(scope="module")
def talkative(tiny_model, tmp_path_factory):
    """A small model whose answers depend on what it is asked: with tied embeddings it repeats its last token."""
    folder = tmp_path_factory.mktemp("talkative")
    model, processor = load_pretrained(tiny_model, dtype=torch.float32)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    generator = torch.Generator().manual_seed(0)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape, generator=generator))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(talkative):
    return load_pretrained(talkative, dtype=torch.float32)


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    """Closed and open questions in turns, two on each image."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 256, (30 + number, 60, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    pictures = [
        {"image": folder / f"{n // 2}.png", "image_id": f"i{n // 2}", "group_id": f"g{n // 2}"} for n in range(8)
    ]
    closed = {"question": "Which tooth?", "options": {"A": "Molar", "B": "", "C": "Canine"}, "answer": "A"}
    opened = {"question": "What is seen?", "answer": "Caries."}
    return [
        Question(item_id=f"item{number}", **(opened if number % 2 else closed), **picture)
        for number, picture in enumerate(pictures)
    ]


def answer(tiny, items, out, **settings):
    settings = {"mode": "generate", "system_prompt": SYSTEM, "progress": False, "max_new_tokens": 3} | settings
    evaluate_questions(*tiny, items, out=out, **({"max_new_tokens_open": 7} | settings))
    return read_predictions(out)


def write_alone(tiny, item, picture, limit):
    """What plain transformers writes after one question."""
    model, processor = tiny
    inputs = encode(processor, [put_question(item, picture, mode="generate", system_prompt=SYSTEM)])
    tokens = model.generate(**inputs, max_new_tokens=limit, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(tokens, skip_special_tokens=True)


def test_closed_and_open_questions_of_one_file_are_put_and_limited_each_in_their_way(tiny, items, tmp_path):
    lines = answer(tiny, items, tmp_path / "p.jsonl", batch_size=3)

    for item in items:
        line, is_open = lines[item.item_id], item.kind == "open"
        assert line["protocol"] == ("open/1" if is_open else "letter/1")
        assert line["generation"] == {"do_sample": False, "max_new_tokens": 7 if is_open else 3}
        assert line["output"] == write_alone(tiny, item, Image.open(item.image), 7 if is_open else 3)
    assert len({line["output"] for line in lines.values()}) > 4


def test_no_batch_mixes_closed_and_open_and_only_the_first_one_warms_up(tiny, items, tmp_path):
    lines = list(answer(tiny, items, tmp_path / "p.jsonl", batch_size=3).values())

    assert [line["protocol"] for line in lines] == ["letter/1"] * 4 + ["open/1"] * 4
    latencies = [line["latency_ms"] for line in lines]  # one for all lines of a batch
    assert [latencies.index(latency) for latency in latencies] == [0, 0, 0, 3, 4, 4, 4, 7]
    assert [line["warm_up"] for line in lines] == [True] * 3 + [False] * 5


def test_open_questions_are_not_ranked_by_likelihood(tiny, items, tmp_path):
    with pytest.raises(EvaluationError, match=r"4 of 8 questions are open, for example item1.*use mode generate"):
        answer(tiny, items, tmp_path / "p.jsonl", mode="loglikelihood")

    assert not (tmp_path / "p.jsonl").exists()


def test_the_arm_without_images_asks_by_text_alone_and_opens_none(tiny, items, tmp_path):
    gone = [replace(item, image=tmp_path / "gone.png") for item in items]
    lines = answer(tiny, gone, tmp_path / "p.jsonl", images="none")
    seen = answer(tiny, items, tmp_path / "true.jsonl")

    for item in items:
        assert lines[item.item_id]["output"] == write_alone(tiny, item, None, 7 if item.kind == "open" else 3)
        assert lines[item.item_id]["image_shown"] is None
        assert lines[item.item_id]["image_id"] == item.image_id
    assert all(lines[name]["output"] != seen[name]["output"] for name in lines)


def test_ranking_without_images_is_that_of_questions_that_have_none(tiny, items, tmp_path):
    closed = [item for item in items if item.kind == "closed"]
    bare = [closed[0], *(replace(item, image=None, image_id=None) for item in closed[1:])]
    lines = answer(tiny, closed, tmp_path / "none.jsonl", mode="loglikelihood", images="none")
    beside_a_picture = answer(tiny, bare, tmp_path / "bare.jsonl", mode="loglikelihood")

    for item in closed[1:]:
        for letter, score in lines[item.item_id]["option_scores"].items():
            expected = beside_a_picture[item.item_id]["option_scores"][letter]["sum"]
            assert score["sum"] == pytest.approx(expected, abs=1e-4)


def test_a_line_records_when_how_and_on_what_it_was_answered(tiny, items, tmp_path):
    began = datetime.now(UTC)
    line = answer(tiny, items[:1], tmp_path / "p.jsonl", batch_size=4)["item0"]

    assert began - timedelta(seconds=1) <= datetime.fromisoformat(line["answered_at"]) <= datetime.now(UTC)
    assert datetime.fromisoformat(line["answered_at"]).utcoffset() == timedelta(0)
    assert line["software"] == {"torch": torch.__version__, "transformers": transformers.__version__}
    assert (line["dtype"], line["attention"]) == ("float32", tiny[0].config._attn_implementation)
    assert line["batch_size"] == 4
    assert f"{torch.get_num_threads()} threads" in line["hardware"]
    assert line["certificate"] is None


def test_what_a_models_own_config_changes_in_decoding_is_recorded_and_sampling_is_off(tiny, items, tmp_path):
    model, _ = tiny
    own = model.generation_config
    model.generation_config = transformers.GenerationConfig(
        **{**own.to_diff_dict(), "do_sample": True, "temperature": 2.0, "num_beams": 3, "repetition_penalty": 1.5}
    )
    try:
        lines = [answer(tiny, items[:1], tmp_path / f"{n}.jsonl")["item0"] for n in range(2)]
        refused = answer(tiny, items[:1], tmp_path / "0.jsonl")
    finally:
        model.generation_config = own

    assert lines[0]["generation"] == {"do_sample": False, "max_new_tokens": 3, "repetition_penalty": 1.5}
    assert lines[0]["output"] == lines[1]["output"]
    assert refused["item0"] == lines[0]
    with pytest.raises(EvaluationError, match="repetition_penalty"):
        answer(tiny, items[:1], tmp_path / "0.jsonl")


def test_a_missing_image_is_named_before_anything_is_asked(tiny, items, tmp_path):
    moved = [*items[:6], *(replace(item, image=tmp_path / "gone.png") for item in items[6:])]

    with pytest.raises(EvaluationError, match=r"no such image: .*gone\.png \(item item[67]\)"):
        answer(tiny, moved, tmp_path / "p.jsonl")
    assert not (tmp_path / "p.jsonl").exists()


# Merged models.


def certify(folder, model, **certificate):
    shutil.copytree(model, folder)
    (folder / "merge_certificate.json").write_text(json.dumps(certificate))
    return load_pretrained(folder, dtype=torch.float32)


def test_a_merge_that_failed_is_answered_with_but_not_in_silence(talkative, items, tmp_path, capsys):
    merged = certify(tmp_path / "merged", talkative, passed=False, failures=["logits differ by 3"])

    line = answer(merged, items[:1], tmp_path / "p.jsonl")["item0"]

    assert line["certificate"] == "failed"
    said = capsys.readouterr()
    assert "Warning" in said.err
    assert "logits differ by 3" in said.err
    assert not said.out


def test_a_merge_that_passed_vouches_for_its_own_weights_alone(talkative, items, tmp_path, capsys):
    from dentalgemma.certificates import hash_weights

    folder = tmp_path / "merged"
    weights = fingerprint_weights(load_pretrained(talkative, dtype=torch.float32)[0])
    stage = {"stage": "vqa", "base_model": "tiny"}
    merged = certify(folder, talkative, passed=True, files=hash_weights(talkative), weights=weights, stages=[stage])

    assert answer(merged, items[:1], tmp_path / "p.jsonl")["item0"]["certificate"] == "passed"
    merged[0].model.multi_modal_projector.mm_input_projection_weight.data.neg_()
    assert answer(merged, items[:1], tmp_path / "changed.jsonl")["item0"]["certificate"] is None
    assert not capsys.readouterr().err


# The file and its writers.


def test_a_second_writer_is_refused_while_the_first_one_writes(tiny, items, tmp_path):
    out = tmp_path / "p.jsonl"
    with append_predictions(out, {}), pytest.raises(EvaluationError, match="being written by another process"):
        answer(tiny, items, out)

    assert len(answer(tiny, items, out)) == len(items)


@pytest.mark.parametrize("cut", [1, 12, -3], ids=["first byte", "id", "half a character"])
def test_a_line_that_was_cut_anywhere_is_asked_again(tmp_path, cut):
    whole = json.dumps({"item_id": "b", "output": "Zähne é"}, ensure_ascii=False).encode()
    kept = b'{"item_id": "a", "output": "A"}\n'
    (tmp_path / "p.jsonl").write_bytes(kept + whole[:cut])

    with append_predictions(tmp_path / "p.jsonl", {"a": {}, "b": {}}) as file:
        assert file.done == {"a"}
        file.write([{"item_id": "b", "output": "B"}])

    assert (tmp_path / "p.jsonl").read_bytes() == kept + b'{"item_id": "b", "output": "B"}\n'


def test_a_whole_last_line_without_its_line_break_is_an_answer(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"item_id": "a", "output": "A"}')

    with append_predictions(tmp_path / "p.jsonl", {"a": {}, "b": {}}) as file:
        assert file.done == {"a"}
        file.write([{"item_id": "b", "output": "B"}])

    assert list(read_predictions(tmp_path / "p.jsonl")) == ["a", "b"]


@pytest.mark.parametrize("content", ["Notes on my patients", '{"item_id": "a"}\nnotes'])
def test_a_file_that_is_no_predictions_file_is_left_as_it_is(tmp_path, content):
    (tmp_path / "notes.txt").write_text(content)

    with pytest.raises(EvaluationError, match="left as it is"), append_predictions(tmp_path / "notes.txt", {}):
        pass
    assert (tmp_path / "notes.txt").read_text() == content


def test_a_disk_that_is_full_leaves_whole_lines(tmp_path):
    out, lines = tmp_path / "p.jsonl", [{"item_id": "a", "output": "A"}, {"item_id": "b", "output": "x" * 9000}]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with append_predictions(out, {"a": {}, "b": {}}) as file:
        file.write(lines[:1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            with pytest.raises(EvaluationError, match="make room, then run the same command"):
                file.write(lines[1:])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert list(read_predictions(out)) == ["a"]


KILLED_RUN = """
import sys
from pathlib import Path
import torch
from dentalgemma.evaluation.generation import evaluate_questions
from dentalgemma.evaluation.questions import load_questions
from dentalgemma.models.loading import load_pretrained
model, processor = load_pretrained(sys.argv[1], dtype=torch.float32)
settings = {"mode": "generate", "progress": False, "max_new_tokens": 6, "max_new_tokens_open": 12}
evaluate_questions(
    model, processor, load_questions(sys.argv[2]), out=Path(sys.argv[3]), batch_size=1, model_name="tiny", **settings
)
"""


def test_a_process_killed_in_the_middle_loses_nothing_and_repeats_nothing(tiny, talkative, items, tmp_path):
    entries = [
        {"item_id": f"q{number:03}", "question": f"{item.question} {number}", "options": dict(item.options)}
        | {"answer": item.answer, "image": str(item.image), "image_id": item.image_id}
        for number, item in enumerate(items * 25)
    ]
    probe, out = tmp_path / "q.jsonl", tmp_path / "p.jsonl"
    probe.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    command = [sys.executable, "-c", KILLED_RUN, str(talkative), str(probe), str(out)]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 120
        while not (out.exists() and out.read_bytes().count(b"\n") >= 5) and time.monotonic() < deadline:
            time.sleep(0.005)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    saved = out.read_bytes()

    settings = {"model_name": "tiny", "max_new_tokens": 6, "max_new_tokens_open": 12, "batch_size": 1}
    settings |= {"mode": "generate", "progress": False}
    evaluate_questions(*tiny, load_questions(probe), out=out, **settings)

    kept = saved[: saved.rfind(b"\n") + 1]
    assert 5 <= kept.count(b"\n") < len(entries)
    assert out.read_bytes().startswith(kept)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(line["item_id"] for line in lines) == [entry["item_id"] for entry in entries]
    assert sum(line["warm_up"] for line in lines) == 2  # of one process each
    evaluate_questions(*tiny, load_questions(probe), out=tmp_path / "whole.jsonl", **settings)
    unbroken = read_predictions(tmp_path / "whole.jsonl")
    assert len({line["output"] for line in lines}) > 20
    assert {line["item_id"]: line["output"] for line in lines} == {
        item_id: line["output"] for item_id, line in unbroken.items()
    }
