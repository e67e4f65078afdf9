"""Philox4x32-10, a counter-based generator, in torch's integer operations.

Number i of a stream is a function of (key, counter i), so any device, layout and batch size draws the same words.
Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
"""

import math

import torch
from torch import Tensor

ROUNDS = 10
# Multipliers of the words 0 and 2, and what is added to the key's words after each round.
M_0, M_1 = 0xD2511F53, 0xCD9E8D57
W_0, W_1 = 0x9E3779B9, 0xBB67AE85
WORD = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Return four words for each counter. All tensors: int64 with values below 2^32, broadcast together."""
    c_0, c_1, c_2, c_3 = counter
    k_0, k_1 = key
    for _ in range(ROUNDS):
        # A product has 64 bits. int64 wraps around, so its bits are right, and the mask drops the sign's copies.
        p_0, p_1 = c_0 * M_0, c_2 * M_1
        c_0, c_1, c_2, c_3 = (p_1 >> 32 & WORD) ^ c_1 ^ k_0, p_1 & WORD, (p_0 >> 32 & WORD) ^ c_3 ^ k_1, p_0 & WORD
        k_0, k_1 = k_0 + W_0 & WORD, k_1 + W_1 & WORD
    return c_0, c_1, c_2, c_3


def words(key: tuple[Tensor, Tensor], streams: Tensor, count: int) -> tuple[Tensor, ...]:
    """Return the first `count` words of each stream as four parts, int64 [B, ceil(count / 4)] each.

    key: two words, each of shape []; streams: int64 [B], the name of each stream.
    """
    block = torch.arange(-(-count // 4), device=streams.device)
    low, high = streams[:, None] & WORD, streams[:, None] >> 32 & WORD
    return philox((block, low, high, torch.zeros_like(block)), key)


def uniform(key: tuple[Tensor, Tensor], streams: Tensor, count: int) -> Tensor:
    """Return float32 [B, count], uniform in [0, 1), multiples of 2^-24."""
    parts = [(word >> 8).float() * 2.0**-24 for word in words(key, streams, count)]
    return torch.stack(parts, dim=-1).flatten(1)[:, :count]


def normal(key: tuple[Tensor, Tensor], streams: Tensor, count: int) -> Tensor:
    """Return float32 [B, count], standard normal, by the transform of Box and Muller."""
    parts = words(key, streams, count)
    pairs: list[Tensor] = []
    for one, other in (parts[:2], parts[2:]):
        # In (0, 1]: the logarithm is finite.
        radius = torch.sqrt(-2 * torch.log((one.float() + 0.5) * 2.0**-32))
        angle = other.float() * (2 * math.pi * 2.0**-32)
        pairs += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(pairs, dim=-1).flatten(1)[:, :count]
