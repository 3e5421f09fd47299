"""A plan is locked before the answers, applied in decimals, and called pre-registered only where that is shown."""

import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
import yaml
from conftest import REPOSITORY

from dentalgemma.evaluation.decision import decide
from dentalgemma.evaluation.plan import PlanError, canonical, load_plan, open_plan, read_plan, write_plan

EXAMPLE = REPOSITORY / "examples" / "base_model_decision"
QUESTIONS = "a" * 64
PROMPT = "b" * 64


def make_plan(**changes):
    """A plan of one declared sub-score between two candidates, so that composites are what is declared."""
    declared = {"who": "a clinician", "rationale": "read 50 answers of each", "grades": {"one": 8.45, "two": 8.40}}
    return {
        "title": "Two models",
        "candidates": ["one", "two"],
        "questions_sha256": QUESTIONS,
        "sub_scores": {"reading": {"weight": 1, "declared": declared}},
        "tiebreakers": ["closed.accuracy"],
    } | changes


def make_scores(name, correct=40, *, first=None, n=100, **changes):
    low, high = correct / n - 0.1, correct / n + 0.1
    return {
        "format": "scores/1",
        "name": name,
        "model": name,
        "mode": "generate",
        "images": "true",
        "extraction": "seed/1",
        "questions_sha256": QUESTIONS,
        "answered": {"first": first, "last": first, "dated": n if first else 0},
        "closed": {"n": n, "correct": correct, "accuracy": correct / n, "interval_by_image": [low, high]},
        "open": None,
        "combined": None,
    } | changes


@pytest.fixture
def run(tmp_path):
    """Lock a plan and decide by it between made-up scores; answers have the times that they are given."""

    def run_(plan, documents, **options):
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
        lock = tmp_path / "plan.lock.json"
        if not lock.exists():
            write_plan(tmp_path / "plan.yaml", lock)
        paths = {document["name"]: tmp_path / f"{document['name']}.json" for document in documents}
        for document in documents:
            paths[document["name"]].write_text(json.dumps(document))
        return decide(lock, paths, out=tmp_path / "decision.json", **options)

    run_.lock = tmp_path / "plan.lock.json"
    run_.folder = tmp_path
    return run_


def later(hours=24):
    return (datetime.now(UTC) + timedelta(hours=hours)).isoformat()


def outcomes(decision, rule):
    return [own["outcome"] for own in decision["rules"] if own["rule"] == rule]


def test_the_worked_example_gives_the_published_totals_and_its_winner(tmp_path):
    write_plan(EXAMPLE / "plan.yaml", tmp_path / "plan.lock.json")
    scores = {path.stem: path for path in (EXAMPLE / "scores").glob("*.json")}
    published = [EXAMPLE / "comparisons.json"]
    decision = decide(tmp_path / "plan.lock.json", scores, out=tmp_path / "decision.json", comparisons=published)

    assert sorted(test["mcnemar_p"] for test in decision["tests"]) == ["0.000685", "1.41e-17", "7.93e-10"]
    assert decision["deviations"] == []
    assert decision["composites"] == {"gemma-4-31b-it": "8.45", "llama-3.2-11b-vision": "5.95", "qwen3-vl-8b": "6.85"}
    assert decision["order"] == ["gemma-4-31b-it", "qwen3-vl-8b", "llama-3.2-11b-vision"]
    assert decision["winner"] == "gemma-4-31b-it"
    assert "stays, by the documented alternative" in outcomes(decision, "veto: training_framework")[0]
    assert outcomes(decision, "overlap")[0].count("are different") == 3
    assert len(load_plan(EXAMPLE / "plan.yaml").considered) + len(scores) == 11

    text = (tmp_path / "decision.md").read_text()
    assert "3 of 11 candidates were compared" in text
    assert json.loads((tmp_path / "decision.json").read_text()) == decision


def test_the_worked_example_is_not_pre_registered_and_says_why(tmp_path):
    write_plan(EXAMPLE / "plan.yaml", tmp_path / "plan.lock.json")
    scores = {path.stem: path for path in (EXAMPLE / "scores").glob("*.json")}
    decision = decide(tmp_path / "plan.lock.json", scores, out=tmp_path / "decision.json")

    assert decision["pre_registered"] is False
    assert "of the 1069 answers of gemma-4-31b-it 0 are dated" in decision["reasons"]
    assert "registered" not in (tmp_path / "decision.md").read_text()


