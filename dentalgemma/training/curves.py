"""The curves of a run as one picture: losses, what the sampled answers were worth, and the learning rate."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NamedTuple

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

FILE_NAME = "curves.png"


class Style(NamedTuple):
    """How a curve is drawn: told apart by marker and dashes too, for print in grey and for the colour-blind."""

    name: str
    colour: str
    marker: str
    dashes: str


# Okabe and Ito's colours, but their yellow, which is too pale for a line on paper.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
METRICS = {
    "eval_yes_no_accuracy": Style("yes/no right", BLUE, "o", "-"),
    "eval_sensitivity": Style("sensitivity, mean", GREEN, "^", "-"),
    "eval_specificity": Style("specificity, mean", SKY, "v", "--"),
    "eval_side_accuracy": Style("side right", ORANGE, "s", "-"),
    "eval_region_accuracy": Style("region right", ORANGE, "D", "--"),
    "eval_tooth_accuracy": Style("tooth right", PURPLE, "P", "-"),
    "eval_condition_named": Style("condition named", BLUE, "o", "-"),
    "eval_word_overlap": Style("words shared", PURPLE, "X", "--"),
    "eval_contradictions": Style("contradictions (less is better)", RED, "x", ":"),
    "eval_exact_match": Style("word for word", BLACK, ".", "-."),
}


class Curves(TrainerCallback):
    """Draws `curves.png` into the run folder at each checkpoint and at the end."""

    def __init__(self, stage: str = "") -> None:
        self.stage = stage

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Draw what there is so far."""
        if state.is_world_process_zero:
            path = Path(args.output_dir) / FILE_NAME
            try:
                draw_curves(state, path, stage=self.stage, metric=args.metric_for_best_model)
            except OSError as error:
                path.with_suffix(".partial").unlink(missing_ok=True)
                print(f"{path} could not be drawn: {error}; training goes on", file=sys.stderr)

    on_train_end = on_save


def draw_curves(state: TrainerState, path: Path, *, stage: str = "", metric: str | None = None) -> None:
    """Draw the history of a run to `path` (PNG); `metric` is what its best step was chosen by."""
    # Without pyplot there is no window system to ask for, nor a figure to forget.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    history = state.log_history
    metrics = {name: _points(history, name) for name in METRICS}
    metrics = {name: points for name, points in metrics.items() if points}
    heights = [3, 3.6, 1.3] if metrics else [3, 1.3]
    figure = Figure(figsize=(8.5, sum(heights) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights))
    loss, rate = axes[0], axes[-1]

    _draw(loss, _points(history, "loss"), Style("training", SKY, "", "-"))
    _draw(loss, _points(history, "eval_loss"), Style("validation", RED, "o", "-"))
    loss.set_ylabel("loss per answer token")
    if metrics:
        for name, points in metrics.items():
            _draw(axes[1], points, METRICS[name])
        axes[1].set_ylim(-0.03, 1.03)
        axes[1].set_ylabel("share of sampled answers")
    _draw(rate, _points(history, "learning_rate"), Style("", BLACK, "", "-"))
    rate.set_ylabel("learning rate")
    rate.set_xlabel("step")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axis in axes:
        axis.grid(color="0.88", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        if state.best_global_step:
            axis.axvline(state.best_global_step, color="0.45", linewidth=1, linestyle=(0, (5, 3)))
        if axis is not rate and axis.get_legend_handles_labels()[0]:
            axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    title = stage or "run"
    if state.best_global_step:
        name = (metric or "eval_loss").removeprefix("eval_").replace("_", " ")
        title += f": best step {state.best_global_step} by {name} ({state.best_metric:.3g})"
    loss.set_title(title, loc="left", fontsize=11)
    _save(figure, path)


def _points(history: list[dict], name: str) -> list[tuple[int, float]]:
    """A value by step; where a run was resumed, what was logged last holds."""
    return sorted({entry["step"]: entry[name] for entry in history if name in entry}.items())


def _draw(axis, points: list[tuple[int, float]], style: Style) -> None:
    if points:
        steps, values = zip(*points, strict=True)
        marker = style.marker or ("." if len(points) == 1 else "")
        axis.plot(
            steps, values, label=style.name, color=style.colour, marker=marker, linestyle=style.dashes, markersize=5
        )


def _save(figure, path: Path) -> None:
    """Replace the picture at once, so that nobody opens half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    figure.savefig(partial, format="png", dpi=150, metadata={"Software": None})
    os.replace(partial, path)
