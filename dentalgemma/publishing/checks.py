"""What must be true of a folder before it is published. Every objection is one sentence that says what to do."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data_builders.dataset_folder import REPORT, hash_file
from data_builders.licences import is_conflict
from data_builders.records import InputError
from dentalgemma.certificates import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CERTIFICATE, UNRECORDED, read_certificate
from dentalgemma.publishing.families import contradict_base
from dentalgemma.publishing.folders import (
    CARD,
    NOTICE,
    SPACE_FILES,
    TERMS,
    Publication,
    PushRefused,
    read_front_matter,
)
from dentalgemma.publishing.licences import find_base, judge_dataset, judge_model, list_sources
from dentalgemma.publishing.screening import screen
from dentalgemma.publishing.space import SpaceError, write_space

LICENCE_KEYS = ("license", "license_name", "license_link")
HAI_DEF = "health-ai-developer-foundations"  # the license_name of terms whose owner wants them to be handed on
WEIGHTS = frozenset({".safetensors", ".gguf", ".bin", ".pt", ".pth", ".onnx"})
# What lets a settings file name code that is run when the model is loaded.
REMOTE_CODE = frozenset({"auto_map", "custom_pipelines"})
REMOTE_CODE_FILES = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "processor_config.json"),
    *("preprocessor_config.json", "video_preprocessor_config.json"),
)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Tags that the Hub itself derives, and takes for the metadata of that name.
DERIVED_TAG = re.compile(r"\s*(license|base_model|dataset)\s*:", re.IGNORECASE)
SPACE_CONSTANT = re.compile(r"^(MODEL|BASE|REVISION) = (?:'([^'\\\n]*)'|None)$", re.MULTILINE)
CARD_COMMAND = "write it again with `dentalgemma card`"


class Inspection(NamedTuple):
    """What was found of a folder that may be published.

    `licence` is what its card's metadata say, `verdict` the same in a word or two, `warnings` what is let through and
    should be known, `per_source` whether a dataset needs one configuration per source.
    """

    licence: dict[str, str]
    verdict: str
    warnings: list[str]
    per_source: bool = False


def inspect(
    folder: Path,
    publication: Publication,
    *,
    public: bool = False,
    permissions: Collection[str] = (),
    advance: Callable[[int], None] | None = None,
) -> Inspection:
    """Check certificate, card, NOTICE, hashes, terms and content of what is to be published.

    `permissions` are names of sources whose owners agreed. What forbids only to make it public is a warning where it
    stays private. `advance` is told the bytes of the files that were looked into.

    Raises:
        PushRefused: with all objections.
    """
    objections = screen({**publication.files, **publication.beside}, advance=advance)
    try:
        if publication.kind == "dataset":
            found, blocking, more = _inspect_dataset(folder, publication, permissions)
        elif publication.kind == "space":
            found, blocking, more = _inspect_space(publication)
        else:
            found, blocking, more = _inspect_model(folder, publication, permissions)
    except InputError as error:  # without a certificate or a report there is nothing to check the rest against
        refuse([str(error), *objections])
        raise
    if public:
        refuse([*more, *objections, *(f"{reason}, or push without --public" for reason in blocking)])
        return found
    refuse([*more, *objections])
    return found._replace(warnings=[*found.warnings, *(f"must stay private: {reason}" for reason in blocking)])


def refuse(objections: Sequence[str]) -> None:
    """Raise a PushRefused with these objections, if there are any."""
    if len(objections) == 1:
        raise PushRefused(objections[0])
    if objections:
        raise PushRefused(f"{len(objections)} reasons not to push:\n" + "\n".join(f"- {text}" for text in objections))


def _inspect_model(
    folder: Path, publication: Publication, permissions: Collection[str]
) -> tuple[Inspection, Sequence[str], list[str]]:
    certificate = read_certificate(folder)
    stages = certificate["stages"]
    sources = list_sources(stages)
    card = publication.files.get(CARD)
    if card is None:
        raise PushRefused(f"{folder} has no card: {CARD_COMMAND}")
    metadata = read_front_matter(card)
    rehearsal = bool(stages[0].get("base_is_rehearsal"))
    base, objections = _find_base(certificate, metadata, card)
    if base and not rehearsal and (why := contradict_base(folder / "config.json", base)):
        objections.append(
            f"{card} names a base that this model was not made from: {why}; {CARD_COMMAND} and the right --base"
        )
    terms = judge_model(base or "an unknown base", sources, rehearsal=rehearsal, permissions=permissions)
    if base or rehearsal:
        objections += _compare_licence(card, metadata, terms.metadata, base)
        objections += _compare_notice(folder, publication, terms.notice)
    objections += _compare_relation(card, metadata, certificate, publication.kind)
    objections += _check_tags(card, metadata)
    objections += _check_stages(folder / CERTIFICATE, stages)
    objections += _check_weights(publication)
    objections += _check_code(publication)
    objections += _check_permissions(permissions, sources)
    weights = certificate["weights"]
    if str(weights) not in card.read_text(encoding="utf-8"):
        objections.append(
            f"{card} is about other weights: it does not name their fingerprint {weights}; {CARD_COMMAND}"
        )
    if publication.kind == "adapter":
        objections += _check_adapter(publication, certificate, None if rehearsal else base)
    verdict = ", ".join(terms.metadata.values())
    return (
        Inspection(terms.metadata, verdict, _warn_of_terms(folder, publication, terms.metadata)),
        terms.blocking,
        objections,
    )


def _warn_of_terms(folder: Path, publication: Publication, licence: Mapping[str, str]) -> list[str]:
    """Section 3.1 of these terms asks for a copy of them for whoever is given the model; the NOTICE links to them."""
    if licence.get("license_name") != HAI_DEF or any(name in publication.files for name in TERMS):
        return []
    return [
        "whoever is given this model is to be given a copy of the Health AI Developer Foundations Terms of Use: put "
        f"it into {folder} as {TERMS[0]}, and it is published along"
    ]


def _find_base(certificate: Mapping, metadata: Mapping, card: Path) -> tuple[str | None, list[str]]:
    """The Hub id of a model's base: the certificate's, or the card's where training started from a folder.

    A 4-bit copy may name the merged model that it was made from; its card has the base beside it then.
    """
    first = certificate["stages"][0]
    recorded, stated = str(first["base_model"]), metadata.get("base_model")
    if first.get("base_is_rehearsal"):
        return recorded, []
    if _is_copy(metadata, certificate):
        if not isinstance(stated, str) or not HUB_ID.fullmatch(stated) or stated == metadata.get("original_base_model"):
            why = "base_model does not name the repository of the merged model"
            return recorded, [f"{card}: {why}; {CARD_COMMAND} and --quantized-from"]
        stated = metadata.get("original_base_model")
    if not first.get("base_is_local"):
        if stated != recorded:
            return recorded, [f"{card}: base_model is {stated or 'missing'}, and must be {recorded}; {CARD_COMMAND}"]
        return recorded, []
    if not isinstance(stated, str) or not HUB_ID.fullmatch(stated):
        return None, [f"{card}: base_model names no model on the Hub; {CARD_COMMAND} and --base"]
    by_name = find_base(recorded)
    if by_name and find_base(stated) is not by_name:
        return recorded, [
            f"{card}: base_model is {stated}, but training started from a folder {recorded}, which is under the "
            f"{by_name.title}; {CARD_COMMAND} and the right --base"
        ]
    return stated, []


def _is_copy(metadata: Mapping, certificate: Mapping) -> bool:
    """Whether a card is that of a 4-bit copy which names the merged model as what it was made from."""
    return bool(certificate.get("quantization")) and metadata.get("base_model_relation") == "quantized"


def _compare_licence(card: Path, metadata: Mapping, wanted: Mapping[str, str], base: str | None) -> list[str]:
    """What the card's metadata say of the licence must be what base and sources allow, no more and no less."""
    stated = {key: metadata[key] for key in LICENCE_KEYS if metadata.get(key) is not None}
    if stated == dict(wanted):
        return []
    why = f" with {base} as its base" if base else ""
    return [f"{card}: {_spell(stated) or 'no license'} is not what applies{why}: {_spell(wanted)}; {CARD_COMMAND}"]


