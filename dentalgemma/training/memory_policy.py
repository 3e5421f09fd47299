"""`memory: auto`: micro-batch and gradient checkpointing are chosen to fit; the rows of a step stay as configured.

Checkpointing computes the forward pass twice, so it is the last resort: a smaller micro-batch with more accumulation
takes the same steps on the same rows. The choice is made by the estimate of `memory.py` and confirmed by one forward
and backward pass on the heaviest rows before anything is trained.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import should_reduce_batch_size
from transformers import PretrainedConfig, ProcessorMixin
from trl import ModelConfig, SFTConfig

from data_builders.records import InputError
from dentalgemma.available_memory import available_memory
from dentalgemma.training import checkpoints
from dentalgemma.training.data import IGNORED, ChatCollator, count_runs
from dentalgemma.training.memory import (
    GIB,
    TIGHT,
    Batch,
    Memory,
    Sharding,
    build_on_meta,
    step_memory,
    trace_step,
)
from dentalgemma.training.sharding import shards_weights

if TYPE_CHECKING:
    from dentalgemma.training.trainer import StageTrainer

SET_BY_PLANS = {
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    *(f"{word}_checkpointing{rest}" for word in ("gradient", "activation") for rest in ("", "_kwargs")),
}


OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED")  # of the driver; of cuBLAS and cuDNN


class MemoryShortError(InputError):
    """A run that does not fit into memory, however mild its settings."""


class ProbeError(RuntimeError):
    """A step before training failed in another process, for want of something other than memory."""


@dataclass(frozen=True)
class Run:
    """What the memory of a step depends on, beside its rows; `vision` as in `memory.trace_step`."""

    architecture: PretrainedConfig
    training: SFTConfig
    model_config: ModelConfig
    trains: Sequence[str]
    vision: str = "live"
    sharding: Sharding = field(default_factory=Sharding)


class Estimate(NamedTuple):
    """Memory of a step on each GPU, and its operations without the head."""

    memory: Memory
    flops: int


class Rows(NamedTuple):
    """The training rows, as far as memory goes: tokens of each, the pictures that it shows, and their tokens.

    Up to `questions` rows of the same pictures come into one sequence. At most `cuts` such groups of a batch are torn,
    at its ends, where `ImageGroups` fills it with rows.
    """

    lengths: Sequence[int]
    pictures: Sequence[Hashable] | None = None
    image_tokens: Sequence[int] | None = None
    questions: int = 1
    cuts: int = 2

    @property
    def shared(self) -> int:
        """Tokens that rows of the same pictures have in common for certain: the fewest that any row's pictures take."""
        return min((tokens for tokens in self.image_tokens or () if tokens), default=0)

    def packs(self, batch_size: int) -> bool:
        """Whether rows can share a sequence in batches of so many."""
        return min(self.questions, batch_size) > 1 and self.pictures is not None and self.shared > 0


class Load(NamedTuple):
    """One sequence of a batch: its tokens, and which rows of the dataset it holds."""

    tokens: int
    rows: tuple[int, ...]


class Plan(NamedTuple):
    """Rows at a time, batches per step, checkpointing; with the memory estimated for it and the memory there is."""

    rows: int
    accumulation: int
    checkpointing: bool
    memory: Memory | None = None
    available: int | None = None

    @property
    def fits(self) -> bool:
        return self.memory is None or self.memory.total <= TIGHT * self.available

    def __str__(self) -> str:
        switch = "gradient checkpointing" if self.checkpointing else "no gradient checkpointing"
        text = f"batch {self.rows} × accumulation {self.accumulation}, {switch}"
        if self.memory is None:
            return text
        number, unit = (GIB, "GiB") if self.available > 2 * GIB else (2**20, "MiB")
        return f"{text}: {self.memory.total / number:.1f} of {self.available / number:.1f} {unit} by estimate"


# What rows become


def count_cuts(training: SFTConfig, processes: int) -> int:
    """How many groups of a batch may be torn: at both ends, and where rows of another fill up the last of an epoch."""
    if training.train_sampling_strategy != "random":
        return training.per_device_train_batch_size * training.gradient_accumulation_steps  # rows come as they come
    return 2 if processes == 1 else 3


