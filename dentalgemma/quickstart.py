"""The whole path on a CPU, offline: synthetic radiographs to a trained, merged, evaluated and documented small model.

Every step is the one of a real run: the recipes are launched with `accelerate`, the merge, the evaluation and the card
are the commands of the toolkit. Only the model is small and the radiographs are drawn.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from data_builders.records import InputError

IMAGES, CASES = 2400, 800
TOWER = {"phantoms": 1500, "steps": 300}
FAMILIES = ("diagnosis", "location", "findings")
BASE_SEED = 1_000_003  # the base learns to see on phantoms that no dataset holds
ARMS = {
    "base": ("base", "true"),
    "tuned": ("dentalgemma", "true"),
    "tuned_blank": ("dentalgemma", "blank"),
    "tuned_other": ("dentalgemma", "other"),
    "stage1": ("stage1_vqa", "true"),
}
COMMON = {
    "--per_device_train_batch_size": 32,
    "--gradient_accumulation_steps": 1,
    "--per_device_eval_batch_size": 64,
    "--memory": "fixed",
    "--gradient_checkpointing": "false",
    "--dataloader_num_workers": 0,
    "--logging_steps": 20,
}
STAGE1 = {
    "--learning_rate": 3e-3,
    "--max_steps": 600,
    "--eval_steps": 150,
    "--save_steps": 150,
    "--lora_dropout": 0,
    "--pack_questions": 4,
}
STAGE2 = {
    "--learning_rate": 5e-4,
    "--max_steps": 150,
    "--eval_steps": 50,
    "--save_steps": 50,
    "--lora_dropout": 0,
    "--pack_texts": "false",  # 32 short texts end to end cost more attention than their padding
}

console = Console(stderr=True)


class QuickstartError(InputError):
    """A step of the quickstart that failed; the message names it."""

    exit_code = 1


@dataclass
class Rehearsal:
    """The folder of a quickstart, its seed, and how long each step took."""

    folder: Path
    seed: int
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Announce a step and time it."""
        console.rule(f"[bold]{len(self.seconds) + 1}. {name}", align="left")
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 1)


