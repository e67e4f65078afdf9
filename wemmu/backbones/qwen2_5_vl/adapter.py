"""How Qwen2.5-VL is fed: vision tokens stand where the prompt has image tokens, once, before the first layer."""

from typing import Any

from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from wemmu.backbones.versions import vision_tokens


class Qwen2_5_VL:
    """See `wemmu.backbones.adapters.VLMAdapter`."""

    model_class = Qwen2_5_VLForConditionalGeneration

    def projector(self, vlm: Qwen2_5_VLForConditionalGeneration) -> nn.Module:
        return vlm.model.visual.merger

    def vision(self, vlm: Qwen2_5_VLForConditionalGeneration, patches: Tensor, grid: Tensor) -> Tensor:
        return vision_tokens(vlm.model.visual(patches, grid))[0]

    def inputs(self, embeds: Tensor, at_images: Tensor, vision: Tensor) -> dict[str, Any]:
        return {"inputs_embeds": embeds.masked_scatter(at_images[..., None], vision.to(embeds.dtype))}


ADAPTER = Qwen2_5_VL()
