"""Writing a dataset folder: images once and in bounded memory, and never a half dataset that loads."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY
from datasets import load_dataset

from data_builders import dataset_folder
from data_builders.chat import Row, answer_messages, prompt_messages
from data_builders.dataset_folder import (
    BuildError,
    check_replaceable,
    new_folder,
    write_jsonl,
    write_report,
    write_rows,
)


def rows_about(*image_ids, per_image=1):
    return [
        Row(
            images=[image_id] if image_id else [],
            prompt=prompt_messages(f"Question {number} on {image_id}?"),
            completion=answer_messages("Yes."),
            row_id=f"{image_id}-{number}",
            image_id=image_id,
            group_id=f"g{image_id}",
            source="s",
            license=None,
            language="en",
            question_type="presence",
            claims="{}",
        )
        for image_id in image_ids
        for number in range(per_image)
    ]


def noise(image_id, size=50_000):
    """A file that no compression makes smaller."""
    return f"{image_id}.jpg", os.urandom(size)


def build_once(folder, text):
    """A whole folder as a builder leaves it."""
    with new_folder(folder) as new:
        write_jsonl(new / "records.jsonl", [{"text": text}])
        write_report(new, {})


def beside(folder):
    """What lies beside the folder, hidden things included."""
    return {path.name for path in folder.parent.iterdir()} - {folder.name}


def test_bytes_are_written_once_per_image_and_read_back_for_every_row(tmp_path):
    files = {name: noise(name) for name in "abcd"}
    written = write_rows(tmp_path, {"train": rows_about(*files, per_image=20)}, files.__getitem__)

    assert written == {"train": {"rows": 80, "images": 4, "image_bytes": 200_000, "bytes": written["train"]["bytes"]}}
    assert (tmp_path / "data" / "train-00000-of-00001.parquet").stat().st_size < 1.1 * 200_000
    for row in pq.read_table(tmp_path / "data").to_pylist():
        name, content = files[row["image_id"]]
        assert row["images"] == [{"bytes": content, "path": name}]


def test_the_columns_are_those_that_datasets_knows(tmp_path):
    write_rows(tmp_path, {"train": rows_about("a")}, noise)
    dataset = load_dataset("parquet", data_files=str(tmp_path / "data" / "*.parquet"), split="train")

    assert dataset.features == dataset_folder.features(with_images=True)
    assert "dictionary" not in str(pq.read_schema(tmp_path / "data" / "train-00000-of-00001.parquet"))


def test_rows_without_images_have_no_such_column(tmp_path):
    write_rows(tmp_path, {"train": rows_about(None, per_image=3)}, {}.__getitem__)
    dataset = load_dataset("parquet", data_files=str(tmp_path / "data" / "*.parquet"), split="train")

    assert dataset.features == dataset_folder.features(with_images=False)
    assert dataset.num_rows == 3


def test_a_row_may_show_several_images(tmp_path):
    files = {name: noise(name, 100) for name in "ab"}
    rows = rows_about("a", "b")
    rows[0]["images"] = ["b", "a"]
    write_rows(tmp_path, {"train": rows}, files.__getitem__)
    table = {row["row_id"]: row["images"] for row in pq.read_table(tmp_path / "data").to_pylist()}

    assert [image["bytes"] for image in table["a-0"]] == [files["b"][1], files["a"][1]]
    assert [image["bytes"] for image in table["b-0"]] == [files["b"][1]]


@pytest.mark.parametrize("workers", [1, 3])
def test_no_more_than_a_row_group_is_held_in_memory(tmp_path, monkeypatch, workers):
    """Images that were read and not yet written are counted while the writing goes on."""
    monkeypatch.setattr(dataset_folder, "ROW_GROUP_BYTES", 200_000)
    reads, held = [], []

    def read(image_id):
        reads.append(image_id)
        written = sum(path.stat().st_size for path in (tmp_path / "data").iterdir())
        held.append(len(reads) * 50_000 - written)
        return noise(image_id)

    write_rows(tmp_path, {"train": rows_about(*(f"{n:03}" for n in range(60)))}, read, workers=workers)

    assert len(reads) == 60
    assert max(held) < 200_000 + 50_000 * (2 * workers + 3)
    (path,) = (tmp_path / "data").iterdir()
    assert pq.read_metadata(path).num_row_groups == 15


def test_shards_are_numbered_and_none_is_larger_than_it_may_be(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_folder, "ROW_GROUP_BYTES", 100_000)
    monkeypatch.setattr(dataset_folder, "SHARD_BYTES", 400_000)
    write_rows(tmp_path, {"test": rows_about(*"abcdefghijkl")}, noise)
    shards = sorted((tmp_path / "data").iterdir())

    assert [path.name for path in shards] == [f"test-0000{number}-of-00002.parquet" for number in range(2)]
    assert max(path.stat().st_size for path in shards) < 500_000


def test_progress_tells_the_time_that_is_left(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    write_rows(tmp_path, {"train": rows_about(*"abc")}, noise, progress=True)
    shown = capfd.readouterr().err
    (tmp_path / "quiet").mkdir()
    write_rows(tmp_path / "quiet", {"train": rows_about(*"abc")}, noise)

    assert "Writing train" in shown
    assert "100% 0:00:0" in shown
    assert capfd.readouterr().err == ""


STOPPED_WHILE_WRITING = """
import sys, time
sys.path[:0] = {paths!r}
from pathlib import Path
from data_builders.dataset_folder import new_folder, write_rows
from test_dataset_folder import noise, rows_about

