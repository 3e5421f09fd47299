"""What the Hub refuses is one sentence with its own remedy, told from the Hub's answer and not from the words in it."""

import json

import pytest
from conftest import REPOSITORY
from loopback_hub import Hub

STAGE1 = REPOSITORY / "recipes" / "stage1_vqa.yaml"
INVALID = "hf_" + "b" * 34
LOADING = """
from data_builders.records import InputError
from dentalgemma.models.loading import load_pretrained, weights_folder
for load in (load_pretrained, weights_folder):
    try:
        load({name!r}, revision={revision!r})
    except InputError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def hub():
    hub = Hub()
    hub.add("gated/model", gated=True)
    hub.add("me/empty")
    hub.add("clinic/gated-401-teeth")
    yield hub
    hub.close()


@pytest.mark.parametrize(
    ("name", "revision", "token", "sentence"),
    [
        pytest.param(
            "gated/model", None, None,
            "gated/model is gated: accept its terms on https://huggingface.co/gated/model and log in with "
            "`hf auth login`",
            id="gated",
        ),
        pytest.param(
            "gated/model", None, INVALID,
            "gated/model: your token is not valid, or no longer: log in again with `hf auth login`, or unset HF_TOKEN",
            id="no valid token",
        ),
        pytest.param(
            "models/nope", None, None,
            "models/nope is neither a folder here nor a model that the Hub would give: it does not exist there, or is "
            "private and your login may not see it",
            id="nothing there",
        ),
        pytest.param(
            "me/gated-403-nothing", None, None,
            "me/gated-403-nothing is neither a folder here nor a model that the Hub would give: it does not exist "
            "there, or is private and your login may not see it",
            id="nothing there, by a misleading name",
        ),
        pytest.param(
            "me/empty", "v9", None, "me/empty has no revision v9: see https://huggingface.co/me/empty/tree/main",
            id="no such revision",
        ),
        pytest.param(
            "models/no/where", None, None,
            "models/no/where is neither a folder here nor a model that the Hub would give: it is written OWNER/NAME "
            "there",
            id="no name of the Hub's",
        ),
    ],
)  # fmt: skip
def test_each_refusal_has_a_sentence_of_its_own(client, name, revision, token, sentence):
    environment = {"HF_TOKEN": token} if token else {}
    done = client.python(LOADING.format(name=name, revision=revision), **environment)

    assert done.out.splitlines() == [sentence, sentence], done.err[-2000:]
    assert INVALID not in done.text


def test_a_repository_that_holds_no_model_is_a_sentence_too(client):
    done = client.python(LOADING.format(name="clinic/gated-401-teeth", revision=None))

    assert done.code == 0, done.err[-2000:]
    assert done.out.startswith("clinic/gated-401-teeth: Unrecognized model")
    assert "is gated" not in done.out


def test_the_doctor_refuses_a_gated_model_and_looks_at_the_rest(client, vqa_dataset):
    options = ["--json", "--gpu", "l4", "--dataset_name", vqa_dataset, "--model_name_or_path", "gated/model"]
    done = client.run("doctor", STAGE1, *options)
    report = json.loads(done.out)

    assert done.code == 2
    assert report["access"] == "denied"
    assert "gated/model is gated: accept its terms on https://huggingface.co/gated/model" in report["refusals"][0]
    assert report["dataset"]["rows"]["train"] > 0
    refused = json.loads(client.run("doctor", STAGE1, *options, HF_TOKEN=INVALID).out)["refusals"]
    assert refused[0].startswith("gated/model: your token is not valid")
    assert INVALID not in json.dumps(refused)


def test_the_doctor_without_a_network_and_with_hardly_a_setting_has_sentences_to_say(hub, client, tmp_path):
    (tmp_path / "stage.yaml").write_text("learning_rate: 1.0e-4\n")
    hub.failures[".*"] = ["drop"] * 100
    try:
        done = client.run(
            "doctor", tmp_path / "stage.yaml", "--model_name_or_path", "me/gone", "--no-first-loss", "--json"
        )
    finally:
        hub.forget()
    report = json.loads(done.out)

    assert done.code == 2
    assert "Traceback" not in done.text
    assert "no dataset given: set --dataset_name to a folder or a Hub id" in report["refusals"]
    assert sum("no dataset given" in sentence for sentence in report["refusals"]) == 1
    (lost,) = [sentence for sentence in report["refusals"] if "me/gone" in sentence]
    assert "the Hub cannot be reached (" in lost
    assert "access to me/gone: the Hub could not be asked (offline?)" in report["unchecked"]
