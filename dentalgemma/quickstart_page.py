"""The page at the end of the quickstart: verdicts, answers in words, loss curves and rows, self-contained."""

from __future__ import annotations

import base64
import io
import random
from pathlib import Path

import matplotlib
import torch
from datasets import Image, List, load_dataset
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from data_builders.chat import SYSTEM_PROMPT
from data_builders.claims import claims_from_json
from data_builders.compose.wording import Wording, fill
from data_builders.sources import load_vocabulary
from dentalgemma.models.loading import load_pretrained
from dentalgemma.training.data import open_image
from dentalgemma.training.run_facts import hardware, read_run_facts

matplotlib.use("Agg")

ANSWERS = 10
ARM_NAMES = {
    "base": "base",
    "tuned": "tuned (both stages)",
    "tuned_blank": "tuned, blank images",
    "tuned_other": "tuned, another phantom's image",
    "stage1": "after stage 1",
    "control": "trained on shuffled images",
}


def write_page(folder: Path, summary: dict) -> Path:
    """Write `index.html` into a quickstart's folder and return its path."""
    models = {name: load_pretrained(folder / "models" / name) for name in ("base", "stage1_vqa", "dentalgemma")}
    answers = _answer_in_words(folder / "data" / "vqa", models)
    device = hardware()
    environment = Environment(
        loader=PackageLoader("dentalgemma.publishing"),
        undefined=StrictUndefined,
        autoescape=select_autoescape(["jinja"]),
    )
    text = environment.get_template("quickstart.html.jinja").render(
        summary=summary,
        arms=ARM_NAMES,
        total_minutes=sum(summary["seconds"].values()) / 60,
        hardware=f"{device['device']}, {device.get('threads', device.get('count'))} threads",
        parameters=models["base"][0].num_parameters(),
        answers=answers,
        right=sum(answer["tuned_right"] for answer in answers),
        right_after_stage1=sum(answer["stage1_right"] for answer in answers),
        curves=_draw_curves(folder / "runs"),
        samples=[*_samples(folder / "data" / "vqa", 5), *_samples(folder / "data" / "instruct", 1)],
    )
    page = folder / "index.html"
    page.write_text(text, encoding="utf-8")
    return page


def _answer_in_words(dataset: Path, models: dict) -> list[dict]:
    """Let base and tuned model describe the first ten held-out images, and put the annotated answer beside."""
    rows = load_dataset(str(dataset), split="test").cast_column("images", List(Image(decode=False)))
    rows = rows.filter(lambda kind: kind == "findings_location", input_columns="question_type")
    answers = []
    for row in rows.select(range(min(ANSWERS, len(rows)))):
        question = row["prompt"][-1]["content"]
        said = {name: generate(*pair, row["images"][0], question) for name, pair in models.items()}
        answers.append(
            {
                "picture": _data_url(row["images"][0]["bytes"]),
                "question": question,
                "expected": row["completion"][0]["content"],
                "tuned": said["dentalgemma"],
                "tuned_right": said["dentalgemma"] in _right_answers(row),
                "stage1": said["stage1_vqa"],
                "stage1_right": said["stage1_vqa"] in _right_answers(row),
                "base": said["base"][:160],
            }
        )
    return answers


def _right_answers(row: dict) -> set[str]:
    """The annotated answer in each of its wordings: what is said counts, not which phrase it is said with."""
    words = Wording("en", load_vocabulary(), random.Random(0))
    claims = claims_from_json(row["claims"])
    image = words.image("panoramic")
    if all(claim.negated for claim in claims):
        conditions = words.absent(claim.label for claim in claims)
        return {fill(x, image=image, conditions=conditions) for x in words.phrases["no_findings"]["answers"]}
    findings = words.list(words.finding(claim) for claim in claims)
    return {fill(x, image=image, findings=findings) for x in words.phrases[row["question_type"]]["answers"]}


@torch.inference_mode()
def generate(model, processor, image: dict, question: str, *, max_new_tokens: int = 40) -> str:
    """The model's answer to one question on one image, decoded greedily."""
    messages = [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM_PROMPT}]},
        {
            "role": "user",
            "content": [{"type": "image", "image": open_image(image)}, {"type": "text", "text": question}],
        },
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.eval().generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.decode(output[0][inputs["input_ids"].shape[-1] :], skip_special_tokens=True).strip()


def _samples(dataset: Path, count: int) -> list[dict]:
    rows = load_dataset(str(dataset), split="train")
    if "images" in rows.column_names:
        rows = rows.cast_column("images", List(Image(decode=False)))
    samples = []
    image_ids = rows["image_id"]
    first_rows = [
        number for number, image_id in enumerate(image_ids) if number == 0 or image_id != image_ids[number - 1]
    ]
    # The rows of an image lie together: take one from each of several, and a later one each time.
    chosen = [start + number % 3 for number, start in enumerate(first_rows[:count])] if any(image_ids) else range(count)
    for row in rows.select(chosen):
        claims = claims_from_json(row["claims"])
        samples.append(
            {
                "picture": _data_url(row["images"][0]["bytes"]) if row.get("images") else None,
                "question_type": row["question_type"],
                "question": row["prompt"][-1]["content"],
                "answer": row["completion"][0]["content"],
                "claims": "; ".join(", ".join(claim.annotations) or "exhaustive labels" for claim in claims)
                or "the case's own answer",
            }
        )
    return samples


def _draw_curves(runs: Path) -> str:
    from matplotlib import pyplot

    stages = [(name, read_run_facts(runs / name)["losses"]) for name in ("stage1_vqa", "dentalgemma")]
    figure, axes = pyplot.subplots(1, len(stages), figsize=(10, 3.4), layout="constrained")
    for axis, (title, (_, losses)) in zip(
        axes, zip(("Stage 1: VQA", "Stage 2: instruct"), stages, strict=True), strict=True
    ):
        for name, style in (("train", "-"), ("validation", "o--")):
            points = losses[name]
            axis.plot([p["step"] for p in points], [p["loss"] for p in points], style, label=name)
        axis.set(title=title, xlabel="step", yscale="log")
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("loss per answer token")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    pyplot.close(figure)
    return _data_url(buffer.getvalue(), "image/png")


def _data_url(content: bytes, kind: str = "image/jpeg") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
