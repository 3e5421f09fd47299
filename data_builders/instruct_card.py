"""The card of an instruct dataset, rendered from its build report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from data_builders.dataset_card import escape_markdown, link, write_terms
from data_builders.dataset_folder import Configuration, write_card
from data_builders.licences import combine_terms, name_dataset_terms


def write_instruct_card(folder: Path, report: Mapping, *, language: str) -> None:
    """Write `README.md` with metadata for the Hub."""
    stated = {source["name"]: source["license"] for source in report["sources"] if source["rows"]}
    terms = combine_terms(stated)
    write_terms(folder, report["sources"])
    told = (*_contents(report), *_loading(report), *_licences(report, terms.rules), *_limits(report))
    parts = ("# Dental instruct dataset", *told)
    write_card(
        folder,
        "\n\n".join(parts) + "\n",
        {"default": Configuration("data", report["splits"], with_images=False)},
        language=[language],
        task_categories=["text-generation"],
        tags=["dental", "medical", "instruct", "dentalgemma"],
        **name_dataset_terms(stated),
    )


def _contents(report: Mapping) -> Iterator[str]:
    yield (
        "Clinical cases as chat, for training on text alone. Made with DentalGemma; `cases.jsonl` tells which "
        "condition each row is about, and which line of which file it comes from, told by the first 16 digits of the "
        "file's SHA-256."
    )
    yield "\n".join(
        [
            "| split | rows | conditions | words of a prompt | words of an answer | answers that stand once |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
            *(
                f"| {split} | {own['cases']} | {own['conditions']} | {own['median_prompt_words']:g} | "
                f"{own['median_answer_words']:g} | {own['unique_answers']:.1%} |"
                for split, own in report["statistics"].items()
            ),
        ]
    )
    yield (
        "> **Research and education only.** Cases and answers are those of the sources; nobody checked them here. They "
        "are no advice for a patient, and a model trained on them is no medical device."
    )
    yield (
        "Words are medians. Exact duplicates are kept once. Cases whose prompts share "
        f"{report['groups']['near_duplicate']:.0%} of their word triples or more lie in one split."
    )
    yield "## Conditions"
    yield "\n".join(
        [
            "| condition | train | validation | test |",
            "| --- | ---: | ---: | ---: |",
            *(
                f"| {escape_markdown(name)} | {' | '.join(map(str, counts.values()))} |"
                for name, counts in report["conditions"].items()
            ),
        ]
    )
    yield "## The diagnosis in the prompt"
    yield " ".join(_describe_repairs(report))


def _describe_repairs(report: Mapping) -> Iterator[str]:
    counts, done = report["problem_counts"], report["diagnosis_in_prompt"]
    yield f"{counts.get('answer_in_prompt', 0)} cases named their condition in the prompt."
    if done["dropped"]:
        yield f"In {done['dropped']} rows what names it was taken out."
    if done["masked"]:
        yield f"In {done['masked']} rows its name was masked."
    if left_out := counts.get("nothing_left_to_ask", 0):
        yield f"{left_out} cases asked nothing without it and were left out."
    yield f"{done['kept']} rows name it still."
    if unknown := sum(own["without_condition"] for own in report["statistics"].values()):
        yield f"{unknown} rows state no condition, so that nobody can tell."


def _loading(report: Mapping) -> Iterator[str]:
    yield "## How to load"
    yield (
        "```python\nfrom datasets import load_dataset\n\n"
        f'rows = load_dataset("OWNER/NAME", split="{next(iter(report["splits"]))}")  '
        "# OWNER/NAME: this repository, or its folder\n"
        'rows[0]["prompt"], rows[0]["completion"]  # what TRL trains on as it is\n```'
    )


def _licences(report: Mapping, rules: tuple) -> Iterator[str]:
    yield "## Sources and licences"
    yield "\n".join(
        [
            "| source | cases read | rows | licence | from |",
            "| --- | ---: | ---: | --- | --- |",
            *(
                f"| {escape_markdown(source['name'])} | {source['cases']} | {source['rows']} | "
                f"{escape_markdown(source['license'] or 'not stated')} | {link(source['url'])} |"
                for source in report["sources"]
            ),
        ]
    )
    yield "The rows of each source stay under that source's licence ([`LICENSE.md`](LICENSE.md))."
    if rules:
        yield "\n".join(f"- **{rule.title}**: {escape_markdown(rule.text)}" for rule in rules)


def _limits(report: Mapping) -> Iterator[str]:
    yield "## Limits"
    unsearched = [source["name"] for source in report["sources"] if source["pii"] == "off"]
    found = report["problem_counts"].get("pii", 0)
    sentences = [
        "The answers are the sources' own; nobody checked them. Not for diagnosis; for research and education.",
        "Near synonyms of a condition are known only where the sources file lists them.",
        f"A search with light patterns found signs of personal data in {found} cases; it proves no absence.",
        *([f"Not searched: {', '.join(map(escape_markdown, unsearched))}."] if unsearched else []),
    ]
    yield " ".join(sentences)
    yield f"Built with seed {report['seed']}."
