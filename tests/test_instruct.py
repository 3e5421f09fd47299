"""The instruct builder: which cases are read, and that no near duplicate crosses a split."""

import hashlib
import json
import os
import subprocess
import sys
import unicodedata
from collections import defaultdict
from itertools import combinations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_builders.chat import SYSTEM_PROMPT
from data_builders.claims import claims_from_json
from data_builders.dataset_folder import BuildError
from data_builders.instruct import build_instruct
from data_builders.phantom_cases import DISEASES, make_cases, write_cases
from data_builders.readers.cases import Case, read_cases
from data_builders.records import Problem
from data_builders.similar_prompts import NEAR_DUPLICATE, find_near_duplicates
from data_builders.sources import Source, load_sources
from data_builders.splits import Groups

QUESTION, ANSWER = "A tooth hurts at night.", "Assessment: pulpitis."
USER, ASSISTANT = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}


def read(root, **keys):
    items = list(read_cases(Source(name="s", reader="cases", root=root, **keys)))
    return [i for i in items if isinstance(i, Case)], [i for i in items if isinstance(i, Problem)]


def read_lines(root, *lines, name="a.jsonl", **keys):
    """Read one JSONL file; a line is text, bytes, or a value to be written as JSON."""
    as_bytes = [
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in lines
    ]
    (root / name).write_bytes(b"\n".join(as_bytes))
    return read(root, **keys)


def make_sources(root, cases, *, more=""):
    """Write cases and a sources file about them; returns the sources file, loaded."""
    (root / "cases").mkdir(parents=True, exist_ok=True)
    (root / "cases" / "a.jsonl").write_text("".join(json.dumps(case) + "\n" for case in cases))
    path = root / "sources.yaml"
    path.write_text(f"{more}\nsources: [{{name: s, reader: cases, root: cases, license: Apache-2.0}}]\n")
    return load_sources(path)


def make_case(question, answer="Assessment: pulpitis.", condition="pulpitis"):
    return {"prompt": question, "completion": answer, "condition": condition}


def read_built(folder):
    """Every row of a dataset folder with its split."""
    return [
        {**row, "split": path.name.split("-")[0]}
        for path in sorted((folder / "data").iterdir())
        for row in pq.read_table(path).to_pylist()
    ]


# Reading


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param({"messages": [USER, ASSISTANT]}, id="messages"),
        pytest.param(
            {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}]}, id="parts"
        ),
        pytest.param({"messages": [{"role": "system", "content": " "}, USER, ASSISTANT]}, id="empty system prompt"),
        pytest.param(
            {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]}, id="ShareGPT"
        ),
        pytest.param({"prompt": QUESTION, "completion": ANSWER}, id="prompt and completion"),
        pytest.param({"prompt": [USER], "completion": [ASSISTANT]}, id="prompt and completion as turns"),
        pytest.param({"prompt": QUESTION, "response": ANSWER}, id="prompt and response"),
        pytest.param({"prompt": QUESTION, "completion": None, "response": ANSWER}, id="a column of another source"),
        pytest.param({"instruction": QUESTION, "output": ANSWER, "input": ""}, id="instruction and output"),
        pytest.param({"question": QUESTION, "answer": ANSWER}, id="question and answer"),
        pytest.param({"question": f"  {QUESTION}\n", "answer": f"{ANSWER}\n"}, id="blanks around"),
    ],
)
def test_each_form_of_a_case_reads_the_same(tmp_path, entry):
    (case,), problems = read_lines(tmp_path, {**entry, "condition": "pulpitis"})

    assert problems == []
    assert (list(case.prompt), case.answer, case.condition) == ([USER], ANSWER, "pulpitis")
    assert case.where == f"{tmp_path / 'a.jsonl'}:1"


def test_an_instruction_keeps_its_input(tmp_path):
    (case,), _ = read_lines(tmp_path, {"instruction": "Assess.", "input": QUESTION, "output": ANSWER})

    assert case.prompt[-1]["content"] == f"Assess.\n\n{QUESTION}"


def test_a_dialogue_keeps_its_history_and_its_own_system_prompt(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, USER, ASSISTANT, {"role": "user", "content": "And now?"}]
    (case,), problems = read_lines(tmp_path, {"messages": [*turns, {"role": "assistant", "content": "Root canal."}]})

    assert problems == []
    assert (list(case.prompt), case.answer) == (turns, "Root canal.")


