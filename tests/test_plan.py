"""A plan is locked before the answers, applied in decimals, and called pre-registered only where that is shown."""

import hashlib
import json
import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal, localcontext
from itertools import combinations

import pytest
import yaml
from conftest import REPOSITORY

from dentalgemma.evaluation.decision import decide, read_strictly
from dentalgemma.evaluation.places import SECTIONS, check_place
from dentalgemma.evaluation.plan import PlanError, canonical, hash_canonical, load_plan, open_plan, write_plan

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
        "predictions_sha256": hashlib.sha256(name.encode()).hexdigest(),
        "bootstrap": {"draws": 1000, "seed": 0},
        "answered": {"first": first, "last": first, "dated": n if first else 0},
        "closed": {"n": n, "correct": correct, "accuracy": correct / n, "interval_by_image": [low, high]},
        "open": None,
        "combined": None,
    } | changes


def make_comparison(one, other, **changes):
    """The paired test of two scores documents: 44 and 83 answers that only one has right, as published."""
    sides = {
        side: {key: own.get(key) for key in ("name", "predictions_sha256", "verdicts_sha256")}
        for side, own in zip("ab", (one, other), strict=True)
    }
    pair = {"only_a": 44, "only_b": 83, "mcnemar_p": 0.0006846086250425259}
    shared = {key: one[key] for key in ("questions_sha256", "extraction")}
    return {"format": "comparison/1", **sides, **shared, "closed": pair, "open": pair, "combined": pair} | changes


@pytest.fixture
def run(tmp_path):
    """Lock a plan, as of an hour ago, and decide by it between made-up scores, with their paired tests."""

    def run_(plan, documents, *, compared=None, **options):
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
        lock = tmp_path / "plan.lock.json"
        if not lock.exists():
            write_plan(tmp_path / "plan.yaml", lock)
            backdate(lock)
        paths = {document["name"]: tmp_path / f"{document['name']}.json" for document in documents}
        for document in documents:
            paths[document["name"]].write_text(json.dumps(document))
        if compared is None:
            compared = [make_comparison(*pair) for pair in combinations(documents, 2)]
        (tmp_path / "c.json").write_text(json.dumps({"format": "comparisons/1", "pairs": compared}))
        return decide(lock, paths, out=tmp_path / "decision.json", comparisons=[tmp_path / "c.json"], **options)

    run_.lock = tmp_path / "plan.lock.json"
    run_.folder = tmp_path
    return run_


LOCKED = (datetime.now(UTC) - timedelta(hours=1)).isoformat(timespec="microseconds")


def backdate(lock):
    """Give a lock the time of an hour ago, with the hash to it, so that answers come after it and before now."""
    document = json.loads(lock.read_text()) | {"locked_at": LOCKED}
    document["plan_sha256"] = hash_canonical({key: document[key] for key in ("format", "locked_at", "plan")})
    lock.write_text(json.dumps(document))


def ago(minutes):
    return (datetime.now(UTC) - timedelta(minutes=minutes)).isoformat()


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
    decision = run(make_plan(), [make_scores("one", first=ago(30)), make_scores("two", first=ago(30))])

    assert (decision["pre_registered"], decision["reasons"]) == (True, [])
    assert "The decision is pre-registered" in (run.folder / "decision.md").read_text()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param({"first": ago(24 * 60)}, "is not after the lock", id="answered before"),
        pytest.param({"first": "2020-01-01T00:00:00"}, "has no time zone", id="no time zone"),
        pytest.param({"answered": {"dated": 99}}, "of the 100 answers of one 99 are", id="undated"),
        pytest.param({"open": {"n": 5, "judge": {}}}, "of the 105 answers of one 100 are", id="open answers undated"),
    ],
)
def test_it_is_not_where_the_times_do_not_allow_it(run, changes, reason):
    one = make_scores("one", **{"first": ago(30), **changes})
    decision = run(make_plan(), [one, make_scores("two", first=ago(30))])

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
    documents = [make_scores(name, first=ago(30), **changes) for name in ("one", "two")]
    decision = run(make_plan(), documents)

    assert not decision["pre_registered"]
    assert reason in " ".join(decision["reasons"])


