"""Pushes that are interrupted, refused or overtaken: what is there afterwards, and what the user is told."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
from loopback_hub import TOKEN, Blob, Client, Hub, client_environment
from test_push import LOGIN, TYPED, as_sent, here, there

READER = "hf_" + "canaryOfAReaderXyZ0123456789"
COMMIT = "POST /api/datasets/me/[a-z]+/commit/"


@pytest.fixture(scope="module")
def hub():
    hub = Hub()
    hub.users[READER] = "reader"
    yield hub
    hub.close()


@pytest.fixture(autouse=True)
def _new_story(hub):
    hub.forget()
    hub.repos.clear()
    hub.stored.clear()


def one_sentence(done):
    """The error, which is one line and no traceback."""
    lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.text[-3000:]
    assert "Traceback" not in done.text
    return lines[0]


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param("500", id="500 before the commit"),
        pytest.param("500 after", id="500 after the commit"),
        pytest.param("drop", id="line broken before the commit"),
        pytest.param("drop after", id="line broken after the commit"),
    ],
)
def test_whatever_happens_around_the_commit_there_is_one(hub, client, vqa_dataset, fault):
    hub.failures[COMMIT] = [fault]
    report = client.run("push", vqa_dataset, "me/vqa", "--json").json
    repo = hub.repos["dataset", "me/vqa"]

    assert hub.failures[COMMIT] == []
    assert len(hub.seen(COMMIT)) == (1 if "after" in fault else 2)
    assert len(repo.commits) == 2
    assert report["commit"] == repo.head
    assert there(repo) == as_sent(vqa_dataset, "me/vqa")


def test_a_hub_that_stays_down_is_said_and_the_rerun_completes(hub, client, vqa_dataset):
    hub.failures[COMMIT] = ["503"] * 3
    failed = client.run("push", vqa_dataset, "me/vqa")
    uploads = len(hub.seen("PUT /_lfs/"))

    assert failed.code == 1
    assert "the Hub has trouble (503)" in one_sentence(failed)
    assert "run the same command again" in one_sentence(failed)
    assert len(hub.repos["dataset", "me/vqa"].commits) == 1
    assert client.run("push", vqa_dataset, "me/vqa").code == 0
    assert len(hub.seen("PUT /_lfs/")) == uploads  # nothing was sent twice
    assert there(hub.repos["dataset", "me/vqa"]) == as_sent(vqa_dataset, "me/vqa")


def test_an_upload_that_fails_once_is_tried_again(hub, client, vqa_dataset):
    hub.failures["PUT /_lfs/"] = ["500", "drop"]

    assert client.run("push", vqa_dataset, "me/vqa").code == 0
    assert there(hub.repos["dataset", "me/vqa"]) == as_sent(vqa_dataset, "me/vqa")


def overtake(hub, files):
    """Somebody else's commit, made while ours is under way."""

    def act():
        repo = hub.repos["dataset", "me/vqa"]
        repo.commit({**repo.files, **files}, b"somebody else")

    return act


def test_somebody_elses_commit_is_not_overwritten(hub, client, vqa_dataset):
    hub.failures[COMMIT] = [overtake(hub, {"NOTES.md": Blob(b"theirs")})]
    done = client.run("push", vqa_dataset, "me/vqa")

    assert done.code == 1
    assert "changed meanwhile, and nothing there was overwritten" in one_sentence(done)
    assert there(hub.repos["dataset", "me/vqa"]) == {"NOTES.md": b"theirs"}
    assert client.run("push", vqa_dataset, "me/vqa").code == 0
    assert there(hub.repos["dataset", "me/vqa"]) == as_sent(vqa_dataset, "me/vqa") | {"NOTES.md": b"theirs"}


