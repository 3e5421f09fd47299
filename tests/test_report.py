"""The report as others will read it: what it shows, that nothing in it runs, and that what is missing is said."""

import base64
import io
import json
import re
import shutil
from html import unescape
from pathlib import Path

import pytest
import yaml
from PIL import Image
from report_cases import write_evaluation

from dentalgemma.evaluation.decision import decide
from dentalgemma.evaluation.gates import gate_runs
from dentalgemma.evaluation.plan import write_plan
from dentalgemma.evaluation.plots import draw_accuracy, draw_methods, draw_parts, short_name
from dentalgemma.evaluation.questions import EvaluationError
from dentalgemma.evaluation.report import find_flips, order_by_reading, write_report
from dentalgemma.evaluation.scoring import compare_all, read_run, score_run

HOSTILE = "<img src=x onerror=\"document.title='PWNED'\">"
HOSTILE_NAMES = (f"$\\frac{{x_1$ <script>document.title='PWNED'</script> {'long ' * 60}", "牙 \u202e</title>|*b*`")
CONTAMINATION = {
    "format": "contamination/1",
    "questions": {"path": "questions.jsonl", "sha256": "cd" * 32, "n": 50, "images": 10},
    "dataset": {"name": "vqa", "fingerprint": "f1", "images": 100, "rows": 400},
    "image_matches": [
        {"question_image_id": "image3", "dataset_image_id": HOSTILE, "split": "train", "kind": "copy", "leak": True}
    ],
    "question_matches": [],
    "counts": {"train": {"copy": 1}},
    "clean": False,
}
AGREEMENT = {"format": "agreement/1", "n": 60, "agreement": 0.9, "kappa": 0.7642, "kappa_interval": [0.6, 0.9]}


@pytest.fixture(scope="module")
def pictures(phantoms):
    return sorted((phantoms / "coco").glob("*.jpg"))[:10]


@pytest.fixture(scope="module")
def folder(pictures, tmp_path_factory):
    return write_evaluation(tmp_path_factory.mktemp("evaluation"), pictures)


def read_runs(folder, names=("base", "tuned"), *, judged=True):
    return [
        read_run(
            folder / f"{file}.jsonl",
            folder / "questions.jsonl",
            verdicts=folder / f"{file}_verdicts.jsonl" if judged else None,
            name=name,
        )
        for file, name in zip(("base", "tuned"), names, strict=True)
    ]


def write(runs, out, **options):
    """Score and compare runs, write the report, and return the page."""
    scores = [score_run(run, draws=100) for run in runs]
    comparisons = compare_all(runs, draws=100) if len(runs) > 1 else ()
    write_report(runs, out, scores=scores, comparisons=comparisons, **options)
    return out.read_text(encoding="utf-8")


def section(page, name):
    return page.split(f'id="{name}"')[1].split("<h2")[0]


def words(html):
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())


@pytest.fixture(scope="module")
def page(folder, tmp_path_factory):
    return write(read_runs(folder), tmp_path_factory.mktemp("report") / "report.html", commands=["dentalgemma score a"])


def test_accuracies_of_every_kind_stand_with_their_counts(page):
    told = words(section(page, "accuracy"))

    assert "20 of 40 50.00 %" in told  # the first model, closed
    assert "30 of 40 75.00 %" in told
    assert "3 of 9 33.33 %" in told  # open: the tenth verdict is an error, and out of the count
    assert "5 of 9 55.56 %" in told
    assert "23 of 49 46.94 %" in told  # pooled
    assert "35.20 to 64.80" in told  # Wilson of 20 in 40, as R's binom.wilson has it
    assert "97.50 %" in told  # one right option of forty is empty
    assert "6 one-way flips (15.00 points)" in told


def test_pairs_stand_with_discordance_and_corrected_tests(page):
    told = words(section(page, "pairs"))

    # 4 against 14 discordant answers: the exact binomial gives 2 * 4048 / 2**18.
    assert "closed, 40 50.00 %, 75.00 % +25.00" in told
    assert "16 4 14 6 0.0309 0.0309" in told


def test_losses_come_first_and_every_change_is_counted(page):
    told = words(section(page, "flips"))

    assert "4 lost, 16 gained" in told
    assert "(4 of 4 shown)" in told
    assert told.index("Lost: right before") < told.index("Gained: wrong before")
    assert section(page, "flips").count("<article") == 20


