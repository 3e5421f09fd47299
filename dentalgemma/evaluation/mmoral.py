"""MMOral-Bench: its TSV files to a questions file, with the images beside it. Light: no torch.

Columns, MD5 sums and file names are those of VLMEvalKit (`vlmeval/dataset/mmoral_opg.py`), and so is what an `image`
cell may hold (`vlmeval/dataset/image_base.py`): base64, a list with one of them, or, where it is no longer than 64
characters, the index of another row whose image is shown again. Categories are names with commas between them.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from string import ascii_uppercase

from PIL import Image

from data_builders.images import ImageError, measure
from dentalgemma.evaluation.files import write_json, write_whole
from dentalgemma.evaluation.questions import EvaluationError, Kind, Question, questions_sha256, write_questions

NAME = "MMOral-Bench"
HUB_REPO = "OralGPT/MMOral-OPG-Bench"
HUB_FILES = ("MMOral-OPG-Bench-Closed-Ended.tsv", "MMOral-OPG-Bench-Open-Ended.tsv")
MD5: Mapping[Kind, str] = {"closed": "b13cff13ffce25225d5de0efed8e53fa", "open": "d328b1b527ef7467b328d8b35d5f8155"}
LONGEST_REFERENCE = 64  # characters of an image cell that names another row
SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png"}
END = "\x00end"


@dataclass(frozen=True, slots=True)
class Source:
    """A TSV file: `options` are the columns of option A, B, … (none of open questions)."""

    path: Path
    kind: Kind
    options: tuple[str, ...]
    md5: str
    sha256: str

    @property
    def recognised(self) -> bool:
        """Whether it is the published file, byte for byte."""
        return self.md5 == MD5[self.kind]


@dataclass(slots=True)
class Pictures:
    """Writes each distinct image once, under the first half of its id, with the bytes it had."""

    folder: Path
    known: dict[bytes, tuple[str, Path]] = field(default_factory=dict)  # by the digest of the bytes

    def keep(self, content: bytes) -> tuple[str, Path]:
        """The id (SHA-256 of the pixels) and the file of an image."""
        digest = hashlib.sha256(content).digest()
        if digest not in self.known:
            image_id = measure(io.BytesIO(content)).image_id
            same = [path for known_id, path in self.known.values() if known_id == image_id]
            path = same[0] if same else self._write(image_id, content)
            self.known[digest] = image_id, path
        return self.known[digest]

    def _write(self, image_id: str, content: bytes) -> Path:
        with Image.open(io.BytesIO(content)) as image:
            suffix = SUFFIXES.get(image.format, f".{(image.format or 'image').lower()}")
        path = self.folder / f"{image_id[:16]}{suffix}"
        write_whole(path, content)
        return path


def import_questions(files: Sequence[Path], out: Path, *, allow_other_md5: bool = False) -> dict:
    """Turn the benchmark's TSV files, closed and open, into one questions file, and return what is in it.

    The images go to `<stem of out>_images`; what was read, with its hashes, to `<stem of out>.source.json`, which is
    also what is returned. Every row becomes an item, and every option stays: an empty one is empty, one that says
    "None" or "nan" says so. `ceiling` is the share of the closed questions whose right option is not empty.

    Raises:
        EvaluationError: when a file has another MD5 than the published one and `allow_other_md5` is not set, and,
            naming file and line, when a row cannot be used.
    """
    out = Path(out)
    sources = [_inspect(Path(path), allow_other_md5=allow_other_md5) for path in files]
    if not sources:
        raise EvaluationError(f"no file to import; give the TSV files of {NAME}, or its Hub id {HUB_REPO}")
    pictures = Pictures(out.with_name(f"{out.stem}_images"))
    items: dict[str, Question] = {}
    for source in sources:
        for where, item in _read_source(source, pictures):
            if item.item_id in items:
                raise EvaluationError(f"{where}: {item.item_id} comes twice; every index once, and every file once")
            items[item.item_id] = item
    if not items:
        raise EvaluationError(f"{', '.join(str(source.path) for source in sources)}: no row below the column names")
    write_questions(out, list(items.values()))
    summary = _summarise(list(items.values()), sources)
    write_json(out.with_name(f"{out.stem}.source.json"), summary)
    return summary


def _inspect(path: Path, *, allow_other_md5: bool) -> Source:
    try:
        with path.open("rb") as file:
            md5 = hashlib.file_digest(file, "md5").hexdigest()
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read: {error.strerror or error}") from None
    columns = next((cells for _, cells in _read_cells(path)), [])
    double = [name for name, number in Counter(columns).items() if number > 1]
    if double:
        raise EvaluationError(f"{path}:1: column {', '.join(double)} comes twice")
    missing = [name for name in ("index", "image", "question", "answer", "category") if name not in columns]
    if missing:
        raise EvaluationError(
            f"{path}:1: there is no column {', '.join(missing)}; {NAME} has index, image, question, answer, category "
            "with tabs between them, and option1, option2, … (or A, B, …) where the questions are closed"
        )
    options = _option_columns(columns, path)
    source = Source(path, "closed" if options else "open", options, md5, sha256)
    if not source.recognised and not allow_other_md5:
        raise EvaluationError(
            f"{path}: its MD5 is {md5}, and that of the {source.kind} questions of {NAME} is {MD5[source.kind]}: this "
            "is not the published benchmark; download it anew, or use it under another name with --allow-other-md5"
        )
    return source


def _option_columns(columns: Sequence[str], path: Path) -> tuple[str, ...]:
    for names in ([f"option{number}" for number in range(1, len(ascii_uppercase) + 1)], list(ascii_uppercase)):
        there = [name for name in names if name in columns]
        if there:
            if there != names[: len(there)] or len(there) < 2:
                raise EvaluationError(
                    f"{path}:1: the option columns are {', '.join(there)}; there should be {', '.join(names[:4])}, …"
                )
            return tuple(there)
    return ()


def _read_source(source: Source, pictures: Pictures) -> Iterator[tuple[str, Question]]:
    """Yield the items of a file; an image that is another row's is looked up once all rows were read."""
    rows: dict[str, tuple[str, dict[str, str]]] = {}
    shown: dict[str, tuple[str, Path] | str] = {}
    for where, row in _read_rows(source.path):
        index = row["index"].strip()
        if not index:
            raise EvaluationError(f"{where}: a row without an index")
        if index in rows:
            raise EvaluationError(f"{where}: index {index} comes twice; it was {rows[index][0]} before")
        shown[index] = _read_image(row.pop("image").strip(), pictures, where)
        rows[index] = where, row
    for index, (where, row) in rows.items():
        picture = shown[index]
        if picture == "":
            raise EvaluationError(f"{where}: a row without an image")
        if isinstance(picture, str):
            picture = shown.get(picture, "")
        if isinstance(picture, str):
            raise EvaluationError(f"{where}: the image is that of row {shown[index]!r}, which has none of its own")
        yield where, _make_item(source, row, index, where, picture)


