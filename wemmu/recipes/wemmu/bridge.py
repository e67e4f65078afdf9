"""The bridge: frozen prefix -> condition of the DiT. The figure of the paper, from left to right."""

from typing import Any

import torch
from torch import Tensor, nn

from wemmu.noise import Noise
from wemmu.positions import image_grid_positions
from wemmu.recipes.wemmu.config import Bridge as BridgeConfig
from wemmu.recipes.wemmu.pathway import Pathway
from wemmu.recipes.wemmu.position_mlp import PositionMLP
from wemmu.recipes.wemmu.queries import build_queries, sincos
from wemmu.recipes.wemmu.vae_branch import VAEBranch
from wemmu.types import Condition, Prefix


class Bridge(nn.Module):
    """Everything trained besides the DiT: pathway, queries (if learnable), VAE branch (if on) and position MLP."""

    def __init__(self, config: BridgeConfig, language_model: Any, latent_channels: int, caption_channels: int):
        super().__init__()
        width = language_model.config.hidden_size
        self.query_position = config.queries.position
        self.pathway = Pathway(language_model, config.states.layers)
        self.queries: Any = build_queries(config.queries, width, config.position_table)
        self.vae_branch = VAEBranch(latent_channels, width) if config.vae_branch else None
        self.position_mlp = PositionMLP(config, width, caption_channels)

    def forward(self, prefix: Prefix, latents: Tensor, grid: tuple[int, int], noise: Noise) -> Condition:
        """Return the condition for images of `grid` = (rows, columns) VLM tokens.

        latents [B, N, C, h, w]: of the input images, scaled like the DiT's; N = 0 without input, or where only the VLM
        sees it. Of images of different sizes they are [B, 1, C, 1, G_vae], see `Prefix.image_mask`.
        """
        rows, columns = self.queries.grid(*grid)
        # Noise is drawn in float32; the pathway computes in the type of the prefix.
        queries = self.queries(*grid, noise)  # [B, Q, D]
        if self.query_position == "sincos":
            queries = queries + sincos(rows, columns, queries.shape[-1], queries.device)
        queries = queries.to(prefix.keys[0].dtype)
        tokens, positions, real = queries, image_grid_positions(prefix.next_position, rows, columns), None
        if self.vae_branch is not None:
            # Also without an image and hence without tokens: otherwise the branch has no gradient in some steps, and
            # sharded engines reuse the previous step's.
            tokens = torch.cat([self.vae_branch(latents), queries], dim=1)
            seen = prefix.image_positions if latents.shape[1] else prefix.image_positions[..., :0]
            positions = torch.cat([seen, positions], dim=-1)
            if prefix.image_mask is not None and latents.shape[1]:
                real = torch.cat([prefix.image_mask, prefix.mask.new_ones(queries.shape[:2])], dim=1)
        states = self.pathway(tokens, positions, prefix, real)[:, -rows * columns :]
        return Condition(self.position_mlp(states, rows, columns))
