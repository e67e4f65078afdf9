"""What FSDP2 adds to parameters: it cuts them by rows, as many to every rank, and the last ranks' may be padding.

It is little until there are more ranks than rows: 1024 ranks make a key projection of 256 rows four times as large.
ZeRO-3 cuts by elements and has next to none.
"""

import math

from wemmu.planning.backbones import Language, Sana, Sizes
from wemmu.planning.parameters import tensor_widths
from wemmu.recipes.wemmu.config import Bridge

Shape = tuple[int, int]  # rows, and numbers in a row


def added(shapes: list[Shape], ranks: int) -> int:
    """Numbers of padding in all of `shapes` together, each cut by rows over `ranks`."""
    return sum((math.ceil(rows / ranks) * ranks - rows) * numbers for rows, numbers in shapes)


def language_layer(c: Language) -> list[Shape]:
    d, kv, hidden = c.hidden_size, c.kv_width, c.intermediate_size
    return [(d, d + 1), (kv, d + 1), (kv, d + 1), (d, d), (hidden, d), (hidden, d), (d, hidden), (d, 2)]


def rest_of_bridge(sizes: Sizes, bridge: Bridge) -> list[Shape]:
    """All of the bridge but its layers. Learnable queries, of few rows, are not looked at."""
    d, caption, side = sizes.language.hidden_size, sizes.dit.caption_channels, bridge.position_table
    branch = [(d, sizes.vae.latent_channels + 1)] * bridge.vae_branch
    return [(side, side * d), (caption, d), (caption, d), (caption, caption), (d, 1), *branch]


def dit_block(c: Sana, tp: int) -> list[Shape]:
    """Of one of `tp` tensor ranks."""
    d, (own, cross, hidden) = c.width, tensor_widths(c, tp)
    attention = [(own, d)] * 3 + [(d, own + 1), (cross, d + 1), (d, cross + 1)]
    return [*attention, *[(cross, c.cross_attention_dim + 1)] * 2, (2 * hidden, d + 1 + 10), (d, hidden), (6, d)]


def dit_ends(c: Sana, first: bool, last: bool) -> list[Shape]:
    d, patch = c.width, c.patch_size**2
    begin = [(d, c.in_channels * patch + 1), (d, 257), (d, d + 1), (6 * d, d + 1), (d, c.caption_channels + d + 3)]
    end = [((c.out_channels or c.in_channels) * patch, d + 1), (2, d)]
    return begin * first + end * last
