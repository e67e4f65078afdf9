"""Contact sheets: what was asked, what was given and what came out, side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from wemmu.config.schema import SamplePrompt, Sampling
from wemmu.config.task import Task
from wemmu.images import decode
from wemmu.pixels import fitted, to_images
from wemmu.sampling.sampler import Request, Sampler, task_of

# Everything in px. A picture of 64 or 32 px is enlarged to a cell by a whole number, so that its pixels stay square.
CELL = 128
GAP = 4
ARROW = 18
MARGIN = 18
LINE = 17
TITLE = 38
MAX_LINES = 11
# Levels of 255 by which the pixels of a blank picture may differ.
BLANK = 2
INK, PALE, FRAME = (34, 34, 34), (130, 130, 130), (214, 214, 214)
RIGHT, WRONG = (24, 128, 62), (196, 48, 43)


@dataclass(frozen=True)
class Row:
    """One entry of a sheet: its words and its pictures, the last one being what came out.

    right: whether that was what was asked, None where nobody knows.
    """

    text: str
    pictures: Sequence[Image.Image]
    right: bool | None = None


def contact_sheet(rows: Sequence[Row], columns: int = 4) -> Image.Image:
    """Lay entries out in `columns`, each with its words underneath.

    Raises:
        ValueError: if there are no entries.
    """
    return sectioned_sheet([("", rows)], columns)


def sectioned_sheet(sections: Sequence[tuple[str, Sequence[Row]]], columns: int) -> Image.Image:
    """Contact sheets under each other, each with its title ("" for none).

    The sheet is as wide as `columns` of its narrowest entries; of wider ones fewer stand in a line.

    Raises:
        ValueError: if there are no entries.
    """
    if not any(rows for _, rows in sections):
        raise ValueError("a contact sheet needs at least one entry")
    blocks = [(title, [_entry(row) for row in rows]) for title, rows in sections if rows]
    widest = max(len(entries) for _, entries in blocks)
    narrow = min(entry.width for _, entries in blocks for entry in entries)
    wide = max(entry.width for _, entries in blocks for entry in entries)
    inner = max(min(columns, widest) * (narrow + MARGIN) - MARGIN, wide)
    lines = [(title if i == 0 else "", line) for title, es in blocks for i, line in enumerate(_lines(es, inner))]
    height = MARGIN + sum(max(e.height for e in line) + MARGIN + (TITLE if title else 0) for title, line in lines)
    sheet = Image.new("RGB", (inner + 2 * MARGIN, height), "white")
    draw, top = ImageDraw.Draw(sheet), MARGIN
    for title, line in lines:
        if title:
            draw.text((MARGIN, top), title, fill=INK, font=_font(19))
            top += TITLE
        left = MARGIN
        for entry in line:
            sheet.paste(entry, (left, top))
            left += entry.width + MARGIN
        top += max(entry.height for entry in line) + MARGIN
    return sheet


def _lines(entries: list[Image.Image], inner: int) -> list[list[Image.Image]]:
    """Entries in lines, as many in each as fit into `inner` px."""
    lines: list[list[Image.Image]] = [[]]
    for entry in entries:
        if lines[-1] and sum(e.width + MARGIN for e in lines[-1]) + entry.width > inner:
            lines.append([])
        lines[-1].append(entry)
    return lines


def _entry(row: Row) -> Image.Image:
    """One entry as a picture: input pictures, an arrow, what came out, and the words underneath."""
    inputs = len(row.pictures) - 1
    width = (inputs + 1) * CELL + (max(0, inputs - 1) * GAP + ARROW if inputs else 0)
    indent = 0 if row.right is None else LINE + 2
    pictures = [_fitted(picture) for picture in row.pictures]
    tall, words = max(p.height for p in pictures), _wrap(row.text or "(no words)", width - indent)
    entry = Image.new("RGB", (width, tall + 2 * GAP + len(words) * LINE), "white")
    draw = ImageDraw.Draw(entry)
    for k, picture in enumerate(pictures[:-1]):
        _paste(entry, picture, k * (CELL + GAP), FRAME)
    if inputs:
        _arrow(draw, width - CELL - ARROW, tall // 2)
    _paste(entry, pictures[-1], width - CELL, FRAME if row.right is None else RIGHT if row.right else WRONG)
    if row.right is not None:
        _mark(draw, tall + GAP + 3, row.right)
    for n, line in enumerate(words):
        draw.text((indent, tall + GAP + n * LINE), line, fill=INK if row.text else PALE, font=_font(13))
    return entry


def _fitted(picture: Image.Image) -> Image.Image:
    """As large as the cell allows; small ones are enlarged without smoothing, large ones reduced with it."""
    scale = CELL / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _paste(entry: Image.Image, picture: Image.Image, left: int, frame: tuple[int, int, int]) -> None:
    left += (CELL - picture.width) // 2
    entry.paste(picture, (left, 0))
    box = (left, 0, left + picture.width - 1, picture.height - 1)
    ImageDraw.Draw(entry).rectangle(box, outline=frame, width=1 if frame == FRAME else 3)


def _arrow(draw: ImageDraw.ImageDraw, left: int, y: int) -> None:
    right = left + ARROW - 4
    draw.line((left + 4, y, right, y), fill=PALE, width=2)
    draw.line((right - 4, y - 4, right, y, right - 4, y + 4), fill=PALE, width=2)


def _mark(draw: ImageDraw.ImageDraw, y: int, right: bool) -> None:
    """A tick or a cross before the first line of the words; drawn, because the font has neither."""
    if right:
        draw.line((1, y + 6, 5, y + 10, 13, y), fill=RIGHT, width=3)
    else:
        draw.line((1, y, 11, y + 10), fill=WRONG, width=3)
        draw.line((1, y + 10, 11, y), fill=WRONG, width=3)


def _wrap(text: str, width: int) -> list[str]:
    """Words in lines of at most `width` px, as the font measures them; what is too much becomes an ellipsis."""
    font, lines = _font(13), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines if len(lines) <= MAX_LINES else [*lines[: MAX_LINES - 1], "\u2026"]


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def sample_grid(sampler: Sampler, sampling: Sampling, resolution: int) -> tuple[Image.Image, int]:
    """Draw the fixed prompts of the config at `resolution`; returns one sheet, and how many pictures are blank."""
    rows: dict[int, Row] = {}
    numbered = sorted(enumerate(sampling.prompts), key=lambda item: len(item[1].images))
    for count, group in groupby(numbered, key=lambda item: len(item[1].images)):
        by_task = sorted(((task_of(m[1].text, count), m) for m in group), key=lambda pair: pair[0])
        for task, members in groupby(by_task, key=lambda pair: pair[0]):
            chosen = [member for _, member in members]
            request = _request(task, chosen, resolution)
            made = to_images(sampler(request, sampling))
            for (i, prompt), picture, given in zip(chosen, made, request.images, strict=True):
                inputs = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in given.cpu()]
                rows[i] = Row(prompt.text, [*inputs, picture])
    blank = sum(is_blank(row.pictures[-1]) for row in rows.values())
    return contact_sheet([rows[i] for i in sorted(rows)]), blank


def is_blank(picture: Image.Image) -> bool:
    """Whether a picture is one colour all over, as that of a model is whose numbers are no numbers any more."""
    return all(high - low <= BLANK for low, high in picture.convert("RGB").getextrema())


def _request(task: Task, chosen: list[tuple[int, SamplePrompt]], resolution: int) -> Request:
    size = (resolution, resolution)
    images = torch.zeros(len(chosen), len(chosen[0][1].images), 3, *size, dtype=torch.uint8)
    for b, (_, prompt) in enumerate(chosen):
        for n, path in enumerate(prompt.images):
            images[b, n] = load_image(path, resolution)
    return Request(task, [p.text for _, p in chosen], images, size, torch.tensor([i for i, _ in chosen]))


def load_image(path: Path, resolution: int) -> torch.Tensor:
    """An image from disk, as training has it, in a square of `resolution`: uint8 [3, H, W]."""
    return fitted([decode(path.read_bytes())], (resolution, resolution))[0]
