"""Sana's linear attention in the dtype of its inputs; diffusers casts them to float32, twice the bytes."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0
from torch import Tensor, nn

# diffusers': a query that all of its weights are 0 for has the answer 0.
EPS = 1e-15


class NarrowLinearAttention(SanaLinearAttnProcessor2_0):
    """relu(q) (relu(k)^T v) / relu(q) sum(relu(k)). Products sum in float32, as the sum of the keys, and then round."""

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Run self-attention without a mask: hidden_states [B, N, D] -> [B, N, D]."""
        q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        if attn.norm_q is not None:
            q = attn.norm_q(q)
        if attn.norm_k is not None:
            k = attn.norm_k(k)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (F.relu(q), F.relu(k), v))  # [B, H, N, d]
        total = k.sum(2, dtype=torch.float32).to(q.dtype).unsqueeze(-1)  # [B, H, d, 1]
        mean = (q @ (k.transpose(2, 3) @ v)) / (q @ total + EPS)
        out: Tensor = attn.to_out[1](attn.to_out[0](mean.transpose(1, 2).flatten(2)))
        return out


def narrow(model: nn.Module) -> None:
    """Let all linear attention of Sana's blocks in `model` compute so, in place."""
    for module in model.modules():
        if type(getattr(module, "processor", None)) is SanaLinearAttnProcessor2_0:
            module.processor = NarrowLinearAttention()  # type: ignore[assignment]
