"""How a report writes values for people: numbers, times, names of findings, and text that stays text in Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal

from markupsafe import Markup, escape

from data_builders.sources import load_vocabulary

LONG_DECIMAL = re.compile(r"(?<![\w.])\d+\.\d{7,}(?:[eE][+-]?\d{1,3})?(?![\w.])")
TIME = re.compile(r"(?<!\d)\d{4}-\d\d-\d\d[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:Z|[+-]\d\d:?\d\d)?(?![\d:])")
MARKUP = re.compile(r"[\\`*\[\]|~#]|(?<!\w)_|_(?!\w)")  # a line between letters emphasizes nothing
TURNS = re.compile("[\u202a-\u202e\u2066-\u2069]")  # marks that would reorder the text around them
ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;", "$": "&#36;", "@": "&#64;"}  # a backslash does not tame these


def write_percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f} %"


def write_span(interval: object) -> str:
    """An interval in percent; one without width is none: resampling answers that are all alike gives no interval."""
    return "–" if not has_width(interval) else f"{100 * interval[0]:.2f} to {100 * interval[1]:.2f}"


def write_points(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:+.2f}"


def write_point_span(interval: object) -> str:
    return "–" if not has_width(interval) else f"{100 * interval[0]:+.2f} to {100 * interval[1]:+.2f}"


def has_width(interval: object) -> bool:
    return bool(interval) and interval[0] < interval[1]


def write_many(count: int, noun: str) -> str:
    """`1 image`, `2 images`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def write_number(value: Decimal | float | int) -> str:
    """A number with four decimals, or three digits where it is small; whole ones as they are."""
    exact = Decimal(str(value))
    if not exact.is_finite():
        return str(value)
    if exact == exact.to_integral_value():
        return f"{exact:.0f}"
    text = f"{exact:.4f}" if abs(exact) >= Decimal("0.001") else f"{exact:.3g}"
    return text.rstrip("0") if "." in text and "e" not in text else text


def write_time(text: str) -> str:
    """A time to the second, in UTC where its zone is known; what is no time stays as it is."""
    try:
        moment = datetime.fromisoformat(text)
        moment = moment.astimezone(UTC) if moment.tzinfo else moment
    except (ValueError, OverflowError):
        return text
    return f"{moment:%Y-%m-%d %H:%M:%S}" + (" UTC" if moment.tzinfo else "")


def tidy(text: object) -> str:
    """A text with long decimals rounded and times to the second; the JSON file has them in full."""
    rounded = LONG_DECIMAL.sub(lambda found: write_number(Decimal(found[0])), str(text))
    return TIME.sub(lambda found: write_time(found[0]), rounded)


def tidy_html(text: object) -> Markup:
    """The same for HTML, where no line ends within a time."""
    rounded = LONG_DECIMAL.sub(lambda found: write_number(Decimal(found[0])), str(escape(text)))
    return Markup(TIME.sub(lambda found: f'<span class="nb">{write_time(found[0])}</span>', rounded))


def write_label(name: object) -> str:
    """A finding as the vocabulary calls it; of another name the words."""
    term = load_vocabulary().get(str(name))
    return term.en.one if term else str(name).replace("_", " ")


def escape_markdown(value: object) -> str:
    """Text that stays text in Markdown and in its tables, HTML in it included, and that the source shows readably."""
    text = " ".join(TURNS.sub("", str(value)).split()).replace("\\", "\\\\")
    text = "".join(ENTITIES.get(c, c) for c in text)
    # The reference of an entity holds a `#` that is none of the text's.
    return re.sub(r"&#\d+;|\\\\|" + MARKUP.pattern, _escape_one, text)


def _escape_one(found: re.Match) -> str:
    return found[0] if len(found[0]) > 1 else "\\" + found[0]


def write_code(value: object) -> str:
    """Text as a code span, which nothing in it can end."""
    return "`" + (" ".join(str(value).replace("`", "'").split()) or "none").replace("|", "/") + "`"


def write_list(value: object, indent: str = "") -> str:
    """Nested keys and values as a nested list of Markdown."""
    if not isinstance(value, Mapping):
        return f"{indent}- {_write_value(value)}\n"
    lines = []
    for key, own in value.items():
        told = escape_markdown(str(key).replace("_", " "))
        if isinstance(own, Mapping) and own:
            lines.append(f"{indent}- {told}:\n{write_list(own, indent + '  ')}")
        elif isinstance(own, list) and any(isinstance(entry, (Mapping, list)) for entry in own):
            lines.append(f"{indent}- {told}:\n" + "".join(write_list(entry, indent + "  ") for entry in own))
        else:
            lines.append(f"{indent}- {told}: {_write_value(own)}\n")
    return "".join(lines)


def _write_value(value: object) -> str:
    if value is None or (isinstance(value, (Mapping, list, tuple)) and not value):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return write_number(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_write_value, value))
    return escape_markdown(tidy(value)) or "(empty)"


FILTERS = {
    "percent": write_percent,
    "span": write_span,
    "points": write_points,
    "point_span": write_point_span,
    "many": write_many,
    "p": lambda p: "–" if p is None else f"{p:.3g}",
    "whole": lambda number: "–" if number is None else f"{number:,.0f}",
    "known": lambda value: "not known" if value in (None, "", [], {}) else value,
    "number": write_number,
    "time": write_time,
    "tidy": tidy,
    "tidy_html": tidy_html,
    "label": write_label,
    "cell": escape_markdown,
    "code": write_code,
    "as_list": write_list,
}
