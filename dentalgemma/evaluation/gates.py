"""Regression gates: models that were trained one from another, on the same questions, and what was forgotten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from dentalgemma.evaluation.comparing import compare_runs
from dentalgemma.evaluation.questions import EvaluationError, Question, load_questions
from dentalgemma.evaluation.runs import Run, accuracy
from dentalgemma.evaluation.statistics import detectable_difference, mcnemar_exact

FORMAT = "gate/1"
ALPHA = 0.05
POWER = 0.8
PARTS = ("per_category", "per_question_type", "per_modality", "per_language")
SHOWN = ("n", "a", "b", "difference", "difference_by_image", "only_a", "only_b", "mcnemar_p")


class GateError(EvaluationError):
    """A model that lost more than the gate allows; everything is written before it is raised."""

    exit_code = 1


def load_gate_questions(path: Path) -> list[Question]:
    """Questions that a gate can ask: closed ones, since an open answer waits for a judge, and enough to tell a loss.

    Raises:
        EvaluationError: naming the first open question, or how many questions are needed.
    """
    questions = load_questions(path)
    if unread := [item.item_id for item in questions if item.kind == "open"]:
        raise EvaluationError(
            f"{path}: a gate asks closed questions, {len(unread)} are open, for example {unread[0]}: leave these out"
        )
    check_size(len(questions))
    return questions


def check_margin(margin: float) -> None:
    """Refuse a margin that is no share of the questions.

    Raises:
        EvaluationError: with the value.
    """
    if not 0 <= margin < 1:
        raise EvaluationError(f"a gate's margin is a share: at least 0 and below 1 (0.02 is two points), got {margin}")


def check_size(n: int, alpha: float = ALPHA) -> None:
    """Refuse a gate that everybody passes: with five questions, five lost ones have p = 0.0625.

    Raises:
        EvaluationError: with the number of questions that is needed.
    """
    if n < (needed := _fewest_lost(alpha)):
        raise EvaluationError(f"a gate of {n} closed questions: too few questions to tell a loss: at least {needed}")


def _fewest_lost(alpha: float) -> int:
    """How many questions must be lost, and none gained, for exact McNemar p < alpha."""
    lost = 1
    while mcnemar_exact(lost, 0) >= alpha:
        lost += 1
    return lost


def gate_runs(runs: Sequence[Run], *, margin: float = 0.0, alpha: float = ALPHA) -> dict:
    """Runs in the order of training: each against the one before it, the last also against the first.

    The last run fails where it is right less often than the one before it, or than the first, by more than `margin` (a
    share of the questions), and the exact McNemar test gives p < `alpha`: a loss too small to be told from chance
    passes. Earlier steps are shown, not judged. Parts (categories and so on) are shown with uncorrected p-values: they
    say where something was forgotten, and do not fail the gate.

    Passing is no proof that nothing was lost: `detectable` says from which loss on the gate can fail at all.

    Raises:
        EvaluationError: with fewer than two runs, runs that were not asked the same questions in the same mode, or too
            few questions for any loss to fail.
    """
    check_margin(margin)
    names = [run.name for run in runs]
    if len(runs) < 2 or len(set(names)) < len(names):
        raise EvaluationError(f"a gate needs two runs or more, each of its own name; got {', '.join(names)}")
    pairs = list(pairwise(runs)) + ([(runs[0], runs[-1])] if len(runs) > 2 else [])
    steps = [_step(before, after, judged=after is runs[-1]) for before, after in pairs]
    check_size(steps[-1]["n"], alpha)
    failures = [_say_loss(step) for step in steps if step["judged"] and _fails(step, margin, alpha)]
    return {
        "format": FORMAT,
        "margin": margin,
        "alpha": alpha,
        "questions_sha256": runs[0].questions_sha256,
        "runs": [{"name": run.name, **run.settings, **accuracy(run.answered("closed").correct)} for run in runs],
        "open_questions": len(runs[0].asked("open")),
        "detectable": _find_detectable(steps[len(runs) - 2], margin, alpha),
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


def _find_detectable(step: Mapping, margin: float, alpha: float) -> dict:
    """From which loss on the gate fails: at best, when nothing is gained on the way, and in 8 of 10 cases.

    The latter is a true loss, where as many answers change between right and wrong as did here; `None` where these are
    too few, or where a margin is let pass as well.
    """
    n = step["n"]
    items = max(_fewest_lost(alpha), int(round(margin * n, 9)) + 1)
    discordance = (step["only_a"] + step["only_b"]) / n
    often = None if margin else detectable_difference(n, discordance, power=POWER, alpha=alpha)
    return {"items": items, "points": items / n, "at_80_percent_power": often}


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
    lines += _say_limits(gate)
    if gate["passed"]:
        allowed = f"no loss beyond {100 * gate['margin']:g} points with p < {gate['alpha']:g}"
        return "\n".join([*lines, f"The gate is passed: {allowed}"])
    return "\n".join([*lines, *(f"The gate is not passed: {failure}" for failure in gate["failures"])])


def _say_limits(gate: Mapping) -> list[str]:
    detectable, n = gate["detectable"], gate["steps"][-1]["n"]
    told = f"With {n} questions a loss of {_points(detectable['points'])} points can at best be seen"
    if (often := detectable["at_80_percent_power"]) is not None:
        told += f", and one of {_points(often)} points in 8 of 10 cases, if as many answers change as here"
    lines = [told + ": passing does not mean that nothing was lost"]
    if number := gate["open_questions"]:
        lines.append(f"{number} open question{'s are' if number > 1 else ' is'} not part of a gate")
    return lines


def _points(share: float) -> str:
    return f"{round(100 * share, 1):g}"


def _line_up(row: Sequence[str], widths: Sequence[int]) -> str:
    figures = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
    return "  ".join([row[0].ljust(widths[0]), *figures])
