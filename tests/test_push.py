"""What `push` publishes, against a Hub on loopback: one commit, private, the same bytes, loadable by their names."""

import hashlib
import json
import re
import shutil

import pytest
import yaml
from loopback_hub import TOKEN, Blob, Client, Hub
from PIL import Image
from test_canaries import PATIENT, all_bytes
from test_merging import FACTS, write_adapter
from test_metadata import CANARY, picture, with_metadata

from data_builders.sources import load_sources
from data_builders.vqa import build_vqa
from dentalgemma.certificates import CERTIFICATE
from dentalgemma.merging import merge_adapter
from dentalgemma.publishing.cards import write_model_card
from dentalgemma.publishing.space import write_space

MEDGEMMA = "google/medgemma-1.5-4b-it"
SOURCE = {"name": "opg", "license": "CC-BY-4.0", "url": "https://example.org", "modality": "panoramic", "rows": 10}
TYPED = "hf_" + "typedIntoAFileByMistake0123456789"
LOGIN = "hf_canaryOfTheLoginFileXyZ0123456789"


@pytest.fixture(scope="module")
def hub():
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture(autouse=True)
def _new_story(hub):
    hub.forget()


def make_model(tiny_model, folder, **facts):
    """A merged model with its adapter and cards; `facts` change what its one stage recorded."""
    write_adapter(tiny_model, folder / "run", facts=False)
    recorded = {**FACTS, "base_model": "tiny", "dataset": "data/vqa", "data_sources": [SOURCE]}
    (folder / "run" / "run_facts.json").write_text(json.dumps(recorded))
    merge_adapter(folder / "run", folder / "model", dtype="float32")
    change_stage(folder / "model", **facts)
    write_model_card(folder / "model")
    return folder / "model"


def change_stage(model, **facts):
    path = model / CERTIFICATE
    certificate = json.loads(path.read_text())
    certificate["stages"][0] |= facts
    path.write_text(json.dumps(certificate))


@pytest.fixture(scope="module")
def rehearsal(tiny_model, tmp_path_factory):
    return make_model(tiny_model, tmp_path_factory.mktemp("rehearsal"))


@pytest.fixture(scope="module")
def medgemma(tiny_model, tmp_path_factory):
    """A model whose certificate says that it was trained on MedGemma."""
    facts = {"base_model": MEDGEMMA, "base_is_local": False, "base_is_rehearsal": False}
    return make_model(tiny_model, tmp_path_factory.mktemp("medgemma"), **facts)


@pytest.fixture(scope="module")
def mixed(phantoms, tmp_path_factory):
    """A dataset of two sources whose share-alike terms exclude each other."""
    document = yaml.safe_load((phantoms / "sources.yaml").read_text())
    source = document["sources"][0] | {"root": str(phantoms / "yolo")}
    other = yaml.safe_load((phantoms / "sources_coco.yaml").read_text())["sources"][0]
    other |= {"root": str(phantoms / "coco"), "name": "second", "license": "CC-BY-NC-SA-4.0"}
    document["sources"] = [source | {"name": "first", "license": "CC-BY-SA-4.0"}, other]
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "sources.yaml").write_text(yaml.safe_dump(document))
    build_vqa(load_sources(folder / "sources.yaml"), folder / "vqa", progress=False)
    return folder / "vqa"


def here(folder, *left_out):
    """The content of a folder by path, without some subfolders."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {path: local.read_bytes() for path, local in files.items() if path.split("/")[0] not in left_out}


def as_sent(folder, repo_id, *left_out):
    """The same as it is to arrive: the card names the repository, and the report of a build has that card's hash."""
    files = here(folder, *left_out)
    card = files["README.md"].replace(b"OWNER/NAME", repo_id.encode())
    if "build_report.json" in files:
        report = json.loads(files["build_report.json"])
        old, new = report["files"]["README.md"], hashlib.sha256(card).hexdigest()
        files["build_report.json"] = files["build_report.json"].replace(old.encode(), new.encode())
    return files | {"README.md": card}


def there(repo):
    return {path: blob.data for path, blob in repo.files.items() if path != ".gitattributes"}


