"""What the pages in `docs/` say: the site builds without a warning, its examples run, its tables fit the code."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import REPOSITORY
from PIL import Image

from data_builders.audit import read_sources
from data_builders.phantom_formats import write_phantoms
from data_builders.sources import Source, SourcesFile, load_sources
from data_builders.vqa import build_vqa

DOCS = REPOSITORY / "docs"
PROBLEM_CODES = "## Problem codes"


def page(name):
    return (DOCS / name).read_text(encoding="utf-8")


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_site(repository, folder):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build_site(REPOSITORY, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_builds_with_warnings_as_errors(site):
    pages = [path.stem for path in site.glob("*.html")]

    assert {path.stem for path in DOCS.glob("*.md")} <= {*pages}
    assert not list(site.rglob("*.py"))


def test_a_link_that_leads_nowhere_stops_the_build(tmp_path):
    shutil.copytree(DOCS, tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "mkdocs.yml", tmp_path)
    with (tmp_path / "docs" / "index.md").open("a", encoding="utf-8") as file:
        file.write("\n[a](nowhere.md) [b](datasets.md#no-such-heading) [c](../no_such_file.md)\n")
    (tmp_path / "docs" / "not_in_nav.md").write_text("# Lost\n")

    done = build_site(tmp_path, tmp_path / "site")

    assert done.returncode == 1
    for lost in ("nowhere.md", "#no-such-heading", "../no_such_file.md", "not_in_nav.md"):
        assert lost in done.stdout + done.stderr


def test_no_page_asks_for_anything_outside(site):
    """What a browser fetches by itself: scripts, styles, pictures, fonts; links wait to be clicked."""
    fetched = re.compile(r"""(?:\bsrc="?|<link[^>]*\bhref="?|url\(["']?)(https?:)?//""")

    for path in [*site.rglob("*.html"), *site.rglob("*.css")]:
        assert not fetched.search(path.read_text(encoding="utf-8")), path.name
    assert fetched.search('<script src="https://unpkg.com/iframe-worker/shim"></script>')  # what the plugin would add


def test_links_out_of_the_site_name_files_that_are_there(site):
    named = set()
    for path in site.glob("*.html"):
        html = path.read_text(encoding="utf-8")
        named |= set(
            re.findall(r'href="?https://github\.com/dentalgemma/dentalgemma/(?:blob|tree)/main/([^"#> ]+)', html)
        )

    assert named
    assert not [name for name in named if not (REPOSITORY / name).exists()]


def test_a_page_opened_from_the_disk_can_be_searched_and_asks_for_nothing_outside(site):
    from playwright.sync_api import sync_playwright

    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    asked = []
    with sync_playwright() as playwright:
        window = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-dev-shm-usage"])
        tab = window.new_page()
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto((site / "index.html").as_uri())
        tab.wait_for_selector(".md-search-result__meta", state="attached")
        tab.locator("[data-md-component=search-query]").press_sequentially("jpegtran")  # the page listens to keys
        tab.wait_for_selector(".md-search-result__item", timeout=60_000)
        found = tab.inner_text(".md-search-result__list")
        window.close()

    assert "Datasets" in found or "dataset" in found
    assert asked and all(url.startswith(("file:", "data:", "blob:")) for url in asked), asked


def test_the_command_line_page_is_what_the_commands_say():
    written = load_script("write_cli").write_page()

    assert page("cli.md") == written, "python docs/write_cli.py"


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """Every layout that the pages show: a few phantoms, and a DENTEX file as the page has it."""
    folder = tmp_path_factory.mktemp("layouts")
    write_phantoms(folder, count=10, cases=20, seed=3, progress=False)
    (folder / "dentex" / "xrays").mkdir(parents=True)
    (document,) = blocks(page("datasets.md"), "json")
    json.loads(document)
    (folder / "dentex" / "train_quadrant_enumeration_disease.json").write_text(document)
    Image.new("L", (200, 100)).save(folder / "dentex" / "xrays" / "train_0.png")
    return folder


def documented_sources():
    return [text for text in blocks(page("datasets.md"), "yaml") if text.startswith("sources:")]


def test_the_trees_are_what_lies_there(layouts):
    trees = [text.splitlines() for text in blocks(page("datasets.md"), "text") if "──" in text]
    shown = [
        (lines[0], re.sub(r"^\W+", "", line))
        for lines in trees
        for line in lines[1:]
        if not lines[0].startswith("data")
    ]

    assert len(shown) >= 20
    for root, name in shown:
        assert (layouts / root / name.strip("─ ")).exists() or (layouts / root / f"_{name}").exists(), f"{root}{name}"


@pytest.mark.parametrize(
    "text", [pytest.param(text, id=yaml.safe_load(text)["sources"][0]["name"]) for text in documented_sources()]
)
def test_each_sources_file_is_read_without_an_error(text, layouts):
    path = layouts / "sources_of_the_page.yaml"
    path.write_text(text)

    for content in read_sources(load_sources(path), progress=False):
        assert not [problem for problem in content.problems if problem.severity in ("error", "warning")]
        assert content.cases or any(record.findings for record in content.records)
        if content.source.name == "dentex":
            assert [(f.label, f.tooth) for record in content.records for f in record.findings] == [("caries", "46")]


def test_all_formats_of_the_page_make_one_dataset(layouts, tmp_path):
    sources = [entry for text in documented_sources() for entry in yaml.safe_load(text)["sources"]]
    path = layouts / "all.yaml"
    path.write_text(yaml.safe_dump({"sources": [entry for entry in sources if entry["reader"] != "cases"]}))

    report = build_vqa(load_sources(path), tmp_path / "all", progress=False, gallery=0)

    assert len(report["sources"]) == 10
    assert all(source["images_built"] for source in report["sources"])


def test_every_key_of_a_sources_file_is_explained():
    named = set(
        re.findall(r"`(\w+)`", page("datasets.md").split("## The sources file, key by key")[1].split("### ")[0])
    )

    assert {*SourcesFile.model_fields, *Source.model_fields} - {"path"} <= named


def codes_in_the_source():
    """Every problem code: what is given to Problem, Note, `note`, BadAnnotation and ImageError as such."""
    places = {"Problem": 0, "Note": 0, "note": 0, "BadAnnotation": 0, "ImageError": 1}
    found = set()
    for path in (REPOSITORY / "data_builders").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", getattr(node.func, "attr", None))
                code = node.args[places[name]] if name in places and len(node.args) > places[name] else None
                if isinstance(code, ast.Constant):
                    found.add(code.value)
            elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "reasons":
                found |= {key.value for key in node.value.keys} if isinstance(node.value, ast.Dict) else set()
    return found


def test_every_problem_code_has_its_meaning_and_remedy():
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|$", page("datasets.md").split(PROBLEM_CODES)[1], re.MULTILINE)
    codes = [code for code, _, _ in rows]

    assert len(codes) == len(set(codes)) > 90
    assert set(codes) == codes_in_the_source()


def test_codes_that_stop_a_build_say_so():
    from data_builders.dataset_folder import BLOCKING

    text = page("datasets.md").split(PROBLEM_CODES)[1]
    stopping = re.findall(r"^\| `(\w+)` \| [^|]*stops the build", text, re.MULTILINE)

    assert set(stopping) == set(BLOCKING)


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the source to which everything that the page on extending shows was done."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(
        REPOSITORY / "data_builders", folder / "data_builders", ignore=shutil.ignore_patterns("__pycache__")
    )
    text = page("extending.md")
    for block in blocks(text, "python") + blocks(text, "yaml"):
        first, _, content = block.partition("\n")
        (folder / first.removeprefix("# ")).write_text(content, encoding="utf-8")
    for block in blocks(text, "diff"):
        for part in re.split(r"^--- ", block, flags=re.MULTILINE)[1:]:
            name, _, hunks = part.partition("\n")
            for hunk in hunks.split("@@\n"):
                apply(hunk, folder / name)
    return folder


def apply(hunk, path):
    """Replace the lines of a hunk, which must be there exactly once."""
    lines = hunk.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line[0] in " -")
    after = "".join(line[1:] for line in lines if line[0] in " +")
    text = path.read_text(encoding="utf-8")
    assert text.count(before) == 1, f"{path.name} has {text.count(before)} times:\n{before}"
    path.write_text(text.replace(before, after), encoding="utf-8")


