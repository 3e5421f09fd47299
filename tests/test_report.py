"""The report as others will read it: what it shows, that nothing in it runs, and that what is missing is said."""

import base64
import io
import json
import re
import shutil
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
import yaml
from PIL import Image
from report_cases import write_evaluation

from data_builders.sources import load_vocabulary
from dentalgemma.evaluation.decision import decide
from dentalgemma.evaluation.gates import gate_runs
from dentalgemma.evaluation.plan import write_plan
from dentalgemma.evaluation.plots import draw_accuracy, draw_methods, draw_parts, short_name
from dentalgemma.evaluation.questions import EvaluationError, load_questions
from dentalgemma.evaluation.report import find_flips, order_by_reading, write_report
from dentalgemma.evaluation.report_notes import find_foreign, tie_agreement, tie_gate
from dentalgemma.evaluation.report_text import escape_markdown, write_label
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
    assert re.search(rf"a disease called on healthy images \d of {truths.count('healthy')} ", told)
    assert "Regions: rows are the truth" in told
    assert re.search(r"abstentions: [a-z ]+ 2 of 40 10 5.00 % 1.38 to 16.50", told)
    assert "forced-choice questions" in told
    assert "no diagnostic accuracy" in told
    # 8 of 9, and what a guess among four options reaches.
    assert re.search(r"impacted tooth 9 questions \d images 88.89 % a guess 25.00 % 56.50 to 98.01", told)


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


def test_contamination_is_told_in_the_card_s_words_with_hashes_folded_away(folder, tmp_path):
    template = {"item_id": "closed/01", "split": "train", "kind": "exact", "leak": False, "question": "What?"}
    matches = [template, {**template, "item_id": "closed/02"}, {**template, "split": "test", "question": "Why?"}]
    found = {**CONTAMINATION, "question_matches": matches}
    page = write(read_runs(folder), tmp_path / "r.html", contamination=found)
    open_part, folded = section(page, "contamination").split("<details>")

    told = words(open_part)
    assert "Not clean : 1 image or text of the questions was found where vqa trains or validates" in told
    assert "1 further text is asked in training too and is no leak: short template questions" in told
    assert "1 match is with the test split" in told
    assert "cd" * 32 not in open_part
    assert "cd" * 32 in folded
    markdown = (tmp_path / "r.md").read_text()
    assert "**not clean**: 1 image or text of the questions was found" in markdown
    assert "1 further text is asked in training too and no leak" in markdown


def test_an_agreement_is_tied_to_the_report_s_verdicts_or_said_not_to_be(folder, tmp_path):
    runs = read_runs(folder)
    told = words(section(write(runs, tmp_path / "r.html", judge_agreement=AGREEMENT), "judge"))

    assert "κ = 0.764 [0.600 to 0.900] on 60 answers" in told
    assert "90.00 % of the verdicts are the same" in told
    assert "not tied to these answers" in told
    assert "not tied to these answers" in (tmp_path / "r.md").read_text()
    left_out = {"judge_errors": 0, "not_audited": 20}
    assert "no model here has as many" in tie_agreement({**AGREEMENT, "left_out": left_out}, runs)
    assert tie_agreement({**AGREEMENT, "verdicts_sha256": runs[0].verdicts_sha256}, runs) is None
    assert "other verdicts" in tie_agreement({**AGREEMENT, "verdicts_sha256": "00" * 32}, runs)


def test_a_gate_on_other_answers_is_not_passed_off_as_this_report_s(folder, tmp_path):
    runs = read_runs(folder)
    scores, gate = [score_run(run, draws=100) for run in runs], gate_runs(runs)
    others = {**gate, "runs": [{**gate["runs"][0], "weights": "00" * 32}, gate["runs"][1]]}
    recounted = {**gate, "runs": [gate["runs"][0], {**gate["runs"][1], "correct": 31}]}
    told = words(section(write(runs, tmp_path / "r.html", gate=recounted), "stages"))

    assert tie_gate(gate, scores) is None
    assert "other questions than this report's" in tie_gate({**gate, "questions_sha256": "00" * 32}, scores)
    assert "other answers than this report's: base." in tie_gate(others, scores)
    assert "other answers than this report's: tuned." in told
    assert "other answers than this report's: tuned." in (tmp_path / "r.md").read_text()


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

    assert "older than the first answer of these files; whether the models were asked before cannot be seen" in own
    assert "Pre-registered" not in other
    judged = {**decision["scores"]["base"], "verdicts_sha256": "00" * 32}
    scores = [score_run(run, draws=100) for run in read_runs(folder)]
    assert find_foreign({"scores": {"base": judged}}, scores) == ["base"]
    assert find_foreign({"scores": {"base": decision["scores"]["base"]}}, scores) == []
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
    assert "with 40 questions the gate can at best see a loss of 15.00 points" in told
    assert "tuned → base 40 75.00 %, 50.00 % -25.00" in told
    assert "Teeth 40 75.00 % 50.00 % -25.00 14 4 0.0309" in told


