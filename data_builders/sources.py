"""The sources file: which annotation files there are, what their labels mean, and under which terms."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Mapping
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from data_builders.dentition import parse_fdi, parse_tooth_type
from data_builders.records import InputError, Modality, Origin
from data_builders.secrets import refuse_secrets

Language = Literal["en", "es"]
Family = Literal[
    "diagnosis",
    "findings",
    "location",
    "presence",
    "structured_report",
    "tooth_types",
    "completeness",
    "image_type",
    "severity",
    "follow_up",
    "urgency",
    "differential",
    "healthy_or_abnormal",
    "overview",
    "region",
    "counting",
    "side",
    "quadrant",
    "tooth_number",
    "comparison",
    "dialogue",
]


# A key that a reader does not look at is refused: who wrote it would believe that it was obeyed.
IMAGE_READERS = ("yolo", "dota", "coco", "via", "class_folders")
READ_BY = {
    "annotations": ("coco", "via", "cases"),
    "labels": ("yolo", "dota"),
    "label_attribute": ("via", "cases"),
    "attributes": ("coco", "via"),
    **dict.fromkeys(("condition_line", "synonyms", "diagnosis_in_prompt", "pii"), ("cases",)),
    **dict.fromkeys(("classes", "modality", "exhaustive", "locations", "origin", "images"), IMAGE_READERS),
    **dict.fromkeys(("questions_per_image", "expected_images", "group"), IMAGE_READERS),
}
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")


class SourcesError(InputError):
    """A sources file that cannot be used; the message names the file, the key and the remedy."""


class UnknownLabel(ValueError):
    """A raw label that the class map of its source does not name."""


class Names(BaseModel):
    """How a finding is called in one language."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    one: str
    other: str
    condition: str
    gender: Literal["f", "m"] | None = None

    @field_validator("one", "other", "condition")
    @classmethod
    def _reads_back(cls, name: str) -> str:
        """Texts are read back by their words, so that a name must not look like a number or the end of a sentence."""
        if not name or name != " ".join(name.split()) or re.search(r"[.:;!?\d]", name):
            raise ValueError(f"{name!r}: a name has no digits, no .:;!? and single blanks between its words")
        return name


class Advice(BaseModel):
    """What is generally done or thought of a disease, in each language; never a statement about a patient."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    en: str
    es: str


class Term(BaseModel):
    """One entry of the vocabulary; where it is shown, the image is never said to be free of `not_free_of`.

    `guidance` is worded as general guidance, word for word: `follow_up`, `urgency`, and `differential`, what can look
    alike.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["pathology", "sound", "structure"]
    icd10cm: str | None = None
    not_free_of: tuple[str, ...] = ()
    guidance: Mapping[Literal["follow_up", "urgency", "differential"], Advice] = Field(default_factory=dict)
    en: Names
    es: Names

    def advice(self, about: str, language: Language) -> str | None:
        """The guidance about one aspect, if there is any."""
        return getattr(self.guidance[about], language) if about in self.guidance else None


Vocabulary = Mapping[str, Term]


class Label(NamedTuple):
    """What a raw label means: a name of the vocabulary, and the tooth it names, if it does."""

    name: str
    tooth: str | None = None


class Group(BaseModel):
    """How file names tell which images belong to one patient."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    pattern: str

    @field_validator("pattern")
    @classmethod
    def _names_a_patient(cls, pattern: str) -> str:
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        if "patient" not in compiled.groupindex:
            raise ValueError("needs a named group, for example ^(?P<patient>[^_]+)_")
        return pattern


class Shares(BaseModel):
    """Shares of the groups that go to each split; they add up to 1."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    train: float = Field(default=0.8, ge=0)
    validation: float = Field(default=0.1, ge=0)
    test: float = Field(default=0.1, ge=0)

    @model_validator(mode="after")
    def _adds_up(self) -> Shares:
        if abs(self.train + self.validation + self.test - 1) > 1e-6:
            raise ValueError("train, validation and test must add up to 1")
        return self


