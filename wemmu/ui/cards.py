"""The images of a request as HTML: cards with the verdict, a download and a way to edit them further."""

import base64
from io import BytesIO
from itertools import groupby

from markupsafe import Markup
from PIL import Image

from wemmu.config import Task
from wemmu.shapes.verdict import Verdict
from wemmu.source import png
from wemmu.ui.work import Result, State

# Images up to this side keep their pixels as they are, enlarged.
PIXELATED = 96
EMPTY = Markup('<div class="empty">The results appear here.</div>')


def html(state: State) -> str:
    """Return the whole results area."""
    parts = []
    if state.progress:
        bar = Markup('<div class="bar"><i style="width:{:.0f}%"></i></div>').format(100 * state.share)
        parts.append(Markup('<div class="progress" role="status">{}{}</div>').format(state.progress, bar))
    if state.error:
        parts.append(Markup('<div class="error" role="alert">{}</div>').format(state.error))
    parts += [Markup('<div class="note">{}</div>').format(_upper(note)) for note in state.notes]
    numbered = list(enumerate(state.results))
    several = len({result.model for result in state.results}) > 1
    for model, group in groupby(numbered, key=lambda pair: pair[1].model):
        members = list(group)
        heading = Markup("<h3>{}{}</h3>").format(model, _count([r for _, r in members]))
        cards = Markup("").join(_card(number, result) for number, result in members)
        shown = heading if several or any(r.verdict for _, r in members) else Markup("")
        parts.append(Markup('<section>{}<div class="cards">{}</div></section>').format(shown, cards))
    return str(Markup("").join(parts) or EMPTY)


def _upper(sentence: str) -> str:
    return f"{sentence[:1].upper()}{sentence[1:]}."


def _count(results: list[Result]) -> Markup:
    """How many of the images that can be scored are right."""
    judged = [result.verdict.right for result in results if result.verdict and result.verdict.right is not None]
    return Markup(" <small>{} of {} as asked</small>").format(sum(judged), len(judged)) if judged else Markup("")


def _card(number: int, result: Result) -> Markup:
    kind = " pixelated" if max(result.image.size) <= PIXELATED else ""
    shown = Markup('<img class="{}" src="{}" alt="{}">').format(
        ("" if result.settings else "forming") + kind, _source(result), f"seed {result.seed}"
    )
    lines = [Markup('<span class="pale">seed {}</span>').format(result.seed)]
    if result.settings:
        answered = result.settings["task"] == Task.UNDERSTANDING
        name = f"{result.model}-seed-{result.seed}.png"
        lines.append(
            Markup(
                '<span class="actions"><a download="{}" href="{}" title="Save the PNG with its settings">Download</a>'
                '<button data-use="{}" title="Make it the input image">{}</button></span>'
            ).format(name, _source(result), number, "Ask about this" if answered else "Edit this")
        )
    words = Markup('<p class="words">{}</p>').format(result.words) if result.words else Markup("")
    return Markup('<figure>{}<figcaption><div class="line">{}</div>{}{}</figcaption></figure>').format(
        shown, Markup("").join(lines), words, _verdict(result.verdict)
    )


def _verdict(verdict: Verdict | None) -> Markup:
    if verdict is None:
        return Markup("")
    kind, mark = {True: ("right", "\N{CHECK MARK}"), False: ("wrong", "\N{BALLOT X}"), None: ("pale", "")}[
        verdict.right
    ]
    return Markup('<p class="verdict {}"><b>{}</b> {}</p>').format(kind, mark, verdict.words)


def _source(result: Result) -> str:
    """The image itself as an address: nothing stays on the disk."""
    if result.settings is not None:
        return _address("image/png", png(result.image, result.settings))
    return _encoded(result.image)


def _encoded(image: Image.Image) -> str:
    """An image that is not finished: small rather than exact."""
    file = BytesIO()
    image.save(file, "PNG" if max(image.size) <= PIXELATED else "JPEG", quality=80)
    return _address("image/png" if max(image.size) <= PIXELATED else "image/jpeg", file.getvalue())


def _address(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