def test_the_decision_s_numbers_and_times_are_short_and_its_tests_are_a_table(folder, decision, tmp_path):
    test = {"a": "base", "b": "tuned", "of": "closed", "only_a": 4, "only_b": 14, "significant": True}
    given = {"base": "0.02851234567890123", "at": "2026-05-01T12:00:00.123456+02:00"}
    rules = [{**decision["rules"][0], "input": given}]
    decided = {**decision, "rules": rules, "tests": [{**test, "mcnemar_p": "0.0309", "holm_p": "0.0618"}]}
    page = section(write(read_runs(folder), tmp_path / "r.html", decision=decided), "decision")
    markdown = (tmp_path / "r.md").read_text()

    for text in (words(page.split("<details>")[0]), markdown):
        assert "0.0285" in text
        assert "0.02851" not in text
        assert "2026-05-01 10:00:00 UTC" in text
        assert "10:00:00.123456" not in text
        assert "T12:00" not in text
    assert '<span class="nb">2026-05-01 10:00:00 UTC</span>' in page
    assert "base tuned closed 4 14 0.0309 0.0618 yes" in words(page)
    assert "| base | tuned | closed | 4 | 14 | 0.0309 | 0.0618 | yes |" in markdown


def rewrite(folder, out, answer, **common):
    """The first model's answers to the closed questions on a diagnosis, each as `answer(item)` says."""
    out.mkdir(exist_ok=True)
    questions = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    questions = [{**own, **common} for own in questions if own.get("question_type") == "diagnosis"]
    (out / "questions.jsonl").write_text("".join(json.dumps(own) + "\n" for own in questions))
    lines = {own["item_id"]: own for own in map(json.loads, (folder / "base.jsonl").read_text().splitlines())}
    answers = [
        {**lines[item.item_id], "output": answer(item), "item_hash": item.item_hash, "image_id": item.image_id}
        for item in load_questions(out / "questions.jsonl")
    ]
    (out / "base.jsonl").write_text("".join(json.dumps(own) + "\n" for own in answers))
    return read_run(out / "base.jsonl", out / "questions.jsonl")


def test_one_letter_throughout_and_an_interval_that_holds_chance_are_said(folder, tmp_path):
    run = rewrite(folder, tmp_path / "one", lambda item: "A")
    right = sum(item.answer == "A" for item in run.items)
    page = write([run], tmp_path / "r.html")
    other = words(section(write(read_runs(folder)[1:], tmp_path / "o.html"), "accuracy"))

    for text in (words(section(page, "accuracy")), (tmp_path / "r.md").read_text()):
        assert f"answers A 20 of 20 times, which is the right letter {right} times" in text
        assert "holds chance, 25.00 %: it is not told from guessing" in text
    assert "which is the right letter" not in other  # one that varies, and is better than chance
    assert "its interval" not in other


def test_answers_that_are_all_right_have_no_bootstrap_interval(folder, tmp_path):
    run = rewrite(folder, tmp_path / "right", lambda item: item.answer)
    told = words(section(write([run], tmp_path / "r.html"), "accuracy"))
    markdown = (tmp_path / "r.md").read_text()

    # Wilson of 20 in 20 begins at 1 / (1 + 1.959964 ** 2 / 20).
    assert "20 of 20 100.00 % – – 83.89 to 100.00" in told
    assert "all its answers are right: resampling gives no interval, Wilson's stands" in told
    assert "| 20 | 20 | 100.00 % | – | 83.89 to 100.00 |" in markdown
    assert "100.00 to 100.00" not in told + markdown


def test_one_image_is_one_image_and_its_want_of_an_interval_a_note(folder, pictures, tmp_path):
    run = rewrite(folder, tmp_path / "one", lambda item: item.answer, image=str(pictures[0]), image_id="image0")
    page = section(write([run], tmp_path / "r.html"), "accuracy")

    assert "no interval by image: all questions are about one image" in words(page.split("</table>")[1])
    assert "about one image" not in page.split("<tbody>")[1].split("</tbody>")[0]
    assert "1 images" not in words(page)
    assert "20 questions on 1 image, 20 an image" in words(page)


