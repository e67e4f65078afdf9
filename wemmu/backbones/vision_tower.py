"""The vision tower of Qwen's VLMs on images of one size, without waiting for the device.

transformers' towers take the grids of images as a tensor, read it from the device in every layer, and attend window by
window. All images of a micro-batch have one grid, which the host knows. So places and windows are computed once per
grid and kept on the device, and windows of one size attend in one call. The towers' own modules do the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from wemmu.backbones.versions import transformers_5

# (where they begin among an image's tokens, how many there are, the tokens of each), of groups of equal length.
Spans = tuple[tuple[int, int, int], ...]
# (cos, sin), [tokens of an image, width of a head] each.
Rotary = tuple[Tensor, Tensor]
Fact = TypeVar("Fact")


@dataclass(frozen=True)
class Grid:
    """images of rows x columns patches each."""

    images: int
    rows: int
    columns: int

    @property
    def whole(self) -> Spans:
        """All tokens of an image as one group."""
        return ((0, 1, self.rows * self.columns),)

    def one(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the grid of one image as transformers has it: int64 [1, 3]."""
        return torch.tensor([[1, self.rows, self.columns]], device=device)


@dataclass(frozen=True)
class Table:
    """indices, weights: [tokens, 4] or [4, tokens], the corners between which a learned position is interpolated."""

    indices: Tensor
    weights: Tensor
    tokens_first: bool

    def __call__(self, embedding: nn.Module) -> Tensor:
        """Return the positions of one image's patches [tokens, D], in the operations of the installed transformers."""
        corners = embedding(self.indices) * self.weights[..., None]
        return corners.sum(1) if self.tokens_first else corners[0] + corners[1] + corners[2] + corners[3]


@dataclass
class Windows:
    """Windows of an image, those of one size together.

    spans: of tokens. order: merged tokens as they come -> as they stand here; back: the inverse. to_scan: from here ->
    window after window, as transformers has them; to_spans: the inverse. rotary, scan_rotary: in both orders.
    """

    spans: Spans
    order: Tensor
    to_scan: Tensor
    to_spans: Tensor
    back: Tensor
    rotary: Rotary
    scan_rotary: Rotary


class Known(dict[Any, Any]):
    """The constants of a tower for the tokens of one image, by grid and device. A copy of the tower has its own."""

    def of(self, grid: Grid, like: Tensor, find: Callable[[Grid, Tensor], Fact]) -> Fact:
        key = grid.rows, grid.columns, like.device, like.dtype
        if key not in self:
            # Kept for passes with and without gradients.
            with torch.inference_mode(False), torch.no_grad():
                self[key] = find(grid, like)
        found: Fact = self[key]
        return found