def test_it_is_not_where_open_answers_count_and_another_prompt_judged_them(run):
    plan = make_plan(tiebreakers=["open.accuracy"], judge_prompt_sha256=PROMPT)
    own = {"n": 10, "accuracy": 0.5, "complete": True}
    judge = {"model": "judge", "api": "openai", "prompt_sha256": PROMPT}
    answered = {"first": ago(30), "last": ago(29), "dated": 110}
    judged = {"answered": answered, "verdicts_sha256": "d" * 64}
    right = make_scores("one", **judged, open={**own, "judge": judge})
    wrong = make_scores("two", **judged, open={**own, "judge": judge | {"prompt_sha256": "c" * 64}})
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
    documents = [make_scores("one", first=ago(30)), make_scores("two", first=ago(30))]
    assert run(make_plan(), documents)["pre_registered"]
    lock = json.loads(run.lock.read_text())
    change(lock)
    run.lock.write_text(json.dumps(lock))

    assert words in open_plan(run.lock).changed
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
        pytest.param({"tiebreakers": ["closed"]}, "begins with one of closed, .* and a dot", id="a whole section"),
        pytest.param({"tiebreakers": ["closed.acuracy"]}, "no 'acuracy' in a scores document", id="misspelt place"),
        pytest.param({"tiebreakers": ["closed.bounds"]}, "'closed.bounds' is several things", id="several"),
        pytest.param({"tiebreakers": ["closed.wilson"]}, "is an interval, and a number is needed", id="interval"),
        pytest.param({"different_in": "closed.accuracy"}, "is a number, and an interval is needed", id="no interval"),
        pytest.param(
            {"tiebreakers": [{"path": "reading", "lower_is_better": True}]}, "the higher one is better", id="direction"
        ),
        pytest.param({"mode": "loglikelihood"}, "write `extraction: null`", id="nothing to extract"),
        pytest.param({"images": "black"}, "images: Input should be 'true'", id="images"),
        pytest.param({"veto": {"x": {"criterion": "c", "names": ["three"]}}}, "three is no candidate", id="veto"),
        pytest.param({"considered": {"one": "too large"}}, "one is a candidate and cannot", id="considered"),
        pytest.param({"tie_below": float("nan")}, "tie_below: expected a finite number", id="nan"),
        pytest.param({"tie_below": "1e99999999"}, "tie_below: expected at most 12 digits", id="200 MB of digits"),
        pytest.param({"rounding": {"quantum": "1e-60"}}, "rounding.quantum: expected at most 12", id="tiny quantum"),
        pytest.param({"rounding": {"quantum": 100}}, "rounding.quantum: .* less than or equal to 1", id="quantum 100"),
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
        pytest.param({"weight": "0.999999999999"}, "the weights sum to 0.999999999999, they must", id="nearly 1"),
        pytest.param(
            {"weight": f"0.{'9' * 40}"}, "weight: expected at most 12 digits before the point and after it", id="long"
        ),
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
            {"declared": None, "from": "closed.accuracy", "steps": [[0.4, 9], [0.4, 2]]},
            "the thresholds must descend",
            id="equal steps",
        ),
        pytest.param(
            {"declared": None, "from": "clinical.findings.caries.sensitvity", "steps": [[0, 1]]},
            "no 'sensitvity' in a scores document; there is .*sensitivity",
            id="misspelt figure",
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
    documents = [make_scores("one", first=ago(30)), make_scores("two", first=ago(30))]
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


def test_the_planned_paired_test_is_shown_or_its_absence_stands_against_the_claim(run):
    documents = [make_scores(name, first=ago(30)) for name in ("one", "two")]
    without = run(make_plan(), documents, compared=[])
    assert without["pre_registered"] is False
    assert "no paired test" in without["deviations"][0]
    assert without["reasons"] == without["deviations"]

    decision = run(make_plan(), documents)
    assert decision["deviations"] == []
    assert decision["tests"][0]["holm_p"] == "0.000685"  # LLaMA 3.2 against Qwen3-VL, published
    assert decision["tests"][0]["significant"] is True


def test_a_sum_of_weights_is_exact_whatever_the_callers_decimals(tmp_path):
    plan = make_plan()
    shares = {"a": "0.5", "b": "0.500000000001"}
    declared = {"who": "x", "rationale": "y"}
    plan["sub_scores"] = {name: {"weight": share, "declared": declared} for name, share in shares.items()}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))

    with localcontext(prec=6), pytest.raises(PlanError, match=r"the weights sum to 1\.000000000001"):
        load_plan(tmp_path / "plan.yaml")


def test_the_finest_quantum_decides(run):
    mapping = {"from": "closed.accuracy", "linear": {"from": [0, 3], "to": [0, 10]}}
    plan = make_plan(rounding={"quantum": "1e-12"}, sub_scores={"closed": {"weight": 1, **mapping}})

    assert run(plan, [make_scores("one"), make_scores("two", 20)])["composites"]["one"] == "1.333333333333"


