"""The VAE branch: input images as latents, one linear layer away from the pathway.

It carries the pixel detail that the VLM's aggregation loses. Each latent belongs to a VLM token of the same image:
the image is resized so that both grids are equal, and the tokens take that token's position.
"""

from torch import Tensor, nn


class VAEBranch(nn.Module):
    def __init__(self, latent_channels: int, width: int):
        super().__init__()
        self.linear = nn.Linear(latent_channels, width)

    def forward(self, latents: Tensor) -> Tensor:
        """Map latents [B, N, C, h, w] to tokens [B, N * h * w, D], in the order of the prompt's image tokens."""
        return self.linear(latents.permute(0, 1, 3, 4, 2).flatten(1, 3))