def test_jsonl_a_json_list_and_parquet_hold_the_same_cases(tmp_path):
    entries = [{"messages": [USER, ASSISTANT], "label": "pulpitis"}, {"messages": [USER, ASSISTANT], "label": None}]
    for name in ("lines", "list", "table"):
        (tmp_path / name).mkdir()
    read_from = {"lines": read_lines(tmp_path / "lines", *entries)}
    (tmp_path / "list" / "a.json").write_text(json.dumps(entries))
    pq.write_table(pa.Table.from_pylist(entries), tmp_path / "table" / "a.parquet")
    for name in ("list", "table"):
        read_from[name] = read(tmp_path / name)

    for cases, problems in read_from.values():
        assert problems == []
        assert [(list(case.prompt), case.answer, case.condition) for case in cases] == [
            ([USER], ANSWER, "pulpitis"),
            ([USER], ANSWER, None),
        ]
    assert [case.line for case in read_from["list"][0]] == ["/0", "/1"]
    assert [case.line for case in read_from["table"][0]] == [1, 2]


@pytest.mark.parametrize("key", ["condition", "diagnosis", "label", "category"])
def test_the_condition_is_found_under_its_usual_keys(tmp_path, key):
    (case,), _ = read_lines(tmp_path, {"question": QUESTION, "answer": ANSWER, key: " dental \n caries "})

    assert case.condition == "dental caries"


def test_label_attribute_names_the_key_of_the_condition(tmp_path):
    entry = {"question": QUESTION, "answer": ANSWER, "condition": "wrong", "disease": "caries"}
    (tmp_path / "table").mkdir()
    pq.write_table(pa.Table.from_pylist([entry]), tmp_path / "table" / "a.parquet")

    cases, problems = read_lines(tmp_path, entry, {"question": QUESTION, "answer": ANSWER}, label_attribute="disease")

    assert [case.condition for case in cases] == ["caries", None, "caries"]
    assert [(problem.code, problem.severity, problem.line) for problem in problems] == [
        ("condition_missing", "warning", 2)
    ]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        pytest.param("{", "bad_json", id="broken JSON"),
        pytest.param("[" * 100_000, "bad_json", id="deep nesting"),
        pytest.param('{"n": ' + "1" * 5000 + "}", "bad_json", id="5,000 digits"),
        pytest.param(b'{"question": "\xff", "answer": "a"}', "unreadable_line", id="invalid UTF-8"),
        pytest.param('{"question": "q", "answer": "a", "answer": "b"}', "duplicate_json_keys", id="two answers"),
        pytest.param("[]", "bad_case", id="a list"),
        pytest.param("null", "bad_case", id="null"),
        pytest.param("NaN", "bad_case", id="NaN"),
        pytest.param({"text": "t"}, "bad_case", id="no known column"),
        pytest.param({"messages": "m"}, "bad_case", id="messages as text"),
        pytest.param({"messages": []}, "no_answer", id="no turn"),
        pytest.param({"messages": ["m"]}, "bad_turn", id="a turn as text"),
        pytest.param({"messages": [USER, {"role": 10**400, "content": "c"}]}, "bad_role", id="a number as role"),
        pytest.param({"messages": [USER, {"role": "tool", "content": "c"}, ASSISTANT]}, "bad_role", id="tool"),
        pytest.param({"messages": [USER]}, "no_answer", id="no answer"),
        pytest.param({"messages": [ASSISTANT]}, "bad_turns", id="no question"),
        pytest.param({"messages": [USER, USER, ASSISTANT]}, "bad_turns", id="two questions in a row"),
        pytest.param(
            {"messages": [USER, {"role": "system", "content": "s"}, ASSISTANT]}, "system_not_first", id="late system"
        ),
        pytest.param({"question": QUESTION, "answer": " \n"}, "empty_answer", id="empty answer"),
        pytest.param({"question": QUESTION, "answer": None}, "empty_answer", id="null for an answer"),
        pytest.param({"question": "", "answer": ANSWER}, "empty_turn", id="empty question"),
        pytest.param('{"question": "q", "answer": NaN}', "not_text", id="NaN for an answer"),
        pytest.param({"question": {"a": 1}, "answer": ANSWER}, "not_text", id="an object for a question"),
        pytest.param(r'{"question": "q\ud800", "answer": "a"}', "not_text", id="half a surrogate pair"),
        pytest.param(
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, ASSISTANT]}, "not_text", id="an image"
        ),
    ],
)
def test_a_line_that_is_no_case_is_a_problem_with_its_place(tmp_path, line, code):
    good = {"question": QUESTION, "answer": ANSWER}
    cases, problems = read_lines(tmp_path, good, "", line, good)

    assert [case.line for case in cases] == [1, 4]
    assert [(problem.code, problem.severity, problem.line) for problem in problems] == [(code, "error", 3)]
    assert str(problems[0]).startswith(f"{tmp_path / 'a.jsonl'}:3: ")