def test_measured_numbers_are_shown_short_and_kept_whole(run):
    """0.2851323828920570 is 140 of 491 as a float; the step decides by all of its digits."""
    plan = make_plan(tiebreakers=["closed.accuracy"], tie_below=10)
    plan["sub_scores"] = {"closed": {"weight": 1, "from": "closed.accuracy", "steps": [[0.2851, 9]]}}
    decision = run(plan, [make_scores("one", 140, n=491), make_scores("two", 139, n=491)], compared=[])
    text = (run.folder / "decision.md").read_text()

    first, overlap, tiebreaker = (
        next(own for own in decision["rules"] if own["rule"] == name)
        for name in ("sub-scores", "overlap", "tiebreaker")
    )
    assert first["input"]["closed"]["values"] == {"one": "0.2851", "two": "0.2831"}
    assert first["exact"]["closed"]["one"] == repr(140 / 491)
    assert overlap["input"]["one"] == "0.1851 to 0.3851"
    assert overlap["exact"]["one"] == [repr(140 / 491 - 0.1), repr(140 / 491 + 0.1)]
    assert tiebreaker["input"]["one"] == "0.2851" and tiebreaker["exact"]["one"] == repr(140 / 491)
    assert not re.search(r"\d\.\d{5}", text)
    assert "`exact` in the JSON file" in text


def test_a_score_that_nobody_can_have_measured_is_refused(run):
    one = make_scores("one")
    plan = make_plan(tiebreakers=["closed.accuracy"], tie_below=10)
    run(plan, [one, make_scores("two")])
    path = run.folder / "one.json"
    path.write_text(path.read_text().replace('"accuracy": 0.4', '"accuracy": 1e99999999'))
    paths = {name: run.folder / f"{name}.json" for name in ("one", "two")}

    with pytest.raises(PlanError, match=r"the scores of one have 1\.000e\+99999999 at closed\.accuracy"):
        decide(run.lock, paths, out=run.folder / "d.json")


@pytest.mark.parametrize("content", ["[" * 100_000, '{"format": ' + "9" * 5_000 + "}"], ids=["brackets", "digits"])
def test_a_lock_that_is_no_json_is_refused(content, tmp_path):
    (tmp_path / "lock.json").write_text(content)

    with pytest.raises(PlanError, match=r"lock\.json: not valid JSON"):
        open_plan(tmp_path / "lock.json")


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
    plan = make_plan(questions="q.jsonl", sub_scores={}, bootstrap={"draws": 100})
    del plan["questions_sha256"]
    mapping = {"from": "closed.accuracy", "linear": {"from": [0, 1], "to": [0, 10]}}
    plan["sub_scores"] = {"closed": {"weight": 1, **mapping}}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    write_plan(tmp_path / "plan.yaml", tmp_path / "lock.json")
    backdate(tmp_path / "lock.json")

    runs = []
    for name, right in (("one", 36), ("two", 14)):
        lines = [
            {"item_id": str(n), "output": "A" if n < right else "Answer: B", "mode": "generate", "images": "true"}
            | {"answered_at": ago(30)}
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


HOLDS = [make_scores(name, first=ago(30)) for name in ("one", "two")]


def test_what_follows_starts_from_a_decision_that_is_pre_registered(run):
    assert run(make_plan(), HOLDS)["pre_registered"]


def test_the_scores_of_another_candidate_are_refused(run):
    """Both are candidates, and both files are there: `--scores one=two.json --scores two=one.json`."""
    run(make_plan(), HOLDS)
    swapped = {"one": run.folder / "two.json", "two": run.folder / "one.json"}

    with pytest.raises(PlanError, match=r"two\.json: these are the scores of two, and were given as those of one"):
        decide(run.lock, swapped, out=run.folder / "d.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"predictions_sha256": "e" * 64}, "the scores of the same answers", id="the same answers"),
        pytest.param({"weights": "f" * 16, "model": "m"}, "one model twice", id="the same weights"),
    ],
)
def test_one_model_cannot_stand_for_two_candidates(run, changes, message):
    with pytest.raises(PlanError, match=message):
        run(make_plan(), [own | changes for own in HOLDS])


def test_the_same_model_asked_in_two_ways_is_two_candidates(run):
    documents = [
        own | {"weights": "f" * 16, "model": "m", "system_prompt": prompt}
        for own, prompt in zip(HOLDS, ("", "You are a dentist."), strict=True)
    ]

    assert run(make_plan(), documents)["pre_registered"]