def _make_item(source: Source, row: Mapping[str, str], index: str, where: str, picture: tuple[str, Path]) -> Question:
    options = {letter: row[name] for letter, name in zip(ascii_uppercase, source.options, strict=False)}
    answer = row["answer"].strip() if options else row["answer"]
    if not row["question"].strip():
        raise EvaluationError(f"{where}: a row without a question")
    if options and answer not in options:
        problem = f"answer {answer!r} is not among {', '.join(options)}" if answer else "the right letter is missing"
        raise EvaluationError(f"{where}: {problem}")
    image_id, path = picture
    return Question(
        item_id=f"{source.kind}-{index}",
        question=row["question"],
        answer=answer,
        options=options,
        image=path,
        image_id=image_id,
        question_type=source.kind,
        categories=_read_categories(row["category"]),
        modality="panoramic",
        source=NAME if source.recognised else f"not {NAME}: {source.path.name}",
        split="test",
    )


def _read_categories(cell: str) -> tuple[str, ...]:
    """The names in a cell, `Teeth,Patho` or `['Teeth', 'Patho']`, each once."""
    names = (name.strip(" \t'\"") for name in cell.strip().strip("[]").split(","))
    return tuple(dict.fromkeys(name for name in names if name))


def _read_image(cell: str, pictures: Pictures, where: str) -> tuple[str, Path] | str:
    """The image of a cell, or the index of the row that it shows again."""
    if cell.startswith("["):
        try:
            cells = json.loads(cell.replace("'", '"'))
        except ValueError as error:
            raise EvaluationError(f"{where}: image is a list that cannot be read: {error}") from None
        if len(cells) != 1 or not isinstance(cells[0], str):
            raise EvaluationError(f"{where}: {len(cells)} images, and a question has one")
        cell = cells[0].strip()
    if len(cell) <= LONGEST_REFERENCE:
        return cell
    try:
        content = base64.b64decode(re.sub(r"^data:[\w/+.-]+;base64,|\s", "", cell), validate=True)
    except (binascii.Error, ValueError) as error:
        raise EvaluationError(f"{where}: image is not base64: {error}") from None
    try:
        return pictures.keep(content)
    except (ImageError, OSError) as error:
        raise EvaluationError(f"{where}: the image {error}") from None