def test_a_500_that_hides_somebody_elses_commit_is_not_taken_for_ours(hub, client, vqa_dataset):
    def act():
        overtake(hub, {"README.md": Blob(b"theirs")})()
        hub.failures[COMMIT] = ["500"]

    hub.failures["POST /api/validate-yaml"] = [act]
    done = client.run("push", vqa_dataset, "me/vqa")

    assert done.code == 1
    assert "changed meanwhile" in one_sentence(done)
    assert there(hub.repos["dataset", "me/vqa"]) == {"README.md": b"theirs"}


def test_death_between_upload_and_commit_is_made_good_by_the_rerun(hub, client, vqa_dataset, tmp_path):
    hub.failures[COMMIT] = ["hang"]
    command = [sys.executable, "-m", "dentalgemma", "push", str(vqa_dataset), "me/vqa", "--tag", "v1"]
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(command, env=client_environment(hub, tmp_path), stdout=said, stderr=said)
        assert hub.hanging.wait(60), (tmp_path / "said").read_text()
        process.send_signal(signal.SIGKILL)
        process.wait()
    repo = hub.repos["dataset", "me/vqa"]
    assert (len(repo.commits), repo.tags, repo.private) == (1, {}, True)
    uploaded = len(hub.seen("PUT /_lfs/"))
    assert uploaded == len([path for path in here(vqa_dataset) if path.endswith((".parquet", ".png"))])

    report = client.run("push", vqa_dataset, "me/vqa", "--tag", "v1", "--json").json

    assert len(hub.seen("PUT /_lfs/")) == uploaded
    assert len(repo.commits) == 2
    assert repo.tags == {"v1": repo.head} == {"v1": report["commit"]}
    assert there(repo) == as_sent(vqa_dataset, "me/vqa")
    assert TOKEN not in (tmp_path / "said").read_text()


