"""Validation by asking: at each evaluation the model answers a fixed sample of rows, and what it states is scored."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from datasets import Dataset
from torch import nn
from tqdm import tqdm
from transformers import ProcessorMixin, TrainerState
from trl import SFTConfig

from data_builders.claims import ClaimsDocument, read_claims
from data_builders.records import InputError
from data_builders.sources import load_vocabulary
from dentalgemma.evaluation.generation import write_answers
from dentalgemma.training.checkpoints import RESUME, DiskFullError, is_disk_full
from dentalgemma.training.config import StageConfig
from dentalgemma.training.data import DatasetError, open_images, place_images
from dentalgemma.training.verdicts import LOWER_IS_BETTER, Case, Judgement, judge_answer, measure

if TYPE_CHECKING:
    from dentalgemma.training.trainer import StageTrainer

FOLDER = "validation"
STRATA = ("question_type", "source", "language")
MARGIN = 1.25  # an answer may be longer than the longest reference by a quarter and a few tokens
FEW_TOKENS = 8
SHOWN = (
    "yes_no_accuracy",
    "sensitivity",
    "specificity",
    "side_accuracy",
    "region_accuracy",
    "tooth_accuracy",
    "condition_named",
    "contradictions",
    "exact_match",
    "ended",
)


class SampledValidation:
    """A fixed sample of validation rows, and what it takes to ask and judge them."""

    def __init__(self, rows: Dataset, processor: ProcessorMixin, *, size: int, seed: int, dataset: Path) -> None:
        own_terms = dataset / "vocabulary.yaml"  # where the build was given one
        self.vocabulary = load_vocabulary(own_terms if own_terms.is_file() else None)
        conditions = _read_conditions(dataset)
        self.conditions = sorted(set(conditions.values()))
        self.processor = processor
        self.seed = seed
        self.rows = rows.select(choose_sample(rows, size=size, seed=seed))
        self.cases = [_read_case(row, conditions) for row in _without_images(self.rows)]
        references = processor.tokenizer([case.reference for case in self.cases], add_special_tokens=False)["input_ids"]
        self.lengths = [len(tokens) for tokens in references]
        self.max_new_tokens = int(max(self.lengths) * MARGIN) + FEW_TOKENS
        images = self.rows["images"] if "images" in self.rows.column_names else []
        self.pictured = [bool(own) for own in images] or [False] * len(self.cases)

    def judge(self, answers: Sequence[Mapping[str, str]]) -> list[Judgement]:
        """Judge an answer (`output`, `finish_reason`) to each row of the sample."""
        return [
            judge_answer(
                case,
                answer["output"],
                ended=answer["finish_reason"] == "stop",
                vocabulary=self.vocabulary,
                conditions=self.conditions,
            )
            for case, answer in zip(self.cases, answers, strict=True)
        ]

    def metrics(self) -> list[str]:
        """The names of what this sample has cases of."""
        perfect = [{"output": case.reference, "finish_reason": "stop"} for case in self.cases]
        return list(measure(self.judge(perfect)))

    def evaluate(self, trainer: StageTrainer) -> dict[str, float]:
        """Ask the sample and return its metrics, the same in every process; the first one writes the answers.

        The model is left in the mode that it was in, and no random number is drawn, so that a run trains on as it
        would without.
        """
        began, step = time.perf_counter(), trainer.state.global_step
        answers = self.ask(
            trainer.model,
            trainer.accelerator,
            batch_size=trainer.args.per_device_eval_batch_size,
            before_batch=trainer.interrupt_evaluation,
        )
        judgements = self.judge(answers)
        metrics = measure(judgements)
        seconds = round(time.perf_counter() - began, 3)
        if trainer.is_world_process_zero():
            self.write(Path(trainer.args.output_dir) / FOLDER / f"step-{step}.jsonl", answers, judgements)
            shown = ", ".join(f"{name} {metrics[name]:.2f}" for name in SHOWN if name in metrics)
            tqdm.write(f"Step {step}: {len(answers)} validation answers in {seconds:.1f} s: {shown}", file=sys.stderr)
        return metrics | {"sampled_seconds": seconds}

    def ask(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        *,
        batch_size: int,
        before_batch: Callable[[], object] = lambda: None,
    ) -> list[dict[str, str]]:
        """The model's greedy answers to the sample, in its order; each process writes its share of them."""
        model = accelerator.unwrap_model(model, keep_torch_compile=False)
        sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        if accelerator.distributed_type == DistributedType.FSDP:
            _let_generate(model)
        was_training = model.training
        model.eval()  # which switches gradient checkpointing off, and with it what would forbid the cache
        own: list[tuple[int, dict[str, str]]] = []
        try:
            with torch.no_grad(), accelerator.autocast():
                for batch in self._deal(accelerator, batch_size):
                    before_batch()
                    conversations = [to_conversation(self.rows[number]) for number in batch]
                    answers = write_answers(
                        model,
                        self.processor,
                        conversations,
                        max_new_tokens=self.max_new_tokens,
                        synced_gpus=sharded and accelerator.num_processes > 1,
                    )
                    own += zip(batch, answers, strict=True)
        finally:
            model.train(was_training)
        by_number = dict(gather_object(own))
        return [by_number[number] for number in range(len(self.cases))]

    def _deal(self, accelerator: Accelerator, batch_size: int) -> Iterator[list[int]]:
        """The batches of this process; all processes have as many, each with images or without at the same time.

        Where processes hold one model between them, one that skips the vision tower would let the others wait forever.
        Rows with answers of about the same length go together, since a batch lasts as long as its longest answer.
        """
        processes, rank = accelerator.num_processes, accelerator.process_index
        for pictured in (True, False):
            group = [number for number, own in enumerate(self.pictured) if own == pictured]
            group.sort(key=lambda number: self.lengths[number])
            for start in range(0, len(group), processes * batch_size):
                together = group[start : start + processes * batch_size]
                yield together[rank::processes] or together[:1]

    def write(self, path: Path, answers: Sequence[Mapping[str, str]], judgements: Sequence[Judgement]) -> None:
        """Write a line for each answer.

        Raises:
            DiskFullError: when there is no space for them.
        """
        lines = []
        for case, answer, judgement in zip(self.cases, answers, judgements, strict=True):
            counts = {name: [float(hits), cases] for name, (hits, cases) in judgement.counts.items()}
            line = {"row_id": case.row_id, "question_type": case.question_type, "question": case.question}
            line |= {"reference": case.reference, "answer": answer["output"], "finish_reason": answer["finish_reason"]}
            line |= {"hits_and_cases": counts, "contradictions": judgement.contradictions, "unread": judgement.unread}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        partial = path.with_suffix(".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text("".join(lines), encoding="utf-8")
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            if not is_disk_full(error):
                raise
            raise DiskFullError(f"no space to write {path}; make room, then go on with {RESUME}") from error

    def facts(self, state: TrainerState) -> dict[str, object]:
        """What run facts keep: the sample, and its metrics at the best step, or the last one where none is best."""
        names = {f"eval_{name}": name for name in self.metrics()}
        scored = {entry["step"]: entry for entry in state.log_history if names.keys() & entry.keys()}
        step = state.best_global_step if state.best_global_step in scored else max(scored, default=None)
        best = scored.get(step, {})
        row_ids = "\n".join(case.row_id for case in self.cases)
        return {
            "rows": len(self.cases),
            "seed": self.seed,
            "row_ids_sha256": hashlib.sha256(row_ids.encode()).hexdigest(),
            "max_new_tokens": self.max_new_tokens,
            "step": step,
            "metrics": {name: best[key] for key, name in names.items() if key in best},
        }


def prepare_validation(
    stage: StageConfig, training: SFTConfig, rows: Dataset, processor: ProcessorMixin
) -> SampledValidation | None:
    """The sample of a stage, `None` where it asks for none; the metric that chooses the best checkpoint is checked.

    Raises:
        InputError: when nothing will measure `metric_for_best_model`, or the worst checkpoint would be kept.
    """
    validation = None
    if training.eval_strategy != "no" and stage.validation_sample:
        if stage.validation_sample < 0:
            raise InputError(f"validation_sample: {stage.validation_sample} is no number of rows; 0 asks none")
        if not len(rows):
            raise DatasetError(f"{stage.dataset_name}: the split {stage.dataset_test_split!r} is empty")
        dataset = Path(stage.dataset_name or "")
        validation = SampledValidation(
            rows, processor, size=stage.validation_sample, seed=training.seed, dataset=dataset
        )
    if training.eval_strategy != "no" and training.metric_for_best_model is not None:
        _check_metric(training, validation)
    return validation


def _check_metric(training: SFTConfig, validation: SampledValidation | None) -> None:
    name = training.metric_for_best_model.removeprefix("eval_")
    known = ["loss", "mean_token_accuracy", *(validation.metrics() if validation else [])]
    if name not in known:
        hint = "" if validation else "; `validation_sample: 64` adds those of sampled answers"
        available = ", ".join(f"eval_{metric}" for metric in known)
        raise InputError(f"metric_for_best_model: nothing measures {name!r} here; choose among {available}{hint}")
    if name in LOWER_IS_BETTER and name != "loss":
        # transformers takes every name that does not end in "loss" for one that should rise.
        training.greater_is_better = False
    if training.greater_is_better == (name in LOWER_IS_BETTER):
        raise InputError(
            f"greater_is_better: {str(training.greater_is_better).lower()} would keep the checkpoint with the worst "
            f"eval_{name}; leave it out, it follows from the metric"
        )


def choose_sample(rows: Dataset, *, size: int, seed: int) -> list[int]:
    """The numbers of `size` rows, dealt over question types, sources and languages, the same whatever the order.

    Each stratum gives one row before any gives a second, so that what is rare is asked too.
    """
    strata: dict[tuple, list[tuple[str, int]]] = defaultdict(list)
    for number, row in enumerate(_without_images(rows)):
        rank = hashlib.sha256(f"{seed}/{_row_id(row)}".encode()).hexdigest()
        strata[tuple(str(row.get(name)) for name in STRATA)].append((rank, number))
    order = [
        (place, stratum, number) for stratum, own in strata.items() for place, (_, number) in enumerate(sorted(own))
    ]
    return [number for _, _, number in sorted(order)[:size]]


def to_conversation(row: Mapping) -> list[dict]:
    """A row's prompt with its images where the collator puts them, which has checked that there is a place for each."""
    images = open_images(row)
    conversation = place_images(row["prompt"], len(images))
    places = [part for message in conversation for part in message["content"] if part["type"] == "image"]
    for place, image in zip(places, images, strict=True):
        place["image"] = image
    return conversation


def _read_case(row: Mapping, conditions: Mapping[str, str]) -> Case:
    row_id = _row_id(row)
    return Case(
        row_id,
        question=_text(row["prompt"][-1]),
        reference=_text(row["completion"][-1]),
        language=row.get("language") or "en",
        question_type=row.get("question_type") or "",
        claims=_read_claims(row_id, row.get("claims")),
        condition=conditions.get(row_id),
    )


def _read_claims(row_id: str, text: str | None) -> ClaimsDocument | None:
    if not text:
        return None
    try:
        return read_claims(text)
    except ValueError as error:
        raise DatasetError(
            f"row {row_id}: its claims cannot be read ({error}): build the dataset again, or set `validation_sample: 0`"
        ) from None


def _read_conditions(dataset: Path) -> dict[str, str]:
    """What the cases of a chat dataset folder are about, by row id; a dataset from the Hub does not tell."""
    path = dataset / "cases.jsonl"
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8") as file:
        cases = [json.loads(line) for line in file]
    return {case["row_id"]: case["condition"] for case in cases if case["condition"]}


def _without_images(rows: Dataset) -> Dataset:
    return rows.remove_columns("images") if "images" in rows.column_names else rows


def _row_id(row: Mapping) -> str:
    """A row's own id; one of another's dataset is called by what it says."""
    if row.get("row_id"):
        return row["row_id"]
    turns = json.dumps([row["prompt"], row["completion"]], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(turns.encode()).hexdigest()[:16]


def _text(message: Mapping) -> str:
    content = message["content"]
    return content if isinstance(content, str) else " ".join(part.get("text") or "" for part in content)


def _let_generate(model: nn.Module) -> None:
    """FSDP2 gathers the weights that no layer owns when the model is called; `generate` calls what is inside it."""
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    if isinstance(model, FSDPModule):
        register_fsdp_forward_method(model, "generate")