SCRIPT = """
import json, sys
from pathlib import Path
import pyarrow.parquet as pq
import data_builders
from data_builders.audit import read_source
from data_builders.phantom import make_phantoms
from data_builders.phantom_formats import write_phantoms
from data_builders.proof import check_dataset
from data_builders.sources import load_sources
from data_builders.vqa import build_vqa

assert Path(data_builders.__file__).is_relative_to(Path.cwd())
write_phantoms(Path("."), count=12, seed=3, formats=("yolo", "labelme"), progress=False)
truth = {phantom.name: sorted(f.label for f in phantom.findings) for phantom in make_phantoms(12, seed=3)}
found = {r.path.stem: sorted(f.label for f in r.findings)
         for r in read_source(load_sources(Path("sources_labelme.yaml")).sources[0], progress=False).records}
for name in ("sources_labelme.yaml", "sources_with_own_findings.yaml"):
    build_vqa(load_sources(Path(name)), Path("out") / name, progress=False, gallery=0)
rows = [row for name in sys.argv[1:] for row in pq.read_table(f"out/{name}/data", columns=["question_type", "prompt",
        "completion"]).to_pylist()]
print(json.dumps({
    "reader": truth == found,
    "wrong": sum(bool(wrong) for name in sys.argv[1:] for _, wrong in check_dataset(Path("out") / name)),
    "jaw": [row["prompt"][-1]["content"] for row in rows if row["question_type"] == "jaw"],
    "answers": sorted({row["completion"][0]["content"] for row in rows if row["question_type"] == "jaw"}),
    "all": " ".join(row["completion"][0]["content"] for row in rows),
}))
"""


