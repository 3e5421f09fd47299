"""The regression gate of a recipe: where a stage began and where it ended, on the same questions.

<run>/gate/first.jsonl    the model that the run before it began with, where that run had this gate
<run>/gate/start.jsonl    the stage's start: its adapter switched off
<run>/gate/end.jsonl      the stage's end
<run>/gate/gate.json      what was lost and gained, over all and by category
"""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import nn
from trl import SFTConfig

from dentalgemma.evaluation.files import without_folder
from dentalgemma.evaluation.gates import GateError, check_margin, format_gate, gate_runs, load_gate_questions
from dentalgemma.evaluation.questions import EvaluationError, Question, check_images
from dentalgemma.evaluation.runs import Run, read_run
from dentalgemma.models.loading import fingerprint_weights, run_around, stage_name
from dentalgemma.training.sharding import shards_weights

if TYPE_CHECKING:
    from dentalgemma.training.config import StageConfig
    from dentalgemma.training.trainer import StageTrainer

FOLDER = "gate"
FIRST, START, END = "first", "start", "end"
NOTHING = ("", "null", "none")  # how the command line says what YAML calls null


def check_gate(stage: StageConfig, training: SFTConfig) -> None:
    """Refuse a gate that could not be run after training.

    Raises:
        InputError: naming the option, the file and what is wrong with it.
    """
    for name in ("gate_questions", "gate_before"):
        if getattr(stage, name) in NOTHING:
            setattr(stage, name, None)
    if stage.gate_questions is None:
        if stage.gate_before is not None:
            raise EvaluationError("gate_before: without gate_questions there is no gate")
        return
    check_margin(stage.gate_margin)
    check_images(load_gate_questions(Path(stage.gate_questions)))
    if stage.gate_before is not None:
        folder = Path(training.output_dir) / FOLDER
        if folder.resolve() in Path(stage.gate_before).resolve().parents:
            raise EvaluationError(f"gate_before: {stage.gate_before}: this run writes {folder} anew; copy it elsewhere")
        before = read_run(Path(stage.gate_before), Path(stage.gate_questions))
        if before.settings["mode"] != "loglikelihood":
            raise EvaluationError(f"gate_before: {stage.gate_before}: a gate scores options: evaluate in that mode")
    if sharding := shards_weights(training):
        raise EvaluationError(
            f"gate_questions: under {sharding} no process has the whole model: leave it out, answer the questions with "
            "`dentalgemma evaluate` afterwards and compare with `dentalgemma gate`"
        )


def run_gate(trainer: StageTrainer) -> None:
    """Where the stage asks for it, answer the gate's questions by its start and by its end; the first process does.

    Every option is scored, nothing is written, so that it takes about as long as reading the questions. The table goes
    to stderr, answers and figures into the run folder.

    Raises:
        GateError: after all is written, when the end is worse than the start, or than the model before it.
    """
    stage = trainer.stage
    if stage.gate_questions is None or not trainer.is_world_process_zero():
        return
    questions = Path(stage.gate_questions)
    folder = Path(trainer.args.output_dir) / FOLDER
    before = Path(stage.gate_before) if stage.gate_before else _find_first(trainer)
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier run in this folder
    folder.mkdir(parents=True)
    items = load_gate_questions(questions)
    for name in (START, END):
        _answer(trainer, items, folder / f"{name}.jsonl")
    runs = [read_run(folder / f"{name}.jsonl", questions) for name in (START, END)]
    first = _read_first(stage, before, questions)
    if first is not None:
        shutil.copyfile(before, folder / f"{FIRST}.jsonl")
        runs.insert(0, first)
    gate = gate_runs(_name_runs(trainer, runs), margin=stage.gate_margin)
    (folder / "gate.json").write_text(json.dumps(gate, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(format_gate(gate), file=sys.stderr)
    if not gate["passed"]:
        raise GateError(f"gate: {'; '.join(gate['failures'])}; the model is saved, the answers are in {folder}")


def _answer(trainer: StageTrainer, items: list[Question], out: Path) -> None:
    from dentalgemma.evaluation.generation import evaluate_questions

    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    at_start = out.stem == START
    unfinished = out.with_suffix(".unfinished")
    with model.disable_adapter() if at_start else nullcontext(), torch.no_grad(), trainer.accelerator.autocast():
        evaluate_questions(
            model,
            trainer.processing_class,
            items,
            mode="loglikelihood",
            out=unfinished,
            batch_size=trainer.args.per_device_eval_batch_size,
            model_name=_name(trainer, at_start=at_start),
            progress=not trainer.args.disable_tqdm,
        )
    if at_start:
        _name_weights(unfinished, fingerprint_start(model))
    unfinished.replace(out)


def _name(trainer: StageTrainer, *, at_start: bool) -> str:
    start = trainer.start.adapters[-1] if trainer.start.adapters else trainer.start.base
    return without_folder(str(start if at_start else trainer.args.output_dir)) or ""


def fingerprint_start(model: nn.Module) -> str:
    """What `fingerprint_weights` says of the model below the adapter, as it was loaded."""
    weights = []
    for name, weight in model.named_parameters():
        if ".lora_" not in name and ".modules_to_save." not in name:
            name = name.removeprefix("base_model.model.")
            weights.append((name.replace(".base_layer.", ".").replace(".original_module.", "."), weight))
    return fingerprint_weights(SimpleNamespace(named_parameters=lambda: weights))


def _name_weights(predictions: Path, fingerprint: str) -> None:
    """Say whose answers they are: an adapter that is switched off still counts among the model's parameters."""
    lines = [json.loads(line) for line in predictions.read_text(encoding="utf-8").splitlines()]
    text = "".join(json.dumps(line | {"weights": fingerprint}, ensure_ascii=False) + "\n" for line in lines)
    predictions.write_text(text, encoding="utf-8")


def _find_first(trainer: StageTrainer) -> Path | None:
    """The answers of the model that the run before this one began with."""
    if not trainer.start.adapters:
        return None
    folder = run_around(trainer.start.adapters[-1]) / FOLDER
    return next((path for name in (FIRST, START) if (path := folder / f"{name}.jsonl").is_file()), None)


def _read_first(stage: StageConfig, path: Path | None, questions: Path) -> Run | None:
    """The earlier answers; those that the run before gave to other questions say nothing here."""
    if path is None:
        return None
    try:
        return read_run(path, questions)
    except EvaluationError as error:
        if stage.gate_before is not None:
            raise
        print(f"The gate of the run before is left out, it was on other questions: {error}", file=sys.stderr)
        return None


def _name_runs(trainer: StageTrainer, runs: list[Run]) -> list[Run]:
    """Call the runs by their stages, `base` what no stage trained; by their order where two have one name."""
    adapters = trainer.start.adapters
    names = ["base", stage_name(adapters[-1]) if adapters else "base", trainer.stage.stage or END][-len(runs) :]
    if len(set(names)) < len(names):
        names = [FIRST, START, END][-len(runs) :]
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]
