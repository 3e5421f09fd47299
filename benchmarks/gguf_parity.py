"""What llama.cpp makes of a merged model: its answers to the rows of a dataset, beside those of transformers.

    pip install sentencepiece                              # what llama.cpp's converter reads the vocabulary with
    cmake -S llama.cpp -B llama.cpp/build && cmake --build llama.cpp/build --config Release -j
    python benchmarks/gguf_parity.py quickstart/models/dentalgemma quickstart/data/vqa --llama-cpp llama.cpp

Converts the model and its tower by the commands of docs/exporting.md, without quantising, and asks a server the same
questions four times: with pictures as they are or stretched to the tower's square, with the model's own chat template
or with one that puts the blank lines around a picture that Gemma 3's processor puts there. Answers are greedy.

The quickstart's model is no published one: its copy gets a `tokenizer.model` with its vocabulary and the names that the
tower's weights have on the Hub, and the server is told how often its layers attend to everything.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from datasets import load_dataset
from report import make_report, write_report
from safetensors.torch import load_file, save_file
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from dentalgemma.evaluation.endpoints import open_endpoint
from dentalgemma.evaluation.generation import evaluate_questions
from dentalgemma.evaluation.questions import Question
from dentalgemma.evaluation.server import ask_server
from dentalgemma.models.loading import load_pretrained

PACKAGES = ("torch", "transformers", "sentencepiece")
TEXT = "{{ message['content'] | trim }}"
WITH_BLANK_LINES = (
    r"{{ message['content'] | trim | replace('<__media_', '\n\n<__media_') | replace('__>', '__>\n\n') }}"
)
UNKNOWN, CONTROL, BYTE = 2, 3, 6  # types of a sentencepiece
STARTS_IN = 120  # seconds
LONGEST = 64  # tokens of an answer


def write_questions(dataset: str, count: int, folder: Path) -> list[Question]:
    """The first `count` test rows with one question on one picture; the pictures are written to `folder`."""
    items = []
    for row in load_dataset(dataset, split="test"):
        said = [message["content"] for message in row["prompt"] if message["role"] == "user"]
        if len(said) != 1 or len(row["images"]) != 1:
            continue
        path = folder / f"{row['image_id']}.png"
        row["images"][0].save(path)
        answer = row["completion"][0]["content"]
        items.append(Question(str(len(items)), said[0], answer, image=path, image_id=row["image_id"]))
        if len(items) == count:
            break
    return items


def publish_like(model: Path, out: Path) -> None:
    """A copy of a small model as llama.cpp's converter expects one: as the published Gemma 3 models are."""
    out.mkdir()
    for path in model.iterdir():
        if path.suffix in (".json", ".jinja", ".model"):
            (out / path.name).write_bytes(path.read_bytes())
    tensors = load_file(model / "model.safetensors")
    named = {
        re.sub(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.", key): tensors[key] for key in tensors
    }
    save_file(named, out / "model.safetensors", metadata={"format": "pt"})
    if not (model / "tokenizer.model").is_file():
        tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
        (out / "tokenizer.model").write_bytes(write_sentencepiece(tokenizer).SerializeToString())


def write_sentencepiece(tokenizer: dict) -> ModelProto:
    """The vocabulary of a Gemma `tokenizer.json`; a piece scores higher the earlier it was merged."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(tokenizer["model"]["merges"]):
        ranks.setdefault("".join(merge if isinstance(merge, list) else merge.split(" ")), rank)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    proto = ModelProto()
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    for word in sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get):
        piece = proto.pieces.add(piece=word, score=-float(ranks.get(word, len(ranks))))
        if word == tokenizer["model"]["unk_token"]:
            piece.type = UNKNOWN
        elif word in special:
            piece.type = CONTROL
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", word):
            piece.type = BYTE
    return proto


def convert(llama_cpp: Path, model: Path) -> tuple[Path, Path]:
    """Language model and tower as GGUF, as precise as they can be: the tower's projection is never above 16 bits."""
    files = model / "text.gguf", model / "mmproj.gguf"
    for options, out in ((["--outtype", "f32"], files[0]), (["--mmproj", "--outtype", "f16"], files[1])):
        script = llama_cpp / "convert_hf_to_gguf.py"
        done = subprocess.run(
            [sys.executable, script, model, *options, "--outfile", out], capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"{script} failed: {done.stderr.strip().splitlines()[-1]}")
    return files


@contextlib.contextmanager
def serve(llama_cpp: Path, text: Path, tower: Path, template: Path, every: int) -> Iterator[str]:
    """A llama-server; yields its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [llama_cpp / "build/bin/llama-server", "-m", text, "--mmproj", tower, "--port", str(port), "--jinja"]
    command += ["--chat-template-file", template]
    command += ["--override-kv", f"gemma3.attention.sliding_window_pattern=int:{every}"]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_until_ready(f"http://127.0.0.1:{port}/health", server)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait()


def wait_until_ready(url: str, server: subprocess.Popen) -> None:
    deadline = time.monotonic() + STARTS_IN
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url):
            return
        time.sleep(0.2)
    sys.exit("llama-server does not start")


def read_answers(path: Path) -> dict[str, str]:
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {line["item_id"]: line["output"].strip() for line in lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a merged Gemma 3")
    parser.add_argument("dataset", help="a dataset folder of `dentalgemma build`")
    parser.add_argument("--llama-cpp", type=Path, required=True, help="a clone, built")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--json", action="store_true", help="print JSON for another program")
    parser.add_argument("--out", type=Path, help="where to write all figures as JSON")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        items = write_questions(settings.dataset, settings.rows, folder)
        model, processor = load_pretrained(settings.model, dtype="auto")
        longest = {"max_new_tokens_open": LONGEST}
        evaluate_questions(model, processor, items, mode="generate", out=folder / "here.jsonl", **longest)
        here = read_answers(folder / "here.jsonl")
        publish_like(settings.model, folder / "model")
        text, tower = convert(settings.llama_cpp, folder / "model")
        side = model.config.vision_config.image_size
        every = model.config.text_config.layer_types.index("full_attention") + 1
        own = (settings.model / "chat_template.jinja").read_text(encoding="utf-8")
        if TEXT not in own:
            sys.exit(f"the chat template of {settings.model} has no {TEXT}")
        found = {}
        for lines, template in (("own", own), ("blank lines", own.replace(TEXT, WITH_BLANK_LINES))):
            (folder / "template.jinja").write_text(template, encoding="utf-8")
            with serve(settings.llama_cpp, text, tower, folder / "template.jinja", every) as url:
                for shape, stretch in (("as they are", None), ("stretched", side)):
                    out = folder / f"{lines} {shape}.jsonl"
                    with open_endpoint(url, "gguf", api="openai", key_variable=None, timeout=120) as endpoint:
                        ask_server(endpoint, items, out=out, stretch=stretch, **longest)
                    there = read_answers(out)
                    found[f"pictures {shape}, template {lines}"] = {
                        "same_answer": sum(there[key] == here[key] for key in here),
                        "as_annotated": sum(there[item.item_id] == item.answer.strip() for item in items),
                    }
    version = subprocess.run(
        [settings.llama_cpp / "build/bin/llama-server", "--version"], capture_output=True, text=True
    )
    results = {
        "rows": len(items),
        "transformers_as_annotated": sum(here[item.item_id] == item.answer.strip() for item in items),
        "llama_cpp": re.sub(r"^version: ", "", (version.stderr + version.stdout).splitlines()[0]),
        "found": found,
    }
    same = {name: figures["same_answer"] for name, figures in found.items()}
    headline = f"of {len(items)} answers the same as transformers': " + "; ".join(
        f"{name} {n}" for name, n in same.items()
    )
    report = make_report(
        "gguf_parity",
        results,
        measures="answers of the quickstart's model in llama.cpp, beside those in transformers",
        headline=headline,
        packages=PACKAGES,
    )
    write_report(report, out=settings.out, as_json=settings.json)


if __name__ == "__main__":
    main()
