import base64
import csv
import hashlib
import io
import json
import os
import random
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from PIL import Image

from data_builders.images import measure
from dentalgemma.evaluation.mmoral import HUB_FILES, HUB_REPO, MD5, download, import_questions
from dentalgemma.evaluation.questions import EvaluationError, check_images, load_questions

CLOSED = ("index", "image", "question", "option1", "option2", "option3", "option4", "answer", "category")
OPEN = ("index", "image", "question", "answer", "category")


def encode(colour, kind="JPEG", size=(40, 24)):
    """A picture as the benchmark holds it; 24 x 40 pixels of one colour are longer than 64 characters."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


RED, BLUE = encode("red"), encode("blue")
ROW = ("0", RED, "What is seen?", "Caries", "Cyst", "None", "nan", "B", "Teeth")


def write(path, columns, *rows):
    """As pandas writes a TSV: only what needs it is quoted."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([columns, *rows])
    return path


def read(folder, *files):
    summary = import_questions(files, folder / "q.jsonl", allow_other_md5=True)
    return summary, load_questions(folder / "q.jsonl")


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """The shape of the benchmark: 100 images, 491 closed questions with 38 empty options, 32 of them right, 578 open.

    In the second file an image stands once, and the other rows name the row that has it.
    """
    folder = tmp_path_factory.mktemp("mmoral")
    draw = random.Random(0)
    images = [encode((number, 2 * number, 255 - number)) for number in range(100)]
    closed = []
    for number in range(491):
        answer = draw.randrange(4)
        options = [f"{number} of {letter}" for letter in "ABCD"]
        if number < 38:
            options[answer if number < 32 else answer - 1] = ""
        category = draw.choice(["Teeth", "Patho", "HisT", "Jaw", "SumRec", "Teeth,Patho"])
        closed.append(
            (number, images[number % 100], f'The "dominant" one? {number}', *options, "ABCD"[answer], category)
        )
    open_ones = []
    for number in range(578):
        cell = images[number] if number < 100 else str(number % 100)
        open_ones.append((number, cell, f"Describe {number}", f"Line one\nline two\tof {number}", "Report"))
    files = write(folder / "closed.tsv", CLOSED, *closed), write(folder / "open.tsv", OPEN, *open_ones)
    return folder, files, read(folder, *files)


def test_the_benchmark_is_imported_whole_with_its_holes(benchmark):
    _, _, (summary, items) = benchmark

    expected = {"closed": 491, "open": 578, "images": 100, "empty_options": 38, "unanswerable": 32}
    assert {name: summary[name] for name in expected} == expected
    assert summary["ceiling"] == pytest.approx(459 / 491)
    assert f"{summary['ceiling']:.2%}" == "93.48%"
    assert len(items) == len({item.item_id for item in items}) == 1069
    assert sum(item.answerable for item in items if item.kind == "closed") == 459
    assert summary["categories"]["Report"] == 578
    assert {item.modality for item in items} == {"panoramic"}


def test_nothing_is_lost_of_a_cell(benchmark):
    _, _, (_, items) = benchmark
    by_id = {item.item_id: item for item in items}

    assert by_id["closed-490"].question == 'The "dominant" one? 490'
    assert by_id["open-577"].answer == "Line one\nline two\tof 577"
    assert list(by_id["closed-0"].options.values()).count("") == 1


def test_an_image_is_there_once_with_the_bytes_it_had(benchmark):
    folder, _, (_, items) = benchmark

    files = list((folder / "q_images").iterdir())
    assert len(files) == 100
    check_images(items)
    for item in items[:3]:
        assert measure(item.image).image_id == item.image_id
        assert item.image.name == f"{item.image_id[:16]}.jpg"
    first = encode((0, 0, 255))
    assert {item.image.read_bytes() for item in items if item.item_id in ("closed-0", "open-0", "open-500")} == {
        base64.b64decode(first)
    }


def test_repeated_it_writes_the_same_bytes(benchmark, tmp_path):
    folder, files, _ = benchmark
    read(tmp_path, *files)

    for name in ("q.jsonl", "q.source.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q.jsonl", "q.source.json", "q_images"]


def test_an_option_that_says_none_or_nan_says_so(tmp_path):
    _, (item,) = read(tmp_path, write(tmp_path / "c.tsv", CLOSED, ROW))

    assert item.options == {"A": "Caries", "B": "Cyst", "C": "None", "D": "nan"}
    assert item.answerable


