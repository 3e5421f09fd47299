"""Evidence for a class map: what names say, which labels look alike, where findings lie, and which map fits the counts.

Nothing here changes a map. It says what does not fit, and the user decides.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np
from rapidfuzz import fuzz
from scipy.optimize import linear_sum_assignment

from data_builders.readers.files import SPLITS
from data_builders.records import Finding, ImageRecord, Problem
from data_builders.sources import Source, Vocabulary

HEALTHY = frozenset({"healthy", "normal", "sound"})
DISEASED = frozenset({"unhealthy", "abnormal", "diseased", "unsound"})
NEARLY_EQUAL = 88  # of 100; one letter more or less in nine
FAR = 0.25  # of the width: where the third molars of a panoramic lie, and the incisors never do
GRID = (24, 12)  # columns and rows of a heat map


def shown_labels(record: ImageRecord) -> list[str]:
    """The label of everything that stands in the annotation file of an image, rejected shapes too, ignored ones not."""
    return [*(finding.label for finding in record.findings), *record.rejected]


def check_names(source: Source, records: Iterable[ImageRecord], vocabulary: Vocabulary) -> Iterator[Problem]:
    """A warning for each image whose file or folder name speaks of another state or class than its annotations."""
    phrases = _class_phrases(source, vocabulary)
    for record in records:
        words = _words(_speaking_part(source, record.path))
        labels = set(shown_labels(record))
        diseases = sorted(label for label in labels if vocabulary[label].kind == "pathology")
        named = {label for phrase, label in phrases.items() if f" {phrase} " in f" {' '.join(words)} "}
        if HEALTHY & set(words) and diseases:
            message = f"its name says {_first(words, HEALTHY)!r}, its annotations say {', '.join(diseases)}"
        elif DISEASED & set(words) and not diseases:
            message = f"its name says {_first(words, DISEASED)!r}, its annotations say {_list(labels)}"
        elif named - labels:
            message = f"its name says {_list(named - labels)}, its annotations say {_list(labels)}"
        else:
            continue
        yield Problem("contradicting_name", "warning", record.path, None, f"{message}; one of them is wrong")


def _class_phrases(source: Source, vocabulary: Vocabulary) -> dict[str, str]:
    """What names of classes may look like in a file name, for diseases: `impacted tooth`, `bdc bdr`."""
    if not isinstance(source.classes, Mapping):
        return {}
    phrases = {}
    for raw, label in source.classes.items():
        if label and vocabulary[label].kind == "pathology":
            for text in (str(raw), label):
                phrase = " ".join(_words(text))
                if len(phrase) > 3:
                    phrases[phrase] = label
    return phrases


def _speaking_part(source: Source, path: Path) -> str:
    """The names that may speak of a class: of the file without Roboflow's hash, and of folders that are no split."""
    stem = path.stem.split(".rf.")[0]
    folders = path.relative_to(source.root).parts[:-1] if path.is_relative_to(source.root) else ()
    if source.reader == "class_folders":
        return stem  # its folders are the annotations
    return " ".join([*(folder for folder in folders if folder.lower() not in SPLITS), stem])


def _words(text: str) -> list[str]:
    return re.findall("[a-z]+", text.lower())


def _first(words: Sequence[str], wanted: frozenset[str]) -> str:
    return next(word for word in words if word in wanted)


def _list(labels: Iterable[str]) -> str:
    return ", ".join(sorted(labels)) or "nothing"


def check_synonyms(source: Source) -> Iterator[Problem]:
    """What several raw labels of a class map have in common: their meaning, or nearly their spelling."""
    if not isinstance(source.classes, Mapping):
        return
    by_meaning: dict[str, list[str]] = defaultdict(list)
    for raw, label in source.classes.items():
        if label:
            by_meaning[label].append(str(raw))
    for label, raws in sorted(by_meaning.items()):
        if len(raws) > 1:
            message = f"{', '.join(sorted(raws))} are all read as {label}; their counts cannot be told apart"
            yield Problem("synonyms", "info", source.root, None, message)
    raws = list(source.classes)
    for number, first in enumerate(raws):
        for second in raws[number + 1 :]:
            if source.classes[first] != source.classes[second] and _is_nearly(str(first), str(second)):
                meanings = f"{source.classes[first] or 'ignored'} and {source.classes[second] or 'ignored'}"
                message = f"labels {str(first)!r} and {str(second)!r} are spelt alike but mean {meanings}"
                yield Problem("similar_labels", "warning", source.root, None, message)


def _is_nearly(first: str, second: str) -> bool:
    """Whether two labels differ in case, punctuation, a plural or a slip of the pen only."""
    first, second = (" ".join(map(_singular, _words(text))) for text in (first, second))
    if min(len(first), len(second)) < 4:
        return False
    return first == second or fuzz.ratio(first, second) >= NEARLY_EQUAL