def read(image_id):
    if image_id == "c":
        print("writing", flush=True)
        time.sleep(60)
    return noise(image_id)

with new_folder(Path(sys.argv[1])) as folder:
    (folder / "README.md").write_text("half")
    write_rows(folder, {{"train": rows_about("a", "b", "c")}}, read)
"""


@pytest.fixture
def writer(tmp_path):
    """Start a process that writes a dataset folder and stands still in the middle of it."""
    started = []

    def start(folder):
        paths = [str(REPOSITORY), str(REPOSITORY / "tests")]
        command = [sys.executable, "-c", STOPPED_WHILE_WRITING.format(paths=paths), str(folder)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        started.append(process)
        assert process.stdout.readline() == "writing\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_build_that_is_stopped_leaves_the_old_dataset_and_the_next_clears_up(tmp_path, writer, sent):
    out = tmp_path / "out"
    build_once(out, "old")
    process = writer(out)
    assert beside(out), "nothing was being written"
    process.send_signal(sent)
    if sent != signal.SIGINT:  # Ctrl-C waits for the file that is being read
        process.wait(timeout=30)
        assert process.returncode == -sent
    process.kill()
    process.wait()

    assert "old" in (out / "records.jsonl").read_text()
    build_once(out, "new")
    assert "new" in (out / "records.jsonl").read_text()
    assert beside(out) == set()


def test_a_first_build_that_is_killed_leaves_nothing_that_loads(tmp_path, writer):
    out = tmp_path / "out"
    process = writer(out)
    process.kill()
    process.wait()

    assert not out.exists()
    assert all(path.name.startswith(".out.build-") for path in tmp_path.iterdir())
    build_once(out, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_build_leaves_another_one_that_is_running_alone(tmp_path, writer):
    out = tmp_path / "out"
    process = writer(out)
    (workshop,) = beside(out)
    build_once(out, "second")

    assert process.poll() is None
    assert (tmp_path / workshop / "new" / "README.md").read_text() == "half"
    assert "second" in (out / "records.jsonl").read_text()


def test_two_builds_at_a_time_both_end_with_a_whole_dataset(tmp_path):
    out = tmp_path / "out"
    entered = threading.Barrier(2, timeout=20)

    def build(name):
        with new_folder(out) as new:
            entered.wait()
            time.sleep(0.2 if name == "late" else 0)
            write_jsonl(new / "records.jsonl", [{"text": name}])
            write_report(new, {})

    threads = [threading.Thread(target=build, args=(name,)) for name in ("early", "late")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert "late" in (out / "records.jsonl").read_text()
    assert beside(out) == set()


def test_a_dataset_that_was_put_aside_by_a_build_that_died_comes_back(tmp_path):
    """The state between the two renames of the swap: the old one is aside, the new one not yet in its place."""
    out = tmp_path / "out"
    build_once(out, "old")
    workshop = tmp_path / ".out.build-dead"
    (workshop / "new").mkdir(parents=True)
    (workshop / "lock").touch()
    out.rename(workshop / "old")

    with pytest.raises(ZeroDivisionError), new_folder(out):
        1 / 0  # noqa: B018
    assert "old" in (out / "records.jsonl").read_text()
    assert beside(out) == set()


def test_folders_whose_names_only_begin_alike_are_left_alone(tmp_path):
    (tmp_path / ".out.build-notes").mkdir()
    (tmp_path / ".out.build-notes" / "mine.txt").touch()
    build_once(tmp_path / "out", "new")

    assert (tmp_path / ".out.build-notes" / "mine.txt").is_file()


def test_a_mount_point_is_refused_before_anything_is_built():
    with pytest.raises(BuildError, match="is a mount point"), new_folder("/proc"):
        pytest.fail("nothing may be built")


def test_what_is_no_folder_is_never_replaced(tmp_path):
    """As root a build with `--out /dev/null` would put a dataset in the place of the device."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, Path(os.devnull)):
        with pytest.raises(BuildError, match="is no folder"):
            check_replaceable(path)
    assert pipe.is_fifo() and not Path(os.devnull).is_dir()


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to(path.parent.parent)])
def test_a_folder_with_a_pipe_or_a_link_is_not_replaced(tmp_path, make):
    folder = tmp_path / "out"
    folder.mkdir()
    make(folder / "other")

    with pytest.raises(BuildError, match=r"not empty and no dataset folder"):
        check_replaceable(folder)