@pytest.fixture(scope="module")
def ran(extended):
    """What the extended toolkit reads, builds and proves, in a process of its own."""
    command = [sys.executable, "-c", SCRIPT, "sources_labelme.yaml", "sources_with_own_findings.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(extended), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, cwd=extended, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_reader_of_the_page_finds_the_drawn_truth(ran):
    assert ran["reader"]


def test_the_question_family_of_the_page_is_asked_and_proven(ran):
    assert any("jaw" in question for question in ran["jaw"])
    assert any("maxilar" in question for question in ran["jaw"])
    assert {"In the maxilla.", "In the mandible."} <= set(ran["answers"])
    assert ran["wrong"] == 0


def test_the_finding_of_the_page_is_spoken_of_in_both_languages(ran):
    assert "supernumerary t" in ran["all"]
    assert "supernumerario" in ran["all"]


def section(name, title):
    """The text under a heading of a page, down to the next heading of its level or above."""
    level = title.split(" ")[0]
    text = page(name).split(f"\n{title}\n")[1]
    return re.split(rf"^#{{2,{len(level)}}} ", text, flags=re.MULTILINE)[0]


def named(text):
    return set(re.findall(r"`(\w+)`", text))


def first_column(text):
    return {
        name for row in re.findall(r"^\| ([^|]+) \|", text, re.MULTILINE) for name in re.findall(r"`([\w.]+)`", row)
    }


def constants(*paths):
    """Every string in the code of these files, which a key that they write must be among."""
    trees = [ast.parse((REPOSITORY / path).read_text(encoding="utf-8")) for path in paths]
    return {node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)}


def test_the_columns_claims_and_records_are_those_of_a_built_dataset(vqa_dataset):
    from dataclasses import fields

    import pyarrow.parquet as pq

    from data_builders.claims import Claim

    (shard,) = (vqa_dataset / "data").glob("train-*.parquet")
    record = json.loads((vqa_dataset / "records.jsonl").read_text().splitlines()[0])
    report = json.loads((vqa_dataset / "build_report.json").read_text())

    assert first_column(section("contracts.md", "### Rows")) == set(pq.read_schema(shard).names)
    assert first_column(section("contracts.md", "### Claims")) == {field.name for field in fields(Claim)}
    assert {*record, *record["findings"][0]} <= named(section("contracts.md", "### records.jsonl"))
    told = named(section("contracts.md", "### build_report.json").split("Instruct:")[0])
    assert told - {"build_report"} == set(report)


