"""Gates between stages: the same questions before and after, what was forgotten, and when a run ends with an error."""

import json
import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY
from PIL import Image

from data_builders.records import InputError
from dentalgemma.evaluation.gates import GateError, format_gate, gate_runs, load_gate_questions
from dentalgemma.evaluation.questions import EvaluationError
from dentalgemma.evaluation.runs import read_run

CATEGORIES = ("Teeth", "Patho")


@pytest.fixture
def runs(tmp_path):
    """Answers to 100 questions, the first half of category Teeth; each run is given by the numbers it gets wrong.

    `n` takes the first of them only, and `n_open` adds open ones.
    """
    items = [
        {
            "item_id": f"{number:03}",
            "question": "Is it so?",
            "options": {"A": "yes", "B": "no"},
            "answer": "A",
            "image_id": f"image {number % 10}",
            "categories": [CATEGORIES[number // 50]],
        }
        for number in range(100)
    ]
    questions = tmp_path / "questions.jsonl"

    def make(n=100, n_open=0, **wrong):
        asked = items[:n] + [{"item_id": f"o{i}", "question": "What?", "answer": "Caries."} for i in range(n_open)]
        questions.write_text("".join(json.dumps(item) + "\n" for item in asked))
        made = []
        for name, numbers in wrong.items():
            lines = []
            for number, item in enumerate(asked):
                letter = "B" if number in numbers else "A"
                lines.append({"item_id": item["item_id"], "output": letter, "mode": "generate", "model": name})
            path = tmp_path / f"{name}.jsonl"
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
            made.append(read_run(path, questions, name=name))
        return made

    return make


def test_a_loss_that_cannot_be_chance_fails_and_names_what_was_forgotten(runs):
    gate = gate_runs(runs(base=set(), vqa=set(range(50, 56))))

    assert not gate["passed"]
    assert gate["steps"][0]["mcnemar_p"] == pytest.approx(2 / 2**6)  # six coins that all fall on one side
    assert "-6.0 points on 100 questions (lost 6, gained 0" in gate["failures"][0]
    assert "most in Patho (-12.0 points)" in gate["failures"][0]
    assert gate["per_category"]["Teeth"]["difference"] == 0
    assert gate["per_category"]["Patho"]["accuracy"] == {"base": 1.0, "vqa": 0.88}


def test_five_lost_questions_are_too_few_to_fail(runs):
    assert gate_runs(runs(base=set(), vqa=set(range(5))))["passed"]


def test_a_gain_passes(runs):
    assert gate_runs(runs(base=set(range(30)), vqa=set()))["passed"]


@pytest.mark.parametrize(("lost", "passed"), [(10, True), (11, False)])
def test_a_loss_of_exactly_the_margin_passes(runs, lost, passed):
    assert gate_runs(runs(base=set(), vqa=set(range(lost))), margin=0.1)["passed"] is passed


def test_forgetting_is_followed_over_all_stages(runs):
    """Each stage loses too little to be told from chance, both together do not."""
    gate = gate_runs(runs(base=set(), vqa={0, 1, 2, 3}, instruct=set(range(8))))

    assert [(step["from"], step["to"], step["judged"]) for step in gate["steps"]] == [
        ("base", "vqa", False),
        ("vqa", "instruct", True),
        ("base", "instruct", True),
    ]
    assert list(gate["per_category"]["Teeth"]["accuracy"].values()) == [1.0, 0.92, 0.84]
    assert len(gate["failures"]) == 1
    assert gate["failures"][0].startswith("instruct is right less often than base")


def test_an_earlier_loss_that_was_made_good_does_not_fail_a_later_stage(runs):
    assert gate_runs(runs(base=set(), vqa=set(range(20)), instruct=set()))["passed"]


def test_the_table_shows_every_run_in_every_category(runs):
    table = format_gate(gate_runs(runs(base=set(), vqa={0, 1, 2, 3}, instruct=set(range(8))))).splitlines()

    assert table[0].split() == ["n", "base", "vqa", "instruct", "change", "lost", "gained"]
    assert table[1].split() == ["all", "100", "100.0", "%", "96.0", "%", "92.0", "%", "-8.0", "8", "0"]
    assert [line.split()[0] for line in table[2:4]] == ["Patho", "Teeth"]
    assert "The gate is not passed" in table[-1]


def test_runs_that_cannot_be_told_apart_or_are_too_few_are_refused(runs):
    (run,) = runs(base=set())

    for wrong in ([run], [run, run]):
        with pytest.raises(EvaluationError, match="two runs or more, each of its own name"):
            gate_runs(wrong)
    with pytest.raises(EvaluationError, match="a share"):
        gate_runs(runs(base=set(), vqa=set()), margin=2)


def test_a_gate_says_from_which_loss_on_it_can_fail(runs):
    """Six of 75 lost and none gained have p = 2 / 2**6; five have p = 0.0625."""
    gate = gate_runs(runs(n=75, base=set(), vqa=set()))

    assert gate["detectable"] == {"items": 6, "points": 0.08, "at_80_percent_power": None}
    assert "With 75 questions a loss of 8 points can at best be seen" in format_gate(gate)


def test_a_margin_is_part_of_the_loss_that_can_be_seen(runs):
    gate = gate_runs(runs(base=set(), vqa=set()), margin=0.29)  # 0.29 * 100 is less than 29 in floats

    assert gate["detectable"]["items"] == 30


def test_a_gate_says_which_true_loss_it_mostly_finds(runs):
    """About (1.96 + 0.84) * sqrt(0.3 / 100) = 0.153, as McNemar's test is planned by the normal distribution."""
    gate = gate_runs(runs(base=set(range(15)), vqa=set(range(15, 30))))
    often = gate["detectable"]["at_80_percent_power"]

    assert 0.14 <= often <= 0.18
    assert f"and one of {100 * often:g} points in 8 of 10 cases" in format_gate(gate)


@pytest.mark.parametrize(("n", "enough"), [(5, False), (6, True)])
def test_a_gate_that_nobody_can_fail_is_refused(runs, tmp_path, n, enough):
    made = runs(n=n, base=set(), vqa=set(range(n)))
    if enough:
        load_gate_questions(tmp_path / "questions.jsonl")
        assert not gate_runs(made)["passed"]
        return
    for refuse in (lambda: gate_runs(made), lambda: load_gate_questions(tmp_path / "questions.jsonl")):
        with pytest.raises(EvaluationError, match="too few questions to tell a loss: at least 6"):
            refuse()


def test_open_questions_are_said_to_be_no_part_of_a_gate(runs):
    gate = gate_runs(runs(n_open=30, base=set(), vqa=set()))

    assert gate["open_questions"] == 30
    assert "30 open questions are not part of a gate" in format_gate(gate)
    assert "open question" not in format_gate(gate_runs(runs(base=set(), vqa=set())))


def test_a_loss_of_just_the_margin_passes_whatever_floats_make_of_it(runs):
    assert 0.29 * 100 < 29
    assert gate_runs(runs(base=set(), vqa=set(range(29))), margin=0.29)["passed"]


def test_what_was_gained_is_set_off_against_what_was_lost(runs):
    """20 lost and 6 gained have p = 0.009, and are 14 fewer."""
    made = runs(base=set(range(6)), vqa=set(range(6, 26)))

    assert gate_runs(made, margin=0.15)["passed"]
    assert not gate_runs(made, margin=0.13)["passed"]


@pytest.mark.parametrize("margin", [1, 1.5, -0.01])
def test_a_margin_that_lets_everything_pass_is_refused(runs, margin):
    with pytest.raises(EvaluationError, match="at least 0 and below 1"):
        gate_runs(runs(base=set(), vqa=set()), margin=margin)


def test_open_questions_are_refused(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"item_id": "o1", "question": "What is shown?", "answer": "Caries."}\n')

    with pytest.raises(EvaluationError, match="1 are open, for example o1"):
        load_gate_questions(path)


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """24 closed questions on two pictures."""
    folder = tmp_path_factory.mktemp("probe")
    findings = ["caries", "an impacted tooth", "a deep periapical lesion", "bone loss"]
    lines = []
    for number in range(24):
        image = f"{number % 2}.png"
        Image.linear_gradient("L").rotate(90 * (number % 2)).save(folder / image)
        item = {"item_id": f"{number:02}", "question": f"What does region {number} show?", "answer": "A"}
        turned = findings[number % 4 :] + findings[: number % 4]
        item |= {"options": dict(zip("ABCD", turned, strict=True)), "image": image, "image_id": image}
        lines.append(json.dumps(item | {"categories": [CATEGORIES[number % 2]]}) + "\n")
    (folder / "probe.jsonl").write_text("".join(lines))
    return folder / "probe.jsonl"


def answer(predictions, questions, out):
    """The questions with the letters of `predictions` for the right ones."""
    letters = {line["item_id"]: line["letter"] for line in map(json.loads, predictions.read_text().splitlines())}
    items = [json.loads(line) for line in questions.read_text().splitlines()]
    for item in items:
        item |= {"answer": letters[item["item_id"]], "image": str(questions.parent / item["image"])}
    out.write_text("".join(json.dumps(item) + "\n" for item in items))
    return out


@pytest.fixture(scope="module")
def gated(tiny_model, probe, make_trainer, tmp_path_factory):
    """A stage with a gate, and a second one that starts from it."""
    from dentalgemma.training.gate import run_gate
    from dentalgemma.training.run_facts import write_run_facts

    runs = tmp_path_factory.mktemp("gated")
    for name, start in (("vqa", tiny_model), ("instruct", runs / "vqa")):
        options = {"stage": name, "gate_questions": probe, "gate_margin": 0.99, "learning_rate": 1e-2}
        trainer = make_trainer(start, runs / name, **options)
        trainer.train()
        trainer.save_model()
        write_run_facts(trainer, *trainer.facts_of)
        run_gate(trainer)
    return runs


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_stage_answers_with_its_start_and_its_end(gated, tiny_model, probe):
    import torch

    from dentalgemma.evaluation.generation import evaluate_questions
    from dentalgemma.models.loading import load_pretrained

    start, end = (read_lines(gated / "vqa" / "gate" / f"{name}.jsonl") for name in ("start", "end"))
    model, processor = load_pretrained(tiny_model, dtype=torch.float32)
    out = gated / "untrained.jsonl"
    evaluate_questions(
        model, processor, load_gate_questions(probe), mode="loglikelihood", out=out, batch_size=4, progress=False
    )
    untrained = {line["item_id"]: line for line in read_lines(out)}

    for line in start:
        own = untrained[line["item_id"]]
        assert line["weights"] == own["weights"]
        for letter, score in line["option_scores"].items():
            assert score["sum"] == pytest.approx(own["option_scores"][letter]["sum"], abs=1e-3)
    assert {line["weights"] for line in end}.isdisjoint({line["weights"] for line in start})
    assert any(first["option_scores"] != second["option_scores"] for first, second in zip(start, end, strict=True))


def test_the_next_stage_shows_base_and_both_stages(gated):
    gate = json.loads((gated / "instruct" / "gate" / "gate.json").read_text())
    folder = gated / "instruct" / "gate"

    assert [run["name"] for run in gate["runs"]] == ["base", "vqa", "instruct"]
    assert (folder / "first.jsonl").read_bytes() == (gated / "vqa" / "gate" / "start.jsonl").read_bytes()
    earlier = {line["item_id"]: line["option_scores"] for line in read_lines(gated / "vqa" / "gate" / "end.jsonl")}
    for line in read_lines(folder / "start.jsonl"):  # where the stage before ended
        for letter, score in line["option_scores"].items():
            assert score["sum"] == pytest.approx(earlier[line["item_id"]][letter]["sum"], abs=1e-2)
    assert "/" not in json.dumps([run["model"] for run in gate["runs"]])


def test_a_stage_that_forgets_ends_with_an_error_after_all_is_written(gated, tiny_model, probe, make_trainer, tmp_path):
    """The right letters are what the start answers and the trained model does not."""
    from dentalgemma.training.gate import run_gate

    questions = answer(gated / "vqa" / "gate" / "start.jsonl", probe, tmp_path / "q.jsonl")
    trainer = make_trainer(tiny_model, tmp_path / "run", gate_questions=questions, gate_margin=0)
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=5.0)

    with pytest.raises(GateError, match="the model is saved, the answers are in") as error:
        run_gate(trainer)
    gate = json.loads((tmp_path / "run" / "gate" / "gate.json").read_text())
    assert error.value.exit_code == 1
    assert gate["runs"][0]["accuracy"] == 1.0
    assert not gate["passed"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"gate_questions": "nowhere.jsonl"}, "nowhere.jsonl: cannot be read", id="no questions"),
        pytest.param({"gate_before": "p.jsonl"}, "without gate_questions there is no gate", id="no gate"),
        pytest.param({"gate_questions": "PROBE", "gate_margin": 2}, "a share", id="margin"),
        pytest.param({"gate_questions": "WITHOUT IMAGES"}, "no such image: .*0.png", id="missing images"),
        pytest.param(
            {"gate_questions": "PROBE", "gate_before": "OWN"},
            "gate_before: .* this run writes .* anew",
            id="own folder",
        ),
    ],
)
def test_a_gate_that_cannot_be_run_stops_the_recipe_before_it_trains(
    probe, tiny_model, make_trainer, tmp_path, options, message
):
    elsewhere = tmp_path / "elsewhere" / "probe.jsonl"
    own = tmp_path / "gate" / "start.jsonl"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(probe.read_bytes())
    values = {"PROBE": probe, "WITHOUT IMAGES": elsewhere, "OWN": own}
    options = {name: values.get(value, value) for name, value in options.items()}

    with pytest.raises(InputError, match=message):
        make_trainer(tiny_model, tmp_path, **options)


