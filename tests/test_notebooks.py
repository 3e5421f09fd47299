"""The notebooks: executed on a small model as Colab and Kaggle would, and that they say what the code says."""

import ast
import dataclasses
import http.server
import json
import os
import re
import runpy
import shlex
import sys
import threading
import types
import zipfile
from itertools import pairwise

import nbclient
import nbformat
import pytest
import typer
import yaml
from conftest import REPOSITORY
from loopback_hub import TOKEN, Hub, client_environment
from trl import ModelConfig, SFTConfig
from warm_python import warm_up

import dentalgemma
from dentalgemma import quickstart
from dentalgemma.cli import app
from dentalgemma.publishing.space import name_revision
from dentalgemma.training.config import StageConfig

FOLDER = REPOSITORY / "notebooks"
NAMES = ("quickstart_cpu", "train_a100", "train_t4_qlora")
TRAINING = NAMES[1:]
WORK = {"quickstart_cpu": "quickstart", "train_a100": "dental", "train_t4_qlora": "dental"}
STAGES = {"quickstart_cpu": 2, "train_a100": 2, "train_t4_qlora": 1}
COMMANDS = typer.main.get_command(app).commands
SETTINGS = {f"--{field.name}" for kind in (StageConfig, SFTConfig, ModelConfig) for field in dataclasses.fields(kind)}
FEW = (
    "--max_steps 2 --eval_steps 2 --save_steps 2 --per_device_train_batch_size 2 --memory fixed --lora_r 4 "
    "--validation_sample 2 --dataloader_num_workers 0 --per_device_eval_batch_size 16"
)


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code(name):
    return [cell.source for cell in read(name).cells if cell.cell_type == "code"]


def fields(name):
    """The `# @param` fields of a notebook, with the values that they start with."""
    found = re.findall(r"^([A-Z_0-9]+) = (.*?)  # @param ", "\n".join(code(name)), flags=re.MULTILINE)
    return {key: ast.literal_eval(value) for key, value in found}


def execute(name, folder, environment, **parameters):
    """Run a notebook with other values in its `# @param` fields, and return what its cells showed."""
    notebook = read(name)
    for key, value in parameters.items():
        field = re.compile(rf"^{key} = .*?(?=  # @param )", flags=re.MULTILINE)
        (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and field.search(cell.source)]
        cell.source = field.sub(lambda _, key=key, value=value: f"{key} = {value!r}", cell.source)
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


@pytest.fixture(scope="module")
def hub():
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def environment(hub, tmp_path_factory):
    """One in which there is no other Hub, and commands start warm."""
    folder = tmp_path_factory.mktemp("warm")
    quiet = {"PYTHONWARNINGS": "ignore::FutureWarning", "OMP_NUM_THREADS": "1"}
    with warm_up(folder, client_environment(hub, folder / "home") | quiet) as environment:
        yield environment


@pytest.fixture(scope="module")
def executed(tiny_model, environment, tmp_path_factory):
    """What each notebook showed, and the folder it worked in; executed once, with a Hub that records all requests."""
    results = {}

    def execute_once(name):
        if name not in results:
            folder = tmp_path_factory.mktemp(name)
            if name == "quickstart_cpu":
                few = dict(IMAGES=60, CASES=60, TOWER_STEPS=5, STAGE1_STEPS=2, STAGE2_STEPS=2)
            else:
                few = dict(MODEL=str(tiny_model), PHANTOMS=60, PROBE_QUESTIONS=12, MORE=FEW, DTYPE="float32")
                few |= dict(ALLOW_CPU=True, PUSH=True, REPO=f"me/{name}")
                few |= {"ANSWERS": "loglikelihood"} if name == "train_a100" else {}
            results[name] = execute(name, folder, environment, **few), folder / WORK[name]
        return results[name]

    return execute_once


