"""The heads of ROSS: language-model states of an image's tokens, [M, N, D] -> the image.

M images, N = rows x columns tokens, D the language model's width, C channels of the target for each token. A head
computes in float32 whatever the VLM computes in.
"""

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_2d_sincos_pos_embed_from_grid
from torch import Tensor, nn

from wemmu.recipes.ross import config as configs

# Width of the sinusoids of t.
TIME_CHANNELS = 256
MLP_RATIO = 4


class Attention(nn.Module):
    """Bidirectional self-attention over an image's tokens."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [M, heads, N, d]
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def mlp(width: int) -> nn.Sequential:
    hidden = MLP_RATIO * width
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))


class ModulatedBlock(nn.Module):
    """x += gate * f(norm(x) * (1 + scale) + shift) for attention and MLP; the condition sets all three."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.parts = nn.ModuleList([Attention(width, heads), mlp(width)])
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        steps = self.modulation(F.silu(cond)).chunk(6, dim=-1)
        for norm, part, (shift, scale, gate) in zip(self.norms, self.parts, (steps[:3], steps[3:]), strict=True):
            x = x + gate * part(norm(x) * (1 + scale) + shift)
        return x


class Block(nn.Module):
    """A pre-norm transformer layer; a condition is added first."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.parts = nn.ModuleList([Attention(width, heads), mlp(width)])

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        if cond is not None:
            x = x + cond
        for norm, part in zip(self.norms, self.parts, strict=True):
            x = x + part(norm(x))
        return x


class Denoiser(nn.Module):
    """Predicts the noise in z_t from the language model's states at the image tokens and from the time t.

    It begins by predicting 0, which is right on average: its last linear layer is zero, and so are all modulations. So
    no gradient reaches the states at the first steps.
    """

    def __init__(self, config: configs.Denoiser, states: int, channels: int):
        """states: D, width of the language model; channels: C of the target."""
        super().__init__()
        width = config.width
        added = config.conditioning == "add"
        block = Block if added else ModulatedBlock
        self.tokens = nn.Linear(channels, width)
        self.norm_states = nn.LayerNorm(states, eps=1e-6, elementwise_affine=added)
        self.states = nn.Linear(states, width)
        self.sinusoids = Timesteps(TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time = TimestepEmbedding(TIME_CHANNELS, width)
        self.blocks = nn.ModuleList(block(width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, channels)
        _initialise(self)
        # As in the released code: the condition starts small beside the tokens.
        for small in (self.states, self.time.linear_1, self.time.linear_2):
            nn.init.normal_(small.weight, std=0.02)
        for zero in [self.out, *(m for name, m in self.named_modules() if name.endswith("modulation"))]:
            nn.init.zeros_(zero.weight)

    def forward(self, z_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """Predict eps [M, C, h, w] from z_t [M, C, h, w], steps t int64 [M] and states [M, h * w, D]."""
        h, w = z_t.shape[-2:]
        cond = self.states(F.silu(self.norm_states(states))) + self.time(self.sinusoids(t))[:, None]  # [M, N, width]
        x = self.tokens(z_t.flatten(2).mT) + _places(h, w, self.tokens.out_features, z_t.device)
        for block in self.blocks:
            x = block(x, cond)
        shift, scale = self.modulation(F.silu(cond)).chunk(2, dim=-1)
        return self.out(self.norm(x) * (1 + scale) + shift).mT.unflatten(2, (h, w))


class Regressor(nn.Module):
    """Predicts the target of each token from its state alone."""

    def __init__(self, depth: int, states: int, channels: int):
        """depth: number of linear layers, with GELU between them. Others as `Denoiser`."""
        super().__init__()
        hidden = [layer for _ in range(depth - 1) for layer in (nn.Linear(states, states), nn.GELU())]
        self.layers = nn.Sequential(nn.LayerNorm(states, eps=1e-6, elementwise_affine=False), *hidden)
        self.out = nn.Linear(states, channels)
        _initialise(self)

    def forward(self, states: Tensor, grid: tuple[int, int]) -> Tensor:
        """Predict [M, C, h, w] from states [M, h * w, D] of a grid (h, w)."""
        return self.out(self.layers(states)).mT.unflatten(2, grid)


class TransformerRegressor(nn.Module):
    """Predicts the target of each token from the states of all tokens of the image."""

    def __init__(self, config: configs.Transformer, states: int, channels: int):
        """As `Denoiser`."""
        super().__init__()
        self.norm_states = nn.LayerNorm(states, eps=1e-6, elementwise_affine=False)
        self.states = nn.Linear(states, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.out = nn.Linear(config.width, channels)
        _initialise(self)

    def forward(self, states: Tensor, grid: tuple[int, int]) -> Tensor:
        """Predict as `Regressor` does."""
        x = self.states(self.norm_states(states)) + _places(*grid, self.states.out_features, states.device)
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x)).mT.unflatten(2, grid)


def make_head(config: configs.Head, states: int, channels: int) -> Denoiser | Regressor | TransformerRegressor:
    """Return a new head; the arguments are those of `Denoiser`."""
    match config:
        case configs.Denoiser():
            return Denoiser(config, states, channels)
        case configs.Transformer():
            return TransformerRegressor(config, states, channels)
        case configs.MLP():
            return Regressor(config.depth, states, channels)
        case configs.Linear():
            return Regressor(1, states, channels)


def _initialise(head: nn.Module) -> None:
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)


def _places(rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    """Return sines and cosines of column and row, half of the channels each: [rows * columns, width]."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    grid = torch.stack([x, y])[:, None].float()
    return get_2d_sincos_pos_embed_from_grid(width, grid, output_type="pt").to(device, torch.float32, non_blocking=True)
