"""How far a judge can be trusted: a blind sample for a person to judge, and how the two agree."""

from __future__ import annotations

import csv
import io
import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from dentalgemma.evaluation.files import read_text, write_whole
from dentalgemma.evaluation.judge import identify, read_answers
from dentalgemma.evaluation.questions import EvaluationError
from dentalgemma.evaluation.statistics import wilson_interval

AUDIT_COLUMNS = ("item_id", "question", "reference", "answer", "verdict", "answer_sha256")


def agreement(verdicts: Mapping[str, dict], human: Path, *, draws: int = 1_000, seed: int = 0) -> dict:
    """How a judge's verdicts agree with a person's: Cohen's kappa with a 95 % interval, and the plain share.

    `human` is CSV or JSONL with `item_id` and `verdict` (correct, incorrect, or empty where not filled in). The
    interval is a percentile bootstrap over items, taken as independent. Kappa depends on how common right answers are,
    so it is to be read beside `prevalence` and the plain share; where judge and person both gave a single verdict
    throughout it is undefined: null, with the reason. Judge errors and items without counterpart are counted, no more.

    Raises:
        EvaluationError: for a file that cannot be read, another answer than was judged, or no item in common.
    """
    by_person = read_human(human)
    for item_id, (_, answer_sha256) in by_person.items():
        if answer_sha256 and item_id in verdicts and verdicts[item_id].get("answer_sha256") != answer_sha256:
            raise EvaluationError(f"{human}: item {item_id}: the person read another answer than the judge")
    filled = {item_id: verdict for item_id, (verdict, _) in by_person.items() if verdict}
    errors = {item_id for item_id, line in verdicts.items() if line["verdict"] == "judge_error"}
    shared = sorted(item_id for item_id in filled if item_id in verdicts and item_id not in errors)
    if not shared:
        raise EvaluationError(f"{human}: no item that both a person and the judge gave a verdict")
    pairs = Counter((filled[item_id], verdicts[item_id]["verdict"]) for item_id in shared)
    names = ("correct", "incorrect")
    table = np.array([[pairs[person, judge] for judge in names] for person in names])
    n, agreed = len(shared), int(np.trace(table))
    drawn = np.random.default_rng(seed).multinomial(n, table.ravel() / n, size=draws).reshape(draws, 2, 2)
    kappas = cohens_kappa(drawn)
    defined = kappas[np.isfinite(kappas)]
    kappa = float(cohens_kappa(table))
    undefined = None if np.isfinite(kappa) else "both gave one and the same verdict throughout: chance alone agrees"
    return {
        "format": "agreement/1",
        "n": n,
        "agreement": agreed / n,
        "agreement_wilson": list(wilson_interval(agreed, n)),
        "kappa": kappa if undefined is None else None,
        "kappa_interval": np.percentile(defined, [2.5, 97.5]).tolist() if undefined is None else None,
        "kappa_undefined": undefined,
        "bootstrap": {"draws": draws, "seed": seed, "undefined": int(draws - defined.size)},
        "confusion": {person: {judge: pairs[person, judge] for judge in names} for person in names},
        "prevalence": {"human": int(table[0].sum()) / n, "judge": int(table[:, 0].sum()) / n},
        "left_out": {
            "not_filled_in": len(by_person) - len(filled),
            "judge_errors": sum(item_id in errors for item_id in filled),
            "not_judged": sum(item_id not in verdicts for item_id in filled),
            "not_audited": sum(item_id not in filled for item_id in verdicts),
        },
    }


def cohens_kappa(table: np.ndarray) -> np.ndarray:
    """Kappa of one or many tables of counts, `[…, rater one, rater two]`; NaN where chance agreement is complete."""
    table = np.asarray(table, dtype=float)
    n = table.sum(axis=(-2, -1))
    observed = np.trace(table, axis1=-2, axis2=-1) / n
    expected = (table.sum(axis=-1) * table.sum(axis=-2)).sum(axis=-1) / n**2
    room = 1 - expected
    return np.where(room > 0, (observed - expected) / np.where(room > 0, room, 1), np.nan)