@pytest.mark.parametrize("name", NAMES)
def test_the_notebook_runs_from_top_to_bottom(name, executed):
    outputs, folder = executed(name)
    certificate = json.loads((folder / "models" / "dentalgemma" / "merge_certificate.json").read_text())
    pages = "".join(output.data.get("text/html", "") for output in outputs if "data" in output)
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]

    assert certificate["passed"]
    assert len(certificate["stages"]) == len(pictures) == STAGES[name]
    assert (folder / "models" / "dentalgemma" / "README.md").is_file()
    assert pages.count("data:image/jpeg;base64,") == pages.count("<th>annotations behind it</th>") == 3
    assert "<td>base</td>" in pages and "<td>tuned</td>" in pages
    assert not [output for output in outputs if output.output_type == "error"]


@pytest.mark.parametrize("name", TRAINING)
def test_the_notebook_publishes_privately_when_told_to(name, executed, hub):
    executed(name)
    repo = hub.repos["model", f"me/{name}"]
    weights = {"train_a100": "model.safetensors", "train_t4_qlora": "adapter_model.safetensors"}[name]

    assert repo.private
    assert {weights, "README.md", "merge_certificate.json"} <= set(repo.files)
    card = repo.files["README.md"].data.decode()
    assert f'"me/{name}"' in card and "OWNER/NAME" not in card


def test_the_card_of_both_stages_has_scores_contamination_and_a_model_index(executed):
    _, folder = executed("train_a100")
    scores = json.loads((folder / "scores.json").read_text())["closed"]
    _, front, body = (folder / "models" / "dentalgemma" / "README.md").read_text().split("---\n", 2)
    (entry,) = yaml.safe_load(front)["model-index"]
    (result,) = entry["results"]

    assert result["dataset"]["name"] == "Closed questions, held-out split of phantoms (drawn radiographs)"
    accuracies = [metric["value"] for metric in result["metrics"] if metric["type"] == "accuracy"]
    assert accuracies == [pytest.approx(100 * scores["correct"] / scores["n"], abs=0.005)]
    for dataset in ("vqa", "instruct"):
        assert re.search(rf"^Contamination: .* was found where {dataset} trains or validates", body, flags=re.MULTILINE)


@pytest.mark.parametrize("name", TRAINING)
def test_nothing_is_published_unless_told_to(name):
    assert fields(name)["PUSH"] is False
    (cell,) = [source for source in code(name) if "dentalgemma push" in source]
    (condition,) = ast.parse(cell).body

    assert isinstance(condition, ast.If) and condition.test.id == "PUSH"
    assert "push" in ast.unparse(condition.body) and "run(" not in ast.unparse(condition.orelse)