def group_rows(rows: Rows) -> list[list[int]]:
    """The rows of the same pictures, the longest first; one without pictures is a group of its own."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for number, shown in enumerate(rows.pictures):
        groups[shown if shown and rows.image_tokens[number] else ("row", number)].append(number)
    return [sorted(own, key=lambda number: -rows.lengths[number]) for own in groups.values()]


def lay_out(rows: Rows, batch_size: int) -> list[Load]:
    """The sequences that rows make in batches of so many rows, where no group is torn.

    Which rows of a picture come together is drawn anew in each epoch: here the longest do.
    """
    if not rows.packs(batch_size):
        return [Load(length, (number,)) for number, length in enumerate(rows.lengths)]
    questions, shared = min(rows.questions, batch_size), rows.shared
    return [
        _join(rows, own[first : first + questions], shared)
        for own in group_rows(rows)
        for first in range(0, len(own), questions)
    ]


def _join(rows: Rows, together: Sequence[int], shared: int) -> Load:
    lengths = [rows.lengths[number] for number in together]
    return Load(max(sum(lengths) - shared * (len(lengths) - 1), *lengths), tuple(together))


def heaviest(rows: Rows, batch_size: int) -> list[Load]:
    """The sequences that take most room in a batch of so many rows, each padded to the longest of them."""
    if not rows.packs(batch_size):
        longest = sorted(range(len(rows.lengths)), key=lambda number: -rows.lengths[number])[:batch_size]
        return [Load(rows.lengths[number], (number,)) for number in longest]
    questions, shared, groups = min(rows.questions, batch_size), rows.shared, group_rows(rows)
    longest: dict[tuple[int, int], tuple[Load, int]] = {}  # by rows, which leave the less for others, and cuts left
    for number, own in enumerate(groups):
        for size in range(1, min(questions, len(own)) + 1):
            whole = size == questions or size == len(own) % questions
            load, key = _join(rows, own[:size], shared), (size, rows.cuts - (not whole))
            if key not in longest or load.tokens > longest[key][0].tokens:
                longest[key] = load, number
    parts = _Parts(groups, questions)
    filled = (
        [load, *(_join(rows, part, shared) for part in parts.fill(batch_size - size, number, load, cuts))]
        for (size, cuts), (load, number) in longest.items()
        if cuts >= 0
    )
    return max(filled, key=_room)


class _Parts:
    """Groups of rows, and the order in which their parts make most sequences of few rows."""

    def __init__(self, groups: Sequence[Sequence[int]], questions: int) -> None:
        self.groups, self.questions = groups, questions
        left = [len(own) % questions for own in groups]
        whole = [(size, number) for number, size in enumerate(left) if size]
        whole += [(questions, number) for number, own in enumerate(groups) for _ in range(len(own) // questions)]
        self.whole = sorted(whole)
        # A row is torn off best where no small whole part is lost by it, and of a large group.
        torn = [number for number, own in enumerate(groups) if len(own) > 1]
        self.torn = sorted(torn, key=lambda number: (-(left[number] or questions), -len(groups[number])))

    def fill(self, room: int, first: int, load: Load, cuts: int) -> list[list[int]]:
        """Parts for so many rows beside one sequence of group `first`: single rows, torn ones, then larger parts."""
        taken = defaultdict(int, {first: len(load.rows)})
        parts = []
        single = bisect_right(self.whole, (1, len(self.groups)))
        for size, number, torn in chain(
            ((size, number, False) for size, number in self.whole[:single]),
            ((1, number, True) for number in self.torn),
            ((size, number, False) for size, number in islice(self.whole, single, None)),
        ):
            if size > room:
                break
            if (torn and not cuts) or not self._adds(number, size, taken):
                continue
            start = taken[number]
            taken[number] += size
            parts.append(list(self.groups[number][start : start + size]))
            room, cuts = room - size, cuts - torn
        return parts

    def _adds(self, number: int, size: int, taken: Mapping[int, int]) -> bool:
        """Whether so many rows more are left, and make another sequence: one that is not full takes them."""
        before, after = taken[number], taken[number] + size
        return after <= len(self.groups[number]) and -(-after // self.questions) > -(-before // self.questions)


def most_seen(rows: Rows, batch_size: int) -> list[Load]:
    """The heaviest batch of the rows whose pictures take most tokens: there a live tower has most to do."""
    chosen: dict[Hashable, list[int]] = {}
    packs = rows.packs(batch_size)
    for number in sorted(range(len(rows.lengths)), key=lambda n: (-rows.image_tokens[n], -rows.lengths[n])):
        shown = (rows.pictures[number] if packs else None) or ("row", number)
        if shown in chosen or len(chosen) < batch_size:
            chosen.setdefault(shown, []).append(number)
    numbers = [number for own in chosen.values() for number in own]
    some = rows._replace(
        **{
            name: [getattr(rows, name)[number] for number in numbers]
            for name in ("lengths", "pictures", "image_tokens")
            if getattr(rows, name) is not None
        }
    )
    loads = heaviest(some, batch_size)
    return [Load(load.tokens, tuple(numbers[place] for place in load.rows)) for load in loads]


def _room(loads: Sequence[Load]) -> int:
    return len(loads) * max(load.tokens for load in loads)


def heaviest_batch(rows: Rows, batch_size: int, row: Batch) -> Batch:
    """The batch of `heaviest` in numbers; pictures, and the answer to each question, as in `row`."""
    if not rows.packs(batch_size):
        return replace(row, rows=batch_size, tokens=max(rows.lengths))
    chosen = heaviest(rows, batch_size)
    questions = sum(len(load.rows) for load in chosen)
    return replace(
        row,
        rows=len(chosen),
        tokens=max(load.tokens for load in chosen),
        answer_tokens=-(-row.answer_tokens * questions // len(chosen)),
        questions=questions / len(chosen),
    )


def measure_row(row: Mapping, processor: ProcessorMixin) -> Batch:
    """One row of a dataset in numbers, as the collator makes it."""
    return measure_batch(ChatCollator(processor)([row]), processor)


def measure_batch(batch: Mapping[str, torch.Tensor], processor: ProcessorMixin) -> Batch:
    """A batch of one row in numbers."""
    ids, image = batch["input_ids"][0].tolist(), processor.tokenizer.image_token_id
    pictures, tokens = count_runs(ids, image), ids.count(image)
    return Batch(
        rows=1,
        tokens=len(ids),
        answer_tokens=int((batch["labels"] != IGNORED).sum()),
        images=(tokens // pictures,) * pictures if pictures else (),
    )


# The choice


def estimate(run: Run, batch: Batch, *, checkpointing: bool) -> Estimate:
    """What one step on a batch takes; seconds of work for a model of four billion parameters."""
    model = build_on_meta(run.architecture, run.model_config, run.trains)
    mixed = bool(run.training.bf16 or run.training.fp16)
    trace = trace_step(model, batch, checkpointing=checkpointing, mixed_precision=mixed, vision=run.vision)
    return Estimate(step_memory(model, trace, batch, run.training, run.model_config, run.sharding), trace.flops)


def choose(run: Run, row: Batch, rows: Rows, *, available: int, batch_size: int | None = None) -> Plan:
    """The largest micro-batch without checkpointing that fits; with it only where not even one row fits without.

    `row` is one of the longest, for its pictures and answer. `available` is the memory of the device in bytes.
    `batch_size` fixes the micro-batch, as where a run is resumed: then only checkpointing is chosen. Where nothing
    fits, the mildest plan comes back: `Plan.fits` says so.
    """
    in_step = run.training.per_device_train_batch_size * run.training.gradient_accumulation_steps
    sizes = [batch_size] if batch_size else divisors(in_step)
    sizes = [size for size in sizes if size <= len(rows.lengths)] or sizes[-1:]
    for checkpointing in _switches(run):
        memory = _measure(run, row, rows, sizes, checkpointing)
        for size in sizes:
            plan = Plan(size, in_step // size, checkpointing, memory(size), available)
            if plan.fits:
                return plan
            if size == sizes[0] and not Plan(size, 1, checkpointing, memory(sizes[-1]), available).fits:
                break  # no batch in between does
    return Plan(sizes[-1], in_step // sizes[-1], checkpointing, memory(sizes[-1]), available)


def divisors(number: int) -> list[int]:
    """All divisors, the largest first."""
    return [size for size in range(number, 0, -1) if number % size == 0]


def _switches(run: Run) -> tuple[bool, ...]:
    # TRL makes checkpoints reentrant under ZeRO-3, and through these neither tower nor aligner learns anything.
    only_without = run.sharding.kind == "zero3" and set(run.trains) != {"language_model"}
    return (False,) if only_without else (False, True)


def _measure(run: Run, row: Batch, rows: Rows, sizes: Sequence[int], checkpointing: bool) -> Callable[[int], Memory]:
    """Memory by micro-batch, from two traces at most.

    What is alive at one moment grows linearly with the batch, so the peak over all moments is convex: between the
    smallest and the largest batch it lies below the line through both.
    """

    @cache
    def batch(size: int) -> Batch:
        return heaviest_batch(rows, size, row)

    @cache
    def exact(size: int) -> Memory:
        return estimate(run, batch(size), checkpointing=checkpointing).memory

    def memory(size: int) -> Memory:
        if size in (sizes[0], sizes[-1]):
            return exact(size)
        smallest, here, largest = (batch(each).rows * batch(each).tokens for each in (sizes[-1], size, sizes[0]))
        share = (here - smallest) / max(largest - smallest, 1)
        low, high = exact(sizes[-1]), exact(sizes[0])
        between = {
            kind: int(getattr(low, kind) + share * (getattr(high, kind) - getattr(low, kind)))
            for kind in ("activations", "head")
        }
        return replace(low, **between)

    return memory


def sharding_of(training: SFTConfig) -> Sharding:
    """How this run's processes share the work, as the estimate counts it."""
    processes, deepspeed = training.world_size, training.deepspeed_plugin
    if deepspeed is not None and deepspeed.zero_stage in (2, 3):
        return Sharding(f"zero{deepspeed.zero_stage}", processes)
    if shards_weights(training):
        return Sharding("fsdp", processes)
    return Sharding("ddp" if processes > 1 else "none", processes)


