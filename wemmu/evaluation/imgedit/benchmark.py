"""ImgEdit-Bench, the basic part: a VLM gives each edit three numbers from 1 to 5, by the published prompt of its type.

An edit's score is the mean of its numbers, a type's the mean of its edits, the benchmark's the mean of the types.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from wemmu.config import StageRun
from wemmu.config.benchmarks import ImgEditOptions
from wemmu.evaluation.benchmark import BenchmarkError, BenchmarkRequest, Judged, Mark, adopted, mean_of, published
from wemmu.evaluation.server_judge import ServerJudge
from wemmu.images import decode, to_rgb

REPOSITORY = "PKU-YuanGroup/ImgEdit (Benchmark/Basic/basic_edit.json, and prompts.json and the images in its data set)"
# A line `Name: 4` of an answer.
_SCORE = re.compile(r"^[^:\n]+:\s*\**([1-5])\**\s*$", re.MULTILINE)
NUMBERS = 3


def understood(text: str) -> float | None:
    """Return the mean of the three numbers of an answer; None unless there are three from 1 to 5."""
    numbers = [int(number) for number in _SCORE.findall(text)]
    return sum(numbers) / NUMBERS if len(numbers) == NUMBERS else None


class ImgEdit:
    """See `wemmu.evaluation.benchmark.Benchmark`."""

    title = "ImgEdit-Bench"
    repository = REPOSITORY

    def __init__(self, options: ImgEditOptions, run: StageRun | None) -> None:
        self._options = options
        self._file = published(options.data, "basic_edit.json", REPOSITORY)
        self._prompts_file = published(options.data, "prompts.json", REPOSITORY)
        self._edits, self._prompts = (_read(file) for file in (self._file, self._prompts_file))
        for key, edit in self._edits.items():
            if not isinstance(edit, dict) or not {"id", "prompt", "edit_type"} <= edit.keys():
                raise BenchmarkError(f"{self._file}: {key} is not of ImgEdit's form: id, prompt and edit_type")
            if edit["edit_type"] not in self._prompts:
                raise BenchmarkError(f"{self._prompts_file} has no prompt for edits of type {edit['edit_type']}")
            published(options.images, edit["id"], REPOSITORY)
        self._judge = ServerJudge(options.judge, options.judge.cache)

    def files(self) -> Mapping[str, Path]:
        return {file.name: file for file in (self._file, self._prompts_file)}

    def requests(self) -> list[BenchmarkRequest]:
        found = []
        for key, edit in self._edits.items():
            image = to_rgb(decode((self._options.images / edit["id"]).read_bytes()))
            found.append(BenchmarkRequest(key, edit["prompt"], edit["edit_type"], key, self._options.seed, (image,)))
        return found

    def adopt(self, folder: Path) -> Mapping[str, Path]:
        return adopted({key: folder / f"{key}.png" for key in self._edits})

    def judges(self) -> Mapping[str, Any]:
        return {"vlm": self._judge.identity()}

    def judge(self, images: Iterable[Judged]) -> Iterator[Mapping[str, float | None]]:
        return self._judge.each(self._one, images)

    def _one(self, judged: Judged) -> Mapping[str, float | None]:
        request = judged.request
        prompt = self._prompts[request.category].replace("<edit_prompt>", request.text)
        return {"score": self._judge.ask(prompt, [request.images[0], judged.image], understood)}

    @staticmethod
    def headline(marks: Sequence[Mark]) -> dict[str, float]:
        """ImgEdit-Bench, the mean over the types, then each type."""
        types = dict.fromkeys(mark.category for mark in marks)
        means = {name: mean_of((mark for mark in marks if mark.category == name), "score") for name in types}
        found = {name: value for name, value in means.items() if value is not None}
        if not found:
            return {}
        failed = sum(mark.values.get("score") is None for mark in marks)
        name = "ImgEdit-Bench" if not failed else f"partial ImgEdit-Bench ({failed} of {len(marks)} not judged)"
        return {name: sum(found.values()) / len(found), **found}


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BenchmarkError(f"{file} is not JSON: {error}; {REPOSITORY} has it") from error
    if not isinstance(found, dict):
        raise BenchmarkError(f"{file} is not a JSON object; {REPOSITORY} has it")
    return found


BENCHMARK = ImgEdit
