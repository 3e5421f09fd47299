"""Pushes that are interrupted, refused or overtaken: what is there afterwards, and what the user is told."""

import json
import signal
import subprocess
import sys

import pytest
from loopback_hub import TOKEN, Blob, Client, Hub, client_environment
from test_push import here, there

READER = "hf_" + "canaryOfAReaderXyZ0123456789"
COMMIT = "POST /api/datasets/me/[a-z]+/commit/"


@pytest.fixture(scope="module")
def hub():
    hub = Hub()
    hub.users[READER] = "reader"
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    client = Client(hub, tmp_path_factory.mktemp("home"))
    yield client
    client.close()


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
    assert there(repo) == here(vqa_dataset)


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
    assert there(hub.repos["dataset", "me/vqa"]) == here(vqa_dataset)


def test_an_upload_that_fails_once_is_tried_again(hub, client, vqa_dataset):
    hub.failures["PUT /_lfs/"] = ["500", "drop"]

    assert client.run("push", vqa_dataset, "me/vqa").code == 0
    assert there(hub.repos["dataset", "me/vqa"]) == here(vqa_dataset)


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
    assert there(hub.repos["dataset", "me/vqa"]) == here(vqa_dataset) | {"NOTES.md": b"theirs"}


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
    assert there(repo) == here(vqa_dataset)
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
