"""How Qwen3-VL is fed: vision tokens as in Qwen2.5-VL, and the tower's earlier features in the first layers, too.

DeepStack (arXiv 2406.04334): features of several layers of the tower are added to the states at the image tokens, one
behind each of the language model's first layers. They stand behind the vision tokens, channel after channel.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration

from wemmu.backbones.versions import vision_tokens


class Qwen3VL:
    """See `wemmu.backbones.adapters.VLMAdapter`."""

    model_class = Qwen3VLForConditionalGeneration

    def projector(self, vlm: Qwen3VLForConditionalGeneration) -> nn.Module:
        return nn.ModuleList([vlm.model.visual.merger, *vlm.model.visual.deepstack_merger_list])

    def vision(self, vlm: Qwen3VLForConditionalGeneration, patches: Tensor, grid: Tensor) -> Tensor:
        tokens, deep = vision_tokens(vlm.model.visual(patches, grid))
        return torch.cat([tokens, *deep], dim=-1)

    def inputs(self, embeds: Tensor, at_images: Tensor, vision: Tensor) -> dict[str, Any]:
        tokens, *deep = vision.to(embeds.dtype).flatten(0, 1).split(embeds.shape[-1], dim=-1)
        return {
            "inputs_embeds": embeds.masked_scatter(at_images[..., None], tokens),
            "visual_pos_masks": at_images,
            "deepstack_visual_embeds": deep,
        }


ADAPTER = Qwen3VL()
