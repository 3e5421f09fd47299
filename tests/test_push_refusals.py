"""What is not published: each folder that must not be is refused before the Hub is asked, with what to do."""

import json
import pickle
import shutil
import subprocess
import sys

import pytest
import yaml
from PIL import Image
from test_metadata import CANARY, exif
from test_push import MEDGEMMA, TYPED, change_stage, make_model

from data_builders.dataset_folder import hash_file
from data_builders.sources import load_sources
from data_builders.vqa import build_vqa
from dentalgemma.certificates import CERTIFICATE
from dentalgemma.cli import main
from dentalgemma.publishing.folders import PushRefused, read_front_matter
from dentalgemma.publishing.hub import push
from dentalgemma.publishing.remote import PushError
from dentalgemma.publishing.space import write_space


@pytest.fixture(autouse=True)
def _token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "canaryOfTheEnvironmentXyZ0123456789")


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    facts = {"base_model": MEDGEMMA, "base_is_local": False, "base_is_rehearsal": False}
    return make_model(tiny_model, tmp_path_factory.mktemp("medgemma"), **facts)


@pytest.fixture
def model(made, tmp_path):
    """A copy of a model that may be published, to spoil."""
    return shutil.copytree(made, tmp_path / "model")


@pytest.fixture(scope="module")
def unlicensed_dataset(phantoms, tmp_path_factory):
    document = yaml.safe_load((phantoms / "sources.yaml").read_text())
    document["sources"][0] |= {"root": str(phantoms / "yolo"), "name": "mine"}
    del document["sources"][0]["license"]
    folder = tmp_path_factory.mktemp("unlicensed")
    (folder / "sources.yaml").write_text(yaml.safe_dump(document))
    build_vqa(load_sources(folder / "sources.yaml"), folder / "vqa", progress=False)
    return folder / "vqa"


def passes(folder, **options):
    """Whether nothing but the Hub, which is not asked in these tests, is missing; the control of every refusal."""
    with pytest.raises(PushError, match="HF_HUB_OFFLINE is set"):
        push(folder, "me/name", progress=False, **options)


def refusal(folder, **options):
    """Why a folder is refused."""
    with pytest.raises(PushRefused) as refused:
        push(folder, "me/name", progress=False, **options)
    return str(refused.value)


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_what_these_tests_spoil_would_be_published(model):
    passes(model)
    passes(model, public=True)
    passes(model, adapter_only=True)


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(f"license: apache-2.0\nbase_model: {MEDGEMMA}\nbase_model_relation: finetune", id="apache-2.0"),
        pytest.param("license: apache-2.0\nbase_model_relation: finetune", id="and no base_model"),
        pytest.param(
            "license: apache-2.0\nbase_model: google/gemma-4-E4B-it\nbase_model_relation: finetune", id="another base"
        ),
    ],
)
@pytest.mark.parametrize("public", [False, True])
def test_apache_on_a_medgemma_base_is_refused(model, head, public):
    card = model / "README.md"
    body = card.read_text().split("\n---\n", 1)[1]
    card.write_text(f"---\n{head}\nlibrary_name: transformers\n---\n{body}")
    message = refusal(model, public=public)

    assert "health-ai-developer-foundations" in message
    assert "write it again with `dentalgemma card`" in message


def test_apache_on_medgemma_is_one_sentence_and_exit_code_2(model, monkeypatch, capsys):
    edit(
        model / "README.md", "license: other\nlicense_name: health-ai-developer-foundations\n", "license: apache-2.0\n"
    )
    monkeypatch.setattr("sys.argv", ["dentalgemma", "push", str(model), "me/name"])
    with pytest.raises(SystemExit) as stop:
        main()
    errors = [line for line in capsys.readouterr().err.splitlines() if line]

    assert stop.value.code == 2
    assert len(errors) == 1
    assert "license: apache-2.0" in errors[0]


def test_a_base_that_was_a_folder_keeps_the_terms_of_its_name(model):
    change_stage(model, base_model="my-medgemma-copy", base_is_local=True)
    passes(model)
    edit(model / "README.md", f"base_model: {MEDGEMMA}", "base_model: google/gemma-4-E4B-it")

    assert "training started from a folder my-medgemma-copy, which is under the Health AI" in refusal(model)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(lambda model: (model / "NOTICE").unlink(), "has no NOTICE file", id="no NOTICE"),
        pytest.param(
            lambda model: edit(model / "NOTICE", "HAI-DEF is provided", "It is provided"),
            "is not the text that the terms of the base ask for",
            id="another NOTICE",
        ),
        pytest.param(lambda model: (model / "README.md").unlink(), "has no card", id="no card"),
        pytest.param(
            lambda model: edit(model / "README.md", "library_name: transformers", "library_name: peft"),
            "library_name must be transformers",
            id="library",
        ),
        pytest.param(
            lambda model: edit(model / "README.md", "base_model_relation: finetune", "base_model_relation: merge"),
            "base_model_relation is merge, and must be finetune",
            id="relation",
        ),
        pytest.param(
            lambda model: edit(model / "README.md", "---\n", "---\nlicense: [mit\n"),
            "its metadata is no YAML",
            id="YAML",
        ),
        pytest.param(
            lambda model: (model / CERTIFICATE).unlink(), f"has weights and no {CERTIFICATE}", id="no certificate"
        ),
        pytest.param(
            lambda model: edit(model / CERTIFICATE, '"passed": true', '"passed": false'),
            "the merge failed",
            id="failing certificate",
        ),
        pytest.param(
            lambda model: (model / "model.safetensors").write_bytes(b"\0" * 100),
            "is about other weights than those that lie beside it",
            id="other weights",
        ),
        pytest.param(
            lambda model: change_stage(model, proof={"passed": False}), "did not train what it was to train", id="proof"
        ),
    ],
)
def test_a_model_without_all_its_papers_is_refused(model, spoil, message):
    spoil(model)

    assert message in refusal(model, public=True)
    assert message in refusal(model)  # also privately


