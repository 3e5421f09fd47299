"""Stages as a chain: a stage starts from a base, a merged model or the adapter of the stage before it."""

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText
from trl import ModelConfig

from data_builders.records import InputError
from dentalgemma.evaluation.files import without_folder
from dentalgemma.models.loading import (
    LoadError,
    find_start,
    fingerprint_files,
    fold_adapters,
    load_model,
    load_pretrained,
)
from dentalgemma.models.tiny import make_tiny_model
from dentalgemma.training.run_facts import write_run_facts


def finish(trainer):
    trainer.train()
    trainer.save_model()
    stage, model_config, dataset = trainer.facts_of
    write_run_facts(trainer, stage, model_config, dataset)


@pytest.fixture(scope="module")
def chain(tiny_model, instruct_dataset, make_trainer, tmp_path_factory):
    """Three runs, each started from the one before: aligner, then images and text, then text alone."""
    runs = tmp_path_factory.mktemp("runs")
    finish(make_trainer(tiny_model, runs / "a", stage="align", trains=["aligner"], learning_rate=1e-2))
    finish(make_trainer(runs / "a", runs / "b", stage="vqa", trains=["language_model", "aligner"]))
    finish(make_trainer(runs / "b", runs / "c", stage="instruct", dataset_name=instruct_dataset))
    return runs


def facts(run):
    return json.loads((run / "run_facts.json").read_text())


def logits(model, processor):
    message = [
        {"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "Caries?"}]}
    ]
    inputs = processor.apply_chat_template(
        message, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.inference_mode():
        return model.eval()(**inputs).logits


def picture():
    from PIL import Image

    return Image.linear_gradient("L").convert("RGB")


def test_a_run_keeps_the_adapters_and_facts_of_all_stages_before_it(chain, tiny_model):
    start = find_start(chain / "c")

    assert start.base == str(tiny_model)
    assert [folder.name for folder in start.adapters] == ["1_align", "2_vqa", "c"]
    assert [stage["stage"] for stage in facts(chain / "c")["chain"]] == ["align", "vqa"]
    assert all("chain" not in stage for stage in facts(chain / "c")["chain"])
    assert {facts(chain / name)["base_weights"] for name in "abc"} == {fingerprint_files(tiny_model)}
    for run, copy in ((chain / "a", "1_align"), (chain / "b", "2_vqa")):
        for name in ("adapter_model.safetensors", "adapter_config.json", "run_facts.json"):
            assert (run / name).read_bytes() == (chain / "c" / "chain" / copy / name).read_bytes()


def test_a_stage_starts_where_the_one_before_it_ended(chain, tiny_model):
    base, processor = load_pretrained(tiny_model, dtype=torch.float32)
    ended = logits(PeftModel.from_pretrained(base, str(chain / "a")), processor)

    started, processor = load_model(ModelConfig(model_name_or_path=str(chain / "a"), dtype="float32"))

    assert torch.allclose(logits(started, processor), ended, atol=1e-5)
    untrained = logits(load_pretrained(tiny_model, dtype=torch.float32)[0], processor)
    assert (untrained - ended).abs().max() > 0.01


def test_folding_adds_what_peft_adds(chain, tiny_model):
    folded = load_pretrained(tiny_model, dtype=torch.float32)[0]
    fold_adapters(folded, find_start(chain / "c").adapters)

    merged = load_pretrained(tiny_model, dtype=torch.float32)[0]
    for adapter in find_start(chain / "c").adapters:
        merged = PeftModel.from_pretrained(merged, str(adapter)).merge_and_unload()

    wanted = merged.state_dict()
    assert set(wanted) == set(folded.state_dict())
    for name, value in folded.state_dict().items():
        assert torch.allclose(value, wanted[name], atol=1e-6), name


def test_an_adapter_serves_without_merging(chain, tiny_model):
    """As `recipes/README.md` shows it."""
    base = AutoModelForImageTextToText.from_pretrained(tiny_model, dtype=torch.float32)
    served = PeftModel.from_pretrained(base, str(chain / "a"))

    _, processor = load_pretrained(tiny_model)
    with served.disable_adapter():
        before = logits(served, processor)
    assert (logits(served, processor) - before).abs().max() > 0.01


def test_a_run_in_the_folder_of_another_has_no_part_in_its_chain(chain, tmp_path):
    shutil.copytree(chain / "c", tmp_path / "c")
    shutil.copytree(chain / "a", tmp_path / "c" / "ablation")
    shutil.copytree(chain / "a", tmp_path / "c" / "checkpoint-3")

    assert len(find_start(tmp_path / "c" / "ablation").adapters) == 1
    assert len(find_start(tmp_path / "c" / "checkpoint-3").adapters) == 3


def test_a_chain_with_something_else_in_it_is_refused(chain, tmp_path):
    shutil.copytree(chain / "c", tmp_path / "c")
    (tmp_path / "c" / "chain" / "notes").mkdir()

    with pytest.raises(LoadError, match="notes is no adapter"):
        find_start(tmp_path / "c")


def test_a_start_that_is_refused_leaves_the_chain_of_the_run_that_is_there(chain, make_trainer, tmp_path):
    shutil.copytree(chain / "c", tmp_path / "c")
    (tmp_path / "c" / "checkpoint-3").mkdir()
    trainer = make_trainer(chain / "a", tmp_path / "c")
    kept = sorted(path.name for path in (tmp_path / "c" / "chain").iterdir())

    with pytest.raises(InputError):
        trainer.train(resume_from_checkpoint=str(tmp_path / "c" / "checkpoint-3"))

    assert kept == ["1_align", "2_vqa"] == sorted(path.name for path in (tmp_path / "c" / "chain").iterdir())
    assert (tmp_path / "c" / "run_facts.json").is_file()


def test_an_adapter_whose_base_was_written_anew_is_refused(chain, tiny_model, tmp_path):
    shutil.copytree(chain / "b", tmp_path / "b")
    shutil.copytree(tiny_model, tmp_path / "base")
    make_tiny_model(tmp_path / "base", seed=1)
    for path in tmp_path.rglob("adapter_config.json"):
        path.write_text(path.read_text().replace(str(tiny_model), str(tmp_path / "base")))

    with pytest.raises(LoadError, match=r"is an adapter of another base: it was trained on weights"):
        load_model(ModelConfig(model_name_or_path=str(tmp_path / "b"), dtype="float32"))


@pytest.mark.known_bug(20)
def test_an_adapter_is_no_start_under_zero_3(chain, monkeypatch):
    monkeypatch.setattr("dentalgemma.models.loading.is_deepspeed_zero3_enabled", lambda: True)

    with pytest.raises(LoadError, match="under ZeRO-3 no process has whole weights"):
        load_model(ModelConfig(model_name_or_path=str(chain / "a"), dtype="float32"))


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("--dataset_name=/home/someone/patients/x", "--dataset_name=x"),
        ("~/patients/x", "x"),
        ("../patients/x", "x"),
        ("data/of/someone", "someone"),
        ("google/medgemma-1.5-4b-it", "google/medgemma-1.5-4b-it"),
        ("--learning_rate=1e-4", "--learning_rate=1e-4"),
    ],
)
def test_no_path_of_this_machine_gets_into_the_facts(given, written):
    assert without_folder(given) == written


