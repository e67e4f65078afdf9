"""Held-out requests of the miniature as a benchmark; a stage's evaluation uses the same requests."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from wemmu.config import StageRun
from wemmu.config.benchmarks import ShapesOptions
from wemmu.config.task import GENERATION_TASKS, TASK_NAMES
from wemmu.evaluation.benchmark import Benchmark, BenchmarkError, BenchmarkRequest, Judged, Mark, mean_of
from wemmu.evaluation.requests import HeldOutRequest, held_out, splits
from wemmu.evaluation.scores import judge
from wemmu.shapes.backbones import HIGH_PX
from wemmu.shapes.render import render


class Shapes(Benchmark):
    """The miniature's requests. held_out: key -> what is asked. px: side of the images."""

    title = "Shapes"

    def __init__(self, options: ShapesOptions, run: StageRun | None) -> None:
        if run is None and (invalid := [task for task in options.tasks if task not in GENERATION_TASKS]):
            raise BenchmarkError(f"only a run can be scored on {invalid[0]}; valid: {', '.join(GENERATION_TASKS)}")
        # Of compositions half as many.
        counts = {"test": options.prompts, "composition": -(-options.prompts // 2)}
        self.held_out = {
            _key(ask): ask
            for task in options.tasks
            for split in splits(task)
            if split in options.splits
            for ask in islice(held_out(task, split, options.seed), counts[split])
        }
        self.px = run.stage.resolution if run else HIGH_PX

    def files(self) -> Mapping[str, Path]:
        return {}

    def requests(self) -> list[BenchmarkRequest]:
        return [self._request(key, ask) for key, ask in self.held_out.items()]

    def _request(self, key: str, ask: HeldOutRequest) -> BenchmarkRequest:
        images = tuple(render(scene, self.px) for scene in ask.sources)
        category = category_of(ask.task, ask.split)
        return BenchmarkRequest(key, ask.text, category, key, ask.sample_id, images, given_task=ask.task)

    def judges(self) -> Mapping[str, Any]:
        return {"scorer": "exact"}

    def judge(self, images: Iterable[Judged]) -> Iterator[Mapping[str, float | None]]:
        """Yield the measures of the request's task, 0 or 1; the first one says whether it was answered."""
        for request, image, words in images:
            yield {name: float(value) for name, value in judge(self.held_out[request.key], image, words).items()}

    @staticmethod
    def headline(marks: Sequence[Mark]) -> dict[str, float]:
        """Return the mean over the categories, then each category: shares of correct answers."""
        own: dict[str, list[Mark]] = {}
        for mark in marks:
            own.setdefault(mark.category, []).append(mark)
        found = {name: mean_of(several, next(iter(several[0].values))) for name, several in own.items()}
        scores = {name: value for name, value in found.items() if value is not None}
        return {"correct": sum(scores.values()) / len(scores), **scores}


def category_of(task: str, split: str) -> str:
    """Return the name of a task and split for people."""
    return TASK_NAMES[task] + (", composition" if split == "composition" else "")


def _key(ask: HeldOutRequest) -> str:
    return f"{ask.task}_{ask.number:04d}" if ask.split == "test" else f"{ask.task}_{ask.split}_{ask.number:04d}"


BENCHMARK = Shapes