@pytest.mark.parametrize(("key", "value"), [("model", "another"), ("weights", "0" * 16)])
def test_a_candidate_is_the_model_that_the_plan_says(run, key, value):
    plan = make_plan(candidates={"one": {"note": "ours", "model": "one", "weights": "1" * 16}, "two": "theirs"})
    one = HOLDS[0] | {"weights": "1" * 16}
    assert run(plan, [one, HOLDS[1]])["pre_registered"]

    with pytest.raises(PlanError, match=f"the {key} of one is .* in the plan, and {value} here"):
        run(plan, [one | {key: value}, HOLDS[1]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"questions_sha256": "c" * 64}, "answers to other questions", id="questions"),
        pytest.param({"extraction": "strict/1"}, "with the extraction strict/1, and the scores have", id="extraction"),
        pytest.param({"b": {"name": "two", "predictions_sha256": "c" * 64}}, "other answers of two", id="answers"),
        pytest.param({"b": {"name": "two"}}, "other answers of two", id="answers not named"),
    ],
)
def test_a_paired_test_of_something_else_than_the_scores_is_refused(run, changes, message):
    with pytest.raises(PlanError, match=message):
        run(make_plan(), HOLDS, compared=[make_comparison(*HOLDS, **changes)])


def test_a_paired_test_of_other_verdicts_is_refused_where_verdicts_are_tested(run):
    plan = make_plan(tests={"of": "open"})
    documents = [own | {"verdicts_sha256": "d" * 64} for own in HOLDS]
    other = make_comparison(*(own | {"verdicts_sha256": "c" * 64} for own in documents))

    with pytest.raises(PlanError, match="other verdicts of one"):
        run(plan, documents, compared=[other])


def test_scores_that_do_not_say_of_which_answers_they_are_cannot_be_tied_to_tests(run):
    decision = run(make_plan(), [own | {"predictions_sha256": None} for own in HOLDS])

    assert decision["reasons"] == [
        f"the scores of {name} do not say of which answers they are (predictions_sha256)" for name in ("one", "two")
    ]


JUDGED = {
    "answered": {"first": ago(30), "last": ago(29), "dated": 110},
    "verdicts_sha256": "d" * 64,
    "open": {
        "n": 10,
        "accuracy": 0.5,
        "complete": True,
        "judge": {"model": "judge-1", "api": "openai", "prompt_sha256": PROMPT},
    },
}


@pytest.mark.parametrize(
    ("open_", "reason"),
    [
        pytest.param({}, None, id="as planned"),
        pytest.param(
            {"complete": False},
            "the scores of two say that not all of its open answers have a verdict",
            id="verdicts left out",
        ),
        pytest.param(
            {"complete": None},
            "the scores of two do not say that all of its open answers have a verdict",
            id="not known",
        ),
        pytest.param(
            {"judge": {"model": "judge-2"}},
            "the judge's model is not known to be the same for all candidates",
            id="two judges",
        ),
        pytest.param(
            {"judge": {"api": "anthropic"}},
            "the judge's api is not known to be the same for all candidates",
            id="two interfaces",
        ),
    ],
)
@pytest.mark.parametrize("used", ["sub-score", "test"])
def test_verdicts_are_all_there_and_by_one_judge(run, open_, reason, used):
    plan = make_plan(judge_prompt_sha256=PROMPT)
    if used == "test":
        plan["tests"] = {"of": "combined"}
    else:
        mapping = {"weight": 1, "from": "open.accuracy", "linear": {"from": [0, 1], "to": [0, 10]}}
        plan["sub_scores"] = {"open": mapping}
    judged = [own | JUDGED for own in HOLDS]
    judge = JUDGED["open"]["judge"] | open_.get("judge", {})
    judged[1] = judged[1] | {"open": JUDGED["open"] | open_ | {"judge": judge}}

    assert run(plan, judged)["reasons"] == ([reason] if reason else [])


