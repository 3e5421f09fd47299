"""What could name a patient in the input is nowhere in what was written."""

import base64
import json
import re
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_metadata import CANARY, picture, with_metadata

from data_builders.instruct import build_instruct
from data_builders.sources import load_sources
from data_builders.vqa import build_vqa
from data_builders.yolo_export import export_yolo

PATIENT = "Quetzal_Ximena_1961"
KINDS = ["JPEG", "MPO", "PNG", "WEBP", "TIFF", "BMP"]
ENDINGS = {"JPEG": "jpg", "MPO": "jpeg", "PNG": "png", "WEBP": "webp", "TIFF": "tif", "BMP": "bmp"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A YOLO source that tells who its patients are: in names, folders, metadata and lines that cannot be read."""
    root = tmp_path_factory.mktemp(f"clinic_{PATIENT}") / PATIENT
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    for number in range(24):
        kind = KINDS[number % len(KINDS)]
        name = f"{PATIENT}_{number:02}"
        image = picture("L", number, (80, 40))
        content = with_metadata(image, kind, orientation=6 if number % 8 == 0 else 1, options={})
        (root / "images" / f"{name}.{ENDINGS[kind]}").write_bytes(content)
        lines = [f"{number % 3} .{2 + number % 6} .{3 + number % 5} .1 .1", f"{number % 2} .5 .7 .1 .1"]
        (root / "labels" / f"{name}.txt").write_text(
            "\n".join(lines) + f"\n{PATIENT} is no label\n" * (number % 5 == 4)
        )
    (root / "images" / f"{PATIENT}_broken.jpg").write_bytes(CANARY)
    (root / "labels" / f"{PATIENT}_missing.txt").write_text("0 .5 .5 .1 .1\n")
    (root / "sources.yaml").write_text(
        "languages: [en, es]\nquestions: {cap: 1}\nsources:\n"
        "  - {name: s, reader: yolo, root: ., modality: panoramic, license: CC-BY-4.0,\n"
        "     classes: {0: caries, 1: infection, 2: impacted_tooth}, exhaustive: [caries, infection],\n"
        f'     group: {{pattern: "^(?P<patient>{PATIENT}_..)"}}}}\n'
    )
    return root


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "vqa"
    report = build_vqa(load_sources(source / "sources.yaml"), folder, progress=False)
    return folder, report


def all_bytes(folder) -> Iterator[tuple[str, bytes]]:
    """Every file as it lies there, every value of every parquet column, every picture inside the page."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.name, path.read_bytes()
        if path.suffix == ".parquet":
            for column in pq.read_table(path).flatten().columns:
                for leaf in leaves(column.combine_chunks()):
                    for value in leaf.unique().to_pylist():
                        yield path.name, value if isinstance(value, bytes) else str(value).encode()
        if path.suffix == ".html":
            for picture_uri in re.findall(r"base64,([A-Za-z0-9+/=]+)", path.read_text()):
                yield path.name, base64.b64decode(picture_uri)


def leaves(array) -> Iterator[pa.Array]:
    if pa.types.is_list(array.type):
        yield from leaves(array.values)
    elif pa.types.is_struct(array.type):
        for child in array.flatten():
            yield from leaves(child)
    else:
        yield array


def test_no_name_no_path_and_no_metadata_is_in_any_byte(source, built):
    folder, _ = built
    secrets = [CANARY, *CANARY.split(), PATIENT.encode(), b"clinic_", str(source).encode(), b"Exif\0\0"]
    everything = list(all_bytes(folder))

    assert {name.rpartition(".")[2] for name, _ in everything} >= {"parquet", "html", "json", "jsonl", "md", "png"}
    assert sum(content.startswith((b"\xff\xd8", b"\x89PNG", b"RIFF")) for _, content in everything) > 40
    for name, content in everything:
        for secret in secrets:
            assert secret.lower() not in content.lower(), f"{secret!r} is in {name}"


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A chat dataset of cases whose folders and files are called by their patients."""
    root = tmp_path_factory.mktemp(f"clinic_{PATIENT}") / PATIENT
    for number in range(8):
        (root / f"{PATIENT}_{number}").mkdir(parents=True)
        prompts = [f"{word} {place} for {number + 2} weeks" for word in ("pain", "ache") for place in ("here", "there")]
        cases = [{"prompt": text, "completion": "An answer.", "condition": "pulpitis"} for text in prompts]
        text = json.dumps(cases) if number % 2 else "".join(json.dumps(case) + "\n" for case in cases) + "no case\n"
        (root / f"{PATIENT}_{number}" / f"{PATIENT}.json{'' if number % 2 else 'l'}").write_text(text)
    (root / f"{PATIENT}.yaml").write_text("sources: [{name: s, reader: cases, root: .}]\n")
    folder = tmp_path_factory.mktemp("out") / "instruct"
    return folder, build_instruct(load_sources(root / f"{PATIENT}.yaml"), folder)


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "yolo"
    export = export_yolo(load_sources(source / "sources.yaml"), folder, progress=False)
    return folder, {"problems": [str(problem) for problem in export.problems]}


@pytest.mark.parametrize("name", ["chats", "exported"])
def test_no_other_builder_writes_a_name_or_a_path_either(name, source, request):
    folder, report = request.getfixturevalue(name)
    secrets = [CANARY, *CANARY.split(), PATIENT.encode(), b"clinic_", str(source).encode(), b"Exif\0\0"]
    everything = [*all_bytes(folder), *((path.name, path.name.encode()) for path in folder.rglob("*"))]

    assert len(everything) > 10
    assert PATIENT in json.dumps(report["problems"], default=str)
    for name, content in everything:
        for secret in secrets:
            assert secret.lower() not in content.lower(), f"{secret!r} is in {name}"


def test_the_search_would_have_found_them(source, built):
    """The same search over the input, and over the report that goes to the console and not into the folder."""
    _, report = built
    found = b"".join(content for _, content in all_bytes(source))

    assert found.count(CANARY) > 24
    assert PATIENT in json.dumps(report["problems"])


def test_every_kind_of_problem_is_counted_in_the_report_without_its_place(built):
    folder, report = built
    written = json.loads((folder / "build_report.json").read_text())

    assert {"bad_label_line", "image_unreadable", "image_missing", "orientation_baked"} <= set(
        written["problem_counts"]
    )
    assert "problems" not in written
    assert written["problem_counts"]["orientation_baked"] == sum(
        problem["code"] == "orientation_baked" for problem in report["problems"]
    )
    assert sum(written["problem_counts"].values()) == len(report["problems"])


def test_pictures_are_named_by_their_pixels(built):
    for row in pq.read_table(built[0] / "data").to_pylist():
        for image in row["images"]:
            assert re.fullmatch(rf"{row['image_id'][:16]}\.(jpg|png|webp)", image["path"])


def test_the_search_sees_text_that_compression_hides(tmp_path):
    table = pa.table({"images": [[{"bytes": CANARY * 50, "path": "a"}]]})
    pq.write_table(table, tmp_path / "t.parquet", compression="zstd", write_statistics=False)

    assert any(content == CANARY * 50 for _, content in all_bytes(tmp_path))
