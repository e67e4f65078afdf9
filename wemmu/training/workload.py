"""Counts tokens and FLOPs of micro-batches from their shapes, before they go to the device."""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch

from wemmu.config.schema import StageRun
from wemmu.config.task import Task
from wemmu.planning.ask import Item, Shape, ask
from wemmu.planning.plan import GPUS, Assumptions, shape_of
from wemmu.positions import token_grid
from wemmu.types import Batch

# Text tokens of two prompts, from which the FLOPs of others follow: nearly linearly, for attention among so few tokens
# is little.
PROMPTS = (16, 48)


class Workload:
    """Counts the micro-batches of one rank by what `wemmu.measuring` says of the model.

    unknown: why tokens and FLOPs are not counted; empty if they are.
    """

    def __init__(self, run: StageRun):
        self._run = run
        self._costs: dict[tuple[Task, int, bool], tuple[float, float]] = {}
        self.unknown = ""
        with self._surviving():
            shapes = [shape_of(task, run, Assumptions()) for task in run.stage.mixture]
            self._measure({(shape.task, shape.images, shape.stored) for shape in shapes})

    def count(self, batches: Sequence[Batch]) -> Counter[str]:
        """Count samples by task, `tokens`, and `flops` (forward and backward) if known.

        tokens: those of the prompts and, of generation, of the pathway and the DiT's latents; without `padding`.
        """
        counts: Counter[str] = Counter()
        for batch in batches:
            counts[batch.task] += len(batch.sample_ids)
            if not self.unknown:
                with self._surviving():
                    counts["tokens"] += self._tokens(batch)
                    counts["padding"] += int((~batch.prompts.mask).sum())
                    counts["flops"] += round(self._flops(batch))
        return counts

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        """Training does not end because it cannot be measured."""
        try:
            yield
        except Exception as error:
            self.unknown = str(error) or repr(error)

    def _tokens(self, batch: Batch) -> int:
        prompts = int(batch.prompts.mask.sum())
        if batch.target is None:
            return prompts
        height, width = batch.target.shape[-2:]
        rows, columns = token_grid(height, width, self._model["token_px"])
        latents = height * width // self._model["latent_px"] ** 2
        images, samples = sum(batch.prompts.image_tokens), len(batch.sample_ids)
        return prompts + self._run.recipe.tokens_beside(images, samples, rows * columns) + samples * latents

    def _flops(self, batch: Batch) -> float:
        """Measured at the stage's resolution; what is not the text's is scaled by the area of the images."""
        count, images = len(batch.sample_ids), batch.images.shape[1]
        pixels = batch.images if batch.target is None else batch.target
        height, width = pixels.shape[-2:]
        area = height * width / self._run.stage.resolution**2
        text = int(batch.prompts.mask.sum()) - sum(batch.prompts.image_tokens)
        of_token, of_images = self._cost(batch.task, images, batch.latents is not None)
        return of_token * text + of_images * count * area

    def _cost(self, task: Task, images: int, stored: bool) -> tuple[float, float]:
        """FLOPs of a text token, and of a sample without text."""
        key = (task, images, stored)
        if key not in self._costs:
            self._measure({key})
        return self._costs[key]

    def _measure(self, keys: Collection[tuple[Task, int, bool]]) -> None:
        """Always in a process of its own: what tensors without numbers leave in a cache would end up in training."""
        side, items = self._run.stage.resolution, []
        for task, images, stored in keys:
            answer = PROMPTS[0] // 2 * (task in (Task.UNDERSTANDING, Task.CAPTION))
            shapes = [Shape(task, side, side, text, images, answer=answer, stored=stored) for text in PROMPTS]
            items += [Item("step", self._run, shape) for shape in shapes]
        answers = ask(items)
        flops = [sum(map(sum, one["flops"].values())) for one in answers]
        for key, few, many in zip(keys, flops[::2], flops[1::2], strict=True):
            of_token = (many - few) / (PROMPTS[1] - PROMPTS[0])
            self._costs[key] = of_token, few - of_token * PROMPTS[0]
        self._model = answers[0]


def peak_flops(run: StageRun, device: torch.device) -> float | None:
    """Return the FLOP/s of `device` by its data sheet in the dtype of the run; None if unknown.

    The sheets are those of `wemmu.planning.plan.GPUS`: SXM modules, bfloat16.
    """
    if device.type != "cuda" or run.backbones.dtype != "bfloat16":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """Return the peak by the driver's name of a GPU, `NVIDIA H100 80GB HBM3`; None for slower PCIe cards."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    if {"pcie", "nvl"} & set(words):
        return None
    return next((gpu.peak for model, gpu in GPUS.items() if model in words), None)
