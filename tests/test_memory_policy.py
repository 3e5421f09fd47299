"""`memory: auto`: what is chosen for how much memory, and that trying it leaves no trace in the run."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from conftest import REPOSITORY
from test_memory import GEMMA3_4B, lora, training
from transformers import AutoConfig

from dentalgemma.training import memory_policy
from dentalgemma.training.memory import GIB, GPUS, TIGHT, Batch, Sharding
from dentalgemma.training.memory_policy import (
    MemoryShortError,
    Plan,
    Rows,
    Run,
    _what_is_packed,
    adopt,
    choose,
    confirm,
    divisors,
    estimate,
    heaviest,
    heaviest_batch,
    lay_out,
    milder,
    most_seen,
    ran_out,
    run_step,
    saved_batch_size,
)
from dentalgemma.training.packing import Example, ImageGroups, pack

ROW = Batch(1, 120, 20, (16,))
ROWS = Rows([100, 120, 80] * 20)


@pytest.fixture(scope="module")
def run(tiny_model):
    """Eight rows a step, on the small model."""
    settings = training(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    return Run(AutoConfig.from_pretrained(tiny_model), settings, lora(lora_r=8), ["language_model"], "cached")


@pytest.fixture(scope="module")
def exact(run):
    """Memory of every micro-batch with and without checkpointing, each traced by itself."""
    return {
        (size, switch): estimate(run, heaviest_batch(ROWS, size, ROW), checkpointing=switch).memory.total
        for size in (8, 4, 2, 1)
        for switch in (False, True)
    }


def available_for(total):
    return int(total / TIGHT) + 1


@pytest.mark.parametrize("size", [8, 4, 2, 1])
def test_the_largest_batch_without_checkpointing_is_taken(run, exact, size):
    spare = 0 if size in (1, 8) else 0.2 * (exact[2 * size, False] - exact[size, False])  # between traces it is above
    room = exact[size, False] + spare
    plan = choose(run, ROW, ROWS, available=available_for(room))

    assert (plan.rows, plan.accumulation, plan.checkpointing) == (size, 8 // size, False)
    assert plan.fits


def test_checkpointing_is_taken_where_not_one_row_fits_without(run, exact):
    some = choose(run, ROW, ROWS, available=available_for(exact[1, False]) - 2)
    none = choose(run, ROW, ROWS, available=exact[1, True] // 2)

    assert some.checkpointing
    assert some.fits
    assert some.rows * some.accumulation == 8
    assert (none.rows, none.accumulation, none.checkpointing, none.fits) == (1, 8, True, False)


def test_between_two_traces_memory_is_never_underestimated(run, exact):
    measured = memory_policy._measure(run, ROW, ROWS, [8, 4, 2, 1], checkpointing=False)

    for size in (4, 2):
        above = measured(size).total - exact[size, False]
        assert 0 <= above <= 0.1 * measured(size).activations


def test_a_resumed_run_keeps_its_batch_and_may_turn_to_checkpointing(run, exact):
    ample, short = (
        choose(run, ROW, ROWS, available=available_for(exact[4, switch]), batch_size=4) for switch in (False, True)
    )

    assert (ample.rows, ample.checkpointing) == (4, False)
    assert (short.rows, short.checkpointing) == (4, True)


def test_under_zero3_an_aligner_is_never_checkpointed(run):
    sharded = Run(run.architecture, run.training, run.model_config, ["aligner"], "live", Sharding("zero3", 2))

    assert not choose(sharded, ROW, ROWS, available=1).checkpointing
    assert choose(Run(**{**vars(sharded), "trains": ["language_model"]}), ROW, ROWS, available=1).checkpointing


def test_a_batch_is_never_larger_than_the_data(run):
    assert choose(run, ROW, Rows([100, 120, 80]), available=10**12).rows == 2


def test_a_plan_says_what_it_is():
    memory = estimate_like(31.2 * GIB)

    assert str(Plan(8, 2, False, memory, int(79.2 * GIB))) == (
        "batch 8 × accumulation 2, no gradient checkpointing: 31.2 of 79.2 GiB by estimate"
    )


def estimate_like(total):
    from dentalgemma.training.memory import Memory

    return Memory(int(total), 0, 0, 0, 0, 0, context=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gpu", "vision"), [("h200", "cached"), ("a100", "cached"), ("l4", "cached"), ("t4", "cached"), ("a100", "live")]
)
def test_the_4b_model_is_planned_in_seconds(gpu, vision):
    """Sixteen rows a step of 600 tokens; figures are estimates."""
    settings = training(per_device_train_batch_size=4, gradient_accumulation_steps=4, bf16=True)
    run = Run(GEMMA3_4B, settings, lora(dtype="bfloat16"), ["language_model"], vision)
    started = time.process_time()
    plan = choose(run, Batch(1, 600, 150, (256,)), Rows([600] * 100), available=int(GPUS[gpu].gib * GIB))
    seconds = time.process_time() - started

    print(f"\n{gpu}, {vision}: {plan} ({seconds:.1f} s)")
    assert plan.rows * plan.accumulation == 16
    assert plan.checkpointing == (gpu == "t4")
    if gpu in ("h200", "a100"):
        assert plan.rows >= 8
    assert seconds < 30  # on a busy machine; some five on an idle one


# What rows become


def test_unpacked_rows_are_sequences_and_packed_ones_share_their_picture():
    rows = Rows([50, 60, 70, 40], ["a", "a", "a", None], [30, 30, 30, 0], questions=2)

    assert [load.tokens for load in lay_out(rows, 1)] == [50, 60, 70, 40]
    assert [(load.tokens, load.rows) for load in lay_out(rows, 4)] == [(70 + 60 - 30, (2, 1)), (50, (0,)), (40, (3,))]
    assert heaviest_batch(rows, 4, Batch(1, 70, 5, (30,))) == Batch(3, 100, 7, (30,), questions=4 / 3)


@pytest.mark.parametrize(
    ("questions", "batch_size", "tokens"), [(3, 8, 4 * 688), (3, 4, 2 * 688), (2, 3, 2 * 544), (1, 4, 4 * 400)]
)
def test_groups_torn_at_the_ends_of_a_batch_are_planned_for(questions, batch_size, tokens):
    """Rows of 400 tokens, 256 of them their picture's, as many of each picture as come together."""
    rows = Rows([400] * 90, [f"p{number // questions}" for number in range(90)], [256] * 90, questions)

    assert room(heaviest(rows, batch_size)) == tokens


