"""Counts tokens and FLOPs of micro-batches from their shapes, before they go to the device."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import torch

from wemmu.config.schema import StageRun
from wemmu.planning.backbones import PlanError, Sizes, read_sizes
from wemmu.planning.flops import Sample, sample_flops
from wemmu.planning.plan import GPUS
from wemmu.positions import token_grid
from wemmu.types import Batch


class Workload:
    """Counts the micro-batches of one rank by the arithmetic of `wemmu.planning`.

    unknown: why tokens and FLOPs are not counted; empty if they are.
    """

    def __init__(self, run: StageRun):
        self._run = run
        self._sizes: Sizes | None = None
        self.unknown = ""
        # The same few shapes come again and again, and the arithmetic takes a millisecond.
        self._flops = lru_cache(1024)(self._flops_of)
        if not run.recipe.draws:
            self.unknown = "the arithmetic is of generation stages"
            return
        try:
            self._sizes = read_sizes(run.backbones)
        except PlanError as error:
            self.unknown = str(error)

    def of(self, batches: Sequence[Batch]) -> Counter[str]:
        """Samples under the name of their task; `tokens` and, forward and backward together, `flops`, where known.

        tokens: those of the prefix, the pathway and the DiT's latents; padding does not count.
        """
        asked: Counter[str] = Counter()
        for batch in batches:
            count = len(batch.sample_ids)
            asked[batch.task] += count
            if self._sizes is not None:
                sample = sample_of(batch, self._run, self._sizes)
                asked["tokens"] += count * (sample.prefix + sample.pathway + sample.latents)
                asked["flops"] += round(count * self._flops(sample))
        return asked

    def _flops_of(self, sample: Sample) -> float:
        assert self._sizes is not None
        return sum(cost.both for cost in sample_flops(sample, self._sizes, self._run.stage).values())


def sample_of(batch: Batch, run: StageRun, sizes: Sizes) -> Sample:
    """The average sample of a micro-batch; where a formula wants a square image, the one of the same area."""
    assert batch.target is not None, "a batch to train on has its target"
    count, pictures = len(batch.sample_ids), batch.images.shape[1]
    height, width = batch.target.shape[-2:]
    rows, columns = token_grid(height, width, sizes.vision.token_px)
    side = round(math.sqrt(rows * columns))
    latent_px, bridge = sizes.vae.latent_px, run.recipe.bridge
    latent_grid = height // latent_px, width // latent_px
    stored = batch.latents is not None
    # As `WeMMU.input_latents`: stored latents serve an input image only if its VLM tokens stand on the same grid.
    inputs = pictures * bridge.vae_branch * (not (stored and (rows, columns) == latent_grid))
    return Sample(
        text_tokens=round(int(batch.prompts.mask.sum()) / count) - pictures * side**2,
        pictures=pictures,
        picture_side=side,
        vae_tokens=pictures * rows * columns * bridge.vae_branch,
        queries=bridge.queries.number if bridge.queries.design == "learnable_fixed" else rows * columns,
        latents=math.prod(latent_grid) // sizes.dit.patch_size**2,
        encoded=(round(math.sqrt(height * width)),) * (not stored) + (side * latent_px,) * inputs,
    )


def peak_flops(run: StageRun, device: torch.device) -> float | None:
    """FLOP/s of which `device` is capable by its data sheet in the type the run computes in; None where none is known.

    The sheets are those of `wemmu.planning.plan.GPUS`: SXM modules, bfloat16.
    """
    if device.type != "cuda" or run.backbones.dtype != "bfloat16":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """By the name that the driver gives a GPU, as `NVIDIA H100 80GB HBM3`; of PCIe cards, which are slower, None."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    if {"pcie", "nvl"} & set(words):
        return None
    return next((gpu.peak for model, gpu in GPUS.items() if model in words), None)
