"""The bridge: frozen prefix -> condition of the DiT. The figure of the paper, from left to right."""

from typing import Any

import torch
from torch import Tensor, nn

from wemmu.noise import Noise
from wemmu.positions import image_grid_positions
from wemmu.recipes.wemmu.config import Bridge as BridgeConfig
from wemmu.recipes.wemmu.pathway import Pathway
from wemmu.recipes.wemmu.position_mlp import PositionMLP
from wemmu.recipes.wemmu.queries import build_queries
from wemmu.recipes.wemmu.vae_branch import VAEBranch
from wemmu.types import Condition, Prefix


class Bridge(nn.Module):
    """Everything trained besides the DiT: pathway, queries (if learnable), VAE branch (if on) and position MLP."""

    def __init__(self, config: BridgeConfig, language_model: Any, latent_channels: int, caption_channels: int):
        super().__init__()
        width = language_model.config.hidden_size
        self.pathway = Pathway(language_model)
        self.queries: Any = build_queries(config.queries, width, config.position_table)
        self.vae_branch = VAEBranch(latent_channels, width) if config.vae_branch else None
        self.position_mlp = PositionMLP(width, caption_channels, config.position_table, config.position_std)

    def forward(self, prefix: Prefix, latents: Tensor, grid: tuple[int, int], noise: Noise) -> Condition:
        """Return the condition for images of `grid` = (rows, columns) VLM tokens.

        latents [B, N, C, h, w]: of the input images, scaled like the DiT's; N = 0 without input.
        """
        rows, columns = self.queries.grid(*grid)
        # Noise is drawn in float32; the pathway computes in the type of the prefix.
        queries = self.queries(*grid, noise).to(prefix.keys[0].dtype)  # [B, Q, D]
        tokens, positions = queries, image_grid_positions(prefix.next_position, rows, columns)
        if self.vae_branch is not None:
            # Also without an image and hence without tokens: otherwise the branch has no gradient in some steps, and
            # sharded engines reuse the previous step's.
            tokens = torch.cat([self.vae_branch(latents), queries], dim=1)
            positions = torch.cat([prefix.image_positions, positions], dim=-1)
        states = self.pathway(tokens, positions, prefix)[:, -rows * columns :]
        return Condition(self.position_mlp(states, rows, columns))
