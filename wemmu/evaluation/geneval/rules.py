"""GenEval's rules: from detected objects to a verdict (arXiv 2310.11513, and the thresholds of its repository)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# Lowest confidence of a detection; counting is stricter, because it must not count an object twice.
CONFIDENCE, COUNTING_CONFIDENCE = 0.3, 0.9
# Of each class, the most confident.
MAX_OBJECTS = 16
# Share of the objects' sizes by which their centres must be apart before a direction counts.
OVERLAP = 0.1
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


class Detection(NamedTuple):
    """box: x0, y0, x1, y1 px. mask: bool [H, W]."""

    box: tuple[float, float, float, float]
    score: float
    mask: NDArray[np.bool_]


# Class of an object -> its detections, most confident first.
Objects = Mapping[str, Sequence[Detection]]
# Class of an object, its detections -> the colour of each.
Colors = Callable[[str, Sequence[Detection]], Sequence[str]]


def kept(detections: Sequence[Detection], tag: str) -> list[Detection]:
    """Return the detections of one class that count for a task, most confident first."""
    lowest = COUNTING_CONFIDENCE if tag == "counting" else CONFIDENCE
    return sorted((d for d in detections if d.score > lowest), key=lambda d: -d.score)[:MAX_OBJECTS]


def relations(a: Detection, b: Detection) -> set[str]:
    """Return where `a` is, seen from `b`: above, below, left of, right of; two of them on a diagonal."""
    box_a, box_b = (np.array(d.box).reshape(2, 2) for d in (a, b))
    offset = box_a.mean(0) - box_b.mean(0)
    reach = OVERLAP * (np.abs(box_a[1] - box_a[0]) + np.abs(box_b[1] - box_b[0]))
    beyond = np.maximum(np.abs(offset) - reach, 0) * np.sign(offset)
    if (np.abs(beyond) < 1e-3).all():
        return set()
    dx, dy = beyond / np.linalg.norm(offset)
    where = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in where.items() if holds}


def verdict(asked: Mapping[str, Any], objects: Objects, colors: Colors) -> tuple[bool, str]:
    """Return whether an image shows what one line of evaluation_metadata.jsonl asks, and the first reason if not."""
    reasons: list[str] = []
    # Of each required group, its detections; None if it was not satisfied.
    matched: list[Sequence[Detection] | None] = []
    for group in asked.get("include", ()):
        name, count = group["class"], group["count"]
        found = list(objects.get(name, ()))[:count]
        reason = _lacking(group, found, matched, colors)
        matched.append(None if reason else found)
        reasons += [reason] * bool(reason)
    for group in asked.get("exclude", ()):
        if (number := len(objects.get(group["class"], ()))) >= group["count"]:
            reasons.append(f"expected {group['class']} < {group['count']}, found {number}")
    return not reasons, reasons[0] if reasons else ""


def _lacking(
    group: Mapping[str, Any],
    found: Sequence[Detection],
    matched: Sequence[Sequence[Detection] | None],
    colors: Colors,
) -> str:
    name, count = group["class"], group["count"]
    if len(found) < count:
        return f"expected {name} >= {count}, found {len(found)}"
    if "color" in group:
        seen = list(colors(name, found))
        if seen.count(group["color"]) < count:
            return f"expected {group['color']} {name} >= {count}, found {', '.join(seen)}"
    if "position" in group:
        relation, target = group["position"]
        if matched[target] is None:
            return f"no target for {name} to be {relation}"
        for one in found:
            for other in matched[target] or ():
                if relation not in (seen_at := relations(one, other)):
                    return f"expected {name} {relation} target, found {' and '.join(sorted(seen_at)) or 'no direction'}"
    return ""
