"""Warns when a model copies the input of edits."""

from collections.abc import Mapping
from pathlib import Path

from wemmu.jsonlines import read_lines

# Share of held-out edits from which on copies are too many, and a fall of the share that counts as learning.
TOO_MANY, LEARNS = 0.5, 0.05


def copies(before: Mapping[str, float], now: Mapping[str, float]) -> list[str]:
    """Return a sentence for each task whose copy rate is high and does not fall; both: key of the record -> value.

    The first measure of a stage says nothing: a stage that begins with edits begins by copying.
    """
    return [
        f"{key.partition('/')[2]}: {rate:.0%} of the held-out edits come out as their input ({before[key]:.0%} at the "
        "measure before), so the model begins to copy. Check that input and target are not swapped, lower the learning "
        "rate, or add edits that change much"
        for key, rate in now.items()
        if key.startswith("copy_rate/") and key in before and rate >= TOO_MANY and rate > before[key] - LEARNS
    ]


def last_measured(metrics: Path) -> dict[str, float]:
    """Return the newest copy rates of a record, for a run that resumes."""
    lines = (line for line in read_lines(metrics) if any(key.startswith("copy_rate/") for key in line))
    return dict(next(reversed(list(lines)), {}))
