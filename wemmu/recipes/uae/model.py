"""The auto-encoder: a VLM that captions images, and a WeMMU model that generates images from the captions."""

from collections.abc import Mapping
from contextlib import nullcontext
from copy import deepcopy
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from wemmu.backbones.recompute import recomputed
from wemmu.backbones.vae import FrozenVAE
from wemmu.recipes.lora import as_it_began
from wemmu.recipes.tuned_vlm import TunedVLM
from wemmu.recipes.uae.config import UAE as UAEConfig
from wemmu.recipes.wemmu.model import WeMMU
from wemmu.types import Condition, Prompts


class UAE(TunedVLM):
    """The language model learns, and the DiT; the vision tower with its projector and the generator's rest never do.

    reference: frozen copies of what a stage trains, for the penalty of GRPO: `language_model` and `lm_head`, or `dit`;
    None without one. A module with adapters needs no copy: it is its own reference with the adapters it began with.
    encoders: what compares images, see `wemmu.recipes.uae.reward.encoders_of`. Weights of the generator have
    their names after `generator.`.
    """

    prefixes = UAEConfig.modules

    def __init__(
        self,
        vlm: nn.Module,
        mean: list[float],
        std: list[float],
        generator: WeMMU,
        refers_to: Literal["llm", "dit"] | None = None,
        encoders: Mapping[str, nn.Module] = MappingProxyType({}),
    ):
        super().__init__(vlm, mean, std)
        self.encoders = nn.ModuleDict(encoders)
        self.generator = generator.requires_grad_(False)
        self.reference: nn.ModuleDict | None = None
        if refers_to == "llm":
            copied = deepcopy({"language_model": self.language_model, "lm_head": self.vlm.lm_head})
            self.reference = nn.ModuleDict(copied).requires_grad_(False)
        elif refers_to == "dit":
            self.reference = nn.ModuleDict({"dit": deepcopy(generator.dit)}).requires_grad_(False)

    @property
    def sharded(self) -> tuple[str, ...]:  # type: ignore[override]
        """See `WeMMU.sharded`. A DiT that does not learn stays whole."""
        return ("vlm", "generator.dit") if self.trains_dit else ("vlm",)

    @property
    def trains_dit(self) -> bool:
        return any(parameter.requires_grad for parameter in self.generator.dit.parameters())

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
                attention_mask=self.mask_without_cache(prompts),
                position_ids=prompts.positions,
                use_cache=False,
            )
        return seen.last_hidden_state

    def logits(self, states: Tensor, reference: bool = False) -> Tensor:
        """Compute logits [..., vocabulary] of states [..., D]."""
        if not reference or self.reference is None:
            return super().logits(states)
        return self.reference["lm_head"](states)

    def language_model_of(self, reference: bool) -> Any:
        """Return the policy's language model or the frozen copy."""
        if not reference or self.reference is None:
            return self.language_model
        return self.reference["language_model"]

    def checkpoint_activations(self) -> None:
        """Recompute each layer of the language model, and of a DiT that learns, in the backward pass."""
        super().checkpoint_activations()
        if self.trains_dit:
            self.generator.dit.enable_gradient_checkpointing(recomputed)

    def velocity(self, x_t: Tensor, t: Tensor, states: Tensor, reference: bool = False) -> Tensor:
        """Return the generator's velocity, see `WeMMU.velocity`, or that of the DiT that the stage began with."""
        if reference and self.reference is not None:
            return self.generator.velocity_of(self.reference["dit"], x_t, t, states)
        with as_it_began(self, "dit") if reference else nullcontext():
            return self.generator.velocity(x_t, t, Condition(states))
