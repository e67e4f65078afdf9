"""The fixed prompts of a stage, drawn on a contact sheet."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wemmu.config.buckets import RequestSizes, Size
from wemmu.config.schema import Sampling
from wemmu.config.task import Task
from wemmu.images import to_rgb
from wemmu.pixels import as_image, fitted, on_canvas, to_images
from wemmu.report.sheet import Row, contact_sheet
from wemmu.sampling.request import GenerationRequest, task_of
from wemmu.sampling.sampler import Sampler

# Levels of 255 by which the pixels of a blank image may differ.
BLANK = 2


def sample_grid(sampler: Sampler, sampling: Sampling, sizes: RequestSizes) -> tuple[Image.Image, int]:
    """Draw the fixed prompts of the config; returns one sheet, and how many images are blank."""
    rows: dict[int, Row] = {}
    groups: dict[tuple[int, Task, Size], list[tuple[int, list[Tensor]]]] = {}
    for i, prompt in enumerate(sampling.prompts):
        given = [to_rgb(as_image(path)) for path in prompt.images]
        size, own = sizes.of([(image.height, image.width) for image in given])
        task = task_of(prompt.text, len(given))
        groups.setdefault((len(given), task, size), []).append((i, [*map(fitted, given, own)]))
    for (_, task, size), members in sorted(groups.items(), key=lambda item: item[0]):
        images, own_sizes = on_canvas([inputs for _, inputs in members], size)
        numbers = [i for i, _ in members]
        texts = [sampling.prompts[i].text for i in numbers]
        request = GenerationRequest(task, texts, images, size, torch.tensor(numbers), sizes=own_sizes)
        for (i, inputs), drawn in zip(members, to_images(sampler(request, sampling)), strict=True):
            rows[i] = Row(sampling.prompts[i].text, [*map(as_image, inputs), drawn])
    blank = sum(is_blank(row.images[-1]) for row in rows.values())
    return contact_sheet([rows[i] for i in sorted(rows)]), blank


def is_blank(image: Image.Image) -> bool:
    """Return whether an image has only one colour, as from a model with NaN weights."""
    return int(np.ptp(np.asarray(image.convert("RGB")), axis=(0, 1)).max()) <= BLANK


def load_image(path: Path, resolution: int) -> torch.Tensor:
    """Load an image as training does, in a square of `resolution`: uint8 [3, H, W]."""
    return fitted(path, (resolution, resolution))
