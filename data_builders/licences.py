"""Licences of data: what the common ones ask for, and what follows where several meet in one dataset.

This reads terms as a careful layman does; it is no legal advice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

CREATIVE_COMMONS = re.compile(r"cc-(?P<terms>by(?:-nc)?(?:-sa|-nd)?)-(?P<version>[1-4]\.\d)")


class Licence(NamedTuple):
    """What a licence asks for; `family` is its name without a version, `hub_id` what the Hub calls it, if it does."""

    name: str
    family: str
    hub_id: str | None
    url: str
    attribution: bool = True
    commercial: bool = True
    share_alike: bool = False
    derivatives: bool = True


def _spdx(name: str, hub_id: str, **terms: bool) -> Licence:
    return Licence(name, name, hub_id, f"https://spdx.org/licenses/{name}.html", **terms)


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
        _spdx("GPL-3.0-only", "gpl-3.0", share_alike=True),
        _spdx("GPL-3.0-or-later", "gpl-3.0", share_alike=True),
        _spdx("AGPL-3.0-only", "agpl-3.0", share_alike=True),
        _spdx("AGPL-3.0-or-later", "agpl-3.0", share_alike=True),
    )
}
HUB_CREATIVE_COMMONS = frozenset(
    {
        *("cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0"),
        *("cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"),
        *("cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0"),
    }
)


def find_licence(text: str | None) -> Licence | None:
    """The licence that a text names, however it is spelled (`CC BY-NC-SA 4.0`); `None` where it is not known here."""
    key = re.sub(r"[\s_]+", "-", (text or "").strip().casefold())
    match = CREATIVE_COMMONS.fullmatch(key)
    if not match:
        return LICENCES.get(key)
    terms, version = match["terms"], match["version"]
    return Licence(
        name=key.upper(),
        family=f"CC-{terms}".upper(),
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


def combine_terms(stated: Mapping[str, str | None]) -> Terms:
    """The terms that follow for a dataset from the licence that each of its sources states."""
    known = {source: licence for source, text in stated.items() if (licence := find_licence(text))}
    silent = [source for source, text in stated.items() if not (text or "").strip()]
    unknown = [source for source in stated if source not in known and source not in silent]
    conflicts = _find_conflicts(known)
    rules = []
    if silent:
        consent = "That grants nothing: do not pass these rows on without the consent of the owner."
        rules.append(Rule("No licence stated", f"{_list(silent)}. {consent}"))
    if unknown:
        names = _list(f"{source} ({stated[source]})" for source in unknown)
        rules.append(Rule("Terms to be read", f"{names}. What this licence asks for is not known to this toolkit."))
    rules += _ask(known)
    if conflicts:
        names = " and ".join(f"{name} ({_list(sources)})" for name, sources in conflicts.items())
        remedy = "Publish one configuration per source, each under its own terms."
        rules.append(Rule("No licence fits the whole", f"{names} cannot be met together. {remedy}"))
    distinct = {licence.name: licence for licence in known.values()}
    if silent or unknown:
        return Terms("unclear", None, tuple(rules))
    if len(distinct) == 1:
        return Terms("single", next(iter(distinct.values())).hub_id, tuple(rules))
    return Terms("mixed" if conflicts else "combined", None, tuple(rules))


def _ask(known: Mapping[str, Licence]) -> Iterator[Rule]:
    """What the known licences ask for, the strictest first."""
    if fixed := [source for source, licence in known.items() if not licence.derivatives]:
        advice = "Questions and answers on these images may well be an adaptation: ask the owner before you share them."
        yield Rule("No derivatives", f"{_list(fixed)}. {advice}")
    if private := [source for source, licence in known.items() if not licence.commercial]:
        yield Rule("No commercial use", f"{_list(private)}; therefore none of the dataset as a whole.")
    if alike := [source for source, licence in known.items() if licence.share_alike]:
        yield Rule("Share alike", f"{_list(alike)}. What is made from these rows is passed on under their own licence.")
    if named := [source for source, licence in known.items() if licence.attribution]:
        yield Rule("Attribution", f"name the authors of {_list(named)}, link to the licence, and say what was changed.")


def _find_conflicts(known: Mapping[str, Licence]) -> dict[str, list[str]]:
    """The sources, by licence, whose share-alike terms exclude each other; empty where they do not.

    Under share-alike an adaptation takes that very licence (of Creative Commons also a later version): two of them do
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