def device_memory(training: SFTConfig) -> int:
    """Bytes that a process may take in all, the least of any process: what is free and what it holds already."""
    if torch.cuda.is_available() and not training.use_cpu:
        own = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    else:
        own = available_memory() // training.world_size + psutil.Process().memory_info().rss
    return min(gather_object([own]))


# Taking a plan


def settle(
    trainer: StageTrainer, row: Batch, rows: Rows, *, model_config: ModelConfig, trains: Sequence[str], vision: str
) -> Plan:
    """Choose a plan for a trainer that does not train yet, take it and say so; a resumed run keeps its micro-batch."""
    training = trainer.args
    run = Run(trainer.model.config, training, model_config, trains, vision, sharding_of(training))
    size = saved_batch_size(training)
    if training.deepspeed_plugin is not None:
        size = training.per_device_train_batch_size  # DeepSpeed was told when the arguments were read
    plan = choose(run, row, rows, available=device_memory(training), batch_size=size)
    adopt(plan, trainer)
    if trainer.is_world_process_zero():
        checkpoints.say(f"Memory: {plan}{_what_is_packed(plan, rows)}")
        if not plan.fits:
            checkpoints.say("Memory: this may not suffice; `dentalgemma doctor` says what would")
    return plan


def _what_is_packed(plan: Plan, rows: Rows) -> str:
    if rows.pictures is None or not plan.rows < rows.questions:
        return ""
    packed = f"at most {plan.rows} questions are" if plan.rows > 1 else "nothing is"
    return f"; {packed} packed, since pack_questions: {rows.questions} needs {rows.questions} rows at a time"


