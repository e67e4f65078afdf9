"""GenEval: 553 prompts in six tasks, four images each, judged by a detector and CLIP.

The score is the mean over the tasks of the share of right images, as the publication's `summary_scores` computes it.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from wemmu.config import StageRun
from wemmu.config.benchmarks import GenEvalOptions
from wemmu.evaluation.benchmark import (
    Benchmark,
    BenchmarkError,
    BenchmarkRequest,
    Judged,
    Mark,
    adopted,
    mean_of,
    published,
    published_text,
)
from wemmu.evaluation.geneval.judges import ColorJudge, Detector
from wemmu.evaluation.geneval.rules import TASKS, kept, verdict
from wemmu.published.check import check
from wemmu.published.known import ENCODER
from wemmu.published.layout import TRANSFORMERS, tensors

REPOSITORY = "djghosh13/geneval (prompts/evaluation_metadata.jsonl, evaluation/object_names.txt)"


class GenEval(Benchmark):
    title = "GenEval"

    def __init__(self, options: GenEvalOptions, run: StageRun | None) -> None:
        self._options = options
        self._prompts = published(options.data, "evaluation_metadata.jsonl", REPOSITORY, "prompts")
        self._names = published(options.data, "object_names.txt", REPOSITORY, "evaluation")
        self._classes = [line.strip() for line in published_text(self._names, REPOSITORY).splitlines() if line.strip()]
        self._asked = self._read()
        # Before anything is generated.
        check(options.clip, ENCODER)
        tensors(options.detector, TRANSFORMERS)

    def _read(self) -> list[dict[str, Any]]:
        found = []
        for number, line in enumerate(published_text(self._prompts, REPOSITORY).splitlines(), start=1):
            if not line.strip():
                continue
            try:
                asked = json.loads(line)
                groups = [*asked["include"], *asked.get("exclude", ())]
                unknown = [group["class"] for group in groups if group["class"] not in self._classes]
                for number_of, group in enumerate(groups):
                    # A position is relative to an earlier group.
                    _, target = group.get("position") or ("", 0)
                    if group["count"] < 1 or not 0 <= target < max(number_of, 1):
                        raise ValueError(f"a count from 1, and the position of an earlier object, are needed: {group}")
                if asked["tag"] not in TASKS or not isinstance(asked["prompt"], str):
                    raise ValueError(f"the tag is {asked['tag']!r}; known: {', '.join(TASKS)}")
            except (ValueError, KeyError, TypeError) as error:
                raise BenchmarkError(f"{self._prompts}, line {number} is not of GenEval's form: {error!r}") from error
            if unknown:
                raise BenchmarkError(f"{self._prompts}, line {number}: object_names.txt does not list {unknown[0]}")
            found.append(asked)
        return found

    def files(self) -> Mapping[str, Path]:
        return {file.name: file for file in (self._prompts, self._names)}

    def requests(self) -> list[BenchmarkRequest]:
        return [
            BenchmarkRequest(
                key=f"{number:05d}_{image:04d}",
                text=asked["prompt"],
                category=asked["tag"],
                unit=f"{number:05d}",
                # The same noise for all prompts, as the publication seeds each prompt anew.
                seed=self._options.seed + image,
                facts=asked,
            )
            for number, asked in enumerate(self._asked)
            for image in range(self._options.images)
        ]

    def adopt(self, folder: Path) -> Mapping[str, Path]:
        keys = [request.key for request in self.requests()]
        return adopted({key: folder / key[:5] / "samples" / f"{key[6:]}.png" for key in keys})

    def judges(self) -> Mapping[str, Any]:
        detector, colors = self._judges
        return {"detector": detector.sha256, "colors": colors.sha256}

    def judge(self, images: Iterable[Judged]) -> Iterator[Mapping[str, float | None]]:
        detector, colors = self._judges
        for request, image, _ in images:
            tag = request.facts["tag"]
            objects = {name: kept(found, tag) for name, found in detector(image).items()}
            right, _ = verdict(
                request.facts,
                objects,
                lambda name, found, image=image: colors(image, name, found),  # type: ignore[misc]
            )
            yield {"correct": float(right)}

    @staticmethod
    def headline(marks: Sequence[Mark]) -> dict[str, float]:
        """Return the mean over the tasks (named partial unless all six were judged), then each task."""
        by_task = {task: mean_of((mark for mark in marks if mark.category == task), "correct") for task in TASKS}
        found = {task: share for task, share in by_task.items() if share is not None}
        if not found:
            return {}
        name = "GenEval" if len(found) == len(TASKS) else f"partial GenEval ({len(found)} of {len(TASKS)} tasks)"
        return {name: sum(found.values()) / len(found), **found}

    @cached_property
    def _judges(self) -> tuple[Detector, ColorJudge]:
        place = "cuda" if torch.cuda.is_available() else "cpu"
        return Detector(self._options.detector, self._classes, place), ColorJudge(self._options.clip, place)


BENCHMARK = GenEval