def test_death_after_the_commit_leaves_only_tag_and_visibility_to_the_rerun(hub, client, vqa_dataset, tmp_path):
    hub.failures["GET /datasets/me/vqa/resolve/"] = ["hang"]
    command = [sys.executable, "-m", "dentalgemma", "push", str(vqa_dataset), "me/vqa", "--tag", "v1", "--public"]
    process = subprocess.Popen(
        command, env=client_environment(hub, tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    assert hub.hanging.wait(60)
    process.kill()
    process.wait()
    repo = hub.repos["dataset", "me/vqa"]
    assert (len(repo.commits), repo.tags, repo.private) == (2, {}, True)

    report = client.run("push", vqa_dataset, "me/vqa", "--tag", "v1", "--public", "--json").json

    assert (report["committed"], report["read_back"]) == (False, True)
    assert (len(repo.commits), repo.tags, repo.private) == (2, {"v1": repo.head}, False)


def test_other_bytes_on_the_hub_are_found_and_nothing_is_made_public(hub, client, vqa_dataset):
    hub.failures["GET /datasets/me/vqa/resolve/.*/records.jsonl"] = ["spoil"]
    done = client.run("push", vqa_dataset, "me/vqa", "--public", "--tag", "v1")
    repo = hub.repos["dataset", "me/vqa"]

    assert done.code == 1
    assert "has another records.jsonl at commit" in one_sentence(done)
    assert (repo.private, repo.tags) == (True, {})


def test_a_lost_answer_to_the_tag_is_no_failure(hub, client, vqa_dataset):
    hub.failures["POST /api/datasets/me/vqa/tag/"] = ["500 after"]

    assert client.run("push", vqa_dataset, "me/vqa", "--tag", "v1").code == 0
    assert hub.repos["dataset", "me/vqa"].tags == {"v1": hub.repos["dataset", "me/vqa"].head}


@pytest.mark.parametrize(
    ("repo", "environment", "message"),
    [
        pytest.param("me/vqa", {"HF_TOKEN": None}, "no token for the Hub: run `hf auth login`", id="no token"),
        pytest.param("me/vqa", {"HF_TOKEN": "hf_" + "expired0123456789abcdef"}, "does not accept the token", id="401"),
        pytest.param("somebody/vqa", {}, "take one that may write there", id="403 for the owner's name"),
        pytest.param("me/there", {"HF_TOKEN": READER}, "take one that may write there", id="403 for a reader"),
        pytest.param("me/gated", {"HF_TOKEN": READER}, "/datasets/me/gated is gated: accept its terms", id="gated"),
        pytest.param("vqa", {}, "a repository is named owner/name", id="no owner"),
        pytest.param("me/a/b", {}, "a repository is named owner/name", id="two slashes"),
        pytest.param("me/v..qa", {}, "a repository is named owner/name", id="no name"),
        pytest.param("me/vqa", {"HF_ENDPOINT": "unused", "HF_HUB_OFFLINE": "0"}, None, id="as usual"),
    ],
)
def test_who_may_not_is_told_why_and_where(hub, client, vqa_dataset, repo, environment, message):
    hub.add("me/there", repo_type="dataset")
    hub.add("me/gated", repo_type="dataset", gated=True)
    done = client.run("push", vqa_dataset, repo, "--public", **environment)

    if message is None:  # the control
        assert done.code == 0
        return
    assert done.code in (1, 2)
    assert message in one_sentence(done)
    assert not hub.seen("PUT|POST .*/commit/")
    assert environment.get("HF_TOKEN") is None or environment["HF_TOKEN"] not in done.text


def test_a_hub_that_nobody_reaches_is_one_sentence(vqa_dataset, tmp_path, hub):
    environment = client_environment(hub, tmp_path) | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "dentalgemma", "push", str(vqa_dataset), "me/vqa"]
    dry = subprocess.run([*command, "--dry-run", "--json"], capture_output=True, text=True, env=environment, timeout=60)

    assert json.loads(dry.stdout)["remote"] is None
    assert "cannot be reached" in json.loads(dry.stdout)["remote_unknown"]
    offline = subprocess.run(
        command, capture_output=True, text=True, env=environment | {"HF_HUB_OFFLINE": "1"}, timeout=60
    )
    assert offline.returncode == 1
    assert "HF_HUB_OFFLINE is set, so the Hub is not asked: unset it to push" in offline.stderr


@pytest.fixture(scope="module")
def usual(hub, tmp_path_factory):
    """A client that sends large files as the Hub's client does by default, and is not patient about it."""
    short = {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1", "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms"}
    client = Client(hub, tmp_path_factory.mktemp("usual"), HF_HUB_DISABLE_XET="0", **short)
    yield client
    client.close()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        pytest.param("403", "this token may not do that with", id="403"),
        pytest.param("500", "the Hub has trouble (500)", id="500"),
        pytest.param("ok", "the Hub cannot be reached or breaks off (ConnectionError)", id="nobody at the storage"),
    ],
)
def test_a_failure_of_the_default_transport_is_one_sentence(hub, usual, vqa_dataset, fault, message):
    hub.failures["GET /api/datasets/me/vqa/xet-write-token/"] = [fault] * 20
    done = usual.run("push", vqa_dataset, "me/vqa")

    assert done.code == 1
    assert hub.seen("GET /api/datasets/me/vqa/xet-write-token/")  # it was that transport that failed
    assert message in one_sentence(done)
    assert "Uploading up to" in done.err  # what it waits for
    assert TOKEN not in done.text


@pytest.mark.parametrize(
    "request_line",
    [
        "GET /api/datasets/me/vqa/tree/",
        "PUT /_lfs/",
        "POST /api/datasets/me/vqa/commit/",
        "GET /datasets/me/vqa/resolve/",
    ],
)
def test_a_hub_that_falls_silent_does_not_hold_the_push_for_good(hub, client, vqa_dataset, request_line):
    hub.failures[request_line] = ["hang"]
    arguments = ["dentalgemma", "push", str(vqa_dataset), "me/vqa", "--json"]
    done = client.python(
        f"""
import sys
import dentalgemma.publishing.remote as remote
from dentalgemma.cli import main
before, remote.ANSWER = remote.ANSWER, 0.7
sys.argv = {arguments!r}
try:
    main()
finally:
    remote.ANSWER = before
"""
    )

    assert done.code == 0, done.text[-2000:]
    assert hub.failures[request_line] == []
    assert there(hub.repos["dataset", "me/vqa"]) == as_sent(vqa_dataset, "me/vqa")