def run_quickstart(out: Path, *, seed: int = 0, control: bool = False) -> Path:
    """Run the whole path into `out` and return the page that shows it.

    Raises:
        QuickstartError: when a step fails, or `out` holds something else.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()) and not (out / "quickstart.json").is_file():
        raise InputError(f"{out} is not empty and no quickstart; choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / "quickstart.json").write_text(json.dumps({"seed": seed, "finished": False}))
    run = Rehearsal(out, seed)
    make_data(run)
    make_base(run)
    train_stage(run, "stage1_vqa", start="models/base", dataset="vqa", options=STAGE1)
    train_stage(
        run, "stage2_instruct", start="runs/stage1_vqa", dataset="instruct", options=STAGE2, merged="dentalgemma"
    )
    arms = dict(ARMS)
    if control:
        with run.step("Shuffle the images for the control"):
            shuffle_images(out / "data" / "vqa", out / "data" / "vqa_shuffled", seed=seed)
        train_stage(run, "stage1_vqa", start="models/base", dataset="vqa_shuffled", options=STAGE1, merged="control")
        arms["control"] = ("control", "true")
    results = evaluate_arms(run, arms)
    with run.step("Write card, report and page"):
        from dentalgemma.publishing.cards import write_model_card
        from dentalgemma.quickstart_page import write_page

        folder = out / "evaluation"
        write_model_card(
            out / "models" / "dentalgemma",
            folder / "comparison_base_tuned.json",
            scores=folder / "scores_tuned.json",
            benchmark="Synthetic panoramic radiographs",
        )
        report_stages(folder)
        summary = {"seed": seed, "finished": True, "seconds": run.seconds, **results}
        (out / "quickstart.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        page = write_page(out, summary)
    for name, passed in results["verdicts"].items():
        console.print(f"{'[green]yes' if passed else '[red]NO '}[/]  {name}")
    return page


def make_data(run: Rehearsal) -> None:
    """Draw phantoms and cases, audit them, and build both datasets and the held-out questions."""
    from data_builders.audit import read_sources, summarise
    from data_builders.instruct import build_instruct
    from data_builders.phantom_formats import write_phantoms
    from data_builders.probes import build_probe
    from data_builders.sources import load_sources
    from data_builders.vqa import build_vqa

    phantoms, data = run.folder / "phantoms", run.folder / "data"
    with run.step("Draw synthetic radiographs and cases"):
        write_phantoms(phantoms, count=IMAGES, cases=CASES, seed=run.seed, formats=("yolo",), families=FAMILIES)
    with run.step("Audit"):
        sources = load_sources(phantoms / "sources.yaml")
        contents = read_sources(sources)
        report = summarise(contents)
        (run.folder / "audit.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        for source in report["sources"]:
            console.print(f"{source['images']} images, {source['findings']} findings, {source['classes']}")
    with run.step("Build the datasets"):
        build_vqa(sources, data / "vqa", contents=contents)
        build_instruct(load_sources(phantoms / "cases.yaml"), data / "instruct")
        probe = run.folder / "evaluation" / "probe.jsonl"
        number = build_probe(data / "vqa", "test", probe, seed=run.seed, question_types=("diagnosis", "location"))
        console.print(f"{number} held-out closed questions")


def make_base(run: Rehearsal) -> None:
    """Make the small random model, and give its vision tower sight."""
    from dentalgemma.models.rehearsal import teach_tower
    from dentalgemma.models.tiny import make_tiny_model

    with run.step("Make the small base model"):
        base = run.folder / "models" / "base"
        make_tiny_model(base, seed=run.seed)
        sight = teach_tower(base, seed=BASE_SEED + run.seed, **TOWER)
        console.print(
            f"tower: finds {sight['recall']:.0%} of the marks, {sight['precision']:.0%} of its claims are right"
        )


def train_stage(
    run: Rehearsal, recipe: str, *, start: str, dataset: str, options: dict[str, object], merged: str | None = None
) -> None:
    """Launch a recipe with `accelerate`, as on a GPU, and merge what it and the stages before it trained."""
    from dentalgemma.merging import merge_adapter

    merged = merged or recipe
    models, adapter = run.folder / "models", run.folder / "runs" / merged
    with run.step(f"Train {recipe} ({merged})"):
        launch_recipe(
            recipe,
            {
                "--model_name_or_path": run.folder / start,
                "--dataset_name": run.folder / "data" / dataset,
                "--output_dir": adapter,
                "--feature_cache": run.folder / "features",
                "--seed": run.seed,
                **COMMON,
                **options,
            },
        )
    with run.step(f"Merge {merged}"):
        certificate = merge_adapter(adapter, models / merged, dtype="float32", rows=str(run.folder / "data" / dataset))
        console.print(
            f"{certificate['changed_tensors']} tensors changed, logits agree to "
            f"{certificate['reloaded_max_logit_difference']:.1e}"
        )


def launch_recipe(recipe: str, options: dict[str, object]) -> None:
    """Run `accelerate launch recipes/<recipe>.py` on the CPU; its output goes to the terminal."""
    folder = recipes_folder()
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(folder / "accelerate" / "cpu.yaml"), str(folder / f"{recipe}.py")]
    command += [str(part) for option in options.items() for part in option]
    finished = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False)
    if finished.returncode:
        raise QuickstartError(f"{recipe} stopped with exit code {finished.returncode}; its last words are above")


def recipes_folder() -> Path:
    """The folder of the recipes: inside the package when installed from a wheel, beside it in a clone."""
    package = Path(__file__).resolve().parent
    for folder in (package / "recipes", package.parent / "recipes"):
        if (folder / "stage1_vqa.py").is_file():
            return folder
    raise QuickstartError("the recipes are missing; reinstall dentalgemma")


def shuffle_images(dataset: Path, out: Path, *, seed: int) -> None:
    """Copy a dataset so that every training row shows another image's picture; nothing else changes."""
    from datasets import Image, List, load_dataset

    splits = load_dataset(str(dataset))
    train = splits["train"].cast_column("images", List(Image(decode=False)))
    ids = sorted(set(train["image_id"]))
    shuffled = ids[:]
    random.Random(seed).shuffle(shuffled)
    other = dict(zip(ids, shuffled, strict=True))
    first_row = {image_id: number for number, image_id in reversed(list(enumerate(train["image_id"])))}
    pictures = [train[first_row[other[image_id]]]["images"] for image_id in train["image_id"]]
    splits["train"] = train.remove_columns("images").add_column("images", pictures, feature=train.features["images"])
    splits.save_to_disk(str(out))


