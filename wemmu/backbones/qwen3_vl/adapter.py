"""The inputs of Qwen3-VL: as Qwen2.5-VL's, plus the tower's earlier features in the first layers.

DeepStack (arXiv 2406.04334): features of several layers of the tower are added to the states at the image tokens, one
behind each of the language model's first layers. They stand behind the vision tokens, channel after channel.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from wemmu.backbones.adapters import VLMAdapter
from wemmu.backbones.vision_tower import Grid, Known, Rotary, Table, interpolation, rotary


class Qwen3VL(VLMAdapter):
    model_class = Qwen3VLForConditionalGeneration
    finds_seams = True

    def inputs(self, embeds: Tensor, at_images: Tensor, vision: Tensor) -> dict[str, Any]:
        tokens, *deep = vision.to(embeds.dtype).flatten(0, 1).split(embeds.shape[-1], dim=-1)
        return {
            "inputs_embeds": embeds.masked_scatter(at_images[..., None], tokens),
            "visual_pos_masks": at_images,
            "deepstack_visual_embeds": deep,
        }

    def tower(self, visual: Any, patches: Tensor, grid: Grid, known: Known) -> Tensor:
        """Run the tower; DeepStack's features follow the tokens."""
        states = visual.patch_embed(patches)
        around, table = known.of(grid, states, partial(positions_in, visual))
        states = (states.unflatten(0, (grid.images, -1)) + table(visual.pos_embed).to(states.dtype)).flatten(0, 1)
        deep = []
        for number, block in enumerate(visual.blocks):
            states = block(states, cu_seqlens=grid.whole, position_embeddings=around)
            if number in visual.deepstack_visual_indexes:
                merger = visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(number)]
                deep.append(merger(states))
        return torch.cat([visual.merger(states), *deep], dim=-1)


def positions_in(visual: Any, grid: Grid, like: Tensor) -> tuple[Rotary, Table]:
    return rotary(visual, grid, like), interpolation(visual, grid, like)


ADAPTER = Qwen3VL()