@pytest.mark.parametrize("moment", ["GET /datasets/me/vqa/resolve/", "PUT /api/datasets/me/vqa/settings"])
def test_only_what_was_read_back_is_made_public(hub, client, vqa_dataset, moment):
    hub.failures[moment] = [overtake(hub, {"evil.pkl": Blob(b"theirs")})]
    done = client.run("push", vqa_dataset, "me/vqa", "--public")

    assert done.code == 1
    assert "changed after it was read back, and stays private" in one_sentence(done)
    assert hub.repos["dataset", "me/vqa"].private


@pytest.mark.parametrize(
    ("before", "named"),
    [
        pytest.param([{"notes.txt": Blob(TYPED.encode())}], "notes.txt", id="a file that stays"),
        pytest.param([{"data/train-00000-of-00009.parquet": Blob(b"x")}], "the earlier commit", id="one that goes"),
        pytest.param([{"notes.txt": Blob(TYPED.encode())}, {}], "2 earlier commits", id="one that is gone"),
    ],
)
def test_what_was_private_is_not_made_public_by_the_way(hub, client, vqa_dataset, before, named):
    repo = hub.add("me/vqa", repo_type="dataset", private=True)
    repo.commits.clear()
    for files in before:
        repo.commit(files)
    foreseen = client.run("push", vqa_dataset, "me/vqa", "--public", "--dry-run")
    refused = client.run("push", vqa_dataset, "me/vqa", "--public")

    assert (foreseen.code, refused.code) == (2, 2)
    assert named in one_sentence(refused)
    assert "--open-history" in one_sentence(refused)
    assert not hub.seen("PUT|POST")
    assert client.run("push", vqa_dataset, "me/vqa").code == 0  # privately
    assert client.run("push", vqa_dataset, "me/vqa", "--public").code == 2
    assert client.run("push", vqa_dataset, "me/vqa", "--public", "--open-history").code == 0
    assert not repo.private


def test_what_was_checked_is_what_is_sent_whatever_becomes_of_the_file(hub, client, vqa_dataset, tmp_path):
    folder = shutil.copytree(vqa_dataset, tmp_path / "vqa")
    (folder / "README.md").write_bytes((folder / "README.md").read_bytes())
    repo = hub.add("me/vqa", repo_type="dataset")  # public: a commit is seen at once

    def act():
        (folder / "README.md").write_text(f"Log in with {TYPED}.")

    hub.failures["POST /api/datasets/me/vqa/preupload/"] = [act]
    done = client.run("push", folder, "me/vqa", "--public")

    assert done.code == 1
    assert "was changed while it was checked or sent: push again" in one_sentence(done)
    assert len(repo.commits) == 1
    shutil.copyfile(vqa_dataset / "README.md", folder / "README.md")
    hub.failures[COMMIT] = ["500 after", act]
    hub.failures["GET /api/datasets/me/vqa$"] = ["ok", act]  # after the commit was sent
    assert client.run("push", folder, "me/vqa", "--public").code == 0
    assert there(repo) == as_sent(vqa_dataset, "me/vqa")


def test_a_folder_that_changes_while_it_is_checked_is_not_sent(hub, client, vqa_dataset, tmp_path):
    folder = shutil.copytree(vqa_dataset, tmp_path / "vqa")
    done = client.python(
        f"""
import os, sys, threading
from dentalgemma.cli import main
stop = threading.Event()
def touch():
    time = 0
    while not stop.is_set():
        time += 1
        os.utime({str(folder / "README.md")!r}, (time, time))
thread = threading.Thread(target=touch)
thread.start()
sys.argv = ["dentalgemma", "push", {str(folder)!r}, "me/vqa", "--json"]
try:
    main()
finally:
    stop.set()
    thread.join()
"""
    )

    assert done.code == 1
    assert "was changed while it was checked" in one_sentence(done)
    assert not hub.requests