@pytest.mark.parametrize("value", [["a"], {"a": 1}, True, 1.5])
def test_a_condition_that_is_no_name_costs_the_condition_not_the_case(tmp_path, value):
    (case,), (problem,) = read_lines(tmp_path, {"question": QUESTION, "answer": ANSWER, "label": value})

    assert case.condition is None
    assert (problem.code, problem.severity) == ("bad_condition", "warning")


def test_byte_order_marks_and_windows_line_ends_are_read(tmp_path):
    text = json.dumps({"question": "¿Duele?", "answer": "Sí."}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{text}\r\n{text}\r\n".encode())
    (tmp_path / "b.jsonl").write_bytes(f"{text}\n".encode("utf-16"))

    cases, problems = read(tmp_path)

    assert problems == []
    assert [case.answer for case in cases] == ["Sí."] * 3


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_a_git_lfs_pointer_is_named_as_such(tmp_path, suffix):
    (tmp_path / f"a.{suffix}").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")

    assert [problem.code for problem in read(tmp_path)[1]] == ["lfs_pointer"]


def test_a_json_file_of_something_else_is_left_alone_unless_it_was_named(tmp_path):
    (tmp_path / "info.json").write_text("{}")

    assert [(p.code, p.severity) for p in read(tmp_path)[1]] == [("unused_file", "info")]
    assert [(p.code, p.severity) for p in read(tmp_path, annotations="info.json")[1]] == [("not_cases", "error")]
    assert [(p.code, p.severity) for p in read(tmp_path, annotations="*.jsonl")[1]] == [
        ("annotations_missing", "error")
    ]


def test_a_file_outside_the_source_is_never_read(tmp_path):
    inside = tmp_path / "in"
    inside.mkdir()
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": QUESTION, "answer": ANSWER}))
    (inside / "link.jsonl").symlink_to(tmp_path / "a.jsonl")

    assert [problem.code for problem in read(inside)[1]] == ["unsafe_path"]
    with pytest.raises(ValueError, match="not a path below"):
        Source(name="s", reader="cases", root=inside, annotations="../a.jsonl")


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=3), st.lists, max_leaves=4
)
TURNS = st.lists(
    st.dictionaries(st.sampled_from(["role", "from", "content", "value"]), st.sampled_from(["user", "gpt", "a"]) | JSON)
)
ENTRIES = st.dictionaries(st.sampled_from(["messages", "prompt", "completion", "label", "system"]), TURNS | JSON)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    content=st.binary(max_size=60) | st.lists(ENTRIES, max_size=3).map(lambda e: "\n".join(map(json.dumps, e)).encode())
)
@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_whatever_a_file_holds_is_cases_and_problems(tmp_path, suffix, content):
    (tmp_path / f"a.{suffix}").write_bytes(content)

    assert all(isinstance(item, Case | Problem) for items in read(tmp_path) for item in items)


# Building


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """300 synthetic cases and, for every third, a copy with another age."""
    root = tmp_path_factory.mktemp("instruct")
    cases = list(make_cases(300, seed=1))
    for case in cases[::3]:
        text = case["messages"][0]["content"]
        head, _, tail = text.partition(" years")
        aged = f"{head[:-2]}99 years{tail}"
        cases.append({**case, "messages": [{"role": "user", "content": aged}, case["messages"][1]]})
    cases += cases[:7]
    report = build_instruct(make_sources(root, cases), root / "out")
    return root / "out", report