def test_the_examples_scores_are_the_published_counts():
    documents = [json.loads(path.read_text()) for path in (EXAMPLE / "scores").glob("*.json")]
    combined = sorted(round(100 * own["combined"]["correct"] / own["combined"]["n"], 2) for own in documents)

    assert combined == [11.23, 18.15, 27.60]
    assert {(own["closed"]["n"], own["open"]["n"]) for own in documents} == {(491, 578)}
    assert all("published" in own for own in documents)


def test_a_lead_of_exactly_the_threshold_is_no_tie(run):
    """In floats 8.45 - 8.40 is below 0.05."""
    assert 8.45 - 8.40 < 0.05
    decision = run(make_plan(), [make_scores("one", 20), make_scores("two", 60)])

    assert outcomes(decision, "tie") == ["no tie; one leads"]
    assert decision["winner"] == "one"


def test_a_lead_below_the_threshold_is_a_tie_that_the_tiebreakers_decide_in_their_order(run):
    plan = make_plan(tiebreakers=["reading_depth", "closed.accuracy"])
    grades = {"reading": {"one": 8.45, "two": 8.41}, "reading_depth": {"one": 8.45, "two": 8.45}}
    plan["sub_scores"] = {
        name: {"weight": "0.5", "declared": {"who": "x", "rationale": "y", "grades": own}}
        for name, own in grades.items()
    }
    decision = run(plan, [make_scores("one", 20), make_scores("two", 60)])

    assert decision["composites"] == {"one": "8.45", "two": "8.43"}
    assert outcomes(decision, "tiebreaker") == ["still tied: one, two", "two leads"]
    assert decision["order"] == ["two", "one"]


def test_what_the_tiebreakers_cannot_tell_apart_stays_undecided(run):
    plan = make_plan(tie_below="0.06")
    decision = run(plan, [make_scores("one", 40), make_scores("two", 40)])

    assert decision["winner"] is None
    assert "nobody is chosen" in outcomes(decision, "outcome")[0]


@pytest.mark.parametrize(
    ("unless", "winner"), [(None, "two"), ("move all stages to another framework", "one")], ids=["none", "documented"]
)
def test_a_vetoed_winner_falls_to_the_next_unless_an_alternative_is_in_the_plan(run, unless, winner):
    veto = {"framework": {"criterion": "it cannot be trained", "names": ["one"], "unless": unless}}
    decision = run(make_plan(veto=veto), [make_scores("one"), make_scores("two")])

    assert decision["winner"] == winner
    assert decision["order"][0] == winner


def test_when_a_veto_stops_everybody_nobody_is_chosen(run):
    veto = {"framework": {"criterion": "it cannot be trained", "names": ["one", "two"]}}
    decision = run(make_plan(veto=veto), [make_scores("one"), make_scores("two")])

    assert decision["winner"] is None
    assert decision["rules"][-1]["outcome"] == "nobody is chosen: a veto stops every candidate"


@pytest.mark.parametrize(("otherwise", "winner"), [("report", "one"), ("tie", "two")])
def test_candidates_whose_intervals_overlap_are_tied_only_where_the_plan_says_so(run, otherwise, winner):
    grades = {"one": 9, "two": 5}
    plan = make_plan(when_not_different=otherwise)
    plan["sub_scores"]["reading"]["declared"]["grades"] = grades
    decision = run(plan, [make_scores("one", 40), make_scores("two", 45)])

    assert outcomes(decision, "overlap") == ["one and two are not different (the intervals overlap)"]
    assert decision["winner"] == winner


def test_intervals_that_touch_overlap(run):
    one, two = make_scores("one"), make_scores("two")
    one["closed"]["interval_by_image"], two["closed"]["interval_by_image"] = [0.3, 0.4], [0.4, 0.5]

    assert "not different" in outcomes(run(make_plan(), [one, two]), "overlap")[0]