def _spell(metadata: Mapping[str, object]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in metadata.items())


def _compare_notice(folder: Path, publication: Publication, wanted: str | None) -> Iterator[str]:
    if wanted is None:
        return
    path = publication.files.get(NOTICE)
    if path is None:
        yield f"{folder} has no {NOTICE} file, which the terms of its base ask for: `dentalgemma card` writes it"
    elif path.read_bytes() != wanted.encode():
        yield f"{path} is not the text that the terms of the base ask for: `dentalgemma card` writes it"


def _compare_relation(card: Path, metadata: Mapping, certificate: Mapping, kind: str) -> Iterator[str]:
    if not certificate["stages"][0].get("base_is_rehearsal") or metadata.get("base_model"):
        wanted = "adapter" if kind == "adapter" else "finetune"
        stated = metadata.get("base_model_relation")
        if stated != wanted and not _is_copy(metadata, certificate):
            yield f"{card}: base_model_relation is {stated or 'missing'}, and must be {wanted}; {CARD_COMMAND}"
    library = "peft" if kind == "adapter" else "transformers"
    if metadata.get("library_name") != library:
        yield f"{card}: library_name must be {library}; {CARD_COMMAND}"


def _check_tags(card: Path, metadata: Mapping) -> Iterator[str]:
    tags = metadata.get("tags") or []
    for tag in tags if isinstance(tags, list) else [tags]:
        if DERIVED_TAG.match(str(tag)):
            yield f"{card}: the tag {tag} would stand for metadata of that name on the Hub: take it out"


