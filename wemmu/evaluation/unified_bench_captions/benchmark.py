"""Unified-Bench, protocol 2: a VLM sees an image and two captions, and says which one is better, or that they tie.

A win counts 1, a tie 1/2. Each pair is judged twice, with the captions swapped, since judges prefer a place; the
publication describes no swap. Its prompt is not published, so ours asks for the criteria that the paper names.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from wemmu.config import StageRun
from wemmu.config.benchmarks import UnifiedBenchCaptionsOptions
from wemmu.evaluation.benchmark import BenchmarkRequest, Judged, Mark, by_category, mean_of, title_of
from wemmu.evaluation.server_benchmark import ServerBenchmark
from wemmu.evaluation.unified_bench.benchmark import images_in, pairs, read_captions

PROMPT = """Compare two captions of the image.

Caption A:
{a}

Caption B:
{b}

Judge how complete and how correct each is, how fluent it reads, and how well it tells what things are, what they do and
how they are arranged. Length alone is no merit, and a wrong statement is worse than a missing one. Reason in two
sentences at most. Then end with a line that holds one letter: A or B for the better caption, T if neither is better."""
# How the caption of the first letter does.
POINTS = {"A": 1.0, "B": 0.0, "T": 0.5}
_LETTER = re.compile(r"(?:\b(?:answer|winner|verdict|better)\b\W*)?([ABT])\W*", re.IGNORECASE)


def understood(text: str) -> str | None:
    """Return the letter that the answer's last line holds; None if it holds anything else."""
    last = text.strip().splitlines()[-1].strip(" *_`#>[]().:") if text.strip() else ""
    found = _LETTER.fullmatch(last)
    return found[1].upper() if found else None


class UnifiedBenchCaptions(ServerBenchmark):
    """Nothing is generated: the captions come from files."""

    title = "Unified-Bench, captions"
    generates = False

    def __init__(self, options: UnifiedBenchCaptionsOptions, run: StageRun | None) -> None:
        self._options, self._images = options, images_in(options.data)
        self._ours = read_captions(options.captions, self._images)
        self._rivals = {name: read_captions(file, self._images) for name, file in options.rivals.items()}
        super().__init__(options.judge, [options.captions, *options.rivals.values(), *self._images])

    def files(self) -> Mapping[str, Path]:
        rivals = {f"rivals.{name}": file for name, file in self._options.rivals.items()}
        # Not our captions: two models are compared on the same rivals.
        return {image.name: image for image in self._images} | rivals

    def requests(self) -> list[BenchmarkRequest]:
        return [
            BenchmarkRequest(f"{rival}_{image.stem}", self._ours[image.stem], rival, image.stem, self._options.seed)
            for rival in self._rivals
            for image in self._images
        ]

    def adopt(self, folder: Path) -> Mapping[str, Path]:
        files = pairs(self._images, folder)
        return {request.key: files[request.unit] for request in self.requests()}

    def verdict(self, judged: Judged) -> Mapping[str, float | None]:
        ours, theirs = judged.request.text, self._rivals[judged.request.category][judged.request.unit]
        asked = (PROMPT.format(a=a, b=b) for a, b in ((ours, theirs), (theirs, ours)))
        letters = [self.server.ask(text, [judged.image], understood) for text in asked]
        if None in letters:
            return dict.fromkeys(("win", "tie", "first place", "agreement"))
        first, second = (POINTS[str(letter)] for letter in letters)
        return {
            "win": (first + 1 - second) / 2,
            "tie": letters.count("T") / 2,
            "first place": (first + second) / 2,
            "agreement": float(first == 1 - second),
        }

    @staticmethod
    def headline(marks: Sequence[Mark]) -> dict[str, float]:
        """Return the win rate in percent (mean, then against each rival), then shares that describe the judge.

        tie: answers without a winner. first place: wins of the caption that is shown first, 50 of a fair judge.
        agreement: pairs with one winner in both orders.
        """
        rates = {f"win rate against {rival}": 100 * value for rival, value in by_category(marks, "win").items()}
        if not rates:
            return {}
        shares = {name: 100 * (mean_of(marks, name) or 0.0) for name in ("tie", "first place", "agreement")}
        return {title_of("win rate", marks, "win"): sum(rates.values()) / len(rates), **rates, **shares}


BENCHMARK = UnifiedBenchCaptions
