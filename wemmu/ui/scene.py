"""A scene of the miniature that is built by clicking: a board of four cells and a brush."""

from dataclasses import dataclass, field, replace
from typing import Any

from markupsafe import Markup

from wemmu.shapes.language import full_caption
from wemmu.shapes.scene import BACKGROUNDS, CELLS, COLORS, HELD_OUT, MAX_OBJECTS, SHAPES, SIZES, Object, Scene

# Field of the brush -> its choices.
CHOICES = {"shape": SHAPES, "color": tuple(COLORS), "size": SIZES, "background": tuple(BACKGROUNDS)}


@dataclass(frozen=True)
class Board:
    """The scene so far and what the next click places; said: why a click did nothing."""

    scene: Scene = field(
        default=Scene("white", (Object(0, "circle", "red", "large"), Object(3, "square", "blue", "large")))
    )
    shape: str = "triangle"
    color: str = "green"
    size: str = "large"
    said: str = ""

    def choose(self, name: str, value: str) -> "Board":
        """Change the brush or the background."""
        if value not in CHOICES.get(name, ()):
            raise ValueError(f"{name} cannot be {value!r}; valid choices: {', '.join(CHOICES.get(name, CHOICES))}")
        if name == "background":
            return replace(self, scene=replace(self.scene, background=value), said="")
        brush: dict[str, Any] = {name: value}
        return replace(self, **brush, said="")

    def click(self, cell: int) -> "Board":
        """Place the brush's object in a cell; take it away if it is there already."""
        new = Object(cell, self.shape, self.color, self.size)
        others = tuple(obj for obj in self.scene.objects if obj.cell != cell)
        if self.scene.at(cell) == new:
            return replace(self, scene=replace(self.scene, objects=others), said="")
        if len(others) == MAX_OBJECTS:
            return replace(
                self, said=f"A scene of this world has at most {MAX_OBJECTS} objects. Click one to replace it."
            )
        return replace(self, scene=replace(self.scene, objects=(*others, new)), said="")

    @property
    def caption(self) -> str:
        return full_caption(self.scene) if self.scene.objects else ""

    @property
    def hint(self) -> str:
        """What the page says below the board."""
        unseen = [f"{obj.color} {obj.shape}" for obj in self.scene.objects if (obj.color, obj.shape) in HELD_OUT]
        if self.said or not unseen:
            return self.said
        return f"No training image shows a {' or a '.join(unseen)}: can the model compose it?"


def html(board: Board) -> str:
    """Return the palette and the board; a click on a button with data-choose or data-cell changes them."""
    current = {"shape": board.shape, "color": board.color, "size": board.size, "background": board.scene.background}
    rows = [
        Markup('<div class="row"><span>{}</span>{}</div>').format(
            name, Markup("").join(_choice(name, value, value == current[name], board) for value in values)
        )
        for name, values in CHOICES.items()
    ]
    background = BACKGROUNDS[board.scene.background]
    cells = [
        Markup('<button data-cell="{}" aria-label="{}: {}">{}</button>').format(
            cell, place, f"{o.size} {o.color} {o.shape}" if (o := board.scene.at(cell)) else "empty", _drawing(o)
        )
        for cell, place in enumerate(CELLS)
    ]
    hint = Markup('<p class="hint">{}</p>').format(board.hint) if board.hint else Markup("")
    return str(
        Markup(
            '<div class="builder"><div class="board" style="background:{}">{}</div>'
            '<div class="palette">{}{}</div></div>'
        ).format(_css(background), Markup("").join(cells), Markup("").join(rows), hint)
    )


def _choice(name: str, value: str, chosen: bool, board: Board) -> Markup:
    match name:
        case "shape":
            inside = _drawing(Object(0, value, board.color, "large"))
        case "size":
            inside = _drawing(Object(0, board.shape, board.color, value))
        case _:
            inside = Markup('<i style="background:{}"></i>').format(_css({**COLORS, **BACKGROUNDS}[value]))
    return Markup(
        '<button data-choose="{}" data-value="{}" aria-label="{}" title="{}" aria-pressed="{}">{}</button>'
    ).format(name, value, f"{name} {value}", value, str(chosen).lower(), inside)


def _drawing(obj: Object | None) -> Markup:
    if obj is None:
        return Markup("")
    r = 41 if obj.size == "large" else 23
    body = {
        "circle": f'<circle cx="50" cy="50" r="{r}"/>',
        "square": f'<rect x="{50 - 0.9 * r}" y="{50 - 0.9 * r}" width="{1.8 * r}" height="{1.8 * r}"/>',
        "triangle": f'<polygon points="50,{50 - r} {50 + r},{50 + r} {50 - r},{50 + r}"/>',
        "cross": f'<path d="M50 {50 - r}V{50 + r}M{50 - r} 50H{50 + r}" stroke-width="{0.72 * r}"/>',
    }[obj.shape]
    svg = '<svg viewBox="0 0 100 100" aria-hidden="true" fill="{0}" stroke="{0}" stroke-width="0">{1}</svg>'
    return Markup(svg).format(_css(COLORS[obj.color]), Markup(body))


def _css(color: tuple[int, int, int]) -> str:
    return f"rgb{color}"
