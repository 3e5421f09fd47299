"""What must be true of a folder before it is published. Every objection is one sentence that says what to do."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from data_builders.dataset_folder import REPORT, hash_file
from data_builders.licences import is_conflict
from data_builders.records import InputError
from dentalgemma.certificates import CERTIFICATE, read_certificate
from dentalgemma.publishing.folders import CARD, Publication, PushRefused, read_front_matter
from dentalgemma.publishing.licences import find_base, judge_dataset, judge_model, list_sources
from dentalgemma.publishing.screening import screen

NOTICE = "NOTICE"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
LICENCE_KEYS = ("license", "license_name", "license_link")
WEIGHTS = frozenset({".safetensors", ".gguf", ".bin", ".pt", ".pth", ".onnx"})
CARD_COMMAND = "write it again with `dentalgemma card`"


class Inspection(NamedTuple):
    """What was found of a folder that may be published.

    `licence` is what its card's metadata say, `verdict` the same in a word or two, `warnings` what a private push is
    let through with, `per_source` whether a dataset needs one configuration per source.
    """

    licence: dict[str, str]
    verdict: str
    warnings: list[str]
    per_source: bool = False


def inspect(
    folder: Path, publication: Publication, *, public: bool = False, permissions: Collection[str] = ()
) -> Inspection:
    """Check certificate, card, NOTICE, hashes, terms and content of what is to be published.

    `permissions` are names of sources whose owners agreed. What forbids only to make it public is a warning where it
    stays private.

    Raises:
        PushRefused: with all objections.
    """
    objections = screen(publication.files)
    try:
        if publication.kind == "dataset":
            found, blocking, more = _inspect_dataset(folder, permissions)
        elif publication.kind == "space":
            found, blocking, more = _inspect_space(publication)
        else:
            found, blocking, more = _inspect_model(folder, publication, permissions)
    except InputError as error:  # without a certificate or a report there is nothing to check the rest against
        refuse([str(error), *objections])
        raise
    refuse([*more, *objections, *(blocking if public else ())])
    return found._replace(warnings=[] if public else [f"must stay private: {reason}" for reason in blocking])


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
    terms = judge_model(base or "an unknown base", sources, rehearsal=rehearsal, permissions=permissions)
    if base or rehearsal:
        objections += _compare_licence(card, metadata, terms.metadata, base)
        objections += _compare_notice(folder, publication, terms.notice)
    objections += _compare_relation(card, metadata, certificate, publication.kind)
    objections += _check_stages(folder / CERTIFICATE, stages)
    objections += _check_permissions(permissions, sources)
    weights = certificate["weights"]
    if str(weights) not in card.read_text(encoding="utf-8"):
        objections.append(
            f"{card} is about other weights: it does not name their fingerprint {weights}; {CARD_COMMAND}"
        )
    if publication.kind == "adapter":
        objections += _check_adapter(publication, certificate, None if rehearsal else base)
    verdict = ", ".join(terms.metadata.values())
    return Inspection(terms.metadata, verdict, []), terms.blocking, objections


def _find_base(certificate: Mapping, metadata: Mapping, card: Path) -> tuple[str | None, list[str]]:
    """The Hub id of a model's base: the certificate's, or the card's where training started from a folder."""
    first = certificate["stages"][0]
    recorded, stated = str(first["base_model"]), metadata.get("base_model")
    if first.get("base_is_rehearsal"):
        return recorded, []
    if not first.get("base_is_local"):
        if stated != recorded:
            return recorded, [f"{card}: base_model is {stated or 'missing'}, and must be {recorded}; {CARD_COMMAND}"]
        return recorded, []
    if not isinstance(stated, str) or stated.count("/") != 1:
        return None, [f"{card}: base_model names no model on the Hub; {CARD_COMMAND} and --base"]
    by_name = find_base(recorded)
    if by_name and find_base(stated) is not by_name:
        return recorded, [
            f"{card}: base_model is {stated}, but training started from a folder {recorded}, which is under the "
            f"{by_name.title}; {CARD_COMMAND} and the right --base"
        ]
    return stated, []


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
        wanted = "adapter" if kind == "adapter" else "quantized" if certificate.get("quantization") else "finetune"
        stated = metadata.get("base_model_relation")
        if stated != wanted:
            yield f"{card}: base_model_relation is {stated or 'missing'}, and must be {wanted}; {CARD_COMMAND}"
    library = "peft" if kind == "adapter" else "transformers"
    if metadata.get("library_name") != library:
        yield f"{card}: library_name must be {library}; {CARD_COMMAND}"


def _check_stages(path: Path, stages: Sequence[Mapping]) -> Iterator[str]:
    for stage in stages:
        if (stage.get("proof") or {}).get("passed") is False:
            yield f"{path}: {stage.get('stage')} did not train what it was to train: train and merge again"


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


def _inspect_dataset(folder: Path, permissions: Collection[str]) -> tuple[Inspection, Sequence[str], list[str]]:
    report = _read_report(folder / REPORT)
    sources = report["sources"]
    objections = list(_compare_hashes(folder, report["files"]))
    card = folder / CARD
    if not card.is_file():
        raise PushRefused(f"{folder} has no card: build it again")
    terms = judge_dataset(sources, permissions=permissions)
    stated = {key: value for key, value in read_front_matter(card).items() if key in LICENCE_KEYS and value is not None}
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
        report["sources"], report["files"]["README.md"]
    except (OSError, ValueError, LookupError, TypeError):
        raise PushRefused(f"{path} is no report of a build: build the dataset again") from None
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
        for path in files
        if PurePosixPath(path).suffix in WEIGHTS
    ]
    licence = {key: str(metadata[key]) for key in LICENCE_KEYS if metadata.get(key)}
    return Inspection(licence, ", ".join(licence.values()) or "none stated", []), (), objections