def room(loads):
    return len(loads) * max(load.tokens for load in loads)


def draw_rows(seed):
    """Rows of a few pictures or none, all of a picture's with the same first thirty tokens; rows in a batch."""
    draw = random.Random(seed)
    names = [f"p{number}" for number in range(draw.choice([1, 2, 4, 8, 12]))]
    without = draw.choice([0, 0.2])
    pictures = [None if draw.random() < without else draw.choice(names) for _ in range(draw.randint(3, 40))]
    longest = draw.choice([40, 60, 200])
    lengths = [draw.randint(35, longest) for _ in pictures]
    image_tokens = [30 * (shown is not None) for shown in pictures]
    return Rows(lengths, pictures, image_tokens, draw.randint(2, 4)), draw.randint(1, min(10, len(lengths)))


def as_example(rows, number):
    shown, length = rows.pictures[number], rows.lengths[number]
    ids = [1] * rows.image_tokens[number]
    return Example(ids + [2 + number] * (length - len(ids)), length - 1, (shown,) if shown else ())


def room_of_real(rows, numbers):
    """Padded tokens of a batch as the collator makes it."""
    lines = pack([as_example(rows, number) for number in numbers], image_token_id=1, questions=rows.questions)
    return len(lines) * max(len(line.ids) for line in lines)


def test_no_real_batch_takes_more_room_than_the_heaviest():
    """What the sampler draws and the packer makes of it, against the plan and against the rows that try it."""
    lighter_whole = 0
    for seed in range(200):
        rows, size = draw_rows(seed)
        worst = 0
        for drawn in range(8):
            order = list(
                ImageGroups(size, rows.pictures, questions=rows.questions, seed=8 * seed, epoch=partial(int, drawn))
            )
            batches = (order[start : start + size] for start in range(0, len(order), size))
            worst = max(worst, *(room_of_real(rows, numbers) for numbers in batches))
        chosen = heaviest(rows, size)
        tried = [number for load in chosen for number in load.rows]

        assert room(chosen) >= worst, seed
        assert room_of_real(rows, tried) >= room(chosen), seed
        assert len(set(tried)) == len(tried) <= size
        lighter_whole += room(heaviest(rows._replace(cuts=0), size)) < worst

    assert lighter_whole > 20  # a plan that knows no torn groups would have been too light


