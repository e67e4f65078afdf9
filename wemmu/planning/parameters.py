"""The layers of every part and so its number of parameters; equal to the real classes, see tests/planning."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from wemmu.planning import autoencoder
from wemmu.planning.backbones import Language, Sana, Sizes, Vision
from wemmu.planning.layers import Layer, linear, total, vector
from wemmu.recipes.wemmu.config import Bridge

Part = Literal["vision", "language", "pathway", "vae_branch", "queries", "position_mlp", "dit", "vae"]
PARTS: tuple[Part, ...] = get_args(Part)


def vision_block(c: Vision) -> Layer:
    """One block of the vision tower, per patch."""
    d, hidden = c.hidden_size, c.intermediate_size
    mlp = [linear(d, hidden), linear(d, hidden), linear(hidden, d)]
    return total([linear(d, 3 * d), linear(d, d), *mlp, vector(2 * d)])


def vision_embedding(c: Vision) -> Layer:
    """Pixels to patches, per patch."""
    return linear(c.in_channels * c.temporal_patch_size * c.patch_size**2, c.hidden_size, bias=False)


def vision_merger(c: Vision) -> Layer:
    """Patches to one token of the language model, per token."""
    wide = c.hidden_size * c.spatial_merge_size**2
    return total([vector(c.hidden_size), linear(wide, wide), linear(wide, c.out_hidden_size)])


def language_layer(c: Language) -> Layer:
    """One layer of the language model, and so of the pathway, per token."""
    d, kv, hidden = c.hidden_size, c.kv_width, c.intermediate_size
    attention = [linear(d, d), linear(d, kv), linear(d, kv), linear(d, d, bias=False)]
    mlp = [linear(d, hidden, bias=False) * 2, linear(hidden, d, bias=False)]
    return total([*attention, *mlp, vector(2 * d)])


def position_mlp(width: int, caption: int) -> Layer:
    """The gated MLP without its table, per query."""
    return total([linear(width, caption, bias=False) * 2, linear(caption, caption, bias=False)])


@dataclass(frozen=True)
class DiT:
    """Sana by what its layers are applied to: latents, the condition's tokens, or the time, once for each sample."""

    latent: Layer
    condition: Layer
    once: Layer

    @property
    def parameters(self) -> int:
        return total([self.latent, self.condition, self.once]).parameters


def tensor_widths(c: Sana, tp: int) -> tuple[int, int, int]:
    """Channels of self-attention, of cross-attention and of one half of the feed-forward on one of `tp` tensor ranks.

    Heads are not divided: where they do not suffice, the last ranks have some of zeros.
    """
    own, cross = math.ceil(c.num_attention_heads / tp), math.ceil(c.num_cross_attention_heads / tp)
    return own * c.attention_head_dim, cross * c.cross_attention_head_dim, c.hidden // tp


def dit_block(c: Sana, tp: int = 1) -> DiT:
    """One block; with tensor parallelism what one of `tp` ranks has of it."""
    d, (own, cross, hidden) = c.width, tensor_widths(c, tp)
    norms = 2 * c.norm_elementwise_affine * d + 2 * (own + cross) * (c.qk_norm is not None)
    itself = [linear(d, own, bias=c.attention_bias) * 3, linear(own, d)]
    across = [linear(d, cross), linear(cross, d)]
    return DiT(
        latent=total([*itself, *across, *autoencoder.gated(d, hidden), vector(norms)]),
        condition=linear(c.cross_attention_dim, cross) * 2,
        once=vector(6 * d),
    )


def dit_ends(c: Sana) -> DiT:
    """All of Sana but its blocks."""
    d, patch = c.width, c.patch_size**2
    embedders = total([linear(256, d), linear(d, d)]) * (1 + c.guidance_embeds)
    return DiT(
        latent=total([linear(c.in_channels * patch, d), linear(d, (c.out_channels or c.in_channels) * patch)]),
        condition=total([linear(c.caption_channels, d), linear(d, d), vector(d)]),
        once=total([embedders, linear(d, 6 * d), vector(2 * d)]),
    )


def count(sizes: Sizes, bridge: Bridge) -> dict[Part, int]:
    """Parameters of each part; those that this configuration lacks have 0."""
    vision, language, dit = sizes.vision, sizes.language, sizes.dit
    d, layer = language.hidden_size, language_layer(language).parameters * language.num_hidden_layers
    embeddings = language.vocab_size * d * (1 if language.tie_word_embeddings else 2)
    tower = [vision_embedding(vision), vision_block(vision) * vision.depth, vision_merger(vision)]
    table = bridge.position_table**2 * d
    queries = {"noisy": 0, "learnable_fixed": bridge.queries.number * d, "learnable_dynamic": table}
    return {
        "vision": total(tower).parameters,
        "language": embeddings + layer + d,
        "pathway": layer + d,
        "vae_branch": linear(sizes.vae.latent_channels, d).parameters * bridge.vae_branch,
        "queries": queries[bridge.queries.design],
        "position_mlp": table + position_mlp(d, dit.caption_channels).parameters,
        "dit": dit_ends(dit).parameters + dit_block(dit).parameters * dit.num_layers,
        "vae": autoencoder.encoder_parameters(sizes.vae) + autoencoder.decoder_parameters(sizes.vae),
    }


def valid_tensor_degrees(c: Sana) -> list[int]:
    """Degrees of tensor parallelism: they divide the feed-forward, and there are no more ranks than heads of a kind."""
    return [n for n in divisors(c.hidden) if n <= min(c.num_attention_heads, c.num_cross_attention_heads)]


def divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def trained_parameters(parameters: Mapping[Part, int], trains: tuple[str, ...]) -> int:
    return sum(number for part, number in parameters.items() if part in trains)
