"""Compares the arms of `benchmarks.ross`: paired differences over seeds and questions, a table, a figure."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
import numpy as np

from wemmu.evaluation.scores import wilson

matplotlib.use("Agg")
import matplotlib.pyplot as plt

KINDS = ("small", "large", "new pair")
BASE = "answers only"
PAIRS = (
    ("latents, denoised", BASE),
    ("latents, regressed", BASE),
    ("pixels, regressed", BASE),
    ("latents, denoised", "latents, regressed"),
    ("latents, regressed", "pixels, regressed"),
)
# Measure -> (its name, factor).
MEASURES = {
    "right": ("right answers at the end, points", 100),
    "right over the run": ("right answers, mean of the three points of the run", 100),
    "nll": ("nats per answer token at the end", 1),
    "nll over the run": ("nats per answer token, mean of the three points of the run", 1),
}
DRAWS = 4000
Rows = Sequence[dict[str, Any]]
Differences = list[dict[str, Any]]


def compared(rows: Rows) -> Iterator[dict[str, Any]]:
    """Yield the difference of each pair of arms, for each kind of question and measure, with an interval of 95 %.

    Both arms have the same seeds and questions. The bootstrap draws seeds, and within each the questions, with
    replacement. From few seeds such an interval is rather too narrow, so the seeds' own differences stand beside it.
    """
    generator = np.random.default_rng(0)
    for one, other in PAIRS:
        seeds = sorted(_seeds(rows, one) & _seeds(rows, other))
        if not seeds:
            continue
        for kind in KINDS:
            for measure in MEASURES:
                # [seeds, questions]
                table = np.stack([_of(rows, one, s, measure, kind) - _of(rows, other, s, measure, kind) for s in seeds])
                chosen = generator.integers(len(seeds), size=(DRAWS, len(seeds)))
                places = generator.integers(table.shape[1], size=(DRAWS, len(seeds), table.shape[1]))
                means = table[chosen[..., None], places].mean((1, 2))
                low, high = np.quantile(means, [0.025, 0.975])
                yield {
                    "arm": one, "against": other, "kind": kind, "measure": measure, "seeds": len(seeds),
                    "difference": float(table.mean()), "low": float(low), "high": float(high),
                    "by_seed": table.mean(1).tolist(),
                }  # fmt: skip


def _seeds(rows: Rows, arm: str) -> set[int]:
    return {row["seed"] for row in rows if row["arm"] == arm}


def _of(rows: Rows, arm: str, seed: int, measure: str, kind: str) -> Any:
    (row,) = (row for row in rows if (row["arm"], row["seed"]) == (arm, seed))
    return np.array(row[measure][kind])


def markdown(rows: Rows, differences: Differences, steps: int, questions: int) -> list[str]:
    lines = [
        f"{steps} steps of 16 images with 4 questions, from a new projector; {questions} held-out questions of each "
        "kind and seed.",
        "Right answers, % (95 % Wilson interval over all questions of all seeds):",
        "",
        f"| trained | seeds | {' | '.join(KINDS)} | images restored, % | pixel error |",
        f"|---|---:|{'---:|' * (len(KINDS) + 2)}",
    ]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        cells = [_share([r for row in mine for r in row["right"][kind]]) for kind in KINDS]
        images = [row for row in mine if "restored" in row]
        cells += [f"{mean(100 * row['restored'] for row in images):.0f}" if images else "-"]
        cells += [f"{mean(row['rmse'] for row in images):.3f}" if images else "-"]
        lines.append(f"| {arm} | {len(mine)} | {' | '.join(cells)} |")
    lines += ["", f"Right answers after {steps // 2}, {steps * 3 // 4} and {steps} steps, %, mean of the seeds:", ""]
    lines += [f"| trained | {' | '.join(KINDS)} |", f"|---|{'---:|' * len(KINDS)}"]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        means = {kind: np.mean([row["progress"][kind] for row in rows if row["arm"] == arm], axis=0) for kind in KINDS}
        lines.append(f"| {arm} | {' | '.join(' / '.join(f'{100 * v:.0f}' for v in means[kind]) for kind in KINDS)} |")
    for measure, (name, scale) in MEASURES.items():
        lines += ["", f"Differences in {name} (95 % bootstrap over seeds and questions; each seed):", ""]
        lines += [f"| arm - other | {' | '.join(KINDS)} |", f"|---|{'---:|' * len(KINDS)}"]
        for one, other in PAIRS:
            found = [d for d in differences if (d["arm"], d["against"], d["measure"]) == (one, other, measure)]
            if found:
                lines.append(f"| {one} - {other} | {' | '.join(_difference(d, scale) for d in found)} |")
    return lines


def _share(right: Sequence[float]) -> str:
    low, high = wilson(round(sum(right)), len(right))
    return f"{100 * mean(right):.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _difference(found: dict[str, Any], scale: int) -> str:
    digits = 1 if scale > 1 else 3
    values = ", ".join(f"{scale * value:+.{digits}f}" for value in found["by_seed"])
    low, high = scale * found["low"], scale * found["high"]
    return f"{scale * found['difference']:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f}; {values})"


def figure(rows: Rows, differences: Differences, file: Path) -> None:
    """Draw the differences to the arm without reconstruction, with intervals, each seed as a dot."""
    against = [d for d in differences if d["against"] == BASE]
    if not against:
        return
    drawn, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    names = {"right": "right answers, points (more is better)", "nll": "nats per answer token (less is better)"}
    for axis, (measure, name) in zip(axes, names.items(), strict=True):
        scale = 100 if measure == "right" else 1
        for k, arm in enumerate(dict.fromkeys(d["arm"] for d in against)):
            mine = [d for d in against if (d["arm"], d["measure"]) == (arm, measure)]
            x = np.arange(len(mine)) + 0.2 * (k - 1)
            y = np.array([scale * d["difference"] for d in mine])
            bars = np.abs(np.array([[scale * d["low"], scale * d["high"]] for d in mine]).T - y)
            axis.errorbar(x, y, bars, fmt="o", capsize=3, label=arm, color=f"C{k}")
            for at, d in zip(x, mine, strict=True):
                axis.scatter([at + 0.06] * len(d["by_seed"]), [scale * v for v in d["by_seed"]], s=8, color=f"C{k}")
        axis.axhline(0, color="gray", linewidth=0.8)
        axis.set_xticks(range(len(KINDS)), KINDS)
        axis.set_xlim(-0.5, len(KINDS) - 0.5)
        axis.set_title(f"against answers only: {name}", fontsize=9)
    axes[0].legend(fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(file, dpi=110)
    plt.close(drawn)