@pytest.mark.parametrize(
    ("mapping", "correct", "score"),
    [
        pytest.param({"linear": {"from": [0.25, 1], "to": [0, 10]}}, 40, "2.00", id="on the line"),
        pytest.param({"linear": {"from": [0.25, 1], "to": [0, 10]}}, 10, "0.00", id="clamped below"),
        pytest.param({"linear": {"from": [0.5, 0.1], "to": [0, 10]}}, 20, "7.50", id="a line may fall"),
        pytest.param({"steps": [[0.40, 9], [0.25, 6]]}, 40, "9.00", id="a threshold is reached by its own value"),
        pytest.param({"steps": [[0.40, 9], [0.25, 6]]}, 39, "6.00", id="below a threshold"),
        pytest.param({"steps": [[0.40, 9], [0.25, 6]]}, 24, "0.00", id="below the last"),
        pytest.param({"steps": [[0.40, 6.125]]}, 40, "6.12", id="halves are rounded to even"),
    ],
)
def test_a_number_becomes_a_score(run, mapping, correct, score):
    plan = make_plan(sub_scores={"closed": {"weight": 1, "from": "closed.accuracy", **mapping}})
    decision = run(plan, [make_scores("one", correct), make_scores("two", 1)])

    assert decision["composites"]["one"] == score


def test_a_decision_is_pre_registered_when_the_plan_is_older_than_every_answer(run):
    decision = run(make_plan(), [make_scores("one", first=later()), make_scores("two", first=later())])

    assert (decision["pre_registered"], decision["reasons"]) == (True, [])
    assert "The decision is pre-registered" in (run.folder / "decision.md").read_text()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param({"first": later(-1)}, "is not after the lock", id="answered before"),
        pytest.param({"first": "2099-01-01T00:00:00"}, "has no time zone", id="no time zone"),
        pytest.param({"answered": {"first": later(), "dated": 99}}, "of the 100 answers of one 99 are", id="undated"),
        pytest.param({"open": {"n": 5, "judge": {}}}, "of the 105 answers of one 100 are", id="open answers undated"),
    ],
)
def test_it_is_not_where_the_times_do_not_allow_it(run, changes, reason):
    one = make_scores("one", **{"first": later(), **changes})
    decision = run(make_plan(), [one, make_scores("two", first=later())])

    assert not decision["pre_registered"]
    assert reason in " ".join(decision["reasons"])
    assert "registered" not in (run.folder / "decision.md").read_text()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param({"questions_sha256": "c" * 64}, "scored on other questions", id="questions"),
        pytest.param({"extraction": "strict/1"}, "with the extraction strict/1, not seed/1", id="extraction"),
    ],
)
def test_it_is_not_where_the_scores_are_not_what_was_planned(run, changes, reason):
    documents = [make_scores(name, first=later(), **changes) for name in ("one", "two")]
    decision = run(make_plan(), documents)

    assert not decision["pre_registered"]
    assert reason in " ".join(decision["reasons"])


def test_it_is_not_where_open_answers_count_and_another_prompt_judged_them(run):
    plan = make_plan(tiebreakers=["open.accuracy"], judge_prompt_sha256=PROMPT)
    own = {"n": 10, "accuracy": 0.5}
    answered = {"first": later(), "dated": 110}
    right = make_scores("one", answered=answered, open={**own, "judge": {"prompt_sha256": PROMPT}})
    wrong = make_scores("two", answered=answered, open={**own, "judge": {"prompt_sha256": "c" * 64}})
    decision = run(plan, [right, wrong])

    assert len(decision["reasons"]) == 1
    assert decision["reasons"][0].startswith("the open answers of two were not judged with the prompt")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(lambda lock: lock["plan"].update(tie_below="0.5"), "the plan's tie_below changed", id="a rule"),
        pytest.param(
            lambda lock: lock["plan"]["sub_scores"]["reading"]["declared"]["grades"].update(one="9"),
            "the plan's sub_scores changed",
            id="a grade",
        ),
        pytest.param(lambda lock: lock.update(locked_at="2001-01-01T00:00:00+00:00"), "locked_at", id="its time"),
    ],
)
def test_a_changed_lock_is_found_and_named(run, change, words):
    documents = [make_scores("one", first=later()), make_scores("two", first=later())]
    assert run(make_plan(), documents)["pre_registered"]
    lock = json.loads(run.lock.read_text())
    change(lock)
    run.lock.write_text(json.dumps(lock))

    with pytest.raises(PlanError, match=words):
        read_plan(run.lock)
    decision = run(make_plan(), documents)
    assert not decision["pre_registered"]
    assert words in decision["reasons"][0]


