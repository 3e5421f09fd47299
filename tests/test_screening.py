"""What must not be uploaded is found in every kind of file, what may be raises no alarm, and no token is ever shown."""

import base64
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_metadata import picture, with_metadata

from dentalgemma.publishing import screening
from dentalgemma.publishing.screening import screen

# None of these is anybody's: made of a fixed seed, and put together here so that no scanner takes this file for a leak.
LETTERS = "".join(random.Random(7).choices("abcdefghijkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789", k=60))
HF = "hf_" + LETTERS[:34]
TOKENS = {
    "Hugging Face": HF,
    "OpenAI": "sk-" + "proj-" + LETTERS[:40] + "7",
    "Anthropic": "sk-" + "ant-api03-" + LETTERS[:40] + "7",
    "GitHub": "ghp" + "_" + LETTERS[:36],
    "GitHub, fine-grained": "github_" + "pat_" + LETTERS[:50],
    "GitLab": "glpat" + "-" + LETTERS[:20],
    "AWS": "AKIA" + "ABCDEFGH23456789",
    "W&B": "WANDB_API_KEY=" + "0123456789abcdef" * 2 + "01234567",
    "key": "-----BEGIN RSA " + "PRIVATE KEY-----",
    "PGP": "-----BEGIN PGP " + "PRIVATE KEY BLOCK-----",
    "W&B, new": "wandb_" + "v1_" + LETTERS[:40],
    "Kaggle, new": "KGAT" + "_" + "0123456789abcdef" * 2,
    "AWS, secret": "AWS_SECRET_ACCESS_KEY=" + LETTERS[:40],
    "web token": ".".join(["eyJ" + LETTERS[:20], "eyJ" + LETTERS[:30], LETTERS[:43]]),
    "Google": "ya29" + "." + LETTERS[:40],
    "Google, client": "GOCSPX" + "-" + LETTERS[:28],
    "Stripe": "sk" + "_live_" + LETTERS[:24],
    "Groq": "gsk" + "_" + LETTERS[:52],
    "NVIDIA": "nvapi" + "-" + LETTERS[:60],
    "Slack": "xapp" + "-1-" + LETTERS[:30],
    "Slack, hook": "hooks.slack.com/" + "services/T00000000/B00000000/" + LETTERS[:24],
    "Azure": "AccountKey=" + LETTERS + LETTERS[:26] + "==",
}
HEX = "0123456789abcdef" * 3
# Settings in a text, told by what stands around the key.
SETTINGS = {
    "W&B": f"wandb_api_key: {HEX[:40]}",
    "Kaggle": f"kaggle_key = '{HEX[:32]}'",
    "kaggle.json": f'{{"username": "jane", "key": "{HEX[:32]}"}}',
    "AWS": f"aws_secret_access_key = {LETTERS[:40]}",
    "netrc": f"machine api.wandb.ai login user password {HEX[:40]}",
    "URL": f"git clone https://jane:{LETTERS[:12]}@huggingface.co/me/x",
}
ENCODED = {
    "JSON": "\\u0068" + HF[1:],
    "HTML": HF.replace("_", "&#95;"),
    "HTML, by name": HF.replace("_", "&lowbar;"),
    "URL": HF.replace("_", "%5F"),
    "base64": base64.b64encode(f"token: {HF}".encode()).decode(),
    "base64 of URLs": base64.urlsafe_b64encode(f"~~~??? {HF}".encode()).decode(),
}


def screened(tmp_path, name, content):
    path = tmp_path / "file"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return screen({name: path})


def refused(tmp_path, name, content, *words):
    """The one objection, which names the file and has these words."""
    found = screened(tmp_path, name, content)
    assert len(found) == 1, found
    assert found[0].startswith(f"{name}:")
    assert all(word in found[0] for word in words), found[0]
    assert "\n" not in found[0]
    return found[0]


def screen_folder(folder):
    return screen({p.relative_to(folder).as_posix(): p for p in Path(folder).rglob("*") if p.is_file()})


def png(color=9, **save):
    buffer = io.BytesIO()
    Image.new("L", (24, 16), color).save(buffer, "PNG", **save)
    return buffer.getvalue()


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def safetensors(metadata=None, numbers=b"\0" * 8):
    header = {"w": {"dtype": "U8", "shape": [len(numbers)], "data_offsets": [0, len(numbers)]}}
    text = json.dumps(header | ({"__metadata__": metadata} if metadata else {})).encode()
    return struct.pack("<Q", len(text)) + text + numbers