def publish_it(hub):
    def act():
        hub.repos["dataset", "me/vqa"].private = False

    return act


def test_a_repository_that_somebody_else_opens_is_not_called_private(hub, client, vqa_dataset):
    hub.failures[COMMIT] = [publish_it(hub)]
    done = client.run("push", vqa_dataset, "me/vqa")

    assert done.code == 1
    assert "was made public by somebody else meanwhile" in one_sentence(done)


def test_a_name_that_somebody_else_took_in_public_gets_nothing(hub, client, vqa_dataset):
    hub.failures["POST /api/repos/create"] = [lambda: hub.add("me/vqa", repo_type="dataset")]
    done = client.run("push", vqa_dataset, "me/vqa")

    assert done.code == 1
    assert "was made in public meanwhile" in one_sentence(done)
    assert not hub.seen("PUT|POST .*/commit/")


def test_a_tag_that_somebody_else_set_elsewhere_is_said(hub, client, vqa_dataset):
    hub.failures["POST /api/datasets/me/vqa/tag/"] = [
        lambda: hub.repos["dataset", "me/vqa"].tags.update(v1=hub.repos["dataset", "me/vqa"].commits[0][0])
    ]
    done = client.run("push", vqa_dataset, "me/vqa", "--public", "--tag", "v1")

    assert done.code == 1
    assert "somebody's tag v1 on another" in one_sentence(done)
    assert hub.repos["dataset", "me/vqa"].private


def test_a_lost_answer_is_not_ours_while_what_it_was_to_delete_is_there(hub, client, vqa_dataset, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000-of-00009.parquet").write_bytes(b"old")
    repo = hub.add("me/vqa", tmp_path, repo_type="dataset", private=True)
    sent = as_sent(vqa_dataset, "me/vqa")
    hub.failures["POST /api/validate-yaml"] = [
        lambda: (
            overtake(hub, {path: Blob(data) for path, data in sent.items()})(),
            hub.failures.update({COMMIT: ["500"]}),
        )
    ]
    done = client.run("push", vqa_dataset, "me/vqa")

    assert done.code == 1
    assert "changed meanwhile" in one_sentence(done)
    assert "data/train-00000-of-00009.parquet" in repo.files


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["FOLDER", "me/vqa", "--tag", TYPED], id="tag"),
        pytest.param(["FOLDER", f"me/{TYPED}"], id="repository"),
        pytest.param([TYPED, "me/vqa"], id="folder"),
        pytest.param(["FOLDER", "me/vqa", "--permission", LOGIN], id="permission"),
    ],
)
def test_a_token_in_place_of_an_argument_is_refused_and_not_shown(hub, client, vqa_dataset, arguments):
    done = client.run("push", *[str(vqa_dataset) if argument == "FOLDER" else argument for argument in arguments])

    assert done.code == 2
    assert "looks like a token" in one_sentence(done)
    assert not any(part in done.text for token in (TYPED, LOGIN) for part in (token, token[3:15]))
    assert hub.requests == []


def test_the_hub_says_when_to_come_again(hub, client, vqa_dataset):
    hub.failures["GET /api/datasets/me/vqa$"] = ["429 wait 2"]
    begun = time.monotonic()
    assert client.run("push", vqa_dataset, "me/vqa").code == 0
    assert time.monotonic() - begun > 2  # by itself it is one second


def test_what_others_say_does_not_act_on_the_terminal(hub, client, vqa_dataset):
    repo = hub.add("me/vqa", repo_type="dataset", private=True)
    repo.commit({**repo.files, "esc\x1b[31m\u202e.md": Blob(b"theirs")})
    done = client.run("push", vqa_dataset, "me/vqa")

    assert done.code == 0
    assert "esc\ufffd[31m\ufffd.md" in done.out
    assert "\x1b" not in done.text
