"""Held-out requests of the miniature behind the protocol of all benchmarks. A stage's evaluation asks the same."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from wemmu.config import StageRun
from wemmu.config.benchmarks import ShapesOptions
from wemmu.config.task import TASK_NAMES
from wemmu.evaluation.benchmark import BenchmarkError, BenchmarkRequest, Judged, Mark, adopt_by_key, mean_of
from wemmu.evaluation.requests import HeldOutRequest, held_out
from wemmu.evaluation.scores import HEADLINE, judge
from wemmu.shapes.backbones import HIGH_PX
from wemmu.shapes.render import render


class Shapes:
    """See `wemmu.evaluation.benchmark.Benchmark`."""

    title = "Shapes"
    generates = True
    repository = ""

    def __init__(self, options: ShapesOptions, run: StageRun | None) -> None:
        if invalid := [task for task in options.tasks if task not in HEADLINE or HEADLINE[task] == "right"]:
            raise BenchmarkError(f"shapes cannot score {invalid[0]} here; valid tasks: t2i, reconstruction, edit, ...")
        self._asked = {
            f"{task}_{ask.number:04d}": ask
            for task in options.tasks
            for ask in islice(held_out(task, "test", options.seed), options.prompts)
        }
        self._px = run.stage.resolution if run else HIGH_PX

    def files(self) -> Mapping[str, Path]:
        return {}

    def requests(self) -> list[BenchmarkRequest]:
        return [self._request(key, ask) for key, ask in self._asked.items()]

    def _request(self, key: str, ask: HeldOutRequest) -> BenchmarkRequest:
        images = tuple(render(scene, self._px) for scene in ask.sources)
        return BenchmarkRequest(key, ask.text, TASK_NAMES[ask.task], key, ask.sample_id, images)

    def adopt(self, folder: Path) -> Mapping[str, Path]:
        return adopt_by_key(folder, self.requests())

    def judges(self) -> Mapping[str, Any]:
        return {"scorer": "exact"}

    def judge(self, images: Iterable[Judged]) -> Iterator[Mapping[str, float | None]]:
        for request, image in images:
            ask = self._asked[request.key]
            yield {"correct": float(judge(ask, image)[HEADLINE[ask.task]])}

    @staticmethod
    def headline(marks: Sequence[Mark]) -> dict[str, float]:
        """The mean over tasks, then each task: shares of correct images."""
        categories = dict.fromkeys(mark.category for mark in marks)
        found = {name: mean_of((m for m in marks if m.category == name), "correct") for name in categories}
        scores = {name: value for name, value in found.items() if value is not None}
        return {"correct": sum(scores.values()) / len(scores), **scores}


BENCHMARK = Shapes
