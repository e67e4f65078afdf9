"""A page as data, and its HTML: one file that needs nothing else.

Words are escaped, unless they are `Markup`, which the functions at the end make.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


@dataclass(frozen=True)
class Cell:
    """Words in a table.

    small: pale words below. kind: "strong", "pale", "line" (never broken), "lines" (broken as they are) or "".
    bar: this share of a full bar.
    """

    text: str = ""
    small: str = ""
    kind: str = ""
    bar: float | None = None


@dataclass(frozen=True)
class Table:
    """Columns whose heading begins with ">" hold numbers; the first names the row. note: pale, after the title."""

    title: str
    columns: Sequence[str | Cell]
    rows: Sequence[Sequence[str | Cell]]
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """Images beside each other over their caption. hint: appears under the mouse."""

    images: Sequence[Markup]
    caption: str
    hint: str = ""


@dataclass(frozen=True)
class Figures:
    """Figures side by side. large: contact sheets, in their own size."""

    title: str
    figures: Sequence[Figure]
    note: str = ""
    large: bool = False


@dataclass(frozen=True)
class Charts:
    """`<svg>` elements of `wemmu.report.charts`, side by side."""

    title: str
    charts: Sequence[Markup]
    note: str = ""


@dataclass(frozen=True)
class Text:
    """A paragraph; kind: "lead", "pale" or ""."""

    words: str
    kind: str = ""


@dataclass(frozen=True)
class Listing:
    """The text of a file."""

    text: str


@dataclass(frozen=True)
class Facts:
    """Large numbers: (number, what it counts); `alarming` holds the names of those that need a look."""

    facts: Sequence[tuple[str, str]]
    alarming: Sequence[str] = ()


@dataclass(frozen=True)
class Notes:
    """Sentences in a box that catches the eye; nothing without any."""

    title: str
    sentences: Sequence[str]


@dataclass(frozen=True)
class Details:
    """Blocks that are folded away until somebody wants them; text leaves them out."""

    summary: str
    blocks: Sequence["Block"]
    note: str = ""
    open: bool = False


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence["Block"]


# A string is a paragraph.
Block = str | Text | Table | Figures | Charts | Listing | Facts | Notes | Details | Section


@dataclass(frozen=True)
class Page:
    """about: the line below the title."""

    title: str
    about: str
    blocks: Sequence[Block]


def html(page: Page) -> str:
    environment = Environment(
        loader=PackageLoader("wemmu.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["kind"] = lambda block: type(block).__name__
    return environment.get_template("page.html.j2").render(page=page)


def now() -> str:
    return datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")


def pairs(values: dict[str, Any]) -> Table:
    """Names and values as a table."""
    return Table("", (), [(key, code(value)) for key, value in values.items()])


def link(address: str, words: str) -> Markup:
    return Markup('<a href="{}">{}</a>').format(address, words)


def code(words: Any) -> Markup:
    return Markup("<code>{}</code>").format(words)


def pale(words: str) -> Markup:
    return Markup('<span class="pale">{}</span>').format(words)


def joined(*words: str) -> Markup:
    return Markup(" ").join(filter(None, words))


def mark(right: bool) -> Markup:
    return Markup('<span class="mark {}">{}</span>').format(*(("right", "✓") if right else ("wrong", "✗")))


def image(address: str, alt: str, kind: str = "") -> Markup:
    """kind: "right" or "wrong" (a frame), "small", or ""."""
    return Markup('<img class="{}" src="{}" alt="{}">').format(kind, address, alt)


def outline(height: int, width: int) -> Markup:
    """A small rectangle of this shape, before the words `HEIGHT × WIDTH`."""
    shape = (
        '<span class="outline" style="width: {:.2f}rem; height: {:.2f}rem"></span> <span class="line">{} × {}</span>'
    )
    return Markup(shape).format(1.05 * (width / height) ** 0.5, 1.05 * (height / width) ** 0.5, height, width)


# Between the images that were given and the one that was made; a list, so that it can be left out.
ARROW = [pale("→")]