def test_rows_share_what_the_row_with_fewest_pictures_has():
    rows = Rows([60, 300, 50, 20], ["a", "a", "a", None], [32, 128, 16, 0], questions=4)
    loads = lay_out(rows, 4)

    assert rows.shared == 16
    assert [load.tokens for load in loads] == [300 + 60 + 50 - 2 * 16, 20]
    assert Rows([40, 50]).shared == 0


def test_a_sequence_is_never_shorter_than_its_longest_row():
    rows = Rows([20, 20, 90], ["a"] * 3, [80] * 3, questions=3)  # what is shared cannot be longer than a row

    assert [load.tokens for load in lay_out(rows, 3)] == [90]
    assert room(heaviest(rows, 3)) >= 90


def test_the_rows_with_most_pictures_are_tried_where_the_tower_sees_live():
    unpacked = Rows([900, 800, 50, 60, 70], None, [0, 0, 16, 32, 16])
    packed = Rows([900, 800, 50, 60, 70], [None, None, "a", "b", "a"], [0, 0, 16, 32, 16], questions=2)

    assert {load.rows for load in heaviest(unpacked, 2)} == {(0,), (1,)}
    assert {load.rows for load in most_seen(unpacked, 2)} == {(3,), (4,)}
    assert {number for load in most_seen(packed, 3) for number in load.rows} >= {3, 4}


def test_a_micro_batch_that_packs_nothing_says_so():
    rows = Rows([50] * 4, ["a", "a", "b", "b"], [30] * 4, questions=2)

    assert "nothing is packed, since pack_questions: 2 needs 2 rows" in _what_is_packed(Plan(1, 8, False), rows)
    assert _what_is_packed(Plan(2, 4, False), rows) == ""
    assert "at most 2 questions are packed" in _what_is_packed(Plan(2, 4, False), rows._replace(questions=4))


# The proof of a plan


@pytest.fixture(scope="module")
def trainer(make_trainer, tiny_model, tmp_path_factory):
    return make_trainer(tiny_model, tmp_path_factory.mktemp("policy") / "run", pack_questions=1)


def rows_of(trainer):
    return Rows([len(ids) for ids in trainer.train_dataset["completion"][:]])


class Device:
    """A device that holds so many rows, twice as many with checkpointing, for a trainer on the CPU."""

    def __init__(self, trainer, limit, error=None):
        self.trainer, self.limit, self.tried = trainer, limit, []
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.hook = trainer.model.get_base_model().register_forward_pre_hook(self.hold, with_kwargs=True)

    def hold(self, model, args, kwargs):
        rows, checkpointing = len(kwargs["input_ids"]), self.trainer.args.gradient_checkpointing
        self.tried.append((rows, checkpointing))
        if rows > self.limit * (1 + checkpointing):
            raise self.error


@pytest.fixture
def device(trainer, monkeypatch):
    monkeypatch.setattr(memory_policy, "can_probe", lambda training: True)
    made = []

    def make(limit, error=None):
        made.append(Device(trainer, limit, error))
        return made[-1]

    yield make
    for each in made:
        each.hook.remove()


@pytest.mark.parametrize(
    ("limit", "taken", "attempts"),
    [
        (8, (8, 1, False), 1),
        (3, (2, 4, False), 3),
        (0.5, (1, 8, True), 8),
    ],
)
def test_out_of_memory_leads_to_the_next_milder_plan(trainer, device, capsys, limit, taken, attempts):
    plan, short = Plan(8, 1, False, estimate_like(GIB), 2 * GIB), device(limit)
    found = confirm(trainer, plan, rows_of(trainer))

    assert found[:3] == taken
    assert len(short.tried) == attempts
    assert short.tried[-1] == (taken[0], taken[2])
    said = capsys.readouterr().err
    assert said.count("Out of memory") == attempts - 1
    assert (f"Memory: batch {taken[0]} × accumulation {taken[1]}" in said) == (attempts > 1)
    settings = trainer.args
    assert (settings.per_device_train_batch_size, settings.gradient_accumulation_steps) == taken[:2]
    assert settings.gradient_checkpointing == settings.activation_checkpointing == taken[2]
    assert trainer._train_batch_size == taken[0]
    assert trainer.settings["per_device_train_batch_size"] == taken[0]
    assert trainer.memory["rows"] == taken[0]
    assert trainer.memory["measured_bytes"] == 0  # on a CPU
    assert not any(parameter.grad is not None for parameter in trainer.model.parameters())


