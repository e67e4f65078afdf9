"""DPG-Bench: 1065 dense prompts; a VLM answers the published questions on each image.

A question whose parent is answered no counts as no. An image's score is the share of yes, the benchmark's the mean over
the images, in percent. The publication asks mPLUG-large; another VLM's scores are comparable only with its own.
"""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from wemmu.config import StageRun
from wemmu.config.benchmarks import DPGOptions
from wemmu.evaluation.benchmark import (
    BenchmarkError,
    BenchmarkRequest,
    Judged,
    Mark,
    mean_of,
    published,
    published_text,
    title_of,
)
from wemmu.evaluation.server_benchmark import ServerBenchmark

REPOSITORY = "TencentQQGYLab/ELLA (dpg_bench/dpg_bench.csv)"
COLUMNS = ("item_id", "text", "proposition_id", "dependency", "category_broad", "question_natural_language")
_ANSWER = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


@dataclass
class Item:
    """One prompt. questions: number -> question; parents: number -> the questions it depends on."""

    text: str
    questions: dict[int, str] = field(default_factory=dict)
    parents: dict[int, tuple[int, ...]] = field(default_factory=dict)
    categories: dict[int, str] = field(default_factory=dict)


def read_items(file: Path) -> dict[str, Item]:
    """Read dpg_bench.csv: one line for each question.

    Raises:
        BenchmarkError: names the line that has another form.
    """
    items: dict[str, Item] = {}
    reader = csv.DictReader(io.StringIO(published_text(file, REPOSITORY), newline=""))
    if missing := [column for column in COLUMNS if column not in (reader.fieldnames or ())]:
        raise BenchmarkError(f"{file} has no column {missing[0]}; {REPOSITORY} publishes it")
    for line, row in enumerate(reader, start=2):
        try:
            if empty := [column for column in COLUMNS if not (row[column] or "").strip()]:
                raise ValueError(f"{empty[0]} is empty")
            number = int(row["proposition_id"])
            parents = tuple(int(one) for one in row["dependency"].split(",") if int(one) > 0)
        except ValueError as error:
            raise BenchmarkError(f"{file}, line {line} is not of DPG-Bench's form: {error}") from error
        item = items.setdefault(row["item_id"], Item(row["text"]))
        item.questions[number] = row["question_natural_language"]
        item.parents[number], item.categories[number] = parents, row["category_broad"].strip()
    for name, item in items.items():
        if unknown := {p for parents in item.parents.values() for p in parents} - item.questions.keys():
            raise BenchmarkError(f"{file}: a question of {name} depends on {min(unknown)}, which it does not have")
    return items


def score(answers: Mapping[int, bool], parents: Mapping[int, Sequence[int]]) -> float:
    """Return the share of questions that are answered yes and whose parents are, too."""
    return sum(yes and all(answers[p] for p in parents[number]) for number, yes in answers.items()) / len(answers)


def understood(text: str) -> bool | None:
    """Return whether the answer is yes; None unless it says one of the two words and not both."""
    words = {word.lower() for word in _ANSWER.findall(text)}
    return words == {"yes"} if len(words) == 1 else None


class DPG(ServerBenchmark):
    title = "DPG-Bench"

    def __init__(self, options: DPGOptions, run: StageRun | None) -> None:
        self._options = options
        file = published(options.data, "dpg_bench.csv", REPOSITORY, "dpg_bench")
        self._items = read_items(file)
        super().__init__(options.judge, [file])

    def requests(self) -> list[BenchmarkRequest]:
        return [
            BenchmarkRequest(f"{name}_{image}", item.text, "DPG-Bench", name, self._options.seed + image)
            for name, item in self._items.items()
            for image in range(self._options.images)
        ]

    def verdict(self, judged: Judged) -> Mapping[str, float | None]:
        item = self._items[judged.request.unit]
        answers: dict[int, bool] = {}
        for number, question in item.questions.items():
            answer = self.server.ask(f"{question} Answer with yes or no.", [judged.image], understood)
            if answer is None:
                return {"score": None}
            answers[number] = answer
        by_category: dict[str, list[bool]] = {}
        for number, yes in answers.items():
            by_category.setdefault(item.categories[number], []).append(yes)
        shares = {name: 100 * sum(yes) / len(yes) for name, yes in by_category.items()}
        return {"score": 100 * score(answers, item.parents), **shares}

    @staticmethod
    def headline(marks: Sequence[Mark]) -> dict[str, float]:
        """Return DPG-Bench, then the mean share of yes of each broad category, without dependencies."""
        overall = mean_of(marks, "score")
        if overall is None:
            return {}
        categories = dict.fromkeys(key for mark in marks for key in mark.values if key != "score")
        found = {key: mean_of(marks, key) for key in sorted(categories)}
        shares = {key: value for key, value in found.items() if value is not None}
        return {title_of("DPG-Bench", marks, "score"): overall, **shares}


BENCHMARK = DPG