@pytest.mark.known_bug(12)
def test_an_adapter_of_another_base_is_refused(chain, tiny_gemma4):
    model, _ = load_pretrained(tiny_gemma4)

    with pytest.raises(LoadError, match="is an adapter of another base"):
        fold_adapters(model, [chain / "b"])


@pytest.mark.known_bug(12)
def test_a_base_with_missing_weights_is_refused(tiny_model, tmp_path):
    from safetensors.torch import load_file, save_file

    for path in tiny_model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tiny_model / "model.safetensors")
    weights.pop(next(name for name in weights if name.endswith("layers.1.mlp.down_proj.weight")))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(LoadError, match=r"1 weights are missing, for example model\.language_model\.layers\.1"):
        load_pretrained(tmp_path)


def test_a_run_is_not_written_over_the_adapter_it_starts_from(chain, make_trainer):
    with pytest.raises(InputError, match="holds the adapter that the run starts from"):
        make_trainer(chain / "a", chain / "a")


@pytest.mark.known_bug(3)
@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_a_base_whose_generation_does_not_stop_at_the_turn_end_is_refused(family, tiny_model, tiny_gemma4, tmp_path):
    for path in {"gemma3": tiny_model, "gemma4": tiny_gemma4}[family].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    load_model(ModelConfig(model_name_or_path=str(tmp_path)))
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 1}))

    with pytest.raises(LoadError, match=r"generation does not stop at '<(end_of_turn>|turn\|>)'"):
        load_model(ModelConfig(model_name_or_path=str(tmp_path)))


class OneRepository(BaseHTTPRequestHandler):
    """As much of the Hub as a download needs: `me/<name>` is the folder of that name."""

    root: Path
    commit = "c" * 40

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            folder = self.root / parts[3]
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            names = [{"type": "file", "oid": "0" * 40, "size": path.stat().st_size} for path in files]
            for entry, path in zip(names, files, strict=True):
                entry |= {"path": str(path.relative_to(folder)), "rfilename": str(path.relative_to(folder))}
            whole = {"id": f"me/{parts[3]}", "sha": self.commit, "siblings": names}
            self.answer(json.dumps(names if "tree" in parts else whole).encode())
        elif len(parts) > 4 and parts[2] == "resolve" and (self.root / parts[1] / "/".join(parts[4:])).is_file():
            self.answer((self.root / parts[1] / "/".join(parts[4:])).read_bytes())
        else:
            self.answer(b"", 404, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def answer(self, body, status=200, headers=None):
        self.send_response(status)
        tag = {"ETag": f'"{hash(body):x}"', "X-Repo-Commit": self.commit, "Content-Length": str(len(body))}
        for name, value in {**tag, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(chain, tiny_model):
    """The address of a loopback Hub that serves the runs of `chain` and, as `me/base`, what they adapt."""
    shutil.copytree(tiny_model, chain / "base", dirs_exist_ok=True)
    handler = type("Hub", (OneRepository,), {"root": chain})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_stage_starts_from_an_adapter_on_the_hub(chain, hub, tmp_path):
    code = f"""
from dentalgemma.models.loading import find_start, load_model
from trl import ModelConfig
start = find_start("me/c")
print([folder.name.partition("_")[2] for folder in start.adapters[:2]], start.base)
model, _ = load_model(ModelConfig(model_name_or_path="me/c", dtype="float32"))
here, _ = load_model(ModelConfig(model_name_or_path={str(chain / "c")!r}, dtype="float32"))
print(all((a == b).all() for a, b in zip(model.parameters(), here.parameters(), strict=True)))
print(find_start("me/base", "main"))
"""
    online = {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **online}, capture_output=True, text=True, timeout=120
    )

    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[0].startswith("['align', 'vqa'] ")
    assert done.stdout.splitlines()[1] == "True"
    assert done.stdout.splitlines()[2] == f"Start(base='me/base', revision='{'c' * 40}', adapters=())"
