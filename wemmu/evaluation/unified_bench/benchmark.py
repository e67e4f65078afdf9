"""Unified-Bench, protocol 1: similarity of images and their reconstructions under four frozen encoders.

    S_b = 100 / N sum_i cos(f_b(x_i), f_b(x~_i)),  Unified-Score = (S_CLIP + S_LongCLIP + S_DINOv2 + S_DINOv3) / 4

(arXiv 2509.09666, section on Unified-Bench). The score has this name only if all four encoders judged all images and
the images were generated from captions.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from wemmu.backbones.encoders import ImageEncoder, cosine, load_encoder
from wemmu.config import StageRun
from wemmu.config.benchmarks import Encoder, UnifiedBenchOptions
from wemmu.evaluation.benchmark import (
    Benchmark,
    BenchmarkError,
    BenchmarkRequest,
    Judged,
    Mark,
    mean_of,
    open_image,
    published_text,
)
from wemmu.pixels import to_unit
from wemmu.published.check import check
from wemmu.published.known import ENCODER

ENCODERS: dict[Encoder, str] = {"clip": "CLIP", "longclip": "LongCLIP", "dinov2": "DINOv2", "dinov3": "DINOv3"}
SCORE = "Unified-Score"
REPOSITORY = "PKU-YuanGroup/UAE (Unified-Bench's Image.zip)"
# Categories: how the images came to be.
CAPTION, DIRECT = "from captions", "from the images"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class UnifiedBench(Benchmark):
    title = "Unified-Bench"

    def __init__(self, options: UnifiedBenchOptions, run: StageRun | None) -> None:
        self._options = options
        self._images = images_in(options.data)
        # Before anything is generated.
        for folder in options.encoders.values():
            check(folder, ENCODER)
        self._captions = {} if options.captions is None else read_captions(options.captions, self._images)

    def files(self) -> Mapping[str, Path]:
        return {image.name: image for image in self._images}

    def requests(self) -> list[BenchmarkRequest]:
        category = CAPTION if self._captions else DIRECT
        return [
            BenchmarkRequest(
                key=image.stem,
                text=self._captions.get(image.stem, ""),
                category=category,
                unit=image.stem,
                seed=self._options.seed,
                images=() if self._captions else (open_image(image, image.read_bytes()),),
            )
            for image in self._images
        ]

    def adopt(self, folder: Path) -> Mapping[str, Path]:
        return pairs(self._images, folder)

    def judges(self) -> Mapping[str, Any]:
        return {name: encoder.report.sha256 for name, encoder in self._encoders.items()}

    @torch.no_grad()
    def judge(self, images: Iterable[Judged]) -> Iterator[Mapping[str, float | None]]:
        originals = {image.stem: image for image in self._images}
        for request, image, _ in images:
            original = originals[request.key]
            pair = [to_unit(open_image(original, original.read_bytes())), to_unit(image)]
            yield {
                ENCODERS[name]: 100 * cosine(*encoder.embed(pair)).item() for name, encoder in self._encoders.items()
            }

    @staticmethod
    def headline(marks: Sequence[Mark]) -> dict[str, float]:
        """Return the Unified-Score, or a name that says what it lacks; then each encoder's score."""
        by_encoder = {name: mean_of(marks, name) for name in ENCODERS.values()}
        scores = {name: value for name, value in by_encoder.items() if value is not None}
        if not scores:
            return {}
        judged = [all(mark.values.get(name) is not None for name in ENCODERS.values()) for mark in marks]
        name = SCORE if all(judged) else f"partial score ({', '.join(scores)})"
        if any(mark.category == DIRECT for mark in marks):
            name += " from images, not captions"
        return {name: sum(scores.values()) / len(scores), **scores}

    @cached_property
    def _encoders(self) -> dict[Encoder, ImageEncoder]:
        given, place = self._options.encoders, "cuda" if torch.cuda.is_available() else "cpu"
        # In the table's order.
        return {name: load_encoder(given[name], name=name).to(place) for name in ENCODERS if name in given}


def images_in(folder: Path) -> list[Path]:
    """Raise BenchmarkError if there are none."""
    if not (found := _images(folder)):
        raise BenchmarkError(f"{folder} holds no images ({', '.join(SUFFIXES)}); {REPOSITORY} has them")
    return found


def read_captions(file: Path, images: Sequence[Path]) -> dict[str, str]:
    """Return stem -> caption of every image.

    Raises:
        BenchmarkError: if an image has none, or a line is of another form.
    """
    found = dict[str, str]()
    for number, line in enumerate(published_text(file, "a model").split("\n"), start=1):
        if line.strip():
            try:
                entry = json.loads(line)
                found[Path(entry["image"]).stem] = (entry["caption"] or "").strip()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise BenchmarkError(
                    f'{file}, line {number} is not {{"image": NAME, "caption": TEXT}} but {line[:80]!r} ({error!r})'
                ) from error
    if missing := [image.name for image in images if not found.get(image.stem)]:
        raise BenchmarkError(
            f"{file} has no caption for {len(missing)} of {len(images)} images, the first is {missing[0]}; "
            'every line is {"image": NAME, "caption": TEXT}'
        )
    return found


def pairs(images: Sequence[Path], folder: Path) -> dict[str, Path]:
    """Return stem -> reconstruction: the file of the same name, else of the same stem, else recon_STEM.

    Raises:
        BenchmarkError: if an image has none, or several.
    """
    there = _images(folder)
    found: dict[str, Path] = {}
    for image in images:
        rules = (
            [file for file in there if file.name == image.name],
            [file for file in there if file.stem == image.stem],
            [file for file in there if file.stem == f"recon_{image.stem}"],
        )
        fitting = next(filter(None, rules), [])
        if len(fitting) > 1:
            raise BenchmarkError(f"{folder} has several reconstructions of {image.name}: {fitting[0].name}, ...")
        if fitting:
            found[image.stem] = fitting[0]
    if missing := [image.name for image in images if image.stem not in found]:
        raise BenchmarkError(
            f"{folder} lacks the reconstructions of {len(missing)} of {len(images)} images, the first is {missing[0]}; "
            f"valid names: {missing[0]}, or recon_{Path(missing[0]).stem}.png"
        )
    return found


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise BenchmarkError(f"{folder} is not a folder of images; {REPOSITORY} has Unified-Bench's")
    found = [file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES]
    # 2.jpg before 10.jpg.
    return sorted(found, key=lambda file: (len(file.stem), file.stem))


BENCHMARK = UnifiedBench