def test_the_judge_is_the_one_that_the_plan_names(run):
    plan = make_plan(judge_prompt_sha256=PROMPT, judge_model="judge-2", tests={"of": "open"})
    reasons = run(plan, [own | JUDGED for own in HOLDS])["reasons"]

    assert reasons == [
        f"the open answers of {name} were not judged by the model that the plan names (judge_model)"
        for name in ("one", "two")
    ]


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("bootstrap", {"draws": 1000, "seed": 7}, 'the bootstrap {"draws":1000,"seed":7}, not {"draws":1000,"seed":0}'),
        ("bootstrap", None, "the bootstrap unknown"),
        ("images", "blank", "the images blank, not true"),
        ("mode", "loglikelihood", "the mode loglikelihood, not generate"),
    ],
)
def test_images_mode_and_bootstrap_are_those_of_the_plan(run, key, value, reason):
    changed = [own | {key: value} for own in HOLDS]
    with pytest.raises(PlanError, match=f"their {key} differs"):
        run(make_plan(), [HOLDS[0], changed[1]])

    reasons = run(make_plan(), changed)["reasons"]
    assert len(reasons) == 2
    assert all(reason in own for own in reasons)


def test_the_lock_holds_what_the_plan_left_to_the_defaults(run):
    run(make_plan(), HOLDS)
    content = json.loads(run.lock.read_text())["plan"]

    assert content["bootstrap"] == {"draws": 1000, "seed": 0}
    assert (content["images"], content["mode"], content["extraction"]) == ("true", "generate", "seed/1")
    assert content["tiebreakers"] == [{"path": "closed.accuracy", "lower_is_better": False}]


def test_a_plan_of_scored_options_is_read_back_from_its_lock_without_an_extraction(run):
    plan = make_plan(mode="loglikelihood", extraction=None, images=True)
    documents = [own | {"mode": "loglikelihood", "extraction": None} for own in HOLDS]

    assert run(plan, documents)["pre_registered"]
    assert open_plan(run.lock).plan == load_plan(run.folder / "plan.yaml")


@pytest.mark.parametrize(
    ("answered", "reason"),
    [
        pytest.param({"first": LOCKED}, "is not after the lock", id="at the very time of the lock"),
        pytest.param({"last": ago(-60)}, "is dated after this decision", id="in the future"),
        pytest.param({"last": ago(31)}, "is dated before its first", id="the last before the first"),
        pytest.param({"last": None}, "the last answer of two has no time", id="no end"),
        pytest.param({"last": "2020-01-01T00:00:00"}, "the time of the last answer of two has no time", id="no zone"),
    ],
)
def test_answers_are_dated_between_the_lock_and_the_decision(run, answered, reason):
    wrong = HOLDS[1] | {"answered": HOLDS[1]["answered"] | answered}
    (told,) = run(make_plan(), [HOLDS[0], wrong])["reasons"]

    assert reason in told


def test_a_clock_that_is_a_little_ahead_is_let_pass(run):
    ahead = HOLDS[1] | {"answered": HOLDS[1]["answered"] | {"last": ago(-2)}}

    assert run(make_plan(), [HOLDS[0], ahead])["pre_registered"]


def test_a_lock_has_its_time_to_the_microsecond(tmp_path):
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(make_plan()))
    lock = write_plan(tmp_path / "plan.yaml", tmp_path / "lock.json")

    assert re.search(r":\d\d\.\d{6}\+00:00$", lock["locked_at"])


LABELS = "9" * 64


@pytest.mark.parametrize(
    ("planned", "scored", "reasons"),
    [
        (LABELS, LABELS, []),
        (LABELS, "8" * 64, ["the questions that one was scored on have other labels than the plan names"]),
        (LABELS, None, ["figures by labels decide, and the scores of one do not say by which (labels_sha256)"]),
        (None, LABELS, ["figures by labels decide, and the plan does not say by which (labels_sha256)"]),
    ],
)
def test_figures_by_labels_need_the_labels_of_the_plan(run, planned, scored, reasons):
    mapping = {"weight": 1, "from": "closed.per_category.Teeth.accuracy", "linear": {"from": [0, 1], "to": [0, 10]}}
    plan = make_plan(sub_scores={"teeth": mapping}, labels_sha256=planned)
    documents = [own | {"labels_sha256": scored} for own in HOLDS]
    for own in documents:
        own["closed"] = own["closed"] | {"per_category": {"Teeth": {"accuracy": 0.5}}}
    told = run(plan, documents)["reasons"]

    assert [own for own in told if "two" not in own] == reasons


def test_without_figures_by_labels_scores_need_not_name_them(run):
    assert run(make_plan(labels_sha256=LABELS), HOLDS)["pre_registered"]