class Questions(BaseModel):
    """How many questions an image gets and of which families.

    Of the questions that an image supports, `per_image` are drawn in each language, by the families' `weights` (1
    unless stated); without it all are asked. Then, in each split, no answer to one and the same question keeps more
    than the share `cap` of its rows, and "yes" and "no" are equally many for each condition.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    per_image: int | None = Field(default=None, ge=1)
    weights: Mapping[Family, float] = Field(default_factory=dict)
    cap: float = Field(default=0.5, gt=0, le=1)

    @field_validator("weights")
    @classmethod
    def _not_negative(cls, weights: Mapping[Family, float]) -> Mapping[Family, float]:
        if any(not 0 <= weight < float("inf") for weight in weights.values()):
            raise ValueError("a weight is a number from 0")
        return weights


class Source(BaseModel):
    """One folder of annotations in one format.

    `root` is absolute once loaded. `classes` maps a raw label (a YOLO id, a COCO or VIA name, a folder name) to a name
    of the vocabulary, or to null where it is to be ignored; `fdi` and `tooth_types` stand for labels that are tooth
    numbers or the eight tooth types. `exhaustive` names the labels whose absence may be stated. `locations: false` is
    for images that were flipped or put together, in which places mean nothing. `origin: model` is for boxes that a
    detector found: they are worded as possible, and never support a "no"; those below `min_confidence` are left out.

    Of cases, `condition_line` is the line of the prompt that holds the condition (`PATIENT` for `PATIENT: dental
    caries`), `synonyms` are further names of a condition, and `diagnosis_in_prompt` says what is done where a prompt
    names its condition. `pii: off` leaves out the search for personal data.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    reader: Literal["yolo", "dota", "coco", "via", "class_folders", "cases"]
    root: Path
    classes: Mapping[int | str, str | None] | Literal["fdi", "tooth_types"] | None = None
    modality: Modality | None = None
    exhaustive: tuple[str, ...] = ()
    locations: bool = True
    origin: Origin = "human"
    min_confidence: float = Field(default=0.0, ge=0, le=1)
    questions_per_image: int | None = Field(default=None, ge=1)
    license: str | None = None
    url: str | None = None
    annotations: str | None = None
    images: str | None = None
    labels: str | None = None
    label_attribute: str | None = None
    attributes: Mapping[str, str] = Field(default_factory=dict)
    expected_images: Mapping[str, int] = Field(default_factory=dict)
    group: Group | None = None
    condition_line: str | None = None
    synonyms: Mapping[str, tuple[str, ...]] = Field(default_factory=dict)
    diagnosis_in_prompt: Literal["drop", "mask", "keep"] = "drop"
    pii: Literal["report", "off"] = "report"

    @field_validator("pii", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: object) -> object:
        return "off" if value is False else value  # YAML reads `off` as a boolean

    @field_validator("annotations", "images", "labels")
    @classmethod
    def _lies_below_root(cls, path: str | None) -> str | None:
        if path is not None and (path.startswith(("/", "\\")) or path[1:2] == ":" or ".." in re.split(r"[/\\]", path)):
            raise ValueError(f"{path!r} is not a path below `root`")
        if path is not None and any("**" in part and part != "**" for part in path.split("/")):
            raise ValueError(f"{path!r}: `**` stands for any folders, alone between slashes")
        return path

    @model_validator(mode="after")
    def _has_what_its_reader_needs(self) -> Source:
        if self.reader != "cases":
            for key in ("classes", "modality"):
                if getattr(self, key) is None:
                    raise ValueError(f"reader {self.reader} needs {key!r}: a class map is never guessed")
        if self.origin == "model" and self.exhaustive:
            raise ValueError("`exhaustive` does not go with `origin: model`: what a detector missed may well be there")
        return self

    @model_validator(mode="after")
    def _has_no_key_without_effect(self) -> Source:
        fields = type(self).model_fields
        for key, readers in READ_BY.items():
            is_set = getattr(self, key) != fields[key].get_default(call_default_factory=True)
            if is_set and self.reader not in readers:
                raise ValueError(f"{key!r} has no effect with reader {self.reader}, only with {', '.join(readers)}")
        if self.min_confidence and self.origin == "human":
            raise ValueError("'min_confidence' has no effect without `origin: model`: people state no confidence")
        return self

    def resolve(self, raw: int | str) -> Label | None:
        """The meaning of a raw label, or `None` where the class map ignores it.

        Raises:
            UnknownLabel: when the map does not name it; nothing is ever a default class.
        """
        assert self.classes is not None
        try:
            if self.classes == "fdi":
                return Label("tooth", parse_fdi(str(raw)))
            if self.classes == "tooth_types":
                return Label("tooth", parse_tooth_type(str(raw)))
        except ValueError as error:
            raise UnknownLabel(str(error)) from None
        if raw not in self.classes:
            raise UnknownLabel(f"label {raw!r} is not in the class map ({self.class_map_text()})")
        name = self.classes[raw]
        return None if name is None else Label(name)

    def class_map_text(self) -> str:
        """The class map in one line, for messages."""
        if isinstance(self.classes, str):
            return self.classes
        return ", ".join(f"{_spell_key(raw)}: {name or 'null'}" for raw, name in (self.classes or {}).items())


