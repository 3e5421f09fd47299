"""Results in the Hub's own forms, read back by the Hub's own library, and the model card that carries them."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData, parse_eval_result_entries
from report_cases import write_evaluation

from dentalgemma.evaluation.questions import EvaluationError
from dentalgemma.evaluation.results import model_index, write_eval_results
from dentalgemma.evaluation.scoring import compare_runs, read_run, score_run

COMMIT = "0123456789" * 4
BENCHMARK = {"dataset_id": "owner/benchmark", "task_id": "closed", "revision": COMMIT}
HOSTILE = "a|b <img src=x onerror=alert(1)> [x](y)\n---\nlicense: mit"


@pytest.fixture(scope="module")
def folder(phantoms, tmp_path_factory):
    pictures = sorted((phantoms / "coco").glob("*.jpg"))[:10]
    return write_evaluation(tmp_path_factory.mktemp("evaluation"), pictures)


@pytest.fixture(scope="module")
def runs(folder):
    return [
        read_run(folder / f"{name}.jsonl", folder / "questions.jsonl", verdicts=folder / f"{name}_verdicts.jsonl")
        for name in ("base", "tuned")
    ]


@pytest.fixture(scope="module")
def scores(runs):
    return score_run(runs[1], draws=100)


def test_the_hub_s_library_reads_the_model_index_back(scores):
    data = ModelCardData(model_name="m", eval_results=model_index(scores, dataset_name="Made up"))
    read = ModelCard(f"---\n{data}\n---\n").data.eval_results

    assert [(result.dataset_config, result.metric_value) for result in read] == [
        ("closed", 75.0),  # 30 of 40
        ("open", 55.56),  # 5 of 9
        ("combined", 71.43),  # 35 of 49
    ]
    assert {result.dataset_type for result in read} == {"custom"}
    assert read[0].metric_args["extraction"] == "seed/1"
    assert read[1].metric_args["judge"]["model"] == "stub-judge"


def test_the_hub_s_library_reads_the_eval_results_back(scores, tmp_path):
    path = write_eval_results(tmp_path, scores, **BENCHMARK)
    (entry,) = parse_eval_result_entries(yaml.safe_load(path.read_text()))

    assert path == tmp_path / ".eval_results" / "closed.yaml"
    assert (entry.dataset_id, entry.task_id, entry.dataset_revision) == ("owner/benchmark", "closed", COMMIT)
    assert entry.value == round(100 * scores["closed"]["protocols"]["official"]["accuracy"], 2)
    assert "headline seed/1: 75.0 %" in entry.notes
    assert entry.date == "2026-05-01T10:00:49+00:00"


def test_open_answers_name_their_judge(scores, tmp_path):
    path = write_eval_results(tmp_path, scores, **{**BENCHMARK, "task_id": "open"}, kind="open")
    (entry,) = parse_eval_result_entries(yaml.safe_load(path.read_text()))

    assert entry.value == 55.56
    assert "9 of 10 judged, 1 judge errors left out" in entry.notes
    assert "stub-judge" in entry.notes


def test_a_second_benchmark_joins_the_first_and_the_same_one_is_replaced(scores, tmp_path):
    write_eval_results(tmp_path, scores, **BENCHMARK)
    write_eval_results(tmp_path, scores, **{**BENCHMARK, "dataset_id": "owner/other"})
    path = write_eval_results(tmp_path, scores, **BENCHMARK)

    assert [entry["dataset"]["id"] for entry in yaml.safe_load(path.read_text())] == ["owner/other", "owner/benchmark"]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        pytest.param({"images": "blank"}, {}, "a control", id="a control arm"),
        pytest.param({}, {"dataset_id": "nobody"}, "owner/name", id="no dataset of the Hub"),
        pytest.param({}, {"revision": "main"}, "40 hexadecimal", id="a branch"),
        pytest.param({}, {"task_id": "../closed"}, "no task id", id="a path"),
        pytest.param({"closed": None}, {}, "no closed answers", id="nothing asked"),
        pytest.param({"open": None}, {"kind": "open"}, "no open answers", id="nothing judged"),
    ],
)
def test_what_is_no_result_of_a_benchmark_is_refused(scores, tmp_path, change, options, message):
    with pytest.raises(EvaluationError, match=message):
        write_eval_results(tmp_path, {**scores, **change}, **{**BENCHMARK, **options})
    assert not (tmp_path / ".eval_results").exists()


def test_a_file_that_holds_something_else_is_left_alone(scores, tmp_path):
    (tmp_path / ".eval_results").mkdir()
    (tmp_path / ".eval_results" / "closed.yaml").write_text("notes: mine\n")

    with pytest.raises(EvaluationError, match="no list of results"):
        write_eval_results(tmp_path, scores, **BENCHMARK)
    assert (tmp_path / ".eval_results" / "closed.yaml").read_text() == "notes: mine\n"


STAGE = {
    "stage": "vqa", "base_model": "tiny", "base_is_local": True, "base_is_rehearsal": True, "data_sources": [],
    "trains": ["language_model"], "dataset": "data/vqa", "dataset_rows": {"train": 10}, "dtype": "float32",
    "parts": {"language_model": {"parameters": 10, "trainable": 5}}, "lora": {"r": 8, "alpha": 8, "dropout": 0.0},
    "hyperparameters": {"learning_rate": 5e-5}, "global_batch_size": 4, "steps": 4, "epochs": 1.0, "best_step": 2,
    "seconds": 60.0, "losses": {"train": [], "validation": []}, "hardware": {"device": "CPU"}, "versions": {},
}  # fmt: skip


@pytest.fixture
def model(scores, tmp_path):
    """A merged folder as far as a card looks at it, with the weights that were scored."""
    from dentalgemma.certificates import CERTIFICATE, hash_weights

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    certificate = {
        "passed": True, "files": hash_weights(tmp_path / "model"), "weights": scores["weights"], "stages": [STAGE],
        "dtype": "float32", "changed_tensors": 1, "tensors": 2, "max_logit_difference": 0.0, "warnings": [],
        "reloaded_max_logit_difference": 0.0, "parity_inputs": "a picture",
        "rounding": {"relative_error": 0.0, "cosine": 1.0, "unchanged_share": 0.0},
    }  # fmt: skip
    (tmp_path / "model" / CERTIFICATE).write_text(json.dumps(certificate))
    return tmp_path / "model"


def write_card(model, **documents):
    from dentalgemma.publishing.cards import write_model_card

    paths = {}
    for name, document in documents.items():
        paths[name] = model.parent / f"{name}.json"
        paths[name].write_text(json.dumps(document))
    return write_model_card(model, paths.pop("comparison", None), **paths).read_text()


def test_the_card_says_what_was_scored_and_what_was_not_checked(model, runs, scores):
    comparison = compare_runs(*runs, draws=100)
    text = write_card(model, comparison=comparison, scores=scores)

    assert "| closed | 30 | 40 | 75.0 % | 59.8 % to 85.8 % |" in text
    assert "| closed and open, pooled | 35 | 49 | 71.4 % |" in text
    assert "| Teeth | 40 | 50.0 % | 75.0 % | +25.0 | 4 | 14 |" in text  # lost and gained per category
    assert "| Report | 5 | 9 | 55.6 % |" in text
    assert "judged by stub-judge" in text
    assert "was not checked" in text
    assert [result.metric_value for result in ModelCard(text).data.eval_results] == [75.0, 55.56, 71.43]
    assert ModelCard(text).data.model_name == "model"


def test_contamination_and_the_decision_stand_in_the_card(model, scores):
    contamination = {
        "format": "contamination/1", "questions": {}, "dataset": {"name": HOSTILE}, "clean": False,
        "image_matches": [{"leak": True}, {"leak": True}], "question_matches": [{"leak": True}, {"leak": False}],
    }  # fmt: skip
    decision = {
        "format": "decision/1", "title": HOSTILE, "winner": "base", "pre_registered": False,
        "plan": {"plan_sha256": "ab" * 32}, "reasons": ["the plan was never locked"],
        "scores": {"base": {"weights": "00"}, "tuned": {key: scores[key] for key in ("weights", "predictions_sha256")}},
    }  # fmt: skip
    text = write_card(model, scores=scores, contamination=contamination, decision=decision)

    assert "**Contamination**: 3 images or texts of the questions were found" in text
    assert "not registered in advance: the plan was never locked" in text
    assert "was not checked" not in text
    assert "It was pre-registered" not in text


def decide_on(**own):
    return {
        "format": "decision/1", "title": "Which", "winner": "a", "pre_registered": True, "reasons": [],
        "plan": {"plan_sha256": "ab" * 32}, "scores": {"a": own, "b": {"weights": None}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("own", "told", "not_told"),
    [
        pytest.param({}, "these files; whether the models were asked before cannot be seen", "other answers", id="own"),
        pytest.param({"predictions_sha256": "00"}, "other answers of this model", "pre-registered", id="other answers"),
    ],
)
def test_a_decision_is_pre_registered_for_the_answers_that_it_was_made_on(model, scores, own, told, not_told):
    decided = {key: scores[key] for key in ("weights", "predictions_sha256")} | own
    text = write_card(model, scores=scores, decision=decide_on(**decided))

    assert told in text
    assert not_told not in text


def test_a_decision_between_other_models_is_refused(model, scores):
    from dentalgemma.publishing.cards import CardError

    with pytest.raises(CardError, match="decides between a, b, and none of them has the weights of this model"):
        write_card(model, scores=scores, decision=decide_on(weights="00"))
    assert not (model / "README.md").exists()


def test_the_card_shows_no_interval_without_width_and_says_what_is_not_told_from_guessing(model, runs, scores):
    comparison = compare_runs(*runs, draws=100)
    comparison["closed"]["difference_by_image"] = [0.25, 0.25]
    closed = {**scores["closed"], "interval_by_image": [0.2, 0.3]}
    flat = {**scores, "closed": closed, "open": {**scores["open"], "interval_by_image": [1.0, 1.0]}}
    text = write_card(model, comparison=comparison, scores=flat)
    index = ModelCard(text).data.eval_results

    assert "The difference is +25.0 points. McNemar" in text
    assert "(20.00 to 30.00) holds chance" in text
    assert index[0].metric_args["by_image_95"] == [20.0, 30.0]
    assert "by_image_95" not in index[1].metric_args


def test_text_by_others_stays_text_in_the_card(model, scores):
    own = {"n": 1, "correct": 1, "accuracy": 1.0, "wilson": [0.2, 1.0]}
    hostile = {**scores, "name": HOSTILE, "closed": {**scores["closed"], "per_category": {HOSTILE: own}}}
    hostile["open"] = {**scores["open"], "judge": {**scores["open"]["judge"], "model": HOSTILE}}
    text = write_card(model, scores=hostile)
    body = ModelCard(text).text

    assert "&lt;img src=x" in body
    assert "<img" not in body
    assert "\nlicense: mit" not in text
    assert ModelCard(text).data.license == "other"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        pytest.param("scores", {"weights": "other"}, "does not have the weights", id="another model"),
        pytest.param("scores", {"images": "none"}, "a control", id="a control"),
        pytest.param("scores", {"format": "comparison/1"}, "dentalgemma score", id="no scores"),
        pytest.param("decision", {}, "dentalgemma decide", id="no decision"),
        pytest.param("contamination", {}, "dentalgemma contamination", id="no contamination"),
    ],
)
def test_a_card_takes_only_what_is_about_its_model(model, scores, name, change, message):
    from dentalgemma.publishing.cards import CardError

    with pytest.raises(CardError, match=message):
        write_card(model, **{name: {**scores, **change}})
    assert not (model / "README.md").exists()
