"""Logs of other harnesses score as our own predictions do; tests/data/imports/README.md says who made them."""

import cProfile
import csv
import json
import pstats
import random
import shutil
import zipfile
from pathlib import Path

import pytest

from dentalgemma.evaluation import spreadsheets
from dentalgemma.evaluation.extraction import extract
from dentalgemma.evaluation.importers import import_predictions
from dentalgemma.evaluation.questions import EvaluationError, load_questions, read_predictions
from dentalgemma.evaluation.scoring import score_predictions
from dentalgemma.evaluation.spreadsheets import read_first_sheet

LOGS = Path(__file__).parent / "data" / "imports"
QUESTIONS = LOGS / "questions.jsonl"
LM_EVAL = LOGS / "lm_eval" / "made-up__scripted"
LMMS_EVAL = LOGS / "lmms_eval" / "made-up__scripted"
DATE = "2026-11-22T13-10-10.941797"
GENERATED = [
    pytest.param(LOGS / "inspect" / "plain.eval", "inspect", id="inspect, .eval in zstd"),
    pytest.param(LOGS / "inspect" / "plain.json", "inspect", id="inspect, .json"),
    pytest.param(LOGS / "vlmevalkit" / "scripted_MMOral.xlsx", "vlmevalkit", id="VLMEvalKit, .xlsx"),
    pytest.param(LOGS / "vlmevalkit" / "scripted_MMOral.tsv", "vlmevalkit", id="VLMEvalKit, .tsv"),
    pytest.param(LM_EVAL / f"samples_made_up_generate_{DATE}.jsonl", "lm_eval", id="lm-evaluation-harness"),
    pytest.param(LMMS_EVAL / "20261122_210040_samples_made_up_lmms.jsonl", "lmms_eval", id="lmms-eval"),
]


def _closed(predictions: Path, questions: Path = QUESTIONS) -> dict:
    return score_predictions(predictions, questions, draws=100)["closed"]


