"""What several tests share: built once, small, offline."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import atexit
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import yaml
from loopback_hub import Client

# Features of one test's pictures are good for the next one's, but not to stay on anybody's disk.
os.environ["DENTALGEMMA_CACHE"] = tempfile.mkdtemp(prefix="dentalgemma-")
atexit.register(shutil.rmtree, os.environ["DENTALGEMMA_CACHE"], ignore_errors=True)

REPOSITORY = Path(__file__).parents[1]
THIRD_PARTY = REPOSITORY.parent / "shared" / "data"


@pytest.fixture(scope="session")
def third_party() -> Path:
    """Real annotation files by others, which lie beside the clone where somebody put them."""
    if not THIRD_PARTY.is_dir():
        pytest.skip("third-party files are not shipped")
    return THIRD_PARTY


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty phantoms in every annotation format, and as many clinical cases."""
    from data_builders.phantom_formats import write_phantoms

    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder, count=40, cases=80, seed=3, progress=False)
    return folder


@pytest.fixture(scope="session")
def vqa_dataset(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VQA dataset folder of the phantoms' YOLO boxes."""
    from data_builders.sources import load_sources
    from data_builders.vqa import build_vqa

    folder = tmp_path_factory.mktemp("data") / "vqa"
    build_vqa(load_sources(phantoms / "sources.yaml"), folder, progress=False)
    return folder


@pytest.fixture(scope="session")
def instruct_dataset(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat dataset folder of the phantoms' clinical cases."""
    from data_builders.instruct import build_instruct
    from data_builders.sources import load_sources

    folder = tmp_path_factory.mktemp("data") / "instruct"
    build_instruct(load_sources(phantoms / "cases.yaml"), folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Gemma 3 with its processor."""
    from dentalgemma.models.tiny import make_tiny_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_gemma4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Gemma 4 with its processor."""
    from dentalgemma.models.tiny import make_tiny_model

    folder = tmp_path_factory.mktemp("models") / "tiny_gemma4"
    make_tiny_model(folder, family="gemma4")
    return folder


@pytest.fixture(scope="session")
def make_trainer(vqa_dataset):
    """Make a trainer as the recipes do, on a few rows and steps: `make_trainer(model, out, learning_rate=1e-3)`."""
    from dentalgemma.models.loading import load_model
    from dentalgemma.training.config import parse_stage
    from dentalgemma.training.data import load_splits
    from dentalgemma.training.trainer import StageTrainer

    settings = {
        "dataset_name": vqa_dataset,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "memory": "fixed",
        "gradient_checkpointing": "false",
        "dataloader_num_workers": 0,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": "false",
        "early_stopping_patience": "null",
        "validation_sample": 0,
        "disable_tqdm": "true",
    }

    def make(model, out, rows=24, recipe="stage1_vqa", **options):
        chosen = {"model_name_or_path": model, "output_dir": out, **settings, **options}
        argv = [str(part) for name, value in chosen.items() for part in (f"--{name}", *_listed(value))]
        stage, training, model_config = parse_stage(REPOSITORY / "recipes" / f"{recipe}.yaml", argv)
        dataset = load_splits(stage)
        for split in dataset:
            dataset[split] = dataset[split].select(range(min(rows, len(dataset[split]))))
        loaded, processor = load_model(model_config)
        trainer = StageTrainer(
            model=loaded,
            processor=processor,
            stage=stage,
            training=training,
            model_config=model_config,
            dataset=dataset,
        )
        trainer.facts_of = (stage, model_config, dataset)  # what `write_run_facts` wants beside the trainer
        return trainer

    return make


def _listed(value):
    return value if isinstance(value, (list, tuple)) else [value]


@pytest.fixture(scope="session")
def real_sources(third_party: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One sources file over five real sets in four formats."""
    path = tmp_path_factory.mktemp("real") / "sources.yaml"
    path.write_text((REPOSITORY / "tests" / "data" / "real_sources.yaml").read_text().replace("DATA", str(third_party)))
    return path


@pytest.fixture(scope="session")
def real_dataset(real_sources: Path) -> Path:
    """The VQA dataset folder built from the real sets."""
    from data_builders.sources import load_sources
    from data_builders.vqa import build_vqa

    folder = real_sources.parent / "built"
    build_vqa(load_sources(real_sources), folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory: pytest.TempPathFactory):
    """A process that talks to the loopback Hub `hub` of the module."""
    client = Client(hub, tmp_path_factory.mktemp("home"))
    yield client
    client.close()


@pytest.fixture(scope="session")
def open_page(tmp_path_factory):
    """Open a page in headless Chromium and return its document as the browser has it."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    profile = tmp_path_factory.mktemp("chromium")

    def open_(path, fragment=""):
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-dev-shm-usage",
        ]
        command = [browser, *flags, f"--user-data-dir={profile}", "--virtual-time-budget=8000", "--dump-dom"]
        url = path.as_uri() + (f"#{fragment}" if fragment else "")
        return subprocess.run([*command, url], capture_output=True, text=True, timeout=90, check=True).stdout

    return open_


KNOWN_BUGS = yaml.safe_load((REPOSITORY / "tests" / "data" / "known_bugs.yaml").read_text(encoding="utf-8"))


GUARDS: dict[int, dict[str, None]] = {number: {} for number in KNOWN_BUGS}  # by number, the tests in their order
OUTCOMES: dict[str, set[str]] = {}


def pytest_collection_modifyitems(session, config, items):
    """Note which tests guard against which known bug; those that this run leaves out count as guards too."""
    for item in items:
        for marker in item.iter_markers("known_bug"):
            for number in marker.args:
                GUARDS[number][_function(item.nodeid)] = None


def pytest_sessionfinish(session):
    """Where tests run in several processes, each tells the first what it collected."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["guards"] = {number: list(guards) for number, guards in GUARDS.items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for number, guards in getattr(node, "workeroutput", {}).get("guards", {}).items():
        GUARDS[number] |= dict.fromkeys(guards)


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        OUTCOMES.setdefault(_function(report.nodeid), set()).add(report.outcome)


def pytest_terminal_summary(terminalreporter):
    """The table of known bugs, each with the tests that guard against it."""
    if not any(GUARDS.values()):
        return
    terminalreporter.section("known bugs and their tests")
    for number, title in KNOWN_BUGS.items():
        terminalreporter.write_line(f"{number:2}  {title}")
        for function in GUARDS[number]:
            outcome = "/".join(sorted(OUTCOMES.get(function, {"not run"})))
            terminalreporter.write_line(f"    {outcome:8} {function}")


def _function(nodeid):
    return nodeid.partition("[")[0]
