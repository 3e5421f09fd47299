"""From files to figures: the published numbers, what is refused, and what each figure leaves in and out."""

import hashlib
import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest

from dentalgemma.evaluation.questions import EvaluationError, load_questions
from dentalgemma.evaluation.scoring import (
    compare_all,
    compare_predictions,
    compare_runs,
    format_comparison,
    is_worse,
    read_run,
    score_predictions,
    score_run,
)
from dentalgemma.evaluation.statistics import bootstrap_interval

GOLDEN = json.loads((Path(__file__).parent / "data/golden_stats.json").read_text("utf-8"))
# The published intervals, in percent, and combined scores; 38 of 491 closed items have an empty option, 32 as the key.
INTERVALS = {"gemma4-31b": (39.31, 48.27), "qwen3-vl-8b": (22.40, 30.35), "llama3.2-11b": (14.87, 22.00)}
COMBINED = {"gemma4-31b": 27.60, "qwen3-vl-8b": 18.15, "llama3.2-11b": 11.23}
OPTIONS = {"A": "Caries.", "B": "An impacted tooth.", "C": "Periapical infection.", "D": "A retained root."}


def write(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


def closed_item(n, **more):
    return {"item_id": f"c{n}", "question": f"What is {n}?", "options": OPTIONS, "answer": "A", **more}


def open_item(n, **more):
    return {"item_id": f"o{n}", "question": f"Describe {n}.", "answer": "Caries of 36.", **more}


def answers(outputs, *, start="c", **more):
    lines = [{"item_id": f"{start}{n}", "output": output} for n, output in enumerate(outputs)]
    return [line | {"mode": "generate", "model": "m", "images": "true"} | more for line in lines]


def judge_all(path, questions, lines, verdicts, **judge):
    """Verdict lines as `judge` writes them, on the open questions in their order."""
    outputs = {line["item_id"]: line["output"] for line in lines}
    items = [item for item in load_questions(questions) if item.kind == "open"]
    judge = {"model": "stub", "api": "openai", "prompt_sha256": "f" * 64} | judge
    return write(
        path,
        [
            {
                "item_id": item.item_id,
                "item_hash": item.item_hash,
                "answer_sha256": hashlib.sha256(outputs[item.item_id].encode()).hexdigest(),
                "verdict": verdict,
                "judge": judge,
                "cost_usd": 0.001,
                "seconds": 0.5,
            }
            for item, verdict in zip(items, verdicts, strict=False)
        ],
    )


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """The three published models on a benchmark of the published shape, right on as many items as published."""
    folder = tmp_path_factory.mktemp("benchmark")
    questions = [closed_item(n, image_id=f"i{n % 100}") for n in range(491)]
    questions += [open_item(n, image_id=f"i{n % 100}") for n in range(578)]
    write(folder / "q.jsonl", questions)
    runs = {}
    for name, model in GOLDEN["closed"].items():
        failed, right = model["failed"], model["k"]
        outputs = [""] * failed + ["A"] * right + ["B"] * (491 - failed - right)
        lines = answers(outputs, model=name) + answers(["Caries."] * 578, start="o", model=name)
        write(folder / f"{name}.jsonl", lines)
        verdicts = ["correct"] * model["open_k"] + ["incorrect"] * (578 - model["open_k"])
        judge_all(folder / f"{name}_verdicts.jsonl", folder / "q.jsonl", lines, verdicts)
        runs[name] = read_run(
            folder / f"{name}.jsonl", folder / "q.jsonl", verdicts=folder / f"{name}_verdicts.jsonl", name=name
        )
    return runs


@pytest.fixture(scope="module")
def scores(benchmark):
    return {name: score_run(run, draws=2_000) for name, run in benchmark.items()}


@pytest.fixture
def published(tmp_path):
    """The published pair of 491 questions: 46 both right, 44 only the first, 83 only the second, 318 neither."""
    cells = [(True, True)] * 46 + [(True, False)] * 44 + [(False, True)] * 83 + [(False, False)] * 318
    questions = [closed_item(n, image_id=f"i{n // 5}") for n in range(491)]
    for side, name in enumerate("ab"):
        lines = answers(["A" if cell[side] else "B" for cell in cells], model=name)
        write(tmp_path / f"{name}.jsonl", lines)
    return tmp_path / "a.jsonl", tmp_path / "b.jsonl", write(tmp_path / "q.jsonl", questions)


@pytest.mark.parametrize("name", GOLDEN["closed"])
def test_the_published_accuracies_and_their_intervals_are_reproduced(scores, name):
    model, closed, open_ = GOLDEN["closed"][name], scores[name]["closed"], scores[name]["open"]

    assert closed["accuracy"] == pytest.approx(model["acc"])
    assert closed["wilson"] == pytest.approx(model["wilson"])
    assert [100 * end for end in closed["interval_by_question"]] == pytest.approx(INTERVALS[name], abs=0.6)
    assert open_["accuracy"] == pytest.approx(model["open_acc"])
    assert open_["wilson"] == pytest.approx(model["open_wilson"])
    assert closed["chance"] == 0.25


@pytest.mark.parametrize("name", GOLDEN["closed"])
def test_the_combined_score_is_pooled_over_all_1069_items(scores, name):
    model, combined = GOLDEN["closed"][name], scores[name]["combined"]

    assert (combined["n"], combined["correct"]) == (1069, model["k"] + model["open_k"])
    assert round(100 * combined["accuracy"], 2) == COMBINED[name]
    assert combined["accuracy"] == pytest.approx(model["combined"])
    assert combined["accuracy"] != pytest.approx((model["acc"] + model["open_acc"]) / 2, abs=0.005)  # no mean of means


@pytest.mark.parametrize("name", GOLDEN["closed"])
def test_the_bounds_are_the_published_ones(scores, name):
    model, closed = GOLDEN["closed"][name], scores[name]["closed"]

    assert closed["failed"] == pytest.approx(model["failed"] / 491)
    assert closed["bounds"]["failures_wrong"] == {"n": 491, "accuracy": pytest.approx(model["acc"])}
    assert closed["bounds"]["failures_at_chance"] == {"n": 491, "accuracy": pytest.approx(model["chance_imputed"])}
    assert closed["bounds"]["extracted_only"]["n"] == 491 - model["failed"]
    assert closed["bounds"]["extracted_only"]["accuracy"] == pytest.approx(model["acc_given_extracted"])


def test_questions_whose_right_option_is_empty_lower_the_ceiling_to_459_of_491(tmp_path):
    questions = [closed_item(n) for n in range(491)]
    for n in range(38):
        questions[n]["options"] = OPTIONS | ({"A": ""} if n < 32 else {"D": " "})
    lines = answers(["C"] * 32 + ["A"] * 200 + ["B"] * 259)

    closed = score_predictions(write(tmp_path / "p.jsonl", lines), write(tmp_path / "q.jsonl", questions))["closed"]

    assert round(100 * closed["ceiling"], 2) == 93.48
    assert closed["answerable"] == closed["answerable"] | {"n": 459, "correct": 200}
    assert closed["bounds"]["answerable_only"] == {"n": 459, "accuracy": 200 / 459}
    assert closed["accuracy"] == 200 / 491
    assert (closed["unreachable"], closed["right_unshown"]) == (0, 0)
    assert closed["chance"] == pytest.approx((453 / 4 + 6 / 3) / 491)  # no guess among the options shown is right


def test_right_answers_by_the_letter_of_an_option_that_was_never_shown_are_counted(tmp_path):
    questions = [closed_item(n, options=OPTIONS | ({"A": " "} if n < 3 else {})) for n in range(6)]

    closed = score_predictions(write(tmp_path / "p.jsonl", answers("AABAAB")), write(tmp_path / "q.jsonl", questions))[
        "closed"
    ]

    assert (closed["correct"], closed["right_unshown"], closed["answerable"]["correct"]) == (4, 2, 2)
    assert closed["accuracy"] > closed["ceiling"] == 0.5  # by content


def test_a_right_letter_that_the_protocol_does_not_read_is_counted_and_said(tmp_path):
    five = OPTIONS | {"E": "A cyst."}
    items = [closed_item(n, options=five, answer="A" if n == 2 else "E") for n in range(4)]
    items[3]["options"] = five | {"E": ""}  # nobody can answer it, however it is read
    questions = write(tmp_path / "q.jsonl", items)
    lines = answers("EEAA")
    run = write(tmp_path / "p.jsonl", lines)
    # The other tool showed the right one as A.
    shown = {"A": "A cyst.", "B": "Caries.", "C": "An impacted tooth.", "D": "Periapical infection."}
    other = write(tmp_path / "o.jsonl", [lines[0] | {"output": "A", "options_shown": shown}, *lines[1:]])
    scored = write(tmp_path / "s.jsonl", [line | {"mode": "loglikelihood", "letter": "E"} for line in lines])

    result = score_predictions(run, questions)

    closed = result["closed"]
    assert (closed["correct"], closed["unreachable"], closed["ceiling"]) == (1, 2, 0.25)
    assert "2 closed questions, for example c0, have a right letter that the extraction seed/1" in result["warnings"][0]
    assert format_comparison(compare_predictions(run, run, questions)).count("warning: 2 closed questions") == 1
    for path, protocol, unreachable in (
        (run, "strict", 0),
        (run, "official", 0),
        (scored, "seed", 0),
        (other, "seed", 1),
    ):
        again = score_predictions(path, questions, protocol=protocol)["closed"]
        assert (again["unreachable"], again["ceiling"]) == (unreachable, 0.75 - unreachable / 4)


def test_letters_that_were_drawn_are_no_right_answers_and_no_headline_of_official(tmp_path):
    questions = write(tmp_path / "q.jsonl", [closed_item(n) for n in range(40)])
    run = write(tmp_path / "p.jsonl", answers([""] * 40))

    drawn = score_predictions(run, questions, protocol="official")["closed"]

    assert drawn["correct"] > 0
    assert drawn["bounds"]["failures_wrong"] == {"n": 40, "accuracy": 0}
    assert drawn["bounds"]["failures_at_chance"] == {"n": 40, "accuracy": 0.25}
    assert drawn["headline"] is None
    for protocol in ("seed", "strict"):
        closed = score_predictions(run, questions, protocol=protocol)["closed"]
        assert closed["accuracy"] == closed["bounds"][closed["headline"]]["accuracy"] == 0


def test_the_published_comparison_is_reproduced(published):
    result = json.loads(json.dumps(compare_predictions(*published)))
    pair = result["closed"]

    assert (pair["both"], pair["only_a"], pair["only_b"], pair["neither"]) == (46, 44, 83, 318)
    assert round(pair["mcnemar_p"], 6) == 0.000685
    assert pair["a"]["accuracy"] == pytest.approx(0.18329938900203666)
    assert pair["b"]["accuracy"] == pytest.approx(0.26272912423625255)
    assert pair["difference"] == pytest.approx(0.07942973523421588)
    low, high = pair["difference_by_question"]
    # golden_stats.json gives the standard error of the difference; the normal interval is the oracle.
    assert low == pytest.approx(pair["difference"] - 1.96 * 0.022670342813050946, abs=0.006)
    assert high == pytest.approx(pair["difference"] + 1.96 * 0.022670342813050946, abs=0.006)
    assert pair["detectable_difference"]["discordance"] == pytest.approx((44 + 83) / 491)
    assert (result["open"], result["combined"]) == (None, None)
    text = format_comparison(result)
    assert "18.33 %" in text
    assert "+7.94 points" in text
    assert "p = 0.000685" in text
    assert "minimum detectable effect: 6 items (1.22 points)" in text
    assert "not only the model differs" not in text


def test_all_pairs_are_compared_and_their_p_values_corrected_by_holm(benchmark):
    result = json.loads(json.dumps(compare_all(list(benchmark.values()), draws=100)))
    from statsmodels.stats.multitest import multipletests

    assert [(pair["a"]["name"], pair["b"]["name"]) for pair in result["pairs"]] == [
        ("gemma4-31b", "qwen3-vl-8b"), ("gemma4-31b", "llama3.2-11b"), ("qwen3-vl-8b", "llama3.2-11b")
    ]  # fmt: skip
    for kind in ("closed", "open", "combined"):
        pairs = [comparison[kind] for comparison in result["pairs"]]
        oracle = multipletests([pair["mcnemar_p"] for pair in pairs], method="holm")[1]
        assert [pair["holm_p"] for pair in pairs] == pytest.approx(oracle)
    assert "Holm p" in format_comparison(result)


def test_holm_corrects_over_all_pairs_of_four_runs_and_the_detectable_effect_with_it(tmp_path):
    questions = write(tmp_path / "q.jsonl", [closed_item(n) for n in range(60)])
    runs = []
    for right in (10, 18, 26, 33):
        path = write(tmp_path / f"{right}.jsonl", answers("A" * right + "B" * (60 - right)))
        runs.append(read_run(path, questions))
    from statsmodels.stats.multitest import multipletests

    pairs = [comparison["closed"] for comparison in compare_all(runs, draws=100)["pairs"]]

    # The last pair differs in 7 items one way, p = 2 / 2^7, which is corrected last: it keeps its p, or takes a larger.
    assert pairs[-1]["mcnemar_p"] == 2 / 2**7
    oracle = multipletests([pair["mcnemar_p"] for pair in pairs], method="holm")[1]
    assert [pair["holm_p"] for pair in pairs] == pytest.approx(oracle)
    # Of six pairs the smallest p counts six times: 6 · 2 / 2^7 > 0.05 > 6 · 2 / 2^8. Alone, six flips are enough.
    for pair in pairs:
        assert pair["minimum_detectable_effect"] == {"items": 6, "points": 6 / 60}
        assert pair["minimum_detectable_effect_holm"] == {"items": 8, "points": 8 / 60}


def test_a_part_that_was_lost_has_a_negative_difference(tmp_path):
    items = [
        closed_item(n, categories=["lost"] if n < 4 else ["kept"], language="es" if n < 4 else "en") for n in range(8)
    ]
    questions = write(tmp_path / "q.jsonl", items)
    a, b = (write(tmp_path / f"{name}.jsonl", answers(own)) for name, own in (("a", "AAABAABB"), ("b", "ABBBAABB")))

    pair = compare_predictions(a, b, questions)["closed"]

    lost = pair["per_category"]["lost"]
    assert lost == {"n": 4, "a": 0.75, "b": 0.25, "difference": -0.5, "only_a": 2, "only_b": 0, "mcnemar_p": 0.5}
    assert pair["per_category"]["kept"]["difference"] == 0
    assert pair["per_language"]["es"] == lost
    assert pair["difference"] == -0.25


def test_servers_that_did_not_decode_all_answers_in_one_way_are_told(tmp_path):
    questions = write(tmp_path / "q.jsonl", [closed_item(n) for n in range(4)])
    seeded, unseeded = ({"server": {"honoured": own}} for own in ({"temperature": 0, "seed": 0}, {"temperature": 0}))
    lines = answers("AAAB", **seeded)
    one = write(tmp_path / "one.jsonl", lines)
    two = write(tmp_path / "two.jsonl", [*lines[:3], lines[3] | unseeded])

    assert score_predictions(one, questions)["warnings"] == []
    assert "did not decode all answers in one way" in score_predictions(two, questions)["warnings"][0]
    result = compare_predictions(one, two, questions)
    assert result["settings_that_differ"] == ["honoured"]
    assert result["b"]["honoured"] == {"closed": [seeded["server"]["honoured"], unseeded["server"]["honoured"]]}
    assert "warning: two: the server did not decode" in format_comparison(result)
    hot = write(tmp_path / "hot.jsonl", [line | {"generation": {"temperature": n}} for n, line in enumerate(lines)])
    with pytest.raises(EvaluationError, match="mixes generation"):
        read_run(hot, questions)


def test_settings_that_differ_between_two_runs_are_named(tmp_path):
    questions = write(tmp_path / "q.jsonl", [closed_item(n) for n in range(8)])
    a = write(tmp_path / "a.jsonl", answers("AAAAAAAA"))
    b = write(tmp_path / "b.jsonl", answers("AAAAAAAB", images="blank", dtype="float16", model="other"))

    result = compare_predictions(a, b, questions)

    assert set(result["settings_that_differ"]) == {"model", "images", "dtype"}
    assert "not only the model differs: dtype, images" in format_comparison(result)


def test_a_combined_comparison_pools_the_discordant_items(benchmark):
    result = compare_runs(benchmark["llama3.2-11b"], benchmark["gemma4-31b"], draws=100)

    assert result["combined"]["n"] == 1069
    for cell in ("both", "only_a", "only_b", "neither"):
        assert result["combined"][cell] == result["closed"][cell] + result["open"][cell]
    assert result["combined"]["difference"] == pytest.approx((214 + 81 - 90 - 30) / 1069)


def test_a_score_counts_types_methods_and_unreadable_answers_as_wrong(tmp_path):
    questions = [closed_item(n, image_id="i", question_type="one" if n < 3 else "two") for n in range(4)]
    questions = [item | {"answer": "B"} for item in questions]
    outputs = ["B", "B) it is", "it is an impacted tooth. Surely", "no idea, sorry, none of this can be told from here"]

    result = score_predictions(write(tmp_path / "p.jsonl", answers(outputs)), write(tmp_path / "q.jsonl", questions))
    closed = result["closed"]

    assert (closed["n"], closed["correct"], closed["accuracy"], closed["failed"]) == (4, 3, 0.75, 0.25)
    assert closed["methods"] == {"end_letter": 1, "start_letter": 1, "option_text": 1, "failed": 1}
    assert {name: own["correct"] for name, own in closed["per_question_type"].items()} == {"one": 3, "two": 0}
    assert json.loads(json.dumps(result)) == result


def test_an_item_of_several_categories_counts_in_each_and_one_of_none_in_none(tmp_path):
    categories = (["Teeth", "Patho"], ["Teeth"], [])
    questions = [closed_item(n, categories=own) for n, own in enumerate(categories)]

    closed = score_predictions(
        write(tmp_path / "p.jsonl", answers(["A", "B", "A"])), write(tmp_path / "q.jsonl", questions)
    )["closed"]

    assert {name: (own["n"], own["correct"]) for name, own in closed["per_category"].items()} == {
        "Teeth": (2, 1), "Patho": (1, 1)
    }  # fmt: skip
    assert closed["per_modality"] == {}


def test_one_image_has_no_interval_by_image_and_the_reason_stands_there(tmp_path):
    questions = write(tmp_path / "q.jsonl", [closed_item(n, image_id="only") for n in range(8)])
    a = write(tmp_path / "a.jsonl", answers("AAAABBBB"))
    b = write(tmp_path / "b.jsonl", answers("AAAAAABB"))

    closed = score_predictions(a, questions)["closed"]

    assert closed["interval_by_image"] is None
    assert "one image" in closed["no_interval_by_image"]
    assert closed["interval_by_question"][0] < 0.5 < closed["interval_by_question"][1]
    pair = compare_predictions(a, b, questions)
    assert pair["closed"]["difference_by_image"] is None
    assert "one image" in format_comparison(pair)
    assert "one image" in is_worse(pair, margin=0.02)


def test_questions_without_image_stand_each_for_itself(tmp_path):
    questions = write(tmp_path / "q.jsonl", [closed_item(n) for n in range(20)])

    closed = score_predictions(write(tmp_path / "p.jsonl", answers("AB" * 10)), questions)["closed"]

    assert closed["images_asked"] == 0
    assert closed["interval_by_image"] == closed["interval_by_question"]
    assert closed["clustering"] == {"icc": None, "design_effect": None, "mean_cluster_size": 1}


def test_translations_of_a_question_without_image_are_resampled_together(tmp_path):
    items = [closed_item(n, pair_id=f"p{n // 2}") for n in range(20)]
    outputs = "AABB" * 5

    closed = score_predictions(write(tmp_path / "p.jsonl", answers(outputs)), write(tmp_path / "q.jsonl", items))[
        "closed"
    ]

    right = [letter == "A" for letter in outputs]
    assert closed["interval_by_image"] == list(bootstrap_interval(right, [n // 2 for n in range(20)]))
    assert closed["interval_by_image"] != closed["interval_by_question"]
    assert (closed["n_clusters"], closed["clustering"]["icc"]) == (10, 1)


def test_images_of_one_patient_are_resampled_together_and_it_is_said(tmp_path):
    """Two images a patient, two questions an image; all four answers about a patient are alike."""
    items = [closed_item(n, image_id=f"i{n // 2}", group_id=f"g{n // 4}") for n in range(48)]
    outputs = "AAAABBBB" * 6
    questions = write(tmp_path / "q.jsonl", items)
    a = write(tmp_path / "a.jsonl", answers(outputs))
    b = write(tmp_path / "b.jsonl", answers("B" * 48))

    closed = score_predictions(a, questions)["closed"]
    pair = compare_predictions(a, b, questions)

    right = np.array([letter == "A" for letter in outputs])
    patients = [n // 4 for n in range(48)]
    assert (closed["clusters"], closed["n_clusters"], closed["images_asked"]) == ("group", 12, 24)
    assert closed["interval_by_image"] == list(bootstrap_interval(right, patients))
    assert closed["clustering"]["mean_cluster_size"] == 4
    assert pair["closed"]["difference_by_image"] == list(bootstrap_interval(-right.astype(int), patients))
    assert "(bootstrap by group)" in format_comparison(pair)
    # Where each patient has one image, images are what is resampled.
    single = [item | {"group_id": item["image_id"]} for item in items]
    assert score_predictions(a, write(tmp_path / "s.jsonl", single))["closed"]["clusters"] == "image"


def test_neither_order_of_lines_changes_a_figure(tmp_path):
    rng = random.Random(1)
    questions = [closed_item(n, image_id=f"i{n % 7}", categories=["x", "y"][: n % 3]) for n in range(60)]
    lines = answers([rng.choice("ABCD") for _ in questions])
    one = score_predictions(write(tmp_path / "p.jsonl", lines), write(tmp_path / "q.jsonl", questions))
    rng.shuffle(lines)
    rng.shuffle(questions)

    other = score_predictions(write(tmp_path / "p.jsonl", lines), write(tmp_path / "q.jsonl", questions))

    assert {**other, "predictions_sha256": 0} == {**one, "predictions_sha256": 0}
    assert other["predictions_sha256"] != one["predictions_sha256"]


def test_judge_errors_and_missing_verdicts_are_counted_and_left_out_of_both_sides_of_the_fraction(tmp_path):
    questions = write(tmp_path / "q.jsonl", [closed_item(0), *(open_item(n, image_id=f"i{n}") for n in range(6))])
    lines = answers(["A"]) + answers(["Caries."] * 6, start="o")
    a = write(tmp_path / "a.jsonl", lines)
    verdicts = ["correct", "incorrect", "correct", "judge_error", "correct"]
    judged = judge_all(tmp_path / "v.jsonl", questions, lines, verdicts)

    result = score_predictions(a, questions, verdicts=judged)
    open_ = result["open"]

    assert (open_["n"], open_["judged"], open_["judge_errors"], open_["not_judged"]) == (6, 4, 1, 1)
    assert (open_["correct"], open_["accuracy"], open_["complete"]) == (3, 0.75, False)
    assert open_["bounds"] == {
        "errors_wrong": {"n": 5, "accuracy": 3 / 5}, "errors_right": {"n": 5, "accuracy": 4 / 5}
    }  # fmt: skip
    assert (result["combined"]["n"], result["combined"]["correct"]) == (5, 4)
    assert open_["judge"] == open_["judge"] | {"model": "stub", "errors": 1, "seconds": 2.5}
    assert open_["judge"]["cost_usd"] == pytest.approx(0.005)
    every = judge_all(tmp_path / "w.jsonl", questions, lines, ["correct"] * 6)
    pair = compare_predictions(a, a, questions, verdicts=(judged, every))["open"]
    assert (pair["n"], pair["left_out"], pair["only_b"]) == (4, 2, 1)


def test_open_answers_that_nobody_judged_have_no_accuracy_rather_than_one_of_zero(tmp_path):
    questions = write(tmp_path / "q.jsonl", [open_item(n) for n in range(3)])

    result = score_predictions(write(tmp_path / "p.jsonl", answers("xyz", start="o")), questions)

    assert (result["closed"], result["combined"]) == (None, None)
    assert result["open"] == result["open"] | {"n": 3, "judged": 0, "not_judged": 3, "accuracy": None, "judge": None}
    assert (result["open"]["complete"], result["open"]["bounds"]["errors_right"]["accuracy"]) == (False, None)
    assert "3 of 3 open answers have no verdict" in result["warnings"][0]
    with pytest.raises(EvaluationError, match=r"nothing to compare.*`dentalgemma judge`.*--verdicts"):
        compare_predictions(tmp_path / "p.jsonl", tmp_path / "p.jsonl", questions)


def test_open_questions_without_verdict_are_said_where_the_closed_ones_are_compared(tmp_path):
    questions = write(tmp_path / "q.jsonl", [closed_item(0), *(open_item(n) for n in range(30))])
    lines = answers("A") + answers(["Caries."] * 30, start="o")
    run = write(tmp_path / "p.jsonl", lines)

    silent = compare_predictions(run, run, questions)

    assert silent["open"] is None
    assert silent["left_out"]["closed"] == {"not_judged": 0, "judge_errors": 0}
    assert silent["left_out"]["open"] == {"not_judged": 30, "judge_errors": 0}
    assert "30 open questions not judged: not compared" in format_comparison(silent)
    with pytest.raises(EvaluationError, match="no open answers to compare"):
        is_worse(silent, kind="open")
    # The third is all that both judged; the first two have an error on one side at least, the others no verdict.
    some = judge_all(tmp_path / "v.jsonl", questions, lines, ["correct", "judge_error", "correct", "correct"])
    fewer = judge_all(tmp_path / "w.jsonl", questions, lines, ["judge_error", "judge_error", "incorrect"])
    both = compare_predictions(run, run, questions, verdicts=(some, fewer))
    assert (both["open"]["n"], both["open"]["left_out"]) == (1, 29)
    assert both["left_out"]["open"] == {"not_judged": 27, "judge_errors": 2}
    assert both["left_out"]["combined"] == both["left_out"]["open"]
    assert "2 open questions whose judge could not be read: not compared" in format_comparison(both)


def test_a_comparison_and_scores_name_the_files_that_they_are_of(tmp_path):
    questions = write(tmp_path / "q.jsonl", [closed_item(0), open_item(0), open_item(1)])
    lines = answers("A") + answers("xy", start="o")
    run = write(tmp_path / "p.jsonl", lines)
    verdicts = judge_all(tmp_path / "v.jsonl", questions, lines, ["correct", "incorrect"])

    scores = score_predictions(run, questions, verdicts=verdicts)
    pair = compare_predictions(run, run, questions, verdicts=(verdicts, None))

    of_run, of_verdicts = (hashlib.sha256(path.read_bytes()).hexdigest() for path in (run, verdicts))
    assert (scores["predictions_sha256"], scores["verdicts_sha256"]) == (of_run, of_verdicts)
    assert (pair["a"]["predictions_sha256"], pair["a"]["verdicts_sha256"]) == (of_run, of_verdicts)
    assert pair["b"]["verdicts_sha256"] is None
    assert scores["open"]["complete"] is True
    assert scores["warnings"] == []


def test_a_verdict_on_another_answer_or_question_is_refused_by_its_item(tmp_path):
    questions = write(tmp_path / "q.jsonl", [open_item(n) for n in range(3)])
    lines = answers(["a", "b", "c"], start="o")
    run = write(tmp_path / "p.jsonl", lines)
    good = judge_all(tmp_path / "v.jsonl", questions, lines, ["correct"] * 3)
    verdicts = [json.loads(line) for line in good.read_text().splitlines()]

    for change, reason in (
        ({"answer_sha256": "0" * 64}, "verdict on o1 is about another answer"),
        ({"item_hash": "0"}, "verdict on o1 is about another question"),
        ({"item_id": "o9"}, "judges item o9, which is no open question"),
        ({"reference_sha256": "0" * 64}, "verdict on o1 was given by another reference"),
        ({"judge": verdicts[0]["judge"] | {"model": "other"}}, "mixes judge's model"),
        ({"judge": verdicts[0]["judge"] | {"api": "anthropic"}}, "mixes judge's api"),
        ({"judge": verdicts[0]["judge"] | {"requested": {"temperature": 1}}}, "mixes judge's requested"),
        ({"judge": None}, "mixes judge's"),
    ):
        bad = write(tmp_path / "bad.jsonl", [verdicts[0], verdicts[1] | change, verdicts[2]])
        with pytest.raises(EvaluationError, match=reason):
            read_run(run, questions, verdicts=bad)
    same = {"reference_sha256": hashlib.sha256(b"Caries of 36.").hexdigest()}
    read_run(run, questions, verdicts=write(tmp_path / "same.jsonl", [verdict | same for verdict in verdicts]))
    for judge in ({"prompt_sha256": "0" * 64}, {"api": "anthropic"}, {"model": "other"}):
        other = judge_all(tmp_path / "w.jsonl", questions, lines, ["correct"] * 3, **judge)
        with pytest.raises(EvaluationError, match="judge both alike"):
            compare_predictions(run, run, questions, verdicts=(good, other))


def test_one_verdict_without_a_price_leaves_no_sum(tmp_path):
    questions = write(tmp_path / "q.jsonl", [open_item(n) for n in range(3)])
    lines = answers("xyz", start="o")
    run = write(tmp_path / "p.jsonl", lines)
    judged = judge_all(tmp_path / "v.jsonl", questions, lines, ["correct"] * 3)
    verdicts = [json.loads(line) for line in judged.read_text().splitlines()]
    unknown = write(tmp_path / "w.jsonl", [verdicts[0] | {"cost_usd": None}, *verdicts[1:]])

    assert score_predictions(run, questions, verdicts=judged)["open"]["judge"]["cost_usd"] == pytest.approx(0.003)
    assert score_predictions(run, questions, verdicts=unknown)["open"]["judge"]["cost_usd"] is None


def test_predictions_that_do_not_fit_are_refused_with_the_reason(published, tmp_path):
    a, b, questions = published
    lines = [json.loads(line) for line in a.read_text().splitlines()]
    short = write(tmp_path / "short.jsonl", lines[:-2])
    foreign = write(tmp_path / "foreign.jsonl", [*lines, {"item_id": "x", "output": "A"}])
    twice = write(tmp_path / "twice.jsonl", [*lines, lines[0]])
    scored = write(tmp_path / "scored.jsonl", [line | {"mode": "loglikelihood", "letter": "A"} for line in lines])
    mixed = write(tmp_path / "mixed.jsonl", [lines[0] | {"mode": "loglikelihood"}, *lines[1:]])
    other = write(tmp_path / "other.jsonl", [lines[0] | {"item_hash": "0"}, *lines[1:]])
    warm = write(tmp_path / "warm.jsonl", [lines[0] | {"generation": {"temperature": 1}}, *lines[1:]])
    number = write(tmp_path / "number.jsonl", [lines[0] | {"output": 3}, *lines[1:]])

    for path, reason in (
        (short, "lacks 2 of 491 items, for example c489: run `dentalgemma evaluate` again"),
        (foreign, "answers 1 items that .* does not ask: x"),
        (twice, r"twice.jsonl:492: item c0 was answered before"),
        (mixed, 'mixes mode "generate" and "loglikelihood"'),
        (other, "item c0 was asked differently"),
        (warm, "mixes generation"),
        (number, "the output of item c0 is no text: 3"),
    ):
        with pytest.raises(EvaluationError, match=reason):
            score_predictions(path, questions)
    with pytest.raises(EvaluationError, match="cannot be compared"):
        compare_predictions(scored, b, questions)
    with pytest.raises(EvaluationError, match="read by protocol seed, b by strict"):
        compare_runs(read_run(a, questions), read_run(b, questions, protocol="strict"))
    with pytest.raises(EvaluationError, match="each of its own name"):
        compare_all([read_run(a, questions), read_run(a, questions)])
    with pytest.raises(EvaluationError, match="no extraction protocol 'regex'"):
        score_predictions(a, questions, protocol="regex")
    changed = [closed_item(n, image_id=f"i{n // 5}") for n in range(491)]
    changed[7]["answer"] = "C"
    with pytest.raises(EvaluationError, match="not asked the same 1 questions, for example c7"):
        compare_runs(read_run(a, questions), read_run(b, write(tmp_path / "changed.jsonl", changed)))


def test_predictions_of_another_tool_may_lack_everything_but_the_output(tmp_path):
    lines = [{"item_id": f"c{n}", "output": output} for n, output in enumerate("AAB")]
    questions = write(tmp_path / "q.jsonl", [closed_item(n) for n in range(3)])

    result = score_predictions(write(tmp_path / "p.jsonl", lines), questions)

    assert result["closed"]["correct"] == 2
    assert (result["name"], result["model"], result["weights"], result["latency"]) == ("p", None, None, None)
    assert result["answered"] == {"first": None, "last": None, "dated": 0}
    assert "unnamed model" in format_comparison(
        compare_predictions(tmp_path / "p.jsonl", tmp_path / "p.jsonl", questions)
    )


def test_text_that_is_no_valid_unicode_and_times_that_are_no_numbers_are_survived(tmp_path):
    questions = write(tmp_path / "q.jsonl", [closed_item(0), closed_item(1), closed_item(2)])
    lines = answers(["\ud800 A", "\x00", None])
    for line, latency in zip(lines, (float("nan"), True, 5), strict=True):
        line["latency_ms"] = latency

    result = score_predictions(write(tmp_path / "p.jsonl", lines), questions)

    assert (result["closed"]["correct"], result["closed"]["failed"]) == (1, pytest.approx(2 / 3))
    assert (result["latency"]["n"], result["latency"]["median_ms"]) == (1, 5)


def test_latency_leaves_the_warm_up_out_and_dates_are_told_in_utc(tmp_path):
    lines = answers("AAAA", hardware="card", batch_size=2)
    for n, line in enumerate(lines):
        line |= {"latency_ms": [9000, 9000, 100, 300][n], "warm_up": n < 2}
        line |= {"answered_at": f"2026-01-01T0{n}:00:00+02:00"} if n else {"answered_at": "2026-01-01T00:00:00"}
    # In UTC this is in the year 10000, which no date has.
    lines.append(lines[0] | {"item_id": "c4", "answered_at": "9999-12-31T23:59:59-14:00"})
    questions = write(tmp_path / "q.jsonl", [closed_item(n) for n in range(5)])

    result = score_predictions(write(tmp_path / "p.jsonl", lines), questions)

    assert result["latency"] == result["latency"] | {"n": 2, "median_ms": 200, "warm_up_excluded": 3}
    assert result["latency"]["p95_ms"] == pytest.approx(290)
    assert (result["latency"]["hardware"], result["latency"]["batch_size"]) == ("card", 2)
    # The first line's time has no zone: it cannot be ordered, and does not count as a date.
    assert result["answered"] == {
        "first": "2025-12-31T23:00:00+00:00", "last": "2026-01-01T01:00:00+00:00", "dated": 3
    }  # fmt: skip


def test_a_loss_counts_as_worse_only_when_it_can_be_told_from_chance(tmp_path):
    questions = write(tmp_path / "q.jsonl", [closed_item(n, image_id=f"i{n}") for n in range(100)])
    whole = write(tmp_path / "whole.jsonl", answers("A" * 60 + "B" * 40))
    five = write(tmp_path / "five.jsonl", answers("A" * 55 + "B" * 45))
    six = write(tmp_path / "six.jsonl", answers("A" * 54 + "B" * 46))

    # Five one-way flips give p = 0.0625, six give 0.031.
    assert is_worse(compare_predictions(whole, five, questions)) is None
    reason = is_worse(compare_predictions(whole, six, questions))
    assert reason.startswith("six is worse than whole by -6.00 points on 100 closed questions")
    # A p of just alpha is not below it.
    assert is_worse(compare_predictions(whole, six, questions), alpha=2 / 2**6) is None
    assert is_worse(compare_predictions(six, whole, questions)) is None
    # With a margin the better run passes, and a loss of six points cannot be shown to be at most two.
    assert is_worse(compare_predictions(six, whole, questions), margin=0.02) is None
    reason = is_worse(compare_predictions(whole, five, questions), margin=0.02)
    assert reason.startswith("five may be worse than whole by more than 2 points")
    assert is_worse(compare_predictions(whole, five, questions), margin=0.15) is None


def test_a_loss_of_just_the_margin_passes_whatever_floats_make_of_it(tmp_path):
    questions = write(tmp_path / "q.jsonl", [closed_item(n, image_id=f"i{n}") for n in range(20)])
    a, b = (write(tmp_path / f"{name}.jsonl", answers(own)) for name, own in (("a", "A" * 20), ("b", "A" * 19 + "B")))
    document = compare_predictions(a, b, questions)
    low = -(0.1 + 0.2)  # a little below -0.3
    document["closed"] |= {"difference_by_image": [low, 0.0]}

    assert low < -0.3
    assert is_worse(document, margin=0.3) is None
    assert is_worse(document, margin=0.299)


@pytest.mark.parametrize(
    ("n", "images", "margin", "reason"),
    [
        pytest.param(2, 2, 0.02, "too few to tell", id="two answers"),
        pytest.param(90, 9, 0.9, "about 9 images, not 10", id="nine images"),
        pytest.param(100, 100, 0.02, "excludes no loss of up to 2.95 points", id="rule of three"),
        pytest.param(100, 100, 0.03, None, id="enough"),
    ],
)
def test_answers_that_never_differ_show_no_more_than_their_number_can(tmp_path, n, images, margin, reason):
    """Resampling gives [0, 0] for the difference of equal answers, however few they are."""
    questions = write(tmp_path / "q.jsonl", [closed_item(k, image_id=f"i{k % images}") for k in range(n)])
    run = write(tmp_path / "p.jsonl", answers("AB" * (n // 2)))

    document = compare_predictions(run, run, questions)
    found = is_worse(document, margin=margin)

    assert document["closed"]["difference_by_image"] == [0, 0]
    assert is_worse(document) is None
    assert (found is None) if reason is None else (reason in found and "too few to tell" in found)


def test_one_gain_is_no_proof_that_nothing_is_lost_and_many_are(tmp_path):
    questions = write(tmp_path / "q.jsonl", [closed_item(n, image_id=f"i{n}") for n in range(100)])
    before, one, many = (
        write(tmp_path / f"{right}.jsonl", answers("A" * right + "B" * (100 - right))) for right in (60, 61, 66)
    )

    assert "too few to tell" in is_worse(compare_predictions(before, one, questions), margin=0.02)
    assert is_worse(compare_predictions(before, many, questions), margin=0.02) is None


def test_a_loss_over_closed_and_open_questions_together_can_be_asked_for(tmp_path):
    """Four closed and four open answers lost: neither is significant alone, p = 0.125, but all eight are, 0.0078."""
    questions = write(tmp_path / "q.jsonl", [*(closed_item(n) for n in range(10)), *(open_item(n) for n in range(10))])
    runs, judged = [], []
    for name, lost in (("before", 0), ("after", 4)):
        lines = answers("B" * lost + "A" * (10 - lost)) + answers(["x"] * 10, start="o")
        runs.append(write(tmp_path / f"{name}.jsonl", lines))
        verdicts = ["incorrect"] * lost + ["correct"] * (10 - lost)
        judged.append(judge_all(tmp_path / f"{name}_verdicts.jsonl", questions, lines, verdicts))

    document = compare_predictions(*runs, questions, verdicts=tuple(judged))

    assert [is_worse(document, kind=kind) for kind in ("closed", "open")] == [None, None]
    assert "-40.00 points on 20 combined questions" in is_worse(document, kind="combined")


def test_every_protocol_is_scored_on_the_same_answers_and_their_agreement_told(tmp_path):
    outputs = ["A", "It lies in the mandible, so B is out and the answer is A.", "It is not A", "", "vitamin D"]
    questions = write(tmp_path / "q.jsonl", [closed_item(n) for n in range(5)])
    run = read_run(write(tmp_path / "p.jsonl", answers(outputs)), questions)

    closed = score_run(run)["closed"]

    agreement = closed["agreement"]
    assert agreement["protocols"] == list(closed["protocols"])
    assert closed["protocols"]["seed"] == closed["protocols"]["seed"] | {"n": 5, "accuracy": closed["accuracy"]}
    for row, column in itertools.product(range(len(agreement["share"])), repeat=2):
        assert agreement["share"][row][column] == agreement["share"][column][row]
        assert agreement["share"][row][row] == 1
    table = agreement["seed_by_strict"]
    assert np.sum(table["counts"]) == 5
    assert table["letters"][-1] is None
    # Rows are seed's letters: it reads A out of "It is not A", where strict reads none, and never the other way round.
    first, none = table["letters"].index("A"), table["letters"].index(None)
    assert (table["counts"][first][none], table["counts"][none][first]) == (1, 0)
    # The literal protocol reads a letter out of "It is not A" and "vitamin D", a careful one does not.
    assert closed["protocols"]["seed"]["correct"] == 3
    assert closed["protocols"]["strict"]["correct"] == 2
    assert closed["protocols"]["official"] == score_run(run)["closed"]["protocols"]["official"]
    assert closed["protocols"]["official"]["failed"] > 0  # a letter that was drawn was not read