def test_a_device_on_which_nothing_fits_ends_the_run_with_a_remedy(trainer, device):
    device(0)
    with pytest.raises(MemoryShortError, match="not even one row at a time with gradient checkpointing"):
        confirm(trainer, Plan(8, 1, False, None, 2 * GIB), rows_of(trainer))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
            True,
        ),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_memory_runs_out_in_other_words_too(error, expected):
    assert ran_out(error) == expected


def test_cublas_without_room_leads_to_the_next_milder_plan_and_other_errors_end_the_run(trainer, device):
    short = device(4, RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))

    assert confirm(trainer, Plan(8, 1, False, None, GIB), rows_of(trainer)).rows == 4
    short.hook.remove()
    device(4, RuntimeError("CUDA error: device-side assert triggered"))
    with pytest.raises(RuntimeError, match="device-side assert"):
        confirm(trainer, Plan(8, 1, False, None, GIB), rows_of(trainer))


def test_a_probe_tries_the_longest_rows_and_live_those_with_most_pictures(trainer, monkeypatch):
    tried = []
    monkeypatch.setattr(memory_policy, "_pass", lambda trainer, rows: tried.append(rows))
    rows = Rows([5, 9, 7, 8], None, [16, 0, 32, 0])
    for live in (None, "vision_features: live"):
        monkeypatch.setattr(trainer, "live", live)
        run_step(trainer, Plan(2, 4, False), rows)

    assert tried == [[1, 3], [1, 3], [2, 0]]


TWO_PROCESSES = """
import os
import sys
import torch
from checkpoint_cases import make
from dentalgemma.training import memory_policy
from dentalgemma.training.memory_policy import Plan, Rows, confirm

*case, error = sys.argv[1:]

def hold(model, args, kwargs):
    if trainer.args.process_index == 1 and len(kwargs["input_ids"]) > 2:
        raise eval(error)

memory_policy.can_probe = lambda training: True
trainer = make(*case)
trainer.model.get_base_model().register_forward_pre_hook(hold, with_kwargs=True)
try:
    found = confirm(trainer, Plan(4, 1, False, None, 2**30), Rows([9] * 24))
    text = f"{found.rows} {trainer.memory['measured_bytes']}"
except Exception as failure:
    text = repr(failure)
sys.stdout.write(f"{trainer.args.process_index}: {text}\\n")
sys.stdout.flush()
torch.distributed.barrier()
os._exit(0)  # threads of gloo that still run at exit now and then abort a finished process
"""


def run_two(tiny_model, vqa_dataset, folder, error):
    """What each of two processes says, where the second one fails so with more than two rows; and stderr."""
    script = folder / "two.py"
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29671", script]
    done = subprocess.run(
        [str(part) for part in (*command, tiny_model, vqa_dataset, folder / "run", error)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY / 'tests'}:{REPOSITORY}", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return sorted(line for line in done.stdout.splitlines() if line[:2] in ("0:", "1:")), done.stderr


@pytest.mark.slow
def test_where_memory_runs_out_in_one_process_all_take_the_milder_plan(tiny_model, vqa_dataset, tmp_path):
    said, stderr = run_two(tiny_model, vqa_dataset, tmp_path, "torch.OutOfMemoryError('CUDA out of memory.')")

    assert said == ["0: 2 0", "1: 2 0"]
    assert "Out of memory in 1 of 2 processes with batch 4" in stderr


@pytest.mark.slow
def test_another_error_of_one_process_ends_all(tiny_model, vqa_dataset, tmp_path):
    said, _ = run_two(tiny_model, vqa_dataset, tmp_path, "ValueError('a bad row')")

    assert said == ["0: ProbeError('process 1: ValueError: a bad row')", "1: ValueError('a bad row')"]


def test_what_is_tried_grows_milder_and_a_resumed_run_keeps_its_rows():
    plan = Plan(4, 2, False)

    assert [each[:3] for each in milder(plan)] == [
        (2, 4, False),
        (1, 8, False),
        (4, 2, True),
        (2, 4, True),
        (1, 8, True),
    ]
    assert [each[:3] for each in milder(plan, keep_rows=True)] == [(4, 2, True)]
    assert milder(Plan(1, 8, True)) == []


def test_a_probe_leaves_no_trace_in_the_run(make_trainer, tiny_model, tmp_path, monkeypatch):
    """Losses are compared to the last bit, with dropout on; a probe that drew random numbers would change them."""
    losses, probed = [], []
    for name in ("plain", "probed"):
        trainer = make_trainer(tiny_model, tmp_path / name, logging_steps=1, lora_dropout=0.1)
        lengths = [len(ids) for ids in trainer.train_dataset["completion"][:]]
        if name == "probed":
            adopt(Plan(4, 1, False), trainer)

            def probe(*arguments):
                peak = run_step(*arguments)
                probed.append(sum(parameter.grad is not None for parameter in arguments[0].model.parameters()))
                return peak

            monkeypatch.setattr(memory_policy, "can_probe", lambda training: True)
            monkeypatch.setattr(memory_policy, "run_step", probe)
            confirm(trainer, Plan(4, 1, False, estimate_like(GIB), 2 * GIB), Rows(lengths))
            assert not any(parameter.grad is not None for parameter in trainer.model.parameters())
            assert not trainer._metrics["train"]
        trainer.train()
        losses.append(
            [
                {key: entry[key] for key in ("loss", "grad_norm", "mean_token_accuracy", "num_tokens")}
                for entry in trainer.state.log_history
                if "loss" in entry
            ]
        )

    assert probed[0] > 0  # it did go backward
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]