@pytest.mark.parametrize("name", NAMES)
def test_the_token_is_in_no_output_no_file_and_no_request_body(name, executed, hub):
    outputs, folder = executed(name)

    assert TOKEN not in json.dumps(outputs)
    assert not [path for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert not [request for request in hub.requests if TOKEN.encode() in request.body]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_short(name, executed):
    outputs, _ = executed(name)
    lines = "".join(output.get("text", "") for output in outputs).splitlines()

    assert len(lines) < 250
    assert not [line for line in lines if "%|" in line or "━ 100%" in line]


def test_they_are_what_their_sources_give():
    writer = runpy.run_path(str(FOLDER / "write_notebooks.py"))

    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)
    for name in NAMES:
        stale = f"{name}.ipynb is not what its source gives: run `python notebooks/write_notebooks.py`"
        assert (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8") == writer["write_notebook"](name), stale


@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_clean_and_says_which_machine_it_wants(name):
    notebook = read(name)
    nbformat.validate(notebook)
    gpu = {"quickstart_cpu": None, "train_a100": "A100", "train_t4_qlora": "T4"}[name]
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")

    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert not any(cell.outputs or cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    assert notebook.metadata.colab.get("gpuType") == gpu
    assert notebook.metadata.get("accelerator") == ("GPU" if gpu else None)
    assert notebook.metadata.kaggle.isInternetEnabled
    assert f"colab.research.google.com/github/dentalgemma/dentalgemma/blob/main/notebooks/{name}.ipynb" in text
    assert (
        f"kaggle.com/kernels/welcome?src=https://github.com/dentalgemma/dentalgemma/blob/main/notebooks/{name}" in text
    )
    assert "no medical device" in text
    assert gpu is None or "https://huggingface.co/google/medgemma-1.5-4b-it" in text


@pytest.mark.parametrize("name", NAMES)
def test_every_code_cell_is_explained_by_a_text_above_it(name):
    cells = read(name).cells

    assert not [
        cell.source
        for above, cell in pairwise(cells)
        if cell.cell_type == "code" and (above.cell_type != "markdown" or above.source.startswith("[!["))
    ]


def launches(name):
    """What a notebook's `run` is told: the words that are written out, and each option with the name of its value."""
    for source in code(name):
        for call in [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]:
            if not (isinstance(call.func, ast.Name) and call.func.id == "run"):
                continue
            first, *rest = call.args
            words = shlex.split(first.value) if isinstance(first, ast.Constant) else ["accelerate", "launch"]
            written = [part.value for part in rest if isinstance(part, ast.Constant)]
            named = {
                option.value: value.id
                for option, value in pairwise(rest)
                if isinstance(option, ast.Constant) and isinstance(value, ast.Name)
            }
            yield words, [word for word in [*words, *written] if word.startswith("--")], named, ast.unparse(call)


@pytest.mark.parametrize("name", NAMES)
def test_every_command_exists_with_its_options(name):
    for words, options, _, call in launches(name):
        known = {"--config", "--config_file"} | SETTINGS if words[0] == "accelerate" or words[1] == "doctor" else set()
        if words[0] == "dentalgemma":
            known |= {option for parameter in COMMANDS[words[1]].params for option in parameter.opts}
        assert set(options) <= known, call


@pytest.mark.parametrize("name", TRAINING)
def test_a_field_that_sets_what_a_recipe_sets_starts_with_the_recipes_value(name):
    start, seen = fields(name), set()
    for words, _, named, call in launches(name):
        if words[0] != "accelerate" and words[1] != "doctor":
            continue
        recipe = "stage2_instruct" if "stage2" in call else "stage1_vqa_t4" if "CONFIG" in call else "stage1_vqa"
        settings = yaml.safe_load((REPOSITORY / "recipes" / f"{recipe}.yaml").read_text())
        for option, field in named.items():
            key = option.removeprefix("--")
            if field in start and key in settings:
                default = settings[key]
                assert start[field] == (default if isinstance(start[field], str) else float(default)), (option, recipe)
                seen.add((recipe, key))

    own = {"train_a100": ("stage1_vqa", "stage2_instruct"), "train_t4_qlora": ("stage1_vqa_t4",)}[name]
    assert {(recipe, key) for recipe in own for key in ("learning_rate", "num_train_epochs")} <= seen
    assert (own[0], "model_name_or_path") in seen


def test_the_quickstart_starts_with_the_numbers_of_the_command():
    assert fields("quickstart_cpu") == {
        "IMAGES": quickstart.IMAGES,
        "CASES": quickstart.CASES,
        "TOWER_STEPS": quickstart.TOWER["steps"],
        "STAGE1_STEPS": quickstart.STAGE1["--max_steps"],
        "STAGE2_STEPS": quickstart.STAGE2["--max_steps"],
        "SEED": 0,
        "WORK": "quickstart",
    }
    assert quickstart.TOWER["phantoms"] == 5 * quickstart.TOWER["steps"]  # as the notebook has it


def cell(name, words):
    """The one code cell with these words, run here; what it prints goes to the test."""
    (source,) = [source for source in code(name) if words in source]
    return compile(source, name, "exec")


def colab(secret):
    """A stand-in for Colab's own module, which is found nowhere else."""
    userdata = types.ModuleType("userdata")
    userdata.SecretNotFoundError = type("SecretNotFoundError", (Exception,), {})
    userdata.NotebookAccessError = type("NotebookAccessError", (Exception,), {})

    def get(name):
        if isinstance(secret, str):
            return {"HF_TOKEN": secret}[name]
        raise getattr(userdata, secret.__name__)

    userdata.get = get
    return types.SimpleNamespace(userdata=userdata)


@pytest.fixture
def platform(monkeypatch, tmp_path):
    """Ask the login cell what it does on a platform; returns the token that commands will see."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    shown = []
    monkeypatch.setattr("huggingface_hub.notebook_login", lambda: shown.append("form"))

    def log_in(**modules):
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name.replace("__", "."), module)
        environment = dict(os.environ)
        monkeypatch.setattr(os, "environ", environment)
        namespace = {"sys": sys, "os": os, "Path": type(tmp_path), "MODEL": "google/medgemma-1.5-4b-it", "PUSH": False}
        exec(cell("train_a100", "def read_secret"), namespace)
        assert not [value for value in namespace.values() if value == TOKEN]  # nothing a later cell could show
        return environment.get("HF_TOKEN"), shown

    return log_in


def test_colab_gives_its_secret(platform, capsys):
    token, _ = platform(google__colab=colab(TOKEN))

    assert token == TOKEN
    assert TOKEN not in capsys.readouterr().out


@pytest.mark.parametrize("reason", ["SecretNotFoundError", "NotebookAccessError"])
def test_where_colab_gives_no_secret_a_form_appears(platform, reason, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    token, shown = platform(google__colab=colab(type(reason, (), {})))

    assert token is None
    assert shown == ["form"]


def test_kaggle_gives_its_secret(platform, monkeypatch, capsys):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    client = type("UserSecretsClient", (), {"get_secret": lambda self, name: {"HF_TOKEN": TOKEN + "\n"}[name]})
    token, _ = platform(kaggle_secrets=types.SimpleNamespace(UserSecretsClient=client))

    assert token == TOKEN
    assert TOKEN not in capsys.readouterr().out


@pytest.fixture
def choose_data(monkeypatch, tmp_path):
    """Run the cells that find the data, on Colab where it is to upload these ZIP files or mount a Drive."""
    monkeypatch.chdir(tmp_path)
    commands = []

    def choose(*, zips=None, mounted=False, **fields):
        if zips is not None or mounted:
            for name, members in (zips or {}).items():
                (tmp_path / name).write_text("sources: []\n")
                if members:
                    with zipfile.ZipFile(tmp_path / name, "w") as archive:
                        for member in members:
                            archive.writestr(member, "images: images\n")
            asked = types.SimpleNamespace(upload=lambda: commands.append("asked") or dict.fromkeys(zips, b""))
            drive = types.SimpleNamespace(mount=lambda where: commands.append(f"mounted {where}"))
            colab_module = types.ModuleType("google.colab")
            colab_module.files, colab_module.drive = asked, drive
            monkeypatch.setitem(sys.modules, "google.colab", colab_module)
        start = {"SOURCES": "", "UPLOAD": False, "PRESET_DATA": "", "PHANTOMS": 3, "WORK": "dental", "DRIVE": False}
        namespace = start | {"CASES": "", "sys": sys, "Path": type(tmp_path)} | fields
        namespace["run"] = lambda *words: commands.append(" ".join(map(str, words)))
        for words in ("if DRIVE:", "def find_uploaded", "if CASES:"):
            exec(cell("train_a100", words), namespace)
        return namespace, commands

    return choose


def test_an_uploaded_zip_gives_sources_and_cases_and_is_asked_for_once(choose_data, capsys):
    zips = {"mine.zip": ["mine/sources.yaml", "mine/cases.yaml", "mine/cases.jsonl"]}
    namespace, commands = choose_data(zips=zips, UPLOAD=True)

    assert [str(path) for path in namespace["chosen"]] == ["dental/upload/mine/sources.yaml"]
    assert commands == ["asked", "dentalgemma build-instruct dental/upload/mine/cases.yaml --out dental/data/instruct"]
    assert choose_data(zips=zips, UPLOAD=True)[1].count("asked") == 1
    assert "delete that folder to upload anew" in capsys.readouterr().out


def test_cases_that_are_named_go_before_those_of_the_zip(choose_data):
    zips = {"mine.zip": ["sources.yaml", "cases.yaml"]}
    _, commands = choose_data(zips=zips, UPLOAD=True, CASES="other.yaml")

    assert commands[-1] == "dentalgemma build-instruct other.yaml --out dental/data/instruct"


@pytest.mark.parametrize(
    ("zips", "said"),
    [
        ({"mine.zip": ["images/a.png"]}, "No sources.yaml was uploaded: pack it"),
        ({}, "No sources.yaml was uploaded: pack it"),
        ({"mine.zip": ["a/sources.yaml", "b/sources.yaml"]}, "holds sources.yaml 2 times: remove all but one"),
        ({"sources.yaml": []}, "sources.yaml is no ZIP: pack"),
        (None, "UPLOAD is for Colab. On Kaggle: Add Input"),
    ],
)
def test_an_upload_that_gives_no_sources_says_what_to_do(zips, said, choose_data):
    with pytest.raises(RuntimeError, match=re.escape(said)):
        choose_data(zips=zips, UPLOAD=True)


def test_two_ways_to_name_data_are_one_too_many(choose_data):
    with pytest.raises(RuntimeError, match="SOURCES and UPLOAD both name data"):
        choose_data(zips={}, UPLOAD=True, SOURCES="mine/sources.yaml")


def test_own_sources_without_cases_leave_stage_2_out_and_say_so(choose_data, capsys):
    namespace, commands = choose_data(SOURCES="mine/sources.yaml")

    assert namespace["cases"] == [] and commands == []
    assert "stage 2 will be left out" in capsys.readouterr().out


def test_a_drive_holds_the_work_folder_that_was_named(choose_data, monkeypatch, capsys):
    made = []
    monkeypatch.setattr("pathlib.Path.mkdir", lambda path, **_: made.append(str(path)))
    namespace, commands = choose_data(mounted=True, DRIVE=True, WORK="molars", SOURCES="mine/sources.yaml")

    assert str(namespace["WORK"]) == "/content/drive/MyDrive/molars" and made == ["/content/drive/MyDrive/molars"]
    assert commands == ["mounted /content/drive"]
    assert "Everything is written to /content/drive/MyDrive/molars" in capsys.readouterr().out


def test_a_drive_is_for_colab_alone(choose_data):
    with pytest.raises(RuntimeError, match=r"DRIVE is for Colab; Kaggle keeps .* Set DRIVE = False"):
        choose_data(DRIVE=True)


def look_at_machine(name, monkeypatch, tmp_path, *, gpu, allow_cpu=False):
    """Run the cells that look at the GPU, where `nvidia-smi` prints `gpu` or is missing."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if gpu:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{gpu}'\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    namespace = {"os": os, "subprocess": __import__("subprocess"), "ALLOW_CPU": allow_cpu}
    exec(cell(name, "def list_gpus"), namespace)
    exec(cell(name, "has_bf16:\n"), namespace)
    return namespace["LAUNCH"]


@pytest.mark.parametrize("name", TRAINING)
def test_without_a_gpu_it_stops_and_says_where_to_choose_one(name, monkeypatch, tmp_path):
    with pytest.raises(RuntimeError, match="No GPU here: choose one"):
        look_at_machine(name, monkeypatch, tmp_path, gpu=None)

    assert "cpu.yaml" in look_at_machine(name, monkeypatch, tmp_path, gpu=None, allow_cpu=True)


def test_a_t4_is_sent_to_its_own_notebook(monkeypatch, tmp_path, capsys):
    with pytest.raises(RuntimeError, match=r"Tesla T4 has no bf16: .*train_t4_qlora\.ipynb"):
        look_at_machine("train_a100", monkeypatch, tmp_path, gpu="Tesla T4, 15360, 7.5")

    assert "single_gpu.yaml" in look_at_machine("train_t4_qlora", monkeypatch, tmp_path, gpu="Tesla T4, 15360, 7.5")
    assert "Tesla T4, 15 GiB, bf16: no" in capsys.readouterr().out
    look_at_machine("train_a100", monkeypatch, tmp_path, gpu="NVIDIA A100-SXM4-40GB, 40960, 8.0")
    assert "bf16: yes" in capsys.readouterr().out


def install_cell():
    namespace = {}
    exec(cell("train_t4_qlora", "def choose_pins"), namespace)
    return namespace


def test_the_install_cell_takes_this_code_and_is_skipped_where_it_is_there(capsys):
    namespace = install_cell()

    assert (namespace["VERSION"], namespace["REVISION"]) == (
        dentalgemma.__version__,
        name_revision(dentalgemma.__version__),
    )
    assert capsys.readouterr().out == f"DentalGemma {dentalgemma.__version__}\n"  # nothing was fetched


@pytest.mark.parametrize(("version", "revision"), [("0.1.0", "v0.1.0"), ("0.2.0.dev0", "main")])
def test_a_release_installs_its_tag_and_code_between_releases_the_main_branch(version, revision):
    writer = runpy.run_path(str(FOLDER / "write_notebooks.py"))
    writer["write_notebook"].__globals__["__version__"] = version

    for name in NAMES:
        text = writer["write_notebook"](name)
        assert json.dumps(f'VERSION = "{version}"\n') in text
        assert json.dumps(f'REVISION = "{revision}"')[:-1] in text


def test_code_of_another_revision_is_not_what_the_notebook_wants_though_its_version_is():
    namespace = install_cell()
    namespace |= {"VERSION": "0.1.0", "REVISION": "v0.1.0"}
    is_wanted = namespace["is_wanted"]

    assert is_wanted("0.1.0", "v0.1.0")
    assert is_wanted("0.1.0", None)  # a clone
    assert not is_wanted("0.1.0", "main")
    assert not is_wanted("0.0.9", None)
    assert not is_wanted(None, None)


@pytest.fixture
def installing(monkeypatch, tmp_path):
    """The install cell, in a folder of its own, beside a GitHub on this machine that has one tag, v0.1.0."""

    class GitHub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/v0.1.0/constraints.txt" else 404)
            self.end_headers()
            self.wfile.write(b"peft==0.21.0\ntorch==2.12.0\n")

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), GitHub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.chdir(tmp_path)
    namespace, commands = install_cell(), []
    namespace["RAW"] = f"http://127.0.0.1:{server.server_port}"
    namespace["subprocess"] = types.SimpleNamespace(run=lambda words, check: commands.append(words[3:]))
    namespace["sys"] = types.SimpleNamespace(executable=sys.executable, modules={})
    yield namespace, commands
    server.shutdown()
    server.server_close()


def test_a_tag_is_installed_with_the_versions_it_was_tested_with(installing, tmp_path):
    namespace, commands = installing
    namespace["REVISION"] = "v0.1.0"
    namespace["install"]()

    assert commands[0] == ["uninstall", "-q", "-y", "dentalgemma"]  # pip takes the same version for the same code
    assert commands[1][:4] == ["install", "-q", "-c", "constraints.txt"]
    assert commands[1][4] == "dentalgemma[bnb] @ git+https://github.com/dentalgemma/dentalgemma@v0.1.0"
    assert (tmp_path / "constraints.txt").read_text().startswith("peft==0.21.0\n")


def test_a_tag_that_github_has_not_stops_with_what_to_do_and_nothing_else_is_installed(installing, tmp_path):
    namespace, commands = installing
    namespace["REVISION"] = "v9.9.9"

    with pytest.raises(RuntimeError, match=r'has no v9\.9\.9: .* REVISION = "main" in this cell takes the newest'):
        namespace["install"]()
    assert not commands and not list(tmp_path.iterdir())


def test_without_internet_it_says_where_to_switch_it_on(installing):
    namespace, commands = installing
    namespace["RAW"] = "http://127.0.0.1:9"  # the port to discard to, where nothing answers

    with pytest.raises(RuntimeError, match=r"cannot be reached .* On Kaggle: Settings, Internet on"):
        namespace["install"]()
    assert not commands


def test_all_versions_are_pinned_but_torch_which_stays_as_it_is():
    constraints = (REPOSITORY / "constraints.txt").read_text()
    pins = install_cell()["choose_pins"](constraints, "2.12.1+cu130")

    assert {line for line in pins if not line.startswith("torch==")} == {
        line for line in constraints.splitlines() if not line.startswith("torch==")
    }
    assert [line for line in pins if line.startswith("torch==")] == ["torch==2.12.1+cu130"]


def test_a_torch_that_is_too_old_is_not_kept():
    (oldest,) = re.findall(r'"torch>=(\d+)\.(\d+),', (REPOSITORY / "pyproject.toml").read_text())
    choose = install_cell()["choose_pins"]

    assert choose("", f"{oldest[0]}.{oldest[1]}.0") == [f"torch=={oldest[0]}.{oldest[1]}.0"]
    assert choose("", f"{oldest[0]}.{int(oldest[1]) - 1}.1+cu126") == []
    assert choose("", None) == []


@pytest.fixture
def run_cell(monkeypatch):
    namespace = {"os": os, "sys": sys, "subprocess": __import__("subprocess")}
    exec(cell("train_a100", "def run("), namespace)
    namespace["shown"] = []

    class Status:
        def update(self, data, raw):
            namespace["shown"].append(data["text/plain"])

    namespace["display"] = lambda data, **options: Status() if "display_id" in options else print(data.data)
    return namespace


def test_a_command_that_fails_stops_the_notebook_with_its_reason_shown(run_cell, capsys):
    with pytest.raises(RuntimeError, match="dentalgemma check stopped with exit code 2; the reason is above"):
        run_cell["run"]("dentalgemma check", "no such folder")
    command, *reason = capsys.readouterr().out.splitlines()

    assert command == "$ dentalgemma check 'no such folder'"
    assert "no such folder" in " ".join(reason)


def test_progress_is_one_line_that_is_overwritten(run_cell, capsys):
    lines = [
        " 10%|█   | 1/10 [00:01<00:09,  1.00it/s]\r",
        " 20%|██  | 2/10 [00:02<00:08,  1.00it/s]\n",
        "\x1b[2KAnswering ━━━╸━━━━━ 3/10 0:00:07\n",
        "{'loss': '1.2', 'epoch': '0.1'}\n",
        "┏━━━━━━━┳━━━━┓\n",
        "Step 2: 8 validation answers\r\n",
    ]
    run_cell["show"](lines, run_cell["display"](None, display_id=True))

    assert capsys.readouterr().out == "┏━━━━━━━┳━━━━┓\nStep 2: 8 validation answers\n"
    assert run_cell["shown"] == [" 10%|█   | 1/10 [00:01<00:09,  1.00it/s]"]  # the next would be two seconds later


def test_what_data_say_is_shown_as_text(run_cell, capsys):
    run_cell["show_table"](["question"], [("</td><script>alert(1)</script>",), ("[x](javascript:alert(1))",)])
    page = capsys.readouterr().out

    assert "<script" not in page
    assert "&lt;/td&gt;&lt;script&gt;" in page