@pytest.mark.parametrize(
    "changed", [{"categories": ["Jaw"]}, {"group_id": "p2"}, {"language": "es"}, {"option_values": {"A": "caries"}}]
)
def test_the_labels_of_the_questions_are_part_of_the_plan(tmp_path, changed):
    """Of the same questions, with the same right answers."""
    question = {"item_id": "1", "question": "Caries?", "options": {"A": "yes", "B": "no"}, "answer": "A"}
    plan = make_plan(questions="q.jsonl")
    del plan["questions_sha256"]
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    plans = []
    for own in (question, question | changed):
        (tmp_path / "q.jsonl").write_text(json.dumps(own) + "\n")
        plans.append(load_plan(tmp_path / "plan.yaml"))

    assert plans[0].questions_sha256 == plans[1].questions_sha256
    assert plans[0].labels_sha256 != plans[1].labels_sha256


def test_the_labels_do_not_depend_on_the_order_or_the_folder_of_the_questions(tmp_path):
    from dentalgemma.evaluation.questions import labels_sha256, load_questions

    lines = [
        json.dumps({"item_id": str(n), "question": "Caries?", "answer": "no", "image": "i.png", "image_id": "i"}) + "\n"
        for n in range(3)
    ]
    (tmp_path / "other").mkdir()
    (tmp_path / "q.jsonl").write_text("".join(lines))
    (tmp_path / "other" / "q.jsonl").write_text("".join(reversed(lines)))
    files = [tmp_path / "q.jsonl", tmp_path / "other" / "q.jsonl"]

    assert len({labels_sha256(load_questions(path)) for path in files}) == 1


def test_the_same_counts_under_strict_never_seem_to_change_the_decision(run):
    """By intervals of pooled answers, which strict cannot resample: Wilson's would overlap, and so would none."""
    mapping = {"weight": 1, "from": "combined.accuracy", "linear": {"from": [0, 1], "to": [0, 10]}}
    plan = make_plan(sub_scores={"all": mapping}, when_not_different="tie", different_in="combined.interval_by_image")
    plan["tiebreakers"] = [{"path": "closed.failed", "lower_is_better": False}]
    documents = [make_scores(name, correct) for name, correct in (("one", 54), ("two", 46))]
    for own, failed in zip(documents, (0.1, 0.2), strict=True):
        correct = own["closed"]["correct"]
        own["closed"] |= {"failed": failed, "protocols": {"strict": {"n": 100, "correct": correct, "failed": failed}}}
        share = correct / 100
        own["combined"] = {"n": 200, "correct": 2 * correct, "accuracy": share}
        own["combined"]["interval_by_image"] = [share - 0.01, share + 0.01]
    decision = run(plan, documents)

    assert decision["winner"] == "one"
    assert decision["under_strict"] | {"why": ""} == {
        "winner": "one",
        "composites": decision["composites"],
        "changes": False,
        "why": "",
    }


def test_pooled_answers_are_counted_again_under_strict():
    """Of 100 closed answers 40 were right and are 10 under strict; 30 of 100 open ones are right."""
    closed = {"n": 100, "correct": 40, "protocols": {"strict": {"n": 100, "correct": 10, "accuracy": 0.1}}}
    view = read_strictly({"closed": closed, "combined": {"n": 200, "correct": 70}})

    assert (view["combined"]["correct"], view["combined"]["accuracy"]) == (40, Decimal("0.2"))
    low, high = view["combined"]["interval_by_image"]
    assert (round(low, 4), round(high, 4)) == (Decimal("0.1505"), Decimal("0.2609"))  # Wilson, 40 of 200


def test_whom_a_veto_stops_is_tied_with_nobody(run):
    """One and two are 0.01 apart, and the tiebreaker cannot tell them apart."""
    plan = make_plan(veto={"framework": {"criterion": "it cannot be trained", "names": ["one"]}})
    plan["sub_scores"]["reading"]["declared"]["grades"] = {"one": 8.45, "two": 8.44}
    documents = [make_scores("one", 40), make_scores("two", 40)]

    assert run(plan, documents)["winner"] == "two"


def test_a_tiebreaker_may_prefer_the_lower_number(run):
    plan = make_plan(tie_below=10, tiebreakers=[{"path": "latency.median_ms", "lower_is_better": True}])
    documents = [make_scores("one", latency={"median_ms": 900}), make_scores("two", latency={"median_ms": 400})]
    decision = run(plan, documents)

    assert decision["winner"] == "two"
    assert next(own for own in decision["rules"] if own["rule"] == "tiebreaker")["says"] == (
        "the lower latency.median_ms leads"
    )


def test_without_a_threshold_equal_composites_are_tied(run):
    plan = make_plan(tie_below=0)
    plan["sub_scores"]["reading"]["declared"]["grades"] = {"one": 8, "two": 8}

    assert run(plan, [make_scores("one", 40), make_scores("two", 41)])["winner"] == "two"