def set_arguments(plan: Plan, training: SFTConfig) -> None:
    """Set what a plan says in the arguments of a run."""
    training.per_device_train_batch_size = plan.rows
    training.gradient_accumulation_steps = plan.accumulation
    # transformers 5.23 reads the new name, trl 1.16 the old one.
    training.gradient_checkpointing = training.activation_checkpointing = plan.checkpointing
    if plan.checkpointing:
        reentrant = sharding_of(training).kind == "zero3"  # as TRL has it there
        chosen = {**(training.gradient_checkpointing_kwargs or {}), "use_reentrant": reentrant}
        training.gradient_checkpointing_kwargs = training.activation_checkpointing_kwargs = chosen


def adopt(plan: Plan, trainer: StageTrainer) -> None:
    """Set what a plan says in a trainer that does not train yet."""
    training, was_checkpointing = trainer.args, trainer.args.gradient_checkpointing
    set_arguments(plan, training)
    trainer._train_batch_size = training.train_batch_size
    if plan.checkpointing and not was_checkpointing:
        trainer.model.enable_input_require_grads()
    elif was_checkpointing and not plan.checkpointing:
        # TRL enabled it for checkpoints alone; it costs a backward pass down to the embeddings.
        trainer.model.disable_input_require_grads()
    if hasattr(trainer, "settings"):  # what a checkpoint records of its run
        changed = training.to_dict()
        trainer.settings |= {name: changed[name] for name in changed if name in SET_BY_PLANS}


