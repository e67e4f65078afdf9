"""The fixed prompts of a stage, drawn on a contact sheet."""

from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from wemmu.config.schema import SamplePrompt, Sampling
from wemmu.config.task import Task
from wemmu.pixels import as_image, fitted, to_images
from wemmu.report.sheet import Row, contact_sheet
from wemmu.sampling.request import GenerationRequest, task_of
from wemmu.sampling.sampler import Sampler

# Levels of 255 by which the pixels of a blank image may differ.
BLANK = 2


def sample_grid(sampler: Sampler, sampling: Sampling, resolution: int) -> tuple[Image.Image, int]:
    """Draw the fixed prompts of the config at `resolution`; returns one sheet, and how many images are blank."""
    rows: dict[int, Row] = {}
    numbered = sorted(enumerate(sampling.prompts), key=lambda item: len(item[1].images))
    for count, group in groupby(numbered, key=lambda item: len(item[1].images)):
        by_task = sorted(((task_of(m[1].text, count), m) for m in group), key=lambda pair: pair[0])
        for task, members in groupby(by_task, key=lambda pair: pair[0]):
            chosen = [member for _, member in members]
            request = _request(task, chosen, resolution)
            made = to_images(sampler(request, sampling))
            for (i, prompt), drawn, given in zip(chosen, made, request.images, strict=True):
                inputs = [as_image(image) for image in given]
                rows[i] = Row(prompt.text, [*inputs, drawn])
    blank = sum(is_blank(row.images[-1]) for row in rows.values())
    return contact_sheet([rows[i] for i in sorted(rows)]), blank


def is_blank(image: Image.Image) -> bool:
    """Whether an image has one colour only, as from a model with NaN weights."""
    return int(np.ptp(np.asarray(image.convert("RGB")), axis=(0, 1)).max()) <= BLANK


def _request(task: Task, chosen: list[tuple[int, SamplePrompt]], resolution: int) -> GenerationRequest:
    size = (resolution, resolution)
    images = torch.zeros(len(chosen), len(chosen[0][1].images), 3, *size, dtype=torch.uint8)
    for b, (_, prompt) in enumerate(chosen):
        for n, path in enumerate(prompt.images):
            images[b, n] = load_image(path, resolution)
    return GenerationRequest(task, [p.text for _, p in chosen], images, size, torch.tensor([i for i, _ in chosen]))


def load_image(path: Path, resolution: int) -> torch.Tensor:
    """An image from disk, as training has it, in a square of `resolution`: uint8 [3, H, W]."""
    return fitted([path], (resolution, resolution))[0]
