"""The card of a real run: what the run recorded of its data, and that the code on the cards runs as it stands."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from datasets import Dataset
from PIL import Image

from dentalgemma.merging import merge_adapter
from dentalgemma.publishing.cards import write_model_card
from dentalgemma.training.run_facts import _stated_sources, read_run_facts, write_run_facts

RUN_BLOCKS = """
import json, sys
from transformers import GenerationMixin

choose = GenerationMixin._sample  # what greedy decoding and sampling both go through

def watch(self, *args, generation_config, **kwargs):
    print("CHOSE", "by chance" if generation_config.do_sample else "the likeliest", flush=True)
    return choose(self, *args, generation_config=generation_config, **kwargs)

GenerationMixin._sample = watch
names = {}
for number, code in enumerate(json.load(open("blocks.json"))):
    exec(compile(code, f"block {number}", "exec"), names)
    print("RAN", number, flush=True)
    if "BitsAndBytesConfig" in code:
        four_bits = names["model"]
        assert four_bits.is_loaded_in_4bit
        assert four_bits.generation_config.do_sample  # by itself it would
        output = four_bits.generate(**names["inputs"], max_new_tokens=3, min_new_tokens=3, do_sample=False)
        print("TOKENS", output.shape[1])
"""


@pytest.fixture(scope="module")
def workplace(tiny_model, vqa_dataset, instruct_dataset, make_trainer, tmp_path_factory):
    """A folder with a base, a run on three mixed datasets, its merged model and both cards."""
    folder = tmp_path_factory.mktemp("cards")
    shutil.copytree(tiny_model, folder / "base")
    settings = json.loads((folder / "base" / "generation_config.json").read_text())
    # A random model does not end its answers; the code on the cards asks for 300 tokens. MedGemma's and Gemma 4's own
    # settings sample.
    settings |= {"max_time": 0.5, "do_sample": True, "top_k": 64, "top_p": 0.95}
    (folder / "base" / "generation_config.json").write_text(json.dumps(settings))
    (folder / "silent").mkdir()
    Dataset.from_dict({"prompt": ["Why?"] * 8, "completion": ["Because."] * 8}).to_parquet(
        folder / "silent" / "train.parquet"
    )
    trainer = make_trainer(
        folder / "base",
        folder / "run",
        stage="vqa",
        mix_datasets=[instruct_dataset, folder / "silent"],
        mix_weights=[0.1, 0.01],
    )
    trainer.train()
    trainer.save_model()
    stage, model_config, dataset = trainer.facts_of
    write_run_facts(trainer, stage, model_config, dataset)
    merge_adapter(folder / "run", folder / "dental", dtype="float32", rows=str(vqa_dataset))
    write_model_card(folder / "dental")
    Image.linear_gradient("L").resize((400, 200)).convert("RGB").save(folder / "panoramic.jpg")
    return folder


def test_a_run_records_the_sources_and_licences_of_every_dataset(workplace):
    facts = read_run_facts(workplace / "run")
    sources = {source["name"]: source for source in facts["data_sources"]}

    assert {name: source["license"] for name, source in sources.items()} == {
        "phantom_yolo": "Apache-2.0",
        "phantom_cases": "Apache-2.0",
        "silent": None,
    }
    assert sources["silent"]["rows"] == 8
    assert sources["phantom_yolo"]["images"] > 0
    assert facts["hub_datasets"] == []
    assert str(workplace) not in json.dumps(facts)


def test_a_run_records_languages_question_types_and_findings(workplace, vqa_dataset):
    contents = read_run_facts(workplace / "run")["data_contents"]
    findings = json.loads((vqa_dataset / "build_report.json").read_text())["findings"]

    vision = read_run_facts(workplace / "run")["vision"]
    assert 0 < vision["train_pictures"] < vision["pictures"]  # which counts those of validation too
    assert contents["languages"] == ["en"]
    assert contents["images"] is True
    assert sum(contents["question_types"].values()) > 10
    assert contents["findings"] == {
        label: splits["train"]["images"] for label, splits in findings.items() if "train" in splits
    }


def test_a_dataset_without_a_report_is_known_by_what_its_rows_state():
    rows = Dataset.from_dict({"source": ["a", "a", "b", None], "license": ["MIT", "MIT", None, "MIT"]})

    assert [(source["name"], source["license"], source["rows"]) for source in _stated_sources(rows)] == [
        ("a", "MIT", 2),
        ("b", None, 1),
    ]
    assert not _stated_sources(Dataset.from_dict({"source": [1, 2], "license": ["MIT", "MIT"]}))
    assert not _stated_sources(Dataset.from_dict({"prompt": ["Why?"]}))


def python_blocks(text):
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def test_all_code_on_both_cards_runs_as_it_stands(workplace):
    """With the folder where the repository stands, as the comment says."""
    model, adapter = (
        python_blocks((workplace / folder / "README.md").read_text().replace("OWNER/NAME", f"./{folder}"))
        for folder in ("dental", "dental/adapter")
    )
    (workplace / "blocks.json").write_text(json.dumps(model + adapter))
    (workplace / "run_blocks.py").write_text(RUN_BLOCKS)
    done = subprocess.run(
        [sys.executable, "-I", "run_blocks.py"], capture_output=True, text=True, cwd=workplace, timeout=300
    )

    assert (len(model), len(adapter)) == (3, 1)  # transformers, a pipeline, 4 bits; PEFT
    for part in ("AutoModelForImageTextToText", 'pipeline("image-text-to-text"', "BitsAndBytesConfig", "PeftModel"):
        assert any(part in code for code in model + adapter)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("RAN") == 4
    assert int(done.stdout.split("TOKENS")[1].split()[0]) > 3
    assert done.stdout.count("CHOSE the likeliest") == 4  # transformers, the pipeline, 4 bits, PEFT
    assert "CHOSE by chance" not in done.stdout
    assert "missing" not in done.stderr.lower()  # PEFT warns of keys that an adapter lacks
