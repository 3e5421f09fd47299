"""The dotted places of a scores document (scores/1) that a plan may name: what it misspells would be found too late."""

from __future__ import annotations

from collections.abc import Mapping

ANY = "*"  # any name, such as a category or a finding; one with a dot in it has no place
NUMBER, INTERVAL = "a number", "an interval"
Shape = str | Mapping[str, "Shape"]


def _numbers(*names: str) -> dict[str, Shape]:
    return dict.fromkeys(names, NUMBER)


def _intervals(*names: str) -> dict[str, Shape]:
    return dict.fromkeys(names, INTERVAL)


ACCURACY = _numbers("n", "correct", "accuracy") | _intervals("wilson")
BOUND = _numbers("n", "accuracy")
RESAMPLED = _intervals("interval_by_image", "interval_by_question") | _numbers("n_clusters")
PARTS: dict[str, Shape] = {
    f"per_{name}": {ANY: ACCURACY}
    for name in ("question_type", "category", "modality", "language", "finding", "source")
}
TIMES = _numbers("n", "median_ms", "p95_ms")
CLOSED: dict[str, Shape] = {
    **ACCURACY,
    **RESAMPLED,
    **PARTS,
    **_numbers("chance", "ceiling", "unreachable", "right_unshown", "images_asked", "failed"),
    "methods": {ANY: NUMBER},
    "answerable": ACCURACY,
    "bounds": dict.fromkeys(("failures_wrong", "failures_at_chance", "extracted_only", "answerable_only"), BOUND),
    "protocols": {name: ACCURACY | _numbers("failed") for name in ("seed", "strict", "official")},
    "minimum_detectable_effect": _numbers("items", "points"),
    "clustering": _numbers("icc", "design_effect", "mean_cluster_size"),
}
OPEN: dict[str, Shape] = {
    **ACCURACY,
    **RESAMPLED,
    **PARTS,
    **_numbers("judged", "judge_errors", "not_judged", "images_asked"),
    "bounds": dict.fromkeys(("errors_wrong", "errors_right"), BOUND),
    "judge": _numbers("cost_usd", "seconds", "errors"),
}
FINDING = _numbers("n_with", "n_without", "images_with", "images_without")
for _rate in ("sensitivity", "specificity"):
    FINDING |= _numbers(_rate, f"{_rate}_chance") | _intervals(f"{_rate}_wilson", f"{_rate}_interval_by_image")
SHARE = _numbers("n", "images", "share", "chance") | _intervals("wilson", "interval_by_image")
CLINICAL: dict[str, Shape] = {
    "findings": {ANY: FINDING},
    "missed_pathology": SHARE | _numbers("missed", "unread"),
    "over_call": SHARE | _numbers("over_called", "unread"),
    "regions": {**_numbers("n", "images", "unread"), "mirrored": SHARE | _numbers("mirrored")},
    "abstentions": SHARE | _numbers("abstained", "no_letter", "states_nothing"),
}
SECTIONS: dict[str, Shape] = {
    "closed": CLOSED,
    "open": OPEN,
    "combined": ACCURACY | RESAMPLED,
    "clinical": CLINICAL,
    "latency": TIMES | _numbers("warm_up_excluded", "batch_size") | {"per_kind": {"closed": TIMES, "open": TIMES}},
}


def check_place(place: object, wanted: str = NUMBER) -> str:
    """The place, if a scores document can have such a thing there; the ends of an interval are its `.0` and `.1`.

    Raises:
        ValueError: naming the part that is unknown, and what could stand there.
    """
    if not isinstance(place, str) or place.split(".")[0] not in SECTIONS or "." not in place:
        raise ValueError(f"{place!r}: a place in a scores document begins with one of {', '.join(SECTIONS)} and a dot")
    shape: Shape = SECTIONS
    for part in place.split("."):
        if shape == INTERVAL and part in {"0", "1"}:
            shape = NUMBER
        elif isinstance(shape, str):
            raise ValueError(f"{place!r}: there is {shape} before {part!r}, and nothing below it")
        elif part and (part in shape or ANY in shape):
            shape = shape.get(part) or shape[ANY]
        else:
            raise ValueError(f"{place!r}: no {part!r} in a scores document; there is {', '.join(shape)}")
    if shape != wanted:
        found = shape if isinstance(shape, str) else f"several things ({', '.join(shape)})"
        raise ValueError(f"{place!r} is {found}, and {wanted} is needed")
    return place
