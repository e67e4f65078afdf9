"""Runs a VLM on prompts and images; a frozen one returns the keys and values of every layer.

Adapters hold the differences between families of VLMs (`wemmu.backbones.adapters.VLMAdapter`).
"""

from contextlib import suppress
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from wemmu.backbones.adapters import VLMAdapter, adapter_of
from wemmu.backbones.cache import FeatureCache
from wemmu.backbones.offload import Offloadable
from wemmu.backbones.patches import patchify, resize
from wemmu.backbones.precision import KeepsFloat32, keep_float32_buffers
from wemmu.backbones.versions import with_cache
from wemmu.backbones.vision_tower import Grid
from wemmu.pixels import by_size
from wemmu.positions import token_grid
from wemmu.types import Prefix, Prompts, Sizes


class _Complete(Exception):
    """Raised when the last layer's keys and values are complete."""


class _KeysAndValues(DynamicCache):
    """Collects keys and values of every layer, then ends the forward pass if `ends` is set.

    This skips the attention and the MLP of the last layer, most of its work.
    """

    def __init__(self, layers: int, ends: bool):
        super().__init__()
        self._layers = layers if ends else None
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    # Versions of transformers differ in the further arguments. Not compiled: a graph would hold the number of keys.
    @torch.compiler.disable
    def update(self, key: Tensor, value: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        self.keys.append(key)
        self.values.append(value)
        if len(self.keys) == self._layers:
            raise _Complete
        return key, value


def places_of(mask: Tensor, count: int) -> Tensor:
    """Return where a mask [B, L] is True, in order: [B, count]. `count` is known, so the host does not wait."""
    return mask.int().argsort(dim=1, descending=True, stable=True)[:, :count]


def causal_mask(mask: Tensor) -> Tensor:
    """Return which tokens each token sees, bool [B, 1, L, L]: itself and earlier real ones, by the mask bool [B, L]."""
    length = mask.shape[1]
    return mask[:, None, None, :] & mask.new_ones(length, length).tril()


class VLM(KeepsFloat32, nn.Module):
    """The VLM with everything needed to feed it batches of images."""

    vlm: Any  # a class of transformers
    patch: int
    merge: int
    temporal: int
    token_px: int
    mean: Tensor
    std: Tensor
    # Whether a prefix ends the forward pass as soon as it is complete.
    _ends_early = False

    def __init__(self, vlm: nn.Module, mean: list[float], std: list[float]):
        """mean, std: of the VLM's image processor, per channel, for pixels in [0, 1].

        Raises:
            ValueError: if the VLM was cast after it was loaded, and its rotary frequencies with it.
        """
        super().__init__()
        if rounded := {b.dtype for name, b in vlm.named_buffers() if name.endswith("inv_freq")} - {torch.float32}:
            raise ValueError(
                f"the VLM's rotary frequencies were cast to {rounded.pop()}, which displaces far tokens; "
                "load it in the type you want, from_pretrained(..., dtype=...), instead of casting it"
            )
        keep_float32_buffers(vlm)
        self.vlm = vlm
        self.adapter: VLMAdapter = adapter_of(vlm)
        self.adapter.prepare(vlm)
        vision = self.vlm.config.vision_config
        self.patch, self.merge, self.temporal = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        self.token_px = self.patch * self.merge
        self.image_token_id: int = self.vlm.config.image_token_id
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    @property
    def language_model(self) -> Any:
        return self.vlm.model.language_model

    def image_tokens(self, prompts: Prompts, images: Tensor, sizes: Sizes | None = None) -> Tensor:
        """Return which tokens belong to the images uint8 [B, N, 3, H, W]: bool [B, L], N * rows * columns per row.

        sizes: see `Batch`.

        Raises:
            ValueError: if the prompts' image tokens are not those of the images.
        """
        if sizes is not None:
            needed = [sum(prod(token_grid(*size, self.token_px)) for size in row) for row in sizes]
            if list(prompts.image_tokens) != needed:
                raise ValueError(f"the prompts must hold {needed} image tokens, got {list(prompts.image_tokens)}")
            return prompts.input_ids == self.image_token_id
        _, n, _, height, width = images.shape
        rows, columns = token_grid(height, width, self.token_px) if n else (0, 0)
        if set(prompts.image_tokens) != {n * rows * columns}:
            raise ValueError(
                f"each prompt must hold {n} x {rows} x {columns} image tokens, got {list(prompts.image_tokens)}"
            )
        return prompts.input_ids == self.image_token_id

    def inputs(self, prompts: Prompts, at_images: Tensor, vision: Tensor | None) -> dict[str, Any]:
        """Return the language model's arguments: embeddings of the words, and `vision` at the image tokens."""
        embeds = self.language_model.embed_tokens(prompts.input_ids)
        return {"inputs_embeds": embeds} if vision is None else self.adapter.inputs(embeds, at_images, vision)

    def mask_without_cache(self, prompts: Prompts) -> Tensor | None:
        """Return the mask of a pass of the language model that has no cache.

        Whole, or None: else the model would ask the device whether it hides anything.
        """
        return causal_mask(prompts.mask) if prompts.padded or self.adapter.finds_seams else None

    def vision(self, pixels: Tensor) -> Tensor:
        """Encode uint8 [B, 3, H, W] as vision tokens [B, rows * columns, F]; F is the LLM's width or more."""
        height, width = pixels.shape[-2:]
        rows, columns = token_grid(height, width, self.token_px)
        scaled = (self.resized(pixels) / 255 - self.mean) / self.std
        patches = patchify(scaled, self.patch, self.merge, self.temporal)
        grid = Grid(len(pixels), rows * self.merge, columns * self.merge)
        return self.adapter.vision(self.vlm, patches, grid).unflatten(0, (len(pixels), -1))

    @torch.no_grad()
    def prefix(self, prompts: Prompts, images: Tensor, sizes: Sizes | None = None) -> Prefix:
        """Run the VLM over a batch of prompts. Arguments and errors as `prefix_with_gradient`."""
        return self.prefix_with_gradient(prompts, images, sizes)

    def prefix_with_gradient(self, prompts: Prompts, images: Tensor, sizes: Sizes | None = None) -> Prefix:
        """Run the VLM over a batch of prompts. The language model has a gradient, the vision tower has none.

        images: uint8 [B, N, 3, H, W], the images of each prompt in their order; N may be 0. sizes: see `Batch`. Raises
        as `image_tokens`.
        """
        at_images = self.image_tokens(prompts, images, sizes)
        with torch.no_grad():
            vision = self._image_features(images, sizes) if images.shape[1] else None
        inputs = self.inputs(prompts, at_images, vision)
        # Engines that gather sharded weights count on every forward pass to end.
        cache = _KeysAndValues(len(self.language_model.layers), ends=self._ends_early)
        # The language model, not the one with the head: no logits are computed.
        with suppress(_Complete):
            self.language_model(
                **inputs,
                # Whole, or None: else the model would ask the device whether it hides anything.
                attention_mask=causal_mask(prompts.mask) if prompts.padded else None,
                position_ids=prompts.positions,
                use_cache=True,
                **with_cache(self.language_model, cache),
            )
        longest, differ = max(prompts.image_tokens), len(set(prompts.image_tokens)) > 1
        counts = torch.tensor(prompts.image_tokens).to(images.device) if differ else None
        return Prefix(
            keys=tuple(cache.keys),
            values=tuple(cache.values),
            mask=prompts.mask,
            image_positions=prompts.positions.gather(2, places_of(at_images, longest).expand(3, -1, -1)),
            next_position=prompts.next_position,
            padded=prompts.padded,
            image_mask=None if counts is None else torch.arange(longest, device=counts.device) < counts[:, None],
        )

    def _image_features(self, images: Tensor, sizes: Sizes | None) -> Tensor:
        """Vision tokens in the order of the prompts' image tokens: [B * N, tokens, F], or [1, tokens of all, F]."""
        if sizes is None:
            return self._features(images.flatten(0, 1))
        found: dict[int, Tensor] = {}
        for places, pixels in by_size(images, sizes):
            found |= zip(places, self._features(pixels), strict=True)
        return torch.cat([found[place] for place in sorted(found)])[None]

    def _features(self, pixels: Tensor) -> Tensor:
        """`vision` for a prefix."""
        return self.vision(pixels)

    def resized(self, pixels: Tensor) -> Tensor:
        """Resize uint8 [B, 3, H, W] to float32 [B, 3, rows * token px, columns * token px], integers 0 to 255."""
        height, width = pixels.shape[-2:]
        rows, columns = token_grid(height, width, self.token_px)
        # As the processor resizes bytes.
        return resize(pixels, rows * self.token_px, columns * self.token_px).round()


class FrozenVLM(Offloadable, VLM):
    """Computes the prefix of prompts with a frozen VLM.

    It runs under no_grad, in eval mode, without the language-model head, up to the last layer's keys and values.
    """

    _ends_early = True

    def __init__(self, vlm: nn.Module, mean: list[float], std: list[float]):
        super().__init__(vlm.eval().requires_grad_(False), mean, std)
        self.cache = FeatureCache()

    def prefix_with_gradient(self, prompts: Prompts, images: Tensor, sizes: Sizes | None = None) -> Prefix:
        with self.at_work(prompts.input_ids.device):
            return super().prefix_with_gradient(prompts, images, sizes)

    def train(self, mode: bool = True) -> "FrozenVLM":
        """Stay in eval mode: a frozen model has no training behaviour."""
        return super().train(False)

    def alike_layers(self) -> tuple[nn.Module, ...]:
        """Return the layers of the language model, made equal for torch.compile, which then compiles one for all.

        A graph holds the layer's index, for which only caches of transformers have a use: none can be used afterwards.
        """
        for layer in self.language_model.layers:
            layer.self_attn.layer_idx = 0
        return tuple(self.language_model.layers)

    def _features(self, pixels: Tensor) -> Tensor:
        return self.cache(self.vision, pixels)