def test_a_near_duplicate_is_in_the_split_of_its_original(built):
    rows = read_built(built[0])
    splits, groups = defaultdict(set), defaultdict(set)
    for row in rows:
        text = row["prompt"][-1]["content"]
        splits[text.partition(" years")[2]].add(row["split"])
        groups[row["group_id"]].add(row["split"])

    assert len(rows) == 400
    assert {row["split"] for row in rows} == {"train", "validation", "test"}
    assert all(len(of) == 1 for of in [*splits.values(), *groups.values()])
    assert len(splits) == 300
    assert len(groups) <= 300


def test_no_pair_of_prompts_alike_crosses_a_split(built):
    def triples(row):
        words = "".join(
            c if c.isalpha() else " 0 " if c.isdigit() else " " for c in row["prompt"][-1]["content"].lower()
        )
        words = words.replace(" 0  0 ", " 0 ").split()
        return {tuple(words[start : start + 3]) for start in range(len(words) - 2)}

    rows = [(row["split"], triples(row)) for row in read_built(built[0])]
    alike = [
        (one, other)
        for (one, first), (other, second) in combinations(rows, 2)
        if len(first & second) >= NEAR_DUPLICATE * len(first | second)
    ]

    assert len(alike) >= 100
    assert all(one == other for one, other in alike)


def test_every_condition_is_in_every_split(built):
    conditions = built[1]["conditions"]

    assert set(conditions) == {disease.name for disease in DISEASES}
    assert all(min(counts.values()) > 0 and counts["train"] > 30 for counts in conditions.values())


def test_exact_duplicates_are_built_once_and_counted(built):
    _, report = built

    assert report["problem_counts"] == {"duplicate_case": 7}
    (source,) = report["sources"]
    assert (source["cases"], source["rows"], source["problem_counts"]) == (407, 400, {"duplicate_case": 7})
    assert sum(split["rows"] for split in report["splits"].values()) == 400


def test_rows_are_prompt_and_completion_without_images(built):
    from datasets import load_dataset

    dataset = load_dataset(str(built[0]))
    row = dataset["train"][0]

    assert set(dataset) == {"train", "validation", "test"}
    assert set(dataset["train"].column_names) == {
        "prompt",
        "completion",
        "row_id",
        "image_id",
        "group_id",
        "source",
        "license",
        "language",
        "question_type",
        "claims",
    }
    assert [turn["role"] for turn in row["prompt"]] == ["system", "user"]
    assert row["prompt"][0]["content"] == SYSTEM_PROMPT
    assert [turn["role"] for turn in row["completion"]] == ["assistant"]
    assert (row["question_type"], row["image_id"], row["license"]) == ("case", None, "Apache-2.0")
    assert claims_from_json(row["claims"]) == ()
    assert len({row["row_id"] for split in dataset.values() for row in split}) == 400


def test_the_card_states_sizes_that_are_not_zero(built):
    from huggingface_hub import DatasetCard

    info = DatasetCard.load(built[0] / "README.md").data.dataset_info

    assert sum(split["num_examples"] for split in info["splits"]) == 400
    assert all(split["num_bytes"] > 300 * split["num_examples"] for split in info["splits"])
    assert info["dataset_size"] == sum(split["num_bytes"] for split in info["splits"])


def test_each_row_can_be_traced_to_its_line(built):
    cases = [json.loads(line) for line in (built[0] / "cases.jsonl").read_text().splitlines()]

    assert {case["row_id"]: case["split"] for case in cases} == {r["row_id"]: r["split"] for r in read_built(built[0])}
    content = (built[0].parent / "cases" / "a.jsonl").read_bytes()
    assert {case["file"] for case in cases} == {hashlib.sha256(content).hexdigest()[:16]}
    assert {case["line"] for case in cases} == {str(line) for line in range(1, 401)}


def test_a_case_and_a_copy_that_differs_in_blanks_and_capitals_are_one(tmp_path):
    cases = [make_case("Pain on  biting."), make_case("PAIN on\nbiting."), make_case("Pain on biting!")]

    report = build_instruct(make_sources(tmp_path, cases), tmp_path / "out")

    assert report["problem_counts"] == {"duplicate_case": 1, "empty_split": 2}  # one group is left


