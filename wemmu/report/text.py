"""Pages and tables as text, for a terminal or a file."""

import io
from collections.abc import Iterator, Sequence

from markupsafe import Markup
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text as RichText

from wemmu.report.page import Block, Cell, Facts, Notes, Page, Section, Table, Text

# Characters of a full bar.
BAR = 24


def as_text(page: Page) -> str:
    """Render the page in lines of at most 120 characters, without images, charts and folded parts."""
    console = Console(file=(drawn := io.StringIO()), width=120)
    for part in (_said(f"{page.title}\n{_words(page.about)}\n"), *_blocks(page.blocks)):
        console.print(part)
    return "\n".join(line.rstrip() for line in drawn.getvalue().splitlines()) + "\n"


def _blocks(blocks: Sequence[Block]) -> Iterator[RenderableType]:
    for block in blocks:
        match block:
            case Table():
                yield table(block)
            case str(words) | Text(words, _):
                yield _said(f"{_words(words)}\n")
            case Facts(facts, _):
                yield _said(", ".join(f"{number} {words}" for number, words in facts) + "\n")
            case Notes(_, sentences):
                yield from (_said(f"! {_words(sentence)}\n") for sentence in sentences)
            case Section(title, inside):
                inner = list(_blocks(inside))
                yield from (_said(f"{title.upper()}\n"), *inner) if inner else ()


def table(made: Table) -> RenderableType:
    """Render the table and an empty line. Cells cannot contain markup or control the terminal."""
    # Not the title of the table, which is broken where the table ends.
    title = [_said(f"{made.title} ({made.note})" if made.note else made.title, "bold")] if made.title else []
    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, show_header=bool(made.columns))
    for column in made.columns:
        heading = _words(column)
        drawn.add_column(
            _said(heading.removeprefix(">")), justify="right" if heading.startswith(">") else "left", overflow="fold"
        )
    for row in made.rows:
        drawn.add_row(*(_said(_words(cell)) for cell in row))
    return Group(*title, drawn, RichText())


def _words(value: str | Cell) -> str:
    if isinstance(value, Cell):
        # A bar beside its number would only make the column wide.
        bar = "█" * max(value.bar > 0, round(BAR * value.bar)) if value.bar is not None and not value.text else ""
        return " ".join(filter(None, (_words(value.text), bar, f"({_words(value.small)})" if value.small else "")))
    return value.striptags() if isinstance(value, Markup) else value


def _said(words: str, style: str = "") -> RichText:
    return RichText("\n".join(map(_printable, words.split("\n"))), style)


def _printable(line: str) -> str:
    return "".join(c if c.isprintable() else " " for c in line)


def plain(text: str, limit: int = 200) -> str:
    """Return one line without control characters, because data from outside could control the terminal with them."""
    line = _printable(text)
    return line if len(line) <= limit else line[: limit - 1] + "…"
