"""What is not published: each folder that must not be is refused before the Hub is asked, with what to do."""

import json
import pickle
import shutil
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from test_metadata import CANARY, exif
from test_push import MEDGEMMA, TYPED, change_stage, make_model

from data_builders.dataset_folder import hash_file
from data_builders.sources import load_sources
from data_builders.vqa import build_vqa
from dentalgemma.certificates import CERTIFICATE, MODEL_FILES, MergeError, read_certificate
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
    errors = [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith("Checking ")]

    assert stop.value.code == 2
    assert len(errors) == 1
    assert "license: apache-2.0" in errors[0]


def test_a_base_of_another_family_than_the_weights_is_refused(model):
    """A local MedGemma under a name of its own, with the terms of Gemma 4."""
    change_stage(model, base_model="my-base", base_is_local=True)
    passes(model)
    card = model / "README.md"
    edit(card, f"base_model: {MEDGEMMA}", "base_model: google/gemma-4-E4B-it")
    head, body = card.read_text().split("\n---\n", 1)
    lines = [line for line in head.splitlines() if not line.startswith("license")]
    card.write_text("\n".join([*lines, "license: apache-2.0"]) + f"\n---\n{body}")

    assert "names a base that this model was not made from: config.json says model_type gemma3" in refusal(model)


def change_head(card, **changes):
    """Exchange metadata of a card; None takes them out."""
    _, head, body = card.read_text().split("---\n", 2)
    document = {key: value for key, value in {**yaml.safe_load(head), **changes}.items() if value is not None}
    card.write_text(f"---\n{yaml.safe_dump(document, sort_keys=False)}---\n{body}")


def test_a_4_bit_copy_names_its_base_or_the_merged_model_beside_it(model):
    card = model / "README.md"
    copied = {"base_model": "me/merged", "base_model_relation": "quantized", "original_base_model": MEDGEMMA}
    change_head(card, **copied)
    assert "base_model is me/merged, and must be google/medgemma" in refusal(model)  # this is no 4-bit copy
    certificate = json.loads((model / CERTIFICATE).read_text())
    (model / CERTIFICATE).write_text(json.dumps({**certificate, "quantization": {"method": "bitsandbytes nf4"}}))
    passes(model)
    change_head(card, original_base_model="google/gemma-4-E4B-it")
    assert "base_model is google/gemma-4-E4B-it, and must be google/medgemma" in refusal(model)
    change_head(card, base_model=MEDGEMMA, original_base_model=MEDGEMMA)
    assert "does not name the repository of the merged model" in refusal(model)
    change_head(card, base_model=MEDGEMMA, original_base_model=None, base_model_relation="finetune")
    passes(model)


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
        pytest.param(lambda model: change_stage(model, proof=None), "vqa has no proof of what was", id="no proof"),
        pytest.param(
            lambda model: change_stage(model, proof={"passed": None}), "has no proof of what", id="open proof"
        ),
        pytest.param(
            lambda model: change_stage(model, stage="unrecorded", merged_from="run7"),
            "nothing is recorded of run7",
            id="unrecorded",
        ),
        pytest.param(
            lambda model: (model / "pytorch_model.BIN").write_bytes(b"weights"),
            "is a weight file that merge_certificate.json does not list",
            id="weights beside",
        ),
        pytest.param(
            lambda model: edit(model / "config.json", "{", '{"text": {"auto_map": {"AutoModel": "x.Model"}},'),
            "config.json: auto_map names code that is run",
            id="code",
        ),
        pytest.param(
            lambda model: edit(model / "README.md", "tags:\n- dental", "tags:\n- License:apache-2.0\n- dental"),
            "the tag License:apache-2.0 would stand for metadata",
            id="tag",
        ),
    ],
)
def test_a_model_without_all_its_papers_is_refused(model, spoil, message):
    spoil(model)

    assert message in refusal(model, public=True)
    assert message in refusal(model)  # also privately