def _spell_key(raw: int | str) -> str:
    """A key of a class map, in quotes where it would not be seen for what it is without them."""
    is_plain = isinstance(raw, int) or (raw == raw.strip() != "" and not raw.isdigit())
    return str(raw) if is_plain else repr(raw)


class SourcesFile(BaseModel):
    """A whole sources file; `path` is where it was read.

    `families` narrows the question families that are asked. With `detector_findings: false` sources of `origin: model`
    are left out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: Path
    seed: int = 42
    languages: tuple[Language, ...] = Field(default=("en",), min_length=1)
    split: Shares = Shares()
    vocabulary: Path | None = None
    system_prompt: str | None = None
    families: tuple[Family, ...] | None = Field(default=None, min_length=1)
    questions: Questions = Questions()
    detector_findings: bool = True
    sources: tuple[Source, ...] = Field(min_length=1)

    @field_validator("languages", "families")
    @classmethod
    def _once_each(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if names is None else tuple(dict.fromkeys(names))

    def terms(self) -> Vocabulary:
        """The vocabulary that this file's class maps may use: the toolkit's, and the file's own on top."""
        return load_vocabulary(self.vocabulary)


def load_vocabulary(extra: Path | None = None) -> Vocabulary:
    """Read the vocabulary of findings, with a user's additions where a file is given; again once that has changed."""
    try:
        state = extra and extra.stat()
    except OSError:
        state = None  # reading it says what is wrong
    return _load_vocabulary(extra, state and (state.st_mtime_ns, state.st_size))


@lru_cache
def _load_vocabulary(extra: Path | None, _state: tuple[int, int] | None) -> Vocabulary:
    entries = yaml.safe_load(files("data_builders.compose").joinpath("vocabulary.yaml").read_text(encoding="utf-8"))
    if extra is not None:
        entries |= read_yaml(extra)
    terms = {}
    for label, entry in entries.items():
        try:
            terms[label] = Term.model_validate(entry)
        except ValidationError as error:
            raise SourcesError(f"{extra}: {label}: {_first_errors(error)}") from None
    _check_spellings(extra, terms)
    for name, term in terms.items():
        for other in sorted(set(term.not_free_of) - set(terms)):
            raise SourcesError(f"{extra}: {name}: not_free_of names {other!r}, which is not in the vocabulary")
    return terms


def _check_spellings(path: Path | None, terms: Vocabulary) -> None:
    """Two findings that are called alike could be denied and affirmed of one image; Spanish needs the gender."""
    for language in get_args(Language):
        owner: dict[str, str] = {}
        for label, term in terms.items():
            names: Names = getattr(term, language)
            if language == "es" and names.gender is None:
                raise SourcesError(f"{path}: {label}: es needs a gender, f or m")
            for name in (names.one, names.other, names.condition):
                spelling = re.sub(r"^(an?|una?) ", "", name.casefold())
                if owner.setdefault(spelling, label) != label:
                    raise SourcesError(f"{path}: {label} and {owner[spelling]} are both called {spelling!r}")


def load_sources(path: Path) -> SourcesFile:
    """Read and validate a sources file; paths in it are relative to it.

    Raises:
        SourcesError: naming the file and every key that is wrong.
    """
    path = Path(path)
    return validate_sources(read_yaml(path), path)


