"""The generation pathway: a trainable copy of the VLM's layers whose tokens read the frozen prefix.

The pathway's tokens (VAE tokens and queries) attend to all of the prefix and to each other, both ways; the prefix never
sees them. The layers are deep copies of the VLM's layers with their weights, and read the prefix like a cache (paper,
"Probabilistic Expert Bridge").
"""

from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wemmu.backbones.precision import keep_float32_buffers
from wemmu.backbones.recompute import recomputed
from wemmu.backbones.versions import layer_states, with_cache
from wemmu.types import Prefix


class PrefixView:
    """A read-only cache: prepends the prefix's keys and values of one layer to the layer's own.

    It does not use the layer's index, so that torch.compile compiles once for all layers.
    """

    def __init__(self, keys: Tensor, values: Tensor):
        self._keys, self._values = keys, values

    def update(self, key: Tensor, value: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        keys, values = self._keys.to(key.dtype), self._values.to(value.dtype)
        return torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)


class Pathway(nn.Module):
    """checkpointing: recompute each layer in the backward pass; see `recompute`."""

    checkpointing = False

    def __init__(self, language_model: Any, states: int = 1):
        """Copy the layers, the final norm and the rotary embedding of `language_model`, weights included.

        states: of how many layers the states are returned, evenly spaced, the last one among them.

        Raises:
            ValueError: if there are fewer layers.
        """
        super().__init__()
        depth = len(language_model.layers)
        if states > depth:
            raise ValueError(f"recipe.bridge.states.layers = {states}, but the VLM has {depth} layers")
        self.returned = frozenset(depth * (i + 1) // states - 1 for i in range(states))
        self.layers = deepcopy(language_model.layers)
        self.norm = deepcopy(language_model.norm)
        self.rotary = deepcopy(language_model.rotary_emb)
        keep_float32_buffers(self)

    def forward(self, tokens: Tensor, positions: Tensor, prefix: Prefix, real: Tensor | None = None) -> Tensor:
        """Compute states [B, G, layers, D], normed, the last layer's last, of tokens [B, G, D] at positions [3, B, G].

        real: bool [B, G], False on tokens that stand for nothing, which no other token sees; None: all are real.
        """
        if not prefix.padded and real is None:
            return self.run(tokens, positions, prefix, None)
        b, g, _ = tokens.shape
        own = prefix.mask.new_ones(b, g) if real is None else real
        mask = torch.cat([prefix.mask, own], dim=-1)[:, None, :].expand(b, g, -1)  # [B, G, L + G]
        return self.run(tokens, positions, prefix, mask)

    def run(self, tokens: Tensor, positions: Tensor, prefix: Prefix, mask: Tensor | None) -> Tensor:
        """Run as `forward` with any attention mask: bool [B, G, L + G], True where a token may look; None: everywhere.

        Without a mask attention has faster kernels: flash attention on a GPU, and keys and values that its heads share.
        """
        rotation = self.rotary(tokens, positions)
        added = None
        if mask is not None:
            # The additive form, once instead of in every layer.
            added = torch.zeros(mask.shape, dtype=tokens.dtype, device=mask.device)
            added = added.masked_fill_(~mask, float("-inf"))[:, None]
        states, returned = tokens, []
        recompute = self.checkpointing and torch.is_grad_enabled()
        for i, (layer, keys, values) in enumerate(zip(self.layers, prefix.keys, prefix.values, strict=True)):
            cache = with_cache(layer, PrefixView(keys, values))
            call = partial(recomputed, layer) if recompute else layer
            # Without a mask Hugging Face's attention would take itself for causal.
            out = call(states, attention_mask=added, is_causal=False, position_embeddings=rotation, **cache)
            states = layer_states(out)
            if i in self.returned:
                returned.append(self.norm(states))
        return torch.stack(returned, dim=2)
