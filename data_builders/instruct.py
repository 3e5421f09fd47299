"""The instruct builder: from text cases to a chat dataset in which no near duplicate crosses a split."""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from data_builders.audit import SourceContent, count_problems, read_source
from data_builders.chat import SPLITS, SYSTEM_PROMPT, Message, Row, answer_messages
from data_builders.claims import claims_to_json
from data_builders.dataset_folder import (
    BuildError,
    new_folder,
    stop_on,
    write_card,
    write_jsonl,
    write_report,
    write_rows,
)
from data_builders.readers.cases import Case
from data_builders.records import Problem, Split
from data_builders.sources import Shares, Source, SourcesFile
from data_builders.splits import Groups, split_groups

NEAR_DUPLICATE = 0.7  # share of common word triples; another age, sex and one more word in a case of 40 words reach it
SHINGLE = 3  # words
WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True, slots=True)
class Item:
    """A case that is kept, and its identity: the hash of its turns without the system prompt, however it is spaced."""

    source: Source
    case: Case
    case_id: str


def build_instruct(sources_file: SourcesFile, out: Path, *, seed: int | None = None, strict: bool = False) -> dict:
    """Build the chat dataset folder `out` from the sources with reader `cases` and return its build report.

    A line that holds no usable case is left out and counted; with `strict` any such error stops the build instead.

    Raises:
        BuildError: when there is no case to build from, or, with `strict`, on errors.
    """
    seed = sources_file.seed if seed is None else seed
    contents = [read_source(source, progress=False) for source in sources_file.sources if source.reader == "cases"]
    _stop_on_errors(sources_file, contents, strict=strict)
    problems = {content.source.name: list(content.problems) for content in contents}
    items = _drop_duplicates(contents, problems)
    for item in items:
        problems[item.source.name] += _find_answer_in_prompt(item.case)
    group_ids = group_cases(items)
    splits = split_cases(items, group_ids, shares=sources_file.split, seed=seed)
    problems[""] = list(_say_what_is_not_held_out(sources_file, items, group_ids, splits))
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for item, group_id in zip(items, group_ids, strict=True):
        rows[splits[group_id]].append(compose_row(item, group_id, sources_file))
    with new_folder(out) as folder:
        written = write_rows(folder, rows, {}.__getitem__)  # no row has an image to read
        write_jsonl(folder / "cases.jsonl", _list_cases(items, group_ids, splits))
        report = _report(contents, items, group_ids, splits, problems) | {"seed": seed, "splits": written}
        body = _card(report, sources_file)
        write_card(folder, body, written, with_images=False, **_card_data(sources_file))
        write_report(folder, report)
    return report


def _stop_on_errors(sources_file: SourcesFile, contents: Sequence[SourceContent], *, strict: bool) -> None:
    if not contents:
        raise BuildError(f"{sources_file.path}: no source has `reader: cases`; for images run `dentalgemma build`")
    errors = [p for content in contents for p in content.problems if p.severity == "error"]
    if strict:
        stop_on(errors)
    if not any(content.cases for content in contents):
        why = f"{sources_file.path}: no usable case in any source"
        stop_on(errors, why)
        raise BuildError(why)


def _drop_duplicates(contents: Iterable[SourceContent], problems: Mapping[str, list[Problem]]) -> list[Item]:
    """Every case once, the first where it is there several times; a problem for each other."""
    first: dict[str, Item] = {}
    for content in contents:
        for case in content.cases:
            item = Item(content.source, case, identify(case))
            kept = first.setdefault(item.case_id, item)
            if kept is not item:
                message = f"is the same case as {kept.case.where}; built once"
                problem = Problem("duplicate_case", "warning", case.path, case.line, message)
                problems[content.source.name].append(problem)
    return list(first.values())


def identify(case: Case) -> str:
    """The hash of a case's turns; case of letters, spacing and the system prompt do not count.

    Punctuation counts: `percussion +` and `percussion -` are not the same finding.
    """
    turns = [f"{turn['role']}: {turn['content']}" for turn in case.prompt if turn["role"] != "system"]
    text = unicodedata.normalize("NFKC", "\n".join([*turns, case.answer])).casefold()
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:16]


def group_cases(items: Sequence[Item]) -> list[str]:
    """The group id of each case: cases whose prompts are near duplicates, directly or over others, get the same.

    Prompts are compared, not answers: answers on one condition are alike in any good dataset, and a question that was
    seen in training is what leaks.
    """
    same: dict[frozenset, int] = {}
    numbers = [same.setdefault(_shingles(item.case.prompt), len(same)) for item in items]
    groups = Groups()
    for first, second in find_near_duplicates(list(same), NEAR_DUPLICATE, known=groups):
        groups.join(first, second)
    names: dict[object, str] = {}
    for item, number in zip(items, numbers, strict=True):
        root = groups.find(number)
        names[root] = min(names.get(root, item.case_id), item.case_id)
    return [names[groups.find(number)] for number in numbers]