def test_a_model_is_private_in_one_commit_to_the_byte(hub, client, medgemma):
    report = client.run("push", medgemma, "me/model", "--tag", "v1.0", "--json").json
    repo = hub.repos["model", "me/model"]

    assert repo.private
    assert there(repo) == as_sent(medgemma, "me/model", "adapter")
    assert len(repo.commits) == 2  # the Hub's own when it was created, and this one
    assert repo.tags == {"v1.0": repo.head}
    assert report["format"] == "push/1"
    assert report["commit"] == repo.head
    assert {file["path"]: file["size"] for file in report["files"]} == {
        path: len(data) for path, data in there(repo).items()
    }
    assert [path for path in report["left_here"] if not path.startswith("adapter/")] == []
    assert len(hub.seen("GET /me/model/resolve/")) == len(report["files"])  # every file was read back


def test_a_pulled_model_is_the_one_that_was_pushed(hub, client, medgemma, tmp_path):
    assert client.run("push", medgemma, "me/pulled").code == 0
    done = client.python(
        f"""
import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForImageTextToText, AutoProcessor
snapshot_download("me/pulled", local_dir={str(tmp_path / "pulled")!r})
pulled = AutoModelForImageTextToText.from_pretrained("me/pulled")
here = AutoModelForImageTextToText.from_pretrained({str(medgemma)!r})
print(all(torch.equal(a, b) for a, b in zip(pulled.parameters(), here.parameters(), strict=True)))
processor = AutoProcessor.from_pretrained("me/pulled")
local = AutoProcessor.from_pretrained({str(medgemma)!r})
print(processor.tokenizer.get_vocab() == local.tokenizer.get_vocab(), processor.chat_template == local.chat_template)
"""
    )
    shutil.rmtree(tmp_path / "pulled" / ".cache")
    (tmp_path / "pulled" / ".gitattributes").unlink()

    assert done.out.split() == ["True"] * 3, done.text[-2000:]
    assert here(tmp_path / "pulled") == as_sent(medgemma, "me/pulled", "adapter")


def test_an_adapter_alone_makes_its_base_the_merged_model(hub, client, medgemma, tiny_model):
    hub.add(MEDGEMMA, tiny_model)
    report = client.run("push", medgemma, "me/adapter", "--adapter-only", "--json").json
    done = client.python(
        f"""
import torch
from peft import AutoPeftModel, PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor
base = AutoModelForImageTextToText.from_pretrained({MEDGEMMA!r})
plain = [parameter.clone() for parameter in base.parameters()]
adapted = PeftModel.from_pretrained(base, "me/adapter").merge_and_unload()
merged = AutoModelForImageTextToText.from_pretrained({str(medgemma)!r})
def differ(some): return max((a - b).abs().max().item() for a, b in zip(some, merged.parameters(), strict=True))
print(differ(adapted.parameters()) < 1e-5, differ(plain) > 1e-3)
print(AutoProcessor.from_pretrained("me/adapter").image_processor is not None)
"""
    )

    assert done.out.split() == ["True"] * 3, done.text[-2000:]
    assert report["kind"] == "adapter"
    expected = as_sent(medgemma / "adapter", "me/adapter") | {CERTIFICATE: (medgemma / CERTIFICATE).read_bytes()}
    assert there(hub.repos["model", "me/adapter"]) == expected


def test_a_whole_model_and_an_adapter_do_not_share_a_repository(hub, client, rehearsal):
    assert client.run("push", rehearsal, "me/whole").code == 0
    done = client.run("push", rehearsal, "me/whole", "--adapter-only")

    assert done.code == 2
    assert "holds a whole model: push its adapter to a repository of its own" in done.err
    assert there(hub.repos["model", "me/whole"]) == as_sent(rehearsal, "me/whole", "adapter")


def test_a_gated_base_names_the_page_where_its_terms_are_accepted(hub, client, tiny_model):
    reader = "hf_" + "canaryOfAReaderXyZ0123456789"
    hub.users[reader] = "reader"
    hub.add("google/gated", tiny_model, gated=True)
    code = """
from dentalgemma.models.loading import LoadError, weights_folder
try:
    weights_folder("google/gated")
except LoadError as error:
    print(error)
"""
    for token in (reader, None):
        done = client.python(code, HF_TOKEN=token)
        assert "https://huggingface.co/google/gated" in done.out, done.text[-2000:]
        assert len(done.out.splitlines()) == 1