def test_columns_may_be_letters_and_the_number_of_options_is_theirs(tmp_path):
    columns = ("index", "question", "A", "B", "C", "D", "E", "answer", "category", "image")
    path = write(tmp_path / "c.tsv", columns, ("x7", "?", "1", "2", "3", "4", "NA", "E", "['Teeth', 'Patho']", BLUE))
    _, (item,) = read(tmp_path, path)

    assert (item.item_id, item.options["E"], item.categories) == ("closed-x7", "NA", ("Teeth", "Patho"))


def test_an_image_may_stand_in_a_list_or_be_that_of_a_later_row(tmp_path):
    png = encode("red", "PNG")
    rows = [("0", "2", "?", "!", "Jaw"), ("1", json.dumps([RED]), "?", "!", "Jaw"), ("2", BLUE, "?", "!", "Jaw")]
    _, items = read(tmp_path, write(tmp_path / "o.tsv", OPEN, *rows, ("3", png, "?", "", "")))

    assert items[0].image == items[2].image != items[1].image
    assert items[3].image.suffix == ".png"
    assert items[3].categories == () and not items[3].answerable


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        pytest.param("closed", [("index", "image", "question", "A", "B", "answer", "category")], id="closed"),
        pytest.param("open", [OPEN], id="open"),
    ],
)
def test_another_md5_is_refused_and_where_allowed_it_is_not_called_the_benchmark(tmp_path, name, rows):
    row = ("0", RED, "?", "x", "y", "A", "Jaw") if name == "closed" else ("0", RED, "?", "A", "Jaw")
    path = write(tmp_path / "t.tsv", rows[0], row)
    own = hashlib.md5(path.read_bytes()).hexdigest()

    with pytest.raises(EvaluationError, match=f"its MD5 is {own}, and that of the {name} questions .* is {MD5[name]}"):
        import_questions([path], tmp_path / "q.jsonl")
    assert not (tmp_path / "q.jsonl").exists()

    summary, (item,) = read(tmp_path, path)
    (source,) = json.loads((tmp_path / "q.source.json").read_text())["files"]
    assert source == summary["files"][0]
    assert (source["md5"], source["recognised"], source["name"]) == (own, False, "t.tsv")
    assert item.source == "not MMOral-Bench: t.tsv"


def test_a_recognised_file_is_the_benchmark(tmp_path, monkeypatch):
    """The real one cannot be shipped: its sum is put in the place of the published one."""
    path = write(tmp_path / "c.tsv", CLOSED, ROW)
    monkeypatch.setitem(MD5, "closed", hashlib.md5(path.read_bytes()).hexdigest())
    summary = import_questions([path], tmp_path / "q.jsonl")

    assert summary["files"][0]["recognised"]
    assert load_questions(tmp_path / "q.jsonl")[0].source == "MMOral-Bench"
    assert MD5["open"] == "d328b1b527ef7467b328d8b35d5f8155"


