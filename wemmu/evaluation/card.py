"""The result card of a benchmark: what was scored, how, and every score with its interval."""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from wemmu.checkpoint.manifest import sha256_of
from wemmu.config.benchmarks import CARD
from wemmu.config.files import replace_text
from wemmu.evaluation.benchmark import Benchmark, BenchmarkError, Mark, plain
from wemmu.jsonlines import write_lines
from wemmu.revision import revision

FORMAT = 1
MARKS = "marks.jsonl"
Headline = Callable[[Sequence[Mark]], dict[str, float]]


def write_card(
    folder: Path, name: str, benchmark: Benchmark, marks: Sequence[Mark], settings: Mapping[str, Any], resamples: int
) -> dict[str, Any]:
    """Write FOLDER/card.json and marks.jsonl; return the card."""
    lines = [{"key": m.key, "category": m.category, "unit": m.unit, "values": dict(m.values)} for m in marks]
    write_lines(folder / MARKS, lines)
    scores = intervals(benchmark.headline, marks, resamples)
    failures = sum(any(value is None for value in mark.values.values()) for mark in marks)
    commit = revision()
    card = {
        "format": FORMAT,
        "benchmark": name,
        "title": benchmark.title,
        "score": next(iter(scores), None),
        "scores": scores,
        "n": len(marks),
        "units": len({mark.unit for mark in marks}),
        "failures": failures,
        "settings": dict(settings),
        "files": {key: sha256_of(file) for key, file in benchmark.files().items()},
        "judges": dict(benchmark.judges()),
        "keys": hashlib.sha256(json.dumps([mark.key for mark in marks]).encode()).hexdigest(),
        "commit": commit and {"commit": commit.commit, "dirty": commit.dirty},
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    replace_text(folder / CARD, json.dumps(card, indent=1))
    return card


def intervals(headline: Headline, marks: Sequence[Mark], resamples: int) -> dict[str, dict[str, float]]:
    """Return name -> value, low, high: the 95 % percentile interval of a bootstrap over units within each category."""
    value = headline(marks)
    draws = _resampled(headline, marks, resamples)
    return {
        name: {"value": value[name], **_interval([one[plain(name)] for one in draws if plain(name) in one])}
        for name in value
    }


def _interval(values: Sequence[float]) -> dict[str, float]:
    low, high = np.quantile(values, (0.025, 0.975)) if len(values) else (math.nan, math.nan)
    return {"low": float(low), "high": float(high)}


def _resampled(headline: Headline, marks: Sequence[Mark], resamples: int) -> list[dict[str, float]]:
    """Return scores of so many resamples by their plain names; the same every time for the same units."""
    drawn = [headline([mark for unit in units for mark in unit]) for units in _draws(marks, resamples)]
    # A resample contains images without a verdict by chance, so its names do not depend on them.
    return [{plain(name): value for name, value in scores.items()} for scores in drawn]


def _draws(marks: Sequence[Mark], resamples: int) -> list[list[list[Mark]]]:
    categories: dict[str, dict[str, list[Mark]]] = defaultdict(lambda: defaultdict(list))
    for mark in marks:
        categories[mark.category][mark.unit].append(mark)
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(resamples):
        chosen: list[list[Mark]] = []
        for units in categories.values():
            listed = list(units.values())
            chosen += [listed[i] for i in rng.integers(len(listed), size=len(listed))]
        drawn.append(chosen)
    return drawn


def read_card(folder: Path) -> tuple[dict[str, Any], list[Mark]]:
    """Read the card and the marks in a benchmark's folder, or beside the given card.json.

    Raises:
        BenchmarkError: if they are missing or unreadable.
    """
    folder = folder.parent if folder.name == CARD else folder
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        lines = [json.loads(line) for line in (folder / MARKS).read_text(encoding="utf-8").splitlines()]
        return card, [Mark(**line) for line in lines]
    except (OSError, ValueError, TypeError) as error:
        raise BenchmarkError(
            f"{folder} holds no result card ({error}); `wemmu evaluate SOURCE --benchmark NAME` writes one"
        ) from error


# Fields of a card that must be equal, so that a difference of scores is one of the models.
COMPARABLE = ("format", "benchmark", "files", "judges", "keys", "n")


def compare(a: Path, b: Path, headline: Headline, resamples: int = 1000) -> dict[str, dict[str, float]]:
    """Return score -> a, b, difference b - a and the interval of the paired difference.

    Raises:
        BenchmarkError: if benchmark, files, judges, requests, resolution or seed differ; names what differs.
    """
    (first, first_marks), (second, second_marks) = read_card(a), read_card(b)
    wrong = [field for field in COMPARABLE if first.get(field) != second.get(field)]
    for field in ("resolution", "seed"):
        if first["settings"].get(field) != second["settings"].get(field):
            wrong.append(f"settings.{field}")
    if set(first["scores"]) != set(second["scores"]):
        wrong.append("scores")
    if wrong:
        shown = "; ".join(f"{f}: {_short(first, f)} and {_short(second, f)}" for f in wrong)
        raise BenchmarkError(f"{a} and {b} cannot be compared, they differ in {shown}")
    values = headline(first_marks), headline(second_marks)
    # The same units are drawn for both: the interval is that of the paired difference.
    pairs = list(
        zip(_resampled(headline, first_marks, resamples), _resampled(headline, second_marks, resamples), strict=True)
    )
    found = {}
    for name in values[0]:
        changes = [y[plain(name)] - x[plain(name)] for x, y in pairs if plain(name) in x and plain(name) in y]
        found[name] = {
            "a": values[0][name],
            "b": values[1][name],
            "difference": values[1][name] - values[0][name],
            **_interval(changes),
        }
    return found


def _short(card: Mapping[str, Any], name: str) -> str:
    value: Any = card
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    text = ", ".join(value) if name == "scores" else json.dumps(value)
    return text if len(text) < 80 else f"{text[:77]}..."