def test_a_question_without_image_is_no_image_of_its_own(folder, tmp_path):
    run = rewrite(folder, tmp_path / "mixed", lambda item: item.answer)
    items = [replace(item, image=None, image_id=None) if place < 10 else item for place, item in enumerate(run.items)]
    images = len({item.image_id for item in items[10:]})
    told = words(section(write([replace(run, items=items)], tmp_path / "r.html"), "accuracy"))

    assert f"10 questions on {images} images, {10 / images:g} an image" in told


def test_an_intraclass_correlation_below_0_is_about_0(folder, tmp_path):
    runs = read_runs(folder)
    scores = [score_run(run, draws=100) for run in runs]
    scores[0]["closed"]["clustering"] |= {"icc": -0.0812, "design_effect": 0.7564}
    write_report(runs, tmp_path / "r.html", scores=scores)
    told = words(section((tmp_path / "r.html").read_text(), "accuracy"))

    assert "intraclass correlation about 0, design effect about 1" in told
    assert "-0.08" not in told


def test_verdicts_from_the_cache_are_told_from_those_that_were_paid_for(folder, tmp_path):
    for name in ("questions", "base", "tuned"):
        shutil.copy(folder / f"{name}.jsonl", tmp_path)
    for name, free in (("base", 10), ("tuned", 4)):
        lines = [json.loads(line) for line in (folder / f"{name}_verdicts.jsonl").read_text().splitlines()]
        lines = [{**own, "cached": True, "cost_usd": 0.0, "seconds": 0.0} for own in lines[:free]] + lines[free:]
        (tmp_path / f"{name}_verdicts.jsonl").write_text("".join(json.dumps(own) + "\n" for own in lines))
    told = words(section(write(read_runs(tmp_path), tmp_path / "r.html"), "judge"))

    assert "9 of 10 1 0 of 10 10 none was asked for" in told
    assert "9 of 10 1 6 of 10 4 0.0060 3.0" in told
    assert "cost of the 6 asked for 0.0060 USD, time 3.0 s, 4 from the cache" in (tmp_path / "r.md").read_text()


def test_parts_that_all_questions_share_are_a_sentence(folder, tmp_path):
    run = rewrite(folder, tmp_path / "one", lambda item: "A", modality="panoramic", language="en", source="my_set")
    told = words(section(write([run], tmp_path / "r.html"), "parts"))
    several = words(section(write(read_runs(folder), tmp_path / "s.html"), "parts"))

    assert "All closed questions are of modality panoramic , in en , of type diagnosis , from my set ." in told
    assert "By modality, closed" not in told
    assert "By category, closed" in told
    assert "By modality, closed" in several


@pytest.mark.parametrize(("name", "shown"), [("right_maxillary", "right maxillary"), ("my_own_label", "my own label")])
def test_names_are_shown_with_blanks(name, shown):
    assert write_label(name) == shown


def test_the_vocabulary_s_own_words_stand_for_its_names():
    name, term = next((name, term) for name, term in load_vocabulary().items() if name != term.en.one)

    assert write_label(name) == term.en.one


def test_markdown_holds_no_json_and_reads_in_its_source(folder, decision, tmp_path):
    runs = read_runs(folder)
    contents = {"decision": decision, "judge_agreement": AGREEMENT, "gate": gate_runs(runs)}
    write(runs, tmp_path / "r.html", **contents)
    markdown = (tmp_path / "r.md").read_text()

    assert not re.search(r'[{}]|": |\["', markdown)
    assert set(re.findall(r"&[#\w]+;", markdown)) <= {"&lt;"}  # p < alpha
    assert "Outcome: **tuned is chosen**" in markdown
    assert "| base → tuned | 40 | 50.00 % | 75.00 % | +25.00 |" in markdown


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("end_letter 1.5", "end_letter 1.5"),
        ("_emphasis_ a*b", r"\_emphasis\_ a\*b"),
        ("a|b\n# c", r"a\|b \# c"),
        ("<img> &lt; $x$ @me", "&lt;img&gt; &amp;lt; &#36;x&#36; &#64;me"),
        ("\\| \\", r"\\\| \\"),
        ("a\u202eb\u2066c", "abc"),
    ],
)
def test_text_stays_text_in_markdown_and_is_readable(text, written):
    assert escape_markdown(text) == written


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
