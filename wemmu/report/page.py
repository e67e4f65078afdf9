"""A page as data, and its HTML: one file that needs nothing else.

Words are escaped, unless they are `Markup`, which the functions at the end make.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

# px of the longer side of a thumbnail, shown at about half of it: sharp on fine screens, too.
THUMBNAIL = 256
# Up to this side an image keeps its pixels as they are.
PIXELATED = 96


class Cell(NamedTuple):
    """Words in a table.

    small: pale words below. kind: "strong", "pale", "line" (never broken), "lines" (broken as they are) or "".
    bar: this share of a full bar.
    """

    text: str = ""
    small: str = ""
    kind: str = ""
    bar: float | None = None


class Table(NamedTuple):
    """Columns whose heading begins with ">" hold numbers; the first names the row. note: pale, after the title."""

    title: str
    columns: Sequence[str | Cell]
    rows: Sequence[Sequence[str | Cell]]
    note: str = ""


class Figure(NamedTuple):
    """Images beside each other over their caption. hint: appears under the mouse."""

    images: Sequence[Markup]
    caption: str
    hint: str = ""


class Gallery(NamedTuple):
    """Figures or `<svg>` charts side by side. kind: "figures", "sheets" (in their own size) or "charts"."""

    kind: str
    items: Sequence[Figure | Markup]
    title: str = ""
    note: str = ""


class Text(NamedTuple):
    """kind: "lead" or "pale" for a paragraph, "file" for the content of a file."""

    words: str
    kind: str


class Facts(NamedTuple):
    """Large numbers: (number, what it counts); `alarming` has the names of numbers to highlight."""

    facts: Sequence[tuple[str, str]]
    alarming: Sequence[str] = ()


class Notes(NamedTuple):
    """Sentences in a highlighted box; empty without sentences."""

    title: str
    sentences: Sequence[str]


class Details(NamedTuple):
    """Folded blocks; the text form leaves them out."""

    summary: str
    blocks: Sequence["Block"]
    note: str = ""
    open: bool = False


class Section(NamedTuple):
    title: str
    blocks: Sequence["Block"]


# A string is a paragraph.
Block = str | Text | Table | Gallery | Facts | Notes | Details | Section


class Page(NamedTuple):
    """about: the line below the title."""

    title: str
    about: str
    blocks: Sequence[Block]


def html(page: Page) -> str:
    loader = PackageLoader("wemmu.report")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["kind"] = lambda block: type(block).__name__
    environment.filters["cell"] = lambda value: value if isinstance(value, Cell) else Cell(value)
    return environment.get_template("page.html.j2").render(page=page)


def now() -> str:
    return datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")


def pairs(values: Mapping[str, Any]) -> Table:
    """Return names and values as a table."""
    return Table("", (), [(key, code(value)) for key, value in values.items()])


def link(path: str, words: str) -> Markup:
    """Return a link to a file, by its path from the page's folder."""
    return Markup('<a href="{}">{}</a>').format(quote(path), words)


def code(words: Any) -> Markup:
    return Markup("<code>{}</code>").format(words)


def pale(words: str) -> Markup:
    return Markup('<span class="pale">{}</span>').format(words)


def mark(right: bool) -> Markup:
    return Markup('<span class="mark {}">{}</span>').format(*(("right", "✓") if right else ("wrong", "✗")))


def image(file: Path | bytes | memoryview, alt: str, kind: str = "") -> Markup:
    """Embed a PNG file as it is, or the bytes of any image file as a thumbnail.

    kind: "right" or "wrong" (a frame), "small", or "".
    """
    form, data = ("png", file.read_bytes()) if isinstance(file, Path) else _thumbnail(file)
    address = f"data:image/{form};base64,{base64.b64encode(data).decode()}"
    return Markup('<img class="{}" src="{}" alt="{}">').format(kind, address, alt)


def _thumbnail(file: bytes | memoryview) -> tuple[str, bytes]:
    made, buffer = Image.open(io.BytesIO(file)).convert("RGB"), io.BytesIO()
    form = "png" if max(made.size) <= PIXELATED else "jpeg"
    made.thumbnail((THUMBNAIL, THUMBNAIL))
    made.save(buffer, form, quality=82)
    return form, buffer.getvalue()


def outline(height: int, width: int) -> Markup:
    """Draw a small rectangle of this shape before the words `HEIGHT × WIDTH`."""
    shape = '<span class="outline" style="width: {:.2f}rem; height: {:.2f}rem"></span> '
    sides = 1.05 * (width / height) ** 0.5, 1.05 * (height / width) ** 0.5
    return Markup(shape + '<span class="line">{} × {}</span>').format(*sides, height, width)


# Between the images that were given and the one that was made; a list, so that it can be left out.
ARROW = [pale("→")]