def test_a_second_push_of_the_same_content_makes_no_commit(hub, client, vqa_dataset):
    first = client.run("push", vqa_dataset, "me/twice", "--json").json
    hub.forget()
    second = client.run("push", vqa_dataset, "me/twice", "--json").json

    assert (first["committed"], second["committed"]) == (True, False)
    assert first["commit"] == second["commit"]
    assert len(hub.repos["dataset", "me/twice"].commits) == 2
    assert not hub.seen("POST|PUT")
    assert "already there at" in client.run("push", vqa_dataset, "me/twice").out


def test_a_dataset_loads_by_its_name(hub, client, vqa_dataset):
    assert client.run("push", vqa_dataset, "me/vqa").code == 0
    done = client.python(
        f"""
from datasets import load_dataset
pulled, here = load_dataset("me/vqa"), load_dataset({str(vqa_dataset)!r})
for split in here:
    print([row["row_id"] for row in pulled[split]] == [row["row_id"] for row in here[split]])
    print(pulled[split][0]["images"][0].tobytes() == here[split][0]["images"][0].tobytes())
print(pulled["train"].features == here["train"].features)
"""
    )

    assert done.out.split() == ["True"] * 7, done.text[-2000:]
    assert there(hub.repos["dataset", "me/vqa"]) == as_sent(vqa_dataset, "me/vqa")


def test_sources_whose_terms_exclude_each_other_become_configurations(hub, client, mixed):
    foreseen = client.run("push", mixed, "me/mixed", "--public", "--dry-run")
    report = client.run("push", mixed, "me/mixed", "--public", "--json").json
    done = client.python(
        """
from datasets import get_dataset_config_names, load_dataset
for name in get_dataset_config_names("me/mixed"):
    rows = [row for split in load_dataset("me/mixed", name).values() for row in split]
    print(name, {row["source"] for row in rows}, {row["license"] for row in rows}, len(rows))
"""
    )
    again = client.run("push", mixed, "me/mixed", "--public", "--json").json
    built = json.loads((mixed / "build_report.json").read_text())

    assert (again["committed"], again["commit"]) == (False, report["commit"])  # it is split alike each time
    assert "one configuration for each source" in foreseen.out
    assert report["one_configuration_per_source"]
    expected = [
        f"{source['name']} {{{source['name']!r}}} {{{source['license']!r}}} {source['rows']}"
        for source in built["sources"]
    ]
    assert done.out.splitlines() == expected, done.text[-2000:]
    assert not hub.repos["dataset", "me/mixed"].private
    assert {path.split("/")[1] for path in there(hub.repos["dataset", "me/mixed"]) if path.startswith("data/")} == {
        "first",
        "second",
    }


def test_cards_name_the_repository_that_they_lie_in(hub, client, medgemma, vqa_dataset, mixed):
    said = {}
    for folder, repo, *options in [
        (medgemma, "me/named"),
        (medgemma, "me/named-lora", "--adapter-only"),
        (vqa_dataset, "me/named-vqa"),
        (mixed, "me/named-mixed"),
    ]:
        assert client.run("push", folder, repo, *options).code == 0
        kind = "model" if folder is medgemma else "dataset"
        said[repo] = hub.repos[kind, repo].files["README.md"].data.decode()

    for repo, card in said.items():
        assert re.search(rf'"{repo}"', card), card
        assert "OWNER/NAME" not in card
    assert "OWNER/NAME" in (vqa_dataset / "README.md").read_text()  # which stays as it was
    code = [
        re.search(r"```python\n(.*?)```", card, re.DOTALL)[1] for card in (said["me/named-vqa"], said["me/named-mixed"])
    ]
    done = client.python("\n".join([*code, "print(len(rows) > 0)"]))
    assert done.out.split()[-1] == "True", done.text[-2000:]