def _write_lines(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def _write_tsv(path: Path, *rows: str) -> Path:
    path.write_text("".join(f"{row}\r\n" for row in rows), encoding="utf-8-sig", newline="")
    return path


def _question(item_id: str, text: str = "Which tooth is missing?", options: str = "18 28 38 48", **more) -> dict:
    letters = dict(zip("ABCD", options.split(), strict=False))
    return {"item_id": item_id, "question": text, "options": letters, "answer": "A", **more}


@pytest.mark.parametrize(("log", "harness"), GENERATED)
def test_the_same_answers_score_the_same_from_every_harness(log, harness, tmp_path):
    counts = import_predictions(log, QUESTIONS, tmp_path / "out.jsonl")

    assert (counts["format"], counts["imported"], counts["missing"], counts["foreign"]) == (harness, 8, [], [])
    ours, theirs = _closed(LOGS / "predictions.jsonl"), _closed(tmp_path / "out.jsonl")
    assert ours == theirs
    assert ours["accuracy"] == 5 / 8  # counted by hand from the answers in the data set


@pytest.mark.parametrize(("log", "harness"), GENERATED)
def test_answers_survive_as_they_were_written(log, harness, tmp_path):
    import_predictions(log, QUESTIONS, tmp_path / "out.jsonl")

    lines = read_predictions(tmp_path / "out.jsonl")
    assert [line["output"] for line in lines.values()] == [
        "C",
        "B. No caries",
        "The answer is A",
        "2",
        "nan",
        'Line one, "quoted"\nline two;\tA',
        "",
        "=2+3, so D",
    ]
    assert all(line["imported"]["format"] == harness and line["protocol"] is None for line in lines.values())


@pytest.mark.parametrize("task", ["choice", "letters"])
def test_log_likelihoods_choose_what_lm_eval_chose(task, tmp_path):
    import_predictions(LM_EVAL / f"samples_made_up_{task}_{DATE}.jsonl", QUESTIONS, tmp_path / "out.jsonl")

    results = json.loads((LM_EVAL / f"results_{DATE}.json").read_text())["results"]
    assert _closed(tmp_path / "out.jsonl")["accuracy"] == results[f"made_up_{task}"]["acc,none"] == 0.75
    first = read_predictions(tmp_path / "out.jsonl")["closed-1"]
    assert (first["mode"], first["letter"], first["option_scores"]["C"]) == ("loglikelihood", "C", {"sum": -1.5})


def test_a_log_says_which_model_answered_when_and_how(tmp_path):
    import_predictions(LOGS / "inspect" / "plain.eval", QUESTIONS, tmp_path / "inspect.jsonl")
    import_predictions(LM_EVAL / f"samples_made_up_generate_{DATE}.jsonl", QUESTIONS, tmp_path / "lm_eval.jsonl")

    inspect = read_predictions(tmp_path / "inspect.jsonl")["closed-1"]
    assert inspect["model"] == "mockllm/model"
    assert inspect["answered_at"].startswith("2026-11-22T13:11:0") and inspect["answered_at"].endswith("+00:00")
    assert inspect["imported"]["version"] == "0.3.285"
    assert inspect["finish_reason"] == "stop"
    lm_eval = read_predictions(tmp_path / "lm_eval.jsonl")["closed-1"]
    assert lm_eval["model"] == "made-up/scripted"
    assert lm_eval["answered_at"].startswith("2026-11-22T13:10:1")
    assert lm_eval["generation"] == {"until": [], "do_sample": False, "max_gen_toks": 64}
    assert not {"images", "weights", "image_shown"} & (set(inspect) | set(lm_eval)), "a log does not tell these"


@pytest.mark.parametrize("name", ["shuffled", "solver_shuffled"])
def test_shuffled_choices_mean_what_the_model_saw(name, tmp_path):
    counts = import_predictions(LOGS / "inspect" / f"{name}.eval", QUESTIONS, tmp_path / "out.jsonl")

    lines = read_predictions(tmp_path / "out.jsonl")
    right = []
    for item in load_questions(QUESTIONS):
        line = lines[item.item_id]
        shown = line.get("options_shown", item.options)
        letter = extract(line["output"], shown).letter
        right.append(letter is not None and shown[letter] == item.options[item.answer])
    assert sum(right) == 6  # as inspect itself found: accuracy 0.75
    assert len(counts["shown_otherwise"]) == 8
    # Read by the letters of our own order, the same words would score otherwise.
    ours = [extract(lines[item.item_id]["output"], item.options).letter for item in load_questions(QUESTIONS)]
    assert sum(letter == item.answer for letter, item in zip(ours, load_questions(QUESTIONS), strict=True)) != 6


@pytest.mark.parametrize("name", ["shuffled", "solver_shuffled"])
def test_scoring_never_reads_shuffled_letters_as_ours(name, tmp_path):
    import_predictions(LOGS / "inspect" / f"{name}.eval", QUESTIONS, tmp_path / "out.jsonl")

    assert _closed(tmp_path / "out.jsonl")["accuracy"] == 6 / 8  # as inspect itself found


def test_a_solver_that_shuffled_is_refused_without_its_events(tmp_path):
    with zipfile.ZipFile(tmp_path / "log.eval", "w", zipfile.ZIP_DEFLATED) as archive:
        plan = {"steps": [{"solver": "multiple_choice", "params": {"shuffle": "Random"}}]}
        archive.writestr("header.json", json.dumps({"eval": {"model": "m"}, "plan": plan}))
        message = {"role": "assistant", "content": "ANSWER: B"}
        sample = {"id": "closed-1", "choices": ["18", "28", "38", "48"], "input": "Which tooth is missing?"}
        archive.writestr(
            "samples/closed-1_epoch_1.json", json.dumps(sample | {"output": {"choices": [{"message": message}]}})
        )

    with pytest.raises(EvaluationError, match="no events that tell what the model wrote"):
        import_predictions(tmp_path / "log.eval", QUESTIONS, tmp_path / "out.jsonl")


def test_options_that_vlmevalkit_took_for_missing_are_told(tmp_path):
    """pandas reads the option texts "None" and "nan" as missing, so that the model never saw them."""
    counts = import_predictions(LOGS / "vlmevalkit" / "scripted_MMOral.json", QUESTIONS, tmp_path / "out.jsonl")

    assert counts["shown_otherwise"] == ["closed-3", "closed-4"]
    lines = read_predictions(tmp_path / "out.jsonl")
    assert lines["closed-3"]["options_shown"]["A"] == ""
    assert lines["closed-5"]["output"] == "nan", "the text nan is an answer, not a missing one"


def test_both_files_of_a_benchmark_import_together_by_index(tmp_path):
    questions = _write_lines(
        tmp_path / "questions.jsonl",
        [_question("closed-1"), {"item_id": "open-1", "question": "What is missing?", "answer": "Tooth 18"}],
    )
    closed = _write_tsv(
        tmp_path / "m_closed.tsv",
        "index\tquestion\tA\tB\tC\tD\tanswer\tprediction",
        "1\tWhich tooth is missing?\t18\t28\t38\t48\tA\t007",
    )
    opened = _write_tsv(tmp_path / "m_open.tsv", "index\tquestion\tanswer\tprediction", "1\tWhat is missing?\t18\tNone")

    counts = import_predictions([closed, opened], questions, tmp_path / "out.jsonl")

    lines = read_predictions(tmp_path / "out.jsonl")
    assert {item_id: line["output"] for item_id, line in lines.items()} == {"closed-1": "007", "open-1": "None"}
    assert counts["model"] == "m"


def test_a_request_that_failed_is_no_answer_of_the_model(tmp_path):
    log = _write_tsv(
        tmp_path / "m_x.tsv",
        "index\tquestion\tA\tB\tC\tD\tprediction",
        "1\tWhich tooth is missing?\t18\t28\t38\t48\tFailed to obtain answer via API.",
    )
    questions = _write_lines(tmp_path / "questions.jsonl", [_question("1")])

    counts = import_predictions(log, questions, tmp_path / "out.jsonl")

    line = read_predictions(tmp_path / "out.jsonl")["1"]
    assert counts["failed"] == ["1"]
    assert (line["output"], line["finish_reason"]) == ("", "error")
    assert line["error"] == "Failed to obtain answer via API."


def test_repeats_are_refused_until_one_is_chosen(tmp_path):
    log = LOGS / "inspect" / "twice.json"
    with pytest.raises(EvaluationError, match="answered 2 times"):
        import_predictions(log, QUESTIONS, tmp_path / "out.jsonl")

    counts = import_predictions(log, QUESTIONS, tmp_path / "out.jsonl", epoch=2)

    assert counts["imported"] == 3
    assert counts["missing"] == ["closed-4", "closed-5", "closed-6", "closed-7", "closed-8"]
    with pytest.raises(EvaluationError, match="lacks 5 of 8"):
        _closed(tmp_path / "out.jsonl")


def test_a_log_that_counts_otherwise_is_matched_by_its_words(tmp_path):
    lines = QUESTIONS.read_text(encoding="utf-8").splitlines()
    renamed = [json.loads(line) | {"item_id": f"mine/{number}"} for number, line in enumerate(lines)]
    questions = _write_lines(tmp_path / "questions.jsonl", renamed)

    counts = import_predictions(LOGS / "inspect" / "plain.eval", questions, tmp_path / "out.jsonl")

    assert counts["imported"] == 8
    assert read_predictions(tmp_path / "out.jsonl")["mine/7"]["output"] == "=2+3, so D", "of two with the same words"


def test_one_question_on_two_images_is_never_guessed(tmp_path):
    both = [_question("a", image_id="one"), _question("b", image_id="two")]
    questions = _write_lines(tmp_path / "questions.jsonl", both)
    log = _write_tsv(
        tmp_path / "m_x.tsv", "question\tA\tB\tC\tD\tprediction", "Which tooth is missing?\t18\t28\t38\t48\tA"
    )

    with pytest.raises(EvaluationError, match="may be item a or b"):
        import_predictions(log, questions, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_foreign_answers_are_named(tmp_path):
    questions = _write_lines(tmp_path / "questions.jsonl", [_question("closed-1")])

    counts = import_predictions(LOGS / "inspect" / "plain.eval", questions, tmp_path / "out.jsonl")

    assert counts["imported"] == 1
    assert counts["foreign"] == [f"closed-{number}" for number in range(2, 9)]


HEADER = "index\tquestion\tA\tB\tC\tD\tprediction"
ROW = "1\tWhich tooth is missing?\t18\t28\t38\t48\tA"
LIKELIHOODS = {
    "doc_id": 0,
    "doc": {"item_id": "1", "question": "Which tooth is missing?"},
    "arguments": {f"gen_args_{n}": {"arg_0": "Which tooth is missing?", "arg_1": f" {n}8"} for n in (1, 2, 3, 4)},
    "resps": [[["-1.0", "False"]], [["nan", "False"]], [["-2.0", "False"]], [["-3.0", "False"]]],
}


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        pytest.param("m_x.pkl", b"\x80\x04.", {}, "a pickle can run code", id="pickle"),
        pytest.param("m_x.xlsx", b"PK\x03\x04 torn", {}, "cannot be read as a spreadsheet", id="torn spreadsheet"),
        pytest.param("m.eval", b"PK\x03\x04 torn", {}, "not a whole zip archive", id="torn zip"),
        pytest.param("m_x.tsv", f"{HEADER}\n1\tfoo\n", {}, "row 2 has 2 cells under 7 names", id="short row"),
        pytest.param("m_x.tsv", "index\tquestion\n1\tq\n", {}, "no column `prediction`", id="not a result file"),
        pytest.param("m_x.json", "[1, 2]", {}, "expected a list of records", id="not records"),
        pytest.param("m_x.json", '{"results": {}}', {}, "no log that is known", id="aggregated results"),
        pytest.param("m_x.tsv", f"{HEADER}\n{ROW}\n{ROW}\n", {}, "answered 2 times", id="twice"),
        pytest.param("a_b_c.tsv", f"{HEADER}\n{ROW}\n", {}, "does not tell which model", id="model in doubt"),
        pytest.param("m_x.tsv", f"{HEADER}\n{ROW.replace('tooth', 'root')}\n", {}, "none of 1 answers", id="other"),
        pytest.param(
            "m_x.tsv",
            f"{HEADER}\n{ROW.replace('tooth', 'root')}\n",
            {"match": "index"},
            "asks something else than item 1",
            id="same index, other words",
        ),
        pytest.param(
            "m_x.tsv",
            f"{HEADER}\n{ROW.replace('48', '47')}\n",
            {"match": "index"},
            "asks something else than item 1",
            id="same index, other options",
        ),
        pytest.param("m_x.tsv", f"{HEADER}\n{ROW}\n", {"match": "name"}, "no match 'name'", id="match"),
        pytest.param("m_x.tsv", f"{HEADER}\n{ROW}\n", {"format": "helm"}, "no format 'helm'", id="format"),
        pytest.param("s.jsonl", json.dumps(LIKELIHOODS), {}, "log-likelihood is NaN", id="likelihood of NaN"),
        pytest.param("s.jsonl", '{"doc_id": 0, "arguments": {}}', {}, "log with --log_samples", id="no answers"),
        pytest.param(
            "s.jsonl", '{"doc_id": 0, "filtered_resps": [["1.5", "True"], ["2", "False"]]}', {}, "losses", id="losses"
        ),
        pytest.param("m.json", '{"eval": {}, "samples": [3]}', {}, "not built as a log of inspect", id="shape"),
    ],
)
def test_what_cannot_be_imported_is_refused_with_its_reason(name, content, options, message, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    questions = _write_lines(tmp_path / "questions.jsonl", [_question("1")])

    with pytest.raises(EvaluationError, match=message):
        import_predictions(tmp_path / name, questions, tmp_path / "out.jsonl", **options)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_damaged_log_is_refused_rather_than_half_read(tmp_path):
    content = bytearray((LOGS / "inspect" / "plain.eval").read_bytes())
    place = content.index(b"samples/closed-2_epoch_1.json") + 400
    content[place] ^= 0xFF
    (tmp_path / "log.eval").write_bytes(content)

    with pytest.raises(EvaluationError, match=r"log\.eval: cannot be read"):
        import_predictions(tmp_path / "log.eval", QUESTIONS, tmp_path / "out.jsonl")


def _damage(value: object, rng: random.Random) -> object:
    if rng.random() < 0.02:
        return rng.choice([None, 3, "x", [], {}, [None], {"a": 1}, True, float("nan")])
    if isinstance(value, dict):
        return {key: _damage(part, rng) for key, part in value.items() if rng.random() > 0.01}
    return [_damage(part, rng) for part in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    "log",
    [LOGS / "inspect" / "plain.json", LM_EVAL / f"samples_made_up_choice_{DATE}.jsonl"],
    ids=["inspect", "lm_eval"],
)
def test_a_log_of_another_shape_is_imported_or_refused_with_a_reason(log, tmp_path):
    rng = random.Random(log.name)
    lines = log.read_text().splitlines() if log.suffix == ".jsonl" else [log.read_text()]
    whole = [json.loads(line) for line in lines]
    reasons = []
    for number in range(80):
        path = _write_lines(tmp_path / f"{number}{log.suffix}", [_damage(entry, rng) for entry in whole])
        try:
            import_predictions(path, QUESTIONS, tmp_path / f"{number}.out")
        except EvaluationError as error:
            reasons.append(str(error))
    assert reasons
    assert all(str(tmp_path) in reason for reason in reasons), "each names the file"


def test_thoughts_beside_an_answer_are_kept_apart(tmp_path):
    content = [{"type": "reasoning", "reasoning": "Perhaps B."}, {"type": "text", "text": "A"}]
    sample = {
        "id": "1",
        "input": [{"role": "user", "content": [{"type": "text", "text": "attachment://f00"}]}],
        "choices": ["18", "28", "38", "48"],
        "attachments": {"f00": "Which tooth is missing?"},
        "output": {"choices": [{"message": {"content": content}, "stop_reason": "max_tokens"}]},
    }
    (tmp_path / "log.json").write_text(json.dumps({"eval": {"model": "m"}, "samples": [sample]}))

    import_predictions(tmp_path / "log.json", _write_lines(tmp_path / "q.jsonl", [_question("1")]), tmp_path / "out")

    line = read_predictions(tmp_path / "out")["1"]
    assert (line["output"], line["reasoning"], line["finish_reason"]) == ("A", "Perhaps B.", "length")


def test_an_import_overwrites_nothing(tmp_path):
    shutil.copy(LOGS / "predictions.jsonl", tmp_path / "out.jsonl")

    with pytest.raises(EvaluationError, match="is there already"):
        import_predictions(LOGS / "inspect" / "plain.eval", QUESTIONS, tmp_path / "out.jsonl")


def test_options_in_another_order_need_words_of_their_own(tmp_path):
    questions = _write_lines(tmp_path / "questions.jsonl", [_question("1", options="18 18 38 48")])
    log = _write_tsv(tmp_path / "m_x.tsv", HEADER, "1\tWhich tooth is missing?\t48\t18\t18\t38\tA")

    with pytest.raises(EvaluationError, match="two of which read the same"):
        import_predictions(log, questions, tmp_path / "out.jsonl")


def test_half_a_character_in_an_answer_can_still_be_written(tmp_path):
    record = {"index": 1, "question": "Which tooth is missing?", **_question("1")["options"], "prediction": "A\ud83d"}
    (tmp_path / "m_x.json").write_text(json.dumps([record]))
    questions = _write_lines(tmp_path / "questions.jsonl", [_question("1")])

    import_predictions(tmp_path / "m_x.json", questions, tmp_path / "out.jsonl")

    assert read_predictions(tmp_path / "out.jsonl")["1"]["output"] == "A�"


MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
SHARED = f'<Relationship Id="t" Type="{OFFICE}/sharedStrings" Target="/xl/sharedStrings.xml"/>'


def _write_xlsx(path: Path, sheet: str | bytes, shared: str | None = None, **parts: str) -> Path:
    """A workbook of one sheet with these rows, or with a whole document; `parts` replace those of the same stem."""
    if isinstance(sheet, str) and not sheet.startswith("<!"):
        sheet = f'<worksheet xmlns="{MAIN}"><sheetData>{sheet}</sheetData></worksheet>'
    workbook = f'<workbook xmlns="{MAIN}" xmlns:r="{OFFICE}"><sheets><sheet name="a" r:id="r1"/></sheets></workbook>'
    relation = f'<Relationship Id="r1" Type="{OFFICE}/worksheet" Target="worksheets/sheet1.xml"/>'
    content = {
        "xl/workbook.xml": parts.get("workbook", workbook),
        "xl/_rels/workbook.xml.rels": f"<Relationships>{parts.get('relations', relation)}{SHARED}</Relationships>",
        "xl/worksheets/sheet1.xml": sheet,
        "xl/sharedStrings.xml": f'<sst xmlns="{MAIN}">{shared or ""}</sst>',
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in content.items():
            archive.writestr(name, text)
        if "second" in parts:
            archive.writestr("xl/worksheets/sheet2.xml", parts["second"])
    return path


def test_a_spreadsheet_is_read_as_texts(tmp_path):
    """Cells of every kind, as Office Open XML (ECMA-376, part 1, 18.3.1.4 and 18.4) describes them."""
    row = (
        '<row><c r="A1" t="s"><v>0</v></c><c r="C1"><v>7.10</v></c><c r="D1" t="inlineStr"><is><t> nan </t></is></c>'
        '<c r="E1" t="b"><v>1</v></c><c r="F1"><f>2+3</f></c><c r="AA1" t="s"><v>1</v></c></row>'
    )
    shared = (
        "<si><r><t>tooth </t></r><r><t>18</t></r><rPh><t>never read</t></rPh></si>"
        "<si><t>a_x000D_b_x005F_x000D_</t></si>"
    )

    (cells,) = read_first_sheet(_write_xlsx(tmp_path / "a.xlsx", row, shared))

    assert cells == ["tooth 18", "", "7.10", " nan ", "1", "=2+3", *[""] * 20, "a\rb_x000D_"]


def test_cells_and_rows_stand_where_they_say(tmp_path):
    rows = (
        '<row r="4"><c r="C4"><v>3</v></c><c r="A4"><v>1</v></c><c><v>2</v></c></row><row r="2"><c><v>0</v></c></row>'
    )

    assert read_first_sheet(_write_xlsx(tmp_path / "a.xlsx", rows)) == [[], ["0"], [], ["1", "2", "3"]]


def test_an_empty_row_before_the_names_and_between_answers_is_no_row(tmp_path):
    cells = [(3, HEADER.split("\t")), (5, ROW.split("\t")), (7, ["foo"] * 8)]
    rows = [f'<row r="{number}">{"".join(f"<c><v>{cell}</v></c>" for cell in row)}</row>' for number, row in cells]
    log = _write_xlsx(tmp_path / "m_x.xlsx", "".join(rows))
    questions = _write_lines(tmp_path / "questions.jsonl", [_question("1")])

    with pytest.raises(EvaluationError, match="row 7 has 8 cells under 7 names"):
        import_predictions(log, questions, tmp_path / "out.jsonl")
    log = _write_xlsx(tmp_path / "m_x.xlsx", "".join(rows[:2]))
    assert import_predictions(log, questions, tmp_path / "out.jsonl")["imported"] == 1


def test_the_first_sheet_is_the_first_of_the_workbook_and_not_of_the_folder(tmp_path):
    sheets = "".join(f'<sheet name="{name}" r:id="{name}"/>' for name in ("chart", "shown", "other"))
    log = _write_xlsx(
        tmp_path / "a.xlsx",
        "<row><c><v>wrong</v></c></row>",
        workbook=f'<workbook xmlns="{MAIN}" xmlns:r="{OFFICE}"><sheets>{sheets}</sheets></workbook>',
        relations=f'<Relationship Id="other" Type="{OFFICE}/worksheet" Target="worksheets/sheet1.xml"/>'
        f'<Relationship Id="chart" Type="{OFFICE}/chartsheet" Target="chartsheets/sheet1.xml"/>'
        f'<Relationship Id="shown" Type="{OFFICE}/worksheet" Target="worksheets/sheet2.xml"/>',
        second=f'<worksheet xmlns="{MAIN}"><sheetData><row><c><v>right</v></c></row></sheetData></worksheet>',
    )

    assert read_first_sheet(log) == [["right"]]


DOCTYPE = '<!DOCTYPE x [<!ENTITY a "b">]><worksheet><row><c><v>&a;</v></c></row></worksheet>'


@pytest.mark.parametrize(
    ("sheet", "message"),
    [
        pytest.param(DOCTYPE.encode("utf-8"), "declares entities", id="entities"),
        pytest.param(DOCTYPE.encode("utf-16"), "declares entities", id="entities in UTF-16"),
        pytest.param('<row><c r="AAAAAAA1"/></row>', "AAAAAAA1 is no cell of row 1", id="a column of gigabytes"),
        pytest.param('<row><c r="XFE1"/></row>', "beyond the last one, XFD", id="XFE"),
        pytest.param('<row r="1048577"/>', "row 1048577 .* none of 1048576", id="row beyond the last"),
        pytest.param('<row><c r="A2"/></row>', "A2 is no cell of row 1", id="cell of another row"),
        pytest.param('<row><c r="B1"/><c r="B1"/></row>', "column 2 of row 1 comes twice", id="cell twice"),
        pytest.param('<row r="3"/><row r="3"/>', "row 3 comes twice", id="row twice"),
        pytest.param('<row><c t="s"><v>-1</v></c></row>', "'-1' is no number of a shared text", id="text from the end"),
        pytest.param('<row><c t="s"><v>9</v></c></row>', "cannot be read as a spreadsheet", id="no such text"),
        pytest.param("".join(f'<row><c r="XFD{n}"/></row>' for n in range(1, 1026)), "more than 16777216", id="gaps"),
    ],
)
def test_a_hostile_spreadsheet_is_refused(sheet, message, tmp_path):
    with pytest.raises(EvaluationError, match=message):
        read_first_sheet(_write_xlsx(tmp_path / "a.xlsx", sheet))


def test_the_last_cell_of_a_spreadsheet_is_read(tmp_path):
    table = read_first_sheet(_write_xlsx(tmp_path / "a.xlsx", '<row r="1048576"><c r="XFD1048576"><v>1</v></c></row>'))

    assert (len(table), len(table[-1]), table[-1][-1]) == (1_048_576, 16_384, "1")


@pytest.mark.parametrize(
    ("sheet", "message"),
    [
        pytest.param(" " * 2**20, "sheet1.xml unpacks to more than 1000000 bytes", id="too long"),
        pytest.param(f"<row>{'<c/>' * 1000}</row>", "one <row> holds more than 1000 elements", id="an endless row"),
        pytest.param("<row/>" * 3000, "sheet1.xml holds more than 2000 <row>", id="rows without end"),
    ],
)
def test_a_spreadsheet_is_read_up_to_its_limits(sheet, message, monkeypatch, tmp_path):
    for name, limit in {"LARGEST": 1_000_000, "MOST_IN_ONE": 1000, "MOST": 2000}.items():
        monkeypatch.setattr(spreadsheets, name, limit)

    with pytest.raises(EvaluationError, match=message):
        read_first_sheet(_write_xlsx(tmp_path / "a.xlsx", sheet))


@pytest.mark.parametrize(
    ("packing", "size", "message"),
    [
        pytest.param(zipfile.ZIP_DEFLATED, 2**28 + 1, "unpacks to more than 268435456 bytes", id="too long"),
        pytest.param(zipfile.ZIP_BZIP2, 2**10, "packed in a way that inspect does not use", id="bzip2"),
    ],
)
def test_a_log_that_unpacks_to_more_than_a_sample_needs_is_refused(packing, size, message, tmp_path):
    with zipfile.ZipFile(tmp_path / "m.eval", "w") as archive:
        archive.writestr("header.json", '{"eval": {"model": "m"}}')
        archive.writestr("samples/1_epoch_1.json", b" " * size, packing, 1)
    questions = _write_lines(tmp_path / "questions.jsonl", [_question("1")])

    with pytest.raises(EvaluationError, match=message):
        import_predictions(tmp_path / "m.eval", questions, tmp_path / "out.jsonl")


@pytest.mark.parametrize("answer", [["A"], {"letter": "A"}, True], ids=["list", "object", "true"])
def test_an_answer_that_is_no_text_is_refused(answer, tmp_path):
    record = {"index": 1, "question": "Which tooth is missing?", **_question("1")["options"]}
    (tmp_path / "m_x.json").write_text(json.dumps([record | {"prediction": "A"}, record | {"prediction": answer}]))
    sample = {"doc_id": 0, "doc": {"item_id": "1", "question": "Which tooth is missing?"}, "arguments": [["x", {}]]}
    _write_lines(tmp_path / "s.jsonl", [sample | {"resps": [["A", answer]]}])
    message = {"output": {"choices": [{"message": {"content": answer}}]}}
    log = {"eval": {"model": "m"}, "samples": [{"id": "1", "input": "Which tooth is missing?", **message}]}
    (tmp_path / "m.json").write_text(json.dumps(log))
    questions = _write_lines(tmp_path / "questions.jsonl", [_question("1")])

    logs = {"m_x.json": "record 2", "s.jsonl": "s.jsonl:1"}
    for name, where in logs.items() if isinstance(answer, list) else [*logs.items(), ("m.json", "sample 1")]:
        with pytest.raises(EvaluationError, match=rf"{where}: the answer is of the type {type(answer).__name__}"):
            import_predictions(tmp_path / name, questions, tmp_path / "out.jsonl", model="m")


def test_a_text_where_a_list_of_answers_belongs_is_not_read_letter_by_letter(tmp_path):
    sample = {"doc_id": 0, "doc": {"item_id": "1"}, "arguments": [["Which tooth is missing?", {}]], "resps": ["ABC"]}
    questions = _write_lines(tmp_path / "questions.jsonl", [_question("1")])

    with pytest.raises(EvaluationError, match="a list of answers for every request"):
        import_predictions(_write_lines(tmp_path / "s.jsonl", [sample]), questions, tmp_path / "out.jsonl", epoch=1)


def test_reading_a_table_leaves_the_csv_modules_limit_as_it_was(tmp_path):
    usual = csv.field_size_limit()
    questions = _write_lines(tmp_path / "questions.jsonl", [_question("1")])
    log = _write_tsv(tmp_path / "m_x.tsv", f"{HEADER}\timage", f"{ROW}\t{'x' * (usual + 1)}")

    assert import_predictions(log, questions, tmp_path / "out.jsonl")["imported"] == 1
    assert csv.field_size_limit() == usual


@pytest.mark.parametrize("same", [False, True], ids=["many questions", "one question"])
def test_matching_by_words_does_not_read_every_question_again_for_every_answer(same, tmp_path):
    """Calls are counted, not seconds: four times the rows may take some more than four times the calls."""
    calls = []
    for size in (50, 200):
        items, rows = [], []
        for number in range(size):
            text = "What is seen here?" if same else f"What is seen in region {number:03}?"
            item = _question(f"m/{number}", text, f"a{number:03} b{number:03} c{number:03} d{number:03}")
            listed = " ".join(f"{letter}: {option};" for letter, option in item["options"].items())
            items.append(item)
            rows.append({"doc_id": number, "arguments": [[f"Look. {text} {listed}", {}]], "resps": [["A"]]})
        questions = _write_lines(tmp_path / f"{size}.jsonl", items)
        log = _write_lines(tmp_path / f"s{size}.jsonl", rows)
        profile = cProfile.Profile(builtins=False)
        counts = profile.runcall(
            import_predictions, log, questions, tmp_path / f"out{size}", model="m", match="question"
        )
        assert counts["imported"] == size
        stats = pstats.Stats(profile).stats
        calls.append(sum(own[1] for (_, _, name), own in stats.items() if name in ("_squash", "search")))

    assert calls[1] < 5 * calls[0]
