"""Scene -> image, at any resolution."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from wemmu.shapes.scene import BACKGROUNDS, CELLS, COLORS, Scene

# Extent of a shape as a share of its cell's shorter side.
EXTENT = {"large": 0.82, "small": 0.46}
SUPERSAMPLING = 4


def render(scene: Scene, px: int | tuple[int, int]) -> Image.Image:
    """Draw `scene` as an RGB image of `px` by `px`, or of `px = (height, width)`, anti-aliased."""
    height, width = (px, px) if isinstance(px, int) else px
    if min(height, width) < 16:
        raise ValueError(f"a scene needs at least 16 px on each side to be readable, got {height} x {width}")
    cell_h, cell_w = height * SUPERSAMPLING / 2, width * SUPERSAMPLING / 2
    canvas = Image.new("RGB", (width * SUPERSAMPLING, height * SUPERSAMPLING), BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(canvas)
    for obj in scene.objects:
        row, column = divmod(obj.cell, 2)
        radius = EXTENT[obj.size] * min(cell_h, cell_w) / 2
        _draw_shape(draw, obj.shape, (column + 0.5) * cell_w, (row + 0.5) * cell_h, radius, COLORS[obj.color])
    return canvas.resize((width, height), Image.Resampling.BOX)


def _draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill: tuple[int, int, int]
) -> None:
    # PIL includes the right and lower edge of a box, hence the - 1.
    box = (x - r, y - r, x + r - 1, y + r - 1)
    match shape:
        case "circle":
            draw.ellipse(box, fill=fill)
        case "square":
            # A square of the full extent looks larger than a circle of it; 0.9 keeps the two sizes apart by area.
            s = 0.9 * r
            draw.rectangle((x - s, y - s, x + s - 1, y + s - 1), fill=fill)
        case "triangle":
            draw.polygon([(x, y - r), (x + r - 1, y + r - 1), (x - r, y + r - 1)], fill=fill)
        case "cross":
            arm = 0.36 * r
            draw.rectangle((x - arm, box[1], x + arm - 1, box[3]), fill=fill)
            draw.rectangle((box[0], y - arm, box[2], y + arm - 1), fill=fill)
        case _:
            raise AssertionError(shape)


def cell_box(cell: int, height: int, width: int) -> tuple[slice, slice]:
    """Return the rows and columns of an image that belong to `cell`."""
    if not 0 <= cell < len(CELLS):
        raise ValueError(f"cell {cell} is not in 0..{len(CELLS) - 1}")
    row, column = divmod(cell, 2)
    return (
        slice(row * height // 2, (row + 1) * height // 2),
        slice(column * width // 2, (column + 1) * width // 2),
    )


def to_array(image: Image.Image) -> NDArray[np.float32]:
    """Convert an RGB image to float32 [H, W, 3] in [0, 1]."""
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0
