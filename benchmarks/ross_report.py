"""Compares the arms of `benchmarks.ross`: paired differences over seeds and questions, and tables."""

from collections.abc import Iterator, Sequence
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.measure import table
from wemmu.evaluation.scores import wilson

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
                apart = np.stack([_of(rows, one, s, measure, kind) - _of(rows, other, s, measure, kind) for s in seeds])
                chosen = generator.integers(len(seeds), size=(DRAWS, len(seeds)))
                places = generator.integers(apart.shape[1], size=(DRAWS, len(seeds), apart.shape[1]))
                means = apart[chosen[..., None], places].mean((1, 2))
                low, high = np.quantile(means, [0.025, 0.975])
                yield {
                    "arm": one, "against": other, "kind": kind, "measure": measure, "seeds": len(seeds),
                    "difference": float(apart.mean()), "low": float(low), "high": float(high),
                    "by_seed": apart.mean(1).tolist(),
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
    ]
    scores, progress = list[list[Any]](), list[list[str]]()
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        images = [row for row in mine if "restored" in row]
        scores.append([arm, len(mine), *(_share([r for row in mine for r in row["right"][kind]]) for kind in KINDS)])
        scores[-1] += [f"{mean(100 * row['restored'] for row in images):.0f}" if images else "-"]
        scores[-1] += [f"{mean(row['rmse'] for row in images):.3f}" if images else "-"]
        means = [np.mean([row["progress"][kind] for row in mine], axis=0) for kind in KINDS]
        progress.append([arm, *(" / ".join(f"{100 * share:.0f}" for share in of) for of in means)])
    lines += table(["trained", "seeds", *KINDS, "images restored, %", "pixel error"], scores)
    lines += ["", f"Right answers after {steps // 2}, {steps * 3 // 4} and {steps} steps, %, mean of the seeds:", ""]
    lines += table(["trained", *KINDS], progress)
    for measure, (name, scale) in MEASURES.items():
        lines += ["", f"Differences in {name} (95 % bootstrap over seeds and questions; each seed):", ""]
        found = {
            pair: [d for d in differences if (d["arm"], d["against"], d["measure"]) == (*pair, measure)]
            for pair in PAIRS
        }
        cells = ([" - ".join(pair), *(_difference(d, scale) for d in of)] for pair, of in found.items() if of)
        lines += table(["arm - other", *KINDS], cells)
    return lines


def _share(right: Sequence[float]) -> str:
    low, high = wilson(round(sum(right)), len(right))
    return f"{100 * mean(right):.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _difference(found: dict[str, Any], scale: int) -> str:
    digits = 1 if scale > 1 else 3
    values = ", ".join(f"{scale * value:+.{digits}f}" for value in found["by_seed"])
    low, high = scale * found["low"], scale * found["high"]
    return f"{scale * found['difference']:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f}; {values})"