def test_the_snippet_of_a_pulled_model_card_runs(hub, client, medgemma, tmp_path):
    assert client.run("push", medgemma, "me/snippet").code == 0
    card = hub.repos["model", "me/snippet"].files["README.md"].data.decode()
    code = next(code for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "from_pretrained" in code)
    Image.new("RGB", (64, 64)).save(tmp_path / "image.png")
    for name in set(re.findall(r'"([^"]+\.(?:png|jpg|jpeg))"', code)):
        code = code.replace(name, str(tmp_path / "image.png"))
    done = client.python(code.replace('device_map="auto"', 'device_map="cpu"'))

    assert done.code == 0, done.text[-3000:]
    assert done.out
    assert hub.seen("HEAD /me/snippet/resolve/|GET /me/snippet/resolve/")


def test_permission_is_stated_in_card_and_commit(hub, client, mixed, vqa_dataset):
    name = json.loads((vqa_dataset / "build_report.json").read_text())["sources"][0]["name"]
    assert client.run("push", vqa_dataset, "me/agreed", "--permission", name).code == 0
    card = hub.repos["dataset", "me/agreed"].files["README.md"].data.decode()
    stated = "Whoever published this states that the owners of these sources agreed to it: "
    commit = json.loads(hub.seen("POST /api/datasets/me/agreed/commit/")[0].body.splitlines()[0])["value"]

    assert card.endswith(f"\n## Permissions\n\n{stated}{name.replace('_', chr(92) + '_')}.\n")
    assert commit["description"].startswith(stated)
    assert client.run("push", vqa_dataset, "me/unstated").code == 0  # the control
    assert "## Permissions" not in hub.repos["dataset", "me/unstated"].files["README.md"].data.decode()


def test_what_no_build_wrote_stays_here_of_a_mixed_dataset_too(hub, client, mixed, tmp_path):
    folder = shutil.copytree(mixed, tmp_path / "vqa")
    (folder / "ana_perez.txt").write_text("a note")
    before = sorted(tmp_path.iterdir())
    report = client.run("push", folder, "me/mixed-note", "--json").json

    assert report["left_here"] == ["ana_perez.txt"]
    assert "ana_perez.txt" not in there(hub.repos["dataset", "me/mixed-note"])
    assert sorted(tmp_path.iterdir()) == before  # nor is the copy that was sent left beside it


def test_a_space_is_created_as_one(hub, client, tmp_path):
    write_space(tmp_path / "space", "me/model")
    (tmp_path / "space" / "__pycache__").mkdir()
    (tmp_path / "space" / "__pycache__" / "app.pyc").write_bytes(b"\0")
    report = client.run("push", tmp_path / "space", "me/demo", "--json").json
    repo = hub.repos["space", "me/demo"]

    assert repo.created["sdk"] == "gradio"
    assert repo.private
    assert there(repo) == here(tmp_path / "space", "__pycache__")
    assert report["left_here"] == ["__pycache__/"]


def test_it_is_made_public_after_everything_was_read_back(hub, client, vqa_dataset):
    assert client.run("push", vqa_dataset, "me/shown", "--public").code == 0
    order = [f"{request.method} {request.path}" for request in hub.requests]

    assert not hub.repos["dataset", "me/shown"].private
    assert hub.repos["dataset", "me/shown"].created["visibility"] == "private"
    settings = order.index("PUT /api/datasets/me/shown/settings")
    assert settings > max(place for place, asked in enumerate(order) if "/resolve/" in asked)


def test_what_is_public_stays_so_only_when_asked(hub, client, vqa_dataset):
    hub.add("me/open", repo_type="dataset")
    refused = client.run("push", vqa_dataset, "me/open")

    assert refused.code == 2
    assert "is public: say --public, or take another name" in refused.err
    assert not hub.seen("POST|PUT")
    assert client.run("push", vqa_dataset, "me/open", "--public").code == 0


def test_a_private_repository_becomes_public_with_no_new_commit(hub, client, vqa_dataset):
    assert client.run("push", vqa_dataset, "me/later").code == 0
    foreseen = client.run("push", vqa_dataset, "me/later", "--public", "--dry-run").out  # all of it was checked
    report = client.run("push", vqa_dataset, "me/later", "--public", "--json").json
    repo = hub.repos["dataset", "me/later"]

    assert (repo.private, len(repo.commits), report["committed"], report["read_back"]) == (False, 2, False, True)
    assert "what was private in this repository becomes public with it" in foreseen


