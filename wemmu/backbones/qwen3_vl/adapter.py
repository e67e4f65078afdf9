"""How Qwen3-VL is fed: vision tokens as in Qwen2.5-VL, and the tower's earlier features in the first layers, too.

DeepStack (arXiv 2406.04334): features of several layers of the tower are added to the states at the image tokens, one
behind each of the language model's first layers. They stand behind the vision tokens, channel after channel.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration

from wemmu.backbones.vision_tower import Grid, Known, Places, interpolation, prepare, rotary


class Qwen3VL:
    """See `wemmu.backbones.adapters.VLMAdapter`."""

    model_class = Qwen3VLForConditionalGeneration

    def prepare(self, vlm: Qwen3VLForConditionalGeneration) -> None:
        prepare(vlm.model.visual, tower)

    def projector(self, vlm: Qwen3VLForConditionalGeneration) -> nn.Module:
        return nn.ModuleList([vlm.model.visual.merger, *vlm.model.visual.deepstack_merger_list])

    def vision(self, vlm: Qwen3VLForConditionalGeneration, patches: Tensor, grid: Grid) -> Tensor:
        return vlm.model.visual(patches, grid)

    def inputs(self, embeds: Tensor, at_images: Tensor, vision: Tensor) -> dict[str, Any]:
        tokens, *deep = vision.to(embeds.dtype).flatten(0, 1).split(embeds.shape[-1], dim=-1)
        return {
            "inputs_embeds": embeds.masked_scatter(at_images[..., None], tokens),
            "visual_pos_masks": at_images,
            "deepstack_visual_embeds": deep,
        }


def tower(visual: Any, patches: Tensor, grid: Grid, known: Known) -> Tensor:
    """The tower's forward: patches -> [images * merged tokens, F], DeepStack's features behind the tokens."""
    states = visual.patch_embed(patches)
    here = known.get(grid, states, lambda grid, like: places(visual, grid, like))
    assert here.table is not None
    states = (states.unflatten(0, (grid.images, -1)) + here.table(visual.pos_embed).to(states.dtype)).flatten(0, 1)
    deep = []
    for number, block in enumerate(visual.blocks):
        states = block(states, cu_seqlens=here.whole, position_embeddings=here.rotary)
        if number in visual.deepstack_visual_indexes:
            merger = visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(number)]
            deep.append(merger(states))
    return torch.cat([visual.merger(states), *deep], dim=-1)


def places(visual: Any, grid: Grid, like: Tensor) -> Places:
    whole = ((0, 1, grid.rows * grid.columns),)
    return Places(rotary(visual, grid, like), whole, table=interpolation(visual, grid, like))


ADAPTER = Qwen3VL()