def write_audit_sample(
    verdicts: Mapping[str, dict], predictions: Path, questions: Path, *, out: Path, n: int = 100, seed: int = 0
) -> int:
    """Write a CSV for a person to judge the same answers, and return its length; `agreement` reads it when filled in.

    It is blind (neither model nor verdict is named, and the order is shuffled) and stratified: each verdict has its
    share, so that kappa of the sample estimates kappa of all. The same seed draws the same items. A text that a
    spreadsheet would take for a formula is led by an apostrophe.

    Raises:
        EvaluationError: when `out` is there, which may be somebody's work, or a verdict is of another answer.
    """
    if Path(out).exists():
        raise EvaluationError(f"{out} is there already and may be filled in; choose another name")
    answers = {item.item_id: (item, answer) for item, answer in read_answers(Path(predictions), Path(questions))}
    strata: dict[str, list[str]] = {"correct": [], "incorrect": []}
    for item_id in sorted(verdicts):
        line = verdicts[item_id]
        if item_id not in answers or identify(*answers[item_id])["answer_sha256"] != line["answer_sha256"]:
            raise EvaluationError(f"item {item_id}: the verdict is not of the answer in {predictions}")
        if line["verdict"] in strata and line.get("method") != "empty":
            strata[line["verdict"]].append(item_id)
    rng = random.Random(f"audit/{seed}")
    chosen = [item_id for name, count in _share_out(strata, n).items() for item_id in rng.sample(strata[name], k=count)]
    rng.shuffle(chosen)
    rows = []
    for item_id in chosen:
        item, answer = answers[item_id]
        texts = {"question": item.question, "reference": item.answer, "answer": answer}
        inert = {name: f"'{text}" if text[:1] in "=+-@\t\r" and text else text for name, text in texts.items()}
        rows.append({"item_id": item_id, **inert, "verdict": "", "answer_sha256": verdicts[item_id]["answer_sha256"]})
    _write_csv(Path(out), rows)
    return len(rows)


def _share_out(strata: Mapping[str, Sequence], n: int) -> dict[str, int]:
    """Split n in proportion to the strata; what rounding leaves goes to the largest remainders."""
    total = sum(map(len, strata.values()))
    n = min(n, total)
    exact = {name: n * len(members) / total if total else 0.0 for name, members in strata.items()}
    shares = {name: int(share) for name, share in exact.items()}
    for name in sorted(exact, key=lambda name: shares[name] - exact[name])[: n - sum(shares.values())]:
        shares[name] += 1
    return shares


def _write_csv(path: Path, rows: Sequence[Mapping]) -> None:
    page = io.StringIO(newline="")
    writer = csv.DictWriter(page, AUDIT_COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, "\ufeff" + page.getvalue())  # spreadsheets take it for UTF-8 by this mark


def read_human(path: Path) -> dict[str, tuple[str, str | None]]:
    """A person's verdicts, by item: `correct`, `incorrect` or empty, and the hash of the answer where the file has it.

    Raises:
        EvaluationError: naming the line whose verdict is another word, or whose item came before.
    """
    verdicts: dict[str, tuple[str, str | None]] = {}
    for where, row in _read_rows(Path(path)):
        item_id, verdict = row.get("item_id"), str(row.get("verdict") or "").strip().lower()
        if not item_id:
            raise EvaluationError(f"{where}: an audited answer needs its item_id, and a column verdict")
        if verdict not in ("correct", "incorrect", ""):
            raise EvaluationError(f"{where}: verdict {verdict!r}; write correct or incorrect, or leave it empty")
        if item_id in verdicts:
            raise EvaluationError(f"{where}: item {item_id} was judged before; an item counts once")
        verdicts[item_id] = (verdict, row.get("answer_sha256") or None)
    return verdicts


def _read_rows(path: Path) -> Iterator[tuple[str, dict]]:
    text = read_text(path)
    if path.suffix.lower() == ".csv":
        first_line = text.split("\n", 1)[0]
        separator = ";" if first_line.count(";") > first_line.count(",") else ","  # as spreadsheets write in Spain
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
        for row in reader:
            yield f"{path}:{reader.line_num}", row
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise EvaluationError(f"{path}:{number}: not valid JSON: {error}") from None
            if not isinstance(row, dict):
                raise EvaluationError(f"{path}:{number}: expected keys and values, got {type(row).__name__}")
            yield f"{path}:{number}", row
