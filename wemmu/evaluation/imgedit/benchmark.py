"""ImgEdit-Bench, the basic part: a VLM gives each edit three numbers from 1 to 5, by the published prompt of its type.

An edit's score is the mean of its numbers, a type's the mean of its edits, the benchmark's the mean of the types.
"""

import re
from collections.abc import Mapping, Sequence

from wemmu.config import StageRun
from wemmu.config.benchmarks import ImgEditOptions
from wemmu.evaluation.benchmark import (
    BenchmarkError,
    BenchmarkRequest,
    Judged,
    Mark,
    by_category,
    open_image,
    published,
    read_json,
    title_of,
)
from wemmu.evaluation.server_benchmark import ServerBenchmark

REPOSITORY = "PKU-YuanGroup/ImgEdit (Benchmark/Basic/basic_edit.json, and prompts.json and the images in its data set)"
# A line `Name: 4` of an answer.
_SCORE = re.compile(r"^[^:\n]+:\s*\**([1-5])\**\s*$", re.MULTILINE)
NUMBERS = 3
FIELDS = ("id", "prompt", "edit_type")


def understood(text: str) -> float | None:
    """Return the mean of the three numbers of an answer; None unless there are three from 1 to 5."""
    numbers = [int(number) for number in _SCORE.findall(text)]
    return sum(numbers) / NUMBERS if len(numbers) == NUMBERS else None


class ImgEdit(ServerBenchmark):
    title = "ImgEdit-Bench"

    def __init__(self, options: ImgEditOptions, run: StageRun | None) -> None:
        self._options = options
        file = published(options.data, "basic_edit.json", REPOSITORY)
        prompts = published(options.data, "prompts.json", REPOSITORY)
        self._edits, self._prompts = (read_json(one, dict, REPOSITORY) for one in (file, prompts))
        for key, edit in self._edits.items():
            if not isinstance(edit, dict) or any(type(edit.get(name)) is not str for name in FIELDS):
                raise BenchmarkError(f"{file}: {key} is not of ImgEdit's form: texts {', '.join(FIELDS)}")
            if type(self._prompts.get(edit["edit_type"])) is not str:
                raise BenchmarkError(f"{prompts} has no prompt for edits of type {edit['edit_type']}")
            published(options.images, edit["id"], REPOSITORY)
        super().__init__(options.judge, [file, prompts])

    def requests(self) -> list[BenchmarkRequest]:
        found = []
        for key, edit in self._edits.items():
            name = self._options.images / edit["id"]
            image = open_image(name, name.read_bytes())
            found.append(BenchmarkRequest(key, edit["prompt"], edit["edit_type"], key, self._options.seed, (image,)))
        return found

    def verdict(self, judged: Judged) -> Mapping[str, float | None]:
        request = judged.request
        prompt = self._prompts[request.category].replace("<edit_prompt>", request.text)
        return {"score": self.server.ask(prompt, [request.images[0], judged.image], understood)}

    @staticmethod
    def headline(marks: Sequence[Mark]) -> dict[str, float]:
        """Return ImgEdit-Bench, the mean over the types, then each type."""
        types = by_category(marks, "score")
        if not types:
            return {}
        return {title_of("ImgEdit-Bench", marks, "score"): sum(types.values()) / len(types), **types}


BENCHMARK = ImgEdit