def saved_batch_size(training: SFTConfig) -> int | None:
    """The micro-batch of the run that is to be resumed, where its steps have as many rows as those configured now.

    It is kept: what is packed together, and where dropout falls, depends on which rows come together.
    """
    folder = _resumed_from(training)
    try:
        saved = checkpoints.read_manifest(folder)["run"]["configuration"] if folder else {}
    except (OSError, KeyError, TypeError, json.JSONDecodeError):
        return None  # refused when it is resumed, with the reason
    rows, accumulation = (saved.get(name, 0) for name in ("per_device_train_batch_size", "gradient_accumulation_steps"))
    in_step = training.per_device_train_batch_size * training.gradient_accumulation_steps
    return rows if rows * accumulation == in_step else None


def _resumed_from(training: SFTConfig) -> Path | None:
    wanted = training.resume_from_checkpoint
    word = str(wanted).lower()
    if wanted is None or word in checkpoints.SCRATCH:
        return None
    if word not in checkpoints.NEWEST:
        return Path(wanted)
    present = reversed(checkpoints.list_checkpoints(Path(training.output_dir)))
    return next((folder for folder in present if checkpoints.find_fault(folder, hashes=False) is None), None)


# The proof of a plan


def confirm(trainer: StageTrainer, plan: Plan, rows: Rows) -> Plan:
    """Try a plan on the heaviest rows before anything is trained; where memory runs out, take the next milder one.

    Nothing of it stays: no gradient, no step, no random number drawn, no metric. All processes go on together. Where
    weights or optimizer are cut up, and on a CPU, the estimate has to do. `trainer.memory` records what was planned and
    seen.

    Raises:
        MemoryShortError: when not even one row with checkpointing fits.
    """
    measured, tried = None, plan
    if can_probe(trainer.args):
        for tried in (plan, *milder(plan, keep_rows=saved_batch_size(trainer.args) is not None)):
            adopt(tried, trainer)
            measured = _all_fit(trainer, tried._replace(memory=plan.memory), rows)
            if measured is not None:
                break
        else:
            raise checkpoints.said_once(_too_much(plan), trainer.accelerator)
    if tried is not plan and trainer.is_world_process_zero():
        checkpoints.say(f"Memory: {tried}{_what_is_packed(tried, rows)}")
    trainer.memory = {
        "rows": tried.rows,
        "accumulation": tried.accumulation,
        "gradient_checkpointing": tried.checkpointing,
        "estimated_bytes": tried.memory.total if tried.memory else None,
        "available_bytes": plan.available,
        "measured_bytes": measured,
    }
    return tried


def can_probe(training: SFTConfig) -> bool:
    """Whether one process alone can run a step, and running out of memory is an error and not the end."""
    return training.device.type == "cuda" and sharding_of(training).kind in ("none", "ddp")