def parquet(**columns):
    buffer = io.BytesIO()
    metadata = columns.pop("metadata", None)
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("token", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda token: ("notes.md", f"# Notes\n\nuse {token} here"), id="text"),
        pytest.param(lambda token: ("a.json", json.dumps({"a": {"key": token}})), id="JSON"),
        pytest.param(
            lambda token: ("w.safetensors", safetensors(numbers=b"\1\2" + token.encode() + b"\xff")), id="weights"
        ),
        pytest.param(lambda token: ("w.safetensors", safetensors({"by": token})), id="header of weights"),
        pytest.param(lambda token: ("d.parquet", parquet(a=["x", f"see {token}"])), id="parquet"),
        pytest.param(lambda token: ("tokenizer.json", json.dumps({"vocab": {token: 1}})), id="vocabulary"),
    ],
)
def test_a_token_is_found_wherever_it_stands_and_never_shown(tmp_path, token, wrap):
    found = screened(tmp_path, *wrap(token))

    assert found and all("token or a key" in sentence for sentence in found)
    assert not any(token[size : size + 8] in sentence for sentence in found for size in range(0, len(token) - 8, 4))


def test_a_token_across_two_pieces_of_a_big_file_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(screening, "PIECE", 5000)
    content = bytearray(safetensors(numbers=bytes(20_000)))
    content[4_990 : 4_990 + len(HF)] = HF.encode()

    assert "token" in refused(tmp_path, "w.safetensors", bytes(content))
    assert screened(tmp_path, "w.safetensors", safetensors(numbers=bytes(20_000))) == []


@pytest.mark.parametrize("secret", [*SETTINGS.values(), *ENCODED.values()], ids=[*SETTINGS, *ENCODED])
def test_keys_told_by_their_setting_and_tokens_in_other_letters_are_found_by_their_line(tmp_path, secret):
    sentence = refused(tmp_path, "notes.txt", f"one\ntwo\nthree {secret}\n", "notes.txt:3: ", "a token or a key")
    refused(tmp_path, "d.parquet", parquet(a=["x", f"see {secret}"]), "a token or a key")

    assert not any(part in sentence for part in (LETTERS[:8], HF[4:12], HEX[:8], secret[-12:-4]))


def test_every_byte_that_was_looked_into_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(screening, "PIECE", 100)
    contents = {
        "a.md": b"text",
        "b.png": png(),
        "w.safetensors": safetensors(numbers=b"\1" * 500),
        "t.json": HF.encode(),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    told = []
    screen({name: tmp_path / name for name in contents}, advance=told.append)

    assert sum(told) == sum(map(len, contents.values()))
    assert len(told) > len(contents)


@pytest.mark.parametrize(
    "text",
    [
        "hf_model_name_or_path, hf_hub_download, tfhf_abcdefghijklmnopqrst",
        "task-specific-language-model-for-dentistry, ask-the-patient-where-it-hurts-1",
        "sk-learn-is-a-library-without-digits-here",
        "git commit 0123456789abcdef0123456789abcdef01234567",  # 40 hex digits alone are any hash
        "WANDB_API_KEY, set with `export WANDB_API_KEY=...`",
        "wandb_api_key: ${{ secrets.WANDB }}, kaggle_key: none, https://user:password@host/x, ssh://git@host:22/x",
        '{"username": "jane", "key": "value"}, machine learning login page password reset',
        "eyJhbGciOiJIUzI1NiJ9 begins a web token, ya29.x, gsk_short, https://example.org:8080/a@b",
        "f3c6d1a9" * 8 + " " + "c29tZSBoYXJtbGVzcyB0ZXh0IHdpdGhvdXQgYW55IGtleQ==",
    ],
)
def test_what_only_resembles_a_token_is_let_pass(tmp_path, text):
    assert screened(tmp_path, "README.md", text) == []


SECRETS_OF_THIS_MACHINE = """
import sys
from pathlib import Path
from dentalgemma.publishing.screening import screen
print(screen({"a.md": Path(sys.argv[1]), "b.md": Path(sys.argv[2]), "c.md": Path(sys.argv[3])}))
"""


def test_this_machines_own_tokens_are_known_whatever_they_look_like(tmp_path):
    home = tmp_path / "hf"
    home.mkdir()
    (home / "token").write_text("canary-of-the-login-file")
    (home / "stored_tokens").write_text("[main]\nhf_token = canary-of-stored-tokens\nrefresh_token = x\n")
    texts = ["canary-of-the-environment", "canary-of-the-login-file", "refresh_token, canary-of-stored-tokens"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}").write_text(f"say {text}!")
    environment = {**os.environ, "HF_HOME": str(home), "MY_TOKEN": texts[0], "HF_HUB_OFFLINE": "1"}
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
        environment.pop(name, None)
    command = [sys.executable, "-c", SECRETS_OF_THIS_MACHINE, *(str(tmp_path / f"{number}") for number in range(3))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)

    assert [f"'{name}.md:1: it holds what looks like a token" in done.stdout for name in "abc"] == [True] * 3
    assert "canary" not in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "KAGGLE_KEY", "AZURE_CREDENTIALS", "db_password"])