def test_a_plan_that_was_never_locked_decides_and_claims_nothing(tmp_path, run):
    run(make_plan(), [make_scores("one"), make_scores("two")])
    paths = {name: tmp_path / f"{name}.json" for name in ("one", "two")}
    decision = decide(tmp_path / "plan.yaml", paths, out=tmp_path / "decision.json")

    assert decision["winner"] == "one"
    assert "the plan was never locked" in decision["reasons"]


def test_a_lock_is_never_written_over(tmp_path):
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(make_plan()))
    write_plan(tmp_path / "plan.yaml", tmp_path / "lock.json")
    content = (tmp_path / "lock.json").read_bytes()

    with pytest.raises(PlanError, match="a lock is not written over"):
        write_plan(tmp_path / "plan.yaml", tmp_path / "lock.json")
    assert (tmp_path / "lock.json").read_bytes() == content


def test_a_lock_holds_no_float_and_its_hash_can_be_recomputed_by_anyone(tmp_path):
    import hashlib

    lock = write_plan(EXAMPLE / "plan.yaml", tmp_path / "lock.json")
    written = json.loads((tmp_path / "lock.json").read_text(), parse_float=pytest.fail)
    signed = {key: written[key] for key in ("format", "locked_at", "plan")}
    text = json.dumps(signed, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    assert hashlib.sha256(text.encode()).hexdigest() == written["plan_sha256"] == lock["plan_sha256"]
    assert written["plan"]["sub_scores"]["closed_accuracy"]["weight"] == "0.4"
    assert datetime.fromisoformat(written["locked_at"]).utcoffset() == timedelta(0)
    assert open_plan(tmp_path / "lock.json").plan == load_plan(EXAMPLE / "plan.yaml")


def test_the_canonical_form_does_not_depend_on_the_order_of_keys():
    assert canonical({"b": 1, "a": {"ü": "0.4"}}) == '{"a":{"ü":"0.4"},"b":1}'


def test_numbers_are_taken_as_they_are_written(tmp_path):
    """In floats these weights do not sum to 1."""
    shares = {"a": 0.7, "b": 0.2, "c": 0.1}
    assert 0.7 + 0.2 + 0.1 != 1
    declared = {"who": "x", "rationale": "y"}
    plan = make_plan(sub_scores={name: {"weight": own, "declared": declared} for name, own in shares.items()})
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))

    assert sum(own.weight for own in load_plan(tmp_path / "plan.yaml").sub_scores.values()) == Decimal(1)


def test_the_questions_of_a_plan_are_named_by_their_content(tmp_path):
    question = {"item_id": "1", "question": "Caries?", "options": {"A": "yes", "B": "no"}, "answer": "A"}
    (tmp_path / "q.jsonl").write_text(json.dumps(question) + "\n")
    plan = make_plan(questions="q.jsonl")
    del plan["questions_sha256"]
    hashes = []
    for answer in "AB":
        (tmp_path / "q.jsonl").write_text(json.dumps(question | {"answer": answer}) + "\n")
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
        hashes.append(load_plan(tmp_path / "plan.yaml").questions_sha256)

    assert len(set(hashes)) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"wieghts": {}}, "wieghts: Extra inputs", id="misspelt key"),
        pytest.param({"title": "A pre-registered choice"}, "found out by `decide`, and not claimed", id="claim"),
        pytest.param({"candidates": ["one", "one"]}, "a candidate comes twice", id="candidate twice"),
        pytest.param({"tiebreakers": ["size"]}, "'size' is neither a sub-score nor a place", id="tiebreaker"),
        pytest.param({"veto": {"x": {"criterion": "c", "names": ["three"]}}}, "three is no candidate", id="veto"),
        pytest.param({"considered": {"one": "too large"}}, "one is a candidate and cannot", id="considered"),
        pytest.param({"tie_below": float("nan")}, "tie_below: expected a finite number", id="nan"),
    ],
)
def test_a_plan_that_cannot_hold_is_refused_with_its_key(tmp_path, changes, message):
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(make_plan(**changes)))

    with pytest.raises(PlanError, match=message):
        load_plan(tmp_path / "plan.yaml")


