"""Contact sheets: request, input images and output side by side on one image."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont, ImageOps

# Everything in px. An image of 64 or 32 px is enlarged to a cell by a whole number, so that its pixels stay square.
CELL, GAP, ARROW, MARGIN, LINE, TITLE = 128, 4, 18, 18, 17, 38
MAX_LINES = 11
INK, PALE, FRAME = (34, 34, 34), (130, 130, 130), (214, 214, 214)
RIGHT, WRONG = (24, 128, 62), (196, 48, 43)
_FONT = ImageFont.load_default(13)


@dataclass(frozen=True)
class Row:
    """One entry of a sheet: its words and its images.

    right: whether the last image is correct; None if unknown. made: whether the last image was made
    from the others, as an arrow then says.
    """

    text: str
    images: Sequence[Image.Image]
    right: bool | None = None
    made: bool = True


def contact_sheet(rows: Sequence[Row], columns: int = 4) -> Image.Image:
    """Lay entries out in `columns`, each with its words underneath. Raises ValueError if there are no entries."""
    return sectioned_sheet([("", rows)], columns)


def sectioned_sheet(sections: Sequence[tuple[str, Sequence[Row]]], columns: int) -> Image.Image:
    """Join contact sheets under each other, each with its title ("" for none).

    The sheet is as wide as `columns` of its narrowest entries; of wider ones fewer stand in a line.

    Raises:
        ValueError: if there are no entries.
    """
    if not any(rows for _, rows in sections):
        raise ValueError("a contact sheet needs at least one entry")
    blocks = [(title, [_entry(row) for row in rows]) for title, rows in sections if rows]
    widths = [entry.width for _, entries in blocks for entry in entries]
    most = min(columns, max(len(entries) for _, entries in blocks))
    inner = max(most * (min(widths) + MARGIN) - MARGIN, max(widths))
    # Where everything goes; then a sheet that has room for it.
    top, titles, places = MARGIN, [], []
    for title, entries in blocks:
        if title:
            titles.append((top, title))
            top += TITLE
        left = high = 0
        for entry in entries:
            if left + entry.width > inner:
                left, top, high = 0, top + high + MARGIN, 0
            places.append((entry, (MARGIN + left, top)))
            left, high = left + entry.width + MARGIN, max(high, entry.height)
        top += high + MARGIN
    sheet = Image.new("RGB", (inner + 2 * MARGIN, top), "white")
    for entry, place in places:
        sheet.paste(entry, place)
    for top, title in titles:
        ImageDraw.Draw(sheet).text((MARGIN, top), title, fill=INK, font=ImageFont.load_default(19))
    return sheet


def note(text: str) -> Image.Image:
    """Return a sheet that contains only text."""
    sheet = Image.new("RGB", (640, 80), "white")
    ImageDraw.Draw(sheet).text((20, 30), text, fill=INK, font=ImageFont.load_default(15))
    return sheet


def _entry(row: Row) -> Image.Image:
    """One entry as an image: input images, an arrow, what came out, and the words underneath."""
    before = max(0, len(row.images) - 1)
    arrow = ARROW - GAP if before and row.made else 0
    width = (before + 1) * CELL + before * GAP + arrow
    indent = 0 if row.right is None else LINE + 2
    images = [_fitted(image) for image in row.images]
    tall, words = max((image.height for image in images), default=0), _wrap(row.text or "(no words)", width - indent)
    entry = Image.new("RGB", (width, tall + 2 * GAP + len(words) * LINE), "white")
    draw = ImageDraw.Draw(entry)
    for k, image in enumerate(images):
        last = k == before
        left = (width - CELL if last else k * (CELL + GAP)) + (CELL - image.width) // 2
        entry.paste(image, (left, 0))
        frame = FRAME if row.right is None or not last else RIGHT if row.right else WRONG
        box = (left, 0, left + image.width - 1, image.height - 1)
        draw.rectangle(box, outline=frame, width=1 if frame == FRAME else 3)
    if arrow:
        tip, y = width - CELL - 4, tall // 2
        draw.line((tip - ARROW + 8, y, tip, y), fill=PALE, width=2)
        draw.line((tip - 4, y - 4, tip, y, tip - 4, y + 4), fill=PALE, width=2)
    if row.right is not None:
        _mark(draw, tall + GAP + 3, row.right)
    for n, line in enumerate(words):
        draw.text((indent, tall + GAP + n * LINE), line, fill=INK if row.text else PALE, font=_FONT)
    return entry


def _fitted(image: Image.Image) -> Image.Image:
    """As large as the cell allows; small ones are enlarged without smoothing, large ones reduced with it."""
    method = Image.Resampling.NEAREST if max(image.size) < CELL else Image.Resampling.LANCZOS
    return ImageOps.contain(image.convert("RGB"), (CELL, CELL), method)


def _mark(draw: ImageDraw.ImageDraw, y: int, right: bool) -> None:
    """A tick or a cross before the first line of the words; drawn, because the font has neither."""
    lines = [(1, y + 6, 5, y + 10, 13, y)] if right else [(1, y, 11, y + 10), (1, y + 10, 11, y)]
    for line in lines:
        draw.line(line, fill=RIGHT if right else WRONG, width=3)


def _wrap(text: str, width: int) -> list[str]:
    """Words in lines of at most `width` px, as the font measures them; what is too much becomes an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _FONT.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines if len(lines) <= MAX_LINES else [*lines[: MAX_LINES - 1], "…"]
