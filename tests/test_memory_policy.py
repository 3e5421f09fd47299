"""`memory: auto`: what is chosen for how much memory, and that trying it leaves no trace in the run."""

import itertools
import json
import os
import random
import subprocess
import sys
import time

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
    adopt,
    choose,
    confirm,
    divisors,
    estimate,
    heaviest,
    heaviest_batch,
    lay_out,
    milder,
    run_step,
    saved_batch_size,
)

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
    rows = Rows([50, 60, 70, 40], ["a", "a", "a", None], shared=30, questions=2)

    assert [load.tokens for load in lay_out(rows, 1)] == [50, 60, 70, 40]
    assert [(load.tokens, load.rows) for load in lay_out(rows, 4)] == [(70 + 60 - 30, (2, 1)), (50, (0,)), (40, (3,))]
    assert heaviest_batch(rows, 4, Batch(1, 70, 5, (30,))) == Batch(3, 100, 7, (30,), questions=4 / 3)


@pytest.mark.parametrize("seed", range(20))
def test_no_batch_takes_more_room_than_the_heaviest(seed):
    draw = random.Random(seed)
    lengths = [draw.randint(40, 90) for _ in range(9)]
    rows = Rows(lengths, [draw.choice("abcd") for _ in lengths], shared=30, questions=3)
    size = draw.randint(1, 6)
    loads = lay_out(rows, size)
    rooms = (
        len(chosen) * max(load.tokens for load in chosen)
        for count in range(1, size + 1)
        for chosen in itertools.combinations(loads, count)
        if sum(len(load.rows) for load in chosen) <= size
    )
    chosen = heaviest(rows, size)

    assert len(chosen) * max(load.tokens for load in chosen) == max(rooms)


# The proof of a plan


def out_of_memory_above(limit, tried):
    """A probe on a device that holds so many rows, twice as many with checkpointing."""

    def probe(trainer, plan, rows):
        tried.append((trainer.args.per_device_train_batch_size, trainer.args.gradient_checkpointing))
        if plan.rows > limit * (1 + plan.checkpointing):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1000 * plan.rows

    return probe


@pytest.fixture(scope="module")
def trainer(make_trainer, tiny_model, tmp_path_factory):
    return make_trainer(tiny_model, tmp_path_factory.mktemp("policy") / "run")


@pytest.mark.parametrize(
    ("limit", "taken", "attempts"),
    [
        (8, (8, 1, False), 1),
        (3, (2, 4, False), 3),
        (0.5, (1, 8, True), 8),
    ],
)
def test_out_of_memory_leads_to_the_next_milder_plan(trainer, capsys, limit, taken, attempts):
    tried, plan = [], Plan(8, 1, False, estimate_like(GIB), 2 * GIB)
    found = confirm(trainer, plan, ROWS, probe=out_of_memory_above(limit, tried))

    assert found[:3] == taken
    assert len(tried) == attempts
    assert tried[-1] == (taken[0], taken[2])
    assert capsys.readouterr().err.count("Out of memory") == attempts - 1
    settings = trainer.args
    assert (settings.per_device_train_batch_size, settings.gradient_accumulation_steps) == taken[:2]
    assert settings.gradient_checkpointing == settings.activation_checkpointing == taken[2]
    assert trainer._train_batch_size == taken[0]
    assert trainer.settings["per_device_train_batch_size"] == taken[0]
    assert trainer.memory["measured_bytes"] == 1000 * taken[0]


def test_a_device_on_which_nothing_fits_ends_the_run_with_a_remedy(trainer):
    with pytest.raises(MemoryShortError, match="not even one row at a time with gradient checkpointing"):
        confirm(trainer, Plan(8, 1, False, None, 2 * GIB), ROWS, probe=out_of_memory_above(0, []))


TWO_PROCESSES = """
import sys
import torch
from checkpoint_cases import make
from dentalgemma.training.memory_policy import Plan, Rows, confirm

def probe(trainer, plan, rows):
    if trainer.args.process_index == 1 and plan.rows > 2:
        raise torch.OutOfMemoryError
    return plan.rows + trainer.args.process_index

trainer = make(*sys.argv[1:])
found = confirm(trainer, Plan(4, 1, False, None, 2**30), Rows([9] * 24), probe=probe)
sys.stdout.write(f"{trainer.args.process_index}: {found.rows} {trainer.memory['measured_bytes']}\\n")
"""


@pytest.mark.slow
def test_where_memory_runs_out_in_one_process_all_take_the_milder_plan(tiny_model, vqa_dataset, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29671", script]
    done = subprocess.run(
        [str(part) for part in (*command, tiny_model, vqa_dataset, tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY / 'tests'}:{REPOSITORY}", "OMP_NUM_THREADS": "1"},
    )

    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(line for line in done.stdout.splitlines() if line[:2] in ("0:", "1:")) == ["0: 2 3", "1: 2 3"]
    assert "Out of memory in 1 of 2 processes with batch 4" in done.stderr


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


def test_a_probe_leaves_no_trace_in_the_run(make_trainer, tiny_model, tmp_path):
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

            confirm(trainer, Plan(4, 1, False, estimate_like(GIB), 2 * GIB), Rows(lengths), probe=probe)
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