def test_checkpointing_can_be_turned_off_and_on_before_training(make_trainer, tiny_model, tmp_path):
    trainer = make_trainer(tiny_model, tmp_path / "run", gradient_checkpointing="true")
    embeddings = trainer.model.get_input_embeddings()
    hooks = []
    for switch in (False, True):
        adopt(Plan(4, 1, switch), trainer)
        hooks.append(len(embeddings._forward_hooks))
        run_step(trainer, Plan(4, 1, switch), Rows([10] * 24))

    assert hooks == [0, 1]
    assert not any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())


def test_a_run_with_memory_auto_takes_the_same_steps(make_trainer, tiny_model, tmp_path, capsys):
    """One row at a time and four: the same rows in each step, and so, without dropout, the same losses."""
    losses = []
    for memory in ("fixed", "auto"):
        trainer = make_trainer(
            tiny_model,
            tmp_path / memory,
            memory=memory,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            lora_dropout=0,
            pack_questions=1,  # what is packed together depends on the micro-batch
            logging_steps=1,
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])

    assert trainer.args.per_device_train_batch_size == 4
    assert "Memory: batch 4 × accumulation 1, no gradient checkpointing:" in capsys.readouterr().err
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_without_a_gpu_the_estimate_has_to_do(trainer):
    plan = Plan(4, 2, False, estimate_like(GIB), 2 * GIB)

    assert confirm(trainer, plan, ROWS) == plan
    assert trainer.memory["measured_bytes"] is None
    assert trainer.memory["estimated_bytes"] == GIB


# Resuming


def test_the_batch_of_a_resumed_run_is_read_from_its_checkpoint(tmp_path):
    manifest = {
        "run": {"configuration": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}},
    }
    (tmp_path / "checkpoint_manifest.json").write_text(json.dumps(manifest))
    settings = {"resume_from_checkpoint": str(tmp_path), "gradient_accumulation_steps": 4}
    same, other = (training(per_device_train_batch_size=rows, **settings) for rows in (4, 3))

    assert saved_batch_size(same) == 2
    assert saved_batch_size(other) is None  # refused on resume: another number of rows in a step
    assert saved_batch_size(training(per_device_train_batch_size=4, gradient_accumulation_steps=4)) is None


def test_divisors_are_the_micro_batches_that_keep_a_step():
    assert divisors(12) == [12, 6, 4, 3, 2, 1]


def test_training_goes_on_with_the_batch_of_a_checkpoint_that_only_train_was_told_of(
    make_trainer, tiny_model, tmp_path
):
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "pack_questions": 1}
    first = make_trainer(
        tiny_model, tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=1, save_total_limit=2, **options
    )
    first.train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    second = make_trainer(
        tiny_model, tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=1, memory="auto", **options
    )
    chosen = second.plan.rows
    second.train(resume_from_checkpoint="auto")

    assert chosen == 4
    assert second.plan.rows == second.args.per_device_train_batch_size == 2
    assert second.state.global_step == 2


def test_the_plan_of_a_trainer_is_the_one_that_was_proved(make_trainer, tiny_model, tmp_path, monkeypatch):
    trainer = make_trainer(tiny_model, tmp_path / "run", memory="auto", max_steps=1, pack_questions=1)
    monkeypatch.setattr(memory_policy, "can_probe", lambda training: True)
    short = Device(trainer, 2)
    trainer.train()
    short.hook.remove()

    assert trainer.plan.rows == trainer.memory["rows"] == 2