def test_no_more_flips_are_shown_than_asked_for(folder, tmp_path):
    told = section(write(read_runs(folder), tmp_path / "r.html", flips=2), "flips")

    assert told.count("<article") == 4
    assert "(2 of 4 shown)" in told
    assert "(2 of 16 shown)" in told


def test_each_picture_is_embedded_once_and_small(page):
    embedded = re.findall(r"data:image/jpeg;base64,([^\"]+)", page)
    pictures = [Image.open(io.BytesIO(base64.b64decode(content))) for content in embedded]

    assert 0 < len(embedded) == len(set(embedded)) <= 10
    assert all(max(picture.size) <= 320 for picture in pictures)
    assert section(page, "flips").count("<use ") == 20


def test_a_thumbnail_keeps_nothing_but_pixels(folder, pictures, tmp_path):
    questions = (folder / "questions.jsonl").read_text()
    for number, path in enumerate(pictures):
        copy = tmp_path / f"{number}.jpg"
        exif = Image.Exif()
        exif[0x9C9D] = "CANARY".encode("utf-16-le")
        Image.open(path).save(copy, comment=b"CANARY", exif=exif, quality=90)
        questions = questions.replace(json.dumps(str(path)), json.dumps(str(copy)))
        assert b"CANARY" in copy.read_bytes()
    for name in ("base", "tuned", "base_verdicts", "tuned_verdicts"):
        shutil.copy(folder / f"{name}.jsonl", tmp_path)
    (tmp_path / "questions.jsonl").write_text(questions)
    page = write(read_runs(tmp_path), tmp_path / "r.html")
    embedded = [base64.b64decode(content) for content in re.findall(r"data:image/jpeg;base64,([^\"]+)", page)]

    assert embedded
    assert not any(b"CANARY" in content or b"Exif" in content for content in embedded)


def test_a_picture_that_cannot_be_read_is_said_and_stops_nothing(folder, pictures, tmp_path):
    (tmp_path / "torn.jpg").write_bytes(pictures[0].read_bytes()[:40])
    text = (folder / "questions.jsonl").read_text().replace(str(pictures[0]), str(tmp_path / "torn.jpg"))
    for name in ("base", "tuned", "base_verdicts", "tuned_verdicts"):
        shutil.copy(folder / f"{name}.jsonl", tmp_path)
    (tmp_path / "questions.jsonl").write_text(text)
    page = write(read_runs(tmp_path), tmp_path / "r.html")

    assert "its image cannot be read" in page
    assert "data:image/jpeg" in page


def test_answers_are_shown_with_how_they_were_read(page):
    told = words(section(page, "flips"))

    assert "✗ wrong read as nothing by failed I cannot tell that from here" in told
    assert "✓ right judged correct tuned says: caries on the left the judge: It matches the reference." in told


def test_every_method_of_the_extractor_is_listed_even_if_it_read_nothing(page):
    table = words(section(page, "reading").split("<table>")[1].split("</table>")[0])

    assert "end_letter start_letter option_text fuzzy failed" in table


def test_clinical_figures_stand_with_what_they_are_counted_from(folder, page):
    questions = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    truths = [
        question["option_values"][question["answer"]]
        for question in questions
        if question.get("question_type") == "screening"
    ]
    told = words(section(page, "clinical"))

    assert re.search(rf"pathology missed \d of {len(truths) - truths.count('healthy')} ", told)
    assert re.search(rf"healthy images over-called \d of {truths.count('healthy')} ", told)
    assert "Regions: rows are the truth" in told
    assert "abstentions: no letter could be read 2 of 40 5.00 % 1.38 to 16.50" in told


def test_latency_leaves_the_warm_up_out(page):
    told = words(section(page, "latency"))

    # Items 4 to 49 take 104 to 149 ms; the first four took 5,000.
    assert "126 147 46 4 4 a test's CPU" in told or "127 147 46 4 4 a test's CPU" in told


def test_what_is_missing_is_said(folder, tmp_path):
    runs = read_runs(folder, judged=False)[:1]
    page = write(runs, tmp_path / "r.html")
    told = words(page)

    for sentence in (
        "No plan was applied",
        "No two models were compared",
        "No judge ran",
        "No person checked the judge's verdicts",
        "Contamination was not checked",
        "No gate between training stages was run",
        "No command was recorded",
        "not judged",
    ):
        assert sentence in told, sentence
    assert "pre-registered" not in told.replace("nothing in it is pre-registered", "")