def _singular(word: str) -> str:
    return re.sub("ies$", "y", word.replace("teeth", "tooth")).removesuffix("s")


def count_raw_labels(source: Source, records: Iterable[ImageRecord]) -> dict[str, dict]:
    """For each raw label of the class map its meaning and how many images and findings have it.

    Where several raw labels mean the same, each carries the numbers of all, and `shared_with` names the others.
    """
    if not isinstance(source.classes, Mapping):
        return {}
    images, findings = Counter(), Counter()
    for record in records:
        for kind, labels in (("name", shown_labels(record)), ("raw", record.ignored)):
            for label, number in Counter(labels).items():
                images[kind, label] += 1
                findings[kind, label] += number
    table = {}
    for raw, label in source.classes.items():
        key = ("name", label) if label else ("raw", str(raw))
        others = [str(other) for other, name in source.classes.items() if label and name == label and other != raw]
        table[str(raw)] = {"name": label, "images": images[key], "findings": findings[key], "shared_with": others}
    return table


def suggest_class_map(source: Source, counts: Mapping[str, Mapping]) -> Iterator[Problem]:
    """The class map whose numbers of images fit the expected ones best, where that is another and the only such one.

    `counts` is what `count_raw_labels` gives. The map is suggested, never used.
    """
    expected = source.expected_images
    if not expected or not counts or any(entry["shared_with"] for entry in counts.values()):
        return
    raws, names = list(counts), list(expected)
    misfit = np.abs([[counts[raw]["images"] - expected[name] for name in names] for raw in raws]).astype(float)
    places = {name: column for column, name in enumerate(names)}
    current = [(row, places[counts[raw]["name"]]) for row, raw in enumerate(raws) if counts[raw]["name"] in places]
    rows, columns = linear_sum_assignment(misfit)
    best = list(zip(rows.tolist(), columns.tolist(), strict=True))
    if len(best) < len(names) or set(best) == set(current) or not _is_alone(misfit, best):
        return
    if _total(misfit, best) > 0.1 * sum(expected.values()):
        return  # no map fits
    told = (f"{raws[r]}: {names[c]} ({counts[raws[r]]['images']} of {expected[names[c]]})" for r, c in best)
    message = (
        f"the expected numbers of images fit another class map, and only this one: {', '.join(told)}. "
        "Nothing was changed: look at the crops of `dentalgemma audit --html`, then correct `classes` or "
        "`expected_images`; until then nothing is built"
    )
    yield Problem("class_map_suggestion", "error", source.root, None, message)


def _is_alone(misfit: np.ndarray, best: Sequence[tuple[int, int]]) -> bool:
    """Whether every other assignment fits worse."""
    for place in best:
        barred = misfit.copy()
        barred[place] = 1e9
        rows, columns = linear_sum_assignment(barred)
        if barred[rows, columns].sum() <= _total(misfit, best):
            return False
    return True


def _total(misfit: np.ndarray, pairs: Iterable[tuple[int, int]]) -> float:
    return float(sum(misfit[pair] for pair in pairs))


def describe_places(records: Iterable[ImageRecord]) -> dict[str, dict]:
    """Where the findings of each label lie, for those with a shape.

    `heat` counts centres on a grid of 12 rows of 24; `far` is the share whose centre lies more than a quarter of the
    width from the middle; `landscape` the share that is wider than high; `area` the median share of the image.
    """
    shapes: dict[str, list[tuple[Finding, ImageRecord]]] = defaultdict(list)
    for record in records:
        for finding in record.findings:
            if finding.bounds:
                shapes[finding.label].append((finding, record))
    return {label: _describe_label(items) for label, items in sorted(shapes.items())}


def _describe_label(items: Sequence[tuple[Finding, ImageRecord]]) -> dict:
    bounds = np.array([finding.bounds for finding, _ in items])
    centres = (bounds[:, :2] + bounds[:, 2:]) / 2
    sides = bounds[:, 2:] - bounds[:, :2]
    columns, rows = GRID
    heat, _, _ = np.histogram2d(centres[:, 1], centres[:, 0], bins=(rows, columns), range=((0, 1), (0, 1)))
    sized = [
        width * record.width > height * record.height
        for (width, height), (_, record) in zip(sides, items, strict=True)
        if record.width and record.height
    ]
    return {
        "findings": len(items),
        "far": round(float((np.abs(centres[:, 0] - 0.5) > FAR).mean()), 3),
        "landscape": round(float(np.mean(sized)), 3) if sized else None,
        "area": round(median((sides[:, 0] * sides[:, 1]).tolist()), 5),
        "heat": heat.astype(int).tolist(),
    }
