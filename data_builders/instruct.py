"""The instruct builder: from text cases to a chat dataset in which no near duplicate crosses a split."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from data_builders.audit import SourceContent, count_problems, describe_problem, read_source
from data_builders.chat import SPLITS, SYSTEM_PROMPT, Message, Row, answer_messages
from data_builders.claims import claims_to_json
from data_builders.dataset_folder import (
    BuildError,
    check_replaceable,
    hash_file,
    new_folder,
    stop_on,
    write_jsonl,
    write_report,
    write_rows,
)
from data_builders.instruct_card import write_instruct_card
from data_builders.personal_data import find_personal_data
from data_builders.prompt_repair import MASKS, gives_away, repair_prompt
from data_builders.readers.cases import Case
from data_builders.records import Problem, Split
from data_builders.similar_prompts import NEAR_DUPLICATE, group_prompts
from data_builders.sources import Shares, Source, SourcesFile
from data_builders.splits import split_groups

TREATED = {"drop": "dropped", "mask": "masked", "keep": "kept"}  # what was done with the diagnosis in a prompt
DONE = {
    "drop": "what names it is taken out",
    "mask": "its name is masked",
    "keep": "it is kept, since the source says so",
}


@dataclass(frozen=True, slots=True)
class Item:
    """A case that is kept, as it is built.

    `case_id` is the hash of the turns as they were read, so that a case is called the same whatever is done with its
    prompt. `treated` says what was done with the diagnosis in it, `None` where there is none.
    """

    source: Source
    case: Case
    case_id: str
    treated: str | None = None


Problems = dict[str, list[Problem]]  # by the name of the source, "" for the sources file's own


def build_instruct(sources_file: SourcesFile, out: Path, *, seed: int | None = None, strict: bool = False) -> dict:
    """Build the chat dataset folder `out` from the sources with reader `cases`.

    Returns its build report, to which the list of `problems` is added; the report in the folder holds counts alone. A
    line that holds no usable case is left out and counted; with `strict` any such error stops the build instead. A
    diagnosis that stands in the prompt is dropped, masked or kept, as its source says, before cases are compared.

    Raises:
        BuildError: when there is no case to build from, or, with `strict`, on errors.
    """
    check_replaceable(out)
    seed = sources_file.seed if seed is None else seed
    contents = [read_source(source, progress=False) for source in sources_file.sources if source.reader == "cases"]
    _stop_on_errors(sources_file, contents, strict=strict)
    problems: Problems = {content.source.name: list(content.problems) for content in contents}
    repaired = list(_repair_prompts(contents, MASKS[sources_file.languages[0]], problems))
    items = _drop_duplicates(_drop_undecidable(repaired, problems), problems)
    if not items:
        raise BuildError(f"{sources_file.path}: no prompt holds more than the diagnosis; see `diagnosis_in_prompt`")
    _look_for_personal_data(items, problems)
    group_ids = group_prompts([item.case.prompt for item in items], [item.case_id for item in items])
    splits = split_cases(items, group_ids, shares=sources_file.split, seed=seed)
    problems[""] = list(_say_what_is_not_held_out(sources_file, items, group_ids, splits))
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for item, group_id in zip(items, group_ids, strict=True):
        rows[splits[group_id]].append(compose_row(item, group_id, sources_file))
    with new_folder(out) as folder:
        written = write_rows(folder, rows, {}.__getitem__)  # no row has an image to read
        write_jsonl(folder / "cases.jsonl", _list_cases(items, group_ids, splits))
        report = _report(contents, items, group_ids, splits, problems) | {
            "seed": seed,
            "splits": written,
        }
        write_instruct_card(folder, report, language=sources_file.languages[0])
        write_report(folder, report)
    return report | {"problems": [describe_problem(problem) for own in problems.values() for problem in own]}


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


def _repair_prompts(contents: Iterable[SourceContent], mask: str, problems: Problems) -> Iterator[Item]:
    """Yield the cases with what their prompts may say, and report every prompt that names its condition."""
    for content in contents:
        source = content.source
        synonyms = {_spell(condition): names for condition, names in source.synonyms.items()}
        problems[source.name] += _find_unused_synonyms(source, synonyms, content.cases)
        for case in content.cases:
            others = synonyms.get(_spell(case.condition or ""), ())
            item = Item(source, case, identify(case))
            if not case.condition or not gives_away(case.prompt, case.condition, others):
                yield item
                continue
            problems[source.name].append(_say_named(case, source))
            prompt: tuple[Message, ...] | None = case.prompt
            if source.diagnosis_in_prompt != "keep":
                prompt = repair_prompt(
                    case.prompt,
                    case.condition,
                    treatment=source.diagnosis_in_prompt,
                    synonyms=others,
                    condition_line=source.condition_line,
                    mask=mask,
                )
            if prompt:
                treated = TREATED[source.diagnosis_in_prompt]
                yield replace(item, case=replace(case, prompt=prompt), treated=treated)
            else:
                problems[source.name].append(_say_left_out(case, "nothing to ask is left without the diagnosis"))


def _say_named(case: Case, source: Source) -> Problem:
    done = DONE[source.diagnosis_in_prompt]
    message = f"the prompt names the condition, so that the answer is in the question; {done}"
    return Problem("answer_in_prompt", "warning", case.path, case.line, message)


def _say_left_out(case: Case, why: str) -> Problem:
    return Problem("nothing_left_to_ask", "warning", case.path, case.line, f"{why}; the case is left out")


def _find_unused_synonyms(source: Source, synonyms: Iterable[str], cases: Iterable[Case]) -> Iterator[Problem]:
    known = {_spell(case.condition) for case in cases if case.condition}
    for condition in sorted(set(synonyms) - known):
        message = f"`synonyms` names {condition!r}, which no case is about"
        yield Problem("unused_synonyms", "warning", source.root, None, message)


def _drop_undecidable(items: Sequence[Item], problems: Problems) -> Iterator[Item]:
    """Yield the cases but those whose prompt, once repaired, reads the same as one on another condition."""
    conditions: dict[str, set[str]] = defaultdict(set)
    for item in items:
        conditions[_read_alike(item.case.prompt)].add(_stratum(item))
    for item in items:
        if item.treated in (None, "kept") or len(conditions[_read_alike(item.case.prompt)]) == 1:
            yield item
        else:
            why = "without the diagnosis the prompt is the same as one on another condition"
            problems[item.source.name].append(_say_left_out(item.case, why))


def _drop_duplicates(items: Iterable[Item], problems: Problems) -> list[Item]:
    """Every case once, the first where it is there several times, as read or as repaired; a problem for each other."""
    first: dict[str, Item] = {}
    unique = []
    for item in items:
        keys = {item.case_id, identify(item.case)}
        kept = next((first[key] for key in sorted(keys) if key in first), None)
        for key in keys:
            first.setdefault(key, kept or item)
        if kept is None:
            unique.append(item)
        else:
            where = f"{_below(kept.source.root, kept.case.path)}:{kept.case.line}"
            message = f"is the same case as {where}; built once"
            problem = Problem("duplicate_case", "warning", item.case.path, item.case.line, message)
            problems[item.source.name].append(problem)
    return unique


def identify(case: Case) -> str:
    """The hash of a case's turns; case of letters, spacing and the system prompt do not count.

    Punctuation counts: `percussion +` and `percussion -` are not the same finding.
    """
    text = _read_alike([*case.prompt, {"role": "assistant", "content": case.answer}])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_alike(turns: Iterable[Message]) -> str:
    """Turns in the form in which they are compared."""
    lines = [f"{turn['role']}: {turn['content']}" for turn in turns if turn["role"] != "system"]
    return " ".join(unicodedata.normalize("NFKC", "\n".join(lines)).casefold().split())


def _look_for_personal_data(items: Iterable[Item], problems: Problems) -> None:
    for item in items:
        if item.source.pii == "off":
            continue
        kinds = find_personal_data([*(turn["content"] for turn in item.case.prompt), item.case.answer])
        if kinds:
            message = f"seems to hold personal data ({', '.join(kinds)}); look at it, and take it out at the source"
            problem = Problem("pii", "warning", item.case.path, item.case.line, message)
            problems[item.source.name].append(problem)


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
    """Where each row comes from and what it is about, in the order of the row ids.

    Files are told by their content (the first 16 digits of its SHA-256), since their names may be those of patients.
    """
    hashes = {path: hash_file(path)[:16] for path in {item.case.path for item in items}}
    cases = [
        {
            "row_id": item.case_id,
            "group_id": group_id,
            "split": splits[group_id],
            "source": item.source.name,
            "condition": item.case.condition,
            "diagnosis_in_prompt": item.treated,
            "file": hashes[item.case.path],
            "line": str(item.case.line),
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
    problems: Problems,
) -> dict:
    conditions: dict[str, Counter[str]] = defaultdict(Counter)
    for item, group_id in zip(items, group_ids, strict=True):
        conditions[_stratum(item)][splits[group_id]] += 1
    sizes = Counter(group_ids)
    all_problems = [problem for own in problems.values() for problem in own]
    return {
        "sources": [_report_source(content, items, problems[content.source.name]) for content in contents],
        "conditions": {name: {s: counts[s] for s in SPLITS} for name, counts in sorted(conditions.items())},
        "statistics": _count_words(items, [splits[group_id] for group_id in group_ids]),
        "diagnosis_in_prompt": {done: sum(item.treated == done for item in items) for done in TREATED.values()},
        "groups": {"count": len(sizes), "largest": max(sizes.values()), "near_duplicate": NEAR_DUPLICATE},
        "problem_counts": count_problems(all_problems),
        "severities": dict(sorted(Counter(problem.severity for problem in all_problems).items())),
    }


def _count_words(items: Sequence[Item], splits: Sequence[Split]) -> dict[str, dict[str, float]]:
    """What each split holds: conditions, lengths in words, and the share of answers that are there once only."""
    statistics = {}
    for split in SPLITS:
        own = [item for item, its in zip(items, splits, strict=True) if its == split]
        if own:
            prompts = [
                " ".join(turn["content"] for turn in item.case.prompt if turn["role"] != "system") for item in own
            ]
            answers = Counter(" ".join(item.case.answer.split()) for item in own)
            statistics[split] = {
                "cases": len(own),
                "conditions": len({_stratum(item) for item in own if item.case.condition}),
                "without_condition": sum(item.case.condition is None for item in own),
                "median_prompt_words": median(len(prompt.split()) for prompt in prompts),
                "median_answer_words": median(len(item.case.answer.split()) for item in own),
                "unique_answers": round(sum(number == 1 for number in answers.values()) / len(own), 4),
            }
    return statistics


def _report_source(content: SourceContent, items: Sequence[Item], problems: Sequence[Problem]) -> dict:
    source = content.source
    return {
        "name": source.name,
        "reader": source.reader,
        "license": source.license,
        "url": source.url,
        "pii": source.pii,
        "cases": len(content.cases),
        "rows": sum(item.source is source for item in items),
        "problem_counts": count_problems(problems),
    }