def test_the_system_prompt_is_the_case_s_own_then_that_of_the_sources_file(tmp_path):
    own = {"messages": [{"role": "system", "content": "Own."}, USER, ASSISTANT]}
    sources = make_sources(tmp_path, [own, make_case("Pain on sweet food.")], more="system_prompt: From the file.")

    build_instruct(sources, tmp_path / "out")

    assert {row["prompt"][0]["content"] for row in read_built(tmp_path / "out")} == {"Own.", "From the file."}


def test_an_empty_system_prompt_is_left_out(tmp_path):
    build_instruct(make_sources(tmp_path, [make_case("Pain on biting.")], more="system_prompt: ''"), tmp_path / "out")

    assert [turn["role"] for turn in read_built(tmp_path / "out")[0]["prompt"]] == ["user"]


FINDINGS = "Findings: cold pain lasts over a minute, deep hole near the pulp."


@pytest.mark.parametrize(
    ("question", "condition", "named"),
    [
        ("PATIENT: Irreversible-Pulpitis, 34 years.", "irreversible_pulpitis", True),
        ("A case of dental caries.", "Dental caries (K02.9)", True),
        ("Pulpitis was ruled out.", "irreversible pulpitis", False),
        ("Subperiodontitis of old.", "periodontitis", False),
        ("Tooth 36 hurts.", "36", False),
    ],
)
def test_a_prompt_that_names_the_condition_is_reported_with_its_line(tmp_path, question, condition, named):
    case = make_case(f"{question}\n{FINDINGS}", condition=condition)
    report = build_instruct(make_sources(tmp_path, [make_case("Pain on biting."), case]), tmp_path / "out")
    found = [problem for problem in report["problems"] if problem["code"] == "answer_in_prompt"]

    assert [(problem["path"], problem["line"]) for problem in found] == [(str(tmp_path / "cases/a.jsonl"), 2)] * named
    assert report["splits"]["train"]["rows"] + report["splits"].get("test", {"rows": 0})["rows"] == 2


def in_the_form_of_the_hub(case, number):
    """A made-up case with the diagnosis in the line PATIENT and nowhere else, as the public instruct cases have it."""
    user, assistant = case["messages"]
    head = f"Please evaluate this dental patient:\n\nPATIENT: {case['condition'].title()}\nAGE: {20 + number % 60}"
    system = {"role": "system", "content": "You are an expert dental clinician."}
    return {"messages": [system, {**user, "content": f"{head}\n\n{user['content']}"}, assistant]}


def letters(text):
    """A text's letters alone, small and without accents."""
    return "".join(c for c in unicodedata.normalize("NFKD", text).casefold() if c.isalpha())


@pytest.mark.parametrize("treatment", ["drop", "mask", "keep"])
def test_the_line_with_the_diagnosis_is_dropped_masked_or_kept(tmp_path, treatment):
    cases = [in_the_form_of_the_hub(case, n) for n, case in enumerate(make_cases(160, seed=1))]
    make_sources(tmp_path, cases)
    keys = f"reader: cases, root: cases, condition_line: PATIENT, diagnosis_in_prompt: {treatment}"
    (tmp_path / "sources.yaml").write_text(f"sources: [{{name: s, {keys}}}]")

    report = build_instruct(load_sources(tmp_path / "sources.yaml"), tmp_path / "out")

    prompts = [row["prompt"][-1]["content"] for row in read_built(tmp_path / "out")]
    naming = [text for text in prompts if any(letters(disease.name) in letters(text) for disease in DISEASES)]
    treated = {"drop": "dropped", "mask": "masked", "keep": "kept"}[treatment]
    assert len(prompts) == 160
    assert len(naming) == (160 if treatment == "keep" else 0)
    assert sum("PATIENT: [condition]\n" in text for text in prompts) == (160 if treatment == "mask" else 0)
    assert all("AGE: " in text and "Complaint: " in text for text in prompts)
    assert report["problem_counts"]["answer_in_prompt"] == 160
    assert report["diagnosis_in_prompt"] == {"dropped": 0, "masked": 0, "kept": 0, treated: 160}
    assert set(report["conditions"]) == {disease.name for disease in DISEASES}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "160 cases named their condition in the prompt." in card
    assert f"{160 if treatment == 'keep' else 0} rows name it still." in card


