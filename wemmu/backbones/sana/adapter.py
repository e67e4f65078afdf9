"""Sana as a velocity field, whole or as a chain of stages."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from diffusers.models import SanaTransformer2DModel
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from wemmu.backbones.full_precision import with_zeros
from wemmu.checkpoint.sharded_tensor import TensorSlice

# Sana counts time from 0 to 1000.
TIME_SCALE = 1000.0

# Between stages four: image tokens [B, h * w, D], projected condition [B, Q, D], the modulation of every block [B, 6 D]
# and the embedding of the time [B, D].
Activations = tuple[Tensor, ...]


class Sana:
    """See `wemmu.backbones.adapters.DiTAdapter`."""

    model_class = SanaTransformer2DModel
    input_weight = "patch_embed.proj.weight"

    def caption_channels(self, dit: SanaTransformer2DModel) -> int:
        return dit.config["caption_channels"]

    def latent_channels(self, dit: SanaTransformer2DModel) -> int:
        return dit.config["in_channels"]

    def widen(self, dit: SanaTransformer2DModel) -> None:
        layer = dit.patch_embed.proj
        dit.register_to_config(
            in_channels=2 * layer.in_channels, out_channels=dit.config["out_channels"] or layer.in_channels
        )
        layer.in_channels *= 2
        layer.weight = nn.Parameter(with_zeros(layer.weight.detach()), requires_grad=layer.weight.requires_grad)

    def velocity(self, dit: SanaTransformer2DModel, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        # Every state is real, so there is no mask.
        return dit(x_t, encoder_hidden_states=states, timestep=t * TIME_SCALE, return_dict=False)[0]

    def stage(self, dit: SanaTransformer2DModel, stage: int, stages: int) -> "SanaStage":
        return SanaStage(dit, stage, stages)


ADAPTER = Sana()


class SanaStage(nn.Module):
    """Successive blocks of a Sana, one of `stages`; the first embeds, the last returns the velocity.

    The chain computes the same as the whole `dit`. This stage keeps its modules of `dit` and drops the others;
    `canonical` maps its parameters to their names in the whole.
    """

    def __init__(self, dit: Any, stage: int, stages: int):
        """dit: a SanaTransformer2DModel. Raises ValueError if there are more stages than blocks."""
        super().__init__()
        blocks = len(dit.transformer_blocks)
        if stages > blocks:
            raise ValueError(
                f"{stages} pipeline stages are too many for the {blocks} blocks of the DiT; valid: 1 to {blocks}"
            )
        self.is_first, self.is_last = stage == 0, stage == stages - 1
        self.begin = blocks * stage // stages
        dit.transformer_blocks = dit.transformer_blocks[self.begin : blocks * (stage + 1) // stages]
        if not self.is_first:
            dit.patch_embed = dit.time_embed = dit.caption_projection = dit.caption_norm = None
        if not self.is_last:
            dit.norm_out = dit.proj_out = dit.scale_shift_table = None
        self.dit = dit

    @property
    def blocks(self) -> nn.ModuleList:
        return self.dit.transformer_blocks

    def split(self, group: ProcessGroup) -> dict[str, TensorSlice]:
        """Keep this tensor rank's slices; parameter -> where it stands in the whole one. See `sana.tensor.split`."""
        # Megatron is slow to import.
        from wemmu.backbones.sana.tensor import split

        return {f"dit.{name}": where for name, where in split(self.dit, group).items()}

    def activations(self, x_t: Tensor, states: Tensor) -> Activations:
        """Return what a stage sends to the next, without data; x_t [B, C, h, w], states [B, Q, channels]."""
        config, (b, queries, _) = self.dit.config, states.shape
        d = config["num_attention_heads"] * config["attention_head_dim"]
        shapes = (b, prod(self._grid(x_t.shape)), d), (b, queries, d), (b, 6 * d), (b, d)
        return tuple(torch.empty(s, dtype=states.dtype, device="meta", requires_grad=True) for s in shapes)

    def _grid(self, latents: Sequence[int]) -> tuple[int, int]:
        """(rows, columns) of image tokens for latents of the shape [B, C, h, w]."""
        p = self.dit.config["patch_size"]
        return latents[-2] // p, latents[-1] // p

    def canonical(self, name: str) -> str:
        """Return the name in the whole DiT of the parameter that is `name` here."""
        parts = name.removeprefix("dit.").split(".")
        if parts[0] == "transformer_blocks":
            parts[1] = str(int(parts[1]) + self.begin)
        return ".".join(parts)

    def forward(self, inputs: tuple[Tensor, ...], latents: Sequence[int]) -> Activations | Tensor:
        """Run this stage.

        inputs: for the first stage x_t [B, C, h, w], t [B] and the condition's states [B, Q, caption channels]; for
        others what the stage before returned. latents: the shape of x_t. Returns v_theta in float32 [B, C, h, w] from
        the last stage.
        """
        grid = self._grid(latents)
        h, condition, modulation, time = self._embed(*inputs) if self.is_first else inputs
        for block in self.dit.transformer_blocks:
            arguments = (h, None, condition, None, modulation, *grid)
            if self.dit.gradient_checkpointing and h.requires_grad:
                h = self.dit._gradient_checkpointing_func(block, *arguments)
            else:
                h = block(*arguments)
        return self._velocity(h, time, grid) if self.is_last else (h, condition, modulation, time)

    def _embed(self, x_t: Tensor, t: Tensor, states: Tensor) -> Activations:
        dit = self.dit
        h = dit.patch_embed(x_t.to(states.dtype))
        modulation, time = dit.time_embed(t * TIME_SCALE, batch_size=len(h), hidden_dtype=h.dtype)
        return h, dit.caption_norm(dit.caption_projection(states)), modulation, time

    def _velocity(self, h: Tensor, time: Tensor, grid: tuple[int, int]) -> Tensor:
        dit, p = self.dit, self.dit.config["patch_size"]
        patches = dit.proj_out(dit.norm_out(h, time, dit.scale_shift_table))
        patches = patches.unflatten(1, grid).unflatten(-1, (p, p, -1))  # [B, rows, columns, p, p, C]
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3).float()