@pytest.mark.parametrize(
    ("first", "second", "different"),
    [((3, 3), (0, 3), False), ((60, 60), (0, 60), True)],
    ids=["three answers", "sixty"],
)
def test_an_interval_without_width_is_not_believed(run, first, second, different):
    """Wilson's, of 3 of 3: 0.4385 to 1, of 0 of 3: 0 to 0.5615, which overlap."""
    documents = [make_scores(name, *own[:1], n=own[1]) for name, own in (("one", first), ("two", second))]
    for own in documents:
        share = own["closed"]["correct"] / own["closed"]["n"]
        own["closed"]["interval_by_image"] = [share, share]
    decision = run(make_plan(), documents)
    rule = next(own for own in decision["rules"] if own["rule"] == "overlap")

    assert rule["outcome"].startswith("one and two are different" if different else "one and two are not different")
    assert "(Wilson's, as the one that is asked for has no width)" in rule["input"]["one"]
    if not different:
        assert rule["input"]["one"].startswith("0.4385 to 1")


def test_candidates_without_an_interval_are_not_different(run):
    plan = make_plan(when_not_different="tie")
    plan["sub_scores"]["reading"]["declared"]["grades"] = {"one": 9, "two": 1}
    documents = [make_scores("one", 10), make_scores("two", 90)]
    documents[1]["closed"]["interval_by_image"] = None
    decision = run(plan, documents)

    assert outcomes(decision, "overlap") == ["one and two are not different (no interval at closed.interval_by_image)"]
    assert decision["winner"] == "two"


@pytest.mark.parametrize(
    "words",
    [
        "pre\nregistered",
        "pre\u2011registered",
        "pre\u2013registered",
        "pre\u2212registered",
        "pre\u00adregistered",
        "pre\u200bregistered",
        "pre_registered",
        "pre - registered",
        "\uff30\uff32\uff25\uff0dregistered",
        "Preregistration",
    ],
)
def test_a_claim_is_found_however_it_is_spelt(tmp_path, words):
    for plan in (make_plan(title=f"A {words} choice"), make_plan(considered={words: "too large"})):
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
        with pytest.raises(PlanError, match="found out by `decide`, and not claimed"):
            load_plan(tmp_path / "plan.yaml")


def test_words_that_claim_nothing_are_let_pass(tmp_path):
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(make_plan(title="Pre-trained, a registered trademark")))

    assert load_plan(tmp_path / "plan.yaml").title


def test_a_claim_cannot_come_in_with_the_scores(run):
    with pytest.raises(PlanError, match=r"one\.json: 'pre registered'"):
        run(make_plan(), [HOLDS[0] | {"model": "pre-registered"}, HOLDS[1]])


def test_a_pre_registered_decision_says_what_cannot_be_seen(run):
    run(make_plan(), HOLDS)

    assert (
        "before the first answer of these files, and is unchanged. Whether the models were asked before, and answers "
        "thrown away, cannot be seen." in (run.folder / "decision.md").read_text()
    )


def test_the_tests_of_three_candidates_are_corrected_for_three(run):
    """0.01, 0.02 and 0.04 become 0.03, 0.04 and 0.04 (Holm)."""
    plan = make_plan(candidates=["one", "two", "six"])
    plan["sub_scores"]["reading"]["declared"]["grades"] = {"one": 8, "two": 7, "six": 6}
    documents = [make_scores(name) for name in ("one", "two", "six")]
    p_values = iter((0.01, 0.02, 0.04))
    compared = [
        make_comparison(*pair, closed={"only_a": 1, "only_b": 9, "mcnemar_p": next(p_values)})
        for pair in combinations(documents, 2)
    ]
    tests = run(plan, documents, compared=compared)["tests"]

    told = sorted((own["mcnemar_p"], own["holm_p"]) for own in tests)
    assert told == [("0.01", "0.03"), ("0.02", "0.04"), ("0.04", "0.04")]


def test_a_p_of_exactly_alpha_is_not_significant(run):
    """Five answers that only one has right, and none the other way round."""
    pair = {"only_a": 5, "only_b": 0, "mcnemar_p": 0.0625}
    compared = [make_comparison(*HOLDS, closed=pair)]

    assert run(make_plan(tests={"alpha": "0.0625"}), HOLDS, compared=compared)["tests"][0]["significant"] is False