def test_the_report_of_cases_is_as_written(instruct_dataset):
    told = section("contracts.md", "### build_report.json").split("Instruct:")[1].split("An entry")[0]

    assert named(told) == set(json.loads((instruct_dataset / "build_report.json").read_text()))


def test_the_run_facts_are_all_explained():
    tree = ast.parse((REPOSITORY / "dentalgemma/training/run_facts.py").read_text(encoding="utf-8"))
    facts = next(
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "facts"
    )

    assert first_column(section("contracts.md", "## Run folder")) - {"key"} == {key.value for key in facts.keys}


def test_the_keys_of_certificates_are_written_by_somebody():
    parts = ("merging", "folding", "parity", "stacking", "quantizing")
    written = constants(*(f"dentalgemma/{name}.py" for name in parts))

    assert named(section("contracts.md", "### merge_certificate.json").split("Logits are")[0]) <= written


def test_the_fields_of_questions_predictions_and_verdicts_are_those_of_the_code():
    from dentalgemma.evaluation.questions import Question

    folder = "dentalgemma/evaluation/"
    asked = constants(*(f"{folder}{name}.py" for name in ("generation", "predictions", "likelihood")))
    judged = constants(f"{folder}judge.py")

    assert first_column(section("contracts.md", "## Questions")) == {*Question.__dataclass_fields__}
    assert named(section("contracts.md", "## Predictions")) <= asked
    assert named(section("contracts.md", "## Verdicts")) <= judged


def test_every_form_of_document_is_listed():
    code = "".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "dentalgemma").rglob("*.py"))
    formats = set(re.findall(r'"([a-z-]+/\d)"', code))

    assert formats <= set(re.findall(r"`([a-z-]+/\d)`", page("contracts.md")))


def test_every_environment_variable_of_ours_is_listed():
    """Ours by name, and what is asked of the environment by a name in the code."""
    told = set(re.findall(r"`([A-Z_]{4,})`", section("contracts.md", "## Environment variables")))
    code = "".join(
        path.read_text(encoding="utf-8")
        for package in ("dentalgemma", "data_builders", "recipes")
        for path in (REPOSITORY / package).rglob("*.py")
    )
    asked = set(re.findall(r"\b(DENTALGEMMA_[A-Z_]+)\b", code))
    asked |= set(re.findall(r"environ(?:\.get\(|\[)[\"']([A-Z_]+)[\"'](?!\] =)", code))

    assert asked <= told


def test_the_public_names_can_be_imported_and_the_example_runs(layouts, monkeypatch, capsys):
    names, example = blocks(page("contracts.md"), "python")
    monkeypatch.chdir(layouts)

    exec(compile(names, "contracts.md", "exec"), {})
    exec(compile(example, "contracts.md", "exec"), {})

    assert "phantom00000.jpg" in capsys.readouterr().out


def test_every_setting_of_a_stage_has_its_default():
    tree = ast.parse((REPOSITORY / "dentalgemma/training/config.py").read_text(encoding="utf-8"))
    stage = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "StageConfig")
    defaults = {}
    for node in stage.body:
        if isinstance(node, ast.AnnAssign):
            given = {keyword.arg: keyword.value for keyword in node.value.keywords}
            made = given["default"] if "default" in given else getattr(given["default_factory"], "body", None)
            defaults[node.target.id] = [] if made is None else ast.literal_eval(made)
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", section("training.md", "## Settings"), re.MULTILINE)

    assert {name: ast.literal_eval(default) for name, default in rows} == defaults


def test_settings_in_yaml_blocks_exist():
    settings = blocks(page("training.md"), "yaml")
    known = section("training.md", "## Settings")

    assert settings
    assert {key for text in settings for key in yaml.safe_load(text)} <= named(known)


def test_links_of_pages_on_code_lead_to_what_they_name():
    """`PARTS` in [`models/parts.py`](…): the name is in that file."""
    found = re.findall(r"`(\w+)`(?: and `(\w+)`)? in\s+\[`[^`]+`\]\(\.\./([^)]+)\)", page("extending.md"))

    assert len(found) >= 3
    for first, second, path in found:
        code = (REPOSITORY / path).read_text(encoding="utf-8")
        assert all(re.search(rf"^(class )?{name}\b", code, re.MULTILINE) for name in filter(None, (first, second)))
