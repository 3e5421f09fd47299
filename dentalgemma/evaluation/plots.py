"""The report's plots, as SVG text: Okabe and Ito's colours with hatches and markers, so that grey print reads too."""

from __future__ import annotations

import io
import unicodedata
import warnings
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

# Okabe and Ito 2008: told apart with every common colour blindness. Each comes with a marker, for print without colour.
MODEL_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
METHOD_STYLES = {  # what the frozen extractor tries, in its order: from a plain letter to nothing at all
    "end_letter": ("#0072B2", ""),
    "start_letter": ("#56B4E9", "///"),
    "option_text": ("#009E73", "..."),
    "fuzzy": ("#F0E442", "xxx"),
    "failed": ("#D55E00", "\\\\\\"),
}
OTHER_METHOD = ("#BBBBBB", "++")
NAME_LENGTH = 30  # characters of a name that a plot has room for; the tables have it in full
RC = {"svg.hashsalt": "dentalgemma", "svg.fonttype": "path", "hatch.linewidth": 0.6, "font.size": 9.5}


def short_name(name: str, length: int = NAME_LENGTH) -> str:
    """A name as a plot can draw it: one line of visible characters, its middle left out where it is long."""
    shown = "".join(c if unicodedata.category(c)[0] != "C" else " " for c in name)
    shown = " ".join(shown.split()) or "(no name)"
    if len(shown) <= length:
        return shown
    kept = length - 1
    return f"{shown[: kept - kept // 2]}…{shown[-(kept // 2) :]}"


def draw_accuracy(models: Sequence[Mapping], *, chance: float | None, ceiling: float | None) -> str:
    """Accuracy with two intervals a model; the chance line and the ceiling where they are known.

    A model is `{name, accuracy, interval, wilson}`, shares throughout; `interval` may be None.
    """
    figure, axis = _rows(len(models))
    for row, model in enumerate(models):
        colour, marker = _model_style(row)
        axis.plot(model["wilson"], [row, row], color=colour, linewidth=1, zorder=2)
        if model["interval"]:
            axis.plot(model["interval"], [row, row], color=colour, linewidth=4, alpha=0.45, solid_capstyle="butt")
        axis.plot([model["accuracy"]], [row], marker, color=colour, markeredgecolor="black", zorder=3, clip_on=False)
        axis.annotate(
            f"{100 * model['accuracy']:.1f} %",
            (model["accuracy"], row),
            (0, 7),
            textcoords="offset points",
            ha="center",
        )
    for share, style, label in ((chance, "--", "chance"), (ceiling, ":", "ceiling")):
        if share is not None:
            axis.axvline(share, color="black", linestyle=style, linewidth=1, label=f"{label} {100 * share:.1f} %")
    _name_rows(axis, [model["name"] for model in models])
    _percent_axis(axis)
    _legend(figure, axis)
    return _as_svg(figure)


def draw_methods(models: Sequence[Mapping]) -> str:
    """How each model's answers were read, stacked to 100 %. A model is `{name, methods: {method: count}}`."""
    counted = {method for model in models for method in model["methods"]}
    methods = [*METHOD_STYLES, *sorted(counted - set(METHOD_STYLES))]
    figure, axis = _rows(len(models))
    left = [0.0] * len(models)
    for method in methods:
        colour, hatch = METHOD_STYLES.get(method, OTHER_METHOD)
        shares = [model["methods"].get(method, 0) / max(1, sum(model["methods"].values())) for model in models]
        axis.barh(
            range(len(models)),
            shares,
            left=left,
            height=0.62,
            color=colour,
            hatch=hatch,
            edgecolor="black",
            linewidth=0.6,
            label=short_name(method),
        )
        left = [start + share for start, share in zip(left, shares, strict=True)]
    _name_rows(axis, [model["name"] for model in models])
    _percent_axis(axis)
    _legend(figure, axis)
    return _as_svg(figure)


def draw_differences(pairs: Sequence[Mapping]) -> str:
    """Differences with their intervals, and the line of no difference. A pair is `{name, difference, interval}`."""
    figure, axis = _rows(len(pairs))
    for row, pair in enumerate(pairs):
        if pair["interval"]:
            axis.plot(pair["interval"], [row, row], color="#0072B2", linewidth=2)
        axis.plot([pair["difference"]], [row], "D", color="#0072B2", markeredgecolor="black")
    axis.axvline(0, color="black", linewidth=1)
    axis.set_yticks(range(len(pairs)), [short_name(pair["name"]) for pair in pairs], parse_math=False)
    axis.xaxis.set_major_formatter(lambda share, _: f"{100 * share:+.3g}")
    axis.set_xlabel("difference in points, 95 % interval")
    return _as_svg(figure)


def draw_parts(parts: Sequence[str], models: Sequence[Mapping], *, chance: float | None = None) -> str:
    """Accuracy of each model in each part (a category, a modality), with Wilson intervals.

    A model is `{name, parts: {part: {accuracy, wilson}}}`; a part that it was not asked is left empty.
    """
    figure, axis = _rows(len(parts), row_inches=0.22 + 0.13 * len(models))
    step = 0.7 / max(1, len(models))
    for number, model in enumerate(models):
        colour, marker = _model_style(number)
        places = [
            (row + (number - (len(models) - 1) / 2) * step, model["parts"][part])
            for row, part in enumerate(parts)
            if part in model["parts"]
        ]
        for place, own in places:
            axis.plot(own["wilson"], [place, place], color=colour, linewidth=1.2)
        accuracies = [own["accuracy"] for _, own in places]
        label = number_name(number, model["name"])
        rows = [place for place, _ in places]
        axis.plot(accuracies, rows, marker, color=colour, markeredgecolor="black", label=label, clip_on=False, zorder=3)
    if chance is not None:
        axis.axvline(chance, color="black", linestyle="--", linewidth=1, label=f"chance {100 * chance:.1f} %")
    axis.set_yticks(range(len(parts)), [short_name(part) for part in parts], parse_math=False)
    _percent_axis(axis)
    _legend(figure, axis, columns=2)
    return _as_svg(figure)


def number_name(number: int, name: str) -> str:
    """A model's number and name: two long names may look alike once they are shortened."""
    return f"{number + 1} · {short_name(name)}"


def _model_style(number: int) -> tuple[str, str]:
    return MODEL_COLOURS[number % len(MODEL_COLOURS)], MARKERS[number % len(MARKERS)]


def _rows(count: int, row_inches: float = 0.42):
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(7.6, 1.15 + row_inches * count), layout="constrained")
        axis = figure.add_subplot()
    axis.set_ylim(count - 0.4, -0.75)  # the first one on top
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)
    return figure, axis


def _name_rows(axis, names: Sequence[str]) -> None:
    labels = [number_name(number, name) for number, name in enumerate(names)]
    axis.set_yticks(range(len(names)), labels, parse_math=False)  # `$x_1$` in a name is no formula


def _percent_axis(axis) -> None:
    axis.set_xlim(0, 1)
    axis.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0, symbol=" %"))


def _legend(figure, axis, columns: int = 6) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        legend = figure.legend(
            handles, labels, loc="outside upper left", ncols=columns, frameon=False, columnspacing=1.2
        )
        for text in legend.get_texts():
            text.set_parse_math(False)


def _as_svg(figure: Figure) -> str:
    """The same figure gives the same text: ids are salted, and no date is written."""
    buffer = io.StringIO()
    with matplotlib.rc_context(RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a character that the font lacks is drawn as a box
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
