"""The terms of a model and of a dataset: what its base and its sources ask for, and whether it may be made public.

It informs, gives its reasons and cites where they stand. It is no legal advice.

What a model card's `license` says, decided here:

- On a base with terms of its own that pass on (HAI-DEF, Gemma, Llama) it names those, since they bind every copy. What
  the sources ask for beyond them is in the rules. Gemma's and Llama's allow commercial use, so where a source forbids
  it, or cannot be told, the licence is `other` and its name says both.
- On an Apache-2.0 base it names that licence only where the sources ask for no more than attribution; else the
  strictest licence of theirs, where it covers all of them; else `other`, and a link to the strictest one.

Sources whose share-alike terms exclude each other stop a public push of the model. Whether weights are an adaptation of
what they learned from is not settled, so nothing is decided for the user: with the consent of owners (`--permission`)
of so many of these sources that the others go together, it may be pushed. The card says the same with it or without.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from data_builders.licences import (
    Licence,
    Rule,
    combine_terms,
    find_cover,
    find_licence,
    is_conflict,
    name_dataset_terms,
)

HAI_DEF_TERMS = "https://developers.google.com/health-ai-developer-foundations/terms"
HAI_DEF_POLICY = "https://developers.google.com/health-ai-developer-foundations/prohibited-use-policy"
GEMMA_TERMS = "https://ai.google.dev/gemma/terms"
GEMMA_POLICY = "https://ai.google.dev/gemma/prohibited_use_policy"
LLAMA_TERMS = "https://www.llama.com/llama3_2/license/"
LLAMA_POLICY = "https://www.llama.com/llama3_2/use-policy/"
PASSED_ON = (
    "The use restrictions of section 3.2 of these terms are passed on: whoever uses this model, or passes it on, or a\n"
    "model made from it, is bound by them and must pass them on. "
)
COPY = "a copy of the terms (their section 3.1(2); put it beside as TERMS.md), "
APACHE = "https://www.apache.org/licenses/LICENSE-2.0"


class Base(NamedTuple):
    """The terms of a base model; `sentence` is what they want to be said in a NOTICE file, word for word."""

    title: str
    metadata: dict[str, str]
    url: str
    rule: str
    sentence: str | None = None
    restrictions: str | None = None


HAI_DEF = Base(
    "Health AI Developer Foundations Terms of Use",
    {"license": "other", "license_name": "health-ai-developer-foundations", "license_link": HAI_DEF_TERMS},
    HAI_DEF_TERMS,
    f"they bind everybody who gets this model or a model made from it: pass on {COPY}"
    "the use restrictions of their section 3.2 and the NOTICE file. Clinical use needs the authorization of the health "
    "authorities in charge (section 3.1(3)).",
    "HAI-DEF is provided under and subject to the Health AI Developer Foundations Terms of Use found at "
    f"{HAI_DEF_TERMS}",
    f"{PASSED_ON}It must not be used\n"
    "(1) for what the Prohibited Use Policy forbids\n"
    f"    ({HAI_DEF_POLICY}),\n"
    "(2) in a way that could cause a health regulatory authority to deem Google the\n"
    "    “manufacturer” of a medical device,\n"
    "(3) against laws and regulations.\n\n"
    "By section 3.1 of the terms, whoever passes it on gives a copy of them to those who get it (2), and seeks the\n"
    "authorization of the health regulatory authorities where it is needed, as for clinical use (3).",
)
GEMMA = Base(
    "Gemma Terms of Use",
    {"license": "gemma"},
    GEMMA_TERMS,
    f"they bind everybody who gets this model or a model made from it: pass on {COPY}"
    "the use restrictions of their section 3.2 and the NOTICE file.",
    "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
    f"{PASSED_ON}It must not be used for what the Prohibited Use Policy\n"
    f"forbids ({GEMMA_POLICY}), nor against the law.",
)
LLAMA = Base(
    "Llama 3.2 Community License",
    {"license": "llama3.2"},
    LLAMA_TERMS,
    "pass on the licence and the NOTICE file, show “Built with Llama”, and let the model's name begin with “Llama”. "
    "Its use policy does not extend the rights in the vision models to persons and companies in the European Union.",
    "Llama 3.2 is licensed under the Llama 3.2 Community License, Copyright © Meta Platforms, Inc. "
    "All Rights Reserved.",
    f"Built with Llama. The Acceptable Use Policy is part of the licence and passed on ({LLAMA_POLICY}).",
)
APACHE_2 = Base(
    "Apache License 2.0",
    {"license": "apache-2.0"},
    APACHE,
    "keep the licence and what it says of authors with every copy, and say that the weights were changed.",
)
# Where the name alone tells the terms. MedGemma's pass on whoever trained it further; the others' names are taken from
# those who publish them unchanged, since anybody's own model may carry terms of its own.
BASES = (
    (re.compile(r"medgemma", re.IGNORECASE), HAI_DEF),
    (re.compile(r"^(?:google|unsloth)/gemma-4\b", re.IGNORECASE), APACHE_2),
    (re.compile(r"^(?:google|unsloth)/gemma-3n?\b", re.IGNORECASE), GEMMA),
    (re.compile(r"^(?:qwen|unsloth)/qwen3-vl\b", re.IGNORECASE), APACHE_2),
    (re.compile(r"^(?:meta-llama|unsloth)/llama-3\.2-.*vision", re.IGNORECASE), LLAMA),
)


class ModelTerms(NamedTuple):
    """What applies to a model: the card's metadata, rules in plain text, what forbids to make it public, its NOTICE."""

    metadata: dict[str, str]
    rules: tuple[Rule, ...]
    blocking: tuple[str, ...]
    notice: str | None