def test_the_same_inputs_give_the_same_bytes(folder, tmp_path):
    pages = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(read_runs(folder), tmp_path / name / "r.html")
        pages.append([(tmp_path / name / f"r.{kind}").read_bytes() for kind in ("html", "md", "json")])

    assert pages[0] == pages[1]


def test_text_by_others_is_inert_and_the_page_asks_for_nothing(pictures, open_page, tmp_path):
    folder = write_evaluation(tmp_path / "evaluation", pictures, label=HOSTILE)
    torn = json.dumps(f"{HOSTILE} </bdi></article></html> \ud800")[1:-1]
    text = (folder / "tuned.jsonl").read_text().replace("I cannot tell", torn)
    (folder / "tuned.jsonl").write_text(text)
    page = write(
        read_runs(folder, HOSTILE_NAMES),
        tmp_path / "report.html",
        commands=[f"dentalgemma report {HOSTILE}"],
        title=f"</title><script>document.title='PWNED'</script>{HOSTILE}",
        contamination=CONTAMINATION,
        judge_agreement={**AGREEMENT, HOSTILE: [HOSTILE]},
        gate={HOSTILE: {HOSTILE: HOSTILE}},
    )
    document = open_page(tmp_path / "report.html")

    assert "PWNED" in document  # it is there, as text
    assert not re.search(r"<title>PWNED", document)
    assert "<script" not in document.lower()
    assert "onerror=" not in " ".join(re.findall(r"<\w[^>]*>", re.sub(r'"[^"]*"', '""', document)))
    assert not re.search(r'(?:src|href)="(?!data:image/|#)', page)
    assert "http://" not in page
    assert "https://" not in page
    assert "\\ud800" in page
    markdown = (tmp_path / "report.md").read_text()
    assert not re.search("<img|<script|</", re.sub(r"(?ms)^```console\n(\$ .*\n)*```$", "", markdown))
    assert json.loads((tmp_path / "report.json").read_text())["title"].startswith("</title>")


def test_contamination_and_agreement_stand_in_the_report(folder, tmp_path):
    page = write(read_runs(folder), tmp_path / "r.html", contamination=CONTAMINATION, judge_agreement=AGREEMENT)

    assert "Not clean : 1 images and 0 texts of the questions were found in vqa , 1 of them" in words(
        section(page, "contamination")
    )
    assert "κ = 0.764 [0.600 to 0.900] on 60 answers" in words(section(page, "judge"))
    assert "**not clean**" in (tmp_path / "r.md").read_text()


