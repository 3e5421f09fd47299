"""The figures beside a model card: losses, results with intervals, what the data consist of.

PNG, since every viewer of a card shows it; the same facts give the same bytes, with nothing in them but pixels. Okabe
and Ito's colours with markers, dashes and hatches, so that they read in grey print and with every colour blindness.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from data_builders.metadata import strip_metadata
from dentalgemma.evaluation.plots import MARKERS, MODEL_COLOURS, RC, short_name

TRAINING, VALIDATION = "#56B4E9", "#D55E00"
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++")
BARS = 15  # names that one panel has room for; the tables of the card have them all
COLUMNS = 3  # panels side by side


def draw_losses(stages: Sequence[Mapping]) -> bytes | None:
    """A panel for each stage: training and validation loss by step, and its best step; None where nothing is recorded.

    A stage is its run facts.
    """
    shown = [stage for stage in stages if any(stage["losses"].values())]
    if not shown:
        return None
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = _panels(rows, columns, size=(max(4.6, 3.6 * columns), 2.9 * rows))
    for axis, stage in zip(axes, shown, strict=False):
        _draw_curve(axis, stage["losses"]["train"], label="training", color=TRAINING, linestyle="-")
        _draw_curve(axis, stage["losses"]["validation"], label="validation", color=VALIDATION, marker="o")
        if stage.get("best_step"):
            axis.axvline(stage["best_step"], color="0.4", linewidth=1, linestyle="--", label="best step")
        axis.set_title(short_name(str(stage["stage"])), loc="left", fontsize=10, parse_math=False)
        axis.set_xlabel("step")
        axis.set_ylabel("loss per answer token")
        axis.set_ylim(bottom=0)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        axis.legend(frameon=False, fontsize=8)
    for axis in axes[len(shown) :]:
        axis.remove()
    return _as_png(figure)


def _draw_curve(axis, points: Sequence[Mapping], **style: str) -> None:
    """A value by step; where a run was resumed, what was logged last holds."""
    by_step = sorted({point["step"]: point["loss"] for point in points if point["loss"] is not None}.items())
    if by_step:
        steps, values = zip(*by_step, strict=True)
        if len(by_step) == 1:
            style.setdefault("marker", ".")
        axis.plot(steps, values, markersize=4, **style)


def draw_results(results: Sequence[Mapping]) -> bytes | None:
    """Accuracies with their 95 % Wilson intervals, a row each; None where there are none.

    A result is `{kind, model, correct, n, accuracy, wilson, chance}`, shares throughout; `chance` may be None.
    """
    if not results:
        return None
    figure, (axis,) = _panels(1, 1, size=(7.6, 1.0 + 0.42 * len(results)))
    models = list(dict.fromkeys(result["model"] for result in results))
    for row, result in enumerate(results):
        number = models.index(result["model"])
        colour, marker = MODEL_COLOURS[number], MARKERS[number]
        axis.plot(result["wilson"], [row, row], color=colour, linewidth=2)
        axis.plot([result["accuracy"]], [row], marker, color=colour, markeredgecolor="black", clip_on=False, zorder=3)
        told = f"{100 * result['accuracy']:.1f} %, {result['correct']} of {result['n']}"
        axis.annotate(told, (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=8.5)
        if result["chance"] is not None:
            axis.plot([result["chance"]] * 2, [row - 0.35, row + 0.35], color="black", linewidth=1, linestyle=":")
    if any(result["chance"] is not None for result in results):
        axis.plot([], [], color="black", linewidth=1, linestyle=":", label="chance")
        axis.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1))
    axis.set_yticks(
        range(len(results)), [f"{result['kind']}, {result['model']}" for result in results], parse_math=False
    )
    axis.set_ylim(len(results) - 0.5, -0.5)  # the first one on top
    axis.set_xlim(0, 1)
    axis.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0, symbol=" %"))
    axis.set_xlabel("answered right, with 95 % Wilson interval")
    return _as_png(figure)


def draw_composition(panels: Mapping[str, Mapping[str, Mapping[str, int]]]) -> bytes | None:
    """A panel of bars for each entry, `{axis label: {name: {stage: number}}}`; None where all are empty.

    The longest bar comes first, and the stages of one bar lie one after another.
    """
    panels = {label: counts for label, counts in panels.items() if counts}
    if not panels:
        return None
    stages = list(dict.fromkeys(stage for counts in panels.values() for own in counts.values() for stage in own))
    heights = [0.75 + 0.26 * min(BARS, len(counts)) for counts in panels.values()]
    figure, axes = _panels(len(panels), 1, size=(7.6, sum(heights) + 0.4), height_ratios=heights)
    for axis, (label, counts) in zip(axes, panels.items(), strict=True):
        shown = sorted(counts.items(), key=lambda item: -sum(item[1].values()))[:BARS]
        left = [0] * len(shown)
        for number, stage in enumerate(stages):
            own = [by_stage.get(stage, 0) for _, by_stage in shown]
            axis.barh(
                range(len(shown)),
                own,
                left=left,
                color=MODEL_COLOURS[number % len(MODEL_COLOURS)],
                hatch=HATCHES[number % len(HATCHES)],
                edgecolor="black",
                linewidth=0.5,
                label=short_name(stage),
            )
            left = [a + b for a, b in zip(left, own, strict=True)]
        for row, total in enumerate(left):
            axis.annotate(f" {total:,}", (total, row), va="center", fontsize=8)
        axis.set_yticks(range(len(shown)), [short_name(name) for name, _ in shown], parse_math=False)
        axis.set_ylim(len(shown) - 0.4, -0.6)
        axis.set_xlim(0, 1.12 * max(left))
        axis.set_xlabel(label if len(counts) <= BARS else f"{label} (the {BARS} most frequent of {len(counts)})")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if len(stages) > 1:
        handles, names = axes[0].get_legend_handles_labels()
        legend = figure.legend(handles, names, frameon=False, loc="outside upper left", ncols=4, title="stage")
        for text in legend.get_texts():
            text.set_parse_math(False)
    return _as_png(figure)


def _panels(rows: int, columns: int, *, size: tuple[float, float], height_ratios: Sequence[float] | None = None):
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = list(figure.subplots(rows, columns, squeeze=False, height_ratios=height_ratios).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#DDDDDD", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def _as_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a character that the font lacks is drawn as a box
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return strip_metadata(buffer.getvalue())
