"""WeMMU on one device: from a prompt to a velocity."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from wemmu.backbones.adapters import DiTAdapter, DiTStage, adapter_of
from wemmu.backbones.offload import Offloadable
from wemmu.backbones.recompute import recomputed
from wemmu.backbones.vae import FrozenVAE
from wemmu.backbones.vlm import FrozenVLM
from wemmu.config.task import EDITS, Task
from wemmu.noise import Noise
from wemmu.pixels import by_size, cropped_to
from wemmu.positions import token_grid
from wemmu.recipes.staged import Staged
from wemmu.recipes.wemmu.bridge import Bridge
from wemmu.recipes.wemmu.config import WeMMU as WeMMUConfig
from wemmu.types import Condition, Prompts, Sizes, VelocityOf


class WeMMU(Offloadable, Staged):
    """Stages train bridge and dit (`freeze_all_but`); vlm and vae are always frozen."""

    prefixes, sharded = WeMMUConfig.modules, WeMMUConfig.sharded
    dit: Any  # a class of diffusers

    def __init__(self, vlm: FrozenVLM, vae: FrozenVAE, bridge: Bridge, dit: nn.Module):
        super().__init__()
        self.vlm, self.vae, self.bridge, self.dit = vlm, vae, bridge, dit
        self._dit_adapter: DiTAdapter = adapter_of(dit)
        self._run_dit: VelocityOf = self._run_whole_dit
        self._takes_source = self._dit_adapter.latent_channels(dit) > vae.latent_channels

    def condition(
        self,
        prompts: Prompts,
        images: Tensor,
        size: tuple[int, int],
        noise: Noise,
        stored: Tensor | None = None,
        by_latents: bool = True,
        task: Task | None = None,
        sizes: Sizes | None = None,
    ) -> Condition:
        """Condition of the DiT for images of `size` = (height, width) px.

        images: uint8 [B, N, 3, H, W], the input images of each prompt; stored: their latents, see `input_latents`.
        by_latents: False where only the VLM may see the images. task: edits give the DiT their source, if it takes one.
        sizes: of the images, see `Batch`.
        """
        prefix = self.vlm.prefix(prompts, images, sizes)
        inputs = self.input_latents(images if by_latents else images[:, :0], stored, sizes)
        condition: Condition = self.bridge(prefix, inputs, token_grid(*size, self.vlm.token_px), noise)
        if not self._takes_source or task not in EDITS or images.shape[1] == 0:
            return condition
        return replace(condition, source=self.source_latents(images, size, stored, sizes))

    def input_latents(self, images: Tensor, stored: Tensor | None = None, sizes: Sizes | None = None) -> Tensor:
        """Return latents [B, N, C, h, w] of the input images, on the grid of their VLM tokens.

        With `sizes` they are [B, 1, C, 1, G]: the latents of a sample's images one after the other, then zeros.
        `stored` are latents of the images as they are, [B, N, C, H / latent px, W / latent px]. They are of use only
        where that is the same grid; at the published sizes (28 px tokens, 32 px latents) it is another.
        """
        b, n, _, height, width = images.shape
        if n == 0 or self.bridge.vae_branch is None:
            return images.new_zeros(b, 0, self.vae.latent_channels, 1, 1, dtype=self.vae.vae.dtype)
        if sizes is not None:
            found: dict[int, Tensor] = {}
            for places, pixels in by_size(images, sizes):
                latents = self.vae.encode(pixels, token_grid(pixels.shape[-2], pixels.shape[-1], self.vlm.token_px))
                found |= zip(places, latents.flatten(2).transpose(1, 2), strict=True)
            rows = [torch.cat([found[i] for i in range(first, first + n)]) for first in range(0, b * n, n)]  # [G_b, C]
            return pad_sequence(rows, batch_first=True).transpose(1, 2)[:, None, :, None]
        grid = token_grid(height, width, self.vlm.token_px)
        if stored is not None and stored.shape[-2:] == grid:
            return stored.to(self.vae.vae.dtype)
        return self.vae.encode(images.flatten(0, 1), grid).unflatten(0, (b, n))

    @torch.no_grad()
    def source_latents(
        self,
        images: Tensor,
        size: tuple[int, int],
        stored: Tensor | None = None,
        sizes: Sizes | None = None,
        number: int = 0,
    ) -> Tensor:
        """Return latents [B, C, h, w] of one of the input images [B, N, 3, H, W], on the grid of images of `size`.

        Images of another aspect ratio are cropped to it evenly.
        """
        grid = (size[0] // self.vae.latent_px, size[1] // self.vae.latent_px)
        if stored is not None and stored.shape[-2:] == grid:
            return stored[:, number].to(self.vae.vae.dtype)
        found: dict[int, Tensor] = {}
        own = None if sizes is None else tuple(row[number : number + 1] for row in sizes)
        for places, pixels in by_size(images[:, number : number + 1], own):
            found |= zip(places, self.vae.encode(cropped_to(pixels, size), grid), strict=True)
        return torch.stack([found[place] for place in sorted(found)])

    def target_latents(self, target: Tensor, stored: Tensor | None = None) -> Tensor:
        """Return latents [B, C, h, w] of the target images uint8 [B, 3, H, W]; `stored` ones need no encoding."""
        return self.vae.encode(target) if stored is None else stored.to(self.vae.vae.dtype)

    @property
    def caption_channels(self) -> int:
        """Channels of the condition that the DiT takes."""
        return self._dit_adapter.caption_channels(self.dit)

    def states_of(self, height: int, width: int) -> tuple[int, int]:
        """Return the shape of the states of a condition, [Q, caption channels], for an image of this size in px."""
        rows, columns = self.bridge.queries.grid(*token_grid(height, width, self.vlm.token_px))
        return rows * columns, self.caption_channels

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Compute v_theta(x_t, t, y): x_t [B, C, h, w], t [B] in [0, 1] with 1 = noise -> [B, C, h, w].

        The DiT computes in the type of the condition; the velocity has that of x_t, for a path lives in float32.
        """
        entering = x_t
        if self._takes_source:
            source = torch.zeros_like(x_t) if condition.source is None else condition.source.to(x_t.dtype)
            entering = torch.cat([x_t, source], dim=1)
        return self._run_dit(entering, t, condition.states).to(x_t.dtype)

    def velocity_of(self, dit: nn.Module, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """Compute `velocity` with another DiT of the same class."""
        return self._dit_adapter.velocity(dit, x_t.to(states.dtype), t, states).to(x_t.dtype)

    def _run_whole_dit(self, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        return self._dit_adapter.velocity(self.dit, x_t.to(states.dtype), t, states)

    def cut_dit(self, stage: int, stages: int) -> DiTStage:
        """Make the DiT one stage of a chain; the modules of the others are gone. See `run_dit_by`."""
        return self._dit_adapter.stage(self.dit, stage, stages)

    def beside_dit(self) -> tuple[nn.Module, nn.ModuleList]:
        """Return the part that engines keep whole when they cut the DiT, and its layers."""
        return self.bridge, self.bridge.pathway.layers

    def run_dit_by(self, velocity: VelocityOf) -> None:
        """Ask `velocity` from now on, which runs the whole chain: the engine that cut the DiT."""
        self._run_dit = velocity

    def checkpoint_activations(self) -> None:
        """Recompute each layer of the pathway and of the DiT in the backward pass."""
        self.bridge.pathway.checkpointing = True
        self.dit.enable_gradient_checkpointing(recomputed)

    def normed(self) -> tuple[Any, ...]:
        return self.vlm.language_model, self.bridge.pathway

    def compilable(self) -> tuple[nn.Module, ...]:
        trained = (*self.bridge.pathway.layers, *self.dit.transformer_blocks)
        return (*trained, *self.vlm.alike_layers(), *self.vae.compilable())
