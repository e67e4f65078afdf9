"""Scores a generated image, and computes intervals for the share of correct ones."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image

from wemmu.config.task import Task
from wemmu.evaluation.requests import HeldOutRequest
from wemmu.shapes.language import full_caption, parse_caption
from wemmu.shapes.scene import MAX_OBJECTS, Scene
from wemmu.shapes.scorer import caption_satisfied, read, same_scene, score_edit

# The measure that decides whether a request was answered; the others are details.
HEADLINE = {
    Task.T2I: "satisfied",
    Task.RECONSTRUCTION: "same",
    Task.UNCONDITIONAL: "readable",
    Task.EDIT: "correct",
    Task.MULTI_EDIT: "correct",
    Task.UNDERSTANDING: "right",
    Task.CAPTION: "same",
}


def wilson(successes: int, count: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share, which unlike the normal one is valid at 0 and all successes."""
    # Slow to import, and only a finished evaluation needs it.
    from scipy.stats import binomtest

    interval = binomtest(successes, count).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class Share:
    """`successes` of `count`, their ratio and its 95 % interval."""

    count: int
    successes: int
    share: float
    low: float
    high: float

    @classmethod
    def of(cls, outcomes: Sequence[bool]) -> "Share":
        return cls(len(outcomes), sum(outcomes), sum(outcomes) / len(outcomes), *wilson(sum(outcomes), len(outcomes)))


def judge(ask: HeldOutRequest, image: Image.Image, words: str = "") -> dict[str, bool]:
    """Return every measure of the request's task for the generated image, or for the answer."""
    match ask.task:
        case Task.T2I:
            return {"satisfied": caption_satisfied(image, ask.text), "readable": readable(image)}
        case Task.RECONSTRUCTION:
            return {"same": same_scene(image, ask.sources[0]), "readable": readable(image)}
        case Task.UNCONDITIONAL:
            return {"readable": readable(image)}
        case Task.UNDERSTANDING:
            return {"right": words == ask.answer, "restored": same_scene(image, ask.sources[0])}
        case Task.CAPTION:
            return {"same": same_scene(image, ask.sources[0]), **caption_marks(words, ask.sources[0])}
        case _:
            assert ask.edit is not None
            score = score_edit(image, ask.edit)
            return {"correct": score.correct} | asdict(score)


def caption_marks(words: str, scene: Scene) -> dict[str, bool]:
    """Return whether a caption says nothing false of `scene`, and whether it says everything.

    A caption that is not of the world's language, or that leaves out an object, is false.
    """
    try:
        demand = parse_caption(words)
    except ValueError:
        return {"true": False, "complete": False}
    true = demand.satisfied_by(scene)
    complete = demand.background is not None and all(None not in (m.color, m.size, m.cell) for m in demand.mentions)
    return {"true": true, "complete": true and complete}


def readable(image: Image.Image) -> bool:
    """Return whether the image is a scene of the miniature; an empty background or four shapes are not."""
    scene = read(image).scene
    return scene is not None and 1 <= len(scene.objects) <= MAX_OBJECTS


def seen(image: Image.Image) -> str:
    """Describe what the scorer reads from the image."""
    scene: Scene | None = read(image).scene
    if scene is None:
        return "nothing that the world could draw"
    return full_caption(scene) if scene.objects else f"an empty {scene.background} background"


def summarize(asks: Sequence[HeldOutRequest], marks: Sequence[dict[str, bool]]) -> dict[str, Any]:
    """Return the shares of every measure over all requests and within each group."""
    groups: dict[str, list[dict[str, bool]]] = {}
    for ask, mark in zip(asks, marks, strict=True):
        groups.setdefault(ask.group, []).append(mark)
    # A breakdown into one group adds nothing.
    by = {group: _shares(groups[group]) for group in sorted(groups)} if len(groups) > 1 else {}
    return {"measures": _shares(marks), "by": by}


def _shares(marks: Sequence[dict[str, bool]]) -> dict[str, dict[str, float]]:
    return {name: asdict(Share.of([m[name] for m in marks])) for name in marks[0]}