def _shingles(prompt: Iterable[Message]) -> frozenset[tuple[str, ...]]:
    """The word triples of a prompt; all numbers are one word, since another age does not make another case."""
    text = " ".join(turn["content"] for turn in prompt if turn["role"] != "system")
    words = ["0" if word.isdecimal() else word for word in _words(text)]
    return frozenset(zip(*(words[start:] for start in range(SHINGLE)), strict=False)) or frozenset([tuple(words)])


def find_near_duplicates(sets: Sequence[Set], threshold: float, *, known: Groups) -> Iterator[tuple[int, int]]:
    """Yield the pairs of sets whose Jaccard similarity is `threshold` or more, except those that `known` has joined.

    Exact, unlike MinHash: sets that are alike must share one of their rarest members, so that only those which do are
    compared (prefix filtering: Bayardo, Ma and Srikant 2007; shorter prefixes for the index: Xiao et al. 2008).
    """
    frequency = Counter(member for members in sets for member in members)
    rank = {member: number for number, member in enumerate(sorted(frequency, key=lambda m: (frequency[m], m)))}
    ranked = [sorted(map(rank.__getitem__, members)) for members in sets]
    compared = list(map(frozenset, ranked))
    index: dict[int, list[int]] = defaultdict(list)
    for number in sorted(range(len(sets)), key=lambda number: len(sets[number])):
        members, size = ranked[number], len(ranked[number])
        least = threshold * size - 1e-9  # sharing fewer than this, or being smaller, rules a pair out
        candidates = {other for member in members[: size - math.ceil(least) + 1] for other in index[member]}
        for other in sorted(candidates):
            if len(ranked[other]) >= least and known.find(number) != known.find(other):
                common = len(compared[number] & compared[other])
                if common >= threshold * (size + len(ranked[other]) - common) - 1e-9:
                    yield number, other
        for member in members[: size - math.ceil(2 * threshold / (1 + threshold) * size - 1e-9) + 1]:
            index[member].append(number)


def split_cases(items: Sequence[Item], group_ids: Sequence[str], *, shares: Shares, seed: int) -> dict[str, Split]:
    """Which split each group goes to, condition by condition; every condition gets a group in train."""
    splits = split_groups(group_ids, [_stratum(item) for item in items], shares=shares, seed=seed)
    if not shares.train:
        return splits
    groups: dict[str, set[str]] = defaultdict(set)
    for item, group_id in zip(items, group_ids, strict=True):
        groups[_stratum(item)].add(group_id)
    for _, own in sorted(groups.items()):
        # A group that holds several conditions is dealt out with one of them only.
        if all(splits[group_id] != "train" for group_id in own):
            splits[min(own)] = "train"
    return splits


def _stratum(item: Item) -> str:
    """The condition however it is spelled; where none is stated, the source."""
    return _spell(item.case.condition) if item.case.condition else f"(none: {item.source.name})"


def _spell(condition: str) -> str:
    return " ".join(condition.replace("_", " ").casefold().split())


def _words(text: str) -> list[str]:
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _find_answer_in_prompt(case: Case) -> Iterator[Problem]:
    """One problem where a user turn names the condition: the answer is then in the question."""
    name = re.sub(r"\([^)]*\)", " ", case.condition or "")  # as in `dental caries (K02.9)`
    words = _words(name) or _words(case.condition or "")
    if not any(word.isalpha() for word in words):
        return  # a number for a name stands in many prompts and gives nothing away
    text = " ".join(_words(" ".join(turn["content"] for turn in case.prompt if turn["role"] == "user")))
    if f" {' '.join(words)} " in f" {text} ":
        message = "the prompt names the condition, so that the answer is in the question; take it out of the prompt"
        yield Problem("answer_in_prompt", "warning", case.path, case.line, message)


def _say_what_is_not_held_out(
    sources_file: SourcesFile, items: Sequence[Item], group_ids: Sequence[str], splits: Mapping[str, Split]
) -> Iterator[Problem]:
    filled = {splits[group_id] for group_id in group_ids}
    for split in SPLITS:
        if getattr(sources_file.split, split) > 0 and split not in filled:
            message = f"split {split} is empty: there are too few groups of cases that are not near duplicates"
            yield Problem("empty_split", "warning", sources_file.path, None, message)
    groups: dict[str, set[str]] = defaultdict(set)
    for item, group_id in zip(items, group_ids, strict=True):
        groups[_stratum(item)].add(group_id)
    for condition, own in sorted(groups.items()):
        if {splits[group_id] for group_id in own} == {"train"} and filled > {"train"}:
            reason = "its only case, or all its cases near duplicates of each other" if len(own) == 1 else "all of them"
            message = f"condition {condition!r} is in no split but train ({reason}): its answers cannot be tested"
            yield Problem("condition_not_held_out", "warning", sources_file.path, None, message)