@pytest.mark.parametrize(
    ("spoil", "damage"),
    [
        pytest.param(lambda facts: [], "it is no JSON object", id="a list"),
        pytest.param(lambda facts: {**facts, "weights": ""}, "weights is no fingerprint", id="no fingerprint"),
        pytest.param(lambda facts: {**facts, "files": None}, "files names no weights", id="no files"),
        pytest.param(lambda facts: {**facts, "stages": []}, "stages is empty", id="no stage"),
        pytest.param(lambda facts: {**facts, "stages": None}, "stages is empty", id="no stages"),
        pytest.param(lambda facts: {**facts, "stages": [{"stage": "vqa"}]}, "stage 1 does not say", id="no base"),
        pytest.param(
            lambda facts: {**facts, "stages": [{**facts["stages"][0], "data_sources": [{"license": "MIT"}]}]},
            "data_sources of stage 1 has a source without a name",
            id="no name",
        ),
        pytest.param(
            lambda facts: {**facts, "stages": [{**facts["stages"][0], "proof": "passed"}]},
            "the proof of stage 1 is no record",
            id="no record",
        ),
    ],
)
def test_a_damaged_certificate_is_one_sentence(model, spoil, damage):
    path = model / CERTIFICATE
    path.write_text(json.dumps(spoil(json.loads(path.read_text()))))

    with pytest.raises(MergeError, match="is damaged") as stop:
        read_certificate(model)
    assert damage in str(stop.value)
    assert stop.value.exit_code == 1
    assert str(stop.value) in refusal(model)


def test_a_folder_without_a_certificate_is_wrong_use_and_a_failed_merge_is_not(model):
    (model / CERTIFICATE).write_text(json.dumps({"passed": False, "failures": None}))
    with pytest.raises(MergeError, match="the merge failed: it says of no check that it passed") as failed:
        read_certificate(model)
    (model / CERTIFICATE).unlink()
    with pytest.raises(MergeError, match="is missing: make the folder with") as missing:
        read_certificate(model)

    assert (failed.value.exit_code, missing.value.exit_code) == (1, 2)


def test_a_checkpoint_may_lack_the_proof_that_its_run_gave_at_the_end(model):
    change_stage(model, proof=None, from_checkpoint=True)
    passes(model)


def test_a_repository_gets_what_a_model_consists_of_and_nothing_else(model, unlicensed_dataset):
    before = {file["path"] for file in push(model, "me/name", dry_run=True, progress=False)["files"]}
    shutil.copytree(unlicensed_dataset, model / "data")
    (model / "best").mkdir()
    (model / "figures" / "old").mkdir()
    (model / ".eval_results").mkdir()
    for name in ("predictions.jsonl", "LICENSE", "modeling_x.py", "patient.txt", "best/model.safetensors"):
        (model / name).write_text("{}")
    for name in ("figures/extra.png", "figures/old/loss.png"):
        Image.new("RGB", (8, 8)).save(model / name)
    (model / ".eval_results" / "notes.txt").write_text("mine")
    (model / ".eval_results" / "task.yaml").write_text("[]\n")
    (model / "TERMS.md").write_text("The terms, word for word.\n")
    report = push(model, "me/name", dry_run=True, progress=False)
    built = sum(path.is_file() for path in unlicensed_dataset.rglob("*"))
    own = sum(path.is_file() for path in (model / "adapter").rglob("*"))

    assert {file["path"] for file in report["files"]} == before | {".eval_results/task.yaml", "TERMS.md"}
    assert before <= {
        "README.md",
        "NOTICE",
        CERTIFICATE,
        "model.safetensors",
        "figures/data.png",
        "figures/loss.png",
    } | {*MODEL_FILES}
    folders = [f"adapter/ ({own} files)", "best/ (1 file)", f"data/ ({built} files)"]
    beside = ["LICENSE", "modeling_x.py", "patient.txt", "predictions.jsonl"]
    deeper = [".eval_results/notes.txt", "figures/extra.png", "figures/old/loss.png"]
    assert report["left_here"] == sorted([*folders, *beside, *deeper])
    adapter = push(model, "me/name", adapter_only=True, dry_run=True, progress=False)
    assert "TERMS.md" in {file["path"] for file in adapter["files"]}


