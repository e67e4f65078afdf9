"""The auto-encoder: a VLM that captions images, and a frozen WeMMU model that draws what the captions say."""

from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from wemmu.backbones.vae import FrozenVAE
from wemmu.recipes.lora import as_it_began
from wemmu.recipes.tuned_vlm import TunedVLM
from wemmu.recipes.wemmu.model import WeMMU
from wemmu.types import Prompts


class UAE(TunedVLM):
    """The language model learns; the vision tower with its projector and the generator never do.

    reference: a frozen copy of the language model with its head, for the penalty of GRPO; None without one. A language
    model with adapters needs no copy: it is its own reference with the adapters it began with. Weights of the generator
    have their names after `generator.`.
    """

    # See `WeMMU.sharded`.
    sharded = ("vlm",)

    def __init__(self, vlm: nn.Module, mean: list[float], std: list[float], generator: WeMMU, keep_reference: bool):
        super().__init__(vlm, mean, std)
        self.generator = generator.requires_grad_(False)
        self.reference: nn.ModuleDict | None = None
        if keep_reference:
            copied = deepcopy({"language_model": self.language_model, "lm_head": self.vlm.lm_head})
            self.reference = nn.ModuleDict(copied).requires_grad_(False)

    @property
    def vae(self) -> FrozenVAE:
        """The generator's autoencoder."""
        return self.generator.vae

    def train(self, mode: bool = True) -> "UAE":
        """Leave what is frozen in eval mode."""
        super().train(mode)
        for frozen in (self.generator, self.vlm.model.visual, self.reference):
            if frozen is not None:
                frozen.eval()
        return self

    def states(self, prompts: Prompts, images: Tensor, reference: bool = False) -> Tensor:
        """Return the last states [B * G, L, D] of prompts with their captions, G for each image.

        images: uint8 [B, 1, 3, H, W]. reference: by the frozen copy.
        """
        group = len(prompts.input_ids) // len(images)
        at_images = self.image_tokens(prompts, images.repeat_interleave(group, 0))
        with torch.no_grad():
            vision = self.vision(images.flatten(0, 1)).repeat_interleave(group, 0)
        model = self.language_model_of(reference)
        embeds = model.embed_tokens(prompts.input_ids)
        with as_it_began(self, "llm") if reference and self.reference is None else nullcontext():
            seen = model(
                **self.adapter.inputs(embeds, at_images, vision),
                attention_mask=prompts.mask.long(),
                position_ids=prompts.positions,
                use_cache=False,
            )
        return seen.last_hidden_state

    def logits(self, states: Tensor, reference: bool = False) -> Tensor:
        """[..., D] -> [..., vocabulary]."""
        if not reference or self.reference is None:
            return super().logits(states)
        return self.reference["lm_head"](states)

    def language_model_of(self, reference: bool) -> Any:
        """Return the policy's language model or the frozen copy."""
        if not reference or self.reference is None:
            return self.language_model
        return self.reference["language_model"]

    def modules_by_name(self) -> dict[str, nn.Module]:
        """Return the parts that a stage can name in `trains`."""
        return {"llm": nn.ModuleList([self.language_model, self.vlm.lm_head])}