def test_variables_that_hold_secrets_are_known_by_their_name(tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "zaunkönig im garten")

    refused(tmp_path, "a.yaml", "one: 1\ns: zaunkönig im garten", "a.yaml:2: ", "a token or a key")
    refused(
        tmp_path, "b.html", f"data:text/plain;base64,{embedded('zaunkönig im garten'.encode())}", "a token or a key"
    )
    assert screened(tmp_path, "a.yaml", "s: zaunkönig") == []


def test_a_token_in_a_picture_in_parquet_is_found_however_the_column_is_packed(tmp_path):
    content = parquet(images=[[{"bytes": png() + HF.encode(), "path": "a.png"}]] * 3)

    found = screened(tmp_path, "d.parquet", content)
    assert any(": the column images.bytes holds what looks like a token" in sentence for sentence in found)


def test_a_token_in_a_files_name_or_path_is_not_shown_either(tmp_path):
    (found,) = screened(tmp_path, f"data/{HF}.md", "fine")
    assert "its name holds what looks like a token" in found
    in_path = screened(tmp_path, "a.md", f"see /home/jane/{HF}/x")

    assert len(in_path) == 2
    assert not any(HF[3:9] in sentence for sentence in [found, *in_path])


@pytest.mark.parametrize(
    "name",
    [
        *("training_args.bin", "checkpoint-5/optimizer.pt", "scheduler.pt", "rng_state_0.pth", "scaler.pt"),
        *("pytorch_model.bin", "a.pkl", "b.ckpt", "data/c.PTH", "optimizer.safetensors"),
        *(
            ".env",
            ".env.local",
            ".netrc",
            "token",
            "id_rsa",
            "id_ed25519",
            "server.pem",
            "kaggle.json",
            "stored_tokens",
        ),
    ],
)
def test_names_of_training_state_and_secrets_are_refused_whatever_is_in_them(tmp_path, name):
    refused(tmp_path, name, safetensors() if name.endswith("safetensors") else "plain text", "its name says")


@pytest.mark.parametrize("name", ["environment.yml", "tokenizer_config.json", "tokens.md", "optimizers.md", "keys.txt"])
def test_names_that_only_resemble_those_pass(tmp_path, name):
    assert screened(tmp_path, name, "plain text") == []


def torch_file(first="archive/data.pkl"):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(first, pickle.dumps({"a": 1}))
        archive.writestr("archive/data/0", b"\0" * 64)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        *(pytest.param(pickle.dumps({"a": [1, 2, "x"]}, protocol=n), id=f"protocol {n}") for n in range(6)),
        pytest.param(pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + pickle.dumps(1001, protocol=2), id="old torch"),
        pytest.param(torch_file(), id="torch"),
        pytest.param(pickle.dumps(os.getcwd, protocol=0), id="a function"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "notes.txt", "weights"])
def test_a_pickle_is_known_by_its_content(tmp_path, content, name):
    refused(tmp_path, name, content, "pickle", "safetensors")


PATHS = {
    "a home": "/home/jane/scans",
    "of a Mac": "/Users/jane/Desktop/opg",
    "root's": "/root/.cache/x",
    "a volume": "/mnt/data1/clinic",
    "temporary": "/tmp/tmpab12/x",
    "Windows": r"C:\Users\jane\scans",
    "another drive": r"D:\dental\scans",
    "an address": "file:///srv/clinic/x.png",
    "Windows with slashes": "C:/Users/jane/x",
}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda path: ("a.md", f"one\ntwo from {path}"), id="prose"),
        pytest.param(lambda path: ("a.yaml", f"one: 1\nroot: {path}"), id="YAML"),
        pytest.param(lambda path: ("a.json", '{"a": 1,\n"root": ' + json.dumps(path) + "}"), id="JSON"),
        pytest.param(
            lambda path: ("a.json", '{"a": 1,\n"root": ' + json.dumps(path).replace("/", "\\/") + "}"), id="\\/"
        ),
    ],
)
def test_absolute_paths_are_found_with_their_line(tmp_path, path, wrap):
    refused(tmp_path, *wrap(path), ":2: it holds a path of this or another machine")


