"""A run can be cut off anywhere: what it goes on with is complete, its own, and leads to the same weights."""

import functools
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from checkpoint_cases import At, entries, make, train
from conftest import REPOSITORY
from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file, save_file

from data_builders.records import InputError
from dentalgemma.training import checkpoints
from dentalgemma.training.checkpoints import MANIFEST, CheckpointError, DiskFullError, StoppedBySignal, hash_rows
from dentalgemma.training.config import parse_stage

CASES = Path(__file__).with_name("checkpoint_cases.py")
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
TOKEN = "hf_canaryCanaryCanaryCanaryCanary01"


@pytest.fixture(scope="module")
def whole(tiny_model, vqa_dataset, tmp_path_factory):
    """A run of ten steps that nothing interrupted, with a checkpoint at each."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        train(tiny_model, vqa_dataset, out)
    return out


@pytest.fixture
def cut_off(whole, tmp_path):
    """Another run folder with the checkpoints up to step 5, as after a crash."""
    for step in range(1, 6):
        shutil.copytree(whole / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
    return tmp_path / "run"


@pytest.fixture
def go_on(tiny_model, vqa_dataset):
    """Train with the same model and data."""

    def go(out, resume="auto", **options):
        return train(tiny_model, vqa_dataset, out, resume=resume, **options)

    return go


def pictured(sizes, ids=None, folder=None, per_row=1):
    """Rows with a picture or more each, so many bytes above the same size, or in files of `folder` named by that."""
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20)).save(buffer, "PNG")
    images = [{"bytes": buffer.getvalue() + bytes(size), "path": None} for size in sizes]
    if folder is not None:
        images = [{"bytes": None, "path": str(folder / f"{size}.png")} for size in sizes]
    groups = [images[start : start + per_row] for start in range(0, len(images), per_row)]
    columns = {"images": groups, "prompt": ["What is it?"] * len(groups), "completion": ["Caries."] * len(groups)}
    features = {"images": List(ImageFeature(decode=False)), "prompt": Value("string"), "completion": Value("string")}
    if ids is not None:
        columns["image_id"], features["image_id"] = ids, Value("string")
    return Dataset.from_dict(columns, features=Features(features))


def steps(run):
    return [int(path.name.rpartition("-")[2]) for path in checkpoints.list_checkpoints(run)]


def complete(run):
    return [step for step in steps(run) if checkpoints.find_fault(run / f"checkpoint-{step}") is None]


def assert_same_run(first, second):
    mine, theirs = (load_file(run / "adapter_model.safetensors") for run in (first, second))
    assert mine.keys() == theirs.keys()
    different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert not different, f"{len(different)} of {len(mine)} tensors differ, for example {different[:1]}"
    assert json.loads((first / "log.json").read_text()) == json.loads((second / "log.json").read_text())


# Resumed runs are the uninterrupted run


@pytest.mark.known_bug(21)
@pytest.mark.parametrize("step", [k if k in (3, 7) else slow(k) for k in range(1, 11)])
def test_a_run_resumed_at_any_step_ends_with_the_same_bits(whole, go_on, tmp_path, step):
    trainer = go_on(tmp_path / "run", str(whole / f"checkpoint-{step}"))

    assert trainer.state.global_step == 10
    assert_same_run(whole, tmp_path / "run")
    assert [entry["num_tokens"] for entry in entries(trainer.state.log_history) if "loss" in entry] == sorted(
        {entry["num_tokens"] for entry in json.loads((whole / "log.json").read_text()) if "loss" in entry}
    )


@pytest.mark.known_bug(21)
@pytest.mark.parametrize("lost", ["optimizer.pt", slow("scheduler.pt"), slow("rng_state.pth")])
def test_what_a_checkpoint_lost_would_have_changed_the_weights(whole, go_on, tmp_path, monkeypatch, lost):
    """The control for the test above: transformers alone goes on without a word, with other weights."""
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(whole / "checkpoint-3", folder)
    (folder / lost).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "find_fault", lambda folder, hashes=True: None)
        go_on(tmp_path / "run", str(folder), max_steps=10)

    with pytest.raises(AssertionError, match="tensors differ"):
        assert_same_run(whole, tmp_path / "run")
    with pytest.raises(CheckpointError, match=f"checkpoint-3 cannot be resumed: {lost} is missing"):
        go_on(tmp_path / "other", str(folder))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"train_sampling_strategy": "group_by_length", "pack_questions": 1}, {"dataloader_num_workers": 2}]
)
def test_grouped_rows_and_workers_resume_bit_for_bit_too(go_on, tmp_path, options):
    go_on(tmp_path / "whole", **options)
    for step in (2, 6, 7):
        go_on(tmp_path / f"from{step}", str(tmp_path / f"whole/checkpoint-{step}"), **options)
        assert_same_run(tmp_path / "whole", tmp_path / f"from{step}")


def launch_two(cases, folder, port):
    (folder / "cases.json").write_text(json.dumps(cases, default=str))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    return subprocess.run(
        [*torchrun, str(CASES), str(folder / "cases.json")],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"trains": "language_model aligner"}], ids=["LoRA", "aligner in full"])
def test_gemma_4_resumes_bit_for_bit_too(tiny_gemma4, vqa_dataset, tmp_path, options):
    train(tiny_gemma4, vqa_dataset, tmp_path / "whole", **options)
    train(tiny_gemma4, vqa_dataset, tmp_path / "run", resume=str(tmp_path / "whole/checkpoint-4"), **options)

    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.known_bug(21)
@pytest.mark.parametrize(("sharded", "starts"), [(False, (1, 5, 9)), (True, (5,))], ids=["DDP", "FSDP2"])
def test_two_processes_resume_bit_for_bit_at_any_step(tiny_model, vqa_dataset, tmp_path, sharded, starts):
    fixed = {"model": tiny_model, "dataset": vqa_dataset, "per_device_train_batch_size": 1, "sharded": sharded}
    cases = [fixed | {"out": tmp_path / "whole"}]
    cases += [fixed | {"out": tmp_path / str(k), "resume": str(tmp_path / f"whole/checkpoint-{k}")} for k in starts]
    done = launch_two(cases, tmp_path, 29531)

    assert done.returncode == 0, done.stderr[-3000:]
    written = {path.name for path in (tmp_path / "whole/checkpoint-5").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth"} < written
    assert ("pytorch_model_fsdp.bin" in written) == sharded
    for k in starts:
        assert_same_run(tmp_path / "whole", tmp_path / str(k))


def test_early_stopping_goes_on_counting_and_the_best_stays_the_best(go_on, tmp_path):
    """Steps this small guess no token right: step 2 stays the best, and the third evaluation after it ends the run."""
    options = {
        "metric_for_best_model": "eval_mean_token_accuracy",
        "learning_rate": 1e-5,
        "warmup_steps": 0,  # else the first step is none, and the second cannot reach every tensor
        "load_best_model_at_end": "true",
        "early_stopping_patience": 3,
        "save_steps": 2,
    }
    whole = go_on(tmp_path / "whole", **options)
    (tmp_path / "moved").mkdir()
    for step in (2, 6):
        shutil.copytree(tmp_path / f"whole/checkpoint-{step}", tmp_path / f"moved/checkpoint-{step}")
    again = go_on(tmp_path / "moved", "auto", **options)

    assert whole.state.global_step == again.state.global_step == 8
    assert Path(again.state.best_model_checkpoint) == tmp_path / "moved/checkpoint-2"
    assert_same_run(tmp_path / "whole", tmp_path / "moved")
    assert again.proof.finish(again.args, again.state.global_step)["passed"]
    finished = go_on(tmp_path / "moved", "auto", **options)
    assert finished.proof.finish(finished.args, finished.state.global_step)["passed"]
    assert finished.state.global_step == 8  # and not a step more
    assert_same_run(tmp_path / "whole", tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved/checkpoint-2")
    with pytest.raises(CheckpointError, match="checkpoint-8 counts on checkpoint-2 as the best so far"):
        go_on(tmp_path / "moved", "auto", **options)


# What is refused, what is skipped


@pytest.mark.known_bug(21)
def test_every_file_cut_short_or_lost_is_noticed_and_the_one_before_is_taken(cut_off, capsys):
    newest = cut_off / "checkpoint-5"
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", MANIFEST} <= {p.name for p in files}
    for path in files:
        content = path.read_bytes()
        for damaged in (None, content[: len(content) // 2], b"", content[:-1] + bytes([content[-1] ^ 1])):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            lines = []
            assert checkpoints.choose_checkpoint(cut_off, "auto", say=lines.append) == cut_off / "checkpoint-4"
            assert lines[0].startswith(f"Skipping {newest}: ") and path.name in lines[0]
            with pytest.raises(CheckpointError, match="checkpoint-5 cannot be resumed"):
                checkpoints.choose_checkpoint(cut_off, str(newest), say=lines.append)
            path.write_bytes(content)
    assert checkpoints.choose_checkpoint(cut_off, "auto", say=print) == newest


@pytest.mark.parametrize("word", ["auto", "true", "True", "latest"])
def test_the_newest_by_step_is_taken_whatever_was_touched_last(cut_off, word):
    os.utime(cut_off / "checkpoint-2")
    shutil.copytree(cut_off / "checkpoint-5", cut_off / "checkpoint-11")

    assert checkpoints.choose_checkpoint(cut_off, word, say=print).name == "checkpoint-11"


def test_auto_without_a_checkpoint_starts_anew_and_says_so(tmp_path):
    lines = []
    (tmp_path / "checkpoint-3").mkdir()

    assert checkpoints.choose_checkpoint(tmp_path, "auto", say=lines.append) is None
    assert lines == [
        f"Skipping {tmp_path}/checkpoint-3: it has no {MANIFEST}, so it was not written to its end",
        f"No complete checkpoint in {tmp_path}: starting from step 0",
    ]


def test_a_new_run_does_not_write_over_an_earlier_one(cut_off):
    with pytest.raises(CheckpointError, match="already holds checkpoint-5 of an earlier run: go on with"):
        checkpoints.choose_checkpoint(cut_off, None, say=print)
    with pytest.raises(CheckpointError, match="checkpoint-5 is newer than checkpoint-3"):
        checkpoints.choose_checkpoint(cut_off, str(cut_off / "checkpoint-3"), say=print)


@pytest.mark.known_bug(12)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"learning_rate": 2e-2}, "learning_rate 0.01 → 0.02", id="setting"),
        pytest.param({"rows": 23}, "training rows", id="data"),
        pytest.param({"lora_r": 8}, r"trainable parameters \d+ → \d+; lora_r 4 → 8", id="trainable parameters"),
        pytest.param({"trains": "language_model aligner"}, r"trainable tensors \d+ → \d+; trains", id="parts"),
    ],
)
def test_a_changed_run_is_refused_by_the_name_of_the_change(cut_off, go_on, options, message):
    with pytest.raises(CheckpointError, match=f"is of a run with other settings or data: .*{message}"):
        go_on(cut_off, **options)


def test_another_base_under_the_same_name_is_refused(cut_off, go_on, monkeypatch):
    monkeypatch.setattr(checkpoints, "hash_frozen", lambda model: "another")
    with pytest.raises(CheckpointError, match="weights of the base model"):
        go_on(cut_off)


def test_changes_may_be_allowed_and_some_are_none(cut_off, go_on, capfd):
    trainer = go_on(cut_off, logging_steps=5, save_steps=5, learning_rate=2e-2, allow_changes_on_resume="true")

    assert trainer.state.global_step == 10
    assert "Resuming in spite of changes: learning_rate 0.01 → 0.02\n" in capfd.readouterr().err


def test_another_number_of_processes_is_refused():
    one = {"processes": 1, "data": {}, "base": "", "trainable": {}, "configuration": {}}

    assert checkpoints.find_changes(one, one | {"processes": 2}) == ["processes 1 → 2"]


@pytest.mark.known_bug(12)
@pytest.mark.parametrize("change", ["lacks", "left-over", "shape"])
def test_an_adapter_that_does_not_load_whole_is_refused(whole, tiny_model, vqa_dataset, tmp_path, change):
    tensors = load_file(whole / "checkpoint-5/adapter_model.safetensors")
    name = min(tensors)
    if change == "lacks":
        del tensors[name]
    elif change == "left-over":
        tensors["base_model.model.old.lora_A.weight"] = torch.zeros(2)
    else:
        tensors[name] = torch.zeros(3, 3)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    trainer = make(tiny_model, vqa_dataset, tmp_path / "run")

    checkpoints.check_adapter_keys(whole / "checkpoint-5", trainer.model)
    with pytest.raises(CheckpointError, match=change):
        trainer._load_from_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        pytest.param(["--enable_jit_checkpoint", "true"], "as if trained to the end", marks=pytest.mark.known_bug(22)),
        pytest.param(["--push_to_hub", "true"], "a recipe uploads nothing", marks=pytest.mark.known_bug(23)),
        pytest.param(["--hub_token", TOKEN], "a token or a key after --hub_token", marks=pytest.mark.known_bug(23)),
        pytest.param(["--save_only_model", "true"], "without optimizer state"),
        pytest.param(["--resume_from_checkpoint", "nowhere"], "nowhere is no checkpoint folder; `auto` takes"),
    ],
)
def test_settings_that_endanger_a_run_are_refused(argv, message):
    with pytest.raises(InputError, match=message) as raised:
        parse_stage(REPOSITORY / "recipes" / "stage1_vqa.yaml", argv)

    assert TOKEN not in str(raised.value)


@pytest.mark.known_bug(23)
def test_no_byte_of_a_run_holds_the_token(whole):
    files = [path for path in whole.rglob("*") if path.is_file()]

    assert len(files) > 50
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert not list(whole.rglob("training_args.bin"))


# Signals


@pytest.mark.known_bug(22)
@pytest.mark.parametrize(
    ("number", "event", "step", "saved"),
    [
        pytest.param(signal.SIGTERM, "on_step_begin", 4, 5, id="within a step"),
        slow(signal.SIGINT, "on_train_begin", 0, 1, id="before the first step"),
        pytest.param(signal.SIGTERM, "on_prediction_step", 6, 6, id="in an evaluation"),
        slow(signal.SIGTERM, "on_save", 3, 4, id="after a save"),
    ],
)
def test_a_signal_ends_in_a_complete_checkpoint_that_goes_on_bit_for_bit(
    whole, go_on, tmp_path, number, event, step, saved
):
    before = signal.getsignal(number)
    send = At(step, lambda: os.kill(os.getpid(), number), event)
    with pytest.raises(StoppedBySignal, match=f"checkpoint-{saved} is complete; go on with: ") as raised:
        go_on(tmp_path / "run", None, callbacks=[send], save_steps=3)

    assert raised.value.exit_code == 75
    assert signal.Signals(number).name in str(raised.value)
    assert complete(tmp_path / "run")[-1] == saved
    assert not (tmp_path / "run/adapter_model.safetensors").exists()  # nothing after `train` ran
    assert signal.getsignal(number) == before
    go_on(tmp_path / "run", "auto", save_steps=3)
    assert_same_run(whole, tmp_path / "run")


def test_a_signal_while_a_checkpoint_is_written_lets_it_be_completed(tiny_model, vqa_dataset, tmp_path, monkeypatch):
    write = checkpoints.write_manifest

    def interrupted(folder, **facts):
        os.kill(os.getpid(), signal.SIGTERM)
        write(folder, **facts)

    monkeypatch.setattr(checkpoints, "write_manifest", interrupted)
    with pytest.raises(StoppedBySignal, match="checkpoint-3 is complete"):
        train(tiny_model, vqa_dataset, tmp_path / "run", save_steps=3)
    assert complete(tmp_path / "run") == steps(tmp_path / "run") == [3]


def test_two_signals_at_once_are_one_and_a_late_second_one_stops_at_once(monkeypatch):
    child = os.fork()
    if not child:
        with checkpoints.StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)  # still here
            monkeypatch.setattr(checkpoints, "SECOND_SIGNAL_AFTER", 0 if stop.name == "SIGTERM" else 9)
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(1)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


@pytest.mark.known_bug(22)
@pytest.mark.slow
def test_a_recipe_that_gets_sigterm_exits_75_and_publishes_nothing(tiny_model, vqa_dataset, tmp_path):
    """As Slurm does it: the whole process group gets the signal, workers of the data loader included."""
    out = tmp_path / "run"
    settings = {"model_name_or_path": tiny_model, "dataset_name": vqa_dataset, "output_dir": out, "max_steps": 500}
    settings |= {"save_steps": 3, "eval_steps": 3, "validation_sample": 0, "dataloader_num_workers": 2}
    argv = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    recipe = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "recipes/stage1_vqa.py"), *argv],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while not list(out.glob(f"checkpoint-*/{MANIFEST}")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(recipe.pid, signal.SIGTERM)
    _, words = recipe.communicate(timeout=200)

    assert recipe.returncode == 75, words[-3000:]
    assert "Traceback" not in words
    assert words.count("go on with: ") == 1 and "--resume_from_checkpoint auto" in words
    assert complete(out) == steps(out) != []
    assert not (out / "adapter_model.safetensors").exists() and not (out / "run_facts.json").exists()


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_with_one_checkpoint(tiny_model, vqa_dataset, tmp_path):
    out = tmp_path / "run"
    case = {"model": tiny_model, "dataset": vqa_dataset, "out": out, "signal_at": 4, "save_steps": 3}
    done = launch_two([case], tmp_path, 29532)

    assert done.returncode == 1  # torchrun's own: it does not hand on the 75 of its processes
    assert done.stderr.count("checkpoint-5 is complete; go on with: ") == 1
    assert "exitcode  : 75" in done.stderr
    assert complete(out) == steps(out) == [3, 5]


# kill -9 and full disks


@pytest.mark.known_bug(21)
def test_a_run_killed_before_its_manifest_goes_on_from_the_checkpoint_before(
    whole, go_on, tiny_model, vqa_dataset, tmp_path, capfd
):
    out = tmp_path / "run"
    case = {"model": tiny_model, "dataset": vqa_dataset, "out": out, "kill_at": 6, "save_steps": 3}
    (tmp_path / "cases.json").write_text(json.dumps([case], default=str))
    done = subprocess.run([sys.executable, str(CASES), str(tmp_path / "cases.json")], capture_output=True, timeout=200)

    assert done.returncode == -signal.SIGKILL
    assert steps(out) == [3, 6] and complete(out) == [3]
    assert (out / "checkpoint-6/adapter_model.safetensors").is_file()
    go_on(out, save_steps=3)
    words = capfd.readouterr().err
    assert f"Skipping {out}/checkpoint-6: it has no {MANIFEST}" in words
    assert f"Resuming from {out}/checkpoint-3" in words
    assert_same_run(whole, out)
    assert complete(out) == steps(out) == [3, 6, 9, 10]


@pytest.mark.parametrize("limited", ["optimizer.pt", slow("adapter_model.safetensors")])
def test_a_full_disk_ends_in_one_sentence_and_leaves_the_last_good_checkpoint(whole, go_on, tmp_path, limited):
    """Files may not grow beyond a limit, as a quota would have it: safetensors and torch each fail in their own way."""
    limit = (whole / "checkpoint-1" / limited).stat().st_size - 1000
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill = At(5, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard)))
    try:
        with pytest.raises(
            DiskFullError, match=r"checkpoint-6, which was removed; the last good.*checkpoint-4"
        ) as error:
            go_on(tmp_path / "run", None, callbacks=[fill], save_steps=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert error.value.exit_code == 1
    assert complete(tmp_path / "run") == steps(tmp_path / "run") == [2, 4]


# Rotation


def keep(run, **options):
    checkpoints.rotate(run, **({"keep": None, "best": None} | options))
    return steps(run)


def test_rotation_keeps_the_newest_and_the_best(cut_off):
    assert keep(cut_off) == [1, 2, 3, 4, 5]
    assert keep(cut_off, keep=3, best=str(cut_off / "checkpoint-1")) == [1, 4, 5]
    assert keep(cut_off, keep=1, best=str(cut_off / "checkpoint-1")) == [1, 5]
    assert keep(cut_off, keep=1) == [5]


def test_rotation_never_counts_on_an_incomplete_checkpoint(cut_off):
    for step in (3, 5):
        (cut_off / f"checkpoint-{step}" / MANIFEST).unlink()

    assert keep(cut_off, keep=1) == [4, 5]  # 3 gave way to 4; 5 may be all that is left of a later state
    (cut_off / "checkpoint-4/optimizer.pt").write_bytes(b"")
    assert keep(cut_off, keep=1) == [4, 5]  # without a complete one nothing goes


def test_training_deletes_an_older_checkpoint_only_after_the_newer_manifest(go_on, tmp_path, monkeypatch):
    seen, write = [], checkpoints.write_manifest
    monkeypatch.setattr(
        checkpoints,
        "write_manifest",
        lambda folder, **facts: (seen.append(steps(folder.parent)), write(folder, **facts)),
    )
    go_on(tmp_path / "run", None, save_total_limit=1, save_steps=2, max_steps=6, load_best_model_at_end="true")

    assert seen == [[2], [2, 4], [4, 6]]
    assert complete(tmp_path / "run") == [6]  # the loss fell, so the newest is the best


@pytest.mark.known_bug(21)
def test_other_pictures_of_rows_without_image_id_are_other_data_also_where_they_are_mixed_in(tmp_path):
    own = pictured([1, 2], ids=["a", "b"])
    same, other = pictured([5, 6]), pictured([5, 7])
    mixed = [concatenate_datasets([own, rows]) for rows in (same, other)]
    files = [pictured(colours, folder=tmp_path / str(place)) for place, colours in enumerate([[5, 6], [5, 6], [5, 7]])]

    assert mixed[0]["image_id"][:] == ["a", "b", None, None]
    assert hash_rows(mixed[0]) != hash_rows(mixed[1])
    assert hash_rows(same) != hash_rows(other)
    assert hash_rows(files[0]) == hash_rows(files[1]) != hash_rows(files[2])
    assert hash_rows(pictured([5, 6, 7, 8], per_row=2)) != hash_rows(pictured([5, 6, 8, 7], per_row=2))
    # Where every row names its pictures by their pixels, they may be compressed again.
    assert hash_rows(own) == hash_rows(pictured([3, 4], ids=["a", "b"]))


def test_data_is_the_same_however_it_is_stored(tmp_path):
    rows = pictured([1, 2, 3, 4])
    rows.save_to_disk(tmp_path / "rows", num_shards=2)
    shuffled = rows.select([3, 1, 0, 2])

    assert hash_rows(Dataset.load_from_disk(str(tmp_path / "rows"))) == hash_rows(rows)
    assert hash_rows(shuffled) == hash_rows(pictured([4, 2, 1, 3])) != hash_rows(rows)
    assert hash_rows(rows.select([1, 2])) == hash_rows(pictured([2, 3]))


def test_pictures_are_not_read_to_tell_whether_they_are_the_same():
    rows = pictured([2**20] * 64).select(range(63, -1, -1))
    pool, usual = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        hash_rows(rows)
    finally:
        pa.set_memory_pool(usual)

    assert pool.max_memory() < 2**20  # of 64 MiB
