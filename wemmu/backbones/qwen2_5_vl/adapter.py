"""The inputs of Qwen2.5-VL: vision tokens replace the prompt's image tokens before the first layer."""

from functools import partial
from typing import Any

from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from wemmu.backbones.adapters import VLMAdapter
from wemmu.backbones.vision_tower import Grid, Known, Windows, reordered, rotary, windows_of


class Qwen2_5_VL(VLMAdapter):
    model_class = Qwen2_5_VLForConditionalGeneration

    def inputs(self, embeds: Tensor, at_images: Tensor, vision: Tensor) -> dict[str, Any]:
        return {"inputs_embeds": embeds.masked_scatter(at_images[..., None], vision.to(embeds.dtype))}

    def tower(self, visual: Any, patches: Tensor, grid: Grid, known: Known) -> Tensor:
        """Run the tower; layers with windows attend once for all windows of one size.

        Layers of full attention have transformers' order, in which their sums have its bits.
        """

        def moved(states: Tensor, order: Tensor) -> Tensor:
            return reordered(states.unflatten(0, (grid.images, -1)), order, visual.spatial_merge_unit).flatten(0, 1)

        states = visual.patch_embed(patches)
        windows = known.of(grid, states, partial(windows_in, visual))
        states = moved(states, windows.order)
        for number, block in enumerate(visual.blocks):
            if number in visual.fullatt_block_indexes:
                scan = moved(states, windows.to_scan)
                states = block(scan, cu_seqlens=grid.whole, position_embeddings=windows.scan_rotary)
                states = moved(states, windows.to_spans)
            else:
                states = block(states, cu_seqlens=windows.spans, position_embeddings=windows.rotary)
        merged = visual.merger(states).unflatten(0, (grid.images, -1))
        return merged[:, windows.back].flatten(0, 1)


def windows_in(visual: Any, grid: Grid, like: Tensor) -> Windows:
    merge = visual.spatial_merge_size
    side = visual.window_size // merge // visual.patch_size
    around = rotary(visual, grid, like)
    return windows_of(grid.rows // merge, grid.columns // merge, side, visual.spatial_merge_unit, around)


ADAPTER = Qwen2_5_VL()