def test_a_case_is_called_the_same_whatever_is_done_with_its_prompt(tmp_path):
    cases = [in_the_form_of_the_hub(case, n) for n, case in enumerate(make_cases(24, seed=1))]
    make_sources(tmp_path, cases)
    for treatment in ("drop", "mask", "keep"):
        keys = f"reader: cases, root: cases, condition_line: PATIENT, diagnosis_in_prompt: {treatment}"
        (tmp_path / "sources.yaml").write_text(f"sources: [{{name: s, {keys}}}]")
        build_instruct(load_sources(tmp_path / "sources.yaml"), tmp_path / treatment)
    ids = [{row["row_id"] for row in read_built(tmp_path / treatment)} for treatment in ("drop", "mask", "keep")]

    assert ids[0] == ids[1] == ids[2]
    assert len(ids[0]) == 24


@pytest.mark.parametrize(("treatment", "groups"), [("keep", 2), ("drop", 1)])
def test_cases_are_grouped_by_what_their_prompts_say_in_the_end(tmp_path, treatment, groups):
    story = "Pain on cold drinks since a month in the upper jaw"
    long_name = "very rare congenital enamel defect of the deciduous second upper molar"
    make_sources(
        tmp_path,
        [make_case(f"{story}, worse when chewing."), make_case(f"{story}. It is {long_name}.", "a", long_name)],
    )
    keys = f"reader: cases, root: cases, diagnosis_in_prompt: {treatment}"
    (tmp_path / "sources.yaml").write_text(f"sources: [{{name: s, {keys}}}]")

    build_instruct(load_sources(tmp_path / "sources.yaml"), tmp_path / "out")

    assert len({row["group_id"] for row in read_built(tmp_path / "out")}) == groups


def test_a_case_with_nothing_but_the_diagnosis_is_left_out_and_counted(tmp_path):
    cases = [make_case("What is the treatment of dental caries?", condition="Dental caries"), make_case(FINDINGS)]

    report = build_instruct(make_sources(tmp_path, cases), tmp_path / "out")

    assert report["problem_counts"]["nothing_left_to_ask"] == 1
    assert [row["prompt"][-1]["content"] for row in read_built(tmp_path / "out")] == [FINDINGS]
    assert "1 cases asked nothing without it and were left out." in (tmp_path / "out" / "README.md").read_text()


def test_cases_that_only_their_diagnosis_told_apart_cannot_be_answered_without_it(tmp_path):
    text = "Male, 40 years, comes with {}. He smokes and takes no tablets."
    cases = [make_case(text.format(name), f"Assessment: {name}.", name) for name in ("pulpitis", "gingivitis")]
    sources = make_sources(tmp_path, [*cases, make_case(FINDINGS)])

    report = build_instruct(sources, tmp_path / "out")

    assert report["problem_counts"]["nothing_left_to_ask"] == 2
    assert len(read_built(tmp_path / "out")) == 1


def test_further_names_of_a_condition_are_those_that_the_source_lists(tmp_path):
    case = make_case(f"PATIENT: tooth decay, 40 years.\n{FINDINGS}", condition="Dental caries")
    make_sources(tmp_path, [case])
    for extra, named in (("", 0), (", synonyms: {dental_caries: [tooth decay], pulpits: [x]}", 1)):
        (tmp_path / "sources.yaml").write_text(f"sources: [{{name: s, reader: cases, root: cases{extra}}}]")
        report = build_instruct(load_sources(tmp_path / "sources.yaml"), tmp_path / "out")

        assert report["problem_counts"].get("answer_in_prompt", 0) == named
        assert report["problem_counts"].get("unused_synonyms", 0) == named


def test_a_case_without_the_line_that_should_hold_its_condition_is_said(tmp_path):
    cases, problems = read_lines(
        tmp_path,
        {"question": f"**Patient:** Pulpitis \n{FINDINGS}", "answer": ANSWER},
        {"question": FINDINGS, "answer": ANSWER},
        condition_line="PATIENT",
    )

    assert [case.condition for case in cases] == ["Pulpitis", None]
    assert [(problem.code, problem.line) for problem in problems] == [("condition_missing", 2)]


