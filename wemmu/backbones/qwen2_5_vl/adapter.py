"""How Qwen2.5-VL is fed: vision tokens stand where the prompt has image tokens, once, before the first layer."""

from typing import Any

from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from wemmu.backbones.vision_tower import Grid, Known, Places, prepare, reordered, rotary, windows_of


class Qwen2_5_VL:
    """See `wemmu.backbones.adapters.VLMAdapter`."""

    model_class = Qwen2_5_VLForConditionalGeneration

    def prepare(self, vlm: Qwen2_5_VLForConditionalGeneration) -> None:
        prepare(vlm.model.visual, tower)

    def projector(self, vlm: Qwen2_5_VLForConditionalGeneration) -> nn.Module:
        return vlm.model.visual.merger

    def vision(self, vlm: Qwen2_5_VLForConditionalGeneration, patches: Tensor, grid: Grid) -> Tensor:
        return vlm.model.visual(patches, grid)

    def inputs(self, embeds: Tensor, at_images: Tensor, vision: Tensor) -> dict[str, Any]:
        return {"inputs_embeds": embeds.masked_scatter(at_images[..., None], vision.to(embeds.dtype))}


def tower(visual: Any, patches: Tensor, grid: Grid, known: Known) -> Tensor:
    """The tower's forward: patches -> [images * merged tokens, F].

    Most layers attend within windows, and have those of one size together. Layers of full attention have transformers'
    order, in which their sums have its bits.
    """
    unit = visual.spatial_merge_unit

    def moved(states: Tensor, order: Tensor) -> Tensor:
        return reordered(states.unflatten(0, (grid.images, -1)), order, unit).flatten(0, 1)

    states = visual.patch_embed(patches)
    here = known.get(grid, states, lambda grid, like: places(visual, grid, like))
    windows = here.windows
    assert windows is not None
    states = moved(states, windows.order)
    for number, block in enumerate(visual.blocks):
        if number in visual.fullatt_block_indexes:
            scan = moved(states, windows.to_scan)
            states = block(scan, cu_seqlens=here.whole, position_embeddings=windows.scan_rotary)
            states = moved(states, windows.to_spans)
        else:
            states = block(states, cu_seqlens=windows.spans, position_embeddings=windows.rotary)
    merged = visual.merger(states).unflatten(0, (grid.images, -1))
    return merged[:, windows.back].flatten(0, 1)


def places(visual: Any, grid: Grid, like: Tensor) -> Places:
    merge, around = visual.spatial_merge_size, rotary(visual, grid, like)
    side = visual.window_size // merge // visual.patch_size
    windows = windows_of(grid.rows // merge, grid.columns // merge, side, visual.spatial_merge_unit, around)
    return Places(around, ((0, 1, grid.rows * grid.columns),), windows=windows)


ADAPTER = Qwen2_5_VL()