def _check_stages(path: Path, stages: Sequence[Mapping]) -> Iterator[str]:
    for stage in stages:
        proof = stage.get("proof")
        if stage["stage"] == UNRECORDED:
            told = stage.get("merged_from") or "one of its adapters"
            yield f"{path}: nothing is recorded of {told}: its run had no run_facts.json; merge a finished run"
        elif proof is None and stage.get("from_checkpoint"):
            continue  # of a run that proved its last weights alone; the card says so
        elif not proof or proof.get("passed") is None:
            yield f"{path}: {stage['stage']} has no proof of what was trained: train and merge again"
        elif proof["passed"] is not True:
            yield f"{path}: {stage['stage']} did not train what it was to train: train and merge again"


def _check_weights(publication: Publication) -> Iterator[str]:
    """Weights beside the model's own, which somebody might load in their place; those in a subfolder stay here."""
    for path in publication.beside:
        if PurePosixPath(path).suffix.lower() in WEIGHTS:
            yield f"{publication.beside[path]} is a weight file that {CERTIFICATE} does not list: put it elsewhere"


def _check_code(publication: Publication) -> Iterator[str]:
    for name, path in publication.files.items():
        if name in REMOTE_CODE_FILES:
            try:
                found = next(_find_keys(json.loads(path.read_text(encoding="utf-8")), REMOTE_CODE), None)
            except (OSError, ValueError):
                yield f"{path} is no JSON: merge again"
                continue
            if found:
                yield f"{path}: {found} names code that is run when the model is loaded: take it out, and merge again"


def _find_keys(value: object, wanted: Collection[str]) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (key for key in value if key in wanted)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in parts:
        yield from _find_keys(part, wanted)


def _check_permissions(permissions: Collection[str], sources: Sequence[Mapping]) -> Iterator[str]:
    names = {str(source["name"]) for source in sources}
    # What `licences` calls them where two of one name state different licences.
    apart = {f"{source['name']} ({source.get('license') or 'not stated'})" for source in sources}
    for name in sorted(set(permissions) - names - apart):
        yield f"--permission {name}: there is no such source; there are {', '.join(sorted(names)) or 'none'}"


def _check_adapter(publication: Publication, certificate: Mapping, base: str | None) -> Iterator[str]:
    """The adapter must be the one that the merge compared, and name the base by its Hub id."""
    weights, config = publication.files.get(ADAPTER_WEIGHTS), publication.files.get(ADAPTER_CONFIG)
    recorded = (certificate.get("adapter") or {}).get("sha256")
    if weights is None or config is None or recorded is None:
        yield f"{publication.files[CERTIFICATE]} is about no adapter, or it is not there: merge again"
        return
    if hash_file(weights) != recorded:
        yield f"{weights} is not the adapter that {CERTIFICATE} is about: merge again"
    try:
        named = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        yield f"{config} is no JSON object: merge again"
        return
    if base and named != base:
        yield f"{config}: base_model_name_or_path is {named}, and must be {base}; {CARD_COMMAND}"


def _inspect_dataset(
    folder: Path, publication: Publication, permissions: Collection[str]
) -> tuple[Inspection, Sequence[str], list[str]]:
    report = _read_report(folder / REPORT)
    sources = report["sources"]
    objections = list(_compare_hashes(folder, report["files"]))
    card = folder / CARD
    if not card.is_file():
        raise PushRefused(f"{folder} has no card: build it again")
    objections += _compare_rows(folder / REPORT, publication.files, sources)
    terms = judge_dataset(sources, permissions=permissions)
    metadata = read_front_matter(card)
    objections += _check_tags(card, metadata)
    stated = {key: value for key, value in metadata.items() if key in LICENCE_KEYS and value is not None}
    if stated != dict(terms.metadata):
        objections.append(
            f"{card}: {_spell(stated) or 'no license'} is not what follows from its sources: "
            f"{_spell(terms.metadata)}; build it again"
        )
    objections += _check_permissions(permissions, sources)
    by_name = {str(source["name"]): source.get("license") for source in sources if source.get("rows", 1)}
    verdict = f"{', '.join(terms.metadata.values())} ({terms.verdict})"
    found = Inspection(terms.metadata, verdict, [], is_conflict(by_name))
    return found, terms.blocking, objections