def validate_sources(document: dict, path: Path) -> SourcesFile:
    """Validate the content of the sources file `path`, and put the paths in it below its folder."""
    base = path.resolve().parent
    sources = document.get("sources")
    for source in sources if isinstance(sources, list) else ():
        if isinstance(source, dict) and isinstance(source.get("root"), str):
            source["root"] = base / os.path.expanduser(source["root"])
    if isinstance(document.get("vocabulary"), str):
        document["vocabulary"] = base / os.path.expanduser(document["vocabulary"])
    try:
        loaded = SourcesFile.model_validate({**document, "path": path})
    except ValidationError as error:
        raise SourcesError(f"{path}: {_first_errors(error)}") from None
    _check_names(loaded)
    return loaded


def _check_names(loaded: SourcesFile) -> None:
    terms = loaded.terms()
    seen: set[str] = set()
    for source in loaded.sources:
        if source.name in seen:
            raise SourcesError(f"{loaded.path}: two sources are named {source.name!r}")
        seen.add(source.name)
        if source.root.name.lower().endswith(ARCHIVE_SUFFIXES) and source.root.is_file():
            message = f"root {source.root} is an archive; unpack it and name the folder"
            raise SourcesError(f"{loaded.path}: source {source.name!r}: {message}")
        if not source.root.is_dir():
            raise SourcesError(f"{loaded.path}: source {source.name!r}: root {source.root} is not a folder")
        standard = isinstance(source.classes, str)
        mapped = ["tooth"] if standard else [name for name in (source.classes or {}).values() if name]
        for name in [*mapped, *source.exhaustive, *source.expected_images]:
            if name not in terms:
                raise SourcesError(
                    f"{loaded.path}: source {source.name!r}: {name!r} is not in the vocabulary "
                    f"({', '.join(terms)}); add it to a file of your own and name that as `vocabulary:`"
                )
        for name in source.exhaustive:
            if name not in mapped:
                raise SourcesError(
                    f"{loaded.path}: source {source.name!r}: exhaustive names {name!r}, which no label is mapped to: "
                    "nobody annotated it, so nobody may say that it is not there"
                )


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key may not come twice, nor be a boolean: `no: …` is False to YAML, and False equals 0."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Refuse such keys with their line; what cannot be a key at all is refused by PyYAML."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, bool):
                message = f"the key {key_node.value!r} is a boolean to YAML; put it in quotes"
                raise yaml.constructor.ConstructorError(None, None, message, key_node.start_mark)
            if not isinstance(key, Hashable):
                continue
            if key in seen:
                message = f"the key {key!r} is there twice"
                raise yaml.constructor.ConstructorError(None, None, message, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict:
    """Read a YAML file of keys and values; raise SourcesError in one sentence for anything else, also for a token."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        refuse_secrets(text, path, SourcesError)  # before anything can quote it
        document = yaml.load(text, Loader=_StrictLoader)
    except FileNotFoundError:
        raise SourcesError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SourcesError(f"{path}: cannot be read: {error}") from None
    except RecursionError:
        raise SourcesError(f"{path}: is nested too deeply to be read") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise SourcesError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if document is None:
        raise SourcesError(f"{path} is empty: expected keys and values")
    if not isinstance(document, dict):
        got = "a list" if isinstance(document, list) else "one text" if isinstance(document, str) else "one value"
        raise SourcesError(f"{path}: expected keys and values, got {got}")
    return document


def _first_errors(error: ValidationError) -> str:
    lines = []
    errors = error.errors()
    if any(item["type"] == "extra_forbidden" for item in errors):  # a misspelt key: what it should have set is noise
        errors = [item for item in errors if item["type"] == "extra_forbidden"]
    # A list whose items are wrong is too short to pydantic as well.
    wrong_within = {item["loc"][:1] for item in errors if len(item["loc"]) > 1}
    errors = [item for item in errors if item["type"] != "too_short" or item["loc"] not in wrong_within]
    for item in errors:
        key = ".".join(str(part) for part in item["loc"] if part not in {"path"})
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "literal_error":
            message += f", got {item['input']!r}"
        lines.append(f"{key}: {message}" if key else message)
    return "; ".join(lines)