def test_a_medgemma_model_without_its_terms_beside_it_is_warned_of(model):
    (warning,) = push(model, "me/name", dry_run=True, public=True, progress=False)["warnings"]
    assert "is to be given a copy of the Health AI Developer Foundations Terms of Use" in warning
    (model / "TERMS.md").write_text("The terms, word for word.\n")

    assert push(model, "me/name", dry_run=True, public=True, progress=False)["warnings"] == []


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
    (warning,) = report["warnings"]
    assert warning.startswith("must stay private: the source mine states no licence")
    assert "--public" not in warning  # what was just left out
    assert message.endswith("--permission mine, or push without --public")


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


def test_terms_that_the_rows_do_not_state_are_refused(vqa_dataset, tmp_path):
    """The report and the card say Apache-2.0, the rows something else; every hash is right."""
    folder = shutil.copytree(vqa_dataset, tmp_path / "vqa")
    path = folder / "data" / "test-00000-of-00001.parquet"
    table = pq.read_table(path)
    place = table.column_names.index("license")
    stated = pa.array(["CC-BY-NC-4.0"] * len(table), table.schema.field("license").type)
    pq.write_table(table.set_column(place, table.schema.field("license"), stated), path)
    report = json.loads((folder / "build_report.json").read_text())
    report["files"]["data/test-00000-of-00001.parquet"] = hash_file(path)
    (folder / "build_report.json").write_text(json.dumps(report))

    message = refusal(folder)
    assert f"0 rows of phantom_yolo (CC-BY-NC-4.0), in the parquet files there are {len(table)}" in message
    pq.write_table(table.drop_columns("license"), path)
    report["files"]["data/test-00000-of-00001.parquet"] = hash_file(path)
    (folder / "build_report.json").write_text(json.dumps(report))
    assert "is no table of rows that each name their source and licence" in refusal(folder)


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


def test_a_space_is_what_space_wrote_and_what_was_changed_is_named(tmp_path):
    folder = write_space(tmp_path / "space", "me/model", base=MEDGEMMA, revision="v1.0")
    (folder / "data").mkdir()
    (folder / "patient.txt").write_text("J. Doe")
    (folder / "data" / "notes.txt").write_text("of others")
    report = push(folder, "me/name", dry_run=True, progress=False)

    assert [file["path"] for file in report["files"]] == ["README.md", "app.py", "requirements.txt"]
    assert report["left_here"] == ["data/ (1 file)", "patient.txt"]
    assert report["warnings"] == []
    edit(folder / "README.md", "license: apache-2.0", "license: mit")
    edit(folder / "app.py", "run_demo(MODEL", "run_demo('me/another'")
    (warning,) = push(folder, "me/name", dry_run=True, progress=False)["warnings"]
    assert warning.startswith("README.md, app.py: not what `dentalgemma space` writes for me/model")
    (folder / "app.py").write_text("print('anything')\n")
    (warning,) = push(folder, "me/name", dry_run=True, progress=False)["warnings"]
    assert "are not what `dentalgemma space` writes" in warning


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


@pytest.mark.parametrize(
    ("head", "by_hub"),
    [
        pytest.param("\n---\nlicense: mit\n---\n", {"license": "mit"}, id="an empty line first"),
        pytest.param("---\rlicense: mit\r---\n", {"license": "mit"}, id="CR"),
        pytest.param("---\nlicense: mit\n---  \n", {"license": "mit"}, id="blanks after the last"),
        pytest.param("---\nlicense: mit\n--- \nlicense: other\n---\n", {"license": "mit"}, id="an earlier end"),
        pytest.param("---  \nlicense: mit\n---\n", {}, id="blanks after the first"),
    ],
)
def test_metadata_are_read_as_the_hub_does_or_refused(tmp_path, head, by_hub):
    card = tmp_path / "README.md"
    card.write_bytes(head.encode())

    assert ModelCard(card.read_bytes().decode()).data.to_dict() == by_hub
    if by_hub:
        with pytest.raises(PushRefused, match="its metadata do not stand between two lines of --- alone"):
            read_front_matter(card)
    else:
        assert read_front_matter(card) == {}


def test_looking_at_a_folder_needs_no_torch():
    heavy = {"torch", "transformers", "datasets"}
    code = f"import sys, dentalgemma.publishing.hub; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

    assert done.stdout.strip() == "[]", done.stderr[-1000:]