def test_a_dry_run_lists_everything_and_sends_nothing(hub, client, vqa_dataset):
    done = client.run("push", vqa_dataset, "me/new", "--dry-run", "--tag", "v1")

    assert done.code == 0
    for path, data in as_sent(vqa_dataset, "me/new").items():
        assert re.search(rf"^ ?{re.escape(path)} +{len(data):,} +new", done.out, re.MULTILINE), path
    assert "dataset, private" in done.out
    assert "Licence: apache-2.0" in done.out
    assert "would be created" in done.out
    assert {request.method for request in hub.requests} == {"GET"}
    assert ("dataset", "me/new") not in hub.repos


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        pytest.param({"HF_TOKEN": None}, "there is no token", id="no token"),
        pytest.param({"HF_TOKEN": "hf_" + "unknownToThisHub0123456789"}, "does not accept the token", id="bad token"),
    ],
)
def test_a_dry_run_does_without_the_hub(hub, client, vqa_dataset, environment, reason):
    done = client.run("push", vqa_dataset, "me/new", "--dry-run", **environment)

    assert done.code == 0
    assert "records.jsonl" in done.out
    assert reason in done.out


def test_what_loading_would_still_find_goes_and_what_people_added_stays(hub, client, vqa_dataset, tmp_path):
    theirs = ["NOTES.md", "data/example.png", "data/sub/x/train-00000-of-00001.parquet", "figures/old.png"]
    for name in ("data/train-00000-of-00002.parquet", *theirs):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"of another release")
    repo = hub.add("me/release", tmp_path, repo_type="dataset", private=True)
    foreseen = client.run("push", vqa_dataset, "me/release", "--dry-run").out
    report = client.run("push", vqa_dataset, "me/release", "--json").json

    assert report["remote"]["deleted"] == ["data/train-00000-of-00002.parquet"]
    assert report["remote"]["kept"] == [".gitattributes", *theirs]
    assert "To be deleted there: data/train-00000-of-00002.parquet\n" in foreseen
    assert there(repo) == as_sent(vqa_dataset, "me/release") | dict.fromkeys(theirs, b"of another release")
    assert len(repo.commits) == 2


@pytest.mark.parametrize("kind", ["space", "model"])
def test_a_second_push_leaves_what_people_added(hub, client, rehearsal, tmp_path, kind):
    folder = rehearsal if kind == "model" else write_space(tmp_path / "space", "me/model")
    assert client.run("push", folder, "me/second").code == 0
    repo = hub.repos[kind, "me/second"]
    theirs = dict.fromkeys(["data/example.png", "tokenizer_notes.md", "sub/model.safetensors"], Blob(b"theirs"))
    if kind == "model":
        old = {"model-00001-of-00002.safetensors": Blob(b"old"), "model.safetensors.index.json": Blob(b"old")}
    else:
        old = {}
        theirs |= {"tokenizer.json": Blob(b"theirs")}
    repo.commit({**repo.files, **theirs, **old})
    report = client.run("push", folder, "me/second", "--json").json

    assert report["remote"]["deleted"] == sorted(old)
    assert theirs.items() <= repo.files.items()


def test_a_tag_does_not_move(hub, client, vqa_dataset, tmp_path):
    repo = hub.add("me/tagged", tmp_path, repo_type="dataset", private=True)
    repo.tags["v1.0"] = repo.head
    refused = client.run("push", vqa_dataset, "me/tagged", "--tag", "v1.0")

    assert refused.code == 2
    assert "take another --tag" in refused.err
    assert not hub.seen("POST|PUT")
    assert client.run("push", vqa_dataset, "me/tagged", "--tag", "v1.1").code == 0
    assert client.run("push", vqa_dataset, "me/tagged", "--tag", "v1.1").code == 0  # the same content
    assert repo.tags == {"v1.0": repo.commits[0][0], "v1.1": repo.head}