@pytest.fixture(scope="module")
def decision(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("decision")
    plan = {
        "title": "Which to keep",
        "candidates": ["base", "tuned"],
        "sub_scores": {"closed": {"weight": 1, "from": "closed.accuracy", "linear": {"from": [0, 1], "to": [0, 10]}}},
        "tiebreakers": ["closed"],
    }
    (out / "plan.yaml").write_text(yaml.safe_dump(plan))
    write_plan(out / "plan.yaml", out / "plan.lock.json")
    scores = {}
    for run in read_runs(folder):
        scores[run.name] = out / f"{run.name}.json"
        scores[run.name].write_text(json.dumps(score_run(run)))
    return decide(out / "plan.lock.json", scores, out=out / "decision.json")


def test_a_decision_is_shown_rule_by_rule_and_claims_no_more_than_it_may(folder, decision, tmp_path):
    told = words(section(write(read_runs(folder), tmp_path / "r.html", decision=decision), "decision"))

    assert "Chosen: tuned" in told
    assert decision["plan"]["plan_sha256"] in told
    for rule in decision["rules"]:
        assert " ".join(rule["says"].split()) in told
    # The plan was locked after the answers were given, and names no questions.
    assert "Not registered in advance" in told
    assert "Pre-registered" not in told


def test_a_decision_on_other_answers_is_not_passed_off_as_this_report_s(folder, decision, tmp_path):
    registered = {**decision, "pre_registered": True, "reasons": []}
    own = words(section(write(read_runs(folder), tmp_path / "r.html", decision=registered), "decision"))
    registered["scores"] = {**decision["scores"], "tuned": {"predictions_sha256": "00" * 32}}
    other = words(section(write(read_runs(folder), tmp_path / "o.html", decision=registered), "decision"))

    assert "Pre-registered" in own
    assert "Pre-registered" not in other
    assert "Decided on other answers than this report's: tuned" in other


def test_an_order_that_depends_on_the_reading_is_said(folder, tmp_path):
    runs = read_runs(folder)
    scores = [score_run(run, draws=100) for run in runs]
    scores[0]["closed"]["protocols"]["strict"] = {"n": 40, "correct": 39, "accuracy": 0.975, "failed": 0}
    scores[1]["closed"]["protocols"]["strict"] = {"n": 40, "correct": 1, "accuracy": 0.025, "failed": 0}
    write_report(runs, tmp_path / "r.html", scores=scores)
    told = words(section((tmp_path / "r.html").read_text(), "reading"))

    assert "protocol strict 97.50 % 2.50 % 1 2 yes" in told
    assert "protocol seed 50.00 % 75.00 % 2 1 no" in told


def test_scored_options_have_no_extraction_and_the_page_says_so(folder, tmp_path):
    questions = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()][:40]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    lines = [json.loads(line) for line in (folder / "base.jsonl").read_text().splitlines()][:40]
    lines = [{**line, "mode": "loglikelihood", "letter": "A", "protocol": "option-mean/1"} for line in lines]
    (tmp_path / "base.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write([read_run(tmp_path / "base.jsonl", tmp_path / "questions.jsonl")], tmp_path / "r.html")

    assert "nothing was extracted" in words(section(page, "reading"))
    assert "No open question was asked." in words(page)


def test_what_a_stage_forgot_is_shown_per_category(folder, tmp_path):
    runs = read_runs(folder)
    page = write(runs, tmp_path / "r.html", gate=gate_runs(runs[::-1]))  # backwards, so that something is lost
    told = words(section(page, "stages"))

    assert "Not passed" in told
    assert "tuned → base 40 75.00 %, 50.00 % -25.00" in told
    assert "Teeth 40 75.00 % 50.00 % -25.00 14 4 0.0309" in told


def test_flips_of_a_run_with_itself_are_none(folder):
    run = read_runs(folder)[0]
    flips = find_flips(run, run)

    assert (flips["losses"], flips["gains"]) == (0, 0)


def test_parts_that_do_not_belong_together_are_refused(folder, tmp_path):
    runs = read_runs(folder)
    scores = [score_run(run, draws=100) for run in runs]

    with pytest.raises(EvaluationError, match="name of its own"):
        write_report([runs[0], runs[0]], tmp_path / "r.html", scores=[scores[0], scores[0]])
    with pytest.raises(EvaluationError, match="the scores are of"):
        write_report(runs, tmp_path / "r.html", scores=scores[::-1])
    with pytest.raises(EvaluationError, match="not among the runs"):
        write_report(runs[:1], tmp_path / "r.html", scores=scores[:1], comparisons=compare_all(runs, draws=100))
    with pytest.raises(EvaluationError, match=r"ends in \.html"):
        write_report(runs, tmp_path / "report", scores=scores)
    assert not list(Path(tmp_path).iterdir())


@pytest.mark.parametrize("name", ["$x_1$", "$\\frac{", "<b>&amp;</b> -->", "\x00\x1b[2J", "", "é" * 500, "a\nb"])
def test_plots_draw_any_name_as_text(name):
    model = {"name": name, "accuracy": 1.0, "interval": None, "wilson": [0.5, 1.0], "methods": {name: 3, "failed": 1}}
    drawn = [
        draw_accuracy([model], chance=0.25, ceiling=0.9348),
        draw_methods([model]),
        draw_parts([name, "other"], [{"name": name, "parts": {name: {"accuracy": 0.5, "wilson": [0.1, 0.9]}}}]),
    ]

    assert all(svg.rstrip().endswith("</svg>") for svg in drawn)
    assert not any("<b>" in svg for svg in drawn)
    assert drawn[0] == draw_accuracy([model], chance=0.25, ceiling=0.9348)
    assert len(short_name(name)) <= 30


@pytest.mark.parametrize(
    ("strict", "changed"),
    [
        pytest.param((0.5, 0.2), "no", id="as in the headline"),
        pytest.param((0.3, 0.3), "tie", id="equal"),
        pytest.param((0.2, 0.5), "yes", id="the other way round"),
    ],
)
def test_another_reading_that_ties_models_is_not_said_to_turn_them_round(strict, changed):
    scores = []
    for name, own, headline in zip(("first", "second"), strict, (0.4, 0.3), strict=True):
        readings = {"protocols": {"strict": {"accuracy": own}}, "bounds": {"failures_wrong": {"accuracy": headline}}}
        scores.append({"name": name, "closed": readings})

    assert order_by_reading(scores)["strict"]["changed"] == changed
