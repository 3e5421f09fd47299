"""Other data mixed into a stage's training rows, against forgetting: so much of each as the YAML says."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from datasets import Dataset, DatasetDict, Features, List, Value, concatenate_datasets

from data_builders.records import InputError

if TYPE_CHECKING:
    from dentalgemma.training.config import StageConfig

TEXTS = ("prompt", "completion")
PLAIN = List({"role": Value("string"), "content": Value("string")})
IN_PARTS = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})


class Mixed(DatasetDict):
    """Splits whose training rows come from several datasets; `mixture` says how many from which."""

    mixture: Sequence[Mapping] = ()


def mix_in(splits: DatasetDict, others: Sequence[Dataset], stage: StageConfig) -> Mixed:
    """Every training row of `splits`, and of each other dataset so many that its weight is its share of the whole.

    The choice follows from `mix_seed` alone. No row comes twice while there are enough. Nothing copies an image:
    the texts are rewritten where their form differs, the rest is told by number.

    Raises:
        InputError: for a dataset without chat rows.
    """
    main = splits[stage.dataset_train_split]
    names = [stage.dataset_name, *stage.mix_datasets]
    datasets = [main, *(_with_chat_columns(other, name) for other, name in zip(others, names[1:], strict=True))]
    form = IN_PARTS if any(_has_parts(dataset) for dataset in datasets) else PLAIN
    datasets = [_with_texts_as(form, dataset, name) for dataset, name in zip(datasets, names, strict=True)]
    whole = len(main) / (1 - sum(stage.mix_weights))
    counts = [len(main), *(round(weight * whole) for weight in stage.mix_weights)]
    chosen, offset = [], 0
    for number, (dataset, count) in enumerate(zip(datasets, counts, strict=True)):
        rng = random.Random(f"{stage.mix_seed}/{number}")
        chosen += [offset + place for place in (_choose(len(dataset), count, rng) if number else range(count))]
        offset += len(dataset)
    random.Random(f"{stage.mix_seed}").shuffle(chosen)  # for a run that takes the rows in their order
    mixed = Mixed(splits)
    mixed[stage.dataset_train_split] = concatenate_datasets(datasets).select(chosen)
    weights = [1 - sum(stage.mix_weights), *stage.mix_weights]
    mixed.mixture = [
        {"dataset": name, "rows": count, "available": len(dataset), "weight": weight, "fingerprint": fingerprint}
        for name, count, dataset, weight, fingerprint in zip(
            names, counts, datasets, weights, [rows._fingerprint for rows in (main, *others)], strict=True
        )
    ]
    return mixed


def describe_mixture(mixture: Sequence[Mapping]) -> str:
    """One line: how many rows of each dataset, and which are repeated."""
    total = sum(entry["rows"] for entry in mixture)
    parts = []
    for entry in mixture:
        times = entry["rows"] / entry["available"]
        again = f", each of its {entry['available']:,} about {times:.1f} times" if times > 1 else ""
        name = Path(entry["dataset"]).name
        parts.append(f"{name} {entry['rows']:,} ({entry['rows'] / total:.0%}{again})")
    return f"{total:,} training rows: {', '.join(parts)}"


def _choose(available: int, wanted: int, rng: random.Random) -> list[int]:
    """Numbers of `wanted` rows: each as often as any other, give or take one."""
    rounds, rest = divmod(wanted, available)
    return [*range(available)] * rounds + sorted(rng.sample(range(available), rest))


def _with_chat_columns(dataset: Dataset, name: str) -> Dataset:
    """The columns that training needs, whatever else there is: prompt, completion, row_id, and images if it has any."""
    if not len(dataset):
        raise InputError(f"{name} has no rows to mix in")
    if set(TEXTS) <= set(dataset.column_names):
        columns = TEXTS
    elif "messages" in dataset.column_names:
        columns = ("messages",)
    else:
        raise InputError(f"{name} has neither `prompt` and `completion` nor `messages`, so it cannot be mixed in")
    ids = [f"{Path(name).name}/{number}" for number in range(len(dataset))]
    if "row_id" in dataset.column_names:
        ids = [str(row_id) for row_id in dataset["row_id"]]
    kept = [column for column in ("images", *columns) if column in dataset.column_names]
    return dataset.select_columns(kept).add_column("row_id", ids)


def _has_parts(dataset: Dataset) -> bool:
    """Whether messages hold lists of parts instead of texts."""
    for column in {*TEXTS, "messages"} & set(dataset.column_names):
        feature = dataset.features[column]
        fields = getattr(feature, "feature", None)
        content = fields.get("content") if isinstance(fields, dict) else None
        if Value("string") not in (feature, content):
            return True
    return False


def _with_texts_as(form: List, dataset: Dataset, name: str) -> Dataset:
    """The same rows with `prompt` and `completion` in one form; the other columns are not touched."""
    columns = [column for column in (*TEXTS, "messages") if column in dataset.column_names]
    if columns == [*TEXTS] and all(dataset.features[column] == form for column in TEXTS):
        return dataset
    texts = dataset.select_columns([column for column in (*columns, "row_id") if column in dataset.column_names])
    texts = texts.map(
        lambda row: _as_prompt_and_completion(row, name, in_parts=form is IN_PARTS),
        remove_columns=texts.column_names,
        features=Features(dict.fromkeys(TEXTS, form)),
        desc=f"Reading the dialogues of {Path(name).name}",
    )
    return concatenate_datasets([dataset.remove_columns(columns), texts], axis=1)


def _as_prompt_and_completion(row: Mapping, name: str, *, in_parts: bool) -> dict[str, list[dict]]:
    prompt, completion = row.get("prompt"), row.get("completion")
    if "messages" in row:
        answers = [number for number, message in enumerate(row["messages"]) if message["role"] == "assistant"]
        if not answers or answers[-1] == 0:
            raise InputError(f"{name}: row {row['row_id']} has no answer to a question among its messages")
        prompt, completion = row["messages"][: answers[-1]], [row["messages"][answers[-1]]]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    texts = {"prompt": prompt, "completion": completion}
    return {column: [_message(message, in_parts=in_parts) for message in texts[column]] for column in TEXTS}


def _message(message: Mapping, *, in_parts: bool) -> dict:
    content = message["content"]
    if in_parts:
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        content = [{"type": part["type"], "text": part.get("text")} for part in parts]
    return {"role": message["role"], "content": content}