def test_the_token_is_in_the_authorization_header_alone(hub, client, vqa_dataset, tmp_path_factory):
    hub.users[LOGIN] = "me"
    hub.stored.clear()
    home = tmp_path_factory.mktemp("login")
    (home / "token").write_text(LOGIN)
    other = Client(hub, home)
    said = [
        client.run("push", vqa_dataset, "me/secret").text,
        client.run("push", vqa_dataset, "me/secret", "--json").text,
        client.run("push", vqa_dataset, "somebody/secret").text,  # 403
        other.run("push", vqa_dataset, "me/secret", "--public", HF_TOKEN=None).text,
        other.run("push", vqa_dataset, "me/by_login", HF_TOKEN=None).text,
        client.run("push", vqa_dataset, "me/by_login", HF_TOKEN=TOKEN + "x").text,  # 401
    ]
    other.close()

    for token in (TOKEN, LOGIN):
        assert any(token in request.headers.get("authorization", "") for request in hub.requests)
        assert not any(token in text for text in said)
        for request in hub.requests:
            rest = {name: value for name, value in request.headers.items() if name != "authorization"}
            assert token not in request.path + json.dumps(rest)
            assert token.encode() not in request.body
    assert TOKEN.encode() not in b"".join(there(hub.repos["dataset", "me/secret"]).values())
    uploads = hub.seen("PUT /_lfs/")  # storage is another machine's: it gets no token
    assert uploads
    assert not any("authorization" in request.headers for request in uploads)


def test_what_was_typed_or_photographed_by_mistake_reaches_nobody(hub, client, tmp_path):
    folder = write_space(tmp_path / "space", "me/model")
    said = []
    for name, content in {
        "settings.yaml": f"hub_token: {TYPED}\n".encode(),
        "facts.json": json.dumps({"command": ["push", TYPED]}).encode(),
        "sample.jpg": with_metadata(picture("L", 1), "JPEG", 1, {}),
    }.items():
        (folder / name).write_bytes(content)
        done = client.run("push", folder, "me/canary", "--public")
        assert done.code == 2
        assert name in done.err
        said.append(done.text)
        (folder / name).unlink()
    assert hub.requests == []  # refused before the Hub is asked at all
    (folder / ".env").write_text(f"HF_TOKEN={TYPED}")
    said.append(client.run("push", folder, "me/canary", "--public").text)

    assert there(hub.repos["space", "me/canary"]) == as_sent(folder, "me/canary", ".env")
    assert "Left here: .env" in said[-1]
    sent = b"".join(request.body for request in hub.requests)
    for secret in (TYPED, TYPED[3:], CANARY.decode()):
        assert not any(secret in text for text in said)
        assert secret.encode() not in sent


def test_what_names_a_patient_is_not_in_a_pushed_dataset(hub, client, tmp_path_factory, tmp_path):
    root = tmp_path_factory.mktemp(PATIENT)
    for number in range(24):
        (root / f"{PATIENT}_{number}.jpg").write_bytes(with_metadata(picture("L", number, (80, 40)), "JPEG", 1, {}))
        (root / f"{PATIENT}_{number}.txt").write_text(f"{number % 3} .{2 + number % 6} .3 .1 .1\n")
    source = {"name": "s", "reader": "yolo", "root": str(root), "images": ".", "labels": ".", "license": "CC-BY-4.0"}
    source |= {"modality": "panoramic", "classes": {0: "caries", 1: "infection", 2: "impacted_tooth"}}
    (root / "sources.yaml").write_text(yaml.safe_dump({"questions": {"cap": 1}, "sources": [source]}))
    folder = tmp_path_factory.mktemp("out") / "vqa"
    build_vqa(load_sources(root / "sources.yaml"), folder, progress=False)
    assert client.run("push", folder, "me/patients").code == 0
    for path, data in there(hub.repos["dataset", "me/patients"]).items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(data)

    assert any(CANARY in path.read_bytes() for path in root.glob("*.jpg"))  # it was there to be found
    found = [place for place, data in all_bytes(tmp_path) if CANARY in data or PATIENT.encode() in data]
    assert found == []