@pytest.mark.parametrize("recipe", ["stage1_vqa", "stage2_instruct"])
def test_every_recipe_runs_the_gate_last(recipe):
    code = (REPOSITORY / "recipes" / f"{recipe}.py").read_text()

    assert code.index("trainer.save_model()") < code.index("write_run_facts(trainer") < code.index("run_gate(trainer)")


@pytest.mark.slow
def test_a_recipe_with_a_gate_ends_with_1_when_too_much_is_forgotten(gated, tiny_model, vqa_dataset, probe, tmp_path):
    questions = answer(gated / "vqa" / "gate" / "start.jsonl", probe, tmp_path / "q.jsonl")
    settings = {
        "--model_name_or_path": tiny_model,
        "--dataset_name": vqa_dataset,
        "--output_dir": tmp_path / "run",
        "--gate_questions": questions,
        "--max_steps": 40,
        "--learning_rate": 0.1,
        "--warmup_steps": 0,
        "--memory": "fixed",
        "--eval_strategy": "no",
        "--save_strategy": "no",
        "--load_best_model_at_end": "false",
        "--early_stopping_patience": "null",
        "--validation_sample": 0,
        "--dataloader_num_workers": 0,
    }
    command = [
        sys.executable,
        REPOSITORY / "recipes" / "stage1_vqa.py",
        *(x for pair in settings.items() for x in pair),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, env=environment)

    assert done.returncode == 1, done.stderr[-3000:]
    assert "stage1_vqa.py: gate: vqa is right less often than base" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "run_facts.json").is_file()