def test_a_text_too_long_to_be_held_is_read_in_pieces_and_its_lines_still_count(tmp_path, monkeypatch):
    monkeypatch.setattr(screening, "WHOLE", 3000)
    text = "an innocent line\n" * 400 + "from /home/jane/x\n" + "zähne und mehr\n" * 300

    refused(tmp_path, "a.md", text, ":401: it holds", "/home/jane/x")
    assert screened(tmp_path, "a.md", text.replace("/home/jane/", "home/jane/")) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("w.safetensors", safetensors({"base": "/cluster/jane/base"}), id="header of weights"),
        pytest.param("d.parquet", parquet(a=["fine", "read from /home/jane/x"]), id="column"),
        pytest.param("d.parquet", parquet(a=["/vol7/jane/x"]), id="column that is a path"),
        pytest.param("d.parquet", parquet(a=[[{"b": "/home/jane/x"}]]), id="deep in a column"),
        pytest.param("d.parquet", parquet(a=[1], metadata={"pandas": '{"path": "/home/jane/x"}'}), id="schema"),
        pytest.param("c.json", json.dumps({"model": "/vol7/jane/base"}), id="any root, where a value is a path"),
        pytest.param(
            "d.parquet",
            parquet(a=pa.array([[("/home/jane/x", 1)]], pa.map_(pa.string(), pa.int64()))),
            id="key of a map",
        ),
        pytest.param(
            "d.parquet",
            parquet(a=pa.array([[("x", "/home/jane/x")]], pa.map_(pa.string(), pa.string()))),
            id="value of a map",
        ),
    ],
)
def test_paths_are_found_in_structured_files(tmp_path, name, content):
    refused(tmp_path, name, content, "path of this or another machine")


def test_what_is_written_about_a_column_of_parquet_is_looked_into(tmp_path):
    inner = pa.field("b", pa.string(), metadata={"note": f"from {HF}"})
    for kind in (pa.struct([inner]), pa.list_(inner)):
        buffer = io.BytesIO()
        pq.write_table(
            pa.table([pa.nulls(1, kind)], schema=pa.schema([pa.field("a", kind)])), buffer, compression="zstd"
        )
        found = screened(tmp_path, "d.parquet", buffer.getvalue())
        assert any("in its metadata, it holds what looks like a token" in sentence for sentence in found), found


OTHER_ROOTS = [
    *(
        "/ceph/jane/x",
        "/nas/patients/x",
        "/raid/jane/x",
        "/datasets/opg/x",
        "/hpc/jane/x",
        "/u/jane/x",
        "/dss/dsshome1/x",
    ),
    *("D:/patients/x.png", r"d:\julia\x.png", r"\\server\share\x"),
]


@pytest.mark.parametrize("path", OTHER_ROOTS)
@pytest.mark.parametrize(
    "text",
    [
        *("root: {}", "- {}", "  - root: '{}'  # here", '"root": "{}"', "it was in `{}` then", 'load("{}")'),
        pytest.param("---\nlicense: mit\nroot: {}\n---\n", id="front matter"),
    ],
)
def test_paths_of_any_root_are_found_as_a_value_and_in_quotes(tmp_path, text, path):
    refused(tmp_path, "a.md", text.format(path), "path of this or another machine")


@pytest.mark.parametrize("path", ["/ceph/jane/x", "/nas/patients/x", "/raid0/jane/x", "/u/jane/x", "D:/patients/x.png"])
def test_paths_of_common_roots_are_found_in_free_text(tmp_path, path):
    refused(tmp_path, "a.md", f"It was read from {path} and then written.", "path of this or another machine")