def test_a_card_of_other_weights_is_refused(model):
    certificate = json.loads((model / CERTIFICATE).read_text())
    edit(model / "README.md", certificate["weights"], "0" * 64)

    assert "is about other weights: it does not name their fingerprint" in refusal(model)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(
            lambda folder: edit(folder / "adapter_config.json", MEDGEMMA, "/models/base"),
            "base_model_name_or_path is /models/base, and must be google/medgemma",
            id="a path for a base",
        ),
        pytest.param(
            lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\0" * 100),
            f"is not the adapter that {CERTIFICATE} is about",
            id="other weights",
        ),
        pytest.param(lambda folder: (folder / "NOTICE").unlink(), "has no NOTICE file", id="no NOTICE"),
        pytest.param(lambda folder: (folder / "README.md").unlink(), "has no card", id="no card"),
        pytest.param(shutil.rmtree, "it has no subfolder adapter/: merge again", id="none at all"),
    ],
)
def test_an_adapter_without_all_its_papers_is_refused(model, spoil, message):
    spoil(model / "adapter")

    assert message in refusal(model, adapter_only=True)


def test_a_chain_without_an_adapter_of_its_own_says_why(model):
    shutil.rmtree(model / "adapter")
    certificate = json.loads((model / CERTIFICATE).read_text())
    certificate["adapter"] = {"left_out": "a module was trained in full"}
    (model / CERTIFICATE).write_text(json.dumps(certificate))

    assert "no adapter of its own, since a module was trained in full" in refusal(model, adapter_only=True)
    passes(model)


def write_picture(path):
    Image.new("RGB", (8, 8)).save(path, exif=exif())


@pytest.mark.parametrize(
    ("name", "write"),
    [
        pytest.param("training_args.bin", lambda path: path.write_bytes(pickle.dumps({})), id="training_args.bin"),
        pytest.param("optimizer.pt", lambda path: path.write_bytes(pickle.dumps({})), id="optimizer"),
        pytest.param("rng_state.pth", lambda path: path.write_bytes(pickle.dumps({})), id="random state"),
        pytest.param("weights.dat", lambda path: path.write_bytes(pickle.dumps([1] * 9, 4)), id="a pickle by content"),
        pytest.param("recipe.yaml", lambda path: path.write_text(f"hub_token: {TYPED}\n"), id="a token in a YAML"),
        pytest.param("run_facts.json", lambda path: path.write_text(json.dumps({"command": [TYPED]})), id="in facts"),
        pytest.param("NOTES.md", lambda path: path.write_text(f"Log in with {TYPED}.\n"), id="in a text"),
        pytest.param("paths.json", lambda path: path.write_text('{"x": "/home/ximena/data"}'), id="an absolute path"),
        pytest.param("sample.jpg", write_picture, id="metadata in a picture"),
    ],
)
def test_what_must_not_leave_this_machine_is_refused_and_not_shown(model, name, write):
    write(model / name)
    message = refusal(model)

    assert name in message
    assert TYPED not in message
    assert TYPED[3:12] not in message
    assert CANARY.decode() not in message


def test_every_reason_is_named_at_once(model):
    (model / "NOTICE").unlink()
    (model / "training_args.bin").write_bytes(pickle.dumps({}))
    lines = refusal(model).splitlines()

    assert lines[0] == f"{len(lines) - 1} reasons not to push:"
    assert any("NOTICE" in line for line in lines)
    assert any("training_args.bin" in line for line in lines)


def test_hidden_files_and_empty_folders_stay_here(model):
    (model / ".cache").mkdir()
    (model / ".cache" / "token").write_text(TYPED)
    (model / ".DS_Store").write_bytes(b"\0")
    (model / "empty").mkdir()
    report = push(model, "me/name", dry_run=True, progress=False)

    assert {".cache/", ".DS_Store", "empty/ (empty)"} < set(report["left_here"])
    assert not any(file["path"].startswith((".", "empty", "adapter/")) for file in report["files"])


def test_a_link_out_of_the_folder_is_refused(model, tmp_path):
    (model / "here.json").symlink_to(model / "config.json")
    passes(model)
    (tmp_path / "outside.json").write_text("{}")
    (model / "there.json").symlink_to(tmp_path / "outside.json")

    assert "there.json is a link that leads out of" in refusal(model)