def test_personal_data_are_reported_by_kind_and_never_repeated(tmp_path):
    cases = [make_case(FINDINGS), make_case("Mail jane.roe@clinic.example, MRN 0042917, about pain on biting.")]
    sources = make_sources(tmp_path, cases)
    report = build_instruct(sources, tmp_path / "out")
    (problem,) = (problem for problem in report["problems"] if problem["code"] == "pii")

    assert (problem["path"], problem["line"]) == (str(tmp_path / "cases/a.jsonl"), 2)
    assert "e-mail address, record number" in problem["message"]
    assert not any(value in json.dumps(report) for value in ("jane", "0042917"))
    assert "signs of personal data in 1 cases" in (tmp_path / "out" / "README.md").read_text()


def test_the_search_for_personal_data_can_be_turned_off(tmp_path):
    make_sources(tmp_path, [make_case("Mail jane.roe@clinic.example about pain on biting.")])
    (tmp_path / "sources.yaml").write_text("sources: [{name: s, reader: cases, root: cases, pii: off}]")
    report = build_instruct(load_sources(tmp_path / "sources.yaml"), tmp_path / "out")

    assert "pii" not in report["problem_counts"]
    assert "Not searched: s." in (tmp_path / "out" / "README.md").read_text()


def test_the_report_tells_lengths_conditions_and_repeated_answers(tmp_path):
    cases = [make_case(f"pain {word} now", "two words", "a") for word in ("left", "right", "here")]
    cases += [make_case("pain is there all the time", "three words now", "b")]
    sources = make_sources(tmp_path, cases, more="split: {train: 1, validation: 0, test: 0}")

    report = build_instruct(sources, tmp_path / "out")

    assert report["statistics"] == {
        "train": {
            "cases": 4,
            "conditions": 2,
            "without_condition": 0,
            "median_prompt_words": 3,
            "median_answer_words": 2,
            "unique_answers": 0.25,
        }
    }
    assert "| train | 4 | 2 | 3 | 2 | 25.0% |" in (tmp_path / "out" / "README.md").read_text()


def test_a_case_with_one_word_changed_is_in_the_split_of_its_original(tmp_path):
    cases = list(make_cases(100, seed=3))
    for case in cases[:50]:
        text = (
            case["messages"][0]["content"].replace("right", "RIGHT").replace("left", "right").replace("RIGHT", "left")
        )
        cases.append({**case, "messages": [{"role": "user", "content": text}, case["messages"][1]]})

    build_instruct(make_sources(tmp_path, cases), tmp_path / "out")

    listed = [json.loads(line) for line in (tmp_path / "out" / "cases.jsonl").read_text().splitlines()]
    at = {int(case["line"]): case for case in listed}
    assert {case["split"] for case in listed} == {"train", "validation", "test"}
    assert all(at[line]["group_id"] == at[line + 100]["group_id"] for line in range(1, 51))
    assert len({case["group_id"] for case in listed}) > 90


def test_every_condition_is_in_train_even_where_groups_hold_several(tmp_path):
    """Condition two has no case whose prompt is not nearly that of a case of condition one, which comes first."""
    prompts = [case["messages"][0]["content"] for case in make_cases(24, seed=5)]
    cases = [make_case(prompt, "one", "one") for prompt in prompts]
    cases += [make_case(prompt, "two", "two") for prompt in prompts[:2]]
    sources = make_sources(tmp_path, cases, more="split: {train: 0.3, validation: 0.3, test: 0.4}")
    for seed in range(12):
        report = build_instruct(sources, tmp_path / "out", seed=seed)

        assert all(counts["train"] for counts in report["conditions"].values()), report["conditions"]


def test_a_condition_that_only_train_holds_is_said(tmp_path):
    cases = [*make_cases(80, seed=0), make_case("A lump under the tongue.", condition="ranula")]

    report = build_instruct(make_sources(tmp_path, cases), tmp_path / "out")

    assert report["conditions"]["ranula"] == {"train": 1, "validation": 0, "test": 0}
    assert report["problem_counts"] == {"condition_not_held_out": 1}