@pytest.mark.parametrize(
    ("sub_score", "message"),
    [
        pytest.param({"weight": 0.9}, "the weights sum to 0.9, they must sum to exactly 1", id="weights"),
        pytest.param({"from": "closed.accuracy"}, "either `from`", id="two sources"),
        pytest.param({"declared": None}, "either `from`", id="no source"),
        pytest.param(
            {"declared": {"who": "x", "rationale": "y", "grades": {"one": 8}}}, "two has no grade", id="no grade"
        ),
        pytest.param(
            {"declared": {"who": "x", "rationale": "y", "grades": {"one": 8, "two": 11}}},
            "11: a score lies between 0 and 10",
            id="beyond the scale",
        ),
        pytest.param(
            {"declared": None, "from": "accuracy", "steps": [[0, 1]]},
            "begins with one of closed, open",
            id="no place in a scores document",
        ),
        pytest.param(
            {"declared": None, "from": "closed.accuracy", "steps": [[0.2, 1], [0.4, 2]]},
            "the thresholds must descend",
            id="ascending steps",
        ),
        pytest.param(
            {"declared": None, "from": "closed.accuracy", "linear": {"from": [1, 1], "to": [0, 10]}},
            "gives no line",
            id="no line",
        ),
    ],
)
def test_a_sub_score_that_cannot_hold_is_refused(tmp_path, sub_score, message):
    plan = make_plan()
    plan["sub_scores"]["reading"] |= sub_score
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))

    with pytest.raises(PlanError, match=message):
        load_plan(tmp_path / "plan.yaml")


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        pytest.param([make_scores("one")], "there are no scores of two", id="missing"),
        pytest.param([make_scores(name) for name in ("one", "two", "six")], "six is no candidate", id="extra"),
        pytest.param(
            [make_scores("one"), make_scores("two", mode="loglikelihood")], "their mode differs", id="two modes"
        ),
        pytest.param(
            [make_scores("one"), make_scores("two", questions_sha256="c" * 64)],
            "their questions_sha256 differs",
            id="other questions",
        ),
        pytest.param([make_scores("one"), make_scores("two") | {"format": "x"}], "no scores document", id="format"),
    ],
)
def test_scores_that_do_not_fit_the_plan_are_refused(run, documents, message):
    with pytest.raises(PlanError, match=message):
        run(make_plan(), documents)


def test_a_number_that_is_missing_is_refused_by_name(run):
    plan = make_plan(tiebreakers=["open.accuracy"], tie_below=1)

    with pytest.raises(PlanError, match=r"the scores of one have no number at open\.accuracy"):
        run(plan, [make_scores("one"), make_scores("two")])


def test_grades_and_vetoes_may_come_later_and_the_decision_says_so(run):
    plan = make_plan(veto={"framework": {"criterion": "it cannot be trained"}})
    del plan["sub_scores"]["reading"]["declared"]["grades"]
    documents = [make_scores("one", first=later()), make_scores("two", first=later())]
    with pytest.raises(PlanError, match="give them in a file with --declared"):
        run(plan, documents)

    late = {"who": "a clinician", "rationale": "read the answers", "grades": {"one": 9, "two": 2}}
    path = run.folder / "late.yaml"
    path.write_text(yaml.safe_dump({"sub_scores": {"reading": late}, "veto": {"framework": ["one"]}}))
    decision = run(plan, documents, declared=path)

    assert decision["winner"] == "two"
    assert not decision["pre_registered"]
    assert decision["reasons"] == [
        "the grades of reading were given after the lock",
        "who breaks the criterion framework was named after the lock",
    ]
    assert len(decision["deviations"]) >= 2


def test_locked_grades_are_not_graded_again(run):
    path = run.folder / "late.yaml"
    own = {"who": "x", "rationale": "y", "grades": {"one": 1, "two": 9}}
    path.write_text(yaml.safe_dump({"sub_scores": {"reading": own}}))

    with pytest.raises(PlanError, match="the plan leaves no grades of that name open"):
        run(make_plan(), [make_scores("one"), make_scores("two")], declared=path)