def test_a_run_folder_is_to_be_merged_first(made):
    assert "is a run folder: merge it first" in refusal(made.parent / "run")


def test_a_folder_of_nothing_we_know_is_refused(tmp_path):
    assert "is no folder that `merge`, `quantize`, `build`" in refusal(tmp_path)
    assert "is no folder:" in refusal(tmp_path / "missing")


def test_a_public_dataset_needs_a_licence_or_the_owners_consent(unlicensed_dataset):
    message = refusal(unlicensed_dataset, public=True)

    assert "\n" not in message
    assert "the source mine states no licence" in message
    assert "--permission mine" in message
    passes(unlicensed_dataset, public=True, permissions=("mine",))
    report = push(unlicensed_dataset, "me/name", dry_run=True, progress=False)
    assert [warning[:40] for warning in report["warnings"]] == ["must stay private: the source mine state"]


def test_a_public_model_of_unlicensed_data_is_refused_alike(model):
    path = model / CERTIFICATE
    certificate = json.loads(path.read_text())
    certificate["stages"][0]["data_sources"][0]["license"] = None
    path.write_text(json.dumps(certificate))

    assert "the source opg states no licence" in refusal(model, public=True)
    passes(model, public=True, permissions=("opg",))
    passes(model)


def test_a_permission_for_a_source_that_is_not_there_is_refused(model, unlicensed_dataset):
    assert "--permission yours: there is no such source; there are mine" in refusal(
        unlicensed_dataset, permissions=("yours",)
    )
    assert "--permission yours: there is no such source; there are opg" in refusal(model, permissions=("yours",))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(
            lambda folder: edit(folder / "records.jsonl", "caries", "infection"),
            "records.jsonl was changed since it was built",
            id="changed",
        ),
        pytest.param(
            lambda folder: (folder / "LICENSE.md").unlink(), "LICENSE.md is gone since it was built", id="gone"
        ),
        pytest.param(
            lambda folder: edit(folder / "README.md", "license: apache-2.0", "license: mit"),
            "license: mit is not what follows from its sources: license: apache-2.0",
            id="card",
        ),
        pytest.param(
            lambda folder: (folder / "build_report.json").write_text("{"), "is no report of a build", id="no report"
        ),
    ],
)
def test_a_dataset_is_published_as_it_was_built(vqa_dataset, tmp_path, spoil, message):
    folder = shutil.copytree(vqa_dataset, tmp_path / "vqa")
    passes(folder)
    spoil(folder)

    assert message in refusal(folder)


def test_a_card_that_was_changed_with_its_hash_is_refused_too(vqa_dataset, tmp_path):
    folder = shutil.copytree(vqa_dataset, tmp_path / "vqa")
    edit(folder / "README.md", "license: apache-2.0", "license: mit")
    report = json.loads((folder / "build_report.json").read_text())
    report["files"]["README.md"] = hash_file(folder / "README.md")
    (folder / "build_report.json").write_text(json.dumps(report))

    assert "license: mit is not what follows from its sources" in refusal(folder)


def test_what_no_build_wrote_stays_here(vqa_dataset, tmp_path):
    folder = shutil.copytree(vqa_dataset, tmp_path / "vqa")
    (folder / "probe.jsonl").write_text("{}\n")
    report = push(folder, "me/name", dry_run=True, progress=False)

    assert report["left_here"] == ["probe.jsonl"]


def test_a_space_holds_no_weights_and_all_it_needs(tmp_path):
    folder = write_space(tmp_path / "space", "me/model")
    passes(folder)
    (folder / "requirements.txt").unlink()
    shutil.copyfile(folder / "app.py", folder / "model.gguf")
    message = refusal(folder)

    assert "model.gguf is a weight file" in message
    assert "a Space needs requirements.txt" in message


@pytest.mark.parametrize("tag", ["", "v 1", "-v1", "v..1", "v1.lock", "refs/heads/main", "v1\n"])
def test_a_tag_that_git_would_not_take_is_refused(vqa_dataset, tag):
    with pytest.raises(ValueError, match="is no name for a tag"):
        push(vqa_dataset, "me/name", tag=tag, progress=False)


@pytest.mark.parametrize(
    "head",
    [
        pytest.param("license: mit\nlicense: other", id="twice"),
        pytest.param("license: mit\nname: a\x85---\x85license: other", id="a second document"),
        pytest.param("license: !!python/name:os.system", id="code"),
        pytest.param("- license", id="no mapping"),
        pytest.param("mit", id="no names"),
    ],
)
def test_metadata_that_two_readers_may_read_differently_are_refused(tmp_path, head):
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\n---\n\n---\nlicense: other\n---\n")
    assert read_front_matter(card) == {"license": "mit"}
    card.write_text(f"---\n{head}\n---\n")

    with pytest.raises(PushRefused, match="its metadata"):
        read_front_matter(card)


def test_looking_at_a_folder_needs_no_torch():
    heavy = {"torch", "transformers", "datasets"}
    code = f"import sys, dentalgemma.publishing.hub; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

    assert done.stdout.strip() == "[]", done.stderr[-1000:]
