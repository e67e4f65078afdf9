"""Fidelity: the distance of generated images to the targets of held-out records, and what edits leave unchanged."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wemmu.backbones.encoders import ImageEncoder, cosine, load_encoder
from wemmu.config import StageRun
from wemmu.config.benchmarks import FidelityOptions
from wemmu.config.schema import Data
from wemmu.config.shards import DATASET_FILE
from wemmu.config.task import Task
from wemmu.data.streams import open_held_out
from wemmu.evaluation.benchmark import Benchmark, BenchmarkError, BenchmarkRequest, Judged, Mark, mean_of
from wemmu.evaluation.fidelity.measures import closer_to_target, identity, pixel_shift, psnr, unasked
from wemmu.evaluation.fidelity.perceptual import LPIPS, SMALLEST
from wemmu.pixels import as_image, to_unit
from wemmu.published.check import check
from wemmu.published.known import ENCODER


class Fidelity(Benchmark):
    title = "Fidelity"

    def __init__(self, options: FidelityOptions, run: StageRun | None) -> None:
        data, self._resolution = _data(options, run), options.resolution or (run.stage.resolution if run else None)
        if invalid := set(options.tasks) - {Task.RECONSTRUCTION, Task.EDIT, Task.MULTI_EDIT}:
            raise BenchmarkError(f"fidelity has no target for {', '.join(invalid)}; valid: reconstruction, edit, ...")
        if self._resolution is None:
            raise BenchmarkError("fidelity of an export needs the data set's resolution: --set resolution=PX")
        self._file = data.shards / DATASET_FILE
        # Before anything is generated.
        for folder in options.encoders.values():
            check(folder, ENCODER)
        self._lpips = None if options.lpips is None else LPIPS(options.lpips)
        if self._lpips and self._resolution < SMALLEST:
            raise BenchmarkError(f"LPIPS needs {SMALLEST} px or more, the images have {self._resolution}")
        self._directories = dict(options.encoders)
        self._targets: dict[str, Tensor] = {}
        self._requests: list[BenchmarkRequest] = []
        for stream, places in open_held_out(data, options.tasks, self._resolution):
            for place in places[: options.records]:
                record = stream[place]
                key = f"{stream.settings.task}_{hashlib.sha256(record.id.encode()).hexdigest()[:16]}"
                if key in self._targets:
                    continue
                self._targets[key] = record.target.float() / 255
                seed = int.from_bytes(hashlib.sha256(f"{options.seed}/{record.id}".encode()).digest()[:7])
                images = tuple(map(as_image, record.images))
                size = (stream.settings.height, stream.settings.width)
                category = str(stream.settings.task)
                self._requests.append(BenchmarkRequest(key, record.prompt, category, key, seed, images, size))

    def files(self) -> Mapping[str, Path]:
        return {DATASET_FILE: self._file}

    def requests(self) -> list[BenchmarkRequest]:
        return self._requests

    def judges(self) -> Mapping[str, Any]:
        lpips = {"lpips": self._lpips.identity()} if self._lpips else {}
        return {name: encoder.report.sha256 for name, encoder in self._encoders.items()} | lpips

    def judge(self, images: Iterable[Judged]) -> Iterator[Mapping[str, float | None]]:
        several = len({request.size for request in self._requests}) > 1
        for request, image, _ in images:
            output, target = to_unit(image), self._targets[request.key]
            if output.shape != target.shape:
                raise BenchmarkError(f"{request.key}.png is {image.size}, its target is {tuple(target.shape[1:])}")
            values: dict[str, float | None] = {"psnr": psnr(output, target)}
            if self._lpips:
                values["lpips"] = self._lpips(output, target)
            for name, encoder in self._encoders.items():
                with torch.no_grad():
                    values[name] = cosine(*encoder.embed(torch.stack([output, target]))).item()
            if request.task is Task.RECONSTRUCTION and (shift := pixel_shift(target, output)) is not None:
                values["pixel shift"] = shift
            # An input of another size has no pixels that could stay where they are.
            if request.task is Task.EDIT and (source := to_unit(request.images[0])).shape == target.shape:
                mask = unasked(source, target)
                # An edit of all pixels has no unchanged part, so these measures are None, not failures.
                edit = {
                    "identity": identity(source, output, mask),
                    "unasked psnr": psnr(source, output, mask),
                    "pixel shift": pixel_shift(source, output, mask),
                    "follows": closer_to_target(source, target, output),
                }
                values |= {name: value for name, value in edit.items() if value is not None}
            if several and "pixel shift" in values:
                values["pixel shift {}x{}".format(*target.shape[1:])] = values["pixel shift"]
            yield values

    @staticmethod
    def headline(marks: Sequence[Mark]) -> dict[str, float]:
        """Return the mean PSNR over the tasks, then TASK/MEASURE; encoders by the names in the options."""
        found: dict[str, float] = {}
        for category in dict.fromkeys(mark.category for mark in marks):
            own = [mark for mark in marks if mark.category == category]
            for measure in dict.fromkeys(measure for mark in own for measure in mark.values):
                if (value := mean_of(own, measure)) is not None:
                    found[f"{category}/{measure}"] = value
        pixels = [value for name, value in found.items() if name.endswith("/psnr")]
        return {"psnr": sum(pixels) / len(pixels), **found}

    @cached_property
    def _encoders(self) -> dict[str, ImageEncoder]:
        return {name: load_encoder(folder, name=name) for name, folder in self._directories.items()}


def _data(options: FidelityOptions, run: StageRun | None) -> Data:
    """Return the data set and how many of its records are held out.

    Raises:
        BenchmarkError: if the run has trained on all records, or nothing says which data set.
    """
    if options.shards is not None:
        return Data(shards=options.shards, validation=options.validation or options.records)
    if run is None:
        raise BenchmarkError("fidelity of an export needs a data set: --set shards=DIR")
    if options.validation is not None:
        raise BenchmarkError(
            "validation needs shards=DIR; a run scores the records that its own data.validation holds out"
        )
    if not run.data.validation:
        raise BenchmarkError(
            f"{run.stage.name} trained on every record of {run.data.shards}: its data.validation is 0. Set it before "
            "training, or score another data set: --set shards=DIR"
        )
    return run.data


BENCHMARK = Fidelity
