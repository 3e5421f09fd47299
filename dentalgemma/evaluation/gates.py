"""Regression gates: models that were trained one from another, on the same questions, and what was forgotten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from dentalgemma.evaluation.comparing import compare_runs
from dentalgemma.evaluation.questions import EvaluationError, Question, load_questions
from dentalgemma.evaluation.runs import Run, accuracy

FORMAT = "gate/1"
ALPHA = 0.05
PARTS = ("per_category", "per_question_type", "per_modality", "per_language")
SHOWN = ("n", "a", "b", "difference", "difference_by_image", "only_a", "only_b", "mcnemar_p")


class GateError(EvaluationError):
    """A model that lost more than the gate allows; everything is written before it is raised."""

    exit_code = 1


def load_gate_questions(path: Path) -> list[Question]:
    """Questions that a gate can ask: closed ones, since an open answer waits for a judge.

    Raises:
        EvaluationError: naming the first open question.
    """
    questions = load_questions(path)
    if unread := [item.item_id for item in questions if item.kind == "open"]:
        raise EvaluationError(
            f"{path}: a gate asks closed questions, {len(unread)} are open, for example {unread[0]}: leave these out"
        )
    return questions


def check_margin(margin: float) -> None:
    """Refuse a margin that is no share of the questions.

    Raises:
        EvaluationError: with the value.
    """
    if not 0 <= margin < 1:
        raise EvaluationError(f"a gate's margin is a share: at least 0 and below 1 (0.02 is two points), got {margin}")


def gate_runs(runs: Sequence[Run], *, margin: float = 0.0, alpha: float = ALPHA) -> dict:
    """Runs in the order of training: each against the one before it, the last also against the first.

    The last run fails where it is right less often than the one before it, or than the first, by more than `margin` (a
    share of the questions), and the exact McNemar test gives p < `alpha`: a loss too small to be told from chance
    passes. Earlier steps are shown, not judged. Parts (categories and so on) are shown with uncorrected p-values: they
    say where something was forgotten, and do not fail the gate.

    Raises:
        EvaluationError: with fewer than two runs, or runs that were not asked the same questions in the same mode.
    """
    check_margin(margin)
    names = [run.name for run in runs]
    if len(runs) < 2 or len(set(names)) < len(names):
        raise EvaluationError(f"a gate needs two runs or more, each of its own name; got {', '.join(names)}")
    pairs = list(pairwise(runs)) + ([(runs[0], runs[-1])] if len(runs) > 2 else [])
    steps = [_step(before, after, judged=after is runs[-1]) for before, after in pairs]
    failures = [_say_loss(step) for step in steps if step["judged"] and _fails(step, margin, alpha)]
    return {
        "format": FORMAT,
        "margin": margin,
        "alpha": alpha,
        "questions_sha256": runs[0].questions_sha256,
        "runs": [{"name": run.name, **run.settings, **accuracy(run.answered("closed").correct)} for run in runs],
        "steps": steps,
        **{part: _follow(runs, steps, part) for part in PARTS},
        "passed": not failures,
        "failures": failures,
    }


def _step(before: Run, after: Run, *, judged: bool) -> dict:
    closed = compare_runs(before, after)["closed"]
    if closed is None:
        raise EvaluationError(f"{before.name} and {after.name} have no closed answers that a gate could compare")
    own = {name: closed[name] for name in (*SHOWN, "minimum_detectable_effect", *PARTS)}
    own |= {side: closed[side]["accuracy"] for side in "ab"}
    return {"from": before.name, "to": after.name, "judged": judged, **own}


def _fails(step: Mapping, margin: float, alpha: float) -> bool:
    # From counts: 0.98 - 1.0 is below -0.02 in floats.
    lost = step["only_a"] - step["only_b"]
    return lost > round(margin * step["n"], 9) and step["mcnemar_p"] < alpha


def _say_loss(step: Mapping) -> str:
    worst = min(step["per_category"].items(), key=lambda item: item[1]["difference"], default=None)
    where = ""
    if worst and worst[1]["difference"] < 0:
        where = f", most in {worst[0]} ({100 * worst[1]['difference']:+.1f} points)"
    return (
        f"{step['to']} is right less often than {step['from']}: {100 * step['difference']:+.1f} points on {step['n']} "
        f"questions (lost {step['only_a']}, gained {step['only_b']}, exact McNemar p = {step['mcnemar_p']:.3g}){where}"
    )


def _follow(runs: Sequence[Run], steps: Sequence[Mapping], part: str) -> dict[str, dict]:
    """The accuracy of every run in each part, and what changed from the first run to the last."""
    whole, consecutive = steps[-1], steps[: len(runs) - 1]
    table = {}
    for name, own in whole[part].items():
        shares = [consecutive[0][part][name]["a"], *(step[part][name]["b"] for step in consecutive)]
        table[name] = {
            "n": own["n"],
            "accuracy": dict(zip((run.name for run in runs), shares, strict=True)),
            "difference": own["difference"],
            "lost": own["only_a"],
            "gained": own["only_b"],
            "mcnemar_p": own["mcnemar_p"],
        }
    return table


def format_gate(gate: Mapping) -> str:
    """A gate in lines for people: accuracies of all runs, over all and in parts, then the steps and the verdict."""
    names = [run["name"] for run in gate["runs"]]
    part = "per_category" if gate["per_category"] else "per_question_type"
    rows = [("", "n", *names, "change", "lost", "gained")]
    whole = gate["steps"][-1]
    shares = [f"{100 * run['accuracy']:.1f} %" for run in gate["runs"]]
    change = f"{100 * whole['difference']:+.1f}"
    rows.append(("all", str(whole["n"]), *shares, change, str(whole["only_a"]), str(whole["only_b"])))
    for name, own in gate[part].items():
        shares = [f"{100 * share:.1f} %" for share in own["accuracy"].values()]
        change = f"{100 * own['difference']:+.1f}"
        rows.append((name, str(own["n"]), *shares, change, str(own["lost"]), str(own["gained"])))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_line_up(row, widths) for row in rows]
    for step in gate["steps"]:
        lines.append(
            f"{step['from']} → {step['to']}: {100 * step['difference']:+.1f} points, lost {step['only_a']}, "
            f"gained {step['only_b']}, exact McNemar p = {step['mcnemar_p']:.3g}"
        )
    if gate["passed"]:
        allowed = f"no loss beyond {100 * gate['margin']:g} points with p < {gate['alpha']:g}"
        return "\n".join([*lines, f"The gate is passed: {allowed}"])
    return "\n".join([*lines, *(f"The gate is not passed: {failure}" for failure in gate["failures"])])


def _line_up(row: Sequence[str], widths: Sequence[int]) -> str:
    figures = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
    return "  ".join([row[0].ljust(widths[0]), *figures])