def windows_of(rows: int, columns: int, side: int, unit: int, rotary: Rotary) -> Windows:
    """Return the windows of side x side among rows x columns merged tokens of `unit` patches each.

    Windows are cut at the right and lower edges; larger ones come first.
    """
    device = rotary[0].device
    row, column = torch.arange(rows)[:, None] // side, torch.arange(columns)[None, :] // side
    window = (row * -(-columns // side) + column).flatten()
    sizes = window.bincount()
    scan = window.argsort(stable=True)
    order = (window - sizes[window] * len(sizes)).argsort(stable=True)
    spans, begin = [], 0
    for size in sorted(set(sizes.tolist()), reverse=True):
        number = int((sizes == size).sum())
        spans.append((begin * unit, number, size * unit))
        begin += number * size
    back, to_scan = order.argsort(), order.argsort()[scan]
    to_spans = to_scan.argsort()

    def in_order(places: Tensor) -> Rotary:
        cos, sin = (reordered(each, places.to(device), unit) for each in rotary)
        return cos, sin

    return Windows(
        spans=tuple(spans),
        order=order.to(device),
        to_scan=to_scan.to(device),
        to_spans=to_spans.to(device),
        back=back.to(device),
        rotary=in_order(order),
        scan_rotary=in_order(scan),
    )


def prepare(tower: Any, forward: Callable[[Any, Tensor, Grid, Known], Any]) -> None:
    """Let the tower and its attention take a `Grid`; given a tensor they do what transformers does."""
    for block in tower.blocks:
        block.attn.forward = partial(_attention, block.attn)
    tower.forward = partial(_tower, tower, forward, Known())


def _tower(tower: Any, forward: Callable[..., Any], known: Known, patches: Tensor, grid_thw: Any, **kwargs: Any) -> Any:
    if isinstance(grid_thw, Grid):
        return forward(tower, patches, grid_thw, known)
    return type(tower).forward(tower, patches, grid_thw, **kwargs)


def _attention(attention: Any, x: Tensor, cu_seqlens: Any, **kwargs: Any) -> Tensor:
    """x: [images * tokens, D]; cu_seqlens: the `Spans` of each image, or the tensor of transformers."""
    if isinstance(cu_seqlens, Tensor):
        return type(attention).forward(attention, x, cu_seqlens=cu_seqlens, **kwargs)
    cos, sin = kwargs["position_embeddings"]
    # [images, tokens, heads, width of a head] each
    q, k, v = (
        attention.qkv(x).reshape(-1, len(cos), 3, attention.num_heads, x.shape[-1] // attention.num_heads).unbind(2)
    )
    q, k = apply_rotary_pos_emb_vision(q, k, cos, sin)
    found = []
    for begin, number, length in cu_seqlens:
        queries, keys, values = (
            each[:, begin : begin + number * length].reshape(-1, length, *each.shape[2:]).transpose(1, 2)
            for each in (q, k, v)
        )
        y = F.scaled_dot_product_attention(queries, keys, values, scale=attention.scaling)
        found.append(y.transpose(1, 2).reshape(len(q), number * length, -1))
    return attention.proj(torch.cat(found, dim=1).flatten(0, 1))


def interpolation(tower: Any, grid: Grid, like: Tensor) -> Table:
    """Return how one image's patches read the tower's learned positions, a square of `num_grid_per_side`."""
    side, merge = tower.num_grid_per_side, tower.spatial_merge_size
    if transformers_5():
        find = import_module("transformers.vision_utils").get_vision_interpolation_indices_and_weights
        how = {"mode": tower.interpolation_mode, "align_corners": tower.interpolation_align_corners}
        indices, weights = find(grid.one(like.device), side, spatial_merge_size=merge, **how)
        return Table(indices, weights, tokens_first=True)
    row, column = (torch.linspace(0, side - 1, count) for count in (grid.rows, grid.columns))
    (top, bottom), (left, right) = ((at.int(), (at.int() + 1).clip(max=side - 1)) for at in (row, column))
    down, along = (row - top)[:, None], (column - left)[None, :]
    pairs = [(y, x) for y in (top, bottom) for x in (left, right)]
    indices = torch.stack([y[:, None] * side + x[None, :] for y, x in pairs]).long()
    weights = torch.stack([(1 - down) * (1 - along), (1 - down) * along, down * (1 - along), down * along])

    def merged(x: Tensor) -> Tensor:
        """[4, rows, columns] -> [4, tokens] in the order of the patches."""
        blocks = x.unflatten(2, (-1, merge)).unflatten(1, (-1, merge))
        return blocks.transpose(2, 3).flatten(1)

    weights = weights.to(tower.pos_embed.weight.dtype)
    return Table(merged(indices).to(like.device), merged(weights).to(like.device), tokens_first=False)


def rotary(tower: Any, grid: Grid, like: Tensor) -> Rotary:
    """Return the rotations of one image's patches, in the order of the patches."""
    if transformers_5():
        find = import_module("transformers.vision_utils").get_vision_position_ids
        return tower.rotary_pos_emb(like, find(grid.one(like.device), tower.spatial_merge_size))
    angles = tower.rot_pos_emb(grid.one(like.device)).flatten(1)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def reordered(x: Tensor, order: Tensor, unit: int) -> Tensor:
    """Reorder groups of `unit` tokens of x [..., tokens, D]."""
    groups = x.unflatten(-2, (-1, unit))
    return groups.index_select(groups.dim() - 3, order).flatten(-3, -2)