class DatasetTerms(NamedTuple):
    """What applies to a dataset: a verdict, and the same as for a model.

    The verdict is that of `combine_terms`, but "mixed" also where beside two that clash a third is unclear.
    """

    verdict: Literal["single", "combined", "mixed", "unclear"]
    metadata: dict[str, str]
    rules: tuple[Rule, ...]
    blocking: tuple[str, ...]


def judge_model(
    base: str, sources: Sequence[Mapping], *, rehearsal: bool = False, permissions: Collection[str] = ()
) -> ModelTerms:
    """The terms of a model from its base, a Hub id, and from the sources of its training data (`list_sources`).

    `permissions` are names of sources whose owners agreed; they take away what forbids to publish, nothing else. A
    rehearsal has no base of others, and nobody will use it: it is publishable, whatever it learned from.
    """
    stated = _stated(sources)
    rules = combine_terms(stated, of="model").rules
    if rehearsal:
        return ModelTerms({"license": "other", "license_name": "rehearsal"}, rules, (), None)
    found = find_base(base)
    blocking = [*_block_base(base, found), *_block_sources(stated, permissions), *_block_mix(stated, permissions)]
    if not stated:
        blocking.append(
            "nothing is recorded of the sources of its training data: train on a dataset folder with its "
            "build_report.json"
        )
    if found is None:
        unknown = Rule("Terms of the base", f"what {base} asks for is not known to this toolkit.")
        return ModelTerms({"license": "other", "license_name": "unknown"}, (unknown, *rules), tuple(blocking), None)
    own = Rule("Terms of the base", f"{found.title}, {found.url}: {found.rule}")
    return ModelTerms(_name_terms(found, stated), (own, *rules), tuple(blocking), _write_notice(base, found))


def judge_dataset(sources: Sequence[Mapping], *, permissions: Collection[str] = ()) -> DatasetTerms:
    """The terms of a dataset from its sources; those of one source are those of a configuration."""
    stated = _stated(sources)
    terms = combine_terms(stated)
    blocking = list(_block_sources(stated, permissions))
    if not stated:
        blocking.append("it has no row of any source that its build_report.json names: build it again")
    verdict = "mixed" if is_conflict(stated) else terms.verdict
    return DatasetTerms(verdict, name_dataset_terms(stated), terms.rules, tuple(blocking))


def list_sources(stages: Sequence[Mapping]) -> list[dict]:
    """The sources of all stages of a merge certificate, each once.

    A dataset of which no sources are recorded is one without a stated licence: that stage's own, where it has none,
    and every other one that was mixed in.
    """
    entries: list[Mapping] = []
    for stage in stages:
        own = stage.get("data_sources") or []
        entries += own
        # Runs that record what their datasets hold list the sources of every one of them.
        mixture = [] if "data_contents" in stage else [entry["dataset"] for entry in stage.get("mixture") or []]
        unrecorded = [*([] if own else [stage.get("dataset")]), *(name for name in mixture if name != stage["dataset"])]
        entries += [{"name": name or "unknown", "license": None, "url": None, "rows": 1} for name in unrecorded]
    distinct: dict[tuple, dict] = {}
    for entry in entries:
        distinct.setdefault((entry["name"], entry.get("license"), entry.get("url")), dict(entry))
    return list(distinct.values())