@pytest.mark.parametrize(("strict", "changes"), [(10, True), (50, False)], ids=["changes", "stays"])
def test_it_says_whether_the_strict_reading_would_change_the_decision(run, strict, changes):
    plan = make_plan(sub_scores={"closed": {"weight": 1, "from": "closed.accuracy", "steps": [[0.4, 9], [0.2, 4]]}})
    documents = [make_scores("one", 40), make_scores("two", 30)]
    for document, correct in zip(documents, (strict, 30), strict=True):
        document["closed"]["protocols"] = {"strict": {"n": 100, "correct": correct, "accuracy": correct / 100}}
    decision = run(plan, documents)

    assert decision["winner"] == "one"
    assert decision["under_strict"]["changes"] is changes
    assert decision["under_strict"]["winner"] == ("two" if changes else "one")


def test_the_planned_paired_test_is_shown_or_its_absence_is(run):
    documents = [make_scores("one"), make_scores("two")]
    assert "no paired test" in run(make_plan(), documents)["deviations"][0]

    pair = {"only_a": 44, "only_b": 83, "mcnemar_p": 0.0006846086250425259}  # LLaMA 3.2 against Qwen3-VL, published
    comparison = {"format": "comparison/1", "a": {"name": "one"}, "b": {"name": "two"}, "closed": pair}
    (run.folder / "c.json").write_text(json.dumps(comparison | {"questions_sha256": QUESTIONS}))
    decision = run(make_plan(), documents, comparisons=[run.folder / "c.json"])

    assert decision["deviations"] == []
    assert decision["tests"][0]["holm_p"] == "0.000685"
    assert decision["tests"][0]["significant"] is True


def test_markup_in_a_plan_stays_text(run):
    plan = make_plan(title="<script>alert(1)</script> [x](javascript:1) | y")
    run(plan, [make_scores("one"), make_scores("two")])
    text = (run.folder / "decision.md").read_text()

    assert "<script>" not in text.replace("\\<", "")
    assert "[x](" not in text


def test_scores_of_real_answers_carry_all_that_a_pre_registration_needs(tmp_path):
    """From predictions to the decision, with nothing typed in between."""
    from dentalgemma.evaluation.runs import read_run
    from dentalgemma.evaluation.scoring import compare_all, score_run

    items = [
        {
            "item_id": str(n),
            "question": "Caries?",
            "options": {"A": "yes", "B": "no"},
            "answer": "A",
            "image_id": str(n),
        }
        for n in range(40)
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    plan = make_plan(questions="q.jsonl", sub_scores={})
    del plan["questions_sha256"]
    mapping = {"from": "closed.accuracy", "linear": {"from": [0, 1], "to": [0, 10]}}
    plan["sub_scores"] = {"closed": {"weight": 1, **mapping}}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    write_plan(tmp_path / "plan.yaml", tmp_path / "lock.json")

    runs = []
    for name, right in (("one", 36), ("two", 14)):
        lines = [
            {"item_id": str(n), "output": "A" if n < right else "Answer: B", "mode": "generate", "images": "true"}
            | {"answered_at": later()}
            for n in range(40)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        runs.append(read_run(tmp_path / f"{name}.jsonl", tmp_path / "q.jsonl", name=name))
        (tmp_path / f"{name}.json").write_text(json.dumps(score_run(runs[-1], draws=100)))
    (tmp_path / "compared.json").write_text(json.dumps(compare_all(runs, draws=100)))
    paths = {name: tmp_path / f"{name}.json" for name in ("one", "two")}
    decision = decide(tmp_path / "lock.json", paths, out=tmp_path / "d.json", comparisons=[tmp_path / "compared.json"])

    assert (decision["pre_registered"], decision["reasons"], decision["deviations"]) == (True, [], [])
    assert decision["composites"] == {"one": "9.00", "two": "3.50"}
    assert outcomes(decision, "overlap") == ["one and two are different"]
    assert decision["tests"][0]["only_a"] == 22
    assert decision["under_strict"]["changes"] is False
