"""Records on one sheet, for who has no browser at hand: a PNG file with the first records of every stream."""

import io
import textwrap

from PIL import Image, ImageDraw, ImageFont

from data_pipeline.report_text import plain
from wemmu.config.shards import StoredRecord

# Everything in px.
HEIGHT, GAP, MARGIN, LINE, TITLE = 128, 6, 20, 15, 34
WIDTH = 1600
LINES = 4
INK, PALE = (34, 34, 34), (130, 130, 130)


def contact_sheet(sections: list[tuple[str, list[StoredRecord]]]) -> Image.Image:
    """Records below the title of their section, in rows: inputs, target, and their words below."""
    sheets = [_section(title, [_cell(record) for record in found]) for title, found in sections]
    page = Image.new("RGB", (WIDTH, sum(s.height for s in sheets) + 2 * MARGIN), "white")
    top = MARGIN
    for sheet in sheets:
        page.paste(sheet, (MARGIN, top))
        top += sheet.height
    return page


def size_of(file: bytes) -> str:
    """`HEIGHTxWIDTH` of a picture file, read from its header; "" if it is none."""
    try:
        with Image.open(io.BytesIO(file)) as image:
            return f"{image.height}x{image.width}"
    except Exception:
        # As many kinds as Pillow has readers; that it is no picture is all that is asked.
        return ""


def _section(title: str, cells: list[Image.Image]) -> Image.Image:
    rows: list[list[Image.Image]] = [[]]
    for cell in cells:
        if rows[-1] and sum(c.width + 3 * GAP for c in rows[-1]) + cell.width > WIDTH - 2 * MARGIN:
            rows.append([])
        rows[-1].append(cell)
    height = HEIGHT + LINES * LINE + 2 * GAP
    sheet = Image.new("RGB", (WIDTH - 2 * MARGIN, TITLE + height * len(rows)), "white")
    ImageDraw.Draw(sheet).text((0, 8), title, fill=INK, font=ImageFont.load_default(15))
    for number, row in enumerate(rows):
        left = 0
        for cell in row:
            sheet.paste(cell, (left, TITLE + number * height))
            left += cell.width + 3 * GAP
    return sheet


def _cell(record: StoredRecord) -> Image.Image:
    pictures = [_scaled(file) for file in (*record.images, record.target) if file]
    width = max(HEIGHT, sum(p.width + GAP for p in pictures) - GAP)
    cell = Image.new("RGB", (width, HEIGHT + LINES * LINE), "white")
    left = 0
    for picture in pictures:
        cell.paste(picture, (left, 0))
        left += picture.width + GAP
    words = plain(f"{record.prompt} → {record.answer}" if record.answer else record.prompt or "no words")
    # The default font has about 6 px a character at this size.
    lines = textwrap.wrap(words, max(12, width // 6), max_lines=LINES - 1, placeholder=" …")
    for number, line in enumerate(lines):
        at = (0, HEIGHT + GAP // 2 + number * LINE)
        ImageDraw.Draw(cell).text(at, line, fill=INK if record.prompt else PALE, font=ImageFont.load_default(11))
    return cell


def _scaled(file: bytes) -> Image.Image:
    """At the sheet's height; small pictures keep their pixels."""
    image = Image.open(io.BytesIO(file)).convert("RGB")
    size = (max(1, round(image.width * HEIGHT / image.height)), HEIGHT)
    return image.resize(size, Image.Resampling.NEAREST if image.height < HEIGHT else Image.Resampling.LANCZOS)