def find_base(base: str) -> Base | None:
    """The terms of a base by its Hub id; `None` where they are not known here."""
    return next((found for pattern, found in BASES if pattern.search(base)), None)


def _stated(sources: Sequence[Mapping]) -> dict[str, str | None]:
    """What each source that gave a row states; two licences of one name are two."""
    stated: dict[str, str | None] = {}
    for source in sources:
        if source.get("rows", 1):
            name, licence = str(source["name"]), source.get("license")
            if name in stated and stated[name] != licence:
                name = f"{name} ({licence or 'not stated'})"
            stated[name] = licence
    return stated


def _source_of(name: str) -> str:
    """The source's own name, which has no blanks."""
    return name.partition(" (")[0]


def _name_terms(base: Base, stated: Mapping[str, str | None]) -> dict[str, str]:
    """What the card's metadata say: never more than base and sources allow (see above)."""
    strict = {name: text for name, text in stated.items() if _asks_more(find_licence(text))}
    if base is HAI_DEF or not strict:
        return dict(base.metadata)
    cover = find_cover(stated)
    if base is not APACHE_2:
        limits = "-and-training-data"
        return {"license": "other", "license_name": base.metadata["license"] + limits, "license_link": base.url}
    if cover and cover.hub_id:
        return {"license": cover.hub_id}
    if cover:
        return {"license": "other", "license_name": cover.name.lower(), "license_link": cover.url}
    known = [licence for text in strict.values() if (licence := find_licence(text))]
    worst = max(
        known, key=lambda own: (not own.derivatives, not own.commercial, own.share_alike, own.name), default=None
    )
    link = {"license_link": worst.url} if worst else {}
    return {"license": "other", "license_name": "mixed-training-data", **link}


def _asks_more(licence: Licence | None) -> bool:
    """Whether a licence asks for more than attribution, as far as is known."""
    return licence is None or licence.share_alike or not licence.commercial or not licence.derivatives


def _block_base(base: str, found: Base | None) -> Iterator[str]:
    if found is None:
        yield (
            f"the terms of the base {base} are not known to this toolkit: add them to BASES in "
            "dentalgemma/publishing/licences.py"
        )


def _block_sources(stated: Mapping[str, str | None], permissions: Collection[str]) -> Iterator[str]:
    for name, text in stated.items():
        licence = find_licence(text)
        if _source_of(name) in permissions or (licence and licence.derivatives):
            continue
        if not (text or "").strip():
            why = "states no licence, which grants nothing: ask its owner, then"
        elif licence is None:
            why = f"states a licence that is not known to this toolkit ({text}): read it, ask its owner, then"
        else:
            why = f"is under {licence.name}, which allows no adaptation to be shared: ask its owner, then"
        yield f"the source {name} {why} push with --permission {shlex.quote(_source_of(name))}"


def _block_mix(stated: Mapping[str, str | None], permissions: Collection[str]) -> Iterator[str]:
    """One sentence where share-alike terms exclude each other, also without the sources whose owners agreed."""
    bound = {name: text for name, text in stated.items() if _source_of(name) not in permissions}
    if is_conflict(bound):
        strict = ((name, found) for name, text in bound.items() if (found := find_licence(text)) and _asks_more(found))
        names = ", ".join(f"{name} ({found.name})" for name, found in strict)
        yield (
            f"no licence meets what all of its sources ask for ({names}): train on sources that go together, ask the "
            "owners, then push with --permission NAME for each source whose owner agreed"
        )


def _write_notice(base: str, found: Base) -> str | None:
    """The text of the NOTICE file that the base's terms ask for; `None` where they ask for none."""
    if found.sentence is None:
        return None
    parts = (
        found.sentence,
        f"Terms: {found.url}",
        found.restrictions,
        f"Modified: this model was made from {base}. Its weights were changed by training on dental data with\n"
        "DentalGemma; README.md and merge_certificate.json say which parts, on what, and how.",
    )
    return "\n\n".join(part for part in parts if part) + "\n"
