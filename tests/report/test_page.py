"""One description of a report becomes a page and a text; what strangers wrote is only ever text in either."""

import io

from PIL import Image

from tests.report.pages import Page as Html
from wemmu.report import page as kit
from wemmu.report.text import as_text

HOSTILE = "<script>alert(1)</script>[bold]\x1b[2J"


def page(words: str) -> kit.Page:
    table = kit.Table(words, (words, ">number", ""), [(words, kit.Cell("1,000", words), kit.Cell(bar=0.5))], words)
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    figure = kit.Figure([kit.image(buffer.getvalue(), words), *kit.ARROW], words, words)
    blocks = [
        words,
        kit.Facts([("7", words)]),
        kit.Notes(words, [words]),
        table,
        kit.pairs({words: words}),
        kit.Gallery("figures", [figure], words, words),
        kit.Details(words, [kit.Text(words, "file")], words),
    ]
    return kit.Page(words, words, [kit.Section(words, blocks)])


def test_words_are_escaped_wherever_they_stand():
    html = kit.html(page(HOSTILE))
    assert "<script>" not in html
    assert html.count("&lt;script&gt;") >= 15
    assert Html(html).open == []


def test_text_has_the_words_and_numbers_of_the_page_and_cannot_steer_a_terminal():
    text = as_text(page(HOSTILE))
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "1,000 (<script>alert(1)</script>[bold]" in text
    assert "█" * 12 in text
    assert "█" * 13 not in text


def test_text_shows_no_tags_of_inline_html_and_leaves_out_what_is_folded_away():
    folded = kit.Details("more", ["hidden"])
    text = as_text(kit.Page("title", kit.link("#", "a < b"), [kit.Table("", ("",), [[kit.outline(4, 8)]]), folded]))
    assert "a < b" in text
    assert "4 × 8" in text
    assert "hidden" not in text


def test_a_link_leads_to_a_file_of_any_name():
    assert 'href="../50%25%20%232%3F%22/a.html"' in kit.link('../50% #2?"/a.html', "a")