def _read_rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    cells = _read_cells(path)
    _, columns = next(cells)
    for where, values in cells:
        if values:  # csv's word for an empty line
            if len(values) != len(columns):
                raise EvaluationError(f"{where}: {len(values)} cells under {len(columns)} column names")
            yield where, dict(zip(columns, values, strict=True))


def _read_cells(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the records of a TSV file as texts; nothing is taken for a number or for a missing value.

    Pandas by its defaults would turn the option "None" into nothing.
    """
    before = csv.field_size_limit(2**31 - 1)  # the standard 128 KiB are less than a radiograph
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            # A quotation mark that is never closed swallows everything up to the end, this line too.
            reader = csv.reader(chain(file, [END]), delimiter="\t")
            start = 1
            for cells in reader:
                if cells == [END]:
                    return
                if cells and cells[-1].endswith(END):
                    raise EvaluationError(
                        f"{path}:{start}: a quotation mark that is never closed begins in this record"
                    )
                yield f"{path}:{start}", cells
                start = reader.line_num + 1
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise EvaluationError(f"{path}: cannot be read: {error}") from None
    finally:
        csv.field_size_limit(before)


def _summarise(items: Sequence[Question], sources: Sequence[Source]) -> dict:
    closed = [item for item in items if item.kind == "closed"]
    answerable = sum(item.answerable for item in closed)
    return {
        "format": "questions-source/1",
        "files": [
            {
                "name": source.path.name,
                "kind": source.kind,
                "md5": source.md5,
                "sha256": source.sha256,
                "recognised": source.recognised,
            }
            for source in sources
        ],
        "questions_sha256": questions_sha256(items),
        "closed": len(closed),
        "open": len(items) - len(closed),
        "images": len({item.image_id for item in items}),
        "categories": dict(sorted(Counter(name for item in items for name in item.categories).items())),
        "uncategorised": sum(not item.categories for item in items),
        "empty_options": sum(any(not text.strip() for text in item.options.values()) for item in closed),
        "unanswerable": len(closed) - answerable,
        "ceiling": answerable / len(closed) if closed else None,
        "open_without_reference": sum(not item.answerable for item in items if item.kind == "open"),
    }


def download(repo: str, revision: str, folder: Path, *, names: Sequence[str] = HUB_FILES) -> list[Path]:
    """Fetch the TSV files of a Hub data set at one commit into `folder`, and return their paths.

    Raises:
        EvaluationError: when `revision` is no commit (a branch may hold another file tomorrow), or the Hub has no such
            file.
    """
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise EvaluationError(
            f"revision {revision!r} is not a commit; a branch or tag can move, so give the 40 hexadecimal digits that "
            f"https://huggingface.co/datasets/{repo}/commits/main shows"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    paths = []
    for name in names:
        try:
            path = hf_hub_download(repo, name, repo_type="dataset", revision=revision, local_dir=folder)
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise EvaluationError(
                f"{repo}@{revision[:8]}: {name} cannot be downloaded: {reason} Check the id and the network, or give "
                "the TSV files by path"
            ) from None
        paths.append(Path(path))
    return paths