@pytest.mark.parametrize(("mode", "score"), [("ROUND_HALF_EVEN", "6.12"), ("ROUND_HALF_UP", "6.13")])
def test_halves_are_rounded_as_the_plan_says(run, mode, score):
    plan = make_plan(rounding={"mode": mode})
    plan["sub_scores"]["reading"]["declared"]["grades"] = {"one": 6.125, "two": 1}

    assert run(plan, HOLDS)["composites"]["one"] == score


@pytest.mark.parametrize("measured", [False, True], ids=["declared", "measured"])
def test_each_sub_score_is_rounded_before_they_are_weighed(run, measured):
    """6.4 and 7.4 become 6 and 7, and (6 + 7) / 2 is rounded to the even 6; (6.4 + 7.4) / 2 would give 7."""
    grades = {"a": 6.4, "b": 7.4}
    plan = make_plan(rounding={"quantum": 1})
    declared = {"who": "x", "rationale": "y"}
    plan["sub_scores"] = {
        name: {"weight": 0.5, "declared": declared | {"grades": {"one": grade, "two": 1}}}
        for name, grade in grades.items()
    }
    if measured:
        for name, grade in grades.items():
            plan["sub_scores"][name] = {"weight": 0.5, "from": "closed.accuracy", "steps": [[0, grade]]}

    assert run(plan, HOLDS)["composites"]["one"] == "6"


def test_composites_are_rounded_before_they_are_compared(run):
    """6.5 becomes 6, which is what the other has."""
    plan = make_plan(rounding={"quantum": 1}, tie_below=0)
    declared = {"who": "x", "rationale": "y"}
    plan["sub_scores"] = {
        name: {"weight": 0.5, "declared": declared | {"grades": {"one": grade, "two": 6}}}
        for name, grade in {"a": 6, "b": 7}.items()
    }

    assert run(plan, [make_scores("one", 40), make_scores("two", 41)])["winner"] == "two"


def test_every_number_of_a_real_scores_document_is_a_place_that_a_plan_may_name(tmp_path):
    """What scoring adds, a plan can use at once; what it does not have is refused."""
    from dentalgemma.evaluation.runs import read_run
    from dentalgemma.evaluation.scoring import score_run

    values = {"A": "caries", "B": "healthy"}
    items = [
        {"item_id": f"c{n}", "question": "Which?", "options": {"A": "caries", "B": "none"}, "answer": "AB"[n % 2]}
        | {"image_id": str(n // 3), "option_values": values, "categories": ["Teeth"], "finding": "caries"}
        | {"modality": "panoramic", "source": "made up", "question_type": "diagnosis"}
        for n in range(9)
    ]
    sides = {"A": "right_maxillary", "B": "left_maxillary"}
    items += [
        {"item_id": f"r{n}", "question": "Where?", "options": {"A": "right", "B": "left"}, "answer": "A"}
        | {"image_id": str(n), "option_values": sides}
        for n in range(3)
    ]
    items.append({"item_id": "o", "question": "What?", "answer": "Caries.", "image_id": "0"})
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "v.jsonl").write_text(write_verdict(tmp_path / "q.jsonl") + "\n")
    lines = [
        {"item_id": item["item_id"], "output": "A", "mode": "generate", "latency_ms": 5, "batch_size": 1}
        for item in items
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(tmp_path / "p.jsonl", tmp_path / "q.jsonl", verdicts=tmp_path / "v.jsonl")
    scores = score_run(run, draws=20)
    places = {place for section in SECTIONS for place in find_numbers(scores[section], section)}

    assert len(places) > 150
    assert "clinical.findings.caries.sensitivity" in places
    assert "clinical.regions.mirrored.share" in places
    for place in places:
        check_place(place)


def write_verdict(questions):
    """A verdict on the open question, whose answer is "A"."""
    from dentalgemma.evaluation.questions import load_questions

    item = load_questions(questions)[-1]
    verdict = {
        "item_id": item.item_id,
        "item_hash": item.item_hash,
        "verdict": "correct",
        "cost_usd": 0.1,
        "seconds": 1,
    }
    judge = {"model": "m", "api": "openai", "prompt_sha256": PROMPT}
    return json.dumps(verdict | {"answer_sha256": hashlib.sha256(b"A").hexdigest(), "judge": judge})


def find_numbers(value, place):
    """Dotted places of all numbers but tables, which no plan decides by."""
    if isinstance(value, dict):
        for key, own in value.items():
            if key not in {"agreement", "counts"}:
                yield from find_numbers(own, f"{place}.{key}")
    elif isinstance(value, list):
        for number, own in enumerate(value):
            yield from find_numbers(own, f"{place}.{number}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield place
