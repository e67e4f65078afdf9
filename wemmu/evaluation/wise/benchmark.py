"""WISE: a VLM gives each image 0, 1 or 2 for consistency, realism and aesthetic quality.

    WiScore = (0.7 consistency + 0.2 realism + 0.1 aesthetic quality) / 2

The benchmark's is the mean over six categories with the published weights.
"""

import re
from collections.abc import Mapping, Sequence

from wemmu.config import StageRun
from wemmu.config.benchmarks import WISEOptions
from wemmu.evaluation.benchmark import (
    BenchmarkError,
    BenchmarkRequest,
    Judged,
    Mark,
    by_category,
    mean_of,
    published,
    read_json,
    title_of,
)
from wemmu.evaluation.server_benchmark import ServerBenchmark
from wemmu.evaluation.wise.prompt import JudgePrompt

REPOSITORY = "PKU-YuanGroup/WISE (data/*.json, gpt_eval.py)"
FILES = ("cultural_common_sense.json", "spatio-temporal_reasoning.json", "natural_science.json")
# Last prompt_id and weight of each category, by the publication's Calculate.py.
CATEGORIES = {
    "Cultural": (400, 0.4),
    "Time": (567, 0.167),
    "Space": (700, 0.133),
    "Biology": (800, 0.1),
    "Physics": (900, 0.1),
    "Chemistry": (1000, 0.1),
}
WEIGHTS = {"consistency": 0.7, "realism": 0.2, "aesthetic quality": 0.1}
# A line `Realism: 1`, also with stars around it, or as 1/2.
_SCORE = re.compile(
    r"^\W*(consistency|realism|aesthetic quality)[ *]*[:：][ *]*([0-2])(?: */ *2)?[ *]*$",
    re.IGNORECASE | re.MULTILINE,
)


def understood(text: str) -> dict[str, float] | None:
    """Return the three numbers of an answer, from 0 to 2; None unless it gives each once."""
    found = [(name.lower(), float(number)) for name, number in _SCORE.findall(text)]
    return dict(found) if sorted(name for name, _ in found) == sorted(WEIGHTS) else None


def wiscore(numbers: Mapping[str, float]) -> float:
    """Return the WiScore of an image, within [0, 1]."""
    return sum(weight * numbers[name] for name, weight in WEIGHTS.items()) / 2


class WISE(ServerBenchmark):
    title = "WISE"

    def __init__(self, options: WISEOptions, run: StageRun | None) -> None:
        self._options = options
        script = published(options.data, "gpt_eval.py", REPOSITORY)
        files = [published(options.data, name, REPOSITORY, "data") for name in FILES]
        self._prompt, self._items = JudgePrompt(script, REPOSITORY), dict[str, dict[str, str]]()
        for file in files:
            for item in read_json(file, list, REPOSITORY):
                try:
                    number, texts = int(item["prompt_id"]), {key: str(item[key]) for key in ("Prompt", "Explanation")}
                    self._items[str(number)] = texts | {"category": category_of(number)}
                except (KeyError, TypeError, ValueError) as error:
                    raise BenchmarkError(f"{file} is not of WISE's form: {error!r}; {REPOSITORY} has it") from error
        super().__init__(options.judge, [*files, script])

    def requests(self) -> list[BenchmarkRequest]:
        return [
            BenchmarkRequest(name, item["Prompt"], item["category"], name, self._options.seed)
            for name, item in self._items.items()
        ]

    def verdict(self, judged: Judged) -> Mapping[str, float | None]:
        item = self._items[judged.request.key]
        asked = self._prompt.user(item["Prompt"], item["Explanation"])
        numbers = self.server.ask(asked, [judged.image], understood, self._prompt.system)
        if numbers is None:
            return {"WiScore": None, **dict.fromkeys(WEIGHTS)}
        return {"WiScore": wiscore(numbers), **numbers}

    @staticmethod
    def headline(marks: Sequence[Mark]) -> dict[str, float]:
        """Return WiScore, then the score of each category, then the mean of each number, from 0 to 2."""
        means = by_category(marks, "WiScore")
        if not means:
            return {}
        weights = {name: weight for name, (_, weight) in CATEGORIES.items() if name in means}
        overall = sum(weight * means[name] for name, weight in weights.items()) / sum(weights.values())
        details = {name: value for name in WEIGHTS if (value := mean_of(marks, name)) is not None}
        return {title_of("WiScore", marks, "WiScore", tuple(CATEGORIES)): overall, **means, **details}


def category_of(prompt_id: int) -> str:
    """Raise ValueError for a number outside all categories."""
    for name, (last, _) in CATEGORIES.items():
        if 1 <= prompt_id <= last:
            return name
    raise ValueError(f"prompt_id is {prompt_id}; valid: 1 to 1000")


BENCHMARK = WISE
