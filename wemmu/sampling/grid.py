"""Contact sheets: what was asked, what was given and what came out, side by side."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from wemmu.config.schema import SamplePrompt, Sampling
from wemmu.pixels import to_images
from wemmu.sampling.sampler import Request, Sampler, task_of

CELL = 128
MARGIN = 8
LINE = 13
CAPTION_LINES = 4


@dataclass(frozen=True)
class Row:
    """One entry of a sheet: its words and its pictures, the last one being what came out."""

    text: str
    pictures: Sequence[Image.Image]


def contact_sheet(rows: Sequence[Row], columns: int = 4) -> Image.Image:
    """Lay entries out in `columns`, each with its words underneath; pictures are enlarged without smoothing."""
    per_entry = max(len(row.pictures) for row in rows)
    width, height = per_entry * (CELL + 2) + MARGIN, CELL + CAPTION_LINES * LINE + MARGIN
    lines = -(-len(rows) // columns)
    sheet = Image.new("RGB", (min(columns, len(rows)) * width + MARGIN, lines * height + MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, row in enumerate(rows):
        left, top = MARGIN + (i % columns) * width, MARGIN + (i // columns) * height
        for k, picture in enumerate(row.pictures):
            last = k == len(row.pictures) - 1
            sheet.paste(picture.resize((CELL, CELL), Image.Resampling.NEAREST), (left + k * (CELL + 2), top))
            if last and k > 0:
                box = (left + k * (CELL + 2), top, left + k * (CELL + 2) + CELL - 1, top + CELL - 1)
                draw.rectangle(box, outline=(220, 120, 0), width=2)
        words = textwrap.wrap(row.text or "(no words)", width=max(20, (width - MARGIN) // 6))[:CAPTION_LINES]
        for n, words_line in enumerate(words):
            draw.text((left, top + CELL + 2 + n * LINE), words_line, fill="black", font=font)
    return sheet


def sample_grid(sampler: Sampler, sampling: Sampling, resolution: int) -> Image.Image:
    """Draw the fixed prompts of the config at `resolution` as one sheet."""
    rows: dict[int, Row] = {}
    numbered = sorted(enumerate(sampling.prompts), key=lambda item: len(item[1].images))
    for count, group in groupby(numbered, key=lambda item: len(item[1].images)):
        for task, members in groupby(sorted(group, key=lambda m: m[1].text == ""), key=lambda m: task_of(m[1].text, count)):
            chosen = list(members)
            request = _request(task, chosen, resolution)
            made = to_images(sampler(request, sampling))
            for (i, prompt), picture, given in zip(chosen, made, request.images, strict=True):
                inputs = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in given.cpu()]
                rows[i] = Row(prompt.text, [*inputs, picture])
    return contact_sheet([rows[i] for i in sorted(rows)])


def _request(task, chosen: list[tuple[int, SamplePrompt]], resolution: int) -> Request:
    images = [[load_image(path, resolution) for path in prompt.images] for _, prompt in chosen]
    stacked = torch.stack([torch.stack(i) if i else torch.zeros(0, 3, resolution, resolution, dtype=torch.uint8) for i in images])
    return Request(
        task, [p.text for _, p in chosen], stacked, (resolution, resolution), torch.tensor([i for i, _ in chosen])
    )


def load_image(path, resolution: int) -> torch.Tensor:
    """A picture from disk, resized to a square of `resolution`: uint8 [3, H, W]."""
    picture = Image.open(path).convert("RGB").resize((resolution, resolution), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