def evaluate_arms(run: Rehearsal, arms: dict[str, tuple[str, str]]) -> dict:
    """Ask every arm the held-out questions, by option log-likelihood, and compare each with the tuned model."""
    from dentalgemma.evaluation.files import write_json
    from dentalgemma.evaluation.generation import evaluate_questions
    from dentalgemma.evaluation.questions import load_questions
    from dentalgemma.evaluation.scoring import compare_predictions, score_predictions
    from dentalgemma.models.loading import load_pretrained

    folder = run.folder / "evaluation"
    probe = folder / "probe.jsonl"
    items = load_questions(probe)
    with run.step("Evaluate base, tuned model and controls"):
        for arm, (name, images) in arms.items():
            model, processor = load_pretrained(run.folder / "models" / name)
            evaluate_questions(
                model,
                processor,
                items,
                mode="loglikelihood",
                images=images,
                batch_size=32,
                out=folder / f"{arm}.jsonl",
                model_name=name,
            )
        scores = {arm: score_predictions(folder / f"{arm}.jsonl", probe) for arm in arms}
        comparisons = {}
        for arm in arms:
            if arm != "tuned":
                comparisons[arm] = compare_predictions(folder / f"{arm}.jsonl", folder / "tuned.jsonl", probe)
        write_json(folder / "comparison_base_tuned.json", comparisons["base"])
        write_json(folder / "scores_tuned.json", scores["tuned"])
    return {"scores": scores, "comparisons": comparisons, "verdicts": judge(scores, comparisons)}


def report_stages(folder: Path) -> None:
    """Write the report of base, stage 1 and stage 2, with what each of them learned and forgot."""
    from dentalgemma.evaluation.gates import gate_runs
    from dentalgemma.evaluation.report import write_report
    from dentalgemma.evaluation.scoring import compare_all, read_run, score_run

    probe = folder / "probe.jsonl"
    runs = [read_run(folder / f"{name}.jsonl", probe, name=name) for name in ("base", "stage1", "tuned")]
    write_report(
        runs,
        folder / "report.html",
        scores=[score_run(run) for run in runs],
        comparisons=compare_all(runs),
        gate=gate_runs(runs),
        title="Quickstart: base, stage 1, stage 2",
    )


def judge(scores: dict, comparisons: dict) -> dict[str, bool]:
    """The rehearsal's own claims, each of which may fail."""
    tuned = scores["tuned"]["closed"]

    def beats(arm: str) -> bool:
        pair = comparisons[arm]["closed"]
        return pair["difference"] > 0 and pair["mcnemar_p"] < 0.001

    verdicts = {
        "the tuned model beats the base (exact McNemar p < 0.001)": beats("base"),
        "it reaches at least twice chance": tuned["accuracy"] >= 2 * tuned["chance"],
        "with blank images it falls back (p < 0.001)": beats("tuned_blank"),
        "with another phantom's image it falls back (p < 0.001)": beats("tuned_other"),
    }
    if "control" in scores:
        control = scores["control"]["closed"]
        verdicts["trained on shuffled images it does not get there"] = beats("control") and (
            control["accuracy"] < 2 * control["chance"]
        )
    return verdicts
