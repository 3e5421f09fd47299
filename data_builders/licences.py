"""Licences of data: what the common ones ask for, and what follows where several meet in one dataset or one model.

This reads terms as a careful layman does; it informs and cites, and is no legal advice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

CREATIVE_COMMONS = re.compile(r"cc-(?P<terms>by(?:-nc)?(?:-sa|-nd)?)-(?P<version>[1-4]\.\d)")


class Licence(NamedTuple):
    """What a licence asks for; `hub_id` is what the Hub calls it, if it does.

    Of one `family` are licences whose share-alike terms go together.
    """

    name: str
    family: str
    hub_id: str | None
    url: str
    attribution: bool = True
    commercial: bool = True
    share_alike: bool = False
    derivatives: bool = True


def _spdx(name: str, hub_id: str, *, family: str | None = None, **terms: bool) -> Licence:
    return Licence(name, family or name, hub_id, f"https://spdx.org/licenses/{name}.html", **terms)


LICENCES = {
    licence.name.casefold(): licence
    for licence in (
        _spdx("Apache-2.0", "apache-2.0"),
        _spdx("MIT", "mit"),
        _spdx("BSD-2-Clause", "bsd-2-clause"),
        _spdx("BSD-3-Clause", "bsd-3-clause"),
        _spdx("CC0-1.0", "cc0-1.0", attribution=False),
        _spdx("PDDL-1.0", "pddl", attribution=False),
        _spdx("ODC-By-1.0", "odc-by"),
        _spdx("ODbL-1.0", "odbl", share_alike=True),
        _spdx("CDLA-Permissive-1.0", "cdla-permissive-1.0"),
        _spdx("CDLA-Permissive-2.0", "cdla-permissive-2.0", attribution=False),
        _spdx("CDLA-Sharing-1.0", "cdla-sharing-1.0", share_alike=True),
        _spdx("GPL-3.0-only", "gpl-3.0", family="GPL-3.0", share_alike=True),
        _spdx("GPL-3.0-or-later", "gpl-3.0", family="GPL-3.0", share_alike=True),
        _spdx("AGPL-3.0-only", "agpl-3.0", family="AGPL-3.0", share_alike=True),
        _spdx("AGPL-3.0-or-later", "agpl-3.0", family="AGPL-3.0", share_alike=True),
    )
}
# Other names of these: without a word of later versions, SPDX means that very one.
NAMES = {
    "gpl-3.0": "gpl-3.0-only",
    "agpl-3.0": "agpl-3.0-only",
    "apache-license-2.0": "apache-2.0",
    "apache-license,-version-2.0": "apache-2.0",
}
HUB_CREATIVE_COMMONS = frozenset(
    {
        *("cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0"),
        *("cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"),
        *("cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0"),
    }
)


def find_licence(text: str | None) -> Licence | None:
    """The licence that a text names, however it is spelled; `None` where it is not known here.

    `CC BY-NC-SA 4.0 International` and `MIT License` are known, too.
    """
    key = re.sub(r"[\s_]+", "-", (text or "").strip().casefold())
    key = re.sub(r"-(?:licen[sc]e|international|unported)$", "", key)
    match = CREATIVE_COMMONS.fullmatch(key)
    if not match:
        return LICENCES.get(NAMES.get(key, key))
    terms, version = match["terms"], match["version"]
    return Licence(
        name=key.upper(),
        # From 2.0 on an adaptation may take a later version; 1.0 allows none but itself.
        family=f"CC-{terms}".upper() if version != "1.0" else key.upper(),
        hub_id=key if key in HUB_CREATIVE_COMMONS else None,
        url=f"https://creativecommons.org/licenses/{terms}/{version}/",
        commercial="-nc" not in terms,
        share_alike="-sa" in terms,
        derivatives="-nd" not in terms,
    )


class Rule(NamedTuple):
    """One thing that follows from licences, in plain text."""

    title: str
    text: str


class Terms(NamedTuple):
    """What applies to a whole dataset.

    `verdict` is "single" where one licence covers everything, "combined" where the strictest of several rules,
    "mixed" where no one licence can meet them all, "unclear" where a licence is not stated or not known.
    """

    verdict: Literal["single", "combined", "mixed", "unclear"]
    hub_id: str | None
    rules: tuple[Rule, ...]


What = Literal["dataset", "model"]
# Whether trained weights are an adaptation of what they learned from is not settled; a model may have to heed it all.
UNSETTLED = "Whether a model is an adaptation of its training data is not settled"


def combine_terms(stated: Mapping[str, str | None], *, of: What = "dataset") -> Terms:
    """The terms that follow for a dataset, or a model trained on it, from the licence that each source states."""
    known = _find_known(stated)
    silent = [source for source, text in stated.items() if not (text or "").strip()]
    unknown = [source for source in stated if source not in known and source not in silent]
    conflicts = _find_conflicts(known)
    rules = []
    if silent:
        what = "these rows" if of == "dataset" else "a model that learned from them"
        consent = f"That grants nothing: do not pass {what} on without the consent of the owner."
        rules.append(Rule("No licence stated", f"{_list(silent)}. {consent}"))
    if unknown:
        names = _list(f"{source} ({stated[source]})" for source in unknown)
        rules.append(Rule("Terms to be read", f"{names}. What this licence asks for is not known to this toolkit."))
    rules += _ask(known, of)
    if conflicts:
        names = " and ".join(f"{name} ({_list(sources)})" for name, sources in conflicts.items())
        remedy = (
            "Each source is published as a configuration of its own, under its own terms."
            if of == "dataset"
            else f"{UNSETTLED}; where it is, this one cannot be passed on without the consent of some of the owners."
        )
        rules.append(Rule("No licence fits the whole", f"{names} cannot be met together. {remedy}"))
    distinct = {licence.name: licence for licence in known.values()}
    if silent or unknown:
        return Terms("unclear", None, tuple(rules))
    if len(distinct) == 1:
        return Terms("single", next(iter(distinct.values())).hub_id, tuple(rules))
    return Terms("mixed" if conflicts else "combined", None, tuple(rules))


def name_dataset_terms(stated: Mapping[str, str | None]) -> dict[str, str]:
    """What a dataset card's metadata say of the terms: one licence where it covers all rows, else `LICENSE.md`.

    A source without a row must not be among them.
    """
    terms = combine_terms(stated)
    if terms.hub_id:
        return {"license": terms.hub_id}
    if terms.verdict == "single":
        licence = next(iter(_find_known(stated).values()))
        return {"license": "other", "license_name": licence.name.lower(), "license_link": licence.url}
    return {"license": "other", "license_name": "per-source", "license_link": "LICENSE.md"}


def find_cover(stated: Mapping[str, str | None]) -> Licence | None:
    """The one licence that asks for no less than any of these, or `None` where none is known to do so.

    The strictest of the stated ones is taken, of several versions the latest: under share-alike that very one must be.
    """
    known = _find_known(stated)
    if len(known) < len(stated) or _find_conflicts(known):
        return None
    strictest = max(known.values(), key=_strictness, default=None)
    if strictest is None:
        return None
    asked = _strictness(strictest)[:4]
    covers = all(a >= b for licence in known.values() for a, b in zip(asked, _strictness(licence)[:4], strict=True))
    return strictest if covers else None


def _strictness(licence: Licence) -> tuple[bool, bool, bool, bool, str]:
    asks = (not licence.derivatives, licence.share_alike, not licence.commercial, licence.attribution)
    return (*asks, licence.name.removesuffix("-or-later"))  # only that version, where one asks for it


def is_conflict(stated: Mapping[str, str | None]) -> bool:
    """Whether the share-alike terms of these exclude each other."""
    return bool(_find_conflicts(_find_known(stated)))


def _find_known(stated: Mapping[str, str | None]) -> dict[str, Licence]:
    return {source: licence for source, text in stated.items() if (licence := find_licence(text))}


def _ask(known: Mapping[str, Licence], of: What) -> Iterator[Rule]:
    """What the known licences ask for, the strictest first."""
    model = of == "model"
    if fixed := [source for source, licence in known.items() if not licence.derivatives]:
        work = "A model that learned from these images" if model else "Questions and answers on these images"
        yield Rule(
            "No derivatives", f"{_list(fixed)}. {work} may well be an adaptation: ask the owner before you share."
        )
    if private := [source for source, licence in known.items() if not licence.commercial]:
        whole = "of the model" if model else "of the dataset as a whole"
        yield Rule("No commercial use", f"{_list(private)}; therefore none {whole}.")
    if alike := [source for source, licence in known.items() if licence.share_alike]:
        how = (
            f"{UNSETTLED}; where it is, the model is passed on under their own licence."
            if model
            else "What is made from these rows is passed on under their own licence."
        )
        yield Rule("Share alike", f"{_list(alike)}. {how}")
    if named := [source for source, licence in known.items() if licence.attribution]:
        yield Rule("Attribution", f"name the authors of {_list(named)}, link to the licence, and say what was changed.")


def _find_conflicts(known: Mapping[str, Licence]) -> dict[str, list[str]]:
    """The sources, by licence, whose share-alike terms exclude each other; empty where they do not.

    Under share-alike an adaptation takes that very licence (or one of its family): two of them do
    not go together, and one that allows commercial use does not go with a source that forbids it.
    """
    alike = {source: licence for source, licence in known.items() if licence.share_alike}
    clashing = dict(alike)
    if any(licence.commercial for licence in alike.values()):
        clashing |= {source: licence for source, licence in known.items() if not licence.commercial}
    if len({licence.family for licence in clashing.values()}) < 2:
        return {}
    by_name: dict[str, list[str]] = {}
    for source, licence in clashing.items():
        by_name.setdefault(licence.name, []).append(source)
    return by_name


def _list(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