def test_the_home_and_the_present_folder_are_known_whatever_they_are_called(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/zahnklinik/jane")
    refused(tmp_path, "a.md", "from /zahnklinik/jane", "/zahnklinik/jane")
    monkeypatch.setenv("HOME", "/elsewhere/jane")

    assert screened(tmp_path, "a.md", "from /zahnklinik/jane") == []


@pytest.mark.parametrize(
    "text",
    [
        "See https://huggingface.co/home/user and http://example.org/data/tmp/x, s3://bucket/home/x.",
        "/healthy, and/or, crown/root, 12/03/2024, 1/2, N/A, km/h, caries/infection/none",
        r"$\frac{a}{b}$, $x:\alpha$, \(A:\beta\), line \\ two",
        "data/train/x.parquet, ./data/train, ../tmp/x, ~/models/x, $HOME/data/x, {root}/home/x",
        "google/medgemma-1.5-4b-it, org/home/x",
        "{% if messages[0]['role'] == 'system' %}{{ '</start>' }}{% endif %}",
        "Q: which?\nA: none. </td></tr> <br/> #!/usr/bin/env python 2>/dev/null",
        "POST to `/v1/chat/completions` or '/api/models', see <a href='/datasets/me/x'>it</a>, [it](/datasets/me/x)",
        "`/dev/null`, `/etc/hosts`, '/proc/cpuinfo', `/usr/bin/env`",
        "url: https://x.org/a/b\nratio: 1/2/3\nwhich: and/or\n- left/right\n",
        r"`\\alpha\beta`, '$x:\beta\gamma$', Q:/A:, 3:/4, ratio A:B/C",
    ],
)
@pytest.mark.parametrize("name", ["README.md", "chat_template.jinja", "rows.jsonl", "d.parquet"])
def test_what_only_resembles_a_path_is_let_pass(tmp_path, name, text):
    content = {
        "rows.jsonl": json.dumps({"text": text, "nested": json.dumps({"text": text})}) + "\n",
        "d.parquet": parquet(a=[text]),
    }
    assert screened(tmp_path, name, content.get(name, text)) == []


def test_a_vocabulary_may_hold_odd_words_but_no_other_file(tmp_path):
    words = json.dumps({"model": {"vocab": {"/home/x": 1, "/usr/local/lib": 2, "C:\\Users\\x": 3}}})

    assert screened(tmp_path, "tokenizer.json", words) == []
    assert screened(tmp_path, "words.json", words)


def embedded(content):
    return base64.b64encode(content).decode()


CARRIERS = {
    "file": lambda content: ("figures/a.png", content),
    "file by another name": lambda content: ("notes.md", content),
    "parquet": lambda content: ("d.parquet", parquet(images=[[{"bytes": content, "path": "a.png"}]])),
    "page": lambda content: ("g.html", f'<img src="data:image/png;base64,{embedded(content)}">'),
    "JSON": lambda content: ("g.json", json.dumps({"a": embedded(content)})),
    "notebook": lambda content: (
        "n.ipynb",
        json.dumps({"cells": [{"outputs": [{"data": {"image/png": embedded(content) + "\n"}}]}]}),
    ),
    "wrapped lines": lambda content: (
        "n.ipynb",
        json.dumps({"image/png": base64.encodebytes(content).decode()}),
    ),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("carrier", CARRIERS.values(), ids=CARRIERS)
def test_metadata_of_a_picture_is_found_wherever_it_lies(tmp_path, carrier, kind):
    buffer = io.BytesIO()
    picture("L", 3, (40, 24)).save(buffer, kind)
    tainted = with_metadata(picture("L", 3, (40, 24)), kind, orientation=1, options={})

    refused(tmp_path, *carrier(tainted), "more than its pixels")
    assert screened(tmp_path, *carrier(buffer.getvalue())) == []


@pytest.mark.parametrize(
    ("text", "why"),
    [
        *(
            (f"data:image/{kind};base64,HIDDEN", "neither a plain picture nor text")
            for kind in ("heic", "avif", "x-icon")
        ),
        ("data:text/plain;base64,PATH", "/home/jane/x"),
        ("data:text/html;base64,SCRIPT", "can run code"),
        ("data:image/svg+xml,%3Csvg onload=alert(1)%3E", "can run code"),
        ("data:image/jpeg;base64,QUOTED", "more than its pixels"),
        ("data:image/png;base64,PHYS", "more than its pixels"),
        ("x\\nEXIF", "more than its pixels"),
    ],
)
def test_what_a_page_embeds_is_looked_into(tmp_path, text, why):
    exif = embedded(with_metadata(picture("L", 3, (40, 24)), "JPEG", orientation=1, options={}))
    contents = {
        "HIDDEN": embedded(b"\0\0\0\x18ftypheic" + b"Exif\0\0 of Jane" * 9),
        "PATH": embedded(b"from /home/jane/x"),
        "SCRIPT": embedded(b"<script>alert(1)</script>"),
        "QUOTED": quote(exif, safe=""),
        "PHYS": quote(embedded(png()[:33] + chunk(b"pHYs", b"\xff" * 9 + b"of Jane") + png()[33:]), safe=""),
        "EXIF": exif,
    }
    assert "%2F" in contents["QUOTED"] and "%2F" in contents["PHYS"]
    for name, content in contents.items():
        text = text.replace(name, content)

    refused(tmp_path, "g.html", f"<p>\n<img src='{text}'>", "g.html:2: ", why)


def test_what_a_page_embeds_may_be_a_plain_picture_or_text(tmp_path):
    text = embedded("Zähne, caries and/or none".encode())
    page = (
        f"<img src='data:image/png;base64,{embedded(png())}'> data:text/plain;base64,{text} data:image/png;base64,AAAA"
    )

    assert screened(tmp_path, "g.html", page) == []


def test_names_of_pictures_in_parquet_have_no_folders(tmp_path):
    content = parquet(images=[[{"bytes": png(), "path": "jane_1961/a.png"}]])

    refused(tmp_path, "d.parquet", content, "name them by their content")


def test_plots_pass_as_they_are_written_here(tmp_path):
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().plot([1, 2])
    for name, metadata in (("a.png", {"Software": None}), ("b.svg", {"Date": None})):
        figure.savefig(tmp_path / name, metadata=metadata)
        assert screen({name: tmp_path / name}) == []
    for name in ("a.png", "b.svg"):
        figure.savefig(tmp_path / name)
        assert screen({name: tmp_path / name}), "with a date, or the program's name"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("<svg><script>alert(1)</script></svg>", "can run code"),
        ('<svg onload="alert(1)"/>', "can run code"),
        ("<svg><a href='javascript:alert(1)'/></svg>", "can run code"),
        ("<svg><metadata><dc:creator>Jane</dc:creator></metadata></svg>", "metadata"),
    ],
)
def test_drawings_that_act_or_tell_are_refused(tmp_path, text, why):
    refused(tmp_path, "a.svg", text, why)
    refused(tmp_path, "a.html", f'<img src="data:image/svg+xml;base64,{embedded(text.encode())}">', why)