def compose_row(item: Item, group_id: str, sources_file: SourcesFile) -> Row:
    """The row of a case; it keeps its own system prompt, else gets that of the sources file or the toolkit."""
    prompt = list(item.case.prompt)
    system_prompt = SYSTEM_PROMPT if sources_file.system_prompt is None else sources_file.system_prompt
    if system_prompt and prompt[0]["role"] != "system":
        prompt.insert(0, {"role": "system", "content": system_prompt})
    return Row(
        images=[],
        prompt=prompt,
        completion=answer_messages(item.case.answer),
        row_id=item.case_id,
        image_id=None,
        group_id=group_id,
        source=item.source.name,
        license=item.source.license,
        language=sources_file.languages[0],
        question_type="case",
        claims=claims_to_json(()),
    )


def _list_cases(items: Sequence[Item], group_ids: Sequence[str], splits: Mapping[str, Split]) -> list[dict]:
    """Where each row comes from and what it is about, in the order of the row ids; no absolute paths."""
    cases = [
        {
            "row_id": item.case_id,
            "group_id": group_id,
            "split": splits[group_id],
            "source": item.source.name,
            "condition": item.case.condition,
            "where": f"{_below(item.source.root, item.case.path)}:{item.case.line}",
        }
        for item, group_id in zip(items, group_ids, strict=True)
    ]
    return sorted(cases, key=lambda case: case["row_id"])


def _below(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def _report(
    contents: Sequence[SourceContent],
    items: Sequence[Item],
    group_ids: Sequence[str],
    splits: Mapping[str, Split],
    problems: Mapping[str, Sequence[Problem]],
) -> dict:
    conditions: dict[str, Counter[str]] = defaultdict(Counter)
    for item, group_id in zip(items, group_ids, strict=True):
        conditions[_stratum(item)][splits[group_id]] += 1
    sizes = Counter(group_ids)
    all_problems = [problem for own in problems.values() for problem in own]
    return {
        "sources": [_report_source(content, items, problems[content.source.name]) for content in contents],
        "conditions": {name: {s: counts[s] for s in SPLITS} for name, counts in sorted(conditions.items())},
        "groups": {"count": len(sizes), "largest": max(sizes.values()), "near_duplicate": NEAR_DUPLICATE},
        "problem_counts": count_problems(all_problems),
        "severities": dict(sorted(Counter(problem.severity for problem in all_problems).items())),
    }


def _report_source(content: SourceContent, items: Sequence[Item], problems: Sequence[Problem]) -> dict:
    source = content.source
    return {
        "name": source.name,
        "reader": source.reader,
        "license": source.license,
        "url": source.url,
        "cases": len(content.cases),
        "rows": sum(item.source is source for item in items),
        "problem_counts": count_problems(problems),
    }


def _card_data(sources_file: SourcesFile) -> dict:
    return {
        "language": [sources_file.languages[0]],
        "task_categories": ["text-generation"],
        "tags": ["dental", "medical", "instruct", "dentalgemma"],
        "license": "other",
        "license_name": "per-source",
        "license_link": "#sources-and-licences",
    }


def _card(report: Mapping, sources_file: SourcesFile) -> str:
    lines = [
        "# Dental instruct dataset",
        "",
        "Clinical cases as chat, for training on text alone. Made with DentalGemma; `cases.jsonl` tells which line of "
        "which source each row comes from and which condition it is about.",
        "",
        "| split | rows |",
        "| --- | ---: |",
        *(f"| {split} | {counts['rows']} |" for split, counts in report["splits"].items()),
        "",
        f"Exact duplicates are kept once. Cases whose prompts share {NEAR_DUPLICATE:.0%} of their word triples or more "
        "lie in one split.",
        "",
        "## Sources and licences",
        "",
        "| source | cases read | rows | licence |",
        "| --- | ---: | ---: | --- |",
    ]
    for source in report["sources"]:
        licence = source["license"] or "not stated"
        lines.append(f"| {source['name']} | {source['cases']} | {source['rows']} | {licence} |")
    lines += [
        "",
        "The rows of each source stay under that source's licence. A licence that is not stated grants nothing.",
        "",
        "## Conditions",
        "",
        "| condition | train | validation | test |",
        "| --- | ---: | ---: | ---: |",
        *(f"| {_escape(name)} | {' | '.join(map(str, c.values()))} |" for name, c in report["conditions"].items()),
        "",
        "## Limits",
        "",
        f"{report['problem_counts'].get('answer_in_prompt', 0)} rows name the condition in their prompt. "
        "The answers are the sources' own; nobody checked them. Not for diagnosis; for research and education.",
        "",
        f"Built from `{sources_file.path.name}` with seed {report['seed']}.",
    ]
    return "\n".join(lines) + "\n"


def _escape(cell: str) -> str:
    return cell.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