def _read_report(path: Path) -> dict:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        sources, files = report["sources"], report["files"]
        whole = all(isinstance(source["name"], str) and isinstance(source["rows"], int) for source in sources)
        whole = whole and CARD in files and all(isinstance(sha256, str) for sha256 in files.values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise PushRefused(f"{path} is no report of a build: build the dataset again")
    return report


def _compare_hashes(folder: Path, recorded: Mapping[str, str]) -> Iterator[str]:
    """Every file must be the one that was built and proven: nothing changed, gone or added since."""
    for name, sha256 in sorted(recorded.items()):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            yield f"{folder / REPORT}: {name} is no path in the folder: build it again"
        elif not (folder / name).is_file():
            yield f"{folder / name} is gone since it was built: build it again"
        elif hash_file(folder / name) != sha256:
            yield f"{folder / name} was changed since it was built: build it again"


def _compare_rows(report: Path, files: Mapping[str, Path], sources: Sequence[Mapping]) -> Iterator[str]:
    """The terms are judged by the report; what each row says of its source and licence must be the same."""
    counted: Counter[tuple[str, str | None]] = Counter()
    for path in (path for name, path in files.items() if name.endswith(".parquet")):
        try:
            counted.update(_count_rows(path))
        except (OSError, ValueError, LookupError, pa.ArrowException):
            yield f"{path} is no table of rows that each name their source and licence: build it again"
            return
    told = {(str(source["name"]), source.get("license")): source["rows"] for source in sources if source["rows"]}
    for name, licence in sorted({*counted, *told}, key=str):
        rows, reported = counted[name, licence], told.get((name, licence), 0)
        if rows != reported:
            yield (
                f"{report}: {reported:,} rows of {name} ({licence or 'no licence'}), in the parquet files there are "
                f"{rows:,}: build it again"
            )


def _count_rows(path: Path) -> Counter[tuple[str, str | None]]:
    with pq.ParquetFile(path) as file:
        table = file.read(columns=["source", "license"])
    counts = table.group_by(["source", "license"]).aggregate([([], "count_all")]).to_pylist()
    return Counter({(row["source"], row["license"]): row["count_all"] for row in counts})


def _inspect_space(publication: Publication) -> tuple[Inspection, Sequence[str], list[str]]:
    files = publication.files
    metadata = read_front_matter(files[CARD])
    objections = [
        f"a Space needs {name}: write it again with `dentalgemma space`"
        for name in ("app.py", "requirements.txt")
        if name not in files
    ]
    for key in ("title", "sdk_version"):
        if not metadata.get(key):
            objections.append(f"{files[CARD]}: {key} is missing: write it again with `dentalgemma space`")
    if metadata.get("app_file", "app.py") not in files:
        objections.append(f"{files[CARD]}: app_file names no file: write it again with `dentalgemma space`")
    objections += [
        f"{path} is a weight file, which a Space takes from the model's own repository: remove it"
        for path in (*files, *publication.beside)
        if PurePosixPath(path).suffix.lower() in WEIGHTS
    ]
    objections += _check_tags(files[CARD], metadata)
    licence = {key: str(metadata[key]) for key in LICENCE_KEYS if metadata.get(key)}
    return Inspection(licence, ", ".join(licence.values()) or "none stated", _warn_of_changes(files)), (), objections


def _warn_of_changes(files: Mapping[str, Path]) -> list[str]:
    """Whoever opens a Space runs it: what `space` did not write is named, be it a title or another program."""
    try:
        named = {name: text or None for name, text in SPACE_CONSTANT.findall(files["app.py"].read_text("utf-8"))}
        with TemporaryDirectory() as workshop:
            own = write_space(Path(workshop) / "space", named["MODEL"], base=named["BASE"], revision=named["REVISION"])
            changed = [name for name in SPACE_FILES if files[name].read_bytes() != (own / name).read_bytes()]
    except (OSError, ValueError, LookupError, TypeError, SpaceError):
        return ["app.py or its papers are not what `dentalgemma space` writes: look at them before others run them"]
    if not changed:
        return []
    model = f"for {named['MODEL']}"
    return [f"{', '.join(changed)}: not what `dentalgemma space` writes {model}: look at it before others run it"]