def changed(**cells):
    return tuple(cells.get(column, cell) for column, cell in zip(CLOSED, ROW, strict=True))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        pytest.param(changed(image="%" * 80), r"c\.tsv:3: image is not base64", id="no base64"),
        pytest.param(
            changed(image=base64.b64encode(b"x" * 80).decode()), r"c\.tsv:3: the image is not an", id="no image"
        ),
        pytest.param(changed(image=RED[:200]), r"c\.tsv:3: ", id="half an image"),
        pytest.param(changed(image=""), r"c\.tsv:3: a row without an image", id="an empty image"),
        pytest.param(changed(image="99"), r"c\.tsv:3: the image is that of row '99', which has none", id="of no row"),
        pytest.param(changed(image="1"), r"which has none of its own", id="of itself"),
        pytest.param(changed(image=json.dumps([RED, BLUE])), r"c\.tsv:3: 2 images", id="two images"),
        pytest.param(changed(answer=""), r"c\.tsv:3: the right letter is missing", id="no letter"),
        pytest.param(changed(answer="E"), r"c\.tsv:3: answer 'E' is not among A, B, C, D", id="no such letter"),
        pytest.param(changed(answer="Cyst"), r"answer 'Cyst' is not among", id="a text for a letter"),
        pytest.param(changed(question=" "), r"c\.tsv:3: a row without a question", id="no question"),
        pytest.param(changed(index=""), r"c\.tsv:3: a row without an index", id="no index"),
        pytest.param(changed(index="0"), r"c\.tsv:3: index 0 comes twice; it was .*c\.tsv:2 before", id="index twice"),
        pytest.param(("1", RED, "?"), r"c\.tsv:3: 3 cells under 9 column names", id="too short a row"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_by_its_line(tmp_path, row, reason):
    row = row if row[0] != "0" or "twice" in reason else ("1", *row[1:])
    path = write(tmp_path / "c.tsv", CLOSED, ROW, row)

    with pytest.raises(EvaluationError, match=reason):
        read(tmp_path, path)
    assert not (tmp_path / "q.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", r"t\.tsv:1: there is no column index, image"),
        (b"index\timage\tquestion\tanswer\tcategory\n", "no row below the column names"),
        (b"index\timage\tquestion\tanswer\tcategory\tanswer\n", "column answer comes twice"),
        (b"index\timage\tquestion\toption1\toption3\tanswer\tcategory\n", "the option columns are option1, option3"),
        (b'index\timage\tquestion\tanswer\tcategory\n0\t\t"?\t!\tJaw\n1\t\t?\t!\tJaw\n', r"t\.tsv:2: a quotation mark"),
        ("index".encode("utf-16"), "cannot be read"),
    ],
)
def test_a_file_that_is_no_benchmark_is_one_error(tmp_path, content, reason):
    (tmp_path / "t.tsv").write_bytes(content)

    with pytest.raises(EvaluationError, match=reason):
        read(tmp_path, tmp_path / "t.tsv")


def test_a_missing_file_no_file_and_one_file_twice_are_errors(tmp_path):
    path = write(tmp_path / "c.tsv", CLOSED, ROW)

    with pytest.raises(EvaluationError, match=r"none\.tsv: cannot be read: No such file"):
        read(tmp_path, tmp_path / "none.tsv")
    with pytest.raises(EvaluationError, match="no file to import"):
        read(tmp_path)
    with pytest.raises(EvaluationError, match="closed-0 comes twice"):
        read(tmp_path, path, path)


@pytest.mark.parametrize("revision", ["main", "v1.0", "abc1234", "", "A" * 40])
def test_a_revision_that_can_move_is_refused(tmp_path, revision):
    with pytest.raises(EvaluationError, match="is not a commit; a branch or tag can move"):
        download(HUB_REPO, revision, tmp_path)


class Hub(BaseHTTPRequestHandler):
    """A Hub with one data set at one commit."""

    commit, content = "0123456789abcdef0123456789abcdef01234567", {name: name.encode() for name in HUB_FILES}

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.wfile.write(self.answer())

    def answer(self):
        repo, _, revision, name = self.path.removeprefix("/datasets/").rsplit("/", 3)
        body = self.content.get(name) if (repo, revision) == (HUB_REPO, self.commit) else None
        self.send_response(200 if body else 404)
        self.send_header("ETag", f'"{hashlib.sha256(body or b"").hexdigest()}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("X-Error-Code", "" if body else "EntryNotFound")
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        return body or b""

    def log_message(self, *arguments):
        pass


def test_the_files_of_a_commit_come_from_the_hub(tmp_path):
    """In a process of its own: the Hub's address is read when its client is imported."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "import sys\nfrom pathlib import Path\nfrom dentalgemma.evaluation.mmoral import *\n"
        "for revision in sys.argv[2:]:\n"
        "    try:\n        print(*(path.read_text() for path in download(HUB_REPO, revision, Path(sys.argv[1]))))\n"
        "    except EvaluationError as error:\n        print('ERROR', error)\n"
        "print('torch' in sys.modules)"
    )
    environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    command = [sys.executable, "-c", code, str(tmp_path / "files"), Hub.commit, "f" * 40]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    server.shutdown()

    assert done.returncode == 0, done.stderr
    there, absent, torch = done.stdout.splitlines()
    assert there == " ".join(HUB_FILES)
    assert absent.startswith(f"ERROR {HUB_REPO}@ffffffff: {HUB_FILES[0]} cannot be downloaded: ")
    assert torch == "False"