def test_strict_stops_at_an_unusable_line_and_names_it(tmp_path):
    sources = make_sources(tmp_path, [make_case("Pain on biting."), {"messages": [USER]}])

    with pytest.raises(BuildError, match=r"a\.jsonl:2: the last turn"):
        build_instruct(sources, tmp_path / "out", strict=True)
    assert not (tmp_path / "out").exists()
    assert build_instruct(sources, tmp_path / "out")["problem_counts"]["no_answer"] == 1


def test_a_folder_that_cannot_be_replaced_is_refused_before_anything_is_read(tmp_path):
    sources = make_sources(tmp_path, [{"text": "no usable case"}])

    with pytest.raises(BuildError, match="is not empty"):
        build_instruct(sources, tmp_path)


def test_without_a_usable_case_the_build_says_why(tmp_path):
    with pytest.raises(BuildError, match=r"no usable case(.|\n)*a\.jsonl:1: has none of messages"):
        build_instruct(make_sources(tmp_path, [{"text": "t"}]), tmp_path / "out")


BUILD = """
import sys
from pathlib import Path
from data_builders.instruct import build_instruct
from data_builders.sources import load_sources
build_instruct(load_sources(Path(sys.argv[1])), Path(sys.argv[2]))
"""


def test_rows_are_the_same_bytes_whatever_the_hash_seed(tmp_path):
    make_sources(tmp_path, list(make_cases(120, seed=2)))
    hashes = []
    for hash_seed in ("0", "1"):
        out = tmp_path / f"out{hash_seed}"
        command = [sys.executable, "-c", BUILD, tmp_path / "sources.yaml", out]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": hash_seed})
        files = [*sorted((out / "data").iterdir()), out / "cases.jsonl", out / "build_report.json", out / "README.md"]
        hashes.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])

    assert len(hashes[0]) == 6
    assert hashes[0] == hashes[1]


def test_another_seed_splits_otherwise(tmp_path):
    sources = make_sources(tmp_path, list(make_cases(80, seed=2)))
    for seed in (0, 1):
        build_instruct(sources, tmp_path / f"out{seed}", seed=seed)
    first, second = ({r["row_id"]: r["split"] for r in read_built(tmp_path / f"out{seed}")} for seed in (0, 1))

    assert first.keys() == second.keys()
    assert first != second


@given(
    st.lists(st.frozensets(st.integers(0, 12), min_size=1, max_size=9), max_size=25), st.sampled_from([0.5, 0.7, 0.9])
)
def test_near_duplicates_are_all_the_pairs_above_the_threshold(sets, threshold):
    expected = {
        (one, other)
        for one, other in combinations(range(len(sets)), 2)
        if len(sets[one] & sets[other]) >= threshold * len(sets[one] | sets[other]) - 1e-9
    }

    found = list(find_near_duplicates(sets, threshold, known=Groups()))

    assert {(min(pair), max(pair)) for pair in found} == expected
    assert len(found) == len(expected)


# Synthetic cases


def test_synthetic_cases_never_name_their_condition_and_are_marked(tmp_path):
    write_cases(tmp_path / "a.jsonl", count=400, seed=0)
    entries = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]

    assert len({entry["messages"][0]["content"] for entry in entries}) == 400
    assert {entry["condition"] for entry in entries} == {disease.name for disease in DISEASES}
    for entry in entries:
        prompt, answer = (message["content"] for message in entry["messages"])
        assert entry["synthetic"] and prompt.startswith("Synthetic case")
        assert not any(disease.name in prompt.lower() for disease in DISEASES)
        assert answer.startswith(f"Assessment: {entry['condition']}.\nPlan: ")


def test_the_answer_follows_from_the_findings_of_the_case():
    for first, second in combinations(DISEASES, 2):
        assert not set(first.findings) & set(second.findings)
        assert not set(first.complaints) & set(second.complaints)
        assert not set(first.images) & set(second.images)


def test_a_synthetic_case_does_not_depend_on_how_many_are_made():
    assert list(make_cases(30, seed=3))[:10] == list(make_cases(10, seed=3))
    assert list(make_cases(10, seed=3)) != list(make_cases(10, seed=4))