def tiff():
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "TIFF")
    return buffer.getvalue()


def zip_file():
    return torch_file("readme.txt")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"%PDF-1.7\n...", "a PDF"),
        (b"\0" * 128 + b"DICM" + b"\0" * 50, "a DICOM file"),
        (zip_file(), "an archive"),
        (b"\x1f\x8b\x08" + b"\0" * 20, "an archive"),
        (tiff(), "a TIFF"),
        (b"GIF89a" + b"\0" * 20, "a GIF"),
        (b"\x93NUMPY\x01\0", "a NumPy file"),
        (b"\0\1\2\3" * 50, "neither UTF-8 text"),
        (b"P3\n# Jane\n1 1\n255\n1 2 3\n", "a picture in the form of text"),
        ("Karies, Zähne".encode("latin-1"), "neither UTF-8 text"),
        (b"PAR1 and no more", "cannot be read as parquet"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "cannot be told apart"),
    ],
)
def test_what_cannot_be_looked_into_is_refused_whatever_its_name(tmp_path, content, what):
    refused(tmp_path, "data.txt", content, what)


def test_bytes_in_parquet_that_are_no_picture_are_refused(tmp_path):
    refused(tmp_path, "d.parquet", parquet(blob=[pickle.dumps({"a": 1})]), "cannot be looked into")
    refused(tmp_path, "d.parquet", parquet(a=pa.array([list(png())], pa.list_(pa.uint8()))), "bytes as numbers")
    assert screened(tmp_path, "d.parquet", parquet(a=pa.array([1, 2], pa.uint8()), b=[[1, 2], [3]])) == []


@pytest.mark.parametrize(
    "text",
    ["BMI of the patient", "P1 is better than P2, P3 1", "GGUF files are for llama.cpp", "(a) first.", "cases: 3.", ""],
)
def test_texts_that_begin_like_another_format_are_texts(tmp_path, text):
    assert screened(tmp_path, "a.md", text) == []


def test_what_the_toolkit_writes_passes(vqa_dataset, instruct_dataset, tiny_model):
    for folder in (vqa_dataset, instruct_dataset, tiny_model):
        assert screen_folder(folder) == []


def test_a_hundred_thousand_rows_are_screened_at_once(tmp_path):
    rows = [f"Row {n}: in the left maxillary region and/or the right one, 1/{n}." for n in range(100_000)]

    assert screened(tmp_path, "d.parquet", parquet(a=rows)) == []
    refused(tmp_path, "d.parquet", parquet(a=[*rows, "/home/jane/x"]), "/home/jane/x")