def milder(plan: Plan, *, keep_rows: bool = False) -> list[Plan]:
    """What to try after a plan, in order: fewer rows at a time, then all of its rows with checkpointing, then fewer."""
    in_step = plan.rows * plan.accumulation
    sizes = [plan.rows] if keep_rows else [size for size in divisors(in_step) if size <= plan.rows]
    tries = [(size, switch) for switch in (False, True) for size in sizes]
    return [
        Plan(size, in_step // size, switch, available=plan.available)
        for size, switch in tries[tries.index((plan.rows, plan.checkpointing)) + 1 :]
    ]


def _too_much(plan: Plan) -> MemoryShortError:
    return MemoryShortError(
        f"memory: auto: not even one row at a time with gradient checkpointing fits into {plan.available / GIB:.1f} "
        "GiB: set `load_in_4bit: true`, leave out long rows (`max_row_tokens`), or take a larger GPU"
    )


def _all_fit(trainer: StageTrainer, plan: Plan, rows: Rows) -> int | None:
    """Bytes at the peak of the process that took most; None where memory ran out in any.

    Raises:
        ProbeError: in all processes, when a step failed in one for another reason.
    """
    peak = failure = None
    try:
        peak = run_step(trainer, plan, rows)
    except Exception as error:
        if not ran_out(error):
            failure = error
    trainer.model.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    found = gather_object([(peak, None if failure is None else f"{type(failure).__name__}: {failure}")])
    if failure is not None:
        raise failure
    if failed := [(number, text) for number, (_, text) in enumerate(found) if text is not None]:
        raise ProbeError("process {}: {}".format(*failed[0]))
    peaks = [peak for peak, _ in found]
    if None not in peaks:
        return max(peaks)
    if trainer.is_world_process_zero():
        where = "" if len(peaks) == 1 else f" in {peaks.count(None)} of {len(peaks)} processes"
        checkpoints.say(f"Out of memory{where} with batch {plan.rows}: trying milder settings")
    return None


def ran_out(error: Exception) -> bool:
    """Whether an error means that memory ran out; libraries beside PyTorch's allocator have words of their own."""
    own = isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
    return own or (isinstance(error, RuntimeError) and any(word in str(error) for word in OUT_OF_MEMORY))


def run_step(trainer: StageTrainer, plan: Plan, rows: Rows) -> int:
    """A forward and backward pass on the heaviest rows, as a step has it; the bytes at its peak, 0 on a CPU.

    A tower that sees live has most to do where there are most pictures: such rows get a pass too. Collectives are left
    out: a process that runs out of memory would leave the others waiting.
    """
    batches = [heaviest(rows, plan.rows)]
    if trainer.live and rows.image_tokens is not None and any(rows.image_tokens):
        batches.append(most_seen(rows, plan.rows))
    device = trainer.args.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with checkpoints.unchanged_randomness(), _training(trainer, plan), trainer.maybe_activation_offload_context:
        # The room of what does not exist yet: moments of the optimizer, and in DDP its buckets.
        later = plan.memory.optimizer + max(0, plan.memory.gradients - plan.memory.adapters) if plan.memory else 0
        kept = torch.empty(later if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
        for loads in batches:
            _pass(trainer, [number for load in loads for number in load.rows])
        del kept
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def _pass(trainer: StageTrainer, rows: Sequence[int]) -> None:
    inputs = trainer._prepare_inputs(trainer.packing_collator([trainer.train_dataset[number] for number in rows]))
    with trainer.accelerator.autocast():
        outputs = trainer.model(**inputs, use_cache=False, fused_lm_head=True)
        loss = -outputs.log_probs.sum()
    loss.backward()


@contextmanager
def _training(trainer: StageTrainer, plan: Plan) -> Any:
    """The model as it trains, and afterwards as it was."""
    model, mode = trainer.model, trainer.model.training
    model.train()
    if plan.checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        model.train(mode)
        if plan.checkpointing:
            model.activation_checkpointing_disable()
